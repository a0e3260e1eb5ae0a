//! `homeroom fine-tune`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail, ensure};
use clap::{ArgGroup, Args};
use homeroom_engine::adapt::adapter::is_adapter;
use homeroom_engine::data::{Dataset, Example, check_jsonl, note_endless};
use homeroom_engine::files::{NewDirectory, broken_link, replaceable, utf8, vacant};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::schedule::Schedule;
use homeroom_engine::train::{Broken, Control, Evaluation, StepReport, TrainConfig, TrainReport, planned_steps};
use serde_json::{Map, Value};

use super::arguments::{
    COMPUTE, COUNT_MAX, PluginArgs, RowArgs, Word, above_zero, key_value, not_negative, one_of, rate, share, whole,
};
use super::{Done, is_same, print, spares, this_program};
use crate::interrupt;
use crate::job::{Job, Outcome};
use crate::keep::Taken;
use crate::models::{Network, Use, here, last_part, load_base, load_rows, locate, refuse_other, shown, with_text};
use crate::near::exists;
use crate::progress::{self, line, millions, thousands};
use crate::registry;

/// Arguments of `fine-tune`.
#[derive(Args)]
#[command(group(ArgGroup::new("place").args(["output_dir", "name"])))]
pub struct Arguments {
    /// Base model: a name on the Hugging Face hub as `owner/name`, a directory, a .gguf file, or a name from `homeroom list-models`
    #[arg(long, value_name = "MODEL")]
    model_name: PathBuf,
    /// JSONL file of rows: `messages`, `prompt` and `completion`, or `text`
    #[arg(long, value_name = "FILE")]
    training_file: PathBuf,
    /// Directory for the result: an adapter, or a model with strategy `full`
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Name of the result in `homeroom list-models` [default: the training file's, with a number if it is taken]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replace an earlier result in that directory or of that name
    #[arg(long, requires = "place")]
    overwrite: bool,
    /// Training strategy; `homeroom plugins list` shows what there is
    #[arg(long, default_value = "lora", value_name = "NAME")]
    strategy: String,
    /// Passes over the training rows
    #[arg(long, default_value = "1", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    epochs: u64,
    /// Stop after this many steps, wherever the epoch is
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    max_steps: Option<u64>,
    /// Peak learning rate [default: what the strategy proposes, else 2e-4]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    learning_rate: Option<f64>,
    /// Shape of the learning rate after warm-up
    #[arg(long, default_value = "cosine", value_name = "SHAPE", value_parser = one_of::<Schedule>(&SCHEDULES))]
    lr_scheduler_type: Schedule,
    /// Share of the steps in which the learning rate warms up
    #[arg(long, default_value = "0.03", value_name = "SHARE", value_parser = share)]
    warmup_ratio: f64,
    /// Weight decay of AdamW
    #[arg(long, default_value = "0", value_name = "X", value_parser = share)]
    weight_decay: f64,
    /// Largest norm of the gradients, which are scaled down to it; 0 sets no limit
    #[arg(long, default_value = "1", value_name = "NORM", value_parser = not_negative)]
    max_grad_norm: f64,
    /// Rank of the adapter [default: 16]
    #[arg(long, alias = "r", value_name = "R", value_parser = whole::<u64>(0..=u64::MAX))]
    lora_r: Option<u64>,
    /// Alpha of the adapter, whose update is scaled by alpha / r [default: 2 r]
    #[arg(long, value_name = "ALPHA", value_parser = above_zero)]
    lora_alpha: Option<f64>,
    /// Dropout on the adapter's input [default: 0]
    #[arg(long, value_name = "P", value_parser = share)]
    lora_dropout: Option<f64>,
    /// Modules to adapt: all-linear, names separated by commas, or one regular expression [default: all-linear]
    #[arg(long, value_name = "NAMES")]
    target_modules: Option<String>,
    /// Any other option of the strategy, its value as JSON or text; `homeroom plugins list` shows them; may be repeated
    #[arg(long = "set-option", value_name = "KEY=VALUE", value_parser = key_value)]
    options: Vec<(String, Value)>,
    /// Start from the weights of this adapter: a directory, a name from `homeroom list-models` or one on the Hugging Face hub
    #[arg(long, value_name = "MODEL")]
    init_from: Option<PathBuf>,
    /// Rows of one batch
    #[arg(long, default_value = "8", value_name = "ROWS", value_parser = whole::<u32>(1..=COUNT_MAX))]
    batch_size: u32,
    /// Batches of one step
    #[arg(long, default_value = "1", value_name = "N", value_parser = whole::<u32>(1..=COUNT_MAX))]
    gradient_accumulation_steps: u32,
    /// Save memory: keep only the input of each layer, and compute the layer again in the backward pass
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Compute each batch in a pass of its own; else a pass is filled with as many rows of the step as fit
    #[arg(long)]
    no_packing: bool,
    /// Encode a base that is already quantised (GGUF) again, as the strategy asks; else it keeps its storage
    #[arg(long)]
    requantize: bool,
    /// Number format of the products
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = one_of::<Compute>(&COMPUTE))]
    compute: Compute,
    #[command(flatten)]
    rows: RowArgs,
    /// JSONL file of held-out rows; their loss is measured before and after the training
    #[arg(long, value_name = "FILE", conflicts_with = "eval_fraction")]
    eval_file: Option<PathBuf>,
    /// Share of the training rows to hold out instead
    #[arg(long, value_name = "SHARE", value_parser = share)]
    eval_fraction: Option<f64>,
    /// Seed of the order of rows, of first values and of dropout
    #[arg(long, default_value = "42", value_name = "N", value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Keep the rows in the order of the file
    #[arg(long)]
    no_shuffle: bool,
    /// Watch the strategy's file, and continue with a new build of it between two steps
    #[arg(long)]
    watch_plugins: bool,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

