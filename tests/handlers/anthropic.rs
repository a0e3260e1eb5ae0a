//! A handler of kind `anthropic` against a server that refuses what the API refuses.

use homeroom::handler::anthropic::{Anthropic, ApiVersion};
use homeroom::handler::{ResponseFormat, Tool, ToolCall, ToolChoice};

use super::*;

fn anthropic(url: &str, version: ApiVersion, drop_unsupported: bool) -> Result<Anthropic> {
    let endpoint = Endpoint { name: "claude".into(), ..settings(url.trim_end_matches("/v1"), "claude-x")? };
    Ok(Anthropic { endpoint, version, drop_unsupported, max_tokens: 100 })
}

/// What the API says of a request: its answer, or what is wrong with it.
fn answered(request: &str, version: ApiVersion) -> Result<String, String> {
    let (head, body) = request.split_once("\r\n\r\n").ok_or("no body")?;
    let head = head.to_lowercase();
    let has = |line: &str| head.lines().any(|header| header == line);
    if !head.starts_with("post /v1/messages http/1.1") {
        return Err(format!("path: {head}"));
    }
    if !has(&format!("anthropic-version: {}", version.word())) {
        return Err("anthropic-version".into());
    }
    let (key, bearer) = (has("x-api-key: sk-test-1234"), has("authorization: bearer sk-test-1234"));
    if (key, bearer) != (version == ApiVersion::V2023, version == ApiVersion::V2026) {
        return Err(format!("the key: {head}"));
    }
    let body: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
    let mut known = vec![
        "model",
        "max_tokens",
        "messages",
        "system",
        "stop_sequences",
        "stream",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
    ];
    if version == ApiVersion::V2023 {
        known.extend(["temperature", "top_p", "top_k"]);
    }
    if let Some(field) = body.as_object().ok_or("an object")?.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(format!("{field}: Extra inputs are not permitted"));
    }
    if body["max_tokens"].as_u64().is_none() || body["stream"] != true {
        return Err("max_tokens: Field required".into());
    }
    if body["temperature"].as_f64().is_some_and(|temperature| temperature > 1.0) {
        return Err("temperature: range: 0..1".into());
    }
    let mut called: Vec<String> = Vec::new();
    let mut last = "assistant";
    for message in body["messages"].as_array().ok_or("messages")? {
        let role = message["role"].as_str().ok_or("a role")?;
        if role == last {
            return Err("roles must alternate".into());
        }
        last = if role == "user" { "user" } else { "assistant" };
        let blocks = message["content"].as_array().cloned().unwrap_or_default();
        let results: Vec<String> = (blocks.iter().filter(|block| block["type"] == "tool_result"))
            .map(|block| block["tool_use_id"].as_str().unwrap_or_default().to_owned())
            .collect();
        if results != called {
            return Err(format!("tool_use ids without tool_result: {called:?}, {results:?}"));
        }
        if blocks.iter().any(|block| block["type"] == "text" && block["text"] == "") || message["content"] == "" {
            return Err("text content blocks must be non-empty".into());
        }
        let calls = blocks.iter().filter(|block| block["type"] == "tool_use");
        called = calls.map(|block| block["id"].as_str().unwrap_or_default().to_owned()).collect();
    }
    if body.get("tool_choice").is_some() && body.get("tools").is_none() {
        return Err("tool_choice without tools".into());
    }
    for tool in body["tools"].as_array().into_iter().flatten() {
        if tool["input_schema"]["type"] != "object" {
            return Err("tools.0.input_schema.type: Field required".into());
        }
    }
    let schema = &body["output_config"]["format"];
    let text = if schema["type"] == "json_schema" { "{\\\"a\\\": 1}" } else { "Grüß dich" };
    let call = body["tool_choice"]["type"] == "any" || body["tool_choice"]["type"] == "tool";
    Ok(stream(text, call))
}

