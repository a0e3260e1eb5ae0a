//! What is learned from: a sequence of tokens, some of which are targets.

use std::fmt::Write as _;

use crate::text::tokenizer::Tokenizer;

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

/// The tokens of an example as text, trained ones in [brackets], line breaks both shown and made.
pub fn preview(example: &Example, tokenizer: &Tokenizer) -> String {
    let mut out = String::new();
    for (&id, &trained) in example.ids.iter().zip(&example.trained) {
        let raw = tokenizer.token(id).unwrap_or_else(|| format!("<{id}>"));
        let mut piece = match tokenizer.decode(&[id], false) {
            // Part of a character has no text of its own.
            Ok(text) if !text.is_empty() && !text.contains('\u{fffd}') => text,
            _ => raw.clone(),
        };
        // A sentencepiece decoder drops the space that a text begins with.
        if raw.starts_with('\u{2581}') && !piece.starts_with([' ', '\u{2581}']) {
            piece.insert(0, ' ');
        }
        let breaks = piece.ends_with('\n');
        let piece = piece.replace('\r', "\\r").replace('\n', "\\n");
        let _ = match trained {
            true => write!(out, "[{piece}]"),
            false => write!(out, "{piece}"),
        };
        if breaks {
            out.push('\n');
        }
    }
    out
}
