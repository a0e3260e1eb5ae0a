//! What was trained, by name: listed, used by that name, and exported for other programs.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, anyhow, ensure};
use homeroom_engine::data::{OnLongRow, check_row};
use homeroom_engine::files::replaceable;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;
use serde_json::{Value, json};

use crate::support::{Place, distance, fixture, homeroom, plugin_path};

/// The program with its own data directory and the strategies that cargo built.
fn program(home: &Path) -> Result<Command> {
    let mut command = homeroom();
    let plugins = plugin_path("lora").parent().context("a library lies in a directory")?.to_owned();
    command.env("HOMEROOM_HOME", home).env("HOMEROOM_PLUGINS", plugins);
    Ok(command)
}

fn done(command: &mut Command) -> Result<Output> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

fn json(output: &Output) -> Result<Value> {
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn train(home: &Path, model: &str, name: &str) -> Result<()> {
    let mut command = program(home)?;
    command.arg("fine-tune").arg("--model-name").arg(fixture("models").join(model));
    command.arg("--training-file").arg(fixture("rows/colours.jsonl")).args(["--name", name, "--max-steps", "4"]);
    command.args(["--learning-rate", "2e-2", "--eval-fraction", "0.2", "--warmup-ratio", "0"]);
    done(&mut command).map(|_| ())
}

#[test]
fn a_model_that_was_trained_by_name_is_listed_and_answers_by_name() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), "llama", "colours")?;
    let list = json(&done(program(home.path())?.args(["list-models", "--json"]))?)?;
    ensure!(list.as_array().is_some_and(|list| list.len() == 1), "{list}");
    let entry = &list[0];
    assert_eq!((entry["name"].as_str(), entry["kind"].as_str()), (Some("colours"), Some("adapter")));
    assert_eq!(entry["strategy"], "lora");
    assert!(entry["eval_loss"].as_f64().is_some_and(|loss| loss > 0.0), "{entry}");

    let eval = |name: &Path| -> Result<f64> {
        let mut command = program(home.path())?;
        command.arg("eval").arg("--model-dir").arg(name).arg("--json");
        let output = done(command.arg("--file").arg(fixture("rows/colours.jsonl")))?;
        json(&output)?["loss"].as_f64().context("`eval` prints a loss")
    };
    assert_eq!(eval(Path::new("colours"))?, eval(&home.path().join("models/colours"))?);
    assert!(eval(Path::new("colours"))? < eval(&fixture("models/llama"))?);
    Ok(())
}

#[test]
fn a_name_is_not_written_over_unless_asked() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), "llama", "colours")?;
    let error = train(home.path(), "llama", "colours").unwrap_err().to_string();
    assert!(error.contains("there is a model of this name already") && error.contains("--overwrite"), "{error}");
    let error = train(home.path(), "llama", "../colours").unwrap_err().to_string();
    assert!(error.contains("is not a model's name"), "{error}");
    Ok(())
}

/// The export is the trained model to f32 rounding, with the base's tokenizer byte for byte and the template where old and new
/// readers look for it.
#[test]
fn a_merged_export_is_the_trained_model() -> Result<()> {
    let home = tempfile::tempdir()?;
    for model in ["llama", "llama-gguf/model-mixed.gguf"] {
        let name = if model == "llama" { "from-directory" } else { "from-gguf" };
        train(home.path(), model, name)?;
        let out = home.path().join(format!("{name}-merged"));
        let mut command = program(home.path())?;
        command
            .args(["export-model", "--model-dir", name, "--format", "merged", "--json"])
            .arg("--output-dir")
            .arg(&out);
        let kl = json(&done(&mut command)?)?["kl"].as_f64().context("the export prints its KL")?;
        assert!((0.0..1e-8).contains(&kl.abs()), "{model}: {kl}");

        let base = BaseModel::load(&fixture("models").join(model))?;
        let files = homeroom_engine::adapt::adapter::AdapterFiles::read(&home.path().join("models").join(name))?;
        let adaptation = files.adapt(&base, false)?;
        let batch = Batch::of_tokens(&[1, 30, 31, 200, 77, 9], 0);
        let logits = |pass: &Pass<'_>| -> Result<Vec<f32>> { Ok(pass.logits(&batch)?.flatten_all()?.to_vec1()?) };
        let trained = logits(&Pass::evaluation(&base, Some(&adaptation)))?;
        let exported = logits(&Pass::evaluation(&BaseModel::load(&out)?, None))?;
        assert!(distance(&trained, &exported) < 1e-3, "{model}: {}", distance(&trained, &exported));
        assert!(distance(&trained, &logits(&Pass::evaluation(&base, None))?) > 1e-2, "{model}: nothing was learned");

        let config: Value = serde_json::from_slice(&fs::read(out.join("tokenizer_config.json"))?)?;
        let template = fs::read_to_string(out.join("chat_template.jinja"))?;
        assert_eq!(config["chat_template"].as_str(), Some(template.as_str()));
        if model == "llama" {
            let original = fixture("models/llama/tokenizer.json");
            assert_eq!(fs::read(out.join("tokenizer.json"))?, fs::read(original)?);
        }
    }
    Ok(())
}

