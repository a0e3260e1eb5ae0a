//! Every mix of plain and fused blocks, over odd and even sizes, comes to what plain blocks alone do.

use anyhow::{Context, Result};
use homeroom_engine::adapt::requantize::{StoredAs, store_as};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::train::TrainConfig;
use homeroom_kernels::Codec;
use serde_json::{Value, json};

use crate::fused::{apart, config, gradients, rows, shaken};
use crate::support::{Place, Sizes, fixture, succeeds};

/// Sizes that leave other blocks plain in bf16, whose products take two channels at once: none, the head, the layers and the head.
fn models(place: &Place) -> Result<Vec<(&'static str, BaseModel)>> {
    let even = Sizes { hidden: 24, inner: 40, heads: 3, kv_heads: 1, head_dim: 8, vocab: 332, tied: false };
    let odd = Sizes { hidden: 21, inner: 33, heads: 3, kv_heads: 3, head_dim: 6, vocab: 323, tied: false };
    let sizes = [
        ("even sizes", even),
        ("an odd vocabulary", Sizes { vocab: 321, ..even }),
        ("an odd vocabulary, tied", Sizes { vocab: 321, tied: true, ..even }),
        ("odd widths", Sizes { vocab: 324, ..odd }),
        ("odd widths and vocabulary", odd),
        ("odd widths and vocabulary, tied", Sizes { tied: true, ..odd }),
        ("an odd width inside", Sizes { inner: 37, ..even }),
    ];
    sizes.into_iter().map(|(name, sizes)| Ok((name, BaseModel::load(&place.random_model(name, &sizes)?)?))).collect()
}

/// Strategies that fuse, that do in part, and that do not.
fn strategies() -> Vec<(&'static str, Value)> {
    vec![
        ("lora", json!({"r": 3})),
        ("lora", json!({"r": 3, "target_modules": ["q_proj", "lm_head"]})),
        ("lora", json!({"r": 2, "target_modules": ["lm_head"]})),
        ("lora", json!({"r": 2, "target_modules": ["embed_tokens", "lm_head", "o_proj"]})),
        ("lora", json!({"r": 3, "use_dora": true})),
        ("lora", json!({"r": 3, "use_dora": true, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.1})),
        ("lora", json!({"r": 3, "use_dora": true, "target_modules": r".*layers\.0\..*down_proj"})),
        ("lora", json!({"r": 3, "use_dora": true, "target_modules": r".*layers\.1\..*q_proj", "lora_dropout": 0.2})),
        ("ia3", json!({"target_modules": ["k_proj"], "feedforward_modules": []})),
        ("full", json!({})),
        ("lora", json!({"r": 2, "use_dora": true, "lora_dropout": 0.1})),
    ]
}

/// A cosine of 1 is the same direction.
fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Loss and gradients beside those of plain blocks; packed or not, recomputed or not; and the loss without gradients.
fn check(model: &BaseModel, strategy: &str, options: &Value, computes: &[(Compute, f64)]) -> Result<()> {
    let adaptation = shaken(strategy, options, model)?;
    let (plain_outcome, plain) = gradients(model, &adaptation, &config(Compute::Plain))?;
    for &(compute, bound) in computes {
        for packing in [true, false] {
            let train = TrainConfig { packing, ..config(compute) };
            let place = || format!("{compute:?}, packing {packing}");
            let (outcome, own) = gradients(model, &adaptation, &train).with_context(place)?;
            let loss_apart = (outcome.loss_sum - plain_outcome.loss_sum).abs() / plain_outcome.loss_sum;
            anyhow::ensure!(loss_apart < bound, "{}: loss {loss_apart:e} apart", place());
            match compute {
                Compute::F32 => {
                    let gradients_apart = apart(&plain, &own);
                    anyhow::ensure!(gradients_apart < 1e-5, "{}: gradients {gradients_apart:e} apart", place());
                }
                _ => {
                    let cosine = cosine(&plain, &own);
                    anyhow::ensure!(cosine > 0.99, "{}: cosine {cosine}", place());
                }
            }
            let again = TrainConfig { gradient_checkpointing: true, ..train };
            let recomputed = gradients(model, &adaptation, &again).with_context(place)?.1;
            anyhow::ensure!(own == recomputed, "{}: recomputation changes gradients", place());
        }
        let examples = rows(model);
        let batch = Batch::of_examples((0..).zip(&examples));
        let pass = Pass::evaluation(model, Some(&adaptation));
        let loss = |compute| -> Result<f64> {
            Ok(trainer(model, Some(&adaptation), compute).log_probs(&pass, &batch)?.loss_sum)
        };
        let (plain, own) = (loss(Compute::Plain)?, loss(compute).with_context(|| format!("{compute:?}"))?);
        anyhow::ensure!(
            (own - plain).abs() < bound * plain,
            "{compute:?}: loss {own} without gradients, {plain} plain"
        );
    }
    Ok(())
}

#[test]
fn every_mix_of_plain_and_fused_blocks_comes_to_what_plain_ones_do() -> Result<()> {
    let place = Place::new()?;
    for (name, model) in models(&place)? {
        for (strategy, options) in strategies() {
            let computes = [(Compute::F32, 1e-6), (Compute::Bf16, 0.02), (Compute::Int8, 0.02)];
            check(&model, strategy, &options, &computes).with_context(|| format!("{name}: {strategy} {options}"))?;
        }
    }
    Ok(())
}

/// Where the base is behind a codec, its layers are multiplied in integers if their widths allow.
#[test]
fn every_mix_over_a_base_behind_a_codec_comes_to_what_plain_blocks_do() -> Result<()> {
    let place = Place::new()?;
    for (name, model) in models(&place)? {
        for codec in [Codec::int8(), Codec::nf4()] {
            let place = format!("{name} as {}", codec.name);
            let model = store_as(&model, &StoredAs::Codec(codec), None, |_, _| {})?;
            for (strategy, options) in strategies().into_iter().step_by(3) {
                let computes = [(Compute::F32, 1e-6), (Compute::Int8, 0.03)];
                check(&model, strategy, &options, &computes)
                    .with_context(|| format!("{place}: {strategy} {options}"))?;
            }
        }
    }
    Ok(())
}

/// In bf16 and over a head that is adapted or of an odd width, nothing but the embedding is looked up by the fused way.
#[test]
fn dora_trains_beside_a_head_that_is_adapted() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 4)?;
    let odd = Sizes { hidden: 21, inner: 33, heads: 3, kv_heads: 3, head_dim: 6, vocab: 323, tied: false };
    for model in [fixture("models/llama"), place.random_model("odd", &odd)?] {
        for compute in ["auto", "f32", "bf16", "int8"] {
            let mut command = place.fine_tune(&model, &rows);
            command.args(["--set-option", "use_dora=true", "--set-option", "lora_dropout=0.1"]);
            command.args(["--target-modules", "q_proj,lm_head", "--max-steps", "2"]);
            succeeds(command.args(["--overwrite", "--compute", compute]))?;
        }
    }
    Ok(())
}
