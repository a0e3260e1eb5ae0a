//! Turns of requests that share one model: each computes for a moment, and then lets the next one.
//!
//! Short requests go before long ones, and every other turn is one of the latter: a question waits for a moment however many books are
//! being indexed, and many questions do not stop the books.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::context::PATIENCE;
use super::{Context, HandlerError};

/// Time of a turn, after which it ends as soon as it can be interrupted. It goes on for as long as nobody waits.
const TURN: Duration = Duration::from_millis(50);

/// The requests that wait. How many there are is bounded by whoever lets them in.
#[derive(Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    taken: bool,
    /// Numbers of the short requests, in the order of their turns.
    short: VecDeque<u64>,
    /// Of the long ones.
    long: VecDeque<u64>,
    next: u64,
    /// The latest turn was that of a short request.
    short_was_last: bool,
}

impl State {
    /// Whose turn is next.
    fn front(&self) -> Option<u64> {
        let (short, long) = (self.short.front(), self.long.front());
        if self.short_was_last { long.or(short) } else { short.or(long) }.copied()
    }

    fn queue(&mut self, short: bool) -> &mut VecDeque<u64> {
        if short { &mut self.short } else { &mut self.long }
    }
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn of a request, which is a short or a long one.
    ///
    /// # Errors
    /// When nobody wants the answer any longer.
    pub(super) fn enter(&self, short: bool, context: &Context) -> Result<Turn<'_>, HandlerError> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.queue(short).push_back(number);
        while state.taken || state.front() != Some(number) {
            state = self.changed.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
            if let Err(gone) = context.check() {
                state.queue(short).retain(|waiting| *waiting != number);
                self.changed.notify_all();
                return Err(gone);
            }
        }
        state.queue(short).pop_front();
        (state.taken, state.short_was_last) = (true, short);
        Ok(Turn { turns: self, short, since: Instant::now() })
    }
}

/// A turn, which ends when it is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    short: bool,
    since: Instant,
}

impl<'a> Turn<'a> {
    /// Returns true if its time is over and another request waits.
    pub(super) fn over(&self) -> bool {
        self.since.elapsed() >= TURN && self.turns.state().front().is_some()
    }

    /// Goes on, after the others if its time is over.
    ///
    /// # Errors
    /// When nobody wants the answer any longer.
    pub(super) fn go_on(self, context: &Context) -> Result<Turn<'a>, HandlerError> {
        context.check()?;
        if !self.over() {
            return Ok(self);
        }
        let (turns, short) = (self.turns, self.short);
        drop(self);
        turns.enter(short, context)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.state().taken = false;
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::super::Kind;
    use super::*;

    fn waiting(turns: &Turns) -> usize {
        let state = turns.state();
        state.short.len() + state.long.len()
    }

    #[test]
    fn a_short_request_goes_before_long_ones_and_stops_none() {
        let (turns, context) = (Turns::default(), Context::default());
        let first = turns.enter(false, &context).expect("nobody is there");
        let (sender, order) = channel();
        thread::scope(|scope| {
            for (n, (name, short)) in
                [("long 1", false), ("long 2", false), ("short 1", true), ("short 2", true), ("short 3", true)]
                    .iter()
                    .enumerate()
            {
                let (turns, context, sender) = (&turns, &context, sender.clone());
                scope.spawn(move || {
                    let turn = turns.enter(*short, context).expect("its turn comes");
                    sender.send(*name).expect("the test waits");
                    drop(turn);
                });
                while waiting(turns) <= n {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        drop(sender);
        assert_eq!(order.iter().collect::<Vec<_>>(), ["short 1", "long 1", "short 2", "long 2", "short 3"]);
    }

    #[test]
    fn a_turn_goes_on_while_nobody_waits_and_then_ends() {
        let (turns, context) = (Turns::default(), Context::default());
        let mut turn = turns.enter(false, &context).expect("nobody is there");
        turn.since = Instant::now().checked_sub(TURN).expect("the clock has run longer");
        assert!(!turn.over());
        let turn = thread::scope(|scope| {
            let other = scope.spawn(|| turns.enter(false, &context).map(drop));
            while waiting(&turns) == 0 {
                thread::yield_now();
            }
            assert!(turn.over());
            let turn = turn.go_on(&context).expect("its turn comes again");
            assert!(other.join().expect("it does not panic").is_ok(), "the other had its turn");
            turn
        });
        context.cancel();
        assert_eq!(turn.go_on(&context).err().map(|gone| gone.kind), Some(Kind::Cancelled));
        assert!(turns.enter(false, &Context::default()).is_ok(), "a turn that is given up is free");
    }

    #[test]
    fn who_leaves_the_wait_leaves_no_gap() {
        let (turns, gone) = (Turns::default(), Context::default());
        let first = turns.enter(false, &Context::default()).expect("nobody is there");
        thread::scope(|scope| {
            let leaves = scope.spawn(|| turns.enter(false, &gone).err().map(|error| error.kind));
            while waiting(&turns) == 0 {
                thread::yield_now();
            }
            gone.cancel();
            assert_eq!(leaves.join().expect("it does not panic"), Some(Kind::Cancelled));
        });
        let late = turns.enter(false, &Context::default().within(Duration::ZERO)).err();
        assert_eq!(late.map(|error| error.kind), Some(Kind::Timeout));
        assert_eq!(waiting(&turns), 0);
        drop(first);
        assert!(turns.enter(false, &Context::default()).is_ok());
    }
}
