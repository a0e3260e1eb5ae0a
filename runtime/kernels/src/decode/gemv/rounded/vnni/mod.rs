//! 512 bits at a time, with products of bytes by fours (VNNI): a vector holds sixteen codes of four groups of a single row of x, or of
//! one group of four rows.
//!
//! Either way a group's products are in four lanes, a sum of eight in each, and those of group g are added to the sums of turn g mod 4.
//! So a row comes to the same result alone and among others.

mod blocks;
mod coded;
mod super_blocks;

use std::arch::x86_64::*;

use self::blocks::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use self::coded::{Book, Linear};
use self::super_blocks::{Q4K, Q5K, Q6K};
use super::super::Job;
use super::super::ahead::{ahead, reads_past_caches};
use super::book::Levels;
use super::{GROUP, PIECE, ROWS, RoundedRows, SPAN};
use crate::element::scale_of_eight_bits;
use crate::storage::Storage;

/// Computes a job of `count` rows of x from the `first` on.
///
/// # Safety
/// The job is as [`super::super::gemv`] checked it, [`Matrix::takes_rounded`](crate::Matrix::takes_rounded) of its weight, and the
/// processor has AVX-512 with VNNI. So for all below, which is inlined into code with its instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
pub unsafe fn run(job: &Job<'_>, x: &RoundedRows, first: usize, count: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.w.storage {
            Storage::Q4_0 => by_format(job, Q4_0, x, first, count),
            Storage::Q4_1 => by_format(job, Q4_1, x, first, count),
            Storage::Q5_0 => by_format(job, Q5_0, x, first, count),
            Storage::Q5_1 => by_format(job, Q5_1, x, first, count),
            Storage::Q8_0 => by_format(job, Q8_0, x, first, count),
            Storage::Q4K => by_format(job, Q4K, x, first, count),
            Storage::Q5K => by_format(job, Q5K, x, first, count),
            Storage::Q6K => by_format(job, Q6K, x, first, count),
            _ => by_format(job, Linear, x, first, count),
        }
    }
}

/// The same with the levels of a book. It stands apart because a function with all formats is more than the compiler makes straight
/// code of.
///
/// # Safety
/// See [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
pub unsafe fn run_book(
    job: &Job<'_>,
    levels: &Levels,
    x: &RoundedRows,
    first: usize,
    count: usize,
    scratch: &mut Vec<f32>,
) {
    // SAFETY: passed on to the caller.
    unsafe { by_format(job, Book::new(job.w, levels, scratch), x, first, count) }
}

#[inline(always)]
unsafe fn by_format<F: Format>(job: &Job<'_>, format: F, x: &RoundedRows, first: usize, count: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        match (x.order, reads_past_caches()) {
            (super::Order::One, false) => walk::<_, _, false>(job, format, &One(x)),
            (super::Order::One, true) => walk::<_, _, true>(job, format, &One(x)),
            (_, false) => walk::<_, _, false>(job, format, &Four::new(x, first, count)),
            (_, true) => walk::<_, _, true>(job, format, &Four::new(x, first, count)),
        }
    }
}

/// See [`super::round`].
///
/// # Safety
/// The processor has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
pub unsafe fn round(row: &[f32], codes: &mut [i8], scales: &mut [f32], halves: &mut [f32]) {
    let groups = row.as_chunks::<GROUP>().0.iter().zip(codes.as_chunks_mut::<GROUP>().0);
    for ((row, codes), (scale, halves)) in groups.zip(scales.iter_mut().zip(halves.as_chunks_mut::<2>().0)) {
        // SAFETY: a group is two vectors of values and two pieces of codes.
        let (first, second) = unsafe { (_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(PIECE))) };
        let (a, b) = (_mm512_castps_si512(_mm512_abs_ps(first)), _mm512_castps_si512(_mm512_abs_ps(second)));
        // Bits of floats without their sign are in the order of their magnitudes, and NaN lies above infinity.
        let inverse;
        (*scale, inverse) = scale_of_eight_bits(f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(a, b))));
        let inverse = _mm512_set1_ps(inverse);
        for (half, values) in [first, second].into_iter().enumerate() {
            let whole = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)));
            // SAFETY: as above.
            unsafe { _mm_storeu_si128(codes.as_mut_ptr().add(PIECE * half).cast(), whole) };
            let four = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), whole);
            let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
            let sum = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
            halves[half] = *scale * _mm_cvtsi128_si32(sum) as f32;
        }
    }
}

