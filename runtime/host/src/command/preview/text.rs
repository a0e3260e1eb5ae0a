//! Rows as text: in colour on a terminal, and where there is none trained tokens in [brackets].

use std::fmt::Write as _;

use homeroom_engine::data::preview::Piece;

use super::rendered::Rendered;
use crate::stdout::Stdout;
use crate::terminal::cell;

/// How rows are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// What is trained on a green or cyan ground by turns, so that each token is seen; control tokens in magenta.
    Colour,
    /// What is trained in brackets, each token in its own.
    Brackets,
}

impl Look {
    /// Colour on a terminal that has any, unless `NO_COLOR` is set (<https://no-color.org>).
    pub fn of_stdout() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|kind| kind.is_empty() || kind == "dumb");
        if Stdout.is_terminal() && !set("NO_COLOR") && !dumb { Self::Colour } else { Self::Brackets }
    }
}

const RESET: &str = "\x1b[0m";

/// The rows, with a word on how to read them first.
pub fn rows(rows: &[Rendered], look: Look) -> String {
    let mut out = String::new();
    if rows.is_empty() {
        return out;
    }
    out += &match look {
        Look::Colour => format!(
            "tokens    {}trained{RESET}{} tokens{RESET} by turns, {}control{RESET}, all others as they are; \\n is a line break\n",
            ground(0),
            ground(1),
            "\x1b[35m"
        ),
        Look::Brackets => {
            "tokens    [trained] each in brackets, all others as they are; \\n is a line break\n".to_owned()
        }
    };
    for row in rows {
        for sequence in &row.sequences {
            let _ = write!(out, "\n{}\n          {}\n", cell(&row.heading(sequence)), sequence.verdict());
            let mut text = String::from("  ");
            for (number, piece) in sequence.pieces.iter().enumerate() {
                text += &match look {
                    Look::Colour => coloured(piece, number),
                    Look::Brackets => bracketed(piece),
                };
                if piece.text.ends_with('\n') {
                    text += "\n  ";
                }
            }
            out += text.trim_end_matches(' ');
            if !out.ends_with('\n') {
                out.push('\n');
            }
        }
    }
    out
}

/// A piece in one line, nothing in it that a terminal would obey.
fn plain(piece: &Piece) -> String {
    cell(&piece.text.replace('\r', "\\r").replace('\n', "\\n").replace('\t', "\\t"))
}

fn bracketed(piece: &Piece) -> String {
    if piece.trained { format!("[{}]", plain(piece)) } else { plain(piece) }
}

/// Grounds of trained tokens by turns, with black letters on them.
fn ground(number: usize) -> &'static str {
    if number.is_multiple_of(2) { "\x1b[30;42m" } else { "\x1b[30;46m" }
}

fn coloured(piece: &Piece, number: usize) -> String {
    let text = plain(piece);
    match (piece.trained, piece.control) {
        (true, false) => format!("{}{text}{RESET}", ground(number)),
        // Underlined, so that it is seen whatever the ground is.
        (true, true) => format!("{}\x1b[1;4m{text}{RESET}", ground(number)),
        (false, true) => format!("\x1b[35m{text}{RESET}"),
        (false, false) if piece.bytes => format!("\x1b[33m{text}{RESET}"),
        (false, false) => text,
    }
}

#[cfg(test)]
mod tests {
    use homeroom_engine::data::preview::{Beginning, End};
    use homeroom_engine::data::report::{Part, Place};

    use super::super::rendered::Sequence;
    use super::*;

    fn row() -> Rendered {
        let piece = |text: &str, trained: bool, control: bool| Piece {
            ids: vec![1],
            text: text.to_owned(),
            trained,
            control,
            bytes: false,
        };
        let pieces = vec![
            piece("<|user|>", false, true),
            piece("hi\x1b[2J\n", false, false),
            piece("yo", true, false),
            piece("<|end|>", true, true),
        ];
        let sequence =
            Sequence { role: None, tokens: 4, trained: 2, cut: 0, begins: Beginning::Bos, ends: End::Stops, pieces };
        Rendered { place: Place { part: Part::Train, line: 7 }, name: "line 7".to_owned(), sequences: vec![sequence] }
    }

    #[test]
    fn brackets_hold_what_is_trained_and_nothing_is_sent_that_a_terminal_obeys() {
        let text = rows(&[row()], Look::Brackets);
        assert!(text.ends_with("  <|user|>hi\\u{1b}[2J\\n\n  [yo][<|end|>]\n"), "{text}");
        assert!(text.contains("\nline 7   4 tokens, 2 of them trained\n"), "{text}");
    }

    #[test]
    fn colours_are_our_own_and_end_where_they_should() {
        let text = rows(&[row()], Look::Colour);
        assert!(text.contains("\x1b[35m<|user|>\x1b[0mhi\\u{1b}[2J\\n\n  \x1b[30;42myo\x1b[0m"), "{text:?}");
        assert!(!text.contains("\x1b[2J") && text.matches(RESET).count() == 6, "{text:?}");
    }
}
