//! The engine: a base that answers requests, each with an adapter of its own or none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::adapters::Adapter;
use super::constraint::Constraint;
use super::generate::{Finish, Sampling};
use super::likely::Likely;
use super::sampler::Sampler;
use super::sequence::{Event, Request};
use super::{Inference, scheduler};
use crate::models::BaseModel;
use crate::run::compute::Compute;

/// What is asked of an engine behind a prompt.
#[derive(Default)]
pub struct Ask {
    /// How the answer is drawn.
    pub sampling: Sampling,
    /// Added to the logits of tokens, by their ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens come with their log-probabilities, and with those of so many likeliest ones in their places.
    pub logprobs: Option<usize>,
    /// What the answer is held to.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The prompt is asked again: what was read of it is kept for others from its first token on.
    pub shared: bool,
    /// Nobody waits for the answer: it is computed while no other is.
    pub background: bool,
}

impl From<Sampling> for Ask {
    fn from(sampling: Sampling) -> Self {
        Self { sampling, ..Self::default() }
    }
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// How likely it was, if that was asked for.
    pub likely: Option<Likely>,
}

/// A base that answers. What is asked of it at once is answered together, with whichever adapters.
pub struct Engine {
    inference: Arc<Inference>,
    /// To the scheduler's thread, once there is one.
    requests: Mutex<Option<Sender<Request>>>,
}

impl Engine {
    /// Makes a base ready to answer, see [`Inference::new`].
    pub fn new(model: Arc<BaseModel>, compute: Compute) -> Self {
        Self { inference: Arc::new(Inference::new(model, compute)), requests: Mutex::new(None) }
    }

    /// The base's passes.
    pub fn inference(&self) -> &Inference {
        &self.inference
    }

    /// The base.
    pub fn model(&self) -> &Arc<BaseModel> {
        &self.inference.model
    }

    /// Begins to answer a prompt. What ends the answer is what ends a turn in the adapter's tokenizer.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the model's context, the sampling is not of numbers in range, or the adapter was made
    /// ready on another base.
    pub fn ask(&self, adapter: Option<&Arc<Adapter>>, prompt: &[u32], ask: impl Into<Ask>) -> Result<Tokens> {
        let Ask { sampling, logit_bias, logprobs, constraint, shared, background } = ask.into();
        let max_tokens = sampling.max_tokens;
        let sampler = Sampler::new(sampling, prompt)?.with_bias(logit_bias)?;
        let context = self.model().architecture.max_position_embeddings;
        ensure!(!prompt.is_empty(), "the prompt is empty");
        ensure!(prompt.len() <= context, "the prompt is {} tokens, the model's context {context}", prompt.len());
        self.inference.check_adapter(adapter.map(Arc::as_ref))?;
        let (events, heard) = channel();
        let dropped = Arc::new(AtomicBool::new(false));
        let finish = (max_tokens == 0).then_some(Finish::Length);
        if finish.is_none() {
            let (adapter, prompt) = (adapter.cloned(), prompt.to_vec());
            let dropped = dropped.clone();
            let mut request = Request {
                adapter,
                prompt,
                sampler,
                constraint,
                logprobs,
                shared,
                background,
                max_tokens,
                events,
                dropped,
            };
            let mut thread = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            // A thread that ended by a panic is followed by another.
            for _ in 0..2 {
                let sender = thread.get_or_insert_with(|| scheduler::start(self.inference.clone()));
                match sender.send(request) {
                    Ok(()) => break,
                    Err(back) => (request, *thread) = (back.0, None),
                }
            }
        }
        Ok(Tokens { heard, dropped, finish })
    }
}

/// Tokens of an answer as they are drawn, without the one that ends the turn. Dropping it ends the work.
pub struct Tokens {
    heard: Receiver<Event>,
    dropped: Arc<AtomicBool>,
    finish: Option<Finish>,
}

impl Tokens {
    /// Why the answer ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The next token, `None` after the last; `Err` when it took longer than `patience`.
    ///
    /// # Errors
    /// The inner one when the model failed.
    pub fn next_within(&mut self, patience: Duration) -> Result<Option<Result<u32>>, RecvTimeoutError> {
        Ok(self.drawn_within(patience)?.map(|drawn| drawn.map(|drawn| drawn.id)))
    }

    /// As [`Tokens::next_within`], with what else is known of the token.
    ///
    /// # Errors
    /// The inner one when the model failed.
    pub fn drawn_within(&mut self, patience: Duration) -> Result<Option<Result<Drawn>>, RecvTimeoutError> {
        if self.finish.is_some() {
            return Ok(None);
        }
        Ok(match self.heard.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => return Err(RecvTimeoutError::Timeout),
            Ok(Event::Token(drawn)) => Some(Ok(drawn)),
            Ok(Event::End(finish)) => {
                self.finish = Some(finish);
                None
            }
            Ok(Event::Failed(error)) => {
                self.finish = Some(Finish::Length);
                Some(Err(error))
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.finish = Some(Finish::Length);
                Some(Err(anyhow!("the thread that draws answers stopped")))
            }
        })
    }
}

impl Iterator for Tokens {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Ok(next) = self.next_within(Duration::from_secs(60)) {
                return next;
            }
        }
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
    }
}
