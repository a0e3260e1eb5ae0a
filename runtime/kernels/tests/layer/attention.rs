//! Attention, forward and backward, against the whole matrix of scores in f64.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use homeroom_kernels::{
    Attention, Isa, KeyValueGradients, ProductElement, RotaryTable, Stream, attend, attend_join, attend_tasks,
    attend_values, attention, attention_backward, attention_kept, bf16, with_isa,
};

use super::{U, bits, close, is_gradient, isas, narrow, normal, on_any_threads, on_threads, unit, wide};

/// Lengths around tiles (6), blocks of queries (48), panels (64), blocks of keys (128) and chunks of queries (240).
const LENGTHS: [usize; 9] = [1, 2, 47, 48, 0, 49, 65, 129, 300];
const SHORT: [usize; 4] = [2, 65, 129, 1];

fn sequences(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let each = lengths.iter().map(|len| {
        end += len;
        end - len..end
    });
    each.collect()
}

fn frequencies(half: usize) -> Vec<f32> {
    (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect()
}

/// Scores over √D, as most models have them, and no cap.
fn shape(sequences: &[Range<usize>], [heads, kv_heads, head_dim]: [usize; 3], window: Option<usize>) -> Attention<'_> {
    let scale = (head_dim as f32).powf(-0.5);
    Attention { sequences, heads, kv_heads, head_dim, window, scale, soft_cap: None }
}

/// Rows of a rotary table: positions, frequencies and factor of each set.
#[derive(Clone)]
struct Turning(Vec<(usize, Vec<f32>, f32)>);

impl Turning {
    fn whole(head_dim: usize) -> Self {
        Self(vec![(400, frequencies(head_dim / 2), 1.0)])
    }

    /// Of a part of the head, longer sequences by other frequencies.
    fn partial(half: usize) -> Self {
        let long = frequencies(half).iter().map(|frequency| frequency / 3.0).collect();
        Self(vec![(3, frequencies(half), 1.25), (400, long, 0.75)])
    }

    fn table(&self, head_dim: usize) -> RotaryTable {
        let mut table = RotaryTable::new(head_dim);
        let mut rows = 0;
        for (positions, frequencies, factor) in &self.0 {
            assert_eq!(table.append(*positions, frequencies, *factor), rows);
            rows += *positions as u32;
        }
        assert_eq!(table.rows(), rows as usize);
        table
    }

    /// Of a channel of a head that turns: y = a x + b x′, where x′ is the other channel given here.
    fn of(&self, row: u32, channel: usize) -> Option<(f64, usize, f64)> {
        let mut row = row as usize;
        for (positions, frequencies, factor) in &self.0 {
            let half = frequencies.len();
            if channel >= 2 * half {
                return None;
            }
            if row < *positions {
                // The angle is rounded to f32, as transformers has it.
                let angle = f64::from(row as f32 * frequencies[channel % half]);
                let (factor, sign) = (f64::from(*factor), if channel < half { -1.0 } else { 1.0 });
                return Some((factor * angle.cos(), (channel + half) % (2 * half), sign * factor * angle.sin()));
            }
            row -= positions;
        }
        panic!("no such row");
    }
}

/// Values and how far a right kernel may be from each.
#[derive(Default)]
struct Bounded {
    values: Vec<f64>,
    bounds: Vec<f64>,
}

impl Bounded {
    fn zeros(n: usize) -> Self {
        Self { values: vec![0.0; n], bounds: vec![0.0; n] }
    }

    /// `values[at..] += factor row`, where `factor` has an error and a sum of them a relative one.
    fn add(&mut self, at: usize, factor: f64, error: f64, relative: f64, row: &[f64]) {
        let bound = error + relative * factor.abs();
        let (values, bounds) = (&mut self.values[at..][..row.len()], &mut self.bounds[at..][..row.len()]);
        for (value, x) in values.iter_mut().zip(row) {
            *value += factor * x;
        }
        for (error, x) in bounds.iter_mut().zip(row) {
            *error += bound * x.abs();
        }
    }
}

struct Reference {
    out: Bounded,
    log_sums: Bounded,
    d_qkv: Bounded,
}

