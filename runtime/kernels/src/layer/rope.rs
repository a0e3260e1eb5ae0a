//! Rotary position embedding: of the first R channels of a head, channel i turns with channel i + R/2, as Hugging Face lays heads
//! out; the rest pass. In most models R is the whole head. Source: Su et al. 2021, <https://arxiv.org/abs/2104.09864>, section 3.4.

use crate::element::Element;
use crate::isa::{Isa, isa, per_isa};
use crate::pool::{Shared, for_ranges};
use crate::round::to_elements;

/// Cosines and sines: (rows, R/2) each. A row is a position under some frequencies; several sets of frequencies may follow each
/// other, as of a model that turns long sequences otherwise than short ones.
#[derive(Clone, Debug, Default)]
pub struct RotaryTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    head_dim: usize,
}

impl RotaryTable {
    /// A table without rows, for heads of this width.
    pub fn new(head_dim: usize) -> Self {
        Self { head_dim, ..Self::default() }
    }

    /// Adds rows for positions from 0 to `positions`, of which it returns the first: `factor` times the cosine and sine of
    /// `position · frequency`, an angle in f32 as transformers has it.
    ///
    /// `frequencies` (R/2); `factor`: 1, or the attention factor of YaRN and longrope.
    ///
    /// # Panics
    /// When there are more frequencies than half a head has channels, or not as many as in rows before.
    pub fn append(&mut self, positions: usize, frequencies: &[f32], factor: f32) -> u32 {
        let (rows, half) = (self.rows(), frequencies.len());
        assert!(2 * half <= self.head_dim, "{half} frequencies for heads of {}", self.head_dim);
        assert!(self.half == half || self.cos.is_empty(), "{half} frequencies after rows of {}", self.half);
        self.half = half;
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos() * factor, angle.sin() * factor)).unzip();
        self.cos.extend(cos);
        self.sin.extend(sin);
        u32::try_from(rows).expect("a table has fewer than 2^32 rows")
    }

    /// Rows in the table.
    pub fn rows(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Turns heads that lie beside each other, in place, by a row of the table.
    ///
    /// # Panics
    /// When they are no whole heads or the table has no such row.
    pub fn turn(&self, row: u32, heads: &mut [f32]) {
        assert!(heads.len().is_multiple_of(self.head_dim), "heads of {}", self.head_dim);
        let (cos, sin) = self.at(row);
        for head in heads.chunks_exact_mut(self.head_dim) {
            let (low, high) = head[..2 * self.half].split_at_mut(self.half);
            for i in 0..self.half {
                (low[i], high[i]) = (low[i] * cos[i] - high[i] * sin[i], high[i] * cos[i] + low[i] * sin[i]);
            }
        }
    }

    /// Width of the heads that it rotates.
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines and sines of a row.
    pub(crate) fn at(&self, row: u32) -> (&[f32], &[f32]) {
        let at = row as usize * self.half..(row as usize + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}

/// Rotates the first `rotated` of `heads` heads of each row and rounds all to E: x and y (m, heads D).
///
/// `positions` (m) are rows of the table. Without a table nothing turns; all is rounded alone.
///
/// # Panics
/// When sizes disagree or a position is no row of the table.
pub fn rotate<E: Element>(
    x: &[f32],
    positions: &[u32],
    heads: usize,
    rotated: usize,
    table: Option<&RotaryTable>,
    y: &mut [E],
) {
    let Some(table) = table else {
        return to_elements(x, y);
    };
    let width = table.head_dim * heads;
    assert!(rotated <= heads && x.len() == positions.len() * width && y.len() == x.len(), "rows of {width}");
    let isa = isa();
    let y = Shared::new(y);
    for_ranges(positions.len(), 32, |rows| {
        for row in rows {
            // SAFETY: no two tasks have a row in common.
            let y = unsafe { y.slice(row * width, width) };
            let ((cos, sin), head_dim) = (table.at(positions[row]), table.head_dim);
            rotate_row(isa, &x[row * width..][..width], cos, sin, head_dim, rotated, 1.0, 1.0, y);
        }
    });
}

/// The gradient of the rotation of one head, times `scale`: it turns back. Of no cosines and sines, it is x.
pub(crate) fn rotate_back<E: Element>(isa: Isa, x: &[f32], (cos, sin): (&[f32], &[f32]), scale: f32, y: &mut [E]) {
    rotate_row(isa, x, cos, sin, x.len(), 1, -1.0, scale, y);
}

per_isa! {
    fn rotate_row<E: Element>(
        x: &[f32],
        cos: &[f32],
        sin: &[f32],
        head_dim: usize,
        rotated: usize,
        direction: f32,
        scale: f32,
        y: &mut [E],
    ) {
        let half = cos.len();
        let (turned, rest) = x.split_at(head_dim * rotated);
        let (y, y_rest) = y.split_at_mut(head_dim * rotated);
        // Channels that pass; in most models there are none.
        if 2 * half < head_dim {
            for (x, y) in turned.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                for (x, y) in x[2 * half..].iter().zip(&mut y[2 * half..]) {
                    *y = E::of(*x * scale);
                }
            }
        }
        for (x, y) in turned.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
            let ((low, x), (y_low, y)) = (x.split_at(half), y.split_at_mut(half));
            let (high, y_high) = (&x[..half], &mut y[..half]);
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
