//! Tables as spreadsheets write them: CSV and TSV, with any separator, by RFC 4180 with quotes.
//!
//! A quote that is never closed would swallow all rows behind it, so that is told with the line that it stands in; no library that we
//! know says so.

use std::io::BufRead;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::problem::{BAD_ROW, Problem, TOO_BIG};
use super::read::{ROW_BYTES_MAX, too_big};

/// What stands between cells, in the order in which they are tried.
const SEPARATORS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// One row of a table.
pub(super) struct Record<'r> {
    /// The row as a spreadsheet counts it: from 1, the header and empty rows included.
    pub row: usize,
    /// The line of the file that it begins in.
    pub line: usize,
    /// Its cells. Those of a row that is refused are not all there.
    pub cells: Vec<&'r str>,
    /// Why it is refused.
    pub problem: Option<Problem>,
}

impl Record<'_> {
    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.problem.is_none() && self.cells.iter().all(|cell| cell.trim().is_empty())
    }
}

/// The separator that a table names itself, as Excel does in a first line `sep=;`, and the bytes of that line.
pub(super) fn named_separator(head: &[u8]) -> Option<(u8, usize)> {
    let line = head.split_inclusive(|byte| *byte == b'\n').next()?;
    let text = line.trim_ascii_end();
    let text = text.strip_prefix(b"\"").and_then(|text| text.strip_suffix(b"\"")).unwrap_or(text);
    let rest = text.get(..4).filter(|word| word.eq_ignore_ascii_case(b"sep=")).map(|_| &text[4..])?;
    match rest {
        [separator] => Some((*separator, line.len())),
        // A tab at the end of the line was trimmed.
        [] if line[4..].first() == Some(&b'\t') => Some((b'\t', line.len())),
        _ => None,
    }
}

/// The separator of a table that begins so: the one by which the header is one that `knows` recognises; else the one that parts all rows
/// into as many cells, and into most. The second value says whether the header is known.
pub(super) fn separator(head: &[u8], is_whole: bool, knows: impl Fn(&[&str]) -> bool) -> (u8, bool) {
    let score = |separator: u8| {
        let (mut counts, mut known) = (Vec::new(), false);
        // What comes behind the last whole row is left.
        let _ = records(Path::new(""), head, separator, |record| {
            if counts.is_empty() && !record.is_empty() {
                known = record.problem.is_none() && knows(&record.cells);
            }
            if !record.is_empty() && record.problem.is_none() {
                counts.push(record.cells.len());
            }
            Ok(())
        });
        if !is_whole && counts.len() > 1 {
            counts.pop();
        }
        let columns = counts.first().copied().unwrap_or(0);
        let alike = counts.iter().filter(|count| **count == columns).count() * 1000 / counts.len().max(1);
        // By a separator that is nowhere all rows are alike: one cell.
        (known, if columns > 1 { alike } else { 0 }, columns)
    };
    let best = SEPARATORS.iter().rev().map(|separator| (score(*separator), *separator)).max_by_key(|(score, _)| *score);
    best.map_or((b',', false), |((known, ..), separator)| (separator, known))
}

