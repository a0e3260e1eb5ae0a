//! What a script can call: the table `homeroom`, the datasets that it gives, and `params`.
//!
//! [`spec`] lists every function with its options. A call is checked against that list, runs here while the script's clock
//! stands still, and returns plain tables and texts; a failure begins with the script's file and line.

mod dataset;
mod forgetting;
mod handler;
mod identity;
mod imagined;
mod methods;
mod model;
mod names;
mod options;
mod resumed;
mod row;
mod saved;
pub mod spec;
mod stored;
mod train;
mod value;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom_engine::data::OnLongRow;
use homeroom_engine::files::NewDirectory;
use homeroom_engine::inference::generate::{Sampling, prompt_ids};
use homeroom_engine::inference::{Adapter, Engine};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::text::block_end::BlockEnd;
use homeroom_engine::train::{evaluate_examples, objective};
use mlua::{LightUserData, Lua, Table, Value};
use serde_json::{Map, Value as Json, json};

use self::dataset::Dataset;
use self::imagined::{Imagined, Needs, is_imagined};
use self::model::{ModelSpec, NOT_NAMED, fine_tuned};
use self::options::Options;
use self::spec::{VERBS, verb};
use self::stored::Made;
use super::How;
use super::about;
use super::clock::Clock;
use super::config::PipelineConfig;
use super::errors::{Failure, nearest, said, short};
use super::limits::{Account, Held, bytes};
use super::output::Output;
use super::places::{Place, Places};
use super::sandbox::{Prelude, Sandbox, Sources, name_of};
use super::store::{Key, Store};
use crate::hub::{self, HubName};
use crate::models::{Loaded, not_there};
use crate::plugin::{Plugin, Search};
use crate::processor;
use crate::progress::{self, thousands};
use crate::registry;
use crate::runs::{About, End, Kind, RunDirectory};

pub use self::names::named_problem;
pub use self::value::{to_json, to_lua, words};

/// Most calls that a dry run imagines.
const IMAGINED_MAX: usize = 1000;

/// What the verbs of one run share. It belongs to the script's thread.
pub struct Session {
    clock: Arc<Clock>,
    /// Describe, and neither train nor write.
    dry: bool,
    /// What the script may read.
    places: Places,
    /// What it prints.
    output: Output,
    /// What is held for it.
    account: Account,
    /// The script's name, for that of the run.
    name: String,
    /// What is written beside a run's adapters.
    about: About,
    /// Bases of the user's trained models, which the tables of those models name.
    known_bases: RefCell<HashSet<PathBuf>>,
    search: Search,
    plugins: RefCell<HashMap<String, Rc<Plugin>>>,
    bases: RefCell<HashMap<PathBuf, Arc<BaseModel>>>,
    adaptations: RefCell<HashMap<PathBuf, Loaded>>,
    /// Adapters that a dry run would have trained, with what all of its trainings need.
    imagined: Imagined,
    needs: Cell<Option<(usize, usize, Needs)>>,
    /// Models that a dry run would have saved.
    dry_saved: RefCell<HashMap<String, ModelSpec>>,
    /// What a dry run would do: in words, and as JSON.
    actions: RefCell<Vec<(String, Json, Held)>>,
    /// The last handler that was made.
    handler: RefCell<Option<String>>,
    /// Whether a training is under way.
    trains: Cell<bool>,
    /// The parameters.
    params: Map<String, Json>,
    /// The functions of its scripts.
    sources: Sources,
    /// What verbs made before.
    store: Store,
    /// Calls of `fine_tune` so far.
    stages: Cell<usize>,
    /// Whether it was said that results cannot be kept.
    unkept: Cell<bool>,
    /// Whether nothing is looked up.
    fresh: bool,
    /// The run that it goes on with.
    resumed: Option<String>,
    /// The run and the number of adapters in it, once there is one.
    run: RefCell<Option<(Rc<RunDirectory>, usize)>>,
}

