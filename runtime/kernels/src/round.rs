//! Rows of f32 rounded to E, where a product comes next.

use crate::element::Element;
use crate::isa::{isa, per_isa};
use crate::pool::{Shared, for_ranges};

/// Values of one task.
const VALUES: usize = 1 << 14;

/// Rounds f32 values to E, on all threads.
///
/// # Panics
/// When sizes disagree.
pub fn to_elements<E: Element>(from: &[f32], to: &mut [E]) {
    assert_eq!(from.len(), to.len());
    let isa = isa();
    let shared = Shared::new(to);
    for_ranges(from.len(), VALUES, |range| {
        // SAFETY: no two tasks have a value in common.
        narrow(isa, &from[range.clone()], unsafe { shared.slice(range.start, range.len()) });
    });
}

per_isa! {
    /// Rounds f32 to E.
    pub(crate) fn narrow<E: Element>(from: &[f32], to: &mut [E]) {
        for (from, to) in from.iter().zip(to) {
            *to = E::of(*from);
        }
    }
}

/// `factor · x` rounded to E, on all threads.
///
/// # Panics
/// When sizes disagree.
pub fn to_elements_scaled<E: Element>(x: &[f32], factor: f32, y: &mut [E]) {
    assert_eq!(x.len(), y.len());
    let isa = isa();
    let y = Shared::new(y);
    for_ranges(x.len(), VALUES, |range| {
        // SAFETY: no two tasks have a value in common.
        narrow_scaled(isa, &x[range.clone()], factor, unsafe { y.slice(range.start, range.len()) });
    });
}

per_isa! {
    fn narrow_scaled<E: Element>(x: &[f32], factor: f32, y: &mut [E]) {
        for (x, y) in x.iter().zip(y) {
            *y = E::of(factor * x);
        }
    }
}
