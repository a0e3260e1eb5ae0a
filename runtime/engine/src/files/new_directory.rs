//! Writes a directory so that it is there whole or not at all.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

use super::exchange::{self, Older};
use super::sync::sync_directory;
use super::vacant::vacant;
use super::{litter, modes, temporary};

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
        modes::make_directory(parent)?;
        litter::sweep(parent);
        ensure!(
            !is_mount_point(&destination, parent),
            "{}: a mount point, which cannot be replaced by a finished directory; name a directory in it",
            destination.display()
        );
        let temporary = Temporary::new(parent);
        let temporary = temporary.with_context(|| format!("{}: cannot write here", parent.display()))?;
        Ok(Self { temporary, destination, replaces: true })
    }

    /// Writes a file and has it on the disk.
    ///
    /// # Errors
    /// When the disk is full, or anything else fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.temporary.path().join(name);
        let write = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().with_context(|| self.cannot_write(name))
    }

    /// What to say when a file cannot be written, as on a full disk.
    pub fn cannot_write(&self, name: &str) -> String {
        let kept = if fs::symlink_metadata(&self.destination).is_ok() { "; what is there already stays" } else { "" };
        format!("{}: cannot write {name}{kept}", self.destination.display())
    }

    /// Creates a directory in it, given as a relative path, and those above it. Unlike `create_dir_all` it does not make an abandoned
    /// directory anew.
    ///
    /// # Errors
    /// When that fails.
    pub fn subdirectory(&self, relative: &Path) -> io::Result<()> {
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

    /// Gives the directory its name, in place of an older one if there is one. Whoever is killed meanwhile leaves either there.
    ///
    /// # Errors
    /// When it cannot get its name, or that is taken and it must not replace what has it. What had the name is then still there,
    /// and so is the finished directory, under a name beside it: the message says which.
    pub fn publish(self) -> Result<PathBuf> {
        self.publish_or(&|| None)
    }

    /// As [`NewDirectory::publish`]; a name that is taken meanwhile is given up for `another`, of a place beside it, as long as there is
    /// one.
    ///
    /// # Errors
    /// As [`NewDirectory::publish`].
    pub fn publish_or(self, another: &dyn Fn() -> Option<PathBuf>) -> Result<PathBuf> {
        let Self { temporary, mut destination, replaces } = self;
        let incomplete = || format!("{}: cannot finish the directory", destination.display());
        finish(temporary.path(), modes::directory_mode(&destination)).with_context(incomplete)?;
        let parent = destination.parent().context("a directory needs a parent")?.to_owned();
        let older = temporary.take_place(&mut destination, replaces, another)?;
        sync_directory(&parent);
        drop(older);
        Ok(destination)
    }
}

/// Has a directory and all below it on the disk, and as open as it is to be: some writers make their files private, others leave
/// them open to everybody.
fn finish(directory: &Path, mode: u32) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            finish(&path, mode)?;
        } else if entry.file_type()?.is_file() {
            File::open(&path)?.sync_all()?;
            // What is made to be run can be run by whoever may read it.
            let runs = if modes::is_program(&path)? { mode & 0o111 } else { 0 };
            modes::set_mode(&path, mode & 0o666 | runs)?;
        }
    }
    sync_directory(directory);
    modes::set_mode(directory, mode)
}

/// A directory under a temporary name, known to [`UNFINISHED`].
struct Temporary {
    path: PathBuf,
    /// The lock that says that this process lives, where there are such.
    alive: Option<File>,
}

impl Temporary {
    fn new(parent: &Path) -> io::Result<Self> {
        let mut directories = unfinished();
        let (path, alive) = temporary::claim(temporary::PREFIX, parent)?;
        Ok(Self::known(&mut directories, path, alive))
    }

