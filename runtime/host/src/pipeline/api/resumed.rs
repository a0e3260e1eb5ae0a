//! Trainings that were begun and have not ended: each says in `training.json` under which key it was begun, and has checkpoints. One that has
//! ended says so there, and is gone on with by nobody: what it made is looked up, or made anew.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::files::{NewDirectory, SMALL_FILE_BYTES_MAX, make_directory, read_text, replace_file};
use homeroom_engine::text::template;
use serde_json::{Value as Json, json};

use crate::job::newest_checkpoint;
use crate::pipeline::store::Key;
use crate::runs::{self, RunDirectory, Status};

/// Name of the file in a training's directory.
const FILE: &str = "training.json";

/// A checkpoint that a training can go on from.
pub struct Begun {
    /// The run that has it.
    pub run: String,
    /// Number of the training there.
    pub number: usize,
    /// What templates say the time is, if the training told it.
    pub clock: Option<i64>,
    checkpoints: PathBuf,
    /// The lock of another run, which keeps it as it is while it is copied; `None` also where a file system has no locks.
    _lock: Option<File>,
}

/// The newest checkpoint of a training under a key: of the run itself, or else, if `others`, of another that no process works on. That one is
/// held until the checkpoint has been copied.
pub fn checkpoint(key: &Key, own: &str, others: bool) -> Option<Begun> {
    let runs = runs::list().unwrap_or_default();
    let (this, others): (Vec<_>, Vec<_>) =
        runs.into_iter().filter(|run| others || run.id == own).partition(|run| run.id == own);
    let others = others.into_iter().rev().filter(|run| run.status != Status::Running);
    this.into_iter().chain(others).find_map(|run| {
        fs::read_dir(run.path.join("trainings")).into_iter().flatten().flatten().find_map(|training| {
            let number = training.file_name().to_str()?.parse().ok()?;
            if !is_open(&training.path(), key) {
                return None;
            }
            let mut lock = None;
            if run.id != own {
                lock = RunDirectory::hold(&run.path).ok()?;
                // It may have gone on and ended since, or have been removed.
                if !is_open(&training.path(), key) {
                    return None;
                }
            }
            let clock = said(&training.path())["clock"].as_i64();
            let checkpoints = training.path().join("checkpoints");
            Some(Begun { run: run.id.clone(), number, clock, checkpoints, _lock: lock })
        })
    })
}

/// Whether a training was begun under a key, has not ended, and has a checkpoint.
fn is_open(training: &Path, key: &Key) -> bool {
    let said = said(training);
    said["key"] == key.hash() && said["ended"] != true && newest_checkpoint(training).is_some()
}

/// What a training says of itself; null: nothing.
fn said(training: &Path) -> Json {
    let text = read_text(&training.join(FILE), SMALL_FILE_BYTES_MAX).ok();
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Says of a training that it has ended, if it was begun under a key: what it made is there, and another of the same is another.
///
/// # Errors
/// When it cannot be written.
pub fn end(training: &Path) -> Result<()> {
    let mut said = said(training);
    let Some(fields) = said.as_object_mut() else { return Ok(()) };
    fields.insert("ended".to_owned(), true.into());
    replace_file(&training.join(FILE), format!("{said:#}\n").as_bytes())
}

/// Writes under which key a training begins, and at which time by its templates, with copies of the checkpoints of another run that it goes on from: what it ends
/// with may be an earlier one.
///
/// # Errors
/// When the disk is full, or anything else fails.
pub fn begin(training: &Path, key: &Key, from: Option<&Begun>) -> Result<()> {
    if let Some(from) = from {
        let to = training.join("checkpoints");
        make_directory(&to)?;
        let entries = |path: &Path| fs::read_dir(path).with_context(|| path.display().to_string());
        for checkpoint in entries(&from.checkpoints)? {
            let checkpoint = checkpoint?;
            // Others are in the making, or were when their process was killed.
            if !checkpoint.file_name().to_string_lossy().starts_with("step-") {
                continue;
            }
            let copy = NewDirectory::start(&to.join(checkpoint.file_name()))?;
            for entry in entries(&checkpoint.path())? {
                let entry = entry?;
                let place = || format!("{}: cannot copy", entry.path().display());
                fs::copy(entry.path(), copy.path().join(entry.file_name())).with_context(place)?;
            }
            copy.publish()?;
        }
    }
    replace_file(
        &training.join(FILE),
        format!("{:#}\n", json!({"key": key.hash(), "clock": template::time()})).as_bytes(),
    )
}
