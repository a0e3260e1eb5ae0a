//! `homeroom cp`.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::{Done, print};
use crate::progress::{line, size};
use crate::registry;

/// Arguments of `cp`.
#[derive(Args)]
pub struct Arguments {
    /// Name of the model in `homeroom list-models`
    #[arg(value_name = "NAME")]
    name: String,
    /// Name of the copy
    #[arg(value_name = "NEW")]
    new: String,
    /// Replace a model that has the new name
    #[arg(long)]
    overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Copies a model of the registry.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let Arguments { name, new, overwrite, json } = arguments;
    let (path, bytes) = registry::copy(name, new, *overwrite)?;
    line(format_args!("copied    {name} to {new}   {}, in {}", size(bytes), path.display()));
    if *json {
        print(&json!({"name": new, "path": path, "bytes": bytes, "copied_from": name}).to_string())?;
    }
    Ok(Done::Whole)
}
