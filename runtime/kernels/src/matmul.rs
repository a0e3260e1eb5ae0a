//! Products with a stored weight, forward and backward in x, without ever holding the weight as floats.
//!
//! A task decodes a panel of W into a scratch of its own thread and hands it to the `gemm` crate, single-threaded.
//! What tasks there are follows from the shape alone, each element of the result belongs to one task, and its sum is
//! taken in one order; so results are equal bit by bit for any number of threads, and row i of a result depends on
//! row i of the input (and W) alone, not on how many rows share the call.

use crate::dot;
use crate::element::Element;
use crate::isa::isa;
use crate::pool::Shared;
use crate::storage::Storage;
use crate::storage::codec::{CheckedCodec, Codec, Coded, EncodedScales, Scales};
use crate::storage::rows::decode_row;
use crate::tile::PANEL;
use gemm::Parallelism;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

/// Rows of W that a task of [`matmul_t`] decodes.
///
/// Small, so that even a layer of 576 rows is many tasks; 64 and 96 were no faster where they divide the work evenly.
const PANEL_ROWS: usize = 32;
/// Columns of W for a task of [`matmul`], rounded up to a whole number of blocks.
const PANEL_COLS: usize = 32;
/// Rows of x up to which dot products beat packing W for a matrix product.
const FEW: usize = 4;
/// Terms that one call to `gemm` sums at most. At 512 and below it sums them in one pass whatever the shape is, so that
/// the order of additions does not depend on the number of rows.
const DEPTH_MAX: usize = 512;

/// A stored matrix: `rows` x `cols`, row-major by blocks; row i of the matrix is stored at index `order.stored(i)`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// How the rows are stored.
    pub storage: Storage,
    /// `rows` rows of `storage.row_bytes(cols)` bytes, little-endian, of any alignment.
    pub bytes: &'a [u8],
    /// Rows, the outputs of a linear layer.
    pub rows: usize,
    /// Columns, its inputs.
    pub cols: usize,
    /// Where a row lies.
    pub order: RowOrder,
    /// What the bytes mean when they are indices into a code book.
    pub coded: Option<Coded<'a>>,
    /// What they mean when they are the blocks of a codec that is given as functions.
    pub native: Option<&'a dyn BlockCodec>,
}

/// A codec that is given as functions: blocks of a fixed number of values in a fixed number of bytes.
pub trait BlockCodec: std::fmt::Debug + Send + Sync {
    /// Values of a block: a power of two, 256 at most.
    fn block_len(&self) -> usize;
    /// Bytes of a block.
    fn block_bytes(&self) -> usize;
    /// Decodes whole blocks.
    fn decode(&self, bytes: &[u8], values: &mut [f32]);
}

/// The order in which the rows of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As they come.
    Natural,
    /// The rows of q and k in GGUF files of Llama models: within a head, the two halves that rotate together are
    /// interleaved (rotary embedding over pairs of neighbours).
    Interleaved {
        /// Rows of a head, an even number.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where row `i` is stored. Row t (head_dim / 2) + j of a head lies at 2 j + t.
    pub fn stored(self, i: usize) -> usize {
        match self {
            Self::Natural => i,
            Self::Interleaved { head_dim } => {
                let (head, within) = (i / head_dim, i % head_dim);
                let (t, j) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * j + t
            }
        }
    }
}

impl<'a> Matrix<'a> {
    /// A matrix over `bytes`.
    ///
    /// # Errors
    /// When `cols` is not a whole number of blocks, `bytes` has not the size that the shape asks for, or the rows are
    /// not whole heads of even size.
    pub fn new(storage: Storage, bytes: &'a [u8], rows: usize, cols: usize, order: RowOrder) -> Result<Self, String> {
        let row_bytes = storage.row_bytes(cols).ok_or_else(|| {
            let block = storage.block_len();
            format!("{storage:?}: {cols} columns are not a whole number of blocks of {block}")
        })?;
        let expected = row_bytes
            .checked_mul(rows)
            .filter(|_| rows.checked_mul(cols).is_some())
            .ok_or_else(|| format!("{storage:?}: {rows} x {cols} is too large"))?;
        if bytes.len() != expected {
            let got = bytes.len();
            return Err(format!("{storage:?}: {rows} x {cols} takes {expected} bytes, got {got}"));
        }
        if let RowOrder::Interleaved { head_dim } = order
            && (head_dim == 0 || !head_dim.is_multiple_of(2) || !rows.is_multiple_of(head_dim))
        {
            return Err(format!("{rows} rows are not whole heads of {head_dim}"));
        }
        Ok(Self { storage, bytes, rows, cols, order, coded: None, native: None })
    }

