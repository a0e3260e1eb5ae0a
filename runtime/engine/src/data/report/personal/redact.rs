//! Puts placeholders in the place of what is likely personal.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};

use serde_json::Value as Json;

use super::find;

/// Fields of a row that say what it is, not what is learned.
const LEFT: [&str; 4] = ["role", "type", "from", "tool_call_id"];

/// Whether a field is left as it is: one that says what a row is, in a word.
fn is_left(name: &str, field: &Json) -> bool {
    let is_word = |text: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        text.len() <= 64 && text.bytes().all(plain) && text.starts_with(|c: char| c.is_ascii_alphabetic())
    };
    LEFT.contains(&name) && field.as_str().is_some_and(is_word)
}

/// Gives each value a placeholder, `[EMAIL_1]`: the same value the same one, however it is spaced, in all texts that it is shown.
///
/// Of a value no more than a 64-bit hash is kept.
#[derive(Default)]
pub struct Redactor {
    hasher: RandomState,
    numbers: HashMap<(&'static str, u64), usize>,
    counts: BTreeMap<&'static str, (usize, usize)>,
}

impl Redactor {
    /// A text with placeholders.
    pub fn text<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let found = find(text);
        if found.is_empty() {
            return text.into();
        }
        let (mut out, mut from) = (String::with_capacity(text.len()), 0);
        for found in found {
            out += &text[from..found.at.start];
            let value = normal(found.kind, &text[found.at.clone()]);
            let (places, values) = self.counts.entry(found.kind).or_default();
            *places += 1;
            let key = (found.kind, self.hasher.hash_one(value));
            let number = *self.numbers.entry(key).or_insert_with(|| {
                *values += 1;
                *values
            });
            out += &format!("[{}_{number}]", found.kind.to_ascii_uppercase());
            from = found.at.end;
        }
        out += &text[from..];
        out.into()
    }

    /// A row of JSON with placeholders in its texts; `None`: nothing was found.
    pub fn row(&mut self, row: &Json) -> Option<Json> {
        match row {
            Json::String(text) => match self.text(text) {
                Cow::Borrowed(_) => None,
                Cow::Owned(text) => Some(text.into()),
            },
            Json::Array(items) => {
                let redacted: Vec<Option<Json>> = items.iter().map(|item| self.row(item)).collect();
                let changed = redacted.iter().any(Option::is_some);
                let whole = redacted.into_iter().zip(items).map(|(new, old)| new.unwrap_or_else(|| old.clone()));
                changed.then(|| Json::Array(whole.collect()))
            }
            Json::Object(fields) => {
                let mut changed = None;
                for (name, field) in fields.iter().filter(|(name, field)| !is_left(name, field)) {
                    if let Some(new) = self.row(field) {
                        changed.get_or_insert_with(|| fields.clone()).insert(name.clone(), new);
                    }
                }
                changed.map(Json::Object)
            }
            Json::Number(number) => match self.text(&number.to_string()) {
                Cow::Borrowed(_) => None,
                Cow::Owned(text) => Some(text.into()),
            },
            _ => None,
        }
    }

    /// How many places were filled of each kind, and with how many values.
    pub fn counts(&self) -> &BTreeMap<&'static str, (usize, usize)> {
        &self.counts
    }
}

/// A value without how it happens to be written.
fn normal(kind: &str, value: &str) -> String {
    match kind {
        super::EMAIL | super::URL => value.to_lowercase(),
        super::IP_ADDRESS => value.to_lowercase(),
        super::PHONE => {
            // `+49 (0)30` and `0049 30` are one.
            let digits: String = value.replace("(0)", "").chars().filter(char::is_ascii_digit).collect();
            digits.strip_prefix("00").map_or(digits.clone(), str::to_owned)
        }
        _ => value.chars().filter(char::is_ascii_alphanumeric).collect(),
    }
}
