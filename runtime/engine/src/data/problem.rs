//! Why rows are refused, told together.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, anyhow};

use super::read::OnBadRow;

/// Problems that are told in full; of the others only the lines are listed.
const TOLD_IN_FULL: usize = 20;
/// Lines, or runs of them, that are listed of a kind.
const LISTED_MAX: usize = 20;

/// Why a row is refused.
#[derive(Debug)]
pub struct Problem {
    /// What it is listed under when there are many.
    pub(super) kind: &'static str,
    /// What is told in full.
    detail: String,
}

pub(super) const NOT_JSON: &str = "not JSON";
pub(super) const NOT_UTF8: &str = "not UTF-8";
pub(super) const UNKNOWN_ROW: &str = "unknown row";
pub(super) const MIXED: &str = "not of the form of the rows before";
pub(super) const BAD_ROW: &str = "malformed row";
pub(super) const TOO_BIG: &str = "too big";
pub(super) const TOO_LONG: &str = "too long";
pub(super) const NOTHING: &str = "nothing to train on";
pub(super) const NO_TEMPLATE: &str = "no chat template";
pub(super) const NOT_RENDERED: &str = "refused by the chat template";
pub(super) const OTHER_OBJECTIVE: &str = "of another objective";
pub(super) const OTHER_ROWS: &str = "of another kind";
pub(super) const NO_EMBEDDING: &str = "a token without an embedding";

impl Problem {
    pub(super) fn new(kind: &'static str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { kind, detail }
    }

    /// Whether the row is too long in tokens, for which there is an option of its own.
    pub fn is_long(&self) -> bool {
        self.kind == TOO_LONG
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self.kind {
            NOT_JSON => "a JSONL file holds one JSON object a line, each on a single line",
            TOO_BIG => "a row is one question and its answer, one conversation or one passage",
            TOO_LONG => {
                "cut long rows with `--on-long-row truncate`, leave them out with `--on-long-row skip`, or allow more with a larger `--max-seq-len`"
            }
            UNKNOWN_ROW => {
                "rows are `{\"messages\": [{\"role\": …, \"content\": …}, …]}`, `{\"prompt\": …, \"completion\": …}` or `{\"text\": …}`, and `{\"prompt\": …, \"chosen\": …, \"rejected\": …}` or `{\"prompt\": …, \"completion\": …, \"label\": true}` where answers are judged; rows with a question and an answer, Alpaca's and ShareGPT's are recognised, and `--columns` names other keys"
            }
            NO_EMBEDDING => {
                "take the token out of the rows, or the tokenizer that the model was made with; a model whose embedding was resized for it has it, too"
            }
            OTHER_OBJECTIVE => "choose what is learned with `--objective`, or write the rows in that form",
            OTHER_ROWS => "give a file of answers to imitate, such as `{\"prompt\": …, \"completion\": …}`",
            MIXED => "all rows of a file have one form: write them alike, or as files of their own",
            NO_TEMPLATE => {
                "choose an instruction-tuned model, or write the rows as `prompt` and `completion`, or as `text`"
            }
            _ => return None,
        })
    }
}

