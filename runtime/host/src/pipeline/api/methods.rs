//! The methods of datasets: how a script picks, orders and rewrites rows.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::rc::Rc;

use anyhow::{Context, Result};
use homeroom_engine::data::check_row;
use homeroom_engine::data::order;
use homeroom_engine::data::report::personal::Redactor;
use mlua::{Function, IntoLuaMulti, Lua, MetaMethod, MultiValue, UserData, UserDataFields, UserDataMethods, Value};
use sha2::{Digest, Sha256};

use super::dataset::{Dataset, Row, Text, size_of_rows};
use super::options::Options;
use super::row::{Given, Node, to_lua};
use super::spec::{METHODS, verb};
use super::value::{to_json, words};
use super::{Session, counted, difficulty, mixtures};
use crate::data_report;
use crate::pipeline::errors::{Failure, here, message, nearest, raised, said, short};
use crate::pipeline::sandbox::{Prelude, name_of};
use crate::progress::thousands;

/// Most rows that a dataset holds.
pub(super) const ROWS_MAX: usize = 1 << 26;
/// Most parts that `bucket` makes.
const QUANTILES_MAX: usize = 1000;
/// Name in the registry of the table of a dataset's methods.
const METHODS_TABLE: &str = "homeroom.dataset";
/// Name in the registry of the function that refuses to set a field of a dataset.
const NO_FIELDS: &str = "homeroom.dataset.no_fields";

/// What is in a row.
pub(super) fn node(row: &Row) -> Node<'_> {
    Node::parse(row.text.json()).expect("rows were checked when they were read or made")
}

/// What a script says of each row, one after the other, as JSON: a function's answer, or a field's value. `name`: the method and its option,
/// for messages.
pub(super) fn keys(
    data: &Dataset,
    lua: &Lua,
    session: &Session,
    name: &str,
    by: &Value,
    mut each: impl FnMut(&Row, Key) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if let Some(function) = by.as_function() {
        for row in data.rows() {
            session.clock().check()?;
            let answer = call(session, function, row, to_lua(lua, &node(row))?)?;
            let answer = answer.ok_or_else(|| silent(function, row, name, "return the key"))?;
            let key = to_json(session.clock(), &answer)
                .map_err(|failure| failure.within(&format!("{name}: {}", row.place())))?;
            each(row, Key { number: key.as_f64(), text: key.to_string() })?;
        }
        return Ok(());
    }
    let field = by.as_string().map(|field| field.to_string_lossy()).unwrap_or_default();
    let mut found = false;
    for row in data.rows() {
        session.clock().check()?;
        found = node(row).get(&field).is_some();
        if found {
            break;
        }
    }
    if let Some(first) = data.rows().first().filter(|_| !found) {
        return Err(said(no_field(name, &field, &node(first))));
    }
    for row in data.rows() {
        session.clock().check()?;
        let node = node(row);
        let value = node.get(&field);
        let mut text = String::new();
        match value {
            Some(value) => value.canonical(&mut text),
            None => text.push_str("null"),
        }
        each(row, Key { number: value.and_then(Node::number), text })?;
    }
    Ok(())
}

/// What rows are compared by.
pub(super) struct Key {
    pub(super) number: Option<f64>,
    text: String,
}

impl Key {
    /// The number, or why there is none. `name` as of [`keys`].
    pub(super) fn needed(&self, name: &str, row: &Row) -> Result<f64, Failure> {
        let none = || said(format!("{name} gives {}, not a number (row: {})", short(&self.text), row.place()));
        self.number.ok_or_else(none)
    }
}

/// Says that no row has a field: each would be null, and all of them alike.
fn no_field(name: &str, field: &str, first: &Node) -> String {
    let hint = match nearest(field, first.names()) {
        Some(near) => format!(", did you mean `{near}`?"),
        None => format!("; the first row has {}", first.names().take(8).map(short).collect::<Vec<_>>().join(", ")),
    };
    format!("{name}: no row has a field `{}`{hint}", short(field))
}

