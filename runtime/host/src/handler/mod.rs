//! Handlers: what answers a conversation or embeds texts, on this machine or elsewhere.
//!
//! A handler returns a stream of [`Event`]s. The stream is pulled: no token is computed before it is asked for, and dropping the
//! stream ends the work within a token. [`local`] runs a model of this machine, [`embedding`] one that embeds texts, [`openai`] asks an endpoint that speaks
//! OpenAI's API, [`replay`] gives recorded answers, a [`route`] tries several handlers in order. What is done on the way to any of them, from
//! time limits to redaction, is a handler around it: see [`wrap`]. A file lists them, see [`config`].

mod checker;
pub mod config;
mod context;
pub mod embedding;
mod error;
pub mod limit;
pub mod local;
pub mod openai;
pub mod replay;
pub mod route;
mod secret;
mod sse;
mod stop;
pub mod tally;
mod turns;
pub mod wrap;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use homeroom_engine::inference::Engine;
use serde::{Deserialize, Serialize};

pub use checker::checked;
pub use context::{Context, PATIENCE};
pub use embedding::{EmbedRequest, Embeddings, Gives, Input};
pub use error::{HandlerError, Kind};
pub use secret::Secret;

/// The author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set up the conversation.
    System,
    /// The same, in the word of newer models. A model here that does not know it hears the system, and so does every endpoint.
    Developer,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
}

/// A message, in OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Its text.
    pub content: String,
    /// The parts of its text, where it came in several: a chat template may read them. `content` is all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), parts: Vec::new() }
    }
}

/// A request for one answer. A field that is `None` was not given, and the handler chooses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The conversation.
    pub messages: Vec<Message>,
    /// Longest answer, in tokens; at least 1.
    pub max_tokens: Option<usize>,
    /// Temperature of sampling, 0 to 2; 0 always takes the likeliest token.
    pub temperature: Option<f64>,
    /// Sample from this many of the likeliest tokens; 0 means all.
    pub top_k: Option<usize>,
    /// Sample from the likeliest tokens that together have this probability, 0 to 1.
    pub top_p: Option<f64>,
    /// Sample from tokens that have at least this share of the likeliest token's probability, 0 to 1.
    pub min_p: Option<f64>,
    /// Penalty of tokens that are in the conversation already: above 0; 1 changes nothing.
    pub repetition_penalty: Option<f64>,
    /// Subtracted from a token's logit for each time it was sampled, -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// Subtracted once from the logit of a token that was sampled, -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Seed of sampling: equal requests with equal seeds get equal answers, as far as the handler supports it.
    pub seed: Option<i64>,
    /// Texts that end the answer. They are not part of it.
    pub stop: Vec<String>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or wrote a stop text.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
    /// The provider's filter withheld the rest.
    ContentFilter,
    /// Another reason, in the provider's word.
    Other(String),
}

impl FinishReason {
    /// The word of OpenAI's API.
    pub fn word(&self) -> &str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ContentFilter => "content_filter",
            Self::Other(word) => word,
        }
    }
}

/// Counts of tokens; `None` where the provider did not give one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the conversation as the model saw it.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer, including the one that ends the turn.
    pub completion_tokens: Option<u64>,
}

/// A piece of an answer. The order is one `Start`, any number of `Delta`, one `Finish`, one `Usage`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The answer begins.
    Start {
        /// Its id: the provider's, or one of ours.
        id: String,
        /// The model that answers, by the provider's name for it.
        model: String,
        /// The handler that answers, by our name for it.
        handler: String,
    },
    /// More text.
    Delta {
        /// Whole characters, at least one.
        text: String,
    },
    /// The text is complete.
    Finish {
        /// Why it ended.
        reason: FinishReason,
    },
    /// The last event.
    Usage(Usage),
}

/// Events as they happen. Nothing follows an error.
pub type EventStream = Box<dyn Iterator<Item = Result<Event, HandlerError>> + Send>;

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its id.
    pub id: String,
    /// The model that answered.
    pub model: String,
    /// The handler that answered, by our name for it.
    pub handler: String,
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Its tokens.
    pub usage: Usage,
}

/// What answers requests.
pub trait Handler: Send + Sync {
    /// Begins an answer.
    ///
    /// # Errors
    /// When the request is refused before any work is done. A later error is an item of the stream.
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError>;

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// As [`Handler::stream`], and when the stream fails, ends early or is cancelled.
    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        collect(context.watch(self.stream(request, context)?))
    }

    /// Returns the engine that answers, if that is one of this machine; others on the same base share it.
    fn engine(&self) -> Option<Arc<Engine>> {
        None
    }

    /// Returns what it gives, as far as that is known before it is asked.
    fn gives(&self) -> Gives {
        Gives::Answers
    }

    /// Makes the vectors of texts.
    ///
    /// # Errors
    /// When it makes none, the request is refused, or the work fails or is cancelled.
    fn embed(&self, _request: &EmbedRequest, _context: &Context) -> Result<Embeddings, HandlerError> {
        Err(HandlerError::invalid("model", "this handler answers conversations and does not embed texts"))
    }
}

/// Collects the events of a stream into an answer.
///
/// # Errors
/// When the stream fails or ends early.
pub fn collect(stream: EventStream) -> Result<Completion, HandlerError> {
    let (id, model, handler, text) = Default::default();
    let mut whole = Completion { id, model, handler, text, finish: FinishReason::Stop, usage: Usage::default() };
    for event in checked(stream) {
        match event? {
            Event::Start { id, model, handler } => (whole.id, whole.model, whole.handler) = (id, model, handler),
            Event::Delta { text } => whole.text.push_str(&text),
            Event::Finish { reason } => whole.finish = reason,
            Event::Usage(usage) => whole.usage = usage,
        }
    }
    Ok(whole)
}

/// A random number; not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A new id for an answer.
fn new_id() -> String {
    format!("chatcmpl-{:016x}{:016x}", random(), random())
}
