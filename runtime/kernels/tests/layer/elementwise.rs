//! RMSNorm, SwiGLU and rotary embedding: within a rounding bound of f64, gradients against central differences, and the same
//! bits under every instruction set.

use homeroom_kernels::{
    Cpu, Element, RotaryTable, Stream, bf16, cpu, cross_entropy, on_pool, rms_norm, rms_norm_backward, rotate,
    scale_columns, swiglu, swiglu_backward, to_elements, with_cpu,
};
use std::panic::catch_unwind;

use super::{U, bits, close, cpus, is_gradient, narrow, normal, on_any_threads, uniform, unit, wide};

/// Rows and columns.
const SIZES: [[usize; 2]; 7] = [[0, 5], [1, 1], [3, 7], [5, 31], [33, 32], [70, 65], [131, 576]];

/// The roundings of a sum over a row: 32 lanes, then a tree of them.
fn sum_roundings(n: usize) -> f64 {
    n.div_ceil(32) as f64 + 5.0
}

// RMSNorm.

const EPSILON: f32 = 1e-5;

/// x̂ and 1 / rms of a row.
fn normal_f64(x: &[f64]) -> (Vec<f64>, f64) {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(EPSILON)).sqrt();
    (x.iter().map(|x| x * inverse).collect(), inverse)
}

