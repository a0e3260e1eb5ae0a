//! Merging: the adapted modules' effective weights in place of the frozen ones, and a model directory written of them.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, DType, Tensor};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::Storage;
use serde_json::{Value, json};

use crate::adaptation::Adaptation;
use crate::adapter::pretty;
use crate::batch::Batch;
use crate::files::NewDirectory;
use crate::model::{BaseModel, EMBEDDING, HEAD, Module};
use crate::recipe::Pass;
use crate::tokenizer::TEMPLATES_DIR;
use crate::weight::Weight;

/// The model that an adapted one amounts to, as f32 where modules were adapted.
///
/// Tied weights stay tied when both sides come to the same values; else each side gets its own.
///
/// # Errors
/// When the strategy cannot be merged.
pub fn merge(model: &BaseModel, adaptation: &Adaptation) -> Result<BaseModel> {
    let pass = Pass::evaluation(model, Some(adaptation));
    let mut modules = Vec::with_capacity(model.modules.len());
    for (index, module) in model.modules.iter().enumerate() {
        if adaptation.of(index).is_none() {
            modules.push(module.clone());
            continue;
        }
        let (weight, bias) = pass.merged(index)?;
        let values: Vec<f32> = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let weight = Weight::from_values(&values, (module.weight.rows(), module.weight.cols()))?;
        let bias = match bias {
            Some(bias) => Some(Arc::new(bias.to_dtype(DType::F32)?.to_vec1()?)),
            None => module.bias.clone(),
        };
        let mut info = module.info.clone();
        info.bias = bias.is_some();
        modules.push(Module { info, weight: Arc::new(weight), bias });
    }
    let mut config = model.config.clone();
    if config.tie_word_embeddings {
        let at = |path| model.module_index(path).context("a model has an embedding and a head");
        let (embedding, head) = (at(EMBEDDING)?, at(HEAD)?);
        let values = |index: usize| {
            let weight: &Weight = &modules[index].weight;
            weight.decode(0..weight.rows())
        };
        let adapted = adaptation.of(embedding).is_some() || adaptation.of(head).is_some();
        if adapted && values(embedding) != values(head) {
            config.tie_word_embeddings = false;
            modules[head].info.storage = HEAD.to_owned();
        } else {
            modules[head].weight = modules[embedding].weight.clone();
        }
    }
    model.with_modules(config, modules)
}

/// Mean Kullback-Leibler divergence of `other`'s predictions from `model`'s over all positions of some token sequences, in
/// nats: what answering by `other` loses.
///
/// # Errors
/// When there is no position, or a tensor operation fails.
pub fn divergence(model: &Pass<'_>, other: &Pass<'_>, sequences: &[Vec<u32>]) -> Result<f64> {
    let (mut total, mut positions) = (0.0, 0);
    for ids in sequences.iter().filter(|ids| !ids.is_empty()) {
        let batch = Batch::of_tokens(ids, 0);
        let log_probabilities = |pass: &Pass<'_>| -> Result<Tensor> {
            Ok(candle_nn::ops::log_softmax(&pass.logits(&batch)?.to_dtype(DType::F64)?, D::Minus1)?)
        };
        let (p, q) = (log_probabilities(model)?, log_probabilities(other)?);
        total += (p.exp()? * (p - q)?)?.sum_all()?.to_scalar::<f64>()?;
        positions += ids.len();
    }
    ensure!(positions > 0, "there is no text to compare on");
    Ok(total / positions as f64)
}

/// Files of a Hugging Face directory that go into a directory made from it, byte for byte.
const UNTOUCHED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
];

/// Floats that a model is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floats {
    /// 32 bits: nothing is lost.
    F32,
    /// 16 bits, 11 of them of precision.
    F16,
    /// 16 bits, 8 of them of precision: a change of a weight by less than a 500th is lost.
    Bf16,
}

impl Floats {
    /// Those that a base is stored in; f32 where it is quantised.
    ///
    /// # Errors
    /// When it has no embedding.
    pub fn of(base: &BaseModel) -> Result<Self> {
        let embedding = base.module_index(EMBEDDING).context("a model has an embedding")?;
        Ok(match base.modules[embedding].weight.storage() {
            Storage::F16 => Self::F16,
            Storage::BF16 => Self::Bf16,
            _ => Self::F32,
        })
    }

