//! Clients who mean harm: no panic, no memory without end, and no place held by the dead.

use homeroom::handler::limit::{Limited, Limits};
use homeroom_kernels::Stream;

use super::*;

/// Bodies that are wrong in every way that came to mind.
fn bodies() -> Vec<(&'static str, String)> {
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(10_000), close.repeat(10_000));
    let mut bodies = vec![
        ("nothing", String::new()),
        ("a list 10,000 deep", deep("[", "]")),
        ("an object 10,000 deep", format!("{}1{}", "{\"a\":".repeat(10_000), "}".repeat(10_000))),
        ("a message 10,000 deep", format!("{{\"model\":\"m\",\"messages\":{}}}", deep("[", "]"))),
        ("a list 10,000 deep that does not end", "[".repeat(10_000)),
        ("a schema 100 deep", {
            let schema = format!("{}{{}}{}", "{\"items\":".repeat(100), "}".repeat(100));
            format!(
                "{{\"model\":\"m\",\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"prompt\":\"hi\",\"format\":{schema}}}"
            )
        }),
        ("no text", "\u{0}\u{1}\u{7f}".to_owned()),
        ("half a surrogate", "{\"model\":\"\\ud800\"}".to_owned()),
        ("the same key many times", format!("{{{}\"model\":\"m\"}}", "\"model\":1,".repeat(50_000))),
        ("very many keys", {
            let keys: String = (0..50_000).map(|number| format!("\"k{number}\":1,")).collect();
            format!("{{{keys}\"model\":\"m\"}}")
        }),
        ("very many messages", {
            let messages = vec!["{\"role\":\"user\",\"content\":\"\"}"; 40_000].join(",");
            format!("{{\"model\":\"m\",\"messages\":[{messages}],\"prompt\":\"\"}}")
        }),
    ];
    let numbers = [
        "NaN",
        "Infinity",
        "-1e400",
        "1e308",
        "-9223372036854775808",
        "1e9",
        "18446744073709551616",
        "-0.0",
        "0x10",
        "null",
        "\"1\"",
        "[]",
        "{}",
        "true",
    ];
    for field in [
        "n",
        "max_tokens",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "top_logprobs",
        "logprobs",
        "stop",
        "stream",
        "tools",
        "user",
        "logit_bias",
    ] {
        for number in numbers {
            bodies.push((
                field,
                format!(
                    "{{\"model\":\"m\",\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"{field}\":{number}}}"
                ),
            ));
        }
    }
    for option in ["num_predict", "seed", "temperature", "top_k", "num_ctx", "stop", "mirostat", "repeat_penalty"] {
        for number in numbers {
            bodies
                .push((option, format!("{{\"model\":\"m\",\"prompt\":\"hi\",\"options\":{{\"{option}\":{number}}}}}")));
        }
    }
    bodies
}

const PATHS: [&str; 9] = [
    "/v1/chat/completions",
    "/v1/embeddings",
    "/openai/deployments/m/chat/completions",
    "/openai/deployments/%ff/chat/completions",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
];

#[test]
fn no_body_ends_the_server() -> Result<()> {
    let settings = Settings { max_tokens: Some(4), ..Settings::default() };
    let site = Site::new(models(&["m"])?, &[], settings)?;
    for (what, body) in bodies() {
        for path in PATHS {
            let (status, _, answer) = site.ask("POST", path, "content-type: application/json", &body)?;
            assert!((200..500).contains(&status) || status == 503, "{what} at {path}: {status} {answer:.300}");
            assert!(answer.len() < 1 << 20, "{what} at {path}");
        }
    }
    assert_eq!(site.post("/v1/chat/completions", "", &chat("m", &json!({})))?.0, 200);
    site.end()
}

/// A good body with some bytes changed, taken out, or doubled.
#[test]
fn no_mutation_of_a_body_ends_the_server() -> Result<()> {
    let settings = Settings { max_tokens: Some(2), ..Settings::default() };
    let site = Site::new(models(&["m"])?, &[], settings)?;
    let good = json!({
        "model": "m", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "hi"}], "stream": true,
        "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "seed": 7, "user": "u", "options": {"num_predict": 2},
        "stream_options": {"include_usage": true}, "prompt": "hi", "input": ["a", "b"], "response_format": {"type": "text"},
    });
    let good = good.to_string().into_bytes();
    let mut random = Stream::new(21, 7);
    for _ in 0..400 {
        let mut body = good.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(body.len());
            match random.below(4) {
                0 => body[at] = random.below(128) as u8,
                1 => drop(body.remove(at)),
                2 => body.insert(at, b"{}[]\",:0-e\\u"[random.below(12)]),
                _ => body.truncate(at.max(1)),
            }
        }
        let body = String::from_utf8_lossy(&body).into_owned();
        let path = PATHS[random.below(PATHS.len())];
        let (status, _, answer) = site.ask("POST", path, "content-type: application/json", &body)?;
        assert!((200..500).contains(&status), "{path} with {body}: {status} {answer:.300}");
    }
    site.end()
}

