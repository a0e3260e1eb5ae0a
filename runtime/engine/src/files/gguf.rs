//! A GGUF file: metadata and quantised tensors in one memory-mapped file, as llama.cpp writes it.
//!
//! The header (magic, version, counts), then key-value metadata, then a table of tensors, then
//! their data, aligned. Versions 2 and 3 in little-endian order are read. The file is untrusted:
//! every count, length and offset is checked against the file before anything is allocated or
//! sliced. Names and shapes mean nothing here; the model's loader gives them meaning.
//!
//! Source: the format's description, <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>,
//! and the numbers of ggml's types in `ggml.h`.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_kernels::Storage;
use memmap2::Mmap;

use crate::files::mapped::map_file;

/// An open GGUF file: its metadata, its table of tensors, and the mapping that holds their data.
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    contents: Contents,
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A metadata array. Elements are of one type; an array of arrays is refused.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

/// One tensor: what it is called, how it lies in the file, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major, so ggml's `ne` reversed: a linear layer is `[d_out, d_in]`.
    pub shape: Vec<usize>,
    /// Element type or block format of its rows.
    pub storage: Storage,
    /// Its bytes within [`Gguf::map`]: inside the file, aligned to its elements, and exactly as
    /// many as shape and storage ask for.
    pub range: Range<usize>,
}

impl Gguf {
    /// Opens and maps a file, and checks all of its header; tensor data is not read.
    ///
    /// # Errors
    /// When the file is not a little-endian GGUF of version 2 or 3, ends early, or holds a count,
    /// length, offset, shape or type that does not fit. Names the file and the key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let contents = parse(&map).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), map, contents })
    }

    /// The file's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file; [`TensorInfo::range`] is within it.
    pub fn map(&self) -> &Arc<Mmap> {
        &self.map
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

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.contents.tensors.iter()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// When the file has none. Names the file and the tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let idx = self.contents.tensor_idx.get(name);
        let idx = idx.with_context(|| format!("{}: has no tensor {name}", self.path.display()))?;
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
        let wrong = || anyhow!("{}: {key}: is {found}, expected {wanted}", self.path.display());
        as_type(value).map(Some).ok_or_else(wrong)
    }
}

impl Value {
    /// An integer of any width that is not negative.
    fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::U64(x) => Some(x),
            Self::I8(x) => x.try_into().ok(),
            Self::I16(x) => x.try_into().ok(),
            Self::I32(x) => x.try_into().ok(),
            Self::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// The value for an error message: numbers as they are, the rest by type.
    fn describe(&self) -> String {
        match self {
            Value::U8(x) => x.to_string(),
            Value::I8(x) => x.to_string(),
            Value::U16(x) => x.to_string(),
            Value::I16(x) => x.to_string(),
            Value::U32(x) => x.to_string(),
            Value::I32(x) => x.to_string(),
            Value::U64(x) => x.to_string(),
            Value::I64(x) => x.to_string(),
            Value::F32(x) => format!("{x:?}"),
            Value::F64(x) => format!("{x:?}"),
            Value::Bool(x) => x.to_string(),
            Value::String(_) => "a string".to_owned(),
            Value::Array(Array::String(_)) => "an array of strings".to_owned(),
            Value::Array(Array::F32(_) | Array::F64(_)) => "an array of floats".to_owned(),
            Value::Array(Array::Bool(_)) => "an array of true and false".to_owned(),
            Value::Array(_) => "an array of integers".to_owned(),
        }
    }
}

/// What the header says, checked.
#[derive(Debug)]
struct Contents {
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    tensor_idx: HashMap<String, usize>,
}

/// Alignment of the tensor data where `general.alignment` is absent.
const ALIGNMENT_DEFAULT: u64 = 32;

