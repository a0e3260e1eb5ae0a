//! A model of this machine.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use anyhow::Result;
use homeroom_engine::inference::generate::{Finish, Sampling, prompt_ids};
use homeroom_engine::inference::{Engine, Tokens};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::text::block_end::BlockEnd;
use homeroom_engine::text::detokenizer::Detokenizer;
use serde_json::Value;

use super::context::PATIENCE;
use super::stop::StopFilter;
use super::{
    Backend, Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Message, Request, Usage, new_id,
    random,
};
use crate::models::{Answerer, Files, ModelRef, Network};
use crate::progress::line;

/// Freedom of the draw where a request does not say: small models lose the thread at OpenAI's 1.
pub const DEFAULT_TEMPERATURE: f64 = 0.7;
/// Share of the probability that is drawn from where neither it nor the temperature is said, as in llama.cpp's family: small models
/// stray in what is left.
const DEFAULT_TOP_P: f64 = 0.9;

/// Longest answer where a request does not say, in tokens: a model that does not find an end would go on to that of its context.
pub const DEFAULT_MAX_TOKENS: usize = 1024;

/// Bytes of a conversation for each token of the context from which on it cannot fit: no text has so long tokens on an average. Making
/// tokens of it only to find that out would take minutes and gigabytes.
const BYTES_PER_TOKEN_MAX: usize = 48;

/// Conversations and other texts of more bytes are made tokens of one at a time, as each byte takes some 200 of memory meanwhile.
pub(super) const LONG_BYTES: usize = 64 << 10;

/// The turn of those.
pub(super) static LONG: Mutex<()> = Mutex::new(());

/// Neither a request nor a file that changes has a server download anything.
pub(super) const OFFLINE: Network = Network::Never("neither `serve` nor a file of handlers downloads anything");

/// Waits for a lock as long as somebody wants the answer.
pub(super) fn turn<'a, T>(lock: &'a Mutex<T>, context: &Context) -> Result<MutexGuard<'a, T>, HandlerError> {
    loop {
        match lock.try_lock() {
            Ok(turn) => return Ok(turn),
            Err(TryLockError::Poisoned(turn)) => return Ok(turn.into_inner()),
            Err(TryLockError::WouldBlock) => context.check()?,
        }
        std::thread::sleep(PATIENCE);
    }
}

/// A model of this machine: a base, perhaps with an adapter.
pub struct Local {
    name: String,
    /// What is loaded anew once its files are others, and what that computes in.
    reference: Option<(ModelRef, Compute)>,
    now: Mutex<Generation>,
}

/// The model that answers, and the files that it was read from.
struct Generation {
    answerer: Answerer,
    /// `None`: they are not looked at.
    files: Option<Files>,
}

impl Local {
    /// Answers with a model under a name.
    pub fn new(name: impl Into<String>, answerer: Answerer) -> Self {
        let now = Generation { answerer, files: None };
        Self { name: name.into(), reference: None, now: Mutex::new(now) }
    }

    /// Loads a model to answer with under a name. When another is put in its place, as by training it again, the next request is
    /// answered by that.
    ///
    /// # Errors
    /// As [`Answerer::load`].
    pub fn load(name: impl Into<String>, reference: ModelRef, compute: Compute) -> Result<Self> {
        // Before they are read: what changes in between is a change.
        let files = Some(Files::named(&reference));
        let now = Generation { answerer: Answerer::load(&reference, OFFLINE, compute)?, files };
        Ok(Self { name: name.into(), reference: Some((reference, compute)), now: Mutex::new(now) })
    }

    /// The model as its files are now; if they cannot be loaded, which is said once, the older one.
    fn answerer(&self, context: &Context) -> Result<Answerer, HandlerError> {
        let mut now = turn(&self.now, context)?;
        if let Some((reference, compute)) = &self.reference {
            let files = Some(Files::named(reference));
            if files != now.files {
                now.files = files;
                match Answerer::load(reference, OFFLINE, *compute) {
                    Ok(answerer) => {
                        now.answerer = answerer;
                        line(format_args!(
                            "note: {}: its files have changed; the new ones answer from now on",
                            self.name
                        ));
                    }
                    Err(error) => line(format_args!(
                        "warning: {}: its files have changed and cannot be loaded, so the older ones go on answering: {error:#}",
                        self.name
                    )),
                }
            }
        }
        Ok(now.answerer.clone())
    }
}

