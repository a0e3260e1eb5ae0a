//! Nothing that was computed is lost: a run that is killed, interrupted or finds no room goes on, and its result has the bytes of an
//! undisturbed one. `tests/peers/kills.py` does the same a hundred times, on longer runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use homeroom::job::{Job, Outcome, Recording, Saving, Taken};
use homeroom::plugin::Plugin;
use homeroom::runs::{About, Kind, RunDirectory, list};
use homeroom_abi::plan::PlanRequest;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::objective::{ObjectiveConfig, Sft};
use homeroom_engine::train::{
    Candidate, Control, Data, EvalReport, Observer, RunEvent, State, StepReport, TrainConfig, train,
};
use homeroom_kernels::{Feature, Isa, Stream};
use serde_json::{Map, Value, json};

use crate::command_line::Running;
use crate::invariants::examples;
use crate::reload::variant;
use crate::support::{Place, fixture, homeroom, model, plan, refused, run, succeeds};

/// The file of an adapter's values.
const WEIGHTS: &str = "adapter_model.safetensors";

/// A run of the program in a directory of its own.
struct Runs {
    place: Place,
    /// The name of the first run.
    id: &'static str,
    arguments: Vec<String>,
}

impl Runs {
    /// `fine-tune` of a tiny model with these arguments, into `outputs/out`.
    fn new(arguments: &[&str]) -> Result<Self> {
        let place = Place::new()?;
        place.rows("rows.jsonl", 24)?;
        place.rows("held.jsonl", 5)?;
        Ok(Self { place, id: "out-1", arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect() })
    }

    fn out(&self) -> PathBuf {
        self.place.path("outputs/out")
    }

    fn program(&self) -> Command {
        let mut command = homeroom();
        command.env("HOMEROOM_HOME", self.place.path("home")).current_dir(self.place.path(""));
        command
    }

    /// The command with further arguments.
    fn command(&self, more: &[&str]) -> Command {
        let mut command = self.program();
        command.args(["fine-tune", "--training-file", "rows.jsonl", "--output-dir", "outputs/out", "--model-name"]);
        command.arg(fixture("models/llama")).args(&self.arguments).args(more);
        command
    }

    /// Bytes of a result that nobody disturbed, and for which nothing was saved.
    fn undisturbed(&self) -> Result<Vec<u8>> {
        let other = Self::new(&[])?;
        let mut command = other.command(&["--save-minutes", "0"]);
        succeeds(command.args(&self.arguments))?;
        Ok(fs::read(other.out().join(WEIGHTS))?)
    }

    fn result(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.out().join(WEIGHTS))?)
    }

    /// Steps of the checkpoints of the only run.
    fn checkpoints(&self) -> Vec<u64> {
        let entries = fs::read_dir(self.checkpoint("")).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut steps: Vec<u64> = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    fn checkpoint(&self, name: &str) -> PathBuf {
        self.place.path("home/runs").join(self.id).join("trainings/1/checkpoints").join(name)
    }

    fn newest(&self) -> Result<PathBuf> {
        let step = *self.checkpoints().last().context("a checkpoint was saved")?;
        Ok(self.checkpoint(&format!("step-{step:06}")))
    }

    /// Starts the command, and kills it when it has saved so many checkpoints.
    fn kill_after(&self, step: u64) -> Result<()> {
        self.kill(&mut self.command(&["--save-every", "2", "--resume"]), step)
    }

    fn kill(&self, command: &mut Command, step: u64) -> Result<()> {
        let mut running = Running::start(command)?;
        let start = Instant::now();
        while self.checkpoints().last().is_none_or(|saved| *saved < step) {
            ensure!(start.elapsed() < Duration::from_secs(60), "no checkpoint of step {step} in a minute");
            ensure!(running.child.try_wait()?.is_none(), "it ended before step {step}");
            sleep(Duration::from_millis(1));
        }
        running.child.kill()?;
        ensure!(running.child.wait()?.code().is_none(), "it ended before it was killed");
        Ok(())
    }
}

/// Arguments of a run that takes long enough to be interrupted in it.
const LONG: [&str; 8] = ["--max-steps", "90", "--eval-file", "held.jsonl", "--eval-every", "1", "--batch-size", "2"];
/// Arguments of a run of a fraction of a second.
const SHORT: [&str; 8] = ["--max-steps", "40", "--batch-size", "4", "--lora-dropout", "0.1", "--seed", "5"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT, more].concat()
}

