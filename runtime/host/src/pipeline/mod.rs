//! Pipelines: Lua scripts that load, train, measure and save, declared in TOML.
//!
//! [`config`] reads the declaration, [`sandbox`] bounds what a script can do, [`api`] is what it can call, [`check`] says what
//! is wrong without running it. [`reference`] writes the reference and the type files from the list in [`api::spec`].

pub mod api;
pub mod check;
pub mod config;
pub mod reference;
pub mod sandbox;

use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use self::api::Session;
use self::config::PipelineConfig;
use self::sandbox::Sandbox;
use crate::plugin::{Search, Trust};

/// What came of a pipeline.
#[derive(Debug)]
pub struct Outcome {
    /// What the script returned.
    pub result: Value,
    /// What a dry run would have done: in words, and as JSON.
    pub actions: Vec<(String, Value)>,
}

/// Runs a pipeline; `dry`: walks its script, and neither trains nor writes. It ends when `cancelled` says so: after the step,
/// if it is training.
///
/// # Errors
/// What the script or a verb raises, with the script's file and line.
pub fn run(config: &PipelineConfig, search: Search, dry: bool, cancelled: &dyn Fn() -> bool) -> Result<Outcome> {
    in_sandbox(config, search, dry, cancelled, |sandbox, session| {
        let script = sandbox.compile(&config.script)?;
        let returned = sandbox.call(&script)?;
        let result = api::to_json(&returned).map_err(api::Failure::into_error);
        let result = result.with_context(|| format!("{}: what it returns", sandbox::shown(&config.script)))?;
        Ok(Outcome { result, actions: session.actions() })
    })
}

/// Says what is wrong with a pipeline without running it.
///
/// # Errors
/// All problems in one message.
pub fn check(config: &PipelineConfig) -> Result<()> {
    in_sandbox(config, Search::new(&[], Trust::default()), true, &|| false, |sandbox, _| check::check(config, sandbox))
}

fn in_sandbox<T: Send>(
    config: &PipelineConfig,
    search: Search,
    dry: bool,
    cancelled: &dyn Fn() -> bool,
    work: impl FnOnce(&Sandbox, &Session) -> Result<T> + Send,
) -> Result<T> {
    let search = search.tightened(config.plugin_policy);
    let scripts = config.script.parent().context("a file has a directory")?;
    sandbox::run(scripts, config.lua_time, cancelled, |sandbox| {
        let about = json!({"config": config.path, "script": config.script, "params": config.params});
        let session = Rc::new(Session::new(sandbox, &config.script, about, search, dry));
        let provided = api::provide(sandbox, &session, &config.params).and_then(|()| sandbox.close());
        provided.map_err(|error| anyhow!("cannot set up the script's machine: {error}"))?;
        work(sandbox, &session)
    })
}
