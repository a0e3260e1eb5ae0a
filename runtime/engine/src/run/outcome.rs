//! What a pass over a batch comes to.

/// The loss of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Sum of the cross-entropies of trained tokens, in nats.
    pub loss_sum: f64,
    /// Trained tokens whose most likely prediction was right.
    pub correct: usize,
    /// Trained tokens.
    pub trained: usize,
}
