//! The time of a script: what its Lua and its work on datasets take. It stands still while a verb trains, loads or answers, and
//! while the reader of what it prints is slow.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const RUNNING: u8 = 0;
const CANCELLED: u8 = 1;
const EXPIRED: u8 = 2;

/// Time that a script has spent, and whether it is to end.
pub struct Clock {
    start: Instant,
    spent_us: AtomicU64,
    /// Since when the script runs, in microseconds after `start`, plus 1; 0: it does not.
    since_us: AtomicU64,
    /// Verbs that are at work: they end where they can, and nobody ends the program for them.
    verbs: AtomicU16,
    state: AtomicU8,
    budget: Duration,
    /// Whether the script is to say where it is.
    asked: AtomicBool,
    /// `FILE:LINE: ` of where it was when it said so last.
    place: Mutex<String>,
}

/// Why a script gets no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The user wants it to end.
    Cancelled,
    /// It has used up its time, which is this much.
    Expired(Duration),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled => f.write_str("interrupted"),
            Self::Expired(budget) => write!(
                f,
                "the script has used its {} of Lua time\nhint: `lua_seconds` in [pipeline] allows more",
                words(*budget)
            ),
        }
    }
}

impl std::error::Error for Ended {}

/// Sets a clock back to what it did, when dropped.
pub struct Turned<'a> {
    clock: &'a Clock,
    /// Whether it is to run again; `None`: it was not turned.
    runs: Option<bool>,
    is_verb: bool,
}

impl Clock {
    /// A clock that stands still, for a script that may take `budget`.
    pub fn new(budget: Duration) -> Self {
        let (spent_us, since_us, verbs, state) = Default::default();
        let (asked, place) = Default::default();
        Self { start: Instant::now(), spent_us, since_us, verbs, state, budget, asked, place }
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64 + 1
    }

    fn set(&self, run: bool) {
        let since = self.since_us.swap(if run { self.now_us() } else { 0 }, Ordering::SeqCst);
        if since > 0 {
            self.spent_us.fetch_add(self.now_us() - since, Ordering::SeqCst);
        }
    }

    fn turn(&self, run: bool, is_verb: bool) -> Turned<'_> {
        self.verbs.fetch_add(u16::from(is_verb), Ordering::SeqCst);
        let runs = self.since_us.load(Ordering::SeqCst) > 0;
        if runs != run {
            self.set(run);
        }
        Turned { clock: self, runs: (runs != run).then_some(runs), is_verb }
    }

    /// The clock stands still until the guard is dropped: a verb works, and ends where it can.
    pub fn pause(&self) -> Turned<'_> {
        self.turn(false, true)
    }

    /// The clock stands still until the guard is dropped: something is written, and its reader may be slow.
    pub fn wait(&self) -> Turned<'_> {
        self.turn(false, false)
    }

    /// The clock runs until the guard is dropped: a script's function is called.
    pub fn resume(&self) -> Turned<'_> {
        self.turn(true, false)
    }

    /// Whether the script is to end because the user wants it to.
    pub fn cancelled(&self) -> bool {
        self.state.load(Ordering::Relaxed) == CANCELLED
    }

    /// Whether the script is to end.
    pub fn ended(&self) -> Option<Ended> {
        match self.state.load(Ordering::Relaxed) {
            RUNNING => None,
            CANCELLED => Some(Ended::Cancelled),
            _ => Some(Ended::Expired(self.budget)),
        }
    }

    /// Refuses to go on with a script that is to end.
    ///
    /// # Errors
    /// When it was cancelled, or has used up its time.
    pub fn check(&self) -> Result<(), Ended> {
        self.ended().map_or(Ok(()), Err)
    }

    /// Whether a verb works, which a script that is to end waits for.
    pub fn in_verb(&self) -> bool {
        // A callback of a verb is the script's again.
        self.verbs.load(Ordering::SeqCst) > 0 && self.since_us.load(Ordering::SeqCst) == 0
    }

    /// Whether the script is neither to end nor to say where it is.
    pub fn is_quiet(&self) -> bool {
        self.state.load(Ordering::Relaxed) == RUNNING && !self.asked.load(Ordering::Relaxed)
    }

    /// Whether the script is to say where it is: a machine that is out of memory, or in a function that does not end, cannot.
    pub fn asks(&self) -> bool {
        self.asked.swap(false, Ordering::Relaxed)
    }

    /// Notes where the script is: `FILE:LINE: `.
    pub fn note(&self, place: String) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    /// Where the script was when it was asked last; empty: nowhere yet.
    pub fn place(&self) -> String {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at the time and at the user.
    pub fn watch(&self, cancelled: &dyn Fn() -> bool) {
        self.asked.store(true, Ordering::Relaxed);
        if self.state.load(Ordering::SeqCst) == CANCELLED {
            return;
        }
        let since = self.since_us.load(Ordering::SeqCst);
        let running = if since > 0 { self.now_us().saturating_sub(since) } else { 0 };
        let spent = Duration::from_micros(self.spent_us.load(Ordering::SeqCst) + running);
        if cancelled() {
            self.state.store(CANCELLED, Ordering::SeqCst);
        } else if spent > self.budget {
            self.state.store(EXPIRED, Ordering::SeqCst);
        }
    }
}

impl Drop for Turned<'_> {
    fn drop(&mut self) {
        if self.is_verb {
            self.clock.verbs.fetch_sub(1, Ordering::SeqCst);
        }
        if let Some(runs) = self.runs {
            self.clock.set(runs);
        }
    }
}

fn words(time: Duration) -> String {
    match time.as_secs_f64() {
        whole if whole.fract() == 0.0 => format!("{whole} s"),
        part => format!("{part:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_set_back_when_its_guard_is_dropped() {
        let clock = Clock::new(Duration::ZERO);
        let runs = || clock.since_us.load(Ordering::SeqCst) > 0;
        let script = clock.resume();
        assert!(runs() && !clock.in_verb());
        let verb = clock.pause();
        assert!(!runs() && clock.in_verb());
        let callback = clock.resume();
        assert!(runs() && !clock.in_verb());
        let printing = clock.wait();
        assert!(!runs());
        drop(printing);
        drop(callback);
        assert!(!runs() && clock.in_verb());
        drop(verb);
        assert!(runs() && !clock.in_verb());
        std::thread::sleep(Duration::from_millis(2));
        clock.watch(&|| false);
        assert_eq!(clock.ended(), Some(Ended::Expired(Duration::ZERO)));
        clock.watch(&|| true);
        assert_eq!(clock.check(), Err(Ended::Cancelled));
        drop(script);
        assert!(!runs());
    }
}