impl Session {
    /// Before the script runs.
    ///
    /// # Errors
    /// When a directory of the pipeline is not there.
    pub fn new(sandbox: &Sandbox, config: &PipelineConfig, search: Search, how: How) -> Result<Self> {
        let stem = config.script.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
        let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' { c } else { '-' };
        let name = stem.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).chars().map(plain).take(40).collect();
        let scripts = config.script.parent().context("a file has a directory")?;
        let file = std::path::absolute(&config.path)?;
        let named = config.named.iter().map(|(_, path)| path.clone()).collect();
        Ok(Self {
            clock: sandbox.clock.clone(),
            dry: how.dry,
            places: Places::new(scripts, file.parent().context("a file has a directory")?, named)?,
            output: Output::new(sandbox.limits.output_bytes),
            account: Account::new(sandbox.limits.held_bytes),
            name,
            about: about(config),
            known_bases: RefCell::default(),
            search,
            plugins: RefCell::default(),
            bases: RefCell::default(),
            adaptations: RefCell::default(),
            imagined: Imagined::default(),
            needs: Cell::default(),
            dry_saved: RefCell::default(),
            actions: RefCell::default(),
            handler: RefCell::default(),
            trains: Cell::default(),
            params: config.params.clone(),
            sources: sandbox.sources(),
            store: Store::new(registry::data_directory().map(|data| data.join("runs")), how.fresh),
            stages: Cell::default(),
            unkept: Cell::default(),
            fresh: how.fresh,
            resumed: how.resumed,
            run: RefCell::default(),
        })
    }

    /// Time of the script.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// What a dry run would do.
    pub fn actions(&self) -> Vec<(String, Json)> {
        let mut actions: Vec<_> = self.actions.take().into_iter().map(|(words, json, _)| (words, json)).collect();
        if let Some((trainings, tokens, needs)) = self.needs.take() {
            let trained = if trainings == 1 { "1 training".to_owned() } else { format!("{trainings} trainings") };
            let words = format!("in all  {trained}, {} tokens; {}", thousands(tokens), needs.words());
            actions.push((words, json!({"total": train::needs_json(tokens, &needs), "trainings": trainings})));
        }
        actions
    }

    /// The last handler that the script made.
    pub fn handler(&self) -> Option<String> {
        self.handler.take()
    }

    /// Keeps what the script returned in the run's directory, if there is one.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&self, result: &Json) -> Result<Option<PathBuf>> {
        let Some((run, _)) = &*self.run.borrow() else { return Ok(None) };
        run.finish(End::Finished(result.clone()))?;
        Ok(Some(run.path().join("result.json")))
    }

    /// Says in the run's directory, if there is one, why the script ended early.
    pub fn failed(&self, error: &anyhow::Error) {
        let Some((run, _)) = &*self.run.borrow() else { return };
        let end = match self.clock.cancelled() {
            true => End::Interrupted(Json::Null),
            false => End::Failed(format!("{error:#}")),
        };
        // The error itself is what the user hears of.
        let _ = run.finish(end);
    }

    fn would(&self, lua: &Lua, words: String, json: Json) -> Result<(), Failure> {
        if self.actions.borrow().len() >= IMAGINED_MAX {
            return Err(said(format!(
                "a dry run imagines at most {} calls, and this script makes more: what it waits for may never come; bound its loop, such as \
                 with `for round = 1, 10 do`",
                thousands(IMAGINED_MAX)
            )));
        }
        // The JSON says the same once more.
        let held = self.hold(lua, 4 * words.len())?;
        self.actions.borrow_mut().push((words, json, held));
        Ok(())
    }

    /// Writes a line of a verb's story.
    fn tell(&self, text: impl Display) {
        self.output.line(&self.clock, &text.to_string());
    }

    /// Holds bytes outside of the machine for the script.
    ///
    /// # Errors
    /// When they are too many, even without what the script no longer needs.
    fn hold(&self, lua: &Lua, size: usize) -> Result<Held, Failure> {
        if let Some(held) = self.account.hold(size) {
            return Ok(held);
        }
        // The machine sees of a dataset a few bytes, and thinks that there is time.
        lua.gc_collect()?;
        lua.gc_collect()?;
        self.account.hold(size).ok_or_else(|| {
            let most = bytes(self.account.most());
            said(format!(
                "the datasets of this script would take more than {most} of memory, which is all that they may"
            ))
        })
    }

    /// The place that a script means by a model: what a parameter names or lies below the TOML file's directory, an adapter of a
    /// run, a model of that name, or one of the Hugging Face hub that is in the cache. `None`: there is none. A path into the cache is as
    /// any path.
    ///
    /// # Errors
    /// When the script may not read there, or it is no regular files.
    pub fn locate(&self, name: &str) -> Result<Option<Place>> {
        let known = |path: PathBuf| path.exists().then_some(Place { path, named: true, hub_name: None });
        if self.known_bases.borrow().contains(Path::new(name)) {
            return Ok(known(name.into()));
        }
        // A name is tried as a path first, as everywhere.
        let found = self.places.find(name);
        if let Ok(Some(place)) = &found {
            self.places.check_model(place)?;
            return found;
        }
        let saved = match (registry::data_directory().filter(|_| is_id(name)), name.rsplit_once('/')) {
            (Some(data), Some((run, number))) => known(data.join("runs").join(run).join("adapters").join(number)),
            (Some(_), None) => known(registry::place(name)?),
            (None, _) => None,
        };
        let hub_name = HubName::parse(name).filter(|_| self.places.is_vacant(name));
        match found {
            // The script's directory need not be below the TOML file's: a name that nothing has there is only a name.
            Err(outside) if saved.is_none() && hub_name.is_none() && !(is_id(name) && self.places.is_vacant(name)) => {
                Err(outside)
            }
            _ if saved.is_some() => Ok(saved),
            _ => {
                let Some(hub_name) = hub_name else { return Ok(None) };
                Ok(hub::find(&hub_name)?.map(|found| Place::of_hub(found.path, hub_name)))
            }
        }
    }

    fn plugin(&self, name: &str) -> Result<Rc<Plugin>> {
        if let Some(known) = self.plugins.borrow().get(name) {
            return Ok(known.clone());
        }
        let plugin = Rc::new(self.search.load(name)?);
        self.plugins.borrow_mut().insert(name.to_owned(), plugin.clone());
        Ok(plugin)
    }

    /// Takes up the run that it is to go on with.
    ///
    /// # Errors
    /// When another process works on it.
    pub fn resume(&self) -> Result<()> {
        if self.resumed.is_some() {
            self.run()?;
        }
        Ok(())
    }

    /// The run, which is begun if it has not been yet.
    fn run(&self) -> Result<Rc<RunDirectory>> {
        let mut run = self.run.borrow_mut();
        if let Some((run, _)) = &*run {
            return Ok(run.clone());
        }
        let begun = Rc::new(match &self.resumed {
            Some(id) => {
                let run = RunDirectory::reopen(id)?;
                // Before any verb makes a key: the instructions are a part of it.
                processor::keep_to(&run.processor());
                run
            }
            None => RunDirectory::start(Kind::Pipeline, &self.name, self.about.clone())?,
        });
        if self.resumed.is_none() {
            self.tell(format_args!("run       {}   `homeroom resume {0}` goes on if it is ended", begun.id()));
        }
        let numbers = ["adapters", "trainings"].map(|directory| last_number(&begun.path().join(directory)));
        run.replace((begun.clone(), numbers[0].max(numbers[1])));
        Ok(begun)
    }

    /// Writes an event of the run itself, if it has begun.
    fn note(&self, event: &Json) {
        if let Some((run, _)) = &*self.run.borrow() {
            run.event(event);
        }
    }

    /// The adapter that the next training of this run makes. One that was begun under the same key, here or in a run that has ended, is
    /// gone on with; without a key, none is, now or later.
    fn new_adapter(&self, key: Option<&Key>) -> Result<NewAdapter> {
        let run = self.run()?;
        let begun = key.and_then(|key| resumed::checkpoint(key, run.id(), !self.fresh));
        let own = begun.as_ref().filter(|begun| begun.run == run.id()).map(|begun| begun.number);
        let number = own.unwrap_or_else(|| {
            let mut run = self.run.borrow_mut();
            let count = run.as_mut().map(|(_, count)| count);
            count.map_or(1, |count| {
                *count += 1;
                *count
            })
        });
        let training = run.training(number)?;
        if let Some(key) = key {
            resumed::begin(&training, key, begun.filter(|_| own.is_none()).as_ref())?;
        }
        let (id, path) = (format!("{}/{number}", run.id()), run.path().join("adapters").join(number.to_string()));
        Ok(NewAdapter { run, number, id, path })
    }

    /// The run's directory, which is made if there is none yet.
    fn run_path(&self) -> Result<PathBuf> {
        self.run().map(|run| run.path().to_owned())
    }
}

