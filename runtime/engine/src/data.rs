//! Training data: the rows of a JSONL file, and the token sequences that they become.
//!
//! A file holds rows of one shape (see [`RowFormat`]). It is read line by line; the JSON of a row is gone when its
//! tokens are made. Problems are gathered over the whole file and told at once, by line.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::files::open_regular;
use crate::order;
use crate::template::{ChatTemplate, Rendered, token_starts, tokenize};
use crate::tokenizer::Tokenizer;
use crate::words::value_of;

#[cfg(test)]
mod tests;

/// The roles of a message, as OpenAI names them.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// Problems that are told in full; of the others only the lines are listed.
const TOLD_IN_FULL: usize = 20;

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, the first one included that nothing predicts.
    pub ids: Vec<u32>,
    /// `trained[t]`: token t is a target. Never true for t = 0.
    pub trained: Vec<bool>,
    /// The line of the file it comes from, counted from 1. One line may give several examples.
    pub line: usize,
}

/// The examples of a file.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of the file.
    pub examples: Vec<Example>,
    /// `sha256:` and the digest of the file's bytes.
    pub digest: String,
    /// The shape of the file's rows.
    pub format: RowFormat,
    /// Rows left out because they were too long.
    pub skipped: usize,
    /// Examples cut because they were too long.
    pub truncated: usize,
}

/// The shape of a file's rows, told by their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFormat {
    /// `messages`: a conversation; the assistant's messages are learned.
    Messages,
    /// `prompt` and `completion`, as strings or lists of messages; the completion is learned.
    PromptCompletion,
    /// `text`: all of it is learned.
    Text,
}

/// What happens to a row with more tokens than `max_seq_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLongRow {
    /// The file is refused and the row named.
    Refuse,
    /// Its first `max_seq_len` tokens are kept, if something among them is trained.
    Truncate,
    /// It is left out.
    Skip,
}

impl FromStr for OnLongRow {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        value_of(word, &[("refuse", Self::Refuse), ("truncate", Self::Truncate), ("skip", Self::Skip)])
    }
}

/// A row as it was read and checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation; `tools` is a list.
    Messages {
        /// OpenAI's messages, `content` being a string where there is any.
        messages: Vec<Json>,
        /// The tools that the assistant may call.
        tools: Option<Json>,
    },
    /// A prompt and its completion, as strings.
    PromptCompletion {
        /// What the system message says, for a model with a chat template.
        system: Option<String>,
        /// Not learned.
        prompt: String,
        /// Learned.
        completion: String,
    },
    /// Text, all of it learned.
    Text(String),
}

/// How rows become token sequences.
#[derive(Clone, Copy)]
pub struct Encoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template; without one there are no conversations.
    pub template: Option<&'a ChatTemplate>,
    /// Tokens that the model has an embedding for: those with an id below.
    pub embeddings: usize,
    /// Tokens an example may have.
    pub max_seq_len: usize,
    /// What to do with a longer one.
    pub on_long_row: OnLongRow,
}

/// Why a row is refused.
#[derive(Debug)]
pub struct Problem {
    /// What it is listed under when there are many.
    kind: &'static str,
    /// What is told in full.
    detail: String,
}

const NOT_JSON: &str = "not JSON";
const NOT_UTF8: &str = "not UTF-8";
const UNKNOWN_ROW: &str = "unknown row";
const MIXED: &str = "not of the file's shape";
const BAD_ROW: &str = "malformed row";
const TOO_LONG: &str = "too long";
const NOTHING: &str = "nothing to train on";
const NO_TEMPLATE: &str = "no chat template";
const NOT_RENDERED: &str = "refused by the chat template";
const NO_EMBEDDING: &str = "a token without an embedding";

impl Problem {
    fn new(kind: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { kind, detail }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self.kind {
            NOT_JSON => "a JSONL file holds one JSON object a line, each on a single line",
            TOO_LONG => {
                "cut long rows with `--on-long-row truncate`, leave them out with `--on-long-row skip`, or allow more with a larger `--max-seq-len`"
            }
            UNKNOWN_ROW => {
                "rows are `{\"messages\": [{\"role\": …, \"content\": …}, …]}`, `{\"prompt\": …, \"completion\": …}` or `{\"text\": …}`"
            }
            NO_EMBEDDING => {
                "take the token out of the rows, or the tokenizer that the model was made with; a model whose embedding was resized for it has it, too"
            }
            NO_TEMPLATE => {
                "choose an instruction-tuned model, or write the rows as `prompt` and `completion`, or as `text`"
            }
            _ => return None,
        })
    }
}

