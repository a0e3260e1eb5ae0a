//! 256 bits at a time: bytes are multiplied by pairs, which is exact for what stands here, or by fours where the processor does that
//! (AVX-VNNI), which yields the same. Each block's part of the products is in eight lanes.

#![allow(clippy::needless_range_loop, reason = "loops of a constant length become straight code, whatever they index")]

use std::arch::x86_64::*;

use super::super::Job;
use super::super::ahead::Ahead;
use super::book::{BlockScales, Levels};
use super::{GROUP, PIECE, RoundedRows, SPAN};
use crate::isa::{Dpbusd, Run};
use crate::storage::Storage;
use crate::storage::format::sub_blocks;
use crate::storage::whole::{Block, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q8_0, SuperBlock, six_bits};

/// Computes a job of M rows of x from the `first` on.
///
/// # Safety
/// The job is as [`super::super::gemv`] checked it, [`Matrix::takes_rounded`](crate::Matrix::takes_rounded) of its weight, rows of x
/// lie one after another, and the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
pub unsafe fn run<const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    // SAFETY: passed on to the caller.
    unsafe { run_by::<Pairs, M>(job, x, first) }
}

/// The same for a processor that has AVX-VNNI, too.
pub struct ByFours<'a, const M: usize> {
    pub job: &'a Job<'a>,
    pub x: &'a RoundedRows,
    pub first: usize,
}

impl<const M: usize> Run for ByFours<'_, M> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<D: Dpbusd>(self) {
        // SAFETY: passed on to the caller.
        unsafe { run_by::<D, M>(self.job, self.x, self.first) }
    }
}

/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn run_by<D: Dot, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.w.storage {
            Storage::Q4_0 => by_blocks::<D, Q4_0, M>(job, x, first),
            Storage::Q4_1 => by_blocks::<D, Q4_1, M>(job, x, first),
            Storage::Q5_0 => by_blocks::<D, Q5_0, M>(job, x, first),
            Storage::Q5_1 => by_blocks::<D, Q5_1, M>(job, x, first),
            Storage::Q8_0 => by_blocks::<D, Q8_0, M>(job, x, first),
            Storage::Q4K => by_super_blocks::<D, Q4K, M>(job, x, first),
            Storage::Q5K => by_super_blocks::<D, Q5K, M>(job, x, first),
            Storage::Q6K => q6k::<D, M>(job, x, first),
            _ => linear::<D, M>(job, x, first),
        }
    }
}

/// Products of bytes.
///
/// # Safety
/// Called from what has the instructions enabled.
trait Dot {
    /// Sums of four products each, of codes without a sign below 64 with codes from -127 to 127.
    unsafe fn dot(w: __m256i, x: __m256i) -> __m256i;
    /// The same of codes with a sign.
    #[inline(always)]
    unsafe fn dot_signed(w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: passed on to the caller. Two products, 2 · 128 · 127, are below 2^15.
        unsafe { Self::dot(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) }
    }
}

/// By pairs.
struct Pairs;

impl Dot for Pairs {
    #[inline(always)]
    unsafe fn dot(w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the processor has it; so for all below, which is inlined into code with its instructions. Two products are below 2^15
        // in magnitude.
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)) }
    }
}

impl<D: Dpbusd> Dot for D {
    #[inline(always)]
    unsafe fn dot(w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: passed on to the caller.
        unsafe { D::dpbusd(_mm256_setzero_si256(), w, x) }
    }
}

/// What is summed for a row of W and each row of x.
struct Sums<const M: usize> {
    /// Products, in two turns.
    products: [[__m256; 2]; M],
    /// Offsets: minima, or scales that are still to be multiplied by a block's common offset.
    offsets: [__m256; M],
}

