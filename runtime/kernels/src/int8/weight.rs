//! Weights of any storage as whole numbers for products in integers: each column of a panel, of [`GROUP`] neighbouring values of the sum, is
//! rounded to 255 levels around 0 with a scale of its own while the panel is packed.
//!
//! Of a code book of sixteen levels these are rounded, once a block, instead of the values. What the whole numbers become in a panel, indices
//! or bytes with a sign, says the processor, see [`Steps`].

#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use super::{GROUP, round_bytes};
use crate::buffer::grown;
use crate::element::scale_of_eight_bits;
use crate::isa::{Int8Unit, Isa};
use crate::matmul::Matrix;
use crate::storage::codec::Coded;
use crate::tile::{PANEL, pack_columns};

/// A thread's buffers.
#[derive(Default)]
pub(crate) struct Buffers {
    floats: Vec<f32>,
    codes: Vec<i8>,
}

/// Packs the part `sum` of the sum for rows `columns` of W: words of four indices of [`PANEL`] columns beside each other, and for each
/// group the columns' scales.
pub(super) fn pack_forward(
    isa: Isa,
    w: &Matrix<'_>,
    sum: Range<usize>,
    columns: Range<usize>,
    out: &mut [u32],
    scales: &mut [[f32; PANEL]],
    buffers: &mut Buffers,
) {
    let (len, words) = (sum.len(), sum.len() / 4);
    let codes = grown(&mut buffers.codes, columns.len() * len);
    if let Some(book) = Book::of(w).filter(|_| sum.start.is_multiple_of(PIECE) && len.is_multiple_of(PIECE)) {
        let mut pointers = [std::ptr::null(); PANEL];
        for (j, codes) in codes.chunks_exact_mut(len).enumerate() {
            // SAFETY: whoever packs weights of any storage has seen that the processor multiplies bytes.
            unsafe { book.pack_row(isa, columns.start + j, sum.clone(), codes, scales, j) };
            pointers[j] = codes.as_ptr().cast();
        }
        // SAFETY: each pointer is to `words` words.
        return unsafe { pack_columns(isa, &pointers[..columns.len()], words, out) };
    }
    let floats = grown(&mut buffers.floats, len);
    let groups = len.div_ceil(GROUP);
    let (mut of_row, mut starts) = (vec![0.0; groups], vec![0; groups]);
    let mut pointers = [std::ptr::null(); PANEL];
    for (j, codes) in codes.chunks_exact_mut(len).enumerate() {
        w.decode_part(columns.start + j..columns.start + j + 1, sum.clone(), floats);
        round_bytes(isa, floats, codes, &mut of_row, &mut starts);
        for (scales, scale) in scales.iter_mut().zip(&of_row) {
            scales[j] = *scale;
        }
        pointers[j] = codes.as_ptr().cast();
    }
    // SAFETY: each pointer is to `words` words.
    unsafe { pack_columns(isa, &pointers[..columns.len()], words, out) };
    #[cfg(target_arch = "x86_64")]
    if !isa.multiplies_signed_bytes() {
        // SAFETY: as above.
        unsafe { x86::to_indices(isa, &mut out[..words * PANEL]) };
    }
}

/// The same for columns `columns` of W, where the sum runs over its rows.
pub(super) fn pack_backward(
    isa: Isa,
    w: &Matrix<'_>,
    sum: Range<usize>,
    columns: Range<usize>,
    out: &mut [u32],
    scales: &mut [[f32; PANEL]],
    buffers: &mut Buffers,
) {
    let width = columns.len();
    if let Some(book) = Book::of(w).filter(|_| columns.start.is_multiple_of(PANEL) && width == PANEL) {
        // SAFETY: as in `pack_forward`.
        return unsafe { book.pack_columns(isa, sum, columns.start, out, scales) };
    }
    let floats = grown(&mut buffers.floats, GROUP * PANEL);
    for (group, scales) in scales.iter_mut().enumerate().take(sum.len().div_ceil(GROUP)) {
        let from = sum.start + group * GROUP;
        let rows = from..sum.end.min(from + GROUP);
        let values = &mut floats[..rows.len() * PANEL];
        if width == PANEL {
            w.decode_part(rows.clone(), columns.clone(), values);
        } else {
            values.fill(0.0);
            for (row, values) in rows.clone().zip(values.chunks_exact_mut(PANEL)) {
                w.decode_part(row..row + 1, columns.clone(), &mut values[..width]);
            }
        }
        let words = &mut out[group * (GROUP / 4) * PANEL..][..rows.len() / 4 * PANEL];
        // SAFETY: as in `pack_forward`; there are as many values as rows times columns.
        unsafe { round_columns(isa, values, words, scales) };
    }
}

