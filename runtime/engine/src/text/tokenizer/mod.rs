//! A model's tokenizer: from a Hugging Face directory or from the metadata of a GGUF file, one type
//! with the same methods, so training and serving cannot tell where it came from.
//!
//! Sources: the `tokenizer.json` files of GPT-2, SmolLM2, Llama 3, Qwen2.5 and Mistral Nemo, and
//! Llama 2's for SentencePiece; keys and defaults of `tokenizer.ggml.*` as in llama.cpp's
//! `llama-vocab.cpp`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anyhow::{Result, bail, ensure};

use self::library::guarded;

mod adapter;
mod assemble;
mod bytes;
mod check;
mod control;
mod directory;
mod ends;
mod export;
mod gguf;
mod gguf_keys;
#[cfg(test)]
mod hostile;
mod library;
mod templates;
#[cfg(test)]
mod tests;

pub use self::bytes::Spelling;
pub use self::templates::TEMPLATES_DIR;
pub use crate::text::control::Control;

/// A model's tokenizer with its special tokens and chat template, whatever file they came from.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, except that control tokens in the text are not looked for; made for the first text that has one.
    as_text: OnceLock<tokenizers::Tokenizer>,
    /// Whether every control token is looked for as it is typed, not in what a normalizer makes of a text.
    control_as_typed: bool,
    /// By id.
    control: Vec<Control>,
    /// Control tokens that a character without a piece becomes.
    unknown_ids: Vec<u32>,
    n_ids: usize,
    unk_token: Option<String>,
    model_max_length: Option<u64>,
    /// Whether a text is to begin with `bos_token` and to end with `eos_token`, where the files say so besides the post-processor.
    adds_asked: [Option<bool>; 2],
    /// The token that opens a sequence.
    pub bos_token: Option<String>,
    /// The token that ends a text, by the model's files.
    pub eos_token: Option<String>,
    /// The token that fills a batch.
    pub pad_token: Option<String>,
    /// Id of `bos_token`.
    pub bos_id: Option<u32>,
    /// Id of `pad_token`.
    pub pad_id: Option<u32>,
    /// Id of `eos_token`.
    pub eos_id: Option<u32>,
    /// Every id that ends an answer, without repeats: those that the model's files name, the one that its chat template writes behind
    /// an answer, and those known to end a turn in any model.
    pub eos_ids: Vec<u32>,
    /// What the chat template ends an assistant's turn with.
    pub end_of_turn: Option<u32>,
    /// What its user should know of it, each a clause.
    pub notes: Vec<String>,
    /// Whether [`Tokenizer::encode`] with special tokens begins with `bos_token`.
    pub add_bos: bool,
    /// The Jinja source that turns messages into text.
    pub chat_template: Option<String>,
    /// Further sources by name. `tool_use` is for conversations with tools.
    pub named_templates: BTreeMap<String, String>,
}

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id, the bytes of the text that it stands for, leading space included. Ids that
    /// together spell one character each have that character's bytes; added specials have `(0, 0)`.
    pub offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Encodes text that may hold control: special tokens in it become their ids.
    ///
    /// For a rendered template pass `add_special_tokens = false`: the template wrote them already.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text, which a checked one always can.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        check_length(text)?;
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Encodes text that is only text: control tokens typed in it are spelled, never obeyed.
    ///
    /// # Errors
    /// When the vocabulary cannot spell a control token, so that its id would come out.
    pub fn encode_as_text(&self, text: &str) -> Result<Vec<u32>> {
        check_length(text)?;
        // Most texts have none, for which the tokenizers are the same.
        let clean = self.control_as_typed && !self.control.iter().any(|c| text.contains(c.text.as_str()));
        let tokenizer = match clean {
            true => &self.inner,
            false => self.as_text.get_or_init(|| self.without_control()),
        };
        let encoding = guarded(|| tokenizer.encode_fast(text, false))?;
        let ids = encoding.get_ids().to_vec();
        for id in &ids {
            let Ok(at) = self.control.binary_search_by_key(id, |c| c.id) else {
                continue;
            };
            let token = &self.control[at].text;
            // The unknown token is what a character without a piece becomes; nobody typed it.
            if self.unk_token.as_ref() != Some(token) {
                bail!(
                    "the text contains {token:?}, a control token that this vocabulary cannot spell; \
                     remove it"
                );
            }
        }
        Ok(ids)
    }

    /// Refuses ids that a model with embeddings for those below `embeddings` does not know: some tokenizers have more tokens.
    ///
    /// # Errors
    /// Names the first such token.
    pub fn check_embedded(&self, ids: &[u32], embeddings: usize) -> Result<()> {
        let Some(id) = ids.iter().find(|id| **id as usize >= embeddings) else { return Ok(()) };
        let token = self.token(*id).unwrap_or_default();
        bail!("token {id}, {token:?}, has no embedding: the model knows {embeddings} tokens, its tokenizer more")
    }

    /// Turns ids back into text. An id that is no token, as in a padded vocabulary, gives nothing.
    ///
    /// # Errors
    /// When the decoder of `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special_tokens))
    }

    /// One more than the largest id, so an embedding needs at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.n_ids
    }

    /// Most tokens of a text, where the files say it.
    pub fn model_max_length(&self) -> Option<usize> {
        usize::try_from(self.model_max_length?).ok()
    }

    /// The id of a token, spelled as in the vocabulary (`Ġthe`, `▁the`).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }
}

/// Largest of the files around a `tokenizer.json`, in bytes.
const SMALL_BYTES_MAX: u64 = 16 << 20;

/// Longest text that is encoded, in bytes: each takes some 200 of memory meanwhile. No context is as long.
const ENCODED_BYTES_MAX: usize = 4 << 20;

fn check_length(text: &str) -> Result<()> {
    let len = text.len();
    ensure!(
        len <= ENCODED_BYTES_MAX,
        "a text of {len} bytes is too long to be made tokens of, at most {ENCODED_BYTES_MAX} are"
    );
    Ok(())
}
