//! Rows between JSON text and Lua: what a script does not touch keeps the text that it was.
//!
//! JSON says more than a Lua table holds: an order of keys, null, `1.0` beside `1`, whole numbers beyond 2^53. So a row is not
//! converted back from Lua. It is compared with what the script was given, and only what differs is written anew.

use std::borrow::Cow;
use std::ffi::c_void;

use indexmap::IndexMap;
use mlua::{Lua, Table, Value};

use super::value::{Budget, empty_object, hole, mixed, no_key, no_plain};
use crate::pipeline::clock::Clock;
use crate::pipeline::errors::{Failure, said};

/// Whole numbers up to here are exact in Lua: 2^53.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A JSON value and the text that says it.
pub struct Node<'t> {
    text: &'t str,
    value: Parsed<'t>,
}

enum Parsed<'t> {
    Null,
    Bool(bool),
    Number(f64),
    Text(Cow<'t, str>),
    List(Vec<Node<'t>>),
    /// Of fields of one name the last counts, in the place of the first.
    Object(IndexMap<Cow<'t, str>, Node<'t>>),
}

impl<'t> Node<'t> {
    /// Parses a text that a JSON parser has admitted. `None`: it is not JSON.
    pub fn parse(text: &'t str) -> Option<Self> {
        Parser { text, at: 0 }.value()
    }

    /// A field of an object.
    pub fn get(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Parsed::Object(fields) => fields.get(name),
            _ => None,
        }
    }

    /// The names of an object's fields.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let fields = if let Parsed::Object(fields) = &self.value { Some(fields) } else { None };
        fields.into_iter().flat_map(|fields| fields.keys().map(Cow::as_ref))
    }

    /// A number.
    pub fn number(&self) -> Option<f64> {
        match self.value {
            Parsed::Number(number) => Some(number),
            _ => None,
        }
    }

    /// The text of an object with some fields under other names, in their places; `None`: it has none of them.
    ///
    /// # Errors
    /// The name that two fields would have.
    pub fn renamed(&self, names: &[(&str, &str)]) -> Result<Option<String>, String> {
        let Parsed::Object(fields) = &self.value else { return Ok(None) };
        if !names.iter().any(|(from, _)| fields.contains_key(*from)) {
            return Ok(None);
        }
        let mut out = String::with_capacity(self.text.len() + 16);
        let mut seen = std::collections::HashSet::new();
        for (name, field) in fields {
            let to = names.iter().find(|(from, _)| from == name).map_or(name.as_ref(), |(_, to)| to);
            if !seen.insert(to) {
                return Err(to.to_owned());
            }
            out.push(if out.is_empty() { '{' } else { ',' });
            quote(to, &mut out);
            out.push(':');
            out.push_str(field.text);
        }
        out.push('}');
        Ok(Some(out))
    }

    /// Characters of all texts in it, names aside.
    pub fn characters(&self) -> usize {
        match &self.value {
            Parsed::Text(text) => text.chars().count(),
            Parsed::List(items) => items.iter().map(Self::characters).sum(),
            Parsed::Object(fields) => fields.values().map(Self::characters).sum(),
            _ => 0,
        }
    }

    /// Writes the value in one of its spellings, so that equal values have equal texts: keys are sorted, and what is no whole
    /// number is written as a double.
    pub fn canonical(&self, out: &mut String) {
        match &self.value {
            Parsed::Number(number) if self.text.contains(['.', 'e', 'E']) => out.push_str(&number.to_string()),
            Parsed::Text(text) => quote(text, out),
            Parsed::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    out.push(if index == 0 { '[' } else { ',' });
                    item.canonical(out);
                }
                out.push_str(if items.is_empty() { "[]" } else { "]" });
            }
            Parsed::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                fields.sort_by(|a, b| a.0.cmp(b.0));
                out.push('{');
                for (name, field) in fields {
                    quote(name, out);
                    out.push(':');
                    field.canonical(out);
                    out.push(',');
                }
                out.push('}');
            }
            _ => out.push_str(self.text),
        }
    }
}

