//! `--format mlx`: a directory that `mlx-lm` loads.
//!
//! It is the merged model and no adapter of mlx-lm's: such an adapter has one rank and one scale for all its modules, and its modules are
//! those of the last layers; of what is trained here only some is that. A merged model is all of it.

use anyhow::{Result, ensure};

use super::merged::{self, write_model};
use super::{Arguments, Export, Written};

/// The models of mlx-lm that compute what ours do, by `model_type`.
const KNOWN: [&str; 10] =
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"];

/// Refuses arguments that no model can be written by.
pub fn check(arguments: &Arguments) -> Result<()> {
    merged::check(arguments)
}

/// Writes the model.
pub fn write(export: &Export<'_>) -> Result<Written> {
    let family = export.model.architecture.model_type.as_str();
    ensure!(
        KNOWN.contains(&family),
        "mlx-lm has no model `{family}` that computes the same; known are {}; `--format merged` is for transformers, `--format gguf` for llama.cpp",
        KNOWN.join(", ")
    );
    write_model(export).map(|(_, said)| said)
}
