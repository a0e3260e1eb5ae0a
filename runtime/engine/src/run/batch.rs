//! Sequences laid end to end, without padding: what one forward pass takes.
//!
//! Rows of all sequences share the products; attention stays within a sequence. So a batch costs what its tokens cost, and
//! which sequences share it changes nothing but speed.

use std::ops::Range;
use std::sync::Arc;

use homeroom_kernels::Storage;

use crate::data::{Example, Unit};
use crate::models::BaseModel;
use crate::models::weight::Weight;

/// Rows of a pass that examples are packed into. From here on more rows make products no faster, and cost memory.
pub const PASS_ROWS: usize = 1024;
/// The same where memory counts for more.
pub const PASS_ROWS_CODED: usize = 512;

/// Rows of a pass that training packs examples into. A base behind a codec is chosen for its memory, of which what a pass keeps is the
/// most; decoding for more passes costs less than a tenth of the speed.
pub fn pass_rows(model: &BaseModel) -> usize {
    let coded = |weight: &Weight| matches!(weight.storage(), Storage::Coded | Storage::Native);
    pass_rows_of(model.layers.first().is_some_and(|layer| coded(&model.modules[layer.down].weight)))
}

/// See [`pass_rows`]; `coded`: the base's linear layers are behind a codec.
pub(crate) fn pass_rows_of(coded: bool) -> usize {
    if coded { PASS_ROWS_CODED } else { PASS_ROWS }
}

/// A batch of N rows, one a token.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids (N).
    pub ids: Arc<Vec<u32>>,
    /// Position of each row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Number of the example that each row belongs to; dropout is drawn by it.
    pub examples: Vec<u32>,
    /// Rows of each sequence.
    pub sequences: Vec<Range<usize>>,
    /// Tokens of each sequence as far as they are known, those before its rows and after them included: some ropes go by it.
    pub lengths: Vec<usize>,
    /// Rows that predict a trained token.
    pub target_rows: Vec<u32>,
    /// The tokens that they should predict.
    pub targets: Vec<u32>,
    /// Sequences of each unit with its number; none where nothing is trained.
    pub units: Vec<(u32, Range<usize>)>,
    /// Targets of each sequence; none where nothing is trained.
    pub sequence_targets: Vec<Range<usize>>,
    /// Tokens of the examples, the last of each included, which no row stands for: it predicts nothing.
    pub tokens: usize,
}