/// A stream as the API sends one, with a ping and types that nobody knows yet.
fn stream(text: &str, call: bool) -> String {
    let block = if call {
        r#"{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"toolu_1","name":"weather","input":{}}}
{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":""}}
{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"city\": "}}
{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"\"Ulm\"}"}}
{"type":"content_block_stop","index":1}
{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"output_tokens":9}}"#
            .to_owned()
    } else {
        format!(
            r#"{{"type":"content_block_start","index":1,"content_block":{{"type":"text","text":""}}}}
{{"type":"content_block_delta","index":1,"delta":{{"type":"text_delta","text":"{text}"}}}}
{{"type":"content_block_stop","index":1}}
{{"type":"message_delta","delta":{{"stop_reason":"end_turn","stop_sequence":null}},"usage":{{"output_tokens":9}}}}"#
        )
    };
    let begin = r#"{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","content":[],"model":"claude-x-1","stop_reason":null,"usage":{"input_tokens":10,"cache_creation_input_tokens":3,"cache_read_input_tokens":4,"output_tokens":1}}}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"ping"}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}
{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"abc"}}
{"type":"content_block_stop","index":0}
{"type":"what_comes_next","x":1}"#;
    let events = format!("{begin}\n{block}\n{{\"type\":\"message_stop\"}}");
    let frame = |event: &str| {
        let kind = event.split('"').nth(3).unwrap_or_default();
        format!("event: {kind}\ndata: {event}\n\n")
    };
    stream_of(&events.lines().map(frame).collect::<String>())
}

/// Answers so many requests as the API does.
fn strict(version: ApiVersion, requests: usize) -> Result<(String, std::thread::JoinHandle<Vec<String>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let thread = std::thread::spawn(move || {
        let mut seen = Vec::new();
        for _ in 0..requests {
            let Ok((mut stream, _)) = listener.accept() else { break };
            let request = read_request(&stream).unwrap_or_default();
            let reply = answered(&request, version).unwrap_or_else(|wrong| {
                let error = json!({"type": "error", "error": {"type": "invalid_request_error", "message": wrong}, "request_id": "req_1"});
                refusal(400, "connection: close\r\n", &error)
            });
            let _ = stream.write_all(reply.as_bytes());
            seen.push(request);
        }
        seen
    });
    Ok((url, thread))
}

fn body(request: &str) -> Result<Value> {
    Ok(serde_json::from_str(request.split("\r\n\r\n").last().context("a body")?)?)
}

fn weather() -> Tool {
    let parameters = Some(json!({"type": "object", "properties": {"city": {"type": "string"}}}));
    Tool { name: "weather".into(), description: Some("of a city".into()), parameters, strict: Some(true) }
}