const SCHEDULES: [Word; 3] = [
    ("cosine", "Half a cosine from the peak to zero"),
    ("linear", "A straight line from the peak to zero"),
    ("constant", "The peak throughout"),
];

/// The learning rate when neither the strategy nor the user gives one.
const DEFAULT_LEARNING_RATE: f64 = 2e-4;
/// Fewer steps than these leave little trace at the default learning rate, which is said; about as many show, in at most so many epochs.
const STEPS_FEW: u64 = 30;
const STEPS_ENOUGH: u64 = 100;
const EPOCHS_MANY: u64 = 10;

/// Trains, and saves an adapter or a model.
pub fn run(arguments: &Arguments) -> Result<Done> {
    // What costs nothing to refuse is refused before a model is loaded.
    config(arguments, None).check()?;
    let output_dir = place(arguments)?;
    utf8(&std::path::absolute(&output_dir)?)?;
    if !arguments.overwrite {
        vacant(&output_dir).map_err(|error| match arguments.name.as_ref().filter(|_| output_dir.is_dir()) {
            Some(name) if arguments.output_dir.is_none() => anyhow!(
                "{name}: there is a model of this name already\nhint: --overwrite replaces it, another --name keeps both"
            ),
            _ => error,
        })?;
    }
    let files = [Some(&arguments.training_file), arguments.eval_file.as_ref()];
    files.into_iter().flatten().try_for_each(|file| exists(file))?;
    let mut search = arguments.plugins.search()?;
    if arguments.watch_plugins {
        search = search.watched(this_program()?);
    }
    let plugin = search.load(&arguments.strategy)?;
    let options = options(arguments)?;
    plugin.check_options(&options)?;
    // Only now, as they may be downloaded. Rows that no model could be trained on are refused before that.
    let is_missing = |name: &Path| here(name).map(|located| located.is_none());
    if is_missing(&arguments.model_name)? || arguments.init_from.as_deref().map_or(Ok(false), is_missing)? {
        files.into_iter().flatten().try_for_each(|file| check_jsonl(file))?;
    }
    let base = locate(&arguments.model_name, Network::Allowed)?;
    refuse_other(&arguments.model_name, &base.path, Use::Training)?;
    utf8(&base.path.canonicalize().unwrap_or_else(|_| base.path.clone()))?;
    let init_from = arguments.init_from.as_deref().map(start).transpose()?;
    // To go on from an adapter and put the result in its place is fine; from one inside it is not.
    let start = init_from.as_deref().filter(|path| !is_same(path, &output_dir));
    let inputs = [
        ("the base model", Some(base.path.clone())),
        ("the training file", Some(arguments.training_file.clone())),
        ("the file of held-out rows", arguments.eval_file.clone()),
        ("the adapter to start from", start.map(Path::to_owned)),
    ];
    spares(&output_dir, inputs)?;
    if arguments.overwrite {
        replaceable(&output_dir)?;
    }
    let mut model = Arc::new(load_base(&base)?);
    if let Some(adapter) = &init_from {
        model = with_text(adapter, model)?;
    }
    let rows = Rows::load(arguments, &model)?;
    let start = init_from.as_deref();
    let mut job = Job::new(model, &plugin, options, arguments.seed, start, arguments.requantize)?;
    job.watch = search.watching();
    let config = config(arguments, job.proposed_learning_rate);
    // A directory that cannot be written is found out now, not after hours. The one that is filled is made when there is
    // something to fill it with, so that a run that is killed leaves nothing.
    interrupt::listen()?;
    drop(NewDirectory::start(&output_dir)?);
    let steps = planned_steps(rows.train.len(), &config)?;
    let unnamed = arguments.output_dir.is_none() && arguments.name.is_none();
    if unnamed {
        let name = registry::short(&output_dir);
        line(format_args!("name      {name}   --name or --output-dir chooses another"));
    }
    restate(arguments, &job, &rows, &config, steps);
    let held_out = rows.eval();
    let before = evaluate(&job, &held_out)?;
    let (report, mut failure) = match train(&job, &rows.train(), &config, steps) {
        Ok(report) => (report, None),
        Err(error) => {
            let Broken { reason, report } = error.downcast()?;
            (report, Some(reason))
        }
    };
    let after = match failure {
        None => evaluate(&job, &held_out).unwrap_or_else(|error| {
            failure = Some(format!("held-out rows, after the training: {error:#}"));
            None
        }),
        Some(_) => None,
    };
    let (trained, data_digest) = (rows.train.len(), rows.data.digest.clone());
    let outcome = Outcome { config, report, before, after, rows: trained, data_digest, failure };
    if let Some(failure) = &outcome.failure {
        bail!("{failure}\n{}", outcome.save_beside(&job, &output_dir));
    }
    let another = || free_place(arguments).ok();
    let taken = match (unnamed, arguments.overwrite) {
        (true, _) => Taken::GivenUp(&another),
        (false, true) => Taken::Replaced,
        (false, false) => Taken::Stays,
    };
    let chosen = output_dir;
    let output_dir = outcome.save(&job, &chosen, taken, None)?;
    if unnamed && output_dir != chosen {
        let (name, taken) = (registry::short(&output_dir), registry::short(&chosen));
        line(format_args!("name      {name}   as {taken} was taken meanwhile"));
    }
    tell(&output_dir, &outcome.report, before, after);
    if arguments.json {
        let mut summary = Map::from_iter([("output_dir".to_owned(), output_dir.display().to_string().into())]);
        summary.extend(outcome.summary());
        print(&Value::Object(summary).to_string())?;
    }
    Ok(if outcome.report.interrupted { Done::Interrupted } else { Done::Whole })
}

