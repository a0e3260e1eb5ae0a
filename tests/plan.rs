//! `homeroom plan`: what a training needs, from shapes alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use homeroom_abi::plan::ModuleKind;
use homeroom_engine::estimate::{Estimate, Request, Sketch, estimate};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use serde_json::{Value, json};

use crate::command_line::Running;
use crate::support::{Place, Values, homeroom, plan, printed_json, refused, root, run, succeeds, tensors};
use crate::{hub, pipelines};

fn request() -> Request {
    Request {
        batch_size: 4,
        gradient_accumulation_steps: 1,
        row_tokens: 33,
        trained_tokens: 33,
        gradient_checkpointing: false,
        packing: true,
        pass_rows: None,
        compute: Compute::F32,
        program_bytes: 7,
    }
}

fn pocket() -> Result<BaseModel> {
    BaseModel::load(&root().join("runtime/pocket/model"))
}

fn estimated(model: &BaseModel, strategy: &str, options: &Value, request: &Request) -> Result<Estimate> {
    let (sketch, plan) = (Sketch::of_model(model), plan(strategy, options, model)?);
    Ok(estimate(&sketch.stored_as_planned(&plan, false, &|_| None), &plan, request))
}

/// LoRA of rank r on a linear layer has r (d_in + d_out) values, AdamW two moments of each, and an adapter so small is kept as it was
/// before the last update as well.
#[test]
fn the_parts_are_what_the_shapes_say() -> Result<()> {
    let model = pocket()?;
    let linear = model.modules.iter().map(|module| &module.info);
    let linear = linear.filter(|info| info.kind == ModuleKind::Linear && !info.output_embedding);
    let (mut trained, mut copies) = (0, 0);
    for info in linear {
        trained += 5 * (info.d_in + info.d_out);
        // Ranks are padded to 16 where they are multiplied.
        copies += 16 * (info.d_in + info.d_out);
    }
    let found = estimated(&model, "lora", &json!({"r": 5}), &request())?;
    assert_eq!(found.trainable, trained);
    assert_eq!(found.parts.weights, model.stored_bytes() as u64);
    assert_eq!(found.parts.parameters, 4 * (trained + copies) as u64);
    assert_eq!(found.parts.moments, 12 * trained as u64);
    assert_eq!(found.parts.gradients, 4 * trained as u64);
    // 4 rows of 32 that predict, as f32 over the vocabulary.
    assert_eq!(found.parts.logits, (4 * 32 * model.architecture.vocab_size * 4) as u64);
    assert_eq!(found.parts.program, 7);
    assert_eq!(found.peak_memory_bytes, found.parts.total());
    assert_eq!((found.tokens_per_step, found.passes_per_step, found.fused_layers), (132, 1, (4, 4)));
    Ok(())
}

#[test]
fn what_saves_memory_is_estimated_to_save_it() -> Result<()> {
    let model = pocket()?;
    let of = |strategy: &str, request: &Request| estimated(&model, strategy, &json!({}), request);
    let lora = of("lora", &request())?;
    let checkpointed = of("lora", &Request { gradient_checkpointing: true, ..request() })?;
    assert!(checkpointed.parts.activations * 3 < lora.parts.activations * 2, "{checkpointed:?}\n{lora:?}");
    let longer = of("lora", &Request { row_tokens: 65, ..request() })?;
    assert_eq!(longer.parts.weights, lora.parts.weights);
    assert!(longer.parts.activations > lora.parts.activations);
    // Of floats 4 bits are a quarter; the embedding stays.
    assert!(of("qlora", &request())?.parts.weights * 2 < lora.parts.weights);
    assert!(of("int8", &request())?.parts.weights * 3 < lora.parts.weights * 2);
    let full = of("full", &request())?;
    assert_eq!(full.trainable, model.parameter_count());
    assert_eq!(full.fused_layers, (0, 4), "a recipe that is no low-rank update runs plain");
    assert!(full.peak_memory_bytes > lora.peak_memory_bytes);
    // Gradients of passes wait for each other: of four passes, those of up to two before the present one.
    let four = Request { packing: false, batch_size: 1, gradient_accumulation_steps: 4, ..request() };
    assert_eq!(of("lora", &four)?.parts.gradients, 3 * lora.parts.gradients);
    Ok(())
}