/// Σ a b and Σ |a b|.
fn dot(a: &[f64], b: &[f64]) -> [f64; 2] {
    let terms = a.iter().zip(b).map(|(a, b)| a * b);
    terms.fold([0.0; 2], |[sum, size], term| [sum + term, size + term.abs()])
}

/// With P = softmax(S), S = scale Q Kᵀ and O = P V:
///
/// dV = Pᵀ dO; dP = dO Vᵀ; dS = P ∘ (dP − Σ_k P dP), as ∂P_k / ∂S_l = P_k ([k = l] − P_l), and Σ_k P_k dP_k = dO · O;
/// dQ = scale dS K; dK = scale dSᵀ Q. A rotation's gradient is the rotation back. With a cap, S = cap tanh(scale Q Kᵀ / cap), whose
/// slope is 1 − tanh².
///
/// `unit` is the error of rounding to the kernel's element, which out, P, dS and the results are.
fn reference(
    shape: &Attention,
    qkv: &[f64],
    d_out: &[f64],
    positions: &[u32],
    turning: Option<&Turning>,
    unit: f64,
) -> Reference {
    let (d, heads, row, m) = (shape.head_dim, shape.heads, shape.row(), positions.len());
    let (group, scale) = (heads / shape.kv_heads, f64::from(shape.scale));
    let cap = shape.soft_cap.map(f64::from);
    let mut out = Bounded::zeros(m * heads * d);
    let mut log_sums = Bounded::zeros(heads * m);
    let mut turned = Bounded::zeros(m * row);
    for sequence in shape.sequences {
        for head in 0..heads {
            let key_at = (heads + head / group) * d;
            let value_at = key_at + shape.kv_heads * d;
            for query in sequence.clone() {
                let first = query.saturating_sub(shape.window.unwrap_or(usize::MAX) - 1).max(sequence.start);
                let seen = first..query + 1;
                let q = &qkv[query * row + head * d..][..d];
                let at = |r: usize, column: usize| &qkv[r * row + column..][..d];
                let scores: Vec<[f64; 2]> = seen.clone().map(|r| dot(q, at(r, key_at)).map(|x| x * scale)).collect();
                let slopes: Vec<f64> =
                    (scores.iter()).map(|s| cap.map_or(1.0, |cap| 1.0 - (s[0] / cap).tanh().powi(2))).collect();
                let largest = scores.iter().map(|s| s[1]).fold(0.0, f64::max);
                let of_score = U * (d as f64 + 8.0) * largest;
                // Of a slope: twice that of tanh.
                let of_slope = cap.map_or(0.0, |cap| 2.0 * of_score / cap + 16.0 * U);
                let of_score = of_score + cap.map_or(0.0, |cap| 10.0 * U * cap.min(largest));
                let scores: Vec<[f64; 1]> =
                    scores.iter().map(|s| [cap.map_or(s[0], |cap| cap * (s[0] / cap).tanh())]).collect();
                let top = scores.iter().map(|s| s[0]).fold(f64::NEG_INFINITY, f64::max);
                let log_sum = top + scores.iter().map(|s| (s[0] - top).exp()).sum::<f64>().ln();
                let n = scores.len() as f64;
                // Errors of a weight, of sums over the keys.
                let of_weight = 2.0 * of_score + U * (n / 32.0 + 40.0 + 4.0 * log_sum.abs());
                let of_sum = U * (n + 16.0);
                log_sums.values[head * m + query] = log_sum;
                log_sums.bounds[head * m + query] = of_score + U * (n / 32.0 + 12.0 + 4.0 * log_sum.abs());

                let weights: Vec<f64> = scores.iter().map(|s| (s[0] - log_sum).exp()).collect();
                let place = (query * heads + head) * d;
                for (r, weight) in seen.clone().zip(&weights) {
                    out.add(place, *weight, 0.0, of_weight + of_sum + unit, at(r, value_at));
                }
                for (value, bound) in out.values[place..][..d].iter().zip(&mut out.bounds[place..][..d]) {
                    *bound += unit * (value.abs() + *bound);
                }

                let d_o = &d_out[place..][..d];
                let [mean, size] = dot(d_o, &out.values[place..][..d]);
                let of_mean = dot(d_o, &out.bounds[place..][..d])[1] + U * (d as f64 + 8.0) * size;
                for ((r, weight), slope) in seen.zip(weights).zip(slopes) {
                    let [d_weight, size] = dot(d_o, at(r, value_at));
                    let of_d_weight = U * (d as f64 + 8.0) * size;
                    let d_score = weight * (d_weight - mean);
                    let error = d_score.abs() * (of_weight + 4.0 * U) + weight * (of_d_weight + of_mean);
                    let error = error * slope + d_score.abs() * of_slope;
                    let d_score = d_score * slope;
                    let error = scale * (error + unit * (d_score.abs() + error));
                    let (d_score, sums) = (scale * d_score, of_sum + 8.0 * U);
                    turned.add(query * row + head * d, d_score, error, sums, at(r, key_at));
                    turned.add(r * row + key_at, d_score, error, sums, q);
                    turned.add(r * row + value_at, weight, 0.0, of_weight + sums + unit, d_o);
                }
            }
        }
    }
    let mut d_qkv = Bounded::zeros(m * row);
    for i in 0..m * row {
        let (r, head, channel) = (i / row, i % row / d, i % d);
        let turning = turning.filter(|_| head < heads + shape.kv_heads);
        match turning.and_then(|turning| turning.of(positions[r], channel)) {
            None => {
                d_qkv.values[i] = turned.values[i];
                d_qkv.bounds[i] = turned.bounds[i];
            }
            Some((own, other, mixed)) => {
                let other = i - channel + other;
                // Cosine and sine are of one angle, times the row's factor, which is one more product.
                let factor = own.hypot(mixed).max(1.0);
                let products = if (own.hypot(mixed) - 1.0).abs() < 1e-6 { 4.0 } else { 6.0 };
                d_qkv.values[i] = own * turned.values[i] - mixed * turned.values[other];
                d_qkv.bounds[i] = factor * (turned.bounds[i] + turned.bounds[other])
                    + products * U * (turned.values[i].abs() + turned.values[other].abs());
            }
        }
        d_qkv.bounds[i] += unit * (d_qkv.values[i].abs() + d_qkv.bounds[i]);
    }
    Reference { out, log_sums, d_qkv }
}

