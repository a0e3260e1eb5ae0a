//! Trainings that were begun and have not ended: each says in `training.json` under which key it was begun, and has checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::files::{NewDirectory, SMALL_FILE_BYTES_MAX, make_directory, read_text, replace_file};
use serde_json::{Value as Json, json};

use crate::job::newest_checkpoint;
use crate::pipeline::store::Key;
use crate::runs::{self, Status};

/// Name of the file in a training's directory.
const FILE: &str = "training.json";

/// A checkpoint that a training can go on from.
pub struct Begun {
    /// The run that has it.
    pub run: String,
    /// Number of the training there.
    pub number: usize,
    checkpoints: PathBuf,
}

/// The newest checkpoint of a training under a key: of the run itself, or else, if `others`, of another that no process works on.
pub fn checkpoint(key: &Key, own: &str, others: bool) -> Option<Begun> {
    let runs = runs::list().unwrap_or_default();
    let (own, others): (Vec<_>, Vec<_>) =
        runs.into_iter().filter(|run| others || run.id == own).partition(|run| run.id == own);
    let others = others.into_iter().rev().filter(|run| run.status != Status::Running);
    own.into_iter().chain(others).find_map(|run| {
        fs::read_dir(run.path.join("trainings")).into_iter().flatten().flatten().find_map(|training| {
            let number = training.file_name().to_str()?.parse().ok()?;
            let said = read_text(&training.path().join(FILE), SMALL_FILE_BYTES_MAX).ok()?;
            let said: Json = serde_json::from_str(&said).ok()?;
            newest_checkpoint(&training.path()).filter(|_| said["key"] == key.hash())?;
            Some(Begun { run: run.id.clone(), number, checkpoints: training.path().join("checkpoints") })
        })
    })
}

/// Writes under which key a training begins, with copies of the checkpoints of another run that it goes on from: what it ends
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
    replace_file(&training.join(FILE), format!("{:#}\n", json!({"key": key.hash()})).as_bytes())
}
