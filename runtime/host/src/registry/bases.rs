//! Bases from the Hugging Face hub: those in the user's cache, and those in a store that is shared.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::when;
use crate::hub::cache::{self, Cached, Kind};
use crate::hub::policy;

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
    /// The commits of it that are there, the newest first.
    pub commits: Vec<String>,
    /// Whether it lies in a store that is shared, which is not written.
    pub shared: bool,
    /// Bytes of its files.
    pub bytes: u64,
    /// When its files were last written.
    pub date: Option<String>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// All bases, by name; one that is in several stores is told for each.
///
/// # Errors
/// When a store cannot be listed.
pub fn bases() -> Result<Vec<Base>> {
    let own = cache::directory();
    Ok(cache::list()?.into_iter().map(|cached| base(cached, own.as_ref())).collect())
}

fn base(cached: Cached, own: Option<&PathBuf>) -> Base {
    let Cached { repo, store, folder, snapshots, bytes, modified, .. } = cached;
    let mut forms: Vec<String> = Vec::new();
    for form in snapshots.iter().filter_map(|snapshot| snapshot.kind.as_ref()).flat_map(words) {
        if !forms.contains(&form) {
            forms.push(form);
        }
    }
    let missing = || format!("not all files of a model are there; `homeroom pull {repo}` fetches the others");
    let problem = match policy::check(&repo) {
        // Only the first line is about it.
        Err(error) => error.to_string().lines().next().map(str::to_owned),
        Ok(()) => forms.is_empty().then(missing),
    };
    Base {
        path: folder,
        kind: "base",
        forms,
        commits: snapshots.into_iter().map(|snapshot| snapshot.commit).collect(),
        shared: Some(&store) != own,
        bytes,
        date: modified.map(when::text),
        problem,
        name: repo,
    }
}

fn words(kind: &Kind) -> Vec<String> {
    match kind {
        Kind::Model => vec!["safetensors".to_owned()],
        Kind::Adapter => vec!["adapter".to_owned()],
        Kind::Embedding => vec!["embedding".to_owned()],
        Kind::Gguf(quantizations) => quantizations.clone(),
    }
}
