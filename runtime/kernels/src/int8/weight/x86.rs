//! The steps of packing in 512 and in 256 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{PANEL, ZERO, avx_vnni, vnni};
use super::{Book, PIECE, Steps};
use crate::element::scale_of_eight_bits;
use crate::isa::Isa;

const LANES: usize = 16;
const VECTORS: usize = PANEL / LANES;

/// See [`super::round_columns`].
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn round_columns(values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
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
pub(super) unsafe fn round_columns_narrow(values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
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

/// Whole numbers become indices.
///
/// # Safety
/// The processor multiplies bytes as the set says.
pub(super) unsafe fn to_indices(isa: Isa, words: &mut [u32]) {
    // SAFETY: what multiplies bytes has AVX2, and in 512 bits AVX-512.
    unsafe {
        match isa.multiplies_bytes_in_512() {
            true => to_indices_wide(words),
            false => avx_vnni::to_indices(words),
        }
    }
}

/// # Safety
/// See [`round_columns`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn to_indices_wide(words: &mut [u32]) {
    let zero = _mm512_set1_epi8(ZERO as i8);
    for words in words.as_chunks_mut::<LANES>().0 {
        let words: *mut __m512i = words.as_mut_ptr().cast();
        // SAFETY: sixteen words are 64 bytes.
        unsafe { _mm512_storeu_si512(words, _mm512_add_epi8(_mm512_loadu_si512(words), zero)) };
    }
}

/// 512 bits.
struct Wide;
/// 256 bits.
struct Narrow;

impl Steps for Wide {
    type Table = __m128i;

    #[inline(always)]
    unsafe fn nothing() -> __m128i {
        // SAFETY: every x86-64 processor has it.
        unsafe { _mm_setzero_si128() }
    }

    #[inline(always)]
    unsafe fn piece(bytes: &[u8; PIECE / 2], table: __m128i, out: &mut [u8; PIECE]) {
        // SAFETY: passed on to the caller.
        unsafe { piece(bytes, table, out) }
    }

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
    type Table = __m128i;

    #[inline(always)]
    unsafe fn nothing() -> __m128i {
        // SAFETY: as above.
        unsafe { _mm_setzero_si128() }
    }

    #[inline(always)]
    unsafe fn piece(bytes: &[u8; PIECE / 2], table: __m128i, out: &mut [u8; PIECE]) {
        // SAFETY: as above.
        unsafe { piece(bytes, table, out) }
    }

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

/// See [`Steps::piece`].
///
/// # Safety
/// Called from what has AVX2 enabled.
#[inline(always)]
unsafe fn piece(bytes: &[u8; PIECE / 2], table: __m128i, out: &mut [u8; PIECE]) {
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

impl Book<'_> {
    /// See [`Self::row`].
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn row_wide(
        &self,
        row: usize,
        sum: Range<usize>,
        out: &mut [i8],
        scales: &mut [[f32; PANEL]],
        j: usize,
    ) {
        // SAFETY: passed on to the caller; so below.
        unsafe { self.row::<Wide>(row, sum, out, scales, j) }
    }

    /// See [`Self::row`].
    ///
    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn row_narrow(
        &self,
        row: usize,
        sum: Range<usize>,
        out: &mut [i8],
        scales: &mut [[f32; PANEL]],
        j: usize,
    ) {
        // SAFETY: as above.
        unsafe { self.row::<Narrow>(row, sum, out, scales, j) }
    }

    /// See [`Self::columns`].
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn columns_wide(
        &self,
        sum: Range<usize>,
        column: usize,
        out: &mut [u32],
        scales: &mut [[f32; PANEL]],
    ) {
        // SAFETY: as above.
        unsafe { self.columns::<Wide>(sum, column, out, scales) }
    }

    /// See [`Self::columns`].
    ///
    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn columns_narrow(
        &self,
        sum: Range<usize>,
        column: usize,
        out: &mut [u32],
        scales: &mut [[f32; PANEL]],
    ) {
        // SAFETY: as above.
        unsafe { self.columns::<Narrow>(sum, column, out, scales) }
    }
}
