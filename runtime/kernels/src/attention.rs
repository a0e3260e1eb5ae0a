//! Causal grouped-query attention over sequences laid end to end, forward and backward, without the (T, T) scores of a whole
//! sequence ever being there at once.
//!
//! After Dao et al. 2022, <https://arxiv.org/abs/2205.14135>: forward keeps the logarithm of each row's sum, backward computes
//! the probabilities again block by block. A query sees the positions of its own sequence up to its own, and no more than
//! `window` of them. What a row comes to depends on its sequence alone, wherever that lies and whatever shares the call.

use std::cell::RefCell;
use std::ops::Range;

use crate::cpu::{Cpu, cpu, per_cpu};
use crate::cross_entropy::dot;
use crate::element::{Element, exp, largest, replace_and_sum, tanh};
use crate::panel::{narrow, pack_columns, pack_rows_padded, word};
use crate::pool::{Shared, for_each, for_ranges};
use crate::product::{ProductElement, grown};
use crate::rope::{RotaryTable, rotate_back};
use crate::soft_cap::cap_scores;
use crate::tile::{PANEL, Segment, Store, rows};

/// Shape of an attention and the rows that it is over.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Rows of each sequence; together all rows.
    pub sequences: &'a [Range<usize>],
    /// Query heads H.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    /// Width D of a head, even.
    pub head_dim: usize,
    /// A query sees so many positions, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// What products of queries and keys are multiplied by; 1 / √D in most models.
    pub scale: f32,
    /// Scores s, scaled, become `cap · tanh(s / cap)`; above 0. Source: Gemma Team 2024, <https://arxiv.org/abs/2408.00118>, section 2.
    pub soft_cap: Option<f32>,
}

/// Query rows that forward takes at once: whole tiles, and their scores over 2,000 keys still fit the second-level cache.
const QUERIES: usize = 48;
/// Query rows of a task of forward, for which keys and values are packed.
const CHUNK: usize = 5 * QUERIES;
/// Key rows that backward takes at once, with a panel of queries: whole tiles.
const KEYS: usize = 192;
/// The same where keys lie beside the panel's own queries, of which each sees a part.
const KEYS_DIAGONAL: usize = 24;
/// Columns of the widest vector: scores are left out by so many.
const VECTOR: usize = 16;

impl Attention<'_> {
    /// Values of a row of q, k and v beside each other.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn window(&self) -> usize {
        self.window.unwrap_or(usize::MAX)
    }

    /// Columns of a row's query head, key head and value head.
    fn places(&self, head: usize) -> [usize; 3] {
        let group = self.heads / self.kv_heads;
        [head, self.heads + head / group, self.heads + self.kv_heads + head / group].map(|head| head * self.head_dim)
    }

    fn check_heads(&self, rows: usize) {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads for {kv_heads}");
        assert!(self.head_dim > 0 && self.head_dim.is_multiple_of(2), "a head of {}", self.head_dim);
        let width = kv_heads.checked_mul(2).and_then(|both| both.checked_add(heads)?.checked_mul(self.head_dim));
        assert!(width.and_then(|width| width.checked_mul(rows)).is_some(), "{rows} rows of {heads} heads");
        assert!(self.window != Some(0), "a query sees its own position");
        assert!(self.soft_cap.is_none_or(|cap| cap > 0.0), "scores are capped at {:?}", self.soft_cap);
    }

    fn check(&self, rows: usize) {
        self.check_heads(rows);
        let mut end = 0;
        for sequence in self.sequences {
            assert!(sequence.start == end && sequence.end >= end, "sequences follow each other");
            end = sequence.end;
        }
        assert_eq!(end, rows, "the sequences are all rows");
    }
}

#[derive(Default)]
struct Scratch {
    keys: Vec<u32>,
    values: Vec<u32>,
    scores: Vec<f32>,
    weights: Vec<u32>,
    packed: Vec<u32>,
    turned: Vec<u32>,
    sums: Vec<f32>,
}

thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());

