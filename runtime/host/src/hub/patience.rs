//! How long is waited for the hub, and how often something is tried again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::interrupt::{self, Interrupted};

/// How long is waited for the hub.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest silence on a connection. In ten times that, an answer that is not a file has to be there.
    pub silence: Duration,
    /// Bytes that a connection brings in that time at least.
    pub bytes_min: u64,
    /// Pause before something is tried again; it doubles with each time that brought nothing.
    pub pause: Duration,
    /// Longest pause of those.
    pub pause_max: Duration,
    /// Times in a row that may bring nothing new.
    pub tries: u32,
    /// Longest pause that a server may ask for (`Retry-After`).
    pub asked_max: Duration,
    /// Requests for one file, however much each brings.
    pub requests_max: u32,
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
    /// It will not.
    Final(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// The tries of one thing.
pub(super) struct Tries {
    patience: Patience,
    fruitless: u32,
    requests: u32,
}

impl Tries {
    pub(super) fn new(patience: Patience) -> Self {
        Self { patience, fruitless: 0, requests: 0 }
    }

    /// Waits before something is tried again. `got_on`: the last time brought something new, so that patience begins anew. `say` is
    /// told of a long wait.
    ///
    /// # Errors
    /// When patience is at its end, the server asks for more of it than there is, or Ctrl-C was pressed.
    pub(super) fn wait(
        &mut self,
        subject: &str,
        what: &str,
        after: Option<Duration>,
        got_on: bool,
        stop: &Stop,
        say: impl FnOnce(String),
    ) -> Result<()> {
        let Patience { pause, pause_max, tries, asked_max, requests_max, .. } = self.patience;
        self.requests += 1;
        self.fruitless = if got_on { 0 } else { self.fruitless + 1 };
        stop.check()?;
        if self.fruitless >= tries || self.requests >= requests_max {
            let times = if self.requests == 1 { "once".to_owned() } else { format!("{} times", self.requests) };
            return Err(anyhow!("{subject}: {what} (tried {times})\nhint: try again later; what has come is kept"));
        }
        if let Some(asked) = after.filter(|asked| *asked > asked_max) {
            let minutes = asked.as_secs().div_ceil(60);
            return Err(anyhow!("{subject}: {what}, and asks to wait {minutes} minutes\nhint: try again then"));
        }
        let doubled = pause.saturating_mul(1 << self.fruitless.saturating_sub(1).min(16)).min(pause_max);
        let wait = match after {
            Some(asked) => asked.max(pause),
            None if got_on => Duration::ZERO,
            None => doubled,
        };
        if !wait.is_zero() {
            say(format!("note: {subject}: {what}; tried again in {:.0} s", wait.as_secs_f64().max(1.0)));
        }
        stop.sleep(wait)
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
