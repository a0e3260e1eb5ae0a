//! The tensors of a model's files, memory-mapped and checked before anything reads them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use homeroom_kernels::Storage;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::files::{SMALL_FILE_BYTES_MAX, read_text};
use crate::mapped::map_file;

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

/// Maps the weights of a Hugging Face directory: `model.safetensors`, or the shards that its index names.
///
/// # Errors
/// When a file is missing, truncated or inconsistent, a shard lies outside the directory, or a type is not known.
pub fn map_directory(dir: &Path) -> Result<Tensors> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        let single = dir.join("model.safetensors");
        if !single.exists() && dir.join("pytorch_model.bin").exists() {
            bail!("{}: only pytorch_model.bin is there; save it again as safetensors", dir.display());
        }
        return map_safetensors(&single);
    }
    let text = read_text(&index, SMALL_FILE_BYTES_MAX)?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{}: not JSON", index.display()))?;
    let weight_map = json.get("weight_map").and_then(Value::as_object);
    let weight_map = weight_map.with_context(|| format!("{}: `weight_map` is missing", index.display()))?;
    let mut shards: HashMap<PathBuf, Tensors> = HashMap::new();
    let mut tensors = Tensors::new();
    for (name, shard) in weight_map {
        let shard = shard.as_str().with_context(|| format!("{}: `{name}` names no file", index.display()))?;
        let plain = Path::new(shard).file_name().is_some_and(|file| file == shard);
        ensure!(plain, "{}: `{shard}` is not a file name", index.display());
        let path = dir.join(shard);
        if !shards.contains_key(&path) {
            shards.insert(path.clone(), map_safetensors(&path)?);
        }
        let tensor = shards[&path].get(name);
        let tensor = tensor.with_context(|| format!("{}: tensor `{name}` is missing", path.display()))?;
        tensors.insert(name.clone(), tensor.clone());
    }
    Ok(tensors)
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
    let tensors = parsed.tensors().into_iter().map(|(name, view)| {
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
        let (rows, cols) = match *self.shape.as_slice() {
            [] => (1, 1),
            [cols] => (1, cols),
            [ref rows @ .., cols] => (rows.iter().product(), cols),
        };
        let order = homeroom_kernels::RowOrder::Natural;
        let weight =
            crate::weight::Weight::mapped(self.map.clone(), self.range.clone(), self.storage, (rows, cols), order)?;
        Ok(weight.decode(0..rows))
    }
}
