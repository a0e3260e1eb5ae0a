//! The body of `POST /v1/chat/completions`, read field by field.
//!
//! A field that is not supported or not known is refused by name: an answer that silently ignores it is worse than none. A field that
//! does not change the answer is ignored, and named in the header `x-ignored-params`.

use homeroom_engine::text::template::join_parts;
use serde_json::{Map, Value};

use crate::handler::{HandlerError, Message, Request, Role};
use crate::toml_problems::near;

/// A request, read.
#[derive(Debug)]
pub struct Asked {
    /// The model, by our name for it.
    pub model: String,
    /// The request for the handler.
    pub request: Request,
    /// The answer is sent as a stream.
    pub stream: bool,
    /// The stream ends with the usage.
    pub include_usage: bool,
    /// Fields that were ignored.
    pub ignored: Vec<String>,
    /// The person for whom a program asks.
    pub user: Option<String>,
}

/// Returns, for a field that changes the answer and is not supported yet, whether its value asks for nothing.
fn asks_for_nothing(field: &str, value: &Value) -> Option<bool> {
    let is_zero = || value.as_f64() == Some(0.0);
    let is_empty = || value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty);
    Some(match field {
        "n" => value.as_u64() == Some(1),
        "top_logprobs" => is_zero(),
        "logprobs" | "store" => value == false,
        "tools" | "functions" | "logit_bias" => is_empty(),
        "tool_choice" | "function_call" | "reasoning_effort" => value == "none",
        "verbosity" => value == "medium",
        "response_format" => value["type"] == "text",
        "modalities" => value.as_array().is_some_and(|list| list.iter().all(|item| item == "text")),
        "audio" | "prediction" | "web_search_options" => false,
        _ => return None,
    })
}

/// Reads a body.
///
/// # Errors
/// When it is not JSON, or a field is wrong, not supported or not known; names the field.
pub fn read(body: &[u8]) -> Result<Asked, HandlerError> {
    let fields = super::body::fields(body)?;
    let mut ignored = Vec::new();
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match asks_for_nothing(field, value) {
            Some(true) => {}
            Some(false) => {
                let message = match field.as_str() {
                    "n" => "a request gets one answer; `n` should be 1".to_owned(),
                    _ => format!("`{field}` is not supported yet; leave it out"),
                };
                return Err(HandlerError::invalid(field, message));
            }
            None if HONOURED.contains(&field.as_str()) => {}
            None if HARMLESS.contains(&field.as_str()) => ignored.push(field.clone()),
            None => {
                let name: String = field.chars().take(80).collect();
                let message = format!("`{name}` is not known here, {}", near(&name, &HONOURED));
                return Err(HandlerError::invalid(&name, message));
            }
        }
    }
    let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
    let model = get("model").ok_or_else(|| HandlerError::invalid("model", "`model` is missing"))?;
    let model = model.as_str().ok_or_else(|| wrong("model", "a text"))?.to_owned();
    let messages = get("messages").ok_or_else(|| HandlerError::invalid("messages", "`messages` is missing"))?;
    let stream_options = get("stream_options");
    if let Some(options) = stream_options {
        let options = options.as_object().ok_or_else(|| wrong("stream_options", "an object"))?;
        for key in options.keys().filter(|key| *key != "include_usage") {
            if key != "include_obfuscation" {
                return Err(unknown("stream_options", key));
            }
            ignored.push(format!("stream_options.{key}"));
        }
    }
    let mut max_tokens = None;
    for field in ["max_tokens", "max_completion_tokens"] {
        if let Some(value) = get(field) {
            let count = value.as_u64().filter(|count| *count >= 1);
            let count = count.ok_or_else(|| wrong(field, "a whole number from 1"))?;
            max_tokens = Some(usize::try_from(count).unwrap_or(usize::MAX));
        }
    }
    let number = |field: &str, bottom: f64, top: f64| -> Result<Option<f64>, HandlerError> {
        let Some(value) = get(field) else { return Ok(None) };
        let number = value.as_f64().filter(|number| (bottom..=top).contains(number));
        number.map(Some).ok_or_else(|| wrong(field, &format!("a number from {bottom} to {top}")))
    };
    // 0 and -1 are both in use for "all".
    let top_k = get("top_k").map(|value| match value.as_i64() {
        Some(-1) => Ok(0),
        Some(count @ 0..) => Ok(usize::try_from(count).unwrap_or(usize::MAX)),
        _ => Err(wrong("top_k", "a whole number from 0, which is off")),
    });
    let mut repetition_penalty = None;
    for field in ["repetition_penalty", "repeat_penalty"] {
        repetition_penalty = number(field, 0.01, 100.0)?.or(repetition_penalty);
    }
    let flag = |field: &str, value: Option<&Value>| match value {
        None | Some(Value::Null) => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| wrong(field, "true or false")),
    };
    let seed = get("seed").map(|value| value.as_i64().ok_or_else(|| wrong("seed", "a whole number of 64 bits")));
    let request = Request {
        messages: read_messages(messages, &mut ignored)?,
        max_tokens,
        temperature: number("temperature", 0.0, 2.0)?,
        top_k: top_k.transpose()?,
        top_p: number("top_p", 0.0, 1.0)?,
        min_p: number("min_p", 0.0, 1.0)?,
        repetition_penalty,
        frequency_penalty: number("frequency_penalty", -2.0, 2.0)?,
        presence_penalty: number("presence_penalty", -2.0, 2.0)?,
        seed: seed.transpose()?,
        stop: get("stop").map_or(Ok(Vec::new()), read_stop)?,
    };
    let stream = flag("stream", get("stream"))?;
    let include_usage = stream_options.map(|options| &options["include_usage"]);
    let include_usage = flag("stream_options.include_usage", include_usage)?;
    let user = ["user", "safety_identifier"].into_iter().find_map(|field| get(field)?.as_str()).map(str::to_owned);
    Ok(Asked { model, request, stream, include_usage, ignored, user })
}