    fn known(directories: &mut Vec<PathBuf>, path: PathBuf, alive: Option<File>) -> Self {
        directories.push(path.clone());
        Self { path, alive }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// Nobody removes the directory any more, as long as the lock is held that is returned.
    fn keep(mut self, directories: &mut Vec<PathBuf>) -> (PathBuf, Option<File>) {
        let kept = (std::mem::take(&mut self.path), self.alive.take());
        std::mem::forget(self);
        directories.retain(|other| *other != kept.0);
        kept
    }

    /// Gives the directory its name, and what had that name a temporary one, which is returned.
    fn take_place(
        self,
        destination: &mut PathBuf,
        replaces: bool,
        another: &dyn Fn() -> Option<PathBuf>,
    ) -> Result<Option<Self>> {
        let mut directories = unfinished();
        // It is whole now.
        let (from, _alive) = self.keep(&mut directories);
        let mut given = give_name(&from, destination, replaces);
        // Where the name is free still, it is not for want of one.
        while let (Err(_), Some(other)) = (&given, another().filter(|other| other != destination)) {
            *destination = other;
            given = give_name(&from, destination, replaces);
        }
        match given {
            Ok(older) => Ok(older.map(|(path, alive)| Self::known(&mut directories, path, alive))),
            Err(error) => {
                let kept = keep_beside(&from, destination);
                Err(error.context(Kept { wanted: destination.to_owned(), kept }))
            }
        }
    }
}

/// A finished directory that could not get its name, and where it is whole. What [`NewDirectory::publish`] fails with then.
#[derive(Debug)]
pub struct Kept {
    wanted: PathBuf,
    /// Where it is.
    pub kept: PathBuf,
}

impl std::fmt::Display for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (wanted, kept) = (self.wanted.display(), self.kept.display());
        write!(f, "{wanted}: cannot put the finished directory here; it is whole in {kept}")
    }
}

fn give_name(from: &Path, destination: &Path, replaces: bool) -> Result<Older> {
    if replaces {
        return Ok(exchange::replace(from, destination)?);
    }
    vacant(destination)?;
    // What came to be there since is not replaced: only an empty directory is, and a link to one.
    match fs::rename(from, destination) {
        Err(_) if destination.is_symlink() => Ok(exchange::replace(from, destination)?),
        renamed => Ok(renamed.map(|()| None)?),
    }
}

/// Gives a finished directory that cannot have its name one like it, as under its temporary name it would be litter.
fn keep_beside(from: &Path, destination: &Path) -> PathBuf {
    let name = destination.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names =
        (1..1000).map(|number| if number == 1 { format!("{name}.kept") } else { format!("{name}.kept-{number}") });
    // A name that is too long already gets no longer.
    let others = (1..1000).map(|number| format!("homeroom-kept-{number}"));
    let free = |path: &PathBuf| fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let mut free = names.chain(others).map(|name| destination.with_file_name(name)).filter(free);
    free.find(|kept| fs::rename(from, kept).is_ok()).unwrap_or_else(|| from.to_owned())
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut directories = unfinished();
        directories.retain(|path| path != self.path());
        let _ = remove(self.path());
    }
}

/// The temporary names of all directories in the making. They get theirs, and lose it, with this held: whoever holds it sees none
/// that is neither here nor finished.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

pub(super) fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every directory in the making, for a program that ends at once. From now on no other is begun or finished: whoever
/// tries to waits for the end.
pub fn abandon_all() {
    let mut directories = unfinished();
    abandon(&mut directories);
    std::mem::forget(directories);
}

/// Removes directories in the making.
pub(super) fn abandon(directories: &mut Vec<PathBuf>) {
    for path in directories.drain(..) {
        // Under another name first, so that its writers find it no more; a file that they were just opening may still appear.
        let aside = path.with_extension(temporary::ENDED);
        if fs::rename(&path, &aside).is_ok() {
            while remove(&aside).is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty) {}
        }
    }
}

/// Removes whatever has the name: a directory with what is in it, a file, or a link.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
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
