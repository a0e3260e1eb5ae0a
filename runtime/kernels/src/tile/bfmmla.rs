//! Tiles of bf16 on AArch64 by `bfmmla`, which multiplies two rows of A by two columns of B, four values of each at once: two words of the
//! sum.
//!
//! A panel stays as it is packed: vectors of the words k and k + 1 of four columns, zipped, are two pairs of columns. A is read where it
//! lies, two words of each of two rows.
//!
//! Where steps of two words begin depends on the segments alone, and the word that the last step of a segment lacks is zeros; an element of
//! a product is computed by itself. So a row's sums depend on its row of A and on B alone.

use half::bf16;

use super::lanes::finish_row;
use super::neon::Neon;
use super::operands::{PANEL, SEGMENTS_MAX, Segment, Store};
use super::{COPIED_FROM, STRIP, copy_strip, finish};
use crate::buffer::grown;
use crate::neon::*;

/// Rows of the largest tile, in pairs: 32 registers are 16 sums of 2 x 2, 4 pairs of columns and the words that these come from, and a pair
/// of rows.
pub(super) const ROWS: usize = 8;
/// Columns of a vector of f32.
const WIDTH: usize = 4;
/// Columns of the largest tile.
const COLUMNS: usize = 2 * WIDTH;

/// See [`rows`](super::rows).
///
/// # Safety
/// See there; the processor has `bfmmla`.
pub(super) unsafe fn walk<const ALONG_ROWS: bool>(rows: usize, width: usize, segments: &[Segment], store: Store<bf16>) {
    debug_assert!(width <= PANEL && segments.len() <= SEGMENTS_MAX);
    let copied = rows >= COPIED_FROM * ROWS;
    let step = if copied { COLUMNS } else { PANEL };
    STRIP.with_borrow_mut(|copy| {
        for column in (0..width).step_by(COLUMNS) {
            let mut all = [Segment::EMPTY; SEGMENTS_MAX];
            let all = &mut all[..segments.len()];
            for (segment, of_panel) in all.iter_mut().zip(segments) {
                *segment = Segment { b: of_panel.b.wrapping_add(column), ..*of_panel };
            }
            if copied {
                let words: usize = all.iter().map(|segment| segment.words).sum();
                // SAFETY: a panel has the columns of every strip, some of them beyond `width`.
                unsafe { copy_strip(all, COLUMNS, grown(copy, words * COLUMNS)) };
            }
            let columns = COLUMNS.min(width - column);
            for row in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - row);
                let mut here = [Segment::EMPTY; SEGMENTS_MAX];
                let here = &mut here[..segments.len()];
                for (here, segment) in here.iter_mut().zip(all.iter()) {
                    *here = Segment { a: segment.a.wrapping_add(row * segment.row_step), ..*segment };
                }
                let store = store.at(row, column);
                // SAFETY: the tile lies inside what the caller promised, or its output is the buffer below.
                unsafe {
                    if columns.is_multiple_of(WIDTH) {
                        one::<ALONG_ROWS>(count, columns / WIDTH, here, step, store);
                    } else {
                        // Whole vectors into a buffer, and from there the columns that exist.
                        let mut sums = [0f32; ROWS * COLUMNS];
                        let whole = Store::wide(sums.as_mut_ptr(), COLUMNS);
                        one::<ALONG_ROWS>(count, columns.div_ceil(WIDTH), here, step, whole);
                        finish(sums.as_ptr(), COLUMNS, count, columns, store);
                    }
                }
            }
        }
    });
}

/// Calls the tile of this size. # Safety: see [`tile`].
unsafe fn one<const ALONG_ROWS: bool>(
    rows: usize,
    vectors: usize,
    segments: &[Segment],
    step: usize,
    store: Store<bf16>,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match (rows.div_ceil(2), vectors) {
            (1, 1) => tile::<1, 1, ALONG_ROWS>(rows, segments, step, store),
            (2, 1) => tile::<2, 1, ALONG_ROWS>(rows, segments, step, store),
            (3, 1) => tile::<3, 1, ALONG_ROWS>(rows, segments, step, store),
            (_, 1) => tile::<4, 1, ALONG_ROWS>(rows, segments, step, store),
            (1, _) => tile::<1, 2, ALONG_ROWS>(rows, segments, step, store),
            (2, _) => tile::<2, 2, ALONG_ROWS>(rows, segments, step, store),
            (3, _) => tile::<3, 2, ALONG_ROWS>(rows, segments, step, store),
            _ => tile::<4, 2, ALONG_ROWS>(rows, segments, step, store),
        }
    }
}

