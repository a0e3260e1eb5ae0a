//! What people type who come from other programs, are in a hurry, or are wrong by a letter.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Running, leaves_nothing};
use crate::support::{Place, eval, fixture, homeroom, printed_json, refused, run, succeeds};

/// `fine-tune` of the tiny model, with neither a directory nor a name, in a home and a working directory of the test's own.
fn unnamed(place: &Place, rows: &Path) -> Command {
    unnamed_of(place, rows, "1")
}

/// The same of so many steps.
fn unnamed_of(place: &Place, rows: &Path, steps: &str) -> Command {
    let mut command = homeroom();
    command.args(["fine-tune", "--max-steps", steps, "--model-name"]).arg(fixture("models/llama"));
    command
        .arg("--training-file")
        .arg(rows)
        .env("HOMEROOM_HOME", place.path("home"))
        .current_dir(place.path("outputs"));
    command
}

#[test]
fn a_training_without_a_name_gets_one_that_no_model_has() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("Zwölf Zeilen.v2.jsonl", 3)?;
    for name in ["zw-lf-zeilen.v2", "zw-lf-zeilen.v2-2", "zw-lf-zeilen.v2-3"] {
        let ran = succeeds(unnamed(&place, &rows).arg("--json"))?;
        assert!(ran.stderr.contains(&format!("name      {name}   --name or --output-dir")), "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!("homeroom chat --model-dir {name} --prompt")), "{}", ran.stderr);
        assert_eq!(printed_json(&ran)?["output_dir"], json!(place.path("home/models").join(name)));
    }
    // A file whose name has no letter that a model's may have: the model's name.
    let ran = succeeds(&mut unnamed(&place, &place.rows("练习.jsonl", 3)?))?;
    assert!(ran.stderr.contains("name      llama   "), "{}", ran.stderr);
    // What was not named is not replaced either.
    let ran = run(unnamed(&place, &rows).arg("--overwrite"))?;
    assert!(ran.code == Some(2) && ran.stderr.contains("--name"), "{}", ran.stderr);
    leaves_nothing(&place)
}

/// What lies in the working directory wins over a model of its name, so a name that is chosen is none of those.
#[test]
fn a_name_that_the_working_directory_has_is_not_chosen_and_is_told_where_given() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("lehrer.jsonl", 3)?;
    place.copy(&fixture("models/llama"), "outputs/lehrer")?;
    std::os::unix::fs::symlink("nirgends", place.path("outputs/lehrer-2"))?;
    let ran = succeeds(&mut unnamed(&place, &rows))?;
    assert!(ran.stderr.contains("name      lehrer-3   --name") && !ran.stderr.contains("note: "), "{}", ran.stderr);
    let named = place.path("home/models/lehrer");
    let note = format!("note: `lehrer` means ./lehrer here; the model of that name is {}", named.display());
    let ran = succeeds(unnamed(&place, &rows).args(["--name", "lehrer"]))?;
    assert!(ran.stderr.contains(&note), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("chat --model-dir {} ", named.display())), "{}", ran.stderr);
    let mut bare = eval(Path::new("lehrer"), &rows);
    let ran = succeeds(bare.env("HOMEROOM_HOME", place.path("home")).current_dir(place.path("outputs")))?;
    assert_eq!(ran.stderr.matches(&note).count(), 1, "{}", ran.stderr);
    Ok(())
}

/// Several at once choose the same name, and none is for nothing.
#[test]
fn trainings_without_a_name_that_run_at_once_are_saved_under_names_of_their_own() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("reihen.jsonl", 8)?;
    let start = || Running::start(unnamed_of(&place, &rows, "1000000").args(["--learning-rate", "1e-4", "--json"]));
    let mut running = [start()?, start()?, start()?];
    for run in &mut running {
        run.wait_for("name      reihen   ")?;
        run.wait_for("step ")?;
    }
    running.iter().try_for_each(|run| run.signal(libc::SIGINT))?;
    let (mut saved, mut moved) = (Vec::new(), 0);
    for run in running {
        let (code, stdout, stderr) = run.end()?;
        ensure!(code == Some(130), "{code:?} {stderr}");
        let printed: Value = serde_json::from_str(&stdout)?;
        saved.push(printed["output_dir"].as_str().context("a path")?.to_owned());
        moved += stderr.matches("as reihen was taken meanwhile").count()
            + stderr.matches(&format!("as {} was taken meanwhile", place.path("home/models/reihen").display())).count();
    }
    saved.sort();
    let at = |name: &str| place.path("home/models").join(name).display().to_string();
    assert_eq!((saved, moved), (["reihen", "reihen-2", "reihen-3"].map(at).to_vec(), 2));
    Ok(())
}

