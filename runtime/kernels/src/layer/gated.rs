//! Gated units, forward and backward: `h = f(g) ∘ u`. Source: Shazeer 2020, <https://arxiv.org/abs/2002.05202>, equation 6: SwiGLU with
//! f(g) = silu(g) = g σ(g), GEGLU with f(g) = gelu(g) by its approximation with tanh.

use crate::element::{Element, exp};
use crate::isa::{isa, per_isa};
use crate::pool::{Shared, for_ranges};

/// Rows of one task.
const ROWS: usize = 16;

/// The function of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `g σ(g)`.
    Silu,
    /// `g/2 (1 + tanh(√(2/π) (g + 0.044715 g³)))`, which is `g σ(2 √(2/π) (g + 0.044715 g³))`. Source: Hendrycks & Gimpel 2016,
    /// <https://arxiv.org/abs/1606.08415>, section 2.
    GeluTanh,
}

/// h (m, n) from rows (m, 2 n) of g and u beside each other.
///
/// # Panics
/// When sizes disagree.
pub fn gated<E: Element>(function: Gate, n: usize, gate_up: &[E], h: &mut [E]) {
    assert!(gate_up.len() == 2 * h.len() && h.len().is_multiple_of(n), "rows of {n}");
    let (isa, m) = (isa(), h.len() / n);
    let rows_of = match function {
        Gate::Silu => silu_rows,
        Gate::GeluTanh => gelu_rows,
    };
    let h = Shared::new(h);
    for_ranges(m, ROWS, |rows| {
        let (at, count) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common.
        rows_of(isa, n, &gate_up[2 * at * n..2 * (at + count) * n], unsafe { h.slice(at * n, count * n) });
    });
}

/// `g = f(g) ∘ u`, in f32.
///
/// # Panics
/// When sizes disagree.
pub fn gate(function: Gate, g: &mut [f32], u: &[f32]) {
    assert_eq!(g.len(), u.len());
    match function {
        Gate::Silu => silu_values(isa(), g, u),
        Gate::GeluTanh => gelu_values(isa(), g, u),
    }
}

/// From dh (m, n), the gradients of g and u, laid out as they are; dh is replaced by h, which forward need not keep.
///
/// `du = dh f(g)`, `dg = dh u f′(g)`.
///
/// # Panics
/// When sizes disagree.
pub fn gated_backward<E: Element>(function: Gate, n: usize, gate_up: &[E], dh: &mut [E], d_gate_up: &mut [E]) {
    let sizes = gate_up.len() == 2 * dh.len() && d_gate_up.len() == gate_up.len() && dh.len().is_multiple_of(n);
    assert!(sizes, "rows of {n}");
    let (isa, m) = (isa(), dh.len() / n);
    let rows_of = match function {
        Gate::Silu => silu_backward_rows,
        Gate::GeluTanh => gelu_backward_rows,
    };
    let (dh, d_gate_up) = (Shared::new(dh), Shared::new(d_gate_up));
    for_ranges(m, ROWS, |rows| {
        let (at, count) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common.
        let (dh, d_gate_up) = unsafe { (dh.slice(at * n, count * n), d_gate_up.slice(2 * at * n, 2 * count * n)) };
        rows_of(isa, n, &gate_up[2 * at * n..2 * (at + count) * n], dh, d_gate_up);
    });
}

#[inline(always)]
fn silu(g: f32) -> f32 {
    g / (1.0 + exp(-g))
}

/// silu(g), and its slope `σ + silu(g) (1 − σ)`.
#[inline(always)]
fn silu_and_slope(g: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-g));
    let silu = g * sigmoid;
    (silu, sigmoid + silu * (1.0 - sigmoid))
}

/// 2 √(2/π).
const TWICE_ROOT: f32 = 1.595_769;
/// The factor of g³.
const CUBIC: f32 = 0.044_715;

/// What gelu's sigmoid is of, `z = 2 √(2/π) (g + 0.044715 g³)`, and its slope; beyond ±10, where the sigmoid is 0 or 1, those at ±10.
#[inline(always)]
fn gelu_argument(g: f32) -> (f32, f32) {
    let g = if g < -10.0 { -10.0 } else { g };
    let g = if g > 10.0 { 10.0 } else { g };
    let square = CUBIC * g * g;
    (TWICE_ROOT * g * (1.0 + square), TWICE_ROOT * (1.0 + 3.0 * square))
}

#[inline(always)]
fn gelu(g: f32) -> f32 {
    g / (1.0 + exp(-gelu_argument(g).0))
}

/// gelu(g) = g σ(z), and its slope `σ + gelu(g) (1 − σ) z′`.
#[inline(always)]
fn gelu_and_slope(g: f32) -> (f32, f32) {
    let (z, slope) = gelu_argument(g);
    let sigmoid = 1.0 / (1.0 + exp(-z));
    let gelu = g * sigmoid;
    (gelu, sigmoid + gelu * (1.0 - sigmoid) * slope)
}

per_isa! {
    fn silu_values(g: &mut [f32], u: &[f32]) {
        values(g, u, silu);
    }
}

per_isa! {
    fn gelu_values(g: &mut [f32], u: &[f32]) {
        values(g, u, gelu);
    }
}

per_isa! {
    fn silu_rows<E: Element>(n: usize, gate_up: &[E], h: &mut [E]) {
        forward_rows(n, gate_up, h, silu);
    }
}

per_isa! {
    fn gelu_rows<E: Element>(n: usize, gate_up: &[E], h: &mut [E]) {
        forward_rows(n, gate_up, h, gelu);
    }
}

per_isa! {
    fn silu_backward_rows<E: Element>(n: usize, gate_up: &[E], dh: &mut [E], d_gate_up: &mut [E]) {
        backward_rows(n, gate_up, dh, d_gate_up, silu_and_slope);
    }
}

per_isa! {
    fn gelu_backward_rows<E: Element>(n: usize, gate_up: &[E], dh: &mut [E], d_gate_up: &mut [E]) {
        backward_rows(n, gate_up, dh, d_gate_up, gelu_and_slope);
    }
}

#[inline(always)]
fn values(g: &mut [f32], u: &[f32], f: impl Fn(f32) -> f32) {
    for (g, u) in g.iter_mut().zip(u) {
        *g = f(*g) * u;
    }
}

#[inline(always)]
fn forward_rows<E: Element>(n: usize, gate_up: &[E], h: &mut [E], f: impl Fn(f32) -> f32) {
    for (gate_up, h) in gate_up.chunks_exact(2 * n).zip(h.chunks_exact_mut(n)) {
        let (gate, up) = gate_up.split_at(n);
        for j in 0..n {
            h[j] = E::of(f(gate[j].wide()) * up[j].wide());
        }
    }
}

#[inline(always)]
fn backward_rows<E: Element>(
    n: usize,
    gate_up: &[E],
    dh: &mut [E],
    d_gate_up: &mut [E],
    f: impl Fn(f32) -> (f32, f32),
) {
    let rows = gate_up.chunks_exact(2 * n).zip(d_gate_up.chunks_exact_mut(2 * n));
    for ((gate_up, d_gate_up), dh) in rows.zip(dh.chunks_exact_mut(n)) {
        let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(n), d_gate_up.split_at_mut(n));
        for j in 0..n {
            let (g, u, d) = (gate[j].wide(), up[j].wide(), dh[j].wide());
            let (value, slope) = f(g);
            d_up[j] = E::of(d * value);
            d_gate[j] = E::of(d * u * slope);
            dh[j] = E::of(value * u);
        }
    }
}
