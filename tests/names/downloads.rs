//! What is downloaded because somebody named it, from a server of the hub's protocol; and that a name which nobody typed never gets there.

use super::*;
use crate::command_line::read_json;
use crate::hub::server::{Repo, Server};
use crate::hub::{llama, program};
use crate::support::{printed_json, refused, succeeds};

/// A server with a model of [`NAME`], and what it was asked for of that.
fn server() -> Result<Server> {
    Server::of(NAME, llama()?)
}

#[test]
fn a_training_from_an_empty_cache_names_a_base_that_any_machine_can_fetch() -> Result<()> {
    let (place, server) = (Place::new()?, server()?);
    let rows = place.rows("rows.jsonl", 4)?.display().to_string();
    let out = place.path("outputs/out").display().to_string();
    let train = ["fine-tune", "--model-name", NAME, "--max-steps", "1", "--training-file", &rows, "--output-dir", &out];
    // What can be refused without the model is refused before anybody is asked for it.
    for (more, words) in [
        (["--eval-file", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--strategy", "lroa"], "lora"),
        (["--set-option", "rr=3"], "rr"),
    ] {
        refused(program(&server, &place, &train).args(more), &[words])?;
    }
    for (text, words) in [
        ("PK\u{3}\u{4}\0", "a zip archive"),
        ("{\"text\": \"a\"}\n{\"text\": 7}\n", "line 2: "),
        ("{\"text\": \"a\"}\n{\"frage\": \"a\"}\n", "line 2: "),
        ("\n", "no rows"),
    ] {
        let bad = place.write("bad.jsonl", text)?.display().to_string();
        let mut as_rows = train;
        as_rows[6] = &bad;
        refused(&mut program(&server, &place, &as_rows), &["bad.jsonl: ", words])?;
        refused(program(&server, &place, &train).args(["--eval-file", &bad]), &["bad.jsonl: ", words])?;
        refused(
            &mut program(&server, &place, &["eval", "--model-dir", NAME, "--file", &bad]),
            &["bad.jsonl: ", words],
        )?;
    }
    assert_eq!(server.asked().len(), 0);
    let ran = succeeds(&mut program(&server, &place, &train))?;
    let commit = "a1".repeat(20);
    assert!(ran.stderr.contains(&format!("model     {NAME}@a1a1a1a   ")), "{}", ran.stderr);
    assert_eq!(read_json(&place.path("outputs/out/adapter_config.json"))?["revision"], commit);
    // Then without a network.
    let eval = ["eval", "--json", "--file", &rows, "--model-dir", &out];
    let asked = server.asked().len();
    let there = succeeds(program(&server, &place, &eval).arg("--offline"))?;
    // On a machine that has the adapter alone, its base is fetched as it was, not as it is now.
    let newer = Repo::of(&fixture("models/mistral"), "b2")?;
    server.set(NAME, "main", newer);
    server.set(NAME, &commit, llama()?);
    fs::remove_dir_all(place.path("hf"))?;
    assert_eq!(server.asked().len(), asked);
    refused(program(&server, &place, &eval).arg("--offline"), &["its base model", &format!("pull {NAME}@{commit}`")])?;
    let fetched = succeeds(&mut program(&server, &place, &eval))?;
    assert_eq!(fetched.stdout, there.stdout);
    assert!(!place.path("hf/hub/models--Org-7--tiny_Llama.v2/snapshots").join("b2".repeat(20)).exists());
    server.is_well();
    Ok(())
}

#[test]
fn a_pipeline_fetches_what_its_file_or_the_user_names_before_its_script_runs() -> Result<()> {
    let (place, server) = (Place::new()?, server()?);
    place.rows("rows.jsonl", 2)?;
    place.write(
        "s.lua",
        "local data = homeroom.prepare_dataset { path = \"rows.jsonl\" }\n\
         local said = data.train:rows()[1].messages[1].content:gsub(\"%W\", \"\")\n\
         local ok = pcall(homeroom.evaluate, { model = \"thief/\" .. said, dataset = data.train })\n\
         local loss = homeroom.evaluate { model = params.model, dataset = data.train }.loss\n\
         return { ok = ok, loss = loss }\n",
    )?;
    let config = place.write(
        "c.toml",
        format!(
            "[pipeline]\nscript = \"s.lua\"\n[pipeline.params]\nmodel = {{ type = \"model\", default = \"{NAME}\" }}\n"
        ),
    )?;
    let config = config.display().to_string();
    for more in ["--check", "--dry-run", "--offline"] {
        crate::support::run(program(&server, &place, &["run", &config]).arg(more))?;
    }
    assert_eq!(server.asked().len(), 0, "nobody wanted it yet");
    let ran = succeeds(&mut program(&server, &place, &["run", &config, "--json"]))?;
    let result = printed_json(&ran)?;
    assert!(result["ok"] == false && result["loss"].is_f64(), "{result}");
    // By `--set` as well, and of no other name was anybody asked.
    server.set("Other/model", "main", llama()?);
    succeeds(&mut program(&server, &place, &["run", &config, "--set", "model=Other/model@main"]))?;
    let asked = server.asked();
    // What it redirects to has a digest for a name.
    let named = |path: &str| path.contains(NAME) || path.contains("Other/model") || path.starts_with("/cache/");
    assert!(!asked.is_empty() && asked.iter().all(|asked| asked.is_storage || named(&asked.path)), "{asked:?}");
    assert!(place.path("hf/hub/models--Other--model").exists());
    server.is_well();
    Ok(())
}

#[test]
fn every_command_in_which_a_model_is_typed_fetches_it() -> Result<()> {
    let (place, server) = (Place::new()?, server()?);
    let rows = place.rows("rows.jsonl", 2)?.display().to_string();
    let adapter = fixture("curves/lora/trained").display().to_string();
    let merged = place.path("outputs/merged").display().to_string();
    for arguments in [
        ["chat", "--prompt", "hi", "--max-tokens", "1", "--model-dir", NAME].as_slice(),
        &["eval", "--file", &rows, "--model-dir", NAME],
        &["eval", "--file", &rows, "--model-dir", &adapter, "--base-model", NAME],
        &["export-model", "--output-dir", &merged, "--model-dir", &adapter, "--base-model", NAME],
        &["bench", "prefill", "--tokens", "3", "--runs", "1", "--model-dir", NAME],
        &["bench", "train", "--seq-len", "8", "--batch-size", "1", "--steps", "1", "--model-name", NAME],
    ] {
        if place.path("hf").exists() {
            fs::remove_dir_all(place.path("hf"))?;
        }
        succeeds(&mut program(&server, &place, arguments))?;
        let snapshots = place.path("hf/hub/models--Org-7--tiny_Llama.v2/snapshots");
        assert!(snapshots.join("a1".repeat(20)).join("model.safetensors").exists(), "{arguments:?}");
    }
    server.is_well();
    Ok(())
}