#[test]
fn a_training_of_few_steps_is_told_to_teach_little() -> Result<()> {
    let place = Place::new()?;
    let train = |rows: usize, more: &[&str]| -> Result<String> {
        let mut command = homeroom();
        command.args(["fine-tune", "--model-name"]).arg(fixture("models/llama")).args(more);
        command.arg("--training-file").arg(place.rows("rows.jsonl", rows)?);
        Ok(succeeds(command.env("HOMEROOM_HOME", place.path("home")))?.stderr)
    };
    // What is left open is chosen so that it teaches.
    let open = train(17, &[])?;
    assert!(open.contains("note: batches of 2 and 10 epochs chosen, as 17 rows teach little in fewer steps"), "{open}");
    assert!(open.contains("training  90 steps of 1 x 2 examples") && !open.contains("teach a model little"), "{open}");
    let few = train(3, &["--epochs", "2"])?;
    assert!(few.contains("note: 2 steps teach a model little; more rows or epochs do more"), "{few}");
    // Who says how many steps, or says so many epochs, knows.
    for more in [["--max-steps", "1"], ["--epochs", "10"]] {
        let said = train(17, &more)?;
        assert!(!said.contains("teach a model little"), "{said}");
    }
    Ok(())
}

#[test]
fn an_export_needs_a_model_only() -> Result<()> {
    let place = Place::new()?;
    succeeds(unnamed(&place, &place.rows("rows.jsonl", 3)?).args(["--name", "tutor"]))?;
    let export = |model: &Path| {
        let mut command = homeroom();
        command.args(["export-model", "--json", "--model-dir"]).arg(model);
        command.env("HOMEROOM_HOME", place.path("home")).current_dir(place.path("outputs"));
        command
    };
    let ran = succeeds(&mut export(Path::new("tutor")))?;
    assert!(ran.stderr.contains("export    merged, to tutor-merged   --output-dir"), "{}", ran.stderr);
    assert!(place.path("outputs/tutor-merged/config.json").exists());
    fs::write(place.path("outputs/tutor-merged/config.json"), "mine")?;
    refused(&mut export(Path::new("tutor")), &["tutor-merged: the directory is not empty", "--overwrite"])?;
    // Of one that is not there, nothing is promised.
    let ran = run(&mut export(Path::new("niemand")))?;
    assert!(ran.code == Some(1) && ran.stderr.starts_with("error: niemand: no such model"), "{}", ran.stderr);
    assert_eq!(fs::read_to_string(place.path("outputs/tutor-merged/config.json"))?, "mine");
    // A path gives the name of what it leads to, into the working directory.
    fs::rename(place.path("home/models/tutor"), place.path("Tutor 2"))?;
    succeeds(&mut export(&place.path("Tutor 2")))?;
    fs::remove_dir_all(place.path("outputs/tutor-merged"))?;
    assert_eq!(place.outputs()?, ["Tutor 2-merged"]);
    succeeds(export(Path::new(".")).current_dir(place.path("Tutor 2")))?;
    assert!(place.path("Tutor 2/Tutor 2-merged/config.json").exists());
    Ok(())
}

