//! Products with frozen weights and small dense ones, together in one pass over the output: `C = scale Σ A B + …`.
//!
//! A task packs a panel of 64 columns of B (see `pack`) and multiplies all rows of A by it (see `tile`). The terms of one
//! sum, such as a frozen weight and the adapter beside it, follow each other in the same registers, so an adapter costs its
//! multiplications and no pass of its own. Few rows by AMX need no packed W, see `turned`. What an element of C is does not
//! depend on how the work is cut into tasks.

mod cut;
mod element;
mod outer;
mod pack;
mod scratch;
mod terms;
mod turned;

use std::ops::Range;

pub use self::element::ProductElement;
pub(crate) use self::outer::add_up;
pub use self::outer::outer;
pub use self::scratch::product_scratch_bytes;
pub use self::terms::{Columns, Finish, Gain, Left, Output, Right, Term};

use self::cut::{DEPTH, Piece, Task, cut, group};
use self::pack::{decode_wide, pack};
use self::scratch::{SCRATCH, Scratch};
use self::terms::fits;
use self::turned::{Turned, chunks, rows_of_w};
use crate::buffer::grown;
#[cfg(target_arch = "x86_64")]
use crate::int8::stored;
use crate::int8::{self, Packed, Rounded};
use crate::isa::{Isa, isa};
use crate::pool::for_each;
use crate::round::narrow;
use crate::tile::{PANEL, SEGMENTS_MAX, Segment, Store, pack_rows, rows, rows_turned};

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
    E::product(m, columns, out, step, finish, None);
}

/// As [`product`], with a gain on each column: `C = gain ∘ Σ A B + …`. The sums before it go to `gain.sums`, as E.
///
/// # Panics
/// As [`product`], and when there are not as many factors and sums as the output has columns and values.
pub fn product_with_gain<E: ProductElement>(
    m: usize,
    columns: &[Columns<'_, E>],
    out: Output<'_, E>,
    step: usize,
    gain: Gain<'_, E>,
) {
    assert_eq!((gain.factors.len(), Some(gain.sums.len())), (step, m.checked_mul(step)), "a gain on {step} columns");
    let gain = SharedGain { factors: gain.factors.as_ptr(), sums: gain.sums.as_mut_ptr(), step };
    E::product(m, columns, out, step, Finish::default(), Some(gain));
}

/// See [`product`] and [`product_with_gain`].
pub(crate) fn compute<E: ProductElement>(
    m: usize,
    columns: &[Columns<'_, E>],
    out: Output<'_, E>,
    step: usize,
    finish: Finish,
    gain: Option<SharedGain<E>>,
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
                Right::Integers(matrix) if term.transposed => {
                    assert!(matrix.multiplies_forward_in_integers(), "W in integers");
                }
                Right::Integers(matrix) => assert!(matrix.multiplies_in_integers(), "W in integers, backward"),
                Right::Stored(matrix) => {
                    assert!(term.transposed && matrix.multiplies_as_stored(), "W as it is stored");
                }
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
    let isa = isa();
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
    let tasks = cut(isa, m, columns);
    let integers = Integers::of(isa, m, columns);
    let turned = Turned::of(isa, m, columns);
    let in_output = !store.wide.is_null() && !add && gain.is_none();
    let groups: Vec<Vec<Vec<Piece>>> = columns.iter().map(|columns| group(columns.terms, in_output)).collect();
    // Sums that are too deep for one panel are taken a group of pieces at a time. Where they can wait in the output, that is in
    // rounds, one group for all panels, so that a thread's panels find their part of A in its cache.
    let rounds = if in_output { groups.iter().map(Vec::len).max().unwrap_or(1) } else { 1 };
    let store = SharedStore(store, gain);
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
                    let columns = &columns[task.columns];
                    run(isa, task, columns, rounded, &turned, (all, now), in_output, store.get(), scratch);
                };
            });
        });
    }
}

/// A of all terms in integers, rounded.
struct Integers {
    rounded: Vec<Rounded>,
    /// The same for weights as they are stored.
    #[cfg(target_arch = "x86_64")]
    stored: Vec<stored::Rounded>,
    /// For each sum and each of its terms, which of them it is.
    places: Vec<Vec<usize>>,
}

