//! The user's models: `models/<name>/` below `$HOMEROOM_HOME` or the user's data directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use homeroom_engine::adapter::{CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_manifest};
use homeroom_engine::files::{self, Lock, SMALL_FILE_BYTES_MAX, is_named, read_text};
use homeroom_engine::model::BaseModel;
use homeroom_engine::tensors::map_safetensors;
use serde::Serialize;
use serde_json::Value;

use crate::progress::line;

/// `$HOMEROOM_HOME`, or the user's data directory.
pub fn data_directory() -> Option<PathBuf> {
    match std::env::var_os("HOMEROOM_HOME") {
        Some(home) if !home.is_empty() => Some(PathBuf::from(home)),
        _ => directories::ProjectDirs::from("", "", "homeroom").map(|dirs| dirs.data_dir().to_owned()),
    }
}

/// Where digests of files are kept, see [`homeroom_engine::digest`].
pub fn kept_digests() -> Option<PathBuf> {
    data_directory().map(|data| data.join("digests.json"))
}

/// The lock of the data directory, for who reads a file in it, changes that and writes it back: two processes that do so at once would
/// undo each other's changes. What has its directory or name to itself, as a model has, needs none.
///
/// # Errors
/// When there is no data directory, it cannot be written, others could tamper with it, or another process has the lock for a minute.
pub fn lock() -> Result<Lock> {
    let data = data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    files::prepare(&data, |note| line(note))?;
    Lock::take(&data, &mut |note| line(note))
}

/// Whether a text can name a model: `[a-z0-9][a-z0-9._-]{0,63}`.
pub fn is_name(text: &str) -> bool {
    let body = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    let first = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    first && text.len() <= 64 && text.chars().all(body)
}

/// Where the model of that name is, or will be.
///
/// # Errors
/// When the name is not one, or there is no place for models.
pub fn place(name: &str) -> Result<PathBuf> {
    ensure!(
        is_name(name),
        "`{name}` is not a model's name: up to 64 small letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    );
    let data = data_directory().context("there is no data directory; set HOMEROOM_HOME")?;
    Ok(data.join("models").join(name))
}

/// A name that neither a model has nor anything in the working directory, which would win over it: the first file's, without its extension and in a name's letters, or the next one's if nothing is left of
/// that; with a number behind it if it is taken.
///
/// # Errors
/// When there is no place for models.
pub fn free_name(files: &[&Path]) -> Result<String> {
    let base = files.iter().find_map(|file| named_after(file)).unwrap_or_else(|| "model".to_owned());
    let mut name = base.clone();
    for number in 2.. {
        if !is_there(&place(&name)?) && !is_named(Path::new(&name)).unwrap_or(true) {
            break;
        }
        name = format!("{base}-{number}");
    }
    Ok(name)
}

/// A name in the letters of [`is_name`], with room for a number.
fn named_after(file: &Path) -> Option<String> {
    const LETTERS_MAX: usize = 56;
    let file = file.file_name()?.to_string_lossy().to_lowercase();
    let stem = [".jsonl", ".json", ".txt", ".gguf"].iter().find_map(|ending| file.strip_suffix(ending));
    let mut name = String::new();
    for c in stem.unwrap_or(&file).chars() {
        let plain = c.is_ascii_lowercase() || c.is_ascii_digit();
        match c {
            c if plain || "._".contains(c) && !name.is_empty() => name.push(c),
            _ if !name.is_empty() && !name.ends_with('-') => name.push('-'),
            _ => {}
        }
    }
    name.truncate(LETTERS_MAX);
    let name = name.trim_end_matches(['-', '.', '_']);
    (!name.is_empty()).then(|| name.to_owned())
}

/// The path that a user means: what is there wins, then a model of that name.
pub fn resolve(name: &Path) -> PathBuf {
    files::recover(name);
    let named = name.to_str().filter(|text| is_name(text)).and_then(|text| place(text).ok());
    let named = named.filter(|path| is_there(path));
    if !name.exists() {
        return named.unwrap_or_else(|| name.to_owned());
    }
    if let Some(named) = named {
        note_ambiguous(name, &named);
    }
    name.to_owned()
}

fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Says once what the name of a model means when something in the working directory has it, too.
pub fn note_ambiguous(name: &Path, named: &Path) {
    static SAID: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if name.exists()
        && !same(name, named)
        && SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned())
    {
        let (text, named) = (name.display(), named.display());
        line(format_args!("note: `{text}` means ./{text} here; the model of that name is {named}"));
    }
}

/// What to type for a model: its name if it has one, else its path.
pub fn short(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.filter(|name| place(name).is_ok_and(|place| place == path) && !Path::new(name).exists());
    name.map_or_else(|| path.display().to_string(), str::to_owned)
}