/// The problems of a file's rows, and how they are told: all in one message, by line.
#[derive(Default)]
pub struct Problems {
    first: Vec<(usize, Problem)>,
    others: BTreeMap<&'static str, Vec<usize>>,
    hints: Vec<&'static str>,
    count: usize,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl Problems {
    /// Adds the problem of a line.
    pub fn add(&mut self, line: usize, problem: Problem) {
        self.count += 1;
        if let Some(hint) = problem.hint().filter(|h| !self.hints.contains(h)) {
            self.hints.push(hint);
        }
        if self.first.len() < TOLD_IN_FULL {
            self.first.push((line, problem));
        } else {
            self.others.entry(problem.kind).or_default().push(line);
        }
    }

    /// Tells them, if there are any.
    ///
    /// # Errors
    /// When there are.
    pub fn into_result(self, path: &Path) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let plural = if self.count == 1 { "" } else { "s" };
        let count = thousands(self.count);
        let mut message = format!("{}: {count} problem{plural}", path.display());
        for (line, Problem { detail, .. }) in &self.first {
            let _ = write!(message, "\n  line {line}: {detail}");
        }
        for (kind, lines) in &self.others {
            let plural = if lines.len() == 1 { "" } else { "s" };
            let _ = write!(message, "\n  {kind}: line{plural} {}", spans(lines));
        }
        for hint in self.hints {
            let _ = write!(message, "\nhint: {hint}");
        }
        Err(anyhow!(message))
    }
}

/// Ascending numbers, runs of them joined: "31-35, 40".
fn spans(lines: &[usize]) -> String {
    let mut out = String::new();
    for run in lines.chunk_by(|a, b| a + 1 == *b) {
        let (first, last) = (run[0], run[run.len() - 1]);
        let comma = if out.is_empty() { "" } else { ", " };
        let _ = match last - first {
            0 => write!(out, "{comma}{first}"),
            _ => write!(out, "{comma}{first}-{last}"),
        };
    }
    out
}

/// 2381 as "2,381".
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Reads a JSONL file and encodes its rows.
///
/// # Errors
/// When the file cannot be read, holds no rows, or any row is refused: one message tells all problems by line.
pub fn load_jsonl(path: &Path, encoder: Encoder) -> Result<Dataset> {
    let mut examples = Vec::new();
    let mut problems = Problems::default();
    let (mut rows, mut skipped, mut truncated) = (0, 0, 0);
    let (digest, format) = read_rows(path, |line, _, row| {
        rows += 1;
        match row.and_then(|row| encoder.examples(line, &row)) {
            Ok(None) => skipped += 1,
            Ok(Some((mut kept, cut))) => {
                truncated += cut;
                examples.append(&mut kept);
            }
            Err(problem) => problems.add(line, problem),
        }
    })?;
    problems.into_result(path)?;
    ensure!(rows > 0, "{}: no rows", path.display());
    ensure!(
        !examples.is_empty(),
        "{}: no rows left, all {} are longer than {} tokens\nhint: allow more with a larger `--max-seq-len`",
        path.display(),
        thousands(rows),
        thousands(encoder.max_seq_len)
    );
    let format = format.expect("a row without problems has a format");
    Ok(Dataset { examples, digest, format, skipped, truncated })
}

/// Reads and checks the rows of a JSONL file, each with its line, without encoding them.
///
/// # Errors
/// As [`load_jsonl`].
pub fn parse_rows(path: &Path) -> Result<Vec<(usize, Row)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    read_rows(path, |line, _, row| match row {
        Ok(row) => rows.push((line, row)),
        Err(problem) => problems.add(line, problem),
    })?;
    problems.into_result(path)?;
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    Ok(rows)
}