impl Integers {
    fn of<E: ProductElement>(isa: Isa, m: usize, columns: &[Columns<'_, E>]) -> Self {
        let (mut rounded, mut made) = (Vec::new(), Vec::new());
        #[cfg(target_arch = "x86_64")]
        let (mut stored, mut made_stored) = (Vec::new(), Vec::new());
        let mut place = |term: &Term<'_, E>| {
            let left = term.left;
            #[cfg(target_arch = "x86_64")]
            if let Right::Stored(_) = term.right {
                let key = (left.values.as_ptr(), left.at, left.step, term.depth());
                return made_stored.iter().position(|other| *other == key).unwrap_or_else(|| {
                    stored.push(stored::round(isa, m, term.depth(), &left.values[left.at..], left.step));
                    made_stored.push(key);
                    stored.len() - 1
                });
            }
            let Right::Integers(matrix) = term.right else { return usize::MAX };
            // Backward, the scales of W's rows are A's columns', so that A is another one for each weight.
            let on_line = matrix.line().is_some();
            let scales = (!term.transposed && on_line).then(|| matrix.integer_scales(0..matrix.rows));
            let key = (left.values.as_ptr(), left.at, term.depth(), scales.is_none());
            if let Some((_, known)) = made.iter().find(|(other, _)| *other == key && scales.is_none()) {
                return *known;
            }
            rounded.push(int8::round(isa, m, term.depth(), &left.values[left.at..], left.step, scales.as_deref()));
            made.push((key, rounded.len() - 1));
            rounded.len() - 1
        };
        let places = columns.iter().map(|columns| columns.terms.iter().map(&mut place).collect()).collect();
        #[cfg(target_arch = "x86_64")]
        return Self { rounded, stored, places };
        #[cfg(not(target_arch = "x86_64"))]
        Self { rounded, places }
    }
}

/// An output that tasks share, and a gain on its columns.
struct SharedStore<E>(Store<E>, Option<SharedGain<E>>);
// SAFETY: tasks write disjoint elements, see `product`.
unsafe impl<E> Sync for SharedStore<E> {}
impl<E: Copy> SharedStore<E> {
    fn get(&self) -> (Store<E>, Option<SharedGain<E>>) {
        (self.0, self.1)
    }
}

/// See [`Gain`]: factors from a column on, and sums from an element on.
#[derive(Clone, Copy)]
pub struct SharedGain<E> {
    factors: *const f32,
    sums: *mut E,
    step: usize,
}

impl<E> SharedGain<E> {
    /// From a task's rows and its columns from `from` on.
    fn at(self, columns: &Columns<'_, E>, task: &Task, from: usize) -> Self {
        let column = columns.at + task.from + from;
        let (factors, place) = (self.factors.wrapping_add(column), task.rows.start * self.step + column);
        Self { factors, sums: self.sums.wrapping_add(place), ..self }
    }
}

