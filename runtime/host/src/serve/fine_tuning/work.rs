//! The thread that does one job after another: it has a process train, watches it, and notes how that ends.

use std::collections::BTreeMap;
use std::process::Child;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use homeroom_engine::files::take_away;

use super::events::{self, Metrics};
use super::job::{Failure, Job, Status};
use super::tuning::Tuning;
use super::{checkpoints, child, told};
use crate::interrupt::EXIT_CODE;
use crate::progress::line;
use crate::registry;
use crate::runs;
use crate::serve::files::store::{About, NotKept};
use crate::serve::now;
use crate::serve::tuned::Tuned;

/// How often a training is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is looked for what it has saved.
const LOOK_SAVED: Duration = Duration::from_millis(300);
/// How long a training that is asked to end may take to save what it has.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What a client wants of a job that trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Cancel,
    Pause,
}

/// How a training came to its end.
pub(super) enum Ended {
    /// The model is there.
    Succeeded,
    /// It is not, for this reason.
    Failed(Failure),
    /// A client wanted it.
    Wished(Wish),
    /// The server ends; the job goes on when there is one again.
    Stopped,
}

enum Watched {
    /// By itself, with this code; `None`: a signal ended it.
    Ended(Option<i32>),
    /// As somebody wanted.
    Wanted(Ended),
}

