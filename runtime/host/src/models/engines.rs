//! Bases that answer, each once a process: whoever names the same files, to compute in the same way, gets the same engine, and so the
//! memory of one base. They are held weakly: a base goes when the last handler of it does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::Result;
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::inference::{Adapter, Engine};
use homeroom_engine::run::compute::Compute;
use serde_json::json;

use super::{Located, load_base};
use crate::job::encode;
use crate::plugin::native;
use crate::watch::{Identity, identity};

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

/// A file or a directory's files, as they are now.
#[derive(PartialEq)]
pub(super) struct Files(PathBuf, Vec<(OsString, Option<Identity>)>);

impl Files {
    pub(super) fn of(path: &Path) -> Self {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut files: Vec<_> = match std::fs::read_dir(&path) {
            Ok(entries) => entries.flatten().map(|entry| (entry.file_name(), identity(&entry.path()))).collect(),
            Err(_) => vec![(OsString::new(), identity(&path))],
        };
        files.sort_by(|a, b| a.0.cmp(&b.0));
        Self(path, files)
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
    let key = BaseKey { files: Files::of(&base.path), stored, compute };
    engines.retain(|(_, engine)| engine.strong_count() > 0);
    if let Some(engine) = engines.iter().find(|(other, _)| *other == key).and_then(|(_, engine)| engine.upgrade()) {
        return Ok(engine);
    }
    let mut model = Arc::new(load_base(base)?);
    if let Some(files) = adapter {
        model = encode(|progress| files.store(model, &native::find, progress))?;
    }
    if let Some(model) = Arc::get_mut(&mut model) {
        model.make_resident();
    }
    let engine = Arc::new(Engine::new(model, compute));
    engines.push((key, Arc::downgrade(&engine)));
    Ok(engine)
}

/// The adapter of some files on a base, if it is there already; else what `load` makes.
///
/// # Errors
/// When `load` fails.
pub(super) fn adapter_of(
    engine: &Engine,
    path: &Path,
    any_base: bool,
    load: impl FnOnce() -> Result<Arc<Adapter>>,
) -> Result<Arc<Adapter>> {
    let mut adapters = ADAPTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let key = AdapterKey { files: Files::of(path), any_base };
    adapters.retain(|(_, adapter)| adapter.strong_count() > 0);
    let mut known = adapters.iter().filter(|(other, _)| *other == key).filter_map(|(_, adapter)| adapter.upgrade());
    if let Some(adapter) = known.find(|adapter| adapter.is_on(engine.model())) {
        return Ok(adapter);
    }
    let adapter = load()?;
    adapters.push((key, Arc::downgrade(&adapter)));
    Ok(adapter)
}
