//! The source of a chat template, read before minijinja compiles it.
//!
//! minijinja counts a template's work (its *fuel*), but not what happens inside one operation: comparing, joining or
//! printing values walks them to the end, however often they hold one another. This reader finds those operations and
//! lets a filter of [`super::bounds`] weigh their operands first; it also bounds how deep expressions nest, because
//! compiling recurses. What it inserts changes no value and no line number.
//!
//! Strings, numbers, brackets and the ends of tags are read as in minijinja's `compiler/lexer.rs`, so that nothing is a
//! string for one of the two and an operator for the other.

use std::borrow::Cow;
use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use minijinja::Environment;

use super::NAME;
use super::lexer::{Kind, Token, basic_tag, lex};

/// Longest source, in bytes. The longest templates of published models have some 20,000.
const BYTES_MAX: usize = 1 << 20;
/// Most tokens of an expression on the way from its outside to its innermost part.
const DEPTH_MAX: usize = 4000;
/// Most brackets inside one another; minijinja itself stops at half of 150.
const BRACKETS_MAX: usize = 100;
/// Most `{% elif %}`, each of which nests in the one before.
const BRANCHES_MAX: usize = 1000;
/// Most places in all assignments together, or in a template that calls itself, that put a value into another (a list, a
/// slice, `batch`) before values may nest deeper than the stack of a pool's thread allows.
const WRAPS_MAX: usize = 500;
const WRAPS_CALLED_MAX: usize = 50;
/// Filters and functions that put a value into another.
const WRAPPING: [&str; 9] = ["batch", "dict", "dictsort", "groupby", "items", "map", "namespace", "slice", "zip"];

/// Filters that walk their value, or print it.
const WALKING_FILTERS: [&str; 23] = [
    "attr",
    "capitalize",
    "chain",
    "dictsort",
    "e",
    "escape",
    "format",
    "groupby",
    "indent",
    "join",
    "lower",
    "max",
    "min",
    "pprint",
    "replace",
    "safe",
    "sort",
    "string",
    "sum",
    "title",
    "unique",
    "upper",
    "zip",
];
/// Longest sum whose operands are not looked at, if a text is among them: then it is no sum of lists, or fails.
const TERMS_MAX: usize = 16;

/// A source that may be compiled.
pub(super) struct Checked {
    /// The source with operands weighed.
    pub text: String,
    /// Rendering may nest values or calls so deep that it needs a stack of its own.
    pub deep: bool,
    /// Texts that the template may write: what stands outside of tags, and strings in them, with NUL between; then
    /// the same with nothing between, for what is put together of several.
    pub written: String,
}

/// Reads `source`.
///
/// # Errors
/// When it is longer or nests deeper than a template does, or its brackets do not match. Names the line.
pub(super) fn check(source: &str) -> Result<Checked> {
    ensure!(source.len() <= BYTES_MAX, "{NAME}: has {} bytes, at most {BYTES_MAX} are read", source.len());
    let mut reader = Reader { source, ..Reader::default() };
    reader.read()?;
    Ok(reader.finish())
}

/// What an operand is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operand {
    /// A number, a string, a truth value: nothing to walk.
    Plain,
    /// A list of such.
    PlainList,
    Unknown,
}

/// Operands and operators between two of `and`, `or`, `not`, `if`, `else`, `,`, `:` and `=`.
#[derive(Default)]
struct Comparison<'a> {
    /// Each with the byte where a filter on it can be inserted.
    operands: Vec<(Operand, usize)>,
    operators: Vec<&'a str>,
}

/// What stands around an expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    Tag,
    Parentheses,
    List,
    Map,
    Subscript,
    /// Arguments that are compared or printed.
    WalkedArguments,
}

/// What an expression was.
#[derive(Clone, Copy, Debug)]
struct Read {
    /// Tokens on the way to its innermost part.
    depth: usize,
    operand: Operand,
    /// It stands in a subscript, with a colon.
    slice: bool,
}

/// An assignment to an attribute of a namespace.
struct Kept {
    start: usize,
    end: usize,
    wraps: usize,
    lazy: bool,
}

