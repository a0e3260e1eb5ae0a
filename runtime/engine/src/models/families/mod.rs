//! The families of decoders that are known, one file each.

mod gemma2;
mod gemma3;
mod granite;
mod granite_hybrid;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

use super::architecture::Architecture;
use super::fields::Fields;
use crate::embedding::is_encoder;
use crate::files::gguf::Gguf;

/// A family of decoders.
pub struct Family {
    /// `model_type` of its `config.json`.
    pub model_type: &'static str,
    /// `model_type` of directories that hold it as one part among others, whose `text_config` is its configuration.
    pub part_of: Option<&'static str>,
    /// Its class in transformers.
    pub class: &'static str,
    /// What it is called where people look for it.
    pub known_as: &'static str,
    /// `general.architecture` of its GGUF files, if they have one of their own.
    pub gguf: Option<&'static str>,
    /// `general.architecture` of what llama.cpp's converter makes of it.
    pub in_gguf: &'static str,
    /// Whether llama.cpp's converter interleaves the halves of each head in q and k.
    pub interleaved: bool,
    /// Sizes that its class in transformers has where a configuration leaves them out.
    pub defaults: &'static [(&'static str, usize)],
    /// Reads a configuration.
    pub architecture: fn(&Fields<'_>) -> Result<Architecture>,
    /// Completes a configuration made of a GGUF file's metadata: what llama.cpp has in its code and not in the file.
    pub complete: fn(&Gguf, &mut Map<String, Value>) -> Result<()>,
}

/// Nothing is left open by the metadata.
fn complete(_: &Gguf, _: &mut Map<String, Value>) -> Result<()> {
    Ok(())
}

/// All of them.
pub const FAMILIES: [&Family; 11] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &smollm3::FAMILY,
    &phi3::FAMILY,
    &granite::FAMILY,
    &granite_hybrid::FAMILY,
    &olmo2::FAMILY,
];

impl Family {
    /// The family of a `model_type`.
    ///
    /// # Errors
    /// When it is unknown; names those that are known.
    pub fn of(model_type: &str) -> Result<&'static Self> {
        ensure!(
            !is_encoder(model_type),
            "`{model_type}` is an embedding model, which writes no text: it is not trained, asked or exported here; `homeroom serve` serves it at /v1/embeddings"
        );
        let own = |family: &&&Self| family.model_type == model_type || family.part_of == Some(model_type);
        let names = |family: &&Self| [Some(family.model_type), family.part_of].into_iter().flatten();
        let known = FAMILIES.iter().flat_map(names).collect::<Vec<_>>().join(", ");
        let family = FAMILIES.iter().find(own).copied();
        family.with_context(|| format!("unknown architecture `{model_type}`; known are {known}"))
    }

    /// The family of a GGUF file's `general.architecture`.
    ///
    /// # Errors
    /// When it is unknown; names those that are known.
    pub fn of_gguf(architecture: &str) -> Result<&'static Self> {
        ensure!(
            !is_encoder(architecture) && !architecture.ends_with("-bert"),
            "`{architecture}` is an embedding model, which is read as a directory of Hugging Face and not as a GGUF file"
        );
        let known = FAMILIES.iter().filter_map(|family| family.gguf).collect::<Vec<_>>().join(", ");
        let family = FAMILIES.iter().find(|family| family.gguf == Some(architecture)).copied();
        family.with_context(|| format!("unknown architecture `{architecture}`; known are {known}"))
    }
}
