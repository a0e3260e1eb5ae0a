//! The examples of files.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use super::check::of_all;
use super::encode::Encoder;
use super::example::Example;
use super::group::Group;
use super::order;
use super::ordered::in_order;
use super::problem::{Problem, Problems, TOO_LONG, thousands};
use super::read::{OnBadRow, Reading, Recognised, Source, read_rows};
use super::row::{Row, RowFormat, RowKind};
use super::tokens::Keeper;

/// The examples of files, or their groups.
#[derive(Clone, Debug)]
pub struct Dataset<T = Example> {
    /// In the order of the files, and in each in its order. Lines are counted over all files, see [`Self::place`].
    pub examples: Vec<T>,
    /// `sha256:` and the digest of the rows: the text of each with our own keys, and a line break behind it. That of a plain JSONL file is the
    /// digest of its bytes.
    pub digest: String,
    /// The shape of the rows; of several files that of the first.
    pub format: RowFormat,
    /// The files.
    pub files: Vec<FileOfRows>,
    /// What is said of rows that were left out because they were refused.
    pub left_out: Vec<String>,
    /// Rows left out because they were too long.
    pub skipped: usize,
    /// Examples cut because they were too long.
    pub truncated: usize,
    /// Examples that end without an end token, those of rows that were cut aside.
    pub endless: usize,
}

/// A file of a dataset.
#[derive(Clone, Debug)]
pub struct FileOfRows {
    /// What messages call it.
    pub name: PathBuf,
    /// What it was found to be.
    pub recognised: Recognised,
    /// Lines of the files before it.
    before: usize,
}

/// Reads files and encodes their rows.
///
/// # Errors
/// When a file cannot be read, holds no rows, or any row is refused: one message tells all problems by line.
#[cfg(test)]
pub(super) fn load_examples(sources: &[Source], reading: &Reading, encoder: Encoder) -> Result<Dataset> {
    load_examples_keeping(sources, reading, encoder, Keeper::default())
}

#[cfg(test)]
pub(super) fn load_examples_keeping(
    sources: &[Source],
    reading: &Reading,
    encoder: Encoder,
    keeper: Keeper,
) -> Result<Dataset> {
    let examples = |line, row: &Row| encoder.examples(line, row);
    load(sources, reading, &encoder, RowKind::Demonstration, examples, keeper)
}

/// Reads files and encodes their rows, by all threads, as what `objective`, which learns from rows of one kind, weighs together. The name
/// of another thing, which measures such rows, is for messages. `mark` says what is trained of a row, where that is another part than its
/// answers. Tokens of large files are spilled.
///
/// # Errors
/// When a file cannot be read, holds no rows, or any row is refused or of another kind: one message tells all problems by line. When
/// there is no room for the tokens.
pub fn load_groups(
    sources: &[Source],
    reading: &Reading,
    encoder: Encoder,
    kind: RowKind,
    objective: &str,
    mark: impl Fn(&mut [Group]) + Sync,
) -> Result<Dataset<Group>> {
    let groups = |line, row: &Row| {
        let mut made = kind.check(row.kind(), objective).and_then(|()| encoder.groups(line, row))?;
        made.iter_mut().for_each(|(groups, _)| mark(groups));
        Ok(made)
    };
    load(sources, reading, &encoder, kind, groups, Keeper::default())
}

/// Rows as tokens.
pub struct EncodedRows {
    /// What they become, in their order.
    pub groups: Vec<Group>,
    /// As [`Dataset::digest`].
    pub digest: String,
    /// Rows left out because they were too long.
    pub skipped: usize,
    /// Examples cut because they were too long.
    pub truncated: usize,
    /// As [`Dataset::endless`].
    pub endless: usize,
}

impl EncodedRows {
    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.groups.iter().flat_map(|group| &group.sequences).map(|example| example.ids.len()).sum()
    }
}

/// Encodes the texts of rows that were read, as [`load_groups`] does; each comes with its line. Calls `refused` with the place of each
/// row among them that is.
///
/// # Errors
/// Those of `texts`, and when there is no room for the tokens.
pub fn encode_texts(
    texts: impl Iterator<Item = Result<(usize, String)>>,
    encoder: Encoder,
    kind: RowKind,
    objective: &str,
    mark: impl Fn(&mut [Group]) + Sync,
    mut refused: impl FnMut(usize, Problem),
) -> Result<EncodedRows> {
    let mut gathered = Gathered::default();
    let work = |(place, line, text): (usize, usize, String)| {
        let made = super::check_row_for(&text, kind, objective).and_then(|row| {
            let mut made = encoder.groups(line, &row)?;
            made.iter_mut().for_each(|(groups, _)| mark(groups));
            Ok(EncodedRow::of(text, made, &encoder))
        });
        (place, made)
    };
    let take = |(place, made)| match made {
        Ok(row) => gathered.take(row, None),
        Err(problem) => {
            refused(place, problem);
            Ok(())
        }
    };
    in_order(work, take, |give| {
        texts.enumerate().try_for_each(|(place, text)| {
            let (line, text) = text?;
            let bytes = text.len();
            give((place, line, text), bytes)
        })
    })?;
    gathered.keeper.finish()?;
    let Gathered { examples: groups, hasher, skipped, truncated, endless, .. } = gathered;
    Ok(EncodedRows { groups, digest: digest(hasher), skipped, truncated, endless })
}

