//! The file that lists the handlers: `[handlers.NAME]` and `[routes.NAME]`.
//!
//! The whole file is checked before a model is loaded, and all problems are reported at once.

use std::collections::{BTreeMap, BTreeSet};
use std::env::VarError;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};
use homeroom_engine::inference::{Engine, TOGETHER};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::embedding::Embedder;
use super::limit::{Limited, Limits};
use super::local::Local;
use super::openai::{BaseUrl, Endpoint, OpenAi};
use super::route::Route;
use super::{Gives, Handler, Secret};
use crate::models::ModelRef;
use crate::registry;
use crate::serve::fine_tuning;
use crate::toml_problems::{Problems, near};

/// Name of the user's file of handlers.
pub const HANDLERS_FILE: &str = "handlers.toml";

/// The user's file of handlers, which is in the data directory.
pub fn handlers_in(data: &Path) -> PathBuf {
    data.join(HANDLERS_FILE)
}

/// A file of handlers, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its path, for messages.
    pub path: PathBuf,
    /// `[handlers.NAME]`.
    pub handlers: BTreeMap<String, HandlerSpec>,
    /// `[routes.NAME]`: names that clients give as `model`, and their handlers in order.
    pub routes: BTreeMap<String, Vec<String>>,
    /// `[fine_tuning]`.
    pub fine_tuning: Option<fine_tuning::settings::Settings>,
}

/// A handler as the file describes it, not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerSpec {
    /// `kind = "local"`, and the type that it computes in.
    Local(ModelRef, Compute),
    /// `kind = "openai"`.
    OpenAi(EndpointSpec),
}

/// An endpoint whose key is not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// `base_url`.
    pub base_url: BaseUrl,
    /// `model`.
    pub model: String,
    /// `api_key = { env = "…" }`: the variable's name.
    pub api_key_env: Option<String>,
    /// `connect_timeout_s`.
    pub connect_timeout_s: u64,
    /// `read_timeout_s`.
    pub read_timeout_s: u64,
    /// `answer_timeout_s`.
    pub answer_timeout_s: u64,
    /// `max_tokens_param`.
    pub max_tokens_param: String,
}

impl HandlerSpec {
    /// The host that conversations are sent to, if it is not this machine.
    pub fn far_host(&self) -> Option<&str> {
        match self {
            Self::Local(..) => None,
            Self::OpenAi(endpoint) => Some(endpoint.base_url.host()).filter(|_| !endpoint.base_url.is_loopback()),
        }
    }

    fn api_key(&self) -> Result<Option<Secret>, String> {
        match self {
            Self::Local(..) => Ok(None),
            Self::OpenAi(endpoint) => endpoint.api_key(),
        }
    }
}

impl EndpointSpec {
    /// The key, from the environment.
    fn api_key(&self) -> Result<Option<Secret>, String> {
        let Some(variable) = &self.api_key_env else { return Ok(None) };
        key_of(variable, std::env::var(variable)).map(Some)
    }
}

/// The key that a variable holds.
fn key_of(variable: &str, value: Result<String, VarError>) -> Result<Secret, String> {
    let why = match value.as_ref().map(|key| key.trim()) {
        Err(VarError::NotPresent) | Ok("") => {
            return Err(format!("api_key: the environment variable {variable} is not set; export {variable}=…"));
        }
        Err(VarError::NotUnicode(_)) => "it is not UTF-8",
        Ok(key) if !key.is_ascii() => "it has a character that is not ASCII",
        Ok(key) if !key.chars().all(|c| c.is_ascii_graphic()) => "keys have no spaces",
        Ok(key) => return Ok(Secret::new(key.to_owned())),
    };
    Err(format!("api_key: what the environment variable {variable} holds is not a key: {why}"))
}

