//! Tiles on x86-64 with AVX-512, for bf16 with its BF16 part.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use half::bf16;

use super::lanes::{Lanes, enabled, registers_only, tile};
use super::operands::{Segment, Store};

/// 32 registers of 16 lanes: 24 sums, 4 words of B, one of A.
pub struct Avx512<E>(PhantomData<E>);

/// What both element types do alike.
macro_rules! avx512 {
    () => {
        type Sum = __m512;
        type Word = __m512i;
        const WIDTH: usize = 16;
        const ROWS: usize = 6;
        const VECTORS: usize = 4;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: the processor has AVX-512, as the trait asks; so below.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn words(p: *const u32) -> __m512i {
            // SAFETY: as above, and p is valid for 16 words.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn broadcast(word: u32) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi32(word as i32) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: as above, and p is valid for 16 values.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, sum: __m512) {
            // SAFETY: as above, and p is valid for 16 values.
            unsafe { _mm512_storeu_ps(p, sum) }
        }
    };
}

impl Lanes for Avx512<f32> {
    type Element = f32;
    avx512!();

    #[inline(always)]
    unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the processor has AVX-512, as the trait asks.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum) }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut f32, sum: __m512) {
        // SAFETY: as above, and p is valid for 16 values.
        unsafe { _mm512_storeu_ps(p, sum) }
    }
    enabled!(f32, "avx512f");
}

impl Lanes for Avx512<bf16> {
    type Element = bf16;
    avx512!();

    #[inline(always)]
    unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the processor has AVX-512 BF16, as the trait asks; both types are 512 bits of anything.
        unsafe {
            let pairs = |words| std::mem::transmute::<__m512i, __m512bh>(words);
            _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
        }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut bf16, sum: __m512) {
        // SAFETY: as above, and p is valid for 16 values.
        unsafe {
            let half = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(sum));
            _mm256_storeu_si256(p.cast(), half);
        }
    }
    enabled!(bf16, "avx512f,avx512bf16");
}
