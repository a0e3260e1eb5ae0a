//! `fine_tune`: options to a training job, callbacks between its steps, and the result as a plain table.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use homeroom_engine::data::{EncodedRows, Group, note_endless};
use homeroom_engine::estimate::Sketch;
use homeroom_engine::files::NewDirectory;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Kind as ObjectiveKind, ObjectiveConfig};
use homeroom_engine::train::{
    Broken, Change, Control, Data, EvalReport, Observer, State, StepReport, TrainConfig, checkpoint, planned_steps,
};
use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json, json};

use super::dataset::Dataset;
use super::imagined::{self, Needs};
use super::model::ModelSpec;
use super::options::Options;
use super::session::NewAdapter;
use super::spec::{STRATEGY_NAMES, verb};
use super::stored::{Made, Step};
use super::value::{to_json, to_lua, words};
use super::{Session, identity, resumed};
use crate::job::defaults::{self, Open};
use crate::job::fit::{self, Asked, Otherwise, Planned};
use crate::job::{Before, Estimator, Job, Outcome, Recording, Saving, Taken, training_words};
use crate::machine::{peak_memory_bytes, reset_peak_memory};
use crate::models::{self, with_text};
use crate::near::did_you_mean;
use crate::pipeline::errors::{Failure, nearest, raised, said, short};
use crate::pipeline::sandbox::shown;
use crate::plugin::{Plugin, native};
use crate::processor;
use crate::progress::{self, millions, thousands};

/// What to do with a checkpoint that cannot be gone on from.
const FRESH: &str = "fine_tune: cannot go on where it was ended; --fresh starts anew";
/// What `stopped` says of a training that did all its steps.
const FINISHED: &str = "finished";

/// Trains, or in a dry run says what would be trained.
pub fn fine_tune(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    // Each would hold its model and moments on top of the other's, and nothing but the stack would end it.
    if session.trains.replace(true) {
        return Err(said("fine_tune: a callback of a training cannot begin another"));
    }
    let tuned = tune(lua, session, argument);
    session.trains.set(false);
    tuned
}

