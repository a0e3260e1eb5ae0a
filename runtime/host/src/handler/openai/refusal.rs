//! Why a provider gave no answer: its refusals, which are alike and no two the same, and what went wrong on the way.

use std::io;
use std::time::Duration;

use serde_json::Value;
use ureq::Body;
use ureq::http::Response;

use super::endpoint::Endpoint;
use crate::handler::{HandlerError, Kind};

/// Longest body of a refusal that is read, in bytes.
const REFUSAL_LIMIT: u64 = 64 << 10;

/// What a refusal comes to.
pub(super) struct Refusal {
    pub(super) error: HandlerError,
    /// Whether it is about `stream_options`, which some servers do not know.
    pub(super) of_stream_options: bool,
}

/// Reads a refusal.
pub(super) fn refusal(endpoint: &Endpoint, response: Response<Body>) -> Refusal {
    let status = response.status().as_u16();
    let header = |name: &str| response.headers().get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let seconds = header("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| header("retry-after"));
    // An hour and more is as good as never, and what is not a duration is nothing.
    let retry_after = seconds.and_then(|s| Duration::try_from_secs_f64(s.min(3600.0)).ok());
    let text = response.into_body().into_with_config().limit(REFUSAL_LIMIT).read_to_string().unwrap_or_default();
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let refused = Refused::read(&body);
    let kind = refused.kind(Some(status), retry_after);
    let error = endpoint.error(kind, &format!("{} (status {status})", refused.words()));
    Refusal { error, of_stream_options: matches!(status, 400 | 422) && text.contains("stream_options") }
}

/// An error object of a provider. They are alike, and no two the same.
pub(super) struct Refused {
    message: Option<String>,
    code: String,
    param: Option<String>,
}

impl Refused {
    /// Reads the body of a refusal, or a frame of a stream.
    pub(super) fn read(body: &Value) -> Self {
        let error = body.get("error").unwrap_or(body);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let message = text(error).or_else(|| text(&error["message"])).or_else(|| text(&body["detail"]));
        // As FastAPI has it: a list of problems.
        let message = message.or_else(|| text(&body["detail"][0]["msg"]));
        let words = [&error["code"], &error["type"], &error["status"]];
        let code = words.map(|value| text(value).unwrap_or_else(|| value.to_string())).join(" ");
        Self { message, code, param: text(&error["param"]) }
    }

    pub(super) fn words(&self) -> &str {
        self.message.as_deref().unwrap_or("it refused and did not say why")
    }

    pub(super) fn kind(&self, status: Option<u16>, retry_after: Option<Duration>) -> Kind {
        let says = |word: &str| self.code.contains(word);
        // A frame within a stream has no status; some put it into the code.
        let status = status.or_else(|| self.code.split(' ').find_map(|word| word.parse().ok()));
        match status {
            _ if says("context_length") || says("exceed_context_size") => Kind::ContextLength,
            _ if says("model_not_found") => Kind::NotFound,
            Some(429) => Kind::RateLimited { retry_after },
            Some(401 | 403) => Kind::Authentication,
            Some(404 | 405) => Kind::NotFound,
            Some(408 | 504) => Kind::Timeout,
            Some(400..=499) => Kind::InvalidRequest { param: self.param.clone() },
            Some(500..=599) => Kind::Unavailable,
            Some(_) => Kind::Protocol,
            None if says("rate_limit") => Kind::RateLimited { retry_after },
            None if says("invalid_request") => Kind::InvalidRequest { param: self.param.clone() },
            None => Kind::Unavailable,
        }
    }
}

/// The kind of what went wrong on the way.
pub(super) fn kind_of(error: &ureq::Error) -> Kind {
    match error {
        ureq::Error::Timeout(_) => Kind::Timeout,
        ureq::Error::Io(error) if is_timeout(error) => Kind::Timeout,
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => Kind::Protocol,
        ureq::Error::Http(_) | ureq::Error::BadUri(_) => Kind::Internal,
        _ => Kind::Unavailable,
    }
}

/// The same in words.
pub(super) fn words_of(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => "no connection in time".to_owned(),
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::HostNotFound => "there is no such host, or no network".to_owned(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "the connection was refused: nothing listens there".to_owned()
        }
        other => other.to_string(),
    }
}

/// Whether a read took too long.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
        || matches!(inner, Some(ureq::Error::Timeout(_)))
}