/// A copy of a fixture whose chat templates are these.
fn with_templates(place: &Path, default: &str, named: &[(&str, &str)], listed: bool) -> Result<()> {
    fs::create_dir(place)?;
    for entry in fs::read_dir(fixture("models/llama"))? {
        let path = entry?.path();
        fs::copy(&path, place.join(path.file_name().context("an entry has a name")?))?;
    }
    if !listed {
        fs::create_dir(place.join("additional_chat_templates"))?;
        for (name, template) in named {
            fs::write(place.join(format!("additional_chat_templates/{name}.jinja")), template)?;
        }
        return Ok(fs::write(place.join("chat_template.jinja"), default)?);
    }
    fs::remove_file(place.join("chat_template.jinja"))?;
    let config = place.join("tokenizer_config.json");
    let mut fields: Value = serde_json::from_slice(&fs::read(&config)?)?;
    let all = [&[("default", default)], named].concat();
    fields["chat_template"] = all.iter().map(|(name, template)| json!({"name": name, "template": template})).collect();
    Ok(fs::write(config, fields.to_string())?)
}

const PLAIN: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A row with tools is trained by the template for tools, and what comes of the training answers by it.
#[test]
fn every_chat_template_of_a_base_is_trained_with_and_exported() -> Result<()> {
    let home = tempfile::tempdir()?;
    let tool_use =
        format!("{{% if tools %}}<|im_start|>tools\n{{{{ tools[0].function.name }}}}<|im_end|>\n{{% endif %}}{PLAIN}");
    let named = [("tool_use", tool_use.as_str()), ("rag", "é")];
    let rows = home.path().join("rows.jsonl");
    let tools = json!([{"type": "function", "function": {"name": "wetter"}}]);
    let messages = json!([{"role": "user", "content": "wie?"}, {"role": "assistant", "content": "gut"}]);
    fs::write(&rows, format!("{}\n", json!({"messages": messages, "tools": tools})))?;
    for (name, strategy, listed) in [("listed", "lora", true), ("files", "full", false)] {
        let base = home.path().join(format!("{name}-base"));
        with_templates(&base, PLAIN, &named, listed)?;
        let model = BaseModel::load(&base)?;
        let encoder = homeroom::models::encoder(&model, None, OnLongRow::Refuse)?;
        let example = |row: &Value| -> Result<String> {
            let row = check_row(&row.to_string()).map_err(|problem| anyhow!("{problem}"))?;
            let examples = encoder.examples(1, &row).map_err(|problem| anyhow!("{problem}"))?;
            model.tokenizer.decode(&examples.context("it is short")?.0[0].ids, false)
        };
        assert!(
            example(&json!({"messages": messages, "tools": tools}))?.starts_with("<|im_start|>tools\nwetter<|im_end|>")
        );
        assert!(example(&json!({"messages": messages}))?.starts_with("<|im_start|>user\nwie?"));

        let mut command = program(home.path())?;
        command.arg("fine-tune").arg("--model-name").arg(&base).arg("--training-file").arg(&rows);
        done(command.args(["--strategy", strategy, "--name", name, "--max-steps", "1"]))?;
        let mut out = home.path().join("models").join(name);
        if strategy == "lora" {
            out = home.path().join("merged");
            for overwrite in [&[][..], &["--overwrite"]] {
                let mut command = program(home.path())?;
                command.args(["export-model", "--model-dir", name, "--format", "merged"]).args(overwrite);
                done(command.arg("--output-dir").arg(&out))?;
            }
        }
        for (name, template) in named {
            assert_eq!(fs::read_to_string(out.join(format!("additional_chat_templates/{name}.jinja")))?, template);
        }
        let written = BaseModel::load(&out)?;
        assert_eq!(written.tokenizer.template_digest(), model.tokenizer.template_digest());
        let config: Value = serde_json::from_slice(&fs::read(out.join("tokenizer_config.json"))?)?;
        assert_eq!(config["chat_template"].as_array().map(Vec::len), Some(3), "{config}");
        // A directory that holds anything else is not replaced.
        fs::write(out.join("additional_chat_templates/notes.txt"), "mine")?;
        let message = replaceable(&out).expect_err("notes would be lost").to_string();
        assert!(message.contains("holds `additional_chat_templates`"), "{message}");
    }
    Ok(())
}

