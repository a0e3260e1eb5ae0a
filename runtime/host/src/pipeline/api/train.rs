//! `fine_tune`: options to a training job, callbacks between its steps, and the result as a plain table.

use std::path::Path;

use anyhow::{Context, Result};
use homeroom_engine::data::{Example, note_endless};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Objective, Sft};
use homeroom_engine::train::{Broken, Control, Data, EvalReport, Observer, StepReport, TrainConfig, planned_steps};
use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json, json};

use super::dataset::Encoded;
use super::model::{DRY, ModelSpec};
use super::options::Options;
use super::spec::{STRATEGY_NAMES, verb};
use super::value::{to_json, to_lua, words};
use super::{NewAdapter, Session};
use crate::job::defaults::{self, Open};
use crate::job::{Job, Outcome, Recording, Resumed, Saving, Taken};
use crate::models::{self, with_text};
use crate::near::did_you_mean;
use crate::pipeline::errors::{Failure, nearest, raised, said, short};
use crate::pipeline::sandbox::shown;
use crate::plugin::Plugin;
use crate::progress::{self, millions, thousands};

/// What `stopped` says of a training that did all its steps.
const FINISHED: &str = "finished";

/// Trains, or in a dry run says what would be trained.
pub fn fine_tune(lua: &Lua, session: &Session, argument: Value) -> Result<Value, Failure> {
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
    let plugin = session.plugin(&strategy)?;
    check_options(&plugin, &spec.options)?;
    config(&options, None).check().context("fine_tune")?;

    let mut model = spec.load_base(session)?;
    let init_from = spec.adapter_path(session)?;
    if let Some(adapter) = &init_from {
        model = with_text(adapter, model)?;
    }
    let rows = options.dataset("dataset").context("`read` saw that a required option is there")?;
    let data = rows.encode(session.clock(), &model).context("dataset")?;
    let eval = options.dataset("eval").map(|eval| eval.encode(session.clock(), &model)).transpose().context("eval")?;
    let requantize = options.flag("requantize").unwrap_or(false);
    let mut job = Job::new(model, &plugin, spec.options.clone(), options.seed(), init_from.as_deref(), requantize)?;
    job.watch = session.search.watching();
    let mut config = config(&options, job.proposed_learning_rate);
    let open = Open {
        epochs: options.whole("num_train_epochs").or(options.whole("max_steps")).is_none(),
        batch_size: options
            .whole("per_device_train_batch_size")
            .or(options.whole("gradient_accumulation_steps"))
            .is_none(),
    };
    let chosen = defaults::choose(&mut config, open, data.examples.len());
    let steps = planned_steps(data.examples.len(), &config).context("fine_tune")?;
    restate(session, &spec, &job, &data, eval.as_ref(), &config, steps);
    if let Some(chosen) = chosen {
        session.tell(format_args!("note: {chosen}"));
    }
    if session.dry {
        return dry(lua, session, &spec, &job, &data, eval.as_ref(), steps);
    }

    // A directory that cannot be written is found out now, not after hours. The one that is filled is made when there is
    // something to fill it with, so that a run that is killed leaves nothing.
    let NewAdapter { run, number, id, path } = session.new_adapter()?;
    drop(NewDirectory::start(&path)?);
    let parent = spec.parent(session);
    let trained: Vec<&Example> = data.examples.iter().collect();
    let held_out: Vec<&Example> = eval.iter().flat_map(|eval| &eval.examples).collect();
    let saving = Saving::of(options.whole("save_steps"), options.number("save_minutes"));
    let mut recording = Recording::new(&run, number, saving)?;
    let from = None::<Resumed>;
    let state = lua.create_table()?;
    if let Some(from) = &from
        && let Value::Table(kept) = to_lua(lua, &from.of_observer()["state"])?
    {
        kept.for_each(|key: Value, value: Value| state.raw_set(key, value))?;
    }
    let mut watcher = Watcher {
        lua,
        session,
        options: &options,
        kept: from.as_ref().map_or(Json::Null, |from| from.of_observer()["state"].clone()),
        state,
        bar: Some(progress::Training::start(steps)),
        evaluating: None,
        stopped: None,
        raised: None,
    };
    let units = Data::of_examples(&trained, &held_out);
    let (report, failure) = match job.train(&units, &Sft, &config, &mut watcher, Some(&mut recording), from) {
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
    let (objective, of_run) = (Sft.name(), Some(run.id().to_owned()));
    let outcome = Outcome { config, report, objective, run: of_run, rows, data_digest, failure };
    let path = outcome.save(&job, &path, Taken::Replaced, parent.as_deref())?;
    let (before, after) = (outcome.report.before(), outcome.report.after());
    if let (Some(before), Some(after)) = (before, after) {
        session.tell(format_args!("held-out  loss {:.4} before, {:.4} after", before.loss, after.loss));
    }
    if let Some(why) = &outcome.report.stopped {
        session.tell(format_args!("stopped   {why}"));
    }
    if let Some(step) = outcome.report.kept_step {
        session.tell(format_args!("result    of step {step}, the best on the held-out rows"));
    }
    let done = outcome.report.steps.len();
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
    spec.adapter = Some(id);
    let table = spec.to_table(lua)?;
    let metrics = lua.create_table()?;
    metrics.set("eval_loss", after.map(|eval| eval.loss))?;
    metrics.set("eval_loss_before", before.map(|eval| eval.loss))?;
    metrics.set("train_loss", outcome.report.train_loss())?;
    metrics.set("steps", done)?;
    metrics.set("planned_steps", steps)?;
    table.set("metrics", metrics)?;
    let stopped = stopped.or(outcome.report.stopped);
    table.set("stopped", stopped.as_deref().unwrap_or(FINISHED))?;
    Ok(Value::Table(table))
}

/// What a dry run says of a training. Its losses are not numbers, so that a script's comparisons with them are false.
fn dry(
    lua: &Lua,
    session: &Session,
    spec: &ModelSpec,
    job: &Job,
    data: &Encoded,
    eval: Option<&Encoded>,
    steps: u64,
) -> Result<Value, Failure> {
    let (trainable, all) = (job.adaptation.trainable_count(), job.model.parameter_count());
    let held_out = eval.map_or(0, |eval| eval.examples.len());
    session.would(
        lua,
        format!(
            "train   {} with {}: {} examples ({} tokens), {held_out} held out, {} steps, {} of {} parameters",
            spec.base,
            job.strategy.name,
            thousands(data.examples.len()),
            thousands(data.tokens()),
            thousands(steps as usize),
            thousands(trainable),
            thousands(all),
        ),
        json!({
            "verb": "fine_tune",
            "model": spec.base,
            "strategy": job.strategy.name,
            "options": spec.options,
            "examples": data.examples.len(),
            "tokens": data.tokens(),
            "held_out": held_out,
            "steps": steps,
            "trainable_parameters": trainable,
            "parameters": all,
        }),
    )?;
    let table = ModelSpec { adapter: Some(DRY.to_owned()), ..spec.clone() }.to_table(lua)?;
    let metrics = lua.create_table()?;
    let loss = eval.map(|_| f64::NAN);
    metrics.set("eval_loss", loss)?;
    metrics.set("eval_loss_before", loss)?;
    metrics.set("train_loss", f64::NAN)?;
    metrics.set("steps", steps)?;
    metrics.set("planned_steps", steps)?;
    table.set("metrics", metrics)?;
    table.set("stopped", FINISHED)?;
    Ok(Value::Table(table))
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

fn config(options: &Options, proposed: Option<f64>) -> TrainConfig {
    let default = TrainConfig::default();
    let count = |name: &str, default: usize| options.whole(name).map_or(default, |count| count as usize);
    TrainConfig {
        epochs: options.whole("num_train_epochs").unwrap_or(default.epochs),
        max_steps: options.whole("max_steps"),
        batch_size: count("per_device_train_batch_size", default.batch_size),
        gradient_accumulation_steps: count("gradient_accumulation_steps", default.gradient_accumulation_steps),
        learning_rate: options.number("learning_rate").or(proposed).unwrap_or(defaults::LEARNING_RATE),
        lr_scheduler_type: options.word("lr_scheduler_type").unwrap_or(default.lr_scheduler_type),
        warmup_ratio: options.number("warmup_ratio").unwrap_or(default.warmup_ratio),
        weight_decay: options.number("weight_decay").unwrap_or(default.weight_decay),
        max_grad_norm: options.number("max_grad_norm").unwrap_or(default.max_grad_norm),
        seed: options.seed(),
        shuffle: options.flag("shuffle").unwrap_or(default.shuffle),
        gradient_checkpointing: options.flag("gradient_checkpointing").unwrap_or(default.gradient_checkpointing),
        packing: options.flag("packing").unwrap_or(default.packing),
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
    data: &Encoded,
    eval: Option<&Encoded>,
    config: &TrainConfig,
    steps: u64,
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
    let held_out = eval.map_or_else(String::new, |eval| format!(", {} held out", thousands(eval.examples.len())));
    let left_out = match (data.skipped, data.truncated) {
        (0, 0) => String::new(),
        (skipped, 0) => format!(", {skipped} left out as too long"),
        (_, truncated) => format!(", {truncated} cut to length"),
    };
    let count = thousands(data.examples.len());
    session.tell(format_args!("data      {count} examples, {} tokens{held_out}{left_out}", thousands(data.tokens())));
    if let Some(note) = note_endless(data.endless, data.examples.len()) {
        session.tell(note);
    }
    session.tell(format_args!(
        "training  {} steps of {} x {} examples   learning rate {:.1e}, {}   seed {}",
        thousands(steps as usize),
        config.gradient_accumulation_steps,
        config.batch_size,
        config.learning_rate,
        config.lr_scheduler_type.name(),
        config.seed,
    ));
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
    evaluating: Option<progress::Counting>,
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
        let bar = self.evaluating.get_or_insert_with(|| progress::counting("evaluating", all));
        bar.set_position(done as u64);
        if done == all
            && let Some(bar) = self.evaluating.take()
        {
            bar.finish_and_clear();
        }
    }

    fn memory(&mut self) -> Result<Json> {
        Ok(json!({"state": self.kept}))
    }

    fn is_cancelled(&mut self) -> bool {
        self.raised.is_some() || self.session.clock().cancelled()
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
