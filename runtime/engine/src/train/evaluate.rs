//! Loss over rows that are not trained on.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::outcome::Outcome;
use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Unit};
use crate::files::mapped::whole;
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::{Batch, PASS_ROWS};
use crate::run::compute::Compute;
use crate::run::plain::recipe::Pass;

/// Loss over examples, without gradients: a mean over all trained tokens.
///
/// # Errors
/// When no token is trained, a tensor operation fails, or the loss is not finite.
pub fn evaluate_examples(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    examples: &[&Example],
    compute: Compute,
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let pass = Pass::evaluation(model, adaptation);
    let mut backend = trainer(model, adaptation, compute);
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    let (mut total, mut done) = (Outcome::default(), 0);
    for batch in Batch::packed(&units, PASS_ROWS) {
        total.add(&backend.log_probs(&pass, &batch)?, None);
        done += batch.sequences.len();
        progress(done);
    }
    ensure!(total.trained > 0, "no token of these examples is trained, so there is no loss");
    whole()?;
    let loss = total.loss_sum / total.trained as f64;
    ensure!(
        loss.is_finite(),
        "the loss of these examples is {loss}: the model's numbers overflow, or its weights are damaged"
    );
    Ok(Evaluation {
        loss,
        // A number that JSON has, whatever the loss.
        perplexity: loss.exp().min(f64::MAX),
        token_accuracy: total.correct as f64 / total.trained as f64,
        trained_tokens: total.trained,
        examples: examples.len(),
    })
}

/// Loss over a set of examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy of trained tokens, in nats.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Share of trained tokens whose most likely prediction was right.
    pub token_accuracy: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// Examples.
    pub examples: usize,
}
