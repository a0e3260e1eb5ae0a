//! What a GGUF file says of its model, as the `config.json` that transformers would have: one table of names, and then every family
//! is read in one way.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::families::Family;
use crate::files::gguf::{Gguf, decimal, number};

/// How a value is written.
enum Form {
    /// A size; one for each layer is taken where all are equal.
    Size,
    /// A number in f32.
    Number,
}

/// Fields of `config.json`, and llama.cpp's keys for them behind `general.architecture` and a dot.
const FIELDS: [(&str, &str, Form); 17] = [
    ("hidden_size", "embedding_length", Form::Size),
    ("intermediate_size", "feed_forward_length", Form::Size),
    ("num_hidden_layers", "block_count", Form::Size),
    ("num_attention_heads", "attention.head_count", Form::Size),
    ("num_key_value_heads", "attention.head_count_kv", Form::Size),
    ("head_dim", "attention.key_length", Form::Size),
    ("max_position_embeddings", "context_length", Form::Size),
    ("sliding_window", "attention.sliding_window", Form::Size),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", Form::Number),
    ("rope_theta", "rope.freq_base", Form::Number),
    ("rope_local_base_freq", "rope.freq_base_swa", Form::Number),
    ("attn_logit_softcapping", "attn_logit_softcapping", Form::Number),
    ("final_logit_softcapping", "final_logit_softcapping", Form::Number),
    ("embedding_multiplier", "embedding_scale", Form::Number),
    ("residual_multiplier", "residual_scale", Form::Number),
    ("logits_scaling", "logit_scale", Form::Number),
    ("attention_multiplier", "attention.scale", Form::Number),
];

/// Keys without which no decoder is described.
const NEEDED: [&str; 4] = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count"];

/// The family of a GGUF file, and its configuration.
///
/// # Errors
/// When a key is missing or says something that no decoder here computes.
pub fn config_of(gguf: &Gguf) -> Result<(&'static Family, Map<String, Value>)> {
    let kind = gguf.str("general.type")?.unwrap_or("model");
    ensure!(kind == "model", "`general.type` is `{kind}`: the file belongs to a model and is none; name the model's");
    let architecture = gguf.str("general.architecture")?.context("`general.architecture` is missing")?;
    let family = Family::of_gguf(architecture)?;
    let key = |name: &str| format!("{architecture}.{name}");
    ensure!(gguf.u64(&key("expert_count"))?.unwrap_or(0) == 0, "mixtures of experts are not supported");
    let causal = gguf.bool(&key("attention.causal"))?.unwrap_or(true);
    ensure!(causal, "`{}` = false: attention to later tokens is not supported", key("attention.causal"));
    let mut config = Map::new();
    config.insert("architectures".to_owned(), json!([family.class]));
    config.insert("model_type".to_owned(), json!(family.model_type));
    for (field, name, form) in &FIELDS {
        let key = key(name);
        let value = match form {
            Form::Size => size(gguf, &key)?.map(Value::from),
            Form::Number => gguf.f32(&key)?.map(number),
        };
        ensure!(value.is_some() || !NEEDED.contains(name), "`{key}` is missing");
        config.extend(value.map(|value| ((*field).to_owned(), value)));
    }
    // No window is written as one of nothing.
    if config.get("sliding_window") == Some(&json!(0)) {
        config.insert("sliding_window".to_owned(), Value::Null);
    }
    // llama.cpp's, where a class of transformers has others.
    let number = |field: &str| config.get(field).and_then(Value::as_u64).filter(|size| *size > 0);
    let (heads, hidden) = (number("num_attention_heads").unwrap_or(1), number("hidden_size").unwrap_or(0));
    config.entry("num_key_value_heads").or_insert(json!(heads));
    if hidden >= heads {
        config.entry("head_dim").or_insert(json!(hidden / heads));
    }
    config.entry("rms_norm_eps").or_insert(json!(1e-6));
    config.entry("rope_theta").or_insert(json!(10_000.0));
    config.entry("max_position_embeddings").or_insert(json!(2048));
    config.entry("hidden_act").or_insert(json!("silu"));
    let vocab_size = match gguf.tensor("token_embd.weight")?.shape[..] {
        [rows, _] => rows,
        _ => bail!("tensor `token_embd.weight` is not a matrix"),
    };
    if let Some(tokens) = gguf.strings("tokenizer.ggml.tokens")?.map(<[String]>::len) {
        ensure!(tokens <= vocab_size, "{tokens} tokens, and embeddings for {vocab_size}");
    }
    config.insert("vocab_size".to_owned(), json!(vocab_size));
    config.insert("tie_word_embeddings".to_owned(), json!(gguf.tensor("output.weight").is_err()));
    rope(gguf, architecture, &mut config)?;
    // As there are such tensors. (Qwen2 does not read these fields: it has some of the biases in any case.)
    let biased = |roles: &[&str]| gguf.tensors().any(|t| roles.iter().any(|role| t.name.ends_with(role)));
    let attention = biased(&["attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"]);
    let mlp = biased(&["ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"]);
    for (field, there) in [("attention_bias", attention), ("mlp_bias", mlp)] {
        if there || family.model_type == "llama" {
            config.insert(field.to_owned(), json!(there));
        }
    }
    (family.complete)(gguf, &mut config)?;
    let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    Ok((Family::of(model_type)?, config))
}

