//! Fused blocks are held to the plain ones: same losses, same gradients, whatever is packed, recomputed or shared by threads.

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::requantize::{StoredAs, store_as};
use homeroom_engine::data::Example;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::batch::{Batch, PASS_ROWS};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::gradients::Gradients;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::run::waist::{LogProbs, Weigh};
use homeroom_engine::train::{Control, Outcome, Run, StepReport, TrainConfig, evaluate_examples};
use homeroom_kernels::{Codec, Isa, with_isa};
use serde_json::{Value, json};

use crate::invariants::examples;
use crate::support::{adapt, learn_on, model, shake, units};

/// A strategy made real, with every parameter away from its first value: a fresh B of zeros would hide the gradient of A.
pub fn shaken(strategy: &str, options: &Value, model: &BaseModel) -> Result<Adaptation> {
    shake(adapt(strategy, options, model, 3)?)
}

/// Sequences of unequal lengths, one of them longer than a block of attention.
pub fn rows(model: &BaseModel) -> Vec<Example> {
    let mut rows = examples(model, 7, 2);
    let long = 97.min(model.architecture.max_position_embeddings);
    rows.push(Example::new((0..long as u32).collect(), (0..long).map(|t| t % 3 > 0).collect(), 0));
    rows.push(Example::new(vec![5, 9], vec![false, true], 0));
    rows
}

/// Loss, right predictions and the gradients of all trained parameters in one.
pub fn gradients(model: &BaseModel, adaptation: &Adaptation, config: &TrainConfig) -> Result<(Outcome, Vec<f64>)> {
    let rows = rows(model);
    let units = units((0..).zip(&rows));
    let batches = match config.packing {
        true => Batch::packed(&units, PASS_ROWS),
        false => units.chunks(1).map(Batch::of_units).collect(),
    };
    let (outcome, gradients) = Run::new(model, adaptation, config, 1).gradients(&batches)?;
    let mut all = Vec::new();
    for (index, _) in adaptation.params.iter().enumerate().filter(|(_, param)| param.spec.trainable) {
        let gradient = gradients.get(index).context("every trained parameter has a gradient")?;
        all.extend(gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
    }
    Ok((outcome, all))
}

/// Largest difference, as a share of the largest value.
pub fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    a.iter().zip(b).fold(0.0, |most: f64, (x, y)| most.max((x - y).abs())) / largest
}

pub fn config(compute: Compute) -> TrainConfig {
    TrainConfig { compute, ..TrainConfig::default() }
}

/// Every model that ships as a fixture, and bases through codecs, each with strategies that fuse and some that do in part.
fn cases() -> Result<Vec<(String, BaseModel)>> {
    let mut cases = Vec::new();
    for name in ["llama", "llama-tied", "llama3-rope", "mistral", "qwen2", "llama-gguf/model-mixed.gguf"] {
        cases.push((name.to_owned(), model(name)?));
    }
    for codec in [Codec::nf4(), Codec::int8()] {
        let name = format!("llama as {}", codec.name);
        cases.push((name, store_as(&model("llama")?, &StoredAs::Codec(codec), None, |_, _| {})?));
    }
    Ok(cases)
}

