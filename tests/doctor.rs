//! `homeroom doctor`, and what a user reads of each trouble that is known: the same words when it happens, in `runs show`, and afterwards.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command_line::Running;
use crate::hub::{self, server::Server};
use crate::pipelines;
use crate::results::overflowing;
use crate::support::{Place, Ran, fixture, homeroom, printed_json, root, run, succeeds};

/// A place with a home of its own.
struct Home(Place);

impl Home {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        place.rows("rows.jsonl", 24)?;
        Ok(Self(place))
    }

    fn path(&self) -> PathBuf {
        self.0.path("home")
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = homeroom();
        command.args(arguments).env("HOMEROOM_HOME", self.path()).current_dir(self.0.path(""));
        for name in
            ["HF_TOKEN", "CUDA_VISIBLE_DEVICES", "HOMEROOM_MEMORY", "HOMEROOM_CPU", "HTTPS_PROXY", "https_proxy"]
        {
            command.env_remove(name);
        }
        command
    }

    /// A training of a tiny model, of so many steps, which saves each.
    fn fine_tune(&self, model: &Path, steps: &str, more: &[&str]) -> Command {
        let mut command = self.program(&["fine-tune", "--training-file", "rows.jsonl", "--output-dir", "outputs/out"]);
        command.args(["--save-every", "1", "--max-steps", steps, "--model-name"]).arg(model).args(more);
        command
    }

    fn events(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join("runs").join(run).join("events.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for an event of a run that is going on.
    fn wait_for(&self, running: &mut Running, run: &str, is_it: impl Fn(&Value) -> bool) -> Result<()> {
        let start = Instant::now();
        while !self.events(run).iter().any(&is_it) {
            ensure!(start.elapsed() < Duration::from_secs(60), "no such event in a minute");
            ensure!(running.child.try_wait()?.is_none(), "it ended before");
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What `doctor` and `runs show` say of a run: the failure's name, and that both say the same.
    fn explained(&self, run: &str) -> Result<Value> {
        let json = printed_json(&succeeds(&mut self.program(&["doctor", run, "--json"]))?)?;
        let shown = succeeds(&mut self.program(&["runs", "show", run]))?.stdout;
        let words = succeeds(&mut self.program(&["doctor", run]))?.stdout;
        let all = printed_json(&run_of(&mut self.program(&["doctor", "--json"]))?)?;
        let text =
            |key: &str| json["trouble"][key].as_str().map(str::to_owned).with_context(|| format!("{key}: {json}"));
        for key in ["because", "cause", "remedy"] {
            let text = text(key)?;
            assert!(shown.contains(&text) && words.contains(&text), "no `{text}` in\n{shown}\n{words}");
        }
        let of_last = all["findings"].as_array().context("findings")?.iter().find(|finding| finding["about"] == "runs");
        let of_last = of_last.with_context(|| format!("no run in {all}"))?;
        let (cause, remedy) = (text("cause")?, text("remedy")?);
        assert!(of_last["what"].as_str().is_some_and(|what| what.contains(&cause)), "{of_last}");
        assert_eq!(of_last["remedy"], json!(remedy));
        Ok(json)
    }
}

/// Runs a command that may end with 1.
fn run_of(command: &mut Command) -> Result<Ran> {
    let ran = run(command)?;
    ensure!(matches!(ran.code, Some(0 | 1)) && !ran.stderr.contains("error: "), "{command:?}: {ran:?}");
    Ok(ran)
}

fn finding<'a>(findings: &'a Value, about: &str, words: &str) -> Result<&'a Value> {
    let all = findings["findings"].as_array().context("findings")?;
    let found = all.iter().find(|one| one["about"] == about && one["what"].as_str().is_some_and(|w| w.contains(words)));
    found.with_context(|| format!("no `{words}` of {about} in {findings:#}"))
}

/// What the program says of a failure, in order.
fn cause_and_remedy(stderr: &str) -> Result<(String, String)> {
    let line = |key: &str| stderr.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    let both = line("cause: ").zip(line("remedy: "));
    both.with_context(|| format!("no cause and remedy in\n{stderr}"))
}

#[test]
fn a_healthy_machine_has_no_problem_and_no_secret_is_shown() -> Result<()> {
    let home = Home::new()?;
    let doctor = |more: &[&str]| {
        let mut command = home.program(&["doctor"]);
        command.args(more).env("HF_TOKEN", "hf_sesame").env("HTTPS_PROXY", "http://ann:sesame@proxy.school:3128");
        command.env("HOMEROOM_SHEEP", "9");
        run_of(&mut command)
    };
    let ran = doctor(&[])?;
    assert!(!ran.stdout.contains("sesame"), "{}", ran.stdout);
    for words in [
        "processor",
        "trainings compute in",
        "can be had of",
        "free on the disk of",
        "strategies   lora",
        "HF_TOKEN=(set, not shown)",
        "HTTPS_PROXY=http://…@proxy.school:3128",
        "HF_HUB_OFFLINE=1   1: nothing is downloaded",
        "nothing is downloaded, as HF_HUB_OFFLINE says so",
        "HOMEROOM_SHEEP is set, and means nothing to this version",
    ] {
        assert!(ran.stdout.contains(words), "no `{words}` in\n{}", ran.stdout);
    }
    let json = printed_json(&doctor(&["--json"])?)?;
    let problems = json["findings"].as_array().context("findings")?.iter().filter(|one| one["standing"] == "problem");
    // A machine that is nearly full has some, which is not this test's concern.
    let others: Vec<&Value> = problems
        .filter(|one| one["about"] != "home" && one["about"] != "hub cache" && one["about"] != "memory")
        .collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(!home.path().join("runs").exists(), "it changes nothing");
    Ok(())
}

#[test]
fn what_is_wrong_with_the_home_and_its_files_is_a_problem_with_what_to_do() -> Result<()> {
    let home = Home::new()?;
    home.0.write("home/handlers.toml", "[handlers.tutor]\nmodle = \"x\"\n")?;
    home.0.write("home/allowed-bases.txt", "not a name\n")?;
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755))?;
    let mut command = home.program(&["doctor", "--json"]);
    command.env("HOMEROOM_MEMORY", "sheep").env("HOMEROOM_PLUGINS", home.0.path("none"));
    command.env("HOMEROOM_CPU", "portable");
    let ran = run(&mut command)?;
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let found = printed_json(&ran)?;
    assert!(found["problems"].as_u64().is_some_and(|count| count >= 3), "{found:#}");
    for (about, words, standing, remedy) in [
        ("handlers", "handlers.toml", "problem", "`kind` is missing"),
        ("home", "others may look into it (mode 755)", "note", "chmod 700"),
        ("variables", "HOMEROOM_MEMORY=sheep", "problem", "a size such as 12GB"),
        ("variables", "HOMEROOM_PLUGINS=", "problem", "is not a directory"),
        ("processor", "HOMEROOM_CPU keeps it from", "note", "unset HOMEROOM_CPU"),
    ] {
        let one = finding(&found, about, words)?;
        assert_eq!(one["standing"], standing, "{one}");
        assert!(one["remedy"].as_str().is_some_and(|text| text.contains(remedy)), "{remedy}: {one}");
    }
    let ran = run(home.program(&["doctor", "--json"]).env("HOMEROOM_CPU", "abacus"))?;
    assert_eq!(ran.code, Some(1), "what ends other commands is a finding here");
    assert_eq!(finding(&printed_json(&ran)?, "variables", "HOMEROOM_CPU=abacus")?["standing"], "problem");
    Ok(())
}

