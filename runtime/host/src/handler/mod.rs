//! Handlers: what answers a conversation or embeds texts, on this machine or elsewhere.
//!
//! A handler returns a stream of [`Event`]s. The stream is pulled: no token is computed before it is asked for, and dropping the
//! stream ends the work within a token. [`local`] runs a model of this machine, [`embedding`] one that embeds texts, [`openai`] asks an endpoint that speaks
//! OpenAI's API, [`replay`] gives recorded answers, a [`route`] tries several handlers in order. What is done on the way to any of them, from
//! time limits to redaction, is a handler around it: see [`wrap`]. A file lists them, see [`config`].

pub mod anthropic;
mod checker;
pub mod config;
mod context;
pub mod embedding;
mod error;
mod event;
mod fields;
pub mod limit;
pub mod local;
pub mod openai;
mod provider;
pub mod replay;
mod request;
pub mod route;
mod secret;
mod sse;
mod stop;
pub mod tally;
mod turns;
pub mod wrap;

use std::sync::Arc;

use homeroom_engine::inference::Engine;

use crate::random::{self, number as random};

pub use checker::checked;
pub use context::{Context, PATIENCE};
pub use embedding::{EmbedRequest, Embeddings, Gives, Input};
pub use error::{HandlerError, Kind};
pub use event::{Choice, Completion, Event, EventStream, FinishReason, Start, TokenLogprob, Usage, collect};
pub use fields::{Backend, Field, supports};
pub use request::{
    CHOICES_MAX, Message, Part, Prompt, Request, ResponseFormat, Role, TOP_LOGPROBS_MAX, Tool, ToolCall, ToolChoice,
};
pub use secret::Secret;

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

/// A new id for an answer.
pub(crate) fn new_id() -> String {
    format!("chatcmpl-{}", random::id())
}
