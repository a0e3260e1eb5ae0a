//! Products of a few rows with a stored weight, as in decoding: each row of W is decoded in registers and multiplied by all rows
//! of x on the way, so that W is read once and never exists as floats.
//!
//! Rows that are given in eight bits besides are multiplied by codes, see `rounded`. What follows is of the others.
//!
//! A sum runs over 32 lanes: lane `l` takes columns `l`, `l + 32`, … in ascending order, and lanes are added by halves. What an
//! element of the result is depends on its row of x and of W alone: not on the storage beyond the values it decodes to, on how
//! many rows share the call, or on the cut into tasks. Multiply-adds are fused where the processor has them.

#[cfg(target_arch = "x86_64")]
mod ahead;
#[cfg(target_arch = "x86_64")]
mod floats;
#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
mod rounded;
mod update;

use std::cell::RefCell;
use std::ops::Range;

pub use self::rounded::RoundedRows;
#[cfg(target_arch = "x86_64")]
pub(crate) use self::rounded::round as round_groups;
pub use self::update::Panels;

use crate::buffer::grown;
use crate::element::LANES;
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Feature;
use crate::isa::{Isa, isa};
use crate::matmul::Matrix;

/// Columns that are multiplied at once: into the first half of the lanes, into the second, and so on.
const HALF: usize = LANES / 2;
/// Rows of x that share one reading of W at most; more are taken in turns.
const ROWS: usize = 4;

/// Rows of x (m, k), each `step` values from the next, a multiple of the 32 lanes of a sum; zeros beyond column k.
#[derive(Clone, Copy, Debug)]
pub struct FewRows<'a> {
    /// m times `step` values.
    pub values: &'a [f32],
    /// Values from one row to the next.
    pub step: usize,
    /// The same rows in eight bits: weights that [`Matrix::takes_rounded`] says so of are multiplied with these.
    pub rounded: Option<&'a RoundedRows>,
}

impl FewRows<'_> {
    /// The width of padded rows of k values.
    pub fn padded(k: usize) -> usize {
        k.next_multiple_of(LANES)
    }

    fn count(&self) -> usize {
        self.values.len() / self.step
    }
}

thread_local!(static SCRATCH: RefCell<Vec<f32>> = RefCell::default());

/// `x Wᵀ` for the rows `rows` of W: `out` (rows.len(), m).
///
/// Runs on the calling thread alone; callers give each thread a part of the rows.
///
/// # Panics
/// When sizes disagree.
pub fn gemv(x: FewRows<'_>, w: &Matrix<'_>, rows: Range<usize>, out: &mut [f32]) {
    let m = x.count();
    assert!(x.step.is_multiple_of(LANES) && x.values.len() == m * x.step, "padded rows of x");
    let fits = w.cols <= x.step && rows.end <= w.rows && out.len() == rows.len() * m;
    assert!(fits, "{rows:?} of {} x {} for {m} rows of {}", w.rows, w.cols, x.step);
    let rounded = x.rounded.filter(|_| w.takes_rounded());
    assert!(rounded.is_none_or(|rounded| rounded.is_of(m, x.step)), "as many rows in eight bits");
    let isa = isa();
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..m).step_by(ROWS) {
            let count = ROWS.min(m - first);
            let job = Job {
                x: (x.values[first * x.step..].as_ptr(), x.step),
                rounded: rounded.map(|rounded| (rounded, first)),
                w,
                rows: rows.clone(),
                out: (out[first..].as_mut_ptr(), m),
            };
            // SAFETY: the asserts above hold for x and the result, and a `Matrix` for its bytes; the processor has
            // what `isa` says.
            unsafe {
                match count {
                    1 => job.run::<1>(isa, scratch),
                    2 => job.run::<2>(isa, scratch),
                    3 => job.run::<3>(isa, scratch),
                    _ => job.run::<ROWS>(isa, scratch),
                }
            }
        }
    });
}