/// Rounds columns of a group: values (n, PANEL) to words (n / 4, PANEL).
///
/// # Safety
/// The processor multiplies bytes as the set says; so for all below.
unsafe fn round_columns(isa: Isa, values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
    match isa.int8_unit() {
        // SAFETY: passed on to the caller; so below.
        #[cfg(target_arch = "x86_64")]
        Int8Unit::Amx | Int8Unit::Avx512Vnni => unsafe { x86::round_columns(values, words, scales) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Int8Unit::AvxVnni => unsafe { x86::round_columns_narrow(values, words, scales) },
        #[cfg(any(test, target_arch = "aarch64"))]
        Int8Unit::Smmla | Int8Unit::Sdot => neon::round_columns(values, words, scales),
        unit => unreachable!("columns are rounded where bytes are multiplied, not by {unit:?}"),
    }
}

/// Steps of packing by a book, in vectors of one width.
trait Steps {
    type Table: Copy;
    /// A table of nothing.
    ///
    /// # Safety
    /// The processor has the vectors; so below.
    unsafe fn nothing() -> Self::Table;
    /// What stands for the levels times a factor.
    unsafe fn table(levels: &[f32; 16], factor: f32) -> Self::Table;
    /// What stands for the codes in sixteen bytes, of which a byte's upper half comes first.
    unsafe fn piece(bytes: &[u8; PIECE / 2], table: Self::Table, out: &mut [u8; PIECE]);
    /// Words of a byte of each of four rows.
    unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]);
}

/// Codes that are decoded together, all of one block.
const PIECE: usize = 32;

/// Four-bit indices of a code book.
struct Book<'a> {
    coded: &'a Coded<'a>,
    codes: &'a [u8],
    cols: usize,
    levels: [f32; 16],
    /// The largest magnitude of a level.
    largest: f32,
}

impl<'a> Book<'a> {
    fn of(w: &'a Matrix<'_>) -> Option<Self> {
        let coded = w.coded_view()?;
        let levels = coded.levels_of_four_bits()?;
        let whole = coded.block_len().is_multiple_of(PIECE) && w.cols.is_multiple_of(PIECE);
        let largest = levels.iter().fold(0f32, |most, level| most.max(level.abs()));
        let (codes, cols) = coded.indices();
        whole.then_some(Self { coded, codes, cols, levels, largest })
    }

    /// The block of a value.
    fn block(&self, row: usize, col: usize) -> usize {
        (row * self.cols + col) / self.coded.block_len()
    }

    /// What a group is multiplied by whose blocks have these scales, and the scales before levels are rounded.
    fn scale(&self, scales: impl Iterator<Item = f32>) -> (f32, f32) {
        // Bits without the sign are in the order of magnitudes, and NaN lies above all.
        let largest = f32::from_bits(scales.map(|scale| scale.to_bits() & 0x7FFF_FFFF).fold(0, u32::max));
        scale_of_eight_bits(largest * self.largest)
    }

    /// The codes of the piece that begins with a value.
    fn codes(&self, row: usize, col: usize) -> &[u8; PIECE / 2] {
        let bytes = &self.codes[(row * self.cols + col) / 2..];
        bytes.first_chunk().expect("a piece is sixteen bytes")
    }

