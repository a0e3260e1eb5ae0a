//! Where the model is that a name means: a path, a model of the registry, or one of the Hugging Face hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use homeroom_engine::adapt::adapter::{AdapterFiles, NamedBase, is_adapter};
use homeroom_engine::files::broken_link;
use homeroom_engine::models::{BaseModel, Source};

use super::ModelRef;
use super::missing::{how_to_bring, not_here, not_there};
use crate::hub::{self, Found, HubName, cache, gguf, policy, stores};
use crate::interrupt::Interrupted;
use crate::near;
use crate::registry;
use crate::terminal::cell;

/// Whether what is not on this machine may be downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A person typed the name, so that they want it.
    Allowed,
    /// Nothing is downloaded: why, in words for the message.
    Never(&'static str),
}

impl Network {
    /// Why nothing is downloaded, if nothing is.
    pub fn refusal(self) -> Option<String> {
        match self {
            Self::Allowed => hub::offline().map(|reason| format!("nothing is downloaded ({reason})")),
            Self::Never(why) => Some(why.to_owned()),
        }
    }
}

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its directory, or its GGUF file.
    pub path: PathBuf,
    /// What it is on the hub, if it lies in the cache or in a shared store.
    pub source: Option<Source>,
}

impl Located {
    /// The model at a path.
    ///
    /// # Errors
    /// When it is one of the hub, and not allowed here.
    pub fn at(path: PathBuf) -> Result<Self> {
        policy::check_path(&path)?;
        Ok(Self { source: source_of(&path), path })
    }

    /// What to name it by, here and in a file: its name on the hub with the commit, or its path.
    pub fn name(&self) -> String {
        let name = self.source.as_ref().and_then(|source| Some(HubName::parse(&source.name)?.at(&source.revision)));
        name.map_or_else(|| self.path.display().to_string(), |name| name.to_string())
    }
}

/// Finds the model that a name means. What is there as a path wins, then a model of the registry, then one in Hugging Face's cache or a
/// shared store; then, if `network` allows it, it is downloaded from the hub.
///
/// # Errors
/// When there is no such model here, and it may not or cannot be downloaded.
pub fn locate(name: &Path, network: Network) -> Result<Located> {
    if let Some(located) = here(name)? {
        return Ok(located);
    }
    match HubName::typed(name) {
        Some(hub_name) => of_hub(&hub_name, network),
        None => bail!(not_there(name, "")),
    }
}

/// As [`locate`], of a name that can be nothing but one on the hub.
///
/// # Errors
/// When it is not here, and may not or cannot be downloaded.
pub fn of_hub(name: &HubName, network: Network) -> Result<Located> {
    if let Some(found) = hub::find(name)? {
        return Located::at(found.path);
    }
    match network.refusal() {
        None => fetch(name),
        Some(why) => bail!(not_here(name, &why)),
    }
}

/// As [`locate`], of what is on this machine.
///
/// # Errors
/// When a model in the cache is not allowed here, or the name could mean several files.
pub fn here(name: &Path) -> Result<Option<Located>> {
    let path = registry::resolve(name);
    let hub_name = name.to_str().and_then(HubName::parse);
    // Of a link that leads nowhere the engine says where it leads.
    if path.symlink_metadata().is_ok() {
        if let Some(Ok(Some(found))) = hub_name.as_ref().map(hub::find) {
            registry::note_ambiguous(name, &found.path);
        }
        return Located::at(path).map(Some);
    }
    let found = hub_name.as_ref().map(hub::find).transpose()?.flatten();
    found.map(|found| Located::at(found.path)).transpose()
}

/// Whether a model, and its base if it is an adapter, are on this machine: to load it downloads nothing.
///
/// # Errors
/// As [`here`].
pub fn is_here(reference: &ModelRef) -> Result<bool> {
    let Some(located) = here(&reference.name)? else { return Ok(false) };
    Ok(match &reference.base_model {
        Some(base) => here(base)?.is_some(),
        // What is damaged is told by whoever loads it.
        None if is_adapter(&located.path) => AdapterFiles::read(&located.path)
            .map_or(true, |files| base_of(&files, Network::Never("it is only looked for")).is_ok()),
        None => true,
    })
}

/// Downloads a model. What the hub does not have may be one in the cache whose name is wrong by a letter.
fn fetch(name: &HubName) -> Result<Located> {
    let pulled = hub::pull(name).map_err(|error| match near::cached(name) {
        Some(near) if !error.is::<Interrupted>() && !format!("{error:#}").contains(&format!("`{near}`")) => {
            anyhow!("{error:#}\nhint: `{near}`, which has nearly that name, is in the cache")
        }
        _ => error,
    })?;
    Located::at(pulled.found.path)
}

