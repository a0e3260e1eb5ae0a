//! The same instructions in plain Rust, after the pseudo code of Arm's manual, for tests on other processors.

#![allow(non_camel_case_types, reason = "the names are Arm's")]

use half::f16;

macro_rules! vectors {
    ($($name:ident: [$lane:ty; $n:literal]),* $(,)?) => {
        $(
            #[derive(Clone, Copy, Debug, PartialEq)]
            #[repr(transparent)]
            pub struct $name(pub [$lane; $n]);
        )*
    };
}
vectors!(
    float32x4_t: [f32; 4], int8x8_t: [i8; 8], int8x16_t: [i8; 16], int16x8_t: [i16; 8], int32x4_t: [i32; 4],
    uint8x16_t: [u8; 16], uint16x4_t: [u16; 4], uint16x8_t: [u16; 8], uint32x2_t: [u32; 2], uint32x4_t: [u32; 4],
    uint64x2_t: [u64; 2],
);

/// A value in all lanes.
macro_rules! dup {
    ($($name:ident($lane:ty) -> $vector:ident;)*) => {
        $(#[inline(always)] pub(crate) fn $name(value: $lane) -> $vector { $vector([value; _]) })*
    };
}
dup!(
    vdupq_n_f32(f32) -> float32x4_t;
    vdupq_n_s8(i8) -> int8x16_t;
    vdupq_n_s32(i32) -> int32x4_t;
    vdupq_n_u8(u8) -> uint8x16_t;
    vdupq_n_u32(u32) -> uint32x4_t;
);

/// Loads and stores, of any alignment.
macro_rules! memory {
    ($($load:ident $($store:ident)?: $lane:ty, $vector:ident;)*) => {
        $(
            #[inline(always)]
            pub(crate) unsafe fn $load(p: *const $lane) -> $vector {
                // SAFETY: the caller has a vector at the pointer.
                unsafe { p.cast::<$vector>().read_unaligned() }
            }
            $(
                #[inline(always)]
                pub(crate) unsafe fn $store(p: *mut $lane, vector: $vector) {
                    // SAFETY: as above.
                    unsafe { p.cast::<$vector>().write_unaligned(vector) }
                }
            )?
        )*
    };
}
memory!(
    vld1q_f32 vst1q_f32: f32, float32x4_t;
    vld1q_s8 vst1q_s8: i8, int8x16_t;
    vld1q_s32 vst1q_s32: i32, int32x4_t;
    vld1q_u8: u8, uint8x16_t;
    vld1_u16: u16, uint16x4_t;
    vld1q_u16: u16, uint16x8_t;
    vld1_u32: u32, uint32x2_t;
    vld1q_u32 vst1q_u32: u32, uint32x4_t;
);
/// Lane by lane.
macro_rules! lanes {
    ($($name:ident($($arg:ident),+) of $vector:ident: $body:expr;)*) => {
        $(
            #[inline(always)]
            pub(crate) fn $name($($arg: $vector),+) -> $vector {
                $vector(std::array::from_fn(|i| { $(let $arg = $arg.0[i];)+ $body }))
            }
        )*
    };
}
lanes!(
    vaddq_f32(a, b) of float32x4_t: a + b;
    vmulq_f32(a, b) of float32x4_t: a * b;
    vfmaq_f32(sum, a, b) of float32x4_t: a.mul_add(b, sum);
    vaddq_s32(a, b) of int32x4_t: a.wrapping_add(b);
    vsubq_s8(a, b) of int8x16_t: a.wrapping_sub(b);
    vandq_u8(a, b) of uint8x16_t: a & b;
    vandq_u32(a, b) of uint32x4_t: a & b;
    veorq_u32(a, b) of uint32x4_t: a ^ b;
    vorrq_u8(a, b) of uint8x16_t: a | b;
    vminq_u8(a, b) of uint8x16_t: a.min(b);
    vtstq_u8(a, b) of uint8x16_t: if a & b != 0 { u8::MAX } else { 0 };
);

macro_rules! shifts {
    ($($name:ident of $vector:ident: |$a:ident, $n:ident| $body:expr;)*) => {
        $(
            #[inline(always)]
            pub(crate) fn $name<const N: i32>(a: $vector) -> $vector {
                let $n = N as u32;
                $vector(a.0.map(|$a| $body))
            }
        )*
    };
}
shifts!(
    vshlq_n_u8 of uint8x16_t: |a, n| a << n;
    vshrq_n_u8 of uint8x16_t: |a, n| a >> n;
    vshlq_n_u32 of uint32x4_t: |a, n| a << n;
    vshlq_n_s32 of int32x4_t: |a, n| a << n;
);

/// The same bits.
macro_rules! bits {
    ($($name:ident($from:ident) -> $to:ident;)*) => {
        $(
            #[inline(always)]
            pub(crate) fn $name(a: $from) -> $to {
                // SAFETY: both are sixteen bytes of numbers.
                unsafe { std::mem::transmute::<$from, $to>(a) }
            }
        )*
    };
}
bits!(
    vreinterpretq_f32_u32(uint32x4_t) -> float32x4_t;
    vreinterpretq_f32_u64(uint64x2_t) -> float32x4_t;
    vreinterpretq_s32_u64(uint64x2_t) -> int32x4_t;
    vreinterpretq_s8_u8(uint8x16_t) -> int8x16_t;
    vreinterpretq_s8_u32(uint32x4_t) -> int8x16_t;
    vreinterpretq_u64_f32(float32x4_t) -> uint64x2_t;
    vreinterpretq_u64_s32(int32x4_t) -> uint64x2_t;
);

/// Lanes of two vectors by turns: of their first halves, and of their second ones.
macro_rules! zips {
    ($($first:ident $second:ident: $vector:ident, $half:literal;)*) => {
        $(
            #[inline(always)]
            pub(crate) fn $first(a: $vector, b: $vector) -> $vector {
                $vector(std::array::from_fn(|i| if i % 2 == 0 { a.0[i / 2] } else { b.0[i / 2] }))
            }
            #[inline(always)]
            pub(crate) fn $second(a: $vector, b: $vector) -> $vector {
                $vector(std::array::from_fn(|i| if i % 2 == 0 { a.0[$half + i / 2] } else { b.0[$half + i / 2] }))
            }
        )*
    };
}
zips!(
    vzip1q_u8 vzip2q_u8: uint8x16_t, 8;
    vzip1q_u32 vzip2q_u32: uint32x4_t, 2;
    vzip1q_u64 vzip2q_u64: uint64x2_t, 1;
);

#[inline(always)]
pub(crate) fn vcombine_u32(low: uint32x2_t, high: uint32x2_t) -> uint32x4_t {
    uint32x4_t([low.0[0], low.0[1], high.0[0], high.0[1]])
}

#[inline(always)]
pub(crate) fn vcvtq_f32_s32(a: int32x4_t) -> float32x4_t {
    float32x4_t(a.0.map(|a| a as f32))
}

/// By neighbours, then both.
#[inline(always)]
pub(crate) fn vaddvq_f32(a: float32x4_t) -> f32 {
    (a.0[0] + a.0[1]) + (a.0[2] + a.0[3])
}

#[inline(always)]
pub(crate) fn vget_low_s8(a: int8x16_t) -> int8x8_t {
    int8x8_t(std::array::from_fn(|i| a.0[i]))
}

#[inline(always)]
pub(crate) fn vget_high_s8(a: int8x16_t) -> int8x8_t {
    int8x8_t(std::array::from_fn(|i| a.0[8 + i]))
}

#[inline(always)]
pub(crate) fn vget_low_u16(a: uint16x8_t) -> uint16x4_t {
    uint16x4_t(std::array::from_fn(|i| a.0[i]))
}

#[inline(always)]
pub(crate) fn vmull_s8(a: int8x8_t, b: int8x8_t) -> int16x8_t {
    int16x8_t(std::array::from_fn(|i| i16::from(a.0[i]) * i16::from(b.0[i])))
}

#[inline(always)]
pub(crate) fn vpadalq_s16(sums: int32x4_t, a: int16x8_t) -> int32x4_t {
    int32x4_t(std::array::from_fn(|i| sums.0[i].wrapping_add(i32::from(a.0[2 * i]) + i32::from(a.0[2 * i + 1]))))
}

#[inline(always)]
pub(crate) fn vshll_n_u16<const N: i32>(a: uint16x4_t) -> uint32x4_t {
    uint32x4_t(a.0.map(|a| u32::from(a) << N))
}

#[inline(always)]
pub(crate) fn vshll_high_n_u16<const N: i32>(a: uint16x8_t) -> uint32x4_t {
    uint32x4_t(std::array::from_fn(|i| u32::from(a.0[4 + i]) << N))
}

/// An index beyond the table yields 0.
#[inline(always)]
pub(crate) fn vqtbl1q_s8(table: int8x16_t, index: uint8x16_t) -> int8x16_t {
    int8x16_t(index.0.map(|i| table.0.get(usize::from(i)).copied().unwrap_or(0)))
}

#[inline(always)]
pub(crate) fn widen_halves(halves: uint16x4_t) -> float32x4_t {
    float32x4_t(halves.0.map(|half| f16::from_bits(half).to_f32()))
}

/// `MatMulAdd`, of bytes with a sign.
pub(crate) unsafe fn smmla(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    int32x4_t(std::array::from_fn(|i| {
        let (a, b) = (&a.0[i / 2 * 8..][..8], &b.0[i % 2 * 8..][..8]);
        a.iter().zip(b).fold(sums.0[i], |sum, (a, b)| sum.wrapping_add(i32::from(*a) * i32::from(*b)))
    }))
}

pub(crate) unsafe fn sdot(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    int32x4_t(std::array::from_fn(|i| {
        let (a, b) = (&a.0[4 * i..][..4], &b.0[4 * i..][..4]);
        a.iter().zip(b).fold(sums.0[i], |sum, (a, b)| sum.wrapping_add(i32::from(*a) * i32::from(*b)))
    }))
}

/// `BFMatMulAdd`, which is two `BFDotAdd` one after the other, where FPCR.EBF is 0, as it is in a new process.
pub(crate) unsafe fn bfmmla(sums: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    let (mut out, halves) = (sums.0, |word: u32| [word << 16, word & 0xFFFF_0000].map(f32::from_bits));
    for (i, out) in out.iter_mut().enumerate() {
        for k in 0..2 {
            let ([a, c], [b, d]) = (halves(a.0[i / 2 * 2 + k]), halves(b.0[i % 2 * 2 + k]));
            *out = add(*out, add(multiply(a, b), multiply(c, d)));
        }
    }
    float32x4_t(out)
}

/// What is smaller than a normal number becomes zero.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

/// `BFMulH`.
fn multiply(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(flush(a)), f64::from(flush(b)));
    // Sixteen bits and the exponents of both fit.
    to_odd(a * b)
}

