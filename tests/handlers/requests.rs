//! What a model of this machine does with choices, log-probabilities, biases, forms and tools.

use homeroom::handler::{Prompt, ResponseFormat, Tool, ToolChoice};

use super::*;

/// The same model with a context that tools fit into.
fn wide() -> Result<Arc<dyn Handler>> {
    let mut loaded = loaded()?;
    Arc::get_mut(&mut loaded.model).context("nobody else has it")?.architecture.max_position_embeddings = 1024;
    Ok(Arc::new(Local::new("llama", Answerer::of(loaded, Compute::auto())?)))
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 1, "maximum": 20}},
        "required": ["colour", "count"],
    })
}

fn held(schema: Value, strict: bool) -> Option<ResponseFormat> {
    Some(ResponseFormat::JsonSchema { name: "s".into(), description: None, schema, strict: Some(strict) })
}

#[test]
fn choices_are_as_they_would_be_alone() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    let ask =
        |seed, n| Request { temperature: Some(1.5), seed: Some(seed), n, ..asked("hello there, who are you", 10) };
    let together = local.complete(&ask(5, Some(3)), &context)?;
    let texts: Vec<&str> = together.choices.iter().map(|choice| choice.text.as_str()).collect();
    let alone = (5..8).map(|seed| Ok(local.complete(&ask(seed, None), &context)?.text().to_owned()));
    assert_eq!(texts, alone.collect::<Result<Vec<String>>>()?);
    assert_eq!(together.usage.completion_tokens, Some(30));
    Ok(())
}

/// The probability of what greedy decoding takes is the largest, and what is asked for beside it comes with it.
#[test]
fn log_probabilities_are_of_the_text_and_in_order() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    let plain = local.complete(&asked("hello", 8), &context)?;
    let whole = local.complete(&Request { logprobs: Some(3), ..asked("hello", 8) }, &context)?;
    assert_eq!(whole.text(), plain.text(), "they change nothing");
    let tokens = &whole.choices[0].logprobs;
    assert_eq!(tokens.len(), 8);
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.bytes.clone().unwrap_or_default()).collect();
    assert_eq!(String::from_utf8_lossy(&bytes).trim_start(), whole.text().trim_start());
    for token in tokens {
        assert!(token.logprob <= 0.0 && token.top.len() == 3 && token.top[0].logprob == token.logprob, "{token:?}");
        assert!(token.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
    }
    let none = local.complete(&Request { logprobs: Some(0), ..asked("hello", 3) }, &context)?;
    assert!(none.choices[0].logprobs.iter().all(|token| token.top.is_empty()));
    Ok(())
}

#[test]
fn a_bias_decides_what_is_drawn() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    let biased = |id, bias| Request { logit_bias: [(id, bias)].into(), logprobs: Some(0), ..asked("hello", 4) };
    let whole = local.complete(&biased(70, 100.0), &context)?;
    let tokens: Vec<&str> = whole.choices[0].logprobs.iter().map(|token| token.token.as_str()).collect();
    assert!(tokens.len() == 4 && tokens.iter().all(|token| *token == tokens[0]), "{tokens:?}");
    let refused = local.complete(&biased(1_000_000, 1.0), &context).expect_err("there is no such token");
    assert_eq!(refused.kind, Kind::InvalidRequest { param: Some("logit_bias".into()) });
    Ok(())
}

/// A model with random weights writes what the form lets pass, at any temperature.
#[test]
fn an_answer_is_held_to_its_form() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    for (seed, temperature) in [(1, 0.0), (2, 1.0), (3, 2.0)] {
        let draw = Request { temperature: Some(temperature), seed: Some(seed), n: Some(2), ..asked("hello", 150) };
        let whole = local.complete(&Request { response_format: held(schema(), true), ..draw.clone() }, &context)?;
        for choice in &whole.choices {
            assert_eq!(choice.finish, FinishReason::Stop, "{}", choice.text);
            let value: Value = serde_json::from_str(&choice.text).context(choice.text.clone())?;
            assert!(["red", "green"].contains(&value["colour"].as_str().context("a colour")?), "{value}");
            assert!((1..=20).contains(&value["count"].as_i64().context("a count")?), "{value}");
            assert_eq!(value.as_object().map(serde_json::Map::len), Some(2), "{value}");
        }
    }
    let cut = Request { response_format: held(schema(), true), ..asked("hello", 3) };
    let cut = local.complete(&cut, &context)?;
    assert_eq!(cut.finish(), &FinishReason::Length);
    assert!(cut.text().starts_with('{'), "{}", cut.text());
    let any = Request { response_format: Some(ResponseFormat::JsonObject), ..asked("hello", 5) };
    assert!(local.complete(&any, &context)?.text().trim_start().starts_with('{'));
    // The next answer is free again.
    assert_eq!(local.complete(&asked("hello", 5), &context)?.finish(), &FinishReason::Length);
    Ok(())
}

