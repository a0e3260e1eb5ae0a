//! `import`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::carried::without_links;
use super::{cached, entries, listed, model, names, program, train, typed};
use crate::support::{Place, Sizes, fixture, printed_json, refused, run, succeeds};

fn import(place: &Place, source: &Path, further: &[&str]) -> std::process::Command {
    let mut command = program(place);
    command.arg("import").arg(source).args(further);
    command
}

#[test]
fn a_gguf_file_that_was_taken_in_is_a_base_by_its_name_everywhere() -> Result<()> {
    let place = Place::new()?;
    let source = place.path("Tiny Model.Q8_0.gguf");
    fs::copy(fixture("models/llama-gguf/model-f32.gguf"), &source)?;
    let ran = succeeds(&mut import(&place, &source, &["--json"]))?;
    let imported = printed_json(&ran)?;
    assert_eq!(
        (&imported["name"], &imported["kind"], &imported["problem"]),
        (&json!("tiny-model.q8_0"), &json!("model"), &Value::Null)
    );
    // A copy, and private.
    let name = "tiny-model.q8_0";
    let file = model(&place, name).join("Tiny Model.Q8_0.gguf");
    assert!(!file.is_symlink() && fs::metadata(&file)?.permissions().mode() & 0o777 == 0o600);
    fs::remove_file(&source)?;

    let rows = place.rows("rows.jsonl", 7)?;
    succeeds(&mut typed(&place, &["chat", "--model-dir", name, "--prompt", "hi", "--max-tokens", "2"]))?;
    let mut eval = typed(&place, &["eval", "--model-dir", name, "--file"]);
    succeeds(eval.arg(&rows))?;
    train(&place, Path::new(name), "on-it", &[])?;
    succeeds(&mut typed(&place, &["chat", "--model-dir", "on-it", "--prompt", "hi", "--max-tokens", "2"]))?;
    train(&place, Path::new(name), "on-it-2", &["--init-from", "on-it"])?;
    let shown = printed_json(&succeeds(&mut typed(&place, &["show", "--json", name]))?)?;
    assert_eq!((&shown["lineage"]["children"], &shown["model"]["layers"]), (&json!(["on-it", "on-it-2"]), &json!(2)));
    refused(&mut typed(&place, &["rm", name]), &["still needed by 2 adapters"])?;
    // A second name of it, and another file in the place of the first.
    succeeds(&mut typed(&place, &["cp", name, "copy"]))?;
    let other = fixture("models/llama-gguf/model-f32.gguf");
    refused(&mut import(&place, &other, &["--name", "copy"]), &["a model of this name is there already"])?;
    succeeds(&mut import(&place, &other, &["--name", "copy", "--overwrite"]))?;
    assert_eq!(fs::read_dir(model(&place, "copy"))?.count(), 1);
    Ok(())
}

#[test]
fn of_a_checkpoint_only_what_belongs_to_the_adapter_is_taken_and_the_rest_is_told() -> Result<()> {
    let place = Place::new()?;
    let source = place.copy(&fixture("adapters/tied-head"), "checkpoint-500")?;
    for file in
        ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "README.md", "trainer_state.json"]
    {
        fs::write(source.join(file), "{}")?;
    }
    fs::create_dir(source.join("global_step500"))?;
    let ran = succeeds(&mut import(&place, &source, &["--json"]))?;
    let imported = printed_json(&ran)?;
    let left = [
        "README.md",
        "expected.safetensors",
        "global_step500",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "training_args.bin",
    ];
    assert_eq!(
        (&imported["name"], &imported["kind"], &imported["left_out"]),
        (&json!("checkpoint-500"), &json!("adapter"), &json!(left))
    );
    assert!(
        imported["problem"].as_str().is_some_and(|problem| problem.contains("its base is not there")),
        "{imported}"
    );
    assert!(ran.stderr.contains("left out  ") && ran.stderr.contains(" and 1 more"), "{}", ran.stderr);
    let mut taken: Vec<_> =
        fs::read_dir(model(&place, "checkpoint-500"))?.map(|file| Ok(file?.file_name())).collect::<Result<_>>()?;
    taken.sort();
    assert_eq!(taken, ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]);
    let rows = place.rows("rows.jsonl", 3)?;
    let mut eval = typed(&place, &["eval", "--model-dir", "checkpoint-500", "--base-model"]);
    succeeds(eval.arg(fixture("models/llama-tied")).arg("--file").arg(rows))?;
    // The name is taken now, and a free one is chosen.
    let again = printed_json(&succeeds(&mut import(&place, &source, &["--json"]))?)?;
    assert_eq!(again["name"], json!("checkpoint-500-2"));
    Ok(())
}

