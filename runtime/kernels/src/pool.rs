//! The one thread pool: tasks by number.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::isa::isa;
pub(crate) use crate::shared::Shared;
use crate::team::{self, Here};

/// Threads that share the work.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Has the pool be of so many threads; returns false where it is there already, as it is once anything was computed.
pub fn use_threads(count: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(count).build_global().is_ok()
}

/// Runs `f` as one of the pool's threads, so that the many short tasks it starts find the others awake and itself at work: to wake a
/// thread takes some 100 µs in a virtual machine, as long as many of a layer's operations.
///
/// It is kept to the instructions that this thread is kept to, see [`with_isa`](crate::with_isa).
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    match team::here() {
        Here::Apart => team::lead_pool(isa(), f),
        Here::Leads(_) | Here::InTask => f(),
    }
}

/// Calls `f` on each of the pool's threads.
pub fn on_each_thread(f: impl Fn() + Sync) {
    rayon::broadcast(|_| f());
}

/// Calls `f` with each number below `tasks`, on all threads, in no particular order; in a team neighbours are mostly on the same thread.
/// Tasks that start tasks do them alone.
///
/// What a task computes must not depend on which thread runs it or on how many there are.
pub(crate) fn for_each(tasks: usize, f: impl Fn(usize) + Sync) {
    if tasks <= 1 || threads() == 1 {
        return (0..tasks).for_each(f);
    }
    match team::here() {
        Here::InTask => return (0..tasks).for_each(f),
        Here::Leads(team) if tasks <= team::MOST => return team.run_singly(tasks, f),
        _ => (),
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
