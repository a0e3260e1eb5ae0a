//! Ctrl-C: the first one asks a run to end after its step, the second ends the program at once. A conversation and the
//! server have their own ways.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
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

/// From now on Ctrl-C (and termination) calls `press`, in a thread of its own. Once a process.
///
/// # Errors
/// When the signal handler cannot be set.
pub fn on_press(press: impl FnMut() + Send + 'static) -> Result<()> {
    ctrlc::set_handler(press).context("cannot listen for Ctrl-C")
}

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

/// Does not return while the program is being ended: what fails for it is no failure to report, and the exit code is decided.
pub fn await_end() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}
