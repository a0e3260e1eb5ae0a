//! Files as others write them: the caches, directories and adapters that a user already has.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom::handler::local::Local;
use homeroom::handler::{self, Handler};
use homeroom::models::{Answerer, Loaded, ModelRef, Network};
use homeroom_engine::adapt::adapter::{AdapterFiles, serialize_f32};
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::export::{Floats, save_model};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::files::tensors::map_safetensors;
use homeroom_engine::inference::generate::prompt_ids;
use homeroom_engine::models::Architecture;
use homeroom_engine::models::BaseModel;
use homeroom_engine::models::rope::RopeScaling;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::command_line::{read_json, set_fields};
use crate::handlers::asked;
use crate::support::{
    Place, Values, distance, eval, expected, fixture, homeroom, loss, model, refused, run, stored_ids, succeeds,
    tensors,
};

/// A GGUF file with one more metadata entry: its key, and its type and value as they are stored.
fn with_entry(gguf: &[u8], key: &str, value: &[u8]) -> Vec<u8> {
    let entries = u64::from_le_bytes(gguf[16..24].try_into().expect("eight bytes")) + 1;
    let key = [&(key.len() as u64).to_le_bytes(), key.as_bytes()].concat();
    [&gguf[..16], &entries.to_le_bytes(), &key, value, &gguf[24..]].concat()
}

/// Why a path is refused as a model.
fn refusal(path: &Path) -> String {
    BaseModel::load(path).err().map_or_else(|| "it was loaded".to_owned(), |error| format!("{error:#}"))
}

fn check_refusal(path: &Path, words: &[&str]) {
    let error = refusal(path);
    for word in words {
        assert!(error.contains(word), "no `{word}` in {error}");
    }
}

fn logits(pass: &Pass<'_>, ids: &[u32]) -> Result<Vec<f32>> {
    Ok(pass.logits(&Batch::of_tokens(ids, 0))?.flatten_all()?.to_vec1()?)
}

pub fn write_tensors(path: &Path, tensors: impl IntoIterator<Item = (String, Values)>) -> Result<()> {
    let stored = tensors.into_iter().map(|(name, (shape, values))| {
        (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    });
    Ok(fs::write(path, serialize_f32(&stored.collect::<Vec<_>>())?)?)
}

// --- models ----------------------------------------------------------------------------------------------------------

#[test]
fn a_gguf_file_is_known_by_its_first_bytes_whatever_it_is_called() -> Result<()> {
    let place = Place::new()?;
    let file = fixture("models/llama-gguf/model-f32.gguf");
    let wanted = BaseModel::load(&file)?.digest();
    // As the cache of Hugging Face lays it out: a name that leads to a file called by its digest.
    let blob = place.write("hub/blobs/5fd9d4c1", fs::read(&file)?)?;
    let snapshot = place.path("hub/snapshots/ä1");
    fs::create_dir_all(&snapshot)?;
    std::os::unix::fs::symlink("../../blobs/5fd9d4c1", snapshot.join("Tiny.Q8_0.GGUF"))?;
    for path in [blob, snapshot.join("Tiny.Q8_0.GGUF"), snapshot.clone()] {
        assert_eq!(BaseModel::load(&path).with_context(|| path.display().to_string())?.digest(), wanted);
    }
    check_refusal(
        &place.path("hub"),
        &["neither config.json nor a .gguf file", "name one of the directories in its snapshots/"],
    );
    // What is remembered of it is the name that says which model it is.
    assert!(BaseModel::load(&snapshot)?.path.ends_with("snapshots/ä1/Tiny.Q8_0.GGUF"));
    let linked = BaseModel::load(&snapshot.join("../ä1/Tiny.Q8_0.GGUF"))?.path;
    assert_eq!(linked, snapshot.canonicalize()?.join("Tiny.Q8_0.GGUF"));

    let other = place.write("other.gguf", fs::read(fixture("models/llama/model.safetensors"))?)?;
    check_refusal(&other, &["other.gguf", "a Hugging Face directory or a .gguf file", "name the directory"]);
    fs::remove_file(place.path("hub/blobs/5fd9d4c1"))?;
    check_refusal(&snapshot.join("Tiny.Q8_0.GGUF"), &["a link to ../../blobs/5fd9d4c1, which is not there"]);
    let rows = place.rows("rows.jsonl", 2)?;
    refused(&mut place.fine_tune(&snapshot.join("Tiny.Q8_0.GGUF"), &rows), &["a link to ", "which is not there"])
}

#[test]
fn a_directory_with_one_gguf_file_and_no_safetensors_is_that_file() -> Result<()> {
    let place = Place::new()?;
    let file = fixture("models/llama-gguf/model-f32.gguf");
    let both = place.copy(&fixture("models/llama"), "both")?;
    fs::copy(&file, both.join("model.gguf"))?;
    assert_eq!(BaseModel::load(&both)?.digest(), model("llama")?.digest());
    assert_eq!(BaseModel::load(&both.join("model.gguf"))?.digest(), BaseModel::load(&file)?.digest());
    // The configuration is of another model; the file has its own.
    fs::remove_file(both.join("model.safetensors"))?;
    assert_eq!(BaseModel::load(&both)?.digest(), BaseModel::load(&file)?.digest());
    // Weights that are missed are not made up for by others.
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        std::os::unix::fs::symlink("../blobs/größe", both.join(name))?;
        check_refusal(&both, &[name, "a link to ../blobs/größe, which is not there"]);
        fs::remove_file(both.join(name))?;
    }
    fs::copy(&file, both.join("model-Q8_0.GGUF"))?;
    check_refusal(&both, &["several .gguf files", "model-Q8_0.GGUF, model.gguf"]);
    Ok(())
}

