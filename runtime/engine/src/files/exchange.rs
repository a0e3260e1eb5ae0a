//! Puts a finished directory in the place of another, so that whoever is killed at any instant leaves either of them there.
//!
//! Linux exchanges two names in one operation (`renameat2`). Elsewhere, and on file systems that cannot, both directories are moved
//! into a third one with a temporary name, which records by where they lie what was to be done; [`finish`] does the rest.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::sync::sync_directory;
use super::temporary;

/// Where, in the third directory, the new one and the older one lie, each under the name that is to be taken.
const NEW: &str = "new";
const OLD: &str = "old";

/// How often it is tried again when another process took or left the name in the meantime.
const TRIES: usize = 100;

/// What the older one, if there was one, has become: a path to be removed, and what keeps others from sweeping it.
pub(super) type Older = Option<(PathBuf, Option<File>)>;

/// Gives `from` the name `to`, whatever has it.
pub(super) fn replace(from: &Path, to: &Path) -> io::Result<Older> {
    replace_with(from, to, exchange)
}

/// As [`replace`] where names cannot be exchanged.
#[cfg(test)]
pub(super) fn replace_by_renaming(from: &Path, to: &Path) -> io::Result<Older> {
    replace_with(from, to, |_, _| Err(ErrorKind::Unsupported.into()))
}

fn replace_with(from: &Path, to: &Path, exchange: fn(&Path, &Path) -> io::Result<()>) -> io::Result<Older> {
    let mut failure = None;
    for _ in 0..TRIES {
        let taken = is_taken(to)?;
        let done = match taken {
            false => fs::rename(from, to).map(|()| None),
            true => match exchange(from, to) {
                Ok(()) => return Ok(Some((from.to_owned(), None))),
                Err(error) if error.kind() == ErrorKind::NotFound => Err(error),
                Err(_) => move_both(from, to),
            },
        };
        match done {
            Ok(older) => return Ok(older),
            // Another process was faster, or went away: what is there now is asked anew.
            Err(error) if from.exists() && (is_taken(to)? != taken || is_raced(&error)) => failure = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(failure.unwrap_or_else(|| ErrorKind::ResourceBusy.into()))
}

fn is_taken(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a rename fails with when the name was taken or left just before.
fn is_raced(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotFound)
}

/// Exchanges two names in one operation.
#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (a, b) = (name(a)?, name(b)?);
    // By its number: not every C library has a function for it.
    // SAFETY: both names end with a zero byte and outlive the call, which keeps neither.
    let failed = unsafe {
        let here = libc::AT_FDCWD;
        libc::syscall(libc::SYS_renameat2, here, a.as_ptr(), here, b.as_ptr(), libc::RENAME_EXCHANGE)
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// As [`exchange`] and the removal of what `to` was, in several operations.
fn move_both(from: &Path, to: &Path) -> io::Result<Older> {
    let named = || io::Error::other("a place needs a parent and a name");
    let (parent, name) = (to.parent().ok_or_else(named)?, to.file_name().ok_or_else(named)?);
    let (aside, alive) = temporary::claim(temporary::PREFIX, parent)?;
    let (new, old) = (aside.join(NEW), aside.join(OLD));
    let moved = || -> io::Result<()> {
        fs::create_dir(&new)?;
        fs::create_dir(&old)?;
        fs::rename(from, new.join(name))?;
        // The record is on the disk before the name is taken away.
        for directory in [&new, &aside, &parent.to_owned()] {
            sync_directory(directory);
        }
        fs::rename(to, old.join(name))?;
        fs::rename(new.join(name), to)
    };
    moved().inspect_err(|_| {
        // Both go back. Where that fails, too, they stay where they are for `finish`.
        let is = |path: &Path| is_taken(path).unwrap_or(true);
        if !is(to) {
            let _ = fs::rename(old.join(name), to);
        }
        let _ = fs::rename(new.join(name), from);
        // The older one is still there if another process had put its own in the place.
        if !is(&new.join(name)) && (is(to) || !is(&old.join(name))) {
            let _ = fs::remove_dir_all(&aside);
        }
    })?;
    Ok(Some((aside, alive)))
}

/// Whether a directory may be one of [`move_both`]'s.
pub(super) fn is_aside(path: &Path) -> bool {
    path.join(NEW).is_dir()
}

/// Finishes what a process that was killed had begun with [`move_both`]: if a name is without a directory, the new one gets it, which
/// was whole before the older one was touched.
pub(super) fn finish(aside: &Path, parent: &Path) {
    for entry in fs::read_dir(aside.join(NEW)).into_iter().flatten().flatten() {
        let place = parent.join(entry.file_name());
        let old = aside.join(OLD).join(entry.file_name());
        if matches!((is_taken(&place), is_taken(&old)), (Ok(false), Ok(true))) {
            let _ = fs::rename(entry.path(), place);
        }
    }
}