#[test]
fn a_benchmark_takes_a_model_by_the_flag_of_the_others() -> Result<()> {
    let place = Place::new()?;
    succeeds(unnamed(&place, &place.rows("rows.jsonl", 3)?).args(["--name", "tutor"]))?;
    for (flag, model) in [("--model-name", fixture("models/llama")), ("--model-dir", "tutor".into())] {
        for what in [["prefill", "--tokens", "9", "--runs", "1"], ["decode", "--tokens", "3", "--prompt", "5"]] {
            let mut bench = homeroom();
            bench.arg("bench").args(what).arg("--json").arg(flag).arg(&model).env("HOMEROOM_HOME", place.path("home"));
            let speed = printed_json(&succeeds(&mut bench)?)?["tokens_per_second"].as_f64();
            assert!(speed.is_some_and(|speed| speed > 0.0), "{what:?} {flag}");
        }
    }
    Ok(())
}

/// Runs a command line that is wrong, and finds words in what is said.
fn wrong(line: &str, words: &[&str]) -> Result<()> {
    let ran = run(homeroom().args(line.split(' ')))?;
    ensure!(ran.code == Some(2) && ran.stdout.is_empty(), "{line}: {ran:?}");
    for word in words {
        ensure!(ran.stderr.contains(word), "{line}: no `{word}` in\n{}", ran.stderr);
    }
    Ok(())
}

#[test]
fn flags_of_other_programs_are_answered_with_the_flag_here() -> Result<()> {
    for (line, tip) in [
        ("fine-tune --lr 1e-4", "tip: '--lr' is '--learning-rate' here"),
        ("fine-tune --num-train-epochs 3", "tip: '--num-train-epochs' is '--epochs' here"),
        ("fine-tune --num_train_epochs=3", "tip: '--num_train_epochs' is '--epochs' here"),
        ("fine-tune --load-in-4bit", "tip: '--load-in-4bit' is '--strategy qlora' here"),
        ("fine-tune --load_in_4bit true", "is '--strategy qlora' here"),
        ("fine-tune --load_in_8bit", "is '--strategy int8' here"),
        ("fine-tune --per_device_train_batch_size 4", "is '--batch-size' here"),
        ("fine-tune --lora-rank 8", "is '--lora-r' here"),
        ("fine-tune --model M", "is '--model-name' here"),
        ("chat --model M", "is '--model-dir' here"),
        ("fine-tune --model_name_or_path M", "is '--model-name' here"),
        ("eval --dataset F", "is '--file' here"),
        ("fine-tune --data F", "is '--training-file' here"),
        ("fine-tune --output_dir D", "tip: '--output_dir' is '--output-dir' here"),
        ("export-model --output_dir D", "is '--output-dir' here"),
        ("chat --max_new_tokens 5", "is '--max-tokens' here"),
        ("fine-tune rows.jsonl", "--training-file rows.jsonl"),
        ("chat tutor", "--model-dir tutor"),
        ("fine-tune --gradient-checkpointing true", "'--gradient-checkpointing' takes no value: leave out 'true'"),
        ("fine-tune --target-modules q_proj v_proj", "by commas: --target-modules q_proj,v_proj"),
        ("train --lr 1", "tip: 'train' is 'fine-tune' here"),
        ("fine_tune", "tip: 'fine_tune' is 'fine-tune' here"),
        ("ls", "tip: 'ls' is 'list-models' here"),
        ("fine-tune --packing", "tip: '--packing': packing is the default, --no-packing turns it off"),
        ("fine-tune --no-gradient-checkpointing", "it is off unless --gradient-checkpointing is given"),
        ("fine-tune --eval_strategy steps", "the loss on --eval-file is measured before and after"),
        ("fine-tune --logging-steps 10", "there is no such flag: the loss of each step is in trainer_state.json"),
        ("fine-tune --warmup-steps 10", "--warmup-ratio is a share of the steps"),
        ("fine-tune --resume-from-checkpoint x", "--resume goes on from the last checkpoint"),
        ("fine-tune --save-total-limit 2", "the last, the best and two to go back to are kept"),
        ("chat --stream", "a reply is printed as it comes already"),
        ("fine-tune --load-in-4-bit", "is '--strategy qlora' here"),
        ("fine-tune --fp16", "is '--compute bf16' here"),
        ("fine-tune --bf16 true", "is '--compute bf16' here"),
        ("eval --training-file F", "'--training-file' is '--file' here"),
        ("run c.toml --model größe", "set a parameter of the pipeline by --set model=größe"),
        ("run c.toml --lora_r=4 --check", "by --set lora_r=4"),
        ("run c.toml --fast --check", "by --set fast=VALUE"),
        ("run c.toml epochs=2", "by --set epochs=2"),
        // Where nothing is known, clap's own.
        ("run c.toml --dry-rn", "a similar argument exists: '--dry-run'"),
        ("fine-tune --learning-rat 1", "a similar argument exists: '--learning-rate'"),
    ] {
        wrong(line, &[tip])?;
    }
    // The usage is the command's, and not that of a flag which is spelled alike.
    wrong(
        "fine-tune --lr 1e-4",
        &["Usage: homeroom fine-tune [OPTIONS] --model-name <MODEL> --training-file <FILE>...\n"],
    )
}

