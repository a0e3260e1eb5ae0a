//! Weights stored as floats, decoded in registers of 256 bits: the very products and sums of the others, see [`super`].

use std::arch::x86_64::*;

use super::ahead::Ahead;
use super::{FewRows, Job, LANES};
use crate::storage::Storage;
use crate::storage::rows::decode_row;

const WIDTH: usize = 8;
const VECTORS: usize = LANES / WIDTH;

/// Floats as they are stored.
trait Floats {
    const BYTES: usize;
    /// Eight values.
    ///
    /// # Safety
    /// They are readable at `p`; called from what has AVX2 and F16C enabled.
    unsafe fn eight(p: *const u8) -> __m256;
}

struct F32;
struct F16;
struct BF16;

impl Floats for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> __m256 {
        // SAFETY: passed on to the caller; so below.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

impl Floats for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
}

/// Computes a job, if its weight is stored as floats.
///
/// # Safety
/// See [`Job::run`]; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<const M: usize>(job: &Job<'_>) -> bool {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.w.storage {
            Storage::F32 => by_rows::<F32, M>(job),
            Storage::F16 => by_rows::<F16, M>(job),
            Storage::BF16 => by_rows::<BF16, M>(job),
            _ => return false,
        }
    }
    true
}

/// # Safety
/// See [`run`].
#[inline(always)]
unsafe fn by_rows<F: Floats, const M: usize>(job: &Job<'_>) {
    let (cols, (x, step)) = (job.w.cols, job.x);
    let (turns, rest) = (cols / LANES, cols % LANES);
    let ahead = Ahead::new();
    debug_assert!(FewRows::padded(cols) <= step);
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `cols` values; a row of x is as long, padded.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * cols * F::BYTES);
            let mut sums = [[_mm256_setzero_ps(); VECTORS]; M];
            for turn in 0..turns {
                let w = w.add(turn * LANES * F::BYTES);
                ahead.of_floats(w, LANES * F::BYTES);
                add::<F, M>(w, x.add(turn * LANES), step, &mut sums);
            }
            if rest > 0 {
                let mut values = [0f32; LANES];
                let bytes = std::slice::from_raw_parts(w.add(turns * LANES * F::BYTES), rest * F::BYTES);
                decode_row(job.w.storage, bytes, &mut values[..rest]);
                add::<F32, M>(values.as_ptr().cast(), x.add(turns * LANES), step, &mut sums);
            }
            for (j, [a, b, c, d]) in sums.into_iter().enumerate() {
                // By halves: of 32 lanes, of 16, of 8, and so on.
                let eight = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                *job.out.0.add(i * job.out.1 + j) = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
            }
        }
    }
}

/// Adds the products of [`LANES`] values with M rows of x.
///
/// # Safety
/// They are readable on both sides; called from what has the instructions enabled.
#[inline(always)]
unsafe fn add<F: Floats, const M: usize>(w: *const u8, x: *const f32, step: usize, sums: &mut [[__m256; VECTORS]; M]) {
    for v in 0..VECTORS {
        // SAFETY: passed on to the caller.
        let w = unsafe { F::eight(w.add(v * WIDTH * F::BYTES)) };
        for (j, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            unsafe { sums[v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.add(j * step + v * WIDTH)), sums[v]) };
        }
    }
}
