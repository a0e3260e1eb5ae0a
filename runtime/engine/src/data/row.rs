//! The rows of a file: their shapes, and what is refused before anything is rendered.

use std::fmt::Write as _;

use homeroom_abi::describe::nearest;
use serde_json::{Map, Value as Json, json};

use super::form::Forms;
use super::problem::{BAD_ROW, NOTHING, OTHER_OBJECTIVE, OTHER_ROWS, Problem, UNKNOWN_ROW};
use super::read::Reading;
use crate::text::template::RESERVED;

/// The roles of a message, as OpenAI names them.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The shape of a file's rows, told by their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// `messages`: a conversation; the assistant's messages are learned.
    Messages,
    /// `prompt` and `completion`, as strings or lists of messages; the completion is learned.
    PromptCompletion,
    /// `text`: all of it is learned.
    Text,
    /// `chosen` and `rejected`: two answers to a `prompt`, or two conversations that begin alike.
    Preference,
    /// `prompt`, `completion` and `label`, which says whether the completion is a good one.
    Rated,
}

/// What rows teach. Each objective learns from one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// What to answer.
    Demonstration,
    /// Which of two answers is the better.
    Preference,
    /// Whether an answer is a good one.
    Rating,
}

/// A row as it was read and checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation; `tools` is a list.
    Messages {
        /// OpenAI's messages, `content` being a string or a list of parts that are text, where there is any.
        messages: Vec<Json>,
        /// The tools that the assistant may call.
        tools: Option<Json>,
        /// The documents that the assistant may draw on: a list of objects.
        documents: Option<Json>,
        /// What the chat template reads besides: an object.
        variables: Option<Json>,
    },
    /// A prompt and its completion, as strings.
    PromptCompletion {
        /// What the system message says, for a model with a chat template.
        system: Option<String>,
        /// Not learned.
        prompt: String,
        /// Learned.
        completion: String,
        /// The tools that the assistant may call, for a model with a chat template.
        tools: Option<Json>,
        /// What the chat template reads besides: an object.
        variables: Option<Json>,
    },
    /// Text, all of it learned.
    Text(String),
    /// Two answers to one prompt. Each is a row of [`Row::Messages`] or [`Row::PromptCompletion`].
    Preference {
        /// With the better answer.
        chosen: Box<Row>,
        /// With the worse one.
        rejected: Box<Row>,
    },
    /// An answer, as [`Row::Messages`] or [`Row::PromptCompletion`], and whether it is a good one.
    Rated {
        /// With the answer.
        answer: Box<Row>,
        /// Whether the answer is a good one.
        label: bool,
    },
}

impl Row {
    /// What the row teaches.
    pub fn kind(&self) -> RowKind {
        match self {
            Self::Messages { .. } | Self::PromptCompletion { .. } | Self::Text(_) => RowKind::Demonstration,
            Self::Preference { .. } => RowKind::Preference,
            Self::Rated { .. } => RowKind::Rating,
        }
    }
}

impl RowKind {
    /// Objectives that learn from such rows, by their names.
    pub fn objectives(self) -> &'static [&'static str] {
        match self {
            Self::Demonstration => &["sft"],
            Self::Preference => &["dpo", "orpo"],
            Self::Rating => &["kto"],
        }
    }

    /// The keys of such rows.
    fn keys(self) -> &'static str {
        match self {
            Self::Demonstration => "`messages`, `prompt` and `completion`, or `text`",
            Self::Preference => "`prompt`, `chosen` and `rejected`",
            Self::Rating => "`prompt`, `completion` and `label` (true or false)",
        }
    }

    /// Refuses rows of another kind than the one that `objective` learns from, which is this. What is no objective measures rows.
    ///
    /// # Errors
    /// With the objective that would learn from them.
    pub fn check(self, found: Self, objective: &str) -> Result<(), Problem> {
        if self == found {
            return Ok(());
        }
        let (learned, keys) = (found.objectives().join(" or "), self.keys());
        let detail = match found {
            Self::Demonstration => "says what to answer",
            Self::Preference => "has `chosen` and `rejected`",
            Self::Rating => "has a `label` that rates its completion",
        };
        let (kind, verb) = match self.objectives().contains(&objective) {
            true => (OTHER_OBJECTIVE, "learns from"),
            false => (OTHER_ROWS, "measures"),
        };
        Err(Problem::new(kind, format!("{detail}: rows for {learned}; {objective} {verb} rows with {keys}")))
    }
}

