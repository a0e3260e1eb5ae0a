//! The TOML file that declares a pipeline: its script, and the parameters that the script reads as `params`.
//!
//! All problems of a file and of `--set` are told together.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use homeroom_abi::describe::nearest;
use homeroom_engine::data::Columns;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text};
use serde_json::{Map, Value};
use toml_edit::{Document, Item, TableLike};

use crate::hub::HubName;
use crate::models::Network;
use crate::plugin::Policy;
use crate::registry;
use crate::toml_problems::{NotToml, Problems, document, near};

/// Keys of `[pipeline]`, each with what it does.
pub const PIPELINE_KEYS: [(&str, &str); 4] = [
    ("script", "the Lua script; a path relative to this file"),
    (
        "offline",
        "`true`: nothing is downloaded, and a model of the hub has to be in Hugging Face's cache; default `false`",
    ),
    (
        "lua_seconds",
        "seconds that the script's own Lua and its work on datasets may take; loading, training and answering do not count; default 60",
    ),
    ("params", "the parameters, see below"),
];

/// Keys of `[plugins]`, each with what it does.
pub const PLUGINS_KEYS: [(&str, &str); 1] = [(
    "policy",
    "`locked`: only strategies that lie beside the program or are in `plugins.lock`, even if the user's policy allows others",
)];

/// Keys of a parameter's declaration, each with what it does.
pub const PARAM_KEYS: [(&str, &str); 7] = [
    (
        "type",
        "`string`, `int`, `float`, `bool`, `path`, `model` (a path, the name of a model, or `owner/name` on the Hugging Face hub), `handler` (a name of `handlers.toml` in the user's data directory) or `table` (names with texts, as the `columns` of a dataset; `--set columns=prompt=Frage,completion=Antwort`, which takes those names alone)",
    ),
    ("default", "the value if `--set` gives none"),
    ("required", "`true`: `--set` has to give the value, and there is no default"),
    ("min", "the smallest number, or the fewest characters of a string"),
    ("max", "the largest number, or the most characters of a string"),
    ("one_of", "a list of the values that are allowed"),
    ("doc", "one line that says what setting it does"),
];

/// Time that a script's own Lua may take.
const LUA_SECONDS: f64 = 60.0;

/// A pipeline as it will be run.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineConfig {
    /// The file that declares it.
    pub path: PathBuf,
    /// Its script.
    pub script: PathBuf,
    /// Time that the script's own Lua may take.
    pub lua_time: Duration,
    /// Whether nothing is downloaded for it.
    pub offline: bool,
    /// The policy that the file asks for: `locked`, or nothing.
    pub plugin_policy: Option<Policy>,
    /// All parameters by name, in the order of the file. One that is neither set nor has a default is null.
    pub params: Map<String, Value>,
    /// Where each parameter's value is from, for messages: `FILE:LINE: parameter `NAME``, or `--set`.
    places: BTreeMap<String, String>,
    /// Parameters of type `path` and `model`, and what they name: what the script may read, wherever it is.
    pub named: Vec<(String, PathBuf)>,
    /// Parameters of type `model` that name one of the hub, which the user sees in the file or typed: only these are downloaded.
    pub hub_models: Vec<(String, HubName)>,
    /// What parameters of type `handler` name: a script may ask these handlers and routes where an endpoint of this machine answers.
    pub handlers: Vec<String>,
    /// Those of them that the user typed: they may send away what the script says, if the user's own file allows it.
    pub typed_handlers: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    String,
    Int,
    Float,
    Bool,
    Path,
    Model,
    Handler,
    /// A table of texts.
    Table,
}

const TYPES: [(&str, Type); 8] = [
    ("string", Type::String),
    ("int", Type::Int),
    ("float", Type::Float),
    ("bool", Type::Bool),
    ("path", Type::Path),
    ("model", Type::Model),
    ("handler", Type::Handler),
    ("table", Type::Table),
];

