//! Pipelines: Lua scripts that load, train, measure and save, declared in TOML.
//!
//! [`config`] reads the declaration, [`sandbox`] bounds what a script can do ([`limits`], [`clock`], [`libraries`], [`output`]),
//! [`places`] what it can read, [`api`] is what it can call, [`check`] says what is wrong without running it. [`reference`] writes
//! the reference and the type files from the list in [`api::spec`].

pub mod api;
pub mod check;
pub mod clock;
pub mod config;
pub mod errors;
pub mod libraries;
pub mod limits;
pub mod output;
pub mod places;
pub mod reference;
pub mod sandbox;

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use homeroom_engine::files::{self, SMALL_FILE_BYTES_MAX, read_text};
use serde_json::{Value, json};

use self::api::Session;
use self::clock::Ended;
use self::config::PipelineConfig;
use self::errors::Failure;
use self::limits::Limits;
use self::sandbox::Sandbox;
use crate::interrupt;
use crate::models::{Network, of_hub};
use crate::plugin::{Search, Trust};
use crate::progress::line;
use crate::runs::About;
use crate::watch::Files;

/// How long a script may go on after Ctrl-C, before the program ends with it.
const CANCELLED_FOR: Duration = Duration::from_secs(1);
/// How long a script may go on after its time is over, before the program ends with it. It is being stopped, and a single call of a
/// library function on all the memory that it has takes a part of that.
const EXPIRED_FOR: Duration = Duration::from_secs(30);

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

/// Runs a pipeline; `dry`: walks its script, and neither trains nor writes. It ends when `cancelled` says so: after the step,
/// if it is training. `files` gets the script and the modules that it required, each as it was when it was read.
///
/// # Errors
/// What the script or a verb raises, with the script's file and line.
pub fn run(
    config: &PipelineConfig,
    search: Search,
    dry: bool,
    cancelled: &dyn Fn() -> bool,
    files: &mut Files,
) -> Result<Outcome> {
    let limits = Limits { lua_time: config.lua_time, ..Limits::default() };
    in_sandbox(config, search, dry, cancelled, limits, |sandbox, session| {
        let outcome = play(config, sandbox, session);
        files.extend(sandbox.files());
        outcome
    })
}

/// As [`run`], within other bounds.
///
/// # Errors
/// As [`run`].
pub fn run_within(
    config: &PipelineConfig,
    search: Search,
    dry: bool,
    cancelled: &dyn Fn() -> bool,
    limits: Limits,
) -> Result<Outcome> {
    in_sandbox(config, search, dry, cancelled, limits, |sandbox, session| play(config, sandbox, session))
}

fn play(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<Outcome> {
    played(config, sandbox, session).inspect_err(|error| session.failed(error))
}

fn played(config: &PipelineConfig, sandbox: &Sandbox, session: &Session) -> Result<Outcome> {
    let script = sandbox.compile(&config.script)?;
    let returned = sandbox.call(&script, &config.script)?;
    let result = {
        let _running = session.clock().resume();
        api::to_json(session.clock(), &returned).map_err(Failure::into_error)
    };
    let result = result.with_context(|| format!("{}: what it returns", sandbox::shown(&config.script)))?;
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
        let place = || format!("{}: parameter `{param}`", config.path.display());
        of_hub(name, network).with_context(place)?;
    }
    Ok(())
}

/// Says what is wrong with a pipeline without running it.
///
/// # Errors
/// All problems in one message.
pub fn check(config: &PipelineConfig) -> Result<()> {
    let search = Search::new(&[], Trust::default());
    in_sandbox(config, search, true, &|| false, Limits::default(), |sandbox, session| {
        check::check(config, sandbox, session)
    })
}

fn in_sandbox<T: Send>(
    config: &PipelineConfig,
    search: Search,
    dry: bool,
    cancelled: &dyn Fn() -> bool,
    limits: Limits,
    work: impl FnOnce(&Sandbox, &Session) -> Result<T> + Send,
) -> Result<T> {
    let search = search.tightened(config.plugin_policy);
    let scripts = config.script.parent().context("a file has a directory")?;
    sandbox::run(scripts, limits, cancelled, &give_up, |sandbox| {
        let session = Rc::new(Session::new(sandbox, config, search, dry)?);
        let provided = api::provide(sandbox, &session, &config.params).and_then(|()| sandbox.close());
        provided.map_err(|error| anyhow!("cannot set up the script's machine: {error}"))?;
        work(sandbox, &session)
    })
}

/// Ends the program, if a script that is to end has not for too long. Every function that is known to be slow looks at the time;
/// this is for one that is not.
fn give_up(ended: Ended, since: Duration) {
    let (patience, code) = match ended {
        Ended::Cancelled => (CANCELLED_FOR, i32::from(interrupt::EXIT_CODE)),
        Ended::Expired(_) => (EXPIRED_FOR, 1),
    };
    if since > patience {
        // Beside, as it may be stderr that nobody reads, and that the script waits for.
        std::thread::spawn(move || {
            line(format_args!("error: {ended}: the script was inside of a function that does not end"))
        });
        files::abandon_all();
        std::thread::sleep(Duration::from_millis(200));
        std::process::exit(code);
    }
}

/// What a run of a pipeline is told of itself.
fn about(config: &PipelineConfig) -> About {
    let settings = json!({
        "config": config.path.to_string_lossy(),
        "script": config.script.to_string_lossy(),
        "params": config.params,
    });
    let text = read_text(&config.script, SMALL_FILE_BYTES_MAX).ok();
    let script = text.map(|text| (config.script.clone(), text));
    About { script, ..About::here(settings.clone(), settings.as_object().cloned().unwrap_or_default()) }
}
