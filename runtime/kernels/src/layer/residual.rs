//! Sums in the residual stream and in its gradient.

use crate::element::Element;
use crate::isa::{isa, per_isa};
use crate::pool::{Shared, for_ranges};

/// Values of one task.
const VALUES: usize = 1 << 14;

/// `x += factor · y`, on all threads.
///
/// # Panics
/// When sizes disagree.
pub fn add_scaled(x: &mut [f32], y: &[f32], factor: f32) {
    assert_eq!(x.len(), y.len());
    let isa = isa();
    let x = Shared::new(x);
    for_ranges(y.len(), VALUES, |range| {
        // SAFETY: no two tasks have a value in common.
        add_values(isa, unsafe { x.slice(range.start, range.len()) }, &y[range], factor);
    });
}

per_isa! {
    fn add_values(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += factor * y;
        }
    }
}

/// `dx += dy`, and `narrow` gets dx as E, on all threads: the gradient of a branch without a norm before it.
///
/// # Panics
/// When sizes disagree.
pub fn add_gradient<E: Element>(dy: &[f32], dx: &mut [f32], narrow: &mut [E]) {
    assert!(dy.len() == dx.len() && narrow.len() == dx.len(), "{} values to {}", dy.len(), dx.len());
    let isa = isa();
    let (dx, narrow) = (Shared::new(dx), Shared::new(narrow));
    for_ranges(dy.len(), VALUES, |range| {
        let (at, len) = (range.start, range.len());
        // SAFETY: no two tasks have a value in common.
        let (dx, narrow) = unsafe { (dx.slice(at, len), narrow.slice(at, len)) };
        add_and_narrow(isa, &dy[range], dx, narrow);
    });
}

per_isa! {
    fn add_and_narrow<E: Element>(dy: &[f32], dx: &mut [f32], narrow: &mut [E]) {
        for ((dy, dx), narrow) in dy.iter().zip(dx).zip(narrow) {
            *dx += dy;
            *narrow = E::of(*dx);
        }
    }
}
