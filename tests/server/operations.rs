//! What whoever runs a server sees of it, and how it ends.

use homeroom::handler::limit::{Limited, Limits};

use super::*;

#[test]
fn it_says_whether_it_lives_and_takes_requests() -> Result<()> {
    let (key, text) = Key::make("class")?;
    let settings = Settings { drain: Duration::from_secs(20), ..Settings::default() };
    let site = Site::new(Models::from([("m".to_owned(), words(400, 5))]), &[key], settings)?;
    assert_eq!(site.ask("GET", "/healthz", "", "")?.0, 200);
    let (status, _, ready) = site.get("/readyz", &text)?;
    assert_eq!((status, &ready["status"]), (200, &json!("ready")));
    // A connection that is answered while the server ends.
    let at = site.at();
    let body = chat("m", &json!({"stream": true})).to_string();
    let head = format!("authorization: Bearer {text}\r\ncontent-type: application/json\r\nhost: localhost");
    let streaming =
        std::thread::spawn(move || http(at, &format!("POST /v1/chat/completions HTTP/1.1\r\n{head}"), &body));
    std::thread::sleep(Duration::from_millis(300));
    site.server.stop();
    let (status, _, body) = streaming.join().expect("it does not panic")?;
    assert!(status == 200 && body.contains("data: [DONE]"), "what was begun is finished: {body:.200}");
    site.end()
}

