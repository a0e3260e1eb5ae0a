//! The forms of others: ShareGPT's turns, OpenAI's preferences, Alpaca's `input` and `history`, as rows with our own keys.

use std::fmt::Write as _;

use homeroom_abi::describe::nearest;
use serde_json::{Map, Value as Json, json};

use super::super::columns::Role;
use super::super::problem::{BAD_ROW, Problem};
use super::super::row::{RowFormat, is_given, kind_of};
use super::mapping::Mapping;

/// Keys that mean something in a row, which no other column may have.
pub(super) const ROW_KEYS: [&str; 9] =
    ["messages", "prompt", "completion", "text", "chosen", "rejected", "label", "system", "tools"];

/// Whether a row has our keys for something that others write: turns with `from` and `value`.
pub(super) fn is_foreign(fields: &Map<String, Json>) -> bool {
    let of_sharegpt = |turn: &Json| turn.get("from").is_some() && turn.get("role").is_none();
    let list = fields.get("messages").and_then(Json::as_array);
    let judged = fields.get("chosen").is_some_and(of_sharegpt) && fields.contains_key("conversations");
    list.and_then(|turns| turns.first()).is_some_and(of_sharegpt) || judged
}

/// OpenAI's form of a preference.
pub(super) fn of_openai(fields: &Map<String, Json>) -> Option<(Map<String, Json>, RowFormat, &'static str)> {
    let (asked, chosen, rejected) =
        (fields.get("input")?, fields.get("preferred_output")?, fields.get("non_preferred_output")?);
    let mut row = Map::new();
    row.insert("prompt".to_owned(), asked.get("messages")?.clone());
    row.insert("chosen".to_owned(), chosen.clone());
    row.insert("rejected".to_owned(), rejected.clone());
    row.extend(asked.get("tools").map(|tools| ("tools".to_owned(), tools.clone())));
    Some((row, RowFormat::Preference, "`preferred_output` and `non_preferred_output`"))
}

/// The row with our keys; other fields stay behind them.
pub(super) fn canonical(
    mut fields: Map<String, Json>,
    mapping: &Mapping,
    format: RowFormat,
    names: &[String],
) -> Result<Map<String, Json>, String> {
    let mut row = Map::new();
    let conversations = fields.get("conversations").cloned();
    for (role, at) in &mapping.roles {
        let name = &names[*at];
        let value = fields.remove(name).unwrap_or(Json::Null);
        match role {
            Role::Input => add_input(&mut row, value, name).map_err(|problem| problem.to_string())?,
            Role::System if value.is_null() => {}
            Role::Label if format != RowFormat::Rated => {
                fields.insert(name.clone(), value);
            }
            Role::Messages => {
                row.insert("messages".to_owned(), conversation(value, name)?);
            }
            Role::Prompt | Role::Completion | Role::Text | Role::System
                if matches!(value, Json::Number(_) | Json::Bool(_) | Json::Null) =>
            {
                return Err(format!("`{name}` is {}, not text; write it in quotes", kind_of(&value)));
            }
            _ => {
                row.insert(role.name().to_owned(), value);
            }
        }
    }
    if format == RowFormat::Preference {
        for key in ["chosen", "rejected"] {
            if let Some(answer @ Json::Object(_)) = row.remove(key) {
                row.insert(key.to_owned(), conversation(Json::Array(vec![answer]), key)?);
            } else if let Some(value) = fields.remove(key) {
                row.insert(key.to_owned(), value);
            }
        }
        if let (None, Some(asked)) = (row.get("prompt"), conversations) {
            row.insert("prompt".to_owned(), conversation(asked, "conversations")?);
            fields.remove("conversations");
        }
    }
    if let Some(history) = fields.remove("history").filter(|history| is_given(Some(history))) {
        with_history(&mut row, &history)?;
    }
    for (key, value) in fields {
        if !row.contains_key(&key) && !ROW_KEYS.contains(&key.as_str()) {
            row.insert(key, value);
        }
    }
    Ok(row)
}

/// Puts what a question is about behind it, as Alpaca's rows are meant: after a blank line.
pub(super) fn add_input(row: &mut Map<String, Json>, input: Json, name: &str) -> Result<(), Problem> {
    match (row.get_mut("prompt"), input) {
        (_, Json::Null) => Ok(()),
        (_, Json::String(input)) if input.trim().is_empty() => Ok(()),
        (Some(Json::String(prompt)), Json::String(input)) => {
            let _ = write!(prompt, "\n\n{input}");
            Ok(())
        }
        (_, input) => {
            Err(Problem::new(BAD_ROW, format!("`{name}` is {}, which cannot stand behind the prompt", kind_of(&input))))
        }
    }
}

