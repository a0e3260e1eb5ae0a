//! What a verb's inputs are, for the step store: models by the digests of their files, datasets by their rows, callbacks by what they
//! do and the values that they take from around them, everything else as it is.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::c_void;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::adapt::adapter::{HOMEROOM_FILE, is_adapter};
use homeroom_engine::files::gguf::shard_paths;
use homeroom_engine::files::{TEXT_FILES, named_templates, read_text, result_files};
use mlua::{Function, Lua, Table, Value, ffi};
use serde_json::{Map, Value as Json, json};

use super::Session;
use super::dataset::Dataset;
use super::model::{ModelSpec, manifest as manifest_of};
use super::options::Options;
use super::spec::{Kind, Verb};
use super::value::to_json;
use crate::pipeline::bytecode::{hex, writes_tables};
use crate::pipeline::errors::Failure;
use crate::pipeline::store::{digest_of, digest_of_file};

/// Longest `homeroom.json`.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Most values that are looked at of what callbacks take from around them.
const VALUES_MAX: usize = 100_000;
/// Options that change nothing of a result, unless the training was taken back to a checkpoint: such a one is not kept. Quantiles are
/// those of what `by_loss` measures, which is what is kept.
pub const NO_INPUTS: [&str; 3] = ["save_steps", "save_minutes", "quantiles"];
/// What of `homeroom` a callback may name and still be a function of its report.
const HARMLESS: [&str; 2] = ["log", "null"];
/// Globals that a callback may name: what they do depends on nothing but what they are given. `print` tells, and changes nothing.
const PURE: [&str; 27] = [
    "_VERSION",
    "assert",
    "bit32",
    "buffer",
    "error",
    "getmetatable",
    "ipairs",
    "next",
    "pairs",
    "pcall",
    "print",
    "rawequal",
    "rawget",
    "rawlen",
    "rawset",
    "select",
    "setmetatable",
    "string",
    "table",
    "tonumber",
    "tostring",
    "type",
    "typeof",
    "unpack",
    "utf8",
    "vector",
    "xpcall",
];
/// Functions of a library that have a state.
const IMPURE: [(&str, &str); 2] = [("math", "random"), ("math", "randomseed")];

/// The inputs of a call as JSON; and why they do not tell what comes of it, where a callback is such that they do not.
///
/// # Errors
/// When a model is not there, a file cannot be read, or the script is to end.
pub fn inputs(
    lua: &Lua,
    session: &Session,
    verb: &'static Verb,
    options: &Options,
) -> Result<(Json, Option<String>), Failure> {
    let mut why = None;
    let mut inputs = Map::new();
    let declared = options.text("key");
    for option in verb.all().filter(|option| !NO_INPUTS.contains(&option.name)) {
        let Some(value) = options.get(option.name) else { continue };
        let input = match (option.kind, value) {
            (Kind::Model, value) => model(session, &ModelSpec::read(session, value)?)?,
            (Kind::Dataset, value) => {
                let data = value.as_userdata().context("`read` saw that it is a dataset")?;
                dataset(session, &*data.borrow::<Dataset>()?)?
            }
            // They are what the script says they are.
            (_, Value::Function(_)) if declared.is_some() => continue,
            (_, Value::Function(function)) => {
                let (seen, untold) = callback(lua, session, function)?;
                why = why.or(untold.map(|untold| format!("`{}` {untold}", option.name)));
                seen
            }
            (_, value) => to_json(session.clock(), value)?,
        };
        inputs.insert(option.name.to_owned(), input);
    }
    Ok((Json::Object(inputs), why))
}

/// The digest of a strategy's file.
///
/// # Errors
/// When there is no such strategy, or its file cannot be read.
pub fn plugin(session: &Session, strategy: &str) -> Result<Json> {
    Ok(digest_of_file(&session.search.find(strategy)?.path)?.into())
}

/// The digests of the files of a model's base, without what was trained; null: it is not there.
///
/// # Errors
/// When a file cannot be read, or the script may not read there.
pub fn base(session: &Session, spec: &ModelSpec) -> Result<Json> {
    let place = session.locate(&spec.base)?.map(|place| files(&place.path));
    Ok(place.transpose()?.unwrap_or_default())
}