#[test]
fn a_schema_that_nothing_is_by_is_refused_by_name() -> Result<()> {
    let (local, context) = (local()?, Context::default());
    let deep = (0..60).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
    );
    assert!(local.complete(&Request { response_format: held(deep, true), ..asked("hello", 2) }, &context).is_ok());
    let large: serde_json::Map<String, Value> = (0..60_000)
        .map(|i| {
            (
                format!("p{i}"),
                json!({"type": "object", "properties": {format!("q{i}"): {"type": "integer", "minimum": i}}}),
            )
        })
        .collect();
    for schema in [
        json!({"type": "object", "properties": {"a": false}, "required": ["a"]}),
        json!({"type": "integer", "minimum": 5, "maximum": 3}),
        json!({"type": "banana"}),
        json!({"$ref": "#/$defs/nothing"}),
        json!({"$ref": "https://example.com/schema.json"}),
        json!({"$ref": "#"}),
        json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        json!({"type": "string", "pattern": "("}),
        json!({"type": "array", "uniqueItems": true}),
        json!({"type": "object", "properties": large}),
    ] {
        let text: String = schema.to_string().chars().take(80).collect();
        let request = Request { response_format: held(schema, true), ..asked("hello", 2) };
        let refused = local.complete(&request, &context).expect_err(&text);
        assert_eq!(refused.kind, Kind::InvalidRequest { param: Some("response_format".into()) }, "{text}: {refused}");
    }
    Ok(())
}

fn tools() -> Vec<Tool> {
    let city = json!({
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "$defs": {"city": {"enum": ["Ulm", "Bonn"]}},
    });
    let tool = |name: &str, parameters| Tool { name: name.into(), parameters, ..Tool::default() };
    vec![tool("weather", Some(city)), tool("time", None)]
}

/// Also with a template that knows no tools, and a model that never saw one.
#[test]
fn a_tool_that_must_be_called_is_called() -> Result<()> {
    let (local, context) = (wide()?, Context::default());
    let ask = |tool_choice, seed| Request {
        tools: tools(),
        tool_choice: Some(tool_choice),
        temperature: Some(1.0),
        seed: Some(seed),
        ..asked("hi", 80)
    };
    for seed in 0..3 {
        let whole = local.complete(&ask(ToolChoice::Named("weather".into()), seed), &context)?;
        let [call] = &whole.choices[0].tool_calls[..] else { panic!("{whole:?}") };
        let arguments: Value = serde_json::from_str(&call.arguments)?;
        assert!(call.name == "weather" && ["Ulm", "Bonn"].contains(&arguments["city"].as_str().context("a city")?));
        assert_eq!((whole.text(), whole.finish()), ("", &FinishReason::ToolCalls));
        assert!(call.id.starts_with("call_"));
    }
    let names: Vec<String> = (0..8)
        .map(|seed| {
            Ok(local.complete(&ask(ToolChoice::Required, seed), &context)?.choices[0].tool_calls[0].name.clone())
        })
        .collect::<Result<_>>()?;
    assert!(names.iter().all(|name| name == "weather" || name == "time"), "{names:?}");
    let cut = Request { max_tokens: Some(4), ..ask(ToolChoice::Required, 1) };
    assert_eq!(local.complete(&cut, &context)?.finish(), &FinishReason::Length);
    // Whoever may call, or answer in a form, does one of both.
    let (mut called, mut said) = (0, 0);
    for seed in 0..12 {
        let either =
            Request { tool_choice: None, response_format: held(schema(), true), ..ask(ToolChoice::Auto, seed) };
        let whole = local.complete(&Request { max_tokens: Some(200), ..either }, &context)?;
        match &whole.choices[0].tool_calls[..] {
            [] => {
                assert!(serde_json::from_str::<Value>(whole.text())?.get("colour").is_some(), "{whole:?}");
                said += 1;
            }
            [call] => {
                assert!(call.name == "weather" || call.name == "time", "{whole:?}");
                called += 1;
            }
            _ => panic!("{whole:?}"),
        }
    }
    assert!(called > 0 && said > 0, "{called} {said}");
    // Whoever may call need not.
    let free = local.complete(&Request { tools: tools(), ..asked("hi", 5) }, &context)?;
    assert!(free.choices[0].tool_calls.is_empty());
    Ok(())
}

