//! The program as users run it: what it refuses and how, what it leaves behind, and what a script can read.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapter::AdapterFiles;
use homeroom_engine::block::Compute;
use homeroom_engine::generate::{Sampling, generate, prompt_ids};
use homeroom_engine::inference::{Answers, Inference};
use homeroom_engine::model::BaseModel;
use serde_json::{Map, Value, json};

use crate::support::{
    Place, Sizes, eval, fixture, homeroom, loss, model, plugin_path, printed_json, refused, run, succeeds, tensors,
};

/// Runs that must be refused leave nothing where their output would be.
pub fn leaves_nothing(place: &Place) -> Result<()> {
    let left = place.outputs()?;
    ensure!(left.is_empty(), "it left {left:?}");
    Ok(())
}

/// `fine-tune` of a model that must be refused.
pub fn check_model(place: &Place, model: &Path, words: &[&str]) -> Result<()> {
    let rows = place.rows("rows.jsonl", 3)?;
    refused(&mut place.fine_tune(model, &rows), words)?;
    leaves_nothing(place)
}

/// `fine-tune` on a file of these lines that must be refused.
fn check_rows(lines: &str, words: &[&str]) -> Result<()> {
    let place = Place::new()?;
    let rows = place.write("rows.jsonl", lines)?;
    refused(&mut place.fine_tune(&fixture("models/llama"), &rows), words)?;
    leaves_nothing(&place)
}

pub fn read_json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// Sets fields of a JSON object in a file.
pub fn set_fields(path: &Path, fields: Value) -> Result<()> {
    let mut object: Map<String, Value> = serde_json::from_str(&fs::read_to_string(path)?)?;
    object.extend(fields.as_object().cloned().context("fields are an object")?);
    Ok(fs::write(path, Value::Object(object).to_string())?)
}

// --- models ----------------------------------------------------------------------------------------------------------

#[test]
fn a_path_that_is_no_model_is_refused() -> Result<()> {
    let place = Place::new()?;
    check_model(&place, Path::new("./nowhere"), &["./nowhere: no such model", "hint: "])?;
    let hub = ["org/model: no such directory", "Hugging Face hub", "not built yet", "hint: "];
    check_model(&place, Path::new("org/model"), &hub)?;
    let empty = place.path("outputs");
    check_model(&place, &empty, &["neither config.json nor a .gguf file"])?;
    let text = place.write("model.bin", "weights")?;
    check_model(&place, &text, &["model.bin", "a Hugging Face directory or a .gguf file"])?;
    let adapter = fixture("curves/lora/trained");
    check_model(&place, &adapter, &["this is an adapter", "name the base model"])?;
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

/// A copy of a GGUF file with the bytes `offset` after the first place of `text` replaced.
pub fn patched_gguf(place: &Place, text: &str, offset: usize, with: &[u8]) -> Result<PathBuf> {
    let mut file = fs::read(fixture("models/llama-gguf/model-f32.gguf"))?;
    let at = file.windows(text.len()).position(|window| window == text.as_bytes());
    let at = at.with_context(|| format!("the file has no `{text}`"))? + text.len() + offset;
    file[at..at + with.len()].copy_from_slice(with);
    place.write("model.gguf", file)
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
    fs::write(copy.join("model.safetensors"), homeroom_engine::adapter::serialize_f32(&stored)?)?;
    check_model(&place, &copy, &["has no embedding: the model knows 70 tokens, its tokenizer more"])?;
    let mut chat = homeroom();
    refused(chat.args(["chat", "--prompt", "hello", "--model-dir"]).arg(&copy), &["has no embedding"])
}

// --- rows ------------------------------------------------------------------------------------------------------------

const ROW: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#;

#[test]
fn a_file_of_rows_that_cannot_be_used_is_refused_by_line() -> Result<()> {
    check_rows(
        &format!("{ROW}\n{{\"messages\": [\n{ROW}\n"),
        &["rows.jsonl: 1 problem", "line 2: not JSON", "hint: "],
    )?;
    check_rows("", &["rows.jsonl: no rows"])?;
    check_rows("\n  \n", &["rows.jsonl: no rows"])?;
    check_rows(&format!("[{ROW}]"), &["a JSON array, not JSONL"])?;
    let silent = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}"#;
    let asked = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    let nothing = ["2 problems", "line 1: nothing to train on", "line 3: nothing to train on"];
    check_rows(&format!("{silent}\n{ROW}\n{asked}\n"), &nothing)?;
    check_rows(r#"{"prompt": "hi", "completion": ""}"#, &["line 1: nothing to train on: `completion` is empty"])?;
    check_rows(r#"{"instruction": "a", "output": "b"}"#, &["rename `instruction` to `prompt`"])?;
    check_rows(
        &format!("{ROW}\n{{\"text\": \"a\"}}\n"),
        &["line 2: has `text`, while the rows before have `messages`"],
    )?;
    check_rows(r#"{"mesages": []}"#, &["line 1: ", "`mesages`: did you mean `messages`?"])
}

#[test]
fn files_that_are_not_there_are_refused() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let nowhere = place.path("nowhere.jsonl");
    refused(&mut place.fine_tune(&base, &nowhere), &["nowhere.jsonl", "No such file"])?;
    refused(place.fine_tune(&base, &rows).arg("--eval-file").arg(&nowhere), &["nowhere.jsonl", "No such file"])?;
    refused(place.fine_tune(&base, &rows).arg("--init-from").arg(&nowhere), &["nowhere.jsonl", "adapter_config.json"])?;
    refused(&mut eval(&base, &nowhere), &["nowhere.jsonl", "No such file"])?;
    leaves_nothing(&place)
}

#[test]
fn long_rows_are_refused_with_all_their_lines_or_cut_or_left_out() -> Result<()> {
    let place = Place::new()?;
    let base = fixture("models/llama");
    let long = json!({"messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "and so on ".repeat(60)},
    ]});
    let lines: Vec<String> = (1..=32).map(|line| if line % 2 == 0 { long.to_string() } else { ROW.into() }).collect();
    let rows = place.write("rows.jsonl", lines.join("\n"))?;
    let command = || {
        let mut command = place.fine_tune(&base, &rows);
        command.args(["--max-seq-len", "40", "--max-steps", "1", "--overwrite"]);
        command
    };
    let each: Vec<String> = (2..=32).step_by(2).map(|line| format!("\n  line {line}: ")).collect();
    let mut words: Vec<&str> = each.iter().map(String::as_str).collect();
    words.extend(["16 problems", "the limit is 40", "--on-long-row truncate", "--on-long-row skip", "--max-seq-len"]);
    refused(&mut command(), &words)?;
    leaves_nothing(&place)?;
    let cut = succeeds(command().args(["--on-long-row", "truncate"]))?;
    assert!(cut.stderr.contains("32 examples, 16 cut to length"), "{}", cut.stderr);
    let skipped = succeeds(command().args(["--on-long-row", "skip"]))?;
    assert!(skipped.stderr.contains("16 examples, 16 left out as too long"), "{}", skipped.stderr);
    let all_long = place.write("long.jsonl", long.to_string())?;
    let mut none = place.fine_tune(&base, &all_long);
    refused(none.args(["--max-seq-len", "40", "--on-long-row", "skip", "--overwrite"]), &["no rows left"])
}

#[test]
fn a_limit_beyond_the_models_context_is_refused() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    let words = ["--max-seq-len 257", "the model's context is 256 tokens"];
    refused(place.fine_tune(&fixture("models/llama"), &rows).args(["--max-seq-len", "257"]), &words)?;
    refused(eval(&fixture("models/llama"), &rows).args(["--max-seq-len", "257"]), &words)?;
    let chat = |words: usize| {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", &"long ".repeat(words), "--temperature", "0", "--model-dir"]);
        chat.arg(fixture("models/llama"));
        chat
    };
    refused(&mut chat(300), &["the conversation is ", "the model's context is 256"])?;
    let full = succeeds(&mut chat(200))?;
    assert!(full.stderr.contains("the end of the context"), "{}", full.stderr);
    leaves_nothing(&place)
}

