//! A strategy that changes while it trains: what is taken over, what is refused or taken back, and that neither hurts the run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use homeroom::job::Job;
use homeroom::plugin::generation::Live;
use homeroom::plugin::reload::{Ready, Reload, Watching};
use homeroom::plugin::{Plugin, Policy, Trust};
use homeroom_abi::plan::PlanRequest;
use homeroom_abi::step::Directive;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::data::Example;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::Sft;
use homeroom_engine::train::{
    Candidate, Change, Control, Data, Observer, RunEvent, StepReport, TrainConfig, TrainReport,
};
use serde_json::Map;

use crate::invariants::examples;
use crate::support::{Place, learn_on, model, plugin_path, succeeds};

/// The bytes of the test strategy in a variant.
pub fn variant(name: &str) -> Result<Vec<u8>> {
    let mut bytes = fs::read(plugin_path("reloading"))?;
    let mark = b"HOMEROOM_VARIANT";
    let places: Vec<usize> = (0..bytes.len() - 32).filter(|at| bytes[*at..].starts_with(mark)).collect();
    ensure!(places.len() == 1, "one mark in a plugin, not {}", places.len());
    let text = format!("{name:.<16}");
    bytes[places[0] + 16..places[0] + 32].copy_from_slice(text.as_bytes());
    Ok(bytes)
}

/// The test strategy in a variant, loaded from a file of its own.
fn load(place: &Place, name: &str) -> Result<Plugin> {
    Plugin::load(&place.write(&format!("{name}/libreloading.so"), variant(name)?)?)
}

fn request(model: &BaseModel) -> PlanRequest {
    PlanRequest { options: Map::new(), model: model.info() }
}

/// An observer that offers plans before steps, and keeps what it hears.
#[derive(Default)]
struct Script {
    /// Plans by the number of steps that are done when they are offered.
    offers: Vec<(u64, Candidate)>,
    directives: Vec<(u64, Directive)>,
    done: u64,
    now: Option<Arc<Adaptation>>,
    /// Values after each event.
    seen: Vec<Vec<Vec<f32>>>,
}

impl Script {
    fn offer(mut self, after: u64, name: &str, plugin: &Plugin, model: &BaseModel) -> Result<Self> {
        let plan = plugin.plan(&request(model))?;
        self.offers.push((after, Candidate { id: name.to_owned(), plan, directs: true }));
        Ok(self)
    }
}

impl Observer for Script {
    fn on_step(&mut self, report: &StepReport, _: u64) -> Result<Control> {
        self.done = report.step;
        Ok(Control::Continue)
    }

    fn directives(&mut self, report: &StepReport, _: u64) -> Result<Vec<Directive>> {
        let due = self.directives.iter().filter(|(step, _)| *step == report.step);
        Ok(due.map(|(_, directive)| directive.clone()).collect())
    }

    fn candidate(&mut self) -> Result<Option<Candidate>> {
        let due = self.offers.iter().position(|(after, _)| *after <= self.done);
        Ok(due.map(|at| self.offers.remove(at).1))
    }

    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        self.done = event.step;
        self.seen.push(values(adaptation)?);
        self.now = Some(adaptation.clone());
        Ok(())
    }
}

fn values(adaptation: &Adaptation) -> Result<Vec<Vec<f32>>> {
    adaptation.params.iter().map(|param| Ok(param.var.flatten_all()?.to_vec1()?)).collect()
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig { max_steps: Some(steps), learning_rate: 5e-3, compute: Compute::F32, ..TrainConfig::default() }
}

/// All rows, none held out.
fn all(rows: &[Example]) -> Data<'_> {
    Data::of_examples(&rows.iter().collect::<Vec<_>>(), &[])
}

