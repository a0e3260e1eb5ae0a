//! The pieces of a provider's answer, made into events.
//!
//! Providers write OpenAI's pieces in many dialects. A dialect is read if no text can be lost by that; anything else is an error, and
//! never a short or empty answer.

use std::collections::VecDeque;
use std::io;

use serde_json::Value;

use super::endpoint::Endpoint;
use super::piece::choice;
use super::refusal::{Refused, is_timeout};
use crate::handler::{Event, FinishReason, HandlerError, Kind, Usage, new_id};

/// An answer that is being read. `I` yields the data of its pieces.
pub(super) struct Answer<'a, I> {
    pieces: I,
    endpoint: &'a Endpoint,
    ready: VecDeque<Event>,
    started: bool,
    /// There was text.
    spoke: bool,
    /// There was reasoning, which is not passed on.
    thought: bool,
    finish: Option<FinishReason>,
    /// Text came behind a reason: this server sends one with every piece, so that none of them says that the answer is over.
    repeats_reason: bool,
    usage: Usage,
    /// The end of the text while it may be the beginning of the key.
    held: String,
    over: bool,
    /// The only piece is the whole answer, which needs no reason to be complete.
    is_whole: bool,
}

/// Makes the error of a read that failed.
pub(super) fn unreadable(endpoint: &Endpoint, error: &io::Error) -> HandlerError {
    match error.kind() {
        _ if is_timeout(error) => endpoint.error(
            Kind::Timeout,
            "the answer stopped in the middle: nothing came within read_timeout_s or answer_timeout_s",
        ),
        io::ErrorKind::InvalidData => endpoint.error(Kind::Protocol, &error.to_string()),
        _ => endpoint.error(Kind::Cut, &format!("the answer broke off: {error}")),
    }
}

impl<'a, I: Iterator<Item = io::Result<String>>> Answer<'a, I> {
    pub(super) fn new(endpoint: &'a Endpoint, pieces: I) -> Self {
        Self {
            pieces,
            endpoint,
            ready: VecDeque::new(),
            started: false,
            spoke: false,
            thought: false,
            finish: None,
            repeats_reason: false,
            usage: Usage::default(),
            held: String::new(),
            over: false,
            is_whole: false,
        }
    }

    /// An answer that comes as one piece instead of a stream.
    pub(super) fn whole(endpoint: &'a Endpoint, pieces: I) -> Self {
        Self { is_whole: true, ..Self::new(endpoint, pieces) }
    }

    /// Reads one piece and makes events of it.
    fn step(&mut self) -> Result<(), HandlerError> {
        let data = match self.pieces.next() {
            Some(Ok(data)) => data,
            // After the finish_reason only the usage may be missing.
            None if self.finish.is_some() => return self.end(),
            Some(Err(_)) if self.finish.is_some() && !self.repeats_reason => return self.end(),
            None if self.is_whole => return self.end(),
            None => return Err(self.error(Kind::Cut, "the answer broke off: the connection ended before it did")),
            Some(Err(error)) => return Err(unreadable(self.endpoint, &error)),
        };
        match serde_json::from_str(&data) {
            Ok(piece) => self.take(&piece),
            // Some servers end a piece with one line break instead of two, so that several come as one event.
            Err(_) => data.lines().try_for_each(|line| self.line(line.trim())),
        }
    }

    fn line(&mut self, line: &str) -> Result<(), HandlerError> {
        if self.over || line.is_empty() {
            return Ok(());
        }
        if line == "[DONE]" {
            if self.finish.is_none() {
                return Err(self.error(Kind::Cut, "the answer broke off: it is done without a finish_reason"));
            }
            return self.end();
        }
        match serde_json::from_str(line) {
            Ok(piece) => self.take(&piece),
            Err(_) if self.finish.is_some() && !self.repeats_reason => self.end(),
            Err(_) => Err(self.error(Kind::Protocol, "a piece of the answer is not JSON")),
        }
    }

    fn take(&mut self, piece: &Value) -> Result<(), HandlerError> {
        if let Some(refused) = Refused::of_piece(piece) {
            return Err(self.error(refused.kind(None, None), refused.words()));
        }
        let choice = choice(piece);
        // Azure's first piece has no choice, no id and no model.
        if !self.started && choice.is_object() {
            self.start(piece);
        }
        self.count(piece);
        // Some servers send one message instead of deltas, and some repeat the whole text as a message at the end.
        let is_delta = choice["delta"].is_object();
        let says = if is_delta { &choice["delta"] } else { &choice["message"] };
        if let Some(strange) = ["delta", "message"].into_iter().find(|field| !is_object_or_none(&choice[*field])) {
            return Err(self.not_understood(strange));
        }
        let is_call = |field: &str| match &says[field] {
            Value::Array(calls) => !calls.is_empty(),
            call => call.is_object(),
        };
        if is_call("tool_calls") || is_call("function_call") {
            return Err(self.error(Kind::Protocol, "it answered with a tool call, and no tools were offered"));
        }
        let said = said(says).map_err(|field| self.not_understood(field))?;
        self.thought |= said.thought;
        if is_delta || !self.spoke {
            self.say(&said.text);
        }
        // The completions of before chat have a text and no delta. Beside one, it may say the same once more.
        let is_legacy = !is_delta && !choice["message"].is_object();
        match &choice["text"] {
            Value::Null => {}
            Value::String(text) if is_legacy || !self.spoke => self.say(text),
            Value::String(_) => {}
            _ => return Err(self.not_understood("text")),
        }
        let thoughts = ["reasoning_content", "reasoning", "thinking"].map(|field| &says[field]);
        self.thought |= thoughts.iter().any(|thought| thought.as_str().is_some_and(|text| !text.is_empty()));
        // The last one counts: Gemini sent one with every piece.
        if let Some(word) = choice["finish_reason"].as_str()
            && let Some(reason) = self.reason(word)?
        {
            self.finish = Some(reason);
        }
        Ok(())
    }

