//! What is learned from: a sequence of tokens, some of which are targets.

use super::tokens::Tokens;

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, the first one included that nothing predicts.
    pub ids: Tokens<u32>,
    /// `trained[t]`: token t is a target. Never true for t = 0.
    pub trained: Tokens<bool>,
    /// The line of the file it comes from, counted from 1. One line may give several examples.
    pub line: usize,
}

impl Example {
    /// One in memory.
    pub fn new(ids: Vec<u32>, trained: Vec<bool>, line: usize) -> Self {
        Self { ids: ids.into(), trained: trained.into(), line }
    }
}