/// `softmax(scale q kᵀ) v` for each head, of scores that are capped if there is a cap: rows of q, k, v (m, [`Attention::row`]) to out (m, H D); `log_sums` (H, m) is kept
/// for backward.
///
/// # Panics
/// When sizes disagree.
pub fn attention<E: ProductElement>(shape: &Attention, qkv: &[E], out: &mut [E], log_sums: &mut [f32]) {
    let (row, m) = (shape.row(), log_sums.len() / shape.heads);
    shape.check(m);
    assert!(qkv.len() == m * row && out.len() == m * shape.heads * shape.head_dim && log_sums.len() == m * shape.heads);
    let cpu = cpu();
    let (out, log_sums) = (Shared::new(out), Some(Shared::new(log_sums)));
    let [_, key_at, value_at] = shape.places(0);
    let source = Source { queries: qkv, query_row: row, offset: 0, keys: qkv, key_row: row, key_at, value_at };
    let chunks = shape.sequences.iter().flat_map(|sequence| {
        sequence.clone().step_by(CHUNK).map(move |from| (sequence.start, from..sequence.end.min(from + CHUNK)))
    });
    let chunks: Vec<(usize, Range<usize>)> = chunks.collect();
    for_each(chunks.len() * shape.kv_heads, |task| {
        let (start, queries) = &chunks[task / shape.kv_heads];
        SCRATCH.with_borrow_mut(|scratch| {
            let place = (task % shape.kv_heads, *start, queries.clone());
            forward_chunk(cpu, shape, &source, place, out, log_sums, m, scratch);
        });
    });
}

/// [`attention`] of a sequence whose earlier keys and values are kept: rows of q, k, v (m, [`Attention::row`]), the last m of
/// the positions in `kept` (T, 2 H_kv D), k beside v, to out (m, H D). `shape.sequences` is not asked.
///
/// # Panics
/// When sizes disagree.
pub fn attention_kept<E: ProductElement>(shape: &Attention, qkv: &[E], kept: &[E], out: &mut [E]) {
    let (row, key_row) = (shape.row(), 2 * shape.kv_heads * shape.head_dim);
    shape.check_heads(qkv.len() / row);
    let (m, total) = (qkv.len() / row, kept.len() / key_row);
    let sizes = qkv.len() == m * row && kept.len() == total * key_row && out.len() == m * shape.heads * shape.head_dim;
    assert!(sizes && m <= total, "{m} rows, the last of {total}");
    let (cpu, out, offset) = (cpu(), Shared::new(out), total - m);
    let value_at = shape.kv_heads * shape.head_dim;
    let source = Source { queries: qkv, query_row: row, offset, keys: kept, key_row, key_at: 0, value_at };
    // Chunks begin at the same positions whatever part of a sequence is asked for.
    let first = offset / CHUNK;
    for_each((total.div_ceil(CHUNK) - first) * shape.kv_heads, |task| {
        let from = (first + task / shape.kv_heads) * CHUNK;
        let queries = from.max(offset)..total.min(from + CHUNK);
        SCRATCH.with_borrow_mut(|scratch| {
            forward_chunk(cpu, shape, &source, (task % shape.kv_heads, 0, queries), out, None, m, scratch);
        });
    });
}

/// Where queries, keys and values lie.
struct Source<'a, E> {
    /// Rows of queries, the first of which stands at position `offset` of the keys.
    queries: &'a [E],
    query_row: usize,
    offset: usize,
    /// Rows of keys and values, and where in a row those of the first head are.
    keys: &'a [E],
    key_row: usize,
    key_at: usize,
    value_at: usize,
}