/// The largest number that is a name in a directory; 0: there is none.
fn last_number(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.max().unwrap_or(0)
}

/// The adapter that a training of a run will make.
struct NewAdapter {
    run: Rc<RunDirectory>,
    /// Number of the training in its run, from 1.
    number: usize,
    /// `RUN/NUMBER`.
    id: String,
    /// Its directory.
    path: PathBuf,
}

/// Whether a text can be the name of a model, or the id of an adapter of a run: `NAME` or `RUN/NUMBER`.
fn is_id(text: &str) -> bool {
    match text.rsplit_once('/') {
        Some((run, number)) => {
            let digits = (1..=9).contains(&number.len()) && number.bytes().all(|c| c.is_ascii_digit());
            registry::is_name(run) && digits
        }
        None => registry::is_name(text),
    }
}

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

const CALLS: [(&str, Call); 9] = [
    ("load_model", load_model),
    ("prepare_dataset", prepare_dataset),
    ("fine_tune", fine_tune),
    ("save_model", save_model),
    ("load_fine_tuned_model", load_fine_tuned_model),
    ("create_handler", create_handler),
    ("evaluate", evaluate),
    ("forgetting", forgetting::forgetting),
    ("generate", generate),
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

fn load_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_model"), argument)?;
    let name = options.needed_text("name");
    let named = ModelSpec::named(session, &name)?;
    let mut spec = ModelSpec { options: options.strategy(&session.clock)?, ..named.clone() };
    if named.adapter.is_some() {
        return Err(said(format!("load_model: `{name}` is an adapter; `load_fine_tuned_model` describes it")));
    }
    spec.strategy = Some(strategy_of(&options)?);
    if session.dry && session.locate(&spec.base)?.is_none() {
        spec.load_base(session)?; // Says what is missing.
    }
    Ok(Value::Table(spec.to_table(lua)?))
}

