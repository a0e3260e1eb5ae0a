//! What of old runs stays: who needs them, what is lost with one, and how much of them is kept.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text, take_away};
use serde::Serialize;

use super::directory::runs_directory;
use super::list::{Entry, Record, Status, list_in};
use super::lock;
use crate::handler::config::{HANDLERS_FILE, handlers_in};
use crate::progress::{line, size};

/// Most runs and most bytes of all runs that are kept when another starts.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Runs.
    pub runs: usize,
    /// Bytes.
    pub bytes: u64,
    /// The newest of them stay, however large they are: what one made may not be saved yet.
    pub newest: usize,
}

/// The bound of a user's runs.
pub const BOUND: Bound = Bound { runs: 50, bytes: 10_000_000_000, newest: 5 };

/// What would be lost with a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// Adapters and models that it trained and that no model of the registry is a copy of, as `RUN/NUMBER`.
    pub unsaved: Vec<String>,
    /// The last step with a checkpoint of a run that can go on.
    pub checkpoint: Option<u64>,
    /// Results of a pipeline's verbs, which a run that can go on would look up.
    pub steps: usize,
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let visible = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    let mut paths: Vec<PathBuf> = visible.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The steps that a run's trainings have checkpoints of, by training.
pub fn checkpoints(run: &Path) -> Vec<(String, Vec<u64>)> {
    let step = |path: &PathBuf| name(path).strip_prefix("step-")?.parse().ok();
    let of = |training: PathBuf| {
        let mut steps: Vec<u64> = entries(&training.join("checkpoints")).iter().filter_map(step).collect();
        steps.sort_unstable();
        (name(&training), steps)
    };
    entries(&run.join("trainings")).into_iter().map(of).filter(|(_, steps)| !steps.is_empty()).collect()
}

impl Entry {
    /// Whether it was ended before its end and has something to go on from.
    pub fn can_go_on(&self) -> bool {
        let ended = matches!(self.status, Status::Killed | Status::Interrupted | Status::Failed);
        ended && (!checkpoints(&self.path).is_empty() || !entries(&self.path.join("steps")).is_empty())
    }

    /// What would be lost with it. The home is that of [`crate::registry::data_directory`].
    pub fn lost(&self, home: &Path) -> Lost {
        let saved: BTreeSet<Vec<u8>> = entries(&home.join("models"))
            .iter()
            .filter_map(|model| fs::read(model.join("homeroom.json")).ok())
            .collect();
        // A copy in the registry has the same file.
        let is_saved =
            |adapter: &PathBuf| fs::read(adapter.join("homeroom.json")).is_ok_and(|file| saved.contains(&file));
        let adapters = entries(&self.path.join("adapters")).into_iter().filter(|adapter| !is_saved(adapter));
        let goes_on = self.can_go_on();
        let checkpoint = checkpoints(&self.path).into_iter().filter_map(|(_, steps)| steps.last().copied()).max();
        Lost {
            unsaved: adapters.map(|adapter| format!("{}/{}", self.id, name(&adapter))).collect(),
            checkpoint: checkpoint.filter(|_| goes_on),
            steps: if goes_on { entries(&self.path.join("steps")).len() } else { 0 },
        }
    }
}

/// Files that name adapters of runs, and in whose words that is said; and a directory of such that cannot be read.
fn naming(home: &Path) -> (Vec<(String, PathBuf)>, Option<PathBuf>) {
    let mut unread = None;
    let mut entries = |directory: PathBuf| {
        if fs::read_dir(&directory).is_err_and(|error| !is_absent(&error)) {
            unread = Some(directory.clone());
        }
        entries(&directory)
    };
    let mut files = vec![(HANDLERS_FILE.to_owned(), handlers_in(home))];
    for model in entries(home.join("models")) {
        for file in ["homeroom.json", "adapter_config.json"] {
            files.push((format!("model {}", name(&model)), model.join(file)));
        }
    }
    for run in entries(home.join("runs")) {
        let said = format!("run {}", name(&run));
        files.push((said.clone(), run.join("run.json")));
        let adapters = entries(run.join("adapters")).into_iter().map(|adapter| adapter.join("homeroom.json"));
        files.extend(adapters.chain(entries(run.join("steps"))).map(|file| (said.clone(), file)));
    }
    (files, unread)
}

/// Whether there is nothing, as against something that cannot be read.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Who names an adapter of a run, by its id or by its path: handlers, models of the registry, other runs. A name that only looks like
/// one counts, too: what is kept for nothing costs less than what is missed.
pub fn users(id: &str, home: &Path) -> Vec<String> {
    users_among(id, &texts(home).0)
}

/// The texts in which such names stand, and a file that could not be read: who knows what it names.
fn texts(home: &Path) -> (Vec<(String, String)>, Option<PathBuf>) {
    let (files, mut unread) = naming(home);
    let mut texts = Vec::new();
    for (said, path) in files {
        match read_text(&path, SMALL_FILE_BYTES_MAX) {
            Ok(text) => texts.push((said, text)),
            Err(_) if fs::symlink_metadata(&path).is_err_and(|error| is_absent(&error)) => {}
            Err(_) => unread = Some(path),
        }
    }
    (texts, unread)
}

