//! Every handler against one contract, and the server that they stand behind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use homeroom::handler::config::{Config, Handlers};
use homeroom::handler::local::Local;
use homeroom::handler::openai::{BaseUrl, Endpoint, OpenAi};
use homeroom::handler::route::Route;
use homeroom::handler::{
    Choice, Completion, Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Message, Request, Role,
    Secret, Start, Usage, checked, collect,
};
use homeroom::models::{Answerer, Loaded, ModelRef, Network};
use homeroom::serve::{Models, Running, bind, start};
use homeroom_engine::run::compute::Compute;
use serde_json::{Value, json};

use crate::support::{fixture, homeroom, root};

mod anthropic;
mod cloud;
mod errors;
pub mod faults;
mod program;
mod redaction;
mod requests;
mod routes;
mod server;
mod swap;
mod wrappers;

pub use server::{chat_body, http, post};

fn loaded() -> Result<Loaded> {
    Loaded::load(&ModelRef { name: fixture("models/llama"), ..ModelRef::default() }, Network::Never("a test"))
}

pub fn local() -> Result<Arc<dyn Handler>> {
    Ok(Arc::new(Local::new("llama", Answerer::of(loaded()?, Compute::auto())?)))
}

pub fn endpoint(base_url: &str, model: &str) -> Result<OpenAi> {
    Ok(OpenAi::new(settings(base_url, model)?))
}

pub fn settings(base_url: &str, model: &str) -> Result<Endpoint> {
    Ok(Endpoint {
        base_url: BaseUrl::parse(base_url).map_err(anyhow::Error::msg)?,
        name: "far".into(),
        model: model.into(),
        api_key: Some(Secret::new("sk-test-1234".into())),
        connect_timeout: Duration::from_secs(5),
        read_timeout: Duration::from_millis(1500),
        answer_timeout: Duration::from_secs(60),
    })
}

pub fn asked(text: &str, max_tokens: usize) -> Request {
    Request {
        messages: vec![Message::new(Role::User, text)],
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        seed: Some(1),
        ..Request::default()
    }
}

pub fn serve(models: Models) -> Result<Running> {
    start(models, bind("127.0.0.1", 0)?)
}

/// What every handler promises, whatever is behind it. All are given the same model here, so their answers are equal.
fn keeps_the_contract(handler: &dyn Handler) -> Result<Completion> {
    let context = Context::default();
    let whole = handler.complete(&asked("hello there", 12), &context)?;
    assert!(!whole.start.id.is_empty() && !whole.start.model.is_empty());
    assert_eq!(whole.finish(), &FinishReason::Length);
    assert_eq!(whole.usage.completion_tokens, Some(12));
    assert!(whole.usage.prompt_tokens > Some(5), "{:?}", whole.usage);
    assert_eq!(handler.complete(&asked("hello there", 12), &context)?.text(), whole.text(), "greedy answers are equal");

    // The text of a stop is not in the answer, and neither is what follows it.
    let middle = whole.text().char_indices().nth(4).context("some letters")?.0;
    let stop = whole.text()[middle..].chars().take(3).collect::<String>();
    let stopped = handler.complete(&Request { stop: vec![stop.clone()], ..asked("hello there", 12) }, &context)?;
    assert_eq!(stopped.finish(), &FinishReason::Stop);
    assert_eq!(Some(stopped.text()), whole.text().split(stop.as_str()).next());

    // Seeds decide.
    let drawn = |seed| {
        let request = Request { temperature: Some(1.5), top_p: Some(0.95), seed: Some(seed), ..asked("hello", 12) };
        handler.complete(&request, &context).map(|whole| whole.text().to_owned())
    };
    assert_eq!(drawn(-7)?, drawn(-7)?);
    assert_ne!(drawn(7)?, drawn(8)?);

    // A conversation that does not fit is refused as such, before the first word.
    let long = asked(&"many words ".repeat(200), 5);
    assert_eq!(handler.complete(&long, &context).expect_err("too long").kind, Kind::ContextLength);

    // Nothing comes after a cancellation.
    let context = Context::default();
    let mut events = checked(handler.stream(&asked("hello there", 200), &context)?);
    assert!(matches!(events.next(), Some(Ok(Event::Start(_)))));
    context.cancel();
    let rest: Vec<_> = events.collect();
    let last = rest.last().context("an item")?;
    assert_eq!(last.as_ref().expect_err("it was cancelled").kind, Kind::Cancelled);
    assert!(rest.len() < 150, "{} events after cancelling", rest.len());
    Ok(whole)
}