/// Queries and keys turned by their positions.
fn rotated(shape: &Attention, x: &[f64], positions: &[u32], turning: Option<&Turning>) -> Vec<f64> {
    let (d, row) = (shape.head_dim, shape.row());
    let turn = |i: usize| {
        let (r, head, channel) = (i / row, i % row / d, i % d);
        let turning = turning.filter(|_| head < shape.heads + shape.kv_heads);
        let turns = turning.and_then(|turning| turning.of(positions[r], channel));
        turns.map_or(x[i], |(own, other, mixed)| own * x[i] + mixed * x[i - channel + other])
    };
    (0..x.len()).map(turn).collect()
}

#[test]
fn the_plain_backward_is_the_derivative_of_the_plain_forward() {
    let mut stream = Stream::new(51, 0);
    let sequences = sequences(&[2, 5]);
    let (whole, partial) = (Turning::whole(6), Turning::partial(2));
    let variants = [
        (None, None, Some(&whole)),
        (Some(2), None, Some(&whole)),
        (None, Some(0.7), Some(&partial)),
        (Some(3), Some(2.0), None),
    ];
    for (window, soft_cap, turning) in variants {
        let shape = Attention { soft_cap, ..shape(&sequences, [4, 2, 6], window) };
        let positions = [0, 1, 3, 4, 5, 6, 7];
        let mut some = |n: usize| -> Vec<f64> { (0..n).map(|_| stream.normal()).collect() };
        let (x, d_out) = (some(7 * shape.row()), some(7 * 4 * 6));
        let run = |x: &[f64]| {
            let qkv = rotated(&shape, x, &positions, turning);
            reference(&shape, &qkv, &d_out, &positions, turning, 0.0)
        };
        is_gradient(|x| dot(&run(x).out.values, &d_out)[0], &x, &run(&x).d_qkv.values, 0..x.len());
    }
}