/// What becomes of a required parameter that is not set.
#[derive(Clone, Copy, PartialEq)]
enum Unset {
    /// It is a problem.
    Refused,
    /// It is null.
    Null,
}

/// One declared parameter.
struct Param {
    name: String,
    kind: Type,
    default: Option<Value>,
    required: bool,
    min: Option<f64>,
    max: Option<f64>,
    one_of: Option<Vec<Value>>,
    doc: Option<String>,
    /// Bytes of its name in the file.
    key: Option<Range<usize>>,
}

/// What a file declares of a parameter, for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// The word for its type.
    pub kind: &'static str,
    /// Its default, or `required`; empty if it has neither.
    pub default: String,
    /// The values that it may have, if they are bounded.
    pub range: String,
    /// What setting it does.
    pub doc: String,
}

impl PipelineConfig {
    /// Reads a file, and sets parameters from `--set`. Paths in the file are relative to it, paths in `--set` to where the
    /// user is.
    ///
    /// # Errors
    /// All problems of both in one message.
    pub fn read(path: &Path, set: &[(String, String)]) -> Result<Self> {
        let (config, problems) = Self::parse(path, set, Unset::Refused)?;
        problems?;
        Ok(config.expect("a file without problems is a configuration"))
    }

    /// Reads a file for a check: a required parameter that is not set is null, and beside the problems there is what could be read.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn look(path: &Path, set: &[(String, String)]) -> Result<(Option<Self>, Result<()>)> {
        Self::parse(path, set, Unset::Null)
    }

    fn parse(path: &Path, set: &[(String, String)], unset: Unset) -> Result<(Option<Self>, Result<()>)> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        let mut problems = Problems::new(path, &text);
        let base = std::path::absolute(path)?.parent().context("a file has a directory")?.to_owned();
        let config = match document(&text) {
            Ok(document) => read_document(&document, &text, path, &base, (set, unset), &mut problems),
            Err(NotToml { span, message }) => {
                problems.not_toml(span, &message);
                None
            }
        };
        Ok((config, problems.into_result()))
    }

    /// What a file declares of its parameters, in its order; problems of it are left to a run.
    ///
    /// # Errors
    /// When the file cannot be read, or is not TOML.
    pub fn declared(path: &Path) -> Result<Vec<Declared>> {
        let text = read_text(path, SMALL_FILE_BYTES_MAX)?;
        let mut problems = Problems::new(path, &text);
        let document = document(&text).map_err(|error| anyhow!("{}: {}", path.display(), error.message))?;
        let params = document.get("pipeline").and_then(|pipeline| pipeline.get("params")).and_then(Item::as_table_like);
        let params = params.into_iter().flat_map(|params| params.iter());
        Ok(params.filter_map(|(name, item)| Some(read_param(name, None, item, &mut problems)?.declared())).collect())
    }

    /// Where a parameter's value is from, for messages.
    pub fn place<'a>(&'a self, param: &'a str) -> &'a str {
        self.places.get(param).map_or(param, String::as_str)
    }

    /// What may be downloaded for it, where `network` says what its user allows.
    pub fn network(&self, network: Network) -> Network {
        if self.offline { Network::Never("its TOML file says `offline = true`") } else { network }
    }
}