/// Reads and checks the rows of an open JSONL file and returns each with its line, as the text that it was. `path` is what messages
/// call the file.
///
/// # Errors
/// As [`load_jsonl`].
pub fn read_texts(path: &Path, file: impl Read) -> Result<Vec<(usize, String)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    rows_of(path, file, |line, text, row| match (row, std::str::from_utf8(text)) {
        (Ok(_), Ok(text)) => rows.push((line, text.to_owned())),
        (Err(problem), _) => problems.add(line, problem),
        (Ok(_), Err(_)) => unreachable!("a row that was parsed is UTF-8"),
    })?;
    problems.into_result(path)?;
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    Ok(rows)
}

/// Checks one row that is not of a file, as a file's first row is checked.
///
/// # Errors
/// Why it is refused.
pub fn check_row(text: &str) -> Result<Row, Problem> {
    parse_line(text.as_bytes(), &mut None)
}

impl Dataset {
    /// Splits the examples into those to train on and those to evaluate on, as indices. Examples of one line stay
    /// together, so nothing that is evaluated was trained on as part of its conversation.
    ///
    /// # Errors
    /// As [`order::split`], which counts lines here.
    pub fn split(&self, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut lines: Vec<usize> = self.examples.iter().map(|e| e.line).collect();
        lines.dedup();
        let (_, eval) = order::split(lines.len(), eval_fraction, seed)?;
        let eval: Vec<usize> = eval.into_iter().map(|i| lines[i]).collect();
        let is_train = |&i: &usize| eval.binary_search(&self.examples[i].line).is_err();
        Ok((0..self.examples.len()).partition(is_train))
    }
}

/// Calls `each` with the line, the text and the checked row of every line that is not blank. Returns the file's digest and the
/// format of its first row.
fn read_rows(path: &Path, each: impl FnMut(usize, &[u8], Result<Row, Problem>)) -> Result<(String, Option<RowFormat>)> {
    rows_of(path, open_regular(path)?, each)
}

/// As [`read_rows`], of a file that is open.
fn rows_of(
    path: &Path,
    file: impl Read,
    mut each: impl FnMut(usize, &[u8], Result<Row, Problem>),
) -> Result<(String, Option<RowFormat>)> {
    let place = || path.display().to_string();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut hasher = Sha256::new();
    let mut format = None;
    let mut bytes = Vec::new();
    let mut line = 0;
    loop {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).with_context(place)? == 0 {
            break;
        }
        line += 1;
        hasher.update(&bytes);
        let bom: &[u8] = if line == 1 { b"\xef\xbb\xbf" } else { b"" };
        let text = bytes.strip_prefix(bom).unwrap_or(&bytes).trim_ascii();
        if text.is_empty() {
            continue;
        }
        if format.is_none() && line == 1 && text.starts_with(b"[") {
            bail!(
                "{}: a JSON array, not JSONL\nhint: write one object a line, without brackets around them and commas between them",
                path.display()
            );
        }
        each(line, text, parse_line(text, &mut format));
    }
    let digest = hasher.finalize();
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    Ok((format!("sha256:{hex}"), format))
}

fn parse_line(bytes: &[u8], format: &mut Option<RowFormat>) -> Result<Row, Problem> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Problem::new(NOT_UTF8, format!("{NOT_UTF8}: byte {} of the line", e.valid_up_to() + 1)))?;
    let json: Json = serde_json::from_str(text).map_err(|e| {
        // serde_json counts lines too, and ours is its only one.
        let message = e.to_string().replace(" at line 1 column", " at column");
        Problem::new(NOT_JSON, format!("{NOT_JSON}: {message}"))
    })?;
    let Json::Object(fields) = json else {
        let detail = format!("not an object but {}", kind_of(&json));
        return Err(Problem::new(UNKNOWN_ROW, detail));
    };
    let found = recognise(&fields)?;
    match *format {
        Some(expected) if expected != found => {
            Err(Problem::new(MIXED, format!("has {}, while the rows before have {}", found.keys(), expected.keys())))
        }
        _ => {
            *format = Some(found);
            parse_row(fields, found).map_err(|detail| {
                let nothing = detail.starts_with(NOTHING);
                Problem::new(if nothing { NOTHING } else { BAD_ROW }, detail)
            })
        }
    }
}

