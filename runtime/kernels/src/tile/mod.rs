//! The innermost loop of every product: a tile of C held in registers, over words of four bytes.
//!
//! A word of A is one f32 or a pair of neighbouring bf16 along the sum; it is broadcast. Words of B lie in a panel of
//! [`PANEL`] columns, packed so that the words of one step lie beside each other. One `dot` multiplies a broadcast word by a
//! vector of words and adds to a vector of f32 sums. So f32 and bf16 differ in one instruction, and processors in how many
//! rows and vectors make a tile. AMX multiplies whole registers of words by each other, see `amx`, and AArch64 pairs of rows, see `bfmmla`.
//!
//! A sum is taken step by step in the order of the segments, whatever tile it is part of: a row of C depends on its row of A
//! and on B alone.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(test, target_arch = "aarch64"))]
mod bfmmla;
mod lanes;
#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
mod operands;
mod panel;
mod portable;

use std::cell::RefCell;

use half::bf16;

pub(crate) use self::operands::{PANEL, SEGMENTS_MAX, Segment, Store};
pub(crate) use self::panel::{pack_columns, pack_rows, pack_rows_padded, pair_rows, word};

#[cfg(target_arch = "x86_64")]
pub(crate) use self::amx::Tiles;
#[cfg(target_arch = "x86_64")]
use self::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use self::avx512::Avx512;
use self::lanes::{Lanes, spin_operations};
#[cfg(any(test, target_arch = "aarch64"))]
use self::neon::Neon;
use self::portable::Portable;
use crate::buffer::grown;
use crate::element::Element;
use crate::isa::{Bf16Unit, F32Unit, Isa};

/// Rows of the largest tile of any processor.
const ROWS_MAX: usize = 6;

/// C (rows, width) = Σ over segments of A B, stored as `store` says, for a panel of `width` ≤ [`PANEL`] columns.
///
/// # Safety
/// Every segment has `rows` rows of A and `words * PANEL` words of B readable; outputs are writable (and `add`, `bias` and
/// `row_add` readable) over rows x width, and nobody else accesses them meanwhile. The processor has what `isa` says.
pub(crate) unsafe fn rows<E: TileElement, const ALONG_ROWS: bool>(
    isa: Isa,
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<E>,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        if ALONG_ROWS {
            E::rows_along(isa, rows, width, segments, store);
        } else {
            E::rows_beside(isa, rows, width, segments, store);
        }
    }
}

/// Bytes that a thread keeps for tiles.
pub(crate) fn scratch_bytes(isa: Isa) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa.bf16_unit() == Bf16Unit::Amx {
        return amx::scratch_bytes();
    }
    let _ = isa;
    0
}

/// Whether products can be taken with their sides exchanged, see [`rows_turned`]: these need not pack W.
pub(crate) fn turns<E: TileElement>(isa: Isa) -> bool {
    E::turns(isa)
}

/// [`rows`] of at most [`PANEL`] rows, of which `b` of the segments is the packed words, and `a` the rows of W: to the last bit what that
/// comes to. The `first` to read these rows of W asks for those behind them.
///
/// # Safety
/// As there, with `width` rows of A; [`turns`] says that there are such tiles.
pub(crate) unsafe fn rows_turned<E: TileElement>(
    isa: Isa,
    rows: usize,
    width: usize,
    segments: &[Segment],
    first: bool,
    store: Store<E>,
) {
    // SAFETY: passed on to the caller.
    unsafe { E::rows_turned(isa, rows, width, segments, first, store) }
}

/// Multiply-adds on registers alone: what they sum up to, and the operations of so many steps.
pub(crate) fn spin<E: TileElement>(isa: Isa, steps: usize) -> (f32, f64) {
    let (sum, operations) = E::spin(isa, steps);
    (sum, operations as f64 * steps as f64)
}

/// An element type that has tiles. Its functions are not generic, so that tiles are compiled in this crate, once.
pub trait TileElement: Element {
    /// See [`rows`], whose words of one row of A lie beside each other.
    ///
    /// # Safety
    /// See [`rows`].
    unsafe fn rows_beside(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<Self>);
    /// See [`rows`], `ALONG_ROWS`.
    ///
    /// # Safety
    /// See [`rows`].
    unsafe fn rows_along(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<Self>);
    /// See [`turns`].
    fn turns(_isa: Isa) -> bool {
        false
    }
    /// See [`rows_turned`].
    ///
    /// # Safety
    /// See [`rows_turned`].
    unsafe fn rows_turned(
        _isa: Isa,
        _rows: usize,
        _width: usize,
        _segments: &[Segment],
        _first: bool,
        _store: Store<Self>,
    ) {
        unreachable!("{} has no tiles with their sides exchanged", std::any::type_name::<Self>())
    }
    /// Rows of the largest tile: parts of an output whose rows are a multiple of them are cut well.
    fn tile_rows(_isa: Isa) -> usize {
        ROWS_MAX
    }
    /// See [`spin`]; the operations are those of one step.
    fn spin(isa: Isa, steps: usize) -> (f32, usize);
}

