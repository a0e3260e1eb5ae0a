//! What a user names as rows: files, a folder of them, or `-`, the standard input.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use tempfile::NamedTempFile;

use crate::files::{nameless, open_regular};

/// One file of rows.
#[derive(Clone, Debug)]
pub struct Source {
    /// What messages call it.
    pub name: PathBuf,
    /// Where its bytes are, if not under its name: what came in once is kept, so that it can be read again. The file has no name, so that
    /// nothing is left of it whatever ends the program.
    kept: Option<Arc<File>>,
}

impl Source {
    /// A file.
    pub fn file(name: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), kept: None }
    }

    /// The standard input, all of it, kept in a temporary file while this is.
    ///
    /// # Errors
    /// When it is a terminal, cannot be read, or there is no room for it.
    pub fn standard_input() -> Result<Self> {
        let input = io::stdin();
        ensure!(
            !input.is_terminal(),
            "-: rows are read from the standard input, and that is the terminal\nhint: pipe them in, as in `… | homeroom fine-tune --training-file -`"
        );
        Self::keep(input.lock())
    }

    /// Rows that can be read once.
    ///
    /// # Errors
    /// When they cannot be read, or there is no room for them.
    pub fn keep(mut input: impl Read) -> Result<Self> {
        let mut file = nameless().context("the standard input cannot be kept")?;
        io::copy(&mut input, &mut file).context("the standard input cannot be kept")?;
        Ok(Self { name: PathBuf::from(STANDARD_INPUT), kept: Some(Arc::new(file)) })
    }

    /// Writes what came in to a file of its own, for its owner alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let write = || -> Result<()> {
            let mut file = NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
            io::copy(&mut self.open()?, &mut file)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().with_context(|| format!("{}: cannot write", path.display()))
    }

    /// Whether it is what came in.
    pub fn is_standard_input(&self) -> bool {
        self.kept.is_some()
    }

    /// Opens it. What came in is read by one reader at a time: they share its place.
    ///
    /// # Errors
    /// When it cannot be opened, or is no regular file.
    pub fn open(&self) -> Result<File> {
        let Some(kept) = &self.kept else { return open_regular(&self.name) };
        let again = || -> io::Result<File> {
            let mut file = kept.try_clone()?;
            file.rewind()?;
            Ok(file)
        };
        again().context("the rows of the standard input are gone")
    }
}

/// What the standard input is called.
const STANDARD_INPUT: &str = "standard input";

/// Files of rows, in the order in which they were named.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Those to learn from, or to measure on.
    pub files: Vec<Source>,
    /// Held-out ones of a folder that has such.
    pub held_out: Vec<Source>,
    /// What of a folder is not read, and why, in words.
    pub notes: Vec<String>,
}

/// What a file of a folder is for, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Train,
    Validation,
    Test,
}

/// Names of parts, as on the Hugging Face hub and in mlx-lm.
const PARTS: [(&str, Part); 9] = [
    ("train", Part::Train),
    ("training", Part::Train),
    ("validation", Part::Validation),
    ("valid", Part::Validation),
    ("val", Part::Validation),
    ("dev", Part::Validation),
    ("eval", Part::Validation),
    ("test", Part::Test),
    ("testing", Part::Test),
];

/// Endings of files of rows.
const ENDINGS: [&str; 6] = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab"];
/// Most files of a folder.
const FILES_MAX: usize = 10_000;

impl Sources {
    /// What some paths lead to. Of a folder those are the files of its part to learn from, and its held-out ones; or all its files.
    /// `-` is the standard input, as `input` gives it.
    ///
    /// # Errors
    /// When a folder cannot be read or has no rows, or a file is named twice.
    pub fn of(paths: &[PathBuf], input: impl FnOnce() -> Result<Source>) -> Result<Self> {
        let mut sources = Self::default();
        let mut input = Some(input);
        for path in paths {
            if path.as_os_str() == "-" {
                let Some(input) = input.take() else { bail!("-: the standard input is named twice") };
                sources.files.push(input()?);
            } else if path.is_dir() {
                sources.add_folder(path)?;
            } else {
                sources.files.push(Source::file(path));
            }
        }
        let mut names = HashSet::new();
        for source in sources.files.iter().chain(&sources.held_out) {
            ensure!(names.insert(&source.name), "{}: named twice", source.name.display());
        }
        Ok(sources)
    }

