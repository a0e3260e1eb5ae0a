//! `homeroom fine-tune`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::adaptation::Adaptation;
use homeroom_engine::adapter::{self, AdapterFiles, Record};
use homeroom_engine::data::{Dataset, Example};
use homeroom_engine::files::{NewDirectory, vacant};
use homeroom_engine::merge::{merge, save_model};
use homeroom_engine::model::BaseModel;
use homeroom_engine::train::{
    Control, Evaluation, StepReport, TrainConfig, TrainReport, evaluate_examples, planned_steps, train,
};
use serde_json::{Map, Value, json};

use super::{load_base, load_rows, print};
use crate::cli::{Done, FineTune};
use crate::plugin::{Plugin, Search};
use crate::progress::{self, line, thousands};
use crate::{interrupt, machine};

/// The strategy's learning rate when neither it nor the user says one.
const DEFAULT_LEARNING_RATE: f64 = 2e-4;

/// Trains, and saves an adapter or a model.
pub fn run(arguments: &FineTune) -> Result<Done> {
    // What costs nothing to refuse is refused before a model is loaded.
    if !arguments.overwrite {
        vacant(&arguments.output_dir)?;
    }
    spares_inputs(arguments)?;
    let plugin = Search::new(&arguments.plugin_dir).load(&arguments.strategy)?;
    let model = load_base(&arguments.model_name)?;
    let request = PlanRequest { options: options(arguments), model: model.info() };
    let plan = plugin.plan(&request)?;
    let config = config(arguments, plan.defaults.learning_rate);
    let mut adaptation = Adaptation::new(&model, plan, arguments.seed)
        .with_context(|| format!("strategy `{}`", plugin.description.name))?;
    if let Some(path) = &arguments.init_from {
        let files = AdapterFiles::read(path)?;
        adaptation.load(files.into_tensors()).with_context(|| format!("--init-from {}", path.display()))?;
    }
    let rows = Rows::load(arguments, &model)?;
    // A directory that cannot be written is found out now, not after hours. The one that is filled is made when there is
    // something to fill it with, so that a run that is killed leaves nothing.
    drop(NewDirectory::start(&arguments.output_dir)?);
    let run = Started { model: &model, adaptation: &adaptation, plugin: &plugin, config: &config, rows: &rows };
    interrupt::listen()?;
    restate(&run, arguments);
    let held_out = rows.eval();
    // Started from an adapter, a run is compared with that adapter.
    let first = arguments.init_from.as_ref().map(|_| &adaptation);
    let before = evaluate(&model, first, &held_out)?;
    let report = run.train()?;
    let after = evaluate(&model, Some(&adaptation), &held_out)?;
    let summary = summary(arguments, &report, before, after);
    let training = json!({"config": config, "options": request.options, "result": summary});
    let record = Record { strategy: &plugin.record(), data_digest: Some(&rows.data.digest), training };
    let directory = NewDirectory::start(&arguments.output_dir)?;
    interrupt::unfinished(Some(directory.path()));
    save(&directory, &model, &adaptation, record)?;
    let state = trainer_state(&report, &config, after);
    directory.write("trainer_state.json", adapter::pretty(&state)?.as_bytes())?;
    interrupt::unfinished(None);
    let output_dir = publish(directory, arguments)?;
    tell(&output_dir, &report, before, after);
    if arguments.json {
        print(&summary.to_string())?;
    }
    Ok(if report.interrupted { Done::Interrupted } else { Done::Whole })
}

/// Refuses an output directory that holds what the run reads, since replacing it would take that away.
fn spares_inputs(arguments: &FineTune) -> Result<()> {
    // What is not there yet holds nothing.
    let Ok(output) = arguments.output_dir.canonicalize() else { return Ok(()) };
    let inputs = [
        ("the base model", Some(&arguments.model_name)),
        ("the training file", Some(&arguments.training_file)),
        ("the file of held-out rows", arguments.eval_file.as_ref()),
        ("the working directory", std::env::current_dir().ok().as_ref()),
        // To go on from an adapter and put the result in its place is fine; from one inside it is not.
        ("the adapter to start from", arguments.init_from.as_ref().filter(|path| !is_same(path, &output))),
    ]
    .map(|(what, path)| (what, path.and_then(|path| path.canonicalize().ok())));
    for (what, path) in inputs {
        if path.is_some_and(|path| path.starts_with(&output)) {
            bail!("{}: {what} is in it, and would be lost; name a new directory", arguments.output_dir.display());
        }
    }
    Ok(())
}

fn is_same(path: &Path, canonical: &Path) -> bool {
    path.canonicalize().is_ok_and(|path| path == canonical)
}

