//! Packing what a task multiplies by: the one place where a product meets the storage of a weight. Values already stored as E are
//! packed from where they lie; others are decoded into a scratch first, a panel's part at a time.

use super::cut::{Piece, Task};
use super::element::ProductElement;
use super::terms::{Columns, Right, Term};
use crate::buffer::grown;
use crate::isa::Isa;
use crate::matmul::RowOrder;
use crate::tile::{PANEL, pack_columns, pack_rows};

/// Packs `depth` values of a term's sum from `from` on, for `width` columns from `column` on.
#[allow(clippy::too_many_arguments)]
pub(super) fn pack<E: ProductElement>(
    isa: Isa,
    term: &Term<'_, E>,
    from: usize,
    depth: usize,
    column: usize,
    width: usize,
    out: &mut [u32],
    decoded: &mut Vec<u32>,
    floats: &mut Vec<f32>,
) {
    let words = depth / E::PER_WORD;
    match (term.right, term.transposed) {
        (Right::Dense { values, cols }, false) => {
            pack_rows(isa, &values[from * cols + column..], cols, depth, width, out);
        }
        (Right::Dense { values, cols }, true) => {
            let row = |j| values[(column + j) * cols + from..][..depth].as_ptr().cast::<u8>();
            // SAFETY: each row was sliced to `depth` values.
            unsafe { pack_all(isa, row, width, words, out) };
        }
        (Right::Frozen(matrix), true) => {
            if matrix.row_of::<E>(column).is_some() {
                let row = |j| {
                    let row = matrix.row_of::<E>(column + j).expect("all rows of a weight are stored alike");
                    row[from * size_of::<E>()..][..depth * size_of::<E>()].as_ptr()
                };
                // SAFETY: each row was sliced to `depth` values.
                return unsafe { pack_all(isa, row, width, words, out) };
            }
            // Whole blocks around the piece.
            let block = matrix.block_len();
            let start = from / block * block;
            let end = (from + depth).next_multiple_of(block).min(matrix.cols);
            let span = end - start;
            let values = E::of_words_mut(grown(decoded, (width * span).div_ceil(E::PER_WORD)));
            let values = &mut values[..width * span];
            E::decode_rows(isa, &matrix, column..column + width, start..end, values, floats);
            let row = |j: usize| values[j * span + from - start..][..depth].as_ptr().cast::<u8>();
            // SAFETY: each row was sliced to `depth` values.
            unsafe { pack_all(isa, row, width, words, out) };
        }
        (Right::Integers(_) | Right::Stored(_), _) => unreachable!("a term in integers is in a group of its own"),
        (Right::Frozen(matrix), false) => {
            if let (Some(values), RowOrder::Natural) = (matrix.values_of::<E>(), matrix.order) {
                return pack_rows(isa, &values[from * matrix.cols + column..], matrix.cols, depth, width, out);
            }
            let values = E::of_words_mut(grown(decoded, (depth * width).div_ceil(E::PER_WORD)));
            let values = &mut values[..depth * width];
            E::decode_rows(isa, &matrix, from..from + depth, column..column + width, values, floats);
            pack_rows(isa, values, width, depth, width, out);
        }
    }
}

/// # Safety
/// Each of the first `width` pointers that `row` yields is readable for `words` words.
unsafe fn pack_all(isa: Isa, row: impl Fn(usize) -> *const u8, width: usize, words: usize, out: &mut [u32]) {
    let mut rows = [std::ptr::null(); PANEL];
    for (j, pointer) in rows[..width].iter_mut().enumerate() {
        *pointer = row(j);
    }
    // SAFETY: passed on to the caller.
    unsafe { pack_columns(isa, &rows[..width], words, out) }
}

/// Decodes the backward pieces of frozen weights in a group for all columns of a wide task: (values of the sum, width), one
/// piece after another.
pub(super) fn decode_wide<'s, E: ProductElement>(
    isa: Isa,
    task: &Task,
    columns: &Columns<'_, E>,
    group: &[Piece],
    decoded: &'s mut Vec<u32>,
    floats: &mut Vec<f32>,
) -> &'s [u32] {
    let backward = |term: &Term<'_, E>| matches!(term.right, Right::Frozen(_)) && !term.transposed;
    let frozen = || group.iter().filter(|piece| backward(&columns.terms[piece.term]));
    let total: usize = frozen().map(|piece| piece.words * task.width).sum();
    let all = grown(decoded, total);
    let values = E::of_words_mut(all);
    let mut at = 0;
    for piece in frozen() {
        let Right::Frozen(matrix) = columns.terms[piece.term].right else { continue };
        let depth = piece.words * E::PER_WORD;
        let values = &mut values[at..at + depth * task.width];
        at += depth * task.width;
        let (rows, cols) = (piece.from..piece.from + depth, task.from..task.from + task.width);
        E::decode_rows(isa, &matrix, rows, cols, values, floats);
    }
    all
}