/// A run of the plain variant with a script: its report, and what it ends with.
fn learn(model: &BaseModel, place: &Place, steps: u64, script: &mut Script) -> Result<(TrainReport, Vec<Vec<f32>>)> {
    let plan = load(place, "plain")?.plan(&request(model))?;
    let adaptation = Adaptation::new(model, plan, 42)?;
    let rows = examples(model, 24, 1);
    let report = learn_on(model, &adaptation, &rows.iter().collect::<Vec<_>>(), &config(steps), script)?;
    let end = values(script.now.as_deref().unwrap_or(&adaptation))?;
    Ok((report, end))
}

fn losses(report: &TrainReport) -> Vec<u64> {
    report.steps.iter().map(|step| step.loss.to_bits()).collect()
}

/// Other bytes, the same mathematics.
#[test]
fn a_reload_of_the_same_strategy_changes_no_bit() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    let undisturbed = learn(&model, &place, 14, &mut Script::default())?;
    let again = load(&place, "again")?;
    let mut script = Script::default()
        .offer(0, "a", &again, &model)?
        .offer(4, "b", &again, &model)?
        .offer(9, "c", &again, &model)?;
    let swapped = learn(&model, &place, 14, &mut script)?;
    let swaps = swapped.0.events.iter().filter(|event| matches!(event.change, Change::Swapped(_))).count();
    assert_eq!(swaps, 3, "{:?}", swapped.0.events);
    assert_eq!(losses(&undisturbed.0), losses(&swapped.0));
    assert_eq!(undisturbed.1, swapped.1);
    Ok(())
}

/// As a script with a mistake in a callback does.
struct Fails(Script);

impl Observer for Fails {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        ensure!(report.step < 6, "the observer's own mistake");
        self.0.on_step(report, planned_steps)
    }

    fn candidate(&mut self) -> Result<Option<Candidate>> {
        self.0.candidate()
    }

    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        ensure!(!matches!(event.change, Change::RolledBack { .. }), "the plan is blamed");
        self.0.changed(event, adaptation)
    }
}

#[test]
fn what_an_observer_fails_with_ends_a_run_also_while_a_plan_is_on_trial() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    let again = load(&place, "again")?;
    let plan = load(&place, "plain")?.plan(&request(&model))?;
    let adaptation = Adaptation::new(&model, plan, 42)?;
    let rows = examples(&model, 24, 1);
    let mut fails = Fails(Script::default().offer(5, "a", &again, &model)?);
    let ended = learn_on(&model, &adaptation, &rows.iter().collect::<Vec<_>>(), &config(14), &mut fails);
    let error = ended.err().context("it ends")?;
    assert_eq!(format!("{error:#}"), "the observer's own mistake");
    Ok(())
}

/// Memory of this process of a kind, in bytes: `RssAnon`, its own, or `RssFile`, mapped from files, which the system takes back when
/// others need it.
fn memory(kind: &str) -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().split(' ').next()).context("the status has a line for it")?;
    Ok(kib.parse::<usize>()? << 10)
}

/// In a process of its own, whose memory no other test takes.
#[test]
fn fifty_swaps_lose_no_step_and_little_memory() -> Result<()> {
    let mut alone = Command::new(std::env::current_exe()?);
    alone.args(["--exact", "--ignored", "--nocapture", "reload::fifty_swaps_alone"]);
    let ran = succeeds(&mut alone)?;
    let figures = ran.stdout.lines().find(|line| line.contains("50 generations")).context("it ran")?;
    println!("{figures}");
    Ok(())
}

