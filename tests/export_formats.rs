//! What is exported for other programs, by our own readers: adapters, directories for mlx-lm, bundles that start by themselves.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::adapt::merge::Merged;
use homeroom_engine::export::{Floats, model_bytes, save_model, save_model_in};
use homeroom_engine::files::NewDirectory;
use homeroom_engine::files::tensors::{map_directory, map_safetensors};
use homeroom_engine::models::BaseModel;
use serde_json::{Value, json};

use crate::support::{Place, fixture, homeroom, model, plugin_path, printed_json, refused, succeeds};

/// The program with its own data directory and the strategies that cargo built.
fn program(home: &Path) -> Result<Command> {
    let mut command = homeroom();
    let plugins = plugin_path("lora").parent().context("a library lies in a directory")?.to_owned();
    command.env("HOMEROOM_HOME", home).env("HOMEROOM_PLUGINS", plugins).env("HOMEROOM_PLUGIN_POLICY", "dev");
    Ok(command)
}

fn train(home: &Path, base: &Path, name: &str, strategy: &[&str]) -> Result<()> {
    let mut command = program(home)?;
    command.arg("fine-tune").arg("--model-name").arg(base);
    command.arg("--training-file").arg(fixture("rows/colours.jsonl")).args(["--name", name, "--max-steps", "3"]);
    command.args([
        "--learning-rate",
        "2e-2",
        "--warmup-ratio",
        "0",
        "--max-seq-len",
        "48",
        "--on-long-row",
        "truncate",
    ]);
    succeeds(command.args(strategy)).map(|_| ())
}

fn export(home: &Path, name: &str, format: &str, out: &Path, more: &[&str]) -> Result<Command> {
    let mut command = program(home)?;
    command.args(["export-model", "--json", "--model-dir", name, "--format", format]).args(more);
    command.arg("--output-dir").arg(out);
    Ok(command)
}

// --- models in several files -----------------------------------------------------------------------------------------

#[test]
fn a_model_in_several_files_is_the_one_in_a_single_file() -> Result<()> {
    let place = Place::new()?;
    for name in ["qwen2", "gemma3", "llama-tied"] {
        let base = model(name)?;
        let merged = Merged::new(&base, None)?;
        let bytes = model_bytes(&merged, Floats::Bf16)?;
        let write = |folder: &str, most: u64| -> Result<_> {
            let directory = NewDirectory::start(&place.path(&format!("outputs/{folder}")))?;
            save_model_in(&directory, &merged, Floats::Bf16, most, |_, _| ())?;
            directory.publish()
        };
        let (one, several) = (write("one", u64::MAX)?, write("several", bytes / 3)?);
        let index: Value = serde_json::from_slice(&fs::read(several.join("model.safetensors.index.json"))?)?;
        assert_eq!(index["metadata"]["total_size"], json!(bytes));
        let files = fs::read_dir(&several)?.filter(|entry| {
            entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("model-0000"))
        });
        let count = files.count();
        assert!((3..9).contains(&count), "{name}: {count} files");
        assert!(
            several.join(format!("model-00001-of-{count:05}.safetensors")).exists()
                && !several.join("model.safetensors").exists()
        );
        let (one, several) = (map_directory(&one)?, map_directory(&several)?);
        assert_eq!(one.len(), several.len());
        for (tensor, values) in &one {
            assert_eq!(values.bytes(), several[tensor].bytes(), "{name}: {tensor}");
        }
    }
    Ok(())
}

#[test]
fn what_a_disk_has_no_room_for_is_refused_before_it_is_begun() -> Result<()> {
    let base = model("llama")?;
    let merged = Merged::new(&base, None)?;
    let place = Place::new()?;
    let directory = NewDirectory::start(&place.path("outputs/out"))?;
    save_model(&directory, &merged, Floats::F32)?;
    let written = map_safetensors(&directory.path().join("model.safetensors"))?;
    let bytes: usize = written.values().map(|tensor| tensor.bytes().len()).sum();
    assert_eq!(model_bytes(&merged, Floats::F32)?, bytes as u64, "what is asked for is what is written");
    Ok(())
}

// --- adapters --------------------------------------------------------------------------------------------------------

#[test]
fn an_adapter_is_exported_as_peft_has_it_and_nothing_besides() -> Result<()> {
    let home = tempfile::tempdir()?;
    for (base, name, strategy) in [
        ("llama", "plain", &["--strategy", "lora", "--set-option", "r=3"][..]),
        (
            "qwen2",
            "pattern",
            &["--strategy", "lora", "--set-option", "use_rslora=true", "--set-option", "use_dora=true"][..],
        ),
        ("gemma3-multimodal", "part", &["--strategy", "lora"][..]),
    ] {
        train(home.path(), &fixture("models").join(base), name, strategy)?;
        let out = home.path().join("out");
        let said = printed_json(&succeeds(&mut export(home.path(), name, "peft", &out, &["--overwrite"])?)?)?;
        assert_eq!((&said["kl"], &said["largest_difference"]), (&json!(0.0), &json!(0.0)), "{base}");
        assert_eq!(said["peft_type"], "LORA");
        let mut files: Vec<String> = fs::read_dir(&out)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        files.sort();
        assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"], "{base}");
        let trained = home.path().join("models").join(name);
        for file in files {
            assert_eq!(fs::read(out.join(&file))?, fs::read(trained.join(&file))?, "{base}: {file}");
        }
    }
    Ok(())
}

