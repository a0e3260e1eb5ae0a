//! What a tile is given and where its sums go.

/// Columns of a packed panel of B.
pub(crate) const PANEL: usize = 64;
/// Segments of one tile: frozen weights and adapters whose products add up.
pub(crate) const SEGMENTS_MAX: usize = 8;

/// A part of the sum: rows of A and the packed words of B that go with them.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The first word of row 0 of A.
    pub a: *const u8,
    /// Bytes from one row of A to the next.
    pub row_step: usize,
    /// Bytes from one word of a row to the next.
    pub word_step: usize,
    /// Words of the sum.
    pub words: usize,
    /// Packed words of B: `PANEL` for each word of the sum.
    pub b: *const u32,
}

impl Segment {
    pub(crate) const EMPTY: Self =
        Self { a: std::ptr::null(), row_step: 0, word_step: 0, words: 0, b: std::ptr::null() };
}

/// What becomes of the sums: `scale · sum + bias[column] + row_add[row] + add[row, column]`, stored as f32 or as E.
///
/// Pointers are to row 0 and the panel's column 0; null ones are left out. One of `wide` and `narrow` is not null.
#[derive(Debug)]
pub struct Store<E> {
    pub scale: f32,
    pub bias: *const f32,
    pub row_add: *const f32,
    pub add: *const f32,
    pub add_step: usize,
    pub wide: *mut f32,
    pub narrow: *mut E,
    /// Values from one row of the output to the next.
    pub step: usize,
}

impl<E> Clone for Store<E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Store<E> {}

impl<E> Store<E> {
    /// Sums alone, as f32.
    pub(crate) fn wide(wide: *mut f32, step: usize) -> Self {
        let (bias, row_add, add) = (std::ptr::null(), std::ptr::null(), std::ptr::null());
        Self { scale: 1.0, bias, row_add, add, add_step: 0, wide, narrow: std::ptr::null_mut(), step }
    }

    /// Sums added to what is there, as f32.
    pub(crate) fn adding(wide: *mut f32, step: usize) -> Self {
        Self { add: wide, add_step: step, ..Self::wide(wide, step) }
    }

    /// The same output, further down and to the right. Null pointers stay null.
    pub(crate) fn at(self, row: usize, column: usize) -> Self {
        let shift = |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
        Self {
            bias: shift(self.bias, column),
            row_add: shift(self.row_add, row),
            add: shift(self.add, row * self.add_step + column),
            wide: if self.wide.is_null() { self.wide } else { self.wide.wrapping_add(row * self.step + column) },
            narrow: if self.narrow.is_null() {
                self.narrow
            } else {
                self.narrow.wrapping_add(row * self.step + column)
            },
            ..self
        }
    }
}
