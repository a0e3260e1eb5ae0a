//! How the output is cut into tasks, and the depth of a sum into pieces.

use std::ops::Range;

use super::element::ProductElement;
use super::terms::{Columns, Right, Term};
use crate::isa::Isa;
use crate::pool::threads;
use crate::tile::PANEL;

/// Words of the sum that are packed at once: 416 KiB of panel, which stays in the second-level cache (with narrow vectors its strips, copied,
/// are as much again), and enough for two widths of 1,536 in bf16 with their adapters in one sum.
pub(super) const DEPTH: usize = 1664;
/// The same in rounds, see [`product`](super::product): what some hundred rows of A have of so many words stays in the second-level cache too.
const DEPTH_OF_ROUND: usize = 512;
/// The same where a panel is decoded in pieces of [`WIDE`] columns, whose scratch is as large again.
const DEPTH_WIDE: usize = 384;
/// Columns that are decoded together where a weight's blocks are longer than a panel: those of ggml's K-quants.
const WIDE: usize = 256;

/// A part of the output.
pub(super) struct Task {
    /// Index of its columns.
    pub(super) columns: usize,
    /// First of its columns, counted within them.
    pub(super) from: usize,
    /// How many.
    pub(super) width: usize,
    /// Its rows.
    pub(super) rows: Range<usize>,
}

/// What it costs to pack a panel, in rows that are multiplied by it: from 20 in f32 to 130 by AMX.
const PACKING: usize = 64;
/// Parts of a panel at most.
const PARTS: usize = 8;

/// Cuts the output into panels, equally many whole ones for each thread, and those that are left, or all if there are few, into parts of
/// their rows: so many that the threads are done soonest, since each part is packed anew. The tasks of a thread's share are neighbours, as
/// a team deals them.
pub(super) fn cut<E: ProductElement>(isa: Isa, m: usize, columns: &[Columns<'_, E>]) -> Vec<Task> {
    let mut panels = Vec::new();
    for (index, columns) in columns.iter().enumerate() {
        let n = columns.terms[0].width();
        let wide = columns.terms.iter().any(decodes_wide);
        let width = if wide { WIDE } else { PANEL };
        panels.extend((0..n).step_by(width).map(|from| (index, from, width.min(n - from))));
    }
    let threads = threads();
    let left = match panels.len() {
        _ if threads == 1 || m < 24 => 0,
        few if few < 2 * threads => few,
        many => many % threads,
    };
    let part = part(m, E::tile_rows(isa), left, threads);
    let (whole, left) = panels.split_at(panels.len() - left);
    let task = |&(columns, from, width): &(usize, usize, usize), rows| Task { columns, from, width, rows };
    let in_parts =
        left.iter().flat_map(|panel| (0..m).step_by(part).map(move |row| task(panel, row..m.min(row + part))));
    let (mut whole, mut in_parts) =
        (whole.iter().map(|panel| task(panel, 0..m)), in_parts.collect::<Vec<_>>().into_iter());
    let (of_whole, of_parts) = (whole.len(), in_parts.len());
    let mut tasks = Vec::with_capacity(of_whole + of_parts);
    for thread in 0..threads {
        let count = |all: usize| (thread + 1) * all / threads - thread * all / threads;
        tasks.extend(whole.by_ref().take(count(of_whole)));
        tasks.extend(in_parts.by_ref().take(count(of_parts)));
    }
    tasks
}

/// Rows of the parts that each of so many panels is cut into, whole tiles, so that `threads` do them soonest.
fn part(m: usize, tile_rows: usize, panels: usize, threads: usize) -> usize {
    let sizes = (1..=PARTS).map(|parts| m.div_ceil(parts).next_multiple_of(tile_rows));
    let rows_of_each = |part: &usize| (panels * m.div_ceil(*part)).div_ceil(threads) * (part.min(&m) + PACKING);
    sizes.min_by_key(rows_of_each).expect("there is a number of parts")
}

/// Whether a term's weight is decoded more than a panel at a time: backward, by blocks that are longer.
pub(super) fn decodes_wide<E>(term: &Term<'_, E>) -> bool {
    match term.right {
        Right::Frozen(matrix) => !term.transposed && matrix.block_len() > PANEL,
        Right::Integers(_) | Right::Stored(_) | Right::Dense { .. } => false,
    }
}

/// A part of a term's sum.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) term: usize,
    /// First value of the sum.
    pub(super) from: usize,
    /// Words of the sum.
    pub(super) words: usize,
}

/// Cuts the terms' sums into groups of as many words as a panel takes, in order, those in integers before the others.
pub(super) fn group<E: ProductElement>(terms: &[Term<'_, E>], in_rounds: bool) -> Vec<Vec<Piece>> {
    let per_word = E::PER_WORD;
    let (integers, others): (Vec<_>, Vec<_>) = terms.iter().enumerate().partition(|(_, term)| term.right.in_integers());
    let total: usize = others.iter().map(|(_, term)| term.depth() / per_word).sum();
    let depth = match terms.iter().any(decodes_wide) {
        true => DEPTH_WIDE,
        false if in_rounds && total > DEPTH => DEPTH_OF_ROUND,
        false => DEPTH,
    };
    // Terms in integers are a group of their own, each whole.
    let whole = |(term, of): (usize, &Term<'_, E>)| Piece { term, from: 0, words: of.depth() / per_word };
    let mut groups = vec![integers.into_iter().map(whole).collect::<Vec<Piece>>()];
    let mut room = if groups[0].is_empty() { depth } else { 0 };
    for (index, term) in others {
        let (mut from, mut words) = (0, term.depth() / per_word);
        while words > 0 {
            if room == 0 {
                groups.push(Vec::new());
                room = depth;
            }
            let count = words.min(room);
            groups.last_mut().expect("there is a first group").push(Piece { term: index, from, words: count });
            (from, words, room) = (from + count * per_word, words - count, room - count);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_that_are_left_are_cut_as_long_as_that_is_sooner_than_packing_them_anew() {
        assert_eq!((part(512, 32, 1, 2), part(512, 6, 3, 2), part(1024, 6, 1, 3)), (256, 258, 342));
        assert_eq!((part(512, 32, 0, 2), part(512, 32, 2, 2), part(30, 6, 1, 2)), (512, 512, 18));
        assert_eq!(part(64, 32, 9, 16), 64, "parts of so few rows are mostly packing");
        assert_eq!(part(30, 32, 1, 2), 32, "one tile takes all rows");
    }
}