fn dataset(session: &Session, data: &Dataset) -> Result<Json, Failure> {
    Ok(data.identity(session.clock())?.into())
}

/// What a model is: the files of its base and of its adapter, and how it is to be trained. One that is to be stored otherwise than its
/// files have it depends on the plugin that says so.
fn model(session: &Session, spec: &ModelSpec) -> Result<Json> {
    let place = |name: &str| Ok::<_, anyhow::Error>(session.locate(name)?.map(|place| place.path));
    let adapter = spec.adapter.as_deref().map(place).transpose()?.flatten();
    // A trained whole model is a base of its own.
    let base = match &adapter {
        Some(adapter) if !is_adapter(adapter) => None,
        _ => place(&spec.base)?.map(|base| files(&base)).transpose()?,
    };
    if adapter.is_none() && (spec.adapter.is_some() || base.is_none()) {
        // Whoever needs it says so.
        return Ok(json!({"missing": [spec.base, spec.adapter]}));
    }
    let plugin = match (&spec.strategy, &adapter) {
        (Some(strategy), None) => Some(plugin(session, strategy)?),
        (_, Some(adapter)) => codec(session, adapter)?,
        _ => None,
    };
    let adapter = adapter.map(|adapter| files(&adapter)).transpose()?;
    Ok(json!({"base": base, "adapter": adapter, "strategy": spec.strategy, "options": spec.options, "plugin": plugin}))
}

/// The digest of the plugin by whose native codec the base of an adapter is stored, if it is. Where the plugin is not there, whoever loads
/// the adapter says so.
fn codec(session: &Session, adapter: &Path) -> Result<Option<Json>> {
    let Some(manifest) = manifest_of(adapter)? else { return Ok(None) };
    let is_stored_so = manifest.plan["stored_natively"].as_object().is_some_and(|stored| !stored.is_empty());
    Ok(Some(&manifest.strategy.name).filter(|_| is_stored_so).and_then(|strategy| plugin(session, strategy).ok()))
}

/// Digests of the files of a model or an adapter, by name; of what Homeroom wrote beside it, without the dates and places of its training.
///
/// # Errors
/// When a file cannot be read.
pub fn files(path: &Path) -> Result<Json> {
    let paths = model_files(path)?;
    let mut digests = Map::new();
    for file in paths {
        let name = file.strip_prefix(path).ok().filter(|name| !name.as_os_str().is_empty()).unwrap_or(&file);
        let is_manifest = file.file_name().is_some_and(|name| name == HOMEROOM_FILE);
        let digest = if is_manifest { manifest(&file)? } else { digest_of_file(&file)? };
        digests.insert(name.to_string_lossy().into_owned(), digest.into());
    }
    Ok(Json::Object(digests))
}

fn manifest(file: &Path) -> Result<String> {
    let mut manifest: Json = serde_json::from_str(&read_text(file, MANIFEST_BYTES_MAX)?)
        .with_context(|| format!("{}: damaged", file.display()))?;
    if let Some(fields) = manifest.as_object_mut() {
        fields.remove("training");
    }
    Ok(digest_of(&manifest))
}

/// The files that a model or an adapter is read from.
///
/// # Errors
/// When its directory cannot be listed.
pub fn model_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(shard_paths(path));
    }
    let known: HashSet<&str> = result_files().chain(TEXT_FILES).filter(|name| *name != "trainer_state.json").collect();
    let belongs = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        (is_weights || known.contains(&*name)) && path.is_file()
    };
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(belongs).collect();
    files.extend(named_templates(path)?.into_iter().map(|name| path.join(name)));
    files.sort();
    Ok(files)
}

