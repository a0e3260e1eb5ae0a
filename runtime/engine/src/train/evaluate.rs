//! Loss over rows that are not trained on.

use std::ops::Range;

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
    progress: impl FnMut(usize),
) -> Result<Evaluation> {
    evaluate_each(model, adaptation, examples, compute, progress).map(|(evaluation, _)| evaluation)
}

/// As [`evaluate_examples`], with the cross-entropy of each example in nats: a sum over its trained tokens.
///
/// # Errors
/// As [`evaluate_examples`].
pub fn evaluate_each(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    examples: &[&Example],
    compute: Compute,
    mut progress: impl FnMut(usize),
) -> Result<(Evaluation, Vec<f64>)> {
    let pass = Pass::evaluation(model, adaptation);
    let mut backend = trainer(model, adaptation, compute);
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    let (mut total, mut done, mut each) = (Outcome::default(), 0, Vec::with_capacity(examples.len()));
    for batch in Batch::packed(&units, PASS_ROWS) {
        let log_probs = backend.log_probs(&pass, &batch)?;
        let loss = |targets: &Range<usize>| -log_probs.values[targets.clone()].iter().sum::<f64>();
        each.extend(batch.sequence_targets.iter().map(loss));
        total.add(&log_probs, None);
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
    let evaluation = Evaluation {
        loss,
        // A number that JSON has, whatever the loss.
        perplexity: loss.exp().min(f64::MAX),
        token_accuracy: total.correct as f64 / total.trained as f64,
        trained_tokens: total.trained,
        examples: examples.len(),
    };
    Ok((evaluation, each))
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
