//! Libraries that panic over damaged input: the panic becomes an error, and prints nothing of its own.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// How many calls of [`quietly`] this thread is inside of.
    static QUIET: Cell<usize> = const { Cell::new(0) };
}

/// Runs `run`; `None` if it panicked. The panic is not reported: that is the caller's to do, in words about its input.
/// Other threads' panics are reported as ever, at the same time too.
pub(crate) fn quietly<T>(run: impl FnOnce() -> T) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            // No value: the thread ends, and its locals are gone.
            if QUIET.try_with(Cell::get).unwrap_or(0) == 0 {
                usual(panic);
            }
        }));
    });
    QUIET.set(QUIET.get() + 1);
    let done = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(QUIET.get() - 1);
    done.ok()
}
