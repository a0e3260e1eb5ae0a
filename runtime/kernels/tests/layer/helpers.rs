//! What the tests here share. The crate's own tests on other processors take it, and them, for AArch64, too: see `src/neon/tests.rs`.

use std::sync::LazyLock;

use homeroom_kernels::{Element, Isa, Stream, bf16, with_isa};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Relative error of one operation in f32: half a unit in the last place.
pub const U: f64 = f32::EPSILON as f64 / 2.0;

/// Relative error of rounding to E.
pub fn unit<E: Element>() -> f64 {
    if E::PER_WORD == 1 { U } else { f64::from(bf16::EPSILON) / 2.0 }
}

/// Runs `f` on so many threads, 1 to 3.
pub fn on_threads<R: Send>(isa: Isa, threads: usize, f: impl FnOnce() -> R + Send) -> R {
    static POOLS: LazyLock<[ThreadPool; 3]> =
        LazyLock::new(|| [1, 2, 3].map(|n| ThreadPoolBuilder::new().num_threads(n).build().expect("threads start")));
    POOLS[threads - 1].install(|| with_isa(isa, f))
}

/// Runs `f` on one thread, and sees that more of them come to the same.
pub fn on_any_threads<R: Send + PartialEq>(isa: Isa, label: &str, f: impl Fn() -> R + Sync) -> R {
    let one = on_threads(isa, 1, &f);
    for threads in [2, 3] {
        assert!(on_threads(isa, threads, &f) == one, "{label}, {isa:?}: {threads} threads differ from one");
    }
    one
}

/// Uniform in ±0.5.
pub fn uniform(n: usize, stream: &mut Stream) -> Vec<f32> {
    (0..n).map(|_| stream.uniform_f32() - 0.5).collect()
}

/// Normal with this deviation.
pub fn normal(n: usize, deviation: f64, stream: &mut Stream) -> Vec<f32> {
    (0..n).map(|_| (deviation * stream.normal()) as f32).collect()
}

/// Rounded to E.
pub fn narrow<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|value| E::of(*value)).collect()
}

/// Exactly.
pub fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values.iter().map(|value| value.wide().into()).collect()
}

/// Bits, under which a NaN is equal to itself and 0 is not −0.
pub fn bits<E: Element>(values: &[E]) -> Vec<u32> {
    values.iter().map(|value| value.wide().to_bits()).collect()
}

/// Every value is as expected to within its bound.
#[track_caller]
pub fn close<E: Element>(label: &str, got: &[E], expected: &[f64], bound: &[f64]) {
    assert!(got.len() == expected.len() && got.len() == bound.len(), "{label}: sizes");
    let mut worst = (0.0, 0);
    for (i, got) in got.iter().enumerate() {
        let error = (f64::from(got.wide()) - expected[i]).abs();
        // Below f32's smallest normal number, some instructions take values for zero.
        let share = error / (bound[i] + 1e-36);
        if share.is_nan() || share > worst.0 {
            worst = (share, i);
        }
        if share.is_nan() {
            break;
        }
    }
    let (share, i) = worst;
    assert!(share <= 1.0, "{label}: value {i} is {} and not {}: {share} bounds", got[i].wide(), expected[i]);
}

/// The analytic gradient of a function in f64 is that of central differences, at each of `at`.
#[track_caller]
pub fn is_gradient(f: impl Fn(&[f64]) -> f64, x: &[f64], gradient: &[f64], at: impl Iterator<Item = usize>) {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    for i in at {
        let before = x[i];
        let mut moved = |by| {
            x[i] = before + by;
            f(&x)
        };
        let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        x[i] = before;
        // Errors: of the third derivative times STEP², and of rounding f over STEP.
        assert!((slope - gradient[i]).abs() < 1e-7 * (1.0 + slope.abs()), "value {i}: {} not {slope}", gradient[i]);
    }
}