#[test]
fn methods_that_are_options_of_a_strategy_are_answered_with_the_option() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for (name, option) in [("dora", "use_dora"), ("DoRA", "use_dora"), ("rslora", "use_rslora")] {
        let words = [&format!("--strategy lora --set-option {option}=true") as &str];
        refused(place.fine_tune(&fixture("models/llama"), &rows).args(["--strategy", name]), &words)?;
    }
    Ok(())
}

#[test]
fn a_script_is_answered_with_the_file_that_declares_it() -> Result<()> {
    let place = Place::new()?;
    place.write("scripts/größe.lua", "return nil")?;
    place.write("configs/a.toml", "[pipeline]\nscript = \"../scripts/other.lua\"\n")?;
    place.write("configs/b.toml", "[pipeline]\nscript = \"../scripts/größe.lua\"\n")?;
    let mut run = homeroom();
    run.current_dir(place.path("")).args(["run", "scripts/größe.lua"]);
    refused(&mut run, &["a script, which is run by the TOML file", "homeroom run scripts/../configs/b.toml"])?;
    std::fs::remove_file(place.path("configs/b.toml"))?;
    refused(&mut run, &["`homeroom run CONFIG.toml`"])
}

#[test]
fn an_adapter_cannot_be_measured_in_training_and_the_hint_is_one_that_the_command_takes() -> Result<()> {
    let place = Place::new()?;
    succeeds(place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 2)?).args(["--max-steps", "1"]))?;
    let mut bench = homeroom();
    bench.args(["bench", "train", "--model-name"]).arg(place.path("outputs/out"));
    let ran = run(&mut bench)?;
    ensure!(ran.code == Some(1) && ran.stderr.contains("measures the training of one like it"), "{ran:?}");
    ensure!(!ran.stderr.contains("--init-from"), "{ran:?}");
    Ok(())
}

#[test]
fn a_number_below_zero_is_a_value_and_the_message_says_what_it_should_be() -> Result<()> {
    for (line, flag, words) in [
        ("chat --temperature -1", "--temperature", "it should be a number from 0"),
        ("chat --temperature -0,5", "--temperature", "it should be a number from 0"),
        ("chat --max-tokens -5", "--max-tokens", "it should be a whole number from 1"),
        ("chat --seed 1.5", "--seed", "it should be a whole number"),
        ("fine-tune --seed 1.5", "--seed", "it should be a whole number from 0"),
        ("fine-tune --seed -1", "--seed", "it should be a whole number from 0"),
        ("fine-tune --epochs -1", "--epochs", "it should be a whole number from 1"),
        ("fine-tune --epochs 0.5", "--epochs", "it should be a whole number from 1"),
        ("fine-tune --lora-dropout -0.1", "--lora-dropout", "it should be a number from 0 and below 1"),
        ("fine-tune --learning-rate -2e-4", "--learning-rate", "it should be a number above 0"),
        ("fine-tune --max-grad-norm -inf", "--max-grad-norm", "it should be a number from 0"),
        ("fine-tune --batch-size 4294967296", "--batch-size", "it should be at most 4294967295"),
        ("bench decode --chats 65", "--chats", "it should be at most 64"),
        ("bench decode --chats -1", "--chats", "it should be a whole number from 1 to 64"),
        ("serve --port -80", "--port", "it should be a whole number from 0 to 65535"),
        ("eval --max-seq-len -1", "--max-seq-len", "it should be a whole number from 2"),
    ] {
        wrong(line, &[flag, words])?;
    }
    // Below zero where that is allowed, and a text that begins with a hyphen.
    let mut chat = homeroom();
    chat.args(["chat", "--seed", "-3", "--prompt", "- a list", "--system", "-1", "--max-tokens", "2", "--model-name"]);
    succeeds(chat.arg(fixture("models/llama")))?;
    Ok(())
}

