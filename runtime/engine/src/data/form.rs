//! The forms in which people write rows, told by their keys or columns, and how each becomes a row as [`super::row`] reads it.
//!
//! Names are those of `names`, or what a user says with `--columns`. What is not clear is refused, with what to say. A row that has our
//! own keys stays the text that it is.

use std::borrow::Cow;
use std::fmt::Write as _;

use homeroom_abi::describe::nearest;
use serde_json::{Map, Value as Json, json};

use super::columns::{Columns, Role};
use super::json::object;
use super::names::{Sure, plain, role_of, sure_names};
use super::problem::{BAD_ROW, MIXED, NOTHING, Problem, UNKNOWN_ROW};
use super::read::Reading;
use super::row::{Row, RowFormat, RowKind, is_given, is_system, kind_of, parse_row, problem_of, rating, recognise};

/// Which of some names is what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// What rows are, but for a label that may rate them.
    pub format: RowFormat,
    /// Places among the names.
    pub roles: Vec<(Role, usize)>,
}

/// Why names do not say what is what.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unclear {
    /// A name that the user gave is not there.
    Missing(Role, String),
    /// Several may be one thing.
    Ambiguous(Role, Vec<String>),
    /// One is there, and the other is not.
    Half(Role, String),
    /// None is known.
    Unknown,
}

/// Names of what is to be done, beside which `input` is what it is done to: Alpaca's rows, in any language.
const INSTRUCTIONS: [&str; 12] = [
    "instruction",
    "instructions",
    "anweisung",
    "instrucción",
    "instruccion",
    "consigna",
    "consigne",
    "istruzione",
    "instrução",
    "opdracht",
    "polecenie",
    "指令",
];
/// Names of what an instruction is done to.
const INPUTS: [&str; 6] = ["input", "eingabe", "entrada", "entrée", "输入", "入力"];

