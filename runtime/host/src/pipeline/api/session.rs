//! What the verbs of one run share: its clock, its places, what was loaded, and the run's directory.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom_engine::models::BaseModel;
use homeroom_engine::text::template;
use mlua::Lua;
use serde_json::{Map, Value as Json, json};

use super::imagined::{Imagined, Needs, is_imagined};
use super::model::ModelSpec;
use super::{resumed, train};
use crate::handler::config::Handlers;
use crate::hub::{self, HubName};
use crate::models::Loaded;
use crate::pipeline::clock::Clock;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::errors::{Failure, said};
use crate::pipeline::limits::{Account, Held, bytes};
use crate::pipeline::output::Output;
use crate::pipeline::places::{Place, Places};
use crate::pipeline::sandbox::{Sandbox, Sources};
use crate::pipeline::store::{self, Key, Store};
use crate::pipeline::{How, about};
use crate::plugin::{Plugin, Search};
use crate::processor;
use crate::progress::thousands;
use crate::registry;
use crate::runs::{About, End, Kind, RunDirectory};

/// Most calls that a dry run imagines.
const IMAGINED_MAX: usize = 1000;

/// What the verbs of one run share. It belongs to the script's thread.
pub struct Session {
    pub(super) clock: Arc<Clock>,
    /// Describe, and neither train nor write.
    pub(super) dry: bool,
    /// What the script may read.
    pub(super) places: Places,
    /// What it prints.
    pub(super) output: Output,
    /// What is held for it.
    pub(super) account: Account,
    /// The script's name, for that of the run.
    pub(super) name: String,
    /// What is written beside a run's adapters.
    pub(super) about: About,
    /// Bases of the user's trained models, which the tables of those models name.
    pub(super) known_bases: RefCell<HashSet<PathBuf>>,
    pub(super) search: Search,
    pub(super) plugins: RefCell<HashMap<String, Rc<Plugin>>>,
    pub(super) bases: RefCell<HashMap<PathBuf, Arc<BaseModel>>>,
    pub(super) adaptations: RefCell<HashMap<PathBuf, Loaded>>,
    /// Adapters that a dry run would have trained, with what all of its trainings need.
    pub(super) imagined: Imagined,
    pub(super) needs: Cell<Option<(usize, usize, Needs)>>,
    /// Models that a dry run would have saved.
    pub(super) dry_saved: RefCell<HashMap<String, ModelSpec>>,
    /// What a dry run would do: in words, and as JSON.
    pub(super) actions: RefCell<Vec<(String, Json, Held)>>,
    /// The last handler that was made.
    pub(super) handler: RefCell<Option<String>>,
    /// Whether a training is under way.
    pub(super) trains: Cell<bool>,
    /// Handlers that parameters name.
    pub(super) named_handlers: Vec<String>,
    /// Those of them that the user typed.
    pub(super) typed_handlers: Vec<String>,
    /// Whether the TOML file forbids the network.
    pub(super) offline: bool,
    /// The user's handlers, once one is asked.
    pub(super) handlers: RefCell<Option<Rc<Handlers>>>,
    /// The parameters.
    pub(super) params: Map<String, Json>,
    /// The functions of its scripts.
    pub(super) sources: Sources,
    /// What verbs made before.
    pub(super) store: Store,
    /// Calls of `fine_tune` so far.
    pub(super) stages: Cell<usize>,
    /// Whether it was said that results cannot be kept.
    pub(super) unkept: Cell<bool>,
    /// Events of before the run has begun.
    events: RefCell<Vec<Json>>,
    /// Whether nothing is looked up.
    pub(super) fresh: bool,
    /// The run that it goes on with.
    pub(super) resumed: Option<String>,
    /// The run and the number of adapters in it, once there is one.
    pub(super) run: RefCell<Option<(Rc<RunDirectory>, usize)>>,
}

