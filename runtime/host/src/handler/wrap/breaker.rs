//! Circuit breaker: a handler that keeps failing is left alone for a while.
//!
//! Closed: requests pass. After so many failures in a row within a window it opens: requests are refused at once, so that a route asks the
//! next handler without waiting for this one. Once the time is over it is half open: one request passes, and what comes of that closes it
//! or opens it again. All requests of a handler share it.
//! Source: Nygard, Release It!, 2nd edition, chapter 5.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Wrapper;
use crate::handler::{
    Context, EmbedRequest, Embeddings, Event, EventStream, Handler, HandlerError, Kind, Request, tally,
};
use crate::progress::line;

/// When a refused request is told to come back while a first one is tried.
const TRYING: Duration = Duration::from_secs(1);

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    /// Failures in a row that open it; at least 1.
    pub failures: usize,
    /// The time within which they have to happen.
    pub window: Duration,
    /// How long it is open.
    pub open: Duration,
}

/// [`Breaker`] around the handler of a name.
pub struct Breaking(Arc<Shared>);

struct Shared {
    name: String,
    breaker: Breaker,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Times of the failures since the last whole answer.
    failed: VecDeque<Instant>,
    /// Set when it is open; half open once that is past.
    open_until: Option<Instant>,
    /// The one request of a half open breaker is under way.
    trying: bool,
}

/// What came of a request, as far as the handler's health is concerned.
enum Outcome {
    Well,
    Failed,
    /// The caller left, or the request was wrong.
    Unknown,
}

