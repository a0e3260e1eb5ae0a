//! `--format merged`: a Hugging Face directory.

use anyhow::{Context, Result};
use homeroom_engine::export::{Floats, SHARD_BYTES_MAX, exportable, model_bytes, save_model_in};
use homeroom_engine::models::BaseModel;

use super::compare::{compare, tell};
use super::{Arguments, Export, Written};
use crate::progress;

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    arguments.floats().map(drop)
}

/// Writes the model.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let model = export.model;
    exportable(model)?;
    let floats = export.arguments.floats()?.map_or_else(|| Floats::of(model), Ok)?;
    let merged = export.merged()?;
    export.ensure_room(model_bytes(&merged, floats)?)?;
    let mut bar = None;
    save_model_in(export.directory, &merged, floats, SHARD_BYTES_MAX, |done, all| {
        bar.get_or_insert_with(|| progress::counting("tensors", all)).set_position(done as u64);
    })?;
    bar.into_iter().for_each(|bar| bar.finish_and_clear());
    // Compared as it was written, so that rounding to the file's type counts.
    let written = BaseModel::load(export.directory.path()).context("the export cannot be read back")?;
    let found = compare(export, (&written, None))?;
    let mut said = Written::default();
    let keeps = match floats {
        Floats::Bf16 => Some("`--dtype f16` (as small) and `--dtype f32` keep"),
        Floats::F16 => Some("`--dtype f32` keeps"),
        Floats::F32 => None,
    };
    tell(export, &found, floats.name(), keeps, &mut said);
    said.field("dtype", floats.name());
    Ok(said)
}