#[test]
#[ignore = "the test above runs it, alone"]
fn fifty_swaps_alone() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    // What a first run needs for good, such as threads and their buffers, is no cost of a generation.
    let mut script = Script::default().offer(0, "first", &load(&place, "first")?, &model)?;
    learn(&model, &place, 20, &mut script)?;
    let mut script = Script::default();
    let before = (memory("RssAnon")?, memory("RssFile")?);
    for swap in 0..50 {
        // Bytes of its own each time, so that each is loaded.
        let name = if swap % 2 == 0 { format!("scalar{swap}") } else { format!("v{swap}") };
        script = script.offer(0, &name, &load(&place, &name)?, &model)?;
    }
    let (report, _) = learn(&model, &place, 160, &mut script)?;
    let grown = memory("RssAnon")?.saturating_sub(before.0);
    let mapped = memory("RssFile")?.saturating_sub(before.1);
    let [grown_mb, mapped_mb] = [grown, mapped].map(|bytes| bytes as f64 / f64::from(1 << 20));
    println!("50 generations cost {grown_mb:.1} MB of memory and keep {mapped_mb:.1} MB of files mapped");
    assert_eq!(report.steps.len(), 160);
    assert!(report.steps.iter().enumerate().all(|(index, step)| step.step == index as u64 + 1));
    let count = |wanted: fn(&Change) -> bool| report.events.iter().filter(|event| wanted(&event.change)).count();
    assert_eq!(count(|change| matches!(change, Change::Swapped(_))), 50, "{:?}", report.events.last());
    assert_eq!(count(|change| matches!(change, Change::Passed { .. })), 50);
    assert!(grown < 30 << 20, "50 generations cost {grown_mb:.1} MB");
    // Older generations stay mapped, each its library and no more.
    let library = fs::metadata(plugin_path("reloading"))?.len() as usize;
    assert!(mapped < 51 * library + (10 << 20), "50 generations of {library} bytes keep {mapped_mb:.1} MB mapped");
    Ok(())
}

#[test]
fn a_bad_recipe_is_taken_back_and_the_steps_are_done_anew() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    let undisturbed = learn(&model, &place, 12, &mut Script::default())?;
    for (name, words) in [("nan", "the loss is NaN"), ("worse", "on average")] {
        let mut script = Script::default().offer(5, name, &load(&place, name)?, &model)?;
        let (report, end) = learn(&model, &place, 12, &mut script)?;
        let [swapped, back] = &report.events[..] else { panic!("{:?}", report.events) };
        assert!(matches!(swapped.change, Change::Swapped(_)) && swapped.step == 5);
        assert!(matches!(&back.change, Change::RolledBack { reason, .. } if reason.contains(words)), "{back:?}");
        assert_eq!(back.step, 5);
        let params = script.seen[1].len();
        assert_eq!(script.seen[0][..params], script.seen[1], "parameters are those before the swap");
        assert_eq!(losses(&undisturbed.0), losses(&report));
        assert_eq!(undisturbed.1, end);
    }
    Ok(())
}

/// Of losses near zero, one is soon three times another: that is no harm.
#[test]
fn a_loss_that_is_still_small_is_no_reason_to_go_back() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    let row = examples(&model, 1, 1);
    let plan = load(&place, "plain")?.plan(&request(&model))?;
    let adaptation = Adaptation::new(&model, plan, 42)?;
    let mut script = Script::default().offer(150, "quieter", &load(&place, "quieter")?, &model)?;
    let config = TrainConfig { learning_rate: 2e-2, ..config(160) };
    let report = learn_on(&model, &adaptation, &row.iter().collect::<Vec<_>>(), &config, &mut script)?;
    let loss = |steps: &[StepReport]| steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64;
    let (before, after) = (loss(&report.steps[134..150]), report.steps[150].loss);
    assert!(after > 3.0 * before && after < 0.5, "{before} before, {after} after");
    assert!(matches!(report.events[1].change, Change::Passed { .. }), "{:?}", report.events);
    Ok(())
}