#[derive(Default)]
struct Reader<'a> {
    source: &'a str,
    tokens: Vec<Token<'a>>,
    at: usize,
    /// What is inserted where, in place of how many bytes.
    insertions: Vec<(usize, String, usize)>,
    kept: Vec<Kept>,
    namespaces: HashSet<&'a str>,
    /// Names that occur other than as `name.attribute` or `name[item]`.
    bare: HashSet<&'a str>,
    branches: usize,
    /// Of the tag that is being read: places that put values into others, and whether some only do when they are walked.
    wraps: usize,
    lazy: bool,
    /// The tag filters what it holds, so its calls are filters.
    filters: bool,
    /// The operand is what a string is formatted with: `'%s' % x % y` formats the string once.
    formatted: bool,
    wraps_assigned: usize,
    wraps_in_all: usize,
    /// There are macros, blocks or loops that may call themselves.
    calls: bool,
    deep: bool,
    written: String,
    /// The same with nothing between.
    joined: String,
}

/// What a string literal stands for.
fn value_of(literal: &str) -> Cow<'_, str> {
    let inner = &literal[1..literal.len() - 1];
    if !inner.contains('\\') {
        return Cow::Borrowed(inner);
    }
    let env = Environment::empty();
    let value = env.compile_expression(literal).and_then(|expression| expression.eval(()));
    let text = value.ok().and_then(|value| value.as_str().map(str::to_owned));
    text.map_or(Cow::Borrowed(inner), Cow::Owned)
}

impl<'a> Reader<'a> {
    fn read(&mut self) -> Result<()> {
        let mut at = 0;
        while let Some(found) = self.source[at..].find('{') {
            let start = at + found;
            self.note_written(at, start);
            let bytes = self.source.as_bytes();
            let trimmed = matches!(bytes.get(start + 2), Some(b'-' | b'+'));
            let inner = start + 2 + usize::from(trimmed);
            at = match bytes.get(start + 1) {
                Some(b'#') => match self.source.get(inner..).and_then(|rest| rest.find("#}")) {
                    Some(end) => inner + end + 2,
                    None => return Ok(()),
                },
                Some(b'%') => match basic_tag(&self.source[inner..], "raw", false) {
                    Some(len) => {
                        let end = self.end_of_raw(inner + len);
                        self.note_written(inner + len, end);
                        end
                    }
                    None => self.tag(inner, "%}")?,
                },
                Some(b'{') => self.tag(inner, "}}")?,
                _ => {
                    self.note_written(start, start + 1);
                    start + 1
                }
            };
        }
        self.note_written(at, self.source.len());
        Ok(())
    }

    fn note_written(&mut self, from: usize, to: usize) {
        self.written.push_str(&self.source[from..to]);
        self.joined.push_str(&self.source[from..to]);
    }

    fn end_of_raw(&self, start: usize) -> usize {
        let mut at = start;
        while let Some(found) = self.source[at..].find("{%") {
            at += found + 2;
            if let Some(len) = basic_tag(&self.source[at..], "endraw", true) {
                return at + len;
            }
        }
        self.source.len()
    }

    /// Reads one tag from behind its opening delimiter; returns where the text behind it begins.
    fn tag(&mut self, start: usize, close: &str) -> Result<usize> {
        let end = match lex(self.source, start, close, &mut self.tokens) {
            Ok(end) => end,
            Err((at, what)) => bail!("{}: syntax error: {what}", self.place(at)),
        };
        self.written.push('\0');
        for token in self.tokens.iter().filter(|token| token.kind == Kind::Text) {
            let text = value_of(token.text);
            self.written.push_str(&text);
            self.written.push('\0');
            self.joined.push_str(&text);
        }
        (self.at, self.wraps, self.lazy, self.filters) = (0, 0, false, false);
        let tokens = self.tokens.len();
        if close == "}}" {
            self.expressions()?;
            self.wraps_in_all += self.wraps;
            return Ok(end);
        }
        let word = match self.tokens.first() {
            Some(token) if token.kind == Kind::Name => token.text,
            _ => return Ok(end),
        };
        self.at = 1;
        match word {
            "set" => self.assignment(end)?,
            "for" => {
                self.at = self.find_at_top("in").map_or(tokens, |at| at + 1);
                self.expressions()?;
                self.calls |= self.tokens.last().is_some_and(|token| token.text == "recursive");
            }
            "elif" => {
                self.branches += 1;
                ensure!(self.branches <= BRANCHES_MAX, "{}: has more than {BRANCHES_MAX} branches", self.place(start));
                self.expressions()?;
            }
            "macro" | "call" | "block" => {
                self.calls = true;
                self.expressions()?;
            }
            _ => {
                self.filters = word == "filter";
                self.expressions()?;
            }
        }
        self.wraps_in_all += self.wraps;
        Ok(end)
    }

