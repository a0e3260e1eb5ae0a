//! Reads the rows of a JSONL file, line by line.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::problem::{Problem, Problems};
use super::row::{Row, RowFormat, RowKind, parse_line};
use crate::files::open_regular;

/// Reads and checks the rows of a JSONL file, each with its line, without encoding them.
///
/// # Errors
/// As [`super::load_jsonl`].
pub fn parse_rows(path: &Path) -> Result<Vec<(usize, Row)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    read_rows(path, None, |line, _, row| match row {
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
    check_rows(path, RowKind::Demonstration, "sft")
}

/// The same of rows for `objective`, which learns from those of one kind.
///
/// # Errors
/// As [`check_jsonl`].
pub fn check_rows(path: &Path, kind: RowKind, objective: &str) -> Result<()> {
    let (mut rows, mut problems) = (0, Problems::default());
    read_rows(path, Some(kind), |line, _, row| {
        rows += 1;
        if let Err(problem) = row.and_then(|row| kind.check(row.kind(), objective)) {
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
/// As [`super::load_jsonl`].
pub fn read_texts(path: &Path, file: impl Read) -> Result<Vec<(usize, String)>> {
    let mut rows = Vec::new();
    let mut problems = Problems::default();
    rows_of(path, file, None, |line, text, row| match (row, std::str::from_utf8(text)) {
        (Ok(_), Ok(text)) => rows.push((line, text.to_owned())),
        (Err(problem), _) => problems.add(line, problem),
        (Ok(_), Err(_)) => unreachable!("a row that was parsed is UTF-8"),
    })?;
    problems.into_result(path)?;
    ensure!(!rows.is_empty(), "{}: no rows", path.display());
    Ok(rows)
}

/// Calls `each` with the line, the text and the checked row of every line that is not blank. Returns the file's digest and the
/// format of its first row. `wanted`: what is to be learned, if that is known.
pub(super) fn read_rows(
    path: &Path,
    wanted: Option<RowKind>,
    each: impl FnMut(usize, &[u8], Result<Row, Problem>),
) -> Result<(String, Option<RowFormat>)> {
    rows_of(path, open_regular(path)?, wanted, each)
}

/// As [`read_rows`], of a file that is open.
fn rows_of(
    path: &Path,
    file: impl Read,
    wanted: Option<RowKind>,
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
        each(line, text, parse_line(text, &mut format, wanted));
    }
    let digest = hasher.finalize();
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    Ok((format!("sha256:{hex}"), format))
}
