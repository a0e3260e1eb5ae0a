//! What a terminal would obey is shown, not sent: rows, models, scripts, providers and file names come from others, and an escape
//! sequence among their words could rewrite the screen, the title or the clipboard.

use std::borrow::Cow;

/// Whether a terminal, or the order of letters in it, would obey a character: control characters but for the end of a line and the
/// tabulator, and what turns the direction of writing (Unicode's "Trojan source", <https://trojansource.codes>).
fn is_obeyed(c: char) -> bool {
    c.is_control() && !"\n\t".contains(c)
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether a text is shown as it is.
fn is_plain(text: &str) -> bool {
    !text.chars().any(is_obeyed)
}

/// A text with such characters written as Rust writes them, `\u{1b}`. The end of a line may be `\r\n`.
pub fn shown(text: &str) -> Cow<'_, str> {
    if is_plain(text) {
        return text.into();
    }
    let mut stream = Stream::default();
    let mut out = stream.shown(text);
    out += &stream.end();
    out.into()
}

/// The same for JSON, which stays JSON: its own escapes are `\u001b`.
pub fn shown_json(text: &str) -> Cow<'_, str> {
    if is_plain(text) {
        return text.into();
    }
    let escaped = |c: char| if is_obeyed(c) { format!("\\u{:04x}", u32::from(c)) } else { c.into() };
    text.chars().map(escaped).collect::<String>().into()
}

/// As [`shown`], in one line: for a cell of a table.
pub fn cell(text: &str) -> String {
    let escaped = |c: char| is_obeyed(c) || c.is_control();
    text.chars().map(|c| if escaped(c) { c.escape_unicode().to_string() } else { c.into() }).collect()
}

/// A text that comes in pieces. An `\r` at the end of one waits for what follows.
#[derive(Default)]
pub struct Stream {
    returned: bool,
}

impl Stream {
    /// The next piece, as [`shown`].
    pub fn shown(&mut self, piece: &str) -> String {
        let mut out = String::with_capacity(piece.len());
        for c in piece.chars() {
            if std::mem::take(&mut self.returned) && c != '\n' {
                out.extend('\r'.escape_unicode());
            }
            match c {
                '\r' => self.returned = true,
                c if is_obeyed(c) => out.extend(c.escape_unicode()),
                c => out.push(c),
            }
        }
        out
    }

    /// What waits still.
    pub fn end(&mut self) -> String {
        if std::mem::take(&mut self.returned) { '\r'.escape_unicode().to_string() } else { String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_shown_and_nothing_else_is_changed() {
        for plain in ["", "a\tb\nc", "größer 日本 🇩🇪 👩‍🚀", "עברית العربية", "line\n\n"] {
            assert!(matches!(shown(plain), Cow::Borrowed(text) if text == plain), "{plain:?}");
        }
        for (text, expected) in [
            ("\x1b[31mred", "\\u{1b}[31mred"),
            ("\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
            ("\u{9b}2J\u{85}", "\\u{9b}2J\\u{85}"),
            ("a\0b\x08\x7f", "a\\u{0}b\\u{8}\\u{7f}"),
            ("\u{202e}txt.exe\u{202c}\u{2066}x\u{2069}", "\\u{202e}txt.exe\\u{202c}\\u{2066}x\\u{2069}"),
            ("safe\rgone", "safe\\u{d}gone"),
            ("one\r\ntwo\r\n\x1b", "one\ntwo\n\\u{1b}"),
            ("end\r", "end\\u{d}"),
        ] {
            assert_eq!(shown(text), expected);
        }
        assert_eq!(cell("a\n\tb\x1b\u{202e}"), "a\\u{a}\\u{9}b\\u{1b}\\u{202e}");
    }

    #[test]
    fn json_stays_json_of_the_same_value() {
        let value = serde_json::json!({"a": "\u{9b}31m\x7f\u{202e}\x1b\n", "\u{2066}": 1});
        let text = value.to_string();
        let shown = shown_json(&text);
        assert!(!shown.chars().any(is_obeyed) && text.chars().any(is_obeyed), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    #[test]
    fn pieces_come_to_what_the_whole_comes_to() {
        let text = "a\r\nb\rc\x1b[1m\u{202e}d\r\r\ne\r";
        for cut in text.char_indices().map(|(at, _)| at) {
            let mut stream = Stream::default();
            let whole = stream.shown(&text[..cut]) + &stream.shown(&text[cut..]) + &stream.end();
            assert_eq!(whole, shown(text), "cut at {cut}");
        }
    }
}
