//! Products with frozen weights and small dense ones, together in one pass over the output: `C = scale Σ A B + …`.
//!
//! A task packs a panel of 64 columns of B (see `panel`) and multiplies all rows of A by it (see `tile`). The terms of one
//! sum, such as a frozen weight and the adapter beside it, follow each other in the same registers, so an adapter costs its
//! multiplications and no pass of its own. What an element of C is does not depend on how the work is cut into tasks.

use std::cell::RefCell;
use std::ops::Range;

use crate::cpu::{Cpu, cpu};
use crate::int8::{self, Packed, Rounded};
use crate::panel::{narrow, pack_columns, pack_rows, pack_rows_padded, pair_rows};
use crate::pool::{Shared, for_each, threads};
use crate::tile::{PANEL, SEGMENTS_MAX, Segment, Store, TileElement, rows};
use crate::{Matrix, RowOrder};

/// Words of the sum that are packed at once: 416 KiB of panel, which stays in the second-level cache, and enough for two
/// widths of 1,536 in bf16 with their adapters in one sum.
const DEPTH: usize = 1664;
/// The same in rounds, see [`product`]: what some hundred rows of A have of so many words stays in the second-level cache too.
const DEPTH_OF_ROUND: usize = 512;
/// The same where a panel is decoded in pieces of [`WIDE`] columns, whose scratch is as large again.
const DEPTH_WIDE: usize = 384;
/// Columns that are decoded together where a weight's blocks are longer than a panel: those of ggml's K-quants.
const WIDE: usize = 256;

/// Rows of A: row i starts at `values[at + i * step]`.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a, E> {
    /// All rows.
    pub values: &'a [E],
    /// Where row 0 starts.
    pub at: usize,
    /// Values from one row to the next.
    pub step: usize,
}

impl<'a, E> Left<'a, E> {
    /// Rows of `step` values, one after another.
    pub fn rows(values: &'a [E], step: usize) -> Self {
        Self { values, at: 0, step }
    }

    /// The rows from column `at` on.
    pub fn from(self, at: usize) -> Self {
        Self { at: self.at + at, ..self }
    }
}

/// B of a term.
#[derive(Clone, Copy, Debug)]
pub enum Right<'a, E> {
    /// A frozen weight.
    Frozen(Matrix<'a>),
    /// A frozen weight that is multiplied in integers, see [`Matrix::multiplies_in_integers`]: A is rounded to eight bits.
    Integers(Matrix<'a>),
    /// Values (rows, cols), row-major.
    Dense {
        /// The values.
        values: &'a [E],
        /// Columns.
        cols: usize,
    },
}

impl<E> Right<'_, E> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Frozen(matrix) | Self::Integers(matrix) => (matrix.rows, matrix.cols),
            Self::Dense { values, cols } => (values.len() / cols.max(&1), *cols),
        }
    }
}

/// One product in a sum: `A Wᵀ` (forward) or `A W` (backward in the input).
#[derive(Clone, Copy, Debug)]
pub struct Term<'a, E> {
    /// A (m, k).
    pub left: Left<'a, E>,
    /// W: (n, k) if `transposed`, else (k, n).
    pub right: Right<'a, E>,
    /// Whether W is transposed.
    pub transposed: bool,
}

impl<'a, E> Term<'a, E> {
    /// `A Wᵀ`, W (n, k).
    pub fn forward(left: Left<'a, E>, right: Right<'a, E>) -> Self {
        Self { left, right, transposed: true }
    }

    /// `A W`, W (k, n).
    pub fn backward(left: Left<'a, E>, right: Right<'a, E>) -> Self {
        Self { left, right, transposed: false }
    }

    fn depth(&self) -> usize {
        let (rows, cols) = self.right.shape();
        if self.transposed { cols } else { rows }
    }

    fn width(&self) -> usize {
        let (rows, cols) = self.right.shape();
        if self.transposed { rows } else { cols }
    }
}

/// Neighbouring columns of the output that are one sum of terms.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, E> {
    /// The terms, all of one width.
    pub terms: &'a [Term<'a, E>],
    /// First column in the output.
    pub at: usize,
    /// Added to every row.
    pub bias: Option<&'a [f32]>,
}

