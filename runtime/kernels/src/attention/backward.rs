//! The gradients of attention: probabilities once more, block by block.

use std::ops::Range;

use super::scratch::{SCRATCH, Scratch};
use super::shape::Attention;
use crate::buffer::grown;
use crate::element::{Element, dot, exp, tanh};
use crate::isa::{Isa, isa, per_isa};
use crate::layer::rope::{RotaryTable, rotate_back};
use crate::pool::{Shared, for_each, for_ranges};
use crate::product::ProductElement;
use crate::round::narrow;
use crate::tile::{PANEL, Segment, Store, pack_columns, pack_rows_padded, rows, word};

/// Key rows that backward takes at once, with a panel of queries: whole tiles.
const KEYS: usize = 192;
/// The same where keys lie beside the panel's own queries, of which each sees a part.
const KEYS_DIAGONAL: usize = 24;
/// Columns of the widest vector: scores are left out by so many.
const VECTOR: usize = 16;

/// What backward writes between its two passes: gradients of keys and values, a copy for each query head.
#[derive(Default)]
pub struct KeyValueGradients {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Bytes that backward writes between its passes over `m` rows, see [`KeyValueGradients`].
pub fn key_value_gradient_bytes(m: usize, heads: usize, head_dim: usize) -> usize {
    2 * size_of::<f32>() * heads * m * head_dim
}

/// Gradients of q, k and v before their rotation: `d_qkv` laid out as `qkv`, from those of the output, `d_out` (m, H D).
///
/// `turn`: rows (m) of the table by which [`rotate`](crate::rotate) turned q and k; without a table they were not turned,
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
    turn: (&[u32], Option<&RotaryTable>),
    partial: &mut KeyValueGradients,
    d_qkv: &mut [E],
) {
    E::attention_backward(shape, qkv, out, log_sums, d_out, turn, partial, d_qkv);
}

/// See [`attention_backward`].
#[allow(clippy::too_many_arguments)]
pub fn gradients<E: ProductElement>(
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
    let isa = isa();
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
            backward_head(isa, shape, &given, (head, sequence), gradients, shared, scratch);
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
                        add(isa, &from[(head * m + r) * d..][..d], total);
                    }
                };
                add_up(d_keys, &mut total);
                rotate_back(isa, &total, turn.at(r), shape.scale, &mut d_row[key_at..key_at + d]);
                add_up(d_values, &mut total);
                narrow(isa, &total, &mut d_row[value_at..value_at + d]);
            }
        }
    });
}

per_isa! {
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
    isa: Isa,
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
        pack_rows_padded(isa, &qkv[sequence.start * row + key_at + strip * PANEL..], row, t, width, out);
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
            mean[i] = dot(isa, d_out, out);
            pointers[0][i] = qkv[r * row + query_at..][..d].as_ptr().cast();
            pointers[1][i] = d_out.as_ptr().cast();
        }
        // SAFETY: each pointer is to the `d` values of a row of one head.
        unsafe {
            pack_columns(isa, &pointers[0][..nq], words, queries_turned);
            pack_columns(isa, &pointers[1][..nq], words, d_out_turned);
        }
        for strip in 0..strips {
            let (at, width) = (strip * PANEL, PANEL.min(d - strip * PANEL));
            let place = strip * panel_words * PANEL..(strip + 1) * panel_words * PANEL;
            let q = &qkv[block.start * row + query_at + at..];
            pack_rows_padded(isa, q, row, nq, width, &mut queries_packed[place.clone()]);
            let d_out = &d_out[block.start * out_row + out_at + at..];
            pack_rows_padded(isa, d_out, out_row, nq, width, &mut d_out_packed[place]);
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
                unsafe { rows::<E, false>(isa, count, PANEL - skip, &[segment], store) };
            }
            let place = (first, block.start, nq, window, skip);
            match shape.soft_cap {
                None => {
                    let scale = shape.scale;
                    weigh(isa, count, place, scale, log_sum, mean, scores, d_weights, weights, d_scores, pairs);
                }
                Some(cap) => {
                    let scale = (shape.scale, cap);
                    weigh_capped(isa, count, place, scale, log_sum, mean, scores, d_weights, weights, d_scores, pairs);
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
                    unsafe { rows::<E, false>(isa, count, width, &[segment], store) };
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
                unsafe { rows::<E, true>(isa, nq - skip, width, &[segment], store) };
            }
        }
        for (i, r) in block.enumerate() {
            // SAFETY: this task alone writes this head's columns of this row.
            let to = unsafe { d_qkv.slice(r * row + query_at, d) };
            rotate_back(isa, &d_queries[i * d..(i + 1) * d], turn.at(r), shape.scale, to);
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

per_isa! {
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

per_isa! {
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