impl RowFormat {
    fn keys(self) -> &'static str {
        match self {
            Self::Messages => "`messages`",
            Self::PromptCompletion => "`prompt` and `completion`",
            Self::Text => "`text`",
        }
    }
}

fn recognise(fields: &Map<String, Json>) -> Result<RowFormat, Problem> {
    let has = |key: &str| fields.contains_key(key);
    if has("messages") {
        return Ok(RowFormat::Messages);
    }
    if has("prompt") && has("completion") {
        return Ok(RowFormat::PromptCompletion);
    }
    if has("text") {
        return Ok(RowFormat::Text);
    }
    let keys: Vec<String> = fields.keys().take(8).map(|k| format!("`{k}`")).collect();
    let mut detail = match keys.len() {
        0 => "an object without keys".to_owned(),
        _ => format!("unknown row with {}", keys.join(", ")),
    };
    let known = ["messages", "prompt", "completion", "text"];
    let near = fields.keys().filter(|k| !known.contains(&k.as_str())).find_map(|key| {
        let near = nearest(key, &known).filter(|near| !has(near))?;
        Some(format!("`{key}`: did you mean `{near}`?"))
    });
    if let Some(near) = near {
        let _ = write!(detail, "; {near}");
    } else if has("prompt") || has("completion") {
        detail.push_str("; `prompt` and `completion` go together");
    } else if has("instruction") && has("output") {
        detail.push_str("; rename `instruction` to `prompt` and `output` to `completion`");
    } else if has("conversations") {
        detail.push_str("; write `conversations` as `messages` with `role` and `content`");
    }
    Err(Problem::new(UNKNOWN_ROW, detail))
}

fn parse_row(mut fields: Map<String, Json>, format: RowFormat) -> Result<Row, String> {
    let mut take = |key: &str| fields.remove(key).unwrap_or(Json::Null);
    match format {
        RowFormat::Messages => {
            let messages = parse_messages("messages", take("messages"))?;
            let tools = parse_tools(take("tools"))?;
            Ok(Row::Messages { messages, tools })
        }
        RowFormat::PromptCompletion => match (take("prompt"), take("completion")) {
            (Json::String(prompt), Json::String(completion)) => {
                let system = match take("system") {
                    Json::Null => None,
                    Json::String(text) => Some(text),
                    other => return Err(format!("system: {} is not a string", kind_of(&other))),
                };
                if completion.is_empty() {
                    return Err(format!("{NOTHING}: `completion` is empty"));
                }
                Ok(Row::PromptCompletion { system, prompt, completion })
            }
            (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                let mut messages = parse_messages("prompt", prompt)?;
                for message in messages.iter_mut().filter(|m| m["role"] == "assistant") {
                    message["weight"] = 0.into();
                }
                messages.extend(parse_messages("completion", completion)?);
                let tools = parse_tools(take("tools"))?;
                Ok(Row::Messages { messages, tools })
            }
            (prompt, completion) => Err(format!(
                "`prompt` is {} and `completion` is {}; both must be strings or both lists of messages",
                kind_of(&prompt),
                kind_of(&completion)
            )),
        },
        RowFormat::Text => match take("text") {
            Json::String(text) if text.is_empty() => Err(format!("{NOTHING}: `text` is empty")),
            Json::String(text) => Ok(Row::Text(text)),
            other => Err(format!("text: {} is not a string", kind_of(&other))),
        },
    }
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

fn check_message(message: &mut Json) -> Result<(), String> {
    let Json::Object(fields) = message else {
        return Err(format!("{} is not an object", kind_of(message)));
    };
    let missing = |fields: &Map<String, Json>, key: &str| {
        let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
        match nearest(key, &keys) {
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
        return Err(match nearest(&role, &ROLES) {
            Some(near) => format!("unknown role `{role}`, did you mean `{near}`?"),
            None => format!("unknown role `{role}`, the roles are {}", ROLES.join(", ")),
        });
    }
    let is_given = |v: Option<&Json>| match v {
        None | Some(Json::Null) => false,
        Some(Json::String(text)) => !text.trim().is_empty(),
        Some(Json::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
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
        Some(content @ Json::Array(_)) => *content = Json::String(join_parts(content)?),
        Some(Json::Null) if calls => {}
        None if calls => {}
        Some(other) => return Err(format!("content: {} is not a string", kind_of(other))),
        None => return Err(missing(fields, "content")),
    }
    let learned = role == "assistant" && fields.get("weight").and_then(Json::as_f64) != Some(0.0);
    let reasoning = ["reasoning_content", "reasoning", "thinking"];
    let says = |key: &str| is_given(fields.get(key));
    if learned && !calls && !says("content") && !reasoning.into_iter().any(says) {
        return Err(format!("{NOTHING} (assistant) has empty content and no tool_calls"));
    }
    Ok(())
}

/// The text of content given in parts.
fn join_parts(parts: &Json) -> Result<String, String> {
    let mut text = String::new();
    for (i, part) in parts.as_array().into_iter().flatten().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(piece)) => text.push_str(piece),
            (Some("text"), None) => return Err(format!("content: part {} has no `text`", i + 1)),
            (Some(kind), _) => {
                return Err(format!("content: part {} is `{kind}`, only text is learned", i + 1));
            }
            (None, _) => return Err(format!("content: part {} has no `type`", i + 1)),
        }
    }
    Ok(text)
}

