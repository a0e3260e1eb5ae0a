//! The weights that a token is drawn by.

use crate::cpu::{cpu, per_cpu};
use crate::element::{exp, largest};

/// Logits lₜ become `e^((lₜ − max l) / T)`: 1 for the likeliest, so that nothing overflows, and 0 below e⁻⁸⁷.
pub fn softmax_weights(logits: &mut [f32], temperature: f32) {
    weigh(cpu(), logits, 1.0 / temperature);
}

per_cpu! {
    fn weigh(logits: &mut [f32], inverse: f32) {
        let top = largest(logits);
        for logit in logits.iter_mut() {
            let x = (*logit - top) * inverse;
            let weight = exp(x);
            *logit = if x < -87.0 { 0.0 } else { weight };
        }
    }
}