/// Reads valid JSON; what it makes of anything else is not said, but that it ends.
struct Parser<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Parser<'t> {
    /// The next byte that is no white space.
    fn next(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().position(|byte| !b" \t\r\n".contains(byte))?;
        self.text.as_bytes().get(self.at).copied()
    }

    fn value(&mut self) -> Option<Node<'t>> {
        let first = self.next()?;
        let start = self.at;
        let value = match first {
            b'{' => self.object()?,
            b'[' => self.list()?,
            b'"' => Parsed::Text(self.string()?),
            _ => {
                let rest = &self.text.as_bytes()[start..];
                self.at += rest.iter().position(|byte| b" \t\r\n,]}".contains(byte)).unwrap_or(rest.len());
                match self.text.get(start..self.at)? {
                    "null" => Parsed::Null,
                    "true" => Parsed::Bool(true),
                    "false" => Parsed::Bool(false),
                    number => Parsed::Number(number.parse().ok()?),
                }
            }
        };
        Some(Node { text: self.text.get(start..self.at)?, value })
    }

    fn object(&mut self) -> Option<Parsed<'t>> {
        let mut fields = IndexMap::new();
        self.at += 1;
        while self.next()? != b'}' {
            self.at += usize::from(self.next()? == b',');
            self.next()?;
            let name = self.string()?;
            self.at += usize::from(self.next()? == b':');
            let field = self.value()?;
            fields.insert(name, field);
        }
        self.at += 1;
        Some(Parsed::Object(fields))
    }

    fn list(&mut self) -> Option<Parsed<'t>> {
        let mut items = Vec::new();
        self.at += 1;
        while self.next()? != b']' {
            self.at += usize::from(self.next()? == b',');
            items.push(self.value()?);
        }
        self.at += 1;
        Some(Parsed::List(items))
    }

    fn string(&mut self) -> Option<Cow<'t, str>> {
        let start = self.at;
        let mut at = start + 1;
        let mut is_plain = true;
        loop {
            at += memchr::memchr2(b'"', b'\\', self.text.as_bytes().get(at..)?)?;
            if self.text.as_bytes()[at] == b'"' {
                break;
            }
            is_plain = false;
            at += 2;
        }
        self.at = at + 1;
        match is_plain {
            true => self.text.get(start + 1..at).map(Cow::Borrowed),
            false => serde_json::from_str(self.text.get(start..=at)?).ok().map(Cow::Owned),
        }
    }
}

/// JSON as a Lua value. A field that is null is not there; an item that is null is `homeroom.null`, so that those behind it keep
/// their places.
pub fn to_lua(lua: &Lua, node: &Node) -> mlua::Result<Value> {
    convert(lua, node, &mut |_, _| Ok(()))
}

fn convert<'n, 't>(
    lua: &Lua,
    node: &'n Node<'t>,
    made: &mut impl FnMut(&Table, &'n Node<'t>) -> mlua::Result<()>,
) -> mlua::Result<Value> {
    Ok(match &node.value {
        Parsed::Null => Value::NULL,
        Parsed::Bool(flag) => Value::Boolean(*flag),
        Parsed::Number(number) => Value::Number(*number),
        Parsed::Text(text) => Value::String(lua.create_string(text.as_bytes())?),
        Parsed::List(items) => {
            let table = lua.create_table_with_capacity(items.len(), 0)?;
            for (index, item) in items.iter().enumerate() {
                table.raw_seti(index + 1, convert(lua, item, made)?)?;
            }
            made(&table, node)?;
            Value::Table(table)
        }
        Parsed::Object(fields) => {
            let table = lua.create_table_with_capacity(0, fields.len())?;
            for (name, field) in fields.iter().filter(|(_, field)| !matches!(field.value, Parsed::Null)) {
                table.raw_set(name.as_ref(), convert(lua, field, made)?)?;
            }
            if fields.is_empty() {
                table.set_metatable(Some(empty_object(lua)?))?;
            }
            made(&table, node)?;
            Value::Table(table)
        }
    })
}

