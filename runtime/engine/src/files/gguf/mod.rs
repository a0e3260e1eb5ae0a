//! A GGUF file: metadata and quantised tensors in one memory-mapped file, or in several, as llama.cpp writes them.
//!
//! The header (magic, version, counts), then key-value metadata, then a table of tensors, then
//! their data, aligned. Versions 2 and 3 in little-endian order are read. The file is untrusted:
//! every count, length and offset is checked against the file before anything is allocated or
//! sliced. Names and shapes mean nothing here; the model's loader gives them meaning.
//!
//! Source: the format's description, <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>,
//! and the numbers of ggml's types in `ggml.h`.

mod header;
mod number;
mod shards;
#[cfg(test)]
mod tests;
mod value;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use memmap2::Mmap;

use self::header::{Contents, parse};
pub use self::header::{TensorInfo, architecture_in};
pub use self::number::{decimal, number};
pub use self::shards::{ShardName, shard_paths};
pub use self::value::{Array, Value};
pub use self::write::{NewTensor, Writer, file_bytes};
use crate::files::mapped::map_file;
use crate::files::tensors::MappedTensor;

/// An open GGUF file, or all files of a model in several: metadata, the table of tensors, and the mappings that hold their data.
pub struct Gguf {
    files: Vec<File>,
    contents: Contents,
}

/// One of the files.
struct File {
    path: PathBuf,
    map: Arc<Mmap>,
}

impl File {
    /// Opens and maps a file, and checks all of its header.
    fn open(path: &Path) -> Result<(Self, Contents)> {
        let map = map_file(path)?;
        let contents = parse(&map).with_context(|| path.display().to_string())?;
        Ok((Self { path: path.to_owned(), map }, contents))
    }
}

impl Gguf {
    /// Opens and maps a file, and checks all of its header; tensor data is not read. Of a model in several files any one opens all
    /// of them.
    ///
    /// # Errors
    /// When the file is not a little-endian GGUF of version 2 or 3, ends early, or holds a count,
    /// length, offset, shape or type that does not fit; when others of its model are missing or
    /// do not fit it. Names the file and the key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, contents) = File::open(path)?;
        let (files, contents) = match shards::count(&contents).with_context(|| path.display().to_string())? {
            0 | 1 => (vec![file], contents),
            _ => shards::open(file, contents)?,
        };
        Ok(Self { files, contents })
    }

    /// The file's path, as it was given; the first one's of several.
    pub fn path(&self) -> &Path {
        &self.files[0].path
    }

    /// The paths of all files of the model.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The whole file that a tensor lies in; [`TensorInfo::range`] is within it.
    pub fn map(&self, tensor: &TensorInfo) -> &Arc<Mmap> {
        &self.files[tensor.file].map
    }

    /// A tensor's bytes in the file that it lies in.
    pub fn mapped(&self, tensor: &TensorInfo) -> MappedTensor {
        MappedTensor {
            map: self.map(tensor).clone(),
            range: tensor.range.clone(),
            shape: tensor.shape.clone(),
            storage: tensor.storage,
        }
    }

    /// All entries of the metadata, by key.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        let mut entries: Vec<_> = self.contents.metadata.iter().collect();
        entries.sort_by_key(|(key, _)| *key);
        entries.into_iter()
    }

    /// A metadata value as it is stored.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.contents.metadata.get(key)
    }

    /// A string; `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is of another type; so too for the getters below. Names the file and the key.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.read(key, "a string", |value| match value {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// An integer of any width that is not negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.read(key, "an integer of at least 0", Value::as_u64)
    }

    /// A float; one stored in 64 bits is rounded.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.read(key, "a float", |value| match *value {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        })
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", |value| match *value {
            Value::Bool(x) => Some(x),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.read(key, "an array of strings", |value| match value {
            Value::Array(Array::String(x)) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// An array of 32-bit floats.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.read(key, "an array of 32-bit floats", |value| match value {
            Value::Array(Array::F32(x)) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any width, each below 2^63.
    pub fn i64s(&self, key: &str) -> Result<Option<Vec<i64>>> {
        fn widen<T: Copy + Into<i64>>(x: &[T]) -> Option<Vec<i64>> {
            Some(x.iter().map(|&x| x.into()).collect())
        }
        self.read(key, "an array of integers", |value| match value {
            Value::Array(Array::U8(x)) => widen(x),
            Value::Array(Array::I8(x)) => widen(x),
            Value::Array(Array::U16(x)) => widen(x),
            Value::Array(Array::I16(x)) => widen(x),
            Value::Array(Array::U32(x)) => widen(x),
            Value::Array(Array::I32(x)) => widen(x),
            Value::Array(Array::I64(x)) => widen(x),
            Value::Array(Array::U64(x)) => x.iter().map(|&x| x.try_into().ok()).collect(),
            _ => None,
        })
    }

    /// All tensors, in the files' order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.contents.tensors.iter()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// When the file has none. Names the file and the tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let idx = self.contents.tensor_idx.get(name);
        let idx = idx.with_context(|| format!("{}: has no tensor {name}", self.path().display()))?;
        Ok(&self.contents.tensors[*idx])
    }

    /// Reads one key as the type that `as_type` picks out.
    fn read<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        as_type: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let found = value.describe();
        let wrong = || anyhow!("{}: {key}: is {found}, expected {wanted}", self.path().display());
        as_type(value).map(Some).ok_or_else(wrong)
    }
}
