//! Llama 2 to 3.3, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama and others of that shape.
//!
//! Source: Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>, section 2.2.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{Family, mistral};
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, LayerSpec};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "llama",
    part_of: None,
    class: "LlamaForCausalLM",
    known_as: "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama; DeepSeek-R1-Distill-Llama",
    gguf: Some("llama"),
    in_gguf: "llama",
    interleaved: true,
    defaults: &[("max_position_embeddings", 2048)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    biases(&mut layer, fields.flag_or("attention_bias", false)?, fields.flag_or("mlp_bias", false)?);
    fields.architecture(false, vec![rope], vec![layer; fields.layers()?])
}

/// llama.cpp calls Mistral's models `llama`, too; in transformers that class has no window.
fn complete(_: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    if config.get("sliding_window").is_some_and(|window| !window.is_null()) {
        config.insert("architectures".to_owned(), json!([mistral::FAMILY.class]));
        config.insert("model_type".to_owned(), json!(mistral::FAMILY.model_type));
    }
    Ok(())
}

/// Biases at all projections of the attention, and at all of the feed-forward part.
pub fn biases(layer: &mut LayerSpec, attention: bool, mlp: bool) {
    let part = layer.attention_mut();
    part.qkv.iter_mut().chain([&mut part.o]).for_each(|projection| projection.bias = attention);
    let part = &mut layer.feed_forward;
    part.gate_up.iter_mut().chain([&mut part.down]).for_each(|projection| projection.bias = mlp);
}
