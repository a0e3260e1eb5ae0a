//! Gradients through a gain on columns, `y = g ∘ v`.

use rayon::prelude::*;

use crate::element::Element;
use crate::isa::{isa, per_isa};

/// Rows of one task; so many that adding their sums up costs little.
const ROWS: usize = 64;

/// `dv = g ∘ dy` as E, and the gradient of the gain, `Σ dy ∘ v` over all rows. v, dy and dv are (m, n), g and the result (n). The result
/// is the same for any number of threads.
///
/// # Panics
/// When sizes disagree.
pub fn gain_backward<E: Element>(gain: &[f32], v: &[E], dy: &[E], dv: &mut [E]) -> Vec<f32> {
    let n = gain.len();
    assert!(v.len() == dy.len() && dv.len() == dy.len() && dy.len().is_multiple_of(n.max(1)), "rows of {n} columns");
    let (isa, size) = (isa(), ROWS * n.max(1));
    let parts = v.par_chunks(size).zip(dy.par_chunks(size)).zip(dv.par_chunks_mut(size));
    let parts: Vec<Vec<f32>> = parts.map(|((v, dy), dv)| part(isa, gain, v, dy, dv)).collect();
    let mut sums = vec![0f32; n];
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sums
}

per_isa! {
    fn part<E: Element>(gain: &[f32], v: &[E], dy: &[E], dv: &mut [E]) -> Vec<f32> {
        let n = gain.len();
        let mut sums = vec![0f32; n];
        for ((v, dy), dv) in v.chunks_exact(n).zip(dy.chunks_exact(n)).zip(dv.chunks_exact_mut(n)) {
            for ((((sum, gain), v), dy), dv) in sums.iter_mut().zip(gain).zip(v).zip(dy).zip(dv) {
                *sum += dy.wide() * v.wide();
                *dv = E::of(gain * dy.wide());
            }
        }
        sums
    }
}
