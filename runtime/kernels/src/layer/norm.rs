//! RMSNorm, forward and backward. Source: Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>, equation 4.
//!
//! What is kept for backward is the normalised row x̂ = x / rms(x), as E, and 1 / rms(x): half of what x itself would take
//! in bf16, and the gradient needs no more.
//!
//! Besides the norm before a branch there are two: [`norm_columns`], of heads of queries and keys, in place; and [`rms_norm_add`], of a
//! branch's result on its way into the residual stream.

use crate::element::{Element, sum, sum3};
use crate::isa::{isa, per_isa};
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
    let isa = isa();
    let (normal, inverse, y) = (Shared::new(normal), Shared::new(inverse), Shared::new(y));
    for_ranges(m, ROWS, |rows| {
        let (at, n) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common, and all rows lie in the slices, as asserted.
        let (normal, inverse, y) =
            unsafe { (normal.slice(at * c, n * c), inverse.slice(at, n), y.slice(at * c, n * c)) };
        norm_rows(isa, &x[at * c..(at + n) * c], w, epsilon, normal, inverse, y);
    });
}

per_isa! {
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
    normalise_row(isa(), x, w, epsilon, y);
}

per_isa! {
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
    let isa = isa();
    let m = y.len() / c;
    let y = Shared::new(y);
    for_ranges(m, ROWS, |rows| {
        let (at, len) = (rows.start * c, rows.len() * c);
        // SAFETY: no two tasks have a row in common.
        scale_rows(isa, &normal[at..at + len], w, unsafe { y.slice(at, len) });
    });
}

per_isa! {
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
    let isa = isa();
    let (dx, narrow) = (Shared::new(dx), Shared::new(narrow));
    for_ranges(m, ROWS, |rows| {
        let (at, len) = (rows.start * c, rows.len() * c);
        // SAFETY: no two tasks have a row in common.
        let (dx, narrow) = unsafe { (dx.slice(at, len), narrow.slice(at, len)) };
        norm_backward_rows(isa, &normal[at..at + len], w, &inverse[rows], &dy[at..at + len], dx, narrow);
    });
}

per_isa! {
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

/// Neighbouring groups of columns, each normalised by itself: heads of queries or keys, or all of them as one group.
#[derive(Clone, Copy, Debug)]
pub struct ColumnNorm<'a> {
    /// The first column.
    pub at: usize,
    /// How many groups there are.
    pub groups: usize,
    /// The weight of every group, as wide as one.
    pub weight: &'a [f32],
}

impl ColumnNorm<'_> {
    /// Columns of all groups.
    fn width(&self) -> usize {
        self.groups * self.weight.len()
    }
}

/// What rows of `row` columns keep for backward: values of x̂ and of 1 / rms.
fn kept_of(parts: &[ColumnNorm], row: usize) -> (usize, usize) {
    for part in parts {
        let (at, groups, len) = (part.at, part.groups, part.weight.len());
        assert!(len > 0 && at + part.width() <= row, "{groups} groups of {len} from column {at} on in rows of {row}");
    }
    (parts.iter().map(ColumnNorm::width).sum(), parts.iter().map(|part| part.groups).sum())
}

/// [`rms_norm`] in place of the groups of columns that `parts` name, over rows x (m, row); other columns stay.
///
/// What is kept, for each row one part after another: x̂ (m, columns of all parts) and 1 / rms (m, groups of all parts). x gets
/// `w ∘ x̂` of the x̂ that is kept.
///
/// # Panics
/// When sizes disagree.
pub fn norm_columns<E: Element>(
    x: &mut [f32],
    row: usize,
    parts: &[ColumnNorm],
    epsilon: f32,
    normal: &mut [E],
    inverse: &mut [f32],
) {
    let (m, (width, groups)) = (x.len() / row, kept_of(parts, row));
    let sizes = x.len() == m * row && normal.len() == m * width && inverse.len() == m * groups;
    assert!(sizes, "{m} rows of {row} with {groups} groups in {width} columns");
    let isa = isa();
    let (x, normal, inverse) = (Shared::new(x), Shared::new(normal), Shared::new(inverse));
    for_ranges(m, ROWS, |rows| {
        for i in rows {
            // SAFETY: no two tasks have a row in common, and all rows lie in the slices, as asserted.
            let (x, normal, inverse) =
                unsafe { (x.slice(i * row, row), normal.slice(i * width, width), inverse.slice(i * groups, groups)) };
            norm_groups(isa, x, parts, epsilon, normal, inverse);
        }
    });
}

