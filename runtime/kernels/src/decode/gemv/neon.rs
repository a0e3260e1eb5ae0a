//! AArch64: weights stored as floats, decoded in registers of 128 bits, and others as the floats that they were decoded to: the very products
//! and sums of the other processors with fused multiply-adds, see [`super`].

use super::{FewRows, Job, LANES};
use crate::neon::*;
use crate::storage::Storage;
use crate::storage::rows::decode_row;

const WIDTH: usize = 4;

/// Floats as they are stored.
trait Floats {
    const BYTES: usize;
    /// Eight values.
    ///
    /// # Safety
    /// They are readable at `p`.
    unsafe fn eight(p: *const u8) -> [float32x4_t; 2];
}

struct F32;
struct F16;
struct BF16;

impl Floats for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: passed on to the caller; so below.
        unsafe { [vld1q_f32(p.cast()), vld1q_f32(p.cast::<f32>().add(WIDTH))] }
    }
}

impl Floats for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: as above.
        unsafe { [widen_halves(vld1_u16(p.cast())), widen_halves(vld1_u16(p.cast::<u16>().add(WIDTH)))] }
    }
}

impl Floats for BF16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn eight(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: as above.
        let halves = unsafe { vld1q_u16(p.cast()) };
        let (low, high) = (vshll_n_u16::<16>(vget_low_u16(halves)), vshll_high_n_u16::<16>(halves));
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}

/// Computes a job, if its weight is stored as floats.
///
/// # Safety
/// See [`Job::run`].
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
    debug_assert!(FewRows::padded(cols) <= step);
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `cols` values; a row of x is as long, padded.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * cols * F::BYTES);
            let mut last = [0f32; LANES];
            if rest > 0 {
                let bytes = std::slice::from_raw_parts(w.add(turns * LANES * F::BYTES), rest * F::BYTES);
                decode_row(job.w.storage, bytes, &mut last[..rest]);
            }
            let sums = lanes::<F, M>((w, turns), &last[..if rest > 0 { LANES } else { 0 }], (x, step));
            for (j, sums) in sums.into_iter().enumerate() {
                *job.out.0.add(i * job.out.1 + j) = super::fold(sums);
            }
        }
    }
}

/// Products of W's `turns` times [`LANES`] values, and of some that follow, with M rows of x, in their lanes.
///
/// # Safety
/// They are readable on both sides.
#[inline(always)]
unsafe fn lanes<F: Floats, const M: usize>(
    (w, turns): (*const u8, usize),
    last: &[f32],
    (x, step): (*const f32, usize),
) -> [[f32; LANES]; M] {
    const AT_ONCE: usize = 2 * WIDTH;
    let mut out = [[0f32; LANES]; M];
    // Half of the lanes at a time: all of them of four rows would be more than the registers.
    for half in 0..2 {
        let mut sums = [[[vdupq_n_f32(0.0); 2]; 2]; M];
        let from = half * LANES / 2;
        // SAFETY: passed on to the caller.
        unsafe {
            for turn in 0..turns {
                for part in 0..2 {
                    let at = turn * LANES + from + part * AT_ONCE;
                    add(F::eight(w.add(at * F::BYTES)), x.add(at), step, part, &mut sums);
                }
            }
            if let Some(last) = last.first_chunk::<LANES>() {
                for part in 0..2 {
                    let at = from + part * AT_ONCE;
                    add(F32::eight(last.as_ptr().add(at).cast()), x.add(turns * LANES + at), step, part, &mut sums);
                }
            }
            for (out, sums) in out.iter_mut().zip(sums) {
                for (v, sum) in sums.as_flattened().iter().enumerate() {
                    vst1q_f32(out.as_mut_ptr().add(from + v * WIDTH), *sum);
                }
            }
        }
    }
    out
}

/// Adds the products of eight values with M rows of x.
///
/// # Safety
/// Each row of x has eight values there.
#[inline(always)]
unsafe fn add<const M: usize>(
    w: [float32x4_t; 2],
    x: *const f32,
    step: usize,
    part: usize,
    sums: &mut [[[float32x4_t; 2]; 2]; M],
) {
    for (j, sums) in sums.iter_mut().enumerate() {
        for (v, (sum, w)) in sums[part].iter_mut().zip(w).enumerate() {
            // SAFETY: passed on to the caller.
            *sum = vfmaq_f32(*sum, w, unsafe { vld1q_f32(x.add(j * step + v * WIDTH)) });
        }
    }
}

/// See [`super::add`], for sums that are zero.
///
/// # Safety
/// See there.
pub(super) unsafe fn products<const M: usize>(w: &[f32], x: *const f32, step: usize) -> [[f32; LANES]; M] {
    // SAFETY: passed on to the caller; `w` is whole turns.
    unsafe { lanes::<F32, M>((w.as_ptr().cast(), w.len() / LANES), &[], (x, step)) }
}
