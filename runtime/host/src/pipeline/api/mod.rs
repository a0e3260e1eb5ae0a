//! What a script can call: the table `homeroom`, the datasets that it gives, and `params`.
//!
//! [`spec`] lists every function with its options. A call is checked against that list, runs here while the script's clock
//! stands still, and returns plain tables and texts; a failure begins with the script's file and line.

mod dataset;
mod handler;
mod model;
mod options;
pub mod spec;
mod train;
mod value;

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_abi::describe::nearest;
use homeroom_engine::block::Compute;
use homeroom_engine::files::NewDirectory;
use homeroom_engine::generate::{Sampling, prompt_ids};
use homeroom_engine::inference::{Answers, Inference};
use homeroom_engine::model::BaseModel;
use homeroom_engine::train::evaluate_examples;
use mlua::{Lua, Table, Value, Variadic};
use serde_json::{Map, Value as Json, json};

use self::dataset::Dataset;
use self::model::{DRY, ModelSpec, fine_tuned};
use self::options::{Options, words};
use self::spec::{VERBS, verb};
use self::value::to_lua;
use super::sandbox::{Clock, Sandbox, here, message};
use crate::models::Loaded;
use crate::plugin::{Plugin, Search};
use crate::progress::{self, thousands};
use crate::registry;

pub use self::value::to_json;

/// Why a call fails.
pub enum Failure {
    /// The script's own error, or one that has its place in the script.
    Lua(mlua::Error),
    /// An error that gets the place of the call.
    Said(anyhow::Error),
}

impl From<mlua::Error> for Failure {
    fn from(error: mlua::Error) -> Self {
        Self::Lua(error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Said(error)
    }
}

impl Failure {
    /// The same with words before it.
    fn within(self, words: &str) -> Self {
        match self {
            Self::Lua(error) => Self::Lua(error),
            Self::Said(error) => Self::Said(error.context(words.to_owned())),
        }
    }

    /// As an error of the command that ran the script.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Lua(error) => anyhow!(message(&error)),
            Self::Said(error) => error,
        }
    }
}

fn said(text: impl Into<String>) -> Failure {
    Failure::Said(anyhow!(text.into()))
}

/// What the verbs of one run share. It belongs to the script's thread.
pub struct Session {
    clock: Arc<Clock>,
    /// Describe, and neither train nor write.
    dry: bool,
    /// Directory of the script: what its paths are relative to.
    scripts: PathBuf,
    /// The script's name, for that of the run.
    name: String,
    /// What is written beside a run's adapters.
    about: Json,
    search: Search,
    plugins: RefCell<HashMap<String, Rc<Plugin>>>,
    bases: RefCell<HashMap<PathBuf, Arc<BaseModel>>>,
    adaptations: RefCell<HashMap<PathBuf, Loaded>>,
    /// Models that a dry run would have saved.
    dry_saved: RefCell<HashMap<String, ModelSpec>>,
    /// What a dry run would do: in words, and as JSON.
    actions: RefCell<Vec<(String, Json)>>,
    /// The run's directory and the number of adapters in it, once there is one.
    run: RefCell<Option<(PathBuf, usize)>>,
}