#[test]
fn a_gguf_file_that_is_no_whole_model_is_refused_in_words() -> Result<()> {
    let place = Place::new()?;
    let file = fs::read(fixture("models/llama-gguf/model-f32.gguf"))?;
    let split = place.copy(&fixture("models/llama-gguf-split"), "split")?;
    fs::remove_file(split.join("model-mixed-00003-of-00003.gguf"))?;
    let words =
        ["1 of the 3 files of this model are not there: model-mixed-00003-of-00003.gguf; download or copy them"];
    check_refusal(&split, &words);
    check_refusal(&split.join("model-mixed-00001-of-00003.gguf"), &words);
    place.write("split/other.gguf", &file)?;
    check_refusal(
        &place.path("split"),
        &["several .gguf files", "model-mixed-00001-of-00003.gguf, model-mixed-00002-of-00003.gguf, other.gguf"],
    );

    let adapter = with_entry(&file, "general.type", &[&[8, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0][..], b"adapter"].concat());
    check_refusal(&place.write("lora.gguf", adapter)?, &["lora.gguf", "`general.type` is `adapter`"]);
    let pointer = place.write("pointer.gguf", "version https://git-lfs.github.com/spec/v1\noid sha256:5f\nsize 9\n")?;
    check_refusal(&pointer, &["pointer.gguf", "a note of Git LFS", "git lfs pull"]);
    Ok(())
}

#[test]
fn one_file_of_safetensors_wins_over_an_index_and_what_is_missing_is_named() -> Result<()> {
    let place = Place::new()?;
    let single = place.copy(&fixture("models/llama"), "single")?;
    let index = fixture("models/llama-tied/model.safetensors.index.json");
    fs::copy(&index, single.join("model.safetensors.index.json"))?;
    assert_eq!(BaseModel::load(&single)?.digest(), model("llama")?.digest());

    fs::remove_file(single.join("model.safetensors"))?;
    let shards = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors";
    check_refusal(&single, &["index.json: 2 of the 2 files that it names are not there", shards, "download or copy"]);
    let sharded = place.copy(&fixture("models/llama-tied"), "sharded")?;
    fs::remove_file(sharded.join("model-00002-of-00002.safetensors"))?;
    check_refusal(&sharded, &["1 of the 2 files that it names are not there: model-00002-of-00002.safetensors"]);

    fs::remove_file(single.join("model.safetensors.index.json"))?;
    check_refusal(&single, &["single: neither model.safetensors nor model.safetensors.index.json is there"]);
    place.write("single/consolidated.safetensors", "")?;
    check_refusal(&single, &["in consolidated.safetensors only"]);
    for name in ["pytorch_model.bin.index.json", "pytorch_model.bin"] {
        place.write(&format!("single/{name}"), "")?;
        check_refusal(&single, &[name, "save them as safetensors, in Python", "save_pretrained"]);
    }
    place.write("single/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:5f\nsize 9\n")?;
    check_refusal(&single, &["model.safetensors: a note of Git LFS"]);
    Ok(())
}

/// What a configuration leaves out is what the family's class in transformers has.
#[test]
fn fields_that_are_left_out_have_the_familys_defaults() -> Result<()> {
    let place = Place::new()?;
    let read = |name: &str, without: &str| -> Result<Architecture> {
        let mut config = read_json(&fixture("models").join(name).join("config.json"))?;
        config.as_object_mut().context("an object")?.remove(without);
        (config["num_attention_heads"], config["head_dim"]) = (32.into(), 16.into());
        Architecture::from_json(&place.write("config.json", config.to_string())?)
    };
    let window = |without| Ok::<_, anyhow::Error>(read("mistral", without)?.layers[0].attention().window);
    assert_eq!(window("nothing")?, None);
    assert_eq!(window("sliding_window")?, Some(4096));
    for (name, heads) in [("llama", 32), ("mistral", 8), ("qwen2", 32)] {
        assert_eq!(read(name, "num_key_value_heads")?.layers[0].attention().kv_heads, heads, "{name}");
    }
    Ok(())
}

