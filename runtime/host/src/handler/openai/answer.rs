//! The pieces of a provider's answer, made into events.
//!
//! Providers write OpenAI's pieces in many dialects. A dialect is read if no text can be lost by that; anything else is an error, and
//! never a short or empty answer.

use std::collections::VecDeque;
use std::io;

use serde_json::Value;

use super::endpoint::Endpoint;
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
    usage: Usage,
    /// The end of the text while it may be the beginning of the key.
    held: String,
    over: bool,
    /// The only piece is the whole answer, which needs no reason to be complete.
    is_whole: bool,
}

/// Returns the choice of a piece that is answered with: that of index 0, which is also the index of one without; null if there is none.
pub(super) fn choice(piece: &Value) -> &Value {
    let is_first = |choice: &&Value| match &choice["index"] {
        Value::Number(index) => index.as_f64() == Some(0.0),
        Value::String(index) => index == "0",
        _ => true,
    };
    piece["choices"].as_array().and_then(|choices| choices.iter().find(is_first)).unwrap_or(&Value::Null)
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
            None | Some(Err(_)) if self.finish.is_some() => return self.end(),
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
            Err(_) if self.finish.is_some() => self.end(),
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
        self.ready.push_back(Event::Start { id, model, handler: self.endpoint.name.clone() });
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
        let text = self.endpoint.content(&mut self.held, text, false);
        if !text.is_empty() {
            self.ready.push_back(Event::Delta { text });
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
            self.ready.push_back(Event::Delta { text });
        }
        self.ready.extend([Event::Finish { reason }, Event::Usage(self.usage)]);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::BaseUrl;
    use super::*;
    use crate::handler::sse::Events;
    use crate::handler::{Completion, collect};

    fn endpoint() -> Endpoint {
        let [connect_timeout, read_timeout, answer_timeout] = [Duration::from_secs(1); 3];
        Endpoint {
            name: "far".into(),
            base_url: BaseUrl::parse("http://127.0.0.1:1/v1").expect("an address"),
            model: "asked".into(),
            api_key: None,
            connect_timeout,
            read_timeout,
            answer_timeout,
            max_tokens_param: "max_tokens".into(),
        }
    }

    fn read(stream: &str) -> Result<Completion, HandlerError> {
        let endpoint = endpoint();
        let events: Vec<_> = Answer::new(&endpoint, Events::new(stream.as_bytes())).collect();
        collect(Box::new(events.into_iter()))
    }

    /// What it is, the stream, its text, its reason, its tokens.
    type Whole<'a> = (&'a str, &'a str, &'a str, &'a str, Option<(u64, u64)>);

    /// `D`: a piece with this delta; `C`: one with this choice; else the whole piece.
    fn stream(pieces: &[&str]) -> String {
        let piece = |piece: &&str| match piece.split_at_checked(1).unwrap_or_default() {
            ("D", delta) => {
                format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":null}}]}}\n\n")
            }
            ("C", choice) => format!("data: {{\"choices\":[{choice}]}}\n\n"),
            (":", _) => format!("{piece}\n\n"),
            _ => format!("data: {piece}\n\n"),
        };
        pieces.iter().map(piece).collect()
    }

    const A: &str = r#"D{"content":"a"}"#;
    const STOP: &str = r#"C{"index":0,"delta":{},"finish_reason":"stop"}"#;
    const DONE: &str = "[DONE]";

    #[test]
    fn answers_in_all_dialects_are_whole() {
        let twice = |text: &str| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}");
        let glued = format!(
            "{}\n{}\ndata: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\ndata: [DONE]\n",
            twice("é"),
            twice("ß")
        );
        let cases: &[Whole] = &[
            (
                "OpenAI",
                &stream(&[
                    r#"D{"role":"assistant","content":"","refusal":null}"#,
                    A,
                    STOP,
                    r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}"#,
                    DONE,
                ]),
                "a",
                "stop",
                Some((3, 1)),
            ),
            (
                "Azure: filters before, between and after",
                &stream(&[
                    r#"{"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false}}}]}"#,
                    A,
                    r#"{"id":"","model":"","choices":[{"index":0,"finish_reason":null,"content_filter_results":{},"content_filter_offsets":{"check_offset":44}}],"usage":null}"#,
                    A,
                    STOP,
                    r#"C{"index":0,"delta":null,"finish_reason":null,"content_filter_results":{}}"#,
                    DONE,
                ]),
                "aa",
                "stop",
                None,
            ),
            (
                "OpenRouter: comments",
                &stream(&[": OPENROUTER PROCESSING", A, ": OPENROUTER PROCESSING", STOP, DONE]),
                "a",
                "stop",
                None,
            ),
            (
                "LocalAI: a reason that is none",
                &stream(&[
                    r#"C{"delta":{"content":"a"},"finish_reason":""}"#,
                    r#"C{"delta":{"content":"b"},"finish_reason":"null"}"#,
                    STOP,
                ]),
                "ab",
                "stop",
                None,
            ),
            (
                "Gemini: a reason with every piece",
                &stream(&[
                    r#"C{"delta":{"content":"a"},"finish_reason":"stop"}"#,
                    r#"C{"delta":{"content":"b"},"finish_reason":"stop"}"#,
                    r#"C{"delta":{"content":"c"},"finish_reason":"length"}"#,
                    DONE,
                ]),
                "abc",
                "length",
                None,
            ),
            (
                "vLLM: the reason with the last text, usage with every piece, empty calls",
                &stream(&[
                    r#"{"choices":[{"delta":{"content":"a","tool_calls":[]}}],"usage":{"prompt_tokens":7,"completion_tokens":1}}"#,
                    r#"{"choices":[{"delta":{"content":"b"},"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":7,"completion_tokens":2}}"#,
                    DONE,
                ]),
                "ab",
                "length",
                Some((7, 2)),
            ),
            (
                "Mistral: content in parts, with thoughts",
                &stream(&[
                    r#"D{"content":[{"type":"thinking","thinking":[{"type":"text","text":"hm"}],"text":"hm"},{"type":"text","text":"a"},{"type":"reference","reference_ids":[1]},{"type":"text","text":"b"}]}"#,
                    r#"C{"delta":{"content":""},"finish_reason":"model_length"}"#,
                ]),
                "ab",
                "length",
                None,
            ),
            (
                "DeepSeek: thoughts beside",
                &stream(&[
                    r#"D{"content":null,"reasoning_content":"hm"}"#,
                    r#"D{"content":"a","reasoning_content":null}"#,
                    STOP,
                ]),
                "a",
                "stop",
                None,
            ),
            (
                "thoughts that found no end",
                &stream(&[r#"D{"reasoning":"hm"}"#, r#"C{"delta":{},"finish_reason":"length"}"#]),
                "",
                "length",
                None,
            ),
            (
                "an answer of nothing",
                &stream(&[r#"D{"role":"assistant","content":null}"#, STOP, DONE]),
                "",
                "stop",
                None,
            ),
            (
                "a refusal",
                &stream(&[r#"D{"content":null,"refusal":"I "}"#, r#"D{"content":null,"refusal":"will not"}"#, STOP]),
                "I will not",
                "stop",
                None,
            ),
            (
                "a refusal in parts",
                &stream(&[r#"D{"content":[{"type":"refusal","refusal":"no"}]}"#, STOP]),
                "no",
                "stop",
                None,
            ),
            (
                "a message and no delta",
                &stream(&[
                    r#"C{"index":0,"message":{"role":"assistant","content":"é🦊"},"finish_reason":"stop"}"#,
                    DONE,
                ]),
                "é🦊",
                "stop",
                None,
            ),
            (
                "Perplexity: the message so far beside each delta",
                &stream(&[
                    r#"C{"delta":{"content":"a"},"message":{"content":"a"}}"#,
                    r#"C{"delta":{"content":"b"},"message":{"content":"ab"},"finish_reason":"stop"}"#,
                ]),
                "ab",
                "stop",
                None,
            ),
            (
                "all of it once more at the end",
                &stream(&[A, A, r#"C{"message":{"content":"aa"},"finish_reason":"stop"}"#]),
                "aa",
                "stop",
                None,
            ),
            (
                "Moonshot: usage in the choice",
                &stream(&[
                    A,
                    r#"C{"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":5,"completion_tokens":2}}"#,
                ]),
                "a",
                "stop",
                Some((5, 2)),
            ),
            (
                "Groq: usage of its own",
                &stream(&[
                    A,
                    r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"x_groq":{"id":"r","usage":{"prompt_tokens":5.0,"completion_tokens":2}}}"#,
                ]),
                "a",
                "stop",
                Some((5, 2)),
            ),
            (
                "usage that is not said again",
                &stream(&[
                    A,
                    STOP,
                    r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#,
                    r#"{"choices":[],"usage":{"total_tokens":7}}"#,
                ]),
                "a",
                "stop",
                Some((5, 2)),
            ),
            (
                "usage that is none",
                &stream(&[A, STOP, r#"{"choices":[],"usage":{"prompt_tokens":-1,"completion_tokens":"2"}}"#]),
                "a",
                "stop",
                None,
            ),
            (
                "empty pieces",
                &stream(&["", " ", "{}", "null", r#"{"type":"ping"}"#, r#"{"choices":null}"#, A, STOP]),
                "a",
                "stop",
                None,
            ),
            (
                "an error that is none",
                &stream(&[
                    r#"{"error":"","choices":[{"delta":{"content":"a"}}]}"#,
                    r#"{"error":{},"choices":[{"error":0,"delta":{},"finish_reason":"stop"}]}"#,
                ]),
                "a",
                "stop",
                None,
            ),
            ("no [DONE], and another one", &(stream(&[A, STOP]) + "data: DONE\n\n"), "a", "stop", None),
            ("one line break and not two", &glued, "éß", "stop", None),
            (
                "JSON over several lines",
                "data: {\"choices\":\ndata: [{\"delta\":{\"content\":\"a\"},\ndata: \"finish_reason\":\"stop\"}]}\n\n",
                "a",
                "stop",
                None,
            ),
            (
                "\\r\\n, no space, no last line",
                "data:{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\nevent: x\r\ndata:{\"choices\":[{\"finish_reason\":\"stop\"}]}",
                "a",
                "stop",
                None,
            ),
            (
                "completions of before chat",
                &stream(&[r#"C{"index":0,"text":"é"}"#, r#"C{"text":"ß","finish_reason":"stop"}"#, DONE]),
                "éß",
                "stop",
                None,
            ),
            (
                "a text beside the delta that says the same",
                &stream(&[
                    r#"C{"delta":{"content":"a"},"text":"a"}"#,
                    r#"C{"delta":{},"text":"a","finish_reason":"stop"}"#,
                ]),
                "a",
                "stop",
                None,
            ),
            ("content of one part", &stream(&[r#"D{"content":{"type":"text","text":"é"}}"#, STOP]), "é", "stop", None),
            (
                "content of strings",
                &stream(&[r#"D{"content":["a","b",null]}"#, r#"D{"content":[]}"#, STOP]),
                "ab",
                "stop",
                None,
            ),
            (
                "parts whose text has a value",
                &stream(&[
                    r#"D{"content":[{"type":"text","text":{"value":"é","annotations":[]}},{"type":"text"}]}"#,
                    STOP,
                ]),
                "é",
                "stop",
                None,
            ),
            ("a delta's text", &stream(&[r#"D{"type":"text_delta","text":"a"}"#, STOP]), "a", "stop", None),
            (
                "other choices",
                &stream(&[
                    r#"C{"index":1,"delta":{"content":"x"},"finish_reason":"length"}"#,
                    r#"{"choices":[{"index":2,"delta":{"content":"y"}},{"index":0,"delta":{"content":"a"}}]}"#,
                    r#"C{"index":"0","delta":{"content":"b"}}"#,
                    STOP,
                    r#"C{"index":1,"error":"it fell"}"#,
                ]),
                "ab",
                "stop",
                None,
            ),
            ("an unknown reason", &stream(&[A, r#"C{"delta":{},"finish_reason":"weird"}"#]), "a", "weird", None),
        ];
        for (what, bytes, text, reason, tokens) in cases {
            let whole = read(bytes).unwrap_or_else(|error| panic!("{what}: {error}\n{bytes}"));
            let usage = whole.usage.prompt_tokens.zip(whole.usage.completion_tokens);
            assert_eq!((whole.text.as_str(), whole.finish.word(), usage), (*text, *reason, *tokens), "{what}: {bytes}");
        }
        for (words, reason) in [
            ("eos eos_token end_turn END_TURN stop_sequence STOP COMPLETE", "stop"),
            ("length max_tokens MAX_TOKENS model_length model_context_window_exceeded", "length"),
            ("content_filter SAFETY RECITATION refusal sensitive", "content_filter"),
        ] {
            for word in words.split(' ') {
                let bytes = stream(&[A, &format!(r#"C{{"delta":{{}},"finish_reason":"{word}"}}"#), DONE]);
                assert_eq!(read(&bytes).expect(word).finish.word(), reason, "{word}");
            }
        }
    }

    #[test]
    fn what_is_no_answer_is_never_taken_for_one() {
        let cut = Kind::Cut;
        let cases: &[(&str, &str, Kind, &str)] = &[
            ("nothing", "", cut.clone(), "connection ended"),
            ("comments alone", ": ping\n\n: ping\n\n", cut.clone(), "connection ended"),
            ("no reason", &stream(&[A]), cut.clone(), "connection ended"),
            ("no reason but [DONE]", &stream(&[A, DONE]), cut.clone(), "without a finish_reason"),
            (
                "vLLM: aborted, and [DONE] all the same",
                &stream(&[A, r#"C{"delta":{},"finish_reason":"abort"}"#, DONE]),
                cut.clone(),
                "its finish_reason is abort",
            ),
            (
                "Mistral, OpenRouter: error",
                &stream(&[A, r#"C{"delta":{"content":""},"finish_reason":"error"}"#, DONE]),
                cut.clone(),
                "its finish_reason is error",
            ),
            (
                "DeepSeek: out of resources",
                &stream(&[A, r#"C{"delta":{},"finish_reason":"insufficient_system_resource"}"#]),
                cut,
                "insufficient_system_resource",
            ),
            (
                "OpenRouter: in the middle",
                &stream(&[
                    A,
                    r#"{"id":"g","error":{"code":502,"message":"Worker local total request limit reached"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}"#,
                ]),
                Kind::Unavailable,
                "Worker local",
            ),
            (
                "OpenRouter: without a choice",
                &stream(&[r#"{"choices":[],"error":{"code":429,"message":"slow down"}}"#, DONE]),
                Kind::RateLimited { retry_after: None },
                "slow down",
            ),
            (
                "an error in the choice",
                &stream(&[r#"C{"error":{"code":"server_error","message":"it fell"},"delta":{}}"#, DONE]),
                Kind::Unavailable,
                "it fell",
            ),
            (
                "an error in a word",
                &stream(&[r#"{"error":"the model runner stopped"}"#]),
                Kind::Unavailable,
                "model runner",
            ),
            (
                "vLLM: an error with a status",
                &stream(&[
                    r#"{"error":{"message":"This model's maximum context length is 4096 tokens","type":"BadRequestError","param":null,"code":400}}"#,
                    DONE,
                ]),
                Kind::ContextLength,
                "4096",
            ),
            (
                "vLLM of before",
                &stream(&[
                    r#"{"object":"error","message":"bad grammar","type":"BadRequestError","param":null,"code":400}"#,
                    DONE,
                ]),
                Kind::InvalidRequest { param: None },
                "bad grammar",
            ),
            (
                "Anthropic's",
                "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n",
                Kind::Unavailable,
                "Overloaded",
            ),
            (
                "a named one",
                "event: error\ndata: {\"message\":\"out of memory\"}\n\n",
                Kind::Unavailable,
                "out of memory",
            ),
            ("FastAPI's", &stream(&[r#"{"detail":"not today"}"#]), Kind::Unavailable, "not today"),
            (
                "Gemini's, in a list",
                &stream(&[r#"[{"error":{"code":429,"message":"quota","status":"RESOURCE_EXHAUSTED"}}]"#]),
                Kind::RateLimited { retry_after: None },
                "quota",
            ),
            (
                "a wrong key",
                &stream(&[r#"{"error":{"message":"no","type":"authentication_error"}}"#]),
                Kind::Authentication,
                "no",
            ),
            (
                "an error after the reason",
                &stream(&[A, STOP, r#"{"error":{"message":"late"}}"#]),
                Kind::Unavailable,
                "late",
            ),
            (
                "all of it thought",
                &stream(&[r#"D{"content":null,"reasoning_content":"42"}"#, STOP, DONE]),
                Kind::Protocol,
                "reasoning",
            ),
            (
                "the call of a tool",
                &stream(&[
                    r#"D{"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":""}}]}"#,
                    r#"C{"delta":{},"finish_reason":"tool_calls"}"#,
                    DONE,
                ]),
                Kind::Protocol,
                "tool",
            ),
            ("content that is a number", &stream(&[r#"D{"content":5}"#, STOP]), Kind::Protocol, "`content`"),
            ("a part that is a number", &stream(&[r#"D{"content":["a",5]}"#, STOP]), Kind::Protocol, "`content`"),
            (
                "a part of no known form",
                &stream(&[r#"D{"content":{"type":"image","url":"x"}}"#, STOP]),
                Kind::Protocol,
                "`content`",
            ),
            (
                "a text of no known form",
                &stream(&[r#"C{"text":["a"],"finish_reason":"stop"}"#]),
                Kind::Protocol,
                "`text`",
            ),
            ("a delta that is a list", &stream(&[r#"D["a"]"#, STOP]), Kind::Protocol, "`delta`"),
            (
                "a message that is a text",
                &stream(&[r#"C{"message":"a","finish_reason":"stop"}"#]),
                Kind::Protocol,
                "`message`",
            ),
            (
                "thoughts in parts and no more",
                &stream(&[r#"D{"content":[{"type":"thinking","thinking":"42"}]}"#, STOP]),
                Kind::Protocol,
                "reasoning",
            ),
            (
                "another choice alone",
                &stream(&[r#"C{"index":1,"delta":{"content":"a"},"finish_reason":"stop"}"#]),
                Kind::Cut,
                "connection ended",
            ),
            ("the call of a function", &stream(&[r#"D{"function_call":{"name":"f"}}"#]), Kind::Protocol, "tool"),
            (
                "half a piece",
                "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"choi",
                Kind::Protocol,
                "not JSON",
            ),
            (
                "half a character of two",
                &stream(&[r#"D{"content":"\ud83e"}"#, r#"D{"content":"\udd8a"}"#, STOP]),
                Kind::Protocol,
                "not JSON",
            ),
        ];
        for (what, bytes, kind, words) in cases {
            let error = read(bytes).expect_err(what);
            assert!(error.kind == *kind && error.message.contains(words), "{what}: {error:?}\n{bytes}");
        }
    }
}
