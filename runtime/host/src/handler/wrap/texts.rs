//! The texts of a request, for what reads or changes all of them.

use serde_json::Value;

use crate::handler::{Message, Part, Prompt, Request, ResponseFormat};

/// Changes each text of a message: what it says, what was called and thought, and the name of its author.
pub(super) fn each_text(message: &mut Message, mut change: impl FnMut(&mut String)) {
    change(&mut message.content);
    for part in &mut message.parts {
        match part {
            Part::Text(text) => change(text),
            Part::Image { .. } => {}
        }
    }
    message.tool_calls.iter_mut().for_each(|call| change(&mut call.arguments));
    message.name.iter_mut().chain(&mut message.reasoning).for_each(change);
}

/// Changes each text of a request, those of its messages included.
pub(super) fn each_text_of(request: &mut Request, mut change: impl FnMut(&mut String)) {
    request.messages.iter_mut().for_each(|message| each_text(message, &mut change));
    if let Some(Prompt::Text(text)) = &mut request.prompt {
        change(text);
    }
    request.stop.iter_mut().for_each(&mut change);
    for tool in &mut request.tools {
        tool.description.iter_mut().for_each(&mut change);
        tool.parameters.iter_mut().for_each(|parameters| each_text_in(parameters, &mut change));
    }
    if let Some(ResponseFormat::JsonSchema { description, schema, .. }) = &mut request.response_format {
        description.iter_mut().for_each(&mut change);
        each_text_in(schema, &mut change);
    }
}

/// Changes each text of a JSON Schema; the names of fields, and what a schema says of itself (`$ref`, `$schema`), are left as they are.
fn each_text_in(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items.iter_mut().for_each(|item| each_text_in(item, change)),
        Value::Object(fields) => {
            let fields = fields.iter_mut().filter(|(name, _)| !name.starts_with('$'));
            fields.for_each(|(_, field)| each_text_in(field, change));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
