//! What must hold for every strategy and every run, whatever the numbers.

use anyhow::{Context, Result};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::adapter::{AdapterFiles, Record, StrategyRecord, save};
use homeroom_engine::adapt::merge::{Merged, merge};
use homeroom_engine::data::Example;
use homeroom_engine::export::{Floats, save_model};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::train::{Control, Run, StepReport, TrainConfig};
use homeroom_kernels::Stream;
use serde_json::{Value, json};

use crate::support::{adapt, distance, fixture, learn_on, model};

pub fn examples(model: &BaseModel, count: usize, seed: u64) -> Vec<Example> {
    let mut stream = Stream::new(seed, 4);
    let vocab = model.architecture.vocab_size;
    let example = |_| {
        let length = 2 + stream.below(30);
        let mut trained: Vec<bool> = (0..length).map(|t| t > 0 && stream.below(4) == 0).collect();
        trained[length - 1] = true;
        Example::new((0..length).map(|_| stream.below(vocab) as u32).collect(), trained, 0)
    };
    (0..count).map(example).collect()
}

fn logits(model: &BaseModel, adaptation: Option<&Adaptation>) -> Result<Vec<f32>> {
    let batch = Batch::of_tokens(&[1, 17, 290, 33, 5, 120, 77], 0);
    Ok(Pass::evaluation(model, adaptation).logits(&batch)?.flatten_all()?.to_vec1()?)
}

fn learn(model: &BaseModel, adaptation: &Adaptation, config: &TrainConfig, steps: u64) -> Result<Vec<StepReport>> {
    let rows = examples(model, 24, 1);
    let rows: Vec<&Example> = rows.iter().collect();
    let config = TrainConfig { max_steps: Some(steps), ..config.clone() };
    let report = learn_on(model, adaptation, &rows, &config, &mut |_: &StepReport, _| Ok(Control::Continue))?;
    Ok(report.steps)
}

