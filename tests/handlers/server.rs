//! The server, as a client sees it.

use super::*;

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
        (chat_body(&json!({"n": 9})), 400, json!("n"), Value::Null),
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
        ("GET", "/v1/embeddings", 405, "/v1/embeddings takes POST and not GET"),
        (
            "POST",
            "/v1/images/generations",
            404,
            "known are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/feedback, /v1/files, /v1/fine_tuning/jobs, /v1/models",
        ),
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
            Event::text("word ")
        };
        let start = Event::start("i", "m", "h");
        let end = [Event::finish(FinishReason::Stop), Event::Usage(Usage::default())];
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
    let before = vec![Event::start("i", "m", "h"), Event::text("half")];
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
    assert_eq!(through.expect_err("it broke off").to_string().matches("it broke off").count(), 1);
    server.stop();
    server.wait()
}

// The program.
