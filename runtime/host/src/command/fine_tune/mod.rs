//! `homeroom fine-tune`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail, ensure};
use clap::{ArgGroup, Args};
use homeroom_engine::adapt::adapter::is_adapter;
use homeroom_engine::data::{Dataset, Group, check_rows, note_endless};
use homeroom_engine::files::{NewDirectory, broken_link, replaceable, utf8, vacant};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{Kind, Objective, ObjectiveConfig, Rewards};
use homeroom_engine::train::schedule::Schedule;
use homeroom_engine::train::{
    Broken, Control, Data, EvalReport, Observer, State, StepReport, TrainConfig, TrainReport, planned_steps,
};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

mod unfinished;

use self::unfinished::Unfinished;

use super::arguments::{
    COMPUTE, COUNT_MAX, ObjectiveArgs, PluginArgs, RowArgs, Word, above_zero, key_value, not_negative, one_of, rate,
    share, whole,
};
use super::{Done, is_same, print, spares, this_program};
use crate::interrupt;
use crate::job::defaults::{self, Open};
use crate::job::forgetting;
use crate::job::{Before, ForgettingRows, Job, Outcome, Recording, Resumed, Sample, Samples, Saving, Taken};
use crate::models::{
    Located, Network, Use, here, last_part, load_base, load_measured, load_rows, locate, refuse_other, shown, with_text,
};
use crate::near::exists;
use crate::plugin::{Plugin, Search, native};
use crate::progress::{self, line, millions, size, thousands};
use crate::registry;
use crate::runs::{self, About, End, Entry, RunDirectory};

/// Arguments of `fine-tune`. As JSON they are the settings of a run: what decides on its result has its flag's name.
#[derive(Args, Serialize)]
#[command(group(ArgGroup::new("place").args(["output_dir", "name"])))]
pub struct Arguments {
    /// Base model: a name on the Hugging Face hub as `owner/name`, a directory, a .gguf file, or a name from `homeroom list-models`
    #[arg(long, value_name = "MODEL")]
    #[serde(serialize_with = "lossy")]
    model_name: PathBuf,
    /// JSONL file of rows, in the form that the objective learns from
    #[arg(long, value_name = "FILE")]
    #[serde(serialize_with = "lossy")]
    training_file: PathBuf,
    #[command(flatten)]
    #[serde(flatten)]
    objective: ObjectiveArgs,
    /// Directory for the result: an adapter, or a model with strategy `full`
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    output_dir: Option<PathBuf>,
    /// Name of the result in `homeroom list-models` [default: the training file's, with a number if it is taken]
    #[arg(long, value_name = "NAME")]
    #[serde(skip)]
    name: Option<String>,
    /// Replace an earlier result in that directory or of that name
    #[arg(long, requires = "place")]
    #[serde(skip)]
    overwrite: bool,
    /// Go on with the run of this command that was killed or interrupted; start it if there is none, and leave one that has finished alone
    #[arg(long, conflicts_with = "overwrite")]
    #[serde(skip)]
    resume: bool,
    /// Steps between two checkpoints
    #[arg(long, alias = "save-steps", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    #[serde(skip)]
    save_every: Option<u64>,
    /// Minutes between two checkpoints; 0 saves none by time [default: 5, or 0 with --save-every]
    #[arg(long, value_name = "M", value_parser = not_negative)]
    #[serde(skip)]
    save_minutes: Option<f64>,
    /// Training strategy; `homeroom plugins list` shows what there is
    #[arg(long, default_value = "lora", value_name = "NAME")]
    strategy: String,
    /// Passes over the training rows [default: as many, up to 10, as make about 100 steps]
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    epochs: Option<u64>,
    /// Stop after this many steps, wherever the epoch is
    #[arg(long, value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    max_steps: Option<u64>,
    /// Peak learning rate [default: what the strategy proposes, else 2e-4; of that a tenth for dpo and kto, half for orpo]
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
    /// NEFTune: noise on embeddings while training, in units of 1/√(tokens × width), which helps against learning rows by heart; 5 is usual [default: 0]
    #[arg(long, default_value = "0", hide_default_value = true, value_name = "ALPHA", value_parser = not_negative)]
    neftune_noise_alpha: f64,
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
    #[serde(serialize_with = "lossy_option")]
    init_from: Option<PathBuf>,
    /// Rows of one batch [default: 8, fewer for a file of fewer than 64 rows]
    #[arg(long, value_name = "ROWS", value_parser = whole::<u32>(1..=COUNT_MAX))]
    batch_size: Option<u32>,
    /// Batches of one step [default: 1]
    #[arg(long, value_name = "N", value_parser = whole::<u32>(1..=COUNT_MAX))]
    gradient_accumulation_steps: Option<u32>,
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
    #[serde(flatten)]
    rows: RowArgs,
    /// JSONL file of held-out rows; their loss is measured before and after the training
    #[arg(long, value_name = "FILE", conflicts_with = "eval_fraction")]
    #[serde(serialize_with = "lossy_option")]
    eval_file: Option<PathBuf>,
    /// Share of the training rows to hold out instead
    #[arg(long, value_name = "SHARE", value_parser = share)]
    eval_fraction: Option<f64>,
    /// Steps between two evaluations on the held-out rows
    #[arg(long, alias = "eval-steps", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    eval_every: Option<u64>,
    /// End the training after so many of these evaluations in a row without a lower loss
    #[arg(long, alias = "patience", requires = "eval_every", value_name = "N", value_parser = whole::<u64>(1..=u64::MAX))]
    early_stopping_patience: Option<u64>,
    /// Measure after the training how far the model has moved from its base: on rows of FILE, else on answers of the base's own, which it
    /// draws before; that takes a minute or two with a model of 135 M parameters on two cores
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[serde(skip)]
    forgetting: Option<Option<PathBuf>>,
    /// Save what the last step left, even where an earlier evaluation had a lower loss
    #[arg(long)]
    keep_last: bool,
    /// Seed of the order of rows, of first values and of dropout
    #[arg(long, default_value = "42", value_name = "N", value_parser = whole::<u64>(0..=u64::MAX))]
    seed: u64,
    /// Keep the rows in the order of the file
    #[arg(long)]
    no_shuffle: bool,
    /// Watch the strategy's file, and continue with a new build of it between two steps
    #[arg(long)]
    #[serde(skip)]
    watch_plugins: bool,
    #[command(flatten)]
    #[serde(skip)]
    plugins: PluginArgs,
    /// Print one JSON object at the end
    #[arg(long)]
    #[serde(skip)]
    json: bool,
}

