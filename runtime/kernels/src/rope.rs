//! Rotary position embedding: channel i of a head turns with channel i + D/2, as Hugging Face lays heads out. Source: Su et
//! al. 2021, <https://arxiv.org/abs/2104.09864>, section 3.4.

use crate::cpu::{Cpu, cpu, per_cpu};
use crate::element::Element;
use crate::pool::{Shared, for_ranges};

/// Cosines and sines by position: (positions, D/2) each.
#[derive(Clone, Debug, Default)]
pub struct RotaryTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RotaryTable {
    /// Angles `position · frequency`, in f32 as transformers has them.
    pub fn new(positions: usize, frequencies: &[f32]) -> Self {
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Self { cos, sin, half: frequencies.len() }
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Turns heads that lie beside each other, in place, by a position.
    ///
    /// # Panics
    /// When they are no whole heads or the position is not in the table.
    pub fn turn(&self, position: u32, heads: &mut [f32]) {
        assert!(heads.len().is_multiple_of(2 * self.half), "heads of {}", 2 * self.half);
        let (cos, sin) = self.at(position);
        for head in heads.chunks_exact_mut(2 * self.half) {
            let (low, high) = head.split_at_mut(self.half);
            for i in 0..self.half {
                (low[i], high[i]) = (low[i] * cos[i] - high[i] * sin[i], high[i] * cos[i] + low[i] * sin[i]);
            }
        }
    }

    /// Width of the heads that it rotates.
    pub(crate) fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Cosines and sines of a position.
    pub(crate) fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let at = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

/// Rotates the first `rotated` of `heads` heads of each row and rounds all to E: x and y (m, heads D).
///
/// # Panics
/// When sizes disagree or a position is not in the table.
pub fn rotate<E: Element>(
    x: &[f32],
    positions: &[u32],
    heads: usize,
    rotated: usize,
    table: &RotaryTable,
    y: &mut [E],
) {
    let width = 2 * table.half * heads;
    assert!(rotated <= heads && x.len() == positions.len() * width && y.len() == x.len(), "rows of {width}");
    let cpu = cpu();
    let y = Shared::new(y);
    for_ranges(positions.len(), 32, |rows| {
        for row in rows {
            // SAFETY: no two tasks have a row in common.
            let y = unsafe { y.slice(row * width, width) };
            let (cos, sin) = table.at(positions[row]);
            rotate_row(cpu, &x[row * width..][..width], cos, sin, rotated, 1.0, 1.0, y);
        }
    });
}

/// Turns rows of one head back, times `scale`: the gradient of the rotation.
pub(crate) fn rotate_back<E: Element>(cpu: Cpu, x: &[f32], cos: &[f32], sin: &[f32], scale: f32, y: &mut [E]) {
    rotate_row(cpu, x, cos, sin, 1, -1.0, scale, y);
}

per_cpu! {
    fn rotate_row<E: Element>(
        x: &[f32],
        cos: &[f32],
        sin: &[f32],
        rotated: usize,
        direction: f32,
        scale: f32,
        y: &mut [E],
    ) {
        let half = cos.len();
        let (turning, rest) = x.split_at(2 * half * rotated);
        let (y, y_rest) = y.split_at_mut(2 * half * rotated);
        for (x, y) in turning.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let ((low, high), (y_low, y_high)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                let (c, s) = (cos[i], sin[i] * direction);
                y_low[i] = E::of((low[i] * c - high[i] * s) * scale);
                y_high[i] = E::of((high[i] * c + low[i] * s) * scale);
            }
        }
        for (x, y) in rest.iter().zip(y_rest) {
            *y = E::of(*x * scale);
        }
    }
}
