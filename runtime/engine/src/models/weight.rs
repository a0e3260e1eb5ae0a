//! A frozen weight: its bytes, wherever they lie, and how they are stored.
//!
//! The bytes are usually part of a memory-mapped file, so holding a weight costs nothing until its rows are read.

use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use homeroom_kernels::{
    BlockCodec, CheckedCodec, Codec, EncodedScales, Matrix, RowOrder, Scales, Storage, bf16, encode, f16,
};
use memmap2::Mmap;
use rayon::prelude::*;

/// Values of a panel of rows.
pub(crate) const PANEL_VALUES: usize = 1 << 22;

/// A matrix of frozen values, `rows` x `cols`, row-major; a vector is one row.
#[derive(Clone)]
pub struct Weight {
    bytes: Bytes,
    storage: Storage,
    rows: usize,
    cols: usize,
    order: RowOrder,
    /// See [`Weight::row_squares`].
    row_squares: Arc<OnceLock<Vec<f64>>>,
}

#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mmap>, Range<usize>),
    Owned(Arc<[u8]>),
    /// In memory, beside other weights.
    Resident(Arc<Mmap>, Range<usize>),
    Coded(Arc<Coding>),
    Native(Arc<dyn NativeCodec>, Arc<[u8]>),
}

/// A codec that a plugin brings as functions.
pub trait NativeCodec: BlockCodec {
    /// Its name.
    fn name(&self) -> &str;
    /// Encodes whole blocks of finite values.
    ///
    /// # Errors
    /// When the codec fails.
    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<()>;
}

/// A matrix through a codec: indices and scales.
struct Coding {
    codec: CheckedCodec,
    codes: Codes,
    scales: CodeScales,
}

/// Indices of a coded matrix, in memory or in a mapped file.
pub enum Codes {
    /// In memory.
    Owned(Vec<u8>),
    /// In a file.
    Mapped(Arc<Mmap>, Range<usize>),
    /// In memory of large pages.
    Resident(Arc<Mmap>, Range<usize>),
}

/// Scales of a coded matrix, in memory or in a mapped file.
#[derive(Clone)]
pub enum CodeScales {
    /// In memory.
    Owned(Arc<EncodedScales>),
    /// In a file, as f32.
    Mapped(MappedFloats),
    /// In a file: indices, second-level scales, and the mean.
    MappedNested(Arc<Mmap>, Range<usize>, MappedFloats, f32),
}

/// Values of f32 in a mapped file, in the order of this processor's bytes.
#[derive(Clone)]
pub struct MappedFloats(Arc<Mmap>, Range<usize>);

impl MappedFloats {
    /// The values in a part of a file.
    ///
    /// # Errors
    /// When it lies outside the file, or does not hold whole values that are aligned.
    pub fn new(map: Arc<Mmap>, range: Range<usize>) -> Result<Self> {
        let bytes = map.get(range.clone()).context("its scales lie outside the file")?;
        let aligned = bytes.as_ptr().cast::<f32>().is_aligned();
        ensure!(aligned && bytes.len().is_multiple_of(size_of::<f32>()), "its scales are not whole aligned values");
        Ok(Self(map, range))
    }
}

impl Deref for MappedFloats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: every bit pattern is a value of f32, and `align_to` sees to alignment.
        let (_, values, _) = unsafe { self.0[self.1.clone()].align_to() };
        values
    }
}

impl From<EncodedScales> for CodeScales {
    fn from(scales: EncodedScales) -> Self {
        Self::Owned(Arc::new(scales))
    }
}

impl CodeScales {
    /// A view of them.
    pub fn view(&self) -> Scales<'_> {
        match self {
            Self::Owned(scales) => scales.view(),
            Self::Mapped(scales) => Scales::F32(scales),
            Self::MappedNested(map, codes, absmax, offset) => {
                Scales::Nested { codes: &map[codes.clone()], absmax, offset: *offset }
            }
        }
    }
}