/// One chunk of a sequence's queries, for the heads that share a key head.
#[allow(clippy::too_many_arguments)]
fn forward_chunk<E: ProductElement>(
    cpu: Cpu,
    shape: &Attention,
    source: &Source<'_, E>,
    (kv_head, start, queries): (usize, usize, Range<usize>),
    out: Shared<E>,
    log_sums: Option<Shared<f32>>,
    m: usize,
    scratch: &mut Scratch,
) {
    let (d, window) = (shape.head_dim, shape.window());
    let &Source { queries: q, query_row, offset, keys: kv, key_row, .. } = source;
    let group = shape.heads / shape.kv_heads;
    let (key_at, value_at) = (source.key_at + kv_head * d, source.value_at + kv_head * d);
    // Keys from `first` on are seen by some query. It is a whole number of panels from the start, so that a row is summed in the
    // same order whichever queries it shares the call with.
    let first = start + (queries.start.saturating_sub(window - 1).max(start) - start) / PANEL * PANEL;
    let count = queries.end - first;
    let panels = count.div_ceil(PANEL);
    let words = d / E::PER_WORD;
    let Scratch { keys, values, scores, weights, .. } = scratch;
    let keys = grown(keys, panels * words * PANEL);
    for (panel, out) in keys.chunks_exact_mut(words * PANEL).enumerate() {
        let from = first + panel * PANEL;
        let width = PANEL.min(queries.end - from);
        let mut pointers = [std::ptr::null(); PANEL];
        for (j, pointer) in pointers[..width].iter_mut().enumerate() {
            *pointer = kv[(from + j) * key_row + key_at..][..d].as_ptr().cast();
        }
        // SAFETY: each pointer is to the `d` values of a key.
        unsafe { pack_columns(cpu, &pointers[..width], words, out) };
    }
    // Values by words of neighbouring positions, padded to whole panels of keys.
    let value_words = panels * PANEL / E::PER_WORD;
    let strips = d.div_ceil(PANEL);
    let values = grown(values, strips * value_words * PANEL);
    for (strip, out) in values.chunks_exact_mut(value_words * PANEL).enumerate() {
        let at = strip * PANEL;
        let width = PANEL.min(d - at);
        pack_rows_padded(cpu, &kv[first * key_row + value_at + at..], key_row, count, width, out);
    }
    let step = panels * PANEL;
    let scores = grown(scores, QUERIES * step);
    let weights = E::of_words_mut(grown(weights, QUERIES * step / E::PER_WORD));
    for head in kv_head * group..(kv_head + 1) * group {
        let [query_at, ..] = shape.places(head);
        for from in queries.clone().step_by(QUERIES) {
            let block = from..queries.end.min(from + QUERIES);
            // Keys that some query of the block sees, from a whole panel to a whole vector.
            let low = block.start.saturating_sub(window - 1).max(first) - first;
            let (low, high) = (low / PANEL * PANEL, (block.end - first).next_multiple_of(VECTOR));
            for key in (low..high).step_by(PANEL) {
                let segment = Segment {
                    a: q[(block.start - offset) * query_row + query_at..].as_ptr().cast(),
                    row_step: query_row * size_of::<E>(),
                    word_step: size_of::<u32>(),
                    words,
                    b: keys[key * words..].as_ptr(),
                };
                let store = Store::wide(scores[key..].as_mut_ptr(), step);
                let width = PANEL.min(high - key);
                // SAFETY: A is the block's queries, B a packed panel of keys; the scores have a row of `step` for each query.
                unsafe { rows::<E, false>(cpu, block.len(), width, &[segment], store) };
            }
            for (i, query) in block.clone().enumerate() {
                let seen = query.saturating_sub(window - 1).max(first) - first..query + 1 - first;
                let (scores, weights) = (&mut scores[i * step..][..step], &mut weights[i * step..][..step]);
                // Capped scores are scaled already.
                let scale = match shape.soft_cap {
                    None => shape.scale,
                    Some(cap) => {
                        cap_scores(cpu, &mut scores[seen.clone()], shape.scale, cap);
                        1.0
                    }
                };
                let log_sum = softmax_row(cpu, scores, seen, low..high, scale, weights);
                if let Some(log_sums) = log_sums {
                    // SAFETY: this task alone writes this head's and row's place.
                    unsafe { *log_sums.get().add(head * m + query) = log_sum };
                }
            }
            for strip in 0..strips {
                let width = PANEL.min(d - strip * PANEL);
                let segment = Segment {
                    a: weights[low..].as_ptr().cast(),
                    row_step: step * size_of::<E>(),
                    word_step: size_of::<u32>(),
                    words: (high - low) / E::PER_WORD,
                    b: values[(strip * value_words + low / E::PER_WORD) * PANEL..].as_ptr(),
                };
                let at = (block.start - offset) * shape.heads * d + head * d + strip * PANEL;
                let narrow = out.get().wrapping_add(at);
                let store =
                    Store { wide: std::ptr::null_mut(), narrow, ..Store::wide(std::ptr::null_mut(), shape.heads * d) };
                // SAFETY: A is the block's weights, B the packed values; this task alone writes these rows and columns.
                unsafe { rows::<E, false>(cpu, block.len(), width, &[segment], store) };
            }
        }
    }
}

