//! 256 bits at a time, with products of bytes by fours.

use std::arch::x86_64::*;

use super::{GROUP, Lanes, PANEL, ROWS, Right, Rows, Tile, ZERO, round_group};
use crate::element::scale_of_eight_bits;
use crate::isa::{Dpbusd, Run, run};

const LANES: usize = 8;
const VECTORS: usize = 2;

/// 16 registers of 8 lanes: 12 sums, 2 words of B, one of A.
pub struct AvxVnni;

impl Lanes for AvxVnni {
    const WIDTH: usize = LANES;
    const ROWS: usize = ROWS;
    const VECTORS: usize = VECTORS;

    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        // SAFETY: passed on to the caller.
        unsafe {
            if b.scales.is_null() {
                run(Job::<'_, R, false> { a, b, words, out });
            } else {
                run(Job::<'_, R, true> { a, b, words, out });
            }
        }
    }
}

/// A tile; see [`Lanes::tile`].
struct Job<'a, const R: usize, const SCALED: bool> {
    a: &'a Rows,
    b: Right,
    words: usize,
    out: &'a mut Tile,
}

impl<const R: usize, const SCALED: bool> Run for Job<'_, R, SCALED> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<D: Dpbusd>(self) {
        let Self { a, b, words, out } = self;
        // SAFETY: as `Lanes::tile` asks; two vectors of a row of the tile are written.
        unsafe {
            for out in &mut out[..R] {
                for v in 0..VECTORS {
                    _mm256_storeu_ps(out.as_mut_ptr().add(LANES * v), _mm256_setzero_ps());
                }
            }
            for (group, from) in (0..words).step_by(a.group).enumerate() {
                let mut sums = [[_mm256_setzero_si256(); VECTORS]; R];
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm256_set1_epi32(*a.at[row % ROWS].2.add(group)); VECTORS];
                }
                for k in from..words.min(from + a.group) {
                    let of_b = b.words.add(k * b.step);
                    let of_b = [_mm256_loadu_si256(of_b.cast()), _mm256_loadu_si256(of_b.add(LANES).cast())];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_epi32(*a.at[row % ROWS].0.add(k) as i32);
                        // Indices are unsigned, values of A signed.
                        sums[0] = D::dpbusd(sums[0], of_b[0], x);
                        sums[1] = D::dpbusd(sums[1], of_b[1], x);
                    }
                }
                // One by one, so that sums stay in registers.
                let of_b = b.scales.wrapping_add(group * PANEL);
                macro_rules! rows_of {
                    ($($row:literal)*) => {
                        $(if $row < R {
                            put::<SCALED>(sums[$row % R], a.at[$row].1.wrapping_add(group), of_b, &mut out[$row]);
                        })*
                    };
                }
                rows_of!(0 1 2 3 4 5);
            }
        }
    }
}

/// Adds a group's sums, times its scales, to a row of the tile.
///
/// # Safety
/// There is a scale, and one for each column of B if they are; called from what has AVX2 enabled.
#[inline(always)]
unsafe fn put<const SCALED: bool>(
    sums: [__m256i; VECTORS],
    scale: *const f32,
    of_b: *const f32,
    out: &mut [f32; super::VECTORS * 16],
) {
    // SAFETY: passed on to the caller; the row is two vectors at least.
    unsafe {
        let scale = _mm256_set1_ps(*scale);
        for (v, sums) in sums.into_iter().enumerate() {
            // Not fused, so that every processor comes to the same.
            let scale = if SCALED { _mm256_mul_ps(_mm256_loadu_ps(of_b.add(LANES * v)), scale) } else { scale };
            let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale);
            let out = out.as_mut_ptr().add(LANES * v);
            _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum));
        }
    }
}

