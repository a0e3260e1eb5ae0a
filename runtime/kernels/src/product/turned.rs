//! Few rows: where tiles can exchange their sides, W is read as it lies, and x is packed, once for all threads.

use std::ops::Range;

use super::element::ProductElement;
use super::terms::{Columns, Right, Term};
use crate::isa::Isa;
use crate::matmul::RowOrder;
use crate::pool::{Shared, for_each};
use crate::tile::{PANEL, pack_columns, turns};

/// The most rows: with more, to turn the sums back takes longer than to pack W. (On Granite Rapids whole prompts of
/// SmolLM2-135M take 0.87 of the time with 128 rows, 1.03 with 200.)
const MOST: usize = 2 * PANEL;

/// Packed rows of x.
pub(super) struct Turned {
    /// (chunks of [`PANEL`] rows, words of the sum, [`PANEL`]).
    panels: Vec<Vec<u32>>,
    /// For each sum and each of its terms, which of them it is; none where the sum is taken the other way.
    places: Vec<Option<Vec<usize>>>,
}

impl Turned {
    /// Packs the rows of x of all sums that are taken this way. Others may be beside them: the bits are the same.
    pub(super) fn of<E: ProductElement>(isa: Isa, m: usize, columns: &[Columns<'_, E>]) -> Self {
        let (mut panels, mut made) = (Vec::new(), Vec::new());
        let mut place = |term: &Term<'_, E>| {
            let left = term.left;
            let key = (left.values.as_ptr(), left.at, left.step, term.depth());
            let known = made.iter().position(|other| *other == key);
            known.unwrap_or_else(|| {
                made.push(key);
                panels.push(packed(isa, m, term));
                panels.len() - 1
            })
        };
        // What is packed is x then, not W: more of it than a chunk only if that is less.
        let width: usize = columns.iter().map(|columns| columns.terms[0].width()).sum();
        let turning = turns::<E>(isa) && m <= PANEL.max(width.min(MOST));
        let places = columns
            .iter()
            .map(|columns| {
                let all = turning && columns.terms.iter().all(|term| is_integer(term) || lies(term));
                let each = |term: &Term<'_, E>| if is_integer(term) { usize::MAX } else { place(term) };
                all.then(|| columns.terms.iter().map(each).collect())
            })
            .collect();
        Self { panels, places }
    }

    /// The packed rows of each term of a sum that is taken this way, see [`chunks`].
    pub(super) fn sum<'a>(&'a self, columns: usize) -> Option<impl Fn(usize) -> &'a [u32] + use<'a>> {
        let places = self.places[columns].as_ref()?;
        Some(move |term: usize| &self.panels[places[term]][..])
    }
}

fn is_integer<E>(term: &Term<'_, E>) -> bool {
    term.right.in_integers()
}

/// Whether rows of W, along the sum, are of type E and at one distance.
fn lies<E: ProductElement>(term: &Term<'_, E>) -> bool {
    let natural = match term.right {
        Right::Frozen(matrix) => {
            matrix.order == RowOrder::Natural && matrix.rows > 0 && matrix.row_of::<E>(0).is_some()
        }
        Right::Dense { .. } => true,
        Right::Integers(_) | Right::Stored(_) => false,
    };
    term.transposed && natural
}

/// Rows of W from `row` on, from value `from` of the sum on, `count` values of which are read in each of `rows` rows: where the first lies, and
/// the bytes from one to the next.
pub(super) fn rows_of_w<E: ProductElement>(
    term: &Term<'_, E>,
    row: usize,
    rows: usize,
    from: usize,
    count: usize,
) -> (*const u8, usize) {
    let size = size_of::<E>();
    assert!(rows > 0 && row + rows <= term.width() && from + count <= term.depth(), "rows {row} of W");
    match term.right {
        Right::Frozen(matrix) => {
            let first = matrix.row_of::<E>(row).expect("W lies as it is read");
            (first[from * size..].as_ptr(), matrix.cols * size)
        }
        Right::Dense { values, cols } => (values[row * cols + from..].as_ptr().cast(), cols * size),
        Right::Integers(_) | Right::Stored(_) => unreachable!("a term in integers is in a group of its own"),
    }
}

/// The rows of x of a term as words of [`PANEL`] columns.
fn packed<E: ProductElement>(isa: Isa, m: usize, term: &Term<'_, E>) -> Vec<u32> {
    const WORDS: usize = 256;
    let (left, words) = (term.left, term.depth() / E::PER_WORD);
    let mut panels = vec![0; m.div_ceil(PANEL) * words * PANEL];
    let shared = Shared::new(&mut panels);
    let parts = words.div_ceil(WORDS);
    for_each(m.div_ceil(PANEL) * parts, |task| {
        let (chunk, part) = (task / parts, task % parts);
        let (first, words_from) = (chunk * PANEL, part * WORDS);
        let (height, count) = (PANEL.min(m - first), WORDS.min(words - words_from));
        let from = words_from * E::PER_WORD;
        let mut rows = [std::ptr::null(); PANEL];
        for (i, row) in rows[..height].iter_mut().enumerate() {
            let at = left.at + (first + i) * left.step + from;
            *row = left.values[at..][..count * E::PER_WORD].as_ptr().cast();
        }
        let to = (chunk * words + words_from) * PANEL;
        // SAFETY: no two tasks have a word in common; each row was sliced to so many words.
        unsafe { pack_columns(isa, &rows[..height], count, shared.slice(to, count * PANEL)) };
    });
    panels
}

/// Cuts a task's rows where a chunk of packed rows ends.
pub(super) fn chunks(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut from = rows.start;
    std::iter::from_fn(move || {
        let to = rows.end.min((from / PANEL + 1) * PANEL);
        (from < to).then(|| std::mem::replace(&mut from, to)..to)
    })
}
