//! Why a handler gave no answer, or only a part of one.

use std::time::Duration;

/// The kind of an error, for callers that decide by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong.
    InvalidRequest {
        /// The wrong field, by OpenAI's name for it.
        param: Option<String>,
    },
    /// The conversation is longer than the model's context.
    ContextLength,
    /// The provider does not accept our key.
    Authentication,
    /// The provider has no such model or address.
    NotFound,
    /// The provider's limit of requests or of money is reached.
    RateLimited {
        /// When to try again, if the provider said so.
        retry_after: Option<Duration>,
    },
    /// More requests wait than the queue takes.
    Overloaded {
        /// When to try again: as the provider says, or estimated from how long answers have taken.
        retry_after: Duration,
    },
    /// The answer did not come in time.
    Timeout,
    /// The handler cannot be reached, is not ready, or failed for a reason that may pass.
    Unavailable,
    /// The answer broke off: a part of it is missing.
    Cut,
    /// The provider answered with something other than the API.
    Protocol,
    /// Nobody waits for the answer any longer.
    Cancelled,
    /// A fault of this program.
    Internal,
}

impl Kind {
    /// Its name in files of handlers and in logs.
    pub fn word(&self) -> &'static str {
        match self {
            Self::InvalidRequest { .. } => "invalid_request",
            Self::ContextLength => "context_length",
            Self::Authentication => "authentication",
            Self::NotFound => "not_found",
            Self::RateLimited { .. } => "rate_limited",
            Self::Overloaded { .. } => "overloaded",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Cut => "cut",
            Self::Protocol => "protocol",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }
}

/// Why a handler gave no answer. The message holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerError {
    /// Its kind.
    pub kind: Kind,
    /// The message for people: lower case, no full stop.
    pub message: String,
    /// It was tried again already, by a retry or another handler: a client that asks again multiplies that.
    pub exhausted: bool,
}

impl HandlerError {
    /// Makes an error.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), exhausted: false }
    }

    /// Makes the error of a wrong field.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidRequest { param: Some(param.to_owned()) }, message)
    }

    /// Makes an error of one of the engine, which has no kinds.
    pub fn internal(error: &anyhow::Error) -> Self {
        Self::new(Kind::Internal, format!("{error:#}"))
    }

    /// Returns the error of what was tried again already. One that says when to come back is left as it is: whoever obeys that is welcome.
    #[must_use]
    pub fn exhausted(self) -> Self {
        let says_when = matches!(self.kind, Kind::Overloaded { .. } | Kind::RateLimited { retry_after: Some(_) });
        Self { exhausted: !says_when, ..self }
    }

    /// Returns true if another handler may be asked instead: the request is fine, and this handler is not. Valid only before any of the
    /// answer was shown.
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