/// What a callback is: its code, what it takes from around it, and the parameters that it reads; and why that does not tell what it does,
/// where it does not.
///
/// # Errors
/// When the script is to end, or memory is out.
pub fn callback(lua: &Lua, session: &Session, function: &Function) -> Result<(Json, Option<String>), Failure> {
    let own = own(lua)?;
    let params = lua.globals().get::<Table>("params")?.to_pointer();
    let mut walk = Walk {
        lua,
        session,
        own,
        params,
        seen: Vec::new(),
        left: VALUES_MAX,
        why: None,
        writes: false,
        takes_tables: false,
    };
    let seen = walk.function(function, true)?;
    if walk.writes && walk.takes_tables {
        walk.opaque("may change a table outside of it");
    }
    Ok((seen, walk.why))
}

/// Luau's own functions and tables, and those of `homeroom.log`, by what they are called: each does the same whenever it is called with the same.
/// The others are random, tell the time, or have a state.
fn own(lua: &Lua) -> mlua::Result<HashMap<*const c_void, (&'static str, String)>> {
    let globals = lua.globals();
    let mut own = HashMap::new();
    for name in PURE {
        match globals.get::<Value>(name)? {
            Value::Function(function) => {
                own.insert(function.to_pointer(), ("", name.to_owned()));
            }
            Value::Table(table) => {
                own.insert(table.to_pointer(), (name, String::new()));
            }
            _ => {}
        }
    }
    for library in PURE.into_iter().chain(["math"]) {
        let Value::Table(table) = globals.get::<Value>(library)? else { continue };
        for pair in table.pairs::<String, Value>() {
            if let (name, Value::Function(function)) = pair?
                && !IMPURE.contains(&(library, &*name))
            {
                own.insert(function.to_pointer(), (library, name));
            }
        }
    }
    let log: Table = globals.get::<Table>("homeroom")?.raw_get("log")?;
    own.insert(log.to_pointer(), ("log", String::new()));
    for pair in log.pairs::<String, Function>() {
        let (name, function) = pair?;
        own.insert(function.to_pointer(), ("log", name));
    }
    Ok(own)
}

/// Looks at the values that a function takes from around it.
struct Walk<'a> {
    lua: &'a Lua,
    session: &'a Session,
    /// See [`own`].
    own: HashMap<*const c_void, (&'static str, String)>,
    /// The table `params`.
    params: *const c_void,
    /// Functions and tables that are being looked at, or were.
    seen: Vec<*const c_void>,
    left: usize,
    /// Why what was seen does not tell what the function does, if it does not.
    why: Option<String>,
    /// Whether one of the functions may change a table that it did not make.
    writes: bool,
    /// Whether they take a table that can be changed.
    takes_tables: bool,
}