/// Puts earlier questions and answers before a row's own, as LLaMA-Factory's Alpaca rows have them. They are learned, too.
fn with_history(row: &mut Map<String, Json>, history: &Json) -> Result<(), String> {
    let (Some(Json::String(prompt)), Some(Json::String(completion))) = (row.remove("prompt"), row.remove("completion"))
    else {
        return Err("`history` stands before a question and an answer that are strings".to_owned());
    };
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let mut messages = Vec::new();
    for turn in history.as_array().into_iter().flatten() {
        match (turn.get(0).and_then(Json::as_str), turn.get(1).and_then(Json::as_str), turn.as_array().map(Vec::len)) {
            (Some(asked), Some(answered), Some(2)) => {
                messages.extend([said("user", asked), said("assistant", answered)])
            }
            _ => return Err("`history` is to be a list of pairs, a question and its answer".to_owned()),
        }
    }
    messages.extend([said("user", &prompt), said("assistant", &completion)]);
    row.insert("messages".to_owned(), Json::Array(messages));
    Ok(())
}

/// Who speaks, by ShareGPT's names and those of sets in its form.
const SPEAKERS: [(&str, &str); 17] = [
    ("human", "user"),
    ("user", "user"),
    ("prompter", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("bot", "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("system", "system"),
    ("developer", "developer"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("function_call", CALL),
    ("tool_call", CALL),
];

/// What the assistant says in such a turn is a call.
const CALL: &str = "call";

/// A conversation as a list of messages: turns with `from` and `value` become such.
pub(super) fn conversation(turns: Json, name: &str) -> Result<Json, String> {
    let Json::Array(turns) = turns else {
        return Err(format!("{name}: {} is not a list of messages", kind_of(&turns)));
    };
    let messages = turns
        .into_iter()
        .enumerate()
        .map(|(index, turn)| turn_of(turn).map_err(|detail| format!("message {}: {detail}", index + 1)));
    Ok(Json::Array(messages.collect::<Result<_, _>>()?))
}

fn turn_of(turn: Json) -> Result<Json, String> {
    let Json::Object(mut turn) = turn else { return Ok(turn) };
    if turn.contains_key("role") || !turn.contains_key("from") {
        return Ok(Json::Object(turn));
    }
    let from = match turn.remove("from") {
        Some(Json::String(from)) => from,
        other => return Err(format!("from: {} is not a string", kind_of(&other.unwrap_or_default()))),
    };
    let lower = from.trim().to_lowercase();
    let Some((_, role)) = SPEAKERS.iter().find(|(name, _)| *name == lower) else {
        let names = SPEAKERS.map(|(name, _)| name);
        return Err(match nearest(&lower, names) {
            Some(near) => format!("unknown speaker `{from}`, did you mean `{near}`?"),
            None => format!(
                "unknown speaker `{from}`; speakers are human, gpt, system, tool, observation and function_call"
            ),
        });
    };
    let value = match turn.remove("value") {
        Some(Json::String(value)) => value,
        Some(other) => return Err(format!("value: {} is not a string", kind_of(&other))),
        None => return Err("no `value`".to_owned()),
    };
    let mut message = Map::new();
    if *role == CALL {
        message.insert("role".to_owned(), "assistant".into());
        message.insert("content".to_owned(), "".into());
        message.insert("tool_calls".to_owned(), calls(&value)?);
    } else {
        message.insert("role".to_owned(), (*role).into());
        message.insert("content".to_owned(), value.into());
    }
    // Others say in other words that a turn is not learned.
    let is_left = ["train", "loss"].into_iter().any(|key| turn.get(key) == Some(&Json::Bool(false)));
    if is_left {
        message.insert("weight".to_owned(), 0.into());
    } else if let Some(weight) = turn.remove("weight") {
        message.insert("weight".to_owned(), weight);
    }
    Ok(Json::Object(message))
}

/// The calls that a turn of `function_call` holds as text.
fn calls(value: &str) -> Result<Json, String> {
    let parsed: Json = serde_json::from_str(value).map_err(|error| format!("value: a call is JSON: {error}"))?;
    let list = if let Json::Array(list) = parsed { list } else { vec![parsed] };
    let call = |call: Json| match (call.get("name").and_then(Json::as_str), call.get("arguments")) {
        (Some(name), Some(arguments)) => {
            Ok(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
        }
        _ => Err("value: a call has `name` and `arguments`".to_owned()),
    };
    Ok(Json::Array(list.into_iter().map(call).collect::<Result<_, _>>()?))
}