#[test]
fn another_rank_is_refused_unless_the_plan_says_how() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    let undisturbed = learn(&model, &place, 10, &mut Script::default())?.0;
    for (name, word) in [("rank", "say in the plan how it migrates"), ("codec", "restart the training")] {
        let mut script = Script::default().offer(4, name, &load(&place, name)?, &model)?;
        let (report, _) = learn(&model, &place, 10, &mut script)?;
        let [RunEvent { step: 4, change: Change::Refused { reason, .. } }] = &report.events[..] else {
            panic!("{:?}", report.events)
        };
        assert!(reason.contains(word), "{reason}");
        assert_eq!(losses(&undisturbed), losses(&report));
    }
    let mut script = Script::default().offer(4, "rank", &load(&place, "rank_migrate")?, &model)?;
    let (report, end) = learn(&model, &place, 10, &mut script)?;
    let Change::Swapped(swap) = &report.events[0].change else { panic!("{:?}", report.events) };
    assert_eq!((swap.kept, swap.added.len()), (0, 0));
    assert_eq!(swap.migrated.len(), end.len());
    // B's new columns are zero, so the function is the same at the swap; the sums have another order.
    assert!((undisturbed.steps[4].loss - report.steps[4].loss).abs() < 1e-5);
    assert_eq!(report.steps.len(), 10);
    let mut script = Script::default().offer(4, "more", &load(&place, "more")?, &model)?;
    script = script.offer(8, "plain", &load(&place, "plain")?, &model)?;
    let (report, _) = learn(&model, &place, 12, &mut script)?;
    let swaps = report.events.iter().filter_map(|event| match &event.change {
        Change::Swapped(swap) => Some((swap.kept, swap.added.len(), swap.dropped.len())),
        _ => None,
    });
    let params = 2 * undisturbed_modules(&model);
    assert_eq!(swaps.collect::<Vec<_>>(), [(params, params / 2, 0), (params, 0, params / 2)]);
    Ok(())
}

fn undisturbed_modules(model: &BaseModel) -> usize {
    2 * model.layers.len()
}

/// A run through a job, whose strategy is asked after each step; its parameters after each step.
fn directed(place: &Place, name: &str, steps: u64) -> Result<(TrainReport, Vec<Vec<Vec<f32>>>)> {
    let model = Arc::new(model("llama")?);
    let job = Job::new(model.clone(), &load(place, name)?, Map::new(), 42, None, false)?;
    let rows = examples(&model, 24, 1);
    let mut seen = Vec::new();
    let mut observer = |_: &StepReport, _| {
        seen.push(values(&job.now().0)?);
        Ok(Control::Continue)
    };
    let report = job.train(&all(&rows), &Sft, &config(steps), &mut observer, None, None)?.report;
    Ok((report, seen))
}

#[test]
fn directives_are_followed_from_the_next_step_on() -> Result<()> {
    let place = Place::new()?;
    let (plain, _) = directed(&place, "plain", 6)?;
    assert!(plain.events.is_empty());
    // Parameters come as A, B, A, B, …
    let (report, seen) = directed(&place, "freeze", 6)?;
    assert_eq!(report.events.len(), 1);
    assert_eq!((seen[1][0] == seen[5][0], seen[1][1] == seen[5][1]), (true, false));
    assert_eq!(losses(&plain)[..3], losses(&report)[..3]);
    let (report, seen) = directed(&place, "unfreeze", 6)?;
    assert_eq!(report.events.len(), 2);
    assert_eq!((seen[1] == seen[3], seen[3][0] == seen[5][0], seen[3][1] == seen[5][1]), (true, true, false));
    let (report, seen) = directed(&place, "no_rate", 4)?;
    assert_eq!((report.events.len(), report.steps[3].learning_rate), (1, 0.0));
    assert_eq!(seen[1], seen[3]);
    // Without its update an adapter is the base: the loss is that of the base's step.
    let (scaled, _) = directed(&place, "scalar", 6)?;
    let (report, _) = directed(&place, "set_scalar", 6)?;
    assert_eq!(losses(&scaled)[..3], losses(&report)[..3]);
    assert!(losses(&scaled)[3] != losses(&report)[3]);
    let (report, _) = directed(&place, "reset", 6)?;
    assert_eq!(losses(&plain)[..4], losses(&report)[..4]);
    assert!(losses(&plain)[5] != losses(&report)[5]);
    Ok(())
}

