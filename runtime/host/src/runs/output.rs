//! `output.txt`: what a run printed to stderr, as a reader of the terminal saw it, without bars and without what a terminal obeys.
//!
//! [`feed`] hears every line of this process. While a run is open its file gets them; what came before the run has a place to go to
//! is kept, in bounds, and goes first.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::private;

/// Name of the file in a run's directory.
pub const FILE: &str = "output.txt";
/// Most bytes of a run that are kept.
const KEPT_MAX: u64 = 4 << 20;
/// Most bytes that are kept before a run.
const BEFORE_MAX: usize = 64 << 10;

struct Tee {
    /// What was printed since the last run.
    before: String,
    open: Option<Open>,
}

struct Open {
    id: String,
    file: File,
    left: u64,
}

static TEE: Mutex<Tee> = Mutex::new(Tee { before: String::new(), open: None });

fn tee() -> MutexGuard<'static, Tee> {
    TEE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what is printed for the run that is open. Nothing that a terminal would obey is in it.
pub fn feed(text: &str) {
    let mut tee = tee();
    if let Some(open) = &mut tee.open {
        open.write(text);
    } else if tee.before.len() + text.len() <= BEFORE_MAX {
        tee.before += text;
    }
}

impl Open {
    fn write(&mut self, text: &str) {
        if self.left == 0 {
            return;
        }
        self.left = self.left.saturating_sub(text.len() as u64);
        let text = if self.left > 0 { text } else { "(more was printed, which is not kept)\n" };
        // A disk that is full is told by what matters more.
        let _ = self.file.write_all(text.as_bytes());
    }
}

/// From now on what is printed is kept in the directory of a run, behind what is there.
pub(super) fn open(id: &str, directory: &Path) {
    let mut options = private::options();
    options.append(true).create(true);
    let Ok(file) = options.open(directory.join(FILE)) else { return };
    let left = KEPT_MAX.saturating_sub(file.metadata().map_or(0, |about| about.len()));
    let mut tee = tee();
    let mut open = Open { id: id.to_owned(), file, left };
    open.write(&std::mem::take(&mut tee.before));
    tee.open = Some(open);
}

/// A run has ended; what follows is not of it.
pub(super) fn close(id: &str) {
    let mut tee = tee();
    if tee.open.as_ref().is_some_and(|open| open.id == id) {
        tee.open = None;
    }
}