/// Transformers' options that store the base in fewer bits, and the strategies that do.
const LOAD_IN: [(&str, &str); 2] = [("load_in_4bit", "qlora"), ("load_in_8bit", "int8")];

/// The strategy that a call of `load_model` asks for.
fn strategy_of(options: &Options) -> Result<String, Failure> {
    let strategy = options.text("strategy");
    let contradicts = |option: &str, value: bool, strategy: &str| {
        let strategy = short(strategy);
        said(format!("load_model: `{option} = {value}` contradicts `strategy = \"{strategy}\"`; leave one of them out"))
    };
    let mut asked = None;
    for (option, means) in LOAD_IN {
        match (options.flag(option), strategy.as_deref()) {
            (Some(true), Some(other)) if other != means => return Err(contradicts(option, true, other)),
            (Some(false), Some(same)) if same == means => return Err(contradicts(option, false, same)),
            (Some(true), _) if asked.is_some() => {
                return Err(said(
                    "load_model: `load_in_4bit` and `load_in_8bit` are both true; a base is stored one way",
                ));
            }
            (Some(true), _) => asked = Some(means),
            _ => {}
        }
    }
    Ok(strategy.unwrap_or_else(|| asked.unwrap_or("lora").to_owned()))
}

fn prepare_dataset(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("prepare_dataset"), argument)?;
    let (path, file) = session.places.open(&options.needed_text("path")).context("prepare_dataset")?;
    let on_long_row = options.word("on_long_row").unwrap_or(OnLongRow::Refuse);
    let max_seq_len = options.whole("max_seq_len").map(|tokens| tokens as usize);
    let data = Dataset::read(lua, session, &path, file, max_seq_len, on_long_row)?;
    let share = options.number("eval").filter(|share| *share > 0.0);
    let (rows, table) = (data.len(), lua.create_table()?);
    let held_out = match share {
        Some(share) => {
            let parted = data.split(lua, session, share, options.seed());
            let (train, eval) = parted.map_err(|failure| failure.within(&path.display().to_string()))?;
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
            lua,
            format!("read    {}: {} rows, {held_out} held out", path.display(), thousands(rows)),
            json!({"verb": "prepare_dataset", "path": path, "rows": rows, "held_out": held_out}),
        )?;
    }
    Ok(Value::Table(table))
}

