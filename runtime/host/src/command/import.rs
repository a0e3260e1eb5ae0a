//! `homeroom import`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::{Done, print};
use crate::progress::{line, size};
use crate::registry::import::{Imported, import};
use crate::terminal::cell;

/// Arguments of `import`.
#[derive(Args)]
pub struct Arguments {
    /// Hugging Face directory, .gguf file, adapter directory, or a folder models--owner--name of a cache
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Name of the model here [default: the file's or the directory's, with a number if it is taken]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replace a model that has this name
    #[arg(long, requires = "name")]
    overwrite: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Files that are told by their names; of more, how many.
const TOLD_MAX: usize = 6;

/// Takes in a model.
pub fn run(arguments: &Arguments) -> Result<Done> {
    let Imported { entry, left_out } = import(&arguments.path, arguments.name.as_deref(), arguments.overwrite)?;
    line(format_args!("imported  {}   {}, {}, in {}", entry.name, entry.kind, size(entry.bytes), entry.path.display()));
    if arguments.name.is_none() {
        line(format_args!("name      {}   --name chooses another", entry.name));
    }
    if !left_out.is_empty() {
        let names: Vec<String> = left_out.iter().take(TOLD_MAX).map(|name| cell(name)).collect();
        let more =
            if left_out.len() > TOLD_MAX { format!(" and {} more", left_out.len() - TOLD_MAX) } else { String::new() };
        line(format_args!("left out  {}{more}, which no answer or training reads", names.join(", ")));
    }
    if let Some(problem) = &entry.problem {
        line(format_args!("note: {}: {problem}", entry.name));
    }
    line(format_args!("next      homeroom show {}", entry.name));
    if arguments.json {
        print(&json!({"name": entry.name, "path": entry.path, "kind": entry.kind, "bytes": entry.bytes, "left_out": left_out, "problem": entry.problem}).to_string())?;
    }
    Ok(Done::Whole)
}