/// Computes the groups `now` of one task's sums.
///
/// # Safety
/// See [`product`].
#[allow(clippy::too_many_arguments)]
unsafe fn run<E: ProductElement>(
    isa: Isa,
    task: &Task,
    columns: &Columns<'_, E>,
    integers: (&Integers, &[usize]),
    turned: &Turned,
    (groups, now): (&[Vec<Piece>], Range<usize>),
    in_output: bool,
    (store, gain): (Store<E>, Option<SharedGain<E>>),
    scratch: &mut Scratch,
) {
    let wide = task.width > PANEL;
    let turned = turned.sum(task.columns);
    // SAFETY: of all calls below: A and B are as large as the segments say, and the output is the task's own, or waiting sums.
    let multiply = |width, segments: &mut [Segment], group: &[Piece], store: Store<E>| unsafe {
        if turned.is_none() {
            return rows::<E, false>(isa, task.rows.len(), width, segments, store);
        }
        for chunk in chunks(task.rows.clone()) {
            let first = chunk.start == task.rows.start;
            rows_turned::<E>(isa, chunk.len(), width, segments, first, store.at(chunk.start - task.rows.start, 0));
            for (segment, piece) in segments.iter_mut().zip(group) {
                let words = columns.terms[piece.term].depth() / E::PER_WORD;
                segment.b = segment.b.wrapping_add(words * PANEL).wrapping_sub(chunk.start % PANEL);
            }
        }
    };
    #[cfg(target_arch = "x86_64")]
    let of_stored = &mut scratch.stored;
    let Scratch { panel, packed, decoded, all, floats, sums, .. } = scratch;
    let panel = grown(panel, DEPTH * PANEL);
    let m = task.rows.len();
    // Sums of all but the last group wait in the output or here.
    let (sums, step) = if in_output {
        (target(store, columns, task, 0).wide, store.step)
    } else {
        let step = task.width.next_multiple_of(PANEL);
        let wait = groups.len() > 1 || in_integers(columns, &groups[0]) || gain.is_some();
        (if wait { grown(sums, m * step).as_mut_ptr() } else { std::ptr::null_mut() }, step)
    };
    for (number, group) in groups.iter().enumerate().take(now.end).skip(now.start) {
        let (first, last) = (number == 0, number + 1 == groups.len());
        let gain = |from: usize| gain.map(|gain| gain.at(columns, task, from));
        if in_integers(columns, group) {
            for from in (0..task.width).step_by(PANEL) {
                let width = PANEL.min(task.width - from);
                let waiting = sums.wrapping_add(from);
                // SAFETY: `sums` holds m rows of `step`.
                unsafe {
                    #[cfg(target_arch = "x86_64")]
                    as_stored(isa, task, columns, integers, group, (from, width), (waiting, step), of_stored);
                    whole_numbers(isa, task, columns, integers, group, (from, width), (waiting, step), packed);
                    if last {
                        finish(isa, m, width, (waiting, step), gain(from), target(store, columns, task, from));
                    }
                }
            }
            continue;
        }
        // What a wide task decodes for all of its panels; narrow ones decode as they pack.
        let shared = if wide { Some(decode_wide(isa, task, columns, group, all, floats)) } else { None };
        for from in (0..task.width).step_by(PANEL) {
            let width = PANEL.min(task.width - from);
            let mut segments = [Segment::EMPTY; SEGMENTS_MAX];
            let (mut at, mut starts) = (0, 0);
            for (piece, segment) in group.iter().zip(&mut segments) {
                let term = &columns.terms[piece.term];
                let depth = piece.words * E::PER_WORD;
                let word_step = size_of::<u32>();
                if let Some(packed) = &turned {
                    let (a, row_step) = rows_of_w(term, task.from + from, width, piece.from, depth);
                    let words = term.depth() / E::PER_WORD;
                    let first = task.rows.start / PANEL * words + piece.from / E::PER_WORD;
                    let all = packed(piece.term);
                    assert!(all.len() >= (first + piece.words) * PANEL, "x is packed up to this piece");
                    let b = all.as_ptr().wrapping_add(first * PANEL + task.rows.start % PANEL);
                    *segment = Segment { a, row_step, word_step, words: piece.words, b };
                    continue;
                }
                let out = &mut panel[at * PANEL..(at + piece.words) * PANEL];
                match (&shared, term.right) {
                    (Some(all), Right::Frozen(_)) if !term.transposed => {
                        let values = &E::of_words(all)[starts..starts + depth * task.width];
                        pack_rows(isa, &values[from..], task.width, depth, width, out);
                        starts += depth * task.width;
                    }
                    _ => pack(isa, term, piece.from, depth, task.from + from, width, out, decoded, floats),
                }
                let left = &term.left;
                *segment = Segment {
                    a: left.values[left.at + task.rows.start * left.step + piece.from..].as_ptr().cast(),
                    row_step: left.step * size_of::<E>(),
                    word_step,
                    words: piece.words,
                    b: out.as_ptr(),
                };
                at += piece.words;
            }
            let segments = &mut segments[..group.len()];
            let waiting = sums.wrapping_add(from);
            let gain = gain(from);
            let target = match (first, last) {
                (true, true) if gain.is_none() => target(store, columns, task, from),
                (true, false) => Store::wide(waiting, step),
                (false, false) => Store::adding(waiting, step),
                // With nothing that goes in between, the sums so far are an addend.
                (false, true)
                    if gain.is_none() && store.scale == 1.0 && store.add.is_null() && store.wide.is_null() =>
                {
                    Store { add: waiting, add_step: step, ..target(store, columns, task, from) }
                }
                (first, true) => {
                    // The sums so far go in before gain, scale, bias and addends do.
                    let all = if first { Store::wide(waiting, step) } else { Store::adding(waiting, step) };
                    multiply(width, segments, group, all);
                    // SAFETY: `sums` holds m rows of `step`.
                    unsafe { finish(isa, m, width, (waiting, step), gain, target(store, columns, task, from)) };
                    continue;
                }
            };
            multiply(width, segments, group, target);
        }
    }
}