/// A sequence read in pieces over kept keys and values, and its last query by itself, against the whole at once.
fn kept<E: ProductElement>(
    length: usize,
    [heads, kv_heads, head_dim]: [usize; 3],
    window: Option<usize>,
    soft_cap: Option<f32>,
) {
    let label = format!("{length} rows, {heads} heads for {kv_heads} of {head_dim}, {window:?}, {soft_cap:?}");
    let whole = sequences(&[length]);
    let shape = shape(&whole, [heads, kv_heads, head_dim], window);
    // Scores that the cap changes.
    let shape = if soft_cap.is_some() { Attention { soft_cap, scale: 0.4, ..shape } } else { shape };
    let (row, kv) = (shape.row(), 2 * kv_heads * head_dim);
    let mut stream = Stream::new(77, length as u64);
    let qkv: Vec<E> = normal(length * row, 1.0, &mut stream).into_iter().map(E::of).collect();
    let kept: Vec<E> = qkv.chunks_exact(row).flat_map(|row| row[heads * head_dim..].to_vec()).collect();
    for isa in isas() {
        let mut expected = vec![E::default(); length * heads * head_dim];
        with_isa(isa, || attention(&shape, &qkv, &mut expected, &mut vec![0.0; heads * length]));
        for piece in [1, 7, 100, 250] {
            let out = on_any_threads(isa, &label, || {
                let mut out = vec![E::default(); expected.len()];
                for from in (0..length).step_by(piece) {
                    let to = length.min(from + piece);
                    let out = &mut out[from * heads * head_dim..to * heads * head_dim];
                    attention_kept(&shape, &qkv[from * row..to * row], &kept[..to * kv], out);
                }
                out.iter().map(|value| value.wide().to_bits()).collect::<Vec<u32>>()
            });
            let whole: Vec<u32> = expected.iter().map(|value| value.wide().to_bits()).collect();
            assert!(out == whole, "{label}, {isa:?}: in pieces of {piece} it is something else");
        }
        for last in [0, length / 2, length - 1] {
            let q: Vec<f32> = qkv[last * row..][..heads * head_dim].iter().map(|value| value.wide()).collect();
            let kept = &kept[..(last + 1) * kv];
            let size = attend_values(&shape);
            let mut parts = vec![f32::NAN; attend_tasks(&shape, last + 1) * size];
            for (task, part) in parts.chunks_exact_mut(size).enumerate() {
                with_isa(isa, || attend(&shape, &q, kept, task, part));
            }
            let mut out = vec![f32::NAN; heads * head_dim];
            attend_join(&shape, &parts, &mut out);
            let places = &expected[last * heads * head_dim..][..heads * head_dim];
            for (got, want) in out.iter().zip(places) {
                // The whole rounds its weights and its result to E.
                assert!(
                    (got - want.wide()).abs() < 4.0 * unit::<E>() as f32 + 2e-5,
                    "{label}, {isa:?}: {got} for {want:?}",
                    want = want.wide()
                );
            }
        }
    }
}

#[test]
fn attention_over_kept_keys_is_attention_over_the_whole() {
    for window in [None, Some(1), Some(70), Some(300)] {
        kept::<f32>(601, [6, 2, 16], window, None);
        kept::<bf16>(601, [6, 2, 16], window, None);
    }
    kept::<bf16>(300, [9, 3, 64], None, None);
    kept::<f32>(300, [2, 2, 80], None, None);
    kept::<bf16>(300, [5, 1, 80], None, None);
    // More positions than sixteen of the shortest spans.
    kept::<bf16>(1100, [2, 1, 16], Some(300), None);
    kept::<bf16>(270, [4, 2, 128], Some(9), None);
    kept::<f32>(270, [8, 2, 48], None, None);
    kept::<bf16>(3, [4, 1, 6], Some(2), None);
    kept::<f32>(300, [6, 2, 16], None, Some(1.5));
    kept::<bf16>(270, [5, 1, 80], Some(70), Some(3.0));
}

/// What the kernels give for a batch.
#[derive(Clone, PartialEq)]
struct Results {
    out: Vec<u32>,
    log_sums: Vec<u32>,
    d_qkv: Vec<u32>,
}