#[test]
fn what_is_no_adapter_of_peft_is_refused_by_name() -> Result<()> {
    let home = tempfile::tempdir()?;
    let out = home.path().join("out");
    let base = fixture("models/llama");
    let name = base.to_str().context("a path in UTF-8")?;
    refused(&mut export(home.path(), name, "peft", &out, &[])?, &["not an adapter", "--format merged"])?;
    refused(&mut export(home.path(), name, "peft", &out, &["--dtype", "bf16"])?, &["--dtype", "f32"])?;
    assert!(!out.exists());
    Ok(())
}

// --- mlx-lm ----------------------------------------------------------------------------------------------------------

#[test]
fn a_directory_for_mlx_is_the_merged_model_and_other_families_are_refused() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), &fixture("models/qwen2"), "tuned", &[])?;
    let (mlx, merged) = (home.path().join("mlx"), home.path().join("merged"));
    let said = printed_json(&succeeds(&mut export(home.path(), "tuned", "mlx", &mlx, &["--dtype", "f32"])?)?)?;
    assert!(said["kl"].as_f64().is_some_and(|kl| kl < 1e-8), "{said}");
    succeeds(&mut export(home.path(), "tuned", "merged", &merged, &["--dtype", "f32"])?)?;
    for file in ["model.safetensors", "tokenizer.json"] {
        assert_eq!(fs::read(mlx.join(file))?, fs::read(merged.join(file))?, "{file}");
    }
    let base = fixture("models/granite4");
    let name = base.to_str().context("a path in UTF-8")?;
    let out = home.path().join("out");
    refused(&mut export(home.path(), name, "mlx", &out, &[])?, &["mlx-lm has no model", "granitemoehybrid", "qwen3"])?;
    Ok(())
}

// --- bundles ---------------------------------------------------------------------------------------------------------

/// Asks a server that `start.sh` of a bundle started, and ends it.
fn ask(bundle: &Path, route: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command
        .arg(bundle.join("start.sh"))
        .args(["--port", "0"])
        .env_remove("HOMEROOM_HOME")
        .env_remove("HOMEROOM_PLUGINS");
    let mut server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let asked = (|| {
        let stderr = BufReader::new(server.stderr.take().context("it is piped")?);
        let mut heard = String::new();
        let mut address = None;
        for line in stderr.lines() {
            let line = line?;
            if let Some(url) = line.strip_prefix("serving  http://") {
                address = url.split(['/', ' ']).next().map(str::to_owned);
                break;
            }
            heard += &line;
        }
        let address = address.with_context(|| format!("it does not serve: {heard}"))?;
        let body = json!({"model": route, "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": "grün?"}]}).to_string();
        let mut stream = TcpStream::connect(&address)?;
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").context("a reply has a body")?.1;
        let reply: Value =
            serde_json::from_str(&body[body.find('{').context("JSON")?..=body.rfind('}').context("JSON")?])?;
        let content = reply["choices"][0]["message"]["content"].as_str();
        content.map(str::to_owned).with_context(|| format!("no answer: {reply}"))
    })();
    server.kill()?;
    server.wait()?;
    asked
}

#[test]
fn a_bundle_is_moved_away_and_answers_as_the_model_did() -> Result<()> {
    let home = tempfile::tempdir()?;
    for (base, name, more) in [
        ("llama", "with-adapter", &[][..]),
        ("llama-gguf/model-mixed.gguf", "with-gguf", &[][..]),
        ("qwen2", "merged-in", &["--dtype", "f32"][..]),
        ("qwen3", "quantised", &["--dtype", "q8_0"][..]),
    ] {
        train(home.path(), &fixture("models").join(base), name, &[])?;
        let mut chat = program(home.path())?;
        chat.args(["chat", "--prompt", "grün?", "--temperature", "0", "--max-tokens", "12", "--model-dir", name]);
        let before = succeeds(&mut chat)?.stdout;
        let out = home.path().join("out");
        let said = printed_json(&succeeds(&mut export(home.path(), name, "bundle", &out, more)?)?)?;
        assert_eq!(said["route"], name);
        let elsewhere = tempfile::tempdir()?;
        let moved = elsewhere.path().join("a stick");
        fs::rename(&out, &moved)?;
        let bytes = homeroom_engine::files::bytes_below(&moved);
        let readme = fs::read_to_string(moved.join("README.md"))?;
        assert_eq!(said["bytes"].as_u64().context("a size")?, bytes - readme.len() as u64);
        assert_eq!(moved.join("adapter").exists(), more.is_empty());
        let answer = ask(&moved, name)?;
        // A quantised one may say another thing; that it answers is seen.
        assert!(answer.trim_end() == before.trim_end() || name == "quantised", "{name}: {answer} for {before}");
    }
    Ok(())
}