impl Handler for Local {
    fn engine(&self) -> Option<Arc<Engine>> {
        Some(self.now.lock().unwrap_or_else(PoisonError::into_inner).answerer.engine.clone())
    }

    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        request.check_for(Backend::Local)?;
        let answerer = self.answerer(context)?;
        let model = answerer.model();
        let limit = model.architecture.max_position_embeddings;
        let bytes: usize = request.messages.iter().map(|message| message.content.len()).sum();
        if bytes / BYTES_PER_TOKEN_MAX > limit {
            let message =
                format!("the conversation is {bytes} bytes long, far beyond the model's context of {limit} tokens");
            return Err(HandlerError::new(Kind::ContextLength, message));
        }
        let messages: Vec<Value> = request.messages.iter().map(Message::json).map(Value::Object).collect();
        let turn = (bytes > LONG_BYTES).then(|| turn(&LONG, context)).transpose()?;
        let prompt = prompt_ids(model, &messages);
        drop(turn);
        let prompt = prompt.map_err(|error| HandlerError::invalid("messages", format!("{error:#}")))?;
        if prompt.len() >= limit {
            let message = format!(
                "the conversation is {} tokens and leaves no room for an answer: the model's context is {limit}",
                prompt.len()
            );
            return Err(HandlerError::new(Kind::ContextLength, message));
        }
        let neutral = Sampling::default();
        let sampling = Sampling {
            max_tokens: context.tokens(request.max_tokens.or(Some(DEFAULT_MAX_TOKENS))).unwrap_or(limit).min(limit),
            temperature: request.temperature.unwrap_or(DEFAULT_TEMPERATURE),
            top_k: request.top_k.unwrap_or(neutral.top_k),
            top_p: request.top_p.unwrap_or(if request.temperature.is_none() { DEFAULT_TOP_P } else { neutral.top_p }),
            min_p: request.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: request.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            frequency_penalty: request.frequency_penalty.unwrap_or(neutral.frequency_penalty),
            presence_penalty: request.presence_penalty.unwrap_or(neutral.presence_penalty),
            seed: request.seed.map_or_else(random, i64::cast_unsigned),
        };
        let block_end = BlockEnd::behind(&prompt, &model.tokenizer, model.template.as_ref());
        let block_end = block_end.map_err(|error| HandlerError::internal(&error))?;
        let tokens = answerer.ask(&prompt, sampling);
        Ok(Box::new(Answer {
            tokens: tokens.map_err(|error| HandlerError::internal(&error))?,
            model: model.clone(),
            detokenizer: Detokenizer::default(),
            block_end,
            stops: StopFilter::new(&request.stop),
            context: context.clone(),
            prompt_tokens: prompt.len() as u64,
            drawn: 0,
            ready: VecDeque::from([Event::start(new_id(), &self.name, &self.name)]),
            over: false,
        }))
    }
}

/// An answer in the middle of being drawn.
struct Answer {
    tokens: Tokens,
    model: Arc<BaseModel>,
    detokenizer: Detokenizer,
    block_end: BlockEnd,
    stops: StopFilter,
    context: Context,
    prompt_tokens: u64,
    /// Tokens drawn, the one that ends the turn not included.
    drawn: u64,
    ready: VecDeque<Event>,
    /// No more is drawn.
    over: bool,
}

impl Answer {
    /// Makes events of the next token, unless it lets itself be waited for.
    fn step(&mut self) -> anyhow::Result<()> {
        let Ok(token) = self.tokens.next_within(PATIENCE) else { return Ok(()) };
        let Some(token) = token.transpose()? else {
            let tail = self.detokenizer.finish(&self.model.tokenizer)?;
            let tail = self.block_end.push(tail) + &self.block_end.finish();
            let (text, stopped) = self.stops.push(&tail);
            self.delta(text);
            if !stopped {
                let held = self.stops.finish();
                self.delta(held);
            }
            let ended = self.tokens.finish() == Some(Finish::Stop);
            self.finish(if ended || stopped { FinishReason::Stop } else { FinishReason::Length }, u64::from(ended));
            return Ok(());
        };
        self.drawn += 1;
        let piece = self.block_end.push(self.detokenizer.push(token, &self.model.tokenizer)?);
        let (text, stopped) = self.stops.push(&piece);
        self.delta(text);
        if stopped {
            self.finish(FinishReason::Stop, 0);
        }
        Ok(())
    }

    fn delta(&mut self, text: String) {
        if !text.is_empty() {
            self.ready.push_back(Event::text(text));
        }
    }

    fn finish(&mut self, reason: FinishReason, end_tokens: u64) {
        let usage = Usage { prompt_tokens: Some(self.prompt_tokens), completion_tokens: Some(self.drawn + end_tokens) };
        self.ready.extend([Event::finish(reason), Event::Usage(usage)]);
        self.over = true;
    }
}

impl Iterator for Answer {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if let Err(gone) = self.context.check() {
                self.over = true;
                return Some(Err(gone));
            }
            if let Err(error) = self.step() {
                self.over = true;
                return Some(Err(HandlerError::internal(&error)));
            }
        }
    }
}
