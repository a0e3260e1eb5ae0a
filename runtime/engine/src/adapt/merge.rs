//! Merging: the adapted modules' effective weights in place of the frozen ones, and a model directory written of them.

use std::collections::BTreeSet;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Error, Result, bail, ensure};
use candle_core::{D, DType, Tensor};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::Storage;
use serde_json::{Value, json};

use crate::adapt::adaptation::Adaptation;
use crate::adapt::adapter::{pretty, write_templates, write_text};
use crate::files::{NewDirectory, SMALL_FILE_BYTES_MAX, parse_object, read_bytes, read_text};
use crate::models::weight::Weight;
use crate::models::{Architecture, BaseModel, EMBEDDING, HEAD, Module};
use crate::run::batch::Batch;
use crate::run::plain::recipe::Pass;
use crate::text::tokenizer::Tokenizer;
use crate::words::value_of;

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
    let mut architecture = model.architecture.clone();
    if architecture.tie_word_embeddings {
        let at = |path| model.module_index(path).context("a model has an embedding and a head");
        let (embedding, head) = (at(EMBEDDING)?, at(HEAD)?);
        let values = |index: usize| {
            let weight: &Weight = &modules[index].weight;
            weight.decode(0..weight.rows())
        };
        let adapted = adaptation.of(embedding).is_some() || adaptation.of(head).is_some();
        if adapted && values(embedding) != values(head) {
            architecture.tie_word_embeddings = false;
            modules[head].info.storage = HEAD.to_owned();
        } else {
            modules[head].weight = modules[embedding].weight.clone();
        }
    }
    model.with_modules(architecture, modules)
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
const UNTOUCHED: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"];

/// The file that says what ends an answer.
const GENERATION: &str = "generation_config.json";

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

impl FromStr for Floats {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let known = [
            ("f32", Self::F32),
            ("f16", Self::F16),
            ("bf16", Self::Bf16),
            ("float32", Self::F32),
            ("float16", Self::F16),
            ("bfloat16", Self::Bf16),
        ];
        value_of(word, &known)
    }
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

/// Refuses a model that [`save_model`] cannot write, before hours go into its training.
///
/// # Errors
/// Why it has no form as a Hugging Face directory.
pub fn exportable(model: &BaseModel) -> Result<()> {
    exported(model).map(|_| ())
}

/// The architecture of transformers' model that computes what this one does.
fn exported(model: &BaseModel) -> Result<Architecture> {
    let architecture = model.architecture.exported()?;
    let biased: BTreeSet<String> =
        architecture.modules().into_iter().filter(|module| module.bias).map(|module| module.path).collect();
    let lost = model.modules.iter().find(|module| module.bias.is_some() && !biased.contains(&module.info.path));
    if let Some(module) = lost {
        let family = &architecture.model_type;
        bail!("{}: its bias has no form in a {family} model of transformers", module.info.path);
    }
    Ok(architecture)
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
    let architecture = exported(model)?;
    save_configuration(directory, model, base, &architecture, floats.name())?;
    let mut tensors = Vec::new();
    // A family has biases at all modules of a kind or at none.
    let biased: BTreeSet<String> =
        architecture.modules().into_iter().filter(|module| module.bias).map(|module| module.path).collect();
    for module in &model.modules {
        if module.info.path == HEAD && architecture.tie_word_embeddings {
            continue;
        }
        let shape = module.info.weight_shape();
        let order = if module.info.kind == ModuleKind::Norm { 0..1 } else { 0..module.weight.rows() };
        let mut push = |name: String, shape: Vec<usize>, values: &[f32]| -> Result<()> {
            let bytes = encode(values, floats).with_context(|| format!("tensor `{name}`"))?;
            tensors.push((name, shape, bytes));
            Ok(())
        };
        let mut values = module.weight.decode(order);
        if module.info.kind == ModuleKind::Norm && architecture.norm_offset != 0.0 {
            values.iter_mut().for_each(|value| *value -= architecture.norm_offset);
        }
        push(format!("{}.weight", module.info.path), shape, &values)?;
        let zeros = || Arc::new(vec![0.0; module.info.d_out]);
        if biased.contains(&module.info.path) {
            push(
                format!("{}.bias", module.info.path),
                vec![module.info.d_out],
                &module.bias.clone().unwrap_or_else(zeros),
            )?;
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
/// GGUF file holds. A tokenizer and template that an adapter brought are in place of the base's.
fn save_configuration(
    directory: &NewDirectory,
    model: &BaseModel,
    base: &BaseModel,
    architecture: &Architecture,
    dtype: &str,
) -> Result<()> {
    let tokenizer = &model.tokenizer;
    let text = |name: &str| read_text(&base.path.join(name), SMALL_FILE_BYTES_MAX);
    let read = |name: &str| -> Result<Value> { parse_object(&base.path.join(name), &text(name)?) };
    let there = |name: &str| base.path.is_dir() && base.path.join(name).exists();
    let json = match base.path.is_dir() {
        true => {
            let mut own = Value::Object(architecture.config.clone());
            // What is written are floats, whatever the base was stored as.
            if let Some(own) = own.as_object_mut() {
                own.shift_remove("quantization_config");
            }
            own["tie_word_embeddings"] = architecture.tie_word_embeddings.into();
            let dtype_key = if own.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
            own[dtype_key] = dtype.into();
            own
        }
        false => architecture.to_json(dtype, tokenizer)?,
    };
    directory.write("config.json", pretty(&json)?.as_bytes())?;
    let generation = there(GENERATION).then(|| read(GENERATION)).transpose()?;
    directory.write(GENERATION, pretty(&generation_config(generation, tokenizer))?.as_bytes())?;
    if !base.path.is_dir() || model.text_from.is_some() {
        return write_text(directory, tokenizer);
    }
    for name in UNTOUCHED.iter().filter(|name| there(name)) {
        directory.write(name, &read_bytes(&base.path.join(name), SMALL_FILE_BYTES_MAX)?)?;
    }
    let mut tokenizer_config = tokenizer.config_json();
    if there("tokenizer_config.json") {
        let own = read("tokenizer_config.json")?;
        let template = tokenizer_config.get("chat_template").cloned();
        tokenizer_config = own;
        if let (None, Some(template)) = (tokenizer_config.get("chat_template"), template) {
            tokenizer_config["chat_template"] = template;
        }
    }
    directory.write("tokenizer_config.json", pretty(&tokenizer_config)?.as_bytes())?;
    write_templates(directory, tokenizer)
}

/// What a model generates by: the base's own, with every token that ends an answer. Other programs do not look for those in the chat
/// template.
fn generation_config(own: Option<Value>, tokenizer: &Tokenizer) -> Value {
    let mut config = own.unwrap_or_else(|| json!({"bos_token_id": tokenizer.bos_id}));
    let listed = match &config["eos_token_id"] {
        Value::Array(ids) => ids.clone(),
        id => vec![id.clone()],
    };
    let missing = |id: &u32| !listed.contains(&json!(id));
    if let Some(config) = config.as_object_mut().filter(|_| tokenizer.eos_ids.iter().any(missing)) {
        config.insert("eos_token_id".to_owned(), json!(tokenizer.eos_ids));
    }
    config
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