    /// An encoded matrix.
    ///
    /// # Errors
    /// See [`Coded::new`].
    pub fn coded(
        codec: &'a Codec,
        codes: &'a [u8],
        scales: &'a EncodedScales,
        rows: usize,
        cols: usize,
    ) -> Result<Self, String> {
        Ok(Self::of_coded(Coded::new(codec, codes, scales, rows, cols)?, codes, rows, cols))
    }

    /// An encoded matrix.
    ///
    /// # Errors
    /// See [`Coded::of_checked`].
    pub fn coded_checked(
        codec: &'a CheckedCodec,
        codes: &'a [u8],
        scales: Scales<'a>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, String> {
        Ok(Self::of_coded(Coded::of_checked(codec, codes, scales, rows, cols)?, codes, rows, cols))
    }

    fn of_coded(coded: Coded<'a>, bytes: &'a [u8], rows: usize, cols: usize) -> Self {
        let (storage, order, coded) = (Storage::Coded, RowOrder::Natural, Some(coded));
        Self { storage, bytes, rows, cols, order, coded, native: None }
    }

    /// A matrix of blocks that `codec` decodes.
    ///
    /// # Errors
    /// When `cols` is not a whole number of blocks, or `bytes` has not the size that the shape asks for.
    pub fn native(codec: &'a dyn BlockCodec, bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self, String> {
        let (len, size) = (codec.block_len(), codec.block_bytes());
        if !len.is_power_of_two() || len > 256 || size == 0 || !cols.is_multiple_of(len) {
            return Err(format!("{cols} columns are not a whole number of blocks of {len}"));
        }
        let expected = (cols / len).checked_mul(size).and_then(|row| row.checked_mul(rows));
        if expected != Some(bytes.len()) {
            return Err(format!("{rows} x {cols} in blocks of {size} bytes does not take {} bytes", bytes.len()));
        }
        let (storage, order, native) = (Storage::Native, RowOrder::Natural, Some(codec));
        Ok(Self { storage, bytes, rows, cols, order, coded: None, native })
    }

    /// Decodes `rows` (indices in the matrix's own order) into `out` (rows.len(), cols).
    ///
    /// # Panics
    /// When `out` has another size or a row is out of range.
    pub fn decode_rows<T: Float>(&self, rows: Range<usize>, out: &mut [T]) {
        assert_eq!(out.len(), rows.len() * self.cols, "values of {rows:?}");
        self.decode_part(rows, 0..self.cols, out);
    }