/// Scales of the groups of a span.
struct Scales {
    /// Of each group, or of its first half.
    first: __m256,
    /// Of its second half.
    second: __m256,
    /// What its sum is multiplied by, [`Format::OFFSET`] set aside; or of the first and second eight halves.
    sums: [__m256; 2],
}

impl Scales {
    #[inline(always)]
    fn of(scales: __m256, sums: __m256) -> Self {
        Self { first: scales, second: scales, sums: [sums, sums] }
    }
}

/// A storage of codes without a sign, in blocks of a group or of a span.
trait Format {
    /// Groups of a block, 1 or [`SPAN`].
    const GROUPS: usize = 1;
    /// Bytes of a block.
    const BYTES: usize;
    /// What sums times scales are multiplied by.
    const OFFSET: f32;
    /// Whether halves of a group have scales of their own.
    const HALVES: bool = false;

    /// Makes ready for a row of W.
    #[inline(always)]
    fn begin(&mut self, _row: usize) {}
    /// The first `n` groups' scales, at least one, and after them any of a group that there is: rows of x are zeros there.
    unsafe fn scales(&self, p: *const u8, span: usize, n: usize) -> Scales;
    /// Codes of a group.
    unsafe fn group(&self, p: *const u8, group: usize) -> __m256i;
    /// The first sixteen codes of groups 4q to 4q + 3, and the second.
    #[inline(always)]
    unsafe fn quad(&self, p: *const u8, q: usize) -> [__m512i; 2] {
        // SAFETY: passed on to the caller.
        unsafe {
            let (a, b) = (self.group(p, 4 * q), self.group(p, 4 * q + 1));
            quad_of([a, b, self.group(p, 4 * q + 2), self.group(p, 4 * q + 3)])
        }
    }
    /// The first sixteen codes of a group in each quarter, and the second.
    #[inline(always)]
    unsafe fn spread(&self, p: *const u8, group: usize) -> [__m512i; 2] {
        // SAFETY: passed on to the caller.
        unsafe {
            let codes = _mm512_castsi256_si512(self.group(p, group));
            [_mm512_shuffle_i32x4::<0x00>(codes, codes), _mm512_shuffle_i32x4::<0x55>(codes, codes)]
        }
    }
    /// Sums of products over four lanes: those of both halves of a group.
    #[inline(always)]
    unsafe fn dot(&self, codes: [__m512i; 2], x: [__m512i; 2]) -> __m512 {
        // SAFETY: passed on to the caller.
        unsafe { dot(codes, x) }
    }
    /// What all of a row's results are multiplied by.
    #[inline(always)]
    fn factor(&self, _: &Job<'_>, _: usize) -> f32 {
        1.0
    }
}

#[inline(always)]
unsafe fn quad_of([a, b, c, d]: [__m256i; 4]) -> [__m512i; 2] {
    // SAFETY: the processor has it.
    unsafe {
        let (ab, cd) = (beside(a, b), beside(c, d));
        [_mm512_shuffle_i32x4::<0x88>(ab, cd), _mm512_shuffle_i32x4::<0xDD>(ab, cd)]
    }
}

#[inline(always)]
unsafe fn beside(a: __m256i, b: __m256i) -> __m512i {
    // SAFETY: the processor has it.
    unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b) }
}

/// Sums of products over four lanes of codes: those of both halves of a group.
#[inline(always)]
unsafe fn dot([first, second]: [__m512i; 2], [x, y]: [__m512i; 2]) -> __m512 {
    // SAFETY: the processor has it.
    unsafe {
        let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, x);
        _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(sums, second, y))
    }
}

/// The same of the first and of the second half.
#[inline(always)]
unsafe fn dots([first, second]: [__m512i; 2], [x, y]: [__m512i; 2]) -> [__m512; 2] {
    // SAFETY: the processor has it.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (a, b) = (_mm512_dpbusd_epi32(zero, first, x), _mm512_dpbusd_epi32(zero, second, y));
        [_mm512_cvtepi32_ps(a), _mm512_cvtepi32_ps(b)]
    }
}

