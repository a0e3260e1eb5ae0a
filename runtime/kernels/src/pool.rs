//! The one thread pool: tasks by number, handed out in order.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::isa::{isa, with_isa};

/// Threads that share the work.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Has the pool be of so many threads; returns false where it is there already, as it is once anything was computed.
pub fn use_threads(count: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(count).build_global().is_ok()
}

/// Runs `f` as one of the pool's threads, so that the many short tasks it starts find the others awake and itself at work.
///
/// It is kept to the instructions that this thread is kept to, see [`with_isa`](crate::with_isa).
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let isa = isa();
    rayon::scope(|_| with_isa(isa, f))
}

/// Calls `f` on each of the pool's threads.
pub fn on_each_thread(f: impl Fn() + Sync) {
    rayon::broadcast(|_| f());
}

/// Calls `f` with each number below `tasks`, on all threads, in no particular order but started in ascending order.
///
/// What a task computes must not depend on which thread runs it or on how many there are.
pub(crate) fn for_each(tasks: usize, f: impl Fn(usize) + Sync) {
    if tasks <= 1 || threads() == 1 {
        return (0..tasks).for_each(f);
    }
    let next = AtomicUsize::new(0);
    rayon::broadcast(|_| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            f(task);
        }
    });
}

/// Calls `f` with ranges of at most `size` that cover `0..n`.
pub(crate) fn for_ranges(n: usize, size: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
    for_each(n.div_ceil(size), |task| f(task * size..n.min((task + 1) * size)));
}

/// A pointer that tasks share, each to write elements that no other task touches.
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

// SAFETY: the pointer is only dereferenced in `unsafe` blocks, each of which shows that its elements are its own.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares a slice's elements for as long as the caller keeps it borrowed.
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// The pointer; by a method, so that a closure captures the whole and not the field.
    pub(crate) fn get(self) -> *mut T {
        self.0
    }

    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// They lie in the slice that is shared, which is still borrowed, and nobody else accesses them meanwhile.
    pub(crate) unsafe fn slice<'a>(self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}