per_cpu! {
    /// Softmax of a row of scores times `scale` over the columns `seen`; `weights` gets it, and zeros in the rest of `all`.
    /// Returns the logarithm of the sum.
    fn softmax_row<E: Element>(
        scores: &mut [f32],
        seen: std::ops::Range<usize>,
        all: std::ops::Range<usize>,
        scale: f32,
        weights: &mut [E],
    ) -> f32 {
        weights[all.start..seen.start].fill(E::default());
        weights[seen.end..all.end].fill(E::default());
        let (scores, weights) = (&mut scores[seen.clone()], &mut weights[seen]);
        let top = largest(scores) * scale;
        let total = replace_and_sum(scores, |score| exp(score * scale - top));
        let inverse = 1.0 / total;
        for (score, weight) in scores.iter().zip(weights) {
            *weight = E::of(*score * inverse);
        }
        top + total.ln()
    }
}

/// What backward writes between its two passes: gradients of keys and values, a copy for each query head.
#[derive(Default)]
pub struct KeyValueGradients {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Gradients of q, k and v before their rotation: `d_qkv` laid out as `qkv`, from those of the output, `d_out` (m, H D).
///
/// `positions` (m) are rows of the table by which [`rotate`](crate::rotate) turned q and k; without a table they were not turned,
/// and only the number of rows counts.
///
/// # Panics
/// When sizes disagree.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<E: ProductElement>(
    shape: &Attention,
    qkv: &[E],
    out: &[E],
    log_sums: &[f32],
    d_out: &[E],
    (positions, table): (&[u32], Option<&RotaryTable>),
    partial: &mut KeyValueGradients,
    d_qkv: &mut [E],
) {
    let (row, m, d, heads) = (shape.row(), positions.len(), shape.head_dim, shape.heads);
    shape.check(m);
    assert!(qkv.len() == m * row && d_qkv.len() == m * row && out.len() == m * heads * d);
    assert!(d_out.len() == out.len() && log_sums.len() == m * heads);
    assert!(table.is_none_or(|table| table.head_dim() == d), "the table's heads are those that were rotated");
    let turn = Turn { positions, table };
    let cpu = cpu();
    let d_keys = grown(&mut partial.keys, heads * m * d);
    let d_values = grown(&mut partial.values, heads * m * d);
    let (shared_keys, shared_values, shared) = (Shared::new(d_keys), Shared::new(d_values), Shared::new(d_qkv));
    for_each(shape.sequences.len() * heads, |task| {
        let (sequence, head) = (shape.sequences[task / heads].clone(), task % heads);
        if sequence.is_empty() {
            return;
        }
        let (at, len) = ((head * m + sequence.start) * d, sequence.len() * d);
        // SAFETY: no two tasks have a head of a sequence in common.
        let gradients = unsafe { (shared_keys.slice(at, len), shared_values.slice(at, len)) };
        let given = Given { qkv, out, log_sums: &log_sums[head * m..(head + 1) * m], d_out, turn };
        SCRATCH.with_borrow_mut(|scratch| {
            backward_head(cpu, shape, &given, (head, sequence), gradients, shared, scratch);
        });
    });
    let group = heads / shape.kv_heads;
    for_ranges(m, 32, |range| {
        let mut total = vec![0f32; d];
        for r in range {
            // SAFETY: no two tasks have a row in common; queries' columns were written by the pass that has ended.
            let d_row = unsafe { shared.slice(r * row, row) };
            for kv_head in 0..shape.kv_heads {
                let [_, key_at, value_at] = shape.places(kv_head * group);
                let add_up = |from: &[f32], total: &mut [f32]| {
                    total.fill(0.0);
                    for head in kv_head * group..(kv_head + 1) * group {
                        add(cpu, &from[(head * m + r) * d..][..d], total);
                    }
                };
                add_up(d_keys, &mut total);
                rotate_back(cpu, &total, turn.at(r), shape.scale, &mut d_row[key_at..key_at + d]);
                add_up(d_values, &mut total);
                narrow(cpu, &total, &mut d_row[value_at..value_at + d]);
            }
        }
    });
}

per_cpu! {
    fn add(part: &[f32], total: &mut [f32]) {
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
}

/// What backward is given.
struct Given<'a, E> {
    qkv: &'a [E],
    out: &'a [E],
    log_sums: &'a [f32],
    d_out: &'a [E],
    turn: Turn<'a>,
}

/// How rows were turned.
#[derive(Clone, Copy)]
struct Turn<'a> {
    positions: &'a [u32],
    table: Option<&'a RotaryTable>,
}

impl<'a> Turn<'a> {
    /// Cosines and sines of a row, none if it was not turned.
    fn at(&self, row: usize) -> (&'a [f32], &'a [f32]) {
        self.table.map_or((&[], &[]), |table| table.at(self.positions[row]))
    }
}