impl Session {
    /// Before the script runs.
    pub fn new(sandbox: &Sandbox, script: &Path, about: Json, search: Search, dry: bool) -> Self {
        let stem = script.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
        let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' { c } else { '-' };
        let name = stem.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).chars().map(plain).take(40).collect();
        Self {
            clock: sandbox.clock.clone(),
            dry,
            scripts: script.parent().map(Path::to_owned).unwrap_or_default(),
            name,
            about,
            search,
            plugins: RefCell::default(),
            bases: RefCell::default(),
            adaptations: RefCell::default(),
            dry_saved: RefCell::default(),
            actions: RefCell::default(),
            run: RefCell::default(),
        }
    }

    /// What a dry run would do.
    pub fn actions(&self) -> Vec<(String, Json)> {
        self.actions.take()
    }

    fn would(&self, words: String, json: Json) {
        self.actions.borrow_mut().push((words, json));
    }

    /// The path that a script means: relative to the script, then an adapter of a run, then a model of that name.
    fn locate(&self, name: &str) -> PathBuf {
        let path = self.scripts.join(name);
        if path.exists() {
            return path;
        }
        let run = name.rsplit_once('/').filter(|(run, number)| {
            registry::is_name(run) && !number.is_empty() && number.chars().all(|c| c.is_ascii_digit())
        });
        if let (Some((run, number)), Some(data)) = (run, registry::data_directory()) {
            return data.join("runs").join(run).join("adapters").join(number);
        }
        registry::place(name).ok().filter(|place| place.exists()).unwrap_or(path)
    }

    fn plugin(&self, name: &str) -> Result<Rc<Plugin>> {
        if let Some(known) = self.plugins.borrow().get(name) {
            return Ok(known.clone());
        }
        let plugin = Rc::new(self.search.load(name)?);
        self.plugins.borrow_mut().insert(name.to_owned(), plugin.clone());
        Ok(plugin)
    }

    /// Id and directory of the next adapter of this run.
    fn new_adapter(&self) -> Result<(String, PathBuf)> {
        let mut run = self.run.borrow_mut();
        let (directory, count) = match &mut *run {
            Some(run) => run,
            none => none.insert((self.new_run()?, 0)),
        };
        *count += 1;
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        Ok((format!("{name}/{count}"), directory.join("adapters").join(count.to_string())))
    }

    /// A new directory `runs/<script>-<number>`.
    fn new_run(&self) -> Result<PathBuf> {
        let data = registry::data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
        let runs = data.join("runs");
        let place = || format!("{}: cannot write here", runs.display());
        std::fs::create_dir_all(&runs).with_context(place)?;
        for number in 1.. {
            let directory = runs.join(format!("{}-{number}", self.name));
            match std::fs::create_dir(&directory) {
                Ok(()) => {
                    std::fs::write(directory.join("run.json"), format!("{:#}\n", self.about)).with_context(place)?;
                    return Ok(directory);
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(place),
            }
        }
        unreachable!("numbers do not end")
    }
}

/// The session of a machine.
fn session(lua: &Lua) -> mlua::Result<Rc<Session>> {
    let session = lua.app_data_ref::<Rc<Session>>().map(|session| session.clone());
    session.ok_or_else(|| mlua::Error::runtime("there is no session"))
}

/// Runs a call: the clock stands still, a script that is to end gets no further, and a failure names the script's line.
fn guarded<T>(lua: &Lua, session: &Session, call: impl FnOnce() -> Result<T, Failure>) -> mlua::Result<T> {
    session.clock.check()?;
    let _paused = session.clock.pause();
    call().map_err(|failure| match failure {
        Failure::Lua(error) => error,
        Failure::Said(error) => mlua::Error::runtime(format!("{}{error:#}", here(lua))),
    })
}

type Call = fn(&Lua, &Session, Value) -> Result<Value, Failure>;

const CALLS: [(&str, Call); 8] = [
    ("load_model", load_model),
    ("prepare_dataset", prepare_dataset),
    ("fine_tune", train::fine_tune),
    ("save_model", save_model),
    ("load_fine_tuned_model", load_fine_tuned_model),
    ("create_handler", create_handler),
    ("evaluate", evaluate),
    ("generate", generate),
];

/// Gives a sandbox `homeroom`, `params` and `print`.
///
/// # Errors
/// When memory is out.
pub fn provide(sandbox: &Sandbox, session: &Rc<Session>, params: &Map<String, Json>) -> mlua::Result<()> {
    let lua = sandbox.lua();
    lua.set_app_data(session.clone());
    let homeroom = lua.create_table()?;
    for (name, call) in CALLS {
        let session = session.clone();
        let function =
            lua.create_function(move |lua, argument: Value| guarded(lua, &session, || call(lua, &session, argument)))?;
        homeroom.set(name, function)?;
    }
    let log = lua.create_table()?;
    for (name, mark) in [("info", ""), ("warn", "warning: ")] {
        let session = session.clone();
        let function = lua.create_function(move |lua, (text, fields): (Value, Value)| {
            guarded(lua, &session, || {
                eprintln!("{mark}{}{}", shown_text(&text), shown_fields(&fields)?);
                Ok(())
            })
        })?;
        log.set(name, function)?;
    }
    strict(lua, &log, "homeroom.log", ["info", "warn"].map(str::to_owned).to_vec())?;
    homeroom.set("log", log)?;
    let names = VERBS.iter().map(|verb| verb.name.to_owned()).chain(["log".to_owned()]).collect();
    strict(lua, &homeroom, "homeroom", names)?;
    sandbox.provide("homeroom", homeroom)?;

    let table = lua.create_table()?;
    for (name, value) in params {
        table.set(name.as_str(), to_lua(lua, value)?)?;
    }
    strict(lua, &table, "params", params.keys().cloned().collect())?;
    sandbox.provide("params", table)?;
    // stdout is the result; what a script prints is the story.
    let print = lua.create_function(|_, values: Variadic<Value>| {
        let words: Vec<String> = values.iter().map(shown_text).collect();
        eprintln!("{}", words.join("\t"));
        Ok(())
    })?;
    sandbox.provide("print", print)
}

