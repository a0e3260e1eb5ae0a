//! A training job: what the command line and a pipeline both run.
//!
//! [`Job`] is a strategy made real on a base, [`recording`] keeps its steps and checkpoints in a run's directory while it trains,
//! [`Outcome`] is what came of it, and [`keep`] saves that. [`samples`] answers held-out questions before and after.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Error, Result, bail, ensure};
use homeroom_abi::plan::{Peft, PlanRequest};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{self, AdapterFiles, Record, StrategyRecord, read_manifest};
use homeroom_engine::adapt::encoded::EncodedBases;
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::adapt::requantize::{kept_storage, store_as_planned};
use homeroom_engine::data::Group;
use homeroom_engine::export::{Floats, exportable, save_model_in};
use homeroom_engine::files::digest::{self, FileDigests};
use homeroom_engine::files::{NewDirectory, utf8};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Objective, ObjectiveConfig, Prepare, Progress, prepare};
use homeroom_engine::train::{Data, Observer, State, TrainConfig, checkpoint, planned_steps, train};
use serde_json::{Map, Value, json};

pub mod defaults;
mod estimate;
pub mod fit;
pub mod forgetting;
mod keep;
mod outcome;
mod recording;
mod samples;
mod stall;

pub use self::estimate::{Before, Estimator};
use self::fit::{Fit, Planned};
pub use self::forgetting::ForgettingRows;
pub use self::keep::Taken;
pub use self::outcome::Outcome;
use self::recording::Recorder;
pub use self::recording::{Recording, Resumed, Saving, lowered_words, newest_checkpoint};
pub use self::samples::{Sample, Samples, question};
use self::stall::Stall;
pub use self::stall::VARIABLE as STALL_VARIABLE;
use crate::machine::give_back_memory;
use crate::models::shown;
use crate::plugin::generation::Live;
use crate::plugin::reload::Watching;
use crate::plugin::{Plugin, native};
use crate::progress::{self, line, thousands};
use crate::registry;

/// What a reference makes of the rows, in a training's directory.
const REFERENCE_FILE: &str = "reference.safetensors";

/// A thread that computes the digests of a base's files.
type Digesting = JoinHandle<Result<FileDigests>>;

/// A strategy made real on a model, not yet trained.
pub struct Job {
    /// The base.
    pub model: Arc<BaseModel>,
    /// Its parameters before training; [`Job::now`] has those that it went on with.
    pub adaptation: Adaptation,
    /// The strategy, as an adapter records it.
    pub strategy: StrategyRecord,
    /// The strategy's options as they were given.
    pub options: Map<String, Value>,
    /// The learning rate that the strategy proposes.
    pub proposed_learning_rate: Option<f64>,
    /// The adapter that it starts from.
    pub init_from: Option<PathBuf>,
    /// Whether weights of the base that were quantised already were encoded anew.
    pub requantize: bool,
    /// What it is about to take; `None`: nobody has looked.
    pub planned: Option<Planned>,
    /// When the plugin's file is to be watched while it trains.
    pub watch: Option<Watching>,
    /// The strategy's plugin; a training that is taken up again does without.
    plugin: Option<Plugin>,
    /// What a training went on with after its plugin changed or set a scalar.
    changed: Mutex<Option<(Arc<Adaptation>, StrategyRecord)>>,
    /// Who computes the digests of the base's files while it trains.
    digesting: Mutex<Option<Digesting>>,
    base_files: OnceLock<FileDigests>,
}

