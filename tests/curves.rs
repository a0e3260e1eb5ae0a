//! Twenty optimizer steps against PEFT and torch: loss, gradient norm, learning rate and what was learned.

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::adapt::merge::merge;
use homeroom_engine::data::Example;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::train::{Run, TrainConfig};
use serde_json::Value;

use crate::support::{adapt_stored, distance, expected, fixture, model, tensors};

fn examples(micro_batch: &Value) -> Result<Vec<Example>> {
    let rows = micro_batch.as_array().context("a micro-batch is a list")?;
    let rows = rows.iter().map(|row| {
        let ids = serde_json::from_value(row["ids"].clone())?;
        let trained = serde_json::from_value(row["trained"].clone())?;
        Ok(Example::new(ids, trained, 0))
    });
    rows.collect()
}

/// Trains as the fixture's `curve.json` says, from its initial adapter, and compares every step and the end.
fn check(name: &str) -> Result<()> {
    let dir = fixture("curves").join(name);
    let curve: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("curve.json"))?)?;
    let config = &curve["config"];
    let text = |key: &str| config[key].as_str().with_context(|| format!("`{key}` is missing"));
    let number = |key: &str| config[key].as_f64().with_context(|| format!("`{key}` is missing"));
    let (model, mut adaptation) = adapt_stored(text("strategy")?, &config["options"], model(text("base")?)?, 1)?;
    if dir.join("init").exists() {
        adaptation.load(AdapterFiles::read(&dir.join("init"))?.into_tensors(&model)?)?;
    }
    let steps = curve["steps"].as_array().context("a curve has steps")?;
    let train = TrainConfig {
        learning_rate: number("learning_rate")?,
        warmup_ratio: number("warmup_steps")? / number("max_steps")?,
        weight_decay: number("weight_decay")?,
        max_grad_norm: number("max_grad_norm")?,
        ..TrainConfig::default()
    };
    let mut run = Run::new(&model, &adaptation, &train, steps.len() as u64);
    for (number, step) in steps.iter().enumerate() {
        let micro_batches = step["micro_batches"].as_array().context("a step has micro-batches")?;
        let examples = micro_batches.iter().map(examples).collect::<Result<Vec<_>>>()?;
        let batches: Vec<Batch> = examples.iter().map(|rows| Batch::of_examples((0..).zip(rows))).collect();
        let report = run.step(&batches)?;
        for (what, got, bound) in [
            ("loss", report.loss, 1e-5),
            ("grad_norm", report.grad_norm, 1e-4),
            ("learning_rate", report.learning_rate, 1e-9),
        ] {
            let want = step[what].as_f64().with_context(|| format!("`{what}` is missing"))?;
            ensure!((got - want).abs() <= bound * want.abs(), "step {number}: {what} is {got}, torch has {want}");
        }
    }
    let trained = merge_or_adapter(&dir, &adaptation)?;
    ensure!(trained < 2e-4, "the trained values are {trained} away from torch's");
    let pass = Pass::evaluation(&model, Some(&adaptation));
    for (ids, want) in expected(&dir.join("logits.safetensors"))? {
        let logits = pass.logits(&Batch::of_tokens(&ids, 0))?.flatten_all()?.to_vec1::<f32>()?;
        let apart = distance(&logits, &want);
        ensure!(apart < 1e-3, "a trained logit is {apart} away from torch's");
    }
    Ok(())
}

/// Largest difference between the trained parameters and those in the fixture's file.
fn merge_or_adapter(dir: &std::path::Path, adaptation: &homeroom_engine::adapt::adaptation::Adaptation) -> Result<f32> {
    let whole = adaptation.is_whole_model();
    let file = dir.join("trained").join(if whole { "model.safetensors" } else { "adapter_model.safetensors" });
    let want = tensors(&file)?;
    let mut apart = 0_f32;
    for param in &adaptation.params {
        let (_, values) =
            want.get(&param.spec.tensor).with_context(|| format!("no `{}` in the file", param.spec.tensor))?;
        let got = param.var.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
        apart = apart.max(distance(&got, values));
    }
    Ok(apart)
}

#[test]
fn lora_learns_as_in_peft() -> Result<()> {
    check("lora")
}

#[test]
fn rslora_learns_as_in_peft() -> Result<()> {
    check("rslora")
}

/// Also on biases, which DoRA leaves alone.
#[test]
fn dora_learns_as_in_peft() -> Result<()> {
    check("dora")
}

/// Over weights that bitsandbytes stored as NF4, on the fused path.
#[test]
fn qlora_learns_as_in_peft_with_bitsandbytes() -> Result<()> {
    check("qlora")
}

#[test]
fn full_learns_as_in_torch() -> Result<()> {
    check("full")
}

#[test]
fn full_with_tied_embeddings_learns_as_in_torch() -> Result<()> {
    check("full-tied")
}

#[test]
fn ia3_learns_as_in_peft_through_the_plain_executor() -> Result<()> {
    check("ia3")
}

#[test]
fn vera_learns_as_in_peft_through_the_plain_executor() -> Result<()> {
    check("vera")
}

/// PEFT's directory has no `homeroom.json`: the engine makes the recipe from the configuration.
#[test]
fn an_adapter_of_peft_answers_here_as_there() -> Result<()> {
    for (name, base) in [("lora", "llama"), ("rslora", "llama"), ("dora", "qwen2")] {
        let dir = fixture("curves").join(name);
        let model = model(base)?;
        let adaptation = AdapterFiles::read(&dir.join("trained"))?.adapt(&model, false)?;
        let merged = merge(&model, &adaptation)?;
        for (ids, want) in expected(&dir.join("logits.safetensors"))? {
            let batch = Batch::of_tokens(&ids, 0);
            let logits = Pass::evaluation(&model, Some(&adaptation)).logits(&batch)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(distance(&logits, &want) < 1e-4, "{name}: {}", distance(&logits, &want));
            let logits = Pass::evaluation(&merged, None).logits(&batch)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(distance(&logits, &want) < 1e-4, "{name}, merged: {}", distance(&logits, &want));
        }
    }
    Ok(())
}