#[test]
fn a_text_is_gone_on_with_as_it_stands() -> Result<()> {
    let server = serve(Models::from([("m".into(), local()?)]))?;
    let ask = |more: &Value| -> Result<(u16, Value)> {
        let mut body = json!({"model": "m", "prompt": "once upon", "max_tokens": 6, "temperature": 0});
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
        let (status, _, text) = http(server.address, head, &body.to_string())?;
        let whole = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
        let chunks: Vec<Value> = whole.map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok((status, if chunks.is_empty() { serde_json::from_str(&text)? } else { Value::Array(chunks) }))
    };
    let (status, whole) = ask(&json!({}))?;
    assert_eq!((status, &whole["object"]), (200, &json!("text_completion")), "{whole}");
    let text = whole["choices"][0]["text"].as_str().context("a text")?;
    assert_eq!(
        (&whole["choices"][0]["finish_reason"], &whole["usage"]["completion_tokens"]),
        (&json!("length"), &json!(6))
    );
    let (_, both) = ask(&json!({"prompt": ["once upon", "a time"], "echo": true, "n": 2}))?;
    let texts: Vec<&str> =
        both["choices"].as_array().context("choices")?.iter().filter_map(|choice| choice["text"].as_str()).collect();
    assert_eq!(texts.len(), 4);
    assert_eq!(texts[..2], [format!("once upon{text}"), format!("once upon{text}")]);
    assert!(texts[2].starts_with("a time") && texts[2] == texts[3], "{texts:?}");
    assert_eq!(both["usage"]["completion_tokens"], 24);
    let (_, likely) = ask(&json!({"logprobs": 2}))?;
    let logprobs = &likely["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(6));
    assert_eq!(
        (logprobs["top_logprobs"][0].as_object().map(serde_json::Map::len), &logprobs["text_offset"][0]),
        (Some(2), &json!(0))
    );
    let (_, chunks) = ask(&json!({"stream": true, "echo": true, "stream_options": {"include_usage": true}}))?;
    let chunks = chunks.as_array().context("chunks")?;
    let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, format!("once upon{text}"));
    assert_eq!(chunks[chunks.len() - 1]["usage"]["completion_tokens"], 6);
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion" && chunk["id"] == chunks[0]["id"]));
    for (more, param) in
        [(json!({"suffix": "x"}), "suffix"), (json!({"prompt": []}), "prompt"), (json!({"top_kk": 1}), "top_kk")]
    {
        let (status, refused) = ask(&more)?;
        assert_eq!((status, &refused["error"]["param"]), (400, &json!(param)), "{refused}");
    }
    server.stop();
    server.wait()?;
    // The same through another server.
    let server = serve(Models::from([("m".into(), local()?)]))?;
    let far = endpoint(&server.url(), "m")?;
    let request = Request {
        messages: Vec::new(),
        prompt: Some(Prompt::Text("once upon".into())),
        logprobs: Some(2),
        ..asked("", 6)
    };
    let whole = far.complete(&request, &Context::default())?;
    assert_eq!((whole.text(), whole.choices[0].logprobs.len(), whole.choices[0].logprobs[0].top.len()), (text, 6, 2));
    server.stop();
    server.wait()
}

/// A handler that asks another `homeroom serve` gives what that gives.
#[test]
fn what_one_server_gives_another_passes_on() -> Result<()> {
    let local = wide()?;
    let server = serve(Models::from([("m".into(), local.clone())]))?;
    let far = endpoint(&server.url(), "m")?;
    let context = Context::default();
    let request = Request { n: Some(2), logprobs: Some(2), logit_bias: [(7, 1.5)].into(), ..asked("hello", 6) };
    let (here, there) = (local.complete(&request, &context)?, far.complete(&request, &context)?);
    assert_eq!((&there.choices, there.usage), (&here.choices, here.usage));
    let held = Request { response_format: held(schema(), true), ..asked("hello", 150) };
    assert_eq!(far.complete(&held, &context)?.text(), local.complete(&held, &context)?.text());
    let call = Request { tools: tools(), tool_choice: Some(ToolChoice::Required), ..asked("hi", 80) };
    let (here, there) = (local.complete(&call, &context)?, far.complete(&call, &context)?);
    let calls = |whole: &Completion| -> Vec<(String, String)> {
        whole.choices[0].tool_calls.iter().map(|call| (call.name.clone(), call.arguments.clone())).collect()
    };
    assert_eq!((calls(&there), there.finish()), (calls(&here), here.finish()));
    server.stop();
    server.wait()
}