impl Job {
    /// Has the strategy plan, stores the base as the plan asks for, and gives parameters their first values, or those of the
    /// adapter to start from. A base that is quantised already keeps its storage, unless `requantize`.
    ///
    /// # Errors
    /// When the strategy refuses, its plan does not fit, or neither does the adapter.
    pub fn new(
        model: Arc<BaseModel>,
        plugin: &Plugin,
        options: Map<String, Value>,
        seed: u64,
        init_from: Option<&Path>,
        requantize: bool,
    ) -> Result<Self> {
        // Both are written into the result.
        for path in [Some(model.path.as_path()), init_from].into_iter().flatten() {
            utf8(path)?;
        }
        let plan = plugin.plan(&PlanRequest { options: options.clone(), model: model.info() })?;
        let proposed_learning_rate = plan.defaults.learning_rate;
        let place = || format!("strategy `{}`", plugin.description.name);
        let native = |name: &str| native::of_plugin(plugin, name);
        let model = encode(|kept, progress| store_as_planned(model, &plan, requantize, &native, kept, progress))
            .with_context(place)?;
        if let Some((wanted, kept)) = kept_storage(&model, &plan) {
            line(format_args!("note: the base keeps its storage, {kept}; with `requantize` it is stored as {wanted}"));
        }
        let mut adaptation = Adaptation::new(&model, plan, seed).with_context(place)?;
        if let Err(why) = exportable(&model) {
            ensure!(!adaptation.is_whole_model(), "what it trains is a model, which could not be saved: {why:#}");
            line(format_args!("note: a merged model cannot be exported of what is trained: {why:#}"));
        }
        if let Some(path) = init_from {
            let files = AdapterFiles::read(path)?;
            let differences = differences(files.peft_config(), adaptation.plan.peft.as_ref());
            let loaded = adaptation.load(files.into_tensors(&model)?);
            if loaded.is_err() && !differences.is_empty() {
                bail!("{}: cannot start from it: it has {}", path.display(), differences.join("; "));
            }
            loaded.with_context(|| format!("{}: cannot start from it", path.display()))?;
        }
        // First values are made in memory that a training has better uses for.
        give_back_memory();
        let strategy = plugin.record();
        let init_from = init_from.map(Path::to_owned);
        let (watch, plugin, changed) = (None, Some(plugin.clone()), Mutex::new(None));
        let (digesting, base_files) = (Mutex::new(None), OnceLock::new());
        Ok(Self {
            model,
            adaptation,
            strategy,
            options,
            proposed_learning_rate,
            init_from,
            requantize,
            planned: None,
            watch,
            plugin,
            changed,
            digesting,
            base_files,
        })
    }

    /// The job of a training that is taken up again, from a checkpoint's directory: by the plan that is in it. `plugin`: the strategy's
    /// plugin, if it is here; only if it is the one that the training had is it asked after steps. `native` finds codecs that only a
    /// plugin has.
    ///
    /// # Errors
    /// When the checkpoint is damaged, or belongs to another base.
    pub fn resume(
        model: Arc<BaseModel>,
        directory: &Path,
        plugin: Option<Plugin>,
        native: adapter::FindCodec<'_>,
        options: Map<String, Value>,
        init_from: Option<&Path>,
    ) -> Result<Self> {
        let manifest = read_manifest(directory)?;
        let manifest = manifest.with_context(|| format!("{}: not a checkpoint", directory.display()))?;
        let summary = checkpoint::summary(directory)?;
        let digest = model.digest();
        ensure!(
            manifest.base.digest == digest,
            "{}: it was trained on another base: {} has changed since\nhint: put the old one back, or start anew",
            directory.display(),
            model.path.display()
        );
        let strategy = manifest.strategy.clone();
        let codec = |name: &str| native(&strategy, name);
        let requantize = manifest.base.requantize;
        let model =
            encode(|kept, progress| store_as_planned(model, &summary.plan, requantize, &codec, kept, progress))?;
        // Its parameters are replaced by those of the state, which is read when the configuration is known.
        let adaptation = Adaptation::new(&model, summary.plan.clone(), 0)?;
        let proposed_learning_rate = summary.plan.defaults.learning_rate;
        let is_the_same = plugin.as_ref().is_some_and(|plugin| plugin.sha256 == strategy.sha256);
        if !is_the_same {
            let why = if plugin.is_some() { "its file is another now" } else { "its plugin is not here" };
            line(format_args!(
                "note: strategy `{}`: {why}; the training goes on by the plan that it had, and nothing is asked after its steps",
                strategy.name
            ));
        }
        Ok(Self {
            model,
            adaptation,
            strategy,
            options,
            proposed_learning_rate,
            init_from: init_from.map(Path::to_owned),
            requantize,
            planned: None,
            watch: None,
            plugin: plugin.filter(|_| is_the_same),
            changed: Mutex::new(None),
            digesting: Mutex::new(None),
            base_files: OnceLock::new(),
        })
    }

    /// What is trained now, and by which generation of the strategy.
    pub fn now(&self) -> (Arc<Adaptation>, StrategyRecord) {
        let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        changed.unwrap_or_else(|| (Arc::new(self.adaptation.clone()), self.strategy.clone()))
    }

