//! Answers: tokens one after another, until the model ends its turn.

use anyhow::{Context, Result, ensure};
use candle_transformers::generation::LogitsProcessor;

use crate::adaptation::Adaptation;
use crate::decoder::Cache;
use crate::model::BaseModel;
use crate::recipe::Pass;
use crate::template::tokenize;

/// How an answer is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// 0: always the most likely token; higher is freer.
    pub temperature: f64,
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

/// Continues some tokens.
///
/// # Errors
/// When the prompt is longer than the model's context, or a tensor operation fails.
pub fn generate(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    prompt: &[u32],
    sampling: Sampling,
) -> Result<Answer> {
    ensure!(sampling.temperature.is_finite() && sampling.temperature >= 0.0, "the temperature is not a number from 0");
    let pass = Pass::evaluation(model, adaptation);
    let mut cache = Cache::default();
    let temperature = Some(sampling.temperature).filter(|temperature| *temperature > 0.0);
    let mut processor = LogitsProcessor::new(sampling.seed, temperature, None);
    let mut ids: Vec<u32> = Vec::new();
    let mut finish = Finish::Length;
    let mut next = prompt.to_vec();
    while ids.len() < sampling.max_tokens && cache.len + next.len() <= model.config.max_position_embeddings {
        let logits = pass.continue_sequence(&next, &mut cache)?;
        let token = processor.sample(&logits)?;
        if model.tokenizer.eos_ids.contains(&token) {
            finish = Finish::Stop;
            break;
        }
        ids.push(token);
        next = vec![token];
    }
    ensure!(
        cache.len > 0 || sampling.max_tokens == 0,
        "the prompt is {} tokens, the model's context {}",
        prompt.len(),
        model.config.max_position_embeddings
    );
    Ok(Answer { text: model.tokenizer.decode(&ids, true)?, ids, finish })
}