/// Reads the header of a whole file.
fn parse(bytes: &[u8]) -> Result<Contents> {
    let mut reader = Reader { bytes, pos: 0 };
    let magic = reader.take(4)?;
    ensure!(magic == b"GGUF", "not a GGUF file: it begins with {:?}", magic.escape_ascii().to_string());
    match reader.u32()? {
        2 | 3 => {}
        1 => bail!("GGUF version 1 is not supported; convert the model again with a current llama.cpp"),
        version if version.swap_bytes() <= 3 => {
            bail!("a big-endian GGUF file is not supported; convert it with gguf_convert_endian.py")
        }
        version => bail!("GGUF version {version} is not supported, versions 2 and 3 are"),
    }
    // The smallest tensor entry: name length, dimension count, type, offset. The smallest key-value
    // pair: key length, type, one byte.
    let n_tensors = reader.count(8 + 4 + 4 + 8).context("tensor count")?;
    let n_entries = reader.count(8 + 4 + 1).context("metadata count")?;

    let mut metadata = HashMap::new();
    for idx in 0..n_entries {
        let key = reader.string().with_context(|| format!("key of metadata entry {idx}"))?;
        let value = reader.value().with_context(|| key.clone())?;
        if let Some(first) = metadata.insert(key.clone(), value) {
            bail!("{key}: appears twice, first as {}", first.describe());
        }
    }
    let alignment = alignment(&metadata).context("general.alignment")?;
    let n_files =
        metadata.get("split.count").map(|value| value.as_u64().context("split.count: is no integer")).transpose()?;
    if let Some(n_files @ 2..) = n_files {
        bail!("split.count: the model is in {n_files} files; join them with llama-gguf-split --merge");
    }

    let mut entries = Vec::new();
    for idx in 0..n_tensors {
        let name = reader.string().with_context(|| format!("name of tensor {idx}"))?;
        let entry = reader.tensor().with_context(|| format!("tensor {name}"))?;
        entries.push((name, entry));
    }
    // Data begins at the next aligned byte, which need not exist in a file without tensors.
    let data_start = reader.pos.checked_next_multiple_of(alignment).context("alignment is too large")?;

    let mut tensors = Vec::with_capacity(entries.len());
    let mut tensor_idx = HashMap::with_capacity(entries.len());
    for (name, entry) in entries {
        let range = entry.range(data_start, alignment, bytes.len()).with_context(|| format!("tensor {name}"))?;
        if let Some(first) = tensor_idx.insert(name.clone(), tensors.len()) {
            bail!("tensor {name}: appears twice, as entries {first} and {}", tensors.len());
        }
        tensors.push(TensorInfo { name, shape: entry.shape, storage: entry.storage, range });
    }
    apart(&tensors)?;
    Ok(Contents { metadata, tensors, tensor_idx })
}

/// Refuses tensors that share bytes: whoever wrote them meant other ones.
fn apart(tensors: &[TensorInfo]) -> Result<()> {
    let mut in_order: Vec<&TensorInfo> = tensors.iter().collect();
    in_order.sort_by_key(|tensor| tensor.range.start);
    for pair in in_order.windows(2) {
        let [before, after] = pair else { continue };
        ensure!(
            before.range.end <= after.range.start,
            "tensors {} and {} lie at one place: bytes {:?} and {:?} of the file; convert the model again",
            before.name,
            after.name,
            before.range,
            after.range
        );
    }
    Ok(())
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<usize> {
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT_DEFAULT,
        Some(Value::U32(x)) => (*x).into(),
        Some(Value::U64(x)) => *x,
        Some(other) => bail!("is {}, expected an integer of 32 bits", other.describe()),
    };
    ensure!(alignment.is_power_of_two(), "is {alignment}, expected a power of two");
    usize::try_from(alignment).context("is too large")
}

/// A tensor's table entry; its place is checked once the table has been read.
struct Entry {
    shape: Vec<usize>,
    storage: Storage,
    size_bytes: usize,
    offset: usize,
}

impl Entry {
    fn range(&self, data_start: usize, alignment: usize, len: usize) -> Result<Range<usize>> {
        let Entry { offset, size_bytes, .. } = *self;
        ensure!(
            offset.is_multiple_of(alignment),
            "begins at offset {offset}, which is not a multiple of the alignment {alignment}"
        );
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(size_bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= len)) else {
            bail!(
                "its {size_bytes} bytes at offset {offset} end beyond the file's {len} bytes; \
                 the file may be cut short, fetch it again"
            );
        };
        // An alignment below 4 may put floats where they cannot be read in place.
        let element = if self.storage == Storage::F32 { 4 } else { 2 };
        ensure!(start.is_multiple_of(element), "begins at byte {start}, not a multiple of {element}");
        Ok(start..end)
    }
}

