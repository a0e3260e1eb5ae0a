//! Answers of `/api/chat` and `/api/generate`: objects of one line each, the last of which says what the answer cost.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value, json};

use crate::handler::{Choice, Completion, Event, FinishReason, TokenLogprob, ToolCall, Usage};
use crate::registry::when;
use crate::serve::answering::Shape;
use crate::serve::reply::Refusal;

/// The two ways to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// `/api/chat`: a conversation.
    Chat,
    /// `/api/generate`: one prompt.
    Generate,
}

/// Lines of an answer.
pub(super) struct Lines {
    way: Way,
    /// The model's name, as the client gave it.
    model: String,
    started: Instant,
    first: Option<Instant>,
    /// Calls that are not whole yet.
    calls: Vec<ToolCall>,
    finish: FinishReason,
}

impl Lines {
    pub(super) fn new(way: Way, model: String, started: Instant) -> Self {
        Self { way, model, started, first: None, calls: Vec::new(), finish: FinishReason::Stop }
    }

    /// The answer to who asks nothing but that the model be loaded.
    pub(super) fn loaded(&mut self) -> Value {
        let mut line = self.line(Said::default());
        (line["done"], line["done_reason"]) = (json!(true), json!("load"));
        line
    }

    fn line(&self, said: Said) -> Value {
        let Said { text, thinking, calls, logprobs } = said;
        let mut line = json!({"model": self.model, "created_at": when::text(SystemTime::now())});
        let mut more = Map::new();
        if !thinking.is_empty() {
            more.insert("thinking".into(), json!(thinking));
        }
        if !calls.is_empty() {
            more.insert("tool_calls".into(), calls.iter().map(call).collect());
        }
        match self.way {
            Way::Chat => {
                let mut message =
                    Map::from_iter([("role".into(), json!("assistant")), ("content".into(), json!(text))]);
                message.extend(more);
                line["message"] = Value::Object(message);
            }
            Way::Generate => {
                line["response"] = json!(text);
                for (field, value) in more {
                    line[field] = value;
                }
            }
        }
        line["done"] = json!(false);
        if !logprobs.is_empty() {
            line["logprobs"] = logprobs.iter().map(logprob).collect();
        }
        line
    }

    /// Ends a line with what the answer cost. Times are in nanoseconds.
    fn end(&self, line: &mut Value, usage: Usage) {
        let nanos = |time: Duration| json!(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let total = self.started.elapsed();
        let read = self.first.map_or(Duration::ZERO, |first| first.saturating_duration_since(self.started));
        let fields = [
            ("done", json!(true)),
            ("done_reason", json!(if self.finish == FinishReason::Length { "length" } else { "stop" })),
            ("total_duration", nanos(total)),
            ("load_duration", json!(0)),
            ("prompt_eval_count", json!(usage.prompt_tokens)),
            ("prompt_eval_duration", nanos(read)),
            ("eval_count", json!(usage.completion_tokens)),
            ("eval_duration", nanos(total.saturating_sub(read))),
        ];
        for (field, value) in fields {
            line[field] = value;
        }
    }

    fn said(&mut self, said: Said) -> String {
        self.first.get_or_insert_with(Instant::now);
        one_line(&self.line(said))
    }
}

/// A piece of an answer.
#[derive(Default)]
struct Said<'a> {
    text: &'a str,
    thinking: &'a str,
    calls: &'a [ToolCall],
    logprobs: &'a [TokenLogprob],
}

/// JSON has no line breaks.
fn one_line(value: &Value) -> String {
    format!("{value}\n")
}

/// A call. Its arguments are an object; a model that writes something else is shown as it writes.
fn call(call: &ToolCall) -> Value {
    let arguments = serde_json::from_str(&call.arguments).ok().filter(Value::is_object);
    let arguments = arguments.unwrap_or_else(|| json!({"arguments": call.arguments}));
    json!({"id": call.id, "function": {"name": call.name, "arguments": arguments}})
}

fn logprob(token: &TokenLogprob) -> Value {
    let one = |token: &TokenLogprob| json!({"token": token.token, "logprob": token.logprob.max(-9999.0), "bytes": token.bytes});
    let mut value = one(token);
    if !token.top.is_empty() {
        value["top_logprobs"] = token.top.iter().map(one).collect();
    }
    value
}

