//! Admission: a bounded number of answers at once and a bounded queue. A request beyond the queue is refused, and told when to try
//! again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use homeroom_engine::inference::Engine;

use super::context::PATIENCE;
use super::{Context, EmbedRequest, Embeddings, Event, EventStream, Gives, Handler, HandlerError, Kind, Request};

/// Least and most time after which a refused request is told to try again.
const COME_BACK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(120));
/// Seconds that an answer is assumed to take before one was measured.
const FIRST_GUESS_S: f64 = 2.0;
/// Weight of the latest answer in the moving mean of their times.
const LATEST: f64 = 0.2;

/// How many requests a handler takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Answers at once; at least 1.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
}

/// Requests of all queues of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Those that are answered.
    pub running: usize,
    /// Those that wait.
    pub waiting: usize,
}

static RUNNING: AtomicUsize = AtomicUsize::new(0);
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Returns how many requests are answered and wait, in all queues.
pub fn load() -> Load {
    Load { running: RUNNING.load(Ordering::Relaxed), waiting: WAITING.load(Ordering::Relaxed) }
}

/// A handler behind a queue, first in, first out; work in the background waits until nobody else does, has half of the places at most, and
/// gives up its place in a full queue. A request that is cancelled gives up its place, in the queue or in an answer.
pub struct Limited {
    inner: Arc<dyn Handler>,
    gate: Arc<Gate>,
}

impl Limited {
    /// Puts a queue in front of a handler.
    pub fn new(inner: Arc<dyn Handler>, limits: Limits) -> Self {
        Self { inner, gate: Gate::new(limits) }
    }
}

impl Handler for Limited {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let place = Gate::enter(&self.gate, context)?;
        let stream = self.inner.stream(request, context)?;
        Ok(Box::new(Admitted { held: Some((stream, place)) }))
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.inner.engine()
    }

    fn gives(&self) -> Gives {
        self.inner.gives()
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        let _place = Gate::enter(&self.gate, context)?;
        self.inner.embed(request, context)
    }
}

/// The queue.
struct Gate {
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    running: usize,
    /// Those of them that are work in the background.
    running_behind: usize,
    /// The requests that wait, the oldest in front.
    waiting: VecDeque<Waiter>,
    next: u64,
    /// How long an answer takes, in seconds: a moving mean.
    answer_s: f64,
}

/// A request that waits.
struct Waiter {
    number: u64,
    background: bool,
}

