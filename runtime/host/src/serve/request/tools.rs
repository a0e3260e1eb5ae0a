//! The tools of a request, the choice among them, and the form of the answer.

use serde_json::{Map, Value};

use super::{unknown, wrong};
use crate::handler::{HandlerError, ResponseFormat, Tool, ToolChoice};

/// Most tools of a request.
const TOOLS_MAX: usize = 128;
/// Longest name of a tool or a schema.
const NAME_MAX: usize = 64;
/// Longest description that is read, in bytes.
const DESCRIPTION_MAX: usize = 64 << 10;

/// Reads a list of tools.
///
/// # Errors
/// Names the field that is wrong, not supported or not known.
pub(in crate::serve) fn read(value: &Value) -> Result<Vec<Tool>, HandlerError> {
    let list = value.as_array().filter(|list| list.len() <= TOOLS_MAX);
    let list = list.ok_or_else(|| wrong("tools", &format!("a list of up to {TOOLS_MAX} tools")))?;
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (i, tool) in list.iter().enumerate() {
        let at = format!("tools[{i}]");
        if tool.is_object() && tool["type"] != "function" {
            return Err(HandlerError::invalid(
                &format!("{at}.type"),
                format!("`{at}.type`: only functions are supported"),
            ));
        }
        let outer = object(tool, &at, &["type", "function"])?;
        let at = format!("{at}.function");
        let function = object(
            outer.get("function").unwrap_or(&Value::Null),
            &at,
            &["name", "description", "parameters", "strict"],
        )?;
        let tool = Tool {
            name: name(function.get("name"), &at)?,
            description: description(function.get("description"), &at)?,
            parameters: schema(function.get("parameters"), &format!("{at}.parameters"))?,
            strict: strict(function.get("strict"), &at)?,
        };
        if tools.iter().any(|other| other.name == tool.name) {
            let message = format!("`{at}.name`: there is another tool `{}`", tool.name);
            return Err(HandlerError::invalid(&format!("{at}.name"), message));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// Reads the choice among tools.
///
/// # Errors
/// When it is none, or names a tool that is not there.
pub(super) fn read_choice(value: &Value, tools: &[Tool]) -> Result<ToolChoice, HandlerError> {
    let choice = match value {
        Value::String(word) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(wrong("tool_choice", "none, auto, required, or an object that names a tool")),
        },
        Value::Object(_) if value["type"] == "function" => {
            let name =
                value["function"]["name"].as_str().ok_or_else(|| wrong("tool_choice.function.name", "a text"))?;
            if !tools.iter().any(|tool| tool.name == name) {
                let name: String = name.chars().take(NAME_MAX).collect();
                return Err(HandlerError::invalid("tool_choice", format!("`tool_choice`: `tools` has no `{name}`")));
            }
            ToolChoice::Named(name.to_owned())
        }
        Value::Object(_) => {
            return Err(HandlerError::invalid("tool_choice", "`tool_choice`: its type should be function"));
        }
        _ => return Err(wrong("tool_choice", "none, auto, required, or an object that names a tool")),
    };
    match choice {
        ToolChoice::Required if tools.is_empty() => {
            Err(HandlerError::invalid("tool_choice", "`tool_choice` is required, and there are no `tools`"))
        }
        choice => Ok(choice),
    }
}

/// Reads the form of the answer.
///
/// # Errors
/// Names the field that is wrong, not supported or not known.
pub(super) fn read_format(value: &Value) -> Result<ResponseFormat, HandlerError> {
    const AT: &str = "response_format";
    let fields = object(value, AT, &["type", "json_schema"])?;
    match value["type"].as_str() {
        Some("text") => Ok(ResponseFormat::Text),
        Some("json_object") => Ok(ResponseFormat::JsonObject),
        Some("json_schema") => {
            let at = format!("{AT}.json_schema");
            let inner = fields.get("json_schema").unwrap_or(&Value::Null);
            let inner = object(inner, &at, &["name", "description", "schema", "strict"])?;
            let place = format!("{at}.schema");
            let schema = schema(inner.get("schema"), &place)?.ok_or_else(|| wrong(&place, "a JSON Schema"))?;
            Ok(ResponseFormat::JsonSchema {
                name: name(inner.get("name"), &at)?,
                description: description(inner.get("description"), &at)?,
                schema,
                strict: strict(inner.get("strict"), &at)?,
            })
        }
        _ => Err(wrong("response_format.type", "text, json_object or json_schema")),
    }
}

/// Reads an object with no other fields than these.
fn object<'a>(value: &'a Value, at: &str, known: &[&str]) -> Result<&'a Map<String, Value>, HandlerError> {
    let fields = value.as_object().ok_or_else(|| wrong(at, "an object"))?;
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        Some(other) => Err(unknown(at, other)),
        None => Ok(fields),
    }
}

fn name(value: Option<&Value>, at: &str) -> Result<String, HandlerError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let is_name = |name: &&str| (1..=NAME_MAX).contains(&name.len()) && name.chars().all(plain);
    let name = value.and_then(Value::as_str).filter(is_name);
    let wanted = format!("a name of up to {NAME_MAX} letters a to z, A to Z, digits, _ and -");
    name.map(str::to_owned).ok_or_else(|| wrong(&format!("{at}.name"), &wanted))
}

fn description(value: Option<&Value>, at: &str) -> Result<Option<String>, HandlerError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let text = value.as_str().filter(|text| text.len() <= DESCRIPTION_MAX);
    let text = text.ok_or_else(|| {
        wrong(&format!("{at}.description"), &format!("a text of up to {} KiB", DESCRIPTION_MAX >> 10))
    })?;
    Ok(Some(text.to_owned()))
}

fn schema(value: Option<&Value>, at: &str) -> Result<Option<Value>, HandlerError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    if value.is_object() { Ok(Some(value.clone())) } else { Err(wrong(at, "a JSON Schema: an object")) }
}

fn strict(value: Option<&Value>, at: &str) -> Result<Option<bool>, HandlerError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    super::flag(&format!("{at}.strict"), value).map(Some)
}
