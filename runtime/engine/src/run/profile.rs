//! Where a step's time goes: seconds by the name of the operation, when somebody asks.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
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

static MEASURING: AtomicBool = AtomicBool::new(false);
static OPERATIONS: Mutex<Vec<Operation>> = Mutex::new(Vec::new());

fn operations() -> std::sync::MutexGuard<'static, Vec<Operation>> {
    OPERATIONS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Starts to measure what this process runs, from nothing.
pub fn start() {
    operations().clear();
    MEASURING.store(true, Ordering::Relaxed);
}

/// Ends measuring: all operations, those that took longest first.
pub fn finish() -> Vec<Operation> {
    MEASURING.store(false, Ordering::Relaxed);
    let mut operations = std::mem::take(&mut *operations());
    operations.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    operations
}

/// Runs `f` as the operation `name`. Operations within an operation count for both.
pub(crate) fn timed<R>(name: &'static str, f: impl FnOnce() -> R) -> R {
    if !MEASURING.load(Ordering::Relaxed) {
        return f();
    }
    let start = Instant::now();
    let result = f();
    let seconds = start.elapsed().as_secs_f64();
    let mut operations = operations();
    match operations.iter_mut().find(|operation| operation.name == name) {
        Some(operation) => {
            operation.seconds += seconds;
            operation.calls += 1;
        }
        None => operations.push(Operation { name, seconds, calls: 1 }),
    }
    result
}
