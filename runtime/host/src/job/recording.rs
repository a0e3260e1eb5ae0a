//! Keeps a training in the directory of its run: an event a step, and checkpoints that it can go on from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use homeroom_abi::step::Directive;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{pretty, read_manifest};
use homeroom_engine::files::{NewDirectory, bytes_below, ensure_room, read_text, take_away};
use homeroom_engine::memory::{self, Room};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{
    Candidate, Change, Control, EvalReport, Observer, RunEvent, State, StepReport, TrainConfig, TrainReport, checkpoint,
};
use serde_json::{Value, json};

use super::Job;
use super::stall::Stall;
use crate::machine::{give_back_memory, peak_memory_bytes};
use crate::processor;
use crate::progress::{line, size, thousands};
use crate::runs::{Events, RunDirectory};
use crate::troubles;

/// What the observers need to go on, in a checkpoint.
const MEMORY_FILE: &str = "observers.json";
/// Largest of those files.
const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Steps between the last checkpoint and the one that is kept before it: what diverges is noticed after that many.
const STEPS_BEFORE: u64 = 32;

/// When a training is saved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Saving {
    /// Steps between two checkpoints.
    pub steps: Option<u64>,
    /// Minutes between two checkpoints; 0: time does not matter.
    pub minutes: f64,
}

impl Saving {
    /// Minutes where nothing else is said.
    pub const MINUTES: f64 = 5.0;

    /// As options say it: minutes count where neither is given.
    pub fn of(steps: Option<u64>, minutes: Option<f64>) -> Self {
        Self { steps, minutes: minutes.unwrap_or(if steps.is_some() { 0.0 } else { Self::MINUTES }) }
    }
}

/// A training in the directory of its run.
pub struct Recording<'a> {
    run: &'a RunDirectory,
    number: usize,
    /// `trainings/<number>`.
    directory: PathBuf,
    saving: Saving,
    saved: Instant,
    /// Steps of the checkpoints that are there and whole, ascending.
    steps: Vec<u64>,
    /// The best state, where the disk could not take it: without it a later one is not what a run can go on from.
    unsaved: Option<(State, Value)>,
    /// A disk that is full is told once.
    is_told: bool,
}

/// A state that was saved, with what its observers need.
pub struct Resumed {
    /// The state.
    pub state: State,
    /// What [`Observer::memory`] gave.
    pub memory: Value,
}

impl Resumed {
    /// What the user's observer gave, beside what is the strategy's.
    pub fn of_observer(&self) -> &Value {
        &self.memory["observer"]
    }
}

impl<'a> Recording<'a> {
    /// The training of this number, from 1, of a run. A newest checkpoint that is not whole is left out, with a warning.
    ///
    /// # Errors
    /// When its directory cannot be made.
    pub fn new(run: &'a RunDirectory, number: usize, saving: Saving) -> Result<Self> {
        let directory = run.training(number)?;
        let mut steps = checkpoints(&directory);
        while let Some(step) = steps.pop() {
            let Err(error) = check(&checkpoint_path(&directory, step)) else {
                steps.push(step);
                break;
            };
            let then = steps
                .last()
                .map_or("there is none before it".to_owned(), |step| format!("that of step {step} is taken"));
            line(format_args!("warning: the checkpoint of step {step} is left out: {error:#}; {then}"));
        }
        Ok(Self { run, number, directory, saving, saved: Instant::now(), steps, unsaved: None, is_told: false })
    }

    /// Its directory in that of the run.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The newest checkpoint's directory.
    pub fn newest(&self) -> Option<PathBuf> {
        self.steps.last().map(|step| self.path(*step))
    }