/// Kills a process after some time, if it is still there.
fn killed_after(command: &mut Command, time: Duration) -> Result<bool> {
    let mut running = Running::start(command)?;
    sleep(time);
    running.child.kill()?;
    let status = running.child.wait()?;
    ensure!(status.code().is_none_or(|code| code == 0), "it ended with {status}");
    Ok(status.code().is_none())
}

#[test]
fn ten_kills_at_random_instants_change_no_bit() -> Result<()> {
    let evaluated = ["--eval-file", "held.jsonl", "--eval-every", "6", "--learning-rate", "2e-2"];
    let cases = [
        Runs::new(&with(&[&["--compute", "f32"], &evaluated[..]].concat()))?,
        Runs::new(&with(&["--strategy", "qlora", "--gradient-accumulation-steps", "2", "--no-packing"]))?,
    ];
    let mut random = Stream::new(7, 1);
    for runs in cases {
        let start = Instant::now();
        let expected = runs.undisturbed()?;
        let whole = start.elapsed().as_secs_f64();
        let (mut kills, mut attempts) = (0, 0);
        while kills < 5 {
            attempts += 1;
            ensure!(attempts < 60, "{kills} kills fell in {attempts} runs");
            let instant = Duration::from_secs_f64(whole * random.below(1000) as f64 / 1000.0);
            let mut command = runs.command(&["--save-every", "3", "--resume"]);
            command.env("RAYON_NUM_THREADS", (1 + attempts % 3).to_string());
            if killed_after(&mut command, instant)? {
                kills += 1;
            } else {
                assert_eq!(runs.result()?, expected);
                fs::remove_dir_all(runs.out())?;
            }
        }
        succeeds(&mut runs.command(&["--resume"]))?;
        assert_eq!(runs.result()?, expected);
        assert_eq!(runs.place.outputs()?, ["out"]);
    }
    Ok(())
}

#[test]
fn resume_refuses_other_settings_and_rows_and_starts_or_rests_where_there_is_nothing_to_go_on_with() -> Result<()> {
    let runs = Runs::new(&SHORT)?;
    runs.kill_after(6)?;
    let others = ["--resume", "--learning-rate", "1e-3", "--lora-r", "4", "--no-shuffle"];
    refused(
        &mut runs.command(&others),
        &[
            "run out-1 cannot go on with other settings",
            "--learning-rate is 0.001, the run has not given",
            "--lora-r is 4, the run has not given",
            "--no-shuffle is true, the run has false",
        ],
    )?;
    let rows = fs::read(runs.place.path("rows.jsonl"))?;
    runs.place.rows("rows.jsonl", 23)?;
    refused(&mut runs.command(&["--resume"]), &["the rows of --training-file have changed"])?;
    fs::write(runs.place.path("rows.jsonl"), rows)?;
    let before = runs.checkpoints();
    ensure!(before.last().is_some_and(|step| *step >= 6), "a refused command took {before:?} away");
    let ran = succeeds(&mut runs.command(&["--resume", "--json"]))?;
    let resumed = ran.stderr.lines().find(|line| line.contains("goes on after step")).context("it says so")?;
    assert!(resumed.contains("of 40"), "{resumed}");
    assert_eq!(runs.result()?, runs.undisturbed()?);
    let about = |path: &Path| anyhow::Ok((fs::metadata(path)?.modified()?, fs::read(path)?));
    let files = ["outputs/out/homeroom.json", "outputs/out/adapter_model.safetensors", "home/runs/out-1/run.json"];
    let before = files.map(|file| about(&runs.place.path(file)).ok());
    // As one leaves it that is killed between its last two acts.
    fs::create_dir_all(runs.checkpoint("step-000039"))?;
    let again = succeeds(&mut runs.command(&["--resume"]))?;
    assert!(again.stderr.contains("run out-1 has finished"), "{}", again.stderr);
    assert!(before.iter().all(Option::is_some) && before == files.map(|file| about(&runs.place.path(file)).ok()));
    assert!(!runs.checkpoint("").exists());
    Ok(())
}

