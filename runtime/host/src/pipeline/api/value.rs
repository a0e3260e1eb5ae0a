//! Plain values between Lua and JSON, and in words.

use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json};

use super::dataset::Dataset;
use crate::pipeline::clock::Clock;
use crate::pipeline::errors::{Failure, said, short};
use crate::pipeline::limits::bytes;
use crate::pipeline::sandbox::name_of;

/// Deepest nesting of tables. A table can hold itself; JSON cannot.
const DEPTH_MAX: usize = 64;
/// Largest value, in bytes of memory: a table that is in it twice counts twice, as it is there twice in JSON.
const PLAIN_BYTES_MAX: usize = 64 << 20;
/// What a value takes beside its text, roughly.
const NODE_BYTES: usize = 64;
/// Name in the registry of the metatable that tells an empty object from an empty list.
const EMPTY_OBJECT: &str = "homeroom.empty_object";

/// A Lua value as JSON. Keys are sorted, since Lua keeps no order; a whole number is an integer.
///
/// # Errors
/// When it holds a function or another value that is not plain, is too large, or the script is to end.
pub fn to_json(clock: &Clock, value: &Value) -> Result<Json, Failure> {
    Plain { budget: Budget::new(clock) }.value(value, 0)
}

/// What the conversion of one value may still take.
pub struct Budget<'a> {
    clock: &'a Clock,
    left: usize,
}

impl<'a> Budget<'a> {
    /// For a value that has not been begun.
    pub fn new(clock: &'a Clock) -> Self {
        Self { clock, left: PLAIN_BYTES_MAX }
    }

    /// Takes what a node with so much text costs.
    ///
    /// # Errors
    /// When there is too little left, or the script is to end.
    pub fn take(&mut self, text: usize) -> Result<(), Failure> {
        self.clock.check()?;
        let too_large = || {
            said(format!("a value takes more than {}; tables that are in it twice count twice", bytes(PLAIN_BYTES_MAX)))
        };
        self.left = self.left.checked_sub(NODE_BYTES + text).ok_or_else(too_large)?;
        Ok(())
    }

    /// Begins a value that lies so deep.
    ///
    /// # Errors
    /// As [`Budget::take`], or when it lies too deep.
    pub fn enter(&mut self, value: &Value, depth: usize) -> Result<(), Failure> {
        if depth > DEPTH_MAX {
            return Err(said(format!("a table is nested deeper than {DEPTH_MAX}, or holds itself")));
        }
        self.take(value.as_string().map_or(0, |text| text.as_bytes().len()))
    }
}

/// A conversion, and what it may still take.
struct Plain<'a> {
    budget: Budget<'a>,
}

impl Plain<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<Json, Failure> {
        self.budget.enter(value, depth)?;
        Ok(match value {
            Value::Nil => Json::Null,
            Value::Boolean(flag) => (*flag).into(),
            Value::Integer(number) => (*number).into(),
            // Not finite: JSON has no word for it.
            Value::Number(number) if number.fract() == 0.0 && number.abs() < 9e15 => (*number as i64).into(),
            Value::Number(number) => (*number).into(),
            Value::String(text) => match text.to_str() {
                Ok(text) => Json::String(text.to_string()),
                Err(_) => return Err(said("a string is not UTF-8")),
            },
            Value::LightUserData(null) if null.0.is_null() => Json::Null,
            Value::Table(table) => self.table(table, depth)?,
            other => return Err(no_plain(other)),
        })
    }

    /// Items become JSON one by one: a handle of a Lua value is a slot of a stack that has an end.
    fn table(&mut self, table: &Table, depth: usize) -> Result<Json, Failure> {
        let length = table.raw_len();
        let (mut items, mut fields) = (Vec::new(), Vec::new());
        for pair in table.pairs::<Value, Value>() {
            match pair? {
                (Value::Integer(index), value) if (1..=length as i64).contains(&index) => {
                    items.push((index, self.value(&value, depth + 1)?));
                }
                (Value::String(name), value) => {
                    self.budget.take(name.as_bytes().len())?;
                    fields.push((name.to_string_lossy(), self.value(&value, depth + 1)?));
                }
                (key, _) => return Err(no_key(&key)),
            }
        }
        if !items.is_empty() && !fields.is_empty() {
            return Err(mixed());
        }
        if !items.is_empty() && items.len() != length {
            return Err(hole());
        }
        if fields.is_empty() && (!items.is_empty() || !table.has_metatable()) {
            items.sort_by_key(|(index, _)| *index);
            return Ok(items.into_iter().map(|(_, item)| item).collect());
        }
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Json::Object(fields.into_iter().collect::<Map<_, _>>()))
    }
}

/// A value in words, for messages.
pub fn words(value: &Value) -> String {
    match value {
        Value::Nil => "nil".to_owned(),
        Value::Boolean(_) | Value::Integer(_) | Value::Number(_) => value.to_string().unwrap_or_default(),
        Value::String(text) => {
            let text = text.to_string_lossy();
            let short: String = text.chars().take(40).collect();
            format!("{short:?}")
        }
        Value::Table(_) => "a table".to_owned(),
        Value::Function(_) => "a function".to_owned(),
        Value::UserData(data) if data.is::<Dataset>() => "a dataset".to_owned(),
        Value::LightUserData(null) if null.0.is_null() => "null".to_owned(),
        other => format!("a {}", other.type_name()),
    }
}

/// Refuses a value that JSON cannot say.
pub fn no_plain(value: &Value) -> Failure {
    said(format!("{} is no plain value, which is text, a number, true, false or a table of these", words(value)))
}

/// Refuses a table for a key that is neither a place in a list nor a name.
pub fn no_key(key: &Value) -> Failure {
    said(format!("a table with key {} is neither a list nor a table of names", short(&name_of(key))))
}

/// Refuses a list that has no value in the place of an item.
pub fn hole() -> Failure {
    said("a list has a nil before its end; write homeroom.null for an item that is null")
}

/// Refuses a table for having both kinds of keys.
pub fn mixed() -> Failure {
    said("a table has both a list's items and names")
}

/// JSON as a Lua value; null is nil, so a field that is null is not there.
pub fn to_lua(lua: &Lua, value: &Json) -> mlua::Result<Value> {
    Ok(match value {
        Json::Null => Value::Nil,
        Json::Bool(flag) => Value::Boolean(*flag),
        Json::Number(number) => Value::Number(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Value::String(lua.create_string(text)?),
        Json::Array(items) => {
            let table = lua.create_table_with_capacity(items.len(), 0)?;
            for item in items {
                table.raw_push(to_lua(lua, item)?)?;
            }
            Value::Table(table)
        }
        Json::Object(fields) => {
            let table = lua.create_table_with_capacity(0, fields.len())?;
            for (name, field) in fields {
                table.raw_set(name.as_str(), to_lua(lua, field)?)?;
            }
            if fields.is_empty() {
                table.set_metatable(Some(empty_object(lua)?))?;
            }
            Value::Table(table)
        }
    })
}

/// The metatable that tells an empty object from an empty list.
///
/// # Errors
/// When memory is out.
pub fn empty_object(lua: &Lua) -> mlua::Result<Table> {
    if let Ok(Some(known)) = lua.named_registry_value::<Option<Table>>(EMPTY_OBJECT) {
        return Ok(known);
    }
    let table = lua.create_table()?;
    table.set("__metatable", "object")?;
    table.set_readonly(true);
    lua.set_named_registry_value(EMPTY_OBJECT, &table)?;
    Ok(table)
}