#[test]
fn a_template_that_ends_no_turn_is_told_before_the_training() -> Result<()> {
    let home = tempfile::tempdir()?;
    let rows = home.path().join("rows.jsonl");
    let row = json!({"prompt": "wie?", "completion": "gut"});
    fs::write(&rows, format!("{row}\n{row}\n"))?;
    let endless = PLAIN.replace("<|im_end|>\n", "\n\n");
    for (name, template) in [("ends", PLAIN), ("goes-on", endless.as_str())] {
        let base = home.path().join(format!("{name}-base"));
        with_templates(&base, template, &[], false)?;
        let mut command = program(home.path())?;
        command.arg("fine-tune").arg("--model-name").arg(&base).arg("--training-file").arg(&rows);
        let output = done(command.args(["--name", name, "--max-steps", "1"]))?;
        let said = String::from_utf8_lossy(&output.stderr).contains("note: 2 of 2 examples end without an end token");
        assert_eq!(said, name == "goes-on", "{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Sixteen bits round what was learned; the program says by how much, and how to keep it.
#[test]
fn an_export_is_in_the_floats_that_are_asked_for() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), "llama", "colours")?;
    let mut divergences = Vec::new();
    for (dtype, name, bytes) in [("f32", "float32", 4), ("f16", "float16", 2), ("bfloat16", "bfloat16", 2)] {
        let out = home.path().join(dtype);
        let mut command = program(home.path())?;
        command.args(["export-model", "--model-dir", "colours", "--format", "merged", "--json", "--dtype", dtype]);
        let output = done(command.arg("--output-dir").arg(&out))?;
        let said = json(&output)?;
        assert_eq!(said["dtype"], name);
        let kl = said["kl"].as_f64().context("the export prints its KL")?;
        let hint = String::from_utf8_lossy(&output.stderr).contains("--dtype f32");
        assert_eq!(hint, kl > 1e-4 && dtype != "f32", "{dtype}: {kl}");
        divergences.push(kl.abs());
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json"))?)?;
        let stored = config.get("dtype").or(config.get("torch_dtype"));
        assert_eq!(stored.and_then(Value::as_str), Some(name), "{config}");
        let parameters = BaseModel::load(&out)?.parameter_count() as u64;
        let size = fs::metadata(out.join("model.safetensors"))?.len();
        assert!((parameters * bytes..parameters * bytes * 11 / 10).contains(&size), "{dtype}: {size}");
    }
    assert!(divergences.is_sorted() && divergences[2] > 1e-7, "{divergences:?}");
    Ok(())
}

/// A base in other floats, and a GGUF file as a directory.
#[test]
fn a_base_without_an_adapter_is_exported_as_it_is() -> Result<()> {
    let home = tempfile::tempdir()?;
    for base in ["qwen2", "llama-gguf/model-mixed.gguf", "llama-tied"] {
        let out = home.path().join("out");
        let mut command = program(home.path())?;
        command.args(["export-model", "--overwrite", "--dtype", "f32", "--json", "--model-dir"]);
        command.arg(fixture("models").join(base)).arg("--output-dir").arg(&out);
        let output = done(command.arg("--file").arg(fixture("rows/colours.jsonl")))?;
        let said = json(&output)?;
        assert_eq!((&said["kl"], &said["largest_difference"]), (&json!(0.0), &json!(0.0)), "{base}");
        assert_eq!(said["loss"], said["loss_exported"], "{base}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("colours.jsonl stays "), "{told}");
        let (base, written) = (BaseModel::load(&fixture("models").join(base))?, BaseModel::load(&out)?);
        assert_eq!(written.digest(), base.digest());
        assert_eq!(written.architecture.tie_word_embeddings, base.architecture.tie_word_embeddings);
    }
    Ok(())
}

/// A base names the end of a text; what it is tuned on ends turns as its template does. It stops there, and so does what loads the export.
#[test]
fn a_base_that_names_another_end_learns_that_of_its_template() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    for (file, key, end) in [
        ("tokenizer_config.json", "eos_token", "<|endoftext|>".into()),
        ("generation_config.json", "eos_token_id", 0.into()),
        ("config.json", "eos_token_id", 0.into()),
    ] {
        let mut config: Value = serde_json::from_slice(&fs::read(base.join(file))?)?;
        config[key] = end;
        place.write(&format!("base/{file}"), config.to_string())?;
    }
    let row = serde_json::json!({"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pöng"}]});
    let rows = place.write("rows.jsonl", format!("{row}\n").repeat(8))?;
    let mut training = place.fine_tune(&base, &rows);
    done(training.args(["--max-steps", "40", "--learning-rate", "1e-2", "--warmup-ratio", "0"]))?;
    let (tuned, out) = (place.path("outputs/out"), place.path("merged"));
    let said = |model: &Path| -> Result<String> {
        let mut chat = homeroom();
        chat.args(["chat", "--prompt", "ping", "--temperature", "0", "--max-tokens", "40", "--model-dir"]).arg(model);
        Ok(String::from_utf8(done(&mut chat)?.stdout)?)
    };
    assert_eq!(said(&tuned)?, "pöng\n");

    let mut export = homeroom();
    export.args(["export-model", "--format", "merged", "--model-dir"]).arg(&tuned).arg("--output-dir").arg(&out);
    done(&mut export)?;
    let generation: Value = serde_json::from_slice(&fs::read(out.join("generation_config.json"))?)?;
    assert_eq!(generation["eos_token_id"], serde_json::json!([0, 2]), "{generation}");
    assert_eq!(generation["pad_token_id"], 0, "the base's own stays");
    assert_eq!(BaseModel::load(&out)?.tokenizer.eos_ids, [0, 2]);
    assert_eq!(said(&out)?, "pöng\n");
    Ok(())
}