#[test]
fn what_was_directed_ends_with_the_code_that_directs() -> Result<()> {
    let (model, place) = (model("llama")?, Place::new()?);
    for directs in [true, false] {
        let mut script = Script::default().offer(4, "scalar", &load(&place, "scalar")?, &model)?;
        script.offers[0].1.directs = directs;
        let directives = [
            Directive::Freeze("*.A".to_owned()),
            Directive::LearningRateScale(0.5),
            Directive::Scalar { name: "s".to_owned(), value: 0.25 },
        ];
        script.directives = directives.map(|directive| (2, directive)).into();
        let (report, _) = learn(&model, &place, 8, &mut script)?;
        let swap = report.events.iter().find_map(|event| match &event.change {
            Change::Swapped(swap) => Some(swap),
            _ => None,
        });
        let ended = ["scalar s 0.25", "freeze of 4 parameters", "scale of the learning rate"];
        assert_eq!(swap.context("it is swapped")?.ended, if directs { &[][..] } else { &ended });
        let undirected = learn(&model, &place, 8, &mut Script::default())?.0;
        let rates = |report: &TrainReport| report.steps[6].learning_rate;
        assert_eq!(rates(&report) == rates(&undirected), !directs);
        let scalar = script.now.context("something has changed")?.plan.scalars["s"];
        assert_eq!(scalar, if directs { 0.25 } else { 1.0 });
    }
    Ok(())
}

#[test]
fn a_hook_that_is_late_or_wrong_is_not_asked_again() -> Result<()> {
    let place = Place::new()?;
    let (plain, _) = directed(&place, "plain", 6)?;
    for name in ["late", "bad", "error", "no_number", "unknown", "panics"] {
        let start = Instant::now();
        let (report, _) = directed(&place, name, 6)?;
        assert!(start.elapsed() < Duration::from_secs(4), "{name}");
        assert_eq!(losses(&plain), losses(&report), "{name}");
        assert!(report.events.len() <= 1);
    }
    Ok(())
}

/// What reloads said, each line with the file's directory, which is a test's own.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn say(line: &str) {
    SAID.lock().expect("no test panics with it").push(line.to_owned());
}

fn said(path: &Path) -> Vec<String> {
    let path = path.display().to_string();
    SAID.lock().expect("no test panics with it").iter().filter(|line| line.contains(&path)).cloned().collect()
}

/// A watched file.
struct Watched {
    path: PathBuf,
    reload: Reload,
}

/// As a developer of strategies watches.
fn watching() -> Result<Watching> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_homeroom"));
    Ok(Watching { program, trust: Trust::of_user(Some(Policy::Dev))? })
}

impl Watched {
    fn new(place: &Place) -> Result<Self> {
        let path = place.write("watched/libreloading.so", variant("plain")?)?;
        let plugin = Plugin::load(&path)?;
        let reload = Reload::watch(&plugin, request(&model("llama")?), watching()?, say);
        Ok(Self { path, reload })
    }

    /// As cargo replaces a file: removed, then linked anew.
    fn replace(&self, bytes: &[u8]) -> Result<()> {
        let built = self.path.with_extension("built");
        fs::write(&built, bytes)?;
        let _ = fs::remove_file(&self.path);
        Ok(fs::hard_link(&built, &self.path).and_then(|()| fs::remove_file(&built))?)
    }

    fn ready(&self, within: Duration) -> Option<Ready> {
        let start = Instant::now();
        while start.elapsed() < within {
            if let Some(ready) = self.reload.take() {
                return Some(ready);
            }
            sleep(Duration::from_millis(10));
        }
        None
    }

    fn refusal(&self, bytes: &[u8]) -> Result<String> {
        let before = said(&self.path).len();
        self.replace(bytes)?;
        Ok(self.line_after(before))
    }

    /// The next line after so many.
    fn line_after(&self, before: usize) -> String {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(9) {
            if let Some(line) = said(&self.path).get(before) {
                return line.clone();
            }
            sleep(Duration::from_millis(10));
        }
        String::new()
    }
}

fn make_directory(path: &Path) -> std::io::Result<()> {
    fs::create_dir(path)
}

