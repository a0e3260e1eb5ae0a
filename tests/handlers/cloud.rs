//! What providers send, and what a handler of kind `openai` makes of it.

use super::*;

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
    let start = Start { id: "i".into(), model: "n".into(), handler: "far".into(), ..Start::default() };
    let choices = vec![Choice::of_text("aé🦊", FinishReason::Stop)];
    assert_eq!(plain, Completion { start, choices, usage });
    // No id, no model, no usage, no [DONE], no last empty line: still whole, and the usage is not known.
    let bare =
        told(stream_of(&format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"a\"}}}}]}}\n\ndata: {stop}")))??;
    assert_eq!((bare.text(), bare.usage, bare.start.model.as_str()), ("a", Usage::default(), "m"));
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
        (429, "retry-after: 1e18\r\n", "x", limited(Some(Duration::from_secs(3600)))),
        (429, "retry-after: 1e300\r\n", "x", limited(Some(Duration::from_secs(3600)))),
        (429, "retry-after: inf\r\n", "x", limited(Some(Duration::from_secs(3600)))),
        (429, "retry-after-ms: 1e300\r\n", "x", limited(Some(Duration::from_secs(3600)))),
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
        assert!(!format!("{refused:?}").contains("sk-test"), "{refused}");
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
            json!({"error": {"message": "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is 8192 tokens and your request has 40 input tokens (32000 > 8192 - 40).", "type": "BadRequestError", "param": "max_tokens", "code": 400}}),
            Kind::ContextLength,
            "8192",
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
            Kind::Protocol,
            "set max_tokens_param = \"max_completion_tokens\"",
        ),
        (500, json!({}), Kind::Unavailable, "gave no reason (status 500)"),
    ] {
        let refused = told(refusal(status, "", &body))?.expect_err("it refused");
        assert!(refused.kind == kind && refused.to_string().contains(words), "{body}: {refused:?}");
    }
    let raw = |status: &str, text: &str| {
        told(format!(
            "HTTP/1.1 {status} No\r\ncontent-length: {}\r\nconnection: close\r\n{text}",
            text.split_once("\r\n\r\n").map_or(0, |(_, body)| body.len())
        ))
    };
    let long_page =
        format!("content-type: text/html\r\n\r\n<html><title>502 Much Ado</title><body>{}</body>", "é".repeat(100_000));
    let page = "content-type: text/html\r\n\r\n<!doctype html><html>\n<head><title>502 Bad Gateway</title></head>";
    for (status, text, kind, words) in [
        ("502", page, Kind::Unavailable, "/v1: 502 Bad Gateway (status 502)"),
        ("502", "content-type: text/html\r\n\r\n<html>", Kind::Unavailable, "gave no reason"),
        ("502", &long_page, Kind::Unavailable, "502 Much Ado (status 502)"),
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
        ("200", "content-type: application/json\r\n\r\n{\"choices\":[{\"mess", Kind::Cut, "connection ended"),
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
        assert!(refused.kind == kind && refused.to_string().contains(words), "{text}: {refused:?}");
    }
    let (url, thread) = scripted(vec![refusal(404, "", &json!(null))])?;
    let lost = endpoint(url.trim_end_matches("/v1"), "m")?.complete(&asked("hi", 5), &Context::default());
    assert!(lost.expect_err("it is elsewhere").to_string().contains("may lack a /v1"));
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
            assert_eq!((answer.text(), answer.finish()), ("é🦊", &FinishReason::Length), "{kind}: {body}");
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
            assert_eq!((answer.text(), answer.finish()), ("é🦊", &FinishReason::Stop), "{choice}");
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
        (format!("{word}data: {{\"choi"), Kind::Cut),
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
    // So does a refusal, of which is told what there is.
    let words = "{\"error\":\"too many\"}";
    let endless = format!("HTTP/1.1 429 No\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{words}\r\n", words.len());
    let refused = told(endless)?.expect_err("it refused");
    assert!(
        refused.kind == Kind::RateLimited { retry_after: None } && refused.to_string().contains("too many"),
        "{refused}"
    );
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
            assert_eq!(handler.complete(&asked("hi", 5), &Context::default())?.text(), "a");
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