#[test]
fn no_header_ends_the_server() -> Result<()> {
    let (key, _) = Key::make("class")?;
    let site = Site::new(models(&["m"])?, &[key], Settings::default())?;
    let long = "x".repeat(60_000);
    let many = (0..90).map(|number| format!("x-{number}: {number}")).collect::<Vec<_>>().join("\n");
    let too_many = (0..5000).map(|number| format!("x-{number}: {number}")).collect::<Vec<_>>().join("\n");
    for (headers, wanted) in [
        (format!("authorization: Bearer {long}"), 401),
        (format!("authorization: Basic {long}"), 401),
        ("authorization: Basic ====".to_owned(), 401),
        ("authorization: Basic \u{fffd}".to_owned(), 401),
        ("authorization: Negotiate abc".to_owned(), 401),
        (format!("x-api-key: {long}"), 401),
        (format!("x-request-id: {long}"), 401),
        (format!("origin: {long}"), 401),
        (format!("accept: {long}"), 401),
        (many, 401),
        (format!("host: {long}"), 403),
        ("host: localhost\nhost: evil.example".to_owned(), 403),
        (too_many, 431),
        (format!("x-long: {}", "x".repeat(300_000)), 431),
    ] {
        // A server that has read enough hangs up while the client still sends.
        match site.ask("GET", "/v1/models", &headers, "") {
            Ok((status, head, _)) => {
                let is_wanted =
                    status == wanted || (headers.matches("host:").count() > 1 && [400, 401, 403].contains(&status));
                assert!(is_wanted, "{headers:.80}: {head}");
            }
            Err(error) => assert_eq!(wanted, 431, "{headers:.80}: {error:#}"),
        }
    }
    // What is no HTTP.
    for raw in [
        "\u{16}\u{3}\u{1}",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET http://[::1 HTTP/1.1\r\n\r\n",
    ] {
        let mut client = TcpStream::connect(site.at())?;
        client.set_read_timeout(Some(GUARD))?;
        client.write_all(raw.as_bytes())?;
        let _ = client.shutdown(std::net::Shutdown::Write);
        let _ = client.read_to_end(&mut Vec::new());
    }
    assert_eq!(site.ask("GET", "/healthz", "", "")?.0, 200);
    site.end()
}

/// What is larger than the settings allow is not gathered: not by its length, and not in chunks.
#[cfg(target_os = "linux")]
#[test]
fn a_body_of_100_mb_takes_no_memory() -> Result<()> {
    fn resident() -> Result<u64> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a line")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }
    let site = Site::new(models(&["m"])?, &[], Settings::default())?;
    let before = resident()?;
    let piece = vec![b' '; 1 << 20];
    for chunked in [false, true] {
        let sending: Vec<_> = (0..8)
            .map(|_| {
                let (at, piece) = (site.at(), piece.clone());
                std::thread::spawn(move || -> Result<String> {
                    let mut client = TcpStream::connect(at)?;
                    client.set_read_timeout(Some(GUARD))?;
                    let length = if chunked { "transfer-encoding: chunked" } else { "content-length: 104857600" };
                    write!(client, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{length}\r\n\r\n")?;
                    for _ in 0..100 {
                        let head = if chunked { format!("{:x}\r\n", piece.len()) } else { String::new() };
                        let sent = client.write_all(head.as_bytes()).and_then(|()| client.write_all(&piece));
                        let sent = sent.and_then(|()| client.write_all(if chunked { b"\r\n" } else { b"" }));
                        if sent.is_err() {
                            break;
                        }
                    }
                    let mut answer = String::new();
                    let _ = client.read_to_string(&mut answer);
                    Ok(answer)
                })
            })
            .collect();
        for one in sending {
            let answer = one.join().expect("it does not panic")?;
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer:.200}");
        }
    }
    // Eight bodies of 4 MiB, and what the allocator keeps of them.
    let grown = resident()?.saturating_sub(before);
    assert!(grown < 150 << 20, "{grown} bytes more");
    assert_eq!(site.post("/v1/chat/completions", "", &chat("m", &json!({})))?.0, 200);
    site.end()
}

/// A request that is cut anywhere, by a client that is gone, holds nothing.
#[test]
fn a_request_that_is_cut_anywhere_holds_no_place() -> Result<()> {
    let (mut key, text) = Key::make("class")?;
    key.limits.tokens_per_day = Some(1_000_000);
    let handler: Arc<dyn Handler> = Arc::new(Limited::new(words(1_000_000, 5), Limits { running: 2, waiting: 0 }));
    let site = Site::new(Models::from([("m".to_owned(), handler)]), &[key], Settings::default())?;
    for (path, body) in [
        ("/v1/chat/completions", chat("m", &json!({"stream": true, "max_tokens": 100}))),
        ("/v1/chat/completions", chat("m", &json!({"max_tokens": 100}))),
        ("/api/generate", json!({"model": "m", "prompt": "hi"})),
    ] {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {text}\r\ncontent-type: application/json"
        );
        let whole = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        for cut in (0..=whole.len()).step_by(7).chain([whole.len()]) {
            let mut client = TcpStream::connect(site.at())?;
            client.write_all(&whole.as_bytes()[..cut])?;
            if cut % 2 == 0 {
                let _ = client.set_read_timeout(Some(Duration::from_millis(5)));
                let _ = client.read(&mut [0; 64]);
            }
        }
        // All places are free again, and no token is reserved for the dead.
        until("the places are free", || {
            let (status, _, page) = site.get("/readyz", &text)?;
            Ok(status == 200 && page["status"] == "ready" && {
                let (status, _, _) = site.ask("GET", "/metrics", &format!("authorization: Bearer {text}"), "")?;
                status == 200
            })
        })?;
        let begun = || -> Result<bool> {
            let mut both = Vec::new();
            for _ in 0..2 {
                let body = chat("m", &json!({"stream": true, "max_tokens": 499_000})).to_string();
                let mut client = TcpStream::connect(site.at())?;
                client.set_read_timeout(Some(GUARD))?;
                let head = format!(
                    "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {text}\r\ncontent-type: application/json"
                );
                write!(client, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
                let mut line = String::new();
                BufReader::new(&client).read_line(&mut line)?;
                if !line.starts_with("HTTP/1.1 200") {
                    return Ok(false);
                }
                both.push(client);
            }
            Ok(true)
        };
        until("both places and nearly all tokens are free", begun)?;
    }
    site.end()
}
