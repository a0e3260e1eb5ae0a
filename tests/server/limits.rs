//! How much may be asked with a key.

use homeroom::serve::keys::limits::Limits;

use super::*;

fn limited(limits: Limits, trust_forwarded: bool) -> Result<(Key, String)> {
    let (mut key, text) = Key::make("class")?;
    (key.limits, key.trust_forwarded) = (limits, trust_forwarded);
    Ok((key, text))
}

fn site(key: Key, handler: Arc<dyn Handler>) -> Result<Site> {
    Site::new(Models::from([("m".to_owned(), handler)]), &[key], Settings::default())
}

#[test]
fn past_its_requests_a_key_is_told_when_to_come_back() -> Result<()> {
    let (key, text) = limited(Limits { requests_per_minute: Some(2), ..Limits::default() }, false)?;
    let site = site(key, words(3, 0))?;
    let body = chat("m", &json!({}));
    for _ in 0..2 {
        assert_eq!(site.post("/v1/chat/completions", &text, &body)?.0, 200);
    }
    let (status, head, body) = site.post("/v1/chat/completions", &text, &body)?;
    assert_eq!(status, 429, "{body}");
    let wait: u64 = head.lines().find_map(|line| line.strip_prefix("retry-after: ")).context("a time")?.parse()?;
    assert!((1..=60).contains(&wait) && head.contains("x-should-retry: true"), "{head}");
    assert!(body.contains("rate_limit_exceeded") && body.contains("2 times a minute"), "{body}");
    let (status, head, body) = site.post("/api/generate", &text, &json!({"model": "m", "prompt": "hi"}))?;
    assert!(status == 429 && head.contains("retry-after: ") && body.starts_with("{\"error\":\""), "{body}");
    // What changes something is counted, too; what only looks is not.
    let (status, _, body) = site.post("/v1/feedback", &text, &json!({}))?;
    assert!(status == 429 && body.contains("rate_limit_exceeded"), "{status} {body}");
    assert_eq!(site.get("/v1/models", &text)?.0, 200);
    let (_, _, metrics) = site.ask("GET", "/metrics", &format!("authorization: Bearer {text}"), "")?;
    assert!(metrics.contains("homeroom_limited_total{limit=\"requests_per_minute\"} 3"), "{metrics}");
    site.end()
}

#[test]
fn the_tokens_of_a_day_end_and_a_restart_gives_none_back() -> Result<()> {
    let (key, text) = limited(Limits { tokens_per_day: Some(100), ..Limits::default() }, false)?;
    let first = site(key.clone(), words(30, 0))?;
    let ask = |site: &Site, more: &Value| site.post("/v1/chat/completions", &text, &chat("m", more));
    // 10 of the prompt and 30 of the answer, each time.
    assert_eq!(ask(&first, &json!({"max_tokens": 50}))?.0, 200);
    assert_eq!(ask(&first, &json!({"max_tokens": 50, "stream": true}))?.0, 200);
    let (status, head, body) = ask(&first, &json!({"max_tokens": 50}))?;
    assert!(status == 429 && head.contains("x-should-retry: false") && head.contains("retry-after: "), "{head}");
    assert!(body.contains("insufficient_quota") && body.contains("20 of 100 tokens left today"), "{body}");
    let directory = &first.directory;
    let usage = directory.path().join("serve").join("usage.json");
    let kept = || Ok(std::fs::read_to_string(&usage).is_ok_and(|text| text.contains("\"class\":{\"\":80}")));
    until("it is on disk", kept)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&usage)?.permissions().mode() & 0o077, 0);
    }
    let second = {
        let keys = Keys::at(directory.path().join("keys.json"));
        let models = Models::from([("m".to_owned(), words(30, 0))]);
        let serving = Serving { keys, days: Days::at(usage), ..Serving::default() };
        start_as(models, bind("127.0.0.1", 0)?, serving)?
    };
    let headers = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\napi-key: {text}"
    );
    let (status, _, body) = http(second.address, &headers, &chat("m", &json!({"max_tokens": 50})).to_string())?;
    assert!(status == 429 && body.contains("20 of 100 tokens left today"), "{body}");
    second.stop();
    second.wait()?;
    first.end()
}