#[test]
fn rows_that_cannot_be_split_are_refused() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 1)?);
    refused(command.args(["--eval-fraction", "0.5"]), &["1 row(s) cannot be split", "at least 2"])?;
    leaves_nothing(&place)
}

#[test]
fn wrong_flags_end_with_2_and_name_the_flag() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for flags in [
        &["--epochs", "0"][..],
        &["--max-steps", "0"],
        &["--batch-size", "0"],
        &["--gradient-accumulation-steps", "0"],
        &["--learning-rate", "0"],
        &["--learning-rate", "nan"],
        &["--learning-rate", "inf"],
        &["--learning-rate", "1e38"],
        &["--lora-alpha", "nan"],
        &["--lora-alpha", "inf"],
        &["--lora-alpha", "1e39"],
        &["--lora-alpha", "0"],
        &["--lora-dropout", "nan"],
        &["--lora-dropout", "1"],
        &["--lora-dropout=-0.1"],
        &["--warmup-ratio", "nan"],
        &["--weight-decay", "nan"],
        &["--weight-decay", "1"],
        &["--max-grad-norm", "inf"],
        &["--batch-size", "4294967296"],
        &["--seed=-1"],
        &["--warmup-ratio", "1"],
        &["--max-grad-norm=-1"],
        &["--max-seq-len", "1"],
        &["--eval-fraction", "1.0"],
        &["--eval-fraction", "0.1", "--eval-file", "x"],
        &["--on-long-row", "drop"],
        &["--lr-scheduler-type", "polynomial"],
        &["--lora-r", "many"],
        &["--set-option", "r"],
        &["--learning-rat", "1e-4"],
    ] {
        let ran = run(place.fine_tune(&fixture("models/llama"), &rows).args(flags))?;
        assert_eq!(ran.code, Some(2), "{flags:?}: {}", ran.stderr);
        let flag = flags[0].split_once('=').map_or(flags[0], |(flag, _)| flag);
        assert!(ran.stdout.is_empty() && ran.stderr.contains(flag), "{flags:?}: {}", ran.stderr);
    }
    let ran = run(homeroom().arg("fine-tune"))?;
    assert!(ran.code == Some(2) && ran.stderr.contains("--training-file"), "{}", ran.stderr);
    leaves_nothing(&place)
}

