//! Every decoder family against transformers, PEFT and llama.cpp's files, from one table.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use homeroom_engine::data::Example;
use homeroom_engine::inference::Engine;
use homeroom_engine::inference::generate::{Sampling, generate};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::text::tokenizer::Tokenizer;
use homeroom_engine::train::schedule::Schedule;
use homeroom_engine::train::{Run, TrainConfig};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::fused::{apart, config, gradients, shaken};
use crate::support::{Values, adapt, distance, expected, fixture, model, stored_ids};

/// A directory that `make_families.py` writes, or writes beside.
struct Family {
    name: &'static str,
    /// Whether `make_models.py` writes the directory, which other tests list; answers are then in `families/`.
    old: bool,
    /// Files of llama.cpp's form, and what transformers makes of the model that each describes.
    gguf: &'static [(&'static str, &'static str)],
    /// The modules that PEFT calls by these names are trained.
    targets: &'static [&'static str],
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

const NEW: Family = Family { name: "", old: false, gguf: &[], targets: LINEARS, greedy: true };
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
    Family { name: "gemma3-multimodal", targets: &[], ..NEW },
    Family { name: "granite4", gguf: SAME, targets: SHARED, ..NEW },
    Family { name: "llama-linear", gguf: SAME, ..NEW },
    Family { name: "llama-dynamic", greedy: false, ..NEW },
];

/// The families that the engine runs; the others it refuses.
const RUNS: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "mistral-window",
    "qwen3",
    "qwen3-yarn",
    "gemma3",
    "smollm3",
    "phi3",
    "phi4-mini",
    "granite",
    "gemma2",
    "olmo2",
    "gemma3-multimodal",
    "granite4",
    "llama-linear",
    "llama-dynamic",
];

fn running() -> impl Iterator<Item = &'static Family> {
    FAMILIES.iter().filter(|family| RUNS.contains(&family.name))
}

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
fn families_are_refused_until_they_run() -> Result<()> {
    for family in FAMILIES {
        ensure!(family.answers().is_file(), "`{}` has no answers", family.name);
        let runs = RUNS.contains(&family.name);
        match family.model() {
            Err(error) if runs => return Err(error.context(family.name)),
            Ok(_) if !runs => anyhow::bail!("`{}` is read; does it belong in RUNS?", family.name),
            _ => {}
        }
    }
    ensure!(running().count() == RUNS.len(), "RUNS names a family that is not in the table");
    Ok(())
}

#[test]
fn logits_of_every_family_equal_those_of_transformers() -> Result<()> {
    for family in running() {
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
    for family in running().filter(|family| family.greedy) {
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
    for family in running().filter(|family| !family.targets.is_empty()) {
        let model = family.model()?;
        let adaptation = shaken("lora", &family.options(5), &model)?;
        let (plain_loss, plain) = gradients(&model, &adaptation, &config(Compute::Plain))?;
        let (fused_loss, fused) = gradients(&model, &adaptation, &config(Compute::F32))?;
        let loss_apart = (fused_loss.loss_sum - plain_loss.loss_sum).abs() / plain_loss.loss_sum;
        assert!(loss_apart < 1e-6, "{}: loss {loss_apart:e} apart", family.name);
        let gradients_apart = apart(&plain, &fused);
        assert!(gradients_apart < 2e-5, "{}: gradients {gradients_apart:e} apart", family.name);
    }
    Ok(())
}

#[test]
fn every_family_learns_as_in_peft() -> Result<()> {
    let rows: Vec<Vec<Value>> = serde_json::from_str(&std::fs::read_to_string(fixture("families/rows.json"))?)?;
    let example = |row: &Value| -> Result<Example> {
        let ids = serde_json::from_value(row["ids"].clone())?;
        Ok(Example { ids, trained: serde_json::from_value(row["trained"].clone())?, line: 0 })
    };
    let steps = rows.iter().map(|rows| rows.iter().map(example).collect()).collect::<Result<Vec<Vec<Example>>>>()?;
    for family in running().filter(|family| !family.targets.is_empty()) {
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