const LOCAL_KEYS: [&str; 5] = ["kind", "model", "base_model", "any_base", "compute"];
const OPENAI_KEYS: [&str; 8] = [
    "kind",
    "base_url",
    "model",
    "api_key",
    "connect_timeout_s",
    "read_timeout_s",
    "answer_timeout_s",
    "max_tokens_param",
];
/// Limits of a model of this machine: it samples for so many at once, and twice as many may wait.
const LOCAL_LIMITS: Limits = Limits { running: TOGETHER, waiting: 2 * TOGETHER };
/// Limits of an endpoint: each answer is a connection, and a provider has a queue of its own.
const ENDPOINT_LIMITS: Limits = Limits { running: 32, waiting: 64 };
/// Keys whose values messages show. A key of a provider may stand anywhere else, `base_url` included.
const HARMLESS_KEYS: [&str; 17] = [
    "kind",
    "model",
    "base_model",
    "any_base",
    "compute",
    "connect_timeout_s",
    "read_timeout_s",
    "answer_timeout_s",
    "max_tokens_param",
    "handlers",
    "egress",
    "bases",
    "threads",
    "niceness",
    "queue",
    "file_mib_max",
    "files_mib_max",
];
/// Longest part of a variable's name that may hold small letters and digits: longer ones are keys.
const NAME_PART_MAX: usize = 16;
const ROUTE_KEYS: [&str; 2] = ["handlers", "egress"];

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or has problems; all of them in one message.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        Self::parse(path, &text)
    }

    /// Reads the text of a file. Paths of models in it are relative to the file.
    ///
    /// # Errors
    /// When it has problems; all of them in one message.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut problems = Problems::of_secrets(path, text, &HARMLESS_KEYS);
        let root = problems.parse();
        problems.unknown_keys(&root, &["handlers", "routes", "fine_tuning"]);
        let fine_tuning = fine_tuning::settings::Settings::read(&mut problems, path, &root);
        let mut config =
            Self { path: path.to_owned(), handlers: BTreeMap::new(), routes: BTreeMap::new(), fine_tuning };
        let tables = [named(&mut problems, &root, "handlers"), named(&mut problems, &root, "routes")];
        let [handlers, routes] = tables;
        let names: Vec<&str> = handlers.iter().map(|(name, _, _)| *name).collect();
        for (name, _, table) in &handlers {
            if let Some(spec) = handler(&mut problems, path, name, table) {
                config.handlers.insert((*name).to_owned(), spec);
            }
        }
        for (name, span, table) in &routes {
            if names.contains(name) {
                problems.at(span.clone(), format!("`{name}`: a handler has this name already; give the route another"));
            }
            let chain = route(&mut problems, span, table, &names, &config.handlers);
            config.routes.insert((*name).to_owned(), chain);
        }
        problems.into_result()?;
        Ok(config)
    }
}

type NamedTable<'t, 'a> = (&'t str, std::ops::Range<usize>, &'t Spanned<DeValue<'a>>);

/// The tables `[key.NAME]`.
fn named<'t, 'a>(problems: &mut Problems<'a>, root: &'t DeTable<'a>, key: &str) -> Vec<NamedTable<'t, 'a>> {
    let Some(value) = root.get(key) else { return Vec::new() };
    let Some(table) = value.get_ref().as_table() else {
        problems.wrong_type(key, value, &format!("tables, [{key}.NAME]"));
        return Vec::new();
    };
    let mut found = Vec::new();
    for (name, value) in table.iter() {
        if value.get_ref().as_table().is_none() {
            problems.at(name.span(), format!("`{}`: should be a table, [{key}.NAME]", name.get_ref()));
            continue;
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        if name.get_ref().is_empty() || !name.get_ref().chars().all(plain) {
            problems.at(name.span(), "a name consists of the letters a to z, A to Z, digits, and . _ - / :");
        }
        found.push((name.get_ref().as_ref(), name.span(), value));
    }
    found
}

fn handler<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    name: &str,
    value: &Spanned<DeValue<'a>>,
) -> Option<HandlerSpec> {
    let table = value.get_ref().as_table()?;
    let Some(kind) = table.get("kind") else {
        problems.at(value.span(), format!("[handlers.{name}]: `kind` is missing; it is \"local\" or \"openai\""));
        return None;
    };
    match problems.text("kind", kind)?.as_str() {
        "local" => local(problems, path, name, value.span(), table),
        "openai" => openai(problems, name, value.span(), table),
        "anthropic" => {
            problems.at(kind.span(), "kind \"anthropic\" is not supported yet; use \"local\" or \"openai\"");
            None
        }
        other => {
            problems.at(kind.span(), format!("`{other}`: unknown kind, {}", near(other, &["local", "openai"])));
            None
        }
    }
}

fn missing(problems: &mut Problems, span: std::ops::Range<usize>, name: &str, key: &str) {
    problems.at(span, format!("[handlers.{name}]: `{key}` is missing"));
}

fn local<'a>(
    problems: &mut Problems<'a>,
    path: &Path,
    name: &str,
    span: std::ops::Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &LOCAL_KEYS);
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let (model, base_model) = (text("model"), text("base_model"));
    let any_base = table.get("any_base").and_then(|value| problems.bool("any_base", value));
    let compute = table.get("compute").and_then(|value| Some((value, problems.text("compute", value)?)));
    let compute = compute.map_or(Compute::Auto, |(value, name)| {
        let known = ["auto", "bf16", "f32"];
        if !known.contains(&name.as_str()) {
            problems.at(value.span(), format!("`compute`: `{name}` is unknown, {}", near(&name, &known)));
        }
        name.parse().unwrap_or(Compute::Auto)
    });
    if !table.contains_key("model") {
        missing(problems, span, name, "model");
    }
    let at = |name: String| match path.parent().map(|dir| dir.join(&name)) {
        Some(beside) if beside.exists() => beside,
        _ => PathBuf::from(name),
    };
    let model = ModelRef { name: at(model?), base_model: base_model.map(at), any_base: any_base.unwrap_or(false) };
    Some(HandlerSpec::Local(model, compute))
}

