//! Products in integers with weights of eight bits on a straight line: each group of [`GROUP`] neighbouring values of a row of A is
//! rounded to 255 levels around 0 with a scale of its own, products and sums over a group are exact, and its scale is put on them.
//!
//! `y[i, n] = t[n] Σ_g s[i, g] Σ_{k in g} a[i, k] (index[n, k] - 127)`, forward; backward, where the sum runs over the rows of W, their
//! scales t go into A before it is rounded. Rounding A is what this costs in exactness; after Dettmers et al. 2022,
//! <https://arxiv.org/abs/2208.07339>, section 2. Instead of a separate path for outliers, scales are of groups, so that an outlier
//! takes levels from its neighbours only.
//!
//! Where the processor has VNNI, weights of other storages are rounded as well, see [`weight`], with a scale t[g, n] for each group and
//! column: `y[i, n] = Σ_g s[i, g] t[g, n] Σ_{k in g} a[i, k] (index[n, k] - 127)`, and the same backward.
//!
//! A word holds four values of eight bits where the processor multiplies those (VNNI, and on AArch64 `smmla` or `sdot`), else two of sixteen.
//! Integers are exact, so with weights on a straight line every processor comes to the same result.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod stored;
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
mod weight;

use std::ops::Range;

use crate::buffer::grown;
use crate::element::{Element, eight_bit_scale, nearest_whole};
#[cfg(target_arch = "x86_64")]
use crate::isa::Feature;
use crate::isa::{Int8Unit, Isa, isa, per_isa};
use crate::matmul::Matrix;
use crate::pool::{Shared, for_ranges};
use crate::storage::codec::Coded;
use crate::tile::{COPIED_FROM, PANEL, STRIP, Segment, copy_strip, pack_columns};

/// Values of a row of A that share a scale.
const GROUP: usize = 64;
/// Values of a sum that are packed at once: whole groups.
pub(crate) const CHUNK: usize = 32 * GROUP;
/// The index of 0.
const ZERO: i32 = 127;

/// Rows of A in integers.
pub(crate) struct Rounded {
    /// (m, `step`): four values of eight bits a word, or two of sixteen.
    words: Vec<u32>,
    step: usize,
    /// Of each row and group.
    scales: Vec<f32>,
    /// Of each row and group: the sum of its values, times minus the index of 0.
    starts: Vec<i32>,
    k: usize,
}

impl Rounded {
    fn groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }
}

/// Bytes that `m` rows of k values take in integers.
pub fn rounded_bytes(m: usize, k: usize) -> usize {
    let (step, more) = size(isa(), k);
    size_of::<u32>() * ((m + more) * step + m * 2 * k.div_ceil(GROUP))
}

/// Words of a row of k values in integers, and how many rows of zeros follow the last: AMX takes whole groups of 16 rows.
fn size(isa: Isa, k: usize) -> (usize, usize) {
    match isa.int8_unit() {
        Int8Unit::Amx => (words(isa, k.next_multiple_of(GROUP)), GROUP / 4 - 1),
        _ => (words(isa, k), 0),
    }
}

/// Rounds `m` rows of k values, a multiple of four, `row_step` from one to the next, each first multiplied by its column's factor if there is one.
pub(crate) fn round<E: Element>(
    isa: Isa,
    m: usize,
    k: usize,
    rows_of_a: &[E],
    row_step: usize,
    factors: Option<&[f32]>,
) -> Rounded {
    assert!(k.is_multiple_of(4), "{k} values are no whole words");
    let per_word = if isa.multiplies_bytes() { 4 } else { 2 };
    let ((step, more), groups) = (size(isa, k), k.div_ceil(GROUP));
    let (words, scales, starts) = (vec![0; (m + more) * step], vec![0.0; m * groups], vec![0; m * groups]);
    let mut rounded = Rounded { words, step, scales, starts, k };
    let words = Shared::new(&mut rounded.words);
    let (scales, starts) = (Shared::new(&mut rounded.scales), Shared::new(&mut rounded.starts));
    for_ranges(m, 16, |rows| {
        let mut scratch = vec![0f32; k];
        for i in rows {
            let of_row = i * groups;
            // SAFETY: no two tasks have a row in common.
            let (words, scales, starts) =
                unsafe { (words.slice(i * step, step), scales.slice(of_row, groups), starts.slice(of_row, groups)) };
            let row = &rows_of_a[i * row_step..][..k];
            widen(isa, row, factors.unwrap_or(&[]), &mut scratch);
            // SAFETY: a word is four values of eight bits, or two of sixteen.
            unsafe {
                if per_word == 4 {
                    let values = std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<i8>(), k);
                    round_bytes(isa, &scratch, values, scales, starts);
                } else {
                    let values = std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<i16>(), k);
                    round_row::<i16>(isa, &scratch, values, scales, starts);
                }
            }
        }
    });
    rounded
}