/// The answer of a request that names no length ends at what is left.
#[test]
fn what_is_left_of_the_day_is_what_an_answer_gets() -> Result<()> {
    let (key, text) = limited(Limits { tokens_per_day: Some(40), ..Limits::default() }, false)?;
    let site = Site::new(models(&["m"])?, &[key], Settings::default())?;
    let (status, _, body) = site.post("/v1/chat/completions", &text, &chat("m", &json!({"max_tokens": null})))?;
    let whole: Value = serde_json::from_str(&body)?;
    let usage = &whole["usage"];
    assert_eq!((status, &whole["choices"][0]["finish_reason"]), (200, &json!("length")), "{body}");
    assert!(usage["completion_tokens"].as_u64().is_some_and(|tokens| tokens > 20 && tokens <= 40), "{usage}");
    assert_eq!(site.post("/v1/chat/completions", &text, &chat("m", &json!({"max_tokens": null})))?.0, 429);
    site.end()
}

#[test]
fn a_trusted_program_has_the_limits_for_each_person() -> Result<()> {
    let limits = Limits { requests_per_minute: Some(1), ..Limits::default() };
    let (key, text) = limited(limits, true)?;
    let first = site(key, words(3, 0))?;
    let by_header = |user: &str| -> Result<u16> {
        let headers =
            format!("authorization: Bearer {text}\ncontent-type: application/json\nx-openwebui-user-id: {user}");
        Ok(first.ask("POST", "/v1/chat/completions", &headers, &chat("m", &json!({})).to_string())?.0)
    };
    let by_body = |body: &Value, path: &str| -> Result<u16> { Ok(first.post(path, &text, body)?.0) };
    assert_eq!((by_header("anna")?, by_header("anna")?, by_header("ben")?), (200, 429, 200));
    assert_eq!(by_body(&chat("m", &json!({"user": "carla"})), "/v1/chat/completions")?, 200);
    assert_eq!(by_body(&json!({"model": "m", "prompt": "hi", "user": "carla"}), "/api/generate")?, 429);
    assert_eq!(by_body(&chat("m", &json!({"user": "anna"})), "/v1/chat/completions")?, 429);
    assert_eq!(by_body(&chat("m", &json!({"user": "x".repeat(300)})), "/v1/chat/completions")?, 400);
    first.end()?;
    // Without trust a name is a word that anybody may write.
    let (key, text) = limited(limits, false)?;
    let second = site(key, words(3, 0))?;
    let ask = |user: &str| second.post("/v1/chat/completions", &text, &chat("m", &json!({"user": user})));
    assert_eq!((ask("anna")?.0, ask("ben")?.0), (200, 429));
    second.end()
}

/// Whoever leaves has had what was said until then.
#[test]
fn an_answer_that_is_left_is_paid_as_far_as_it_came() -> Result<()> {
    let (key, text) = limited(Limits { tokens_per_day: Some(10_000), ..Limits::default() }, false)?;
    let site = site(key, words(100_000, 5))?;
    let body = chat("m", &json!({"stream": true, "max_tokens": 5000})).to_string();
    let mut client = TcpStream::connect(site.at())?;
    client.set_read_timeout(Some(GUARD))?;
    write!(
        client,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {text}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut reader = BufReader::new(client);
    let mut line = String::new();
    while line.matches("word").count() < 20 {
        anyhow::ensure!(reader.read_line(&mut line)? > 0, "it ended: {line}");
    }
    // What it reserved is not there for others.
    let (status, _, refused) = site.post("/v1/chat/completions", &text, &chat("m", &json!({"max_tokens": 6000})))?;
    assert!(status == 429 && refused.contains("rate_limit_exceeded"), "{refused}");
    drop(reader);
    let usage = site.directory.path().join("serve").join("usage.json");
    let used = || -> Result<u64> {
        let text = std::fs::read_to_string(&usage).unwrap_or_default();
        let usage: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(usage["used"]["class"][""].as_u64().unwrap_or(0))
    };
    until("it is paid", || Ok((20..2000).contains(&used()?)))?;
    site.end()
}

/// However many ask at once, what they get was reserved before.
#[test]
fn requests_at_once_share_what_is_left() -> Result<()> {
    let (key, text) = limited(Limits { tokens_per_day: Some(400), ..Limits::default() }, false)?;
    let site = site(key, words(30, 1))?;
    // As many bytes as are taken for the 10 tokens that the handler counts.
    let question = "how many primes are there, sir?";
    let body = chat("m", &json!({"max_tokens": 30, "messages": [{"role": "user", "content": question}]}));
    let answered = std::thread::scope(|scope| {
        let ask = || {
            let (status, ..) = site.post("/v1/chat/completions", &text, &body)?;
            assert!([200, 429].contains(&status), "{status}");
            Ok(usize::from(status == 200))
        };
        let asking: Vec<_> = (0..40).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|one| one.join().expect("it does not panic")).sum::<Result<usize>>()
    })?;
    // Each takes 40 of the 400.
    assert!((1..=10).contains(&answered), "{answered} were answered");
    site.end()
}

