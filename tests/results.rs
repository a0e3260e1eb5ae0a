//! Results are looked at before they replace anything: numbers that overflow, runs that end badly, bases that shrink, full disks.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use homeroom::handler::local::Local;
use homeroom::handler::{Context, Handler, Message, Request, Role};
use homeroom::models::{Answerer, Loaded, ModelRef, Network};
use homeroom_engine::adapt::adapter::{AdapterFiles, serialize_f32};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{TrainConfig, planned_steps};
use serde_json::{Value, json};

use crate::command_line::{Running, check_model, endless_on, leaves_nothing, patched_gguf, read_json};
use crate::reload::variant;
use crate::support::{Place, Values, eval, fixture, homeroom, loss, printed_json, refused, run, succeeds, tensors};

/// A copy of a fixture with some of its tensors changed.
fn changed(place: &Place, name: &str, change: impl Fn(&str, &mut Values)) -> Result<PathBuf> {
    let copy = place.copy(&fixture("models/llama"), name)?;
    let path = copy.join("model.safetensors");
    let stored = tensors(&path)?.into_iter().map(|(name, mut tensor)| {
        change(&name, &mut tensor);
        let (shape, values) = tensor;
        (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    });
    fs::write(&path, serialize_f32(&stored.collect::<Vec<_>>())?)?;
    Ok(copy)
}

/// A model whose answers are no numbers.
pub fn overflowing(place: &Place) -> Result<PathBuf> {
    changed(place, "overflowing", |name, (_, values)| {
        if name == "model.norm.weight" {
            values.fill(f32::MAX);
        }
    })
}

fn files(directory: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        files.push((path.file_name().context("a name")?.to_string_lossy().into_owned(), fs::read(&path)?));
    }
    files.sort();
    Ok(files)
}

// --- numbers at the edges --------------------------------------------------------------------------------------------

#[test]
fn a_run_of_no_step_or_of_too_many_is_refused() -> Result<()> {
    let steps = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = TrainConfig::default();
        change(&mut config);
        planned_steps(20, &config).map_err(|error| format!("{error:#}"))
    };
    assert_eq!(steps(&|_| {}), Ok(3));
    assert_eq!(steps(&|config| config.epochs = 7), Ok(21));
    assert_eq!(steps(&|config| config.batch_size = usize::MAX), Ok(1));
    assert_eq!(steps(&|config| (config.epochs, config.max_steps) = (u64::MAX, Some(4))), Ok(4));
    let refused = |change: &dyn Fn(&mut TrainConfig), words: &str| {
        let error = steps(change).expect_err(words);
        assert!(error.contains(words), "no `{words}` in {error}");
    };
    refused(&|config| config.epochs = 0, "epochs is 0, the least is 1");
    refused(&|config| config.epochs = u64::MAX / 2, "epochs of 3 steps are too many");
    // Three times this and one more is 2^64 and 2.
    refused(&|config| config.epochs = 6_148_914_691_236_517_206, "epochs of 3 steps are too many");
    refused(&|config| config.epochs = 1 << 32, "epochs of 3 steps are too many");
    refused(&|config| config.max_steps = Some(1 << 32), "max_steps is 4294967296; a run has 4294967295 steps at most");
    refused(&|config| config.max_steps = Some(0), "max_steps is 0");
    refused(&|config| config.batch_size = 0, "batch_size is 0");
    let many = |config: &mut TrainConfig| {
        (config.batch_size, config.gradient_accumulation_steps) = (1 << 32, 1 << 32);
    };
    refused(&many, "batch_size 4294967296 times gradient_accumulation_steps 4294967296 is more than can be counted");
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        refused(&|config| config.learning_rate = bad, "learning_rate is");
        refused(&|config| config.warmup_ratio = bad, "warmup_ratio is");
        refused(&|config| config.weight_decay = bad, "weight_decay is");
        refused(&|config| config.max_grad_norm = bad, "max_grad_norm is");
    }
    refused(&|config| config.learning_rate = 1e38, "it should be above 0 and at most 10");
    assert!(planned_steps(0, &TrainConfig::default()).is_err());
    Ok(())
}

