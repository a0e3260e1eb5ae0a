//! What a training makes small: an objective gives the weight of each target's log-probability, names what a step's loss is a mean
//! over, and reports that loss. The loop, the backends and the files know no other difference between objectives.
//!
//! An objective is one file with one `impl Objective`. What it knows of a unit beside its sequences (a label, log-probabilities of the
//! base) it holds itself, by the unit's number.

mod sft;

use std::ops::Range;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use self::sft::Sft;
use crate::data::Example;
use crate::run::batch::Batch;

/// Rewards of a step's units, as TRL logs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    /// Mean reward of the completions that are wanted.
    pub chosen: f64,
    /// Mean reward of those that are not.
    pub rejected: f64,
    /// Share of the pairs in which the wanted one has the higher reward.
    pub accuracy: f64,
    /// Mean of the difference.
    pub margin: f64,
}

/// A unit of a pass with what the model makes of it.
#[derive(Clone, Debug)]
pub struct UnitLogProbs<'a> {
    /// The unit's number among all that are trained on.
    pub number: u32,
    /// Log-probabilities of the targets of each of its sequences, in nats.
    pub sequences: Vec<&'a [f64]>,
}

impl<'a> UnitLogProbs<'a> {
    /// The units of a batch, by the log-probabilities of all its targets.
    pub fn of(batch: &Batch, log_probs: &'a [f64]) -> Vec<Self> {
        let unit = |(number, sequences): &(u32, Range<usize>)| Self {
            number: *number,
            sequences: batch.sequence_targets[sequences.clone()].iter().map(|of| &log_probs[of.clone()]).collect(),
        };
        batch.units.iter().map(unit).collect()
    }
}

/// What an objective makes of a pass.
#[derive(Clone, Debug, Default)]
pub struct Weighed {
    /// A weight for each target of the pass, in order: the step's gradient is that of `Σ wᵢ (−log pᵢ)`.
    pub weights: Vec<f64>,
    /// Sum of the losses, before the division by N.
    pub loss_sum: f64,
    /// Sums of rewards over the pass, and how many they are sums of; `None`: the objective has none.
    pub rewards: Option<RewardSums>,
}

/// Sums of rewards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RewardSums {
    /// Sum over wanted completions, and their number.
    pub chosen: (f64, usize),
    /// Sum over those not wanted, and their number.
    pub rejected: (f64, usize),
    /// Pairs in which the wanted one has the higher reward, and the pairs.
    pub right: (usize, usize),
}

impl RewardSums {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        let sum = |a: (f64, usize), b: (f64, usize)| (a.0 + b.0, a.1 + b.1);
        Self {
            chosen: sum(self.chosen, other.chosen),
            rejected: sum(self.rejected, other.rejected),
            right: (self.right.0 + other.right.0, self.right.1 + other.right.1),
        }
    }

    /// The means. The margin is that of the means, and where nothing is paired the accuracy is 0.
    pub fn means(self) -> Rewards {
        let mean = |(sum, count): (f64, usize)| sum / count.max(1) as f64;
        let (chosen, rejected) = (mean(self.chosen), mean(self.rejected));
        let accuracy = mean((self.right.0 as f64, self.right.1));
        Rewards { chosen, rejected, accuracy, margin: chosen - rejected }
    }
}

/// Log-probabilities of some numbered sequences under the model as it is, forward only: for each the sum over its targets.
pub type LogProbsOf<'a> = dyn FnMut(&[(u32, &Example)]) -> Result<Vec<f64>> + 'a;

/// An objective.
pub trait Objective: Send + Sync {
    /// Its name, as `--objective` has it.
    fn name(&self) -> &'static str;

    /// N: what the step's loss is a mean over. `targets`: the number of targets of each sequence of each unit of the step.
    fn count(&self, targets: &[Vec<usize>]) -> usize;

    /// The one weight of all targets, where that is known before their log-probabilities are; the loss is then the cross-entropy by that
    /// weight.
    fn alike(&self, n: usize) -> Option<f64> {
        let _ = n;
        None
    }

    /// Looks at a whole step before its first pass: what it returns is a constant of the step, which [`Objective::weigh`] gets.
    ///
    /// # Errors
    /// When log-probabilities cannot be computed.
    fn before(&self, units: &[u32], log_probs: &mut LogProbsOf<'_>) -> Result<f64> {
        let _ = (units, log_probs);
        Ok(0.0)
    }

    /// Weights and loss of the units of one pass, in the order of the pass. `n`: [`Objective::count`] of the step; `constant`:
    /// [`Objective::before`] of it. It is not called where [`Objective::alike`] gives a weight.
    ///
    /// # Errors
    /// When the units are none that it knows.
    fn weigh(&self, units: &[UnitLogProbs<'_>], n: usize, constant: f64) -> Result<Weighed>;
}