fn openai<'a>(
    problems: &mut Problems<'a>,
    name: &str,
    span: std::ops::Range<usize>,
    table: &DeTable<'a>,
) -> Option<HandlerSpec> {
    problems.unknown_keys(table, &OPENAI_KEYS);
    for key in ["base_url", "model"] {
        if !table.contains_key(key) {
            missing(problems, span.clone(), name, key);
        }
    }
    let mut text = |key: &str| table.get(key).and_then(|value| problems.text(key, value));
    let (base_url, model, max_tokens_param) = (text("base_url"), text("model"), text("max_tokens_param"));
    let seconds = |problems: &mut Problems<'a>, key: &str, default: i64| {
        let given = table.get(key).map(|value| problems.int(key, value, 1..=3600));
        given.flatten().unwrap_or(default).unsigned_abs()
    };
    let connect_timeout_s = seconds(problems, "connect_timeout_s", 10);
    let read_timeout_s = seconds(problems, "read_timeout_s", 120);
    let answer_timeout_s = seconds(problems, "answer_timeout_s", 600);
    let max_tokens_param = max_tokens_param.unwrap_or_else(|| "max_tokens".to_owned());
    if let Some(value) = table.get("max_tokens_param").filter(|_| max_tokens_param != "max_tokens")
        && max_tokens_param != "max_completion_tokens"
    {
        problems.at(value.span(), "`max_tokens_param`: should be \"max_tokens\" or \"max_completion_tokens\"");
    }
    let api_key_env = table.get("api_key").and_then(|value| api_key(problems, value));
    let base_url = table.get("base_url").zip(base_url).and_then(|(value, url)| {
        let tell = |why: String| problems.at(value.span(), format!("`base_url`: {why}"));
        BaseUrl::parse(&url).map_err(tell).ok()
    });
    let (base_url, model) = (base_url?, model?);
    Some(HandlerSpec::OpenAi(EndpointSpec {
        base_url,
        model,
        api_key_env,
        connect_timeout_s,
        read_timeout_s,
        answer_timeout_s,
        max_tokens_param,
    }))
}

fn api_key<'a>(problems: &mut Problems<'a>, value: &Spanned<DeValue<'a>>) -> Option<String> {
    let Some(table) = value.get_ref().as_table() else {
        problems.at(
            value.span(),
            "`api_key`: a key does not belong in the file; put it into an environment variable and name that: { env = \"NAME\" }",
        );
        return None;
    };
    problems.unknown_keys(table, &["env"]);
    let Some(env) = table.get("env") else {
        problems.at(value.span(), "`api_key`: should be { env = \"NAME\" }");
        return None;
    };
    let name = problems.text("env", env)?;
    if !is_variable(&name) {
        problems.at(
            env.span(),
            "`env`: should be the name of an environment variable, such as OPENAI_API_KEY, and not the key itself",
        );
        return None;
    }
    Some(name)
}

