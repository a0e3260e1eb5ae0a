//! Packing a panel of B for the tiles: for each word of the sum, the words of up to 64 columns beside each other.
//!
//! B is W transposed (forward: a column of B is a row of W) or W itself (backward: a row of B is a row of W).

use std::ops::Range;

use super::operands::PANEL;
use crate::element::Element;
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Feature;
use crate::isa::{Isa, per_isa};
use crate::prefetch::{ROWS_AHEAD, prefetch};

/// Packs columns that are contiguous along the sum: `rows[j]` points at `words` words for column j.
///
/// `out` (words, [`PANEL`]); columns beyond `rows` become zero.
///
/// # Safety
/// Each pointer is readable for `words` words.
pub(crate) unsafe fn pack_columns(isa: Isa, rows: &[*const u8], words: usize, out: &mut [u32]) {
    assert!(rows.len() <= PANEL && out.len() >= words * PANEL);
    #[cfg(target_arch = "x86_64")]
    if isa.has(Feature::Avx512) {
        let mut all = [std::ptr::null(); PANEL];
        all[..rows.len()].copy_from_slice(rows);
        // SAFETY: as the caller promised; null pointers stand for columns of zeros.
        return unsafe { x86::pack_columns(&all, words, out) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has(Feature::Avx2) {
        let mut all = [std::ptr::null(); PANEL];
        all[..rows.len()].copy_from_slice(rows);
        // SAFETY: as above.
        return unsafe { x86::pack_columns_narrow(&all, words, out) };
    }
    #[cfg(any(test, target_arch = "aarch64"))]
    if isa.has(Feature::Neon) {
        // SAFETY: as above.
        return unsafe { neon::pack_columns(rows, words, out) };
    }
    let _ = isa;
    // SAFETY: as the caller promised.
    unsafe { pack_words(rows, 0..words, out) };
}

/// [`pack_columns`], a word after the other.
///
/// # Safety
/// See there.
unsafe fn pack_words(rows: &[*const u8], words: Range<usize>, out: &mut [u32]) {
    for (j, row) in rows.iter().enumerate() {
        for k in words.clone() {
            // SAFETY: as the caller promised.
            out[k * PANEL + j] = unsafe { row.cast::<u32>().add(k).read_unaligned() };
        }
    }
    for out in out[words.start * PANEL..words.end * PANEL].chunks_exact_mut(PANEL) {
        out[rows.len()..].fill(0);
    }
}

per_isa! {
    /// Packs rows that are contiguous across columns: row k of `from` starts at `k * step` and has `width` ≤ [`PANEL`]
    /// columns; `count` rows, an even number for bf16.
    ///
    /// `out` (count / E::PER_WORD, [`PANEL`]); columns beyond `width` become zero.
    pub(crate) fn pack_rows<E: Element>(from: &[E], step: usize, count: usize, width: usize, out: &mut [u32]) {
        let words = count / E::PER_WORD;
        for (k, out) in out[..words * PANEL].as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let row = |i: usize| &from[(k * E::PER_WORD + i) * step..][..width];
            for i in 0..E::PER_WORD {
                prefetch(from, (k * E::PER_WORD + i + ROWS_AHEAD) * step, width);
            }
            // Whole panels have a length that the compiler knows.
            if width == PANEL {
                let first: &[E; PANEL] = row(0).try_into().expect("a whole panel is as wide as a panel");
                let last: &[E; PANEL] = row(E::PER_WORD - 1).try_into().expect("a whole panel is as wide as a panel");
                for j in 0..PANEL {
                    out[j] = word(first[j], last[j]);
                }
            } else {
                let (first, last) = (row(0), row(E::PER_WORD - 1));
                for j in 0..width {
                    out[j] = word(first[j], last[j]);
                }
                out[width..].fill(0);
            }
        }
    }
}

/// As [`pack_rows`] for any number of rows: what the last word lacks, and whole words up to the end of `out`, are zeros.
pub(crate) fn pack_rows_padded<E: Element>(
    isa: Isa,
    from: &[E],
    step: usize,
    count: usize,
    width: usize,
    out: &mut [u32],
) {
    let whole = count / E::PER_WORD;
    pack_rows(isa, from, step, whole * E::PER_WORD, width, out);
    let rest = &mut out[whole * PANEL..];
    rest.fill(0);
    if whole * E::PER_WORD < count {
        let last = &from[whole * E::PER_WORD * step..][..width];
        for (out, value) in rest.iter_mut().zip(last) {
            *out = word(*value, E::default());
        }
    }
}

/// The word of an f32 (given twice) or of two neighbouring bf16.
#[inline(always)]
pub(crate) fn word<E: Element>(first: E, last: E) -> u32 {
    // A bf16 is the upper half of the f32 that it stands for.
    if E::PER_WORD == 1 {
        first.wide().to_bits()
    } else {
        first.wide().to_bits() >> 16 | last.wide().to_bits() & 0xFFFF_0000
    }
}

per_isa! {
    /// Lays rows (m, width) out as the words of their transpose: word p of column i at `out[p * width + i]`, where a word
    /// holds rows 2 p and 2 p + 1 for bf16 and row p for f32. A missing last row counts as zeros.
    pub(crate) fn pair_rows<E: Element>(from: &[E], step: usize, m: usize, width: usize, out: &mut [u32]) {
        for (p, out) in out[..m.div_ceil(E::PER_WORD) * width].chunks_exact_mut(width).enumerate() {
            let (i, last) = (p * E::PER_WORD, p * E::PER_WORD + E::PER_WORD - 1);
            let first = &from[i * step..][..width];
            if last < m {
                let last = &from[last * step..][..width];
                for j in 0..width {
                    out[j] = word(first[j], last[j]);
                }
            } else {
                for j in 0..width {
                    out[j] = word(first[j], E::default());
                }
            }
        }
    }
}

#[cfg(any(test, target_arch = "aarch64"))]
mod neon {
    use super::super::operands::PANEL;
    use crate::neon::*;

    /// See [`super::pack_columns`].
    ///
    /// # Safety
    /// See there.
    pub unsafe fn pack_columns(rows: &[*const u8], words: usize, out: &mut [u32]) {
        const SIDE: usize = 4;
        let whole = words / SIDE * SIDE;
        for from in (0..whole).step_by(SIDE) {
            let mut squares = rows.chunks(SIDE);
            for column in (0..PANEL).step_by(SIDE) {
                let mut square = [vdupq_n_u32(0); SIDE];
                for (square, row) in square.iter_mut().zip(squares.next().unwrap_or(&[])) {
                    // SAFETY: as the caller promised.
                    *square = unsafe { vld1q_u32(row.cast::<u32>().add(from)) };
                }
                for (k, square) in transpose(square).into_iter().enumerate() {
                    let out = &mut out[(from + k) * PANEL + column..][..SIDE];
                    // SAFETY: `out` is 4 words.
                    unsafe { vst1q_u32(out.as_mut_ptr(), square) };
                }
            }
        }
        // SAFETY: as the caller promised.
        unsafe { super::pack_words(rows, whole..words, out) };
    }

    /// Transposes 4 x 4 words.
    #[inline(always)]
    fn transpose([a, b, c, d]: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
        let (ac, bd) = ((vzip1q_u32(a, c), vzip2q_u32(a, c)), (vzip1q_u32(b, d), vzip2q_u32(b, d)));
        [vzip1q_u32(ac.0, bd.0), vzip2q_u32(ac.0, bd.0), vzip1q_u32(ac.1, bd.1), vzip2q_u32(ac.1, bd.1)]
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use self::x86::transpose;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::operands::PANEL;

    /// Bytes that each row is fetched into the cache ahead of its turn.
    const AHEAD: usize = 256;

    /// See [`super::pack_columns`]; null pointers are columns of zeros.
    ///
    /// # Safety
    /// The processor has AVX-512 F; `out` holds `words * PANEL`; each pointer that is not null is readable for `words` words.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn pack_columns(rows: &[*const u8; PANEL], words: usize, out: &mut [u32]) {
        const SIDE: usize = 16;
        for from in (0..words).step_by(SIDE) {
            let count = SIDE.min(words - from);
            let mask = (((1_u32 << count) - 1) & 0xFFFF) as u16;
            for (group, rows) in rows.chunks_exact(SIDE).enumerate() {
                let mut square = [_mm512_setzero_si512(); SIDE];
                for (square, row) in square.iter_mut().zip(rows) {
                    if !row.is_null() {
                        // 64 rows are more than the processor follows by itself.
                        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(4 * from + AHEAD).cast());
                        // SAFETY: the mask keeps the load to the words that there are.
                        *square = unsafe { _mm512_maskz_loadu_epi32(mask, row.cast::<i32>().add(from)) };
                    }
                }
                transpose(&mut square);
                for (k, square) in square.iter().enumerate().take(count) {
                    let out = &mut out[(from + k) * PANEL + group * SIDE..][..SIDE];
                    // SAFETY: `out` is 16 words.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *square) };
                }
            }
        }
    }

    /// See [`super::pack_columns`]; null pointers are columns of zeros.
    ///
    /// # Safety
    /// The processor has AVX2; `out` holds `words * PANEL`; each pointer that is not null is readable for `words` words.
    #[target_feature(enable = "avx2")]
    pub unsafe fn pack_columns_narrow(rows: &[*const u8; PANEL], words: usize, out: &mut [u32]) {
        const SIDE: usize = 8;
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for from in (0..words).step_by(SIDE) {
            let count = SIDE.min(words - from);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes);
            for (group, rows) in rows.chunks_exact(SIDE).enumerate() {
                let mut square = [_mm256_setzero_si256(); SIDE];
                for (square, row) in square.iter_mut().zip(rows) {
                    if !row.is_null() {
                        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(4 * from + AHEAD).cast());
                        // SAFETY: there are eight words, or the mask keeps the load to those that there are.
                        *square = unsafe {
                            let words = row.cast::<i32>().add(from);
                            if count == SIDE {
                                _mm256_loadu_si256(words.cast())
                            } else {
                                _mm256_maskload_epi32(words, mask)
                            }
                        };
                    }
                }
                transpose_eight(&mut square);
                for (k, square) in square.iter().enumerate().take(count) {
                    let out = &mut out[(from + k) * PANEL + group * SIDE..][..SIDE];
                    // SAFETY: `out` is 8 words.
                    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), *square) };
                }
            }
        }
    }

    /// Transposes 8 x 8 words: within 128 bits by unpacking twice, then across them.
    #[target_feature(enable = "avx2")]
    fn transpose_eight(r: &mut [__m256i; 8]) {
        let mut t = [_mm256_setzero_si256(); 8];
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        let mut u = [_mm256_setzero_si256(); 8];
        for i in 0..2 {
            u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            r[i] = _mm256_permute2x128_si256::<0x20>(u[i], u[i + 4]);
            r[i + 4] = _mm256_permute2x128_si256::<0x31>(u[i], u[i + 4]);
        }
    }

    /// Transposes 16 x 16 words: within 128 bits by unpacking twice, then across them by shuffling twice.
    #[target_feature(enable = "avx512f")]
    pub(in super::super) fn transpose(r: &mut [__m512i; 16]) {
        let mut t = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[i + 4]);
            t[i + 4] = _mm512_shuffle_i32x4::<0xDD>(r[i], r[i + 4]);
            t[i + 8] = _mm512_shuffle_i32x4::<0x88>(r[i + 8], r[i + 12]);
            t[i + 12] = _mm512_shuffle_i32x4::<0xDD>(r[i + 8], r[i + 12]);
        }
        for i in 0..8 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
            r[i + 8] = _mm512_shuffle_i32x4::<0xDD>(t[i], t[i + 8]);
        }
    }
}
