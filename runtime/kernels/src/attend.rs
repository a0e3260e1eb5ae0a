//! Causal grouped-query attention of single queries over keys and values that are kept, as in decoding.
//!
//! A sequence's positions are cut into [`SPAN`]s, counted from its first, so that a long one is many tasks; each yields its part
//! of the softmax, and parts are joined in their order. So a result depends on its sequence alone. After Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>, section 3.1.

use std::cell::RefCell;
use std::ops::Range;

use crate::attention::Attention;
use crate::cpu::{Cpu, cpu, per_cpu};
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
        let cpu = cpu();
        #[cfg(target_arch = "x86_64")]
        if cpu >= Cpu::Avx512 && d.is_multiple_of(16) {
            // SAFETY: the processor has AVX-512, and rows are whole, as asserted.
            return unsafe { avx512::part_of(q, rows, places, d, scale, scores, out) };
        }
        part_of(cpu, q, rows, places, d, scale, scores, out);
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
        weigh(n, d, scores, out);
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

/// Scores to weights; their sum and what they are relative to stand behind the sums of values, which begin at 0.
#[inline(always)]
fn weigh(n: usize, d: usize, scores: &mut [f32], out: &mut [f32]) {
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
}

/// The same with sums in registers, for heads of whole vectors.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{SPAN, weigh};
    use crate::element::Element;

    /// Keys whose scores are added up together.
    const KEYS: usize = 16;
    /// Query heads whose sums of values stay in registers, and vectors of each.
    const HEADS: usize = 4;
    const VECTORS: usize = 4;

    /// Sixteen values.
    ///
    /// # Safety
    /// They are readable at `p`, and the processor has AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    unsafe fn load<E: Element>(p: *const E) -> __m512 {
        // SAFETY: the caller has sixteen values at the pointer.
        unsafe {
            if E::PER_WORD == 1 {
                _mm512_loadu_ps(p.cast())
            } else {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }

    /// The sums of the lanes of sixteen vectors, in order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    fn sums(v: [__m512; KEYS]) -> __m512 {
        // Each step halves the lanes that belong to a vector and puts those of two beside each other.
        let step = |a: [__m512; 2], b: [__m512; 2]| -> [__m512; 2] {
            let add = |x: __m512, y: __m512| _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
            [add(a[0], a[1]), add(b[0], b[1])]
        };
        let pair = |x: __m512, y: __m512| {
            let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
            let (low, high) = (_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
            _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
        };
        // Within each 128 bits: the sums of four vectors.
        let mut fours = [_mm512_setzero_ps(); 4];
        for (i, four) in fours.iter_mut().enumerate() {
            let [a, b] = step([v[4 * i], v[4 * i + 1]], [v[4 * i + 2], v[4 * i + 3]]);
            *four = pair(a, b);
        }
        let quarters = |x: __m512, y: __m512| {
            let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y);
            let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y);
            _mm512_add_ps(low, high)
        };
        quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]))
    }

    /// See [`super::part_of`].
    ///
    /// # Safety
    /// Rows are whole, heads of `d` values, a multiple of sixteen, and the processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    pub unsafe fn part_of<E: Element>(
        q: &[f32],
        rows: &[E],
        (row, key_at, value_at): (usize, usize, usize),
        d: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let n = rows.len() / row;
        for from in (0..n).step_by(KEYS) {
            for (head, q) in q.chunks_exact(d).enumerate() {
                let mut all = [_mm512_setzero_ps(); KEYS];
                for (j, all) in all.iter_mut().enumerate() {
                    // Beyond the last key that key again; nobody looks at its score.
                    let key = (from + j).min(n - 1) * row + key_at;
                    for c in (0..d).step_by(16) {
                        // SAFETY: keys and queries have `d` values, a multiple of sixteen.
                        let (k, q) = unsafe { (load(rows.as_ptr().add(key + c)), _mm512_loadu_ps(q.as_ptr().add(c))) };
                        *all = _mm512_fmadd_ps(k, q, *all);
                    }
                }
                let sums = _mm512_mul_ps(sums(all), _mm512_set1_ps(scale));
                // SAFETY: a head has `SPAN` scores, a multiple of sixteen.
                unsafe { _mm512_storeu_ps(scores.as_mut_ptr().add(head * SPAN + from), sums) };
            }
        }
        weigh(n, d, scores, out);
        let heads = q.len() / d;
        for first in (0..heads).step_by(HEADS) {
            let count = HEADS.min(heads - first);
            for c in (0..d).step_by(16 * VECTORS) {
                let vectors = VECTORS.min((d - c) / 16);
                let mut all = [[_mm512_setzero_ps(); VECTORS]; HEADS];
                for j in 0..n {
                    let value = j * row + value_at + c;
                    let mut v = [_mm512_setzero_ps(); VECTORS];
                    for (i, v) in v.iter_mut().enumerate() {
                        // Beyond the last vector that one again.
                        // SAFETY: values have `d` values.
                        *v = unsafe { load(rows.as_ptr().add(value + 16 * i.min(vectors - 1))) };
                    }
                    for (head, all) in all.iter_mut().enumerate() {
                        let weight = _mm512_set1_ps(scores[(first + head.min(count - 1)) * SPAN + j]);
                        for (all, v) in all.iter_mut().zip(v) {
                            *all = _mm512_fmadd_ps(weight, v, *all);
                        }
                    }
                }
                for (head, all) in all[..count].iter().enumerate() {
                    for (i, all) in all[..vectors].iter().enumerate() {
                        let at = (first + head) * (d + 2) + c + 16 * i;
                        // SAFETY: a head has `d` sums.
                        unsafe { _mm512_storeu_ps(out[at..at + 16].as_mut_ptr(), *all) };
                    }
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
