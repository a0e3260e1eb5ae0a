//! What is wrong with a TOML file: all of it in one message, each with its line and a caret.

use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use homeroom_abi::describe::nearest;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Problems found in one file.
pub struct Problems<'a> {
    path: PathBuf,
    text: &'a str,
    found: Vec<(Option<Range<usize>>, String)>,
    hidden: Vec<Range<usize>>,
}

impl<'a> Problems<'a> {
    /// No problem yet with a file's text.
    pub fn new(path: &Path, text: &'a str) -> Self {
        Self { path: path.to_owned(), text, found: Vec::new(), hidden: Vec::new() }
    }

    /// Notes a problem at some bytes of the text; `None` where no place in the file is meant.
    pub fn at(&mut self, span: impl Into<Option<Range<usize>>>, message: impl Into<String>) {
        self.found.push((span.into(), message.into()));
    }

    /// Notes a problem with a value that must not be printed.
    pub fn at_hidden(&mut self, span: Range<usize>, message: impl Into<String>) {
        self.hidden.push(span.clone());
        self.at(span, message);
    }

    /// Reads the text; what is not TOML becomes problems, and the rest is there.
    pub fn parse(&mut self) -> DeTable<'a> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            self.not_toml(error.span().unwrap_or(0..0), error.message());
        }
        table.into_inner()
    }

    /// Notes what a parser of TOML found, in plain words where it has none.
    pub fn not_toml(&mut self, span: impl Into<Option<Range<usize>>>, found: &str) {
        let plain = match found.lines().next().unwrap_or_default() {
            "string values must be quoted, expected literal string" => "a text stands in quotes",
            "invalid basic string, expected `\"`" => "the text has no closing quote",
            "extra `=`, expected nothing" => "one `=` too many",
            "unexpected key or value, expected newline, `#`" => "the line should end here",
            "duplicate key" => "this key is there already",
            _ => found,
        };
        self.at(span, plain.trim_end().replace('\n', ", "));
    }

    /// Notes every key of a table that is not among `known`, with the nearest that is.
    pub fn unknown_keys(&mut self, table: &DeTable, known: &[&str]) {
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            if !known.contains(&name) {
                self.at(key.span(), format!("`{name}`: unknown key, {}", near(name, known)));
            }
        }
    }

    /// The value as a text, or a problem.
    pub fn text(&mut self, name: &str, value: &Spanned<DeValue<'a>>) -> Option<String> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.wrong_type(name, value, "a text in quotes");
        }
        text.map(str::to_owned)
    }

    /// The value as true or false, or a problem.
    pub fn bool(&mut self, name: &str, value: &Spanned<DeValue<'a>>) -> Option<bool> {
        let bool = value.get_ref().as_bool();
        if bool.is_none() {
            self.wrong_type(name, value, "true or false");
        }
        bool
    }

    /// The value as a whole number in a range, or a problem.
    pub fn int(
        &mut self,
        name: &str,
        value: &Spanned<DeValue<'a>>,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        let Some(digits) = value.get_ref().as_integer() else {
            self.wrong_type(name, value, "a whole number");
            return None;
        };
        let int = i64::from_str_radix(digits.as_str(), digits.radix()).ok().filter(|int| range.contains(int));
        if int.is_none() {
            self.at(value.span(), format!("`{name}`: should be from {} to {}", range.start(), range.end()));
        }
        int
    }

    /// Notes that a value is not what it should be.
    pub fn wrong_type(&mut self, name: &str, value: &Spanned<DeValue>, wanted: &str) {
        self.at(value.span(), format!("`{name}`: is {}, should be {wanted}", kind(value.get_ref())));
    }

    /// Whether there is a problem so far.
    pub fn any(&self) -> bool {
        !self.found.is_empty()
    }

    /// Nothing, or all problems in the order of the file.
    ///
    /// # Errors
    /// When there is a problem.
    pub fn into_result(mut self) -> Result<()> {
        if self.found.is_empty() {
            return Ok(());
        }
        self.found.sort_by_key(|(span, _)| span.as_ref().map_or(usize::MAX, |span| span.start));
        let count = self.found.len();
        let mut report = format!("{}: {count} problem{}", self.path.display(), if count == 1 { "" } else { "s" });
        for (span, message) in &self.found {
            match span {
                Some(span) => self.show(&mut report, span, message),
                None => write!(report, "\n  {message}").expect("a string takes what is written"),
            }
        }
        bail!(report)
    }

    fn show(&self, report: &mut String, span: &Range<usize>, message: &str) {
        let start = floor(self.text, span.start);
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let hidden = |at: usize| self.hidden.iter().any(|span| span.contains(&at));
        let line = self.text[line_start..line_end].trim_end_matches('\r');
        let shown = line.char_indices().map(|(at, c)| if hidden(line_start + at) { '*' } else { c });
        let shown: String = shown.collect();
        let number = self.text[..start].matches('\n').count() + 1;
        // A span over several lines is marked to the end of its first.
        let marked = floor(self.text, span.end).clamp(start, line_start + line.len().max(start - line_start));
        let width = self.text[start..marked].chars().count().max(1);
        // Tabs stay tabs, so that the caret stands below what it means.
        let indent: String = self.text[line_start..start].chars().map(|c| if c == '\t' { c } else { ' ' }).collect();
        let gutter = number.to_string().len();
        let message = message.trim_end().replace('\n', "; ");
        let caret = "^".repeat(width);
        write!(report, "\n  line {number}: {message}\n    {number} | {shown}\n    {:gutter$} | {indent}{caret}", "")
            .expect("a string takes what is written");
    }
}

