//! Tiles of bf16 pairs by AMX: eight registers of 16 rows by 64 bytes. Four hold sums, 32 rows by 32 columns of C, and two each A and B, so
//! that a product of two registers costs one load.
//!
//! A panel as it is packed is what AMX takes for B: 16 words of the sum by 16 columns, 256 bytes apart. A is read where it lies. Rust has
//! no stable intrinsics for these instructions, so they are assembled here; no other code of this process uses the registers.
//!
//! A product of two registers sums 16 words on its own before it adds them to C. Where these steps begin depends on the segments alone, and
//! words that the last step of a segment lacks are zeros, so a row's sums depend on its row of A and on B alone. All steps of a panel are taken
//! at once: with parts of them, sums would come and go (on Granite Rapids by 4,096 deep 12 steps at a time made 1,280 GFLOP/s, 48 made 1,650,
//! all 104 made 1,860).
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, "Intel AMX instruction set reference".

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use half::bf16;

use super::avx512::Avx512;
use super::lanes::{Lanes, finish_row};
use super::operands::{PANEL, SEGMENTS_MAX, Segment, Store};
use super::panel::transpose;
use crate::buffer::grown;

/// Rows of a register, and words of one of its rows.
const SIDE: usize = 16;
/// Rows and columns of C that are summed at once.
pub(super) const BLOCK: usize = 2 * SIDE;
/// Steps of which rows of A are copied, at most: those of outer products, which pack a quarter of a panel's depth at once, and last ones.
const STEPS_COPIED: usize = 32;

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; SIDE]);

impl Default for Line {
    fn default() -> Self {
        Self([0; SIDE])
    }
}

/// A thread's buffers.
#[derive(Default)]
struct Scratch {
    /// Sums of a block: two lines a row.
    sums: Vec<Line>,
    /// Words of B of the last steps of segments, up to whole steps.
    tails: Vec<Line>,
    /// Rows of A that do not lie as a register takes them.
    rows: Vec<Line>,
}

