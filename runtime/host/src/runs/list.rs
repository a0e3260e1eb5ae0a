//! The runs that there are, and how each ended.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use homeroom_abi::describe::nearest;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, bytes_below, read_text, replace_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::directory::{remove_checkpoints, runs_directory};
use super::lock;
use crate::near::did_you_mean;
use crate::registry;
use crate::terminal::cell;

/// Name of the file that says what a run is.
const FILE: &str = "run.json";

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One training.
    FineTune,
    /// A script.
    Pipeline,
}

/// How it stands with a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// A process works on it.
    Running,
    /// It did all it was asked for.
    Finished,
    /// The user ended it; it can go on.
    Interrupted,
    /// It failed.
    Failed,
    /// Its process ended without a word; it can go on.
    Killed,
}

impl Status {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
            Self::Killed => "killed",
        }
    }
}

/// A pipeline's script.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Script {
    /// Where it was.
    pub path: String,
    /// Digest of its text, which `script.lua` keeps.
    pub sha256: String,
}

/// What `run.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Name of the run.
    pub id: String,
    /// What it does.
    pub kind: Kind,
    /// How it stood when this was written: `running` also of one that was killed.
    pub status: Status,
    /// When it was started.
    pub started: Option<String>,
    /// When it was taken up again, each time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<String>,
    /// When it ended.
    pub finished: Option<String>,
    /// The command line.
    #[serde(default)]
    pub command: Vec<String>,
    /// The directory that it was typed in.
    #[serde(default)]
    pub cwd: String,
    /// Version of the program.
    #[serde(default)]
    pub version: String,
    /// The instructions that its kernels began with, as `HOMEROOM_CPU` names them.
    #[serde(default)]
    pub processor: String,
    /// The time that chat templates tell in it, in seconds of the local time when it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<i64>,
    /// Processor, threads and system.
    #[serde(default)]
    pub machine: String,
    /// The script of a pipeline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<Script>,
    /// What it was told.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// What tells it from every other run, and what it writes into its result.
    #[serde(default)]
    pub token: String,
    /// What came of it, unless that is long: `result.json` has all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Record {
    /// Reads `run.json` of a run's directory.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let text = read_text(&path, SMALL_FILE_BYTES_MAX)?;
        serde_json::from_str(&text).with_context(|| format!("{}: it does not say what the run is", path.display()))
    }

    /// Writes it.
    pub fn write(&self, directory: &Path) -> Result<()> {
        replace_file(&directory.join(FILE), format!("{:#}\n", serde_json::to_value(self)?).as_bytes())
    }
}

/// A run, as a list has it.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// How it stands.
    pub status: Status,
    /// Bytes on disk.
    pub bytes: u64,
    /// What it says of itself; `None`: nothing that can be read.
    pub record: Option<Record>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

impl Entry {
    /// The run in a directory.
    pub fn at(path: &Path) -> Self {
        Self::of(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), path.to_owned())
    }

    fn of(id: String, path: PathBuf) -> Self {
        // Whether it lives first: one that ends in between has written how by then.
        let is_held = lock::is_held(&path);
        let (record, problem) = match Record::read(&path) {
            Ok(record) => (Some(record), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        let status = match &record {
            _ if is_held => Status::Running,
            Some(record) if record.status != Status::Running => record.status,
            _ => Status::Killed,
        };
        Self { bytes: bytes_below(&path), id, path, status, record, problem }
    }

    /// What it does, if it says so.
    pub fn kind(&self) -> Option<Kind> {
        self.record.as_ref().map(|record| record.kind)
    }

    /// Removes the checkpoints of a run that has finished: it may have been killed before it could.
    pub fn tidy(&self) {
        remove_checkpoints(&self.path);
    }

    /// What tells it from every other run.
    pub fn token(&self) -> Option<&str> {
        self.record.as_ref().map(|record| record.token.as_str()).filter(|token| !token.is_empty())
    }

    /// When it was started.
    pub fn started(&self) -> Option<&str> {
        self.record.as_ref()?.started.as_deref()
    }
}

/// All runs, the oldest first.
///
/// # Errors
/// When there is no data directory.
pub fn list() -> Result<Vec<Entry>> {
    Ok(list_in(&runs_directory()?))
}

pub(super) fn list_in(runs: &Path) -> Vec<Entry> {
    let mut runs: Vec<Entry> = ids(runs).into_iter().map(|(id, path)| Entry::of(id, path)).collect();
    // Names of one script end in a number; of the same second the shorter name is the older.
    runs.sort_by(|a, b| (a.started(), a.id.len(), &a.id).cmp(&(b.started(), b.id.len(), &b.id)));
    runs
}

fn ids(runs: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(runs).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let named = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    named.filter(|(id, _)| registry::is_name(id)).collect()
}

/// The run of a name.
///
/// # Errors
/// When there is none; the nearest is named.
pub fn find(id: &str) -> Result<Entry> {
    find_in(&runs_directory()?, id)
}

pub(super) fn find_in(runs: &Path, id: &str) -> Result<Entry> {
    if registry::is_name(id) {
        let path = runs.join(id);
        if fs::symlink_metadata(&path).is_ok_and(|about| about.is_dir()) {
            return Ok(Entry::of(id.to_owned(), path));
        }
    }
    let ids = ids(runs);
    let near = nearest(id, ids.iter().map(|(id, _)| id.as_str()));
    bail!("{}: no such run{}\nhint: `homeroom runs list` shows all", cell(id), did_you_mean(near));
}
