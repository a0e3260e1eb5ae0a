//! Gemma 3, its text part: Gemma 2's layer with q and k normalised in place of soft caps, five layers with a window to one without,
//! each kind with a rope of its own, Gemma Team 2025, <https://arxiv.org/abs/2503.19786>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::{Family, gemma2};
use crate::files::gguf::{Array, Gguf, Value as Entry};
use crate::models::architecture::{Architecture, QkNorm};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "gemma3_text",
    part_of: Some("gemma3"),
    class: "Gemma3ForCausalLM",
    known_as: "Gemma 3 270M, 1B; the text part of 4B, 12B, 27B",
    gguf: Some("gemma3"),
    in_gguf: "gemma3",
    interleaved: false,
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("vocab_size", 262_208),
        ("hidden_size", 2304),
        ("intermediate_size", 9216),
        ("num_hidden_layers", 26),
        ("head_dim", 256),
    ],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let mut layer = gemma2::layer(fields)?;
    // The class has the field and does not read it.
    fields.given("attn_logit_softcapping");
    let attention = layer.attention_mut();
    attention.qk_norm = Some(QkNorm::Head);
    let head_dim = attention.head_dim;
    // The newer form has parameters for each kind of layer.
    let newer = fields.given("rope_parameters").filter(|rope| rope.as_object().is_none_or(|rope| !rope.is_empty()));
    let (global_theta, local_theta) =
        (fields.number_or("rope_theta", 1_000_000.0)?, fields.number_or("rope_local_base_freq", 10_000.0)?);
    let [global, local] = match newer {
        Some(rope) => {
            ensure!(
                fields.given("rope_scaling").is_none(),
                "`rope_parameters` and `rope_scaling` are both there, which is not supported"
            );
            let parameters = ["full_attention", "sliding_attention"].map(|kind| rope.get(kind));
            ensure!(
                parameters.iter().any(Option::is_some),
                "`rope_parameters` without `full_attention` or `sliding_attention` is not supported"
            );
            [
                fields.rope_of(parameters[0], head_dim, global_theta)?,
                fields.rope_of(parameters[1], head_dim, local_theta)?,
            ]
        }
        None => [
            fields.rope_of(fields.given("rope_scaling"), head_dim, global_theta)?,
            fields.rope_of(None, head_dim, local_theta)?,
        ],
    };
    let count = fields.layers()?;
    let kinds = fields.list_of("layer_types", count)?;
    let pattern = fields.size_of("_sliding_window_pattern")?;
    let pattern = pattern.map_or_else(|| fields.size_or("sliding_window_pattern", 6), Ok)?;
    let window = fields.size_or("sliding_window", 4096)?;
    let layers = (0..count).map(|number| {
        let slides = match kinds {
            Some(kinds) => gemma2::slides(&kinds[number])?,
            None => !(number + 1).is_multiple_of(pattern),
        };
        let mut layer = layer.clone();
        let attention = layer.attention_mut();
        (attention.window, attention.rope) = (slides.then_some(window), Some(usize::from(slides)));
        Ok(layer)
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let logit_cap = fields.factor_of("final_logit_softcapping")?;
    Ok(Architecture { logit_cap, ..gemma2::model(fields, vec![global, local], layers)? })
}

/// llama.cpp has the pattern and the scale of scores in its code; a file without a window has none.
fn complete(gguf: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    // A number, or for each layer whether it slides.
    let key = "gemma3.attention.sliding_window_pattern";
    match gguf.get(key) {
        Some(Entry::Array(Array::Bool(slides))) => {
            let kinds = slides.iter().map(|slides| if *slides { "sliding_attention" } else { "full_attention" });
            config.insert("layer_types".to_owned(), json!(kinds.collect::<Vec<_>>()));
        }
        _ => config.extend(gguf.u64(key)?.map(|pattern| ("sliding_window_pattern".to_owned(), json!(pattern)))),
    }
    config.entry("final_logit_softcapping").or_insert(Value::Null);
    if config.get("sliding_window").is_none_or(Value::is_null) {
        let count = config.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(4096);
        config.insert("layer_types".to_owned(), json!(vec!["full_attention"; count as usize]));
    }
    gemma2::scores(config, 62)
}
