//! `--format gguf`: one file, for llama.cpp and what is made of it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use homeroom_engine::export::gguf::{FileType, Plan};
use homeroom_engine::models::BaseModel;

use super::super::runs::quoted;
use super::compare::{compare, tell};
use super::{Arguments, Export, Written, name_in_file};

/// A type that is taken where none is named: what it rounds away is not to be seen, and the file is half as large as in 16 bits.
const USUAL: FileType = FileType::Q8_0;

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    kind(arguments).map(drop)
}

fn kind(arguments: &Arguments) -> Result<FileType> {
    arguments.dtype.as_ref().map_or(Ok(USUAL), |word| word.parse().with_context(|| format!("--dtype {word}")))
}

/// Writes the file, called by the model's name.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let (name, kind) = (name_in_file(&export.arguments.model.model_dir), kind(export.arguments)?);
    let file = format!("{name}-{}.gguf", kind.name().to_uppercase());
    let mut said = write_file(export, &name, &file)?;
    let path = quoted(&export.output_dir.join(file).to_string_lossy());
    said.line(format!("next      llama-server -m {path}; LM Studio: lms import {path}"));
    Ok(said)
}

/// Writes the file `file` of a model that is called `name` in it.
pub fn write_file(export: &Export<'_>, name: &str, file: &str) -> Result<Written> {
    let (model, kind) = (export.model, kind(export.arguments)?);
    let merged = export.merged()?;
    let plan = Plan::new(&merged, kind, name)?;
    export.ensure_room(plan.bytes()?)?;
    plan.write(export.directory, file, &merged)?;

    let mut said = Written::default();
    let storages: Vec<String> = plan.storages().iter().map(|(storage, count)| format!("{count} {storage:?}")).collect();
    said.line(format!("file      {file}   {} MiB, matrices: {}", plan.bytes()? >> 20, storages.join(", ")));
    let mut fallbacks: BTreeMap<String, usize> = BTreeMap::new();
    for fallback in &plan.fallbacks {
        let (wanted, stored) = (fallback.wanted, fallback.stored);
        *fallbacks.entry(format!("{stored:?} instead of {wanted:?}")).or_default() += 1;
    }
    for (what, count) in fallbacks {
        said.line(format!(
            "note      {count} matrices are stored in {what}: their rows are no whole blocks of it, as in llama.cpp"
        ));
    }
    for note in &plan.notes {
        said.line(format!("note      {note}"));
    }
    // Compared as it was written, so that rounding to the file's type counts.
    let written = BaseModel::load_gguf_of(&export.directory.path().join(file), model);
    let found = compare(export, (&written.context("the export cannot be read back")?, None))?;
    let keeps = match kind {
        FileType::F32 => None,
        FileType::F16 | FileType::Bf16 => Some("`--dtype f32` keeps"),
        FileType::Q8_0 => Some("`--dtype f16` and `--dtype f32` keep"),
        _ => Some("`--dtype q8_0` and larger ones keep"),
    };
    tell(export, &found, kind.name(), keeps, &mut said);
    said.field("file", file);
    said.field("dtype", kind.name());
    Ok(said)
}