#[test]
fn the_hub_is_asked_only_where_that_is_asked_for() -> Result<()> {
    let place = Place::new()?;
    let server = Server::of("a/b", hub::llama()?)?;
    let doctor = |more: &[&str]| {
        let mut command = hub::program(&server, &place, &["doctor", "--json"]);
        command.args(more).env("HOMEROOM_HOME", place.path("home"));
        printed_json(&run_of(&mut command)?)
    };
    finding(&doctor(&[])?, "hub", "it may be asked")?;
    assert_eq!(server.count(""), 0);
    finding(&doctor(&["--network"])?, "hub", "answers (status")?;
    assert_eq!(server.count(""), 1);
    let mut command = hub::program(&server, &place, &["doctor", "--network", "--json"]);
    // A port that nobody listens on.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HOMEROOM_HOME", place.path("home"));
    let ran = run(&mut command)?;
    assert_eq!(ran.code, Some(1));
    let unreached = printed_json(&ran)?;
    assert_eq!(finding(&unreached, "hub", "no connection to 127.0.0.1")?["standing"], "problem");
    Ok(())
}

/// Whoever has a card reads that this build computes on the processor, and trains all the same.
#[test]
fn a_card_is_told_of_in_a_word_and_crashes_nothing() -> Result<()> {
    let home = Home::new()?;
    let cause = "this build of the program computes on the processor; no CUDA and no other graphics processor is used";
    let (llama, steps) = (fixture("models/llama"), ["--max-steps", "2", "--save-minutes", "0"]);
    let mut command = home.program(&["fine-tune", "--training-file", "rows.jsonl", "--output-dir", "outputs/out"]);
    command.args(steps).arg("--model-name").arg(&llama).env("CUDA_VISIBLE_DEVICES", "0");
    let ran = succeeds(&mut command)?;
    assert!(ran.stderr.contains(&format!("note: CUDA_VISIBLE_DEVICES is set; {cause}")), "{}", ran.stderr);
    let found = printed_json(&run_of(home.program(&["doctor", "--json"]).env("CUDA_VISIBLE_DEVICES", "0"))?)?;
    let one = finding(&found, "graphics", "CUDA_VISIBLE_DEVICES is set")?;
    assert!(one["standing"] == "note" && one["what"].as_str().is_some_and(|what| what.contains(cause)), "{one}");
    // It is set so to keep programs from a card.
    let found = printed_json(&run_of(home.program(&["doctor", "--json"]).env("CUDA_VISIBLE_DEVICES", ""))?)?;
    assert!(finding(&found, "graphics", "CUDA_VISIBLE_DEVICES").is_err());
    for (command, flag) in
        [("fine-tune", "--device"), ("chat", "--device"), ("serve", "--n-gpu-layers"), ("eval", "--cuda")]
    {
        let ran = run(&mut home.program(&[command, flag, "cuda"]))?;
        assert_eq!(ran.code, Some(2), "{command}");
        let told: String = ran.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(told.contains(cause), "{command} {flag}: {}", ran.stderr);
    }
    Ok(())
}