/// What they are given.
#[derive(Clone)]
struct Given<E> {
    qkv: Vec<E>,
    d_out: Vec<E>,
    positions: Vec<u32>,
    table: Option<RotaryTable>,
}

impl<E: ProductElement> Given<E> {
    fn random(shape: &Attention, turning: Option<&Turning>, stream: &mut Stream) -> Self {
        let m = shape.sequences.last().map_or(0, |last| last.end);
        let d_out = narrow(&normal(m * shape.heads * shape.head_dim, 1.0, stream));
        let qkv = narrow(&normal(m * shape.row(), 1.5, stream));
        // A sequence need not start at its beginning.
        let positions =
            shape.sequences.iter().enumerate().flat_map(|(i, rows)| (0..rows.len()).map(move |j| (3 * i + j) as u32));
        Self { qkv, d_out, positions: positions.collect(), table: turning.map(|turning| turning.table(shape.head_dim)) }
    }

    fn run(&self, shape: &Attention, partial: &mut KeyValueGradients) -> Results {
        let m = self.positions.len();
        let nan = E::of(f32::NAN);
        let (mut out, mut log_sums) = (vec![nan; self.d_out.len()], vec![f32::NAN; shape.heads * m]);
        attention(shape, &self.qkv, &mut out, &mut log_sums);
        let mut d_qkv = vec![nan; self.qkv.len()];
        let turn = (&self.positions[..], self.table.as_ref());
        attention_backward(shape, &self.qkv, &out, &log_sums, &self.d_out, turn, partial, &mut d_qkv);
        Results { out: bits(&out), log_sums: bits(&log_sums), d_qkv: bits(&d_qkv) }
    }
}

impl Results {
    /// What belongs to some rows.
    fn part(&self, shape: &Attention, rows: Range<usize>) -> Results {
        let m = self.log_sums.len() / shape.heads;
        let of = |values: &[u32], width: usize| values[rows.start * width..rows.end * width].to_vec();
        Results {
            out: of(&self.out, shape.heads * shape.head_dim),
            log_sums: self.log_sums.chunks_exact(m).flat_map(|head| &head[rows.clone()]).copied().collect(),
            d_qkv: of(&self.d_qkv, shape.row()),
        }
    }
}

fn check<E: ProductElement>(lengths: &[usize], sizes: [usize; 3], window: Option<usize>) {
    check_turned::<E>(&shape(&sequences(lengths), sizes, window), Some(&Turning::whole(sizes[2])));
}

fn check_turned<E: ProductElement>(shape: &Attention, turning: Option<&Turning>) {
    let Attention { heads, kv_heads, head_dim, window, scale, soft_cap, .. } = *shape;
    let mut stream = Stream::new(52, (head_dim + window.unwrap_or(0)) as u64);
    let given = Given::<E>::random(shape, turning, &mut stream);
    let expected = reference(shape, &wide(&given.qkv), &wide(&given.d_out), &given.positions, turning, unit::<E>());
    for isa in isas() {
        let label = format!("attention of {heads} {kv_heads} {head_dim} {window:?} {scale} {soft_cap:?} {isa:?}");
        let result = on_any_threads(isa, &label, || given.run(shape, &mut KeyValueGradients::default()));
        let compare = |name: &str, got: &[u32], expected: &Bounded| {
            let got: Vec<f32> = got.iter().map(|bits| f32::from_bits(*bits)).collect();
            close(&format!("{name}, {label}"), &got, &expected.values, &expected.bounds);
        };
        compare("out", &result.out, &expected.out);
        compare("sums", &result.log_sums, &expected.log_sums);
        compare("gradients", &result.d_qkv, &expected.d_qkv);
        others_do_not_matter(shape, &given, &result, isa);
    }
}

