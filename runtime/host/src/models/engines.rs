//! Bases that answer, each once a process: whoever names the same files, to compute in the same way, gets the same engine, and so the
//! memory of one base. They are held weakly: a base goes when the last handler of it does.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use anyhow::Result;
use homeroom_engine::adapt::adapter::{AdapterFiles, is_adapter};
use homeroom_engine::files::gguf::shard_paths;
use homeroom_engine::files::tensors::{has_safetensors, weight_files};
use homeroom_engine::files::{digest, named_templates, result_files};
use homeroom_engine::inference::{Adapter, Engine};
use homeroom_engine::run::compute::Compute;
use homeroom_kernels::isa;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Located, ModelRef, here, load_base};
use crate::job::encode;
use crate::pipeline::bytecode::hex;
use crate::plugin::native;
use crate::registry;

/// What tells a base that answers from another.
#[derive(PartialEq)]
struct BaseKey {
    files: Files,
    /// How an adapter's plan has its weights stored.
    stored: String,
    compute: Compute,
}

/// What tells an adapter from another, on one base.
#[derive(PartialEq)]
struct AdapterKey {
    files: Files,
    any_base: bool,
}

static ENGINES: Mutex<Vec<(BaseKey, Weak<Engine>)>> = Mutex::new(Vec::new());
static ADAPTERS: Mutex<Vec<(AdapterKey, Weak<Adapter>)>> = Mutex::new(Vec::new());

/// The files that a model or an adapter is read from, as they are now. Others beside them do not count, nor do owners and permissions.
#[derive(Clone, PartialEq)]
pub struct Files(Vec<(PathBuf, Written)>);

/// What tells a file from another of the same name, and from itself before it was written: device and inode, length, and the time of
/// the last write.
type Written = ((u64, u64), u64, Option<SystemTime>);

impl Files {
    /// Those of a model's directory, of an adapter's, or of a GGUF file with the others of the same model; of those that are there.
    pub(super) fn of(path: &Path) -> Self {
        let written = |path: PathBuf| std::fs::metadata(&path).ok().map(|about| (path, written(&about)));
        Self(read_of(path).into_iter().filter_map(written).collect())
    }

    /// The digest of all of them.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(super) fn digest(&self) -> Result<String> {
        let paths: Vec<PathBuf> = self.0.iter().map(|(path, _)| path.clone()).collect();
        let digests = digest::of_files(&paths, registry::kept_digests().as_deref())?;
        let lines: String = digests.iter().map(|(name, digest)| format!("{name} {digest}\n")).collect();
        Ok(hex(&Sha256::digest(lines)))
    }

    /// Those of what a name means now, which on the hub is another directory once its branch is at another commit.
    pub fn named(reference: &ModelRef) -> Self {
        let located = here(&reference.name).ok().flatten();
        Self::of(located.as_ref().map_or(&reference.name, |located| &located.path))
    }
}

#[cfg(unix)]
fn written(about: &Metadata) -> Written {
    use std::os::unix::fs::MetadataExt;
    ((about.dev(), about.ino()), about.len(), about.modified().ok())
}

#[cfg(not(unix))]
fn written(about: &Metadata) -> Written {
    ((0, 0), about.len(), about.modified().ok())
}

/// What is read of a path, sorted, whether or not it is there.
fn read_of(path: &Path) -> Vec<PathBuf> {
    if !path.is_dir() {
        // A file may be a link to a blob, whose name does not say which files are of the same model.
        let directory = std::path::absolute(path).ok().and_then(|path| path.parent()?.canonicalize().ok());
        let name = directory.zip(path.file_name()).map(|(directory, name)| directory.join(name));
        return shard_paths(&name.unwrap_or_else(|| path.to_owned()));
    }
    let directory = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let gguf = match is_adapter(&directory) || has_safetensors(&directory) {
        true => Vec::new(),
        false => gguf_files(&directory),
    };
    if !gguf.is_empty() {
        return gguf;
    }
    // What keeps them from being listed keeps the model from being loaded, which says so.
    let weights = weight_files(&directory).unwrap_or_default();
    let templates = named_templates(&directory).unwrap_or_default();
    // Beside a single file an index is of an older save, and is not read.
    let index = "model.safetensors.index.json";
    let index = (!directory.join("model.safetensors").exists()).then_some(index);
    let fixed = result_files().chain(index).map(PathBuf::from);
    let mut files: Vec<_> = fixed.chain(templates).map(|name| directory.join(name)).chain(weights).collect();
    // What a training was is no part of what answers.
    files.retain(|file| !file.ends_with("trainer_state.json"));
    files.sort();
    files.dedup();
    files
}

