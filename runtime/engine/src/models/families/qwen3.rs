//! Qwen3, dense: Qwen2's decoder without biases, with q and k normalised head by head, Yang et al. 2025,
//! <https://arxiv.org/abs/2505.09388>.

use anyhow::Result;

use super::{Family, llama, qwen2};
use crate::models::architecture::{Architecture, LayerSpec, QkNorm};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    part_of: None,
    class: "Qwen3ForCausalLM",
    known_as: "Qwen3 0.6B to 32B (dense)",
    gguf: Some("qwen3"),
    in_gguf: "qwen3",
    interleaved: false,
    defaults: &[("max_position_embeddings", 32_768), ("num_key_value_heads", 32), ("head_dim", 128)],
    architecture,
    complete: qwen2::windows,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    llama::biases(&mut layer, fields.flag_or("attention_bias", false)?, false);
    layer.attention_mut().qk_norm = Some(QkNorm::Head);
    let layers = qwen2::sliding(fields, &layer)?;
    fields.architecture(false, vec![rope], layers)
}