    /// One file.
    pub fn file(path: &Path) -> Self {
        Self { files: vec![Source::file(path)], ..Self::default() }
    }

    fn add_folder(&mut self, folder: &Path) -> Result<()> {
        let mut found = Vec::new();
        list(folder, None, 0, &mut found)?;
        found.sort();
        let shown = folder.display();
        if found.iter().all(|(part, _)| part.is_none()) || !found.iter().any(|(part, _)| *part == Some(Part::Train)) {
            ensure!(!found.is_empty(), "{shown}: no rows in this folder{}", others(folder));
            let parts = found.iter().any(|(part, _)| part.is_some());
            ensure!(
                !parts,
                "{shown}: it has held-out rows, {}, and none to learn from\nhint: name the file to learn from train.jsonl or train.csv",
                found
                    .iter()
                    .find(|(part, _)| part.is_some())
                    .map(|(_, path)| path.display().to_string())
                    .unwrap_or_default()
            );
            self.files.extend(found.into_iter().map(|(_, path)| Source::file(path)));
            return Ok(());
        }
        let has_validation = found.iter().any(|(part, _)| *part == Some(Part::Validation));
        let mut unread = Vec::new();
        for (part, path) in found {
            match part {
                Some(Part::Train) => self.files.push(Source::file(path)),
                Some(Part::Validation) => self.held_out.push(Source::file(path)),
                Some(Part::Test) if !has_validation => self.held_out.push(Source::file(path)),
                _ => unread.push(path.strip_prefix(folder).unwrap_or(&path).display().to_string()),
            }
        }
        if !unread.is_empty() {
            self.notes.push(format!("{shown}: not read: {}", unread.join(", ")));
        }
        Ok(())
    }
}

/// The files of rows in a folder, and in the folders of its parts, each with its part.
fn list(folder: &Path, of: Option<Part>, depth: usize, found: &mut Vec<(Option<Part>, PathBuf)>) -> Result<()> {
    let cannot = || format!("{}: cannot read this folder", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if name.starts_with('.')
            || name == "dataset_info.json"
            || name == "dataset_dict.json"
            || name == "dataset_infos.json"
        {
            continue;
        }
        let part = part_of(&name).or(of);
        if path.is_dir() {
            // As `data/train-00000-of-00001.jsonl` and `train/rows.csv`.
            if depth < 2 && (part.is_some() || name == "data") {
                list(&path, part, depth + 1, found)?;
            }
        } else if ENDINGS.iter().any(|ending| name.strip_suffix(".gz").unwrap_or(&name).ends_with(ending)) {
            found.push((part, path));
            ensure!(found.len() <= FILES_MAX, "{}: more than {FILES_MAX} files of rows", folder.display());
        }
    }
    Ok(())
}

/// The part that a name begins or ends with, as a word.
fn part_of(name: &str) -> Option<Part> {
    let stem = name.split('.').next().unwrap_or(name);
    let words: Vec<&str> = stem.split(['-', '_', ' ']).collect();
    let first = words.first().and_then(|word| PARTS.iter().find(|(name, _)| name == word));
    let last = words.last().and_then(|word| PARTS.iter().find(|(name, _)| name == word));
    first.or(last).map(|(_, part)| *part)
}

