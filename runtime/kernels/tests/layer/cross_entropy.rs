//! Cross-entropy over distances from the target's logit, and the target's logits themselves.

use homeroom_kernels::{
    Element, LogitCap, Matrix, ProductElement, RowOrder, Storage, Stream, bf16, cross_entropy, target_logits, with_isa,
};

use super::{U, bits, close, is_gradient, isas, narrow, normal, on_any_threads, uniform, unit, wide};

/// ln Σ exp(l − l_t) of one row.
fn loss_f64(logits: &[f64], target: usize) -> f64 {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top - logits[target] + logits.iter().map(|logit| (logit - top).exp()).sum::<f64>().ln()
}

/// ∂loss / ∂l_j = softmax_j − [j = target].
fn gradient_f64(logits: &[f64], target: usize) -> Vec<f64> {
    let (loss, at) = (loss_f64(logits, target), logits[target]);
    let each = logits.iter().enumerate();
    each.map(|(j, logit)| (logit - at - loss).exp() - f64::from(u8::from(j == target))).collect()
}

#[test]
fn the_plain_gradient_is_its_derivative() {
    let mut stream = Stream::new(31, 0);
    let logits: Vec<f64> = (0..9).map(|_| 2.0 * stream.normal()).collect();
    is_gradient(|logits| loss_f64(logits, 4), &logits, &gradient_f64(&logits, 4), 0..9);
}

struct Given {
    logits: Vec<f32>,
    targets: Vec<u32>,
}

fn random(n: usize, v: usize, deviation: f64, stream: &mut Stream) -> Given {
    let mut logits = normal(n * v, deviation, stream);
    let targets: Vec<u32> = (0..n).map(|_| stream.below(v) as u32).collect();
    // What a product leaves at the target is nearly zero.
    for (row, target) in logits.chunks_exact_mut(v).zip(&targets) {
        row[*target as usize] = 1e-3 * stream.uniform_f32();
    }
    Given { logits, targets }
}

fn check<E: Element>(given: &Given, v: usize) {
    let (logits, targets) = (narrow::<E>(&given.logits), &given.targets);
    let n = targets.len();
    let scales: Vec<f32> = (0..n).map(|i| [0.37, -1.5, 0.0][i % 3]).collect();
    for isa in isas() {
        let label = format!("cross-entropy of {n} x {v} {isa:?}");
        let run = |scale| {
            let (mut logits, mut losses, mut right) = (logits.clone(), vec![f32::NAN; n], vec![false; n]);
            cross_entropy(v, &mut logits, targets, None, scale, &mut losses, &mut right);
            (logits, losses, right)
        };
        let (gradient, losses, right) = on_any_threads(isa, &label, || run(Some(&scales[..])));
        let alone = on_any_threads(isa, &label, || run(None));
        assert!(alone.1 == losses && alone.2 == right, "{label}: the loss alone is the same");
        let roundings = v.div_ceil(32) as f64 + 12.0;
        for (i, row) in wide(&logits).chunks_exact_mut(v).enumerate() {
            let target = targets[i] as usize;
            row[target] = 0.0;
            let loss = loss_f64(row, target);
            close(&label, &losses[i..=i], &[loss], &[U * (roundings + 2.0 * loss.abs())]);
            assert_eq!(right[i], row.iter().all(|logit| *logit <= 0.0), "{label}");
            let scale = f64::from(scales[i]);
            let expected: Vec<f64> = gradient_f64(row, target).iter().map(|d| d * scale).collect();
            // A loss has an error of its size, which is one of the exponent: of no weight unless the loss is small.
            let absolute = U * scale.abs() * (roundings + 2.0 * loss.abs().min(100.0));
            let bound: Vec<f64> = expected.iter().map(|d| d.abs() * 2.0 * unit::<E>() + absolute).collect();
            close(&label, &gradient[i * v..(i + 1) * v], &expected, &bound);
        }
    }
}

#[test]
fn losses_and_gradients_equal_f64() {
    let mut stream = Stream::new(32, 0);
    for (n, v) in [(0, 3), (1, 1), (3, 2), (5, 31), (9, 33), (6, 1000), (3, 5003)] {
        for deviation in [1e-3, 1.0, 6.0] {
            let given = random(n, v, deviation, &mut stream);
            check::<f32>(&given, v);
            check::<bf16>(&given, v);
        }
    }
}

/// c tanh(l / c) of each.
fn capped_f64(logits: &[f64], cap: f64) -> Vec<f64> {
    logits.iter().map(|logit| cap * (logit / cap).tanh()).collect()
}

