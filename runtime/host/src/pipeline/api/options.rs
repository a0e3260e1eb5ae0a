//! A call's table of options, checked against what the verb takes.

use std::collections::BTreeMap;
use std::str::FromStr;

use homeroom_engine::data::Columns;
use mlua::{AnyUserData, Function, Table, Value};
use serde_json::{Map, Value as Json};

use super::dataset::Dataset;
use super::spec::{STRATEGY, STRATEGY_NAMES, Verb};
use super::value::{to_json, words};
use crate::pipeline::clock::Clock;
use crate::pipeline::errors::{Failure, said, short};
use crate::pipeline::limits::bytes;
use crate::pipeline::sandbox::name_of;

/// Most keys of a table of options that are looked at: no verb has as many.
const KEYS_MAX: usize = 100;
/// Longest text of an option, and of all texts of a list together.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// The options of a call, of known names and right types.
pub struct Options {
    values: BTreeMap<&'static str, Value>,
}

impl Options {
    /// Checks a call's argument.
    ///
    /// # Errors
    /// When it is no table, or options are unknown, missing or of another type; all of it in one message.
    pub fn read(verb: &'static Verb, argument: Value) -> Result<Self, Failure> {
        let table = match argument {
            Value::Table(table) => table,
            Value::Nil if verb.all().all(|option| !option.required) => return Ok(Self { values: BTreeMap::new() }),
            other => {
                return Err(said(format!("{}: it takes one table of options, not {}", verb.name, words(&other))));
            }
        };
        let mut values = BTreeMap::new();
        let mut problems = Vec::new();
        for (index, pair) in table.pairs::<Value, Value>().enumerate() {
            if index == KEYS_MAX {
                problems.push(format!("{}: more than {KEYS_MAX} options", verb.name));
                break;
            }
            let (key, value) = pair?;
            let name = match &key {
                Value::String(name) => name.to_string_lossy(),
                other => {
                    let shown = name_of(other);
                    problems.push(format!("{}: `[{shown}]` is no option; write name = value", verb.name));
                    continue;
                }
            };
            let Some(option) = verb.option(&name) else {
                problems.extend(verb.unknown(&name));
                continue;
            };
            let name = name.as_str();
            if texts(&value) > TEXT_BYTES_MAX {
                let most = bytes(TEXT_BYTES_MAX);
                problems.push(format!("{}: `{name}` is longer than {most}", verb.name));
            } else if !option.kind.admits(&value) {
                let wanted = option.kind.words();
                if option.kind.is_list() && value.as_table().is_some_and(Table::is_empty) {
                    problems.push(format!("{}: `{name}` is empty; it should be {wanted}", verb.name));
                    continue;
                }
                problems.push(format!("{}: `{name}` should be {wanted}, not {}", verb.name, words(&value)));
            }
            if values.insert(option.name, value).is_some() {
                let names: Vec<String> = option.names().map(|name| format!("`{name}`")).collect();
                problems.push(format!("{}: {} are one option; give one of them", verb.name, names.join(" and ")));
            }
        }
        // A table has no order; messages have.
        problems.sort();
        problems.dedup();
        for option in verb.all().filter(|option| option.required && !values.contains_key(option.name)) {
            problems.push(format!("{}: `{}` is missing; it should be {}", verb.name, option.name, option.kind.words()));
        }
        if problems.is_empty() { Ok(Self { values }) } else { Err(said(problems.join("\n  "))) }
    }

    /// The value as it was given.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// A text.
    pub fn text(&self, name: &str) -> Option<String> {
        self.get(name)?.as_string().map(mlua::LuaString::to_string_lossy)
    }

    /// One of some words, as the engine reads it. `read` saw that it is one of those that the option has.
    pub fn word<T: FromStr>(&self, name: &str) -> Option<T> {
        self.text(name)?.parse().ok()
    }

    /// A required text.
    pub fn needed_text(&self, name: &str) -> String {
        self.text(name).expect("`read` saw that a required option is there")
    }