/// Checks one row that is not of a file, as a file's first row is checked.
///
/// # Errors
/// Why it is refused.
pub fn check_row(text: &str) -> Result<Row, Problem> {
    check(text, None)
}

/// The same of a row from which `objective` is to learn, which learns from rows of this kind.
///
/// # Errors
/// Why it is refused.
pub fn check_row_for(text: &str, kind: RowKind, objective: &str) -> Result<Row, Problem> {
    let row = check(text, Some(kind))?;
    kind.check(row.kind(), objective)?;
    Ok(row)
}

fn check(text: &str, wanted: Option<RowKind>) -> Result<Row, Problem> {
    Ok(Forms::new(&Reading::default(), wanted).json(text.as_bytes(), None)?.1)
}

/// What a row is refused for, as a problem.
pub(super) fn problem_of(detail: String) -> Problem {
    let nothing = detail.starts_with(NOTHING);
    Problem::new(if nothing { NOTHING } else { BAD_ROW }, detail)
}

impl RowFormat {
    /// What rows of this shape teach.
    pub fn kind(self) -> RowKind {
        match self {
            Self::Messages | Self::PromptCompletion | Self::Text => RowKind::Demonstration,
            Self::Preference => RowKind::Preference,
            Self::Rated => RowKind::Rating,
        }
    }

    pub(super) fn keys(self) -> &'static str {
        match self {
            Self::Messages => "`messages`",
            Self::PromptCompletion => "`prompt` and `completion`",
            Self::Text => "`text`",
            Self::Preference => "`chosen` and `rejected`",
            Self::Rated => "`prompt`, `completion` and `label`",
        }
    }
}

/// The shape of a row with our own keys. `before`: that of the rows before it.
///
/// # Errors
/// When it has none of them, or half of them.
pub(super) fn recognise(
    fields: &Map<String, Json>,
    before: Option<RowFormat>,
    wanted: Option<RowKind>,
) -> Result<RowFormat, Problem> {
    let has = |key: &str| fields.contains_key(key);
    // Public sets of preferences have `messages` beside them, the chosen conversation.
    if has("chosen") && has("rejected") && !(has("messages") && wanted == Some(RowKind::Demonstration)) {
        return Ok(RowFormat::Preference);
    }
    if has("messages") {
        return Ok(RowFormat::Messages);
    }
    if has("prompt") && has("completion") {
        // Rows that are learned as they stand may have a label that says something else, such as a subject.
        let rated = fields.get("label").is_some_and(|label| rating(label).is_some());
        return Ok(match rated || (has("label") && before == Some(RowFormat::Rated)) {
            true => RowFormat::Rated,
            false => RowFormat::PromptCompletion,
        });
    }
    if has("text") {
        return Ok(RowFormat::Text);
    }
    let keys: Vec<String> = fields.keys().take(8).map(|k| format!("`{k}`")).collect();
    let mut detail = match keys.len() {
        0 => "an object without keys".to_owned(),
        _ => format!("unknown row with {}", keys.join(", ")),
    };
    let known = ["messages", "prompt", "completion", "text", "chosen", "rejected"];
    let near = fields.keys().filter(|k| !known.contains(&k.as_str())).find_map(|key| {
        let near = nearest(key, known).filter(|near| !has(near))?;
        Some(format!("`{key}`: did you mean `{near}`?"))
    });
    if let Some(near) = near {
        let _ = write!(detail, "; {near}");
    } else if has("chosen") || has("rejected") {
        detail.push_str("; `chosen` and `rejected` go together");
    } else if has("prompt") || has("completion") {
        detail.push_str("; `prompt` and `completion` go together");
    }
    Err(Problem::new(UNKNOWN_ROW, detail))
}

