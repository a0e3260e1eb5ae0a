//! A model as a Hugging Face directory, which transformers and most other programs load.
//!
//! Weights are written one after the other, a panel of rows at a time, so that a model needs no more memory than its largest adapted matrix.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use homeroom_abi::plan::ModuleKind;
use serde_json::{Value, json};

use super::Floats;
use super::shards::{Planned, total_bytes, write_shards};
use crate::adapt::adapter::{pretty, write_templates, write_text};
use crate::adapt::merge::Merged;
use crate::files::{NewDirectory, SMALL_FILE_BYTES_MAX, parse_object, read_bytes, read_text};
use crate::models::{Architecture, BaseModel, HEAD, Module};
use crate::text::tokenizer::Tokenizer;

/// Files of a Hugging Face directory that go into a directory made from it, byte for byte.
const UNTOUCHED: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"];

/// The file that says what ends an answer.
const GENERATION: &str = "generation_config.json";

/// Refuses a model that [`save_model`] cannot write, before hours go into its training.
///
/// # Errors
/// Why it has no form as a Hugging Face directory.
pub fn exportable(model: &BaseModel) -> Result<()> {
    exported(model, &model.architecture).map(|_| ())
}

/// The architecture of transformers' model that computes what this one does.
fn exported(model: &BaseModel, architecture: &Architecture) -> Result<Architecture> {
    let architecture = architecture.exported()?;
    let biased = biased(&architecture);
    let lost = model.modules.iter().find(|module| module.bias.is_some() && !biased.contains(&module.info.path));
    if let Some(module) = lost {
        let family = &architecture.model_type;
        bail!("{}: its bias has no form in a {family} model of transformers", module.info.path);
    }
    Ok(architecture)
}

/// Largest file of weights, in bytes; a model with more lies in several. That of transformers.
pub const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// Writes a model as a Hugging Face directory that transformers loads. Chat templates stand in both places in which readers look for
/// them.
///
/// # Errors
/// When the model has no such form, a value is beyond the floats, or a file cannot be written.
pub fn save_model(directory: &NewDirectory, merged: &Merged<'_>, floats: Floats) -> Result<()> {
    save_model_in(directory, merged, floats, SHARD_BYTES_MAX)
}

/// As [`save_model`], in files of at most so many bytes of weights; a tensor that is larger is a file of its own.
///
/// # Errors
/// As [`save_model`].
pub fn save_model_in(directory: &NewDirectory, merged: &Merged<'_>, floats: Floats, shard_bytes: u64) -> Result<()> {
    let base = merged.base();
    let architecture = exported(base, merged.architecture())?;
    save_configuration(directory, base, &architecture, floats.name())?;
    let offset = architecture.norm_offset;
    // A module with a bias is merged once for both.
    let mut last: Option<(usize, Module)> = None;
    write_shards(directory, &planned(merged, &architecture), floats, shard_bytes, |tensor, write| {
        let index = tensor.of.module;
        if last.as_ref().is_none_or(|(of, _)| *of != index) {
            drop(last.take());
            last = Some((index, merged.module(index)?));
        }
        let Some((_, module)) = &last else { bail!("module {index} is not there") };
        if tensor.of.bias {
            return match &module.bias {
                Some(bias) => write(bias),
                None => write(&vec![0.0; module.info.d_out]),
            };
        }
        for rows in module.weight.panels() {
            let mut values = module.weight.decode(rows);
            if module.info.kind == ModuleKind::Norm && offset != 0.0 {
                values.iter_mut().for_each(|value| *value -= offset);
            }
            write(&values)?;
        }
        module.weight.release();
        Ok(())
    })
}

/// The bytes of the weights that [`save_model`] writes.
///
/// # Errors
/// When the model has no such form.
pub fn model_bytes(merged: &Merged<'_>, floats: Floats) -> Result<u64> {
    let architecture = exported(merged.base(), merged.architecture())?;
    Ok(total_bytes(&planned(merged, &architecture), floats))
}

/// Where the values of a tensor come from.
struct Part {
    module: usize,
    bias: bool,
}

/// The tensors of a model, in the order of its modules.
fn planned(merged: &Merged<'_>, architecture: &Architecture) -> Vec<Planned<Part>> {
    // A family has biases at all modules of a kind or at none.
    let biased = biased(architecture);
    let mut tensors = Vec::new();
    for (module, Module { info, .. }) in merged.base().modules.iter().enumerate() {
        if info.path == HEAD && architecture.tie_word_embeddings {
            continue;
        }
        let name = format!("{}.weight", info.path);
        tensors.push(Planned { name, shape: info.weight_shape(), of: Part { module, bias: false } });
        if biased.contains(&info.path) {
            let name = format!("{}.bias", info.path);
            tensors.push(Planned { name, shape: vec![info.d_out], of: Part { module, bias: true } });
        }
    }
    tensors
}

/// The paths of the modules that have a bias.
fn biased(architecture: &Architecture) -> BTreeSet<String> {
    architecture.modules().into_iter().filter(|module| module.bias).map(|module| module.path).collect()
}

/// `config.json`, the tokenizer's files and the chat template: the base's own where it is a directory, else made from what a
/// GGUF file holds. A tokenizer and template that an adapter brought are in place of the base's.
fn save_configuration(
    directory: &NewDirectory,
    base: &BaseModel,
    architecture: &Architecture,
    dtype: &str,
) -> Result<()> {
    let tokenizer = &base.tokenizer;
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
    if !base.path.is_dir() || base.text_from.is_some() {
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
