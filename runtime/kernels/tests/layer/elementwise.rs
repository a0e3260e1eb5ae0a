//! Norms, gated units, rotary embedding and sums in the residual stream: within a rounding bound of f64, gradients against central differences, and the same
//! bits under every instruction set.

use homeroom_kernels::{
    ColumnNorm, Element, Gate, Isa, RotaryTable, Stream, add_gradient, add_scaled, bf16, cross_entropy, gain_backward,
    gate, gated, gated_backward, isa, norm_columns, norm_columns_backward, normalise, normalise_columns, on_pool,
    rms_norm, rms_norm_add, rms_norm_add_backward, rms_norm_backward, rotate, scale_columns, soft_cap, to_elements,
    to_elements_scaled, with_isa,
};
use std::panic::catch_unwind;

use super::{U, bits, close, is_gradient, isas, narrow, normal, on_any_threads, uniform, unit, wide};

/// Rows and columns.
const SIZES: [[usize; 2]; 7] = [[0, 5], [1, 1], [3, 7], [5, 31], [33, 32], [70, 65], [131, 576]];

/// The roundings of a sum over a row: 32 lanes, then a tree of them.
fn sum_roundings(n: usize) -> f64 {
    n.div_ceil(32) as f64 + 5.0
}

// Gains on columns.

