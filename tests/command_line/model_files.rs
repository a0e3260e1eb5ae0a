//! Model files that are damaged or of another kind: refused in words, by every command alike.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{check_model, patched, patched_gguf, set_fields};
use crate::support::{Place, eval, fixture, homeroom, refused, tensors};

#[test]
fn a_path_that_is_no_model_is_refused() -> Result<()> {
    let place = Place::new()?;
    check_model(&place, Path::new("./nowhere"), &["./nowhere: no such model", "hint: "])?;
    let hub = [
        "org/model: not on this machine",
        "nothing is downloaded (HF_HUB_OFFLINE)",
        "homeroom pull org/model",
        "homeroom import",
    ];
    check_model(&place, Path::new("org/model"), &hub)?;
    let empty = place.path("outputs");
    check_model(&place, &empty, &["neither config.json nor a .gguf file"])?;
    let text = place.write("model.bin", "weights")?;
    check_model(&place, &text, &["model.bin", "a Hugging Face directory or a .gguf file"])?;
    let adapter = fixture("curves/lora/trained");
    check_model(&place, &adapter, &["trained: an adapter on llama, not a base model", "--init-from"])?;
    refused(&mut eval(&place.path("nowhere"), &place.rows("rows.jsonl", 2)?), &["no such model"])?;
    let mut chat = homeroom();
    refused(chat.args(["chat", "--prompt", "hello", "--model-dir", "org/model"]), &hub)
}

#[test]
fn truncated_safetensors_are_refused_wherever_they_end() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama"), "model")?;
    let whole = fs::read(copy.join("model.safetensors"))?;
    let header = 8 + u64::from_le_bytes(whole[..8].try_into()?) as usize;
    for cut in [0, 4, 8, 9, header / 2, header - 1, header, header + 4, whole.len() / 2, whole.len() - 1] {
        fs::write(copy.join("model.safetensors"), &whole[..cut])?;
        check_model(&place, &copy, &["model.safetensors: not a whole safetensors file", "again"])
            .with_context(|| format!("cut at {cut}"))?;
    }
    fs::remove_file(copy.join("model.safetensors"))?;
    check_model(&place, &copy, &["neither model.safetensors nor model.safetensors.index.json is there"])?;
    fs::write(copy.join("pytorch_model.bin"), "")?;
    check_model(&place, &copy, &["its weights are in pytorch_model.bin only"])
}

#[test]
fn safetensors_whose_header_overflows_are_refused() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama"), "model")?;
    let tensor = |shape: Value, offsets: Value| json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
    let max = u64::MAX;
    for (shape, offsets) in [
        (json!([1_u64 << 62, 48]), json!([0, 64])),
        (json!([max, max]), json!([0, 64])),
        (json!([1_u64 << 40]), json!([0, 1_u64 << 42])),
        (json!([16]), json!([max - 63, max])),
        (json!([16]), json!([64, 0])),
        (json!([17]), json!([0, 64])),
        (json!([-1]), json!([0, 64])),
    ] {
        let header = json!({"model.norm.weight": tensor(shape, offsets)}).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 64]);
        fs::write(copy.join("model.safetensors"), file)?;
        check_model(&place, &copy, &["not a whole safetensors file"]).context(header)?;
    }
    fs::write(copy.join("model.safetensors"), max.to_le_bytes())?;
    check_model(&place, &copy, &["not a whole safetensors file"])
}

#[test]
fn truncated_gguf_files_are_refused_wherever_they_end() -> Result<()> {
    let place = Place::new()?;
    let whole = fs::read(fixture("models/llama-gguf/model-f32.gguf"))?;
    let cuts = (0..20).map(|part| whole.len() * part / 20).chain([3, 4, 8, 24, 25, 100, 1000, 5000, whole.len() - 1]);
    for cut in cuts {
        let path = place.write("model.gguf", &whole[..cut])?;
        check_model(&place, &path, &["model.gguf"]).with_context(|| format!("cut at {cut} of {}", whole.len()))?;
    }
    Ok(())
}

