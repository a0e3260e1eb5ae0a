//! Tokens of a chat template's tags, read as minijinja's `compiler/lexer.rs` reads them.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Text,
    Number,
    Operator,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'a> {
    pub kind: Kind,
    pub text: &'a str,
    pub start: usize,
}

impl Token<'_> {
    pub(super) fn end(&self) -> usize {
        self.start + self.text.len()
    }
}

/// Splits the tag whose inner part begins at `start` into `tokens`; returns where the text behind it begins.
///
/// # Errors
/// Where the tag cannot be split, and why.
pub(super) fn lex<'a>(
    source: &'a str,
    start: usize,
    close: &str,
    tokens: &mut Vec<Token<'a>>,
) -> Result<usize, (usize, &'static str)> {
    tokens.clear();
    let bytes = source.as_bytes();
    let mut open: Vec<u8> = Vec::new();
    let mut at = start;
    loop {
        while bytes.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        let rest = &bytes[at..];
        let Some(&first) = rest.first() else {
            return Ok(at);
        };
        if open.is_empty() {
            if rest.starts_with(close.as_bytes()) {
                return Ok(at + 2);
            }
            if matches!(first, b'-' | b'+') && rest[1..].starts_with(close.as_bytes()) {
                return Ok(at + 3);
            }
        }
        let two = matches!(rest.get(..2), Some(b"//" | b"**" | b"==" | b"!=" | b">=" | b"<="));
        let (kind, len) = match first {
            _ if two => (Kind::Operator, 2),
            b'(' | b'[' | b'{' => {
                open.push(first);
                (Kind::Operator, 1)
            }
            b')' | b']' | b'}' => {
                let matching =
                    matches!((open.pop(), first), (Some(b'('), b')') | (Some(b'['), b']') | (Some(b'{'), b'}'));
                if !matching {
                    return Err((at, "its brackets do not match"));
                }
                (Kind::Operator, 1)
            }
            b'+' | b'-' | b'*' | b'/' | b'%' | b'.' | b',' | b':' | b'~' | b'|' | b'=' | b'>' | b'<' => {
                (Kind::Operator, 1)
            }
            b'\'' | b'"' => match text_len(rest) {
                Some(len) => (Kind::Text, len),
                None => return Err((at, "unexpected end of string")),
            },
            b'0'..=b'9' => (Kind::Number, number_len(bytes, at)),
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                let len = rest.iter().take_while(|c| **c == b'_' || c.is_ascii_alphanumeric()).count();
                (Kind::Name, len)
            }
            _ => return Err((at, "unexpected character")),
        };
        tokens.push(Token { kind, text: &source[at..at + len], start: at });
        at += len;
    }
}

/// The length of `name %}` at the beginning of `text`, as minijinja's `skip_basic_tag`.
pub(super) fn basic_tag(text: &str, name: &str, skip_control: bool) -> Option<usize> {
    let mut rest = text;
    if skip_control {
        rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    }
    let spaces = |c: char| c.is_ascii_whitespace();
    rest = rest.trim_start_matches(spaces).strip_prefix(name)?.trim_start_matches(spaces);
    rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    Some(text.len() - rest.strip_prefix("%}")?.len())
}

/// The length of the string literal at the beginning of `rest`.
fn text_len(rest: &[u8]) -> Option<usize> {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            c if c == rest[0] => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// The length of the number at `at`, as minijinja's `eat_number`.
fn number_len(bytes: &[u8], at: usize) -> usize {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        Radix,
        Integer,
        Fraction,
        Exponent,
        ExponentSign,
    }
    let rest = &bytes[at..];
    let after_dot = at > 0 && bytes[at - 1] == b'.';
    let prefix = matches!(rest.get(..2), Some(b"0b" | b"0B" | b"0o" | b"0O" | b"0x" | b"0X"));
    let hexadecimal = matches!(rest.get(..2), Some(b"0x" | b"0X"));
    let from = if prefix { 2 } else { 0 };
    let mut state = if prefix { State::Radix } else { State::Integer };
    let mut len = from + rest[from..].iter().take_while(|c| c.is_ascii_digit()).count();
    while let Some(&c) = rest.get(len) {
        state = match (c, state) {
            (b'.', State::Integer) if after_dot => break,
            (b'.', State::Integer) => {
                let exponent = matches!(rest.get(len + 1), Some(b'e' | b'E'))
                    && matches!(rest.get(len + 2), Some(b'+' | b'-' | b'0'..=b'9'));
                let name = rest.get(len + 1).is_some_and(|c| *c == b'_' || c.is_ascii_alphabetic());
                if !exponent && name {
                    break;
                }
                State::Fraction
            }
            (b'e' | b'E', State::Integer | State::Fraction) => State::Exponent,
            (b'+' | b'-', State::Exponent) => State::ExponentSign,
            (b'0'..=b'9', State::Exponent) => State::ExponentSign,
            (b'0'..=b'9', state) => state,
            (b'a'..=b'f' | b'A'..=b'F', State::Radix) if hexadecimal => state,
            (b'_', state) => state,
            _ => break,
        };
        len += 1;
    }
    len
}
