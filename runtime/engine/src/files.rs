//! Writes a directory so that it is there whole or not at all.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};

/// The temporary names of all directories in the making. They get theirs, and lose it, with this held: whoever holds it sees none
/// that is neither here nor finished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every directory in the making, for a program that ends at once. From now on no other is begun or finished: whoever
/// tries to waits for the end.
pub fn abandon_all() {
    let mut directories = unfinished();
    abandon(&mut directories);
    std::mem::forget(directories);
}

fn abandon(directories: &mut Vec<PathBuf>) {
    for path in directories.drain(..) {
        // Under another name first, so that its writers find it no more; a file that they were just opening may still appear.
        let aside = path.with_extension("ended");
        if fs::rename(&path, &aside).is_ok() {
            while fs::remove_dir_all(&aside).is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty) {}
        }
    }
}

/// A directory in the making, beside its destination, under a temporary name. Dropped before [`NewDirectory::publish`], it
/// leaves nothing.
pub struct NewDirectory {
    temporary: Temporary,
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
        let temporary = Temporary::new(".homeroom-", parent);
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

    /// Creates a directory in it, given as a relative path, and those above it. Unlike `create_dir_all` it does not make an abandoned
    /// directory anew.
    ///
    /// # Errors
    /// When that fails.
    pub fn subdirectory(&self, relative: &Path) -> std::io::Result<()> {
        let mut path = self.temporary.path().to_owned();
        for part in relative {
            path.push(part);
            match fs::create_dir(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => (),
                made => made?,
            }
        }
        Ok(())
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
        let incomplete = || format!("{}: cannot finish the directory", destination.display());
        for entry in fs::read_dir(temporary.path()).with_context(incomplete)? {
            let path = entry.with_context(incomplete)?.path();
            File::open(&path).and_then(|file| file.sync_all()).with_context(incomplete)?;
            open_as(temporary.path(), &path).with_context(incomplete)?;
        }
        let parent = destination.parent().context("a directory needs a parent")?;
        let older = temporary.take_place(&destination, parent, replaces)?;
        sync_directory(parent);
        drop(older);
        Ok(destination)
    }
}

/// A directory under a temporary name, known to [`UNFINISHED`].
struct Temporary(PathBuf);

impl Temporary {
    fn new(prefix: &str, parent: &Path) -> std::io::Result<Self> {
        Self::among(&mut unfinished(), prefix, parent)
    }

    fn among(directories: &mut Vec<PathBuf>, prefix: &str, parent: &Path) -> std::io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix);
        // As open as the user's other directories: the system takes away what their umask forbids.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let path = builder.tempdir_in(parent)?.keep();
        directories.push(path.clone());
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// Nobody removes the directory any more.
    fn keep(mut self, directories: &mut Vec<PathBuf>) -> PathBuf {
        let path = std::mem::take(&mut self.0);
        std::mem::forget(self);
        directories.retain(|other| *other != path);
        path
    }

    /// Gives the directory its name, and what had that name a temporary one, which is returned.
    fn take_place(self, destination: &Path, parent: &Path, replaces: bool) -> Result<Option<Self>> {
        let mut directories = unfinished();
        // It is whole now.
        let from = self.keep(&mut directories);
        let failed = || {
            let (to, from) = (destination.display(), from.display());
            format!("{to}: cannot put the finished directory here; it is whole in {from}")
        };
        if !replaces {
            vacant(destination).with_context(failed)?;
        }
        let mut older = None;
        if destination.exists() {
            let aside = Self::among(&mut directories, ".homeroom-old-", parent).with_context(failed)?;
            if let Err(error) = fs::rename(destination, aside.path().join("old")) {
                drop(directories);
                return Err(error).with_context(failed);
            }
            older = Some(aside);
        }
        if let Err(error) = fs::rename(&from, destination) {
            if let Some(aside) = older {
                // The older directory goes back; if even that fails, it stays where the message says.
                let aside = aside.keep(&mut directories);
                let back = fs::rename(aside.join("old"), destination).and_then(|()| fs::remove_dir(&aside));
                back.with_context(|| format!("the older one is in {}", aside.display())).with_context(failed)?;
            }
            return Err(error).with_context(failed);
        }
        Ok(older)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut directories = unfinished();
        directories.retain(|path| path != self.path());
        let _ = fs::remove_dir_all(self.path());
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
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
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

/// Makes a file as open as its directory: some writers make theirs private. A directory in it is one of ours, and stays as it is.
#[cfg(unix)]
fn open_as(directory: &Path, file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if file.is_dir() {
        return Ok(());
    }
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
        assert!(!unfinished().iter().any(|path| path.starts_with(place.path())));
        assert_eq!(fs::read(target.join("a"))?, b"2");
        assert_eq!(fs::read_dir(place.path())?.count(), 1);
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn directories_in_it_can_be_entered() -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let place = tempfile::tempdir()?;
        let started = NewDirectory::start(&place.path().join("out"))?;
        started.subdirectory(Path::new("a/b"))?;
        started.subdirectory(Path::new("a/c"))?;
        started.write("a/b/file", b"1")?;
        let out = started.publish()?;
        for path in ["a", "a/b", "a/c"] {
            assert_eq!(fs::metadata(out.join(path))?.permissions().mode() & 0o700, 0o700, "{path}");
        }
        Ok(())
    }

    #[test]
    fn an_abandoned_directory_goes_with_what_is_in_it_and_cannot_be_written_or_finished() -> Result<()> {
        let place = tempfile::tempdir()?;
        let target = place.path().join("out");
        let started = NewDirectory::start(&target)?;
        started.write("a", b"1")?;
        let mut ours = vec![started.path().to_owned()];
        abandon(&mut ours);
        assert_eq!(fs::read_dir(place.path())?.count(), 0);
        assert!(started.write("b", b"1").is_err());
        assert!(started.subdirectory(Path::new("c/d")).is_err());
        assert!(started.publish().is_err());
        assert_eq!(fs::read_dir(place.path())?.count(), 0);
        Ok(())
    }
}
