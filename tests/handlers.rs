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
    Completion, Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Message, Request, Role, Secret,
    Usage, checked, collect,
};
use homeroom::models::{Loaded, ModelRef};
use homeroom::serve::{Models, Running, bind, start};
use homeroom_engine::block::Compute;
use serde_json::{Value, json};

use crate::support::{fixture, homeroom, root};

fn loaded() -> Result<Loaded> {
    Loaded::load(&ModelRef { name: fixture("models/llama"), ..ModelRef::default() })
}

pub fn local() -> Result<Arc<dyn Handler>> {
    Ok(Arc::new(Local::new("llama", loaded()?, Compute::auto())))
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
        max_tokens_param: "max_tokens".into(),
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
    assert!(!whole.id.is_empty() && !whole.model.is_empty());
    assert_eq!(whole.finish, FinishReason::Length);
    assert_eq!(whole.usage.completion_tokens, Some(12));
    assert!(whole.usage.prompt_tokens > Some(5), "{:?}", whole.usage);
    assert_eq!(handler.complete(&asked("hello there", 12), &context)?.text, whole.text, "greedy answers are equal");

    // The text of a stop is not in the answer, and neither is what follows it.
    let middle = whole.text.char_indices().nth(4).context("some letters")?.0;
    let stop = whole.text[middle..].chars().take(3).collect::<String>();
    let stopped = handler.complete(&Request { stop: vec![stop.clone()], ..asked("hello there", 12) }, &context)?;
    assert_eq!(stopped.finish, FinishReason::Stop);
    assert_eq!(Some(stopped.text.as_str()), whole.text.split(stop.as_str()).next());

    // Seeds decide.
    let drawn = |seed| {
        let request = Request { temperature: Some(1.5), top_p: Some(0.95), seed: Some(seed), ..asked("hello", 12) };
        handler.complete(&request, &context).map(|whole| whole.text)
    };
    assert_eq!(drawn(-7)?, drawn(-7)?);
    assert_ne!(drawn(7)?, drawn(8)?);

    // A conversation that does not fit is refused as such, before the first word.
    let long = asked(&"many words ".repeat(200), 5);
    assert_eq!(handler.complete(&long, &context).expect_err("too long").kind, Kind::ContextLength);

    // Nothing comes after a cancellation.
    let context = Context::default();
    let mut events = checked(handler.stream(&asked("hello there", 200), &context)?);
    assert!(matches!(events.next(), Some(Ok(Event::Start { .. }))));
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
        local.complete(&request, &context).map(|whole| whole.text)
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
    assert_eq!((&there.text, there.usage), (&here.text, here.usage));
    assert_eq!((&routed.text, routed.usage), (&here.text, here.usage));
    server.stop();
    server.wait()
}

/// Two answers at once advance by turns and do not touch each other.
#[test]
fn answers_that_run_at_once_are_as_alone() -> Result<()> {
    let handler = local()?;
    let (a, b) = (asked("one", 10), asked("quite another thing", 10));
    let context = Context::default();
    let alone = [handler.complete(&a, &context)?.text, handler.complete(&b, &context)?.text];
    let mut streams = [handler.stream(&a, &context)?, handler.stream(&b, &context)?];
    let mut seen: [Vec<_>; 2] = [Vec::new(), Vec::new()];
    while seen.iter().any(|events| !matches!(events.last(), Some(Ok(Event::Usage(_))))) {
        for (stream, seen) in streams.iter_mut().zip(&mut seen) {
            seen.extend(stream.next());
        }
    }
    let together = seen.map(|events| collect(Box::new(events.into_iter())).map(|whole| whole.text));
    assert_eq!(together, alone.map(Ok));
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

fn told(reply: String) -> Result<Result<Completion, HandlerError>> {
    let (url, thread) = scripted(vec![reply])?;
    let answer = endpoint(&url, "m")?.complete(&asked("hi", 5), &Context::default());
    thread.join().expect("the server does not panic");
    Ok(answer)
}

#[test]
fn streams_of_many_dialects_are_read() -> Result<()> {
    let stop = r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#;
    let plain = told(stream_of(&format!(
        ": hello\r\n\r\nevent: x\r\ndata: {{\"id\":\"i\",\"model\":\"n\",\r\ndata: \"choices\":[{{\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}}}}]}}\r\n\r\n\
         data:{{\"choices\":[{{\"delta\":{{\"content\":\"a\"}}}}]}}\r\n\r\n: ping\r\n\r\ndata: {{\"choices\":[{{\"delta\":{{\"content\":\"é🦊\"}},\"finish_reason\":null}}]}}\r\n\r\n\
         data: {stop}\r\n\r\ndata: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":3,\"completion_tokens\":2}}}}\r\n\r\ndata: [DONE]\r\n\r\n"
    )))??;
    let usage = Usage { prompt_tokens: Some(3), completion_tokens: Some(2) };
    let (id, model, handler) = ("i".to_owned(), "n".to_owned(), "far".to_owned());
    assert_eq!(plain, Completion { id, model, handler, text: "aé🦊".into(), finish: FinishReason::Stop, usage });
    // No id, no model, no usage, no [DONE], no last empty line: still whole, and the usage is not known.
    let bare =
        told(stream_of(&format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"a\"}}}}]}}\n\ndata: {stop}")))??;
    assert_eq!((bare.text.as_str(), bare.usage, bare.model.as_str()), ("a", Usage::default(), "m"));
    Ok(())
}