/// One query head of one sequence: its dq into `d_qkv`, its part of dk and dv (T, D) into `d_keys` and `d_values`.
fn backward_head<E: ProductElement>(
    cpu: Cpu,
    shape: &Attention,
    given: &Given<'_, E>,
    (head, sequence): (usize, Range<usize>),
    (d_keys, d_values): (&mut [f32], &mut [f32]),
    d_qkv: Shared<E>,
    scratch: &mut Scratch,
) {
    let (row, d, window, t) = (shape.row(), shape.head_dim, shape.window(), sequence.len());
    let Given { qkv, out, log_sums, d_out, turn } = *given;
    let [query_at, key_at, value_at] = shape.places(head);
    let (out_row, out_at) = (shape.heads * d, head * d);
    let (words, strips, panel_words) = (d / E::PER_WORD, d.div_ceil(PANEL), PANEL / E::PER_WORD);
    let Scratch { keys, scores, weights, packed, turned, sums, .. } = scratch;
    d_keys.fill(0.0);
    d_values.fill(0.0);
    // Keys by words of neighbouring positions: B of dq.
    let key_words = t.next_multiple_of(KEYS) / E::PER_WORD;
    let keys = grown(keys, strips * key_words * PANEL);
    for (strip, out) in keys.chunks_exact_mut(key_words * PANEL).enumerate() {
        let width = PANEL.min(d - strip * PANEL);
        pack_rows_padded(cpu, &qkv[sequence.start * row + key_at + strip * PANEL..], row, t, width, out);
    }
    let turned = grown(turned, 2 * words * PANEL);
    let (queries_turned, d_out_turned) = turned.split_at_mut(words * PANEL);
    let packed = grown(packed, 2 * strips * panel_words * PANEL);
    let (queries_packed, d_out_packed) = packed.split_at_mut(strips * panel_words * PANEL);
    let scores = grown(scores, 2 * KEYS * PANEL);
    let (scores, d_weights) = scores.split_at_mut(KEYS * PANEL);
    let size = KEYS * PANEL / E::PER_WORD;
    let (weights, pairs) = grown(weights, 3 * size).split_at_mut(2 * size);
    let (weights, d_scores) = E::of_words_mut(weights).split_at_mut(KEYS * PANEL);
    let d_queries = grown(sums, PANEL * d);
    for from in sequence.clone().step_by(PANEL) {
        let block = from..sequence.end.min(from + PANEL);
        let nq = block.len();
        let mut lines = [[0f32; PANEL]; 2];
        let [log_sum, mean] = &mut lines;
        log_sum[..nq].copy_from_slice(&log_sums[block.clone()]);
        let mut pointers = [[std::ptr::null(); PANEL]; 2];
        for (i, r) in block.clone().enumerate() {
            let (d_out, out) = (&d_out[r * out_row + out_at..][..d], &out[r * out_row + out_at..][..d]);
            mean[i] = dot(cpu, d_out, out);
            pointers[0][i] = qkv[r * row + query_at..][..d].as_ptr().cast();
            pointers[1][i] = d_out.as_ptr().cast();
        }
        // SAFETY: each pointer is to the `d` values of a row of one head.
        unsafe {
            pack_columns(cpu, &pointers[0][..nq], words, queries_turned);
            pack_columns(cpu, &pointers[1][..nq], words, d_out_turned);
        }
        for strip in 0..strips {
            let (at, width) = (strip * PANEL, PANEL.min(d - strip * PANEL));
            let place = strip * panel_words * PANEL..(strip + 1) * panel_words * PANEL;
            let q = &qkv[block.start * row + query_at + at..];
            pack_rows_padded(cpu, q, row, nq, width, &mut queries_packed[place.clone()]);
            let d_out = &d_out[block.start * out_row + out_at + at..];
            pack_rows_padded(cpu, d_out, out_row, nq, width, &mut d_out_packed[place]);
        }
        d_queries[..nq * d].fill(0.0);
        // Keys that some query of the block sees, counted from the sequence's start.
        let low = (block.start + 1).saturating_sub(window).max(sequence.start) - sequence.start;
        let (diagonal, high) = (block.start - sequence.start, block.end - sequence.start);
        let before = (low / KEYS * KEYS..diagonal).step_by(KEYS).map(|key| (key, KEYS.min(diagonal - key)));
        let beside = (diagonal..high).step_by(KEYS_DIAGONAL).map(|key| (key, KEYS_DIAGONAL.min(high - key)));
        for (key, count) in before.chain(beside) {
            let first = sequence.start + key;
            // Queries at the block's start that see none of these keys, by whole vectors.
            let skip = first.saturating_sub(block.start) / VECTOR * VECTOR;
            // Scores transposed, (key, query), and the gradient of the weights likewise.
            for (at, b, to) in [(key_at, &*queries_turned, &mut *scores), (value_at, &*d_out_turned, &mut *d_weights)] {
                let segment = Segment {
                    a: qkv[first * row + at..].as_ptr().cast(),
                    row_step: row * size_of::<E>(),
                    word_step: size_of::<u32>(),
                    words,
                    b: b[skip..].as_ptr(),
                };
                let store = Store::wide(to[skip..].as_mut_ptr(), PANEL);
                // SAFETY: A is `count` keys or values, B the packed block; the result has a row of a panel for each key.
                unsafe { rows::<E, false>(cpu, count, PANEL - skip, &[segment], store) };
            }
            let place = (first, block.start, nq, window, skip);
            match shape.soft_cap {
                None => {
                    let scale = shape.scale;
                    weigh(cpu, count, place, scale, log_sum, mean, scores, d_weights, weights, d_scores, pairs);
                }
                Some(cap) => {
                    let scale = (shape.scale, cap);
                    weigh_capped(cpu, count, place, scale, log_sum, mean, scores, d_weights, weights, d_scores, pairs);
                }
            }
            for strip in 0..strips {
                let (at, width) = (strip * PANEL, PANEL.min(d - strip * PANEL));
                let b = (strip * panel_words + skip / E::PER_WORD) * PANEL;
                // dv += wᵀ do; dk += dsᵀ q.
                let products =
                    [(&*weights, &*d_out_packed, &mut *d_values), (&*d_scores, &*queries_packed, &mut *d_keys)];
                for (a, packed, to) in products {
                    let segment = Segment {
                        a: a[skip..].as_ptr().cast(),
                        row_step: PANEL * size_of::<E>(),
                        word_step: size_of::<u32>(),
                        words: panel_words - skip / E::PER_WORD,
                        b: packed[b..].as_ptr(),
                    };
                    let store = Store::adding(to[key * d + at..].as_mut_ptr(), d);
                    // SAFETY: A is `count` rows of a panel, B the block packed by rows; the result has a row for each key.
                    unsafe { rows::<E, false>(cpu, count, width, &[segment], store) };
                }
                // dq += ds k.
                let segment = Segment {
                    a: pairs[skip..].as_ptr().cast(),
                    row_step: size_of::<u32>(),
                    word_step: PANEL * size_of::<u32>(),
                    words: count.div_ceil(E::PER_WORD),
                    b: keys[(strip * key_words + key / E::PER_WORD) * PANEL..].as_ptr(),
                };
                let store = Store::adding(d_queries[skip * d + at..].as_mut_ptr(), d);
                // SAFETY: A is a word for each pair of keys and query, B the packed keys from `key` on.
                unsafe { rows::<E, true>(cpu, nq - skip, width, &[segment], store) };
            }
        }
        for (i, r) in block.enumerate() {
            // SAFETY: this task alone writes this head's columns of this row.
            let to = unsafe { d_qkv.slice(r * row + query_at, d) };
            rotate_back(cpu, &d_queries[i * d..(i + 1) * d], turn.at(r), shape.scale, to);
        }
    }
}

