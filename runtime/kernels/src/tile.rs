//! The innermost loop of every product: a tile of C held in registers, over words of four bytes.
//!
//! A word of A is one f32 or a pair of neighbouring bf16 along the sum; it is broadcast. Words of B lie in a panel of
//! [`PANEL`] columns, packed so that the words of one step lie beside each other. One `dot` multiplies a broadcast word by a
//! vector of words and adds to a vector of f32 sums. So f32 and bf16 differ in one instruction, and processors in how many
//! rows and vectors make a tile.
//!
//! A sum is taken step by step in the order of the segments, whatever tile it is part of: a row of C depends on its row of A
//! and on B alone.

use std::hint::black_box;

use half::bf16;

use crate::cpu::Cpu;
use crate::element::Element;

/// Columns of a packed panel of B.
pub(crate) const PANEL: usize = 64;
/// Rows of the largest tile of any processor.
const ROWS_MAX: usize = 6;
/// Segments of one tile: frozen weights and adapters whose products add up.
pub(crate) const SEGMENTS_MAX: usize = 8;

/// A part of the sum: rows of A and the packed words of B that go with them.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The first word of row 0 of A.
    pub a: *const u8,
    /// Bytes from one row of A to the next.
    pub row_step: usize,
    /// Bytes from one word of a row to the next.
    pub word_step: usize,
    /// Words of the sum.
    pub words: usize,
    /// Packed words of B: `PANEL` for each word of the sum.
    pub b: *const u32,
}

impl Segment {
    pub(crate) const EMPTY: Self =
        Self { a: std::ptr::null(), row_step: 0, word_step: 0, words: 0, b: std::ptr::null() };
}

/// What becomes of the sums: `scale · sum + bias[column] + row_add[row] + add[row, column]`, stored as f32 or as E.
///
/// Pointers are to row 0 and the panel's column 0; null ones are left out. One of `wide` and `narrow` is not null.
#[derive(Debug)]
pub struct Store<E> {
    pub scale: f32,
    pub bias: *const f32,
    pub row_add: *const f32,
    pub add: *const f32,
    pub add_step: usize,
    pub wide: *mut f32,
    pub narrow: *mut E,
    /// Values from one row of the output to the next.
    pub step: usize,
}

impl<E> Clone for Store<E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Store<E> {}

impl<E> Store<E> {
    /// Sums alone, as f32.
    pub(crate) fn wide(wide: *mut f32, step: usize) -> Self {
        let (bias, row_add, add) = (std::ptr::null(), std::ptr::null(), std::ptr::null());
        Self { scale: 1.0, bias, row_add, add, add_step: 0, wide, narrow: std::ptr::null_mut(), step }
    }

    /// Sums added to what is there, as f32.
    pub(crate) fn adding(wide: *mut f32, step: usize) -> Self {
        Self { add: wide, add_step: step, ..Self::wide(wide, step) }
    }

    /// The same output, further down and to the right. Null pointers stay null.
    fn at(self, row: usize, column: usize) -> Self {
        let shift = |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
        Self {
            bias: shift(self.bias, column),
            row_add: shift(self.row_add, row),
            add: shift(self.add, row * self.add_step + column),
            wide: if self.wide.is_null() { self.wide } else { self.wide.wrapping_add(row * self.step + column) },
            narrow: if self.narrow.is_null() {
                self.narrow
            } else {
                self.narrow.wrapping_add(row * self.step + column)
            },
            ..self
        }
    }
}

