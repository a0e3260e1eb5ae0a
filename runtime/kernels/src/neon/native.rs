//! The instructions themselves.

use std::arch::{aarch64, asm};

pub(crate) use std::arch::aarch64::{
    float32x4_t, int8x8_t, int8x16_t, int16x8_t, int32x4_t, uint8x16_t, uint16x4_t, uint16x8_t, uint32x2_t, uint32x4_t,
    uint64x2_t, vld1_u16, vld1_u32, vld1q_f32, vld1q_s8, vld1q_s32, vld1q_u8, vld1q_u16, vld1q_u32, vst1q_f32,
    vst1q_s8, vst1q_s32, vst1q_u32,
};

/// Instructions of numbers alone, without the question whether the processor has them: all that this is compiled for have vectors.
macro_rules! vectors {
    ($($name:ident $(<const $n:ident>)? ($($arg:ident: $type:ty),*) -> $to:ty;)*) => {
        $(
            #[inline(always)]
            pub(crate) fn $name $(<const $n: i32>)? ($($arg: $type),*) -> $to {
                // SAFETY: as above.
                unsafe { aarch64::$name $(::<$n>)? ($($arg),*) }
            }
        )*
    };
}
vectors!(
    vaddq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vaddq_s32(a: int32x4_t, b: int32x4_t) -> int32x4_t;
    vaddvq_f32(a: float32x4_t) -> f32;
    vandq_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vandq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t;
    vcombine_u32(low: uint32x2_t, high: uint32x2_t) -> uint32x4_t;
    vcvtq_f32_s32(a: int32x4_t) -> float32x4_t;
    vdupq_n_f32(value: f32) -> float32x4_t;
    vdupq_n_s8(value: i8) -> int8x16_t;
    vdupq_n_s32(value: i32) -> int32x4_t;
    vdupq_n_u8(value: u8) -> uint8x16_t;
    vdupq_n_u32(value: u32) -> uint32x4_t;
    veorq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t;
    vfmaq_f32(sum: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vget_high_s8(a: int8x16_t) -> int8x8_t;
    vget_low_s8(a: int8x16_t) -> int8x8_t;
    vget_low_u16(a: uint16x8_t) -> uint16x4_t;
    vminq_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vmull_s8(a: int8x8_t, b: int8x8_t) -> int16x8_t;
    vmulq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t;
    vorrq_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vpadalq_s16(sums: int32x4_t, a: int16x8_t) -> int32x4_t;
    vqtbl1q_s8(table: int8x16_t, index: uint8x16_t) -> int8x16_t;
    vreinterpretq_f32_u32(a: uint32x4_t) -> float32x4_t;
    vreinterpretq_f32_u64(a: uint64x2_t) -> float32x4_t;
    vreinterpretq_s8_u8(a: uint8x16_t) -> int8x16_t;
    vreinterpretq_s8_u32(a: uint32x4_t) -> int8x16_t;
    vreinterpretq_s32_u64(a: uint64x2_t) -> int32x4_t;
    vreinterpretq_u64_f32(a: float32x4_t) -> uint64x2_t;
    vreinterpretq_u64_s32(a: int32x4_t) -> uint64x2_t;
    vshll_high_n_u16<const N>(a: uint16x8_t) -> uint32x4_t;
    vshll_n_u16<const N>(a: uint16x4_t) -> uint32x4_t;
    vshlq_n_s32<const N>(a: int32x4_t) -> int32x4_t;
    vshlq_n_u8<const N>(a: uint8x16_t) -> uint8x16_t;
    vshlq_n_u32<const N>(a: uint32x4_t) -> uint32x4_t;
    vshrq_n_u8<const N>(a: uint8x16_t) -> uint8x16_t;
    vsubq_s8(a: int8x16_t, b: int8x16_t) -> int8x16_t;
    vtstq_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vzip1q_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vzip1q_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t;
    vzip1q_u64(a: uint64x2_t, b: uint64x2_t) -> uint64x2_t;
    vzip2q_u8(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t;
    vzip2q_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t;
    vzip2q_u64(a: uint64x2_t, b: uint64x2_t) -> uint64x2_t;
);

/// To the sums of 2 x 2 products adds those of two rows of four bf16 with two rows of four. Pairs are summed on their own and rounded to
/// odd, and so is each sum with what was there; what is smaller than a normal number counts as zero.
///
/// # Safety
/// The processor has [`Feature::NeonBf16`](crate::isa::Feature::NeonBf16).
#[inline]
#[target_feature(enable = "neon,bf16")]
pub(crate) unsafe fn bfmmla(mut sums: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    // SAFETY: registers alone are read and written.
    unsafe {
        asm!(
            "bfmmla {sums:v}.4s, {a:v}.8h, {b:v}.8h",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// To the sums of 2 x 2 products adds those of two rows of eight bytes with two rows of eight, all with a sign.
///
/// # Safety
/// The processor has [`Feature::I8mm`](crate::isa::Feature::I8mm).
#[inline]
#[target_feature(enable = "neon,i8mm")]
pub(crate) unsafe fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// To each of four sums adds the products of four bytes with four, all with a sign.
///
/// # Safety
/// The processor has [`Feature::DotProd`](crate::isa::Feature::DotProd).
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Four half-precision numbers as floats, exactly.
#[inline(always)]
pub(crate) fn widen_halves(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: as above; every AArch64 processor with vectors has it.
    unsafe {
        asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = out(vreg) floats,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    floats
}
