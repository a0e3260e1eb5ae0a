//! Names of models and their places, and what a user means by either.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use homeroom_engine::files::gguf::ShardName;
use homeroom_engine::files::{self, is_named};

use super::data_directory;
use crate::progress::line;
use crate::terminal::cell;

/// Whether a text can name a model: `[a-z0-9][a-z0-9._-]{0,63}`.
pub fn is_name(text: &str) -> bool {
    let body = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    let first = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    first && text.len() <= 64 && text.chars().all(body)
}

/// As much of what was typed for a name as a message has room for, in one line.
pub fn brief(text: &str) -> String {
    const CHARS_MAX: usize = 100;
    let cut = text.char_indices().nth(CHARS_MAX).map(|(at, _)| &text[..at]);
    cell(&cut.map_or_else(|| text.to_owned(), |cut| format!("{cut}…")))
}

/// Where the model of that name is, or will be.
///
/// # Errors
/// When the name is not one, or there is no place for models.
pub fn place(name: &str) -> Result<PathBuf> {
    ensure!(
        is_name(name),
        "`{}` is not a model's name: up to 64 small letters, digits, dots, dashes and underscores, beginning with a letter or digit",
        brief(name)
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
    let shard = ShardName::of(&file).map(|shard| shard.before);
    let file = file.strip_suffix(".gz").unwrap_or(&file);
    let endings = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".txt", ".gguf"];
    let stem = || endings.iter().find_map(|ending| file.strip_suffix(ending));
    let mut name = String::new();
    for c in shard.or_else(stem).unwrap_or(file).chars() {
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

/// The name of the model of the registry that a path leads to, or lies in.
pub fn owner(path: &Path) -> Option<String> {
    let models = data_directory()?.join("models");
    let first = |path: &Path, models: &Path| {
        let name = path.strip_prefix(models).ok()?.components().next()?.as_os_str().to_str()?;
        is_name(name).then(|| name.to_owned())
    };
    // Where the home is reached by a link, what was written down is the place that the link leads to.
    first(path, &models).or_else(|| first(path, &models.canonicalize().ok()?))
}

fn is_there(path: &Path) -> bool {
    files::recover(path);
    path.exists()
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
            ("SmolLM2-Q4_1-00002-of-00003.gguf", "smollm2-q4_1"),
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
