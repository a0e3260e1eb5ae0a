//! What goes with a request and is not asked of the model: whether anybody waits still, and until when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{EventStream, HandlerError, Kind};

/// How long anything is waited for before it is asked whether the answer is still wanted.
pub const PATIENCE: Duration = Duration::from_millis(50);

/// Whether an answer is still wanted. Clones speak of the same answer.
///
/// Whoever waits (for a place in a queue, a token, a word of a provider) asks [`Context::check`] every [`PATIENCE`].
#[derive(Clone, Debug, Default)]
pub struct Context {
    cancelled: Arc<AtomicBool>,
    /// Set by whoever ends all answers at once.
    all: Option<Arc<AtomicBool>>,
    deadline: Option<Instant>,
}

impl Context {
    /// The same answer, which also ends when `all` is set.
    pub fn or_with(self, all: Arc<AtomicBool>) -> Self {
        Self { all: Some(all), ..self }
    }

    /// The same answer, which must be whole within so long, and within what it was given before.
    pub fn within(&self, time: Duration) -> Self {
        // What lies beyond the clock's range is no limit.
        let deadline = [Instant::now().checked_add(time), self.deadline].into_iter().flatten().min();
        Self { deadline, ..self.clone() }
    }

    /// Asks the handler to stop. It does so between two tokens, between two pieces of a prompt, and in any wait.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether nobody waits for the answer any more.
    pub fn cancelled(&self) -> bool {
        let all = self.all.as_ref().is_some_and(|all| all.load(Ordering::SeqCst));
        all || self.cancelled.load(Ordering::SeqCst)
    }

    /// Whether work on the answer goes on.
    ///
    /// # Errors
    /// [`Kind::Cancelled`] when nobody waits for it, [`Kind::Timeout`] when its time is over.
    pub fn check(&self) -> Result<(), HandlerError> {
        if self.cancelled() {
            return Err(HandlerError::new(Kind::Cancelled, "the answer was stopped"));
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(HandlerError::new(Kind::Timeout, "the answer took longer than it is given"));
        }
        Ok(())
    }

    /// The stream, which ends between two events when work on it does not go on.
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
