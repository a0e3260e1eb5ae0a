//! A sequence: the prompt of a request and what was drawn after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use anyhow::Result;

use super::Inference;
use super::adapters::Adapter;
use super::constraint::Constraint;
use super::engine::Drawn;
use super::finite::check_finite;
use super::generate::Finish;
use super::likely::Likely;
use super::prefix_cache::PrefixCache;
use super::sampler::Sampler;
use crate::run::waist::KvCache;

/// Tokens of a prompt that are read at once: enough to fill the cores, few enough that others need not wait long.
pub(super) const PIECE: usize = 256;

/// An answer that was asked for.
pub(super) struct Request {
    /// `None`: the base alone.
    pub adapter: Option<Arc<Adapter>>,
    pub prompt: Vec<u32>,
    pub sampler: Sampler,
    /// What the answer is held to.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The likeliest tokens that are told of beside each one, if any are.
    pub logprobs: Option<usize>,
    /// The prompt is asked again.
    pub shared: bool,
    /// Nobody waits for the answer.
    pub background: bool,
    pub max_tokens: usize,
    pub events: Sender<Event>,
    /// Nobody waits for it any more.
    pub dropped: Arc<AtomicBool>,
}

impl Request {
    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }

    /// The most positions that its sequence may come to.
    pub(super) fn positions_max(&self, inference: &Inference) -> usize {
        let context = inference.model.architecture.max_position_embeddings;
        self.prompt.len().saturating_add(self.max_tokens).min(context)
    }
}

/// What the scheduler tells of an answer.
pub(super) enum Event {
    Token(Drawn),
    End(Finish),
    Failed(anyhow::Error),
}

/// A request that is being answered.
pub(super) struct Sequence {
    pub request: Request,
    pub cache: Box<dyn KvCache>,
    /// What the model has read: the prompt so far, and the tokens drawn.
    pub read: Vec<u32>,
    /// The last token, which it has not read yet.
    pub last: Option<u32>,
    left: usize,
    /// What is read instead of the prompt.
    again: Option<Vec<u32>>,
}

impl Sequence {
    pub(super) fn new(inference: &Inference, request: Request, prefixes: &PrefixCache) -> Self {
        let adapter = request.adapter.as_ref();
        let prefix = prefixes.find(&inference.model.architecture, adapter, &request.prompt);
        let cache = prefix.unwrap_or_else(|| inference.begin(adapter.map(Arc::as_ref)));
        let read = request.prompt[..cache.positions()].to_vec();
        inference.count_prompt(request.prompt.len(), read.len());
        Self { cache, read, last: None, left: request.max_tokens, request, again: None }
    }

    /// The generation of its adapter; 0: the base alone.
    pub(super) fn generation(&self) -> u64 {
        self.request.adapter.as_ref().map_or(0, |adapter| adapter.generation())
    }

    /// Tokens to be read that are not read yet: of the prompt, or, after [`Sequence::outgrow`], of what followed it, too.
    pub(super) fn unread(&self) -> usize {
        self.to_read().len().saturating_sub(self.read.len())
    }

    fn to_read(&self) -> &[u32] {
        self.again.as_deref().unwrap_or(&self.request.prompt)
    }

    /// Reads a piece of the prompt. After its last piece, draws.
    pub(super) fn read(&mut self, inference: &Inference) -> Result<Option<Finish>> {
        let all = self.again.as_deref().unwrap_or(&self.request.prompt);
        let piece = &all[self.read.len()..];
        let piece = &piece[..piece.len().min(PIECE)];
        let (whole, length) = (self.read.len() + piece.len() == all.len(), all.len());
        let adapter = self.request.adapter.as_deref();
        let logits = inference.read(adapter, piece, &mut *self.cache, length, whole)?;
        self.read.extend_from_slice(piece);
        if whole {
            self.again = None;
        }
        logits.map_or(Ok(None), |logits| self.draw(inference, logits))
    }

    /// Has all of a sequence read again whose next token the base turns otherwise than those before, as transformers has it.
    pub(super) fn outgrow(&mut self, inference: &Inference) {
        let Some(last) = self.last else { return };
        if inference.is_outgrown(&*self.cache, self.read.len() + 1) {
            let all = std::mem::take(&mut self.read).into_iter().chain([last]).collect();
            self.cache = inference.begin(self.request.adapter.as_deref());
            (self.again, self.last) = (Some(all), None);
        }
    }

    /// Draws a token; why the answer ends, if it does.
    pub(super) fn draw(&mut self, inference: &Inference, logits: Vec<f32>) -> Result<Option<Finish>> {
        check_finite(&logits)?;
        let before = self.request.logprobs.map(|top| (logits.clone(), top));
        let token = match &mut self.request.constraint {
            None => self.request.sampler.draw(logits),
            Some(constraint) => self.request.sampler.draw_held(logits, &mut **constraint)?,
        };
        // An adapter may have been trained with a tokenizer of its own.
        let model = self.request.adapter.as_ref().map_or(&inference.model, |adapter| &adapter.model);
        if model.tokenizer.eos_ids.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        self.left -= 1;
        self.last = Some(token);
        let complete = self.request.constraint.as_mut().map_or(Ok(false), |constraint| constraint.accept(token))?;
        let likely = before.map(|(logits, top)| Likely::of(&logits, token, top));
        if self.request.events.send(Event::Token(Drawn { id: token, likely })).is_err() {
            return Ok(Some(Finish::Length));
        }
        if complete {
            return Ok(Some(Finish::Stop));
        }
        let full = self.cache.positions() >= inference.model.architecture.max_position_embeddings;
        Ok((self.left == 0 || full).then_some(Finish::Length))
    }
}