/// Calls `each` with the rows of a table.
///
/// # Errors
/// When it cannot be read, a quote is never closed, or a byte is no UTF-8: then no row behind it can be trusted. Whatever `each` returns.
pub(super) fn records(
    name: &Path,
    bytes: impl BufRead,
    separator: u8,
    mut each: impl FnMut(Record<'_>) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader { bytes, separator, line: 1, peeked: None };
    let (mut cells, mut ends) = (Vec::new(), Vec::new());
    let mut row = 0;
    loop {
        let line = reader.line;
        let place = || name.display().to_string();
        let Some(problem) = reader.record(&mut cells, &mut ends).with_context(place)? else { return Ok(()) };
        row += 1;
        let problem = match problem {
            Found::Whole => None,
            Found::Bad(problem) => Some(problem),
            Found::Open { line, within } => bail!(
                "{}: the quote that opens a cell in line {line} is {within}, so that the rows behind it cannot be told apart\nhint: close it; a quote inside of a quoted cell is written twice, `\"\"`",
                name.display()
            ),
        };
        let mut texts = Vec::with_capacity(ends.len());
        let starts = std::iter::once(0).chain(ends.iter().copied());
        for (start, end) in starts.zip(&ends) {
            // Each by itself: what ends one cell and what begins the next may be a character together.
            match std::str::from_utf8(&cells[start..*end]) {
                Ok(text) => texts.push(text),
                Err(error) => {
                    let at = start + error.valid_up_to();
                    let line = line + cells[..at].iter().filter(|byte| **byte == b'\n').count();
                    bail!("{}: {}", name.display(), not_utf8(line, cells[at]));
                }
            }
        }
        each(Record { row, line, cells: texts, problem })?;
    }
}

/// What is said of a byte that is no UTF-8.
fn not_utf8(line: usize, byte: u8) -> String {
    // Where Windows-1252 has letters, it is as Latin-1.
    let letter = if byte >= 0xa0 { format!(", `{}` in Windows-1252", char::from(byte)) } else { String::new() };
    format!(
        "line {line} has the byte 0x{byte:02X}{letter}, which is not UTF-8\nhint: save the table again, as “CSV UTF-8”; LibreOffice asks for the character set: Unicode (UTF-8)"
    )
}

enum Found {
    Whole,
    Bad(Problem),
    /// A quote stands open from this line on, as far as was read.
    Open {
        line: usize,
        within: &'static str,
    },
}

struct Reader<R> {
    bytes: R,
    separator: u8,
    line: usize,
    peeked: Option<u8>,
}

/// Where in a cell the reader is.
#[derive(Clone, Copy, PartialEq)]
enum At {
    /// At its beginning, or behind spaces.
    Start,
    Plain,
    Quoted,
    /// Behind a quote in a quoted cell: its end, or the first of two.
    Quote,
    /// Behind the quote that ends it.
    End,
}

impl<R: BufRead> Reader<R> {
    fn next(&mut self) -> std::io::Result<Option<u8>> {
        if let Some(byte) = self.peeked.take() {
            return Ok(Some(byte));
        }
        loop {
            let byte = match self.bytes.fill_buf() {
                Ok(buffer) => buffer.first().copied(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.bytes.consume(usize::from(byte.is_some()));
            return Ok(byte);
        }
    }

    /// Reads a row: the text of its cells, and where each ends. `None`: there is none.
    fn record(&mut self, cells: &mut Vec<u8>, ends: &mut Vec<usize>) -> std::io::Result<Option<Found>> {
        cells.clear();
        ends.clear();
        let (mut at, mut start, mut opened, mut problem) = (At::Start, 0, self.line, None);
        let mut is_begun = false;
        loop {
            // What means nothing in a cell is taken in one piece.
            if self.peeked.is_none() && matches!(at, At::Plain | At::Quoted) && cells.len() <= ROW_BYTES_MAX {
                let separator = if at == At::Plain { self.separator } else { b'"' };
                let buffer = match self.bytes.fill_buf() {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    buffer => buffer?,
                };
                let ends_run = |byte: &u8| *byte == separator || matches!(byte, b'\n' | b'\r');
                let run = buffer.iter().position(ends_run).unwrap_or(buffer.len());
                cells.extend_from_slice(&buffer[..run]);
                self.bytes.consume(run);
            }
            let byte = self.next()?;
            if byte.is_none() && !is_begun {
                return Ok(None);
            }
            is_begun = true;
            // Where cells end takes memory, too.
            let is_too_big = cells.len() + ends.len() * size_of::<usize>() > ROW_BYTES_MAX;
            if at == At::Quoted && (byte.is_none() || is_too_big) {
                let within =
                    if is_too_big { "not closed within the 8 MiB that a row may have" } else { "never closed" };
                return Ok(Some(Found::Open { line: opened, within }));
            }
            if is_too_big {
                problem = Some(Problem::new(TOO_BIG, too_big()));
                // The rest of it is read over.
                cells.clear();
                ends.clear();
                start = 0;
            }
            let is_end = match byte {
                None => true,
                Some(b'\n') => {
                    self.line += 1;
                    true
                }
                // By itself it ends a line of old Macintosh programs.
                Some(b'\r') => match self.next()? {
                    Some(b'\n') => {
                        self.line += 1;
                        if at == At::Quoted {
                            cells.push(b'\n');
                            continue;
                        }
                        true
                    }
                    other => {
                        self.peeked = other;
                        self.line += usize::from(other.is_some());
                        true
                    }
                },
                _ => false,
            };
            if is_end && at != At::Quoted {
                ends.push(cells.len());
                return Ok(Some(problem.map_or(Found::Whole, Found::Bad)));
            }
            let byte = byte.unwrap_or(b'\n');
            let byte = if byte == b'\r' { b'\n' } else { byte };
            if byte == self.separator && at != At::Quoted {
                ends.push(cells.len());
                (at, start) = (At::Start, cells.len());
                continue;
            }
            at = match (at, byte) {
                (At::Start, b'"') => {
                    // Spaces between a separator and a quote are no part of the cell.
                    cells.truncate(start);
                    opened = self.line;
                    At::Quoted
                }
                (At::Start, b' ') => {
                    cells.push(byte);
                    At::Start
                }
                (At::Start | At::Plain, _) => {
                    cells.push(byte);
                    At::Plain
                }
                (At::Quoted, b'"') => At::Quote,
                (At::Quoted, _) => {
                    cells.push(byte);
                    At::Quoted
                }
                (At::Quote, b'"') => {
                    cells.push(byte);
                    At::Quoted
                }
                (At::Quote | At::End, b' ') => At::End,
                (At::Quote | At::End, _) => {
                    problem.get_or_insert_with(|| {
                        let cell = ends.len() + 1;
                        let detail = format!(
                            "cell {cell} goes on behind the quote that ends it; a quote inside of a quoted cell is written twice, `\"\"`"
                        );
                        Problem::new(BAD_ROW, detail)
                    });
                    At::Plain
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of a table, bad ones as their problems.
    fn rows(text: &str, separator: u8) -> Result<Vec<(usize, usize, Vec<String>)>> {
        let mut rows = Vec::new();
        records(Path::new("t"), text.as_bytes(), separator, |record| {
            let cells = match record.problem {
                Some(problem) => vec![format!("! {problem}")],
                None => record.cells.iter().map(|cell| (*cell).to_owned()).collect(),
            };
            rows.push((record.row, record.line, cells));
            Ok(())
        })?;
        Ok(rows)
    }

    /// As Python's `csv.reader` with `skipinitialspace` parts them, quotes that are not closed aside.
    #[test]
    fn cells_are_parted_as_python_parts_them() {
        let check = |text: &str, expected: &[(usize, usize, &[&str])]| {
            let rows = rows(text, b',').unwrap();
            let rows: Vec<(usize, usize, Vec<&str>)> = rows
                .iter()
                .map(|(row, line, cells)| (*row, *line, cells.iter().map(String::as_str).collect()))
                .collect();
            let expected: Vec<_> = expected.iter().map(|(row, line, cells)| (*row, *line, cells.to_vec())).collect();
            assert_eq!(rows, expected, "{text:?}");
        };
        check("", &[]);
        check("a,b", &[(1, 1, &["a", "b"])]);
        check("a,b\n", &[(1, 1, &["a", "b"])]);
        check("a,b\r\n\r\nc,d\r\n", &[(1, 1, &["a", "b"]), (2, 2, &[""]), (3, 3, &["c", "d"])]);
        check("a,b\rc,d\r", &[(1, 1, &["a", "b"]), (2, 2, &["c", "d"])]);
        check("\"a,\n\"\"b\"\"\",c\nd,\n", &[(1, 1, &["a,\n\"b\"", "c"]), (2, 3, &["d", ""])]);
        check("\"a\r\nb\",c", &[(1, 1, &["a\nb", "c"])]);
        check("a, \"b, c\" ,d", &[(1, 1, &["a", "b, c", "d"])]);
        check("5\" disk,\"\",\"\"\"\"", &[(1, 1, &["5\" disk", "", "\""])]);
        check(",,", &[(1, 1, &["", "", ""])]);
        let bad =
            "! cell 2 goes on behind the quote that ends it; a quote inside of a quoted cell is written twice, `\"\"`";
        check("a,\"b\"c\nd,e", &[(1, 1, &[bad]), (2, 2, &["d", "e"])]);
    }

    #[test]
    fn an_open_quote_and_a_foreign_byte_are_told_by_their_line() {
        let told = |text: &[u8]| {
            let refused = records(Path::new("t"), text, b',', |_| Ok(())).unwrap_err();
            refused.to_string().lines().next().unwrap_or_default().to_owned()
        };
        assert!(
            told(b"a,b\n1,\"2\n3,4\n5,6\n").starts_with("t: the quote that opens a cell in line 2 is never closed")
        );
        assert_eq!(
            told(b"a,b\n1,\"x\ngr\xf6\"\n"),
            "t: line 3 has the byte 0xF6, `ö` in Windows-1252, which is not UTF-8"
        );
        assert_eq!(told(b"a\x93,b\n"), "t: line 1 has the byte 0x93, which is not UTF-8");
        let endless = [b"a,\"".to_vec(), vec![b'x'; ROW_BYTES_MAX + 7]].concat();
        assert!(told(&endless).contains("line 1 is not closed within the 8 MiB that a row may have"));
        // Together the two are a letter of UTF-8.
        assert_eq!(
            told(b"a;b\nCAF\xc9,\xa35\n"),
            "t: line 2 has the byte 0xC9, `É` in Windows-1252, which is not UTF-8"
        );
        let wide = vec![b','; ROW_BYTES_MAX / 4];
        let mut refused = 0;
        let count = |record: Record<'_>| {
            refused += usize::from(record.problem.is_some());
            Ok(())
        };
        records(Path::new("t"), &wide[..], b',', count).unwrap();
        assert_eq!(refused, 1);
    }

    #[test]
    fn a_row_that_is_too_big_is_refused_and_the_next_is_read() {
        let text = format!("a,{}\nb,c\n", "x".repeat(ROW_BYTES_MAX + 7));
        let rows = rows(&text, b',').unwrap();
        assert!(rows[0].2[0].starts_with("! longer than 8 MiB"), "{:?}", &rows[0].2[0][..60]);
        assert_eq!(rows[1], (2, 2, vec!["b".to_owned(), "c".to_owned()]));
    }

    #[test]
    fn the_separator_is_that_of_the_header() {
        let check = |text: &str, expected: u8| {
            let (separator, _) = separator(text.as_bytes(), true, |_| false);
            assert_eq!(char::from(separator), char::from(expected), "{text:?}");
        };
        check("a;b\n1,5;2,5\n", b';');
        check("a,b\n\"1;2;3\",x\n", b',');
        check("a\tb, c\n1\t2\n3\t4\n", b'\t');
        check("a|b|c\n1|2|3\n", b'|');
        check("text\nHello, world\n", b',');
        // Of several by which all rows are alike it is the one that is known.
        let (found, known) = separator(b"Nr;Frage, kurz;Antwort\n1;a, b;c\n", true, |cells| cells.contains(&"Antwort"));
        assert_eq!((found, known), (b';', true));
        assert_eq!(named_separator(b"sep=;\r\na;b"), Some((b';', 7)));
        assert_eq!(named_separator(b"\"sep=,\"\na,b"), Some((b',', 8)));
        assert_eq!(named_separator(b"sep=\t\na\tb"), Some((b'\t', 6)));
        assert_eq!(named_separator(b"separator\n"), None);
    }
}