/// Finds out which of some names is what: as the user says, and else by names that are known.
pub(super) fn map(names: &[&str], columns: &Columns, wanted: Option<RowKind>) -> Result<Mapping, Unclear> {
    let mut given = Vec::new();
    for (role, name) in columns.iter() {
        given.push((role, find(names, name).ok_or_else(|| Unclear::Missing(role, name.to_owned()))?));
    }
    let is_given = |role: Role| given.iter().any(|(other, _)| *other == role);
    let is_taken = |index: usize| given.iter().any(|(_, taken)| *taken == index);
    let known: Vec<(Role, Sure, usize)> = (0..names.len())
        .filter(|index| !is_taken(*index))
        .filter_map(|index| role_of(names[index]).map(|(role, sure)| (role, sure, index)))
        .filter(|(role, ..)| !is_given(*role))
        .collect();
    // What the user says, or the surest; of several that are as sure none.
    let pick = |role: Role| -> Result<Option<usize>, Unclear> {
        if let Some((_, index)) = given.iter().find(|(other, _)| *other == role) {
            return Ok(Some(*index));
        }
        let of_role = || known.iter().filter(|(other, ..)| *other == role);
        let Some(best) = of_role().map(|(_, sure, _)| *sure).max() else { return Ok(None) };
        let mut surest = of_role().filter(|(_, sure, _)| *sure == best).map(|(.., index)| *index);
        match (surest.next(), surest.next()) {
            (first, None) => Ok(first),
            (first, second) => {
                let all = first.into_iter().chain(second).chain(surest);
                Err(Unclear::Ambiguous(role, all.map(|index| names[index].to_owned()).collect()))
            }
        }
    };
    let is_pair = is_given(Role::Prompt) || is_given(Role::Completion);
    let mut roles = Vec::new();
    let format = 'format: {
        let is_judged = is_given(Role::Chosen) || !is_pair && !is_given(Role::Text) && !is_given(Role::Messages);
        if is_judged
            && let (Some(chosen), Some(rejected)) = (pick(Role::Chosen)?, pick(Role::Rejected)?)
            && (wanted != Some(RowKind::Demonstration) || pick(Role::Messages)?.is_none())
        {
            roles.extend(pick(Role::Prompt)?.map(|index| (Role::Prompt, index)));
            roles.extend([(Role::Chosen, chosen), (Role::Rejected, rejected)]);
            break 'format RowFormat::Preference;
        }
        if !is_pair
            && !is_given(Role::Text)
            && let Some(messages) = pick(Role::Messages)?
        {
            roles.push((Role::Messages, messages));
            break 'format RowFormat::Messages;
        }
        if !is_given(Role::Text) {
            match (pick(Role::Prompt), pick(Role::Completion)) {
                (Ok(Some(prompt)), Ok(Some(completion))) => {
                    roles.extend([(Role::Prompt, prompt), (Role::Completion, completion)]);
                    roles.extend(pick(Role::Label)?.map(|index| (Role::Label, index)));
                    break 'format RowFormat::PromptCompletion;
                }
                (Err(unclear), Ok(Some(_)) | Err(_)) | (Ok(Some(_)), Err(unclear)) => return Err(unclear),
                _ => {}
            }
        }
        if let Some(text) = pick(Role::Text)?.filter(|_| !is_pair) {
            roles.push((Role::Text, text));
            break 'format RowFormat::Text;
        }
        let half = [Role::Prompt, Role::Completion, Role::Chosen, Role::Rejected].into_iter().find_map(|role| {
            let index = pick(role).ok().flatten()?;
            Some(Unclear::Half(role, names[index].to_owned()))
        });
        return Err(half.unwrap_or(Unclear::Unknown));
    };
    if let Some((_, prompt)) = roles.iter().find(|(role, _)| *role == Role::Prompt).copied() {
        let is_instruction = INSTRUCTIONS.contains(&&*plain(names[prompt]));
        let is_input = |(role, _, index): &&(Role, Sure, usize)| match role {
            Role::Input => true,
            Role::Prompt => is_instruction && *index != prompt && INPUTS.contains(&&*plain(names[*index])),
            _ => false,
        };
        let inputs = known.iter().filter(is_input).map(|(.., index)| (Role::Input, *index));
        roles.extend(given.iter().copied().filter(|(role, _)| *role == Role::Input).chain(inputs));
    }
    if format != RowFormat::Text {
        roles.extend(pick(Role::System)?.map(|index| (Role::System, index)));
        roles.extend(pick(Role::Tools)?.map(|index| (Role::Tools, index)));
    }
    // What the user names and nothing reads would be lost.
    match given.iter().find(|used| !roles.contains(used)) {
        Some((role, index)) => Err(Unclear::Half(*role, names[*index].to_owned())),
        None => Ok(Mapping { format, roles }),
    }
}

/// The place of a name that a user typed, or of a column by its number.
fn find(names: &[&str], name: &str) -> Option<usize> {
    let exact = names.iter().position(|other| *other == name);
    let alike = || {
        let mut alike = (0..names.len()).filter(|index| plain(names[*index]) == plain(name) && !plain(name).is_empty());
        alike.next().filter(|_| alike.next().is_none())
    };
    let number = || name.parse::<usize>().ok()?.checked_sub(1).filter(|index| *index < names.len());
    exact.or_else(alike).or_else(number)
}

impl Mapping {
    /// The places of a role.
    pub fn of(&self, role: Role) -> impl Iterator<Item = usize> {
        self.roles.iter().filter(move |(other, _)| *other == role).map(|(_, index)| *index)
    }

