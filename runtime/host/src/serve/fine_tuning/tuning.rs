//! The jobs, and the thread that does one after another. Jobs are files, so that a server that is started again goes on with them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::files::{make_directory, take_away};

use super::checkpoints;
use super::child;
use super::events::{self, Metrics};
use super::job::{Failure, Job, Status, result_name};
use super::request::Order;
use super::settings::Settings;
use crate::handler::Handler;
use crate::interrupt::EXIT_CODE;
use crate::models::{Network, base_of, here};
use crate::progress::line;
use crate::registry;
use crate::runs;
use crate::serve::files::store::{About, Files, new_id};
use crate::serve::now;
use crate::serve::tuned::Tuned;

/// How often a training is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a training that is asked to end may take to save what it has.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most jobs that are known.
const JOBS_MAX: usize = 10_000;

/// What a client wants of a job that trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Cancel,
    Pause,
}

/// How a training came to its end.
enum Ended {
    /// The model is there.
    Succeeded,
    /// It is not, for this reason.
    Failed(Failure),
    /// A client wanted it.
    Wished(Wish),
    /// The server ends; the job goes on when there is one again.
    Stopped,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<String, Job>,
    /// Of the job that trains.
    wish: Option<Wish>,
    stopping: bool,
    /// The thread has ended.
    idle: bool,
}

/// Called with each model that is trained, by its name, and with the key that it was trained for.
pub type Publish = Box<dyn Fn(&str, Option<String>, Arc<dyn Handler>) + Send + Sync>;

/// The jobs of a server.
pub struct Tuning {
    directory: PathBuf,
    settings: Settings,
    files: Arc<Files>,
    state: Mutex<State>,
    changed: Condvar,
    publish: Mutex<Option<Publish>>,
}

/// Why a client's wish is refused: in words, and whether the job is of no such kind (as against there being none).
pub type Refused = String;

