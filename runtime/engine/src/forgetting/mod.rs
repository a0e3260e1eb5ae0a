//! Forgetting: how far a trained model has moved from its base, where nobody asked it to.
//!
//! It is measured on rows of the base's own kind, [`own_rows`] or a file of the user's, by two numbers: the loss before and after, and
//! the KL divergence between the distributions of the next token.
//!
//! Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", <https://arxiv.org/abs/1612.00796>.

mod own_rows;

use anyhow::Result;
use serde::{Deserialize, Serialize};

pub use self::own_rows::{OwnRow, own_rows};
use crate::data::Example;
pub use crate::difference::Measured;
use crate::difference::{Difference, difference};

/// How far a model has moved from its base.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forgetting {
    /// The base's mean cross-entropy of the rows' trained tokens, in nats.
    pub loss_before: f64,
    /// That of the trained model.
    pub loss_after: f64,
    /// Mean of KL(base‖trained) over these tokens, in nats a token.
    pub kl: f64,
    /// The tokens.
    pub tokens: usize,
}

/// Compares a trained model with its base over the trained tokens of some examples, both in f32.
///
/// `KL(base‖tuned) = Σᵥ p(v) (log p(v) − log q(v))` with p the base's distribution of a token and q the tuned model's, the sum over the
/// whole vocabulary, in f64. It costs a pass of each model, and logits of some rows of both at once. The alternative is to estimate it by
/// tokens that the base drew, `log p(t) − log q(t)`, from log-probabilities of targets alone; but that varies by more than the
/// divergences that matter (at 0.04 nats by about 0.3 a token), can come out negative, and is none at all on rows that the base did not
/// draw, as a user's are.
///
/// `progress` is told how many examples are done; what it fails with ends the measurement.
///
/// # Errors
/// When the models have other vocabularies, no token is trained, a tensor operation fails, or a number is not finite.
pub fn forgetting(
    base: Measured<'_>,
    tuned: Measured<'_>,
    examples: &[&Example],
    progress: impl FnMut(usize) -> Result<()>,
) -> Result<Forgetting> {
    let found = difference(base, tuned, examples, false, progress)?;
    let Difference { kl, loss: loss_before, loss_other: loss_after, tokens, .. } = found;
    Ok(Forgetting { loss_before, loss_after, kl, tokens })
}
