//! Files of rows on the command line: how they are named and read, and what is said of them.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use homeroom_engine::data::{Columns, Dataset, OnBadRow, Reading, Source, Sources};
use serde::{Serialize, Serializer};

use super::arguments::{Word, one_of};
use crate::near::exists;
use crate::progress::line;

/// How rows are read, whatever files hold them.
#[derive(Args, Clone, Default, Serialize)]
pub struct ReadArgs {
    /// Which column or key is what, where their names do not say it, such as prompt=Frage,completion=Antwort; by number where a table has no header. Columns are prompt, input (behind the prompt), completion, system, text, messages, chosen, rejected, label, tools
    #[arg(long, value_name = "ROLE=COLUMN,…", value_parser = columns)]
    pub columns: Option<Columns>,
    /// System message of rows that have none of their own: whom the model is to be
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// What happens to a row that is refused, as one without an answer
    #[arg(long, default_value = "refuse", value_name = "WHAT", value_parser = one_of::<OnBadRow>(&BAD_ROW))]
    pub on_bad_row: OnBadRow,
}

const BAD_ROW: [Word; 2] =
    [("refuse", "Its file is refused; the message names the rows"), ("skip", "It is left out, and named")];

/// Which column is what, as it is typed.
pub fn columns(text: &str) -> Result<Columns, String> {
    text.parse::<Columns>().map_err(|error| error.to_string())
}

impl ReadArgs {
    /// What they ask for.
    pub fn reading(&self) -> Reading {
        let system = self.system.clone().filter(|text| !text.trim().is_empty());
        Reading { columns: self.columns.clone().unwrap_or_default(), system, on_bad_row: self.on_bad_row }
    }
}

/// The files that some paths lead to, to learn from. `input` gives the standard input.
///
/// # Errors
/// When one is not there, or as [`Sources::of`].
pub fn to_learn_from(paths: &[PathBuf], input: impl FnOnce() -> Result<Source>) -> Result<Sources> {
    paths.iter().filter(|path| !is_input(path)).try_for_each(|path| exists(path))?;
    let sources = Sources::of(paths, input)?;
    sources.notes.iter().for_each(|note| line(format_args!("note: {note}")));
    Ok(sources)
}

/// The files that some paths lead to, to measure on: of a folder its held-out ones, if it has such. `input` gives the standard input.
///
/// # Errors
/// As [`to_learn_from`].
pub fn to_measure_on(paths: &[PathBuf], input: impl Fn() -> Result<Source>) -> Result<Vec<Source>> {
    if paths.iter().filter(|path| is_input(path)).count() > 1 {
        bail!("-: the standard input is named twice");
    }
    let mut files = Vec::new();
    for path in paths {
        let sources = to_learn_from(std::slice::from_ref(path), &input)?;
        files.extend(if sources.held_out.is_empty() { sources.files } else { sources.held_out });
    }
    Ok(files)
}

/// Whether a path stands for the standard input.
pub fn is_input(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Some paths in a few words.
pub fn named(paths: &[PathBuf]) -> String {
    match paths {
        [path] if is_input(path) => "standard input".to_owned(),
        [path] => path.display().to_string(),
        [first, ..] => format!("{} and {} more", first.display(), paths.len() - 1),
        [] => String::new(),
    }
}

/// Says what files were found to be, unless they are JSONL with our own keys, and which rows were left out.
pub fn tell<T>(data: &Dataset<T>) {
    for (name, words) in data.recognised() {
        line(format_args!("data      {name}   {words}"));
    }
    data.left_out.iter().for_each(line);
}

/// Paths as text: one as it is, several as a list. One that is none is refused before a run has it.
pub fn lossy_paths<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    match paths {
        [path] => serializer.serialize_str(&path.to_string_lossy()),
        paths => serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy())),
    }
}

/// As [`lossy_paths`]; none is null.
pub fn lossy_paths_option<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    if paths.is_empty() { serializer.serialize_none() } else { lossy_paths(paths, serializer) }
}