#[test]
fn a_config_json_alone_gives_what_the_model_gives() -> Result<()> {
    let place = Place::new()?;
    let alone = place.path("alone");
    fs::create_dir(&alone)?;
    let model = root().join("runtime/pocket/model");
    fs::copy(model.join("config.json"), alone.join("config.json"))?;
    let planned = |path: &std::path::Path| -> Result<(Value, String)> {
        let mut command = homeroom();
        command.arg("plan").arg("--model-name").arg(path).args(["--strategy", "qlora", "--lora-r", "3"]);
        command.args(["--batch-size", "2", "--max-seq-len", "50", "--rows", "20", "--epochs", "3", "--json"]);
        let ran = succeeds(&mut command)?;
        Ok((printed_json(&ran)?, ran.stderr))
    };
    let ((mut whole, _), (mut config, told)) = (planned(&model)?, planned(&alone)?);
    assert!(told.contains("tokenizer is not here"), "{told}");
    for json in [&mut whole, &mut config] {
        let parts = json["parts"].as_object_mut().context("parts")?;
        assert!(parts.remove("program").and_then(|bytes| bytes.as_u64()).is_some());
        let sum: u64 = parts.values().filter_map(Value::as_u64).sum();
        assert!(json["peak_memory_bytes"].as_u64().is_some_and(|peak| peak >= sum));
        assert!(json["seconds_per_step"].as_f64().is_some_and(|seconds| seconds > 0.0));
        assert!(json["tokens_per_second"].as_f64().is_some_and(|speed| speed > 0.0));
        assert_eq!((&json["steps"], &json["epochs"], &json["max_seq_len"]), (&json!(30), &json!(3), &json!(50)));
        assert_eq!((&json["strategy"], &json["storage"]), (&json!("qlora"), &json!("nf4")));
    }
    assert_eq!(whole["parts"], config["parts"]);
    Ok(())
}

#[test]
fn without_a_strategy_each_that_is_installed_has_a_line() -> Result<()> {
    let model = root().join("runtime/pocket/model");
    let command = || {
        let mut command = homeroom();
        command.arg("plan").arg("--model-name").arg(&model).args(["--batch-size", "1", "--max-seq-len", "20"]);
        command
    };
    let ran = succeeds(&mut command())?;
    for strategy in ["full", "int8", "lora", "qlora"] {
        let row = ran.stdout.lines().find(|line| line.starts_with(strategy));
        assert!(row.is_some_and(|row| row.contains("MB") && row.ends_with("fits")), "{}", ran.stdout);
    }
    let json = printed_json(&succeeds(command().arg("--json"))?)?;
    let strategies = json["strategies"].as_array().context("an array")?;
    assert!(strategies.len() >= 4 && strategies.iter().all(|one| one["fits"] == json!(true)), "{json}");
    Ok(())
}

/// A directory with the config.json of a model that no machine of a school holds.
fn large(place: &Place) -> Result<PathBuf> {
    let config = json!({
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "rope_theta": 5e5,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    });
    place.write("large/config.json", config.to_string())?;
    Ok(place.path("large"))
}

#[test]
fn what_does_not_fit_is_told_with_what_to_change() -> Result<()> {
    let place = Place::new()?;
    let mut command = homeroom();
    command.arg("plan").arg("--model-name").arg(large(&place)?).args(["--memory", "24GB"]);
    command.args(["--strategy", "lora", "--batch-size", "1", "--max-seq-len", "64"]);
    let ran = succeeds(&mut command)?;
    assert!(ran.stdout.contains("too much  24.0 GB can be had by --memory: it lacks"), "{}", ran.stdout);
    assert!(ran.stdout.contains("hint: a smaller base: of this shape one of about "), "{}", ran.stdout);
    let json = printed_json(&succeeds(command.arg("--json"))?)?;
    assert_eq!((&json["fits"], &json["changes"]), (&json!(false), &json!([])));
    // In 4 bits some half a byte a parameter, and what a training keeps.
    let smaller = json["smaller_base_parameters"].as_u64().context("some fit")?;
    assert!((15_000_000_000..45_000_000_000).contains(&smaller), "{smaller}");
    Ok(())
}