fn tune(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
    let options = Options::read(verb("fine_tune"), argument)?;
    let nil = Value::Nil;
    let mut spec = ModelSpec::read(session, options.get("model").unwrap_or(&nil))?;
    if let Some(from) = options.get("init_from") {
        let from = ModelSpec::read(session, from)?;
        if from.adapter.is_none() {
            return Err(said("fine_tune: `init_from` is a base model; name an adapter, or leave it out"));
        }
        spec.adapter = from.adapter;
    }
    spec.options.extend(options.strategy(session.clock())?);
    let strategy = spec.strategy.get_or_insert_with(|| "lora".to_owned()).clone();
    let stage = session.stages.get() + 1;
    session.stages.set(stage);
    let step = match session.dry {
        true => None,
        false => {
            // What it goes on from is told by its result, so that one of the same bytes and another name is another.
            let more = json!({"plugin": identity::plugin(session, &strategy)?, "parent": spec.parent(session)});
            Some(Step::begin(lua, session, verb("fine_tune"), &options, more)?)
        }
    };
    if let Some((step, entry)) = step.as_ref().and_then(|step| Some((step, step.look_up()?))) {
        let told = format!("from run {}, {:.1} s", entry.run, step.seconds());
        session.tell(format_args!("stage {stage:<3} {told}   {}", summary(&entry.result)));
        let looked_up = json!({"event": "looked_up", "from": entry.run, "adapter": entry.result["adapter"]});
        session.note(looked_up);
        return tuned(lua, spec, &entry.result);
    }
    let plugin = session.plugin(&strategy)?;
    check_options(&plugin, &spec.options)?;
    let objective = objective(&options).context("fine_tune")?;
    config(&options, objective.objective, None).check().context("fine_tune")?;

    reset_peak_memory();
    let mut model = spec.load_base(session)?;
    let init_from = spec.adapter_path(session)?;
    if let Some(adapter) = &init_from {
        model = with_text(adapter, model)?;
    }
    let rows = options.dataset("dataset").context("`read` saw that a required option is there")?;
    session.tell_time_of(step.as_ref().and_then(Step::key));
    let encode = |rows: Dataset| rows.encode(session, &model, objective.objective);
    let data = encode(rows).context("dataset")?;
    let eval = options.dataset("eval").map(encode).transpose().context("eval")?;
    let requantize = options.flag("requantize").unwrap_or(false);
    let adapter = step.as_ref().map(|step| session.new_adapter(step.key())).transpose()?;
    let saving = Saving::of(options.whole("save_steps"), options.number("save_minutes"));
    let recording = match &adapter {
        Some(NewAdapter { run, number, .. }) => Some(Recording::new(run, *number, saving)?),
        None => None,
    };
    let begun = recording.as_ref().and_then(Recording::newest);
    let mut config = self::config(&options, objective.objective, None);
    let is_open = |names: [&str; 2]| names.iter().all(|name| options.whole(name).is_none());
    let epochs = is_open(["num_train_epochs", "max_steps"]);
    let batch_size = epochs && is_open(["per_device_train_batch_size", "gradient_accumulation_steps"]);
    let open = Open { epochs, batch_size };
    let chosen = defaults::choose(&mut config, open, data.groups.len());
    let planned = planned(session, &options, (&plugin, &spec.options), &model, &data, (&config, begun.as_deref()))?;
    let mut job = match &begun {
        None => Job::new(model, &plugin, spec.options.clone(), options.seed(), init_from.as_deref(), requantize)?,
        Some(checkpoint) => {
            let native = |strategy: &_, name: &_| native::find_in(&session.search, strategy, name);
            let plugin = Some(Plugin::clone(&plugin));
            Job::resume(model, checkpoint, plugin, &native, spec.options.clone(), init_from.as_deref())
                .context(FRESH)?
        }
    };
    job.watch = session.search.watching();
    config.learning_rate = self::config(&options, objective.objective, job.proposed_learning_rate).learning_rate;
    let from = match (&recording, &begun) {
        (Some(recording), Some(_)) => Some(recording.resume(&job, &mut config).context(FRESH)?),
        _ => None,
    };
    let steps = planned_steps(data.groups.len(), &config).context("fine_tune")?;
    restate(session, &spec, &job, (&data, eval.as_ref()), (&config, objective, steps));
    if let Some(chosen) = chosen {
        session.tell(format_args!("note: {chosen}"));
    }
    let (Some(step), Some(adapter), Some(mut recording)) = (step, &adapter, recording) else {
        let (spec, options, job, data, config) = (&spec, &options, &job, &data, &config);
        let memory_bytes = Some(planned.peak_memory_bytes);
        return Dry { spec, options, job, data, eval: eval.as_ref(), config, steps, memory_bytes }.run(lua, session);
    };
    planned.words.lines().skip(1).for_each(|words| session.tell(words));
    job.planned = Some(planned);
    if let Some(from) = &from {
        session.tell(format_args!("goes on   after step {} of {steps}", from.state.step));
    }

    // A directory that cannot be written is found out now, not after hours. The one that is filled is made when there is
    // something to fill it with, so that a run that is killed leaves nothing.
    let NewAdapter { run, id, path, .. } = adapter;
    drop(NewDirectory::start(path)?);
    let parent = spec.parent(session);
    let trained: Vec<&Group> = data.groups.iter().collect();
    let held_out: Vec<&Group> = eval.iter().flat_map(|eval| &eval.groups).collect();
    let mut watcher = Watcher {
        lua,
        session,
        options: &options,
        kept: Json::Null,
        state: lua.create_table()?,
        bar: Some(progress::Training::start(steps)),
        stopped: None,
        raised: None,
    };
    from.iter().for_each(|from| watcher.recall(from.of_observer()));
    let mut counting = None;
    let made =
        job.objective(objective, (&trained, &held_out), &config, Some(recording.directory()), &mut |done, all| {
            let bar = counting.get_or_insert_with(|| progress::counting("reference", all));
            bar.set_position(done as u64);
            ensure!(!session.clock().cancelled(), "interrupted");
            Ok(())
        });
    counting.into_iter().for_each(|bar| bar.finish_and_clear());
    session.clock().check()?;
    let made = made.context("fine_tune")?;
    let units = Data::of_groups(&trained, &held_out);
    let (report, failure) = match job.train(&units, &*made, &config, &mut watcher, Some(&mut recording), from) {
        Ok(state) => (state.report, None),
        Err(error) => {
            let Broken { reason, state } = error.downcast()?;
            (state.report, Some(reason))
        }
    };
    let Watcher { bar, stopped, raised, .. } = watcher;
    bar.into_iter().for_each(progress::Training::end);
    let ended = raised.is_some() || session.clock().cancelled();
    let (rows, data_digest) = (trained.len(), data.digest.clone());
    let of_run = Some((run.id().to_owned(), run.token()));
    let outcome = Outcome { config, report, objective, run: of_run, rows, data_digest, forgetting: None, failure };
    let path = outcome.save(&job, path, Taken::Replaced, parent.as_deref())?;
    let (before, after) = (outcome.report.before(), outcome.report.after());
    if let (Some(before), Some(after)) = (before, after) {
        session.tell(format_args!("held-out  loss {:.4} before, {:.4} after", before.loss, after.loss));
    }
    if let Some(why) = stopped.as_ref().or(outcome.report.stopped.as_ref()) {
        session.tell(format_args!("stopped   {why}"));
    }
    if let Some(step) = outcome.report.kept_step {
        session.tell(format_args!("result    of step {step}, the best on the held-out rows"));
    }
    let (done, train_loss, seconds) =
        (outcome.report.steps.len(), outcome.report.train_loss(), outcome.report.seconds());
    if ended {
        session.tell(format_args!(
            "stopped after step {done} of {steps}; what it had learned by then is in {}",
            path.display()
        ));
    }
    if let Some(failure) = &outcome.failure {
        let kept = format!("what it had learned by step {done} is in {}", path.display());
        return Err(said(format!("fine_tune: {failure}; {kept}")));
    }
    if let Some(raised) = raised {
        return Err(raised);
    }
    session.clock().check()?;
    let is_rewound = outcome.report.events.iter().any(|event| matches!(event.change, Change::Rewound { .. }));
    let stopped = stopped.or(outcome.report.stopped);
    let result = json!({
        "adapter": id,
        "metrics": {
            "eval_loss": after.map(|eval| eval.loss),
            "eval_loss_before": before.map(|eval| eval.loss),
            "eval_reward_accuracy": after.and_then(|eval| Some(eval.rewards?.accuracy)),
            "train_loss": train_loss,
            "steps": done,
            "planned_steps": steps,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        },
        "stopped": stopped.as_deref().unwrap_or(FINISHED),
    });
    // What another generation of the strategy had a part in is not what this one makes; and how far a training was taken back depends on
    // when it was saved.
    if is_rewound {
        session.tell("note: it was taken back to a checkpoint, so that a later run makes it again");
    } else if job.now().1.sha256 == job.strategy.sha256 {
        step.keep(Made { result: result.clone(), files: identity::model_files(&path)? })?;
    }
    // It is trained and kept all the same.
    if let Err(error) = resumed::end(recording.directory()) {
        session.tell(format_args!("note: {error:#}"));
    }
    tuned(lua, spec, &result)
}

