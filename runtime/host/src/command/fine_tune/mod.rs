//! `homeroom fine-tune`: refuses what cannot be trained before it has cost anything, trains, and saves.
//!
//! [`arguments`] is what it is told, [`dry`] says what it would do, [`unfinished`] finds a run that can go on, [`place`] is where the result goes, [`told`] is what it says.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow, bail, ensure};
use homeroom_engine::adapt::adapter::{WEIGHTS_FILE, is_adapter};
use homeroom_engine::data::report::Files;
use homeroom_engine::data::{Dataset, Group, OfLine, Reading, Source, Sources, check_rows};
use homeroom_engine::estimate::{Request, Sketch};
use homeroom_engine::files::digest;
use homeroom_engine::files::{NewDirectory, broken_link, open_regular, replaceable, utf8, vacant};
use homeroom_engine::models::BaseModel;
use homeroom_engine::text::template;
use homeroom_engine::train::objective::{Kind, Objective, ObjectiveConfig};
use homeroom_engine::train::{
    Broken, Control, Data, EvalReport, Observer, State, StepReport, TrainConfig, checkpoint, planned_steps,
};
use serde_json::{Map, Value};

mod arguments;
mod dry;
mod place;
mod told;
mod unfinished;

pub use self::arguments::Arguments;
use self::arguments::{chosen, config};
use self::place::{Standing, free_place, place};
use self::told::{restate, rewards, tell, tell_findings};
use self::unfinished::Unfinished;
use super::arguments::RowArgs;
use super::rows::{is_input, to_learn_from, to_measure_on};
use super::{Done, is_same, print, spares, this_program};
use crate::interrupt;
use crate::job::fit::{self, Asked, Otherwise, Planned};
use crate::job::forgetting;
use crate::job::{
    Before, Estimator, ForgettingRows, Job, Outcome, Recording, Resumed, Samples, Saving, Taken, newest_checkpoint,
};
use crate::models::{
    Located, Network, Sketched, Use, here, load_base, load_measured, load_rows, locate, refuse_other, with_text,
};
use crate::near::exists;
use crate::plugin::{Plugin, Search, native};
use crate::progress::{self, line, size};
use crate::registry;
use crate::runs::{self, About, End, Entry, RunDirectory};

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
    /// What it may replace there.
    claim: Option<String>,
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
    sources: Inputs,
}

/// The files of rows, and how they are read.
struct Inputs {
    files: Vec<Source>,
    held_out: Vec<Source>,
    reading: Reading,
}

const NONE_HELD_OUT: &str = "--eval-every measures held-out rows, and there are none\nhint: --eval-fraction 0.1 holds back a tenth of the rows, --eval-file names others";

/// The rows of the standard input. A run that goes on by its name has kept them.
fn standard_input(earlier: Option<&Entry>, is_resumed: bool) -> Result<Source> {
    let kept = earlier.map(|run| run.path.join(KEPT_INPUT)).filter(|path| path.is_file());
    match kept {
        Some(path) if is_resumed || std::io::stdin().is_terminal() => Source::keep(open_regular(&path)?),
        None if is_resumed => bail!(
            "the rows came in by the standard input, and the run has not kept them\nhint: pipe them in again, with the command of the run and --resume"
        ),
        _ => Source::standard_input(),
    }
}

/// Where a run keeps what came in by the standard input, so that it can go on by its name.
const KEPT_INPUT: &str = "standard_input";