per_isa! {
    fn norm_groups<E: Element>(
        x: &mut [f32],
        parts: &[ColumnNorm<'_>],
        epsilon: f32,
        normal: &mut [E],
        inverse: &mut [f32],
    ) {
        let (mut normal, mut inverse) = (normal, inverse.iter_mut());
        for part in parts {
            let (w, c) = (part.weight, part.weight.len());
            let (own, rest) = normal.split_at_mut(part.groups * c);
            normal = rest;
            let groups = x[part.at..][..part.groups * c].chunks_exact_mut(c).zip(own.chunks_exact_mut(c));
            for ((x, normal), inverse) in groups.zip(&mut inverse) {
                *inverse = 1.0 / (sum(x, |x| x * x) / c as f32 + epsilon).sqrt();
                for j in 0..c {
                    normal[j] = E::of(x[j] * *inverse);
                    x[j] = w[j] * normal[j].wide();
                }
            }
        }
    }
}

/// The gradient of [`norm_columns`], in place: in the columns of `parts`, d (m, row) goes from dy to
/// `dx = (g − x̂ mean(g ∘ x̂)) / rms` with `g = w ∘ dy`.
///
/// # Panics
/// When sizes disagree.
pub fn norm_columns_backward<E: Element>(normal: &[E], row: usize, parts: &[ColumnNorm], inverse: &[f32], d: &mut [E]) {
    let (m, (width, groups)) = (d.len() / row, kept_of(parts, row));
    let sizes = d.len() == m * row && normal.len() == m * width && inverse.len() == m * groups;
    assert!(sizes, "{m} rows of {row} with {groups} groups in {width} columns");
    let isa = isa();
    let d = Shared::new(d);
    for_ranges(m, ROWS, |rows| {
        for i in rows {
            // SAFETY: no two tasks have a row in common.
            let d = unsafe { d.slice(i * row, row) };
            groups_backward(isa, &normal[i * width..][..width], parts, &inverse[i * groups..][..groups], d);
        }
    });
}

per_isa! {
    fn groups_backward<E: Element>(normal: &[E], parts: &[ColumnNorm<'_>], inverse: &[f32], d: &mut [E]) {
        let (mut normal, mut inverse) = (normal, inverse.iter());
        for part in parts {
            let (w, c) = (part.weight, part.weight.len());
            let (own, rest) = normal.split_at(part.groups * c);
            normal = rest;
            let groups = d[part.at..][..part.groups * c].chunks_exact_mut(c).zip(own.chunks_exact(c));
            for ((d, normal), inverse) in groups.zip(&mut inverse) {
                let mean = sum3(w, d, normal, |w, dy, normal| w * dy * normal) / c as f32;
                for j in 0..c {
                    d[j] = E::of((w[j] * d[j].wide() - normal[j].wide() * mean) * inverse);
                }
            }
        }
    }
}

/// [`norm_columns`] of one row, in f32 throughout.
///
/// # Panics
/// When a part reaches beyond the row.
pub fn normalise_columns(x: &mut [f32], parts: &[ColumnNorm], epsilon: f32) {
    kept_of(parts, x.len());
    normalise_groups(isa(), x, parts, epsilon);
}

per_isa! {
    fn normalise_groups(x: &mut [f32], parts: &[ColumnNorm<'_>], epsilon: f32) {
        for part in parts {
            let (w, c) = (part.weight, part.weight.len());
            for x in x[part.at..][..part.groups * c].chunks_exact_mut(c) {
                let inverse = 1.0 / (sum(x, |x| x * x) / c as f32 + epsilon).sqrt();
                for j in 0..c {
                    x[j] = w[j] * (x[j] * inverse);
                }
            }
        }
    }
}

/// `x += factor · w ∘ ŷ` with `ŷ = y / √(mean(y²) + ε)`, row by row: y and x (m, c), w (c). ŷ (m, c) as E and 1 / rms (m) are kept, and
/// the sum is over the ŷ that is kept.
///
/// # Panics
/// When sizes disagree.
pub fn rms_norm_add<E: Element>(
    y: &[f32],
    w: &[f32],
    epsilon: f32,
    factor: f32,
    normal: &mut [E],
    inverse: &mut [f32],
    x: &mut [f32],
) {
    let (m, c) = (inverse.len(), w.len());
    assert!(y.len() == m * c && normal.len() == m * c && x.len() == m * c, "{m} rows of {c}");
    let isa = isa();
    let (normal, inverse, x) = (Shared::new(normal), Shared::new(inverse), Shared::new(x));
    for_ranges(m, ROWS, |rows| {
        let (at, n) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common, and all rows lie in the slices, as asserted.
        let (normal, inverse, x) =
            unsafe { (normal.slice(at * c, n * c), inverse.slice(at, n), x.slice(at * c, n * c)) };
        norm_add_rows(isa, &y[at * c..(at + n) * c], w, epsilon, factor, normal, inverse, x);
    });
}

per_isa! {
    fn norm_add_rows<E: Element>(
        y: &[f32],
        w: &[f32],
        epsilon: f32,
        factor: f32,
        normal: &mut [E],
        inverse: &mut [f32],
        x: &mut [f32],
    ) {
        let c = w.len();
        for (i, inverse) in inverse.iter_mut().enumerate() {
            let row = i * c..(i + 1) * c;
            let (y, normal, x) = (&y[row.clone()], &mut normal[row.clone()], &mut x[row]);
            *inverse = 1.0 / (sum(y, |y| y * y) / c as f32 + epsilon).sqrt();
            for j in 0..c {
                normal[j] = E::of(y[j] * *inverse);
                x[j] += factor * (w[j] * normal[j].wide());
            }
        }
    }
}

/// The gradient of [`rms_norm_add`] in y, rounded to E: `dy = (g − ŷ mean(g ∘ ŷ)) / rms` with `g = factor · w ∘ dx`; dx and dy (m, c).
///
/// # Panics
/// When sizes disagree.
pub fn rms_norm_add_backward<E: Element>(
    normal: &[E],
    w: &[f32],
    inverse: &[f32],
    factor: f32,
    dx: &[f32],
    dy: &mut [E],
) {
    let (m, c) = (inverse.len(), w.len());
    assert!(normal.len() == m * c && dx.len() == m * c && dy.len() == m * c, "{m} rows of {c}");
    let isa = isa();
    let dy = Shared::new(dy);
    for_ranges(m, ROWS, |rows| {
        let (at, len) = (rows.start * c, rows.len() * c);
        // SAFETY: no two tasks have a row in common.
        let dy = unsafe { dy.slice(at, len) };
        norm_add_backward_rows(isa, &normal[at..at + len], w, &inverse[rows], factor, &dx[at..at + len], dy);
    });
}

per_isa! {
    fn norm_add_backward_rows<E: Element>(
        normal: &[E],
        w: &[f32],
        inverse: &[f32],
        factor: f32,
        dx: &[f32],
        dy: &mut [E],
    ) {
        let c = w.len();
        for (i, inverse) in inverse.iter().enumerate() {
            let row = i * c..(i + 1) * c;
            let (normal, dx, dy) = (&normal[row.clone()], &dx[row.clone()], &mut dy[row]);
            let mean = sum3(w, dx, normal, |w, dx, normal| w * dx * normal) / c as f32;
            let factor = factor * inverse;
            for j in 0..c {
                dy[j] = E::of((w[j] * dx[j] - normal[j].wide() * mean) * factor);
            }
        }
    }
}