/// The directory of the adapter to start from.
fn start(name: &Path) -> Result<PathBuf> {
    utf8(name)?;
    let path = locate(name, Network::Allowed)?.path;
    let name = name.display();
    if let Some(link) = broken_link(&path) {
        bail!("{name}: {link}");
    }
    ensure!(
        is_adapter(&path),
        "{name}: not an adapter\nhint: a model is trained further with `--model-name {name}` alone"
    );
    Ok(path)
}

/// Where the result goes: what was named, or a name after the training file.
fn place(arguments: &Arguments) -> Result<PathBuf> {
    match (&arguments.output_dir, &arguments.name) {
        (Some(directory), _) => Ok(directory.clone()),
        (None, Some(name)) => {
            let place = registry::place(name)?;
            registry::note_ambiguous(Path::new(name), &place);
            Ok(place)
        }
        (None, None) => free_place(arguments),
    }
}

/// The place of a name that is free now.
fn free_place(arguments: &Arguments) -> Result<PathBuf> {
    let model = last_part(&arguments.model_name).unwrap_or_default();
    registry::place(&registry::free_name(&[&arguments.training_file, Path::new(&model)])?)
}

/// Trains with a progress bar, until the end or an interruption.
fn train(job: &Job, examples: &[&Example], config: &TrainConfig, steps: u64) -> Result<TrainReport> {
    let mut bar = progress::Training::start(steps);
    let mut observer = |step: &StepReport, steps| {
        bar.step(step, steps);
        Ok(if interrupt::asked() { Control::Stop } else { Control::Continue })
    };
    let report = job.train(examples, config, &mut observer)?;
    bar.end();
    Ok(report)
}