/// What the settings say counts for the next request, and answers under way end as they began.
#[test]
fn settings_that_are_replaced_count_from_the_next_request_on() -> Result<()> {
    let site = Site::new(Models::from([("m".to_owned(), words(60, 5))]), &[], Settings::default())?;
    let at = site.at();
    let long = move || {
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        http(at, head, &chat("m", &json!({"stream": true, "max_tokens": 60})).to_string())
    };
    let replace = site.server.replacer();
    let models = || Models::from([("m".to_owned(), words(60, 5))]);
    let ask = |headers: &str, more: &Value| {
        site.ask(
            "POST",
            "/v1/chat/completions",
            &format!("content-type: application/json{headers}"),
            &chat("m", more).to_string(),
        )
    };
    let small = json!({"max_tokens": 5});
    let page = "\norigin: https://school.example";
    let named = "\nhost: tutor.school.example";
    let statuses = || -> Result<[u16; 4]> {
        let large = json!({"messages": [{"role": "user", "content": "x".repeat(3000)}], "max_tokens": 5});
        Ok([ask("", &json!({"max_tokens": 7}))?.0, ask("", &large)?.0, ask(page, &small)?.0, ask(named, &small)?.0])
    };
    assert_eq!(statuses()?, [200, 200, 403, 403]);
    let under_way = std::thread::spawn(long);
    std::thread::sleep(Duration::from_millis(100));
    let edited = Settings {
        max_tokens: Some(6),
        max_body: 2048,
        cors_origins: vec!["https://school.example".into()],
        allowed_hosts: vec!["tutor.school.example".into()],
        answer_timeout: Duration::from_millis(100),
        ..Settings::default()
    };
    replace(models(), Some(edited));
    // 60 words of 5 ms each take longer than an answer may.
    assert_eq!(statuses()?, [400, 413, 504, 504]);
    let (status, _, body) = under_way.join().expect("it does not panic")?;
    assert!(status == 200 && body.contains("data: [DONE]"), "{body}");
    // Without settings only the models are others.
    replace(models(), None);
    assert_eq!(statuses()?, [400, 413, 504, 504]);
    replace(models(), Some(Settings::default()));
    assert_eq!(statuses()?, [200, 200, 403, 403]);
    site.end()
}

#[test]
fn a_request_asks_for_no_more_than_the_settings_give() -> Result<()> {
    let settings = Settings { max_tokens: Some(6), max_body: 2048, ..Settings::default() };
    let site = Site::new(models(&["m"])?, &[], settings)?;
    let (status, _, body) = site.post("/v1/chat/completions", "", &chat("m", &json!({"max_tokens": 7})))?;
    assert!(
        status == 400 && body.contains("answers here are of at most 6") && body.contains("\"max_tokens\""),
        "{body}"
    );
    let (status, _, body) = site.post("/v1/chat/completions", "", &chat("m", &json!({"max_tokens": null})))?;
    assert!(status == 200 && serde_json::from_str::<Value>(&body)?["usage"]["completion_tokens"] == 6, "{body}");
    let (status, _, body) = site.post("/v1/chat/completions", "", &chat("m", &json!({"user": "x".repeat(3000)})))?;
    assert!(status == 413 && body.contains("larger than 2 KiB"), "{body}");
    site.end()
}

#[test]
fn a_key_has_half_of_the_connections_and_gets_back_what_ends() -> Result<()> {
    let ((ana, of_ana), (ben, of_ben)) = (Key::make("ana")?, Key::make("ben")?);
    let settings = Settings { connections: 6, ..Settings::default() };
    let all = [("long".to_owned(), words(u64::MAX, 10)), ("short".to_owned(), words(2, 1))];
    let site = Site::new(Models::from(all), &[ana, ben], settings)?;
    let body = chat("long", &json!({"stream": true})).to_string();
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut client = TcpStream::connect(site.at())?;
        client.set_read_timeout(Some(GUARD))?;
        let head = format!("authorization: Bearer {of_ana}\r\nhost: localhost\r\ncontent-type: application/json");
        write!(client, "POST /v1/chat/completions HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line)?;
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        open.push(client);
    }
    let ask = |key: &str| site.post("/v1/chat/completions", key, &chat("short", &json!({})));
    let (status, head, body) = ask(&of_ana)?;
    assert!(status == 429 && body.contains("3 requests open") && head.contains("retry-after: 5"), "{head}\n{body}");
    assert_eq!(ask(&of_ben)?.0, 200);
    drop(open);
    let begun = Instant::now();
    while ask(&of_ana)?.0 != 200 {
        assert!(begun.elapsed() < GUARD, "what ended is still counted");
        std::thread::sleep(Duration::from_millis(50));
    }
    site.end()
}