/// Bytes of a thread's buffers after products of `m` rows.
pub(super) fn scratch_bytes() -> usize {
    size_of::<Line>() * (4 * BLOCK + SEGMENTS_MAX * PANEL + BLOCK * STEPS_COPIED)
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

/// Whole steps of a segment, or its last one.
#[derive(Clone, Copy)]
struct Part {
    a: *const u8,
    row_step: usize,
    word_step: usize,
    words: usize,
    /// [`PANEL`] words for each of `words`, up to whole steps.
    b: *const u32,
}

impl Part {
    const EMPTY: Self = Self { a: std::ptr::null(), row_step: 0, word_step: 0, words: 0, b: std::ptr::null() };

    fn steps(&self) -> usize {
        self.words.div_ceil(SIDE)
    }

    /// Steps of which A does not lie as a register takes it.
    fn copied<const ALONG_ROWS: bool>(&self) -> usize {
        if ALONG_ROWS || !self.words.is_multiple_of(SIDE) { self.steps() } else { 0 }
    }
}

/// The shape of registers: a palette, and for each the bytes of a row, two from byte 16 on, and the rows, one from byte 48 on.
#[repr(C, align(64))]
struct Config([u8; 64]);

/// This thread's registers while they are in use. A thread that keeps them longer is slower to switch.
pub(crate) struct Tiles {
    rows: [usize; 2],
}

impl Tiles {
    /// Registers of 16 rows by 64 bytes, all zero.
    ///
    /// # Safety
    /// The system lets this process use tiles, and nobody on this thread does while the value lives.
    pub(crate) unsafe fn new() -> Self {
        let mut tiles = Self { rows: [0; 2] };
        // SAFETY: passed on to the caller.
        unsafe { tiles.shape(BLOCK) };
        tiles
    }

    /// Shapes them for `count` rows of A; all sums are lost.
    ///
    /// # Safety
    /// As above.
    unsafe fn shape(&mut self, count: usize) {
        // The second half is not used where there is none, but has a shape, so that both can be zeroed.
        let rows = if count > SIDE { [SIDE, count - SIDE] } else { [count; 2] };
        if rows == self.rows {
            return;
        }
        self.rows = rows;
        let [upper, lower] = rows.map(|rows| rows as u8);
        let whole = SIDE as u8;
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for (i, rows) in [upper, upper, lower, lower, upper, lower, whole, whole].into_iter().enumerate() {
            (config.0[16 + 2 * i], config.0[48 + i]) = (64, rows);
        }
        // SAFETY: as the caller promised; the configuration is 64 bytes, of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: who made the value uses tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// See [`rows`](super::rows).
///
/// # Safety
/// See there; the processor has AMX with bf16 and AVX-512 BF16, and the system lets this process use tiles.
pub(super) unsafe fn walk<const ALONG_ROWS: bool>(rows: usize, width: usize, segments: &[Segment], store: Store<bf16>) {
    debug_assert!(width <= PANEL && segments.len() <= SEGMENTS_MAX);
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: passed on to the caller.
        unsafe { panel::<ALONG_ROWS>(rows, width, segments, store, scratch) }
    });
}

/// # Safety
/// See [`walk`].
unsafe fn panel<const ALONG_ROWS: bool>(
    rows: usize,
    width: usize,
    segments: &[Segment],
    store: Store<bf16>,
    scratch: &mut Scratch,
) {
    let Scratch { sums, tails, rows: of_a } = scratch;
    let mut parts = [Part::EMPTY; 2 * SEGMENTS_MAX];
    // SAFETY: passed on to the caller.
    let count = unsafe { cut::<ALONG_ROWS>(segments, width, tails, &mut parts) };
    let parts = &parts[..count];
    let of_a = grown(of_a, BLOCK * parts.iter().map(Part::copied::<ALONG_ROWS>).sum::<usize>());
    let sums = grown(sums, 2 * BLOCK);
    let plain = store.scale == 1.0
        && store.bias.is_null()
        && store.row_add.is_null()
        && store.add.is_null()
        && !store.wide.is_null();
    // SAFETY: the caller's processor and system.
    let mut tiles = unsafe { Tiles::new() };
    for row in (0..rows).step_by(BLOCK) {
        let count = BLOCK.min(rows - row);
        let mut runs = [Run::EMPTY; 2 * SEGMENTS_MAX];
        // SAFETY: rows of A are the caller's; `of_a` has a line for each row of a block and each step that is copied.
        let runs = unsafe { runs_of::<ALONG_ROWS>(parts, row, count, of_a, &mut runs) };
        for column in (0..width).step_by(BLOCK) {
            let columns = BLOCK.min(width - column);
            let pair = columns > SIDE;
            let out = store.at(row, column);
            // Sums that are the output go there.
            let direct = plain && columns.is_multiple_of(SIDE);
            let (c, c_step) = if direct { (out.wide, out.step) } else { (sums.as_mut_ptr().cast(), BLOCK) };
            // SAFETY: rows of A, columns of B and the output are the caller's; sums are two lines a row.
            unsafe {
                tiles.shape(count);
                zero();
                for run in runs {
                    multiply(run.a, run.a_step, run.b.add(column), run.steps, count > SIDE, pair);
                }
                keep(c, c_step, count > SIDE, pair);
                if !direct {
                    send(c, count, columns, out);
                }
            }
        }
    }
}

/// Whole steps of one part, with the rows of A that a block multiplies.
#[derive(Clone, Copy)]
struct Run {
    a: *const u8,
    a_step: usize,
    b: *const u32,
    steps: usize,
}

impl Run {
    const EMPTY: Self = Self { a: std::ptr::null(), a_step: 0, b: std::ptr::null(), steps: 0 };
}

/// What `count` rows of A from `row` on multiply. What does not lie as a register takes it is copied to `to`, once for all columns.
///
/// # Safety
/// See [`walk`]; `to` has a line for each row of a block and each step that is copied.
unsafe fn runs_of<'r, const ALONG_ROWS: bool>(
    parts: &[Part],
    row: usize,
    count: usize,
    mut to: &mut [Line],
    runs: &'r mut [Run; 2 * SEGMENTS_MAX],
) -> &'r [Run] {
    for (part, run) in parts.iter().zip(&mut *runs) {
        let (mine, rest) = to.split_at_mut(BLOCK * part.copied::<ALONG_ROWS>());
        to = rest;
        // SAFETY: rows of A are the caller's, and `mine` has a line for each row of a block and each step that is copied.
        let (a, a_step) = unsafe { left::<ALONG_ROWS>(part, row, count, mine) };
        *run = Run { a, a_step, b: part.b, steps: part.steps() };
    }
    &runs[..parts.len()]
}

