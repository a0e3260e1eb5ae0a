//! The notice of third-party licences that goes with the program, held to what cargo links.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::{homeroom, root, succeeds};

const WRITE_IT: &str = "write it anew with `cargo fetch --locked` and `python3 runtime/host/licenses.py`";

fn notice() -> Result<String> {
    let path = root().join("runtime/host/licenses.txt");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}; {WRITE_IT}", path.display()))
}

/// The lines of each entry, by its first: a name, for crates with the version. Texts come after the entries.
fn entries(notice: &str) -> BTreeMap<&str, Vec<&str>> {
    let (entries, _) = notice.split_once("\n\n\n===").unwrap_or((notice, ""));
    let blocks = entries.split("\n\n").skip(2).map(|block| block.trim_matches('\n').lines());
    blocks.filter_map(|mut lines| Some((lines.next()?, lines.collect()))).collect()
}

fn cargo(arguments: &[&str]) -> Result<String> {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    Ok(succeeds(Command::new(cargo).current_dir(root()).args(arguments))?.stdout)
}

/// What `cargo metadata` says of this machine's target, of which alone cargo has surely fetched all crates.
fn metadata() -> Result<Value> {
    let version = cargo(&["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("cargo -vV names its host")?;
    let filter = format!("--filter-platform={host}");
    Ok(serde_json::from_str(&cargo(&["metadata", "--offline", "--locked", "--format-version=1", &filter])?)?)
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("`{key}` is no text in what cargo metadata says"))
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("`{key}` is no list in what cargo metadata says"))
}

/// What is looked for.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    /// What is linked: normal dependencies without macros, and packages with the sources of native libraries (`*-src`).
    Program,
    /// What a build needs: normal and build dependencies.
    Source,
}

/// Name and version of each package of a registry that is reached from `from`.
fn reached(metadata: &Value, from: Vec<&str>, of: Of) -> Result<BTreeSet<String>> {
    let mut packages = HashMap::new();
    for package in list(metadata, "packages")? {
        packages.insert(text(package, "id")?, package);
    }
    let mut nodes = HashMap::new();
    for node in list(&metadata["resolve"], "nodes")? {
        nodes.insert(text(node, "id")?, node);
    }
    let (mut seen, mut todo, mut found) = (BTreeSet::new(), from, BTreeSet::new());
    while let Some(id) = todo.pop() {
        let package = packages.get(id).with_context(|| format!("no package is {id}"))?;
        let targets = list(package, "targets")?.iter();
        let is_macro = targets.flat_map(|target| target["kind"].as_array()).flatten().any(|kind| kind == "proc-macro");
        if is_macro && of == Of::Program || !seen.insert(id) {
            continue;
        }
        let name = text(package, "name")?;
        if package["source"].is_string() {
            found.insert(format!("{name} {}", text(package, "version")?));
        }
        // What such a package needs compiles its sources, and is not linked.
        if of == Of::Program && name.ends_with("-src") {
            continue;
        }
        for need in list(nodes[id], "deps")? {
            let needed = text(need, "pkg")?;
            let kinds = list(need, "dep_kinds")?;
            let is_normal = kinds.iter().any(|kind| kind["kind"].is_null());
            let is_build = kinds.iter().any(|kind| kind["kind"] == "build");
            if is_normal || is_build && (of == Of::Source || text(packages[needed], "name")?.ends_with("-src")) {
                todo.push(needed);
            }
        }
    }
    Ok(found)
}

#[test]
fn every_crate_that_is_linked_or_held_as_source_is_in_the_notice() -> Result<()> {
    let metadata = metadata()?;
    let members = list(&metadata, "workspace_default_members")?.iter().filter_map(Value::as_str).collect();
    let sdk = list(&metadata, "packages")?.iter().find(|package| package["name"] == "homeroom-sdk");
    let sdk = vec![text(sdk.context("the workspace has the SDK")?, "id")?];
    let mut expected = reached(&metadata, members, Of::Program)?;
    ensure!(
        expected.iter().any(|name| name.starts_with("luau0-src ")) && expected.len() > 100,
        "only {expected:?} is linked"
    );
    expected.extend(reached(&metadata, sdk, Of::Source)?);
    ensure!(expected.iter().any(|name| name.starts_with("syn ")), "the SDK needs no macros");
    let notice = notice()?;
    let entries = entries(&notice);
    let missing: Vec<&String> = expected.iter().filter(|name| !entries.contains_key(name.as_str())).collect();
    ensure!(missing.is_empty(), "runtime/host/licenses.txt lacks {missing:?}; {WRITE_IT}");
    Ok(())
}

#[test]
fn the_notice_names_no_version_that_the_lock_file_lacks() -> Result<()> {
    let lock: toml::Table = toml::from_str(&fs::read_to_string(root().join("Cargo.lock"))?)?;
    let packages = lock["package"].as_array().context("a lock file has packages")?;
    let locked =
        |package: &toml::Value| Some(format!("{} {}", package["name"].as_str()?, package["version"].as_str()?));
    let locked: BTreeSet<String> = packages.iter().filter_map(locked).collect();
    let notice = notice()?;
    let crates = entries(&notice).into_keys().filter(|name| !["Homeroom", "The Rust standard library"].contains(name));
    let unknown: Vec<&str> = crates.filter(|name| !locked.contains(*name)).collect();
    ensure!(unknown.is_empty(), "runtime/host/licenses.txt names {unknown:?}, which Cargo.lock does not; {WRITE_IT}");
    Ok(())
}

#[test]
fn every_entry_has_its_texts() -> Result<()> {
    let notice = notice()?;
    let headings = |line: &'_ str| Some(line.strip_prefix("=== ")?.strip_suffix(" ===")?.to_owned());
    let printed: BTreeSet<String> = notice.lines().filter_map(headings).collect();
    let mut used = BTreeSet::new();
    for (name, lines) in entries(&notice) {
        let texts = lines.last().and_then(|line| line.trim_start().strip_prefix("texts: "));
        let texts = texts.with_context(|| format!("{name} has no texts: {lines:?}"))?;
        used.extend(texts.split("; ").map(str::to_owned));
    }
    let odd: Vec<&String> = used.symmetric_difference(&printed).collect();
    ensure!(odd.is_empty(), "{odd:?}: used and not printed, or printed and not used");
    Ok(())
}

#[test]
fn licenses_prints_the_notice_in_either_spelling() -> Result<()> {
    let notice = notice()?;
    for word in ["licenses", "licences"] {
        let ran = succeeds(homeroom().arg(word))?;
        ensure!(ran.stdout == notice, "`homeroom {word}` prints something else");
        ensure!(ran.stderr.is_empty(), "`homeroom {word}` says {}", ran.stderr);
    }
    Ok(())
}
