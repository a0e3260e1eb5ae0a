//! `homeroom plan`: what a training needs, from shapes alone.

use std::fs;

use anyhow::{Context, Result};
use homeroom_abi::plan::ModuleKind;
use homeroom_engine::estimate::{Estimate, Request, Sketch, estimate};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use serde_json::{Value, json};

use crate::hub;
use crate::support::{Place, homeroom, plan, printed_json, refused, root, succeeds};

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
        tokens: None,
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

#[test]
fn what_does_not_fit_is_told_with_what_to_change() -> Result<()> {
    let place = Place::new()?;
    // Sizes of a model that no machine of a school holds.
    let config = json!({
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248,
        "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "rope_theta": 5e5,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    });
    fs::create_dir(place.path("large"))?;
    let model = place.write("large/config.json", config.to_string())?;
    let mut command = homeroom();
    command.arg("plan").arg("--model-name").arg(model.parent().context("a directory")?);
    command.args(["--strategy", "lora", "--batch-size", "1", "--max-seq-len", "64"]);
    let ran = succeeds(&mut command)?;
    assert!(ran.stdout.contains("too much") && ran.stdout.contains("hint: "), "{}", ran.stdout);
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