/// The same for few rows, with the sides exchanged: registers hold C transposed, so that A of the segments is `width` rows of W, which lie as
/// they are read, and B the packed words of at most [`PANEL`] rows of x. The sums have the bits of [`walk`]: a product is the same from
/// either side, and steps are those of the same segments. The `first` to read these rows of W asks for those behind them.
///
/// # Safety
/// As for [`rows`](super::rows) with `width` rows of A and `count` columns of B; the output is `count` x `width`. The processor and the system
/// as for [`walk`].
pub(super) unsafe fn walk_turned(count: usize, width: usize, segments: &[Segment], first: bool, store: Store<bf16>) {
    debug_assert!(count <= PANEL && segments.len() <= SEGMENTS_MAX);
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: passed on to the caller.
        unsafe { panel_turned(count, width, segments, first, store, scratch) }
    });
}

/// # Safety
/// See [`walk_turned`].
unsafe fn panel_turned(
    count: usize,
    width: usize,
    segments: &[Segment],
    first: bool,
    store: Store<bf16>,
    scratch: &mut Scratch,
) {
    let Scratch { sums, tails, rows: of_a } = scratch;
    let of_a = grown(of_a, BLOCK);
    let mut parts = [Part::EMPTY; 2 * SEGMENTS_MAX];
    // SAFETY: passed on to the caller.
    let n_parts = unsafe { cut::<false>(segments, count, tails, &mut parts) };
    let (turned, straight) = grown(sums, 4 * BLOCK).split_at_mut(2 * BLOCK);
    // SAFETY: the caller's processor and system.
    let mut tiles = unsafe { Tiles::new() };
    let passes = count.div_ceil(BLOCK);
    for row in (0..width).step_by(BLOCK) {
        let columns = BLOCK.min(width - row);
        for column in (0..count).step_by(BLOCK) {
            let rows = BLOCK.min(count - column);
            let out = store.at(column, row);
            let (more, pair) = (columns > SIDE, rows > SIDE);
            // SAFETY: rows of W, columns of x and the output are the caller's; sums are blocks of two lines a row.
            unsafe {
                tiles.shape(columns);
                zero();
                for part in &parts[..n_parts] {
                    let (a, a_step) = left::<false>(part, row, columns, of_a);
                    let (b, steps) = (part.b.add(column), part.steps());
                    if first && more && a_step == part.row_step {
                        // Each pass over a block asks for its share of the next one's rows; a copy of the last words has none.
                        let next = a.wrapping_add((BLOCK + column / passes) * a_step);
                        multiply_ahead(a, a_step, b, steps, pair, (next, passes == 1));
                    } else {
                        multiply(a, a_step, b, steps, more, pair);
                    }
                }
                keep(turned.as_mut_ptr().cast(), BLOCK, more, pair);
                flip(turned, straight);
                send(straight.as_ptr().cast(), rows, columns, out);
            }
        }
    }
}