/// What a script was given for a row.
pub struct Given<'n, 't> {
    row: &'n Node<'t>,
    /// The tables, by their addresses.
    tables: Vec<(*const c_void, &'n Node<'t>)>,
    /// Whole numbers that are not exact in Lua.
    large: Vec<(f64, &'t str)>,
}

/// Text for a value that a script returned.
enum Written<'t> {
    /// It is one that the script was given.
    Same(&'t str),
    New(String),
}

impl Written<'_> {
    fn text(&self) -> &str {
        match self {
            Self::Same(text) => text,
            Self::New(text) => text,
        }
    }

    /// Whether it is what the script was given in this place.
    fn is(&self, node: &Node) -> bool {
        matches!(self, Self::Same(text) if std::ptr::eq(*text, node.text))
    }
}

impl<'n, 't> Given<'n, 't> {
    /// Gives a script a row. `kept` holds the tables until the next row is given: the address of one that is alive is its own.
    ///
    /// # Errors
    /// When memory is out.
    pub fn new(lua: &Lua, kept: &Table, row: &'n Node<'t>) -> mlua::Result<(Self, Value)> {
        let mut tables: Vec<(*const c_void, &Node)> = Vec::new();
        let value = convert(lua, row, &mut |table, node| {
            tables.push((table.to_pointer(), node));
            kept.raw_seti(tables.len(), table)
        })?;
        tables.sort_unstable_by_key(|(address, _)| *address);
        let mut given = Self { row, tables, large: Vec::new() };
        given.find_large(row);
        Ok((given, value))
    }

    fn find_large(&mut self, node: &Node<'t>) {
        match &node.value {
            Parsed::Number(number) if number.abs() >= EXACT_MAX => self.large.push((*number, node.text)),
            Parsed::List(items) => items.iter().for_each(|item| self.find_large(item)),
            Parsed::Object(fields) => fields.values().for_each(|field| self.find_large(field)),
            _ => {}
        }
    }

    /// The text of the row that a script returned; `None`: it is the one that it was given, unchanged.
    ///
    /// # Errors
    /// When it holds what JSON cannot say, is too large, or the script is to end.
    pub fn changed(&self, clock: &Clock, returned: &Value) -> Result<Option<String>, Failure> {
        let mut writer = Writer { given: self, budget: Budget::new(clock) };
        let written = writer.value(returned, Some(self.row), 0)?;
        Ok(if written.is(self.row) { None } else { Some(written.text().to_owned()) })
    }

    /// What a table was when the script got it.
    fn node(&self, table: &Table) -> Option<&'n Node<'t>> {
        let address = table.to_pointer();
        let found = self.tables.binary_search_by_key(&address, |(address, _)| *address);
        found.ok().map(|index| self.tables[index].1)
    }
}

struct Writer<'a, 'n, 't> {
    given: &'a Given<'n, 't>,
    budget: Budget<'a>,
}