fn prepare(arguments: &Arguments, earlier: Option<Entry>) -> Result<Done> {
    let is_resumed = earlier.is_some();
    // What costs nothing to refuse is refused before a model is loaded.
    let (of_eval_file, of_share) =
        (!arguments.eval_file.is_empty(), arguments.eval_fraction.is_some_and(|share| share > 0.0));
    // A folder may have some.
    let may_hold_out = of_eval_file || of_share || arguments.training_file.iter().any(|path| path.is_dir());
    ensure!(arguments.eval_every.is_none() || may_hold_out, "{NONE_HELD_OUT}");
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
    // What a template says of the time is the same to the end of the run.
    let began = earlier.as_ref().and_then(|run| run.record.as_ref()?.clock);
    template::hold_time(began.unwrap_or_else(template::present_time));
    let own = earlier.as_ref().and_then(unfinished::output_dir);
    let unnamed = arguments.output_dir.is_none() && arguments.name.is_none();
    // A name that was chosen for a run and is another's by now is no reason not to go on: the result takes another one.
    let gives_up = unnamed && own.is_some();
    let output_dir = own.map_or_else(|| place(arguments), Ok)?;
    utf8(&std::path::absolute(&output_dir)?)?;
    let claim = match &earlier {
        Some(run) => unfinished::claim(run),
        None if arguments.overwrite => place::contents(&output_dir),
        None => None,
    };
    let token = earlier.as_ref().and_then(Entry::token);
    let standing = place::standing(&output_dir, token, claim.as_deref());
    if let Some(run) = earlier.as_ref().filter(|_| standing == Standing::Other && !gives_up) {
        // What somebody has put beside its earlier result is named.
        replaceable(&output_dir)?;
        bail!(
            "{}: something else is there by now, and the result of run {} would go there\nhint: move it away and go on again; nothing of the run is lost meanwhile",
            output_dir.display(),
            run.id
        );
    }
    if earlier.is_none() && !arguments.overwrite {
        vacant(&output_dir).map_err(|error| match arguments.name.as_ref().filter(|_| output_dir.is_dir()) {
            Some(name) if arguments.output_dir.is_none() => anyhow!(
                "{name}: there is a model of this name already\nhint: --overwrite replaces it, another --name keeps both"
            ),
            _ => error,
        })?;
    }
    let own_kind = arguments.forgetting.as_ref().and_then(Option::as_ref);
    own_kind.map_or(Ok(()), |file| exists(file))?;
    let reading = arguments.rows.read.reading();
    let Sources { files, mut held_out, .. } =
        to_learn_from(&arguments.training_file, || standard_input(earlier.as_ref(), is_resumed))?;
    if of_eval_file {
        let both = arguments.training_file.iter().chain(&arguments.eval_file).filter(|path| is_input(path)).count();
        ensure!(both < 2, "-: the standard input cannot be both the rows to learn from and those held out");
        held_out = to_measure_on(&arguments.eval_file, || standard_input(earlier.as_ref(), is_resumed))?;
    } else if arguments.eval_fraction.is_some() && !held_out.is_empty() {
        line("note: the held-out rows of the folder are left, as --eval-fraction chooses others");
        held_out.clear();
    }
    ensure!(arguments.eval_every.is_none() || of_share || !held_out.is_empty(), "{NONE_HELD_OUT}");
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
    let options = arguments.strategy_options.options()?;
    if earlier.is_none() {
        plugin.as_ref().map(|plugin| plugin.check_options(&options)).transpose()?;
    }
    // Only now, as they may be downloaded. Rows that no model could be trained on are refused before that.
    let is_missing = |name: &Path| here(name).map(|located| located.is_none());
    if is_missing(&arguments.model_name)? || arguments.init_from.as_deref().map_or(Ok(false), is_missing)? {
        let kind = objective.objective;
        for files in [&files, &held_out] {
            check_rows(files, &reading, kind.rows(), kind.name())?;
        }
        let own_kind: Vec<Source> = own_kind.map(Source::file).into_iter().collect();
        check_rows(&own_kind, &own_reading(arguments), Kind::Sft.rows(), Kind::Sft.name())?;
        if let (Some(plugin), None, false) = (&plugin, &earlier, arguments.no_memory_check) {
            refuse_too_large(arguments, plugin, &options)?;
        }
    }
    let base = locate(&arguments.model_name, Network::Allowed)?;
    refuse_other(&arguments.model_name, &base.path, Use::Training)?;
    utf8(&base.path.canonicalize().unwrap_or_else(|_| base.path.clone()))?;
    let init_from = arguments.init_from.as_deref().map(start).transpose()?;
    // To go on from an adapter and put the result in its place is fine; from one inside it is not.
    let start = init_from.as_deref().filter(|path| !is_same(path, &output_dir));
    let named = |what: &'static str, files: &[Source]| -> Vec<(&'static str, Option<PathBuf>)> {
        files.iter().map(|file| (what, Some(file.name.clone()))).collect()
    };
    let mut inputs = vec![("the base model", Some(base.path.clone()))];
    inputs.extend(named("the training file", &files));
    inputs.extend(named("the file of held-out rows", &held_out));
    inputs.push(("the file of --forgetting", own_kind.cloned()));
    inputs.push(("the adapter to start from", start.map(Path::to_owned)));
    spares(&output_dir, inputs)?;
    if arguments.overwrite {
        replaceable(&output_dir)?;
    }
    let sources = Inputs { files, held_out, reading };
    Prepared {
        arguments,
        objective,
        output_dir,
        claim,
        unnamed,
        search,
        plugin,
        options,
        base,
        init_from,
        earlier,
        sources,
    }
    .train()
}

