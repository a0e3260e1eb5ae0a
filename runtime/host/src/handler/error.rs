//! Why a handler gave no answer, or only a part of one.
//!
//! An error has two texts. Whoever asked, such as a pupil, reads what happened and what to do. Whoever runs the handler reads all that is
//! known, with addresses, paths and a provider's own words: on a terminal, and in the log of a server.

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

    /// What whoever asked a handler reads of an error of this kind: what happened, and what to do.
    pub(super) fn told(&self, handler: &str) -> String {
        let runs = "whoever runs the server finds the cause in its log";
        match self {
            Self::InvalidRequest { .. } => format!("the provider of `{handler}` refused the request"),
            Self::ContextLength => {
                format!("the conversation is longer than `{handler}` can read; shorten it, or begin a new one")
            }
            Self::Authentication => format!("the provider of `{handler}` refused the server's key; {runs}"),
            Self::NotFound => format!("the provider of `{handler}` has no such model; {runs}"),
            Self::RateLimited { retry_after } => {
                format!("the provider of `{handler}` takes no more requests for now; try again {}", when(*retry_after))
            }
            Self::Overloaded { retry_after } => {
                format!("the provider of `{handler}` has too much to do; try again {}", when(Some(*retry_after)))
            }
            Self::Timeout => format!("`{handler}` took too long; try again, or ask for a shorter answer"),
            Self::Unavailable => format!("the handler `{handler}` got nothing from its provider; try again later"),
            Self::Cut => format!("the answer of `{handler}` broke off; try again"),
            Self::Protocol => format!("the provider of `{handler}` sent what is not understood; {runs}"),
            Self::Cancelled => "the answer was cancelled".to_owned(),
            Self::Internal => format!("`{handler}` failed; {runs}"),
        }
    }
}

fn when(retry_after: Option<Duration>) -> String {
    retry_after.map_or("later".to_owned(), |wait| format!("in {} s", wait.as_secs_f64().ceil().max(1.0)))
}

/// Why a handler gave no answer. Neither text holds a secret; both are in lower case and without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerError {
    /// Its kind.
    pub kind: Kind,
    /// What whoever asked reads. It names no address and no path.
    pub message: String,
    /// All that is known, for whoever runs the handler, where that is more than the message. It is what `Display` shows.
    pub detail: Option<String>,
    /// It was tried again already, by a retry or another handler: a client that asks again multiplies that.
    pub exhausted: bool,
}

impl HandlerError {
    /// Makes an error that everybody may read.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), detail: None, exhausted: false }
    }

    /// Makes the error of a handler, by its name, whose cause only whoever runs it can change. Others read what its kind means.
    pub fn of(handler: &str, kind: Kind, detail: impl Into<String>) -> Self {
        let message = kind.told(handler);
        Self::new(kind, message).with_detail(detail)
    }

    /// Returns the error with all that is known of it, for whoever runs the handler.
    #[must_use]
    pub fn with_detail(self, detail: impl Into<String>) -> Self {
        let detail = Some(detail.into()).filter(|detail| *detail != self.message);
        Self { detail, ..self }
    }

    /// Makes the error of a wrong field.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidRequest { param: Some(param.to_owned()) }, message)
    }

    /// Makes an error of one of the engine, which has no kinds and may name files.
    pub fn internal(error: &anyhow::Error) -> Self {
        let message = "the answer failed inside the server; whoever runs it finds the cause in its log";
        Self::new(Kind::Internal, message).with_detail(format!("{error:#}"))
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
        f.write_str(self.detail.as_ref().unwrap_or(&self.message))
    }
}

impl std::error::Error for HandlerError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asked_reads_what_happened_and_whoever_runs_it_reads_all() {
        let detail = "http://10.0.0.5:8000/v1: bad key (status 401)";
        let error = HandlerError::of("tutor", Kind::Authentication, detail);
        assert_eq!(
            error.message,
            "the provider of `tutor` refused the server's key; whoever runs the server finds the cause in its log"
        );
        assert_eq!(error.to_string(), detail);
        assert_eq!(error.exhausted().to_string(), detail);
        let limited = Kind::RateLimited { retry_after: Some(Duration::from_millis(2100)) };
        assert!(HandlerError::of("tutor", limited, "x").message.ends_with("try again in 3 s"));
        let everybody = HandlerError::invalid("n", "`n` should be 1").with_detail("`n` should be 1");
        assert_eq!((everybody.detail.as_deref(), everybody.to_string().as_str()), (None, "`n` should be 1"));
    }

    #[test]
    fn no_path_of_an_error_of_the_engine_is_told() {
        let error = anyhow::anyhow!("/home/anna/models/x: the weights are cut short");
        let error = HandlerError::internal(&error);
        assert!(!error.message.contains("anna") && error.to_string().contains("/home/anna/models/x"), "{error:?}");
    }
}