/// One tile: `rows` rows in `PAIRS` pairs by `VECTORS` times four columns. `step`: words of B from one word of the sum to the next.
///
/// # Safety
/// Every segment has `rows` rows of A and `words * step` words of B readable; the outputs are writable over the tile, and nobody else
/// accesses them meanwhile. The processor has `bfmmla`.
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,bf16"))]
unsafe fn tile<const PAIRS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
    rows: usize,
    segments: &[Segment],
    step: usize,
    store: Store<bf16>,
) {
    let mut sums = [[[vdupq_n_f32(0.0); 2]; VECTORS]; PAIRS];
    for segment in segments {
        let (word_step, words) = (if ALONG_ROWS { segment.word_step } else { size_of::<u32>() }, segment.words);
        // SAFETY: as the caller promised. A pair's second row is the first again where there is no other; its sums go nowhere.
        unsafe {
            let a: [[*const u8; 2]; PAIRS] = std::array::from_fn(|pair| {
                [2 * pair, 2 * pair + 1].map(|row| segment.a.add(row.min(rows - 1) * segment.row_step))
            });
            for k in (0..words / 2 * 2).step_by(2) {
                let b = segment.b.add(k * step);
                let of_b: [[uint32x4_t; 2]; VECTORS] = std::array::from_fn(|v| {
                    let (first, second) = (vld1q_u32(b.add(WIDTH * v)), vld1q_u32(b.add(step + WIDTH * v)));
                    [vzip1q_u32(first, second), vzip2q_u32(first, second)]
                });
                for (a, sums) in a.iter().zip(&mut sums) {
                    let [first, second] = a.map(|row| two::<ALONG_ROWS>(row.add(k * word_step), word_step));
                    multiply(sums, vcombine_u32(first, second), &of_b);
                }
            }
            if !words.is_multiple_of(2) {
                let (k, none) = (words - 1, vdupq_n_u32(0));
                let b = segment.b.add(k * step);
                let of_b: [[uint32x4_t; 2]; VECTORS] = std::array::from_fn(|v| {
                    let last = vld1q_u32(b.add(WIDTH * v));
                    [vzip1q_u32(last, none), vzip2q_u32(last, none)]
                });
                for (a, sums) in a.iter().zip(&mut sums) {
                    let [first, second] = a.map(|row| row.add(k * word_step).cast::<u32>().read_unaligned());
                    multiply(sums, vld1q_u32([first, 0, second, 0].as_ptr()), &of_b);
                }
            }
        }
    }
    // Written out pair by pair: an index that is not a constant would keep all sums in memory.
    macro_rules! pairs {
        ($($pair:literal)*) => {
            // SAFETY: as the caller promised.
            $(if $pair < PAIRS { unsafe { send(sums[$pair % PAIRS], store, 2 * $pair, rows) } })*
        };
    }
    pairs!(0 1 2 3);
}

/// Sends the sums of a pair of rows on their way, the first of which is number `row`.
///
/// # Safety
/// See [`tile`].
#[inline(always)]
unsafe fn send<const VECTORS: usize>(sums: [[float32x4_t; 2]; VECTORS], store: Store<bf16>, row: usize, rows: usize) {
    let halves = sums.map(|[left, right]| (vreinterpretq_u64_f32(left), vreinterpretq_u64_f32(right)));
    let upper = halves.map(|(left, right)| vreinterpretq_f32_u64(vzip1q_u64(left, right)));
    let lower = halves.map(|(left, right)| vreinterpretq_f32_u64(vzip2q_u64(left, right)));
    // SAFETY: as the caller promised.
    unsafe {
        finish_row::<Neon<bf16>, VECTORS>(upper, store, row);
        if row + 1 < rows {
            finish_row::<Neon<bf16>, VECTORS>(lower, store, row + 1);
        }
    }
}

/// Two words of a row of A.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn two<const ALONG_ROWS: bool>(a: *const u8, word_step: usize) -> uint32x2_t {
    // SAFETY: as the caller promised.
    unsafe {
        if ALONG_ROWS {
            let [first, second] = [a, a.add(word_step)].map(|word| word.cast::<u32>().read_unaligned());
            vld1_u32([first, second].as_ptr())
        } else {
            vld1_u32(a.cast())
        }
    }
}

/// Adds the products of a pair of rows to its sums.
///
/// # Safety
/// The processor has `bfmmla`.
#[inline]
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,bf16"))]
unsafe fn multiply<const VECTORS: usize>(
    sums: &mut [[float32x4_t; 2]; VECTORS],
    a: uint32x4_t,
    b: &[[uint32x4_t; 2]; VECTORS],
) {
    for (sums, b) in sums.as_flattened_mut().iter_mut().zip(b.as_flattened()) {
        // SAFETY: as the caller promised.
        *sums = unsafe { bfmmla(*sums, a, *b) };
    }
}

/// `steps` times sixteen products on registers alone: what they sum up to.
///
/// # Safety
/// The processor has `bfmmla`.
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,bf16"))]
pub(super) unsafe fn spin(steps: usize) -> f32 {
    let zeros = vdupq_n_u32(std::hint::black_box(0));
    let mut sums = [vdupq_n_f32(0.0); SPIN];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: as the caller promised.
            *sum = unsafe { bfmmla(*sum, zeros, zeros) };
        }
    }
    sums.into_iter().fold(0.0, |total, sum| total + vaddvq_f32(sum))
}

const SPIN: usize = 16;
/// Operations of one step of [`spin`]: two for each multiply-add.
pub(super) const SPIN_OPERATIONS: usize = SPIN * 2 * 16;
