//! A base stored in another way: its linear layers through a codec, or all of it as floats of another size.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, Scope};

use anyhow::{Context, Error, Result, ensure};
use homeroom_abi::codec::{Absmax, Block};
use homeroom_abi::plan::{ModuleKind, Plan};
use homeroom_kernels::{Codec, CodecBlock, ScaleStorage, Storage, bf16};

use crate::adapt::encoded::EncodedBases;
use crate::models::weight::{NativeCodec, Weight};
use crate::models::{BaseModel, Module};
use crate::words::value_of;

/// How a base's matrices are to be stored.
#[derive(Clone, Debug)]
pub enum StoredAs {
    /// All matrices as bf16.
    Bf16,
    /// All matrices as f32.
    F32,
    /// Linear layers through a codec. The embedding and the head, which is often the same weight, stay as they are, as with
    /// bitsandbytes.
    Codec(Codec),
    /// The same, through a codec of a plugin.
    Native(Arc<dyn NativeCodec>),
}

/// Finds a native codec by its name.
pub type FindNative<'a> = &'a dyn Fn(&str) -> Result<Arc<dyn NativeCodec>>;

/// Native codecs have no word.
impl FromStr for StoredAs {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let (nf4, int8) = (Self::Codec(Codec::nf4()), Self::Codec(Codec::int8()));
        value_of(word, &[("bf16", Self::Bf16), ("f32", Self::F32), ("nf4", nf4), ("int8", int8)])
    }
}

impl StoredAs {
    fn applies(&self, module: &Module) -> bool {
        match (self, module.info.kind) {
            (_, ModuleKind::Norm) => false,
            (Self::Codec(_) | Self::Native(_), kind) => kind == ModuleKind::Linear && !module.info.output_embedding,
            _ => true,
        }
    }