fn read_document(
    document: &Document<&str>,
    text: &str,
    path: &Path,
    base: &Path,
    (set, unset): (&[(String, String)], Unset),
    problems: &mut Problems,
) -> Option<PipelineConfig> {
    if let Some(what) = other_kind(document.as_table()) {
        problems.at(None, format!("it declares no pipeline: {what}"));
        return None;
    }
    unknown_keys(document.as_table(), &["pipeline", "plugins"], problems);
    let plugin_policy = document.get("plugins").and_then(|item| read_policy(item, problems));
    let Some(item) = document.get("pipeline") else {
        problems.at(None, "there is no [pipeline]; it needs one with `script`");
        return None;
    };
    let Some(pipeline) = item.as_table_like() else {
        problems.at(item.span(), "`pipeline` is a table: [pipeline]");
        return None;
    };
    unknown_keys(pipeline, &PIPELINE_KEYS.map(|(key, _)| key), problems);
    let script = read_script(pipeline, item, base, problems);
    let lua_seconds = match pipeline.get("lua_seconds") {
        None => LUA_SECONDS,
        Some(value) => match number(value).filter(|seconds| *seconds > 0.0 && *seconds <= 1e6) {
            Some(seconds) => seconds,
            None => {
                problems.at(value.span(), "`lua_seconds`: it should be a number of seconds above 0");
                LUA_SECONDS
            }
        },
    };
    let offline = match pipeline.get("offline").map(|item| (item, item.as_bool())) {
        None => false,
        Some((_, Some(offline))) => offline,
        Some((item, None)) => {
            problems.at(item.span(), "`offline`: it should be true or false");
            true
        }
    };
    let mut declared = Vec::new();
    let mut broken = Vec::new();
    match pipeline.get("params").map(|item| (item, item.as_table_like())) {
        None => {}
        Some((item, None)) => problems.at(item.span(), "`params` is a table: [pipeline.params]"),
        Some((_, Some(params))) => {
            for (name, item) in params.iter() {
                let key = params.key(name).and_then(toml_edit::Key::span);
                match read_param(name, key, item, problems) {
                    Some(param) => declared.push(param),
                    None => broken.push(name.to_owned()),
                }
            }
        }
    }
    let mut params = values(&declared, &broken, base, (set, unset), problems);
    // They are declared all the same.
    params.extend(broken.into_iter().map(|name| (name, Value::Null)));
    let place = |param: &Param| {
        let name = &param.name;
        if set.iter().any(|(set, _)| set == name) {
            return (name.clone(), format!("--set {name}"));
        }
        let line = param.key.as_ref().map_or(1, |key| text[..key.start].matches('\n').count() + 1);
        (name.clone(), format!("{}:{line}: parameter `{name}`", path.display()))
    };
    let places = declared.iter().map(place).collect();
    let lua_time = Duration::from_secs_f64(lua_seconds);
    let is_path = |param: &&Param| matches!(param.kind, Type::Path | Type::Model);
    let place = |param: &Param| Some((param.name.clone(), PathBuf::from(params[&param.name].as_str()?)));
    let named = declared.iter().filter(is_path).filter_map(place).collect();
    let here = std::env::current_dir().unwrap_or_default();
    let hub_name = |param: &Param| {
        let base = if set.iter().any(|(name, _)| *name == param.name) { &here } else { base };
        let name = HubName::parse(params[&param.name].as_str()?)?;
        // Where its first part is a directory, it is a path that is wrong.
        let is_path = name.repo.split('/').next().is_some_and(|owner| base.join(owner).is_dir());
        (!is_path).then(|| (param.name.clone(), name))
    };
    let hub_models = declared.iter().filter(|param| param.kind == Type::Model).filter_map(hub_name).collect();
    let is_typed = |param: &Param| set.iter().any(|(name, _)| *name == param.name);
    let named_by = |is_meant: &dyn Fn(&Param) -> bool| {
        let meant = declared.iter().filter(|param| param.kind == Type::Handler && is_meant(param));
        meant.filter_map(|param| Some(params[&param.name].as_str()?.to_owned())).collect::<Vec<String>>()
    };
    let (handlers, typed_handlers) = (named_by(&|_| true), named_by(&is_typed));
    let (path, script) = (path.to_owned(), script?);
    Some(PipelineConfig {
        path,
        script,
        lua_time,
        offline,
        plugin_policy,
        params,
        places,
        named,
        hub_models,
        handlers,
        typed_handlers,
    })
}

/// What a TOML file without a pipeline is for, if that can be told.
fn other_kind(table: &dyn TableLike) -> Option<&'static str> {
    let has = |key: &str| table.contains_key(key);
    match () {
        () if has("pipeline") => None,
        () if has("handlers") || has("routes") => Some(
            "it says who answers\nhint: `homeroom serve --config FILE` serves its routes, `homeroom chat --config FILE --handler NAME` talks to one",
        ),
        () if has("package") || has("workspace") => {
            Some("it is a crate's\nhint: `homeroom plugins watch CRATE` builds a strategy when its source is saved")
        }
        () => None,
    }
}

