//! Runs: what a training and a pipeline leave, how they are listed, shown and removed, and how two results are compared.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::pipelines;
use crate::support::{Place, fixture, homeroom, printed_json, refused, run, succeeds};

fn typed(place: &Place, words: &[&str]) -> Command {
    let mut command = homeroom();
    command.env("HOMEROOM_HOME", place.path("home")).args(words);
    command
}

fn at(place: &Place, path: &str) -> PathBuf {
    place.path("home/runs").join(path)
}

/// A run that looks as if it was run.
fn made(place: &Place, id: &str, status: &str, fields: &Value) -> Result<()> {
    let mut record = json!({"id": id, "kind": "fine-tune", "status": status, "started": "2026-11-29T16:31:04Z",
        "command": ["/opt/bin/homeroom", "fine-tune", "--training-file", "my rows.jsonl"], "cwd": "/", "settings": {}});
    let object = record.as_object_mut().context("an object")?;
    object.extend(fields.as_object().cloned().unwrap_or_default());
    place.write(&format!("home/runs/{id}/run.json"), record.to_string())?;
    Ok(())
}

fn listed(place: &Place) -> Result<Vec<(String, String)>> {
    let all = printed_json(&succeeds(&mut typed(place, &["runs", "list", "--json"]))?)?;
    let text = |run: &Value, key: &str| run[key].as_str().unwrap_or_default().to_owned();
    Ok(all.as_array().context("a list")?.iter().map(|run| (text(run, "id"), text(run, "status"))).collect())
}

fn train(place: &Place, name: &str, further: &[&str]) -> Result<()> {
    let mut command = typed(place, &["fine-tune", "--name", name, "--learning-rate", "1e-2"]);
    command.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.rows("rows.jsonl", 20)?);
    succeeds(command.args(further)).map(drop)
}

/// What a training leaves can be read without the program, and shows what it did.
#[test]
fn a_training_leaves_its_record_its_output_and_a_report() -> Result<()> {
    let place = Place::new()?;
    train(&place, "tutor", &["--max-steps", "6", "--eval-fraction", "0.25"])?;
    assert_eq!(listed(&place)?, [("tutor-1".to_owned(), "finished".to_owned())]);
    let read = |file: &str| fs::read_to_string(at(&place, "tutor-1").join(file)).with_context(|| file.to_owned());
    let record: Value = serde_json::from_str(&read("run.json")?)?;
    assert_eq!((&record["kind"], &record["status"]), (&json!("fine-tune"), &json!("finished")));
    assert!(record["machine"].as_str().is_some_and(|machine| machine.contains("threads")), "{record}");
    assert!(read("config.toml")?.parse::<toml::Table>()?.contains_key("training_file"));
    let output = read("output.txt")?;
    assert!(output.contains("step     6/6") && output.contains("saved     "), "{output}");
    assert!(!output.contains('\u{1b}'));
    let report = read("report.html")?;
    for word in
        ["<svg", "rows held out", "homeroom chat --model-dir tutor", "Answers before and after", "learning_rate"]
    {
        assert!(report.contains(word), "{word}");
    }
    assert!(
        fs::read_dir(at(&place, "tutor-1/trainings/1"))?
            .flatten()
            .any(|file| { file.file_name().to_string_lossy().starts_with("events.out.tfevents.") })
    );
    assert!(!at(&place, "tutor-1/trainings/1/checkpoints").exists());
    for entry in fs::read_dir(at(&place, "tutor-1"))? {
        let entry = entry?;
        let expected = if entry.path().is_dir() { 0o700 } else { 0o600 };
        assert_eq!(entry.metadata()?.permissions().mode() & 0o777, expected, "{:?}", entry.path());
    }

    let shown = succeeds(&mut typed(&place, &["runs", "show", "tutor-1"]))?.stdout;
    for word in ["status      finished", "6 of 6 steps done", "at best", "held-out", "homeroom chat --model-dir tutor"]
    {
        assert!(shown.contains(word), "{word}:\n{shown}");
    }
    let shown = printed_json(&succeeds(&mut typed(&place, &["runs", "show", "tutor-1", "--json"]))?)?;
    let training = &shown["trainings"][0];
    assert_eq!(training["steps"].as_array().map(Vec::len), Some(6));
    assert_eq!((&training["started"]["rows"], &training["started"]["eval_rows"]), (&json!(15), &json!(5)));
    let list = succeeds(&mut typed(&place, &["runs", "list"]))?.stdout;
    assert!(list.contains("tutor-1   finished") && list.contains("lora on llama with rows.jsonl"), "{list}");
    let [head, row] = list.lines().collect::<Vec<_>>()[..] else { panic!("{list}") };
    assert!(head.starts_with("run ") && head.contains("   model   result"), "{list}");
    // What came of it stands below its heading.
    let from = head.find("model").context("a column of models")?;
    assert!(row[from..].starts_with("tutor   loss ") && row.contains("→"), "{list}");

    // The page is made anew of the folder alone.
    fs::remove_file(at(&place, "tutor-1/report.html"))?;
    let printed = succeeds(&mut typed(&place, &["runs", "show", "tutor-1", "--report"]))?.stdout;
    assert_eq!(Path::new(printed.trim_end()), at(&place, "tutor-1/report.html"));
    assert_eq!(read("report.html")?, report);
    Ok(())
}

