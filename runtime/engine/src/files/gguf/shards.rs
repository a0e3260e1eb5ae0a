//! A model in several files, as llama.cpp's `llama-gguf-split` writes it: `NAME-00001-of-00003.gguf` and so on.
//!
//! The first file holds all metadata. Each holds some of the tensors, and says which of the files it is (`split.no`, from 0), of how
//! many (`split.count`), and how many tensors all of them have together (`split.tensors.count`).
//!
//! Source: `tools/gguf-split/gguf-split.cpp` and `src/llama-model-loader.cpp` of <https://github.com/ggml-org/llama.cpp>.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::File;
use super::header::Contents;

/// Which file of its model it is, from 0.
const NUMBER: &str = "split.no";
/// How many files the model has.
const COUNT: &str = "split.count";
/// How many tensors the model has.
const TENSORS: &str = "split.tensors.count";

/// Most names of missing files that a message lists.
const MISSING_TOLD: usize = 5;

/// What the name of a file says that is one of several: `NAME-00001-of-00003.gguf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardName<'a> {
    /// What the names of all of them begin with. A path before it counts.
    pub before: &'a str,
    /// Which one it is, from 1.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// `.gguf`, as it is written here.
    ending: &'a str,
}

impl<'a> ShardName<'a> {
    /// Reads a file's name or path; `None`: it is no name of one of several files.
    pub fn of(name: &'a str) -> Option<Self> {
        let at = name.len().checked_sub(".gguf".len())?;
        let (stem, ending) = name.is_char_boundary(at).then(|| name.split_at(at))?;
        let (front, count) = stem.rsplit_once("-of-")?;
        let (before, number) = front.rsplit_once('-')?;
        let digits = |text: &str| {
            let plain = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| text.parse().ok()).flatten()
        };
        let (number, count) = (digits(number)?, digits(count)?);
        let is_one = ending.eq_ignore_ascii_case(".gguf") && (1..=count).contains(&number);
        is_one.then_some(Self { before, number, count, ending })
    }

    /// Whether two are files of one model, as far as names say it.
    pub fn is_beside(&self, other: &Self) -> bool {
        (self.before, self.count) == (other.before, other.count)
    }

    /// The names of all of them, in order.
    pub fn all(self) -> impl Iterator<Item = String> {
        (1..=self.count).map(move |number| format!("{}-{number:05}-of-{:05}{}", self.before, self.count, self.ending))
    }
}

/// The paths of all files of the model that a file is of, as its name says, whether or not they are there: the file's own, unless it
/// is one of several.
pub fn shard_paths(path: &Path) -> Vec<PathBuf> {
    match ShardName::of(file_name(path)) {
        Some(shard) => shard.all().map(|name| path.with_file_name(name)).collect(),
        None => vec![path.to_owned()],
    }
}

/// Of how many files the model is one of whose files this is the header.
pub(super) fn count(contents: &Contents) -> Result<u64> {
    Ok(number(contents, COUNT)?.unwrap_or(1))
}

fn number(contents: &Contents, key: &str) -> Result<Option<u64>> {
    let Some(value) = contents.metadata.get(key) else { return Ok(None) };
    let number = value.as_u64();
    number.map(Some).with_context(|| format!("{key}: is {}, expected an integer of at least 0", value.describe()))
}

fn said(contents: &Contents, key: &str) -> Result<u64> {
    number(contents, key)?.with_context(|| format!("{key}: is missing, and this is one file of several"))
}

/// Opens all files of a model, one of which is open. Returns them in order, and what they say together.
pub(super) fn open(one: File, contents: Contents) -> Result<(Vec<File>, Contents)> {
    let place = one.path.display().to_string();
    let (names, number) = names(&one.path, &contents).with_context(|| place.clone())?;
    let missing: Vec<&PathBuf> = names.iter().filter(|path| !path.exists()).collect();
    if !missing.is_empty() {
        let told = missing.iter().take(MISSING_TOLD);
        let mut told: Vec<String> = told.map(|path| file_name(path).to_owned()).collect();
        if missing.len() > MISSING_TOLD {
            told.push(format!("{} more", missing.len() - MISSING_TOLD));
        }
        bail!(
            "{place}: {} of the {} files of this model are not there: {}; download or copy them to where this one is",
            missing.len(),
            names.len(),
            told.join(", ")
        );
    }
    let mut headers = Vec::with_capacity(names.len());
    let mut open = Some((one, contents));
    for (index, path) in names.iter().enumerate() {
        // The one that is open has the name that it was opened by.
        headers.push(match open.take_if(|_| index == number) {
            Some(open) => open,
            None => File::open(path)?,
        });
    }
    join(headers)
}

/// The paths of all files, and which of them `path` is, from 0.
fn names(path: &Path, contents: &Contents) -> Result<(Vec<PathBuf>, usize)> {
    let (number, count) = (said(contents, NUMBER)?, said(contents, COUNT)?);
    let name = file_name(path);
    let shard = ShardName::of(name).filter(|shard| (shard.number as u64, shard.count as u64) == (number + 1, count));
    let Some(shard) = shard else {
        bail!(
            "is file {} of {count} of a model, and its name does not end in -{:05}-of-{count:05}.gguf, so that the others cannot \
             be found; give all of them the names that they had",
            number + 1,
            number + 1,
        );
    };
    Ok((shard_paths(path), shard.number - 1))
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Puts together what all files say.
fn join(headers: Vec<(File, Contents)>) -> Result<(Vec<File>, Contents)> {
    let total = headers.len();
    let mut files: Vec<File> = Vec::with_capacity(total);
    let mut whole = Contents { metadata: HashMap::new(), tensors: Vec::new(), tensor_idx: HashMap::new() };
    let mut wanted = 0;
    for (index, (file, mut contents)) in headers.into_iter().enumerate() {
        let place = || file.path.display().to_string();
        let (number, count) = (said(&contents, NUMBER), said(&contents, COUNT));
        let (number, count) = (number.with_context(place)?, count.with_context(place)?);
        ensure!(count == total as u64, "{}: {COUNT}: is {count}, and the model has {total} files by its name", place());
        ensure!(
            number == index as u64,
            "{}: {NUMBER}: is {number}, expected {index} by its name; files of this model have changed their names, fetch them again",
            place()
        );
        let tensors = said(&contents, TENSORS).with_context(place)?;
        match index {
            0 => (wanted, whole.metadata) = (tensors, std::mem::take(&mut contents.metadata)),
            _ => ensure!(
                tensors == wanted,
                "{}: {TENSORS}: is {tensors}, and {wanted} in {}: they are files of different models",
                place(),
                files[0].path.display()
            ),
        }
        for mut tensor in contents.tensors {
            tensor.file = index;
            let name = tensor.name.clone();
            if let Some(first) = whole.tensor_idx.insert(name.clone(), whole.tensors.len()) {
                let first =
                    files.get(whole.tensors[first].file).map_or_else(place, |file| file.path.display().to_string());
                bail!("{}: tensor {name}: is in {first} already", place());
            }
            whole.tensors.push(tensor);
        }
        files.push(file);
    }
    let found = whole.tensors.len();
    ensure!(
        found as u64 == wanted,
        "{}: {TENSORS}: is {wanted}, and the {total} files have {found} tensors; they are damaged or of different models, fetch them \
         again",
        files[0].path.display()
    );
    Ok((files, whole))
}