/// An answer that takes longer than the time to drain ends in an error, within that time.
#[test]
fn every_stream_ends_within_the_time_to_drain() -> Result<()> {
    let settings = Settings { drain: Duration::from_millis(400), ..Settings::default() };
    let all: Vec<(String, Arc<dyn Handler>)> = vec![
        ("slow".into(), words(u64::MAX, 10)),
        ("silent".into(), words(u64::MAX, 3_600_000)),
        ("queued".into(), Arc::new(Limited::new(words(u64::MAX, 10), Limits { running: 1, waiting: 5 }))),
    ];
    let site = Site::new(all.into_iter().collect(), &[], settings)?;
    let at = site.at();
    let asking: Vec<_> = ["slow", "silent", "queued", "queued", "queued"]
        .into_iter()
        .flat_map(|model| [("/v1/chat/completions", model), ("/api/chat", model)])
        .map(|(path, model)| {
            let body =
                json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": true}).to_string();
            let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json");
            std::thread::spawn(move || http(at, &head, &body).map(|(status, _, body)| (path, status, body)))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    site.server.stop();
    for one in asking {
        let (path, status, body) = one.join().expect("it does not panic")?;
        // Whoever waited in the queue has no answer yet, and is refused.
        let is_refusal = status == 503 && body.contains("cancelled");
        let last = objects(&body.replace("data: ", ""))?.pop().unwrap_or_default();
        let is_error = last.get("error").is_some();
        assert!(is_refusal || is_error, "{path}: {status} {last}");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    site.end()
}

#[test]
fn a_request_has_an_id_and_is_counted() -> Result<()> {
    let site = Site::new(Models::from([("m".to_owned(), words(20, 2))]), &[], Settings::default())?;
    let ask = |more: &str| {
        site.ask(
            "POST",
            "/v1/chat/completions",
            &format!("content-type: application/json{more}"),
            &chat("m", &json!({"stream": true})).to_string(),
        )
    };
    let (_, head, _) = ask("\nx-request-id: from-caddy")?;
    assert!(head.contains("x-request-id: from-caddy"), "{head}");
    let (_, head, _) = ask("\nx-request-id: no id")?;
    assert!(head.contains("x-request-id: req-"), "{head}");
    assert!(site.ask("GET", "/nothing", "", "")?.1.contains("x-request-id: req-"));
    let (status, head, text) = site.ask("GET", "/metrics", "", "")?;
    assert!(status == 200 && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    for line in [
        "homeroom_requests_total{route=\"/v1/chat/completions\",method=\"POST\",status=\"200\"} 2",
        "homeroom_requests_total{route=\"none\",method=\"GET\",status=\"404\"} 1",
        "homeroom_prompt_tokens_total{model=\"m\"} 20",
        "homeroom_completion_tokens_total{model=\"m\"} 40",
        "homeroom_answers_total{model=\"m\",end=\"stop\"} 2",
        "homeroom_time_to_first_token_seconds_count{model=\"m\"} 2",
        "homeroom_answer_tokens_per_second_count{model=\"m\"} 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    site.end()
}

/// By the header an answer can be rated, also where its body has no id, and when the stream begins before the answer does.
#[test]
fn every_answer_says_its_id_in_a_header() -> Result<()> {
    let handlers: [(String, Arc<dyn Handler>); 2] = [("m".into(), words(3, 0)), ("late".into(), words(2, 400))];
    let bounds = Bounds { first_event: Duration::from_millis(1), ..Bounds::default() };
    let slow: Arc<dyn Handler> = Arc::new(Limited::new(words(20, 20), Limits { running: 1, waiting: 5 }));
    let models: Models = handlers.into_iter().chain([("queued".to_owned(), slow)]).collect();
    let server = start_as(models, bind("127.0.0.1", 0)?, Serving { bounds, ..Serving::default() })?;
    let ask = |path: &str, model: &str, more: &Value| -> Result<(String, String)> {
        let mut body = chat(model, more);
        if path.ends_with("/completions") && !path.contains("chat") || path.ends_with("/generate") {
            let fields = body.as_object_mut().context("an object")?;
            fields.remove("messages");
            fields.insert("prompt".into(), json!("hi"));
        }
        if path.starts_with("/api/") {
            let fields = body.as_object_mut().context("an object")?;
            fields.retain(|field, _| ["model", "messages", "prompt", "stream"].contains(&field.as_str()));
        }
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json");
        let (status, head, body) = http(server.address, &head, &body.to_string())?;
        assert_eq!(status, 200, "{path}: {body}");
        let id = head.lines().find_map(|line| line.strip_prefix("x-homeroom-response-id: "));
        Ok((id.with_context(|| head.clone())?.to_owned(), body))
    };
    let mut seen = std::collections::BTreeSet::new();
    for model in ["m", "late"] {
        for is_streamed in [false, true] {
            let more = json!({"stream": is_streamed});
            for path in ["/v1/chat/completions", "/v1/completions"] {
                let (id, body) = ask(path, model, &more)?;
                let first = objects(&body.replace("data: ", ""))?.into_iter().next().context("an object")?;
                assert_eq!(first["id"], json!(id), "{path} {body}");
                assert!(seen.insert(id));
            }
            for path in ["/api/chat", "/api/generate"] {
                assert!(seen.insert(ask(path, model, &more)?.0));
            }
        }
    }
    // Behind another in the queue, the headers are sent before the answer begins.
    let at = server.address;
    let before = std::thread::spawn(move || {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        http(at, head, &chat("queued", &json!({"stream": true})).to_string())
    });
    std::thread::sleep(Duration::from_millis(100));
    let (id, body) = ask("/v1/chat/completions", "queued", &json!({"stream": true}))?;
    assert!(body.contains("\"x-homeroom-handler\""), "its headers came before the answer: {body}");
    assert!(body.contains(&format!("\"id\":\"{id}\"")), "{id}: {body}");
    assert_eq!(before.join().expect("it does not panic")?.0, 200);
    server.stop();
    server.wait()
}

/// Whoever waits is told how many are before.
#[test]
fn a_place_in_the_queue_is_told_while_it_is_waited_for() -> Result<()> {
    let handler: Arc<dyn Handler> = Arc::new(Limited::new(words(200, 10), Limits { running: 1, waiting: 5 }));
    let directory = tempfile::tempdir()?;
    let bounds = homeroom::serve::Bounds {
        first_event: Duration::from_millis(50),
        silence: Duration::from_millis(50),
        ..homeroom::serve::Bounds::default()
    };
    let serving = Serving { bounds, ..Serving::default() };
    let server = start_as(Models::from([("m".to_owned(), handler)]), bind("127.0.0.1", 0)?, serving)?;
    let ask = |path: &str, task: &str| -> Result<TcpStream> {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true}).to_string();
        let mut client = TcpStream::connect(server.address)?;
        client.set_read_timeout(Some(GUARD))?;
        write!(
            client,
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{task}content-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(client)
    };
    let read_until = |client: &mut TcpStream, words: &str| -> Result<String> {
        let (mut seen, mut reader) = (String::new(), BufReader::new(client));
        while !seen.contains(words) {
            anyhow::ensure!(reader.read_line(&mut seen)? > 0, "it ended without {words}: {seen}");
        }
        Ok(seen)
    };
    let mut first = ask("/v1/chat/completions", "")?;
    read_until(&mut first, "word")?;
    // Titles and tags, which Open WebUI asks for by itself, wait behind people.
    let mut task = ask("/v1/chat/completions", "x-openwebui-task: title_generation\r\n")?;
    read_until(&mut task, ": ping, 1 request is before this one\n")?;
    // With a person's request it sends the header, too, and empty.
    let mut second = ask("/v1/chat/completions", "x-openwebui-task: \r\n")?;
    read_until(&mut second, ": ping, 1 request is before this one\n")?;
    let mut third = ask("/api/chat", "")?;
    // Ollama's clients take every line for a piece, so that they get one without text.
    read_until(&mut third, "\"content\":\"\"},\"done\":false")?;
    read_until(&mut task, ": ping, 2 requests are before this one\n")?;
    drop(first);
    read_until(&mut second, "word")?;
    drop(second);
    read_until(&mut third, "word")?;
    drop(third);
    read_until(&mut task, "word")?;
    drop((task, directory));
    server.stop();
    server.wait()
}

/// A client that leaves before its answer has a status is over for the server, as is one that breaks its request off.
#[test]
fn who_leaves_is_counted_out() -> Result<()> {
    let site = Site::new(Models::from([("m".to_owned(), words(u64::MAX, 5))]), &[], Settings::default())?;
    let body = chat("m", &json!({})).to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
    for (sent, length) in [(body.len(), body.len()), (20, body.len())] {
        let mut client = TcpStream::connect(site.at())?;
        write!(client, "{head}\r\ncontent-length: {length}\r\n\r\n{}", &body[..sent])?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let begun = Instant::now();
    loop {
        let (_, _, metrics) = site.ask("GET", "/metrics", "", "")?;
        let of_route = "homeroom_requests_total{route=\"/v1/chat/completions\",method=\"POST\",status=\"499\"}";
        let left = metrics.contains(of_route);
        // The request for the figures is one.
        if left && metrics.contains("homeroom_requests_in_flight 1\n") {
            break;
        }
        anyhow::ensure!(begun.elapsed() < GUARD, "{metrics}");
        std::thread::sleep(Duration::from_millis(50));
    }
    site.end()
}

#[test]
fn a_malformed_request_is_not_called_too_large() -> Result<()> {
    let site = Site::new(models(&["m"])?, &[], Settings::default())?;
    let post = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    for (request, words) in [
        (format!("{post}host: evil.example\r\ncontent-length: 2\r\n\r\n{{}}"), "more than one Host"),
        (format!("{post}transfer-encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n"), "malformed"),
    ] {
        let mut client = TcpStream::connect(site.at())?;
        client.set_read_timeout(Some(GUARD))?;
        client.write_all(request.as_bytes())?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(words), "{answer}");
    }
    site.end()
}

#[test]
fn the_page_is_for_people_and_runs_nothing() -> Result<()> {
    let (key, text) = Key::make("class")?;
    let site = Site::new(models(&["tutor"])?, &[key], Settings::default())?;
    let (status, head, _) = site.ask("GET", "/", "accept: text/html", "")?;
    assert!(status == 401 && head.contains("www-authenticate: Basic realm="), "a browser asks for the key: {head}");
    let headers =
        format!("accept: text/html,*/*\nauthorization: Basic {}", super::access::base64(&format!("x:{text}")));
    let (status, head, page) = site.ask("GET", "/", &headers, "")?;
    assert!(status == 200 && head.contains("content-type: text/html"), "{head}");
    assert!(head.contains("content-security-policy: default-src 'none'; style-src 'sha256-"), "{head}");
    assert!(page.contains("<code>tutor</code>") && page.contains("http://localhost/v1"), "{page}");
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="), "{page}");
    assert!(page.contains("HOMEROOM_KEY") && !page.contains(&text));
    let (_, head, page) = site.ask("GET", "/", &format!("authorization: Bearer {text}"), "")?;
    assert!(head.contains("content-type: text/plain") && page.contains("base URL  http://localhost/v1"), "{page}");
    site.end()
}