/// ∂loss(c tanh(l / c)) / ∂l_j: that of the capped logit times its slope 1 − tanh².
fn capped_gradient_f64(logits: &[f64], target: usize, cap: f64) -> Vec<f64> {
    let gradient = gradient_f64(&capped_f64(logits, cap), target);
    gradient.iter().zip(logits).map(|(d, logit)| d * (1.0 - (logit / cap).tanh().powi(2))).collect()
}

#[test]
fn the_plain_capped_gradient_is_its_derivative() {
    let mut stream = Stream::new(34, 0);
    let logits: Vec<f64> = (0..9).map(|_| 2.0 * stream.normal()).collect();
    let gradient = capped_gradient_f64(&logits, 4, 3.0);
    is_gradient(|logits| loss_f64(&capped_f64(logits, 3.0), 4), &logits, &gradient, 0..9);
}

/// Logits are the target's, given, and distances from it.
fn check_capped<E: Element>(given: &Given, v: usize, at: &[f32], cap: f32) {
    let (logits, targets, n) = (narrow::<E>(&given.logits), &given.targets, given.targets.len());
    let scales: Vec<f32> = (0..n).map(|i| [0.37, -1.5, 0.0][i % 3]).collect();
    let c = f64::from(cap);
    let mut all = Vec::new();
    for isa in isas() {
        let label = format!("cross-entropy of {n} x {v} capped at {cap} {isa:?}");
        let run = |scale| {
            let (mut logits, mut losses, mut right) = (logits.clone(), vec![f32::NAN; n], vec![false; n]);
            let cap = Some(LogitCap { cap, targets: at });
            cross_entropy(v, &mut logits, targets, cap, scale, &mut losses, &mut right);
            (logits, losses, right)
        };
        let (gradient, losses, right) = on_any_threads(isa, &label, || run(Some(&scales[..])));
        let alone = on_any_threads(isa, &label, || run(None));
        assert!(alone.1 == losses && alone.2 == right, "{label}: the loss alone is the same");
        let roundings = v.div_ceil(32) as f64 + 12.0;
        for (i, row) in wide(&logits).chunks_exact_mut(v).enumerate() {
            let target = targets[i] as usize;
            row[target] = 0.0;
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|distance| *distance += f64::from(at[i]));
            let capped = capped_f64(row, c);
            let loss = loss_f64(&capped, target);
            // A capped distance is within some units of 2 c.
            let of_distance = 16.0 * c.min(row.iter().map(|x| x.abs()).fold(0.0, f64::max));
            close(&label, &losses[i..=i], &[loss], &[U * (roundings + of_distance + 2.0 * loss.abs())]);
            assert_eq!(right[i], most <= 0.0, "{label}");
            let scale = f64::from(scales[i]);
            let expected: Vec<f64> = capped_gradient_f64(row, target, c).iter().map(|d| d * scale).collect();
            let absolute = U * scale.abs() * (roundings + 2.0 * of_distance + 16.0);
            let bound: Vec<f64> = expected.iter().map(|d| d.abs() * 2.0 * unit::<E>() + absolute).collect();
            close(&label, &gradient[i * v..(i + 1) * v], &expected, &bound);
        }
        all.push((bits(&gradient), bits(&losses)));
    }
    assert!(all.iter().all(|one| *one == all[0]), "processors differ");
}

#[test]
fn capped_losses_and_gradients_equal_f64() {
    let mut stream = Stream::new(35, 0);
    for (n, v) in [(0, 3), (1, 1), (3, 2), (5, 31), (9, 33), (6, 1000), (3, 5003)] {
        for (deviation, cap) in [(1e-3, 30.0), (1.0, 0.5), (6.0, 30.0), (20.0, 30.0), (200.0, 10.0)] {
            let given = random(n, v, deviation, &mut stream);
            let at: Vec<f32> = normal(n, deviation, &mut stream);
            check_capped::<f32>(&given, v, &at, cap);
            check_capped::<bf16>(&given, v, &at, cap);
        }
    }
}

#[test]
fn extreme_logits_have_their_loss_and_gradient() {
    let rows: [[f32; 5]; 7] = [
        [0.0, -1e4, -1e4, -1e4, -1e4],
        [0.0, 1e4, -1e4, 1e4, 0.0],
        [0.0, -1e30, -3e38, -1e30, -1e30],
        [0.0, 3e38, 0.0, 0.0, 0.0],
        [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY],
        [0.0, f32::NEG_INFINITY, 88.0, 90.0, 3.0],
        [0.0, -88.0, -100.0, 0.0, 0.0],
    ];
    let given = Given { logits: rows.concat(), targets: vec![0; rows.len()] };
    check::<f32>(&given, 5);
    check::<bf16>(&given, 5);
}