/// A size, above zero but for those that may be nothing.
fn size(gguf: &Gguf, key: &str) -> Result<Option<usize>> {
    let value = match gguf.u64(key) {
        Ok(value) => value,
        Err(error) => {
            // llama.cpp writes some sizes for each layer.
            let Ok(Some(each)) = gguf.i64s(key) else { return Err(error) };
            let all = each.first().filter(|first| each.iter().all(|size| size == *first));
            let same =
                all.with_context(|| format!("`{key}` is {each:?}: layers of different sizes are not supported"))?;
            Some(u64::try_from(*same).with_context(|| format!("`{key}` = {same} is not a size"))?)
        }
    };
    let least = u64::from(!key.ends_with("sliding_window"));
    let Some(value) = value else { return Ok(None) };
    ensure!((least..=u64::from(u32::MAX)).contains(&value), "`{key}` = {value} is not a size");
    Ok(Some(value as usize))
}

/// `rope_scaling` and the part of a head that turns.
fn rope(gguf: &Gguf, architecture: &str, config: &mut Map<String, Value>) -> Result<()> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let scaling = gguf.str(&key("scaling.type"))?;
    // llama.cpp takes a factor without a type as that of linear scaling; 0 and 1 are none.
    let factor = match gguf.f32(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => gguf.f32(&key("scale_linear"))?,
    };
    let factor = factor.filter(|factor| *factor != 0.0);
    let original = gguf.u64(&key("scaling.original_context_length"))?;
    let attention = gguf.f32(&key("scaling.attn_factor"))?;
    // Phi's belongs to its divisors.
    ensure!(
        attention.is_none_or(|factor| factor == 1.0) || scaling == Some("yarn") || architecture == "phi3",
        "`{}` = {} without a scaling that has it is not supported",
        key("scaling.attn_factor"),
        attention.unwrap_or(1.0)
    );
    let other = gguf.f32(&key("scaling.yarn_attn_factor"))?.unwrap_or(1.0);
    ensure!(other == 1.0, "`{}` = {other} is not supported", key("scaling.yarn_attn_factor"));
    let rope = match scaling {
        Some("none") => None,
        None | Some("linear") => factor
            .filter(|factor| *factor != 1.0)
            .map(|factor| json!({"rope_type": "linear", "factor": number(factor)})),
        Some("yarn") => {
            let factor = factor.with_context(|| format!("`{}` is missing", key("scaling.factor")))?;
            let mut rope = json!({"rope_type": "yarn", "factor": number(factor)});
            if let Some(original) = original {
                rope["original_max_position_embeddings"] = json!(original);
            }
            for (field, name) in [("beta_fast", "scaling.yarn_beta_fast"), ("beta_slow", "scaling.yarn_beta_slow")] {
                if let Some(beta) = gguf.f32(&key(name))? {
                    rope[field] = number(beta);
                }
            }
            // llama.cpp multiplies the usual factor of attention by this.
            if let Some(share) = attention {
                let usual = if factor > 1.0 { 0.1 * f64::from(factor).ln() + 1.0 } else { 1.0 };
                rope["attention_factor"] = number((usual * decimal(share)) as f32);
            }
            Some(rope)
        }
        // Its divisors are tensors, which this family reads.
        Some("longrope") if architecture == "phi3" => None,
        Some(kind) => bail!("rope type `{kind}` is not supported"),
    };
    config.insert("rope_scaling".to_owned(), rope.unwrap_or(Value::Null));
    if let Some(turned) = size(gguf, &key("dimension_count"))? {
        let size = |field: &str| config.get(field).and_then(Value::as_u64).filter(|size| *size > 0);
        let heads = size("num_attention_heads").unwrap_or(1);
        let head_dim = size("head_dim").unwrap_or(size("hidden_size").unwrap_or(0) / heads) as usize;
        ensure!(turned <= head_dim, "rotating {turned} of {head_dim} channels of a head is not supported");
        if turned < head_dim {
            config.insert("partial_rotary_factor".to_owned(), json!(turned as f64 / head_dim as f64));
        }
    }
    Ok(())
}
