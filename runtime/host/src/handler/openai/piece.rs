//! What a piece of a provider's answer holds.

use serde_json::Value;

/// Returns the choice of a piece that is answered with: that of index 0, which is also the index of one without; null if there is none.
pub(super) fn choice(piece: &Value) -> &Value {
    let is_first = |choice: &&Value| match &choice["index"] {
        Value::Number(index) => index.as_f64() == Some(0.0),
        Value::String(index) => index == "0",
        _ => true,
    };
    piece["choices"].as_array().and_then(|choices| choices.iter().find(is_first)).unwrap_or(&Value::Null)
}
