//! Handlers: what answers a conversation, near or far.
//!
//! Every handler is a stream of [`Event`]s that is pulled: nothing is computed that nobody asks for, and dropping the
//! stream ends the work within a token. [`local`] runs a model of this machine, [`openai`] asks an endpoint that speaks
//! OpenAI's API, a [`route`] tries several in order. Which there are stands in a file, see [`config`].

mod checker;
pub mod config;
mod context;
mod error;
pub mod limit;
pub mod local;
pub mod openai;
pub mod route;
mod secret;
mod sse;
mod stop;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use serde::{Deserialize, Serialize};

pub use checker::checked;
pub use context::{Context, PATIENCE};
pub use error::{HandlerError, Kind};
pub use secret::Secret;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set the conversation up.
    System,
    /// The same, in the word of newer models. A model here that does not know it hears the system, and so does every endpoint.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// A message, in OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// What is asked. One answer is given. What is `None` was not said, and is the handler's to choose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The conversation.
    pub messages: Vec<Message>,
    /// Longest answer, in tokens; at least 1.
    pub max_tokens: Option<usize>,
    /// 0: always the likeliest token; up to 2.
    pub temperature: Option<f64>,
    /// Draw from so many of the likeliest tokens; 0: from all.
    pub top_k: Option<usize>,
    /// Draw from the likeliest tokens that together have this probability: 0 to 1.
    pub top_p: Option<f64>,
    /// Draw from tokens at least this share as likely as the likeliest: 0 to 1.
    pub min_p: Option<f64>,
    /// Divides what speaks for a token that stands in the conversation: above 0; 1: nothing.
    pub repetition_penalty: Option<f64>,
    /// What a token's logit loses for each time it was drawn: -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// What the logit of a token that was drawn loses once: -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Seed of the draw: equal requests with it have equal answers, where the handler can.
    pub seed: Option<i64>,
    /// Texts that end the answer, and are not part of it.
    pub stop: Vec<String>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or said a stop text.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
    /// The provider withheld the rest.
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

/// What an answer cost; `None` where the provider did not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the conversation as the model saw it.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer, the one that ends the turn included.
    pub completion_tokens: Option<u64>,
}

/// A piece of an answer. One `Start`, any number of `Delta`, one `Finish`, one `Usage`, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The answer begins.
    Start {
        /// Its id, the provider's own if it gave one.
        id: String,
        /// The model that answers, in the provider's words.
        model: String,
        /// The handler that answers, by our name for it.
        handler: String,
    },
    /// More text.
    Delta {
        /// Whole characters, at least one.
        text: String,
    },
    /// The text is whole.
    Finish {
        /// Why.
        reason: FinishReason,
    },
    /// The last event.
    Usage(Usage),
}

/// Events as they happen. An error is the last item.
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
    /// What it cost.
    pub usage: Usage,
}

/// Answers requests.
pub trait Handler: Send + Sync {
    /// Begins an answer.
    ///
    /// # Errors
    /// When the request can be refused before any work is done. What goes wrong later is an item of the stream.
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError>;

    /// The whole answer.
    ///
    /// # Errors
    /// As [`Handler::stream`], and when the stream fails or ends too early, or nobody waits for it any more.
    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        collect(context.watch(self.stream(request, context)?))
    }
}

/// Puts the events of a stream together.
///
/// # Errors
/// When the stream fails or ends too early.
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

/// A number that nobody can guess well; not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A new id for an answer.
fn new_id() -> String {
    format!("chatcmpl-{:016x}{:016x}", random(), random())
}
