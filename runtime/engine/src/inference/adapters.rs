//! An adapter, bound to a base and made ready to answer. It is small beside the base, which any number of them share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};

use super::Inference;
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;
use crate::run::waist::AdapterValues;

/// An adapter on the base of an [`Inference`].
pub struct Adapter {
    /// The base with the tokenizer and chat template that the adapter was trained with.
    pub model: Arc<BaseModel>,
    pub(super) base: Arc<BaseModel>,
    /// Index of the backend that runs it, and its values there.
    pub(super) backend: usize,
    pub(super) values: Box<dyn AdapterValues>,
    generation: u64,
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
        let mut backends = inference.backends.iter().enumerate();
        let ready = backends.find_map(|(number, backend)| Some((number, backend.adapter(&adaptation)?)));
        let (backend, values) = ready.context("no backend runs its recipes")?;
        // 0 is the base alone.
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { model, base, backend, values, generation }))
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