/// The GGUF files of a directory, sorted.
fn gguf_files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"));
    let mut files: Vec<_> = entries.map(|entry| entry.path()).filter(is_gguf).collect();
    files.sort();
    files
}

/// What is computed in to answer, where several words come to the same: as
/// [`answerers`](homeroom_engine::run::backends::answerers) has it. Where `auto` is f32, it rounds, which f32 by name does not.
fn run_in(compute: Compute) -> Compute {
    match compute {
        Compute::Auto if Compute::auto() == Compute::Bf16 => Compute::Bf16,
        Compute::Int8 if isa().has_bf16() => Compute::Bf16,
        other => other,
    }
}

/// The engine of a base, with its weights stored as they were in an adapter's training. Weights are where they are read fastest, see
/// [`BaseModel::make_resident`](homeroom_engine::models::BaseModel::make_resident).
///
/// # Errors
/// When the base cannot be run or stored so.
pub(super) fn engine_of(base: &Located, adapter: Option<&AdapterFiles>, compute: Compute) -> Result<Arc<Engine>> {
    let stored = adapter.and_then(|files| files.manifest.as_ref()).map_or_else(String::new, |manifest| {
        let plan = &manifest.plan;
        let how = json!([manifest.base.requantize, plan["codecs"], plan["stored"], plan["stored_natively"]]);
        let native = plan["stored_natively"].as_object().is_some_and(|native| !native.is_empty());
        // A base that is as its files have it is the same for all.
        let nothing = plan["stored"].as_object().is_none_or(serde_json::Map::is_empty) && !native;
        if nothing { String::new() } else { format!("{} {how}", json!(manifest.strategy)) }
    });
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    // Before they are read: what changes in between is a change.
    let key = BaseKey { files: Files::of(&base.path), stored, compute: run_in(compute) };
    engines.retain(|(_, engine)| engine.strong_count() > 0);
    if let Some(engine) = engines.iter().find(|(other, _)| *other == key).and_then(|(_, engine)| engine.upgrade()) {
        return Ok(engine);
    }
    let mut model = Arc::new(load_base(base)?);
    if let Some(files) = adapter {
        model = encode(|kept, progress| files.store(model, &native::find, kept, progress))?;
    }
    if let Some(model) = Arc::get_mut(&mut model) {
        model.make_resident();
    }
    let engine = Arc::new(Engine::new(model, compute));
    engines.push((key, Arc::downgrade(&engine)));
    Ok(engine)
}

/// The adapter of some files on a base, if it is there already; else what `load` makes of `path`. `files` are those of the path as they
/// were before anything of them was read. The second value: whether they still were when all was read. If not, what was made may be of
/// older files or of a mixture, and nobody else gets it.
///
/// # Errors
/// When `load` fails.
pub(super) fn adapter_of(
    engine: &Engine,
    (path, files): (&Path, Files),
    any_base: bool,
    load: impl FnOnce() -> Result<Arc<Adapter>>,
) -> Result<(Arc<Adapter>, bool)> {
    let mut adapters = ADAPTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let key = AdapterKey { files, any_base };
    adapters.retain(|(_, adapter)| adapter.strong_count() > 0);
    let mut known = adapters.iter().filter(|(other, _)| *other == key).filter_map(|(_, adapter)| adapter.upgrade());
    if let Some(adapter) = known.find(|adapter| adapter.is_on(engine.model())) {
        return Ok((adapter, true));
    }
    let adapter = load()?;
    let settled = Files::of(path) == key.files;
    if settled {
        adapters.push((key, Arc::downgrade(&adapter)));
    }
    Ok((adapter, settled))
}