/// What a training will take. One that is begun and does not fit is refused, or gets smaller passes; one that goes on from a checkpoint,
/// and one that a dry run imagines, does so all the same.
fn planned(
    session: &Session,
    options: &Options,
    (plugin, of_strategy): (&Plugin, &Map<String, Json>),
    model: &BaseModel,
    data: &EncodedRows,
    (config, checkpoint): (&TrainConfig, Option<&Path>),
) -> Result<Planned, Failure> {
    let rows: Vec<&Group> = data.groups.iter().collect();
    let before = Before::now(model);
    let mut request = fit::request(&rows, config, before.program_bytes());
    let cut = checkpoint.and_then(|checkpoint| Some(checkpoint::summary(checkpoint).ok()?.cut));
    if let Some(cut) = &cut {
        request.pass_rows = cut.is_bounded.then_some(cut.pass_rows);
        request.gradient_checkpointing |= cut.gradient_checkpointing;
    }
    let is_checked = options.flag("memory_check").unwrap_or(true);
    let otherwise = match options.flag("fit").unwrap_or(false) {
        true if cut.is_some() || session.dry => Otherwise::TryFit,
        true => Otherwise::Fit,
        false if is_checked && cut.is_none() && !session.dry => Otherwise::Refuse,
        false => Otherwise::Nothing,
    };
    let (sketch, requantize) = (Sketch::of_model(model), options.flag("requantize").unwrap_or(false));
    let estimator = Estimator::of_training(plugin, of_strategy, &sketch, requantize)?;
    Ok(Asked { estimator, request }.check(before, otherwise).context("fine_tune")?)
}

