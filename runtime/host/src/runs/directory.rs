//! Writes the directory of one run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use homeroom_engine::files::{make_directory, replace_file, take_away};
use homeroom_engine::text::template;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use toml_edit::{Array, DocumentMut, InlineTable, Item, Table};

use super::events::Events;
use super::list::{Kind, Record, Script, Status, find_in};
use super::retention::prune;
use super::tensorboard::Boards;
use super::{lock, output, report};
use crate::hex::hex;
use crate::progress::line;
use crate::random;
use crate::registry::{self, when};

/// Largest result that `run.json` repeats, in bytes of JSON; a larger one is in `result.json` alone.
const RESULT_BYTES_MAX: usize = 16 << 10;

/// What a run is told of itself when it starts.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// The command line.
    pub command: Vec<String>,
    /// The directory that it was typed in.
    pub cwd: PathBuf,
    /// The settings as resolved, every default filled in: an object, which becomes `config.toml`. Null: there is no such file.
    pub config: Value,
    /// A pipeline's script: where it is, and its text.
    pub script: Option<(PathBuf, String)>,
    /// What a reader and `resume` want to know: `model`, `training_file`, `strategy` and the like.
    pub settings: Map<String, Value>,
}

impl About {
    /// Of this process.
    pub fn here(config: Value, settings: Map<String, Value>) -> Self {
        let command = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
        Self { command, cwd: std::env::current_dir().unwrap_or_default(), config, script: None, settings }
    }
}

/// How a run ends.
#[derive(Clone, Debug)]
pub enum End {
    /// It did all it was asked for; this came of it.
    Finished(Value),
    /// The user ended it, and it can go on; this came of it so far.
    Interrupted(Value),
    /// It failed, for this reason.
    Failed(String),
}

/// The directory of a run that this process works on. It holds the run's lock; dropped without [`RunDirectory::finish`], the run counts
/// as killed.
pub struct RunDirectory {
    id: String,
    path: PathBuf,
    record: Mutex<Record>,
    events: Arc<Events>,
    boards: Boards,
    /// `None` where the file system has no locks.
    _lock: Option<fs::File>,
}

impl RunDirectory {
    /// Makes `runs/<name>-<number>`, for the user alone, with the first number that is free; before that, old runs make room, see
    /// [`prune`].
    ///
    /// # Errors
    /// When there is no data directory, or it cannot be written.
    pub fn start(kind: Kind, name: &str, about: About) -> Result<Self> {
        prune();
        Self::start_in(&runs_directory()?, kind, name, about)
    }

    fn start_in(runs: &Path, kind: Kind, name: &str, about: About) -> Result<Self> {
        make_directory(runs)?;
        let (id, path) = claim(runs, &plain(name))?;
        let lock = lock::take(&path).with_context(|| format!("{id}: cannot start"));
        // What could not say what it is would stay for ever.
        lock.and_then(|lock| Self::begin(id, path.clone(), lock, kind, about)).inspect_err(|_| {
            let _ = take_away(&path);
        })
    }

    fn begin(id: String, path: PathBuf, lock: Option<fs::File>, kind: Kind, about: About) -> Result<Self> {
        write_about(&path, &id, &about)?;
        let script = about.script.as_ref().map(|(file, text)| script_of(file, text));
        let record = Record {
            id: id.clone(),
            kind,
            status: Status::Running,
            started: Some(when::text(SystemTime::now())),
            resumed: Vec::new(),
            finished: None,
            command: about.command,
            cwd: about.cwd.to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            processor: homeroom_kernels::isa().name(),
            clock: Some(template::time()),
            machine: machine(),
            script,
            settings: about.settings,
            token: random::id(),
            result: None,
            error: None,
        };
        record.write(&path)?;
        let events = Arc::new(Events::open(&path)?);
        output::open(&id, &path);
        Ok(Self { id, path, record: Mutex::new(record), events, boards: Boards::default(), _lock: lock })
    }

    /// Opens a run that was killed, interrupted or failed, to go on with it.
    ///
    /// # Errors
    /// When there is none of that name, another process works on it, or it has finished.
    pub fn reopen(id: &str) -> Result<Self> {
        Self::reopen_in(&runs_directory()?, id)
    }

