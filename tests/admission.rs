//! Many callers at once, callers who leave or do not read, and providers that do not end: nobody holds the server for the others.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use homeroom::handler::limit::{Limited, Limits};
use homeroom::handler::openai::OpenAi;
use homeroom::handler::{
    Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Request, Secret, Usage,
};
use homeroom::serve::{Bounds, Models, Running, bind, start_with};
use serde_json::{Value, json};

use crate::handlers::{asked, chat_body, local, post, refusal, scripted, serve, settings, stream_of};
use crate::support::{fixture, homeroom};

/// Longest wait for what must come: a guard against hanging, not a bound on speed.
const GUARD: Duration = Duration::from_secs(40);

/// Waits until something holds.
fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + GUARD;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {} s", GUARD.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn limited(handler: impl Handler + 'static, running: usize, waiting: usize) -> Arc<dyn Handler> {
    Arc::new(Limited::new(Arc::new(handler), Limits { running, waiting }))
}

/// A program that ends with the test, however that ends.
struct Ends(std::process::Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a request and leaves the connection open.
fn ask(address: SocketAddr, body: &Value) -> Result<TcpStream> {
    let mut client = TcpStream::connect(address)?;
    client.set_read_timeout(Some(GUARD))?;
    write!(client, "{}", request_text(body))?;
    Ok(client)
}

fn request_text(body: &Value) -> String {
    let body = body.to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// A provider that takes every request and then sends `piece` again and again until nobody listens. Counts those it serves.
fn endless(piece: &'static str) -> Result<(String, Arc<AtomicUsize>, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let (begun, serving) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (seen, open) = (begun.clone(), serving.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let (seen, open) = (seen.clone(), open.clone());
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                seen.fetch_add(1, Ordering::SeqCst);
                open.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(stream_of("").as_bytes());
                let pause = if piece.len() < 1000 { 20 } else { 0 };
                while stream.write_all(piece.as_bytes()).is_ok() {
                    std::thread::sleep(Duration::from_millis(pause));
                }
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    Ok((url, begun, serving))
}

/// Says so many kilobytes at once.
struct Says(usize);

impl Handler for Says {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        let start = Event::start("i", "m", "says");
        let word = || Event::text("x".repeat(1024));
        let end = [Event::finish(FinishReason::Stop), Event::Usage(Usage::default())];
        Ok(Box::new(std::iter::once(start).chain((0..self.0).map(move |_| word())).chain(end).map(Ok)))
    }
}

/// Takes a while before it says anything, and counts who asked.
struct Thinks(Arc<AtomicUsize>, Duration);

impl Handler for Thinks {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let over = Instant::now() + self.1;
        while Instant::now() < over {
            context.check()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Says(1).stream(request, context)
    }
}

fn models(all: Vec<(&str, Arc<dyn Handler>)>) -> Models {
    all.into_iter().map(|(name, handler)| (name.to_owned(), handler)).collect()
}

fn end(server: Running) -> Result<()> {
    server.stop();
    server.wait()
}

#[test]
fn a_class_that_asks_at_once_is_answered_each_as_alone() -> Result<()> {
    let local = local()?;
    let question = |pupil: usize| format!("question number {pupil}");
    let alone: Vec<String> = (0..37)
        .map(|pupil| Ok(local.complete(&asked(&question(pupil), 9), &Context::default())?.text().to_owned()))
        .collect::<Result<_, HandlerError>>()?;
    // Fewer places than pupils, as many as are needed to wait.
    let queued: Arc<dyn Handler> = Arc::new(Limited::new(local, Limits { running: 5, waiting: 32 }));
    let server = serve(models(vec![("m", queued)]))?;
    let at = server.address;
    let pupils: Vec<_> = (0..37)
        .map(|pupil| {
            let messages = json!([{"role": "user", "content": question(pupil)}]);
            let body = chat_body(
                &json!({"model": "m", "messages": messages, "max_tokens": 9, "seed": 1, "stream": pupil % 2 == 1}),
            );
            std::thread::spawn(move || post(at, &body))
        })
        .collect();
    for (pupil, answer) in pupils.into_iter().enumerate() {
        let (status, headers, body) = answer.join().expect("it does not panic")?;
        assert_eq!(status, 200, "{pupil}: {body}");
        assert!(headers.contains("x-homeroom-handler: llama"), "{headers}");
        let text = if pupil % 2 == 1 {
            let chunks = body.lines().filter_map(|line| line.strip_prefix("data: {"));
            let chunks = chunks.map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")));
            let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
        } else {
            let whole: Value = serde_json::from_str(&body)?;
            whole["choices"][0]["message"]["content"].as_str().context("a text")?.to_owned()
        };
        assert_eq!(text, alone[pupil], "{pupil}");
    }
    end(server)
}

#[test]
fn past_the_queue_a_client_is_told_when_to_come_back() -> Result<()> {
    let count = Arc::new(AtomicUsize::new(0));
    let server = serve(models(vec![("m", limited(Thinks(count.clone(), GUARD), 1, 1))]))?;
    let body = chat_body(&json!({"model": "m"}));
    let held = ask(server.address, &body)?;
    until("the first is being answered", || count.load(Ordering::SeqCst) == 1);
    let second = ask(server.address, &body)?;
    // The second waits, unless the third was quicker.
    std::thread::sleep(Duration::from_millis(300));
    for stream in [false, true] {
        let (status, headers, body) = post(server.address, &chat_body(&json!({"model": "m", "stream": stream})))?;
        assert!(status == 503 && headers.contains("retry-after: "), "{status} {headers}");
        assert!(body.contains("\"code\":\"overloaded\"") && body.contains("1 wait"), "{body}");
    }
    drop((held, second));
    end(server)
}

/// Whoever leaves a provider that is silent, or sends comments for ever, gives back the place at once; models here never waited
/// for it.
#[test]
fn callers_who_leave_hold_nothing() -> Result<()> {
    for piece in [": still here\n\n", "data: {\"choices\":[{\"delta\":{\"content\":\"word \"}}]}\n\n", ""] {
        let (url, begun, serving) = endless(if piece.is_empty() { "\n" } else { piece })?;
        let far = OpenAi::new(homeroom::handler::openai::Endpoint { read_timeout: GUARD, ..settings(&url, "m")? });
        let server = serve(models(vec![("far", limited(far, 4, 0)), ("near", local()?)]))?;
        let near = chat_body(&json!({"model": "near"}));
        for stream in [true, false] {
            let before = begun.load(Ordering::SeqCst);
            let body = chat_body(&json!({"model": "far", "stream": stream}));
            let callers = (0..4).map(|_| ask(server.address, &body)).collect::<Result<Vec<_>>>()?;
            until("all are being answered", || begun.load(Ordering::SeqCst) == before + 4);
            assert_eq!(post(server.address, &body)?.0, 503, "every place is taken");
            assert_eq!(post(server.address, &near)?.0, 200, "and none here");
            drop(callers);
            until("the provider is left", || serving.load(Ordering::SeqCst) == 0);
            // The places are free again: the provider is asked. It is left a moment before they are.
            let again = std::cell::RefCell::new(Vec::new());
            until("another is let in", || {
                again.borrow_mut().extend(ask(server.address, &body));
                std::thread::sleep(Duration::from_millis(100));
                begun.load(Ordering::SeqCst) > before + 4
            });
            drop(again);
            until("it is left as well", || serving.load(Ordering::SeqCst) == 0);
        }
        end(server)?;
    }
    Ok(())
}

/// A provider that never takes the connection: nothing listens to what waits in its queue.
#[test]
fn callers_who_leave_while_the_provider_does_not_answer_hold_nothing() -> Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", silent.local_addr()?);
    let settings = settings(&url, "m")?;
    let far = OpenAi::new(homeroom::handler::openai::Endpoint { read_timeout: GUARD, ..settings });
    let handler = limited(far, 1, 0);
    for _ in 0..3 {
        let context = Context::default();
        let asking = {
            let (handler, context) = (handler.clone(), context.clone());
            std::thread::spawn(move || handler.complete(&asked("hi", 5), &context))
        };
        std::thread::sleep(Duration::from_millis(100));
        context.cancel();
        let error = asking.join().expect("it does not panic").expect_err("nobody answered");
        assert_eq!(error.kind, Kind::Cancelled);
    }
    Ok(())
}