/// transformers has biases where the configuration says so, and nowhere else.
#[test]
fn biases_that_the_configuration_does_not_tell_of_are_refused() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("models/llama"), "model")?;
    let weights = copy.join("model.safetensors");
    let plain = tensors(&weights)?;
    set_fields(&copy.join("config.json"), json!({"attention_bias": true}))?;
    check_refusal(&copy, &["tensor `model.layers.0.self_attn.q_proj.bias` is missing", "o_proj.bias` is missing"]);

    let mut biased = plain.clone();
    for layer in 0..2 {
        for (role, width) in [("gate_proj", 80), ("up_proj", 80), ("down_proj", 48)] {
            let values = (0..width).map(|channel| 0.01 * channel as f32).collect();
            biased.insert(format!("model.layers.{layer}.mlp.{role}.bias"), (vec![width], values));
        }
    }
    write_tensors(&weights, biased)?;
    set_fields(&copy.join("config.json"), json!({"attention_bias": false}))?;
    check_refusal(&copy, &["mlp.down_proj.bias` has no place in a llama model whose config.json has neither"]);
    set_fields(&copy.join("config.json"), json!({"mlp_bias": true}))?;
    let read = BaseModel::load(&copy)?;
    let ids = [1, 40, 41, 200, 9];
    let apart = distance(
        &logits(&Pass::evaluation(&read, None), &ids)?,
        &logits(&Pass::evaluation(&model("llama")?, None), &ids)?,
    );
    assert!(apart > 0.1, "{apart}");

    // What is written of it has them, too.
    let directory = NewDirectory::start(&place.path("outputs/out"))?;
    save_model(&directory, &Merged::new(&read, None)?, Floats::F32)?;
    assert_eq!(BaseModel::load(&directory.publish()?)?.digest(), read.digest());
    Ok(())
}

// --- exports ---------------------------------------------------------------------------------------------------------

/// A GGUF file keeps Llama 3's scaling as divisors, and says nothing of biases but that they are there.
#[test]
fn what_is_written_of_a_gguf_file_answers_as_it_does() -> Result<()> {
    let place = Place::new()?;
    let from = fixture("models/llama3-gguf");
    let base = BaseModel::load(&from)?;
    let directory = NewDirectory::start(&place.path("outputs/out"))?;
    save_model(&directory, &Merged::new(&base, None)?, Floats::F32)?;
    let out = directory.publish()?;
    let written = BaseModel::load(&out)?;
    for (ids, want) in expected(&from.join("expected.safetensors"))? {
        for model in [&base, &written] {
            let apart = distance(&logits(&Pass::evaluation(model, None), &ids)?, &want);
            assert!(apart < 1e-4, "{}: {apart}", model.path.display());
        }
    }
    let config = read_json(&out.join("config.json"))?;
    assert_eq!((&config["attention_bias"], &config["mlp_bias"]), (&json!(true), &json!(true)));
    let llama3 = RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192.0 };
    assert_eq!(written.architecture.ropes[0].scaling, llama3);
    // The other numbers as they were.
    let (ropes, config) = (base.architecture.ropes.clone(), base.architecture.config.clone());
    assert_eq!(Architecture { ropes, config, ..written.architecture }, base.architecture);
    Ok(())
}

/// llama.cpp calls Mistral's models `llama`; in transformers that class has no window.
#[test]
fn a_sliding_window_of_a_gguf_file_is_written() -> Result<()> {
    let place = Place::new()?;
    let file = fs::read(fixture("models/llama-gguf/model-f32.gguf"))?;
    let windowed = with_entry(&file, "llama.attention.sliding_window", &[4, 0, 0, 0, 5, 0, 0, 0]);
    // Tensors stay aligned: both entries together have 96 bytes.
    let filled = [&[8, 0, 0, 0, 29, 0, 0, 0, 0, 0, 0, 0][..], &[b'.'; 29]].concat();
    let base = BaseModel::load(&place.write("model.gguf", with_entry(&windowed, "x", &filled))?)?;
    let directory = NewDirectory::start(&place.path("outputs/out"))?;
    save_model(&directory, &Merged::new(&base, None)?, Floats::F32)?;
    let written = BaseModel::load(&directory.publish()?)?;
    let windows = written.architecture.layers.iter().map(|layer| layer.attention().window);
    assert!(written.architecture.model_type == "mistral" && windows.into_iter().all(|window| window == Some(5)));
    let ids = [1, 40, 41, 200, 9, 77, 30, 31, 5];
    let answers = |model: &BaseModel| logits(&Pass::evaluation(model, None), &ids);
    assert!(distance(&answers(&base)?, &answers(&written)?) < 1e-5);
    assert!(distance(&answers(&base)?, &answers(&model("llama-gguf/model-f32.gguf")?)?) > 1e-2);

    Ok(())
}

/// A copy of the GGUF file whose divisors are others.
fn with_divisors(place: &Place, divisors: [f32; 8]) -> Result<PathBuf> {
    let mut file = fs::read(fixture("models/llama3-gguf/model.gguf"))?;
    let old: Vec<u8> = [1.0_f32, 1.0, 1.0, 1.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let at = file.windows(16).position(|window| window == old).context("the file has its divisors")?;
    for (number, divisor) in divisors.iter().enumerate() {
        file[at + 4 * number..at + 4 * number + 4].copy_from_slice(&divisor.to_le_bytes());
    }
    place.write("model.gguf", file)
}

#[test]
fn a_base_that_no_model_can_be_written_of_is_told_before_it_is_trained() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 4)?;
    let long = with_divisors(&place, [1.0, 1.1, 1.3, 1.7, 2.3, 3.1, 4.3, 5.9])?;
    let full = ["--strategy", "full", "--max-steps", "1"];
    let why = "the rope divisors of the GGUF file are not those of `llama3`";
    refused(place.fine_tune(&long, &rows).args(full), &["could not be saved", why])?;
    assert!(place.outputs()?.is_empty());
    let ran = succeeds(place.fine_tune(&long, &rows).args(["--max-steps", "1"]))?;
    assert!(
        ran.stderr.contains("note: a merged model cannot be exported") && ran.stderr.contains(why),
        "{}",
        ran.stderr
    );
    let note = ran.stderr.find("note: a merged").context("it is there")?;
    assert!(note < ran.stderr.find("training  ").context("a run is restated")?, "{}", ran.stderr);

    let ran = succeeds(place.fine_tune(&fixture("models/llama3-gguf"), &rows).args(full).arg("--overwrite"))?;
    assert!(!ran.stderr.contains("cannot be exported"), "{}", ran.stderr);
    let tuned = BaseModel::load(&place.path("outputs/out"))?;
    assert!(
        matches!(tuned.architecture.ropes[0].scaling, RopeScaling::Llama3 { .. })
            && tuned.architecture.config["attention_bias"] == true
    );
    Ok(())
}

