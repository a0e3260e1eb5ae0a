//! `homeroom resume`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::runs::typed;
use super::{Done, fine_tune, run as pipeline};
use crate::cli::{self, Command};
use crate::progress::line;
use crate::runs::{self, Status};
use crate::terminal::cell;

/// Arguments of `resume`.
#[derive(Args)]
pub struct Arguments {
    /// The run, as `homeroom runs list` names it
    #[arg(value_name = "RUN")]
    run: String,
}

/// Goes on with a run that was killed, interrupted or failed, by the command that began it, in the directory where that was typed.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let run = runs::find(&arguments.run)?;
    let id = &run.id;
    let Some(record) = &run.record else {
        bail!("run {id}: {}", run.problem.clone().unwrap_or_default());
    };
    match run.status {
        Status::Finished => {
            run.tidy();
            line(format_args!("run {id} has finished; there is nothing left to do"));
            return Ok(Done::Whole);
        }
        Status::Running => bail!("run {id}: another homeroom process is working on it"),
        Status::Interrupted | Status::Failed | Status::Killed => {}
    }
    let cwd = PathBuf::from(&record.cwd);
    std::env::set_current_dir(&cwd).with_context(|| {
        format!("run {id}: the directory that it was started in, {}, cannot be entered", cwd.display())
    })?;
    let words: Vec<OsString> = record.command.iter().map(OsString::from).collect();
    let shown = typed(&record.command);
    line(format_args!("resume    {id}   {}", cell(&shown)));
    match cli::command_of(&words) {
        Some(Command::FineTune(arguments)) => fine_tune::resume(&arguments, &run),
        Some(Command::Run(arguments)) => pipeline::resume(&arguments, &run),
        // It was typed as `resume` or through another program.
        _ => bail!("run {id}: its command cannot be read any more: {}", cell(&shown)),
    }
}
