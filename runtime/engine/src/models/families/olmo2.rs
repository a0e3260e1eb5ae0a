//! OLMo 2: Llama's decoder with norms behind its parts instead of before them, and q and k normalised over their full width,
//! OLMo Team 2025, <https://arxiv.org/abs/2501.00656>.

use anyhow::{Result, ensure};
use serde_json::{Map, Value};

use super::{Family, llama};
use crate::files::gguf::Gguf;
use crate::models::architecture::{Architecture, LayerSpec, Norms, QkNorm};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "olmo2",
    part_of: None,
    class: "Olmo2ForCausalLM",
    known_as: "OLMo 2 1B, 7B, 13B, 32B",
    gguf: Some("olmo2"),
    in_gguf: "olmo2",
    interleaved: false,
    defaults: &[("max_position_embeddings", 2048)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    llama::biases(&mut layer, fields.flag_or("attention_bias", false)?, false);
    layer.attention_mut().qk_norm = Some(QkNorm::Width);
    layer.mixer_norms = Norms { before: None, after: Some("post_attention_layernorm") };
    layer.feed_forward_norms = Norms { before: None, after: Some("post_feedforward_layernorm") };
    let model = fields.architecture(false, vec![rope], vec![layer; fields.layers()?])?;
    Ok(Architecture { rms_norm_eps: fields.number_or("rms_norm_eps", 1e-5)?, ..model })
}

/// llama.cpp calls OLMo 3 by this name, too.
fn complete(_: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    let window = config.get("sliding_window").is_some_and(|window| !window.is_null());
    ensure!(!window, "`olmo2.attention.sliding_window` is that of OLMo 3, which is not supported");
    Ok(())
}
