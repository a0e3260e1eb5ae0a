//! Packs what a strategy is built from into the program, for `homeroom plugins new`: the SDK, the ABI, and the crates that they
//! need, as cargo has them here. So a new strategy builds with rustc and cargo alone, without a network.
//!
//! Writes `$OUT_DIR/kit.rs`, an array of paths and contents.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let root = manifest_dir.join("../..").canonicalize().expect("the workspace is two levels up");
    let out = PathBuf::from(variable("OUT_DIR"));
    let mut kit = Kit { out: out.join("kit"), entries: BTreeMap::new() };
    fs::create_dir_all(&kit.out).expect("OUT_DIR can be written");
    let workspace = fs::read_to_string(root.join("Cargo.toml")).expect("the workspace has a manifest");
    for name in ["abi", "sdk"] {
        let from = root.join("plugins").join(name);
        kit.tree(&from, Path::new("homeroom").join(name).as_path(), &|path| {
            path.starts_with("src") || path == Path::new("build.rs")
        });
        let manifest = fs::read_to_string(from.join("Cargo.toml")).expect("a crate has a manifest");
        kit.made(&format!("homeroom/{name}/Cargo.toml"), &own_manifest(&manifest, &workspace));
        println!("cargo::rerun-if-changed={}", from.display());
    }
    kit.file(&root.join("LICENSE"), "homeroom/LICENSE");

    let lock = fs::read_to_string(root.join("Cargo.lock")).expect("the workspace has a lock file");
    let needed = needed(&root);
    // Of one platform, since cargo has not fetched the crates of others.
    let metadata = cargo(&root, &["metadata", "--format-version", "1", "--filter-platform", &variable("HOST")]);
    for (name, version) in needed.iter().filter(|(name, _)| !name.starts_with("homeroom-")) {
        let to = PathBuf::from(format!("homeroom/vendor/{name}"));
        kit.tree(&source(&metadata, name, version), &to, &is_built);
        let checksum = field(&block(&lock, name, version), "checksum");
        // No files are listed, since cargo would insist on those that are left out.
        let listed = format!("{{\"files\":{{}},\"package\":\"{checksum}\"}}");
        kit.made(&format!("homeroom/vendor/{name}/.cargo-checksum.json"), &listed);
    }
    kit.made("Cargo.lock", &own_lock(&lock, &needed));
    fs::write(out.join("kit.rs"), kit.source()).expect("OUT_DIR can be written");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", root.join("Cargo.lock").display());
    println!("cargo::rerun-if-changed={}", root.join("Cargo.toml").display());
}

/// Files by the path that they get, and where they are.
struct Kit {
    out: PathBuf,
    entries: BTreeMap<String, PathBuf>,
}

impl Kit {
    fn file(&mut self, from: &Path, to: &str) {
        self.entries.insert(to.replace('\\', "/"), from.to_owned());
    }

    fn made(&mut self, to: &str, text: &str) {
        let from = self.out.join(to.replace('/', "_"));
        fs::write(&from, text).expect("OUT_DIR can be written");
        self.file(&from, to);
    }

    /// The files below `from` that `wanted` admits by their relative paths.
    fn tree(&mut self, from: &Path, to: &Path, wanted: &dyn Fn(&Path) -> bool) {
        let mut dirs = vec![from.to_owned()];
        while let Some(dir) = dirs.pop() {
            let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
            for path in entries.map(|entry| entry.expect("a directory can be read").path()) {
                let relative = path.strip_prefix(from).expect("it lies below");
                if path.is_dir() {
                    dirs.push(path);
                } else if wanted(relative) {
                    self.file(&path, &to.join(relative).display().to_string());
                }
            }
        }
    }

    fn source(&self) -> String {
        let mut text = String::from("&[\n");
        for (to, from) in &self.entries {
            writeln!(text, "    ({to:?}, include_bytes!({from:?})),").expect("a string can be written");
        }
        text + "]\n"
    }
}

/// What of a crate is built, and its licence.
fn is_built(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let top = path.components().count() == 1;
    let tests = path.components().any(|part| ["tests", "benches"].contains(&&*part.as_os_str().to_string_lossy()));
    (path.starts_with("src") && path.extension().is_some_and(|extension| extension == "rs") && !tests)
        || (top && (name == "Cargo.toml" || name == "build.rs" || name.starts_with("LICENSE") || name == "UNLICENSE"))
}