// --- adapters --------------------------------------------------------------------------------------------------------

/// An adapter of the fixtures with its base.
fn adapter(path: &Path, base: &str) -> Result<Loaded> {
    let base_model = Some(fixture("models").join(base));
    Loaded::load(&ModelRef { name: path.to_owned(), base_model, any_base: false }, Network::Never("a test"))
}

/// PEFT saves the base's weight beside an adapter of the embedding or the head, in the type that it was trained in.
#[test]
fn adapters_of_the_embedding_and_the_head_answer_as_with_peft() -> Result<()> {
    for (name, base) in [("embedding", "llama"), ("tied-head", "llama-tied")] {
        let path = fixture("adapters").join(name);
        let Loaded { model, adaptation } = adapter(&path, base)?;
        let pass = Pass::evaluation(&model, adaptation.as_deref());
        for (ids, want) in expected(&path.join("expected.safetensors"))? {
            let apart = distance(&logits(&pass, &ids)?, &want);
            assert!(apart < 1e-4, "{name}: {apart}");
        }
    }
    Ok(())
}

#[test]
fn a_base_weight_in_an_adapter_that_is_not_the_bases_is_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("adapters/embedding"), "adapter")?;
    let weights = copy.join("adapter_model.safetensors");
    let head = "base_model.model.lm_head.base_layer.weight";
    let plain = tensors(&weights)?;
    let rows = place.rows("rows.jsonl", 2)?;
    let refuses = |words: &[&str]| -> Result<()> {
        refused(eval(&copy, &rows).arg("--base-model").arg(fixture("models/llama")), words)
    };
    let mut other = plain.clone();
    let value = &mut other.get_mut(head).context("PEFT saved it")?.1[320 * 48 - 1];
    *value = f32::from_bits(value.to_bits() + 1);
    write_tensors(&weights, other)?;
    refuses(&[head, "differs from the base's, which is stored as f32", "--base-model", "merge_and_unload"])?;

    // The embedding was resized for new tokens.
    let mut resized = plain.clone();
    let (shape, mut values) = resized.remove(head).context("PEFT saved it")?;
    values.extend([0.25; 2 * 48]);
    resized.insert("base_model.model.lm_head.weight".to_owned(), (vec![shape[0] + 2, 48], values));
    write_tensors(&weights, resized)?;
    refuses(&[
        "`base_model.model.lm_head.weight`",
        "it is [322, 48], that of the base is [320, 48]",
        "merge_and_unload",
    ])?;

    let mut stray = plain;
    stray.insert("base_model.model.model.layers.7.mlp.up_proj.base_layer.weight".to_owned(), (vec![1], vec![0.5]));
    write_tensors(&weights, stray)?;
    refuses(&["layers.7.mlp.up_proj.base_layer.weight", "belongs to no module of the base"])
}

/// The template that lies beside an adapter is what it was trained with.
#[test]
fn an_adapters_own_template_and_tokenizer_are_used() -> Result<()> {
    let path = fixture("adapters/embedding");
    let Loaded { model, .. } = adapter(&path, "llama")?;
    let messages = [json!({"role": "user", "content": "Zähle bis drei: 12 + 7?"})];
    assert_eq!(prompt_ids(&model, &messages)?, stored_ids(&path.join("expected.safetensors"), "prompt")?);
    assert_ne!(prompt_ids(&model, &messages)?, prompt_ids(&crate::support::model("llama")?, &messages)?);
    // Without one, those of the base.
    let Loaded { model: plain, .. } = adapter(&fixture("adapters/tied-head"), "llama-tied")?;
    assert!(plain.text_from.is_none());
    let base = crate::support::model("llama-tied")?;
    assert_eq!(prompt_ids(&plain, &messages)?, prompt_ids(&base, &messages)?);

    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    let on = |adapter: &Path| {
        let mut command = eval(adapter, &rows);
        command.arg("--base-model").arg(fixture("models/llama"));
        command
    };
    let note = "note: the adapter's own chat template is used, not the base's";
    assert!(succeeds(&mut on(&path))?.stderr.contains(note));
    // The same template, as `tokenizer_config.json` alone holds it.
    let older = place.copy(&path, "older")?;
    let template = fs::read_to_string(path.join("chat_template.jinja"))?;
    fs::remove_file(older.join("chat_template.jinja"))?;
    fs::remove_file(older.join("tokenizer.json"))?;
    set_fields(&older.join("tokenizer_config.json"), json!({"chat_template": template}))?;
    assert_eq!(succeeds(&mut on(&older))?.stdout, succeeds(&mut on(&path))?.stdout);
    // That of the base says nothing new.
    fs::copy(fixture("models/llama/chat_template.jinja"), older.join("chat_template.jinja"))?;
    let ran = succeeds(&mut on(&older))?;
    assert!(!ran.stderr.contains("note: "), "{}", ran.stderr);
    assert_ne!(ran.stdout, succeeds(&mut on(&path))?.stdout);
    Ok(())
}

