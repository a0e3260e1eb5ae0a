//! Why a handler gave no answer, or only a part of one.

use std::time::Duration;

/// What went wrong, for callers that decide by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request cannot be answered as it is.
    InvalidRequest {
        /// The field to blame, as OpenAI's API names it.
        param: Option<String>,
    },
    /// The conversation is longer than the model's context.
    ContextLength,
    /// The provider does not accept our key.
    Authentication,
    /// The provider has no such model or address.
    NotFound,
    /// The provider wants fewer requests.
    RateLimited {
        /// When to come back, if it said so.
        retry_after: Option<Duration>,
    },
    /// More requests wait here than are let in.
    Overloaded {
        /// When to come back, from how long answers have taken.
        retry_after: Duration,
    },
    /// No answer in time.
    Timeout,
    /// The handler cannot be reached, is not ready, or failed for a reason that may pass.
    Unavailable,
    /// The answer broke off: what came is not all.
    Cut,
    /// The provider answered with something that is not the API.
    Protocol,
    /// Nobody waits for the answer any more.
    Cancelled,
    /// A fault of ours.
    Internal,
}

/// Why a handler gave no answer. The words hold no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerError {
    /// For callers that decide.
    pub kind: Kind,
    /// For people: lower case, no full stop.
    pub message: String,
}

impl HandlerError {
    /// An error.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A field of the request is wrong.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidRequest { param: Some(param.to_owned()) }, message)
    }

    /// An error of the engine, which has no kinds of its own.
    pub fn internal(error: &anyhow::Error) -> Self {
        Self::new(Kind::Internal, format!("{error:#}"))
    }

    /// Whether another handler may be asked instead: the request is fine and this handler is not. To be asked before anybody has
    /// seen a word of its answer.
    pub fn lets_another_try(&self) -> bool {
        match self.kind {
            Kind::Unavailable
            | Kind::Overloaded { .. }
            | Kind::Timeout
            | Kind::RateLimited { .. }
            | Kind::Cut
            | Kind::Protocol => true,
            Kind::InvalidRequest { .. }
            | Kind::ContextLength
            | Kind::Authentication
            | Kind::NotFound
            | Kind::Cancelled
            | Kind::Internal => false,
        }
    }
}

impl std::fmt::Display for HandlerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for HandlerError {}
