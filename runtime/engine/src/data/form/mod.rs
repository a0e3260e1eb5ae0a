//! The forms in which people write rows, told by their keys or columns, and how each becomes a row as [`super::row`] reads it.
//!
//! Names are those of `names`, or what a user says with `--columns`. What is not clear is refused, with what to say. A row that has our
//! own keys stays the text that it is.

mod foreign;
mod header;
mod mapping;
mod unclear;

use std::borrow::Cow;
use std::fmt::Write as _;

use homeroom_abi::describe::nearest;
use serde_json::{Map, Value as Json};

use self::foreign::{ROW_KEYS, add_input, canonical, conversation, is_foreign, of_openai};
pub(super) use self::header::{Header, is_known};
use self::mapping::{Mapping, Unclear, find, is_optional, map};
use self::unclear::{ambiguous, half, listed, short, with_columns};
use super::columns::Role;
use super::json::object;
use super::problem::{BAD_ROW, MIXED, NOTHING, Problem, UNKNOWN_ROW};
use super::read::Reading;
use super::row::{Row, RowFormat, RowKind, is_given, is_system, parse_row, problem_of, rating, recognise};

/// The rows of one file: of one form, told by the first.
pub(super) struct Forms<'a> {
    reading: &'a Reading,
    wanted: Option<RowKind>,
    seen: Option<Seen>,
    /// Columns that the user named, and a row may lack, that no row has had so far.
    unmet: Vec<(Role, &'a str)>,
    /// The keys of the row before, and which of them was what.
    before: Option<(Vec<String>, Mapping)>,
    /// Keys of a row before that are not our own.
    foreign: Vec<String>,
}

/// The form of the rows before.
struct Seen {
    format: RowFormat,
    keys: String,
    words: Option<String>,
}

/// A row as this program reads it, as text and checked.
pub(super) type Made<'t> = Result<(Cow<'t, str>, Row), Problem>;

impl<'a> Forms<'a> {
    /// Before the first row. `wanted`: what is to be learned, if that is known; a row may have the keys of two forms.
    pub fn new(reading: &'a Reading, wanted: Option<RowKind>) -> Self {
        let unmet = reading.columns.iter().filter(|(role, _)| is_optional(*role)).collect();
        Self { reading, wanted, seen: None, unmet, before: None, foreign: Vec::new() }
    }

    /// Columns that the user named and no row has had.
    pub fn unmet(&self) -> Option<(Role, &'a str)> {
        self.unmet.first().copied()
    }

    /// The form of the rows so far.
    pub fn format(&self) -> Option<RowFormat> {
        self.seen.as_ref().map(|seen| seen.format)
    }

    /// What is what in them, in words; `None`: they have our own keys.
    pub fn words(&self) -> Option<&str> {
        self.seen.as_ref()?.words.as_deref()
    }