/// A project's file can tighten the user's policy and never loosen it: it may come from somebody else.
fn read_policy(item: &Item, problems: &mut Problems) -> Option<Policy> {
    let Some(plugins) = item.as_table_like() else {
        problems.at(item.span(), "`plugins` is a table: [plugins]");
        return None;
    };
    unknown_keys(plugins, &PLUGINS_KEYS.map(|(key, _)| key), problems);
    let policy = plugins.get("policy")?;
    match policy.as_str() {
        Some("locked") => return Some(Policy::Locked),
        Some("dev") => problems.at(
            policy.span(),
            "`policy`: a file can tighten the policy to \"locked\", not loosen it; leave it out and run with --plugin-policy dev",
        ),
        _ => problems.at(policy.span(), "`policy`: it should be \"locked\""),
    }
    None
}

fn read_script(pipeline: &dyn TableLike, table: &Item, base: &Path, problems: &mut Problems) -> Option<PathBuf> {
    let Some(item) = pipeline.get("script") else {
        problems.at(table.span(), "there is no `script`");
        return None;
    };
    let Some(text) = item.as_str() else {
        problems.at(item.span(), "`script`: it should be a string, the path of a Lua file");
        return None;
    };
    let script = base.join(text);
    if !script.is_file() {
        problems.at(item.span(), format!("`script`: there is no file {}", script.display()));
        return None;
    }
    Some(script)
}

fn unknown_keys(table: &dyn TableLike, known: &[&str], problems: &mut Problems) {
    for (name, _) in table.iter().filter(|(name, _)| !known.contains(name)) {
        let span = table.key(name).and_then(toml_edit::Key::span);
        problems.at(span, format!("`{name}`: unknown key, {}", near(name, known)));
    }
}

/// Reads a declaration; `None` if its type is not known, so that nothing can be said of its values.
fn read_param(name: &str, key: Option<Range<usize>>, item: &Item, problems: &mut Problems) -> Option<Param> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let named = key.clone();
    if name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
        problems.at(key.clone(), format!("`{name}`: a parameter's name is letters, digits and underscores"));
    }
    let Some(table) = item.as_table_like() else {
        let message =
            format!("`{name}`: a parameter is declared as a table, such as {{ type = \"int\", default = 1 }}");
        problems.at(item.span(), message);
        return None;
    };
    unknown_keys(table, &PARAM_KEYS.map(|(key, _)| key), problems);
    let kind = match table.get("type").map(|item| (item, item.as_str())) {
        None => {
            problems.at(key, format!("`{name}`: it has no `type`"));
            return None;
        }
        Some((item, text)) => {
            let text = text.unwrap_or_default();
            let found = TYPES.iter().find(|(word, _)| *word == text);
            if found.is_none() {
                let near = near(text, &TYPES.map(|(word, _)| word));
                problems.at(item.span(), format!("`{name}`: its type is unknown, {near}"));
            }
            found?.1
        }
    };
    let numeric = !matches!(kind, Type::Bool | Type::Path | Type::Model | Type::Handler | Type::Table);
    let mut bound = |key: &str| {
        let item = table.get(key)?;
        let bound = number(item).filter(|_| numeric);
        if bound.is_none() {
            let why = if numeric { "it should be a number" } else { "only numbers and strings have one" };
            problems.at(item.span(), format!("`{name}`: {key}: {why}"));
        }
        bound
    };
    let (min, max) = (bound("min"), bound("max"));
    if let (Some(least), Some(most), Some(item)) = (min, max, table.get("max"))
        && least > most
    {
        problems.at(item.span(), format!("`{name}`: max is {most}, min is {least}"));
    }
    let doc = table.get("doc").and_then(Item::as_str).map(str::to_owned);
    let mut param =
        Param { name: name.to_owned(), kind, default: None, required: false, min, max, one_of: None, doc, key: named };
    if let Some(item) = table.get("one_of") {
        let list = item.as_array();
        let mut admitted = Vec::new();
        for item in list.into_iter().flatten() {
            match typed(item, kind) {
                Some(value) => admitted.push(value),
                None => problems.at(item.span(), format!("`{name}`: one_of: it should be {}", words(kind))),
            }
        }
        if list.is_none_or(toml_edit::Array::is_empty) {
            problems.at(item.span(), format!("`{name}`: one_of: it should be a list of values"));
        } else {
            param.one_of = Some(admitted);
        }
    }
    match table.get("required").map(|item| (item, item.as_bool())) {
        None => {}
        Some((_, Some(required))) => param.required = required,
        Some((item, None)) => problems.at(item.span(), format!("`{name}`: required: it should be true or false")),
    }
    if let Some(item) = table.get("doc").filter(|item| !item.is_str()) {
        problems.at(item.span(), format!("`{name}`: doc: it should be a string"));
    }
    if let Some(item) = table.get("default") {
        let value = item.as_value().and_then(|value| typed(value, kind));
        let checked = value.ok_or_else(|| format!("it should be {}", words(kind)));
        match checked.and_then(|value| check(&param, value)) {
            Ok(value) => param.default = Some(value),
            Err(why) => problems.at(item.span(), format!("`{name}`: default: {why}")),
        }
        if param.required {
            problems.at(item.span(), format!("`{name}`: a required parameter has no default"));
        }
    }
    Some(param)
}