/// A part of a product: a few rows of x with some rows of W.
struct Job<'a> {
    /// First row of x, and the step to the next.
    x: (*const f32, usize),
    /// Rows of x in eight bits, and the first of them.
    rounded: Option<(&'a RoundedRows, usize)>,
    w: &'a Matrix<'a>,
    rows: Range<usize>,
    /// First result, and the step to those of the next row of W.
    out: (*mut f32, usize),
}

impl Job<'_> {
    /// For `M` rows of x.
    ///
    /// # Safety
    /// Pointers are to what [`gemv`] checked, and the processor has what `isa` says.
    unsafe fn run<const M: usize>(&self, isa: Isa, scratch: &mut Vec<f32>) {
        #[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
        if let Some((x, first)) = self.rounded {
            // SAFETY: passed on to the caller; a weight takes rounded rows where there is AVX2 or AArch64's vectors.
            return unsafe { rounded::run::<M>(isa, self, x, first, scratch) };
        }
        #[cfg(target_arch = "x86_64")]
        if isa.has(Feature::Avx512) {
            // SAFETY: passed on to the caller.
            if unsafe { avx512::run::<M>(self, scratch) } {
                return;
            }
        }
        #[cfg(target_arch = "x86_64")]
        if isa.has(Feature::Avx2) {
            // SAFETY: passed on to the caller.
            if unsafe { floats::run::<M>(self) } {
                return;
            }
        }
        #[cfg(any(test, target_arch = "aarch64"))]
        if isa.has(Feature::Neon) {
            // SAFETY: passed on to the caller.
            if unsafe { neon::run::<M>(self) } {
                return;
            }
        }
        let (k, padded) = (self.w.cols, FewRows::padded(self.w.cols));
        let row_of_w = grown(scratch, padded);
        row_of_w[k..].fill(0.0);
        for (i, row) in self.rows.clone().enumerate() {
            self.w.decode_rows(row..row + 1, &mut row_of_w[..k]);
            let mut sums = [[0f32; LANES]; M];
            // SAFETY: passed on to the caller: rows of x have `padded` values at least.
            unsafe {
                add(isa, row_of_w, self.x.0, self.x.1, &mut sums);
                for (j, sums) in sums.into_iter().enumerate() {
                    *self.out.0.add(i * self.out.1 + j) = fold(sums);
                }
            }
        }
    }
}

/// Adds the products of a padded row of W with M rows of x to sums that are zero.
///
/// # Safety
/// Each row of x is readable for as many values as `w` has.
unsafe fn add<const M: usize>(isa: Isa, w: &[f32], x: *const f32, step: usize, sums: &mut [[f32; LANES]; M]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Feature::Avx2) {
        // SAFETY: passed on to the caller.
        return unsafe { avx2::add(w, x, step, sums) };
    }
    #[cfg(any(test, target_arch = "aarch64"))]
    if isa.has(Feature::Neon) {
        // SAFETY: passed on to the caller.
        *sums = unsafe { neon::products(w, x, step) };
        return;
    }
    let _ = isa;
    for (j, sums) in sums.iter_mut().enumerate() {
        // SAFETY: passed on to the caller.
        let x = unsafe { std::slice::from_raw_parts(x.add(j * step), w.len()) };
        for (i, (w, x)) in w.as_chunks::<HALF>().0.iter().zip(x.as_chunks::<HALF>().0).enumerate() {
            let sums = &mut sums.as_chunks_mut::<HALF>().0[i % 2];
            for lane in 0..HALF {
                sums[lane] += w[lane] * x[lane];
            }
        }
    }
}

/// Adds lanes by halves.
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::LANES;

    /// See [`super::add`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn add<const M: usize>(w: &[f32], x: *const f32, step: usize, sums: &mut [[f32; LANES]; M]) {
        for (j, sums) in sums.iter_mut().enumerate() {
            let mut lanes = [_mm256_setzero_ps(); LANES / 8];
            for (i, lanes) in lanes.iter_mut().enumerate() {
                // SAFETY: `sums` is four times eight values.
                *lanes = unsafe { _mm256_loadu_ps(sums.as_ptr().add(8 * i)) };
            }
            for (k, w) in w.as_chunks::<8>().0.iter().enumerate() {
                let lanes = &mut lanes[k % 4];
                // SAFETY: `w` is eight values; for x passed on to the caller.
                let (w, x) = unsafe { (_mm256_loadu_ps(w.as_ptr()), _mm256_loadu_ps(x.add(j * step + 8 * k))) };
                *lanes = _mm256_fmadd_ps(w, x, *lanes);
            }
            for (i, lanes) in lanes.iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * i), *lanes) };
            }
        }
    }
}

