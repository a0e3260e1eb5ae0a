//! From a text to the tokens that an encoder reads: a special token in front, the text, cut to what fits, and one behind it.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::text::tokenizer::Tokenizer;

/// Tokens of one text, special tokens included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Their ids.
    pub ids: Vec<u32>,
    /// The text was longer than what is read of it.
    pub truncated: bool,
}

/// Bytes of a text for each token that is read of it. Of a longer text that much is made tokens of first, then ten times as much, and all
/// of it only if that is still too little. A token of English has some 4 bytes.
const BYTES_PER_TOKEN: usize = 8;
/// Tokens beyond those that are read, without which a text's beginning is not taken for the whole. A word makes no other tokens for what
/// follows it; a special token of several words does, and a run of white space, and no cut parts more tokens than these.
const MARGIN: usize = 32;

/// Makes tokens of texts.
pub struct TextSide {
    tokenizer: Arc<Tokenizer>,
    /// Special tokens in front of a text.
    before: Vec<u32>,
    /// Special tokens behind it.
    after: Vec<u32>,
    /// Most tokens that are read, special ones included.
    most: usize,
    lower_case: bool,
    prompt: String,
}

impl TextSide {
    /// Makes the text side of a model that reads `most` tokens and has embeddings for `vocab_size`.
    ///
    /// # Errors
    /// When the tokenizer does not put its special tokens around a text, or makes tokens that have no embedding.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        vocab_size: usize,
        most: usize,
        lower_case: bool,
        prompt: String,
    ) -> Result<Self> {
        let n = tokenizer.vocab_size();
        ensure!(n <= vocab_size, "its tokenizer has {n} tokens, and there are embeddings for {vocab_size}");
        // One text without and with its special tokens tells what stands on which side.
        let (plain, whole) = (tokenizer.encode(TRIED, false)?.ids, tokenizer.encode(TRIED, true)?.ids);
        let places = 0..=whole.len().saturating_sub(plain.len());
        let at = places.clone().find(|at| whole[*at..].starts_with(&plain));
        let at =
            at.filter(|_| !plain.is_empty()).context("its tokenizer makes other tokens of a text that stands alone")?;
        let (before, after) = (whole[..at].to_vec(), whole[at + plain.len()..].to_vec());
        let special = before.len() + after.len();
        ensure!(most > special, "it reads {most} tokens, of which {special} are special ones");
        Ok(Self { tokenizer, before, after, most, lower_case, prompt })
    }

    /// Most tokens that are read of a text, special ones included.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Makes tokens of a text, as sentence-transformers does: what is beyond [`TextSide::most`] is cut off.
    ///
    /// Special tokens typed in the text become their ids, as they do there; an encoder has no control tokens to protect.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn tokens(&self, text: &str) -> Result<Tokens> {
        let text = self.prompted(text);
        let enough = self.room().saturating_add(MARGIN);
        for bytes in [BYTES_PER_TOKEN, 10 * BYTES_PER_TOKEN].map(|bytes| enough.saturating_mul(bytes)) {
            let beginning = beginning(&text, bytes);
            if beginning.len() == text.len() {
                break;
            }
            let ids = self.encode(beginning)?;
            if ids.len() >= enough {
                return Ok(self.framed(ids));
            }
        }
        Ok(self.framed(self.encode(&text)?))
    }

    /// As [`TextSide::tokens`], from tokens of all of the text.
    #[cfg(test)]
    pub fn whole(&self, text: &str) -> Result<Tokens> {
        Ok(self.framed(self.encode(&self.prompted(text))?))
    }

    fn prompted<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if self.prompt.is_empty() { Cow::Borrowed(text) } else { Cow::Owned(format!("{}{text}", self.prompt)) }
    }

    /// Most tokens that are read between the special ones.
    fn room(&self) -> usize {
        self.most - self.before.len() - self.after.len()
    }

    /// Cuts a text's tokens to what is read, and puts the special tokens around them.
    fn framed(&self, mut ids: Vec<u32>) -> Tokens {
        let truncated = ids.len() > self.room();
        ids.truncate(self.room());
        Tokens { ids: [&self.before[..], &ids, &self.after].concat(), truncated }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if self.lower_case {
            let lower: String = text.chars().flat_map(char::to_lowercase).collect();
            return Ok(self.tokenizer.encode(&lower, false)?.ids);
        }
        Ok(self.tokenizer.encode(text, false)?.ids)
    }

    /// Takes tokens that a client made, which should be as this model's own tokenizer makes them, special tokens included. Those of
    /// another one would mean other words, and the vector nothing.
    ///
    /// # Errors
    /// When they are not; says what tells.
    pub fn given(&self, ids: &[u32]) -> Result<Tokens> {
        let known = self.tokenizer.vocab_size();
        if let Some(id) = ids.iter().find(|id| **id as usize >= known) {
            anyhow::bail!("token {id} is not one of this model's {known} tokens");
        }
        let framed = ids.len() > self.before.len() + self.after.len()
            && ids.starts_with(&self.before)
            && ids.ends_with(&self.after);
        ensure!(
            framed,
            "these tokens are not in this model's special tokens, {:?} in front and {:?} behind, so that they may be of another tokenizer",
            self.before,
            self.after
        );
        if ids.len() <= self.most {
            return Ok(Tokens { ids: ids.to_vec(), truncated: false });
        }
        let kept = &ids[..self.most - self.after.len()];
        Ok(Tokens { ids: [kept, &self.after[..]].concat(), truncated: true })
    }
}

/// A text that any tokenizer makes tokens of.
const TRIED: &str = "a 1";

/// The beginning of a text of at least `bytes` bytes, up to the end of a word; all of a text in which none ends behind that.
fn beginning(text: &str, bytes: usize) -> &str {
    if text.len() <= bytes {
        return text;
    }
    let from = (bytes..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let Some(word) = text[from..].find(|letter: char| !letter.is_whitespace()) else { return text };
    let end = text[from + word..].find(char::is_whitespace);
    end.map_or(text, |end| &text[..from + word + end])
}
