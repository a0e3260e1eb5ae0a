//! What is learned from: a sequence of tokens, some of which are targets.

use std::num::NonZeroU32;

use super::tokens::Tokens;

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, the first one included that nothing predicts.
    pub ids: Tokens<u32>,
    /// `trained[t]`: token t is a target. Never true for t = 0.
    pub trained: Tokens<bool>,
    line: u32,
    /// Tokens of the prompt, and one: a number that is never 0 leaves room for what else may stand in the place of an example.
    answer: NonZeroU32,
}

impl Example {
    /// One in memory.
    pub fn new(ids: Vec<u32>, trained: Vec<bool>, line: usize) -> Self {
        let prompt = trained.iter().position(|trained| *trained).unwrap_or(0);
        let answer = NonZeroU32::MIN.saturating_add(prompt as u32);
        Self { ids: ids.into(), trained: trained.into(), line: line as u32, answer }
    }

    /// The line of the file it comes from, counted from 1. One line may give several examples.
    pub fn line(&self) -> usize {
        self.line as usize
    }

    /// How many of its tokens come before the first one that was trained when it was made: the prompt.
    pub fn prompt(&self) -> usize {
        self.answer.get() as usize - 1
    }
}