fn strategies() -> Vec<(&'static str, Value)> {
    vec![
        ("lora", json!({"r": 3, "lora_alpha": 5})),
        ("lora", json!({"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]})),
        ("lora", json!({"r": 4, "use_rslora": true, "target_modules": r".*\.(up|down)_proj"})),
        ("lora", json!({"r": 2, "use_dora": true, "lora_dropout": 0.1})),
        ("full", json!({})),
        ("ia3", json!({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]})),
        ("vera", json!({"r": 5})),
    ]
}

/// A fresh adapter answers exactly as the base does, to f32 rounding.
#[test]
fn fresh_adapter_equals_base() -> Result<()> {
    for name in ["llama", "qwen2", "llama-gguf/model-mixed.gguf"] {
        let model = model(name)?;
        for (strategy, options) in strategies() {
            let adaptation = adapt(strategy, &options, &model, 3)?;
            let apart = distance(&logits(&model, None)?, &logits(&model, Some(&adaptation))?);
            assert!(apart < 2e-5, "{strategy} {options} on {name}: {apart}");
        }
    }
    Ok(())
}

/// Merging folds the update into W, so answers agree to f32 rounding; tied weights come apart when one side was trained.
#[test]
fn merged_equals_unmerged() -> Result<()> {
    for name in ["llama", "qwen2", "llama-gguf/model-mixed.gguf"] {
        let model = model(name)?;
        for (strategy, options) in strategies().into_iter().filter(|(strategy, _)| *strategy != "ia3") {
            let adaptation = adapt(strategy, &options, &model, 3)?;
            let learning_rate = if strategy == "vera" { 0.3 } else { 2e-2 };
            learn(&model, &adaptation, &TrainConfig { learning_rate, ..TrainConfig::default() }, 4)?;
            let unmerged = logits(&model, Some(&adaptation))?;
            assert!(
                distance(&unmerged, &logits(&model, None)?) > 0.05,
                "{strategy} {options} on {name}: it learned nothing"
            );
            let merged = merge(&model, &adaptation)?;
            let apart = distance(&unmerged, &logits(&merged, None)?);
            assert!(apart < 1e-3, "{strategy} {options} on {name}: {apart}");
            let directory = tempfile::tempdir()?;
            let started = NewDirectory::start(&directory.path().join("merged"))?;
            save_model(&started, &Merged::new(&model, Some(&adaptation))?, Floats::of(&model)?)?;
            let again = BaseModel::load(&started.publish()?)?;
            let stored = distance(&logits(&again, None)?, &logits(&merged, None)?);
            assert!(stored < 1e-6, "{strategy} {options} on {name}: {stored} after saving");
        }
    }
    Ok(())
}

#[test]
fn a_strategy_without_a_merged_recipe_is_not_merged() -> Result<()> {
    let model = model("llama")?;
    let adaptation = adapt("ia3", &json!({}), &model, 3)?;
    let error = merge(&model, &adaptation).err().context("IA3 gives no merged recipe")?;
    assert!(format!("{error:#}").contains("cannot be merged"), "{error:#}");
    Ok(())
}

/// Training changes trainable parameters, all of them, and nothing else.
#[test]
fn only_adapter_trains() -> Result<()> {
    let model = model("llama")?;
    let (digest, before) = (model.digest(), logits(&model, None)?);
    for (strategy, options) in strategies() {
        let adaptation = adapt(strategy, &options, &model, 3)?;
        let values = |adaptation: &Adaptation| -> Result<Vec<Vec<f32>>> {
            adaptation.params.iter().map(|param| Ok(param.var.flatten_all()?.to_vec1()?)).collect()
        };
        let first = values(&adaptation)?;
        learn(&model, &adaptation, &TrainConfig { learning_rate: 1e-2, ..TrainConfig::default() }, 4)?;
        for ((param, first), last) in adaptation.params.iter().zip(first).zip(values(&adaptation)?) {
            assert_eq!(first != last, param.spec.trainable, "{strategy}: {}", param.spec.tensor);
        }
    }
    assert_eq!((digest, before), (model.digest(), logits(&model, None)?));
    Ok(())
}

#[test]
fn a_parameter_without_a_gradient_stops_the_run_and_is_named() -> Result<()> {
    let model = model("llama")?;
    let adaptation = adapt("hostile", &json!({"how": "cut"}), &model, 3)?;
    let error = learn(&model, &adaptation, &TrainConfig::default(), 2).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("layers.0.self_attn.q_proj.shift") && text.contains("gets no gradient"), "{text}");
    Ok(())
}

#[test]
fn a_parameter_whose_gradient_stays_zero_stops_the_run_and_is_named() -> Result<()> {
    let model = model("llama")?;
    let adaptation = adapt("hostile", &json!({"how": "zero"}), &model, 3)?;
    let error = learn(&model, &adaptation, &TrainConfig::default(), 9).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("q_proj.shift") && text.contains("learns nothing"), "{text}");
    Ok(())
}

