//! Models and adapters as GGUF files: read back by the reader of such files, beside what was trained.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::export::gguf::{FileType, Plan};
use homeroom_engine::export::{Floats, save_gguf_lora};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::files::gguf::{Gguf, Value};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_kernels::Storage;
use serde_json::json;

use crate::fused::shaken;
use crate::support::{Place, distance, fixture, homeroom, model, printed_json, succeeds};

/// Directories of models whose files mean the same, and files.
const MODELS: [&str; 29] = [
    "llama",
    "llama-tied",
    "llama-linear",
    "llama3-rope",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen3",
    "qwen3-yarn",
    "smollm3",
    "phi3",
    "phi4-mini",
    "granite",
    "granite4",
    "olmo2",
    "llama-gguf/model-f32.gguf",
    "llama-gguf/model-mixed.gguf",
    "llama-gguf-split/model-mixed-00001-of-00003.gguf",
    "llama3-gguf/model.gguf",
    "llama-linear/model.gguf",
    "qwen3/model.gguf",
    "qwen3-yarn/model.gguf",
    "smollm3/model.gguf",
    "phi3/model-mixed.gguf",
    "phi4-mini/model.gguf",
    "granite/model.gguf",
    "granite4/model.gguf",
    "gemma2/model.gguf",
    "gemma3/model.gguf",
];

fn logits(pass: &Pass<'_>) -> Result<Vec<f32>> {
    let ids: Vec<u32> = (3..40).collect();
    Ok(pass.logits(&Batch::of_tokens(&ids, 0))?.flatten_all()?.to_vec1()?)
}

fn export(place: &Place, model: &BaseModel, adaptation: Option<&Adaptation>, kind: FileType) -> Result<PathBuf> {
    let directory = NewDirectory::start(&place.path("outputs/export"))?;
    let merged = Merged::new(model, adaptation)?;
    Plan::new(&merged, kind, "a name")?.write(&directory, "model.gguf", &merged)?;
    Ok(directory.publish()?.join("model.gguf"))
}

/// Names, orders of rows, norms, scales and ropes are those that the reader of such files, and llama.cpp, know.
#[test]
fn gguf_exports_of_every_family_answer_as_what_was_trained() -> Result<()> {
    let place = Place::new()?;
    for name in MODELS {
        let model = model(name)?;
        let adaptation = shaken("lora", &json!({"r": 3}), &model)?;
        for adaptation in [None, Some(&adaptation)] {
            let trained = logits(&Pass::evaluation(&model, adaptation))?;
            let largest = trained.iter().fold(0f32, |most, logit| most.max(logit.abs()));
            let written = BaseModel::load(&export(&place, &model, adaptation, FileType::F32)?)?;
            let apart = distance(&trained, &logits(&Pass::evaluation(&written, None))?) / largest;
            ensure!(apart < 2e-5, "{name}: a logit is {apart:e} apart");
            for text in ["", "Hello, wörld!\n", "<|im_start|>user\n12 + 345<|im_end|>", "  a\tb  "] {
                let ids = |model: &BaseModel| model.tokenizer.encode(text, true).map(|encoded| encoded.ids);
                assert_eq!(ids(&written)?, ids(&model)?, "{name}: {text:?}");
            }
            assert_eq!(written.tokenizer.template_digest(), model.tokenizer.template_digest(), "{name}");
            assert_eq!(written.tokenizer.eos_ids, model.tokenizer.eos_ids, "{name}");
        }
    }
    Ok(())
}

/// A Gemma whose scores are scaled by another width than the heads', and NTK: llama.cpp computes neither.
#[test]
fn what_a_gguf_file_cannot_say_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    for (name, words) in
        [("gemma2", "the scale of scores"), ("gemma3", "the scale of scores"), ("llama-dynamic", "`dynamic`")]
    {
        let error = export(&place, &model(name)?, None, FileType::F32).expect_err(name);
        let error = format!("{error:#}");
        assert!(error.contains(words) && error.contains("export `merged`"), "{name}: {error}");
    }
    // llama.cpp has no place for the head of a Gemma 2, and for those of others it has.
    for (name, has) in [("gemma2/model.gguf", false), ("gemma3/model.gguf", true)] {
        let model = model(name)?;
        let adaptation = shaken("lora", &json!({"r": 3, "target_modules": ["embed_tokens"]}), &model)?;
        let saved = export(&place, &model, Some(&adaptation), FileType::F32);
        assert_eq!(saved.is_ok(), has, "{name}");
    }
    Ok(())
}

