//! The rows that the run of a training held out, read again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use homeroom_engine::adapt::adapter::read_manifest;
use homeroom_engine::data::{Example, Group, OnBadRow, OnLongRow, Reading, Sources};
use homeroom_engine::models::BaseModel;
use homeroom_engine::train::objective::Kind;
use serde_json::Value;

use crate::models::load_rows;
use crate::runs;

/// The held-out rows of the run that made a result. `None` where none were held out, the run is gone, or its files have other rows now.
pub fn held_out(result: &Path, model: &BaseModel) -> Option<Vec<Example>> {
    // What cannot be read again is no reason not to export.
    read(result, model).ok().filter(|examples| !examples.is_empty())
}

fn read(result: &Path, model: &BaseModel) -> Result<Vec<Example>> {
    let manifest = read_manifest(result)?.context("nothing is said of its training")?;
    let said = |key: &str| manifest.training[key].as_str().with_context(|| format!("`{key}` is not said"));
    let run = runs::find(said("run")?)?;
    if run.token() != Some(said("run_token")?) || said("objective")? != Kind::Sft.name() {
        bail!("another run has its name, or it has no answers to compare on");
    }
    // Of an older run some are not said.
    let settings = Value::Object(run.record.context("the run cannot be read")?.settings);
    let reading = Reading {
        columns: word(&settings, "columns")?.unwrap_or_default(),
        system: settings["system"].as_str().map(str::to_owned).filter(|text| !text.trim().is_empty()),
        on_bad_row: word(&settings, "on_bad_row")?.unwrap_or(OnBadRow::Refuse),
    };
    let max_seq_len = settings["max_seq_len"].as_u64().map(usize::try_from).transpose()?;
    let on_long_row = word(&settings, "on_long_row")?.unwrap_or(OnLongRow::Refuse);
    let sources = |key: &str| Sources::of(&paths(&settings[key]), || bail!("the standard input is read once"));
    let load = |sources| load_rows(sources, &reading, model, max_seq_len, on_long_row, Kind::Sft);
    let trained = sources("training_file")?;
    let eval = sources("eval_file")?;
    let share = settings["eval_fraction"].as_f64().filter(|share| *share > 0.0);
    let groups: Vec<Group> = match share {
        Some(share) => {
            let data = load(&trained.files)?;
            if Some(&data.digest) != manifest.data_digest.as_ref() {
                bail!("its files have other rows now");
            }
            let seed = settings["seed"].as_u64().context("`seed` is not said")?;
            let (_, held) = data.split(share, seed)?;
            held.into_iter().map(|index| data.examples[index].clone()).collect()
        }
        None if !eval.files.is_empty() => load(&eval.files)?.examples,
        None => load(&trained.held_out)?.examples,
    };
    Ok(groups.into_iter().flat_map(|group| group.sequences).collect())
}

fn paths(value: &Value) -> Vec<PathBuf> {
    match value {
        Value::String(path) => vec![path.into()],
        Value::Array(paths) => paths.iter().filter_map(Value::as_str).map(PathBuf::from).collect(),
        _ => Vec::new(),
    }
}

fn word<T: std::str::FromStr<Err = anyhow::Error>>(settings: &Value, key: &str) -> Result<Option<T>> {
    settings[key].as_str().map(str::parse).transpose()
}
