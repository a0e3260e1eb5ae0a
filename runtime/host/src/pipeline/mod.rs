//! Pipelines: Lua scripts that load, train, measure and save, declared in TOML.
//!
//! [`config`] reads the declaration, [`sandbox`] bounds what a script can do ([`limits`], [`clock`], [`noted`], [`libraries`], [`output`]),
//! [`places`] what it can read, [`api`] is what it can call, [`check`] says what is wrong without running it. [`reference`] writes
//! the reference and the type files from the list in [`api::spec`]. [`store`] keeps what verbs made, and [`bytecode`] and [`tokens`] read scripts
//! without running them.

pub mod api;
pub mod bytecode;
pub mod check;
pub mod clock;
pub mod config;
pub mod errors;
pub mod libraries;
pub mod limits;
pub mod noted;
pub mod output;
pub mod places;
pub mod reference;
pub mod sandbox;
pub mod store;
pub mod tokens;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use homeroom_engine::files;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::api::Session;
use self::clock::Ended;
use self::config::PipelineConfig;
use self::errors::Failure;
use self::limits::Limits;
use self::sandbox::{Reads, Sandbox, script_text};
use crate::interrupt;
use crate::models::{Network, of_hub};
use crate::plugin::Search;
use crate::progress::line;
use crate::runs::{self, About, Entry, Kind, Status};

/// How long a script may go on after Ctrl-C, before the program ends with it.
const CANCELLED_FOR: Duration = Duration::from_secs(1);
/// How long a script may go on after its time is over, before the program ends with it. It is being stopped, and a single call of a
/// library function on all the memory that it has takes a part of that.
const EXPIRED_FOR: Duration = Duration::from_secs(30);

/// How a pipeline is run.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// Its script is walked, and nothing is trained or written.
    pub dry: bool,
    /// Nothing is looked up in the step store.
    pub fresh: bool,
    /// The run that it goes on with.
    pub resumed: Option<String>,
}

/// What came of a pipeline.
#[derive(Debug)]
pub struct Outcome {
    /// What the script returned.
    pub result: Value,
    /// The file of the run that holds the result, if it trained something.
    pub file: Option<PathBuf>,
    /// What a dry run would have done: in words, and as JSON.
    pub actions: Vec<(String, Value)>,
    /// The last handler that the script made.
    pub handler: Option<String>,
}

/// Runs a pipeline. It ends when `cancelled` says so: after the step, if it is training. `reads` gets the script and the modules that it required, each as it was when it was read.
///
/// # Errors
/// What the script or a verb raises, with the script's file and line.
pub fn run(
    config: &PipelineConfig,
    search: Search,
    how: How,
    cancelled: &dyn Fn() -> bool,
    reads: &Reads,
) -> Result<Outcome> {
    let limits = Limits { lua_time: config.lua_time, ..Limits::default() };
    in_sandbox(config, search, how, reads, cancelled, limits, |sandbox, session| play(config, sandbox, session))
}

/// As [`run`], within other bounds.
///
/// # Errors
/// As [`run`].
pub fn run_within(
    config: &PipelineConfig,
    search: Search,
    how: How,
    cancelled: &dyn Fn() -> bool,
    limits: Limits,
) -> Result<Outcome> {
    let reads = Reads::default();
    in_sandbox(config, search, how, &reads, cancelled, limits, |sandbox, session| play(config, sandbox, session))
}