impl Param {
    fn declared(self) -> Declared {
        let list = |values: &[Value]| values.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
        let unit = if self.kind == Type::String { " characters" } else { "" };
        let range = match (&self.one_of, self.min, self.max) {
            (Some(values), _, _) => list(values),
            (None, Some(min), Some(max)) => format!("{min} to {max}{unit}"),
            (None, Some(min), None) => format!("from {min}{unit}"),
            (None, None, Some(max)) => format!("at most {max}{unit}"),
            (None, None, None) => String::new(),
        };
        let default = match (self.required, &self.default) {
            (true, _) => "required".to_owned(),
            (false, value) => value.as_ref().map(Value::to_string).unwrap_or_default(),
        };
        let kind = TYPES.iter().find(|(_, kind)| *kind == self.kind).map_or("", |(word, _)| word);
        Declared { name: self.name, kind, default, range, doc: self.doc.unwrap_or_default() }
    }
}

fn number(item: &Item) -> Option<f64> {
    item.as_float().or_else(|| item.as_integer().map(|number| number as f64)).filter(|number| number.is_finite())
}

fn words(kind: Type) -> &'static str {
    match kind {
        Type::String => "a string",
        Type::Int => "a whole number",
        Type::Float => "a number",
        Type::Bool => "true or false",
        Type::Path => "a path, as a string",
        Type::Model => "a model's path or name, as a string",
        Type::Handler => "the name of a handler or route, as a string",
        Type::Table => "a table of texts, such as { prompt = \"Frage\", completion = \"Antwort\" }",
    }
}

fn typed(value: &toml_edit::Value, kind: Type) -> Option<Value> {
    match kind {
        Type::String | Type::Path | Type::Model | Type::Handler => value.as_str().map(Value::from),
        Type::Int => value.as_integer().map(Value::from),
        Type::Float => {
            let number = value.as_float().or_else(|| value.as_integer().map(|number| number as f64))?;
            number.is_finite().then(|| number.into())
        }
        Type::Bool => value.as_bool().map(Value::from),
        Type::Table => {
            let text = |value: &toml_edit::Value| {
                value.as_str().map(str::to_owned).or_else(|| value.as_integer().map(|number| number.to_string()))
            };
            let pairs =
                value.as_inline_table()?.iter().map(|(name, value)| Some((name.to_owned(), text(value)?.into())));
            pairs.collect::<Option<Map<_, _>>>().map(Value::Object)
        }
    }
}

