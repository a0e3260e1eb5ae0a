//! The texts of a request, for what reads or changes all of them.

use serde_json::Value;

use crate::handler::{Message, Part, Prompt, Request, ResponseFormat};

/// Changes each text of a message: what it says, what was called and thought, and the name of its author.
pub(super) fn each_text(message: &mut Message, mut change: impl FnMut(&mut String)) {
    message.tool_calls.iter_mut().for_each(|call| change(&mut call.arguments));
    each_text_but_calls(message, change);
}

fn each_text_but_calls(message: &mut Message, mut change: impl FnMut(&mut String)) {
    change(&mut message.content);
    for part in &mut message.parts {
        match part {
            Part::Text(text) => change(text),
            Part::Image { .. } => {}
        }
    }
    message.name.iter_mut().chain(&mut message.reasoning).for_each(change);
}

/// A text of a request that can be replaced.
pub(super) enum Text<'r> {
    /// Words, and the name of the property that they are of in a JSON Schema; else an empty one.
    Words(&'r str, &'r mut String),
    /// The arguments of a call, which are JSON as a model wrote it.
    Arguments(&'r mut String),
    /// The id of a call, which is the same where the result names it and says nothing else.
    Id(&'r mut String),
}

/// Changes each text of a request that can be replaced.
pub(super) fn each_text_of(request: &mut Request, mut change: impl FnMut(Text<'_>)) {
    let mut words = |text: &mut String| change(Text::Words("", text));
    request.messages.iter_mut().for_each(|message| each_text_but_calls(message, &mut words));
    if let Some(Prompt::Text(text)) = &mut request.prompt {
        words(text);
    }
    request.stop.iter_mut().for_each(&mut words);
    for tool in &mut request.tools {
        tool.description.iter_mut().for_each(&mut words);
    }
    if let Some(ResponseFormat::JsonSchema { description, .. }) = &mut request.response_format {
        description.iter_mut().for_each(words);
    }
    for message in &mut request.messages {
        for call in &mut message.tool_calls {
            change(Text::Arguments(&mut call.arguments));
            change(Text::Id(&mut call.id));
        }
        message.tool_call_id.iter_mut().for_each(|id| change(Text::Id(id)));
    }
    for schema in schemas(request) {
        each_text_in("", schema, &mut |name, text| change(Text::Words(name, text)));
    }
}

fn schemas(request: &mut Request) -> impl Iterator<Item = &mut Value> {
    let form = match &mut request.response_format {
        Some(ResponseFormat::JsonSchema { schema, .. }) => Some(schema),
        Some(ResponseFormat::Text | ResponseFormat::JsonObject) | None => None,
    };
    request.tools.iter_mut().filter_map(|tool| tool.parameters.as_mut()).chain(form)
}

/// What of a request is a name, by which parts of it find each other or a program finds them: it cannot be another.
pub(super) enum Fixed<'r> {
    /// A name.
    Name(&'r str),
    /// An address of a JSON Schema or of a part of one.
    Address(&'r str),
    /// A number, and the name of the property that it is of.
    Number(&'r str, String),
}

/// Looks at all of a request that cannot be replaced, with its place: the field's name in OpenAI's API, and no name in a schema.
///
/// # Errors
/// The first of `look`.
pub(super) fn each_fixed<E>(
    request: &Request,
    mut look: impl FnMut(&str, Fixed<'_>) -> Result<(), E>,
) -> Result<(), E> {
    for (i, message) in request.messages.iter().enumerate() {
        for (j, call) in message.tool_calls.iter().enumerate() {
            look(&format!("messages[{i}].tool_calls[{j}].function.name"), Fixed::Name(&call.name))?;
        }
    }
    for (i, tool) in request.tools.iter().enumerate() {
        look(&format!("tools[{i}].function.name"), Fixed::Name(&tool.name))?;
        if let Some(schema) = &tool.parameters {
            let at = format!("tools[{i}].function.parameters");
            each_fixed_in("", schema, false, &mut |fixed| look(&at, fixed))?;
        }
    }
    if let Some(crate::handler::ToolChoice::Named(name)) = &request.tool_choice {
        look("tool_choice.function.name", Fixed::Name(name))?;
    }
    if let Some(ResponseFormat::JsonSchema { name, schema, .. }) = &request.response_format {
        look("response_format.json_schema.name", Fixed::Name(name))?;
        let at = "response_format.json_schema.schema";
        each_fixed_in("", schema, false, &mut |fixed| look(at, fixed))?;
    }
    match &request.reasoning_effort {
        Some(effort) => look("reasoning_effort", Fixed::Name(effort)),
        None => Ok(()),
    }
}

/// What a JSON Schema is called and where its parts are.
const ADDRESSES: [&str; 7] = ["$schema", "$id", "id", "$ref", "$dynamicRef", "$anchor", "$dynamicAnchor"];
/// Words of a JSON Schema whose text has a meaning of its own: another text would be another schema.
const MEANT: [&str; 5] = ["type", "format", "pattern", "contentEncoding", "contentMediaType"];
/// Those that list names of properties.
const LISTS: [&str; 2] = ["required", "dependentRequired"];
/// Those whose numbers are values, and no bounds.
const VALUES: [&str; 5] = ["const", "enum", "default", "examples", "example"];

fn is_fixed(word: &str, value: &Value) -> bool {
    let is_word = ADDRESSES.contains(&word) || MEANT.contains(&word);
    value.is_string() && is_word || LISTS.contains(&word) && has_only_names(value)
}

/// Whether a value is a list of texts, or has only such.
fn has_only_names(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(Value::is_string),
        Value::Object(fields) => fields.values().all(|field| field.is_array() && has_only_names(field)),
        _ => false,
    }
}

/// The property that the value of a key belongs to.
fn property<'n>(name: &'n str, key: &'n str, value: &Value) -> &'n str {
    // A word of the schema says nothing of what the value is.
    let is_word = VALUES.contains(&key) || value.is_string() || key == "items";
    if is_word { name } else { key }
}

/// Changes each text of a JSON Schema that is not fixed, with the name of the property that it is of.
fn each_text_in(name: &str, value: &mut Value, change: &mut impl FnMut(&str, &mut String)) {
    match value {
        Value::String(text) => change(name, text),
        Value::Array(items) => items.iter_mut().for_each(|item| each_text_in(name, item, change)),
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut().filter(|(key, field)| !is_fixed(key, field)) {
                each_text_in(property(name, key, field), field, change);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Looks at all of a JSON Schema that is fixed: names of properties, addresses, words with a meaning, and numbers that are values.
fn each_fixed_in<E>(
    name: &str,
    value: &Value,
    is_value: bool,
    look: &mut impl FnMut(Fixed<'_>) -> Result<(), E>,
) -> Result<(), E> {
    match value {
        Value::Number(number) if is_value => look(Fixed::Number(name, number.to_string())),
        Value::Array(items) => items.iter().try_for_each(|item| each_fixed_in(name, item, is_value, look)),
        Value::Object(fields) => {
            for (key, field) in fields {
                look(Fixed::Name(key))?;
                match field {
                    Value::String(address) if ADDRESSES.contains(&key.as_str()) => look(Fixed::Address(address))?,
                    Value::String(word) if MEANT.contains(&key.as_str()) => look(Fixed::Name(word))?,
                    names if is_fixed(key, names) => each_name_in(names, look)?,
                    field => {
                        let is_value = is_value || VALUES.contains(&key.as_str());
                        each_fixed_in(property(name, key, field), field, is_value, look)?;
                    }
                }
            }
            Ok(())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}

/// Looks at the names that a list, or an object of lists, has.
fn each_name_in<E>(names: &Value, look: &mut impl FnMut(Fixed<'_>) -> Result<(), E>) -> Result<(), E> {
    match names {
        Value::String(name) => look(Fixed::Name(name)),
        Value::Array(names) => names.iter().try_for_each(|name| each_name_in(name, look)),
        Value::Object(fields) => fields.iter().try_for_each(|(name, names)| {
            look(Fixed::Name(name))?;
            each_name_in(names, look)
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({
            "$schema": "a", "$id": "a", "$comment": "a", "$defs": {"$ref": {"const": "a"}, "x": {"default": ["a", 5]}},
            "properties": {"b": {"$ref": "a", "description": "a", "pattern": "a"}, "required": {"type": "a", "maximum": 7}},
            "required": ["a"], "dependentRequired": {"a": ["a"]},
        })
    }

    #[test]
    fn all_of_a_schema_is_replaced_but_what_is_fixed() {
        let mut schema = schema();
        each_text_in("", &mut schema, &mut |_, text| text.push('!'));
        let changed = json!({
            "$schema": "a", "$id": "a", "$comment": "a!", "$defs": {"$ref": {"const": "a!"}, "x": {"default": ["a!", 5]}},
            "properties": {"b": {"$ref": "a", "description": "a!", "pattern": "a"}, "required": {"type": "a", "maximum": 7}},
            "required": ["a"], "dependentRequired": {"a": ["a"]},
        });
        assert_eq!(schema, changed);
    }

    #[test]
    fn what_is_fixed_of_a_schema_is_looked_at() {
        let (mut names, mut addresses, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        let looked: Result<(), ()> = each_fixed_in("", &schema(), false, &mut |fixed| {
            match fixed {
                Fixed::Name(name) => names.push(name.to_owned()),
                Fixed::Address(address) => addresses.push(address.to_owned()),
                Fixed::Number(of, number) => numbers.push((of.to_owned(), number)),
            }
            Ok(())
        });
        assert_eq!(looked, Ok(()));
        assert_eq!(addresses, ["a", "a", "a"]);
        assert_eq!(numbers, [("x".to_owned(), "5".to_owned())], "a bound is no value");
        for name in ["properties", "b", "required", "dependentRequired", "$defs", "x", "maximum", "pattern"] {
            assert!(names.iter().any(|other| other == name), "{name} is not in {names:?}");
        }
        // The type, the pattern, and the names of the two lists.
        assert_eq!(names.iter().filter(|name| *name == "a").count(), 5, "{names:?}");
    }

    #[test]
    fn a_value_is_of_the_property_that_it_stands_in() {
        let mut schema = json!({"properties": {"phone": {"items": {"default": "a", "enum": ["a"]}, "title": "a"}}});
        let mut of = Vec::new();
        each_text_in("", &mut schema, &mut |name, _| of.push(name.to_owned()));
        assert_eq!(of, ["phone", "phone", "phone"]);
    }
}