impl<'n, 't> Writer<'_, 'n, 't> {
    /// `was`: what is in its place in the row that the script was given.
    fn value(&mut self, value: &Value, was: Option<&'n Node<'t>>, depth: usize) -> Result<Written<'t>, Failure> {
        self.budget.enter(value, depth)?;
        let same = |is_same: bool| was.filter(|_| is_same).map(|node| Written::Same(node.text));
        let was_value = was.map(|node| &node.value);
        Ok(match value {
            Value::Boolean(flag) => same(matches!(was_value, Some(Parsed::Bool(before)) if before == flag))
                .unwrap_or_else(|| Written::New(flag.to_string())),
            Value::Integer(_) | Value::Number(_) => {
                let number = value.as_f64().or_else(|| value.as_i64().map(|whole| whole as f64)).unwrap_or(f64::NAN);
                match same(matches!(was_value, Some(Parsed::Number(before)) if *before == number)) {
                    Some(same) => same,
                    None => self.number(number)?,
                }
            }
            Value::String(text) => {
                let text = text.to_str().map_err(|_| said("a string is not UTF-8"))?;
                let text: &str = &text;
                same(matches!(was_value, Some(Parsed::Text(before)) if before == text)).unwrap_or_else(|| {
                    let mut out = String::with_capacity(text.len() + 2);
                    quote(text, &mut out);
                    Written::New(out)
                })
            }
            Value::LightUserData(null) if null.0.is_null() => {
                same(matches!(was_value, Some(Parsed::Null))).unwrap_or_else(|| Written::New("null".to_owned()))
            }
            Value::Table(table) => self.table(table, was, depth)?,
            other => return Err(no_plain(other)),
        })
    }

    fn number(&self, number: f64) -> Result<Written<'t>, Failure> {
        let whole = number.fract() == 0.0;
        if whole && number.abs() >= EXACT_MAX {
            // A script that puts such a number in another place means the number of the row.
            let mut spellings = self.given.large.iter().filter(|(before, _)| *before == number).map(|(_, text)| *text);
            if let Some(first) = spellings.next() {
                return match spellings.find(|other| *other != first) {
                    None => Ok(Written::Same(first)),
                    Some(other) => Err(said(format!(
                        "a number is {first} or {other}, which are one number in Lua; leave them in their fields"
                    ))),
                };
            }
        }
        Ok(Written::New(match number {
            number if !number.is_finite() => return Err(said(format!("JSON has no word for the number {number}"))),
            number if whole && number.abs() < EXACT_MAX => (number as i64).to_string(),
            number if whole && number.abs() < 1e21 => number.to_string(),
            number => format!("{number:?}"),
        }))
    }

    /// Items become text one by one: a handle of a Lua value is a slot of a stack that has an end.
    fn table(&mut self, table: &Table, place: Option<&'n Node<'t>>, depth: usize) -> Result<Written<'t>, Failure> {
        let mine = self.given.node(table);
        let was = mine.or(place);
        let length = table.raw_len();
        let (mut items, mut fields) = (Vec::new(), Vec::new());
        for pair in table.pairs::<Value, Value>() {
            match pair? {
                (Value::Integer(index), value) if (1..=length as i64).contains(&index) => {
                    let before = match was.map(|node| &node.value) {
                        Some(Parsed::List(before)) => before.get(index as usize - 1),
                        _ => None,
                    };
                    items.push((index, self.value(&value, before, depth + 1)?));
                }
                (Value::String(name), value) => {
                    self.budget.take(name.as_bytes().len())?;
                    let name = name.to_str().map_err(|_| said("a string is not UTF-8"))?;
                    let before = match was.map(|node| &node.value) {
                        Some(Parsed::Object(before)) => before.get_full(&*name),
                        _ => None,
                    };
                    let written = self.value(&value, before.map(|(_, _, node)| node), depth + 1)?;
                    let name = if before.is_some() { String::new() } else { name.to_owned() };
                    // Fields that were there before, in their order; then new ones by name.
                    fields.push((before.map_or(usize::MAX, |(index, ..)| index), name, written));
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
        let was_object = matches!(was.map(|node| &node.value), Some(Parsed::Object(_)));
        let is_object = !fields.is_empty() || items.is_empty() && (was_object || table.has_metatable());
        if is_object {
            fields.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
            Ok(object(&fields, was, mine.is_some()))
        } else {
            items.sort_by_key(|(index, _)| *index);
            Ok(list(&items, was))
        }
    }
}

fn list<'t>(items: &[(i64, Written<'t>)], was: Option<&Node<'t>>) -> Written<'t> {
    if let Some(Node { text, value: Parsed::List(before) }) = was
        && before.len() == items.len()
        && items.iter().zip(before).all(|((_, item), before)| item.is(before))
    {
        return Written::Same(text);
    }
    let mut out = String::from("[");
    for (index, (_, item)) in items.iter().enumerate() {
        out.push_str(if index > 0 { "," } else { "" });
        out.push_str(item.text());
    }
    out.push(']');
    Written::New(out)
}

