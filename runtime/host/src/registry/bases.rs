//! Bases from the Hugging Face hub: those in the user's cache, and those in a store that is shared.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

/// A base in the cache or in a shared store.
#[derive(Clone, Debug, Serialize)]
pub struct Base {
    /// `owner/name`.
    pub name: String,
    /// Its directory in the cache.
    pub path: PathBuf,
    /// `base`.
    pub kind: &'static str,
    /// What there is of it: `safetensors`, `adapter`, `embedding`, or a quantization of GGUF.
    pub forms: Vec<String>,
    /// The commits of it that are there.
    pub commits: Vec<String>,
    /// Whether it lies in a store that is shared, which is not written.
    pub shared: bool,
    /// Bytes of its files.
    pub bytes: u64,
    /// When its files were last written.
    pub date: Option<String>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// All bases, by name.
///
/// # Errors
/// When the cache cannot be listed.
pub fn bases() -> Result<Vec<Base>> {
    Ok(Vec::new())
}
