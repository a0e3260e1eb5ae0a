//! Builds a strategy's crate with cargo, as its author does.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Builds the crate in `dir` as a release, without a network; the library that came of it. The compiler's words go to stderr.
///
/// # Errors
/// When cargo is not there, the crate does not build, or it builds no library that could be a strategy.
pub fn build(dir: &Path) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(dir).args(["build", "--release", "--offline", "--message-format=json-render-diagnostics"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "it does not build");
    for message in String::from_utf8_lossy(&output.stdout).lines().rev() {
        let message: Value = serde_json::from_str(message).context("cargo's messages cannot be read")?;
        let kinds = message["target"]["crate_types"].as_array();
        if message["reason"] == "compiler-artifact" && kinds.is_some_and(|kinds| kinds.contains(&"cdylib".into())) {
            let files = message["filenames"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let mut libraries = files.filter(|file| file.ends_with(std::env::consts::DLL_SUFFIX));
            return libraries.next().map(PathBuf::from).context("cargo named no library");
        }
    }
    bail!("it builds no library: its Cargo.toml wants `crate-type = [\"cdylib\"]` under [lib]")
}
