//! Everything that the cache and the shared stores have, and how a model is removed.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use homeroom_engine::files::open_regular;

use super::{HubName, Kind, commits, kind, read_ref};
use crate::hub::stores::{directory, folder, repo_of, shared, stores};

/// How deep below `refs/` names are looked for: `refs/pr/7`.
const REF_DEPTH_MAX: usize = 8;

/// A repository of the hub that is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// `owner/name`.
    pub repo: String,
    /// The store that it is in.
    pub store: PathBuf,
    /// Its folder there, `models--owner--name`.
    pub folder: PathBuf,
    /// Branches and tags, each with its commit.
    pub refs: Vec<(String, String)>,
    /// What there is of it, the newest first.
    pub snapshots: Vec<Snapshot>,
    /// Bytes on disk, each file once however many snapshots have it; what was not finished counts, too.
    pub bytes: u64,
    /// When a file of it was last read or changed, as far as the file system keeps that.
    pub used: Option<SystemTime>,
    /// When a file of it was last changed.
    pub modified: Option<SystemTime>,
}

/// The files of one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its commit.
    pub commit: String,
    /// Its directory.
    pub path: PathBuf,
    /// What it is; `None`: files are missing, or it is nothing that this program uses.
    pub kind: Option<Kind>,
    /// When it was made.
    pub modified: Option<SystemTime>,
}

impl Cached {
    /// The snapshot that the name alone means: that of `main` if it is whole, or else the newest that is.
    pub fn current(&self) -> Option<&Snapshot> {
        let main = self.refs.iter().find(|(name, _)| name == "main").map(|(_, commit)| commit);
        let whole = || self.snapshots.iter().filter(|snapshot| snapshot.kind.is_some());
        whole().find(|snapshot| Some(&snapshot.commit) == main).or_else(|| whole().next())
    }
}

/// The repositories of the user's cache and of the shared stores, by name; one that is in several is told for each. Opens no connection.
///
/// # Errors
/// When a store is there and cannot be read.
pub fn list() -> Result<Vec<Cached>> {
    let mut cached = Vec::new();
    for store in stores() {
        cached.extend(list_in(&store)?);
    }
    // The order of stores stays among those of one name.
    cached.sort_by(|a, b| a.repo.cmp(&b.repo));
    Ok(cached)
}

/// The repositories of one store, which need not be there.
pub(super) fn list_in(store: &Path) -> Result<Vec<Cached>> {
    let entries = match fs::read_dir(store) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{}: cannot read this store", store.display())),
    };
    let mut cached = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        if let Some(repo) = name.to_str().and_then(repo_of).filter(|_| entry.path().is_dir()) {
            cached.push(read(store, repo, entry.path()));
        }
    }
    Ok(cached)
}

/// The repository in a folder of any store, if the folder is called as one.
pub fn at(folder: &Path) -> Option<Cached> {
    let repo = repo_of(folder.file_name()?.to_str()?)?;
    Some(read(folder.parent()?, repo, folder.to_owned()))
}

fn read(store: &Path, repo: String, folder: PathBuf) -> Cached {
    let mut snapshots: Vec<Snapshot> = commits(&folder)
        .into_iter()
        .map(|(commit, modified)| {
            let path = folder.join("snapshots").join(&commit);
            Snapshot { kind: kind(&path), path, commit, modified }
        })
        .collect();
    snapshots.sort_by(|a, b| (b.modified, &b.commit).cmp(&(a.modified, &a.commit)));
    let mut refs = Vec::new();
    gather_refs(&folder, "", REF_DEPTH_MAX, &mut refs);
    refs.sort();
    let mut sum = Sum::default();
    sum.add(&folder.join("blobs"));
    sum.add(&folder.join("snapshots"));
    let Sum { bytes, used, modified, .. } = sum;
    Cached { repo, store: store.to_owned(), folder, refs, snapshots, bytes, used, modified }
}

