//! The events of the Messages API, made into ours.

use std::collections::{HashMap, VecDeque};
use std::io;

use serde_json::Value;

use crate::handler::provider::Endpoint;
use crate::handler::provider::reading::{BROKE_OFF, unreadable};
use crate::handler::provider::refusal::Refused;
use crate::handler::{Event, FinishReason, HandlerError, Kind, Start, Usage, new_id};

/// An answer that is being read.
pub(super) struct Answer<'a> {
    endpoint: &'a Endpoint,
    /// Tools were offered.
    tools: bool,
    /// Fields that were left out.
    ignored: Vec<String>,
    ready: VecDeque<Event>,
    started: bool,
    finish: Option<FinishReason>,
    usage: Counts,
    /// Blocks that are calls: their number among the calls, by their number among the blocks.
    calls: HashMap<u64, Call>,
    /// The ends of the text and of the reasoning while they may be the beginning of the key.
    held: String,
    held_thought: String,
    over: bool,
}

struct Call {
    index: usize,
    /// What the block began with; pieces replace it.
    input: Option<String>,
    held: String,
}

/// Counts of tokens. What was read from the provider's cache or put there is counted apart.
#[derive(Default)]
struct Counts {
    input: Option<u64>,
    cache_creation: u64,
    cache_read: u64,
    output: Option<u64>,
}

impl Counts {
    /// Takes counts, which are those of the whole answer so far.
    fn take(&mut self, usage: &Value) {
        self.input = usage["input_tokens"].as_u64().or(self.input);
        self.cache_creation = usage["cache_creation_input_tokens"].as_u64().unwrap_or(self.cache_creation);
        self.cache_read = usage["cache_read_input_tokens"].as_u64().unwrap_or(self.cache_read);
        self.output = usage["output_tokens"].as_u64().or(self.output);
    }

    fn whole(&self) -> Usage {
        let cached = self.cache_creation.saturating_add(self.cache_read);
        Usage { prompt_tokens: self.input.map(|input| input.saturating_add(cached)), completion_tokens: self.output }
    }
}

type Item = Result<Event, HandlerError>;

impl<'a> Answer<'a> {
    pub(super) fn new(endpoint: &'a Endpoint, tools: bool, ignored: Vec<String>) -> Self {
        Self {
            endpoint,
            tools,
            ignored,
            ready: VecDeque::new(),
            started: false,
            finish: None,
            usage: Counts::default(),
            calls: HashMap::new(),
            held: String::new(),
            held_thought: String::new(),
            over: false,
        }
    }

    /// Reads an answer that comes as a stream.
    pub(super) fn stream(self, pieces: impl Iterator<Item = io::Result<String>>) -> impl Iterator<Item = Item> {
        Stream { answer: self, pieces }
    }

    /// Reads an answer that comes in one piece, or an error that came too late for a status.
    pub(super) fn whole(mut self, text: &str) -> std::vec::IntoIter<Item> {
        let taken = self.take_whole(text);
        let mut items: Vec<Item> = self.ready.into_iter().map(Ok).collect();
        items.extend(taken.err().map(Err));
        items.into_iter()
    }

    fn take_whole(&mut self, text: &str) -> Result<(), HandlerError> {
        let message: Value = match serde_json::from_str(text) {
            Err(error) if error.is_eof() => return Err(self.error(Kind::Cut, BROKE_OFF)),
            message => message.unwrap_or_default(),
        };
        if let Some(refused) = Refused::of_piece(&message).filter(|_| message["type"] != "message") {
            return Err(self.endpoint.refused(refused.kind(None, None), refused.words(), ""));
        }
        if message["type"] != "message" {
            return Err(self.error(Kind::Protocol, "it answered with JSON that is not a message"));
        }
        self.start(&message);
        for (number, block) in (0..).zip(message["content"].as_array().into_iter().flatten()) {
            self.begin_block(number, block)?;
            self.end_block(number);
        }
        self.stop(&message)?;
        self.end()
    }

    /// Makes events of a piece. Types that are not known are skipped, as the API's versioning asks for.
    fn take(&mut self, piece: &Value) -> Result<(), HandlerError> {
        let number = piece["index"].as_u64().unwrap_or(0);
        match piece["type"].as_str().unwrap_or_default() {
            "message_start" => self.start(&piece["message"]),
            "content_block_start" => self.begin_block(number, &piece["content_block"])?,
            "content_block_delta" => self.take_delta(number, &piece["delta"]),
            "content_block_stop" => self.end_block(number),
            "message_delta" => {
                self.usage.take(&piece["usage"]);
                self.stop(&piece["delta"])?;
            }
            "message_stop" => return self.end(),
            "error" => {
                let refused = Refused::read(piece);
                return Err(self.endpoint.refused(refused.kind(None, None), refused.words(), ""));
            }
            _ => {}
        }
        Ok(())
    }

    fn start(&mut self, message: &Value) {
        self.usage.take(&message["usage"]);
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        let name =
            |key: &str| message[key].as_str().map(|name| self.endpoint.name_of(name)).filter(|name| !name.is_empty());
        let start = Start {
            id: name("id").unwrap_or_else(new_id),
            model: name("model").unwrap_or_else(|| self.endpoint.model.clone()),
            handler: self.endpoint.name.clone(),
            // The API has none.
            fingerprint: None,
            ignored: std::mem::take(&mut self.ignored),
        };
        self.ready.push_back(Event::Start(start));
    }