impl Batch {
    /// Lays out examples for training or evaluation, each a unit of its own. `numbered` gives each example's number.
    pub fn of_examples<'a>(numbered: impl IntoIterator<Item = (u32, &'a Example)>) -> Self {
        let units: Vec<Unit> = numbered.into_iter().map(|(number, example)| Unit::of(number, example)).collect();
        Self::of_units(&units)
    }

    /// Lays out units for training or evaluation. Dropout of the k-th of m sequences of a unit is drawn by the number m·unit + k.
    pub fn of_units(units: &[Unit<'_>]) -> Self {
        let (mut batch, mut ids) = (Self::default(), Vec::new());
        for unit in units {
            let first = batch.sequences.len();
            for (k, example) in unit.sequences.iter().enumerate() {
                let Some(inputs) = example.ids.len().checked_sub(1) else { continue };
                let (start, targets) = (ids.len(), batch.targets.len());
                for (t, _) in example.trained.iter().enumerate().skip(1).filter(|(_, trained)| **trained) {
                    batch.target_rows.push((start + t - 1) as u32);
                    batch.targets.push(example.ids[t]);
                }
                ids.extend_from_slice(&example.ids[..inputs]);
                let number = unit.number.wrapping_mul(unit.sequences.len() as u32).wrapping_add(k as u32);
                batch.push_sequence(start..ids.len(), number, 0);
                batch.sequence_targets.push(targets..batch.targets.len());
                // The last token predicts nothing, and is part of the sequence all the same.
                batch.lengths.pop();
                batch.lengths.push(example.ids.len());
                batch.tokens += example.ids.len();
            }
            batch.units.push((unit.number, first..batch.sequences.len()));
        }
        batch.ids = Arc::new(ids);
        batch
    }

    /// Packs units in their order into as few batches as hold no more than `most` rows, and these as evenly as can be; a longer unit is
    /// a batch of its own, and none is cut.
    ///
    /// Positions start anew with each example and attention stays within it, so packing changes nothing but speed and memory.
    pub fn packed(units: &[Unit<'_>], most: usize) -> Vec<Self> {
        let lengths: Vec<usize> = units.iter().map(Unit::rows).collect();
        packed_parts(&lengths, most).into_iter().map(|part| Self::of_units(&units[part])).collect()
    }

    /// Lays out one sequence, or the continuation of one from position `from`, to predict after every row.
    pub fn of_tokens(ids: &[u32], from: u32) -> Self {
        Self::of_piece(ids, from, from as usize + ids.len())
    }

    /// The same of a sequence of which `length` tokens are known.
    pub fn of_piece(ids: &[u32], from: u32, length: usize) -> Self {
        let mut batch = Self { ids: Arc::new(ids.to_vec()), tokens: ids.len(), ..Self::default() };
        batch.push_sequence(0..ids.len(), 0, from);
        batch.lengths = vec![length];
        batch
    }

    /// The number of targets of each sequence of each unit.
    pub fn targets_of_units(&self) -> Vec<Vec<usize>> {
        let of = |sequences: &Range<usize>| self.sequence_targets[sequences.clone()].iter().map(Range::len).collect();
        self.units.iter().map(|(_, sequences)| of(sequences)).collect()
    }

    /// Some rows as a batch of their own, for modules that work row by row.
    pub fn rows(&self, rows: &[u32]) -> Self {
        let pick = |values: &[u32]| rows.iter().map(|row| values[*row as usize]).collect::<Vec<u32>>();
        Self {
            ids: Arc::new(pick(&self.ids)),
            positions: pick(&self.positions),
            examples: pick(&self.examples),
            ..Self::default()
        }
    }

    fn push_sequence(&mut self, rows: Range<usize>, number: u32, from: u32) {
        self.positions.extend((0..rows.len() as u32).map(|position| from + position));
        self.examples.resize(rows.end, number);
        self.lengths.push(from as usize + rows.len());
        self.sequences.push(rows);
    }
}

/// Which units, of these numbers of rows, [`Batch::packed`] lays into one batch.
pub(crate) fn packed_parts(lengths: &[usize], most: usize) -> Vec<Range<usize>> {
    // The least bound that makes no more batches than `most` does. Fewer rows in the fullest are less memory.
    let (mut low, mut high) = (0, most);
    let count = cut(lengths, most).len();
    while low < high {
        let middle = usize::midpoint(low, high);
        if cut(lengths, middle).len() <= count { high = middle } else { low = middle + 1 }
    }
    cut(lengths, high)
}

/// Cuts lengths into ranges that come to no more than `most` each, filled in order; a longer one is a range of its own.
fn cut(lengths: &[usize], most: usize) -> Vec<Range<usize>> {
    let (mut parts, mut from, mut filled) = (Vec::new(), 0, 0);
    for (i, length) in lengths.iter().enumerate() {
        if i > from && filled + length > most {
            parts.push(from..i);
            (from, filled) = (i, 0);
        }
        filled += length;
    }
    if from < lengths.len() {
        parts.push(from..lengths.len());
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_order_and_fills_few_batches_evenly() {
        let packed = |lengths: &[usize]| {
            let example = |len: &usize| Example::new(vec![7; *len], vec![true; *len], 0);
            let examples: Vec<Example> = lengths.iter().map(example).collect();
            let units: Vec<Unit> = (0..).zip(&examples).map(|(number, example)| Unit::of(number, example)).collect();
            let batches = Batch::packed(&units, 1024);
            assert!(batches.iter().all(|batch| batch.positions[..2] == [0, 1]));
            let members =
                |batch: &Batch| batch.sequences.iter().map(|rows| batch.examples[rows.start]).collect::<Vec<_>>();
            batches.iter().map(members).collect::<Vec<Vec<u32>>>()
        };
        assert_eq!(
            packed(&[500, 500, 300, 3000, 3, 1000, 23, 25]),
            [vec![0, 1], vec![2], vec![3], vec![4, 5], vec![6, 7]]
        );
        assert_eq!(packed(&[300, 300, 300, 300]), [[0, 1], [2, 3]], "not three and one");
        assert_eq!(packed(&[3, 500, 500]), [[0, 1, 2]]);
        assert!(packed(&[]).is_empty());
    }
}