/// Gives the finished directory its name, unless something came to be there that nobody agreed to replace.
fn publish(directory: NewDirectory, arguments: &FineTune) -> Result<PathBuf> {
    match vacant(&arguments.output_dir) {
        Err(error) if !arguments.overwrite => {
            let kept = directory.keep()?;
            Err(error)
                .with_context(|| format!("the run is done and saved in {}, but not where it should be", kept.display()))
        }
        _ => directory.publish(),
    }
}

/// A run whose parts are all there.
struct Started<'a> {
    model: &'a BaseModel,
    adaptation: &'a Adaptation,
    plugin: &'a Plugin,
    config: &'a TrainConfig,
    rows: &'a Rows,
}

impl Started<'_> {
    fn train(&self) -> Result<TrainReport> {
        let examples = self.rows.train();
        let mut bar = progress::Training::start(planned_steps(examples.len(), self.config));
        let mut observer = |step: &StepReport, steps| {
            bar.step(step, steps);
            if interrupt::asked() { Control::Stop } else { Control::Continue }
        };
        let report = train(self.model, self.adaptation, &examples, self.config, &mut observer)?;
        bar.end();
        Ok(report)
    }
}

/// The strategy's options, by PEFT's names.
fn options(arguments: &FineTune) -> Map<String, Value> {
    let mut options = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            options.insert(name.to_owned(), value);
        }
    };
    set("r", arguments.lora_r.map(Value::from));
    set("lora_alpha", arguments.lora_alpha.map(Value::from));
    set("lora_dropout", arguments.lora_dropout.map(Value::from));
    set("target_modules", arguments.target_modules.as_deref().map(targets));
    for (name, value) in &arguments.options {
        set(name, Some(value.clone()));
    }
    options
}

/// `all-linear`, a list of names, or a regular expression.
fn targets(text: &str) -> Value {
    let plain = |c: char| c.is_alphanumeric() || "_.,".contains(c);
    if text == "all-linear" || !text.chars().all(plain) {
        return text.into();
    }
    text.split(',').filter(|name| !name.is_empty()).collect()
}

fn config(arguments: &FineTune, proposed: Option<f64>) -> TrainConfig {
    TrainConfig {
        epochs: arguments.epochs,
        max_steps: arguments.max_steps,
        batch_size: arguments.batch_size as usize,
        gradient_accumulation_steps: arguments.gradient_accumulation_steps as usize,
        learning_rate: arguments.learning_rate.or(proposed).unwrap_or(DEFAULT_LEARNING_RATE),
        lr_scheduler_type: arguments.lr_scheduler_type.into(),
        warmup_ratio: arguments.warmup_ratio,
        weight_decay: arguments.weight_decay,
        max_grad_norm: arguments.max_grad_norm,
        seed: arguments.seed,
        shuffle: !arguments.no_shuffle,
        gradient_checkpointing: arguments.gradient_checkpointing,
    }
}

/// The rows of a run.
struct Rows {
    data: Dataset,
    /// Indices of the examples to train on.
    train: Vec<usize>,
    /// Held-out examples of a file of their own.
    eval_file: Option<Dataset>,
    /// Indices of held-out examples among the training file's.
    eval: Vec<usize>,
}

impl Rows {
    fn load(arguments: &FineTune, model: &BaseModel) -> Result<Self> {
        let data = load_rows(&arguments.training_file, model, &arguments.rows)?;
        let eval_file = arguments.eval_file.as_ref().map(|file| load_rows(file, model, &arguments.rows)).transpose()?;
        let (train, eval) = match arguments.eval_fraction {
            Some(share) if share > 0.0 => data.split(share, arguments.seed)?,
            _ => ((0..data.examples.len()).collect(), Vec::new()),
        };
        Ok(Self { data, train, eval_file, eval })
    }

    fn train(&self) -> Vec<&Example> {
        self.train.iter().map(|index| &self.data.examples[*index]).collect()
    }

    fn eval(&self) -> Vec<&Example> {
        match &self.eval_file {
            Some(file) => file.examples.iter().collect(),
            None => self.eval.iter().map(|index| &self.data.examples[*index]).collect(),
        }
    }
}