/// Where the sums go.
#[derive(Debug)]
pub enum Output<'a, E> {
    /// Replace f32 values.
    Wide(&'a mut [f32]),
    /// Are added to f32 values.
    Add(&'a mut [f32]),
    /// Replace E values.
    Narrow(&'a mut [E]),
}

impl<E> Output<'_, E> {
    fn len(&self) -> usize {
        match self {
            Self::Wide(values) | Self::Add(values) => values.len(),
            Self::Narrow(values) => values.len(),
        }
    }
}

/// What is done to every sum on its way out.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a> {
    /// Factor.
    pub scale: f32,
    /// One addend a row.
    pub row_add: Option<&'a [f32]>,
}

impl Default for Finish<'_> {
    fn default() -> Self {
        Self { scale: 1.0, row_add: None }
    }
}

/// Computes `m` rows of all `columns` into `out`, whose rows are `step` values apart.
///
/// # Panics
/// When sizes disagree, columns overlap, a sum has more terms than a tile takes, or a depth is odd for bf16.
pub fn product<E: ProductElement>(
    m: usize,
    columns: &[Columns<'_, E>],
    out: Output<'_, E>,
    step: usize,
    finish: Finish,
) {
    let (mut end, columns_before) = (0, columns);
    for (index, columns) in columns.iter().enumerate() {
        let first = columns.terms.first().expect("a sum has a term");
        let n = first.width();
        assert!(columns.terms.len() <= SEGMENTS_MAX / 2, "a sum of {} terms", columns.terms.len());
        for term in columns.terms {
            let (depth, left) = (term.depth(), term.left);
            assert!(term.width() == n && depth.is_multiple_of(E::PER_WORD), "a term of {} x {depth}", term.width());
            assert!(depth <= left.step || m <= 1, "rows of {} values for a depth of {depth}", left.step);
            assert!(fits(m, left.at, left.step, depth, left.values.len()), "A is short");
            match term.right {
                Right::Dense { values, cols } => {
                    assert!(cols > 0 && values.len().is_multiple_of(cols), "W is not whole rows of {cols}");
                }
                Right::Integers(matrix) => assert!(matrix.multiplies_in_integers(), "W in integers"),
                Right::Frozen(_) => (),
            }
        }
        assert!(fits(1, columns.at, 0, n, step), "columns out of place");
        assert!(columns.bias.is_none_or(|bias| bias.len() == n), "a bias for each of {n} columns");
        for other in &columns_before[..index] {
            let other = other.at..other.at + other.terms[0].width();
            assert!(columns.at >= other.end || columns.at + n <= other.start, "columns {other:?} are written twice");
        }
        end = end.max(columns.at + n);
    }
    assert!(fits(m, 0, step, end, out.len()), "the output is short");
    assert!(finish.row_add.is_none_or(|values| values.len() >= m), "an addend for every row");
    if m == 0 {
        return;
    }
    let cpu = cpu();
    let (wide, narrow, add) = match out {
        Output::Wide(values) => (values.as_mut_ptr(), std::ptr::null_mut(), false),
        Output::Add(values) => (values.as_mut_ptr(), std::ptr::null_mut(), true),
        Output::Narrow(values) => (std::ptr::null_mut(), values.as_mut_ptr(), false),
    };
    let store = Store {
        scale: finish.scale,
        bias: std::ptr::null(),
        row_add: finish.row_add.map_or(std::ptr::null(), <[f32]>::as_ptr),
        add: if add { wide } else { std::ptr::null() },
        add_step: step,
        wide,
        narrow,
        step,
    };
    let tasks = cut(m, columns);
    let integers = Integers::of(cpu, m, columns);
    let in_output = !store.wide.is_null() && !add;
    let groups: Vec<Vec<Vec<Piece>>> = columns.iter().map(|columns| group(columns.terms, in_output)).collect();
    // Sums that are too deep for one panel are taken a group of pieces at a time. Where they can wait in the output, that is in
    // rounds, one group for all panels, so that a thread's panels find their part of A in its cache.
    let rounds = if in_output { groups.iter().map(Vec::len).max().unwrap_or(1) } else { 1 };
    let store = SharedStore(store);
    for round in 0..rounds {
        for_each(tasks.len(), |index| {
            let task = &tasks[index];
            let all = &groups[task.columns];
            let now = if in_output { round..(round + 1).min(all.len()) } else { 0..all.len() };
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: the asserts above hold for all of A, W and the output; a task writes the rows and columns that it
                // was cut for, and no two tasks have an element in common.
                unsafe {
                    let rounded = (&integers, integers.places[task.columns].as_slice());
                    run(cpu, task, &columns[task.columns], rounded, (all, now), in_output, store.get(), scratch);
                };
            });
        });
    }
}

