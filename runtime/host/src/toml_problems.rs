//! What is wrong with a TOML file: all of it in one message, each with its line and a caret.

use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use homeroom_abi::describe::nearest;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use toml_edit::Document;

/// Problems that are shown; of the others only the number. One bracket too many in a long line may make thousands.
const SHOWN_MOST: usize = 40;
/// Characters of a line that are shown, where it is longer: those about the place.
const WIDTH: usize = 160;
/// Characters of them before the place.
const BEFORE: usize = 60;

/// A text that keeps its places and its layout.
///
/// `toml` is asked first: of brackets that do not match `toml_edit` 0.25 goes as deep as there are any, until the stack is full.
///
/// # Errors
/// When it is not TOML; the message quotes nothing of it.
pub fn document(text: &str) -> Result<Document<&str>, NotToml> {
    let told = |span, message: &str| NotToml { span, message: message.to_owned() };
    DeTable::parse(text).map_err(|error| told(error.span(), error.message()))?;
    Document::parse(text).map_err(|error| told(error.span(), error.message()))
}

/// Why a text is not TOML, and where.
#[derive(Debug)]
pub struct NotToml {
    /// Bytes of the text.
    pub span: Option<Range<usize>>,
    /// What a parser says.
    pub message: String,
}

/// Problems found in one file.
pub struct Problems<'a> {
    path: PathBuf,
    text: &'a str,
    found: Vec<(Option<Range<usize>>, String)>,
    /// In a file that may hold secrets: the keys whose values are shown.
    shown: Option<&'a [&'a str]>,
}

impl<'a> Problems<'a> {
    /// No problem yet with a file's text.
    pub fn new(path: &Path, text: &'a str) -> Self {
        Self { path: path.to_owned(), text, found: Vec::new(), shown: None }
    }

    /// The same for a file that may hold secrets: of its lines, only the values of `shown` are shown.
    pub fn of_secrets(path: &Path, text: &'a str, shown: &'a [&'a str]) -> Self {
        Self { shown: Some(shown), ..Self::new(path, text) }
    }

    /// Notes a problem at some bytes of the text; `None` where no place in the file is meant.
    pub fn at(&mut self, span: impl Into<Option<Range<usize>>>, message: impl Into<String>) {
        self.found.push((span.into(), message.into()));
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

    /// The value as a number in a range, whole or not, or a problem.
    pub fn number(
        &mut self,
        name: &str,
        value: &Spanned<DeValue<'a>>,
        range: std::ops::RangeInclusive<f64>,
    ) -> Option<f64> {
        let number = match value.get_ref() {
            DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix()).ok().map(|int| int as f64),
            DeValue::Float(digits) => digits.as_str().parse().ok(),
            _ => {
                self.wrong_type(name, value, "a number");
                return None;
            }
        };
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            self.at(value.span(), format!("`{name}`: should be from {} to {}", range.start(), range.end()));
        }
        number
    }

    /// The value as texts: a list of them, or one alone; or problems.
    pub fn texts(&mut self, name: &str, value: &Spanned<DeValue<'a>>) -> Vec<String> {
        match value.get_ref() {
            DeValue::String(text) => vec![text.to_string()],
            DeValue::Array(items) => items.iter().filter_map(|item| self.text(name, item)).collect(),
            _ => {
                self.wrong_type(name, value, "a list of texts");
                Vec::new()
            }
        }
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
        for (span, message) in self.found.iter().take(SHOWN_MOST) {
            let message = &if self.shown.is_some() { without_keys(message) } else { message.clone() };
            match span {
                Some(span) => self.show(&mut report, span, message),
                None => write!(report, "\n  {message}").expect("a string takes what is written"),
            }
        }
        if count > SHOWN_MOST {
            write!(report, "\n  and {} more", count - SHOWN_MOST).expect("a string takes what is written");
        }
        bail!(report)
    }

    fn show(&self, report: &mut String, span: &Range<usize>, message: &str) {
        let start = floor(self.text, span.start);
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let line = self.text[line_start..line_end].trim_end_matches('\r');
        let hidden_from = self.shown.map_or(line.len(), |shown| harmless(line, shown));
        let hide = |(at, c): (usize, char)| if at >= hidden_from && !c.is_whitespace() { '*' } else { c };
        // Of a long line, what is about the place.
        let column = self.text[line_start..start].chars().count();
        let skipped = if line.chars().nth(WIDTH).is_some() { column.saturating_sub(BEFORE) } else { 0 };
        let mut rest = line.char_indices().skip(skipped);
        let mut shown: String = rest.by_ref().take(WIDTH).map(hide).collect();
        if rest.next().is_some() {
            shown.push('…');
        }
        let more = if skipped > 0 { "…" } else { "" };
        let number = self.text[..start].matches('\n').count() + 1;
        // A span over several lines is marked to the end of its first.
        let marked = floor(self.text, span.end).clamp(start, line_start + line.len().max(start - line_start));
        let width = self.text[start..marked].chars().count().clamp(1, WIDTH - BEFORE);
        // Tabs stay tabs, so that the caret stands below what it means.
        let before = self.text[line_start..start].chars().skip(skipped);
        let indent: String = more.chars().map(|_| ' ').chain(before.map(|c| if c == '\t' { c } else { ' ' })).collect();
        let gutter = number.to_string().len();
        let message = message.trim_end().replace('\n', "; ");
        let caret = "^".repeat(width);
        write!(
            report,
            "\n  line {number}: {message}\n    {number} | {more}{shown}\n    {:gutter$} | {indent}{caret}",
            ""
        )
        .expect("a string takes what is written");
    }
}

