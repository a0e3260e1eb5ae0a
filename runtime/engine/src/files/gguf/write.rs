//! Writes a GGUF file: header and table first, then the tensors, one after the other, each in pieces.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use homeroom_kernels::Storage;

use super::header::ALIGNMENT_DEFAULT;
use super::value::{Array, Value};

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major, so ggml's `ne` reversed: a linear layer is `[d_out, d_in]`.
    pub shape: Vec<usize>,
    /// Element type or block format of its rows.
    pub storage: Storage,
}

impl NewTensor {
    /// Its bytes.
    ///
    /// # Errors
    /// When its rows are not whole blocks, or the size overflows.
    pub fn bytes(&self) -> Result<usize> {
        let (cols, rows) = self.shape.split_last().context("a tensor has a shape")?;
        let row = self.storage.row_bytes(*cols);
        let bytes = rows.iter().try_fold(row, |bytes, rows| Some(bytes?.checked_mul(*rows)));
        bytes
            .flatten()
            .with_context(|| format!("tensor {}: {:?} cannot hold {:?}", self.name, self.storage, self.shape))
    }
}

/// Bytes of a whole file with these entries and tensors.
///
/// # Errors
/// As [`Writer::start`].
pub fn file_bytes(metadata: &[(String, Value)], tensors: &[NewTensor]) -> Result<u64> {
    let data = tensors.iter().try_fold(0, |sum, tensor| anyhow::Ok(sum + aligned(tensor.bytes()?) as u64))?;
    Ok(header(metadata, tensors)?.len() as u64 + data)
}

/// A file whose header is written. Its tensors follow in the order of the table.
pub struct Writer {
    file: File,
    /// Bytes of each tensor.
    sizes: Vec<usize>,
    /// The tensor that is written, and how many bytes of it are.
    at: (usize, usize),
    /// Bytes of the header, with what aligns the first tensor.
    header_bytes: usize,
}

impl Writer {
    /// Writes version 3 with these entries, in this order, and the table of these tensors, aligned to 32 bytes.
    ///
    /// # Errors
    /// When a tensor's rows are not whole blocks of its storage, or the file cannot be written.
    pub fn start(mut file: File, metadata: &[(String, Value)], tensors: &[NewTensor]) -> Result<Self> {
        let header = header(metadata, tensors)?;
        file.write_all(&header)?;
        let sizes = tensors.iter().map(NewTensor::bytes).collect::<Result<_>>()?;
        Ok(Self { file, sizes, at: (0, 0), header_bytes: header.len() })
    }

    /// Makes the file as long as it will be, so that it can be read though what is not written yet holds zeros.
    ///
    /// # Errors
    /// When the file cannot be made longer; no room is taken yet.
    pub fn extend(&self) -> Result<()> {
        let data: u64 = self.sizes.iter().map(|size| aligned(*size) as u64).sum();
        Ok(self.file.set_len(self.header_bytes as u64 + data)?)
    }

    /// Writes further bytes of the tensor that is next; behind its last byte the next one begins.
    ///
    /// # Errors
    /// When they are more than the tensor has, or the file cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (tensor, written) = self.at;
        let size = *self.sizes.get(tensor).context("all tensors are written")?;
        let now = written + bytes.len();
        ensure!(now <= size, "tensor {tensor} has {size} bytes, not {now}");
        self.file.write_all(bytes)?;
        self.at = (tensor, now);
        if now == size {
            self.file.write_all(&[0; ALIGNMENT_DEFAULT as usize][..aligned(size) - size])?;
            self.at = (tensor + 1, 0);
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// When a tensor is missing, or the file cannot be brought to the disk.
    pub fn finish(self) -> Result<()> {
        ensure!(self.at == (self.sizes.len(), 0), "tensor {} is not all written", self.at.0);
        Ok(self.file.sync_all()?)
    }
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT_DEFAULT as usize)
}

/// Header and table, aligned.
fn header(metadata: &[(String, Value)], tensors: &[NewTensor]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        string(&mut out, key);
        entry(&mut out, value);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for dim in tensor.shape.iter().rev() {
            out.extend((*dim as u64).to_le_bytes());
        }
        let number = ggml_type(tensor.storage);
        let number = number.with_context(|| format!("tensor {}: a file holds no {:?}", tensor.name, tensor.storage))?;
        out.extend(number.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += aligned(tensor.bytes()?) as u64;
    }
    out.resize(aligned(out.len()), 0);
    Ok(out)
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn entry(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($kind:expr, $x:expr) => {{
            out.extend(($kind as u32).to_le_bytes());
            out.extend($x.to_le_bytes());
        }};
    }
    match value {
        Value::U8(x) => number!(0, x),
        Value::I8(x) => number!(1, x),
        Value::U16(x) => number!(2, x),
        Value::I16(x) => number!(3, x),
        Value::U32(x) => number!(4, x),
        Value::I32(x) => number!(5, x),
        Value::F32(x) => number!(6, x),
        Value::Bool(x) => number!(7, u8::from(*x)),
        Value::String(x) => {
            out.extend(8u32.to_le_bytes());
            string(out, x);
        }
        Value::Array(x) => {
            out.extend(9u32.to_le_bytes());
            array(out, x);
        }
        Value::U64(x) => number!(10, x),
        Value::I64(x) => number!(11, x),
        Value::F64(x) => number!(12, x),
    }
}