#[test]
fn callers_who_do_not_read_hold_no_place() -> Result<()> {
    // More than the system takes for them, less than is made ahead.
    let server = serve(models(vec![("m", limited(Says(900), 2, 0)), ("near", local()?)]))?;
    let body = chat_body(&json!({"model": "m", "stream": true}));
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(ask(server.address, &body)?);
        // Each is let in after those before it, though none reads.
        let deadline = Instant::now() + GUARD;
        while post(server.address, &chat_body(&json!({"model": "m"})))?.0 != 200 {
            assert!(Instant::now() < deadline, "a place is held by a client that does not read");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    assert_eq!(post(server.address, &chat_body(&json!({"model": "near"})))?.0, 200);
    drop(held);
    end(server)
}

#[test]
fn a_client_that_does_not_read_loses_its_connection_and_its_answer() -> Result<()> {
    let (url, begun, serving) = endless(LONG)?;
    let server = start_with(
        models(vec![("far", limited(OpenAi::new(settings(&url, "m")?), 1, 0))]),
        bind("127.0.0.1", 0)?,
        Bounds { unread: Duration::from_millis(500), ..Bounds::default() },
    )?;
    let held = ask(server.address, &chat_body(&json!({"model": "far", "stream": true})))?;
    until("it is being answered", || begun.load(Ordering::SeqCst) == 1);
    until("the provider is left", || serving.load(Ordering::SeqCst) == 0);
    drop(held);
    end(server)
}

/// A long piece of text, so that a provider that sends it without pause soon fills what there is.
const LONG: &str = concat!(
    "data: {\"choices\":[{\"delta\":{\"content\":\"",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789",
    "\"}}]}\n\n"
);

/// Says one word a release.
struct Waits(Arc<Mutex<Receiver<()>>>);

impl Handler for Waits {
    fn stream(&self, _: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let (released, context) = (self.0.clone(), context.clone());
        let start = Event::start("i", "m", "waits");
        let end = [Event::finish(FinishReason::Stop), Event::Usage(Usage::default())];
        let events = std::iter::once(start).chain([Event::text("é")]).chain(end);
        Ok(Box::new(events.map(move |event| {
            while !matches!(event, Event::Usage(_)) && released.lock().expect("no panic").try_recv().is_err() {
                context.check()?;
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(event)
        })))
    }
}

/// Before the first word and between two. An empty line after a ping would be an event without data, at which some clients fail.
#[test]
fn a_stream_that_waits_says_that_it_is_alive_and_no_event_is_empty() -> Result<()> {
    let (release, released) = std::sync::mpsc::channel();
    let bounds =
        Bounds { first_event: Duration::from_millis(50), silence: Duration::from_millis(30), ..Bounds::default() };
    let waits = Arc::new(Waits(Arc::new(Mutex::new(released))));
    let server = start_with(models(vec![("m", waits)]), bind("127.0.0.1", 0)?, bounds)?;
    let mut client = BufReader::new(ask(server.address, &chat_body(&json!({"model": "m", "stream": true})))?);
    let (mut seen, mut pings) = (String::new(), 0);
    while !seen.contains("[DONE]") && client.read_line(&mut seen)? > 0 {
        let line = seen.trim_end_matches('\n').rsplit('\n').next().unwrap_or_default();
        match line {
            ": ping" => pings += 1,
            line if line.starts_with("data: ") => pings = 0,
            _ => continue,
        }
        // The next word comes when two pings came since the last.
        if pings == 2 {
            release.send(())?;
        }
    }
    let waits: Vec<usize> = seen.split("data: ").map(|part| part.matches(": ping\n").count()).collect();
    assert!(waits.len() == 5 && waits[..3].iter().all(|pings| *pings >= 2), "{waits:?} in {seen}");
    assert!(!seen.contains(": ping\n\n") && seen.contains("\"content\":\"é\"") && seen.ends_with("[DONE]\n"), "{seen}");
    end(server)
}

#[test]
fn an_answer_without_end_is_stopped_before_it_fills_the_memory() -> Result<()> {
    let (url, _, serving) = endless(LONG)?;
    let far = OpenAi::new(settings(&url, "m")?);
    let server = serve(models(vec![("far", limited(far, 1, 0))]))?;
    let (status, _, body) = post(server.address, &chat_body(&json!({"model": "far"})))?;
    assert!(status == 502 && body.contains("longer than 8 MiB"), "{status} {body}");
    let (_, _, body) = post(server.address, &chat_body(&json!({"model": "far", "stream": true})))?;
    assert!(body.contains("longer than 8 MiB") && !body.contains("[DONE]"), "{}", body.len());
    until("the provider is left", || serving.load(Ordering::SeqCst) == 0);
    end(server)
}

#[test]
fn an_answer_has_a_time_in_which_it_must_be_whole() -> Result<()> {
    let (url, _, serving) = endless(": still here\n\n")?;
    let endpoint = settings(&url, "m")?;
    let brief = homeroom::handler::openai::Endpoint { answer_timeout: Duration::from_millis(700), ..endpoint };
    let refused = OpenAi::new(brief).complete(&asked("hi", 5), &Context::default()).expect_err("nothing is said");
    assert_eq!(refused.kind, Kind::Timeout, "{refused}");
    until("the provider is left", || serving.load(Ordering::SeqCst) == 0);
    let late = Context::default().within(Duration::ZERO);
    assert_eq!(local()?.complete(&asked("hi", 5), &late).expect_err("it is late").kind, Kind::Timeout);
    Ok(())
}

#[test]
fn half_a_request_is_not_waited_for() -> Result<()> {
    let brief = Duration::from_millis(400);
    let server = start_with(
        models(vec![("m", local()?)]),
        bind("127.0.0.1", 0)?,
        Bounds { headers: brief, body: brief, ..Bounds::default() },
    )?;
    let whole = request_text(&chat_body(&json!({"model": "m"})));
    for sent in ["", "POST /v1/ch", &whole[..60], &whole[..whole.len() - 3]] {
        let mut client = TcpStream::connect(server.address)?;
        client.set_read_timeout(Some(GUARD))?;
        client.write_all(sent.as_bytes())?;
        // The server hangs up, with or without a word.
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{sent:?}: {answer}");
    }
    // A connection that is kept for more requests is none the worse for the same.
    let mut client = ask(server.address, &chat_body(&json!({"model": "m"})))?;
    let mut line = String::new();
    BufReader::new(&client).read_line(&mut line)?;
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest)?;
    end(server)
}

/// Whoever connects and says nothing keeps nobody out.
#[test]
fn a_server_full_of_silent_connections_answers() -> Result<()> {
    // Longer than anybody waits here: that they are closed in time is not what lets others in.
    let bounds = Bounds { connections: 5, headers: 20 * GUARD, ..Bounds::default() };
    let server = start_with(models(vec![("m", local()?)]), bind("127.0.0.1", 0)?, bounds)?;
    let body = chat_body(&json!({"model": "m"}));
    let mut silent = Vec::new();
    for number in 0..23 {
        let mut client = TcpStream::connect(server.address)?;
        client.write_all(if number % 2 == 0 { b"" } else { b"POST /v1/chat" })?;
        silent.push(client);
    }
    for _ in 0..7 {
        assert_eq!(post(server.address, &body)?.0, 200);
    }
    drop(silent);
    end(server)
}

#[test]
fn a_request_behind_another_is_not_computed_for_a_caller_who_left() -> Result<()> {
    let count = Arc::new(AtomicUsize::new(0));
    let server = serve(models(vec![("m", limited(Thinks(count.clone(), GUARD), 1, 0))]))?;
    let one = request_text(&chat_body(&json!({"model": "m"})));
    let mut client = TcpStream::connect(server.address)?;
    client.write_all((one.clone() + &one).as_bytes())?;
    until("the first is being answered", || count.load(Ordering::SeqCst) == 1);
    drop(client);
    // The place is free again long before the first answer would have been whole; the second was never asked for.
    let (deadline, mut held) = (Instant::now() + GUARD, Vec::new());
    while count.load(Ordering::SeqCst) == 1 {
        assert!(Instant::now() < deadline, "the place is not free");
        held.push(ask(server.address, &chat_body(&json!({"model": "m"})))?);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(count.load(Ordering::SeqCst), 2);
    drop(held);
    end(server)
}

#[test]
fn every_answer_says_who_gave_it() -> Result<()> {
    let broken = scripted(vec![refusal(503, "", &json!({"error": {"message": "full"}})); 2])?;
    let far: Arc<dyn Handler> = Arc::new(OpenAi::new(settings(&broken.0, "m")?));
    let route = homeroom::handler::route::Route::new(vec![("far".into(), far), ("near".into(), local()?)]);
    let server = serve(models(vec![("m", Arc::new(route))]))?;
    for stream in [false, true] {
        let (status, headers, body) = post(server.address, &chat_body(&json!({"model": "m", "stream": stream})))?;
        assert!(status == 200 && headers.contains("x-homeroom-handler: llama"), "{headers} {body}");
    }
    end(server)
}

/// What is cut before it is scrubbed shows a part of the key.
#[test]
fn no_part_of_a_key_comes_back_in_any_field() -> Result<()> {
    let key = "sk-proj-abcdefghijklmnopqrstuvwxyz012345";
    let answer = |reply: String| -> Result<Result<homeroom::handler::Completion, HandlerError>> {
        let (url, thread) = scripted(vec![reply])?;
        let api_key = Some(Secret::new(key.into()));
        let far = OpenAi::new(homeroom::handler::openai::Endpoint { api_key, ..settings(&url, "m")? });
        let answer = far.complete(&asked("hi", 5), &Context::default());
        thread.join().expect("the server does not panic");
        Ok(answer)
    };
    let shows = |text: &str| (0..=key.len() - 12).any(|from| text.contains(&key[from..from + 12]));
    for before in (300..420).step_by(7) {
        let message = format!("{}{key}", "x".repeat(before));
        let error = json!({"error": {"message": message, "param": format!("p {key}"), "code": key}});
        let refused = answer(refusal(400, "", &error))?.expect_err("it refused");
        assert!(!shows(&format!("{refused:?}")), "{refused:?}");
        let frame = format!("data: {error}\n\n");
        assert!(!shows(&format!("{:?}", answer(stream_of(&frame))?.expect_err("it refused"))));
    }
    // Cut into pieces of eleven, and hidden by what shows nothing.
    let pieces: String = (0..key.len())
        .step_by(11)
        .map(|from| {
            let piece = &key[from..key.len().min(from + 11)];
            format!("data: {}\n\n", json!({"choices": [{"delta": {"content": piece}}]}))
        })
        .collect();
    let stop = "data: {\"choices\":[{\"delta\":{\"content\":\" sk-\"},\"finish_reason\":\"stop\"}]}\n\n";
    let whole = answer(stream_of(&format!("{pieces}{stop}")))??;
    assert!(
        !shows(whole.text()) && whole.text().starts_with("[key]") && whole.text().ends_with(" sk-"),
        "{}",
        whole.text()
    );
    let hidden: String = key.chars().flat_map(|c| [c, '\u{200b}']).collect();
    let refused = answer(refusal(400, "", &json!({"error": {"message": hidden}})))?.expect_err("it refused");
    assert!(!shows(&format!("{} {refused}", refused.message).replace('\u{200b}', "")), "{refused:?}");
    let chunk = json!({"id": key, "model": format!("m-{key}"), "choices": [{"delta": {"content": format!("say {key}")}, "finish_reason": format!("no: {key}")}]});
    let whole = answer(stream_of(&format!("data: {chunk}\n\ndata: [DONE]\n\n")))??;
    assert!(!shows(&format!("{whole:?}")) && whole.text() == "say [key]", "{whole:?}");
    Ok(())
}

#[test]
fn a_bad_edit_is_told_once_and_shows_its_place() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (config, log) = (directory.path().join("handlers.toml"), directory.path().join("serve.log"));
    let model = fixture("models/llama");
    let good = format!("[handlers.near]\nkind = \"local\"\nmodel = {model:?}\n[routes.r]\nhandlers = [\"near\"]\n");
    std::fs::write(&config, &good)?;
    // A log beside the file: each line in it is a change of the directory.
    let story = || std::fs::read_to_string(&log).unwrap_or_default();
    let mut command = homeroom();
    command.args(["serve", "--port", "0", "--config"]).arg(&config);
    let _child = Ends(command.stderr(Stdio::from(std::fs::File::create(&log)?)).spawn()?);
    until("it serves", || story().contains("serving"));
    std::fs::write(&config, good.replace("kind = \"local\"", "kind = \"lokal\""))?;
    until("the edit is refused", || story().contains("refused"));
    std::thread::sleep(Duration::from_secs(3));
    let told = story();
    assert_eq!(told.matches("refused").count(), 1, "{told}");
    assert!(told.contains("did you mean `local`?") && told.contains("^^^"), "{told}");
    Ok(())
}

/// As editors and other systems leave them: behind a link, with a byte order mark and CRLF, exchanged for another, gone for a moment.
#[cfg(unix)]
#[test]
fn a_file_of_handlers_is_followed_however_it_is_written() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let [link, target, log] =
        ["handlers.toml", "my handlers.txt", "log/serve.log"].map(|name| directory.path().join(name));
    std::fs::create_dir(directory.path().join("log"))?;
    let handler =
        |name: &str| format!("[handlers.{name}]\r\nkind = \"local\"\r\nmodel = {:?}\r\n", fixture("models/llama"));
    std::fs::write(&target, format!("\u{feff}{}", handler("one")))?;
    std::os::unix::fs::symlink("my handlers.txt", &link)?;
    let story = || std::fs::read_to_string(&log).unwrap_or_default();
    let mut command = homeroom();
    command.current_dir(directory.path()).args(["serve", "--port", "0", "--config", "handlers.toml"]);
    let _child = Ends(command.stderr(Stdio::from(std::fs::File::create(&log)?)).spawn()?);
    until("it serves", || story().contains("serving"));
    let first = story();
    assert!(first.contains("model    one") && first.contains("served under its own name"), "{first}");
    assert!(!first.contains("every 2 s"), "{first}");
    // An editor exchanges the file that the link names.
    let replace = |text: &str| -> Result<()> {
        let written = directory.path().join(".my handlers.swp");
        std::fs::write(&written, text)?;
        Ok(std::fs::rename(written, &target)?)
    };
    replace(&(handler("one") + &handler("two")))?;
    until("both are served", || story().contains("handlers.toml: one, two"));
    // An empty file is told and changes nothing.
    replace("")?;
    until("the empty file is refused", || story().contains("refused: handlers.toml: it has no handler"));
    // Nobody writes to the pipe, and the directory is no file: neither is waited for.
    std::fs::remove_file(&target)?;
    assert!(std::process::Command::new("mkfifo").arg(&target).status()?.success());
    until("the pipe is refused", || story().contains("refused: handlers.toml: a device, a pipe or a socket"));
    std::fs::remove_file(&target)?;
    std::fs::create_dir(&target)?;
    until("the directory is refused", || story().contains("refused: handlers.toml: a directory"));
    std::fs::remove_dir(&target)?;
    replace(&handler("three"))?;
    until("the third is served", || story().contains("handlers.toml: three"));
    // The link is exchanged for a file.
    let written = directory.path().join("new");
    std::fs::write(&written, handler("four"))?;
    std::fs::rename(written, &link)?;
    until("the fourth is served", || story().contains("handlers.toml: four"));
    assert_eq!(story().matches("refused").count(), 3, "{}", story());
    Ok(())
}