/// The number of bytes at the beginning of a line that hold no secret: a table's head, or a key and, if that is one of `shown`, its
/// value. A line that has neither belongs to a text or a list that began before it, and nothing of it is harmless.
fn harmless(line: &str, shown: &[&str]) -> usize {
    let before_comment = line.find('#').unwrap_or(line.len());
    let Some(equals) = line.find('=') else {
        return if line.trim_start().starts_with('[') && !line.contains(['"', '\'']) { before_comment } else { 0 };
    };
    let key = line[..equals].trim();
    let value = &line[equals + 1..];
    // A second key stands in a table in the line.
    let is_plain = !value.contains('=') && without_keys(value) == value;
    match key.rsplit('.').next() {
        Some(name) if shown.contains(&name.trim()) && is_plain => before_comment,
        _ if without_keys(key) != key || key.contains(['"', '\'']) => 0,
        _ => equals + 1,
    }
}

/// A text without the words that begin with `sk-`, as OpenAI's and Anthropic's keys do; others are not known by their form.
fn without_keys(text: &str) -> String {
    let is_of_word = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find("sk-") {
        let is_begin = !rest[..at].ends_with(is_of_word);
        let end =
            if is_begin { rest[at..].find(|c| !is_of_word(c)).map_or(rest.len(), |end| at + end) } else { at + 3 };
        out.push_str(&rest[..at]);
        out.push_str(if is_begin { "[key]" } else { "sk-" });
        rest = &rest[end..];
    }
    out + rest
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

    /// Read by toml_edit alone, these end the program.
    #[test]
    fn brackets_that_nobody_closes_are_no_document() {
        for text in ["a = ".to_owned() + &"[".repeat(100_000), "a = ".to_owned() + &"[[[{]".repeat(20_000)] {
            let not = document(&text).expect_err("it is not TOML");
            assert!(!not.message.is_empty() && not.message.len() < 200, "{}", not.message.len());
        }
        assert_eq!(document("# kept\na = [1]\n").expect("it is TOML").into_mut().to_string(), "# kept\na = [1]\n");
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
    fn of_a_long_line_and_of_many_problems_a_part_is_shown() {
        let text = format!("{} é = {}", "a".repeat(5000), "{ ".repeat(5000));
        let all = report(&text, |problems| (0..6000).for_each(|at| problems.at(5001 + at..5003 + at, "here")));
        assert!(all.len() < SHOWN_MOST * 700 && all.ends_with("\n  and 5960 more"), "{} bytes", all.len());
        let lines: Vec<&str> = all.lines().collect();
        assert!(lines[2].starts_with("    1 | …aaa") && lines[2].ends_with("{ …"), "{}", lines[2]);
        let column = |line: &str, c: char| line.chars().position(|other| other == c);
        assert_eq!(column(lines[3], '^'), column(lines[2], 'é'), "{}\n{}", lines[2], lines[3]);
    }

    #[test]
    fn a_line_of_a_file_of_secrets_shows_only_what_is_harmless() {
        for (line, wanted) in [
            ("key = \"sk-1\" # x", "key = ****** * *"),
            ("kind = \"é\" # x", "kind = \"é\" * *"),
            ("a.kind = 'x'", "a.kind = 'x'"),
            ("kind = \"sk-1\"", "kind = ******"),
            ("kind = { k = 1 }", "kind = * * * * *"),
            ("[a.kind] # x", "[a.kind] * *"),
            ("sk-1 = 2", "**** * *"),
            ("'REAL=', # x", "******** * *"),
            ("task-1 = 2", "task-1 = *"),
            (" é", " *"),
        ] {
            let mut problems = Problems::of_secrets(Path::new("a.toml"), line, &["kind"]);
            problems.at(0..1, "no, sk-1é-2! but task-1");
            let all = problems.into_result().expect_err("there is a problem").to_string();
            assert_eq!(
                all,
                format!("a.toml: 1 problem\n  line 1: no, [key]! but task-1\n    1 | {wanted}\n      | ^"),
                "{line}"
            );
        }
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
