//! Rows ready to be shown: pieces of text with what they are, and what begins and ends them in words.

use homeroom_engine::data::Example;
use homeroom_engine::data::preview::{Beginning, End, Piece, beginning, end, pieces};
use homeroom_engine::data::report::{Place, Report, Shown};
use homeroom_engine::text::tokenizer::Tokenizer;
use serde::Serialize;

use crate::data_report;
use crate::progress::thousands;

/// A row.
#[derive(Serialize)]
pub struct Rendered {
    /// Where it stands.
    #[serde(flatten)]
    pub place: Place,
    /// The same in words.
    #[serde(skip)]
    pub(super) name: String,
    /// What it becomes: one, or two answers to a prompt, or one for each answer.
    pub sequences: Vec<Sequence>,
}

/// A sequence of a row.
#[derive(Serialize)]
pub struct Sequence {
    /// What it is among those of its row, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Tokens.
    pub tokens: usize,
    /// Trained ones among them.
    pub trained: usize,
    /// Tokens beyond the limit, which are not shown.
    pub cut: usize,
    /// How it begins.
    pub begins: Beginning,
    /// How what is trained ends.
    pub ends: End,
    /// Its text.
    pub pieces: Vec<Piece>,
}

/// Makes a row ready, with no more tokens than the limit.
pub fn render(row: &Shown, report: &Report, tokenizer: &Tokenizer, limit: Option<usize>) -> Rendered {
    let of_group = row.groups.iter().flat_map(|group| {
        let several = group.sequences.len() > 1;
        group.sequences.iter().enumerate().map(move |(at, example)| {
            let role = match group.label {
                Some(true) => Some("rated good"),
                Some(false) => Some("rated bad"),
                None if several => Some(if at == 0 { "chosen" } else { "rejected" }),
                None => None,
            };
            (role, example)
        })
    });
    let sequences = of_group.map(|(role, example)| sequence(role, example, tokenizer, limit)).collect();
    Rendered { place: row.place, name: data_report::place(report, row.place), sequences }
}

fn sequence(role: Option<&'static str>, example: &Example, tokenizer: &Tokenizer, limit: Option<usize>) -> Sequence {
    let tokens = example.ids.len();
    let kept = tokens.min(limit.unwrap_or(tokens));
    let shown = Example::new(example.ids[..kept].to_vec(), example.trained[..kept].to_vec(), example.line());
    Sequence {
        role,
        tokens,
        trained: shown.trained.iter().filter(|trained| **trained).count(),
        cut: tokens - kept,
        begins: beginning(example, tokenizer),
        ends: end(example, tokenizer),
        pieces: pieces(&shown, tokenizer),
    }
}

impl Rendered {
    /// The heading of one of its sequences: where it stands, how long it is, how it begins and ends.
    pub fn heading(&self, sequence: &Sequence) -> String {
        let Sequence { role, tokens, trained, cut, .. } = sequence;
        let role = role.map(|role| format!(", {role}")).unwrap_or_default();
        let cut = if *cut > 0 { format!(", the last {} cut off", thousands(*cut)) } else { String::new() };
        format!("{}{role}   {} tokens, {} of them trained{cut}", self.name, thousands(*tokens), thousands(*trained))
    }
}

impl Sequence {
    /// What is wrong with its beginning and its end, or that nothing is.
    pub fn verdict(&self) -> String {
        let begins = match self.begins {
            Beginning::Bos => "begins with one BOS",
            Beginning::None => "begins without a BOS, as this model's texts do",
            Beginning::Doubled => "begins with two BOS, which is one too many",
            Beginning::Missing => "begins without the BOS that this model's texts begin with",
        };
        let ends = match (self.cut, self.ends) {
            (1.., _) => "its end is cut off, and not learned",
            (0, End::Stops) => "every answer ends with a token at which the model stops",
            (0, End::GoesOn) => "an answer ends with a token at which the model does not stop",
            (0, End::None) => "an answer has no end of turn, so that the model does not learn where to stop",
        };
        format!("{begins}; {ends}")
    }

    /// Whether something is.
    pub fn is_wrong(&self) -> bool {
        matches!(self.begins, Beginning::Doubled | Beginning::Missing) || self.cut > 0 || self.ends != End::Stops
    }
}
