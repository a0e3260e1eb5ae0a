//! What a piece of an answer holds that has OpenAI's form.

use serde_json::Value;

/// Returns the choices of a piece with their numbers; one without is the first.
pub(in crate::handler) fn choices(piece: &Value) -> impl Iterator<Item = (usize, &Value)> {
    let number = |choice: &Value| match &choice["index"] {
        Value::Number(index) => {
            index.as_f64().filter(|index| index.fract() == 0.0 && *index >= 0.0).map(|index| index as usize)
        }
        Value::String(index) => index.parse().ok(),
        _ => Some(0),
    };
    let choices = piece["choices"].as_array().map_or(&[][..], Vec::as_slice);
    choices.iter().filter_map(move |choice| Some((number(choice)?, choice)))
}

/// Returns the first choice of a piece; null if there is none.
pub(in crate::handler) fn choice(piece: &Value) -> &Value {
    choices(piece).find(|(number, _)| *number == 0).map_or(&Value::Null, |(_, choice)| choice)
}