    fn set_now(&self, adaptation: &Arc<Adaptation>, strategy: StrategyRecord) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some((adaptation.clone(), strategy));
    }

    /// Digests of the base's files, of a job that has trained.
    fn base_files(&self) -> FileDigests {
        let digests = self.base_files.get_or_init(|| {
            let digesting = self.digesting.lock().unwrap_or_else(PoisonError::into_inner).take();
            match digesting.map(JoinHandle::join) {
                Some(Ok(Ok(digests))) => digests,
                Some(Ok(Err(error))) => {
                    line(format_args!("note: the result does not record the base's files: {error:#}"));
                    FileDigests::new()
                }
                _ => FileDigests::new(),
            }
        });
        digests.clone()
    }

    /// The same of a job that is still training, if they are known by now.
    fn base_files_so_far(&self) -> FileDigests {
        let digesting = self.digesting.lock().unwrap_or_else(PoisonError::into_inner);
        match digesting.as_ref().is_some_and(|digesting| !digesting.is_finished()) {
            true => FileDigests::new(),
            false => {
                drop(digesting);
                self.base_files()
            }
        }
    }

    /// How its blocks will run, in words.
    pub fn blocks(&self, compute: Compute) -> String {
        let blocks = trainer(&self.model, Some(&self.adaptation), compute);
        let missed = compute == Compute::Int8 && !blocks.in_integers();
        let missed = if missed { "; nothing in integers, which takes frozen weights in fused blocks" } else { "" };
        format!("{}{missed}", blocks.words())
    }

    /// Makes the objective of a training, whose reference is the base, or the adapter that the job started from. What the reference makes of
    /// the rows is kept in the training's directory.
    ///
    /// # Errors
    /// See [`prepare`].
    pub fn objective(
        &self,
        objective: ObjectiveConfig,
        (train, held_out): (&[&Group], &[&Group]),
        config: &TrainConfig,
        directory: Option<&Path>,
        progress: &mut Progress<'_>,
    ) -> Result<Box<dyn Objective>> {
        let start = self.init_from.as_deref().filter(|_| objective.objective.has_reference());
        let reference = start.map(|path| {
            // Its values now may be others: those of a checkpoint, or of a plan that it went on with.
            let mut reference = Adaptation::new(&self.model, self.adaptation.plan.clone(), 0)?;
            reference.load(AdapterFiles::read(path)?.into_tensors(&self.model)?)?;
            Ok::<_, Error>(reference)
        });
        let reference = reference.transpose().context("the adapter that it started from is its reference")?;
        let path = directory.map(|directory| directory.join(REFERENCE_FILE));
        let base = format!("{}, {}", self.model.digest(), self.model.storage_words());
        let from = Prepare {
            objective,
            train,
            held_out,
            model: &self.model,
            adaptation: Some(&self.adaptation),
            reference: reference.as_ref(),
            config,
            kept: path.as_deref().map(|path| (path, base.as_str())),
        };
        prepare(&from, progress)
    }

    /// Trains, with the strategy beside it: its hook is asked after each step, and when its file is watched another generation
    /// is taken over between two steps. `recording` keeps steps and checkpoints in a run's directory; `from`: what was saved there, to
    /// go on from.
    ///
    /// # Errors
    /// See [`train`].
    pub fn train(
        &self,
        data: &Data<'_>,
        objective: &dyn Objective,
        config: &TrainConfig,
        observer: &mut dyn Observer,
        recording: Option<&mut Recording<'_>>,
        from: Option<Resumed>,
    ) -> Result<State> {
        let tell = |plugin: &Plugin, adaptation: &Arc<Adaptation>| self.set_now(adaptation, plugin.record());
        // What is saved names its base by this. It is read now, as the base's files may be gone at the end.
        self.model.digest();
        let (files, kept) = (self.model.files.clone(), registry::kept_digests());
        let digesting = thread::spawn(move || digest::of_files(&files, kept.as_deref()));
        *self.digesting.lock().unwrap_or_else(PoisonError::into_inner) = Some(digesting);
        let (mut state, memory) = match from {
            Some(Resumed { state, memory }) => {
                self.set_now(state.adaptation(), self.strategy.clone());
                (state, memory)
            }
            None => {
                if let Some(recording) = &recording {
                    recording.event(self.started(data, objective, config)?);
                }
                (State::new(&self.model, &self.adaptation, config), Value::Null)
            }
        };
        if let Some(Fit { passes, reason }) = self.planned.as_ref().and_then(|planned| planned.fit.as_ref()) {
            let event = state.lower(*passes, reason.clone());
            if let Some(recording) = &recording {
                recording.event(serde_json::to_value(&event)?);
            }
        }
        let request = PlanRequest { options: self.options.clone(), model: self.model.info() };
        let mut live;
        let (inner, strategy): (&mut dyn Observer, _) = match &self.plugin {
            Some(plugin) => {
                let (rate, watch) = (self.proposed_learning_rate, self.watch.clone());
                live = Live::new(observer, plugin, request, rate, watch, &tell, |text| line(text));
                live.remember(&memory["strategy"]);
                (&mut live, None)
            }
            None => (observer, Some(memory["strategy"].clone())),
        };
        let stall = Stall::watch("in the first step".to_owned(), recording.as_ref().map(|recording| recording.log()));
        let mut recorder = Recorder::new(inner, self, config, recording, strategy, stall);
        let trained = train(&self.model, state, data, objective, config, &mut recorder)?;
        recorder.ended(&trained.report);
        self.set_now(trained.adaptation(), self.now().1);
        Ok(trained)
    }

    /// The first event of a training: what is trained on what, and how.
    fn started(&self, data: &Data<'_>, objective: &dyn Objective, config: &TrainConfig) -> Result<Value> {
        let Self { model, adaptation, strategy, options, .. } = self;
        Ok(json!({
            "event": "started",
            "steps": planned_steps(data.units.len(), config)?,
            "rows": data.units.len(),
            "eval_rows": data.held_out.len(),
            "objective": objective.name(),
            "base": shown(model, &model.path),
            "base_path": model.path.to_string_lossy(),
            "base_digest": model.digest(),
            "base_parameters": model.parameter_count(),
            "base_stored_as": model.storage_words(),
            "strategy": format!("{} {}", strategy.name, strategy.version),
            "trained_parameters": adaptation.trainable_count(),
            "config": config,
            "options": options,
            "memory": recording::memory_now(self.planned.as_ref().map(|planned| planned.peak_memory_bytes)),
        }))
    }

    /// Writes what is trained into a directory in the making: an adapter, or for a strategy that trains the base's own weights a model
    /// (`whole`) or only what tells of it; with `homeroom.json` beside either.
    fn write(
        &self,
        directory: &NewDirectory,
        (adaptation, strategy): (&Adaptation, &StrategyRecord),
        whole: bool,
        data_digest: Option<&str>,
        training: Value,
    ) -> Result<()> {
        let base_files = if whole { self.base_files() } else { self.base_files_so_far() };
        let record = Record { strategy, data_digest, base_files, requantize: self.requantize, training };
        if !adaptation.is_whole_model() {
            return adapter::save(directory, &self.model, adaptation, record);
        }
        if whole {
            let merged = Merged::new(&self.model, Some(adaptation))?;
            // One file: those of a result have fixed names.
            save_model_in(directory, &merged, Floats::of(&self.model)?, u64::MAX, |_, _| ())?;
        }
        let manifest = serde_json::to_value(adapter::manifest(&self.model, adaptation, record)?)?;
        directory.write(adapter::HOMEROOM_FILE, adapter::pretty(&manifest)?.as_bytes())
    }
}

