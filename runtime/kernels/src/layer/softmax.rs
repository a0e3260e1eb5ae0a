//! The weights that a token is drawn by.

use crate::element::{exp, largest};
use crate::isa::{isa, per_isa};

/// Logits lₜ become `e^((lₜ − max l) / T)`: 1 for the likeliest, so that nothing overflows, and 0 below e⁻⁸⁷.
///
/// `logits`: (V), finite. `temperature`: above 0.
pub fn softmax_weights(logits: &mut [f32], temperature: f32) {
    weigh(isa(), logits, 1.0 / temperature);
}

per_isa! {
    fn weigh(logits: &mut [f32], inverse: f32) {
        let top = largest(logits);
        for logit in logits.iter_mut() {
            let x = (*logit - top) * inverse;
            let weight = exp(x);
            *logit = if x < -87.0 { 0.0 } else { weight };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, with_isa};
    use crate::philox::Stream;

    #[test]
    fn weights_are_those_of_softmax_on_every_processor() {
        let mut random = Stream::new(3, 1);
        let mut logits: Vec<f32> = (0..1237).map(|_| (9.0 * random.normal()) as f32).collect();
        logits[77] = f32::MIN;
        logits[1236] = logits.iter().copied().fold(f32::MIN, f32::max);
        for temperature in [1.0, 0.7, 31.0, 1e-6] {
            let of = |isa| {
                with_isa(isa, || {
                    let mut weights = logits.clone();
                    softmax_weights(&mut weights, temperature);
                    weights
                })
            };
            let weights = of(Isa::PORTABLE);
            let top = f64::from(logits[1236]);
            for (logit, weight) in logits.iter().zip(&weights) {
                let x = (f64::from(*logit) - top) / f64::from(temperature);
                let (exact, weight) = (x.exp(), f64::from(*weight));
                // The difference and its product with 1 / T are rounded before e is raised to it.
                assert!((weight - exact).abs() <= exact * 4e-7 * (1.0 + x.abs()) || x < -86.9 && weight < 2e-38);
            }
            assert!(weights[1236] == 1.0 && weights[77] == 0.0);
            for isa in Isa::tested() {
                assert!(of(isa) == weights, "{isa:?}, at temperature {temperature}");
            }
        }
    }
}
