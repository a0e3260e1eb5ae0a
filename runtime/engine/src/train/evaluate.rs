//! Loss over rows that are not trained on.

use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::objective::{Objective, RewardSums, Rewards, Sft, UnitLogProbs};
use super::outcome::Outcome;
use super::run::Whole;
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
    progress: impl FnMut(usize),
) -> Result<(Evaluation, Vec<f64>)> {
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    measure(model, adaptation, &units, &Sft, compute, progress)
}

/// Loss of an objective over units, without gradients: all of them are one step. `progress` hears how many are done.
///
/// # Errors
/// As [`evaluate_examples`], and when the units are none that the objective knows.
pub fn evaluate_units(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    units: &[Unit<'_>],
    objective: &dyn Objective,
    compute: Compute,
    progress: impl FnMut(usize),
) -> Result<Evaluation> {
    measure(model, adaptation, units, objective, compute, progress).map(|(evaluation, _)| evaluation)
}

/// The loss of an objective over units, and the cross-entropy of each of their sequences.
fn measure(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    units: &[Unit<'_>],
    objective: &dyn Objective,
    compute: Compute,
    mut progress: impl FnMut(usize),
) -> Result<(Evaluation, Vec<f64>)> {
    let pass = Pass::evaluation(model, adaptation);
    let mut backend = trainer(model, adaptation, compute);
    let batches = Batch::packed(units, PASS_ROWS);
    let trained: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    ensure!(trained > 0, "no token of these examples is trained, so there is no loss");
    let Whole { n, constant } = Whole::of(objective, &mut *backend, &pass, &batches)?;
    let (mut total, mut cross_entropy, mut done) = (Outcome { n, ..Outcome::default() }, 0.0, 0);
    let mut each = Vec::with_capacity(units.len());
    for batch in &batches {
        let log_probs = backend.log_probs(&pass, batch)?;
        cross_entropy += log_probs.loss_sum;
        let loss = |targets: &Range<usize>| -log_probs.values[targets.clone()].iter().sum::<f64>();
        each.extend(batch.sequence_targets.iter().map(loss));
        let weighed = match objective.alike(n) {
            Some(_) => None,
            None => Some(objective.weigh(&UnitLogProbs::of(batch, &log_probs.values), n, constant)?),
        };
        total.add(&log_probs, weighed.as_ref());
        done += batch.units.len();
        progress(done);
    }
    whole()?;
    let loss = total.loss_sum / n as f64;
    ensure!(
        loss.is_finite(),
        "the loss of these examples is {loss}: the model's numbers overflow, or its weights are damaged"
    );
    let evaluation = Evaluation {
        loss,
        // A number that JSON has, whatever the loss.
        perplexity: (cross_entropy / trained as f64).exp().min(f64::MAX),
        token_accuracy: total.correct as f64 / trained as f64,
        trained_tokens: trained,
        examples: units.len(),
        rewards: total.rewards.map(RewardSums::means),
    };
    Ok((evaluation, each))
}

/// Loss over a set of examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Loss, in nats: of sft the mean cross-entropy of trained tokens.
    pub loss: f64,
    /// e to the mean cross-entropy of trained tokens, those of rejected answers included.
    pub perplexity: f64,
    /// Share of trained tokens whose most likely prediction was right.
    pub token_accuracy: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// Examples; pairs of answers are one.
    pub examples: usize,
    /// Rewards, of an objective that has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewards: Option<Rewards>,
}
