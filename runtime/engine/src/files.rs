//! Writes a directory so that it is there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// A directory in the making, beside its destination, under a temporary name. Dropped before [`NewDirectory::publish`], it
/// leaves nothing.
pub struct NewDirectory {
    temporary: TempDir,
    destination: PathBuf,
}

impl NewDirectory {
    /// Starts a directory that will be `destination`. Whether that may be replaced is the caller's to ask, with [`vacant`].
    ///
    /// # Errors
    /// When the parent cannot be created or written.
    pub fn start(destination: &Path) -> Result<Self> {
        let destination = std::path::absolute(destination)?;
        let parent = destination.parent().context("a directory needs a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("{}: cannot create", parent.display()))?;
        let temporary = tempfile::Builder::new().prefix(".homeroom-").tempdir_in(parent);
        let temporary = temporary.with_context(|| format!("{}: cannot write here", parent.display()))?;
        Ok(Self { temporary, destination })
    }

    /// Writes a file and has it on the disk.
    ///
    /// # Errors
    /// When the disk is full, or anything else fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.temporary.path().join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().with_context(|| format!("{}: cannot write {name}", self.destination.display()))
    }

    /// The directory under its temporary name, for writers that want a path.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the directory its name, in place of an older one if there is one.
    ///
    /// # Errors
    /// When it cannot be renamed; an older one is then still there.
    pub fn publish(self) -> Result<PathBuf> {
        let Self { temporary, destination } = self;
        let failed = || format!("{}: cannot put the finished directory here", destination.display());
        for entry in fs::read_dir(temporary.path()).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            File::open(&path).and_then(|file| file.sync_all()).with_context(failed)?;
            open_to_others(&path, 0o644).with_context(failed)?;
        }
        open_to_others(temporary.path(), 0o755).with_context(failed)?;
        let parent = destination.parent().context("a directory needs a parent")?.to_owned();
        let mut older = None;
        if destination.exists() {
            let aside = tempfile::Builder::new().prefix(".homeroom-old-").tempdir_in(&parent).with_context(failed)?;
            fs::rename(&destination, aside.path().join("old")).with_context(failed)?;
            older = Some(aside);
        }
        let from = temporary.keep();
        if let Err(error) = fs::rename(&from, &destination) {
            if let Some(aside) = &older {
                // The older directory goes back; if even that fails, both stay where the message says.
                fs::rename(aside.path().join("old"), &destination).with_context(failed)?;
            }
            let _ = fs::remove_dir_all(&from);
            return Err(error).with_context(failed);
        }
        sync_directory(&parent);
        drop(older);
        Ok(destination)
    }
}

/// Refuses to write over something.
///
/// # Errors
/// When `path` is a file, or a directory that is not empty.
pub fn vacant(path: &Path) -> Result<()> {
    match fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => bail!("{}: the directory is not empty; name a new one, or pass --overwrite", path.display()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{}: cannot write a directory here", path.display())),
    }
}

/// Temporary files are private; finished ones are as open as the user's other files.
#[cfg(unix)]
fn open_to_others(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn open_to_others(_: &Path, _: u32) -> std::io::Result<()> {
    Ok(())
}

/// Has a rename on the disk. Not every file system lets a directory be synced; the data itself is synced already.
fn sync_directory(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_appears_whole_or_not_at_all() -> Result<()> {
        let place = tempfile::tempdir()?;
        let target = place.path().join("out");
        let started = NewDirectory::start(&target)?;
        started.write("a", b"1")?;
        assert!(!target.exists());
        drop(started);
        assert_eq!(fs::read_dir(place.path())?.count(), 0);

        let started = NewDirectory::start(&target)?;
        started.write("a", b"1")?;
        started.publish()?;
        assert_eq!(fs::read(target.join("a"))?, b"1");
        assert!(vacant(&target).is_err());

        let again = NewDirectory::start(&target)?;
        again.write("a", b"2")?;
        again.publish()?;
        assert_eq!(fs::read(target.join("a"))?, b"2");
        assert_eq!(fs::read_dir(place.path())?.count(), 1);
        Ok(())
    }
}
