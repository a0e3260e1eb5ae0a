//! Training data: the rows of a JSONL file, and the token sequences that they become.
//!
//! A file holds rows of one shape (see [`RowFormat`]). It is read line by line; the JSON of a row is gone when its
//! tokens are made. Problems are gathered over the whole file and told at once, by line.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::files::open_regular;
use crate::text::tokenizer::Tokenizer;
use crate::train::order;

mod encode;
mod problem;
mod row;
#[cfg(test)]
mod tests;

pub use encode::{Encoder, OnLongRow, end_of_turn};
use problem::thousands;
pub use problem::{Problem, Problems};
use row::parse_line;
pub use row::{Row, RowFormat, check_row};

/// One sequence to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids, the first one included that nothing predicts.
    pub ids: Vec<u32>,
    /// `trained[t]`: token t is a target. Never true for t = 0.
    pub trained: Vec<bool>,
    /// The line of the file it comes from, counted from 1. One line may give several examples.
    pub line: usize,
}

/// The examples of a file.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of the file.
    pub examples: Vec<Example>,
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
    let mut examples = Vec::new();
    let mut problems = Problems::default();
    let (mut rows, mut skipped, mut truncated, mut endless) = (0, 0, 0, 0);
    let (digest, format) = read_rows(path, |line, _, row| {
        rows += 1;
        match row.and_then(|row| encoder.examples(line, &row)) {
            Ok(None) => skipped += 1,
            Ok(Some((mut kept, cut))) => {
                truncated += cut;
                endless += if cut == 0 { encoder.count_endless(&kept) } else { 0 };
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

/// Reads and checks the rows of a JSONL file, each with its line, without encoding them.
///
/// # Errors
/// As [`load_jsonl`].
pub fn parse_rows(path: &Path) -> Result<Vec<(usize, Row)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    read_rows(path, |line, _, row| match row {
        Ok(row) => rows.push((line, row)),
        Err(problem) => problems.add(line, problem),
    })?;
    problems.into_result(path)?;
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    Ok(rows)
}

/// Checks the rows of a JSONL file and keeps none, as before a model is fetched for them.
///
/// # Errors
/// When the file cannot be read, holds no rows, or any row is refused whatever the model: one message tells all problems by line.
pub fn check_jsonl(path: &Path) -> Result<()> {
    let (mut rows, mut problems) = (0, Problems::default());
    read_rows(path, |line, _, row| {
        rows += 1;
        if let Err(problem) = row {
            problems.add(line, problem);
        }
    })?;
    problems.into_result(path)?;
    ensure!(rows > 0, "{}: no rows", path.display());
    Ok(())
}

/// Reads and checks the rows of an open JSONL file and returns each with its line, as the text that it was. `path` is what messages
/// call the file.
///
/// # Errors
/// As [`load_jsonl`].
pub fn read_texts(path: &Path, file: impl Read) -> Result<Vec<(usize, String)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    rows_of(path, file, |line, text, row| match (row, std::str::from_utf8(text)) {
        (Ok(_), Ok(text)) => rows.push((line, text.to_owned())),
        (Err(problem), _) => problems.add(line, problem),
        (Ok(_), Err(_)) => unreachable!("a row that was parsed is UTF-8"),
    })?;
    problems.into_result(path)?;
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    Ok(rows)
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

impl Dataset {
    /// Splits the examples into those to train on and those to evaluate on, as indices. Examples of one line stay
    /// together, so nothing that is evaluated was trained on as part of its conversation.
    ///
    /// # Errors
    /// As [`order::split`], which counts lines here.
    pub fn split(&self, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut lines: Vec<usize> = self.examples.iter().map(|e| e.line).collect();
        lines.dedup();
        let (_, eval) = order::split(lines.len(), eval_fraction, seed)?;
        let eval: Vec<usize> = eval.into_iter().map(|i| lines[i]).collect();
        let is_train = |&i: &usize| eval.binary_search(&self.examples[i].line).is_err();
        Ok((0..self.examples.len()).partition(is_train))
    }
}

/// Calls `each` with the line, the text and the checked row of every line that is not blank. Returns the file's digest and the
/// format of its first row.
fn read_rows(path: &Path, each: impl FnMut(usize, &[u8], Result<Row, Problem>)) -> Result<(String, Option<RowFormat>)> {
    rows_of(path, open_regular(path)?, each)
}

/// As [`read_rows`], of a file that is open.
fn rows_of(
    path: &Path,
    file: impl Read,
    mut each: impl FnMut(usize, &[u8], Result<Row, Problem>),
) -> Result<(String, Option<RowFormat>)> {
    let place = || path.display().to_string();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut hasher = Sha256::new();
    let mut format = None;
    let mut bytes = Vec::new();
    let mut line = 0;
    loop {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).with_context(place)? == 0 {
            break;
        }
        line += 1;
        hasher.update(&bytes);
        let bom: &[u8] = if line == 1 { b"\xef\xbb\xbf" } else { b"" };
        let text = bytes.strip_prefix(bom).unwrap_or(&bytes).trim_ascii();
        if text.is_empty() {
            continue;
        }
        if format.is_none() && line == 1 && text.starts_with(b"[") {
            bail!(
                "{}: a JSON array, not JSONL\nhint: write one object a line, without brackets around them and commas between them",
                path.display()
            );
        }
        // Models, archives, Parquet and UTF-16 have such bytes at once; no text in UTF-8 has.
        if line == 1 && text.contains(&0) {
            bail!(
                "{}: not text in UTF-8\nhint: rows are JSONL, a text file with one JSON object a line",
                path.display()
            );
        }
        each(line, text, parse_line(text, &mut format));
    }
    let digest = hasher.finalize();
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    Ok((format!("sha256:{hex}"), format))
}

/// The tokens of an example as text, trained ones in [brackets], line breaks both shown and made.
pub fn preview(example: &Example, tokenizer: &Tokenizer) -> String {
    let mut out = String::new();
    for (&id, &trained) in example.ids.iter().zip(&example.trained) {
        let raw = tokenizer.token(id).unwrap_or_else(|| format!("<{id}>"));
        let mut piece = match tokenizer.decode(&[id], false) {
            // Part of a character has no text of its own.
            Ok(text) if !text.is_empty() && !text.contains('\u{fffd}') => text,
            _ => raw.clone(),
        };
        // A sentencepiece decoder drops the space that a text begins with.
        if raw.starts_with('\u{2581}') && !piece.starts_with([' ', '\u{2581}']) {
            piece.insert(0, ' ');
        }
        let breaks = piece.ends_with('\n');
        let piece = piece.replace('\r', "\\r").replace('\n', "\\n");
        let _ = match trained {
            true => write!(out, "[{piece}]"),
            false => write!(out, "{piece}"),
        };
        if breaks {
            out.push('\n');
        }
    }
    out
}