// --- adapters --------------------------------------------------------------------------------------------------------

/// Each field of PEFT's that would change what the tensors compute is named; so are all of them together.
#[test]
fn an_adapter_with_fields_that_are_not_run_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let adapter = place.copy(&fixture("curves/lora/trained"), "adapter")?;
    let config = adapter.join("adapter_config.json");
    let original = fs::read(&config)?;
    let command = || {
        let mut command = eval(&adapter, &rows);
        command.arg("--base-model").arg(fixture("models/llama"));
        command
    };
    succeeds(&mut command())?;
    for (key, value) in [
        ("use_dora", json!("yes")),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("init_lora_weights", json!("pissa")),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("trainable_token_indices", json!([3])),
        ("a_field_of_the_future", json!(1)),
        ("r", json!(0)),
        ("lora_alpha", json!(-5)),
        ("lora_alpha", json!(1e300)),
        ("alpha_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"q_proj": "7"})),
        ("rank_pattern", json!([3])),
    ] {
        fs::write(&config, &original)?;
        set_fields(&config, json!({key: value}))?;
        refused(&mut command(), &["adapter_config.json", "not supported", &format!("`{key}` = {value}")])?;
    }
    fs::write(&config, &original)?;
    set_fields(&config, json!({"use_qalora": true, "bias": "all"}))?;
    refused(&mut command(), &["`use_qalora` = true", "`bias` = \"all\""])?;
    fs::write(&config, &original)?;
    set_fields(&config, json!({"peft_type": "LOHA"}))?;
    refused(&mut command(), &["peft_type `LOHA`", "supported is LORA"])?;
    fs::write(&config, &original)?;
    set_fields(&config, json!({"r": 5}))?;
    refused(&mut command(), &["its rank is 5", "has 3"])
}

/// Sets the factors of all scalings in a manifest's recipes to one that f32 does not hold.
fn scaled_beyond_f32(bytes: Vec<u8>) -> Vec<u8> {
    fn set(value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(set),
            Value::Object(fields) => fields.iter_mut().for_each(|(name, value)| match (name.as_str(), &mut *value) {
                ("scale", Value::Array(scale)) => scale[1] = json!(1e300),
                _ => set(value),
            }),
            _ => {}
        }
    }
    let mut manifest: Value = serde_json::from_slice(&bytes).expect("it was whole");
    set(&mut manifest["plan"]["recipes"]);
    manifest.to_string().into_bytes()
}

#[test]
fn a_damaged_adapter_is_refused() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 2)?);
    let out = place.path("outputs/out");
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1"]))?;
    let damage = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, words: &[&str]| -> Result<()> {
        let whole = fs::read(out.join(name))?;
        fs::write(out.join(name), change(whole.clone()))?;
        refused(&mut eval(&out, &rows), words).with_context(|| name.to_owned())?;
        Ok(fs::write(out.join(name), whole)?)
    };
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    damage("adapter_model.safetensors", &half, &["adapter_model.safetensors: not a whole safetensors file"])?;
    damage("homeroom.json", &half, &["homeroom.json: not JSON"])?;
    damage("adapter_config.json", &half, &["adapter_config.json: not JSON"])?;
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replacen(from, to, 1).into_bytes()
    };
    damage("homeroom.json", &replace("\"format\": 1", "\"format\": 2"), &["homeroom.json: format", "newer"])?;
    damage("homeroom.json", &replace("\"matmul_t\"", "\"matmul_tt\""), &["cannot read"])?;
    // The first factor is that of LoRA's update.
    damage("homeroom.json", &scaled_beyond_f32, &["recipe 0 scales by", "f32 does not hold"])?;
    damage("homeroom.json", &replace("self_attn.q_proj", "self_attn.qq_proj"), &["no module", "qq_proj"])?;
    let not_a_number = |mut bytes: Vec<u8>| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes
    };
    damage("adapter_model.safetensors", &not_a_number, &["not finite"])?;
    fs::remove_file(out.join("adapter_model.safetensors"))?;
    refused(&mut eval(&out, &rows), &["adapter_model.safetensors: cannot open"])
}

/// A copy of a model whose weights are a hundredth larger.
fn other_weights(place: &Place, base: &Path) -> Result<PathBuf> {
    let copy = place.copy(base, "other")?;
    let path = copy.join("model.safetensors");
    let scaled = tensors(&path)?.into_iter().map(|(name, (shape, values))| {
        (name, shape, values.iter().flat_map(|value| (value * 1.01).to_le_bytes()).collect())
    });
    fs::write(&path, homeroom_engine::adapter::serialize_f32(&scaled.collect::<Vec<_>>())?)?;
    Ok(copy)
}

