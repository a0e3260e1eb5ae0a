//! JSON as people have it: a row a line, a list of rows, an object that holds such a list, or rows one behind the other over several lines.
//! Each row is found by its brackets, quotes respected, and parsed by itself, so that a file of any size is read in pieces.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, Read as _};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value as Json};

use super::problem::{BAD_ROW, NOT_JSON, NOT_UTF8, Problem, TOO_BIG, UNKNOWN_ROW};
use super::read::{ROW_BYTES_MAX, too_big};
use super::row::kind_of;

/// How rows lie in a JSON file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// A row a line.
    Lines,
    /// A list of rows.
    List,
    /// An object that has a list of rows under one of [`HOLDERS`].
    Holder,
    /// Rows over several lines each, one behind the other.
    Values,
}

/// Keys under which public sets and programs put their rows.
const HOLDERS: [&str; 7] = ["data", "rows", "examples", "items", "train", "instances", "records"];
/// Keys of a row, in which no list holds rows.
const OF_ROWS: [&str; 9] =
    ["messages", "prompt", "completion", "text", "chosen", "rejected", "conversations", "instruction", "question"];

impl Layout {
    /// The layout of a file that begins so.
    pub(super) fn of(head: &[u8], is_whole: bool) -> Self {
        let text = head.trim_ascii_start();
        if text.starts_with(b"[") {
            return Self::List;
        }
        let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
        let (Some(first), second) = (lines.next(), lines.next()) else { return Self::Lines };
        if !first.starts_with(b"{") {
            return Self::Lines;
        }
        let parse = |text: &[u8]| serde_json::from_slice::<IgnoredAny>(text);
        let holds = || {
            let mut pieces = Pieces::new(text);
            let entered = pieces.enter_holder(&mut Vec::new()).unwrap_or(false);
            entered && pieces.peek().is_ok_and(|byte| matches!(byte, None | Some(b'{' | b']')))
        };
        // A row may have a list, too.
        let is_row = || {
            let keys = serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(first).unwrap_or_default();
            OF_ROWS.iter().any(|key| keys.contains_key(*key))
        };
        match (parse(first), second) {
            (Ok(_), None) if is_whole && holds() && !is_row() => Self::Holder,
            (Ok(_), _) => Self::Lines,
            (Err(error), _) if !error.is_eof() => Self::Lines,
            // The first line is cut off, or all there is.
            (Err(_), None) => {
                if holds() {
                    Self::Holder
                } else {
                    Self::Lines
                }
            }
            // A row over several lines goes on with a key, a message or a bracket. Where the next row follows, the first is cut off.
            (Err(_), Some(second)) => {
                let follows = second.starts_with(b"{") && (!first.ends_with(b"[") || parse(second).is_ok());
                if follows {
                    Self::Lines
                } else if holds() {
                    Self::Holder
                } else {
                    Self::Values
                }
            }
        }
    }

    /// What it is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Lines => "JSONL",
            Self::List | Self::Holder => "JSON list",
            Self::Values => "JSON",
        }
    }
}

/// A row's text, or why there is none.
pub(super) type Piece<'r> = Result<&'r [u8], Problem>;

/// Calls `each` with the number and the text of each row, and with the line that it begins in where a row may have several. Rows of
/// [`Layout::Lines`] have their lines as numbers; others are counted from 1.
///
/// # Errors
/// When the file cannot be read, or is cut off or malformed between its rows; whatever `each` returns.
pub(super) fn rows(
    name: &Path,
    bytes: impl BufRead,
    layout: Layout,
    each: impl FnMut(usize, Option<usize>, Piece<'_>) -> Result<()>,
) -> Result<()> {
    match layout {
        Layout::Lines => lines(name, bytes, each),
        _ => Values { name, pieces: Pieces::new(bytes), row: 0, layout }.rows(each),
    }
}

fn lines(
    name: &Path,
    mut bytes: impl BufRead,
    mut each: impl FnMut(usize, Option<usize>, Piece<'_>) -> Result<()>,
) -> Result<()> {
    let place = || name.display().to_string();
    let (mut buffer, mut line) = (Vec::new(), 0);
    loop {
        buffer.clear();
        let read = bytes.by_ref().take(ROW_BYTES_MAX as u64 + 1).read_until(b'\n', &mut buffer).with_context(place)?;
        if read == 0 {
            return Ok(());
        }
        line += 1;
        if buffer.len() > ROW_BYTES_MAX && !buffer.ends_with(b"\n") {
            skip_line(&mut bytes).with_context(place)?;
            each(line, None, Err(Problem::new(TOO_BIG, too_big())))?;
            continue;
        }
        let text = buffer.trim_ascii();
        if !text.is_empty() {
            each(line, None, Ok(text))?;
        }
    }
}

/// Reads to the end of the line, and keeps nothing of it.
fn skip_line(bytes: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = match bytes.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            buffer => buffer?,
        };
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(buffer.len(), |end| end + 1);
        bytes.consume(taken);
        if end.is_some() || taken == 0 {
            return Ok(());
        }
    }
}