/// What a script gets of a training: the model, and what came of it.
fn tuned(lua: &Lua, mut spec: ModelSpec, result: &Json) -> Result<Value, Failure> {
    spec.adapter = result["adapter"].as_str().map(str::to_owned);
    let table = spec.to_table(lua)?;
    table.set("metrics", to_lua(lua, &result["metrics"])?)?;
    table.set("stopped", to_lua(lua, &result["stopped"])?)?;
    Ok(Value::Table(table))
}

/// A training in a few words.
fn summary(result: &Json) -> String {
    let metrics = &result["metrics"];
    let loss = match metrics["eval_loss"].as_f64() {
        Some(loss) => format!("   held-out loss {loss:.4}"),
        None => String::new(),
    };
    format!("{} steps{loss}   {}", metrics["steps"], result["adapter"].as_str().unwrap_or_default())
}

/// A training that a dry run imagines.
struct Dry<'a> {
    spec: &'a ModelSpec,
    options: &'a Options,
    job: &'a Job,
    data: &'a EncodedRows,
    eval: Option<&'a EncodedRows>,
    config: &'a TrainConfig,
    steps: u64,
    /// Highest memory, where it can be estimated.
    memory_bytes: Option<u64>,
}

impl Dry<'_> {
    /// Says what would be trained and what that needs, and calls the callbacks once.
    fn run(&self, lua: &Lua, session: &Session) -> Result<Value, Failure> {
        let Self { spec, job, data, steps, .. } = *self;
        let (trainable, all) = (job.adaptation.trainable_count(), job.model.parameter_count());
        let held_out = self.eval.map_or(0, |eval| eval.groups.len());
        let tokens = (data.tokens() as f64 * self.epochs()).round() as usize;
        let needs = self.needs();
        session.would(
            lua,
            format!(
                "train   {} with {}: {} examples ({} tokens), {held_out} held out, {} steps ({} tokens), {} of {} parameters; {}",
                spec.base,
                job.strategy.name,
                thousands(data.groups.len()),
                thousands(data.tokens()),
                thousands(steps as usize),
                thousands(tokens),
                thousands(trainable),
                thousands(all),
                needs.words(),
            ),
            json!({
                "verb": "fine_tune",
                "model": spec.base,
                "strategy": job.strategy.name,
                "options": spec.options,
                "examples": data.groups.len(),
                "tokens": data.tokens(),
                "held_out": held_out,
                "steps": steps,
                "trainable_parameters": trainable,
                "parameters": all,
                "needs": needs_json(tokens, &needs),
            }),
        )?;
        let (count, before, together) = session.needs.get().unwrap_or_default();
        session.needs.set(Some((count + 1, before + tokens, if count == 0 { needs } else { together.and(needs) })));
        self.call(lua, session)?;
        let first = session.imagined.steps(spec);
        let loss = |steps| imagined::loss(&job.model, first + steps);
        let result = json!({
            "adapter": session.imagined.adapter(first + steps),
            "metrics": {
                "eval_loss": self.eval.map(|_| loss(steps)),
                "eval_loss_before": self.eval.map(|_| loss(0)),
                "train_loss": (loss(0) + loss(steps)) / 2.0,
                "steps": steps,
                "planned_steps": steps,
                "seconds": 1.0,
                "peak_memory_bytes": needs.memory_bytes.or(peak_memory_bytes()),
            },
            "stopped": FINISHED,
        });
        tuned(lua, spec.clone(), &result)
    }

    /// Passes over the rows.
    fn epochs(&self) -> f64 {
        let per_step = self.config.batch_size as f64 * self.config.gradient_accumulation_steps as f64;
        let epoch_steps = (self.data.groups.len() as f64 / per_step).ceil().max(1.0);
        self.steps as f64 / epoch_steps
    }

    /// What the training needs.
    fn needs(&self) -> Needs {
        Needs { memory_bytes: self.memory_bytes, ..Needs::disk(self.job.adaptation.trainable_count()) }
    }

    /// Calls the callbacks as after the last step, so that a mistake in them is found.
    fn call(&self, lua: &Lua, session: &Session) -> Result<(), Failure> {
        let loss = imagined::loss(&self.job.model, session.imagined.steps(self.spec) + self.steps);
        let mut watcher = Watcher {
            lua,
            session,
            options: self.options,
            state: lua.create_table()?,
            kept: Json::Null,
            bar: None,
            stopped: None,
            raised: None,
        };
        if self.options.function("on_step").is_some() {
            let table = watcher.table(self.steps, self.epochs(), self.steps)?;
            table.set("loss", loss)?;
            table.set("grad_norm", 1.0)?;
            table.set("learning_rate", self.config.learning_rate)?;
            table.set("tokens", self.data.tokens() as f64 * self.epochs() / self.steps as f64)?;
            watcher.call("on_step", table)?;
        }
        // It is called if there are rows to evaluate, and steps to do so.
        let evaluates = self.eval.is_some() && self.config.eval_steps.is_some();
        if evaluates && self.options.function("on_eval").is_some() {
            let table = watcher.table(self.steps, self.epochs(), self.steps)?;
            table.set("eval_loss", loss)?;
            table.set("perplexity", loss.exp())?;
            table.set("token_accuracy", 0.5)?;
            table.set("best", loss)?;
            watcher.call("on_eval", table)?;
        }
        Ok(())
    }
}