/// Pairs of vectors of codes from number `pair` on.
#[inline(always)]
unsafe fn codes(p: *const i8, pair: usize) -> [__m512i; 2] {
    // SAFETY: the caller has so many.
    unsafe {
        let p = p.add(2 * pair * 4 * PIECE);
        [_mm512_load_si512(p.cast()), _mm512_load_si512(p.add(4 * PIECE).cast())]
    }
}

/// Eight values twice.
#[inline(always)]
unsafe fn twice(eight: __m256) -> __m512 {
    // SAFETY: the processor has it.
    unsafe {
        let eight = _mm512_castps256_ps512(eight);
        _mm512_shuffle_f32x4::<0x44>(eight, eight)
    }
}

/// Four of eight values, each in four lanes.
#[inline(always)]
unsafe fn quarter(eight: __m256, q: usize) -> __m512 {
    // SAFETY: the processor has it.
    unsafe {
        let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        let lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(4 * q as i32));
        _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(eight))
    }
}

/// Rows of x that share a reading of W.
trait Rows {
    /// What is summed for a row of W.
    type Sums;

    unsafe fn begin() -> Self::Sums;
    /// Adds the products of span number `span`, n groups at `p`.
    unsafe fn span<F: Format>(&self, format: &F, sums: &mut Self::Sums, p: *const u8, span: usize, n: usize);
    /// Writes the results of row `i` of the job's, `factor` times the sums.
    unsafe fn end<F: Format>(&self, sums: Self::Sums, job: &Job<'_>, i: usize, factor: f32);
}

#[inline(always)]
unsafe fn walk<F: Format, R: Rows, const ONCE: bool>(job: &Job<'_>, mut format: F, x: &R) {
    let groups = job.w.cols / GROUP;
    let (of_span, of_row) = (F::BYTES * (SPAN / F::GROUPS), F::BYTES * (groups / F::GROUPS));
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is whole blocks; x has codes, scales and sums for whole spans.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * of_row);
            format.begin(row);
            let mut sums = R::begin();
            for span in 0..groups / SPAN {
                let p = w.add(span * of_span);
                ahead::<ONCE>(p, of_span);
                x.span(&format, &mut sums, p, span, SPAN);
            }
            if F::GROUPS == 1 && !groups.is_multiple_of(SPAN) {
                let span = groups / SPAN;
                x.span(&format, &mut sums, w.add(span * of_span), span, groups % SPAN);
            }
            x.end::<F>(sums, job, i, format.factor(job, row));
        }
    }
}

/// A single row.
struct One<'a>(&'a RoundedRows);