/// A sequence whose neighbours have other values, or another place, has the same bits.
fn others_do_not_matter<E: ProductElement>(shape: &Attention, given: &Given<E>, result: &Results, isa: Isa) {
    let sequences = shape.sequences;
    if sequences.is_empty() {
        return;
    }
    let changed = sequences.len() / 2;
    let rows = sequences[changed].clone();
    let mut other = given.clone();
    let of = |width: usize| rows.start * width..rows.end * width;
    for value in other.qkv[of(shape.row())].iter_mut().chain(&mut other.d_out[of(shape.heads * shape.head_dim)]) {
        *value = E::of(3.0 - 2.0 * value.wide());
    }
    let changed_result = on_threads(isa, 2, || other.run(shape, &mut KeyValueGradients::default()));
    for (i, rows) in sequences.iter().enumerate() {
        let same = changed_result.part(shape, rows.clone()) == result.part(shape, rows.clone());
        assert!(same == (i != changed || rows.is_empty()), "{isa:?}: sequence {i} when {changed} changes");
    }

    // Backwards through the batch.
    let order: Vec<usize> = (0..sequences.len()).rev().collect();
    let moved = super::attention::sequences(&order.iter().map(|i| sequences[*i].len()).collect::<Vec<usize>>());
    let gather = |values: &[E], width: usize| -> Vec<E> {
        let rows = order.iter().flat_map(|i| &values[sequences[*i].start * width..sequences[*i].end * width]);
        rows.copied().collect()
    };
    let positions = order.iter().flat_map(|i| &given.positions[sequences[*i].clone()]).copied().collect();
    let elsewhere = Given {
        qkv: gather(&given.qkv, shape.row()),
        d_out: gather(&given.d_out, shape.heads * shape.head_dim),
        positions,
        table: given.table.clone(),
    };
    let moved_shape = Attention { sequences: &moved, ..*shape };
    let moved_result = on_threads(isa, 2, || elsewhere.run(&moved_shape, &mut KeyValueGradients::default()));
    for (place, i) in moved.iter().zip(&order) {
        let same = moved_result.part(shape, place.clone()) == result.part(shape, sequences[*i].clone());
        assert!(same, "{isa:?}: sequence {i} elsewhere differs");
    }
}

fn check_all<E: ProductElement>() {
    for window in [None, Some(1), Some(5), Some(64), Some(100)] {
        check::<E>(&LENGTHS, [6, 2, 16], window);
        check::<E>(&SHORT, [6, 2, 64], window);
    }
    check::<E>(&LENGTHS, [3, 1, 6], None);
    check::<E>(&SHORT, [2, 2, 6], Some(64));
    check::<E>(&LENGTHS, [2, 1, 64], None);
    check::<E>(&SHORT, [6, 2, 80], None);
    check::<E>(&SHORT, [2, 1, 80], Some(100));
    check::<E>(&SHORT, [6, 2, 128], None);
    check::<E>(&SHORT, [2, 2, 128], Some(5));
    check::<E>(&[], [2, 1, 16], None);
}

/// A scale of its own, a cap that changes scores, heads of which a part turns by one of two sets of frequencies, or none.
fn check_variants<E: ProductElement>() {
    let (short, lengths) = (sequences(&SHORT), sequences(&LENGTHS));
    for (cap, scale) in [(0.8, 0.05), (4.0, 0.5), (50.0, 0.25)] {
        let capped = |shape| Attention { soft_cap: Some(cap), scale, ..shape };
        check_turned::<E>(&capped(shape(&lengths, [6, 2, 16], Some(70))), Some(&Turning::whole(16)));
        check_turned::<E>(&capped(shape(&short, [3, 1, 6], None)), Some(&Turning::partial(2)));
        check_turned::<E>(&capped(shape(&short, [2, 1, 80], None)), None);
    }
    check_turned::<E>(&Attention { scale: 0.3, ..shape(&short, [6, 2, 16], None) }, Some(&Turning::partial(6)));
    check_turned::<E>(&Attention { scale: 0.01, ..shape(&lengths, [2, 2, 48], Some(5)) }, None);
    check_turned::<E>(&shape(&short, [2, 1, 128], None), Some(&Turning::partial(48)));
}

#[test]
fn scales_caps_and_partial_rotations_equal_all_scores_in_f64() {
    check_variants::<f32>();
    check_variants::<bf16>();
}

