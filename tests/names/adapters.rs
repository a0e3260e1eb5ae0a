//! Adapters whose bases are known by name.

use super::*;
use crate::command_line::{read_json, set_fields};
use crate::support::{eval, homeroom, loss, printed_json, refused, succeeds};

/// A model trained by its name, in `outputs/out`.
fn trained(place: &Place, hub: &Hub) -> Result<(PathBuf, PathBuf)> {
    let rows = place.rows("rows.jsonl", 4)?;
    let mut train = place.fine_tune(Path::new(NAME), &rows);
    succeeds(hub.seen_by(train.args(["--max-steps", "2", "--learning-rate", "1e-2"])))?;
    Ok((place.path("outputs/out"), rows))
}

fn loss_in(hub: &Hub, model: &Path, rows: &Path) -> Result<f64> {
    let ran = succeeds(hub.seen_by(&mut eval(model, rows)))?;
    printed_json(&ran)?["loss"].as_f64().context("a loss is a number")
}

#[test]
fn a_base_is_found_by_its_name_once_it_is_in_another_store() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "llama")?;
    let (adapter, rows) = trained(&place, &hub)?;
    let expected = loss_in(&hub, &adapter, &rows)?;
    // As on another machine: the recorded path leads nowhere, and the model is in a store that all share.
    fs::create_dir(place.path("lab"))?;
    fs::rename(&hub.0, place.path("lab/hub"))?;
    let mut moved = eval(&adapter, &rows);
    moved.env("HOMEROOM_BASES", place.path("lab/hub"));
    let found = printed_json(&succeeds(hub.seen_by(&mut moved))?)?["loss"].as_f64();
    assert_eq!(found, Some(expected));
    // A chat, an export and a further training find it as well.
    let bases = |command: &mut Command| -> Result<crate::support::Ran> {
        succeeds(hub.seen_by(command).env("HOMEROOM_BASES", place.path("lab/hub")))
    };
    bases(homeroom().args(["chat", "--prompt", "hi", "--max-tokens", "2", "--model-dir"]).arg(&adapter))?;
    let exported = place.path("outputs/merged");
    bases(homeroom().args(["export-model", "--model-dir"]).arg(&adapter).arg("--output-dir").arg(&exported))?;
    assert!((loss(&exported, &rows)? - expected).abs() < 1e-3);
    let next = place.path("outputs/next");
    let mut further = homeroom();
    further.args(["fine-tune", "--max-steps", "1", "--model-name", NAME, "--training-file"]).arg(&rows);
    further.arg("--init-from").arg(&adapter).arg("--output-dir").arg(&next);
    bases(&mut further)?;
    assert_eq!(read_json(&next.join("homeroom.json"))?["base"]["revision"], FIRST);
    Ok(())
}

#[test]
fn a_base_at_another_commit_is_taken_if_it_is_the_same_base() -> Result<()> {
    let place = Place::new()?;
    let hub = Hub::with_model(&place, "llama")?;
    let (adapter, rows) = trained(&place, &hub)?;
    let expected = loss_in(&hub, &adapter, &rows)?;
    // The branch went on, and the commit that was trained on is gone.
    fs::rename(hub.snapshot(NAME, FIRST), hub.snapshot(NAME, SECOND))?;
    hub.set(NAME, "main", SECOND)?;
    assert_eq!(loss_in(&hub, &adapter, &rows)?, expected);
    // With other weights it is another base, which is said; the one that is wanted can be had.
    fs::remove_dir_all(hub.folder(NAME))?;
    hub.add(NAME, SECOND, &files_of(&fixture("models/mistral"))?)?;
    hub.set(NAME, "main", SECOND)?;
    let [pinned, other] = [format!("homeroom pull {NAME}@{FIRST}`"), format!("the cache has it at {SECOND} only")];
    refused(hub.seen_by(&mut eval(&adapter, &rows)), &[&pinned, &other, "--base-model"])?;
    fs::remove_dir_all(hub.folder(NAME))?;
    refused(hub.seen_by(&mut eval(&adapter, &rows)), &[&format!("its base model {NAME}@{FIRST} is not there"), &pinned])
}