fn make_pipe(path: &Path) -> std::io::Result<()> {
    let made = Command::new("mkfifo").arg(path).status()?;
    made.success().then_some(()).ok_or_else(|| std::io::Error::other("no pipe was made"))
}

#[test]
fn a_bad_file_is_refused_in_one_line_and_the_next_good_one_is_taken() -> Result<()> {
    let place = Place::new()?;
    let watched = Watched::new(&place)?;
    let whole = variant("next")?;
    let changed = |from: &[u8], to: &[u8]| {
        let mut bytes = whole.clone();
        let at = (0..bytes.len() - from.len()).find(|at| bytes[*at..].starts_with(from)).expect("it is there");
        bytes[at..at + to.len()].copy_from_slice(to);
        bytes
    };
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (Vec::new(), &["not a library"]),
        (b"import torch\n".repeat(20), &["not a library"]),
        (changed(&whole[..20], &[&whole[..18], &[0xb7, 0][..]].concat()), &["another processor"]),
        (changed(b"HOMEROOM\x58\0\0\0\x01\0", b"HOMEROOM\x58\0\0\0\x02\0"), &["built for ABI 2.1"]),
        (changed(b"\0memmove\0", b"\0memmovx\0"), &["cannot load", "memmovx"]),
        (variant("panic_plan")?, &["panicked: as asked", "lib.rs:"]),
        (variant("panic_trace")?, &["panicked: in the trace", "lib.rs:"]),
        (variant("abort")?, &["aborted (SIGABRT) while it planned"]),
        (variant("segfault")?, &["(SIGSEGV) while it was loaded"]),
        (variant("spin")?, &["did not return within 5 s"]),
        (variant("devour")?, &["aborted (SIGABRT)", "memory allocation of"]),
        (variant("exit")?, &["it ended the process with exit code 7"]),
    ];
    for (bytes, words) in cases {
        let line = watched.refusal(&bytes)?;
        for word in [&["libreloading.so refused: ", "the training goes on"], words].concat() {
            assert!(line.contains(word), "no `{word}` in `{line}`");
        }
        assert!(!line.contains('\n'));
    }
    for cut in (1..20).map(|part| whole.len() * part / 20).chain([whole.len() * 999 / 1000]) {
        let line = watched.refusal(&whole[..cut])?;
        assert!(line.contains("truncated"), "cut at {cut}: `{line}`");
    }
    for (what, put) in [("directory", make_directory as fn(&Path) -> _), ("pipe", make_pipe)] {
        let before = said(&watched.path).len();
        let _ = fs::remove_file(&watched.path);
        put(&watched.path)?;
        let line = watched.line_after(before);
        assert!(line.contains("not a file"), "{what}: `{line}`");
        let _ = fs::remove_dir(&watched.path);
    }
    let lines = said(&watched.path).len();
    // The same bytes again are not tried again.
    watched.replace(&variant("panic_plan")?)?;
    assert!(watched.ready(Duration::from_millis(700)).is_none());
    assert_eq!(said(&watched.path).len(), lines);
    watched.replace(&whole)?;
    assert!(watched.ready(Duration::from_secs(5)).is_some());
    Ok(())
}

#[test]
fn a_file_that_is_written_in_pieces_is_loaded_once() -> Result<()> {
    use std::io::Write;
    let place = Place::new()?;
    let watched = Watched::new(&place)?;
    let bytes = variant("pieces")?;
    let mut file = fs::File::create(&watched.path)?;
    for piece in bytes.chunks(bytes.len().div_ceil(10)) {
        file.write_all(piece)?;
        file.flush()?;
        sleep(Duration::from_millis(30));
    }
    let ready = watched.ready(Duration::from_secs(5)).context("it is loaded")?;
    assert!(watched.ready(Duration::from_millis(700)).is_none());
    // What was taken back is not offered again, and what was there before is.
    watched.reload.quarantine(&ready.plugin.sha256, "");
    watched.replace(&variant("pieces")?)?;
    assert!(watched.ready(Duration::from_millis(700)).is_none());
    watched.replace(&variant("plain")?)?;
    assert!(watched.ready(Duration::from_secs(5)).is_some());
    Ok(())
}

