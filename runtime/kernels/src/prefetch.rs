//! Asking for memory ahead of its turn.

/// Rows that are fetched into the cache ahead of their turn, where a panel takes a short piece of each row, which the processor does
/// not foresee.
pub(crate) const ROWS_AHEAD: usize = 24;

/// Asks for `values[at..at + count]` to be in the cache soon, if that exists.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T], at: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const LINE: usize = 64;
        let first = values.as_ptr().wrapping_add(at).cast::<i8>();
        let before = first.addr() % LINE;
        for line in (0..before + count * size_of::<T>()).step_by(LINE) {
            // SAFETY: a prefetch of any address is harmless, and every x86-64 processor has it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_sub(before).wrapping_add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, at, count);
}
