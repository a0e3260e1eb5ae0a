//! Adapters that are damaged, or belong to another base.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::set_fields;
use crate::support::{Place, eval, fixture, loss, printed_json, refused, succeeds, tensors};

/// Each field of PEFT's that would change what the tensors compute is named; so are all of them together.
#[test]
fn an_adapter_with_fields_that_are_not_run_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let adapter = place.copy(&fixture("curves/lora/trained"), "adapter")?;
    let config = adapter.join("adapter_config.json");
    let original = fs::read(&config)?;
    let command = || {
        let mut command = eval(&adapter, &rows);
        command.arg("--base-model").arg(fixture("models/llama"));
        command
    };
    succeeds(&mut command())?;
    for (key, value) in [
        ("use_dora", json!("yes")),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("init_lora_weights", json!("pissa")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("trainable_token_indices", json!([3])),
        ("a_field_of_the_future", json!(1)),
        ("r", json!(0)),
        ("lora_alpha", json!(-5)),
        ("lora_alpha", json!(1e300)),
        ("alpha_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"q_proj": "7"})),
        ("rank_pattern", json!([3])),
    ] {
        fs::write(&config, &original)?;
        set_fields(&config, json!({key: value}))?;
        refused(&mut command(), &["adapter_config.json", "not supported", &format!("`{key}` = {value}")])?;
    }
    fs::write(&config, &original)?;
    set_fields(&config, json!({"use_qalora": true, "bias": "all"}))?;
    refused(&mut command(), &["`use_qalora` = true", "`bias` = \"all\""])?;
    fs::write(&config, &original)?;
    set_fields(&config, json!({"peft_type": "LOHA"}))?;
    refused(&mut command(), &["peft_type `LOHA`", "supported is LORA"])?;
    fs::write(&config, &original)?;
    set_fields(&config, json!({"r": 5}))?;
    refused(&mut command(), &["its rank is 5", "has 3"])
}

/// Sets the factors of all scalings in a manifest's recipes to one that f32 does not hold.
fn scaled_beyond_f32(bytes: Vec<u8>) -> Vec<u8> {
    fn set(value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(set),
            Value::Object(fields) => fields.iter_mut().for_each(|(name, value)| match (name.as_str(), &mut *value) {
                ("scale", Value::Array(scale)) => scale[1] = json!(1e300),
                _ => set(value),
            }),
            _ => {}
        }
    }
    let mut manifest: Value = serde_json::from_slice(&bytes).expect("it was whole");
    set(&mut manifest["plan"]["recipes"]);
    manifest.to_string().into_bytes()
}

#[test]
fn a_damaged_adapter_is_refused() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 2)?);
    let out = place.path("outputs/out");
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1"]))?;
    let damage = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, words: &[&str]| -> Result<()> {
        let whole = fs::read(out.join(name))?;
        fs::write(out.join(name), change(whole.clone()))?;
        refused(&mut eval(&out, &rows), words).with_context(|| name.to_owned())?;
        Ok(fs::write(out.join(name), whole)?)
    };
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    damage("adapter_model.safetensors", &half, &["adapter_model.safetensors: not a whole safetensors file"])?;
    damage("homeroom.json", &half, &["homeroom.json: not JSON"])?;
    damage("adapter_config.json", &half, &["adapter_config.json: not JSON"])?;
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replacen(from, to, 1).into_bytes()
    };
    damage("homeroom.json", &replace("\"format\": 1", "\"format\": 2"), &["homeroom.json: format", "newer"])?;
    damage("homeroom.json", &replace("\"matmul_t\"", "\"matmul_tt\""), &["cannot read"])?;
    // The first factor is that of LoRA's update.
    damage("homeroom.json", &scaled_beyond_f32, &["recipe 0 scales by", "f32 does not hold"])?;
    damage("homeroom.json", &replace("self_attn.q_proj", "self_attn.qq_proj"), &["no module", "qq_proj"])?;
    let not_a_number = |mut bytes: Vec<u8>| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes
    };
    damage("adapter_model.safetensors", &not_a_number, &["not finite"])?;
    fs::remove_file(out.join("adapter_model.safetensors"))?;
    refused(&mut eval(&out, &rows), &["adapter_model.safetensors: cannot open"])
}

/// A copy of a model whose weights are a hundredth larger.
fn other_weights(place: &Place, base: &Path) -> Result<PathBuf> {
    let copy = place.copy(base, "other")?;
    let path = copy.join("model.safetensors");
    let scaled = tensors(&path)?.into_iter().map(|(name, (shape, values))| {
        (name, shape, values.iter().flat_map(|value| (value * 1.01).to_le_bytes()).collect())
    });
    fs::write(&path, homeroom_engine::adapt::adapter::serialize_f32(&scaled.collect::<Vec<_>>())?)?;
    Ok(copy)
}

#[test]
fn an_adapter_is_refused_on_a_base_that_it_was_not_trained_on() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (place.copy(&fixture("models/llama"), "base")?, place.rows("rows.jsonl", 4)?);
    let out = place.path("outputs/out");
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "2", "--learning-rate", "1e-2"]))?;
    let right = loss(&out, &rows)?;
    let on = |base: &Path| {
        let mut command = eval(&out, &rows);
        command.arg("--base-model").arg(base);
        command
    };
    let other = other_weights(&place, &base)?;
    refused(
        &mut on(&other),
        &["belongs to another base", "base (sha256:", "other (sha256:", "--base-model", "--any-base"],
    )?;
    let forced = printed_json(&succeeds(on(&other).arg("--any-base"))?)?["loss"].as_f64().context("a loss")?;
    assert!(forced != right && (forced - right).abs() < 0.5, "{forced}, {right}");
    refused(on(&fixture("models/llama-tied")).arg("--any-base"), &["the plan does not fit the model", "gate_proj"])?;
    let mut not_an_adapter = eval(&base, &rows);
    refused(not_an_adapter.arg("--base-model").arg(&other), &["not an adapter, so it has no base model"])?;

    // The same base elsewhere is the same base, and a base that is gone is asked for.
    fs::rename(&base, place.path("moved"))?;
    refused(&mut eval(&out, &rows), &["its base model", "/base is not there", "hint: ", "--base-model"])?;
    let moved = printed_json(&succeeds(&mut on(&place.path("moved")))?)?["loss"].as_f64();
    assert_eq!(moved, Some(right));
    Ok(())
}
