//! A small model to test a strategy on, without a host.

use homeroom_abi::plan::{ModelInfo, ModuleInfo, ModuleKind, PlanRequest};

/// A request for a two-layer Llama with the given options as JSON. Sizes: hidden 8, intermediate 20, vocabulary 11, keys
/// and values 4 wide.
///
/// # Panics
/// When `options` is not a JSON object.
pub fn request(options: &str) -> PlanRequest {
    let module = |path: String, kind, d_in, d_out| ModuleInfo {
        storage: path.clone(),
        output_embedding: path == "lm_head",
        path,
        kind,
        d_in,
        d_out,
        bias: false,
    };
    use ModuleKind::{Embedding, Linear, Norm};
    let mut modules = vec![module("model.embed_tokens".into(), Embedding, 11, 8)];
    for layer in 0..2 {
        let at = |role: &str| format!("model.layers.{layer}.{role}");
        modules.push(module(at("input_layernorm"), Norm, 8, 8));
        modules.push(module(at("self_attn.q_proj"), Linear, 8, 8));
        modules.push(module(at("self_attn.k_proj"), Linear, 8, 4));
        modules.push(module(at("self_attn.v_proj"), Linear, 8, 4));
        modules.push(module(at("self_attn.o_proj"), Linear, 8, 8));
        modules.push(module(at("post_attention_layernorm"), Norm, 8, 8));
        modules.push(module(at("mlp.gate_proj"), Linear, 8, 20));
        modules.push(module(at("mlp.up_proj"), Linear, 8, 20));
        modules.push(module(at("mlp.down_proj"), Linear, 20, 8));
    }
    modules.push(module("model.norm".into(), Norm, 8, 8));
    modules.push(module("lm_head".into(), Linear, 8, 11));
    let options = serde_json::from_str(options).expect("options are a JSON object");
    PlanRequest { options, model: ModelInfo { model_type: "llama".to_owned(), modules } }
}
