//! What a script can call: the table `homeroom`, the datasets that it gives, and `params`.
//!
//! [`spec`] lists every function with its options. A call is checked against that list, runs here while the script's clock
//! stands still, and returns plain tables and texts; a failure begins with the script's file and line.

mod asked;
mod dataset;
mod difficulty;
mod evaluate;
mod forgetting;
mod generate;
mod handler;
mod identity;
mod imagined;
mod load;
mod methods;
mod mixtures;
mod model;
mod names;
mod options;
mod passages;
mod resumed;
mod row;
mod saved;
mod saved_rows;
mod session;
pub mod spec;
mod stored;
mod train;
mod value;

use std::rc::Rc;

use mlua::{LightUserData, Lua, Table, Value};
use serde_json::{Map, Value as Json};

use self::spec::VERBS;
use super::errors::{Failure, nearest, said, short};
use super::sandbox::{Prelude, Sandbox, name_of};

pub use self::identity::model_files;
pub use self::names::named_problem;
pub use self::session::Session;
pub use self::value::{to_json, to_lua, words};

/// Runs what is the script's own work: its time counts, and a script that is to end gets no further.
fn counted<T>(session: &Session, call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    session.clock.check()?;
    let _running = session.clock.resume();
    call()
}

/// Runs a verb: the clock stands still, and a script that is to end, or has printed too much, gets no further.
fn verb_call<T>(session: &Session, call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    session.clock.check()?;
    session.output.check()?;
    let _paused = session.clock.pause();
    call()
}

type Call = fn(&Lua, &Session, Value) -> Result<Value, Failure>;

const CALLS: [(&str, Call); 13] = [
    ("load_model", load::load_model),
    ("prepare_dataset", dataset::prepare_dataset),
    ("read_passages", passages::read_passages),
    ("dataset", saved_rows::dataset),
    ("save_dataset", saved_rows::save_dataset),
    ("interleave", mixtures::interleave),
    ("fine_tune", train::fine_tune),
    ("save_model", saved::save_model),
    ("load_fine_tuned_model", load::load_fine_tuned_model),
    ("create_handler", handler::create_handler),
    ("evaluate", evaluate::evaluate),
    ("forgetting", forgetting::forgetting),
    ("generate", generate::generate),
];

/// Luau's own tables that scripts see.
const LIBRARIES: [&str; 10] =
    ["bit32", "buffer", "coroutine", "debug", "math", "os", "string", "table", "utf8", "vector"];

/// Gives a sandbox `homeroom`, `params` and `print`.
///
/// # Errors
/// When memory is out.
pub fn provide(sandbox: &Sandbox, session: &Rc<Session>, params: &Map<String, Json>) -> mlua::Result<()> {
    let (lua, prelude) = (sandbox.lua(), sandbox.prelude());
    methods::provide(lua, prelude, session)?;
    let homeroom = lua.create_table()?;
    for (name, call) in CALLS {
        let session = session.clone();
        let function =
            prelude.function(lua, move |lua, argument, _| verb_call(&session, || call(lua, &session, argument)))?;
        homeroom.set(name, function)?;
    }
    let log = lua.create_table()?;
    for (name, mark) in [("info", ""), ("warn", "warning: ")] {
        let session = session.clone();
        let function = prelude.function(lua, move |_, text, fields| {
            counted(&session, || {
                let line = format!("{mark}{}{}", shown_text(&text), shown_fields(&session, &fields)?);
                Ok(session.output.print(&session.clock, &line)?)
            })
        })?;
        log.set(name, function)?;
    }
    strict(lua, prelude, &log, "homeroom.log", ["info", "warn"].map(str::to_owned).to_vec())?;
    homeroom.set("log", log)?;
    // What an item of a list that is null is in Lua: a nil would end the list.
    homeroom.set("null", Value::NULL)?;
    let null = lua.create_table()?;
    null.set("__type", "null")?;
    null.set("__tostring", prelude.function(lua, |_, _, _| Ok("null"))?)?;
    null.set("__metatable", "locked")?;
    null.set_readonly(true);
    lua.set_type_metatable::<LightUserData>(Some(null));
    let names = VERBS.iter().map(|verb| verb.name).chain(["log", "null"]).map(str::to_owned).collect();
    strict(lua, prelude, &homeroom, "homeroom", names)?;
    sandbox.provide("homeroom", homeroom)?;

    for (library, value) in LIBRARIES.iter().filter_map(|name| Some((*name, lua.globals().raw_get(*name).ok()?))) {
        let Value::Table(table) = value else { continue };
        let mut names = table.pairs::<String, Value>().map(|pair| Ok(pair?.0)).collect::<mlua::Result<Vec<_>>>()?;
        names.sort();
        strict(lua, prelude, &table, library, names)?;
    }

    let table = lua.create_table()?;
    for (name, value) in params {
        table.set(name.as_str(), to_lua(lua, value)?)?;
    }
    strict(lua, prelude, &table, "params", params.keys().cloned().collect())?;
    sandbox.provide("params", table)?;
    // stdout is the result; what a script prints is the story.
    let session = session.clone();
    let print =
        prelude.print(lua, move |line| counted(&session, || Ok(session.output.print(&session.clock, line)?)))?;
    sandbox.provide("print", print)
}

/// Has a table refuse names that it does not have. A name that is known and not set is nil.
fn strict(lua: &Lua, prelude: &Prelude, table: &Table, place: &'static str, names: Vec<String>) -> mlua::Result<()> {
    let meta = lua.create_table()?;
    let index = prelude.function(lua, move |_, _, key| {
        let key = name_of(&key);
        if names.contains(&key) {
            return Ok(Value::Nil);
        }
        let near = nearest(&key, names.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!(", did you mean `{near}`?"),
            None if names.is_empty() => "; it is empty".to_owned(),
            None => format!("; it has {}", names.join(", ")),
        };
        Err(said(format!("`{place}` has no `{}`{hint}", short(&key))))
    })?;
    meta.set("__index", index)?;
    meta.set("__metatable", "locked")?;
    meta.set_readonly(true);
    table.set_metatable(Some(meta))
}

/// A message of `log`, which is a text; of other values there is what can be said without asking them.
fn shown_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.to_string_lossy(),
        Value::Nil => "nil".to_owned(),
        other => name_of(other),
    }
}

fn shown_fields(session: &Session, fields: &Value) -> Result<String, Failure> {
    if fields.is_nil() {
        return Ok(String::new());
    }
    let json = to_json(&session.clock, fields).map_err(|failure| failure.within("log: fields"))?;
    let Some(fields) = json.as_object() else {
        return Err(said(format!("log: fields are a table of names, not {}", words(fields))));
    };
    Ok(fields
        .iter()
        .map(|(name, value)| match value {
            Json::String(text) => format!("   {name} {text}"),
            other => format!("   {name} {other}"),
        })
        .collect())
}
