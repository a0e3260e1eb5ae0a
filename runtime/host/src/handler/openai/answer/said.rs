//! What a delta or a message says.

use serde_json::Value;

/// The names that servers have for what a model thinks before it speaks.
const THOUGHTS: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

/// What a delta or a message says.
#[derive(Default)]
pub(super) struct Said {
    pub text: String,
    pub thought: String,
    /// Some of its content is reasoning, perhaps in a form that is not read.
    pub has_thought: bool,
}

impl Said {
    /// Adds one part of the content, or says that it is not understood.
    fn part(&mut self, part: &Value) -> Option<()> {
        // Only an object has a type, and only a null or a string has none of these fields.
        let text = match (part["type"].as_str(), &part["text"], &part["refusal"]) {
            (Some("thinking" | "reasoning"), ..) => {
                self.has_thought = true;
                self.think(part);
                return Some(());
            }
            // Mistral's numbers of sources.
            (Some("reference"), Value::Null, _) => return Some(()),
            (_, Value::String(text), _) | (_, Value::Null, Value::String(text)) => text,
            (_, Value::Object(text), _) => text.get("value")?.as_str()?,
            (Some("text" | "output_text" | "refusal"), Value::Null, Value::Null) => "",
            _ if part.is_null() => "",
            _ => part.as_str()?,
        };
        self.text.push_str(text);
        Some(())
    }

    /// Adds a part that is reasoning: a text, or a list of parts with one.
    fn think(&mut self, part: &Value) {
        match &part["thinking"] {
            Value::String(text) => self.thought.push_str(text),
            Value::Array(parts) => {
                parts.iter().filter_map(|part| part["text"].as_str()).for_each(|text| self.thought.push_str(text))
            }
            _ => self.thought.push_str(part["text"].as_str().unwrap_or_default()),
        }
    }
}

/// Reads a delta or a message. A refusal is the text that the model gives instead.
///
/// # Errors
/// When a field is not understood; names it.
pub(super) fn said(delta: &Value) -> Result<Said, &'static str> {
    let mut said = Said::default();
    let (field, content) = match &delta["content"] {
        Value::Null => ("text", &delta["text"]),
        content => ("content", content),
    };
    let parts = content.as_array().map_or(std::slice::from_ref(content), Vec::as_slice);
    parts.iter().try_for_each(|part| said.part(part)).ok_or(field)?;
    said.part(&delta["refusal"]).ok_or("refusal")?;
    // Some servers send the same under two names.
    let thought = THOUGHTS.iter().find_map(|field| delta[*field].as_str().filter(|text| !text.is_empty()));
    if let Some(thought) = thought {
        said.thought.push_str(thought);
    }
    Ok(said)
}