/// `FPAdd_BF16`.
fn add(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(flush(a)), f64::from(flush(b)));
    let sum = a + b;
    if !sum.is_finite() {
        return to_odd(sum);
    }
    // What the sum lacks of the exact one (Knuth 1997, volume 2, section 4.2.2, theorem B), or has too much.
    let of_b = sum - a;
    let error = (a - (sum - of_b)) + (b - of_b);
    let bits = sum.to_bits();
    if error == 0.0 || bits & 1 == 1 {
        return to_odd(sum);
    }
    // The odd neighbour on the side of the exact sum.
    to_odd(f64::from_bits(if (error > 0.0) == (sum > 0.0) { bits + 1 } else { bits - 1 }))
}

/// `BFRound`: a value whose last bit says whether it is exact, rounded to odd.
fn to_odd(value: f64) -> f32 {
    if value.is_nan() {
        return f32::from_bits(0x7FC0_0000);
    }
    let sign = 1f32.copysign(value as f32);
    let size = value.abs();
    if size >= 2f64.powi(128) {
        return f32::INFINITY.copysign(sign);
    }
    if size < f64::from(f32::MIN_POSITIVE) {
        return 0f32.copysign(sign);
    }
    const CUT: u64 = (1 << 29) - 1;
    let bits = size.to_bits();
    let cut = f64::from_bits(bits & !CUT) as f32;
    f32::from_bits(cut.to_bits() | u32::from(bits & CUT != 0)).copysign(sign)
}