/// The nearest of the names, or all of them.
pub fn near(name: &str, known: &[&str]) -> String {
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "there is none here".to_owned(),
        None => format!("known are {}", known.join(", ")),
    }
}

/// A value's type in words.
fn kind(value: &DeValue) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// The last place at or before `at` that is between two characters.
fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &str, note: impl FnOnce(&mut Problems)) -> String {
        let mut problems = Problems::new(Path::new("a.toml"), text);
        note(&mut problems);
        problems.into_result().expect_err("there is a problem").to_string()
    }

    #[test]
    fn a_problem_is_shown_where_it_is() {
        let text = "a = 1\n\tlearing = \"é\"\n";
        let all = report(text, |problems| {
            problems.at(7..14, "second");
            problems.at(0..1, "first");
        });
        assert_eq!(
            all,
            "a.toml: 2 problems\n  line 1: first\n    1 | a = 1\n      | ^\n  line 2: second\n    2 | \tlearing = \"é\"\n      | \t^^^^^^^"
        );
    }

    #[test]
    fn a_hidden_value_is_not_shown() {
        let all = report("key = \"sk-1\" # x\n", |problems| problems.at_hidden(6..12, "no"));
        assert_eq!(all, "a.toml: 1 problem\n  line 1: no\n    1 | key = ****** # x\n      |       ^^^^^^");
    }

    #[test]
    fn spans_out_of_the_text_are_no_panic() {
        for text in ["", "é", "a\r\nb", "\n\n"] {
            for start in 0..8 {
                for end in 0..8 {
                    assert!(report(text, |problems| problems.at(start..end, "x")).contains("line "));
                }
            }
        }
    }

    #[test]
    fn what_is_not_toml_is_a_problem_and_the_rest_is_read() {
        let mut problems = Problems::new(Path::new("a.toml"), "a = = 1\nb = 2\nc = \"x\n");
        let table = problems.parse();
        assert!(table.contains_key("b"));
        let all = problems.into_result().expect_err("it is broken").to_string();
        assert!(all.contains("line 1") && all.contains("line 3"), "{all}");
    }

    #[test]
    fn an_unknown_key_gets_its_nearest() {
        let text = "learing_rate = 1\n";
        let all = report(text, |problems| {
            let table = problems.parse();
            problems.unknown_keys(&table, &["epochs", "learning_rate"]);
        });
        assert!(all.contains("`learing_rate`: unknown key, did you mean `learning_rate`?"), "{all}");
    }
}