/// PEFT's configuration names the base as `from_pretrained` was given it.
#[test]
fn an_adapter_of_peft_finds_its_base_in_the_cache() -> Result<()> {
    let place = Place::new()?;
    let (hub, rows) = (Hub::with_model(&place, "llama")?, place.rows("rows.jsonl", 3)?);
    let adapter = place.copy(&fixture("curves/lora/trained"), "adapter")?;
    let mut with_base = eval(&adapter, &rows);
    let ran = succeeds(with_base.arg("--base-model").arg(fixture("models/llama")))?;
    let expected = printed_json(&ran)?["loss"].as_f64().context("a loss")?;
    let config = adapter.join("adapter_config.json");
    hub.set(NAME, "v1.0", FIRST)?;
    for revision in [None, Some("v1.0"), Some(FIRST)] {
        let fields = serde_json::json!({"base_model_name_or_path": NAME, "revision": revision});
        set_fields(&config, fields)?;
        assert_eq!(loss_in(&hub, &adapter, &rows)?, expected, "{revision:?}");
    }
    set_fields(&config, serde_json::json!({"revision": "v2"}))?;
    refused(hub.seen_by(&mut eval(&adapter, &rows)), &["Org-7/tiny_Llama.v2@v2 is not there", "homeroom pull"])?;
    // What a file says stays in its line.
    set_fields(
        &config,
        serde_json::json!({"base_model_name_or_path": "../x\u{1b}[31m\n\nerror: y", "revision": null}),
    )?;
    let ran = crate::support::run(hub.seen_by(&mut eval(&adapter, &rows)))?;
    assert!(ran.code == Some(1) && !ran.stderr.contains("\nerror: y"), "{}", ran.stderr);
    // A path of a cache that is elsewhere has the name in it.
    let gone = format!("/nowhere/hub/models--Org-7--tiny_Llama.v2/snapshots/{FIRST}");
    set_fields(&config, serde_json::json!({"base_model_name_or_path": gone, "revision": null}))?;
    assert_eq!(loss_in(&hub, &adapter, &rows)?, expected);

    // The adapter can be on the hub itself.
    set_fields(&config, serde_json::json!({"base_model_name_or_path": NAME}))?;
    hub.add("school/Algebra-LoRA", SECOND, &files_of(&adapter)?)?;
    hub.set("school/Algebra-LoRA", "main", SECOND)?;
    let name = Path::new("school/Algebra-LoRA");
    assert_eq!(loss_in(&hub, name, &rows)?, expected);
    let mut train = homeroom();
    train.args(["fine-tune", "--model-name", "school/Algebra-LoRA", "--training-file"]).arg(&rows);
    refused(
        hub.seen_by(train.env("HOMEROOM_HOME", place.path("home"))),
        &["`--model-name Org-7/tiny_Llama.v2 --init-from school/Algebra-LoRA` trains it further"],
    )?;
    // Its base is known where its weights cannot be read.
    let damaged = place.copy(&adapter, "damaged")?;
    fs::write(damaged.join("adapter_model.safetensors"), "none")?;
    let mut train = place.fine_tune(&damaged, &rows);
    refused(
        hub.seen_by(&mut train),
        &["an adapter on Org-7/tiny_Llama.v2", "`--model-name Org-7/tiny_Llama.v2 --init"],
    )?;
    let mut export = homeroom();
    export.args(["export-model", "--model-dir", "school/Algebra-LoRA@main"]).current_dir(place.path("outputs"));
    succeeds(hub.seen_by(&mut export))?;
    assert_eq!(place.outputs()?, ["Algebra-LoRA-merged"]);
    Ok(())
}

#[test]
fn an_adapter_of_before_bases_had_names_is_read_as_it_was() -> Result<()> {
    let place = Place::new()?;
    let rows = place.rows("rows.jsonl", 3)?;
    succeeds(place.fine_tune(&fixture("models/llama"), &rows).args(["--max-steps", "1"]))?;
    let out = place.path("outputs/out");
    let base = read_json(&out.join("homeroom.json"))?["base"].clone();
    assert!(base.get("name").is_none() && base.get("revision").is_none(), "{base}");
    loss(&out, &rows)?;
    Ok(())
}
