//! Answers that wait to be written, so that no stream waits for the disk or for another process that writes.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::About;
use super::person::Person;
use crate::progress::line;

/// Most answers that wait.
const ANSWERS_MAX: usize = 1024;
/// Most bytes of answers that wait.
const BYTES_MAX: usize = 64 << 20;

/// An answer that waits: whose it is, and what is written.
pub type Answer = (Person, About);

#[derive(Default)]
struct Waiting {
    answers: VecDeque<(Answer, usize)>,
    bytes: usize,
    /// Answers that did not fit since it was told how many those are.
    lost: u64,
    is_closed: bool,
}

/// The answers that wait, in order.
#[derive(Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an answer of so many bytes behind the others, and does not wait. Returns false if it does not fit: it is lost, which is
    /// told and counted.
    pub fn push(&self, answer: Answer, bytes: usize) -> bool {
        let mut waiting = self.waiting();
        let fits = waiting.answers.len() < ANSWERS_MAX && waiting.bytes + bytes <= BYTES_MAX;
        let is_first = !fits && waiting.lost == 0;
        if fits {
            waiting.bytes += bytes;
            waiting.answers.push_back((answer, bytes));
            self.more.notify_one();
        } else {
            waiting.lost += 1;
        }
        let count = waiting.answers.len();
        drop(waiting);
        if is_first {
            line(format_args!("warning: {count} answers wait to be kept, and no more can: what comes is not kept"));
        }
        fits
    }

    /// Takes the answer that waits longest.
    pub fn pop(&self) -> Option<Answer> {
        let mut waiting = self.waiting();
        let (answer, bytes) = waiting.answers.pop_front()?;
        waiting.bytes -= bytes;
        Some(answer)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting().answers.len()
    }

    /// How many were lost since this was asked last.
    pub fn lost(&self) -> u64 {
        std::mem::take(&mut self.waiting().lost)
    }

    /// Ends a wait for good.
    pub fn close(&self) {
        self.waiting().is_closed = true;
        self.more.notify_all();
    }

    /// Waits until an answer is there, or for a time. Returns false if it was closed.
    pub fn wait(&self, longest: Duration) -> bool {
        let idle = |waiting: &mut Waiting| waiting.answers.is_empty() && !waiting.is_closed;
        let woken = self.more.wait_timeout_while(self.waiting(), longest, idle);
        !woken.unwrap_or_else(PoisonError::into_inner).0.is_closed
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn answer() -> Answer {
        let about = About::Answer {
            id: "a".into(),
            provider_id: None,
            model: "tutor".into(),
            handler: "near".into(),
            messages: Value::Null,
            answer: String::new(),
        };
        (Person::default(), about)
    }

    #[test]
    fn what_does_not_fit_is_counted_and_not_waited_for() {
        let queue = Queue::default();
        assert!((0..ANSWERS_MAX).all(|_| queue.push(answer(), 1)));
        assert!(!queue.push(answer(), 1) && !queue.push(answer(), 1));
        assert_eq!((queue.len(), queue.lost(), queue.lost()), (ANSWERS_MAX, 2, 0));
        assert!(queue.pop().is_some() && queue.push(answer(), 1));
        while queue.pop().is_some() {}
        assert!(queue.push(answer(), BYTES_MAX) && !queue.push(answer(), 1));
        assert!(queue.pop().is_some() && queue.push(answer(), 1));
        assert!(queue.wait(Duration::from_secs(60)), "one is there");
        queue.close();
        assert!(!queue.wait(Duration::from_secs(60)));
    }
}