/// A cursor over the file that never goes past its end.
struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.pos..];
        let Some(taken) = rest.get(..n) else {
            bail!("needs {n} bytes at byte {}, the file has {} left", self.pos, rest.len());
        };
        self.pos += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("take returned N bytes"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `size_min` bytes each, so no more of them than the file holds.
    fn count(&mut self, size_min: usize) -> Result<usize> {
        let claimed = self.u64()?;
        let possible = (self.bytes.len() - self.pos) / size_min;
        let count = usize::try_from(claimed).ok().filter(|&count| count <= possible);
        count.with_context(|| format!("claims {claimed}, but the rest of the file holds {possible} at most"))
    }

    fn string(&mut self) -> Result<String> {
        let len = self.count(1).context("string length")?;
        let bytes = self.take(len)?;
        let text = std::str::from_utf8(bytes).context("string is not UTF-8")?;
        Ok(text.to_owned())
    }

    fn bool(byte: u8) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            other => bail!("a truth value is stored as {other}, expected 0 or 1"),
        }
    }

    fn value(&mut self) -> Result<Value> {
        Ok(match self.u32()? {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(Self::bool(self.array::<1>()?[0])?),
            8 => Value::String(self.string()?),
            9 => Value::Array(self.values()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => bail!("value type {other} is unknown, types 0 to 12 are"),
        })
    }

    fn values(&mut self) -> Result<Array> {
        Ok(match self.u32()? {
            0 => Array::U8(self.numbers(u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(f32::from_le_bytes)?),
            7 => {
                let bytes = self.numbers(u8::from_le_bytes)?;
                Array::Bool(bytes.into_iter().map(Self::bool).collect::<Result<_>>()?)
            }
            8 => {
                // Grown as strings are read: an empty string takes 8 bytes here and 24 in memory.
                let n = self.count(8).context("array length")?;
                let strings = (0..n).map(|idx| self.string().with_context(|| format!("element {idx}")));
                Array::String(strings.collect::<Result<_>>()?)
            }
            9 => bail!("an array of arrays is not supported"),
            10 => Array::U64(self.numbers(u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(f64::from_le_bytes)?),
            other => bail!("array element type {other} is unknown, types 0 to 12 are"),
        })
    }

    fn numbers<T, const N: usize>(&mut self, from: fn([u8; N]) -> T) -> Result<Vec<T>> {
        let n = self.count(N).context("array length")?;
        let (chunks, _) = self.take(n * N)?.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| from(chunk)).collect())
    }

    fn tensor(&mut self) -> Result<Entry> {
        let n_dims = self.u32()?;
        ensure!((1..=4).contains(&n_dims), "has {n_dims} dimensions, expected 1 to 4");
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64()?;
            ensure!(dim > 0, "has a dimension of 0");
            shape.push(usize::try_from(dim).with_context(|| format!("dimension {dim} is too large"))?);
        }
        let cols = shape[0]; // ggml's first dimension is the contiguous one
        shape.reverse();
        let storage = storage(self.u32()?)?;
        let offset = usize::try_from(self.u64()?).context("its offset is too large")?;
        ensure!(
            cols.is_multiple_of(storage.block_len()),
            "rows of {cols} values are not whole blocks of {}, as {storage:?} needs",
            storage.block_len()
        );
        let mut size_bytes = storage.row_bytes(cols);
        for &rows in &shape[..shape.len() - 1] {
            size_bytes = size_bytes.and_then(|size| size.checked_mul(rows));
        }
        let size_bytes = size_bytes.with_context(|| format!("the size of shape {shape:?} overflows"))?;
        Ok(Entry { shape, storage, size_bytes, offset })
    }
}