/// Finds the base of an adapter by what the adapter says of it: one that this program trained names its base by commit, and that is
/// looked for in the cache before the path, which may be another machine's.
///
/// # Errors
/// When the base is not here, and may not or cannot be downloaded.
pub fn base_of(files: &AdapterFiles, network: Network) -> Result<Located> {
    let adapter = files.path.display();
    let base = files.base();
    let hub_name = hub_name_of(&base);
    let by_name = || hub_name.as_ref().map(hub::find).transpose().map(Option::flatten);
    let by_path = || base.path.as_deref().map(registry::resolve).filter(|path| path.exists());
    let found = match &files.manifest {
        Some(_) => by_name()?.map(|found| found.path).or_else(by_path),
        // PEFT writes what `from_pretrained` was given, and that takes a directory first.
        None => by_path().or(by_name()?.map(|found| found.path)),
    };
    if let Some(path) = found {
        return Located::at(path);
    }
    let Some(hub_name) = hub_name else {
        match &base.path {
            Some(path) => {
                let link = broken_link(path).map(|link| format!(", it is {link}")).unwrap_or_default();
                bail!(
                    "{adapter}: its base model {} is not there{link}\nhint: name where it is with --base-model",
                    cell(&path.display().to_string())
                )
            }
            None => bail!("{adapter}: it does not say which base model it belongs to; name it with --base-model"),
        }
    };
    let others = other_commits(&hub_name)?;
    let digest = files.manifest.as_ref().map(|manifest| manifest.base.digest.as_str());
    // A commit can change what is no weight, a readme most often.
    let same = |found: &&Found| {
        digest.is_some() && BaseModel::load(&found.path).is_ok_and(|model| Some(model.digest().as_str()) == digest)
    };
    if let Some(found) = others.iter().find(same) {
        return Located::at(found.path.clone());
    }
    let Some(why) = network.refusal() else {
        return fetch(&hub_name).with_context(|| format!("{adapter}: its base model"));
    };
    let others = match others.as_slice() {
        [] => String::new(),
        [other, ..] => format!(" (the cache has it at {} only, which is another base)", other.commit),
    };
    let bring = how_to_bring(&hub_name);
    bail!(
        "{adapter}: its base model {hub_name} is not there{others}; {why}\nhint: {bring}\nhint: --base-model names one that is elsewhere"
    )
}

/// The name on the hub of an adapter's base. Where only a path is known, that of a cache has the name in it.
pub fn hub_name_of(base: &NamedBase) -> Option<HubName> {
    let named = base.name.as_deref().and_then(HubName::parse).map(|name| match &base.revision {
        // It comes from a file: only what can be a revision is taken for one.
        Some(revision) if name.revision.is_none() => HubName::parse(&name.at(revision).to_string()).unwrap_or(name),
        _ => name,
    });
    named.or_else(|| in_path(base.path.as_deref()?)?.into_iter().next())
}

/// The same model at all commits at which it is in the cache or a shared store, the newest first.
fn other_commits(name: &HubName) -> Result<Vec<Found>> {
    let repos = cache::list()?.into_iter().filter(|cached| cached.repo.eq_ignore_ascii_case(&name.repo));
    let commits = repos.flat_map(|cached| cached.snapshots).map(|snapshot| snapshot.commit);
    commits.filter_map(|commit| hub::find(&name.at(&commit)).transpose()).collect()
}

/// What a path is on the hub, if it leads into the cache or a shared store: a model is found there by its name on any machine.
fn source_of(path: &Path) -> Option<Source> {
    let path = std::path::absolute(path).ok()?;
    // A file is a link to its blob, whose path says nothing.
    let real = match path.is_dir() {
        true => path.canonicalize().ok()?,
        false => path.parent()?.canonicalize().ok()?.join(path.file_name()?),
    };
    stores::stores().iter().find_map(|store| real.strip_prefix(store.canonicalize().ok()?).ok())?;
    // A name that would mean something else here is none.
    let is_same = |name: &HubName| {
        let found = hub::find(name).ok().flatten().and_then(|found| found.path.canonicalize().ok());
        found.is_some() && found == real.canonicalize().ok()
    };
    let name = in_path(&real)?.into_iter().find(is_same)?;
    let revision = name.revision.clone()?;
    Some(Source { name: HubName { revision: None, ..name }.to_string(), revision })
}