/// A training that its script ends says why, and the model that the script saved is the one to go on with.
#[test]
fn a_training_that_its_script_ends_is_not_ended_by_the_user() -> Result<()> {
    let place = pipelines::Place::new()?;
    let script = |callback: &str| {
        format!(
            "{}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, steps = 4, on_step = {callback} }}\nhomeroom.save_model {{ model = tuned, name = 'kept' }}\nreturn 1",
            pipelines::TRAIN
        )
    };
    place.result(&script("function(r) if r.step == 2 then return { stop = 'good enough' } end end"))?;
    place.error(&script("function(r) if r.step == 1 then error('no more') end end"))?;
    let run = |id: &str| place.home().join("runs").join(id);
    let events = |id: &str| fs::read_to_string(run(id).join("events.jsonl"));
    let (stopped, failed) = ("s-1", "s-2");
    for id in [stopped, failed] {
        assert!(!events(id)?.contains("\"interrupted\""), "{}", events(id)?);
    }
    assert!(fs::read_to_string(run(stopped).join("output.txt"))?.contains("stopped   good enough"));
    let report = fs::read_to_string(run(stopped).join("report.html"))?;
    assert!(report.contains("stopped before its planned end: good enough") && !report.contains("ended by the user"));
    assert!(report.contains("--model-dir kept"), "the name that it was saved under");
    let report = fs::read_to_string(run(failed).join("report.html"))?;
    assert!(report.contains("a callback failed: ") && !report.contains("--model-dir"));
    Ok(())
}

/// A script's run says which script, as it ran, and what it returned; one that fails says why.
#[test]
fn a_pipeline_leaves_its_script_and_its_result_or_its_error() -> Result<()> {
    let place = pipelines::Place::new()?;
    let script = format!(
        "{}local tuned = homeroom.fine_tune {{ model = model, dataset = data.train, eval = data.eval, steps = 2 }}\nprint('one \\27[31mred')\n",
        pipelines::TRAIN
    );
    place.result(&format!("{script}return {{ loss = tuned.metrics.eval_loss, name = 'x' }}"))?;
    // Another training: one that is looked up makes no run.
    place.error(&format!("{}error('no more')", script.replace("steps = 2", "steps = 3")))?;
    let run = |id: &str| place.home().join("runs").join(id);
    let read =
        |id: &str| -> Result<Value> { Ok(serde_json::from_str(&fs::read_to_string(run(id).join("run.json"))?)?) };
    let (first, second) = (read("s-1")?, read("s-2")?);
    assert_eq!(
        (&first["kind"], &first["status"], &first["result"]["name"]),
        (&json!("pipeline"), &json!("finished"), &json!("x"))
    );
    assert_eq!(second["status"], "failed");
    assert!(
        second["error"].as_str().is_some_and(|error| error.contains("s.lua:") && error.contains("no more")),
        "{second}"
    );
    assert!(fs::read_to_string(run("s-1").join("script.lua"))?.starts_with(&script));
    let output = fs::read_to_string(run("s-1").join("output.txt"))?;
    // What was printed before the run had a directory is there, too.
    assert!(output.starts_with("pipeline  ") && output.contains("one \\u{1b}[31mred\n"), "{output}");
    Ok(())
}

