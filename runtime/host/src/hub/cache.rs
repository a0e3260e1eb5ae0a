//! Hugging Face's cache: `models--owner--name/` with `refs/` (which commit a branch is), `snapshots/<commit>/` (links by the files'
//! names) and `blobs/` (the files by their digests).
//!
//! Source: "Understand caching" of huggingface_hub's documentation.

mod list;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Result, bail};
use hf_hub::{Cache, Repo, RepoType};
use homeroom_engine::files::read_text;

pub use self::list::{Cached, Snapshot, at, list, remove};
use super::stores::{folder, note, stores};
pub use super::whole::Kind;
use super::whole::kind;
pub use super::whole::paths;
use super::{HubName, gguf, policy};

/// Longest content of a ref, in bytes: a commit is one of 40.
const REF_BYTES_MAX: u64 = 1024;

/// Where a model of the hub is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// The commit that it is of.
    pub commit: String,
}

/// The model in the cache or a shared store, if all files are there that are needed to run it. Opens no connection.
///
/// # Errors
/// When it is not allowed here, or several files have the quantization that is asked for.
pub fn find(name: &HubName) -> Result<Option<Found>> {
    policy::check(&name.repo)?;
    find_among(&stores(), name)
}

fn find_among(stores: &[PathBuf], name: &HubName) -> Result<Option<Found>> {
    for store in stores {
        if let Some(found) = find_in(store, name)? {
            return Ok(Some(found));
        }
    }
    // A cache that was carried here, or a download that was ended, may lack the ref and have a commit's files.
    for store in stores.iter().filter(|_| name.revision.is_none()) {
        if let Some(found) = newest_in(store, name)? {
            note(format!(
                "note: {name}: which commit is its newest is not known here, or not all of that is here; commit {} is used",
                found.commit
            ));
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The model in one store, at the revision that is asked for.
pub(super) fn find_in(store: &Path, name: &HubName) -> Result<Option<Found>> {
    let folder = folder(store, &name.repo);
    let revision = name.revision();
    let commit = if HubName::is_commit(revision) { Some(revision.to_owned()) } else { read_ref(&folder, revision) };
    commit.map_or(Ok(None), |commit| at_commit(store, name, commit))
}

/// The newest of a store's snapshots that are whole.
fn newest_in(store: &Path, name: &HubName) -> Result<Option<Found>> {
    let mut found = Vec::new();
    for (commit, modified) in commits(&folder(store, &name.repo)) {
        found.extend(at_commit(store, name, commit)?.map(|found| (modified, found)));
    }
    Ok(found.into_iter().max_by(|(a, x), (b, y)| (a, &x.commit).cmp(&(b, &y.commit))).map(|(_, found)| found))
}

fn at_commit(store: &Path, name: &HubName, commit: String) -> Result<Option<Found>> {
    let snapshot = snapshot(store, &name.repo, &commit);
    let path = match &name.quantization {
        Some(quantization) => gguf_of(&snapshot, name, quantization)?,
        None => match kind(&snapshot) {
            Some(Kind::Model | Kind::Adapter | Kind::Embedding) => Some(snapshot),
            Some(Kind::Gguf(_)) => Some(only_gguf(&snapshot, name)?),
            None => None,
        },
    };
    Ok(path.map(|path| Found { path, commit }))
}

/// The GGUF file of a quantization, the first where it is in several.
fn gguf_of(snapshot: &Path, name: &HubName, quantization: &str) -> Result<Option<PathBuf>> {
    let paths = paths(snapshot);
    let models = gguf::models(paths.iter().map(String::as_str));
    let matching = gguf::whole(&gguf::matching(&models, quantization));
    match matching[..] {
        [] => Ok(None),
        [one] => Ok(Some(snapshot.join(one))),
        _ => bail!("{name}: {quantization} could be {}\nhint: write more of the name", matching.join(" or ")),
    }
}

/// The GGUF file of a snapshot in which there is nothing else to run, and one of them.
fn only_gguf(snapshot: &Path, name: &HubName) -> Result<PathBuf> {
    let paths = paths(snapshot);
    match gguf::whole(&gguf::models(paths.iter().map(String::as_str)))[..] {
        [one] => {
            note(format!("note: {name}: {one} is used, which is the only one of its GGUF files that is here"));
            Ok(snapshot.join(one))
        }
        ref several => {
            // Of `m-Q4_K_M.gguf` and `m-UD-Q4_K_M.gguf` the short name could mean both.
            let short = |path: &&str| match gguf::matching(several, gguf::quantization(path)).len() {
                1 => format!("`{name}:{}`", gguf::quantization(path)),
                _ => format!("`{name}:{}`", gguf::whole_stem(path)),
            };
            let names: Vec<String> = several.iter().map(short).collect();
            bail!(
                "{name}: several GGUF files of it are here; which one is not said\nhint: name one of {}",
                names.join(", ")
            )
        }
    }
}

/// The names of a model's GGUF files that are here, of which the name that is asked for means none: `owner/name:Q4_K_M`.
pub(super) fn other_quantizations(name: &HubName) -> Vec<String> {
    let mut names = BTreeSet::new();
    for folder in stores().iter().filter(|_| name.quantization.is_some()).map(|store| folder(store, &name.repo)) {
        for (commit, _) in commits(&folder) {
            if let Some(Kind::Gguf(quantizations)) = kind(&folder.join("snapshots").join(commit)) {
                let named = |quantization| HubName { quantization: Some(quantization), ..name.clone() }.to_string();
                names.extend(quantizations.into_iter().map(named));
            }
        }
    }
    names.into_iter().collect()
}

/// The snapshot of a commit.
pub(super) fn snapshot(store: &Path, repo: &str, commit: &str) -> PathBuf {
    Cache::new(store.to_owned()).repo(Repo::new(repo.to_owned(), RepoType::Model)).pointer_path(commit)
}

/// The commit that a branch or tag is, if that is known.
pub(super) fn read_ref(folder: &Path, revision: &str) -> Option<String> {
    let text = read_text(&folder.join("refs").join(revision), REF_BYTES_MAX).ok()?;
    Some(text.trim().to_owned()).filter(|commit| HubName::is_commit(commit))
}

/// The commits of which a folder has snapshots, and since when.
pub(super) fn commits(folder: &Path) -> Vec<(String, Option<SystemTime>)> {
    let entries = std::fs::read_dir(folder.join("snapshots")).into_iter().flatten().flatten();
    let commits = entries.filter_map(|entry| {
        let commit = entry.file_name().into_string().ok().filter(|name| HubName::is_commit(name))?;
        let modified = entry.metadata().ok().filter(std::fs::Metadata::is_dir)?.modified().ok();
        Some((commit, modified))
    });
    commits.collect()
}

#[cfg(all(test, unix))]
mod tests;