/// Storages that are decoded in registers. A table of a block's sixteen or thirty-two values, and a lookup, yields the very values
/// that [`crate::decode_row`] does.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::ahead::Ahead;
    use super::{Job, LANES};
    use crate::buffer::grown;
    use crate::storage::Storage;
    use crate::storage::codec::{Coded, Fused};
    use crate::storage::format::sub_blocks;

    /// A storage by blocks.
    trait Format {
        /// Values of a block, a multiple of [`LANES`].
        const LEN: usize;
        /// Bytes of a block.
        const BYTES: usize;
        /// Whether a block begins with half-precision numbers, four at most.
        const HALVES: bool;
        /// Calls `each` with the number of sixteen values and with these, in order. `halves` are those that the block begins with.
        ///
        /// # Safety
        /// The block is readable, and the processor has AVX-512.
        unsafe fn block(bytes: *const u8, halves: &[f32; 4], each: impl FnMut(usize, __m512));
    }

    /// Blocks of a row whose halves are converted together, and from memory are in all lanes at once: a conversion of each in all
    /// lanes costs as much as the rest of its block.
    const TOGETHER: usize = 32;

    type Sums<const M: usize> = [[__m512; 2]; M];

    /// Adds the products of sixteen values, the i-th of a row of W, with M rows of x.
    ///
    /// # Safety
    /// Each row of x has sixteen values there, and the processor has AVX-512; so for all below.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn sixteen<const M: usize>(w: __m512, i: usize, x: *const f32, step: usize, sums: &mut Sums<M>) {
        for (j, sums) in sums.iter_mut().enumerate() {
            // SAFETY: passed on to the caller.
            let x = unsafe { _mm512_loadu_ps(x.add(j * step + 16 * i)) };
            sums[i % 2] = _mm512_fmadd_ps(w, x, sums[i % 2]);
        }
    }

    /// Computes a job, if its storage is one of those here.
    ///
    /// # Safety
    /// See [`Job::run`].
    pub unsafe fn run<const M: usize>(job: &Job<'_>, scratch: &mut Vec<f32>) -> bool {
        // SAFETY: passed on to the caller.
        unsafe {
            match job.w.storage {
                Storage::F32 => by_blocks::<F32, M>(job),
                Storage::F16 => by_blocks::<F16, M>(job),
                Storage::BF16 => by_blocks::<BF16, M>(job),
                Storage::Q4_0 => by_blocks::<Q4_0, M>(job),
                Storage::Q4_1 => by_blocks::<Q4_1, M>(job),
                Storage::Q5_0 => by_blocks::<Q5_0, M>(job),
                Storage::Q5_1 => by_blocks::<Q5_1, M>(job),
                Storage::Q8_0 => by_blocks::<Q8_0, M>(job),
                Storage::Q4K => by_blocks::<Q4K, M>(job),
                Storage::Q5K => by_blocks::<Q5K, M>(job),
                Storage::Q6K => by_blocks::<Q6K, M>(job),
                Storage::Coded => match job.w.coded.as_ref().and_then(|coded| Some((coded, coded.fused()?))) {
                    Some((coded, Fused::Nibbles(levels))) => nibbles::<M>(job, coded, &levels, scratch),
                    Some((coded, Fused::Linear)) => linear::<M>(job, coded),
                    None => return false,
                },
                Storage::Native => return false,
            }
        }
        true
    }

    /// Storages by blocks.
    ///
    /// # Safety
    /// See [`Job::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn by_blocks<F: Format, const M: usize>(job: &Job<'_>) {
        let (blocks, rest) = (job.w.cols / F::LEN, job.w.cols % F::LEN);
        let size = job.w.bytes.len() / job.w.rows.max(1);
        let ahead = Ahead::new();
        let (x, step) = job.x;
        for (i, row) in job.rows.clone().enumerate() {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            // SAFETY: a row of W is `blocks` blocks, and values of float storage beyond; a row of x is as long, padded.
            unsafe {
                let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * size);
                let mut halves = [[0f32; 4]; TOGETHER];
                for from in (0..blocks).step_by(TOGETHER) {
                    let count = TOGETHER.min(blocks - from);
                    if F::HALVES {
                        for (i, halves) in halves[..count].iter_mut().enumerate() {
                            let bits = _mm_loadl_epi64(w.add((from + i) * F::BYTES).cast());
                            _mm_storeu_ps(halves.as_mut_ptr(), _mm_cvtph_ps(bits));
                        }
                    }
                    for (i, halves) in halves[..count].iter().enumerate() {
                        let p = w.add((from + i) * F::BYTES);
                        if !F::HALVES {
                            ahead.of_floats(p, F::BYTES);
                        }
                        F::block(p, halves, |k, w| {
                            sixteen(w, (from + i) * (F::LEN / 16) + k, x, step, &mut sums);
                        });
                    }
                }
                if rest > 0 {
                    // Only rows of floats end within a block.
                    let mut values = [0f32; LANES];
                    let bytes = std::slice::from_raw_parts(w.add(blocks * F::BYTES), rest * (F::BYTES / F::LEN));
                    crate::storage::rows::decode_row(job.w.storage, bytes, &mut values[..rest]);
                    for k in 0..2 {
                        sixteen(_mm512_loadu_ps(values.as_ptr().add(16 * k)), 2 * blocks + k, x, step, &mut sums);
                    }
                }
                finish(job, i, sums);
            }
        }
    }

    /// Writes the sums of a row of W.
    ///
    /// # Safety
    /// See [`Job::run`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn finish<const M: usize>(job: &Job<'_>, i: usize, sums: Sums<M>) {
        // SAFETY: passed on to the caller.
        unsafe {
            for (j, [even, odd]) in sums.into_iter().enumerate() {
                *job.out.0.add(i * job.out.1 + j) = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
            }
        }
    }

    /// The half-precision number at `p`, in all lanes.
    ///
    /// # Safety
    /// Two bytes are readable there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn half(p: *const u8) -> __m512 {
        // SAFETY: passed on to the caller.
        _mm512_cvtph_ps(_mm256_set1_epi16(unsafe { p.cast::<i16>().read_unaligned() }))
    }

    /// Sixteen bytes as numbers.
    ///
    /// # Safety
    /// They are readable at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn bytes(p: *const u8) -> __m512i {
        // SAFETY: passed on to the caller.
        _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(p.cast()) })
    }

    /// `from`, `from + 1`, … as floats.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn count(from: i32) -> __m512 {
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm512_cvtepi32_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(from)))
    }

    macro_rules! format {
        ($name:ident, $len:literal, $bytes:literal, $has_halves:literal, |$p:ident, $halves:tt, $each:ident| $body:block) => {
            struct $name;
            impl Format for $name {
                const LEN: usize = $len;
                const BYTES: usize = $bytes;
                const HALVES: bool = $has_halves;
                #[inline]
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                unsafe fn block($p: *const u8, $halves: &[f32; 4], mut $each: impl FnMut(usize, __m512)) {
                    // SAFETY: the caller has a whole block at the pointer.
                    unsafe { $body }
                }
            }
        };
    }

    format!(F32, 32, 128, false, |p, _, each| {
        for k in 0..2 {
            each(k, _mm512_loadu_ps(p.cast::<f32>().add(16 * k)));
        }
    });

    format!(F16, 32, 64, false, |p, _, each| {
        for k in 0..2 {
            each(k, _mm512_cvtph_ps(_mm256_loadu_si256(p.add(32 * k).cast())));
        }
    });

    format!(BF16, 32, 64, false, |p, _, each| {
        for k in 0..2 {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.add(32 * k).cast()));
            each(k, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)));
        }
    });

    format!(Q4_0, 32, 18, true, |p, [d, ..], each| {
        let table = _mm512_mul_ps(count(-8), _mm512_set1_ps(*d));
        let q = bytes(p.add(2));
        // A lookup takes the low four bits of each word.
        each(0, _mm512_permutexvar_ps(q, table));
        each(1, _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(q), table));
    });

    format!(Q4_1, 32, 20, true, |p, [d, m, ..], each| {
        let table = _mm512_add_ps(_mm512_mul_ps(count(0), _mm512_set1_ps(*d)), _mm512_set1_ps(*m));
        let q = bytes(p.add(4));
        each(0, _mm512_permutexvar_ps(q, table));
        each(1, _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(q), table));
    });

    /// Looks up thirty-two values by four bits of `q` and a fifth from the bits of `high`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn five_bits(q: __m512i, high: [__mmask16; 2], [low, up]: [__m512; 2]) -> [__m512; 2] {
        let fifth = _mm512_set1_epi32(16);
        [q, _mm512_srli_epi32::<4>(q)]
            .map(|q| _mm512_and_si512(q, _mm512_set1_epi32(15)))
            .into_iter()
            .zip(high)
            .fold(([_mm512_setzero_ps(); 2], 0), |(mut out, k), (q, high)| {
                let index = _mm512_mask_or_epi32(q, high, q, fifth);
                out[k] = _mm512_permutex2var_ps(low, index, up);
                (out, k + 1)
            })
            .0
    }

    format!(Q5_0, 32, 22, true, |p, [d, ..], each| {
        let d = _mm512_set1_ps(*d);
        let high = p.add(2).cast::<u32>().read_unaligned();
        let tables = [_mm512_mul_ps(count(-16), d), _mm512_mul_ps(count(0), d)];
        let [a, b] = five_bits(bytes(p.add(6)), [high as u16, (high >> 16) as u16], tables);
        each(0, a);
        each(1, b);
    });

    format!(Q5_1, 32, 24, true, |p, [d, m, ..], each| {
        let (d, m) = (_mm512_set1_ps(*d), _mm512_set1_ps(*m));
        let high = p.add(4).cast::<u32>().read_unaligned();
        let tables = [count(0), count(16)].map(|count| _mm512_add_ps(_mm512_mul_ps(count, d), m));
        let [a, b] = five_bits(bytes(p.add(8)), [high as u16, (high >> 16) as u16], tables);
        each(0, a);
        each(1, b);
    });

    format!(Q8_0, 32, 34, true, |p, [d, ..], each| {
        let d = _mm512_set1_ps(*d);
        for k in 0..2 {
            let q = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(2 + 16 * k).cast()));
            each(k, _mm512_mul_ps(_mm512_cvtepi32_ps(q), d));
        }
    });

    /// `d scale` and `dmin min` of the eight sub-blocks of Q4_K and Q5_K.
    ///
    /// # Safety
    /// A whole block is readable at `p`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,f16c")]
    unsafe fn scales(p: *const u8, d: f32, dmin: f32) -> ([f32; 8], [f32; 8]) {
        // SAFETY: the caller has a whole block at the pointer: two halves, then twelve bytes.
        let (scale, min) = unsafe { sub_blocks(p.add(4)) };
        let eight = |bytes: u64, d: f32| {
            let values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
            let mut out = [0f32; 8];
            // SAFETY: `out` is eight values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(_mm256_set1_ps(d), values)) };
            out
        };
        (eight(scale, d), eight(min, dmin))
    }

    format!(Q4K, 256, 144, true, |p, [d, m, ..], each| {
        let (scale, min) = scales(p, *d, *m);
        for i in 0..4 {
            let table =
                |s: usize| _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale[s]), count(0)), _mm512_set1_ps(min[s]));
            let (low, high) = (table(2 * i), table(2 * i + 1));
            let q = [0, 16].map(|k| bytes(p.add(16 + 32 * i + k)));
            each(4 * i, _mm512_permutexvar_ps(q[0], low));
            each(4 * i + 1, _mm512_permutexvar_ps(q[1], low));
            each(4 * i + 2, _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(q[0]), high));
            each(4 * i + 3, _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(q[1]), high));
        }
    });

    format!(Q5K, 256, 176, true, |p, [d, m, ..], each| {
        let (scale, min) = scales(p, *d, *m);
        let fifths = [0, 16].map(|k| bytes(p.add(16 + k)));
        for i in 0..4 {
            for half in 0..2 {
                let s = 2 * i + half;
                let (d, m) = (_mm512_set1_ps(scale[s]), _mm512_set1_ps(min[s]));
                let tables = [count(0), count(16)].map(|count| _mm512_sub_ps(_mm512_mul_ps(d, count), m));
                for (k, fifths) in fifths.iter().enumerate() {
                    let q = bytes(p.add(48 + 32 * i + 16 * k));
                    let q = if half == 0 { q } else { _mm512_srli_epi32::<4>(q) };
                    let q = _mm512_and_si512(q, _mm512_set1_epi32(15));
                    let high = _mm512_test_epi32_mask(*fifths, _mm512_set1_epi32(1 << s));
                    let index = _mm512_mask_or_epi32(q, high, q, _mm512_set1_epi32(16));
                    each(2 * s + k, _mm512_permutex2var_ps(tables[0], index, tables[1]));
                }
            }
        }
    });

    format!(Q6K, 256, 210, false, |p, _, each| {
        let d = half(p.add(208));
        // Sixteen scales, times d.
        let signed = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(192).cast()));
        let mut scale = [0f32; 16];
        _mm512_storeu_ps(scale.as_mut_ptr(), _mm512_mul_ps(d, _mm512_cvtepi32_ps(signed)));
        for half in 0..2 {
            let low = [0, 16, 32, 48].map(|at| bytes(p.add(64 * half + at)));
            let high = [0, 16].map(|at| bytes(p.add(128 + 32 * half + at)));
            for run in 0..8 {
                let (quarter, part) = (run / 2, run % 2);
                let low = low[2 * (quarter % 2) + part];
                let low = if quarter < 2 { low } else { _mm512_srli_epi32::<4>(low) };
                let low = _mm512_and_si512(low, _mm512_set1_epi32(15));
                let high = _mm512_srlv_epi32(high[part], _mm512_set1_epi32(2 * quarter as i32));
                let high = _mm512_slli_epi32::<4>(_mm512_and_si512(high, _mm512_set1_epi32(3)));
                let q = _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(32));
                let scale = _mm512_set1_ps(scale[8 * half + run]);
                each(8 * half + run, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(q)));
            }
        }
    });

    /// Four-bit indices into a code book, in blocks of whole lanes that begin with every row.
    ///
    /// # Safety
    /// See [`Job::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn nibbles<const M: usize>(job: &Job<'_>, coded: &Coded<'_>, levels: &[f32; 16], scratch: &mut Vec<f32>) {
        let len = coded.block_len();
        let blocks = job.w.cols / len;
        let (x, step) = job.x;
        // SAFETY: `levels` is sixteen values.
        let levels = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
        let scales = grown(scratch, blocks);
        for (i, row) in job.rows.clone().enumerate() {
            coded.scales(row * blocks, scales);
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            // SAFETY: a row is `blocks` blocks of `len / 2` bytes, whose rows follow each other.
            unsafe {
                for (block, scale) in scales.iter().enumerate() {
                    let table = _mm512_mul_ps(levels, _mm512_set1_ps(*scale));
                    let codes = job.w.bytes.as_ptr().add((row * blocks + block) * (len / 2));
                    let value = |k: usize| {
                        let pairs = codes.add(8 * k).cast::<i64>().read_unaligned();
                        let pairs = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(pairs));
                        // A byte's upper half goes to the lower of two words. A lookup takes the low four bits of each.
                        let index = _mm512_or_si512(_mm512_srli_epi64::<4>(pairs), _mm512_slli_epi64::<32>(pairs));
                        _mm512_permutexvar_ps(index, table)
                    };
                    // By twos, so that it is known beforehand to which sums each is added: they stay in registers.
                    for k in (0..len / 16).step_by(2) {
                        let at = block * (len / LANES) + k / 2;
                        sixteen(value(k), 2 * at, x, step, &mut sums);
                        sixteen(value(k + 1), 2 * at + 1, x, step, &mut sums);
                    }
                }
                finish(job, i, sums);
            }
        }
    }

    /// Eight bits a value, `(index - 127) · scale / 127`, a scale for each row.
    ///
    /// # Safety
    /// See [`Job::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn linear<const M: usize>(job: &Job<'_>, coded: &Coded<'_>) {
        let cols = job.w.cols;
        let (x, step) = job.x;
        for (i, row) in job.rows.clone().enumerate() {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            let scale = _mm512_set1_ps(coded.scale(row));
            // SAFETY: a row is `cols` bytes, a multiple of 32.
            unsafe {
                let codes = job.w.bytes.as_ptr().add(row * cols);
                let value = |k: usize| {
                    let q = _mm512_min_epi32(bytes(codes.add(16 * k)), _mm512_set1_epi32(254));
                    let level = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(127)));
                    _mm512_mul_ps(_mm512_mul_ps(level, scale), _mm512_set1_ps(1.0 / 127.0))
                };
                // By twos, as above.
                for pair in 0..cols / LANES {
                    sixteen(value(2 * pair), 2 * pair, x, step, &mut sums);
                    sixteen(value(2 * pair + 1), 2 * pair + 1, x, step, &mut sums);
                }
                finish(job, i, sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::with_isa;
    use crate::storage::codec::{Codec, encode};
    use crate::{Encoded, RowOrder, Storage, Stream};

    /// x padded.
    pub(super) fn padded(values: &[f32], m: usize, k: usize) -> Vec<f32> {
        let step = FewRows::padded(k);
        let mut out = vec![0.0; m * step];
        for i in 0..m {
            out[i * step..i * step + k].copy_from_slice(&values[i * k..(i + 1) * k]);
        }
        out
    }

    pub(super) fn random(stream: &mut Stream, n: usize) -> Vec<f32> {
        (0..n).map(|_| stream.normal() as f32).collect()
    }

    pub(super) fn isas() -> impl Iterator<Item = Isa> {
        Isa::tested().into_iter()
    }

    /// Holds the product with `w` to that with its values as f32 bit by bit, to f64 within a bound, and its rows to those of a
    /// call of their own.
    fn check(w: &Matrix, label: &str) {
        let (n, k) = (w.rows, w.cols);
        let mut decoded = vec![0f32; n * k];
        w.decode_rows(0..n, &mut decoded);
        let bytes: Vec<u8> = decoded.iter().flat_map(|value| value.to_le_bytes()).collect();
        let floats = Matrix::new(Storage::F32, &bytes, n, k, RowOrder::Natural).unwrap();
        let mut stream = Stream::new(5, 1);
        let m = 6;
        let x = random(&mut stream, m * k);
        let x_padded = padded(&x, m, k);
        for isa in isas() {
            let product = |w: &Matrix, rows: std::ops::Range<usize>, of: std::ops::Range<usize>| {
                let step = FewRows::padded(k);
                let mut out = vec![f32::NAN; rows.len() * of.len()];
                let few = FewRows { values: &x_padded[of.start * step..of.end * step], step, rounded: None };
                with_isa(isa, || gemv(few, w, rows, &mut out));
                out
            };
            let all = product(w, 0..n, 0..m);
            assert_eq!(all, product(&floats, 0..n, 0..m), "{label}, {isa:?}: differs from its values");
            for j in 0..m {
                let alone: Vec<f32> = (0..n).flat_map(|row| product(w, row..row + 1, j..j + 1)).collect();
                let of_all: Vec<f32> = all.iter().skip(j).step_by(m).copied().collect();
                assert_eq!(alone, of_all, "{label}, {isa:?}: row {j} alone");
            }
            for (i, got) in all.iter().enumerate() {
                let (row, j) = (i / m, i % m);
                let products = x[j * k..(j + 1) * k].iter().zip(&decoded[row * k..(row + 1) * k]);
                let products: Vec<f64> = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).collect();
                let size: f64 = products.iter().map(|p| p.abs()).sum();
                let error = (f64::from(*got) - products.iter().sum::<f64>()).abs();
                assert!(error <= size * 40.0 * f64::from(f32::EPSILON) / 2.0, "{label}, {isa:?}: off by {error:e}");
            }
        }
    }

    /// Every block format, and its name in `tests/fixtures/ggml`.
    pub(super) const BLOCKS: [(Storage, &str); 8] = [
        (Storage::Q4_0, "q4_0"),
        (Storage::Q4_1, "q4_1"),
        (Storage::Q5_0, "q5_0"),
        (Storage::Q5_1, "q5_1"),
        (Storage::Q8_0, "q8_0"),
        (Storage::Q4K, "q4_k"),
        (Storage::Q5K, "q5_k"),
        (Storage::Q6K, "q6_k"),
    ];

    /// Rows of two blocks that ggml wrote or that are random bytes, how many, and their columns. Those with a scale that is no
    /// number are left out: their sums are none either.
    pub(super) fn ggml(storage: Storage, name: &str) -> (Vec<u8>, usize, usize) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/ggml/");
        let file = std::fs::read(format!("{path}{name}.bin")).unwrap();
        let size = u32::from_le_bytes(file[..4].try_into().unwrap()) as usize;
        let cols = 2 * storage.block_len();
        let row_bytes = storage.row_bytes(cols).unwrap();
        let finite = file[8..8 + size].chunks_exact(row_bytes).filter(|row| {
            let mut out = vec![0f32; cols];
            crate::storage::rows::decode_row(storage, row, &mut out);
            out.iter().all(|value| value.abs() < 1e30)
        });
        let bytes: Vec<u8> = finite.flatten().copied().collect();
        let rows = bytes.len() / row_bytes;
        assert!(rows > 0);
        (bytes, rows, cols)
    }

    #[test]
    fn a_few_rows_are_multiplied_by_the_values_of_every_block_format() {
        for (storage, name) in BLOCKS {
            let (bytes, rows_left, cols) = ggml(storage, name);
            let row_bytes = bytes.len() / rows_left;
            let w = Matrix::new(storage, &bytes, rows_left, cols, RowOrder::Natural).unwrap();
            check(&w, name);
            let even = rows_left / 2 * 2;
            if even > 0 {
                let order = RowOrder::Interleaved { head_dim: even };
                let w = Matrix::new(storage, &bytes[..even * row_bytes], even, cols, order).unwrap();
                check(&w, "rows in another order");
            }
        }
    }

    #[test]
    fn and_by_floats_and_codes_of_any_width() {
        let mut stream = Stream::new(3, 1);
        for k in [1, 31, 32, 33, 48, 64, 100, 576] {
            let n = 5;
            let values = random(&mut stream, n * k);
            let f32_bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let f16: Vec<u8> = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            let bf16: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            for (storage, bytes) in [(Storage::F32, &f32_bytes), (Storage::F16, &f16), (Storage::BF16, &bf16)] {
                check(
                    &Matrix::new(storage, bytes, n, k, RowOrder::Natural).unwrap(),
                    &format!("{storage:?}, {k} columns"),
                );
            }
            let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&values[rows.start * k..rows.end * k]);
            };
            for codec in [Codec::nf4(), Codec::int8()] {
                let Encoded { codes, scales } = encode(&codec, n, k, &read).unwrap();
                check(&Matrix::coded(&codec, &codes, &scales, n, k).unwrap(), &format!("{}, {k} columns", codec.name));
            }
        }
    }

    #[test]
    #[should_panic(expected = "of 1 x 4 for 1 rows of 32")]
    fn rows_that_there_are_not_are_refused() {
        let w = Matrix::new(Storage::F32, &[0; 16], 1, 4, RowOrder::Natural).unwrap();
        gemv(FewRows { values: &[0.0; 32], step: 32, rounded: None }, &w, 0..2, &mut [0.0; 2]);
    }
}
