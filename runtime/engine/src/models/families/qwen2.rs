//! Qwen2 and Qwen2.5: Llama's decoder with biases at q, k and v, Yang et al. 2024, <https://arxiv.org/abs/2407.10671>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::Family;
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, LayerSpec};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    part_of: None,
    class: "Qwen2ForCausalLM",
    known_as: "Qwen2, Qwen2.5; DeepSeek-R1-Distill-Qwen",
    gguf: Some("qwen2"),
    in_gguf: "qwen2",
    interleaved: false,
    defaults: &[("max_position_embeddings", 32_768), ("num_key_value_heads", 32)],
    architecture,
    complete: windows,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    layer.attention_mut().qkv.iter_mut().for_each(|projection| projection.bias = true);
    let layers = sliding(fields, &layer)?;
    fields.architecture(false, vec![rope], layers)
}

/// The layers, of which those from `max_window_layers` on have a window if `use_sliding_window` says so.
pub fn sliding(fields: &Fields<'_>, layer: &LayerSpec) -> Result<Vec<LayerSpec>> {
    let count = fields.layers()?;
    let on = fields.flag_or("use_sliding_window", false)?;
    let usual = if fields.says("sliding_window") { None } else { Some(4096) };
    let window = fields.size_of("sliding_window")?.or(usual).filter(|_| on);
    let from = match fields.given("max_window_layers") {
        Some(zero) if zero == 0 => 0,
        _ => fields.size_or("max_window_layers", 28)?,
    };
    let kinds = fields.list_of("layer_types", count)?;
    let layers = (0..count).map(|number| {
        let slides = match kinds {
            Some(kinds) => {
                let known = kinds[number] == "full_attention" || kinds[number] == "sliding_attention";
                ensure!(known, "`layer_types` names {}, which is not supported", kinds[number]);
                kinds[number] == "sliding_attention"
            }
            None => number >= from,
        };
        let mut layer = layer.clone();
        layer.attention_mut().window = window.filter(|_| slides);
        Ok(layer)
    });
    layers.collect()
}

/// A window of a GGUF file holds for all layers, as in llama.cpp.
pub fn windows(_: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    let slides = config.get("sliding_window").is_some_and(|window| !window.is_null());
    config.insert("use_sliding_window".to_owned(), json!(slides));
    if slides {
        config.insert("max_window_layers".to_owned(), json!(0));
        config.insert(
            "layer_types".to_owned(),
            json!(vec!["sliding_attention"; config["num_hidden_layers"].as_u64().unwrap_or(0).min(4096) as usize]),
        );
    }
    Ok(())
}
