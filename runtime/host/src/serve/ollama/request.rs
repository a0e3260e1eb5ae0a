//! The bodies of `/api/chat` and `/api/generate`, read field by field.
//!
//! As in OpenAI's API, what changes the answer and cannot be done is refused by name; what does not change it is ignored and named.

use serde_json::{Map, Value, json};

use super::reply::Way;
use crate::handler::{HandlerError, Message, Request, ResponseFormat, Role, TOP_LOGPROBS_MAX, ToolCall};
use crate::serve::request::{not_known, tools, wrong};

/// A request, read.
#[derive(Debug)]
pub(super) struct Asked {
    /// The model, as the client names it.
    pub model: String,
    /// The request for the handler; `None`: the model is to be loaded.
    pub request: Option<Request>,
    /// The answer is sent as a stream.
    pub stream: bool,
    /// Fields that were ignored.
    pub ignored: Vec<String>,
    /// The person for whom a program asks.
    pub user: Option<String>,
}

const COMMON: [&str; 10] =
    ["model", "stream", "options", "format", "keep_alive", "think", "logprobs", "top_logprobs", "user", "images"];
const CHAT: [&str; 2] = ["messages", "tools"];
const GENERATE: [&str; 6] = ["prompt", "system", "suffix", "template", "context", "raw"];
/// Options that are about memory and processors, which whoever runs this server has set; and the context, which is the model's.
const OF_MACHINE: [&str; 14] = [
    "num_ctx",
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "numa",
    "use_mmap",
    "use_mlock",
    "low_vram",
    "f16_kv",
    "vocab_only",
    "mirostat_eta",
    "mirostat_tau",
];
const OPTIONS: [&str; 10] = [
    "num_predict",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
];
/// Most texts that end an answer.
const STOPS_MAX: usize = 16;

/// Reads the fields of a body.
///
/// # Errors
/// When one is wrong, not supported or not known; names it.
pub(super) fn read(fields: &Map<String, Value>, way: Way) -> Result<Asked, HandlerError> {
    let own: &[&str] = match way {
        Way::Chat => &CHAT,
        Way::Generate => &GENERATE,
    };
    let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
    let mut ignored = Vec::new();
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match field.as_str() {
            known if !COMMON.contains(&known) && !own.contains(&known) => {
                return Err(not_known(known, &[&COMMON[..], own].concat()));
            }
            // How long a model stays loaded.
            "keep_alive" => ignored.push(field.clone()),
            "images" | "suffix" | "template" | "context" if !is_empty(value) => {
                return Err(HandlerError::invalid(field, format!("`{field}` is not supported; leave it out")));
            }
            "raw" if *value != false => {
                let message = "`raw` is not supported; /v1/completions goes on with a text as it stands";
                return Err(HandlerError::invalid("raw", message));
            }
            _ => {}
        }
    }
    let model = get("model").and_then(Value::as_str).filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| wrong("model", "the name of a model"))?.to_owned();
    let stream =
        get("stream").map_or(Ok(true), |value| value.as_bool().ok_or_else(|| wrong("stream", "true or false")))?;
    let user = get("user").and_then(Value::as_str).map(str::to_owned);
    let mut request = options(get("options"), &mut ignored)?;
    request.response_format = get("format").map_or(Ok(None), format)?;
    request.reasoning_effort = get("think").map_or(Ok(None), effort)?;
    request.logprobs = logprobs(get("logprobs"), get("top_logprobs"))?;
    request.messages = match way {
        Way::Chat => {
            request.tools = get("tools").filter(|tools| !is_empty(tools)).map_or(Ok(Vec::new()), tools::read)?;
            messages(get("messages"))?
        }
        Way::Generate => {
            let text = |field: &str| match get(field) {
                None => Ok(String::new()),
                Some(value) => value.as_str().map(str::to_owned).ok_or_else(|| wrong(field, "a text")),
            };
            let (system, prompt) = (text("system")?, text("prompt")?);
            let said = [(Role::System, system), (Role::User, prompt)];
            let mut said: Vec<Message> = said
                .into_iter()
                .filter(|(_, text)| !text.is_empty())
                .map(|(role, text)| Message::new(role, text))
                .collect();
            if said.last().is_none_or(|last| last.role != Role::User) {
                said.clear();
            }
            said
        }
    };
    let request = Some(request).filter(|request| !request.messages.is_empty());
    Ok(Asked { model, request, stream, ignored, user })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// Reads `options`: how the answer is drawn, and where it ends.