#[test]
fn a_directory_that_is_deleted_and_made_anew_is_watched_again() -> Result<()> {
    let place = Place::new()?;
    let watched = Watched::new(&place)?;
    for name in ["first", "second"] {
        fs::remove_dir_all(watched.path.parent().context("a file lies in a directory")?)?;
        sleep(Duration::from_millis(50));
        place.write("watched/libreloading.so", variant(name)?)?;
        assert!(watched.ready(Duration::from_secs(6)).is_some(), "{name}");
    }
    assert!(said(&watched.path).is_empty());
    Ok(())
}

/// Nothing is reported of the file that a link points to: it is seen all the same, when it is next looked at.
#[test]
fn a_build_of_which_the_system_reports_nothing_is_taken() -> Result<()> {
    let place = Place::new()?;
    let target = place.write("elsewhere/libreloading.so", variant("plain")?)?;
    let link = place.path("linked/libreloading.so");
    fs::create_dir(place.path("linked"))?;
    std::os::unix::fs::symlink(&target, &link)?;
    let plugin = Plugin::load(&link)?;
    let reload = Reload::watch(&plugin, request(&model("llama")?), watching()?, say);
    let watched = Watched { path: link, reload };
    for name in ["first", "second"] {
        fs::write(&target, variant(name)?)?;
        assert!(watched.ready(Duration::from_secs(6)).is_some(), "{name}");
    }
    assert!(said(&watched.path).is_empty());
    Ok(())
}

