//! One file a command.

pub mod chat;
pub mod eval;
pub mod export_model;
pub mod fine_tune;
pub mod list_models;
pub mod plugins;
pub mod run;
pub mod serve;

use std::io::Write;

use anyhow::{Context, Result};

use crate::cli::ModelArgs;
use crate::models::ModelRef;

/// The model that a command was given.
fn reference(arguments: &ModelArgs) -> ModelRef {
    let ModelArgs { model_dir, base_model, any_base } = arguments;
    ModelRef { name: model_dir.clone(), base_model: base_model.clone(), any_base: *any_base }
}

/// Prints a command's result. A reader that has gone away is no failure of ours.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write the result"),
        _ => Ok(()),
    }
}