pub(super) fn parse_row(mut fields: Map<String, Json>, format: RowFormat) -> Result<Row, String> {
    let mut take = |key: &str| fields.remove(key).unwrap_or(Json::Null);
    match format {
        RowFormat::Messages => {
            let (messages, system) = (take("messages"), take("system"));
            let messages = with_system(parse_messages("messages", messages)?, parse_system(system)?)?;
            check_order(&messages)?;
            let (tools, documents) = (parse_tools(take("tools"))?, parse_documents(take("documents"))?);
            let variables = parse_variables(take(VARIABLES))?;
            check_unread(&fields, format, messages.iter().any(is_system))?;
            Ok(Row::Messages { messages, tools, documents, variables })
        }
        RowFormat::PromptCompletion => {
            let (prompt, system, tools) = (take("prompt"), take("system"), take("tools"));
            let asked = Asked { prompt, system, tools, variables: take(VARIABLES) };
            let row = asked.answered("completion", take("completion"))?;
            check_unread(&fields, format, has_system(&row))?;
            Ok(row)
        }
        RowFormat::Rated => {
            let (prompt, system, tools) = (take("prompt"), take("system"), take("tools"));
            let asked = Asked { prompt, system, tools, variables: take(VARIABLES) };
            let (completion, label) = (take("completion"), take("label"));
            let Some(label) = rating(&label) else {
                return Err(format!("label: {label} is no rating; write true or false"));
            };
            let row = asked.answered("completion", completion)?;
            check_unread(&fields, format, has_system(&row))?;
            Ok(Row::Rated { answer: Box::new(row), label })
        }
        RowFormat::Preference => {
            let (chosen, rejected) = (take("chosen"), take("rejected"));
            if chosen == rejected {
                return Err(format!("{NOTHING}: `chosen` and `rejected` are the same"));
            }
            let (prompt, system, tools) = (take("prompt"), take("system"), take("tools"));
            let (prompt, chosen, rejected) = part_prompt(prompt, chosen, rejected)?;
            let asked = Asked { prompt, system, tools, variables: take(VARIABLES) };
            let chosen = asked.clone().answered("chosen", chosen)?;
            let rejected = asked.answered("rejected", rejected)?;
            check_unread(&fields, format, has_system(&chosen))?;
            Ok(Row::Preference { chosen: Box::new(chosen), rejected: Box::new(rejected) })
        }
        RowFormat::Text => match take("text") {
            Json::String(text) if text.is_empty() => Err(format!("{NOTHING}: `text` is empty")),
            Json::String(text) => Ok(Row::Text(text)),
            other => Err(format!("text: {} is not a string", kind_of(&other))),
        },
    }
}

/// What an answer answers.
#[derive(Clone)]
struct Asked {
    prompt: Json,
    system: Json,
    tools: Json,
    variables: Json,
}

impl Asked {
    /// The row of this prompt and a completion, which stands under `key`.
    fn answered(self, key: &str, completion: Json) -> Result<Row, String> {
        let (system, tools) = (parse_system(self.system)?, parse_tools(self.tools)?);
        let variables = parse_variables(self.variables)?;
        match (self.prompt, completion) {
            (Json::String(prompt), Json::String(completion)) => {
                if completion.is_empty() {
                    return Err(format!("{NOTHING}: `{key}` is empty"));
                }
                Ok(Row::PromptCompletion { system, prompt, completion, tools, variables })
            }
            (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                let mut messages = parse_messages("prompt", prompt)?;
                for message in messages.iter_mut().filter(|m| m["role"] == "assistant") {
                    message["weight"] = 0.into();
                }
                messages.extend(parse_messages(key, completion)?);
                Ok(Row::Messages { messages: with_system(messages, system)?, tools, documents: None, variables })
            }
            (prompt, completion) => Err(format!(
                "`prompt` is {} and `{key}` is {}; both must be strings or both lists of messages",
                kind_of(&prompt),
                kind_of(&completion)
            )),
        }
    }
}

