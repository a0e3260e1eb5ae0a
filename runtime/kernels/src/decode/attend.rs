//! Causal grouped-query attention of single queries over keys and values that are kept, as in decoding.
//!
//! A sequence's positions are cut into spans, counted from its first, so that a long one is many tasks; each reads its keys and values
//! in the order in which they lie and yields its part of the softmax, and parts are joined in their order. So a result depends on its
//! sequence alone. After Dao et al. 2022, <https://arxiv.org/abs/2205.14135>, section 3.1.

use std::cell::RefCell;
use std::ops::Range;

use crate::attention::Attention;
use crate::buffer::grown;
use crate::element::{Element, exp, largest, sum, sum2};
#[cfg(target_arch = "x86_64")]
use crate::isa::Feature;
use crate::isa::{Isa, isa, per_isa};
use crate::layer::soft_cap::cap_scores;

/// Positions of the shortest span. The length of others is a multiple.
const SPAN: usize = 64;
/// Positions of the longest.
const LONGEST: usize = 256;
/// Spans that are as good as more: there are tasks for all threads, and little to join.
const ENOUGH: usize = 16;
/// Values of a head that are taken at once where there are instructions for it.
const STEP: usize = 32;

/// Values of a part for one query head: the sums of values, of weights, and the score that weights are relative to.
fn part_len(head_dim: usize) -> usize {
    head_dim + 2
}

/// Positions of a span.
fn span(positions: usize) -> usize {
    (positions / ENOUGH).next_multiple_of(SPAN).clamp(SPAN, LONGEST)
}

/// The parts of a query at the last of `positions` positions: those of which it sees some.
fn parts(shape: &Attention, positions: usize) -> Range<usize> {
    let span = span(positions);
    positions.saturating_sub(shape.window.unwrap_or(usize::MAX)) / span..positions.div_ceil(span)
}

/// Tasks of [`attend`] for a query at the last of `positions` positions.
pub fn attend_tasks(shape: &Attention, positions: usize) -> usize {
    parts(shape, positions).len()
}

/// Values that each task of [`attend`] yields.
pub fn attend_values(shape: &Attention) -> usize {
    shape.heads * part_len(shape.head_dim)
}

thread_local!(static SCRATCH: RefCell<Vec<f32>> = RefCell::default());

/// One task: the part of a softmax over some positions. q (H D) is the query at the last position of `kept` (T, 2 H_kv D), k beside v;
/// `out` has [`attend_values`].
///
/// # Panics
/// When sizes disagree.
pub fn attend<E: Element>(shape: &Attention, q: &[f32], kept: &[E], task: usize, out: &mut [f32]) {
    E::attend(shape, q, kept, task, out);
}

/// See [`attend`].
pub fn task_of<E: Element>(shape: &Attention, q: &[f32], kept: &[E], task: usize, out: &mut [f32]) {
    let (d, heads) = (shape.head_dim, shape.heads);
    let row = 2 * shape.kv_heads * d;
    let positions = kept.len() / row;
    assert!(q.len() == heads * d && kept.len() == positions * row && out.len() == attend_values(shape), "sizes");
    let (span, part) = (span(positions), parts(shape, positions).start + task);
    let first = positions.saturating_sub(shape.window.unwrap_or(usize::MAX));
    let seen = first.max(part * span)..positions.min((part + 1) * span);
    assert!(!seen.is_empty(), "there is no task {task}");
    let rows = Rows { values: &kept[seen.start * row..seen.end * row], d, kv_heads: shape.kv_heads };
    assert!(shape.soft_cap.is_none_or(|cap| cap > 0.0), "scores are capped at {:?}", shape.soft_cap);
    SCRATCH.with_borrow_mut(|scratch| {
        let scores = heads * rows.stride();
        let (scores, turned) = grown(scratch, scores + heads * d.next_multiple_of(STEP)).split_at_mut(scores);
        let isa = isa();
        #[cfg(target_arch = "x86_64")]
        if isa.has(Feature::Avx512) {
            // SAFETY: the processor has AVX-512, and rows are whole, as asserted.
            return unsafe { avx512::part_of(q, rows, (shape.scale, shape.soft_cap), (scores, turned), out) };
        }
        let _ = turned;
        part_of(isa, q, rows, isa, shape.scale, shape.soft_cap, scores, out);
    });
}