/// What lies in a folder without rows, in words.
fn others(folder: &Path) -> String {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().to_lowercase()).collect();
    let has = |ending: &str| names.iter().find(|name| name.ends_with(ending));
    let or_in_data = || {
        let inner = fs::read_dir(folder.join("data")).into_iter().flatten().flatten();
        inner.map(|entry| entry.file_name().to_string_lossy().to_lowercase()).find(|name| name.ends_with(".parquet"))
    };
    if has(".parquet").is_some() || or_in_data().is_some() {
        let shown = folder.display();
        return format!(
            ", only Parquet files\nhint: Python converts them: `datasets.load_dataset('{shown}')['train'].to_json('rows.jsonl')`"
        );
    }
    if has(".arrow").is_some() || names.iter().any(|name| name == "dataset_dict.json") {
        let shown = folder.display();
        return format!(
            ", which `datasets` has saved as Arrow files\nhint: Python converts them: `datasets.load_from_disk('{shown}')['train'].to_json('train.jsonl')`"
        );
    }
    match names.iter().find(|name| [".xlsx", ".ods", ".xls"].iter().any(|ending| name.ends_with(ending))) {
        Some(book) => format!("\nhint: open {book} in a spreadsheet program and save its sheet as CSV in UTF-8"),
        None => format!("; files of rows end with {}", ENDINGS.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        folder
    }

    /// What of a folder is learned, held out and left.
    fn told(files: &[&str]) -> String {
        let folder = folder(files);
        let none = || bail!("no input");
        let names = |sources: &[Source]| {
            let names =
                sources.iter().map(|source| source.name.strip_prefix(folder.path()).unwrap().display().to_string());
            names.collect::<Vec<_>>().join(" ")
        };
        match Sources::of(&[folder.path().to_owned()], none) {
            Ok(sources) => {
                let notes = sources.notes.join("").replace(&folder.path().display().to_string(), "D");
                format!("{} | {} | {notes}", names(&sources.files), names(&sources.held_out))
            }
            Err(error) => format!("{error:#}").replace(&folder.path().display().to_string(), "D"),
        }
    }

    #[test]
    fn the_parts_of_a_folder_are_told_by_their_names() {
        for (files, expected) in [
            (
                &["train.jsonl", "valid.jsonl", "test.jsonl", "README.md"][..],
                "train.jsonl | valid.jsonl | D: not read: test.jsonl",
            ),
            (&["train.csv", "test.csv.gz"], "train.csv | test.csv.gz | "),
            (
                &[
                    "data/train-00001-of-00002.jsonl",
                    "data/train-00000-of-00002.jsonl",
                    "data/validation-00000-of-00001.jsonl",
                ],
                "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl | data/validation-00000-of-00001.jsonl | ",
            ),
            (
                &["train/b.json", "train/a.json", "dev/c.json", ".git/train.json"],
                "train/a.json train/b.json | dev/c.json | ",
            ),
            (&["b.jsonl", "a.tsv", "notes.txt", "dataset_info.json"], "a.tsv b.jsonl |  | "),
            (&["geo_train.csv", "geo_dev.csv"], "geo_train.csv | geo_dev.csv | "),
            (&["training-set.csv", "extra.csv"], "training-set.csv |  | D: not read: extra.csv"),
        ] {
            assert_eq!(told(files), expected, "{files:?}");
        }
    }

    #[test]
    fn a_folder_without_rows_says_what_it_has() {
        for (files, expected) in [
            (&[][..], "D: no rows in this folder; files of rows end with .jsonl"),
            (&["data/train-0.parquet"], "D: no rows in this folder, only Parquet files\nhint: Python"),
            (
                &["train/data.arrow", "dataset_dict.json"],
                "D: no rows in this folder, which `datasets` has saved as Arrow",
            ),
            (&["geo.xlsx"], "D: no rows in this folder\nhint: open geo.xlsx in a spreadsheet"),
            (&["valid.csv"], "D: it has held-out rows, D/valid.csv, and none to learn from"),
        ] {
            assert!(told(files).starts_with(expected), "{files:?}: {}", told(files));
        }
    }

    #[test]
    fn what_comes_in_is_kept_and_can_be_read_again() {
        let once = || Source::keep(&b"a\nb"[..]);
        let sources = Sources::of(&["x".into(), "-".into()], once).unwrap();
        let [file, input] = &sources.files[..] else { panic!("{sources:?}") };
        assert!(!file.is_standard_input() && input.is_standard_input());
        for _ in 0..2 {
            let mut text = String::new();
            input.open().unwrap().read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), input.name.to_str()), ("a\nb", Some("standard input")));
        }
        assert_eq!(
            Sources::of(&["-".into(), "-".into()], once).unwrap_err().to_string(),
            "-: the standard input is named twice"
        );
        assert_eq!(Sources::of(&["x".into(), "x".into()], once).unwrap_err().to_string(), "x: named twice");
    }
}