/// One more in a count of the process, until it is dropped.
struct Counted(&'static AtomicUsize);

impl Counted {
    fn in_count(count: &'static AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl State {
    /// The request that is let in next, if a place is free for it.
    fn next(&self, limits: Limits) -> Option<u64> {
        if self.running >= limits.running {
            return None;
        }
        let asked = self.waiting.iter().find(|waiter| !waiter.background);
        let behind = || self.waiting.front().filter(|_| self.running_behind < limits.running.div_ceil(2));
        asked.or_else(behind).map(|waiter| waiter.number)
    }

    /// How many are let in before a request that waits; `None`: it waits no longer.
    fn before(&self, number: u64) -> Option<usize> {
        let at = self.waiting.iter().position(|waiter| waiter.number == number)?;
        let goes_first = |waiter: &&Waiter| !waiter.background;
        Some(match self.waiting[at].background {
            false => self.waiting.iter().take(at).filter(goes_first).count(),
            true => at + self.waiting.iter().skip(at).filter(goes_first).count(),
        })
    }

    fn leave(&mut self, number: u64) {
        self.waiting.retain(|waiter| waiter.number != number);
    }
}

impl Gate {
    /// Makes a queue with nobody in it.
    fn new(limits: Limits) -> Arc<Self> {
        let (running, running_behind, waiting, next) = (0, 0, VecDeque::new(), 0);
        let state = State { running, running_behind, waiting, next, answer_s: FIRST_GUESS_S };
        Arc::new(Self { limits, state: Mutex::new(state), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    ///
    /// # Errors
    /// When the queue is full, or nobody wants the answer any longer.
    fn enter(gate: &Arc<Self>, context: &Context) -> Result<Place, HandlerError> {
        let Limits { running, waiting } = gate.limits;
        let background = context.is_background();
        let mut state = gate.state();
        if state.running >= running && state.waiting.len() >= waiting {
            // Work in the background makes room, the latest first.
            let latest = state.waiting.iter().rposition(|waiter| waiter.background).filter(|_| !background);
            if latest.and_then(|latest| state.waiting.remove(latest)).is_none() {
                return Err(gate.full(&state));
            }
            gate.changed.notify_all();
        }
        let number = state.next;
        state.next += 1;
        state.waiting.push_back(Waiter { number, background });
        let waits = Counted::in_count(&WAITING);
        while state.next(gate.limits) != Some(number) {
            let Some(before) = state.before(number) else {
                context.wait_behind(0);
                return Err(gate.full(&state));
            };
            // One that is being answered is before it, if nobody waits.
            context.wait_behind(before.max(1));
            state = gate.changed.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
            if let Err(gone) = context.check() {
                state.leave(number);
                context.wait_behind(0);
                gate.changed.notify_all();
                return Err(gone);
            }
        }
        drop(waits);
        context.wait_behind(0);
        state.leave(number);
        state.running += 1;
        state.running_behind += usize::from(background);
        gate.changed.notify_all();
        let counted = Counted::in_count(&RUNNING);
        Ok(Place { gate: gate.clone(), since: Instant::now(), background, _counted: counted })
    }

    /// The refusal of a request that finds the queue full.
    fn full(&self, state: &State) -> HandlerError {
        let Limits { running, .. } = self.limits;
        // The queue goes first, `running` at a time.
        let rounds = (state.waiting.len() + 1).div_ceil(running);
        let retry_after = Duration::try_from_secs_f64(state.answer_s * rounds as f64).unwrap_or(COME_BACK.1);
        let retry_after = retry_after.clamp(COME_BACK.0, COME_BACK.1);
        let message =
            format!("the handler is full: {running} requests are being answered and {} wait", state.waiting.len());
        HandlerError::new(Kind::Overloaded { retry_after }, message)
    }
}

/// A place among the requests that are answered, given back when it is dropped.
struct Place {
    gate: Arc<Gate>,
    since: Instant,
    background: bool,
    _counted: Counted,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.running -= 1;
        state.running_behind -= usize::from(self.background);
        state.answer_s += LATEST * (self.since.elapsed().as_secs_f64() - state.answer_s);
        self.gate.changed.notify_all();
    }
}

/// An answer and its place. Both are dropped with the last event, so that a slow reader does not keep the place.
struct Admitted {
    held: Option<(EventStream, Place)>,
}

impl Iterator for Admitted {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (stream, _) = self.held.as_mut()?;
        let item = stream.next();
        if matches!(item, None | Some(Err(_) | Ok(Event::Usage(_)))) {
            self.held = None;
        }
        item
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FinishReason, Usage};
    use super::*;

    /// Answers nothing, once somebody reads.
    struct Short;

    impl Handler for Short {
        fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
            let start = Event::start("i", "m", "h");
            let end = [Event::finish(FinishReason::Stop), Event::Usage(Usage::default())];
            Ok(Box::new([start].into_iter().chain(end).map(Ok)))
        }
    }

    fn limited(running: usize, waiting: usize) -> Arc<Limited> {
        Arc::new(Limited::new(Arc::new(Short), Limits { running, waiting }))
    }

    fn waiting(handler: &Limited) -> usize {
        handler.gate.state().waiting.len()
    }

    #[test]
    fn who_came_first_is_answered_first_and_all_are() {
        let handler = limited(1, 40);
        let first = handler.stream(&Request::default(), &Context::default()).expect("there is a place");
        let (sender, done) = std::sync::mpsc::channel();
        for number in 0..33 {
            let (queued, sender) = (handler.clone(), sender.clone());
            std::thread::spawn(move || {
                let stream = queued.stream(&Request::default(), &Context::default()).expect("it is let in");
                sender.send(number).expect("the test waits");
                assert_eq!(stream.count(), 3);
            });
            while waiting(&handler) <= number {
                std::thread::yield_now();
            }
        }
        drop(first);
        let order: Vec<usize> = (0..33).map(|_| done.recv().expect("an answer")).collect();
        assert_eq!(order, (0..33).collect::<Vec<_>>());
    }

    #[test]
    fn past_the_queue_one_is_told_when_to_come_back() {
        let handler = limited(2, 0);
        let held = [(); 2].map(|()| handler.stream(&Request::default(), &Context::default()).expect("a place"));
        handler.gate.state().answer_s = 7.2;
        let refused = handler.stream(&Request::default(), &Context::default()).err().expect("both places are taken");
        assert_eq!(refused.kind, Kind::Overloaded { retry_after: Duration::from_secs_f64(7.2) });
        handler.gate.state().answer_s = 1e9;
        let refused = handler.stream(&Request::default(), &Context::default()).err().expect("both places are taken");
        assert_eq!(refused.kind, Kind::Overloaded { retry_after: COME_BACK.1 });
        drop(held);
        assert!(handler.stream(&Request::default(), &Context::default()).is_ok());
    }

    #[test]
    fn who_leaves_the_queue_leaves_no_gap() {
        let handler = limited(1, 2);
        let first = handler.stream(&Request::default(), &Context::default()).expect("a place");
        let gone = Context::default();
        let leaves = {
            let (handler, gone) = (handler.clone(), gone.clone());
            std::thread::spawn(move || handler.stream(&Request::default(), &gone).err().map(|error| error.kind))
        };
        while waiting(&handler) == 0 {
            std::thread::yield_now();
        }
        gone.cancel();
        assert_eq!(leaves.join().expect("it does not panic"), Some(Kind::Cancelled));
        let late = handler.stream(&Request::default(), &Context::default().within(Duration::ZERO)).err();
        assert_eq!(late.map(|error| error.kind), Some(Kind::Timeout));
        assert_eq!(waiting(&handler), 0);
        drop(first);
        assert!(handler.stream(&Request::default(), &Context::default()).is_ok());
    }

    #[test]
    fn an_answer_that_is_whole_holds_no_place_however_slowly_it_is_read() {
        let handler = limited(1, 0);
        let mut read = handler.stream(&Request::default(), &Context::default()).expect("a place");
        assert_eq!(read.by_ref().take(3).count(), 3);
        assert!(handler.stream(&Request::default(), &Context::default()).is_ok());
        assert!(read.next().is_none());
    }
    #[test]
    fn work_in_the_background_waits_until_nobody_else_does() {
        let handler = limited(1, 4);
        let first = handler.stream(&Request::default(), &Context::default()).expect("a place");
        let (sender, done) = std::sync::mpsc::channel();
        let contexts = [true, true, false, false].map(|behind| {
            let context = if behind { Context::default().in_background() } else { Context::default() };
            let (queued, sender, waits) = (handler.clone(), sender.clone(), context.clone());
            let number = waiting(&handler);
            std::thread::spawn(move || match queued.stream(&Request::default(), &waits) {
                Ok(stream) => sender.send(number).map(|()| drop(stream)).expect("the test waits"),
                Err(error) => {
                    assert!(matches!(error.kind, Kind::Overloaded { .. }), "{error}");
                    sender.send(number + 100).expect("the test waits");
                }
            });
            while waiting(&handler) <= number {
                std::thread::yield_now();
            }
            context
        });
        // The queue is full: the latest of the background makes room for a fifth that somebody waits for.
        let fifth = handler.clone();
        let asked = std::thread::spawn(move || fifth.stream(&Request::default(), &Context::default()).map(drop));
        assert_eq!(done.recv(), Ok(101));
        assert!(handler.stream(&Request::default(), &Context::default().in_background()).is_err());
        let deadline = Instant::now() + Duration::from_secs(30);
        let told = || contexts.each_ref().map(Context::before);
        while told() != [3, 0, 1, 1] && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(told(), [3, 0, 1, 1], "requests that are before each");
        drop(first);
        assert_eq!([(); 3].map(|()| done.recv().expect("an answer")), [2, 3, 0]);
        assert!(asked.join().expect("it does not panic").is_ok());
        assert_eq!(contexts.map(|context| context.before()), [0; 4]);
    }

    #[test]
    fn work_in_the_background_has_half_of_the_places() {
        let handler = limited(4, 0);
        let behind = || handler.stream(&Request::default(), &Context::default().in_background().within(PATIENCE));
        let held = [behind().expect("a place"), behind().expect("a place")];
        assert_eq!(behind().err().map(|error| error.kind), Some(Kind::Timeout), "it waits");
        assert!(handler.stream(&Request::default(), &Context::default()).is_ok());
        drop(held);
        assert!(behind().is_ok());
    }
}