/// How the options that decide on the shapes of an adapter's tensors differ from those of a plan, in words.
fn differences(theirs: Option<&Map<String, Value>>, plan: Option<&Peft>) -> Vec<String> {
    let (Some(theirs), Some(plan)) = (theirs, plan) else { return Vec::new() };
    let of_plan = |name: &str| match name {
        "peft_type" => Some(Value::from(plan.peft_type.as_str())),
        name => plan.fields.get(name).cloned(),
    };
    // PEFT writes the names of modules in no order, and leaves out what is off.
    let comparable = |value: Option<Value>| match value {
        Some(Value::Array(mut names)) => {
            names.sort_by_key(Value::to_string);
            Value::Array(names)
        }
        Some(Value::Object(map)) if map.is_empty() => Value::Null,
        Some(Value::Bool(false)) | None => Value::Null,
        Some(other) => other,
    };
    ["peft_type", "r", "rank_pattern", "target_modules", "use_dora"]
        .into_iter()
        .filter_map(|name| {
            let (their, our) = (comparable(theirs.get(name).cloned()), comparable(of_plan(name)));
            let shown = |value: &Value| if value.is_null() { "none".to_owned() } else { value.to_string() };
            (their != our).then(|| format!("{name} {}, this run asks for {}", shown(&their), shown(&our)))
        })
        .collect()
}

/// The steps of a training, their batches and their rate: a line of its opening.
pub fn training_words(steps: u64, config: &TrainConfig) -> String {
    format!(
        "training  {} steps of {} x {} examples   learning rate {:.1e}, {}   seed {}",
        thousands(steps as usize),
        config.gradient_accumulation_steps,
        config.batch_size,
        config.learning_rate,
        config.lr_scheduler_type.name(),
        config.seed,
    )
}

/// Runs what stores a base otherwise, with a bar on a terminal; it is given the place where encoded bases are kept, if they are.
///
/// # Errors
/// Those of `store`.
pub fn encode(
    store: impl FnOnce(Option<&EncodedBases>, &mut dyn FnMut(usize, usize)) -> Result<Arc<BaseModel>>,
) -> Result<Arc<BaseModel>> {
    let kept = registry::encoded_bases();
    let bar = progress::counting("encoding", 0);
    let result = store(kept.as_ref(), &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    give_back_memory();
    result
}