#[test]
fn a_directory_whose_files_are_links_is_taken_in_as_files_of_its_own() -> Result<()> {
    let place = Place::new()?;
    let folder = cached(&place, "stick", "org/Tiny-Llama", &fixture("models/llama"))?;
    let snapshot = fs::read_dir(folder.join("snapshots"))?.next().expect("there is one")?.path();
    let imported = printed_json(&succeeds(&mut import(&place, &snapshot, &["--json"]))?)?;
    assert_eq!(imported["name"], json!("tiny-llama"));
    let ran = succeeds(&mut import(&place, &snapshot, &["--name", "again"]))?;
    let folder = format!("`homeroom import {}`", folder.canonicalize()?.display());
    assert!(ran.stderr.contains(&folder), "{}", ran.stderr);
    succeeds(&mut typed(&place, &["rm", "again"]))?;
    // A file of a snapshot is a link, and what that leads to is called by its digest.
    let gguf = cached(&place, "stick", "org/Small-GGUF", &fixture("models/llama-gguf/model-f32.gguf"))?;
    let file = fs::read_dir(gguf.join("snapshots"))?.next().expect("there is one")?.path().join("model-f32.gguf");
    let imported = printed_json(&succeeds(&mut import(&place, &file, &["--json"]))?)?;
    assert_eq!(imported["name"], json!("model-f32"));
    fs::remove_dir_all(place.path("stick"))?;
    for file in fs::read_dir(model(&place, "tiny-llama"))? {
        assert!(file?.file_type()?.is_file());
    }
    succeeds(&mut typed(&place, &["chat", "--model-dir", "tiny-llama", "--prompt", "hi", "--max-tokens", "2"]))?;
    // What is in the registry already is not taken in again.
    refused(
        &mut import(&place, &model(&place, "tiny-llama"), &[]),
        &["it is the model tiny-llama already", "homeroom cp tiny-llama"],
    )
}

#[test]
fn what_cannot_be_loaded_is_refused_and_nothing_is_left() -> Result<()> {
    let place = Place::new()?;
    let llama = fixture("models/llama");
    let weights = fs::read(llama.join("model.safetensors"))?;
    let damaged = |name: &str, file: &str, bytes: Option<&[u8]>| -> Result<std::path::PathBuf> {
        let copy = place.copy(&llama, name)?;
        match bytes {
            Some(bytes) => fs::write(copy.join(file), bytes)?,
            None => fs::remove_file(copy.join(file))?,
        }
        Ok(copy)
    };
    let gguf = fs::read(fixture("models/llama-gguf/model-f32.gguf"))?;
    let linked = damaged("linked", "tokenizer.json", None)?;
    symlink("/nowhere/tokenizer.json", linked.join("tokenizer.json"))?;
    let adapter = place.copy(&fixture("adapters/tied-head"), "adapter")?;
    fs::write(adapter.join("adapter_model.safetensors"), [7; 99])?;
    for (source, word) in [
        (damaged("cut", "model.safetensors", Some(&weights[..weights.len() - 1]))?, "model.safetensors"),
        (damaged("no-tokenizer", "tokenizer.json", None)?, "tokenizer"),
        (damaged("config", "config.json", Some(b"{}"))?, "config.json"),
        (linked, "tokenizer.json"),
        (adapter, "adapter_model.safetensors"),
        (place.write("cut.gguf", &gguf[..gguf.len() / 2])?, "cut.gguf"),
        (place.write("notes.gguf", "no model")?, "notes.gguf"),
        (llama.join("model.safetensors"), "the directory that this file lies in"),
        (place.path("outputs"), "neither config.json nor a .gguf file"),
        (place.path("not-there"), "no such file or directory"),
    ] {
        refused(&mut import(&place, &source, &["--name", "x"]), &[word])?;
    }
    for name in ["", "..", "A", "a/b"] {
        refused(&mut import(&place, &llama, &["--name", name]), &["is not a model's name"])?;
    }
    assert!(names(&place)?.is_empty());
    assert!(!place.path("home/models").exists() || entries(&place)?.is_empty());
    Ok(())
}

