//! ggml's K-quants: blocks of eight groups with scales of their own.
//!
//! What is unsafe here is as in [`super::run`]: the processor has AVX-512 with VNNI, and pointers are to blocks that the job has.

use std::arch::x86_64::*;

use super::super::SPAN;
use super::{Format, Scales, beside, fifth, nibbles};
use crate::storage::format::sub_blocks;
use crate::storage::whole::{half_bytes, six_bits};

/// Scales and minima of six bits each, after the block's own in half precision at `p`.
#[inline(always)]
unsafe fn scales_of_six(p: *const u8) -> Scales {
    // SAFETY: the caller has a whole block at the pointer.
    unsafe {
        let both = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
        let (d, d_min) = (_mm256_broadcastss_ps(both), _mm256_broadcastss_ps(_mm_movehdup_ps(both)));
        let (scales, mins) = sub_blocks(p.add(4));
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(scales as i64)));
        let mins = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(mins as i64)));
        Scales::of(_mm256_mul_ps(scales, d), _mm256_mul_ps(mins, d_min))
    }
}

/// 32 bytes hold the codes of two groups; those of four as they lie: groups 0 and 2, and 1 and 3.
#[inline(always)]
unsafe fn in_order([even, odd]: [__m512i; 2]) -> [__m512i; 2] {
    // SAFETY: the processor has it.
    unsafe {
        let first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        let second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        [_mm512_permutex2var_epi64(even, first, odd), _mm512_permutex2var_epi64(even, second, odd)]
    }
}

pub(super) struct Q4K;

impl Format for Q4K {
    const GROUPS: usize = SPAN;
    const BYTES: usize = 144;
    const OFFSET: f32 = -1.0;

    #[inline(always)]
    unsafe fn scales(&self, p: *const u8, _: usize, _: usize) -> Scales {
        // SAFETY: passed on to the caller; so for all below.
        unsafe { scales_of_six(p) }
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { half_bytes(p.add(16), group) }
    }

    #[inline(always)]
    unsafe fn quad(&self, p: *const u8, q: usize) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe { in_order(nibbles(_mm512_loadu_si512(p.add(16 + 64 * q).cast()))) }
    }
}

pub(super) struct Q5K;

impl Format for Q5K {
    const GROUPS: usize = SPAN;
    const BYTES: usize = 176;
    const OFFSET: f32 = -1.0;

    #[inline(always)]
    unsafe fn scales(&self, p: *const u8, _: usize, _: usize) -> Scales {
        // SAFETY: passed on to the caller; so for all below.
        unsafe { scales_of_six(p) }
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: as above. Bit `group` of each byte becomes the fifth.
        unsafe {
            let fifths = _mm256_loadu_si256(p.add(16).cast());
            let set = _mm256_test_epi8_mask(fifths, _mm256_set1_epi8((1u8 << group) as i8));
            let codes = half_bytes(p.add(48), group);
            _mm256_mask_add_epi8(codes, set, codes, _mm256_set1_epi8(16))
        }
    }

    #[inline(always)]
    unsafe fn quad(&self, p: *const u8, q: usize) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe {
            let [even, odd] = nibbles(_mm512_loadu_si512(p.add(48 + 64 * q).cast()));
            let fifths = _mm256_loadu_si256(p.add(16).cast());
            let fifths = beside(fifths, fifths);
            // Bits of groups 4q and 4q + 2, and of the two after them.
            let first = (1u8 << (4 * q)) as i8;
            let bits = beside(_mm256_set1_epi8(first), _mm256_set1_epi8(first << 2));
            let even_set = _mm512_test_epi8_mask(fifths, bits);
            let odd_set = _mm512_test_epi8_mask(fifths, _mm512_add_epi8(bits, bits));
            in_order([fifth(even, even_set), fifth(odd, odd_set)])
        }
    }
}

/// Sixteen scales of sixteen codes each.
pub(super) struct Q6K;

impl Format for Q6K {
    const GROUPS: usize = SPAN;
    const BYTES: usize = 210;
    const OFFSET: f32 = -32.0;
    const HALVES: bool = true;

    #[inline(always)]
    unsafe fn scales(&self, p: *const u8, _: usize, _: usize) -> Scales {
        // SAFETY: passed on to the caller; so for all below.
        unsafe {
            let d = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.add(208).cast::<u16>().read_unaligned())));
            let d = _mm256_broadcastss_ps(d);
            let signed = _mm_loadu_si128(p.add(192).cast());
            let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed));
            let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(signed, signed)));
            let even = _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(signed));
            let even = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(even));
            let odd = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_srai_epi16::<8>(signed)));
            Scales {
                first: _mm256_mul_ps(d, even),
                second: _mm256_mul_ps(d, odd),
                sums: [_mm256_mul_ps(d, low), _mm256_mul_ps(d, high)],
            }
        }
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { six_bits(p, group) }
    }
}
