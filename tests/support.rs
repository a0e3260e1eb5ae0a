//! What the tests share: where things are, plugins built once, models and plans.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use homeroom::plugin::Plugin;
use homeroom_abi::plan::{Plan, PlanRequest};
use homeroom_engine::adaptation::Adaptation;
use homeroom_engine::model::BaseModel;
use homeroom_engine::tensors::map_safetensors;
use serde_json::Value;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the manifest lies two levels down")
}

/// A file or directory of `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    root().join("tests/fixtures").join(path)
}

/// A tiny model of `tests/fixtures/models`.
pub fn model(name: &str) -> Result<BaseModel> {
    BaseModel::load(&fixture("models").join(name))
}

/// The program as cargo built it.
pub fn homeroom() -> Command {
    Command::new(env!("CARGO_BIN_EXE_homeroom"))
}

/// The plugin's file, built by the first test that asks.
pub fn plugin_path(name: &str) -> PathBuf {
    static BUILT: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        build_plugins(&root(), &["lora", "full", "ia3", "vera", "hostile"]).expect("the plugins build")
    });
    built.get(name).unwrap_or_else(|| panic!("plugin `{name}` was not built")).clone()
}

/// Builds plugin packages of a workspace as users do, and reads where cargo put them.
pub fn build_plugins(workspace: &Path, packages: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).args(["build", "--release", "--offline", "--message-format=json"]);
    for package in packages {
        cargo.args(["-p", package]);
    }
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build failed:\n{}", String::from_utf8_lossy(&output.stderr));
    let mut found = BTreeMap::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        let kinds = message["target"]["crate_types"].as_array();
        if message["reason"] == "compiler-artifact" && kinds.is_some_and(|kinds| kinds.contains(&"cdylib".into())) {
            let name = message["target"]["name"].as_str().context("a target has a name")?;
            let files = message["filenames"].as_array().context("an artifact has files")?;
            let library =
                files.iter().filter_map(Value::as_str).find(|file| file.ends_with(std::env::consts::DLL_SUFFIX));
            found.insert(name.to_owned(), PathBuf::from(library.context("a cdylib is a library")?));
        }
    }
    for package in packages {
        ensure!(found.contains_key(*package), "cargo built no library for `{package}`");
    }
    Ok(found)
}

/// A strategy, loaded from its file.
pub fn plugin(name: &str) -> Result<Plugin> {
    Plugin::load(&plugin_path(name))
}

/// A strategy's plan for a model, traced by the plugin.
pub fn plan(strategy: &str, options: &Value, model: &BaseModel) -> Result<Plan> {
    let options = options.as_object().cloned().context("options are an object")?;
    plugin(strategy)?.plan(&PlanRequest { options, model: model.info() })
}

/// A strategy's adaptation of a model.
pub fn adapt(strategy: &str, options: &Value, model: &BaseModel, seed: u64) -> Result<Adaptation> {
    Adaptation::new(model, plan(strategy, options, model)?, seed)
}

/// The tensors of a safetensors file as f32.
pub fn tensors(path: &Path) -> Result<BTreeMap<String, (Vec<usize>, Vec<f32>)>> {
    let mapped = map_safetensors(path)?;
    mapped.into_iter().map(|(name, tensor)| Ok((name, (tensor.shape.clone(), tensor.values()?)))).collect()
}

/// The `ids_0`, `logits_0`, `ids_1` … of a file that transformers' answers are in.
pub fn expected(path: &Path) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let ids = |name: &str| -> Result<Vec<u32>> {
        let words = file.tensor(name)?.data().chunks_exact(8).map(|word| word.try_into().map(i64::from_le_bytes));
        Ok(words.map(|word| word.map(|id| id as u32)).collect::<Result<_, _>>()?)
    };
    let floats = |name: &str| -> Result<Vec<f32>> {
        let words = file.tensor(name)?.data().chunks_exact(4).map(|word| word.try_into().map(f32::from_le_bytes));
        Ok(words.collect::<Result<_, _>>()?)
    };
    let count = file.names().iter().filter(|name| name.starts_with("logits_")).count();
    ensure!(count > 0, "{}: it holds no logits", path.display());
    (0..count).map(|i| Ok((ids(&format!("ids_{i}"))?, floats(&format!("logits_{i}"))?))).collect()
}

/// Integer ids stored as i64 under one name.
pub fn stored_ids(path: &Path, name: &str) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let words = file.tensor(name)?.data().chunks_exact(8).map(|word| word.try_into().map(i64::from_le_bytes));
    Ok(words.map(|word| word.map(|id| id as u32)).collect::<Result<_, _>>()?)
}

/// Largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