/// The names that a path of the cache can have, the shortest first: `…/models--owner--name/snapshots/COMMIT`, or a GGUF file in that.
fn in_path(path: &Path) -> Option<Vec<HubName>> {
    let parts: Vec<&str> = path.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
    let at = parts.iter().rposition(|part| *part == "snapshots")?;
    let (owner, name) = parts.get(at.checked_sub(1)?)?.strip_prefix("models--")?.split_once("--")?;
    let commit = parts.get(at + 1).filter(|commit| HubName::is_commit(commit))?;
    let name = HubName::parse(&format!("{owner}/{name}@{commit}"))?;
    let quantized = |quantization: &str| HubName::parse(&format!("{name}:{quantization}"));
    Some(match parts.get(at + 2..)? {
        [] => vec![name],
        [.., file] if file.to_ascii_lowercase().ends_with(".gguf") => {
            // Of `m-Q4_K_M.gguf` and `m-UD-Q4_K_M.gguf` the short name could mean both.
            [gguf::quantization(file), gguf::whole_stem(file)].into_iter().filter_map(quantized).collect()
        }
        _ => return None,
    })
}

/// A base as the line that restates a run names it: by its name on the hub and the commit's beginning, or as it was typed.
pub fn shown(model: &BaseModel, typed: &Path) -> String {
    const COMMIT_DIGITS: usize = 7;
    let name = model.source.as_ref().and_then(|source| {
        let name = HubName::parse(&source.name)?;
        Some(name.at(source.revision.get(..COMMIT_DIGITS)?).to_string())
    });
    name.unwrap_or_else(|| typed.display().to_string())
}

/// The part of a typed name that says which model it is, for what is called after it: `name-Q4_K_M` of `owner/name@revision:Q4_K_M`, the
/// last part of a path.
pub fn last_part(name: &Path) -> Option<String> {
    let hub_name = name.to_str().and_then(HubName::parse).filter(|_| !name.exists());
    if let Some(HubName { repo, quantization, .. }) = hub_name {
        let (_, name) = repo.split_once('/')?;
        return Some(quantization.map_or_else(|| name.to_owned(), |quantization| format!("{name}-{quantization}")));
    }
    // Of `.` and `outputs/..` the name is that of the directory that they lead to.
    let path = if name.file_name().is_some() { name.to_owned() } else { name.canonicalize().ok()? };
    Some(path.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_a_cache_has_a_name_in_it() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (path, names) in [
            ("/h/models--a-b--c.d_e/snapshots/C", vec!["a-b/c.d_e@C"]),
            ("models--a--b/snapshots/C/x-y.Q4_K_M.gguf", vec!["a/b@C:Q4_K_M", "a/b@C:x-y.Q4_K_M"]),
            ("models--a--b/snapshots/C/q8/x-q8_0-00001-of-00002.GGUF", vec!["a/b@C:q8_0", "a/b@C:x-q8_0"]),
            ("models--a--b/snapshots/C/config.json", vec![]),
            ("models--a--b/snapshots/main", vec![]),
            ("models--a--b/blobs/C", vec![]),
            ("datasets--a--b/snapshots/C", vec![]),
            ("models--a--../snapshots/C", vec![]),
        ] {
            let found = in_path(Path::new(&path.replace('C', commit))).unwrap_or_default();
            let found: Vec<String> = found.iter().map(HubName::to_string).collect();
            assert_eq!(found, names.iter().map(|name| name.replace('C', commit)).collect::<Vec<_>>(), "{path}");
        }
    }

    #[test]
    fn what_is_called_after_a_model_has_neither_its_owner_nor_its_revision() {
        for (typed, name) in [
            ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
            ("a/b@refs/pr/7:Q4_K_M", "b-Q4_K_M"),
            ("outputs/x/tutor", "tutor"),
            ("/", ""),
        ] {
            assert_eq!(last_part(Path::new(typed)).unwrap_or_default(), name, "{typed}");
        }
    }

    #[test]
    fn the_base_of_an_adapter_has_the_revision_that_is_said_beside_its_name() {
        let named = |name: &str, revision: Option<&str>| {
            let base = NamedBase {
                path: Some(name.into()),
                name: Some(name.to_owned()),
                revision: revision.map(str::to_owned),
            };
            hub_name_of(&base).map(|name| name.to_string())
        };
        assert_eq!(named("a/b", Some("v1")).as_deref(), Some("a/b@v1"));
        assert_eq!(named("a/b:Q8_0", Some("v1")).as_deref(), Some("a/b@v1:Q8_0"));
        assert_eq!(named("a/b@v2", Some("v1")).as_deref(), Some("a/b@v2"));
        assert_eq!(named("a/b", Some("../../etc")).as_deref(), Some("a/b"));
        assert_eq!(named("/models/b", Some("v1")), None);
    }
}
