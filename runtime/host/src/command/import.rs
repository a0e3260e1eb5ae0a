//! `homeroom import`.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

use super::show::{command_of, of_base};
use super::{Done, print};
use crate::hub::carried::{self, Carried};
use crate::progress::{line, size};
use crate::registry;
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
    if carried::is_folder(&arguments.path) {
        return carry(arguments);
    }
    let Imported { entry, left_out, cached } = import(&arguments.path, arguments.name.as_deref(), arguments.overwrite)?;
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
    if let Some(folder) = cached {
        line(format_args!(
            "note: it is a model of a cache; `homeroom import {}` takes it in under its name on the Hugging Face hub",
            folder.display()
        ));
    }
    let next = match &entry.problem {
        Some(_) => format!("homeroom show {}", entry.name),
        None => command_of(&entry.name, entry.kind, true),
    };
    line(format_args!("next      {next}"));
    if arguments.json {
        print(&json!({"name": entry.name, "path": entry.path, "kind": entry.kind, "bytes": entry.bytes, "left_out": left_out, "problem": entry.problem}).to_string())?;
    }
    Ok(Done::Whole)
}

/// Takes a model of a cache into the user's own, where it has its name on the hub.
fn carry(arguments: &Arguments) -> Result<Done> {
    let path = arguments.path.display();
    ensure!(
        arguments.name.is_none(),
        "{path}: a model of a cache keeps its name on the hub\nhint: leave --name out, or name a directory in its snapshots/"
    );
    let carried = carried::take_in(&arguments.path)?;
    let Carried { repo, folder, commits, left_out, unverified, bytes, kept_refs } = &carried;
    match bytes {
        0 => line(format_args!("here      {repo}   all of it was here already, in {}", folder.display())),
        bytes => line(format_args!("imported  {repo}   {}, in {}", size(*bytes), folder.display())),
    }
    for commit in commits {
        line(format_args!("commit    {commit}"));
    }
    match unverified {
        _ if *bytes == 0 => {}
        0 => line("checked   no file was damaged on the way"),
        count => line(format_args!(
            "note: {count} files could not be checked for damage: a memory stick without links (FAT) loses the digests; if an answer is strange, carry the model again"
        )),
    }
    for commit in left_out {
        line(format_args!("left out  {commit}, of which files are missing"));
    }
    for name in kept_refs {
        line(format_args!(
            "note: `{name}` is another commit of {repo} here, and stays it; `{repo}@COMMIT` names the one that was imported"
        ));
    }
    let base = registry::bases()?.into_iter().find(|base| base.name == *repo && !base.shared);
    let next = base.as_ref().filter(|base| base.problem.is_none()).map(of_base);
    line(format_args!("next      {}", next.unwrap_or_else(|| format!("homeroom show {repo}"))));
    if arguments.json {
        let report = json!({"name": repo, "path": folder, "kind": "base", "bytes": bytes, "commits": commits, "left_out": left_out, "unverified_files": unverified});
        print(&report.to_string())?;
    }
    Ok(Done::Whole)
}
