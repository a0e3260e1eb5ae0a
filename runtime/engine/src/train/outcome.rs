//! What passes over batches come to.

use super::objective::{RewardSums, Weighed};
use crate::run::waist::LogProbs;

/// The loss of some batches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Sum of the objective's losses, in nats: for sft of the cross-entropies of trained tokens.
    pub loss_sum: f64,
    /// What the loss is a mean over; 0 where nobody asks.
    pub n: usize,
    /// Trained tokens whose most likely prediction was right.
    pub correct: usize,
    /// Trained tokens.
    pub trained: usize,
    /// Rewards, of an objective that has them.
    pub rewards: Option<RewardSums>,
}

impl Outcome {
    /// Adds a batch: by what an objective made of it, else by its cross-entropy.
    pub fn add(&mut self, batch: &LogProbs, weighed: Option<&Weighed>) {
        self.loss_sum += weighed.map_or(batch.loss_sum, |weighed| weighed.loss_sum);
        self.correct += batch.correct;
        self.trained += batch.values.len();
        if let Some(rewards) = weighed.and_then(|weighed| weighed.rewards) {
            self.rewards = Some(self.rewards.unwrap_or_default().plus(rewards));
        }
    }
}
