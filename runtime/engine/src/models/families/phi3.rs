//! Phi-3, 3.5 and 4-mini: Llama's decoder with q, k and v in one module, and gate and up in one; part of a head turns,
//! and longer contexts have divisors of their own, Abdin et al. 2024, <https://arxiv.org/abs/2404.14219>.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::Family;
use crate::files::gguf::{Gguf, number};
use crate::models::architecture::{Architecture, LayerSpec, Projection};
use crate::models::fields::Fields;
use crate::models::rope::{Rope, RopeScaling};

pub const FAMILY: Family = Family {
    model_type: "phi3",
    part_of: None,
    class: "Phi3ForCausalLM",
    known_as: "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
    gguf: Some("phi3"),
    in_gguf: "phi3",
    interleaved: false,
    defaults: &[("max_position_embeddings", 4096), ("original_max_position_embeddings", 4096)],
    architecture,
    complete,
};

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let shape = fields.shape()?;
    let mut layer = LayerSpec::llama(shape);
    let attention = layer.attention_mut();
    let (width, kv_width) = (attention.q_width(), attention.kv_width());
    let qkv = Projection {
        path: "self_attn.qkv_proj",
        d_out: kv_width.saturating_mul(2).saturating_add(width),
        ..attention.qkv[0]
    };
    attention.qkv = vec![qkv];
    attention.window = fields.size_of("sliding_window")?;
    let gate_up = &mut layer.feed_forward.gate_up;
    *gate_up = vec![Projection { path: "mlp.gate_up_proj", d_out: shape.inner.saturating_mul(2), ..gate_up[0] }];
    for dropout in ["resid_pdrop", "embd_pdrop", "attention_dropout"] {
        ensure!(fields.number_or(dropout, 0.0)? == 0.0, "`{dropout}` above 0 is not supported");
    }

    // Older files name the type `su` or `yarn`, and keep some numbers outside.
    let mut parameters = fields.rope_parameters().cloned();
    let original = fields.size_of("original_max_position_embeddings")?;
    let mut part = fields.number_or("partial_rotary_factor", 1.0)?;
    if let Some(rope) = parameters.as_mut().and_then(Value::as_object_mut) {
        for kind in ["type", "rope_type"] {
            if rope.get(kind).is_some_and(|kind| kind == "su" || kind == "yarn") {
                rope.insert(kind.to_owned(), json!("longrope"));
            }
        }
        if let Some(original) = original {
            rope.insert("original_max_position_embeddings".to_owned(), json!(original));
        }
        if let Some(own) = rope.remove("partial_rotary_factor").filter(|own| !own.is_null()) {
            part = own.as_f64().context("`partial_rotary_factor` is no number")?;
        }
    }
    ensure!(part > 0.0 && part <= 1.0, "`partial_rotary_factor` = {part}; it is above 0 and at most 1");
    let theta = fields.number_or("rope_theta", 10_000.0)?;
    let rope = fields.rope_of(parameters.as_ref(), shape.head_dim, theta)?;
    let rope = Rope {
        // Of a GGUF file the share is a quotient, whose product may fall short of the whole number.
        dims: (shape.head_dim as f64 * part + 1e-9) as usize,
        ..rope
    };
    ensure!(
        matches!(rope.scaling, RopeScaling::None | RopeScaling::LongRope { .. }),
        "a rope of another type than `default` and `longrope` is not supported in a phi3 model"
    );
    let model = fields.architecture(false, vec![rope], vec![layer; fields.layers()?])?;
    Ok(Architecture { rms_norm_eps: fields.number_or("rms_norm_eps", 1e-5)?, ..model })
}

/// A file with divisors for longer contexts names no type; llama.cpp's factor for attention is the file's.
fn complete(gguf: &Gguf, config: &mut Map<String, Value>) -> Result<()> {
    let divisors = |name: &str| gguf.tensor(name).ok().map(|tensor| gguf.mapped(tensor).values()).transpose();
    let short = divisors("rope_factors_short.weight")?;
    let long = divisors("rope_factors_long.weight")?;
    let (short, long) = match (short, long) {
        (Some(short), Some(long)) => (short, long),
        (None, None) => {
            let named = gguf.str("phi3.rope.scaling.type")? == Some("longrope");
            ensure!(!named, "`phi3.rope.scaling.type` is longrope, and tensor `rope_factors_short.weight` is missing");
            return Ok(());
        }
        (None, _) => bail!("tensor `rope_factors_short.weight` is missing beside `rope_factors_long.weight`"),
        (_, None) => bail!("tensor `rope_factors_long.weight` is missing beside `rope_factors_short.weight`"),
    };
    let original = gguf.u64("phi3.rope.scaling.original_context_length")?;
    let original = original.context("`phi3.rope.scaling.original_context_length` is missing")?;
    let mut rope = json!({
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    });
    if let Some(factor) = gguf.f32("phi3.rope.scaling.attn_factor")? {
        rope["attention_factor"] = number(factor);
    }
    config.insert("rope_scaling".to_owned(), rope);
    config.insert("original_max_position_embeddings".to_owned(), json!(original));
    Ok(())
}