#[test]
fn numbers_of_the_command_line_that_no_run_can_go_by_are_refused() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    for (flags, words) in [
        (&["--epochs", "18446744073709551615"][..], &["18446744073709551615 epochs of 1 steps are too many"][..]),
        (&["--max-steps", "5000000000"], &["max_steps is 5000000000", "4294967295 steps at most"]),
        (&["--set-option", "lora_alpha=nan"], &["`lora_alpha` is \"nan\", it takes a number"]),
        (&["--set-option", "lora_alpha=-3"], &["a lora_alpha is -3, it is a number above 0"]),
        (&["--set-option", "lora_alpha=1e300"], &["it is a number above 0 that f32 holds"]),
        (&["--set-option", "alpha_pattern={\"q_proj\": 0}"], &["a lora_alpha is 0"]),
        (&["--set-option", "lora_dropout=1.0"], &["lora_dropout is 1, it is a probability below 1"]),
        (&["--set-option", "rank_pattern={\"q_proj\": 1.5}"], &["a rank is a whole number"]),
        (&["--set-option", "rank_pattern={\"q_proj\": 1e300}"], &["q_proj: a rank of", "is above both its widths"]),
        // Between its widths a rank costs more than it can learn; above both it is refused, before it takes memory.
        (&["--lora-r", "100000"], &["q_proj: a rank of 100000 is above both its widths, 48 in and 48 out"]),
        (&["--lora-r", "81", "--target-modules", "down_proj"], &["81 is above both its widths, 80 in and 48 out; 48 "]),
    ] {
        refused(place.fine_tune(&base, &rows).args(flags), words).with_context(|| format!("{flags:?}"))?;
    }
    leaves_nothing(&place)?;
    succeeds(place.fine_tune(&base, &rows).args([
        "--lora-r",
        "80",
        "--target-modules",
        "down_proj",
        "--max-steps",
        "1",
    ]))?;
    let bench = |flags: &[&str]| {
        let mut command = homeroom();
        command.args(["bench", "train", "--model-name"]).arg(fixture("models/llama")).args(flags);
        command
    };
    refused(&mut bench(&["--batch-size", "4294967295", "--seq-len", "9999999999999"]), &["more tokens than a step"])?;
    let ran = run(&mut bench(&["--warmup", "4294967295", "--steps", "1"]))?;
    assert!(ran.code == Some(2) && ran.stderr.contains("--warmup"), "{}", ran.stderr);
    Ok(())
}

#[test]
fn numbers_of_a_gguf_file_that_no_model_can_go_by_are_refused() -> Result<()> {
    let place = Place::new()?;
    // After a key come its type, 4 bytes, and a float.
    for (key, value, words) in [
        ("llama.attention.layer_norm_rms_epsilon", f32::NAN, "`rms_norm_eps` = NaN"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "`rms_norm_eps` = 0"),
        ("llama.rope.freq_base", f32::NAN, "`rope_theta` = NaN"),
        ("llama.rope.freq_base", f32::INFINITY, "`rope_theta` = inf"),
        ("llama.rope.freq_base", -1.0, "`rope_theta` = -1"),
    ] {
        let path = patched_gguf(&place, key, 4, &value.to_le_bytes())?;
        check_model(&place, &path, &["model.gguf", words]).with_context(|| format!("{key} = {value}"))?;
    }
    // A tensor moved to where another lies: the first of all begins at 0.
    let path = patched_gguf(&place, "blk.1.ffn_down.weight", 24, &0_u64.to_le_bytes())?;
    check_model(&place, &path, &["model.gguf", "tensors", "lie at one place", "blk.1.ffn_down.weight"])
}

#[test]
fn safetensors_that_share_bytes_are_refused() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama"), "model")?;
    let tensor = |name: &str, from: usize, to: usize| {
        format!("{name:?}: {{\"dtype\": \"F32\", \"shape\": [16], \"data_offsets\": [{from}, {to}]}}")
    };
    for tensors in [
        [tensor("a", 0, 64), tensor("b", 0, 64)],
        [tensor("a", 0, 64), tensor("b", 32, 96)],
        [tensor("a", 0, 64), tensor("a", 64, 128)],
        [tensor("a", 64, 128), tensor("b", 96, 160)],
    ] {
        let header = format!("{{{}}}", tensors.join(", "));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 128]);
        fs::write(copy.join("model.safetensors"), file)?;
        check_model(&place, &copy, &["not a whole safetensors file"]).context(header)?;
    }
    Ok(())
}

