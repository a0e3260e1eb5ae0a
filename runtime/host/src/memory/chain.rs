//! `chain.jsonl`: what was written, in order, one JSON object a line, each with the SHA-256 of the line before. A line that was changed,
//! taken out or put in shows, as the line behind it says another digest.
//!
//! A line holds no content. It holds the digest of a content that is kept apart, see [`super::contents`], with a salt in it, so that
//! nobody finds out by trying what a content was that has been removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::head::{self, Apart, Head};

use crate::hex::hex;
use crate::private;

/// Name of the file.
pub const FILE: &str = "chain.jsonl";
/// Longest line, in bytes.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// What the first line says of the line before it.
const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The digest of some bytes, in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// From 1, each one more than the last.
    pub number: u64,
    /// When it was written.
    pub time: String,
    /// What it says.
    #[serde(flatten)]
    pub said: Said,
    /// SHA-256 of the line before, without its end.
    pub before: String,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Said {
    /// An answer was given.
    Answer {
        /// Digest of its content.
        content: String,
    },
    /// Something was thought of an answer.
    Feedback {
        /// Digest of its content.
        content: String,
    },
    /// Contents were removed.
    Removed {
        /// Numbers of their lines: the first and the last of each range.
        numbers: Vec<(u64, u64)>,
        /// `person`, `retention` or `room`.
        why: String,
    },
}

impl Said {
    /// The digest of the content that belongs to it.
    pub fn content(&self) -> Option<&str> {
        match self {
            Self::Answer { content } | Self::Feedback { content } => Some(content),
            Self::Removed { .. } => None,
        }
    }
}

/// Numbers as ranges.
pub fn ranges(numbers: &BTreeSet<u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    ranges
}

/// Ranges of numbers that do not overlap.
#[derive(Default)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Whether a number is in one of them.
    pub fn holds(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, last)| number <= *last)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Extend<(u64, u64)> for Ranges {
    fn extend<I: IntoIterator<Item = (u64, u64)>>(&mut self, ranges: I) {
        self.0.extend(ranges);
    }
}

/// The end of the file, as far as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Bytes of whole lines.
    pub bytes: u64,
    /// Number of the last line; 0: there is none.
    pub number: u64,
    /// Its digest.
    pub digest: String,
}

impl Default for Tail {
    fn default() -> Self {
        Self { bytes: 0, number: 0, digest: NOTHING.to_owned() }
    }
}

/// The file of a directory. Whoever uses it holds the lock of the directory.
pub struct Chain {
    directory: PathBuf,
    path: PathBuf,
    tail: Tail,
    /// The head as it is on the disk.
    head: Option<Head>,
    /// What a crash left, that nobody was told of.
    apart: Option<Apart>,
}

impl Chain {
    /// The file of a directory, of which nothing is read yet.
    pub fn new(directory: &Path) -> Self {
        let (directory, path) = (directory.to_owned(), directory.join(FILE));
        Self { directory, path, tail: Tail::default(), head: None, apart: None }
    }

    /// The end, as far as it was read.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Takes what a crash left, of which the reader found out.
    pub fn apart(&mut self) -> Option<Apart> {
        self.apart.take()
    }

    /// Reads the lines that were written since, also by other processes, and gives each to `take`. A last line that was torn by a kill is
    /// left out.
    ///
    /// # Errors
    /// When a line does not fit to the one before it, with its number; the file cannot be read, is gone or became shorter; or it is not
    /// the file whose head is kept, but for one line.
    pub fn catch_up(&mut self, mut take: impl FnMut(&Link)) -> Result<()> {
        let head = Head::read(&self.directory)?;
        let wanted = head.as_ref().map_or(0, |head| head.number);
        let mut there = (self.tail.number == wanted).then(|| self.tail.digest.clone());
        self.read_on(wanted, |link, tail| {
            if tail.number == wanted {
                there = Some(tail.digest.clone());
            }
            take(link);
        })?;
        let last = self.tail.number;
        self.apart = match &head {
            None => (last > 0).then_some(Apart::Missing),
            Some(head) => {
                let hint = self.hint();
                ensure!(
                    last + 1 >= wanted,
                    "{}: it ends with line {last}, and {} says that it went to line {wanted}: lines were cut off\n{hint}",
                    self.path.display(),
                    head::FILE
                );
                ensure!(
                    there.is_none_or(|there| there == head.digest),
                    "{}: line {wanted} is another than {} says: the log was written anew\n{hint}",
                    self.path.display(),
                    head::FILE
                );
                match last.checked_sub(wanted) {
                    None => Some(Apart::Ahead),
                    Some(0) => None,
                    Some(lines) => Some(Apart::Behind(lines)),
                }
            }
        };
        self.head = head;
        Ok(())
    }

    /// What can be done where lines are missing.
    pub fn hint(&self) -> String {
        format!(
            "hint: nothing was removed; put {FILE} back from a copy, or move {} elsewhere and begin anew",
            self.directory.display()
        )
    }

