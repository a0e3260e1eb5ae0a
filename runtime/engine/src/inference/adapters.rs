//! An adapter, bound to a base and made ready to answer. It is small beside the base, which any number of them share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use homeroom_kernels::bf16;

use super::Inference;
use super::passes::{Blocks, Ready};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;

/// An adapter on the base of an [`Inference`].
pub struct Adapter {
    /// The base with the tokenizer and chat template that the adapter was trained with.
    pub model: Arc<BaseModel>,
    pub(super) base: Arc<BaseModel>,
    pub(super) adaptation: Arc<Adaptation>,
    pub(super) updates: AdapterUpdates,
    generation: u64,
}

/// What an adapter adds to the blocks of its base.
pub(super) enum AdapterUpdates {
    F32(Ready<f32>),
    Bf16(Ready<bf16>),
    /// Recipes that are no low-rank updates: candle operations, one sequence after another.
    Plain,
}

impl Adapter {
    /// Makes an adapter ready with its present values: low-rank updates keep them whatever happens to the parameters later. `model` is
    /// the base, or the base with the adapter's own tokenizer and template.
    ///
    /// # Errors
    /// When `model` has other weights than the base.
    pub fn new(inference: &Inference, model: Arc<BaseModel>, adaptation: Arc<Adaptation>) -> Result<Arc<Self>> {
        let base = inference.model.clone();
        let mut weights = base.modules.iter().zip(&model.modules);
        ensure!(
            base.modules.len() == model.modules.len() && weights.all(|(a, b)| Arc::ptr_eq(&a.weight, &b.weight)),
            "{}: the adapter belongs to a base with other weights",
            model.path.display()
        );
        let updates = match &inference.blocks {
            Blocks::F32(fast) => fast.ready(&base, Some(&adaptation)).map(AdapterUpdates::F32),
            Blocks::Bf16(fast) => fast.ready(&base, Some(&adaptation)).map(AdapterUpdates::Bf16),
            Blocks::Plain => None,
        };
        let updates = updates.unwrap_or(AdapterUpdates::Plain);
        // 0 is the base alone.
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { model, base, adaptation, updates, generation }))
    }

    /// Whether it was made ready on this base.
    pub fn is_on(&self, base: &Arc<BaseModel>) -> bool {
        Arc::ptr_eq(&self.base, base)
    }

    /// Returns a number that no other adapter of this process has, whatever its name; never 0.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}
