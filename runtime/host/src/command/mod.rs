//! One file a command, with its own arguments.

pub mod arguments;
pub mod bench;
pub mod chat;
pub mod compare;
pub mod cp;
pub mod doctor;
pub mod eval;
pub mod export_model;
pub mod feedback;
pub mod fine_tune;
pub mod handlers;
pub mod import;
pub mod keys;
pub mod licenses;
pub mod list_models;
pub mod new;
pub mod plan;
pub mod plugins;
pub mod preview;
pub mod pull;
pub mod resume;
pub mod rm;
pub mod rows;
pub mod run;
pub mod runs;
pub mod serve;
pub mod show;
pub mod strategy;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::handler::config::handlers_in;
use crate::registry::data_directory;
use crate::stdout::Stdout;

/// How a command ended that did not fail.
pub enum Done {
    /// It did all it was asked for.
    Whole,
    /// It was interrupted, and saved what it had.
    Interrupted,
    /// It did all it was asked for, and what it looked at is not well.
    Unwell,
}

/// The file of handlers that is read if none is named: `handlers.toml` in the data directory, if it is there.
fn handlers_of_home() -> Option<PathBuf> {
    data_directory().map(|data| handlers_in(&data)).filter(|path| path.exists())
}

/// Refuses an output directory that holds what the command reads, or where the user is: replacing it would take that away.
fn spares(output_dir: &Path, inputs: impl IntoIterator<Item = (&'static str, Option<PathBuf>)>) -> Result<()> {
    // What is not there yet holds nothing.
    let Ok(output) = output_dir.canonicalize() else { return Ok(()) };
    let here = ("the working directory", std::env::current_dir().ok());
    for (what, path) in inputs.into_iter().chain([here]) {
        let path = path.and_then(|path| path.canonicalize().ok());
        ensure!(
            path.is_none_or(|path| !path.starts_with(&output)),
            "{}: {what} is in it, and would be lost; name another directory",
            output_dir.display()
        );
    }
    Ok(())
}

/// Whether two paths lead to one thing.
fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Prints a command's result. A reader that has gone away is no failure of ours.
fn print(text: &str) -> Result<()> {
    match Stdout.text(&format!("{text}\n")) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write the result"),
        _ => Ok(()),
    }
}

/// The file of this program, for child processes.
fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot tell which program this is")
}