#[test]
fn an_adapter_is_refused_on_a_base_that_it_was_not_trained_on() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (place.copy(&fixture("models/llama"), "base")?, place.rows("rows.jsonl", 4)?);
    let out = place.path("outputs/out");
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "2", "--learning-rate", "1e-2"]))?;
    let right = loss(&out, &rows)?;
    let on = |base: &Path| {
        let mut command = eval(&out, &rows);
        command.arg("--base-model").arg(base);
        command
    };
    let other = other_weights(&place, &base)?;
    refused(
        &mut on(&other),
        &["belongs to another base", "base (sha256:", "other (sha256:", "--base-model", "--any-base"],
    )?;
    let forced = printed_json(&succeeds(on(&other).arg("--any-base"))?)?["loss"].as_f64().context("a loss")?;
    assert!(forced != right && (forced - right).abs() < 0.5, "{forced}, {right}");
    refused(on(&fixture("models/llama-tied")).arg("--any-base"), &["the plan does not fit the model", "gate_proj"])?;
    let mut not_an_adapter = eval(&base, &rows);
    refused(not_an_adapter.arg("--base-model").arg(&other), &["not an adapter, so it has no base model"])?;

    // The same base elsewhere is the same base, and a base that is gone is asked for.
    fs::rename(&base, place.path("moved"))?;
    refused(&mut eval(&out, &rows), &["its base model", "/base is not there", "hint: ", "--base-model"])?;
    let moved = printed_json(&succeeds(&mut on(&place.path("moved")))?)?["loss"].as_f64();
    assert_eq!(moved, Some(right));
    Ok(())
}

// --- what is written -------------------------------------------------------------------------------------------------

#[test]
fn an_output_directory_is_replaced_when_asked_and_then_whole() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let mine = place.write("outputs/out/trainer_state.json", "mine")?;
    let mut command = place.fine_tune(&base, &rows);
    command.args(["--max-steps", "1"]);
    refused(&mut command, &["outputs/out: the directory is not empty", "--overwrite"])?;
    assert_eq!(fs::read_to_string(&mine)?, "mine");
    // A run that fails takes nothing away.
    let mut failing = place.fine_tune(&base, &place.write("bad.jsonl", "{")?);
    refused(failing.arg("--overwrite"), &["not JSON"])?;
    assert_eq!(fs::read_to_string(&mine)?, "mine");
    // Nor does one that was asked to replace what is no result.
    command.arg("--overwrite");
    let thesis = place.write("outputs/out/thesis.txt", "mine")?;
    refused(&mut command, &["outputs/out: holds `thesis.txt`, which is no part of a model", "another directory"])?;
    place.write("outputs/out/.hidden/key", "mine")?;
    refused(&mut command, &["holds `.hidden` and 1 more"])?;
    assert_eq!(fs::read_to_string(&thesis)?, "mine");
    fs::remove_file(thesis)?;
    fs::remove_dir_all(place.path("outputs/out/.hidden"))?;
    succeeds(&mut command)?;
    let mut names: Vec<_> =
        fs::read_dir(place.path("outputs/out"))?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "homeroom.json", "trainer_state.json"]);
    assert_eq!(place.outputs()?, ["out"]);
    // An empty directory is taken as it is; a file is not a directory.
    fs::create_dir(place.path("outputs/empty"))?;
    let to = |name: &str| {
        let mut command = homeroom();
        command.args(["fine-tune", "--max-steps", "1", "--model-name"]).arg(&base).arg("--training-file").arg(&rows);
        command.arg("--output-dir").arg(place.path(name));
        command
    };
    succeeds(&mut to("outputs/empty"))?;
    refused(&mut to("rows.jsonl"), &["rows.jsonl: cannot write a directory here"])?;
    refused(&mut to("rows.jsonl/out"), &["rows.jsonl"])?;
    succeeds(&mut to("outputs/a/b/new"))?;
    assert_eq!(place.outputs()?, ["a", "empty", "out"]);
    Ok(())
}

/// `--overwrite` takes a whole directory away, and must not take what the run reads with it.
#[test]
fn an_output_directory_that_holds_the_runs_inputs_is_not_overwritten() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "outputs/out/base")?;
    let rows = place.rows("outputs/out/rows.jsonl", 3)?;
    let (far_base, far_rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let start = |base: &Path, rows: &Path| {
        let mut command = place.fine_tune(base, rows);
        command.args(["--overwrite", "--max-steps", "1"]);
        command
    };
    refused(&mut start(&base, &far_rows), &["outputs/out: the base model is in it, and would be lost"])?;
    refused(&mut start(&far_base, &rows), &["outputs/out: the training file is in it"])?;
    refused(start(&far_base, &far_rows).arg("--eval-file").arg(&rows), &["the file of held-out rows is in it"])?;
    let mut inside = start(&far_base, &far_rows);
    refused(inside.current_dir(&base), &["the working directory is in it"])?;
    assert!(rows.exists() && base.join("config.json").exists());
    let export = |adapter: &Path, to: &Path| {
        let mut command = homeroom();
        command.args(["export-model", "--format", "merged", "--overwrite", "--model-dir"]).arg(adapter);
        command.arg("--base-model").arg(&base).arg("--output-dir").arg(to);
        command
    };
    let adapter = place.copy(&fixture("curves/lora/trained"), "adapter")?;
    refused(&mut export(&adapter, &base), &["the base model is in it"])?;
    refused(&mut export(&adapter, &adapter), &["the adapter is in it"])?;
    assert!(adapter.join("adapter_config.json").exists() && base.join("config.json").exists());
    // The same of the data directory, and of all that lies in it.
    fs::create_dir_all(place.path("outputs/out/home/models/m"))?;
    refused(
        start(&far_base, &far_rows).env("HOMEROOM_HOME", place.path("outputs/out/home")),
        &["outputs/out: holds `base`"],
    )?;
    fs::remove_dir_all(place.path("outputs/out"))?;
    // An adapter may be replaced by what was made of it.
    succeeds(&mut start(&far_base, &far_rows))?;
    succeeds(start(&far_base, &far_rows).arg("--init-from").arg(place.path("outputs/out")))?;
    Ok(())
}