#[test]
fn a_broken_template_is_told_by_the_file_that_has_it() -> Result<()> {
    let place = Place::new()?;
    let path = place.copy(&fixture("adapters/embedding"), "broken")?;
    let tells = |file: &Path, text: &str| -> Result<()> {
        fs::create_dir_all(file.parent().context("it has one")?)?;
        let before = fs::read(file).ok();
        fs::write(file, text)?;
        let error = format!("{:#}", adapter(&path, "llama").err().context("it is broken")?);
        assert!(error.contains(&file.display().to_string()), "{error}");
        match before {
            Some(before) => Ok(fs::write(file, before)?),
            None => Ok(fs::remove_file(file)?),
        }
    };
    tells(&path.join("chat_template.jinja"), "{% for é %}")?;
    tells(&path.join("additional_chat_templates/tool_use.jinja"), "{{ 'ü }}")?;
    tells(&path.join("additional_chat_templates/default.jinja"), "{% endif %}")?;
    adapter(&path, "llama").map(|_| ())
}

/// What an adapter's directory does not say of its tokenizer is as the base has it: its template writes `bos_token`.
#[test]
fn a_tokenizer_beside_an_adapter_has_the_bases_special_tokens() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    fs::write(
        base.join("chat_template.jinja"),
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}",
    )?;
    set_fields(&base.join("tokenizer_config.json"), json!({"add_bos_token": true}))?;
    let whole = Tokenizer::from_dir(&base)?;
    let told = |tokenizer: &Tokenizer| {
        let tokens = [&tokenizer.bos_token, &tokenizer.eos_token, &tokenizer.pad_token].map(Clone::clone);
        (tokens, tokenizer.add_bos, tokenizer.config_json()["model_max_length"].clone())
    };
    let beside = place.path("adapter");
    fs::create_dir(&beside)?;
    fs::copy(base.join("tokenizer.json"), beside.join("tokenizer.json"))?;
    assert!(Tokenizer::of_adapter(&beside, &whole)?.is_none(), "nothing there differs from the base's");
    // With one that differs, the base's words stand all the same.
    add_token(&beside, "<|größer|>", 320)?;
    let own = Tokenizer::of_adapter(&beside, &whole)?.context("it has a token more")?;
    assert_eq!(told(&own), told(&whole));
    assert_eq!((own.bos_id, own.id("<|größer|>")), (Some(1), Some(320)));
    // What it says is its own; a `null` says that there is none.
    fs::write(beside.join("tokenizer_config.json"), r#"{"bos_token": null, "pad_token": "<|größer|>"}"#)?;
    let own = Tokenizer::of_adapter(&beside, &whole)?.context("it has other ones")?;
    let token = |text: &str| Some(text.to_owned());
    assert_eq!([&own.bos_token, &own.eos_token, &own.pad_token], [&None, &token("<|im_end|>"), &token("<|größer|>")]);
    Ok(())
}

/// Adds a token to a directory's `tokenizer.json`.
fn add_token(dir: &Path, token: &str, id: u32) -> Result<()> {
    let path = dir.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let mut added = tokenizer["added_tokens"][0].clone();
    added["id"] = id.into();
    added["content"] = token.into();
    tokenizer["added_tokens"].as_array_mut().context("a list")?.push(added);
    Ok(fs::write(path, tokenizer.to_string())?)
}

#[test]
fn an_adapters_new_tokens_without_embeddings_are_refused_by_name() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 2)?;
    let copy = place.copy(&fixture("adapters/embedding"), "adapter")?;
    let on = |base: &Path| {
        let mut command = eval(&copy, &rows);
        command.arg("--base-model").arg(base);
        command
    };
    add_token(&copy, "<|größer|>", 320)?;
    // One that fills batches is never read.
    add_token(&copy, "[PAD]", 321)?;
    set_fields(&copy.join("tokenizer_config.json"), json!({"pad_token": "[PAD]"}))?;
    let words = ["no embedding for: \"<|größer|>\"; ", "merge_and_unload"];
    refused(&mut on(&fixture("models/llama")), &words)?;
    // Where the base's tokenizer has it as well, it is nothing new.
    let base = place.copy(&fixture("models/llama"), "base")?;
    add_token(&base, "<|größer|>", 320)?;
    succeeds(&mut on(&base)).map(|_| ())
}