impl Session {
    /// Before the script runs.
    ///
    /// # Errors
    /// When a directory of the pipeline is not there.
    pub fn new(sandbox: &Sandbox, config: &PipelineConfig, search: Search, how: How) -> Result<Self> {
        if !how.dry {
            store::program();
        }
        // A run that is gone on with holds its own.
        template::hold_time(template::present_time());
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
            named_handlers: config.handlers.clone(),
            typed_handlers: config.typed_handlers.clone(),
            offline: config.offline,
            handlers: RefCell::default(),
            params: config.params.clone(),
            sources: sandbox.sources(),
            store: Store::new(registry::data_directory().map(|data| data.join("runs")), how.fresh),
            stages: Cell::default(),
            unkept: Cell::default(),
            events: RefCell::default(),
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

    pub(super) fn would(&self, lua: &Lua, words: String, json: Json) -> Result<(), Failure> {
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
    pub(super) fn tell(&self, text: impl Display) {
        self.output.line(&self.clock, &text.to_string());
    }

    /// Holds bytes outside of the machine for the script.
    ///
    /// # Errors
    /// When they are too many, even without what the script no longer needs.
    pub(super) fn hold(&self, lua: &Lua, size: usize) -> Result<Held, Failure> {
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

    /// Whether an adapter is one that this run, which is a dry one, did not train.
    pub(super) fn imagines(&self, adapter: &str) -> bool {
        self.dry && is_imagined(adapter)
    }

    pub(super) fn plugin(&self, name: &str) -> Result<Rc<Plugin>> {
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
    pub(super) fn run(&self) -> Result<Rc<RunDirectory>> {
        let mut run = self.run.borrow_mut();
        if let Some((run, _)) = &*run {
            return Ok(run.clone());
        }
        let begun = Rc::new(match &self.resumed {
            Some(id) => {
                let run = RunDirectory::reopen(id)?;
                // Before any verb makes a key: the instructions are a part of it.
                processor::keep_to(&run.processor());
                run.clock().into_iter().for_each(template::hold_time);
                run
            }
            None => RunDirectory::start(Kind::Pipeline, &self.name, self.about.clone())?,
        });
        match &self.resumed {
            None => self.tell(format_args!("run       {}   `homeroom resume {0}` goes on if it is ended", begun.id())),
            Some(id) if begun.renew(&self.about)? => self.tell(format_args!(
                "note: its script or its settings have changed since run {id} was begun; what they change is made anew"
            )),
            Some(_) => {}
        }
        let numbers = ["adapters", "trainings"].map(|directory| last_number(&begun.path().join(directory)));
        self.events.take().iter().for_each(|event| begun.event(event));
        run.replace((begun.clone(), numbers[0].max(numbers[1])));
        Ok(begun)
    }

    /// Writes an event of the run itself, now or when it begins.
    pub(super) fn note(&self, event: Json) {
        match &*self.run.borrow() {
            Some((run, _)) => run.event(&event),
            None => self.events.borrow_mut().push(event),
        }
    }

    /// The adapter that the next training of this run makes. One that was begun under the same key, here or in a run that has ended, is
    /// gone on with; without a key, none is, now or later.
    pub(super) fn new_adapter(&self, key: Option<&Key>) -> Result<NewAdapter> {
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

    /// If a training was begun under a key and can be gone on with, templates say the time from now on that they said there: rows that it
    /// has yet to see are to be rendered as those that it saw.
    pub(super) fn tell_time_of(&self, key: Option<&Key>) {
        let own = self.run.borrow().as_ref().map(|(run, _)| run.id().to_owned());
        let own = own.or_else(|| self.resumed.clone()).unwrap_or_default();
        let begun = key.and_then(|key| resumed::checkpoint(key, &own, !self.fresh));
        begun.and_then(|begun| begun.clock).into_iter().for_each(template::hold_time);
    }

    /// The run's directory, which is made if there is none yet.
    pub(super) fn run_path(&self) -> Result<PathBuf> {
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
pub(super) struct NewAdapter {
    pub(super) run: Rc<RunDirectory>,
    /// Number of the training in its run, from 1.
    pub(super) number: usize,
    /// `RUN/NUMBER`.
    pub(super) id: String,
    /// Its directory.
    pub(super) path: PathBuf,
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