per_isa! {
    /// A row times its columns' factors.
    fn widen<E: Element>(row: &[E], factors: &[f32], out: &mut [f32]) {
        if factors.is_empty() {
            for (out, value) in out.iter_mut().zip(row) {
                *out = value.wide();
            }
        } else {
            for ((out, value), factor) in out.iter_mut().zip(row).zip(factors) {
                *out = value.wide() * factor;
            }
        }
    }
}

/// A value of a word.
trait Value: Copy {
    fn of(value: i32) -> Self;
}

impl Value for i8 {
    #[inline(always)]
    fn of(value: i32) -> i8 {
        value as i8
    }
}

impl Value for i16 {
    #[inline(always)]
    fn of(value: i32) -> i16 {
        value as i16
    }
}

per_isa! {
    /// Whole numbers from -127 to 127, and for each group its scale, NaN if a value is not finite, and where its sums start.
    fn round_row<V: Value>(row: &[f32], out: &mut [V], scales: &mut [f32], starts: &mut [i32]) {
        let groups = row.chunks(GROUP).zip(out.chunks_mut(GROUP)).zip(scales.iter_mut().zip(starts));
        for ((row, out), (scale, start)) in groups {
            round_group(row, out, scale, start);
        }
    }
}

/// See [`round_row`].
#[inline(always)]
fn round_group<V: Value>(row: &[f32], out: &mut [V], scale: &mut f32, start: &mut i32) {
    let inverse;
    (*scale, inverse) = eight_bit_scale(row);
    let mut sum = 0i32;
    for (out, value) in out.iter_mut().zip(row) {
        let whole = nearest_whole(*value, inverse);
        *out = V::of(whole);
        sum = sum.wrapping_add(whole);
    }
    *start = sum.wrapping_mul(-ZERO);
}