    fn start(&mut self, piece: &Value) {
        self.started = true;
        let name = |key: &str| piece[key].as_str().map(|name| self.endpoint.name_of(name));
        let name = |key: &str| name(key).filter(|name| !name.is_empty());
        let id = name("id").unwrap_or_else(new_id);
        let model = name("model").unwrap_or_else(|| self.endpoint.model.clone());
        self.ready.push_back(Event::start(id, model, &self.endpoint.name));
    }

    /// Reads the usage, which comes once or grows with every piece.
    fn count(&mut self, piece: &Value) {
        // The places of OpenAI, Moonshot and Groq.
        let places = [&piece["usage"], &choice(piece)["usage"], &piece["x_groq"]["usage"]];
        let Some(usage) = places.into_iter().find(|usage| usage.is_object()) else { return };
        let whole = |number: f64| (number >= 0.0 && number.fract() == 0.0).then_some(number as u64);
        let count = |key: &str| usage[key].as_u64().or_else(|| usage[key].as_f64().and_then(whole));
        self.usage.prompt_tokens = count("prompt_tokens").or(self.usage.prompt_tokens);
        self.usage.completion_tokens = count("completion_tokens").or(self.usage.completion_tokens);
    }

    fn say(&mut self, text: &str) {
        self.spoke |= !text.is_empty();
        self.repeats_reason |= self.finish.is_some() && !text.is_empty();
        let text = self.endpoint.content(&mut self.held, text, false);
        if !text.is_empty() {
            self.ready.push_back(Event::text(text));
        }
    }

    /// Returns the reason that a word means, if any. Some providers pass on the words of other interfaces.
    fn reason(&self, word: &str) -> Result<Option<FinishReason>, HandlerError> {
        Ok(Some(match word.to_ascii_lowercase().as_str() {
            // Some servers send these with every piece.
            "" | "null" | "none" => return Ok(None),
            "stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "complete" => FinishReason::Stop,
            "length" | "max_tokens" | "model_length" | "model_context_window_exceeded" => FinishReason::Length,
            "content_filter" | "safety" | "recitation" | "refusal" | "sensitive" => FinishReason::ContentFilter,
            // The answer is not complete, though vLLM sends [DONE] after it.
            "error" | "abort" | "aborted" | "cancelled" | "network_error" | "insufficient_system_resource" => {
                return Err(self.error(Kind::Cut, &format!("the answer broke off: its finish_reason is {word}")));
            }
            _ => FinishReason::Other(self.endpoint.name_of(word)),
        }))
    }

    fn end(&mut self) -> Result<(), HandlerError> {
        self.over = true;
        let reason = self.finish.take().unwrap_or(FinishReason::Stop);
        // Some servers take the whole answer for reasoning. With reason `length`, the model only did not get beyond it.
        if self.thought && !self.spoke && reason == FinishReason::Stop {
            return Err(self.error(Kind::Protocol, "the answer is empty: all of its text came as reasoning"));
        }
        let text = self.endpoint.content(&mut self.held, "", true);
        if !text.is_empty() {
            self.ready.push_back(Event::text(text));
        }
        self.ready.extend([Event::finish(reason), Event::Usage(self.usage)]);
        Ok(())
    }

    fn not_understood(&self, field: &str) -> HandlerError {
        self.error(
            Kind::Protocol,
            &format!("the answer's `{field}` is in a form that is not known, and its text would be lost"),
        )
    }

    fn error(&self, kind: Kind, message: &str) -> HandlerError {
        self.endpoint.error(kind, message)
    }
}

impl<I: Iterator<Item = io::Result<String>>> Iterator for Answer<'_, I> {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if let Err(error) = self.step() {
                self.over = true;
                self.ready.clear();
                return Some(Err(error));
            }
        }
    }
}

fn is_object_or_none(value: &Value) -> bool {
    value.is_object() || value.is_null()
}

/// What a delta or a message says.
#[derive(Default)]
struct Said {
    text: String,
    /// Some of its content is reasoning.
    thought: bool,
}

impl Said {
    /// Adds one part of the content, or says that it is not understood.
    fn part(&mut self, part: &Value) -> Option<()> {
        // Only an object has a type, and only a null or a string has none of these fields.
        let text = match (part["type"].as_str(), &part["text"], &part["refusal"]) {
            (Some("thinking" | "reasoning"), ..) => {
                self.thought = true;
                return Some(());
            }
            // Mistral's numbers of sources.
            (Some("reference"), Value::Null, _) => return Some(()),
            (_, Value::String(text), _) | (_, Value::Null, Value::String(text)) => text,
            (_, Value::Object(text), _) => text.get("value")?.as_str()?,
            (Some("text" | "output_text" | "refusal"), Value::Null, Value::Null) => "",
            _ if part.is_null() => "",
            _ => part.as_str()?,
        };
        self.text.push_str(text);
        Some(())
    }
}

/// Reads a delta or a message. A refusal is the text that the model gives instead.
///
/// # Errors
/// When a field is not understood; names it.
fn said(delta: &Value) -> Result<Said, &'static str> {
    let mut said = Said::default();
    let (field, content) = match &delta["content"] {
        Value::Null => ("text", &delta["text"]),
        content => ("content", content),
    };
    let parts = content.as_array().map_or(std::slice::from_ref(content), Vec::as_slice);
    parts.iter().try_for_each(|part| said.part(part)).ok_or(field)?;
    said.part(&delta["refusal"]).ok_or("refusal")?;
    Ok(said)
}