/// Rows that are values, whatever lines they lie in.
struct Values<'a, R> {
    name: &'a Path,
    pieces: Pieces<R>,
    row: usize,
    layout: Layout,
}

impl<R: BufRead> Values<'_, R> {
    fn rows(mut self, mut each: impl FnMut(usize, Option<usize>, Piece<'_>) -> Result<()>) -> Result<()> {
        let mut buffer = Vec::new();
        match self.layout {
            Layout::List => {
                self.peek()?;
                self.pieces.take();
            }
            Layout::Holder => {
                let place = || self.name.display().to_string();
                let entered = self.pieces.enter_holder(&mut buffer).with_context(place)?;
                anyhow::ensure!(entered, "{}: cut off before the list of its rows", self.name.display());
            }
            Layout::Lines | Layout::Values => {}
        }
        let is_list = self.layout != Layout::Values;
        loop {
            match self.peek()? {
                None if is_list => return Err(self.cut_off()),
                None => return Ok(()),
                Some(b']') if is_list => break,
                // `[1,]` says as much as `[1]`.
                Some(b',') if self.row > 0 => {
                    self.pieces.take();
                    continue;
                }
                Some(b']' | b'}' | b',' | b':') => return Err(self.malformed("a row is missing")),
                Some(_) => {}
            }
            let line = self.pieces.line;
            self.row += 1;
            match self.read(&mut buffer)? {
                Read::Whole => each(self.row, Some(line), Ok(&buffer))?,
                Read::TooBig => each(self.row, Some(line), Err(Problem::new(TOO_BIG, too_big())))?,
                Read::CutOff => return Err(self.cut_off()),
            }
            match self.peek()? {
                Some(b',' | b']') | None if is_list => {}
                _ if is_list => return Err(self.malformed("there is no comma")),
                _ => {}
            }
        }
        self.pieces.take();
        if self.layout == Layout::Holder {
            self.leave_holder(&mut buffer)?;
        }
        match self.peek()? {
            None => Ok(()),
            Some(_) => Err(self.malformed("something follows the list of rows")),
        }
    }

    /// Reads what an object has behind its rows.
    fn leave_holder(&mut self, buffer: &mut Vec<u8>) -> Result<()> {
        loop {
            match self.peek()? {
                Some(b'}') => {
                    self.pieces.take();
                    return Ok(());
                }
                Some(b',' | b':') => self.pieces.take(),
                None => return Err(self.cut_off()),
                Some(b']') => return Err(self.malformed("a bracket closes nothing")),
                Some(_) => {
                    if let Read::CutOff = self.read(buffer)? {
                        return Err(self.cut_off());
                    }
                    let key = serde_json::from_slice::<String>(buffer).unwrap_or_default();
                    let is_another = matches!(&*key, "validation" | "valid" | "test" | "dev" | "eval");
                    if (is_another || HOLDERS.contains(&&*key)) && self.peek()? == Some(b':') {
                        self.pieces.take();
                        if self.peek()? == Some(b'[') {
                            return Err(anyhow!(
                                "{}: it holds several lists, `{key}` among them\nhint: write each as a file of its own, such as train.json and valid.json in one folder",
                                self.name.display()
                            ));
                        }
                    }
                }
            }
        }
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        self.pieces.peek().with_context(|| self.name.display().to_string())
    }

    fn read(&mut self, buffer: &mut Vec<u8>) -> Result<Read> {
        self.pieces.value(buffer).with_context(|| self.name.display().to_string())
    }

    fn cut_off(&self) -> anyhow::Error {
        anyhow!("{}: cut off in or behind row {}, in line {}", self.name.display(), self.row.max(1), self.pieces.line)
    }

    fn malformed(&self, what: &str) -> anyhow::Error {
        let Self { name, row, pieces, .. } = self;
        anyhow!("{}: not JSON: {what} behind row {row}, in line {}", name.display(), pieces.line)
    }
}

