//! Answers: tokens one after another, until the model ends its turn.

use std::ops::Deref;

use anyhow::{Context, Result, ensure};
use candle_transformers::generation::{LogitsProcessor, Sampling as Draw};

use crate::adaptation::Adaptation;
use crate::decoder::Cache;
use crate::model::BaseModel;
use crate::recipe::Pass;
use crate::template::tokenize;
use crate::tokenizer::Tokenizer;

/// How an answer is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// 0: always the most likely token; higher is freer.
    pub temperature: f64,
    /// Draw from the likeliest tokens that together have this probability; 1: from all.
    pub top_p: f64,
    /// Seed of the draw.
    pub seed: u64,
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
    let rendered = template.render_prompt(messages, None, model.tokenizer.special_tokens())?;
    Ok(tokenize(&rendered, &model.tokenizer)?.0)
}

/// Tokens of the prompt that are read at once: enough to fill the cores, few enough to stop between two pieces.
const PREFILL: usize = 256;

/// Below this a temperature is 0: dividing logits by less overflows.
const TEMPERATURE_MIN: f64 = 1e-6;

/// An answer that is drawn as it is asked for. Each `next` is one pass through the model; dropping it ends the work.
///
/// `M` and `A` are references or `Arc`s.
pub struct Tokens<M, A> {
    model: M,
    adaptation: Option<A>,
    cache: Cache,
    draw: LogitsProcessor,
    /// What the model has not seen: the rest of the prompt, then the last token.
    unseen: Vec<u32>,
    left: usize,
    finish: Option<Finish>,
}

impl<M: Deref<Target = BaseModel>, A: Deref<Target = Adaptation>> Tokens<M, A> {
    /// Prepares to continue `prompt`; nothing is computed yet.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the model's context, or the sampling is not of numbers in range.
    pub fn new(model: M, adaptation: Option<A>, prompt: &[u32], sampling: Sampling) -> Result<Self> {
        let Sampling { max_tokens, temperature, top_p, seed } = sampling;
        ensure!(temperature.is_finite() && temperature >= 0.0, "the temperature is not a number from 0");
        ensure!((0.0..=1.0).contains(&top_p), "top_p is not a number from 0 to 1");
        let context = model.config.max_position_embeddings;
        ensure!(!prompt.is_empty(), "the prompt is empty");
        ensure!(prompt.len() <= context, "the prompt is {} tokens, the model's context {context}", prompt.len());
        let draw = if temperature < TEMPERATURE_MIN || top_p == 0.0 {
            Draw::ArgMax
        } else if top_p < 1.0 {
            Draw::TopP { p: top_p, temperature }
        } else {
            Draw::All { temperature }
        };
        let draw = LogitsProcessor::from_sampling(seed, draw);
        let finish = (max_tokens == 0).then_some(Finish::Length);
        let unseen = prompt.to_vec();
        Ok(Self { model, adaptation, cache: Cache::default(), draw, unseen, left: max_tokens, finish })
    }

    /// Reads a piece of the prompt, all but its last one; says whether there is more to read before the first token.
    /// Without calls to it the first `next` reads the whole prompt.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn prefill(&mut self) -> Result<bool> {
        if self.finish.is_none() && self.unseen.len() > PREFILL {
            let piece: Vec<u32> = self.unseen.drain(..PREFILL).collect();
            let pass = Pass::evaluation(&self.model, self.adaptation.as_deref());
            pass.continue_sequence(&piece, &mut self.cache)?;
        }
        Ok(self.unseen.len() > PREFILL)
    }

    /// Why the answer ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    fn draw(&mut self) -> Result<Option<u32>> {
        while self.prefill()? {}
        let pass = Pass::evaluation(&self.model, self.adaptation.as_deref());
        let logits = pass.continue_sequence(&self.unseen, &mut self.cache)?;
        let token = self.draw.sample(&logits)?;
        if self.model.tokenizer.eos_ids.contains(&token) {
            self.finish = Some(Finish::Stop);
            return Ok(None);
        }
        self.left -= 1;
        self.unseen = vec![token];
        if self.left == 0 || self.cache.len >= self.model.config.max_position_embeddings {
            self.finish = Some(Finish::Length);
        }
        Ok(Some(token))
    }
}

impl<M: Deref<Target = BaseModel>, A: Deref<Target = Adaptation>> Iterator for Tokens<M, A> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finish.is_some() {
            return None;
        }
        let drawn = self.draw();
        if drawn.is_err() {
            self.finish = Some(Finish::Length);
        }
        drawn.transpose()
    }
}

