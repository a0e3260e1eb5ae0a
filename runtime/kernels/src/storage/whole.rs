//! Weights whose blocks are whole numbers with scales (ggml's quantised formats), read as such: 32 codes of eight bits at a time, by AVX2.
//!
//! All here is inlined into code that has AVX2 enabled, and pointers are to blocks that the caller has.

use std::arch::x86_64::*;

/// Blocks of 32 codes that begin with a half-precision scale, and perhaps a minimum.
pub(crate) trait Block {
    const BYTES: usize;
    /// Whether a minimum follows the scale.
    const HAS_MIN: bool = false;
    /// Whether codes have a sign.
    const SIGNED: bool = false;
    /// What codes without a sign are greater by.
    const SHIFT: f32 = 0.0;
    /// Its codes in order.
    ///
    /// # Safety
    /// A whole block is readable at `p`.
    unsafe fn codes(p: *const u8) -> __m256i;
}

/// Sixteen bytes as 32 codes: the low halves of all, then the high ones.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: the caller has sixteen bytes at the pointer.
    unsafe {
        let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        let shifted = _mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4));
        _mm256_and_si256(shifted, _mm256_set1_epi8(15))
    }
}

/// Adds 16 to the codes whose bit is set.
#[inline(always)]
unsafe fn fifth(w: __m256i, bits: u32) -> __m256i {
    // SAFETY: the processor has it; so below, which is inlined into code with its instructions.
    unsafe {
        // Each byte of the bits over eight lanes, and of each lane its bit.
        let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), spread);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, own), own);
        _mm256_or_si256(w, _mm256_and_si256(set, _mm256_set1_epi8(16)))
    }
}

macro_rules! block {
    ($name:ident, $bytes:literal, { $($constant:ident: $type:ty = $value:expr;)* }, |$p:ident| $body:expr) => {
        pub(crate) struct $name;
        impl Block for $name {
            const BYTES: usize = $bytes;
            $(const $constant: $type = $value;)*
            #[inline(always)]
            unsafe fn codes($p: *const u8) -> __m256i {
                // SAFETY: the caller has a whole block at the pointer.
                unsafe { $body }
            }
        }
    };
}

block!(Q4_0, 18, { SHIFT: f32 = 8.0; }, |p| nibbles(p.add(2)));
block!(Q4_1, 20, { HAS_MIN: bool = true; }, |p| nibbles(p.add(4)));
block!(Q5_0, 22, { SHIFT: f32 = 16.0; }, |p| {
    fifth(nibbles(p.add(6)), p.add(2).cast::<u32>().read_unaligned())
});
block!(Q5_1, 24, { HAS_MIN: bool = true; }, |p| {
    fifth(nibbles(p.add(8)), p.add(4).cast::<u32>().read_unaligned())
});
block!(Q8_0, 34, { SIGNED: bool = true; }, |p| _mm256_loadu_si256(p.add(2).cast()));

/// Blocks of eight groups of codes without a sign, each with a scale and a minimum.
pub(crate) trait SuperBlock {
    const BYTES: usize;
    /// The codes of a group.
    ///
    /// # Safety
    /// A whole block is readable at `p`.
    unsafe fn codes(p: *const u8, group: usize) -> __m256i;
}

pub(crate) struct Q4K;

impl SuperBlock for Q4K {
    const BYTES: usize = 144;

    #[inline(always)]
    unsafe fn codes(p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has a whole block at the pointer.
        unsafe { half_bytes(p.add(16), group) }
    }
}

pub(crate) struct Q5K;

impl SuperBlock for Q5K {
    const BYTES: usize = 176;

    #[inline(always)]
    unsafe fn codes(p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has a whole block at the pointer.
        unsafe {
            // Bit `group` of each byte becomes the fifth.
            let fifths = _mm256_loadu_si256(p.add(16).cast());
            let bit = _mm256_set1_epi8((1u8 << group) as i8);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(fifths, bit), bit);
            _mm256_or_si256(half_bytes(p.add(48), group), _mm256_and_si256(set, _mm256_set1_epi8(16)))
        }
    }
}

/// Four-bit codes of a group: 32 bytes hold those of two.
///
/// # Safety
/// The bytes are readable, and the processor has AVX2; so for [`six_bits`].
#[inline(always)]
pub(crate) unsafe fn half_bytes(p: *const u8, group: usize) -> __m256i {
    // SAFETY: the caller has so many bytes at the pointer.
    unsafe {
        let both = _mm256_loadu_si256(p.add(group / 2 * 32).cast());
        let one = if group.is_multiple_of(2) { both } else { _mm256_srli_epi16::<4>(both) };
        _mm256_and_si256(one, _mm256_set1_epi8(15))
    }
}

/// Codes of a group of Q6_K: four bits of each lie in the first 128 bytes, two in the 64 after them.
#[inline(always)]
pub(crate) unsafe fn six_bits(p: *const u8, group: usize) -> __m256i {
    // SAFETY: the caller has a whole block at the pointer.
    unsafe {
        let (half, quarter) = (group / 4, group % 4);
        let low = _mm256_loadu_si256(p.add(64 * half + 32 * (quarter % 2)).cast());
        let low = if quarter < 2 { low } else { _mm256_srli_epi16::<4>(low) };
        let high = _mm256_loadu_si256(p.add(128 + 32 * half).cast());
        // Two bits each, to the fifth and sixth place.
        let high = match quarter {
            0 => _mm256_slli_epi16::<4>(high),
            1 => _mm256_slli_epi16::<2>(high),
            2 => high,
            _ => _mm256_srli_epi16::<2>(high),
        };
        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
        _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
    }
}