/// As builds may come: by renaming, by unlinking and linking, and written over piece by piece.
#[test]
fn of_a_hundred_quick_builds_the_last_is_taken_and_none_that_is_half_written() -> Result<()> {
    use std::io::Write;
    let place = Place::new()?;
    let model = Arc::new(model("llama")?);
    let path = place.write("watched/libreloading.so", variant("plain")?)?;
    let mut job = Job::new(model.clone(), &Plugin::load(&path)?, Map::new(), 42, None, false)?;
    job.watch = Some(watching()?);
    let builds = (0..100).map(|number| variant(&format!("build{number}"))).collect::<Result<Vec<_>>>()?;
    let digests: Vec<String> = builds.iter().map(|bytes| sha256(bytes)).collect();
    let written = std::thread::scope(|scope| -> Result<TrainReport> {
        let builder = scope.spawn(|| -> Result<()> {
            let built = path.with_extension("built");
            for (number, bytes) in builds.iter().enumerate() {
                match number % 3 {
                    0 => {
                        fs::write(&built, bytes)?;
                        fs::rename(&built, &path)?;
                    }
                    1 => {
                        fs::write(&built, bytes)?;
                        fs::remove_file(&path)?;
                        fs::hard_link(&built, &path)?;
                        fs::remove_file(&built)?;
                    }
                    _ => {
                        let mut file = fs::File::create(&path)?;
                        for piece in bytes.chunks(bytes.len().div_ceil(4)) {
                            file.write_all(piece)?;
                            sleep(Duration::from_millis(10));
                        }
                    }
                }
                // Now and then long enough for a build to be taken.
                sleep(Duration::from_millis(if number % 25 == 24 { 500 } else { 10 }));
            }
            Ok(())
        });
        let rows = examples(&model, 24, 1);
        let start = Instant::now();
        let mut observer = |_: &StepReport, _| {
            sleep(Duration::from_millis(5));
            let done = job.now().1.sha256 == digests[99] || start.elapsed() > Duration::from_secs(60);
            Ok(if done { Control::Stop } else { Control::Continue })
        };
        let report = job.train(&all(&rows), &Sft, &config(100_000), &mut observer, None, None)?.report;
        builder.join().expect("it does not panic")?;
        Ok(report)
    })?;
    assert_eq!(job.now().1.sha256, digests[99]);
    let swapped = written.events.iter().filter_map(|event| match &event.change {
        Change::Swapped(swap) => Some(swap.id.clone()),
        _ => None,
    });
    let swapped: Vec<String> = swapped.collect();
    assert!(!swapped.is_empty() && swapped.iter().all(|id| digests.contains(id)), "{swapped:?}");
    Ok(())
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Code of before ABI 1.1 has no `on_step`.
#[test]
fn a_build_without_the_hook_ends_what_it_directed_and_one_line_says_so() -> Result<()> {
    let place = Place::new()?;
    let model = Arc::new(model("llama")?);
    let path = place.write("watched/libreloading.so", variant("restrained")?)?;
    let mut faster = variant("faster")?;
    let magic = (0..faster.len()).find(|at| faster[*at..].starts_with(b"HOMEROOM\x58\0\0\0\x01\0\x01\0"));
    faster[magic.context("it has a descriptor")? + 14] = 0;
    let new = sha256(&faster)[..8].to_owned();
    let lines =
        || SAID.lock().expect("no test panics with it").iter().filter(|line| line.contains(&new)).cloned().collect();
    let start = Instant::now();
    let mut observer = |report: &StepReport, _| {
        if report.step == 5 {
            fs::write(&path, &faster)?;
        }
        sleep(Duration::from_millis(10));
        let lines: Vec<String> = lines();
        let done = lines.len() == 2 || start.elapsed() > Duration::from_secs(9);
        Ok(if done { Control::Stop } else { Control::Continue })
    };
    let plugin = Plugin::load(&path)?;
    let adaptation = Adaptation::new(&model, plugin.plan(&request(&model))?, 42)?;
    let mut live = Live::new(&mut observer, &plugin, request(&model), None, Some(watching()?), &|_, _| {}, say);
    let rows = examples(&model, 24, 1);
    learn_on(&model, &adaptation, &rows.iter().collect::<Vec<_>>(), &config(3000), &mut live)?;
    let lines: Vec<String> = lines();
    for words in
        ["no longer directed: freeze of 4 parameters, scale of the learning rate", "the learning rate stays (0.25 is"]
    {
        assert!(lines.first().is_some_and(|line| line.contains(words)), "no `{words}` in {lines:?}");
    }
    Ok(())
}

/// All of it: a job whose file is replaced while it trains.
#[test]
fn a_training_takes_a_new_build_over_between_two_steps() -> Result<()> {
    let place = Place::new()?;
    let model = Arc::new(model("llama")?);
    let path = place.write("watched/libreloading.so", variant("plain")?)?;
    let mut job = Job::new(model.clone(), &Plugin::load(&path)?, Map::new(), 42, None, false)?;
    job.watch = Some(watching()?);
    let rows = examples(&model, 24, 1);
    let rows: Vec<&Example> = rows.iter().collect();
    let mut saved = None;
    let mut taken = None;
    let start_sha = job.strategy.sha256.clone();
    let mut observer = |report: &StepReport, _| {
        if report.step == 5 {
            let built = path.with_extension("built");
            fs::write(&built, variant("more")?)?;
            fs::rename(&built, &path)?;
            saved = Some(Instant::now());
        }
        if taken.is_none() && job.now().1.sha256 != start_sha {
            taken = saved.map(|saved| saved.elapsed());
        }
        sleep(Duration::from_millis(10));
        let done = taken.is_some_and(|_| report.step.is_multiple_of(10));
        Ok(if done { Control::Stop } else { Control::Continue })
    };
    let report = job.train(&Data::of_examples(&rows, &[]), &Sft, &config(3000), &mut observer, None, None)?.report;
    let taken = taken.context("it was taken over")?;
    assert!(taken < Duration::from_secs(4), "{taken:?}");
    assert!(report.events.iter().any(|event| matches!(event.change, Change::Swapped(_))));
    assert!(job.now().0.params.len() > job.adaptation.params.len());
    Ok(())
}
