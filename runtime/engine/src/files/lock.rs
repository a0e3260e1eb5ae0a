//! One lock for a directory, so that of two processes that read a file in it, change that and write it back neither undoes what the
//! other did.
//!
//! It is an advisory lock (`flock`) on the file `.lock`, which the system gives up when a process ends, however it ends. The file
//! stays, as one that is removed could be locked twice.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::temporary::leads_to;

/// Name of the file.
const NAME: &str = ".lock";

/// The locks of this process: a thread may take one again that it has, and others of its threads wait as other processes do.
static HELD: Mutex<BTreeMap<PathBuf, Held>> = Mutex::new(BTreeMap::new());
static GIVEN_BACK: Condvar = Condvar::new();

struct Held {
    by: ThreadId,
    depth: usize,
    /// `None` while it is waited for, and where the file system has no locks.
    file: Option<File>,
}

fn held() -> MutexGuard<'static, BTreeMap<PathBuf, Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a lock is waited for.
#[derive(Clone, Copy)]
struct Patience {
    /// Then the wait is told.
    told: Duration,
    /// Then it ends.
    longest: Duration,
}

const PATIENCE: Patience = Patience { told: Duration::from_secs(2), longest: Duration::from_secs(60) };

/// The lock of a directory, held by a thread until it is dropped.
pub struct Lock {
    directory: PathBuf,
    /// It belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl Lock {
    /// Waits for the lock of a directory, at most a minute; `tell` hears of a long wait, and of a file system without locks.
    ///
    /// # Errors
    /// When the directory cannot be written, or another has the lock for longer.
    pub fn take(directory: &Path, tell: &mut dyn FnMut(&str)) -> Result<Self> {
        Self::take_within(directory, PATIENCE, tell)
    }

    fn take_within(directory: &Path, patience: Patience, tell: &mut dyn FnMut(&str)) -> Result<Self> {
        let directory =
            directory.canonicalize().with_context(|| format!("{}: cannot write here", directory.display()))?;
        let mut wait = Wait { directory: &directory, patience, started: Instant::now(), told: false };
        let mut locks = held();
        while let Some(lock) = locks.get_mut(&directory) {
            if lock.by == thread::current().id() {
                lock.depth += 1;
                return Ok(Self { directory, _thread: PhantomData });
            }
            wait.check("another thread of this process", tell)?;
            locks = GIVEN_BACK.wait_timeout(locks, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
        locks.insert(directory.clone(), Held { by: thread::current().id(), depth: 1, file: None });
        drop(locks);
        // From here on a failure gives the place back.
        let lock = Self { directory: directory.clone(), _thread: PhantomData };
        let file = lock_file(&mut wait, tell)?;
        if let Some(held) = held().get_mut(&directory) {
            held.file = file;
        }
        Ok(lock)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut locks = held();
        if let Some(held) = locks.get_mut(&self.directory) {
            held.depth -= 1;
            if held.depth == 0 {
                locks.remove(&self.directory);
                GIVEN_BACK.notify_all();
            }
        }
    }
}

/// How often it is asked whether the lock is free.
const STEP: Duration = Duration::from_millis(10);

struct Wait<'a> {
    directory: &'a Path,
    patience: Patience,
    started: Instant,
    told: bool,
}

impl Wait<'_> {
    fn check(&mut self, who: &str, tell: &mut dyn FnMut(&str)) -> Result<()> {
        let (waited, place) = (self.started.elapsed(), self.directory.display());
        let seconds = self.patience.longest.as_secs();
        if waited > self.patience.longest {
            bail!(
                "{place}: {who} has been writing here for more than {seconds} s\nhint: try again; if it hangs, end it"
            );
        }
        if waited > self.patience.told && !self.told {
            self.told = true;
            tell(&format!("note: {who} is writing in {place}; waiting for it, {seconds} s at most"));
        }
        Ok(())
    }
}