fn is_there(path: &Path) -> bool {
    files::recover(path);
    path.exists()
}

/// A model in the registry.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// `adapter` or `model`.
    pub kind: &'static str,
    /// The strategy that trained it.
    pub strategy: String,
    /// The base it was trained on.
    pub base: PathBuf,
    /// Held-out loss at the end of its training.
    pub eval_loss: Option<f64>,
    /// The model it was trained on from, if it went on from another of the registry.
    pub parent: Option<String>,
    /// What is wrong with it: its files are missing or damaged, or its base is gone. Of weights only the headers are looked at.
    pub problem: Option<String>,
}

/// All models in the registry, by name.
///
/// # Errors
/// When the directory cannot be listed.
pub fn list() -> Result<Vec<Entry>> {
    let Some(models) = data_directory().map(|data| data.join("models")) else { return Ok(Vec::new()) };
    // A process that was killed while it replaced a model may have left it without its name.
    files::recover_all(&models);
    let entries = match std::fs::read_dir(&models) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("{}: cannot list", models.display())),
    };
    let mut found: Vec<Entry> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str().filter(|name| is_name(name))?.to_owned();
            path.is_dir().then(|| read(name, path))
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn read(name: String, path: PathBuf) -> Entry {
    let adapter = is_adapter(&path);
    let files = if adapter { map_safetensors(&path.join(WEIGHTS_FILE)).map(drop) } else { BaseModel::inspect(&path) };
    let mut problem = files.err().map(|error| format!("{error:#}"));
    let mut entry = Entry {
        name,
        kind: if adapter { "adapter" } else { "model" },
        strategy: String::new(),
        base: PathBuf::new(),
        eval_loss: None,
        parent: None,
        problem: None,
        path,
    };
    match read_manifest(&entry.path) {
        Ok(Some(manifest)) => {
            entry.strategy = manifest.strategy.name;
            entry.base = manifest.base.path;
            entry.eval_loss = manifest.training["result"]["eval_loss"].as_f64();
            entry.parent = manifest.training["parent"].as_str().map(str::to_owned);
        }
        Ok(None) => match read_peft(&entry.path) {
            Ok((strategy, base)) => (entry.strategy, entry.base) = (strategy, base),
            Err(error) => problem = problem.or(Some(format!("{error:#}"))),
        },
        Err(error) => problem = problem.or(Some(format!("{error:#}"))),
    }
    let gone = adapter && problem.is_none() && !entry.base.as_os_str().is_empty() && !entry.base.exists();
    let gone = gone.then(|| "its base is not there; `--base-model` names where it is".to_owned());
    Entry { problem: problem.or(gone), ..entry }
}

/// Kind and base of an adapter that another program trained; of a model without `homeroom.json` nothing is known.
fn read_peft(path: &Path) -> Result<(String, PathBuf)> {
    let file = path.join(CONFIG_FILE);
    if !is_named(&file)? {
        return Ok(Default::default());
    }
    let text = read_text(&file, SMALL_FILE_BYTES_MAX)?;
    let config: Value = serde_json::from_str(&text).with_context(|| format!("{CONFIG_FILE}: damaged"))?;
    let text = |key: &str| config[key].as_str().unwrap_or_default().to_owned();
    Ok((text("peft_type").to_lowercase(), text("base_model_name_or_path").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_a_model_a_name_that_is_one() {
        for (file, expected) in [
            ("data/rows.jsonl", "rows"),
            ("Qwen2.5-0.5B", "qwen2.5-0.5b"),
            ("Übungen Klasse 7 (neu).jsonl", "bungen-klasse-7-neu"),
            (".hidden.jsonl", "hidden"),
            ("__a__.json", "a"),
            ("SmolLM2.Q4_1.gguf", "smollm2.q4_1"),
        ] {
            assert_eq!(named_after(Path::new(file)).as_deref(), Some(expected));
        }
        for nothing in ["练习.jsonl", "...", "/"] {
            assert_eq!(named_after(Path::new(nothing)), None, "{nothing}");
        }
        let long = named_after(Path::new(&format!("{}.jsonl", "ab-".repeat(90)))).unwrap();
        assert!(is_name(&format!("{long}-1000000")), "{long}");
    }

    #[test]
    fn a_name_cannot_leave_the_registry() {
        for good in ["algebra-tutor", "a", "0.5b_v2"] {
            assert!(is_name(good), "{good}");
        }
        let long = "a".repeat(65);
        for bad in ["", "..", ".hidden", "-x", "A", "a/b", "a b", "ä", long.as_str()] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
