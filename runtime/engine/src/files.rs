//! Writes a directory so that it is there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

/// A directory in the making, beside its destination, under a temporary name. Dropped before [`NewDirectory::publish`], it
/// leaves nothing.
pub struct NewDirectory {
    temporary: TempDir,
    destination: PathBuf,
    /// Whether what is at the destination by then may be replaced; it may, unless the caller says otherwise.
    pub replaces: bool,
}

impl NewDirectory {
    /// Starts a directory that will be `destination`. Whether that may be replaced is the caller's to ask, with [`vacant`].
    ///
    /// # Errors
    /// When the parent cannot be created or written.
    pub fn start(destination: &Path) -> Result<Self> {
        let destination = std::path::absolute(destination)?;
        let parent = destination.parent().filter(|_| destination.file_name().is_some());
        let parent = parent.with_context(|| format!("{}: not a name for a directory", destination.display()))?;
        fs::create_dir_all(parent).with_context(|| format!("{}: cannot create", parent.display()))?;
        ensure!(
            !is_mount_point(&destination, parent),
            "{}: a mount point, which cannot be replaced by a finished directory; name a directory in it",
            destination.display()
        );
        let mut builder = tempfile::Builder::new();
        builder.prefix(".homeroom-");
        // As open as the user's other directories: the system takes away what their umask forbids.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let temporary = builder.tempdir_in(parent);
        let temporary = temporary.with_context(|| format!("{}: cannot write here", parent.display()))?;
        Ok(Self { temporary, destination, replaces: true })
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
    /// When it cannot get its name, or that is taken and it must not replace what has it. What had the name is then still there,
    /// and so is the finished directory: the message says where.
    pub fn publish(self) -> Result<PathBuf> {
        let Self { temporary, destination, replaces } = self;
        let unfinished = || format!("{}: cannot finish the directory", destination.display());
        for entry in fs::read_dir(temporary.path()).with_context(unfinished)? {
            let path = entry.with_context(unfinished)?.path();
            File::open(&path).and_then(|file| file.sync_all()).with_context(unfinished)?;
            open_as(temporary.path(), &path).with_context(unfinished)?;
        }
        let from = temporary.keep();
        let failed = || {
            let (to, from) = (destination.display(), from.display());
            format!("{to}: cannot put the finished directory here; it is whole in {from}")
        };
        if !replaces {
            vacant(&destination).with_context(failed)?;
        }
        let parent = destination.parent().context("a directory needs a parent")?.to_owned();
        let mut older = None;
        if destination.exists() {
            let aside = tempfile::Builder::new().prefix(".homeroom-old-").tempdir_in(&parent).with_context(failed)?;
            fs::rename(&destination, aside.path().join("old")).with_context(failed)?;
            older = Some(aside);
        }
        if let Err(error) = fs::rename(&from, &destination) {
            if let Some(aside) = older {
                // The older directory goes back; if even that fails, it stays where the message says.
                let aside = aside.keep();
                let back = fs::rename(aside.join("old"), &destination).and_then(|()| fs::remove_dir(&aside));
                back.with_context(|| format!("the older one is in {}", aside.display())).with_context(failed)?;
            }
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

/// Whether a directory is on another device than its parent.
#[cfg(unix)]
fn is_mount_point(path: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = fs::symlink_metadata(path).map(|meta| meta.dev());
    matches!((device, fs::metadata(parent)), (Ok(device), Ok(parent)) if device != parent.dev())
}

#[cfg(not(unix))]
fn is_mount_point(_: &Path, _: &Path) -> bool {
    false
}

/// Makes a file as open as its directory: some writers make theirs private.
#[cfg(unix)]
fn open_as(directory: &Path, file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(directory)?.permissions().mode() & 0o666;
    fs::set_permissions(file, fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn open_as(_: &Path, _: &Path) -> std::io::Result<()> {
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