#[test]
fn both_versions_of_the_api_are_spoken() -> Result<()> {
    for version in ApiVersion::ALL {
        let (url, thread) = strict(version, 2)?;
        let handler = anthropic(&url, version, false)?;
        let messages = vec![
            Message::new(Role::System, "Kurz."),
            Message::new(Role::Developer, "Auf Deutsch."),
            Message::new(Role::User, "Hallo"),
        ];
        let plain = Request { messages, stop: vec!["X".into()], ..Request::default() };
        let whole = handler.complete(&plain, &Context::default())?;
        assert_eq!((whole.text(), whole.finish()), ("Grüß dich", &FinishReason::Stop));
        assert_eq!(whole.choices[0].reasoning, "hm");
        assert_eq!(
            (whole.start.id.as_str(), whole.start.model.as_str(), whole.start.handler.as_str()),
            ("msg_1", "claude-x-1", "claude")
        );
        // What was read from the provider's cache was read all the same.
        assert_eq!(whole.usage, Usage { prompt_tokens: Some(17), completion_tokens: Some(9) });
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let format = ResponseFormat::JsonSchema {
            name: "s".into(),
            description: None,
            schema: schema.clone(),
            strict: Some(true),
        };
        let held = Request { response_format: Some(format), max_tokens: Some(7), ..plain };
        assert_eq!(handler.complete(&held, &Context::default())?.text(), r#"{"a": 1}"#);
        let requests = thread.join().expect("the server does not panic");
        let want = json!({
            "model": "claude-x", "max_tokens": 100, "stream": true, "system": "Kurz.\n\nAuf Deutsch.",
            "messages": [{"role": "user", "content": "Hallo"}], "stop_sequences": ["X"],
        });
        assert_eq!(body(&requests[0])?, want);
        let held = body(&requests[1])?;
        assert_eq!(
            (&held["output_config"], &held["max_tokens"]),
            (&json!({"format": {"type": "json_schema", "schema": schema}}), &json!(7))
        );
    }
    Ok(())
}

#[test]
fn what_the_newer_version_does_not_know_is_refused_or_dropped_and_named() -> Result<()> {
    let drawn = Request { top_p: Some(0.9), top_k: Some(0), ..asked("hi", 5) };
    let reject = anthropic("http://127.0.0.1:1/v1", ApiVersion::V2026, false)?;
    let refused = reject.complete(&drawn, &Context::default()).expect_err("it is not known there");
    assert_eq!(refused.kind, Kind::InvalidRequest { param: Some("temperature".into()) });
    let (url, thread) = strict(ApiVersion::V2026, 1)?;
    let handler: Arc<dyn Handler> = Arc::new(anthropic(&url, ApiVersion::V2026, true)?);
    let server = serve(Models::from([("m".into(), handler)]))?;
    let (status, headers, body) = post(
        server.address,
        &chat_body(&json!({"model": "m", "temperature": 0.2, "top_p": 0.9, "seed": 3, "service_tier": "auto"})),
    )?;
    assert_eq!(status, 200, "{body}");
    assert!(headers.contains("x-ignored-params: service_tier,temperature,top_p,seed"), "{headers}");
    thread.join().expect("the server does not panic");
    server.stop();
    server.wait()?;
    // The older one knows these, in its own range, and nobody's seed.
    let (url, thread) = strict(ApiVersion::V2023, 1)?;
    let handler = anthropic(&url, ApiVersion::V2023, false)?;
    let older = Request { seed: None, ..drawn };
    assert_eq!(handler.complete(&older, &Context::default())?.text(), "Grüß dich");
    let warm = Request { temperature: Some(1.5), ..older };
    let refused = handler.complete(&warm, &Context::default()).expect_err("it is beyond the range");
    assert_eq!(refused.kind, Kind::InvalidRequest { param: Some("temperature".into()) });
    thread.join().expect("the server does not panic");
    // What is more than the draw is refused in any case.
    for (request, param) in [
        (Request { n: Some(2), ..asked("hi", 5) }, "n"),
        (Request { logprobs: Some(0), ..asked("hi", 5) }, "logprobs"),
        (Request { response_format: Some(ResponseFormat::JsonObject), ..asked("hi", 5) }, "response_format"),
    ] {
        let handler = anthropic("http://127.0.0.1:1/v1", ApiVersion::V2023, true)?;
        let refused = handler.complete(&request, &Context::default()).expect_err(param);
        assert_eq!(refused.kind, Kind::InvalidRequest { param: Some(param.into()) });
    }
    Ok(())
}

#[test]
fn tools_are_called_and_their_results_are_read() -> Result<()> {
    let (url, thread) = strict(ApiVersion::V2026, 2)?;
    let handler = anthropic(&url, ApiVersion::V2026, false)?;
    let ask = Request {
        messages: vec![Message::new(Role::User, "Wie ist das Wetter?")],
        tools: vec![weather()],
        tool_choice: Some(ToolChoice::Required),
        parallel_tool_calls: Some(false),
        ..Request::default()
    };
    let whole = handler.complete(&ask, &Context::default())?;
    let call = ToolCall { id: "toolu_1".into(), name: "weather".into(), arguments: "{\"city\": \"Ulm\"}".into() };
    assert_eq!((&whole.choices[0].tool_calls, whole.finish()), (&vec![call.clone()], &FinishReason::ToolCalls));
    let other = ToolCall { id: "toolu_2".into(), arguments: String::new(), ..call.clone() };
    let result = |id: &str, text: &str| Message { tool_call_id: Some(id.into()), ..Message::new(Role::Tool, text) };
    let messages = vec![
        Message::new(Role::User, "Wie ist das Wetter?"),
        Message { tool_calls: vec![call, other], ..Message::new(Role::Assistant, "") },
        result("toolu_1", "sonnig"),
        result("toolu_2", "wolkig"),
        Message::new(Role::User, "Und?"),
    ];
    let back = Request { messages, tool_choice: None, parallel_tool_calls: None, ..ask };
    assert_eq!(handler.complete(&back, &Context::default())?.text(), "Grüß dich");
    let requests = thread.join().expect("the server does not panic");
    let first = body(&requests[0])?;
    assert_eq!(first["tool_choice"], json!({"type": "any", "disable_parallel_tool_use": true}));
    assert_eq!(first["tools"][0]["strict"], true);
    let second = body(&requests[1])?;
    let want = json!([
        {"role": "user", "content": "Wie ist das Wetter?"},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}},
            {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sonnig"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "wolkig"},
            {"type": "text", "text": "Und?"},
        ]},
    ]);
    assert_eq!(second["messages"], want);
    assert!(second.get("tool_choice").is_none());
    Ok(())
}

