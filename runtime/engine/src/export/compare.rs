//! How far an export's predictions are from those of the model that was trained.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Tensor};

use crate::run::batch::Batch;
use crate::run::plain::recipe::Pass;

/// Mean Kullback-Leibler divergence of `other`'s predictions from `model`'s over all positions of some token sequences, in
/// nats: what answering by `other` loses.
///
/// # Errors
/// When there is no position, or a tensor operation fails.
pub fn divergence(model: &Pass<'_>, other: &Pass<'_>, sequences: &[Vec<u32>]) -> Result<f64> {
    let (mut total, mut positions) = (0.0, 0);
    for ids in sequences.iter().filter(|ids| !ids.is_empty()) {
        let batch = Batch::of_tokens(ids, 0);
        let log_probabilities = |pass: &Pass<'_>| -> Result<Tensor> {
            Ok(candle_nn::ops::log_softmax(&pass.logits(&batch)?.to_dtype(DType::F64)?, D::Minus1)?)
        };
        let (p, q) = (log_probabilities(model)?, log_probabilities(other)?);
        total += (p.exp()? * (p - q)?)?.sum_all()?.to_scalar::<f64>()?;
        positions += ids.len();
    }
    ensure!(positions > 0, "there is no text to compare on");
    Ok(total / positions as f64)
}