/// Transposes a block.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn flip(from: &[Line], to: &mut [Line]) {
    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let at = |i: usize, j: usize, row: usize| 2 * (i * SIDE + row) + j;
        let mut square = [_mm512_setzero_si512(); SIDE];
        for (row, square) in square.iter_mut().enumerate() {
            // SAFETY: a line is a vector.
            *square = unsafe { _mm512_load_si512((&raw const from[at(i, j, row)]).cast()) };
        }
        transpose(&mut square);
        for (row, square) in square.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_store_si512((&raw mut to[at(j, i, row)]).cast(), square) };
        }
    }
}

/// All sums become zero.
///
/// # Safety
/// Tiles are in use.
#[inline(always)]
unsafe fn zero() {
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem, preserves_flags)
        );
    }
}

/// Cuts segments into whole steps and last ones, whose words of B are copied to `tails` with zeros behind them: behind those of the segment
/// lies the next one. Returns how many parts they are.
///
/// # Safety
/// See [`walk`].
unsafe fn cut<const ALONG_ROWS: bool>(
    segments: &[Segment],
    width: usize,
    tails: &mut Vec<Line>,
    parts: &mut [Part; 2 * SEGMENTS_MAX],
) -> usize {
    const LINES: usize = PANEL;
    let tails = grown(tails, SEGMENTS_MAX * LINES);
    let mut count = 0;
    let columns = width.next_multiple_of(SIDE);
    for (segment, tail) in segments.iter().zip(tails.as_chunks_mut::<LINES>().0) {
        let &Segment { a, row_step, word_step, words, b } = segment;
        let whole = words / SIDE * SIDE;
        if whole > 0 {
            parts[count] = Part { a, row_step, word_step, words: whole, b };
            count += 1;
        }
        if whole < words {
            let tail: *mut u32 = tail.as_mut_ptr().cast();
            for word in 0..SIDE {
                // SAFETY: the tail is 16 words of 64 columns, and the segment's words are the caller's.
                unsafe {
                    let to = tail.add(word * PANEL);
                    if whole + word < words {
                        to.copy_from_nonoverlapping(b.add((whole + word) * PANEL), columns);
                    } else {
                        to.write_bytes(0, columns);
                    }
                }
            }
            let a = a.wrapping_add(whole * if ALONG_ROWS { word_step } else { size_of::<u32>() });
            parts[count] = Part { a, row_step, word_step, words: words - whole, b: tail };
            count += 1;
        }
    }
    count
}

/// `count` rows of A from `row` on for a part, and the bytes from one to the next: where they lie, or copied to `to`, so that a row's words
/// are beside each other and up to a whole step.
///
/// # Safety
/// See [`walk`].
unsafe fn left<const ALONG_ROWS: bool>(part: &Part, row: usize, count: usize, to: &mut [Line]) -> (*const u8, usize) {
    let (words, lines) = (part.words, part.steps());
    let a = part.a.wrapping_add(row * part.row_step);
    let line = size_of::<Line>();
    if ALONG_ROWS {
        debug_assert_eq!(part.row_step, size_of::<u32>());
        // SAFETY: as the caller promised; `to` has a line for each row and step.
        unsafe { turn(a, part.word_step, words, count, &mut to[..count.next_multiple_of(SIDE) * lines]) };
        return (to.as_ptr().cast(), lines * line);
    }
    if words.is_multiple_of(SIDE) {
        return (a, part.row_step);
    }
    for (i, to) in to[..count].iter_mut().enumerate() {
        *to = Line::default();
        // SAFETY: as the caller promised; there are fewer words than a line takes.
        unsafe { a.add(i * part.row_step).copy_to_nonoverlapping(to.0.as_mut_ptr().cast(), words * size_of::<u32>()) };
    }
    (to.as_ptr().cast(), line)
}