#[test]
fn an_import_that_is_killed_leaves_a_whole_model_or_nothing() -> Result<()> {
    let place = Place::new()?;
    let sizes = Sizes { hidden: 512, inner: 1536, heads: 8, kv_heads: 4, head_dim: 64, vocab: 320, tied: false };
    let source = place.random_model("big", &sizes)?;
    let bytes = fs::metadata(source.join("model.safetensors"))?.len();
    for wait in 0..12 {
        let mut child =
            import(&place, &source, &["--name", "big"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(7 * wait));
        // Ctrl-C and worse; whichever comes too late changes nothing.
        let signal = if wait % 2 == 0 { libc::SIGKILL } else { libc::SIGINT };
        // SAFETY: the child is not waited for yet, so that its number is its own.
        unsafe { libc::kill(i32::try_from(child.id())?, signal) };
        let ended = child.wait()?;
        match names(&place)?.as_slice() {
            [] => ensure!(!ended.success()),
            [name] => {
                ensure!(name == "big" && listed(&place)?[0]["problem"].is_null());
                ensure!(fs::metadata(model(&place, "big").join("model.safetensors"))?.len() == bytes);
                succeeds(&mut typed(&place, &["rm", "big"]))?;
            }
            other => anyhow::bail!("{other:?}"),
        }
    }
    // What the killed ones left is swept by the next that writes.
    succeeds(&mut import(&place, &source, &["--name", "big"]))?;
    assert_eq!(entries(&place)?, ["big"]);
    Ok(())
}

/// sentence-transformers chooses the names of their directories, and people others.
#[test]
fn the_modules_of_an_embedding_model_come_along_whatever_they_are_called() -> Result<()> {
    let place = Place::new()?;
    let source = place.path("sentences");
    without_links(&fixture("embeddings/bert"), &source)?;
    for (file, to) in [("bert-dense/1_Pooling", "pool"), ("bert-dense/2_Dense", "sub/dense")] {
        without_links(&fixture(&format!("embeddings/{file}")), &source.join(to))?;
    }
    fs::remove_dir_all(source.join("1_Pooling"))?;
    let modules = fs::read_to_string(fixture("embeddings/bert-dense/modules.json"))?;
    let modules = modules.replace("1_Pooling", "pool").replace("2_Dense", "sub/dense");
    fs::write(source.join("modules.json"), modules)?;
    let ran = succeeds(&mut import(&place, &source, &["--name", "vectors"]))?;
    assert!(ran.stderr.contains("next      homeroom serve --model-dir vectors"), "{}", ran.stderr);
    let is_whole = |name: &str| -> Result<()> {
        let shown = printed_json(&succeeds(&mut typed(&place, &["show", "--json", name]))?)?;
        ensure!(shown["problem"].is_null() && shown["vectors"]["dimensions"] == 17, "{shown}");
        Ok(())
    };
    is_whole("vectors")?;
    succeeds(&mut typed(&place, &["cp", "vectors", "copy"]))?;
    is_whole("copy")?;
    // One may take the other's place, but nothing else in its directories may be lost.
    succeeds(&mut import(&place, &source, &["--name", "copy", "--overwrite"]))?;
    is_whole("copy")?;
    succeeds(&mut typed(&place, &["cp", "vectors", "copy", "--overwrite"]))?;
    fs::write(model(&place, "copy").join("sub/dense/notes.txt"), "mine")?;
    refused(&mut import(&place, &source, &["--name", "copy", "--overwrite"]), &["holds `sub`"])?;
    Ok(())
}

#[test]
fn peers_words_for_these_commands_are_known() -> Result<()> {
    let place = Place::new()?;
    for (word, here) in [
        ("ls", "list-models"),
        ("list", "list-models"),
        ("delete", "rm"),
        ("remove", "rm"),
        ("copy", "cp"),
        ("info", "show"),
        ("add", "import"),
        ("download", "pull"),
        ("test", "eval"),
        ("scan-cache", "list-models"),
        ("ask", "chat --prompt TEXT"),
    ] {
        let ran = run(&mut typed(&place, &[word]))?;
        assert!(
            ran.code == Some(2) && ran.stderr.contains(&format!("tip: '{word}' is '{here}' here")),
            "{}",
            ran.stderr
        );
    }
    for (words, tip) in [
        ("mv a b", "`homeroom cp NAME NEW` and then `homeroom rm NAME`"),
        ("push a", "models stay on this machine"),
        ("login", "`hf auth login`"),
        ("version", "`homeroom --version`"),
        ("embed x", "`homeroom serve --model-dir NAME`"),
        ("pull org/x --revision main", "the revision stands behind the name: `org/x@main`"),
        ("pull --revision=v2 org/x", "`org/x@v2`"),
        ("pull org/x --local-dir here", "HF_HUB_CACHE=here"),
        ("pull org/x --token hf_1", "HF_TOKEN=..."),
        ("chat --model-dir org/x --quant Q8_0", "`org/x:Q8_0`"),
        ("rm -y x", "'-y' is '--force' here"),
        ("rm x --yes", "'--yes' is '--force' here"),
        ("eval --model-dir x --eval-file f", "'--eval-file' is '--file' here"),
    ] {
        let ran = run(&mut typed(&place, &words.split(' ').collect::<Vec<_>>()))?;
        assert!(ran.code == Some(2) && ran.stderr.contains(tip), "{words}: {}", ran.stderr);
    }
    place.copy(&fixture("models/llama"), "home/models/tutor")?;
    refused(&mut typed(&place, &["run", "tutor"]), &["tutor: a model", "`homeroom chat --model-dir tutor`"])?;
    refused(&mut typed(&place, &["run", "org/x"]), &["`homeroom chat --model-dir org/x`"])
}
