//! Attention of many queries: scores and sums of values by tiles.

use std::ops::Range;

use super::scratch::{SCRATCH, Scratch};
use super::shape::Attention;
use crate::buffer::grown;
use crate::element::{Element, exp, largest, replace_and_sum};
use crate::isa::{Isa, isa, per_isa};
use crate::layer::soft_cap::cap_scores;
use crate::pool::{Shared, for_each};
use crate::product::ProductElement;
use crate::tile::{PANEL, Segment, Store, pack_columns, pack_rows_padded, rows};

/// Query rows that forward takes at once: whole tiles, and their scores over 2,000 keys still fit the second-level cache.
pub(super) const QUERIES: usize = 48;
/// Query rows of a task of forward, for which keys and values are packed.
const CHUNK: usize = 5 * QUERIES;
/// Columns of the widest vector: scores are left out by so many.
const VECTOR: usize = 16;

/// `softmax(scale q kᵀ) v` for each head, of scores that are capped if there is a cap: rows of q, k, v (m, [`Attention::row`]) to out (m, H D); `log_sums` (H, m) is kept
/// for backward.
///
/// # Panics
/// When sizes disagree.
pub fn attention<E: ProductElement>(shape: &Attention, qkv: &[E], out: &mut [E], log_sums: &mut [f32]) {
    E::attention(shape, qkv, out, log_sums);
}

/// See [`attention`].
pub fn of_sequences<E: ProductElement>(shape: &Attention, qkv: &[E], out: &mut [E], log_sums: &mut [f32]) {
    let (row, m) = (shape.row(), log_sums.len() / shape.heads);
    shape.check(m);
    assert!(qkv.len() == m * row && out.len() == m * shape.heads * shape.head_dim && log_sums.len() == m * shape.heads);
    let isa = isa();
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
            forward_chunk(isa, shape, &source, place, out, log_sums, m, scratch);
        });
    });
}

/// [`attention`] of a sequence whose earlier keys and values are kept: rows of q, k, v (m, [`Attention::row`]), the last m of
/// the positions in `kept` (T, 2 H_kv D), k beside v, to out (m, H D). `shape.sequences` is not asked.
///
/// # Panics
/// When sizes disagree.
pub fn attention_kept<E: ProductElement>(shape: &Attention, qkv: &[E], kept: &[E], out: &mut [E]) {
    E::attention_kept(shape, qkv, kept, out);
}

/// See [`attention_kept`].
pub fn of_kept<E: ProductElement>(shape: &Attention, qkv: &[E], kept: &[E], out: &mut [E]) {
    let (row, key_row) = (shape.row(), 2 * shape.kv_heads * shape.head_dim);
    shape.check_heads(qkv.len() / row);
    let (m, total) = (qkv.len() / row, kept.len() / key_row);
    let sizes = qkv.len() == m * row && kept.len() == total * key_row && out.len() == m * shape.heads * shape.head_dim;
    assert!(sizes && m <= total, "{m} rows, the last of {total}");
    let (isa, out, offset) = (isa(), Shared::new(out), total - m);
    let value_at = shape.kv_heads * shape.head_dim;
    let source = Source { queries: qkv, query_row: row, offset, keys: kept, key_row, key_at: 0, value_at };
    // Chunks begin at the same positions whatever part of a sequence is asked for.
    let first = offset / CHUNK;
    for_each((total.div_ceil(CHUNK) - first) * shape.kv_heads, |task| {
        let from = (first + task / shape.kv_heads) * CHUNK;
        let queries = from.max(offset)..total.min(from + CHUNK);
        SCRATCH.with_borrow_mut(|scratch| {
            forward_chunk(isa, shape, &source, (task % shape.kv_heads, 0, queries), out, None, m, scratch);
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
    isa: Isa,
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
        unsafe { pack_columns(isa, &pointers[..width], words, out) };
    }
    // Values by words of neighbouring positions, padded to whole panels of keys.
    let value_words = panels * PANEL / E::PER_WORD;
    let strips = d.div_ceil(PANEL);
    let values = grown(values, strips * value_words * PANEL);
    for (strip, out) in values.chunks_exact_mut(value_words * PANEL).enumerate() {
        let at = strip * PANEL;
        let width = PANEL.min(d - at);
        pack_rows_padded(isa, &kv[first * key_row + value_at + at..], key_row, count, width, out);
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
                unsafe { rows::<E, false>(isa, block.len(), width, &[segment], store) };
            }
            for (i, query) in block.clone().enumerate() {
                let seen = query.saturating_sub(window - 1).max(first) - first..query + 1 - first;
                let (scores, weights) = (&mut scores[i * step..][..step], &mut weights[i * step..][..step]);
                // Capped scores are scaled already.
                let scale = match shape.soft_cap {
                    None => shape.scale,
                    Some(cap) => {
                        cap_scores(isa, &mut scores[seen.clone()], shape.scale, cap);
                        1.0
                    }
                };
                let log_sum = softmax_row(isa, scores, seen, low..high, scale, weights);
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
                unsafe { rows::<E, false>(isa, block.len(), width, &[segment], store) };
            }
        }
    }
}

per_isa! {
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