/// Calls a script's function with a row; `None`: it returned nothing, not even nil. An error in it names the row.
fn call(session: &Session, function: &Function, row: &Row, given: Value) -> Result<Option<Value>, Failure> {
    let answer = function.call::<MultiValue>(given).map_err(|error| {
        let message = message(&error);
        // A script that is ended has no row at fault, and within a method that is called for a row the inner row is.
        if session.clock().check().is_err() || message.contains(" (row: ") {
            return Failure::Lua(error);
        }
        Failure::Lua(mlua::Error::runtime(format!("{message} (row: {})", row.place())))
    });
    Ok(answer?.into_iter().next())
}

/// Says that a function returned nothing: a `return` was forgotten.
fn silent(function: &Function, row: &Row, name: &str, next: &str) -> Failure {
    raised(function, format!("{name}: the function returned nothing; {next} (row: {})", row.place()))
}

fn function(name: &str, value: Value) -> Result<Function, Failure> {
    match value {
        Value::Function(function) => Ok(function),
        other => Err(said(format!("{name}: it takes a function from a row, not {}", words(&other)))),
    }
}

pub(super) type Method = fn(&Lua, &Session, &Dataset, Value) -> Result<MultiValue, Failure>;

pub(super) fn one(lua: &Lua, value: impl mlua::IntoLua) -> Result<MultiValue, Failure> {
    Ok(value.into_lua(lua)?.into_lua_multi(lua)?)
}

fn filter(lua: &Lua, session: &Session, data: &Dataset, keeps: Value) -> Result<MultiValue, Failure> {
    let keeps = function("filter", keeps)?;
    let mut kept = Vec::new();
    for (index, row) in data.rows().iter().enumerate() {
        match call(session, &keeps, row, to_lua(lua, &node(row))?)? {
            Some(Value::Boolean(true)) => kept.push(index),
            Some(Value::Boolean(false) | Value::Nil) => {}
            Some(other) => {
                let (other, place) = (words(&other), row.place());
                let message = format!("filter: the function returned {other}, not true or false (row: {place})");
                return Err(raised(&keeps, message));
            }
            None => return Err(silent(&keeps, row, "filter", "return true or false")),
        }
    }
    if kept.is_empty() && data.len() > 0 {
        let note = format!("warning: {}filter keeps none of {} rows", here(lua), thousands(data.len()));
        session.output.print(session.clock(), &note)?;
    }
    one(lua, data.pick(lua, session, &kept)?)
}

/// What the function of `map` returned of a row.
enum Returned {
    Row(Value),
    Rows(mlua::Table),
}

fn map(lua: &Lua, session: &Session, data: &Dataset, change: Value) -> Result<MultiValue, Failure> {
    let change = function("map", change)?;
    let mut held = session.hold(lua, size_of_rows(data.len()))?;
    let kept = lua.create_table()?;
    let mut rows = Vec::new();
    let mut is_silent = true;
    for row in data.rows() {
        let node = node(row);
        let (given, table) = Given::new(lua, &kept, &node)?;
        let answer = call(session, &change, row, table)?;
        is_silent &= answer.is_none();
        let returned = match answer {
            None | Some(Value::Nil) => continue,
            // A row is no list, so a list is one of rows.
            Some(Value::Table(table)) if table.raw_len() > 0 => Returned::Rows(table),
            Some(value @ Value::Table(_)) => Returned::Row(value),
            Some(other) => {
                let (other, place) = (words(&other), row.place());
                let message =
                    format!("map: the function returned {other}, not a row, a list of rows or nil (row: {place})");
                return Err(raised(&change, message));
            }
        };
        let mut add = |value: &Value, which: &str| {
            let changed = given.changed(session.clock(), value);
            let Some(text) = changed.map_err(|failure| failure.within(&format!("map: {}", row.place())))? else {
                rows.push(row.clone());
                return Ok(());
            };
            if let Err(problem) = check_row(&text) {
                let message = format!("map: {which} is refused: {problem} (row: {})", row.place());
                return Err(raised(&change, message));
            }
            rows.push(Row { text: Text::hold(lua, session, text)?, ..row.clone() });
            Ok(())
        };
        match returned {
            Returned::Row(value) => add(&value, "the new row")?,
            Returned::Rows(table) => {
                for index in 1..=table.raw_len() {
                    let value = table.raw_get::<Value>(index)?;
                    if !value.is_table() {
                        let (value, place) = (words(&value), row.place());
                        let message = format!("map: item {index} of the list is {value}, not a row (row: {place})");
                        return Err(raised(&change, message));
                    }
                    add(&value, &format!("row {index} of the list"))?;
                }
            }
        }
        if rows.len() > ROWS_MAX {
            return Err(said(format!("map: more than {ROWS_MAX} rows are too many for one dataset")));
        }
    }
    // Lists of rows may have made them more.
    if rows.len() > data.len() {
        held = session.hold(lua, size_of_rows(rows.len()))?;
    }
    // One that returns rows and sometimes nothing leaves rows out.
    if let Some(first) = data.rows().first().filter(|_| is_silent) {
        return Err(silent(&change, first, "map", "return the row, or nil to leave it out"));
    }
    one(lua, data.of(rows, held))
}