/// Has a table refuse names that it does not have. A name that is known and not set is nil.
fn strict(lua: &Lua, table: &Table, place: &'static str, names: Vec<String>) -> mlua::Result<()> {
    let meta = lua.create_table()?;
    let index = lua.create_function(move |lua, (_, key): (Value, Value)| {
        let key = key.to_string().unwrap_or_default();
        if names.contains(&key) {
            return Ok(Value::Nil);
        }
        let near = nearest(&key, names.iter().map(String::as_str));
        let hint = match near {
            Some(near) => format!(", did you mean `{near}`?"),
            None if names.is_empty() => "; it is empty".to_owned(),
            None => format!("; it has {}", names.join(", ")),
        };
        Err(mlua::Error::runtime(format!("{}`{place}` has no `{key}`{hint}", here(lua))))
    })?;
    meta.set("__index", index)?;
    meta.set("__metatable", "locked")?;
    meta.set_readonly(true);
    table.set_metatable(Some(meta))
}

fn shown_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.to_string_lossy(),
        other => other.to_string().unwrap_or_else(|_| other.type_name().to_owned()),
    }
}

fn shown_fields(fields: &Value) -> Result<String, Failure> {
    if fields.is_nil() {
        return Ok(String::new());
    }
    let json = to_json(fields)?;
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

fn load_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_model"), argument)?;
    let name = options.needed_text("name");
    let named = ModelSpec::named(session, &name)?;
    let mut spec = ModelSpec { options: options.strategy()?, ..named.clone() };
    if named.adapter.is_some() {
        return Err(said(format!("load_model: `{name}` is an adapter; `load_fine_tuned_model` describes it")));
    }
    spec.strategy = Some(options.text("strategy").unwrap_or_else(|| "lora".to_owned()));
    if session.dry {
        let path = session.locate(&spec.base);
        if !path.exists() {
            spec.load_base(session)?; // Says what is missing.
        }
    }
    Ok(Value::Table(spec.to_table(lua)?))
}

fn prepare_dataset(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("prepare_dataset"), argument)?;
    let path = session.scripts.join(options.needed_text("path"));
    let on_long_row = dataset::on_long_row(options.text("on_long_row").as_deref().unwrap_or("refuse"))?;
    let max_seq_len = options.whole("max_seq_len").map(|tokens| tokens as usize);
    let data = Dataset::read(&path, max_seq_len, on_long_row)?;
    let share = options.number("eval").filter(|share| *share > 0.0);
    let (rows, table) = (data.len(), lua.create_table()?);
    let held_out = match share {
        Some(share) => {
            let (train, eval) = data.split(share, options.seed()).with_context(|| path.display().to_string())?;
            let held_out = eval.len();
            table.set("train", train)?;
            table.set("eval", eval)?;
            held_out
        }
        None => {
            table.set("train", data)?;
            0
        }
    };
    if session.dry {
        session.would(
            format!("read    {}: {} rows, {held_out} held out", path.display(), thousands(rows)),
            json!({"verb": "prepare_dataset", "path": path, "rows": rows, "held_out": held_out}),
        );
    }
    Ok(Value::Table(table))
}

fn save_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("save_model"), argument)?;
    let name = options.needed_text("name");
    let place = registry::place(&name)?;
    let mut spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let Some(adapter) = spec.adapter.clone() else {
        return Err(said("save_model: this model was not trained; `fine_tune` gives one that was"));
    };
    if session.dry {
        spec.adapter = Some(DRY.to_owned());
        session.dry_saved.borrow_mut().insert(name.clone(), spec.clone());
        session.would(
            format!("save    {name}: {}", place.display()),
            json!({"verb": "save_model", "name": name, "output": place}),
        );
    } else {
        let from = session.locate(&adapter);
        ensure_trained(&from, &adapter)?;
        let replaces = if place.exists() { "   (in place of the model of that name)" } else { "" };
        let directory = NewDirectory::start(&place)?;
        train::copy_directory(&from, &directory)?;
        directory.publish()?;
        session.adaptations.borrow_mut().remove(&place);
        session.bases.borrow_mut().remove(&place);
        eprintln!("saved     {name}   {}{replaces}", place.display());
        spec.adapter = Some(name.clone());
    }
    let table = spec.to_table(lua)?;
    table.set("name", name)?;
    table.set("path", place.display().to_string())?;
    Ok(Value::Table(table))
}

