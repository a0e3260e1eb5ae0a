//! The lock of a run: `flock` on the file `lock` in its directory, which the system gives up when the process ends, however it ends.
//! It is tried and never waited for: a run that another process works on is not to be worked on.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::private;
use crate::progress::line;

const NAME: &str = "lock";
/// How often a lock is tried, [`STEP`] apart: who only asks whether it is free has it for an instant.
const TRIES: usize = 20;
const STEP: Duration = Duration::from_millis(10);

/// Takes the lock of a run's directory. `None`: its file system has no locks, which is said.
///
/// # Errors
/// When another process has it, or it cannot be written.
pub fn take(directory: &Path) -> Result<Option<File>> {
    let path = directory.join(NAME);
    let place = || format!("{}: cannot lock", path.display());
    let mut options = private::plain_options();
    options.read(true).write(true).create(true).truncate(false);
    let mut file = options.open(&path).with_context(place)?;
    for _ in 0..TRIES {
        match file.try_lock() {
            Ok(()) => {
                own(&mut file);
                return Ok(Some(file));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(STEP),
            Err(TryLockError::Error(error)) => {
                own(&mut file);
                line(format_args!(
                    "note: {}: its file system has no locks ({error}); let no other homeroom process work on this run",
                    directory.display()
                ));
                return Ok(None);
            }
        }
    }
    let process = process(directory).map(|number| format!(" (process {number})")).unwrap_or_default();
    bail!("another homeroom process{process} is working on it");
}

/// Writes which process has it, so that others can name it. A full disk is told by what is written next.
fn own(file: &mut File) {
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
}

/// The process that has the lock, or had it last.
fn process(directory: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(directory.join(NAME)).ok()?.take(20).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether a process works on the run in a directory.
pub fn is_held(directory: &Path) -> bool {
    let path = directory.join(NAME);
    if !std::fs::symlink_metadata(&path).is_ok_and(|about| about.is_file()) {
        return false;
    }
    let Ok(file) = File::open(&path) else { return false };
    // Shared, so that two who ask at once do not take each other for the run.
    match file.try_lock_shared() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(_)) => process(directory).is_some_and(is_alive),
    }
}

/// Whether there is a process of this number; another may have it by now.
#[cfg(unix)]
fn is_alive(process: u32) -> bool {
    let Ok(process) = i32::try_from(process) else { return false };
    // SAFETY: `kill` takes numbers alone, and signal 0 is sent to nobody: it only asks whether there is somebody.
    let answer = unsafe { libc::kill(process, 0) };
    // One that is another user's may not be sent to, and lives.
    answer == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// Here it is not asked: a run that may live is left alone.
#[cfg(not(unix))]
fn is_alive(_: u32) -> bool {
    true
}