/// Products of f32 are fused multiply-adds on every processor but the portable one, so that their bits tell.
#[test]
fn a_run_goes_on_with_the_instructions_that_it_began_with() -> Result<()> {
    let f32s = with(&["--compute", "f32"]);
    let begun = |isa: &str| -> Result<(Runs, Vec<u8>)> {
        let (whole, runs) = (Runs::new(&f32s)?, Runs::new(&f32s)?);
        succeeds(whole.command(&[]).env("HOMEROOM_CPU", isa))?;
        runs.kill(runs.command(&["--save-every", "2", "--resume"]).env("HOMEROOM_CPU", isa), 6)?;
        Ok((runs, whole.result()?))
    };
    let here = Isa::detected();
    let (runs, portable) = begun("portable")?;
    let ran = succeeds(&mut runs.command(&["--resume"]))?;
    assert_eq!(runs.result()?, portable);
    let note = format!("note: kept to portable, with which the run began; this processor has {}", here.name());
    assert_eq!(ran.stderr.contains(&note), here != Isa::PORTABLE, "{}", ran.stderr);
    assert!(ran.stderr.contains("processor portable   f32 by portable code"), "{}", ran.stderr);
    if !here.has(Feature::Avx2) {
        return Ok(());
    }
    let (runs, fused) = begun(&here.name())?;
    assert_ne!(fused, portable);
    let ran = succeeds(runs.command(&["--resume"]).env("HOMEROOM_CPU", "portable"))?;
    assert_ne!(runs.result()?, fused);
    let note = format!("note: the run began on a processor with {}, this one has portable of it", here.name());
    assert!(ran.stderr.contains(&note), "{}", ran.stderr);
    Ok(())
}

/// On a directory of its own, which `--resume` finds empty.
/// A chat template may tell the time: what was rendered before the kill is rendered so again, whatever the time is by then.
#[test]
fn a_run_tells_the_time_at_which_it_began() -> Result<()> {
    let runs = Runs::new(&SHORT)?;
    let base = runs.place.copy(&fixture("models/llama"), "base")?;
    let template = base.join("chat_template.jinja");
    let source = fs::read_to_string(&template)?;
    fs::write(&template, format!("{{{{ strftime_now('%d %H:%M:%S') }}}}{source}"))?;
    let command = |more: &[&str]| {
        let mut command = runs.program();
        command.args(["fine-tune", "--training-file", "rows.jsonl", "--output-dir", "outputs/out", "--model-name"]);
        command.arg(&base).args(SHORT).args(more);
        command
    };
    runs.kill(&mut command(&["--save-every", "2"]), 4)?;
    let (home, kept) = (runs.place.path("home"), runs.place.path("kept"));
    succeeds(Command::new("cp").arg("-a").arg(&home).arg(&kept))?;
    succeeds(&mut command(&["--resume"]))?;
    let first = runs.result()?;
    // The same kill once more, gone on with some seconds later.
    fs::remove_dir_all(&home)?;
    fs::remove_dir_all(runs.place.path("outputs"))?;
    fs::rename(&kept, &home)?;
    sleep(Duration::from_millis(2100));
    succeeds(&mut command(&["--resume"]))?;
    ensure!(runs.result()? == first, "the rows were rendered at another time");
    Ok(())
}

#[test]
fn resume_without_a_run_starts_one() -> Result<()> {
    let runs = Runs::new(&["--max-steps", "3"])?;
    succeeds(&mut runs.command(&["--resume"]))?;
    assert_eq!(runs.result()?, runs.undisturbed()?);
    let refusal = runs.command(&["--resume", "--overwrite"]).output()?;
    assert_eq!(refusal.status.code(), Some(2));
    Ok(())
}

/// `--overwrite` is said of what stands there when the run begins.
#[test]
fn a_run_with_overwrite_replaces_what_stood_there_by_its_whole_result_and_nothing_that_came_later() -> Result<()> {
    let runs = Runs::new(&LONG)?;
    let standing = runs.place.write("outputs/out/trainer_state.json", "mine")?;
    let resume = || {
        let mut command = runs.program();
        command.args(["resume", "out-1"]);
        command
    };
    let mut running = Running::start(&mut runs.command(&["--overwrite", "--save-every", "2"]))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    let (code, _, stderr) = running.end()?;
    assert!(
        code == Some(130) && stderr.contains("is as it was") && stderr.contains("homeroom resume out-1"),
        "{stderr}"
    );
    assert_eq!((fs::read_to_string(&standing)?.as_str(), runs.place.outputs()?), ("mine", vec!["out".to_owned()]));
    // Another result by then.
    fs::write(&standing, "another's")?;
    refused(&mut resume(), &["something else is there by now", "nothing of the run is lost meanwhile"])?;
    assert_eq!(fs::read_to_string(&standing)?, "another's");
    fs::remove_dir_all(runs.out())?;
    succeeds(&mut resume())?;
    assert_eq!(runs.result()?, runs.undisturbed()?);
    Ok(())
}

