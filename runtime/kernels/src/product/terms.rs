//! What a product is of, and where it goes.

use crate::matmul::Matrix;

/// Rows of A: row i starts at `values[at + i * step]`.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a, E> {
    /// All rows.
    pub values: &'a [E],
    /// Where row 0 starts.
    pub at: usize,
    /// Values from one row to the next.
    pub step: usize,
}

impl<'a, E> Left<'a, E> {
    /// Rows of `step` values, one after another.
    pub fn rows(values: &'a [E], step: usize) -> Self {
        Self { values, at: 0, step }
    }

    /// The rows from column `at` on.
    pub fn from(self, at: usize) -> Self {
        Self { at: self.at + at, ..self }
    }
}

/// B of a term.
#[derive(Clone, Copy, Debug)]
pub enum Right<'a, E> {
    /// A frozen weight.
    Frozen(Matrix<'a>),
    /// A frozen weight that is multiplied in integers, see [`Matrix::multiplies_in_integers`]: A is rounded to eight bits.
    Integers(Matrix<'a>),
    /// A frozen weight whose whole numbers are multiplied as they are stored, see [`Matrix::multiplies_as_stored`]: A is rounded to eight
    /// bits. Forward alone.
    Stored(Matrix<'a>),
    /// Values (rows, cols), row-major.
    Dense {
        /// The values.
        values: &'a [E],
        /// Columns.
        cols: usize,
    },
}

impl<E> Right<'_, E> {
    /// Whether it is multiplied in integers.
    pub(super) fn in_integers(&self) -> bool {
        matches!(self, Self::Integers(_) | Self::Stored(_))
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Frozen(matrix) | Self::Integers(matrix) | Self::Stored(matrix) => (matrix.rows, matrix.cols),
            Self::Dense { values, cols } => (values.len() / cols.max(&1), *cols),
        }
    }
}

/// One product in a sum: `A Wᵀ` (forward) or `A W` (backward in the input).
#[derive(Clone, Copy, Debug)]
pub struct Term<'a, E> {
    /// A (m, k).
    pub left: Left<'a, E>,
    /// W: (n, k) if `transposed`, else (k, n).
    pub right: Right<'a, E>,
    /// Whether W is transposed.
    pub transposed: bool,
}

impl<'a, E> Term<'a, E> {
    /// `A Wᵀ`, W (n, k).
    pub fn forward(left: Left<'a, E>, right: Right<'a, E>) -> Self {
        Self { left, right, transposed: true }
    }

    /// `A W`, W (k, n).
    pub fn backward(left: Left<'a, E>, right: Right<'a, E>) -> Self {
        Self { left, right, transposed: false }
    }

    pub(super) fn depth(&self) -> usize {
        let (rows, cols) = self.right.shape();
        if self.transposed { cols } else { rows }
    }

    pub(super) fn width(&self) -> usize {
        let (rows, cols) = self.right.shape();
        if self.transposed { rows } else { cols }
    }
}

/// Neighbouring columns of the output that are one sum of terms.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, E> {
    /// The terms, all of one width.
    pub terms: &'a [Term<'a, E>],
    /// First column in the output.
    pub at: usize,
    /// Added to every row.
    pub bias: Option<&'a [f32]>,
}

/// Where the sums go.
#[derive(Debug)]
pub enum Output<'a, E> {
    /// Replace f32 values.
    Wide(&'a mut [f32]),
    /// Are added to f32 values.
    Add(&'a mut [f32]),
    /// Replace E values.
    Narrow(&'a mut [E]),
}

impl<E> Output<'_, E> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Wide(values) | Self::Add(values) => values.len(),
            Self::Narrow(values) => values.len(),
        }
    }
}

/// What is done to every sum on its way out.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a> {
    /// Factor.
    pub scale: f32,
    /// One addend a row.
    pub row_add: Option<&'a [f32]>,
}

/// A factor on each column of the output.
#[derive(Debug)]
pub struct Gain<'a, E> {
    /// The factors, one a column.
    pub factors: &'a [f32],
    /// Gets what is multiplied by them, (m, columns): their gradient needs it.
    pub sums: &'a mut [E],
}

impl Default for Finish<'_> {
    fn default() -> Self {
        Self { scale: 1.0, row_add: None }
    }
}

/// Whether `m` rows of `width` values, the first at `at` and the others `step` apart, lie within `len`.
pub(super) fn fits(m: usize, at: usize, step: usize, width: usize, len: usize) -> bool {
    let Some(last) = m.checked_sub(1) else { return true };
    let end = last.checked_mul(step).and_then(|start| start.checked_add(at)?.checked_add(width));
    end.is_some_and(|end| end <= len)
}