/// A path as text. One that is none is refused before a run has it.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// As [`lossy`].
#[allow(clippy::ref_option)] // serde's signature
fn lossy_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}

const SCHEDULES: [Word; 3] = [
    ("cosine", "Half a cosine from the peak to zero"),
    ("linear", "A straight line from the peak to zero"),
    ("constant", "The peak throughout"),
];

/// Trains, and saves an adapter or a model.
pub fn run(arguments: &Arguments) -> Result<Done> {
    prepare(arguments, None)
}

/// Goes on with a run that was killed or interrupted, whose arguments these are.
pub fn resume(arguments: &Arguments, run: &Entry) -> Result<Done> {
    prepare(arguments, Some(run.clone()))
}

/// What a training needs, once everything is there that costs nothing to refuse.
struct Prepared<'a> {
    arguments: &'a Arguments,
    objective: ObjectiveConfig,
    output_dir: PathBuf,
    /// Where the user named no place.
    unnamed: bool,
    search: Search,
    /// Not there where a run goes on without it.
    plugin: Option<Plugin>,
    options: Map<String, Value>,
    base: Located,
    init_from: Option<PathBuf>,
    /// The run to go on with.
    earlier: Option<Entry>,
}

fn prepare(arguments: &Arguments, earlier: Option<Entry>) -> Result<Done> {
    // What costs nothing to refuse is refused before a model is loaded.
    let holds_out = arguments.eval_file.is_some() || arguments.eval_fraction.is_some_and(|share| share > 0.0);
    ensure!(
        arguments.eval_every.is_none() || holds_out,
        "--eval-every measures held-out rows, and there are none\nhint: --eval-fraction 0.1 holds back a tenth of the rows, --eval-file names others"
    );
    let objective = arguments.objective.config()?;
    config(arguments, None, None).check()?;
    let earlier = match earlier {
        Some(run) => Some(run),
        None => match unfinished::find(arguments)? {
            Unfinished::Finished(run) => {
                run.tidy();
                line(format_args!("run {} has finished; there is nothing left to do", run.id));
                return Ok(Done::Whole);
            }
            Unfinished::None => None,
            Unfinished::Run(run) if arguments.resume => Some(*run),
            Unfinished::Run(run) => {
                line(format_args!(
                    "note: run {} with the same settings {}; this starts anew, and --resume goes on with it",
                    run.id,
                    unfinished::standing(&run)
                ));
                None
            }
        },
    };
    let own = earlier.as_ref().and_then(unfinished::output_dir);
    let unnamed = arguments.output_dir.is_none() && arguments.name.is_none();
    // A name that was chosen for a run and is another's by now is no reason not to go on: the result takes another one.
    let gives_up = unnamed && own.is_some();
    let output_dir = own.map_or_else(|| place(arguments), Ok)?;
    utf8(&std::path::absolute(&output_dir)?)?;
    let is_own = earlier.as_ref().is_some_and(|run| unfinished::is_result_of(&output_dir, run.token()));
    if is_own {
        // What it left when it was interrupted; what somebody has put beside that stays.
        replaceable(&output_dir)?;
    } else if !arguments.overwrite && !gives_up {
        vacant(&output_dir).map_err(|error| match arguments.name.as_ref().filter(|_| output_dir.is_dir()) {
            _ if earlier.is_some() => anyhow!(
                "{}: something is there by now, and the result of the run would go there\nhint: move it away and go on again; nothing of the run is lost meanwhile",
                output_dir.display()
            ),
            Some(name) if arguments.output_dir.is_none() => anyhow!(
                "{name}: there is a model of this name already\nhint: --overwrite replaces it, another --name keeps both"
            ),
            _ => error,
        })?;
    }
    let own_kind = arguments.forgetting.as_ref().and_then(Option::as_ref);
    let files = [Some(&arguments.training_file), arguments.eval_file.as_ref()];
    files.into_iter().flatten().chain(own_kind).try_for_each(|file| exists(file))?;
    let mut search = arguments.plugins.search()?;
    if arguments.watch_plugins {
        search = search.watched(this_program()?);
    }
    let plugin = match (search.load(&arguments.strategy), &earlier) {
        (Ok(plugin), _) => Some(plugin),
        // A checkpoint has the plan.
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(error),
    };
    let options = options(arguments)?;
    plugin.as_ref().map(|plugin| plugin.check_options(&options)).transpose()?;
    // Only now, as they may be downloaded. Rows that no model could be trained on are refused before that.
    let is_missing = |name: &Path| here(name).map(|located| located.is_none());
    if is_missing(&arguments.model_name)? || arguments.init_from.as_deref().map_or(Ok(false), is_missing)? {
        let kind = objective.objective;
        files.into_iter().flatten().try_for_each(|file| check_rows(file, kind.rows(), kind.name()))?;
        own_kind.map_or(Ok(()), |file| check_rows(file, Kind::Sft.rows(), Kind::Sft.name()))?;
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
        ("the file of --forgetting", own_kind.cloned()),
        ("the adapter to start from", start.map(Path::to_owned)),
    ];
    spares(&output_dir, inputs)?;
    if arguments.overwrite {
        replaceable(&output_dir)?;
    }
    Prepared { arguments, objective, output_dir, unnamed, search, plugin, options, base, init_from, earlier }.train()
}

