//! The element types of products, and weights decoded to them.

use std::ops::Range;

use crate::buffer::grown;
use crate::isa::Isa;
use crate::matmul::Matrix;
use crate::round::narrow;
use crate::tile::TileElement;

/// An element type that products are computed in.
pub trait ProductElement: TileElement {
    /// Words as values.
    #[doc(hidden)]
    fn of_words(words: &[u32]) -> &[Self];
    /// The same, to write.
    #[doc(hidden)]
    fn of_words_mut(words: &mut [u32]) -> &mut [Self];
    /// Decodes part of some rows of a weight.
    #[doc(hidden)]
    fn decode_rows(
        isa: Isa,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [Self],
        floats: &mut Vec<f32>,
    );
    /// Decodes part of a row of a weight.
    #[doc(hidden)]
    fn decode(isa: Isa, matrix: &Matrix<'_>, row: usize, cols: Range<usize>, out: &mut [Self], floats: &mut Vec<f32>) {
        Self::decode_rows(isa, matrix, row..row + 1, cols, out, floats);
    }
}

impl ProductElement for f32 {
    fn of_words(words: &[u32]) -> &[f32] {
        // SAFETY: every u32 is an f32 of the same size and alignment.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
    }

    fn of_words_mut(words: &mut [u32]) -> &mut [f32] {
        // SAFETY: as above, both ways.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
    }

    fn decode_rows(
        isa: Isa,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        _: &mut Vec<f32>,
    ) {
        // By the caller's processor: a thread of the pool is not kept to one.
        if let Some(coded) = &matrix.coded {
            return coded.decode_rows(isa, rows, cols, out);
        }
        matrix.decode_part(rows, cols, out);
    }
}

impl ProductElement for half::bf16 {
    fn of_words(words: &[u32]) -> &[half::bf16] {
        // SAFETY: a bf16 is any 16 bits, and half as large and aligned as a word.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), 2 * words.len()) }
    }

    fn of_words_mut(words: &mut [u32]) -> &mut [half::bf16] {
        // SAFETY: as above, both ways.
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
    }

    fn decode_rows(
        isa: Isa,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [half::bf16],
        floats: &mut Vec<f32>,
    ) {
        if let Some(coded) = &matrix.coded {
            return coded.decode_rows(isa, rows, cols, out);
        }
        let floats = grown(floats, cols.len());
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            if let Some(row) = matrix.row_of::<half::bf16>(row) {
                let bytes = &row[2 * cols.start..2 * cols.end];
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = half::bf16::from_le_bytes(*bytes);
                }
            } else {
                matrix.decode_part(row..row + 1, cols.clone(), floats);
                narrow(isa, floats, out);
            }
        }
    }
}
