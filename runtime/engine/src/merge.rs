//! Merging: the adapted modules' effective weights in place of the frozen ones, and a model directory written of them.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::DType;
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::Storage;

use crate::adaptation::Adaptation;
use crate::adapter::pretty;
use crate::files::NewDirectory;
use crate::model::{BaseModel, EMBEDDING, HEAD, Module};
use crate::recipe::Pass;
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

/// Writes a model as a Hugging Face directory that transformers loads. Floats keep the base's type where it is f16 or bf16;
/// a quantised base becomes f32.
///
/// # Errors
/// When a file cannot be written.
pub fn save_model(directory: &NewDirectory, model: &BaseModel, base: &BaseModel) -> Result<()> {
    let embedding = base.module_index(EMBEDDING).context("a model has an embedding")?;
    let (dtype, dtype_name) = match base.modules[embedding].weight.storage() {
        Storage::F16 => (safetensors::Dtype::F16, "float16"),
        Storage::BF16 => (safetensors::Dtype::BF16, "bfloat16"),
        _ => (safetensors::Dtype::F32, "float32"),
    };
    let tokenizer = &model.tokenizer;
    let config = model.config.to_json(dtype_name, tokenizer.bos_id, &tokenizer.eos_ids)?;
    directory.write("config.json", pretty(&config)?.as_bytes())?;
    directory.write("tokenizer.json", tokenizer.to_json()?.as_bytes())?;
    directory.write("tokenizer_config.json", pretty(&tokenizer.config_json())?.as_bytes())?;
    if let Some(template) = &tokenizer.chat_template {
        directory.write("chat_template.jinja", template.as_bytes())?;
    }
    let generation = serde_json::json!({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids});
    directory.write("generation_config.json", pretty(&generation)?.as_bytes())?;
    let mut tensors = Vec::new();
    for module in &model.modules {
        if module.info.path == HEAD && model.config.tie_word_embeddings {
            continue;
        }
        let shape = module.info.weight_shape();
        let order = if module.info.kind == ModuleKind::Norm { 0..1 } else { 0..module.weight.rows() };
        tensors.push((format!("{}.weight", module.info.path), shape, encode(&module.weight.decode(order), dtype)));
        if let Some(bias) = &module.bias {
            tensors.push((format!("{}.bias", module.info.path), vec![bias.len()], encode(bias, dtype)));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes);
        Ok((name.as_str(), view.with_context(|| format!("tensor `{name}`"))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let file = directory.path().join("model.safetensors");
    safetensors::serialize_to_file(views, metadata, &file).context("model.safetensors: cannot write")
}

fn encode(values: &[f32], dtype: safetensors::Dtype) -> Vec<u8> {
    match dtype {
        safetensors::Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        safetensors::Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
