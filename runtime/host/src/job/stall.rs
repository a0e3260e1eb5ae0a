//! Says where a training stands when nothing has been heard of it for long: a machine that swaps, or that others use, looks like a
//! program that hangs.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::HumanDuration;
use serde_json::json;

use super::recording::Log;
use crate::progress::line;
use crate::troubles::STUCK;

/// How often is looked, at least four times before anything is said.
const TICK: Duration = Duration::from_secs(5);
/// Nothing is said of less.
const SHORTEST: Duration = Duration::from_secs(60);
/// The environment variable that names another number of seconds.
pub const VARIABLE: &str = "HOMEROOM_STALL_SECONDS";
/// What takes so many times the longest step so far is long.
const TIMES: u32 = 5;

/// What is known of the progress.
struct Progress {
    doing: String,
    since: Instant,
    longest: Duration,
    shortest: Duration,
    /// After so long it is told next.
    told_after: Duration,
}

/// Watches until it is dropped.
pub(super) struct Stall {
    progress: Arc<Mutex<Progress>>,
    /// Dropped, it ends the thread.
    _end: Sender<()>,
}

impl Stall {
    /// Watches over what is done now.
    /// What is said is written to the run's record, too.
    pub(super) fn watch(doing: String, log: Option<Log>) -> Self {
        let set = std::env::var(VARIABLE).ok().and_then(|text| text.trim().parse::<f64>().ok());
        let set = set.filter(|seconds| *seconds > 0.0).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let shortest = set.unwrap_or(SHORTEST);
        let tick = TICK.min(shortest / 4);
        let (since, longest) = (Instant::now(), Duration::ZERO);
        let progress = Progress { doing, since, longest, shortest, told_after: shortest };
        let progress = Arc::new(Mutex::new(progress));
        let (end, ended) = channel();
        let watched = progress.clone();
        thread::spawn(move || {
            while ended.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                let mut progress = watched.lock().unwrap_or_else(PoisonError::into_inner);
                let now = Instant::now();
                let Some(said) = progress.look(now) else { continue };
                let seconds = now.saturating_duration_since(progress.since).as_secs();
                let event = json!({"event": "stalled", "doing": progress.doing, "seconds": seconds});
                drop(progress);
                // The record first: who reads the line and ends the program finds it there.
                log.iter().for_each(|log| log.event(event.clone()));
                line(said);
            }
        });
        Self { progress, _end: end }
    }

    /// One thing is done, and the next begins. `is_step`: how long it took says how long the next should take.
    pub(super) fn next(&self, doing: String, is_step: bool) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if is_step {
            progress.longest = progress.longest.max(now - progress.since);
        }
        (progress.doing, progress.since) = (doing, now);
        progress.told_after = progress.shortest.max(TIMES * progress.longest);
    }
}

impl Progress {
    /// What is to be said now, if anything. It is said again after twice the time.
    fn look(&mut self, now: Instant) -> Option<String> {
        let taken = now.saturating_duration_since(self.since);
        if taken < self.told_after {
            return None;
        }
        self.told_after = 2 * taken;
        let usual = match self.longest {
            Duration::ZERO => String::new(),
            longest => format!(", the longest step so far took {longest:.1?}"),
        };
        Some(format!("note: {} for {}{usual}\n{STUCK}", self.doing, HumanDuration(taken)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_much_longer_than_before_is_said_and_then_more_seldom() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let stall = Stall::watch("in step 1 of 9".to_owned(), None);
        stall.next("in step 2 of 9".to_owned(), true);
        let mut progress = stall.progress.lock().unwrap_or_else(PoisonError::into_inner);
        (progress.since, progress.longest, progress.told_after) =
            (start, Duration::from_secs(30), Duration::from_secs(150));
        assert_eq!(progress.look(at(149)), None);
        let said = progress.look(at(151)).expect("five times as long");
        assert!(
            said.starts_with("note: in step 2 of 9 for 3 minutes, the longest step so far took 30.0s\ncause: "),
            "{said}"
        );
        assert_eq!(progress.look(at(300)), None);
        assert!(progress.look(at(303)).is_some());
    }
}