/// What came of reading a value.
#[derive(Clone, Copy, PartialEq)]
enum Read {
    Whole,
    TooBig,
    CutOff,
}

/// The values of a JSON text, by their brackets alone.
struct Pieces<R> {
    bytes: R,
    /// The line of the next byte, from 1.
    line: usize,
}

impl<R: BufRead> Pieces<R> {
    fn new(bytes: R) -> Self {
        Self { bytes, line: 1 }
    }

    fn fill(&mut self) -> io::Result<&[u8]> {
        loop {
            match self.bytes.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                // Asked again, as a buffer cannot be borrowed over the end of a loop.
                Ok(_) => return self.bytes.fill_buf(),
            }
        }
    }

    /// The next byte that is not white space, which stays.
    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.fill()?;
            let at = buffer.iter().position(|byte| !byte.is_ascii_whitespace());
            let (taken, found) = (at.unwrap_or(buffer.len()), at.map(|at| buffer[at]));
            let lines = buffer[..taken].iter().filter(|byte| **byte == b'\n').count();
            let is_end = buffer.is_empty();
            self.line += lines;
            self.bytes.consume(taken);
            if found.is_some() || is_end {
                return Ok(found);
            }
        }
    }

    /// Takes the byte that was seen.
    fn take(&mut self) {
        self.bytes.consume(1);
    }

    /// Reads the value that begins at the byte that was seen.
    fn value(&mut self, into: &mut Vec<u8>) -> io::Result<Read> {
        into.clear();
        let (mut depth, mut in_string, mut is_escaped, mut is_big) = (0_usize, false, false, false);
        let mut is_begun = false;
        loop {
            let buffer = self.fill()?;
            if buffer.is_empty() {
                let whole = is_begun && depth == 0 && !in_string;
                return Ok(if whole { Read::Whole } else { Read::CutOff });
            }
            let (mut taken, mut is_end) = (0, false);
            for byte in buffer {
                if in_string {
                    in_string = is_escaped || *byte != b'"';
                    is_escaped = !is_escaped && *byte == b'\\';
                    is_end = depth == 0 && !in_string;
                } else {
                    match byte {
                        b'"' => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' if depth > 0 => {
                            depth -= 1;
                            is_end = depth == 0;
                        }
                        // What is no bracket ends before it.
                        b'}' | b']' | b',' | b':' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => break,
                        _ => {}
                    }
                }
                taken += 1;
                is_begun = true;
                if is_end {
                    break;
                }
            }
            let is_end = is_end || taken < buffer.len();
            is_big |= into.len() + taken > ROW_BYTES_MAX;
            let lines = buffer[..taken].iter().filter(|byte| **byte == b'\n').count();
            match is_big {
                true => into.clear(),
                false => into.extend_from_slice(&buffer[..taken]),
            }
            self.line += lines;
            self.bytes.consume(taken);
            if is_end {
                return Ok(if is_big { Read::TooBig } else { Read::Whole });
            }
        }
    }

    /// Goes to the first row of an object that holds rows; false: it holds none, as far as it goes.
    fn enter_holder(&mut self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        if self.peek()? != Some(b'{') {
            return Ok(false);
        }
        self.take();
        while self.peek()? == Some(b'"') {
            let key = match self.value(buffer)? {
                Read::Whole => serde_json::from_slice::<String>(buffer).unwrap_or_default(),
                _ => return Ok(false),
            };
            if OF_ROWS.contains(&&*key) || self.peek()? != Some(b':') {
                return Ok(false);
            }
            self.take();
            if HOLDERS.contains(&&*key) && self.peek()? == Some(b'[') {
                self.take();
                return Ok(true);
            }
            if self.peek()?.is_none() || self.value(buffer)? == Read::CutOff || self.peek()? != Some(b',') {
                return Ok(false);
            }
            self.take();
        }
        Ok(false)
    }
}

