//! What passes over batches come to.

use super::waist::LogProbs;

/// The loss of some batches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Sum of the cross-entropies of trained tokens, in nats.
    pub loss_sum: f64,
    /// Trained tokens whose most likely prediction was right.
    pub correct: usize,
    /// Trained tokens.
    pub trained: usize,
}

impl Outcome {
    /// Adds a batch.
    pub fn add(&mut self, batch: &LogProbs) {
        self.loss_sum += batch.loss_sum;
        self.correct += batch.correct;
        self.trained += batch.values.len();
    }
}
