//! How long is waited for the hub, and how often something is tried again.

use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::interrupt::{self, Interrupted};

/// How long is waited for the hub.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest silence on a connection.
    pub silence: Duration,
    /// Bytes that a connection brings in that time at least.
    pub bytes_min: u64,
    /// Pause before something is tried again; it doubles with each time that brought nothing.
    pub pause: Duration,
    /// Longest pause of those.
    pub pause_max: Duration,
    /// Times in a row that may bring nothing new.
    pub tries: u32,
    /// Longest pause that a server may ask for (`Retry-After`), all of one thing together.
    pub asked_max: Duration,
    /// Requests for one file, however much each brings.
    pub requests_max: u32,
    /// Longest time for an answer that is not a file, over all tries, besides what the server asks to wait.
    pub answer_max: Duration,
    /// Then it is said that nothing comes.
    pub told_after: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            silence: Duration::from_secs(30),
            bytes_min: 1024,
            pause: Duration::from_secs(1),
            pause_max: Duration::from_secs(30),
            tries: 6,
            asked_max: Duration::from_secs(300),
            requests_max: 1000,
            answer_max: Duration::from_secs(120),
            told_after: Duration::from_secs(10),
        }
    }
}

/// What did not work.
pub(super) enum Failure {
    /// It may work later.
    Passing {
        /// What happened, in words.
        what: String,
        /// How long the server asks to wait.
        after: Option<Duration>,
    },
    /// There is no connection. Before anything came that is most often a network that is not there, which does not come in seconds.
    Unreachable {
        /// What could not be reached, as messages name it.
        host: String,
        /// Why, in words.
        what: String,
    },
    /// It will not.
    Final(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// There is no connection, and nothing came before.
#[derive(Debug)]
pub(super) struct NoConnection {
    pub(super) host: String,
    pub(super) what: String,
}

impl Display for NoConnection {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "no connection to {}: {}", self.host, self.what)
    }
}

impl std::error::Error for NoConnection {}

/// Tries where nothing can be reached and nothing came before.
const FIRST_TRIES: u32 = 2;

/// The tries of one thing.
pub(super) struct Tries {
    patience: Patience,
    fruitless: u32,
    requests: u32,
    /// How long the server asked to wait so far.
    asked: Duration,
    /// When it has to be there.
    until: Option<Instant>,
    /// Something is here to go on from.
    is_begun: bool,
}

impl Tries {
    /// The tries of a file, of which something may be here.
    pub(super) fn of_file(patience: Patience, is_begun: bool) -> Self {
        Self { patience, fruitless: 0, requests: 0, asked: Duration::ZERO, until: None, is_begun }
    }

    /// The tries of an answer that has to come in one piece.
    pub(super) fn of_answer(patience: Patience) -> Self {
        Self { until: Some(Instant::now() + patience.answer_max), ..Self::of_file(patience, false) }
    }

    /// When it has to be there.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Waits before something is tried again. `got_on`: the last time brought something new, so that patience begins anew. `is_first`: no
    /// server has answered yet. `say` is told of a long wait.
    ///
    /// # Errors
    /// When it cannot work, patience is at its end, the server asks for more of it than there is, or Ctrl-C was pressed.
    pub(super) fn wait(
        &mut self,
        subject: &str,
        failure: Failure,
        got_on: bool,
        is_first: bool,
        stop: &Stop,
        say: impl FnOnce(String),
    ) -> Result<()> {
        let Patience { pause, pause_max, tries, asked_max, requests_max, .. } = self.patience;
        self.requests += 1;
        self.fruitless = if got_on { 0 } else { self.fruitless + 1 };
        self.is_begun |= got_on;
        stop.check()?;
        let (what, after, is_gone) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { what, after } => (what, after, false),
            Failure::Unreachable { host, what } if is_first && !self.is_begun && self.fruitless >= FIRST_TRIES => {
                return Err(NoConnection { host, what }.into());
            }
            Failure::Unreachable { host, what } => (format!("no connection to {host}: {what}"), None, true),
        };
        let is_late = self.until.is_some_and(|until| Instant::now() >= until);
        if self.fruitless >= tries || self.requests >= requests_max || is_late {
            let times = if self.requests == 1 { "once".to_owned() } else { format!("{} times", self.requests) };
            let kept = if self.is_begun { "; what has come is kept" } else { "" };
            return Err(anyhow!("{subject}: {what} (tried {times})\nhint: try again later{kept}"));
        }
        if let Some(asked) = after {
            if asked > asked_max {
                let minutes = asked.as_secs().div_ceil(60);
                return Err(anyhow!("{subject}: {what}, and asks to wait {minutes} minutes\nhint: try again then"));
            }
            self.asked += asked;
            if self.asked > asked_max {
                return Err(anyhow!("{subject}: {what}, again and again\nhint: try again later"));
            }
            self.until = self.until.map(|until| until + asked);
        }
        let doubled = pause.saturating_mul(1 << self.fruitless.saturating_sub(1).min(16)).min(pause_max);
        let wait = match after {
            Some(asked) => asked.max(pause),
            None if got_on && !is_gone => Duration::ZERO,
            None => doubled,
        };
        if !wait.is_zero() {
            say(format!("note: {subject}: {what}; trying again in {:.0} s", wait.as_secs_f64().max(1.0)));
        }
        stop.sleep(wait)
    }
}

/// When something came last, to say that nothing comes.
#[derive(Default)]
pub(super) struct Silence {
    state: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Requests and answers that are waited for, and whom they are of.
    hosts: Vec<String>,
    since: Option<Instant>,
    is_told: bool,
}

impl Silence {
    /// Something of a host is waited for until what is returned is dropped.
    pub(super) fn begin(&self, host: &str) -> Awaited<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.hosts.is_empty() {
            (state.since, state.is_told) = (Some(Instant::now()), false);
        }
        state.hosts.push(host.to_owned());
        Awaited { silence: self, host: host.to_owned() }
    }

    /// The host of which nothing came for so long; once each time.
    pub(super) fn lasts(&self, long: Duration) -> Option<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let host = state.hosts.last()?.clone();
        if state.is_told || state.since?.elapsed() < long {
            return None;
        }
        state.is_told = true;
        Some(host)
    }
}

/// What is waited for.
pub(super) struct Awaited<'a> {
    silence: &'a Silence,
    host: String,
}

impl Awaited<'_> {
    /// Something came.
    pub(super) fn came(&self) {
        let mut state = self.silence.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.since, state.is_told) = (Some(Instant::now()), false);
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        let mut state = self.silence.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = state.hosts.iter().position(|host| *host == self.host) {
            state.hosts.remove(at);
        }
    }
}

/// Whether work goes on: not after Ctrl-C, nor when another part of it has failed.
#[derive(Default)]
pub(super) struct Stop {
    set: AtomicBool,
    full: AtomicBool,
}

impl Stop {
    /// Has all parts end.
    pub(super) fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst) || interrupt::asked()
    }

    /// The disk is full: what is not finished is not kept.
    pub(super) fn set_full(&self) {
        self.full.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// # Errors
    /// When work does not go on.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_set() { Err(Interrupted::default().into()) } else { Ok(()) }
    }

    /// Sleeps while work goes on.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn sleep(&self, time: Duration) -> Result<()> {
        const STEP: Duration = Duration::from_millis(50);
        let until = Instant::now() + time;
        loop {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(STEP));
        }
    }
}