/// What trainings need, for who reads it as JSON.
pub fn needs_json(tokens: usize, needs: &Needs) -> Json {
    json!({
        "tokens": tokens,
        "peak_memory_bytes": needs.memory_bytes,
        "disk_bytes": needs.disk_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
    })
}

/// Refuses options that the strategy does not have, before anything is loaded.
fn check_options(plugin: &Plugin, options: &Map<String, Json>) -> Result<(), Failure> {
    let about = &plugin.description;
    let mut problems = Vec::new();
    for (name, value) in options {
        match about.options.iter().find(|option| option.name == *name) {
            Some(option) if option.kind.admits(value) => {}
            Some(option) => problems.push(format!(
                "fine_tune: strategy `{}`: `{name}` should be {}, not {}",
                about.name,
                option.kind.words(),
                short(&value.to_string())
            )),
            None => {
                let known: Vec<&str> = about.options.iter().map(|option| option.name.as_str()).collect();
                let hint = match nearest(name, known.iter().copied()) {
                    Some(near) => format!(", did you mean `{near}`?"),
                    None if known.is_empty() => "; it has none".to_owned(),
                    None => format!("; it has {}", known.join(", ")),
                };
                problems.push(format!("fine_tune: strategy `{}` has no option `{}`{hint}", about.name, short(name)));
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(said(problems.join("\n  "))) }
}

/// What is learned.
fn objective(options: &Options) -> Result<ObjectiveConfig> {
    let [beta, desirable, undesirable] =
        ["beta", "desirable_weight", "undesirable_weight"].map(|name| options.number(name));
    ObjectiveConfig::given(options.word("objective").unwrap_or_default(), beta, desirable, undesirable)
}

fn config(options: &Options, objective: ObjectiveKind, proposed: Option<f64>) -> TrainConfig {
    let default = TrainConfig::default();
    let count = |name: &str, default: usize| options.whole(name).map_or(default, |count| count as usize);
    TrainConfig {
        epochs: options.whole("num_train_epochs").unwrap_or(default.epochs),
        max_steps: options.whole("max_steps"),
        batch_size: count("per_device_train_batch_size", default.batch_size),
        gradient_accumulation_steps: count("gradient_accumulation_steps", default.gradient_accumulation_steps),
        learning_rate: options
            .number("learning_rate")
            .unwrap_or_else(|| proposed.unwrap_or(defaults::LEARNING_RATE) * objective.learning_rate_scale()),
        lr_scheduler_type: options.word("lr_scheduler_type").unwrap_or(default.lr_scheduler_type),
        warmup_ratio: options.number("warmup_ratio").unwrap_or(default.warmup_ratio),
        weight_decay: options.number("weight_decay").unwrap_or(default.weight_decay),
        max_grad_norm: options.number("max_grad_norm").unwrap_or(default.max_grad_norm),
        seed: options.seed(),
        shuffle: options.flag("shuffle").unwrap_or(default.shuffle),
        gradient_checkpointing: options.flag("gradient_checkpointing").unwrap_or(default.gradient_checkpointing),
        packing: options.flag("packing").unwrap_or(default.packing),
        pass_rows: options.whole("pass_tokens").map(|rows| rows as usize),
        neftune_noise_alpha: options.number("neftune_noise_alpha").unwrap_or(default.neftune_noise_alpha),
        compute: options.word("compute").unwrap_or(Compute::Auto),
        eval_steps: options.whole("eval_steps"),
        early_stopping_patience: options.whole("early_stopping_patience"),
        load_best_model_at_end: options.flag("load_best_model_at_end").unwrap_or(default.load_best_model_at_end),
    }
}

/// Restates a training, so that a wrong one is seen before it has cost anything.
fn restate(
    session: &Session,
    spec: &ModelSpec,
    job: &Job,
    (data, eval): (&EncodedRows, Option<&EncodedRows>),
    (config, objective, steps): (&TrainConfig, ObjectiveConfig, u64),
) {
    let Job { model, adaptation, strategy, .. } = job;
    let (all, trained) = (model.parameter_count() as f64, adaptation.trainable_count() as f64);
    let given: Vec<String> =
        STRATEGY_NAMES.iter().filter_map(|name| Some(format!(" {name}={}", spec.options.get(*name)?))).collect();
    let base = Path::new(&spec.base);
    let base = if base.is_absolute() && model.source.is_none() { shown(base) } else { models::shown(model, base) };
    session.tell(format_args!("model     {base}   {:.1} M parameters, {}", all / 1e6, model.storage_words()));
    session.tell(format_args!(
        "strategy  {} {}{}   {} trained ({:.2} %)   {}",
        strategy.name,
        strategy.version,
        given.concat(),
        millions(adaptation.trainable_count()),
        100.0 * trained / all,
        job.blocks(config.compute),
    ));
    session.tell(processor::words());
    if objective.objective != ObjectiveKind::Sft {
        session.tell(format_args!("objective {}", objective.words()));
    }
    if let Some(note) = defaults::balance(objective, &data.groups.iter().collect::<Vec<_>>()) {
        session.tell(format_args!("note: {note}"));
    }
    let held_out = eval.map_or_else(String::new, |eval| format!(", {} held out", thousands(eval.groups.len())));
    let left_out = match (data.skipped, data.truncated) {
        (0, 0) => String::new(),
        (skipped, 0) => format!(", {skipped} left out as too long"),
        (_, truncated) => format!(", {truncated} cut to length"),
    };
    let count = thousands(data.groups.len());
    session.tell(format_args!("data      {count} examples, {} tokens{held_out}{left_out}", thousands(data.tokens())));
    if let Some(note) = note_endless(data.endless, data.groups.len()) {
        session.tell(note);
    }
    session.tell(training_words(steps, config));
}

/// Hears of each step, and lets the script's callbacks hear of it.
struct Watcher<'a> {
    lua: &'a Lua,
    session: &'a Session,
    options: &'a Options,
    /// What callbacks keep, `report.state`, and the same as JSON: it is saved with checkpoints.
    state: Table,
    kept: Json,
    bar: Option<progress::Training>,
    /// Why a callback ended the training.
    stopped: Option<String>,
    /// What a callback raised. It is kept until the training has ended and is saved.
    raised: Option<Failure>,
}

impl Observer for Watcher<'_> {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        if let Some(bar) = &mut self.bar {
            bar.step(report, planned_steps);
        }
        if self.session.clock().cancelled() {
            return Ok(Control::Stop);
        }
        let called = self.after_step(report, planned_steps);
        Ok(self.heeded(called))
    }

    fn on_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Control> {
        let loss = report.evaluation.loss;
        self.session.tell(format_args!("step {:>5}/{planned_steps}   held-out loss {loss:.4}", report.step));
        let called = self.after_eval(report, planned_steps);
        Ok(self.heeded(called))
    }

    fn evaluating(&mut self, done: usize, all: usize) {
        if let Some(bar) = &mut self.bar {
            bar.evaluating(done, all);
        }
    }

    fn memory(&mut self) -> Result<Json> {
        Ok(json!({"state": self.kept, "stopped": self.stopped}))
    }

    fn recall(&mut self, memory: &Json) {
        self.kept = memory["state"].clone();
        self.stopped = memory["stopped"].as_str().map(str::to_owned);
        let fill = || -> mlua::Result<()> {
            self.state.clear()?;
            if let Value::Table(kept) = to_lua(self.lua, &self.kept)? {
                kept.for_each(|key: Value, value: Value| self.state.raw_set(key, value))?;
            }
            Ok(())
        };
        if let Err(error) = fill() {
            self.raised = Some(error.into());
        }
    }

    fn is_cancelled(&mut self) -> bool {
        self.raised.is_some() || self.session.clock().cancelled()
    }

    fn reason(&self) -> Option<String> {
        match &self.raised {
            // What ends the script raises in its callbacks, too.
            _ if self.session.clock().cancelled() => None,
            Some(raised) => Some(format!("a callback failed: {}", raised.brief())),
            None => self.stopped.clone(),
        }
    }

    fn is_due(&mut self, state: &State) -> bool {
        state.report.interrupted && self.raised.is_none() && self.stopped.is_none()
    }
}

