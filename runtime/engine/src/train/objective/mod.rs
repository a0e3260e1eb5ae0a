//! What a training makes small: an objective gives the weight of each target's log-probability, names what a step's loss is a mean
//! over, and reports that loss. The loop, the backends and the files know no other difference between objectives.
//!
//! An objective is one file with one `impl Objective`. What it knows of a unit beside its sequences (a label, log-probabilities of the
//! base) it holds itself, by the unit's number.

mod config;
mod dpo;
mod kto;
mod orpo;
mod prepare;
mod reference;
mod sft;

use std::ops::Range;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

pub use self::config::{Kind, ObjectiveConfig};
pub use self::dpo::Dpo;
pub use self::kto::{Kto, mismatched};
pub use self::orpo::Orpo;
pub use self::prepare::{Prepare, Progress, prepare};
pub(super) use self::reference::sequence_log_probs;
pub use self::reference::{Reference, reference_log_probs};
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
    /// Share of the pairs in which the wanted one has the higher reward; of rated answers, of those on their side of the reference point.
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

    /// Its one sequence.
    ///
    /// # Errors
    /// When it has another number of them.
    pub fn single(&self) -> Result<&'a [f64]> {
        match self.sequences[..] {
            [sequence] => Ok(sequence),
            _ => bail!("unit {} has {} sequences, not one", self.number, self.sequences.len()),
        }
    }

    /// Its chosen sequence and its rejected one.
    ///
    /// # Errors
    /// When it has another number of them.
    pub fn pair(&self) -> Result<[&'a [f64]; 2]> {
        match self.sequences[..] {
            [chosen, rejected] => Ok([chosen, rejected]),
            _ => bail!("unit {} has {} sequences, not a chosen and a rejected one", self.number, self.sequences.len()),
        }
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

impl Weighed {
    /// Gives the next `targets` targets this weight.
    pub fn add(&mut self, targets: usize, weight: f64) {
        self.weights.resize(self.weights.len() + targets, weight);
    }
}

/// Sums of rewards.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RewardSums {
    /// Sum over wanted completions, and their number.
    pub chosen: (f64, usize),
    /// Sum over those not wanted, and their number.
    pub rejected: (f64, usize),
    /// Pairs in which the wanted one has the higher reward, and the pairs. Of answers that were rated one by one, those on their side of the
    /// reference point, and all.
    pub right: (usize, usize),
}

impl RewardSums {
    /// Adds a pair.
    pub fn add_pair(&mut self, chosen: f64, rejected: f64) {
        let right = (usize::from(chosen > rejected), 1);
        *self = self.plus(Self { chosen: (chosen, 1), rejected: (rejected, 1), right });
    }

    /// Adds a rated answer, which is right when a good one has a reward above `point` and a bad one has not.
    pub fn add_rated(&mut self, good: bool, reward: f64, point: f64) {
        let right = (usize::from((reward > point) == good), 1);
        let (one, none) = ((reward, 1), (0.0, 0));
        let (chosen, rejected) = if good { (one, none) } else { (none, one) };
        *self = self.plus(Self { chosen, rejected, right });
    }

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

    /// What of its loss is as much as a nat of sft's: by that a training is held to diverge.
    fn loss_unit(&self) -> f64 {
        1.0
    }

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

/// `1 / (1 + e⁻ˣ)`.
pub fn sigmoid(x: f64) -> f64 {
    // Of a number that is not positive, so that nothing overflows.
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// `log σ(x)`.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// The log-probability of a sequence, by those of its targets.
pub fn sum(log_probs: &[f64]) -> f64 {
    log_probs.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three pairs, of targets of several counts.
    pub(super) fn pairs() -> Vec<Vec<Vec<f64>>> {
        vec![
            vec![vec![-1.0, -0.5, -2.0], vec![-3.0, -0.25]],
            vec![vec![-0.75], vec![-4.0, -0.1, -0.6]],
            vec![vec![-0.2, -0.9, -1.1, -0.3], vec![-2.0]],
        ]
    }

    /// Holds the weights to central differences of the mean loss: `wᵢ = −∂L/∂(log pᵢ)`. All units are cut over two passes and over one.
    pub(super) fn check_weights(objective: &dyn Objective, units: &[Vec<Vec<f64>>], constant: f64) -> Result<()> {
        let targets: Vec<Vec<usize>> = units.iter().map(|unit| unit.iter().map(Vec::len).collect()).collect();
        let n = objective.count(&targets);
        let weigh = |units: &[Vec<Vec<f64>>], first: u32| {
            let unit = |(number, unit): (u32, &'_ Vec<Vec<f64>>)| (number, unit.clone());
            let owned: Vec<(u32, Vec<Vec<f64>>)> = (first..).zip(units).map(unit).collect();
            let views: Vec<UnitLogProbs> = owned
                .iter()
                .map(|(number, unit)| UnitLogProbs {
                    number: *number,
                    sequences: unit.iter().map(|s| &s[..]).collect(),
                })
                .collect();
            objective.weigh(&views, n, constant)
        };
        let whole = weigh(units, 0)?;
        let (first, second) = (weigh(&units[..1], 0)?, weigh(&units[1..], 1)?);
        assert_eq!([first.weights, second.weights].concat(), whole.weights);
        assert!((first.loss_sum + second.loss_sum - whole.loss_sum).abs() < 1e-12 * whole.loss_sum.abs().max(1.0));
        let mut at = 0;
        for u in 0..units.len() {
            for s in 0..units[u].len() {
                for t in 0..units[u][s].len() {
                    let loss = |step: f64| {
                        let mut units = units.to_vec();
                        units[u][s][t] += step;
                        weigh(&units, 0).map(|weighed| weighed.loss_sum / n as f64)
                    };
                    let slope = (loss(1e-5)? - loss(-1e-5)?) / 2e-5;
                    let weight = whole.weights[at];
                    assert!(
                        (weight + slope).abs() < 1e-6 * weight.abs().max(1e-2),
                        "target {at}: {weight}, slope {slope}"
                    );
                    at += 1;
                }
            }
        }
        assert_eq!(at, whole.weights.len());
        Ok(())
    }

    #[test]
    fn sigmoids_are_exact_where_they_are_flat() {
        assert_eq!((sigmoid(0.0), sigmoid(800.0), sigmoid(-800.0)), (0.5, 1.0, 0.0));
        assert!((sigmoid(-40.0) / (-40f64).exp() - 1.0).abs() < 1e-12);
        assert_eq!((log_sigmoid(-800.0), log_sigmoid(800.0)), (-800.0, 0.0));
        assert!((log_sigmoid(0.3) - sigmoid(0.3).ln()).abs() < 1e-15);
    }
}