    /// Reads the newest checkpoint, for a job that was made of it. The configuration becomes the one that its bits depend on, and this
    /// process is kept to the instructions that the training began with.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn resume(&self, job: &Job, config: &mut TrainConfig) -> Result<Resumed> {
        let directory = self.newest().context("there is no checkpoint")?;
        let summary = checkpoint::summary(&directory)?;
        config.compute = summary.cut.compute.parse::<Compute>()?;
        // What a strategy that came meanwhile proposes is for a new run.
        let manifest = read_manifest(&directory)?;
        let rate = manifest.as_ref().and_then(|manifest| manifest.training["config"]["learning_rate"].as_f64());
        config.learning_rate = rate.unwrap_or(config.learning_rate);
        processor::keep_to(&summary.cut.cpu);
        let resumed = read(&directory, job, config)?;
        self.event(json!({"event": "resumed", "step": resumed.state.step}));
        Ok(resumed)
    }

    /// Writes an event of this training.
    pub fn event(&self, mut event: Value) {
        event["training"] = self.number.into();
        self.run.event(&event);
    }

    /// Writes events of this training from another thread.
    pub(super) fn log(&self) -> Log {
        Log { events: self.run.events(), number: self.number }
    }

    fn is_due(&self, state: &State) -> bool {
        let Saving { steps, minutes } = self.saving;
        let is_best = is_best(state);
        let longest = Duration::try_from_secs_f64(60.0 * minutes).unwrap_or(Duration::MAX);
        let in_time = minutes > 0.0 && self.saved.elapsed() >= longest;
        let in_steps = steps.is_some_and(|steps| state.step > 0 && state.step.is_multiple_of(steps));
        // The first one is for a training that fails before any other; of a whole model it would be as large as the model thrice.
        let is_first = state.step == 0 && !state.adaptation().is_whole_model();
        is_best || in_time || in_steps || is_first
    }

    /// Saves, and removes what is no longer needed. A disk that is full ends no training.
    fn save(&mut self, job: &Job, config: &TrainConfig, state: &State, memory: &Value) {
        if is_best(state) {
            self.unsaved = None;
        }
        let mut written = Ok(());
        if let Some((best, memory)) = self.unsaved.take() {
            written = self.write(job, config, &best, &memory);
            self.unsaved = written.is_err().then_some((best, memory));
        }
        match written.and_then(|()| self.write(job, config, state, memory)) {
            Ok(()) => {
                self.prune(state);
                self.is_told = false;
            }
            Err(error) => {
                if is_best(state) && config.load_best_model_at_end {
                    self.unsaved = state.copy().ok().map(|state| (state, memory.clone()));
                }
                if !std::mem::replace(&mut self.is_told, true) {
                    line(format_args!(
                        "warning: no checkpoint at step {}: {error:#}; the training goes on",
                        state.step
                    ));
                    troubles::of(&error).iter().for_each(line);
                }
            }
        }
        // Also after a failure: to try again after each step would cost more than it saves.
        self.saved = Instant::now();
    }

    fn write(&mut self, job: &Job, config: &TrainConfig, state: &State, memory: &Value) -> Result<()> {
        let (start, path) = (Instant::now(), self.path(state.step));
        write(&path, job, config, state, memory, self.run.id())?;
        self.steps.retain(|step| *step < state.step);
        self.steps.push(state.step);
        let (seconds, bytes) = (start.elapsed().as_secs_f64(), bytes_below(&path));
        self.event(json!({"event": "checkpoint", "step": state.step, "seconds": seconds, "bytes": bytes}));
        Ok(())
    }

    /// Removes the checkpoints of steps that were taken back: a run that is taken up again does not go on from one of them.
    fn forget_after(&mut self, step: u64) {
        self.steps.retain(|saved| *saved <= step);
        if self.unsaved.as_ref().is_some_and(|(state, _)| state.step > step) {
            self.unsaved = None;
        }
        for saved in checkpoints(&self.directory).into_iter().filter(|saved| *saved > step) {
            let _ = take_away(&self.path(saved));
        }
    }

    fn path(&self, step: u64) -> PathBuf {
        checkpoint_path(&self.directory, step)
    }

    /// Keeps the last checkpoint, the best, the newest that what diverges can go back to, and the one behind it, which takes its place
    /// in time.
    fn prune(&mut self, state: &State) {
        let best = state.steps_of_best();
        let old = self.steps.iter().take_while(|step| **step + STEPS_BEFORE <= state.step).count();
        let bridge: Vec<u64> = self.steps[old.saturating_sub(1)..].iter().take(2).copied().collect();
        let keeps = |step: &u64| *step == state.step || best.contains(&Some(*step)) || bridge.contains(step);
        self.steps.retain(keeps);
        for step in checkpoints(&self.directory).iter().filter(|step| !keeps(step)) {
            let _ = take_away(&self.path(*step));
        }
    }

    fn saved(&self, job: &Job, config: &TrainConfig, step: u64) -> Result<Option<Resumed>> {
        for saved in self.steps.iter().rev().filter(|saved| **saved <= step) {
            if let Some((state, memory)) =
                self.unsaved.as_ref().filter(|(state, _)| state.step <= step && state.step > *saved)
            {
                return Ok(Some(Resumed { state: state.copy()?, memory: memory.clone() }));
            }
            match read(&self.path(*saved), job, config) {
                Ok(resumed) => return Ok(Some(resumed)),
                // One that is damaged costs what it held, and not what the run has learned since.
                Err(error) => line(format_args!("warning: the checkpoint of step {saved} is left out: {error:#}")),
            }
        }
        let unsaved = self.unsaved.as_ref().filter(|(state, _)| state.step <= step);
        unsaved.map(|(state, memory)| Ok(Resumed { state: state.copy()?, memory: memory.clone() })).transpose()
    }
}

