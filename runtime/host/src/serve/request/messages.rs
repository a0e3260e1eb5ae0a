//! The messages of a request.

use homeroom_engine::text::template::join_parts;
use serde_json::{Map, Value};

use super::{unknown, wrong};
use crate::handler::{HandlerError, Message, Part, Role, ToolCall};

/// Fields of a message that programs send back as they received them, and that are not for the model.
const HARMLESS: [&str; 3] = ["id", "refusal", "annotations"];
/// The names that programs have for what a model thought.
const REASONING: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];
/// Most calls of a message.
const CALLS_MAX: usize = 128;

/// Reads a list of messages.
///
/// # Errors
/// Names the field that is wrong, not supported or not known.
pub(super) fn read(value: &Value, ignored: &mut Vec<String>) -> Result<Vec<Message>, HandlerError> {
    let list = value.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| wrong("messages", "a list of at least one message"))?;
    let one = |(i, message): (usize, &Value)| {
        let at = format!("messages[{i}]");
        let fields = message.as_object().ok_or_else(|| wrong(&at, "an object"))?;
        read_one(&at, fields, ignored)
    };
    list.iter().enumerate().map(one).collect()
}

fn read_one(place: &str, fields: &Map<String, Value>, ignored: &mut Vec<String>) -> Result<Message, HandlerError> {
    let at = |field: &str| format!("{place}.{field}");
    let role = match fields.get("role").and_then(Value::as_str) {
        Some("system") => Role::System,
        Some("developer") => Role::Developer,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some("function") => {
            return Err(HandlerError::invalid(&at("role"), "messages of functions are not supported; send role tool"));
        }
        _ => return Err(wrong(&at("role"), "system, developer, user, assistant or tool")),
    };
    let mut message = Message::new(role, "");
    match fields.get("content") {
        Some(Value::String(text)) => message.content.clone_from(text),
        Some(Value::Array(several)) => {
            let parts = read_parts(several, &at("content"), role)?;
            let texts = parts.iter().filter_map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Image { .. } => None,
            });
            message.content = join_parts(texts);
            if !matches!(&parts[..], [] | [Part::Text(_)]) {
                message.parts = parts;
            }
        }
        None | Some(Value::Null) if role == Role::Assistant => {}
        _ => return Err(wrong(&at("content"), "a text, or a list of parts")),
    }
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong(&at(field), "a text"));
        match field.as_str() {
            "role" | "content" => {}
            "tool_calls" if role == Role::Assistant => message.tool_calls = read_calls(value, &at(field))?,
            "tool_calls" if value.as_array().is_some_and(Vec::is_empty) => {}
            "tool_calls" => return Err(HandlerError::invalid(&at(field), "only an assistant calls tools")),
            "tool_call_id" if role == Role::Tool => message.tool_call_id = Some(text()?),
            "name" => message.name = Some(text()?),
            "function_call" | "audio" if value.as_array().is_none_or(|list| !list.is_empty()) => {
                return Err(HandlerError::invalid(&at(field), format!("`{field}` is not supported; leave it out")));
            }
            "function_call" | "audio" => {}
            reasoning if role == Role::Assistant && REASONING.contains(&reasoning) => {
                if message.reasoning.is_none() {
                    message.reasoning = value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
                }
            }
            other if HARMLESS.contains(&other) || REASONING.contains(&other) || other == "tool_call_id" => {
                let name = format!("messages[].{other}");
                if !ignored.contains(&name) {
                    ignored.push(name);
                }
            }
            other => return Err(unknown(place, other)),
        }
    }
    if role == Role::Tool && message.tool_call_id.as_ref().is_none_or(String::is_empty) {
        return Err(wrong(&at("tool_call_id"), "the id of the call that this is the result of"));
    }
    Ok(message)
}

fn read_calls(value: &Value, at: &str) -> Result<Vec<ToolCall>, HandlerError> {
    let list = value.as_array().filter(|list| list.len() <= CALLS_MAX);
    let list = list.ok_or_else(|| wrong(at, &format!("a list of up to {CALLS_MAX} calls")))?;
    let call = |(i, call): (usize, &Value)| {
        let at = format!("{at}[{i}]");
        let fields = call.as_object().ok_or_else(|| wrong(&at, "an object"))?;
        if let Some(other) = fields.keys().find(|key| !["id", "type", "function", "index"].contains(&key.as_str())) {
            return Err(unknown(&at, other));
        }
        if call.get("type").is_some_and(|kind| kind != "function") {
            return Err(HandlerError::invalid(&format!("{at}.type"), "only calls of functions are supported"));
        }
        let text = |value: &Value, field: &str| {
            value.as_str().map(str::to_owned).ok_or_else(|| wrong(&format!("{at}.{field}"), "a text"))
        };
        let function = &call["function"];
        let name = text(&function["name"], "function.name")?;
        // Some programs send what they parsed.
        let arguments = match &function["arguments"] {
            Value::Null => "{}".to_owned(),
            arguments @ Value::Object(_) => arguments.to_string(),
            arguments => text(arguments, "function.arguments")?,
        };
        Ok(ToolCall { id: text(&call["id"], "id")?, name, arguments })
    };
    list.iter().enumerate().map(call).collect()
}

fn read_parts(parts: &[Value], at: &str, role: Role) -> Result<Vec<Part>, HandlerError> {
    parts.iter().enumerate().map(|(i, part)| read_part(part, &format!("{at}[{i}]"), role)).collect()
}

fn read_part(part: &Value, at: &str, role: Role) -> Result<Part, HandlerError> {
    let only =
        |known: &[&str]| match part.as_object().and_then(|part| part.keys().find(|key| !known.contains(&key.as_str())))
        {
            // Such as `cache_control`.
            Some(other) => Err(unknown(at, other)),
            None => Ok(()),
        };
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => only(&["type", "text"]).map(|()| Part::Text(text.to_owned())),
        (Some("text") | None, _) => Err(wrong(at, "an object with `type` and `text`")),
        (Some("image_url"), _) if role == Role::User => {
            only(&["type", "image_url"])?;
            let image = &part["image_url"];
            let url = image.as_str().or_else(|| image["url"].as_str());
            let url =
                url.filter(|url| ["https://", "http://", "data:image/"].iter().any(|start| url.starts_with(start)));
            let url =
                url.ok_or_else(|| wrong(&format!("{at}.image_url.url"), "an address, or data:image/…;base64,…"))?;
            let detail = image["detail"].as_str().map(str::to_owned);
            Ok(Part::Image { url: url.to_owned(), detail })
        }
        (Some(_), _) => {
            Err(HandlerError::invalid(&format!("{at}.type"), "only text, and image_url of a user, are supported"))
        }
    }
}