impl Prepared<'_> {
    fn train(self) -> Result<Done> {
        let arguments = self.arguments;
        let mut model = Arc::new(load_base(&self.base)?);
        if let Some(adapter) = &self.init_from {
            model = with_text(adapter, model)?;
        }
        let rows = Rows::load(arguments, &model)?;
        let mut settings = unfinished::settings(arguments)?;
        settings.insert("output_dir".to_owned(), std::path::absolute(&self.output_dir)?.display().to_string().into());
        settings.insert("training_rows".to_owned(), rows.data.digest.clone().into());
        settings.insert("eval_rows".to_owned(), rows.eval_file.as_ref().map(|file| file.digest.clone()).into());
        if let Some(run) = &self.earlier {
            unfinished::refuse_others(run, &settings)?;
        }
        // A directory that cannot be written is found out now, not after hours. The one that is filled is made when there is
        // something to fill it with, so that a run that is killed leaves nothing.
        interrupt::listen()?;
        drop(NewDirectory::start(&self.output_dir)?);
        let run = match &self.earlier {
            Some(run) => Some(RunDirectory::reopen(&run.id)?),
            None => {
                let about = About::here(Value::Object(settings.clone()), settings);
                let name = self.output_dir.file_name().unwrap_or_default().to_string_lossy();
                let run = RunDirectory::start(runs::Kind::FineTune, &name, about);
                // The result may go to where there is room, all the same.
                run.inspect_err(|error| line(format_args!("note: no checkpoints and no record of this run: {error:#}")))
                    .ok()
            }
        };
        let done = self.train_in(run.as_ref(), model, &rows);
        if let (Err(error), Some(run)) = (&done, &run) {
            // The error itself is what the user hears of.
            let _ = run.finish(End::Failed(format!("{error:#}")));
        }
        done
    }

    fn train_in(&self, run: Option<&RunDirectory>, model: Arc<BaseModel>, rows: &Rows) -> Result<Done> {
        let Self { arguments, output_dir, unnamed, .. } = self;
        let saving = Saving::of(arguments.save_every, arguments.save_minutes);
        let mut recording = run.map(|run| Recording::new(run, 1, saving)).transpose()?;
        let newest = recording.as_ref().and_then(Recording::newest);
        let (options, start) = (self.options.clone(), self.init_from.as_deref());
        let before = Before::now(&model);
        let mut job = match (&newest, &self.plugin) {
            (Some(checkpoint), plugin) => {
                let native = |strategy: &_, name: &_| native::find_in(&self.search, strategy, name);
                Job::resume(model, checkpoint, plugin.clone(), &native, options, start)?
            }
            (None, Some(plugin)) => Job::new(model, plugin, options, arguments.seed, start, arguments.requantize)?,
            (None, None) => {
                self.search.load(&arguments.strategy)?;
                bail!("strategy `{}` has come meanwhile; try again", arguments.strategy)
            }
        };
        job.watch = self.search.watching();
        let mut config = config(arguments, job.proposed_learning_rate, Some(rows.train.len()));
        let from = recording.as_ref().filter(|_| newest.is_some());
        let from = from.map(|recording| recording.resume(&job, &mut config)).transpose()?;
        let steps = planned_steps(rows.train.len(), &config)?;
        if *unnamed {
            let name = registry::short(output_dir);
            line(format_args!("name      {name}   --name or --output-dir chooses another"));
        }
        restate(arguments, self.objective, &job, rows, &config, steps);
        if self.objective.objective == Kind::Sft {
            tell_memory(&job, rows, &config, before);
        }
        match (run, &from) {
            (Some(run), Some(from)) => {
                line(format_args!("run       {}   goes on after step {} of {steps}", run.id(), from.state.step));
            }
            (Some(run), None) => {
                line(format_args!("run       {}   `homeroom resume {0}` goes on if it is ended", run.id()));
            }
            (None, _) => {}
        }
        let held_out = rows.eval();
        let mut samples = Samples::pick(&held_out);
        let start = from.as_ref().map_or_else(|| job.now().0, |from| from.state.adaptation().clone());
        let directory = recording.as_ref().map(Recording::directory);
        if from.is_none() || !samples.recall(directory) {
            samples.ask_before(&job.model, &start, directory);
        }
        let groups = rows.train();
        let made = objective(&job, self.objective, (&groups, &held_out), &config, directory);
        let objective = match made {
            Err(_) if interrupt::asked() => {
                line("stopped before the first step; nothing was learned");
                if let Some(run) = run {
                    line(format_args!("next      homeroom resume {}", run.id()));
                    run.finish(End::Interrupted(Value::Object(Map::new())))?;
                }
                return Ok(Done::Interrupted);
            }
            made => made?,
        };
        let own_kind = own_kind(arguments, &job.model, directory)?;
        let data = Data::of_groups(&groups, &held_out);
        let trained = train(&job, &data, &*objective, &config, steps, recording.as_mut(), from);
        let (report, failure) = match trained {
            Ok(state) => (state.report, None),
            Err(error) => {
                let Broken { reason, state } = error.downcast()?;
                (state.report, Some(reason))
            }
        };
        let (trained, data_digest) = (rows.train.len(), rows.data.digest.clone());
        let whole = failure.is_none() && !report.interrupted;
        let forgetting = own_kind.filter(|_| whole).and_then(|rows| rows.after(&job.model, &job.now().0));
        if let (Some(measured), Some(recording)) = (&forgetting, &recording) {
            recording.event(forgetting::event(measured));
        }
        let (objective, of_run) = (self.objective, run.map(|run| (run.id().to_owned(), run.token())));
        let outcome =
            Outcome { config, report, objective, run: of_run, rows: trained, data_digest, forgetting, failure };
        if let Some(failure) = &outcome.failure {
            bail!("{failure}\n{}", outcome.save_beside(&job, output_dir));
        }
        let another = || free_place(arguments).ok();
        let is_own = run.is_some_and(|run| unfinished::is_result_of(output_dir, Some(&run.token())));
        let is_own = is_own && replaceable(output_dir).is_ok();
        let taken = match (*unnamed, arguments.overwrite || is_own) {
            (_, true) => Taken::Replaced,
            (true, false) => Taken::GivenUp(&another),
            (false, false) => Taken::Stays,
        };
        let saved = outcome.save(&job, output_dir, taken, None)?;
        if *unnamed && saved != *output_dir {
            let (name, taken) = (registry::short(&saved), registry::short(output_dir));
            line(format_args!("name      {name}   as {taken} was taken meanwhile"));
            if let Some(run) = run {
                let mut settings = run.settings();
                settings.insert("output_dir".to_owned(), saved.display().to_string().into());
                run.set_settings(settings)?;
            }
        }
        let samples = match outcome.report.interrupted {
            true => Vec::new(),
            false => samples.ask_after(&job.model, &job.now().0)?,
        };
        for sample in &samples {
            recording.iter().for_each(|recording| recording.event(sample.event()));
        }
        tell(&saved, run.map(RunDirectory::id), &outcome.report, &samples);
        let mut summary = Map::from_iter([("output_dir".to_owned(), saved.display().to_string().into())]);
        summary.insert("run".to_owned(), run.map(RunDirectory::id).into());
        summary.extend(outcome.summary());
        let summary = Value::Object(summary);
        if let Some(run) = run {
            run.finish(match outcome.report.interrupted {
                true => End::Interrupted(summary.clone()),
                false => End::Finished(summary.clone()),
            })?;
        }
        if arguments.json {
            print(&summary.to_string())?;
        }
        Ok(if outcome.report.interrupted { Done::Interrupted } else { Done::Whole })
    }
}