/// Who says a temperature knows what they want; who says nothing gets a draw that suits small models.
#[test]
fn a_draw_that_nobody_describes_keeps_to_what_is_likely() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    let drawn = |temperature, top_p| {
        let request = Request { temperature, top_p, ..asked("hello", 40) };
        local.complete(&request, &context).map(|whole| whole.text().to_owned())
    };
    assert_eq!(drawn(None, None)?, drawn(Some(0.7), Some(0.9))?);
    assert_eq!(drawn(Some(0.7), None)?, drawn(Some(0.7), Some(1.0))?);
    assert_ne!(drawn(None, None)?, drawn(None, Some(1.0))?);
    Ok(())
}

#[test]
fn all_handlers_keep_one_contract_and_say_the_same() -> Result<()> {
    let local = local()?;
    let here = keeps_the_contract(local.as_ref())?;
    let server = serve(Models::from([("llama".into(), local.clone())]))?;
    let far: Arc<dyn Handler> = Arc::new(endpoint(&server.url(), "llama")?);
    let there = keeps_the_contract(far.as_ref())?;
    let route = Route::new(vec![("far".into(), far), ("near".into(), local)]);
    let routed = keeps_the_contract(&route)?;
    assert_eq!((there.text(), there.usage), (here.text(), here.usage));
    assert_eq!((routed.text(), routed.usage), (here.text(), here.usage));
    server.stop();
    server.wait()
}

/// Two answers at once advance by turns and do not touch each other.
#[test]
fn answers_that_run_at_once_are_as_alone() -> Result<()> {
    let handler = local()?;
    let (a, b) = (asked("one", 10), asked("quite another thing", 10));
    let context = Context::default();
    let alone = [handler.complete(&a, &context)?, handler.complete(&b, &context)?];
    let mut streams = [handler.stream(&a, &context)?, handler.stream(&b, &context)?];
    let mut seen: [Vec<_>; 2] = [Vec::new(), Vec::new()];
    while seen.iter().any(|events| !matches!(events.last(), Some(Ok(Event::Usage(_))))) {
        for (stream, seen) in streams.iter_mut().zip(&mut seen) {
            seen.extend(stream.next());
        }
    }
    let together = seen.map(|events| collect(Box::new(events.into_iter())).map(|whole| whole.text().to_owned()));
    assert_eq!(together, alone.map(|whole| Ok(whole.text().to_owned())));
    Ok(())
}

// A server that says what it is told to.

/// Answers each connection with the next text, as it stands, and closes. Returns the requests it got.
pub fn scripted(replies: Vec<String>) -> Result<(String, std::thread::JoinHandle<Vec<String>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let thread = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for reply in replies {
            let Ok((mut stream, _)) = listener.accept() else { break };
            requests.push(read_request(&stream).unwrap_or_default());
            let (now, silent) = reply.strip_suffix("<silence>").map_or((reply.as_str(), false), |now| (now, true));
            let _ = stream.write_all(now.as_bytes());
            let _ = stream.flush();
            if silent {
                std::thread::sleep(Duration::from_secs(3));
            }
        }
        requests
    });
    Ok((url, thread))
}

pub fn read_request(stream: &TcpStream) -> Result<String> {
    let mut reader = BufReader::new(stream);
    let (mut text, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        text.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(text + "\r\n" + &String::from_utf8(body)?)
}

pub fn stream_of(frames: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{frames}")
}

pub fn refusal(status: u16, headers: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "HTTP/1.1 {status} No\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
}

/// Fails in its own way, and counts how often it was asked.
struct Fails {
    before: Vec<Event>,
    error: HandlerError,
    asked: Arc<AtomicUsize>,
}

impl Handler for Fails {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.before.is_empty() {
            return Err(self.error.clone());
        }
        let events: Vec<_> = self.before.iter().cloned().map(Ok).chain([Err(self.error.clone())]).collect();
        Ok(Box::new(events.into_iter()))
    }
}