    /// Decodes the block `rows` x `cols`, whose columns are whole blocks, into `out`.
    pub(crate) fn decode_part<T: Float>(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [T]) {
        if cols.is_empty() {
            return;
        }
        if let Some(coded) = &self.coded {
            for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
                T::decode_coded(coded, row, cols.clone(), out);
            }
            return;
        }
        if let Some(codec) = self.native {
            let size = |cols: usize| cols / codec.block_len() * codec.block_bytes();
            for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
                let row = &self.bytes[row * size(self.cols)..][size(cols.start)..size(cols.end)];
                T::decode_native(codec, row, out);
            }
            return;
        }
        let size = |cols| {
            let size = self.storage.row_bytes(cols);
            size.expect("the columns are a whole number of blocks")
        };
        let (row_bytes, from, to) = (size(self.cols), size(cols.start), size(cols.end));
        for (i, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            let at = self.order.stored(i) * row_bytes;
            T::decode(self.storage, &self.bytes[at + from..at + to], out);
        }
    }

    /// Whether products with it may be taken in integers: if it has eight bits a value on a straight line, with a scale for each row, or,
    /// where the processor multiplies bytes, any values that are not decoded many at a time.
    pub fn multiplies_in_integers(&self) -> bool {
        let rounded = || self.block_len() <= PANEL && isa().multiplies_bytes();
        (self.line().is_some() || rounded()) && self.rows.is_multiple_of(4) && self.cols.is_multiple_of(4)
    }

    /// The same of products forward alone, where any values may be decoded together.
    pub fn multiplies_forward_in_integers(&self) -> bool {
        self.multiplies_in_integers()
            || isa().multiplies_bytes() && self.rows.is_multiple_of(4) && self.cols.is_multiple_of(4)
    }

    /// Whether products with it may be taken in the whole numbers that it is stored in, forward: of ggml's blocks, where the processor
    /// multiplies bytes in 256 bits. Q8_0, whose products two by two are more than AVX2 holds, only by AVX-VNNI.
    pub fn multiplies_as_stored(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return crate::int8::stored::takes(isa(), self.storage);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Its codes, if it is stored by a code book.
    pub(crate) fn coded_view(&self) -> Option<&Coded<'a>> {
        self.coded.as_ref()
    }

    /// Its codes, if they are whole numbers already: eight bits a value on a straight line, with a scale for each row.
    pub(crate) fn line(&self) -> Option<&Coded<'a>> {
        self.coded.as_ref().filter(|coded| coded.has_linear_rows())
    }

    /// What the whole numbers of some rows stand for, one by one, when they are multiplied in integers.
    pub(crate) fn integer_scales(&self, rows: Range<usize>) -> Vec<f32> {
        self.coded.iter().flat_map(|coded| rows.clone().map(|row| coded.scale(row) * (1.0 / 127.0))).collect()
    }

    /// Values in one block along a row, which is decoded as a whole.
    pub fn block_len(&self) -> usize {
        self.native.map_or(self.storage.block_len(), BlockCodec::block_len)
    }

    /// Row `i` as values of E, when that is how they lie there.
    pub(crate) fn row_of<E: Element>(&self, i: usize) -> Option<&'a [u8]> {
        let direct = self.storage == E::STORAGE && cfg!(target_endian = "little");
        let size = self.cols * size_of::<E>();
        direct.then(|| &self.bytes[self.order.stored(i) * size..][..size])
    }

    /// All values in the order in which the rows are stored, when they lie there as E and aligned.
    pub(crate) fn values_of<E: Element>(&self) -> Option<&'a [E]> {
        if self.storage != E::STORAGE || cfg!(target_endian = "big") {
            return None;
        }
        // SAFETY: every bit pattern is a value of either element type, and `align_to` sees to alignment.
        let (before, values, after) = unsafe { self.bytes.align_to::<E>() };
        (before.is_empty() && after.is_empty()).then_some(values)
    }

    /// The values themselves, when they are stored as the product needs them.
    fn values<T: Float>(&self) -> Option<&'a [T]> {
        let direct = self.storage == Storage::F32 && self.order == RowOrder::Natural;
        let values = direct.then(|| T::of_f32_bytes(self.bytes)).flatten()?;
        (values.len() == self.rows * self.cols).then_some(values)
    }
}

/// What a product is computed in: f32, or f64 for gradient checks.
pub trait Float: sealed::Float {}
impl Float for f32 {}
impl Float for f64 {}

mod sealed {
    use super::*;

    pub trait Float: Copy + Default + Send + Sync + 'static {
        const ONE: Self;
        /// Decodes a whole number of blocks.
        fn decode(storage: Storage, bytes: &[u8], out: &mut [Self]);
        /// Decodes part of a row.
        fn decode_coded(coded: &Coded<'_>, row: usize, cols: Range<usize>, out: &mut [Self]);
        /// Decodes whole blocks.
        fn decode_native(codec: &dyn BlockCodec, bytes: &[u8], out: &mut [Self]);
        /// `bytes` as values, when that is what f32 in the file's byte order are here.
        fn of_f32_bytes(bytes: &[u8]) -> Option<&[Self]>;
        /// Whether there is a kernel for few rows: see [`dot::dot_rows`].
        fn has_dot_rows() -> bool {
            false
        }
        /// That kernel.
        fn dot_rows(_x: &[Self], _w: &[Self], _step: usize, _y: &mut [Self]) {
            unreachable!("asked for after has_dot_rows");
        }
        /// This thread's scratch.
        fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>>;
    }

    impl Float for f32 {
        const ONE: Self = 1.0;

        fn decode(storage: Storage, bytes: &[u8], out: &mut [f32]) {
            decode_row(storage, bytes, out);
        }

        fn decode_coded(coded: &Coded<'_>, row: usize, cols: Range<usize>, out: &mut [f32]) {
            coded.decode(isa(), row, cols, out);
        }

        fn decode_native(codec: &dyn BlockCodec, bytes: &[u8], out: &mut [f32]) {
            codec.decode(bytes, out);
        }

        fn of_f32_bytes(bytes: &[u8]) -> Option<&[f32]> {
            // SAFETY: every four bytes are an f32, and `align_to` sees to alignment.
            let (before, values, after) = unsafe { bytes.align_to::<f32>() };
            (cfg!(target_endian = "little") && before.is_empty() && after.is_empty()).then_some(values)
        }

        fn has_dot_rows() -> bool {
            dot::available()
        }

