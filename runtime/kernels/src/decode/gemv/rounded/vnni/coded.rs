//! Code books: eight bits on a straight line, and sixteen levels.
//!
//! What is unsafe here is as in [`super::run`]: the processor has AVX-512 with VNNI, and pointers are to blocks that the job has.

use std::arch::x86_64::*;

use super::super::super::Job;
use super::super::GROUP;
use super::super::book::{BlockScales, Levels};
use super::{Format, Scales, in_quarters, nibbles};
use crate::matmul::Matrix;

/// Eight bits a value, `(index - 127) · scale / 127`, a scale for each row.
pub(super) struct Linear;

impl Format for Linear {
    const BYTES: usize = GROUP;
    const OFFSET: f32 = -127.0;

    #[inline(always)]
    unsafe fn scales(&self, _: *const u8, _: usize, _: usize) -> Scales {
        // SAFETY: the processor has it.
        let ones = unsafe { _mm256_set1_ps(1.0) };
        Scales::of(ones, ones)
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has the group at the pointer.
        unsafe { _mm256_min_epu8(_mm256_loadu_si256(p.add(group * GROUP).cast()), _mm256_set1_epi8(254u8 as i8)) }
    }

    #[inline(always)]
    fn factor(&self, job: &Job<'_>, row: usize) -> f32 {
        job.w.coded.as_ref().map_or(f32::NAN, |coded| coded.scale(row) / 127.0)
    }
}

/// Four bits a value, by a book of sixteen levels: each is a whole number of sixteen bits without a sign, whose bytes are multiplied
/// one after the other. Where codes are asked for, these are indices into the book.
pub(super) struct Book<'a> {
    scales: BlockScales<'a>,
    /// The upper bytes of the levels, and the lower ones, in each quarter.
    high: __m512i,
    low: __m512i,
    factor: f32,
}

impl<'a> Book<'a> {
    #[inline(always)]
    pub(super) unsafe fn new(w: &'a Matrix<'a>, levels: &Levels, scratch: &'a mut Vec<f32>) -> Self {
        let [high, low] = levels.bytes(Levels::ZERO);
        // SAFETY: each is sixteen bytes.
        let (high, low) = unsafe { (in_quarters(high.as_ptr()), in_quarters(low.as_ptr())) };
        Self { scales: BlockScales::new(w, scratch), high, low, factor: levels.factor }
    }
}

/// Sixteen bytes as 32 indices in order, or so in each quarter: the upper half of a byte comes first.
#[inline(always)]
unsafe fn in_pairs(bytes: __m512i) -> [__m512i; 2] {
    // SAFETY: the processor has it.
    unsafe {
        let [second, first] = nibbles(bytes);
        [_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second)]
    }
}

impl Format for Book<'_> {
    const BYTES: usize = GROUP / 2;
    const OFFSET: f32 = -(Levels::ZERO as f32);

    #[inline(always)]
    fn begin(&mut self, row: usize) {
        self.scales.begin(row);
    }

    #[inline(always)]
    unsafe fn scales(&self, _: *const u8, span: usize, _: usize) -> Scales {
        // SAFETY: passed on to the caller.
        let scales = unsafe { self.scales.of_span(span) };
        Scales::of(scales, scales)
    }

    #[inline(always)]
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i {
        // SAFETY: the caller has the group at the pointer.
        unsafe {
            let bytes = _mm_loadu_si128(p.add(group * Self::BYTES).cast());
            let [first, second] = in_pairs(_mm512_castsi128_si512(bytes));
            _mm256_inserti128_si256::<1>(_mm512_castsi512_si256(first), _mm512_castsi512_si128(second))
        }
    }

    #[inline(always)]
    unsafe fn quad(&self, p: *const u8, q: usize) -> [__m512i; 2] {
        // SAFETY: the caller has four groups at the pointer.
        unsafe { in_pairs(_mm512_loadu_si512(p.add(4 * q * Self::BYTES).cast())) }
    }

    #[inline(always)]
    unsafe fn spread(&self, p: *const u8, group: usize) -> [__m512i; 2] {
        // SAFETY: the caller has the group at the pointer.
        unsafe { in_pairs(in_quarters(p.add(group * Self::BYTES))) }
    }

    #[inline(always)]
    unsafe fn dot(&self, [first, second]: [__m512i; 2], [x, y]: [__m512i; 2]) -> __m512 {
        // SAFETY: the processor has it. Sums of eight products with bytes are below 2^18, so that both together are below 2^27.
        unsafe {
            let zero = _mm512_setzero_si512();
            let high = _mm512_dpbusd_epi32(zero, _mm512_shuffle_epi8(self.high, first), x);
            let high = _mm512_dpbusd_epi32(high, _mm512_shuffle_epi8(self.high, second), y);
            let low = _mm512_dpbusd_epi32(zero, _mm512_shuffle_epi8(self.low, first), x);
            let low = _mm512_dpbusd_epi32(low, _mm512_shuffle_epi8(self.low, second), y);
            _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high), low))
        }
    }

    #[inline(always)]
    fn factor(&self, _: &Job<'_>, _: usize) -> f32 {
        self.factor
    }
}
