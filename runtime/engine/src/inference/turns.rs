//! Turns over the cores: one pass through a model uses all of them.

use std::sync::{Condvar, Mutex, PoisonError};

/// Models take turns in the order in which they came: a mutex alone would be taken again by who has just let it go.
struct Cores {
    /// The number of the next who comes, and of who has its turn.
    numbers: Mutex<(u64, u64)>,
    next: Condvar,
}

static CORES: Cores = Cores { numbers: Mutex::new((0, 0)), next: Condvar::new() };

/// A turn, until it is dropped.
pub(super) struct Turn;

impl Turn {
    pub(super) fn wait() -> Self {
        let mut numbers = CORES.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let own = numbers.0;
        numbers.0 += 1;
        drop(CORES.next.wait_while(numbers, |(_, now)| *now != own));
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        CORES.numbers.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
        CORES.next.notify_all();
    }
}
