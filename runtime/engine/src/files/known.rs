//! The files of a result: what may be copied as a part of it, and what `--overwrite` may replace.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// File of PEFT's configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File of an adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// File of what Homeroom knows beyond PEFT.
pub const HOMEROOM_FILE: &str = "homeroom.json";
/// Directory of the templates that have names, in a Hugging Face directory.
pub const TEMPLATES_DIR: &str = "additional_chat_templates";

/// The files of an adapter, and those of a whole model that was trained, but for [`TEXT_FILES`].
const RESULT_FILES: [&str; 7] = [
    CONFIG_FILE,
    WEIGHTS_FILE,
    HOMEROOM_FILE,
    "trainer_state.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
];

/// What of a tokenizer and its chat template lies beside a model or an adapter.
pub const TEXT_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// The files of a result that have fixed names.
pub fn result_files() -> impl Iterator<Item = &'static str> {
    RESULT_FILES.into_iter().chain(TEXT_FILES)
}

/// The chat templates with names that a result has, as paths within it.
///
/// # Errors
/// When the directory of theirs cannot be listed.
pub fn named_templates(result: &Path) -> Result<Vec<PathBuf>> {
    let directory = result.join(TEMPLATES_DIR);
    // A link is not followed: what it leads to is no part of the result.
    if !fs::symlink_metadata(&directory).is_ok_and(|about| about.is_dir()) {
        return Ok(Vec::new());
    }
    let list = || -> std::io::Result<Vec<PathBuf>> {
        let names = fs::read_dir(&directory)?.map(|entry| Ok(Path::new(TEMPLATES_DIR).join(entry?.file_name())));
        names.filter(|name| name.as_ref().map_or(true, |name| is_template(name))).collect()
    };
    let mut names = list().with_context(|| format!("{}: cannot list", directory.display()))?;
    names.sort();
    Ok(names)
}

fn is_template(name: &Path) -> bool {
    name.extension().is_some_and(|extension| extension == "jinja")
}

/// Whether a directory holds nothing but chat templates.
fn holds_templates(directory: &Path) -> bool {
    let template = |entry: std::io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| is_template(&entry.path()) && entry.file_type().is_ok_and(|kind| !kind.is_dir()))
    };
    fs::read_dir(directory).is_ok_and(|mut entries| entries.all(template))
}

/// Whether a file of this name is part of a result, a shard of its weights and a GGUF file among them.
fn is_known(name: &str) -> bool {
    let shard = name.starts_with("model-") && name.ends_with(".safetensors");
    let exported = Path::new(name).extension().is_some_and(|ending| ending == "gguf");
    shard || exported || name == "model.safetensors.index.json" || result_files().any(|file| file == name)
}

/// Whether a directory within another holds files that may go, at least one and nothing else.
fn holds_only(path: &Path, directory: &Path, may_go: &impl Fn(&Path) -> bool) -> bool {
    let may_go = |entry: io::Result<fs::DirEntry>| -> Option<bool> {
        let entry = entry.ok()?;
        let name = directory.join(entry.file_name());
        Some(match entry.file_type().ok()?.is_dir() {
            true => name.components().count() < DEPTH_MAX && holds_only(path, &name, may_go),
            false => may_go(&name),
        })
    };
    let entries =
        fs::read_dir(path.join(directory)).and_then(|entries| entries.map(Ok).collect::<io::Result<Vec<_>>>());
    entries.is_ok_and(|entries| !entries.is_empty() && entries.into_iter().all(|entry| may_go(entry) == Some(true)))
}

/// How deep in a model's directory a file of it may lie.
const DEPTH_MAX: usize = 8;

/// Refuses to replace a directory that holds anything but a result: whatever else lies there would be lost.
///
/// # Errors
/// Names what is no part of a result.
pub fn replaceable(path: &Path) -> Result<()> {
    replaceable_but_for(path, |_| false)
}

/// As [`replaceable`], where files of further names may be lost, too, and directories of them: both are asked for by their paths in the
/// directory.
///
/// # Errors
/// As [`replaceable`].
pub fn replaceable_but_for(path: &Path, may_go: impl Fn(&Path) -> bool) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("{}: cannot write a directory here", path.display()))?,
    };
    // An entry that cannot be told is not taken for one that may go.
    let entries =
        entries.collect::<io::Result<Vec<_>>>().with_context(|| format!("{}: cannot list", path.display()))?;
    let mut others: Vec<String> = entries
        .iter()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            // A link is one entry: what it leads to is not lost.
            let is_file = entry.file_type().is_ok_and(|kind| !kind.is_dir());
            let known = if is_file {
                is_known(&name) || may_go(Path::new(&name))
            } else {
                name == TEMPLATES_DIR && holds_templates(&entry.path()) || holds_only(path, Path::new(&name), &may_go)
            };
            (!known).then_some(name)
        })
        .collect();
    others.sort();
    let Some(first) = others.first() else { return Ok(()) };
    let more = if others.len() > 1 { format!(" and {} more", others.len() - 1) } else { String::new() };
    bail!(
        "{}: holds `{first}`{more}, which is no part of a model and would be lost; name another directory, or move it",
        path.display()
    )
}