impl Watcher<'_> {
    /// What a callback has the training do; what it raised ends it.
    fn heeded(&mut self, called: Result<Option<f64>, Failure>) -> Control {
        match called {
            Err(raised) => {
                self.raised = Some(raised);
                Control::Stop
            }
            Ok(_) if self.stopped.is_some() => Control::Stop,
            Ok(Some(scale)) => Control::ScaleLearningRate(scale),
            Ok(None) => Control::Continue,
        }
    }

    fn after_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Option<f64>, Failure> {
        if self.options.function("on_step").is_none() {
            return Ok(None);
        }
        let table = self.table(report.step, report.epoch, planned_steps)?;
        table.set("loss", report.loss)?;
        table.set("grad_norm", report.grad_norm)?;
        table.set("learning_rate", report.learning_rate)?;
        table.set("tokens", report.tokens)?;
        table.set("reward_accuracy", report.rewards.map(|rewards| rewards.accuracy))?;
        table.set("reward_margin", report.rewards.map(|rewards| rewards.margin))?;
        self.call("on_step", table)
    }

    fn after_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Option<f64>, Failure> {
        if self.options.function("on_eval").is_none() {
            return Ok(None);
        }
        let table = self.table(report.step, report.epoch, planned_steps)?;
        table.set("eval_loss", report.evaluation.loss)?;
        table.set("perplexity", report.evaluation.perplexity)?;
        table.set("token_accuracy", report.evaluation.token_accuracy)?;
        table.set("reward_accuracy", report.evaluation.rewards.map(|rewards| rewards.accuracy))?;
        table.set("reward_margin", report.evaluation.rewards.map(|rewards| rewards.margin))?;
        table.set("best", report.lowest)?;
        self.call("on_eval", table)
    }

    fn table(&self, step: u64, epoch: f64, planned_steps: u64) -> mlua::Result<Table> {
        let table = self.lua.create_table()?;
        table.set("step", step)?;
        table.set("steps", planned_steps)?;
        table.set("epoch", epoch)?;
        table.set("state", &self.state)?;
        Ok(table)
    }

    /// Calls a callback and reads its directive: a scale of the learning rate, or that the training is to stop.
    fn call(&mut self, name: &str, report: Table) -> Result<Option<f64>, Failure> {
        let function = &self.options.function(name).cloned().context("the caller saw that it is there")?;
        let answer = {
            let _running = self.session.clock().resume();
            function.call::<Value>(report)?
        };
        let raise = |message: String| raised(function, format_args!("fine_tune: {name}: {message}"));
        // Here, where it is known who kept what cannot be saved.
        let kept = to_json(self.session.clock(), &Value::Table(self.state.clone()));
        self.kept = kept.map_err(|failure| raise(format!("report.state: {:#}", failure.into_error())))?;
        let table = match answer {
            Value::Nil => return Ok(None),
            Value::Table(table) => table,
            other => return Err(raise(format!("it returned {}, not nil or a table", words(&other)))),
        };
        let mut scale = None;
        for pair in table.pairs::<Value, Value>() {
            let (key, value) = pair?;
            let Value::String(key) = key else {
                return Err(raise("a directive is a table of names, such as { stop = \"the reason\" }".to_owned()));
            };
            match (&*key.to_string_lossy(), &value) {
                ("stop", Value::String(reason)) => self.stopped = Some(reason.to_string_lossy()),
                ("stop", other) => {
                    return Err(raise(format!("`stop` should be the reason, as a string, not {}", words(other))));
                }
                ("learning_rate_scale", value) => {
                    let number = value.as_number().or_else(|| value.as_integer().map(|number| number as f64));
                    let number = number.filter(|number| number.is_finite() && *number >= 0.0);
                    let wrong =
                        || raise(format!("`learning_rate_scale` should be a number from 0, not {}", words(value)));
                    scale = Some(number.ok_or_else(wrong)?);
                }
                (other, _) => {
                    let near = nearest(other, ["stop", "learning_rate_scale"]);
                    return Err(raise(format!("unknown directive `{}`{}", short(other), did_you_mean(near))));
                }
            }
        }
        Ok(scale)
    }
}