impl<const M: usize> Sums<M> {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the processor has it.
        let zero = unsafe { _mm256_setzero_ps() };
        Self { products: [[zero; 2]; M], offsets: [zero; M] }
    }

    /// Adds a block's sums of products, times a factor.
    #[inline(always)]
    unsafe fn add(&mut self, j: usize, turn: usize, dot: __m256i, factor: __m256) {
        let to = &mut self.products[j][turn];
        // SAFETY: the processor has it.
        *to = unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *to) };
    }

    /// Adds the products of block number `N` of those from `p`, which meet the groups of x from `from`.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn block<D: Dot, F: Block, const N: usize>(
        &mut self,
        p: *const u8,
        x: &[Row; M],
        from: usize,
        factors: &[[f32; 8]; M],
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            let codes = F::codes(p.add(N * F::BYTES));
            for j in 0..M {
                let x = x[j].group(from + N);
                let dot = if F::SIGNED { D::dot_signed(codes, x) } else { D::dot(codes, x) };
                self.add(j, N % 2, dot, _mm256_set1_ps(factors[j][N]));
            }
        }
    }

    /// Writes a row's results: `factor` times products and `offset` times offsets.
    ///
    /// # Safety
    /// See [`run`].
    #[inline(always)]
    unsafe fn finish(self, job: &Job<'_>, i: usize, factor: f32, offset: f32) {
        // SAFETY: passed on to the caller.
        unsafe {
            for j in 0..M {
                let [a, b] = self.products[j];
                let both = _mm256_fmadd_ps(_mm256_set1_ps(offset), self.offsets[j], _mm256_add_ps(a, b));
                *job.out.0.add(i * job.out.1 + j) = factor * fold(both);
            }
        }
    }
}