#[test]
fn what_a_user_puts_beside_a_partial_result_stays() -> Result<()> {
    let runs = Runs::new(&LONG)?;
    let mut running = Running::start(&mut runs.command(&["--save-every", "2"]))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    assert_eq!(running.end()?.0, Some(130));
    let mine = runs.place.write("outputs/out/thesis.txt", "years")?;
    refused(runs.program().args(["resume", "out-1"]), &["holds `thesis.txt`"])?;
    assert_eq!(fs::read_to_string(&mine)?, "years");
    fs::remove_file(mine)?;
    succeeds(runs.program().args(["resume", "out-1"]))?;
    assert_eq!(runs.result()?, runs.undisturbed()?);
    Ok(())
}

#[test]
fn a_run_goes_on_without_its_plugin_and_with_other_threads() -> Result<()> {
    let runs = Runs::new(&with(&["--strategy", "qlora"]))?;
    // Strategies that lie beside the program are found; beside this name of it there are none.
    let program = runs.place.path("alone/homeroom");
    fs::create_dir(runs.place.path("alone"))?;
    let built = env!("CARGO_BIN_EXE_homeroom");
    fs::hard_link(built, &program).or_else(|_| fs::copy(built, &program).map(drop))?;
    let nothing = runs.place.path("nothing");
    fs::create_dir(&nothing)?;
    runs.kill_after(4)?;
    for threads in ["1", "3"] {
        let mut alone = Command::new(&program);
        let whole = runs.command(&["--resume", "--save-every", "2"]);
        alone.args(whole.get_args()).envs(whole.get_envs().filter_map(|(key, value)| Some((key, value?))));
        alone.env("HOMEROOM_PLUGINS", &nothing).env("RAYON_NUM_THREADS", threads).current_dir(runs.place.path(""));
        if threads == "1" {
            runs.kill(&mut alone, runs.checkpoints().last().context("it was saved")? + 4)?;
            continue;
        }
        let ran = succeeds(&mut alone)?;
        assert!(
            ran.stderr.contains("strategy `qlora`: its plugin is not here; the training goes on"),
            "{}",
            ran.stderr
        );
    }
    assert_eq!(runs.result()?, runs.undisturbed()?);
    Ok(())
}

/// A name that the user did not choose is given up for another, as at the end of a run that was never killed.
#[test]
fn a_run_whose_name_is_anothers_by_now_takes_another() -> Result<()> {
    let runs = Runs { id: "rows-1", ..Runs::new(&SHORT)? };
    let mut unnamed = runs.program();
    unnamed.args(["fine-tune", "--training-file", "rows.jsonl", "--save-every", "2", "--model-name"]);
    runs.kill(unnamed.arg(fixture("models/llama")).args(&runs.arguments), 4)?;
    runs.place.write("home/models/rows/notes", "mine")?;
    succeeds(runs.program().args(["resume", "rows-1"]))?;
    assert_eq!(fs::read_dir(runs.place.path("home/models/rows"))?.count(), 1);
    assert_eq!(fs::read(runs.place.path("home/models/rows-2").join(WEIGHTS))?, runs.undisturbed()?);
    Ok(())
}

#[test]
fn an_interrupted_run_goes_on_by_its_name() -> Result<()> {
    let runs = Runs::new(&LONG)?;
    let mut running = Running::start(&mut runs.command(&[]))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    let (code, _, stderr) = running.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("next      homeroom resume out-1"), "{stderr}");
    let stopped = stderr.lines().find(|line| line.starts_with("stopped after step")).context("it says where")?;
    let newest = runs.newest()?;
    let state: Value = serde_json::from_slice(&fs::read(newest.join("training_state.json"))?)?;
    assert!(stopped.contains(&format!("step {} of 90", state["step"])), "{stopped} {}", state["step"]);
    let interrupted = runs.result()?;
    let ran = succeeds(runs.program().args(["resume", "out-1"]))?;
    assert!(ran.stderr.contains(&format!("goes on after step {} of 90", state["step"])), "{}", ran.stderr);
    let expected = runs.undisturbed()?;
    assert!(runs.result()? == expected && interrupted != expected);
    let rests = succeeds(runs.program().args(["resume", "out-1"]))?;
    assert!(rests.stderr.contains("has finished"), "{}", rests.stderr);
    Ok(())
}

