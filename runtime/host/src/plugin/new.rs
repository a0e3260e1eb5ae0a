//! Writes a new strategy: a crate that builds, passes its tests and `homeroom plugins check`, with all that it needs beside it, so
//! that rustc and cargo are enough and no network is asked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::NewDirectory;

use super::install::BUILT_IN;
use super::private;

/// Paths and contents, packed by this crate's `build.rs`.
static KIT: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/kit.rs"));

/// The strategy to begin from. A crate of its own in the end, and no module of this one.
const STRATEGY: &str = include_str!("new/strategy.rs");

const MANIFEST: &str = r#"[package]
name = "my_strategy"
version = "0.1.0"
edition = "2024"

[lib]
crate-type = ["cdylib"]

[dependencies]
homeroom-sdk = { path = "homeroom/sdk" }

[workspace]

# A panic has to unwind: it becomes an error that names your line.
[profile.release]
panic = "unwind"
# Only what was edited is compiled anew.
incremental = true
"#;

/// What the crates in `homeroom/vendor` are taken for, so that cargo asks no network.
const CARGO_CONFIG: &str = r#"[source.crates-io]
replace-with = "homeroom"

[source.homeroom]
directory = "homeroom/vendor"
"#;

/// Names that rustc, cargo or the kit have taken.
const TAKEN: [&str; 62] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "homeroom_abi",
    "homeroom_sdk",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "memchr",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc_macro",
    "pub",
    "quote",
    "ref",
    "return",
    "self",
    "serde",
    "serde_json",
    "static",
    "std",
    "struct",
    "super",
    "syn",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "where",
    "while",
];

/// Whether a text can name a strategy: `[a-z][a-z0-9_]{0,39}`, and no word that Rust or cargo has taken.
///
/// # Errors
/// When it cannot, with the reason.
pub fn check_name(name: &str) -> Result<()> {
    let body = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    ensure!(
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.len() <= 40 && name.chars().all(body),
        "`{name}` is not a strategy's name: up to 40 small letters, digits and underscores, beginning with a letter"
    );
    ensure!(!TAKEN.contains(&name), "`{name}` is a name that Rust has taken; choose another");
    ensure!(
        !BUILT_IN.contains(&name),
        "`{name}` is a strategy that comes with this program, and one of that name would take its place; choose another name"
    );
    Ok(())
}

/// Writes the crate `name` into `dir`, whole or not at all.
///
/// # Errors
/// When the name is not one, something is in `dir`, or it cannot be written.
pub fn create(name: &str, dir: &Path) -> Result<PathBuf> {
    check_name(name)?;
    match fs::read_dir(dir) {
        Ok(mut entries) => ensure!(
            entries.next().is_none(),
            "{}: the directory is not empty; name a new one with --dir",
            dir.display()
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{}: cannot write a directory here", dir.display())),
    }
    let mut directory = NewDirectory::start(dir)?;
    directory.replaces = false;
    let put = |path: &str, bytes: &[u8]| -> Result<()> {
        let parent = Path::new(path).parent().context("a file lies in a directory")?;
        directory
            .subdirectory(parent)
            .and_then(|()| fs::write(directory.path().join(path), bytes))
            .with_context(|| format!("{}: cannot write {path}", dir.display()))
    };
    for (path, bytes) in KIT.iter().filter(|(path, _)| *path != "Cargo.lock") {
        put(path, bytes)?;
    }
    let named = |text: &str| text.replace("my_strategy", name);
    put("Cargo.toml", named(MANIFEST).as_bytes())?;
    put("Cargo.lock", lock(name)?.as_bytes())?;
    put(".cargo/config.toml", CARGO_CONFIG.as_bytes())?;
    put(".gitignore", b"target\n")?;
    put("src/lib.rs", named(STRATEGY).as_bytes())?;
    // What others could write would be refused when it is built and loaded.
    private::close_to_others(directory.path()).with_context(|| format!("{}: cannot write", dir.display()))?;
    directory.publish()
}

/// The kit's lock file with the new crate in it, in alphabetical order, as cargo would write it.
fn lock(name: &str) -> Result<String> {
    let (_, bytes) = KIT.iter().find(|(path, _)| *path == "Cargo.lock").context("the kit has a lock file")?;
    let text = std::str::from_utf8(bytes)?;
    let mut parts: Vec<String> = text.split("\n[[package]]\n").map(|part| part.trim_end().to_owned()).collect();
    let head = parts.remove(0);
    parts.push(format!("name = \"{name}\"\nversion = \"0.1.0\"\ndependencies = [\n \"homeroom-sdk\",\n]"));
    let key = |part: &String| {
        part.lines().next().unwrap_or_default().trim_start_matches("name = ").trim_matches('"').to_owned()
    };
    parts.sort_by_key(key);
    let parts: Vec<String> = parts.iter().map(|part| format!("\n[[package]]\n{part}\n")).collect();
    Ok(format!("{head}\n{}", parts.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_that_rust_and_a_file_can_have() {
        for good in ["dora", "my_lora2", "a"] {
            check_name(good).unwrap();
        }
        for bad in
            ["", "Dora", "2fast", "_x", "a-b", "../x", "fn", "std", "serde", "lora", "full", "ä", &"a".repeat(41)]
        {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