/// Writes events of a training, also while it is in a step.
#[derive(Clone)]
pub(super) struct Log {
    events: Arc<Events>,
    number: usize,
}

impl Log {
    /// Writes one.
    pub(super) fn event(&self, mut event: Value) {
        event["training"] = self.number.into();
        self.events.write(&event);
    }
}

/// What memory there is now, as an event has it: of this process at the highest, what is left, and of how much; null where the system does
/// not say. `planned`: what the plan says it will take.
pub(super) fn memory_now(planned: Option<u64>) -> Value {
    let (room, peak) = (memory::room(), peak_memory_bytes());
    json!({
        "planned_bytes": planned,
        "peak_bytes": peak,
        "left_bytes": room.map(|room| room.left),
        "all_bytes": room.map(|room| room.all),
    })
}

/// Whether no evaluation was better than that after the last step.
fn is_best(state: &State) -> bool {
    state.best.is_some_and(|best| best.step == state.step && best.since == 0)
}

/// The directory of the checkpoint after a step.
fn checkpoint_path(training: &Path, step: u64) -> PathBuf {
    training.join("checkpoints").join(format!("step-{step:06}"))
}

/// The path that a checkpoint of this step has beside another.
fn checkpoint_path_of(beside: &Path, step: u64) -> PathBuf {
    beside.with_file_name(format!("step-{step:06}"))
}

