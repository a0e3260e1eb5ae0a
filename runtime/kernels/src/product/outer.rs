//! Outer products over rows: the gradients of weights.

use super::cut::DEPTH;
use super::element::ProductElement;
use super::scratch::SCRATCH;
use super::terms::{Left, fits};
use crate::buffer::grown;
use crate::isa::isa;
use crate::pool::{Shared, for_each};
use crate::tile::{PANEL, Segment, Store, pack_rows_padded, pair_rows, rows};

/// Adds up an outer product over rows: `C (p, n) = scale Dᵀ X` for D (m, p) and X (m, n), f32, replacing C.
///
/// # Panics
/// When sizes disagree.
pub fn outer<E: ProductElement>(
    m: usize,
    d: Left<'_, E>,
    p: usize,
    x: Left<'_, E>,
    n: usize,
    scale: f32,
    c: &mut [f32],
) {
    E::outer(m, d, p, x, n, scale, c);
}

/// See [`outer`].
pub fn add_up<E: ProductElement>(
    m: usize,
    d: Left<'_, E>,
    p: usize,
    x: Left<'_, E>,
    n: usize,
    scale: f32,
    c: &mut [f32],
) {
    assert_eq!(Some(c.len()), p.checked_mul(n), "the result of {p} x {n}");
    if m == 0 || p == 0 || n == 0 {
        return c.fill(0.0);
    }
    assert!(fits(m, d.at, d.step, p, d.values.len()), "D is short");
    assert!(fits(m, x.at, x.step, n, x.values.len()), "X is short");
    let isa = isa();
    let words = m.div_ceil(E::PER_WORD);
    let mut pairs = vec![0; words * p];
    pair_rows(isa, &d.values[d.at..], d.step, m, p, &mut pairs);
    let c = Shared::new(c);
    // Wide enough that packing X for so few rows of C is little beside the product.
    for_each(n.div_ceil(PANEL), |panel| {
        let (from, width) = (panel * PANEL, PANEL.min(n - panel * PANEL));
        SCRATCH.with_borrow_mut(|scratch| {
            let out = grown(&mut scratch.panel, DEPTH * PANEL);
            for start in (0..words).step_by(DEPTH / 4) {
                let count = (DEPTH / 4).min(words - start);
                let row = start * E::PER_WORD;
                let part = &x.values[x.at + row * x.step + from..];
                let rows_here = (count * E::PER_WORD).min(m - row);
                pack_rows_padded(isa, part, x.step, rows_here, width, &mut out[..count * PANEL]);
                let segment = Segment {
                    a: pairs[start * p..].as_ptr().cast(),
                    row_step: size_of::<u32>(),
                    word_step: p * size_of::<u32>(),
                    words: count,
                    b: out.as_ptr(),
                };
                let wide = c.get().wrapping_add(from);
                let first = start == 0;
                let store = if first { Store::wide(wide, n) } else { Store::adding(wide, n) };
                // SAFETY: A is (words, p) words and B is `count` packed words; this task alone writes columns
                // `from..from + width` of C, which is (p, n) and borrowed until all tasks have ended.
                unsafe { rows::<E, true>(isa, p, width, &[segment], Store { scale, ..store }) };
            }
        });
    });
}
