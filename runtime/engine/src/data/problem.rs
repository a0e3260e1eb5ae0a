//! Why rows are refused, told together.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, anyhow};

/// Problems that are told in full; of the others only the lines are listed.
const TOLD_IN_FULL: usize = 20;
/// Lines, or runs of them, that are listed of a kind.
const LISTED_MAX: usize = 20;

/// Why a row is refused.
#[derive(Debug)]
pub struct Problem {
    /// What it is listed under when there are many.
    kind: &'static str,
    /// What is told in full.
    detail: String,
}

pub(super) const NOT_JSON: &str = "not JSON";
pub(super) const NOT_UTF8: &str = "not UTF-8";
pub(super) const UNKNOWN_ROW: &str = "unknown row";
pub(super) const MIXED: &str = "not of the form of the rows before";
pub(super) const BAD_ROW: &str = "malformed row";
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

    /// What it is listed under.
    pub(super) fn kind(&self) -> &'static str {
        self.kind
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self.kind {
            NOT_JSON => "a JSONL file holds one JSON object a line, each on a single line",
            TOO_LONG => {
                "cut long rows with `--on-long-row truncate`, leave them out with `--on-long-row skip`, or allow more with a larger `--max-seq-len`"
            }
            UNKNOWN_ROW => {
                "rows are `{\"messages\": [{\"role\": …, \"content\": …}, …]}`, `{\"prompt\": …, \"completion\": …}` or `{\"text\": …}`, and `{\"prompt\": …, \"chosen\": …, \"rejected\": …}` or `{\"prompt\": …, \"completion\": …, \"label\": true}` where answers are judged"
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
#[derive(Default)]
pub struct Problems {
    first: Vec<(usize, Problem)>,
    others: BTreeMap<&'static str, Vec<usize>>,
    hints: Vec<&'static str>,
    count: usize,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

impl Problems {
    /// Adds the problem of a line.
    pub fn add(&mut self, line: usize, problem: Problem) {
        self.count += 1;
        if let Some(hint) = problem.hint().filter(|h| !self.hints.contains(h)) {
            self.hints.push(hint);
        }
        // All rows of another form, or for another objective, say the same; what is wrong with other rows must not drown in that.
        let alike = [MIXED, OTHER_OBJECTIVE, OTHER_ROWS].contains(&problem.kind);
        let again = alike && self.first.iter().any(|(_, earlier)| earlier.kind == problem.kind);
        if self.first.len() < TOLD_IN_FULL && !again {
            self.first.push((line, problem));
        } else {
            self.others.entry(problem.kind).or_default().push(line);
        }
    }

    /// Tells them, if there are any.
    ///
    /// # Errors
    /// When there are.
    pub fn into_result(self, path: &Path) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let plural = if self.count == 1 { "" } else { "s" };
        let count = thousands(self.count);
        let mut message = format!("{}: {count} problem{plural}", path.display());
        for (line, Problem { detail, .. }) in &self.first {
            let _ = write!(message, "\n  line {line}: {detail}");
        }
        for (kind, lines) in &self.others {
            let plural = if lines.len() == 1 { "" } else { "s" };
            let _ = write!(message, "\n  {kind}: line{plural} {}", spans(lines));
        }
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
