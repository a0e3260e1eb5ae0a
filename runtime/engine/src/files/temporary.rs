//! Temporary names: of directories in the making, and of files.
//!
//! A maker holds a lock on its directory for as long as it lives (`flock`), which the system gives up when a process ends, however it
//! ends. So a directory of such a name on which nobody holds a lock is litter.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

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

/// What temporary names of files begin with.
pub(super) const FILE_PREFIX: &str = ".homeroom-file-";
/// What those of files begin with that their makers hold the locks of.
pub(super) const CLAIMED_PREFIX: &str = ".homeroom-part-";

/// Makes a private file under a temporary name, by a writer who holds the lock of the directory.
pub(super) fn file(directory: &Path) -> io::Result<NamedTempFile> {
    file_named(FILE_PREFIX, directory)
}

/// Makes a private file under a temporary name that begins so.
pub(super) fn file_named(prefix: &str, directory: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).rand_bytes(RANDOM);
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    builder.make_in(directory, |path| options.open(path))
}

/// Whether a name is a temporary one that begins so.
pub(super) fn is_temporary(name: &str, prefix: &str) -> bool {
    let Some(rest) = name.strip_prefix(prefix) else { return false };
    let rest = rest.strip_suffix(ENDED).and_then(|rest| rest.strip_suffix('.')).unwrap_or(rest);
    rest.len() == RANDOM && rest.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Opens a directory itself, not one that a link leads to.
#[cfg(unix)]
pub(super) fn open_directory(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC).open(path)
}

#[cfg(not(unix))]
pub(super) fn open_directory(_: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
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
