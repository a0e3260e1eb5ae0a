//! A LoRA adapter as a GGUF file, which llama.cpp lays over the base: A and B of each module, and one alpha.
//!
//! llama.cpp multiplies B A by alpha over the rank of each pair, so an adapter of one scaling for all keeps its numbers; where modules
//! differ, as with rsLoRA beside patterns, B takes up the difference.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use homeroom_abi::plan::ModuleKind;
use homeroom_kernels::{Storage, encode_row};

use super::Floats;
use super::gguf::{parts, stored_rows};
use crate::adapt::adaptation::Adaptation;
use crate::files::NewDirectory;
use crate::files::gguf::{NewTensor, Value, Writer};
use crate::models::{BaseModel, HEAD};
use crate::run::cpu::low_rank::low_rank_at_rest;

/// Where an adapter goes that has no form in a file.
const INSTEAD: &str = "which llama.cpp's adapters cannot hold; export `merged` or `gguf`, which hold any";

/// The tensors of an adapter: matrices (rows, cols) by name, and alpha.
struct Pairs {
    alpha: f64,
    tensors: Vec<(NewTensor, Vec<f32>)>,
}

/// An update of a module.
struct Update {
    module: usize,
    /// (r, d_in), of an embedding (r, vocabulary).
    a: Tensor,
    /// (d_out, r)
    b: Tensor,
    rank: usize,
    scaling: f64,
}

/// Refuses an adapter that [`save_gguf_lora`] cannot write.
///
/// # Errors
/// The module, and what of it is more than a low-rank update.
pub fn exportable_lora(base: &BaseModel, adaptation: &Adaptation) -> Result<()> {
    updates(base, adaptation).map(drop)
}

/// Writes an adapter, with the name of the model in it, into a directory.
///
/// # Errors
/// When a module has anything but a low-rank update, a number is beyond the floats, or the file cannot be written.
pub fn save_gguf_lora(
    directory: &NewDirectory,
    file: &str,
    (base, adaptation): (&BaseModel, &Adaptation),
    floats: Floats,
    name: &str,
) -> Result<()> {
    let storage = floats.storage();
    let Pairs { alpha, tensors } = pairs(base, adaptation)?;
    let text = |key: &str, value: &str| (key.to_owned(), Value::String(value.to_owned()));
    let metadata = [
        text("general.architecture", base.architecture.family()?.in_gguf),
        text("general.type", "adapter"),
        text("adapter.type", "lora"),
        text("general.name", name),
        ("adapter.lora.alpha".to_owned(), Value::F32(alpha as f32)),
    ];
    let cannot = || directory.cannot_write(file);
    let path = directory.path().join(file);
    let planned: Vec<NewTensor> = tensors.iter().map(|(tensor, _)| NewTensor { storage, ..tensor.clone() }).collect();
    let mut writer = Writer::start(File::create(path).with_context(cannot)?, &metadata, &planned)?;
    for (tensor, (_, values)) in planned.iter().zip(&tensors) {
        let mut bytes = vec![0; tensor.bytes()?];
        ensure!(
            encode_row(storage, values, &mut bytes),
            "tensor {}: holds what {} cannot; `--dtype f32` can",
            tensor.name,
            floats.name()
        );
        writer.write(&bytes).with_context(cannot)?;
    }
    writer.finish().with_context(cannot)
}

/// What an adapter adds to each module.
fn updates(base: &BaseModel, adaptation: &Adaptation) -> Result<Vec<Update>> {
    let mut found = Vec::new();
    for (module, frozen) in base.modules.iter().enumerate() {
        let Some(adapted) = adaptation.of(module) else { continue };
        let path = &frozen.info.path;
        let recipe = &adaptation.plan.recipes[adapted.recipe].forward;
        let shape = |param: usize| adaptation.params[param].var.dims();
        let (d_in, d_out) = (frozen.info.d_in, frozen.info.d_out);
        let update =
            low_rank_at_rest(recipe, adapted, frozen.bias.is_some()).filter(|update| update.fits(shape, (d_in, d_out)));
        let Some(update) = update else {
            bail!("{path}: its strategy adds something else than a low-rank update, {INSTEAD}")
        };
        ensure!(update.magnitude.is_none(), "{path}: DoRA learns the length of each row besides, {INSTEAD}");
        let is_embedding = frozen.info.kind == ModuleKind::Embedding;
        let is_head = path == HEAD;
        ensure!(
            !(base.architecture.tie_word_embeddings && (is_embedding || is_head)),
            "{path}: it is embedding and head at once, {INSTEAD}"
        );
        ensure!(is_embedding || frozen.info.kind == ModuleKind::Linear, "{path}: an update of a norm, {INSTEAD}");
        let tensor = |param: usize| adaptation.params[param].var.as_tensor().to_dtype(DType::F32);
        let (a, b) = (tensor(update.a)?, tensor(update.b)?);
        let rank = a.dim(0)?;
        found.push(Update { module, a, b, rank, scaling: update.scaling });
    }
    ensure!(!found.is_empty(), "the adapter adapts no module");
    Ok(found)
}

fn pairs(base: &BaseModel, adaptation: &Adaptation) -> Result<Pairs> {
    let updates = updates(base, adaptation)?;
    // The alpha of most modules, so that most keep their numbers.
    let alphas: Vec<f64> =
        updates.iter().map(|update| f64::from((update.scaling * update.rank as f64) as f32)).collect();
    let count = |alpha: &f64| alphas.iter().filter(|other| *other == alpha).count();
    let alpha = alphas.iter().copied().max_by_key(count).context("an adapter has modules")?;
    ensure!(alpha != 0.0, "its updates are multiplied by 0, so there is nothing to export");
    let specs = base.architecture.modules();
    let mut tensors = Vec::new();
    for (update, own) in updates.iter().zip(&alphas) {
        let path = &base.modules[update.module].info.path;
        let spec = specs.iter().find(|spec| spec.path == *path);
        let spec = spec.with_context(|| format!("{path}: has no name in a GGUF file"))?;
        let b = match own == &alpha {
            true => update.b.clone(),
            false => (&update.b * (own / alpha))?,
        };
        let (a, b) = match spec.kind {
            // There A is taken by rows: those of the tokens.
            ModuleKind::Embedding => (update.a.t()?.contiguous()?, b),
            _ => (update.a.clone(), b),
        };
        for part in parts(&base.architecture, &spec.path, &spec.gguf, spec.turns)? {
            let mut push = |ending: &str, matrix: &Tensor, rows: Option<&[usize]>| -> Result<()> {
                let mut values = matrix.to_vec2::<f32>()?;
                if let Some(rows) = rows {
                    values = rows.iter().map(|row| values[*row].clone()).collect();
                }
                let name = format!("{}.weight.{ending}", part.stem);
                let shape = vec![values.len(), matrix.dim(1)?];
                tensors.push((NewTensor { name, shape, storage: Storage::F32 }, values.concat()));
                Ok(())
            };
            push("lora_a", &a, None)?;
            let rows = part.rows.clone().unwrap_or(0..b.dim(0)?);
            let stored: Vec<usize> =
                stored_rows(rows.len(), part.order).into_iter().map(|row| rows.start + row).collect();
            push("lora_b", &b, Some(&stored))?;
        }
    }
    Ok(Pairs { alpha, tensors })
}