/// 8 = 8×1 = 4×2: how a step is cut into batches changes its loss and gradients by f32 rounding alone, however unequal the
/// rows are.
#[test]
fn accumulation_changes_nothing() -> Result<()> {
    let model = model("llama")?;
    let adaptation = adapt("lora", &json!({"r": 3, "lora_dropout": 0.25}), &model, 3)?;
    let mut rows = examples(&model, 8, 2);
    rows[3] = Example::new((0..97).collect(), (0..97).map(|t| t > 0).collect(), 0);
    let config = TrainConfig::default();
    let gradients = |batch_size: usize| -> Result<(f64, Vec<f64>)> {
        let numbered: Vec<(u32, &Example)> = (0..).zip(&rows).collect();
        let batches: Vec<Batch> =
            numbered.chunks(batch_size).map(|rows| Batch::of_examples(rows.iter().copied())).collect();
        let (outcome, gradients) = Run::new(&model, &adaptation, &config, 1).gradients(&batches)?;
        let mut all = Vec::new();
        for param in 0..adaptation.params.len() {
            let gradient = gradients.get(param).context("every parameter has a gradient")?;
            all.extend(gradient.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
        }
        Ok((outcome.loss_sum / outcome.trained as f64, all))
    };
    let (loss, whole) = gradients(8)?;
    let norm = whole.iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!(norm > 0.0);
    for batch_size in [1, 2, 4] {
        let (cut_loss, cut) = gradients(batch_size)?;
        assert!((cut_loss - loss).abs() <= 1e-6 * loss, "{batch_size} a batch: {cut_loss}, {loss}");
        let apart = whole.iter().zip(&cut).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(apart <= 1e-5 * norm, "{batch_size} a batch: gradients {apart} apart, norm {norm}");
    }
    Ok(())
}

/// A saved adapter is the trained one: same answers, with PEFT's names, and without its plugin.
#[test]
fn a_saved_adapter_answers_as_the_trained_one() -> Result<()> {
    let model = model("llama")?;
    for (strategy, options) in strategies().into_iter().filter(|(strategy, _)| *strategy != "full") {
        let adaptation = adapt(strategy, &options, &model, 3)?;
        learn(&model, &adaptation, &TrainConfig { learning_rate: 1e-2, ..TrainConfig::default() }, 3)?;
        let place = tempfile::tempdir()?;
        let started = NewDirectory::start(&place.path().join("adapter"))?;
        let record = Record {
            strategy: &StrategyRecord::default(),
            data_digest: None,
            base_files: Default::default(),
            requantize: false,
            training: Value::Null,
        };
        save(&started, &model, &adaptation, record)?;
        let files = AdapterFiles::read(&started.publish()?)?;
        let again = files.adapt(&model, false)?;
        assert_eq!(logits(&model, Some(&adaptation))?, logits(&model, Some(&again))?, "{strategy} {options}");
    }
    Ok(())
}

/// The engine makes the recipe for PEFT's adapters itself; it is the one that the `lora` plugin records.
#[test]
fn the_recipe_of_a_peft_adapter_is_the_plugins() -> Result<()> {
    for (name, base) in [("lora", "llama"), ("rslora", "llama"), ("dora", "qwen2")] {
        let model = model(base)?;
        let dir = fixture("curves").join(name);
        let curve: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("curve.json"))?)?;
        let ours = AdapterFiles::read(&dir.join("trained"))?.adapt(&model, false)?;
        let theirs = adapt("lora", &curve["config"]["options"], &model, 1)?;
        let modules = |adaptation: &Adaptation| {
            let plan = &adaptation.plan;
            let module = |m: &homeroom_abi::plan::AdaptedModule| {
                let params: Vec<_> = m.params.iter().map(|p| (p.tensor.clone(), p.shape.clone())).collect();
                (m.path.clone(), params, canonical(&plan.recipes[m.recipe]))
            };
            plan.modules.iter().map(module).collect::<Vec<_>>()
        };
        assert_eq!(modules(&ours), modules(&theirs), "{name}");
    }
    Ok(())
}

/// Recipes as formulas, so that the order in which nodes were recorded does not count.
fn canonical(recipes: &homeroom_abi::plan::Recipes) -> Vec<String> {
    let formula = |recipe: &homeroom_abi::recipe::Recipe| {
        let mut words: Vec<String> = Vec::new();
        for node in &recipe.nodes {
            let inputs: Vec<&str> = node.op.inputs().map(|input| words[input].as_str()).collect();
            let own = match &node.op {
                homeroom_abi::recipe::Op::Param(name) => name.clone(),
                homeroom_abi::recipe::Op::Scale(_, factor) => factor.to_string(),
                _ => String::new(),
            };
            words.push(format!("{}[{own}]({})", node.op.name(), inputs.join(", ")));
        }
        words.pop().unwrap_or_default()
    };
    [Some(&recipes.forward), recipes.merged_weight.as_ref()].into_iter().flatten().map(formula).collect()
}
