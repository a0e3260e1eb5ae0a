//! `homeroom serve`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use clap::Args;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};

use super::arguments::{AnswerArgs, ModelArgs, Word, one_of, whole};
use super::{Done, handlers_of_home};
use crate::handler::config::fine_tuning;
use crate::handler::config::server::{Log, Settings};
use crate::handler::config::{Config, HandlerSpec, Handlers, load_local};
use crate::hub::HubName;
use crate::interrupt;
use crate::memory::Memory;
use crate::memory::settings::Content;
use crate::models::{last_part, shown};
use crate::near::exists;
use crate::progress::{line, size};
use crate::registry::data_directory;
use crate::serve::fine_tuning::Tuning;
use crate::serve::keys::Keys;
use crate::serve::{Class, Models, Serving, bind_for, start_as};
use crate::watch::Watch;

/// Arguments of `serve`.
#[derive(Args)]
#[command(
    override_usage = "homeroom serve --model-dir <MODEL> [OPTIONS]\n       homeroom serve [--config <FILE>] [OPTIONS]"
)]
pub struct Arguments {
    #[command(flatten)]
    model: Option<ModelArgs>,
    /// TOML file of handlers and routes; clients name a route as `model` [default: handlers.toml in $HOMEROOM_HOME]
    #[arg(long, value_name = "FILE", conflicts_with = "model_dir")]
    config: Option<PathBuf>,
    #[command(flatten)]
    answers: AnswerArgs,
    /// Take files and train on them for clients (/v1/files, /v1/fine_tuning/jobs): the model of --model-dir, or the models of this machine that the file of handlers names, unless its [fine_tuning] says which
    #[arg(long)]
    fine_tuning: bool,
    /// Port to listen on; 0 takes a free one [default: that of [server] listen, else 8080]
    #[arg(long, value_name = "PORT", value_parser = whole::<u16>(0..=u16::MAX.into()))]
    port: Option<u16>,
    /// Address of this machine to listen on; one that other machines reach wants keys [default: that of [server] listen, else 127.0.0.1]
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// One line a request on stderr, and never a word of it [default: that of [server] log, else off]
    #[arg(long, value_name = "FORM", value_parser = one_of::<Log>(&LOG))]
    log: Option<Log>,
}

/// Forms of the log.
const LOG: [Word; 3] = [("off", "none"), ("text", "for people"), ("json", "an object a line")];

/// Where it listens if nothing says so.
const LISTEN: (&str, u16) = ("127.0.0.1", 8080);

