//! Problems of a TOML file, gathered and told together: line, column, the line itself and a caret under what is meant.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

/// The problems that were found in a file so far.
pub struct Problems {
    path: PathBuf,
    text: String,
    found: Vec<(Option<Range<usize>>, String)>,
}

impl Problems {
    /// None yet, in the file of that text.
    pub fn new(path: &Path, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned(), found: Vec::new() }
    }

    /// Adds one. `span` is in bytes of the text; `None` where no place in the file is meant.
    pub fn at(&mut self, span: impl Into<Option<Range<usize>>>, message: impl Into<String>) {
        self.found.push((span.into(), message.into()));
    }

    /// Tells all of them, in the order of the file, if there are any.
    ///
    /// # Errors
    /// When there are.
    pub fn into_result(mut self) -> Result<()> {
        if self.found.is_empty() {
            return Ok(());
        }
        self.found.sort_by_key(|(span, _)| span.as_ref().map_or(usize::MAX, |span| span.start));
        let plural = if self.found.len() == 1 { "" } else { "s" };
        let mut out = format!("{}: {} problem{plural}", self.path.display(), self.found.len());
        for (span, message) in &self.found {
            match span {
                Some(span) => self.show(&mut out, span, message),
                None => {
                    let _ = write!(out, "\n  {message}");
                }
            }
        }
        Err(anyhow!(out))
    }

    /// The last boundary between characters that is not after `at`.
    fn boundary(&self, at: usize) -> usize {
        (0..=at.min(self.text.len())).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or(0)
    }

    fn show(&self, out: &mut String, span: &Range<usize>, message: &str) {
        let start = self.boundary(span.start);
        let first = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let last = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let line = self.text[first..last].trim_end_matches('\r');
        let number = self.text[..start].matches('\n').count() + 1;
        let before = &self.text[first..start.min(first + line.len())];
        // A span over several lines is marked on its first.
        let end = self.boundary(span.end).clamp(first + before.len(), first + line.len());
        let width = self.text[first + before.len()..end].chars().count().max(1);
        let column = before.chars().count() + 1;
        // Tabs stay tabs, so that the caret stands where the terminal puts what it marks.
        let indent: String = before.chars().map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        let margin = " ".repeat(number.to_string().len());
        let _ = write!(out, "\n  line {number}, column {column}: {message}");
        let _ = write!(out, "\n    {number} | {line}\n    {margin} | {indent}{}", "^".repeat(width));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caret_stands_under_what_is_meant() {
        let text = "a = 1\nbé = \"x\"\n";
        let mut problems = Problems::new(Path::new("f.toml"), text);
        problems.at(12..15, "not a number");
        problems.at(None, "and more");
        problems.at(0..1, "unknown key `a`");
        let message = problems.into_result().unwrap_err().to_string();
        let expected = "f.toml: 3 problems\n  line 1, column 1: unknown key `a`\n    1 | a = 1\n      | ^\n  \
                        line 2, column 6: not a number\n    2 | bé = \"x\"\n      |      ^^^\n  and more";
        assert_eq!(message, expected);
    }

    #[test]
    fn a_span_at_the_end_or_beyond_it_is_shown_all_the_same() {
        for span in [6..6, 3..900, 5..6, 900..901] {
            let mut problems = Problems::new(Path::new("f.toml"), "a = 1\n");
            problems.at(span, "here");
            assert!(problems.into_result().unwrap_err().to_string().contains('^'));
        }
    }
}