impl Tuning {
    /// Does jobs until the server ends.
    pub(super) fn work(&self) {
        loop {
            let job = {
                let mut state = self.state();
                loop {
                    if state.stopping {
                        return;
                    }
                    let waiting = state.jobs.values_mut().filter(|job| job.status == Status::Queued);
                    if let Some(job) = waiting.min_by_key(|job| job.number) {
                        // In one with the look: whoever ends it from now on ends a training.
                        job.status = Status::Running;
                        let job = job.clone();
                        state.wish = None;
                        break job;
                    }
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            self.change(&job.id, |job| job.status = Status::Running);
            events::tell(&self.place(&job.id), "info", "Fine-tuning job started");
            let ended = self.train(&job).unwrap_or_else(|error| {
                let message = format!("{error:#}");
                line(format_args!("warning: {}: {message}", job.id));
                let message = told::to_client(&message, &[]);
                Ended::Failed(Failure { code: "training_failed".to_owned(), message, param: None })
            });
            if matches!(ended, Ended::Stopped) {
                return;
            }
            self.end(&job.id, ended);
        }
    }

    /// What a client or the server wants of the job that trains.
    fn wanted(&self) -> Option<Ended> {
        let state = self.state();
        match state.wish {
            _ if state.stopping => Some(Ended::Stopped),
            Some(wish) => Some(Ended::Wished(wish)),
            None => None,
        }
    }

    fn train(&self, job: &Job) -> Result<Ended> {
        let invalid = |param: &str, message: String| {
            let code = format!("invalid_{param}");
            Ok(Ended::Failed(Failure { code, message, param: Some(param.to_owned()) }))
        };
        let find = |id: &str| self.files.find(job.key.as_deref(), id);
        let Some(training) = find(&job.training_file) else {
            return invalid("training_file", format!("the file {} is gone", job.training_file));
        };
        let validation = match job.validation_file.as_deref().map(|id| (id, find(id))) {
            None => None,
            Some((id, None)) => return invalid("validation_file", format!("the file {id} is gone")),
            Some((_, Some(file))) => Some(file),
        };
        // A training whose server was killed may still be saving what it has.
        while self.run_of(job).is_some_and(|run| run.status == runs::Status::Running) {
            if let Some(ended) = self.wanted() {
                return Ok(ended);
            }
            thread::sleep(LOOK);
        }
        let names = |file: &About| (self.files.content(file).display().to_string(), file.filename.clone());
        let log = self.place(&job.id).join("log");
        let validation_path = validation.as_ref().map(|file| self.files.content(file));
        let content = self.files.content(&training);
        let mut child = child::start(job, &self.settings, &content, validation_path.as_deref(), &log)?;
        let code = match self.watch(job, &mut child)? {
            Watched::Ended(code) => code,
            Watched::Wanted(ended) => return Ok(ended),
        };
        if code == Some(0) && registry::place(&job.name)?.exists() {
            return Ok(Ended::Succeeded);
        }
        if code == Some(i32::from(EXIT_CODE)) {
            // Somebody else has interrupted it: it waits to be taken up again.
            return Ok(Ended::Wished(Wish::Pause));
        }
        let mut names: Vec<(String, String)> = std::iter::once(&training).chain(&validation).map(names).collect();
        names.push((job.base.display().to_string(), job.model.clone()));
        let message = child::last_error(&log).unwrap_or_else(|| match code {
            Some(code) => format!("the training ended with code {code}"),
            None => "the training was killed; the system does so where memory is short".to_owned(),
        });
        line(format_args!("warning: {}: {message}\n         {}", job.id, log.display()));
        let message = told::to_client(&message, &names);
        // Nothing was begun: it is the rows that are wrong, as a rule.
        match self.run_of(job) {
            None if code == Some(1) && message.contains(&training.filename) => invalid("training_file", message),
            _ => Ok(Ended::Failed(Failure { code: "training_failed".to_owned(), message, param: None })),
        }
    }

    /// Watches a training until it ends, or until it is to end.
    fn watch(&self, job: &Job, child: &mut Child) -> Result<Watched> {
        let mut looked = Instant::now();
        let mut run = None;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Watched::Ended(status.code()));
            }
            if let Some(ended) = self.wanted() {
                match ended {
                    Ended::Wished(Wish::Cancel) => drop(child.kill()),
                    _ => {
                        child::interrupt(child);
                        let late = Instant::now() + PATIENCE;
                        while Instant::now() < late && child.try_wait()?.is_none() {
                            thread::sleep(LOOK);
                        }
                        // Its last checkpoint stays.
                        let _ = child.kill();
                    }
                }
                child.wait()?;
                return Ok(Watched::Wanted(ended));
            }
            if looked.elapsed() > LOOK_SAVED {
                looked = Instant::now();
                if run.is_none() {
                    run = self.run_of(job);
                    if let Some(run) = &run {
                        self.change(&job.id, |job| job.run = Some(run.id.clone()));
                    }
                }
                if let Some(run) = &run {
                    self.keep_checkpoints(job, run);
                }
            }
            thread::sleep(LOOK);
        }
    }

    /// Keeps what the run of a job has saved after an epoch as a model that can be asked.
    fn keep_checkpoints(&self, job: &Job, run: &runs::Entry) {
        let place = self.place(&job.id);
        for step in checkpoints::keep(&place, &run.path) {
            let name = checkpoints::name(&job.name, step);
            events::tell(&place, "info", &format!("New checkpoint created at step {step}: {name}"));
        }
    }

    /// The run of a job: the one whose result has its name.
    fn run_of(&self, job: &Job) -> Option<runs::Entry> {
        let place = registry::place(&job.name).ok()?.display().to_string();
        let is_ours = |run: &runs::Entry| {
            run.record
                .as_ref()
                .is_some_and(|record| record.settings.get("output_dir").and_then(|dir| dir.as_str()) == Some(&place))
        };
        match &job.run {
            Some(run) => runs::find(run).ok().filter(is_ours),
            None => runs::list().ok()?.into_iter().rev().find(is_ours),
        }
    }

    /// Notes how a job has ended.
    pub(super) fn end(&self, id: &str, ended: Ended) {
        let Some(job) = self.state().jobs.get(id).cloned() else { return };
        let place = self.place(id);
        let run = self.run_of(&job);
        let metrics = match (&run, &ended) {
            (Some(run), Ended::Succeeded | Ended::Failed(_) | Ended::Wished(Wish::Cancel)) => {
                events::keep_metrics(&place, &run.path).unwrap_or_default()
            }
            _ => BTreeMap::new(),
        };
        let (status, level, message, error) = match ended {
            Ended::Succeeded => (Status::Succeeded, "info", "The job has successfully completed".to_owned(), None),
            Ended::Failed(failure) => {
                (Status::Failed, "error", format!("The job has failed: {}", failure.message), Some(failure))
            }
            Ended::Wished(Wish::Cancel) => (Status::Cancelled, "info", "The job has been cancelled".to_owned(), None),
            Ended::Wished(Wish::Pause) => (Status::Paused, "info", "The job has been paused".to_owned(), None),
            Ended::Stopped => return,
        };
        let mut result_files = Vec::new();
        if status == Status::Succeeded {
            match self.keep_table(&job, &metrics) {
                Ok(file) => result_files.push(file.id),
                Err(NotKept::Full(words)) => {
                    events::tell(&place, "warn", &format!("The losses are not kept as a file: {words}"));
                }
                Err(why) => {
                    line(format_args!("warning: {id}: the losses are not kept as a file: {why:?}"));
                    events::tell(&place, "warn", "The losses are not kept as a file");
                }
            }
            let publish = self.publish.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(publish) = &*publish {
                publish(&job.name, job.key.clone(), Arc::new(Tuned::new(&job.name)));
                for (step, kept) in checkpoints::kept(&place) {
                    let name = checkpoints::name(&job.name, step);
                    publish(&name, job.key.clone(), Arc::new(Tuned::at(&name, kept)));
                }
            }
            events::tell(&place, "info", &format!("The model is {}", job.name));
        }
        if status == Status::Cancelled {
            self.clear(&job, run.as_ref());
        }
        events::tell(&place, level, &message);
        self.change(id, |job| {
            job.status = status;
            job.error = error;
            job.run = run.map(|run| run.id).or(job.run.take());
            job.result_files = result_files;
            if status.is_final() {
                job.finished_at = Some(now());
            }
            if status == Status::Succeeded {
                job.trained_tokens = Some(metrics.values().map(|metrics| metrics.tokens).sum());
            }
        });
    }

    /// The losses as a file of the client's.
    fn keep_table(&self, job: &Job, metrics: &BTreeMap<u64, Metrics>) -> Result<About, NotKept> {
        let mut file = self.files.begin(job.key.as_deref(), "step_metrics.csv")?;
        file.write(events::table(metrics).as_bytes())?;
        Ok(file.keep("fine-tune-results", None)?)
    }

    /// Removes what a job left that was cancelled: its run, with the checkpoints, and what it had saved when it was halted.
    fn clear(&self, job: &Job, run: Option<&runs::Entry>) {
        for (_, checkpoint) in checkpoints::kept(&self.place(&job.id)) {
            let _ = take_away(&checkpoint);
        }
        if let Some(run) = run.filter(|run| run.status != runs::Status::Running) {
            let _ = take_away(&run.path);
            if let Ok(place) = registry::place(&job.name)
                && place.exists()
            {
                let _ = take_away(&place);
            }
        }
    }
}
