//! Answers: tokens one after another, until the model ends its turn.

use anyhow::{Context, Result};

use crate::inference::Answers;
use crate::models::BaseModel;
use crate::text::template::tokenize;
use crate::text::tokenizer::Tokenizer;

/// How an answer is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// 0: always the most likely token; higher is freer.
    pub temperature: f64,
    /// Draw from so many of the likeliest tokens; 0: from all.
    pub top_k: usize,
    /// Draw from the likeliest tokens that together have this probability; 1: from all.
    pub top_p: f64,
    /// Draw from tokens at least this share as likely as the likeliest: 0 to 1; 0: from all.
    pub min_p: f64,
    /// Divides what speaks for a token that stands in the conversation; 1: nothing.
    pub repetition_penalty: f64,
    /// What a token's logit loses for each time it was drawn: -2 to 2.
    pub frequency_penalty: f64,
    /// What the logit of a token that was drawn loses once: -2 to 2.
    pub presence_penalty: f64,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for Sampling {
    /// Always the most likely token, to the end of the context.
    fn default() -> Self {
        Self {
            max_tokens: usize::MAX,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text, without control tokens.
    pub text: String,
    /// The tokens, without the one that ended the turn.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Token ids of a conversation, ready for the model's turn: rendered as in training.
///
/// # Errors
/// When the model has no chat template, or it refuses the conversation.
pub fn prompt_ids(model: &BaseModel, messages: &[serde_json::Value]) -> Result<Vec<u32>> {
    let template = model.template.as_ref();
    let template = template.with_context(|| format!("{}: the model has no chat template", model.path.display()))?;
    let control = model.tokenizer.control_in(messages, None)?;
    let rendered = template.render_prompt(messages, None, &control)?;
    let ids = tokenize(&rendered, &model.tokenizer)?.0;
    model.tokenizer.check_embedded(&ids, model.config.vocab_size)?;
    Ok(ids)
}

/// Continues some tokens, to the end.
///
/// # Errors
/// When the prompt is longer than the model's context, or a pass fails.
pub fn generate(answers: &Answers, prompt: &[u32], sampling: Sampling) -> Result<Answer> {
    let mut tokens = answers.ask(prompt, sampling)?;
    let ids = tokens.by_ref().collect::<Result<Vec<u32>>>()?;
    let finish = tokens.finish().expect("the tokens came to their end");
    Ok(Answer { text: answers.inference().model.tokenizer.decode(&ids, true)?, ids, finish })
}

/// Tokens that are held back at most: no character has as many bytes, so whatever is held longer will not become one.
const HELD_MAX: usize = 16;

/// Text out of tokens that come one by one: what it has given out never changes by what comes after.
///
/// The pieces put together are what [`Tokenizer::decode`] makes of all tokens at once, without special ones. A token costs the same
/// however many came before: it is decoded behind those of the piece before, whose text tells what is new. The library's
/// `DecodeStream` does the same, but fails for good where a byte makes those before it no character, decodes all anew while a model
/// writes bytes that are none, and loses what is held back at the end.
#[derive(Default)]
pub struct Detokenizer {
    /// Tokens of the piece that was given out last, and those since.
    ids: Vec<u32>,
    /// How many of them were given out.
    read: usize,
    /// Their text.
    given: String,
}

impl Detokenizer {
    /// The text that a further token makes certain; empty while it only begins a character.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> Result<String> {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, true)?;
        // Bytes of a character that is not whole are decoded as replacement characters.
        let held = text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.read <= HELD_MAX;
        if held { Ok(String::new()) } else { self.give(&text, tokenizer) }
    }

    /// What was held back, at the end.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.ids, true)?;
        self.give(&text, tokenizer)
    }

    /// All of `text`, that of all tokens here, which was not given out. Some decoders take a whole character back when bytes behind
    /// it turn out to be none; then what differs is given again.
    fn give(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<String> {
        let same = text.char_indices().zip(self.given.chars()).take_while(|((_, a), b)| a == b).last();
        let from = same.map_or(0, |((at, c), _)| at + c.len_utf8());
        let piece = text[from..].to_owned();
        if !piece.is_empty() {
            // What was new is what the next piece is told by.
            self.ids.drain(..self.read);
            self.read = self.ids.len();
            self.given = tokenizer.decode(&self.ids, true)?;
        }
        Ok(piece)
    }
}

/// Tokens at the end of a prompt that are looked at for an open block of thinking.
const PROMPT_TAIL: usize = 16;

/// Takes the end of a block of thinking, and the white space behind it, off the beginning of an answer to a prompt that opens that
/// block. A model that learned plain answers ends the block at once; thinking that is there is kept, with its end.
#[derive(Default)]
pub struct BlockEnd {
    /// What ends the block, until it is known whether the answer begins with it.
    closing: Option<String>,
    /// Text that may be the beginning of it.
    held: String,
    /// It was there, and nothing else since but white space.
    passed: bool,
}

impl BlockEnd {
    /// For an answer to these tokens.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn behind(prompt: &[u32], model: &BaseModel) -> Result<Self> {
        let Some(template) = &model.template else { return Ok(Self::default()) };
        let tail = model.tokenizer.decode(&prompt[prompt.len().saturating_sub(PROMPT_TAIL)..], false)?;
        Ok(Self { closing: template.open_block_end(&tail), ..Self::default() })
    }

    /// The text that a further piece makes certain.
    pub fn push(&mut self, piece: String) -> String {
        if self.passed {
            let text = piece.trim_start();
            self.passed = text.is_empty();
            return text.to_owned();
        }
        let Some(closing) = &self.closing else { return piece };
        self.held.push_str(&piece);
        let text = self.held.trim_start();
        if closing.starts_with(text) && text.len() < closing.len() {
            return String::new();
        }
        let rest = text.strip_prefix(closing.as_str()).map(|rest| rest.trim_start().to_owned());
        self.closing = None;
        self.passed = rest.as_ref().is_some_and(String::is_empty);
        let held = std::mem::take(&mut self.held);
        rest.unwrap_or(held)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> String {
        self.closing = None;
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::inference::Inference;
    use crate::run::compute::Compute;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
    }

    fn sampling(temperature: f64, top_p: f64, seed: u64) -> Sampling {
        Sampling { max_tokens: 24, temperature, top_p, seed, ..Sampling::default() }
    }

    fn answers(model: BaseModel, compute: Compute) -> Answers {
        Answers::new(Inference::new(Arc::new(model), None, compute))
    }

    #[test]
    fn seed_and_sampling_decide_the_answer() -> Result<()> {
        let answers = answers(BaseModel::load(&fixture("llama"))?, Compute::F32);
        let prompt = [1, 40, 41, 42];
        let ids = |sampling| -> Result<Vec<u32>> { Ok(generate(&answers, &prompt, sampling)?.ids) };
        let greedy = ids(sampling(0.0, 1.0, 1))?;
        assert_eq!(greedy, ids(sampling(1.5, 0.0, 2))?, "top_p 0 leaves the likeliest token");
        assert_eq!(greedy, ids(sampling(1.5, 1e-6, 3))?, "and so does next to nothing");
        assert_eq!(greedy, ids(sampling(1.5, 1e-300, 3))?, "also when f32 has no such number");
        assert_eq!(greedy, ids(sampling(1e-300, 1.0, 4))?, "as does next to no temperature");
        assert_eq!(ids(sampling(1.5, 0.9, 5))?, ids(sampling(1.5, 0.9, 5))?);
        assert_ne!(ids(sampling(1.5, 1.0, 5))?, ids(sampling(1.5, 1.0, 6))?);
        Ok(())
    }

    #[test]
    fn an_answer_ends_where_the_context_ends() -> Result<()> {
        for compute in [Compute::Plain, Compute::F32, Compute::Bf16] {
            let mut model = BaseModel::load(&fixture("llama"))?;
            let mut endless = Tokenizer::from_dir(&fixture("llama"))?;
            endless.eos_ids.clear();
            model.tokenizer = endless.into();
            let context = model.config.max_position_embeddings;
            let answers = answers(model, compute);
            let answer = generate(&answers, &vec![5; context - 3], sampling(0.0, 1.0, 0))?;
            assert_eq!((answer.ids.len(), answer.finish), (4, Finish::Length));
            let refused = generate(&answers, &vec![5; context + 1], sampling(0.0, 1.0, 0));
            assert!(format!("{:#}", refused.expect_err("it is too long")).contains("the model's context"));
        }
        Ok(())
    }

    #[test]
    fn the_end_of_a_block_in_which_nothing_was_thought_is_no_part_of_an_answer() {
        let read = |pieces: &[&str]| {
            let mut end = BlockEnd { closing: Some("</think>".to_owned()), ..BlockEnd::default() };
            let said: Vec<String> = pieces.iter().map(|piece| end.push((*piece).to_owned())).collect();
            said.concat() + &end.finish()
        };
        assert_eq!(read(&["</think>\n\nJa, é."]), "Ja, é.");
        assert_eq!(read(&["\n", "</th", "ink>", "\n", "\n", " Ja", ", \n</think> é."]), "Ja, \n</think> é.");
        assert_eq!(read(&["Hm", "\n</think>", "\n\nJa"]), "Hm\n</think>\n\nJa", "thinking is kept");
        assert_eq!(read(&["</thi", "s>"]), "</this>");
        assert_eq!(read(&["</thi"]), "</thi", "it was cut");
        assert_eq!(read(&[" ", ""]), " ");
        assert_eq!(read(&["</think>", " "]), "");
        let mut plain = BlockEnd::default();
        assert_eq!(plain.push("</think> a".to_owned()), "</think> a", "no prompt opened it");
    }

    /// A byte that follows a character makes SentencePiece's decoder take that back.
    #[test]
    fn bytes_that_are_no_character_neither_end_an_answer_nor_hold_it_up() -> Result<()> {
        let file = crate::files::gguf::Gguf::open(&fixture("../tokenizers/sentencepiece.gguf"))?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let bytes = |bytes: &[u8]| -> Vec<u32> {
            bytes.iter().filter_map(|byte| tokenizer.id(&format!("<0x{byte:02X}>"))).collect()
        };
        let word = tokenizer.encode("of", false)?.ids;
        let given = |ids: &[u32]| -> Result<(Vec<String>, String)> {
            let mut detokenizer = Detokenizer::default();
            let pieces = ids.iter().map(|id| detokenizer.push(*id, &tokenizer)).collect::<Result<Vec<String>>>()?;
            Ok((pieces, detokenizer.finish(&tokenizer)?))
        };
        // é, a byte that begins nothing, a word.
        let ids = [&bytes(&[0xC3, 0xA9, 0xFF])[..], &word].concat();
        let (pieces, rest) = given(&ids)?;
        assert_eq!(ids.len(), 3 + word.len());
        assert!(pieces.concat().starts_with('é') && (pieces.concat() + &rest).ends_with("of"), "{pieces:?} {rest:?}");
        // Ten times as many as are held back come piece by piece, and the last at the end.
        let (pieces, rest) = given(&bytes(&[0xFF; 10 * HELD_MAX]))?;
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 5, "{pieces:?}");
        assert_eq!((pieces.concat() + &rest).chars().count(), 10 * HELD_MAX);
        // A character that says so itself.
        let typed = tokenizer.encode("a\u{fffd}", false)?.ids;
        let (pieces, rest) = given(&typed)?;
        assert_eq!(pieces.concat() + &rest, tokenizer.decode(&typed, true)?);
        Ok(())
    }

    #[test]
    fn pieces_of_text_are_whole_characters_and_add_up() -> Result<()> {
        let tokenizer = Tokenizer::from_dir(&fixture("llama"))?;
        for text in ["plain words", "añ → 🦊🦊 \u{1F468}\u{200D}\u{1F469} 中文 e\u{301}\n", "", "🦊"] {
            let ids = tokenizer.encode(text, false)?.ids;
            let mut detokenizer = Detokenizer::default();
            let mut pieces = Vec::new();
            for id in &ids {
                pieces.push(detokenizer.push(*id, &tokenizer)?);
            }
            assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
            pieces.push(detokenizer.finish(&tokenizer)?);
            assert_eq!(pieces.concat(), text);
            // Cut within a character: it comes at the end, as the whole would be decoded.
            let cut = &ids[..ids.len().saturating_sub(1)];
            let mut detokenizer = Detokenizer::default();
            let mut given = String::new();
            for id in cut {
                given += &detokenizer.push(*id, &tokenizer)?;
            }
            given += &detokenizer.finish(&tokenizer)?;
            assert_eq!(given, tokenizer.decode(cut, true)?);
        }
        Ok(())
    }
}