/// Whether `m` rows of `width` values, the first at `at` and the others `step` apart, lie within `len`.
fn fits(m: usize, at: usize, step: usize, width: usize, len: usize) -> bool {
    let Some(last) = m.checked_sub(1) else { return true };
    let end = last.checked_mul(step).and_then(|start| start.checked_add(at)?.checked_add(width));
    end.is_some_and(|end| end <= len)
}

/// A of all terms in integers, rounded.
struct Integers {
    rounded: Vec<Rounded>,
    /// For each sum and each of its terms, which of them it is.
    places: Vec<Vec<usize>>,
}

impl Integers {
    fn of<E: ProductElement>(cpu: Cpu, m: usize, columns: &[Columns<'_, E>]) -> Self {
        let (mut rounded, mut made) = (Vec::new(), Vec::new());
        let mut place = |term: &Term<'_, E>| {
            let Right::Integers(matrix) = term.right else { return usize::MAX };
            let left = term.left;
            // Backward, the scales of W's rows are A's columns', so that A is another one for each weight.
            let on_line = matrix.line().is_some();
            let scales = (!term.transposed && on_line).then(|| matrix.integer_scales(0..matrix.rows));
            let key = (left.values.as_ptr(), left.at, term.depth(), scales.is_none());
            if let Some((_, known)) = made.iter().find(|(other, _)| *other == key && scales.is_none()) {
                return *known;
            }
            rounded.push(int8::round(cpu, m, term.depth(), left, scales.as_deref()));
            made.push((key, rounded.len() - 1));
            rounded.len() - 1
        };
        let places = columns.iter().map(|columns| columns.terms.iter().map(&mut place).collect()).collect();
        Self { rounded, places }
    }
}

/// An output that tasks share.
struct SharedStore<E>(Store<E>);
// SAFETY: tasks write disjoint elements, see `product`.
unsafe impl<E> Sync for SharedStore<E> {}
impl<E> SharedStore<E> {
    fn get(&self) -> Store<E> {
        self.0
    }
}

/// A part of the output.
struct Task {
    /// Index of its columns.
    columns: usize,
    /// First of its columns, counted within them.
    from: usize,
    /// How many.
    width: usize,
    /// Its rows.
    rows: Range<usize>,
}

