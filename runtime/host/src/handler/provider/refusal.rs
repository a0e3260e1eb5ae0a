//! Why a provider gave no answer: its refusals, whose forms differ, and errors of the connection.

use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use ureq::Body;
use ureq::http::Response;

use super::endpoint::Endpoint;
use super::piece::choice;
use crate::handler::{HandlerError, Kind};

/// Longest body of a refusal that is read, in bytes.
const REFUSAL_LIMIT: u64 = 64 << 10;

/// A refusal, read.
pub(in crate::handler) struct Refusal {
    pub(in crate::handler) kind: Kind,
    /// The provider's words.
    pub(in crate::handler) words: String,
    /// What they leave out, and what to do, for whoever runs this machine.
    pub(in crate::handler) more: String,
    /// It is about `stream_options`, which some servers do not know.
    pub(in crate::handler) of_stream_options: bool,
}

impl Refusal {
    pub(in crate::handler) fn error(&self, endpoint: &Endpoint) -> HandlerError {
        endpoint.refused(self.kind.clone(), &self.words, &self.more)
    }
}

/// Reads a refusal.
pub(in crate::handler) fn refusal(endpoint: &Endpoint, response: Response<Body>) -> Refusal {
    let status = response.status().as_u16();
    let header = |name: &str| response.headers().get(name)?.to_str().ok().map(|value| value.trim().to_owned());
    let retry_after = header("retry-after-ms").and_then(|ms| seconds(&ms)).map(|wait| wait / 1000);
    let retry_after =
        retry_after.or_else(|| header("retry-after").and_then(|wait| seconds(&wait).or_else(|| until(&wait))));
    // An hour and more is as good as never.
    let retry_after = retry_after.map(|wait| wait.min(Duration::from_secs(3600)));
    let location = header("location").filter(|_| (300..400).contains(&status));
    let text = beginning(response.into_body());
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let refused = Refused::read(&body);
    let kind = refused.kind(Some(status), retry_after);
    let words = match (location, refused.message.as_deref().or_else(|| plain(&text))) {
        (Some(location), _) => {
            format!("it redirects to {location}, which is not followed; write that address as base_url")
        }
        (None, Some(words)) => words.to_owned(),
        (None, None) => SILENT.to_owned(),
    };
    let lacks_version = status == 404 && refused.message.is_none() && !endpoint.base_url.text.contains("/v1");
    let hint = if lacks_version { "; base_url may lack a /v1 at its end" } else { "" };
    let more = format!("{hint} (status {status})");
    Refusal { kind, words, more, of_stream_options: matches!(status, 400 | 422) && text.contains("stream_options") }
}

