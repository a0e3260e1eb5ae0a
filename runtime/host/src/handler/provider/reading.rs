//! A request to a provider, made and read by a thread of its own.
//!
//! The caller waits for that thread's messages and not in its reads, so that neither a name that does not resolve, nor a connection
//! that hangs, nor a silent provider holds a caller who has left.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use serde_json::{Map, Value};
use ureq::http::Response;
use ureq::{Agent, Body, BodyReader};

use super::endpoint::Endpoint;
use super::refusal::{is_timeout, kind_of, words_of};
use crate::handler::context::PATIENCE;
use crate::handler::{Context, Event, HandlerError, Kind};

/// What is asked for: a stream of events.
pub(in crate::handler) const EVENTS: &str = "text/event-stream";
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
pub(in crate::handler) struct Reader(());

impl Reader {
    /// Takes a place.
    ///
    /// # Errors
    /// When all are taken.
    pub(in crate::handler) fn new(endpoint: &Endpoint) -> Result<Self, HandlerError> {
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

/// What the thread tells its caller, as long as that listens.
pub(in crate::handler) struct Teller(SyncSender<Told>);

impl Teller {
    /// Tells that the provider has accepted the request. Returns false if the caller has left.
    pub(in crate::handler) fn taken(&self) -> bool {
        self.0.send(Told::Taken).is_ok()
    }

    /// Tells the events of an answer.
    ///
    /// # Errors
    /// The first that is one of the events.
    pub(in crate::handler) fn all(
        &self,
        answer: impl Iterator<Item = Result<Event, HandlerError>>,
    ) -> Result<(), HandlerError> {
        for event in answer {
            if self.0.send(Told::Event(event?)).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// The events of an answer, as a provider sends them.
pub(in crate::handler) struct Reading {
    told: Receiver<Told>,
    /// Its shutdown ends the thread's waits.
    agent: Option<Agent>,
    context: Context,
}

impl Reading {
    /// Has a thread send a request and tell what comes of it, and waits until the request is accepted.
    ///
    /// # Errors
    /// When it is refused, the provider cannot be reached, or the answer is cancelled.
    pub(in crate::handler) fn begin(
        endpoint: Endpoint,
        context: Context,
        ask: impl FnOnce(&Endpoint, &Agent, &Teller) -> Result<(), HandlerError> + Send + 'static,
    ) -> Result<Self, HandlerError> {
        context.check()?;
        let agent = endpoint.agent(&context);
        let reader = Reader::new(&endpoint)?;
        let (sender, told) = sync_channel(AHEAD);
        let reading = Self { told, agent: Some(agent.clone()), context };
        let words = endpoint.clone();
        let run = move || {
            let (_reader, teller) = (reader, Teller(sender));
            if let Err(error) = ask(&endpoint, &agent, &teller) {
                // The caller may have left.
                let _ = teller.0.send(Told::Failed(error));
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

/// What is said of an answer whose end is missing.
pub(in crate::handler) const BROKE_OFF: &str = "the answer broke off: the connection ended before it did";

/// Makes the error of a read that failed.
pub(in crate::handler) fn unreadable(endpoint: &Endpoint, error: &io::Error) -> HandlerError {
    match error.kind() {
        _ if is_timeout(error) => endpoint.error(
            Kind::Timeout,
            "the answer stopped in the middle: nothing came within read_timeout_s or answer_timeout_s",
        ),
        io::ErrorKind::InvalidData => endpoint.error(Kind::Protocol, &error.to_string()),
        _ => endpoint.error(Kind::Cut, &format!("the answer broke off: {error}")),
    }
}

/// Returns a reader of the body of an answer. It has no limit: every line is bounded, and so is the text by whoever collects it.
///
/// # Errors
/// When the body is encoded in a way that was not asked for.
pub(in crate::handler) fn reader(
    endpoint: &Endpoint,
    response: Response<Body>,
) -> Result<BufReader<BodyReader<'static>>, HandlerError> {
    let coding = response.headers().get("content-encoding").and_then(|coding| coding.to_str().ok());
    if let Some(coding) = coding.filter(|coding| *coding != "identity") {
        let message = format!("it answered with content-encoding {coding}, which was not asked for");
        return Err(endpoint.error(Kind::Protocol, &message));
    }
    Ok(BufReader::new(response.into_body().into_with_config().limit(u64::MAX).reader()))
}

/// Returns the first byte that is neither white space nor of a byte order mark, and leaves it in the reader.
pub(in crate::handler) fn first(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
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

/// Reads an answer that comes in one piece, as far as it came: what is missing is seen where it is read.
///
/// # Errors
/// When it cannot be read, or is longer than an answer may be.
pub(in crate::handler) fn whole(reader: &mut impl BufRead) -> io::Result<String> {
    let mut bytes = Vec::new();
    reader.take(WHOLE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > WHOLE_BYTES_MAX {
        let message = format!("the answer is longer than {} MiB", WHOLE_BYTES_MAX >> 20);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Sends a body to a path below the endpoint's address, with the key as a bearer's.
pub(in crate::handler) fn post(
    endpoint: &Endpoint,
    agent: &Agent,
    path: &str,
    accept: &str,
    body: &Map<String, Value>,
) -> Result<Response<Body>, HandlerError> {
    let bearer = endpoint.api_key.as_ref().map(|key| ("authorization", format!("Bearer {}", key.expose())));
    post_with(endpoint, agent, &format!("{}/{path}", endpoint.base_url.text), accept, bearer.as_slice(), body)
}

/// Sends a body to an address, with some headers.
pub(in crate::handler) fn post_with(
    endpoint: &Endpoint,
    agent: &Agent,
    url: &str,
    accept: &str,
    headers: &[(&str, String)],
    body: &Map<String, Value>,
) -> Result<Response<Body>, HandlerError> {
    let mut post = agent.post(url).header("content-type", "application/json").header("accept", accept);
    for (name, value) in headers {
        post = post.header(*name, value);
    }
    let body = Value::Object(body.clone()).to_string();
    post.send(body.as_bytes()).map_err(|error| endpoint.error(kind_of(&error), &words_of(&error)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::endpoint::BaseUrl;
    use super::*;

    #[test]
    fn an_answer_in_one_piece_that_is_too_long_did_not_break_off() -> Result<(), String> {
        let read = |bytes| whole(&mut BufReader::new(io::repeat(b'x').take(bytes)));
        assert_eq!(read(WHOLE_BYTES_MAX).map(|text| text.len() as u64).ok(), Some(WHOLE_BYTES_MAX));
        let endpoint = Endpoint {
            name: "far".to_owned(),
            base_url: BaseUrl::parse("http://127.0.0.1:1/v1")?,
            model: "m".to_owned(),
            api_key: None,
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(1),
            answer_timeout: Duration::from_secs(1),
        };
        let error = unreadable(&endpoint, &read(WHOLE_BYTES_MAX + 1).expect_err("it is too long"));
        assert_eq!(error.kind, Kind::Protocol);
        Ok(())
    }
}