/// Changes come in the order of what they cost, each fits, and the same steps stand before anything that changes what is learned.
#[test]
fn changes_that_make_it_fit_keep_the_step_first_and_each_fits() -> Result<()> {
    let model = root().join("runtime/pocket/model");
    let plan = |more: &[&str]| -> Result<Value> {
        let mut command = homeroom();
        command.arg("plan").arg("--model-name").arg(&model).args(["--strategy", "lora", "--batch-size", "16"]);
        printed_json(&succeeds(command.args(["--max-seq-len", "256", "--json"]).args(more))?)
    };
    let whole = plan(&[])?;
    let peak = whole["peak_memory_bytes"].as_u64().context("a peak")?;
    assert_eq!((&whole["fits"], &whole["pass_tokens"], &whole["changes"]), (&json!(true), &json!(1024), &json!([])));
    let budget = peak - whole["parts"]["activations"].as_u64().context("a part")? / 3;
    let found = plan(&["--memory", &budget.to_string()])?;
    assert_eq!((&found["fits"], &found["available_memory_bytes"]), (&json!(false), &json!(budget)));
    let changes = found["changes"].as_array().context("changes")?;
    let number = |change: &Value, key: &str| change[key].as_f64().unwrap_or(f64::NAN);
    assert!(changes.iter().all(|change| number(change, "peak_memory_bytes") <= budget as f64), "{changes:?}");
    let same: Vec<&Value> = changes.iter().filter(|change| change["effect"] == "the same steps").collect();
    assert!(!same.is_empty() && changes[0]["effect"] == "the same steps", "{changes:?}");
    assert!(same.is_sorted_by(|a, b| number(a, "seconds_per_step") <= number(b, "seconds_per_step")), "{changes:?}");
    assert!(changes.iter().all(|change| change["effect"] != "longer rows are cut"), "the same steps fit: {changes:?}");
    // What is proposed takes what it says.
    let flags: Vec<&str> = same[0]["flags"].as_str().context("flags")?.split(' ').collect();
    let again = plan(&flags)?;
    let share = again["parts"]["activations"].as_f64().unwrap_or(f64::NAN);
    assert!(share < 0.7 * whole["parts"]["activations"].as_f64().unwrap_or(0.0), "{again}");
    assert_eq!(again["tokens_per_step"], whole["tokens_per_step"]);
    Ok(())
}

#[test]
fn passes_of_fewer_tokens_take_less_memory_and_the_same_step() -> Result<()> {
    let model = pocket()?;
    let of = |request: Request| estimated(&model, "lora", &json!({"r": 5}), &request);
    let sixteen = Request { batch_size: 16, ..request() };
    let (usual, small) = (of(sixteen)?, of(Request { pass_rows: Some(64), ..sixteen })?);
    assert_eq!((usual.passes_per_step, small.passes_per_step), (1, 8));
    assert_eq!(usual.tokens_per_step, small.tokens_per_step);
    assert!(small.parts.activations * 3 < usual.parts.activations, "{small:?}\n{usual:?}");
    // A batch of its own is cut as well where that is asked for.
    let unpacked = Request { packing: false, gradient_accumulation_steps: 2, ..sixteen };
    assert_eq!(
        (of(unpacked)?.passes_per_step, of(Request { pass_rows: Some(64), ..unpacked })?.passes_per_step),
        (2, 16)
    );
    Ok(())
}

