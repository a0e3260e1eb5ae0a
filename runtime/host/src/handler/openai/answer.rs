//! The pieces of a provider's answer, made into events.
//!
//! Providers write OpenAI's pieces in many dialects. A dialect is read if no text can be lost by that; anything else is an error, and
//! never a short or empty answer.

mod call;
mod likely;
mod said;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;

use serde_json::Value;

use self::call::Calls;
use self::said::said;
use crate::handler::provider::Endpoint;
use crate::handler::provider::piece::{choice, choices};
use crate::handler::provider::reading::{BROKE_OFF, unreadable};
use crate::handler::provider::refusal::Refused;
use crate::handler::{Event, FinishReason, HandlerError, Kind, Request, Start, Usage, new_id};

/// What was asked for, as far as it says how an answer is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// The number of choices.
    choices: usize,
    /// Tools were offered.
    tools: bool,
    logprobs: bool,
}

impl Wanted {
    pub(super) fn of(request: &Request) -> Self {
        Self { choices: request.choices(), tools: !request.tools.is_empty(), logprobs: request.logprobs.is_some() }
    }
}

/// An answer that is being read. `I` yields the data of its pieces.
pub(super) struct Answer<'a, I> {
    pieces: I,
    endpoint: &'a Endpoint,
    wanted: Wanted,
    ready: VecDeque<Event>,
    started: bool,
    choices: Vec<Choice>,
    usage: Usage,
    over: bool,
    /// The only piece is the whole answer, which needs no reason to be complete.
    is_whole: bool,
}

/// What has come of a choice.
#[derive(Default)]
struct Choice {
    /// There was text.
    spoke: bool,
    /// There was reasoning.
    thought: bool,
    finish: Option<FinishReason>,
    /// Text came behind a reason: this server sends one with every piece, so that none of them says that the answer is over.
    repeats_reason: bool,
    /// The ends of the text and of the reasoning while they may be the beginning of the key.
    held: String,
    held_thought: String,
    calls: Calls,
}

impl<'a, I: Iterator<Item = io::Result<String>>> Answer<'a, I> {
    pub(super) fn new(endpoint: &'a Endpoint, wanted: Wanted, pieces: I) -> Self {
        let mut choices = Vec::new();
        choices.resize_with(wanted.choices, Choice::default);
        let (ready, usage) = (VecDeque::new(), Usage::default());
        Self { pieces, endpoint, wanted, ready, started: false, choices, usage, over: false, is_whole: false }
    }

    /// An answer that comes as one piece instead of a stream.
    pub(super) fn whole(endpoint: &'a Endpoint, wanted: Wanted, pieces: I) -> Self {
        Self { is_whole: true, ..Self::new(endpoint, wanted, pieces) }
    }

    /// Whether every choice has a reason, behind which only the usage may be missing.
    fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Whether it is finished, and a reason says so much.
    fn is_surely_finished(&self) -> bool {
        self.is_finished() && !self.choices.iter().any(|choice| choice.repeats_reason)
    }

    /// Reads one piece and makes events of it.
    fn step(&mut self) -> Result<(), HandlerError> {
        let data = match self.pieces.next() {
            Some(Ok(data)) => data,
            None if self.is_finished() => return self.end(),
            Some(Err(_)) if self.is_surely_finished() => return self.end(),
            None if self.is_whole => return self.end(),
            None => return Err(self.error(Kind::Cut, BROKE_OFF)),
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
            if self.choices[0].finish.is_none() {
                return Err(self.error(Kind::Cut, "the answer broke off: it is done without a finish_reason"));
            }
            return self.end();
        }
        match serde_json::from_str(line) {
            Ok(piece) => self.take(&piece),
            Err(_) if self.is_surely_finished() => self.end(),
            // The last piece lacks its end.
            Err(error) if error.is_eof() && !matches!(self.pieces.next(), Some(Ok(_))) => {
                Err(self.error(Kind::Cut, BROKE_OFF))
            }
            Err(_) => Err(self.error(Kind::Protocol, "a piece of the answer is not JSON")),
        }
    }

    fn take(&mut self, piece: &Value) -> Result<(), HandlerError> {
        let wanted = self.wanted.choices;
        let of_choices = || choices(piece).filter(|(number, _)| *number < wanted);
        let refused =
            Refused::of_piece(piece).or_else(|| of_choices().find_map(|(_, choice)| Refused::of_choice(choice)));
        if let Some(refused) = refused {
            return Err(self.endpoint.refused(refused.kind(None, None), refused.words(), ""));
        }
        // Azure's first piece has no choice, no id and no model.
        if !self.started && of_choices().any(|(_, choice)| choice.is_object()) {
            self.start(piece);
        }
        self.count(piece);
        of_choices().try_for_each(|(number, choice)| self.take_choice(number, choice))
    }

    fn take_choice(&mut self, number: usize, choice: &Value) -> Result<(), HandlerError> {
        // Some servers send one message instead of deltas, and some repeat the whole text as a message at the end.
        let is_delta = choice["delta"].is_object();
        let says = if is_delta { &choice["delta"] } else { &choice["message"] };
        let is_object_or_none = |value: &Value| value.is_object() || value.is_null();
        if let Some(strange) = ["delta", "message"].into_iter().find(|field| !is_object_or_none(&choice[*field])) {
            return Err(self.not_understood(strange));
        }
        let said = said(says).map_err(|field| self.not_understood(field))?;
        self.think(number, &said.thought, said.has_thought);
        if self.wanted.logprobs {
            let logprobs = likely::read(&choice["logprobs"]);
            if !logprobs.is_empty() {
                self.ready.push_back(Event::Delta { choice: number, text: String::new(), logprobs });
            }
        }
        let spoke = self.choices[number].spoke;
        if is_delta || !spoke {
            self.say(number, &said.text);
        }
        self.call(number, says, is_delta)?;
        // The completions of before chat have a text and no delta. Beside one, it may say the same once more.
        let is_legacy = !is_delta && !choice["message"].is_object();
        match &choice["text"] {
            Value::Null => {}
            Value::String(text) if is_legacy || !self.choices[number].spoke => self.say(number, text),
            Value::String(_) => {}
            _ => return Err(self.not_understood("text")),
        }
        // The last one counts: Gemini sent one with every piece.
        if let Some(word) = choice["finish_reason"].as_str()
            && let Some(reason) = self.reason(word)?
        {
            self.choices[number].finish = Some(reason);
        }
        Ok(())
    }

