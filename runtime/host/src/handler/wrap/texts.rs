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

/// What a JSON Schema is called and where its parts are: addresses, which are left as they are.
const ADDRESSES: [&str; 6] = ["$schema", "$id", "$ref", "$dynamicRef", "$anchor", "$dynamicAnchor"];

/// Changes each text of a JSON Schema, but for the names of fields and [`ADDRESSES`].
fn each_text_in(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items.iter_mut().for_each(|item| each_text_in(item, change)),
        Value::Object(fields) => {
            let fields =
                fields.iter_mut().filter(|(name, value)| !(value.is_string() && ADDRESSES.contains(&name.as_str())));
            fields.for_each(|(_, field)| each_text_in(field, change));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn all_of_a_schema_is_looked_at_but_what_its_parts_are_called() {
        let mut schema = json!({
            "$schema": "a", "$id": "a", "$comment": "a", "$defs": {"$ref": {"const": "a"}, "x": {"default": ["a"]}},
            "properties": {"a": {"$ref": "a", "description": "a"}},
        });
        each_text_in(&mut schema, &mut |text| text.push('!'));
        let changed = json!({
            "$schema": "a", "$id": "a", "$comment": "a!", "$defs": {"$ref": {"const": "a!"}, "x": {"default": ["a!"]}},
            "properties": {"a": {"$ref": "a", "description": "a!"}},
        });
        assert_eq!(schema, changed);
    }
}