    fn reopen_in(runs: &Path, id: &str) -> Result<Self> {
        let path = find_in(runs, id)?.path;
        let lock = lock::take(&path).with_context(|| format!("run {id}"))?;
        // Read under the lock: it may have ended since.
        let mut record = Record::read(&path)?;
        if record.status == Status::Finished {
            bail!(
                "run {id} has finished; there is nothing left of it to do\nhint: `homeroom runs show {id}` says what came of it"
            );
        }
        record.status = Status::Running;
        record.resumed.push(when::text(SystemTime::now()));
        (record.finished, record.error, record.result) = (None, None, None);
        let _ = fs::remove_file(path.join("result.json"));
        record.write(&path)?;
        let events = Arc::new(Events::open(&path)?);
        output::open(id, &path);
        Ok(Self { id: id.to_owned(), path, record: Mutex::new(record), events, boards: Boards::default(), _lock: lock })
    }

    /// Holds the run in a directory, so that nobody works on it or removes it until what is returned is dropped. `None`: its file system has
    /// no locks.
    ///
    /// # Errors
    /// When a process works on it.
    pub fn hold(run: &Path) -> Result<Option<fs::File>> {
        lock::take(run)
    }

    /// Writes the script, the configuration and the settings anew, as those of a run that goes on after they were edited; returns whether
    /// they differ from those that it had. The command that began it stays.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn renew(&self, about: &About) -> Result<bool> {
        let script = about.script.as_ref().map(|(file, text)| script_of(file, text));
        let mut record = self.record();
        let same = |script: &Option<Script>| script.as_ref().map(|script| (script.path.clone(), script.sha256.clone()));
        let differs = same(&record.script) != same(&script) || record.settings != about.settings;
        write_about(&self.path, &self.id, about)?;
        (record.script, record.settings) = (script, about.settings.clone());
        env!("CARGO_PKG_VERSION").clone_into(&mut record.version);
        record.machine = machine();
        record.write(&self.path)?;
        Ok(differs)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, `<name>-<number>`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of its training of a number, from 1, which is made.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn training(&self, number: usize) -> Result<PathBuf> {
        let path = self.path.join("trainings").join(number.to_string());
        make_directory(&path)?;
        Ok(path)
    }

    /// Writes an event, with the time, as a line of `events.jsonl`; the numbers of a step or an evaluation go to TensorBoard's file in
    /// the directory of its `training`, too. What cannot be written is said once and ends nothing.
    pub fn event(&self, event: &Value) {
        self.events.write(event);
        self.boards.write(&self.path, event);
    }

    /// What its events are written by, for another thread.
    pub fn events(&self) -> Arc<Events> {
        self.events.clone()
    }

    /// What tells it from every other run, also one of its name on another machine.
    pub fn token(&self) -> String {
        self.record().token.clone()
    }

    /// The instructions that it began with, as `HOMEROOM_CPU` names them.
    pub fn processor(&self) -> String {
        self.record().processor.clone()
    }

    /// The time that chat templates tell in it, in seconds of the local time.
    pub fn clock(&self) -> Option<i64> {
        self.record().clock
    }

    /// What it was told when it started.
    pub fn settings(&self) -> Map<String, Value> {
        self.record().settings.clone()
    }

    /// Keeps the settings as they are now known, as when a default was chosen after the start.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn set_settings(&self, settings: Map<String, Value>) -> Result<()> {
        let mut record = self.record();
        record.settings = settings;
        record.write(&self.path)
    }

    /// Says how it ended. The checkpoints of a run that finished go: nothing is left to go on from.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&self, end: End) -> Result<()> {
        let (status, result, error) = match end {
            End::Finished(result) => (Status::Finished, Some(result), None),
            End::Interrupted(result) => (Status::Interrupted, Some(result), None),
            End::Failed(error) => (Status::Failed, None, Some(error)),
        };
        if let Some(result) = result.as_ref().filter(|result| !result.is_null()) {
            replace_file(&self.path.join("result.json"), format!("{result:#}\n").as_bytes())?;
        }
        self.events.sync();
        let mut record = self.record();
        record.status = status;
        record.finished = Some(when::text(SystemTime::now()));
        record.result = result.filter(|result| !result.is_null() && result.to_string().len() <= RESULT_BYTES_MAX);
        record.error = error;
        record.write(&self.path)?;
        drop(record);
        if status == Status::Finished {
            remove_checkpoints(&self.path);
        }
        if let Err(error) = report::write_as(&self.path, status) {
            line(format_args!("note: the report is not written: {error:#}"));
        }
        Ok(())
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        output::close(&self.id);
    }
}

/// Writes a run's script and configuration, those that it has.
fn write_about(path: &Path, id: &str, about: &About) -> Result<()> {
    if let Some((_, text)) = &about.script {
        replace_file(&path.join("script.lua"), text.as_bytes())?;
    }
    if let Some(config) = about.config.as_object() {
        replace_file(&path.join("config.toml"), toml_of(id, config).as_bytes())?;
    }
    Ok(())
}