/// The beginning of a body, as far as it is read: one without end, or that breaks off, still says something.
fn beginning(body: Body) -> String {
    let mut bytes = Vec::new();
    // What was read until an error is what there is.
    let _ = body.into_with_config().limit(u64::MAX).reader().take(REFUSAL_LIMIT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

const SILENT: &str = "it gave no reason";

/// Reads a number of seconds, which may have a fraction. One beyond all clocks is a long time.
fn seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    (seconds >= 0.0).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// Returns the time until an HTTP date; zero if that is past.
fn until(date: &str) -> Option<Duration> {
    let date = httpdate::parse_http_date(date).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Returns the message of a refusal that is not JSON: the title of a page, or the first line of a text.
fn plain(text: &str) -> Option<&str> {
    let title = text.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>")).map(|(title, _)| title);
    let line = || text.lines().map(str::trim).find(|line| !line.is_empty());
    title.map(str::trim).or_else(line).filter(|words| !words.starts_with(['<', '{', '[']))
}

/// An error object of a provider.
pub(in crate::handler) struct Refused {
    message: Option<String>,
    /// All fields that name the kind of the error, in lower case.
    code: String,
    param: Option<String>,
}

impl Refused {
    /// Reads the body of a refusal, or a piece of a stream.
    pub(in crate::handler) fn read(body: &Value) -> Self {
        // Gemini sends a list of one.
        let body = body.get(0).unwrap_or(body);
        let error = [&body["error"], &body["errors"][0]].into_iter().find(|error| says(error)).unwrap_or(body);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        // FastAPI sends a list of problems, each with its place.
        let details = [&error["message"]["detail"], &body["detail"]];
        let detail = details.into_iter().find_map(|detail| detail.get(0));
        let place = detail.and_then(|detail| detail["loc"].as_array()?.last()).and_then(text);
        let message = text(error).or_else(|| text(&error["message"])).or_else(|| text(&body["detail"]));
        let message = message.or_else(|| {
            let message = text(&detail?["msg"])?;
            Some(place.as_ref().map_or(message.clone(), |place| format!("{place}: {message}")))
        });
        // OpenRouter's own message says only that there was one.
        let raw = text(&error["metadata"]["raw"]).filter(|raw| !raw.is_empty());
        let message = message.map(|message| raw.map_or(message.clone(), |raw| format!("{message}: {raw}")));
        let words = [&error["code"], &error["type"], &error["status"]];
        let code = words.map(|value| text(value).unwrap_or_else(|| value.to_string())).join(" ").to_lowercase();
        Self { message, code, param: text(&error["param"]).or(place) }
    }

    /// Returns the error that a piece of a stream is or contains.
    pub(in crate::handler) fn of_piece(piece: &Value) -> Option<Self> {
        let choice = choice(piece);
        if let Some(at) = [piece, piece.get(0).unwrap_or(piece), choice].into_iter().find(|at| says(&at["error"])) {
            return Some(Self::read(at));
        }
        let is_error = piece["object"] == "error" || piece["type"] == "error";
        let bare = is_error || piece["message"].is_string() || says(&piece["detail"]);
        (bare && piece.get("choices").is_none()).then(|| Self::read(piece))
    }

    /// Returns the error that a choice contains.
    pub(in crate::handler) fn of_choice(choice: &Value) -> Option<Self> {
        says(&choice["error"]).then(|| Self::read(choice))
    }

    pub(in crate::handler) fn words(&self) -> &str {
        self.message.as_deref().unwrap_or(SILENT)
    }

    pub(in crate::handler) fn kind(&self, status: Option<u16>, retry_after: Option<Duration>) -> Kind {
        let says = |word: &str| self.code.contains(word);
        let message = self.message.as_deref().unwrap_or_default().to_lowercase();
        // A piece of a stream has no status; some put it into the code.
        let status = status.or_else(|| self.code.split(' ').find_map(|word| word.parse().ok()));
        match status {
            _ if says("context_length") || says("exceed_context_size") => Kind::ContextLength,
            // Most servers have no code for it.
            Some(400 | 413 | 422) | None if TOO_LONG.iter().any(|words| message.contains(words)) => Kind::ContextLength,
            _ if says("model_not_found") => Kind::NotFound,
            // Gemini's key that is not valid, and Anthropic's account without money, have the status of a wrong request.
            Some(400) if says("api_key_invalid") || message.contains("api key not valid") => Kind::Authentication,
            Some(400) if message.contains("credit balance is too low") => Kind::RateLimited { retry_after },
            // 402: the account's money is spent.
            Some(402 | 429) => Kind::RateLimited { retry_after },
            Some(401 | 403) => Kind::Authentication,
            Some(404 | 405) => Kind::NotFound,
            Some(408 | 504) => Kind::Timeout,
            // The request is not to blame for these.
            Some(409 | 423 | 425 | 499) => Kind::Unavailable,
            Some(400..=499) => Kind::InvalidRequest { param: self.param.clone() },
            Some(500..=599) => match retry_after {
                Some(retry_after) => Kind::Overloaded { retry_after },
                None => Kind::Unavailable,
            },
            Some(_) => Kind::Protocol,
            None if says("rate_limit") || says("quota") || says("resource_exhausted") => {
                Kind::RateLimited { retry_after }
            }
            None if says("authentication") || says("api_key") || says("permission_error") => Kind::Authentication,
            None if says("not_found_error") => Kind::NotFound,
            None if says("timeout_error") => Kind::Timeout,
            None if says("invalid_request") || says("request_too_large") => {
                Kind::InvalidRequest { param: self.param.clone() }
            }
            None => Kind::Unavailable,
        }
    }
}

/// Words of messages about a conversation that does not fit.
const TOO_LONG: [&str; 5] =
    ["context length", "context window", "context size", "prompt is too long", "maximum number of tokens"];

/// Returns true if an `error` says anything: some servers send an empty one with every piece.
fn says(error: &Value) -> bool {
    match error {
        Value::Null | Value::Bool(_) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Number(code) => code.as_f64() != Some(0.0),
    }
}

const NOT_FOUND: &str = "the host was not found: its name is wrong, or there is no network";

/// Returns the kind of an error of the connection.
pub(in crate::handler) fn kind_of(error: &ureq::Error) -> Kind {
    match error {
        ureq::Error::Timeout(_) => Kind::Timeout,
        ureq::Error::Io(error) if is_timeout(error) => Kind::Timeout,
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => Kind::Protocol,
        ureq::Error::Http(_) | ureq::Error::BadUri(_) => Kind::Internal,
        _ => Kind::Unavailable,
    }
}

/// Returns its message.
pub(in crate::handler) fn words_of(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            "no connection within connect_timeout_s".to_owned()
        }
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::HostNotFound => NOT_FOUND.to_owned(),
        // What the system's resolver says has no kind of its own.
        ureq::Error::Io(error) if error.to_string().contains("failed to lookup address") => NOT_FOUND.to_owned(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "the connection was refused: no server listens there".to_owned()
        }
        other => other.to_string(),
    }
}

/// Returns true if a read took too long.
pub(in crate::handler) fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>());
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
        || matches!(inner, Some(ureq::Error::Timeout(_)))
}