/// The rows of `--forgetting`, if it is given.
fn own_kind(arguments: &Arguments, model: &Arc<BaseModel>, training: Option<&Path>) -> Result<Option<ForgettingRows>> {
    Ok(match &arguments.forgetting {
        None => None,
        Some(None) => Some(ForgettingRows::own(model, training)?),
        Some(Some(file)) => {
            let RowArgs { max_seq_len, on_long_row } = arguments.rows;
            let rows = load_measured(file, model, max_seq_len, on_long_row, "--forgetting")?;
            Some(ForgettingRows::given(rows.examples, file.display().to_string()))
        }
    })
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
fn train(
    job: &Job,
    data: &Data<'_>,
    objective: &dyn Objective,
    config: &TrainConfig,
    steps: u64,
    recording: Option<&mut Recording<'_>>,
    from: Option<Resumed>,
) -> Result<State> {
    let mut watcher = Watcher { bar: progress::Training::start(steps), evaluating: None };
    let state = job.train(data, objective, config, &mut watcher, recording, from)?;
    watcher.bar.end();
    Ok(state)
}

/// Makes the objective, with a bar where that takes passes over the rows.
fn objective(
    job: &Job,
    objective: ObjectiveConfig,
    groups: (&[&Group], &[&Group]),
    config: &TrainConfig,
    directory: Option<&Path>,
) -> Result<Box<dyn Objective>> {
    let mut bar = None;
    let mut progress = |done, all| {
        let bar = bar.get_or_insert_with(|| progress::counting("reference", all));
        bar.set_position(done as u64);
        ensure!(!interrupt::asked(), "interrupted");
        Ok(())
    };
    let made = job.objective(objective, groups, config, directory, &mut progress);
    bar.into_iter().for_each(|bar| bar.finish_and_clear());
    made
}

/// Draws progress, and ends the training where the user asks for it.
struct Watcher {
    bar: progress::Training,
    evaluating: Option<progress::Counting>,
}

impl Observer for Watcher {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        self.bar.step(report, planned_steps);
        Ok(if interrupt::asked() { Control::Stop } else { Control::Continue })
    }

    fn on_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Control> {
        let loss = report.evaluation.loss;
        let right = rewards(report.evaluation.rewards);
        self.bar.say(format_args!("step {:>5}/{planned_steps}   held-out loss {loss:.4}{right}", report.step));
        Ok(Control::Continue)
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

    fn is_cancelled(&mut self) -> bool {
        interrupt::asked()
    }

    fn is_due(&mut self, state: &State) -> bool {
        state.report.interrupted
    }
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
    options_of(&flags, &arguments.options)
}

/// The options that flags stand for, with those of `--set-option`.
///
/// # Errors
/// When one is given twice, with two values.
pub(super) fn options_of(
    flags: &[(&str, &str, Option<Value>)],
    others: &[(String, Value)],
) -> Result<Map<String, Value>> {
    let mut options = Map::new();
    for (name, value) in others {
        if let Some(before) = options.insert(name.clone(), value.clone()).filter(|before| before != value) {
            bail!("--set-option {name} is given twice, as {before} and as {value}");
        }
    }
    for (flag, name, value) in flags {
        let Some(value) = value else { continue };
        if let Some(other) = options.insert((*name).to_owned(), value.clone()).filter(|other| other != value) {
            bail!("{flag} is {value}, and --set-option {name} is {other}; give one of them");
        }
    }
    Ok(options)
}

/// `all-linear`, a list of names, or a regular expression.
pub(super) fn targets(text: &str) -> Value {
    let plain = |c: char| c.is_alphanumeric() || "_.,".contains(c);
    if text == "all-linear" || !text.chars().all(plain) {
        return text.into();
    }
    text.split(',').filter(|name| !name.is_empty()).collect()
}

/// The configuration; what was left open is chosen by the number of rows, and said, once that is known.
fn config(arguments: &Arguments, proposed: Option<f64>, rows: Option<usize>) -> TrainConfig {
    let default = TrainConfig::default();
    let mut config = TrainConfig {
        epochs: arguments.epochs.unwrap_or(default.epochs),
        max_steps: arguments.max_steps,
        batch_size: arguments.batch_size.map_or(default.batch_size, |rows| rows as usize),
        gradient_accumulation_steps: arguments.gradient_accumulation_steps.unwrap_or(1) as usize,
        learning_rate: arguments.learning_rate.unwrap_or_else(|| {
            proposed.unwrap_or(defaults::LEARNING_RATE) * arguments.objective.objective.learning_rate_scale()
        }),
        lr_scheduler_type: arguments.lr_scheduler_type,
        warmup_ratio: arguments.warmup_ratio,
        weight_decay: arguments.weight_decay,
        max_grad_norm: arguments.max_grad_norm,
        seed: arguments.seed,
        shuffle: !arguments.no_shuffle,
        gradient_checkpointing: arguments.gradient_checkpointing,
        packing: !arguments.no_packing,
        neftune_noise_alpha: arguments.neftune_noise_alpha,
        compute: arguments.compute,
        eval_steps: arguments.eval_every,
        early_stopping_patience: arguments.early_stopping_patience,
        load_best_model_at_end: !arguments.keep_last,
    };
    let open = Open {
        epochs: arguments.epochs.or(arguments.max_steps).is_none(),
        batch_size: arguments.batch_size.or(arguments.gradient_accumulation_steps).is_none()
            && arguments.epochs.or(arguments.max_steps).is_none(),
    };
    if let Some(chosen) = rows.and_then(|rows| defaults::choose(&mut config, open, rows)) {
        line(format_args!("note: {chosen}"));
    }
    config
}

/// The rows of a run.
struct Rows {
    data: Dataset<Group>,
    /// Indices of the examples to train on.
    train: Vec<usize>,
    /// Held-out examples of a file of their own.
    eval_file: Option<Dataset<Group>>,
    /// Indices of held-out examples among the training file's.
    eval: Vec<usize>,
}

impl Rows {
    fn load(arguments: &Arguments, model: &BaseModel) -> Result<Self> {
        let RowArgs { max_seq_len, on_long_row } = arguments.rows;
        let load = |file: &Path| load_rows(file, model, max_seq_len, on_long_row, arguments.objective.objective);
        let data = load(&arguments.training_file)?;
        let eval_file = arguments.eval_file.as_deref().map(load).transpose()?;
        let (train, eval) = match arguments.eval_fraction {
            Some(share) if share > 0.0 => data.split(share, arguments.seed)?,
            _ => ((0..data.examples.len()).collect(), Vec::new()),
        };
        Ok(Self { data, train, eval_file, eval })
    }

    fn train(&self) -> Vec<&Group> {
        self.train.iter().map(|index| &self.data.examples[*index]).collect()
    }

    fn eval(&self) -> Vec<&Group> {
        match &self.eval_file {
            Some(file) => file.examples.iter().collect(),
            None => self.eval.iter().map(|index| &self.data.examples[*index]).collect(),
        }
    }
}

/// Says how much memory the training will need, and warns where that is more than there is.
fn tell_memory(job: &Job, rows: &Rows, config: &TrainConfig, before: Before) {
    let peak = job.peak_memory_estimate(&rows.train(), config, before);
    line(format_args!("plan      about {} of memory   `homeroom plan` has the parts", size(peak)));
    if let Some(available) = before.lacking(peak) {
        line(format_args!(
            "warning: {} can be had; --gradient-checkpointing, a smaller --batch-size or --max-seq-len, or --strategy qlora needs less",
            size(available)
        ));
    }
}

/// Restates the run, so that a wrong one is seen before it has cost anything.
fn restate(
    arguments: &Arguments,
    objective: ObjectiveConfig,
    job: &Job,
    rows: &Rows,
    config: &TrainConfig,
    steps: u64,
) {
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
    if objective.objective != Kind::Sft {
        let reference = match (objective.objective.has_reference(), &job.init_from) {
            (false, _) => "",
            (true, None) => "   held to the base",
            (true, Some(_)) => "   held to the adapter that it starts from",
        };
        line(format_args!("objective {}{reference}", objective.words()));
    }
    if let Some(note) = defaults::balance(objective, &rows.train()) {
        line(format_args!("note: {note}"));
    }
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
    if steps < STEPS_FEW && arguments.max_steps.is_none() && arguments.epochs.is_some_and(|epochs| epochs < EPOCHS_MANY)
    {
        let steps = if steps == 1 { "one step teaches".to_owned() } else { format!("{steps} steps teach") };
        line(format_args!("note: {steps} a model little; more rows or epochs do more"));
    }
}

/// Who asks for so many epochs knows.
const EPOCHS_MANY: u64 = 10;
/// Fewer steps than these leave little trace at the default learning rate, which is said.
const STEPS_FEW: u64 = 30;

/// How often the better answer is preferred, in words; nothing of an objective without rewards.
fn rewards(rewards: Option<Rewards>) -> String {
    rewards.map_or_else(String::new, |rewards| format!("   {:.0} % judged right", 100.0 * rewards.accuracy))
}

/// What was written, and what to do next.
fn tell(path: &Path, run: Option<&str>, report: &TrainReport, samples: &[Sample]) {
    if let (Some(before), Some(after)) = (report.before(), report.after()) {
        let right = rewards(after.rewards);
        line(format_args!("held-out  loss {:.4} before, {:.4} after{right}", before.loss, after.loss));
    }
    if let (Some(before), Some(after)) = (report.before(), report.after())
        && after.loss > before.loss
    {
        line(format_args!(
            "note: the held-out loss has risen: what was learned does not carry over to these rows; try fewer epochs, a lower --learning-rate or more rows"
        ));
    }
    if let Some(why) = &report.stopped {
        line(format_args!("stopped   {why}"));
    }
    if let Some(step) = report.kept_step {
        line(format_args!("result    of step {step}, the best on the held-out rows; --keep-last keeps the last"));
    }
    samples.iter().for_each(Sample::tell);
    let done = report.steps.len();
    line(format_args!("saved     {}", path.display()));
    if report.interrupted {
        line(format_args!(
            "stopped after step {done} of {}; what it had learned by then is saved",
            report.planned_steps
        ));
        line(match run {
            Some(run) => format!("next      homeroom resume {run}"),
            None => format!("next      train it further: the same command with --init-from {}", registry::short(path)),
        });
    } else {
        line(format_args!("next      homeroom chat --model-dir {} --prompt \"...\"", registry::short(path)));
    }
}
