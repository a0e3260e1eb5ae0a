//! Answers and errors in the shapes of OpenAI's API.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::handler::{Choice, Completion, Event, FinishReason, HandlerError, Kind, TokenLogprob, ToolCall, Usage};
use crate::progress::line;
use crate::terminal::shown;

/// The header with the name of the handler that gave the answer.
pub const HANDLER: &str = "x-homeroom-handler";

/// The header with the id of the answer, which `POST /v1/feedback` takes as `response_id`.
pub const RESPONSE_ID: &str = "x-homeroom-response-id";

/// The header, or the field of a stream's first piece, with the names of fields that were ignored.
pub const IGNORED: &str = "x-ignored-params";

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
    /// The first piece names the handler and what it left out, since the headers were sent before they were known.
    pub name_handler: bool,
    /// What the answer depends on besides the request.
    pub fingerprint: Option<String>,
    /// The choices that have begun, by their numbers.
    pub begun: Vec<bool>,
}

impl Envelope {
    /// Makes the envelope of an answer.
    pub fn new(created: u64, model: String, include_usage: bool) -> Self {
        let (id, fingerprint, begun) = (String::new(), None, Vec::new());
        Self { id, created, model, include_usage, name_handler: false, fingerprint, begun }
    }

    /// Returns the body of a whole answer.
    pub fn completion(&self, whole: &Completion) -> Value {
        let choices: Vec<Value> =
            whole.choices.iter().enumerate().map(|(index, choice)| of_choice(index, choice)).collect();
        json!({
            "id": whole.start.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            // Moodle reads it without checking that it is there.
            "system_fingerprint": whole.start.fingerprint,
            "choices": choices,
            "usage": usage(whole.usage),
        })
    }

    /// Returns the frames of a stream for an event.
    pub fn frames(&mut self, event: Event) -> String {
        match event {
            Event::Start(start) => {
                (self.id, self.fingerprint) = (start.id, start.fingerprint);
                let mut first = self.first(0);
                if self.name_handler {
                    first[HANDLER] = json!(start.handler);
                    if !start.ignored.is_empty() {
                        first[IGNORED] = json!(start.ignored.join(","));
                    }
                }
                frame(&first)
            }
            Event::Delta { choice, text, logprobs } => {
                let mut chunk = self.chunk(choice, &json!({"content": text}), None);
                if !logprobs.is_empty() {
                    chunk["choices"][0]["logprobs"] = logprobs_of(&logprobs);
                }
                self.behind_first(choice, &chunk)
            }
            Event::Reasoning { choice, text } => {
                let chunk = self.chunk(choice, &json!({"reasoning_content": text}), None);
                self.behind_first(choice, &chunk)
            }
            Event::ToolCall { choice, index, id, name, arguments } => {
                let mut call = json!({"index": index, "function": {"arguments": arguments}});
                if let (Some(id), Some(name)) = (id, name) {
                    let function = json!({"name": name, "arguments": arguments});
                    call = json!({"index": index, "id": id, "type": "function", "function": function});
                }
                let chunk = self.chunk(choice, &json!({"tool_calls": [call]}), None);
                self.behind_first(choice, &chunk)
            }
            Event::Finish { choice, reason } => {
                let chunk = self.chunk(choice, &json!({}), Some(&reason));
                self.behind_first(choice, &chunk)
            }
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

    /// The piece that a choice begins with.
    fn first(&mut self, choice: usize) -> Value {
        if self.begun.len() <= choice {
            self.begun.resize(choice + 1, false);
        }
        self.begun[choice] = true;
        self.chunk(choice, &json!({"role": "assistant", "content": ""}), None)
    }

    /// The frame of a piece, behind the piece that its choice begins with.
    fn behind_first(&mut self, choice: usize, chunk: &Value) -> String {
        let mut frames = String::new();
        if !self.begun.get(choice).copied().unwrap_or(false) {
            frames = frame(&self.first(choice));
        }
        frames + &frame(chunk)
    }

    fn chunk(&self, choice: usize, delta: &Value, finish: Option<&FinishReason>) -> Value {
        let mut choice = json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": null});
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
            "system_fingerprint": self.fingerprint,
            "choices": [],
        })
    }
}

/// Returns a choice of a whole answer.
fn of_choice(index: usize, choice: &Choice) -> Value {
    let Choice { text, reasoning, tool_calls, logprobs, finish } = choice;
    let mut message = json!({"role": "assistant", "content": text, "refusal": null});
    if !tool_calls.is_empty() {
        message["tool_calls"] = tool_calls.iter().map(ToolCall::json).collect();
        if text.is_empty() {
            message["content"] = Value::Null;
        }
    }
    if !reasoning.is_empty() {
        message["reasoning_content"] = json!(reasoning);
    }
    let logprobs = if logprobs.is_empty() { Value::Null } else { logprobs_of(logprobs) };
    let mut choice = json!({"index": index, "message": message, "logprobs": logprobs});
    end(&mut choice, finish);
    choice
}

/// The logarithm of a probability that is 0, as OpenAI writes it: JSON has no infinity.
pub(super) const NEVER: f64 = -9999.0;

/// Returns the log-probabilities of tokens in the shape of chat completions.
fn logprobs_of(tokens: &[TokenLogprob]) -> Value {
    let one =
        |token: &TokenLogprob| json!({"token": token.token, "logprob": token.logprob.max(NEVER), "bytes": token.bytes});
    let each = |token: &TokenLogprob| {
        let mut value = one(token);
        value["top_logprobs"] = token.top.iter().map(one).collect();
        value
    };
    json!({"content": tokens.iter().map(each).collect::<Vec<_>>(), "refusal": null})
}

/// Sets why an answer ended. Typed clients fail at a reason that OpenAI does not have: such a one goes into a field of its own, as
/// OpenRouter names it.
pub(super) fn end(choice: &mut Value, reason: &FinishReason) {
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
pub(super) fn usage(Usage { prompt_tokens, completion_tokens }: Usage) -> Value {
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

/// What failed here, and not in the request.
pub(super) fn failed(error: &anyhow::Error) -> Refusal {
    // Where things are on this machine is for whoever runs it.
    line(format_args!("warning: a request failed here: {error:#}"));
    let message = "that failed on this machine; whoever runs the server finds the reason in its messages";
    let refusal = Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message);
    Refusal { kind: "api_error", ..refusal }
}

impl From<HandlerError> for Refusal {
    fn from(error: HandlerError) -> Self {
        // What was tried again already is not for clients to try again, which multiplies the requests to providers.
        let retry = error.exhausted.then_some(false);
        let refusal = Self { retry, ..Self::new(StatusCode::BAD_GATEWAY, error.message) };
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
