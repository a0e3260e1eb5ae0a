//! Reads a file's header: the metadata, and the table of its tensors.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use homeroom_kernels::Storage;

use super::value::{Array, Value};

/// One tensor: what it is called, how it lies in the file, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major, so ggml's `ne` reversed: a linear layer is `[d_out, d_in]`.
    pub shape: Vec<usize>,
    /// Element type or block format of its rows.
    pub storage: Storage,
    /// Which of the model's files it lies in, from 0.
    pub file: usize,
    /// Its bytes within [`super::Gguf::map`]: inside the file, aligned to its elements, and exactly as
    /// many as shape and storage ask for.
    pub range: Range<usize>,
}

/// What the header says, checked.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) tensor_idx: HashMap<String, usize>,
}

/// Alignment of the tensor data where `general.alignment` is absent.
pub(super) const ALIGNMENT_DEFAULT: u64 = 32;

/// Reads the header of a whole file.
pub(super) fn parse(bytes: &[u8]) -> Result<Contents> {
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
        tensors.push(TensorInfo { name, shape: entry.shape, storage: entry.storage, file: 0, range });
    }
    apart(&tensors)?;
    Ok(Contents { metadata, tensors, tensor_idx })
}

/// `general.architecture`, by the beginning of a file alone; `None` where it does not reach as far. llama.cpp writes it first.
pub fn architecture_in(beginning: &[u8]) -> Option<String> {
    let mut reader = Reader { bytes: beginning, pos: 0 };
    let is_known = reader.take(4).ok()? == b"GGUF" && (2..=3).contains(&reader.u32().ok()?);
    let (_tensors, entries) = (reader.u64().ok()?, reader.u64().ok()?);
    if !is_known {
        return None;
    }
    for _ in 0..entries {
        let (key, value) = (reader.string().ok()?, reader.value().ok()?);
        if let ("general.architecture", Value::String(architecture)) = (key.as_str(), value) {
            return Some(architecture);
        }
    }
    None
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
pub(super) fn storage(ggml_type: u32) -> Result<Storage> {
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
