//! Merging: the adapted modules' effective weights in place of the frozen ones, module by module.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use sha2::{Digest, Sha256};

use crate::adapt::adaptation::Adaptation;
use crate::models::weight::Weight;
use crate::models::{Architecture, BaseModel, EMBEDDING, HEAD, Module};
use crate::run::plain::recipe::Pass;

/// A base and what is adapted of it as one model, merged module by module as each is asked for: no more than one is in memory.
pub struct Merged<'a> {
    base: &'a BaseModel,
    adaptation: Option<&'a Adaptation>,
    architecture: Architecture,
}

impl<'a> Merged<'a> {
    /// What an adapted base amounts to; without an adaptation the base itself.
    ///
    /// Tied weights stay tied when both sides come to the same values; else each side gets its own.
    ///
    /// # Errors
    /// When the strategy cannot be merged.
    pub fn new(base: &'a BaseModel, adaptation: Option<&'a Adaptation>) -> Result<Self> {
        let mut merged = Self { base, adaptation, architecture: base.architecture.clone() };
        let Some(adaptation) = adaptation else { return Ok(merged) };
        for (index, module) in base.modules.iter().enumerate() {
            let Some(adapted) = adaptation.of(index) else { continue };
            let recipes = &adaptation.plan.recipes[adapted.recipe];
            let path = &module.info.path;
            let weight = recipes.merged_weight.as_ref();
            weight.with_context(|| format!("{path}: this strategy cannot be merged into the base"))?;
        }
        if base.architecture.tie_word_embeddings {
            merged.architecture.tie_word_embeddings = merged.stays_tied()?;
        }
        Ok(merged)
    }

    /// The base.
    pub fn base(&self) -> &'a BaseModel {
        self.base
    }

    /// What is adapted of it.
    pub fn adaptation(&self) -> Option<&'a Adaptation> {
        self.adaptation
    }

    /// What the merged model computes: the base's, but for the tie of its embedding and head.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// A module with its effective weight: as the base stores it if it is not adapted, else f32 in memory. Modules are those of the base in
    /// their order; a head that is tied has the embedding's weight.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn module(&self, index: usize) -> Result<Module> {
        let module = &self.base.modules[index];
        let source = self.source(index);
        let (weight, bias) = match self.adaptation.filter(|adaptation| adaptation.of(source).is_some()) {
            None => (self.base.modules[source].weight.clone(), module.bias.clone()),
            Some(_) => {
                let (weight, bias) = Pass::evaluation(self.base, self.adaptation).merged(source)?;
                let values: Vec<f32> = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let weight = Weight::from_values(&values, (module.weight.rows(), module.weight.cols()))?;
                // What was read of the base for it is not read again.
                self.base.modules[source].weight.release();
                let bias = match bias {
                    Some(bias) => Some(Arc::new(bias.to_dtype(DType::F32)?.to_vec1()?)),
                    None => module.bias.clone(),
                };
                (Arc::new(weight), bias)
            }
        };
        let mut info = module.info.clone();
        info.bias = bias.is_some();
        if self.base.architecture.tie_word_embeddings && !self.architecture.tie_word_embeddings && info.path == HEAD {
            info.storage = HEAD.to_owned();
        }
        Ok(Module { info, weight, bias })
    }

    /// The module whose values are a module's: the embedding's are those of a head that is tied.
    fn source(&self, index: usize) -> usize {
        let tied = self.architecture.tie_word_embeddings && self.base.modules[index].info.path == HEAD;
        tied.then(|| self.base.module_index(EMBEDDING)).flatten().unwrap_or(index)
    }

    /// Whether both sides of a tied weight come to the same values. One after the other is in memory.
    fn stays_tied(&self) -> Result<bool> {
        let Some(adaptation) = self.adaptation else { return Ok(true) };
        let at = |path| self.base.module_index(path).context("a model has an embedding and a head");
        let (embedding, head) = (at(EMBEDDING)?, at(HEAD)?);
        if adaptation.of(embedding).is_none() && adaptation.of(head).is_none() {
            return Ok(true);
        }
        let architecture = Architecture { tie_word_embeddings: false, ..self.architecture.clone() };
        let untied = Self { base: self.base, adaptation: self.adaptation, architecture };
        let digest = |index: usize| -> Result<_> {
            let weight = untied.module(index)?.weight;
            let mut hash = Sha256::new();
            for rows in weight.panels() {
                // Zeros of either sign are the same weight.
                weight.decode(rows).iter().for_each(|value| hash.update((value + 0.0).to_le_bytes()));
            }
            weight.release();
            Ok(hash.finalize())
        };
        Ok(digest(embedding)? == digest(head)?)
    }
}

/// The model that an adapted one amounts to, all of it in memory, as f32 where modules were adapted.
///
/// # Errors
/// As [`Merged::new`] and [`Merged::module`].
pub fn merge(model: &BaseModel, adaptation: &Adaptation) -> Result<BaseModel> {
    let merged = Merged::new(model, Some(adaptation))?;
    let mut modules = Vec::with_capacity(model.modules.len());
    for index in 0..model.modules.len() {
        let mut module = merged.module(index)?;
        if merged.source(index) != index {
            let tied: &Module = &modules[merged.source(index)];
            module.weight = tied.weight.clone();
        }
        modules.push(module);
    }
    model.with_modules(merged.architecture, modules)
}