fn script_of(file: &Path, text: &str) -> Script {
    let sha256 = hex(&Sha256::digest(text.as_bytes()));
    Script { path: file.to_string_lossy().into_owned(), sha256 }
}

/// The processor's name, how many threads it runs at once, and the system.
fn machine() -> String {
    let about = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        about.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads, {}", name.unwrap_or(std::env::consts::ARCH), std::env::consts::OS)
}

/// Where runs are.
///
/// # Errors
/// When there is no data directory.
pub fn runs_directory() -> Result<PathBuf> {
    Ok(registry::data_directory().context("there is no data directory; set HOMEROOM_HOME")?.join("runs"))
}

/// A name as a run's may be: small letters, digits, dashes and underscores, beginning with a letter or digit.
fn plain(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' { c } else { '-' };
    let name = name.to_lowercase();
    let name: String =
        name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).chars().map(plain).take(40).collect();
    if name.is_empty() { "run".to_owned() } else { name }
}

/// Makes the directory of the first number that is free: of two processes only one makes it.
fn claim(runs: &Path, name: &str) -> Result<(String, PathBuf)> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    for number in 1.. {
        let id = format!("{name}-{number}");
        let path = runs.join(&id);
        match builder.create(&path) {
            Ok(()) => return Ok((id, path)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("{}: cannot write here", runs.display())),
        }
    }
    unreachable!("numbers do not end")
}

/// Removes the checkpoints of all trainings of a run.
pub(super) fn remove_checkpoints(run: &Path) {
    for training in fs::read_dir(run.join("trainings")).into_iter().flatten().flatten() {
        let _ = fs::remove_dir_all(training.path().join("checkpoints"));
    }
}

/// An object as TOML. What is null has no place in it, and is left out.
fn toml_of(id: &str, config: &Map<String, Value>) -> String {
    let mut document = DocumentMut::new();
    *document.as_table_mut() = table_of(config);
    format!("# The settings of run {id} as they were resolved, defaults included.\n{document}")
}

fn table_of(object: &Map<String, Value>) -> Table {
    let mut table = Table::new();
    // Plain values first: behind a table's head they would be its own.
    for (key, value) in object.iter().filter(|(_, value)| !value.is_object()) {
        if let Some(value) = toml_value(value) {
            table.insert(key, Item::Value(value));
        }
    }
    for (key, value) in object {
        if let Value::Object(object) = value {
            table.insert(key, Item::Table(table_of(object)));
        }
    }
    table
}