/// The fields of a row. `line`: the one that it begins in, where it may have several.
///
/// # Errors
/// Why it is none.
pub(super) fn object(bytes: &[u8], line: Option<usize>) -> Result<Map<String, Json>, Problem> {
    let of = if line.is_none() { "line" } else { "row" };
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Problem::new(NOT_UTF8, format!("{NOT_UTF8}: byte {} of the {of}", e.valid_up_to() + 1)))?;
    let json = serde_json::from_str::<Strict>(text).map_err(|error| refused(text, line, &error))?;
    match json.0 {
        Json::Object(fields) => Ok(fields),
        other => Err(Problem::new(UNKNOWN_ROW, format!("not an object but {}", kind_of(&other)))),
    }
}

fn refused(text: &str, line: Option<usize>, error: &serde_json::Error) -> Problem {
    let (at_line, column) = (error.line(), error.column());
    let message = error.to_string();
    let what = message.strip_suffix(&format!(" at line {at_line} column {column}")).unwrap_or(&message);
    let place = match line {
        // serde_json counts lines too, and ours is its only one.
        None => format!("at column {column}"),
        Some(first) => format!("at line {}, column {column}", first + at_line.max(1) - 1),
    };
    if let Some(key) = what.strip_prefix(TWICE) {
        return Problem::new(
            BAD_ROW,
            format!("`{key}` stands twice in one object, {place}; which of them counts is not clear"),
        );
    }
    let at = text.lines().nth(at_line.saturating_sub(1)).and_then(|line| line.get(column.saturating_sub(1)..));
    let word = at.and_then(|at| ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| at.starts_with(word)));
    // The sign was read when the word is met.
    let word = word.or_else(|| at.filter(|at| at.starts_with('I')).map(|_| "Infinity"));
    match word {
        Some(word) => Problem::new(NOT_JSON, format!("{NOT_JSON}: {word} is no number of JSON, {place}; write null")),
        None => Problem::new(NOT_JSON, format!("{NOT_JSON}: {what} {place}")),
    }
}

const TWICE: &str = "twice: ";