/// Serves until it is interrupted.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let config = match (&arguments.model, &arguments.config) {
        (Some(_), _) => None,
        (None, Some(path)) => Some(path.clone()),
        (None, None) => {
            let path = handlers_of_home().context(
                "nothing to serve: name a model with --model-dir, or a file of handlers with --config\nhint: `homeroom list-models` shows your models; a handlers.toml in $HOMEROOM_HOME needs no --config",
            )?;
            eprintln!("handlers {}", path.display());
            Some(path)
        }
    };
    // Before it is read: an edit in between is a change.
    let file = config.as_deref().map(Watch::new);
    let config = config
        .map(|path| {
            exists(&path)?;
            Config::read(&path)
        })
        .transpose()?;
    let mut settings = config.as_ref().map_or_else(Settings::default, |config| config.server.clone());
    let keys = Keys::of_home();
    let (host, port) = settings.listen.clone().unwrap_or_else(|| (LISTEN.0.to_owned(), LISTEN.1));
    // The port first: loading takes longer than finding out that it is taken.
    let listener = bind_for(arguments.host.as_ref().unwrap_or(&host), arguments.port.unwrap_or(port), &keys)?;
    let is_keyed = keys.wanted()?.is_some();
    settings.log = arguments.log.unwrap_or(settings.log);
    let mut watched = None;
    let models = match (&arguments.model, config.zip(file)) {
        (Some(model), _) => {
            let short = last_part(&model.model_dir).unwrap_or_else(|| "model".to_owned());
            let short = short.strip_suffix(".gguf").unwrap_or(&short);
            // Clients of a model of the hub are given its whole name, as a rule.
            let hub_name = model.model_dir.to_str().and_then(HubName::parse).filter(|_| !model.model_dir.exists());
            let whole = hub_name.map(|name| (HubName { revision: None, ..name.clone() }.to_string(), name.to_string()));
            let (name, typed) = whole.unwrap_or_else(|| (short.to_owned(), short.to_owned()));
            let handler = load_local(&name, model.reference(), arguments.answers.compute)?;
            Models::from([(name.clone(), handler)]).with_alias(short, &name).with_alias(&typed, &name)
        }
        (None, config) => {
            let (config, file) = config.context("a file was named or found")?;
            let path = config.path.clone();
            let handlers = Handlers::new(config);
            let served = served(&handlers)?;
            watched = Some((path, file, handlers));
            served
        }
    };
    for name in models.names() {
        eprintln!("model    {name}");
    }
    if let Some((_, _, handlers)) = &watched {
        tell_shared(handlers);
    }
    let class = class(arguments, watched.as_ref().map(|(_, _, handlers)| handlers.config()))?;
    let server = start_as(models, listener, Serving { class, ..Serving::of_home(settings, keys) })?;
    if let Some((path, file, handlers)) = watched {
        let (replace, count, log) = (server.replacer(), server.counter_of_reloads(), arguments.log);
        let replace = move |models, settings: Settings| {
            replace(models, Some(Settings { log: log.unwrap_or(settings.log), ..settings }));
        };
        thread::spawn(move || watch(&path, file, handlers, replace, count));
    }
    let stop = server.stopper();
    let mut pressed = false;
    interrupt::on_press(move || {
        if std::mem::replace(&mut pressed, true) {
            std::process::exit(i32::from(interrupt::EXIT_CODE));
        }
        eprintln!("\nending: answers under way are finished first; press Ctrl-C again to end at once");
        stop();
    })?;
    let who = if is_keyed { "a key is wanted" } else { "for this machine, without a key" };
    eprintln!("serving  {}   {who}   Ctrl-C ends", server.url());
    server.wait()?;
    Ok(Done::Whole)
}

/// What the server does beside answering.
fn class(arguments: &Arguments, config: Option<&Config>) -> Result<Class> {
    let mut class = Class::default();
    let asked = arguments.fine_tuning.then(|| {
        let mut settings = fine_tuning::Settings::default();
        if let Some(model) = &arguments.model {
            settings = settings.with_base(&model.model_dir.to_string_lossy(), &model.model_dir);
        }
        for (name, spec) in config.iter().flat_map(|config| &config.handlers) {
            if let HandlerSpec::Local(model, _) = spec {
                settings = settings.with_base(name, &model.name);
            }
        }
        settings
    });
    if let Some(settings) = config.and_then(|config| config.fine_tuning.clone()).or(asked) {
        let data = data_directory().context("there is no data directory for files and jobs; set HOMEROOM_HOME")?;
        let bases: Vec<&str> = settings.bases.keys().map(String::as_str).collect();
        line(format_args!("trains   {}", bases.join(", ")));
        class = class.with_tuning(Tuning::open(&data, settings.clone())?);
    }
    if let Some(settings) = config.and_then(|config| config.memory) {
        let data = data_directory().context("there is no data directory to remember in; set HOMEROOM_HOME")?;
        let memory = Arc::new(Memory::open(&data, settings)?);
        Memory::begin(&memory)?;
        let what = match settings.content {
            Content::None => "of answers nothing, and of feedback the rating".to_owned(),
            Content::Redacted => {
                format!("conversations without likely personal data, for {} days", settings.retention_days)
            }
            Content::Full => format!("conversations, for {} days", settings.retention_days),
        };
        line(format_args!("keeps    {what}"));
        class = class.with_memory(memory);
    }
    Ok(class)
}

