//! Whether others than its owner could have written a file: by its own mode, or by putting another in its place.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Opens a file once and checks what was opened, and all directories on the way to it. What is read from it is what was
/// checked.
///
/// # Errors
/// When it cannot be read, is no file, or others may write it or replace it.
#[cfg(unix)]
pub fn open(path: &Path) -> Result<File> {
    let file = open_unchecked(path)?;
    check(path, &file.metadata().context("cannot read")?)?;
    check_directories(path)?;
    Ok(file)
}

/// Opens a file, whoever may write it.
///
/// # Errors
/// When it cannot be read, or is no file.
#[cfg(unix)]
pub fn open_unchecked(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    // A pipe would block until somebody writes to it.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).context("cannot read")?;
    ensure!(file.metadata().context("cannot read")?.is_file(), "not a file");
    Ok(file)
}

/// Checks every directory that is passed on the way to a path: those that links lead through as well.
///
/// # Errors
/// When others may write one of them.
#[cfg(unix)]
pub fn check_directories(path: &Path) -> Result<()> {
    /// As many as Linux follows.
    const LINKS_MAX: usize = 40;
    let parts = |path: &Path| -> Vec<OsString> { path.iter().rev().map(Into::into).collect() };
    let (mut at, mut links) = (PathBuf::new(), 0);
    let mut left = parts(&std::path::absolute(path).context("cannot read")?);
    while let Some(part) = left.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(part);
        let meta = next.symlink_metadata().with_context(|| format!("{}: cannot read", next.display()))?;
        if meta.is_symlink() {
            links += 1;
            ensure!(links <= LINKS_MAX, "too many links lead to it");
            left.extend(parts(&next.read_link().context("cannot read")?));
            continue;
        }
        if meta.is_dir() {
            check(&next, &meta)?;
        }
        at = next;
    }
    Ok(())
}

/// Opens a file. Modes say little here; its directory's access list is the user's to keep.
///
/// # Errors
/// When it cannot be read, or is no file.
#[cfg(not(unix))]
pub fn open_unchecked(path: &Path) -> Result<File> {
    let file = File::open(path).context("cannot read")?;
    ensure!(file.metadata().context("cannot read")?.is_file(), "not a file");
    Ok(file)
}

/// As [`open_unchecked`].
///
/// # Errors
/// As that.
#[cfg(not(unix))]
pub fn open(path: &Path) -> Result<File> {
    open_unchecked(path)
}

/// Finds nothing.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn check_directories(_: &Path) -> Result<()> {
    Ok(())
}

#[cfg(unix)]
fn check(path: &Path, meta: &Metadata) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    // In a directory such as /tmp nobody can replace what another put there.
    if meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o1000 != 0 {
        return Ok(());
    }
    let what = if meta.is_dir() { format!("its directory {}: ", path.display()) } else { String::new() };
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    ensure!(
        meta.uid() == user || meta.uid() == 0,
        "{what}it belongs to another user (uid {}); copy the library",
        meta.uid()
    );
    let name = path.display();
    ensure!(meta.mode() & 0o002 == 0, "{what}everybody may write it; run `chmod o-w {name}`");
    // Many systems give each user a group of the same number, which nobody else is in.
    let private_group = meta.gid() == meta.uid();
    // On Debian /usr/local is root's and writable by `staff`. Numbers below 100 are the distribution's, and only root puts
    // users into such a group. Elsewhere one of them may be everybody's.
    let of_system = cfg!(target_os = "linux") && meta.is_dir() && meta.uid() == 0 && meta.gid() < 100;
    ensure!(
        meta.mode() & 0o020 == 0 || private_group || of_system,
        "{what}its group may write it; run `chmod g-w {name}`"
    );
    Ok(())
}

/// Whether two files have the same owner.
pub fn same_owner(a: &Metadata, b: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        a.uid() == b.uid()
    }
    #[cfg(not(unix))]
    {
        let _ = (a, b);
        true
    }
}
