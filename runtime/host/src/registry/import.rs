//! Takes in models from elsewhere: their files are copied, and nothing of the source is moved, changed or linked to.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::adapt::adapter::{AdapterFiles, CONFIG_FILE, HOMEROOM_FILE, WEIGHTS_FILE, is_adapter};
use homeroom_engine::embedding::{EmbeddingModel, MODULES_FILE, PROMPTS_FILE, SENTENCE_FILES, encoder_type};
use homeroom_engine::files::tensors::{has_safetensors, weight_files};
use homeroom_engine::files::{TEXT_FILES, is_named, named_templates};
use homeroom_engine::models::BaseModel;

use super::copies::{Sources, ensure_free, files_of_modules, save_or};
use super::names::{free_name, owner, place};
use super::{Entry, entry};
use crate::near;

/// What models of the BERT family have beside [`TEXT_FILES`].
const VOCABULARY_FILE: &str = "vocab.txt";
const ADAPTER_FILES: [&str; 4] = [CONFIG_FILE, WEIGHTS_FILE, HOMEROOM_FILE, "trainer_state.json"];
const MODEL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    HOMEROOM_FILE,
    "trainer_state.json",
    // Of sentence-transformers.
    MODULES_FILE,
    PROMPTS_FILE,
];

/// A model that was taken in.
pub struct Imported {
    /// What it is now.
    pub entry: Entry,
    /// Files of the source that are no part of it, and stayed where they are.
    pub left_out: Vec<String>,
    /// The folder of a cache, `models--owner--name`, of which the source is a snapshot.
    pub cached: Option<PathBuf>,
}

/// Takes in a Hugging Face directory, a .gguf file or an adapter, under a name that is given or else free.
///
/// # Errors
/// When it is none of these or cannot be loaded, the name is taken, or there is no room.
pub fn import(source: &Path, name: Option<&str>, overwrite: bool) -> Result<Imported> {
    near::exists(source)?;
    refuse_cache(source)?;
    if let Some(name) = source.canonicalize().ok().as_deref().and_then(owner) {
        bail!("{}: it is the model {name} already\nhint: `homeroom cp {name} NEW` copies it", source.display());
    }
    let to = match name {
        Some(name) => ensure_free(name, overwrite)?,
        None => free_place(source)?,
    };
    let model = check(source)?;
    let sources = match &model {
        Form::Gguf(files) => Sources::of_files(files)?,
        Form::Files => Sources::open(source, &files_of)?,
    };
    let another = || name.is_none().then(|| free_place(source).ok()).flatten();
    let left_out = if source.is_file() { Vec::new() } else { left_out(source, &sources)? };
    let to = save_or(sources, &to, overwrite, &another)?;
    let name = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Imported { entry: entry(name, to), left_out, cached: folder_of(source) })
}

/// The folder of a cache of which a directory is a snapshot.
fn folder_of(source: &Path) -> Option<PathBuf> {
    let source = source.canonicalize().ok()?;
    let folder = source.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent)?;
    let is_cached = folder.file_name()?.to_str()?.starts_with("models--");
    is_cached.then(|| folder.to_owned())
}

/// A name that is free: the source's, or for a snapshot of a cache, which is called by its commit, that of the model.
fn free_place(source: &Path) -> Result<PathBuf> {
    // A file of a snapshot is a link, and what that leads to is called by its digest.
    let source = match source.is_file() {
        true => source.to_owned(),
        false => source.canonicalize().with_context(|| source.display().to_string())?,
    };
    let cached = source.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    let repo = cached.and_then(|folder| folder.file_name()?.to_str()?.strip_prefix("models--"));
    let named = repo.map(|repo| PathBuf::from(repo.rsplit("--").next().unwrap_or(repo)));
    place(&free_name(&[named.as_deref().unwrap_or(&source)])?)
}

/// Refuses a whole cache, of which one model has to be named.
fn refuse_cache(source: &Path) -> Result<()> {
    let names = fs::read_dir(source).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut models: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("models--")).collect();
    models.sort();
    let Some(first) = models.first() else { return Ok(()) };
    bail!(
        "{}: a cache of {} models\nhint: name one of them: `homeroom import {}`",
        source.display(),
        models.len(),
        source.join(first).display()
    )
}

/// How a model lies in its source.
enum Form {
    /// A GGUF file, or the several files of one model.
    Gguf(Vec<PathBuf>),
    /// The files of a directory, see [`files_of`].
    Files,
}

/// Loads a model or an adapter, to see that it can be.
fn check(source: &Path) -> Result<Form> {
    if source.is_file() {
        let weights = source.extension().is_some_and(|extension| extension == "safetensors");
        ensure!(!weights, "{}: a model is the directory that this file lies in; name that", source.display());
        return Ok(match BaseModel::load(source)?.files {
            files if files.len() > 1 => Form::Gguf(files),
            // By the name that it has here.
            _ => Form::Gguf(vec![source.to_owned()]),
        });
    }
    if is_adapter(source) && !is_named(&source.join("config.json"))? {
        AdapterFiles::read(source)?;
        return Ok(Form::Files);
    }
    if encoder_type(source).is_some() {
        EmbeddingModel::load(source)?;
        return Ok(Form::Files);
    }
    let model = BaseModel::load(source)?;
    Ok(if model.path.is_file() { Form::Gguf(model.files) } else { Form::Files })
}

/// The files of an adapter or a model in a directory.
fn files_of(source: &Path) -> Result<Vec<PathBuf>> {
    let adapter = is_adapter(source) && !is_named(&source.join("config.json"))?;
    let own = if adapter { ADAPTER_FILES.to_vec() } else { [&MODEL_FILES[..], &SENTENCE_FILES[..]].concat() };
    let mut names: Vec<PathBuf> = own.iter().chain(&TEXT_FILES).chain([&VOCABULARY_FILE]).map(PathBuf::from).collect();
    if !adapter && has_safetensors(source) {
        names.extend(weight_files(source)?.iter().filter_map(|file| file.file_name()).map(PathBuf::from));
        names.push("model.safetensors.index.json".into());
        names.extend(files_of_modules(source)?);
    }
    // Of a link that leads nowhere the error says so.
    let mut there = Vec::new();
    for name in names {
        if is_named(&source.join(&name))? {
            there.push(name);
        }
    }
    there.extend(named_templates(source)?);
    Ok(there)
}

/// What else lies in the directory.
fn left_out(source: &Path, taken: &Sources) -> Result<Vec<String>> {
    let place = || format!("{}: cannot list", source.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(source).with_context(place)? {
        let name = entry.with_context(place)?.file_name();
        if !taken.holds(Path::new(&name)) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
