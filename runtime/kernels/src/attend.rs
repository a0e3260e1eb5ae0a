//! Causal grouped-query attention of single queries over keys and values that are kept, as in decoding.
//!
//! A sequence's positions are cut into [`SPAN`]s, counted from its first, so that a long one is many tasks; each yields its part
//! of the softmax, and parts are joined in their order. So a result depends on its sequence alone. After Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>, section 3.1.

use std::cell::RefCell;
use std::ops::Range;

use crate::attention::Attention;
use crate::cpu::{cpu, per_cpu};
use crate::element::{Element, exp, largest, sum, sum2};
use crate::product::grown;

/// Positions of a part.
const SPAN: usize = 256;

/// Values of a part for one query head: the sums of values, of weights, and the score that weights are relative to.
fn part_len(head_dim: usize) -> usize {
    head_dim + 2
}

/// The parts of a query at the last of `positions` positions: those of which it sees some.
fn parts(shape: &Attention, positions: usize) -> Range<usize> {
    positions.saturating_sub(shape.window.unwrap_or(usize::MAX)) / SPAN..positions.div_ceil(SPAN)
}

/// Tasks of [`attend`] for a query at the last of `positions` positions.
pub fn attend_tasks(shape: &Attention, positions: usize) -> usize {
    parts(shape, positions).len() * shape.kv_heads
}

/// Values that each task of [`attend`] yields.
pub fn attend_values(shape: &Attention) -> usize {
    shape.heads / shape.kv_heads * part_len(shape.head_dim)
}

thread_local!(static SCRATCH: RefCell<Vec<f32>> = RefCell::default());

/// One task: the part of a softmax over some positions, for the query heads that share a key head. q (H D) is the query at the
/// last position of `kept` (T, 2 H_kv D), k beside v; `out` has [`attend_values`].
///
/// # Panics
/// When sizes disagree.
pub fn attend<E: Element>(shape: &Attention, q: &[f32], kept: &[E], task: usize, out: &mut [f32]) {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let row = 2 * shape.kv_heads * d;
    let positions = kept.len() / row;
    assert!(q.len() == shape.heads * d && kept.len() == positions * row && out.len() == attend_values(shape), "sizes");
    let (kv_head, part) = (task % shape.kv_heads, parts(shape, positions).start + task / shape.kv_heads);
    let first = positions.saturating_sub(shape.window.unwrap_or(usize::MAX));
    let seen = first.max(part * SPAN)..positions.min((part + 1) * SPAN);
    assert!(!seen.is_empty(), "there is no task {task}");
    let q = &q[kv_head * group * d..][..group * d];
    let scale = (d as f32).powf(-0.5);
    SCRATCH.with_borrow_mut(|scratch| {
        let scores = grown(scratch, group * SPAN);
        let rows = &kept[seen.start * row..seen.end * row];
        let places = (row, kv_head * d, (shape.kv_heads + kv_head) * d);
        part_of(cpu(), q, rows, places, d, scale, scores, out);
    });
}

per_cpu! {
    fn part_of<E: Element>(
        q: &[f32],
        rows: &[E],
        places: (usize, usize, usize),
        d: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let (row, key_at, value_at) = places;
        let n = rows.len() / row;
        for (j, row) in rows.chunks_exact(row).enumerate() {
            let key = &row[key_at..key_at + d];
            for (head, q) in q.chunks_exact(d).enumerate() {
                scores[head * SPAN + j] = sum2(q, key, |q, k| q * k) * scale;
            }
        }
        for (out, scores) in out.chunks_exact_mut(d + 2).zip(scores.chunks_exact_mut(SPAN)) {
            let scores = &mut scores[..n];
            let top = largest(scores);
            for score in scores.iter_mut() {
                *score = exp(*score - top);
            }
            out[..d].fill(0.0);
            out[d] = sum(scores, |weight| weight);
            out[d + 1] = top;
        }
        for (j, row) in rows.chunks_exact(row).enumerate() {
            let value = &row[value_at..value_at + d];
            for (out, scores) in out.chunks_exact_mut(d + 2).zip(scores.chunks_exact(SPAN)) {
                let weight = scores[j];
                for (out, value) in out[..d].iter_mut().zip(value) {
                    *out += weight * value.wide();
                }
            }
        }
    }
}

/// Joins the parts that all tasks of a query yielded, one after another, to out (H D).
///
/// # Panics
/// When sizes disagree.
pub fn attend_join(shape: &Attention, parts: &[f32], out: &mut [f32]) {
    let (d, group, all) = (shape.head_dim, shape.heads / shape.kv_heads, attend_values(shape));
    assert!(
        parts.len().is_multiple_of(all * shape.kv_heads) && !parts.is_empty() && out.len() == shape.heads * d,
        "parts"
    );
    for (head, out) in out.chunks_exact_mut(d).enumerate() {
        let (kv_head, within) = (head / group, head % group);
        let own = || {
            let tasks = parts.chunks_exact(all).skip(kv_head).step_by(shape.kv_heads);
            tasks.map(|task| &task[within * part_len(d)..][..part_len(d)])
        };
        let top = own().map(|part| part[d + 1]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |part: &[f32]| exp(part[d + 1] - top);
        let total: f32 = own().map(|part| part[d] * weight(part)).sum();
        out.fill(0.0);
        for part in own() {
            let weight = weight(part) / total;
            for (out, value) in out.iter_mut().zip(&part[..d]) {
                *out += weight * value;
            }
        }
    }
}