/// A command in a shell that does something first.
pub fn in_shell(first: &str, command: &Command) -> Command {
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(format!("{first}; exec \"$0\" \"$@\"")).arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    shell
}

/// A model that adapters of some megabytes fit on.
pub fn wide_model(place: &Place) -> Result<PathBuf> {
    let sizes = Sizes { hidden: 320, inner: 640, heads: 5, kv_heads: 5, head_dim: 64, vocab: 320, tied: false };
    place.random_model("wide", &sizes)
}

/// The highest rank that all of its modules take: 13.9 MB.
pub const WIDE_R: &str = "320";

/// Files may not grow beyond a limit, so that a write fails in the middle as it does on a full disk: EFBIG for ENOSPC.
#[test]
fn a_full_disk_while_saving_is_told_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    // The limit must let the plugin's private copy through, so the adapter has to be larger than that.
    let limit_kib = fs::metadata(plugin_path("lora"))?.len() / 1024 + 64;
    let mut train = place.fine_tune(&wide_model(&place)?, &rows);
    train.args(["--max-steps", "1", "--lora-r", WIDE_R]);
    let mut shell = in_shell(&format!("trap '' XFSZ; ulimit -f {limit_kib}"), &train);
    refused(&mut shell, &["outputs/out: cannot write adapter_model.safetensors", "too large"])?;
    leaves_nothing(&place)?;
    // What was there before is still there.
    let mine = place.write("outputs/out/trainer_state.json", "mine")?;
    refused(shell.arg("--overwrite"), &["cannot write adapter_model.safetensors"])?;
    assert_eq!((fs::read_to_string(mine)?, place.outputs()?), ("mine".to_owned(), vec!["out".to_owned()]));
    // Without the limit the same command saves.
    succeeds(train.arg("--overwrite"))?;
    Ok(())
}

/// What is written is as open as the user's umask says, since it may repeat what it was trained on; and nobody else may change it.
#[test]
fn what_is_written_is_as_open_as_the_users_other_files() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    for (strategy, umask, directory, file) in [
        ("lora", "027", 0o750, 0o640),
        ("full", "077", 0o700, 0o600),
        ("lora", "002", 0o755, 0o644),
        ("lora", "000", 0o755, 0o644),
    ] {
        let mut train = place.fine_tune(&fixture("models/llama"), &rows);
        train.args(["--max-steps", "1", "--overwrite", "--strategy", strategy]);
        succeeds(&mut in_shell(&format!("umask {umask}"), &train))?;
        let mode = |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
        let out = place.path("outputs/out");
        assert_eq!(mode(&out)?, directory);
        for entry in fs::read_dir(&out)? {
            let path = entry?.path();
            assert_eq!(mode(&path)?, file, "{}", path.display());
        }
    }
    Ok(())
}

/// A run under way, with its stderr.
pub struct Running {
    pub child: Child,
    stderr: BufReader<ChildStderr>,
    seen: String,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        Ok(Self { child, stderr, seen: String::new() })
    }

    /// Reads on until a line begins so.
    pub fn wait_for(&mut self, beginning: &str) -> Result<()> {
        loop {
            let start = self.seen.len();
            let read = self.stderr.read_line(&mut self.seen)?;
            ensure!(read > 0, "it ended before a line began with `{beginning}`:\n{}", self.seen);
            if self.seen[start..].starts_with(beginning) {
                return Ok(());
            }
        }
    }

    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: kill has no memory preconditions; the child was not waited for, so the number is still its own.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        ensure!(sent == 0, "cannot signal: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// The exit code, stdout and all of stderr.
    pub fn end(mut self) -> Result<(Option<i32>, String, String)> {
        self.stderr.read_to_string(&mut self.seen)?;
        let mut stdout = String::new();
        self.child.stdout.take().context("stdout is piped")?.read_to_string(&mut stdout)?;
        Ok((self.child.wait()?.code(), stdout, self.seen.clone()))
    }
}