/// See [`round_row`], for values of eight bits.
fn round_bytes(isa: Isa, row: &[f32], out: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_bytes_in_512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { vnni::round_row(row, out, scales, starts) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has(Feature::Avx2) {
        // SAFETY: the processor has AVX2.
        return unsafe { avx_vnni::round_row(row, out, scales, starts) };
    }
    round_row::<i8>(isa, row, out, scales, starts);
}

/// Words that a chunk of so many values takes.
pub(crate) fn words(isa: Isa, values: usize) -> usize {
    values / if isa.multiplies_bytes() { 4 } else { 2 }
}

/// A packed chunk's words and, unless they stand for values on one line, the scales of each group's columns.
#[derive(Default)]
pub(crate) struct Packed {
    words: Vec<u32>,
    scales: Vec<[f32; PANEL]>,
    scaled: bool,
    pairs: Vec<u32>,
    #[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
    buffers: weight::Buffers,
}

/// Packs the part `sum` of the sum for rows `columns` of W, forward, or with `backward` for columns of it: words of [`PANEL`] columns
/// beside each other.
pub(crate) fn pack(
    isa: Isa,
    w: &Matrix<'_>,
    backward: bool,
    sum: Range<usize>,
    columns: Range<usize>,
    to: &mut Packed,
) {
    let out = grown(&mut to.words, size(isa, sum.len()).0 * PANEL);
    to.scaled = w.line().is_none();
    if let Some(coded) = w.line() {
        return pack_line(isa, coded, backward, sum, columns, out, &mut to.pairs);
    }
    #[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
    {
        to.scales.resize(sum.len().div_ceil(GROUP), [0.0; PANEL]);
        if backward {
            weight::pack_backward(isa, w, sum, columns, out, &mut to.scales, &mut to.buffers);
        } else {
            weight::pack_forward(isa, w, sum, columns, out, &mut to.scales, &mut to.buffers);
        }
    }
    #[cfg(not(any(test, target_arch = "x86_64", target_arch = "aarch64")))]
    unreachable!("a product in integers with another storage");
}

/// See [`pack`], for eight bits on a straight line.
fn pack_line(
    isa: Isa,
    coded: &Coded<'_>,
    backward: bool,
    sum: Range<usize>,
    columns: Range<usize>,
    out: &mut [u32],
    scratch: &mut Vec<u32>,
) {
    let (codes, cols) = coded.indices();
    let count = words(isa, sum.len());
    let out = &mut out[..count * PANEL];
    if backward {
        let row = |n: usize| &codes[(sum.start + n) * cols + columns.start..][..columns.len()];
        for (word, out) in out.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            if isa.multiplies_bytes() {
                let rows = [0, 1, 2, 3].map(|i| row(4 * word + i));
                #[cfg(target_arch = "x86_64")]
                if let ([Some(a), Some(b), Some(c), Some(d)], true) =
                    (rows.map(|row| row.first_chunk::<PANEL>()), isa.has(Feature::Avx2))
                {
                    // SAFETY: the processor has AVX2, and what multiplies in 512 bits the other instructions of AVX-512.
                    unsafe {
                        match isa.multiplies_bytes_in_512() {
                            true => vnni::weave([a, b, c, d], out),
                            false => avx_vnni::weave([a, b, c, d], out),
                        }
                    }
                    continue;
                }
                weave_fours(isa, rows, out);
            } else {
                weave_pairs(isa, [0, 1].map(|i| row(2 * word + i)), out);
            }
        }
        if isa.multiplies_signed_bytes() {
            center(isa, out);
        }
        return;
    }
    let row = |j: usize| &codes[(columns.start + j) * cols + sum.start..][..sum.len()];
    let mut pointers = [std::ptr::null(); PANEL];
    if isa.multiplies_bytes() {
        for (j, pointer) in pointers[..columns.len()].iter_mut().enumerate() {
            *pointer = row(j).as_ptr();
        }
    } else {
        let pairs = grown(scratch, columns.len() * count);
        for (j, pairs) in pairs.chunks_exact_mut(count).enumerate() {
            for (pair, index) in pairs.iter_mut().zip(row(j).as_chunks::<2>().0) {
                *pair = pair_of(*index);
            }
            pointers[j] = pairs.as_ptr().cast();
        }
    }
    // SAFETY: each pointer is to `count` words.
    unsafe { pack_columns(isa, &pointers[..columns.len()], count, out) };
    if isa.multiplies_signed_bytes() {
        center(isa, out);
    } else if isa.multiplies_bytes() {
        clamp(isa, out);
    }
}

/// Two indices as words of sixteen bits.
#[inline(always)]
fn pair_of([low, high]: [u8; 2]) -> u32 {
    u32::from(low.min(254)) | u32::from(high.min(254)) << 16
}

per_isa! {
    /// Indices beyond the last level stand for it.
    fn clamp(words: &mut [u32]) {
        for word in words.iter_mut() {
            *word = u32::from_le_bytes(word.to_le_bytes().map(|index| index.min(254)));
        }
    }
}

per_isa! {
    /// The whole numbers that indices stand for.
    fn center(words: &mut [u32]) {
        for word in words.iter_mut() {
            *word = u32::from_le_bytes(word.to_le_bytes().map(|index| index.min(254).wrapping_sub(ZERO as u8)));
        }
    }
}

per_isa! {
    fn weave_fours(rows: [&[u8]; 4], out: &mut [u32; PANEL]) {
        let n = rows[0].len();
        for j in 0..n {
            out[j] = u32::from_le_bytes([0, 1, 2, 3].map(|i: usize| rows[i][j].min(254)));
        }
        out[n..].fill(0);
    }
}

per_isa! {
    fn weave_pairs(rows: [&[u8]; 2], out: &mut [u32; PANEL]) {
        let n = rows[0].len();
        for j in 0..n {
            out[j] = pair_of([rows[0][j], rows[1][j]]);
        }
        out[n..].fill(0);
    }
}

/// Where sums go: rows of f32, `step` apart.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub out: *mut f32,
    pub step: usize,
    /// Whether they are added to what is there.
    pub add: bool,
    /// A factor for each column, or null.
    pub factors: *const f32,
}