    /// What is what, in words. `name`: of a place.
    fn words(&self, format: RowFormat, name: impl Fn(usize) -> String) -> String {
        let names = |role: Role| self.of(role).map(&name).collect::<Vec<_>>().join(" + ");
        let named = |role: Role| match names(role) {
            name if plain(&name) == role.name() => name,
            name => format!("{name} → {}", role.name()),
        };
        let mut words: Vec<String> = Vec::new();
        let mut add = |text: String| words.push(text);
        if self.of(Role::System).next().is_some() {
            add(named(Role::System));
        }
        if let Some(prompt) = self.of(Role::Prompt).next() {
            let asked: Vec<String> = std::iter::once(prompt).chain(self.of(Role::Input)).map(&name).collect();
            add(format!("{} → user", asked.join(" + ")));
        }
        match format {
            RowFormat::Messages => add(named(Role::Messages)),
            RowFormat::PromptCompletion => add(format!("{} → assistant", names(Role::Completion))),
            RowFormat::Rated => {
                add(format!("{} → assistant", names(Role::Completion)));
                add(named(Role::Label));
            }
            RowFormat::Preference => {
                add(named(Role::Chosen));
                add(named(Role::Rejected));
            }
            RowFormat::Text => add(named(Role::Text)),
        }
        if self.of(Role::Tools).next().is_some() {
            add(named(Role::Tools));
        }
        words.join(", ")
    }

    /// The keys that all rows of a file have alike.
    fn keys(&self, format: RowFormat, name: impl Fn(usize) -> String) -> String {
        let wanted: &[Role] = match format {
            RowFormat::Messages => &[Role::Messages],
            RowFormat::PromptCompletion => &[Role::Prompt, Role::Completion],
            RowFormat::Rated => &[Role::Prompt, Role::Completion, Role::Label],
            RowFormat::Preference => &[Role::Chosen, Role::Rejected],
            RowFormat::Text => &[Role::Text],
        };
        let names: Vec<String> =
            wanted.iter().flat_map(|role| self.of(*role)).map(|at| format!("`{}`", name(at))).collect();
        names.join(" and ")
    }
}

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

/// Whether rows may lack it.
fn is_optional(role: Role) -> bool {
    matches!(role, Role::Input | Role::System | Role::Tools | Role::Label)
}

/// Keys that mean something in a row, which no other column may have.
const ROW_KEYS: [&str; 9] =
    ["messages", "prompt", "completion", "text", "chosen", "rejected", "label", "system", "tools"];

/// The columns of a table.
pub(super) struct Header {
    /// Their names; empty where a column has none.
    pub names: Vec<String>,
    /// Which is what.
    pub mapping: Mapping,
    /// Whether the first row is the header, and not the first of the rows.
    pub is_row: bool,
}

impl Header {
    /// Of the first row of a table.
    ///
    /// # Errors
    /// When it is not clear which column is what: how to say it.
    pub fn of(
        first: &[&str],
        second: Option<&[&str]>,
        columns: &Columns,
        wanted: Option<RowKind>,
    ) -> Result<Self, String> {
        let names: Vec<&str> = first.iter().map(|name| name.trim().trim_start_matches('\u{feff}')).collect();
        // Empty columns behind the last one are none.
        let width = names.iter().rposition(|name| !name.is_empty()).map_or(0, |last| last + 1);
        let names = &names[..width];
        let by_number = columns.iter().all(|(_, name)| !names.contains(&name) && name.parse::<usize>().is_ok());
        let is_header = names.iter().any(|name| role_of(name).is_some_and(|(_, sure)| sure > Sure::Perhaps));
        let is_row = !by_number || columns.is_empty() || is_header;
        let mapping = map(names, columns, wanted).map_err(|unclear| unclear_header(unclear, names, second))?;
        for (_, at) in &mapping.roles {
            let is_twice = |(other, name): (usize, &&str)| other != *at && plain(name) == plain(names[*at]);
            if is_row && names.iter().enumerate().any(is_twice) && !by_number {
                return Err(format!(
                    "two columns are named `{}`\nhint: rename one of them, or name columns by their numbers, such as `{}`",
                    names[*at],
                    flag(&by_numbers(&mapping))
                ));
            }
        }
        let mut own: Vec<String> = Vec::new();
        for name in names {
            // Of two other columns of one name the first is kept.
            let is_new = is_row && !own.iter().any(|other| other == name);
            own.push(if is_new { (*name).to_owned() } else { String::new() });
        }
        Ok(Self { names: own, mapping, is_row })
    }