/// Parts what two conversations begin with from what they go on with, where they hold the prompt, as in TRL's rows without `prompt`
/// and in public sets beside one.
fn part_prompt(prompt: Json, chosen: Json, rejected: Json) -> Result<(Json, Json, Json), String> {
    let (Json::Array(a), Json::Array(b)) = (&chosen, &rejected) else {
        return match prompt {
            Json::Null => Err("no `prompt`; only `chosen` and `rejected` that are whole conversations, as lists of messages, have it in them".into()),
            prompt => Ok((prompt, chosen, rejected)),
        };
    };
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let within = match &prompt {
        Json::Null if common == 0 => {
            return Err("no `prompt`, and `chosen` and `rejected` do not begin alike".into());
        }
        Json::Null => common,
        Json::String(asked) => {
            let is_asked = |message: &Json| message["role"] == "user" && message["content"] == asked.as_str();
            match a[..common].iter().rposition(is_asked) {
                Some(at) if at + 1 == common => common,
                _ => return Ok((prompt, chosen, rejected)),
            }
        }
        Json::Array(asked) if !asked.is_empty() && common >= asked.len() && a[..asked.len()] == asked[..] => {
            asked.len()
        }
        _ => return Ok((prompt, chosen, rejected)),
    };
    if a.len() == within || b.len() == within {
        let key = if a.len() == within { "chosen" } else { "rejected" };
        return Err(format!("{NOTHING}: `{key}` says nothing beyond what both begin with"));
    }
    let (prompt, rest) = a.split_at(within);
    Ok((Json::Array(prompt.to_vec()), Json::Array(rest.to_vec()), Json::Array(b[within..].to_vec())))
}

