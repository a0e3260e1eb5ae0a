//! Plain values between Lua and JSON.

use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json};

use super::{Failure, said};

/// Deepest nesting of tables. A table can hold itself; JSON cannot.
const DEPTH_MAX: usize = 64;
/// Name in the registry of the metatable that tells an empty object from an empty list.
const EMPTY_OBJECT: &str = "homeroom.empty_object";

/// A Lua value as JSON. Keys are sorted, since Lua keeps no order; a whole number is an integer.
///
/// # Errors
/// When it holds a function or another value that is not plain.
pub fn to_json(value: &Value) -> Result<Json, Failure> {
    nested(value, 0)
}

fn nested(value: &Value, depth: usize) -> Result<Json, Failure> {
    if depth > DEPTH_MAX {
        return Err(said(format!("a table is nested deeper than {DEPTH_MAX}, or holds itself")));
    }
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
        Value::Table(table) => from_table(table, depth)?,
        other => return Err(said(format!("a {} is no plain value", other.type_name()))),
    })
}

fn from_table(table: &Table, depth: usize) -> Result<Json, Failure> {
    let length = table.raw_len();
    let mut fields = Vec::new();
    for pair in table.pairs::<Value, Value>() {
        match pair? {
            (Value::Integer(index), value) if (1..=length as i64).contains(&index) => {
                fields.push((index, String::new(), value));
            }
            (Value::String(name), value) => fields.push((0, name.to_string_lossy(), value)),
            (key, _) => {
                let shown = key.to_string().unwrap_or_default();
                return Err(said(format!("a table with key {shown} is neither a list nor a table of names")));
            }
        }
    }
    if fields.is_empty() {
        return Ok(if table.has_metatable() { Json::Object(Map::new()) } else { Json::Array(Vec::new()) });
    }
    fields.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    match fields.iter().filter(|(index, _, _)| *index > 0).count() {
        0 => {
            let items = fields.iter().map(|(_, name, value)| Ok((name.clone(), nested(value, depth + 1)?)));
            Ok(Json::Object(items.collect::<Result<_, Failure>>()?))
        }
        count if count == fields.len() => {
            Ok(Json::Array(fields.iter().map(|(_, _, value)| nested(value, depth + 1)).collect::<Result<_, _>>()?))
        }
        _ => Err(said("a table has both a list's items and names")),
    }
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

fn empty_object(lua: &Lua) -> mlua::Result<Table> {
    if let Ok(Some(known)) = lua.named_registry_value::<Option<Table>>(EMPTY_OBJECT) {
        return Ok(known);
    }
    let table = lua.create_table()?;
    table.set("__metatable", "object")?;
    table.set_readonly(true);
    lua.set_named_registry_value(EMPTY_OBJECT, &table)?;
    Ok(table)
}