    /// What a column is called.
    fn name(&self, at: usize) -> String {
        match self.names.get(at).filter(|name| !name.is_empty()) {
            Some(name) => name.clone(),
            None => format!("column {}", at + 1),
        }
    }
}

fn by_numbers(mapping: &Mapping) -> String {
    let pairs = mapping.roles.iter().map(|(role, at)| format!("{}={}", role.name(), at + 1));
    pairs.collect::<Vec<_>>().join(",")
}

/// Whether the first row of a table is a header that says what is what.
pub(super) fn is_known(first: &[&str], columns: &Columns, wanted: Option<RowKind>) -> bool {
    let names: Vec<&str> = first.iter().map(|name| name.trim()).collect();
    // Of one cell every text would be.
    (names.len() > 1 || names.iter().all(|name| plain(name) == "text")) && map(&names, columns, wanted).is_ok()
}

/// What is said of a table whose columns are not clear, with what to type.
fn unclear_header(unclear: Unclear, names: &[&str], second: Option<&[&str]>) -> String {
    let shown = names.iter().filter(|name| !name.is_empty()).copied().collect::<Vec<_>>();
    match unclear {
        Unclear::Missing(role, name) => {
            let near = nearest(&name, shown.iter().copied()).map(|near| format!(", did you mean `{near}`?"));
            let near = near.unwrap_or_else(|| format!("; the columns are {}", listed(&shown)));
            format!("no column `{name}`, which is to be `{}`{near}", role.name())
        }
        Unclear::Ambiguous(role, several) if plain(&several[0]) == plain(&several[1]) => {
            let at = names.iter().position(|name| *name == several[0]).unwrap_or(0);
            format!(
                "two columns are named `{}`\nhint: rename one of them, or say by its number which is the {}, such as `{}`",
                several[0],
                thing(role),
                flag(&format!("{}={}", role.name(), at + 1))
            )
        }
        Unclear::Ambiguous(role, several) => {
            format!(
                "{} may each be the {}\nhint: `{}` says which it is",
                listed(&several),
                thing(role),
                flag(&format!("{}={}", role.name(), several[0]))
            )
        }
        unclear => {
            let found = match &unclear {
                Unclear::Half(role, name) => Some((*role, name.as_str())),
                _ => None,
            };
            let guess = guess(&shown, found, second, names);
            let what = match found {
                Some((role, name)) if matches!(role, Role::Prompt | Role::Completion) => {
                    let other = if role == Role::Prompt { Role::Completion } else { Role::Prompt };
                    format!("`{name}` is the {}, and no column is named as the {}; ", thing(role), thing(other))
                }
                _ => "no column is named as a question or an answer; ".to_owned(),
            };
            let numbers = if shown.len() >= 2 && found.is_none() {
                "; where the first row is no header, `--columns prompt=1,completion=2` does"
            } else {
                ""
            };
            let hint = match guess {
                Some(guess) => format!("\nhint: `{}` says which is which{numbers}", flag(&guess)),
                None if shown.len() == 1 => {
                    format!("\nhint: `{}` learns it as text", flag(&format!("text={}", shown[0])))
                }
                None => "\nhint: a table has a column of questions and one of answers, such as `Question` and `Answer`, or one of `text`".to_owned(),
            };
            format!("{what}the first row has {}{hint}", listed(&shown))
        }
    }
}

/// What a user may type for columns with such names.
fn guess(shown: &[&str], found: Option<(Role, &str)>, second: Option<&[&str]>, names: &[&str]) -> Option<String> {
    let is_number = |name: &str| {
        let at = names.iter().position(|other| *other == name);
        let below = at.zip(second).and_then(|(at, second)| second.get(at).copied()).unwrap_or("");
        below.trim().replace(',', ".").parse::<f64>().is_ok() || below.trim().is_empty()
    };
    let mut free: Vec<&str> =
        shown.iter().copied().filter(|name| found.is_none_or(|(_, found)| found != *name)).collect();
    // Words, rather than numbers and empty cells.
    if free.iter().filter(|name| !is_number(name)).count() >= if found.is_some() { 1 } else { 2 } {
        free.retain(|name| !is_number(name));
    }
    let mut take = |role: Role| {
        let near = free.iter().position(|name| nearest(&plain(name), sure_names(role)).is_some());
        (!free.is_empty()).then(|| free.remove(near.unwrap_or(0)))
    };
    let (prompt, completion) = match found {
        Some((Role::Prompt, name)) => (name, take(Role::Completion)?),
        Some((Role::Completion, name)) => (take(Role::Prompt)?, name),
        Some(_) => return None,
        None => {
            let prompt = take(Role::Prompt)?;
            (prompt, take(Role::Completion)?)
        }
    };
    Some(format!("prompt={prompt},completion={completion}"))
}

