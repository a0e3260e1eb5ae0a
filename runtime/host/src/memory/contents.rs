//! What the lines of the chain are about: conversations, and what was thought of them, by day in `contents/YYYY-MM-DD.jsonl`. Here
//! contents can be removed, which leaves the chain whole.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::files::{make_directory, replace_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chain::private;
use super::person::Person;

/// Longest content, in bytes: of a longer conversation it is kept that it was.
pub const CONTENT_BYTES_MAX: usize = 1 << 20;
/// Longest line: escapes may make it longer than its content.
const LINE_BYTES_MAX: u64 = 8 << 20;

/// A content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Content {
    /// Number of its line in the chain.
    pub number: u64,
    /// What nobody can guess, so that its digest says nothing of it.
    pub salt: String,
    /// When it was written.
    pub time: String,
    /// Whose it is.
    #[serde(flatten)]
    pub person: Person,
    /// What it is.
    #[serde(flatten)]
    pub about: About,
}

/// What a content is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum About {
    /// A conversation with its answer.
    Answer {
        /// The answer's id, as the client was told.
        id: String,
        /// The id that the handler gave it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        provider_id: Option<String>,
        /// The model, as the client named it.
        model: String,
        /// The handler that answered.
        handler: String,
        /// The conversation before the answer, as it was sent; null where it is too long to be kept.
        messages: Value,
        /// The answer.
        answer: String,
    },
    /// What was thought of an answer.
    Feedback {
        /// The answer's id.
        response_id: String,
        /// The number of its line in the chain, if it is kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        answer_number: Option<u64>,
        /// 1: it is good, -1: it is not.
        rating: Option<i8>,
        /// A better answer.
        correction: Option<String>,
        /// Words about it.
        comment: Option<String>,
    },
}

/// The contents of a directory. Whoever changes them holds the lock of the directory.
pub struct Contents {
    directory: PathBuf,
}

impl Contents {
    /// Those of a directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.join("contents") }
    }

    /// The days that have contents, the oldest first.
    pub fn days(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let form = |day: &str| {
            let fits = |(at, byte): (usize, u8)| if at == 4 || at == 7 { byte == b'-' } else { byte.is_ascii_digit() };
            day.len() == 10 && day.bytes().enumerate().all(fits)
        };
        let mut days: Vec<String> =
            names.filter_map(|name| Some(name.strip_suffix(".jsonl")?.to_owned())).filter(|day| form(day)).collect();
        days.sort();
        days
    }

    fn path(&self, day: &str) -> PathBuf {
        self.directory.join(format!("{day}.jsonl"))
    }

    /// Bytes of a day.
    pub fn bytes(&self, day: &str) -> u64 {
        fs::metadata(self.path(day)).map_or(0, |about| about.len())
    }

    /// Writes a line behind those of its day; returns how many bytes were there before.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn append(&self, day: &str, line: &[u8]) -> Result<u64> {
        make_directory(&self.directory)?;
        let path = self.path(day);
        let mut file = private(&path)?;
        let written = (|| -> std::io::Result<u64> {
            let mut end = file.seek(SeekFrom::End(0))?;
            // A line that a kill tore has no line in the chain.
            let mut last = [b'\n'];
            if end > 0 {
                file.seek(SeekFrom::Start(end - 1))?;
                file.read_exact(&mut last)?;
            }
            if last != *b"\n" {
                end = file.write(b"\n").map(|_| end + 1)?;
            }
            // A line of the chain, which comes next, has a content on the disk.
            let written = file.write_all(line).and_then(|()| file.write_all(b"\n")).and_then(|()| file.sync_data());
            if written.is_err() {
                let _ = file.set_len(end);
            }
            written.map(|()| end)
        })();
        written.with_context(|| format!("{}: cannot write", path.display()))
    }

    /// Takes back what was written behind so many bytes of a day.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn cut(&self, day: &str, bytes: u64) -> Result<()> {
        let path = self.path(day);
        private(&path)?.set_len(bytes).with_context(|| format!("{}: cannot write", path.display()))
    }

    /// Gives each line of a day to `take`, without its end, and the content that it is; `None`: it is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self, day: &str, mut take: impl FnMut(&[u8], Option<Content>)) -> Result<()> {
        let path = self.path(day);
        let place = || format!("{}: cannot read", path.display());
        let mut reader = BufReader::new(File::open(&path).with_context(place)?);
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).with_context(place)? == 0 {
                return Ok(());
            }
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            if !line.is_empty() {
                take(&line, serde_json::from_slice(&line).ok());
            }
        }
    }

    /// Gives each content to `take`, in order, and the day that it is of.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn all(&self, mut take: impl FnMut(&str, Content)) -> Result<()> {
        for day in self.days() {
            self.read(&day, |_, content| content.into_iter().for_each(|content| take(&day, content)))?;
        }
        Ok(())
    }

    /// Removes lines: those that `goes` is true of, with the content that each is, if it is one.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn remove(&self, goes: impl Fn(&[u8], Option<&Content>) -> bool) -> Result<()> {
        for day in self.days() {
            let (mut stays, mut changed) = (Vec::new(), false);
            self.read(&day, |line, content| {
                if goes(line, content.as_ref()) {
                    changed = true;
                } else {
                    stays.extend_from_slice(line);
                    stays.push(b'\n');
                }
            })?;
            let path = self.path(&day);
            if stays.is_empty() {
                fs::remove_file(&path).with_context(|| format!("{}: cannot remove", path.display()))?;
            } else if changed {
                replace_file(&path, &stays)?;
            }
        }
        Ok(())
    }

    /// The numbers of a day.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn numbers(&self, day: &str) -> Result<BTreeSet<u64>> {
        let mut numbers = BTreeSet::new();
        self.read(day, |_, content| numbers.extend(content.map(|content| content.number)))?;
        Ok(numbers)
    }
}