fn toml_value(value: &Value) -> Option<toml_edit::Value> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(flag) => (*flag).into(),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => whole.into(),
            None => number.as_f64()?.into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().filter_map(toml_value).collect::<Array>().into(),
        Value::Object(object) => {
            let fields = object.iter().filter_map(|(key, value)| Some((key.clone(), toml_value(value)?)));
            fields.collect::<InlineTable>().into()
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_are_toml_that_reads_back() -> Result<()> {
        let config = json!({
            "options": {"r": 8, "modules": ["q", "v"], "deep": {"x": [1, {"a": "\u{1b}\"'''\n"}]}},
            "learning_rate": 2e-4, "max_steps": null, "seed": 7, "shuffle": true, "a.b c": "",
        });
        let text = toml_of("x-1", config.as_object().context("an object")?);
        let read: Value = serde_json::to_value(text.parse::<toml::Table>()?)?;
        let mut expected = config;
        expected.as_object_mut().context("an object")?.remove("max_steps");
        // Plain values come first.
        let mut objects = [&read, &expected].map(|value| value.as_object().cloned().unwrap_or_default());
        objects.iter_mut().for_each(Map::sort_keys);
        assert_eq!(objects[0], objects[1], "{text}");
        Ok(())
    }

    fn about() -> About {
        let settings = Map::from_iter([("model".to_owned(), json!("base"))]);
        let script = Some((PathBuf::from("/x/geo.lua"), "return 1\n".to_owned()));
        About { script, ..About::here(json!({"r": 8}), settings) }
    }

    fn status(runs: &Path, id: &str) -> Status {
        find_in(runs, id).expect("the run is there").status
    }

    #[test]
    fn a_run_is_running_while_it_is_held_and_killed_if_it_ends_without_a_word() -> Result<()> {
        let place = tempfile::tempdir()?;
        let runs = place.path().join("runs");
        let first = RunDirectory::start_in(&runs, Kind::FineTune, "geo", about())?;
        let second = RunDirectory::start_in(&runs, Kind::Pipeline, "geo", about())?;
        assert_eq!((first.id(), second.id()), ("geo-1", "geo-2"));
        assert_eq!((status(&runs, "geo-1"), status(&runs, "geo-2")), (Status::Running, Status::Running));
        let error = RunDirectory::reopen_in(&runs, "geo-1").err().context("it is held")?;
        let words = format!("run geo-1: another homeroom process (process {}) is working on it", std::process::id());
        assert_eq!(format!("{error:#}"), words);
        first.event(&json!({"event": "step", "step": 1}));
        drop(first);
        assert_eq!(status(&runs, "geo-1"), Status::Killed);
        // It goes on, behind what it wrote.
        let again = RunDirectory::reopen_in(&runs, "geo-1")?;
        assert_eq!(status(&runs, "geo-1"), Status::Running);
        assert_eq!(again.settings()["model"], "base");
        again.event(&json!({"event": "step", "step": 2}));
        let steps = super::super::events(again.path());
        assert_eq!(steps.iter().map(|step| step["step"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
        again.finish(End::Interrupted(json!({"steps": 2})))?;
        assert_eq!(status(&runs, "geo-1"), Status::Running, "its process may still write");
        drop(again);
        assert_eq!(status(&runs, "geo-1"), Status::Interrupted);
        second.finish(End::Failed("no room".to_owned()))?;
        drop(second);
        let listed = super::super::list::list_in(&runs);
        let listed: Vec<_> = listed.iter().map(|run| (run.id.as_str(), run.status, run.kind())).collect();
        let expected =
            [("geo-1", Status::Interrupted, Some(Kind::FineTune)), ("geo-2", Status::Failed, Some(Kind::Pipeline))];
        assert_eq!(listed, expected);
        Ok(())
    }

    #[test]
    fn a_finished_run_keeps_its_record_and_no_checkpoints_and_is_not_taken_up_again() -> Result<()> {
        let place = tempfile::tempdir()?;
        let runs = place.path().join("runs");
        let run = RunDirectory::start_in(&runs, Kind::Pipeline, "geo", about())?;
        let (first, second) = (run.training(1)?, run.training(2)?);
        for training in [&first, &second] {
            make_directory(&training.join("checkpoints/step-000120"))?;
            fs::write(training.join("checkpoints/step-000120/state"), "x")?;
            fs::write(training.join("trainer_state.json"), "{}")?;
        }
        assert_eq!(second, run.path().join("trainings/2"));
        run.finish(End::Finished(json!({"name": "tutor"})))?;
        let path = run.path().to_owned();
        drop(run);
        for training in [first, second] {
            assert!(!training.join("checkpoints").exists() && training.join("trainer_state.json").exists());
        }
        let record = Record::read(&path)?;
        assert_eq!((record.status, record.result), (Status::Finished, Some(json!({"name": "tutor"}))));
        assert_eq!(fs::read_to_string(path.join("script.lua"))?, "return 1\n");
        // sha256sum's.
        let digest = "0805bfdc02e872ed322a4a4e440ae985f3a4335f4dd59f3d373dfaf2a68a4a3c";
        assert_eq!(record.script.map(|script| script.sha256).as_deref(), Some(digest));
        assert!(fs::read_to_string(path.join("config.toml"))?.contains("r = 8"));
        let error = RunDirectory::reopen_in(&runs, "geo-1").err().context("it has finished")?;
        assert!(error.to_string().contains("run geo-1 has finished"), "{error}");
        let error = RunDirectory::reopen_in(&runs, "geo-2").err().context("there is none")?;
        assert!(error.to_string().contains("geo-2: no such run, did you mean `geo-1`?"), "{error}");
        for other in ["../geo-1", "", "\u{1b}[2J"] {
            let error = find_in(&runs, other).err().context("it is no name")?.to_string();
            assert!(error.contains("no such run") && !error.contains('\u{1b}'), "{error}");
        }
        Ok(())
    }

    #[test]
    fn any_text_gives_a_name() {
        for (name, expected) in [
            ("geo", "geo"),
            ("My Script.v2", "my-script-v2"),
            ("--x", "x"),
            ("", "run"),
            ("日本", "run"),
            ("Ünder_score", "nder_score"),
            ("../../etc", "etc"),
        ] {
            assert_eq!(plain(name), expected);
            assert!(registry::is_name(&format!("{}-1", plain(name))));
        }
        assert_eq!(plain(&"x".repeat(100)).len(), 40);
    }
}