    fn store(&self, weight: &Weight) -> Result<Weight> {
        let (rows, cols) = (weight.rows(), weight.cols());
        match self {
            Self::Codec(codec) => weight.encoded(codec),
            Self::Native(codec) => weight.encoded_natively(codec),
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
/// `kept` is where encoded bases are kept, if they are; `progress` hears of weights done, of all.
///
/// # Errors
/// When a weight cannot be encoded; the message names it.
pub fn store_as(
    model: &BaseModel,
    stored: &StoredAs,
    kept: Option<&EncodedBases>,
    progress: impl FnMut(usize, usize),
) -> Result<BaseModel> {
    store_each(model, |module| stored.applies(module).then_some(stored), kept, progress)
}

/// The model with its frozen weights stored as a plan asks for. Weights that are quantised already keep their storage, unless
/// `requantize`: then they are encoded from what they decode to. A plan without codecs leaves the model as it is.
///
/// `native` finds the plugin's own codec where the plan names one; `kept` is where encoded bases are kept, if they are: those of a plugin's
/// own codec are not. `progress` hears of weights done, of all.
///
/// # Errors
/// When the plan names a module or a codec that there is not, or a weight cannot be encoded.
pub fn store_as_planned(
    model: Arc<BaseModel>,
    plan: &Plan,
    requantize: bool,
    native: FindNative<'_>,
    kept: Option<&EncodedBases>,
    progress: impl FnMut(usize, usize),
) -> Result<Arc<BaseModel>> {
    let mut asked: HashMap<&str, StoredAs> = HashMap::new();
    for (path, codec) in &plan.stored {
        let codec = plan.codecs.get(*codec).with_context(|| format!("{path}: the plan has no codec {codec}"))?;
        asked.insert(path, StoredAs::Codec(kernel_codec(codec)));
    }
    for (path, name) in &plan.stored_natively {
        asked.insert(path, StoredAs::Native(native(name)?));
    }
    for path in asked.keys() {
        let module = model.module_index(path).map(|module| &model.modules[module]);
        let module = module.with_context(|| format!("the plan stores `{path}`, which the model does not have"))?;
        ensure!(module.info.kind != ModuleKind::Norm, "the plan stores `{path}` by a codec; norms stay as they are");
    }
    let stored = |module: &Module| {
        let (wanted, has) = (asked.get(module.info.path.as_str())?, module.weight.storage());
        let encodes = if requantize { !matches!(has, Storage::Coded | Storage::Native) } else { is_float(has) };
        encodes.then_some(wanted)
    };
    if !model.modules.iter().any(|module| stored(module).is_some()) {
        return Ok(model);
    }
    Ok(Arc::new(store_each(&model, stored, kept, progress)?))
}

/// Names of the plan's codecs that the model's weights are not stored by, and what they are stored as instead: what a base that
/// is quantised already keeps.
pub fn kept_storage(model: &BaseModel, plan: &Plan) -> Option<(String, String)> {
    let coded = plan.stored.iter().map(|(path, codec)| (path, &plan.codecs[*codec].name));
    coded.chain(&plan.stored_natively).find_map(|(path, wanted)| {
        let has = model.modules[model.module_index(path)?].weight.storage_name();
        (has != *wanted).then(|| (wanted.clone(), has))
    })
}

/// Whether values are stored one by one as floats.
pub(crate) fn is_float(storage: Storage) -> bool {
    matches!(storage, Storage::F32 | Storage::F16 | Storage::BF16)
}

pub(crate) fn kernel_codec(codec: &homeroom_abi::codec::Codec) -> Codec {
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
    kept: Option<&EncodedBases>,
    mut progress: impl FnMut(usize, usize),
) -> Result<BaseModel> {
    let digest = model.digest();
    // Of modules that share a weight the first.
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    let mut wanted: Vec<(&Module, &StoredAs)> = Vec::new();
    for module in &model.modules {
        if let Some(stored) = stored(module) {
            numbers.entry(&module.info.storage).or_insert_with(|| {
                wanted.push((module, stored));
                wanted.len() - 1
            });
        }
    }
    let sources: Vec<&Weight> = wanted.iter().map(|(module, _)| &*module.weight).collect();
    let paths: Vec<&str> = wanted.iter().map(|(module, _)| module.info.path.as_str()).collect();
    let by_codec = wanted.iter().map(|&(module, stored)| match stored {
        StoredAs::Codec(codec) => Some((&*module.weight, codec)),
        _ => None,
    });
    let by_codecs = by_codec.collect::<Option<Vec<_>>>();
    let weights: Vec<Weight> = thread::scope(|scope| {
        let mut ahead = None;
        let store = |number: usize| {
            if number == 0 {
                ahead = Some(read_ahead(scope, &sources));
            }
            let _ = ahead.as_ref().map(Receiver::recv);
            let (module, stored) = wanted[number];
            let weight = stored.store(&module.weight).with_context(|| module.info.path.clone())?;
            progress(number + 1, wanted.len());
            Ok(weight)
        };
        match kept.zip(by_codecs) {
            Some((kept, wanted)) => kept.weights(model, &paths, &wanted, store),
            None => (0..wanted.len()).map(store).collect::<Result<_>>(),
        }
    })?;
    let weights: Vec<Arc<Weight>> = weights.into_iter().map(Arc::new).collect();
    let mut modules = model.modules.clone();
    for module in &mut modules {
        if stored(module).is_some() {
            module.weight = weights[numbers[module.info.storage.as_str()]].clone();
        } else if module.info.kind == ModuleKind::Norm {
            // Read from a file, each would keep the matrices around it in memory that are encoded now.
            module.weight = Arc::new(module.weight.copied());
        }
    }
    // Around what was read of one weight the system may have mapped two megabytes of its neighbours, which were given back by then.
    model.release();
    model.with_storage(modules, digest)
}

/// Has the system read weights that lie in files, in turn, before they are asked for. Who asks for one waits for a word; a weight or two
/// are ahead.
fn read_ahead<'s>(scope: &'s Scope<'s, '_>, weights: &'s [&Weight]) -> Receiver<()> {
    let (ready, wait) = sync_channel(1);
    let read = move || {
        for weight in weights {
            weight.will_need();
            if ready.send(()).is_err() {
                break;
            }
        }
    };
    // Without a thread nobody sends, and nobody is waited for.
    drop(thread::Builder::new().spawn_scoped(scope, read));
    wait
}