/// The value that a text of `--set` stands for.
fn parsed(text: &str, kind: Type) -> Option<Value> {
    match kind {
        Type::String | Type::Path | Type::Model | Type::Handler => Some(text.into()),
        Type::Int => text.parse::<i64>().ok().map(Value::from),
        Type::Float => text.parse::<f64>().ok().filter(|number| number.is_finite()).map(Value::from),
        Type::Bool => text.parse::<bool>().ok().map(Value::from),
        Type::Table => {
            let columns = text.parse::<Columns>().ok()?;
            let pairs = columns.iter().map(|(role, name)| (role.name().to_owned(), name.into()));
            Some(Value::Object(pairs.collect()))
        }
    }
}

/// Luau's numbers are doubles, exact to 2^53: a script would get the neighbour of a larger one.
const WHOLE_MAX: u64 = 1 << 53;

/// Whether a value lies within what was declared.
fn check(param: &Param, value: Value) -> Result<Value, String> {
    // As a path it would be the directory that names are relative to.
    let names = match param.kind {
        Type::Model => Some("a model"),
        Type::Handler => Some("a handler or route"),
        _ => None,
    };
    if let Some(what) = names.filter(|_| value.as_str().is_some_and(|text| text.trim().is_empty())) {
        return Err(format!("it is empty; name {what}"));
    }
    if value.as_i64().is_some_and(|number| number.unsigned_abs() > WHOLE_MAX) {
        return Err(format!("{value} is beyond what a script's numbers hold exactly, {WHOLE_MAX}"));
    }
    let measured = match &value {
        Value::String(text) => (text.chars().count() as f64, " characters"),
        other => (other.as_f64().unwrap_or(f64::NAN), ""),
    };
    let (size, unit) = measured;
    if let Some(min) = param.min.filter(|min| size < *min) {
        return Err(format!("{size}{unit} is below the smallest, {min}"));
    }
    if let Some(max) = param.max.filter(|max| size > *max) {
        return Err(format!("{size}{unit} is above the largest, {max}"));
    }
    match &param.one_of {
        Some(admitted) if !admitted.contains(&value) => {
            let list: Vec<String> = admitted.iter().map(Value::to_string).collect();
            let texts = admitted.iter().filter_map(Value::as_str);
            let near = nearest(value.as_str().unwrap_or_default(), texts);
            let near = near.map(|near| format!(", did you mean {near:?}?")).unwrap_or_default();
            Err(format!("{value} is none of {}{near}", list.join(", ")))
        }
        _ => Ok(value),
    }
}

/// The value of each parameter: what `--set` says, or the default.
fn values(
    declared: &[Param],
    broken: &[String],
    base: &Path,
    (set, unset): (&[(String, String)], Unset),
    problems: &mut Problems,
) -> Map<String, Value> {
    let mut given: Map<String, Value> = Map::new();
    let mut refused = Vec::new();
    let here = std::env::current_dir().unwrap_or_default();
    for (name, text) in set {
        let Some(param) = declared.iter().find(|param| param.name == *name) else {
            if !broken.contains(name) {
                let names: Vec<&str> = declared.iter().map(|param| param.name.as_str()).collect();
                let hint = match nearest(name, names.iter().copied()) {
                    Some(near) => format!(", did you mean `{near}`?"),
                    None if names.is_empty() => "; it declares none".to_owned(),
                    None => format!("; it declares {}", names.join(", ")),
                };
                problems.at(None, format!("--set {name}={text}: there is no such parameter{hint}"));
            }
            continue;
        };
        let value = parsed(text, param.kind).ok_or_else(|| format!("it should be {}", words(param.kind)));
        match value.and_then(|value| check(param, value)) {
            Ok(value) => {
                given.insert(name.clone(), located(&here, value, param.kind));
            }
            Err(why) => {
                refused.push(name);
                problems.at(None, format!("--set {name}={text}: {why}"));
            }
        }
    }
    let mut values = Map::new();
    for param in declared {
        let default = param.default.clone().map(|value| located(base, value, param.kind));
        let value = given.remove(&param.name).or(default);
        if value.is_none() && param.required && unset == Unset::Refused && !refused.contains(&&param.name) {
            problems.at(None, format!("`{}`: it is required; --set {}=…", param.name, param.name));
        }
        values.insert(param.name.clone(), value.unwrap_or(Value::Null));
    }
    values
}