/// What is adapted comes anew, all else is byte for byte as it was.
#[test]
fn a_gguf_base_keeps_its_metadata_and_the_bytes_of_what_was_not_adapted() -> Result<()> {
    let place = Place::new()?;
    for name in ["llama3-gguf/model.gguf", "gemma3/model.gguf", "llama-gguf/model-f32.gguf", "phi3/model.gguf"] {
        let model = model(name)?;
        let adaptation = shaken("lora", &json!({"r": 3, "target_modules": ["down_proj"]}), &model)?;
        let before = Gguf::open(&model.path)?;
        let after = Gguf::open(&export(&place, &model, Some(&adaptation), FileType::F32)?)?;
        let entries = |gguf: &Gguf| -> BTreeMap<String, Value> {
            // What was trained is another model, and called otherwise.
            let anew = ["general.file_type", "general.quantization_version", "general.name"];
            gguf.entries()
                .filter(|(key, _)| !anew.contains(&key.as_str()))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        assert_eq!(entries(&before), entries(&after), "{name}");
        assert_eq!(after.str("general.name")?, Some("a name"));
        assert_eq!(after.u64("general.file_type")?, Some(0));
        assert_eq!(before.tensors().count(), after.tensors().count(), "{name}");
        for tensor in before.tensors() {
            let same = before.mapped(tensor).bytes() == after.mapped(after.tensor(&tensor.name)?).bytes();
            assert_eq!(same, !tensor.name.ends_with("ffn_down.weight"), "{name}: {}", tensor.name);
        }
    }
    // Of a mixed file those that have the storage that is asked for.
    let model = model("llama-gguf/model-mixed.gguf")?;
    let before = Gguf::open(&model.path)?;
    let after = Gguf::open(&export(&place, &model, None, FileType::Q4_0)?)?;
    let stored = |gguf: &Gguf, storage| gguf.tensors().filter(|t| t.storage == storage && t.shape.len() == 2).count();
    ensure!(stored(&before, Storage::Q4_0) > 0 && stored(&after, Storage::Q4_0) > stored(&before, Storage::Q4_0));
    for tensor in before.tensors().filter(|tensor| tensor.storage == Storage::Q4_0) {
        let written = after.tensor(&tensor.name)?;
        if written.storage == Storage::Q4_0 {
            assert_eq!(before.mapped(tensor).bytes(), after.mapped(written).bytes(), "{}", tensor.name);
        }
    }
    Ok(())
}

/// Each type rounds, the coarser the more. (Rows of 64 and 160 values take other blocks than those of 256.)
#[test]
fn every_type_of_file_is_near_what_was_trained() -> Result<()> {
    let place = Place::new()?;
    let model = model("llama-gguf/model-f32.gguf")?;
    let trained = logits(&Pass::evaluation(&model, None))?;
    let types = [
        (FileType::F32, 1e-5),
        (FileType::F16, 1.2e-3),
        (FileType::Bf16, 9e-3),
        (FileType::Q8_0, 3e-2),
        (FileType::Q6K, 3e-2),
        (FileType::Q5KM, 0.2),
        (FileType::Q4KM, 0.25),
        (FileType::Q4_0, 0.5),
    ];
    let scale = (trained.iter().map(|logit| logit * logit).sum::<f32>() / trained.len() as f32).sqrt();
    for (kind, bound) in types {
        let written = BaseModel::load(&export(&place, &model, None, kind)?)?;
        let answers = logits(&Pass::evaluation(&written, None))?;
        let apart = trained.iter().zip(&answers).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / trained.len() as f32;
        let apart = apart.sqrt() / scale;
        ensure!(apart < bound, "{}: logits are {apart} apart", kind.name());
    }
    Ok(())
}

/// `W + alpha / r · B A`, tensor by tensor, of the base as a file, is the merged model as a file: rows of q and k, parts of fused modules
/// and scalings that differ are llama.cpp's.
#[test]
fn a_gguf_adapter_over_the_base_as_a_file_is_the_merged_model() -> Result<()> {
    let place = Place::new()?;
    let options = [
        json!({"r": 3, "lora_alpha": 5}),
        json!({"r": 4, "lora_alpha": 5, "use_rslora": true, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 7}}),
    ];
    for name in ["llama", "llama-gguf/model-f32.gguf", "qwen2", "granite4", "phi3", "smollm3", "mistral", "olmo2"] {
        let model = model(name)?;
        for options in &options {
            let adaptation = shaken("lora", options, &model)?;
            let base = Gguf::open(&export(&place, &model, None, FileType::F32)?)?;
            let values = |gguf: &Gguf, name: &str| gguf.mapped(gguf.tensor(name)?).values();
            let all = base
                .tensors()
                .map(|tensor| Ok((tensor.name.clone(), (tensor.shape.clone(), values(&base, &tensor.name)?))));
            let mut all = all.collect::<Result<BTreeMap<_, _>>>()?;
            let merged = Gguf::open(&export(&place, &model, Some(&adaptation), FileType::F32)?)?;
            let merged: BTreeMap<String, Vec<f32>> =
                all.keys().map(|name| Ok((name.clone(), values(&merged, name)?))).collect::<Result<_>>()?;

            let directory = NewDirectory::start(&place.path("outputs/lora"))?;
            save_gguf_lora(&directory, "lora.gguf", (&model, &adaptation), Floats::F32, "a name")?;
            let lora = Gguf::open(&directory.publish()?.join("lora.gguf"))?;
            let said = |key: &str| lora.str(key);
            assert_eq!((said("general.type")?, said("adapter.type")?), (Some("adapter"), Some("lora")));
            assert_eq!(said("general.architecture")?, base.str("general.architecture")?);
            let alpha = lora.f32("adapter.lora.alpha")?.context("it has an alpha")?;
            let mut adapted = 0;
            for tensor in lora.tensors() {
                let Some(target) = tensor.name.strip_suffix(".lora_a") else { continue };
                let (shape, weight) =
                    all.get_mut(target).with_context(|| format!("{target} is no tensor of the base"))?;
                let (a, b) = (values(&lora, &tensor.name)?, values(&lora, &format!("{target}.lora_b"))?);
                let (rank, cols) = (tensor.shape[0], tensor.shape[1]);
                assert_eq!((cols, b.len()), (shape[1], shape[0] * rank), "{target}");
                for (row, weights) in weight.chunks_mut(cols).enumerate() {
                    for (col, weight) in weights.iter_mut().enumerate() {
                        let update: f32 = (0..rank).map(|k| b[row * rank + k] * a[k * cols + col]).sum();
                        *weight += alpha / rank as f32 * update;
                    }
                }
                adapted += 1;
            }
            ensure!(adapted >= 4 * model.layers.len(), "{name}: {adapted} matrices are adapted");
            for (tensor, (_, values)) in &all {
                let apart = distance(values, &merged[tensor]);
                ensure!(apart < 1e-4, "{name} with {options}: {tensor} is {apart} apart");
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_no_plain_low_rank_update_is_refused_as_an_adapter() -> Result<()> {
    let place = Place::new()?;
    let refused = |name: &str, strategy: &str, options: serde_json::Value| -> Result<String> {
        let model = model(name)?;
        let adaptation = shaken(strategy, &options, &model)?;
        let directory = NewDirectory::start(&place.path("outputs/lora"))?;
        let saved = save_gguf_lora(&directory, "lora.gguf", (&model, &adaptation), Floats::F32, "a name");
        Ok(format!("{:#}", saved.expect_err("it has no form")))
    };
    for (name, strategy, options, words) in [
        ("llama", "lora", json!({"r": 3, "use_dora": true}), "DoRA"),
        ("llama", "full", json!({}), "something else than a low-rank update"),
        ("qwen3", "lora", json!({"r": 3, "target_modules": ["embed_tokens", "q_proj"]}), "embedding and head at once"),
    ] {
        let error = refused(name, strategy, options)?;
        assert!(error.contains(words) && error.contains("export `merged`"), "{strategy}: {error}");
    }
    Ok(())
}

/// As users run it.
#[test]
fn the_program_exports_to_gguf_and_says_what_was_rounded() -> Result<()> {
    let place = Place::new()?;
    let run = |arguments: &[&str], model: &Path, out: &Path| -> Result<(serde_json::Value, String)> {
        let mut command = homeroom();
        command
            .args(["export-model", "--json"])
            .args(arguments)
            .arg("--model-dir")
            .arg(model)
            .arg("--output-dir")
            .arg(out);
        let ran = succeeds(&mut command)?;
        Ok((printed_json(&ran)?, ran.stderr))
    };
    let out = place.path("colours-gguf");
    let (said, story) = run(&["--format", "gguf", "--dtype", "q4_k_m"], &fixture("models/llama"), &out)?;
    assert_eq!((said["file"].as_str(), said["dtype"].as_str()), (Some("llama-Q4_K_M.gguf"), Some("q4_k_m")));
    assert!(said["kl"].as_f64().is_some_and(|kl| kl.abs() < 1.0), "{said}");
    // Rows of 48 values are no whole blocks of 256, nor of 32.
    assert!(story.contains("F16 instead of Q4K"), "{story}");
    let written = Gguf::open(&out.join("llama-Q4_K_M.gguf"))?;
    assert_eq!((written.u64("general.file_type")?, written.str("general.name")?), (Some(15), Some("llama")));
    // An earlier export may be replaced, and nothing else.
    let (said, _) = run(&["--format", "gguf", "--overwrite"], &fixture("models/llama"), &out)?;
    assert_eq!(said["file"], "llama-Q8_0.gguf");
    assert_eq!(fs::read_dir(&out)?.count(), 1);
    Ok(())
}
