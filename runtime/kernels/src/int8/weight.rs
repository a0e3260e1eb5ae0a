//! Weights of any storage as whole numbers for products in integers: each column of a panel, of [`GROUP`] neighbouring values of the sum, is
//! rounded to 255 levels around 0 with a scale of its own while the panel is packed.
//!
//! Of a code book of sixteen levels these are rounded, once a block, instead of the values.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{GROUP, ZERO, avx_vnni, round_bytes, vnni};
use crate::buffer::grown;
use crate::element::scale_of_eight_bits;
use crate::isa::Isa;
use crate::matmul::Matrix;
use crate::storage::codec::Coded;
use crate::tile::{PANEL, pack_columns};

const LANES: usize = 16;
const VECTORS: usize = PANEL / LANES;

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
            // SAFETY: whoever packs weights of any storage has seen that the processor multiplies bytes, for which it has AVX2, and in 512
            // bits AVX-512.
            unsafe {
                match isa.multiplies_bytes_in_512() {
                    true => book.row_wide(columns.start + j, sum.clone(), codes, scales, j),
                    false => book.row_narrow(columns.start + j, sum.clone(), codes, scales, j),
                }
            }
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
    // SAFETY: as above.
    unsafe {
        match isa.multiplies_bytes_in_512() {
            true => to_indices(&mut out[..words * PANEL]),
            false => avx_vnni::to_indices(&mut out[..words * PANEL]),
        }
    }
}

/// Whole numbers become indices.
///
/// # Safety
/// The processor has AVX-512; so for all below.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn to_indices(words: &mut [u32]) {
    let zero = _mm512_set1_epi8(ZERO as i8);
    for words in words.as_chunks_mut::<LANES>().0 {
        let words: *mut __m512i = words.as_mut_ptr().cast();
        // SAFETY: sixteen words are 64 bytes.
        unsafe { _mm512_storeu_si512(words, _mm512_add_epi8(_mm512_loadu_si512(words), zero)) };
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
        return unsafe {
            match isa.multiplies_bytes_in_512() {
                true => book.columns_wide(sum, columns.start, out, scales),
                false => book.columns_narrow(sum, columns.start, out, scales),
            }
        };
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
        unsafe {
            match isa.multiplies_bytes_in_512() {
                true => round_columns(values, words, scales),
                false => round_columns_narrow(values, words, scales),
            }
        }
    }
}

/// Rounds columns of a group: values (n, PANEL) to words (n / 4, PANEL).
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn round_columns(values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
    let mut most = [_mm512_setzero_si512(); VECTORS];
    for row in values.as_chunks::<PANEL>().0 {
        for (v, most) in most.iter_mut().enumerate() {
            // SAFETY: a row is four vectors; so for all below.
            let bits = unsafe { _mm512_loadu_si512(row.as_ptr().add(LANES * v).cast()) };
            *most = _mm512_max_epu32(*most, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
        }
    }
    let mut largest = [0f32; PANEL];
    for (v, most) in most.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(largest.as_mut_ptr().add(LANES * v).cast(), most) };
    }
    let mut inverses = [0f32; PANEL];
    for ((scale, inverse), largest) in scales.iter_mut().zip(&mut inverses).zip(largest) {
        (*scale, *inverse) = scale_of_eight_bits(largest);
    }
    let zero = _mm512_set1_epi32(ZERO);
    for (rows, words) in values.as_chunks::<{ 4 * PANEL }>().0.iter().zip(words.as_chunks_mut::<PANEL>().0) {
        for v in 0..VECTORS {
            // SAFETY: as above, four rows.
            unsafe {
                let p = rows.as_ptr().add(LANES * v);
                let inverse = _mm512_loadu_ps(inverses.as_ptr().add(LANES * v));
                let a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p), inverse));
                let b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p.add(PANEL)), inverse));
                let c = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p.add(2 * PANEL)), inverse));
                let d = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p.add(3 * PANEL)), inverse));
                let (a, b) = (_mm512_add_epi32(a, zero), _mm512_add_epi32(b, zero));
                let (c, d) = (_mm512_add_epi32(c, zero), _mm512_add_epi32(d, zero));
                let low = _mm512_or_si512(a, _mm512_slli_epi32::<8>(b));
                let high = _mm512_or_si512(c, _mm512_slli_epi32::<8>(d));
                let word = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_si512(words.as_mut_ptr().add(LANES * v).cast(), word);
            }
        }
    }
}

/// See [`round_columns`].
///
/// # Safety
/// The processor has AVX2.
unsafe fn round_columns_narrow(values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
    let mut inverses = [0f32; PANEL];
    // SAFETY: passed on to the caller; so below.
    let largest = unsafe { avx_vnni::largest_of_columns(values) };
    for ((scale, inverse), largest) in scales.iter_mut().zip(&mut inverses).zip(largest) {
        (*scale, *inverse) = scale_of_eight_bits(f32::from_bits(largest));
    }
    for (rows, words) in values.as_chunks().0.iter().zip(words.as_chunks_mut().0) {
        // SAFETY: as above.
        unsafe { avx_vnni::round_rows(rows, &inverses, words) };
    }
}

