//! Where stores of models are on this machine, and the names of their folders: `models--owner--name/`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use directories::BaseDirs;
use hf_hub::Repo;

use super::HubName;
use crate::progress::line;

/// `$HF_HUB_CACHE`, `$HF_HOME/hub`, or their default.
pub fn directory() -> Option<PathBuf> {
    variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home()?.join("hub")))
}

/// `$HF_HOME`, or its default.
pub(super) fn home() -> Option<PathBuf> {
    let default = || Some(user_home()?.join(".cache/huggingface"));
    variable("HF_HOME").or_else(|| Some(variable("XDG_CACHE_HOME")?.join("huggingface"))).or_else(default)
}

/// A path that a variable of the environment holds, in which `~` is the user's home, as in Python.
pub(super) fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(|value| expanded(PathBuf::from(value)))
}

/// A path in which `~` at the beginning is the user's home.
fn expanded(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), user_home()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

fn user_home() -> Option<PathBuf> {
    Some(BaseDirs::new()?.home_dir().to_owned())
}

/// The stores that are shared, `$HOMEROOM_BASES`, as absolute paths. One that is not there is told once.
pub fn shared() -> Vec<PathBuf> {
    let shared = std::env::var_os("HOMEROOM_BASES").filter(|value| !value.is_empty());
    let paths = shared.iter().flat_map(std::env::split_paths).filter(|path| !path.as_os_str().is_empty()).map(expanded);
    let stores: Vec<PathBuf> = paths.map(|path| std::path::absolute(&path).unwrap_or(path)).collect();
    for store in stores.iter().filter(|store| !store.is_dir()) {
        note(format!("note: HOMEROOM_BASES: {} is not there", store.display()));
    }
    stores
}

/// Where models are looked for, in this order: the user's cache, then the stores that are shared.
pub fn stores() -> Vec<PathBuf> {
    directory().into_iter().chain(shared()).collect()
}

/// `models--owner--name` of a store.
pub(super) fn folder(store: &Path, repo: &str) -> PathBuf {
    store.join(Repo::model(repo.to_owned()).folder_name())
}

/// `owner/name` of a folder's name.
pub(super) fn repo_of(folder: &str) -> Option<String> {
    let (owner, name) = folder.strip_prefix("models--")?.split_once("--")?;
    Some(HubName::parse(&format!("{owner}/{name}"))?.repo)
}

/// Says something once.
pub(super) fn note(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        line(text);
    }
}