#[test]
fn a_checkpoint_is_an_adapter_that_answers_and_a_damaged_one_is_left_out() -> Result<()> {
    let runs = Runs::new(&SHORT)?;
    runs.kill_after(20)?;
    let newest = runs.newest()?;
    let mut chat = runs.program();
    chat.args(["chat", "--prompt", "times seven: 3", "--max-tokens", "5", "--model-dir"]).arg(&newest);
    succeeds(&mut chat)?;
    let [.., before, last] = runs.checkpoints()[..] else { bail!("two are kept: {:?}", runs.checkpoints()) };
    let files = ["training_state.safetensors", "training_state.json", WEIGHTS, "observers.json", "homeroom.json"];
    for file in files {
        let file = newest.join(file);
        let whole = fs::read(&file)?;
        fs::write(&file, &whole[..whole.len() / 2])?;
        // Not to the end, so that the next file can be tried.
        let mut running = Running::start(&mut runs.command(&["--resume", "--save-minutes", "0"]))?;
        running.wait_for(&format!("warning: the checkpoint of step {last} is left out: "))?;
        running.wait_for(&format!("run       out-1   goes on after step {before} of 40"))?;
        drop(running);
        if runs.checkpoints().contains(&last) {
            fs::write(&file, &whole)?;
        } else {
            bail!("a checkpoint that was left out was taken away");
        }
    }
    fs::write(newest.join(WEIGHTS), "")?;
    succeeds(&mut runs.command(&["--resume"]))?;
    assert_eq!(runs.result()?, runs.undisturbed()?);
    Ok(())
}

/// Of a training that saves nothing more, none is left after all are damaged: it starts anew.
#[test]
fn a_run_whose_only_checkpoint_is_damaged_starts_anew() -> Result<()> {
    let runs = Runs::new(&["--max-steps", "12"])?;
    runs.kill_after(0)?;
    for step in runs.checkpoints() {
        fs::write(runs.checkpoint(&format!("step-{step:06}/training_state.json")), "{")?;
    }
    let ran = succeeds(&mut runs.command(&["--resume"]))?;
    assert!(ran.stderr.contains("there is none before it"), "{}", ran.stderr);
    assert_eq!(runs.result()?, runs.undisturbed()?);
    Ok(())
}

/// An observer that ends a run after a step, as a user or of its own accord, and counts evaluations.
struct Ends {
    after: u64,
    is_cancelled: bool,
    done: u64,
    evaluated: Vec<u64>,
}

impl Observer for Ends {
    fn on_step(&mut self, report: &StepReport, _: u64) -> Result<Control> {
        self.done = report.step;
        Ok(if report.step == self.after { Control::Stop } else { Control::Continue })
    }

    fn evaluated(&mut self, report: &EvalReport) {
        self.evaluated.push(report.step);
    }

    fn is_cancelled(&mut self) -> bool {
        self.is_cancelled && self.done == self.after
    }
}