/// Multiplies rows of A by a packed chunk, number `chunk` of the sum: `width` columns.
///
/// # Safety
/// The output is writable over rows x `width`, `factors` readable over `width`, and what is packed is the chunk.
pub(crate) unsafe fn rows(
    isa: Isa,
    a: &Rounded,
    rows: Range<usize>,
    chunk: usize,
    packed: &Packed,
    width: usize,
    sums: Sums,
) {
    let panel = &packed.words[..];
    let count = words(isa, CHUNK.min(a.k - chunk * CHUNK));
    assert!(
        rows.end * a.groups() <= a.scales.len() && panel.len() >= count * PANEL && width <= PANEL,
        "{rows:?} by {width}"
    );
    let at = chunk * words(isa, CHUNK);
    let scales = if packed.scaled { &packed.scales[..] } else { &[] };
    assert!(
        !packed.scaled || isa.multiplies_bytes() && scales.len() * words(isa, GROUP) >= count,
        "scales of each group"
    );
    let panel = (panel, scales);
    // SAFETY: the set has no more than the processor, and the rest is passed on to the caller.
    unsafe {
        match isa.int8_unit() {
            #[cfg(target_arch = "x86_64")]
            Int8Unit::Amx => amx::walk(isa, a, rows, chunk, (at, count), panel, width, sums),
            #[cfg(target_arch = "x86_64")]
            Int8Unit::Avx512Vnni => walk::<vnni::Vnni>(isa, a, rows, chunk, (at, count), panel, width, sums),
            #[cfg(target_arch = "x86_64")]
            Int8Unit::AvxVnni => walk::<avx_vnni::AvxVnni>(isa, a, rows, chunk, (at, count), panel, width, sums),
            #[cfg(target_arch = "x86_64")]
            Int8Unit::Avx2 => walk::<pairs::Avx2>(isa, a, rows, chunk, (at, count), panel, width, sums),
            #[cfg(any(test, target_arch = "aarch64"))]
            Int8Unit::Smmla => walk::<neon::Smmla>(isa, a, rows, chunk, (at, count), panel, width, sums),
            #[cfg(any(test, target_arch = "aarch64"))]
            Int8Unit::Sdot => walk::<neon::Sdot>(isa, a, rows, chunk, (at, count), panel, width, sums),
            _ => walk::<Portable>(isa, a, rows, chunk, (at, count), panel, width, sums),
        }
    }
}

/// Rows and vectors of the largest tile.
const ROWS: usize = 6;
const VECTORS: usize = 4;

/// Rows of A of a tile.
struct Rows {
    /// Their words, scales and starts.
    at: [(*const u32, *const f32, *const i32); ROWS],
    /// Words of a group.
    group: usize,
}

/// Columns of a tile.
#[derive(Clone, Copy)]
struct Right {
    words: *const u32,
    /// Words from one of a column to its next.
    step: usize,
    /// Of each group [`PANEL`] values, or null.
    scales: *const f32,
}

/// Sums of a tile.
type Tile = [[f32; VECTORS * 16]; ROWS];

/// Where sums of a tile lie: no vector of them is in two lines of the cache, each of which is written and read again for every group.
#[repr(C, align(64))]
struct Aligned(Tile);

/// Vectors of one processor.
///
/// # Safety
/// Functions run only where the processor has the instructions.
trait Lanes {
    const WIDTH: usize;
    /// Rows and vectors of a tile, as many as registers hold.
    const ROWS: usize;
    const VECTORS: usize;
    /// Sums of a tile of `R` rows of A and columns of B from `b` on, a group after the other.
    ///
    /// # Safety
    /// Each row of A has `words` words and a scale and a start for each group of them, and B as many words times its step; scales of B
    /// there are where [`Isa::multiplies_bytes`] alone.
    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile);
}

