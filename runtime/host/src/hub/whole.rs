//! What a snapshot of the cache is, and whether all files are there that it takes to use it.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use homeroom_engine::files::read_text;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::gguf;

/// Longest index of shards, in bytes.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most shards of a model.
const SHARDS_MAX: usize = 10_000;
/// How deep in a snapshot files are looked for.
const DEPTH_MAX: usize = 4;

/// What can be done with a snapshot whose files are all there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A language model in Hugging Face's form.
    Model,
    /// An adapter in PEFT's form.
    Adapter,
    /// A model that makes vectors of texts, in the form of sentence-transformers.
    Embedding,
    /// GGUF files only; each name is what `:QUANT` may be.
    Gguf(Vec<String>),
}

/// What a snapshot is; `None` where a file is missing.
pub fn kind(snapshot: &Path) -> Option<Kind> {
    let is_there = |name: &str| snapshot.join(name).is_file();
    if is_there("adapter_config.json") && is_there("adapter_model.safetensors") {
        return Some(Kind::Adapter);
    }
    let has_weights =
        || is_there("model.safetensors") || shards(snapshot).is_ok_and(|all| all.iter().all(|one| is_there(one)));
    if is_there("config.json") && has_weights() {
        let is_embedding = is_there("modules.json");
        if is_embedding && (is_there("tokenizer.json") || is_there("vocab.txt")) {
            return Some(Kind::Embedding);
        }
        if is_there("tokenizer.json") {
            return Some(Kind::Model);
        }
    }
    let paths = paths(snapshot);
    let models = gguf::models(paths.iter().map(String::as_str));
    let quantizations: Vec<String> = gguf::quantizations(gguf::whole(&models)).into_iter().collect();
    (!quantizations.is_empty()).then_some(Kind::Gguf(quantizations))
}

/// The shards that a snapshot's index names.
fn shards(snapshot: &Path) -> Result<Vec<String>> {
    shards_of(&read_text(&snapshot.join(INDEX), INDEX_BYTES_MAX)?)
}

/// Name of the index of shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// The shards that an index names, each once.
///
/// # Errors
/// When it is not an index, or a name in it is none of a file beside it.
pub fn shards_of(index: &str) -> Result<Vec<String>> {
    let Index { weight_map: Shards(shards) } = serde_json::from_str(index)?;
    anyhow::ensure!(!shards.is_empty(), "it has no weight_map");
    let is_right = |name: &&String| name.ends_with(".safetensors") && !name.contains(['/', '\\']);
    if let Some(name) = shards.iter().find(|name| !is_right(name)) {
        anyhow::bail!("a tensor is in {:?}, which is no file beside it", name.chars().take(80).collect::<String>());
    }
    Ok(shards.into_iter().collect())
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    weight_map: Shards,
}

/// The files of a map from tensors to files. The tensors, of which there may be any number, are read over.
#[derive(Default)]
struct Shards(BTreeSet<String>);

impl<'de> Deserialize<'de> for Shards {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Shards;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map from tensors to files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shards, A::Error> {
                let mut shards = BTreeSet::new();
                while let Some((_, shard)) = map.next_entry::<IgnoredAny, String>()? {
                    shards.insert(shard);
                    if shards.len() > SHARDS_MAX {
                        return Err(A::Error::custom(format!("more than {SHARDS_MAX} files")));
                    }
                }
                Ok(Shards(shards))
            }
        }

        from.deserialize_map(Reader)
    }
}

/// The files of a snapshot that are there, with `/` between the parts of their paths.
pub fn paths(snapshot: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    gather(snapshot, "", DEPTH_MAX, &mut paths);
    paths.sort();
    paths
}

fn gather(directory: &Path, before: &str, depth: usize, paths: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let (Ok(name), Ok(kind)) = (entry.file_name().into_string(), entry.file_type()) else { continue };
        let path = format!("{before}{name}");
        match kind.is_dir() {
            true if depth > 1 => gather(&entry.path(), &format!("{path}/"), depth - 1, paths),
            true => {}
            false if entry.path().is_file() => paths.push(path),
            false => {}
        }
    }
}