/// Loss on the held-out examples; not after an interruption, whose user waits.
fn evaluate(job: &Job, examples: &[&Example]) -> Result<Option<Evaluation>> {
    if interrupt::asked() {
        return Ok(None);
    }
    let bar = progress::counting("evaluating", examples.len());
    let result = job.evaluate(examples, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    result
}

/// The strategy's options, by PEFT's names.
///
/// # Errors
/// When one is given twice, with two values.
fn options(arguments: &Arguments) -> Result<Map<String, Value>> {
    let flags = [
        ("--lora-r", "r", arguments.lora_r.map(Value::from)),
        ("--lora-alpha", "lora_alpha", arguments.lora_alpha.map(Value::from)),
        ("--lora-dropout", "lora_dropout", arguments.lora_dropout.map(Value::from)),
        ("--target-modules", "target_modules", arguments.target_modules.as_deref().map(targets)),
    ];
    let mut options = Map::new();
    for (name, value) in &arguments.options {
        if let Some(before) = options.insert(name.clone(), value.clone()).filter(|before| before != value) {
            bail!("--set-option {name} is given twice, as {before} and as {value}");
        }
    }
    for (flag, name, value) in flags {
        let Some(value) = value else { continue };
        if let Some(other) = options.insert(name.to_owned(), value.clone()).filter(|other| *other != value) {
            bail!("{flag} is {value}, and --set-option {name} is {other}; give one of them");
        }
    }
    Ok(options)
}

/// `all-linear`, a list of names, or a regular expression.
fn targets(text: &str) -> Value {
    let plain = |c: char| c.is_alphanumeric() || "_.,".contains(c);
    if text == "all-linear" || !text.chars().all(plain) {
        return text.into();
    }
    text.split(',').filter(|name| !name.is_empty()).collect()
}

fn config(arguments: &Arguments, proposed: Option<f64>) -> TrainConfig {
    TrainConfig {
        epochs: arguments.epochs,
        max_steps: arguments.max_steps,
        batch_size: arguments.batch_size as usize,
        gradient_accumulation_steps: arguments.gradient_accumulation_steps as usize,
        learning_rate: arguments.learning_rate.or(proposed).unwrap_or(DEFAULT_LEARNING_RATE),
        lr_scheduler_type: arguments.lr_scheduler_type,
        warmup_ratio: arguments.warmup_ratio,
        weight_decay: arguments.weight_decay,
        max_grad_norm: arguments.max_grad_norm,
        seed: arguments.seed,
        shuffle: !arguments.no_shuffle,
        gradient_checkpointing: arguments.gradient_checkpointing,
        packing: !arguments.no_packing,
        compute: arguments.compute,
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
    fn load(arguments: &Arguments, model: &BaseModel) -> Result<Self> {
        let load = |file: &Path| load_rows(file, model, arguments.rows.max_seq_len, arguments.rows.on_long_row);
        let data = load(&arguments.training_file)?;
        let eval_file = arguments.eval_file.as_deref().map(load).transpose()?;
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

/// Restates the run, so that a wrong one is seen before it has cost anything.
fn restate(arguments: &Arguments, job: &Job, rows: &Rows, config: &TrainConfig, steps: u64) {
    let Job { model, adaptation, strategy, .. } = job;
    let parameters = model.parameter_count();
    let trained = adaptation.trainable_count();
    let share = 100.0 * trained as f64 / parameters as f64;
    line(format_args!(
        "model     {}   {:.1} M parameters, {}",
        shown(model, &arguments.model_name),
        parameters as f64 / 1e6,
        model.storage_words()
    ));
    line(format_args!(
        "strategy  {} {}   {} trained ({share:.2} %) in {} modules   {}",
        strategy.name,
        strategy.version,
        millions(trained),
        adaptation.plan.modules.len(),
        job.blocks(config.compute),
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
    if let Some(note) = note_endless(rows.data.endless, rows.data.examples.len()) {
        line(note);
    }
    line(format_args!(
        "training  {} steps of {} x {} examples   learning rate {:.1e}, {}   seed {}",
        thousands(steps as usize),
        config.gradient_accumulation_steps,
        config.batch_size,
        config.learning_rate,
        config.lr_scheduler_type.name(),
        config.seed,
    ));
    let epochs = STEPS_ENOUGH.saturating_mul(arguments.epochs).div_ceil(steps.max(1)).min(EPOCHS_MANY);
    if steps < STEPS_FEW && epochs > arguments.epochs && arguments.max_steps.is_none() {
        let steps = if steps == 1 { "one step teaches".to_owned() } else { format!("{steps} steps teach") };
        line(format_args!("note: {steps} a model little; more rows do more, or `--epochs {epochs}`"));
    }
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
            "next      train it further: the same command with --init-from {} and another --output-dir or --name",
            registry::short(path)
        ));
    } else {
        line(format_args!("next      homeroom chat --model-dir {} --prompt \"...\"", registry::short(path)));
    }
}