    /// See [`Self::row`].
    ///
    /// # Safety
    /// See [`round_columns`].
    unsafe fn pack_row(
        &self,
        isa: Isa,
        row: usize,
        sum: Range<usize>,
        out: &mut [i8],
        scales: &mut [[f32; PANEL]],
        j: usize,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match isa.int8_unit() {
                #[cfg(target_arch = "x86_64")]
                Int8Unit::Amx | Int8Unit::Avx512Vnni => self.row_wide(row, sum, out, scales, j),
                #[cfg(target_arch = "x86_64")]
                Int8Unit::AvxVnni => self.row_narrow(row, sum, out, scales, j),
                #[cfg(any(test, target_arch = "aarch64"))]
                Int8Unit::Smmla | Int8Unit::Sdot => self.row::<neon::Neon>(row, sum, out, scales, j),
                unit => unreachable!("rows are rounded where bytes are multiplied, not by {unit:?}"),
            }
        }
    }

    /// See [`Self::columns`].
    ///
    /// # Safety
    /// See [`round_columns`].
    unsafe fn pack_columns(
        &self,
        isa: Isa,
        sum: Range<usize>,
        column: usize,
        out: &mut [u32],
        scales: &mut [[f32; PANEL]],
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match isa.int8_unit() {
                #[cfg(target_arch = "x86_64")]
                Int8Unit::Amx | Int8Unit::Avx512Vnni => self.columns_wide(sum, column, out, scales),
                #[cfg(target_arch = "x86_64")]
                Int8Unit::AvxVnni => self.columns_narrow(sum, column, out, scales),
                #[cfg(any(test, target_arch = "aarch64"))]
                Int8Unit::Smmla | Int8Unit::Sdot => self.columns::<neon::Neon>(sum, column, out, scales),
                unit => unreachable!("columns are rounded where bytes are multiplied, not by {unit:?}"),
            }
        }
    }

    /// Indices of a part of a row, and the scale of each group to column j.
    ///
    /// # Safety
    /// Called from what has the vectors of `S` enabled.
    #[inline(always)]
    unsafe fn row<S: Steps>(
        &self,
        row: usize,
        sum: Range<usize>,
        out: &mut [i8],
        scales: &mut [[f32; PANEL]],
        j: usize,
    ) {
        let groups = sum.step_by(GROUP).zip(out.chunks_mut(GROUP)).zip(scales);
        for ((col, out), scales) in groups {
            let (pieces, _) = out.as_chunks_mut::<PIECE>();
            let mut of_pieces = [0f32; GROUP / PIECE];
            for (number, scale) in of_pieces[..pieces.len()].iter_mut().enumerate() {
                *scale = self.coded.scale(self.block(row, col + number * PIECE));
            }
            let inverse;
            (scales[j], inverse) = self.scale(of_pieces.iter().copied());
            // SAFETY: passed on to the caller.
            let (mut last, mut table) = (f32::NAN, unsafe { S::nothing() });
            for (number, (piece, scale)) in pieces.iter_mut().zip(of_pieces).enumerate() {
                // SAFETY: bytes, with a sign or without; the rest is passed on to the caller.
                unsafe {
                    if scale != last {
                        (last, table) = (scale, S::table(&self.levels, scale * inverse));
                    }
                    let piece = &mut *(&raw mut *piece).cast::<[u8; PIECE]>();
                    S::piece(self.codes(row, col + number * PIECE), table, piece);
                }
            }
        }
    }

    /// Words of [`PANEL`] columns from `column` on, where the sum runs over rows.
    ///
    /// # Safety
    /// Called from what has the vectors of `S` enabled.
    #[inline(always)]
    unsafe fn columns<S: Steps>(&self, sum: Range<usize>, column: usize, out: &mut [u32], scales: &mut [[f32; PANEL]]) {
        let mut rows = [[0u8; PANEL]; 4];
        let mut of_rows = [[0f32; PANEL / PIECE]; GROUP];
        for (group, scales) in scales.iter_mut().enumerate().take(sum.len().div_ceil(GROUP)) {
            let from = sum.start + group * GROUP;
            let count = (sum.end - from).min(GROUP);
            for (i, of_row) in of_rows[..count].iter_mut().enumerate() {
                for (half, scale) in of_row.iter_mut().enumerate() {
                    *scale = self.coded.scale(self.block(from + i, column + half * PIECE));
                }
            }
            let mut inverses = [0f32; PANEL / PIECE];
            for (half, inverse) in inverses.iter_mut().enumerate() {
                let scale;
                (scale, *inverse) = self.scale(of_rows[..count].iter().map(|of_row| of_row[half]));
                scales[half * PIECE..(half + 1) * PIECE].fill(scale);
            }
            let words = out[group * (GROUP / 4) * PANEL..].as_chunks_mut::<PANEL>().0;
            for (word, out) in words.iter_mut().enumerate().take(count / 4) {
                for (i, codes) in rows.iter_mut().enumerate() {
                    let row = 4 * word + i;
                    for (half, codes) in codes.as_chunks_mut::<PIECE>().0.iter_mut().enumerate() {
                        // SAFETY: passed on to the caller.
                        unsafe {
                            let table = S::table(&self.levels, of_rows[row][half] * inverses[half]);
                            S::piece(self.codes(from + row, column + half * PIECE), table, codes);
                        }
                    }
                }
                let [a, b, c, d] = &rows;
                // SAFETY: passed on to the caller.
                unsafe { S::weave([a, b, c, d], out) };
            }
        }
    }
}
