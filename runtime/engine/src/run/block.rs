//! Blocks: what the engine runs forward and backward as one operation, and how each is run.
//!
//! Forward keeps what each block's backward needs, or with recomputation its input alone; backward goes block by block and
//! drops what it used. [`Blocks::new`] decides for each block whether it is run fused (see [`super::cpu`]) or plain (see
//! [`super::plain`]), which runs any recipe. Below the lowest block with a trainable parameter nothing is kept and nothing is
//! differentiated.

use anyhow::Result;
use candle_core::DType;
use homeroom_kernels::{ProductElement, bf16, cpu, on_pool};

use super::batch::Batch;
use super::compute::Compute;
use super::cpu::{Fused, How, Updates};
use super::gradients::Gradients;
use super::outcome::Outcome;
use super::plain::recipe::Pass;
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;

/// The blocks of a model with what is adapted of it, each with how it is run.
pub enum Blocks {
    /// Blocks in f32, fused or plain.
    F32(Box<(Fused<f32>, Updates<f32>)>),
    /// Fused blocks in bf16; plain ones are in f32.
    Bf16(Box<(Fused<bf16>, Updates<bf16>)>),
}

impl Blocks {
    /// Decides how each block is run: fused where its recipes allow, else plain.
    pub fn new(model: &BaseModel, adaptation: Option<&Adaptation>, compute: Compute) -> Self {
        fn adapted<E: ProductElement>(
            model: &BaseModel,
            adaptation: Option<&Adaptation>,
            how: How,
        ) -> Box<(Fused<E>, Updates<E>)> {
            let blocks = Fused::new(model, how);
            let updates = blocks.updates(model, adaptation);
            Box::new((blocks, updates))
        }
        let f32_params =
            adaptation.iter().flat_map(|adaptation| &adaptation.params).all(|p| p.var.dtype() == DType::F32);
        let compute = compute.resolved(adaptation);
        let how = How { fuse: f32_params && compute != Compute::Plain, integers: compute == Compute::Int8 };
        // Beside integers few products are left, and bf16 halves what is kept.
        let in_bf16 = compute == Compute::Bf16 || compute == Compute::Int8 && cpu().has_bf16();
        match in_bf16 && how.fuse {
            true => Self::Bf16(adapted(model, adaptation, how)),
            false => Self::F32(adapted(model, adaptation, how)),
        }
    }

    /// Whether a frozen weight is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        match self {
            Self::F32(adapted) => adapted.0.in_integers(&adapted.1),
            Self::Bf16(adapted) => adapted.0.in_integers(&adapted.1),
        }
    }

    /// How blocks are run, in words for the line that restates a run.
    pub fn words(&self) -> String {
        let (name, (fused, layers, head)) = match self {
            Self::F32(adapted) => ("f32", adapted.0.counts(&adapted.1)),
            Self::Bf16(adapted) => ("bf16", adapted.0.counts(&adapted.1)),
        };
        let name = if self.in_integers() { format!("{name}, frozen weights in integers") } else { name.to_owned() };
        match (fused, head) {
            (0, false) => "f32, plain blocks".to_owned(),
            _ if fused == layers && head => format!("{name}, fused blocks"),
            _ => {
                let head = if head { "" } else { " and the head" };
                format!("{name}, fused blocks; {} of {layers} layers{head} plain in f32", layers - fused)
            }
        }
    }

    /// Loss of a batch, without gradients.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn evaluate(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<Outcome> {
        fn run<E: ProductElement>(
            (blocks, updates): &mut (Fused<E>, Updates<E>),
            pass: &Pass<'_>,
            batch: &Batch,
        ) -> Result<Outcome> {
            on_pool(|| {
                updates.load(pass)?;
                blocks.evaluate(pass, updates, batch)
            })
        }
        match self {
            Self::F32(adapted) => run(adapted, pass, batch),
            Self::Bf16(adapted) => run(adapted, pass, batch),
        }
    }

    /// Loss of a batch; the gradients of `scale` times its sum are added to `gradients`. `recompute`: keep the input of each
    /// block alone and run it again in backward; that changes no bit of the result.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &Batch,
        scale: f64,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<Outcome> {
        fn run<E: ProductElement>(
            (blocks, updates): &mut (Fused<E>, Updates<E>),
            pass: &Pass<'_>,
            batch: &Batch,
            (scale, recompute): (f64, bool),
            gradients: &mut Gradients,
        ) -> Result<Outcome> {
            on_pool(|| {
                // An optimizer may have changed them since the pass before.
                updates.load(pass)?;
                blocks.forward_backward(pass, updates, batch, scale, recompute, gradients)
            })
        }
        match self {
            Self::F32(adapted) => run(adapted, pass, batch, (scale, recompute), gradients),
            Self::Bf16(adapted) => run(adapted, pass, batch, (scale, recompute), gradients),
        }
    }
}