/// Keys and values of some positions.
#[derive(Clone, Copy)]
struct Rows<'a, E> {
    /// (n, 2 H_kv D), k beside v.
    values: &'a [E],
    d: usize,
    kv_heads: usize,
}

impl<E> Rows<'_, E> {
    /// Values of a position.
    fn width(&self) -> usize {
        2 * self.kv_heads * self.d
    }

    /// Positions.
    fn count(&self) -> usize {
        self.values.len() / self.width()
    }

    /// From the scores of one head to those of the next.
    fn stride(&self) -> usize {
        self.count().next_multiple_of(SPAN)
    }
}

per_isa! {
    fn part_of<E: Element>(
        q: &[f32],
        rows: Rows<'_, E>,
        isa: Isa,
        scale: f32,
        cap: Option<f32>,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let (d, stride) = (rows.d, rows.stride());
        // Query heads that share a key head.
        let group = q.len() / (rows.kv_heads * d);
        for (j, row) in rows.values.chunks_exact(rows.width()).enumerate() {
            for (head, q) in q.chunks_exact(d).enumerate() {
                scores[head * stride + j] = sum2(q, &row[head / group * d..][..d], |q, k| q * k) * scale;
            }
        }
        if let Some(cap) = cap {
            cap_all(isa, rows.count(), cap, scores, stride);
        }
        weigh(rows.count(), d, scores, stride, out);
        for (j, row) in rows.values.chunks_exact(rows.width()).enumerate() {
            for (head, (out, scores)) in out.chunks_exact_mut(d + 2).zip(scores.chunks_exact(stride)).enumerate() {
                let (weight, value) = (scores[j], &row[(rows.kv_heads + head / group) * d..][..d]);
                for (out, value) in out[..d].iter_mut().zip(value) {
                    *out += weight * value.wide();
                }
            }
        }
    }
}

/// Caps the scores of every head with n positions.
#[cold]
fn cap_all(isa: Isa, n: usize, cap: f32, scores: &mut [f32], stride: usize) {
    for scores in scores.chunks_exact_mut(stride) {
        cap_scores(isa, &mut scores[..n], 1.0, cap);
    }
}