/// Whether a run lives is a lock that the system gives up with its process.
#[test]
fn a_run_whose_lock_is_held_is_running_and_one_that_only_says_so_was_killed() -> Result<()> {
    let place = Place::new()?;
    made(&place, "live-1", "running", &json!({}))?;
    made(&place, "dead-1", "running", &json!({"settings": {"strategy": "lora", "model_name": "a/b"}}))?;
    made(&place, "dead-2", "running", &json!({}))?;
    let steps: String = (1..=68)
        .map(|step| format!("{}\n", json!({"event": "step", "training": 1, "step": step, "loss": 2.5})))
        .collect();
    place.write(
        "home/runs/dead-1/events.jsonl",
        format!("{}\n{steps}{{\"event\": \"st", json!({"event": "started", "training": 1, "steps": 680})),
    )?;
    place.write("home/runs/dead-1/trainings/1/checkpoints/step-000060/state.json", "{}")?;
    let lock = File::create(at(&place, "live-1/lock"))?;
    lock.lock()?;
    let state = |id: &str| -> Result<String> {
        Ok(listed(&place)?.into_iter().find(|(other, _)| other == id).context("it is listed")?.1)
    };
    assert_eq!([state("live-1")?, state("dead-1")?], ["running", "killed"]);
    refused(&mut typed(&place, &["runs", "rm", "live-1"]), &["run live-1: a process works on it"])?;
    let list = succeeds(&mut typed(&place, &["runs", "list"]))?;
    assert!(list.stdout.contains("step 68 of 680, loss 2.500"), "{}", list.stdout);
    assert!(
        list.stderr.contains("dead-1 was ended early and can go on: `homeroom resume dead-1`")
            || list.stderr.contains("homeroom resume dead-1"),
        "{}",
        list.stderr
    );
    let next = |id: &str| -> Result<String> {
        let shown = printed_json(&succeeds(&mut typed(&place, &["runs", "show", id, "--json"]))?)?;
        Ok(shown["next"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(next("dead-1")?, "homeroom resume dead-1");
    // Nothing of this one was saved: its command is what there is.
    assert!(
        next("dead-2")?.ends_with("homeroom fine-tune --training-file 'my rows.jsonl' starts it anew"),
        "{}",
        next("dead-2")?
    );
    let page = succeeds(&mut typed(&place, &["runs", "show", "dead-1", "--report"]))?.stdout;
    let page = fs::read_to_string(page.trim_end())?;
    assert!(page.contains(">killed<") && page.contains("68 of 680 steps") && page.contains("homeroom resume dead-1"));

    let dry = succeeds(&mut typed(&place, &["runs", "rm", "dead-1", "--dry-run"]))?;
    assert!(dry.stderr.contains("its checkpoints, the last of step 60"), "{}", dry.stderr);
    assert!(at(&place, "dead-1").exists());
    drop(lock);
    assert_eq!(state("live-1")?, "killed");
    let removed = printed_json(&succeeds(&mut typed(&place, &["runs", "rm", "dead-1", "live-1", "--json"]))?)?;
    assert_eq!(removed[0]["lost"]["checkpoint"], 60);
    assert_eq!(listed(&place)?, [("dead-2".to_owned(), "killed".to_owned())]);
    refused(
        &mut typed(&place, &["runs", "show", "dead-3"]),
        &["dead-3: no such run, did you mean `dead-2`?", "homeroom runs list"],
    )
}

/// What a script trained and nobody saved is lost with its run; what a handler answers with is not removed by chance.
#[test]
fn a_run_whose_adapter_a_handler_names_is_not_removed_without_force() -> Result<()> {
    let place = Place::new()?;
    made(&place, "geo-1", "finished", &json!({"kind": "pipeline"}))?;
    place.write("home/runs/geo-1/adapters/1/homeroom.json", "{}")?;
    let model = at(&place, "geo-1/adapters/1");
    place.write("home/handlers.toml", format!("[handlers.geo]\nkind = \"local\"\nmodel = {model:?}\n"))?;
    let words = ["run geo-1: what it trained is named by handlers.toml; nothing is removed", "--force"];
    refused(&mut typed(&place, &["runs", "rm", "geo-1"]), &words)?;
    let ran = succeeds(&mut typed(&place, &["runs", "rm", "geo-1", "--force"]))?;
    assert!(ran.stderr.contains("was saved nowhere else: geo-1/1"), "{}", ran.stderr);
    ensure!(!at(&place, "geo-1").exists());
    Ok(())
}

/// A home does not grow for ever, and what is taken from it is said.
#[test]
fn a_new_run_takes_the_place_of_the_oldest_of_many() -> Result<()> {
    let place = Place::new()?;
    for number in 1..=51 {
        let started = format!("2026-10-{:02}T00:00:{:02}Z", 1 + number / 30, number % 30);
        made(&place, &format!("old-{number}"), "finished", &json!({"started": started}))?;
    }
    let mut command = typed(&place, &["fine-tune", "--name", "tutor", "--max-steps", "1"]);
    command.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.rows("rows.jsonl", 5)?);
    let ran = succeeds(&mut command)?;
    assert!(ran.stderr.contains("removed   run old-1, ") && !ran.stderr.contains("run old-2,"), "{}", ran.stderr);
    assert!(ran.stderr.contains("50 runs are kept, of 10.0 GB at most"), "{}", ran.stderr);
    let left = listed(&place)?;
    assert_eq!((left.len(), left[0].0.as_str(), left[50].0.as_str()), (51, "old-2", "tutor-1"));
    Ok(())
}

fn compared(place: &Place, a: &Path, b: &Path, rows: &Path, further: &[&str]) -> Command {
    let mut command = typed(place, &["compare"]);
    command.arg(a).arg(b).arg("--file").arg(rows).args(further);
    command
}

/// The numbers of `compare` are those of `eval`, and a training that helped is told from one that did not.
#[test]
fn a_trained_model_is_better_than_its_base_by_more_than_chance_and_none_than_itself() -> Result<()> {
    let place = Place::new()?;
    train(&place, "tutor", &["--max-steps", "30"])?;
    let rows = place.rows("held.jsonl", 12)?;
    let (base, tutor) = (fixture("models/llama"), PathBuf::from("tutor"));
    let both = printed_json(&succeeds(&mut compared(&place, &base, &tutor, &rows, &["--json", "--samples", "2"]))?)?;
    for (side, name) in [("a", base.display().to_string()), ("b", "tutor".to_owned())] {
        let alone =
            printed_json(&succeeds(typed(&place, &["eval", "--json", "--model-dir", &name, "--file"]).arg(&rows))?)?;
        for key in ["loss", "perplexity", "token_accuracy", "trained_tokens"] {
            assert_eq!(both[side][key], alone[key], "{side} {key}");
        }
    }
    let number = |at: &str| both.pointer(at).and_then(Value::as_f64).with_context(|| format!("{at}: {both}"));
    let fall = number("/b/loss")? - number("/a/loss")?;
    assert!(fall < 0.0 && (number("/difference/nats")? - fall).abs() < 1e-9);
    assert!(number("/difference/low")? <= fall && fall <= number("/difference/high")?);
    // All of twelve rows are better: 2 of 2^12 signs.
    assert_eq!((&both["difference"]["better"], &both["difference"]["per"]), (&json!(12), &json!("token")));
    assert!((number("/difference/p")? - 2.0 / 4096.0).abs() < 1e-12);
    // The mean over rows by their tokens is the loss.
    let of_rows = both["by_row"].as_array().context("rows")?;
    assert_eq!(of_rows.len(), 12);
    assert!(of_rows.windows(2).all(|pair| pair[0]["difference"].as_f64() <= pair[1]["difference"].as_f64()));
    assert_eq!(both["samples"].as_array().map(Vec::len), Some(2));
    assert!(both["samples"][0]["expected"].as_str().is_some_and(|text| text.contains("is what you get")), "{both}");

    let words = succeeds(&mut compared(&place, &base, &tutor, &rows, &[]))?.stdout;
    for word in [
        "loss",
        "nats a token",
        "verdict     tutor is better on such rows, by more than chance",
        "better by most",
        "expected",
    ] {
        assert!(words.contains(word), "{word}:\n{words}");
    }
    let itself = succeeds(&mut compared(&place, &tutor, &tutor, &rows, &["--samples", "0"]))?.stdout;
    assert!(
        itself.contains("difference  +0.0000 nats a token")
            && itself.contains("no difference beyond chance (p = 1.000)"),
        "{itself}"
    );
    assert!(itself.contains("worse on 0, the same on 12"), "{itself}");
    Ok(())
}

/// What is wrong with the second model is said before the first is measured.
#[test]
fn a_model_that_is_not_there_is_refused_before_anything_is_measured() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("held.jsonl", 3)?;
    let base = fixture("models/llama");
    refused(&mut compared(&place, &base, Path::new("nobody"), &rows, &[]), &["nobody"])?;
    refused(&mut compared(&place, &base, &base, Path::new("nowhere.jsonl"), &[]), &["nowhere.jsonl"])?;
    let ran = run(&mut compared(&place, &base, &base, &rows, &["--max-seq-len", "3"]))?;
    assert!(ran.code == Some(1) && ran.stderr.contains("line"), "{}", ran.stderr);
    Ok(())
}
