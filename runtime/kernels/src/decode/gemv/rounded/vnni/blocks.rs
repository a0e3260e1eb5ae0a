//! Formats of ggml in blocks of a group.
//!
//! What is unsafe here is as in [`super::run`]: the processor has AVX-512 with VNNI, and pointers are to blocks that the job has.

use std::arch::x86_64::*;

use super::{Format, Scales, beside, fifth, in_quarters, nibbles};

/// The halves at `p` and at the same place of the blocks of `bytes` that follow, n in all, as floats; after them the last again.
#[inline(always)]
unsafe fn halves(p: *const u8, bytes: usize, n: usize) -> __m256 {
    // SAFETY: the caller has n blocks at the pointer.
    unsafe {
        let at = |block: usize| i32::from(p.add(block.min(n - 1) * bytes).cast::<u16>().read_unaligned());
        let mut bits = _mm_cvtsi32_si128(at(0));
        bits = _mm_insert_epi16::<1>(bits, at(1));
        bits = _mm_insert_epi16::<2>(bits, at(2));
        bits = _mm_insert_epi16::<3>(bits, at(3));
        bits = _mm_insert_epi16::<4>(bits, at(4));
        bits = _mm_insert_epi16::<5>(bits, at(5));
        bits = _mm_insert_epi16::<6>(bits, at(6));
        bits = _mm_insert_epi16::<7>(bits, at(7));
        _mm256_cvtph_ps(bits)
    }
}

/// Scales and minima of n blocks that begin with both in half precision; after them those of the last again.
#[inline(always)]
unsafe fn scales_and_minima(p: *const u8, bytes: usize, n: usize) -> Scales {
    // SAFETY: the caller has n blocks at the pointer.
    unsafe {
        let at = |block: usize| p.add(block.min(n - 1) * bytes).cast::<i32>().read_unaligned();
        let (mut low, mut high) = (_mm_cvtsi32_si128(at(0)), _mm_cvtsi32_si128(at(4)));
        (low, high) = (_mm_insert_epi32::<1>(low, at(1)), _mm_insert_epi32::<1>(high, at(5)));
        (low, high) = (_mm_insert_epi32::<2>(low, at(2)), _mm_insert_epi32::<2>(high, at(6)));
        (low, high) = (_mm_insert_epi32::<3>(low, at(3)), _mm_insert_epi32::<3>(high, at(7)));
        let both = _mm512_cvtph_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high));
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let apart = _mm512_permutexvar_ps(even, both);
        Scales::of(_mm512_castps512_ps256(apart), _mm512_extractf32x8_ps::<1>(apart))
    }
}

/// Sixteen bytes of four blocks, the low halves of each and the high ones.
#[inline(always)]
unsafe fn nibbles_of_four(p: *const u8, bytes: usize) -> [__m512i; 2] {
    // SAFETY: the caller has four blocks at the pointer.
    unsafe {
        let (a, b) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(bytes).cast()));
        let (c, d) = (_mm_loadu_si128(p.add(2 * bytes).cast()), _mm_loadu_si128(p.add(3 * bytes).cast()));
        let ab = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
        let cd = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(c), d);
        nibbles(beside(ab, cd))
    }
}

/// Sixteen bytes as 32 codes: the low halves of all, then the high ones.
#[inline(always)]
unsafe fn nibbles_of_one(p: *const u8) -> __m256i {
    // SAFETY: the caller has sixteen bytes at the pointer.
    unsafe {
        let bytes = _mm_loadu_si128(p.cast());
        let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(bytes), _mm_srli_epi16::<4>(bytes));
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// Four times sixteen bits, those at `p` of blocks of `bytes`.
#[inline(always)]
unsafe fn bits_of_four(p: *const u8, bytes: usize) -> u64 {
    // SAFETY: the caller has four blocks at the pointer.
    unsafe {
        let at = |block: usize| u64::from(p.add(block * bytes).cast::<u16>().read_unaligned());
        at(0) | at(1) << 16 | at(2) << 32 | at(3) << 48
    }
}

/// Formats of four bits or five in blocks of a group: scale, perhaps a minimum, perhaps fifth bits, and half bytes.
macro_rules! block {
    ($name:ident, $bytes:literal, offset $offset:literal, min $min:literal, fifth $fifth:literal) => {
        pub(super) struct $name;

        impl $name {
            const FIFTHS: usize = if $min { 4 } else { 2 };
            const CODES: usize = Self::FIFTHS + if $fifth { 4 } else { 0 };
        }

        impl Format for $name {
            const BYTES: usize = $bytes;
            const OFFSET: f32 = $offset;

            #[inline(always)]
            unsafe fn scales(&self, p: *const u8, _: usize, n: usize) -> Scales {
                // SAFETY: the caller has n blocks at the pointer; so for all below.
                unsafe {
                    if $min {
                        return scales_and_minima(p, $bytes, n);
                    }
                    let scales = halves(p, $bytes, n);
                    Scales::of(scales, scales)
                }
            }

            #[inline(always)]
            unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
                // SAFETY: as above.
                unsafe {
                    let p = p.add(group * $bytes);
                    let codes = nibbles_of_one(p.add(Self::CODES));
                    if !$fifth {
                        return codes;
                    }
                    let bits = p.add(Self::FIFTHS).cast::<u32>().read_unaligned();
                    _mm256_mask_add_epi8(codes, bits, codes, _mm256_set1_epi8(16))
                }
            }

            #[inline(always)]
            unsafe fn quad(&self, p: *const u8, q: usize) -> [__m512i; 2] {
                // SAFETY: as above.
                unsafe {
                    let p = p.add(4 * q * $bytes);
                    let [low, high] = nibbles_of_four(p.add(Self::CODES), $bytes);
                    if !$fifth {
                        return [low, high];
                    }
                    let p = p.add(Self::FIFTHS);
                    [fifth(low, bits_of_four(p, $bytes)), fifth(high, bits_of_four(p.add(2), $bytes))]
                }
            }

            #[inline(always)]
            unsafe fn spread(&self, p: *const u8, group: usize) -> [__m512i; 2] {
                // SAFETY: as above.
                unsafe {
                    let p = p.add(group * $bytes);
                    let [low, high] = nibbles(in_quarters(p.add(Self::CODES)));
                    if !$fifth {
                        return [low, high];
                    }
                    let bits = p.add(Self::FIFTHS).cast::<u32>().read_unaligned();
                    let all = 0x0001_0001_0001_0001;
                    [fifth(low, u64::from(bits & 0xFFFF) * all), fifth(high, u64::from(bits >> 16) * all)]
                }
            }
        }
    };
}

block!(Q4_0, 18, offset -8.0, min false, fifth false);
block!(Q4_1, 20, offset 1.0, min true, fifth false);
block!(Q5_0, 22, offset -16.0, min false, fifth true);
block!(Q5_1, 24, offset 1.0, min true, fifth true);

pub(super) struct Q8_0;

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const OFFSET: f32 = -128.0;

    #[inline(always)]
    unsafe fn scales(&self, p: *const u8, _: usize, n: usize) -> Scales {
        // SAFETY: the caller has n blocks at the pointer.
        unsafe {
            let scales = halves(p, Self::BYTES, n);
            Scales::of(scales, scales)
        }
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has the block at the pointer.
        unsafe {
            let signed = _mm256_loadu_si256(p.add(group * Self::BYTES + 2).cast());
            _mm256_xor_si256(signed, _mm256_set1_epi8(-128))
        }
    }
}