/// The flag as it is typed: with quotes where a shell would part it.
fn flag(columns: &str) -> String {
    let is_plain = columns.chars().all(|c| c.is_alphanumeric() || "=,_-.".contains(c));
    if is_plain { format!("--columns {columns}") } else { format!("--columns \"{columns}\"") }
}

fn thing(role: Role) -> &'static str {
    match role {
        Role::Prompt => "question",
        Role::Completion => "answer",
        Role::System => "system message",
        _ => role.name(),
    }
}

fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let mut shown: Vec<String> = names.iter().take(8).map(|name| format!("`{}`", short(name.as_ref()))).collect();
    if names.len() > 8 {
        shown.push("…".to_owned());
    }
    shown.join(", ")
}

fn short(name: &str) -> String {
    let name = name.replace('\n', " ");
    if name.chars().count() <= 40 { name } else { name.chars().take(39).chain(['…']).collect() }
}

fn keys_of(fields: &Map<String, Json>) -> Vec<&str> {
    fields.keys().map(String::as_str).collect()
}

fn ambiguous(role: Role, names: &[String]) -> Problem {
    let detail = format!(
        "{} may each be the {}; `{}` says which it is",
        listed(names),
        thing(role),
        flag(&format!("{}={}", role.name(), names[0]))
    );
    Problem::new(UNKNOWN_ROW, detail)
}

fn half(role: Role, name: &str, names: &[&str]) -> String {
    format!("`{name}` is to be `{}`, which says too little by itself; the row has {}", role.name(), listed(names))
}

/// The problem of an unknown row, with what to type where that can be told.
fn with_columns(problem: Problem, fields: &Map<String, Json>) -> Problem {
    let texts: Vec<&str> = fields.iter().filter(|(_, value)| value.is_string()).map(|(key, _)| key.as_str()).collect();
    let detail = problem.to_string();
    if texts.len() < 2 || detail.contains(';') || !detail.starts_with(UNKNOWN_ROW) {
        return problem;
    }
    let of = |role: Role| texts.iter().find(|name| role_of(name).is_some_and(|(of, _)| of == role)).copied();
    let found = of(Role::Prompt)
        .map(|name| (Role::Prompt, name))
        .or_else(|| of(Role::Completion).map(|name| (Role::Completion, name)));
    match guess(&texts, found, None, &[]) {
        Some(guess) => Problem::new(UNKNOWN_ROW, format!("{detail}; `{}` says which is which", flag(&guess))),
        None => problem,
    }
}

/// Whether a row has our keys for something that others write: turns with `from` and `value`.
fn is_foreign(fields: &Map<String, Json>) -> bool {
    let of_sharegpt = |turn: &Json| turn.get("from").is_some() && turn.get("role").is_none();
    let list = fields.get("messages").and_then(Json::as_array);
    let judged = fields.get("chosen").is_some_and(of_sharegpt) && fields.contains_key("conversations");
    list.and_then(|turns| turns.first()).is_some_and(of_sharegpt) || judged
}

/// OpenAI's form of a preference.
fn of_openai(fields: &Map<String, Json>) -> Option<(Map<String, Json>, RowFormat, &'static str)> {
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
fn canonical(
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
fn add_input(row: &mut Map<String, Json>, input: Json, name: &str) -> Result<(), Problem> {
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
fn conversation(turns: Json, name: &str) -> Result<Json, String> {
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
