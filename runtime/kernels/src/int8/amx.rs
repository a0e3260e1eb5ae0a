//! Sums of groups by AMX: a group is the 64 bytes of a register's row, so one product of registers sums a group of 16 rows and 16 columns. The
//! sums go to the first-level cache and from there, times their scales, to 16 vectors of f32, in the order of other processors: the bits are
//! the same.
//!
//! Putting the scales on takes longer than the product: by the count of instructions some 40 cycles a group for 16, where `vpdpbusd` takes
//! 128. Scales of longer groups would save that and cost exactness.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::{CHUNK, GROUP, PANEL, Rounded, Sums};
use crate::isa::{Isa, per_isa};
use crate::tile::Tiles;

/// Rows and columns of a register of sums, and words of a group.
pub(super) const SIDE: usize = GROUP / 4;
const GROUPS: usize = CHUNK / GROUP;

/// Values of 16 rows for each group of a chunk, or of 16 columns for each of 16 rows.
#[repr(align(64))]
struct Lines<T, const N: usize>([[T; SIDE]; N]);

/// See [`super::rows`]; `at` is the chunk's place in a row of A and `words` its length.
///
/// # Safety
/// See there; the processor has AMX with bytes and AVX-512, and the system lets this process use tiles.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn walk(
    isa: Isa,
    a: &Rounded,
    rows: Range<usize>,
    chunk: usize,
    (at, words): (usize, usize),
    (panel, of_columns): (&[u32], &[[f32; PANEL]]),
    width: usize,
    sums: Sums,
) {
    // A row of A is whole groups, and there are rows beyond the last. Behind the words of a panel lie any, which meet zeros of A.
    let groups = words.div_ceil(SIDE);
    assert!(panel.len() >= groups * SIDE * PANEL, "whole groups of a panel");
    assert!(a.words.len() >= (rows.end + SIDE - 1) * a.step && at + groups * SIDE <= a.step, "whole registers of A");
    // SAFETY: the caller's processor and system.
    let _tiles = unsafe { Tiles::new() };
    let mut scales = Lines([[0f32; SIDE]; GROUPS]);
    let mut starts = Lines([[0i32; SIDE]; GROUPS]);
    let mut out = Lines([[0f32; SIDE]; SIDE]);
    for first in rows.clone().step_by(SIDE) {
        let count = SIDE.min(rows.end - first);
        for r in 0..count {
            let from = (first + r) * a.groups() + chunk * GROUPS;
            for group in 0..groups {
                (scales.0[group][r], starts.0[group][r]) = (a.scales[from + group], a.starts[from + group]);
            }
        }
        for column in (0..width).step_by(SIDE) {
            let columns = SIDE.min(width - column);
            // SAFETY: rows of A and words of B were counted above. Columns have a scale for each group, or none.
            unsafe {
                let left = (a.words.as_ptr().add(first * a.step + at), a.step * size_of::<u32>());
                let right = panel.as_ptr().add(column);
                let of_rows = (&scales.0[..groups], &starts.0[..groups]);
                if of_columns.is_empty() {
                    square::<false>(left, right, of_rows, std::ptr::null(), &mut out);
                } else {
                    let of_columns = of_columns[..groups].as_flattened()[column..].as_ptr();
                    square::<true>(left, right, of_rows, of_columns, &mut out);
                }
            }
            for (r, out) in out.0[..count].iter().enumerate() {
                // SAFETY: the output and the factors are as large as the caller says.
                unsafe {
                    let to = sums.out.add((first + r - rows.start) * sums.step + column);
                    let to = std::slice::from_raw_parts_mut(to, columns);
                    let factors = match sums.factors.is_null() {
                        true => &[][..],
                        false => std::slice::from_raw_parts(sums.factors.add(column), columns),
                    };
                    put(isa, &out[..columns], factors, sums.add, to);
                }
            }
        }
    }
}

per_isa! {
    /// Sends a row's sums on their way.
    fn put(sums: &[f32], factors: &[f32], add: bool, out: &mut [f32]) {
        for (j, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
            let value = factors.get(j).map_or(*sum, |factor| sum * factor);
            *out = if add { *out + value } else { value };
        }
    }
}

/// Sums of 16 rows and columns, a group after the other, each times its scales.
///
/// # Safety
/// A has 16 rows and B as many columns of a panel, of as many groups as rows have scales; columns have a scale for each, [`PANEL`] apart, if
/// they are `SCALED`. Tiles are in use, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn square<const SCALED: bool>(
    (a, a_step): (*const u32, usize),
    b: *const u32,
    (scales, starts): (&[[f32; SIDE]], &[[i32; SIDE]]),
    of_columns: *const f32,
    out: &mut Lines<f32, SIDE>,
) {
    let mut totals = [_mm512_setzero_ps(); SIDE];
    let mut whole = Lines([[0i32; SIDE]; SIDE]);
    for (group, (scales, starts)) in scales.iter().zip(starts).enumerate() {
        // SAFETY: as the caller promised.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                "tileloadd tmm6, [{b}+{b_step}*1]",
                // Values of A are signed, indices unsigned.
                "tdpbsud tmm0, tmm4, tmm6",
                "tilestored [{whole}+{line}*1], tmm0",
                a = in(reg) a.add(group * SIDE),
                a_step = in(reg) a_step,
                b = in(reg) b.add(group * SIDE * PANEL),
                b_step = in(reg) PANEL * size_of::<u32>(),
                whole = in(reg) &raw mut whole,
                line = in(reg) size_of::<[i32; SIDE]>(),
                options(nostack, preserves_flags),
            );
        }
        let of_columns = of_columns.wrapping_add(group * PANEL);
        for (row, total) in totals.iter_mut().enumerate() {
            // SAFETY: a line is a vector, and so are the scales of 16 columns.
            unsafe {
                let sums = _mm512_load_si512((&raw const whole.0[row]).cast());
                let sums = _mm512_add_epi32(sums, _mm512_set1_epi32(starts[row]));
                let scale = _mm512_set1_ps(scales[row]);
                // Not fused, so that every processor comes to the same.
                let scale = if SCALED { _mm512_mul_ps(_mm512_loadu_ps(of_columns), scale) } else { scale };
                *total = _mm512_add_ps(*total, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
            }
        }
    }
    for (out, total) in out.0.iter_mut().zip(totals) {
        // SAFETY: a line is a vector.
        unsafe { _mm512_store_ps(out.as_mut_ptr(), total) };
    }
}