    /// Reads the calls of a delta or a message.
    fn call(&mut self, number: usize, says: &Value, is_delta: bool) -> Result<(), HandlerError> {
        let calls = match (&says["tool_calls"], &says["function_call"]) {
            (Value::Array(calls), _) => &calls[..],
            (call @ Value::Object(_), _) | (_, call @ Value::Object(_)) => std::slice::from_ref(call),
            _ => return Ok(()),
        };
        if calls.is_empty() {
            return Ok(());
        }
        if !self.wanted.tools {
            return Err(self.error(Kind::Protocol, "it answered with a tool call, and no tools were offered"));
        }
        let choice = &mut self.choices[number];
        // The message at the end says once more what the deltas said.
        if !is_delta && !choice.calls.is_empty() {
            return Ok(());
        }
        choice.repeats_reason |= choice.finish.is_some();
        for call in calls {
            choice.calls.take(call).map_err(|field| {
                let message = format!("the `{field}` of a tool call is in a form that is not known");
                self.endpoint.error(Kind::Protocol, &message)
            })?;
        }
        let events = choice.calls.events(number, self.endpoint, false);
        self.ready.extend(events);
        Ok(())
    }

    fn start(&mut self, piece: &Value) {
        self.started = true;
        let name = |key: &str| piece[key].as_str().map(|name| self.endpoint.name_of(name));
        let name = |key: &str| name(key).filter(|name| !name.is_empty());
        let start = Start {
            id: name("id").unwrap_or_else(new_id),
            model: name("model").unwrap_or_else(|| self.endpoint.model.clone()),
            handler: self.endpoint.name.clone(),
            fingerprint: name("system_fingerprint"),
            ignored: Vec::new(),
        };
        self.ready.push_back(Event::Start(start));
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

    fn say(&mut self, number: usize, text: &str) {
        let choice = &mut self.choices[number];
        choice.spoke |= !text.is_empty();
        choice.repeats_reason |= choice.finish.is_some() && !text.is_empty();
        let text = self.endpoint.content(&mut choice.held, text, false);
        if text.is_empty() {
            return;
        }
        // Tokens are told of before the text that they make, or with it.
        match self.ready.back_mut() {
            Some(Event::Delta { choice, text: before, .. }) if *choice == number => before.push_str(&text),
            _ => self.ready.push_back(Event::Delta { choice: number, text, logprobs: Vec::new() }),
        }
    }

    fn think(&mut self, number: usize, thought: &str, has_thought: bool) {
        let choice = &mut self.choices[number];
        choice.thought |= has_thought || !thought.is_empty();
        let text = self.endpoint.content(&mut choice.held_thought, thought, false);
        if !text.is_empty() {
            self.ready.push_back(Event::Reasoning { choice: number, text });
        }
    }

    /// Returns the reason that a word means, if any. Some providers pass on the words of other interfaces.
    fn reason(&self, word: &str) -> Result<Option<FinishReason>, HandlerError> {
        Ok(Some(match word.to_ascii_lowercase().as_str() {
            // Some servers send these with every piece.
            "" | "null" | "none" => return Ok(None),
            "stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "complete" => FinishReason::Stop,
            "length" | "max_tokens" | "model_length" | "model_context_window_exceeded" => FinishReason::Length,
            "tool_calls" | "tool_call" | "function_call" | "tool_use" => FinishReason::ToolCalls,
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
        let missing = self.choices.iter().filter(|choice| choice.finish.is_none() && !choice.spoke).count();
        if self.choices.len() > 1 && missing > 0 {
            let (n, wanted) = (self.choices.len() - missing, self.choices.len());
            return Err(self.error(Kind::Protocol, &format!("it gave {n} of {wanted} choices; ask for one (`n`)")));
        }
        for number in 0..self.choices.len() {
            self.end_choice(number)?;
        }
        self.ready.push_back(Event::Usage(self.usage));
        Ok(())
    }

    fn end_choice(&mut self, number: usize) -> Result<(), HandlerError> {
        let choice = &mut self.choices[number];
        let mut reason = choice.finish.take().unwrap_or(FinishReason::Stop);
        let calls = !choice.calls.is_empty();
        // Some servers take the whole answer for reasoning. With reason `length`, the model only did not get beyond it.
        if choice.thought && !choice.spoke && !calls && reason == FinishReason::Stop {
            return Err(self.error(Kind::Protocol, "the answer is empty: all of its text came as reasoning"));
        }
        let thought = self.endpoint.content(&mut choice.held_thought, "", true);
        let text = self.endpoint.content(&mut choice.held, "", true);
        let rest = choice.calls.events(number, self.endpoint, true);
        if calls && reason == FinishReason::Stop {
            reason = FinishReason::ToolCalls;
        }
        if !thought.is_empty() {
            self.ready.push_back(Event::Reasoning { choice: number, text: thought });
        }
        if !text.is_empty() {
            self.ready.push_back(Event::Delta { choice: number, text, logprobs: Vec::new() });
        }
        self.ready.extend(rest);
        self.ready.push_back(Event::Finish { choice: number, reason });
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
