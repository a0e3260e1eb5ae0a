//! Answers and errors in the shapes of OpenAI's API.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::handler::{Completion, Event, FinishReason, HandlerError, Kind, Usage};
use crate::terminal::shown;

/// The header with the name of the handler that gave the answer.
pub const HANDLER: &str = "x-homeroom-handler";

/// What all pieces of an answer have in common.
pub struct Envelope {
    /// The answer's id.
    pub id: String,
    /// The time of the request, in seconds since 1970.
    pub created: u64,
    /// The model's name, as the client gave it.
    pub model: String,
    /// The stream ends with a piece for the usage.
    pub include_usage: bool,
    /// The first piece names the handler, since the headers were sent before it was known.
    pub name_handler: bool,
}

impl Envelope {
    /// Returns the body of a whole answer.
    pub fn completion(&self, whole: &Completion) -> Value {
        let mut choice = json!({
            "index": 0,
            "message": {"role": "assistant", "content": whole.text, "refusal": null},
            "logprobs": null,
        });
        end(&mut choice, &whole.finish);
        json!({
            "id": whole.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            // Moodle reads it without checking that it is there.
            "system_fingerprint": null,
            "choices": [choice],
            "usage": usage(whole.usage),
        })
    }

    /// Returns the frames of a stream for an event.
    pub fn frames(&mut self, event: Event) -> String {
        match event {
            Event::Start { id, handler, .. } => {
                self.id = id;
                let mut first = self.chunk(json!({"role": "assistant", "content": ""}), None);
                if self.name_handler {
                    first[HANDLER] = json!(handler);
                }
                frame(&first)
            }
            Event::Delta { text } => frame(&self.chunk(json!({"content": text}), None)),
            Event::Finish { reason } => frame(&self.chunk(json!({}), Some(&reason))),
            Event::Usage(cost) => {
                let mut frames = String::new();
                if self.include_usage {
                    let mut chunk = self.empty_chunk();
                    chunk["usage"] = usage(cost);
                    frames = frame(&chunk);
                }
                frames + "data: [DONE]\n\n"
            }
        }
    }

    fn chunk(&self, delta: Value, finish: Option<&FinishReason>) -> Value {
        let mut choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
        if let Some(reason) = finish {
            end(&mut choice, reason);
        }
        let mut chunk = self.empty_chunk();
        chunk["choices"] = json!([choice]);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn empty_chunk(&self) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [],
        })
    }
}

/// Sets why an answer ended. Typed clients fail at a reason that OpenAI does not have: such a one goes into a field of its own, as
/// OpenRouter names it.
fn end(choice: &mut Value, reason: &FinishReason) {
    if let FinishReason::Other(word) = reason {
        choice["native_finish_reason"] = json!(word);
    }
    choice["finish_reason"] = json!(match reason {
        FinishReason::Other(_) => FinishReason::Stop.word(),
        known => known.word(),
    });
}

/// What keeps a silent stream open: a comment, which says how many requests are before this one in the queue. No empty line follows it,
/// since older versions of OpenAI's Go client take that for an event without data and fail. axum's `Sse` always sends one after its
/// `KeepAlive`, which is why streams are framed here.
pub fn ping(before: usize) -> String {
    match before {
        0 => ": ping\n".to_owned(),
        1 => ": ping, 1 request is before this one\n".to_owned(),
        many => format!(": ping, {many} requests are before this one\n"),
    }
}

/// One event of a stream. JSON has no line breaks, so it is one line.
pub fn frame(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// Returns the usage. Clients expect numbers, so that it is null where a provider gave none.
fn usage(Usage { prompt_tokens, completion_tokens }: Usage) -> Value {
    match (prompt_tokens, completion_tokens) {
        (Some(prompt), Some(completion)) => {
            json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt.saturating_add(completion)})
        }
        _ => Value::Null,
    }
}

/// An error as it is sent to clients.
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// The message for people.
    pub message: String,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// The wrong field.
    pub param: Option<String>,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// Whether to try again; `None`: clients decide by the status.
    pub retry: Option<bool>,
    /// How to send a key.
    pub challenge: Option<&'static str>,
}

impl Refusal {
    /// Makes the error of a wrong request.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = "invalid_request_error";
        let (message, challenge) = (message.into(), None);
        Self { status, message, kind, param: None, code: None, retry_after: None, retry: None, challenge }
    }

    /// Returns the message as it may be shown.
    pub fn shown(&self) -> String {
        shown(&self.message).into_owned()
    }

    /// Returns the response, with a body in the shape of some API.
    pub fn respond(&self, body: &Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            headers.insert("retry-after", HeaderValue::from(wait.as_secs_f64().ceil().max(1.0) as u64));
        }
        if let Some(retry) = self.retry {
            headers.insert("x-should-retry", HeaderValue::from_static(if retry { "true" } else { "false" }));
        }
        if let Some(challenge) = self.challenge {
            headers.insert("www-authenticate", HeaderValue::from_static(challenge));
        }
        response
    }

    /// Returns the body. It quotes what a client sent, without control characters that would act on a terminal.
    pub fn body(&self) -> Value {
        let (message, param) = (shown(&self.message), self.param.as_deref().map(shown));
        json!({"error": {"message": message, "type": self.kind, "param": param, "code": self.code}})
    }
}

impl From<HandlerError> for Refusal {
    fn from(error: HandlerError) -> Self {
        let refusal = Self::new(StatusCode::BAD_GATEWAY, error.message);
        // When a provider refuses our key or model, the fault is in the file of handlers and not in the request.
        let upstream =
            |refusal: Self, code| Self { kind: "api_error", code: Some(code), retry: Some(false), ..refusal };
        match error.kind {
            Kind::InvalidRequest { param } => Self { status: StatusCode::BAD_REQUEST, param, ..refusal },
            Kind::ContextLength => Self {
                status: StatusCode::BAD_REQUEST,
                param: Some("messages".to_owned()),
                code: Some("context_length_exceeded"),
                ..refusal
            },
            Kind::Authentication => upstream(refusal, "upstream_authentication"),
            Kind::NotFound => upstream(refusal, "upstream_not_found"),
            Kind::Protocol => upstream(refusal, "upstream_protocol"),
            Kind::Cut => upstream(refusal, "upstream_cut"),
            Kind::RateLimited { retry_after } => Self {
                status: StatusCode::TOO_MANY_REQUESTS,
                kind: "rate_limit_error",
                code: Some("rate_limit_exceeded"),
                retry_after,
                ..refusal
            },
            Kind::Overloaded { retry_after } => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                kind: "api_error",
                code: Some("overloaded"),
                retry_after: Some(retry_after),
                ..refusal
            },
            Kind::Timeout => {
                Self { status: StatusCode::GATEWAY_TIMEOUT, kind: "api_error", code: Some("timeout"), ..refusal }
            }
            Kind::Unavailable => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                kind: "api_error",
                code: Some("unavailable"),
                ..refusal
            },
            Kind::Cancelled => {
                Self { status: StatusCode::SERVICE_UNAVAILABLE, kind: "api_error", code: Some("cancelled"), ..refusal }
            }
            Kind::Internal => Self { status: StatusCode::INTERNAL_SERVER_ERROR, kind: "api_error", ..refusal },
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.respond(&self.body())
    }
}