/// Loss on the held-out examples, if there are any.
fn evaluate(model: &BaseModel, adaptation: Option<&Adaptation>, examples: &[&Example]) -> Result<Option<Evaluation>> {
    if examples.is_empty() || interrupt::asked() {
        return Ok(None);
    }
    let bar = progress::counting("evaluating", examples.len());
    let result = evaluate_examples(model, adaptation, examples, 8, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    result.map(Some)
}

/// Restates the run, so that a wrong one is seen before it has cost anything.
fn restate(run: &Started<'_>, arguments: &FineTune) {
    let Started { model, adaptation, plugin, config, rows } = run;
    let parameters = model.parameter_count();
    let trained = adaptation.trainable_count();
    let millions = |count: usize| count as f64 / 1e6;
    let share = 100.0 * trained as f64 / parameters as f64;
    line(format_args!(
        "model     {}   {:.1} M parameters, {}",
        arguments.model_name.display(),
        millions(parameters),
        model.storage_words()
    ));
    line(format_args!(
        "strategy  {} {}   {:.2} M trained ({share:.2} %) in {} modules   f32, plain blocks",
        plugin.description.name,
        plugin.description.version,
        millions(trained),
        adaptation.plan.modules.len(),
    ));
    let held_out = rows.eval().len();
    let held_out = if held_out > 0 { format!(", {} held out", thousands(held_out)) } else { String::new() };
    let left_out = match (rows.data.skipped, rows.data.truncated) {
        (0, 0) => String::new(),
        (skipped, 0) => format!(", {skipped} left out as too long"),
        (_, truncated) => format!(", {truncated} cut to length"),
    };
    let how = match model.template {
        Some(_) => "by the model's chat template",
        None => "as plain text",
    };
    line(format_args!(
        "data      {}   {} examples{held_out}{left_out}, {how}",
        arguments.training_file.display(),
        thousands(rows.train.len()),
    ));
    line(format_args!(
        "training  {} steps of {} x {} examples   learning rate {:.1e}, {:?}   seed {}",
        thousands(planned_steps(rows.train.len(), config) as usize),
        config.gradient_accumulation_steps,
        config.batch_size,
        config.learning_rate,
        config.lr_scheduler_type,
        config.seed,
    ));
}

/// What a script reads of a run.
fn summary(arguments: &FineTune, report: &TrainReport, before: Option<Evaluation>, after: Option<Evaluation>) -> Value {
    json!({
        "output_dir": std::path::absolute(&arguments.output_dir).unwrap_or_else(|_| arguments.output_dir.clone()),
        "steps": report.steps.len(),
        "train_loss": report.train_loss(),
        "eval_loss_before": before.map(|eval| eval.loss),
        "eval_loss": after.map(|eval| eval.loss),
        "tokens_per_second": report.tokens_per_second(),
        "peak_memory_bytes": machine::peak_memory_bytes(),
        "interrupted": report.interrupted,
    })
}

/// An adapter, or for a strategy that trains the base's own weights a model; with `homeroom.json` beside either.
fn save(directory: &NewDirectory, model: &BaseModel, adaptation: &Adaptation, record: Record<'_>) -> Result<()> {
    if !adaptation.is_whole_model() {
        return adapter::save(directory, model, adaptation, record);
    }
    save_model(directory, &merge(model, adaptation)?, model)?;
    let manifest = serde_json::to_value(adapter::manifest(model, adaptation, record)?)?;
    directory.write(adapter::HOMEROOM_FILE, adapter::pretty(&manifest)?.as_bytes())
}

/// The history of a run in the form of transformers' `trainer_state.json`, which plotting tools read.
fn trainer_state(report: &TrainReport, config: &TrainConfig, after: Option<Evaluation>) -> Value {
    let mut history: Vec<Value> = report
        .steps
        .iter()
        .map(|step| {
            json!({
                "step": step.step,
                "epoch": step.epoch,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "learning_rate": step.learning_rate,
            })
        })
        .collect();
    let last = report.steps.last();
    let (steps, epoch) = (last.map_or(0, |step| step.step), last.map_or(0.0, |step| step.epoch));
    history.extend(after.map(|eval| json!({"step": steps, "epoch": epoch, "eval_loss": eval.loss})));
    json!({
        "best_metric": null,
        "best_model_checkpoint": null,
        "epoch": epoch,
        "global_step": steps,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": history,
        "max_steps": report.planned_steps,
        "num_train_epochs": config.epochs,
        "total_flos": 0,
        "trial_name": null,
        "trial_params": null,
    })
}

/// What was written, and what to do next.
fn tell(path: &Path, report: &TrainReport, before: Option<Evaluation>, after: Option<Evaluation>) {
    if let (Some(before), Some(after)) = (before, after) {
        line(format_args!("held-out  loss {:.4} before, {:.4} after", before.loss, after.loss));
    }
    let done = report.steps.len();
    line(format_args!("saved     {}", path.display()));
    if report.interrupted {
        line(format_args!(
            "stopped after step {done} of {}; what it had learned by then is saved",
            report.planned_steps
        ));
        line(format_args!(
            "next      go on from it: the same command with --init-from {} and a new --output-dir",
            path.display()
        ));
    } else {
        line(format_args!("next      homeroom chat --model-dir {} --prompt \"...\"", path.display()));
    }
}
