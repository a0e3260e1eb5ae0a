//! Gemma 2: norms on both sides, GEGLU, soft caps, a sliding window in every other layer, Gemma Team 2024,
//! <https://arxiv.org/abs/2408.00118>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::Family;
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, Gate, LayerSpec, Norms};
use crate::models::fields::Fields;
use crate::models::rope::Rope;

pub const FAMILY: Family = Family {
    model_type: "gemma2",
    part_of: None,
    class: "Gemma2ForCausalLM",
    known_as: "Gemma 2 2B, 9B, 27B",
    gguf: Some("gemma2"),
    in_gguf: "gemma2",
    interleaved: false,
    defaults: &[
        ("max_position_embeddings", 8192),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("vocab_size", 256_000),
        ("hidden_size", 2304),
        ("intermediate_size", 9216),
        ("num_hidden_layers", 26),
        ("head_dim", 256),
    ],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let mut layer = layer(fields)?;
    let attention = layer.attention_mut();
    attention.soft_cap = cap(fields, "attn_logit_softcapping", 50.0)?;
    let rope = fields.rope(attention.head_dim, 10_000.0)?;
    let count = fields.layers()?;
    let kinds = fields.list_of("layer_types", count)?;
    let window = fields.size_or("sliding_window", 4096)?;
    let layers = (0..count).map(|number| {
        let slides = match kinds {
            Some(kinds) => slides(&kinds[number])?,
            None => number % 2 == 0,
        };
        let mut layer = layer.clone();
        layer.attention_mut().window = slides.then_some(window);
        Ok(layer)
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let logit_cap = cap(fields, "final_logit_softcapping", 30.0)?;
    Ok(Architecture { logit_cap, ..model(fields, vec![rope], layers)? })
}

/// A cap; what is left out is the default, null is none.
fn cap(fields: &Fields<'_>, key: &'static str, default: f64) -> Result<Option<f64>> {
    let usual = if fields.says(key) { None } else { Some(default) };
    Ok(fields.factor_of(key)?.or(usual))
}

/// Gemma's layer, without a window.
pub fn layer(fields: &Fields<'_>) -> Result<LayerSpec> {
    let mut layer = LayerSpec::llama(fields.shape()?);
    ensure!(!fields.flag_or("attention_bias", false)?, "`attention_bias` = true is not supported");
    ensure!(
        !fields.flag_or("use_bidirectional_attention", false)?,
        "`use_bidirectional_attention` = true is not supported"
    );
    // Older files carry `hidden_act` besides, which their class does not read.
    fields.given("hidden_act");
    layer.feed_forward.gate = fields.gate("hidden_activation", Gate::GeluTanh)?;
    layer.attention_mut().scale = fields.factor_or("query_pre_attn_scalar", 256.0)?.powf(-0.5);
    layer.mixer_norms = Norms { before: Some("input_layernorm"), after: Some("post_attention_layernorm") };
    layer.feed_forward_norms =
        Norms { before: Some("pre_feedforward_layernorm"), after: Some("post_feedforward_layernorm") };
    Ok(layer)
}

/// A model of such layers.
pub fn model(fields: &Fields<'_>, ropes: Vec<Rope>, layers: Vec<LayerSpec>) -> Result<Architecture> {
    let model = fields.architecture(true, ropes, layers)?;
    let embedding_scale = (model.hidden_size as f64).sqrt();
    Ok(Architecture { norm_offset: 1.0, embedding_scale, ..model })
}

/// Whether a layer of this kind has the window.
pub fn slides(kind: &Value) -> Result<bool> {
    ensure!(
        kind == "full_attention" || kind == "sliding_attention",
        "`layer_types` names {kind}, which is not supported"
    );
    Ok(kind == "sliding_attention")
}

/// llama.cpp has the pattern and the scale of scores in its code.
fn complete(_: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    for (cap, usual) in [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)] {
        config.entry(cap).or_insert(json!(usual));
    }
    scores(config, 46)
}

/// Scores are scaled by the head's width, but in the largest model by what the heads are of the residual stream.
pub fn scores(config: &mut Map<String, Value>, largest: u64) -> Result<()> {
    let number = |key: &str| config.get(key).and_then(Value::as_u64).filter(|number| *number > 0);
    let (heads, hidden) = (number("num_attention_heads").unwrap_or(1), number("hidden_size").unwrap_or(1));
    let width = match number("num_hidden_layers") == Some(largest) {
        true => hidden / heads,
        false => number("head_dim").unwrap_or(hidden / heads),
    };
    config.insert("query_pre_attn_scalar".to_owned(), json!(width));
    config.entry("hidden_activation").or_insert(json!("gelu_pytorch_tanh"));
    config.shift_remove("hidden_act");
    Ok(())
}
