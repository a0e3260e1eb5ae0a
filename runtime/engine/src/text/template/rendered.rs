//! What a chat template makes of a conversation.

use std::ops::Range;

/// A text ready for tokenising: which byte spans are trained, and where a user's text spells special tokens that must
/// stay text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text, as transformers would render it.
    pub text: String,
    /// What the model learns to write: byte ranges of `text`, ascending, disjoint.
    pub trained: Vec<Range<usize>>,
    /// Special tokens typed inside a message: byte ranges of `text`, ascending, disjoint.
    pub literal: Vec<Range<usize>>,
}