fn play(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<Outcome> {
    played(config, sandbox, session).inspect_err(|error| session.failed(error))
}

fn played(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<Outcome> {
    session.resume()?;
    let script = sandbox.compile(&config.script)?;
    let returned = sandbox.call(&script, &config.script)?;
    let result = {
        let _running = session.clock().resume();
        api::to_json(session.clock(), &returned).map_err(Failure::into_error)
    };
    let place = || {
        let (script, line) = (sandbox::shown(&config.script), sandbox.sources().last_return(&config.script));
        let line = line.map(|line| format!(":{line}")).unwrap_or_default();
        format!("{script}{line}: what it returns")
    };
    let result = result.with_context(place)?;
    let file = session.keep(&result)?;
    Ok(Outcome { result, file, actions: session.actions(), handler: session.handler() })
}

/// Finds the models of the hub that the parameters name, and downloads what is not here where that is allowed. All of them, before the
/// script starts: which of them a script asks for, and when, would tell the hub of what it has read.
///
/// # Errors
/// When one is not here, and is not or cannot be downloaded.
pub fn fetch(config: &PipelineConfig, network: Network) -> Result<()> {
    let network = config.network(network);
    for (param, name) in &config.hub_models {
        of_hub(name, network).with_context(|| config.place(param).to_owned())?;
    }
    Ok(())
}

/// Says what is wrong with a pipeline without running it. Strategies are looked for by `search`, and none is loaded.
///
/// # Errors
/// All problems in one message.
pub fn check(config: &PipelineConfig, search: Search) -> Result<()> {
    let how = How { dry: true, ..How::default() };
    in_sandbox(config, search, how, &Reads::default(), &|| false, Limits::default(), |sandbox, session| {
        check::check(config, sandbox, session)
    })
}

/// As [`check`], with the file that declares the pipeline, in which required parameters need not be set.
///
/// # Errors
/// All problems of the file and of its script.
pub fn check_file(path: &Path, set: &[(String, String)], search: Search) -> Result<PipelineConfig> {
    let (config, problems) = PipelineConfig::look(path, set)?;
    let checked = config.as_ref().map_or(Ok(()), |config| check(config, search));
    match (problems, checked, config) {
        (Err(file), Err(script), _) => Err(anyhow!("{file:#}\n{script:#}")),
        (Err(problems), ..) | (_, Err(problems), _) => Err(problems),
        (Ok(()), Ok(()), config) => config.context("a file without problems is a configuration"),
    }
}

fn in_sandbox<T: Send>(
    config: &PipelineConfig,
    search: Search,
    how: How,
    reads: &Reads,
    cancelled: &dyn Fn() -> bool,
    limits: Limits,
    work: impl FnOnce(&Sandbox, &Session) -> Result<T> + Send,
) -> Result<T> {
    let search = search.tightened(config.plugin_policy);
    let scripts = config.script.parent().context("a file has a directory")?;
    sandbox::run(scripts, reads, limits, cancelled, &give_up, |sandbox| {
        let session = Rc::new(Session::new(sandbox, config, search, how)?);
        let provided = api::provide(sandbox, &session, &config.params).and_then(|()| sandbox.close());
        provided.map_err(|error| anyhow!("cannot set up the script's machine: {error}"))?;
        work(sandbox, &session)
    })
}

/// Ends the program, if a script that is to end has not for too long. Every function that is known to be slow looks at the time;
/// this is for one that is not.
fn give_up(ended: Ended, since: Duration, place: &str) {
    let (patience, code) = match ended {
        Ended::Cancelled => (CANCELLED_FOR, i32::from(interrupt::EXIT_CODE)),
        Ended::Expired(_) => (EXPIRED_FOR, 1),
    };
    if since > patience {
        let place = place.to_owned();
        // Beside, as it may be stderr that nobody reads, and that the script waits for.
        std::thread::spawn(move || {
            line(format_args!("error: {place}{ended}: the script was inside of a function that does not end"))
        });
        files::abandon_all();
        std::thread::sleep(Duration::from_millis(200));
        std::process::exit(code);
    }
}

/// The last run of the same file, parameters and script, if it was killed or interrupted.
///
/// # Errors
/// When there is no data directory, or the script cannot be read.
pub fn unfinished(config: &PipelineConfig) -> Result<Option<Entry>> {
    let about = about(config);
    let script = script_text(&config.script)?;
    let digest = bytecode::hex(&Sha256::digest(script.as_bytes()));
    let is_same = |run: &Entry| {
        run.record.as_ref().is_some_and(|record| {
            let script = record.script.as_ref().map(|script| script.sha256.as_str());
            record.kind == Kind::Pipeline && record.settings == about.settings && script == Some(digest.as_str())
        })
    };
    let last = runs::list()?.into_iter().rev().find(is_same);
    Ok(last.filter(|run| matches!(run.status, Status::Killed | Status::Interrupted)))
}

/// What a run of a pipeline is told of itself.
fn about(config: &PipelineConfig) -> About {
    let settings = json!({
        "config": config.path.to_string_lossy(),
        "script": config.script.to_string_lossy(),
        "params": config.params,
    });
    let text = script_text(&config.script).ok();
    let script = text.map(|text| (config.script.clone(), text));
    About { script, ..About::here(settings.clone(), settings.as_object().cloned().unwrap_or_default()) }
}