/// Vectors of one processor for one element type.
///
/// # Safety
/// Functions run only where the processor has the instructions; pointers are valid for [`Lanes::WIDTH`] values.
trait Lanes {
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
unsafe fn registers_only<L: Lanes>(steps: usize) -> f32 {
    const SUMS: usize = 12;
    // SAFETY: as the caller promised.
    unsafe {
        let (a, b) = (L::broadcast(black_box(0)), L::broadcast(black_box(0)));
        let mut sums = [[L::zero(); SUMS]; 2];
        for _ in 0..steps {
            for sums in &mut sums[..if L::VECTORS == 4 { 2 } else { 1 }] {
                for sum in sums {
                    *sum = L::dot(*sum, a, b);
                }
            }
        }
        let mut out = [0f32; 16];
        for sum in sums.as_flattened() {
            L::store(out.as_mut_ptr(), L::add(*sum, L::load(out.as_ptr())));
        }
        out[0]
    }
}

/// Operations of one step of [`spin`]: two for each multiply-add.
fn spin_operations<L: Lanes>() -> usize {
    2 * L::WIDTH * L::Element::PER_WORD * if L::VECTORS == 4 { 24 } else { 12 }
}

/// One tile: `ROWS` rows by `VECTORS` vectors.
///
/// `ALONG_ROWS`: words of neighbouring rows of A lie beside each other (a transposed A), else words of one row do.
///
/// # Safety
/// Every segment has `ROWS` rows of A and `words * PANEL` words of B readable; the outputs are writable over the tile, and
/// nobody else accesses them meanwhile. Called from a function with the instructions of `L` enabled.
#[inline(always)]
unsafe fn tile<L: Lanes, const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
    segments: &[Segment],
    store: Store<L::Element>,
) {
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
                    b = b.add(PANEL);
                }
            } else {
                let a: [*const u8; ROWS] = std::array::from_fn(|row| segment.a.add(row * segment.row_step));
                for k in 0..segment.words {
                    let words: [L::Word; VECTORS] = std::array::from_fn(|v| L::words(b.add(L::WIDTH * v)));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let word = L::broadcast(a[row].cast::<u32>().add(k).read_unaligned());
                        for v in 0..VECTORS {
                            sums[v] = L::dot(sums[v], word, words[v]);
                        }
                    }
                    b = b.add(PANEL);
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

/// Stores a row of a tile. # Safety: see [`tile`].
#[inline(always)]
unsafe fn finish_row<L: Lanes, const VECTORS: usize>(sums: [L::Sum; VECTORS], store: Store<L::Element>, row: usize) {
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

/// C (rows, width) = Σ over segments of A B, stored as `store` says, for a panel of `width` ≤ [`PANEL`] columns.
///
/// # Safety
/// Every segment has `rows` rows of A and `words * PANEL` words of B readable; outputs are writable (and `add`, `bias` and
/// `row_add` readable) over rows x width, and nobody else accesses them meanwhile. The processor has what `cpu` says.
pub(crate) unsafe fn rows<E: TileElement, const ALONG_ROWS: bool>(
    cpu: Cpu,
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<E>,
) {
    // SAFETY: passed on to the caller.
    unsafe { E::rows::<ALONG_ROWS>(cpu, rows, width, segments, store) }
}

/// Multiply-adds on registers alone: what they sum up to, and the operations of so many steps.
pub(crate) fn spin<E: TileElement>(cpu: Cpu, steps: usize) -> (f32, f64) {
    let (sum, operations) = E::spin(cpu, steps);
    (sum, operations as f64 * steps as f64)
}

/// An element type that has tiles.
pub trait TileElement: Element {
    /// See [`rows`].
    ///
    /// # Safety
    /// See [`rows`].
    unsafe fn rows<const ALONG_ROWS: bool>(
        cpu: Cpu,
        rows: usize,
        width: usize,
        segments: &[Segment],
        store: Store<Self>,
    );
    /// See [`spin`]; the operations are those of one step.
    fn spin(cpu: Cpu, steps: usize) -> (f32, usize);
}

impl TileElement for f32 {
    unsafe fn rows<const ALONG_ROWS: bool>(
        cpu: Cpu,
        rows: usize,
        width: usize,
        segments: &[Segment],
        store: Store<f32>,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 | Cpu::Avx512Bf16 => {
                    walk::<x86::Avx512<f32>, ALONG_ROWS>(rows, width, segments, store);
                }
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 => walk::<x86::Avx2<f32>, ALONG_ROWS>(rows, width, segments, store),
                _ => walk::<Portable<f32>, ALONG_ROWS>(rows, width, segments, store),
            }
        }
    }

    fn spin(cpu: Cpu, steps: usize) -> (f32, usize) {
        // SAFETY: a `Cpu` is never more than the processor has.
        unsafe {
            match cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 | Cpu::Avx512Bf16 => turn::<x86::Avx512<f32>>(steps),
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx2 => turn::<x86::Avx2<f32>>(steps),
                _ => turn::<Portable<f32>>(steps),
            }
        }
    }
}

