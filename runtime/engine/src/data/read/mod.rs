//! Files of rows: what they are, and their rows one by one. A file of any size is read in pieces.

mod bytes;
mod kind;
mod pieces;
mod sources;
mod windows;

use std::borrow::Cow;
use std::cell::Cell;
use std::io::{BufReader, Read};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use serde::Serialize;

pub use self::sources::{Source, Sources};
use self::windows::Encoding;
use super::columns::Columns;
use super::form::{Forms, Header, is_known};
use super::json::{self, Layout};
use super::problem::Problem;
use super::row::{Row, RowFormat, RowKind};
use super::table;
use crate::words::value_of;

/// Most bytes of one row. No model has a context for as much; what is longer is a file that was taken for a row.
pub(super) const ROW_BYTES_MAX: usize = 8 << 20;

/// What is said of a row of more than [`ROW_BYTES_MAX`].
pub(super) fn too_big() -> String {
    format!("longer than {} MiB, the most that a row may have; cut it into passages", ROW_BYTES_MAX >> 20)
}

/// What happens to a row that is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// Its file is, and the row is named.
    #[default]
    Refuse,
    /// It is left out, and named.
    Skip,
}

impl FromStr for OnBadRow {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        value_of(word, &[("refuse", Self::Refuse), ("skip", Self::Skip)])
    }
}

/// How rows are read, whatever files hold them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Which column or key is what, where their names do not say it.
    pub columns: Columns,
    /// The system message of rows that have none.
    pub system: Option<String>,
    /// What happens to a row that is refused.
    pub on_bad_row: OnBadRow,
}

/// What a file was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    /// Its format, and what is what in its rows; `None`: JSONL with our own keys.
    pub words: Option<String>,
    /// The form of its rows, if it has any that are not refused.
    pub format: Option<RowFormat>,
    /// What its rows are counted by: "line" or "row".
    pub unit: &'static str,
    /// The number of its last row.
    pub last: usize,
    /// Rows, those that are refused included.
    pub rows: usize,
}

/// A row with its number, as the text of a row with our own keys and checked, or why it is refused.
pub(super) type Each<'e> = &'e mut dyn FnMut(usize, Result<(Cow<'_, str>, Row), Problem>) -> Result<()>;

/// The whole of a text that holds no rows, as rows are read: unpacked, from UTF-16 too, and without a byte-order mark. `most`: its longest, in
/// bytes.
///
/// # Errors
/// When it is longer, cannot be read, or is no text: with what it is and, in a line of its own, what to do with rows.
pub fn whole_text(name: &Path, file: impl Read, most: usize) -> Result<String> {
    let mut raw = Vec::new();
    let place = || name.display().to_string();
    bytes::text(name, file)?.bytes.take(most as u64 + 1).read_to_end(&mut raw).with_context(place)?;
    ensure!(raw.len() <= most, "{}: it is longer than {} MiB", name.display(), most >> 20);
    let text = String::from_utf8(raw).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        anyhow!("{}: line {line}: it is not UTF-8", name.display())
    })?;
    ensure!(!text.contains('\0'), "{}: it holds a NUL byte, so it is no text", name.display());
    Ok(text)
}

