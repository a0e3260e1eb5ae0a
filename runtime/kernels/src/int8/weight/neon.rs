//! The steps of packing on AArch64, where bytes have a sign.

use super::super::PANEL;
use super::{PIECE, Steps};
use crate::element::{nearest_whole, scale_of_eight_bits};
use crate::neon::*;

/// 128 bits.
pub(super) struct Neon;

impl Steps for Neon {
    type Table = int8x16_t;

    #[inline(always)]
    unsafe fn nothing() -> int8x16_t {
        vdupq_n_s8(0)
    }

    #[inline(always)]
    unsafe fn table(levels: &[f32; 16], factor: f32) -> int8x16_t {
        let whole = levels.map(|level| nearest_whole(level, factor) as i8);
        // SAFETY: there are sixteen.
        unsafe { vld1q_s8(whole.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn piece(bytes: &[u8; PIECE / 2], table: int8x16_t, out: &mut [u8; PIECE]) {
        let out: *mut i8 = out.as_mut_ptr().cast();
        // SAFETY: a piece is sixteen bytes, and 32 codes.
        unsafe {
            let bytes = vld1q_u8(bytes.as_ptr());
            let (first, second) = (vshrq_n_u8::<4>(bytes), vandq_u8(bytes, vdupq_n_u8(15)));
            vst1q_s8(out, vqtbl1q_s8(table, vzip1q_u8(first, second)));
            vst1q_s8(out.add(PIECE / 2), vqtbl1q_s8(table, vzip2q_u8(first, second)));
        }
    }

    /// For the compiler to vectorise.
    #[inline(always)]
    unsafe fn weave([a, b, c, d]: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = u32::from_le_bytes([a[j], b[j], c[j], d[j]]);
        }
    }
}

/// See [`super::round_columns`]; for the compiler to vectorise.
pub(super) fn round_columns(values: &[f32], words: &mut [u32], scales: &mut [f32; PANEL]) {
    // Bits without the sign are in the order of magnitudes, and NaN lies above all.
    let mut largest = [0u32; PANEL];
    for row in values.as_chunks::<PANEL>().0 {
        for (most, value) in largest.iter_mut().zip(row) {
            *most = (*most).max(value.to_bits() & 0x7FFF_FFFF);
        }
    }
    let mut inverses = [0f32; PANEL];
    for ((scale, inverse), largest) in scales.iter_mut().zip(&mut inverses).zip(largest) {
        (*scale, *inverse) = scale_of_eight_bits(f32::from_bits(largest));
    }
    for (rows, words) in values.as_chunks::<{ 4 * PANEL }>().0.iter().zip(words.as_chunks_mut::<PANEL>().0) {
        for (j, word) in words.iter_mut().enumerate() {
            let bytes = [0, 1, 2, 3].map(|i| nearest_whole(rows[i * PANEL + j], inverses[j]) as u8);
            *word = u32::from_le_bytes(bytes);
        }
    }
}
