//! A frozen weight: its bytes, wherever they lie, and how they are stored.
//!
//! The bytes are usually part of a memory-mapped file, so holding a weight costs nothing until its rows are read.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use homeroom_kernels::{Matrix, RowOrder, Storage};
use memmap2::Mmap;

/// A matrix of frozen values, `rows` x `cols`, row-major; a vector is one row.
#[derive(Clone)]
pub struct Weight {
    bytes: Bytes,
    storage: Storage,
    rows: usize,
    cols: usize,
    order: RowOrder,
}

#[derive(Clone)]
enum Bytes {
    Mapped(Arc<Mmap>, Range<usize>),
    Owned(Arc<[u8]>),
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

    fn checked(bytes: Bytes, storage: Storage, (rows, cols): (usize, usize), order: RowOrder) -> Result<Self> {
        let weight = Self { bytes, storage, rows, cols, order };
        Matrix::new(storage, weight.raw(), rows, cols, order).map_err(anyhow::Error::msg)?;
        Ok(weight)
    }

    fn raw(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map, range) => &map[range.clone()],
            Bytes::Owned(bytes) => bytes,
        }
    }

    /// The view that kernels take.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.storage, self.raw(), self.rows, self.cols, self.order)
            .expect("`checked` built the same view from the same fields")
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
        self.raw().len()
    }

    /// The values of some rows, row-major.
    pub fn decode(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * self.cols];
        self.matrix().decode_rows(rows, &mut out);
        out
    }
}
