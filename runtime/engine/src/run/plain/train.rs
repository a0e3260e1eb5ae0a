//! Training by plain blocks alone: the reference, in the type of the parameters.

use anyhow::Result;
use candle_core::{Device, Tensor};
use homeroom_kernels::on_pool;

use super::block::{Keep, Plain, lowest_trained, plain_head};
use super::recipe::Pass;
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::pages::Kept;
use crate::run::waist::{LogProbs, Train, Weigh};

/// Plain blocks. They hold nothing but pages: all is in the pass.
pub struct PlainTrain {
    _pages: Kept,
}

impl PlainTrain {
    /// Pages are kept while it lives.
    pub fn keeping_pages() -> Self {
        Self { _pages: Kept::new() }
    }
}

impl Train for PlainTrain {
    fn log_probs(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<LogProbs> {
        on_pool(|| Ok(plain_head(pass, batch, &up(pass, batch)?, None)?.0))
    }

    fn residual(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<Tensor> {
        on_pool(|| {
            let rows = Tensor::from_slice(&batch.target_rows, batch.target_rows.len(), &Device::Cpu)?;
            Ok(up(pass, batch)?.index_select(&rows, 0)?)
        })
    }

    fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &Batch,
        weigh: Weigh<'_>,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<LogProbs> {
        on_pool(|| {
            let lowest = lowest_trained(pass)?;
            let mut kept = Vec::new();
            let mut h = None;
            for index in 0..=pass.model.layers.len() {
                let (output, activations) =
                    Plain::at(index).forward(pass, batch, h.as_ref(), Keep::from(index, lowest, recompute))?;
                kept.push(activations);
                h = Some(output);
            }
            let h = h.expect("the embedding is a block");
            let (log_probs, mut dh) = plain_head(pass, batch, &h, Some((weigh, gradients)))?;
            for index in (lowest..kept.len()).rev() {
                let (Some(activations), Some(above)) = (kept.pop(), dh.take()) else { break };
                dh = Plain::at(index).backward(pass, batch, activations, &above, gradients)?;
            }
            Ok(log_probs)
        })
    }

    fn words(&self) -> String {
        "f32, plain blocks".to_owned()
    }
}

/// Embedding and layers, without gradients: the residual stream (N, C).
fn up(pass: &Pass<'_>, batch: &Batch) -> Result<Tensor> {
    let mut h = pass.embed(batch)?.detach();
    for layer in 0..pass.model.layers.len() {
        h = pass.layer(layer, &h, batch, None)?.detach();
    }
    Ok(h)
}