fn kind_of(json: &Json) -> &'static str {
    match json {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// The word among `known` that `word` is most likely a slip of.
fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = word.to_lowercase();
    let scored = known.iter().map(|k| (edits(&word, &k.to_lowercase()), *k));
    let (distance, near) = scored.min_by_key(|(distance, _)| *distance)?;
    (distance <= near.len().min(word.len()) / 3).then_some(near)
}

/// Levenshtein's distance, in characters.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Ids, and for each whether it is trained.
type Sequence = (Vec<u32>, Vec<bool>);

enum Fitted {
    Kept { sequences: Vec<Sequence>, cut: usize },
    Skipped,
}

impl Encoder<'_> {
    /// The examples that a row becomes, and how many of them were cut; `None`: it is left out as too long.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn examples(&self, line: usize, row: &Row) -> Result<Option<(Vec<Example>, usize)>, Problem> {
        let Fitted::Kept { sequences, cut } = self.fit(self.encode(row)?)? else { return Ok(None) };
        for (ids, _) in &sequences {
            let known = self.tokenizer.check_embedded(ids, self.embeddings);
            known.map_err(|error| Problem::new(NO_EMBEDDING, error.to_string()))?;
        }
        let examples = sequences.into_iter().map(|(mut ids, mut trained)| {
            ids.shrink_to_fit();
            trained.shrink_to_fit();
            Example { ids, trained, line }
        });
        Ok(Some((examples.collect(), cut)))
    }

    /// The sequences of a row, of any length.
    ///
    /// A conversation is rendered by the chat template, and what is typed in it stays text. Strings are taken as they
    /// are: a special token in `text` is that token, and one tokenisation covers prompt and completion.
    fn encode(&self, row: &Row) -> Result<Vec<Sequence>, Problem> {
        let sequences = match row {
            Row::Messages { messages, tools } => self.encode_messages(messages, tools.as_ref())?,
            Row::PromptCompletion { system, prompt, completion } => match self.template {
                Some(_) => {
                    let said = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
                    let mut messages = Vec::with_capacity(3);
                    messages.extend(system.as_ref().map(|text| said("system", text)));
                    messages.extend([said("user", prompt), said("assistant", completion)]);
                    self.encode_messages(&messages, None)?
                }
                None if system.is_some() => {
                    let detail = "`system` needs a chat template, and the model has none";
                    return Err(Problem::new(NO_TEMPLATE, detail));
                }
                None => vec![self.encode_text(&format!("{prompt}{completion}"), prompt.len())?],
            },
            Row::Text(text) => vec![self.encode_text(text, 0)?],
        };
        match sequences.iter().all(|(_, trained)| trained.contains(&true)) {
            true => Ok(sequences),
            false => {
                let detail = format!("{NOTHING}: no token lies wholly in what is to be learned");
                Err(Problem::new(NOTHING, detail))
            }
        }
    }

    fn encode_messages(&self, messages: &[Json], tools: Option<&Json>) -> Result<Vec<Sequence>, Problem> {
        let Some(template) = self.template else {
            let detail = "`messages` need a chat template, and the model has none";
            return Err(Problem::new(NO_TEMPLATE, detail));
        };
        let problem = |e: anyhow::Error| {
            let detail = format!("{e:#}");
            let kind = if detail.starts_with(NOTHING) { NOTHING } else { NOT_RENDERED };
            Problem::new(kind, detail)
        };
        let control = self.tokenizer.control_in(messages, tools).map_err(problem)?;
        let texts: Vec<Rendered> = template.render_for_training(messages, tools, &control).map_err(problem)?;
        texts.iter().map(|text| tokenize(text, self.tokenizer).map_err(problem)).collect()
    }

    /// Tokenises `text`, with BOS if the tokenizer adds it, and appends EOS. What starts at byte `from` or later is
    /// trained, EOS too.
    fn encode_text(&self, text: &str, from: usize) -> Result<Sequence, Problem> {
        let fail = |detail: String| Problem::new(BAD_ROW, detail);
        let encoded = self.tokenizer.encode(text, true).map_err(|e| fail(format!("{e:#}")))?;
        let eos_ids = &self.tokenizer.eos_ids;
        let Some(eos) = self.tokenizer.eos_id else {
            return Err(fail("the tokenizer has no EOS token to end the text with".into()));
        };
        let starts = token_starts(&encoded);
        let mut trained: Vec<bool> = starts.iter().map(|&start| start >= from).collect();
        let mut ids = encoded.ids;
        if encoded.offsets.last() == Some(&(0, 0)) && ids.last().is_some_and(|id| eos_ids.contains(id)) {
            ids.pop(); // Appended by the tokenizer, so off the text.
            trained.pop();
        }
        if from > 0 && !trained.contains(&true) {
            let detail = format!(
                "{NOTHING}: the completion begins inside the prompt's last token; end the prompt without a space and begin the completion with it"
            );
            return Err(Problem::new(NOTHING, detail));
        }
        ids.push(eos);
        trained.push(true);
        trained[0] = false;
        Ok((ids, trained))
    }

    fn fit(&self, mut sequences: Vec<Sequence>) -> Result<Fitted, Problem> {
        let limit = self.max_seq_len;
        let longest = sequences.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
        if longest <= limit {
            return Ok(Fitted::Kept { sequences, cut: 0 });
        }
        match self.on_long_row {
            OnLongRow::Skip => Ok(Fitted::Skipped),
            OnLongRow::Refuse => {
                let (longest, limit) = (thousands(longest), thousands(limit));
                let detail = format!("{longest} tokens, the limit is {limit}");
                Err(Problem::new(TOO_LONG, detail))
            }
            OnLongRow::Truncate => {
                let mut cut = 0;
                for (ids, trained) in sequences.iter_mut().filter(|(ids, _)| ids.len() > limit) {
                    cut += 1;
                    ids.truncate(limit);
                    trained.truncate(limit);
                    if !trained.contains(&true) {
                        let limit = thousands(limit);
                        let detail = format!("{NOTHING}: no trained token among the first {limit}");
                        return Err(Problem::new(NOTHING, detail));
                    }
                }
                Ok(Fitted::Kept { sequences, cut })
            }
        }
    }
}

/// The tokens of an example as text, trained ones in [brackets], line breaks both shown and made.
pub fn preview(example: &Example, tokenizer: &Tokenizer) -> String {
    let mut out = String::new();
    for (&id, &trained) in example.ids.iter().zip(&example.trained) {
        let raw = tokenizer.token(id).unwrap_or_else(|| format!("<{id}>"));
        let mut piece = match tokenizer.decode(&[id], false) {
            // Part of a character has no text of its own.
            Ok(text) if !text.is_empty() && !text.contains('\u{fffd}') => text,
            _ => raw.clone(),
        };
        // A sentencepiece decoder drops the space that a text begins with.
        if raw.starts_with('\u{2581}') && !piece.starts_with([' ', '\u{2581}']) {
            piece.insert(0, ' ');
        }
        let breaks = piece.ends_with('\n');
        let piece = piece.replace('\r', "\\r").replace('\n', "\\n");
        let _ = match trained {
            true => write!(out, "[{piece}]"),
            false => write!(out, "{piece}"),
        };
        if breaks {
            out.push('\n');
        }
    }
    out
}
