//! What is read, and what is refused by name.

use serde_json::json;

use super::*;
use crate::handler::{Backend, Kind, Message, Part, ResponseFormat, Role, Tool, ToolCall, ToolChoice, supports};

fn with(more: &Value) -> Result<Asked, HandlerError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in more.as_object().expect("fields") {
        body[key] = value.clone();
    }
    read(body.to_string().as_bytes())
}

fn param(more: &Value) -> Option<String> {
    match with(more).expect_err(&format!("{more} is refused")).kind {
        Kind::InvalidRequest { param } => param,
        other => panic!("{more}: {other:?}"),
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    for (field, value) in [
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!(-1)),
        ("n", json!(1_000_000_000)),
        ("n", json!(i64::MIN)),
        ("n", json!("1")),
        ("tools", json!({})),
        ("tools", json!(vec![json!({"type": "function", "function": {"name": "f"}}); 129])),
        ("tool_choice", json!("any")),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ("tool_choice", json!({"type": "allowed_tools", "allowed_tools": {}})),
        ("functions", json!([{}])),
        ("function_call", json!("auto")),
        ("response_format", json!("json_object")),
        ("logprobs", json!(1)),
        ("top_logprobs", json!(3)),
        ("top_logprobs", json!(21)),
        ("frequency_penalty", json!(2.5)),
        ("presence_penalty", json!("1")),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(1.1)),
        ("repetition_penalty", json!(0)),
        ("repeat_penalty", json!("x")),
        ("verbosity", json!("low")),
        ("reasoning_effort", json!("hihg")),
        ("banana", json!(1)),
        ("num_predict", json!(5)),
        ("typical_p", json!(0.5)),
        ("guided_json", json!({})),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!({"-1": 1})),
        ("logit_bias", json!([1])),
        ("modalities", json!(["text", "audio"])),
        ("prediction", json!({})),
        ("store", json!(true)),
        ("model", json!(7)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_completion_tokens", json!(1.5)),
        ("temperature", json!(2.5)),
        ("temperature", json!(1e308)),
        ("top_p", json!(-0.1)),
        ("seed", json!(1e30)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("stop", json!(5)),
        ("stream", json!("yes")),
        ("stream_options", json!(true)),
    ] {
        assert_eq!(param(&json!({field: value})).as_deref(), Some(field), "{field}: {value}");
    }
    for (message, at) in [
        (json!("hi"), "messages[0]"),
        (json!({"content": "hi"}), "messages[0].role"),
        (json!({"role": "robot", "content": "hi"}), "messages[0].role"),
        (json!({"role": "function", "name": "f", "content": "hi"}), "messages[0].role"),
        (json!({"role": "tool", "content": "hi"}), "messages[0].tool_call_id"),
        (json!({"role": "tool", "tool_call_id": "c"}), "messages[0].content"),
        (json!({"role": "user"}), "messages[0].content"),
        (json!({"role": "user", "content": [{"type": "input_audio"}]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content[0].image_url.url"),
        (
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}),
            "messages[0].content[0].image_url.url",
        ),
        (json!({"role": "system", "content": [{"type": "image_url"}]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0]"),
        (json!({"role": "user", "content": "", "tool_calls": [{}]}), "messages[0].tool_calls"),
        (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls[0].function.name"),
        (json!({"role": "assistant", "tool_calls": [{"type": "custom"}]}), "messages[0].tool_calls[0].type"),
        (
            json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (json!({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}), "messages[0].tool_calls[0].id"),
        (json!({"role": "user", "content": "hi", "wieght": 0}), "messages[0].wieght"),
        (
            json!({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}),
            "messages[0].content[0].cache_control",
        ),
    ] {
        assert_eq!(param(&json!({"messages": [message]})).as_deref(), Some(at), "{message}");
    }
    let options = json!({"stream_options": {"include_usages": true}});
    assert_eq!(param(&options).as_deref(), Some("stream_options.include_usages"));
    let near = with(&json!({"max_token": 5})).expect_err("it is not known").message;
    assert!(near.contains("did you mean `max_tokens`?"), "{near}");
    assert_eq!(read(b"{").expect_err("not JSON").kind, Kind::InvalidRequest { param: None });
    assert!(read("[".repeat(100_000).as_bytes()).is_err());
}

#[test]
fn what_asks_for_nothing_is_fine_and_the_harmless_is_named() -> Result<(), HandlerError> {
    let asked = with(&json!({
        "n": 1, "tools": [], "tool_choice": "none", "logprobs": false, "presence_penalty": 0.5, "logit_bias": {},
        "response_format": {"type": "text"}, "user": "u", "verbosity": "medium", "banana": null, "service_tier": "auto",
        "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "frequency_penalty": -2,
        "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
        "max_tokens": 5, "max_completion_tokens": 7, "stop": "x", "seed": -1,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "name": "n", "refusal": "r", "tool_calls": []},
        ],
    }))?;
    assert_eq!(asked.ignored, ["user", "service_tier", "messages[].refusal", "stream_options.include_obfuscation"]);
    let Request { top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, .. } = asked.request;
    assert_eq!((top_k, min_p, repetition_penalty), (Some(40), Some(0.05), Some(1.1)));
    assert_eq!((frequency_penalty, presence_penalty), (Some(-2.0), Some(0.5)));
    assert_eq!(with(&json!({"top_k": -1, "repeat_penalty": 1.2}))?.request.top_k, Some(0));
    assert!(asked.stream && asked.include_usage);
    assert_eq!(asked.request.max_tokens, Some(7));
    assert_eq!(asked.request.seed, Some(-1));
    let parts = ["a", "b"].map(|text| Part::Text(text.into())).to_vec();
    let developer = Message { parts, ..Message::new(Role::Developer, "a\nb") };
    let assistant = Message { name: Some("n".into()), ..Message::new(Role::Assistant, "") };
    assert_eq!(asked.request.messages, [developer, assistant]);
    assert!(asked.request.given().iter().all(|field| supports(Backend::Local, *field)));
    Ok(())
}

#[test]
fn tools_and_forms_are_read_whole_and_refused_by_place() -> Result<(), HandlerError> {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let function = json!({"name": "weather", "description": "d", "parameters": schema, "strict": true});
    let tools = json!([{"type": "function", "function": function}, {"type": "function", "function": {"name": "time"}}]);
    let call = json!({"id": "c", "type": "function", "index": 0, "function": {"name": "weather", "arguments": "{}"}});
    let asked = with(&json!({
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "time"}},
        "parallel_tool_calls": false,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}},
        "logprobs": true, "top_logprobs": 2, "n": 3, "logit_bias": {"7": -100}, "reasoning_effort": "low",
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}]},
            {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "name": "weather", "content": "sunny"},
        ],
    }))?;
    assert!(asked.ignored.is_empty(), "{:?}", asked.ignored);
    let request = asked.request;
    let weather = Tool {
        name: "weather".into(),
        description: Some("d".into()),
        parameters: Some(schema.clone()),
        strict: Some(true),
    };
    assert_eq!(request.tools, [weather.clone(), Tool { name: "time".into(), ..Tool::default() }]);
    assert_eq!(weather.json()["function"], function);
    assert_eq!(request.tool_choice, Some(ToolChoice::Named("time".into())));
    assert_eq!((request.parallel_tool_calls, request.n, request.logprobs), (Some(false), Some(3), Some(2)));
    assert_eq!(request.logit_bias.get(&7), Some(&-100.0));
    let (name, strict) = ("s".to_owned(), Some(true));
    assert_eq!(request.response_format, Some(ResponseFormat::JsonSchema { name, description: None, schema, strict }));
    let [picture, called, result] = &request.messages[..] else { panic!("three messages") };
    assert!(matches!(&picture.parts[..], [Part::Image { detail: Some(detail), .. }] if detail == "low"));
    assert_eq!(called.tool_calls, [ToolCall { id: "c".into(), name: "weather".into(), arguments: "{}".into() }]);
    assert_eq!(called.reasoning.as_deref(), Some("hm"));
    assert_eq!((result.tool_call_id.as_deref(), result.name.as_deref()), (Some("c"), Some("weather")));

    let tool = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let format = |inner: Value| json!({"response_format": {"type": "json_schema", "json_schema": inner}});
    for (more, at) in [
        (json!({"tools": [{"type": "custom", "custom": {}}]}), "tools[0].type"),
        (json!({"tools": [7]}), "tools[0]"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (tool(json!({})), "tools[0].function.name"),
        (tool(json!({"name": "a b"})), "tools[0].function.name"),
        (tool(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
        (tool(json!({"name": "f", "strict": 1})), "tools[0].function.strict"),
        (tool(json!({"name": "f", "paramters": {}})), "tools[0].function.paramters"),
        (json!({"tools": vec![json!({"type": "function", "function": {"name": "f"}}); 2]}), "tools[1].function.name"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_object", "schema": {}}}), "response_format.schema"),
        (format(json!({"schema": {}})), "response_format.json_schema.name"),
        (format(json!({"name": "s"})), "response_format.json_schema.schema"),
        (format(json!({"name": "s", "schema": true})), "response_format.json_schema.schema"),
    ] {
        assert_eq!(param(&more).as_deref(), Some(at), "{more}");
    }
    let ignored = with(&json!({"parallel_tool_calls": true}))?.ignored;
    assert_eq!(ignored, ["parallel_tool_calls"]);
    Ok(())
}
