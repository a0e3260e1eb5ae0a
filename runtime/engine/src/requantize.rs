//! A base stored in another way: its linear layers through a codec, or all of it as floats of another size.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use homeroom_abi::codec::{Absmax, Block};
use homeroom_abi::plan::{ModuleKind, Plan};
use homeroom_kernels::{Codec, CodecBlock, ScaleStorage, Storage, bf16};

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
pub fn store_as(model: &BaseModel, stored: &StoredAs, progress: impl FnMut(usize, usize)) -> Result<BaseModel> {
    store_each(model, |module| stored.applies(module).then_some(stored), progress)
}

/// The model with its frozen weights stored as a plan asks for. Weights that are quantised already keep their storage, unless
/// `requantize`: then they are encoded from what they decode to. A plan without codecs leaves the model as it is.
///
/// `progress` hears of modules done, of all.
///
/// # Errors
/// When the plan names a module or a codec that there is not, or a weight cannot be encoded.
pub fn store_as_planned(
    model: Arc<BaseModel>,
    plan: &Plan,
    requantize: bool,
    progress: impl FnMut(usize, usize),
) -> Result<Arc<BaseModel>> {
    let codecs: Vec<StoredAs> = plan.codecs.iter().map(|codec| StoredAs::Codec(kernel_codec(codec))).collect();
    for (path, codec) in &plan.stored {
        match model.module_index(path) {
            None => bail!("the plan stores `{path}`, which the model does not have"),
            Some(module) if model.modules[module].info.kind == ModuleKind::Norm => {
                bail!("the plan stores `{path}` by a codec; norms stay as they are")
            }
            Some(_) if *codec >= codecs.len() => bail!("{path}: the plan has no codec {codec}"),
            Some(_) => {}
        }
    }
    let asked = |module: &Module| plan.stored.get(&module.info.path).map(|codec| &codecs[*codec]);
    let stored = |module: &Module| {
        let (wanted, has) = (asked(module)?, module.weight.storage());
        let encodes = if requantize { has != Storage::Coded } else { is_float(has) };
        encodes.then_some(wanted)
    };
    if !model.modules.iter().any(|module| stored(module).is_some()) {
        return Ok(model);
    }
    Ok(Arc::new(store_each(&model, stored, progress)?))
}

/// Names of the plan's codecs that the model's weights are not stored by, and what they are stored as instead: what a base that
/// is quantised already keeps.
pub fn kept_storage(model: &BaseModel, plan: &Plan) -> Option<(String, String)> {
    plan.stored.iter().find_map(|(path, codec)| {
        let (wanted, has) = (&plan.codecs[*codec].name, &model.modules[model.module_index(path)?].weight);
        (has.storage_name() != *wanted).then(|| (wanted.clone(), has.storage_name()))
    })
}

/// Whether values are stored one by one as floats.
pub(crate) fn is_float(storage: Storage) -> bool {
    matches!(storage, Storage::F32 | Storage::F16 | Storage::BF16)
}

fn kernel_codec(codec: &homeroom_abi::codec::Codec) -> Codec {
    Codec {
        name: codec.name.clone(),
        bits: codec.bits,
        block: match codec.block {
            Block::Flat(len) => CodecBlock::Flat(len),
            Block::Row => CodecBlock::Row,
        },
        code: codec.code.clone(),
        scales: match &codec.absmax {
            Absmax::F32 => ScaleStorage::F32,
            Absmax::Nested { block, code } => ScaleStorage::Nested { block: *block, code: code.clone() },
        },
    }
}

fn store_each<'a>(
    model: &BaseModel,
    stored: impl Fn(&Module) -> Option<&'a StoredAs>,
    mut progress: impl FnMut(usize, usize),
) -> Result<BaseModel> {
    let digest = model.digest();
    let mut modules = model.modules.clone();
    let mut done: HashMap<String, Arc<Weight>> = HashMap::new();
    let count = modules.len();
    for (number, module) in modules.iter_mut().enumerate() {
        if let Some(stored) = stored(module) {
            let weight = match done.get(&module.info.storage) {
                Some(weight) => weight.clone(),
                None => Arc::new(stored.store(&module.weight).with_context(|| module.info.path.clone())?),
            };
            done.insert(module.info.storage.clone(), weight.clone());
            module.weight = weight;
        }
        progress(number + 1, count);
    }
    model.with_storage(modules, digest)
}