/// Takes the lock that is between processes. `None`: the file system has none.
fn lock_file(wait: &mut Wait<'_>, tell: &mut dyn FnMut(&str)) -> Result<Option<File>> {
    let path = wait.directory.join(NAME);
    let place = || format!("{}: cannot lock", path.display());
    loop {
        let mut file = open(&path).with_context(place)?;
        ensure!(file.metadata().with_context(place)?.is_file(), "{}: it is no file", place());
        match file.try_lock() {
            // Somebody may have removed the file in the meantime, and a third may have locked another one.
            Ok(()) if !leads_to(&path, &file) => {}
            Ok(()) => {
                // Who waits for it can say for whom. A full disk is told by what is written under the lock.
                let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                return Ok(Some(file));
            }
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let _ = file.rewind().and_then(|()| file.take(20).read_to_string(&mut owner));
                let owner = owner.trim();
                let owner = if owner.is_empty() { String::new() } else { format!(" (process {owner})") };
                wait.check(&format!("another homeroom process{owner}"), tell)?;
                thread::sleep(STEP);
            }
            Err(TryLockError::Error(error)) => {
                tell(&format!(
                    "note: {}: its file system has no locks ({error}); let no other homeroom process write there now",
                    wait.directory.display()
                ));
                return Ok(None);
            }
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // No link is followed, and a pipe does not block.
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const SHORT: Patience = Patience { told: Duration::from_millis(50), longest: Duration::from_millis(500) };

    fn quiet() -> impl FnMut(&str) {
        |text: &str| panic!("{text}")
    }

    /// Reads a number, and writes it back one larger.
    fn count(directory: &Path) -> Result<()> {
        let _lock = Lock::take(directory, &mut |_| {})?;
        let path = directory.join("count");
        let number: u32 = std::fs::read_to_string(&path)?.trim().parse()?;
        thread::yield_now();
        Ok(std::fs::write(path, (number + 1).to_string())?)
    }

    #[test]
    #[ignore = "another test starts it"]
    fn counts_in_a_process() {
        let place = std::env::var_os("HOMEROOM_TEST_PLACE").expect("a test starts this one");
        for _ in 0..20 {
            count(Path::new(&place)).expect("it can be counted");
        }
    }

    #[test]
    fn no_count_is_lost_among_threads_and_processes() -> Result<()> {
        let place = tempfile::tempdir()?;
        std::fs::write(place.path().join("count"), "0")?;
        let children = (0..6).map(|_| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["files::lock::tests::counts_in_a_process", "--exact", "--ignored"]);
            Ok(command.env("HOMEROOM_TEST_PLACE", place.path()).stdout(Stdio::null()).spawn()?)
        });
        let children = children.collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|_| count(place.path()).expect("it can be counted")));
            }
        });
        for mut child in children {
            ensure!(child.wait()?.success());
        }
        assert_eq!(std::fs::read_to_string(place.path().join("count"))?, "200");
        Ok(())
    }

    #[test]
    fn a_thread_that_has_it_gets_it_again_and_another_waits_in_words() -> Result<()> {
        let place = tempfile::tempdir()?;
        let outer = Lock::take(place.path(), &mut quiet())?;
        let inner = Lock::take(&place.path().join("."), &mut quiet())?;
        drop(outer);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut told = Vec::new();
                let error = Lock::take_within(place.path(), SHORT, &mut |text| told.push(text.to_owned())).err();
                (told, error.map(|error| error.to_string()))
            });
            let (told, error) = waiting.join().expect("it does not panic");
            assert!(told.len() == 1 && told[0].contains("another thread of this process is writing in"), "{told:?}");
            assert!(error.is_some_and(|error| error.contains("has been writing here for more than")));
        });
        drop(inner);
        Lock::take(place.path(), &mut quiet())?;
        Ok(())
    }

    #[test]
    #[ignore = "another test starts and kills it"]
    fn holds_it_for_ever() {
        let place = std::env::var_os("HOMEROOM_TEST_PLACE").expect("a test starts this one");
        let _lock = Lock::take(Path::new(&place), &mut |_| {}).expect("it is free");
        loop {
            thread::park();
        }
    }

    #[test]
    fn a_process_that_holds_it_is_named_and_one_that_is_killed_gives_it_back() -> Result<()> {
        let place = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["files::lock::tests::holds_it_for_ever", "--exact", "--ignored"]);
        let mut child = command.env("HOMEROOM_TEST_PLACE", place.path()).stdout(Stdio::null()).spawn()?;
        let number = child.id().to_string();
        while std::fs::read_to_string(place.path().join(NAME)).unwrap_or_default().trim() != number {
            ensure!(child.try_wait()?.is_none(), "it ended");
            thread::sleep(STEP);
        }
        let mut told = Vec::new();
        let error = Lock::take_within(place.path(), SHORT, &mut |text| told.push(text.to_owned())).err();
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        let who = format!("another homeroom process (process {number})");
        assert!(told.len() == 1 && told[0].contains(&who) && error.contains(&who), "{told:?} {error}");
        child.kill()?;
        child.wait()?;
        Lock::take(place.path(), &mut quiet())?;
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_its_place_is_not_followed() -> Result<()> {
        let place = tempfile::tempdir()?;
        let theirs = place.path().join("theirs");
        std::fs::write(&theirs, "theirs")?;
        std::os::unix::fs::symlink(&theirs, place.path().join(NAME))?;
        assert!(Lock::take(place.path(), &mut quiet()).is_err());
        assert_eq!(std::fs::read_to_string(theirs)?, "theirs");
        // It failed, and holds nothing.
        std::fs::remove_file(place.path().join(NAME))?;
        Lock::take(place.path(), &mut quiet())?;
        Ok(())
    }
}