#[test]
fn gguf_tensors_whose_sizes_overflow_are_refused() -> Result<()> {
    let place = Place::new()?;
    // After a tensor's name: the number of dimensions (4 bytes), two of 8 bytes each, the type, the offset.
    let name = "blk.0.ffn_down.weight";
    let number = |value: u64| value.to_le_bytes();
    for (offset, value, word) in [
        (12, number(1 << 62), "overflows"),
        (12, number(u64::MAX), "overflows"),
        (12, number(1 << 40), "end beyond the file's"),
        (4, number(u64::MAX - 31), "overflows"),
        (4, number(0), "has a dimension of 0"),
        (24, number(u64::MAX - 31), "end beyond the file's"),
        (24, number(7), "not a multiple of the alignment"),
    ] {
        let path = patched_gguf(&place, name, offset, &value)?;
        check_model(&place, &path, &["model.gguf", name, word]).with_context(|| format!("{value:?} at {offset}"))?;
    }
    let path = patched_gguf(&place, name, 0, &u32::MAX.to_le_bytes())?;
    check_model(&place, &path, &[name, "4294967295 dimensions"])?;
    let path = patched_gguf(&place, name, 20, &99_u32.to_le_bytes())?;
    check_model(&place, &path, &[name, "99"])?;
    // Counts of tensors and of metadata, right after magic and version.
    for offset in [4, 12] {
        let path = patched_gguf(&place, "GGUF", offset, &number(u64::MAX / 16))?;
        check_model(&place, &path, &["model.gguf", "claims 1152921504606846975"])?;
    }
    Ok(())
}

#[test]
fn what_the_decoder_does_not_compute_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let rope = |kind: &str| json!({"rope_scaling": {"rope_type": kind, "factor": 4.0}});
    let llama3 = |low: f64, high: f64| {
        json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": 64,
        }})
    };
    for (fields, words) in [
        (json!({"model_type": "mamba"}), &["unknown architecture `mamba`", "known are llama"][..]),
        (rope("proportional"), &["unknown rope type `proportional`", "known are default, linear, dynamic, llama3"]),
        (rope("llama3"), &["rope type `llama3`", "`low_freq_factor`"]),
        (json!({"hidden_act": "gelu"}), &["`hidden_act` = \"gelu\""]),
        (json!({"quantization_config": {"quant_method": "gptq"}}), &["quantised by `gptq`"]),
        (json!({"rope_scaling": "linear"}), &["its rope scaling is \"linear\", not an object"]),
        (json!({"rope_scaling": {"rope_type": 3}}), &["its rope type is 3, not a text"]),
        (json!({"rope_scaling": {"factor": 4.0}}), &["has a `factor` and no type"]),
        (llama3(1.0, 1.0), &["`high_freq_factor` = 1 is not above `low_freq_factor` = 1"]),
        (llama3(1.0, 1e300), &["`high_freq_factor`, above zero"]),
        (json!({"rope_theta": 1e300}), &["`rope_theta` = 1000", "it is a number from 1"]),
        (json!({"rope_theta": 0.5}), &["`rope_theta` = 0.5"]),
        (json!({"rms_norm_eps": 1e-300}), &["`rms_norm_eps` = 0.000", "above 0 and below 1"]),
        (json!({"rms_norm_eps": -1e-5}), &["`rms_norm_eps` = -0.00001"]),
        (json!({"tie_word_embeddings": "yes"}), &["`tie_word_embeddings` is neither true nor false"]),
        (json!({"head_dim": 4_294_967_294_u32}), &["a head of 4294967294 channels"]),
        (json!({"num_attention_heads": 100, "num_key_value_heads": 100}), &["a head of 0 channels"]),
        (json!({"num_attention_heads": 0}), &["`num_attention_heads` = 0"]),
        (json!({"num_key_value_heads": 3}), &["4 query heads cannot share 3"]),
        (json!({"hidden_size": u32::MAX - 7, "vocab_size": u32::MAX}), &["its sizes overflow"]),
        (json!({"vocab_size": 319}), &["tensor `model.embed_tokens.weight` is [320, 48], it should be [319, 48]"]),
        (json!({"num_hidden_layers": 3}), &["tensor `model.layers.2.input_layernorm.weight` is missing", "more"]),
        (json!({"num_hidden_layers": 1}), &["`model.layers.1.", "has no place in a llama model"]),
    ] {
        let copy = place.copy(&fixture("models/llama"), "model")?;
        set_fields(&copy.join("config.json"), fields.clone())?;
        check_model(&place, &copy, words).with_context(|| fields.to_string())?;
    }
    let path = patched_gguf(&place, "general.architecture", 12, b"mamba")?;
    check_model(&place, &path, &["model.gguf", "unknown architecture `mamba`"])
}

