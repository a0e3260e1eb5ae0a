//! Which strategies may be loaded: those beside this program that its owner put there, and those whose SHA-256 the user has
//! written into `plugins.lock`. The policy `dev` loads any.
//!
//! The policy is the user's: `--plugin-policy`, else `HOMEROOM_PLUGIN_POLICY`, else `locked`. A pipeline's file may say `locked`, and
//! nothing else, since it may come from somebody else.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use homeroom_engine::files::replace_file;
use serde::{Deserialize, Serialize};

use super::PluginFile;
use super::owner;
use crate::registry::{self, data_directory};

/// Environment variable of the policy.
pub const VARIABLE: &str = "HOMEROOM_PLUGIN_POLICY";

/// Size of the largest `plugins.lock` that is read.
const LOCK_BYTES_MAX: u64 = 1 << 20;

/// Which strategies may be loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Those beside the program, and those in plugins.lock
    #[default]
    Locked,
    /// Any that is found; for developing strategies
    Dev,
}

/// Why a strategy may be loaded, or that it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It lies beside this program and has its owner.
    Beside,
    /// Its digest is in `plugins.lock`.
    Locked,
    /// The policy is `dev`.
    Dev,
    /// It may not, for this reason.
    Refused(String),
}

impl Standing {
    /// In a word, for lists.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Beside => "beside the program",
            Self::Locked => "locked",
            Self::Dev => "dev",
            Self::Refused(_) => "refused",
        }
    }
}

/// A strategy that the user trusts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its file, in hexadecimal digits.
    pub sha256: String,
    /// Where it was.
    pub path: PathBuf,
}

/// `plugins.lock`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockFile {
    #[serde(default)]
    plugin: Vec<Entry>,
}

/// The policy, and what is locked.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    policy: Policy,
    entries: Vec<Entry>,
}

impl Trust {
    /// What the user says: on the command line, else in the environment.
    ///
    /// # Errors
    /// When the environment names no policy, or `plugins.lock` cannot be read or others may write it.
    pub fn of_user(policy: Option<Policy>) -> Result<Self> {
        let policy = match (policy, std::env::var(VARIABLE)) {
            (Some(policy), _) => policy,
            (None, Ok(text)) if !text.is_empty() => Policy::from_str(&text, false)
                .map_err(|_| anyhow!("{VARIABLE} is `{text}`, it takes `locked` or `dev`"))?,
            _ => Policy::default(),
        };
        Ok(Self { policy, entries: read_lock()? })
    }

    /// The same with a policy that a project's file asks for, which can only be stricter.
    pub fn tightened(self, project: Option<Policy>) -> Self {
        let policy = if project == Some(Policy::Locked) { Policy::Locked } else { self.policy };
        Self { policy, ..self }
    }

    /// Whether a file may be loaded as the strategy `name`.
    pub fn standing(&self, name: &str, file: &PluginFile) -> Standing {
        if file.beside_program {
            return Standing::Beside;
        }
        let mut named = self.entries.iter().filter(|entry| entry.name == name);
        if named.clone().any(|entry| entry.sha256 == file.sha256) {
            return Standing::Locked;
        }
        if self.policy == Policy::Dev {
            return Standing::Dev;
        }
        let digest = &file.sha256[..16];
        let why = match named.next_back() {
            Some(entry) => {
                format!("it has changed since it was locked: sha256 {digest}, locked is {}", &entry.sha256[..16])
            }
            None => format!("it is not in plugins.lock (sha256 {digest})"),
        };
        Standing::Refused(format!(
            "{why}\nhint: if you trust it, `homeroom plugins lock {name}` (with the same --plugin-dir), or --plugin-policy dev while you write it"
        ))
    }
}

/// Where `plugins.lock` is.
fn lock_path() -> Option<PathBuf> {
    data_directory().map(|data| data.join("plugins.lock"))
}

fn read_lock() -> Result<Vec<Entry>> {
    let Some(path) = lock_path().filter(|path| path.exists()) else { return Ok(Vec::new()) };
    let place = || path.display().to_string();
    let file = owner::open(&path).with_context(place)?;
    let mut text = String::new();
    file.take(LOCK_BYTES_MAX + 1).read_to_string(&mut text).with_context(place)?;
    ensure!(text.len() as u64 <= LOCK_BYTES_MAX, "{}: more than {LOCK_BYTES_MAX} bytes", path.display());
    let LockFile { plugin: entries } = toml::from_str(&text).with_context(place)?;
    for (index, Entry { name, sha256, .. }) in entries.iter().enumerate() {
        let digest = sha256.len() == 64 && sha256.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
        ensure!(digest, "{}: `{name}`: its sha256 is not 64 hexadecimal digits in small letters", path.display());
        // With two digests a name stands there while its file is being replaced.
        let twice = entries[..index].iter().any(|other| other.name == *name && other.sha256 == *sha256);
        ensure!(!twice, "{}: `{name}` is there twice; take one out", path.display());
    }
    Ok(entries)
}

/// The version of a strategy of which that file was locked, in words; "another version" if it was not.
pub fn locked_version(name: &str, sha256: &str) -> String {
    let entries = read_lock().unwrap_or_default();
    let entry = entries.into_iter().find(|entry| entry.name == name && entry.sha256 == sha256);
    entry.map_or_else(|| "another version".to_owned(), |entry| entry.version)
}

/// Writes entries into `plugins.lock`, in place of older ones of their names. Says where that is. Of several processes that do so at
/// once each finds what those before it have written.
///
/// # Errors
/// When there is no data directory, or it cannot be written.
pub fn lock(new: Vec<Entry>) -> Result<PathBuf> {
    let _alone = registry::lock()?;
    let mut entries = read_lock()?;
    entries.retain(|entry| new.iter().all(|new| new.name != entry.name));
    entries.extend(new);
    write_lock(entries)
}

/// Puts a strategy's file in its place by `place`, and its entry into `plugins.lock`. Until the file is there its older entry stands
/// beside the new one, so that whatever ends this in between leaves a file that may be loaded.
///
/// # Errors
/// Those of `place`; when there is no data directory, or `plugins.lock` cannot be written.
pub fn lock_while(entry: Entry, place: impl FnOnce() -> Result<()>) -> Result<()> {
    let _alone = registry::lock()?;
    let mut entries = read_lock()?;
    entries.retain(|other| other.name != entry.name || other.sha256 != entry.sha256);
    entries.push(entry.clone());
    write_lock(entries.clone())?;
    place()?;
    if entries.iter().filter(|other| other.name == entry.name).count() > 1 {
        entries.retain(|other| other.name != entry.name || *other == entry);
        write_lock(entries)?;
    }
    Ok(())
}

fn write_lock(mut entries: Vec<Entry>) -> Result<PathBuf> {
    let path = lock_path().context("there is no data directory; set HOMEROOM_HOME")?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut text = String::from("# Strategies that may be loaded, written by `homeroom plugins lock` and `install`.\n");
    for Entry { name, version, sha256, path } in &entries {
        let Some(path) = path.to_str() else { bail!("{}: its path is not UTF-8", path.display()) };
        let [name, version, sha256, path] =
            [name, version, sha256, path].map(|text| toml_edit::Value::from(text.to_owned()));
        text += &format!("\n[[plugin]]\nname = {name}\nversion = {version}\nsha256 = {sha256}\npath = {path}\n");
    }
    replace_file(&path, text.as_bytes())?;
    Ok(path)
}
