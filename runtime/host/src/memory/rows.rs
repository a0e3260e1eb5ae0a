//! Rows that a model learns from, of what was thought of answers.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::{About, Content};

/// What rows are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Answers that were rated, for KTO: `prompt`, `completion`, `label`.
    Ratings,
    /// Answers that were corrected, for DPO: `prompt`, `chosen`, `rejected`.
    Pairs,
}

/// The rows of contents, which are in order. What was said belongs to the answer of its number; where it has none, to the last of its id
/// that the same person was given. Of what was said of one answer the last counts. A correction is an answer that is liked,
/// and if nothing else is said of the answer that it corrects, that is one that is not.
pub fn rows(contents: &[Content], form: Form, model: Option<&str>) -> Vec<Value> {
    let mut said: HashMap<u64, (Option<i8>, Option<&str>)> = HashMap::new();
    let mut answers: HashMap<(&str, Option<&str>, Option<&str>), u64> = HashMap::new();
    for content in contents {
        let named = |id| (id, content.person.key.as_deref(), content.person.user.as_deref());
        match &content.about {
            About::Answer { id, .. } => drop(answers.insert(named(id.as_str()), content.number)),
            About::Feedback { response_id, answer_number, rating, correction, .. } => {
                let number = answer_number.or_else(|| answers.get(&named(response_id.as_str())).copied());
                let Some(number) = number else { continue };
                let last = said.entry(number).or_default();
                *last = (rating.or(last.0), correction.as_deref().or(last.1));
            }
        }
    }
    let mut rows = Vec::new();
    for content in contents {
        let About::Answer { model: asked, messages, answer, .. } = &content.about else { continue };
        let Some((rating, correction)) = said.get(&content.number) else { continue };
        let Some(prompt) = prompt(messages).filter(|_| model.is_none_or(|model| model == asked)) else { continue };
        let correction = correction.filter(|correction| *correction != answer && !correction.trim().is_empty());
        let is_said = !answer.trim().is_empty();
        match form {
            Form::Ratings => {
                let rating = rating.or(correction.map(|_| -1)).filter(|_| is_said);
                rows.extend(rating.map(|rating| row(&prompt, answer, rating > 0)));
                rows.extend(correction.map(|correction| row(&prompt, correction, true)));
            }
            Form::Pairs => {
                rows.extend(correction.filter(|_| is_said).map(|correction| pair(&prompt, correction, answer)))
            }
        }
    }
    rows
}

/// What was asked: a text where it is one, else the messages.
fn prompt(messages: &Value) -> Option<Value> {
    let messages = messages.as_array().filter(|messages| !messages.is_empty())?;
    match messages.as_slice() {
        [only] if only["role"] == "user" => Some(only["content"].as_str()?.into()),
        _ => Some(messages.clone().into()),
    }
}

/// An answer in the form of what was asked.
fn said(prompt: &Value, text: &str) -> Value {
    match prompt {
        Value::String(_) => text.into(),
        _ => json!([{"role": "assistant", "content": text}]),
    }
}

fn row(prompt: &Value, completion: &str, label: bool) -> Value {
    json!({"prompt": prompt, "completion": said(prompt, completion), "label": label})
}

fn pair(prompt: &Value, chosen: &str, rejected: &str) -> Value {
    json!({"prompt": prompt, "chosen": said(prompt, chosen), "rejected": said(prompt, rejected)})
}
