//! How far the predictions of two models are apart: a base and what was trained of it, or that and what it was exported as.

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};
use homeroom_kernels::on_pool;
use rayon::prelude::*;

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

/// How far another model's predictions are from those of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// The one's mean cross-entropy of the trained tokens, in nats.
    pub loss: f64,
    /// The other's.
    pub loss_other: f64,
    /// Mean of KL(one‖other) over these tokens, in nats a token.
    pub kl: f64,
    /// The largest difference of a log-probability, of any token of the vocabulary at any of these places.
    pub largest: f64,
    /// The tokens.
    pub tokens: usize,
}

/// A model that is measured: a base, perhaps with what is adapted of it.
pub type Measured<'a> = (&'a BaseModel, Option<&'a Adaptation>);

/// Compares two models over the trained tokens of some examples, both in f32.
///
/// The divergence is the sum over the whole vocabulary, in f64. It costs a pass of each model, and logits of some rows of both at once.
/// `sparing`: pages of mapped weights are given back on the way, so that two large models take no more memory than a layer of each.
///
/// `progress` is told how many examples are done; what it fails with ends the measurement.
///
/// # Errors
/// When the models have other vocabularies, no token is trained, a tensor operation fails, or a number is not finite.
pub fn difference(
    one: Measured<'_>,
    other: Measured<'_>,
    examples: &[&Example],
    sparing: bool,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Difference> {
    let [vocab, others] = [one, other].map(|(model, _)| model.architecture.vocab_size);
    ensure!(vocab == others, "one model knows {vocab} tokens, the other {others}: they cannot be compared");
    let (mut one, mut other) = (Side::new(one, sparing), Side::new(other, sparing));
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    let (mut total, mut largest, mut tokens, mut done) = ([0.0; 3], 0f64, 0, 0);
    let chunk = (LOGITS_CHUNK / vocab).max(CHUNK_ROWS);
    for batch in Batch::packed(&units, PASS_ROWS) {
        let p = one.residual(&batch)?;
        let q = other.residual(&batch)?; // (targets, C)
        for from in (0..batch.targets.len()).step_by(chunk) {
            let rows = from..batch.targets.len().min(from + chunk);
            let p = one.logits(&p, &batch, rows.clone())?;
            let q = other.logits(&q, &batch, rows.clone())?; // (n, V)
            let of_rows = p.par_chunks(vocab).zip(q.par_chunks(vocab)).zip(&batch.targets[rows]);
            let of_rows: Vec<_> = of_rows.map(|((p, q), target)| compare(p, q, *target as usize)).collect();
            // In order, so that the sum has the same bits whatever the number of threads.
            for (row, apart) in of_rows {
                total.iter_mut().zip(row).for_each(|(total, value)| *total += value);
                largest = largest.max(apart);
            }
        }
        tokens += batch.targets.len();
        done += batch.sequences.len();
        progress(done)?;
    }
    ensure!(tokens > 0, "no token of these examples is trained, so there is nothing to compare");
    whole()?;
    let [kl, loss, loss_other] = total.map(|sum| sum / tokens as f64);
    ensure!(
        kl.is_finite() && loss.is_finite() && loss_other.is_finite(),
        "the divergence of the two models is {kl}: the numbers of one overflow, or its weights are damaged"
    );
    // Rounding can leave a little less than nothing.
    Ok(Difference { loss, loss_other, kl: kl.max(0.0), largest, tokens })
}

/// One of the two models with what runs it.
struct Side<'a> {
    pass: Pass<'a>,
    backend: Box<dyn Train>,
}

impl<'a> Side<'a> {
    fn new((model, adaptation): Measured<'a>, sparing: bool) -> Self {
        let backend = trainer(model, adaptation, Compute::F32);
        Self { pass: Pass { sparing, ..Pass::evaluation(model, adaptation) }, backend }
    }

    fn residual(&mut self, batch: &Batch) -> Result<Tensor> {
        self.backend.residual(&self.pass, batch)
    }

    /// Logits (n, V) of some of the rows with a target, whose residual stream is (targets, C).
    fn logits(&self, residual: &Tensor, batch: &Batch, rows: std::ops::Range<usize>) -> Result<Vec<f32>> {
        let residual = residual.narrow(0, rows.start, rows.len())?;
        let (pass, rows) = (&self.pass, batch.rows(&batch.target_rows[rows]));
        let logits = on_pool(|| pass.head(&residual, &rows))?;
        self.pass.release_all();
        Ok(logits.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Divergence of a token, and the cross-entropy of the target by both, from logits; and the largest difference of a log-probability.
fn compare(p: &[f32], q: &[f32], target: usize) -> ([f64; 3], f64) {
    let (p_norm, q_norm) = (log_sum_exp(p), log_sum_exp(q));
    let log_p = |v: usize| f64::from(p[v]) - p_norm;
    let log_q = |v: usize| f64::from(q[v]) - q_norm;
    let (mut kl, mut largest) = (0.0, 0f64);
    for v in 0..p.len() {
        let apart = log_p(v) - log_q(v);
        kl += log_p(v).exp() * apart;
        largest = largest.max(apart.abs());
    }
    ([kl, -log_p(target), -log_q(target)], largest)
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
        let ([kl, loss, other], largest) = compare(&p, &q, 0);
        for (value, expected) in [(kl, 0.25 * ln2), (loss, ln2), (other, 2.0 * ln2), (largest, ln2)] {
            assert!((value - expected).abs() < 1e-5, "{value}, {expected}");
        }
        assert_eq!((compare(&p, &p, 1).0[0], compare(&p, &p, 1).1), (0.0, 0.0));
    }
}