fn fine_tune(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    // Each would hold its model and moments on top of the other's, and nothing but the stack would end it.
    if session.trains.replace(true) {
        return Err(said("fine_tune: a callback of a training cannot begin another"));
    }
    let tuned = train::fine_tune(lua, session, argument);
    session.trains.set(false);
    tuned
}

fn save_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("save_model"), argument)?;
    let name = options.needed_text("name");
    let place = registry::place(&name)?;
    let mut spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    let Some(adapter) = spec.adapter.clone() else {
        return Err(said("save_model: this model was not trained; `fine_tune` returns one that was"));
    };
    let saved = session.dry_saved.borrow().get(&adapter).cloned();
    let is_imagined = session.dry && (is_imagined(&adapter) || saved.is_some());
    let from = if is_imagined { None } else { Some(trained(session, &adapter)?) };
    if session.dry {
        spec.adapter = saved.map_or(Some(adapter), |saved| saved.adapter);
        session.would(
            lua,
            format!("save    {name}: {}", place.display()),
            json!({"verb": "save_model", "name": name, "output": place}),
        )?;
        session.dry_saved.borrow_mut().insert(name.clone(), spec.clone());
    } else {
        let from = from.context("only a dry run imagines models")?;
        stored::stored(lua, session, verb("save_model"), &options, || {
            let replaces = if place.exists() { "   (in place of the model of that name)" } else { "" };
            let directory = NewDirectory::start(&place)?;
            saved::copy(&from, directory.path())?;
            directory.publish()?;
            session.tell(format_args!("saved     {name}   {}{replaces}", place.display()));
            Ok(Made { result: json!({"name": name, "path": place}), files: identity::model_files(&place)? })
        })?;
        session.note(&json!({"event": "saved_model", "name": name, "path": place}));
        session.adaptations.borrow_mut().remove(&place);
        session.bases.borrow_mut().remove(&place);
        spec.adapter = Some(name.clone());
    }
    let table = spec.to_table(lua)?;
    table.set("name", name)?;
    table.set("path", place.display().to_string())?;
    Ok(Value::Table(table))
}

/// The directory of a trained model.
fn trained(session: &Session, adapter: &str) -> Result<PathBuf, Failure> {
    let Some(place) = session.locate(adapter)?.filter(|from| from.path.is_dir()) else {
        return Err(said(format!(
            "there is no trained model `{}`; `homeroom list-models` shows yours",
            short(adapter)
        )));
    };
    saved::ensure_trained(&place.path)?;
    // What comes with the script may name a base that is none of its business; in the registry it would be the user's word.
    ModelSpec::named(session, adapter)?;
    Ok(place.path)
}

fn load_fine_tuned_model(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("load_fine_tuned_model"), argument)?;
    Ok(Value::Table(fine_tuned(session, &options.needed_text("name"))?.to_table(lua)?))
}

