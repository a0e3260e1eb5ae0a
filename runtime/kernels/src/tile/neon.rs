//! Tiles on AArch64, by multiply-adds of f32.

use std::marker::PhantomData;

use half::bf16;

use super::lanes::{Lanes, registers_only, tile};
use super::operands::{Segment, Store};
use crate::neon::*;

/// 32 registers of 4 lanes: of f32 24 sums, 4 words of B and one of A; of bf16 16, and either half of as many words.
pub struct Neon<E>(PhantomData<E>);

/// What both element types do alike.
macro_rules! neon {
    ($element:ty, $rows:literal) => {
        type Element = $element;
        type Sum = float32x4_t;
        type Word = uint32x4_t;
        const WIDTH: usize = 4;
        const ROWS: usize = $rows;
        const VECTORS: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> float32x4_t {
            vdupq_n_f32(0.0)
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> uint32x4_t {
            // SAFETY: p is valid for 4 words, as the trait asks; so below for values.
            unsafe { vld1q_u32(p) }
        }
        #[inline(always)]
        unsafe fn broadcast(word: u32) -> uint32x4_t {
            vdupq_n_u32(word)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> float32x4_t {
            // SAFETY: as above.
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> float32x4_t {
            vdupq_n_f32(value)
        }
        #[inline(always)]
        unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vaddq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vmulq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, sum: float32x4_t) {
            // SAFETY: as above.
            unsafe { vst1q_f32(p, sum) }
        }
        // Every AArch64 processor that this is compiled for has these, so that nothing is to be enabled.
        unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
            segments: &[Segment],
            step: usize,
            store: Store<$element>,
        ) {
            // SAFETY: passed on to the caller.
            unsafe { tile::<Self, ROWS, VECTORS, ALONG_ROWS>(segments, step, store) }
        }
        unsafe fn spin(steps: usize) -> f32 {
            // SAFETY: passed on to the caller.
            unsafe { registers_only::<Self>(steps) }
        }
    };
}

impl Lanes for Neon<f32> {
    neon!(f32, 6);

    #[inline(always)]
    unsafe fn dot(sum: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
        vfmaq_f32(sum, vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b))
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut f32, sum: float32x4_t) {
        // SAFETY: as above.
        unsafe { vst1q_f32(p, sum) }
    }
}

impl Lanes for Neon<bf16> {
    neon!(bf16, 4);

    /// A bf16 is the upper half of an f32, so the pair is two products of f32.
    #[inline(always)]
    unsafe fn dot(sum: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
        let low = |w| vreinterpretq_f32_u32(vshlq_n_u32::<16>(w));
        let high = |w| vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xFFFF_0000)));
        vfmaq_f32(vfmaq_f32(sum, low(a), low(b)), high(a), high(b))
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut bf16, sum: float32x4_t) {
        let mut values = [0f32; 4];
        // SAFETY: as above; p is valid for 4 values.
        unsafe {
            vst1q_f32(values.as_mut_ptr(), sum);
            p.cast::<[bf16; 4]>().write_unaligned(values.map(<bf16 as crate::element::Element>::of));
        }
    }
}