impl Rows for One<'_> {
    /// Products in lanes of turns, offsets in lanes of groups.
    type Sums = (__m512, __m256);

    #[inline(always)]
    unsafe fn begin() -> Self::Sums {
        // SAFETY: the processor has it.
        unsafe { (_mm512_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn span<F: Format>(&self, format: &F, sums: &mut Self::Sums, p: *const u8, span: usize, n: usize) {
        let Self(x) = self;
        let (products, offsets) = sums;
        // SAFETY: the caller has the span on both sides.
        unsafe {
            let scales = format.scales(p, span, n);
            let of_x = _mm256_load_ps(x.scales.as_ptr().add(span * SPAN));
            if F::HALVES {
                for (half, scales) in scales.sums.into_iter().enumerate() {
                    let sums = _mm256_load_ps(x.halves.as_ptr().add((2 * span + half) * SPAN));
                    *offsets = _mm256_fmadd_ps(scales, sums, *offsets);
                }
            } else {
                let sums = _mm256_load_ps(x.sums.as_ptr().add(span * SPAN));
                *offsets = _mm256_fmadd_ps(scales.sums[0], sums, *offsets);
            }
            for q in 0..n.div_ceil(4) {
                // Groups beyond the last are the last again, times zero.
                let w = if n == SPAN {
                    format.quad(p, q)
                } else {
                    let (g, last) = (4 * q, n - 1);
                    let (a, b) = (format.group(p, g), format.group(p, last.min(g + 1)));
                    quad_of([a, b, format.group(p, last.min(g + 2)), format.group(p, last.min(g + 3))])
                };
                let codes = codes(x.codes.as_ptr(), 2 * span + q);
                let factors = quarter(_mm256_mul_ps(scales.first, of_x), q);
                if F::HALVES {
                    let [a, b] = dots(w, codes);
                    *products = _mm512_fmadd_ps(a, factors, *products);
                    let factors = quarter(_mm256_mul_ps(scales.second, of_x), q);
                    *products = _mm512_fmadd_ps(b, factors, *products);
                } else {
                    *products = _mm512_fmadd_ps(format.dot(w, codes), factors, *products);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn end<F: Format>(&self, (products, offsets): Self::Sums, job: &Job<'_>, i: usize, factor: f32) {
        // SAFETY: the job has room for the result.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(products), _mm512_extractf32x8_ps::<1>(products));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let offsets = _mm_add_ps(_mm256_castps256_ps128(offsets), _mm256_extractf128_ps::<1>(offsets));
            let four = _mm_fmadd_ps(_mm_set1_ps(F::OFFSET), offsets, four);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            let one = _mm_add_ss(two, _mm_movehdup_ps(two));
            *job.out.0.add(i * job.out.1) = factor * _mm_cvtss_f32(one);
        }
    }
}

/// Four rows, of which some are asked for.
struct Four {
    codes: *const i8,
    scales: *const f32,
    sums: *const f32,
    halves: *const f32,
    count: usize,
}

impl Four {
    #[inline(always)]
    fn new(x: &RoundedRows, first: usize, count: usize) -> Self {
        let before = first * x.spans * SPAN;
        Self {
            codes: x.codes[before * GROUP..].as_ptr(),
            scales: x.scales[before * 4..].as_ptr(),
            sums: x.sums[before..].as_ptr(),
            halves: x.halves[2 * before..].as_ptr(),
            count,
        }
    }
}

impl Rows for Four {
    /// Products of each turn in lanes of rows; offsets of the first two rows and of the others, in lanes of groups.
    type Sums = ([__m512; 4], [__m512; 2]);

    #[inline(always)]
    unsafe fn begin() -> Self::Sums {
        // SAFETY: the processor has it.
        unsafe { ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 2]) }
    }

    #[inline(always)]
    unsafe fn span<F: Format>(&self, format: &F, sums: &mut Self::Sums, p: *const u8, span: usize, n: usize) {
        let (products, offsets) = sums;
        // SAFETY: the caller has the span on both sides.
        unsafe {
            let scales = format.scales(p, span, n);
            let turns = if F::HALVES { 2 } else { 1 };
            for turn in 0..turns {
                let sums = if F::HALVES { self.halves } else { self.sums }.add((turns * span + turn) * ROWS * SPAN);
                let scales = twice(scales.sums[turn]);
                for (two, offsets) in offsets.iter_mut().enumerate() {
                    *offsets = _mm512_fmadd_ps(scales, _mm512_load_ps(sums.add(two * 2 * SPAN)), *offsets);
                }
            }
            let first = _mm512_castps256_ps512(scales.first);
            let second = _mm512_castps256_ps512(scales.second);
            for g in 0..n {
                let w = format.spread(p, g);
                let codes = codes(self.codes, span * SPAN + g);
                let of_x = _mm512_load_ps(self.scales.add((span * SPAN + g) * 4 * ROWS));
                let lanes = _mm512_set1_epi32(g as i32);
                let products = &mut products[g % 4];
                let factors = _mm512_mul_ps(_mm512_permutexvar_ps(lanes, first), of_x);
                if F::HALVES {
                    let [a, b] = dots(w, codes);
                    *products = _mm512_fmadd_ps(a, factors, *products);
                    let factors = _mm512_mul_ps(_mm512_permutexvar_ps(lanes, second), of_x);
                    *products = _mm512_fmadd_ps(b, factors, *products);
                } else {
                    *products = _mm512_fmadd_ps(format.dot(w, codes), factors, *products);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn end<F: Format>(&self, (products, offsets): Self::Sums, job: &Job<'_>, i: usize, factor: f32) {
        // SAFETY: the job has room for the results.
        unsafe {
            let [a, b, c, d] = products;
            let four = _mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d));
            let [low, high] = offsets;
            let offsets =
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(low, high), _mm512_shuffle_f32x4::<0xDD>(low, high));
            let four = _mm512_fmadd_ps(_mm512_set1_ps(F::OFFSET), offsets, four);
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
            let one = _mm512_add_ps(two, _mm512_movehdup_ps(two));
            let apart = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let results = _mm512_castps512_ps128(_mm512_permutexvar_ps(apart, one));
            let results = _mm_mul_ps(_mm_set1_ps(factor), results);
            _mm_mask_storeu_ps(job.out.0.add(i * job.out.1), (1u8 << self.count) - 1, results);
        }
    }
}

/// The low halves of bytes, and the high ones.
#[inline(always)]
unsafe fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    // SAFETY: the processor has it.
    unsafe {
        let low = _mm512_set1_epi8(15);
        [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
    }
}

/// Sixteen bytes in each quarter.
#[inline(always)]
unsafe fn in_quarters(p: *const u8) -> __m512i {
    // SAFETY: the caller has sixteen bytes at the pointer.
    unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())) }
}

/// Adds 16 to the codes whose bit is set.
#[inline(always)]
unsafe fn fifth(codes: __m512i, bits: u64) -> __m512i {
    // SAFETY: the processor has it.
    unsafe { _mm512_mask_add_epi8(codes, bits, codes, _mm512_set1_epi8(16)) }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{BLOCKS, ggml};
    use super::*;
    use crate::EncodedScales;
    use crate::matmul::Matrix;
    use crate::storage::codec::Codec;

    /// Every way to the codes of a group yields the same.
    fn check<F: Format>(format: F, p: *const u8) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")]
        unsafe fn all<F: Format>(format: F, p: *const u8) {
            // SAFETY: the caller has a span at the pointer.
            unsafe {
                let bytes = |vector: __m512i| std::mem::transmute::<__m512i, [[u8; PIECE]; 4]>(vector);
                for g in 0..SPAN {
                    let group = std::mem::transmute::<__m256i, [[u8; PIECE]; 2]>(format.group(p, g));
                    let quad = format.quad(p, g / 4).map(|codes| bytes(codes)[g % 4]);
                    assert_eq!(quad, group, "group {g} of a quad");
                    let spread = format.spread(p, g).map(bytes);
                    assert_eq!(spread, group.map(|half| [half; 4]), "group {g} in quarters");
                }
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { all(format, p) }
    }

    #[test]
    fn codes_of_one_group_and_of_four_are_the_same() {
        if !std::arch::is_x86_feature_detected!("avx512vnni") {
            return;
        }
        for (storage, name) in BLOCKS {
            let (mut bytes, ..) = ggml(storage, name);
            while bytes.len() < 2 * SPAN * storage.block_bytes() {
                bytes.extend_from_within(..);
            }
            let p = bytes.as_ptr();
            match storage {
                Storage::Q4_0 => check(Q4_0, p),
                Storage::Q4_1 => check(Q4_1, p),
                Storage::Q5_0 => check(Q5_0, p),
                Storage::Q5_1 => check(Q5_1, p),
                Storage::Q8_0 => check(Q8_0, p),
                Storage::Q4K => check(Q4K, p),
                Storage::Q5K => check(Q5K, p),
                Storage::Q6K => check(Q6K, p),
                _ => (),
            }
        }
        let (codec, mut scratch) = (Codec::nf4(), Vec::new());
        let codes: Vec<u8> = (0..SPAN * GROUP / 2).map(|i| (37 * i + i / 7) as u8).collect();
        let scales = EncodedScales::Nested { codes: vec![9; 4], absmax: vec![2.0], offset: 0.5 };
        let w = Matrix::coded(&codec, &codes, &scales, 1, SPAN * GROUP).unwrap();
        // SAFETY: the processor has AVX-512, as seen above.
        check(unsafe { Book::new(&w, &Levels::of(&w).unwrap(), &mut scratch) }, codes.as_ptr());
    }
}