// --- what a run comes to ---------------------------------------------------------------------------------------------

/// One step, or so few rows that there is but one in an epoch: warm-up begins above zero.
#[test]
fn the_first_step_learns() -> Result<()> {
    let place = Place::new()?;
    let base = fixture("models/llama");
    for (rows, flags) in [(8, &["--epochs", "1"]), (20, &["--max-steps", "1"])] {
        let rows = place.rows("rows.jsonl", rows)?;
        succeeds(place.fine_tune(&base, &rows).arg("--overwrite").args(flags))?;
        let out = place.path("outputs/out");
        let state = read_json(&out.join("trainer_state.json"))?;
        assert_eq!((&state["global_step"], &state["log_history"][0]["learning_rate"]), (&json!(1), &json!(1e-4)));
        let learned = tensors(&out.join("adapter_model.safetensors"))?;
        let learned = learned.iter().filter(|(name, _)| name.contains("lora_B"));
        for (name, (_, values)) in learned {
            assert!(values.iter().any(|value| *value != 0.0), "{name} is as it was");
        }
    }
    Ok(())
}

/// The last update is used by no step, and only its result shows what it did.
#[test]
fn a_result_that_overflows_replaces_nothing() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 4)?);
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "2"]))?;
    let good = files(&place.path("outputs/out"))?;
    for flags in [&[][..], &["--warmup-ratio", "0"], &["--compute", "f32"], &["--compute", "bf16"], &["--json"]] {
        let mut wild = place.fine_tune(&base, &rows);
        wild.args(["--overwrite", "--lora-alpha", "1e38", "--learning-rate", "10", "--max-steps", "1"]);
        refused(wild.args(flags), &["step 1: the loss after its update is", "try a lower learning rate"])?;
        assert!(files(&place.path("outputs/out"))? == good, "what was there was changed");
        assert_eq!(place.outputs()?, ["out"]);
    }
    Ok(())
}

/// A strategy that has the fourth update made with a rate of 5e36.
fn exploding(place: &Place) -> Result<PathBuf> {
    let library = place.write("plugins/libreloading.so", variant("explodes")?)?;
    Ok(library.parent().context("a library lies in a directory")?.to_owned())
}

#[test]
fn a_run_that_ends_badly_keeps_what_it_had_learned_before() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, plugins) = (fixture("models/llama"), place.rows("rows.jsonl", 8)?, exploding(&place)?);
    let mine = place.write("outputs/out/trainer_state.json", "mine")?;
    let command = |steps: &str| {
        let mut command = place.fine_tune(&base, &rows);
        command.arg("--plugin-dir").arg(&plugins).args(["--strategy", "reloading", "--max-steps", steps]);
        command.args(["--learning-rate", "5e-3", "--overwrite", "--eval-file"]).arg(&rows);
        command
    };
    // The fourth update is met by the fifth step, or, if it is the last, by the look at the end.
    let mut losses = Vec::new();
    for (steps, words, name) in
        [("9", "step 5: the loss is", "out-step-3"), ("4", "step 4: the loss after its update is", "out-step-3-2")]
    {
        let kept = place.path("outputs").join(name);
        let path = kept.display().to_string();
        refused(&mut command(steps), &[words, "learned by step 3 (loss ", &path, "is as it was", "--init-from"])?;
        let manifest = read_json(&kept.join("homeroom.json"))?;
        let result = &manifest["training"]["result"];
        assert_eq!((&result["interrupted"], &result["steps"]), (&json!(true), &json!(3)));
        assert!(result["failure"].as_str().is_some_and(|failure| failure.contains(words)), "{result}");
        assert_eq!(read_json(&kept.join("trainer_state.json"))?["global_step"], json!(3));
        losses.push(loss(&kept, &rows)?);
    }
    assert_eq!(fs::read_to_string(mine)?, "mine");
    assert_eq!(place.outputs()?, ["out", "out-step-3", "out-step-3-2"]);
    // What is kept is what three steps of the same schedule make.
    assert!(losses[0] < loss(&base, &rows)?, "{losses:?}");
    Ok(())
}

