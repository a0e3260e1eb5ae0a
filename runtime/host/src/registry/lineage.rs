//! Which models a model came of, which go on from it, and who needs it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::adapt::adapter::read_manifest;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, is_named, read_text};
use serde::Serialize;

use super::Entry;
use super::data_directory;
use super::names::owner;
use crate::handler::config::handlers_in;
use crate::hub::HubName;

/// Where a model stands among the others of the registry.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Lineage {
    /// The model that it went on from, that one's, and so on.
    pub parents: Vec<Parent>,
    /// The models that went on from it, or that were trained on it as their base.
    pub children: Vec<String>,
}

/// A model that another went on from.
#[derive(Clone, Debug, Serialize)]
pub struct Parent {
    /// Its name.
    pub name: String,
    /// Whether the registry has a model of that name still.
    pub is_there: bool,
}

impl Lineage {
    /// The lineage of a model among all.
    pub fn of(entry: &Entry, all: &[Entry]) -> Self {
        let (mut parents, mut seen) = (Vec::new(), BTreeSet::from([entry.name.as_str()]));
        let mut next = parent(entry);
        // Models that were trained again under their names may name each other.
        while let Some(name) = next.filter(|name| !seen.contains(name.as_str())) {
            let there = all.iter().find(|other| other.name == name);
            parents.push(Parent { name, is_there: there.is_some() });
            let Some(there) = there else { break };
            seen.insert(&there.name);
            next = parent(there);
        }
        let is_child = |other: &&Entry| other.name != entry.name && comes_of(other, &entry.name);
        Self { parents, children: all.iter().filter(is_child).map(|child| child.name.clone()).collect() }
    }
}

/// The model of the registry that another went on from, or else the one that is its base.
fn parent(entry: &Entry) -> Option<String> {
    entry.parent.clone().or_else(|| owner(&entry.base))
}

fn comes_of(entry: &Entry, name: &str) -> bool {
    entry.parent.as_deref() == Some(name) || owner(&entry.base).as_deref() == Some(name)
}

/// What may be removed: a model of the registry, or a base in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A model of the registry, by its name.
    Model(String),
    /// A base in the cache.
    Base {
        /// Its name on the hub.
        repo: String,
        /// Its folder.
        folder: PathBuf,
        /// Whether a store that is shared has it, too.
        is_shared: bool,
    },
}

impl Target {
    /// Whether a path or a name that somebody wrote down means it.
    fn is_meant_by(&self, text: &Path) -> bool {
        match self {
            Self::Model(name) => text.to_str() == Some(name) || owner(text).as_deref() == Some(name),
            Self::Base { repo, folder, is_shared } => {
                let named = text.to_str().is_some_and(|text| is_of(text, repo));
                named && !is_shared || lies_in(text, folder)
            }
        }
    }

    /// Whether it is the base of a model.
    fn is_base_of(&self, base: &Path, name: Option<&str>) -> bool {
        match self {
            Self::Model(_) => self.is_meant_by(base),
            // Where its path leads to nothing, a base is found by its name, in whatever store has it.
            Self::Base { repo, folder, is_shared } => {
                let named = name.is_some_and(|name| is_of(name, repo));
                if named { !is_shared && (lies_in(base, folder) || !base.exists()) } else { lies_in(base, folder) }
            }
        }
    }
}

/// Whether a name on the hub is of a repository, whichever revision or quantization of it.
fn is_of(name: &str, repo: &str) -> bool {
    HubName::parse(name).is_some_and(|name| name.repo == repo)
}

fn lies_in(path: &Path, directory: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    path.starts_with(directory) || real(path).zip(real(directory)).is_some_and(|(path, of)| path.starts_with(of))
}

/// Who names a model or a base.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Users {
    /// Adapters of the registry whose base it is. Without it they do not run.
    pub adapters: Vec<String>,
    /// Adapters of runs whose base it is, as `RUN/NUMBER`.
    pub runs: Vec<String>,
    /// Handlers in the file of handlers that answer with it.
    pub handlers: Vec<String>,
    /// Models that went on from it, which are whole in themselves.
    pub models: Vec<String>,
}

impl Users {
    /// Whether anybody would not run without it.
    pub fn are_orphaned(&self) -> bool {
        !(self.adapters.is_empty() && self.runs.is_empty() && self.handlers.is_empty())
    }
}

/// Who names a model or a base, among all models. What cannot be read of the file of handlers is told to `tell`.
pub fn users_of(target: &Target, all: &[Entry], tell: &mut dyn FnMut(String)) -> Users {
    let is_self = |entry: &&Entry| *target != Target::Model(entry.name.clone());
    let mut users = Users::default();
    for entry in all.iter().filter(is_self) {
        let is_base = target.is_base_of(&entry.base, entry.base_name.as_deref());
        if is_base && entry.kind == "adapter" {
            users.adapters.push(entry.name.clone());
        } else if is_base || matches!(target, Target::Model(name) if entry.parent.as_ref() == Some(name)) {
            users.models.push(entry.name.clone());
        }
    }
    users.runs = runs_on(target);
    users.handlers = handlers_of(target).unwrap_or_else(|error| {
        tell(format!("{error:#}; whether a handler in it names what is to be removed is not known"));
        Vec::new()
    });
    users
}

/// Adapters that runs of pipelines left, whose base it is.
fn runs_on(target: &Target) -> Vec<String> {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let Some(runs) = data_directory().map(|data| data.join("runs")) else { return Vec::new() };
    let mut found = Vec::new();
    for run in entries(&runs) {
        for adapter in entries(&run.path().join("adapters")) {
            let Ok(Some(manifest)) = read_manifest(&adapter.path()) else { continue };
            if target.is_base_of(&manifest.base.path, manifest.base.name.as_deref()) {
                let (run, adapter) = (run.file_name(), adapter.file_name());
                found.push(format!("{}/{}", run.to_string_lossy(), adapter.to_string_lossy()));
            }
        }
    }
    found.sort();
    found
}

/// The local handlers of the user's file of handlers that answer with it. What else is wrong with the file does not matter here.
fn handlers_of(target: &Target) -> Result<Vec<String>> {
    let Some(file) = data_directory().map(|data| handlers_in(&data)) else { return Ok(Vec::new()) };
    if !is_named(&file)? {
        return Ok(Vec::new());
    }
    let text = read_text(&file, SMALL_FILE_BYTES_MAX)?;
    // The parser's message quotes a line, which may hold a key.
    let parsed = text.trim_start_matches('\u{feff}').parse::<toml::Table>().ok();
    let parsed = parsed.with_context(|| format!("{}: not TOML", file.display()))?;
    let handlers = parsed.get("handlers").and_then(toml::Value::as_table);
    let is_meant = |handler: &toml::Value| {
        let is_local = handler.get("kind").and_then(toml::Value::as_str) == Some("local");
        let mut named = ["model", "base_model"].iter().filter_map(|key| handler.get(key)?.as_str());
        // A relative path is beside the file, as `handler::config` reads it.
        let is_target =
            |text: &str| target.is_meant_by(Path::new(text)) || target.is_meant_by(&file.with_file_name(text));
        is_local && named.any(is_target)
    };
    let meant = handlers.into_iter().flatten().filter(|(_, handler)| is_meant(handler));
    Ok(meant.map(|(name, _)| name.clone()).collect())
}
