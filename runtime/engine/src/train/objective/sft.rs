//! Supervised fine-tuning: the mean cross-entropy of a step's trained tokens.

use anyhow::{Result, bail};

use super::{Objective, UnitLogProbs, Weighed};

/// `−1/N Σ log pᵢ` over the N trained tokens of the step, counted over all of it, so that how it is cut into passes changes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sft;

impl Objective for Sft {
    fn name(&self) -> &'static str {
        "sft"
    }

    fn count(&self, targets: &[Vec<usize>]) -> usize {
        targets.iter().flatten().sum()
    }

    fn alike(&self, n: usize) -> Option<f64> {
        Some(1.0 / n as f64)
    }

    fn weigh(&self, _: &[UnitLogProbs<'_>], _: usize, _: f64) -> Result<Weighed> {
        bail!("sft weighs all targets alike")
    }
}