fn options(value: Option<&Value>, ignored: &mut Vec<String>) -> Result<Request, HandlerError> {
    let mut request = Request::default();
    let Some(value) = value else { return Ok(request) };
    // Programs in PHP send an empty object as an empty list.
    let none = Map::new();
    let options = if is_empty(value) { Some(&none) } else { value.as_object() };
    let options = options.ok_or_else(|| wrong("options", "an object"))?;
    let penalty = options.get("repeat_penalty").and_then(Value::as_f64).is_some_and(|penalty| penalty != 1.0);
    for (key, value) in options.iter().filter(|(_, value)| !value.is_null()) {
        let at = format!("options.{key}");
        let number = |bottom: f64, top: f64| {
            let number = value.as_f64().filter(|number| (bottom..=top).contains(number));
            number.map(Some).ok_or_else(|| wrong(&at, &format!("a number from {bottom} to {top}")))
        };
        // Some programs send whole numbers as 40.0.
        let whole = || {
            let float = value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 9e15);
            value.as_i64().or(float.map(|number| number as i64)).ok_or_else(|| wrong(&at, "a whole number"))
        };
        match key.as_str() {
            "num_predict" => {
                request.max_tokens = match whole()? {
                    // Without end, or to that of the context.
                    -1 | -2 => None,
                    count @ 1.. => Some(usize::try_from(count).unwrap_or(usize::MAX)),
                    _ => return Err(wrong(&at, "a whole number from 1, or -1 for no limit of the request's own")),
                };
            }
            "temperature" => request.temperature = number(0.0, 2.0)?,
            "top_p" => request.top_p = number(0.0, 1.0)?,
            "min_p" => request.min_p = number(0.0, 1.0)?,
            "repeat_penalty" => request.repetition_penalty = number(0.01, 100.0)?,
            "frequency_penalty" => request.frequency_penalty = number(-2.0, 2.0)?,
            "presence_penalty" => request.presence_penalty = number(-2.0, 2.0)?,
            "top_k" => {
                request.top_k = match whole()? {
                    -1 => Some(0),
                    count @ 0.. => Some(usize::try_from(count).unwrap_or(usize::MAX)),
                    _ => return Err(wrong(&at, "a whole number from 0, which is off")),
                };
            }
            // -1 draws another one each time.
            "seed" => request.seed = Some(whole()?).filter(|seed| *seed != -1),
            "stop" => request.stop = stop(value)?,
            "mirostat" if whole()? == 0 => ignored.push(at),
            "typical_p" | "tfs_z" if number(1.0, 1.0).is_ok() => ignored.push(at),
            // What was repeated counts in all of the conversation.
            "repeat_last_n" if !penalty || whole()? == -1 => ignored.push(at),
            "penalize_newline" if !penalty || *value == true => ignored.push(at),
            known if OF_MACHINE.contains(&known) => ignored.push(at),
            "mirostat" | "typical_p" | "tfs_z" | "repeat_last_n" | "penalize_newline" => {
                return Err(HandlerError::invalid(&at, format!("`{at}` is not supported; leave it out")));
            }
            other => {
                let known = not_known(other, &[&OPTIONS[..], &OF_MACHINE].concat());
                return Err(HandlerError::invalid(&format!("options.{}", brief(other)), format!("options: {known}")));
            }
        }
    }
    Ok(request)
}

fn brief(text: &str) -> String {
    text.chars().take(80).collect()
}

fn stop(value: &Value) -> Result<Vec<String>, HandlerError> {
    let texts = match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(texts) => texts.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let texts: Option<Vec<String>> =
        texts.map(|texts: Vec<String>| texts.into_iter().filter(|text| !text.is_empty()).collect());
    let texts = texts.filter(|texts| texts.len() <= STOPS_MAX);
    texts.ok_or_else(|| wrong("options.stop", &format!("a text, or a list of up to {STOPS_MAX}")))
}

/// Reads the form of the answer: `json`, or a schema.
fn format(value: &Value) -> Result<Option<ResponseFormat>, HandlerError> {
    match value {
        Value::String(word) if word.is_empty() => Ok(None),
        Value::String(word) if word == "json" => Ok(Some(ResponseFormat::JsonObject)),
        Value::Object(_) => Ok(Some(ResponseFormat::JsonSchema {
            name: "answer".to_owned(),
            description: None,
            schema: value.clone(),
            strict: Some(true),
        })),
        _ => Err(wrong("format", "\"json\" or a JSON schema")),
    }
}

/// Reads how long the model thinks.
fn effort(value: &Value) -> Result<Option<String>, HandlerError> {
    match value {
        Value::Bool(false) => Ok(None),
        Value::Bool(true) => Ok(Some("medium".to_owned())),
        Value::String(word) if ["low", "medium", "high"].contains(&word.as_str()) => Ok(Some(word.clone())),
        _ => Err(wrong("think", "true, false, low, medium or high")),
    }
}

