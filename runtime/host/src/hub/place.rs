//! Where a repository's files go in the cache, so that Python's programs can use, and fill, the same one at the same time: blobs named
//! by their digests, snapshots of relative links, a lock for each blob, and refs that are written last.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use homeroom_engine::files::{make_directory, open_to_readers};

use super::digest::Digest;
use super::listing::RemoteFile;
use super::patience::Stop;
use super::{cache, stores};

/// Then a wait for another process is told.
const TOLD_AFTER: Duration = Duration::from_secs(1);
/// How often a lock is tried.
const STEP: Duration = Duration::from_millis(100);

/// A repository's folder in a store.
pub(super) struct Place {
    folder: PathBuf,
    locks: PathBuf,
    /// Makes a link, `target` at `at`; tests have file systems without.
    link: fn(&Path, &Path) -> io::Result<()>,
}

/// The lock of a blob; given back when dropped.
pub(super) struct BlobLock {
    _file: File,
    /// Locks exclude nobody on this file system.
    pub(super) is_void: bool,
}

impl Place {
    pub(super) fn new(store: &Path, repo: &str) -> Self {
        let folder = stores::folder(store, repo);
        let locks = store.join(".locks").join(folder.file_name().unwrap_or_default());
        Self { folder, locks, link }
    }

    /// A folder in the making, which nobody else writes.
    pub(super) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), locks: folder.join(".locks"), link }
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(digest.name())
    }

    /// What there is of a blob that is not finished.
    pub(super) fn partial(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(format!("{}.incomplete", digest.name()))
    }

    /// A file's place in a snapshot.
    pub(super) fn pointer(&self, commit: &str, path: &str) -> PathBuf {
        self.snapshot(commit).join(path)
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Refuses a folder whose snapshots lie elsewhere: the links in them are relative, and would lead nowhere.
    pub(super) fn check(&self) -> Result<()> {
        let snapshots = self.folder.join("snapshots");
        if snapshots.is_symlink() {
            bail!("{}: a link, and should be a directory", snapshots.display());
        }
        Ok(())
    }

    /// Makes what a blob is written into.
    pub(super) fn prepare(&self) -> Result<()> {
        make_directory(&self.folder.join("blobs"))
    }

    /// Waits for a blob's lock, which Python takes, too. `say` is told of a wait.
    ///
    /// # Errors
    /// When it cannot be made, or Ctrl-C is pressed.
    pub(super) fn lock(&self, digest: &Digest, stop: &Stop, say: impl FnOnce()) -> Result<BlobLock> {
        make_directory(&self.locks)?;
        let path = self.locks.join(format!("{}.lock", digest.name()));
        let (started, mut say) = (Instant::now(), Some(say));
        loop {
            let file = open_lock(&path).with_context(|| format!("{}: cannot open", path.display()))?;
            match file.try_lock() {
                Ok(()) if !is_still(&file, &path) => continue,
                Ok(()) => {
                    // Other users of a cache that is shared have to open it.
                    let _ = open_to_readers(&path);
                    // Some network file systems grant every lock.
                    let is_void = open_lock(&path).is_ok_and(|second| second.try_lock().is_ok());
                    return Ok(BlobLock { _file: file, is_void });
                }
                Err(TryLockError::WouldBlock) => {
                    if started.elapsed() >= TOLD_AFTER
                        && let Some(say) = say.take()
                    {
                        say();
                    }
                    stop.sleep(STEP)?;
                }
                Err(TryLockError::Error(_)) => return Ok(BlobLock { _file: file, is_void: true }),
            }
        }
    }

    /// Gives a finished file its name among the blobs.
    pub(super) fn publish(&self, partial: &Path, file: &File, digest: &Digest) -> io::Result<()> {
        open_to_readers(partial)?;
        file.sync_all()?;
        fs::rename(partial, self.blob(digest))?;
        sync_directory(&self.folder.join("blobs"))
    }

    /// Whether a snapshot has a file of that size.
    pub(super) fn has(&self, commit: &str, file: &RemoteFile) -> bool {
        is_file_of(&self.pointer(commit, &file.path), file.size)
    }

    /// Whether a blob is there.
    pub(super) fn has_blob(&self, file: &RemoteFile) -> bool {
        is_file_of(&self.blob(&file.digest), file.size)
    }

    /// Puts a file into a snapshot: a relative link to its blob, or where there are no links, as on a memory stick, the file itself.
    /// `is_last`: no other file of the snapshot needs the blob.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn put(&self, commit: &str, file: &RemoteFile, is_last: bool) -> Result<()> {
        let pointer = self.pointer(commit, &file.path);
        let blob = self.blob(&file.digest);
        // What stands there and is not the blob, as another program's link or the file itself, is replaced by a blob that is here.
        let is_blob = || {
            let same = pointer.canonicalize().ok().zip(blob.canonicalize().ok()).is_some_and(|(a, b)| a == b);
            pointer.is_symlink() && same
        };
        if self.has(commit, file) && (!self.has_blob(file) || is_blob()) {
            return Ok(());
        }
        let directory = pointer.parent().context("a file lies in a directory")?;
        make_directory(directory)?;
        let cannot = || format!("{}: cannot write", pointer.display());
        // `snapshots/<commit>/a/b` is as many steps below the folder as its path has parts, and two more.
        let up = "../".repeat(file.path.split('/').count() + 1);
        let target = PathBuf::from(format!("{up}blobs/{}", file.digest.name()));
        let aside = directory.join(format!(".{}.{}.tmp", file.digest.name(), std::process::id()));
        let _ = fs::remove_file(&aside);
        match (self.link)(&target, &aside) {
            Ok(()) => {}
            Err(error) if is_without_links(&error) && is_last => {
                fs::rename(&blob, &pointer).with_context(cannot)?;
                return Ok(());
            }
            Err(error) if is_without_links(&error) => {
                fs::copy(&blob, &aside).with_context(cannot)?;
            }
            Err(error) => return Err(error).with_context(cannot),
        }
        let placed = fs::rename(&aside, &pointer);
        if placed.is_err() {
            let _ = fs::remove_file(&aside);
        }
        placed.with_context(cannot)
    }

    /// Puts a file whose digest nobody knows into a snapshot.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn put_itself(&self, file: &Path, commit: &str, path: &str) -> Result<()> {
        let pointer = self.pointer(commit, path);
        make_directory(pointer.parent().context("a file lies in a directory")?)?;
        fs::rename(file, &pointer).with_context(|| format!("{}: cannot write", pointer.display()))
    }

    /// Writes which commit a branch or tag is. To be called when its snapshot is whole.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn refer(&self, revision: &str, commit: &str) -> Result<()> {
        sync_directory(&self.snapshot(commit)).with_context(|| format!("{}: cannot write", self.folder.display()))?;
        if cache::read_ref(&self.folder, revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        let directory = path.parent().context("a file lies in a directory")?;
        make_directory(directory)?;
        let write = || -> io::Result<()> {
            let mut file = tempfile::Builder::new().prefix(".ref-").tempfile_in(directory)?;
            file.write_all(commit.as_bytes())?;
            open_to_readers(file.path())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            sync_directory(directory)
        };
        write().with_context(|| format!("{}: cannot write", path.display()))
    }

    /// Removes directories in which nothing is.
    pub(super) fn tidy(&self) {
        for part in ["blobs", "snapshots", "refs", ""] {
            let _ = fs::remove_dir(self.folder.join(part));
        }
    }
}