fn gather_refs(folder: &Path, before: &str, depth: usize, refs: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder.join("refs").join(before)).into_iter().flatten().flatten() {
        let (Ok(name), Ok(kind)) = (entry.file_name().into_string(), entry.file_type()) else { continue };
        let name = format!("{before}{name}");
        if kind.is_dir() && depth > 1 {
            gather_refs(folder, &format!("{name}/"), depth - 1, refs);
        } else if let Some(commit) = read_ref(folder, &name) {
            refs.push((name, commit));
        }
    }
}

/// Sums of a directory's files; links are not followed to directories.
#[derive(Default)]
struct Sum {
    bytes: u64,
    used: Option<SystemTime>,
    modified: Option<SystemTime>,
    seen: BTreeSet<(u64, u64)>,
}

impl Sum {
    fn add(&mut self, directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                self.add(&entry.path());
            } else if let Some(meta) = fs::metadata(entry.path()).ok().filter(Metadata::is_file)
                && self.is_new(&meta)
            {
                self.bytes += meta.len();
                let modified = meta.modified().ok();
                self.modified = self.modified.max(modified);
                self.used = self.used.max(meta.accessed().ok()).max(modified);
            }
        }
    }

    /// Whether a file was not counted yet: snapshots link to blobs.
    #[cfg(unix)]
    fn is_new(&mut self, meta: &Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.seen.insert((meta.dev(), meta.ino()))
    }

    #[cfg(not(unix))]
    fn is_new(&mut self, _: &Metadata) -> bool {
        true
    }
}

/// Removes a repository (`owner/name`) from the user's cache, and returns how many bytes it had. What is shared stays.
///
/// # Errors
/// When it is not in the user's cache, another process is downloading it, or it cannot be removed.
pub fn remove(repo: &str) -> Result<u64> {
    let store = directory().context("there is no cache; set HF_HOME")?;
    if let Some(bytes) = remove_in(&store, repo)? {
        return Ok(bytes);
    }
    match shared().into_iter().find(|store| folder(store, repo).exists()) {
        Some(shared) => bail!("{repo}: it is in {}, which is shared, and is not removed", shared.display()),
        None => bail!("{repo}: not in {}", store.display()),
    }
}

/// Removes a repository from one store, if it is there.
pub(super) fn remove_in(store: &Path, repo: &str) -> Result<Option<u64>> {
    // What is no name could lead out of the store.
    let folder = match HubName::parse(repo).filter(|name| name.repo == repo) {
        Some(name) => folder(store, &name.repo),
        None => bail!("{repo}: not a name on the hub"),
    };
    if folder.symlink_metadata().is_err() {
        return Ok(None);
    }
    let name = folder.file_name().context("a folder has a name")?;
    let locks = store.join(".locks").join(name);
    let _held = held(&locks, repo)?;
    let bytes = read(store, repo.to_owned(), folder.clone()).bytes;
    let cannot = || format!("{}: cannot remove", folder.display());
    if folder.is_symlink() {
        fs::remove_file(&folder).with_context(cannot)?;
        return Ok(Some(bytes));
    }
    // In this order, so that what a kill leaves is never taken for a model that is whole.
    for part in ["refs", "snapshots", "blobs"] {
        match fs::remove_dir_all(folder.join(part)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).with_context(cannot),
            _ => {}
        }
    }
    fs::remove_dir_all(&folder).with_context(cannot)?;
    // Locks are of no use without files to lock.
    let _ = fs::remove_dir_all(&locks);
    Ok(Some(bytes))
}

/// All locks of a repository's files, which who downloads one holds.
fn held(locks: &Path, repo: &str) -> Result<Vec<File>> {
    let mut held = Vec::new();
    for entry in fs::read_dir(locks).into_iter().flatten().flatten() {
        let Ok(file) = open_regular(&entry.path()) else { continue };
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            bail!("{repo}: another process is downloading it\nhint: try again when that has ended");
        }
        held.push(file);
    }
    Ok(held)
}
