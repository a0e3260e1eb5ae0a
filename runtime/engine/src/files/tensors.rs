//! The tensors of a model's files, memory-mapped and checked before anything reads them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use homeroom_kernels::{RowOrder, Storage};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::files::mapped::map_file;
use crate::files::{SMALL_FILE_BYTES_MAX, is_named, read_text};
use crate::models::weight::Weight;

/// One tensor in a mapped file.
#[derive(Clone)]
pub struct MappedTensor {
    /// The file.
    pub map: Arc<Mmap>,
    /// Its bytes in the file.
    pub range: Range<usize>,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its element type or block format; [`Storage::Coded`]: bytes, which mean something beside other tensors only.
    pub storage: Storage,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, MappedTensor>;

/// Shapes and values of tensors by name.
pub type TensorValues = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Files of a directory's weights.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A buffer that is no weight.
const POSITION_IDS: &str = "embeddings.position_ids";

/// Whether a Hugging Face directory has weights that are read here, or says that it has.
pub fn has_safetensors(dir: &Path) -> bool {
    let named = |name: &str| is_named(&dir.join(name)).unwrap_or(true);
    named(SINGLE) || named(INDEX)
}

/// Files of the weights of a Hugging Face directory with the names of the tensors that are read of each, `None`: all. They are
/// `model.safetensors`, or the shards that its index names. Where both are there, it is the one file, as with transformers
/// (`modeling_utils._get_resolved_checkpoint_files`): the index is of an older save.
fn weight_map(dir: &Path) -> Result<Vec<(PathBuf, Option<Vec<String>>)>> {
    if is_named(&dir.join(SINGLE))? {
        return Ok(vec![(dir.join(SINGLE), None)]);
    }
    let index = dir.join(INDEX);
    ensure!(is_named(&index)?, "{}: {}", dir.display(), instead_of_weights(dir));
    let text = read_text(&index, SMALL_FILE_BYTES_MAX)?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{}: not JSON", index.display()))?;
    let weight_map = json.get("weight_map").and_then(Value::as_object);
    let weight_map = weight_map.with_context(|| format!("{}: `weight_map` is missing", index.display()))?;
    let mut names: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, shard) in weight_map {
        let shard = shard.as_str().with_context(|| format!("{}: `{name}` names no file", index.display()))?;
        let plain = Path::new(shard).file_name().is_some_and(|file| file == shard);
        ensure!(plain, "{}: `{shard}` is not a file name", index.display());
        names.entry(shard).or_default().push(name.clone());
    }
    let missing: Vec<&str> = names.keys().copied().filter(|shard| !dir.join(shard).exists()).collect();
    ensure!(
        missing.is_empty(),
        "{}: {} of the {} files that it names are not there: {}; download or copy them to it",
        index.display(),
        missing.len(),
        names.len(),
        missing.join(", ")
    );
    Ok(names.into_iter().map(|(shard, names)| (dir.join(shard), Some(names))).collect())
}

/// Files of the weights of a Hugging Face directory.
///
/// # Errors
/// When one is missing, or lies outside the directory.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(weight_map(dir)?.into_iter().map(|(file, _)| file).collect())
}

/// Maps the weights of a Hugging Face directory.
///
/// # Errors
/// When a file is missing, truncated or inconsistent, a shard lies outside the directory, or a type is not known.
pub fn map_directory(dir: &Path) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for (path, names) in weight_map(dir)? {
        let mut held = map_safetensors(&path)?;
        let Some(names) = names else { return Ok(held) };
        for name in names {
            let tensor = held.remove(&name);
            let tensor = tensor.with_context(|| format!("{}: tensor `{name}` is missing", path.display()))?;
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// What to say of a directory that has no weights as they are read here.
fn instead_of_weights(dir: &Path) -> String {
    let there = |name: &&&str| dir.join(name).exists();
    let torch = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    if let Some(name) = torch.iter().find(there) {
        return format!(
            "its weights are in {name} only, which can run code and is not read; save them as safetensors, in Python: \
             transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype=\"auto\").save_pretrained(NEW_DIR)"
        );
    }
    let others = ["consolidated.safetensors", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack"];
    match others.iter().find(there) {
        Some(name) => {
            format!("its weights are in {name} only, which is not read; {SINGLE} is, as transformers saves it")
        }
        None => format!("neither {SINGLE} nor {INDEX} is there; download or copy the weights, too"),
    }
}

/// Maps one safetensors file.
///
/// # Errors
/// When it is missing, truncated or inconsistent, or holds a type that is neither a float of 16 or 32 bits nor bytes.
pub fn map_safetensors(path: &Path) -> Result<Tensors> {
    let map = map_file(path)?;
    let parsed = SafeTensors::deserialize(&map);
    let parsed = parsed.map_err(|error| {
        anyhow::anyhow!("{}: not a whole safetensors file ({error}); download or copy it again", path.display())
    })?;
    let start = map.as_ptr() as usize;
    // Older saves of BERT's family hold a list of all positions, which transformers does not read either.
    let read = parsed
        .tensors()
        .into_iter()
        .filter(|(name, view)| !(view.dtype() == Dtype::I64 && name.ends_with(POSITION_IDS)));
    let tensors = read.map(|(name, view)| {
        let storage = match view.dtype() {
            Dtype::F32 => Storage::F32,
            Dtype::F16 => Storage::F16,
            Dtype::BF16 => Storage::BF16,
            Dtype::U8 | Dtype::I8 => Storage::Coded,
            other => bail!(
                "{}: tensor `{name}` is of type {other:?}; known are F32, F16, BF16, and U8 and I8 as bitsandbytes uses them",
                path.display()
            ),
        };
        let offset = view.data().as_ptr() as usize - start;
        let range = offset..offset + view.data().len();
        Ok((name, MappedTensor { map: map.clone(), range, shape: view.shape().to_vec(), storage }))
    });
    tensors.collect()
}

impl MappedTensor {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// The values, for small tensors and adapters.
    ///
    /// # Errors
    /// When the shape does not fit the bytes, or they are no floats.
    pub fn values(&self) -> Result<Vec<f32>> {
        let weight = self.weight()?;
        Ok(weight.decode(0..weight.rows()))
    }

    /// It as rows of its last dimension.
    ///
    /// # Errors
    /// As [`MappedTensor::values`].
    pub fn weight(&self) -> Result<Weight> {
        let shape = match *self.shape.as_slice() {
            [] => (1, 1),
            [cols] => (1, cols),
            [ref rows @ .., cols] => (rows.iter().product(), cols),
        };
        Weight::mapped(self.map.clone(), self.range.clone(), self.storage, shape, RowOrder::Natural)
    }
}
