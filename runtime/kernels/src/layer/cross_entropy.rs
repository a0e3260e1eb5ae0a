//! Cross-entropy over rows of logits, with its gradient in place.
//!
//! Logits come as distances from the target's, l − l_t, so that what matters, the logits near the target's, keeps its
//! precision in bf16; and the loss is `ln Σ exp(l − l_t)` itself.

use std::cell::RefCell;

use crate::buffer::grown;
use crate::element::{Element, dot, exp, largest, sum, tanh};
use crate::isa::{isa, per_isa};
use crate::matmul::Matrix;
use crate::pool::{Shared, for_ranges};
use crate::product::ProductElement;

/// `logits[i] = x[i] · w[targets[i]]` for rows x (n, w.cols).
///
/// # Panics
/// When sizes disagree or a target is no row of w.
pub fn target_logits<E: ProductElement>(x: &[E], w: &Matrix, targets: &[u32], logits: &mut [f32]) {
    thread_local!(static ROW: RefCell<(Vec<u32>, Vec<f32>)> = RefCell::default());
    let c = w.cols;
    assert!(x.len() == targets.len() * c && logits.len() == targets.len(), "{} rows of {c}", targets.len());
    assert!(targets.iter().all(|target| (*target as usize) < w.rows), "a target is one of {} rows", w.rows);
    let isa = isa();
    let logits = Shared::new(logits);
    for_ranges(targets.len(), 16, |range| {
        ROW.with_borrow_mut(|(row, floats)| {
            let row = &mut E::of_words_mut(grown(row, c.div_ceil(E::PER_WORD)))[..c];
            for i in range {
                E::decode(isa, w, targets[i] as usize, 0..c, row, floats);
                // SAFETY: no two tasks have a row in common.
                unsafe { logits.slice(i, 1)[0] = dot(isa, &x[i * c..(i + 1) * c], row) };
            }
        });
    });
}

/// Logits l that a model caps softly: the loss is of `cap · tanh(l / cap)`.
#[derive(Clone, Copy, Debug)]
pub struct LogitCap<'a> {
    /// Above 0.
    pub cap: f32,
    /// The logit of each row's target (n) before the cap: what the row's distances are from.
    pub targets: &'a [f32],
}

/// Loss of each row (n) in nats from logits (n, v), each less its target's; and whether no logit is above the target's.
///
/// A NaN in a row, or an infinity above its target, makes its loss one, and a row of such a loss is not right.
///
/// With a `scale` for each row (n), the logits are replaced by the gradient of the sum of losses times their scales:
/// `scale (softmax − onehot)`, and with a cap that times each logit's slope.
///
/// # Panics
/// When sizes disagree, a target is not below v or a cap is not above 0.
pub fn cross_entropy<E: Element>(
    v: usize,
    logits: &mut [E],
    targets: &[u32],
    cap: Option<LogitCap<'_>>,
    scale: Option<&[f32]>,
    losses: &mut [f32],
    right: &mut [bool],
) {
    let n = targets.len();
    assert!(scale.is_none_or(|scale| scale.len() == n), "a scale for each of {n} rows");
    assert!(cap.is_none_or(|cap| cap.cap > 0.0 && cap.targets.len() == n), "a cap above 0 for {n} rows");
    assert_eq!(Some(logits.len()), n.checked_mul(v), "{n} rows of {v}");
    assert!(losses.len() == n && right.len() == n, "{n} rows");
    assert!(targets.iter().all(|target| (*target as usize) < v), "a target is one of {v} tokens");
    let isa = isa();
    let (logits, losses, right) = (Shared::new(logits), Shared::new(losses), Shared::new(right));
    for_ranges(n, 4, |rows| {
        for row in rows {
            // SAFETY: no two tasks have a row in common.
            let (logits, loss, right) =
                unsafe { (logits.slice(row * v, v), &mut losses.slice(row, 1)[0], &mut right.slice(row, 1)[0]) };
            let (target, scale) = (targets[row] as usize, scale.map(|scale| scale[row]));
            (*loss, *right) = match cap {
                None => one_row(isa, logits, target, scale),
                Some(cap) => one_row_capped(isa, logits, target, cap.cap, cap.targets[row], scale),
            };
        }
    });
}

per_isa! {
    fn one_row<E: Element>(logits: &mut [E], target: usize, scale: Option<f32>) -> (f32, bool) {
        // By definition; what a product made of it differs in the last bits. But ∞ − ∞, of a run that diverges, stays NaN.
        logits[target] = E::of(0.0 * logits[target].wide());
        let top = largest(logits);
        let total = sum(logits, |logit| exp(logit - top));
        let loss = top + total.ln();
        if let Some(scale) = scale {
            // By way of the largest logit and not of the loss, whose rounding grows with it.
            let share = scale / total;
            for logit in logits.iter_mut() {
                *logit = E::of(share * exp(logit.wide() - top));
            }
            logits[target] = E::of(share * exp(-top) - scale);
        }
        (loss, top <= 0.0 && !loss.is_nan())
    }
}

per_isa! {
    /// [`one_row`] of the distances between capped logits, where `at` is the target's logit and not capped.
    fn one_row_capped<E: Element>(
        logits: &mut [E],
        target: usize,
        cap: f32,
        at: f32,
        scale: Option<f32>,
    ) -> (f32, bool) {
        logits[target] = E::of(0.0 * logits[target].wide());
        let inverse = 1.0 / cap;
        let (at, at_capped) = (at * inverse, tanh(at * inverse));
        // tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b), which keeps the precision of small distances; and tanh a.
        let capped = |distance: f32| {
            let tanh_a = tanh(distance.mul_add(inverse, at));
            (cap * tanh(distance * inverse) * (1.0 - tanh_a * at_capped), tanh_a)
        };
        // A cap leaves logits in their order, but would hide an infinite one.
        let most = largest(logits);
        let top = capped(most).0 + 0.0 * most;
        let total = sum(logits, |logit| exp(capped(logit).0 - top));
        let loss = top + total.ln();
        if let Some(scale) = scale {
            let share = scale / total;
            for logit in logits.iter_mut() {
                let (distance, tanh_a) = capped(logit.wide());
                *logit = E::of(share * exp(distance - top) * (1.0 - tanh_a * tanh_a));
            }
            logits[target] = E::of((share * exp(-top) - scale) * (1.0 - at_capped * at_capped));
        }
        (loss, most <= 0.0 && !loss.is_nan())
    }
}