/// Returns true if a text is a variable's name and does not look like a key.
fn is_variable(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let holds = |part: &str, kind: fn(&char) -> bool| part.chars().any(|c| kind(&c));
    let is_key = |part: &str| {
        part.len() > NAME_PART_MAX && holds(part, char::is_ascii_lowercase) && holds(part, char::is_ascii_digit)
    };
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(plain)
        && !name.split('_').any(is_key)
}

fn route<'a>(
    problems: &mut Problems<'a>,
    span: &std::ops::Range<usize>,
    value: &Spanned<DeValue<'a>>,
    names: &[&str],
    handlers: &BTreeMap<String, HandlerSpec>,
) -> Vec<String> {
    let Some(table) = value.get_ref().as_table() else { return Vec::new() };
    problems.unknown_keys(table, &ROUTE_KEYS);
    let egress = table.get("egress").and_then(|value| Some((value, problems.text("egress", value)?)));
    let deny = match egress.as_ref().map(|(value, egress)| (value, egress.as_str())) {
        None | Some((_, "deny")) => true,
        Some((_, "allow")) => false,
        Some((value, "redact")) => {
            problems.at(value.span(), "`egress`: \"redact\" is not supported yet; use \"deny\" or \"allow\"");
            false
        }
        Some((value, other)) => {
            let known = ["deny", "redact", "allow"];
            problems.at(value.span(), format!("`egress`: `{other}` is unknown, {}", near(other, &known)));
            false
        }
    };
    let Some(list) = table.get("handlers") else {
        problems.at(span.clone(), "the route has no `handlers`; add handlers = [\"…\"]");
        return Vec::new();
    };
    let Some(items) = list.get_ref().as_array() else {
        problems.wrong_type("handlers", list, "a list of names");
        return Vec::new();
    };
    if items.is_empty() {
        problems.at(list.span(), "`handlers`: the list is empty; name at least one handler");
    }
    let mut chain: Vec<String> = Vec::new();
    for item in items.iter() {
        let Some(name) = problems.text("handlers", item) else { continue };
        if !names.contains(&name.as_str()) {
            problems.at(item.span(), format!("`{name}`: there is no such handler, {}", near(&name, names)));
        } else if chain.contains(&name) {
            problems.at(item.span(), format!("`{name}`: is in the list twice"));
        } else if let Some(host) = handlers.get(&name).and_then(HandlerSpec::far_host).filter(|_| deny) {
            let hint = "take it out, or say egress = \"allow\"";
            problems
                .at(item.span(), format!("`{name}`: sends conversations to {host}, and egress is \"deny\"; {hint}"));
        }
        chain.push(name);
    }
    chain
}

/// Handlers by name, each loaded when it is first asked for.
pub struct Handlers {
    config: Config,
    loaded: Mutex<BTreeMap<String, Arc<dyn Handler>>>,
}

impl Handlers {
    /// Takes the handlers of a file; loads nothing.
    pub fn new(config: Config) -> Self {
        Self { config, loaded: Mutex::default() }
    }

    /// Takes the handlers of the edited file. Those that it has not changed stay loaded.
    pub fn succeed(&self, config: Config) -> Self {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            |name: &str| config.handlers.get(name).is_some_and(|spec| self.config.handlers.get(name) == Some(spec));
        let kept = loaded.iter().filter(|(name, _)| same(name)).map(|(name, handler)| (name.clone(), handler.clone()));
        let kept = kept.collect();
        Self { config, loaded: Mutex::new(kept) }
    }