#[test]
fn an_adapter_is_no_base_model_and_can_be_trained_further() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    succeeds(unnamed(&place, &rows).args(["--name", "tutor", "--lora-r", "8"]))?;
    let base = fixture("models/llama").display().to_string();
    let mut on_it = homeroom();
    on_it.args(["fine-tune", "--name", "next", "--model-name", "tutor", "--training-file"]).arg(&rows);
    let hint = format!("`--model-name {base} --init-from tutor` trains it further");
    let words = ["tutor: an adapter on ", &base, "not a base model", &hint];
    refused(on_it.env("HOMEROOM_HOME", place.path("home")), &words)?;
    let mut bench = homeroom();
    bench.args(["bench", "train", "--model-name", "tutor"]);
    refused(bench.env("HOMEROOM_HOME", place.path("home")), &words[..3])?;
    // Of another rank, it says so and no shapes.
    let on = |options: &[&str]| {
        let mut command = unnamed(&place, &rows);
        command.args(["--name", "next", "--init-from", "tutor"]).args(options);
        command
    };
    refused(&mut on(&[]), &["cannot start from it: it has r 8, this run asks for 16"])?;
    let targets = ["--lora-r", "8", "--target-modules", "q_proj"];
    refused(&mut on(&targets), &["it has target_modules ", "this run asks for [\"q_proj\"]"])?;
    let ran = run(&mut on(&targets))?;
    assert!(!ran.stderr.contains("lora_A"), "{}", ran.stderr);
    succeeds(&mut on(&["--lora-r", "8"]))?;
    // And a base model is no adapter.
    let mut from_base = unnamed(&place, &rows);
    let hint = format!("hint: a model is trained further with `--model-name {base}` alone");
    refused(from_base.args(["--init-from", &base]), &["not an adapter", &hint])
}

#[test]
fn names_and_files_that_are_wrong_by_a_letter_get_the_nearest() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("zeilen.jsonl", 3)?;
    succeeds(unnamed(&place, &rows).args(["--name", "tutor"]))?;
    let at_home = |mut command: Command| {
        command.env("HOMEROOM_HOME", place.path("home"));
        command
    };
    let near_rows = format!("did you mean `{}`?", rows.display());
    refused(&mut at_home(eval(Path::new("tutro"), &rows)), &["tutro: no such model, did you mean `tutor`?"])?;
    let base = place.copy(&fixture("models/llama"), "grundmodell")?;
    refused(&mut eval(&place.path("grundmodel"), &rows), &["did you mean `", "grundmodell`?"])?;
    refused(&mut eval(&base, &place.path("zeilne.jsonl")), &["no such file", &near_rows])?;
    refused(&mut place.fine_tune(&base, &place.path("zeile.jsonl")), &["no such file", &near_rows])?;
    refused(place.fine_tune(&base, &rows).arg("--eval-file").arg(place.path("zeilen.json")), &[&near_rows])?;
    let mut further = unnamed(&place, &rows);
    refused(further.args(["--init-from", "tutr"]), &["tutr: no such model, did you mean `tutor`?"])?;
    for strategy in ["LoRA", "lroa"] {
        refused(place.fine_tune(&base, &rows).args(["--strategy", strategy]), &["did you mean `lora`?"])?;
    }
    refused(place.fine_tune(&base, &rows).args(["--strategy", "QLoRA"]), &["did you mean `qlora`?"])?;
    let config = place.write("lauf.toml", "[pipeline]\nscript = \"s.lua\"\n")?;
    let near_config = format!("did you mean `{}`?", config.display());
    refused(homeroom().arg("run").arg(place.path("lauf.tml")), &["no such file", &near_config])?;
    refused(homeroom().args(["serve", "--port", "0", "--config"]).arg(place.path("laut.toml")), &[&near_config])?;
    // Neither is a thing near itself, nor all of a letter near all of another.
    std::os::unix::fs::symlink("kreis.jsonl", place.path("kreis.jsonl"))?;
    place.write("b", "")?;
    let ran = run(place.fine_tune(&base, Path::new("kreis.jsonl")).current_dir(place.path("")))?;
    let told =
        ran.stderr.contains("kreis.jsonl: a link that leads back to itself") && !ran.stderr.contains("did you mean");
    assert!(ran.code == Some(1) && told, "{}", ran.stderr);
    std::os::unix::fs::symlink("kreis", place.path("kreis"))?;
    refused(&mut eval(&place.path("kreis"), &rows), &["kreis: a link that leads back to itself"])?;
    // What is near nothing gets no such words.
    let ran = run(&mut eval(&base, &place.path("quite-another.txt")))?;
    assert!(ran.code == Some(1) && !ran.stderr.contains("did you mean"), "{}", ran.stderr);
    leaves_nothing(&place)
}

