//! A request to a provider, made and read by a thread of its own.
//!
//! The caller waits for that thread's messages and not in its reads, so that neither a name that does not resolve, nor a connection
//! that hangs, nor a silent provider holds a caller who has left.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body};

use super::answer::{Answer, unreadable};
use super::endpoint::Endpoint;
use super::piece::choice;
use super::refusal::{Refused, kind_of, refusal, words_of};
use crate::handler::context::PATIENCE;
use crate::handler::sse::Events;
use crate::handler::{Context, Event, HandlerError, Kind};

/// The field that asks for the usage at the end of a stream.
pub(super) const STREAM_OPTIONS: &str = "stream_options";
/// Where conversations are sent, and what is asked for.
const CHAT: &str = "chat/completions";
const EVENTS: &str = "text/event-stream";
/// Events that are read ahead of the caller.
const AHEAD: usize = 16;
/// Longest answer that does not come as a stream, in bytes.
const WHOLE_BYTES_MAX: u64 = 16 << 20;
/// Most threads at once. Some of them may still wait for a connection that nobody wants any longer.
const READERS_MAX: usize = 256;

/// The bytes of U+FEFF. Neither JSON nor an event begins with one of them otherwise.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

static READERS: AtomicUsize = AtomicUsize::new(0);

/// A message of the thread.
enum Told {
    /// The provider has accepted the request.
    Taken,
    Event(Event),
    Failed(HandlerError),
}

/// A place among the threads.
pub(super) struct Reader(());

impl Reader {
    /// Takes a place.
    ///
    /// # Errors
    /// When all are taken.
    pub(super) fn new(endpoint: &Endpoint) -> Result<Self, HandlerError> {
        let one_more = |readers| (readers < READERS_MAX).then_some(readers + 1);
        let taken = READERS.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more);
        taken.map(|_| Self(())).map_err(|_| {
            let message = format!("{READERS_MAX} requests to providers are under way already");
            endpoint.error(Kind::Unavailable, &message)
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The events of an answer, as a provider sends them.
pub(super) struct Reading {
    told: Receiver<Told>,
    /// Its shutdown ends the thread's waits.
    agent: Option<Agent>,
    context: Context,
}

impl Reading {
    /// Sends a request and waits until it is accepted.
    ///
    /// # Errors
    /// When it is refused, the provider cannot be reached, or the answer is cancelled.
    pub(super) fn begin(
        endpoint: Endpoint,
        agent: Agent,
        mut body: Map<String, Value>,
        usage_refused: Arc<AtomicBool>,
        context: Context,
    ) -> Result<Self, HandlerError> {
        context.check()?;
        let reader = Reader::new(&endpoint)?;
        let (sender, told) = sync_channel(AHEAD);
        let reading = Self { told, agent: Some(agent.clone()), context };
        let words = endpoint.clone();
        let run = move || {
            let _reader = reader;
            if let Err(error) = ask(&endpoint, &agent, &mut body, &usage_refused, &sender) {
                // The caller may have left.
                let _ = sender.send(Told::Failed(error));
            }
        };
        let started = std::thread::Builder::new().name("provider".to_owned()).spawn(run);
        started.map_err(|error| words.error(Kind::Internal, &format!("cannot start a thread: {error}")))?;
        match reading.wait() {
            Some(Told::Taken) => Ok(reading),
            Some(Told::Failed(error)) => Err(error),
            Some(Told::Event(_)) | None => Err(words.error(Kind::Internal, "the thread that reads the answer stopped")),
        }
    }

    /// Waits for the next message; `None` after the last.
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
        // Without an agent, the answer is over.
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

/// Sends the request and passes the answer on, as long as the caller listens.
fn ask(
    endpoint: &Endpoint,
    agent: &Agent,
    body: &mut Map<String, Value>,
    usage_refused: &AtomicBool,
    sender: &SyncSender<Told>,
) -> Result<(), HandlerError> {
    let mut response = post(endpoint, agent, CHAT, EVENTS, body)?;
    if !response.status().is_success() {
        let refused = refusal(endpoint, response);
        if !refused.of_stream_options || body.get(STREAM_OPTIONS).is_none() {
            return Err(refused.error);
        }
        usage_refused.store(true, Ordering::SeqCst);
        body.remove(STREAM_OPTIONS);
        response = post(endpoint, agent, CHAT, EVENTS, body)?;
        if !response.status().is_success() {
            return Err(refusal(endpoint, response).error);
        }
    }
    let coding = response.headers().get("content-encoding").and_then(|coding| coding.to_str().ok());
    if let Some(coding) = coding.filter(|coding| *coding != "identity") {
        return Err(endpoint
            .error(Kind::Protocol, &format!("it answered with content-encoding {coding}, which was not asked for")));
    }
    if sender.send(Told::Taken).is_err() {
        return Ok(());
    }
    // No limit: every line is bounded, and so is the text by whoever collects it.
    let mut reader = BufReader::new(response.into_body().into_with_config().limit(u64::MAX).reader());
    // Its first character tells what it is; its content-type is often wrong.
    let first = first(&mut reader).map_err(|error| unreadable(endpoint, &error))?;
    match first {
        Some(b'<') => {
            let message = "it answered with a web page; is base_url the address without /chat/completions, often with /v1 at its end?";
            Err(endpoint.error(Kind::Protocol, message))
        }
        // An answer in one piece, or an error that came too late for a status.
        Some(b'{' | b'[') => {
            let mut text = String::new();
            let read = reader.take(WHOLE_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|error| unreadable(endpoint, &error))?;
            let whole: Option<Value> = serde_json::from_str(&text).ok();
            let has_text = |choice: &Value| ["message", "delta", "text"].iter().any(|field| !choice[*field].is_null());
            let is_answer = |whole: &Value| has_text(choice(whole)) || Refused::of_piece(whole).is_some();
            if !whole.as_ref().is_some_and(is_answer) {
                return Err(endpoint.error(Kind::Protocol, "it answered with JSON that is not an answer"));
            }
            tell(Answer::whole(endpoint, std::iter::once(Ok(text))), sender)
        }
        _ => tell(Answer::new(endpoint, Events::new(reader)), sender),
    }
}

/// Returns the first byte that is neither white space nor of a byte order mark, and leaves it in the reader.
fn first(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let bytes = reader.fill_buf()?;
        let white =
            bytes.iter().take_while(|byte| byte.is_ascii_whitespace() || BYTE_ORDER_MARK.contains(byte)).count();
        let first = bytes.get(white).copied();
        let is_over = bytes.is_empty();
        reader.consume(white);
        if first.is_some() || is_over {
            return Ok(first);
        }
    }
}

fn tell(
    answer: impl Iterator<Item = Result<Event, HandlerError>>,
    sender: &SyncSender<Told>,
) -> Result<(), HandlerError> {
    for event in answer {
        if sender.send(Told::Event(event?)).is_err() {
            break;
        }
    }
    Ok(())
}

/// Sends a body to a path below the endpoint's address.
pub(super) fn post(
    endpoint: &Endpoint,
    agent: &Agent,
    path: &str,
    accept: &str,
    body: &Map<String, Value>,
) -> Result<Response<Body>, HandlerError> {
    let mut post = agent.post(format!("{}/{path}", endpoint.base_url.text));
    post = post.header("content-type", "application/json").header("accept", accept);
    if let Some(key) = &endpoint.api_key {
        post = post.header("authorization", format!("Bearer {}", key.expose()));
    }
    let body = Value::Object(body.clone()).to_string();
    post.send(body.as_bytes()).map_err(|error| endpoint.error(kind_of(&error), &words_of(&error)))
}