/// Scores, scaled, to weights; their sum and what they are relative to stand behind the sums of values, which begin at 0.
#[inline(always)]
fn weigh(n: usize, d: usize, scores: &mut [f32], stride: usize, out: &mut [f32]) {
    for (out, scores) in out.chunks_exact_mut(d + 2).zip(scores.chunks_exact_mut(stride)) {
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

/// The same with sums in registers. Values are taken by 32, as a vector of those with an even and one of those with an odd number
/// where two share a word: apart they become floats by one instruction each. The query is laid out likewise.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Rows, STEP, cap_all, weigh};
    use crate::element::Element;
    use crate::isa::Isa;

    /// Scores that are added up together: of some query heads with some keys.
    const SCORES: usize = 16;

    /// The values at `p` that have a bit in `mask`.
    ///
    /// # Safety
    /// They are readable, and the processor has AVX-512.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    unsafe fn load<E: Element>(p: *const E, mask: u32) -> [__m512; 2] {
        // SAFETY: passed on to the caller.
        unsafe {
            if E::PER_WORD == 1 {
                let p: *const f32 = p.cast();
                [_mm512_maskz_loadu_ps(mask as u16, p), _mm512_maskz_loadu_ps((mask >> 16) as u16, p.wrapping_add(16))]
            } else {
                let words = _mm512_maskz_loadu_epi16(mask, p.cast());
                let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xFFFF_0000_u32 as i32));
                [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(odd)]
            }
        }
    }

    /// A bit for each of the values of a head of `d` that are taken from number `from` on.
    fn mask(d: usize, from: usize) -> u32 {
        let count = d - from;
        if count >= STEP { u32::MAX } else { (1 << count) - 1 }
    }

    /// Where value i of those taken at once lies among two vectors.
    fn place<E: Element>(i: usize) -> usize {
        if E::PER_WORD == 1 { i } else { i % 2 * 16 + i / 2 }
    }

    /// The sums of the lanes of sixteen vectors, in order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    fn sums(v: [__m512; SCORES]) -> __m512 {
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

    /// Positions that are read together.
    const TOGETHER: usize = 16;

    /// Reads values in the order in which they lie, and does nothing with them: memory then comes faster than head by head, even where
    /// each head asks for what the next will read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn read<E: Element>(values: &[E]) {
        let (p, mut any) = (values.as_ptr().cast::<u8>(), _mm512_setzero_si512());
        for line in 0..size_of_val(values) / 64 {
            // SAFETY: so many whole lines there are.
            any = _mm512_or_si512(any, unsafe { _mm512_loadu_si512(p.add(64 * line).cast()) });
        }
        std::hint::black_box(any);
    }

    /// See [`super::part_of`]; `turned` has `d` values for each head, rounded up to a multiple of [`STEP`].
    ///
    /// # Safety
    /// Rows are whole, and the processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    pub unsafe fn part_of<E: Element>(
        q: &[f32],
        rows: Rows<'_, E>,
        (scale, cap): (f32, Option<f32>),
        (scores, turned): (&mut [f32], &mut [f32]),
        out: &mut [f32],
    ) {
        let (d, step, stride) = (rows.d, rows.d.next_multiple_of(STEP), rows.stride());
        turned.fill(0.0);
        for (q, turned) in q.chunks_exact(d).zip(turned.chunks_exact_mut(step)) {
            for (q, turned) in q.chunks(STEP).zip(turned.chunks_exact_mut(STEP)) {
                q.iter().enumerate().for_each(|(i, q)| turned[place::<E>(i)] = q * scale);
            }
        }
        let (n, group) = (rows.count(), q.len() / (rows.kv_heads * d));
        for from in (0..n).step_by(TOGETHER) {
            read(&rows.values[from * rows.width()..n.min(from + TOGETHER) * rows.width()]);
            for kv_head in 0..rows.kv_heads {
                for first in (0..group).step_by(4) {
                    let head = kv_head * group + first;
                    let (q, scores) = (&turned[head * step..], &mut scores[head * stride..]);
                    // SAFETY: passed on to the caller.
                    unsafe {
                        match group - first {
                            1 => scores_of::<E, 1, 16>(rows, kv_head, from, q, scores),
                            2 => scores_of::<E, 2, 8>(rows, kv_head, from, q, scores),
                            3 => scores_of::<E, 3, 4>(rows, kv_head, from, q, scores),
                            _ => scores_of::<E, 4, 4>(rows, kv_head, from, q, scores),
                        }
                    }
                }
            }
        }
        if let Some(cap) = cap {
            cap_all(Isa::AVX512, n, cap, scores, stride);
        }
        weigh(n, d, scores, stride, out);
        for kv_head in 0..rows.kv_heads {
            for first in (0..group).step_by(4) {
                let head = kv_head * group + first;
                let (scores, out) = (&scores[head * stride..], &mut out[head * (d + 2)..]);
                // SAFETY: passed on to the caller.
                unsafe {
                    match group - first {
                        1 => values_of::<E, 1>(rows, kv_head, scores, out),
                        2 => values_of::<E, 2>(rows, kv_head, scores, out),
                        3 => values_of::<E, 3>(rows, kv_head, scores, out),
                        _ => values_of::<E, 4>(rows, kv_head, scores, out),
                    }
                }
            }
        }
    }

    /// Scores of H heads with positions from `from` on, K keys at a time.
    ///
    /// # Safety
    /// As [`part_of`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    unsafe fn scores_of<E: Element, const H: usize, const K: usize>(
        rows: Rows<'_, E>,
        kv_head: usize,
        from: usize,
        q: &[f32],
        scores: &mut [f32],
    ) {
        let (n, d, step, stride) = (rows.count(), rows.d, rows.d.next_multiple_of(STEP), rows.stride());
        for from in (from..n.min(from + TOGETHER)).step_by(K) {
            let mut all = [_mm512_setzero_ps(); SCORES];
            for c in (0..d).step_by(STEP) {
                let mask = mask(d, c);
                for k in 0..K {
                    // Beyond the last key that key again; nobody looks at its score.
                    let at = (from + k).min(n - 1) * rows.width() + kv_head * d + c;
                    // SAFETY: a key has as many values as the mask has bits; heads of the query are filled up.
                    unsafe {
                        let [a, b] = load(rows.values.as_ptr().add(at), mask);
                        for h in 0..H {
                            let q = q.as_ptr().add(h * step + c);
                            let all = &mut all[h * K + k];
                            *all = _mm512_fmadd_ps(a, _mm512_loadu_ps(q), *all);
                            *all = _mm512_fmadd_ps(b, _mm512_loadu_ps(q.add(16)), *all);
                        }
                    }
                }
            }
            let mut added = [0f32; SCORES];
            // SAFETY: it is sixteen values.
            unsafe { _mm512_storeu_ps(added.as_mut_ptr(), sums(all)) };
            for (h, added) in added.as_chunks::<K>().0[..H].iter().enumerate() {
                scores[h * stride + from..][..K].copy_from_slice(added);
            }
        }
    }

    /// Sums of values of H heads, by their weights.
    ///
    /// # Safety
    /// As [`part_of`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
    unsafe fn values_of<E: Element, const H: usize>(
        rows: Rows<'_, E>,
        kv_head: usize,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let (n, d, stride) = (rows.count(), rows.d, rows.stride());
        let value_at = (rows.kv_heads + kv_head) * d;
        // Twice as many at once as are taken.
        for from in (0..d).step_by(2 * STEP) {
            let masks = [mask(d, from), if from + STEP < d { mask(d, from + STEP) } else { 0 }];
            let mut all = [[_mm512_setzero_ps(); 4]; H];
            for j in 0..n {
                // SAFETY: a value has as many values as the masks have bits; there are weights of H heads.
                unsafe {
                    let value = rows.values.as_ptr().add(j * rows.width() + value_at + from);
                    let [a, b] = load(value, masks[0]);
                    let [c, d] = load(value.wrapping_add(STEP), masks[1]);
                    for (h, all) in all.iter_mut().enumerate() {
                        let weight = _mm512_set1_ps(*weights.as_ptr().add(h * stride + j));
                        all[0] = _mm512_fmadd_ps(weight, a, all[0]);
                        all[1] = _mm512_fmadd_ps(weight, b, all[1]);
                        all[2] = _mm512_fmadd_ps(weight, c, all[2]);
                        all[3] = _mm512_fmadd_ps(weight, d, all[3]);
                    }
                }
            }
            for (all, out) in all.iter().zip(out.chunks_exact_mut(d + 2)) {
                let mut values = [0f32; 2 * STEP];
                for (v, values) in all.iter().zip(values.as_chunks_mut::<16>().0) {
                    // SAFETY: it is sixteen values.
                    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), *v) };
                }
                for (i, out) in out[from..d.min(from + 2 * STEP)].iter_mut().enumerate() {
                    *out = values[i / STEP * STEP + place::<E>(i % STEP)];
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
    let (d, all) = (shape.head_dim, attend_values(shape));
    assert!(parts.len().is_multiple_of(all) && !parts.is_empty() && out.len() == shape.heads * d, "parts");
    join(isa(), parts, all, out, d);
}

per_isa! {
    fn join(parts: &[f32], all: usize, out: &mut [f32], d: usize) {
        for (head, out) in out.chunks_exact_mut(d).enumerate() {
            let own = || parts.chunks_exact(all).map(|task| &task[head * part_len(d)..][..part_len(d)]);
            let top = own().map(|part| part[d + 1]).fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = own().map(|part| part[d] * exp(part[d + 1] - top)).sum();
            out.fill(0.0);
            for part in own() {
                let weight = exp(part[d + 1] - top) / total;
                for (out, value) in out.iter_mut().zip(&part[..d]) {
                    *out += weight * value;
                }
            }
        }
    }
}