/// A row as what it becomes.
struct EncodedRow<T> {
    text: String,
    /// With how many of them were cut; `None`: it is left out as too long.
    kept: Option<(Vec<T>, usize)>,
    /// How many of them have no end, if none was cut.
    endless: usize,
}

impl<T: OfLine> EncodedRow<T> {
    fn of(text: String, kept: Option<(Vec<T>, usize)>, encoder: &Encoder) -> Self {
        let endless = match &kept {
            Some((examples, 0)) => {
                let examples = examples.iter().flat_map(OfLine::examples);
                examples.filter(|example| encoder.is_endless(example)).count()
            }
            _ => 0,
        };
        Self { text, kept, endless }
    }
}

/// What becomes of all rows.
struct Gathered<T> {
    examples: Vec<T>,
    keeper: Keeper,
    hasher: Sha256,
    skipped: usize,
    truncated: usize,
    endless: usize,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        let (examples, keeper, hasher) = (Vec::new(), Keeper::default(), Sha256::new());
        Self { examples, keeper, hasher, skipped: 0, truncated: 0, endless: 0 }
    }
}

impl<T: OfLine> Gathered<T> {
    /// Takes the next row. `size`: of the files, where that is known.
    fn take(&mut self, row: EncodedRow<T>, size: Option<&Size>) -> Result<()> {
        self.hasher.update(row.text.as_bytes());
        self.hasher.update(b"\n");
        let Some((mut kept, cut)) = row.kept else {
            self.skipped += 1;
            return Ok(());
        };
        self.truncated += cut;
        self.endless += row.endless;
        kept.iter_mut().flat_map(OfLine::examples_mut).try_for_each(|example| self.keeper.take(example))?;
        if let Some(size) = size {
            size.make_room(&mut self.examples, kept.len());
        }
        self.examples.append(&mut kept);
        Ok(())
    }
}

fn digest(hasher: Sha256) -> String {
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn load<T: OfLine + Send>(
    sources: &[Source],
    reading: &Reading,
    encoder: &Encoder,
    kind: RowKind,
    encode: impl Fn(usize, &Row) -> Result<Option<(Vec<T>, usize)>, Problem> + Sync,
    keeper: Keeper,
) -> Result<Dataset<T>> {
    let (mut files, mut left_out) = (Vec::new(), Vec::new());
    let (mut rows, mut before) = (0, 0);
    let mut gathered = Gathered { keeper, ..Gathered::default() };
    let size = Size::of(sources);
    of_all(sources, |source| {
        // What is too long is not bad: `on_long_row` says what becomes of it.
        let (mut bad, mut long) = (Problems::by("line"), Problems::by("line"));
        let work = |(number, row): (usize, Result<(String, Row), Problem>)| {
            let made = row.and_then(|(text, row)| {
                let kept = encode(before + number, &row)?;
                Ok(EncodedRow::of(text, kept, encoder))
            });
            (number, made)
        };
        let take = |(number, made): (usize, Result<EncodedRow<T>, Problem>)| match made {
            Ok(row) => gathered.take(row, Some(&size)),
            Err(problem) => {
                let is_long = problem.kind == TOO_LONG && reading.on_bad_row == OnBadRow::Skip;
                if is_long {
                    long.add(number, problem)
                } else {
                    bad.add(number, problem)
                }
                Ok(())
            }
        };
        let file = size.counting(source.open()?);
        let recognised = in_order(work, take, |give| {
            read_rows(&source.name, file, reading, Some(kind), &mut |number, row| {
                let row = row.map(|(text, row)| (text.into_owned(), row));
                let bytes = row.as_ref().map_or(0, |(text, _)| text.len());
                give((number, row), bytes)
            })
        })?;
        let name = &source.name;
        long.settle(name, recognised.unit, recognised.rows, OnBadRow::Refuse)?;
        left_out.extend(bad.settle(name, recognised.unit, recognised.rows, reading.on_bad_row)?);
        ensure!(recognised.rows > 0, "{}: no rows", name.display());
        rows += recognised.rows;
        let last = recognised.last;
        files.push(FileOfRows { name: name.clone(), recognised, before });
        before += last;
        Ok(())
    })?;
    gathered.keeper.finish()?;
    let Gathered { examples, hasher, skipped, truncated, endless, .. } = gathered;
    ensure!(
        !examples.is_empty(),
        "{}: no rows left, all {} are longer than {} tokens\nhint: allow more with a larger `--max-seq-len`",
        sources.iter().map(|source| source.name.display().to_string()).collect::<Vec<_>>().join(", "),
        thousands(rows),
        thousands(encoder.max_seq_len)
    );
    let format = files.iter().find_map(|file| file.recognised.format).expect("a row without problems has a format");
    Ok(Dataset { examples, digest: digest(hasher), format, files, left_out, skipped, truncated, endless })
}

/// How much there is to read, and how much of it was.
struct Size {
    bytes: u64,
    read: Cell<u64>,
}

/// A file whose bytes are counted while they are read.
struct Counting<'s> {
    file: File,
    size: &'s Size,
}

