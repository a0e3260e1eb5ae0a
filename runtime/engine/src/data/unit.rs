//! What an objective weighs together.

use super::example::Example;

/// The sequences of a row that an objective weighs together: one, or two answers to one prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// One; of a preference the chosen answer and the rejected one, each behind the prompt.
    pub sequences: Vec<Example>,
    /// For each sequence, how many of its tokens come before the first trained one: the prompt.
    pub prompts: Vec<usize>,
    /// Of a rated answer, whether it is a good one.
    pub label: Option<bool>,
}

impl Unit {
    /// Sequences in which the answers, and nothing else, are trained.
    pub fn new(sequences: Vec<Example>, label: Option<bool>) -> Self {
        let prompt = |example: &Example| example.trained.iter().position(|trained| *trained).unwrap_or(0);
        let prompts = sequences.iter().map(prompt).collect();
        Self { sequences, prompts, label }
    }
}
