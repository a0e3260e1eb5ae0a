//! What is done with directories and files under temporary names whose makers were killed.
//!
//! A directory of this user on which nobody holds a lock is litter. Where a file system has no such locks, nothing is swept.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::exchange;
use super::temporary::{FILE_PREFIX, PREFIX, claim, is_temporary, leads_to, open_directory};

/// Removes what killed processes of this user left in a directory, and puts in place what they were just putting there.
pub(super) fn sweep(parent: &Path) {
    sweep_those(parent, PREFIX, |_| true);
}

/// Puts in place what killed processes of this user were just putting in a directory, and leaves the rest.
pub(super) fn recover(parent: &Path) {
    sweep_those(parent, PREFIX, exchange::is_aside);
}

/// Removes the files that killed writers left under temporary names. The caller holds the lock of the directory, so nobody who has it
/// writes one now.
pub(super) fn sweep_files(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_temporary(&entry.file_name().to_string_lossy(), FILE_PREFIX) && is_ours(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn sweep_those(parent: &Path, prefix: &str, wanted: fn(&Path) -> bool) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        if !is_temporary(&entry.file_name().to_string_lossy(), prefix) || !is_ours(&path) || !wanted(&path) {
            continue;
        }
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A finished directory took the place of a file or link, and this is what it was exchanged for.
            let _ = fs::remove_file(&path);
            continue;
        }
        let Ok(directory) = open_directory(&path) else { continue };
        if directory.try_lock().is_ok() && leads_to(&path, &directory) {
            exchange::finish(&path, parent);
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(unix)]
pub(super) fn is_ours(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    fs::symlink_metadata(path).is_ok_and(|meta| meta.uid() == user)
}

#[cfg(not(unix))]
pub(super) fn is_ours(_: &Path) -> bool {
    false
}

/// A private directory of this process among the system's temporary files. Dropped, it is gone; if the process is killed, the next
/// that makes one of its kind removes it.
pub struct Scratch {
    path: PathBuf,
    _alive: Option<File>,
}

impl Scratch {
    /// Makes one; `kind` is a word for its name.
    ///
    /// # Errors
    /// When the system's directory for temporary files cannot be written.
    pub fn new(kind: &str) -> io::Result<Self> {
        Self::new_in(kind, &std::env::temp_dir())
    }

    fn new_in(kind: &str, parent: &Path) -> io::Result<Self> {
        let prefix = format!("homeroom-{kind}-");
        sweep_those(parent, &prefix, |_| true);
        let (path, alive) = claim(&prefix, parent)?;
        Ok(Self { path, _alive: alive })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