    fn begin_block(&mut self, number: u64, block: &Value) -> Result<(), HandlerError> {
        match block["type"].as_str().unwrap_or_default() {
            "text" => self.say(block["text"].as_str().unwrap_or_default()),
            "thinking" => self.think(block["thinking"].as_str().unwrap_or_default()),
            "tool_use" if !self.tools => {
                return Err(self.error(Kind::Protocol, "it answered with a tool call, and no tools were offered"));
            }
            "tool_use" => {
                let name = |key: &str| {
                    block[key].as_str().map(|name| self.endpoint.name_of(name)).filter(|name| !name.is_empty())
                };
                let (Some(id), Some(called)) = (name("id"), name("name")) else {
                    return Err(self.error(Kind::Protocol, "a tool call has no id or no name"));
                };
                let index = self.calls.len();
                let (id, name, arguments) = (Some(id), Some(called), String::new());
                self.ready.push_back(Event::ToolCall { choice: 0, index, id, name, arguments });
                let input = Some(&block["input"]).filter(|input| input.is_object()).map(Value::to_string);
                self.calls.insert(number, Call { index, input, held: String::new() });
            }
            _ => {}
        }
        Ok(())
    }

    fn take_delta(&mut self, number: u64, delta: &Value) {
        let text = |key: &str| delta[key].as_str().unwrap_or_default();
        match delta["type"].as_str().unwrap_or_default() {
            "text_delta" => self.say(text("text")),
            "thinking_delta" => self.think(text("thinking")),
            "input_json_delta" => {
                let Some(call) = self.calls.get_mut(&number) else { return };
                let piece = text("partial_json");
                if !piece.is_empty() {
                    call.input = None;
                }
                let arguments = self.endpoint.content(&mut call.held, piece, false);
                argue(&mut self.ready, call.index, arguments);
            }
            _ => {}
        }
    }

    /// Ends a block: what a call began with are its arguments, if no piece came.
    fn end_block(&mut self, number: u64) {
        let Some(call) = self.calls.get_mut(&number) else { return };
        let input = call.input.take().unwrap_or_default();
        let arguments = self.endpoint.content(&mut call.held, &input, true);
        argue(&mut self.ready, call.index, arguments);
    }

    fn stop(&mut self, delta: &Value) -> Result<(), HandlerError> {
        let Some(word) = delta["stop_reason"].as_str() else { return Ok(()) };
        self.finish = Some(match word {
            "end_turn" | "stop_sequence" => FinishReason::Stop,
            "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
            "tool_use" => FinishReason::ToolCalls,
            "refusal" => FinishReason::ContentFilter,
            _ => FinishReason::Other(self.endpoint.name_of(word)),
        });
        if self.started { Ok(()) } else { Err(self.error(Kind::Protocol, "the answer ends before it begins")) }
    }

    fn end(&mut self) -> Result<(), HandlerError> {
        self.over = true;
        let Some(reason) = self.finish.take() else {
            return Err(self.error(Kind::Cut, "the answer broke off: it stopped without a stop_reason"));
        };
        let thought = self.endpoint.content(&mut self.held_thought, "", true);
        if !thought.is_empty() {
            self.ready.push_back(Event::Reasoning { choice: 0, text: thought });
        }
        let text = self.endpoint.content(&mut self.held, "", true);
        if !text.is_empty() {
            self.ready.push_back(Event::text(text));
        }
        self.ready.extend([Event::finish(reason), Event::Usage(self.usage.whole())]);
        Ok(())
    }

    fn say(&mut self, text: &str) {
        let text = self.endpoint.content(&mut self.held, text, false);
        if !text.is_empty() {
            self.ready.push_back(Event::text(text));
        }
    }

    fn think(&mut self, thought: &str) {
        let text = self.endpoint.content(&mut self.held_thought, thought, false);
        if !text.is_empty() {
            self.ready.push_back(Event::Reasoning { choice: 0, text });
        }
    }

    fn error(&self, kind: Kind, message: &str) -> HandlerError {
        self.endpoint.error(kind, message)
    }
}

fn argue(ready: &mut VecDeque<Event>, index: usize, arguments: String) {
    if !arguments.is_empty() {
        ready.push_back(Event::ToolCall { choice: 0, index, id: None, name: None, arguments });
    }
}

struct Stream<'a, I> {
    answer: Answer<'a>,
    pieces: I,
}

impl<I: Iterator<Item = io::Result<String>>> Stream<'_, I> {
    fn step(&mut self) -> Result<(), HandlerError> {
        let answer = &mut self.answer;
        match self.pieces.next() {
            Some(Ok(data)) => match serde_json::from_str(&data) {
                Ok(piece) => answer.take(&piece),
                // The last piece lacks its end.
                Err(error) if error.is_eof() && !matches!(self.pieces.next(), Some(Ok(_))) => {
                    Err(answer.error(Kind::Cut, BROKE_OFF))
                }
                Err(_) => Err(answer.error(Kind::Protocol, "a piece of the answer is not JSON")),
            },
            // Behind its reason nothing but the end is missing.
            None | Some(Err(_)) if answer.finish.is_some() => answer.end(),
            None => Err(answer.error(Kind::Cut, BROKE_OFF)),
            Some(Err(error)) => Err(unreadable(answer.endpoint, &error)),
        }
    }
}

impl<I: Iterator<Item = io::Result<String>>> Iterator for Stream<'_, I> {
    type Item = Item;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.answer.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.answer.over {
                return None;
            }
            if let Err(error) = self.step() {
                self.answer.over = true;
                self.answer.ready.clear();
                return Some(Err(error));
            }
        }
    }
}