/// # Safety
/// See [`rows`]; the processor has the instructions of `L`.
#[allow(clippy::too_many_arguments)]
unsafe fn walk<L: Lanes>(
    isa: Isa,
    a: &Rounded,
    rows: Range<usize>,
    chunk: usize,
    (at, words): (usize, usize),
    (panel, scales): (&[u32], &[[f32; PANEL]]),
    width: usize,
    sums: Sums,
) {
    let (strip, first_group) = (L::WIDTH * L::VECTORS, chunk * (CHUNK / GROUP));
    let copied = strip < PANEL && rows.len() >= COPIED_FROM * L::ROWS;
    let step = if copied { strip } else { PANEL };
    let mut aligned = Aligned([[0.0; VECTORS * 16]; ROWS]);
    let out = &mut aligned.0;
    STRIP.with_borrow_mut(|copy| {
        for column in (0..width).step_by(strip) {
            let columns = strip.min(width - column);
            // SAFETY: the panel is `words` times `PANEL` words, as the caller saw.
            let b = unsafe { panel.as_ptr().add(column) };
            let mut b = Segment { words, b, ..Segment::EMPTY };
            if copied {
                // SAFETY: as above.
                unsafe { copy_strip(std::slice::from_mut(&mut b), strip, grown(copy, words * strip)) };
            }
            let scales = if scales.is_empty() { std::ptr::null() } else { scales.as_flattened()[column..].as_ptr() };
            let b = Right { words: b.b, step, scales };
            for first in rows.clone().step_by(L::ROWS) {
                let count = L::ROWS.min(rows.end - first);
                // Rows beyond the last are the last again.
                let of_rows = std::array::from_fn(|r| {
                    let row = first + r.min(count - 1);
                    let group = row * a.groups() + first_group;
                    let words = a.words[row * a.step + at..][..words].as_ptr();
                    (words, a.scales[group..].as_ptr(), a.starts[group..].as_ptr())
                });
                let of_rows = Rows { at: of_rows, group: self::words(isa, GROUP) };
                // SAFETY: rows of A were sliced, and B has so many words `step` apart.
                unsafe {
                    match count {
                        1 => L::tile::<1>(&of_rows, b, words, out),
                        2 => L::tile::<2>(&of_rows, b, words, out),
                        3 => L::tile::<3>(&of_rows, b, words, out),
                        4 => L::tile::<4>(&of_rows, b, words, out),
                        5 => L::tile::<5>(&of_rows, b, words, out),
                        _ => L::tile::<6>(&of_rows, b, words, out),
                    }
                }
                // SAFETY: the output and the factors are as large as the caller says.
                unsafe {
                    let to = sums.out.add((first - rows.start) * sums.step + column);
                    let factors = match sums.factors.is_null() {
                        true => &[][..],
                        false => std::slice::from_raw_parts(sums.factors.add(column), columns),
                    };
                    finish(isa, &out[..count], columns, factors, sums.add, to, sums.step);
                }
            }
        }
    });
}

per_isa! {
    /// Sends the sums of some rows on their way: the output is writable over them, `step` apart, by so many columns.
    fn finish(
        sums: &[[f32; VECTORS * 16]],
        columns: usize,
        factors: &[f32],
        add: bool,
        out: *mut f32,
        step: usize,
    ) {
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: as the caller promised.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(r * step), columns) };
            if factors.is_empty() {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = if add { *out + sum } else { *sum };
                }
            } else {
                for ((out, sum), factor) in out.iter_mut().zip(sums).zip(factors) {
                    let value = sum * factor;
                    *out = if add { *out + value } else { value };
                }
            }
        }
    }
}

/// Plain Rust, over pairs of sixteen bits.
struct Portable;