const HONOURED: [&str; 16] = [
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
];

/// Fields of OpenAI's API that do not change the answer.
const HARMLESS: [&str; 8] = [
    "user",
    "safety_identifier",
    "metadata",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
];
/// Fields of a message that programs send back as they received them, and that are not for the model.
const HARMLESS_IN_MESSAGES: [&str; 8] =
    ["name", "id", "refusal", "annotations", "reasoning", "reasoning_content", "thinking", "tool_call_id"];

fn unknown(at: &str, field: &str) -> HandlerError {
    let field: String = field.chars().take(80).collect();
    HandlerError::invalid(&format!("{at}.{field}"), format!("`{at}.{field}` is not known here; leave it out"))
}

fn wrong(field: &str, wanted: &str) -> HandlerError {
    HandlerError::invalid(field, format!("`{field}` should be {wanted}"))
}

fn read_stop(value: &Value) -> Result<Vec<String>, HandlerError> {
    let texts = match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(texts) => texts.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let texts = texts.filter(|texts| texts.len() <= 4 && texts.iter().all(|text| !text.is_empty()));
    texts.ok_or_else(|| wrong("stop", "a text, or a list of up to 4, none empty"))
}

fn read_messages(value: &Value, ignored: &mut Vec<String>) -> Result<Vec<Message>, HandlerError> {
    let list = value.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| wrong("messages", "a list of at least one message"))?;
    let mut messages = Vec::with_capacity(list.len());
    for (i, message) in list.iter().enumerate() {
        let at = |field: &str| format!("messages[{i}].{field}");
        let fields = message.as_object().ok_or_else(|| wrong(&format!("messages[{i}]"), "an object"))?;
        let role = match fields.get("role").and_then(Value::as_str) {
            Some("system") => Role::System,
            Some("developer") => Role::Developer,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("tool" | "function") => {
                return Err(HandlerError::invalid(
                    &at("role"),
                    "messages of tools are not supported yet; send system, developer, user or assistant",
                ));
            }
            _ => return Err(wrong(&at("role"), "system, developer, user or assistant")),
        };
        let mut parts = Vec::new();
        let content = match fields.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(several)) => {
                parts = read_parts(several, &at("content"))?;
                let whole = join_parts(parts.iter().map(String::as_str));
                if parts.len() < 2 {
                    parts.clear();
                }
                whole
            }
            None | Some(Value::Null) if role == Role::Assistant => String::new(),
            _ => return Err(wrong(&at("content"), "a text, or a list of parts")),
        };
        for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            match field.as_str() {
                "role" | "content" => {}
                "tool_calls" | "function_call" | "audio" if value.as_array().is_none_or(|list| !list.is_empty()) => {
                    return Err(HandlerError::invalid(&at(field), format!("`{field}` is not supported yet")));
                }
                "tool_calls" | "function_call" | "audio" => {}
                other if !HARMLESS_IN_MESSAGES.contains(&other) => {
                    return Err(unknown(&format!("messages[{i}]"), other));
                }
                other => {
                    let name = format!("messages[].{other}");
                    if !ignored.contains(&name) {
                        ignored.push(name);
                    }
                }
            }
        }
        messages.push(Message { role, content, parts });
    }
    Ok(messages)
}

