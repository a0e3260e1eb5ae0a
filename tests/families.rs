//! Every decoder family against transformers, PEFT and llama.cpp's files, from one table.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::{
    self, AdapterFiles, HOMEROOM_FILE, Record, StrategyRecord, WEIGHTS_FILE, serialize_f32,
};
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::data::Example;
use homeroom_engine::export::{Floats, save_model};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::inference::Engine;
use homeroom_engine::inference::generate::{Sampling, generate};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::backends::trainer;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::text::tokenizer::Tokenizer;
use homeroom_engine::train::schedule::Schedule;
use homeroom_engine::train::{Run, TrainConfig};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::foreign::write_tensors;
use crate::fused::{apart, bf16_is_near, config, gradients, shaken};
use crate::support::{
    Place, Values, adapt, adapt_stored, distance, expected, fixture, model, plan, stored_ids, tensors,
};

/// A directory that `make_families.py` writes, or writes beside.
struct Family {
    name: &'static str,
    /// Whether `make_models.py` writes the directory, which other tests list; answers are then in `families/`.
    old: bool,
    /// Files of llama.cpp's form, and what transformers makes of the model that each describes.
    gguf: &'static [(&'static str, &'static str)],
    /// The modules that PEFT trains, and all that it finds by `all-linear`.
    targets: &'static [&'static str],
    /// Whether PEFT's losses and gradient norms are among the answers.
    peft: bool,
    /// Whether there is a greedy continuation. With dynamic scaling it depends on what is cached.
    greedy: bool,
}

