//! Granite 4's dense models: Granite 3's decoder with gate and up in one module. Those with Mamba layers or experts are refused.
//!
//! Source: <https://huggingface.co/ibm-granite/granite-4.0-1b>.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Family, complete, granite};
use crate::models::architecture::{Architecture, LayerShape, LayerSpec, Projection};
use crate::models::fields::Fields;

pub const FAMILY: Family = Family {
    model_type: "granitemoehybrid",
    part_of: None,
    class: "GraniteMoeHybridForCausalLM",
    known_as: "Granite 4.0 350M, 1B, micro (dense)",
    gguf: None,
    in_gguf: "granite",
    interleaved: true,
    defaults: &[("max_position_embeddings", 2048)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let experts = fields.given("num_local_experts").cloned().unwrap_or(json!(8));
    ensure!(experts == 0, "`num_local_experts` = {experts}: mixtures of experts are not supported");
    let count = fields.layers()?;
    let kinds = fields.list_of("layer_types", count)?;
    let mamba = kinds.is_none_or(|kinds| kinds.iter().any(|kind| kind != "attention" && kind != "full_attention"));
    ensure!(!mamba, "`layer_types` names Mamba layers, which are not supported; take a model without `h` in its name");
    let shape = LayerShape { inner: fields.size_or("shared_intermediate_size", 1024)?, ..fields.shape()? };
    let rope = fields.rope(shape.head_dim, 10_000.0)?;
    let mut layer = LayerSpec::llama(shape);
    ensure!(!fields.flag_or("attention_bias", false)?, "`attention_bias` = true is not supported");
    // Any other value, or none, is no rope.
    let turns = fields.given("position_embedding_type").is_some_and(|kind| kind == "rope");
    layer.attention_mut().rope = turns.then_some(0);
    let feed_forward = &mut layer.feed_forward;
    let gate_up = feed_forward.gate_up[0];
    feed_forward.gate_up =
        vec![Projection { path: "shared_mlp.input_linear", d_out: shape.inner.saturating_mul(2), ..gate_up }];
    feed_forward.down.path = "shared_mlp.output_linear";
    granite::multiply(fields, &mut layer)?;
    granite::scaled(
        fields,
        fields.architecture(false, if turns { vec![rope] } else { Vec::new() }, vec![layer; count])?,
    )
}
