//! Answers: tokens one after another, until the model ends its turn.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::inference::{Adapter, Engine};
use crate::models::BaseModel;
use crate::text::template::Given;
use crate::text::tokens::tokenize;

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
    prompt_ids_given(model, messages, Given::default())
}

/// As [`prompt_ids`], with tools and what else the template is given.
///
/// # Errors
/// As [`prompt_ids`].
pub fn prompt_ids_given(model: &BaseModel, messages: &[serde_json::Value], given: Given<'_>) -> Result<Vec<u32>> {
    let template = model.template.as_ref();
    let template = template.with_context(|| format!("{}: the model has no chat template", model.path.display()))?;
    let control = model.tokenizer.control_in(messages, given)?;
    let rendered = template.render_prompt(messages, given, &control)?;
    let ids = tokenize(&rendered, &model.tokenizer)?.0;
    model.tokenizer.check_embedded(&ids, model.architecture.vocab_size)?;
    Ok(ids)
}

/// Continues some tokens, to the end.
///
/// # Errors
/// When the prompt is longer than the model's context, or a pass fails.
pub fn generate(engine: &Engine, adapter: Option<&Arc<Adapter>>, prompt: &[u32], sampling: Sampling) -> Result<Answer> {
    let mut tokens = engine.ask(adapter, prompt, sampling)?;
    let ids = tokens.by_ref().collect::<Result<Vec<u32>>>()?;
    let finish = tokens.finish().expect("the tokens came to their end");
    let model = adapter.map_or(engine.model(), |adapter| &adapter.model);
    Ok(Answer { text: model.tokenizer.decode(&ids, true)?, ids, finish })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::compute::Compute;
    use crate::text::tokenizer::Tokenizer;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
    }

    fn sampling(temperature: f64, top_p: f64, seed: u64) -> Sampling {
        Sampling { max_tokens: 24, temperature, top_p, seed, ..Sampling::default() }
    }

    fn engine(model: BaseModel, compute: Compute) -> Engine {
        Engine::new(Arc::new(model), compute)
    }

    #[test]
    fn seed_and_sampling_decide_the_answer() -> Result<()> {
        let engine = engine(BaseModel::load(&fixture("llama"))?, Compute::F32);
        let prompt = [1, 40, 41, 42];
        let ids = |sampling| -> Result<Vec<u32>> { Ok(generate(&engine, None, &prompt, sampling)?.ids) };
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
            let context = model.architecture.max_position_embeddings;
            let engine = engine(model, compute);
            let answer = generate(&engine, None, &vec![5; context - 3], sampling(0.0, 1.0, 0))?;
            assert_eq!((answer.ids.len(), answer.finish), (4, Finish::Length));
            let refused = generate(&engine, None, &vec![5; context + 1], sampling(0.0, 1.0, 0));
            assert!(format!("{:#}", refused.expect_err("it is too long")).contains("the model's context"));
        }
        Ok(())
    }
}