/// The problems of a file's rows, and how they are told: all in one message, by line.
pub struct Problems {
    /// What rows are counted by: "line" or "row".
    unit: &'static str,
    /// Rows there are, if that is known.
    rows: usize,
    first: Vec<(usize, Problem)>,
    others: BTreeMap<&'static str, Vec<usize>>,
    hints: Vec<&'static str>,
    count: usize,
    /// What is said of each, as long as that is the same.
    alike: Option<String>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl Problems {
    /// None so far, of a file whose rows are counted by `unit`: "line" or "row".
    pub fn by(unit: &'static str) -> Self {
        let (first, others, hints) = (Vec::new(), BTreeMap::new(), Vec::new());
        Self { unit, rows: 0, first, others, hints, count: 0, alike: None }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds the problem of a line.
    pub fn add(&mut self, line: usize, problem: Problem) {
        match &self.alike {
            None if self.count == 0 => self.alike = Some(problem.detail.clone()),
            Some(detail) if *detail != problem.detail => self.alike = None,
            _ => {}
        }
        self.count += 1;
        if let Some(hint) = problem.hint().filter(|h| !self.hints.contains(h)) {
            self.hints.push(hint);
        }
        // All rows of another form, or for another objective, say the same, and all that have what a chat template does not know; what
        // is wrong with other rows must not drown in that.
        let alike = [MIXED, OTHER_OBJECTIVE, OTHER_ROWS].contains(&problem.kind);
        let same = |earlier: &Problem| problem.kind == NOT_RENDERED && earlier.detail == problem.detail;
        let again = self.first.iter().any(|(_, earlier)| earlier.kind == problem.kind && (alike || same(earlier)));
        if self.first.len() < TOLD_IN_FULL && !again {
            self.first.push((line, problem));
        } else {
            self.others.entry(problem.kind).or_default().push(line);
        }
    }

    /// Tells them as [`Self::into_result`] does, of a file with so many rows: what is wrong with all of them alike is told once. Where rows
    /// that are refused are left out, and some are not, returns what is said of that.
    ///
    /// # Errors
    /// When there are problems, and the file is refused for them.
    pub(super) fn settle(
        mut self,
        path: &Path,
        unit: &'static str,
        rows: usize,
        on_bad_row: OnBadRow,
    ) -> Result<Option<String>> {
        (self.unit, self.rows) = (unit, rows);
        if self.count == 0 {
            return Ok(None);
        }
        if on_bad_row == OnBadRow::Refuse || self.count >= rows {
            if on_bad_row == OnBadRow::Skip {
                self.hints.push("`--on-bad-row skip` leaves out rows that are refused, and here all are");
            } else if self.count < rows && self.first.iter().all(|(_, problem)| problem.kind != TOO_LONG) {
                self.hints.push("`--on-bad-row skip` leaves them out");
            }
            return self.into_result(path).map(|()| None);
        }
        Ok(Some(self.note(path, rows)))
    }

    /// What is said of some of so many rows of a file that are left out for these problems.
    pub fn note(&self, path: &Path, rows: usize) -> String {
        let mut lines: Vec<usize> = self.first.iter().map(|(line, _)| *line).collect();
        lines.extend(self.others.values().flatten());
        lines.sort_unstable();
        let unit = self.unit;
        let why = self.first.first().map(|(line, problem)| format!("; {unit} {line}: {problem}")).unwrap_or_default();
        format!(
            "note: {}: {} of {} rows left out: {unit}{} {}{why}",
            path.display(),
            thousands(self.count),
            thousands(rows),
            if lines.len() == 1 { "" } else { "s" },
            spans(&lines)
        )
    }

    /// Tells them, if there are any.
    ///
    /// # Errors
    /// When there are.
    pub fn into_result(self, path: &Path) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let (unit, count) = (self.unit, thousands(self.count));
        let plural = if self.count == 1 { "" } else { "s" };
        let mut message = match self.alike.filter(|_| self.rows > 1 && self.count == self.rows) {
            Some(detail) => format!("{}: all {count} rows: {detail}", path.display()),
            None => {
                let mut message = format!("{}: {count} problem{plural}", path.display());
                for (line, Problem { detail, .. }) in &self.first {
                    let _ = write!(message, "\n  {unit} {line}: {detail}");
                }
                for (kind, lines) in &self.others {
                    let plural = if lines.len() == 1 { "" } else { "s" };
                    let _ = write!(message, "\n  {kind}: {unit}{plural} {}", spans(lines));
                }
                message
            }
        };
        for hint in self.hints {
            let _ = write!(message, "\nhint: {hint}");
        }
        Err(anyhow!(message))
    }
}

/// Ascending numbers, runs of them joined: "31-35, 40". Of many only the first, and how many more.
pub(super) fn spans(lines: &[usize]) -> String {
    let mut out = String::new();
    let mut listed = 0;
    for run in lines.chunk_by(|a, b| a + 1 == *b).take(LISTED_MAX) {
        let (first, last) = (run[0], run[run.len() - 1]);
        let comma = if out.is_empty() { "" } else { ", " };
        let _ = match last - first {
            0 => write!(out, "{comma}{first}"),
            _ => write!(out, "{comma}{first}-{last}"),
        };
        listed += run.len();
    }
    match lines.len() - listed {
        0 => out,
        more => format!("{out} and {} more", thousands(more)),
    }
}

/// 2381 as "2,381".
pub(super) fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