/// Going on from an adapter keeps what it was trained with, in the result and in what is exported of it.
#[test]
fn what_goes_on_from_an_adapter_has_its_template() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (fixture("models/llama"), place.rows("rows.jsonl", 5)?);
    let options = ["--max-steps", "2", "--learning-rate", "1e-2", "--r", "2"];
    succeeds(place.fine_tune(&base, &rows).args(options))?;
    // As PEFT has it: without `homeroom.json`.
    let first = place.path("first");
    fs::rename(place.path("outputs/out"), &first)?;
    assert!(!first.join("chat_template.jinja").exists(), "an adapter of the base's own template needs none");
    fs::remove_file(first.join("homeroom.json"))?;
    let template = fs::read(fixture("adapters/embedding/chat_template.jinja"))?;
    fs::write(first.join("chat_template.jinja"), &template)?;

    let ran = succeeds(place.fine_tune(&base, &rows).args(options).arg("--init-from").arg(&first))?;
    assert!(ran.stderr.contains("the adapter's own chat template is used"), "{}", ran.stderr);
    let out = place.path("outputs/out");
    assert_eq!(fs::read(out.join("chat_template.jinja"))?, template);
    let Loaded { model, .. } = adapter(&out, "llama")?;
    let manifest = AdapterFiles::read(&out)?.manifest.context("it has one")?;
    assert_eq!(manifest.template_digest, model.tokenizer.template_digest());
    assert_eq!(manifest.tokenizer_digest, model.tokenizer.digest());
    let ran = run(&mut eval(&out, &rows))?;
    assert!(!ran.stderr.contains("warning"), "{}", ran.stderr);

    let merged = place.path("merged");
    let mut export = homeroom();
    export.args(["export-model", "--format", "merged", "--model-dir"]).arg(&out);
    succeeds(export.arg("--output-dir").arg(&merged))?;
    assert_eq!(fs::read(merged.join("chat_template.jinja"))?, template);
    assert!((loss(&merged, &rows)? - loss(&out, &rows)?).abs() < 1e-4);
    Ok(())
}

// --- rows ------------------------------------------------------------------------------------------------------------

/// A token that was added to a tokenizer without a row in the embedding stops those who use it, and when it is read.
#[test]
fn a_token_that_the_embedding_lacks_is_named_by_line_and_stops_no_other_row() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    add_token(&base, "<|größer|>", 320)?;
    let text = |text: &str| format!("{}\n", json!({"text": text}));
    let fine = place.write("fine.jsonl", [text("12 ist mehr als 7"), text("größer")].concat())?;
    succeeds(place.fine_tune(&base, &fine).args(["--max-steps", "1"]))?;
    fs::remove_dir_all(place.path("outputs/out"))?;

    let lines = [text("eins"), text("12 <|größer|> 7"), text("zwei"), text("<|größer|>")];
    let wrong = place.write("wrong.jsonl", lines.concat())?;
    let said = "token 320, \"<|größer|>\", has no embedding: the model knows 320 tokens, its tokenizer more";
    let words = ["wrong.jsonl: 2 problems", &format!("line 2: {said}"), &format!("line 4: {said}"), "hint: "];
    refused(&mut place.fine_tune(&base, &wrong), &words)?;
    assert!(place.outputs()?.is_empty());

    // A template that writes it makes a prompt that cannot be answered; typed, it is text.
    let template = base.join("chat_template.jinja");
    let chat = |prompt: &str| {
        let mut chat = homeroom();
        chat.args(["chat", "--max-tokens", "1", "--prompt", prompt, "--model-dir"]).arg(&base);
        chat
    };
    succeeds(&mut chat("12 <|größer|> 7?"))?;
    fs::write(
        &template,
        fs::read_to_string(&template)?.replace("message['role'] +", "message['role'] + '<|größer|>' +"),
    )?;
    refused(&mut chat("12?"), &[said])
}

// --- the registry ----------------------------------------------------------------------------------------------------

#[test]
fn a_listed_model_says_what_it_lacks() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    let rows = place.rows("rows.jsonl", 3)?;
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1"]))?;
    let trained = place.path("outputs/out");
    for name in ["a-whole", "b-cut", "c-empty", "d-unreadable"] {
        place.copy(&trained, &format!("home/models/{name}"))?;
    }
    let weights = fs::read(trained.join("adapter_model.safetensors"))?;
    place.write("home/models/b-cut/adapter_model.safetensors", &weights[..weights.len() - 1])?;
    fs::remove_file(place.path("home/models/c-empty/adapter_model.safetensors"))?;
    place.write("home/models/d-unreadable/homeroom.json", "{")?;
    // One that PEFT wrote, and a model.
    place.copy(&fixture("adapters/tied-head"), "home/models/e-peft")?;
    set_fields(
        &place.path("home/models/e-peft/adapter_config.json"),
        json!({"base_model_name_or_path": fixture("models/llama-tied")}),
    )?;
    let model = place.copy(&base, "home/models/f-model")?;
    let list = |arguments: &[&str]| -> Result<String> {
        let mut list = homeroom();
        list.env("HOMEROOM_HOME", place.path("home")).arg("list-models").args(arguments);
        Ok(succeeds(&mut list)?.stdout)
    };
    let problems = || -> Result<Vec<Option<String>>> {
        let entries: Vec<Value> = serde_json::from_str(&list(&["--json"])?)?;
        Ok(entries.iter().map(|entry| entry["problem"].as_str().map(str::to_owned)).collect())
    };
    let check = |words: [Option<&str>; 6]| -> Result<()> {
        let (found, printed) = (problems()?, list(&[])?);
        assert_eq!((found.len(), printed.lines().count()), (6, 6), "{printed}");
        for ((found, line), word) in found.iter().zip(printed.lines()).zip(words) {
            let fine = match (found, word) {
                (Some(found), Some(word)) => found.contains(word) && line.contains(&format!("problem: {found}")),
                (None, None) => !line.contains("problem"),
                _ => false,
            };
            assert!(fine, "{word:?}: {found:?} in {line}");
        }
        Ok(())
    };
    let cut = Some("adapter_model.safetensors: not a whole safetensors file");
    let empty = Some("adapter_model.safetensors: cannot open");
    let unreadable = Some("homeroom.json: not JSON");
    check([None, cut, empty, unreadable, None, None])?;
    assert!(list(&[])?.lines().nth(4).is_some_and(|line| line.contains("lora") && line.contains("llama-tied")));
    fs::rename(&base, place.path("moved"))?;
    fs::remove_file(model.join("model.safetensors"))?;
    let gone = Some("its base is not there; `--base-model` names where it is");
    check([gone, cut, empty, unreadable, None, Some("neither model.safetensors nor")])
}