#[test]
fn what_a_provider_refuses_has_a_kind() -> Result<()> {
    let error = |code: &str| json!({"error": {"message": "no: sk-test-1234", "type": "t", "param": "p", "code": code}});
    let (after, seconds) = ("retry-after: 7\r\n", Duration::from_secs(7));
    let limited = |retry_after| Kind::RateLimited { retry_after };
    let invalid = |param: &str| Kind::InvalidRequest { param: Some(param.into()) };
    for (status, headers, code, kind) in [
        (400, "", "x", invalid("p")),
        (400, "", "context_length_exceeded", Kind::ContextLength),
        (401, "", "x", Kind::Authentication),
        (402, "", "x", limited(None)),
        (403, "", "x", Kind::Authentication),
        (404, "", "model_not_found", Kind::NotFound),
        (408, "", "x", Kind::Timeout),
        (409, "", "x", Kind::Unavailable),
        (413, "", "x", invalid("p")),
        (429, after, "x", limited(Some(seconds))),
        (429, "retry-after: 0.5\r\n", "x", limited(Some(Duration::from_millis(500)))),
        (429, "retry-after: 9\r\nretry-after-ms: 7000\r\n", "x", limited(Some(seconds))),
        (429, "retry-after: -1\r\n", "x", limited(None)),
        (429, "retry-after: nan\r\n", "x", limited(None)),
        (429, "retry-after: soon\r\n", "x", limited(None)),
        (429, "retry-after: 1e9\r\n", "x", limited(Some(Duration::from_secs(3600)))),
        (429, "retry-after: Wed, 21 Oct 2015 07:28:00 GMT\r\n", "x", limited(Some(Duration::ZERO))),
        (429, "retry-after: Tue, 31 Dec 2999 23:59:59 GMT\r\n", "x", limited(Some(Duration::from_secs(3600)))),
        (500, "", "x", Kind::Unavailable),
        (503, "", "x", Kind::Unavailable),
        (503, after, "x", Kind::Overloaded { retry_after: seconds }),
        (529, "", "x", Kind::Unavailable),
        (307, "location: http://example.com/\r\n", "x", Kind::Protocol),
    ] {
        let refused = told(refusal(status, headers, &error(code)))?.expect_err("it refused");
        assert_eq!(refused.kind, kind, "{status} {headers} {code}: {refused}");
        assert!(!refused.message.contains("sk-test"), "{refused}");
    }
    Ok(())
}