/// To the last bit, what is kept is what a run that was stopped there has.
#[test]
fn what_a_bad_run_keeps_is_what_the_steps_before_had_made() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, plugins) = (fixture("models/llama"), place.rows("rows.jsonl", 8)?, exploding(&place)?);
    let command = |steps: &str| {
        let mut command = place.fine_tune(&base, &rows);
        command.arg("--plugin-dir").arg(&plugins).args(["--strategy", "reloading", "--max-steps", steps]);
        command.args(["--lr-scheduler-type", "constant", "--warmup-ratio", "0"]);
        command
    };
    let words = ["step 5", "learned by step 3"];
    refused(command("6").args(["--learning-rate", "5e-3"]), &words)?;
    // Half the rate: at the first failure it was taken back to the beginning.
    succeeds(command("3").args(["--learning-rate", "2.5e-3"]))?;
    let weights = |name: &str| fs::read(place.path("outputs").join(name).join("adapter_model.safetensors"));
    assert!(weights("out-step-3")? == weights("out")?);
    Ok(())
}

/// Numbers that are none before anything was learned are not the learning rate's fault.
#[test]
fn a_base_whose_numbers_overflow_is_named_by_every_command() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (overflowing(&place)?, place.rows("rows.jsonl", 3)?);
    let words = ["the loss of these examples is", "overflow"];
    refused(&mut eval(&base, &rows), &words)?;
    let mut plain = homeroom();
    refused(plain.arg("eval").arg("--model-dir").arg(&base).arg("--file").arg(&rows), &words)?;
    refused(place.fine_tune(&base, &rows).arg("--eval-file").arg(&rows), &words)?;
    refused(&mut place.fine_tune(&base, &rows), &["step 1: ", "before anything was learned", "weights are damaged"])?;
    leaves_nothing(&place)?;
    let mut chat = homeroom();
    refused(chat.args(["chat", "--prompt", "hi", "--model-dir"]).arg(&base), &["the model's numbers overflow"])?;
    for bench in [&["decode", "--tokens", "2"][..], &["prefill", "--tokens", "4", "--runs", "1"]] {
        let mut command = homeroom();
        refused(command.arg("bench").args(bench).arg("--model-dir").arg(&base), &["the model's numbers overflow"])?;
    }
    Ok(())
}

/// The likeliest of logits that are no numbers is the first token, which is one that ends the turn: an empty answer with 200.
#[test]
fn an_answer_that_is_no_number_is_an_error_and_not_empty() -> Result<()> {
    let place = Place::new()?;
    let base = overflowing(&place)?;
    let request = Request {
        messages: vec![Message::new(Role::User, "hello")],
        max_tokens: Some(5),
        temperature: Some(0.0),
        ..Request::default()
    };
    for compute in [Compute::Plain, Compute::F32, Compute::Bf16] {
        for temperature in [0.0, 0.7] {
            let loaded =
                Loaded::load(&ModelRef { name: base.clone(), ..ModelRef::default() }, Network::Never("a test"))?;
            let local = Local::new("overflowing", Answerer::of(loaded, compute)?);
            let request = Request { temperature: Some(temperature), ..request.clone() };
            let error = local.complete(&request, &Context::default()).expect_err("there is no answer");
            assert!(format!("{error:?}").contains("overflow"), "{compute:?}: {error:?}");
        }
    }
    Ok(())
}

// --- what is taken away while it is used -----------------------------------------------------------------------------

/// Cuts a file to a part of its length, in place.
fn shorten(path: &Path, to: u64) -> Result<()> {
    Ok(fs::OpenOptions::new().write(true).open(path)?.set_len(to)?)
}