#[test]
fn a_bundle_holds_an_adapter_and_a_base_that_are_those_that_were_trained() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), &fixture("models/qwen3"), "tuned", &[])?;
    let out = home.path().join("out");
    for _ in 0..2 {
        succeeds(&mut export(home.path(), "tuned", "bundle", &out, &["--overwrite"])?)?;
    }
    let base = BaseModel::load(&out.join("model"))?;
    assert_eq!(base.digest(), model("qwen3")?.digest());
    AdapterFiles::read(&out.join("adapter"))?.adapt(&base, false)?;
    fs::write(out.join("model/notes.txt"), "mine")?;
    fs::write(out.join("notes.txt"), "mine")?;
    let mut again = export(home.path(), "tuned", "bundle", &out, &["--overwrite"])?;
    refused(&mut again, &["notes.txt", "would be lost"])?;
    ensure!(out.join("notes.txt").exists(), "it stays");
    Ok(())
}

// --- Ollama ----------------------------------------------------------------------------------------------------------

#[test]
fn a_folder_for_ollama_has_a_file_that_is_read_back_and_the_format_of_the_template() -> Result<()> {
    let home = tempfile::tempdir()?;
    train(home.path(), &fixture("models/qwen2"), "tuned", &[])?;
    let out = home.path().join("tuned-ollama");
    let said = printed_json(&succeeds(&mut export(home.path(), "tuned", "ollama", &out, &["--dtype", "f32"])?)?)?;
    assert!(said["kl"].as_f64().is_some_and(|kl| kl < 1e-8), "{said}");
    assert_eq!((&said["chat_format"], &said["file"]), (&json!("chatml"), &json!("model.gguf")));
    let modelfile = fs::read_to_string(out.join("Modelfile"))?;
    for line in ["FROM ./model.gguf", "# The chat format `chatml`.", "PARAMETER stop \"<|im_end|>\""] {
        assert!(modelfile.lines().any(|other| other == line), "{line} is not in\n{modelfile}");
    }
    BaseModel::load(&out.join("model.gguf"))?;
    succeeds(&mut export(home.path(), "tuned", "ollama", &out, &["--overwrite"])?)?;
    Ok(())
}

#[test]
fn an_adapter_on_a_gguf_file_goes_over_that_file() -> Result<()> {
    let home = tempfile::tempdir()?;
    let base = fixture("models/llama-gguf/model-mixed.gguf");
    train(home.path(), &base, "tuned", &[])?;
    let out = home.path().join("out");
    succeeds(&mut export(home.path(), "tuned", "ollama", &out, &[])?)?;
    let modelfile = fs::read_to_string(out.join("Modelfile"))?;
    let from = format!("FROM {}\nADAPTER ./adapter.gguf\n", base.canonicalize()?.display());
    assert!(modelfile.starts_with(&from), "{modelfile}");
    assert!(out.join("adapter.gguf").exists() && !out.join("model.gguf").exists());
    Ok(())
}

#[test]
fn a_chat_template_that_is_like_none_is_refused_before_anything_is_written() -> Result<()> {
    let place = Place::new()?;
    let base = place.copy(&fixture("models/llama"), "base")?;
    let odd = "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ME: ' }}{% endif %}";
    place.write("base/chat_template.jinja", odd)?;
    let home = tempfile::tempdir()?;
    let out = home.path().join("out");
    let name = base.to_str().context("a path in UTF-8")?;
    refused(&mut export(home.path(), name, "ollama", &out, &[])?, &["none of the formats", "chatml", "--format gguf"])?;
    assert!(!out.exists());
    Ok(())
}

/// Only what an earlier export of the same model and format wrote may be lost.
#[test]
fn what_no_earlier_export_wrote_is_not_replaced() -> Result<()> {
    let place = Place::new()?;
    let home = place.path("home");
    train(&home, &fixture("models/llama"), "geo", &[])?;
    let cases: [(&str, &[&str], &str); 5] = [
        ("gguf", &["mine.gguf", "other-Q8_0.gguf"], "mine.gguf"),
        ("ollama", &["model.gguf"], "model.gguf"),
        ("bundle", &["README.md", "model/thesis.txt"], "is no earlier export of geo as `bundle`"),
        ("peft", &["config.json", "model.safetensors"], "is no earlier export of geo as `peft`"),
        ("merged", &["adapter_config.json", "adapter_model.safetensors"], "is no earlier export of geo as `merged`"),
    ];
    for (format, files, words) in cases {
        let directory = place.path(&format!("outputs/{format}"));
        for file in files {
            place.write(&format!("outputs/{format}/{file}"), "mine")?;
        }
        refused(&mut export(&home, "geo", format, &directory, &["--overwrite"])?, &[words])?;
        for file in files {
            ensure!(fs::read_to_string(directory.join(file))? == "mine", "{file}");
        }
        let again = place.path(&format!("outputs/again-{format}"));
        succeeds(&mut export(&home, "geo", format, &again, &[])?)?;
        succeeds(&mut export(&home, "geo", format, &again, &["--overwrite"])?)?;
    }
    Ok(())
}