/// JSON as serde_json reads it, but a key that stands twice in an object is refused: of the two one would be lost.
struct Strict(Json);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Number::from_f64(value).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Json::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format!("{TWICE}{key}")));
            }
            let Strict(value) = entries.next_value()?;
            fields.insert(key, value);
        }
        Ok(Json::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    /// The rows of a text with their numbers and lines, read through a buffer of some bytes; or why there are none.
    fn told(text: &str, capacity: usize) -> String {
        let layout = Layout::of(text.as_bytes(), true);
        let mut out = format!("{layout:?}");
        let read =
            rows(Path::new("f"), BufReader::with_capacity(capacity, text.as_bytes()), layout, |row, line, text| {
                let text =
                    text.map_or_else(|problem| format!("! {problem}"), |text| String::from_utf8_lossy(text).into());
                let line = line.map(|line| format!("@{line}")).unwrap_or_default();
                out += &format!(" {row}{line}={text}");
                Ok(())
            });
        if let Err(error) = read {
            out += &format!(" {error:#}");
        }
        out
    }

    #[test]
    fn rows_are_found_by_their_brackets_whatever_lies_in_strings() {
        let check = |text: &str, expected: &str| {
            for capacity in [1, 3, 4096] {
                assert_eq!(told(text, capacity), expected, "{text:?}, {capacity}");
            }
        };
        check("", "Lines");
        check("{\"a\":1}\r\n\n{\"b\":[\"}\"]}", "Lines 1={\"a\":1} 3={\"b\":[\"}\"]}");
        check("[]", "List");
        check(" [ ] ", "List");
        check("[{\"a\":\"]\\\"}\"},\n\n {\"b\":[1]} , 3,]", "List 1@1={\"a\":\"]\\\"}\"} 2@3={\"b\":[1]} 3@3=3");
        check("{\n \"a\": 1\n}\n{\n \"b\": {}}", "Values 1@1={\n \"a\": 1\n} 2@4={\n \"b\": {}}");
        check("{\"messages\": [\n{\"role\": 1},\n2]}", "Values 1@1={\"messages\": [\n{\"role\": 1},\n2]}");
        check(
            "{\"version\": [1], \"data\": [{\"a\": 1}, {\"b\": 2}], \"n\": {\"x\": []}}",
            "Holder 1@1={\"a\": 1} 2@1={\"b\": 2}",
        );
        check("{\n  \"rows\": [\n    {\"a\": 1}\n  ]\n}", "Holder 1@3={\"a\": 1}");
        check("{\"text\": \"a\", \"data\": [1]}", "Lines 1={\"text\": \"a\", \"data\": [1]}");
        check("{\"data\": [{}], \"text\": \"a\"}", "Lines 1={\"data\": [{}], \"text\": \"a\"}");
        check("{\"data\": [1], \"x\": 2}", "Lines 1={\"data\": [1], \"x\": 2}");
        check("{\"data\": [1]}\n{\"data\": [2]}", "Lines 1={\"data\": [1]} 2={\"data\": [2]}");
        // Rows that are cut off are not taken for the beginning of one.
        check("{\"text\": \"a\n{\"text\": \"b\"}", "Lines 1={\"text\": \"a 2={\"text\": \"b\"}");
        check("{\n{\n", "Lines 1={ 2={");
        check("{\"text\" 1}", "Lines 1={\"text\" 1}");
    }

    #[test]
    fn a_list_that_is_cut_off_or_malformed_says_where() {
        let check = |text: &str, expected: &str| {
            let told = told(text, 5);
            assert!(told.ends_with(expected), "{text:?}: {told}");
        };
        check("[{\"a\":1},\n{\"b\": [2}", "f: cut off in or behind row 2, in line 2");
        check("[{\"a\":1},", "f: cut off in or behind row 1, in line 1");
        check("[{\"a\":\"x", "f: cut off in or behind row 1, in line 1");
        check("[{\"a\":1}\n{\"b\":2}]", "f: not JSON: there is no comma behind row 1, in line 2");
        check("[,{\"a\":1}]", "f: not JSON: a row is missing behind row 0, in line 1");
        check("[{\"a\":1}]\n[{\"b\":2}]", "f: not JSON: something follows the list of rows behind row 1, in line 2");
        check("{\"data\":[{\"a\":1}]", "f: cut off in or behind row 1, in line 1");
        check(
            "{\"train\":[{\"a\":1}],\n\"test\":[{\"b\":2}]}",
            "f: it holds several lists, `test` among them\nhint: write each as a file of its own, such as train.json and valid.json in one folder",
        );
    }

    #[test]
    fn a_row_that_is_too_big_is_read_over() {
        let big = format!("{{\"text\": \"{}\"}}", "x".repeat(ROW_BYTES_MAX));
        let small = "{\"text\": \"a\"}";
        let expected = "1=! longer than 8 MiB, the most that a row may have; cut it into passages 2={\"text\": \"a\"}";
        assert_eq!(told(&format!("{big}\n{small}\n"), 1 << 16), format!("Lines {expected}"));
        let listed = told(&format!("[{big}, {small}]"), 1 << 16).replace("@1", "");
        assert_eq!(listed, format!("List {expected}"));
    }

    #[test]
    fn a_row_is_refused_where_something_of_it_would_be_lost() {
        let check = |text: &str, expected: &str| {
            assert_eq!(object(text.as_bytes(), None).unwrap_err().to_string(), expected, "{text}");
        };
        check(r#"{"a": 1, "a": 2}"#, "`a` stands twice in one object, at column 12; which of them counts is not clear");
        check(
            r#"{"m": [{"b": 1, "b": 1}]}"#,
            "`b` stands twice in one object, at column 19; which of them counts is not clear",
        );
        check(r#"{"a": NaN}"#, "not JSON: NaN is no number of JSON, at column 7; write null");
        check(r#"{"a": -Infinity}"#, "not JSON: Infinity is no number of JSON, at column 8; write null");
        check(r#"{"a": "\ud800"}"#, "not JSON: unexpected end of hex escape at column 14");
        check(
            "{\"a\": \"\0\"}",
            "not JSON: control character (\\u0000-\\u001F) found while parsing a string at column 8",
        );
        check(r#"{"a": 1} {"b": 2}"#, "not JSON: trailing characters at column 10");
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        check(&deep, "not JSON: recursion limit exceeded at column 133");
        let lines = "{\n \"a\": tru\n}";
        let told = object(lines.as_bytes(), Some(7)).unwrap_err().to_string();
        assert_eq!(told, "not JSON: expected ident at line 9, column 0");
        let told = object(b"{\n \"a\": x}", Some(7)).unwrap_err().to_string();
        assert_eq!(told, "not JSON: expected value at line 8, column 7");
        // What is not learned may be any number.
        let huge = object(br#"{"a": 123456789012345678901234567890, "b": 1e308}"#, None).unwrap();
        assert_eq!(huge["b"], 1e308);
    }
}