/// Lays `count` neighbouring words at each of `words` places, `step` bytes apart, out as so many rows of whole lines, zeros behind them.
///
/// # Safety
/// They are readable, and the processor has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn turn(a: *const u8, step: usize, words: usize, count: usize, to: &mut [Line]) {
    let lines = words.div_ceil(SIDE);
    for line in 0..lines {
        for first in (0..count).step_by(SIDE) {
            let mask = (u32::MAX >> (2 * SIDE - SIDE.min(count - first))) as u16;
            let mut square = [_mm512_setzero_si512(); SIDE];
            for (word, square) in square.iter_mut().enumerate().take(words - line * SIDE) {
                let from = a.wrapping_add((line * SIDE + word) * step + first * size_of::<u32>());
                // SAFETY: the mask keeps the load to the words that there are.
                *square = unsafe { _mm512_maskz_loadu_epi32(mask, from.cast()) };
            }
            transpose(&mut square);
            for (row, square) in square.into_iter().enumerate() {
                // SAFETY: a line is a vector.
                unsafe { _mm512_store_si512((&raw mut to[(first + row) * lines + line]).cast(), square) };
            }
        }
    }
}

/// Sums to memory: the first 16 rows, and the others if there are `more`, of 16 columns or of a `pair` of these.
///
/// # Safety
/// It is writable; tiles are shaped for it.
#[inline(always)]
unsafe fn keep(c: *mut f32, step: usize, more: bool, pair: bool) {
    let (step, below) = (step * size_of::<f32>(), c.wrapping_add(SIDE * step));
    // SAFETY: as the caller promised.
    unsafe {
        asm!("tilestored [{c}+{step}*1], tmm0", c = in(reg) c, step = in(reg) step, options(nostack));
        if pair {
            asm!("tilestored [{c}+{step}*1+64], tmm1", c = in(reg) c, step = in(reg) step, options(nostack));
        }
        if more {
            asm!("tilestored [{c}+{step}*1], tmm2", c = in(reg) below, step = in(reg) step, options(nostack));
        }
        if more && pair {
            asm!("tilestored [{c}+{step}*1+64], tmm3", c = in(reg) below, step = in(reg) step, options(nostack));
        }
    }
}

/// Adds `steps` products to the sums.
///
/// # Safety
/// A has rows of whole steps, `a_step` bytes apart, B a panel's words; tiles are shaped for the rows.
#[inline(always)]
unsafe fn multiply(a: *const u8, a_step: usize, b: *const u32, steps: usize, more: bool, pair: bool) {
    let below = a.wrapping_add(SIDE * a_step);
    macro_rules! steps {
        ($($line:literal),* $(,)?) => {
            asm!(
                "2:",
                $($line,)*
                "add {a}, 64",
                "add {below}, 64",
                "add {b}, 4096",
                "dec {steps}",
                "jnz 2b",
                a = inout(reg) a => _,
                below = inout(reg) below => _,
                b = inout(reg) b => _,
                steps = inout(reg) steps => _,
                a_step = in(reg) a_step,
                b_step = in(reg) PANEL * size_of::<u32>(),
                options(nostack, readonly),
            )
        };
    }
    // SAFETY: as the caller promised; a step is a line of A and 16 words of B.
    unsafe {
        match (more, pair) {
            (true, true) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b}+{b_step}*1+64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            ),
            (true, false) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
            ),
            (false, true) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b}+{b_step}*1+64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
            ),
            (false, false) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
            ),
        }
    }
}