impl Deref for Codes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(map, range) | Self::Resident(map, range) => &map[range.clone()],
        }
    }
}

impl Weight {
    /// A weight inside a mapped file.
    ///
    /// # Errors
    /// When the range is not exactly as long as `rows` rows of that storage.
    pub fn mapped(
        map: Arc<Mmap>,
        range: Range<usize>,
        storage: Storage,
        (rows, cols): (usize, usize),
        order: RowOrder,
    ) -> Result<Self> {
        ensure!(map.get(range.clone()).is_some(), "its bytes lie outside the file");
        Self::checked(Bytes::Mapped(map, range), storage, (rows, cols), order)
    }

    /// A weight of f32 values in memory.
    ///
    /// # Errors
    /// When there are not `rows * cols` values.
    pub fn from_values(values: &[f32], (rows, cols): (usize, usize)) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::checked(Bytes::Owned(bytes.into()), Storage::F32, (rows, cols), RowOrder::Natural)
    }

    /// A weight of f16 values in memory.
    ///
    /// # Errors
    /// When there are not `rows * cols` values.
    pub fn from_f16(values: &[f16], (rows, cols): (usize, usize)) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::checked(Bytes::Owned(bytes.into()), Storage::F16, (rows, cols), RowOrder::Natural)
    }

    /// A weight of bf16 values in memory.
    ///
    /// # Errors
    /// When there are not `rows * cols` values.
    pub fn from_bf16(values: &[bf16], (rows, cols): (usize, usize)) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::checked(Bytes::Owned(bytes.into()), Storage::BF16, (rows, cols), RowOrder::Natural)
    }

    /// The same values through a codec: the nearest it has. They are read a few rows at a time, and memory that was mapped for
    /// them is given back.
    ///
    /// # Errors
    /// When the codec cannot be run, or a value is not finite.
    pub fn encoded(&self, codec: &Codec) -> Result<Self> {
        let matrix = self.matrix();
        let read = |rows: Range<usize>, out: &mut [f32]| matrix.decode_rows(rows, out);
        let encoded = encode(codec, self.rows, self.cols, &read).map_err(anyhow::Error::msg)?;
        self.release();
        Self::coded(codec.clone(), Codes::Owned(encoded.codes), encoded.scales, (self.rows, self.cols))
    }

    /// The same values through a codec of a plugin; see [`Self::encoded`].
    ///
    /// # Errors
    /// When a row is not a whole number of blocks, a value is not finite, or the codec fails.
    pub fn encoded_natively(&self, codec: &Arc<dyn NativeCodec>) -> Result<Self> {
        let (len, size) = (codec.block_len(), codec.block_bytes());
        ensure!(
            self.cols.is_multiple_of(len),
            "{} columns are not a whole number of blocks of {len}, which codec `{}` takes",
            self.cols,
            codec.name()
        );
        let row_bytes = self.cols / len * size;
        let mut bytes = vec![0; row_bytes * self.rows];
        for (row, bytes) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            let values = self.decode(row..row + 1);
            ensure!(values.iter().all(|value| value.is_finite()), "row {row} holds a value that is not finite");
            codec.encode(&values, bytes)?;
        }
        self.release();
        let bytes = Bytes::Native(codec.clone(), bytes.into());
        Self::checked(bytes, Storage::Native, (self.rows, self.cols), RowOrder::Natural)
    }

    /// A weight whose indices and scales there are already.
    ///
    /// # Errors
    /// When the codec cannot be run, or there are not as many of them as the shape asks for.
    pub fn coded(
        codec: Codec,
        codes: Codes,
        scales: impl Into<CodeScales>,
        (rows, cols): (usize, usize),
    ) -> Result<Self> {
        let outside = |map: &Mmap, range: &Range<usize>| map.get(range.clone()).is_none();
        if let Codes::Mapped(map, range) | Codes::Resident(map, range) = &codes {
            ensure!(!outside(map, range), "its bytes lie outside the file");
        }
        let scales = scales.into();
        if let CodeScales::MappedNested(map, codes, ..) = &scales {
            ensure!(!outside(map, codes), "its scales lie outside the file");
        }
        let codec = CheckedCodec::new(codec).map_err(anyhow::Error::msg)?;
        let bytes = Bytes::Coded(Arc::new(Coding { codec, codes, scales }));
        Self::checked(bytes, Storage::Coded, (rows, cols), RowOrder::Natural)
    }

    /// Tells the system that the mapped pages of this weight need not stay in memory; they are read again when they are asked for.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        for (map, range) in self.mapped_parts() {
            // SAFETY: the mapping is of a file and read-only, so a dropped page comes back with the same content.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // It is advice; a system that does not take it keeps the pages, and nothing else changes.
            let _ = advised;
        }
    }

    /// The same weight in memory of its own, where it lies in a file as values are.
    pub(crate) fn copied(&self) -> Self {
        let bytes = match &self.bytes {
            Bytes::Mapped(..) => Bytes::Owned(self.raw().into()),
            _ => self.bytes.clone(),
        };
        Self { bytes, ..self.clone() }
    }

    /// Tells the system that the mapped bytes of this weight will be read soon.
    pub(crate) fn will_need(&self) {
        #[cfg(unix)]
        for (map, range) in self.mapped_parts() {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// The same of one row alone. Otherwise the system reads far around each row that is asked for.
    pub(crate) fn will_need_row(&self, row: usize) {
        #[cfg(unix)]
        if let Some((map, range)) = self.mapped_parts().into_iter().next() {
            let (row, rows, len) = (self.order.stored(row), self.rows, range.len());
            let (start, end) = (row * len / rows, ((row + 1) * len).div_ceil(rows));
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start + start, end - start);
        }
        #[cfg(not(unix))]
        let _ = row;
    }

    /// The parts of mapped files that it lies in, its values or indices first.
    fn mapped_parts(&self) -> Vec<(&Mmap, Range<usize>)> {
        match &self.bytes {
            Bytes::Mapped(map, range) => vec![(map, range.clone())],
            Bytes::Coded(coded) => {
                let codes = match &coded.codes {
                    Codes::Mapped(map, range) => Some((&**map, range.clone())),
                    Codes::Owned(_) | Codes::Resident(..) => None,
                };
                let scales = match &coded.scales {
                    CodeScales::Owned(_) => vec![],
                    CodeScales::Mapped(floats) => vec![(&*floats.0, floats.1.clone())],
                    CodeScales::MappedNested(map, codes, floats, _) => {
                        vec![(&**map, codes.clone()), (&*floats.0, floats.1.clone())]
                    }
                };
                codes.into_iter().chain(scales).collect()
            }
            Bytes::Owned(_) | Bytes::Resident(..) | Bytes::Native(..) => vec![],
        }
    }

    /// Its bytes, if they lie in a mapped file; of one by a codec its indices.
    pub(crate) fn mapped_bytes(&self) -> Option<&[u8]> {
        let mapped = match &self.bytes {
            Bytes::Mapped(..) => true,
            Bytes::Coded(coded) => matches!(coded.codes, Codes::Mapped(..)),
            Bytes::Owned(_) | Bytes::Resident(..) | Bytes::Native(..) => false,
        };
        mapped.then(|| self.raw())
    }

    /// The same weight, whose bytes were copied to this place; their pages of the file are released.
    pub(crate) fn in_memory(&self, memory: Arc<Mmap>, range: Range<usize>) -> Self {
        self.release();
        let bytes = match &self.bytes {
            Bytes::Coded(coded) => {
                let (codec, scales) = (coded.codec.clone(), coded.scales.clone());
                Bytes::Coded(Arc::new(Coding { codec, codes: Codes::Resident(memory, range), scales }))
            }
            _ => Bytes::Resident(memory, range),
        };
        Self { bytes, ..self.clone() }
    }

    fn checked(bytes: Bytes, storage: Storage, (rows, cols): (usize, usize), order: RowOrder) -> Result<Self> {
        let weight = Self { bytes, storage, rows, cols, order, row_squares: Arc::default() };
        weight.view().map_err(anyhow::Error::msg)?;
        Ok(weight)
    }

    fn raw(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map, range) | Bytes::Resident(map, range) => &map[range.clone()],
            Bytes::Owned(bytes) => bytes,
            Bytes::Coded(coded) => &coded.codes,
            Bytes::Native(_, bytes) => bytes,
        }
    }

    fn view(&self) -> Result<Matrix<'_>, String> {
        match &self.bytes {
            Bytes::Coded(coded) => {
                Matrix::coded_checked(&coded.codec, &coded.codes, coded.scales.view(), self.rows, self.cols)
            }
            Bytes::Native(codec, bytes) => Matrix::native(&**codec, bytes, self.rows, self.cols),
            _ => Matrix::new(self.storage, self.raw(), self.rows, self.cols, self.order),
        }
    }

    /// The view that kernels take.
    pub fn matrix(&self) -> Matrix<'_> {
        self.view().expect("the constructors built the same view from the same fields")
    }

    /// Name of the storage: that of the codec, or of the element type or block format.
    pub fn storage_name(&self) -> String {
        match &self.bytes {
            Bytes::Coded(coded) => coded.codec.name.clone(),
            Bytes::Native(codec, _) => codec.name().to_owned(),
            _ => format!("{:?}", self.storage).to_lowercase(),
        }
    }

    /// `‖wᵢ‖²` of each row, computed once. Two who ask first at once both compute it: a thread of the pool that waited for the other could
    /// be one that the other waits for.
    pub(crate) fn row_squares(&self) -> &[f64] {
        if let Some(squares) = self.row_squares.get() {
            return squares;
        }
        let square = |row| self.decode(row..row + 1).iter().map(|value| f64::from(*value).powi(2)).sum();
        let squares = (0..self.rows).into_par_iter().map(square).collect();
        self.row_squares.get_or_init(|| squares)
    }

    /// Whether it is stored by a codec, ours or one of a plugin.
    pub fn is_encoded(&self) -> bool {
        matches!(self.storage, Storage::Coded | Storage::Native)
    }

    /// Its codec, indices and scales, if it is stored by a codec.
    pub(crate) fn encoding(&self) -> Option<(&Codec, &[u8], Scales<'_>)> {
        match &self.bytes {
            Bytes::Coded(coded) => Some((&coded.codec, &coded.codes, coded.scales.view())),
            _ => None,
        }
    }

    /// The codec through which it is stored, if it is.
    pub(crate) fn codec(&self) -> Option<&Codec> {
        match &self.bytes {
            Bytes::Coded(coded) => Some(&coded.codec),
            _ => None,
        }
    }

    /// Element type or block format.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that the weight takes as stored.
    pub fn stored_bytes(&self) -> usize {
        match &self.bytes {
            Bytes::Coded(coded) => coded.codes.len() + coded.scales.view().bytes(),
            _ => self.raw().len(),
        }
    }

    /// Its bytes as they lie, and the order of their rows, where rows have a size: of floats and of ggml's blocks.
    pub(crate) fn stored(&self) -> Option<(&[u8], RowOrder)> {
        self.storage.row_bytes(self.cols).map(|_| (self.raw(), self.order))
    }

    /// All rows, in ranges of at most some four million values.
    pub fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, step) = (self.rows, (PANEL_VALUES / self.cols.max(1)).max(1));
        (0..rows).step_by(step).map(move |from| from..rows.min(from + step))
    }

    /// The values of some rows, row-major.
    pub fn decode(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * self.cols];
        self.matrix().decode_rows(rows, &mut out);
        out
    }
}