impl Walk<'_> {
    /// `is_callback`: it gets the report, in whose `state` it may write.
    fn function(&mut self, function: &Function, is_callback: bool) -> Result<Json, Failure> {
        if let Some(known) = self.known(function.to_pointer()) {
            return Ok(known);
        }
        let Some(source) = self.session.sources.of(function) else {
            return Ok(
                self.opaque("takes a function from around it whose code is not known, such as one of `homeroom`")
            );
        };
        if !source.is_alone {
            self.opaque("begins at a line with another function (give each a line of its own)");
        }
        if source.assigns {
            self.opaque("assigns to a variable outside of it");
        }
        if let Some(named) = source.globals.iter().find_map(|(name, fields)| unsure(name, fields.as_ref())) {
            self.opaque(&format!("uses `{named}`"));
        }
        self.writes |= if is_callback { source.writes_beside_state } else { source.writes };
        let mut captured = Vec::new();
        for number in 1..=source.captures {
            captured.push(self.value(&capture(self.lua, function, number)?)?);
        }
        let params: Map<String, Json> = match source.fields("params") {
            Some(names) => self.params(&names),
            None => self.session.params.clone(),
        };
        Ok(json!({"code": source.digest, "captured": captured, "params": params}))
    }

    fn params(&self, names: &BTreeSet<String>) -> Map<String, Json> {
        let params = self.session.params.iter().filter(|(name, _)| names.contains(*name));
        params.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// Says that something was met before, by when.
    fn known(&mut self, pointer: *const c_void) -> Option<Json> {
        let known = self.seen.iter().position(|seen| *seen == pointer);
        if known.is_none() {
            self.seen.push(pointer);
        }
        known.map(|index| json!({"again": index}))
    }

    fn opaque(&mut self, why: &str) -> Json {
        self.why.get_or_insert_with(|| why.to_owned());
        json!({"opaque": why})
    }

    fn value(&mut self, value: &Value) -> Result<Json, Failure> {
        self.session.clock().check()?;
        if self.left == 0 {
            return Ok(self.opaque("takes too many values from around it"));
        }
        self.left -= 1;
        if let Value::Function(_) | Value::Table(_) = value
            && let Some((library, name)) = self.own.get(&value.to_pointer())
        {
            self.writes |= writes_tables(library, name) || *library == "table" && name.is_empty();
            return Ok(json!({"own": [library, name]}));
        }
        Ok(match value {
            Value::Function(function) => self.function(function, false)?,
            Value::Table(table) => self.table(table)?,
            Value::UserData(data) => match data.borrow::<Dataset>() {
                Ok(data) => dataset(self.session, &data)?,
                Err(_) => self.opaque("takes an object from around it"),
            },
            Value::Nil => Json::Null,
            Value::Boolean(flag) => (*flag).into(),
            Value::Integer(number) => (*number).into(),
            // All bits, since 0 and -0 are two numbers.
            Value::Number(number) => json!({"number": number.to_bits()}),
            Value::String(text) => match text.to_str() {
                Ok(text) => Json::String(text.to_string()),
                Err(_) => json!({"bytes": hex(&text.as_bytes())}),
            },
            Value::LightUserData(null) if null.0.is_null() => json!({"null": true}),
            other => self.opaque(&format!("takes a {} from around it", other.type_name())),
        })
    }

    fn table(&mut self, table: &Table) -> Result<Json, Failure> {
        if let Some(known) = self.known(table.to_pointer()) {
            return Ok(known);
        }
        if table.to_pointer() == self.params {
            return Ok(json!({"params": self.session.params}));
        }
        if table.metatable().is_some() {
            return Ok(self.opaque("takes a table with a metatable from around it"));
        }
        self.takes_tables |= !table.is_readonly();
        let mut pairs = Vec::new();
        // In their order, since a function that walks them sees it.
        for pair in table.pairs::<Value, Value>() {
            let (key, value) = pair?;
            pairs.push(json!([self.value(&key)?, self.value(&value)?]));
        }
        Ok(json!({"table": pairs}))
    }
}

/// What of a global that a function names does not do the same whenever it is called with the same, if anything.
fn unsure(name: &str, fields: Option<&BTreeSet<String>>) -> Option<String> {
    let harmless = |field: &str| match name {
        "homeroom" => HARMLESS.contains(&field),
        "os" => field == "difftime",
        library => !IMPURE.contains(&(library, field)),
    };
    match (name, fields) {
        ("params", _) => None,
        ("homeroom" | "os" | "math", Some(fields)) => {
            fields.iter().find(|field| !harmless(field)).map(|field| format!("{name}.{field}"))
        }
        (name, _) if PURE.contains(&name) => None,
        _ => Some(name.to_owned()),
    }
}

/// A value that a function takes from around it, by its number from 1; nil if it has none of that number.
fn capture(lua: &Lua, function: &Function, number: u8) -> mlua::Result<Value> {
    // SAFETY: the closure gets a valid state with the function alone on the stack, which `lua_getupvalue` takes by its place; it pushes one
    // value and returns its name, or pushes nothing and returns null, and then nil is pushed. The name is only compared with null: scripts
    // are compiled at debug level 1, where names are stripped, and that of a value which is there is then "", never null. The two values
    // fit: mlua guarantees a closure 20 slots of the stack (LUA_MINSTACK). Nothing here allocates or calls a script's code, so nothing
    // is raised; if something were, mlua would catch it around the closure.
    unsafe {
        lua.exec_raw::<Value>(function, |state| {
            if ffi::lua_getupvalue(state, -1, i32::from(number)).is_null() {
                ffi::lua_pushnil(state);
            }
            ffi::lua_remove(state, -2);
        })
    }
}