/// An object. A field that was null is nil, and stays null unless the script has made a table of its own, with other fields.
/// `is_own`: it is the table that the script was given.
fn object<'t>(fields: &[(usize, String, Written<'t>)], was: Option<&Node<'t>>, is_own: bool) -> Written<'t> {
    let none = IndexMap::new();
    let before = if let Some(Node { value: Parsed::Object(before), .. }) = was { before } else { &none };
    let kept = fields.iter().take_while(|(index, ..)| *index < before.len()).count();
    let is_null = |index: usize| matches!(before[index].value, Parsed::Null);
    let values_before = (0..before.len()).filter(|index| !is_null(*index)).count();
    let values_kept = fields[..kept].iter().filter(|(index, ..)| !is_null(*index)).count();
    let has_all = values_kept == values_before;
    let unchanged = || kept == values_kept && fields[..kept].iter().all(|(index, _, field)| field.is(&before[*index]));
    if let Some(was) = was.filter(|_| has_all && kept == fields.len() && unchanged()) {
        return Written::Same(was.text);
    }
    let mut out = String::from("{");
    let mut add = |name: &str, text: &str| {
        out.push_str(if out.len() > 1 { "," } else { "" });
        quote(name, &mut out);
        out.push(':');
        out.push_str(text);
    };
    let mut rest = fields[..kept].iter().peekable();
    for (index, (name, before)) in before.iter().enumerate() {
        match rest.next_if(|(at, ..)| *at == index) {
            Some((_, _, field)) => add(name, field.text()),
            None if is_null(index) && (is_own || has_all) => add(name, before.text),
            None => {}
        }
    }
    fields[kept..].iter().for_each(|(_, name, field)| add(name, field.text()));
    out.push('}');
    Written::New(out)
}

