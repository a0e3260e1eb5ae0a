//! What accompanies a request on its way: cancellation, a deadline, time limits of its phases, and whether it may leave this machine.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{EventStream, HandlerError, Kind};

/// Longest wait between two checks of whether the answer is still wanted.
pub const PATIENCE: Duration = Duration::from_millis(50);

/// What is said when a time is over.
const LATE: &str = "the answer took longer than its time limit; try again, or ask for a shorter one";

/// Whether an answer is still wanted. Clones share the same answer.
///
/// Code that waits (for a place in a queue, a token, a provider) calls [`Context::check`] every [`PATIENCE`].
#[derive(Clone, Debug, Default)]
pub struct Context {
    cancelled: Arc<AtomicBool>,
    /// Set to end all answers at once.
    all: Option<Arc<AtomicBool>>,
    deadline: Option<Instant>,
    /// Requests that are before this one, as it waits for a place.
    before: Arc<AtomicUsize>,
    /// It waits behind those of which somebody waits for the answer.
    background: bool,
    /// Most tokens of the answer, whatever is asked for.
    tokens_max: Option<usize>,
    /// Time limits of phases of the answer.
    timers: Vec<Timer>,
    /// The conversation must not leave this machine.
    stays: bool,
}

/// A time limit that is set anew as an answer goes on, by whoever made it. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Timer(Arc<Mutex<Option<(Instant, String)>>>);

impl Timer {
    /// Sets it to end after some time, and what is said then.
    pub fn set(&self, after: Duration, message: impl Into<String>) {
        // A time beyond the clock's range is no limit.
        let end = Instant::now().checked_add(after).map(|end| (end, message.into()));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    /// Lets any time pass.
    pub fn stop(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What is said once its time is over.
    fn over(&self) -> Option<String> {
        let end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        end.as_ref().filter(|(end, _)| Instant::now() >= *end).map(|(_, message)| message.clone())
    }
}

impl Context {
    /// Returns the same context, which is also cancelled when `all` is set.
    pub fn or_with(self, all: Arc<AtomicBool>) -> Self {
        Self { all: Some(all), ..self }
    }

    /// Returns the same context with a deadline, if that is earlier than the one it has.
    pub fn within(&self, time: Duration) -> Self {
        // A time beyond the clock's range is no deadline.
        let deadline = [Instant::now().checked_add(time), self.deadline].into_iter().flatten().min();
        Self { deadline, ..self.clone() }
    }

    /// Returns the same context, which is cancelled with another.
    pub fn cancelled_with(self, other: &Self) -> Self {
        Self { cancelled: other.cancelled.clone(), ..self }
    }

    /// Returns the same context, which also ends when the time of a timer is over.
    pub fn timed(&self, timer: &Timer) -> Self {
        let mut timed = self.clone();
        timed.timers.push(timer.clone());
        timed
    }

    /// Returns the same context, of a conversation that must not leave this machine. Handlers check it where they make a socket.
    pub fn staying(&self) -> Self {
        Self { stays: true, ..self.clone() }
    }

    /// Returns true if the conversation must not leave this machine.
    pub fn stays(&self) -> bool {
        self.stays
    }

    /// The time until the deadline, if there is one.
    pub fn left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Waits for some time, as long as the answer is wanted.
    ///
    /// # Errors
    /// As [`Context::check`].
    pub fn sleep(&self, time: Duration) -> Result<(), HandlerError> {
        let start = Instant::now();
        loop {
            self.check()?;
            let left = time.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(PATIENCE));
        }
    }

    /// Returns the same context, of work that waits behind that of others.
    pub fn in_background(&self) -> Self {
        Self { background: true, ..self.clone() }
    }

    /// Returns true if the work waits behind that of others.
    pub fn is_background(&self) -> bool {
        self.background
    }

    /// Returns the same context, of an answer that ends after so many tokens at the latest.
    pub fn at_most(&self, tokens: usize) -> Self {
        Self { tokens_max: Some(self.tokens_max.unwrap_or(tokens).min(tokens)), ..self.clone() }
    }

    /// Returns the longest answer: what is asked for, if less is not all that may be given.
    pub fn tokens(&self, asked: Option<usize>) -> Option<usize> {
        [asked, self.tokens_max].into_iter().flatten().min()
    }

    /// Notes how many requests are before this one in a queue, for whoever tells the client.
    pub fn wait_behind(&self, before: usize) {
        self.before.store(before, Ordering::Relaxed);
    }

    /// Returns how many requests are before this one in a queue; 0: it does not wait in one.
    pub fn before(&self) -> usize {
        self.before.load(Ordering::Relaxed)
    }

    /// Asks the handler to stop. It does so between two tokens, between two pieces of a prompt, and in every wait.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether nobody waits for the answer any more.
    pub fn cancelled(&self) -> bool {
        let all = self.all.as_ref().is_some_and(|all| all.load(Ordering::SeqCst));
        all || self.cancelled.load(Ordering::SeqCst)
    }

    /// Returns an error if work on the answer should stop.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] when it was cancelled, [`Kind::Timeout`] after the deadline.
    pub fn check(&self) -> Result<(), HandlerError> {
        if self.cancelled() {
            return Err(HandlerError::new(Kind::Cancelled, "the answer was cancelled"));
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(HandlerError::new(Kind::Timeout, LATE));
        }
        match self.timers.iter().find_map(Timer::over) {
            Some(limit) => Err(HandlerError::new(Kind::Timeout, LATE).with_detail(limit)),
            None => Ok(()),
        }
    }

    /// Returns the stream, which ends in an error between two events when [`Context::check`] fails.
    pub fn watch(&self, mut stream: EventStream) -> EventStream {
        let context = self.clone();
        let mut over = false;
        Box::new(std::iter::from_fn(move || {
            if over {
                return None;
            }
            match context.check() {
                Ok(()) => stream.next(),
                Err(gone) => {
                    over = true;
                    Some(Err(gone))
                }
            }
        }))
    }
}
