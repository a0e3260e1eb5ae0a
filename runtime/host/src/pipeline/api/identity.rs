//! What a verb's inputs are, for the step store: models by the digests of their files, datasets by their rows, callbacks by what they
//! do and the values that they take from around them, everything else as it is.

use std::collections::{BTreeSet, HashSet};
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
use super::model::ModelSpec;
use super::options::Options;
use super::spec::{Kind, Verb};
use super::value::to_json;
use crate::pipeline::errors::Failure;
use crate::pipeline::store::{digest_of, digest_of_file};

/// Longest `homeroom.json`.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Most values that are looked at of what callbacks take from around them.
const VALUES_MAX: usize = 100_000;
/// Options that change nothing of a result.
const NO_INPUTS: [&str; 2] = ["save_steps", "save_minutes"];
/// What of `homeroom` a callback may name and still be a function of its report.
const HARMLESS: [&str; 2] = ["log", "null"];

/// The inputs of a call as JSON.
///
/// # Errors
/// When a model is not there, a file cannot be read, or the script is to end.
pub fn inputs(lua: &Lua, session: &Session, verb: &'static Verb, options: &Options) -> Result<Json, Failure> {
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
            (_, Value::Function(function)) => callback(lua, session, function)?,
            (_, value) => to_json(session.clock(), value)?,
        };
        inputs.insert(option.name.to_owned(), input);
    }
    Ok(Json::Object(inputs))
}

/// The digest of a strategy's file.
///
/// # Errors
/// When there is no such strategy, or its file cannot be read.
pub fn plugin(session: &Session, strategy: &str) -> Result<Json> {
    Ok(digest_of_file(&session.search.find(strategy)?.path)?.into())
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
        _ => None,
    };
    let adapter = adapter.map(|adapter| files(&adapter)).transpose()?;
    Ok(json!({"base": base, "adapter": adapter, "strategy": spec.strategy, "options": spec.options, "plugin": plugin}))
}

/// Digests of the files of a model or an adapter, by name; of what Homeroom wrote beside it, without the dates and places of its training.
fn files(path: &Path) -> Result<Json> {
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

/// What a callback is: its code, what it takes from around it, and the parameters that it reads; where that does not tell, the whole
/// script, its parameters and all that it has made so far as well.
///
/// # Errors
/// When the script is to end, or memory is out.
pub fn callback(lua: &Lua, session: &Session, function: &Function) -> Result<Json, Failure> {
    let mut walk = Walk { lua, session, seen: Vec::new(), left: VALUES_MAX, tells: true };
    let seen = walk.function(function)?;
    if walk.tells {
        return Ok(seen);
    }
    let scripts: Map<String, Json> =
        session.sources.texts().into_iter().map(|(name, text)| (name, digest_of(&text.into()).into())).collect();
    Ok(json!({"seen": seen, "scripts": scripts, "params": session.params, "before": *session.steps.borrow()}))
}

/// Looks at the values that a function takes from around it.
struct Walk<'a> {
    lua: &'a Lua,
    session: &'a Session,
    /// Functions and tables that are being looked at, or were.
    seen: Vec<*const c_void>,
    left: usize,
    /// Whether what was seen tells what the function does.
    tells: bool,
}

impl Walk<'_> {
    fn function(&mut self, function: &Function) -> Result<Json, Failure> {
        if let Some(known) = self.known(function.to_pointer()) {
            return Ok(known);
        }
        let Some(source) = self.session.sources.of(function) else { return Ok(self.opaque("function")) };
        let is_harmless = source.globals.iter().all(|name| name != "require" && name != "_G")
            && source
                .homeroom
                .as_ref()
                .is_some_and(|fields| fields.iter().all(|name| HARMLESS.contains(&name.as_str())));
        self.tells &= is_harmless;
        let mut captured = Vec::new();
        for number in 1..=source.captures {
            captured.push(self.value(&capture(self.lua, function, number)?)?);
        }
        let params: Map<String, Json> = match &source.params {
            Some(names) => self.params(names),
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

    fn opaque(&mut self, what: &str) -> Json {
        self.tells = false;
        json!({"opaque": what})
    }

    fn value(&mut self, value: &Value) -> Result<Json, Failure> {
        self.session.clock().check()?;
        if self.left == 0 {
            return Ok(self.opaque("more"));
        }
        self.left -= 1;
        Ok(match value {
            Value::Function(function) => {
                let info = function.info();
                // One of Luau's own does what its name says.
                match info.name.filter(|_| info.what == "C") {
                    Some(name) => json!({"own": name}),
                    None => self.function(function)?,
                }
            }
            Value::Table(table) => self.table(table)?,
            Value::UserData(data) => match data.borrow::<Dataset>() {
                Ok(data) => dataset(self.session, &data)?,
                Err(_) => self.opaque("object"),
            },
            Value::Number(number) if !number.is_finite() => json!({"number": number.to_string()}),
            Value::Nil => Json::Null,
            Value::Boolean(_) | Value::Integer(_) | Value::Number(_) => to_json(self.session.clock(), value)?,
            Value::String(text) => String::from_utf8_lossy(&text.as_bytes()).into(),
            Value::LightUserData(null) if null.0.is_null() => json!({"null": true}),
            other => self.opaque(other.type_name()),
        })
    }

    fn table(&mut self, table: &Table) -> Result<Json, Failure> {
        if let Some(known) = self.known(table.to_pointer()) {
            return Ok(known);
        }
        let mut pairs = Vec::new();
        for pair in table.pairs::<Value, Value>() {
            let (key, value) = pair?;
            pairs.push(json!([self.value(&key)?, self.value(&value)?]));
        }
        // A table has no order that lasts.
        pairs.sort_by_cached_key(Json::to_string);
        Ok(json!({"table": pairs}))
    }
}

/// A value that a function takes from around it, by its number from 1; nil if it has none of that number.
fn capture(lua: &Lua, function: &Function, number: u8) -> mlua::Result<Value> {
    // SAFETY: the closure gets a valid state with the function alone on the stack, which `lua_getupvalue` takes by its place; it pushes one
    // value and returns its name, or pushes nothing and returns null, and then nil is pushed. It calls no script's code, and
    // raises at most for memory, which mlua catches around the closure.
    unsafe {
        lua.exec_raw::<Value>(function, |state| {
            if ffi::lua_getupvalue(state, -1, i32::from(number)).is_null() {
                ffi::lua_pushnil(state);
            }
            ffi::lua_remove(state, -2);
        })
    }
}