/// Whether a group is of terms in integers.
fn in_integers<E>(columns: &Columns<'_, E>, group: &[Piece]) -> bool {
    group.first().is_some_and(|piece| columns.terms[piece.term].right.in_integers())
}

/// The sums of the terms in integers, for a panel of a task's columns.
///
/// # Safety
/// `sums` is writable over the task's rows by the panel's columns.
#[allow(clippy::too_many_arguments)]
unsafe fn whole_numbers<E: ProductElement>(
    isa: Isa,
    task: &Task,
    columns: &Columns<'_, E>,
    (integers, places): (&Integers, &[usize]),
    group: &[Piece],
    (from, width): (usize, usize),
    (sums, step): (*mut f32, usize),
    packed: &mut Packed,
) {
    // Those as they are stored come first.
    let mut add = group.iter().any(|piece| matches!(columns.terms[piece.term].right, Right::Stored(_)));
    for piece in group {
        let term = &columns.terms[piece.term];
        let Right::Integers(matrix) = term.right else { continue };
        let rounded = &integers.rounded[places[piece.term]];
        let columns = task.from + from..task.from + from + width;
        let factors = (term.transposed && matrix.line().is_some()).then(|| matrix.integer_scales(columns.clone()));
        for (chunk, start) in (0..term.depth()).step_by(int8::CHUNK).enumerate() {
            let part = start..term.depth().min(start + int8::CHUNK);
            int8::pack(isa, &matrix, !term.transposed, part, columns.clone(), packed);
            let factors = factors.as_ref().map_or(std::ptr::null(), |factors| factors.as_ptr());
            let to = int8::Sums { out: sums, step, add, factors };
            // SAFETY: the caller's sums, and as many factors as columns.
            unsafe { int8::rows(isa, rounded, task.rows.clone(), chunk, packed, width, to) };
            add = true;
        }
    }
}

/// The sums of the terms of weights as they are stored, for a panel of a task's columns.
///
/// # Safety
/// See [`whole_numbers`].
#[cfg(target_arch = "x86_64")]
#[allow(clippy::too_many_arguments)]
unsafe fn as_stored<E: ProductElement>(
    isa: Isa,
    task: &Task,
    columns: &Columns<'_, E>,
    (integers, places): (&Integers, &[usize]),
    group: &[Piece],
    (from, width): (usize, usize),
    (sums, step): (*mut f32, usize),
    packed: &mut stored::Packed,
) {
    let mut add = false;
    for piece in group {
        let term = &columns.terms[piece.term];
        let Right::Stored(matrix) = term.right else { continue };
        let rounded = &integers.stored[places[piece.term]];
        let columns = task.from + from..task.from + from + width;
        for (chunk, start) in (0..term.depth()).step_by(stored::CHUNK).enumerate() {
            let part = start..term.depth().min(start + stored::CHUNK);
            stored::pack(isa, &matrix, part, columns.clone(), packed);
            let to = int8::Sums { out: sums, step, add, factors: std::ptr::null() };
            // SAFETY: the caller's sums.
            unsafe { stored::rows(isa, rounded, task.rows.clone(), chunk, &matrix, packed, width, to) };
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
/// `sums` is readable and the output of `store` writable over m x width, and so are factors and sums of a gain.
unsafe fn finish<E: ProductElement>(
    isa: Isa,
    m: usize,
    width: usize,
    (sums, step): (*const f32, usize),
    gain: Option<SharedGain<E>>,
    store: Store<E>,
) {
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
            if let Some(gain) = gain {
                narrow(isa, values, std::slice::from_raw_parts_mut(gain.sums.add(row * gain.step), width));
                multiply_row(isa, values, std::slice::from_raw_parts(gain.factors, width));
            }
            finish_row(isa, values, store.scale, part(store.bias), row_add, add);
            if store.wide.is_null() {
                narrow(isa, values, std::slice::from_raw_parts_mut(store.narrow.add(row * store.step), width));
            } else {
                std::slice::from_raw_parts_mut(store.wide.add(row * store.step), width).copy_from_slice(values);
            }
        }
    }
}

crate::isa::per_isa! {
    fn multiply_row(values: &mut [f32], factors: &[f32]) {
        for (value, factor) in values.iter_mut().zip(factors) {
            *value *= factor;
        }
    }
}

crate::isa::per_isa! {
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