/// Steps of packing by a book, in vectors of one width.
trait Steps {
    /// Indices that stand for the levels times a factor.
    ///
    /// # Safety
    /// The processor has the vectors; so below.
    unsafe fn table(levels: &[f32; 16], factor: f32) -> __m128i;
    /// Words of a byte of each of four rows.
    unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]);
}

/// 512 bits.
struct Wide;
/// 256 bits.
struct Narrow;

impl Steps for Wide {
    #[inline(always)]
    unsafe fn table(levels: &[f32; 16], factor: f32) -> __m128i {
        // SAFETY: there are sixteen levels, and the caller has AVX-512.
        unsafe {
            let levels = _mm512_loadu_ps(levels.as_ptr());
            let whole = _mm512_cvtps_epi32(_mm512_mul_ps(levels, _mm512_set1_ps(factor)));
            _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(ZERO)))
        }
    }

    #[inline(always)]
    unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]) {
        // SAFETY: passed on to the caller.
        unsafe { vnni::weave(rows, out) }
    }
}

impl Steps for Narrow {
    #[inline(always)]
    unsafe fn table(levels: &[f32; 16], factor: f32) -> __m128i {
        // SAFETY: passed on to the caller; so below.
        unsafe { avx_vnni::table(levels, factor) }
    }

    #[inline(always)]
    unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]) {
        // SAFETY: as above.
        unsafe { avx_vnni::weave(rows, out) }
    }
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

    /// The piece that begins with a value.
    ///
    /// # Safety
    /// Called from what has AVX2 enabled.
    #[inline(always)]
    unsafe fn piece(&self, row: usize, col: usize, table: __m128i, out: &mut [u8; PIECE]) {
        let bytes = &self.codes[(row * self.cols + col) / 2..][..PIECE / 2];
        // SAFETY: a piece is sixteen bytes, and 32 codes.
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            let low = _mm_set1_epi8(15);
            // A byte's upper half comes first.
            let (first, second) = (_mm_and_si128(_mm_srli_epi16::<4>(bytes), low), _mm_and_si128(bytes, low));
            let (a, b) = (_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second));
            let out = out.as_mut_ptr();
            _mm_storeu_si128(out.cast(), _mm_shuffle_epi8(table, a));
            _mm_storeu_si128(out.add(PIECE / 2).cast(), _mm_shuffle_epi8(table, b));
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
            // SAFETY: every x86-64 processor has it.
            let (mut last, mut table) = (f32::NAN, unsafe { _mm_setzero_si128() });
            for (number, (piece, scale)) in pieces.iter_mut().zip(of_pieces).enumerate() {
                // SAFETY: bytes, with a sign or without; the rest is passed on to the caller.
                unsafe {
                    if scale != last {
                        (last, table) = (scale, S::table(&self.levels, scale * inverse));
                    }
                    let piece = &mut *(&raw mut *piece).cast::<[u8; PIECE]>();
                    self.piece(row, col + number * PIECE, table, piece);
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
                            self.piece(from + row, column + half * PIECE, table, codes);
                        }
                    }
                }
                let [a, b, c, d] = &rows;
                // SAFETY: passed on to the caller.
                unsafe { S::weave([a, b, c, d], out) };
            }
        }
    }

    /// See [`Self::row`].
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn row_wide(&self, row: usize, sum: Range<usize>, out: &mut [i8], scales: &mut [[f32; PANEL]], j: usize) {
        // SAFETY: passed on to the caller; so below.
        unsafe { self.row::<Wide>(row, sum, out, scales, j) }
    }

    /// See [`Self::row`].
    ///
    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn row_narrow(&self, row: usize, sum: Range<usize>, out: &mut [i8], scales: &mut [[f32; PANEL]], j: usize) {
        // SAFETY: as above.
        unsafe { self.row::<Narrow>(row, sum, out, scales, j) }
    }

    /// See [`Self::columns`].
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn columns_wide(&self, sum: Range<usize>, column: usize, out: &mut [u32], scales: &mut [[f32; PANEL]]) {
        // SAFETY: as above.
        unsafe { self.columns::<Wide>(sum, column, out, scales) }
    }

    /// See [`Self::columns`].
    ///
    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    unsafe fn columns_narrow(&self, sum: Range<usize>, column: usize, out: &mut [u32], scales: &mut [[f32; PANEL]]) {
        // SAFETY: as above.
        unsafe { self.columns::<Narrow>(sum, column, out, scales) }
    }
}