impl Breaking {
    /// A breaker that is closed.
    pub fn new(name: impl Into<String>, breaker: Breaker) -> Self {
        let name = name.into();
        // It may take the place of one that was open.
        tally::add(&name, |counts| counts.breaker_is_open = false);
        Self(Arc::new(Shared { name, breaker, state: Mutex::default() }))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request pass, or refuses it.
    fn enter(self: &Arc<Self>) -> Result<Pass, HandlerError> {
        let mut state = self.state();
        let Some(until) = state.open_until else { return Ok(Pass { shared: self.clone(), tries: false, told: false }) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() && !state.trying {
            state.trying = true;
            return Ok(Pass { shared: self.clone(), tries: true, told: false });
        }
        drop(state);
        tally::add(&self.name, |counts| counts.breaker_refused += 1);
        let message = format!("`{}` failed again and again, and is not asked for a while", self.name);
        Err(HandlerError::new(Kind::Overloaded { retry_after: left.max(TRYING) }, message))
    }

    fn tell(&self, tries: bool, outcome: &Outcome) {
        let Breaker { failures, window, open } = self.breaker;
        let mut state = self.state();
        let now = Instant::now();
        let was_open = state.open_until.is_some();
        if tries {
            state.trying = false;
        }
        match outcome {
            Outcome::Unknown => return,
            // One that began before it opened says nothing of now.
            _ if was_open && !tries => return,
            Outcome::Well => {
                state.failed.clear();
                state.open_until = None;
            }
            Outcome::Failed => {
                state.failed.push_back(now);
                state.failed.retain(|failed| now.saturating_duration_since(*failed) <= window);
                if tries || state.failed.len() >= failures {
                    state.failed.clear();
                    state.open_until = now.checked_add(open);
                }
            }
        }
        let is_open = state.open_until.is_some();
        drop(state);
        if is_open && matches!(outcome, Outcome::Failed) {
            tally::add(&self.name, |counts| {
                (counts.breaker_opened, counts.breaker_is_open) = (counts.breaker_opened + 1, true)
            });
            // Said once, and not each time that a try fails.
            if !was_open {
                let seconds = open.as_secs_f64();
                line(format_args!(
                    "note: handler `{}`: {failures} failures in a row; it is not asked for {seconds} s",
                    self.name
                ));
            }
        } else if was_open && !is_open {
            tally::add(&self.name, |counts| counts.breaker_is_open = false);
            line(format_args!("note: handler `{}` answers again", self.name));
        }
    }
}

/// A request that passed. What came of it is told once; if it is dropped before, nothing is known.
struct Pass {
    shared: Arc<Shared>,
    tries: bool,
    told: bool,
}

impl Pass {
    fn tell(&mut self, outcome: &Outcome) {
        if !std::mem::replace(&mut self.told, true) {
            self.shared.tell(self.tries, outcome);
        }
    }

    fn failed(&mut self, error: &HandlerError) {
        self.tell(&match error.kind {
            Kind::Unavailable
            | Kind::Overloaded { .. }
            | Kind::RateLimited { .. }
            | Kind::Timeout
            | Kind::Cut
            | Kind::Protocol => Outcome::Failed,
            Kind::InvalidRequest { .. }
            | Kind::ContextLength
            | Kind::Authentication
            | Kind::NotFound
            | Kind::Cancelled
            | Kind::Internal => Outcome::Unknown,
        });
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.tell(&Outcome::Unknown);
    }
}

impl Wrapper for Breaking {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let mut pass = self.0.enter()?;
        let mut stream = inner.stream(request, context).inspect_err(|error| pass.failed(error))?;
        Ok(Box::new(std::iter::from_fn(move || {
            let item = stream.next();
            match &item {
                // The last event: the answer is whole. Of one that is a try, so much as a word says that it works again.
                Some(Ok(Event::Usage(_))) => pass.tell(&Outcome::Well),
                Some(Ok(Event::Delta { .. })) if pass.tries => pass.tell(&Outcome::Well),
                Some(Err(error)) => pass.failed(error),
                _ => {}
            }
            item
        })))
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        let mut pass = self.0.enter()?;
        let vectors = inner.embed(request, context).inspect_err(|error| pass.failed(error))?;
        pass.tell(&Outcome::Well);
        Ok(vectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Duration = Duration::from_millis(60);

    fn breaking(failures: usize, window: Duration) -> Arc<Shared> {
        Breaking::new("x", Breaker { failures, window, open: OPEN }).0
    }

    fn fail(shared: &Arc<Shared>) {
        let mut pass = shared.enter().expect("it passes");
        pass.failed(&HandlerError::new(Kind::Unavailable, "x"));
    }

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_try() {
        let shared = breaking(3, Duration::from_secs(60));
        fail(&shared);
        fail(&shared);
        shared.enter().expect("it passes").tell(&Outcome::Well);
        fail(&shared);
        fail(&shared);
        let early = shared.enter().expect("it is closed");
        fail(&shared);
        let refused = shared.enter().err().expect("it is open");
        assert!(matches!(refused.kind, Kind::Overloaded { .. }) && refused.lets_another_try());
        std::thread::sleep(OPEN);
        // One alone tries, and if nothing is known of it the next one does.
        let first = shared.enter().expect("it is half open");
        assert!(shared.enter().is_err());
        drop(first);
        fail(&shared);
        assert!(shared.enter().is_err(), "it is open again");
        std::thread::sleep(OPEN);
        let mut trying = shared.enter().expect("it is half open");
        // What began before it opened does not close it.
        let mut early = early;
        early.tell(&Outcome::Well);
        assert!(shared.enter().is_err());
        trying.tell(&Outcome::Well);
        assert!(shared.enter().is_ok() && shared.enter().is_ok());
    }

    #[test]
    fn of_many_that_come_at_once_one_alone_tries() {
        let shared = breaking(1, Duration::from_secs(60));
        for round in 0..5 {
            fail(&shared);
            std::thread::sleep(OPEN);
            let passes: Vec<_> = std::thread::scope(|scope| {
                let many: Vec<_> = (0..16).map(|_| scope.spawn(|| shared.enter().ok())).collect();
                many.into_iter().filter_map(|one| one.join().expect("it does not panic")).collect()
            });
            assert_eq!(passes.len(), 1, "round {round}");
            assert!(passes[0].tries && shared.enter().is_err());
            // It is given up, and the next one tries; that fails at the beginning of the next round.
        }
    }

    #[test]
    fn failures_far_apart_and_wrong_requests_do_not_open_it() {
        let shared = breaking(2, Duration::from_millis(20));
        fail(&shared);
        std::thread::sleep(Duration::from_millis(40));
        fail(&shared);
        for kind in [Kind::ContextLength, Kind::Cancelled, Kind::Authentication, Kind::InvalidRequest { param: None }] {
            shared.enter().expect("it passes").failed(&HandlerError::new(kind, "x"));
        }
        assert!(shared.enter().is_ok());
    }
}
