//! The examples of a file.

use std::path::Path;

use anyhow::{Result, ensure};

use super::encode::Encoder;
use super::example::Example;
use super::group::Group;
use super::jsonl::read_rows;
use super::order;
use super::problem::{Problem, Problems, thousands};
use super::row::{Row, RowFormat, RowKind};

/// The examples of a file, or its groups.
#[derive(Clone, Debug)]
pub struct Dataset<T = Example> {
    /// In the order of the file.
    pub examples: Vec<T>,
    /// `sha256:` and the digest of the file's bytes.
    pub digest: String,
    /// The shape of the file's rows.
    pub format: RowFormat,
    /// Rows left out because they were too long.
    pub skipped: usize,
    /// Examples cut because they were too long.
    pub truncated: usize,
    /// Examples that end without an end token, those of rows that were cut aside.
    pub endless: usize,
}

/// Reads a JSONL file and encodes its rows.
///
/// # Errors
/// When the file cannot be read, holds no rows, or any row is refused: one message tells all problems by line.
pub fn load_jsonl(path: &Path, encoder: Encoder) -> Result<Dataset> {
    let endless = |examples: &Vec<Example>| encoder.count_endless(examples);
    load(path, &encoder, RowKind::Demonstration, |line, row| encoder.examples(line, row), endless)
}

/// Reads a JSONL file and encodes its rows as what `objective`, which learns from rows of one kind, weighs together. The name of another
/// thing, which measures such rows, is for messages.
///
/// # Errors
/// As [`load_jsonl`], and when the rows are of another kind.
pub fn load_groups(path: &Path, encoder: Encoder, kind: RowKind, objective: &str) -> Result<Dataset<Group>> {
    let endless = |groups: &Vec<Group>| groups.iter().map(|group| encoder.count_endless(&group.sequences)).sum();
    let groups = |line, row: &Row| kind.check(row.kind(), objective).and_then(|()| encoder.groups(line, row));
    load(path, &encoder, kind, groups, endless)
}

fn load<T>(
    path: &Path,
    encoder: &Encoder,
    kind: RowKind,
    encode: impl Fn(usize, &Row) -> Result<Option<(Vec<T>, usize)>, Problem>,
    count_endless: impl Fn(&Vec<T>) -> usize,
) -> Result<Dataset<T>> {
    let mut examples = Vec::new();
    let mut problems = Problems::default();
    let (mut rows, mut skipped, mut truncated, mut endless) = (0, 0, 0, 0);
    let (digest, format) = read_rows(path, Some(kind), |line, _, row| {
        rows += 1;
        match row.and_then(|row| encode(line, &row)) {
            Ok(None) => skipped += 1,
            Ok(Some((mut kept, cut))) => {
                truncated += cut;
                endless += if cut == 0 { count_endless(&kept) } else { 0 };
                examples.append(&mut kept);
            }
            Err(problem) => problems.add(line, problem),
        }
    })?;
    problems.into_result(path)?;
    ensure!(rows > 0, "{}: no rows", path.display());
    ensure!(
        !examples.is_empty(),
        "{}: no rows left, all {} are longer than {} tokens\nhint: allow more with a larger `--max-seq-len`",
        path.display(),
        thousands(rows),
        thousands(encoder.max_seq_len)
    );
    let format = format.expect("a row without problems has a format");
    Ok(Dataset { examples, digest, format, skipped, truncated, endless })
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