/// What a label says, if it rates: true, "up" and "👍" are good, false, "down" and "👎" are not. Numbers are classes as often.
pub(super) fn rating(label: &Json) -> Option<bool> {
    match label {
        Json::Bool(label) => Some(*label),
        Json::String(word) => match word.trim().to_ascii_lowercase().as_str() {
            "true" | "up" | "👍" => Some(true),
            "false" | "down" | "👎" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

fn has_system(row: &Row) -> bool {
    match row {
        Row::Messages { messages, .. } => messages.iter().any(is_system),
        Row::PromptCompletion { system, .. } => system.is_some(),
        _ => false,
    }
}

/// The key of what a chat template reads besides, as transformers and TRL name it.
const VARIABLES: &str = "chat_template_kwargs";

/// An empty object is none.
fn parse_variables(variables: Json) -> Result<Option<Json>, String> {
    match variables {
        Json::Null => Ok(None),
        Json::Object(fields) if fields.is_empty() => Ok(None),
        Json::Object(fields) => match fields.keys().find(|key| RESERVED.contains(&key.as_str())) {
            Some(key) => Err(format!("{VARIABLES}: `{key}` is given to the chat template by the row itself")),
            None => Ok(Some(Json::Object(fields))),
        },
        other => Err(format!("{VARIABLES}: {} is not an object", kind_of(&other))),
    }
}

/// Keys that change what a row means where others write them, and what to do about them here. Rows of `text` have all in the text.
const UNREAD: [(&str, &str); 2] = [
    ("functions", "rename it to `tools`, each being `{\"type\": \"function\", \"function\": …}`"),
    ("system_prompt", "rename it to `system`"),
];
/// The same beside `prompt` and `completion`.
const UNREAD_BESIDE_PROMPT: [(&str, &str); 6] = [
    ("documents", "write the row as `messages`"),
    ("input", "put it into `prompt`, or say `--columns input=input` and it stands behind the prompt"),
    ("history", "write the row as `messages`"),
    ("reasoning_content", "write the row as `messages`, in which that of the assistant has it"),
    ("reasoning", "write the row as `messages`, in which that of the assistant has it"),
    ("thinking", "write the row as `messages`, in which that of the assistant has it"),
];

/// Refuses keys that would be lost. A second name of what the row has already is not.
fn check_unread(fields: &Map<String, Json>, format: RowFormat, has_system: bool) -> Result<(), String> {
    let beside_prompt =
        UNREAD_BESIDE_PROMPT.iter().filter(|_| !matches!(format, RowFormat::Messages | RowFormat::Text));
    let lost = |(key, _): &&(&str, &str)| is_given(fields.get(*key)) && !(*key == "system_prompt" && has_system);
    match UNREAD.iter().chain(beside_prompt).find(lost) {
        Some((key, what)) => Err(format!("`{key}` is not read: {what}")),
        None => Ok(()),
    }
}

/// Whether a field says something.
pub(super) fn is_given(value: Option<&Json>) -> bool {
    match value {
        None | Some(Json::Null) => false,
        Some(Json::String(text)) => !text.trim().is_empty(),
        Some(Json::Array(items)) => !items.is_empty(),
        Some(Json::Object(fields)) => !fields.is_empty(),
        Some(_) => true,
    }
}

/// An empty one is none, as in public sets.
fn parse_system(system: Json) -> Result<Option<String>, String> {
    match system {
        Json::Null => Ok(None),
        Json::String(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        other => Err(format!("system: {} is not a string", kind_of(&other))),
    }
}

pub(super) fn is_system(message: &Json) -> bool {
    message["role"] == "system" || message["role"] == "developer"
}

fn with_system(mut messages: Vec<Json>, system: Option<String>) -> Result<Vec<Json>, String> {
    let Some(system) = system else { return Ok(messages) };
    match messages.iter().find(|message| is_system(message)) {
        None => messages.insert(0, json!({"role": "system", "content": system})),
        Some(message) if message["content"] == system.as_str() => {}
        Some(message) if message["content"] == json!([{"type": "text", "text": system}]) => {}
        Some(_) => return Err("`system` stands beside a system message that says something else; keep one".into()),
    }
    Ok(messages)
}

fn parse_tools(tools: Json) -> Result<Option<Json>, String> {
    match tools {
        Json::Null => Ok(None),
        Json::Array(tools) if tools.is_empty() => Ok(None),
        Json::Array(tools) => Ok(Some(Json::Array(tools))),
        Json::String(text) => match serde_json::from_str(&text) {
            Ok(tools @ (Json::Array(_) | Json::Null)) => parse_tools(tools),
            Ok(other) => Err(format!("tools: a string of {}, not of a list", kind_of(&other))),
            Err(e) => Err(format!("tools: not JSON: {e}")),
        },
        other => Err(format!("tools: {} is not a list", kind_of(&other))),
    }
}

/// As `tools`, a list or a string of one; each with what the template reads of it, such as `title` and `text`.
fn parse_documents(documents: Json) -> Result<Option<Json>, String> {
    let list = match documents {
        Json::Null => return Ok(None),
        Json::Array(list) => list,
        Json::String(text) => match serde_json::from_str(&text) {
            Ok(Json::Array(list)) => list,
            _ => return Err("documents: a string that is no list as JSON".into()),
        },
        other => return Err(format!("documents: {} is not a list", kind_of(&other))),
    };
    match list.iter().position(|document| !document.is_object()) {
        _ if list.is_empty() => Ok(None),
        None => Ok(Some(Json::Array(list))),
        Some(i) => {
            Err(format!("documents: number {} is {}, not an object with `title` and `text`", i + 1, kind_of(&list[i])))
        }
    }
}

fn parse_messages(key: &str, messages: Json) -> Result<Vec<Json>, String> {
    let Json::Array(mut messages) = messages else {
        return Err(format!("{key}: {} is not a list of messages", kind_of(&messages)));
    };
    if messages.is_empty() {
        return Err(format!("{NOTHING}: `{key}` is empty"));
    }
    for (i, message) in messages.iter_mut().enumerate() {
        check_message(message).map_err(|detail| match detail.strip_prefix(NOTHING) {
            Some(rest) => format!("{NOTHING}: message {}{rest}", i + 1),
            None => format!("message {}: {detail}", i + 1),
        })?;
    }
    Ok(messages)
}

/// Refuses a conversation that was written backwards: its answers stand before what they answer.
fn check_order(messages: &[Json]) -> Result<(), String> {
    let asked = messages.iter().position(|message| message["role"] == "user");
    let answered = messages.iter().rposition(|message| message["role"] == "assistant");
    match (asked, answered) {
        (Some(asked), Some(answered)) if asked > answered => Err(format!(
            "message {} (user) stands behind all answers; a conversation goes from question to answer",
            asked + 1
        )),
        _ => Ok(()),
    }
}

fn check_message(message: &mut Json) -> Result<(), String> {
    let Json::Object(fields) = message else {
        return Err(format!("{} is not an object", kind_of(message)));
    };
    let missing = |fields: &Map<String, Json>, key: &str| {
        let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
        match nearest(key, keys) {
            Some(near) => format!("no `{key}`, but `{near}`: did you mean `{key}`?"),
            None => format!("no `{key}`"),
        }
    };
    let role = match fields.get("role") {
        Some(Json::String(role)) => role.clone(),
        Some(other) => return Err(format!("role: {} is not a string", kind_of(other))),
        None => return Err(missing(fields, "role")),
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(match nearest(&role, ROLES) {
            Some(near) => format!("unknown role `{role}`, did you mean `{near}`?"),
            None => format!("unknown role `{role}`, the roles are {}", ROLES.join(", ")),
        });
    }
    if is_given(fields.get("function_call")) {
        return Err("`function_call` is not read: write it as `tool_calls`".into());
    }
    let calls = is_given(fields.get("tool_calls"));
    match fields.get("tool_calls") {
        None | Some(Json::Null | Json::Array(_)) => {}
        Some(other) => return Err(format!("tool_calls: {} is not a list", kind_of(other))),
    }
    match fields.get("weight") {
        None | Some(Json::Null) => {}
        Some(w) if w.as_f64().is_some_and(|w| w == 0.0 || w == 1.0) => {}
        Some(w) => return Err(format!("weight: {w} is neither 0 nor 1")),
    }
    match fields.get_mut("content") {
        Some(Json::String(_)) => {}
        Some(content @ Json::Array(_)) => check_parts(content)?,
        Some(Json::Null) if calls => {}
        None if calls => {}
        Some(other) => return Err(format!("content: {} is not a string", kind_of(other))),
        None => return Err(missing(fields, "content")),
    }
    let learned = role == "assistant" && fields.get("weight").and_then(Json::as_f64) != Some(0.0);
    let reasoning = ["reasoning_content", "reasoning", "thinking"];
    let says = |key: &str| match fields.get(key) {
        Some(Json::Array(parts)) => parts.iter().any(|part| is_given(part.get("text"))),
        value => is_given(value),
    };
    if learned && !calls && !says("content") && !reasoning.into_iter().any(says) {
        return Err(format!("{NOTHING} (assistant) has empty content and no tool_calls"));
    }
    Ok(())
}

/// Checks content given in parts.
fn check_parts(parts: &Json) -> Result<(), String> {
    let text = |(i, part): (usize, &Json)| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(_)) => Ok(()),
        (Some("text"), None) => Err(format!("content: part {} has no `text`", i + 1)),
        (Some(kind), _) => Err(format!("content: part {} is `{kind}`, only text is learned", i + 1)),
        (None, _) => Err(format!("content: part {} has no `type`", i + 1)),
    };
    let parts = parts.as_array().map_or(&[][..], Vec::as_slice);
    parts.iter().enumerate().try_for_each(text)
}

pub(super) fn kind_of(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
