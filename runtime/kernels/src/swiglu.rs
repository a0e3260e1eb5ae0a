//! SwiGLU, forward and backward: `h = silu(g) ∘ u`, silu(g) = g σ(g). Source: Shazeer 2020,
//! <https://arxiv.org/abs/2002.05202>, equation 6.

use crate::cpu::{cpu, per_cpu};
use crate::element::{Element, exp};
use crate::pool::{Shared, for_ranges};

/// Rows of one task.
const ROWS: usize = 16;

/// h (m, n) from rows (m, 2 n) of g and u beside each other.
///
/// # Panics
/// When sizes disagree.
pub fn swiglu<E: Element>(n: usize, gate_up: &[E], h: &mut [E]) {
    assert!(gate_up.len() == 2 * h.len() && h.len().is_multiple_of(n), "rows of {n}");
    let (cpu, m) = (cpu(), h.len() / n);
    let h = Shared::new(h);
    for_ranges(m, ROWS, |rows| {
        let (at, count) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common.
        forward_rows(cpu, n, &gate_up[2 * at * n..2 * (at + count) * n], unsafe { h.slice(at * n, count * n) });
    });
}

/// `g = silu(g) ∘ u`, in f32.
///
/// # Panics
/// When sizes disagree.
pub fn gate(g: &mut [f32], u: &[f32]) {
    assert_eq!(g.len(), u.len());
    gate_values(cpu(), g, u);
}

per_cpu! {
    fn gate_values(g: &mut [f32], u: &[f32]) {
        for (g, u) in g.iter_mut().zip(u) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

per_cpu! {
    fn forward_rows<E: Element>(n: usize, gate_up: &[E], h: &mut [E]) {
        for (gate_up, h) in gate_up.chunks_exact(2 * n).zip(h.chunks_exact_mut(n)) {
            let (gate, up) = gate_up.split_at(n);
            for j in 0..n {
                let g = gate[j].wide();
                h[j] = E::of(g / (1.0 + exp(-g)) * up[j].wide());
            }
        }
    }
}

/// From dh (m, n), the gradients of g and u, laid out as they are; dh is replaced by h, which forward need not keep.
///
/// `du = dh silu(g)`, `dg = dh u (σ + silu(g) (1 − σ))`.
///
/// # Panics
/// When sizes disagree.
pub fn swiglu_backward<E: Element>(n: usize, gate_up: &[E], dh: &mut [E], d_gate_up: &mut [E]) {
    let sizes = gate_up.len() == 2 * dh.len() && d_gate_up.len() == gate_up.len() && dh.len().is_multiple_of(n);
    assert!(sizes, "rows of {n}");
    let (cpu, m) = (cpu(), dh.len() / n);
    let (dh, d_gate_up) = (Shared::new(dh), Shared::new(d_gate_up));
    for_ranges(m, ROWS, |rows| {
        let (at, count) = (rows.start, rows.len());
        // SAFETY: no two tasks have a row in common.
        let (dh, d_gate_up) = unsafe { (dh.slice(at * n, count * n), d_gate_up.slice(2 * at * n, 2 * count * n)) };
        backward_rows(cpu, n, &gate_up[2 * at * n..2 * (at + count) * n], dh, d_gate_up);
    });
}

per_cpu! {
    fn backward_rows<E: Element>(n: usize, gate_up: &[E], dh: &mut [E], d_gate_up: &mut [E]) {
        let rows = gate_up.chunks_exact(2 * n).zip(d_gate_up.chunks_exact_mut(2 * n));
        for ((gate_up, d_gate_up), dh) in rows.zip(dh.chunks_exact_mut(n)) {
            let ((gate, up), (d_gate, d_up)) = (gate_up.split_at(n), d_gate_up.split_at_mut(n));
            for j in 0..n {
                let (g, u, d) = (gate[j].wide(), up[j].wide(), dh[j].wide());
                let sigmoid = 1.0 / (1.0 + exp(-g));
                let silu = g * sigmoid;
                d_up[j] = E::of(d * silu);
                d_gate[j] = E::of(d * u * (sigmoid + silu * (1.0 - sigmoid)));
                dh[j] = E::of(silu * u);
            }
        }
    }
}
