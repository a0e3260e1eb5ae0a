//! Ctrl-C: the first one asks a run to end after its step, the second ends the program at once. A conversation and the
//! server have their own ways, and so has a download.

use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Result, anyhow};
use homeroom_engine::files;

use crate::progress::line;

static ASKED: AtomicBool = AtomicBool::new(false);
/// Nothing is being done that would have to be ended.
static IDLE: AtomicBool = AtomicBool::new(false);
/// The program is being ended at once.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Exit code of a run that was interrupted: 128 + SIGINT, as shells have it.
pub const EXIT_CODE: u8 = 130;

/// From now on Ctrl-C (and termination) is an interruption. Directories are renamed into place when whole, so that ending at
/// once leaves nothing half-written.
///
/// # Errors
/// When the signal handler cannot be set.
pub fn listen() -> Result<()> {
    let handler = || {
        if ASKED.swap(true, Ordering::SeqCst) {
            end();
        }
        line(match IDLE.load(Ordering::SeqCst) {
            true => "\ninterrupted: ending",
            false => {
                "\ninterrupted: the run ends after this step and saves what it has; press Ctrl-C again to end at once"
            }
        });
    };
    on_press(handler)
}

/// From now on Ctrl-C (and termination) ends the program, without what it was making.
///
/// # Errors
/// When the signal handler cannot be set.
pub fn end_at_once() -> Result<()> {
    on_press(|| {
        line("\ninterrupted: what was not finished is removed");
        end()
    })
}

/// Ends the program. A directory in the making goes with it.
fn end() -> ! {
    ENDING.store(true, Ordering::SeqCst);
    files::abandon_all();
    std::process::exit(i32::from(EXIT_CODE));
}

type Press = Box<dyn FnMut() + Send>;

/// What Ctrl-C does; `None`: it ends the program.
static PRESS: Mutex<Option<Press>> = Mutex::new(None);

/// From now on Ctrl-C (and termination) calls `press`, in a thread of its own, and no other that was set before.
///
/// # Errors
/// When the signal handler cannot be set.
pub fn on_press(press: impl FnMut() + Send + 'static) -> Result<()> {
    set(Some(Box::new(press))).map(drop)
}

/// Sets what Ctrl-C does, and returns what it did.
fn set(press: Option<Press>) -> Result<Option<Press>> {
    static HANDLED: OnceLock<Result<(), String>> = OnceLock::new();
    let handled = HANDLED.get_or_init(|| {
        let handler = || match PRESS.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(press) => press(),
            None => end(),
        };
        ctrlc::set_handler(handler).map_err(|error| error.to_string())
    });
    handled.as_ref().map_err(|error| anyhow!("cannot listen for Ctrl-C: {error}"))?;
    Ok(std::mem::replace(&mut PRESS.lock().unwrap_or_else(PoisonError::into_inner), press))
}

/// Does work that asks [`asked`] often and ends with [`Interrupted`] then. Ctrl-C is first an interruption of it, and then ends the
/// program; afterwards it does what it did before.
pub fn heeded<T>(work: impl FnOnce() -> T) -> T {
    let before = set(Some(Box::new(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            end();
        }
        line("\ninterrupted: ending; press Ctrl-C again to end at once");
    })));
    let done = work();
    if let Ok(before) = before {
        let _ = set(before);
    }
    done
}

/// The error of work that was interrupted, with what is to be said of it.
#[derive(Debug, Default)]
pub struct Interrupted(pub String);

impl Display for Interrupted {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "interrupted" } else { &self.0 })
    }
}

impl std::error::Error for Interrupted {}

/// Waits for something to do; an interruption has nothing to end meanwhile.
pub fn idly<T>(wait: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::SeqCst);
    let waited = wait();
    IDLE.store(false, Ordering::SeqCst);
    waited
}

/// Whether an interruption was asked for.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Ends what is told how far it is, by a failure.
///
/// # Errors
/// When an interruption was asked for.
pub fn stop_if_asked() -> Result<()> {
    if asked() { Err(Interrupted::default().into()) } else { Ok(()) }
}

/// Does not return while the program is being ended: what fails for it is no failure to report, and the exit code is decided.
pub fn await_end() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}
