//! A private file in the making that its maker holds the lock of: so that a large one can be written beside others, and one whose maker
//! was killed be told from one that is being written.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::litter::is_ours;
use super::sync::sync_directory;
use super::temporary::{self, CLAIMED_PREFIX, is_temporary, leads_to};

/// A file under a temporary name. Dropped, it is gone; if its maker is killed, the next that makes one beside it removes it.
pub struct ClaimedFile(NamedTempFile);

impl ClaimedFile {
    /// Makes one in a directory, and removes what killed makers left there.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn new(directory: &Path) -> io::Result<Self> {
        sweep(directory);
        loop {
            let file = temporary::file_named(CLAIMED_PREFIX, directory)?;
            // A file system without locks has nothing swept.
            let _ = file.as_file().lock();
            // Before it was locked, another process may have taken it for litter.
            if leads_to(file.path(), file.as_file()) {
                return Ok(Self(file));
            }
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        self.0.as_file()
    }

    /// Gives the file, all of which is on the disk already, its name, in place of an older one.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn finish(self, path: &Path) -> Result<()> {
        self.0
            .persist(path)
            .map_err(|error| error.error)
            .with_context(|| format!("{}: cannot write", path.display()))?;
        sync_directory(path.parent().context("a file has a directory")?);
        Ok(())
    }
}

/// Removes the files of this user on which nobody holds a lock.
fn sweep(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !is_temporary(&entry.file_name().to_string_lossy(), CLAIMED_PREFIX) || !is_ours(&path) {
            continue;
        }
        let Ok(file) = File::options().read(true).write(true).open(&path) else { continue };
        if file.try_lock().is_ok() && leads_to(&path, &file) {
            let _ = fs::remove_file(&path);
        }
    }
}