fn array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($kind:expr, $values:expr) => {{
            out.extend(($kind as u32).to_le_bytes());
            out.extend(($values.len() as u64).to_le_bytes());
            $values.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(x) => numbers!(0, x),
        Array::I8(x) => numbers!(1, x),
        Array::U16(x) => numbers!(2, x),
        Array::I16(x) => numbers!(3, x),
        Array::U32(x) => numbers!(4, x),
        Array::I32(x) => numbers!(5, x),
        Array::F32(x) => numbers!(6, x),
        Array::Bool(x) => {
            out.extend(7u32.to_le_bytes());
            out.extend((x.len() as u64).to_le_bytes());
            out.extend(x.iter().map(|x| u8::from(*x)));
        }
        Array::String(x) => {
            out.extend(8u32.to_le_bytes());
            out.extend((x.len() as u64).to_le_bytes());
            x.iter().for_each(|x| string(out, x));
        }
        Array::U64(x) => numbers!(10, x),
        Array::I64(x) => numbers!(11, x),
        Array::F64(x) => numbers!(12, x),
    }
}

/// ggml's number of a storage that the reader knows, too.
fn ggml_type(storage: Storage) -> Option<u32> {
    (0..64).find(|number| super::header::storage(*number).is_ok_and(|known| known == storage))
}

#[cfg(test)]
mod tests {
    use super::super::Gguf;
    use super::*;

    /// Every kind of value, and tensors whose sizes are no multiples of the alignment, in pieces.
    #[test]
    fn what_is_written_is_read_as_the_same() -> Result<()> {
        let entries = [
            Value::U8(200),
            Value::I8(-7),
            Value::U16(60_000),
            Value::I16(-300),
            Value::U32(1 << 31),
            Value::I32(-5),
            Value::U64(1 << 63),
            Value::I64(-(1 << 62)),
            Value::F32(-1e-5),
            Value::F64(1e300),
            Value::Bool(true),
            Value::String("grüße\n".to_owned()),
            Value::Array(Array::U8(vec![1, 2, 3])),
            Value::Array(Array::I8(vec![-1])),
            Value::Array(Array::U16(vec![])),
            Value::Array(Array::I16(vec![-2, 5])),
            Value::Array(Array::U32(vec![7, 8])),
            Value::Array(Array::I32(vec![-7, 8])),
            Value::Array(Array::U64(vec![9])),
            Value::Array(Array::I64(vec![-9, 1, 2])),
            Value::Array(Array::F32(vec![0.5, -0.0])),
            Value::Array(Array::F64(vec![0.25])),
            Value::Array(Array::Bool(vec![true, false, true])),
            Value::Array(Array::String(vec![String::new(), "▁a".to_owned()])),
        ];
        let metadata: Vec<(String, Value)> =
            entries.into_iter().enumerate().map(|(n, value)| (format!("test.key_{n}"), value)).collect();
        let tensors = [
            NewTensor { name: "a.weight".to_owned(), shape: vec![3, 64], storage: Storage::Q4_0 },
            NewTensor { name: "b.bias".to_owned(), shape: vec![5], storage: Storage::F32 },
            NewTensor { name: "c.weight".to_owned(), shape: vec![7, 3], storage: Storage::BF16 },
        ];
        let place = tempfile::tempdir()?;
        let path = place.path().join("test.gguf");
        let mut writer = Writer::start(File::create(&path)?, &metadata, &tensors)?;
        writer.extend()?;
        assert_eq!(Gguf::open(&path)?.tensor("c.weight")?.shape, [7, 3], "before its values are there");
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|t| Ok((0..t.bytes()?).map(|n| (n * 37 % 251) as u8).collect()))
            .collect::<Result<_>>()?;
        for bytes in &bytes {
            for piece in bytes.chunks(41) {
                writer.write(piece)?;
            }
        }
        assert!(writer.write(&[0]).is_err());
        writer.finish()?;
        assert_eq!(std::fs::metadata(&path)?.len(), file_bytes(&metadata, &tensors)?);
        let read = Gguf::open(&path)?;
        for (key, value) in &metadata {
            assert_eq!(read.get(key), Some(value), "{key}");
        }
        for (tensor, bytes) in tensors.iter().zip(&bytes) {
            let found = read.tensor(&tensor.name)?;
            assert_eq!((&found.shape, found.storage), (&tensor.shape, tensor.storage));
            assert_eq!(read.mapped(found).bytes(), bytes);
        }
        Ok(())
    }

    #[test]
    fn a_file_with_less_or_more_than_its_table_says_is_refused() -> Result<()> {
        let place = tempfile::tempdir()?;
        let tensor = NewTensor { name: "a".to_owned(), shape: vec![2, 32], storage: Storage::Q8_0 };
        let start = || Writer::start(File::create(place.path().join("test.gguf"))?, &[], std::slice::from_ref(&tensor));
        assert!(start()?.finish().unwrap_err().to_string().contains("not all written"));
        assert!(start()?.write(&[0; 69]).unwrap_err().to_string().contains("68 bytes, not 69"));
        let odd = NewTensor { shape: vec![2, 31], ..tensor.clone() };
        assert!(odd.bytes().unwrap_err().to_string().contains("Q8_0 cannot hold [2, 31]"));
        Ok(())
    }
}
