//! Forgetting: how far a trained model has moved from its base, where nobody asked it to.
//!
//! It is measured on rows of the base's own kind, [`own_rows`] or a file of the user's, by two numbers: the loss before and after, and
//! the KL divergence between the distributions of the next token.
//!
//! Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", <https://arxiv.org/abs/1612.00796>.

mod own_rows;

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use homeroom_kernels::on_pool;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use self::own_rows::{OwnRow, own_rows};
use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Unit};
use crate::files::mapped::whole;
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::{Batch, PASS_ROWS};
use crate::run::compute::Compute;
use crate::run::plain::recipe::Pass;
use crate::run::waist::Train;

/// Values of the logits of each model that exist at once,
const LOGITS_CHUNK: usize = 4 << 20;
/// unless so few rows have more: reading the head for each costs more than they take.
const CHUNK_ROWS: usize = 64;

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

/// A model that is measured: a base, perhaps with what is adapted of it.
pub type Measured<'a> = (&'a BaseModel, Option<&'a Adaptation>);

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
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Forgetting> {
    let [vocab, other] = [base, tuned].map(|(model, _)| model.architecture.vocab_size);
    ensure!(vocab == other, "the base knows {vocab} tokens, the trained model {other}: they cannot be compared");
    let (mut base, mut tuned) = (Side::new(base), Side::new(tuned));
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    let (mut total, mut tokens, mut done) = ([0.0; 3], 0, 0);
    let chunk = (LOGITS_CHUNK / vocab).max(CHUNK_ROWS);
    for batch in Batch::packed(&units, PASS_ROWS) {
        let (p, q) = (base.residual(&batch)?, tuned.residual(&batch)?); // (targets, C)
        for from in (0..batch.targets.len()).step_by(chunk) {
            let rows = from..batch.targets.len().min(from + chunk);
            let (p, q) = (base.logits(&p, &batch, rows.clone())?, tuned.logits(&q, &batch, rows.clone())?); // (n, V)
            let of_rows = p.par_chunks(vocab).zip(q.par_chunks(vocab)).zip(&batch.targets[rows]);
            let of_rows: Vec<[f64; 3]> = of_rows.map(|((p, q), target)| compare(p, q, *target as usize)).collect();
            // In order, so that the sum has the same bits whatever the number of threads.
            of_rows.iter().for_each(|row| total.iter_mut().zip(row).for_each(|(total, value)| *total += value));
        }
        tokens += batch.targets.len();
        done += batch.sequences.len();
        progress(done)?;
    }
    ensure!(tokens > 0, "no token of these examples is trained, so there is nothing to compare");
    whole()?;
    let [kl, loss_before, loss_after] = total.map(|sum| sum / tokens as f64);
    ensure!(
        kl.is_finite() && loss_before.is_finite() && loss_after.is_finite(),
        "the divergence from the base is {kl}: the model's numbers overflow, or its weights are damaged"
    );
    // Rounding can leave a little less than nothing.
    Ok(Forgetting { loss_before, loss_after, kl: kl.max(0.0), tokens })
}

/// One of the two models with what runs it.
struct Side<'a> {
    pass: Pass<'a>,
    backend: Box<dyn Train>,
}

impl<'a> Side<'a> {
    fn new((model, adaptation): Measured<'a>) -> Self {
        let backend = trainer(model, adaptation, Compute::F32);
        Self { pass: Pass::evaluation(model, adaptation), backend }
    }

    fn residual(&mut self, batch: &Batch) -> Result<Tensor> {
        self.backend.residual(&self.pass, batch)
    }

    /// Logits (n, V) of some of the rows with a target, whose residual stream is (targets, C).
    fn logits(&self, residual: &Tensor, batch: &Batch, rows: std::ops::Range<usize>) -> Result<Vec<f32>> {
        let residual = residual.narrow(0, rows.start, rows.len())?;
        let (pass, rows) = (&self.pass, batch.rows(&batch.target_rows[rows]));
        let logits = on_pool(|| pass.head(&residual, &rows))?;
        Ok(logits.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Divergence of a token, and the cross-entropy of the target by both, from logits.
fn compare(p: &[f32], q: &[f32], target: usize) -> [f64; 3] {
    let (p_norm, q_norm) = (log_sum_exp(p), log_sum_exp(q));
    let log_p = |v: usize| f64::from(p[v]) - p_norm;
    let log_q = |v: usize| f64::from(q[v]) - q_norm;
    let kl = (0..p.len()).map(|v| log_p(v).exp() * (log_p(v) - log_q(v))).sum();
    [kl, -log_p(target), -log_q(target)]
}

/// `log Σ exp`, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): Σ p log(p/q) = ½ log 2 − ¼ log 2.
    #[test]
    fn the_divergence_is_that_of_the_formula_whatever_is_added_to_logits() {
        let ln2 = std::f64::consts::LN_2;
        let (p, q) = ([2f32, 1.0, 1.0].map(|x| x * ln2 as f32), [1f32, 1.0, 2.0].map(|x| x * ln2 as f32 + 80.0));
        for (value, expected) in compare(&p, &q, 0).into_iter().zip([0.25 * ln2, ln2, 2.0 * ln2]) {
            assert!((value - expected).abs() < 1e-5, "{value}, {expected}");
        }
        assert_eq!(compare(&p, &p, 1)[0], 0.0);
    }
}