    /// A row of JSON. `line`: the one that it begins in, where it may have several.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn json<'t>(&mut self, bytes: &'t [u8], line: Option<usize>) -> Made<'t> {
        let mut fields = object(bytes, line)?;
        let is_wrapped = fields.contains_key("row_idx") && fields.get("row").is_some_and(Json::is_object);
        if is_wrapped && let Some(Json::Object(inner)) = fields.remove("row") {
            fields = inner;
        }
        let before = self.format();
        // Why a row is none of ours takes long to say, and is the same of each with such keys.
        let is_known = !self.foreign.is_empty() && self.foreign.iter().eq(fields.keys());
        if self.reading.columns.is_empty() && !is_known && !is_foreign(&fields) {
            match recognise(&fields, before, self.wanted) {
                // A text beside a question and an answer is what both were rendered to.
                Ok(RowFormat::Text)
                    if map(&keys_of(&fields), &self.reading.columns, self.wanted)
                        .is_ok_and(|mapping| mapping.format == RowFormat::PromptCompletion) =>
                {
                    self.foreign = fields.keys().cloned().collect();
                }
                Ok(format) => {
                    self.see(format, format.keys().to_owned(), None)?;
                    let is_changed = self.add_system(&mut fields, format)? || is_wrapped;
                    let text = match std::str::from_utf8(bytes) {
                        // A row of a list may go over several lines; as text it is one.
                        Ok(text) if !is_changed && !text.contains(['\n', '\r']) => Cow::Borrowed(text),
                        _ => Cow::Owned(Json::Object(fields.clone()).to_string()),
                    };
                    return Ok((text, parse_row(fields, format).map_err(problem_of)?));
                }
                Err(problem) => {
                    if let Some((fields, format, keys)) = of_openai(&fields) {
                        let words = "input → prompt, preferred_output → chosen, non_preferred_output → rejected";
                        return self.made(fields, format, keys.to_owned(), words.to_owned());
                    }
                    match map(&keys_of(&fields), &self.reading.columns, self.wanted) {
                        Ok(_) => self.foreign = fields.keys().cloned().collect(),
                        Err(Unclear::Ambiguous(role, names)) => return Err(ambiguous(role, &names)),
                        Err(_) => return Err(with_columns(problem, &fields)),
                    }
                }
            }
        }
        let names = keys_of(&fields);
        let mapping = self.mapping(&names).map_err(|unclear| match unclear {
            Unclear::Missing(role, name) => {
                let near = match nearest(&name, names.iter().copied()) {
                    Some(near) => format!(", did you mean `{near}`?"),
                    None => format!("; it has {}", listed(&names)),
                };
                Problem::new(UNKNOWN_ROW, format!("no `{name}`, which is to be `{}`{near}", role.name()))
            }
            Unclear::Ambiguous(role, names) => ambiguous(role, &names),
            Unclear::Half(role, name) => Problem::new(UNKNOWN_ROW, half(role, &name, &names)),
            Unclear::Unknown => Problem::new(UNKNOWN_ROW, format!("unknown row with {}", listed(&names))),
        })?;
        let mut format = mapping.format;
        let label = mapping.of(Role::Label).next().and_then(|at| fields.get(names[at]));
        if label.is_some_and(|label| rating(label).is_some() || before == Some(RowFormat::Rated)) {
            format = RowFormat::Rated;
        } else if let Some(label) = label {
            self.refuse_label(label)?;
        }
        let name = |at: usize| names[at].to_owned();
        let (keys, words) = (mapping.keys(format, name), mapping.words(format, name));
        let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
        let of_sharegpt = |at: usize| fields.get(&names[at]).is_some_and(|turns| turns[0].get("from").is_some());
        let is_sharegpt = mapping.of(Role::Messages).any(of_sharegpt);
        let is_judged = format == RowFormat::Preference && is_foreign(&fields);
        let words = match (is_sharegpt, is_judged) {
            (true, _) => format!("ShareGPT; {words}"),
            (_, true) => format!("ShareGPT; conversations → user, {words}"),
            _ => words,
        };
        let fields = canonical(fields, &mapping, format, &names).map_err(problem_of)?;
        self.made(fields, format, keys, words)
    }

    /// Refuses a label that the user named and that rates nothing: it would be lost.
    fn refuse_label(&self, label: &Json) -> Result<(), Problem> {
        let Some((_, name)) = self.reading.columns.iter().find(|(role, _)| *role == Role::Label) else { return Ok(()) };
        let shown = short(&label.to_string());
        let detail = format!(
            "`{name}` is to be `label`, and {shown} rates nothing; write true or false, or leave `label` out of `--columns`"
        );
        Err(Problem::new(BAD_ROW, detail))
    }

    /// Which of a row's keys is what. What a row may lack is looked for in each.
    fn mapping(&mut self, names: &[&str]) -> Result<Mapping, Unclear> {
        if let Some((before, mapping)) = &self.before
            && before.iter().map(String::as_str).eq(names.iter().copied())
        {
            return Ok(mapping.clone());
        }
        let is_there = |role: Role, name: &str| {
            let near = || nearest(name, names.iter().copied()).is_some();
            !is_optional(role) || find(names, name).is_some() || near()
        };
        self.unmet.retain(|(_, name)| find(names, name).is_none());
        let mapping = map(names, &self.reading.columns.only(is_there), self.wanted)?;
        self.before = Some((names.iter().map(|name| (*name).to_owned()).collect(), mapping.clone()));
        Ok(mapping)
    }

    /// A row of a table.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn cells(&mut self, header: &Header, cells: &[&str]) -> Made<'static> {
        let Header { names, mapping, .. } = header;
        let bad = |detail: String| Err(Problem::new(BAD_ROW, detail));
        if cells.len() > names.len() && cells[names.len()..].iter().any(|cell| !cell.trim().is_empty()) {
            return bad(format!(
                "{} cells, where the header has {}; a cell with a separator or a line break in it has to stand in quotes",
                cells.len(),
                names.len()
            ));
        }
        if let Some(at) = cells.iter().position(|cell| cell.contains('\0')) {
            return bad(format!("`{}` has a NUL character", header.name(at)));
        }
        let cell = |at: usize| cells.get(at).copied().unwrap_or("");
        let mut fields = Map::new();
        for (role, at) in &mapping.roles {
            let (text, name) = (cell(*at), header.name(*at));
            let is_needed = !is_optional(*role);
            if text.trim().is_empty() && is_needed {
                let (lacks, is) = if *at < cells.len() { ("", "is empty") } else { ("no ", "in this row") };
                return match role {
                    Role::Prompt => bad(format!("{lacks}`{name}` {is}")),
                    _ => Err(Problem::new(NOTHING, format!("{NOTHING}: {lacks}`{name}` {is}"))),
                };
            }
            match role {
                Role::Input => add_input(&mut fields, text.into(), &name)?,
                Role::System if text.trim().is_empty() => {}
                Role::Tools | Role::Label if text.trim().is_empty() => {}
                Role::Messages | Role::Prompt | Role::Chosen | Role::Rejected
                    if text.trim_start().starts_with("[{") =>
                {
                    let list = serde_json::from_str(text).map_err(|error| {
                        Problem::new(BAD_ROW, format!("`{name}` is no list of messages in JSON: {error}"))
                    });
                    fields.insert(role.name().to_owned(), list?);
                }
                _ => {
                    fields.insert(role.name().to_owned(), text.into());
                }
            }
        }
        let label = fields.get("label");
        let is_rated = label.is_some_and(|label| rating(label).is_some()) || self.format() == Some(RowFormat::Rated);
        let has_label = mapping.of(Role::Label).next().is_some();
        let format = if has_label && is_rated { RowFormat::Rated } else { mapping.format };
        if has_label && !is_rated {
            self.refuse_label(label.unwrap_or(&Json::Null))?;
        }
        let of_label = |role: Role| role == Role::Label && format != RowFormat::Rated;
        let is_read = |at: usize| mapping.roles.iter().any(|(role, read)| *read == at && !of_label(*role));
        for (at, name) in names.iter().enumerate().filter(|(at, name)| !is_read(*at) && !name.is_empty()) {
            if !cell(at).is_empty() && !fields.contains_key(name) && !ROW_KEYS.contains(&name.as_str()) {
                fields.insert(name.clone(), cell(at).into());
            }
        }
        if let (RowFormat::Messages, Some(turns)) = (format, fields.remove("messages")) {
            let turns = conversation(turns, "messages").map_err(problem_of)?;
            fields.insert("messages".to_owned(), turns);
        }
        let name = |at: usize| header.name(at);
        let mut words = mapping.words(format, name);
        let unread: Vec<&str> = (0..names.len())
            .filter(|at| !is_read(*at) && !names[*at].is_empty())
            .map(|at| names[at].as_str())
            .collect();
        if !unread.is_empty() {
            let _ = write!(words, "; not learned: {}", unread.join(", "));
        }
        self.made(fields, format, mapping.keys(format, name), words)
    }

    fn made<'t>(&mut self, mut fields: Map<String, Json>, format: RowFormat, keys: String, words: String) -> Made<'t> {
        self.see(format, keys, Some(words))?;
        self.add_system(&mut fields, format)?;
        let text = Json::Object(fields.clone()).to_string();
        // A question with earlier ones has become a conversation.
        let format = if fields.contains_key("messages") { RowFormat::Messages } else { format };
        Ok((Cow::Owned(text), parse_row(fields, format).map_err(problem_of)?))
    }

    /// Holds a row to the form of those before it.
    fn see(&mut self, format: RowFormat, keys: String, words: Option<String>) -> Result<(), Problem> {
        match &mut self.seen {
            Some(seen) if seen.format != format || seen.keys != keys => {
                Err(Problem::new(MIXED, format!("has {keys}, while the rows before have {}", seen.keys)))
            }
            Some(seen) => {
                // Alpaca's first row may have no `input`, and a later one has.
                if words.as_ref().map_or(0, String::len) > seen.words.as_ref().map_or(0, String::len) {
                    seen.words = words;
                }
                Ok(())
            }
            None => {
                self.seen = Some(Seen { format, keys, words });
                Ok(())
            }
        }
    }

    /// Gives a row the system message that the user gave for all, unless it has one. Returns whether it was given.
    fn add_system(&self, fields: &mut Map<String, Json>, format: RowFormat) -> Result<bool, Problem> {
        let Some(system) = &self.reading.system else { return Ok(false) };
        if format == RowFormat::Text {
            let detail = "`--system` goes before a question, and a row of `text` has none";
            return Err(Problem::new(BAD_ROW, detail));
        }
        let in_list =
            |key: &str| fields.get(key).and_then(Json::as_array).is_some_and(|list| list.iter().any(is_system));
        if is_given(fields.get("system")) || ["messages", "prompt", "chosen"].into_iter().any(in_list) {
            return Ok(false);
        }
        fields.insert("system".to_owned(), system.as_str().into());
        Ok(true)
    }
}

fn keys_of(fields: &Map<String, Json>) -> Vec<&str> {
    fields.keys().map(String::as_str).collect()
}