/// Whoever interrupts a run does not wait for the evaluation that was due by then. It is made up for, as what is kept depends on it.
#[test]
fn an_evaluation_that_nobody_waited_for_is_made_up_for() -> Result<()> {
    let model = model("llama")?;
    let (rows, held_out) = (examples(&model, 12, 1), examples(&model, 4, 2));
    let data = Data::of_examples(&rows.iter().collect::<Vec<_>>(), &held_out.iter().collect::<Vec<_>>());
    let config = TrainConfig {
        max_steps: Some(12),
        learning_rate: 5e-2,
        eval_steps: Some(4),
        early_stopping_patience: Some(1),
        compute: Compute::F32,
        ..TrainConfig::default()
    };
    let start = || {
        let adaptation = Adaptation::new(&model, plan("lora", &json!({"r": 4}), &model)?, 1)?;
        anyhow::Ok(State::new(&model, &adaptation, &config))
    };
    let ends = |after, is_cancelled| Ends { after, is_cancelled, done: 0, evaluated: Vec::new() };
    let mut undisturbed = ends(99, false);
    let whole = train(&model, start()?, &data, &Sft, &config, &mut undisturbed)?;
    for after in [0, 4, 5, 8] {
        let mut first = ends(after, true);
        let state = train(&model, start()?, &data, &Sft, &config, &mut first)?;
        if state.report.stopped.is_some() {
            continue;
        }
        assert_eq!((state.step, state.report.interrupted), (after, true));
        assert!(!first.evaluated.contains(&after));
        let mut second = ends(99, false);
        let state = train(&model, state, &data, &Sft, &config, &mut second)?;
        assert_eq!([first.evaluated, second.evaluated].concat(), undisturbed.evaluated);
        assert_eq!((state.best, &state.report.stopped), (whole.best, &whole.report.stopped));
    }
    // One that nobody interrupts has come to its end: what is saved by then does not go on.
    let mut script = ends(4, false);
    let state = train(&model, start()?, &data, &Sft, &config, &mut script)?;
    let (step, evaluated) = (state.step, script.evaluated);
    let mut again = ends(99, false);
    let state = train(&model, state, &data, &Sft, &config, &mut again)?;
    assert_eq!((step, state.step, &state.report.steps.len()), (4, 4, &4));
    assert_eq!((evaluated, again.evaluated), (vec![0, 4], Vec::new()));
    Ok(())
}

// --- a program of its own, as what it observes is not what users can type -------------------------------------------------

/// An observer that offers other plans before fixed steps, and takes the room for checkpoints away for some.
struct Program {
    done: u64,
    offers: BTreeMap<u64, Candidate>,
    /// Steps without room, and the directory of checkpoints.
    full: Option<(std::ops::Range<u64>, PathBuf)>,
}

impl Observer for Program {
    fn on_step(&mut self, report: &StepReport, _: u64) -> Result<Control> {
        self.done = report.step;
        if let Some((steps, checkpoints)) = &self.full {
            let aside = checkpoints.with_extension("aside");
            if report.step == steps.start {
                fs::rename(checkpoints, aside)?;
                fs::write(checkpoints, "no room")?;
            } else if report.step == steps.end {
                fs::remove_file(checkpoints)?;
                fs::rename(aside, checkpoints)?;
            }
        }
        // So that there is time to kill it.
        sleep(Duration::from_millis(4));
        Ok(Control::Continue)
    }

    fn candidate(&mut self) -> Result<Option<Candidate>> {
        Ok(self.offers.remove(&self.done))
    }

    fn changed(&mut self, event: &RunEvent, _: &Arc<Adaptation>) -> Result<()> {
        self.done = event.step;
        Ok(())
    }
}

/// Trains, or goes on, in the directory that `HOMEROOM_KILLED` names: its strategy is swapped for one with more parameters after step 11,
/// and after step 23 for one that is taken back. `HOMEROOM_KILLED_HOW`: `best` evaluates instead, on rows that say nothing of
/// those that are trained; `full at` a step finds no room about it.
#[test]
#[ignore = "the tests below run it, and tests/peers/kills.py, each in a process of its own"]
fn alone() -> Result<()> {
    let Some(place) = std::env::var_os("HOMEROOM_KILLED").map(PathBuf::from) else { return Ok(()) };
    let how = std::env::var("HOMEROOM_KILLED_HOW").unwrap_or_default();
    let is_evaluated = !how.is_empty();
    let model = Arc::new(model("llama")?);
    let load = |name: &str| Plugin::load(&place.join(name).join("libreloading.so"));
    let plugin = load("plain")?;
    let run = match list()?.last() {
        Some(run) => RunDirectory::reopen(&run.id)?,
        None => RunDirectory::start(Kind::FineTune, "out", About::here(json!({}), Map::new()))?,
    };
    let mut recording = Recording::new(&run, 1, Saving { steps: Some(3), minutes: 0.0 })?;
    let mut config = TrainConfig {
        max_steps: Some(40),
        learning_rate: if is_evaluated { 5e-2 } else { 5e-3 },
        compute: Compute::F32,
        eval_steps: is_evaluated.then_some(5),
        ..TrainConfig::default()
    };
    let native = |_: &_, name: &str| bail!("no codec {name}");
    let job = match recording.newest() {
        Some(saved) => Job::resume(model.clone(), &saved, Some(plugin.clone()), &native, Map::new(), None)?,
        None => Job::new(model.clone(), &plugin, Map::new(), 42, None, false)?,
    };
    let from = recording.newest().map(|_| recording.resume(&job, &mut config)).transpose()?;
    let request = PlanRequest { options: Map::new(), model: model.info() };
    let mut offers = BTreeMap::new();
    for (after, name) in [(11, "more"), (23, "worse")].into_iter().filter(|_| !is_evaluated) {
        offers.insert(after, Candidate { id: name.to_owned(), plan: load(name)?.plan(&request)?, directs: true });
    }
    let best: Option<u64> = how.strip_prefix("full at ").map(str::parse).transpose()?;
    let full = best.map(|best| (best - 1..best + 4, recording.directory().join("checkpoints")));
    let mut program = Program { done: from.as_ref().map_or(0, |from| from.state.step), offers, full };
    let rows = examples(&model, if is_evaluated { 6 } else { 24 }, 1);
    let held_out = examples(&model, 9, 77);
    let held_out: Vec<_> = held_out.iter().filter(|_| is_evaluated).collect();
    let data = Data::of_examples(&rows.iter().collect::<Vec<_>>(), &held_out);
    let state = job.train(&data, &Sft, &config, &mut program, Some(&mut recording), from)?;
    println!("kept step {}", state.report.kept_step.unwrap_or_default());
    let (rows, data_digest, objective) = (rows.len(), String::new(), ObjectiveConfig::default());
    let outcome = Outcome {
        config,
        report: state.report,
        objective,
        run: None,
        rows,
        data_digest,
        failure: None,
        forgetting: None,
    };
    outcome.save(&job, &place.join("out"), Taken::Replaced, None).map(drop)
}

