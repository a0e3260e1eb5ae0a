//! A provider's stream, read by a thread of its own and made into events.
//!
//! Whoever wants the answer waits beside that thread and not in it: a name that is not found, a connection that does not come, a
//! provider that is silent or sends comments for ever hold nobody who has left.

use std::collections::VecDeque;
use std::io::{self, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body};

use super::endpoint::Endpoint;
use super::refusal::{Refused, is_timeout, kind_of, refusal, words_of};
use crate::handler::context::PATIENCE;
use crate::handler::sse::Events;
use crate::handler::{Context, Event, FinishReason, HandlerError, Kind, Usage, new_id};

/// The field that asks for the usage at the end of a stream.
pub(super) const STREAM_OPTIONS: &str = "stream_options";
/// Events that are read ahead of whoever wants them.
const AHEAD: usize = 16;
/// Threads that read at once. Some may still wait for a connection that nobody wants any more.
const READERS_MAX: usize = 256;

static READERS: AtomicUsize = AtomicUsize::new(0);

/// What the thread tells.
enum Told {
    /// The provider takes the request.
    Taken,
    Event(Event),
    Failed(HandlerError),
}

/// A place among the threads that read.
struct Reader;

impl Reader {
    fn new() -> Option<Self> {
        let one_more = |readers| (readers < READERS_MAX).then_some(readers + 1);
        READERS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok().then_some(Self)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Events of an answer as a provider sends them.
pub(super) struct Reading {
    told: Receiver<Told>,
    /// Shut down, it ends the thread's waits.
    agent: Option<Agent>,
    context: Context,
}

impl Reading {
    /// Sends a request and waits until it is taken.
    ///
    /// # Errors
    /// When it is refused, the provider cannot be reached, or nobody waits any more.
    pub(super) fn begin(
        endpoint: Endpoint,
        agent: Agent,
        mut body: Map<String, Value>,
        usage_refused: Arc<AtomicBool>,
        context: Context,
    ) -> Result<Self, HandlerError> {
        context.check()?;
        let Some(reader) = Reader::new() else {
            let message = format!("{READERS_MAX} requests are under way already");
            return Err(endpoint.error(Kind::Unavailable, &message));
        };
        let (sender, told) = sync_channel(AHEAD);
        let reading = Self { told, agent: Some(agent.clone()), context };
        let words = endpoint.clone();
        let run = move || {
            let _reader = reader;
            if let Err(error) = ask(&endpoint, &agent, &mut body, &usage_refused, &sender) {
                // Nobody may wait any more.
                let _ = sender.send(Told::Failed(error));
            }
        };
        let started = std::thread::Builder::new().name("provider".to_owned()).spawn(run);
        started.map_err(|error| words.error(Kind::Internal, &format!("cannot start a thread: {error}")))?;
        match reading.wait() {
            Some(Told::Taken) => Ok(reading),
            Some(Told::Failed(error)) => Err(error),
            Some(Told::Event(_)) | None => Err(words.error(Kind::Internal, "the thread that reads stopped")),
        }
    }

    /// What is told next; `None` when nothing is any more.
    fn wait(&self) -> Option<Told> {
        loop {
            if let Err(gone) = self.context.check() {
                return Some(Told::Failed(gone));
            }
            match self.told.recv_timeout(PATIENCE) {
                Ok(told) => return Some(told),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn stop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.shutdown();
        }
    }
}

impl Iterator for Reading {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        // An agent that is gone: the answer was.
        self.agent.as_ref()?;
        match self.wait() {
            Some(Told::Event(event)) => Some(Ok(event)),
            Some(Told::Failed(error)) => {
                self.stop();
                Some(Err(error))
            }
            Some(Told::Taken) | None => {
                self.stop();
                None
            }
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks, and tells what comes of it as long as somebody listens.
fn ask(
    endpoint: &Endpoint,
    agent: &Agent,
    body: &mut Map<String, Value>,
    usage_refused: &AtomicBool,
    sender: &SyncSender<Told>,
) -> Result<(), HandlerError> {
    let mut response = post(endpoint, agent, body)?;
    if !response.status().is_success() {
        let refused = refusal(endpoint, response);
        if !refused.of_stream_options || body.get(STREAM_OPTIONS).is_none() {
            return Err(refused.error);
        }
        usage_refused.store(true, Ordering::SeqCst);
        body.remove(STREAM_OPTIONS);
        response = post(endpoint, agent, body)?;
        if !response.status().is_success() {
            return Err(refusal(endpoint, response).error);
        }
    }
    let kind = response.body().mime_type().unwrap_or("nothing");
    if kind != "text/event-stream" {
        return Err(endpoint.error(Kind::Protocol, &format!("it answered with {kind} and not with a stream")));
    }
    if sender.send(Told::Taken).is_err() {
        return Ok(());
    }
    // Any length: what is kept of it is bounded line by line, and its text by whoever puts it together.
    let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
    let mut answer = Answer {
        events: Events::new(BufReader::new(reader)),
        endpoint,
        ready: VecDeque::new(),
        started: false,
        finish: None,
        usage: Usage::default(),
        held: String::new(),
        over: false,
    };
    while !answer.over {
        answer.step()?;
        for event in answer.ready.drain(..) {
            if sender.send(Told::Event(event)).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn post(endpoint: &Endpoint, agent: &Agent, body: &Map<String, Value>) -> Result<Response<Body>, HandlerError> {
    let mut post = agent.post(format!("{}/chat/completions", endpoint.base_url.text));
    post = post.header("content-type", "application/json").header("accept", "text/event-stream");
    if let Some(key) = &endpoint.api_key {
        post = post.header("authorization", format!("Bearer {}", key.expose()));
    }
    let body = Value::Object(body.clone()).to_string();
    post.send(body.as_bytes()).map_err(|error| endpoint.error(kind_of(&error), &words_of(&error)))
}

/// The text of a delta's content: a text, or a list of parts.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// An answer in the middle of being read.
struct Answer<'a, R> {
    events: Events<R>,
    endpoint: &'a Endpoint,
    ready: VecDeque<Event>,
    started: bool,
    finish: Option<FinishReason>,
    usage: Usage,
    /// The end of the text, as long as it may be a part of the key.
    held: String,
    over: bool,
}

impl<R: io::BufRead> Answer<'_, R> {
    /// Reads one event of the stream and makes events of it.
    fn step(&mut self) -> Result<(), HandlerError> {
        let data = match self.events.next() {
            Some(Ok(data)) => data,
            // After the finish nothing is missing but perhaps the usage.
            None | Some(Err(_)) if self.finish.is_some() => {
                self.end();
                return Ok(());
            }
            None => return Err(self.error(Kind::Cut, "the answer broke off: the connection ended before it did")),
            Some(Err(error)) if is_timeout(&error) => {
                return Err(self.error(Kind::Timeout, "the answer stopped in the middle: no further word in time"));
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(self.error(Kind::Protocol, &error.to_string()));
            }
            Some(Err(error)) => return Err(self.error(Kind::Cut, &format!("the answer broke off: {error}"))),
        };
        if data.trim() == "[DONE]" {
            if self.finish.is_none() {
                return Err(self.error(Kind::Cut, "the answer broke off: it is done without a finish_reason"));
            }
            self.end();
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(&data).map_err(|_| self.error(Kind::Protocol, "a piece of the answer is not JSON"))?;
        if chunk.get("error").is_some_and(|error| !error.is_null()) {
            let refused = Refused::read(&chunk);
            return Err(self.error(refused.kind(None, None), refused.words()));
        }
        self.take(&chunk);
        Ok(())
    }

    fn take(&mut self, chunk: &Value) {
        if !self.started {
            self.started = true;
            let text =
                |key: &str| chunk[key].as_str().map(|text| self.endpoint.name_of(text)).filter(|text| !text.is_empty());
            let id = text("id").unwrap_or_else(new_id);
            let model = text("model").unwrap_or_else(|| self.endpoint.model.clone());
            let handler = self.endpoint.name.clone();
            self.ready.push_back(Event::Start { id, model, handler });
        }
        if let Some(usage) = chunk.get("usage").filter(|usage| usage.is_object()) {
            let count = |key: &str| usage[key].as_u64();
            self.usage = Usage { prompt_tokens: count("prompt_tokens"), completion_tokens: count("completion_tokens") };
        }
        let choice = &chunk["choices"][0];
        if self.finish.is_some() {
            return;
        }
        let text = text_of(&choice["delta"]["content"]);
        let text = self.endpoint.content(&mut self.held, &text, false);
        if !text.is_empty() {
            self.ready.push_back(Event::Delta { text });
        }
        // Some send an empty reason with every piece.
        if let Some(reason) = choice["finish_reason"].as_str().filter(|reason| !reason.is_empty()) {
            self.finish = Some(match reason {
                "stop" => FinishReason::Stop,
                "length" => FinishReason::Length,
                "content_filter" => FinishReason::ContentFilter,
                other => FinishReason::Other(self.endpoint.name_of(other)),
            });
        }
    }

    fn end(&mut self) {
        self.over = true;
        let reason = self.finish.take().unwrap_or(FinishReason::Stop);
        let text = self.endpoint.content(&mut self.held, "", true);
        if !text.is_empty() {
            self.ready.push_back(Event::Delta { text });
        }
        self.ready.extend([Event::Finish { reason }, Event::Usage(self.usage)]);
    }

    fn error(&self, kind: Kind, message: &str) -> HandlerError {
        self.endpoint.error(kind, message)
    }
}