#[test]
fn a_listed_model_that_cannot_be_loaded_says_so_and_one_that_can_does_not() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    succeeds(place.fine_tune(&fixture("models/llama"), &rows).args(["--max-steps", "1"]))?;
    place.copy(&place.path("outputs/out"), "home/models/a-newer")?;
    set_fields(&place.path("home/models/a-newer/homeroom.json"), json!({"format": 2}))?;
    let [gguf, config, tokenizer] = ["b-gguf", "c-no-config", "d-no-tokenizer"];
    for name in [gguf, config, tokenizer] {
        place.copy(&fixture("models/llama"), &format!("home/models/{name}"))?;
    }
    let at = |name: &str, file: &str| place.path(&format!("home/models/{name}/{file}"));
    fs::copy(fixture("models/llama-gguf/model-f32.gguf"), at(gguf, "modell.gguf"))?;
    fs::remove_file(at(gguf, "model.safetensors"))?;
    fs::remove_file(at(config, "config.json"))?;
    fs::remove_file(at(tokenizer, "tokenizer.json"))?;
    let mut list = homeroom();
    let ran = succeeds(list.env("HOMEROOM_HOME", place.path("home")).args(["list-models", "--json"]))?;
    let entries: Vec<Value> = serde_json::from_str(&ran.stdout)?;
    let expected = [
        ("a-newer", Some("format 2 is not known; this program reads 1")),
        (gguf, None),
        (config, Some("neither config.json nor a .gguf file")),
        (tokenizer, Some("tokenizer.json: not there")),
    ];
    assert_eq!(entries.len(), expected.len());
    for (entry, (name, word)) in entries.iter().zip(expected) {
        let found = entry["problem"].as_str();
        let fits =
            found.is_some() == word.is_some() && found.zip(word).is_none_or(|(found, word)| found.contains(word));
        assert!(entry["name"] == name && fits, "{word:?}: {entry}");
        assert_eq!(
            Loaded::load(&ModelRef { name: at(name, ""), ..ModelRef::default() }, Network::Never("a test")).is_ok(),
            word.is_none()
        );
    }
    Ok(())
}

/// An adapter says what it likes of its base; piped, too, it has one line.
#[test]
fn what_an_adapter_says_of_itself_stays_in_its_line() -> Result<()> {
    let place = Place::new()?;
    let copy = place.copy(&fixture("adapters/tied-head"), "home/models/eins")?;
    let base = "no\nzwei   lora   held-out loss  0.001   on größe";
    set_fields(
        &copy.join("adapter_config.json"),
        json!({"base_model_name_or_path": base, "peft_type": "LORA\n\u{1b}"}),
    )?;
    let mut list = homeroom();
    let ran = succeeds(list.env("HOMEROOM_HOME", place.path("home")).arg("list-models"))?;
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    for word in ["lora\\u{a}\\u{1b}", "on no\\u{a}zwei", "größe"] {
        assert!(ran.stdout.contains(word), "no `{word}` in {}", ran.stdout);
    }
    // None at all is not a name.
    set_fields(&copy.join("adapter_config.json"), json!({"base_model_name_or_path": ""}))?;
    let rows = place.rows("rows.jsonl", 2)?;
    refused(&mut eval(&copy, &rows), &["it does not say which base model it belongs to", "--base-model"])
}

/// A model that is trained again under its name answers from the next request on; one that comes to be damaged does not.
#[test]
fn a_handler_answers_with_what_is_under_the_name_now() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 5)?;
    let train = |steps: &str| {
        let mut command = place.fine_tune(&fixture("models/llama"), &rows);
        succeeds(command.args(["--overwrite", "--learning-rate", "3e-2", "--max-steps", steps]))
    };
    train("1")?;
    let reference = ModelRef { name: place.path("outputs/out"), ..ModelRef::default() };
    let load = || Local::load("tutor", reference.clone(), Compute::F32);
    let answer = |handler: &Local| -> Result<String> {
        Ok(handler.complete(&asked("times seven: 3", 16), &handler::Context::default())?.text().to_owned())
    };
    let serving = load()?;
    let first = answer(&serving)?;
    train("6")?;
    let second = answer(&load()?)?;
    assert_ne!(first, second, "the trainings cannot be told apart");
    assert_eq!(answer(&serving)?, second);

    let weights = place.path("outputs/out/adapter_model.safetensors");
    let whole = fs::read(&weights)?;
    fs::write(&weights, &whole[..whole.len() / 2])?;
    assert_eq!(answer(&serving)?, second);
    assert!(load().is_err());
    train("1")?;
    assert_eq!(answer(&serving)?, first);
    Ok(())
}