#[test]
fn what_a_family_does_not_compute_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let kinds = |count: usize, kind: &str| json!({"layer_types": vec![kind; count]});
    let yarn = |fields: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        rope.as_object_mut().expect("it is one").extend(fields.as_object().cloned().expect("they are one"));
        json!({"rope_scaling": rope})
    };
    let longrope = |short: Value, long: Value| json!({"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}});
    let (six, nil) = (json!([1, 1, 1, 1, 1, 1]), Value::Null);
    for (model, fields, words) in [
        // Families that are not known, by the name of the whole or of the part.
        ("llama", json!({"model_type": "mixtral"}), &["unknown architecture `mixtral`", "granitemoehybrid"][..]),
        ("qwen3", json!({"model_type": "qwen3_moe"}), &["unknown architecture `qwen3_moe`"]),
        ("phi3", json!({"model_type": "phimoe"}), &["unknown architecture `phimoe`"]),
        ("gemma3", json!({"model_type": "gemma3n_text"}), &["unknown architecture `gemma3n_text`"]),
        ("gemma3-multimodal", json!({"model_type": "gemma4"}), &["unknown architecture `gemma4`"]),
        ("gemma3-multimodal", json!({"text_config": nil}), &["`text_config` is missing"]),
        ("gemma3-multimodal", json!({"text_config": {"hidden_size": 0}}), &["`hidden_size` = 0 is not a size"]),
        // Parts of layers that are not known.
        ("granite4", json!({"num_local_experts": 4}), &["`num_local_experts` = 4", "mixtures of experts"]),
        ("granite4", json!({"num_local_experts": nil}), &["`num_local_experts` = 8"]),
        ("granite4", json!({"num_local_experts": "none"}), &["`num_local_experts` = \"none\""]),
        ("granite4", json!({"layer_types": ["attention", "mamba"]}), &["Mamba"]),
        ("granite4", json!({"layer_types": nil}), &["Mamba"]),
        ("granite4", kinds(3, "attention"), &["`layer_types` has 3 entries for 2 layers"]),
        ("granite4", json!({"attention_bias": true}), &["`attention_bias` = true"]),
        ("qwen3", json!({"num_experts": 8}), &["`num_experts` = 8 is not supported"]),
        ("gemma3", json!({"use_bidirectional_attention": true}), &["`use_bidirectional_attention` = true"]),
        ("gemma2", json!({"use_bidirectional_attention": true}), &["`use_bidirectional_attention` = true"]),
        ("gemma3", json!({"hidden_activation": "relu"}), &["`hidden_activation` = \"relu\" is not supported"]),
        ("gemma3", kinds(7, "linear_attention"), &["`layer_types` names \"linear_attention\""]),
        ("gemma3", kinds(6, "full_attention"), &["`layer_types` has 6 entries for 7 layers"]),
        ("gemma2", kinds(3, "chunked_attention"), &["`layer_types` names \"chunked_attention\""]),
        ("qwen3", kinds(2, "chunked_attention"), &["`layer_types` names \"chunked_attention\""]),
        ("qwen3", json!({"layer_types": "full_attention"}), &["`layer_types` is not a list"]),
        ("llama", kinds(2, "sliding_attention"), &["`layer_types` = [\"sliding_attention\"", "is not supported"]),
        ("smollm3", kinds(5, "sliding_attention"), &["`layer_types` = [\"sliding_attention\"", "is not supported"]),
        ("smollm3", json!({"use_sliding_window": true}), &["`use_sliding_window` = true"]),
        ("smollm3", json!({"no_rope_layers": [1, 1]}), &["`no_rope_layers` has 2 entries for 5 layers"]),
        ("smollm3", json!({"no_rope_layers": [1, 1, 2, 1, 1]}), &["`no_rope_layers` holds 2"]),
        ("smollm3", json!({"no_rope_layers": nil, "no_rope_layer_interval": 0}), &["`no_rope_layer_interval` = 0"]),
        ("phi3", json!({"resid_pdrop": 0.1}), &["`resid_pdrop` above 0"]),
        ("phi3", json!({"attention_dropout": 0.1}), &["`attention_dropout` above 0"]),
        // Numbers that nothing is computed with.
        ("granite", json!({"logits_scaling": 0}), &["`logits_scaling` = 0; it is a number above zero"]),
        ("granite", json!({"residual_multiplier": 0.0}), &["`residual_multiplier` = 0"]),
        ("granite", json!({"residual_multiplier": -0.5}), &["`residual_multiplier` = -0.5"]),
        ("granite", json!({"attention_multiplier": -1}), &["`attention_multiplier` = -1"]),
        ("granite", json!({"embedding_multiplier": 1e300}), &["`embedding_multiplier` = 1000"]),
        ("granite", json!({"embedding_multiplier": "2"}), &["`embedding_multiplier` is no number"]),
        ("granite4", json!({"logits_scaling": 1e-300}), &["`logits_scaling` = 0.000"]),
        ("gemma3", json!({"query_pre_attn_scalar": 0}), &["`query_pre_attn_scalar` = 0"]),
        ("gemma2", json!({"query_pre_attn_scalar": -256}), &["`query_pre_attn_scalar` = -256"]),
        ("gemma2", json!({"attn_logit_softcapping": 0.0}), &["`attn_logit_softcapping` = 0"]),
        ("gemma2", json!({"final_logit_softcapping": -30.0}), &["`final_logit_softcapping` = -30"]),
        ("gemma3", json!({"final_logit_softcapping": 1e39}), &["`final_logit_softcapping` = 1000"]),
        ("gemma3", json!({"sliding_window": 0}), &["`sliding_window` = 0 is not a size"]),
        ("gemma3", json!({"sliding_window_pattern": 0}), &["`sliding_window_pattern` = 0 is not a size"]),
        ("gemma3", json!({"sliding_window_pattern": "LLLG"}), &["`sliding_window_pattern` = \"LLLG\""]),
        ("gemma3", json!({"head_dim": 11}), &["a head of 11 channels cannot be rotated"]),
        ("gemma3", json!({"rope_local_base_freq": 0}), &["`rope_theta` = 0"]),
        ("mistral-window", json!({"sliding_window": -1}), &["`sliding_window` = -1 is not a size"]),
        ("qwen3", json!({"max_window_layers": -1}), &["`max_window_layers` = -1"]),
        ("olmo2", json!({"rms_norm_eps": 0.0}), &["`rms_norm_eps` = 0"]),
        // Ropes.
        (
            "phi4-mini",
            json!({"partial_rotary_factor": 0}),
            &["`partial_rotary_factor` = 0; it is above 0 and at most 1"],
        ),
        ("phi4-mini", json!({"partial_rotary_factor": 2}), &["`partial_rotary_factor` = 2"]),
        ("phi4-mini", json!({"partial_rotary_factor": 1e-9}), &["rotating 0 channels"]),
        ("phi4-mini", json!({"partial_rotary_factor": 0.32}), &["rotating 5 channels"]),
        ("phi4-mini", json!({"partial_rotary_factor": 0.5}), &["6 rope divisors for 4 frequencies"]),
        ("qwen3", json!({"partial_rotary_factor": 0.5}), &["`partial_rotary_factor` = 0.5 is not supported"]),
        (
            "qwen3-yarn",
            yarn(json!({"partial_rotary_factor": 0.5})),
            &["`partial_rotary_factor` = 0.5 is not supported"],
        ),
        ("phi4-mini", longrope(nil.clone(), six.clone()), &["rope type `longrope` needs the list `short_factor`"]),
        ("phi4-mini", longrope(six.clone(), json!([1, 1])), &["2 rope divisors for 6 frequencies"]),
        ("phi4-mini", longrope(six.clone(), json!([1, 1, 1, 1, 1, 0])), &["a rope divisor is not positive"]),
        ("phi4-mini", longrope(six.clone(), json!([1, 1, 1, 1, 1, 1e300])), &["a rope divisor is not positive"]),
        ("phi4-mini", longrope(six, json!([1, 1, 1, 1, 1, "a"])), &["`long_factor` holds what is no number"]),
        ("phi4-mini", json!({"original_max_position_embeddings": 1}), &["`attention_factor`, above zero"]),
        ("phi3", json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), &["not supported in a phi3 model"]),
        ("phi3", json!({"rope_scaling": "su"}), &["its rope scaling is \"su\", not an object"]),
        ("qwen3-yarn", yarn(json!({"factor": 1e300})), &["rope type `yarn` needs the number `factor`, above zero"]),
        ("qwen3-yarn", yarn(json!({"factor": -4})), &["rope type `yarn` needs the number `factor`, above zero"]),
        ("qwen3-yarn", yarn(json!({"beta_fast": 0})), &["`beta_fast`, above zero"]),
        ("llama", json!({"rope_scaling": {"type": "linear", "factor": 0}}), &["`linear` needs the number `factor`"]),
        (
            "llama-dynamic",
            json!({"rope_scaling": {"type": "dynamic", "factor": 0.5}}),
            &["the factor 0.5, which is below 1"],
        ),
        (
            "llama-dynamic",
            json!({"rope_scaling": {"type": "dynamic", "factor": 1e30}}),
            &["`dynamic`", "a context of 2.4"],
        ),
        (
            "gemma3",
            json!({"rope_scaling": null, "rope_parameters": {"full_attention": 3}}),
            &["its rope scaling is 3, not an object"],
        ),
        ("gemma3", json!({"rope_scaling": {"type": "proportional"}}), &["unknown rope type `proportional`"]),
        (
            "gemma3",
            json!({"rope_scaling": null, "rope_parameters": {"full_attention": {"rope_type": "axial"}}}),
            &["unknown rope type `axial`"],
        ),
    ] {
        let copy = place.copy(&fixture("models").join(model), "model")?;
        set_fields(&copy.join("config.json"), fields.clone())?;
        let words = [&["model/config.json: this model cannot be run"], words].concat();
        check_model(&place, &copy, &words).with_context(|| format!("{model} with {fields}"))?;
        fs::remove_dir_all(&copy)?;
    }
    Ok(())
}