/// Names and versions of all that the SDK needs, itself included, on any platform.
fn needed(root: &Path) -> Vec<(String, String)> {
    let tree = ["tree", "-p", "homeroom-sdk", "-e", "normal,build", "--target", "all", "--prefix", "none"];
    let tree = cargo(root, &[&tree[..], &["--format", "{p}"]].concat());
    let mut needed: Vec<(String, String)> = Vec::new();
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(version)) = (words.next(), words.next()) else { continue };
        let package = (name.to_owned(), version.trim_start_matches('v').to_owned());
        let twice = needed.iter().any(|(known, other)| *known == package.0 && *other != package.1);
        assert!(!twice, "the SDK needs `{name}` in two versions, which `plugins new` does not pack");
        if !needed.contains(&package) {
            needed.push(package);
        }
    }
    needed.sort();
    needed
}

/// The directory of a crate in what `cargo metadata` says.
fn source(metadata: &str, name: &str, version: &str) -> PathBuf {
    let head = format!("{{\"name\":\"{name}\",\"version\":\"{version}\",\"id\":");
    let package = metadata.find(&head).map(|at| &metadata[at..]);
    let path = package.and_then(|text| text.split_once("\"manifest_path\":\"")?.1.split_once('"'));
    let (path, _) = path.unwrap_or_else(|| panic!("cargo metadata does not say where `{name}` {version} is"));
    PathBuf::from(path.replace("\\\\", "\\")).parent().expect("a manifest lies in a directory").to_owned()
}

/// A crate's manifest with what it takes from the workspace written out.
fn own_manifest(manifest: &str, workspace: &str) -> String {
    let table = |name: &str| {
        let (_, text) = workspace.split_once(&format!("[{name}]\n")).expect("the workspace has that table");
        text.split("\n[").next().expect("a text has a beginning").to_owned()
    };
    let (packages, dependencies) = (table("workspace.package"), table("workspace.dependencies"));
    let mut own = String::new();
    let mut within = &packages;
    for line in manifest.lines() {
        match line.strip_suffix(".workspace = true") {
            Some(key) => {
                let start = format!("{key} = ");
                let found = within.lines().find(|line| line.starts_with(&start));
                let found = found.unwrap_or_else(|| panic!("the workspace has no `{key}`"));
                own += &found.replace("path = \"plugins/", "path = \"../");
            }
            None if line == "[lints]" => break,
            None => {
                if line == "[dependencies]" {
                    within = &dependencies;
                }
                own += line;
            }
        }
        own.push('\n');
    }
    own.trim_end().to_owned() + "\n"
}

/// The lock file of a new strategy, whose name and version `plugins new` puts in.
fn own_lock(lock: &str, needed: &[(String, String)]) -> String {
    let mut own = String::from("# This file is automatically @generated by Cargo.\n");
    own += "# It is not intended for manual editing.\nversion = 4\n";
    for (name, version) in needed {
        let entry = block(lock, name, version);
        own += "\n[[package]]\n";
        let (head, dependencies) = entry.split_once("dependencies = [\n").unwrap_or((&entry, ""));
        own += head.trim_end();
        own.push('\n');
        // A name with a version, where the workspace has several; the SDK needs one.
        let names = dependencies.lines().filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","));
        let names = names.filter_map(|line| line.split(' ').next());
        let names: Vec<&str> = names.filter(|name| needed.iter().any(|(known, _)| known == name)).collect();
        if !names.is_empty() {
            let names: Vec<String> = names.iter().map(|name| format!(" \"{name}\",\n")).collect();
            write!(own, "dependencies = [\n{}]\n", names.concat()).expect("a string can be written");
        }
    }
    own
}

/// A package in a lock file.
fn block(lock: &str, name: &str, version: &str) -> String {
    let head = format!("name = \"{name}\"\nversion = \"{version}\"\n");
    let found = lock.split("[[package]]\n").find(|text| text.starts_with(&head));
    found.unwrap_or_else(|| panic!("the lock file has no `{name}` {version}")).trim_end().to_owned()
}

fn field(block: &str, key: &str) -> String {
    let start = format!("{key} = \"");
    let line = block.lines().find_map(|line| line.strip_prefix(start.as_str())?.strip_suffix('"'));
    line.unwrap_or_else(|| panic!("no `{key}` in\n{block}")).to_owned()
}

fn cargo(root: &Path, arguments: &[&str]) -> String {
    let mut cargo = Command::new(variable("CARGO"));
    let output = cargo.current_dir(root).args(arguments).args(["--offline", "--locked"]).output();
    let output = output.expect("cargo runs its own build scripts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {} failed:\n{errors}", arguments.join(" "));
    String::from_utf8(output.stdout).expect("cargo writes UTF-8")
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