fn logprobs(wanted: Option<&Value>, top: Option<&Value>) -> Result<Option<usize>, HandlerError> {
    let wanted = wanted.map_or(Ok(false), |value| value.as_bool().ok_or_else(|| wrong("logprobs", "true or false")))?;
    let top = top.map_or(Some(0), Value::as_u64).and_then(|top| usize::try_from(top).ok());
    let top = top.filter(|top| *top <= TOP_LOGPROBS_MAX);
    let top = top.ok_or_else(|| wrong("top_logprobs", &format!("a whole number from 0 to {TOP_LOGPROBS_MAX}")))?;
    Ok(wanted.then_some(top))
}

fn messages(value: Option<&Value>) -> Result<Vec<Message>, HandlerError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let list = value.as_array().ok_or_else(|| wrong("messages", "a list"))?;
    let mut messages = Vec::with_capacity(list.len());
    // Calls that have no result yet: names and ids.
    let mut open: Vec<(String, String)> = Vec::new();
    for (number, value) in list.iter().enumerate() {
        let at = |field: &str| format!("messages[{number}].{field}");
        let fields = value.as_object().ok_or_else(|| wrong(&format!("messages[{number}]"), "an object"))?;
        let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let role = match get("role").and_then(Value::as_str) {
            Some("system") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("tool") => Role::Tool,
            _ => return Err(wrong(&at("role"), "system, user, assistant or tool")),
        };
        let text = |field: &str| match get(field) {
            None => Ok(None),
            Some(value) => value.as_str().map(|text| Some(text.to_owned())).ok_or_else(|| wrong(&at(field), "a text")),
        };
        let mut message = Message::new(role, text("content")?.unwrap_or_default());
        message.reasoning = text("thinking")?.filter(|_| role == Role::Assistant);
        for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            match field.as_str() {
                "role" | "content" | "thinking" | "tool_name" | "tool_call_id" => {}
                "images" if is_empty(value) => {}
                "images" => return Err(HandlerError::invalid(&at("images"), "only text is supported")),
                "tool_calls" => message.tool_calls = calls(value, number, &at("tool_calls"))?,
                other => {
                    let other = brief(other);
                    return Err(HandlerError::invalid(
                        &at(&other),
                        format!("`{}` is not known here; leave it out", at(&other)),
                    ));
                }
            }
        }
        open.extend(message.tool_calls.iter().map(|call| (call.name.clone(), call.id.clone())));
        if role == Role::Tool {
            let (name, id) = (text("tool_name")?, text("tool_call_id")?);
            // A result names its tool, and the calls have ids of ours.
            let place = open.iter().position(|(called, _)| name.as_ref().is_none_or(|name| name == called));
            let called = place.map(|place| open.remove(place));
            message.tool_call_id = id.or(called.as_ref().map(|(_, id)| id.clone()));
            message.name = name.or(called.map(|(name, _)| name));
        }
        messages.push(message);
    }
    Ok(messages)
}

