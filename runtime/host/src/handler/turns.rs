//! Turns of requests that share one model: each computes for a moment, and then lets the next one.
//!
//! Who has had no turn yet goes before who has, and every other turn is one of the latter: a question waits for a moment however many
//! books are being indexed, and many questions do not stop the books.

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
    /// Numbers of the requests that have had no turn yet, the oldest in front.
    new: VecDeque<u64>,
    /// Of the others.
    again: VecDeque<u64>,
    next: u64,
    /// The latest turn was the first one of its request.
    new_was_last: bool,
}

impl State {
    /// Whose turn is next, and whether it is its first.
    fn front(&self) -> Option<(u64, bool)> {
        let (new, again) = (self.new.front().map(|new| (*new, true)), self.again.front().map(|again| (*again, false)));
        if self.new_was_last { again.or(new) } else { new.or(again) }
    }
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the first turn of a request.
    ///
    /// # Errors
    /// When nobody wants the answer any longer.
    pub(super) fn enter(&self, context: &Context) -> Result<Turn<'_>, HandlerError> {
        self.wait(true, context)
    }

    fn wait(&self, new: bool, context: &Context) -> Result<Turn<'_>, HandlerError> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        if new { &mut state.new } else { &mut state.again }.push_back(number);
        while state.taken || state.front() != Some((number, new)) {
            state = self.changed.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
            if let Err(gone) = context.check() {
                if new { &mut state.new } else { &mut state.again }.retain(|waiting| *waiting != number);
                self.changed.notify_all();
                return Err(gone);
            }
        }
        if new { &mut state.new } else { &mut state.again }.pop_front();
        (state.taken, state.new_was_last) = (true, new);
        Ok(Turn { turns: self, since: Instant::now() })
    }
}

/// A turn, which ends when it is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
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
        let turns = self.turns;
        drop(self);
        turns.wait(false, context)
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
        turns.state().new.len() + turns.state().again.len()
    }

    #[test]
    fn a_new_request_goes_before_old_ones_and_stops_none() {
        let (turns, context) = (Turns::default(), Context::default());
        let first = turns.enter(&context).expect("nobody is there");
        let (sender, order) = channel();
        thread::scope(|scope| {
            for (n, (name, new)) in
                [("old 1", false), ("old 2", false), ("new 1", true), ("new 2", true), ("new 3", true)].iter().enumerate()
            {
                let (turns, context, sender) = (&turns, &context, sender.clone());
                scope.spawn(move || {
                    let turn = turns.wait(*new, context).expect("its turn comes");
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
        assert_eq!(order.iter().collect::<Vec<_>>(), ["old 1", "new 1", "old 2", "new 2", "new 3"]);
    }

    #[test]
    fn a_turn_goes_on_while_nobody_waits_and_then_ends() {
        let (turns, context) = (Turns::default(), Context::default());
        let mut turn = turns.enter(&context).expect("nobody is there");
        turn.since = Instant::now().checked_sub(TURN).expect("the clock has run longer");
        assert!(!turn.over());
        let turn = thread::scope(|scope| {
            let other = scope.spawn(|| turns.enter(&context).map(drop));
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
        assert!(turns.enter(&Context::default()).is_ok(), "a turn that is given up is free");
    }

    #[test]
    fn who_leaves_the_wait_leaves_no_gap() {
        let (turns, gone) = (Turns::default(), Context::default());
        let first = turns.enter(&Context::default()).expect("nobody is there");
        thread::scope(|scope| {
            let leaves = scope.spawn(|| turns.enter(&gone).err().map(|error| error.kind));
            while waiting(&turns) == 0 {
                thread::yield_now();
            }
            gone.cancel();
            assert_eq!(leaves.join().expect("it does not panic"), Some(Kind::Cancelled));
        });
        let late = turns.enter(&Context::default().within(Duration::ZERO)).err();
        assert_eq!(late.map(|error| error.kind), Some(Kind::Timeout));
        assert_eq!(waiting(&turns), 0);
        drop(first);
        assert!(turns.enter(&Context::default()).is_ok());
    }
}