impl Drop for Running {
    /// A test that fails in the middle leaves no run behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run that goes on for as long as a test could want.
fn endless(place: &Place) -> Result<Command> {
    endless_on(place, &fixture("models/llama"))
}

/// The same on a model.
pub fn endless_on(place: &Place, model: &Path) -> Result<Command> {
    let mut command = place.fine_tune(model, &place.rows("rows.jsonl", 8)?);
    command.args(["--max-steps", "1000000", "--warmup-ratio", "0", "--learning-rate", "1e-3", "--json"]);
    Ok(command)
}

#[test]
fn an_interrupted_run_saves_what_it_has_and_can_be_gone_on_from() -> Result<()> {
    let place = Place::new()?;
    let held_out = place.rows("held.jsonl", 5)?;
    let mut running = Running::start(endless(&place)?.arg("--eval-file").arg(&held_out))?;
    running.wait_for("step ")?;
    running.signal(libc::SIGINT)?;
    let (code, stdout, stderr) = running.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    let out = place.path("outputs/out").display().to_string();
    for words in [
        "interrupted: the run ends after this step",
        "stopped after step ",
        "of 1000000",
        &format!("--init-from {out}"),
    ] {
        assert!(stderr.contains(words), "no `{words}` in\n{stderr}");
    }
    let summary: Value = serde_json::from_str(&stdout)?;
    assert_eq!(summary["interrupted"], json!(true));
    assert_eq!(place.outputs()?, ["out"]);
    let learned = loss(Path::new(&out), &held_out)?;
    assert!(learned < loss(&fixture("models/llama"), &held_out)?);

    let mut on = homeroom();
    on.args(["fine-tune", "--max-steps", "2", "--json", "--init-from", &out, "--output-dir"])
        .arg(place.path("outputs/on"));
    on.arg("--model-name").arg(fixture("models/llama")).arg("--training-file").arg(place.path("rows.jsonl"));
    let on = printed_json(&succeeds(on.arg("--eval-file").arg(&held_out))?)?;
    assert_eq!(on["eval_loss_before"].as_f64(), Some(learned));
    Ok(())
}

#[test]
fn a_second_interruption_ends_at_once_and_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    // The first step is a second of work, so that the second signal comes before it has ended.
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 800)?);
    let mut running = Running::start(command.args(["--max-steps", "9", "--gradient-accumulation-steps", "100"]))?;
    running.wait_for("training ")?;
    running.signal(libc::SIGINT)?;
    running.wait_for("interrupted")?;
    running.signal(libc::SIGINT)?;
    let (code, _, stderr) = running.end()?;
    assert_eq!(code, Some(130), "{stderr}");
    leaves_nothing(&place)
}

/// Whenever the second signal comes, before, while or after the files are written: all of them are there, or none.
#[test]
fn a_second_interruption_while_saving_leaves_all_or_nothing() -> Result<()> {
    let place = Place::new()?;
    let wide = wide_model(&place)?;
    for milliseconds in [0, 2, 10, 20, 40, 80] {
        let mut running = Running::start(endless_on(&place, &wide)?.args(["--overwrite", "--lora-r", WIDE_R]))?;
        running.wait_for("step ")?;
        running.signal(libc::SIGINT)?;
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        running.signal(libc::SIGINT)?;
        let (code, _, stderr) = running.end()?;
        assert_eq!(code, Some(130), "after {milliseconds} ms: {stderr}");
        match place.outputs()?.as_slice() {
            [] => {}
            [out] if out == "out" => {
                AdapterFiles::read(&place.path("outputs/out"))?.adapt(&BaseModel::load(&wide)?, false)?;
                assert!(place.path("outputs/out/trainer_state.json").exists());
                fs::remove_dir_all(place.path("outputs/out"))?;
            }
            left => anyhow::bail!("after {milliseconds} ms it left {left:?}"),
        }
    }
    Ok(())
}

/// The export is made in a directory beside its place; whether it was finished or not, that one is gone.
#[test]
fn an_interrupted_export_is_whole_or_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let mut command = place.fine_tune(&fixture("models/llama"), &place.rows("rows.jsonl", 4)?);
    succeeds(command.args(["--max-steps", "1"]))?;
    let finished = |place: &Place| anyhow::Ok(place.outputs()?.iter().all(|name| name == "out" || name == "merged"));
    let mut interrupted = 0;
    for _ in 0..5 {
        let mut command = homeroom();
        command
            .args(["export-model", "--overwrite", "--format", "merged", "--model-dir"])
            .arg(place.path("outputs/out"));
        let mut running = Running::start(command.arg("--output-dir").arg(place.path("outputs/merged")))?;
        while running.child.try_wait()?.is_none() && finished(&place)? {
            std::thread::yield_now();
        }
        if running.child.try_wait()?.is_none() {
            running.signal(libc::SIGINT)?;
        }
        let (code, _, stderr) = running.end()?;
        assert!(matches!(code, Some(0 | 130)), "{code:?} {stderr}");
        interrupted += usize::from(code == Some(130));
        assert!(finished(&place)?, "{:?}", place.outputs()?);
    }
    assert!(interrupted > 0, "every export ended before its signal came");
    Ok(())
}