/// Words of a byte of each of four rows.
///
/// # Safety
/// The processor has AVX2; so for all below.
#[target_feature(enable = "avx2")]
pub unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]) {
    let most = _mm256_set1_epi8(254u8 as i8);
    for half in 0..2 {
        // SAFETY: a row is twice 32 bytes; so is a word of all of them twice 128.
        unsafe {
            let at = |row: &[u8; PANEL]| _mm256_min_epu8(_mm256_loadu_si256(row.as_ptr().add(32 * half).cast()), most);
            let [a, b, c, d] = [at(rows[0]), at(rows[1]), at(rows[2]), at(rows[3])];
            // Within each 128 bits, words of columns 0-3, 4-7, 8-11 and 12-15.
            let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
            let (low_2, high_2) = (_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
            let (x, y) = (_mm256_unpacklo_epi16(low, low_2), _mm256_unpackhi_epi16(low, low_2));
            let (z, u) = (_mm256_unpacklo_epi16(high, high_2), _mm256_unpackhi_epi16(high, high_2));
            let out = out.as_mut_ptr().add(32 * half);
            _mm256_storeu_si256(out.cast(), _mm256_permute2x128_si256::<0x20>(x, y));
            _mm256_storeu_si256(out.add(8).cast(), _mm256_permute2x128_si256::<0x20>(z, u));
            _mm256_storeu_si256(out.add(16).cast(), _mm256_permute2x128_si256::<0x31>(x, y));
            _mm256_storeu_si256(out.add(24).cast(), _mm256_permute2x128_si256::<0x31>(z, u));
        }
    }
}

/// See [`super::round_row`], which comes to the same.
///
/// # Safety
/// See [`weave`].
#[target_feature(enable = "avx2")]
pub unsafe fn round_row(row: &[f32], out: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
    let groups = row.chunks(GROUP).zip(out.chunks_mut(GROUP)).zip(scales.iter_mut().zip(starts));
    for ((row, out), (scale, start)) in groups {
        let (Some(row), Some(out)) = (row.first_chunk::<GROUP>(), out.first_chunk_mut::<GROUP>()) else {
            round_group(row, out, scale, start);
            continue;
        };
        let mut most = _mm256_setzero_si256();
        for values in row.as_chunks::<LANES>().0 {
            // SAFETY: a vector is eight values; so below.
            let bits = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
            most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX)));
        }
        let four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
        let two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
        let largest = _mm_max_epu32(two, _mm_shuffle_epi32::<1>(two));
        let inverse;
        (*scale, inverse) = scale_of_eight_bits(f32::from_bits(_mm_cvtsi128_si32(largest) as u32));
        let inverse = _mm256_set1_ps(inverse);
        let mut sum = _mm256_setzero_si256();
        for (values, out) in row.as_chunks::<{ 4 * LANES }>().0.iter().zip(out.as_chunks_mut::<{ 4 * LANES }>().0) {
            let whole = |v: usize| {
                // SAFETY: as above, four vectors.
                let values = unsafe { _mm256_loadu_ps(values.as_ptr().add(v * LANES)) };
                _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse))
            };
            let (a, b, c, d) = (whole(0), whole(1), whole(2), whole(3));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
            // Quarters of the four come out one by one: those of all first halves, then those of the second ones.
            let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            // SAFETY: there are 32 codes.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), bytes) };
        }
        let four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        let sum = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
        *start = _mm_cvtsi128_si32(sum).wrapping_mul(-ZERO);
    }
}

/// Whole numbers become indices.
///
/// # Safety
/// See [`weave`].
#[target_feature(enable = "avx2")]
pub unsafe fn to_indices(words: &mut [u32]) {
    for words in words.as_chunks_mut::<LANES>().0 {
        let words: *mut __m256i = words.as_mut_ptr().cast();
        // SAFETY: eight words are 32 bytes.
        unsafe { _mm256_storeu_si256(words, _mm256_add_epi8(_mm256_loadu_si256(words), _mm256_set1_epi8(ZERO as i8))) };
    }
}

/// Indices that stand for sixteen levels times a factor.
///
/// # Safety
/// See [`weave`].
#[inline]
#[target_feature(enable = "avx2")]
pub unsafe fn table(levels: &[f32; 16], factor: f32) -> __m128i {
    // SAFETY: levels are twice eight values.
    let [a, b] = unsafe { [_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels.as_ptr().add(LANES))] };
    let (factor, zero) = (_mm256_set1_ps(factor), _mm256_set1_epi32(ZERO));
    let a = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, factor)), zero);
    let b = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(b, factor)), zero);
    // The quarters of each come out one by one: 0 to 3, 8 to 11, 4 to 7, 12 to 15.
    let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
    _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both))
}

/// Whole numbers that four rows of values come to, times their columns' factors, as words of indices.
///
/// # Safety
/// See [`weave`].
#[target_feature(enable = "avx2")]
pub unsafe fn round_rows(rows: &[f32; 4 * PANEL], factors: &[f32; PANEL], words: &mut [u32; PANEL]) {
    let zero = _mm256_set1_epi32(ZERO);
    for v in (0..PANEL).step_by(LANES) {
        // SAFETY: there are four rows, and a vector of each from column v on.
        unsafe {
            let factor = _mm256_loadu_ps(factors.as_ptr().add(v));
            let p = rows.as_ptr().add(v);
            let mut word = _mm256_setzero_si256();
            for row in (0..4).rev() {
                let values = _mm256_mul_ps(_mm256_loadu_ps(p.add(row * PANEL)), factor);
                let index = _mm256_add_epi32(_mm256_cvtps_epi32(values), zero);
                word = _mm256_or_si256(_mm256_slli_epi32::<8>(word), index);
            }
            _mm256_storeu_si256(words.as_mut_ptr().add(v).cast(), word);
        }
    }
}

/// The largest magnitude of each column, as bits.
///
/// # Safety
/// See [`weave`].
#[target_feature(enable = "avx2")]
pub unsafe fn largest_of_columns(values: &[f32]) -> [u32; PANEL] {
    let mut largest = [0; PANEL];
    for v in (0..PANEL).step_by(LANES) {
        let mut most = _mm256_setzero_si256();
        for row in values.as_chunks::<PANEL>().0 {
            // SAFETY: a row has a vector from column v on; so below.
            let bits = unsafe { _mm256_loadu_si256(row.as_ptr().add(v).cast()) };
            most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(i32::MAX)));
        }
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(largest.as_mut_ptr().add(v).cast(), most) };
    }
    largest
}