impl TileElement for f32 {
    unsafe fn rows_beside(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<f32>) {
        // SAFETY: passed on to the caller.
        unsafe { f32_rows::<false>(isa, rows, width, segments, store) }
    }

    unsafe fn rows_along(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<f32>) {
        // SAFETY: passed on to the caller.
        unsafe { f32_rows::<true>(isa, rows, width, segments, store) }
    }

    fn spin(isa: Isa, steps: usize) -> (f32, usize) {
        // SAFETY: a set in use is never more than the processor has.
        unsafe {
            match isa.f32_unit() {
                #[cfg(target_arch = "x86_64")]
                F32Unit::Avx512 => turn::<Avx512<f32>>(steps),
                #[cfg(target_arch = "x86_64")]
                F32Unit::Avx2 => turn::<Avx2<f32>>(steps),
                #[cfg(any(test, target_arch = "aarch64"))]
                F32Unit::Neon => turn::<Neon<f32>>(steps),
                _ => turn::<Portable<f32>>(steps),
            }
        }
    }
}

impl TileElement for bf16 {
    unsafe fn rows_beside(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<bf16>) {
        // SAFETY: passed on to the caller.
        unsafe { bf16_rows::<false>(isa, rows, width, segments, store) }
    }

    unsafe fn rows_along(isa: Isa, rows: usize, width: usize, segments: &[Segment], store: Store<bf16>) {
        // SAFETY: passed on to the caller.
        unsafe { bf16_rows::<true>(isa, rows, width, segments, store) }
    }

    #[cfg(target_arch = "x86_64")]
    fn turns(isa: Isa) -> bool {
        isa.bf16_unit() == Bf16Unit::Amx
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn rows_turned(_: Isa, rows: usize, width: usize, segments: &[Segment], first: bool, store: Store<bf16>) {
        // SAFETY: passed on to the caller, who saw that the unit is AMX.
        unsafe { amx::walk_turned(rows, width, segments, first, store) }
    }

    fn tile_rows(isa: Isa) -> usize {
        match isa.bf16_unit() {
            #[cfg(target_arch = "x86_64")]
            Bf16Unit::Amx => amx::BLOCK,
            #[cfg(any(test, target_arch = "aarch64"))]
            Bf16Unit::Bfmmla => bfmmla::ROWS,
            _ => ROWS_MAX,
        }
    }

    fn spin(isa: Isa, steps: usize) -> (f32, usize) {
        // SAFETY: a set in use is never more than the processor has.
        unsafe {
            match (isa.bf16_unit(), isa.f32_unit()) {
                #[cfg(target_arch = "x86_64")]
                (Bf16Unit::Amx, _) => (amx::spin(steps), amx::SPIN_OPERATIONS),
                #[cfg(target_arch = "x86_64")]
                (Bf16Unit::Avx512, _) => turn::<Avx512<bf16>>(steps),
                #[cfg(target_arch = "x86_64")]
                (Bf16Unit::Widened, F32Unit::Avx512 | F32Unit::Avx2) => turn::<Avx2<bf16>>(steps),
                #[cfg(any(test, target_arch = "aarch64"))]
                (Bf16Unit::Bfmmla, _) => (bfmmla::spin(steps), bfmmla::SPIN_OPERATIONS),
                #[cfg(any(test, target_arch = "aarch64"))]
                (Bf16Unit::Widened, F32Unit::Neon) => turn::<Neon<bf16>>(steps),
                _ => turn::<Portable<bf16>>(steps),
            }
        }
    }
}

/// [`rows`] in f32. # Safety: see there.
unsafe fn f32_rows<const ALONG_ROWS: bool>(
    isa: Isa,
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<f32>,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match isa.f32_unit() {
            #[cfg(target_arch = "x86_64")]
            F32Unit::Avx512 => {
                walk::<Avx512<f32>, ALONG_ROWS>(rows, width, segments, store);
            }
            #[cfg(target_arch = "x86_64")]
            F32Unit::Avx2 => walk::<Avx2<f32>, ALONG_ROWS>(rows, width, segments, store),
            #[cfg(any(test, target_arch = "aarch64"))]
            F32Unit::Neon => walk::<Neon<f32>, ALONG_ROWS>(rows, width, segments, store),
            _ => walk::<Portable<f32>, ALONG_ROWS>(rows, width, segments, store),
        }
    }
}

