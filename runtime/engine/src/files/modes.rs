//! Who may read what is written. Below the home nobody but its owner; elsewhere whom the user's umask lets, and to write nobody else.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};

use super::litter;

/// What [`keep_private`] was told.
struct Home {
    path: PathBuf,
    tell: fn(&str),
}

static HOME: OnceLock<Home> = OnceLock::new();
/// The umask of the user, which [`keep_private`] replaces.
static UMASK: OnceLock<u32> = OnceLock::new();
/// Homes that [`prepare`] has looked at.
static PREPARED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Makes everything that this process creates its owner's alone, but for finished directories elsewhere than below `home`, which are
/// as open as the user's umask says. Notes about the home go to `tell`. To be called once, before threads are started.
pub fn keep_private(home: Option<PathBuf>, tell: fn(&str)) {
    UMASK.get_or_init(|| set_umask(0o077));
    if let Some(path) = home.and_then(|home| std::path::absolute(home).ok()) {
        HOME.get_or_init(|| Home { path, tell });
    }
}

#[cfg(unix)]
fn set_umask(umask: u32) -> u32 {
    // SAFETY: umask has no preconditions and cannot fail.
    let before = unsafe { libc::umask(umask as libc::mode_t) };
    before as u32
}

#[cfg(not(unix))]
fn set_umask(_: u32) -> u32 {
    0
}

/// The user's umask. Where [`keep_private`] was not called, it can only be read by setting it; a file that another thread creates
/// meanwhile is private.
fn umask() -> u32 {
    *UMASK.get_or_init(|| {
        let umask = set_umask(0o077);
        set_umask(umask);
        umask
    })
}

/// The home, if a path lies in it.
fn home_of(path: &Path) -> Option<&'static Home> {
    HOME.get().filter(|home| path.starts_with(&home.path))
}

/// Permission bits of a directory that this program makes; those of its files are the same without the right to search.
pub(super) fn directory_mode(path: &Path) -> u32 {
    if home_of(path).is_some() { 0o700 } else { 0o700 | (0o755 & !umask()) }
}

/// Sets permission bits, and leaves those that the system inherits from the directory above. Some file systems, as on a memory stick,
/// have none, and refuse; what this process made is otherwise its own.
#[cfg(unix)]
pub(super) fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let before = fs::metadata(path)?.permissions().mode();
    if before & 0o777 == mode {
        return Ok(());
    }
    match fs::set_permissions(path, fs::Permissions::from_mode(before & 0o7000 | mode)) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        set => set,
    }
}

#[cfg(not(unix))]
pub(super) fn set_mode(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}

/// Whether its owner may run a file.
#[cfg(unix)]
pub(super) fn is_program(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::metadata(path)?.permissions().mode() & 0o100 != 0)
}

#[cfg(not(unix))]
pub(super) fn is_program(_: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Gives a file that this program made the bits that those of its directories have, without the right to search.
///
/// # Errors
/// When the system refuses.
pub fn open_to_readers(file: &Path) -> io::Result<()> {
    set_mode(file, directory_mode(file) & 0o666)
}

/// Creates a directory and those above it that are not there. If it lies in the home, that is looked at first, see [`prepare`].
///
/// # Errors
/// When it cannot be created.
pub fn make_directory(path: &Path) -> Result<()> {
    if let Some(home) = home_of(path) {
        prepare(&home.path, home.tell)?;
    }
    make(path, directory_mode).with_context(|| format!("{}: cannot create", path.display()))
}

fn make(path: &Path, mode: fn(&Path) -> u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => make(parent, mode)?,
        _ => {}
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => set_mode(path, mode(path)),
    }
}

/// Makes the home if it is not there, and what is not there above it, as directories that nobody else can enter, refuses one that others could tamper with, and sweeps
/// what killed runs left in it; once a process.
///
/// # Errors
/// When it cannot be made, belongs to another user, or everybody may write it.
pub fn prepare(home: &Path, tell: fn(&str)) -> Result<()> {
    let home = &std::path::absolute(home)?;
    let mut prepared = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
    if prepared.iter().any(|other| other == home) {
        return Ok(());
    }
    let place = || format!("{}: the home of this program's data", home.display());
    match fs::symlink_metadata(home) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make(home, |_| 0o700).with_context(|| format!("{}: cannot create", home.display()))?;
        }
        Err(error) => return Err(error).with_context(place),
        Ok(_) => {
            let meta = fs::metadata(home).with_context(place)?;
            if !meta.is_dir() {
                bail!("{}: it is not a directory; set HOMEROOM_HOME to one", place());
            }
            check_owner(home, &meta, tell).with_context(place)?;
        }
    }
    ["models", "runs"].iter().for_each(|name| litter::sweep(&home.join(name)));
    runs(home).iter().for_each(|adapters| litter::sweep(adapters));
    prepared.push(home.clone());
    Ok(())
}

/// Where runs of pipelines keep what they trained.
fn runs(home: &Path) -> Vec<PathBuf> {
    let runs = fs::read_dir(home.join("runs")).into_iter().flatten().flatten();
    runs.map(|run| run.path().join("adapters")).collect()
}

#[cfg(unix)]
fn check_owner(home: &Path, meta: &fs::Metadata, tell: fn(&str)) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    // Root may write anywhere, and in containers often does so for the user of the machine outside.
    if user != 0 && meta.uid() != user && meta.uid() != 0 {
        bail!("it belongs to another user (uid {}); set HOMEROOM_HOME to a directory of yours", meta.uid());
    }
    let mode = meta.mode() & 0o777;
    let name = home.display();
    if mode & 0o002 != 0 {
        bail!(
            "everybody may write it (mode {mode:o}); run `chmod go-rwx {name}`, or set HOMEROOM_HOME to a directory of yours"
        );
    }
    if mode & 0o077 != 0 {
        tell(&format!(
            "note: {name} is open to other users (mode {mode:o}); what is new in it is not, and `chmod -R go-rwx {name}` closes the rest"
        ));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_owner(_: &Path, _: &fs::Metadata, _: fn(&str)) -> Result<()> {
    Ok(())
}