    /// Returns what clients can name, ready to answer: the routes or, if the file has none, each handler under its own name. Only a route
    /// can allow conversations to leave this machine, so that without one a handler that sends them away is left out, with a note.
    ///
    /// # Errors
    /// When nothing can be served, or as [`Handlers::get`]. All missing keys are reported at once, before a model is loaded.
    pub fn served(&self) -> Result<BTreeMap<String, Arc<dyn Handler>>> {
        let Config { path, handlers, routes, .. } = &self.config;
        let path = path.display();
        let mut names: Vec<&String> = routes.keys().collect();
        if routes.is_empty() {
            ensure!(
                !handlers.is_empty(),
                "{path}: it has no handler\nhint: add [handlers.NAME] with kind = \"local\" and model = \"…\""
            );
            let tell = |(name, spec): (&String, &HandlerSpec)| {
                Some(format!("`{name}` sends conversations to {}, and no route allows that", spec.far_host()?))
            };
            let far: Vec<String> = handlers.iter().filter_map(tell).collect();
            names = handlers.iter().filter(|(_, spec)| spec.far_host().is_none()).map(|(name, _)| name).collect();
            let hint = "add [routes.NAME] with handlers = [\"…\"] and egress = \"allow\"";
            ensure!(!names.is_empty(), "{path}: {}\nhint: {hint}", far.join("; "));
            eprintln!("note: {path}: it has no route, so each handler is served under its own name");
            for denied in far {
                eprintln!("note: {path}: {denied}, so it is not served; {hint}");
            }
        }
        self.check_keys(&names)?;
        names.into_iter().map(|name| Ok((name.clone(), self.get(name)?))).collect()
    }

    /// Bases that several handlers share, of those that are loaded, and the names of these.
    pub fn shared(&self) -> Vec<(Arc<BaseModel>, Vec<String>)> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bases: Vec<(Arc<Engine>, Vec<String>)> = Vec::new();
        for (name, handler) in loaded.iter() {
            let Some(engine) = handler.engine() else { continue };
            match bases.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &engine)) {
                Some((_, names)) => names.push(name.clone()),
                None => bases.push((engine, vec![name.clone()])),
            }
        }
        let shared = bases.into_iter().filter(|(_, names)| names.len() > 1);
        shared.map(|(engine, names)| (engine.model().clone(), names)).collect()
    }

    /// Handlers in no route of a file that has routes: clients cannot name them.
    pub fn unrouted(&self) -> Vec<String> {
        let Config { handlers, routes, .. } = &self.config;
        let is_routed = |name: &String| routes.is_empty() || routes.values().any(|chain| chain.contains(name));
        handlers.keys().filter(|name| !is_routed(name)).cloned().collect()
    }

    /// Checks that all handlers behind some names have their keys.
    fn check_keys(&self, names: &[&String]) -> Result<()> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = |name: &&String| self.config.routes.get(*name).cloned().unwrap_or_else(|| vec![(*name).clone()]);
        let used: BTreeSet<String> = names.iter().flat_map(behind).filter(|name| !loaded.contains_key(name)).collect();
        let key = |name: &String| self.config.handlers.get(name)?.api_key().err();
        let missing: Vec<(String, String)> = used.into_iter().filter_map(|name| Some((key(&name)?, name))).collect();
        let path = self.config.path.display();
        match missing.as_slice() {
            [] => Ok(()),
            [(why, name)] => bail!("{path}: [handlers.{name}]: {why}"),
            many => {
                let lines: Vec<String> =
                    many.iter().map(|(why, name)| format!("\n  [handlers.{name}]: {why}")).collect();
                bail!("{path}: {} keys are missing{}", many.len(), lines.concat())
            }
        }
    }

    /// The file.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the host that a handler sends conversations to, if it is not this machine. Of a route there is none: the file allows
    /// where it leads.
    pub fn far_host(&self, name: &str) -> Option<&str> {
        self.config.handlers.get(name).filter(|_| !self.config.routes.contains_key(name))?.far_host()
    }

    /// What a route or a handler consists of, in order: names and descriptions.
    pub fn chain(&self, name: &str) -> Vec<(&str, &HandlerSpec)> {
        let own = [name.to_owned()];
        let names = self.config.routes.get(name).map_or(&own[..], Vec::as_slice);
        names
            .iter()
            .filter_map(|name| self.config.handlers.get_key_value(name))
            .map(|(name, spec)| (&**name, spec))
            .collect()
    }

    /// Names of routes and handlers.
    pub fn names(&self) -> Vec<&str> {
        self.config.routes.keys().chain(self.config.handlers.keys()).map(String::as_str).collect()
    }

    /// Returns a route or a handler, ready to answer. Whoever asks for a handler by name chooses where conversations go, so that
    /// `egress` is not asked.
    ///
    /// # Errors
    /// When there is no such name, a model cannot be loaded, or a key is not in the environment.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let Some(chain) = self.config.routes.get(name) else { return self.handler(name) };
        let handlers = chain.iter().map(|name| Ok((name.clone(), self.handler(name)?)));
        let handlers: Vec<(String, Arc<dyn Handler>)> = handlers.collect::<Result<_>>()?;
        let embeds = handlers.iter().find(|(_, handler)| handler.gives() == Gives::Vectors);
        if let Some((embeds, _)) = embeds.filter(|_| handlers.len() > 1) {
            let path = self.config.path.display();
            bail!(
                "{path}: [routes.{name}]: `{embeds}` is an embedding model, and vectors of two models cannot be compared; give it a route of its own"
            );
        }
        Ok(Arc::new(Route::new(handlers)))
    }

    fn handler(&self, name: &str) -> Result<Arc<dyn Handler>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handler) = loaded.get(name) {
            return Ok(handler.clone());
        }
        let path = self.config.path.display();
        let Some(spec) = self.config.handlers.get(name) else {
            let model = registry::is_name(name) && registry::place(name).is_ok_and(|place| place.exists());
            let hint =
                if model { format!("\nhint: `--model-dir {name}` is the model of that name") } else { String::new() };
            bail!("{path}: there is no handler or route `{name}`, {}{hint}", near(name, &self.names()));
        };
        let handler = load(name, spec).with_context(|| format!("{path}: [handlers.{name}]"))?;
        loaded.insert(name.to_owned(), handler.clone());
        Ok(handler)
    }
}