    /// Keeps the head of what is in the chain, if it is another: the lines are on the disk before it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_head(&mut self) -> Result<()> {
        let head = Head { number: self.tail.number, digest: self.tail.digest.clone() };
        if self.head.as_ref() == Some(&head) || (self.head.is_none() && head.number == 0) {
            return Ok(());
        }
        if head.number > 0 {
            private(&self.path)?.sync_data().with_context(|| format!("{}: cannot write", self.path.display()))?;
        }
        head.write(&self.directory)?;
        self.head = Some(head);
        Ok(())
    }

    /// Reads on behind the tail. `wanted`: so many lines were there once.
    fn read_on(&mut self, wanted: u64, mut take: impl FnMut(&Link, &Tail)) -> Result<()> {
        let place = || self.path.display().to_string();
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                ensure!(self.tail.number == 0 && wanted == 0, "{}: it is gone\n{}", place(), self.hint());
                return Ok(());
            }
            Err(error) => return Err(error).with_context(|| format!("{}: cannot read", place())),
        };
        let length = file.metadata().with_context(place)?.len();
        ensure!(length >= self.tail.bytes, "{}: it has become shorter: lines were taken out", place());
        if length == self.tail.bytes {
            return Ok(());
        }
        file.seek(SeekFrom::Start(self.tail.bytes)).with_context(place)?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).with_context(place)?;
            if line.pop() != Some(b'\n') {
                ensure!((read as u64) < LINE_BYTES_MAX, "{}: line {} is too long", place(), self.tail.number + 1);
                return Ok(());
            }
            let number = self.tail.number + 1;
            let link: Link = serde_json::from_slice(&line)
                .with_context(|| format!("{}: line {number} is none of this log", place()))?;
            if link.number != number {
                bail!(
                    "{}: line {number} says that it is line {}: lines were taken out or put in",
                    place(),
                    link.number
                );
            }
            if link.before != self.tail.digest {
                bail!(
                    "{}: line {number} was written behind another line than {}: one of them was changed",
                    place(),
                    number - 1
                );
            }
            self.tail = Tail { bytes: self.tail.bytes + read as u64, number, digest: digest(&line) };
            take(&link, &self.tail);
        }
    }

    /// Writes a line behind the last, which was read.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn append(&mut self, time: String, said: Said) -> Result<u64> {
        let link = Link { number: self.tail.number + 1, time, said, before: self.tail.digest.clone() };
        let mut line = serde_json::to_vec(&link)?;
        let digest = digest(&line);
        line.push(b'\n');
        let mut file = private(&self.path)?;
        let mut written = || -> std::io::Result<()> {
            // What was torn is written over.
            file.set_len(self.tail.bytes)?;
            file.seek(SeekFrom::Start(self.tail.bytes))?;
            file.write_all(&line)?;
            // What is removed goes after this. An answer that a failing machine forgets is an answer less.
            if matches!(link.said, Said::Removed { .. }) { file.sync_data() } else { Ok(()) }
        };
        written().with_context(|| format!("{}: cannot write", self.path.display()))?;
        self.tail = Tail { bytes: self.tail.bytes + line.len() as u64, number: link.number, digest };
        Ok(link.number)
    }
}

/// Opens a file for its owner alone, which is made if it is not there.
///
/// # Errors
/// When it cannot be written.
pub fn private(path: &Path) -> Result<File> {
    let mut options = private::plain_options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).with_context(|| format!("{}: cannot write", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        Said::Answer { content: digest(text.as_bytes()) }
    }

    fn read(directory: &Path) -> Result<Vec<u64>> {
        let (mut chain, mut seen) = (Chain::new(directory), Vec::new());
        chain.catch_up(|link| seen.push(link.number))?;
        Ok(seen)
    }

    #[test]
    fn two_writers_write_one_chain() -> Result<()> {
        let place = tempfile::tempdir()?;
        let (mut one, mut other) = (Chain::new(place.path()), Chain::new(place.path()));
        one.append("t".into(), said("a"))?;
        let mut seen = 0;
        other.catch_up(|_| seen += 1)?;
        other.append("t".into(), Said::Removed { numbers: vec![(1, 1)], why: "person".into() })?;
        one.catch_up(|_| seen += 1)?;
        assert_eq!((seen, one.append("t".into(), said("b"))?), (2, 3));
        assert_eq!(read(place.path())?, [1, 2, 3]);
        let numbers = [1, 2, 3, 5, 7, 8].into();
        assert_eq!(ranges(&numbers), [(1, 3), (5, 5), (7, 8)]);
        let mut found = Ranges::default();
        found.extend(ranges(&numbers));
        assert_eq!((0..10).filter(|number| found.holds(*number)).collect::<BTreeSet<_>>(), numbers);
        Ok(())
    }

    #[test]
    fn a_line_that_was_changed_taken_out_or_put_in_shows() -> Result<()> {
        let place = tempfile::tempdir()?;
        let mut chain = Chain::new(place.path());
        for text in ["a", "b", "c", "d"] {
            chain.append("t".into(), said(text))?;
        }
        let path = place.path().join(FILE);
        let whole = std::fs::read_to_string(&path)?;
        let lines: Vec<&str> = whole.lines().collect();
        let with = |lines: &[&str]| -> Result<String> {
            std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>())?;
            Ok(read(place.path()).err().map(|error| format!("{error:#}")).unwrap_or_default())
        };
        assert_eq!(with(&lines)?, "");
        let changed = lines[1].replace("\"time\":\"t\"", "\"time\":\"u\"");
        assert!(
            with(&[lines[0], &changed, lines[2], lines[3]])?.contains("line 3 was written behind another line than 2")
        );
        assert!(with(&[lines[0], lines[2], lines[3]])?.contains("line 2 says that it is line 3"));
        assert!(with(&[lines[0], lines[0], lines[1]])?.contains("line 2 says that it is line 1"));
        assert!(with(&["{}"])?.contains("line 1 is none of this log"));
        // What is cut off at the end shows to whoever has read further.
        std::fs::write(&path, &whole[..whole.len() - 10])?;
        assert_eq!(read(place.path())?, [1, 2, 3], "a torn line");
        assert!(chain.catch_up(|_| {}).is_err_and(|error| error.to_string().contains("has become shorter")));
        // A torn line is written over.
        let mut again = Chain::new(place.path());
        again.catch_up(|_| {})?;
        again.append("t".into(), said("e"))?;
        assert_eq!(read(place.path())?, [1, 2, 3, 4]);
        Ok(())
    }
}