/// With g = w ∘ dy: dx_j = Σ_k g_k ∂(x_k / rms) / ∂x_j = (g_j − x̂_j Σ_k g_k x̂_k / c) / rms, as ∂rms / ∂x_j = x_j / (c rms).
/// Also the size of what is added, which bounds the rounding.
fn normal_backward_f64(normal: &[f64], w: &[f64], inverse: f64, dy: &[f64]) -> Vec<[f64; 2]> {
    let c = w.len();
    let terms = || (0..c).map(|k| w[k] * dy[k] * normal[k] / c as f64);
    let (mean, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
    (0..c)
        .map(|j| {
            [
                (w[j] * dy[j] - normal[j] * mean) * inverse,
                ((w[j] * dy[j]).abs() + normal[j].abs() * size) * inverse.abs(),
            ]
        })
        .collect()
}

#[test]
fn the_plain_norm_backward_is_its_derivative() {
    let mut stream = Stream::new(21, 0);
    let [x, w, dy] = [(); 3].map(|()| (0..7).map(|_| stream.normal()).collect::<Vec<f64>>());
    let loss = |x: &[f64]| normal_f64(x).0.iter().enumerate().map(|(j, n)| n * w[j] * dy[j]).sum::<f64>();
    let (n, inverse) = normal_f64(&x);
    let gradient: Vec<f64> = normal_backward_f64(&n, &w, inverse, &dy).iter().map(|both| both[0]).collect();
    is_gradient(loss, &x, &gradient, 0..7);
}

fn check_norm<E: Element>([m, c]: [usize; 2], cpu: Cpu) -> Vec<u32> {
    let mut stream = Stream::new(22, (m * c) as u64);
    let label = format!("norm of {m} x {c} {cpu:?}");
    // Rows of very different size, the second all zeros.
    let mut x = normal(m * c, 1.0, &mut stream);
    for (i, row) in x.chunks_exact_mut(c).enumerate() {
        row.iter_mut().for_each(|x| *x *= [1.0, 0.0, 1e-3, 300.0][i % 4]);
    }
    let (w, dy, dx) = (normal(c, 1.0, &mut stream), uniform(m * c, &mut stream), uniform(m * c, &mut stream));

    let forward = on_any_threads(cpu, &label, || {
        let (mut normal, mut y) = (vec![E::of(f32::NAN); m * c], vec![E::of(f32::NAN); m * c]);
        let mut inverse = vec![f32::NAN; m];
        rms_norm(&x, &w, EPSILON, &mut normal, &mut inverse, &mut y);
        (normal, inverse, y)
    });
    let (kept, inverse, y) = &forward;
    let (w64, x64) = (wide(&w), wide(&x));
    let (mut expected, mut inverses) = (Vec::new(), Vec::new());
    for row in x64.chunks_exact(c) {
        let (normal, inverse) = normal_f64(row);
        expected.extend(normal);
        inverses.push(inverse);
    }
    // Halved by the root, and so are the errors of the sum before it.
    let relative = U * (sum_roundings(c) / 2.0 + 4.0);
    let bound = |expected: &[f64], relative: f64| expected.iter().map(|x| x.abs() * relative).collect::<Vec<f64>>();
    close(&label, inverse, &inverses, &bound(&inverses, relative));
    close(&label, kept, &expected, &bound(&expected, relative + 2.0 * unit::<E>()));
    let scaled: Vec<E> = (0..m * c).map(|i| E::of(w[i % c] * kept[i].wide())).collect();
    assert!(*y == scaled, "{label}: y is made of what is kept");
    let again = on_any_threads(cpu, &label, || {
        let mut y = vec![E::of(f32::NAN); m * c];
        scale_columns(kept, &w, &mut y);
        y
    });
    assert!(*y == again, "{label}: y is made again");

    let backward = on_any_threads(cpu, &label, || {
        let (mut dx, mut narrow) = (dx.clone(), vec![E::of(f32::NAN); m * c]);
        rms_norm_backward(kept, &w, inverse, &dy, &mut dx, &mut narrow);
        (dx, narrow)
    });
    let (dy64, kept64) = (wide(&dy), wide(kept));
    let (mut expected, mut bound) = (Vec::new(), Vec::new());
    for (i, inverse) in inverse.iter().enumerate() {
        let row = i * c..(i + 1) * c;
        let gradient = normal_backward_f64(&kept64[row.clone()], &w64, (*inverse).into(), &dy64[row.clone()]);
        for (gradient, before) in gradient.iter().zip(&dx[row]) {
            let before = f64::from(*before);
            expected.push(before + gradient[0]);
            bound.push(U * (sum_roundings(c) + 6.0) * (gradient[1] + before.abs()));
        }
    }
    close(&label, &backward.0, &expected, &bound);
    assert!(backward.1 == narrow(&backward.0), "{label}: the narrow gradient is the wide one, rounded");
    [bits(kept), bits(inverse), bits(y), bits(&backward.0)].concat()
}

// SwiGLU.

fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// d silu / dg = σ + g σ (1 − σ).
fn silu_slope(g: f64) -> f64 {
    let sigmoid = 1.0 / (1.0 + (-g).exp());
    sigmoid + g * sigmoid * (1.0 - sigmoid)
}

#[test]
fn the_plain_silu_slope_is_its_derivative() {
    for g in [-30.0, -2.0, 0.0, 0.5, 3.0, 40.0] {
        is_gradient(|g| silu(g[0]), &[g], &[silu_slope(g)], 0..1);
    }
}

fn check_swiglu<E: Element>([m, n]: [usize; 2], cpu: Cpu) -> Vec<u32> {
    let mut stream = Stream::new(23, (m * n) as u64);
    let label = format!("swiglu of {m} x {n} {cpu:?}");
    let mut gate_up: Vec<E> = narrow(&normal(2 * m * n, 4.0, &mut stream));
    for (value, extreme) in gate_up.iter_mut().step_by(3).zip([0.0, -0.0, 87.5, -88.0, -89.0, 200.0, -200.0, 1e4, -1e4])
    {
        *value = E::of(extreme);
    }
    let dh: Vec<E> = narrow(&uniform(m * n, &mut stream));
    let (h, remade, d_gate_up) = on_any_threads(cpu, &label, || {
        let mut h = vec![E::of(f32::NAN); m * n];
        swiglu(n, &gate_up, &mut h);
        let (mut dh, mut d_gate_up) = (dh.clone(), vec![E::of(f32::NAN); 2 * m * n]);
        swiglu_backward(n, &gate_up, &mut dh, &mut d_gate_up);
        (h, dh, d_gate_up)
    });
    let (mut expected, mut bound) = (Vec::new(), Vec::new());
    let (mut gradient, mut gradient_bound) = (vec![0.0; 2 * m * n], vec![0.0; 2 * m * n]);
    // Nine roundings and the error of exp, two units; where exp ends at 2^-126, an error of about g 2^-126.
    let relative = 13.0 * U;
    for (i, dh) in dh.iter().enumerate() {
        let at = i / n * 2 * n + i % n;
        let [g, u, d] = [gate_up[at], gate_up[at + n], *dh].map(|value| f64::from(value.wide()));
        let floor = 1.2e-38 * (1.0 + g.abs()) * (1.0 + u.abs());
        expected.push(silu(g) * u);
        bound.push((silu(g) * u).abs() * (relative + unit::<E>()) + floor);
        gradient[at] = d * u * silu_slope(g);
        // 1 − σ cancels, so the error is that of silu.
        let size = (d * u).abs() * (silu_slope(g).abs().max(1.0 / (1.0 + (-g).exp())) + silu(g).abs());
        gradient_bound[at] = size * relative + gradient[at].abs() * unit::<E>() + floor;
        gradient[at + n] = d * silu(g);
        gradient_bound[at + n] = gradient[at + n].abs() * (relative + unit::<E>()) + floor;
    }
    close(&label, &h, &expected, &bound);
    close(&label, &remade, &expected, &bound);
    close(&label, &d_gate_up, &gradient, &gradient_bound);
    [bits(&h), bits(&remade), bits(&d_gate_up)].concat()
}

// Rotary embedding.

fn check_rotate<E: Element>([m, half]: [usize; 2], cpu: Cpu) -> Vec<u32> {
    let mut stream = Stream::new(24, (m * half) as u64);
    let label = format!("rotation of {m} x {half} {cpu:?}");
    let frequencies: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
    let table = RotaryTable::new(200, &frequencies);
    assert_eq!(table.positions(), 200);
    let positions: Vec<u32> = (0..m).map(|_| stream.below(200) as u32).collect();
    let mut all = Vec::new();
    for (heads, rotated) in [(1, 1), (3, 2), (2, 0)] {
        let width = 2 * half * heads;
        let x = normal(m * width, 1.0, &mut stream);
        let y = on_any_threads(cpu, &label, || {
            let mut y = vec![E::of(f32::NAN); m * width];
            rotate(&x, &positions, heads, rotated, &table, &mut y);
            y
        });
        let (mut expected, mut bound) = (vec![0.0; m * width], vec![0.0; m * width]);
        for i in 0..m * width {
            let (row, head, channel) = (i / width, i % width / (2 * half), i % (2 * half));
            let (own, other) = (f64::from(x[i]), f64::from(x[i - channel + (channel + half) % (2 * half)]));
            if head >= rotated {
                (expected[i], bound[i]) = (own, own.abs() * unit::<E>());
                continue;
            }
            // The angle is rounded to f32, as transformers has it.
            let angle = f64::from(positions[row] as f32 * frequencies[channel % half]);
            let sign = if channel < half { -1.0 } else { 1.0 };
            expected[i] = own * angle.cos() + sign * other * angle.sin();
            bound[i] = 4.0 * U * (own.abs() + other.abs()) + unit::<E>() * expected[i].abs();
        }
        close(&label, &y, &expected, &bound);
        all.extend(bits(&y));
    }
    all
}

/// Checks a kernel for a size and yields its bits.
type Kernel = fn([usize; 2], Cpu) -> Vec<u32>;

/// Each kernel is checked and yields the same bits under each instruction set.
fn check_all<E: Element>() {
    let kernels: [Kernel; 5] =
        [check_norm::<E>, check_swiglu::<E>, check_rotate::<E>, cross_entropy_bits::<E>, to_elements_bits::<E>];
    for (index, kernel) in kernels.into_iter().enumerate() {
        for size in SIZES {
            let plain = kernel(size, Cpu::Portable);
            for cpu in cpus() {
                assert!(kernel(size, cpu) == plain, "kernel {index} of {size:?}: {cpu:?} differs from portable");
            }
        }
    }
}

/// Its values are checked elsewhere.
fn cross_entropy_bits<E: Element>([n, v]: [usize; 2], cpu: Cpu) -> Vec<u32> {
    let mut stream = Stream::new(25, (n * v) as u64);
    let logits: Vec<E> = narrow(&normal(n * v, 5.0, &mut stream));
    let targets: Vec<u32> = (0..n).map(|_| stream.below(v) as u32).collect();
    let (logits, losses) = on_any_threads(cpu, "cross-entropy", || {
        let (mut logits, mut losses, mut right) = (logits.clone(), vec![f32::NAN; n], vec![false; n]);
        cross_entropy(v, &mut logits, &targets, Some(0.3), &mut losses, &mut right);
        (logits, losses)
    });
    [bits(&logits), bits(&losses)].concat()
}

fn to_elements_bits<E: Element>([m, c]: [usize; 2], cpu: Cpu) -> Vec<u32> {
    let from = normal(37 * m * c, 1.0, &mut Stream::new(26, (m * c) as u64));
    let to = on_any_threads(cpu, "to elements", || {
        let mut to = vec![E::of(f32::NAN); from.len()];
        to_elements(&from, &mut to);
        to
    });
    assert!(to == narrow::<E>(&from));
    bits(&to)
}

#[test]
fn elementwise_kernels_are_right_and_the_same_bits_on_every_processor_f32() {
    check_all::<f32>();
}

#[test]
fn elementwise_kernels_are_right_and_the_same_bits_on_every_processor_bf16() {
    check_all::<bf16>();
}

/// What is not finite stays so, in its own row.
#[test]
fn what_is_not_finite_is_not_hidden() {
    for cpu in cpus() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            on_any_threads(cpu, "", || {
                let c = 70;
                let mut x = vec![1f32; 3 * c];
                x[c + 67] = bad;
                let (w, mut inverse) = (vec![1f32; c], vec![0f32; 3]);
                let (mut normal, mut y) = (vec![bf16::ZERO; 3 * c], vec![bf16::ZERO; 3 * c]);
                rms_norm(&x, &w, EPSILON, &mut normal, &mut inverse, &mut y);
                assert!(y[c + 67].is_nan(), "norm of {bad}");
                assert!(y[..c].iter().chain(&y[2 * c..]).all(|y| y.is_finite()));

                let mut dy = vec![1f32; 3 * c];
                dy[c + 67] = bad;
                let (kept, ones) = (vec![1f32; 3 * c], [1f32; 3]);
                let (mut dx, mut narrow) = (vec![0f32; 3 * c], vec![0f32; 3 * c]);
                rms_norm_backward(&kept, &w, &ones, &dy, &mut dx, &mut narrow);
                assert!(dx[c..2 * c].iter().all(|dx| !dx.is_finite()), "gradient of {bad}");
                assert!(dx[..c].iter().chain(&dx[2 * c..]).all(|dx| dx.is_finite()));

                for place in [0, 1] {
                    let mut gate_up = [2f32, 3.0];
                    gate_up[place] = bad;
                    let (mut h, mut dh, mut d_gate_up) = ([0f32], [1f32], [0f32; 2]);
                    swiglu(1, &gate_up, &mut h);
                    swiglu_backward(1, &gate_up, &mut dh, &mut d_gate_up);
                    assert!(!h[0].is_finite() && !dh[0].is_finite(), "{gate_up:?}: {h:?}");
                    assert!(d_gate_up.iter().any(|d| !d.is_finite()), "{gate_up:?}: {d_gate_up:?}");
                }
                let table = RotaryTable::new(2, &[1.0]);
                let mut y = [0f32; 2];
                rotate(&[bad, 0.0], &[1], 1, 1, &table, &mut y);
                assert!(!y[0].is_finite() && !y[1].is_finite());
            });
        }
    }
}

/// A test that keeps a path to an instruction set keeps all of it, also what moves to the pool, and nothing after it.
#[test]
fn what_is_kept_to_a_processor_is_so_on_the_pool_and_no_longer() {
    let before = cpu();
    for cpu_kept in cpus() {
        assert_eq!(with_cpu(cpu_kept, || on_pool(cpu)), cpu_kept);
        assert!(catch_unwind(|| with_cpu(cpu_kept, || panic!("in the middle"))).is_err());
        assert_eq!(cpu(), before);
        assert_eq!(on_pool(cpu), before);
    }
}