/// Loads a model of this machine, which answers or embeds as its files say, and puts a queue in front of it.
///
/// # Errors
/// As [`Local::load`] and [`Embedder::load`].
pub fn load_local(name: &str, model: ModelRef, compute: Compute) -> Result<Arc<dyn Handler>> {
    let handler: Arc<dyn Handler> = match Embedder::is_meant(&model.name) {
        true => Arc::new(Embedder::load(name, &model, compute)?),
        false => Arc::new(Local::load(name, model, compute)?),
    };
    Ok(Arc::new(Limited::new(handler, LOCAL_LIMITS)))
}

fn load(name: &str, spec: &HandlerSpec) -> Result<Arc<dyn Handler>> {
    match spec {
        HandlerSpec::Local(model, compute) => load_local(name, model.clone(), *compute),
        HandlerSpec::OpenAi(spec) => {
            let api_key = spec.api_key().map_err(anyhow::Error::msg)?;
            if spec.base_url.can_be_overheard() && api_key.is_some() {
                eprintln!(
                    "warning: handler `{name}`: its key and conversations are sent to {} unencrypted; use https://",
                    spec.base_url.host()
                );
            }
            let endpoint = OpenAi::new(Endpoint {
                name: name.to_owned(),
                base_url: spec.base_url.clone(),
                model: spec.model.clone(),
                api_key,
                connect_timeout: Duration::from_secs(spec.connect_timeout_s),
                read_timeout: Duration::from_secs(spec.read_timeout_s),
                answer_timeout: Duration::from_secs(spec.answer_timeout_s),
                max_tokens_param: spec.max_tokens_param.clone(),
            });
            Ok(Arc::new(Limited::new(Arc::new(endpoint), ENDPOINT_LIMITS)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[handlers.near]
kind = "local"
model = "algebra-tutor"

[handlers.far]
kind = "openai"
base_url = "https://api.example.com/v1/"
model = "gpt-x"
api_key = { env = "HOMEROOM_TEST_KEY_THAT_IS_NOT_SET" }

[handlers.beside]
kind = "openai"
base_url = "http://localhost:11434/v1"
model = "x"

[routes.safe]
handlers = ["near", "beside"]

[routes.open]
handlers = ["near", "far"]
egress = "allow"
"#;

    fn problems(text: &str) -> String {
        let error = Config::parse(Path::new("h.toml"), text).expect_err("it is wrong");
        format!("{error:#}")
    }

    #[test]
    fn a_file_says_which_handlers_there_are() -> Result<()> {
        let config = Config::parse(Path::new("h.toml"), GOOD)?;
        assert_eq!(config.routes["open"], ["near", "far"]);
        assert_eq!(
            config.handlers["near"],
            HandlerSpec::Local(ModelRef { name: "algebra-tutor".into(), ..ModelRef::default() }, Compute::Auto)
        );
        assert_eq!(config.handlers["far"].far_host(), Some("api.example.com"));
        assert_eq!(config.handlers["beside"].far_host(), None);
        let handlers = Handlers::new(config);
        let refused = |name: &str| format!("{:#}", handlers.get(name).err().expect("it cannot be had"));
        assert!(refused("far").contains("HOMEROOM_TEST_KEY_THAT_IS_NOT_SET"), "{}", refused("far"));
        assert!(refused("naer").contains("did you mean `near`?"), "{}", refused("naer"));
        assert!(refused("near").contains("no such model"), "{}", refused("near"));
        assert!(handlers.get("beside").is_ok());
        Ok(())
    }

    #[test]
    fn keys_that_are_missing_are_all_named_before_a_model_is_loaded() -> Result<()> {
        let refused = |text: &str| -> Result<String> {
            let handlers = Handlers::new(Config::parse(Path::new("h.toml"), text)?);
            Ok(format!("{:#}", handlers.served().err().context("a key is missing")?))
        };
        let one = refused(GOOD)?;
        assert!(one.contains("h.toml: [handlers.far]: api_key: the environment variable HOMEROOM_TEST_KEY_"), "{one}");
        assert!(
            one.contains("is not set; export HOMEROOM_TEST_KEY_THAT_IS_NOT_SET=…") && !one.contains("near"),
            "{one}"
        );
        // What it holds is not shown, in case it is half a key.
        let other =
            GOOD.replace("[handlers.beside]\n", "[handlers.beside]\napi_key = { env = \"CARGO_PKG_DESCRIPTION\" }\n");
        let two = refused(&other)?;
        assert!(two.contains("2 keys are missing") && two.contains("[handlers.far]: api_key"), "{two}");
        assert!(two.contains("CARGO_PKG_DESCRIPTION holds is not a key") && !two.contains("open-weight"), "{two}");
        // What no route uses needs no key.
        let unused = refused(&GOOD.replace("[\"near\", \"far\"]", "[\"near\"]"))?;
        assert!(unused.contains("no such model"), "{unused}");
        Ok(())
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let all = problems(
            r#"
[handlers.a]
kind = "lokal"

[handlers.b]
kind = "openai"
base_ulr = "https://api.example.com"
model = 7
api_key = "sk-secret"

[handlers.c]
kind = "local"
model = "x"
any_base = "yes"
compute = "f23"

[handlers.d]
model = "x"

[handlers.e]
kind = "openai"
base_url = "api.example.com"
model = "x"
read_timeout_s = 0

[route.x]
[routes.a]
handlers = ["cc", "c", "c"]
egress = "redact"
[routes.y]
handlers = []
egress = "dney"
[routes.z]
"#,
        );
        for wanted in [
            "18 problems",
            "`lokal`: unknown kind, did you mean `local`?",
            "`base_ulr`: unknown key, did you mean `base_url`?",
            "[handlers.b]: `base_url` is missing",
            "`model`: is a whole number, should be a text in quotes",
            "a key does not belong in the file",
            "`any_base`: is a text, should be true or false",
            "`compute`: `f23` is unknown",
            "[handlers.d]: `kind` is missing",
            "`base_url`: an address begins with",
            "`read_timeout_s`: should be from 1 to 3600",
            "`route`: unknown key, did you mean `routes`?",
            "`cc`: there is no such handler, did you mean `c`?",
            "`c`: is in the list twice",
            "\"redact\" is not supported yet",
            "`handlers`: the list is empty",
            "`dney` is unknown, did you mean `deny`?",
            "the route has no `handlers`",
            "`a`: a handler has this name already",
        ] {
            assert!(all.contains(wanted), "{wanted}\nis not in\n{all}");
        }
        assert!(!all.contains("sk-secret"), "{all}");
    }

    #[test]
    fn denied_egress_is_an_error_of_the_file() {
        let denied = GOOD.replace("egress = \"allow\"", "egress = \"deny\"");
        let all = problems(&denied);
        assert!(all.contains("1 problem\n") && all.contains("api.example.com, and egress is \"deny\""), "{all}");
        let default = GOOD.replace("egress = \"allow\"\n", "");
        assert!(problems(&default).contains("egress is \"deny\""));
        // Nor does a host that only looks like this machine pass.
        let alike = GOOD.replace("http://localhost:11434", "http://localhost.example.com");
        assert!(problems(&alike).contains("localhost.example.com, and egress"));
    }

    #[test]
    fn a_key_in_the_wrong_place_is_never_printed() {
        let file = |line: &str| {
            format!("[handlers.c]\nkind = \"openai\"\nbase_url = \"https://api.example.com\"\nmodel = \"m\"\n{line}\n")
        };
        for (line, wanted) in [
            (r#"apikey="sk-REAL-é""#, "`apikey`: unknown key, did you mean `api_key`?"),
            (r#"key="AIzaREAL""#, "`key`: unknown key"),
            (r#"headers={Authorization="Bearer sk-REAL"}"#, "`headers`: unknown key"),
            (r#"api_key={value="sk-REAL"}"#, "`value`: unknown key"),
            (r#"api_key={sk-REAL="x"}"#, "`[key]`: unknown key"),
            (r#"api_key={env="sk-proj-REAL"}"#, "`env`: should be the name of an environment variable"),
            (r#"api_key={env="AIzaSyREAL0123456789abc"}"#, "`env`: should be the name of an environment variable"),
            (r#"api_key={env="gsk_REAL0123456789abcdef"}"#, "`env`: should be the name of an environment variable"),
            ("api_key={env=\"A_KEY\"}\napi_key=\"REAL\"", "this key is there already"),
            ("api_key=sk-REAL", "quotes"),
            ("api_key=\"REAL", "line 5"),
            (r#"model="sk-REAL" # REAL"#, "this key is there already"),
            (r#"kind="sk-REAL""#, "this key is there already"),
            (r#"read_timeout_s="x" # REAL"#, "`read_timeout_s`: is a text"),
            ("notes=[\n\"REAL\",\n7 7]", "line 7"),
            ("[routes.r]\nhandlers={c={apikey=\"REAL\"}}", "`handlers`: is a table"),
            ("[handlers.d]\nkind=\"sk-REAL\"", "`[key]`: unknown kind"),
            ("[handlers.d]\nkind=\"openai\"\nmodel=\"m\"\nbase_url=\"https://a.b/v1?key=REAL\"", "`?` or `#`"),
            ("[handlers.d]\nkind=\"openai\"\nmodel=\"m\"\nbase_url=\"https://REAL@a.b/v1\"", "use api_key"),
        ] {
            let all = problems(&file(line));
            assert!(all.contains(wanted) && !all.contains("REAL"), "{line}: {wanted}\n{all}");
        }
        // What cannot be a key is shown.
        let all = problems("[handlers.x]\nkind = \"local\"\nmodel = \"m\"\ncompute = \"f23\"\n");
        assert!(all.contains("4 | compute = \"f23\""), "{all}");
        assert!(["OPENAI_API_KEY", "_a", "my_openai_key_2", "Schluessel"].into_iter().all(is_variable));
        assert!(!["", "1A", "A-B", "Ä", "a=b"].into_iter().any(is_variable));
    }

    #[test]
    fn what_is_wrong_with_a_key_is_said_in_its_own_words() {
        for (value, wanted) in [
            (Ok("sk-a b".to_owned()), "holds is not a key: keys have no spaces"),
            (Ok("sk-\u{1b}".to_owned()), "holds is not a key: keys have no spaces"),
            (Ok("sk-é".to_owned()), "holds is not a key: it has a character that is not ASCII"),
            (Err(VarError::NotUnicode("sk-".into())), "holds is not a key: it is not UTF-8"),
            (Ok(" \n".to_owned()), "is not set; export A_KEY=…"),
            (Err(VarError::NotPresent), "is not set; export A_KEY=…"),
        ] {
            let why = key_of("A_KEY", value).expect_err("it is no key");
            assert!(why.contains(wanted) && !why.contains("sk-"), "{why}");
        }
        assert_eq!(key_of("A_KEY", Ok(" sk-1\n".to_owned())), Ok(Secret::new("sk-1".to_owned())));
    }
}