fn read_parts(parts: &[Value], at: &str) -> Result<Vec<String>, HandlerError> {
    let text = |(i, part): (usize, &Value)| match (part["type"].as_str(), part["text"].as_str()) {
        // Such as `cache_control`.
        (Some("text"), Some(_)) if part.as_object().is_some_and(|part| part.len() > 2) => {
            let other =
                part.as_object().into_iter().flat_map(Map::keys).find(|key| !["type", "text"].contains(&key.as_str()));
            Err(unknown(&format!("{at}[{i}]"), other.map_or("", String::as_str)))
        }
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (Some("text") | None, _) => Err(wrong(&format!("{at}[{i}]"), "an object with `type` and `text`")),
        (Some(_), _) => Err(HandlerError::invalid(&format!("{at}[{i}].type"), "only text is supported")),
    };
    parts.iter().enumerate().map(text).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::handler::Kind;

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
            ("n", json!(2)),
            ("n", json!(1_000_000_000)),
            ("n", json!("1")),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("auto")),
            ("functions", json!([{}])),
            ("response_format", json!({"type": "json_object"})),
            ("logprobs", json!(true)),
            ("top_logprobs", json!(3)),
            ("frequency_penalty", json!(2.5)),
            ("presence_penalty", json!("1")),
            ("top_k", json!(-2)),
            ("top_k", json!(1.5)),
            ("min_p", json!(1.1)),
            ("repetition_penalty", json!(0)),
            ("repeat_penalty", json!("x")),
            ("verbosity", json!("low")),
            ("reasoning_effort", json!("high")),
            ("banana", json!(1)),
            ("num_predict", json!(5)),
            ("typical_p", json!(0.5)),
            ("guided_json", json!({})),
            ("logit_bias", json!({"5": 1})),
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
            (json!({"role": "tool", "content": "hi"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0]"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls"),
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
            "n": 1, "tools": [], "tool_choice": "none", "logprobs": false, "presence_penalty": 0.5, "logit_bias": null,
            "response_format": {"type": "text"}, "user": "u", "verbosity": "medium", "banana": null, "service_tier": "auto",
            "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "frequency_penalty": -2,
            "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false},
            "max_tokens": 5, "max_completion_tokens": 7, "stop": "x", "seed": -1,
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "name": "n", "refusal": "r", "tool_calls": []},
            ],
        }))?;
        assert_eq!(
            asked.ignored,
            ["user", "service_tier", "stream_options.include_obfuscation", "messages[].name", "messages[].refusal"]
        );
        let Request { top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, .. } = asked.request;
        assert_eq!((top_k, min_p, repetition_penalty), (Some(40), Some(0.05), Some(1.1)));
        assert_eq!((frequency_penalty, presence_penalty), (Some(-2.0), Some(0.5)));
        assert_eq!(with(&json!({"top_k": -1, "repeat_penalty": 1.2}))?.request.top_k, Some(0));
        assert!(asked.stream && asked.include_usage);
        assert_eq!(asked.request.max_tokens, Some(7));
        assert_eq!(asked.request.seed, Some(-1));
        let developer = Message { parts: vec!["a".into(), "b".into()], ..Message::new(Role::Developer, "a\nb") };
        assert_eq!(asked.request.messages, [developer, Message::new(Role::Assistant, "")]);
        Ok(())
    }
}
