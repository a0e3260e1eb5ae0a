//! AArch64: 128 bits at a time, with products of bytes by eights (`smmla`) or by fours (`sdot`). Both sides have a sign there, so that words
//! of a panel hold whole numbers in place of indices, and sums start from 0.

use super::{Lanes, PANEL, ROWS, Right, Rows, Tile, VECTORS};
use crate::neon::*;

const LANES: usize = 4;

/// Four bytes of each of four columns by those of a row: of 32 registers, 24 sums, 4 words of B, one of A.
pub struct Sdot;

impl Lanes for Sdot {
    const WIDTH: usize = LANES;
    const ROWS: usize = ROWS;
    const VECTORS: usize = VECTORS;

    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        // SAFETY: passed on to the caller.
        unsafe {
            if b.scales.is_null() {
                by_columns::<R, false>(a, b, words, out);
            } else {
                by_columns::<R, true>(a, b, words, out);
            }
        }
    }
}

/// Eight bytes of two columns by those of two rows: 12 sums of 2 x 2, 4 pairs of columns and the words that these come from, and a pair of rows.
pub struct Smmla;

/// Vectors of columns of a tile of [`Smmla`].
const PAIRED: usize = 2;

impl Lanes for Smmla {
    const WIDTH: usize = LANES;
    const ROWS: usize = ROWS;
    const VECTORS: usize = PAIRED;

    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        // SAFETY: passed on to the caller. A pair's second row is there, if only to be the last again.
        unsafe {
            match (R, b.scales.is_null()) {
                (1 | 2, true) => by_pairs::<1, false>(a, b, words, out),
                (3 | 4, true) => by_pairs::<2, false>(a, b, words, out),
                (_, true) => by_pairs::<3, false>(a, b, words, out),
                (1 | 2, false) => by_pairs::<1, true>(a, b, words, out),
                (3 | 4, false) => by_pairs::<2, true>(a, b, words, out),
                (_, false) => by_pairs::<3, true>(a, b, words, out),
            }
        }
    }
}

/// See [`Lanes::tile`].
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,dotprod"))]
unsafe fn by_columns<const R: usize, const SCALED: bool>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
    for out in &mut out[..R] {
        out[..LANES * VECTORS].fill(0.0);
    }
    for (group, from) in (0..words).step_by(a.group).enumerate() {
        let mut sums = [[vdupq_n_s32(0); VECTORS]; R];
        for k in from..words.min(from + a.group) {
            // SAFETY: as the trait asks.
            unsafe {
                let p = b.words.add(k * b.step);
                let of_b: [int8x16_t; VECTORS] =
                    std::array::from_fn(|v| vreinterpretq_s8_u32(vld1q_u32(p.add(LANES * v))));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = vreinterpretq_s8_u32(vdupq_n_u32(*a.at[row % ROWS].0.add(k)));
                    for (sum, b) in sums.iter_mut().zip(of_b) {
                        *sum = sdot(*sum, b, x);
                    }
                }
            }
        }
        // One by one, so that sums stay in registers.
        let of_b = b.scales.wrapping_add(group * PANEL);
        macro_rules! rows_of {
            ($($row:literal)*) => {
                $(if $row < R {
                    let scale = a.at[$row].1.wrapping_add(group);
                    // SAFETY: as the trait asks.
                    unsafe { put::<SCALED, VECTORS>(sums[$row % R], scale, of_b, &mut out[$row]) };
                })*
            };
        }
        rows_of!(0 1 2 3 4 5);
    }
}

