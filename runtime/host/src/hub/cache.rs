//! Hugging Face's cache: `models--owner--name/` with `refs/` (which commit a branch is), `snapshots/<commit>/` (links by the files'
//! names) and `blobs/` (the files by their digests).
//!
//! Source: "Understand caching" of huggingface_hub's documentation.

use std::path::{Path, PathBuf};

use anyhow::Result;
use directories::BaseDirs;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde_json::Value;

use super::HubName;

/// Where a model of the hub is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// The commit that it is of.
    pub commit: String,
}

/// `$HF_HUB_CACHE`, `$HF_HOME/hub`, or their default.
pub fn directory() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HF_HOME").or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")));
    let default = || Some(BaseDirs::new()?.home_dir().join(".cache/huggingface"));
    set("HF_HUB_CACHE").or_else(|| Some(home().or_else(default)?.join("hub")))
}

/// Where models are looked for, in this order: the user's cache, then a store that is shared, `$HOMEROOM_BASES`.
pub fn stores() -> Vec<PathBuf> {
    let shared = std::env::var_os("HOMEROOM_BASES").filter(|value| !value.is_empty());
    let shared = shared.iter().flat_map(std::env::split_paths);
    directory().into_iter().chain(shared).collect()
}

/// The model in the cache or a shared store, if all files are there that are needed to run it. Opens no connection.
///
/// # Errors
/// When its files are there and cannot be read.
pub fn find(name: &HubName) -> Result<Option<Found>> {
    Ok(stores().iter().find_map(|store| find_in(store, name)))
}

fn find_in(store: &Path, name: &HubName) -> Option<Found> {
    let revision = name.revision();
    let repo = Repo::with_revision(name.repo.clone(), RepoType::Model, revision.to_owned());
    let folder = store.join(repo.folder_name());
    let cached: CacheRepo = Cache::new(store.to_owned()).repo(repo);
    let commit = match HubName::is_commit(revision) {
        true => revision.to_owned(),
        false => std::fs::read_to_string(folder.join("refs").join(revision)).ok()?.trim().to_owned(),
    };
    let snapshot = HubName::is_commit(&commit).then(|| cached.pointer_path(&commit))?;
    let path = match &name.quantization {
        Some(quantization) => gguf_of(&snapshot, quantization)?,
        None => is_whole(&snapshot).then_some(snapshot)?,
    };
    Some(Found { path, commit })
}

/// The GGUF file of a quantization.
fn gguf_of(snapshot: &Path, quantization: &str) -> Option<PathBuf> {
    let ending = format!("{}.gguf", quantization.to_ascii_lowercase());
    let files = std::fs::read_dir(snapshot).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut matching = files.filter(|file| {
        let name = file.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let before = name.strip_suffix(&ending);
        file.exists() && before.is_some_and(|before| before.is_empty() || before.ends_with(['-', '.', '_']))
    });
    matching.next()
}

/// Whether a snapshot has a model's or an adapter's files.
fn is_whole(snapshot: &Path) -> bool {
    let is_there = |name: &str| snapshot.join(name).exists();
    let is_adapter = is_there("adapter_config.json") && is_there("adapter_model.safetensors");
    let sharded = || {
        let index = std::fs::read_to_string(snapshot.join("model.safetensors.index.json")).ok()?;
        let index: Value = serde_json::from_str(&index).ok()?;
        let shards = index["weight_map"].as_object()?;
        Some(shards.values().all(|shard| shard.as_str().is_some_and(is_there)))
    };
    is_adapter || is_there("config.json") && (is_there("model.safetensors") || sharded().unwrap_or(false))
}