/// Refuses a base that is not here and that no rows, however short, could be trained on in this machine's memory, before it is downloaded.
fn refuse_too_large(arguments: &Arguments, plugin: &Plugin, options: &Map<String, Value>) -> Result<()> {
    let (name, requantize) = (&arguments.model_name, arguments.passes.requantize);
    // Whoever downloads it says what is wrong with it.
    let Ok(base) = Sketched::find(name, Network::Allowed) else { return Ok(()) };
    let before = Before::of_program();
    let least = Request {
        batch_size: 1,
        gradient_accumulation_steps: 1,
        row_tokens: 2,
        trained_tokens: 1,
        gradient_checkpointing: true,
        packing: true,
        pass_rows: None,
        compute: arguments.passes.compute,
        program_bytes: before.program_bytes(),
    };
    let needed = Estimator::new(plugin, options, &base.sketch, requantize)?.estimate(&least).peak_memory_bytes;
    if let Some(available) = before.lacking(needed) {
        bail!(
            "{}: at least {} of memory are needed, and {} can be had; nothing was downloaded\nto fit: `homeroom plan --model-name {}` says what would, a smaller base among it; --no-memory-check begins all the same",
            name.display(),
            size(needed),
            size(available),
            name.display()
        );
    }
    Ok(())
}

