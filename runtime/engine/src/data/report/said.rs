//! What a row says: its texts by role, hashes of them, and its words.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value as Json;

use super::personal::{self, Found};
use super::words::words;
use crate::data::Row;
use crate::text::template::join_parts;

/// What one row says, without its texts.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Equal of rows that say the same, in whatever form.
    pub whole: u64,
    /// Equal of rows that ask the same; 0: nothing is asked.
    pub asked: u64,
    /// Equal of rows that answer the same, or judge it alike.
    pub answered: u64,
    /// Words of what is asked and answered.
    pub words: usize,
    /// Distinct runs of five words, sorted; of fewer words all of them.
    pub grams: Vec<u64>,
    /// Personal data: kind and number.
    pub personal: Vec<(&'static str, usize)>,
    /// Turns of others than the assistant that say nothing.
    pub empty_turns: usize,
    /// Whether it has a system message.
    pub has_system: bool,
    /// Whether anybody but the assistant and the system message speaks.
    pub has_user: bool,
    /// Turns of the assistant.
    pub answers: usize,
    /// Whether the answer repeats what is asked.
    pub echoes: bool,
    /// Whether tools are given.
    pub has_tools: bool,
}

/// One turn.
struct Turn<'a> {
    role: &'a str,
    text: Cow<'a, str>,
    /// What else it says: calls, and thoughts.
    more: String,
}

impl Turn<'_> {
    fn is_system(&self) -> bool {
        matches!(self.role, "system" | "developer")
    }
}

impl Said {
    pub fn of(row: &Row) -> Self {
        let mut said = Self::default();
        let turns = match row {
            Row::Preference { chosen, rejected } => {
                let (good, bad) = (turns(chosen), turns(rejected));
                said.judged(&good, &bad);
                good
            }
            Row::Rated { answer, label } => {
                let turns = turns(answer);
                said.whole = hash(&(hash_of(&turns), label));
                said.asked = hash_of(&turns);
                said.answered = hash(label);
                turns
            }
            row => {
                let turns = turns(row);
                // What is given beside a question is a part of it.
                let beside = beside(row);
                let with = |said: u64| if beside.is_empty() { said } else { hash(&(said, &beside)) };
                said.whole = with(hash_of(&turns));
                let last = turns.iter().rposition(|turn| turn.role == "assistant");
                if let Some(last) = last.filter(|last| *last > 0) {
                    said.asked = with(hash_of(&turns[..last])).max(1);
                    said.answered = hash_of(&turns[last..]);
                }
                turns
            }
        };
        said.count(&turns, row);
        said
    }

    /// The runs of words of a row alone, as in [`Said::grams`].
    pub fn grams_of(row: &Row) -> Vec<u64> {
        let mut hashes = Vec::new();
        for turn in turns(row).iter().filter(|turn| !turn.is_system()) {
            words(&turn.text, |word| hashes.push(hash(&word)));
        }
        grams(&hashes)
    }

    /// Two answers to one prompt: which is the better is what is answered.
    fn judged(&mut self, good: &[Turn<'_>], bad: &[Turn<'_>]) {
        let (good, bad) = (hash_of(good), hash_of(bad));
        self.whole = hash(&(good, bad));
        self.asked = hash(&(good.min(bad), good.max(bad)));
        self.answered = good;
    }

