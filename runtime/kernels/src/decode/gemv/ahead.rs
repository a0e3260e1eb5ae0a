//! Asks for weights some blocks before they are read: decoding waits for memory, and what the processor fetches ahead by itself is too little
//! where blocks are no whole lines and much is computed between them.
//!
//! For this once, past the second cache (`prefetchnta`), what all tokens read, and fits, stays there beside weights, which do not. Where
//! that is slow, as [`reads_past_caches`] knows, it is asked for as all else is.

use std::arch::x86_64::{_MM_HINT_NTA, _MM_HINT_T0, _mm_prefetch};

pub(super) use crate::fastest::reads_past_caches;

/// How far ahead memory is asked for.
const AHEAD: usize = 2048;

/// Asks for what will be read some blocks after the `len` bytes at `p`; with `ONCE`, past the second cache.
///
/// `ONCE` is no argument, since a loop over large blocks that decides anew each time runs at two thirds of the speed on Granite Rapids.
#[inline(always)]
pub(super) fn ahead<const ONCE: bool>(p: *const u8, len: usize) {
    for line in 0..len.div_ceil(64) {
        let p = p.wrapping_add(AHEAD + 64 * line).cast();
        // SAFETY: nothing is read; an address that nothing lies at does no harm.
        unsafe {
            if ONCE {
                _mm_prefetch::<_MM_HINT_NTA>(p);
            } else {
                _mm_prefetch::<_MM_HINT_T0>(p);
            }
        }
    }
}

/// The same where the loop is slower by other things.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    once: bool,
}

impl Ahead {
    /// As is faster on this processor.
    pub(super) fn new() -> Self {
        Self { once: reads_past_caches() }
    }

    /// See [`ahead`].
    #[inline(always)]
    pub(super) fn of(self, p: *const u8, len: usize) {
        if self.once { ahead::<true>(p, len) } else { ahead::<false>(p, len) }
    }

    /// The same for floats, which lie in whole lines: AMD's processors fetch enough of them by themselves.
    #[inline(always)]
    pub(super) fn of_floats(self, p: *const u8, len: usize) {
        if !self.once {
            ahead::<false>(p, len);
        }
    }
}