/// A path made absolute, relative to `base`. The name of a model is no path: one of the registry stays, and so does whatever
/// is declared as a model and not there.
fn located(base: &Path, value: Value, kind: Type) -> Value {
    let Some(text) = value.as_str().filter(|_| matches!(kind, Type::Path | Type::Model)) else { return value };
    let path = base.join(text);
    let is_name = || kind == Type::Model || registry::place(text).is_ok_and(|place| place.exists());
    if !path.exists() && is_name() {
        return value;
    }
    path.display().to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, set: &[(&str, &str)]) -> Result<PipelineConfig> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("s.lua"), "return {}")?;
        std::fs::write(dir.path().join("rows.jsonl"), "")?;
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text)?;
        let set: Vec<_> = set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        PipelineConfig::read(&path, &set)
    }

    fn refused(text: &str, set: &[(&str, &str)]) -> String {
        format!("{:#}", read(text, set).unwrap_err())
    }

    const GOOD: &str = "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\n\
        rows = { type = \"path\", default = \"rows.jsonl\" }\nr = { type = \"int\", default = 16, min = 1, max = 64 }\n\
        rate = { type = \"float\", default = 1, doc = \"peak\" }\nmode = { type = \"string\", one_of = [\"sft\", \"dpo\"] }\n\
        fast = { type = \"bool\", default = false }\n";

    #[test]
    fn values_are_typed_and_paths_belong_to_the_file_that_states_them() -> Result<()> {
        let config = read(GOOD, &[("r", "8"), ("mode", "dpo"), ("fast", "true")])?;
        assert_eq!(config.params["r"], 8);
        assert_eq!(config.params["rate"], 1.0);
        assert_eq!(config.params["fast"], true);
        assert!(config.params["rows"].as_str().is_some_and(|path| Path::new(path).is_absolute()));
        assert!(config.script.is_absolute());
        let here = std::env::current_dir()?.join("other.jsonl");
        assert_eq!(read(GOOD, &[("rows", "other.jsonl")])?.params["rows"], here.to_str().unwrap_or_default());
        assert_eq!(read(GOOD, &[])?.params["mode"], Value::Null);
        let model = |text: &str| -> Result<Value> {
            let declared = format!("{GOOD}base = {{ type = \"model\", default = \"{text}\" }}");
            Ok(read(&declared, &[])?.params["base"].clone())
        };
        assert_eq!(model("Org/Model")?, "Org/Model");
        let hub_models = |text: &str, set: &[(&str, &str)]| -> Result<Vec<String>> {
            let declared = format!(
                "{GOOD}base = {{ type = \"model\", default = \"{text}\" }}\nof = {{ type = \"string\", default = \"a/b\" }}"
            );
            let names = read(&declared, set)?.hub_models;
            Ok(names.into_iter().map(|(param, name)| format!("{param} {name}")).collect())
        };
        assert_eq!(hub_models("Org/Model@v1:Q4_0", &[])?, ["base Org/Model@v1:Q4_0"]);
        assert_eq!(hub_models("s.lua", &[("base", "Org/Other"), ("of", "c/d")])?, ["base Org/Other"]);
        assert_eq!(hub_models("./Org/Model", &[])?, [""; 0]);
        assert!(model("s.lua")?.as_str().is_some_and(|path| Path::new(path).is_absolute()));
        Ok(())
    }

    #[test]
    fn all_problems_are_told_together_with_line_caret_and_nearest_name() {
        let text = "[pipeline]\nscrpt = \"s.lua\"\nscript = \"gone.lua\"\n[pipeline.params]\n\
            r = { type = \"int\", default = 0, min = 1 }\nm = { type = \"strnig\" }\nq = { type = \"int\", defualt = 1 }\n\
            must = { type = \"string\", required = true }\n[pipelin]\n";
        let message = refused(text, &[("qq", "1"), ("q", "x"), ("m", "fine")]);
        for expected in [
            "9 problems",
            "line 2: `scrpt`: unknown key, did you mean `script`?\n    2 | scrpt = \"s.lua\"\n      | ^^^^^",
            "line 3: `script`: there is no file",
            "line 5: `r`: default: 0 is below the smallest, 1",
            "      |                               ^\n",
            "line 6: `m`: its type is unknown, did you mean `string`?",
            "`defualt`: unknown key, did you mean `default`?",
            "line 9: `pipelin`: unknown key, did you mean `pipeline`?",
            "--set q=x: it should be a whole number",
            "--set qq=1: there is no such parameter, did you mean `q`?",
            "`must`: it is required; --set must=…",
        ] {
            assert!(message.contains(expected), "{expected}\n--- in ---\n{message}");
        }
    }

    #[test]
    fn every_kind_of_problem_is_named() {
        let param = |text: &str| format!("[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\n{text}\n");
        for (text, expected) in [
            ("x = 3".to_owned(), "there is no [pipeline]"),
            ("[pipeline".to_owned(), "line 1"),
            ("pipeline = 3".to_owned(), "`pipeline` is a table"),
            ("[pipeline]".to_owned(), "there is no `script`"),
            ("[pipeline]\nscript = 3".to_owned(), "the path of a Lua file"),
            ("[pipeline]\nscript = \"s.lua\"\nlua_seconds = 0".to_owned(), "seconds above 0"),
            ("[pipeline]\nscript = \"s.lua\"\noffline = 1".to_owned(), "`offline`: it should be true or false"),
            ("[pipeline]\nscript = \"s.lua\"\nparams = 1".to_owned(), "`params` is a table"),
            (param("a = 1"), "declared as a table"),
            (param("a = { default = 1 }"), "it has no `type`"),
            (param("a = { type = \"int\", default = 1.5 }"), "it should be a whole number"),
            (
                param("a = { type = \"int\", default = 9007199254740993 }"),
                "beyond what a script's numbers hold exactly, 9007199254740992",
            ),
            (param("a = { type = \"float\", default = inf }"), "it should be a number"),
            (param("a = { type = \"int\", default = 1, max = nan }"), "max: it should be a number"),
            (param("a = { type = \"int\", min = 3, max = 2 }"), "max is 2, min is 3"),
            (param("a = { type = \"bool\", min = 3 }"), "only numbers and strings have one"),
            (param("a = { type = \"string\", one_of = [1] }"), "one_of: it should be a string"),
            (param("a = { type = \"string\", one_of = [] }"), "one_of: it should be a list"),
            (param("a = { type = \"string\", one_of = [\"sft\"], default = \"sfd\" }"), "did you mean \"sft\"?"),
            (param("a = { type = \"int\", required = 1 }"), "required: it should be true or false"),
            (param("a = { type = \"int\", required = true, default = 1 }"), "a required parameter has no default"),
            (param("a = { type = \"float\", default = nan }"), "it should be a number"),
            (param("\"a-b\" = { type = \"int\" }"), "letters, digits and underscores"),
            (param("a = { type = \"int\", doc = 1 }"), "doc: it should be a string"),
        ] {
            let message = refused(&text, &[]);
            assert!(message.contains(expected), "{expected}\n--- in ---\n{message}");
        }
        assert!(refused(GOOD, &[("rate", "nan")]).contains("--set rate=nan: it should be a number"));
        assert!(
            refused(GOOD, &[("r", "9007199254740993")])
                .contains("beyond what a script's numbers hold exactly, 9007199254740992")
        );
        assert!(refused(GOOD, &[("r", "65")]).contains("--set r=65: 65 is above the largest, 64"));
    }
}
