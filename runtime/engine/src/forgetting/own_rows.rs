//! Rows of a base's own kind: what it says of its own accord, which is what a training should leave as it is.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::Example;
use crate::inference::Engine;
use crate::inference::generate::{Finish, Sampling, prompt_ids};
use crate::models::BaseModel;
use crate::run::compute::Compute;

/// Plain requests in several languages, one a line.
const PROMPTS: &str = include_str!("prompts.txt");
/// Most tokens of an answer.
const TOKENS_MAX: usize = 64;
/// Seed of the first answer; each further one has the next.
const SEED: u64 = 2017;

/// A sequence that a base drew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnRow {
    /// Its tokens.
    ids: Vec<u32>,
    /// Place of the first token that the base drew, from 1.
    from: usize,
}

impl OwnRow {
    /// The same to be measured on: what the base drew is trained. `None` where there is nothing, as in a file that was altered.
    pub fn example(&self) -> Option<Example> {
        let drawn = (1..self.ids.len()).contains(&self.from);
        let trained = (0..self.ids.len()).map(|t| t >= self.from).collect();
        drawn.then(|| Example::new(self.ids.clone(), trained, 0))
    }
}

/// Has a base answer a few dozen plain requests in several languages, at temperature 1, in f32, by a seed of its own: the same rows at
/// each call. Where it has no chat template, texts are drawn from the token that begins one.
///
/// What ends an answer is a part of it, as to end is forgotten, too: of several tokens that end a turn it is the tokenizer's own.
/// `progress` is told how many tokens the longest answer has, and how many it may have; what it fails
/// with ends the drawing.
///
/// # Errors
/// When the template refuses a plain request, there is no token to begin with, or a pass fails.
pub fn own_rows(model: &Arc<BaseModel>, mut progress: impl FnMut(usize, usize) -> Result<()>) -> Result<Vec<OwnRow>> {
    let tokenizer = &model.tokenizer;
    let begins: Vec<Vec<u32>> = match &model.template {
        Some(_) => {
            let prompt = |text: &str| prompt_ids(model, &[json!({"role": "user", "content": text})]);
            PROMPTS.lines().map(prompt).collect::<Result<_>>()?
        }
        None => {
            let begin = tokenizer.bos_id.or(tokenizer.eos_id);
            let begin = begin.context("the tokenizer has no token that begins a text, so the base cannot write one")?;
            vec![vec![begin]; PROMPTS.lines().count()]
        }
    };
    let end = tokenizer.end_of_turn.or(tokenizer.eos_id);
    let engine = Engine::new(model.clone(), Compute::F32);
    // All at once, so that they share the reading of the weights.
    let ask = |(seed, ids): (u64, &Vec<u32>)| {
        let sampling = Sampling { max_tokens: TOKENS_MAX, temperature: 1.0, seed, ..Sampling::default() };
        engine.ask(None, ids, sampling)
    };
    let asked = (SEED..).zip(&begins).map(ask).collect::<Result<Vec<_>>>()?;
    let (mut rows, mut longest) = (Vec::new(), 0);
    for (mut tokens, begin) in asked.into_iter().zip(&begins) {
        let mut ids = begin.clone();
        for id in tokens.by_ref() {
            ids.push(id?);
            // They grow beside each other, so that the longest tells how far all are.
            longest = longest.max(ids.len() - begin.len());
            progress(longest, TOKENS_MAX)?;
        }
        ids.extend(end.filter(|_| tokens.finish() == Some(Finish::Stop)));
        rows.push(OwnRow { ids, from: begin.len() });
    }
    rows.retain(|row| row.example().is_some());
    ensure!(!rows.is_empty(), "{}: it answers nothing, so it has no rows of its own", model.path.display());
    Ok(rows)
}