    fn assignment(&mut self, end: usize) -> Result<()> {
        let Some(equals) = self.find_at_top("=") else {
            self.filters = true;
            self.expressions()?;
            return Ok(());
        };
        let attribute = self.tokens[1..equals].iter().any(|token| token.text == ".");
        let values = &self.tokens[equals + 1..];
        let namespace = values.first().is_some_and(|t| t.text == "namespace")
            && values.get(1).is_some_and(|t| t.text == "(")
            && equals == 2
            && self.closes_at_end(equals + 2);
        let (first, last) = (values.first().map(|t| t.start), values.last().map(Token::end));
        self.at = equals + 1;
        if namespace {
            self.namespaces.insert(self.tokens[1].text);
            self.at += 1;
        }
        let read = self.expressions()?;
        self.wraps_assigned += self.wraps;
        self.deep |= self.wraps_assigned > WRAPS_MAX;
        if attribute && read.operand != Operand::Plain {
            let (start, end) = (first.unwrap_or(end), last.unwrap_or(end));
            self.kept.push(Kept { start, end, wraps: self.wraps, lazy: self.lazy });
            self.deep |= self.wraps > 0;
        }
        Ok(())
    }

    /// Whether the bracket at `open` is closed by the last token.
    fn closes_at_end(&self, open: usize) -> bool {
        let mut depth = 0usize;
        for (at, token) in self.tokens.iter().enumerate().skip(open).filter(|(_, t)| t.kind == Kind::Operator) {
            match token.text {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 {
                return at + 1 == self.tokens.len();
            }
        }
        false
    }

    /// The first token outside of brackets that reads `text`.
    fn find_at_top(&self, text: &str) -> Option<usize> {
        let mut depth = 0usize;
        for (at, token) in self.tokens.iter().enumerate() {
            match token.text {
                _ if token.kind == Kind::Text => {}
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ if depth == 0 && token.text == text => return Some(at),
                _ => {}
            }
        }
        None
    }

    /// Everything up to the end of the tag.
    fn expressions(&mut self) -> Result<Read> {
        self.group(Within::Tag, 0)
    }

    /// Reads up to the bracket that closes this group, and over it.
    fn group(&mut self, within: Within, nesting: usize) -> Result<Read> {
        if nesting > BRACKETS_MAX {
            bail!("{}: nests more than {BRACKETS_MAX} brackets", self.place(self.here()));
        }
        let formatted = std::mem::take(&mut self.formatted);
        let mut comparison = Comparison::default();
        // Tokens since the last comma, the deepest group among them, and the most of both so far.
        let (mut length, mut inner, mut depth) = (0, 0, 0);
        let (mut pieces, mut plain) = (0, true);
        let mut slice = false;
        let mut sole = Operand::Plain;
        while let Some(token) = self.peek() {
            length += 1;
            depth = depth.max(length + inner);
            self.check_depth(depth)?;
            let follows_operand = comparison.operands.len() > comparison.operators.len();
            match (token.kind, token.text) {
                (Kind::Operator, ")" | "]" | "}") => break,
                (Kind::Operator, separator @ ("," | ":" | "=")) => {
                    self.at += 1;
                    slice |= separator == ":";
                    // What stands before "=" is a name.
                    let walked = (within == Within::WalkedArguments && separator != "=")
                        || (within == Within::Map && separator == ":");
                    let done = std::mem::take(&mut comparison);
                    plain &= self.weigh(&done, walked) == Operand::Plain;
                    pieces += 1;
                    if separator == "," {
                        depth = depth.max(length + inner);
                        (length, inner) = (0, 0);
                    }
                }
                (Kind::Operator, "(" | "[" | "{") => {
                    self.operand(&mut comparison, nesting, &mut inner)?;
                }
                (Kind::Operator, _) => {
                    self.at += 1;
                    // A sign, or the star of an unpacked argument, stands before an operand.
                    if follows_operand {
                        comparison.operators.push(token.text);
                    }
                }
                (Kind::Name, "not") if self.text_at(self.at + 1) == Some("in") => {
                    self.at += 2;
                    comparison.operators.push("in");
                }
                (Kind::Name, "in") => {
                    self.at += 1;
                    comparison.operators.push("in");
                }
                (Kind::Name, "and" | "or" | "not" | "if" | "else" | "recursive") => {
                    self.at += 1;
                    let done = std::mem::take(&mut comparison);
                    plain &= self.weigh(&done, within == Within::WalkedArguments) == Operand::Plain;
                    pieces += 1;
                }
                _ => {
                    if follows_operand {
                        let done = std::mem::take(&mut comparison);
                        self.weigh(&done, within == Within::WalkedArguments);
                        plain = false;
                        pieces += 1;
                    }
                    self.operand(&mut comparison, nesting, &mut inner)?;
                }
            }
        }
        depth = depth.max(length + inner);
        self.check_depth(depth)?;
        if !comparison.operands.is_empty() {
            let walked = match within {
                Within::WalkedArguments => true,
                // Numbers come out of these.
                Within::Subscript => {
                    !slice && !comparison.operators.iter().any(|o| matches!(*o, "-" | "*" | "/" | "//" | "%" | "**"))
                }
                _ => false,
            };
            sole = self.weigh(&comparison, walked);
            plain &= sole == Operand::Plain;
            pieces += 1;
        }
        match within {
            Within::Tag => {
                ensure!(self.at == self.tokens.len(), "{}: its brackets do not match", self.place(self.here()))
            }
            _ => self.at += 1,
        }
        self.formatted = formatted;
        match within {
            Within::Subscript if slice => (self.wraps, self.lazy) = (self.wraps + 1, true),
            Within::List | Within::Map if !plain => self.wraps += 1,
            // With commas, a tuple.
            Within::Parentheses if pieces > 1 && !plain => self.wraps += 1,
            Within::Tag if pieces > 1 && !plain => self.wraps += 1,
            _ => {}
        }
        let operand = match within {
            Within::List if plain => Operand::PlainList,
            Within::Parentheses | Within::Tag if pieces == 1 => sole,
            _ => Operand::Unknown,
        };
        Ok(Read { depth, operand, slice })
    }

    fn check_depth(&self, depth: usize) -> Result<()> {
        ensure!(depth <= DEPTH_MAX, "{}: an expression nests deeper than {DEPTH_MAX}", self.place(self.here()));
        Ok(())
    }

    /// Reads an operand with what is called, indexed, filtered and tested behind it.
    fn operand(&mut self, comparison: &mut Comparison<'a>, nesting: usize, inner: &mut usize) -> Result<()> {
        let start = self.here();
        let mut operand = self.primary(nesting, inner)?;
        loop {
            operand = self.postfix(operand, start, nesting, inner)?;
            match self.text_of_mark() {
                Some("|") => {
                    let before = self.here();
                    self.at += 1;
                    let name = self.dotted_name();
                    let walks = WALKING_FILTERS.contains(&name);
                    if walks && operand != Operand::Plain {
                        self.insert(before, "|homeroom_weighed");
                    }
                    self.wraps += usize::from(WRAPPING.contains(&name));
                    self.lazy = true;
                    *inner += 1;
                    if self.text_of_mark() == Some("(") {
                        let within = if walks { Within::WalkedArguments } else { Within::Parentheses };
                        self.nested(within, nesting, inner)?;
                    }
                    operand = Operand::Unknown;
                }
                _ if self.word() == Some("is") => {
                    self.at += 1;
                    if self.word() == Some("not") {
                        self.at += 1;
                    }
                    self.dotted_name();
                    *inner += 1;
                    if self.text_of_mark() == Some("(") {
                        self.nested(Within::Parentheses, nesting, inner)?;
                    } else if self.begins_argument_of_test() {
                        while self.text_of_mark() == Some("-") {
                            self.at += 1;
                        }
                        let start = self.here();
                        let argument = self.primary(nesting, inner)?;
                        self.postfix(argument, start, nesting, inner)?;
                    }
                    operand = Operand::Plain;
                }
                // A string of the template, formatted: minijinja has `%` for numbers only.
                Some("%")
                    if !self.formatted
                        && operand == Operand::Plain
                        && self.before().is_some_and(|last| last.kind == Kind::Text) =>
                {
                    let place = self.here();
                    self.at += 1;
                    while matches!(self.text_of_mark(), Some("-" | "+")) {
                        self.at += 1;
                    }
                    let mut formatted = Comparison::default();
                    self.formatted = true;
                    self.operand(&mut formatted, nesting, inner)?;
                    self.formatted = false;
                    *inner += 1;
                    let end = formatted.operands.first().map_or(place + 1, |(_, end)| *end);
                    self.insertions.push((place, "|homeroom_percent(".into(), 1));
                    self.insert(end, ")");
                    operand = Operand::Unknown;
                }
                _ => break,
            }
        }
        let end = self.before().map_or(0, Token::end);
        comparison.operands.push((operand, end));
        Ok(())
    }

    fn primary(&mut self, nesting: usize, inner: &mut usize) -> Result<Operand> {
        let Some(token) = self.peek() else {
            return Ok(Operand::Unknown);
        };
        match (token.kind, token.text) {
            (Kind::Operator, open @ ("(" | "[" | "{")) => {
                let within = match open {
                    "(" => Within::Parentheses,
                    "[" => Within::List,
                    _ => Within::Map,
                };
                self.nested(within, nesting, inner)
            }
            (Kind::Text, _) => {
                while self.peek().is_some_and(|next| next.kind == Kind::Text) {
                    self.at += 1;
                }
                Ok(Operand::Plain)
            }
            (kind, text) => {
                self.at += 1;
                let constant = matches!(text, "true" | "True" | "false" | "False" | "none" | "None");
                if kind == Kind::Name && !constant && !matches!(self.text_of_mark(), Some("." | "[")) {
                    self.bare.insert(text);
                }
                Ok(if kind == Kind::Number || constant { Operand::Plain } else { Operand::Unknown })
            }
        }
    }

    /// Attributes, subscripts and calls behind the operand that began at byte `start`.
    fn postfix(&mut self, mut operand: Operand, start: usize, nesting: usize, inner: &mut usize) -> Result<Operand> {
        let mut called = self.before().map_or("", |last| last.text);
        while let Some(mark @ ("." | "[" | "(")) = self.text_of_mark() {
            operand = Operand::Unknown;
            *inner += 1;
            match mark {
                "." => {
                    self.at += 2;
                    called = self.text_at(self.at - 1).unwrap_or_default();
                }
                "[" => {
                    let open = self.here();
                    self.at += 1;
                    let read = self.group(Within::Subscript, nesting + 1)?;
                    *inner = (*inner).max(read.depth);
                    if read.slice {
                        // A slice of a list is only carried out, from its beginning, when it is walked.
                        self.insert(start, "((");
                        self.insert(open, "|homeroom_sliced)");
                        let close = self.before().map_or(open, Token::end);
                        self.insert(close, "|homeroom_listed)");
                    }
                }
                _ => {
                    self.wraps += usize::from(WRAPPING.contains(&called));
                    self.lazy = true;
                    // `loop.changed(x)` compares.
                    let walked = called == "changed" || self.filters;
                    let within = if walked { Within::WalkedArguments } else { Within::Parentheses };
                    self.nested(within, nesting, inner)?;
                }
            }
        }
        Ok(operand)
    }

    fn nested(&mut self, within: Within, nesting: usize, inner: &mut usize) -> Result<Operand> {
        self.at += 1;
        let read = self.group(within, nesting + 1)?;
        *inner = (*inner).max(read.depth);
        Ok(read.operand)
    }

    /// Inserts filters on what a comparison walks, or on all operands if the result is `walked`.
    fn weigh(&mut self, comparison: &Comparison, walked: bool) -> Operand {
        let Comparison { operands, operators } = comparison;
        let compares = |o: &&str| matches!(*o, "==" | "!=" | "<" | "<=" | ">" | ">=" | "in");
        let n_compared = operators.iter().filter(|o| compares(o)).count();
        let harmless = match (&operands[..], &operators[..]) {
            ([(left, _), (right, _)], [operator]) => match *operator {
                "in" => *left == Operand::Plain || *right == Operand::PlainList,
                _ => *left == Operand::Plain || *right == Operand::Plain,
            },
            _ => false,
        };
        let all = walked || (n_compared > 0 && !harmless);
        let sums = operators.contains(&"+")
            && (operands.len() > TERMS_MAX || operands.iter().all(|(operand, _)| *operand != Operand::Plain));
        for (at, (operand, end)) in operands.iter().enumerate() {
            let beside = |text: &str| {
                let before = at.checked_sub(1).and_then(|before| operators.get(before));
                before == Some(&text) || operators.get(at) == Some(&text)
            };
            if beside("*") {
                if *operand != Operand::Plain {
                    self.insert(*end, "|homeroom_factor");
                }
            } else if *operand != Operand::Plain {
                if all || beside("~") {
                    self.insert(*end, "|homeroom_weighed");
                }
                if sums && beside("+") {
                    self.insert(*end, "|homeroom_summed");
                }
            }
        }
        match (&operands[..], n_compared) {
            ([(operand, _)], _) => *operand,
            (_, 1..) => Operand::Plain,
            _ => Operand::Unknown,
        }
    }

    fn insert(&mut self, at: usize, text: &str) {
        self.insertions.push((at, text.to_owned(), 0));
    }

    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    /// The token that was read last; none where the end was read over.
    fn before(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at.checked_sub(1)?)
    }

