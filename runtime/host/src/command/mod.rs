//! One file a command.

pub mod bench;
pub mod chat;
pub mod eval;
pub mod export_model;
pub mod fine_tune;
pub mod list_models;
pub mod plugins;
pub mod run;
pub mod serve;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cli::ModelArgs;
use crate::models::ModelRef;
use crate::stdout::Stdout;

/// The model that a command was given.
fn reference(arguments: &ModelArgs) -> ModelRef {
    let ModelArgs { model_dir, base_model, any_base } = arguments;
    ModelRef { name: model_dir.clone(), base_model: base_model.clone(), any_base: *any_base }
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