/// Calls `each` with every row of an open file. `name` is what messages call it. `wanted`: what is to be learned, if that is known.
///
/// # Errors
/// When the file cannot be read, is no file of rows, or cannot be told apart into rows; whatever `each` returns.
pub(super) fn read_rows(
    name: &Path,
    file: impl Read,
    reading: &Reading,
    wanted: Option<RowKind>,
    each: Each<'_>,
) -> Result<Recognised> {
    let text = bytes::text(name, file)?;
    let mut forms = Forms::new(reading, wanted);
    let knows = |first: &[&str]| is_known(first, &reading.columns, wanted);
    let ending = ending(name);
    let begin = text.head.trim_ascii_start();
    let is_json = begin.starts_with(b"{") || begin.starts_with(b"[{") || begin.starts_with(b"[") && !ending.is_table();
    // Only tables are saved so, by programs that say nothing of it.
    let windows = windows::head(&text.head).filter(|_| !is_json && !text.is_marked);
    let head = windows.as_deref().unwrap_or(&text.head);
    let separator = match table::named_separator(head) {
        Some((separator, bytes)) => Some((separator, bytes)),
        None if is_json || begin.is_empty() => None,
        None => {
            let (separator, is_known) = table::separator(head, text.is_whole, knows);
            (ending.is_table() || is_known || ending == Ending::Other && is_regular(head, separator))
                .then_some((separator, 0))
        }
    };
    let Some((separator, before)) = separator else {
        if ending == Ending::Prose && !is_json && !begin.is_empty() {
            bail!(
                "{}: plain text, not rows\nhint: write a table with columns such as Question and Answer and save it as CSV, or a line of JSON a row, such as {{\"text\": \"…\"}}",
                name.display()
            );
        }
        let layout = Layout::of(&text.head, text.is_whole);
        let (mut rows, mut last) = (0, 0);
        json::rows(name, text.bytes, layout, |number, line, piece| {
            (rows, last) = (rows + 1, number);
            each(number, piece.and_then(|bytes| forms.json(bytes, line)))
        })?;
        if let Some((role, column)) = forms.unmet().filter(|_| rows > 0) {
            bail!("{}: no row has `{column}`, which is to be `{}`", name.display(), role.name());
        }
        let words = match (layout, forms.words()) {
            (Layout::Lines, None) => None,
            (layout, words) => Some(match words {
                Some(words) => format!("{}; {words}", layout.name()),
                None => layout.name().to_owned(),
            }),
        };
        let unit = if layout == Layout::Lines { "line" } else { "row" };
        return Ok(Recognised { words, format: forms.format(), unit, last, rows });
    };
    let encoding = Cell::new(if text.is_marked { Encoding::Utf8 } else { Encoding::Ascii });
    let mut bytes = BufReader::with_capacity(1 << 16, windows::as_utf8(text.bytes, &encoding));
    bytes.read_exact(&mut vec![0; before])?;
    let (mut rows, mut last) = (0, 0);
    let mut first: Option<Vec<String>> = None;
    let mut header: Option<Header> = None;
    let make_header = |first: &[String], second: Option<&[&str]>| {
        let first: Vec<&str> = first.iter().map(String::as_str).collect();
        let made = Header::of(&first, second, &reading.columns, wanted);
        made.map_err(|what| anyhow!("{}: {what}", name.display()))
    };
    table::records(name, bytes, separator, |record| {
        if record.is_empty() {
            return Ok(());
        }
        let header = match (&mut header, &first) {
            (Some(header), _) => header,
            (None, None) => {
                if let Some(problem) = record.problem {
                    bail!("{}: the header in line {}: {problem}", name.display(), record.line);
                }
                first = Some(record.cells.iter().map(|cell| (*cell).to_owned()).collect());
                last = record.row;
                return Ok(());
            }
            (None, Some(names)) => {
                let made = header.insert(make_header(names, Some(&record.cells))?);
                if !made.is_row {
                    rows += 1;
                    let cells: Vec<&str> = names.iter().map(String::as_str).collect();
                    each(last, forms.cells(made, &cells))?;
                }
                made
            }
        };
        (rows, last) = (rows + 1, record.row);
        each(
            last,
            match record.problem {
                Some(problem) => Err(problem),
                None => forms.cells(header, &record.cells),
            },
        )
    })?;
    if let (None, Some(names)) = (&header, &first) {
        let header = make_header(names, None)?;
        if header.is_row {
            bail!("{}: no rows, only a header", name.display());
        }
        rows = 1;
        let cells: Vec<&str> = names.iter().map(String::as_str).collect();
        each(last, forms.cells(&header, &cells))?;
    }
    let format = match separator {
        b'\t' => "TSV".to_owned(),
        b',' => "CSV".to_owned(),
        other => format!("CSV with `{}`", char::from(other)),
    };
    let format = match encoding.get() {
        Encoding::Windows1252 => format!("{format} in Windows-1252"),
        _ => format,
    };
    let words = forms.words().map_or_else(|| format.clone(), |words| format!("{format}; {words}"));
    Ok(Recognised { words: Some(words), format: forms.format(), unit: "row", last, rows })
}

/// What a file's name says of it.
#[derive(Clone, Copy, PartialEq)]
enum Ending {
    Table,
    Json,
    /// Text for people.
    Prose,
    Other,
}

impl Ending {
    fn is_table(self) -> bool {
        self == Self::Table
    }
}

fn ending(name: &Path) -> Ending {
    let name = name.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    match () {
        () if ends(&[".csv", ".tsv", ".tab"]) => Ending::Table,
        () if ends(&[".jsonl", ".json", ".ndjson"]) => Ending::Json,
        () if ends(&[".txt", ".md", ".text"]) => Ending::Prose,
        () => Ending::Other,
    }
}

/// Whether a separator parts several rows into as many cells, so that the text is a table whatever its columns are named.
fn is_regular(head: &[u8], separator: u8) -> bool {
    let mut counts = Vec::new();
    let read = table::records(Path::new(""), head, separator, |record| {
        counts.push(record.cells.len());
        Ok(())
    });
    read.is_ok() && counts.len() > 1 && counts[0] > 1 && counts.iter().all(|count| *count == counts[0])
}