/// See [`Lanes::tile`], for so many pairs of rows.
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,i8mm"))]
unsafe fn by_pairs<const PAIRS: usize, const SCALED: bool>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
    for out in &mut out[..2 * PAIRS] {
        out[..LANES * PAIRED].fill(0.0);
    }
    let bytes = |words: uint32x4_t| vreinterpretq_s8_u32(words);
    for (group, from) in (0..words).step_by(a.group).enumerate() {
        let mut sums = [[[vdupq_n_s32(0); 2]; PAIRED]; PAIRS];
        let to = words.min(from + a.group);
        for k in (from..to - (to - from) % 2).step_by(2) {
            // SAFETY: as the trait asks.
            unsafe {
                let p = b.words.add(k * b.step);
                let of_b: [[int8x16_t; 2]; PAIRED] = std::array::from_fn(|v| {
                    let (first, second) = (vld1q_u32(p.add(LANES * v)), vld1q_u32(p.add(b.step + LANES * v)));
                    [bytes(vzip1q_u32(first, second)), bytes(vzip2q_u32(first, second))]
                });
                for (pair, sums) in sums.iter_mut().enumerate() {
                    let (first, second) = (a.at[2 * pair % ROWS].0.add(k), a.at[(2 * pair + 1) % ROWS].0.add(k));
                    multiply(sums, bytes(vcombine_u32(vld1_u32(first), vld1_u32(second))), &of_b);
                }
            }
        }
        // A row of words that are odd in number ends with half of a step.
        if !(to - from).is_multiple_of(2) {
            let (k, none) = (to - 1, vdupq_n_u32(0));
            // SAFETY: as above.
            unsafe {
                let p = b.words.add(k * b.step);
                let of_b: [[int8x16_t; 2]; PAIRED] = std::array::from_fn(|v| {
                    let last = vld1q_u32(p.add(LANES * v));
                    [bytes(vzip1q_u32(last, none)), bytes(vzip2q_u32(last, none))]
                });
                for (pair, sums) in sums.iter_mut().enumerate() {
                    let (first, second) = (*a.at[2 * pair % ROWS].0.add(k), *a.at[(2 * pair + 1) % ROWS].0.add(k));
                    multiply(sums, bytes(vld1q_u32([first, 0, second, 0].as_ptr())), &of_b);
                }
            }
        }
        let of_b = b.scales.wrapping_add(group * PANEL);
        macro_rules! pairs {
            ($($pair:literal)*) => {
                $(if $pair < PAIRS {
                    let [upper, lower] = rows_of(sums[$pair % PAIRS]);
                    let scales = [2 * $pair, 2 * $pair + 1].map(|row| a.at[row].1.wrapping_add(group));
                    // SAFETY: as above.
                    unsafe {
                        put::<SCALED, PAIRED>(upper, scales[0], of_b, &mut out[2 * $pair]);
                        put::<SCALED, PAIRED>(lower, scales[1], of_b, &mut out[2 * $pair + 1]);
                    }
                })*
            };
        }
        pairs!(0 1 2);
    }
}

/// Adds the products of a pair of rows to its sums.
///
/// # Safety
/// The processor has `smmla`.
#[inline]
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,i8mm"))]
unsafe fn multiply(sums: &mut [[int32x4_t; 2]; PAIRED], a: int8x16_t, b: &[[int8x16_t; 2]; PAIRED]) {
    for (sums, b) in sums.as_flattened_mut().iter_mut().zip(b.as_flattened()) {
        // SAFETY: as the caller promised.
        *sums = unsafe { smmla(*sums, a, *b) };
    }
}

/// Sums of 2 x 2 as those of either row.
#[inline(always)]
fn rows_of(sums: [[int32x4_t; 2]; PAIRED]) -> [[int32x4_t; PAIRED]; 2] {
    let halves = sums.map(|[left, right]| (vreinterpretq_u64_s32(left), vreinterpretq_u64_s32(right)));
    [
        halves.map(|(left, right)| vreinterpretq_s32_u64(vzip1q_u64(left, right))),
        halves.map(|(left, right)| vreinterpretq_s32_u64(vzip2q_u64(left, right))),
    ]
}

/// Adds a group's sums, times its scales, to a row of the tile.
///
/// # Safety
/// There is a scale, and one for each column of B if they are.
#[inline(always)]
unsafe fn put<const SCALED: bool, const N: usize>(
    sums: [int32x4_t; N],
    scale: *const f32,
    of_b: *const f32,
    out: &mut [f32; super::VECTORS * 16],
) {
    // SAFETY: passed on to the caller; the row is `N` vectors at least.
    unsafe {
        let scale = vdupq_n_f32(*scale);
        for (v, sums) in sums.into_iter().enumerate() {
            // Not fused, so that every processor comes to the same.
            let scale = if SCALED { vmulq_f32(vld1q_f32(of_b.add(LANES * v)), scale) } else { scale };
            let out = out.as_mut_ptr().add(LANES * v);
            vst1q_f32(out, vaddq_f32(vld1q_f32(out), vmulq_f32(vcvtq_f32_s32(sums), scale)));
        }
    }
}