/// [`rows`] in bf16. # Safety: see there.
unsafe fn bf16_rows<const ALONG_ROWS: bool>(
    isa: Isa,
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<bf16>,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match (isa.bf16_unit(), isa.f32_unit()) {
            #[cfg(target_arch = "x86_64")]
            (Bf16Unit::Amx, _) => amx::walk::<ALONG_ROWS>(rows, width, segments, store),
            #[cfg(target_arch = "x86_64")]
            (Bf16Unit::Avx512, _) => walk::<Avx512<bf16>, ALONG_ROWS>(rows, width, segments, store),
            #[cfg(target_arch = "x86_64")]
            (Bf16Unit::Widened, F32Unit::Avx512 | F32Unit::Avx2) => {
                walk::<Avx2<bf16>, ALONG_ROWS>(rows, width, segments, store)
            }
            #[cfg(any(test, target_arch = "aarch64"))]
            (Bf16Unit::Bfmmla, _) => bfmmla::walk::<ALONG_ROWS>(rows, width, segments, store),
            #[cfg(any(test, target_arch = "aarch64"))]
            (Bf16Unit::Widened, F32Unit::Neon) => walk::<Neon<bf16>, ALONG_ROWS>(rows, width, segments, store),
            _ => walk::<Portable<bf16>, ALONG_ROWS>(rows, width, segments, store),
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`.
unsafe fn turn<L: Lanes>(steps: usize) -> (f32, usize) {
    // SAFETY: passed on to the caller.
    (unsafe { L::spin(steps) }, spin_operations::<L>())
}

/// Strips of a panel at most: those of two vectors of four lanes.
const STRIPS_MAX: usize = 8;
/// A block of rows of A, which stays in the second cache while all strips of a panel go over it.
const A_BYTES: usize = 128 << 10;

/// Tiles of one strip of columns from which on a copy of the strip pays.
pub(crate) const COPIED_FROM: usize = 4;

/// Copies the first `strip` columns of each segment's part of a panel, one word of the sum after another: in the panel they lie so far
/// apart that they fall on a quarter of the first cache's lines, and that the processor does not foresee them.
///
/// # Safety
/// Each segment has `words * PANEL` words of B readable from its first of these columns on, less the columns before it.
pub(crate) unsafe fn copy_strip(segments: &mut [Segment], strip: usize, mut to: &mut [u32]) {
    for segment in segments {
        let (own, after) = to.split_at_mut(segment.words * strip);
        to = after;
        for (k, own) in own.chunks_exact_mut(strip).enumerate() {
            // SAFETY: the caller has word k of the strip's columns.
            unsafe { std::ptr::copy_nonoverlapping(segment.b.add(k * PANEL), own.as_mut_ptr(), strip) };
        }
        segment.b = own.as_ptr();
    }
}

thread_local! {
    /// A thread's copy of a strip, or of all strips of a panel.
    pub(crate) static STRIP: RefCell<Vec<u32>> = RefCell::default();
}

/// Cuts a panel into tiles. # Safety: see [`rows`].
unsafe fn walk<L: Lanes, const ALONG_ROWS: bool>(
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<L::Element>,
) {
    debug_assert!(width <= PANEL && segments.len() <= SEGMENTS_MAX);
    const { assert!(PANEL <= STRIPS_MAX * L::WIDTH * L::VECTORS, "a panel has more strips") };
    let strip = L::WIDTH * L::VECTORS;
    let mut strips = [[Segment::EMPTY; SEGMENTS_MAX]; STRIPS_MAX];
    for (column, of_strip) in (0..width).step_by(strip).zip(&mut strips) {
        for (segment, of_panel) in of_strip.iter_mut().zip(segments) {
            *segment = Segment { b: of_panel.b.wrapping_add(column), ..*of_panel };
        }
    }
    let words: usize = segments.iter().map(|segment| segment.words).sum();
    let copied = strip < PANEL && words > 0 && rows >= COPIED_FROM * L::ROWS;
    // All strips go over a block of rows before the next one comes.
    let (step, block) = match copied {
        false => (PANEL, rows),
        true => (strip, (A_BYTES / (words * size_of::<u32>())).max(COPIED_FROM * L::ROWS) / L::ROWS * L::ROWS),
    };
    STRIP.with_borrow_mut(|copy| {
        if copied {
            let copies = grown(copy, width.div_ceil(strip) * words * strip);
            for (of_strip, copy) in strips.iter_mut().zip(copies.chunks_exact_mut(words * strip)) {
                // SAFETY: a panel has the columns of every strip, some of them beyond `width`.
                unsafe { copy_strip(&mut of_strip[..segments.len()], strip, copy) };
            }
        }
        for row in (0..rows).step_by(block.max(1)) {
            let rows = block.min(rows - row);
            for (column, of_strip) in (0..width).step_by(strip).zip(&strips) {
                let mut here = *of_strip;
                let here = &mut here[..segments.len()];
                here.iter_mut().for_each(|segment| segment.a = segment.a.wrapping_add(row * segment.row_step));
                // SAFETY: the strip lies inside what the caller promised.
                unsafe { down::<L, ALONG_ROWS>(rows, strip.min(width - column), here, step, store.at(row, column)) };
            }
        }
    });
}

/// Tiles below each other. # Safety: see [`rows`], for a strip of a panel that has its words of B `step` apart.
unsafe fn down<L: Lanes, const ALONG_ROWS: bool>(
    rows: usize,
    columns: usize,
    segments: &[Segment],
    step: usize,
    store: Store<L::Element>,
) {
    let mut here = [Segment::EMPTY; SEGMENTS_MAX];
    let here = &mut here[..segments.len()];
    for row in (0..rows).step_by(L::ROWS) {
        let count = L::ROWS.min(rows - row);
        for (here, segment) in here.iter_mut().zip(segments) {
            *here = Segment { a: segment.a.wrapping_add(row * segment.row_step), ..*segment };
        }
        let store = store.at(row, 0);
        // SAFETY: the tile lies inside what the caller promised, or its output is the buffer below.
        unsafe {
            if columns.is_multiple_of(L::WIDTH) {
                one::<L, ALONG_ROWS>(count, columns / L::WIDTH, here, step, store);
            } else {
                // Whole vectors into a buffer, and from there the columns that exist.
                let mut sums = [0f32; ROWS_MAX * PANEL];
                let whole = Store::wide(sums.as_mut_ptr(), PANEL);
                one::<L, ALONG_ROWS>(count, columns.div_ceil(L::WIDTH), here, step, whole);
                finish(sums.as_ptr(), PANEL, count, columns, store);
            }
        }
    }
}

/// The scalar form of a tile's last step. # Safety: `sums` has `rows` rows, `step` values apart; the outputs of `store` as in [`rows`], over
/// rows x columns.
unsafe fn finish<E: Element>(sums: *const f32, step: usize, rows: usize, columns: usize, store: Store<E>) {
    // SAFETY: as the caller promised.
    unsafe {
        for row in 0..rows {
            for column in 0..columns {
                let mut value = *sums.add(row * step + column);
                if store.scale != 1.0 {
                    value *= store.scale;
                }
                if !store.bias.is_null() {
                    value += *store.bias.add(column);
                }
                if !store.row_add.is_null() {
                    value += *store.row_add.add(row);
                }
                if !store.add.is_null() {
                    value += *store.add.add(row * store.add_step + column);
                }
                if store.wide.is_null() {
                    *store.narrow.add(row * store.step + column) = E::of(value);
                } else {
                    *store.wide.add(row * store.step + column) = value;
                }
            }
        }
    }
}

/// Calls the tile of this size. # Safety: see [`tile`](lanes::tile).
unsafe fn one<L: Lanes, const ALONG_ROWS: bool>(
    rows: usize,
    vectors: usize,
    segments: &[Segment],
    step: usize,
    store: Store<L::Element>,
) {
    macro_rules! sizes {
        ($(($rows:literal, $vectors:literal)),*) => {
            match (rows, vectors) {
                // The condition is a constant, and a tile that `L` does not have is not compiled.
                $(($rows, $vectors) if const { $rows <= L::ROWS && $vectors <= L::VECTORS } => {
                    // SAFETY: passed on to the caller; `L`'s processor is the one in use.
                    unsafe { L::run::<$rows, $vectors, ALONG_ROWS>(segments, step, store) }
                })*
                _ => unreachable!("a tile has at most {} rows and {} vectors", L::ROWS, L::VECTORS),
            }
        };
    }
    sizes!(
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 1),
        (1, 2),
        (2, 2),
        (3, 2),
        (4, 2),
        (5, 2),
        (6, 2),
        (1, 3),
        (2, 3),
        (3, 3),
        (4, 3),
        (5, 3),
        (6, 3),
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
        (5, 4),
        (6, 4)
    )
}