fn quote(text: &str, out: &mut String) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What a row's text is after the body of a function of `row`.
    fn after(row: &str, body: &str) -> Result<String, String> {
        let lua = Lua::new();
        lua.globals().set("null", Value::NULL).unwrap();
        let node = Node::parse(row).expect("the test's row is JSON");
        serde_json::from_str::<serde_json::Value>(row).expect("and another parser says so too");
        let (given, table) = Given::new(&lua, &lua.create_table().unwrap(), &node).unwrap();
        let function = lua.load(format!("local row = ... {body}")).into_function().unwrap();
        let returned = function.call::<Value>(table).map_err(|error| error.to_string())?;
        let changed = given.changed(&Clock::new(Duration::MAX), &returned);
        let changed = changed.map_err(|failure: Failure| failure.into_error().to_string())?;
        Ok(changed.unwrap_or_else(|| row.to_owned()))
    }

    const ROW: &str = r#"{"z": 1.0, "a": [9007199254740993, null, 1e5, {"q": -0.0, "b": [null, {}]}], "n": null, "big": 18446744073709551617, "word": "gr\u00f6\u00dfe \"x\"", "none": [], "o": {} , "t":[[],[null]]}"#;

    #[test]
    fn a_row_that_comes_back_as_it_was_is_the_text_that_it_was() {
        for body in [
            "return row",
            "return table.clone(row)",
            "row.new = 1 row.new = nil return row",
            "local list = row.a row.a = nil row.a = list return row",
            "row.z, row.word = 1, 'größe \"x\"' return row",
            "row.o, row.none = {}, {} return row",
            "row.a = table.clone(row.a) row.a[4] = table.clone(row.a[4]) return row",
            "local sum = 0 for _, x in row.a do sum += 1 end assert(sum == 4 and row.a[2] == null) return row",
        ] {
            assert_eq!(after(ROW, body).as_deref(), Ok(ROW), "{body}");
        }
    }

    #[test]
    fn what_a_script_does_not_touch_keeps_its_text() {
        let row = r#"{"z": 1.0, "a": [9007199254740993, null, {"q": 1.50, "b": [null, {}]}], "n": null, "big": 18446744073709551617}"#;
        for (body, expected) in [
            (
                "row.new = true return row",
                r#"{"z":1.0,"a":[9007199254740993, null, {"q": 1.50, "b": [null, {}]}],"n":null,"big":18446744073709551617,"new":true}"#,
            ),
            // Items move, and are what they were; so is a table that another place gets.
            (
                "table.insert(row.a, 1, 'ä') return row",
                r#"{"z":1.0,"a":["ä",9007199254740993,null,{"q": 1.50, "b": [null, {}]}],"n":null,"big":18446744073709551617}"#,
            ),
            (
                "return { moved = row.a[3], a = row.big, n = 1 }",
                r#"{"a":18446744073709551617,"n":1,"moved":{"q": 1.50, "b": [null, {}]}}"#,
            ),
            (
                "row.a[3].b[1] = 2.5 return row",
                r#"{"z":1.0,"a":[9007199254740993,null,{"q":1.50,"b":[2.5,{}]}],"n":null,"big":18446744073709551617}"#,
            ),
            ("return { z = 2, x = null, y = 'a\\n' }", r#"{"z":2,"x":null,"y":"a\n"}"#),
            // A copy with all its fields keeps those that are null; a table of other fields is another.
            (
                "local t = table.clone(row) t.z = 1e300 return t",
                r#"{"z":1e300,"a":[9007199254740993, null, {"q": 1.50, "b": [null, {}]}],"n":null,"big":18446744073709551617}"#,
            ),
            ("return { a = row.a[3].b }", r#"{"a":[null, {}]}"#),
            ("row.z, row.a, row.big = nil return row", r#"{"n":null}"#),
        ] {
            assert_eq!(after(row, body).as_deref(), Ok(expected), "{body}");
        }
        let swapped = after(
            r#"{"l": [{"id": 1.0}, {"id": 2.0, "x": null}]}"#,
            "local l = row.l l[1], l[2] = l[2], l[1] return row",
        );
        assert_eq!(swapped.as_deref(), Ok(r#"{"l":[{"id": 2.0, "x": null},{"id": 1.0}]}"#));
        // Of two fields of one name the last is what there is.
        assert_eq!(
            after(r#"{"a":1,"b":2.0,"a":null}"#, "row.c = row.b return row").as_deref(),
            Ok(r#"{"a":null,"b":2.0,"c":2}"#)
        );
    }

    #[test]
    fn what_json_cannot_say_and_what_lua_cannot_tell_apart_is_refused() {
        let row = r#"{"a": 9007199254740993, "b": 9007199254740992, "c": 36028797018963969}"#;
        for (body, expected) in [
            ("return { x = row.a }", "a number is 9007199254740993 or 9007199254740992, which are one number in Lua"),
            ("row.x = 0/0 return row", "JSON has no word for the number NaN"),
            ("row.x = -1/0 return row", "JSON has no word for the number -inf"),
            ("row.x = function() end return row", "a function is no plain value"),
            ("row[1] = 2 return row", "a table has both a list's items and names"),
            ("row.x = '\\255' return row", "a string is not UTF-8"),
            ("row.x = row return row", "holds itself"),
            ("row.x = {1, nil, nil, 4} return row", "write homeroom.null for an item that is null"),
            ("return { x = {nil, 'é'} }", "write homeroom.null for an item that is null"),
        ] {
            let message = after(row, body).expect_err(body);
            assert!(message.contains(expected), "{body}: {message}");
        }
        // Where they are, each is itself.
        assert_eq!(
            after(row, "row.c, row.x = nil, row.c return row").as_deref(),
            Ok(r#"{"a":9007199254740993,"b":9007199254740992,"x":36028797018963969}"#)
        );
    }

    #[test]
    fn equal_values_have_one_canonical_text() {
        let canonical = |text: &str| {
            let mut out = String::new();
            Node::parse(text).unwrap().canonical(&mut out);
            out
        };
        for (a, b) in [
            (r#"{"b": [1, {"x": null}], "a": "\u00e4"}"#, r#"{"a":"ä","b":[1,{"x":null}]}"#),
            ("[1e2, 1.50]", "[100.0,1.5]"),
            (r#"{"a":1,"a":2}"#, r#"{"a":2}"#),
        ] {
            assert_eq!(canonical(a), canonical(b));
        }
        for (a, b) in [
            ("18446744073709551617", "18446744073709551616"),
            ("9007199254740993", "9007199254740992"),
            ("[]", "{}"),
            ("[null]", "[]"),
            (r#""1""#, "1"),
        ] {
            assert_ne!(canonical(a), canonical(b));
        }
    }
}