#[test]
fn threads_and_sizes_are_what_is_asked_for_or_refused() -> Result<()> {
    let model = root().join("runtime/pocket/model");
    let plan = |more: &[&str]| {
        let mut command = homeroom();
        command.arg("plan").arg("--model-name").arg(&model).args([
            "--strategy",
            "lora",
            "--max-seq-len",
            "20",
            "--json",
        ]);
        command.args(more);
        command
    };
    assert_eq!(printed_json(&succeeds(&mut plan(&["--threads", "1"]))?)?["threads"], json!(1));
    for (more, words) in [(["--memory", "12 sheep"], "a size such as 12GB"), (["--memory", "0"], "a size such as 12GB")]
    {
        let ran = run(&mut plan(&more))?;
        assert!(ran.code == Some(2) && ran.stderr.contains(words), "{ran:?}");
    }
    refused(plan(&[]).env("HOMEROOM_MEMORY", "much"), &["HOMEROOM_MEMORY is `much`", "a size such as 12GB"])?;
    let of = |memory: &str| -> Result<Value> {
        printed_json(&succeeds(plan(&["--batch-size", "1"]).env("HOMEROOM_MEMORY", memory))?)
    };
    assert_eq!((&of("4GB")?["fits"], &of("5MB")?["fits"]), (&json!(true), &json!(false)));
    assert_eq!(of("4GB")?["memory_bytes"], json!(4_000_000_000_u64));
    Ok(())
}

#[test]
fn a_base_that_no_row_would_fit_with_is_refused_before_it_is_downloaded() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 6)?;
    let server = hub::server::Server::of("a/b", hub::llama()?)?;
    let mut command =
        hub::program(&server, &place, &["fine-tune", "--model-name", "a/b", "--output-dir", "outputs/out"]);
    command.arg("--training-file").arg(rows).env("HOMEROOM_MEMORY", "9MB").current_dir(place.path(""));
    let told = ["a/b: at least ", "and 9.00 MB can be had; nothing was downloaded", "`homeroom plan --model-name a/b`"];
    refused(&mut command, &told)?;
    assert_eq!((server.count("config.json"), server.count(".safetensors")), (1, 0));
    Ok(())
}

// --- trainings that ask it -------------------------------------------------------------------------------------------------------

/// A training of the pocket model on long rows, with a home of its own.
struct Tight {
    place: Place,
    /// What it needs, in bytes, as the plan has it.
    peak: u64,
}

impl Tight {
    fn new() -> Result<Self> {
        let place = Place::new()?;
        let row = |n: usize| {
            let answer = format!("{n} and again ").repeat(2 + n % 3);
            json!({"prompt": format!("say {n} twice, and {} more often", n * 7), "completion": answer}).to_string()
        };
        place.write("rows.jsonl", (0..64).map(row).collect::<Vec<_>>().join("\n"))?;
        let mut tight = Self { place, peak: 0 };
        let dry = printed_json(&succeeds(&mut tight.command(&["--dry-run", "--json"]))?)?;
        tight.peak = dry["peak_memory_bytes"].as_u64().context("a peak")?;
        Ok(tight)
    }

    fn program(&self) -> Command {
        let mut command = homeroom();
        command
            .env("HOMEROOM_HOME", self.place.path("home"))
            .current_dir(self.place.path(""))
            .env_remove("HOMEROOM_MEMORY");
        command
    }

    /// Steps of 16 rows.
    fn command(&self, more: &[&str]) -> Command {
        let mut command = self.program();
        command.args(["fine-tune", "--training-file", "rows.jsonl", "--output-dir", "outputs/out", "--compute", "f32"]);
        command
            .args(["--batch-size", "16", "--max-steps", "12", "--model-name"])
            .arg(root().join("runtime/pocket/model"));
        command.args(more);
        command
    }

    /// Less than what it needs by this part of a hundred of what passes could give up.
    fn memory(&self) -> String {
        // A pass of 16 rows of some 60 tokens keeps more than this.
        (self.peak - 6_000_000).to_string()
    }

    fn events(&self, run: &str) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.place.path("home/runs").join(run).join("events.jsonl"))?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    fn lowered(&self, run: &str) -> Result<Vec<Value>> {
        Ok(self.events(run)?.into_iter().filter(|event| event["event"] == "lowered").collect())
    }

    fn weights(&self) -> Result<BTreeMap<String, Values>> {
        tensors(&self.place.path("outputs/out/adapter_model.safetensors"))
    }
}

/// The largest difference of values over the largest value.
fn apart(ours: &BTreeMap<String, Values>, theirs: &BTreeMap<String, Values>) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, |most, value| most.max(value.abs()));
    let all = largest(&mut ours.values().flat_map(|(_, values)| values.iter().copied()));
    let both = ours.iter().flat_map(|(name, (_, values))| values.iter().zip(&theirs[name].1));
    largest(&mut both.map(|(a, b)| a - b)) / all
}