/// Continues some tokens, to the end.
///
/// # Errors
/// When the prompt is longer than the model's context, or a tensor operation fails.
pub fn generate(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    prompt: &[u32],
    sampling: Sampling,
) -> Result<Answer> {
    let mut tokens = Tokens::new(model, adaptation, prompt, sampling)?;
    let ids = tokens.by_ref().collect::<Result<Vec<u32>>>()?;
    let finish = tokens.finish().expect("the tokens came to their end");
    Ok(Answer { text: model.tokenizer.decode(&ids, true)?, ids, finish })
}

/// Text out of tokens that come one by one: what it has given out never changes by what comes after.
///
/// The pieces put together are what [`Tokenizer::decode`] makes of all tokens at once, without special ones.
#[derive(Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
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
        Ok(self.give(text.trim_end_matches(char::REPLACEMENT_CHARACTER)))
    }

    /// What was held back, at the end.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.ids, true)?;
        Ok(self.give(&text))
    }

    /// All of `text` that was not given out. Some decoders take a whole character back when bytes behind it turn out to
    /// be none; then what differs is given again.
    fn give(&mut self, text: &str) -> String {
        if text.len() <= self.given.len() {
            return String::new();
        }
        let same = text.char_indices().zip(self.given.chars()).take_while(|((_, a), b)| a == b).last();
        let from = same.map_or(0, |((at, c), _)| at + c.len_utf8());
        self.given.truncate(from);
        self.given.push_str(&text[from..]);
        text[from..].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
    }

    fn sampling(temperature: f64, top_p: f64, seed: u64) -> Sampling {
        Sampling { max_tokens: 24, temperature, top_p, seed }
    }

    #[test]
    fn a_prompt_read_in_pieces_is_answered_as_one_read_at_once() -> Result<()> {
        let model = BaseModel::load(&fixture("llama"))?;
        let prompt: Vec<u32> = (0..model.config.max_position_embeddings as u32 - 9).map(|i| 3 + i * 7 % 300).collect();
        let pass = Pass::evaluation(&model, None);
        let whole = pass.continue_sequence(&prompt, &mut Cache::default())?.to_vec1::<f32>()?;
        let mut cache = Cache::default();
        for piece in prompt[..prompt.len() - 5].chunks(37) {
            pass.continue_sequence(piece, &mut cache)?;
        }
        let pieces = pass.continue_sequence(&prompt[prompt.len() - 5..], &mut cache)?.to_vec1::<f32>()?;
        for (a, b) in whole.iter().zip(&pieces) {
            assert!((a - b).abs() < 1e-4, "{a} and {b}");
        }
        Ok(())
    }

    #[test]
    fn seed_and_sampling_decide_the_answer() -> Result<()> {
        let model = BaseModel::load(&fixture("llama"))?;
        let prompt = [1, 40, 41, 42];
        let ids = |sampling| -> Result<Vec<u32>> { Ok(generate(&model, None, &prompt, sampling)?.ids) };
        let greedy = ids(sampling(0.0, 1.0, 1))?;
        assert_eq!(greedy, ids(sampling(1.5, 0.0, 2))?, "top_p 0 leaves the likeliest token");
        assert_eq!(greedy, ids(sampling(1.5, 1e-6, 3))?, "and so does next to nothing");
        assert_eq!(greedy, ids(sampling(1e-300, 1.0, 4))?, "as does next to no temperature");
        assert_eq!(ids(sampling(1.5, 0.9, 5))?, ids(sampling(1.5, 0.9, 5))?);
        assert_ne!(ids(sampling(1.5, 1.0, 5))?, ids(sampling(1.5, 1.0, 6))?);
        Ok(())
    }

    #[test]
    fn an_answer_ends_where_the_context_ends() -> Result<()> {
        let mut model = BaseModel::load(&fixture("llama"))?;
        let mut endless = Tokenizer::from_dir(&fixture("llama"))?;
        endless.eos_ids.clear();
        model.tokenizer = endless.into();
        let context = model.config.max_position_embeddings;
        let answer = generate(&model, None, &vec![5; context - 3], sampling(0.0, 1.0, 0))?;
        assert_eq!((answer.ids.len(), answer.finish), (4, Finish::Length));
        let refused = generate(&model, None, &vec![5; context + 1], sampling(0.0, 1.0, 0));
        assert!(format!("{:#}", refused.expect_err("it is too long")).contains("the model's context"));
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
