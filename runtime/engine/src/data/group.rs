//! What a row becomes: sequences, and what is known of them.

use super::{Example, Unit};

/// The sequences that a row becomes and an objective weighs together: one, or two answers to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// One; of a preference the chosen answer and the rejected one, each behind the prompt.
    pub sequences: Vec<Example>,
    /// For each sequence, how many of its tokens come before the first trained one: the prompt.
    pub prompts: Vec<usize>,
    /// Of a rated answer, whether it is a good one.
    pub label: Option<bool>,
}

impl Group {
    /// Sequences in which the answers, and nothing else, are trained.
    pub fn new(sequences: Vec<Example>, label: Option<bool>) -> Self {
        let prompt = |example: &Example| example.trained.iter().position(|trained| *trained).unwrap_or(0);
        let prompts = sequences.iter().map(prompt).collect();
        Self { sequences, prompts, label }
    }

    /// It as the unit of this number.
    pub fn unit(&self, number: u32) -> Unit<'_> {
        Unit { number, sequences: self.sequences.iter().collect() }
    }
}