#[test]
fn a_training_that_does_not_fit_is_refused_or_lowered_or_begun_all_the_same() -> Result<()> {
    let tight = Tight::new()?;
    let memory = tight.memory();
    refused(
        tight.command(&[]).env("HOMEROOM_MEMORY", &memory),
        &[
            "of memory are needed, and",
            "to fit: `--",
            "with the same steps; --fit chooses so by itself, and --no-memory-check begins all the same",
        ],
    )?;
    assert!(!tight.place.path("home/runs").exists() && tight.place.outputs()?.is_empty(), "it costs nothing to refuse");
    succeeds(&mut tight.command(&[]))?;
    let usual = tight.weights()?;
    assert!(tight.lowered("out-1")?.is_empty());
    let ran = succeeds(tight.command(&["--fit", "--overwrite"]).env("HOMEROOM_MEMORY", &memory))?;
    assert!(
        ran.stderr.contains("fit       about ") && ran.stderr.contains("a step stays what it is"),
        "{}",
        ran.stderr
    );
    let lowered = tight.lowered("out-2")?;
    assert_eq!(lowered.first().map(|event| &event["step"]), Some(&json!(0)), "{lowered:?}");
    // The same steps, to rounding.
    let difference = apart(&usual, &tight.weights()?);
    assert!(difference < 2e-3, "{difference}");
    assert!(difference > 0.0 || lowered[0]["gradient_checkpointing"] == json!(true), "passes were cut");
    let shown = succeeds(tight.program().args(["runs", "show", "out-2"]))?.stdout;
    assert!(shown.contains("step 0   from here on passes hold") && shown.contains("of memory are needed"), "{shown}");
    let ran = succeeds(tight.command(&["--no-memory-check", "--overwrite"]).env("HOMEROOM_MEMORY", &memory))?;
    assert!(ran.stderr.contains("warning: about ") && ran.stderr.contains("it goes on all the same"), "{}", ran.stderr);
    let hopeless = tight.command(&["--fit", "--overwrite"]).env("HOMEROOM_MEMORY", "5MB").output()?;
    let told = String::from_utf8(hopeless.stderr)?;
    assert!(
        hopeless.status.code() == Some(1) && told.contains("no way to go through the same steps would fit"),
        "{told}"
    );
    Ok(())
}

/// Memory that is short all along lowers a pass after each step, down to single rows, and the steps stay.
#[test]
fn a_run_whose_memory_gets_short_takes_smaller_passes_and_a_resumed_one_obeys() -> Result<()> {
    let tight = Tight::new()?;
    succeeds(&mut tight.command(&[]))?;
    let usual = tight.weights()?;
    let short = |more: &[&str]| {
        let mut command = tight.command(&["--no-memory-check", "--save-every", "1"]);
        command.args(more).env("HOMEROOM_MEMORY", "5MB");
        command
    };
    let ran = succeeds(&mut short(&["--overwrite"]))?;
    assert!(
        ran.stderr.contains("note: memory is short, 0 B of 5.00 MB are left; from step 2 on passes hold"),
        "{}",
        ran.stderr
    );
    let lowest = "warning: memory is short, and passes are as small as they can be; the run goes on";
    assert_eq!(ran.stderr.matches(lowest).count(), 1, "{}", ran.stderr);
    let lowered = tight.lowered("out-2")?;
    let steps: Vec<u64> = lowered.iter().filter_map(|event| event["step"].as_u64()).collect();
    assert_eq!(steps, (1..=lowered.len() as u64).collect::<Vec<_>>(), "one after each step");
    let rows: Vec<u64> = lowered.iter().filter_map(|event| event["pass_rows"].as_u64()).collect();
    assert!(rows.is_sorted_by(|a, b| a >= b) && rows.len() >= 4 && rows.last() < rows.first(), "{rows:?}");
    assert_eq!(lowered.last().map(|event| &event["gradient_checkpointing"]), Some(&json!(true)));
    let whole = tight.weights()?;
    assert!(apart(&usual, &whole) < 2e-3, "{}", apart(&usual, &whole));
    // It is killed when its passes are as small as they get, and goes on where there is memory enough.
    let mut running = Running::start(&mut short(&["--overwrite"]))?;
    running.wait_for(lowest)?;
    running.child.kill()?;
    running.child.wait()?;
    let checkpoints = tight.place.path("home/runs/out-3/trainings/1/checkpoints");
    ensure!(fs::read_dir(&checkpoints)?.next().is_some(), "it had saved");
    succeeds(tight.program().args(["resume", "out-3"]))?;
    assert_eq!(tight.weights()?, whole, "as it was cut, not as it began");
    assert_eq!(tight.lowered("out-3")?.len(), lowered.len());
    Ok(())
}

