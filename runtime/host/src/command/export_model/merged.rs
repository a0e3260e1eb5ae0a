//! `--format merged`: a Hugging Face directory.

use anyhow::{Context, Result};
use homeroom_engine::export::{Floats, exportable, model_bytes, save_model};
use homeroom_engine::models::BaseModel;

use super::compare::{compare, tell};
use super::{Arguments, Export, Written};

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    arguments.floats().map(drop)
}

/// Writes the model.
pub fn write(export: &Export<'_>) -> Result<Written> {
    write_model(export).map(|(_, said)| said)
}

/// Writes the model, and says in which floats.
pub fn write_model(export: &Export<'_>) -> Result<(Floats, Written)> {
    let model = export.model;
    exportable(model)?;
    let floats = export.arguments.floats()?.map_or_else(|| Floats::of(model), Ok)?;
    let merged = export.merged()?;
    export.ensure_room(model_bytes(&merged, floats)?)?;
    save_model(export.directory, &merged, floats)?;
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
    Ok((floats, said))
}
