//! The jobs. They are files, so that a server that is started again goes on with them; [`super::work`] does one after another.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::files::make_directory;

use super::checkpoints;
use super::events::{self, Metrics};
use super::job::{Job, Status, result_name};
use super::request::Order;
use super::work::{Ended, PATIENCE, Wish};
use crate::handler::config::fine_tuning::Settings;
use crate::models::{Network, base_of, here};
use crate::progress::line;
use crate::random;
use crate::registry;
use crate::runs;
use crate::serve::files::store::Files;
use crate::serve::now;
use crate::serve::tuned::Tuned;

/// Most jobs that are known.
const JOBS_MAX: usize = 10_000;
/// Most of them of a key.
const JOBS_OF_KEY_MAX: usize = 2_000;

#[derive(Default)]
pub(super) struct State {
    pub(super) jobs: BTreeMap<String, Job>,
    /// Of the job that trains.
    pub(super) wish: Option<Wish>,
    pub(super) stopping: bool,
    /// The thread has ended.
    idle: bool,
}

/// Called with each model that is trained, by its name, and with the key that it was trained for.
pub type Publish = Box<dyn Fn(&str, Option<String>, Arc<Tuned>) + Send + Sync>;

/// The jobs of a server.
pub struct Tuning {
    directory: PathBuf,
    pub(super) settings: Settings,
    pub(super) files: Arc<Files>,
    state: Mutex<State>,
    pub(super) changed: Condvar,
    pub(super) publish: Mutex<Option<Publish>>,
}

/// Why a client's wish is refused, in words.
pub type Refused = String;

/// Why a job is not taken.
pub enum NotTaken {
    /// So many wait or are known, in words.
    Full(String),
    /// So many of the client's key are, in words.
    OfKey(String),
    /// It cannot be written.
    Failed(anyhow::Error),
}

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

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Changes a job, in memory and on the disk.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut Job)) {
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
        let of_settings = self.settings.bases.get(name).cloned();
        let is_of_settings = of_settings.is_some();
        let Some(model) = of_settings.or_else(own) else { return Ok(None) };
        let located = match here(&model) {
            Ok(Some(located)) => located,
            // A model of the client's own may have been removed since.
            _ if !is_of_settings => return Ok(None),
            Ok(None) => bail!("`{name}` may be trained here, and is not on this machine"),
            Err(error) => return Err(error),
        };
        if !is_adapter(&located.path) {
            return Ok(Some((model, None)));
        }
        let base = base_of(&AdapterFiles::read(&located.path)?, Network::Never("a client asks for it"))?;
        Ok(Some((base.path, Some(located.path))))
    }

    /// Takes a job into the queue.
    ///
    /// # Errors
    /// When the queue is full or the share of the key, or nothing can be written.
    pub fn add(&self, key: Option<&str>, order: Order, base: (PathBuf, Option<PathBuf>)) -> Result<Job, NotTaken> {
        let mut state = self.state();
        if let Some(key) = key {
            let of_key = || state.jobs.values().filter(|job| job.key.as_deref() == Some(key));
            let begun = of_key().filter(|job| !job.status.is_final()).count();
            if begun >= self.settings.key_jobs {
                return Err(NotTaken::OfKey(format!(
                    "the key `{key}` may have so many jobs that have not ended: {begun}; wait until one has, or cancel one (POST /v1/fine_tuning/jobs/ID/cancel)"
                )));
            }
            if of_key().count() >= JOBS_OF_KEY_MAX {
                return Err(NotTaken::OfKey(format!(
                    "{JOBS_OF_KEY_MAX} jobs of the key `{key}` are known; whoever runs the server can remove old ones from fine_tuning/"
                )));
            }
        }
        let waiting = state.jobs.values().filter(|job| job.status == Status::Queued).count();
        if waiting >= self.settings.queue {
            return Err(NotTaken::Full(format!(
                "{waiting} jobs wait already, the most that this server takes; try again when some have ended"
            )));
        }
        if state.jobs.len() >= JOBS_MAX {
            return Err(NotTaken::Full(format!(
                "{JOBS_MAX} jobs are known; whoever runs the server can remove old ones from fine_tuning/"
            )));
        }
        let id = format!("ftjob-{}", random::id());
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
        make_directory(&place).and_then(|()| job.write(&place)).map_err(NotTaken::Failed)?;
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
        let job = state.jobs.get_mut(id).ok_or("it is gone")?;
        match job.status {
            Status::Running => state.wish = Some(Wish::Cancel),
            Status::Queued | Status::Paused => {
                // In one with the look, so that it is not begun meanwhile.
                job.status = Status::Cancelled;
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
        let job = state.jobs.get_mut(id).ok_or("it is gone")?;
        match job.status {
            Status::Running => state.wish = Some(Wish::Pause),
            Status::Queued => {
                job.status = Status::Paused;
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
}
