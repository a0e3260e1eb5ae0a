//! `import` of a model of another cache, as a memory stick carries it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha1::{Digest, Sha1};

use super::{COMMIT, cached, listed, program, typed};
use crate::support::{Place, fixture, printed_json, refused, succeeds};

fn import(place: &Place, source: &Path) -> std::process::Command {
    let mut command = program(place);
    command.args(["import", "--json"]).arg(source);
    command
}

/// A model as Python's programs cache it: the name of a small file's blob is git's hash of it.
fn stick(place: &Place) -> Result<PathBuf> {
    let folder = cached(place, "stick/hub", "Org/Tiny-Llama", &fixture("models/llama"))?;
    let snapshot = folder.join("snapshots").join(COMMIT);
    for name in ["config.json", "tokenizer_config.json"] {
        let link = snapshot.join(name);
        let bytes = fs::read(&link)?;
        fs::remove_file(link.canonicalize()?)?;
        fs::remove_file(&link)?;
        let hash = Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat());
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(folder.join("blobs").join(&hash), bytes)?;
        symlink(format!("../../blobs/{hash}"), link)?;
    }
    Ok(folder)
}

/// A copy without links, as `cp -rL` to a memory stick makes it.
pub(super) fn without_links(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let to = to.join(path.file_name().context("an entry has a name")?);
        if path.is_dir() { without_links(&path, &to)? } else { fs::copy(&path, &to).map(drop)? }
    }
    Ok(())
}

fn own(place: &Place) -> PathBuf {
    place.path("hub/models--Org--Tiny-Llama")
}

fn answers(place: &Place, name: &str) -> Result<()> {
    succeeds(&mut typed(place, &["chat", "--model-dir", name, "--prompt", "hi", "--max-tokens", "2"])).map(drop)
}

#[test]
fn a_cached_model_of_a_stick_is_checked_and_has_its_name_on_the_hub() -> Result<()> {
    let place = Place::new()?;
    let folder = stick(&place)?;
    fs::write(folder.join("blobs/0000.incomplete"), "half")?;
    let ran = succeeds(&mut import(&place, &folder))?;
    let report = printed_json(&ran)?;
    assert_eq!(
        (&report["name"], &report["commits"], &report["unverified_files"]),
        (&json!("Org/Tiny-Llama"), &json!([COMMIT]), &json!(0))
    );
    fs::remove_dir_all(place.path("stick"))?;
    // The layout is the cache's, links and all, and what was not finished is not there.
    let snapshot = own(&place).join("snapshots").join(COMMIT);
    for entry in fs::read_dir(&snapshot)? {
        let path = entry?.path();
        assert!(fs::read_link(&path)?.starts_with("../../blobs") && path.is_file(), "{}", path.display());
    }
    assert!(!own(&place).join("blobs/0000.incomplete").exists());
    assert_eq!(fs::read_to_string(own(&place).join("refs/main"))?, COMMIT);
    assert_eq!(fs::read_dir(place.path("hub"))?.count(), 1);
    answers(&place, "Org/Tiny-Llama")?;
    let list = listed(&place)?;
    assert_eq!((list.len(), &list[0]["name"], &list[0]["problem"]), (1, &json!("Org/Tiny-Llama"), &json!(null)));
    // A second time there is nothing to do, and it does no harm; the folder itself is no source.
    let again = stick(&place)?;
    let ran = succeeds(&mut import(&place, &again))?;
    assert!(ran.stderr.contains("here      Org/Tiny-Llama   all of it was here already"), "{}", ran.stderr);
    assert!(ran.stderr.contains("next      homeroom fine-tune --model-name Org/Tiny-Llama "), "{}", ran.stderr);
    assert_eq!(printed_json(&ran)?["bytes"], json!(0));
    // One that was damaged here meanwhile is no longer all of it.
    let blob = own(&place).join("snapshots").join(COMMIT).join("model.safetensors").canonicalize()?;
    fs::write(&blob, "cut")?;
    let ran = succeeds(&mut import(&place, &again))?;
    assert!(ran.stderr.contains("imported  Org/Tiny-Llama") && fs::metadata(&blob)?.len() > 3, "{}", ran.stderr);
    answers(&place, "Org/Tiny-Llama")?;
    refused(&mut import(&place, &own(&place)), &["it lies in the cache already"])?;
    refused(&mut import(&place, &place.path("stick/hub")), &["a cache of 1 models", "models--Org--Tiny-Llama"])?;
    refused(import(&place, &again).args(["--name", "x"]), &["keeps its name on the hub"])
}