const LINEARS: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const FUSED: &[&str] = &["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
const SHARED: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear"];
const SAME: &[(&str, &str)] = &[("model.gguf", "expected.safetensors")];
/// A file of llama.cpp's form cannot say by what a Gemma scales its scores.
const OWN: &[(&str, &str)] = &[("model.gguf", "expected-gguf.safetensors")];
const MIXED: &[(&str, &str)] =
    &[("model.gguf", "expected.safetensors"), ("model-mixed.gguf", "expected-mixed.safetensors")];

const NEW: Family = Family { name: "", old: false, gguf: &[], targets: LINEARS, peft: true, greedy: true };
const OLD: Family = Family { old: true, ..NEW };

const FAMILIES: &[Family] = &[
    Family { name: "llama", ..OLD },
    Family { name: "mistral", ..OLD },
    Family { name: "qwen2", ..OLD },
    Family { name: "mistral-window", ..NEW },
    Family { name: "qwen3", gguf: SAME, ..NEW },
    Family { name: "qwen3-yarn", gguf: SAME, ..NEW },
    Family { name: "gemma3", gguf: OWN, ..NEW },
    Family { name: "smollm3", gguf: SAME, ..NEW },
    Family { name: "phi3", gguf: MIXED, targets: FUSED, ..NEW },
    Family { name: "phi4-mini", gguf: SAME, targets: FUSED, ..NEW },
    Family { name: "granite", gguf: SAME, ..NEW },
    Family { name: "gemma2", gguf: OWN, ..NEW },
    Family { name: "olmo2", gguf: SAME, ..NEW },
    Family { name: "gemma3-multimodal", peft: false, ..NEW },
    Family { name: "granite4", gguf: SAME, targets: SHARED, ..NEW },
    Family { name: "llama-linear", gguf: SAME, ..NEW },
    Family { name: "llama-dynamic", greedy: false, ..NEW },
];

impl Family {
    fn file(&self, name: &str) -> PathBuf {
        fixture("models").join(self.name).join(name)
    }

    /// What transformers and PEFT make of the directory.
    fn answers(&self) -> PathBuf {
        match self.old {
            true => fixture("families").join(format!("{}.safetensors", self.name)),
            false => self.file("expected.safetensors"),
        }
    }

    fn model(&self) -> Result<BaseModel> {
        model(self.name)
    }

    /// The directory and each file of llama.cpp's form, as models, with the file of their answers.
    fn forms(&self) -> Result<Vec<(String, BaseModel, PathBuf)>> {
        let mut forms = vec![(self.name.to_owned(), self.model()?, self.answers())];
        for (file, answers) in self.gguf {
            let name = format!("{}/{file}", self.name);
            forms.push((name.clone(), model(&name)?, self.file(answers)));
        }
        Ok(forms)
    }

    fn options(&self, alpha: u32) -> Value {
        json!({"r": 3, "lora_alpha": alpha, "target_modules": self.targets})
    }
}

/// Numbers of a tensor that holds f64.
fn doubles(file: &SafeTensors, name: &str) -> Result<Vec<f64>> {
    let words = file.tensor(name)?.data().chunks_exact(8).map(|word| word.try_into().map(f64::from_le_bytes));
    Ok(words.collect::<Result<_, _>>()?)
}

/// The adapter before its first step, by PEFT's names.
fn adapter(file: &SafeTensors) -> Result<BTreeMap<String, Values>> {
    let tensors = file.tensors().into_iter().filter(|(name, _)| name.contains("lora_"));
    let tensors = tensors.map(|(name, tensor)| {
        let words = tensor.data().chunks_exact(4).map(|word| word.try_into().map(f32::from_le_bytes));
        Ok((name, (tensor.shape().to_vec(), words.collect::<Result<_, _>>()?)))
    });
    tensors.collect()
}

#[test]
fn logits_of_every_family_equal_those_of_transformers() -> Result<()> {
    for family in FAMILIES.iter() {
        for (name, model, answers) in family.forms()? {
            let pass = Pass::evaluation(&model, None);
            for (ids, want) in expected(&answers)? {
                let logits = pass.logits(&Batch::of_tokens(&ids, 0))?.flatten_all()?.to_vec1::<f32>()?;
                let apart = distance(&logits, &want);
                assert!(apart < 1e-4, "{name}: a logit is {apart} away from transformers'");
            }
        }
    }
    Ok(())
}

/// What is cached is what the whole sequence would compute, in blocks of every kind, beyond windows and original contexts.
#[test]
fn greedy_tokens_of_every_family_equal_those_of_transformers() -> Result<()> {
    for family in FAMILIES.iter().filter(|family| family.greedy) {
        for (name, mut model, answers) in family.forms()? {
            let (prompt, want) = (stored_ids(&answers, "prompt")?, stored_ids(&answers, "greedy")?);
            // The continuation goes on past the end of a turn.
            let mut endless = Tokenizer::from_dir(&fixture("models").join(family.name))?;
            endless.eos_ids.clear();
            model.tokenizer = endless.into();
            let (model, max_tokens) = (Arc::new(model), want.len());
            for compute in [Compute::Plain, Compute::F32] {
                let engine = Engine::new(model.clone(), compute);
                let answer = generate(&engine, None, &prompt, Sampling { max_tokens, ..Sampling::default() })?;
                assert_eq!(answer.ids, want, "{name}, {compute:?}");
            }
        }
    }
    Ok(())
}

/// Beyond the original context all positions turn otherwise, also those that were read before: what is drawn is what a pass over the
/// whole sequence would draw. (transformers drops its cache there.)
#[test]
fn an_answer_that_outgrows_the_original_context_is_what_one_pass_would_draw() -> Result<()> {
    let mut model = model("phi4-mini")?;
    let mut endless = Tokenizer::from_dir(&model.path)?;
    endless.eos_ids.clear();
    model.tokenizer = endless.into();
    let model = Arc::new(model);
    let original = 24;
    let prompt = stored_ids(&fixture("models/phi4-mini/expected.safetensors"), "prompt")?[..original - 5].to_vec();
    let pass = Pass::evaluation(&model, None);
    let mut want = prompt.clone();
    let mut short = None;
    for _ in 0..14 {
        let logits = pass.logits(&Batch::of_tokens(&want, 0))?.get(want.len() - 1)?.to_vec1::<f32>()?;
        let likeliest = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).context("a token")?;
        want.push(likeliest as u32);
        if want.len() == original + 2 {
            let other = pass.logits(&Batch::of_piece(&want, 0, 1))?.get(want.len() - 1)?.to_vec1::<f32>()?;
            short = Some(distance(&other, &pass.logits(&Batch::of_tokens(&want, 0))?.get(want.len() - 1)?.to_vec1()?));
        }
    }
    ensure!(short.is_some_and(|apart| apart > 0.1), "the two sets of frequencies differ");
    for compute in [Compute::Plain, Compute::F32] {
        let engine = Engine::new(model.clone(), compute);
        for _ in 0..2 {
            // The second time over what was kept of the first.
            let answer = generate(&engine, None, &prompt, Sampling { max_tokens: 14, ..Sampling::default() })?;
            assert_eq!(answer.ids, want[prompt.len()..], "{compute:?}");
        }
    }
    Ok(())
}