#[test]
fn a_model_that_cannot_be_loaded_says_why_and_what_to_do() -> Result<()> {
    let home = Home::new()?;
    let copy = |name: &str| home.0.copy(&fixture("models/llama"), name);
    let cut = copy("cut")?;
    let weights = fs::read(cut.join("model.safetensors"))?;
    fs::write(cut.join("model.safetensors"), &weights[..weights.len() / 2])?;
    let (bare, mute, strange) = (copy("bare")?, copy("mute")?, copy("strange")?);
    fs::remove_file(bare.join("model.safetensors"))?;
    fs::remove_file(mute.join("tokenizer.json"))?;
    let config = fs::read_to_string(strange.join("config.json"))?;
    fs::write(strange.join("config.json"), config.replace("\"llama\"", "\"abacus\""))?;
    let damaged = "a file of the model is cut short, missing or damaged";
    for (model, error, cause, remedy) in [
        (cut, "not a whole safetensors file", damaged, "`homeroom pull NAME` completes and checks"),
        (bare, "neither model.safetensors nor", damaged, "`homeroom pull NAME`"),
        (mute, "tokenizer.json: cannot open", damaged, "`homeroom pull NAME`"),
        (strange, "this model cannot be run", "of a family that this program does not run", "the README's table"),
    ] {
        let ran = run(&mut home.fine_tune(&model, "9", &[]))?;
        assert_eq!(ran.code, Some(1));
        assert!(ran.stderr.contains(error), "{}", ran.stderr);
        let told = cause_and_remedy(&ran.stderr)?;
        assert!(told.0.contains(cause) && told.1.contains(remedy), "{told:?}");
    }
    Ok(())
}

/// A limit of file sizes stands for a disk that is full: the same calls fail.
#[test]
fn a_full_disk_is_told_when_it_happens_and_explained_afterwards() -> Result<()> {
    let home = Home::new()?;
    // A training that cannot be saved goes on; its result is larger than the limit.
    let command = home.fine_tune(&root().join("runtime/pocket/model"), "3", &["--lora-r", "192"]);
    let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let environment: Vec<_> =
        command.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
    let mut limited = Command::new("bash");
    limited.args(["-c", "ulimit -f 2000; exec \"$@\"", "bash"]).arg(command.get_program()).args(&words);
    for (name, value) in environment {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let ran = run(limited.current_dir(home.0.path("")))?;
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("warning: no checkpoint at step"), "{}", ran.stderr);
    let (cause, remedy) = cause_and_remedy(&ran.stderr)?;
    assert!(cause.starts_with("the disk that it writes to is full"), "{cause}");
    assert!(remedy.contains("make room"), "{remedy}");
    // Once for the checkpoints, once for the result.
    assert_eq!(ran.stderr.matches("\ncause: the disk that it writes to is full").count(), 2, "{}", ran.stderr);
    let explained = home.explained("out-1")?;
    assert_eq!((&explained["trouble"]["name"], &explained["status"]), (&json!("disk"), &json!("failed")));
    assert_eq!(explained["trouble"]["cause"], json!(cause));
    Ok(())
}