impl Lanes for Portable {
    const WIDTH: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 4;

    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        let Right { words: b, step, .. } = b;
        for ((row, scales, starts), out) in a.at.iter().zip(&mut out[..R.min(Self::ROWS)]) {
            let mut totals = [0f32; 16];
            for (group, from) in (0..words).step_by(a.group).enumerate() {
                let mut sums = [0i32; 16];
                for k in from..words.min(from + a.group) {
                    // SAFETY: as the trait asks.
                    let (x, b) = unsafe { (*row.add(k), &*b.add(k * step).cast::<[u32; 16]>()) };
                    for (sum, b) in sums.iter_mut().zip(b) {
                        let low = i32::from(x as i16) * i32::from(*b as i16);
                        *sum += low + i32::from((x >> 16) as i16) * i32::from((*b >> 16) as i16);
                    }
                }
                // SAFETY: as the trait asks.
                let (scale, start) = unsafe { (*scales.add(group), *starts.add(group)) };
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total += (sum + start) as f32 * scale;
                }
            }
            out[..16].copy_from_slice(&totals);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod pairs {
    use std::arch::x86_64::*;

    use super::{Lanes, ROWS, Right, Rows, Tile};

    /// 16 registers of 8 lanes: 8 sums, 2 words of B, one of A.
    pub struct Avx2;

    impl Lanes for Avx2 {
        const WIDTH: usize = 8;
        const ROWS: usize = 4;
        const VECTORS: usize = 2;

        unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
            // SAFETY: passed on to the caller.
            unsafe { tile::<R>(a, b, words, out) }
        }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        let Right { words: b, step, .. } = b;
        // SAFETY: as the trait asks.
        unsafe {
            for (group, from) in (0..words).step_by(a.group).enumerate() {
                let mut sums = [[_mm256_setzero_si256(); 2]; R];
                for k in from..words.min(from + a.group) {
                    let b: [__m256i; 2] = [0, 8].map(|v| _mm256_loadu_si256(b.add(k * step + v).cast()));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm256_set1_epi32(*a.at[row % ROWS].0.add(k) as i32);
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(x, b));
                        }
                    }
                }
                for (row, (sums, out)) in sums.into_iter().zip(out.iter_mut()).enumerate() {
                    let (_, scales, starts) = a.at[row % ROWS];
                    let scale = _mm256_set1_ps(*scales.add(group));
                    let start = _mm256_set1_epi32(*starts.add(group));
                    for (v, sum) in sums.into_iter().enumerate() {
                        // Not fused, so that every processor comes to the same.
                        let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum, start)), scale);
                        let out = out[8 * v..].as_mut_ptr();
                        let before = if group == 0 { _mm256_setzero_ps() } else { _mm256_loadu_ps(out) };
                        _mm256_storeu_ps(out, _mm256_add_ps(before, sum));
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{GROUP, Lanes, PANEL, ROWS, Right, Rows, Tile, VECTORS, ZERO};
    use crate::element::scale_of_eight_bits;

    /// 32 registers of 16 lanes: 24 sums, 4 words of B, one of A.
    pub struct Vnni;

    impl Lanes for Vnni {
        const WIDTH: usize = 16;
        const ROWS: usize = ROWS;
        const VECTORS: usize = VECTORS;

        unsafe fn tile<const R: usize>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
            // SAFETY: passed on to the caller.
            unsafe {
                if b.scales.is_null() {
                    tile::<R, false>(a, b, words, out);
                } else {
                    tile::<R, true>(a, b, words, out);
                }
            }
        }
    }

    /// Words of a byte of each of four rows.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn weave(rows: [&[u8; PANEL]; 4], out: &mut [u32; PANEL]) {
        // SAFETY: a row is 64 bytes.
        let [a, b, c, d] = rows.map(|row| unsafe {
            _mm512_min_epu8(_mm512_loadu_si512(row.as_ptr().cast()), _mm512_set1_epi8(254u8 as i8))
        });
        // Within each 128 bits, words of columns 0-3, 4-7, 8-11 and 12-15.
        let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
        let (low_2, high_2) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
        let w = [
            _mm512_unpacklo_epi16(low, low_2),
            _mm512_unpackhi_epi16(low, low_2),
            _mm512_unpacklo_epi16(high, high_2),
            _mm512_unpackhi_epi16(high, high_2),
        ];
        // Their 128 bits, transposed.
        let (x, y) = (_mm512_shuffle_i32x4::<0x44>(w[0], w[1]), _mm512_shuffle_i32x4::<0xEE>(w[0], w[1]));
        let (z, u) = (_mm512_shuffle_i32x4::<0x44>(w[2], w[3]), _mm512_shuffle_i32x4::<0xEE>(w[2], w[3]));
        let v = [
            _mm512_shuffle_i32x4::<0x88>(x, z),
            _mm512_shuffle_i32x4::<0xDD>(x, z),
            _mm512_shuffle_i32x4::<0x88>(y, u),
            _mm512_shuffle_i32x4::<0xDD>(y, u),
        ];
        for (out, v) in out.as_chunks_mut::<16>().0.iter_mut().zip(v) {
            // SAFETY: `out` is 16 words.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
        }
    }

    /// See [`super::round_row`], which comes to the same.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn round_row(row: &[f32], out: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
        const LANES: usize = 16;
        let groups = row.chunks(GROUP).zip(out.chunks_mut(GROUP)).zip(scales.iter_mut().zip(starts));
        for ((row, out), (scale, start)) in groups {
            let (vectors, rest) = row.as_chunks::<LANES>();
            // The last vector is filled with zeros.
            let mask = (1u16 << rest.len()) - 1;
            let mut most = _mm512_setzero_si512();
            for values in vectors {
                // SAFETY: a vector is sixteen values.
                let bits = _mm512_castps_si512(unsafe { _mm512_loadu_ps(values.as_ptr()) });
                most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
            }
            // SAFETY: the mask has as many bits as there are values.
            let rest = unsafe { _mm512_maskz_loadu_ps(mask, rest.as_ptr()) };
            let bits = _mm512_and_si512(_mm512_castps_si512(rest), _mm512_set1_epi32(i32::MAX));
            let largest = f32::from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(most, bits)));
            let inverse;
            (*scale, inverse) = scale_of_eight_bits(largest);
            let inverse = _mm512_set1_ps(inverse);
            let mut sum = _mm512_setzero_si512();
            let (to, last) = out.as_chunks_mut::<LANES>();
            for (values, out) in vectors.iter().zip(to) {
                // SAFETY: as above.
                let whole = unsafe { _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), inverse)) };
                sum = _mm512_add_epi32(sum, whole);
                // SAFETY: as above.
                unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(whole)) };
            }
            let whole = _mm512_cvtps_epi32(_mm512_mul_ps(rest, inverse));
            sum = _mm512_add_epi32(sum, whole);
            // SAFETY: as above.
            unsafe { _mm512_mask_cvtepi32_storeu_epi8(last.as_mut_ptr().cast(), mask, whole) };
            *start = _mm512_reduce_add_epi32(sum).wrapping_mul(-ZERO);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn tile<const R: usize, const SCALED: bool>(a: &Rows, b: Right, words: usize, out: &mut Tile) {
        let zero = _mm512_setzero_ps();
        // SAFETY: as the trait asks; a row of the tile is four vectors.
        unsafe {
            for out in &mut out[..R] {
                for v in 0..VECTORS {
                    _mm512_storeu_ps(out.as_mut_ptr().add(16 * v), zero);
                }
            }
            for (group, from) in (0..words).step_by(a.group).enumerate() {
                let mut sums = [[_mm512_setzero_si512(); VECTORS]; R];
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm512_set1_epi32(*a.at[row % ROWS].2.add(group)); VECTORS];
                }
                for k in from..words.min(from + a.group) {
                    let b: [__m512i; VECTORS] =
                        [0, 16, 32, 48].map(|v| _mm512_loadu_si512(b.words.add(k * PANEL + v).cast()));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(*a.at[row % ROWS].0.add(k) as i32);
                        for (sum, b) in sums.iter_mut().zip(b) {
                            // Indices are unsigned, values of A signed.
                            *sum = _mm512_dpbusd_epi32(*sum, b, x);
                        }
                    }
                }
                // One by one, so that sums stay in registers.
                let scales = a.at.map(|(_, scales, _)| scales.wrapping_add(group));
                let of_b = b.scales.wrapping_add(group * PANEL);
                put::<SCALED>(sums[0], scales[0], of_b, &mut out[0]);
                if R > 1 {
                    put::<SCALED>(sums[1 % R], scales[1], of_b, &mut out[1]);
                }
                if R > 2 {
                    put::<SCALED>(sums[2 % R], scales[2], of_b, &mut out[2]);
                }
                if R > 3 {
                    put::<SCALED>(sums[3 % R], scales[3], of_b, &mut out[3]);
                }
                if R > 4 {
                    put::<SCALED>(sums[4 % R], scales[4], of_b, &mut out[4]);
                }
                if R > 5 {
                    put::<SCALED>(sums[5 % R], scales[5], of_b, &mut out[5]);
                }
            }
        }
    }

    /// Adds a group's sums, times its scales, to a row of the tile.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn put<const SCALED: bool>(
        sums: [__m512i; VECTORS],
        scale: *const f32,
        of_b: *const f32,
        out: &mut [f32; VECTORS * 16],
    ) {
        // SAFETY: the caller has a scale, and one for each column of B if they are; the row is four vectors.
        unsafe {
            let scale = _mm512_set1_ps(*scale);
            for (v, sums) in sums.into_iter().enumerate() {
                // Not fused, so that every processor comes to the same.
                let scale = if SCALED { _mm512_mul_ps(_mm512_loadu_ps(of_b.add(16 * v)), scale) } else { scale };
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
                let out = out.as_mut_ptr().add(16 * v);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
            }
        }
    }
}
