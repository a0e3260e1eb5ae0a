//! What is learned from: a sequence of tokens, some of which are targets.

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, the first one included that nothing predicts.
    pub ids: Vec<u32>,
    /// `trained[t]`: token t is a target. Never true for t = 0.
    pub trained: Vec<bool>,
    /// The line of the file it comes from, counted from 1. One line may give several examples.
    pub line: usize,
}
