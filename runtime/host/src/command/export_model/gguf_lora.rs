//! `--format gguf-lora`: an adapter as one file that llama.cpp lays over the base.

use anyhow::{Context, Result};
use homeroom_engine::export::{Floats, exportable_lora, save_gguf_lora};

use super::{Arguments, Export, Written, name_in_file};

/// Refuses arguments that no adapter can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    arguments.floats().map(drop)
}

/// Writes the file.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let floats = export.arguments.floats()?.unwrap_or(Floats::F32);
    let adaptation = export
        .adaptation
        .context("this is no adapter, so there is no LoRA to write; `--format gguf` writes a whole model")?;
    exportable_lora(export.model, adaptation)?;
    let name = name_in_file(&export.arguments.model.model_dir);
    let file = format!("{name}-lora.gguf");
    save_gguf_lora(export.directory, &file, (export.model, adaptation), floats, &name)?;
    let mut said = Written::default();
    said.line(format!(
        "file      {file}   llama.cpp: --lora {file} beside -m with the base as a GGUF file; it answers as here where that file holds the base that was trained on"
    ));
    said.field("file", file);
    said.field("dtype", floats.name());
    Ok(said)
}