#[test]
fn fused_blocks_of_every_family_have_the_loss_and_gradients_of_plain_ones() -> Result<()> {
    for family in FAMILIES.iter() {
        let model = family.model()?;
        let adaptation = shaken("lora", &family.options(5), &model)?;
        let (plain_loss, plain) = gradients(&model, &adaptation, &config(Compute::Plain))?;
        let (fused_loss, fused) = gradients(&model, &adaptation, &config(Compute::F32))?;
        let loss_apart = (fused_loss.loss_sum - plain_loss.loss_sum).abs() / plain_loss.loss_sum;
        assert!(loss_apart < 1e-6, "{}: loss {loss_apart:e} apart", family.name);
        let gradients_apart = apart(&plain, &fused);
        assert!(gradients_apart < 2e-5, "{}: gradients {gradients_apart:e} apart", family.name);
        let rounded = gradients(&model, &adaptation, &config(Compute::Bf16))?;
        match family.name {
            // Its weights rounded to bf16 and computed with in f32 already have gradients of 0.89 times the length.
            "smollm3" => {
                ensure!((rounded.0.loss_sum - fused_loss.loss_sum).abs() < 0.01 * fused_loss.loss_sum, "smollm3");
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let [own, other] = [&fused, &rounded.1].map(|gradients| dot(gradients, gradients).sqrt());
                let (cosine, length) = (dot(&fused, &rounded.1) / own / other, other / own);
                ensure!(cosine > 0.85 && (0.8..1.0).contains(&length), "smollm3: cosine {cosine}, length {length}");
            }
            name => bf16_is_near(name, &(fused_loss, fused), &rounded),
        }
    }
    Ok(())
}

/// Attention sees its own sequence only, and a rope takes each sequence's own length.
#[test]
fn no_family_sees_how_rows_are_packed_or_recomputed_or_shared_by_threads() -> Result<()> {
    for family in FAMILIES.iter() {
        let (model, name) = (family.model()?, family.name);
        let adaptation = shaken("lora", &family.options(5), &model)?;
        for compute in [Compute::Plain, Compute::F32, Compute::Bf16] {
            let (loss, kept) = gradients(&model, &adaptation, &config(compute))?;
            let again = TrainConfig { gradient_checkpointing: true, ..config(compute) };
            let recomputed = gradients(&model, &adaptation, &again)?;
            ensure!(recomputed.0.loss_sum == loss.loss_sum && recomputed.1 == kept, "{name}, {compute:?}: recomputed");
            if compute != Compute::Plain {
                for threads in [1, 2] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
                    let shared = pool.install(|| gradients(&model, &adaptation, &config(compute)))?.1;
                    ensure!(shared == kept, "{name}, {compute:?}: by {threads} threads");
                }
            }
            let single = TrainConfig { packing: false, ..config(compute) };
            let (single_loss, single) = gradients(&model, &adaptation, &single)?;
            let bound = if compute == Compute::Bf16 { 1e-2 } else { 2e-5 };
            let loss_apart = (single_loss.loss_sum - loss.loss_sum).abs() / loss.loss_sum;
            let gradients_apart = apart(&single, &kept);
            ensure!(
                loss_apart < bound && gradients_apart < bound,
                "{name}, {compute:?}: row by row the loss is {loss_apart:e} apart, gradients {gradients_apart:e}"
            );
        }
    }
    Ok(())
}

/// As PEFT does: every linear module but the head.
#[test]
fn all_linear_modules_of_every_family_are_those_that_peft_finds() -> Result<()> {
    for family in FAMILIES.iter() {
        let model = family.model()?;
        let layers = 0..model.layers.len();
        let mut wanted: Vec<(usize, &str)> =
            layers.flat_map(|layer| family.targets.iter().map(move |target| (layer, *target))).collect();
        wanted.sort_unstable();
        for options in [json!({"r": 2}), json!({"r": 2, "target_modules": "all-linear"})] {
            let plan = plan("lora", &options, &model)?;
            let mut found = Vec::new();
            for module in &plan.modules {
                let rest = module.path.strip_prefix("model.layers.").with_context(|| module.path.clone())?;
                let (layer, rest) = rest.split_once('.').context("a module lies in a layer")?;
                found.push((layer.parse()?, rest.rsplit('.').next().context("a module has a name")?));
            }
            found.sort_unstable();
            assert_eq!(found, wanted, "{}: {options}", family.name);
        }
    }
    Ok(())
}

