//! A base stored in another way: its linear layers through a codec, or all of it as floats of another size.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::{Codec, bf16};

use crate::model::{BaseModel, Module};
use crate::weight::Weight;

/// How a base's matrices are to be stored.
#[derive(Clone, Debug, PartialEq)]
pub enum StoredAs {
    /// All matrices as bf16.
    Bf16,
    /// All matrices as f32.
    F32,
    /// Linear layers through a codec. The embedding and the head, which is often the same weight, stay as they are, as with
    /// bitsandbytes.
    Codec(Codec),
}

impl StoredAs {
    fn applies(&self, module: &Module) -> bool {
        match (self, module.info.kind) {
            (_, ModuleKind::Norm) => false,
            (Self::Codec(_), kind) => kind == ModuleKind::Linear && !module.info.output_embedding,
            _ => true,
        }
    }

    fn store(&self, weight: &Weight) -> Result<Weight> {
        let (rows, cols) = (weight.rows(), weight.cols());
        match self {
            Self::Codec(codec) => weight.encoded(codec),
            Self::F32 => Weight::from_values(&weight.decode(0..rows), (rows, cols)),
            Self::Bf16 => {
                let values: Vec<bf16> = weight.decode(0..rows).into_iter().map(bf16::from_f32).collect();
                Weight::from_bf16(&values, (rows, cols))
            }
        }
    }
}

/// The model with its matrices stored otherwise; module by module, so that it is never there twice. Tied weights stay tied.
///
/// `progress` hears of modules done, of all.
///
/// # Errors
/// When a weight cannot be encoded; the message names it.
pub fn store_as(model: &BaseModel, stored: &StoredAs, mut progress: impl FnMut(usize, usize)) -> Result<BaseModel> {
    let mut modules = model.modules.clone();
    let mut done: HashMap<String, Arc<Weight>> = HashMap::new();
    let count = modules.len();
    for (number, module) in modules.iter_mut().enumerate() {
        if stored.applies(module) {
            let weight = match done.get(&module.info.storage) {
                Some(weight) => weight.clone(),
                None => Arc::new(stored.store(&module.weight).with_context(|| module.info.path.clone())?),
            };
            done.insert(module.info.storage.clone(), weight.clone());
            module.weight = weight;
        }
        progress(number + 1, count);
    }
    model.with_modules(model.config.clone(), modules)
}