        fn dot_rows(x: &[f32], w: &[f32], step: usize, y: &mut [f32]) {
            dot::dot_rows(x, w, step, y)
        }

        fn scratch() -> &'static LocalKey<RefCell<Vec<f32>>> {
            thread_local!(static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
            &SCRATCH
        }
    }

    impl Float for f64 {
        const ONE: Self = 1.0;

        fn decode(storage: Storage, bytes: &[u8], out: &mut [f64]) {
            let mut values = [0f32; 256]; // the length of the longest block, and a multiple of the others
            let chunk_bytes = values.len() / storage.block_len() * storage.block_bytes();
            let chunks = out.chunks_mut(values.len()).zip(bytes.chunks(chunk_bytes));
            for (out, bytes) in chunks {
                let values = &mut values[..out.len()];
                decode_row(storage, bytes, values);
                for (out, value) in out.iter_mut().zip(values) {
                    *out = f64::from(*value);
                }
            }
        }

        fn decode_coded(coded: &Coded<'_>, row: usize, cols: Range<usize>, out: &mut [f64]) {
            let mut values = vec![0f32; out.len()];
            coded.decode(isa(), row, cols, &mut values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f64::from(value));
        }

        fn decode_native(codec: &dyn BlockCodec, bytes: &[u8], out: &mut [f64]) {
            let mut values = vec![0f32; out.len()];
            codec.decode(bytes, &mut values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f64::from(value));
        }

        fn of_f32_bytes(_: &[u8]) -> Option<&[f64]> {
            None
        }

        fn scratch() -> &'static LocalKey<RefCell<Vec<f64>>> {
            thread_local!(static SCRATCH: RefCell<Vec<f64>> = const { RefCell::new(Vec::new()) });
            &SCRATCH
        }
    }
}

/// y (n, rows) = x (n, cols) . W^T, the forward of a linear layer. Overwrites `y`.
///
/// # Panics
/// When `x` or `y` has another size.
pub fn matmul_t<T: Float>(x: &[T], n: usize, w: &Matrix, y: &mut [T]) {
    let (rows, cols) = (w.rows, w.cols);
    check_sizes(n, x.len(), cols, y.len(), rows);
    if cols == 0 {
        y.fill(T::default());
    }
    if n == 0 || rows == 0 || cols == 0 {
        return;
    }
    let values = w.values::<T>();
    let step = even_step(cols);
    let by_dots = n <= FEW && T::has_dot_rows();
    // With few results `gemm` has kernels of its own that add in another order, if both operands are contiguous along
    // the sum. A copy of x with gaps keeps to the common kernel. (Its condition: m n <= 256, or m or n is 1.)
    let few = |panel: usize| n == 1 || panel == 1 || n * panel <= 256;
    let last = rows - (rows - 1) / PANEL_ROWS * PANEL_ROWS;
    let gapped: Vec<T> =
        if !by_dots && few(last) { x.iter().flat_map(|&value| [value, T::default()]).collect() } else { Vec::new() };
    let y = Shared::new(y);
    // Writes columns `panel` of y, from the rows `panel` of W in `w`.
    let columns = |panel: Range<usize>, w: &[T]| {
        let mut sums = [T::default(); PANEL_ROWS];
        let sums = &mut sums[..panel.len()];
        if by_dots {
            for (i, x) in x.chunks_exact(cols).enumerate() {
                T::dot_rows(x, w, step, sums);
                // SAFETY: row i of y has `rows` elements, as checked above, and is alive and borrowed mutably until all
                // tasks have ended; this writes columns `panel`, and no two tasks have a column in common.
                unsafe {
                    let y = y.get().add(i * rows + panel.start);
                    y.copy_from_nonoverlapping(sums.as_ptr(), sums.len());
                }
            }
            return;
        }
        let (x, x_step) = if few(panel.len()) { (&gapped[..], 2) } else { (x, 1) };
        for k in (0..cols).step_by(step) {
            // SAFETY: x is (n, cols) with `x_step` between elements, w is (panel, cols), and y is (n, rows) as checked
            // above, alive and borrowed mutably until all tasks have ended. This call writes columns `panel` of y (and
            // reads them for k > 0), and no two tasks have a column in common.
            unsafe {
                product(
                    [n, panel.len(), step.min(cols - k)],
                    (y.get().add(panel.start), rows, k > 0),
                    (x[x_step * k..].as_ptr(), x_step * cols, x_step),
                    (w[k..].as_ptr(), 1, cols),
                );
            }
        }
    };
    (0..rows.div_ceil(PANEL_ROWS)).into_par_iter().with_max_len(1).for_each(|panel| {
        let panel = panel * PANEL_ROWS..rows.min((panel + 1) * PANEL_ROWS);
        match values {
            Some(values) => columns(panel.clone(), &values[panel.start * cols..panel.end * cols]),
            None => with_scratch(panel.len() * cols, |scratch| {
                w.decode_rows(panel.clone(), scratch);
                columns(panel, scratch);
            }),
        }
    });
}