fn strategies() -> Vec<(&'static str, Value)> {
    vec![
        ("lora", json!({"r": 3, "lora_alpha": 5})),
        ("lora", json!({"r": 17, "lora_alpha": 2, "use_rslora": true, "lora_dropout": 0.25})),
        ("lora", json!({"r": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}})),
        ("lora", json!({"r": 4, "target_modules": r".*layers\.1\.mlp\.down_proj"})),
        ("lora", json!({"r": 2, "target_modules": ["embed_tokens", "lm_head", "o_proj"]})),
        ("lora", json!({"r": 3, "lora_alpha": 5, "use_dora": true})),
        // Sites with learned lengths on some of their modules, and ranks that differ.
        (
            "lora",
            json!({"r": 17, "use_dora": true, "use_rslora": true, "target_modules": ["k_proj", "v_proj", "up_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2}}),
        ),
    ]
}

#[test]
fn fused_blocks_have_the_loss_and_gradients_of_plain_ones() -> Result<()> {
    for (name, model) in cases()? {
        for (strategy, options) in strategies() {
            let adaptation = shaken(strategy, &options, &model)?;
            let (loss, plain) = gradients(&model, &adaptation, &config(Compute::Plain))?;
            let (fused_loss, fused) = gradients(&model, &adaptation, &config(Compute::F32))?;
            let loss_apart = (fused_loss.loss_sum - loss.loss_sum).abs() / loss.loss_sum;
            assert!(loss_apart < 1e-6, "{options} on {name}: loss {loss_apart:e} apart");
            assert_eq!(fused_loss.correct, loss.correct, "{options} on {name}");
            let gradients_apart = apart(&plain, &fused);
            assert!(gradients_apart < 1e-5, "{options} on {name}: gradients {gradients_apart:e} apart");
        }
    }
    Ok(())
}

/// bf16 keeps 8 bits of a number, a relative error of 0.002 that a chain of some ten operations adds up to a few parts in a
/// hundred: gradients point the same way (1 - 0.05² / 2), are as long, and the loss is the same to a part in a hundred.
pub fn bf16_is_near(what: &str, (loss, exact): &(Outcome, Vec<f64>), (rounded_loss, rounded): &(Outcome, Vec<f64>)) {
    let loss_apart = (rounded_loss.loss_sum - loss.loss_sum).abs() / loss.loss_sum;
    assert!(loss_apart < 0.01, "{what}: loss {loss_apart} apart");
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let cosine = dot(exact, rounded) / (dot(exact, exact) * dot(rounded, rounded)).sqrt();
    assert!(cosine > 0.998, "{what}: cosine {cosine}");
    let length = (dot(rounded, rounded) / dot(exact, exact)).sqrt();
    assert!((length - 1.0).abs() < 0.02, "{what}: length {length}");
}

#[test]
fn fused_blocks_in_bf16_are_near_those_in_f32() -> Result<()> {
    for (name, model) in cases()? {
        for (strategy, options) in strategies() {
            let adaptation = shaken(strategy, &options, &model)?;
            let exact = gradients(&model, &adaptation, &config(Compute::F32))?;
            let rounded = gradients(&model, &adaptation, &config(Compute::Bf16))?;
            bf16_is_near(&format!("{options} on {name}"), &exact, &rounded);
        }
    }
    Ok(())
}

/// On every instruction set that this processor has.
#[test]
fn every_kind_of_processor_comes_to_the_same() -> Result<()> {
    let model = model("llama")?;
    let adaptation = shaken("lora", &json!({"r": 3}), &model)?;
    for compute in [Compute::F32, Compute::Bf16] {
        let (loss, exact) = gradients(&model, &adaptation, &config(compute))?;
        for isa in Isa::tested() {
            // Kernels ask the thread that calls them; in a pool of one thread that is the one that was told.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            let run = || with_isa(isa, || gradients(&model, &adaptation, &config(compute)));
            let (other_loss, other) = pool.install(run)?;
            let bound = if compute == Compute::F32 { 1e-5 } else { 0.05 };
            assert!((other_loss.loss_sum - loss.loss_sum).abs() < bound * loss.loss_sum, "{isa:?} {compute:?}");
            let difference = apart(&exact, &other);
            assert!(difference < bound, "{isa:?} {compute:?}: {difference:e} apart");
        }
    }
    Ok(())
}

#[test]
fn packed_rows_have_the_gradients_of_rows_one_by_one() -> Result<()> {
    for name in ["llama", "mistral"] {
        let model = model(name)?;
        let adaptation = shaken("lora", &json!({"r": 3, "lora_dropout": 0.25}), &model)?;
        for compute in [Compute::Plain, Compute::F32] {
            let (packed_loss, packed) = gradients(&model, &adaptation, &config(compute))?;
            let one_by_one = TrainConfig { packing: false, ..config(compute) };
            let (loss, single) = gradients(&model, &adaptation, &one_by_one)?;
            assert!((packed_loss.loss_sum - loss.loss_sum).abs() < 1e-6 * loss.loss_sum, "{name} {compute:?}");
            let difference = apart(&single, &packed);
            assert!(difference < 1e-5, "{name} {compute:?}: {difference:e} apart");
        }
    }
    Ok(())
}

/// The loss of one row to the last bit, with the other rows of its pass changed, moved or gone.
#[test]
fn rows_of_a_pass_do_not_see_each_other() -> Result<()> {
    for (name, options) in [("llama", json!({"r": 3})), ("mistral", json!({"r": 3, "use_dora": true}))] {
        let model = model(name)?;
        let adaptation = shaken("lora", &options, &model)?;
        let all = rows(&model);
        let silent = |example: &Example, shift: u32| {
            Example::new(
                example.ids.iter().map(|id| (id + shift) % model.architecture.vocab_size as u32).collect(),
                vec![false; example.ids.len()],
                0,
            )
        };
        for compute in [Compute::F32, Compute::Bf16] {
            for watched in [0, 4, 7] {
                let loss = |others: &dyn Fn(usize) -> Option<Example>, last: bool| -> Result<u64> {
                    let mut pass: Vec<Example> =
                        (0..all.len()).filter(|row| *row != watched).filter_map(others).collect();
                    let place = if last { pass.len() } else { watched.min(pass.len()) };
                    pass.insert(place, all[watched].clone());
                    let batch = Batch::of_examples(pass.iter().map(|example| (0, example)));
                    let pass = Pass::evaluation(&model, Some(&adaptation));
                    let outcome = trainer(&model, Some(&adaptation), compute).log_probs(&pass, &batch)?;
                    ensure!(!outcome.values.is_empty() && outcome.loss_sum > 0.0, "the watched row has a loss");
                    Ok(outcome.loss_sum.to_bits())
                };
                let alone = loss(&|_| None, false)?;
                assert_eq!(alone, loss(&|row| Some(silent(&all[row], 0)), false)?, "{name} {compute:?}: beside others");
                assert_eq!(
                    alone,
                    loss(&|row| Some(silent(&all[row], 7)), false)?,
                    "{name} {compute:?}: others changed"
                );
                assert_eq!(alone, loss(&|row| Some(silent(&all[row], 0)), true)?, "{name} {compute:?}: at the end");
            }
        }
    }
    Ok(())
}

#[test]
fn recomputation_changes_no_bit_in_fused_blocks() -> Result<()> {
    let model = model("mistral")?;
    for options in [json!({"r": 3, "lora_dropout": 0.3}), json!({"r": 3, "use_dora": true})] {
        let adaptation = shaken("lora", &options, &model)?;
        for compute in [Compute::F32, Compute::Bf16] {
            let kept = gradients(&model, &adaptation, &config(compute))?.1;
            let again = TrainConfig { gradient_checkpointing: true, ..config(compute) };
            assert_eq!(kept, gradients(&model, &adaptation, &again)?.1, "{options}, {compute:?}");
        }
    }
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_threads() -> Result<()> {
    let model = model("llama")?;
    let rows = examples(&model, 40, 1);
    let rows: Vec<&Example> = rows.iter().collect();
    let options = [json!({"r": 5, "lora_dropout": 0.2}), json!({"r": 5, "use_dora": true})];
    for (compute, options) in
        [Compute::F32, Compute::Bf16].into_iter().flat_map(|compute| options.iter().map(move |o| (compute, o)))
    {
        let by = |threads: usize| -> Result<(Vec<u64>, Vec<Vec<f32>>)> {
            let adaptation = adapt("lora", options, &model, 3)?;
            let config = TrainConfig { learning_rate: 1e-2, batch_size: 5, ..config(compute) };
            let mut losses = Vec::new();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            pool.install(|| {
                let mut observer = |step: &StepReport, _: u64| {
                    losses.push(step.loss.to_bits());
                    Ok(Control::Continue)
                };
                learn_on(&model, &adaptation, &rows, &config, &mut observer).map(drop)
            })?;
            let values = adaptation.params.iter().map(|param| Ok(param.var.flatten_all()?.to_vec1()?));
            Ok((losses, values.collect::<Result<_>>()?))
        };
        let one = by(1)?;
        assert_eq!(one.0.len(), 8);
        assert!(one == by(2)? && one == by(3)?, "{compute:?}, {options}");
    }
    Ok(())
}

/// Training in bf16 ends where training in f32 does.
#[test]
fn a_run_in_bf16_ends_within_a_part_in_a_hundred_of_one_in_f32() -> Result<()> {
    let model = model("llama")?;
    let rows = examples(&model, 32, 9);
    let rows: Vec<&Example> = rows.iter().collect();
    let after = |compute: Compute| -> Result<(f64, f64)> {
        let adaptation = adapt("lora", &json!({"r": 8}), &model, 3)?;
        let loss = |adaptation: &Adaptation| -> Result<f64> {
            Ok(evaluate_examples(&model, Some(adaptation), &rows, Compute::F32, |_| {})?.loss)
        };
        let before = loss(&adaptation)?;
        let config = TrainConfig { learning_rate: 1e-2, epochs: 10, ..config(compute) };
        learn_on(&model, &adaptation, &rows, &config, &mut |_: &StepReport, _| Ok(Control::Continue))?;
        Ok((before, loss(&adaptation)?))
    };
    let ((before, exact), (_, rounded)) = (after(Compute::F32)?, after(Compute::Bf16)?);
    assert!(exact < 0.8 * before, "{before} before, {exact} after");
    assert!((rounded - exact).abs() < 0.01 * exact, "{exact} in f32, {rounded} in bf16");
    Ok(())
}

#[test]
fn how_blocks_run_is_chosen_by_their_recipes_and_said() -> Result<()> {
    let model = model("llama")?;
    let words = |strategy: &str, options: Value| -> Result<String> {
        let adaptation = adapt(strategy, &options, &model, 3)?;
        Ok(trainer(&model, Some(&adaptation), Compute::Bf16).words())
    };
    assert_eq!(words("lora", json!({}))?, "bf16, fused blocks");
    assert_eq!(words("lora", json!({"use_dora": true}))?, "bf16, fused blocks");
    // What dropout takes from the input is missing from the change alone: two frozen products, which no block has.
    let dropped = words("lora", json!({"use_dora": true, "lora_dropout": 0.1}))?;
    assert_eq!(
        dropped,
        "bf16, fused blocks; all of its layers plain in f32"
            .replace("all of its", &format!("{0} of {0}", model.layers.len()))
    );
    assert_eq!(words("full", json!({}))?, "f32, plain blocks");
    let layers = model.layers.len();
    let ia3 = json!({"target_modules": r".*layers\.0\.self_attn\.k_proj", "feedforward_modules": []});
    assert_eq!(words("ia3", ia3)?, format!("bf16, fused blocks; 1 of {layers} layers plain in f32"));
    assert_eq!(
        words("lora", json!({"target_modules": ["lm_head", "q_proj"]}))?,
        "bf16, fused blocks; the head plain in f32"
    );
    Ok(())
}

/// Both round: weights alike, activations to eight bits in groups. As with bf16, gradients point the same way and the loss is the same
/// to a part in a hundred.
#[test]
fn products_in_integers_are_near_those_in_floats() -> Result<()> {
    // The head's weight apart, and that of the embedding.
    for name in ["llama", "llama-tied"] {
        let model = store_as(&model(name)?, &StoredAs::Codec(Codec::int8()), None, |_, _| {})?;
        for (strategy, options) in strategies() {
            let adaptation = shaken(strategy, &options, &model)?;
            let (loss, exact) = gradients(&model, &adaptation, &config(Compute::F32))?;
            let (rounded_loss, rounded) = gradients(&model, &adaptation, &config(Compute::Int8))?;
            assert!(rounded_loss.loss_sum != loss.loss_sum, "{name}, {options}: nothing was computed in integers");
            let loss_apart = (rounded_loss.loss_sum - loss.loss_sum).abs() / loss.loss_sum;
            assert!(loss_apart < 0.01, "{name}, {options}: loss {loss_apart} apart");
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            let cosine = dot(&exact, &rounded) / (dot(&exact, &exact) * dot(&rounded, &rounded)).sqrt();
            assert!(cosine > 0.995, "{name}, {options}: cosine {cosine}");
        }
        let words = trainer(&model, None, Compute::Int8).words();
        assert!(words.contains("frozen weights in integers"), "{words}");
    }
    Ok(())
}

/// Weights that depend on the log-probabilities of all targets of a pass: the gradients of plain blocks, and with weights that are all
/// alike the bits of a pass that was told so beforehand.
#[test]
fn targets_are_weighed_by_their_log_probabilities() -> Result<()> {
    for name in ["llama", "qwen2", "gemma2"] {
        let model = model(name)?;
        let adaptation = shaken("lora", &json!({"r": 3, "lora_alpha": 5}), &model)?;
        let rows = rows(&model);
        let numbered: Vec<(u32, &Example)> = (0..).zip(&rows).collect();
        let batch = Batch::of_examples(numbered.iter().copied());
        let run = |compute: Compute, weigh: Weigh<'_>| -> Result<(LogProbs, Vec<f64>)> {
            let pass = Pass::training(&model, &adaptation, 7, 0);
            let mut gradients = Gradients::new(adaptation.params.len());
            let mut backend = trainer(&model, Some(&adaptation), compute);
            let log_probs = backend.forward_backward(&pass, &batch, weigh, false, &mut gradients)?;
            let mut all = Vec::new();
            for index in 0..adaptation.params.len() {
                let gradient = gradients.get(index).context("every parameter has a gradient")?;
                all.extend(gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
            }
            Ok((log_probs, all))
        };
        let mut calls = 0;
        let mut weigh = |log_probs: &[f64]| {
            calls += 1;
            let least = log_probs.iter().copied().fold(0.0, f64::min);
            Ok(log_probs.iter().enumerate().map(|(i, p)| (p / least - 0.3) * (1 + i % 3) as f64).collect())
        };
        let (_, plain) = run(Compute::Plain, Weigh::By(&mut weigh))?;
        let (log_probs, fused) = run(Compute::F32, Weigh::By(&mut weigh))?;
        assert_eq!((calls, log_probs.values.len()), (2, batch.targets.len()));
        assert!((log_probs.loss_sum + log_probs.values.iter().sum::<f64>()).abs() < 1e-9);
        assert!(apart(&plain, &fused) < 2e-5, "{name}: {:e} apart", apart(&plain, &fused));
        let (_, alike) = run(Compute::F32, Weigh::Alike(0.25))?;
        assert!(apart(&alike, &fused) > 0.1, "{name}: weights change gradients");
        let mut constant = |log_probs: &[f64]| Ok(vec![0.25; log_probs.len()]);
        assert_eq!(run(Compute::F32, Weigh::By(&mut constant))?.1, alike, "{name}");
        let mut few = |log_probs: &[f64]| Ok(vec![0.25; log_probs.len() - 1]);
        let error = run(Compute::F32, Weigh::By(&mut few)).map(drop).expect_err("a weight is missing").to_string();
        assert!(error.contains("weights for"), "{error}");
    }
    Ok(())
}

/// Granite's vocabularies are odd, which bf16 words are not: their head runs fused in f32 beside layers in bf16.
#[test]
fn a_head_of_an_odd_vocabulary_is_fused_beside_layers_in_bf16() -> Result<()> {
    let model = model("granite")?;
    assert_eq!(model.architecture.vocab_size % 2, 1);
    let adaptation = shaken("lora", &json!({"r": 3, "lora_alpha": 5}), &model)?;
    let words = trainer(&model, Some(&adaptation), Compute::Bf16).words();
    assert!(words.starts_with("bf16, fused blocks") && !words.contains("plain"), "{words}");
    let (plain_loss, plain) = gradients(&model, &adaptation, &config(Compute::Plain))?;
    let (loss, bf16) = gradients(&model, &adaptation, &config(Compute::Bf16))?;
    let loss_apart = (loss.loss_sum - plain_loss.loss_sum).abs() / plain_loss.loss_sum;
    assert!(loss_apart < 1e-2 && apart(&plain, &bf16) < 0.1, "{loss_apart:e}, {:e}", apart(&plain, &bf16));
    Ok(())
}
