//! Sequences laid end to end, without padding: what one forward pass takes.
//!
//! Rows of all sequences share the products; attention stays within a sequence. So a batch costs what its tokens cost, and
//! which sequences share it changes nothing but speed.

use std::ops::Range;
use std::sync::Arc;

use crate::data::Example;

/// Rows of a pass that examples are packed into. From here on more rows make products no faster, and cost memory.
const PACKED_ROWS: usize = 1024;

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
    /// Rows that predict a trained token.
    pub target_rows: Vec<u32>,
    /// The tokens that they should predict.
    pub targets: Vec<u32>,
    /// Tokens of the examples, the last of each included, which no row stands for: it predicts nothing.
    pub tokens: usize,
}

impl Batch {
    /// Lays out examples for training or evaluation. `numbered` gives each example's number.
    pub fn of_examples<'a>(numbered: impl IntoIterator<Item = (u32, &'a Example)>) -> Self {
        let (mut batch, mut ids) = (Self::default(), Vec::new());
        for (number, example) in numbered {
            let Some(inputs) = example.ids.len().checked_sub(1) else { continue };
            let start = ids.len();
            for (t, _) in example.trained.iter().enumerate().skip(1).filter(|(_, trained)| **trained) {
                batch.target_rows.push((start + t - 1) as u32);
                batch.targets.push(example.ids[t]);
            }
            ids.extend_from_slice(&example.ids[..inputs]);
            batch.push_sequence(start..ids.len(), number, 0);
            batch.tokens += example.ids.len();
        }
        batch.ids = Arc::new(ids);
        batch
    }

    /// Packs examples in their order into as few batches as hold no more than some 1,000 rows; a longer example is one of its own.
    ///
    /// Positions start anew with each example and attention stays within it, so packing changes nothing but speed and memory.
    pub fn packed(numbered: &[(u32, &Example)]) -> Vec<Self> {
        let rows = |example: &Example| example.ids.len().saturating_sub(1);
        let (mut batches, mut from, mut filled) = (Vec::new(), 0, 0);
        for (i, (_, example)) in numbered.iter().enumerate() {
            if i > from && filled + rows(example) > PACKED_ROWS {
                batches.push(Self::of_examples(numbered[from..i].iter().copied()));
                (from, filled) = (i, 0);
            }
            filled += rows(example);
        }
        if from < numbered.len() {
            batches.push(Self::of_examples(numbered[from..].iter().copied()));
        }
        batches
    }

    /// Lays out one sequence, or the continuation of one from position `from`, to predict after every row.
    pub fn of_tokens(ids: &[u32], from: u32) -> Self {
        let mut batch = Self { ids: Arc::new(ids.to_vec()), tokens: ids.len(), ..Self::default() };
        batch.push_sequence(0..ids.len(), 0, from);
        batch
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
        self.sequences.push(rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_order_and_fills_batches_up_to_the_limit() {
        let example = |len: usize| Example { ids: vec![7; len], trained: vec![true; len], line: 0 };
        let lengths = [500, 500, 300, 3000, 2, 1000, 24, 25];
        let examples: Vec<Example> = lengths.iter().map(|len| example(*len)).collect();
        let numbered: Vec<(u32, &Example)> = (0..).zip(&examples).collect();
        let batches = Batch::packed(&numbered);
        let members = |batch: &Batch| batch.sequences.iter().map(|rows| batch.examples[rows.start]).collect::<Vec<_>>();
        let packed: Vec<Vec<u32>> = batches.iter().map(members).collect();
        assert_eq!(packed, [vec![0, 1], vec![2], vec![3], vec![4, 5, 6], vec![7]]);
        assert_eq!(batches[3].positions[..3], [0, 0, 1]);
        assert!(Batch::packed(&[]).is_empty());
    }
}
