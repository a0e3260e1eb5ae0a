//! Mistral 7B: Llama's decoder with a sliding window, Jiang et al. 2023, <https://arxiv.org/abs/2310.06825>.

use anyhow::Result;

use super::{Family, complete};
use crate::models::architecture::{Architecture, LayerSpec};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "mistral",
    part_of: None,
    class: "MistralForCausalLM",
    known_as: "Mistral 7B, Mistral Nemo, Mistral Small 2409 and 2501",
    gguf: None,
    in_gguf: "llama",
    interleaved: true,
    defaults: &[("max_position_embeddings", 131_072), ("num_key_value_heads", 8)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    // `MistralConfig`'s own default, which a window that is null turns off.
    let usual = if fields.says("sliding_window") { None } else { Some(4096) };
    layer.attention_mut().window = fields.size_of("sliding_window")?.or(usual);
    fields.architecture(false, vec![rope], vec![layer; fields.layers()?])
}