/// Wherever it stands: a target's logit that is infinite makes its distance from itself a NaN, and all others −∞.
#[test]
fn a_run_that_diverges_shows_it() {
    const V: usize = 70;
    for (isa, cap) in isas().flat_map(|isa| [(isa, None), (isa, Some(30.0))]) {
        for (place, bad) in [(3, f32::NAN), (67, f32::NAN), (5, f32::NAN), (5, f32::INFINITY), (67, f32::INFINITY)] {
            let mut logits = vec![-1f32; 3 * V];
            logits[V + place] = bad;
            let (losses, right) = on_any_threads(isa, "", || {
                let (mut logits, mut losses, mut right) = (narrow::<bf16>(&logits), vec![0f32; 3], vec![true; 3]);
                let cap = cap.map(|cap| LogitCap { cap, targets: &[1.0; 3] });
                cross_entropy(V, &mut logits, &[5; 3], cap, Some(&[1.0; 3]), &mut losses, &mut right);
                let bad = &logits[V..2 * V];
                assert!(bad.iter().all(|d| d.is_nan()), "{place}: the gradient of {bad:?}");
                (bits(&losses), right)
            });
            let losses: Vec<f32> = losses.into_iter().map(f32::from_bits).collect();
            assert!(losses[1].is_nan() && !right[1], "{bad} at {place}: {losses:?} {right:?}");
            assert!(losses[0].is_finite() && losses[2].is_finite() && right[0] && right[2]);
        }
        let mut logits = vec![f32::NEG_INFINITY; V];
        logits[5] = f32::NAN;
        let mut losses = [0f32];
        let cap = cap.map(|cap| LogitCap { cap, targets: &[1.0] });
        with_isa(isa, || cross_entropy(V, &mut logits, &[5], cap, None, &mut losses, &mut [false]));
        assert!(losses[0].is_nan(), "the logit of the target is infinite: {losses:?}");
    }
}

fn check_target_logits<E: ProductElement>(storage: Storage, c: usize, stream: &mut Stream) {
    let (rows, n) = (12, 37);
    let bytes: Vec<u8> = match storage {
        Storage::F32 => uniform(rows * c, stream).iter().flat_map(|x| x.to_le_bytes()).collect(),
        Storage::BF16 => uniform(rows * c, stream).iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => (0..rows * storage.row_bytes(c).unwrap()).map(|_| stream.next_u32() as u8 & 0x3F).collect(),
    };
    for order in [RowOrder::Natural, RowOrder::Interleaved { head_dim: 6 }] {
        let w = Matrix::new(storage, &bytes, rows, c, order).unwrap();
        let mut plain = vec![0f32; rows * c];
        w.decode_rows(0..rows, &mut plain);
        let plain = wide(&narrow::<E>(&plain));
        let x: Vec<E> = narrow(&uniform(n * c, stream));
        let targets: Vec<u32> = (0..n).map(|_| stream.below(rows) as u32).collect();
        let terms = |i: usize| {
            let (x, target, plain) = (&x, targets[i] as usize, &plain);
            (0..c).map(move |k| f64::from(x[i * c + k].wide()) * plain[target * c + k])
        };
        let expected: Vec<f64> = (0..n).map(|i| terms(i).sum()).collect();
        let roundings = c.div_ceil(32) as f64 + 6.0;
        let bound: Vec<f64> = (0..n).map(|i| U * roundings * terms(i).map(f64::abs).sum::<f64>()).collect();
        let mut all = Vec::new();
        for isa in isas() {
            let logits = on_any_threads(isa, "target logits", || {
                let mut logits = vec![f32::NAN; n];
                target_logits(&x, &w, &targets, &mut logits);
                logits
            });
            close("target logits", &logits, &expected, &bound);
            all.push(logits);
        }
        assert!(all.iter().all(|logits| *logits == all[0]), "processors differ");
    }
}

#[test]
fn the_logits_of_targets_are_their_products() {
    let mut stream = Stream::new(33, 0);
    for (storage, c) in [(Storage::F32, 67), (Storage::BF16, 67), (Storage::Q4_1, 96), (Storage::Q6K, 512)] {
        check_target_logits::<f32>(storage, c, &mut stream);
        check_target_logits::<bf16>(storage, c, &mut stream);
    }
}

#[test]
#[should_panic(expected = "a target is one of 3 tokens")]
fn a_target_that_is_no_token_is_refused() {
    cross_entropy(3, &mut [0f32; 3], &[3], None, None, &mut [0.0], &mut [false]);
}
