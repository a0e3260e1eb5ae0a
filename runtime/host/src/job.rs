//! A training job: what the command line and a pipeline both run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use homeroom_abi::plan::{Peft, PlanRequest};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{self, AdapterFiles, Record, StrategyRecord};
use homeroom_engine::adapt::merge::{Floats, exportable, merge, save_model};
use homeroom_engine::adapt::requantize::{kept_storage, store_as_planned};
use homeroom_engine::data::Example;
use homeroom_engine::files::digest::{self, FileDigests};
use homeroom_engine::files::{NewDirectory, utf8};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{Evaluation, Observer, TrainConfig, TrainReport, evaluate_examples, train};
use serde_json::{Map, Value, json};

use crate::machine::peak_memory_bytes;
use crate::plugin::generation::Live;
use crate::plugin::reload::Watching;
use crate::plugin::{Plugin, native};
use crate::progress::{self, line};
use crate::registry::{self, when};

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
    /// When the plugin's file is to be watched while it trains.
    pub watch: Option<Watching>,
    plugin: Plugin,
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
        let model =
            encode(|progress| store_as_planned(model, &plan, requantize, &native, progress)).with_context(place)?;
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
        let strategy = plugin.record();
        let init_from = init_from.map(Path::to_owned);
        let (watch, plugin, changed) = (None, plugin.clone(), Mutex::new(None));
        let (digesting, base_files) = (Mutex::new(None), OnceLock::new());
        Ok(Self {
            model,
            adaptation,
            strategy,
            options,
            proposed_learning_rate,
            init_from,
            requantize,
            watch,
            plugin,
            changed,
            digesting,
            base_files,
        })
    }

    /// What is trained now, and by which generation of the strategy.
    pub fn now(&self) -> (Arc<Adaptation>, StrategyRecord) {
        let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        changed.unwrap_or_else(|| (Arc::new(self.adaptation.clone()), self.strategy.clone()))
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

    /// Loss on held-out examples, if there are any, in f32 whatever the training computes in. Before training, a job that starts from nothing is the base.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn evaluate(&self, examples: &[&Example], progress: impl FnMut(usize)) -> Result<Option<Evaluation>> {
        if examples.is_empty() {
            return Ok(None);
        }
        evaluate_examples(&self.model, Some(&self.now().0), examples, Compute::F32, progress).map(Some)
    }

    /// How its blocks will run, in words.
    pub fn blocks(&self, compute: Compute) -> String {
        let blocks = trainer(&self.model, Some(&self.adaptation), compute);
        let missed = compute == Compute::Int8 && !blocks.in_integers();
        let missed = if missed { "; nothing in integers, which takes frozen weights in fused blocks" } else { "" };
        format!("{}{missed}", blocks.words())
    }

    /// Trains, with the strategy beside it: its hook is asked after each step, and when its file is watched another generation
    /// is taken over between two steps.
    ///
    /// # Errors
    /// See [`train`].
    pub fn train(
        &self,
        examples: &[&Example],
        config: &TrainConfig,
        observer: &mut dyn Observer,
    ) -> Result<TrainReport> {
        let tell = |plugin: &Plugin, adaptation: &Arc<Adaptation>| {
            let now = (adaptation.clone(), plugin.record());
            *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        };
        // What is saved names its base by this. It is read now, as the base's files may be gone at the end.
        self.model.digest();
        let (files, kept) = (self.model.files.clone(), registry::kept_digests());
        let digesting = thread::spawn(move || digest::of_files(&files, kept.as_deref()));
        *self.digesting.lock().unwrap_or_else(PoisonError::into_inner) = Some(digesting);
        let request = PlanRequest { options: self.options.clone(), model: self.model.info() };
        let mut live = Live::new(
            observer,
            &self.plugin,
            request,
            self.proposed_learning_rate,
            self.watch.clone(),
            &tell,
            |text| line(text),
        );
        train(&self.model, &self.adaptation, examples, config, &mut live)
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

/// Runs what stores a base otherwise, with a bar on a terminal.
///
/// # Errors
/// Those of `store`.
pub fn encode(store: impl FnOnce(&mut dyn FnMut(usize, usize)) -> Result<Arc<BaseModel>>) -> Result<Arc<BaseModel>> {
    let bar = progress::counting("encoding", 0);
    let result = store(&mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    result
}

/// What came of a job.
pub struct Outcome {
    /// How it was trained.
    pub config: TrainConfig,
    /// All steps.
    pub report: TrainReport,
    /// Held-out loss before.
    pub before: Option<Evaluation>,
    /// Held-out loss after.
    pub after: Option<Evaluation>,
    /// Rows that it was trained on.
    pub rows: usize,
    /// Digest of the training data.
    pub data_digest: String,
    /// Why the run ended before its end, if that was a failure.
    pub failure: Option<String>,
}

impl Outcome {
    /// What a script reads of a run.
    pub fn summary(&self) -> Map<String, Value> {
        let summary = json!({
            "steps": self.report.steps.len(),
            "train_loss": self.report.train_loss(),
            "eval_loss_before": self.before.map(|eval| eval.loss),
            "eval_loss": self.after.map(|eval| eval.loss),
            "tokens_per_second": self.report.tokens_per_second(),
            "peak_memory_bytes": peak_memory_bytes(),
            "interrupted": self.report.interrupted,
        });
        let mut summary = match summary {
            Value::Object(summary) => summary,
            _ => Map::new(),
        };
        summary.extend(self.failure.clone().map(|failure| ("failure".to_owned(), failure.into())));
        summary
    }

    /// Writes an adapter, or for a strategy that trains the base's own weights a model, into a directory in the making; with
    /// `homeroom.json` and `trainer_state.json` beside either.
    ///
    /// # Errors
    /// When the disk is full, or anything else fails.
    pub fn write(&self, job: &Job, directory: &NewDirectory, parent: Option<&str>) -> Result<()> {
        let (adaptation, strategy) = job.now();
        let mut training = json!({
            "config": self.config,
            "options": job.options,
            "init_from": job.init_from,
            "parent": parent,
            "rows": self.rows,
            "eval_rows": self.before.map(|eval| eval.examples),
            "finished": when::text(SystemTime::now()),
            "result": self.summary(),
        });
        if !self.report.events.is_empty() {
            training["events"] = json!(self.report.events);
        }
        let (data_digest, requantize) = (Some(self.data_digest.as_str()), job.requantize);
        let record = Record { strategy: &strategy, data_digest, base_files: job.base_files(), requantize, training };
        if adaptation.is_whole_model() {
            save_model(directory, &merge(&job.model, &adaptation)?, &job.model, Floats::of(&job.model)?)?;
            let manifest = serde_json::to_value(adapter::manifest(&job.model, &adaptation, record)?)?;
            directory.write(adapter::HOMEROOM_FILE, adapter::pretty(&manifest)?.as_bytes())?;
        } else {
            adapter::save(directory, &job.model, &adaptation, record)?;
        }
        directory.write("trainer_state.json", adapter::pretty(&self.trainer_state())?.as_bytes())
    }

    /// The history of a run in the form of transformers' `trainer_state.json`, which plotting tools read.
    fn trainer_state(&self) -> Value {
        let steps = self.report.steps.iter().map(|step| {
            json!({
                "step": step.step,
                "epoch": step.epoch,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "learning_rate": step.learning_rate,
            })
        });
        let mut history: Vec<Value> = steps.collect();
        let last = self.report.steps.last();
        let (steps, epoch) = (last.map_or(0, |step| step.step), last.map_or(0.0, |step| step.epoch));
        history.extend(self.after.map(|eval| json!({"step": steps, "epoch": epoch, "eval_loss": eval.loss})));
        json!({
            "best_metric": null,
            "best_model_checkpoint": null,
            "epoch": epoch,
            "global_step": steps,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": history,
            "max_steps": self.report.planned_steps,
            "num_train_epochs": self.config.epochs,
            "total_flos": 0,
            "trial_name": null,
            "trial_params": null,
        })
    }
}
