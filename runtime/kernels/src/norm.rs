//! RMSNorm, forward and backward. Source: Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>, equation 4.
//!
//! What is kept for backward is the normalised row x̂ = x / rms(x), as E, and 1 / rms(x): half of what x itself would take
//! in bf16, and the gradient needs no more.

use crate::cpu::{cpu, per_cpu};
use crate::element::{Element, sum, sum3};
use crate::pool::{Shared, for_ranges};

/// Rows of one task.
const ROWS: usize = 32;

/// `x̂ = x / √(mean(x²) + ε)` and `y = w ∘ x̂`, row by row: x (m, c), w (c), x̂ and y (m, c), 1 / rms (m).
///
/// y is computed from the x̂ that is kept, so that backward can have it again.
///
/// # Panics
/// When sizes disagree.
pub fn rms_norm<E: Element>(x: &[f32], w: &[f32], epsilon: f32, normal: &mut [E], inverse: &mut [f32], y: &mut [E]) {
    let (m, c) = (inverse.len(), w.len());
    assert!(x.len() == m * c && normal.len() == m * c && y.len() == m * c, "{m} rows of {c}");
    let cpu = cpu();
    let (normal, inverse, y) = (Shared::new(normal), Shared::new(inverse), Shared::new(y));
    for_ranges(m, ROWS, |rows| {
        let (at, n) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common, and all rows lie in the slices, as asserted.
        let (normal, inverse, y) =
            unsafe { (normal.slice(at * c, n * c), inverse.slice(at, n), y.slice(at * c, n * c)) };
        norm_rows(cpu, &x[at * c..(at + n) * c], w, epsilon, normal, inverse, y);
    });
}

per_cpu! {
    fn norm_rows<E: Element>(x: &[f32], w: &[f32], epsilon: f32, normal: &mut [E], inverse: &mut [f32], y: &mut [E]) {
        let c = w.len();
        for (i, inverse) in inverse.iter_mut().enumerate() {
            let row = i * c..(i + 1) * c;
            let (x, normal, y) = (&x[row.clone()], &mut normal[row.clone()], &mut y[row]);
            *inverse = 1.0 / (sum(x, |x| x * x) / c as f32 + epsilon).sqrt();
            for j in 0..c {
                normal[j] = E::of(x[j] * *inverse);
                y[j] = E::of(w[j] * normal[j].wide());
            }
        }
    }
}

/// `y = w ∘ x / √(mean(x²) + ε)` of one row, in f32.
///
/// # Panics
/// When sizes disagree.
pub fn normalise(x: &[f32], w: &[f32], epsilon: f32, y: &mut [f32]) {
    assert!(x.len() == w.len() && y.len() == w.len(), "a row of {}", w.len());
    normalise_row(cpu(), x, w, epsilon, y);
}

per_cpu! {
    fn normalise_row(x: &[f32], w: &[f32], epsilon: f32, y: &mut [f32]) {
        let inverse = 1.0 / (sum(x, |x| x * x) / w.len() as f32 + epsilon).sqrt();
        for j in 0..w.len() {
            y[j] = w[j] * (x[j] * inverse);
        }
    }
}

/// `y = w ∘ x̂` again, from what was kept.
///
/// # Panics
/// When sizes disagree.
pub fn scale_columns<E: Element>(normal: &[E], w: &[f32], y: &mut [E]) {
    let c = w.len();
    assert!(normal.len() == y.len() && y.len().is_multiple_of(c), "rows of {c}");
    let cpu = cpu();
    let m = y.len() / c;
    let y = Shared::new(y);
    for_ranges(m, ROWS, |rows| {
        let (at, len) = (rows.start * c, rows.len() * c);
        // SAFETY: no two tasks have a row in common.
        scale_rows(cpu, &normal[at..at + len], w, unsafe { y.slice(at, len) });
    });
}

per_cpu! {
    fn scale_rows<E: Element>(normal: &[E], w: &[f32], y: &mut [E]) {
        for (normal, y) in normal.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            for j in 0..w.len() {
                y[j] = E::of(w[j] * normal[j].wide());
            }
        }
    }
}

/// Adds the gradient of [`rms_norm`] in x: `dx += (g − x̂ mean(g ∘ x̂)) / rms` with `g = w ∘ dy`; `narrow` gets dx as E.
///
/// dy and dx (m, c).
///
/// # Panics
/// When sizes disagree.
pub fn rms_norm_backward<E: Element>(
    normal: &[E],
    w: &[f32],
    inverse: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    narrow: &mut [E],
) {
    let (m, c) = (inverse.len(), w.len());
    let len = m * c;
    assert!(normal.len() == len && dy.len() == len && dx.len() == len && narrow.len() == len, "{m} rows of {c}");
    let cpu = cpu();
    let (dx, narrow) = (Shared::new(dx), Shared::new(narrow));
    for_ranges(m, ROWS, |rows| {
        let (at, len) = (rows.start * c, rows.len() * c);
        // SAFETY: no two tasks have a row in common.
        let (dx, narrow) = unsafe { (dx.slice(at, len), narrow.slice(at, len)) };
        norm_backward_rows(cpu, &normal[at..at + len], w, &inverse[rows], &dy[at..at + len], dx, narrow);
    });
}

per_cpu! {
    fn norm_backward_rows<E: Element>(
        normal: &[E],
        w: &[f32],
        inverse: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        narrow: &mut [E],
    ) {
        let c = w.len();
        for (i, inverse) in inverse.iter().enumerate() {
            let row = i * c..(i + 1) * c;
            let (normal, dy) = (&normal[row.clone()], &dy[row.clone()]);
            let (dx, narrow) = (&mut dx[row.clone()], &mut narrow[row]);
            let mean = sum3(w, dy, normal, |w, dy, normal| w * dy * normal) / c as f32;
            for j in 0..c {
                dx[j] += (w[j] * dy[j] - normal[j].wide() * mean) * inverse;
                narrow[j] = E::of(dx[j]);
            }
        }
    }
}