#[test]
fn a_base_that_shrinks_under_a_run_costs_the_step_that_meets_it() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    let weights = base.join("model.safetensors");
    let whole = fs::read(&weights)?;
    // Into the middle, which pages are gone for, and by a few bytes, which no page is.
    for (number, left) in [whole.len() / 2, whole.len() - 1].into_iter().enumerate() {
        let mut command = match number {
            0 => endless_on(&place, &base)?,
            // The few bytes are only missed at the end, so it must have one.
            _ => {
                let mut command = place.fine_tune(&base, &place.path("rows.jsonl"));
                command.args(["--max-steps", "400", "--learning-rate", "1e-3"]);
                command
            }
        };
        let mut running = Running::start(&mut command)?;
        running.wait_for("step ")?;
        shorten(&weights, left as u64)?;
        let (code, stdout, stderr) = running.end()?;
        assert!(code == Some(1) && stdout.is_empty(), "{code:?} {stderr}");
        let path = weights.display().to_string();
        for words in [&format!("{path}: the file was shortened while it was in use"), "what it had learned by step "] {
            assert!(stderr.contains(words), "no `{words}` in\n{stderr}");
        }
        let outputs = place.outputs()?;
        let [kept] = outputs.as_slice() else { anyhow::bail!("{outputs:?}\n{stderr}") };
        ensure!(kept.starts_with("out-step-"), "{kept}");
        // The file is put back: the result belongs to it, and had learned.
        fs::write(&weights, &whole)?;
        let kept = place.path("outputs").join(kept);
        let rows = place.path("rows.jsonl");
        assert!(loss(&kept, &rows)? < loss(&base, &rows)?);
        fs::remove_dir_all(kept)?;
    }
    Ok(())
}

/// Where nothing is to be kept, the program ends in words and not by a signal.
#[test]
fn a_base_that_shrinks_ends_what_uses_it_in_words() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    let (rows, many) = (place.rows("rows.jsonl", 4)?, place.rows("many.jsonl", 20_000)?);
    let mut command = place.fine_tune(&base, &rows);
    let mut running = Running::start(command.arg("--eval-file").arg(&many))?;
    // The held-out rows are evaluated next, for seconds.
    running.wait_for("training ")?;
    shorten(&base.join("model.safetensors"), 4096)?;
    let (code, stdout, stderr) = running.end()?;
    assert!(code == Some(1) && stdout.is_empty(), "{code:?} {stderr}");
    let words = "base/model.safetensors: the file was shortened while it was in use, or its disk fails";
    assert!(stderr.contains("error: ") && stderr.contains(words), "{stderr}");
    leaves_nothing(&place)
}

/// The place of the result is gone when the run ends, as on a disk that went full or away.
#[test]
fn a_result_that_its_place_cannot_take_is_kept_among_temporary_files() -> Result<()> {
    let place = Place::new()?;
    let temporary = place.path("tmp");
    fs::create_dir(&temporary)?;
    let mut command = endless_on(&place, &fixture("models/llama"))?;
    let mut running = Running::start(command.env("TMPDIR", &temporary))?;
    running.wait_for("step ")?;
    fs::remove_dir_all(place.path("outputs"))?;
    fs::write(place.path("outputs"), "a file where a directory was")?;
    running.signal(libc::SIGINT)?;
    let (code, stdout, stderr) = running.end()?;
    assert!(code == Some(1) && stdout.is_empty(), "{code:?} {stderr}");
    let kept = fs::read_dir(&temporary)?.filter_map(|entry| Some(entry.ok()?.path()));
    let kept: Vec<PathBuf> = kept.filter(|path| path.join("out").exists()).collect();
    let [kept] = kept.as_slice() else { anyhow::bail!("{kept:?}\n{stderr}") };
    let kept = kept.join("out");
    assert!(stderr.contains(&format!("the result is whole in {}", kept.display())), "{stderr}");
    assert!(stderr.contains("error: ") && stderr.contains("outputs"), "{stderr}");
    AdapterFiles::read(&kept)?.adapt(&BaseModel::load(&fixture("models/llama"))?, false)?;
    Ok(())
}

/// A number that is none is told as none to a script, too: no line of JSON comes of a failure.
#[test]
fn an_evaluation_prints_finite_numbers_only() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    // A loss of thousands of nats, whose perplexity no double holds.
    let sure = changed(&place, "sure", |name, (_, values)| {
        if name == "model.norm.weight" {
            values.fill(1e5);
        }
    })?;
    let result = printed_json(&succeeds(&mut eval(&sure, &rows))?)?;
    let numbers = ["loss", "perplexity", "token_accuracy"].map(|name| result[name].as_f64());
    assert!(numbers.iter().all(|number| number.is_some_and(f64::is_finite)), "{result}");
    assert!(numbers[0] > Some(710.0), "{result}");
    assert_ne!(result, Value::Null);
    Ok(())
}