impl TileElement for bf16 {
    unsafe fn rows<const ALONG_ROWS: bool>(
        cpu: Cpu,
        rows: usize,
        width: usize,
        segments: &[Segment],
        store: Store<bf16>,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512Bf16 => walk::<x86::Avx512<bf16>, ALONG_ROWS>(rows, width, segments, store),
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 | Cpu::Avx2 => walk::<x86::Avx2<bf16>, ALONG_ROWS>(rows, width, segments, store),
                _ => walk::<Portable<bf16>, ALONG_ROWS>(rows, width, segments, store),
            }
        }
    }

    fn spin(cpu: Cpu, steps: usize) -> (f32, usize) {
        // SAFETY: a `Cpu` is never more than the processor has.
        unsafe {
            match cpu {
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512Bf16 => turn::<x86::Avx512<bf16>>(steps),
                #[cfg(target_arch = "x86_64")]
                Cpu::Avx512 | Cpu::Avx2 => turn::<x86::Avx2<bf16>>(steps),
                _ => turn::<Portable<bf16>>(steps),
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `L`.
unsafe fn turn<L: Lanes>(steps: usize) -> (f32, usize) {
    // SAFETY: passed on to the caller.
    (unsafe { L::spin(steps) }, spin_operations::<L>())
}

/// Cuts a panel into tiles. # Safety: see [`rows`].
unsafe fn walk<L: Lanes, const ALONG_ROWS: bool>(
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<L::Element>,
) {
    debug_assert!(width <= PANEL && segments.len() <= SEGMENTS_MAX);
    let strip = L::WIDTH * L::VECTORS;
    let mut here = [Segment::EMPTY; SEGMENTS_MAX];
    let here = &mut here[..segments.len()];
    for column in (0..width).step_by(strip) {
        let columns = strip.min(width - column);
        for row in (0..rows).step_by(L::ROWS) {
            let count = L::ROWS.min(rows - row);
            for (here, segment) in here.iter_mut().zip(segments) {
                let a = segment.a.wrapping_add(row * segment.row_step);
                *here = Segment { a, b: segment.b.wrapping_add(column), ..*segment };
            }
            let store = store.at(row, column);
            // SAFETY: the tile lies inside what the caller promised, or its output is the buffer below.
            unsafe {
                if columns.is_multiple_of(L::WIDTH) {
                    one::<L, ALONG_ROWS>(count, columns / L::WIDTH, here, store);
                } else {
                    // Whole vectors into a buffer, and from there the columns that exist.
                    let mut sums = [0f32; ROWS_MAX * PANEL];
                    let whole = Store::wide(sums.as_mut_ptr(), PANEL);
                    one::<L, ALONG_ROWS>(count, columns.div_ceil(L::WIDTH), here, whole);
                    finish(&sums, count, columns, store);
                }
            }
        }
    }
}

/// The scalar form of a tile's last step. # Safety: the outputs of `store` as in [`rows`], over rows x columns.
unsafe fn finish<E: Element>(sums: &[f32; ROWS_MAX * PANEL], rows: usize, columns: usize, store: Store<E>) {
    // SAFETY: as the caller promised.
    unsafe {
        for row in 0..rows {
            for column in 0..columns {
                let mut value = sums[row * PANEL + column];
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

/// Calls the tile of this size. # Safety: see [`tile`].
unsafe fn one<L: Lanes, const ALONG_ROWS: bool>(
    rows: usize,
    vectors: usize,
    segments: &[Segment],
    store: Store<L::Element>,
) {
    macro_rules! sizes {
        ($(($rows:literal, $vectors:literal)),*) => {
            match (rows, vectors) {
                $(($rows, $vectors) => {
                    // SAFETY: passed on to the caller; `L`'s processor is the one in use.
                    unsafe { L::run::<$rows, $vectors, ALONG_ROWS>(segments, store) }
                })*
                _ => unreachable!("a tile has at most 6 rows and 4 vectors"),
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

/// Plain Rust, for the compiler to vectorise.
struct Portable<E>(std::marker::PhantomData<E>);

/// `sum + a b`, fused where the baseline has the instruction.
#[inline(always)]
fn multiply_add(sum: f32, a: f32, b: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { a.mul_add(b, sum) } else { sum + a * b }
}

impl<E: PortableDot> Lanes for Portable<E> {
    type Element = E;
    type Sum = [f32; 4];
    type Word = [u32; 4];
    const WIDTH: usize = 4;
    const ROWS: usize = 4;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn words(p: *const u32) -> [u32; 4] {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[u32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn broadcast(word: u32) -> [u32; 4] {
        [word; 4]
    }
    #[inline(always)]
    unsafe fn dot(sum: [f32; 4], a: [u32; 4], b: [u32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| E::dot(sum[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 4] {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, sum: [f32; 4]) {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(sum) }
    }
    #[inline(always)]
    unsafe fn narrow(p: *mut E, sum: [f32; 4]) {
        // SAFETY: as the trait asks.
        unsafe { p.cast::<[E; 4]>().write_unaligned(sum.map(E::of)) }
    }
    unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
        segments: &[Segment],
        store: Store<E>,
    ) {
        // SAFETY: passed on to the caller.
        unsafe { tile::<Self, ROWS, VECTORS, ALONG_ROWS>(segments, store) }
    }
    unsafe fn spin(steps: usize) -> f32 {
        // SAFETY: passed on to the caller.
        unsafe { registers_only::<Self>(steps) }
    }
}

/// `sum + a b` of words.
trait PortableDot: Element {
    fn dot(sum: f32, a: u32, b: u32) -> f32;
}

impl PortableDot for f32 {
    #[inline(always)]
    fn dot(sum: f32, a: u32, b: u32) -> f32 {
        multiply_add(sum, f32::from_bits(a), f32::from_bits(b))
    }
}

impl PortableDot for bf16 {
    #[inline(always)]
    fn dot(sum: f32, a: u32, b: u32) -> f32 {
        let (low, high) = (|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & 0xFFFF_0000));
        multiply_add(multiply_add(sum, low(a), low(b)), high(a), high(b))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::marker::PhantomData;

    use half::bf16;

    use super::{Lanes, Segment, Store, registers_only, tile};

    /// The functions that run with the instructions enabled.
    macro_rules! enabled {
        ($element:ty, $features:literal) => {
            unsafe fn run<const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
                segments: &[Segment],
                store: Store<$element>,
            ) {
                #[target_feature(enable = $features)]
                unsafe fn run<L: Lanes, const ROWS: usize, const VECTORS: usize, const ALONG_ROWS: bool>(
                    segments: &[Segment],
                    store: Store<L::Element>,
                ) {
                    // SAFETY: passed on to the caller.
                    unsafe { tile::<L, ROWS, VECTORS, ALONG_ROWS>(segments, store) }
                }
                // SAFETY: passed on to the caller.
                unsafe { run::<Self, ROWS, VECTORS, ALONG_ROWS>(segments, store) }
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

    /// 32 registers of 16 lanes: 24 sums, 4 words of B, one of A.
    pub struct Avx512<E>(PhantomData<E>);

    /// What both element types do alike.
    macro_rules! avx512 {
        () => {
            type Sum = __m512;
            type Word = __m512i;
            const WIDTH: usize = 16;
            const ROWS: usize = 6;
            const VECTORS: usize = 4;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                // SAFETY: the processor has AVX-512, as the trait asks; so below.
                unsafe { _mm512_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn words(p: *const u32) -> __m512i {
                // SAFETY: as above, and p is valid for 16 words.
                unsafe { _mm512_loadu_si512(p.cast()) }
            }
            #[inline(always)]
            unsafe fn broadcast(word: u32) -> __m512i {
                // SAFETY: as above.
                unsafe { _mm512_set1_epi32(word as i32) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m512 {
                // SAFETY: as above, and p is valid for 16 values.
                unsafe { _mm512_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn splat(value: f32) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_set1_ps(value) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                // SAFETY: as above.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, sum: __m512) {
                // SAFETY: as above, and p is valid for 16 values.
                unsafe { _mm512_storeu_ps(p, sum) }
            }
        };
    }

    impl Lanes for Avx512<f32> {
        type Element = f32;
        avx512!();

        #[inline(always)]
        unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
            // SAFETY: the processor has AVX-512, as the trait asks.
            unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum) }
        }
        #[inline(always)]
        unsafe fn narrow(p: *mut f32, sum: __m512) {
            // SAFETY: as above, and p is valid for 16 values.
            unsafe { _mm512_storeu_ps(p, sum) }
        }
        enabled!(f32, "avx512f");
    }

    impl Lanes for Avx512<bf16> {
        type Element = bf16;
        avx512!();

        #[inline(always)]
        unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
            // SAFETY: the processor has AVX-512 BF16, as the trait asks; both types are 512 bits of anything.
            unsafe {
                let pairs = |words| std::mem::transmute::<__m512i, __m512bh>(words);
                _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
            }
        }
        #[inline(always)]
        unsafe fn narrow(p: *mut bf16, sum: __m512) {
            // SAFETY: as above, and p is valid for 16 values.
            unsafe {
                let half = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(sum));
                _mm256_storeu_si256(p.cast(), half);
            }
        }
        enabled!(bf16, "avx512f,avx512bf16");
    }

    /// 16 registers of 8 lanes: 12 sums, 2 words of B, one of A.
    pub struct Avx2<E>(PhantomData<E>);

    macro_rules! avx2 {
        () => {
            type Sum = __m256;
            type Word = __m256i;
            const WIDTH: usize = 8;
            const ROWS: usize = 6;
            const VECTORS: usize = 2;

            #[inline(always)]
            unsafe fn zero() -> __m256 {
                // SAFETY: the processor has AVX2 and FMA, as the trait asks; so below.
                unsafe { _mm256_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn words(p: *const u32) -> __m256i {
                // SAFETY: as above, and p is valid for 8 words.
                unsafe { _mm256_loadu_si256(p.cast()) }
            }
            #[inline(always)]
            unsafe fn broadcast(word: u32) -> __m256i {
                // SAFETY: as above.
                unsafe { _mm256_set1_epi32(word as i32) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m256 {
                // SAFETY: as above, and p is valid for 8 values.
                unsafe { _mm256_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn splat(value: f32) -> __m256 {
                // SAFETY: as above.
                unsafe { _mm256_set1_ps(value) }
            }
            #[inline(always)]
            unsafe fn add(a: __m256, b: __m256) -> __m256 {
                // SAFETY: as above.
                unsafe { _mm256_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m256, b: __m256) -> __m256 {
                // SAFETY: as above.
                unsafe { _mm256_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, sum: __m256) {
                // SAFETY: as above, and p is valid for 8 values.
                unsafe { _mm256_storeu_ps(p, sum) }
            }
        };
    }

    impl Lanes for Avx2<f32> {
        type Element = f32;
        avx2!();

        #[inline(always)]
        unsafe fn dot(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
            // SAFETY: the processor has FMA, as the trait asks.
            unsafe { _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum) }
        }
        #[inline(always)]
        unsafe fn narrow(p: *mut f32, sum: __m256) {
            // SAFETY: as above, and p is valid for 8 values.
            unsafe { _mm256_storeu_ps(p, sum) }
        }
        enabled!(f32, "avx2,fma");
    }

    impl Lanes for Avx2<bf16> {
        type Element = bf16;
        avx2!();

        /// A bf16 is the upper half of an f32, so the pair is two products of f32.
        #[inline(always)]
        unsafe fn dot(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
            // SAFETY: the processor has AVX2 and FMA, as the trait asks.
            unsafe {
                let low = |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
                let high = |w| _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xFFFF_0000_u32 as i32)));
                _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), sum))
            }
        }
        #[inline(always)]
        unsafe fn narrow(p: *mut bf16, sum: __m256) {
            let mut values = [0f32; 8];
            // SAFETY: as above; p is valid for 8 values.
            unsafe {
                _mm256_storeu_ps(values.as_mut_ptr(), sum);
                p.cast::<[bf16; 8]>().write_unaligned(values.map(<bf16 as crate::element::Element>::of));
            }
        }
        enabled!(bf16, "avx2,fma");
    }
}