/// What a file serves. Handlers that no route has are named, as whoever wrote them expects to find them.
fn served(handlers: &Handlers) -> Result<Models> {
    let served: Models = handlers.served()?.into_iter().collect();
    let unrouted = handlers.unrouted();
    if !unrouted.is_empty() {
        line(format_args!("note: handlers in no route, and not served: {}", unrouted.join(", ")));
    }
    Ok(served.with_unrouted(unrouted))
}

/// Says which handlers share a base, which is in memory once.
fn tell_shared(handlers: &Handlers) {
    for (base, names) in handlers.shared() {
        let (path, bytes) = (shown(&base, &base.path), size(base.stored_bytes() as u64));
        line(format_args!("shared   {}   one base, {path}, {bytes}", names.join(", ")));
    }
}

/// What of a file counts only from the next start on and is not as it was when the server began, such as
/// `[server] listen, connections; [memory]`.
fn fixed_that_differ(now: &Config, begun: &Config) -> String {
    let keys = now.server.fixed_that_differ(&begun.server).join(", ");
    let tables = [
        (format!("[server] {keys}"), keys.is_empty()),
        ("[fine_tuning]".to_owned(), now.fine_tuning == begun.fine_tuning),
        ("[memory]".to_owned(), now.memory == begun.memory),
    ];
    let differ: Vec<String> = tables.into_iter().filter(|(_, same)| !same).map(|(table, _)| table).collect();
    differ.join("; ")
}

/// Serves what an edited file says; a bad edit changes nothing, and why is told once.
fn watch(
    path: &Path,
    (mut file, problem): (Watch, Option<String>),
    mut handlers: Handlers,
    replace: impl Fn(Models, Settings),
    count: impl Fn(bool),
) {
    if let Some(problem) = problem {
        line(format_args!("note: {}: changes are looked for every 2 s only: {problem}", path.display()));
    }
    let begun = handlers.config().clone();
    // What was told of it.
    let mut told = String::new();
    // What was read last, good or bad: much is reported that changes nothing, such as a log that grows beside the file.
    let mut read = None;
    let mut missed = 0_u8;
    loop {
        let may_have_changed = file.wait();
        if !path.exists() {
            missed = missed.saturating_add(1);
            // Editors remove a file before they write it: it is gone if it is not back at the next look.
            if missed == 2 {
                line(format_args!("note: {} is gone; what was served is served on", path.display()));
            }
            continue;
        }
        missed = 0;
        if !may_have_changed {
            continue;
        }
        let text = read_text(path, SMALL_FILE_BYTES_MAX);
        let now = (file.identity(), text.as_ref().ok().cloned());
        if read.as_ref() == Some(&now) {
            continue;
        }
        read = Some(now);
        let edited = text.and_then(|text| Config::parse(path, &text)).and_then(|config| {
            if config == *handlers.config() {
                return Ok(None);
            }
            let next = handlers.succeed(config);
            let served = served(&next)?;
            Ok(Some((next, served)))
        });
        match edited {
            Ok(None) => {}
            Ok(Some((next, served))) => {
                let names: Vec<String> = served.names().map(str::to_owned).collect();
                replace(served, next.config().server.clone());
                count(true);
                handlers = next;
                let fixed = fixed_that_differ(handlers.config(), &begun);
                if fixed != told && !fixed.is_empty() {
                    let path = path.display();
                    line(format_args!("note: {path}: what is edited of {fixed} counts from the next start on"));
                }
                told = fixed;
                line(format_args!("reload   {}: {}", path.display(), names.join(", ")));
                tell_shared(&handlers);
            }
            Err(error) => {
                count(false);
                line(format_args!("reload   refused: {error:#}\n         what was served is served on"));
            }
        }
    }
}