    fn count(&mut self, turns: &[Turn<'_>], row: &Row) {
        let mut hashes = Vec::new();
        let mut found: Vec<(&'static str, usize)> = Vec::new();
        let mut note = |text: &str| {
            for Found { kind, .. } in personal::find(text) {
                match found.iter_mut().find(|(known, _)| *known == kind) {
                    Some((_, count)) => *count += 1,
                    None => found.push((kind, 1)),
                }
            }
        };
        for turn in turns {
            let Turn { role, text, more } = turn;
            let is_system = turn.is_system();
            self.has_system |= is_system;
            self.has_user |= matches!(*role, "user" | "tool" | "text");
            self.answers += usize::from(*role == "assistant");
            self.empty_turns += usize::from(*role != "assistant" && text.trim().is_empty());
            note(text);
            note(more);
            // Rows of one persona would all be alike by it.
            if !is_system {
                words(text, |word| hashes.push(hash(&word)));
            }
        }
        if let Row::Preference { rejected, .. } = row
            && let Some(Turn { text, more, .. }) = self::turns(rejected).last()
        {
            note(text);
            note(more);
        }
        note(&beside(row));
        self.personal = found;
        self.words = hashes.len();
        self.grams = grams(&hashes);
        let spoken = |role: &str| turns.iter().rev().find(|turn| turn.role == role).map(|turn| turn.text.trim());
        self.echoes = spoken("user").is_some_and(|asked| !asked.is_empty() && Some(asked) == spoken("assistant"));
        self.has_tools = match row {
            Row::Messages { tools, .. } | Row::PromptCompletion { tools, .. } => tools.is_some(),
            _ => false,
        };
    }
}

/// About how many bytes a row has.
pub(super) fn bytes(row: &Row) -> usize {
    turns(row).iter().map(|turn| turn.text.len() + turn.more.len()).sum::<usize>() + beside(row).len()
}

/// The turns of a row that is no judgement.
fn turns(row: &Row) -> Vec<Turn<'_>> {
    let turn = |role, text| Turn { role, text: Cow::Borrowed(text), more: String::new() };
    match row {
        Row::Messages { messages, .. } => messages
            .iter()
            .map(|message| {
                let more = ["tool_calls", "reasoning_content", "reasoning", "thinking"];
                let more = more.iter().filter_map(|key| message.get(*key)).filter(|value| !value.is_null());
                Turn {
                    role: message["role"].as_str().unwrap_or_default(),
                    text: spoken(&message["content"]),
                    more: more.map(texts).collect(),
                }
            })
            .collect(),
        Row::PromptCompletion { system, prompt, completion, .. } => {
            let system = system.as_deref().map(|text| turn("system", text));
            system.into_iter().chain([turn("user", prompt), turn("assistant", completion)]).collect()
        }
        Row::Text(text) => vec![turn("text", text)],
        Row::Preference { chosen: row, .. } | Row::Rated { answer: row, .. } => turns(row),
    }
}

/// The texts of tools and documents, which stand beside the turns.
fn beside(row: &Row) -> String {
    match row {
        Row::Messages { tools, documents, variables, .. } => {
            tools.iter().chain(documents).chain(variables).map(texts).collect()
        }
        Row::PromptCompletion { tools, variables, .. } => tools.iter().chain(variables).map(texts).collect(),
        _ => String::new(),
    }
}

/// The text of a content, which may be given in parts.
fn spoken(content: &Json) -> Cow<'_, str> {
    match content {
        Json::String(text) => Cow::Borrowed(text),
        Json::Array(parts) => Cow::Owned(join_parts(parts.iter().filter_map(|part| part["text"].as_str()))),
        _ => Cow::Borrowed(""),
    }
}

/// The texts in a value, a line each.
fn texts(value: &Json) -> String {
    match value {
        Json::String(text) => format!("{text}\n"),
        Json::Array(items) => items.iter().map(texts).collect(),
        Json::Object(fields) => fields.iter().map(|(name, field)| format!("{name}: {}", texts(field))).collect(),
        Json::Null => String::new(),
        other => format!("{other}\n"),
    }
}

/// White space around a turn, and how much there is in it, says nothing, nor does a full stop at its end.
fn hash_of(turns: &[Turn<'_>]) -> u64 {
    let plain = |text: &str| {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        text.trim_end_matches(['.', '。', '．']).to_owned()
    };
    let turns: Vec<(&str, String, String)> =
        turns.iter().map(|turn| (turn.role, plain(&turn.text), plain(&turn.more))).collect();
    hash(&turns)
}

/// The same in every process: `DefaultHasher` begins with fixed keys.
pub(super) fn hash(value: &impl std::hash::Hash) -> u64 {
    use std::hash::Hasher;
    let mut hasher = std::hash::DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Words of a run.
const GRAM: usize = 5;

/// The distinct runs of five words, sorted. Of a row with fewer, all its words are the one.
pub(super) fn grams(words: &[u64]) -> Vec<u64> {
    let of_run = |run: &[u64]| run.iter().fold(run.len() as u64, |all, word| mix(all ^ word));
    let mut grams: Vec<u64> = match words.len() {
        0 => Vec::new(),
        1..GRAM => vec![of_run(words)],
        _ => words.windows(GRAM).map(of_run).collect::<HashSet<_>>().into_iter().collect(),
    };
    grams.sort_unstable();
    grams
}

/// What SplitMix64 adds to its state.
pub(super) const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The value of SplitMix64 behind a state, Steele et al. 2014.
pub(super) const fn mix(state: u64) -> u64 {
    let value = state.wrapping_add(STEP);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