/// As [`multiply`] for 32 rows of A, and asks for those that come next: from `next` on all 32, or 16. W comes from memory as fast as that
/// goes only if it is asked for all the time: 16 lines of a register at once are as many as a core waits for.
///
/// # Safety
/// As there. Where the next rows lie there may be nothing.
#[inline(always)]
unsafe fn multiply_ahead(
    a: *const u8,
    a_step: usize,
    b: *const u32,
    steps: usize,
    pair: bool,
    (next, all): (*const u8, bool),
) {
    let below = a.wrapping_add(SIDE * a_step);
    // To the second cache: a block of rows is as large as the first.
    macro_rules! four {
        () => {
            "prefetcht1 [{row}]
            prefetcht1 [{row}+{a_step}]
            prefetcht1 [{row}+{a_step}*2]
            prefetcht1 [{row}+{three}]
            lea {row}, [{row}+{a_step}*4]"
        };
    }
    macro_rules! steps {
        ($($line:expr),* $(,)?) => {
            asm!(
                "2:",
                "mov {row}, {next}",
                $($line,)*
                "add {a}, 64",
                "add {below}, 64",
                "add {next}, 64",
                "add {b}, 4096",
                "dec {steps}",
                "jnz 2b",
                a = inout(reg) a => _,
                below = inout(reg) below => _,
                next = inout(reg) next => _,
                b = inout(reg) b => _,
                steps = inout(reg) steps => _,
                row = out(reg) _,
                a_step = in(reg) a_step,
                three = in(reg) 3 * a_step,
                b_step = in(reg) PANEL * size_of::<u32>(),
                options(nostack, readonly),
            )
        };
    }
    // SAFETY: as the caller promised; a prefetch of any address is harmless.
    unsafe {
        match (pair, all) {
            (true, true) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                four!(),
                four!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b}+{b_step}*1+64]",
                four!(),
                four!(),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                four!(),
                four!(),
                "tdpbf16ps tmm2, tmm5, tmm6",
                four!(),
                four!(),
                "tdpbf16ps tmm3, tmm5, tmm7",
            ),
            (false, true) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                four!(),
                four!(),
                four!(),
                four!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                four!(),
                four!(),
                four!(),
                four!(),
                "tdpbf16ps tmm2, tmm5, tmm6",
            ),
            (true, false) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                four!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b}+{b_step}*1+64]",
                four!(),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                four!(),
                "tdpbf16ps tmm2, tmm5, tmm6",
                four!(),
                "tdpbf16ps tmm3, tmm5, tmm7",
            ),
            (false, false) => steps!(
                "tileloadd tmm6, [{b}+{b_step}*1]",
                "tileloadd tmm4, [{a}+{a_step}*1]",
                four!(),
                four!(),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{below}+{a_step}*1]",
                four!(),
                four!(),
                "tdpbf16ps tmm2, tmm5, tmm6",
            ),
        }
    }
}

/// Sends the sums of a block on their way.
///
/// # Safety
/// They are `count` rows of [`BLOCK`]; the output is as in [`walk`], over `count` x `columns`. The processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn send(sums: *const f32, count: usize, columns: usize, out: Store<bf16>) {
    type L = Avx512<bf16>;
    // SAFETY: as the caller promised.
    unsafe {
        match columns {
            BLOCK => {
                for row in 0..count {
                    let sums = sums.add(row * BLOCK);
                    finish_row::<L, 2>([L::load(sums), L::load(sums.add(SIDE))], out, row);
                }
            }
            SIDE => {
                for row in 0..count {
                    finish_row::<L, 1>([L::load(sums.add(row * BLOCK))], out, row);
                }
            }
            _ => super::finish(sums, BLOCK, count, columns, out),
        }
    }
}

/// `steps` times four products on registers alone: what they sum up to.
///
/// # Safety
/// The processor has AMX with bf16, and the system lets this process use tiles.
pub(super) unsafe fn spin(steps: usize) -> f32 {
    let mut sums = [Line::default(); SIDE];
    // SAFETY: as the caller promised; configuring zeroes the registers.
    unsafe {
        let _tiles = Tiles::new();
        if steps > 0 {
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {steps}",
                "jnz 2b",
                steps = inout(reg) steps => _,
                options(nostack, nomem),
            );
        }
        keep(sums.as_mut_ptr().cast(), SIDE, false, false);
    }
    f32::from_bits(sums[0].0[0])
}

/// Operations of one step of [`spin`]: two for each multiply-add.
pub(super) const SPIN_OPERATIONS: usize = 4 * 2 * SIDE * SIDE * 2 * SIDE;
