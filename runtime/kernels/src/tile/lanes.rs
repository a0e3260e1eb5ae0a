//! The loops of a tile, over what the vectors of a processor do.

use std::hint::black_box;

use super::operands::{PANEL, Segment, Store};
use crate::element::Element;

/// Vectors of one processor for one element type.
///
/// # Safety
/// Functions run only where the processor has the instructions; pointers are valid for [`Lanes::WIDTH`] values.
pub trait Lanes {
    type Element: Element;
    /// A vector of f32 sums.
    type Sum: Copy;
    /// A vector of words.
    type Word: Copy;
    const WIDTH: usize;
    /// Rows of the largest tile.
    const ROWS: usize;
    /// Vectors of the largest tile.
    const VECTORS: usize;

    unsafe fn zero() -> Self::Sum;
    unsafe fn words(p: *const u32) -> Self::Word;
    unsafe fn broadcast(word: u32) -> Self::Word;
    /// `sum + a b`.
    unsafe fn dot(sum: Self::Sum, a: Self::Word, b: Self::Word) -> Self::Sum;
    unsafe fn load(p: *const f32) -> Self::Sum;
    unsafe fn splat(value: f32) -> Self::Sum;
    unsafe fn add(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    unsafe fn mul(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    unsafe fn store(p: *mut f32, sum: Self::Sum);
    unsafe fn narrow(p: *mut Self::Element, sum: Self::Sum);
    /// [`tile`] with these instructions enabled.
    unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
        segments: &[Segment],
        step: usize,
        store: Store<Self::Element>,
    );
    /// [`registers_only`] with these instructions enabled.
    unsafe fn spin(steps: usize) -> f32;
}

/// `steps` times 24 independent `dot`s (12 where there are 16 registers) on registers alone.
///
/// # Safety
/// Called from a function with the instructions of `L` enabled.
#[inline(always)]
pub(super) unsafe fn registers_only<L: Lanes>(steps: usize) -> f32 {
    // Written out, as in [`tile`]: an index that is not a constant would keep the sums in memory.
    macro_rules! dots {
        ($sums:ident $a:ident $b:ident $($i:literal)*) => { $($sums[$i] = L::dot($sums[$i], $a, $b);)* };
    }
    macro_rules! added {
        ($sums:ident $($i:literal)*) => {{
            let mut all = L::zero();
            $(all = L::add(all, $sums[$i]);)*
            all
        }};
    }
    // SAFETY: as the caller promised; a vector has at most 16 lanes.
    unsafe {
        let (a, b) = (L::broadcast(black_box(0)), L::broadcast(black_box(0)));
        let mut sums = [L::zero(); 24];
        for _ in 0..steps {
            dots!(sums a b 0 1 2 3 4 5 6 7 8 9 10 11);
            if L::VECTORS == 4 {
                dots!(sums a b 12 13 14 15 16 17 18 19 20 21 22 23);
            }
        }
        let all = added!(sums 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23);
        let mut out = [0f32; 16];
        L::store(out.as_mut_ptr(), all);
        // All of it: sums of which one lane is asked for are kept to the registers that have lanes of their own.
        black_box(&out)[0]
    }
}

/// Operations of one step of [`spin`](super::spin): two for each multiply-add.
pub(super) fn spin_operations<L: Lanes>() -> usize {
    2 * L::WIDTH * L::Element::PER_WORD * if L::VECTORS == 4 { 24 } else { 12 }
}

/// One tile: `ROWS` rows by `VECTORS` vectors. `step`: words of B from one word of the sum to the next.
///
/// `ALONG_ROWS`: words of neighbouring rows of A lie beside each other (a transposed A), else words of one row do.
///
/// # Safety
/// Every segment has `ROWS` rows of A and `words * step` words of B readable; the outputs are writable over the tile, and
/// nobody else accesses them meanwhile. Called from a function with the instructions of `L` enabled.
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
    segments: &[Segment],
    step: usize,
    store: Store<L::Element>,
) {
    // Known beforehand where a tile is as wide as a panel.
    let step = if L::WIDTH * L::VECTORS == PANEL { PANEL } else { step };
    // SAFETY: as the caller promised; `row` and `v` stay below `ROWS` and `VECTORS`.
    unsafe {
        let mut sums = [[L::zero(); VECTORS]; ROWS];
        for segment in segments {
            let mut b = segment.b;
            if ALONG_ROWS {
                let mut a = segment.a;
                for _ in 0..segment.words {
                    let words: [L::Word; VECTORS] = std::array::from_fn(|v| L::words(b.add(L::WIDTH * v)));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let word = L::broadcast(a.cast::<u32>().add(row).read_unaligned());
                        for v in 0..VECTORS {
                            sums[v] = L::dot(sums[v], word, words[v]);
                        }
                    }
                    a = a.add(segment.word_step);
                    b = b.add(step);
                }
            } else {
                // Two places that are not known to belong together, from which a row's address is a sum of two registers: from one the
                // addresses of six rows are added up anew for every word.
                let far = black_box(segment.a.wrapping_add(HALF * segment.row_step));
                let mut halves = [segment.a, far];
                for _ in 0..segment.words {
                    let words: [L::Word; VECTORS] = std::array::from_fn(|v| L::words(b.add(L::WIDTH * v)));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = halves[row / HALF].add(row % HALF * segment.row_step);
                        let word = L::broadcast(a.cast::<u32>().read_unaligned());
                        for v in 0..VECTORS {
                            sums[v] = L::dot(sums[v], word, words[v]);
                        }
                    }
                    halves = halves.map(|half| half.wrapping_add(size_of::<u32>()));
                    b = b.add(step);
                }
            }
        }
        // Written out row by row: an index that is not a constant would keep all sums in memory, also in the loop above.
        macro_rules! rows_of {
            ($($row:literal)*) => { $(if $row < ROWS { finish_row::<L, VECTORS>(sums[$row % ROWS], store, $row) })* };
        }
        rows_of!(0 1 2 3 4 5);
    }
}