/// A base whose numbers overflow makes a loss that is none.
#[test]
fn a_training_whose_numbers_are_lost_is_explained() -> Result<()> {
    let home = Home::new()?;
    let ran = run(&mut home.fine_tune(&overflowing(&home.0)?, "9", &[]))?;
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let (cause, remedy) = cause_and_remedy(&ran.stderr)?;
    assert!(cause.contains("the learning rate is too high") && remedy.contains("a third of the learning rate"));
    assert_eq!(home.explained("out-1")?["trouble"]["name"], "diverged");
    Ok(())
}

/// `HOMEROOM_MEMORY` is a limit as a container has one.
#[test]
fn a_run_that_is_killed_is_explained_by_the_memory_that_it_had_left() -> Result<()> {
    let home = Home::new()?;
    let llama = fixture("models/llama");
    let killed = |command: &mut Command, run: &str| -> Result<()> {
        let mut running = Running::start(command)?;
        home.wait_for(&mut running, run, |event| event["event"] == "step" && event["step"] == 5)?;
        running.child.kill()?;
        ensure!(running.child.wait()?.code().is_none(), "it ended before it was killed");
        Ok(())
    };
    killed(&mut home.fine_tune(&llama, "400", &[]), "out-1")?;
    let other = home.explained("out-1")?;
    assert_eq!((&other["trouble"]["name"], &other["status"]), (&json!("killed"), &json!("killed")));
    assert_eq!(other["next"], "homeroom resume out-1");
    assert!(
        other["trouble"]["remedy"].as_str().is_some_and(|text| text.starts_with("`homeroom resume out-1` goes on"))
    );
    fs::remove_dir_all(home.path().join("runs"))?;
    killed(home.fine_tune(&llama, "400", &["--no-memory-check"]).env("HOMEROOM_MEMORY", "20MB"), "out-1")?;
    let short = home.explained("out-1")?;
    assert_eq!(short["trouble"]["name"], "killed-for-memory");
    let because = short["trouble"]["because"].as_str().unwrap_or_default();
    assert!(because.contains("of 400, without an end; it took "), "{because}");
    assert!(because.ends_with("0 B of 20.0 MB were left when it was last seen"), "{because}");
    Ok(())
}

/// A callback that does not return stands for a machine that swaps.
#[test]
fn a_run_that_stands_still_says_so_and_is_explained() -> Result<()> {
    let place = pipelines::Place::new()?;
    let script = "local data = homeroom.prepare_dataset { path = params.dataset }\n\
        homeroom.fine_tune {\n  model = homeroom.load_model { name = params.model }, dataset = data.train, max_steps = 9,\n\
        on_step = function(report)\n    if report.step == 3 then local start = os.clock() while os.clock() - start < 600 do end end\n  end,\n}\n";
    let mut command = place.command(&place.config(script)?);
    let mut running = Running::start(command.env("HOMEROOM_STALL_SECONDS", "0.5"))?;
    running.wait_for("note: in step 4 of 9 for")?;
    running.wait_for("cause: a step takes many times as long as those before")?;
    running.wait_for("remedy: look with `top`")?;
    running.child.kill()?;
    running.child.wait()?;
    let mut doctor = homeroom();
    let id = fs::read_dir(place.home().join("runs"))?.next().context("a run")??.file_name();
    doctor.arg("doctor").arg(&id).arg("--json").env("HOMEROOM_HOME", place.home());
    let explained = printed_json(&succeeds(&mut doctor)?)?;
    assert_eq!(explained["trouble"]["name"], "stuck", "{explained}");
    let because = explained["trouble"]["because"].as_str().unwrap_or_default();
    assert!(because.contains("after step 3 of 9, without an end; it was in step 4 of 9 for"), "{because}");
    Ok(())
}

#[test]
fn a_run_that_did_well_and_one_that_is_unknown_are_told_apart() -> Result<()> {
    let home = Home::new()?;
    succeeds(&mut home.fine_tune(&root().join("runtime/pocket/model"), "1", &[]))?;
    let ran = succeeds(&mut home.program(&["doctor", "out-1"]))?;
    assert!(ran.stdout.contains("it did all that it was asked for"), "{}", ran.stdout);
    let ran = run(&mut home.program(&["doctor", "out-7"]))?;
    assert!(ran.code == Some(1) && ran.stderr.contains("no such run"), "{}", ran.stderr);
    Ok(())
}