/// Opens the file of a lock, which never has content.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.open(path)
}

/// Whether a lock's file still has its name: who had the lock may have removed it.
#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |about: fs::Metadata| (about.dev(), about.ino());
    matches!((file.metadata().map(id), fs::symlink_metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}

/// Whether a path leads to a regular file of that size.
pub(super) fn is_file_of(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == size)
}

#[cfg(unix)]
fn link(target: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, at)
}

#[cfg(windows)]
fn link(target: &Path, at: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, at)
}

/// Whether the file system, or the user on Windows, has no links.
fn is_without_links(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported)
        || cfg!(windows) && error.raw_os_error() == Some(1314)
}

/// Makes what was renamed in a directory last.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory)?.sync_all() {
        // Some file systems cannot.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        done => done,
    }
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Opens what there is of a blob, or begins it.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub(super) fn open_partial(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).with_context(|| format!("{}: cannot write", path.display()))?;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        bail!("{}: not a regular file", path.display());
    }
    Ok(file)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn file(path: &str) -> Result<RemoteFile> {
        let digest = Digest::git("ce013625030ba8dba906f756967f9e9ca394464a")?;
        Ok(RemoteFile { path: path.to_owned(), size: 6, digest })
    }

    #[test]
    fn where_there_are_no_links_the_file_itself_stands_in_the_snapshot() -> Result<()> {
        let store = tempfile::tempdir()?;
        let without = |_: &Path, _: &Path| Err(io::Error::from_raw_os_error(libc::EPERM));
        let place = Place { link: without, ..Place::new(store.path(), "a/b") };
        place.prepare()?;
        let (first, second) = (file("config.json")?, file("1_Pooling/config.json")?);
        fs::write(place.blob(&first.digest), "hello\n")?;
        place.put(COMMIT, &first, false)?;
        place.put(COMMIT, &second, true)?;
        for file in [&first, &second] {
            let pointer = place.pointer(COMMIT, &file.path);
            assert_eq!(fs::read_to_string(&pointer)?, "hello\n");
            assert!(!pointer.is_symlink() && place.has(COMMIT, file));
        }
        assert!(!place.has_blob(&first), "nothing is there twice for no reason");
        // Again: it is there.
        place.put(COMMIT, &first, true)
    }

    #[test]
    fn a_link_that_leads_nowhere_is_replaced_and_a_directory_is_not() -> Result<()> {
        let store = tempfile::tempdir()?;
        let place = Place::new(store.path(), "a/b");
        place.prepare()?;
        let file = file("config.json")?;
        fs::write(place.blob(&file.digest), "hello\n")?;
        let pointer = place.pointer(COMMIT, &file.path);
        fs::create_dir_all(pointer.parent().expect("a snapshot"))?;
        std::os::unix::fs::symlink("../../blobs/gone", &pointer)?;
        place.put(COMMIT, &file, true)?;
        assert_eq!(fs::read_link(&pointer)?, Path::new("../../blobs").join(file.digest.name()));
        fs::remove_file(&pointer)?;
        fs::create_dir(&pointer)?;
        assert!(place.put(COMMIT, &file, true).is_err());
        assert_eq!(fs::read_dir(pointer.parent().expect("a snapshot"))?.count(), 1, "no temporary file stays");
        Ok(())
    }

    #[test]
    fn a_link_is_not_followed_where_a_file_is_written() -> Result<()> {
        let store = tempfile::tempdir()?;
        let victim = store.path().join("victim");
        fs::write(&victim, "mine")?;
        let partial = store.path().join("x.incomplete");
        std::os::unix::fs::symlink(&victim, &partial)?;
        assert!(open_partial(&partial).is_err());
        assert_eq!(fs::read_to_string(&victim)?, "mine");
        Ok(())
    }

    #[test]
    fn a_ref_is_written_whole() -> Result<()> {
        let store = tempfile::tempdir()?;
        let place = Place::new(store.path(), "a/b");
        fs::create_dir_all(place.snapshot(COMMIT))?;
        place.refer("feature/x", COMMIT)?;
        let refs = place.folder().join("refs/feature");
        assert_eq!(fs::read_to_string(refs.join("x"))?, COMMIT);
        assert_eq!(fs::read_dir(refs)?.count(), 1);
        Ok(())
    }
}
