//! What accompanies a request on its way: cancellation and a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{EventStream, HandlerError, Kind};

/// Longest wait between two checks of whether the answer is still wanted.
pub const PATIENCE: Duration = Duration::from_millis(50);

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
            return Err(HandlerError::new(Kind::Timeout, "the answer took longer than its time limit"));
        }
        Ok(())
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