/// A directory for [`alone`], and how it is run there.
struct Alone(Place);

impl Alone {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        for name in ["plain", "more", "worse"] {
            place.write(&format!("{name}/libreloading.so"), variant(name)?)?;
        }
        Ok(Self(place))
    }

    fn command(&self, how: &str) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "--ignored", "--nocapture", "killed::alone"]).env("HOMEROOM_KILLED_HOW", how);
        command.env("HOMEROOM_KILLED", self.0.path("")).env("HOMEROOM_HOME", self.0.path("home"));
        Ok(command)
    }

    fn result(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.0.path("out").join(WEIGHTS))?)
    }

    fn events(&self) -> Result<String> {
        Ok(fs::read_to_string(self.0.path("home/runs/out-1/events.jsonl"))?)
    }
}

#[test]
fn a_run_whose_plugin_is_swapped_goes_on_before_while_and_after_it_is_on_trial() -> Result<()> {
    let undisturbed = Alone::new()?;
    succeeds(&mut undisturbed.command("")?)?;
    let events = undisturbed.events()?;
    for change in ["swapped", "passed", "rolled_back"] {
        assert!(events.contains(&format!("\"event\":\"{change}\"")), "no `{change}` in\n{events}");
    }
    let killed = Alone::new()?;
    for step in [7, 12, 13, 22, 24, 30] {
        let mut running = Running::start(&mut killed.command("")?)?;
        let mark = format!("\"event\":\"step\",\"step\":{step},");
        while !killed.events().is_ok_and(|events| events.contains(&mark)) {
            ensure!(running.child.try_wait()?.is_none(), "it ended before step {step}");
            sleep(Duration::from_millis(1));
        }
        drop(running);
    }
    succeeds(&mut killed.command("")?)?;
    assert!(killed.events()?.matches("\"event\":\"resumed\"").count() >= 5);
    assert_eq!(killed.result()?, undisturbed.result()?);
    Ok(())
}

/// The best state is what the run ends with, so it is kept in memory where the disk cannot take it.
#[test]
fn a_disk_that_is_full_for_a_while_ends_no_training_and_changes_no_bit() -> Result<()> {
    let (undisturbed, full) = (Alone::new()?, Alone::new()?);
    let kept = succeeds(&mut undisturbed.command("best")?)?.stdout;
    let kept = kept.lines().find_map(|line| line.strip_prefix("kept step ")).context("it says which")?;
    // Where the loss falls to the end, step 10 is the best by then.
    let at = if kept == "0" { "10" } else { kept };
    let ran = run(&mut full.command(&format!("full at {at}"))?)?;
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("warning: no checkpoint at step").count(), 1, "{}", ran.stderr);
    assert!(ran.stdout.contains(&format!("kept step {kept}\n")), "{}", ran.stdout);
    assert_eq!(full.result()?, undisturbed.result()?);
    Ok(())
}
