//! Granite 3, and Granite 4's dense models as GGUF files: Llama's decoder with four multipliers.
//!
//! Source: <https://github.com/ibm-granite/granite-3.0-language-models>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

use super::{Family, llama};
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, LayerSpec};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "granite",
    part_of: None,
    class: "GraniteForCausalLM",
    known_as: "Granite 3.0 to 3.3 2B, 8B",
    gguf: Some("granite"),
    in_gguf: "granite",
    interleaved: true,
    defaults: &[("max_position_embeddings", 2048)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    llama::biases(&mut layer, fields.flag_or("attention_bias", false)?, fields.flag_or("mlp_bias", false)?);
    multiply(fields, &mut layer)?;
    scaled(fields, fields.architecture(false, vec![rope], vec![layer; fields.layers()?])?)
}

/// llama.cpp turns heads unless this is there and false. A scale of scores that is left out, or 0, is that of the heads' width there;
/// one of logits is not left out.
fn complete(gguf: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    let number = |key: &str| config.get(key).and_then(Value::as_f64).filter(|number| *number != 0.0);
    let width = number("hidden_size").unwrap_or(1.0) / number("num_attention_heads").unwrap_or(1.0);
    let width = number("head_dim").unwrap_or(width);
    if config.get("attention_multiplier").is_none_or(|scale| scale.as_f64() == Some(0.0)) {
        config.insert("attention_multiplier".to_owned(), json!(width.powf(-0.5)));
    }
    ensure!(config.contains_key("logits_scaling"), "`granite.logit_scale` is missing");
    let key = "granite.rope.scaling.finetuned";
    ensure!(gguf.bool(key)? != Some(false), "`{key}` is false: a model of this family without rope is not supported");
    Ok(())
}

/// The multipliers of a layer.
pub fn multiply(fields: &Fields<'_>, layer: &mut LayerSpec) -> Result<()> {
    layer.attention_mut().scale = fields.factor_or("attention_multiplier", 1.0)?;
    layer.residual_scale = fields.factor_or("residual_multiplier", 1.0)?;
    Ok(())
}

/// Those of the model.
pub fn scaled(fields: &Fields<'_>, model: Architecture) -> Result<Architecture> {
    Ok(Architecture {
        embedding_scale: fields.factor_or("embedding_multiplier", 1.0)?,
        logit_scale: 1.0 / fields.factor_or("logits_scaling", 1.0)?,
        ..model
    })
}