fn create_handler(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("create_handler"), argument)?;
    let name = options.needed_text("name");
    let spec = ModelSpec::read(session, options.get("model").unwrap_or(&Value::Nil))?;
    // A name of the registry or the hub goes into the file as it is; anything else as the path that it means here.
    let model = spec.adapter.clone().unwrap_or_else(|| spec.base.clone());
    let given = match options.get("model") {
        Some(Value::Table(table)) => table.raw_get::<Value>("name")?.as_string().map(|name| name.to_string_lossy()),
        _ => None,
    };
    let model = given.unwrap_or(model);
    let model = match session.locate(&model)? {
        _ if session.dry_saved.borrow().contains_key(&model) => model,
        Some(place) if registry::place(&model).is_ok_and(|saved| saved == place.path) => model,
        Some(Place { hub_name: Some(name), .. }) => name.to_string(),
        Some(place) => place.path.display().to_string(),
        None => return Err(said(format!("create_handler: {}", not_there(Path::new(&model), NOT_NAMED)))),
    };
    if session.dry {
        let file = handler::check(&name, &model)?;
        session.would(
            lua,
            format!("write   [handlers.{name}] in {}: {model}", file.display()),
            json!({"verb": "create_handler", "name": name, "model": model, "output": file}),
        )?;
    } else {
        let file = handler::write(&name, &model)?;
        session.tell(format_args!("handler   {name}   {model}, in {}", file.display()));
        session.handler.replace(Some(name.clone()));
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
    let rows = options.dataset("dataset").context("`read` saw that a required option is there")?;
    if session.dry {
        let (model, _) = spec.load(session)?;
        let data = rows.encode(&session.clock, &model, objective::Kind::Sft).context("evaluate: dataset")?;
        let table = lua.create_table()?;
        session.would(
            lua,
            format!("measure {} on {} examples", spec.base, thousands(data.groups.len())),
            json!({"verb": "evaluate", "model": spec.base, "examples": data.groups.len(), "tokens": data.tokens()}),
        )?;
        let steps = session.imagined.steps(&spec);
        let loss = imagined::loss(&model, steps);
        table.set("loss", loss)?;
        table.set("perplexity", loss.exp())?;
        table.set("token_accuracy", imagined::accuracy(&model, steps))?;
        table.set("trained_tokens", data.tokens())?;
        table.set("examples", data.groups.len())?;
        return Ok(Value::Table(table));
    }
    Ok(to_lua(
        lua,
        &stored::stored(lua, session, verb("evaluate"), &options, || {
            let (model, adaptation) = spec.load(session)?;
            let data = rows.encode(&session.clock, &model, objective::Kind::Sft).context("evaluate: dataset")?;
            let examples: Vec<_> = data.groups.iter().flat_map(|group| &group.sequences).collect();
            let bar = progress::counting("evaluating", examples.len());
            let compute = options.word("compute").unwrap_or(Compute::F32);
            let result = evaluate_examples(&model, adaptation.as_deref(), &examples, compute, |done| {
                bar.set_position(done as u64)
            });
            bar.finish_and_clear();
            let result = result?;
            Ok(Made::plain(json!({
                "loss": result.loss,
                "perplexity": result.perplexity,
                "token_accuracy": result.token_accuracy,
                "trained_tokens": result.trained_tokens,
                "examples": result.examples,
            })))
        })?,
    )?)
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
    let system = options.text("system").map(|text| json!({"role": "system", "content": text}));
    let messages = |prompt: &str| -> Vec<Json> {
        system.iter().cloned().chain([json!({"role": "user", "content": prompt})]).collect()
    };
    if session.dry {
        let (model, _) = spec.load(session)?;
        let texts = lua.create_table()?;
        for prompt in &prompts {
            session.clock.check()?;
            prompt_ids(&model, &messages(prompt)).context("generate")?;
            texts.raw_push("")?;
        }
        session.would(
            lua,
            format!("answer  {} prompts with {}", prompts.len(), spec.base),
            json!({"verb": "generate", "model": spec.base, "prompts": prompts.len()}),
        )?;
        return Ok(Value::Table(texts));
    }
    Ok(to_lua(
        lua,
        &stored::stored(lua, session, verb("generate"), &options, || {
            let (model, adaptation) = spec.load(session)?;
            let engine = Engine::new(model.clone(), Compute::Auto);
            let adapter = adaptation.map(|adaptation| Adapter::new(engine.inference(), model.clone(), adaptation));
            let adapter = adapter.transpose().context("generate")?;
            // All are asked at once, as they then share the reading of the weights; each answer is what it would be alone.
            let mut asked = Vec::with_capacity(prompts.len());
            for prompt in &prompts {
                session.clock.check()?;
                let ids = prompt_ids(&model, &messages(prompt)).context("generate")?;
                let block_end =
                    BlockEnd::behind(&ids, &model.tokenizer, model.template.as_ref()).context("generate")?;
                asked.push((engine.ask(adapter.as_ref(), &ids, sampling).context("generate")?, block_end));
            }
            let mut texts: Vec<String> = Vec::with_capacity(prompts.len());
            for (tokens, mut block_end) in asked {
                session.clock.check()?;
                let mut ids = Vec::new();
                for id in tokens {
                    session.clock.check()?;
                    ids.push(id.context("generate")?);
                }
                let text = model.tokenizer.decode(&ids, true).context("generate")?;
                texts.push(block_end.push(text) + &block_end.finish());
            }
            Ok(Made::plain(json!(texts)))
        })?,
    )?)
}