/// Adds lanes by halves.
#[inline(always)]
unsafe fn fold(lanes: __m256) -> f32 {
    // SAFETY: the processor has it.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// A row of x.
struct Row {
    codes: *const i8,
    scales: *const f32,
    sums: *const f32,
    halves: *const f32,
}

/// The M rows of x from the `first` on.
#[inline(always)]
fn rows<const M: usize>(x: &RoundedRows, first: usize) -> [Row; M] {
    std::array::from_fn(|j| {
        let span = (first + j) * x.spans;
        Row {
            codes: x.codes[span * SPAN * GROUP..].as_ptr(),
            scales: x.scales[span * SPAN..].as_ptr(),
            sums: x.sums[span * SPAN..].as_ptr(),
            halves: x.halves[2 * span * SPAN..].as_ptr(),
        }
    })
}

impl Row {
    /// The codes of a group.
    #[inline(always)]
    unsafe fn group(&self, group: usize) -> __m256i {
        // SAFETY: the caller asks for groups that there are.
        unsafe { _mm256_loadu_si256(self.codes.add(group * GROUP).cast()) }
    }
}

/// The halves at `p` and at the same place of the seven blocks that follow, as floats.
#[inline(always)]
unsafe fn halves<F: Block>(p: *const u8) -> __m256 {
    // SAFETY: the caller has eight blocks at the pointer.
    unsafe {
        let mut bits = _mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<1>(bits, i32::from(p.add(F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<2>(bits, i32::from(p.add(2 * F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<3>(bits, i32::from(p.add(3 * F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<4>(bits, i32::from(p.add(4 * F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<5>(bits, i32::from(p.add(5 * F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<6>(bits, i32::from(p.add(6 * F::BYTES).cast::<u16>().read_unaligned()));
        bits = _mm_insert_epi16::<7>(bits, i32::from(p.add(7 * F::BYTES).cast::<u16>().read_unaligned()));
        _mm256_cvtph_ps(bits)
    }
}

/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn by_blocks<D: Dot, F: Block, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    let blocks = job.w.cols / GROUP;
    let x = rows::<M>(x, first);
    let offset = match (F::HAS_MIN, F::SIGNED) {
        (true, _) => 1.0,
        (false, true) => 0.0,
        (false, false) => -F::SHIFT,
    };
    let ahead = Ahead::new();
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `blocks` blocks; a row of x has as many groups, and scales and sums for whole turns of them.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * F::BYTES);
            let mut sums = Sums::<M>::zero();
            for from in (0..blocks - blocks % 8).step_by(8) {
                let p = w.add(from * F::BYTES);
                ahead.of(p, 8 * F::BYTES);
                let scale = halves::<F>(p);
                let min = if F::HAS_MIN { halves::<F>(p.add(2)) } else { scale };
                let mut factors = [[0f32; 8]; M];
                for j in 0..M {
                    let factor = _mm256_mul_ps(scale, _mm256_loadu_ps(x[j].scales.add(from)));
                    _mm256_storeu_ps(factors[j].as_mut_ptr(), factor);
                    let of_x = _mm256_loadu_ps(x[j].sums.add(from));
                    sums.offsets[j] = _mm256_fmadd_ps(min, of_x, sums.offsets[j]);
                }
                sums.block::<D, F, 0>(p, &x, from, &factors);
                sums.block::<D, F, 1>(p, &x, from, &factors);
                sums.block::<D, F, 2>(p, &x, from, &factors);
                sums.block::<D, F, 3>(p, &x, from, &factors);
                sums.block::<D, F, 4>(p, &x, from, &factors);
                sums.block::<D, F, 5>(p, &x, from, &factors);
                sums.block::<D, F, 6>(p, &x, from, &factors);
                sums.block::<D, F, 7>(p, &x, from, &factors);
            }
            for block in blocks - blocks % 8..blocks {
                let p = w.add(block * F::BYTES);
                let scale = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
                let min = if F::HAS_MIN { _mm_movehdup_ps(scale) } else { scale };
                let mut factors = [[0f32; 8]; M];
                for j in 0..M {
                    factors[j][0] = _mm_cvtss_f32(scale) * *x[j].scales.add(block);
                    let of_x = _mm_load_ss(x[j].sums.add(block));
                    let offset = _mm256_zextps128_ps256(_mm_mul_ss(_mm_move_ss(_mm_setzero_ps(), min), of_x));
                    sums.offsets[j] = _mm256_add_ps(sums.offsets[j], offset);
                }
                sums.block::<D, F, 0>(p, &x, block, &factors);
            }
            sums.finish(job, i, 1.0, offset);
        }
    }
}

/// Eight bytes as floats, times a factor.
#[inline(always)]
unsafe fn eight(bytes: u64, factor: __m256) -> __m256 {
    // SAFETY: the processor has it.
    unsafe { _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)))) }
}

/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn by_super_blocks<D: Dot, F: SuperBlock, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    let blocks = job.w.cols / (8 * GROUP);
    let x = rows::<M>(x, first);
    let ahead = Ahead::new();
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `blocks` blocks, a row of x eight times as many groups.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * F::BYTES);
            let mut sums = Sums::<M>::zero();
            for block in 0..blocks {
                let (p, at) = (w.add(block * F::BYTES), 8 * block);
                ahead.of(p, F::BYTES);
                let both = _mm_cvtph_ps(_mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()));
                let d = _mm256_broadcastss_ps(both);
                let d_min = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
                let (scales, mins) = sub_blocks(p.add(4));
                let (scales, mins) = (eight(scales, d), eight(mins, d_min));
                let mut factors = [[0f32; 8]; M];
                for j in 0..M {
                    let of_x = _mm256_loadu_ps(x[j].scales.add(at));
                    _mm256_storeu_ps(factors[j].as_mut_ptr(), _mm256_mul_ps(scales, of_x));
                    sums.offsets[j] = _mm256_fmadd_ps(mins, _mm256_loadu_ps(x[j].sums.add(at)), sums.offsets[j]);
                }
                for group in 0..8 {
                    let codes = F::codes(p, group);
                    for j in 0..M {
                        let dot = D::dot(codes, x[j].group(at + group));
                        sums.add(j, group % 2, dot, _mm256_set1_ps(factors[j][group]));
                    }
                }
            }
            sums.finish(job, i, 1.0, -1.0);
        }
    }
}

/// Q6_K: sixteen scales of sixteen codes each, which are greater by 32.
///
/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn q6k<D: Dot, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    const BYTES: usize = 210;
    let blocks = job.w.cols / (8 * GROUP);
    let x = rows::<M>(x, first);
    let ahead = Ahead::new();
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `blocks` blocks, a row of x eight times as many groups.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * BYTES);
            let mut sums = Sums::<M>::zero();
            for block in 0..blocks {
                let (p, at) = (w.add(block * BYTES), 8 * block);
                ahead.of(p, BYTES);
                let d = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.add(208).cast::<u16>().read_unaligned())));
                let d = _mm256_broadcastss_ps(d);
                let signed = _mm_loadu_si128(p.add(192).cast());
                let first = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed));
                let second = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(signed, signed)));
                let scales = [_mm256_mul_ps(d, first), _mm256_mul_ps(d, second)];
                for j in 0..M {
                    for (half, scales) in scales.into_iter().enumerate() {
                        let of_x = _mm256_loadu_ps(x[j].halves.add(2 * at + 8 * half));
                        sums.offsets[j] = _mm256_fmadd_ps(scales, of_x, sums.offsets[j]);
                    }
                }
                for group in 0..8 {
                    let (half, quarter) = (group / 4, group % 4);
                    let codes = six_bits(p, group);
                    let lane = 2 * quarter as i32;
                    let lanes = _mm256_setr_epi32(lane, lane, lane, lane, lane + 1, lane + 1, lane + 1, lane + 1);
                    let scale = _mm256_permutevar8x32_ps(scales[half], lanes);
                    for j in 0..M {
                        let factor = _mm256_mul_ps(scale, _mm256_set1_ps(*x[j].scales.add(at + group)));
                        sums.add(j, group % 2, D::dot(codes, x[j].group(at + group)), factor);
                    }
                }
            }
            sums.finish(job, i, 1.0, -32.0);
        }
    }
}

