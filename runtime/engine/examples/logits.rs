//! Writes a model's logits for given token ids, to compare with other implementations.
//!
//! `logits MODEL_OR_ADAPTER IDS_JSON OUT.safetensors [BASE_MODEL]`: IDS_JSON is a list of lists; OUT holds `logits_0`,
//! `logits_1`, and so on, each (tokens, vocabulary).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter, serialize_f32};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::Batch;
use homeroom_engine::run::plain::recipe::Pass;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let mut argument = |name: &str| arguments.next().with_context(|| format!("{name} is missing"));
    let (path, ids, out) = (argument("MODEL")?, argument("IDS_JSON")?, argument("OUT")?);
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&std::fs::read_to_string(ids)?)?;
    let base = arguments.next();
    let (model, adaptation) = load(&path, base.as_deref())?;
    let pass = Pass::evaluation(&model, adaptation.as_ref());
    let mut tensors = Vec::new();
    for (number, ids) in sequences.iter().enumerate() {
        let logits = pass.logits(&Batch::of_tokens(ids, 0))?;
        let shape = logits.dims().to_vec();
        let values: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((format!("logits_{number}"), shape, bytes));
    }
    std::fs::write(out, serialize_f32(&tensors)?)?;
    Ok(())
}

fn load(
    path: &Path,
    base: Option<&Path>,
) -> Result<(BaseModel, Option<homeroom_engine::adapt::adaptation::Adaptation>)> {
    if !is_adapter(path) {
        return Ok((BaseModel::load(path)?, None));
    }
    let files = AdapterFiles::read(path)?;
    let base = base.map(Path::to_owned).or_else(|| files.base_path()).context("the adapter names no base")?;
    let model = BaseModel::load(&base)?;
    let adaptation = files.adapt(&model, true)?;
    Ok((model, Some(adaptation)))
}
