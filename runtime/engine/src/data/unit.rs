//! What an objective learns from in one piece.

use super::Example;
use super::group::Few;

/// The sequences of one row that belong together: one, or for a preference the chosen and the rejected. They are never cut over two
/// passes.
#[derive(Clone, Debug)]
pub struct Unit<'a> {
    /// The unit's number among all that are trained on; dropout is drawn by it.
    pub number: u32,
    /// Its sequences.
    pub sequences: Few<&'a Example>,
}

impl<'a> Unit<'a> {
    /// A unit of one sequence.
    pub fn of(number: u32, example: &'a Example) -> Self {
        Self { number, sequences: Few::One(example) }
    }

    /// Rows that its sequences take in a pass.
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|example| example.ids.len().saturating_sub(1)).sum()
    }
}
