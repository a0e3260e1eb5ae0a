//! The threads that embed, beside those that chats are answered with.
//!
//! A step of a chat needs every thread of the one pool, many times for each token. A pass of an encoder there takes some hundred
//! milliseconds, and each of those times would wait for it. So embeddings have threads of their own, as many, which the operating system
//! lets compute when the others leave a processor free, and a little beside them.

use std::sync::OnceLock;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// How much less than others these threads are favoured, as `nice` has it by default: about a tenth of a processor that another thread
/// wants whole.
#[cfg(target_os = "linux")]
const NICE: libc::c_int = 10;

static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();

/// Runs `f` on the threads that embed; what it shares by rayon is shared among them.
pub(super) fn aside<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let pool = POOL.get_or_init(|| {
        let named = |thread| format!("embedding {thread}");
        let pool = ThreadPoolBuilder::new().num_threads(rayon::current_num_threads()).thread_name(named);
        pool.start_handler(|_| yield_to_others()).build().ok()
    });
    match pool {
        Some(pool) => pool.install(f),
        // The system gives no more threads: slower for chats, and right.
        None => f(),
    }
}

/// Returns what `f` makes of each item, on the threads that embed.
pub fn each_aside<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    aside(|| items.par_iter().map(&f).collect())
}

/// Lowers the priority of this thread. Elsewhere than on Linux it stays as it is.
fn yield_to_others() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call reads and writes no memory of ours. On Linux, process 0 is the calling thread. Where it fails, nothing changes.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
    }
}