/// The storage that a ggml type number stands for.
fn storage(ggml_type: u32) -> Result<Storage> {
    let unsupported = match ggml_type {
        0 => return Ok(Storage::F32),
        1 => return Ok(Storage::F16),
        2 => return Ok(Storage::Q4_0),
        3 => return Ok(Storage::Q4_1),
        6 => return Ok(Storage::Q5_0),
        7 => return Ok(Storage::Q5_1),
        8 => return Ok(Storage::Q8_0),
        12 => return Ok(Storage::Q4K),
        13 => return Ok(Storage::Q5K),
        14 => return Ok(Storage::Q6K),
        30 => return Ok(Storage::BF16),
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        other => bail!("ggml type {other} is unknown or was withdrawn; requantise the model to {SUPPORTED}"),
    };
    bail!("{unsupported} is not supported; requantise the model to one of {SUPPORTED}")
}

const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K";

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a GGUF file piece by piece, right or wrong.
    struct Writer(Vec<u8>);

    impl Writer {
        fn new(version: u32, n_tensors: u64, n_entries: u64) -> Self {
            let writer = Writer(b"GGUF".to_vec());
            writer.u32(version).u64(n_tensors).u64(n_entries)
        }
        fn raw(mut self, bytes: &[u8]) -> Self {
            self.0.extend_from_slice(bytes);
            self
        }
        fn u32(self, x: u32) -> Self {
            self.raw(&x.to_le_bytes())
        }
        fn u64(self, x: u64) -> Self {
            self.raw(&x.to_le_bytes())
        }
        fn string(self, s: &str) -> Self {
            self.u64(s.len() as u64).raw(s.as_bytes())
        }
        fn tensor(self, name: &str, ne: &[u64], ggml_type: u32, offset: u64) -> Self {
            let start = self.string(name).u32(ne.len() as u32);
            let dims = ne.iter().fold(start, |writer, &dim| writer.u64(dim));
            dims.u32(ggml_type).u64(offset)
        }
        fn data(mut self, alignment: usize, n: usize) -> Vec<u8> {
            self.0.resize(self.0.len().next_multiple_of(alignment), 0);
            self.0.extend((0..n).map(|i| i as u8));
            self.0
        }
    }

    /// Every kind of value, and three tensors whose last byte is the file's last byte.
    fn valid() -> Vec<u8> {
        Writer::new(3, 3, 7)
            .string("general.alignment")
            .u32(4)
            .u32(16)
            .string("a.string")
            .u32(8)
            .string("né")
            .string("a.u8")
            .u32(0)
            .raw(&[200])
            .string("a.i64")
            .u32(11)
            .raw(&(-5_i64).to_le_bytes())
            .string("a.bool")
            .u32(7)
            .raw(&[1])
            .string("some.strings")
            .u32(9)
            .u32(8)
            .u64(2)
            .string("x")
            .string("")
            .string("some.floats")
            .u32(9)
            .u32(6)
            .u64(2)
            .raw(&1.5_f32.to_le_bytes())
            .raw(&2_f32.to_le_bytes())
            .tensor("q", &[32, 3], 8, 0) // 3 rows of one 34-byte block: 102 bytes
            .tensor("v", &[5], 0, 112)
            .tensor("cube", &[2, 3, 5], 30, 144)
            .data(16, 144 + 60)
    }

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", parse(bytes).expect_err("the file should be refused"))
    }

    #[test]
    fn a_valid_file_is_read_in_both_versions() -> Result<()> {
        for version in [2_u32, 3] {
            let mut bytes = valid();
            bytes[4..8].copy_from_slice(&version.to_le_bytes());
            let path = std::env::temp_dir().join(format!("homeroom-gguf-{}-{version}", std::process::id()));
            std::fs::write(&path, &bytes)?;
            let gguf = Gguf::open(&path)?;
            assert_eq!(gguf.str("a.string")?, Some("né"));
            assert_eq!(gguf.str("absent")?, None);
            assert_eq!(gguf.u64("a.u8")?, Some(200));
            assert_eq!(gguf.bool("a.bool")?, Some(true));
            assert_eq!(gguf.f32s("some.floats")?, Some([1.5, 2.0].as_slice()));
            assert_eq!(gguf.strings("some.strings")?.map(<[_]>::len), Some(2));
            let message = gguf.u64("a.i64").expect_err("it is negative").to_string();
            assert!(message.contains("a.i64: is -5, expected an integer of at least 0"), "{message}");
            let message = gguf.bool("a.string").expect_err("it is a string").to_string();
            assert!(message.contains(&path.display().to_string()), "{message}");

            let q = gguf.tensor("q")?;
            assert_eq!((&q.shape[..], q.storage, q.range.len()), (&[3, 32][..], Storage::Q8_0, 102));
            assert_eq!(gguf.map()[q.range.start], 0);
            let cube = gguf.tensor("cube")?;
            assert_eq!((&cube.shape[..], cube.storage), (&[5, 3, 2][..], Storage::BF16));
            assert_eq!(cube.range.end, bytes.len());
            assert_eq!(gguf.map()[cube.range.clone()][0], 144);
            assert!(gguf.tensor("absent").is_err());
            std::fs::remove_file(&path)?;
        }
        Ok(())
    }

    #[test]
    fn what_gguf_py_wrote_is_read() -> Result<()> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers");
        let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(fixtures.join("expected.json"))?)?;
        for name in ["byte_level", "sentencepiece"] {
            let gguf = Gguf::open(&fixtures.join(format!("{name}.gguf")))?;
            let said = &expected["gguf"][name];
            assert_eq!(
                gguf.strings("tokenizer.ggml.tokens")?.map(<[_]>::len),
                said["n_tokens"].as_u64().map(|n| n as usize)
            );
            assert_eq!(gguf.u64("tokenizer.ggml.eos_token_id")?, said["eos"].as_u64());
            assert_eq!(gguf.i64s("tokenizer.ggml.token_type")?.map(|x| x.iter().sum()), said["type_sum"].as_i64());
            let tensor = gguf.tensor("tiny.weight")?;
            assert_eq!((&tensor.shape[..], tensor.storage), (&[3, 32][..], Storage::F16));
            // 0, 1, 2, … 95, whose halves are exact.
            let last = &gguf.map()[tensor.range.clone()][2 * 95..];
            assert_eq!(last, 0x55f0_u16.to_le_bytes(), "95.0 as f16");
        }
        Ok(())
    }

    #[test]
    fn a_file_cut_short_anywhere_is_an_error() {
        let bytes = valid();
        assert!(parse(&bytes).is_ok());
        for len in 0..bytes.len() {
            assert!(parse(&bytes[..len]).is_err(), "cut to {len} bytes");
        }
    }

    /// Each byte flipped, and each eight bytes set to a huge or a small count: an error, or
    /// contents whose every range lies in the file. A count trusted before it is checked would ask
    /// for terabytes here and abort the test.
    #[test]
    fn a_damaged_file_is_an_error_or_stays_within_bounds() {
        let good = valid();
        let mut damaged = Vec::new();
        for at in 0..good.len() {
            for mask in [0x01, 0x02, 0x10, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= mask;
                damaged.push(bytes);
            }
            for count in [u64::MAX, 1 << 62, 1 << 40, 1 << 32, 0] {
                let mut bytes = good.clone();
                let end = good.len().min(at + 8);
                bytes[at..end].copy_from_slice(&count.to_le_bytes()[..end - at]);
                damaged.push(bytes);
            }
        }
        let mut n_accepted = 0;
        for bytes in damaged {
            let Ok(contents) = parse(&bytes) else {
                continue;
            };
            n_accepted += 1;
            for tensor in &contents.tensors {
                assert!(tensor.range.start <= tensor.range.end && tensor.range.end <= bytes.len());
                let n: usize = tensor.shape.iter().product();
                let blocks = n / tensor.storage.block_len();
                assert_eq!(tensor.range.len(), blocks * tensor.storage.block_bytes());
            }
        }
        assert!(n_accepted > 0, "damage to tensor data alone is not seen here");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let one = |ne: &[u64], ggml_type, offset| Writer::new(3, 1, 0).tensor("w", ne, ggml_type, offset).data(32, 256);
        let aligned = |alignment: u32, offset| {
            let writer = Writer::new(3, 1, 1).string("general.alignment").u32(4).u32(alignment);
            writer.tensor("w", &[4], 0, offset).data(32, 256)
        };
        let entry_of = |key: &str, value_type: u32| Writer::new(3, 0, 1).string(key).u32(value_type);
        let entry = |value_type: u32| entry_of("k", value_type);
        // 30 floats of 4 bytes each: with 128 bytes in between they lie apart.
        let two = |a: u64, b: u64| Writer::new(3, 2, 0).tensor("a", &[30], 0, a).tensor("b", &[30], 0, b).data(32, 512);
        assert!(parse(&two(0, 128)).is_ok() && parse(&two(256, 128)).is_ok());
        let cases = [
            (b"GGML....".to_vec(), "not a GGUF file"),
            (Writer::new(1, 0, 0).0, "version 1 is not supported"),
            (Writer::new(4, 0, 0).0, "version 4 is not supported"),
            (Writer::new(3_u32.swap_bytes(), 0, 0).0, "big-endian"),
            (Writer::new(3, 1 << 40, 0).0, "tensor count: claims 1099511627776"),
            (Writer::new(3, 0, u64::MAX).0, "metadata count: claims 18446744073709551615"),
            (one(&[1, 1, 1, 1, 1], 0, 0), "tensor w: has 5 dimensions"),
            (one(&[], 0, 0), "tensor w: has 0 dimensions"),
            (one(&[4, 0], 0, 0), "tensor w: has a dimension of 0"),
            (one(&[1 << 40, 1 << 40], 0, 0), "overflows"),
            (one(&[1 << 62, 4, 4, 4], 0, 0), "overflows"),
            (one(&[65], 0, 0), "tensor w: its 260 bytes at offset 0 end beyond"),
            (one(&[64], 0, u64::MAX - 31), "end beyond the file"),
            (one(&[64], 0, 16), "not a multiple of the alignment 32"),
            (one(&[33], 8, 0), "rows of 33 values are not whole blocks of 32"),
            (one(&[32], 20, 0), "tensor w: IQ4_NL is not supported; requantise"),
            (one(&[32], 4, 0), "ggml type 4 is unknown"),
            (aligned(0, 0), "general.alignment: is 0, expected a power of two"),
            (aligned(24, 0), "general.alignment: is 24, expected a power of two"),
            (aligned(1, 1), "not a multiple of 4"),
            (entry(13).0, "k: value type 13 is unknown"),
            (entry(7).raw(&[2]).0, "k: a truth value is stored as 2"),
            (entry(8).u64(2).raw(&[0xff, 0xfe]).0, "k: string is not UTF-8"),
            (entry(9).u32(9).u64(1).u32(0).u64(0).0, "k: an array of arrays"),
            (entry(9).u32(4).u64(1 << 62).0, "k: array length: claims"),
            (entry(9).u32(8).u64(1).u64(99).0, "k: element 0: string length: claims 99"),
            (Writer::new(3, 0, 2).string("k").u32(0).raw(&[7]).string("k").u32(0).raw(&[8]).0, "k: appears twice"),
            (
                Writer::new(3, 2, 0).tensor("w", &[4], 0, 0).tensor("w", &[4], 0, 32).data(32, 64),
                "tensor w: appears twice",
            ),
            (Writer::new(3, 0, 1).string("split.count").u32(2).raw(&[3, 0]).0, "in 3 files; join them"),
            (entry_of("split.count", 4).u32(3).0, "in 3 files; join them"),
            (entry_of("split.count", 8).string("3").0, "split.count: is no integer"),
            (two(0, 0), "tensors a and b lie at one place"),
            (two(32, 0), "tensors b and a lie at one place"),
            (two(0, 64), "tensors a and b lie at one place"),
            (two(160, 64), "tensors b and a lie at one place"),
        ];
        for (bytes, expected) in cases {
            let message = error(&bytes);
            assert!(message.contains(expected), "{message:?} does not say {expected:?}");
        }
    }
}