/// Two handlers with two adapters on one base use the memory of one; each answers as it does alone, also at once.
#[test]
fn handlers_of_one_base_share_it() -> Result<()> {
    let place = Place::new()?;
    // A base of its own: other tests in this process answer with the fixture.
    let (base, rows) = (place.copy(&fixture("models/llama"), "base")?, place.rows("rows.jsonl", 5)?);
    for (steps, name) in [("1", "one"), ("6", "two")] {
        let mut command = place.fine_tune(&base, &rows);
        succeeds(command.args(["--overwrite", "--learning-rate", "3e-2", "--max-steps", steps]))?;
        place.copy(&place.path("outputs/out"), name)?;
    }
    let reference = |name: &str| ModelRef { name: place.path(name), ..ModelRef::default() };
    let load = |name: &str, compute| Answerer::load(&reference(name), Network::Never("a test"), compute);
    let (one, two) = (load("one", Compute::F32)?, load("two", Compute::F32)?);
    assert!(Arc::ptr_eq(&one.engine, &two.engine));
    let weights = one.model().modules.iter().zip(&two.model().modules);
    assert!(weights.into_iter().all(|(a, b)| Arc::ptr_eq(&a.weight, &b.weight)));
    let generation = |answerer: &Answerer| answerer.adapter.as_ref().map(|adapter| adapter.generation());
    assert_eq!(generation(&one), generation(&load("one", Compute::F32)?), "what is unchanged is kept");
    assert!(!Arc::ptr_eq(&one.engine, &load("one", Compute::Plain)?.engine), "it computes otherwise");

    let answer = |name: &str| -> Result<String> {
        let handler = Local::load(name, reference(name), Compute::F32)?;
        Ok(handler.complete(&asked("times seven: 3", 16), &handler::Context::default())?.text().to_owned())
    };
    let alone = [answer("one")?, answer("two")?];
    assert_ne!(alone[0], alone[1], "the trainings cannot be told apart");
    std::thread::scope(|scope| {
        let both: Vec<_> = (0..6)
            .map(|i| {
                scope.spawn({
                    let answer = &answer;
                    move || answer(["one", "two"][i % 2])
                })
            })
            .collect();
        for (number, said) in both.into_iter().enumerate() {
            let said = said.join().expect("it does not panic").expect("it answers");
            assert_eq!(said, alone[number % 2], "request {number}");
        }
    });

    fs::copy(place.path("two/adapter_model.safetensors"), place.path("one/adapter_model.safetensors"))?;
    let anew = load("one", Compute::F32)?;
    assert!(Arc::ptr_eq(&one.engine, &anew.engine));
    assert_ne!(generation(&one), generation(&anew), "a file of it has changed");
    assert_eq!(answer("one")?, alone[1]);
    let engine = Arc::downgrade(&one.engine);
    drop((one, two, anew));
    assert!(engine.upgrade().is_none(), "a base goes when nobody answers with it");
    Ok(())
}

// --- the base --------------------------------------------------------------------------------------------------------

/// `homeroom.json` tells of every byte of the base's files; of values alone, some rows are sampled.
#[test]
fn a_byte_of_the_base_that_was_changed_is_noticed() -> Result<()> {
    let place = Place::new()?;
    let (base, rows) = (place.copy(&fixture("models/llama"), "base")?, place.rows("rows.jsonl", 3)?);
    succeeds(place.fine_tune(&base, &rows).args(["--max-steps", "1"]))?;
    let out = place.path("outputs/out");
    let warned = || -> Result<bool> {
        let said = succeeds(&mut eval(&out, &rows))?.stderr;
        Ok(said.contains("warning: ")
            && said.contains("model.safetensors is not the file that the adapter was trained on"))
    };
    let recorded = read_json(&out.join("homeroom.json"))?["base"]["files"].clone();
    assert!(recorded["model.safetensors"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{recorded}");
    assert!(!warned()?);
    let weights = base.join("model.safetensors");
    let mut bytes = fs::read(&weights)?;
    let (before, second_row) =
        (BaseModel::load(&base)?.digest(), map_safetensors(&weights)?["lm_head.weight"].range.start + 4 * 48);
    bytes[second_row] ^= 1;
    fs::write(&weights, &bytes)?;
    assert_eq!(BaseModel::load(&base)?.digest(), before, "no sampled row is changed");
    assert!(warned()?);
    // What recorded nothing of files says nothing of them.
    let mut manifest = read_json(&out.join("homeroom.json"))?;
    manifest["base"].as_object_mut().context("an object")?.remove("files");
    fs::write(out.join("homeroom.json"), manifest.to_string())?;
    assert!(!warned()?);
    Ok(())
}