fn split(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("split"), options)?;
    let (train, eval) = data.split(lua, session, options.number("eval").unwrap_or_default(), options.seed())?;
    Ok((train, eval).into_lua_multi(lua)?)
}

fn bucket(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("bucket"), options)?;
    let quantiles = quantiles("bucket", &options)?;
    let mut numbers = Vec::with_capacity(data.len());
    keys(data, lua, session, "bucket: `by`", options.get("by").unwrap_or(&Value::Nil), |row, key| {
        numbers.push(key.needed("bucket: `by`", row)?);
        Ok(())
    })?;
    one(lua, parted(lua, session, data, &ascending(&numbers), &quantiles)?)
}

/// Places of rows by their numbers, the smallest first; rows of equal numbers stay in order.
pub(super) fn ascending(numbers: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|a, b| numbers[*a].partial_cmp(&numbers[*b]).unwrap_or(Ordering::Equal));
    order
}

/// The quantiles that a call gives.
///
/// # Errors
/// When they do not ascend, or are too many.
pub(super) fn quantiles(name: &str, options: &Options) -> Result<Vec<f64>, Failure> {
    let quantiles = options.numbers("quantiles");
    if !quantiles.is_sorted_by(|a, b| a < b) {
        return Err(said(format!("{name}: `quantiles` should ascend")));
    }
    if quantiles.len() > QUANTILES_MAX {
        return Err(said(format!("{name}: {} `quantiles` are more than {QUANTILES_MAX}", quantiles.len())));
    }
    Ok(quantiles)
}

/// A list of datasets: the rows in this order, split at quantiles.
pub(super) fn parted(
    lua: &Lua,
    session: &Session,
    data: &Dataset,
    order: &[usize],
    quantiles: &[f64],
) -> Result<mlua::Table, Failure> {
    let table = lua.create_table()?;
    let ends = quantiles.iter().map(|quantile| (quantile * order.len() as f64).round() as usize);
    let mut first = 0;
    for end in ends.chain([order.len()]) {
        table.raw_push(data.pick(lua, session, &order[first..end])?)?;
        first = end;
    }
    Ok(table)
}

fn sample(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("sample"), options)?;
    let count = options.whole("n").unwrap_or_default() as usize;
    let replace = options.flag("replace").unwrap_or(false);
    let by = options.get("weights");
    if by.is_none() && !replace || data.len() == 0 {
        return one(lua, data.pick(lua, session, &order::sample(data.len(), count, options.seed()))?);
    }
    if replace && count > ROWS_MAX {
        return Err(said(format!("sample: {count} rows are too many for one dataset")));
    }
    let mut weights = Vec::with_capacity(data.len());
    match by {
        None => weights.resize(data.len(), 1.0),
        Some(by) => keys(data, lua, session, "sample: `weights`", by, |row, key| {
            let weight = key.needed("sample: `weights`", row)?;
            if weight < 0.0 {
                return Err(said(format!("sample: `weights` gives {weight}, which is below 0 (row: {})", row.place())));
            }
            weights.push(weight);
            Ok(())
        })?,
    }
    let drawn = order::weighted_sample(&weights, count, options.seed(), replace);
    one(lua, data.pick(lua, session, &drawn.map_err(|error| said(format!("sample: {error}")))?)?)
}

