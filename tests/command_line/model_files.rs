//! Model files that are damaged or of another kind: refused in words, by every command alike.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{check_model, patched_gguf, set_fields};
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
        (rope("yarn"), &["unknown rope type `yarn`", "known are default, llama3"]),
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