/// Rows of which addresses are a sum of two registers.
const HALF: usize = 3;

/// Stores a row of a tile. # Safety: see [`tile`].
#[inline(always)]
pub(super) unsafe fn finish_row<L: Lanes, const VECTORS: usize>(
    sums: [L::Sum; VECTORS],
    store: Store<L::Element>,
    row: usize,
) {
    // SAFETY: as the caller promised; `v` stays below `VECTORS`.
    unsafe {
        let mut sums = sums;
        if store.scale != 1.0 {
            let scale = L::splat(store.scale);
            sums = std::array::from_fn(|v| L::mul(sums[v], scale));
        }
        if !store.bias.is_null() {
            sums = std::array::from_fn(|v| L::add(sums[v], L::load(store.bias.add(L::WIDTH * v))));
        }
        if !store.row_add.is_null() {
            let row_add = L::splat(*store.row_add.add(row));
            sums = std::array::from_fn(|v| L::add(sums[v], row_add));
        }
        if !store.add.is_null() {
            let add = store.add.add(row * store.add_step);
            sums = std::array::from_fn(|v| L::add(sums[v], L::load(add.add(L::WIDTH * v))));
        }
        if store.wide.is_null() {
            let narrow = store.narrow.add(row * store.step);
            (0..VECTORS).for_each(|v| L::narrow(narrow.add(L::WIDTH * v), sums[v]));
        } else {
            let wide = store.wide.add(row * store.step);
            (0..VECTORS).for_each(|v| L::store(wide.add(L::WIDTH * v), sums[v]));
        }
    }
}

#[cfg(target_arch = "x86_64")]
/// The functions that run with the instructions enabled.
macro_rules! enabled {
    ($element:ty, $features:literal) => {
        unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
            segments: &[Segment],
            step: usize,
            store: Store<$element>,
        ) {
            #[target_feature(enable = $features)]
            unsafe fn run<L: Lanes, const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
                segments: &[Segment],
                step: usize,
                store: Store<L::Element>,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { tile::<L, ROWS, VECTORS, ALONG_ROWS>(segments, step, store) }
            }
            // SAFETY: passed on to the caller.
            unsafe { run::<Self, ROWS, VECTORS, ALONG_ROWS>(segments, step, store) }
        }

        unsafe fn spin(steps: usize) -> f32 {
            #[target_feature(enable = $features)]
            unsafe fn spin<L: Lanes>(steps: usize) -> f32 {
                // SAFETY: passed on to the caller.
                unsafe { registers_only::<L>(steps) }
            }
            // SAFETY: passed on to the caller.
            unsafe { spin::<Self>(steps) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use enabled;
