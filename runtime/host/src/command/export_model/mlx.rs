//! `--format mlx`: a directory that `mlx-lm` loads.
//!
//! It is the merged model and no adapter of mlx-lm's: such an adapter has one rank and one scale for all its modules, and its modules are
//! those of the last layers; of what is trained here only some is that. A merged model is all of it.

use anyhow::Result;
use homeroom_engine::adapt::adapter::pretty;
use homeroom_engine::export::mlx_config;
use serde_json::Value;

use super::super::runs::quoted;
use super::{Arguments, Export, Written, merged};

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    merged::check(arguments)
}

/// Writes the model.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let architecture = &export.model.architecture;
    // Before anything is written.
    mlx_config(architecture, Value::Object(architecture.config.clone()))?;
    let mut said = merged::write(export)?;
    let file = export.directory.path().join("config.json");
    let written: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let (config, notes) = mlx_config(architecture, written)?;
    export.directory.write("config.json", pretty(&config)?.as_bytes())?;
    notes.into_iter().for_each(|note| said.line(format!("note      {note}")));
    let directory = quoted(&export.output_dir.to_string_lossy());
    said.line(format!("next      mlx_lm.generate --model {directory} --prompt \"...\""));
    Ok(said)
}
