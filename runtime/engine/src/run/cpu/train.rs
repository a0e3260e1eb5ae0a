//! Training by fused blocks, and by plain ones where a recipe is no low-rank update.

use anyhow::Result;
use candle_core::Tensor;
use homeroom_kernels::{ProductElement, bf16, on_pool};

use super::{Fused, InIntegers, Updates};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::pages::Kept;
use crate::run::plain::recipe::Pass;
use crate::run::waist::{LogProbs, Train, Weigh};

/// The blocks of a model with what is adapted of it.
pub struct CpuTrain<E> {
    blocks: Fused<E>,
    updates: Updates<E>,
    /// Where a block is plain.
    _pages: Option<Kept>,
}

impl<E: ProductElement> CpuTrain<E> {
    /// Decides for each block how it is run. `integers`: multiply in integers where a weight's storage allows it.
    pub fn new(model: &BaseModel, adaptation: Option<&Adaptation>, integers: bool) -> Self {
        let blocks = Fused::new(model, if integers { InIntegers::All } else { InIntegers::None });
        let updates = blocks.updates(model, adaptation, false);
        let (fused, layers, head) = blocks.counts(&updates);
        let pages = (fused < layers || !head).then(Kept::new);
        Self { blocks, updates, _pages: pages }
    }
}

impl<E: ProductElement> Train for CpuTrain<E> {
    fn log_probs(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<LogProbs> {
        on_pool(|| {
            self.updates.load(pass)?;
            self.blocks.log_probs(pass, &self.updates, batch)
        })
    }

    fn residual(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<Tensor> {
        on_pool(|| {
            self.updates.load(pass)?;
            self.blocks.residual(pass, &self.updates, batch)
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
            // An optimizer may have changed them since the pass before.
            self.updates.load(pass)?;
            self.blocks.forward_backward(pass, &self.updates, batch, weigh, recompute, gradients)
        })
    }

    fn in_integers(&self) -> bool {
        self.blocks.in_integers(&self.updates)
    }

    fn words(&self) -> String {
        let name = if size_of::<E>() == size_of::<bf16>() { "bf16" } else { "f32" };
        let (fused, layers, head) = self.blocks.counts(&self.updates);
        let name = if self.in_integers() { format!("{name}, frozen weights in integers") } else { name.to_owned() };
        match (fused, head) {
            (0, false) => "f32, plain blocks".to_owned(),
            _ if fused == layers && head => format!("{name}, fused blocks"),
            _ if fused == layers => format!("{name}, fused blocks; the head plain in f32"),
            _ => {
                let head = if head { "" } else { " and the head" };
                format!("{name}, fused blocks; {} of {layers} layers{head} plain in f32", layers - fused)
            }
        }
    }
}