fn users_among(id: &str, texts: &[(String, String)]) -> Vec<String> {
    let itself = format!("run {id}");
    let by_path = format!("runs/{id}/");
    let by_id = format!("\"{id}/");
    let naming =
        texts.iter().filter(|(said, text)| *said != itself && (text.contains(&by_path) || text.contains(&by_id)));
    naming.map(|(said, _)| said.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Removes a run that nobody works on.
///
/// # Errors
/// When a process works on it, its name is another run's by now, or it cannot be removed.
pub fn remove(entry: &Entry) -> Result<()> {
    // Held while its name goes, so that nobody takes it up meanwhile.
    let _lock = lock::take(&entry.path).with_context(|| format!("run {}", entry.id))?;
    let of = |record: &Record| serde_json::to_value(record).ok();
    let now = Record::read(&entry.path).ok();
    ensure!(
        now.as_ref().and_then(of) == entry.record.as_ref().and_then(of),
        "run {}: it has changed since it was looked at; nothing is removed",
        entry.id
    );
    take_away(&entry.path)
}

/// Makes room for another run: removes failed runs that made nothing, and then the oldest that have nothing left to do, until no more are
/// left than are kept. Never one that has something to go on from, or an adapter that somebody names. What is removed is said; that
/// something cannot be is no failure.
pub fn prune() {
    if let Ok(runs) = runs_directory() {
        prune_to(&runs, BOUND);
    }
}

/// As [`prune`], with another bound; returns what was removed.
pub(super) fn prune_to(runs: &Path, bound: Bound) -> Vec<String> {
    let Some(home) = runs.parent() else { return Vec::new() };
    let all = list_in(runs);
    let (mut count, mut bytes) = (all.len(), all.iter().map(|run| run.bytes).sum::<u64>());
    let is_over = |count: usize, bytes: u64| count > bound.runs || bytes > bound.bytes;
    if !is_over(count, bytes) {
        return Vec::new();
    }
    let (texts, unread) = texts(home);
    if let Some(unread) = unread {
        line(format_args!("note: no old run is removed: {} cannot be read, and may name one", unread.display()));
        return Vec::new();
    }
    let mut removed = Vec::new();
    let mut old: Vec<_> = all[..all.len().saturating_sub(bound.newest)].iter().collect();
    // The checkpoint before the first step holds nothing that was learned.
    let made_nothing = |run: &Entry| {
        let is_begun = checkpoints(&run.path).iter().any(|(_, steps)| steps.iter().any(|step| *step > 0));
        let kept = ["adapters", "steps"].iter().any(|kind| !entries(&run.path.join(kind)).is_empty());
        run.status == Status::Failed && !is_begun && !kept
    };
    old.sort_by_key(|run| !made_nothing(run));
    for run in old {
        if !is_over(count, bytes) {
            break;
        }
        // A process that has not written what it is yet has no record.
        let has_ended = matches!(run.status, Status::Finished | Status::Failed)
            || run.status == Status::Killed && run.record.is_some();
        if !has_ended || run.can_go_on() && !made_nothing(run) || !users_among(&run.id, &texts).is_empty() {
            continue;
        }
        let unsaved = run.lost(home).unsaved.len();
        if remove(run).is_err() {
            continue;
        }
        (count, bytes) = (count - 1, bytes - run.bytes);
        let unsaved = match unsaved {
            0 => String::new(),
            1 => ", with an adapter that was not saved".to_owned(),
            many => format!(", with {many} adapters that were not saved"),
        };
        line(format_args!("removed   run {}, {}{unsaved}", run.id, size(run.bytes)));
        removed.push(run.id.clone());
    }
    if !removed.is_empty() {
        line(format_args!(
            "note: {} runs are kept, of {} at most: failed ones that made nothing go first, then the oldest that nobody names",
            bound.runs,
            size(bound.bytes)
        ));
    }
    if is_over(count, bytes) {
        line(format_args!(
            "note: {count} runs take {}; those that can go on or are needed stay\nhint: `homeroom runs list` shows them, `homeroom runs rm ID` removes one",
            size(bytes)
        ));
    }
    removed
}

/// Refuses the removal of a run whose adapters somebody names, unless `force`.
///
/// # Errors
/// Names who needs it.
pub fn ensure_unused(id: &str, home: &Path, force: bool) -> Result<()> {
    let users = users(id, home);
    ensure!(
        force || users.is_empty(),
        "run {id}: what it trained is named by {}; nothing is removed\nhint: `homeroom runs rm --force {id}` removes it all the same",
        users.join(", ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn make(home: &Path, id: &str, status: &str, day: usize, files: &[(&str, usize)]) -> Result<()> {
        let run = home.join("runs").join(id);
        fs::create_dir_all(&run)?;
        let record =
            json!({"id": id, "kind": "pipeline", "status": status, "started": format!("2026-11-{day:02}T00:00:00Z")});
        fs::write(run.join("run.json"), record.to_string())?;
        for (file, bytes) in files {
            let path = run.join(file);
            fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
            fs::write(path, vec![b'x'; *bytes])?;
        }
        Ok(())
    }

    fn write(path: PathBuf, value: &Value) -> Result<()> {
        fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
        Ok(fs::write(path, value.to_string())?)
    }

    /// Somebody else removed it meanwhile, and another run took its name, which has not said yet what it is.
    #[test]
    fn a_name_that_is_another_runs_by_now_is_not_removed() -> Result<()> {
        let place = tempfile::tempdir()?;
        make(place.path(), "out-1", "failed", 1, &[])?;
        let listed = list_in(&place.path().join("runs"));
        let run = place.path().join("runs/out-1");
        fs::remove_dir_all(&run)?;
        fs::create_dir(&run)?;
        assert!(remove(&listed[0]).is_err_and(|error| error.to_string().contains("it has changed since")));
        make(place.path(), "out-1", "failed", 2, &[])?;
        assert!(remove(&listed[0]).is_err() && run.exists());
        remove(&list_in(&place.path().join("runs"))[0])?;
        assert!(!run.exists());
        Ok(())
    }

    #[test]
    fn the_oldest_runs_go_and_none_that_is_needed_or_can_go_on() -> Result<()> {
        let place = tempfile::tempdir()?;
        let home = place.path();
        make(home, "killed-1", "running", 1, &[("trainings/1/checkpoints/step-000120/state", 9)])?;
        make(home, "halfway-1", "failed", 2, &[("steps/0a.json", 9)])?;
        make(home, "served-1", "finished", 3, &[("adapters/1/adapter_config.json", 9)])?;
        make(home, "parent-1", "finished", 4, &[("adapters/1/adapter_config.json", 9)])?;
        make(home, "base-1", "finished", 5, &[("adapters/1/config.json", 9)])?;
        make(home, "old-1", "finished", 6, &[("adapters/1/adapter_config.json", 9)])?;
        make(home, "old-2", "failed", 7, &[])?;
        make(home, "live-1", "running", 8, &[])?;
        make(home, "dead-1", "running", 9, &[])?;
        make(home, "large-1", "finished", 10, &[("output.txt", 5000)])?;
        make(home, "late-1", "finished", 11, &[])?;
        make(home, "late-2", "finished", 12, &[])?;
        fs::write(handlers_in(home), "[handlers.x]\nkind = \"local\"\nmodel = \"/x/runs/served-1/adapters/1\"\n")?;
        write(home.join("models/tutor/homeroom.json"), &json!({"training": {"parent": "parent-1/1"}}))?;
        write(
            home.join("runs/late-2/adapters/1/homeroom.json"),
            &json!({"base": {"path": "/h/runs/base-1/adapters/1"}}),
        )?;
        let live = lock::take(&home.join("runs/live-1"))?;
        let runs = home.join("runs");
        let bound = |runs, bytes| Bound { runs, bytes, newest: 2 };
        assert!(prune_to(&runs, bound(12, 1 << 20)).is_empty());
        assert_eq!(prune_to(&runs, bound(10, 1 << 20)), ["old-2", "old-1"]);
        // Until there is room: a small one that is older goes first.
        assert_eq!(prune_to(&runs, bound(10, 4000)), ["dead-1", "large-1"]);
        // The newest stay, and all that are needed.
        assert!(prune_to(&runs, bound(0, 0)).is_empty());
        drop(live);
        let left: Vec<String> = list_in(&runs).into_iter().map(|run| run.id).collect();
        let expected = ["killed-1", "halfway-1", "served-1", "parent-1", "base-1", "live-1", "late-1", "late-2"];
        assert_eq!(left, expected);
        assert_eq!(users("served-1", home), ["handlers.toml"]);
        assert_eq!(users("parent-1", home), ["model tutor"]);
        assert_eq!(users("base-1", home), ["run late-2"]);
        assert!(ensure_unused("base-1", home, false).is_err() && ensure_unused("base-1", home, true).is_ok());
        Ok(())
    }

    #[test]
    fn what_is_lost_with_a_run_is_what_no_model_is_a_copy_of() -> Result<()> {
        let place = tempfile::tempdir()?;
        let home = place.path();
        let state = ("trainings/2/checkpoints/step-000120/state", 1);
        make(
            home,
            "geo-1",
            "interrupted",
            1,
            &[state, ("trainings/2/checkpoints/step-001000/state", 1), ("steps/a.json", 1)],
        )?;
        for number in ["1", "2"] {
            write(home.join(format!("runs/geo-1/adapters/{number}/homeroom.json")), &json!({"number": number}))?;
        }
        write(home.join("models/tutor/homeroom.json"), &json!({"number": "2"}))?;
        let entry = &list_in(&home.join("runs"))[0];
        assert_eq!(entry.status, Status::Interrupted);
        let expected = Lost { unsaved: vec!["geo-1/1".to_owned()], checkpoint: Some(1000), steps: 1 };
        assert_eq!(entry.lost(home), expected);
        assert_eq!(checkpoints(&entry.path), [("2".to_owned(), vec![120, 1000])]);
        remove(entry)?;
        assert!(list_in(&home.join("runs")).is_empty());
        Ok(())
    }
}