/// Eight bits a value, `(index - 127) · scale / 127`, a scale for each row.
///
/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn linear<D: Dot, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    let cols = job.w.cols;
    let x = rows::<M>(x, first);
    let Some(coded) = job.w.coded.as_ref() else { return };
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row is `cols` bytes, a multiple of 32; a row of x has a group for each 32 of them.
        unsafe {
            let w = job.w.bytes.as_ptr().add(row * cols);
            let mut sums = Sums::<M>::zero();
            for group in 0..cols / GROUP {
                let codes = _mm256_loadu_si256(w.add(group * GROUP).cast());
                let codes = _mm256_min_epu8(codes, _mm256_set1_epi8(254u8 as i8));
                let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(127));
                for j in 0..M {
                    let dot = D::dot_signed(codes, x[j].group(group));
                    sums.add(j, group % 2, dot, _mm256_set1_ps(*x[j].scales.add(group)));
                }
            }
            sums.finish(job, i, coded.scale(row) / 127.0, 0.0);
        }
    }
}

/// Computes a job with the levels of a book, which are multiplied as whole numbers of sixteen bits. It stands apart because a function
/// with all formats is more than the compiler makes straight code of.
///
/// # Safety
/// See [`run`].
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
pub unsafe fn run_book<const M: usize>(
    job: &Job<'_>,
    levels: &Levels,
    x: &RoundedRows,
    first: usize,
    scratch: &mut Vec<f32>,
) {
    let groups = job.w.cols / GROUP;
    let [high, low] = levels.bytes(0);
    // SAFETY: each is sixteen bytes.
    let (high, low) = unsafe {
        let (high, low) = (_mm_loadu_si128(high.as_ptr().cast()), _mm_loadu_si128(low.as_ptr().cast()));
        (_mm256_broadcastsi128_si256(high), _mm256_broadcastsi128_si256(low))
    };
    let all: [&[i16]; M] = std::array::from_fn(|j| &x.words()[(first + j) * x.spans * SPAN * GROUP..]);
    let x = rows::<M>(x, first);
    let mut scales = BlockScales::new(job.w, scratch);
    let ahead = Ahead::new();
    for (i, row) in job.rows.clone().enumerate() {
        scales.begin(row);
        // SAFETY: a row of W is sixteen bytes for each group of a row of x, which has scales for whole spans of them. Sums of four
        // products are below 2^24.
        unsafe {
            let w = job.w.bytes.as_ptr().add(row * groups * PIECE);
            let mut sums = Sums::<M>::zero();
            for from in (0..groups).step_by(SPAN) {
                ahead.of(w.add(from * PIECE), SPAN * PIECE);
                let scale = scales.of_span(from / SPAN);
                let mut factors = [[0f32; SPAN]; M];
                for j in 0..M {
                    let factor = _mm256_mul_ps(scale, _mm256_loadu_ps(x[j].scales.add(from)));
                    _mm256_storeu_ps(factors[j].as_mut_ptr(), factor);
                }
                for group in 0..SPAN.min(groups - from) {
                    // The upper halves of bytes, which are at even places, then the lower ones.
                    let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(w.add((from + group) * PIECE).cast()));
                    let shifted = _mm256_srlv_epi64(both, _mm256_setr_epi64x(4, 4, 0, 0));
                    let index = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
                    let (high, low) = (_mm256_shuffle_epi8(high, index), _mm256_shuffle_epi8(low, index));
                    let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
                    for j in 0..M {
                        let x = all[j].as_ptr().add((from + group) * GROUP);
                        let (x, y) = (_mm256_load_si256(x.cast()), _mm256_load_si256(x.add(PIECE).cast()));
                        let dot = _mm256_add_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, y));
                        sums.add(j, group % 2, dot, _mm256_set1_ps(factors[j][group]));
                    }
                }
            }
            sums.finish(job, i, levels.factor, 0.0);
        }
    }
}