impl Shape for Lines {
    fn stream_type(&self) -> &'static str {
        "application/x-ndjson"
    }

    fn whole(&mut self, whole: &Completion) -> Value {
        let none = Choice::default();
        let Choice { text, reasoning, tool_calls, logprobs, finish } = whole.choices.first().unwrap_or(&none);
        self.finish = finish.clone();
        let mut line = self.line(Said { text, thinking: reasoning, calls: tool_calls, logprobs });
        self.end(&mut line, whole.usage);
        line
    }

    fn begins_early(&mut self) {}

    fn event(&mut self, event: Event) -> String {
        match event {
            Event::Start(_) => String::new(),
            Event::Delta { text, logprobs, .. } => {
                self.said(Said { text: &text, logprobs: &logprobs, ..Said::default() })
            }
            Event::Reasoning { text, .. } => self.said(Said { thinking: &text, ..Said::default() }),
            // Ollama sends a call when it is whole.
            Event::ToolCall { index, id, name, arguments, .. } => {
                match (self.calls.get_mut(index), id, name) {
                    (Some(call), ..) => call.arguments.push_str(&arguments),
                    (None, Some(id), Some(name)) => self.calls.push(ToolCall { id, name, arguments }),
                    (None, ..) => {}
                }
                String::new()
            }
            Event::Finish { reason, .. } => {
                self.finish = reason;
                let calls = std::mem::take(&mut self.calls);
                if calls.is_empty() { String::new() } else { self.said(Said { calls: &calls, ..Said::default() }) }
            }
            Event::Usage(usage) => {
                let mut line = self.line(Said::default());
                self.end(&mut line, usage);
                one_line(&line)
            }
        }
    }

    fn error(&mut self, refusal: &Refusal) -> String {
        one_line(&json!({"error": refusal.shown()}))
    }

    /// Clients take every line for a piece of the answer, so that it is one without text.
    fn silence(&mut self, _: usize) -> String {
        one_line(&self.line(Said::default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(way: Way, events: Vec<Event>) -> Vec<Value> {
        let mut lines = Lines::new(way, "m".into(), Instant::now());
        let text: String = events.into_iter().map(|event| lines.event(event)).collect();
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    #[test]
    fn an_answer_is_lines_and_the_last_says_what_it_cost() {
        let usage = Usage { prompt_tokens: Some(3), completion_tokens: Some(2) };
        let events = vec![
            Event::start("i", "m", "h"),
            Event::Reasoning { choice: 0, text: "hm\n".into() },
            Event::text("a\nb"),
            Event::finish(FinishReason::Length),
            Event::Usage(usage),
        ];
        let chat = lines(Way::Chat, events.clone());
        assert_eq!(chat.len(), 3);
        assert_eq!(chat[0]["message"], json!({"role": "assistant", "content": "", "thinking": "hm\n"}));
        assert_eq!((&chat[1]["message"]["content"], &chat[1]["done"]), (&json!("a\nb"), &json!(false)));
        assert_eq!((&chat[2]["done"], &chat[2]["done_reason"]), (&json!(true), &json!("length")));
        assert_eq!((&chat[2]["prompt_eval_count"], &chat[2]["eval_count"]), (&json!(3), &json!(2)));
        let sum = chat[2]["prompt_eval_duration"].as_u64().zip(chat[2]["eval_duration"].as_u64()).map(|(a, b)| a + b);
        assert_eq!(sum, chat[2]["total_duration"].as_u64());
        let generated = lines(Way::Generate, events);
        assert_eq!((&generated[1]["response"], generated[1].get("message")), (&json!("a\nb"), None));
    }

    #[test]
    fn a_call_is_sent_whole_with_its_arguments_as_an_object() {
        let piece = |id: Option<&str>, arguments: &str| Event::ToolCall {
            choice: 0,
            index: 0,
            id: id.map(str::to_owned),
            name: id.map(|_| "f".to_owned()),
            arguments: arguments.to_owned(),
        };
        let calls = lines(
            Way::Chat,
            vec![piece(Some("c"), "{\"a\""), piece(None, ":1}"), Event::finish(FinishReason::ToolCalls)],
        );
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0]["message"]["tool_calls"][0]["function"], json!({"name": "f", "arguments": {"a": 1}}));
        let odd = call(&ToolCall { id: "c".into(), name: "f".into(), arguments: "7".into() });
        assert_eq!(odd["function"]["arguments"], json!({"arguments": "7"}));
    }
}