#[test]
fn what_the_api_refuses_and_what_breaks_off_has_a_kind() -> Result<()> {
    let told = |reply: String| -> Result<HandlerError> {
        let (url, thread) = scripted(vec![reply])?;
        let answer = anthropic(&url, ApiVersion::V2026, false)?
            .complete(&Request { temperature: None, seed: None, ..asked("hi", 5) }, &Context::default());
        thread.join().expect("the server does not panic");
        Ok(answer.expect_err("it is no answer"))
    };
    let error = |kind: &str| json!({"type": "error", "error": {"type": kind, "message": "no: sk-test-1234"}, "request_id": "r"});
    let seven = Duration::from_secs(7);
    for (status, headers, kind, want) in [
        (400, "", "invalid_request_error", Kind::InvalidRequest { param: None }),
        (401, "", "authentication_error", Kind::Authentication),
        (402, "", "billing_error", Kind::RateLimited { retry_after: None }),
        (403, "", "permission_error", Kind::Authentication),
        (404, "", "not_found_error", Kind::NotFound),
        (429, "retry-after: 7\r\n", "rate_limit_error", Kind::RateLimited { retry_after: Some(seven) }),
        (500, "", "api_error", Kind::Unavailable),
        (504, "", "timeout_error", Kind::Timeout),
        (529, "", "overloaded_error", Kind::Unavailable),
        (529, "retry-after: 7\r\n", "overloaded_error", Kind::Overloaded { retry_after: seven }),
    ] {
        let refused = told(refusal(status, headers, &error(kind)))?;
        assert_eq!(refused.kind, want, "{status} {kind}: {refused}");
        assert!(!format!("{refused:?}").contains("sk-test"), "{refused}");
    }
    let whole = stream("x", false);
    let cut = |at: &str| whole.split_once(at).map(|(before, _)| before.to_owned()).unwrap_or_default();
    let late = |kind: &str| format!("{}event: error\ndata: {}\n\n", cut("event: message_delta"), error(kind));
    for (reply, want) in [
        (cut("event: content_block_start"), Kind::Cut),
        (cut("event: message_delta"), Kind::Cut),
        (late("overloaded_error"), Kind::Unavailable),
        (late("rate_limit_error"), Kind::RateLimited { retry_after: None }),
        (late("not_found_error"), Kind::NotFound),
        (stream("", true), Kind::Protocol),
        (stream_of("data: {\"type\":\"mess"), Kind::Cut),
        ("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>".to_owned(), Kind::Protocol),
        ("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}".to_owned(), Kind::Protocol),
        (
            format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", error("rate_limit_error")),
            Kind::RateLimited { retry_after: None },
        ),
    ] {
        let refused = told(reply.clone())?;
        assert_eq!(refused.kind, want, "{reply}: {refused}");
    }
    // Behind its reason nothing is missing; and some servers do not stream.
    for reply in [
        cut("event: message_stop"),
        format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}",
            json!({
                "id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": "max_tokens",
                "content": [{"type": "text", "text": "x"}], "usage": {"input_tokens": 1, "output_tokens": 2},
            })
        ),
    ] {
        let (url, thread) = scripted(vec![reply])?;
        let handler = anthropic(&url, ApiVersion::V2023, false)?;
        let request = Request { seed: None, ..asked("hi", 5) };
        assert_eq!(handler.complete(&request, &Context::default())?.text(), "x");
        thread.join().expect("the server does not panic");
    }
    Ok(())
}

#[test]
fn a_file_names_the_version_and_what_becomes_of_the_unsupported() -> Result<()> {
    let file = |more: &str| {
        format!(
            "[handlers.c]\nkind = \"anthropic\"\nmodel = \"claude-x\"\n{more}\n[routes.r]\nhandlers = [\"c\"]\negress = \"allow\"\n"
        )
    };
    let config = Config::parse(
        Path::new("h.toml"),
        &file("api_version = \"2026-10-21\"\nunsupported = \"drop\"\nmax_tokens = 9"),
    )?;
    assert_eq!(config.handlers["c"].far_host(), Some("api.anthropic.com"));
    assert!(format!("{:?}", config.handlers["c"]).contains("V2026"));
    for (more, wanted) in [
        ("api_version = \"2026-10-22\"", "did you mean `2026-10-21`?"),
        ("unsupported = \"ignore\"", "`unsupported`: `ignore` is unknown"),
        ("max_tokens = 0", "`max_tokens`: should be from 1"),
        ("max_tokens_param = \"max_tokens\"", "`max_tokens_param`: unknown key"),
        ("temperature = 1.5", "`temperature`: should be from 0 to 1"),
        ("api_version = \"2026-10-21\"\ntemperature = 0.5", "`temperature`: this version of the API does not know it"),
        ("api_version = \"2026-10-21\"\nunsupported = \"drop\"\ntop_p = 0.5", "`top_p`: this version of the API"),
        ("base_url = \"https://api.example.com/v1/messages\"", "leave out /messages"),
    ] {
        let error = Config::parse(Path::new("h.toml"), &file(more)).expect_err(more);
        assert!(format!("{error:#}").contains(wanted), "{wanted}: {error:#}");
    }
    Ok(())
}