#[test]
fn a_stick_without_links_is_checked_by_the_blobs_beside_it_and_else_said_to_be_unchecked() -> Result<()> {
    let place = Place::new()?;
    let fat = place.path("fat/models--Org--Tiny-Llama");
    without_links(&stick(&place)?, &fat)?;
    let report = printed_json(&succeeds(&mut import(&place, &fat))?)?;
    assert_eq!(report["unverified_files"], json!(0));
    assert!(own(&place).join("snapshots").join(COMMIT).join("config.json").is_symlink());
    fs::remove_dir_all(place.path("hub"))?;

    fs::remove_dir_all(fat.join("blobs"))?;
    let ran = succeeds(&mut import(&place, &fat))?;
    let count = fs::read_dir(fat.join("snapshots").join(COMMIT))?.count();
    assert_eq!(printed_json(&ran)?["unverified_files"], json!(count));
    assert!(ran.stderr.contains("could not be checked for damage"), "{}", ran.stderr);
    assert!(own(&place).join("snapshots").join(COMMIT).join("config.json").symlink_metadata()?.is_file());
    answers(&place, "Org/Tiny-Llama")?;
    // Beside what is there already it changes nothing.
    succeeds(&mut import(&place, &fat))?;
    answers(&place, "Org/Tiny-Llama")
}

#[test]
fn what_a_cache_has_already_is_added_to_and_its_branches_stay() -> Result<()> {
    let place = Place::new()?;
    let other = "fedcba9876543210fedcba9876543210fedcba98";
    let folder = stick(&place)?;
    succeeds(&mut import(&place, &folder))?;
    fs::rename(folder.join("snapshots").join(COMMIT), folder.join("snapshots").join(other))?;
    fs::write(folder.join("refs/main"), other)?;
    fs::write(folder.join("refs/v2"), other)?;
    fs::create_dir_all(folder.join("snapshots").join("7".repeat(40)))?;
    let ran = succeeds(&mut import(&place, &folder))?;
    let report = printed_json(&ran)?;
    assert_eq!((&report["commits"], &report["left_out"]), (&json!([other]), &json!(["7".repeat(40)])));
    assert!(ran.stderr.contains("note: `main` is another commit"), "{}", ran.stderr);
    let refs = |name: &str| fs::read_to_string(own(&place).join("refs").join(name));
    assert_eq!((refs("main")?, refs("v2")?), (COMMIT.to_owned(), other.to_owned()));
    for name in ["Org/Tiny-Llama", "Org/Tiny-Llama@v2", &format!("Org/Tiny-Llama@{other}")] {
        answers(&place, name)?;
    }
    Ok(())
}

#[test]
fn a_stick_that_is_damaged_or_leads_elsewhere_is_refused_and_nothing_is_left() -> Result<()> {
    let place = Place::new()?;
    let secret = place.write("secret.json", "{}")?;
    let check = |change: &dyn Fn(&Path, &Path) -> Result<()>, word: &str| -> Result<()> {
        let folder = stick(&place)?;
        change(&folder, &folder.join("snapshots").join(COMMIT))?;
        refused(&mut import(&place, &folder), &[word])?;
        assert!(!own(&place).exists());
        assert!(!place.path("hub").exists() || fs::read_dir(place.path("hub"))?.count() == 0);
        fs::remove_dir_all(place.path("stick"))?;
        Ok(())
    };
    check(
        &|_, snapshot| {
            let blob = snapshot.join("model.safetensors").canonicalize()?;
            let mut bytes = fs::read(&blob)?;
            *bytes.last_mut().context("it has bytes")? ^= 1;
            Ok(fs::write(blob, bytes)?)
        },
        "damaged: its bytes are not those that its name says",
    )?;
    check(
        &|_, snapshot| Ok(fs::remove_file(snapshot.join("model.safetensors").canonicalize()?)?),
        "not all files of a model are there",
    )?;
    check(
        &|_, snapshot| Ok(symlink(&secret, snapshot.join("vocab.json"))?),
        "a link that leads out of the model's folder",
    )?;
    check(
        &|_, snapshot| {
            fs::remove_file(snapshot.join("config.json"))?;
            Ok(fs::write(snapshot.join("config.json"), "{\"model_type\": \"llama\"}")?)
        },
        "config.json",
    )?;
    // A list of allowed models is obeyed.
    let folder = stick(&place)?;
    place.write("home/allowed-bases.txt", "other/*\n")?;
    refused(&mut import(&place, &folder), &["Org/Tiny-Llama: not allowed here"])
}
