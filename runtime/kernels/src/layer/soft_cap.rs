//! Soft caps: values that stay within ±cap, and below it are nearly what they were. Source: Gemma Team 2024,
//! <https://arxiv.org/abs/2408.00118>, section 2.

use crate::element::tanh;
use crate::isa::{isa, per_isa};

/// Replaces each x by `cap · tanh(x / cap)`, on this thread.
///
/// # Panics
/// When the cap is not above 0.
pub fn soft_cap(x: &mut [f32], cap: f32) {
    assert!(cap > 0.0, "values are capped at {cap}");
    cap_scores(isa(), x, 1.0, cap);
}

per_isa! {
    /// Replaces scores s by `cap · tanh(scale s / cap)`.
    pub(crate) fn cap_scores(scores: &mut [f32], scale: f32, cap: f32) {
        let scale = scale / cap;
        for score in scores {
            *score = cap * tanh(*score * scale);
        }
    }
}