#[test]
fn a_killed_run_leaves_nothing() -> Result<()> {
    let place = Place::new()?;
    let mut running = Running::start(&mut endless(&place)?)?;
    running.wait_for("step ")?;
    running.signal(libc::SIGKILL)?;
    assert_eq!(running.end()?.0, None);
    leaves_nothing(&place)
}

/// A directory that came to be there during the run is nobody's to replace; the run is not lost for it.
#[test]
fn a_result_whose_place_was_taken_meanwhile_is_kept_beside_it() -> Result<()> {
    let place = Place::new()?;
    let mut running = Running::start(&mut endless(&place)?)?;
    running.wait_for("step ")?;
    let theirs = place.write("outputs/out/tokenizer.json", "theirs")?;
    running.signal(libc::SIGINT)?;
    let (code, stdout, stderr) = running.end()?;
    assert!(code == Some(1) && stdout.is_empty(), "{stderr}");
    assert_eq!(fs::read_to_string(theirs)?, "theirs");
    let outputs = place.outputs()?;
    let [out, kept] = outputs.as_slice() else { anyhow::bail!("{outputs:?}") };
    assert!(out == "out" && stderr.contains(&format!("it is whole in {}", place.path("outputs").join(kept).display())));
    assert!(stderr.contains("the directory is not empty"), "{stderr}");
    assert!(!stderr.contains("homeroom-kept-"), "it is kept once, and one place is named:\n{stderr}");
    // It is nobody's litter.
    succeeds(place.fine_tune(&fixture("models/llama"), &place.rows("few.jsonl", 2)?).args([
        "--max-steps",
        "1",
        "--overwrite",
    ]))?;
    AdapterFiles::read(&place.path("outputs").join(kept))?.adapt(&model("llama")?, false)?;
    Ok(())
}

/// Neither threads nor the moment decide a value. The rank is large enough for products that are split among threads.
#[test]
fn the_same_seed_writes_the_same_bytes_for_any_number_of_threads() -> Result<()> {
    let place = Place::new()?;
    let (rows, wide) = (place.rows("rows.jsonl", 12)?, wide_model(&place)?);
    let adapter = |threads: &str, seed: &str| -> Result<Vec<u8>> {
        let mut command = place.fine_tune(&wide, &rows);
        command.env("RAYON_NUM_THREADS", threads);
        command.args(["--max-steps", "3", "--lora-r", WIDE_R, "--lora-dropout", "0.3", "--overwrite", "--seed", seed]);
        succeeds(&mut command)?;
        Ok(fs::read(place.path("outputs/out/adapter_model.safetensors"))?)
    };
    let one = adapter("1", "7")?;
    assert!(one == adapter("2", "7")?, "two threads write other bytes than one");
    assert!(one == adapter("5", "7")?, "five threads write other bytes than one");
    assert!(one != adapter("1", "8")?, "the seed changes nothing");
    Ok(())
}

// --- what a script reads ---------------------------------------------------------------------------------------------