fn ensure_trained(path: &Path, id: &str) -> Result<()> {
    ensure!(path.is_dir(), "there is no trained model `{id}`; `homeroom list-models` shows yours");
    Ok(())
}

fn load_fine_tuned_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_fine_tuned_model"), argument)?;
    Ok(Value::Table(fine_tuned(session, &options.needed_text("name"))?.to_table(lua)?))
}

fn create_handler(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("create_handler"), argument)?;
    let name = options.needed_text("name");
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    // A name of the registry goes into the file as it is; anything else as the path that it means here.
    let model = spec.adapter.clone().unwrap_or_else(|| spec.base.clone());
    let given = match options.get("model") {
        Some(Value::Table(table)) => table.raw_get::<Option<String>>("name")?,
        _ => None,
    };
    let model = given.unwrap_or(model);
    let is_name = registry::is_name(&model) && !session.scripts.join(&model).exists();
    let model = if is_name { model } else { session.locate(&model).display().to_string() };
    if session.dry {
        let file = handler::file()?;
        session.would(
            format!("write   [handlers.{name}] in {}: {model}", file.display()),
            json!({"verb": "create_handler", "name": name, "model": model, "output": file}),
        );
    } else {
        let file = handler::write(&name, &model)?;
        eprintln!("handler   {name}   {model}, in {}", file.display());
    }
    let table = lua.create_table()?;
    table.set("name", name)?;
    table.set("kind", "local")?;
    table.set("model", model)?;
    Ok(Value::Table(table))
}

fn evaluate(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("evaluate"), argument)?;
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let data = options.dataset("dataset").context("`read` saw that a required option is there")?;
    let (model, adaptation) = spec.load(session)?;
    let data = data.encode(&model).context("evaluate: dataset")?;
    let table = lua.create_table()?;
    if session.dry {
        session.would(
            format!("measure {} on {} examples", spec.base, thousands(data.examples.len())),
            json!({"verb": "evaluate", "model": spec.base, "examples": data.examples.len(), "tokens": data.tokens()}),
        );
        for name in ["loss", "perplexity", "token_accuracy"] {
            table.set(name, f64::NAN)?;
        }
        table.set("trained_tokens", 0)?;
        table.set("examples", data.examples.len())?;
        return Ok(Value::Table(table));
    }
    let examples: Vec<_> = data.examples.iter().collect();
    let bar = progress::counting("evaluating", examples.len());
    let compute = train::compute(&options, Compute::F32);
    let result =
        evaluate_examples(&model, adaptation.as_deref(), &examples, compute, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let result = result?;
    table.set("loss", result.loss)?;
    table.set("perplexity", result.perplexity)?;
    table.set("token_accuracy", result.token_accuracy)?;
    table.set("trained_tokens", result.trained_tokens)?;
    table.set("examples", result.examples)?;
    Ok(Value::Table(table))
}

fn generate(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("generate"), argument)?;
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let prompts = options.texts("prompts");
    let sampling = Sampling {
        max_tokens: options.whole("max_tokens").unwrap_or(256) as usize,
        temperature: options.number("temperature").unwrap_or(0.0),
        seed: options.seed(),
        ..Sampling::default()
    };
    let (model, adaptation) = spec.load(session)?;
    let system = options.text("system").map(|text| json!({"role": "system", "content": text}));
    let texts = lua.create_table()?;
    let inference = (!session.dry).then(|| Inference::new(model.clone(), adaptation, Compute::Auto));
    let answers = inference.map(Answers::new);
    // All are asked at once, as they then share the reading of the weights; each answer is what it would be alone.
    let mut asked = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let messages: Vec<Json> = system.iter().cloned().chain([json!({"role": "user", "content": prompt})]).collect();
        let ids = prompt_ids(&model, &messages).context("generate")?;
        asked.push(answers.as_ref().map(|answers| answers.ask(&ids, sampling)).transpose().context("generate")?);
    }
    for tokens in asked {
        session.clock.check()?;
        let mut ids = Vec::new();
        for id in tokens.into_iter().flatten() {
            session.clock.check()?;
            ids.push(id.context("generate")?);
        }
        texts.raw_push(model.tokenizer.decode(&ids, true).context("generate")?)?;
    }
    if session.dry {
        session.would(
            format!("answer  {} prompts with {}", prompts.len(), spec.base),
            json!({"verb": "generate", "model": spec.base, "prompts": prompts.len()}),
        );
    }
    Ok(Value::Table(texts))
}