/// Steps of the checkpoints of a training's directory, ascending.
fn checkpoints(training: &Path) -> Vec<u64> {
    let entries = fs::read_dir(training.join("checkpoints")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut steps: Vec<u64> = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

/// The newest checkpoint of a training's directory.
pub fn newest_checkpoint(training: &Path) -> Option<PathBuf> {
    checkpoints(training).last().map(|step| checkpoint_path(training, *step))
}

/// Writes a checkpoint, whole or not at all.
fn write(path: &Path, job: &Job, config: &TrainConfig, state: &State, memory: &Value, run: &str) -> Result<()> {
    let parent = path.parent().context("a checkpoint is in a training's directory")?;
    homeroom_engine::files::make_directory(parent)?;
    ensure_room(parent, checkpoint::bytes(state))?;
    let directory = NewDirectory::start(path)?;
    let strategy = job.now().1;
    let training = json!({
        "config": config,
        "options": job.options,
        "init_from": job.init_from,
        "run": run,
        "step": state.step,
        "planned_steps": state.report.planned_steps,
    });
    job.write(&directory, (state.adaptation(), &strategy), false, None, training)?;
    directory.write(MEMORY_FILE, pretty(memory)?.as_bytes())?;
    checkpoint::write(&directory, state)?;
    directory.publish().map(drop)
}

/// Whether a checkpoint is whole, as far as that is seen without its base.
fn check(path: &Path) -> Result<()> {
    let step = checkpoint::check(path)?;
    ensure!(*path == checkpoint_path_of(path, step), "{}: it is of step {step}", path.display());
    read_memory(path)?;
    read_manifest(path)?.with_context(|| format!("{}: not a checkpoint", path.display())).map(drop)
}

fn read(path: &Path, job: &Job, config: &TrainConfig) -> Result<Resumed> {
    Ok(Resumed { state: checkpoint::read(path, &job.model, config)?, memory: read_memory(path)? })
}

fn read_memory(path: &Path) -> Result<Value> {
    let path = path.join(MEMORY_FILE);
    let memory = read_text(&path, MEMORY_BYTES_MAX)?;
    serde_json::from_str(&memory).with_context(|| format!("{}: damaged", path.display()))
}

/// The observer around all others of a training: it records it, if it is to be recorded.
pub(super) struct Recorder<'b, 'a> {
    pub(super) inner: &'b mut dyn Observer,
    pub(super) job: &'b Job,
    pub(super) config: &'b TrainConfig,
    pub(super) recording: Option<&'b mut Recording<'a>>,
    /// Where no plugin is beside the training: what the strategy gave to hear again, before it was gone.
    pub(super) strategy: Option<Value>,
    pub(super) stall: Stall,
    /// What the observers had given when the state was saved that was read last.
    memory: Value,
    /// What was left of the memory when it was last written down.
    left: Option<u64>,
    /// Whether it was said that nothing takes less memory.
    told_lowest: bool,
}

/// What is left of the memory is written down anew where it differs by this part of all.
const LEFT_PART: u64 = 32;

impl<'b, 'a> Recorder<'b, 'a> {
    pub(super) fn new(
        inner: &'b mut dyn Observer,
        job: &'b Job,
        config: &'b TrainConfig,
        recording: Option<&'b mut Recording<'a>>,
        strategy: Option<Value>,
        stall: Stall,
    ) -> Self {
        Self { inner, job, config, recording, strategy, stall, memory: Value::Null, left: None, told_lowest: false }
    }

    fn event(&self, event: Value) {
        if let Some(recording) = &self.recording {
            recording.event(event);
        }
    }

    /// Says how the training ended: one that its observer ended for a reason of its own was interrupted by nobody.
    pub(super) fn ended(&self, report: &TrainReport) {
        let step = report.steps.last().map_or(0, |step| step.step);
        if report.interrupted && report.stopped.is_none() {
            self.event(match self.inner.reason() {
                Some(reason) => json!({"event": "stopped", "step": step, "reason": reason}),
                None => json!({"event": "interrupted", "step": step}),
            });
            return;
        }
        if let Some(reason) = &report.stopped {
            self.event(json!({"event": "stopped", "step": step, "reason": reason}));
        }
        self.event(json!({"event": "finished", "step": step, "kept_step": report.kept_step}));
    }
}

impl Observer for Recorder<'_, '_> {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        let next = (report.step + 1).min(planned_steps);
        self.stall.next(format!("in step {next} of {planned_steps}"), true);
        let mut event = json!({"event": "step"});
        extend(&mut event, serde_json::to_value(report)?);
        if let Some(room) = memory::room()
            && self.left.is_none_or(|left| left.abs_diff(room.left) > room.all / LEFT_PART)
        {
            self.left = Some(room.left);
            event["memory"] = memory_now(None);
        }
        self.event(event);
        self.inner.on_step(report, planned_steps)
    }

    fn directives(&mut self, report: &StepReport, planned_steps: u64) -> Result<Vec<Directive>> {
        self.inner.directives(report, planned_steps)
    }

    fn candidate(&mut self) -> Result<Option<Candidate>> {
        self.inner.candidate()
    }

    fn on_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Control> {
        self.inner.on_eval(report, planned_steps)
    }

    fn evaluating(&mut self, done: usize, all: usize) {
        self.stall.next(format!("evaluating held-out row {done} of {all}"), false);
        self.inner.evaluating(done, all);
    }

    fn evaluated(&mut self, report: &EvalReport) {
        let evaluation = report.evaluation;
        let mut event = json!({
            "event": "eval",
            "step": report.step,
            "epoch": report.epoch,
            "eval_loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            "token_accuracy": evaluation.token_accuracy,
        });
        if let Some(rewards) = evaluation.rewards {
            event["rewards"] = json!(rewards);
        }
        self.event(event);
        self.stall.next(format!("after the evaluation at step {}", report.step), false);
        self.inner.evaluated(report);
    }

    fn memory(&mut self) -> Result<Value> {
        let inner = self.inner.memory()?;
        Ok(match &self.strategy {
            Some(strategy) => json!({"strategy": strategy, "observer": inner}),
            None => inner,
        })
    }

    fn is_cancelled(&mut self) -> bool {
        self.inner.is_cancelled()
    }

    fn reason(&self) -> Option<String> {
        self.inner.reason()
    }

    fn is_due(&mut self, state: &State) -> bool {
        let Some(recording) = &self.recording else { return false };
        match state.report.interrupted {
            // Whom the user ends goes on from there; what a script ends is not to be gone on with behind its back.
            true => self.inner.is_due(state),
            false => recording.is_due(state),
        }
    }

    fn save(&mut self, state: &State) -> Result<()> {
        let memory = self.memory()?;
        if let Some(recording) = &mut self.recording {
            recording.save(self.job, self.config, state, &memory);
        }
        Ok(())
    }

    fn saved(&mut self, step: u64) -> Result<Option<State>> {
        let Some(recording) = &self.recording else { return Ok(None) };
        let Some(resumed) = recording.saved(self.job, self.config, step)? else { return Ok(None) };
        self.memory = resumed.memory;
        Ok(Some(resumed.state))
    }

    fn lowers(&mut self) -> Option<String> {
        if let Some(reason) = self.inner.lowers() {
            return Some(reason);
        }
        let room = memory::room().filter(Room::is_short)?;
        Some(format!("memory is short, {} of {} are left", size(room.left), size(room.all)))
    }

    fn cannot_lower(&mut self) {
        if !std::mem::replace(&mut self.told_lowest, true) {
            line(
                "warning: memory is short, and passes are as small as they can be; the run goes on, and the system may end it: its checkpoints stay",
            );
        }
        self.inner.cannot_lower();
    }

    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        self.inner.changed(event, adaptation)?;
        if self.strategy.is_some() {
            self.job.set_now(adaptation, self.job.strategy.clone());
        }
        if let (Change::Rewound { .. } | Change::RolledBack { .. }, Some(recording)) =
            (&event.change, &mut self.recording)
        {
            recording.forget_after(event.step);
        }
        if let Change::Lowered { pass_rows, gradient_checkpointing, reason } = &event.change {
            give_back_memory();
            let words = lowered_words(*pass_rows as u64, *gradient_checkpointing);
            line(format_args!("note: {reason}; from step {} on {words}, and a step stays what it is", event.step + 1));
        }
        let mut value = serde_json::to_value(event)?;
        if let Change::Rewound { from, reason, rate_scale } = &event.change {
            let memory = std::mem::take(&mut self.memory);
            self.inner.recall(if self.strategy.is_some() { &memory["observer"] } else { &memory });
            let to = event.step;
            value["step"] = json!(from);
            value["to"] = json!(to);
            line(format_args!(
                "warning: {reason}\nrewound   to step {to}, and on with {rate_scale} of the learning rate"
            ));
        }
        self.event(value);
        Ok(())
    }
}

/// How passes were made smaller, in words.
pub fn lowered_words(pass_rows: u64, gradient_checkpointing: bool) -> String {
    let again = if gradient_checkpointing { " and layers are computed again" } else { "" };
    format!("passes hold {} tokens at most{again}", thousands(pass_rows as usize))
}

fn extend(event: &mut Value, other: Value) {
    if let (Value::Object(event), Value::Object(other)) = (event, other) {
        event.extend(other);
    }
}
