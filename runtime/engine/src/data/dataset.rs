//! The examples of files.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use super::check::of_all;
use super::encode::Encoder;
use super::example::Example;
use super::group::Group;
use super::order;
use super::problem::{Problem, Problems, TOO_LONG, thousands};
use super::read::{OnBadRow, Reading, Recognised, Source, read_rows};
use super::row::{Row, RowFormat, RowKind};

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
    let endless = |examples: &Vec<Example>| encoder.count_endless(examples);
    let examples = |line, row: &Row| encoder.examples(line, row);
    load(sources, reading, &encoder, RowKind::Demonstration, examples, endless)
}

/// Reads files and encodes their rows as what `objective`, which learns from rows of one kind, weighs together. The name of another
/// thing, which measures such rows, is for messages.
///
/// # Errors
/// When a file cannot be read, holds no rows, or any row is refused or of another kind: one message tells all problems by line.
pub fn load_groups(
    sources: &[Source],
    reading: &Reading,
    encoder: Encoder,
    kind: RowKind,
    objective: &str,
) -> Result<Dataset<Group>> {
    let endless = |groups: &Vec<Group>| groups.iter().map(|group| encoder.count_endless(&group.sequences)).sum();
    let groups = |line, row: &Row| kind.check(row.kind(), objective).and_then(|()| encoder.groups(line, row));
    load(sources, reading, &encoder, kind, groups, endless)
}

fn load<T>(
    sources: &[Source],
    reading: &Reading,
    encoder: &Encoder,
    kind: RowKind,
    encode: impl Fn(usize, &Row) -> Result<Option<(Vec<T>, usize)>, Problem>,
    count_endless: impl Fn(&Vec<T>) -> usize,
) -> Result<Dataset<T>> {
    let (mut examples, mut files, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
    let (mut rows, mut skipped, mut truncated, mut endless, mut before) = (0, 0, 0, 0, 0);
    let mut hasher = Sha256::new();
    of_all(sources, |source| {
        // What is too long is not bad: `on_long_row` says what becomes of it.
        let (mut bad, mut long) = (Problems::by("line"), Problems::by("line"));
        let recognised = read_rows(&source.name, source.open()?, reading, Some(kind), &mut |number, row| {
            let encoded = row.and_then(|(text, row)| Ok((text, encode(before + number, &row)?)));
            let (text, encoded) = match encoded {
                Ok(encoded) => encoded,
                Err(problem) => {
                    let is_long = problem.kind == TOO_LONG && reading.on_bad_row == OnBadRow::Skip;
                    if is_long {
                        long.add(number, problem)
                    } else {
                        bad.add(number, problem)
                    }
                    return Ok(());
                }
            };
            hasher.update(text.as_bytes());
            hasher.update(b"\n");
            match encoded {
                None => skipped += 1,
                Some((mut kept, cut)) => {
                    truncated += cut;
                    endless += if cut == 0 { count_endless(&kept) } else { 0 };
                    examples.append(&mut kept);
                }
            }
            Ok(())
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
    ensure!(
        !examples.is_empty(),
        "{}: no rows left, all {} are longer than {} tokens\nhint: allow more with a larger `--max-seq-len`",
        sources.iter().map(|source| source.name.display().to_string()).collect::<Vec<_>>().join(", "),
        thousands(rows),
        thousands(encoder.max_seq_len)
    );
    let format = files.iter().find_map(|file| file.recognised.format).expect("a row without problems has a format");
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let digest = format!("sha256:{hex}");
    Ok(Dataset { examples, digest, format, files, left_out, skipped, truncated, endless })
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
}

impl OfLine for Example {
    fn line(&self) -> usize {
        self.line
    }
}

impl OfLine for Group {
    fn line(&self) -> usize {
        self.sequences.first().map_or(0, |example| example.line)
    }
}

impl<T: OfLine> Dataset<T> {
    /// Splits the examples into those to train on and those to evaluate on, as indices. Examples of one line stay
    /// together, so nothing that is evaluated was trained on as part of its conversation.
    ///
    /// # Errors
    /// As [`order::split`], which counts lines here.
    pub fn split(&self, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut lines: Vec<usize> = self.examples.iter().map(OfLine::line).collect();
        lines.dedup();
        let (_, eval) = order::split(lines.len(), eval_fraction, seed)?;
        let eval: Vec<usize> = eval.into_iter().map(|i| lines[i]).collect();
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