#[test]
fn a_pipeline_refuses_lowers_or_begins_as_its_script_says() -> Result<()> {
    let place = pipelines::Place::new()?;
    let script = |more: &str| {
        format!(
            "local data = homeroom.prepare_dataset {{ path = params.dataset }}\n\
             local tuned = homeroom.fine_tune {{ model = homeroom.load_model {{ name = params.model }}, dataset = data.train, \
             max_steps = 2, batch_size = 8{more} }}\nreturn tuned.metrics.steps\n"
        )
    };
    let run = |more: &str, memory: &str| -> Result<(Option<i32>, String)> {
        let ran = place.command(&place.config(&script(more))?).env("HOMEROOM_MEMORY", memory).output()?;
        Ok((ran.status.code(), String::from_utf8(ran.stderr)?))
    };
    let (code, told) = run("", "5MB")?;
    assert!(code == Some(1) && told.contains("fine_tune: about ") && told.contains("of memory are needed"), "{told}");
    let (code, told) = run(", memory_check = false, save_steps = 1", "5MB")?;
    assert!(code == Some(0) && told.contains("note: memory is short"), "{told}");
    let (code, told) = run(", fit = true, seed = 7", "5MB")?;
    assert!(code == Some(1) && told.contains("no way to go through the same steps would fit"), "{told}");
    let (code, told) = run(", fit = true, pass_tokens = 40, seed = 8", "8GB")?;
    assert!(code == Some(0) && !told.contains("fit  "), "{told}");
    Ok(())
}

#[test]
fn what_is_unknown_is_refused_with_what_next() -> Result<()> {
    let model = root().join("runtime/pocket/model");
    let plan = |name: &std::path::Path, more: &[&str]| {
        let mut command = homeroom();
        command.arg("plan").arg("--model-name").arg(name).args(more);
        command
    };
    refused(&mut plan(&model, &["--strategy", "lorra"]), &["unknown strategy `lorra`", "lora"])?;
    refused(&mut plan("no/such/model".as_ref(), &["--strategy", "lora"]), &["no such model", "hint: "])?;
    refused(
        &mut plan(&model, &["--strategy", "lora", "--max-seq-len", "257"]),
        &["the model's context is 256 tokens"],
    )?;
    refused(&mut plan(&model, &["--strategy", "lora", "--set-option", "rank=3"]), &["strategy `lora`", "rank"])?;
    refused(
        &mut plan("a/b".as_ref(), &["--strategy", "lora"]),
        &["a/b: not on this machine", "nothing is downloaded"],
    )?;
    Ok(())
}

#[test]
fn of_a_model_on_the_hub_its_config_json_alone_is_read() -> Result<()> {
    let place = Place::new()?;
    let server = hub::server::Server::of("a/b", hub::llama()?)?;
    let ran = succeeds(&mut hub::program(
        &server,
        &place,
        &["plan", "--model-name", "a/b", "--strategy", "lora", "--batch-size", "1", "--max-seq-len", "8", "--json"],
    ))?;
    assert_eq!(printed_json(&ran)?["model"], json!("a/b"));
    assert_eq!(server.count("config.json"), 1);
    assert_eq!((server.count(".safetensors"), server.count("tokenizer.json")), (0, 0));
    assert!(!place.path("hf").exists(), "nothing is kept");
    Ok(())
}