fn shuffle(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("shuffle"), options)?;
    one(lua, data.pick(lua, session, &order::shuffled(data.len(), options.seed()))?)
}

fn concat(lua: &Lua, session: &Session, data: &Dataset, other: Value) -> Result<MultiValue, Failure> {
    let wrong = || said(format!("concat: it takes a dataset, not {}", words(&other)));
    let other = other.as_userdata().ok_or_else(wrong)?.borrow::<Dataset>().map_err(|_| wrong())?;
    let count = data.len() + other.len();
    if count > ROWS_MAX {
        return Err(said(format!("concat: {count} rows are too many for one dataset")));
    }
    let held = session.hold(lua, size_of_rows(count))?;
    one(lua, data.of(data.rows().iter().chain(other.rows()).cloned().collect(), held))
}

fn dedupe(lua: &Lua, session: &Session, data: &Dataset, options: Value) -> Result<MultiValue, Failure> {
    let options = Options::read(verb("dedupe"), options)?;
    // Digests instead of texts: what is compared may be as large as all rows.
    let mut seen = HashSet::new();
    let mut is_new = |text: &str| seen.insert(<[u8; 32]>::from(Sha256::digest(text)));
    let mut kept = Vec::new();
    match options.get("by") {
        Some(by) => {
            let mut index = 0;
            keys(data, lua, session, "dedupe: `by`", by, |row, key| {
                // Rows without a key are not equal to each other, and which of them are to stay is not for us to say.
                if key.text == "null" {
                    let next = "filter such rows out first, or give a function that returns a key for each";
                    return Err(said(format!("dedupe: `by` gives no key; {next} (row: {})", row.place())));
                }
                kept.extend(is_new(&key.text).then_some(index));
                index += 1;
                Ok(())
            })?;
        }
        None => {
            let mut text = String::new();
            for (index, row) in data.rows().iter().enumerate() {
                session.clock().check()?;
                text.clear();
                node(row).canonical(&mut text);
                kept.extend(is_new(&text).then_some(index));
            }
        }
    }
    one(lua, data.pick(lua, session, &kept)?)
}

fn rename(lua: &Lua, session: &Session, data: &Dataset, names: Value) -> Result<MultiValue, Failure> {
    let wrong =
        || said("rename: it takes a table from a field's name to its new name, such as { topic = \"subject\" }");
    let json = to_json(session.clock(), &names).map_err(|failure| failure.within("rename"))?;
    let named = json.as_object().filter(|named| !named.is_empty()).ok_or_else(wrong)?;
    let named: Vec<(&str, &str)> = named
        .iter()
        .map(|(from, to)| Ok((from.as_str(), to.as_str().filter(|to| !to.is_empty()).ok_or_else(wrong)?)))
        .collect::<Result<_, Failure>>()?;
    let mut found = vec![false; named.len()];
    let mut rows = Vec::with_capacity(data.len());
    let held = session.hold(lua, size_of_rows(data.len()))?;
    for row in data.rows() {
        session.clock().check()?;
        let node = node(row);
        for ((from, _), found) in named.iter().zip(&mut found) {
            *found |= node.get(from).is_some();
        }
        let renamed = node.renamed(&named).map_err(|name| {
            said(format!("rename: the row would have two fields `{}` (row: {})", short(&name), row.place()))
        })?;
        let Some(text) = renamed else {
            rows.push(row.clone());
            continue;
        };
        if let Err(problem) = check_row(&text) {
            return Err(said(format!("rename: the new row is refused: {problem} (row: {})", row.place())));
        }
        rows.push(Row { text: Text::hold(lua, session, text)?, ..row.clone() });
    }
    if let (Some(first), Some(at)) = (data.rows().first(), found.iter().position(|found| !found)) {
        return Err(said(no_field("rename", named[at].0, &node(first))));
    }
    one(lua, data.of(rows, held))
}