/// Cuts the output into panels, and panels at the end, or all if there are few, into parts of their rows, so that no thread
/// is left waiting for another's whole panel.
fn cut<E>(m: usize, columns: &[Columns<'_, E>]) -> Vec<Task> {
    const PARTS: usize = 4;
    let mut panels = Vec::new();
    for (index, columns) in columns.iter().enumerate() {
        let n = columns.terms[0].width();
        let wide = columns.terms.iter().any(decodes_wide);
        let width = if wide { WIDE } else { PANEL };
        panels.extend((0..n).step_by(width).map(|from| (index, from, width.min(n - from))));
    }
    let threads = threads();
    let split = match panels.len() % threads {
        _ if threads == 1 || m < 24 => 0,
        _ if panels.len() < 2 * threads => panels.len(),
        rest => threads + rest,
    };
    let whole = panels.len() - split.min(panels.len());
    let part = m.div_ceil(PARTS).next_multiple_of(6);
    let mut tasks = Vec::with_capacity(panels.len() + PARTS * split);
    for (number, (columns, from, width)) in panels.into_iter().enumerate() {
        let size = if number < whole { m } else { part };
        let parts = (0..m).step_by(size.max(1)).map(|row| row..m.min(row + size));
        tasks.extend(parts.map(|rows| Task { columns, from, width, rows }));
    }
    tasks
}

/// Whether a term's weight is decoded more than a panel at a time: backward, by blocks that are longer.
fn decodes_wide<E>(term: &Term<'_, E>) -> bool {
    match term.right {
        Right::Frozen(matrix) => !term.transposed && matrix.block_len() > PANEL,
        Right::Integers(_) | Right::Dense { .. } => false,
    }
}

/// A thread's buffers; they keep their size.
#[derive(Default)]
struct Scratch {
    /// The packed panel.
    panel: Vec<u32>,
    /// The same in integers.
    packed: Packed,
    /// Decoded values for one panel.
    decoded: Vec<u32>,
    /// Decoded values for all panels of a wide task.
    all: Vec<u32>,
    /// A decoded row on its way to bf16.
    floats: Vec<f32>,
    /// Sums of earlier groups.
    sums: Vec<f32>,
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

/// The first `len` of a buffer, grown if need be.
pub(crate) fn grown<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// A part of a term's sum.
#[derive(Clone, Copy)]
struct Piece {
    term: usize,
    /// First value of the sum.
    from: usize,
    /// Words of the sum.
    words: usize,
}

/// Computes the groups `now` of one task's sums.
///
/// # Safety
/// See [`product`].
#[allow(clippy::too_many_arguments)]
unsafe fn run<E: ProductElement>(
    cpu: Cpu,
    task: &Task,
    columns: &Columns<'_, E>,
    integers: (&Integers, &[usize]),
    (groups, now): (&[Vec<Piece>], Range<usize>),
    in_output: bool,
    store: Store<E>,
    scratch: &mut Scratch,
) {
    let wide = task.width > PANEL;
    let Scratch { panel, packed, decoded, all, floats, sums } = scratch;
    let panel = grown(panel, DEPTH * PANEL);
    let m = task.rows.len();
    // Sums of all but the last group wait in the output or here.
    let (sums, step) = if in_output {
        (target(store, columns, task, 0).wide, store.step)
    } else {
        let step = task.width.next_multiple_of(PANEL);
        let wait = groups.len() > 1 || in_integers(columns, &groups[0]);
        (if wait { grown(sums, m * step).as_mut_ptr() } else { std::ptr::null_mut() }, step)
    };
    for (number, group) in groups.iter().enumerate().take(now.end).skip(now.start) {
        let (first, last) = (number == 0, number + 1 == groups.len());
        if in_integers(columns, group) {
            for from in (0..task.width).step_by(PANEL) {
                let width = PANEL.min(task.width - from);
                let waiting = sums.wrapping_add(from);
                // SAFETY: `sums` holds m rows of `step`.
                unsafe {
                    whole_numbers(cpu, task, columns, integers, group, (from, width), (waiting, step), packed);
                    if last {
                        finish(cpu, m, width, waiting, step, target(store, columns, task, from));
                    }
                }
            }
            continue;
        }
        // What a wide task decodes for all of its panels; narrow ones decode as they pack.
        let shared = if wide { Some(decode_wide(cpu, task, columns, group, all, floats)) } else { None };
        for from in (0..task.width).step_by(PANEL) {
            let width = PANEL.min(task.width - from);
            let mut segments = [Segment::EMPTY; SEGMENTS_MAX];
            let (mut at, mut starts) = (0, 0);
            for (piece, segment) in group.iter().zip(&mut segments) {
                let term = &columns.terms[piece.term];
                let out = &mut panel[at * PANEL..(at + piece.words) * PANEL];
                let depth = piece.words * E::PER_WORD;
                match (&shared, term.right) {
                    (Some(all), Right::Frozen(_)) if !term.transposed => {
                        let values = &E::of_words(all)[starts..starts + depth * task.width];
                        pack_rows(cpu, &values[from..], task.width, depth, width, out);
                        starts += depth * task.width;
                    }
                    _ => pack(cpu, term, piece.from, depth, task.from + from, width, out, decoded, floats),
                }
                let left = &term.left;
                *segment = Segment {
                    a: left.values[left.at + task.rows.start * left.step + piece.from..].as_ptr().cast(),
                    row_step: left.step * size_of::<E>(),
                    word_step: size_of::<u32>(),
                    words: piece.words,
                    b: out.as_ptr(),
                };
                at += piece.words;
            }
            let segments = &segments[..group.len()];
            let waiting = sums.wrapping_add(from);
            let target = match (first, last) {
                (true, true) => target(store, columns, task, from),
                (true, false) => Store::wide(waiting, step),
                (false, false) => Store::adding(waiting, step),
                // With nothing that goes in between, the sums so far are an addend.
                (false, true) if store.scale == 1.0 && store.add.is_null() && store.wide.is_null() => {
                    Store { add: waiting, add_step: step, ..target(store, columns, task, from) }
                }
                (false, true) => {
                    // The sums so far go in before scale, bias and addends do.
                    // SAFETY: `sums` holds m rows of `step`; A and B are as large as the segments say.
                    unsafe {
                        rows::<E, false>(cpu, m, width, segments, Store::adding(waiting, step));
                        finish(cpu, m, width, waiting, step, target(store, columns, task, from));
                    }
                    continue;
                }
            };
            // SAFETY: as above; the output is the task's own.
            unsafe { rows::<E, false>(cpu, m, width, segments, target) };
        }
    }
}

/// Whether a group is of terms in integers.
fn in_integers<E>(columns: &Columns<'_, E>, group: &[Piece]) -> bool {
    group.first().is_some_and(|piece| matches!(columns.terms[piece.term].right, Right::Integers(_)))
}

/// The sums of the terms in integers, for a panel of a task's columns.
///
/// # Safety
/// `sums` is writable over the task's rows by the panel's columns.
#[allow(clippy::too_many_arguments)]
unsafe fn whole_numbers<E: ProductElement>(
    cpu: Cpu,
    task: &Task,
    columns: &Columns<'_, E>,
    (integers, places): (&Integers, &[usize]),
    group: &[Piece],
    (from, width): (usize, usize),
    (sums, step): (*mut f32, usize),
    packed: &mut Packed,
) {
    let mut add = false;
    for piece in group {
        let term = &columns.terms[piece.term];
        let (Right::Integers(matrix), rounded) = (term.right, &integers.rounded[places[piece.term]]) else { continue };
        let columns = task.from + from..task.from + from + width;
        let factors = (term.transposed && matrix.line().is_some()).then(|| matrix.integer_scales(columns.clone()));
        for (chunk, start) in (0..term.depth()).step_by(int8::CHUNK).enumerate() {
            let part = start..term.depth().min(start + int8::CHUNK);
            int8::pack(cpu, &matrix, !term.transposed, part, columns.clone(), packed);
            let factors = factors.as_ref().map_or(std::ptr::null(), |factors| factors.as_ptr());
            let to = int8::Sums { out: sums, step, add, factors };
            // SAFETY: the caller's sums, and as many factors as columns.
            unsafe { int8::rows(cpu, rounded, task.rows.clone(), chunk, packed, width, to) };
            add = true;
        }
    }
}

/// The output at a task's rows and its columns from `from` on.
fn target<E>(store: Store<E>, columns: &Columns<'_, E>, task: &Task, from: usize) -> Store<E> {
    let (row, within) = (task.rows.start, task.from + from);
    let column = columns.at + within;
    let place = row * store.step + column;
    let shift = |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
    Store {
        bias: columns.bias.map_or(std::ptr::null(), |bias| bias[within..].as_ptr()),
        row_add: shift(store.row_add, row),
        add: shift(store.add, place),
        wide: if store.wide.is_null() { store.wide } else { store.wide.wrapping_add(place) },
        narrow: if store.narrow.is_null() { store.narrow } else { store.narrow.wrapping_add(place) },
        ..store
    }
}

/// Sends sums that waited in a buffer on their way.
///
/// # Safety
/// `sums` is readable and the output of `store` writable over m x width.
unsafe fn finish<E: ProductElement>(cpu: Cpu, m: usize, width: usize, sums: *const f32, step: usize, store: Store<E>) {
    for row in 0..m {
        // SAFETY: as the caller promised.
        unsafe {
            let sums = std::slice::from_raw_parts(sums.add(row * step), width);
            let part = |p: *const f32| if p.is_null() { None } else { Some(std::slice::from_raw_parts(p, width)) };
            let row_add = if store.row_add.is_null() { 0.0 } else { *store.row_add.add(row) };
            let add = if store.add.is_null() { None } else { part(store.add.add(row * store.add_step)) };
            let mut values = [0f32; PANEL];
            let values = &mut values[..width];
            values.copy_from_slice(sums);
            finish_row(cpu, values, store.scale, part(store.bias), row_add, add);
            if store.wide.is_null() {
                narrow(cpu, values, std::slice::from_raw_parts_mut(store.narrow.add(row * store.step), width));
            } else {
                std::slice::from_raw_parts_mut(store.wide.add(row * store.step), width).copy_from_slice(values);
            }
        }
    }
}

crate::cpu::per_cpu! {
    fn finish_row(values: &mut [f32], scale: f32, bias: Option<&[f32]>, row_add: f32, add: Option<&[f32]>) {
        for value in values.iter_mut() {
            *value *= scale;
        }
        for (value, bias) in values.iter_mut().zip(bias.unwrap_or(&[])) {
            *value += bias;
        }
        for value in values.iter_mut() {
            *value += row_add;
        }
        for (value, add) in values.iter_mut().zip(add.unwrap_or(&[])) {
            *value += add;
        }
    }
}

/// Cuts the terms' sums into groups of as many words as a panel takes, in order, those in integers before the others.
fn group<E: ProductElement>(terms: &[Term<'_, E>], in_rounds: bool) -> Vec<Vec<Piece>> {
    let per_word = E::PER_WORD;
    let (integers, others): (Vec<_>, Vec<_>) =
        terms.iter().enumerate().partition(|(_, term)| matches!(term.right, Right::Integers(_)));
    let total: usize = others.iter().map(|(_, term)| term.depth() / per_word).sum();
    let depth = match terms.iter().any(decodes_wide) {
        true => DEPTH_WIDE,
        false if in_rounds && total > DEPTH => DEPTH_OF_ROUND,
        false => DEPTH,
    };
    // Terms in integers are a group of their own, each whole.
    let whole = |(term, of): (usize, &Term<'_, E>)| Piece { term, from: 0, words: of.depth() / per_word };
    let mut groups = vec![integers.into_iter().map(whole).collect::<Vec<Piece>>()];
    let mut room = if groups[0].is_empty() { depth } else { 0 };
    for (index, term) in others {
        let (mut from, mut words) = (0, term.depth() / per_word);
        while words > 0 {
            if room == 0 {
                groups.push(Vec::new());
                room = depth;
            }
            let count = words.min(room);
            groups.last_mut().expect("there is a first group").push(Piece { term: index, from, words: count });
            (from, words, room) = (from + count * per_word, words - count, room - count);
        }
    }
    groups
}

/// Packs `depth` values of a term's sum from `from` on, for `width` columns from `column` on.
#[allow(clippy::too_many_arguments)]
fn pack<E: ProductElement>(
    cpu: Cpu,
    term: &Term<'_, E>,
    from: usize,
    depth: usize,
    column: usize,
    width: usize,
    out: &mut [u32],
    decoded: &mut Vec<u32>,
    floats: &mut Vec<f32>,
) {
    let words = depth / E::PER_WORD;
    match (term.right, term.transposed) {
        (Right::Dense { values, cols }, false) => {
            pack_rows(cpu, &values[from * cols + column..], cols, depth, width, out);
        }
        (Right::Dense { values, cols }, true) => {
            let row = |j| values[(column + j) * cols + from..][..depth].as_ptr().cast::<u8>();
            // SAFETY: each row was sliced to `depth` values.
            unsafe { pack_all(cpu, row, width, words, out) };
        }
        (Right::Frozen(matrix), true) => {
            if matrix.row_of::<E>(column).is_some() {
                let row = |j| {
                    let row = matrix.row_of::<E>(column + j).expect("all rows of a weight are stored alike");
                    row[from * size_of::<E>()..][..depth * size_of::<E>()].as_ptr()
                };
                // SAFETY: each row was sliced to `depth` values.
                return unsafe { pack_all(cpu, row, width, words, out) };
            }
            // Whole blocks around the piece.
            let block = matrix.block_len();
            let start = from / block * block;
            let end = (from + depth).next_multiple_of(block).min(matrix.cols);
            let span = end - start;
            let values = E::of_words_mut(grown(decoded, (width * span).div_ceil(E::PER_WORD)));
            let values = &mut values[..width * span];
            E::decode_rows(cpu, &matrix, column..column + width, start..end, values, floats);
            let row = |j: usize| values[j * span + from - start..][..depth].as_ptr().cast::<u8>();
            // SAFETY: each row was sliced to `depth` values.
            unsafe { pack_all(cpu, row, width, words, out) };
        }
        (Right::Integers(_), _) => unreachable!("a term in integers is in a group of its own"),
        (Right::Frozen(matrix), false) => {
            if let (Some(values), RowOrder::Natural) = (matrix.values_of::<E>(), matrix.order) {
                return pack_rows(cpu, &values[from * matrix.cols + column..], matrix.cols, depth, width, out);
            }
            let values = E::of_words_mut(grown(decoded, (depth * width).div_ceil(E::PER_WORD)));
            let values = &mut values[..depth * width];
            E::decode_rows(cpu, &matrix, from..from + depth, column..column + width, values, floats);
            pack_rows(cpu, values, width, depth, width, out);
        }
    }
}

/// # Safety
/// Each of the first `width` pointers that `row` yields is readable for `words` words.
unsafe fn pack_all(cpu: Cpu, row: impl Fn(usize) -> *const u8, width: usize, words: usize, out: &mut [u32]) {
    let mut rows = [std::ptr::null(); PANEL];
    for (j, pointer) in rows[..width].iter_mut().enumerate() {
        *pointer = row(j);
    }
    // SAFETY: passed on to the caller.
    unsafe { pack_columns(cpu, &rows[..width], words, out) }
}

/// Decodes the backward pieces of frozen weights in a group for all columns of a wide task: (values of the sum, width), one
/// piece after another.
fn decode_wide<'s, E: ProductElement>(
    cpu: Cpu,
    task: &Task,
    columns: &Columns<'_, E>,
    group: &[Piece],
    decoded: &'s mut Vec<u32>,
    floats: &mut Vec<f32>,
) -> &'s [u32] {
    let backward = |term: &Term<'_, E>| matches!(term.right, Right::Frozen(_)) && !term.transposed;
    let frozen = || group.iter().filter(|piece| backward(&columns.terms[piece.term]));
    let total: usize = frozen().map(|piece| piece.words * task.width).sum();
    let all = grown(decoded, total);
    let values = E::of_words_mut(all);
    let mut at = 0;
    for piece in frozen() {
        let Right::Frozen(matrix) = columns.terms[piece.term].right else { continue };
        let depth = piece.words * E::PER_WORD;
        let values = &mut values[at..at + depth * task.width];
        at += depth * task.width;
        let (rows, cols) = (piece.from..piece.from + depth, task.from..task.from + task.width);
        E::decode_rows(cpu, &matrix, rows, cols, values, floats);
    }
    all
}

/// Adds up an outer product over rows: `C (p, n) = scale Dᵀ X` for D (m, p) and X (m, n), f32, replacing C.
///
/// # Panics
/// When sizes disagree.
pub fn outer<E: ProductElement>(
    m: usize,
    d: Left<'_, E>,
    p: usize,
    x: Left<'_, E>,
    n: usize,
    scale: f32,
    c: &mut [f32],
) {
    assert_eq!(Some(c.len()), p.checked_mul(n), "the result of {p} x {n}");
    if m == 0 || p == 0 || n == 0 {
        return c.fill(0.0);
    }
    assert!(fits(m, d.at, d.step, p, d.values.len()), "D is short");
    assert!(fits(m, x.at, x.step, n, x.values.len()), "X is short");
    let cpu = cpu();
    let words = m.div_ceil(E::PER_WORD);
    let mut pairs = vec![0; words * p];
    pair_rows(cpu, &d.values[d.at..], d.step, m, p, &mut pairs);
    let c = Shared::new(c);
    // Wide enough that packing X for so few rows of C is little beside the product.
    for_each(n.div_ceil(PANEL), |panel| {
        let (from, width) = (panel * PANEL, PANEL.min(n - panel * PANEL));
        SCRATCH.with_borrow_mut(|scratch| {
            let out = grown(&mut scratch.panel, DEPTH * PANEL);
            for start in (0..words).step_by(DEPTH / 4) {
                let count = (DEPTH / 4).min(words - start);
                let row = start * E::PER_WORD;
                let part = &x.values[x.at + row * x.step + from..];
                let rows_here = (count * E::PER_WORD).min(m - row);
                pack_rows_padded(cpu, part, x.step, rows_here, width, &mut out[..count * PANEL]);
                let segment = Segment {
                    a: pairs[start * p..].as_ptr().cast(),
                    row_step: size_of::<u32>(),
                    word_step: p * size_of::<u32>(),
                    words: count,
                    b: out.as_ptr(),
                };
                let wide = c.get().wrapping_add(from);
                let first = start == 0;
                let store = if first { Store::wide(wide, n) } else { Store::adding(wide, n) };
                // SAFETY: A is (words, p) words and B is `count` packed words; this task alone writes columns
                // `from..from + width` of C, which is (p, n) and borrowed until all tasks have ended.
                unsafe { rows::<E, true>(cpu, p, width, &[segment], Store { scale, ..store }) };
            }
        });
    });
}

/// An element type that products are computed in.
pub trait ProductElement: TileElement {
    /// Words as values.
    #[doc(hidden)]
    fn of_words(words: &[u32]) -> &[Self];
    /// The same, to write.
    #[doc(hidden)]
    fn of_words_mut(words: &mut [u32]) -> &mut [Self];
    /// Decodes part of some rows of a weight.
    #[doc(hidden)]
    fn decode_rows(
        cpu: Cpu,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [Self],
        floats: &mut Vec<f32>,
    );
    /// Decodes part of a row of a weight.
    #[doc(hidden)]
    fn decode(cpu: Cpu, matrix: &Matrix<'_>, row: usize, cols: Range<usize>, out: &mut [Self], floats: &mut Vec<f32>) {
        Self::decode_rows(cpu, matrix, row..row + 1, cols, out, floats);
    }
}

impl ProductElement for f32 {
    fn of_words(words: &[u32]) -> &[f32] {
        // SAFETY: every u32 is an f32 of the same size and alignment.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }

    fn of_words_mut(words: &mut [u32]) -> &mut [f32] {
        // SAFETY: as above, both ways.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
    }

    fn decode_rows(
        cpu: Cpu,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        _: &mut Vec<f32>,
    ) {
        // By the caller's processor: a thread of the pool is not kept to one.
        if let Some(coded) = &matrix.coded {
            return coded.decode_rows(cpu, rows, cols, out);
        }
        matrix.decode_part(rows, cols, out);
    }
}

impl ProductElement for half::bf16 {
    fn of_words(words: &[u32]) -> &[half::bf16] {
        // SAFETY: a bf16 is any 16 bits, and half as large and aligned as a word.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), 2 * words.len()) }
    }

    fn of_words_mut(words: &mut [u32]) -> &mut [half::bf16] {
        // SAFETY: as above, both ways.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
    }

    fn decode_rows(
        cpu: Cpu,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [half::bf16],
        floats: &mut Vec<f32>,
    ) {
        if let Some(coded) = &matrix.coded {
            return coded.decode_rows(cpu, rows, cols, out);
        }
        let floats = grown(floats, cols.len());
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            if let Some(row) = matrix.row_of::<half::bf16>(row) {
                let bytes = &row[2 * cols.start..2 * cols.end];
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = half::bf16::from_le_bytes(*bytes);
                }
            } else {
                matrix.decode_part(row..row + 1, cols.clone(), floats);
                narrow(cpu, floats, out);
            }
        }
    }
}
