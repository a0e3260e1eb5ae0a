//! Tiles on x86-64 with AVX2 and FMA.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::bf16;

use super::lanes::{Lanes, enabled, registers_only, tile};
use super::operands::{Segment, Store};

/// 16 registers of 8 lanes: 12 sums, 2 words of B, one of A.
pub struct Avx2<E>(PhantomData<E>);

macro_rules! avx2 {
    () => {
        type Sum = __m256;
        type Word = __m256i;
        const WIDTH: usize = 8;
        const ROWS: usize = 6;
        const VECTORS: usize = 2;

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: the processor has AVX2 and FMA, as the trait asks; so below.
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> __m256i {
            // SAFETY: as above, and p is valid for 8 words.
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline(always)]
        unsafe fn broadcast(word: u32) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_set1_epi32(word as i32) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: as above, and p is valid for 8 values.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, sum: __m256) {
            // SAFETY: as above, and p is valid for 8 values.
            unsafe { _mm256_storeu_ps(p, sum) }
        }
    };
}

impl Lanes for Avx2<f32> {
    type Element = f32;
    avx2!();

    #[inline(always)]
    unsafe fn dot(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
        // SAFETY: the processor has FMA, as the trait asks.
        unsafe { _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum) }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut f32, sum: __m256) {
        // SAFETY: as above, and p is valid for 8 values.
        unsafe { _mm256_storeu_ps(p, sum) }
    }
    enabled!(f32, "avx2,fma");
}

impl Lanes for Avx2<bf16> {
    type Element = bf16;
    avx2!();

    /// A bf16 is the upper half of an f32, so the pair is two products of f32.
    #[inline(always)]
    unsafe fn dot(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
        // SAFETY: the processor has AVX2 and FMA, as the trait asks.
        unsafe {
            let low = |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
            let high = |w| _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xFFFF_0000_u32 as i32)));
            _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), sum))
        }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut bf16, sum: __m256) {
        let mut values = [0f32; 8];
        // SAFETY: as above; p is valid for 8 values.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), sum);
            p.cast::<[bf16; 8]>().write_unaligned(values.map(<bf16 as crate::element::Element>::of));
        }
    }
    enabled!(bf16, "avx2,fma");
}