/// As their servers write them.
#[test]
fn what_a_provider_refuses_is_told_in_its_own_words() -> Result<()> {
    let invalid = |param: Option<&str>| Kind::InvalidRequest { param: param.map(str::to_owned) };
    let place = json!([{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]);
    let told_place = "top_k: Extra inputs are not permitted";
    for (status, body, kind, words) in [
        // Gemini, FastAPI, Mistral, Cloudflare, Ollama, vLLM, Anthropic.
        (
            400,
            json!([{"error": {"code": 400, "message": "Unknown name \"top_k\"", "status": "INVALID_ARGUMENT"}}]),
            invalid(None),
            "Unknown name",
        ),
        (422, json!({"detail": place}), invalid(Some("top_k")), told_place),
        (
            422,
            json!({"object": "error", "message": {"detail": place}, "type": "invalid_request_error", "code": null}),
            invalid(Some("top_k")),
            told_place,
        ),
        (
            400,
            json!({"success": false, "errors": [{"code": 7003, "message": "Could not route to it"}]}),
            invalid(None),
            "Could not route",
        ),
        (500, json!({"error": "the model runner stopped"}), Kind::Unavailable, "model runner"),
        (
            400,
            json!({"object": "error", "message": "This model's maximum context length is 4096 tokens", "code": 400}),
            Kind::ContextLength,
            "4096",
        ),
        (
            400,
            json!({"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}}),
            Kind::ContextLength,
            "9 > 8",
        ),
        (
            429,
            json!({"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "free tier is full"}}}),
            Kind::RateLimited { retry_after: None },
            "free tier",
        ),
        (
            400,
            json!({"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}),
            invalid(Some("max_tokens")),
            "set max_tokens_param = \"max_completion_tokens\"",
        ),
        (500, json!({}), Kind::Unavailable, "gave no reason (status 500)"),
    ] {
        let refused = told(refusal(status, "", &body))?.expect_err("it refused");
        assert!(refused.kind == kind && refused.message.contains(words), "{body}: {refused:?}");
    }
    let raw = |status: &str, text: &str| {
        told(format!(
            "HTTP/1.1 {status} No\r\ncontent-length: {}\r\nconnection: close\r\n{text}",
            text.split_once("\r\n\r\n").map_or(0, |(_, body)| body.len())
        ))
    };
    let page = "content-type: text/html\r\n\r\n<!doctype html><html>\n<head><title>502 Bad Gateway</title></head>";
    for (status, text, kind, words) in [
        ("502", page, Kind::Unavailable, "/v1: 502 Bad Gateway (status 502)"),
        ("502", "content-type: text/html\r\n\r\n<html>", Kind::Unavailable, "gave no reason"),
        (
            "404",
            "content-type: text/plain\r\n\r\n\n404 page not found\n",
            Kind::NotFound,
            "404 page not found (status 404)",
        ),
        (
            "307",
            "location: https://api.example.com/v1/x\r\n\r\n",
            Kind::Protocol,
            "redirects to https://api.example.com/v1/x",
        ),
        // What comes with 200 and is no answer.
        ("200", "content-type: text/html\r\n\r\n<html>sign in</html>", Kind::Protocol, "a web page"),
        ("200", "content-type: application/json\r\n\r\n{}", Kind::Protocol, "not an answer"),
        ("200", "content-type: application/json\r\n\r\n{\"choices\":[],\"usage\":{}}", Kind::Protocol, "not an answer"),
        ("200", "content-type: application/json\r\n\r\n{\"choices\":[{\"mess", Kind::Protocol, "not an answer"),
        ("200", "content-type: text/plain\r\n\r\nOllama is running", Kind::Cut, "connection ended"),
        (
            "200",
            "content-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n\u{1f}",
            Kind::Protocol,
            "content-encoding gzip",
        ),
        (
            "200",
            "content-type: text/event-stream\r\n\r\n\n{\"error\":{\"message\":\"full\",\"code\":503}}",
            Kind::Unavailable,
            "full",
        ),
        (
            "200",
            "content-type: application/json\r\n\r\n{\"error\":{\"message\":\"slow down\",\"code\":429}}",
            Kind::RateLimited { retry_after: None },
            "slow down",
        ),
        ("204", "\r\n", Kind::Cut, "connection ended"),
    ] {
        let refused = raw(status, text)?.expect_err("it is no answer");
        assert!(refused.kind == kind && refused.message.contains(words), "{text}: {refused:?}");
    }
    let (url, thread) = scripted(vec![refusal(404, "", &json!(null))])?;
    let lost = endpoint(url.trim_end_matches("/v1"), "m")?.complete(&asked("hi", 5), &Context::default());
    assert!(lost.expect_err("it is elsewhere").message.contains("may lack a /v1"));
    thread.join().expect("the server does not panic");
    Ok(())
}

/// Some do not stream, and some say something else of a stream than that it is one.
#[test]
fn an_answer_is_read_whatever_its_headers_call_it() -> Result<()> {
    let whole = json!({
        "id": "w", "object": "chat.completion", "model": "n",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "é🦊"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    });
    let stream =
        "data: {\"choices\":[{\"delta\":{\"content\":\"é🦊\"},\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n";
    for body in [whole.to_string(), format!("\n{whole:#}\n"), stream.to_owned(), format!("\r\n\r\n: hello\n\n{stream}")]
    {
        for kind in ["text/event-stream", "Text/Event-Stream; charset=UTF-8", "application/json", "text/plain", "x"] {
            let reply = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}");
            let answer = told(reply)??;
            assert_eq!((answer.text.as_str(), answer.finish), ("é🦊", FinishReason::Length), "{kind}: {body}");
        }
    }
    Ok(())
}

#[test]
fn a_whole_answer_needs_no_reason_and_loses_no_text() -> Result<()> {
    for choice in [
        r#"{"index":0,"message":{"content":"é🦊"},"finish_reason":null}"#,
        r#"{"index":0,"message":{"content":"é🦊"},"finish_reason":""}"#,
        r#"{"message":{"content":{"type":"text","text":"é🦊"}}}"#,
        r#"{"index":0,"text":"é🦊","finish_reason":"stop"}"#,
        r#"{"index":1,"message":{"content":"x"},"finish_reason":"length"},{"index":0,"message":{"content":["é","🦊"]}}"#,
    ] {
        for mark in ["", "\u{feff}", "\r\n\u{feff}"] {
            let reply = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{mark}{{\"choices\":[{choice}]}}"
            );
            let answer = told(reply)??;
            assert_eq!((answer.text.as_str(), answer.finish), ("é🦊", FinishReason::Stop), "{choice}");
        }
    }
    for choice in [
        r#"{"index":0}"#,
        r#"{"index":0,"message":{"content":5},"finish_reason":"stop"}"#,
        r#"{"index":1,"message":{"content":"a"},"finish_reason":"stop"}"#,
        r#"{"index":0,"message":"a","finish_reason":"stop"}"#,
    ] {
        let reply = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{{\"choices\":[{choice}]}}");
        assert_eq!(told(reply)?.expect_err(choice).kind, Kind::Protocol, "{choice}");
    }
    Ok(())
}

#[test]
fn an_answer_that_breaks_off_is_never_whole() -> Result<()> {
    let word = "data: {\"choices\":[{\"delta\":{\"content\":\"half\"}}]}\n\n";
    for (frames, kind) in [
        (word.to_owned(), Kind::Cut),
        (String::new(), Kind::Cut),
        (format!("{word}data: [DONE]\n\n"), Kind::Cut),
        (format!("{word}data: {{\"choi"), Kind::Protocol),
        (format!("{word}data: {{\"error\":{{\"message\":\"overloaded\",\"code\":503}}}}\n\n"), Kind::Unavailable),
        (
            "data: {\"error\":{\"message\":\"slow\",\"type\":\"rate_limit_error\"}}\n\n".to_owned(),
            Kind::RateLimited { retry_after: None },
        ),
        (format!("{word}<silence>"), Kind::Timeout),
        ("<silence>".to_owned(), Kind::Timeout),
    ] {
        let error = told(stream_of(&frames))?.expect_err("it broke off");
        assert_eq!(error.kind, kind, "{frames:?}: {error}");
    }
    let chunked = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{word}",
        word.len()
    );
    assert_eq!(told(chunked)?.expect_err("it broke off").kind, Kind::Cut);
    let nobody = endpoint("http://127.0.0.1:1/v1", "m")?.complete(&asked("hi", 5), &Context::default());
    assert_eq!(nobody.expect_err("nobody listens").kind, Kind::Unavailable);
    Ok(())
}

#[test]
fn a_request_is_what_the_user_said_and_no_more() -> Result<()> {
    let (url, thread) = scripted(vec![stream_of("data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n"); 2])?;
    let handler = endpoint(&url, "m")?;
    handler.complete(
        &Request {
            messages: vec![Message::new(Role::Developer, "Kurz."), Message::new(Role::User, "hi")],
            ..Request::default()
        },
        &Context::default(),
    )?;
    handler.complete(&Request { stop: vec!["x".into()], ..asked("hi", 5) }, &Context::default())?;
    let requests = thread.join().expect("the server does not panic");
    let body = |request: &str| -> Result<Value> {
        Ok(serde_json::from_str(request.split("\r\n\r\n").last().context("a body")?)?)
    };
    let messages = json!([{"role": "system", "content": "Kurz."}, {"role": "user", "content": "hi"}]);
    let mut want =
        json!({"model": "m", "messages": messages, "stream": true, "stream_options": {"include_usage": true}});
    assert_eq!(body(&requests[0])?, want);
    want["messages"] = json!([{"role": "user", "content": "hi"}]);
    for (field, value) in
        [("max_tokens", json!(5)), ("temperature", json!(0.0)), ("seed", json!(1)), ("stop", json!(["x"]))]
    {
        want[field] = value;
    }
    assert_eq!(body(&requests[1])?, want);
    assert!(requests[0].starts_with("POST /v1/chat/completions HTTP/1.1"), "{}", requests[0]);
    assert!(requests[0].to_lowercase().contains("authorization: bearer sk-test-1234"));
    Ok(())
}

/// Some servers refuse what they do not know. Without the usage an answer is still an answer.
#[test]
fn an_endpoint_that_refuses_stream_options_is_asked_without_them() -> Result<()> {
    let taken = || stream_of("data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}\n\n");
    for (status, body) in [
        (
            422,
            json!({"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "not permitted"}]}),
        ),
        (400, json!({"error": {"message": "Unrecognized request argument supplied: stream_options"}})),
    ] {
        let close = "connection: close\r\n";
        let (url, thread) = scripted(vec![refusal(status, close, &body), taken(), taken()])?;
        let handler = endpoint(&url, "m")?;
        for _ in 0..2 {
            assert_eq!(handler.complete(&asked("hi", 5), &Context::default())?.text, "a");
        }
        let requests = thread.join().expect("the server does not panic");
        // It is remembered, so that the second answer is asked for once.
        let with: Vec<bool> = requests.iter().map(|request| request.contains("stream_options")).collect();
        assert_eq!(with, [true, false, false], "{status}");
    }
    let other = json!({"error": {"message": "temperature is too high"}});
    let (url, thread) = scripted(vec![refusal(422, "", &other)])?;
    let refused = endpoint(&url, "m")?.complete(&asked("hi", 5), &Context::default()).expect_err("it refuses");
    assert!(refused.message.contains("temperature is too high"), "{refused}");
    assert_eq!(thread.join().expect("the server does not panic").len(), 1, "it is asked once");
    Ok(())
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

#[test]
fn a_route_falls_back_before_the_first_word_and_never_after() -> Result<()> {
    let start = Event::Start { id: "broken".into(), model: "broken".into(), handler: "broken".into() };
    let word = Event::Delta { text: "half".into() };
    let near = local()?;
    let want = near.complete(&asked("hi", 5), &Context::default())?.text;
    for (before, kind, falls_back) in [
        (vec![], Kind::Unavailable, true),
        (vec![], Kind::Timeout, true),
        (vec![], Kind::RateLimited { retry_after: None }, true),
        (vec![start.clone()], Kind::Unavailable, true),
        (vec![], Kind::Authentication, false),
        (vec![], Kind::InvalidRequest { param: None }, false),
        (vec![], Kind::ContextLength, false),
        (vec![start.clone()], Kind::Cut, true),
        (vec![], Kind::Protocol, true),
        (vec![start.clone()], Kind::ContextLength, false),
        (vec![start.clone(), word.clone()], Kind::Unavailable, false),
        (vec![start.clone(), word.clone()], Kind::Cut, false),
    ] {
        let asked_times = Arc::new(AtomicUsize::new(0));
        let error = HandlerError::new(kind.clone(), "broken");
        let broken: Arc<dyn Handler> = Arc::new(Fails { before: before.clone(), error, asked: asked_times.clone() });
        let route = Route::new(vec![("broken".into(), broken), ("near".into(), near.clone())]);
        let answer = route.stream(&asked("hi", 5), &Context::default()).and_then(collect);
        assert_eq!(asked_times.load(Ordering::SeqCst), 1);
        match answer {
            Ok(whole) => assert!(falls_back && whole.text == want && whole.model == "llama", "{before:?} {kind:?}"),
            Err(error) => assert!(!falls_back && error.kind == kind, "{before:?} {kind:?}: {error}"),
        }
    }
    Ok(())
}

/// Nobody saw a word of it.
#[test]
fn an_unstreamed_answer_that_breaks_off_is_given_by_the_next_handler() -> Result<()> {
    let start = Event::Start { id: "broken".into(), model: "broken".into(), handler: "broken".into() };
    let before = vec![start, Event::Delta { text: "half".into() }];
    let near = local()?;
    let want = near.complete(&asked("hi", 5), &Context::default())?.text;
    for (kind, falls_back) in [
        (Kind::Cut, true),
        (Kind::Protocol, true),
        (Kind::Unavailable, true),
        (Kind::InvalidRequest { param: None }, false),
        (Kind::Cancelled, false),
    ] {
        let error = HandlerError::new(kind.clone(), "broken");
        let broken: Arc<dyn Handler> = Arc::new(Fails { before: before.clone(), error, asked: Arc::default() });
        let route = Route::new(vec![("broken".into(), broken.clone()), ("near".into(), near.clone())]);
        match route.complete(&asked("hi", 5), &Context::default()) {
            Ok(whole) => {
                assert!(
                    falls_back && whole.text == want && whole.handler == "llama" && !whole.id.is_empty(),
                    "{kind:?}"
                );
            }
            Err(error) => assert!(!falls_back && error.kind == kind, "{kind:?}: {error}"),
        }
        let last = Route::new(vec![("broken".into(), broken)]);
        assert_eq!(last.complete(&asked("hi", 5), &Context::default()).expect_err("no other").kind, kind);
    }
    Ok(())
}

// The server.

/// A request as it goes over the wire, and the whole answer: status, headers, body.
pub fn http(address: SocketAddr, head: &str, body: &str) -> Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(stream, "{head}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (headers, body) = text.split_once("\r\n\r\n").context("headers")?;
    let status = headers.split(' ').nth(1).context("a status")?.parse()?;
    Ok((status, headers.to_owned(), body.to_owned()))
}

pub fn post(address: SocketAddr, body: &Value) -> Result<(u16, String, String)> {
    http(
        address,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json",
        &body.to_string(),
    )
}

pub fn chat_body(more: &Value) -> Value {
    let mut body =
        json!({"model": "a/b:c", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0});
    for (key, value) in more.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn the_server_speaks_as_openai_does() -> Result<()> {
    let server = serve(Models::from([("a/b:c".into(), local()?)]))?;
    let at = server.address;

    let (status, headers, body) = post(at, &chat_body(&json!({"user": "me", "max_tokens": 4})))?;
    assert_eq!(status, 200, "{body}");
    assert!(headers.contains("x-ignored-params: user"), "{headers}");
    let whole: Value = serde_json::from_str(&body)?;
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("a/b:c")));
    assert!(whole.get("system_fingerprint").is_some(), "Moodle reads it: {whole}");
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let text = whole["choices"][0]["message"]["content"].as_str().context("a text")?;

    let (status, headers, body) =
        post(at, &chat_body(&json!({"stream": true, "stream_options": {"include_usage": true}})))?;
    assert!(status == 200 && headers.contains("content-type: text/event-stream"), "{headers}");
    let datas: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(datas.last(), Some(&"[DONE]"));
    let chunks =
        datas[..datas.len() - 1].iter().map(|data| serde_json::from_str(data)).collect::<Result<Vec<Value>, _>>()?;
    let first = &chunks[0];
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk["id"] == first["id"] && chunk["object"] == "chat.completion.chunk"));
    let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, text);
    let [finish, usage] = &chunks[chunks.len() - 2..] else { unreachable!("two chunks") };
    assert_eq!(
        (&finish["choices"][0]["delta"], &finish["choices"][0]["finish_reason"]),
        (&json!({}), &json!("length"))
    );
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));

    let get = |path: &str| http(at, &format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1:9"), "");
    let list: Value = serde_json::from_str(&get("/v1/models")?.2)?;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("a/b:c")));
    for path in ["/v1/models/a/b:c", "/v1/models/a%2Fb%3Ac"] {
        assert_eq!(serde_json::from_str::<Value>(&get(path)?.2)?["object"], "model", "{path}");
    }

    for (body, status, param, code) in [
        (chat_body(&json!({"model": "other"})), 404, json!("model"), json!("model_not_found")),
        (chat_body(&json!({"n": 2})), 400, json!("n"), Value::Null),
        (
            chat_body(&json!({"messages": [{"role": "user", "content": "many words ".repeat(200)}]})),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (
            chat_body(&json!({"messages": [{"role": "user", "content": "many words ".repeat(200)}], "stream": true})),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (chat_body(&json!({"user": "x".repeat(5 << 20)})), 413, Value::Null, Value::Null),
    ] {
        let (got, _, answer) = post(at, &body)?;
        let error = &serde_json::from_str::<Value>(&answer)?["error"];
        assert_eq!((got, &error["param"], &error["code"]), (status, &param, &code), "{answer}");
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{answer}");
    }
    assert_eq!(get("/v1/models/other")?.0, 404);
    let (status, _, odd) = get("/v1/models/%ff")?;
    assert!(status == 400 && odd.contains("\"type\":\"invalid_request_error\""), "{odd}");
    let (_, _, quoted) = post(at, &chat_body(&json!({"\u{1b}[31m": 1})))?;
    assert!(quoted.contains("{1b}") && !quoted.contains("u001b"), "{quoted}");
    // Far too long to make tokens of it.
    let (status, _, long) =
        post(at, &chat_body(&json!({"messages": [{"role": "user", "content": "a".repeat(4_000_000)}]})))?;
    assert!(status == 400 && long.contains("4000000 bytes long") && long.contains("context_length_exceeded"), "{long}");
    server.stop();
    server.wait()
}

#[test]
fn what_is_not_served_is_told_with_what_is() -> Result<()> {
    let model = local()?;
    let server = serve(Models::from([("tutor".into(), model.clone()), ("tutor/klein:2".into(), model)]))?;
    let at = server.address;
    let ask = |method: &str, path: &str| http(at, &format!("{method} {path} HTTP/1.1\r\nhost: localhost:9"), "");
    for path in ["/", "/v1", "/v1/"] {
        let (status, headers, body) = ask("GET", path)?;
        assert!(status == 200 && headers.contains("text/plain"), "{path}: {headers}");
        assert!(body.contains("http://localhost:9/v1") && body.contains("tutor, tutor/klein:2"), "{path}: {body}");
    }
    let (status, _, body) = ask("GET", "/health")?;
    assert_eq!((status, serde_json::from_str(&body)?), (200, json!({"status": "ok"})));
    for (method, path, status, words) in [
        ("GET", "/v1/chat/completions", 405, "/v1/chat/completions takes POST and not GET"),
        ("DELETE", "/v1/models/tutor", 405, "takes GET and not DELETE"),
        ("POST", "/chat/completions", 404, "/chat/completions is not served here, did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/chat/completions/", 404, "did you mean /v1/chat/completions?"),
        ("GET", "/models", 404, "did you mean /v1/models?"),
        ("POST", "/v1/chat/completion", 404, "did you mean `/v1/chat/completions`?"),
        ("POST", "/v1/embeddings", 404, "known are /v1/chat/completions, /v1/models"),
        ("GET", "/favicon.ico", 404, "/favicon.ico is not served here"),
        ("GET", "/v1/models/tutr", 404, "there is no model `tutr` here, did you mean `tutor`?"),
        ("GET", "/v1/models/banana", 404, "known are tutor, tutor/klein:2"),
    ] {
        let (got, headers, body) = ask(method, path)?;
        let error = &serde_json::from_str::<Value>(&body)?["error"];
        let message = error["message"].as_str().context("a message")?;
        assert!(got == status && message.contains(words), "{method} {path}: {got} {message}");
        assert_eq!((&error["type"], headers.contains("allow: ")), (&json!("invalid_request_error"), status == 405));
    }
    let (status, _, body) = post(at, &chat_body(&json!({"model": "tutor/klein"})))?;
    assert!(
        status == 404 && body.contains("did you mean `tutor/klein:2`?") && body.contains("model_not_found"),
        "{body}"
    );
    server.stop();
    server.wait()
}

/// Official clients in typed languages fail at a word that OpenAI does not have.
#[test]
fn a_reason_that_openai_does_not_have_stands_beside_one_that_it_has() -> Result<()> {
    let odd = stream_of("data: {\"choices\":[{\"delta\":{\"content\":\"a\"},\"finish_reason\":\"odd\"}]}\n\n");
    let (url, thread) = scripted(vec![odd; 2])?;
    let server = serve(Models::from([("m".into(), Arc::new(endpoint(&url, "m")?) as Arc<dyn Handler>)]))?;
    for stream in [false, true] {
        let (_, _, body) = post(server.address, &chat_body(&json!({"model": "m", "stream": stream})))?;
        let both = body.contains("\"finish_reason\":\"stop\"") && body.contains("\"native_finish_reason\":\"odd\"");
        assert!(both, "{body}");
    }
    thread.join().expect("the server does not panic");
    server.stop();
    server.wait()
}

#[test]
fn a_page_elsewhere_cannot_use_the_server() -> Result<()> {
    let server = serve(Models::from([("m".into(), local()?)]))?;
    let body = chat_body(&json!({"model": "m"})).to_string();
    let status = |head: &str| -> Result<u16> { Ok(http(server.address, head, &body)?.0) };
    let json = "content-type: application/json";
    assert_eq!(status(&format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{json}"))?, 200);
    for path in ["/v1/chat/completions", "/v1/models", "/v1/models/m", "/", "/anything"] {
        for method in ["GET", "POST", "OPTIONS", "PUT"] {
            let rebound = format!("{method} {path} HTTP/1.1\r\nhost: evil.example:8080\r\n{json}");
            assert_eq!(status(&rebound)?, 403, "{rebound}");
        }
    }
    let absolute = format!("POST http://evil.example/v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{json}");
    assert_eq!(status(&absolute)?, 403);
    // What a form or a script without CORS can send.
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        assert_eq!(
            status(&format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}"))?,
            415
        );
    }
    let (_, headers, _) = http(
        server.address,
        "OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\naccess-control-request-method: POST",
        "",
    )?;
    assert!(!headers.to_lowercase().contains("access-control-allow"), "{headers}");
    server.stop();
    server.wait()
}

/// Says so many words slowly, and counts those it was asked for.
struct Slow(Arc<AtomicUsize>, usize);

impl Handler for Slow {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        let words = self.0.clone();
        let word = move |_| {
            std::thread::sleep(Duration::from_millis(5));
            words.fetch_add(1, Ordering::SeqCst);
            Event::Delta { text: "word ".into() }
        };
        let start = Event::Start { id: "i".into(), model: "m".into(), handler: "h".into() };
        let end = [Event::Finish { reason: FinishReason::Stop }, Event::Usage(Usage::default())];
        Ok(Box::new(std::iter::once(start).chain((0..self.1).map(word)).chain(end).map(Ok)))
    }
}

#[test]
fn a_client_that_leaves_ends_its_answer() -> Result<()> {
    let words = Arc::new(AtomicUsize::new(0));
    let server = serve(Models::from([("m".into(), Arc::new(Slow(words.clone(), usize::MAX)) as Arc<dyn Handler>)]))?;
    for stream in [true, false] {
        let body = chat_body(&json!({"model": "m", "stream": stream})).to_string();
        let mut client = TcpStream::connect(server.address)?;
        write!(
            client,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let before = words.load(Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(30);
        while words.load(Ordering::SeqCst) < before + 5 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(client);
        let mut last = words.load(Ordering::SeqCst);
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = words.load(Ordering::SeqCst);
            if now == last {
                break;
            }
            assert!(Instant::now() < deadline, "the answer goes on without its client (stream: {stream})");
            last = now;
        }
        assert!(last > before, "an answer was begun");
    }
    server.stop();
    server.wait()
}

#[test]
fn an_answer_under_way_is_finished_when_the_server_ends() -> Result<()> {
    let words = Arc::new(AtomicUsize::new(0));
    let server = serve(Models::from([("m".into(), Arc::new(Slow(words.clone(), 100)) as Arc<dyn Handler>)]))?;
    let address = server.address;
    let body = chat_body(&json!({"model": "m", "stream": true}));
    let client = std::thread::spawn(move || post(address, &body).map(|(_, _, body)| body));
    let deadline = Instant::now() + Duration::from_secs(30);
    while words.load(Ordering::SeqCst) < 3 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.stop();
    assert!(words.load(Ordering::SeqCst) < 100, "it is asked to stop in the middle");
    server.wait()?;
    let body = client.join().expect("the client does not panic")?;
    assert!(body.matches("word ").count() == 100 && body.contains("data: [DONE]"), "{body}");
    assert!(TcpStream::connect(address).is_err(), "the port is free again");
    Ok(())
}

#[test]
fn a_handler_that_fails_in_the_middle_is_an_error_frame() -> Result<()> {
    let before = vec![
        Event::Start { id: "i".into(), model: "m".into(), handler: "h".into() },
        Event::Delta { text: "half".into() },
    ];
    let error = HandlerError::new(Kind::Cut, "it broke off");
    let broken = Fails { before, error, asked: Arc::default() };
    let server = serve(Models::from([("m".into(), Arc::new(broken) as Arc<dyn Handler>)]))?;
    let (status, _, body) = post(server.address, &chat_body(&json!({"model": "m", "stream": true})))?;
    assert_eq!(status, 200);
    assert!(
        body.contains("half") && body.contains("\"message\":\"it broke off\"") && !body.contains("[DONE]"),
        "{body}"
    );
    let (status, headers, _) = post(server.address, &chat_body(&json!({"model": "m"})))?;
    assert!(status == 502 && headers.contains("x-should-retry: false"), "{status} {headers}");
    let through = endpoint(&server.url(), "m")?.complete(&asked("hi", 5), &Context::default());
    assert_eq!(through.expect_err("it broke off").message.matches("it broke off").count(), 1);
    server.stop();
    server.wait()
}

// The program.

#[test]
fn the_shipped_handlers_are_a_file_that_can_be_read() -> Result<()> {
    let path = root().join("configs/handlers.toml");
    let config = Config::read(&path)?;
    assert!(!config.routes.is_empty() && !config.handlers.is_empty());
    // What is commented out is right too.
    let text = std::fs::read_to_string(&path)?;
    let all: Vec<&str> = text.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect();
    assert!(all.len() > 10 && all.join("\n") != text.trim_end());
    let config = Config::parse(&path, &all.join("\n"))?;
    assert!(config.routes.values().any(|chain| chain.len() > 1));
    Ok(())
}

fn handlers_file(directory: &Path, base_url: &str) -> Result<std::path::PathBuf> {
    let path = directory.join("handlers.toml");
    let model = fixture("models/llama");
    std::fs::write(
        &path,
        format!(
            "[handlers.near]\nkind = \"local\"\nmodel = {:?}\n[handlers.far]\nkind = \"openai\"\nbase_url = {base_url:?}\nmodel = \"m\"\n[routes.both]\nhandlers = [\"far\", \"near\"]\n",
            model
        ),
    )?;
    Ok(path)
}

#[test]
fn a_conversation_goes_on_with_another_handler() -> Result<()> {
    let server = serve(Models::from([("m".into(), local()?)]))?;
    let directory = tempfile::tempdir()?;
    let config = handlers_file(directory.path(), &server.url())?;
    let talk = |handler: &str, lines: &str| -> Result<(String, String)> {
        let mut child = homeroom()
            .args(["chat", "--handler", handler, "--max-tokens", "8", "--temperature", "0", "--config"])
            .arg(&config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(output.status.success(), "{stderr}");
        Ok((String::from_utf8(output.stdout)?, stderr))
    };
    let (near, _) = talk("near", "one\ntwo\n/clear\none\n")?;
    let (switched, story) = talk("far", "one\n\n/handler near\ntwo\n/clear\n/handler both\none\n/exit\nnever\n")?;
    assert_eq!(near, switched);
    assert!(story.contains("near answers from now on"), "{story}");
    let (with_system, _) = talk("near", "/system other words\none\n/system\n/clear\none\n")?;
    assert_ne!(with_system, near);
    server.stop();
    server.wait()
}

#[test]
fn a_conversation_leaves_this_machine_only_on_the_users_word() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("é.toml");
    let far = "[handlers.far]\nkind = \"openai\"\nbase_url = \"https://nobody.invalid/v1\"\nmodel = \"m\"\n";
    let near = format!(
        "[handlers.near]\nkind = \"local\"\nmodel = {:?}\n[routes.safe]\nhandlers = [\"near\"]\n",
        fixture("models/llama")
    );
    let chat = |text: &str, arguments: &[&str], lines: &str| -> Result<(bool, String)> {
        std::fs::write(&config, text)?;
        let mut child = homeroom()
            .args(["chat", "--config"])
            .arg(&config)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        Ok((output.status.success(), String::from_utf8(output.stderr)?))
    };
    let (done, story) = chat(far, &["--prompt", "hi"], "")?;
    assert!(
        !done && story.contains("`far` sends conversations to nobody.invalid, and no route allows that"),
        "{story}"
    );
    assert!(story.contains("--handler far"), "{story}");
    let (done, story) = chat(far, &["--prompt", "hi", "--handler", "far"], "")?;
    let first = story.lines().next().unwrap_or_default();
    assert!(
        !done && first == "note: `far` is not on this machine: what is said here goes to nobody.invalid",
        "{story}"
    );
    assert!(story.contains("the host was not found"), "{story}");
    let (done, story) = chat(&format!("{far}{near}"), &[], "/handler far\n/handler near\n/exit\n")?;
    let words = "far answers from now on; it is not on this machine: what is said, with the conversation so far, goes to nobody.invalid\nnear answers from now on\n";
    assert!(done && story == words, "{story}");
    Ok(())
}

/// A server that ends with the test.
struct Served(std::process::Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_file_that_is_deleted_while_it_is_served_is_told_once() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("h.toml");
    let text = format!("[handlers.near]\nkind = \"local\"\nmodel = {:?}\n", fixture("models/llama"));
    std::fs::write(&config, &text)?;
    let command = homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).stderr(Stdio::piped()).spawn()?;
    let mut served = Served(command);
    let mut story = BufReader::new(served.0.stderr.take().context("a pipe")?).lines();
    let mut until = |words: &str| -> Result<Vec<String>> {
        let mut lines = Vec::new();
        while !lines.last().is_some_and(|line: &String| line.contains(words)) {
            lines.push(story.next().with_context(|| format!("it ended: {lines:?}"))??);
        }
        Ok(lines)
    };
    let serving = until("serving")?.pop().context("a line")?;
    std::fs::remove_file(&config)?;
    until("h.toml is gone; what was served is served on")?;
    let url = serving.split_whitespace().nth(1).context("an address")?;
    assert_eq!(
        endpoint(url, "near")?.complete(&asked("hello", 2), &Context::default())?.usage.completion_tokens,
        Some(2)
    );
    // Another look or two, and then it is there again.
    std::thread::sleep(Duration::from_secs(5));
    std::fs::write(&config, text.replace("near", "é2").replace("é", "e"))?;
    let lines = until("reload")?;
    assert!(lines.last().is_some_and(|line| line.ends_with(": e2")), "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains("gone")), "{lines:?}");
    Ok(())
}

#[test]
fn a_prompt_is_answered_alone_on_stdout() -> Result<()> {
    let run = |more: &[&str]| -> Result<(bool, String, String)> {
        let output = homeroom().arg("chat").args(more).stdin(Stdio::null()).output()?;
        Ok((output.status.success(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    };
    let model = fixture("models/llama").display().to_string();
    let (done, text, story) =
        run(&["--model-dir", &model, "--prompt", "hello there", "--max-tokens", "12", "--temperature", "0"])?;
    assert!(done && story.contains("--max-tokens allows more"), "{story}");
    let want = local()?.complete(&asked("hello there", 12), &Context::default())?;
    assert_eq!(text, want.text + "\n");
    let (done, _, story) = run(&["--handler", "x", "--config", "no-such-file.toml"])?;
    assert!(!done && story.contains("no-such-file.toml"), "{story}");
    assert!(!run(&["--prompt", "x"])?.0 && !run(&["--handler", "x"])?.0);
    Ok(())
}

#[test]
fn the_program_serves_and_ends_when_asked() -> Result<()> {
    let model = fixture("models/llama");
    let mut child =
        homeroom().args(["serve", "--port", "0", "--model-dir"]).arg(&model).stderr(Stdio::piped()).spawn()?;
    let mut story = BufReader::new(child.stderr.take().context("a pipe")?);
    let mut lines = BTreeMap::new();
    while !lines.contains_key("serving") {
        let mut line = String::new();
        anyhow::ensure!(story.read_line(&mut line)? > 0, "it ended before it served: {lines:?}");
        let (key, rest) = line.trim().split_once(' ').context("two columns")?;
        lines.insert(key.to_owned(), rest.trim().to_owned());
    }
    assert_eq!(lines["model"], "llama");
    let url = lines["serving"].split(' ').next().context("an address")?;
    let whole = endpoint(url, "llama")?.complete(&asked("hello there", 4), &Context::default())?;
    assert_eq!(whole.usage.completion_tokens, Some(4));
    #[cfg(unix)]
    {
        let stopped = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status()?;
        assert!(stopped.success() && child.wait()?.success());
    }
    #[cfg(not(unix))]
    child.kill()?;
    Ok(())
}

#[test]
fn a_file_without_routes_serves_its_handlers_under_their_own_names() -> Result<()> {
    let near = format!("[handlers.near]\nkind = \"local\"\nmodel = {:?}\n", fixture("models/llama"));
    let beside = "[handlers.beside]\nkind = \"openai\"\nbase_url = \"http://localhost:1/v1\"\nmodel = \"m\"\n";
    let far = "[handlers.far]\nkind = \"openai\"\nbase_url = \"https://api.example.com/v1\"\nmodel = \"m\"\n";
    let served = |text: &str| -> Result<Vec<String>> {
        let served = Handlers::new(Config::parse(Path::new("h.toml"), text)?).served()?;
        Ok(served.into_keys().collect())
    };
    assert_eq!(served(&near)?, ["near"]);
    // Nothing leaves this machine unless a route says so.
    assert_eq!(served(&format!("{near}{far}{beside}"))?, ["beside", "near"]);
    let refused = served(far).expect_err("no route allows it").to_string();
    let words =
        "h.toml: `far` sends conversations to api.example.com, and no route allows that\nhint: add [routes.NAME]";
    assert!(refused.contains(words) && refused.contains("egress = \"allow\""), "{refused}");
    let route = "[routes.tutor]\nhandlers = [\"far\"]\negress = \"allow\"\n";
    assert_eq!(served(&format!("{near}{far}{route}"))?, ["tutor"]);
    for empty in ["", "# nothing yet\n", "[handlers]\n", "[routes]\n"] {
        let refused = served(empty).expect_err("there is nothing").to_string();
        assert!(refused.contains("h.toml: it has no handler\nhint: add [handlers.NAME]"), "{empty}: {refused}");
    }
    Ok(())
}

#[test]
fn a_route_without_leave_for_the_cloud_is_refused_by_the_program() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let config = handlers_file(directory.path(), "https://api.example.com/v1")?;
    let output = homeroom().args(["serve", "--port", "0", "--config"]).arg(&config).output()?;
    let story = String::from_utf8(output.stderr)?;
    assert!(!output.status.success() && story.contains("egress is \"deny\"") && story.contains("^^^"), "{story}");
    assert!(
        Handlers::new(Config::parse(
            &config,
            &std::fs::read_to_string(&config)?.replace("[\"far\", \"near\"]", "[\"near\"]")
        )?)
        .get("both")
        .is_ok()
    );
    Ok(())
}
