//! Bases from the Hugging Face hub: those in the user's cache, and those in a store that is shared.

use std::path::{Path, PathBuf};

use anyhow::Result;
use homeroom_engine::files::gguf::shard_paths;
use serde::Serialize;

use super::entries::inspect;
use super::when;
use crate::hub::cache::{self, Cached, Kind, Snapshot};
use crate::hub::{gguf, policy, stores};

/// A base in the cache or in a shared store.
#[derive(Clone, Debug, Serialize)]
pub struct Base {
    /// `owner/name`.
    pub name: String,
    /// Its folder in the cache or the store.
    pub path: PathBuf,
    /// `base`.
    pub kind: &'static str,
    /// What there is of it: `safetensors`, `adapter`, `embedding`, or quantizations of GGUF.
    pub forms: Vec<String>,
    /// What can be typed for it and is whole: its name, or that with each quantization behind it.
    pub usable: Vec<Usable>,
    /// The commits of it that are there, the newest first.
    pub commits: Vec<String>,
    /// Whether it lies in a store that is shared, which is not written.
    pub shared: bool,
    /// Bytes of its files.
    pub bytes: u64,
    /// When its files were last written: when it was downloaded.
    pub date: Option<String>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// One of the models that a base is: a repository may have several quantizations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Usable {
    /// What to type for it.
    pub name: String,
    /// One of the base's forms.
    pub form: String,
    /// Bytes of its files.
    pub bytes: u64,
}

/// All bases, by name; one that is in several stores is told for each.
///
/// # Errors
/// When a store cannot be listed.
pub fn bases() -> Result<Vec<Base>> {
    let own = stores::directory();
    Ok(cache::list()?.into_iter().map(|cached| base(cached, own.as_ref())).collect())
}

fn base(cached: Cached, own: Option<&PathBuf>) -> Base {
    let current = cached.current().cloned();
    let Cached { repo, store, folder, snapshots, bytes, modified, .. } = cached;
    let mut forms: Vec<String> = Vec::new();
    for form in snapshots.iter().filter_map(|snapshot| snapshot.kind.as_ref()).flat_map(words) {
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
    let problem = match (policy::check(&repo), &current) {
        (Err(error), _) => Some(refusal(&repo, &error)),
        (Ok(()), Some(current)) => damage(current),
        (Ok(()), None) => {
            Some(format!("not all files of a model are there; `homeroom pull {repo}` fetches the others"))
        }
    };
    Base {
        path: folder,
        kind: "base",
        forms,
        usable: current.map(|current| usable(&repo, &current, bytes)).unwrap_or_default(),
        commits: snapshots.into_iter().map(|snapshot| snapshot.commit).collect(),
        shared: Some(&store) != own,
        bytes,
        date: modified.map(when::text),
        problem,
        name: repo,
    }
}

/// Why a model is not allowed, in few words: `homeroom show` tells the list.
fn refusal(repo: &str, error: &anyhow::Error) -> String {
    match error.to_string().strip_prefix(repo) {
        Some(_) => "not allowed here".to_owned(),
        None => error.to_string(),
    }
}

/// What is wrong with a snapshot whose files are all there, as one that was cut short.
fn damage(snapshot: &Snapshot) -> Option<String> {
    let looked = match &snapshot.kind {
        Some(Kind::Gguf(_)) => {
            gguf_files(&snapshot.path).iter().try_for_each(|file| inspect(&snapshot.path.join(file)))
        }
        _ => inspect(&snapshot.path),
    };
    // The snapshot's place is known, and long.
    let within = format!("{}/", snapshot.path.display());
    looked.err().map(|error| format!("{error:#}").replace(&within, ""))
}

/// The GGUF files of a snapshot; of a model in several the first.
fn gguf_files(snapshot: &Path) -> Vec<String> {
    let paths = cache::paths(snapshot);
    let models = gguf::models(paths.iter().map(String::as_str));
    gguf::whole(&models).into_iter().map(str::to_owned).collect()
}

/// What can be typed for a repository of which a snapshot is there; it has so many bytes in all.
fn usable(repo: &str, snapshot: &Snapshot, bytes: u64) -> Vec<Usable> {
    let Some(Kind::Gguf(_)) = &snapshot.kind else {
        let form = snapshot.kind.iter().flat_map(words).collect();
        return vec![Usable { name: repo.to_owned(), form, bytes }];
    };
    let files = gguf_files(&snapshot.path);
    let models: Vec<&str> = files.iter().map(String::as_str).collect();
    let one = |file: &&str| {
        // Of `m-Q4_K_M.gguf` and `m-UD-Q4_K_M.gguf` the short name could mean both.
        let short = gguf::quantization(file);
        let form = if gguf::matching(&models, short).len() == 1 { short } else { gguf::whole_stem(file) };
        let files = shard_paths(&snapshot.path.join(file));
        let bytes = files.iter().filter_map(|file| Some(std::fs::metadata(file).ok()?.len())).sum();
        Usable { name: format!("{repo}:{form}"), form: form.to_owned(), bytes }
    };
    models.iter().map(one).collect()
}

fn words(kind: &Kind) -> Vec<String> {
    match kind {
        Kind::Model => vec!["safetensors".to_owned()],
        Kind::Adapter => vec!["adapter".to_owned()],
        Kind::Embedding => vec!["embedding".to_owned()],
        Kind::Gguf(quantizations) => quantizations.clone(),
    }
}