/// A strategy, its options, and how layers run with it.
const STRATEGIES: [(&str, &str, &str); 7] = [
    ("lora", r#"{"r": 3}"#, "f32, fused blocks"),
    ("lora", r#"{"r": 3, "use_rslora": true}"#, "f32, fused blocks"),
    ("lora", r#"{"r": 3, "use_dora": true}"#, "f32, fused blocks"),
    // The head is fused.
    ("lora", r#"{"r": 3, "use_dora": true, "lora_dropout": 0.1}"#, "f32, fused blocks; all of its layers plain in f32"),
    ("qlora", r#"{"r": 3}"#, "f32, fused blocks"),
    ("int8", r#"{"r": 3}"#, "f32, fused blocks"),
    ("full", "{}", "f32, plain blocks"),
];

#[test]
fn every_strategy_trains_every_family() -> Result<()> {
    let trained = |ids: std::ops::Range<u32>| Example::new(ids.clone().collect(), vec![true; ids.len()], 0);
    let rows = [trained(3..40), trained(50..57)];
    for family in FAMILIES.iter() {
        for (strategy, options, words) in STRATEGIES {
            let (model, adaptation) = adapt_stored(strategy, &serde_json::from_str(options)?, family.model()?, 1)?;
            let what = format!("{} by {strategy} with {options}", family.name);
            let layers = model.layers.len();
            let words = words.replace("all of its", &format!("{layers} of {layers}"));
            assert_eq!(trainer(&model, Some(&adaptation), Compute::F32).words(), words, "{what}");
            for compute in [Compute::F32, Compute::Bf16] {
                let train = TrainConfig {
                    learning_rate: if strategy == "full" { 1e-3 } else { 1e-2 },
                    lr_scheduler_type: Schedule::Constant,
                    warmup_ratio: 0.0,
                    compute,
                    ..TrainConfig::default()
                };
                let mut run = Run::new(&model, &adaptation, &train, 6);
                let mut losses = Vec::new();
                for _ in 0..6 {
                    let report = run.step(&[Batch::of_examples((0..).zip(&rows))])?;
                    ensure!(report.loss.is_finite() && report.grad_norm > 0.0, "{what}: {report:?}");
                    losses.push(report.loss);
                }
                ensure!(losses[5] < 0.98 * losses[0], "{what}: losses {losses:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn every_family_learns_as_in_peft() -> Result<()> {
    let rows: Vec<Vec<Value>> = serde_json::from_str(&std::fs::read_to_string(fixture("families/rows.json"))?)?;
    let example = |row: &Value| -> Result<Example> {
        let ids = serde_json::from_value(row["ids"].clone())?;
        Ok(Example::new(ids, serde_json::from_value(row["trained"].clone())?, 0))
    };
    let steps = rows.iter().map(|rows| rows.iter().map(example).collect()).collect::<Result<Vec<Vec<Example>>>>()?;
    for family in FAMILIES.iter().filter(|family| family.peft) {
        let name = family.name;
        let bytes = std::fs::read(family.answers())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let (losses, norms) = (doubles(&file, "losses")?, doubles(&file, "grad_norms")?);
        ensure!(losses.len() == steps.len(), "{name}: {} losses of {} steps", losses.len(), steps.len());
        let model = family.model()?;
        for compute in [Compute::Plain, Compute::F32] {
            let mut adaptation = adapt("lora", &family.options(8), &model, 1)?;
            adaptation.load(adapter(&file)?).with_context(|| format!("the adapter of {name}"))?;
            let train = TrainConfig {
                learning_rate: 5e-3,
                lr_scheduler_type: Schedule::Constant,
                warmup_ratio: 0.0,
                weight_decay: 0.0,
                max_grad_norm: 1.0,
                compute,
                ..TrainConfig::default()
            };
            let mut run = Run::new(&model, &adaptation, &train, steps.len() as u64);
            for (number, rows) in steps.iter().enumerate() {
                let report = run.step(&[Batch::of_examples((0..).zip(rows))])?;
                for (what, got, want, bound) in
                    [("loss", report.loss, losses[number], 1e-5), ("norm", report.grad_norm, norms[number], 3e-4)]
                {
                    let apart = (got - want).abs() / want;
                    ensure!(apart <= bound, "{name}, {compute:?}, step {number}: {what} {got}, PEFT has {want}");
                }
            }
        }
    }
    Ok(())
}

/// Logits of a text that goes beyond every window and original context.
fn logits(pass: &Pass) -> Result<Vec<f32>> {
    let ids: Vec<u32> = (3..40).collect();
    Ok(pass.logits(&Batch::of_tokens(&ids, 0))?.flatten_all()?.to_vec1()?)
}

/// Norms are written as the family's files hold them, modules by its names, and what a GGUF file says in its configuration's words.
#[test]
fn exports_of_every_family_answer_as_what_was_trained() -> Result<()> {
    let place = Place::new()?;
    for family in FAMILIES.iter() {
        for (name, model, _) in family.forms()? {
            for (strategy, options) in [("lora", json!({"r": 3})), ("full", json!({}))] {
                let adaptation = shaken(strategy, &options, &model)?;
                let directory = NewDirectory::start(&place.path("outputs/export"))?;
                save_model(&directory, &Merged::new(&model, Some(&adaptation))?, Floats::F32)?;
                let export = directory.publish()?;
                let written = BaseModel::load(&export)?;
                assert_eq!(written.architecture.layers, model.architecture.layers, "{name}");
                assert_eq!(written.architecture.ropes, model.architecture.ropes, "{name}");
                let trained = logits(&Pass::evaluation(&model, Some(&adaptation)))?;
                let exported = logits(&Pass::evaluation(&written, None))?;
                let largest = trained.iter().fold(0f32, |most, logit| most.max(logit.abs()));
                let apart = distance(&trained, &exported) / largest;
                ensure!(apart < 2e-5, "{name} by {strategy}: a logit is {apart:e} apart");
                fs::remove_dir_all(&export)?;
            }
        }
    }
    Ok(())
}

/// transformers loads the whole of a model of several parts, so PEFT has that whole's names for the modules of the part that writes
/// text; on that part alone it has others, and older versions had others for the whole.
#[test]
fn an_adapter_of_a_part_is_read_by_whatever_names_its_modules_have() -> Result<()> {
    let place = Place::new()?;
    let model = model("gemma3-multimodal")?;
    let options = json!({"r": 3, "lora_alpha": 5, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}});
    let adaptation = shaken("lora", &options, &model)?;
    let strategy = StrategyRecord::default();
    let (data_digest, base_files, training) = (None, BTreeMap::default(), Value::Null);
    let record = Record { strategy: &strategy, data_digest, base_files, requantize: false, training };
    let directory = NewDirectory::start(&place.path("outputs/adapter"))?;
    adapter::save(&directory, &model, &adaptation, record)?;
    let saved = directory.publish()?;
    let config: Value = serde_json::from_slice(&fs::read(saved.join("adapter_config.json"))?)?;
    assert_eq!(config["exclude_modules"], "(?!.*(language_model|lm_head)).*");
    let whole = "base_model.model.model.language_model.layers.";
    let stored = tensors(&saved.join(WEIGHTS_FILE))?;
    ensure!(stored.keys().all(|name| name.starts_with(whole)), "{:?}", stored.keys().next());

    let trained = logits(&Pass::evaluation(&model, Some(&adaptation)))?;
    let read = |path: &Path| -> Result<Vec<f32>> {
        let adaptation = AdapterFiles::read(path)?.adapt(&model, false)?;
        logits(&Pass::evaluation(&model, Some(&adaptation)))
    };
    assert_eq!(read(&saved)?, trained);
    fs::remove_file(saved.join(HOMEROOM_FILE))?;
    for prefix in [whole, "base_model.model.language_model.model.layers.", "base_model.model.model.layers."] {
        let named = stored.iter().map(|(name, (shape, values))| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name.replace(whole, prefix), shape.clone(), bytes)
        });
        fs::write(saved.join(WEIGHTS_FILE), serialize_f32(&named.collect::<Vec<_>>())?)?;
        assert_eq!(read(&saved)?, trained, "{prefix}");
    }
    Ok(())
}

/// As transformers: a head that lies beside the embedding with other values is not the embedding, whatever the configuration says.
#[test]
fn a_head_of_other_values_is_not_tied() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/qwen3"), "model")?;
    let tied = BaseModel::load(&copy)?;
    assert!(tied.architecture.tie_word_embeddings);
    let logits = |model: &BaseModel| -> Result<Vec<f32>> {
        Ok(Pass::evaluation(model, None).logits(&Batch::of_tokens(&[1, 40, 41, 42], 0))?.flatten_all()?.to_vec1()?)
    };
    // Before the file changes under it.
    let doubled: Vec<f32> = logits(&tied)?.iter().map(|logit| 2.0 * logit).collect();
    let weights = copy.join("model.safetensors");
    let mut stored = tensors(&weights)?;
    let embedding = stored["model.embed_tokens.weight"].clone();
    stored.insert("lm_head.weight".to_owned(), embedding.clone());
    write_tensors(&weights, stored.clone())?;
    assert!(BaseModel::load(&copy)?.architecture.tie_word_embeddings, "the same values are one parameter");
    let (shape, values) = embedding;
    stored.insert("lm_head.weight".to_owned(), (shape, values.iter().map(|value| 2.0 * value).collect()));
    write_tensors(&weights, stored)?;
    let apart = BaseModel::load(&copy)?;
    assert!(!apart.architecture.tie_word_embeddings);
    assert!(distance(&doubled, &logits(&apart)?) < 1e-4);
    Ok(())
}