impl Prepared<'_> {
    fn train(self) -> Result<Done> {
        let arguments = self.arguments;
        let mut model = Arc::new(load_base(&self.base)?);
        if let Some(adapter) = &self.init_from {
            model = with_text(adapter, model)?;
        }
        let rows = Rows::load(arguments, &self.sources, &model)?;
        if arguments.dry_run {
            return dry::run(&self, &model, rows);
        }
        let planned = self.planned(&model, &rows)?;
        let mut settings = unfinished::settings(arguments)?;
        settings.insert("output_dir".to_owned(), std::path::absolute(&self.output_dir)?.display().to_string().into());
        settings.insert("training_rows".to_owned(), rows.data.digest.clone().into());
        settings.insert("eval_rows".to_owned(), rows.eval_file.as_ref().map(|file| file.digest.clone()).into());
        let weights = self.init_from.as_ref().map(|path| [path.join(WEIGHTS_FILE)]);
        let weights = weights.map(|weights| digest::of_files(&weights, None)).transpose()?;
        settings.insert("init_from_weights".to_owned(), serde_json::to_value(weights)?);
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
                settings.insert(unfinished::CLAIM.to_owned(), self.claim.clone().into());
                let about = About::here(Value::Object(settings.clone()), settings);
                let name = self.output_dir.file_name().unwrap_or_default().to_string_lossy();
                let run = RunDirectory::start(runs::Kind::FineTune, &name, about);
                // The result may go to where there is room, all the same.
                let run = run.inspect_err(|error| {
                    line(format_args!("note: no checkpoints and no record of this run: {error:#}"));
                });
                run.ok().inspect(|run| self.keep_input(run))
            }
        };
        let done = self.train_in(run.as_ref(), model, &rows, planned);
        if let (Err(error), Some(run)) = (&done, &run) {
            // The error itself is what the user hears of.
            let _ = run.finish(End::Failed(format!("{error:#}")));
        }
        done
    }

    /// Keeps what came in by the standard input, so that `resume` has it.
    fn keep_input(&self, run: &RunDirectory) {
        let Some(input) = self.sources.files.iter().chain(&self.sources.held_out).find(|file| file.is_standard_input())
        else {
            return;
        };
        if let Err(error) = input.save(&run.path().join(KEPT_INPUT)) {
            line(format_args!("note: the run has not kept the rows of the standard input: {error:#}"));
        }
    }

    /// What the training will take. One that is begun and does not fit is refused, or gets smaller passes; one that goes on does so all
    /// the same. `None`: its plugin is gone, which alone can tell.
    fn planned(&self, model: &BaseModel, rows: &Rows) -> Result<Option<Planned>> {
        let (Self { arguments, options, .. }, Some(plugin)) = (self, &self.plugin) else { return Ok(None) };
        let (config, _) = chosen(arguments, None, Some(rows.train.len()));
        let before = Before::now(model);
        let mut request = fit::request(&rows.train(), &config, before.program_bytes());
        let otherwise = match (arguments.fit, arguments.no_memory_check || self.earlier.is_some()) {
            (true, _) if self.earlier.is_some() => Otherwise::TryFit,
            (true, _) => Otherwise::Fit,
            (false, true) => Otherwise::Nothing,
            (false, false) => Otherwise::Refuse,
        };
        let newest = self.earlier.as_ref().and_then(|run| newest_checkpoint(&run.path.join("trainings/1")));
        if let Some(summary) = newest.and_then(|checkpoint| checkpoint::summary(&checkpoint).ok()) {
            request.pass_rows = summary.cut.is_bounded.then_some(summary.cut.pass_rows);
            request.gradient_checkpointing |= summary.cut.gradient_checkpointing;
        }
        let (sketch, requantize) = (Sketch::of_model(model), arguments.passes.requantize);
        let estimator = Estimator::of_training(plugin, options, &sketch, requantize)?;
        Asked { estimator, request }.check(before, otherwise).map(Some)
    }

    fn train_in(
        &self,
        run: Option<&RunDirectory>,
        model: Arc<BaseModel>,
        rows: &Rows,
        planned: Option<Planned>,
    ) -> Result<Done> {
        let Self { arguments, output_dir, unnamed, .. } = self;
        let saving = Saving::of(arguments.save_every, arguments.save_minutes);
        let mut recording = run.map(|run| Recording::new(run, 1, saving)).transpose()?;
        let newest = recording.as_ref().and_then(Recording::newest);
        let (options, start) = (self.options.clone(), self.init_from.as_deref());
        let mut job = match (&newest, &self.plugin) {
            (Some(checkpoint), plugin) => {
                let native = |strategy: &_, name: &_| native::find_in(&self.search, strategy, name);
                Job::resume(model, checkpoint, plugin.clone(), &native, options, start)?
            }
            (None, Some(plugin)) => {
                Job::new(model, plugin, options, arguments.seed, start, arguments.passes.requantize)?
            }
            (None, None) => {
                self.search.load(&arguments.strategy)?;
                bail!("strategy `{}` has come meanwhile; try again", arguments.strategy)
            }
        };
        job.watch = self.search.watching();
        job.planned = planned;
        let mut config = config(arguments, job.proposed_learning_rate, Some(rows.train.len()));
        let from = recording.as_ref().filter(|_| newest.is_some());
        let from = from.map(|recording| recording.resume(&job, &mut config)).transpose()?;
        let steps = planned_steps(rows.train.len(), &config)?;
        if *unnamed {
            let name = registry::short(output_dir);
            line(format_args!("name      {name}   --name or --output-dir chooses another"));
        }
        restate(arguments, self.objective, &job, rows, &config, steps);
        if from.is_none() {
            tell_findings(arguments, &self.sources, rows);
        }
        job.planned.iter().for_each(|planned| line(&planned.words));
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
        let made = objective(&job, self.objective, (&groups, &held_out), &config, directory)
            .and_then(|objective| Ok((objective, own_kind(arguments, &job.model, directory)?)));
        let (objective, own_kind) = match made {
            Err(_) if interrupt::asked() => {
                line(match from {
                    Some(_) => "stopped before another step; the run is as it was",
                    None => "stopped before the first step; nothing was learned",
                });
                if let Some(run) = run {
                    line(format_args!("next      homeroom resume {}", run.id()));
                    run.finish(End::Interrupted(Value::Object(Map::new())))?;
                }
                return Ok(Done::Interrupted);
            }
            made => made?,
        };
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
        let token = run.map(RunDirectory::token);
        let standing = place::standing(output_dir, token.as_deref(), self.claim.as_deref());
        let checkpoint = recording.as_ref().and_then(Recording::newest);
        if let (true, Standing::Claimed, Some(run), Some(checkpoint)) =
            (outcome.report.interrupted, standing, run, checkpoint)
        {
            // An older model stays until the new one is whole.
            line(format_args!(
                "stopped after step {} of {}; what it had learned by then is in {}, and {} is as it was",
                outcome.report.steps.len(),
                outcome.report.planned_steps,
                checkpoint.display(),
                output_dir.display()
            ));
            line(format_args!("next      homeroom resume {}", run.id()));
            let mut summary = Map::from_iter([("run".to_owned(), run.id().into())]);
            summary.extend(outcome.summary());
            run.finish(End::Interrupted(Value::Object(summary.clone())))?;
            if arguments.json {
                print(&Value::Object(summary).to_string())?;
            }
            return Ok(Done::Interrupted);
        }
        let taken = match (standing, *unnamed) {
            (Standing::Own | Standing::Claimed, _) => Taken::Replaced,
            (_, true) => Taken::GivenUp(&another),
            (_, false) => Taken::Stays,
        };
        let saved = outcome.save(&job, output_dir, taken, None)?;
        if *unnamed && saved != *output_dir {
            let (name, taken) = (registry::short(&saved), registry::short(output_dir));
            line(format_args!("name      {name}   as {taken} was taken meanwhile"));
            if let Some(run) = run {
                let mut settings = run.settings();
                settings.insert("output_dir".to_owned(), saved.display().to_string().into());
                if let Err(error) = run.set_settings(settings) {
                    line(format_args!("warning: run {}: {error:#}", run.id()));
                }
            }
        }
        let samples = match outcome.report.interrupted {
            true => Vec::new(),
            // The result is saved: what fails here costs no more than the answers.
            false => samples.ask_after(&job.model, &job.now().0).unwrap_or_else(|error| {
                line(format_args!("warning: the held-out questions cannot be answered: {error:#}"));
                Vec::new()
            }),
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

/// How the file of `--forgetting` is read.
fn own_reading(arguments: &Arguments) -> Reading {
    Reading { columns: arguments.forgetting_columns.clone().unwrap_or_default(), ..Reading::default() }
}

/// The rows of `--forgetting`, if it is given.
fn own_kind(arguments: &Arguments, model: &Arc<BaseModel>, training: Option<&Path>) -> Result<Option<ForgettingRows>> {
    Ok(match &arguments.forgetting {
        None => None,
        Some(None) => Some(ForgettingRows::own(model, training)?),
        Some(Some(file)) => {
            let RowArgs { max_seq_len, on_long_row, .. } = arguments.rows;
            let (files, reading) = ([Source::file(file)], own_reading(arguments));
            let rows = load_measured(&files, &reading, model, max_seq_len, on_long_row, "--forgetting")?;
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
    let mut watcher = Watcher { bar: progress::Training::start(steps) };
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
        interrupt::stop_if_asked()
    };
    let made = job.objective(objective, groups, config, directory, &mut progress);
    bar.into_iter().for_each(|bar| bar.finish_and_clear());
    made
}

/// Draws progress, and ends the training where the user asks for it.
struct Watcher {
    bar: progress::Training,
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
        self.bar.evaluating(done, all);
    }

    fn is_cancelled(&mut self) -> bool {
        interrupt::asked()
    }

    fn is_due(&mut self, state: &State) -> bool {
        state.report.interrupted
    }
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
    fn load(arguments: &Arguments, sources: &Inputs, model: &BaseModel) -> Result<Self> {
        let RowArgs { max_seq_len, on_long_row, .. } = arguments.rows;
        let (reading, objective) = (&sources.reading, arguments.objective.objective);
        let load = |files: &[Source]| load_rows(files, reading, model, max_seq_len, on_long_row, objective);
        let data = load(&sources.files)?;
        let eval_file = (!sources.held_out.is_empty()).then(|| load(&sources.held_out)).transpose()?;
        let (train, eval) = match arguments.eval_fraction {
            Some(share) if share > 0.0 => data.split(share, arguments.seed)?,
            _ => ((0..data.examples.len()).collect(), Vec::new()),
        };
        Ok(Self { data, train, eval_file, eval })
    }

    /// The lines of the training file that are held out, ascending.
    fn held_lines(&self) -> Vec<usize> {
        let mut lines: Vec<usize> = self.eval.iter().map(|index| self.data.examples[*index].line()).collect();
        lines.sort_unstable();
        lines.dedup();
        lines
    }

    /// The same rows, to be read again.
    fn source<'a>(arguments: &'a Arguments, sources: &'a Inputs, held_lines: &'a [usize]) -> Files<'a> {
        let kind = arguments.objective.objective;
        Files::new(&sources.files, &sources.held_out, &sources.reading)
            .without(held_lines)
            .of_kind(kind.rows(), kind.name())
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