fn redact(lua: &Lua, session: &Session, data: &Dataset, _: Value) -> Result<MultiValue, Failure> {
    let held = session.hold(lua, size_of_rows(data.len()))?;
    let mut redactor = Redactor::default();
    let mut rows = Vec::with_capacity(data.len());
    for row in data.rows() {
        session.clock().check()?;
        let content = serde_json::from_str(row.text.json()).context("rows were checked when they were read or made")?;
        rows.push(match redactor.row(&content) {
            Some(redacted) => Row { text: Text::hold(lua, session, redacted.to_string())?, ..row.clone() },
            None => row.clone(),
        });
    }
    session.tell(format_args!("redacted  {}", data_report::redacted(redactor.counts())));
    one(lua, data.of(rows, held))
}

fn len(lua: &Lua, _: &Session, data: &Dataset, _: Value) -> Result<MultiValue, Failure> {
    one(lua, data.len())
}

fn rows(lua: &Lua, session: &Session, data: &Dataset, _: Value) -> Result<MultiValue, Failure> {
    let table = lua.create_table_with_capacity(data.len(), 0)?;
    for row in data.rows() {
        session.clock().check()?;
        table.raw_push(to_lua(lua, &node(row))?)?;
    }
    one(lua, table)
}

const CALLS: [(&str, Method); 15] = [
    ("filter", filter),
    ("map", map),
    ("rename", rename),
    ("split", split),
    ("bucket", bucket),
    ("by_length", difficulty::by_length),
    ("by_loss", difficulty::by_loss),
    ("sample", sample),
    ("concat", concat),
    ("replay", mixtures::replay),
    ("shuffle", shuffle),
    ("dedupe", dedupe),
    ("redact", redact),
    ("len", len),
    ("rows", rows),
];

impl UserData for Dataset {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        fields.add_meta_field_with(MetaMethod::Index.name(), |lua| {
            lua.named_registry_value::<mlua::Table>(METHODS_TABLE)
        });
        fields.add_meta_field_with(MetaMethod::NewIndex.name(), |lua| lua.named_registry_value::<Function>(NO_FIELDS));
        // What Lua's own messages call it.
        fields.add_meta_field(MetaMethod::Type.name(), "dataset");
    }

    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_meta_method(MetaMethod::Len, |_, data, ()| Ok(data.len()));
        methods.add_meta_method(MetaMethod::ToString, |_, data, ()| Ok(format!("dataset of {} rows", data.len())));
    }
}

/// Gives the datasets of a machine their methods.
///
/// # Errors
/// When memory is out.
pub fn provide(lua: &Lua, prelude: &Prelude, session: &Rc<Session>) -> mlua::Result<()> {
    let methods = lua.create_table()?;
    for (name, method) in CALLS {
        let session = session.clone();
        let function = prelude.function(lua, move |lua, data, argument| {
            counted(&session, || {
                let wrong = || said(format!("{name}: it is called as `dataset:{name}(…)`"));
                let data = data.as_userdata().ok_or_else(wrong)?.borrow::<Dataset>().map_err(|_| wrong())?;
                method(lua, &session, &data, argument)
            })
        })?;
        methods.set(name, function)?;
    }
    let unknown = prelude.function(lua, |_, _, name| -> Result<(), Failure> {
        let name = name_of(&name);
        let near = nearest(&name, METHODS.iter().map(|method| method.name));
        let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
        Err(said(format!("a dataset has no `{}`{near}", short(&name))))
    })?;
    let no_fields = prelude.function(lua, |_, _, name| -> Result<(), Failure> {
        let name = short(&name_of(&name));
        Err(said(format!("a dataset has no field `{name}` to set; its methods give new datasets")))
    })?;
    lua.set_named_registry_value(NO_FIELDS, no_fields)?;
    let strict = lua.create_table()?;
    strict.set("__index", unknown)?;
    strict.set("__metatable", "locked")?;
    strict.set_readonly(true);
    methods.set_metatable(Some(strict))?;
    methods.set_readonly(true);
    lua.set_named_registry_value(METHODS_TABLE, methods)
}