    /// Their name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// Writes a model, made from `base`, as a Hugging Face directory that transformers loads. Chat templates stand in both places in
/// which readers look for them.
///
/// # Errors
/// When a file cannot be written.
pub fn save_model(directory: &NewDirectory, model: &BaseModel, base: &BaseModel, floats: Floats) -> Result<()> {
    let dtype = match floats {
        Floats::F32 => safetensors::Dtype::F32,
        Floats::F16 => safetensors::Dtype::F16,
        Floats::Bf16 => safetensors::Dtype::BF16,
    };
    save_configuration(directory, model, base, floats.name())?;
    let mut tensors = Vec::new();
    for module in &model.modules {
        if module.info.path == HEAD && model.config.tie_word_embeddings {
            continue;
        }
        let shape = module.info.weight_shape();
        let order = if module.info.kind == ModuleKind::Norm { 0..1 } else { 0..module.weight.rows() };
        let mut push = |name: String, shape: Vec<usize>, values: &[f32]| -> Result<()> {
            let bytes = encode(values, floats).with_context(|| format!("tensor `{name}`"))?;
            tensors.push((name, shape, bytes));
            Ok(())
        };
        push(format!("{}.weight", module.info.path), shape, &module.weight.decode(order))?;
        if let Some(bias) = &module.bias {
            push(format!("{}.bias", module.info.path), vec![bias.len()], bias)?;
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes);
        Ok((name.as_str(), view.with_context(|| format!("tensor `{name}`"))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let file = directory.path().join("model.safetensors");
    safetensors::serialize_to_file(views, metadata, &file).with_context(|| directory.cannot_write("model.safetensors"))
}

/// `config.json`, the tokenizer's files and the chat template: the base's own where it is a directory, else made from what a
/// GGUF file holds.
fn save_configuration(directory: &NewDirectory, model: &BaseModel, base: &BaseModel, dtype: &str) -> Result<()> {
    let tokenizer = &model.tokenizer;
    let read = |name: &str| -> Result<Value> {
        let path = base.path.join(name);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{}: not JSON", path.display()))
    };
    let mut config = model.config.to_json(dtype, tokenizer.bos_id, &tokenizer.eos_ids);
    let mut tokenizer_config = tokenizer.config_json();
    if base.path.is_dir() {
        let mut own = read("config.json")?;
        // What is written are floats, whatever the base was stored as.
        if let Some(own) = own.as_object_mut() {
            own.shift_remove("quantization_config");
        }
        own["tie_word_embeddings"] = model.config.tie_word_embeddings.into();
        let dtype_key = if own.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        own[dtype_key] = dtype.into();
        config = Ok(own);
        for name in UNTOUCHED.iter().filter(|name| base.path.join(name).exists()) {
            let path = base.path.join(name);
            let bytes = std::fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
            directory.write(name, &bytes)?;
        }
        if base.path.join("tokenizer_config.json").exists() {
            let own = read("tokenizer_config.json")?;
            let template = tokenizer_config.get("chat_template").cloned();
            tokenizer_config = own;
            if let (None, Some(template)) = (tokenizer_config.get("chat_template"), template) {
                tokenizer_config["chat_template"] = template;
            }
        }
    } else {
        directory.write("tokenizer.json", tokenizer.to_json()?.as_bytes())?;
        let generation = json!({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids});
        directory.write("generation_config.json", pretty(&generation)?.as_bytes())?;
    }
    directory.write("config.json", pretty(&config?)?.as_bytes())?;
    directory.write("tokenizer_config.json", pretty(&tokenizer_config)?.as_bytes())?;
    if !tokenizer.named_templates.is_empty() {
        directory.subdirectory(Path::new(TEMPLATES_DIR))?;
    }
    for (name, template) in &tokenizer.named_templates {
        directory.write(&format!("{TEMPLATES_DIR}/{name}.jinja"), template.as_bytes())?;
    }
    match &tokenizer.chat_template {
        Some(template) if !base.path.join("chat_template.jinja").exists() => {
            directory.write("chat_template.jinja", template.as_bytes())
        }
        _ => Ok(()),
    }
}

/// Values as bytes; refuses those that only infinity would stand for.
fn encode(values: &[f32], floats: Floats) -> Result<Vec<u8>> {
    let narrowed = |value: f32| match floats {
        Floats::F16 => half::f16::from_f32(value).to_f32(),
        Floats::Bf16 => half::bf16::from_f32(value).to_f32(),
        Floats::F32 => value,
    };
    if let Some(value) = values.iter().find(|value| value.is_finite() && !narrowed(**value).is_finite()) {
        let name = floats.name();
        bail!("{value} is beyond what {name} holds; `--dtype f32` holds it, and bf16 all but the largest of f32");
    }
    Ok(match floats {
        Floats::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Floats::Bf16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Floats::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_never_written_as_infinity() {
        for (value, floats) in [(70_000.0, Floats::F16), (-1e6, Floats::F16), (f32::MAX, Floats::Bf16)] {
            let error = encode(&[1.0, value], floats).unwrap_err().to_string();
            assert!(error.contains(floats.name()) && error.contains("--dtype f32"), "{error}");
        }
        assert_eq!(encode(&[65_504.0, f32::INFINITY], Floats::F16).unwrap(), [0xFF, 0x7B, 0x00, 0x7C]);
        assert_eq!(encode(&[f32::MAX], Floats::F32).unwrap(), f32::MAX.to_le_bytes());
    }
}
