//! The body of a request to the Messages API.

use serde_json::{Map, Value, json};

use super::Anthropic;
use crate::handler::{Field, HandlerError, Message, Part, Request, ResponseFormat, Role, ToolChoice};

/// Returns the body of a request without the fields that are to be ignored.
///
/// # Errors
/// When a value is not in the API's range.
pub(super) fn body(
    handler: &Anthropic,
    request: &Request,
    ignored: &[Field],
) -> Result<Map<String, Value>, HandlerError> {
    let given = |field: Field| !ignored.contains(&field);
    let mut body = Map::new();
    body.insert("model".into(), json!(handler.endpoint.model));
    body.insert("max_tokens".into(), json!(request.max_tokens.unwrap_or(handler.max_tokens)));
    body.insert("stream".into(), json!(true));
    let is_system = |message: &&Message| matches!(message.role, Role::System | Role::Developer);
    let system: Vec<&str> = request.messages.iter().filter(is_system).map(|message| message.content.as_str()).collect();
    if system.iter().any(|text| !text.is_empty()) {
        body.insert("system".into(), json!(system.join("\n\n")));
    }
    body.insert("messages".into(), Value::Array(messages(&request.messages)?));
    if let Some(temperature) = request.temperature.filter(|_| given(Field::Temperature)) {
        if temperature > 1.0 {
            return Err(HandlerError::invalid("temperature", "`temperature` should be from 0 to 1 for this model"));
        }
        body.insert("temperature".into(), json!(temperature));
    }
    if let Some(top_p) = request.top_p.filter(|_| given(Field::TopP)) {
        body.insert("top_p".into(), json!(top_p));
    }
    // 0 is off, which it is without it.
    if let Some(top_k) = request.top_k.filter(|k| given(Field::TopK) && *k > 0) {
        body.insert("top_k".into(), json!(top_k));
    }
    if !request.stop.is_empty() {
        body.insert("stop_sequences".into(), json!(request.stop));
    }
    if !request.tools.is_empty() {
        body.insert("tools".into(), tools(request));
        if let Some(choice) = tool_choice(request) {
            body.insert("tool_choice".into(), choice);
        }
    }
    let mut output = Map::new();
    if let Some(ResponseFormat::JsonSchema { schema, .. }) = &request.response_format {
        output.insert("format".into(), json!({"type": "json_schema", "schema": schema}));
    }
    match request.reasoning_effort.as_deref() {
        None => {}
        Some("none") => {
            body.insert("thinking".into(), json!({"type": "disabled"}));
        }
        Some("minimal") => {
            output.insert("effort".into(), json!("low"));
        }
        Some(effort) => {
            output.insert("effort".into(), json!(effort));
        }
    }
    if !output.is_empty() {
        body.insert("output_config".into(), Value::Object(output));
    }
    Ok(body)
}

/// The messages without those of the system. Results of tools stand in one message of the user, before what the user says.
fn messages(all: &[Message]) -> Result<Vec<Value>, HandlerError> {
    let mut turns: Vec<(&str, Vec<Value>)> = Vec::new();
    for (i, message) in all.iter().enumerate() {
        let (role, blocks) = match message.role {
            Role::System | Role::Developer => continue,
            Role::User => ("user", parts(message, i)?),
            Role::Tool => ("user", vec![result(message)]),
            Role::Assistant => ("assistant", said(message, i)?),
        };
        match turns.last_mut() {
            Some((last, before)) if *last == role => before.extend(blocks),
            _ => turns.push((role, blocks)),
        }
    }
    turns.retain(|(_, blocks)| !blocks.is_empty());
    Ok(turns.into_iter().map(|(role, blocks)| json!({"role": role, "content": shortest(blocks)})).collect())
}

/// A content of one text is a text.
fn shortest(blocks: Vec<Value>) -> Value {
    match &blocks[..] {
        [only] if only["type"] == "text" => only["text"].clone(),
        _ => Value::Array(blocks),
    }
}

/// A block of text; the API refuses an empty one.
fn text(text: &str) -> Option<Value> {
    (!text.is_empty()).then(|| json!({"type": "text", "text": text}))
}

fn parts(message: &Message, number: usize) -> Result<Vec<Value>, HandlerError> {
    let block = |part: &Part| match part {
        Part::Text(said) => Ok(text(said)),
        Part::Image { url, .. } => image(url, number).map(Some),
    };
    match &message.parts[..] {
        [] => Ok(text(&message.content).into_iter().collect()),
        parts => parts.iter().map(block).filter_map(Result::transpose).collect(),
    }
}

fn image(url: &str, number: usize) -> Result<Value, HandlerError> {
    let Some(data) = url.strip_prefix("data:") else {
        return Ok(json!({"type": "image", "source": {"type": "url", "url": url}}));
    };
    let (media_type, data) = data.split_once(";base64,").ok_or_else(|| {
        let message = format!("messages[{number}]: a picture should be an address, or data:image/…;base64,…");
        HandlerError::invalid("messages", message)
    })?;
    Ok(json!({"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}))
}

fn result(message: &Message) -> Value {
    json!({"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content})
}

fn said(message: &Message, number: usize) -> Result<Vec<Value>, HandlerError> {
    let mut blocks: Vec<Value> = text(&message.content).into_iter().collect();
    for call in &message.tool_calls {
        let arguments = if call.arguments.trim().is_empty() { "{}" } else { &call.arguments };
        let input: Option<Value> = serde_json::from_str(arguments).ok().filter(Value::is_object);
        let input = input.ok_or_else(|| {
            let message =
                format!("messages[{number}].tool_calls: the arguments of `{}` are not a JSON object", call.name);
            HandlerError::invalid("messages", message)
        })?;
        blocks.push(json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}));
    }
    Ok(blocks)
}

fn tools(request: &Request) -> Value {
    let tool = |tool: &crate::handler::Tool| {
        let schema = tool.parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}));
        let mut fields = json!({"name": tool.name, "input_schema": schema});
        if let Some(description) = &tool.description {
            fields["description"] = json!(description);
        }
        if tool.strict == Some(true) {
            fields["strict"] = json!(true);
        }
        fields
    };
    request.tools.iter().map(tool).collect()
}

fn tool_choice(request: &Request) -> Option<Value> {
    let one_at_a_time = request.parallel_tool_calls == Some(false);
    let mut choice = match &request.tool_choice {
        None if !one_at_a_time => return None,
        Some(ToolChoice::None) => return Some(json!({"type": "none"})),
        None | Some(ToolChoice::Auto) => json!({"type": "auto"}),
        Some(ToolChoice::Required) => json!({"type": "any"}),
        Some(ToolChoice::Named(name)) => json!({"type": "tool", "name": name}),
    };
    if one_at_a_time {
        choice["disable_parallel_tool_use"] = json!(true);
    }
    Some(choice)
}