impl Tuning {
    /// Reads the jobs of a data directory. One that was broken off waits to go on.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn open(data: &Path, settings: Settings) -> Result<Self> {
        let files = Arc::new(Files::open(data, settings.files)?);
        let directory = data.join("fine_tuning");
        make_directory(&directory)?;
        let mut jobs = BTreeMap::new();
        for entry in fs::read_dir(&directory)?.flatten() {
            let Ok(mut job) = Job::read(&entry.path()) else { continue };
            if entry.file_name().to_str() != Some(&job.id) {
                continue;
            }
            if job.status == Status::Running {
                job.status = Status::Queued;
            }
            jobs.insert(job.id.clone(), job);
        }
        let state = Mutex::new(State { jobs, idle: true, ..State::default() });
        Ok(Self { directory, settings, files, state, changed: Condvar::new(), publish: Mutex::default() })
    }

    /// The files that jobs learn from.
    pub fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// Whether a key may send files and have models trained.
    pub fn allows(&self, key: Option<&str>) -> bool {
        match (&self.settings.keys, key) {
            (Some(keys), Some(key)) => keys.iter().any(|named| named == key),
            _ => true,
        }
    }

    /// The models that may be trained, by the names that clients give.
    pub fn bases(&self) -> impl Iterator<Item = &str> {
        self.settings.bases.keys().map(String::as_str)
    }

    /// Hands over all models that are there, and begins to work; each further model is handed over when it is there.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begin(self: &Arc<Self>, publish: Publish) -> Result<()> {
        let done: Vec<Job> = {
            let mut state = self.state();
            state.idle = false;
            state.jobs.values().filter(|job| job.fine_tuned_model().is_some()).cloned().collect()
        };
        for job in done {
            if registry::place(&job.name).is_ok_and(|place| place.exists()) {
                publish(&job.name, job.key.clone(), Arc::new(Tuned::new(&job.name)));
            }
            for (step, place) in checkpoints::kept(&self.place(&job.id)) {
                let name = checkpoints::name(&job.name, step);
                publish(&name, job.key.clone(), Arc::new(Tuned::at(&name, place)));
            }
        }
        *self.publish.lock().unwrap_or_else(PoisonError::into_inner) = Some(publish);
        let tuning = self.clone();
        thread::Builder::new().name("fine-tuning".to_owned()).spawn(move || {
            tuning.work();
            tuning.state().idle = true;
            tuning.changed.notify_all();
            // The training ends with the thread that started it; by now there is none.
        })?;
        Ok(())
    }

    /// Has the training that is under way save what it has and end.
    pub fn stop(&self) {
        self.state().stopping = true;
        self.changed.notify_all();
    }

    /// Waits until it has, after [`Tuning::stop`].
    pub fn wait(&self) {
        let state = self.state();
        let until = PATIENCE + Duration::from_secs(5);
        drop(self.changed.wait_timeout_while(state, until, |state| !state.idle));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Changes a job, in memory and on the disk.
    fn change(&self, id: &str, change: impl FnOnce(&mut Job)) {
        let mut state = self.state();
        let Some(job) = state.jobs.get_mut(id) else { return };
        change(job);
        if let Err(error) = job.write(&self.place(id)) {
            line(format_args!("warning: {id}: {error:#}"));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The jobs of a key, the newest first.
    pub fn of(&self, key: Option<&str>) -> Vec<Job> {
        let mut jobs: Vec<Job> = self.state().jobs.values().filter(|job| job.key.as_deref() == key).cloned().collect();
        jobs.sort_by_key(|job| std::cmp::Reverse(job.number));
        jobs
    }

    /// A job of a key.
    pub fn find(&self, key: Option<&str>, id: &str) -> Option<Job> {
        self.state().jobs.get(id).filter(|job| job.key.as_deref() == key).cloned()
    }

    /// The job that needs a file and has not ended.
    pub fn needs(&self, file: &str) -> Option<String> {
        let needs = |job: &&Job| job.training_file == file || job.validation_file.as_deref() == Some(file);
        self.state().jobs.values().filter(|job| !job.status.is_final()).find(needs).map(|job| job.id.clone())
    }

    /// The base that a name means to a key, and an adapter on it to start from. `None`: it may not be trained.
    ///
    /// # Errors
    /// When it may, and is not there.
    pub fn base(&self, key: Option<&str>, name: &str) -> Result<Option<(PathBuf, Option<PathBuf>)>> {
        let own = || {
            let (model, step) = name.split_once(":ckpt-step-").unwrap_or((name, ""));
            let state = self.state();
            let of_key = |job: &&Job| job.key.as_deref() == key && job.fine_tuned_model() == Some(model);
            let job = state.jobs.values().find(of_key)?;
            if step.is_empty() {
                return Some(PathBuf::from(&job.name));
            }
            let kept = checkpoints::kept(&self.place(&job.id));
            kept.into_iter().find(|(kept, _)| kept.to_string() == step).map(|(_, place)| place)
        };
        let Some(model) = self.settings.bases.get(name).cloned().or_else(own) else { return Ok(None) };
        let located =
            here(&model)?.ok_or_else(|| anyhow!("`{name}` may be trained here, and is not on this machine"))?;
        if !is_adapter(&located.path) {
            return Ok(Some((model, None)));
        }
        let base = base_of(&AdapterFiles::read(&located.path)?, Network::Never("a client asks for it"))?;
        Ok(Some((base.path, Some(located.path))))
    }

    /// Takes a job into the queue.
    ///
    /// # Errors
    /// When it is full, in words, or the disk is.
    pub fn add(&self, key: Option<&str>, order: Order, base: (PathBuf, Option<PathBuf>)) -> Result<Job, Refused> {
        let mut state = self.state();
        let waiting = state.jobs.values().filter(|job| job.status == Status::Queued).count();
        if waiting >= self.settings.queue {
            return Err(format!(
                "{waiting} jobs wait already, the most that this server takes; try again when some have ended"
            ));
        }
        if state.jobs.len() >= JOBS_MAX {
            return Err(format!(
                "{JOBS_MAX} jobs are known; whoever runs the server can remove old ones from fine_tuning/"
            ));
        }
        let id = format!("ftjob-{}", new_id());
        let name = result_name(&order.model, order.suffix.as_deref(), &id);
        let job = Job {
            key: key.map(str::to_owned),
            number: state.jobs.values().map(|job| job.number + 1).max().unwrap_or(1),
            created_at: now(),
            finished_at: None,
            status: Status::Queued,
            model: order.model,
            base: base.0,
            init_from: base.1,
            name,
            training_file: order.training_file,
            validation_file: order.validation_file,
            suffix: order.suffix,
            seed: order.seed,
            method: order.method,
            metadata: order.metadata,
            error: None,
            run: None,
            trained_tokens: None,
            result_files: Vec::new(),
            id,
        };
        let place = self.place(&job.id);
        make_directory(&place).and_then(|()| job.write(&place)).map_err(|error| format!("{error:#}"))?;
        events::tell(&place, "info", &format!("Created fine-tuning job: {}", job.id));
        state.jobs.insert(job.id.clone(), job.clone());
        drop(state);
        self.changed.notify_all();
        Ok(job)
    }

    /// Ends a job: one that trains ends within moments.
    ///
    /// # Errors
    /// In words, when it has ended.
    pub fn cancel(&self, id: &str) -> Result<(), Refused> {
        let mut state = self.state();
        let job = state.jobs.get(id).ok_or("it is gone")?;
        match job.status {
            Status::Running => state.wish = Some(Wish::Cancel),
            Status::Queued | Status::Paused => {
                drop(state);
                self.end(id, Ended::Wished(Wish::Cancel));
                return Ok(());
            }
            ended => return Err(format!("the job has {} already", ended.word())),
        }
        self.changed.notify_all();
        // The answer tells how it stands then.
        let is_running = |state: &mut State| state.jobs.get(id).is_some_and(|job| job.status == Status::Running);
        drop(self.changed.wait_timeout_while(state, Duration::from_secs(5), is_running));
        Ok(())
    }

    /// Halts a job, so that [`Tuning::resume`] goes on with it.
    ///
    /// # Errors
    /// In words, when it neither waits nor trains.
    pub fn pause(&self, id: &str) -> Result<(), Refused> {
        let mut state = self.state();
        let job = state.jobs.get(id).ok_or("it is gone")?;
        match job.status {
            Status::Running => state.wish = Some(Wish::Pause),
            Status::Queued => {
                drop(state);
                self.end(id, Ended::Wished(Wish::Pause));
                return Ok(());
            }
            other => {
                return Err(format!("the job is {}, and only one that waits or trains can be halted", other.word()));
            }
        }
        self.changed.notify_all();
        let is_running = |state: &mut State| state.jobs.get(id).is_some_and(|job| job.status == Status::Running);
        drop(self.changed.wait_timeout_while(state, Duration::from_secs(20), is_running));
        Ok(())
    }

    /// Goes on with a job that was halted.
    ///
    /// # Errors
    /// In words, when it was not.
    pub fn resume(&self, id: &str) -> Result<(), Refused> {
        match self.state().jobs.get(id).map(|job| job.status) {
            Some(Status::Paused) => {}
            Some(other) => return Err(format!("the job is {}, and only one that is paused can go on", other.word())),
            None => return Err("it is gone".to_owned()),
        }
        events::tell(&self.place(id), "info", "The job was taken up again");
        self.change(id, |job| job.status = Status::Queued);
        Ok(())
    }

    /// Losses of a job so far.
    pub fn metrics(&self, job: &Job) -> BTreeMap<u64, Metrics> {
        events::metrics(&self.place(&job.id), job.run.as_deref())
    }

    /// Steps that are planned for a job, if its run says so.
    pub fn planned_steps(&self, job: &Job) -> Option<u64> {
        let run = runs::find(job.run.as_deref()?).ok()?;
        let events = runs::events(&run.path);
        let started = events.iter().rev().find(|event| event["event"] == "started")?;
        ["steps", "planned_steps", "max_steps"].iter().find_map(|name| started[*name].as_u64())
    }

    /// The directory of a job.
    pub fn directory(&self, job: &Job) -> PathBuf {
        self.place(&job.id)
    }

    fn work(&self) {
        loop {
            let job = {
                let mut state = self.state();
                loop {
                    if state.stopping {
                        return;
                    }
                    let waiting = state.jobs.values().filter(|job| job.status == Status::Queued);
                    if let Some(job) = waiting.min_by_key(|job| job.number) {
                        break job.clone();
                    }
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            self.state().wish = None;
            self.change(&job.id, |job| job.status = Status::Running);
            events::tell(&self.place(&job.id), "info", "Fine-tuning job started");
            let ended = self.train(&job).unwrap_or_else(|error| {
                let message = format!("{error:#}");
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
        let message = child::last_error(&log, &names);
        let message = message.unwrap_or_else(|| match code {
            Some(code) => format!("the training ended with code {code}"),
            None => "the training was killed; the system does so where memory is short".to_owned(),
        });
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
            if looked.elapsed() > Duration::from_millis(300) {
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
    fn end(&self, id: &str, ended: Ended) {
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
                Err(error) => events::tell(&place, "warn", &format!("The losses are not kept as a file: {error:#}")),
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
    fn keep_table(&self, job: &Job, metrics: &BTreeMap<u64, Metrics>) -> Result<About> {
        let mut file = self.files.begin(job.key.as_deref(), "step_metrics.csv")?;
        let fits = file.write(events::table(metrics).as_bytes())?;
        ensure!(fits, "it is too long");
        file.keep("fine-tune-results", None)
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

enum Watched {
    /// By itself, with this code; `None`: a signal ended it.
    Ended(Option<i32>),
    /// As somebody wanted.
    Wanted(Ended),
}