/// With y = g ∘ v: dv = g ∘ dy, and dg is Σ dy ∘ v over rows.
#[test]
fn a_gains_gradients_are_those_of_a_product_with_each_column() {
    fn check<E: Element + std::fmt::Debug>([m, n]: [usize; 2]) {
        let mut stream = Stream::new(21, (m * n) as u64);
        let (gain, v) = (uniform(n, &mut stream), narrow::<E>(&uniform(m * n, &mut stream)));
        let dy = narrow::<E>(&uniform(m * n, &mut stream));
        let mut seen = Vec::new();
        for isa in isas() {
            let label = format!("{m} x {n}");
            let (dv, d_gain) = on_any_threads(isa, &label, || {
                let mut dv = vec![E::of(f32::NAN); m * n];
                let d_gain = gain_backward(&gain, &v, &dy, &mut dv);
                (dv, d_gain)
            });
            let products = |i: usize| f64::from(gain[i % n]) * f64::from(dy[i].wide());
            let expected: Vec<f64> = (0..m * n).map(products).collect();
            let bound: Vec<f64> = expected.iter().map(|x| x.abs() * (U + unit::<E>())).collect();
            close(&label, &dv, &expected, &bound);
            let (mut sums, mut sizes) = (vec![0f64; n], vec![0f64; n]);
            for (i, (v, dy)) in v.iter().zip(&dy).enumerate() {
                let product = f64::from(v.wide()) * f64::from(dy.wide());
                sums[i % n] += product;
                sizes[i % n] += product.abs();
            }
            let bound: Vec<f64> = sizes.iter().map(|size| size * (m as f64 + 2.0) * U).collect();
            close(&label, &d_gain, &sums, &bound);
            seen.push((bits(&dv), bits(&d_gain)));
        }
        assert!(seen.iter().all(|one| *one == seen[0]), "{m} x {n}: processors differ");
    }
    for size in SIZES {
        check::<f32>(size);
        check::<bf16>(size);
    }
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

fn check_norm<E: Element>([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(22, (m * c) as u64);
    let label = format!("norm of {m} x {c} {isa:?}");
    // Rows of very different size, the second all zeros.
    let mut x = normal(m * c, 1.0, &mut stream);
    for (i, row) in x.chunks_exact_mut(c).enumerate() {
        row.iter_mut().for_each(|x| *x *= [1.0, 0.0, 1e-3, 300.0][i % 4]);
    }
    let (w, dy, dx) = (normal(c, 1.0, &mut stream), uniform(m * c, &mut stream), uniform(m * c, &mut stream));

    let forward = on_any_threads(isa, &label, || {
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
    let again = on_any_threads(isa, &label, || {
        let mut y = vec![E::of(f32::NAN); m * c];
        scale_columns(kept, &w, &mut y);
        y
    });
    assert!(*y == again, "{label}: y is made again");

    let backward = on_any_threads(isa, &label, || {
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

/// Columns before, between and behind three parts: heads of two sizes, and a group of its own.
fn columns(c: usize) -> (usize, [(usize, usize, usize); 3]) {
    let parts = [(2, 3, c), (2 + 3 * c, 1, 2 * c), (3 + 5 * c, 2, c.div_ceil(2))];
    (3 + 5 * c + 2 * c.div_ceil(2) + 1, parts)
}

fn check_norm_columns<E: Element>([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(27, (m * c) as u64);
    let label = format!("norm of columns of {m} x {c} {isa:?}");
    let (row, places) = columns(c);
    let weights = places.map(|(_, _, len)| normal(len, 1.0, &mut stream));
    let part = |i: usize| ColumnNorm { at: places[i].0, groups: places[i].1, weight: &weights[i] };
    let parts = [part(0), part(1), part(2)];
    let (width, groups) = places.iter().fold((0, 0), |(width, n), (_, groups, len)| (width + groups * len, n + groups));
    let (x, dy) = (normal(m * row, 2.0, &mut stream), narrow::<E>(&uniform(m * row, &mut stream)));
    let (y, kept, inverse, dx) = on_any_threads(isa, &label, || {
        let (mut y, mut d) = (x.clone(), dy.clone());
        let (mut kept, mut inverse) = (vec![E::of(f32::NAN); m * width], vec![f32::NAN; m * groups]);
        norm_columns(&mut y, row, &parts, EPSILON, &mut kept, &mut inverse);
        norm_columns_backward(&kept, row, &parts, &inverse, &mut d);
        (y, kept, inverse, d)
    });
    let mut alone = x.clone();
    for row in alone.chunks_exact_mut(row) {
        with_isa(isa, || normalise_columns(row, &parts, EPSILON));
    }
    for i in 0..m {
        // Groups in their order are a norm of their own, to the bit.
        let (mut at, mut number) = (i * width, i * groups);
        let mut own = vec![false; row];
        for (place, weight) in places.iter().zip(&weights) {
            for group in 0..place.1 {
                let (from, len) = (place.0 + group * place.2, place.2);
                own[from..from + len].fill(true);
                let (x, dy) = (&x[i * row + from..][..len], &dy[i * row + from..][..len]);
                let (mut normal, mut y_narrow, mut one) = (vec![E::default(); len], vec![E::default(); len], [0.0]);
                rms_norm(x, weight, EPSILON, &mut normal, &mut one, &mut y_narrow);
                assert!(kept[at..at + len] == normal[..] && inverse[number] == one[0], "{label}: what is kept");
                let y = &y[i * row + from..][..len];
                let product: Vec<f32> = weight.iter().zip(&normal).map(|(w, normal)| w * normal.wide()).collect();
                assert!(*y == product, "{label}: y is made of what is kept");
                let (dy, mut dx_wide, mut dx_narrow): (Vec<f32>, _, _) =
                    (dy.iter().map(|d| d.wide()).collect(), vec![0.0; len], vec![E::default(); len]);
                rms_norm_backward(&normal, weight, &one, &dy, &mut dx_wide, &mut dx_narrow);
                assert!(dx[i * row + from..][..len] == dx_narrow[..], "{label}: the gradient");
                let mut y_wide = vec![0.0; len];
                normalise(x, weight, EPSILON, &mut y_wide);
                assert!(alone[i * row + from..][..len] == y_wide[..], "{label}: in f32");
                (at, number) = (at + len, number + 1);
            }
        }
        for j in (0..row).filter(|j| !own[*j]) {
            let place = i * row + j;
            assert!(y[place] == x[place] && alone[place] == x[place] && dx[place] == dy[place], "{label}: column {j}");
        }
    }
    [bits(&y), bits(&kept), bits(&inverse), bits(&dx)].concat()
}

/// With x = factor w ∘ ŷ: dy_j = Σ_k dx_k ∂x_k / ∂y_j, which is the norm's gradient of factor dx.
fn check_norm_add<E: Element>([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    const FACTOR: f32 = 0.22;
    let mut stream = Stream::new(28, (m * c) as u64);
    let label = format!("added norm of {m} x {c} {isa:?}");
    let (y, x, w) = (normal(m * c, 3.0, &mut stream), normal(m * c, 1.0, &mut stream), normal(c, 1.0, &mut stream));
    let dx = uniform(m * c, &mut stream);
    let (sum, kept, inverse, dy) = on_any_threads(isa, &label, || {
        let (mut sum, mut dy) = (x.clone(), vec![E::of(f32::NAN); m * c]);
        let (mut kept, mut inverse) = (vec![E::of(f32::NAN); m * c], vec![f32::NAN; m]);
        rms_norm_add(&y, &w, EPSILON, FACTOR, &mut kept, &mut inverse, &mut sum);
        rms_norm_add_backward(&kept, &w, &inverse, FACTOR, &dx, &mut dy);
        (sum, kept, inverse, dy)
    });
    let (mut normals, mut inverses, mut unused) = (kept.clone(), inverse.clone(), kept.clone());
    rms_norm(&y, &w, EPSILON, &mut normals, &mut inverses, &mut unused);
    assert!(normals == kept && inverses == inverse, "{label}: what is kept is as of another norm");
    let (w64, kept64, dx64) = (wide(&w), wide(&kept), wide(&dx));
    let (factor, mut expected, mut bound) = (f64::from(FACTOR), Vec::new(), Vec::new());
    for i in 0..m * c {
        let (before, added) = (f64::from(x[i]), factor * w64[i % c] * kept64[i]);
        expected.push(before + added);
        bound.push(2.0 * U * (before.abs() + 2.0 * added.abs()));
    }
    close(&label, &sum, &expected, &bound);
    let (mut expected, mut bound) = (Vec::new(), Vec::new());
    for (i, inverse) in inverse.iter().enumerate() {
        let row = i * c..(i + 1) * c;
        let gradient = normal_backward_f64(&kept64[row.clone()], &w64, (*inverse).into(), &dx64[row]);
        for [value, size] in gradient {
            expected.push(factor * value);
            bound.push(factor * (U * (sum_roundings(c) + 7.0) * size + 1.01 * unit::<E>() * value.abs()));
        }
    }
    close(&label, &dy, &expected, &bound);
    [bits(&sum), bits(&kept), bits(&inverse), bits(&dy)].concat()
}

/// The gradient that the f64 norm has by its kept row is that of a branch with a factor.
#[test]
fn the_plain_added_norm_backward_is_its_derivative() {
    let mut stream = Stream::new(29, 0);
    let [y, w, dx] = [(); 3].map(|()| (0..7).map(|_| stream.normal()).collect::<Vec<f64>>());
    let loss = |y: &[f64]| normal_f64(y).0.iter().enumerate().map(|(j, n)| 0.3 * n * w[j] * dx[j]).sum::<f64>();
    let (n, inverse) = normal_f64(&y);
    let gradient = normal_backward_f64(&n, &w, inverse, &dx);
    is_gradient(loss, &y, &gradient.iter().map(|both| 0.3 * both[0]).collect::<Vec<f64>>(), 0..7);
}

#[test]
#[should_panic(expected = "2 groups of 3 from column 1 on in rows of 6")]
fn columns_beyond_a_row_are_refused() {
    normalise_columns(&mut [1.0; 6], &[ColumnNorm { at: 1, groups: 2, weight: &[1.0; 3] }], EPSILON);
}

// Sums in the residual stream.

fn check_residual<E: Element>([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(30, (m * c) as u64);
    let n = 37 * m * c;
    let (x, y) = (normal(n, 1.0, &mut stream), normal(n, 1.0, &mut stream));
    let (scaled, narrowed, sum, narrow_sum) = on_any_threads(isa, "residual", || {
        let (mut scaled, mut sum) = (x.clone(), x.clone());
        let [mut narrowed, mut narrow_sum] = [(); 2].map(|()| vec![E::of(f32::NAN); n]);
        add_scaled(&mut scaled, &y, 0.22);
        to_elements_scaled(&x, 0.22, &mut narrowed);
        add_gradient(&y, &mut sum, &mut narrow_sum);
        (scaled, narrowed, sum, narrow_sum)
    });
    for i in 0..n {
        assert!(scaled[i] == x[i] + 0.22 * y[i] && sum[i] == x[i] + y[i], "sum {i}");
        assert!(narrowed[i] == E::of(0.22 * x[i]) && narrow_sum[i] == E::of(sum[i]), "narrow {i}");
    }
    [bits(&scaled), bits(&narrowed), bits(&sum), bits(&narrow_sum)].concat()
}

/// Small values pass and large ones end at the cap.
fn check_soft_cap([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut x = normal(m * c, 40.0, &mut Stream::new(20, (m * c) as u64));
    x.iter_mut().zip([0.0, 1e-6, -1e-3, 1e30, f32::INFINITY, f32::NEG_INFINITY]).for_each(|(x, given)| *x = given);
    let expected: Vec<f64> = x.iter().map(|x| 30.0 * (f64::from(*x) / 30.0).tanh()).collect();
    let bound: Vec<f64> = expected.iter().map(|y| 12.0 * U * y.abs()).collect();
    with_isa(isa, || soft_cap(&mut x, 30.0));
    close("soft cap", &x, &expected, &bound);
    bits(&x)
}

// Gated units.

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

/// g/2 (1 + tanh(k (g + a g³))), by the tanh of its definition.
fn gelu(g: f64) -> f64 {
    let k = (2.0 / std::f64::consts::PI).sqrt();
    // 1 + tanh x = 2 σ(2x), which does not cancel.
    g / (1.0 + (-2.0 * k * (g + 0.044715 * g.powi(3))).exp())
}

/// d gelu / dg = σ + g σ (1 − σ) z′ with z = 2k (g + a g³); where σ is 0, nothing is left of it.
fn gelu_slope(g: f64) -> f64 {
    let k = (2.0 / std::f64::consts::PI).sqrt();
    let sigmoid = 1.0 / (1.0 + (-2.0 * k * (g + 0.044715 * g.powi(3))).exp());
    if sigmoid == 0.0 || sigmoid == 1.0 {
        return sigmoid;
    }
    sigmoid + g * sigmoid * (1.0 - sigmoid) * 2.0 * k * (1.0 + 3.0 * 0.044715 * g * g)
}

#[test]
fn the_plain_gelu_is_its_definition_and_its_slope_its_derivative() {
    for g in [-30.0, -9.0, -2.0, -0.1, 0.0, 0.5, 3.0, 40.0] {
        let k = (2.0 / std::f64::consts::PI).sqrt();
        let defined = g / 2.0 * (1.0 + (k * (g + 0.044715 * f64::powi(g, 3))).tanh());
        assert!((gelu(g) - defined).abs() < 1e-14 * (1.0 + g.abs()), "{g}");
        is_gradient(|g| gelu(g[0]), &[g], &[gelu_slope(g)], 0..1);
    }
}

fn check_gelu<E: Element>([m, n]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(19, (m * n) as u64);
    let label = format!("geglu of {m} x {n} {isa:?}");
    let mut gate_up: Vec<E> = narrow(&normal(2 * m * n, 3.0, &mut stream));
    for (value, extreme) in gate_up.iter_mut().step_by(3).zip([0.0, -0.0, 9.5, -9.5, -11.0, 200.0, -200.0, 1e30, -1e30])
    {
        *value = E::of(extreme);
    }
    let dh: Vec<E> = narrow(&uniform(m * n, &mut stream));
    let (h, remade, d_gate_up, alone) = on_any_threads(isa, &label, || {
        let mut h = vec![E::of(f32::NAN); m * n];
        gated(Gate::GeluTanh, n, &gate_up, &mut h);
        let (mut dh, mut d_gate_up) = (dh.clone(), vec![E::of(f32::NAN); 2 * m * n]);
        gated_backward(Gate::GeluTanh, n, &gate_up, &mut dh, &mut d_gate_up);
        let rows = gate_up.chunks_exact(2 * n).flat_map(|row| row.split_at(n).0).map(|g| g.wide());
        let ups = gate_up.chunks_exact(2 * n).flat_map(|row| row.split_at(n).1).map(|u| u.wide());
        let (mut alone, up): (Vec<f32>, Vec<f32>) = (rows.collect(), ups.collect());
        gate(Gate::GeluTanh, &mut alone, &up);
        (h, dh, d_gate_up, narrow::<E>(&alone))
    });
    assert!(h == alone, "{label}: one row in f32 is the same");
    let (mut expected, mut bound) = (Vec::new(), Vec::new());
    let (mut gradient, mut gradient_bound) = (vec![0.0; 2 * m * n], vec![0.0; 2 * m * n]);
    for (i, dh) in dh.iter().enumerate() {
        let at = i / n * 2 * n + i % n;
        let [g, u, d] = [gate_up[at], gate_up[at + n], *dh].map(|value| f64::from(value.wide()));
        // As of silu, and an error of z, some units of it, is one of e^−z.
        let z = (1.6 * g * (1.0 + 0.044715 * g * g)).abs().min(90.0);
        let relative = (13.0 + 5.0 * z) * U;
        let floor = 1.2e-38 * (1.0 + g.abs()) * (1.0 + u.abs()) * 30.0;
        // An error of z counts where the sigmoid is not 1.
        let sigmoid = gelu(g) / if g == 0.0 { 1.0 } else { g };
        let relative = if g > 0.0 { 13.0 * U + 5.0 * z * U * (1.0 - sigmoid) } else { relative };
        expected.push(gelu(g) * u);
        bound.push((gelu(g) * u).abs() * (relative + unit::<E>()) + floor);
        gradient[at] = d * u * gelu_slope(g);
        let slope = 1.6 * (1.0 + 3.0 * 0.044715 * g.powi(2).min(100.0));
        let size = (d * u).abs()
            * (1.0 / (1.0 + (-1.6 * g * (1.0 + 0.044715 * g * g)).exp()) + gelu(g).abs().min(10.0) * slope);
        gradient_bound[at] = size * ((13.0 + 5.0 * z) * U) + gradient[at].abs() * unit::<E>() + floor;
        gradient[at + n] = d * gelu(g);
        gradient_bound[at + n] = gradient[at + n].abs() * (relative + unit::<E>()) + floor;
    }
    close(&label, &h, &expected, &bound);
    close(&label, &remade, &expected, &bound);
    close(&label, &d_gate_up, &gradient, &gradient_bound);
    [bits(&h), bits(&remade), bits(&d_gate_up)].concat()
}

fn check_swiglu<E: Element>([m, n]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(23, (m * n) as u64);
    let label = format!("swiglu of {m} x {n} {isa:?}");
    let mut gate_up: Vec<E> = narrow(&normal(2 * m * n, 4.0, &mut stream));
    for (value, extreme) in gate_up.iter_mut().step_by(3).zip([0.0, -0.0, 87.5, -88.0, -89.0, 200.0, -200.0, 1e4, -1e4])
    {
        *value = E::of(extreme);
    }
    let dh: Vec<E> = narrow(&uniform(m * n, &mut stream));
    let (h, remade, d_gate_up) = on_any_threads(isa, &label, || {
        let mut h = vec![E::of(f32::NAN); m * n];
        gated(Gate::Silu, n, &gate_up, &mut h);
        let (mut dh, mut d_gate_up) = (dh.clone(), vec![E::of(f32::NAN); 2 * m * n]);
        gated_backward(Gate::Silu, n, &gate_up, &mut dh, &mut d_gate_up);
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

fn check_rotate<E: Element>([m, half]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(24, (m * half) as u64);
    let label = format!("rotation of {m} x {half} {isa:?}");
    let mut all = Vec::new();
    // Channels of a head that pass; the second set of frequencies and factor.
    for (heads, rotated, passing, factor) in [(1, 1, 0, 1.0), (3, 2, 0, 1.0), (2, 0, 2, 1.0), (3, 2, 5, 1.19)] {
        let head_dim = 2 * half + passing;
        let frequencies: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
        let long: Vec<f32> = frequencies.iter().map(|frequency| frequency / 5.0).collect();
        let mut table = RotaryTable::new(head_dim);
        assert_eq!([table.append(200, &frequencies, 1.0), table.append(50, &long, factor)], [0, 200]);
        assert_eq!(table.rows(), 250);
        let positions: Vec<u32> = (0..m).map(|_| stream.below(250) as u32).collect();
        let width = head_dim * heads;
        let x = normal(m * width, 1.0, &mut stream);
        let y = on_any_threads(isa, &label, || {
            let mut y = vec![E::of(f32::NAN); m * width];
            rotate(&x, &positions, heads, rotated, Some(&table), &mut y);
            y
        });
        let mut unturned = vec![E::of(f32::NAN); m * width];
        on_any_threads(isa, &label, || {
            let mut y = vec![E::of(f32::NAN); m * width];
            rotate(&x, &positions, heads, rotated, None, &mut y);
            assert!(y == narrow(&x), "{label}: without a table nothing turns");
        });
        let mut turned = x.clone();
        for (row, position) in turned.chunks_exact_mut(width).zip(&positions) {
            table.turn(*position, &mut row[..rotated * head_dim]);
        }
        to_elements(&turned, &mut unturned);
        assert!(unturned == y, "{label}: one row in f32 turns as many do");
        let (mut expected, mut bound) = (vec![0.0; m * width], vec![0.0; m * width]);
        for i in 0..m * width {
            let (row, head, channel) = (i / width, i % width / head_dim, i % head_dim);
            let own = f64::from(x[i]);
            if head >= rotated || channel >= 2 * half {
                (expected[i], bound[i]) = (own, own.abs() * unit::<E>());
                continue;
            }
            let other = f64::from(x[i - channel + (channel + half) % (2 * half)]);
            // The angle is rounded to f32, as transformers has it.
            let (at, frequencies, factor) = match positions[row] {
                row if row < 200 => (row, &frequencies, 1.0),
                row => (row - 200, &long, f64::from(factor)),
            };
            let angle = f64::from(at as f32 * frequencies[channel % half]);
            let sign = if channel < half { -factor } else { factor };
            expected[i] = factor * own * angle.cos() + sign * other * angle.sin();
            bound[i] = 6.0 * U * (own.abs() + other.abs()) + unit::<E>() * expected[i].abs();
        }
        close(&label, &y, &expected, &bound);
        all.extend(bits(&y));
    }
    all
}

/// Checks a kernel for a size and yields its bits.
type Kernel = fn([usize; 2], Isa) -> Vec<u32>;

/// Each kernel is checked and yields the same bits under each instruction set.
fn check_all<E: Element>() {
    let kernels: [Kernel; 10] = [
        check_norm::<E>,
        check_norm_columns::<E>,
        check_norm_add::<E>,
        check_residual::<E>,
        check_soft_cap,
        check_swiglu::<E>,
        check_gelu::<E>,
        check_rotate::<E>,
        cross_entropy_bits::<E>,
        to_elements_bits::<E>,
    ];
    for (index, kernel) in kernels.into_iter().enumerate() {
        for size in SIZES {
            let plain = kernel(size, Isa::PORTABLE);
            for isa in isas() {
                assert!(kernel(size, isa) == plain, "kernel {index} of {size:?}: {isa:?} differs from portable");
            }
        }
    }
}

/// Its values are checked elsewhere.
fn cross_entropy_bits<E: Element>([n, v]: [usize; 2], isa: Isa) -> Vec<u32> {
    let mut stream = Stream::new(25, (n * v) as u64);
    let logits: Vec<E> = narrow(&normal(n * v, 5.0, &mut stream));
    let targets: Vec<u32> = (0..n).map(|_| stream.below(v) as u32).collect();
    let (logits, losses) = on_any_threads(isa, "cross-entropy", || {
        let (mut logits, mut losses, mut right) = (logits.clone(), vec![f32::NAN; n], vec![false; n]);
        cross_entropy(v, &mut logits, &targets, None, Some(&vec![0.3; n]), &mut losses, &mut right);
        (logits, losses)
    });
    [bits(&logits), bits(&losses)].concat()
}

fn to_elements_bits<E: Element>([m, c]: [usize; 2], isa: Isa) -> Vec<u32> {
    let from = normal(37 * m * c, 1.0, &mut Stream::new(26, (m * c) as u64));
    let to = on_any_threads(isa, "to elements", || {
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
    for isa in isas() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            on_any_threads(isa, "", || {
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
                    let (mut h, mut dh, mut d_gate_up);
                    h = [0f32];
                    for function in [Gate::Silu, Gate::GeluTanh] {
                        (dh, d_gate_up) = ([1f32], [0f32; 2]);
                        gated(function, 1, &gate_up, &mut h);
                        gated_backward(function, 1, &gate_up, &mut dh, &mut d_gate_up);
                        assert!(!h[0].is_finite() && !dh[0].is_finite(), "{gate_up:?}: {h:?}");
                        assert!(d_gate_up.iter().any(|d| !d.is_finite()), "{gate_up:?}: {d_gate_up:?}");
                    }
                }
                let mut table = RotaryTable::new(2);
                table.append(2, &[1.0], 1.0);
                let mut y = [0f32; 2];
                rotate(&[bad, 0.0], &[1], 1, 1, Some(&table), &mut y);
                assert!(!y[0].is_finite() && !y[1].is_finite());
            });
        }
    }
}

/// A test that keeps a path to an instruction set keeps all of it, also what moves to the pool, and nothing after it.
#[test]
fn what_is_kept_to_a_processor_is_so_on_the_pool_and_no_longer() {
    let before = isa();
    for isa_kept in isas() {
        assert_eq!(with_isa(isa_kept, || on_pool(isa)), isa_kept);
        assert!(catch_unwind(|| with_isa(isa_kept, || panic!("in the middle"))).is_err());
        assert_eq!(isa(), before);
        assert_eq!(on_pool(isa), before);
    }
}