/// Behind a key stand its type, of 4 bytes, and its value; a text begins with its length, of 8 bytes.
#[test]
fn what_llama_cpp_calls_a_family_by_and_is_none_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let (nan, zero) = (f32::NAN.to_le_bytes(), 0_f32.to_le_bytes());
    let size = u32::to_le_bytes;
    for (model, text, offset, with, words) in [
        ("granite", "general.architecture", 12, &b"gemma3n"[..], &["unknown architecture `gemma3n`", "phi3"][..]),
        ("gemma3", "general.architecture", 12, b"phimoe", &["unknown architecture `phimoe`"]),
        ("phi4-mini", "rope_factors_lon", 0, b"k", &["`rope_factors_long.weight` is missing beside"]),
        ("phi4-mini", "rope_factors_shor", 0, b"k", &["`rope_factors_short.weight` is missing beside"]),
        ("granite", "granite.logit_scale", 4, &zero, &["`logits_scaling` = 0"]),
        ("granite", "granite.attention.scale", 4, &nan, &["`attention_multiplier` = NaN"]),
        ("granite4", "granite.rope.scaling.finetuned", 4, &[0], &["`granite.rope.scaling.finetuned` is false"]),
        ("gemma2", "gemma2.attn_logit_softcapping", 4, &nan, &["`attn_logit_softcapping` = NaN"]),
        ("gemma3", "gemma3.attention.key_length", 4, &size(0), &["`gemma3.attention.key_length` = 0 is not a size"]),
        ("gemma3", "gemma3.block_count", 4, &size(0), &["`gemma3.block_count` = 0 is not a size"]),
        ("gemma3", "gemma3.block_count", 4, &size(u32::MAX), &["`num_hidden_layers` = 4294967295", "at most 4096"]),
        ("phi3", "phi3.rope.dimension_count", 4, &size(3), &["rotating 3 channels"]),
        ("phi3", "phi3.rope.dimension_count", 4, &size(10), &["rotating 10 of 8 channels"]),
        ("smollm3", "smollm3.rope.dimension_count", 4, &size(4), &["`partial_rotary_factor` = 0.5"]),
    ] {
        let path = patched(&place, &format!("{model}/model.gguf"), text, offset, with)?;
        let words = [&["model.gguf"], words].concat();
        check_model(&place, &path, &words).with_context(|| format!("{model}: {text}"))?;
    }
    Ok(())
}

/// Some tokenizers have more tokens than their model has embeddings.
#[test]
fn a_token_without_an_embedding_is_refused() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama-tied"), "model")?;
    set_fields(&copy.join("config.json"), json!({"vocab_size": 70}))?;
    let mut stored = Vec::new();
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        for (name, (mut shape, mut values)) in tensors(&copy.join(shard))? {
            if name == "model.embed_tokens.weight" {
                values.truncate(70 * shape[1]);
                shape[0] = 70;
            }
            stored.push((name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()));
        }
    }
    fs::remove_file(copy.join("model.safetensors.index.json"))?;
    fs::write(copy.join("model.safetensors"), homeroom_engine::adapt::adapter::serialize_f32(&stored)?)?;
    check_model(&place, &copy, &["has no embedding: the model knows 70 tokens, its tokenizer more"])?;
    let mut chat = homeroom();
    refused(chat.args(["chat", "--prompt", "hello", "--model-dir"]).arg(&copy), &["has no embedding"])
}