/// The vectors of a panel's columns.
#[inline(always)]
fn vectors<T>(values: &[T; PANEL]) -> &[[T; VECTOR]; PANEL / VECTOR] {
    values.as_chunks().0.try_into().expect("a panel is whole vectors")
}

/// The same, to write.
#[inline(always)]
fn vectors_mut<T>(values: &mut [T; PANEL]) -> &mut [[T; VECTOR]; PANEL / VECTOR] {
    values.as_chunks_mut().0.try_into().expect("a panel is whole vectors")
}

/// First key, first query, queries, window, queries to leave out.
type Place = (usize, usize, usize, usize, usize);

per_cpu! {
    /// [`weigh_block`] of scores `scale s`.
    fn weigh<E: Element>(
        count: usize,
        place: Place,
        scale: f32,
        log_sum: &[f32; PANEL],
        mean: &[f32; PANEL],
        scores: &[f32],
        d_weights: &[f32],
        weights: &mut [E],
        d_scores: &mut [E],
        pairs: &mut [u32],
    ) {
        weigh_block(count, place, |s| (s * scale, None), log_sum, mean, scores, d_weights, weights, d_scores, pairs);
    }
}

per_cpu! {
    /// [`weigh_block`] of scores `cap · tanh(scale s / cap)`, whose slope by `scale s` is 1 − tanh².
    fn weigh_capped<E: Element>(
        count: usize,
        place: Place,
        scale_and_cap: (f32, f32),
        log_sum: &[f32; PANEL],
        mean: &[f32; PANEL],
        scores: &[f32],
        d_weights: &[f32],
        weights: &mut [E],
        d_scores: &mut [E],
        pairs: &mut [u32],
    ) {
        let (scale, cap) = (scale_and_cap.0 / scale_and_cap.1, scale_and_cap.1);
        let score = |s: f32| {
            let t = tanh(s * scale);
            (cap * t, Some(1.0 - t * t))
        };
        weigh_block(count, place, score, log_sum, mean, scores, d_weights, weights, d_scores, pairs);
    }
}