/// A cap so far above the scores that it changes none of them.
#[test]
fn a_cap_that_is_far_away_changes_little() {
    let sequences = sequences(&SHORT);
    let shape = shape(&sequences, [6, 2, 16], None);
    let given = Given::<f32>::random(&shape, Some(&Turning::whole(16)), &mut Stream::new(55, 0));
    let run = |shape: &Attention| given.run(shape, &mut KeyValueGradients::default());
    for isa in isas() {
        let (plain, capped) = with_isa(isa, || (run(&shape), run(&Attention { soft_cap: Some(1e5), ..shape })));
        for (plain, capped) in [(plain.out, capped.out), (plain.d_qkv, capped.d_qkv)] {
            for (plain, capped) in plain.iter().zip(&capped) {
                let (plain, capped) = (f32::from_bits(*plain), f32::from_bits(*capped));
                assert!((plain - capped).abs() < 1e-5 * (1.0 + plain.abs()), "{isa:?}: {capped} for {plain}");
            }
        }
    }
}

/// Scores beyond the cap are the cap, and pass no gradient on.
#[test]
fn saturated_scores_are_equal_and_have_no_gradient() {
    let rows = 0..70;
    let shape = Attention { scale: 1.0, soft_cap: Some(2.0), ..shape(std::slice::from_ref(&rows), [1, 1, 2], None) };
    let qkv: Vec<f32> = (0..70).flat_map(|k| [300.0, 0.0, 1.0 + k as f32, 0.0, k as f32, 1.0]).collect();
    for isa in isas() {
        on_any_threads(isa, "", || {
            let (mut out, mut log_sums, mut d_qkv) = (vec![0f32; 140], vec![0f32; 70], vec![f32::NAN; 6 * 70]);
            attention(&shape, &qkv, &mut out, &mut log_sums);
            let partial = &mut KeyValueGradients::default();
            attention_backward(&shape, &qkv, &out, &log_sums, &[1.0; 140], (&[0; 70], None), partial, &mut d_qkv);
            for (query, out) in out.chunks_exact(2).enumerate() {
                assert!((out[0] - query as f32 / 2.0).abs() < 1e-4 && (out[1] - 1.0).abs() < 1e-5, "{query}: {out:?}");
                let d = &d_qkv[6 * query..][..4];
                assert!(d.iter().all(|d| d.abs() < 1e-2), "{query}: {d:?}");
            }
        });
    }
}

#[test]
fn attention_equals_all_scores_in_f64_f32() {
    check_all::<f32>();
}

#[test]
fn attention_equals_all_scores_in_f64_bf16() {
    check_all::<bf16>();
}

