//! Where a step's time goes: seconds by the name of the operation, when somebody asks.

use std::cell::RefCell;
use std::time::Instant;

/// Seconds and calls of one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// Its name.
    pub name: &'static str,
    /// Seconds in all calls.
    pub seconds: f64,
    /// Calls.
    pub calls: u64,
}

thread_local!(static OPERATIONS: RefCell<Option<Vec<Operation>>> = const { RefCell::new(None) });

/// Starts to measure what this thread runs, from nothing.
pub fn start() {
    OPERATIONS.set(Some(Vec::new()));
}

/// Ends measuring: all operations, those that took longest first.
pub fn finish() -> Vec<Operation> {
    let mut operations = OPERATIONS.take().unwrap_or_default();
    operations.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    operations
}

/// Runs `f` as the operation `name`. Operations within an operation count for both.
pub(crate) fn timed<R>(name: &'static str, f: impl FnOnce() -> R) -> R {
    if OPERATIONS.with_borrow(Option::is_none) {
        return f();
    }
    let start = Instant::now();
    let result = f();
    let seconds = start.elapsed().as_secs_f64();
    OPERATIONS.with_borrow_mut(|operations| {
        let Some(operations) = operations else { return };
        match operations.iter_mut().find(|operation| operation.name == name) {
            Some(operation) => {
                operation.seconds += seconds;
                operation.calls += 1;
            }
            None => operations.push(Operation { name, seconds, calls: 1 }),
        }
    });
    result
}