impl Size {
    fn of(sources: &[Source]) -> Self {
        let bytes = |source: &Source| source.open().ok()?.metadata().ok().map(|about| about.len());
        Self { bytes: sources.iter().filter_map(bytes).sum(), read: Cell::new(0) }
    }

    fn counting(&self, file: File) -> Counting<'_> {
        Counting { file, size: self }
    }

    /// Makes room for `more` values, at once for all that are to come where there are many: a list that doubles takes three times its
    /// memory meanwhile.
    fn make_room<T>(&self, values: &mut Vec<T>, more: usize) {
        const MANY: usize = 1 << 14;
        if values.len() < MANY || values.len() + more <= values.capacity() {
            return;
        }
        // Rows to come may be longer than those so far.
        let all = (1.02 * values.len() as f64 * self.bytes as f64 / self.read.get().max(1) as f64) as usize;
        let expected = all.min(4 * values.len()).saturating_sub(values.len()).max(more);
        // Without it the list grows as any does.
        let _ = values.try_reserve_exact(expected);
    }
}

impl Read for Counting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.size.read.set(self.size.read.get() + read as u64);
        Ok(read)
    }
}

impl<T> Dataset<T> {
    /// Where a row is that has this line, counted over all files: "line 17", of several files with the file's name before it.
    pub fn place(&self, line: usize) -> String {
        let file = self.files.iter().rev().find(|file| file.before < line);
        match file {
            Some(FileOfRows { name, recognised, before }) if self.files.len() > 1 => {
                format!("{} {} {}", name.display(), recognised.unit, line - before)
            }
            Some(FileOfRows { recognised, before, .. }) => format!("{} {}", recognised.unit, line - before),
            None => format!("line {line}"),
        }
    }

    /// What the files were found to be, each in words: those that are no JSONL with our own keys. Files that are alike are told together.
    pub fn recognised(&self) -> Vec<(String, &str)> {
        let mut told: Vec<(Vec<&FileOfRows>, &str)> = Vec::new();
        for file in &self.files {
            let Some(words) = &file.recognised.words else { continue };
            match told.last_mut().filter(|(_, of)| of == words) {
                Some((files, _)) => files.push(file),
                None => told.push((vec![file], words)),
            }
        }
        let name = |files: &[&FileOfRows]| match files {
            [file] => file.name.display().to_string(),
            [first, .., last] => format!("{} … {}", first.name.display(), last.name.display()),
            [] => String::new(),
        };
        told.into_iter().map(|(files, words)| (name(&files), words)).collect()
    }
}

/// What comes from a line of a file.
pub trait OfLine {
    /// The line, counted from 1.
    fn line(&self) -> usize;

    /// Its sequences.
    fn examples(&self) -> &[Example];

    /// The same, to be put elsewhere.
    fn examples_mut(&mut self) -> &mut [Example];
}

impl OfLine for Example {
    fn line(&self) -> usize {
        self.line()
    }

    fn examples(&self) -> &[Example] {
        std::slice::from_ref(self)
    }

    fn examples_mut(&mut self) -> &mut [Example] {
        std::slice::from_mut(self)
    }
}

impl OfLine for Group {
    fn line(&self) -> usize {
        self.sequences.first().map_or(0, OfLine::line)
    }

    fn examples(&self) -> &[Example] {
        &self.sequences
    }

    fn examples_mut(&mut self) -> &mut [Example] {
        &mut self.sequences
    }
}

impl<T: OfLine> Dataset<T> {
    /// Splits the examples into those to train on and those to evaluate on, as indices. Examples of one line stay
    /// together, so nothing that is evaluated was trained on as part of its conversation.
    ///
    /// # Errors
    /// As [`order::split`], which counts lines here.
    pub fn split(&self, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        let lines = || self.examples.chunk_by(|a, b| a.line() == b.line()).map(|of_line| of_line[0].line());
        let held = order::held_out(lines().count(), eval_fraction, seed)?;
        let mut held = held.into_iter().peekable();
        let eval: Vec<usize> =
            lines().enumerate().filter(|(i, _)| held.next_if_eq(i).is_some()).map(|(_, line)| line).collect();
        let is_train = |&i: &usize| eval.binary_search(&self.examples[i].line()).is_err();
        Ok((0..self.examples.len()).partition(is_train))
    }
}

/// A note on examples without an end, [`Dataset::endless`] of `all`: what that comes to, and what to do.
pub fn note_endless(endless: usize, all: usize) -> Option<String> {
    (endless > 0).then(|| {
        format!(
            "note: {} of {} examples end without an end token, so the model does not learn there where to stop; have the chat \
             template write one behind the assistant's last message, or limit answers when you use the model",
            thousands(endless),
            thousands(all)
        )
    })
}