#[test]
fn a_chat_without_a_handler_takes_the_only_one_or_lists_them() -> Result<()> {
    let place = Place::new()?;
    let handler = |name: &str| format!("[handlers.{name}]\nkind = \"local\"\nmodel = {:?}\n", fixture("models/llama"));
    let chat = |more: &[&str]| {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", "hi", "--max-tokens", "3", "--temperature", "0"]).args(more);
        chat.env("HOMEROOM_HOME", place.path("home"));
        chat
    };
    refused(&mut chat(&[]), &["name a model with --model-dir", "handlers.toml in $HOMEROOM_HOME"])?;
    refused(&mut chat(&["--handler", "x"]), &["name a model with --model-dir", "--config FILE --handler NAME"])?;
    let mut serve = homeroom();
    serve.args(["serve", "--port", "0"]).env("HOMEROOM_HOME", place.path("home"));
    refused(&mut serve, &["nothing to serve", "--model-dir", "--config", "handlers.toml in $HOMEROOM_HOME"])?;

    let one = place.write("one.toml", handler("near"))?;
    let answer = succeeds(&mut chat(&["--config", &one.display().to_string()]))?.stdout;
    let two = place.write("two.toml", handler("near") + &handler("far"))?;
    let two = two.display().to_string();
    refused(&mut chat(&["--config", &two]), &["two.toml: name one of its handlers with --handler: far, near"])?;
    assert_eq!(succeeds(&mut chat(&["--config", &two, "--handler", "far"]))?.stdout, answer);
    // Where there is one route, that is what the file is for.
    let route = handler("near") + &handler("far") + "[routes.tutor]\nhandlers = [\"far\", \"near\"]\n";
    let home = place.write("home/handlers.toml", &route)?;
    let ran = succeeds(&mut chat(&[]))?;
    assert!(ran.stdout == answer && ran.stderr.contains(&format!("handlers  {}", home.display())), "{}", ran.stderr);
    assert_eq!(succeeds(&mut chat(&["--handler", "near"]))?.stdout, answer);
    let mut serving = super::Running::start(&mut serve)?;
    serving.wait_for(&format!("handlers {}", home.display()))?;
    serving.wait_for("model    tutor")?;
    serving.wait_for("serving ")?;
    serving.signal(libc::SIGINT)?;
    assert_eq!(serving.end()?.0, Some(0));
    Ok(())
}

/// Usage lines say what may be left out.
#[test]
fn usage_shows_alternatives_as_such() -> Result<()> {
    for (command, lines) in [
        ("chat", ["homeroom chat --model-dir <MODEL> [OPTIONS]", "homeroom chat [--config <FILE>] [--handler <NAME>]"]),
        ("serve", ["homeroom serve --model-dir <MODEL> [OPTIONS]", "homeroom serve [--config <FILE>] [OPTIONS]"]),
    ] {
        let help = succeeds(homeroom().args([command, "--help"]))?.stdout;
        let usage = help.split("Options:").next().context("a usage")?;
        assert!(lines.iter().all(|line| usage.contains(line)), "{usage}");
    }
    Ok(())
}
