//! Directories under temporary names, and what is done with those whose makers were killed.
//!
//! A maker holds a lock on its directory for as long as it lives (`flock`), which the system gives up when a process ends, however it
//! ends. So a directory of such a name, of this user, on which nobody holds a lock is litter. Where a file system has no such locks,
//! nothing is swept.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::exchange;

/// What temporary names of directories begin with; [`RANDOM`] letters and digits follow.
pub(super) const PREFIX: &str = ".homeroom-tmp-";
const RANDOM: usize = 12;
/// What is put behind the name of a directory whose making has ended early.
pub(super) const ENDED: &str = "ended";

/// Makes a directory under a temporary name, which only its owner can enter, and takes the lock on it.
pub(super) fn claim(prefix: &str, parent: &Path) -> io::Result<(PathBuf, Option<File>)> {
    loop {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix).rand_bytes(RANDOM);
        let mut maker = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut maker, 0o700);
        // By itself the library puts the temporary name into its errors, which tells nobody anything.
        let path = builder.make_in(parent, |path| maker.create(path))?.into_temp_path().keep()?;
        let Some(directory) = open_directory(&path).ok().filter(|directory| directory.lock().is_ok()) else {
            return if path.is_dir() { Ok((path, None)) } else { continue };
        };
        // Before it was locked, another process may have taken it for litter.
        if leads_to(&path, &directory) {
            return Ok((path, Some(directory)));
        }
    }
}

/// A temporary name that nothing has, for a directory that is to be litter.
pub(super) fn free_name(parent: &Path) -> io::Result<PathBuf> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).rand_bytes(RANDOM);
    let is_free = |path: &Path| match fs::symlink_metadata(path) {
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    builder.make_in(parent, is_free)?.into_temp_path().keep().map_err(|error| error.error)
}

/// Removes what killed processes of this user left in a directory, and puts in place what they were just putting there.
pub(super) fn sweep(parent: &Path) {
    sweep_those(parent, PREFIX, |_| true);
}

/// Puts in place what killed processes of this user were just putting in a directory, and leaves the rest.
pub(super) fn recover(parent: &Path) {
    sweep_those(parent, PREFIX, exchange::is_aside);
}

/// What temporary names of files begin with.
const FILE_PREFIX: &str = ".homeroom-file-";

/// Makes a private file under a temporary name, by a writer who holds the lock of the directory.
pub(super) fn file(directory: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(FILE_PREFIX).rand_bytes(RANDOM);
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    builder.make_in(directory, |path| options.open(path))
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

fn is_temporary(name: &str, prefix: &str) -> bool {
    let Some(rest) = name.strip_prefix(prefix) else { return false };
    let rest = rest.strip_suffix(ENDED).and_then(|rest| rest.strip_suffix('.')).unwrap_or(rest);
    rest.len() == RANDOM && rest.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Opens a directory itself, not one that a link leads to.
#[cfg(unix)]
fn open_directory(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path)
}

#[cfg(not(unix))]
fn open_directory(_: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(unix)]
fn is_ours(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    fs::symlink_metadata(path).is_ok_and(|meta| meta.uid() == user)
}

#[cfg(not(unix))]
fn is_ours(_: &Path) -> bool {
    false
}

/// Whether a path still leads to what was opened by it.
#[cfg(unix)]
pub(super) fn leads_to(path: &Path, opened: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let at = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let (there, opened) = (fs::symlink_metadata(path).map(at), opened.metadata().map(at));
    matches!((there, opened), (Ok(there), Ok(opened)) if there == opened)
}

#[cfg(not(unix))]
pub(super) fn leads_to(path: &Path, _: &File) -> bool {
    path.exists()
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