    fn here(&self) -> usize {
        let at = self.peek().or(self.tokens.last().copied());
        at.map_or(0, |token| token.start)
    }

    fn text_at(&self, at: usize) -> Option<&'a str> {
        self.tokens.get(at).filter(|token| token.kind != Kind::Text).map(|token| token.text)
    }

    fn text_of_mark(&self) -> Option<&'a str> {
        self.peek().filter(|token| token.kind == Kind::Operator).map(|token| token.text)
    }

    fn word(&self) -> Option<&'a str> {
        self.peek().filter(|token| token.kind == Kind::Name).map(|token| token.text)
    }

    /// The name of a filter or test; of a dotted one its last part.
    fn dotted_name(&mut self) -> &'a str {
        let name = self.word().unwrap_or_default();
        self.at += usize::from(!name.is_empty());
        while self.text_of_mark() == Some(".") {
            self.at += 2;
        }
        name
    }

    /// As in minijinja's `parse_filter_expr`.
    fn begins_argument_of_test(&self) -> bool {
        let Some(token) = self.peek() else {
            return false;
        };
        match token.kind {
            Kind::Text | Kind::Number => true,
            Kind::Name => !matches!(token.text, "and" | "or" | "else" | "is"),
            Kind::Operator => matches!(token.text, "-" | "[" | "{"),
        }
    }

    /// "chat template, line 3".
    fn place(&self, at: usize) -> String {
        let line = 1 + self.source[..at.min(self.source.len())].bytes().filter(|b| *b == b'\n').count();
        format!("{NAME}, line {line}")
    }

    fn finish(mut self) -> Checked {
        let leaks = self.bare.contains("namespace") || self.namespaces.iter().any(|name| self.bare.contains(name));
        for Kept { start, end, wraps, lazy } in std::mem::take(&mut self.kept) {
            self.insertions.push((start, "(".into(), 0));
            self.insertions.push((end, format!(")|homeroom_kept({wraps}, {lazy}, {leaks})"), 0));
        }
        // A sort that keeps the order of what is inserted at one place: the inner first.
        self.insertions.sort_by_key(|(at, ..)| *at);
        let deep = self.deep || (self.calls && self.wraps_in_all > WRAPS_CALLED_MAX);
        let mut text = String::with_capacity(self.source.len() + 64);
        let mut from = 0;
        for (at, insertion, replaced) in &self.insertions {
            text.push_str(&self.source[from..*at]);
            text.push_str(insertion);
            from = at + replaced;
        }
        text.push_str(&self.source[from..]);
        self.written.push('\0');
        self.written.push_str(&self.joined);
        Checked { text, deep, written: self.written }
    }
}