    /// A number.
    pub fn number(&self, name: &str) -> Option<f64> {
        match self.get(name)? {
            Value::Integer(number) => Some(*number as f64),
            Value::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// A whole number.
    pub fn whole(&self, name: &str) -> Option<u64> {
        self.number(name).map(|number| number as u64)
    }

    /// True or false.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.get(name)?.as_boolean()
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.whole("seed").unwrap_or(42)
    }

    /// A list of numbers.
    pub fn numbers(&self, name: &str) -> Vec<f64> {
        let Some(table) = self.get(name).and_then(Value::as_table) else { return Vec::new() };
        table.sequence_values().filter_map(Result::ok).collect()
    }

    /// A list of texts.
    pub fn texts(&self, name: &str) -> Vec<String> {
        let Some(table) = self.get(name).and_then(Value::as_table) else { return Vec::new() };
        // None is kept as a handle of Lua's, whose number is bounded.
        let texts = table.sequence_values::<mlua::LuaString>().filter_map(Result::ok);
        texts.map(|text| text.to_string_lossy()).collect()
    }

    /// A text, or a list of texts.
    pub fn names(&self, name: &str) -> Vec<String> {
        self.text(name).map_or_else(|| self.texts(name), |text| vec![text])
    }

    /// Which column is what: a table of texts, or one text as `--columns` takes it.
    ///
    /// # Errors
    /// When a role is unknown, or a name is none.
    pub fn columns(&self, name: &str) -> anyhow::Result<Option<Columns>> {
        if let Some(text) = self.text(name) {
            return text.parse().map(Some);
        }
        let Some(table) = self.get(name).and_then(Value::as_table) else { return Ok(None) };
        let mut pairs = Vec::new();
        for pair in table.pairs::<Value, Value>() {
            let (role, column) = pair.map_err(|error| anyhow::anyhow!("{error}"))?;
            let column = match &column {
                Value::Integer(number) => number.to_string(),
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.to_string_lossy(),
                other => anyhow::bail!("a column is a name or a number, not {}", words(other)),
            };
            pairs.push((name_of(&role), column));
        }
        pairs.sort();
        Columns::of(pairs.iter().map(|(role, column)| (role.as_str(), column.as_str()))).map(Some)
    }

    /// A function.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.get(name)?.as_function()
    }

    /// A dataset.
    pub fn dataset(&self, name: &str) -> Option<Dataset> {
        let data: &AnyUserData = self.get(name)?.as_userdata()?;
        data.borrow::<Dataset>().ok().map(|data| data.clone())
    }

    /// The options that go to the strategy.
    ///
    /// # Errors
    /// When one is given twice, or is no plain value.
    pub fn strategy(&self, clock: &Clock) -> Result<Map<String, Json>, Failure> {
        let mut options = Map::new();
        for name in STRATEGY_NAMES {
            if let Some(value) = self.get(name) {
                options.insert(name.to_owned(), to_json(clock, value)?);
            }
        }
        let Some(Value::Table(others)) = self.get("options") else { return Ok(options) };
        for (name, value) in strategy_options(clock, others)? {
            // The strategy knows one name, as it does on the command line.
            let name = STRATEGY
                .iter()
                .find(|known| known.names().any(|other| other == name))
                .map_or(&*name, |known| known.name);
            if options.insert(name.to_owned(), value).is_some() {
                return Err(said(format!("`{}` is given twice, once in `options`", short(name))));
            }
        }
        Ok(options)
    }
}

/// A strategy's options as JSON. That has no word for a number that is not finite, which would read as one that was not given.
///
/// # Errors
/// When one is such a number, or no plain value.
pub fn strategy_options(clock: &Clock, table: &Table) -> Result<Map<String, Json>, Failure> {
    for pair in table.pairs::<Value, Value>() {
        let (name, value) = pair?;
        if let Value::Number(number) = &value
            && !number.is_finite()
        {
            let name = name.to_string().unwrap_or_default();
            return Err(said(format!("`{}` should be a finite number, not {number}", short(&name))));
        }
        clock.check()?;
    }
    object(clock, "options", table)
}

/// A table of names as JSON.
///
/// # Errors
/// When it is a list, or not plain.
fn object(clock: &Clock, name: &str, table: &Table) -> Result<Map<String, Json>, Failure> {
    match to_json(clock, &Value::Table(table.clone()))? {
        Json::Object(fields) => Ok(fields),
        Json::Array(items) if items.is_empty() => Ok(Map::new()),
        _ => Err(said(format!("`{name}` should be a table of names, not a list"))),
    }
}

/// Bytes of a text, or of all texts of a list; not all of them, if they are more than [`TEXT_BYTES_MAX`].
fn texts(value: &Value) -> usize {
    match value {
        Value::String(text) => text.as_bytes().len(),
        Value::Table(table) => {
            let items = table.sequence_values::<Value>().map_while(Result::ok);
            // An empty text costs as well.
            let sizes = items.map(|item| 64 + item.as_string().map_or(0, |text| text.as_bytes().len()));
            let mut all = 0;
            sizes
                .take_while(|size| {
                    all += size;
                    all <= TEXT_BYTES_MAX
                })
                .for_each(drop);
            all
        }
        _ => 0,
    }
}