fn calls(value: &Value, message: usize, at: &str) -> Result<Vec<ToolCall>, HandlerError> {
    let list = value.as_array().ok_or_else(|| wrong(at, "a list of calls"))?;
    let call = |(number, call): (usize, &Value)| {
        let function = &call["function"];
        let name =
            function["name"].as_str().ok_or_else(|| wrong(&format!("{at}[{number}].function.name"), "a text"))?;
        let arguments = match &function["arguments"] {
            Value::Null => json!({}),
            object @ Value::Object(_) => object.clone(),
            _ => return Err(wrong(&format!("{at}[{number}].function.arguments"), "an object")),
        };
        let id = call["id"].as_str().map_or_else(|| format!("call_{message}_{number}"), str::to_owned);
        Ok(ToolCall { id, name: name.to_owned(), arguments: arguments.to_string() })
    };
    list.iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::Kind;

    fn with(way: Way, more: &Value) -> Result<Asked, HandlerError> {
        let mut body = match way {
            Way::Chat => json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
            Way::Generate => json!({"model": "m", "prompt": "hi"}),
        };
        for (key, value) in more.as_object().expect("fields") {
            body[key] = value.clone();
        }
        read(body.as_object().expect("an object"), way)
    }

    #[test]
    fn options_become_a_request() -> Result<(), HandlerError> {
        let options = json!({
            "num_predict": 20, "temperature": 0.5, "top_k": 40.0, "top_p": 0.9, "min_p": 0.1, "seed": 7, "stop": ["a", ""],
            "repeat_penalty": 1.1, "presence_penalty": 0.5, "num_ctx": 4096, "mirostat": 0, "repeat_last_n": -1,
        });
        let asked = with(
            Way::Chat,
            &json!({"options": options, "keep_alive": "5m", "format": "json", "think": false, "user": "u"}),
        )?;
        let request = asked.request.expect("something is asked");
        assert_eq!((request.max_tokens, request.top_k, request.seed), (Some(20), Some(40), Some(7)));
        assert_eq!((request.repetition_penalty, request.stop), (Some(1.1), vec!["a".to_owned()]));
        assert_eq!((request.response_format, request.reasoning_effort), (Some(ResponseFormat::JsonObject), None));
        assert!(asked.stream, "Ollama streams unless it is told not to");
        assert_eq!(asked.user.as_deref(), Some("u"));
        let mut ignored = asked.ignored;
        ignored.sort();
        assert_eq!(ignored, ["keep_alive", "options.mirostat", "options.num_ctx", "options.repeat_last_n"]);
        let open = with(Way::Generate, &json!({"options": {"num_predict": -1, "seed": -1}, "stream": false}))?;
        let request = open.request.expect("something is asked");
        assert_eq!((request.max_tokens, request.seed, open.stream), (None, None, false));
        Ok(())
    }

    #[test]
    fn a_system_prompt_stands_before_the_prompt_and_no_prompt_asks_nothing() -> Result<(), HandlerError> {
        let asked = with(Way::Generate, &json!({"system": "be brief", "options": []}))?;
        let said: Vec<_> =
            asked.request.expect("a request").messages.into_iter().map(|said| (said.role, said.content)).collect();
        assert_eq!(said, [(Role::System, "be brief".to_owned()), (Role::User, "hi".to_owned())]);
        for nothing in [json!({"prompt": ""}), json!({"prompt": null, "system": "x"})] {
            assert!(with(Way::Generate, &nothing)?.request.is_none(), "{nothing}");
        }
        assert!(with(Way::Chat, &json!({"messages": []}))?.request.is_none());
        Ok(())
    }

    #[test]
    fn results_find_their_calls() -> Result<(), HandlerError> {
        let call = |name: &str| json!({"function": {"name": name, "arguments": {"a": 1}}});
        let messages = json!([
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call("one"), call("two")]},
            {"role": "tool", "content": "2", "tool_name": "two"},
            {"role": "tool", "content": "1"},
        ]);
        let asked = with(Way::Chat, &json!({"messages": messages}))?.request.expect("a request").messages;
        assert_eq!(
            (asked[1].reasoning.as_deref(), &asked[1].tool_calls[1].arguments),
            (Some("hm"), &"{\"a\":1}".to_owned())
        );
        let results: Vec<_> =
            asked[2..].iter().map(|said| (said.tool_call_id.as_deref(), said.name.as_deref())).collect();
        assert_eq!(results, [(Some("call_1_1"), Some("two")), (Some("call_1_0"), Some("one"))]);
        Ok(())
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let param = |way, more: &Value| match with(way, more).expect_err(&more.to_string()).kind {
            Kind::InvalidRequest { param } => param.unwrap_or_default(),
            other => panic!("{more}: {other:?}"),
        };
        for (field, value) in [
            ("model", json!(7)),
            ("model", json!("")),
            ("stream", json!("yes")),
            ("format", json!("xml")),
            ("think", json!("very")),
            ("logprobs", json!(3)),
            ("top_logprobs", json!(21)),
            ("images", json!(["x"])),
            ("options", json!(7)),
            ("banana", json!(1)),
        ] {
            for way in [Way::Chat, Way::Generate] {
                assert_eq!(param(way, &json!({field: value})), field, "{value}");
            }
        }
        for (field, value) in [
            ("suffix", json!("x")),
            ("template", json!("x")),
            ("context", json!([1])),
            ("raw", json!(true)),
            ("prompt", json!(7)),
            ("messages", json!([])),
        ] {
            assert_eq!(param(Way::Generate, &json!({field: value})), field, "{value}");
        }
        for (option, value) in [
            ("num_predict", json!(0)),
            ("num_predict", json!(-3)),
            ("num_predict", json!(1.5)),
            ("num_predict", json!("5")),
            ("temperature", json!(2.5)),
            ("temperature", json!(1e308)),
            ("top_k", json!(i64::MIN)),
            ("top_p", json!(-0.1)),
            ("seed", json!(1e30)),
            ("stop", json!(5)),
            ("mirostat", json!(2)),
            ("typical_p", json!(0.5)),
            ("tempreature", json!(1)),
        ] {
            assert_eq!(param(Way::Chat, &json!({"options": {option: value}})), format!("options.{option}"), "{value}");
        }
        assert_eq!(
            param(Way::Chat, &json!({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}})),
            "options.repeat_last_n"
        );
        for (message, at) in [
            (json!("hi"), "messages[0]"),
            (json!({"content": "hi"}), "messages[0].role"),
            (json!({"role": "user", "content": 5}), "messages[0].content"),
            (json!({"role": "user", "content": "hi", "images": ["x"]}), "messages[0].images"),
            (json!({"role": "user", "content": "hi", "wieght": 1}), "messages[0].wieght"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls[0].function.name"),
        ] {
            assert_eq!(param(Way::Chat, &json!({"messages": [message]})), at, "{message}");
        }
    }
}