/// Weights `w = exp(score − log_sum)` and `ds = w (dw − mean)` times the score's slope, mean = Σ w dw = do · o, of a block of keys
/// (rows) and queries (columns), zero where a query does not see a key; ds also as words of neighbouring keys.
///
/// `score`: of a product of a query and a key, with the slope of a score that is capped.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn weigh_block<E: Element>(
    count: usize,
    place: Place,
    score: impl Fn(f32) -> (f32, Option<f32>),
    log_sum: &[f32; PANEL],
    mean: &[f32; PANEL],
    scores: &[f32],
    d_weights: &[f32],
    weights: &mut [E],
    d_scores: &mut [E],
    pairs: &mut [u32],
) {
    let (first_key, first_query, nq, window, skip) = place;
    let skip = skip / VECTOR;
    let scores = scores.as_chunks::<PANEL>().0;
    let d_weights = d_weights.as_chunks::<PANEL>().0;
    let weights = weights.as_chunks_mut::<PANEL>().0;
    let d_scores = d_scores.as_chunks_mut::<PANEL>().0;
    for k in 0..count {
        let key = first_key + k;
        // Queries from the key's own position on, as far as the window reaches.
        let from = key.saturating_sub(first_query).min(nq);
        let to = key.saturating_add(window).saturating_sub(first_query).min(nq).max(from);
        let (scores, d_weights) = (&vectors(&scores[k])[skip..], &vectors(&d_weights[k])[skip..]);
        let (log_sums, means) = (&vectors(log_sum)[skip..], &vectors(mean)[skip..]);
        let outs = vectors_mut(&mut weights[k])[skip..].iter_mut().zip(&mut vectors_mut(&mut d_scores[k])[skip..]);
        for (v, (weights, d_scores)) in outs.enumerate() {
            let (scores, d_weights, log_sum, mean) = (&scores[v], &d_weights[v], &log_sums[v], &means[v]);
            for j in 0..VECTOR {
                let (score, slope) = score(scores[j]);
                let w = exp(score - log_sum[j]);
                weights[j] = E::of(w);
                let d_score = w * (d_weights[j] - mean[j]);
                d_scores[j] = E::of(slope.map_or(d_score, |slope| d_score * slope));
            }
        }
        for unseen in [skip * VECTOR..from, to..PANEL] {
            weights[k][unseen.clone()].fill(E::default());
            d_scores[k][unseen].fill(E::default());
        }
    }
    if !count.is_multiple_of(E::PER_WORD) {
        d_scores[count].fill(E::default());
    }
    for (p, pairs) in pairs.as_chunks_mut::<PANEL>().0.iter_mut().enumerate().take(count.div_ceil(E::PER_WORD)) {
        let (first, last) = (&d_scores[p * E::PER_WORD], &d_scores[p * E::PER_WORD + E::PER_WORD - 1]);
        let (first, last) = (&vectors(first)[skip..], &vectors(last)[skip..]);
        for (v, pairs) in vectors_mut(pairs)[skip..].iter_mut().enumerate() {
            for j in 0..VECTOR {
                pairs[j] = word(first[v][j], last[v][j]);
            }
        }
    }
}
