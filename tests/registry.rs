//! The user's models: listed, shown, removed, copied and taken in.

mod carried;
mod imported;
mod listed;
mod removed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::support::{Place, fixture, homeroom, printed_json, succeeds};

/// The program with a home and a cache in the place.
fn program(place: &Place) -> Command {
    let mut command = homeroom();
    command.env("HOMEROOM_HOME", place.path("home")).env("HF_HUB_CACHE", place.path("hub"));
    command
}

/// A command of the program in words.
fn typed(place: &Place, words: &[&str]) -> Command {
    let mut command = program(place);
    command.args(words);
    command
}

/// Where a model of a name is.
fn model(place: &Place, name: &str) -> PathBuf {
    place.path(&format!("home/models/{name}"))
}

/// Trains an adapter of a name for a few steps.
fn train(place: &Place, base: &Path, name: &str, further: &[&str]) -> Result<()> {
    let rows =
        if place.path("rows.jsonl").exists() { place.path("rows.jsonl") } else { place.rows("rows.jsonl", 7)? };
    let mut command = typed(place, &["fine-tune", "--max-steps", "2", "--learning-rate", "1e-2", "--name", name]);
    command.arg("--model-name").arg(base).arg("--training-file").arg(rows);
    succeeds(command.args(further)).map(drop)
}

/// An adapter that looks trained, without the time that it takes.
fn adapter(place: &Place, name: &str, base: &Path, training: &Value) -> Result<PathBuf> {
    let to = place.copy(&fixture("curves/lora/trained"), &format!("home/models/{name}"))?;
    let manifest = json!({
        "format": 1, "homeroom_version": "0.1.0", "base": {"path": base, "digest": ""}, "tokenizer_digest": "",
        "template_digest": null, "strategy": {"name": "lora", "version": "7.5.3", "sha256": ""}, "data_digest": null,
        "training": training, "plan": {},
    });
    fs::write(to.join("homeroom.json"), manifest.to_string())?;
    Ok(to)
}

/// What `list-models --json` says.
fn listed(place: &Place) -> Result<Vec<Value>> {
    let ran = succeeds(&mut typed(place, &["list-models", "--json"]))?;
    printed_json(&ran)?.as_array().cloned().context("an array")
}

/// The names in it.
fn names(place: &Place) -> Result<Vec<String>> {
    Ok(listed(place)?.iter().map(|entry| entry["name"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Everything in `home/models`, hidden or not.
fn entries(place: &Place) -> Result<Vec<String>> {
    let entries = fs::read_dir(place.path("home/models"))?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A model of the hub in a store of a place, as Python's programs lay it out. Returns its folder.
fn cached(place: &Place, store: &str, repo: &str, from: &Path) -> Result<PathBuf> {
    let folder = place.path(&format!("{store}/models--{}", repo.replace('/', "--")));
    let snapshot = folder.join("snapshots").join(COMMIT);
    for directory in ["blobs", "refs"] {
        fs::create_dir_all(folder.join(directory))?;
    }
    fs::create_dir_all(&snapshot)?;
    fs::write(folder.join("refs/main"), COMMIT)?;
    let mut files: Vec<PathBuf> = match from.is_dir() {
        true => fs::read_dir(from)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?,
        false => vec![from.to_owned()],
    };
    files.retain(|file| !file.ends_with("expected.safetensors"));
    for file in files {
        let digest = sha256(&file)?;
        fs::copy(&file, folder.join("blobs").join(&digest))?;
        let name = file.file_name().context("a file has a name")?;
        std::os::unix::fs::symlink(format!("../../blobs/{digest}"), snapshot.join(name))?;
    }
    Ok(folder)
}

fn sha256(file: &Path) -> Result<String> {
    let digests = homeroom_engine::files::digest::of_files(&[file.to_owned()], None)?;
    let digest = digests.into_values().next().context("a file has a digest")?;
    Ok(digest.trim_start_matches("sha256:").to_owned())
}