/// dx (n, cols) = dy (n, rows) . W, the backward of [`matmul_t`] in x. Overwrites `dx`.
///
/// # Panics
/// When `dy` or `dx` has another size.
pub fn matmul<T: Float>(dy: &[T], n: usize, w: &Matrix, dx: &mut [T]) {
    let (rows, cols) = (w.rows, w.cols);
    check_sizes(n, dy.len(), rows, dx.len(), cols);
    if rows == 0 {
        dx.fill(T::default());
    }
    if n == 0 || rows == 0 || cols == 0 {
        return;
    }
    if n == 1 {
        // For a single row `gemm` has a kernel that adds in another order; a second row avoids it.
        let mut two = dy.to_vec();
        two.resize(2 * rows, T::default());
        let mut out = vec![T::default(); 2 * cols];
        matmul(&two, 2, w, &mut out);
        return dx.copy_from_slice(&out[..cols]);
    }
    let values = w.values::<T>();
    let width = PANEL_COLS.next_multiple_of(w.block_len());
    let dx = Shared::new(dx);
    (0..cols.div_ceil(width)).into_par_iter().with_max_len(1).for_each(|panel| {
        let panel = panel * width..cols.min((panel + 1) * width);
        let step = even_step(rows);
        for k in (0..rows).step_by(step) {
            let depth = step.min(rows - k);
            let add = |w: &[T], stride: usize| {
                // SAFETY: dy is (n, rows), w holds the `depth` rows from k on with `stride` between them and at
                // least the columns `panel`, and dx is (n, cols) as checked above, alive and borrowed mutably
                // until all tasks have ended. This call writes (and for k > 0 reads) columns `panel` of dx only,
                // and no two tasks have a column in common.
                unsafe {
                    product(
                        [n, panel.len(), depth],
                        (dx.get().add(panel.start), cols, k > 0),
                        (dy[k..].as_ptr(), rows, 1),
                        (w.as_ptr(), stride, 1),
                    );
                }
            };
            match values {
                Some(values) => add(&values[k * cols + panel.start..], cols),
                None => with_scratch(depth * panel.len(), |scratch| {
                    w.decode_part(k..k + depth, panel.clone(), scratch);
                    add(scratch, panel.len());
                }),
            }
        }
    });
}

fn check_sizes(n: usize, input: usize, input_cols: usize, output: usize, output_cols: usize) {
    assert_eq!(Some(input), n.checked_mul(input_cols), "input of {n} rows");
    assert_eq!(Some(output), n.checked_mul(output_cols), "output of {n} rows");
}

/// The size of equal steps of at most [`DEPTH_MAX`] that cover `depth`.
fn even_step(depth: usize) -> usize {
    depth.div_ceil(depth.div_ceil(DEPTH_MAX))
}

/// c (m, n) = a (m, k) . b (k, n), or c += a . b when `c` says so, on this thread.
///
/// c is (pointer, row stride, add), a and b are (pointer, row stride, column stride).
///
/// # Safety
/// a and b are readable and c writable over their shapes and strides; c overlaps neither, and nobody else accesses
/// these elements of c meanwhile.
unsafe fn product<T: Float>(
    [m, n, k]: [usize; 3],
    (c, c_row, add): (*mut T, usize, bool),
    (a, a_row, a_col): (*const T, usize, usize),
    (b, b_row, b_col): (*const T, usize, usize),
) {
    // SAFETY: passed on to the caller. `gemm` computes c = alpha c + beta a . b, not reading c unless told to.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_row as isize,
            add,
            a,
            a_col as isize,
            a_row as isize,
            b,
            b_col as isize,
            b_row as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Calls `f` with `len` values of this thread's scratch, whose content is unspecified.
///
/// The buffer is taken out meanwhile, so a call within a call would find an empty one and not a borrowed one.
fn with_scratch<T: Float>(len: usize, f: impl FnOnce(&mut [T])) {
    let mut scratch = T::scratch().take();
    if scratch.len() < len {
        scratch.resize(len, T::default());
    }
    f(&mut scratch[..len]);
    T::scratch().replace(scratch);
}
