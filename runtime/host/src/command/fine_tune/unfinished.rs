//! The run of a command that was typed before: whether it can go on, and whether these are its settings.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use homeroom_engine::train::checkpoint;
use serde_json::{Map, Value};

use super::Arguments;
use crate::job::newest_checkpoint;
use crate::runs::{self, Entry, Kind, Status};

/// What there is of a command.
pub(super) enum Unfinished {
    /// No run of it, or none that can go on.
    None,
    /// A run that can go on.
    Run(Box<Entry>),
    /// A run that did all it was asked for, and whose result is there.
    Finished(Box<Entry>),
}

/// Settings that are no flag: what files hold, and where the result goes.
const NO_FLAGS: [&str; 4] = ["output_dir", "training_rows", "eval_rows", "init_from_weights"];
/// The setting that says what a run may replace, see [`super::place`].
pub(super) const CLAIM: &str = "replaces";

/// The settings that decide on a result, by their flags' names, paths as they lead from everywhere.
pub(super) fn settings(arguments: &Arguments) -> Result<Map<String, Value>> {
    let Value::Object(mut settings) = serde_json::to_value(arguments)? else { return Ok(Map::new()) };
    for name in ["model_name", "training_file", "eval_file", "init_from"] {
        let paths = match settings.get_mut(name) {
            Some(Value::Array(paths)) => paths.iter_mut().collect(),
            path => Vec::from_iter(path),
        };
        for path in paths {
            if let Value::String(path) = path
                && Path::new(path).exists()
            {
                *path = std::path::absolute(&*path)?.display().to_string();
            }
        }
    }
    Ok(settings)
}

/// Looks for the last run of a command: of its result's place where that is named, else of its settings.
///
/// # Errors
/// When `--resume` names a place whose run has other settings.
pub(super) fn find(arguments: &Arguments) -> Result<Unfinished> {
    let settings = settings(arguments)?;
    let place = match (&arguments.output_dir, &arguments.name) {
        (Some(directory), _) => Some(std::path::absolute(directory)?),
        (None, Some(name)) => Some(crate::registry::place(name)?),
        (None, None) => None,
    };
    let runs = runs::list().unwrap_or_default();
    let is_ours = |run: &&Entry| {
        run.kind() == Some(Kind::FineTune)
            && match &place {
                Some(place) => output_dir(run).is_some_and(|of_run| of_run == *place),
                None => differences(run, &settings).is_empty(),
            }
    };
    let Some(run) = runs.iter().rev().find(is_ours) else { return Ok(Unfinished::None) };
    if arguments.resume {
        refuse_others(run, &settings)?;
    } else if !differences(run, &settings).is_empty() {
        return Ok(Unfinished::None);
    }
    Ok(match run.status {
        // Its lock is taken where somebody works on it, which `--resume` then says.
        Status::Running if !arguments.resume => Unfinished::None,
        Status::Finished if arguments.resume && output_dir(run).is_some_and(|place| place.exists()) => {
            Unfinished::Finished(Box::new(run.clone()))
        }
        Status::Finished => Unfinished::None,
        _ if !arguments.resume && newest(run).is_none() => Unfinished::None,
        _ => Unfinished::Run(Box::new(run.clone())),
    })
}

/// The newest checkpoint of a run of one training.
fn newest(run: &Entry) -> Option<PathBuf> {
    newest_checkpoint(&run.path.join("trainings/1"))
}

/// How far a run has come, in words.
pub(super) fn standing(run: &Entry) -> String {
    let summary = newest(run).and_then(|directory| checkpoint::summary(&directory).ok());
    let word = run.status.word();
    match summary {
        Some(summary) => format!("was {word}, and is saved at step {} of {}", summary.step, summary.planned_steps),
        None => format!("was {word}"),
    }
}

/// Where the result of a run goes.
pub(super) fn output_dir(run: &Entry) -> Option<PathBuf> {
    run.record.as_ref()?.settings.get("output_dir")?.as_str().map(PathBuf::from)
}

/// What a run may replace where its result goes, as it was when it began.
pub(super) fn claim(run: &Entry) -> Option<String> {
    run.record.as_ref()?.settings.get(CLAIM)?.as_str().map(str::to_owned)
}

/// Settings that are not those of a run, in words.
fn differences(run: &Entry, settings: &Map<String, Value>) -> Vec<String> {
    let nothing = Map::new();
    let theirs = run.record.as_ref().map_or(&nothing, |record| &record.settings);
    let known = settings.iter().filter(|(name, _)| !NO_FLAGS.contains(&name.as_str()) || theirs.contains_key(*name));
    let other = known.filter(|(name, ours)| theirs.get(*name).unwrap_or(&Value::Null) != *ours);
    let shown = |value: &Value| if value.is_null() { "not given".to_owned() } else { value.to_string() };
    other
        .map(|(name, ours)| {
            let theirs = theirs.get(name).unwrap_or(&Value::Null);
            match name.as_str() {
                "training_rows" => "the rows of --training-file have changed since".to_owned(),
                "eval_rows" => "the held-out rows have changed since".to_owned(),
                "init_from_weights" => "the adapter of --init-from has changed since".to_owned(),
                name => format!("--{} is {}, the run has {}", name.replace('_', "-"), shown(ours), shown(theirs)),
            }
        })
        .collect()
}

/// Refuses to go on with a run by other settings.
///
/// # Errors
/// All of them, by their flags' names.
pub(super) fn refuse_others(run: &Entry, settings: &Map<String, Value>) -> Result<()> {
    let differences = differences(run, settings);
    if differences.is_empty() {
        return Ok(());
    }
    bail!(
        "run {} cannot go on with other settings:\n  {}\nhint: give it its own, or start anew without --resume",
        run.id,
        differences.join("\n  ")
    )
}