/// Scores so far apart that all but one weight vanish, either way.
#[test]
fn extreme_scores_pick_one_key() {
    fn check<E: ProductElement>() {
        let rows = 0..70;
        let shape = shape(std::slice::from_ref(&rows), [1, 1, 2], None);
        for sign in [1.0, -1.0] {
            // The score of key k is ±300 k / √2 and its value k.
            let qkv = (0..70).flat_map(|k| [300.0, 0.0, sign * k as f32, 0.0, k as f32, 1.0]);
            let qkv: Vec<f32> = qkv.collect();
            for isa in isas() {
                on_any_threads(isa, "", || {
                    let (mut out, mut log_sums) = (vec![E::of(f32::NAN); 140], vec![f32::NAN; 70]);
                    attention(&shape, &narrow::<E>(&qkv), &mut out, &mut log_sums);
                    for query in 0..70 {
                        let picked = if sign > 0.0 { query as f32 } else { 0.0 };
                        let (value, one) = (out[2 * query].wide(), out[2 * query + 1].wide());
                        assert!((value - picked).abs() < 1e-30 && one == 1.0, "{isa:?} {query}: {value} {one}");
                    }
                });
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// A NaN shows in its sequence, and there alone.
#[test]
fn what_is_not_finite_stays_in_its_sequence() {
    fn check<E: ProductElement>() {
        let mut stream = Stream::new(53, 0);
        let sequences = sequences(&[5, 70, 3]);
        let shape = shape(&sequences, [4, 2, 16], None);
        let given = Given::<E>::random(&shape, Some(&Turning::whole(16)), &mut stream);
        for isa in isas() {
            let clean = on_threads(isa, 2, || given.run(&shape, &mut KeyValueGradients::default()));
            // A query's, a key's and a value's channel in row 20 of the batch.
            for column in [5, 4 * 16 + 3, 7 * 16] {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut given = given.clone();
                    given.qkv[20 * shape.row() + column] = E::of(bad);
                    let result = on_any_threads(isa, "", || given.run(&shape, &mut KeyValueGradients::default()));
                    for (i, rows) in sequences.iter().enumerate() {
                        let part = result.part(&shape, rows.clone());
                        let bad = |bits: &[u32]| bits.iter().any(|bits| !f32::from_bits(*bits).is_finite());
                        if i == 1 {
                            assert!(bad(&part.out) && bad(&part.d_qkv), "{isa:?} {column}");
                        } else {
                            assert!(part == clean.part(&shape, rows.clone()), "{isa:?} {column}");
                        }
                    }
                }
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// Buffers that were larger in an earlier call leave nothing behind.
#[test]
fn buffers_carry_nothing_over() {
    let mut stream = Stream::new(54, 0);
    let (large, small) = (sequences(&[100, 30]), sequences(&[7, 50]));
    let (large, small) = (shape(&large, [4, 2, 16], None), shape(&small, [4, 2, 16], None));
    let turning = Turning::whole(16);
    let [first, second] = [&large, &small].map(|shape| Given::<bf16>::random(shape, Some(&turning), &mut stream));
    let mut partial = KeyValueGradients::default();
    first.run(&large, &mut partial);
    assert!(second.run(&small, &mut partial) == second.run(&small, &mut KeyValueGradients::default()));
}

/// What the unsafe code relies on is asserted before it runs.
#[test]
fn shapes_that_disagree_are_refused() {
    let sequences = sequences(&[2, 3]);
    let shape = shape(&sequences, [2, 1, 4], None);
    let refused = |label: &str, shape: Attention, [qkv, out, sums]: [usize; 3], table: usize| {
        let (qkv, mut out, mut sums) = (vec![0f32; qkv], vec![0f32; out], vec![0f32; sums]);
        let forward = catch_unwind(AssertUnwindSafe(|| attention(&shape, &qkv, &mut out, &mut sums)));
        let table = Turning(vec![(8, vec![1.0; table], 1.0)]).table(2 * table);
        let mut d_qkv = qkv.clone();
        let backward = catch_unwind(AssertUnwindSafe(|| {
            let partial = &mut KeyValueGradients::default();
            attention_backward(&shape, &qkv, &out, &sums, &out, (&[0; 5], Some(&table)), partial, &mut d_qkv);
        }));
        (assert!(backward.is_err(), "{label} is not refused backward"), forward.is_err()).1
    };
    let sizes = [5 * 16, 5 * 8, 10];
    assert!(refused("no window", Attention { window: Some(0), ..shape }, sizes, 2));
    assert!(refused("a head of odd width", Attention { head_dim: 3, ..shape }, [5 * 12, 5 * 6, 10], 1));
    assert!(refused("heads that share unevenly", Attention { kv_heads: 3, ..shape }, [5 * 32, 5 * 8, 10], 2));
    assert!(refused("no key heads", Attention { kv_heads: 0, ..shape }, [5 * 8, 5 * 8, 10], 2));
    assert!(refused("a cap of nothing", Attention { soft_cap: Some(0.0), ..shape }, sizes, 2));
    assert!(refused("a cap that is no number", Attention { soft_cap: Some(f32::NAN), ..shape }, sizes, 2));
    let gap = [0..2, 3..5];
    assert!(refused("rows of no sequence", Attention { sequences: &gap, ..shape }, sizes, 2));
    let twice = [0..3, 2..5];
    assert!(refused("rows of two sequences", Attention { sequences: &twice, ..shape }, sizes, 2));
    #[allow(clippy::reversed_empty_ranges)]
    let back = [0..3, 3..2, 2..5];
    assert!(refused("a sequence that ends before it starts", Attention { sequences: &back, ..shape }, sizes, 2));
    assert!(refused("q, k and v that are short", shape, [5 * 16 - 1, 5 * 8, 10], 2));
    assert!(refused("an output that is short", shape, [5 * 16, 5 * 8 - 1, 10], 2));
    // Forward does not rotate.
    assert!(!refused("a table of another width", shape, sizes, 1));
    assert!(!refused("a table of another width", shape, sizes, 3));
}