#[test]
fn fine_tune_prints_one_object_and_writes_its_history() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, held_out) = (fixture("models/llama"), place.rows("rows.jsonl", 6)?, place.rows("held.jsonl", 9)?);
    let mut command = place.fine_tune(&base, &rows);
    command.args(["--epochs", "2", "--batch-size", "2", "--gradient-accumulation-steps", "2", "--json", "--eval-file"]);
    let ran = succeeds(command.arg(&held_out))?;
    let summary = printed_json(&ran)?;
    let out = place.path("outputs/out");
    assert_eq!(summary["output_dir"], json!(out));
    assert_eq!((&summary["steps"], &summary["interrupted"]), (&json!(4), &json!(false)));
    for key in ["train_loss", "eval_loss_before", "eval_loss", "tokens_per_second", "peak_memory_bytes"] {
        assert!(summary[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {summary}");
    }
    assert_eq!(summary["eval_loss_before"].as_f64(), Some(loss(&base, &held_out)?));
    assert_eq!(summary["eval_loss"].as_f64(), Some(loss(&out, &held_out)?));

    let state = read_json(&out.join("trainer_state.json"))?;
    let history = state["log_history"].as_array().context("a history")?;
    assert_eq!((history.len(), &state["global_step"], &state["max_steps"]), (5, &json!(4), &json!(4)));
    for (number, step) in (1..).zip(&history[..4]) {
        assert_eq!(step["step"], json!(number));
        assert_eq!(step["epoch"], json!(f64::from(number) / 2.0));
        for key in ["loss", "grad_norm", "learning_rate"] {
            assert!(step[key].is_f64(), "{key}: {step}");
        }
    }
    assert_eq!(history[4]["eval_loss"], summary["eval_loss"]);
    let mean = history[..4].iter().filter_map(|step| step["loss"].as_f64()).sum::<f64>() / 4.0;
    assert!((mean - summary["train_loss"].as_f64().context("a loss")?).abs() < 1e-12);
    // Without --json the result is the directory, and stdout stays empty.
    let quiet = succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1", "--overwrite"]))?;
    assert_eq!(quiet.stdout, "");
    Ok(())
}

#[test]
fn eval_chat_and_plugins_print_their_result_alone() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 5)?);
    let evaluation = printed_json(&succeeds(&mut eval(&base, &rows))?)?;
    let number = |key: &str| evaluation[key].as_f64().with_context(|| format!("{key}: {evaluation}"));
    assert!((number("perplexity")? - number("loss")?.exp()).abs() < 1e-6 * number("perplexity")?);
    assert!((0.0..=1.0).contains(&number("token_accuracy")?));
    assert!(number("rows")? == 5.0 && number("trained_tokens")? > 50.0, "{evaluation}");
    let mut words = homeroom();
    words.arg("eval").arg("--model-dir").arg(&base).arg("--file").arg(&rows);
    let words = succeeds(&mut words)?.stdout;
    assert!(words.contains(&format!("{:.4}", number("loss")?)) && words.contains("perplexity"), "{words}");

    let model = BaseModel::load(&base)?;
    let messages =
        [json!({"role": "system", "content": "short"}), json!({"role": "user", "content": "times seven: 3"})];
    let sampling = Sampling { max_tokens: 12, seed: 42, ..Sampling::default() };
    let prompt = prompt_ids(&model, &messages)?;
    let answer = generate(&Answers::new(Inference::new(model.into(), None, Compute::auto())), &prompt, sampling)?;
    let mut chat = homeroom();
    chat.args(["chat", "--prompt", "times seven: 3", "--system", "short", "--temperature", "0", "--max-tokens", "12"]);
    let said = succeeds(chat.arg("--model-dir").arg(&base))?;
    assert!(!answer.text.is_empty());
    assert_eq!(said.stdout, format!("{}\n", answer.text));

    let directory = plugin_path("lora").parent().context("a library lies in a directory")?.to_owned();
    let list = |json: bool| {
        let mut command = homeroom();
        command.args(["plugins", "list", "--plugin-dir"]).arg(&directory).args(json.then_some("--json"));
        succeeds(&mut command)
    };
    let listed = printed_json(&list(true)?)?;
    let lora = listed.as_array().context("a list")?.iter().find(|item| item["name"] == "lora").context("lora")?;
    assert_eq!(lora["path"], json!(directory.join("liblora.so")));
    assert_eq!((&lora["version"], lora["sha256"].as_str().map(str::len)), (&json!("0.1.0"), Some(64)));
    let options: Vec<&str> =
        lora["options"].as_array().into_iter().flatten().filter_map(|o| o["name"].as_str()).collect();
    assert_eq!(options[..3], ["r", "lora_alpha", "lora_dropout"]);
    let words = list(false)?.stdout;
    assert!(words.contains("lora   0.1.0") && words.contains("lora_alpha") && words.contains("full   "), "{words}");
    Ok(())
}

/// A reader that goes away early, as `| head -1` does, is no failure, whether of the result or of the story.
#[test]
fn a_reader_that_goes_away_ends_nothing() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 3)?);
    let chat = || {
        let mut command = homeroom();
        command.args(["chat", "--prompt", "hi", "--max-tokens", "3", "--model-dir"]).arg(&base);
        command
    };
    let list = || {
        let mut command = homeroom();
        command.args(["plugins", "list"]);
        command
    };
    let mut train = place.fine_tune(&base, &rows);
    train.args(["--max-steps", "30", "--json", "--overwrite"]);
    for mut command in [eval(&base, &rows), chat(), list()] {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        drop(child.stdout.take());
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(output.status.success() && !stderr.contains("panicked"), "{command:?}: {stderr}");
    }
    let mut child = train.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait()?.success());
    assert!(loss(&place.path("outputs/out"), &rows)? > 0.0);
    // An error has nobody to hear it, and its exit code all the same.
    let mut child = eval(&base, Path::new("nowhere.jsonl")).stderr(Stdio::piped()).spawn()?;
    drop(child.stderr.take());
    assert_eq!(child.wait()?.code(), Some(1));
    Ok(())
}

/// A strategy that trains the base's own weights writes a model, which is one again.
#[test]
fn full_fine_tuning_writes_a_model() -> Result<()> {
    let place = Place::new()?;
    let (base, rows, out) = (fixture("models/llama"), place.rows("rows.jsonl", 4)?, place.path("outputs/out"));
    succeeds(place.fine_tune(&base, &rows).args([
        "--strategy",
        "full",
        "--max-steps",
        "3",
        "--learning-rate",
        "1e-3",
    ]))?;
    assert!(out.join("config.json").exists() && !out.join("adapter_config.json").exists());
    assert!(loss(&out, &rows)? < loss(&base, &rows)? - 1e-3);
    assert_eq!(place.outputs()?, ["out"]);
    Ok(())
}

#[test]
fn an_instruction_set_that_is_not_known_is_refused() -> Result<()> {
    let mut command = homeroom();
    command.arg("list-models").env("HOMEROOM_CPU", "avx9000");
    refused(&mut command, &["HOMEROOM_CPU is `avx9000`", "known are portable, avx2, avx512, avx512bf16"])
}
