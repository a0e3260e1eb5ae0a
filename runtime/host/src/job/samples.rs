//! Held-out questions, answered before a training and after it: a loss tells little to a teacher.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::data::{Example, Group};
use homeroom_engine::files::{read_text, replace_file};
use homeroom_engine::inference::generate::Sampling;
use homeroom_engine::inference::{Adapter, Engine};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use serde::Serialize;
use serde_json::{Value, json};

use crate::interrupt;
use crate::progress::line;

/// Questions that are answered.
const QUESTIONS: usize = 3;
/// Most tokens of an answer.
const TOKENS_MAX: usize = 64;
/// Tokens that an answer may have beyond those that were expected.
const TOKENS_MORE: usize = 16;
/// Characters of a text that is told.
const WIDTH: usize = 100;
/// The answers before, in a training's directory.
const BEFORE_FILE: &str = "before.json";
/// Largest of those files.
const BEFORE_BYTES_MAX: u64 = 1 << 20;

/// A held-out question with its answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// What is asked: the last turn of the prompt.
    pub prompt: String,
    /// What the row says.
    pub expected: String,
    /// What the model said before the training.
    pub before: String,
    /// What it says after it.
    pub after: String,
}

impl Sample {
    /// The event of a run.
    pub fn event(&self) -> Value {
        let Self { prompt, expected, before, after } = self;
        json!({"event": "sample", "prompt": prompt, "expected": expected, "before": before, "after": after})
    }

    /// Tells it in four lines, each cut to what a line holds.
    pub fn tell(&self) {
        for (what, text) in
            [("question", &self.prompt), ("expected", &self.expected), ("before", &self.before), ("after", &self.after)]
        {
            line(format_args!("{what:<8}  {}", cut(text)));
        }
    }
}

/// A text in one line, its end where it is too long: the question of a prompt is its end.
fn cut(text: &str) -> String {
    let text: Vec<char> = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().collect();
    match text.len().checked_sub(WIDTH) {
        None | Some(0) => text.into_iter().collect(),
        Some(more) => std::iter::once('…').chain(text.into_iter().skip(more + 1)).collect(),
    }
}

/// Questions with what was answered before.
pub struct Samples<'a> {
    rows: Vec<(&'a Example, usize)>,
    before: Vec<String>,
}

impl<'a> Samples<'a> {
    /// Picks different questions of held-out rows, spread over them: those whose first answer is short. None where no row has a prompt.
    pub fn pick(held_out: &[&'a Group]) -> Self {
        // Answers that were rated bad are none to expect.
        let prompt = |group: &&'a Group| {
            let example = group.sequences.first()?;
            let start = Some(example.prompt()).filter(|start| *start > 1 && group.label != Some(false))?;
            Some((example, start))
        };
        // The same question again shows nothing.
        let mut seen = HashSet::new();
        let mut is_new = |(example, start): &(&'a Example, usize)| seen.insert(&example.ids[..*start]);
        let with_prompt: Vec<(&Example, usize)> =
            held_out.iter().filter_map(prompt).filter(|asked| is_new(asked)).collect();
        let count = QUESTIONS.min(with_prompt.len());
        let rows = (0..count).map(|number| with_prompt[number * with_prompt.len() / count.max(1)]).collect();
        Self { rows, before: Vec::new() }
    }

    /// Whether there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Answers as the model is now, before a training, and keeps that in the training's directory. A model that cannot answer is asked
    /// nothing: what is wrong with it the training says.
    pub fn ask_before(&mut self, model: &Arc<BaseModel>, adaptation: &Arc<Adaptation>, training: Option<&Path>) {
        if self.rows.is_empty() {
            return;
        }
        match self.ask(model, adaptation) {
            Ok(before) => self.before = before,
            // They are asked when the run goes on.
            Err(_) if interrupt::asked() => return,
            Err(_) => self.rows.clear(),
        }
        if let (Some(training), Ok(text)) = (training, serde_json::to_string(&self.before)) {
            // Without it they are asked of the model as it is when the run goes on.
            let _ = replace_file(&training.join(BEFORE_FILE), text.as_bytes());
        }
    }

    /// Reads the answers that were kept; false: there are none.
    pub fn recall(&mut self, training: Option<&Path>) -> bool {
        let text = training.and_then(|training| read_text(&training.join(BEFORE_FILE), BEFORE_BYTES_MAX).ok());
        let before: Option<Vec<String>> = text.and_then(|text| serde_json::from_str(&text).ok());
        self.before = before.filter(|before| before.len() == self.rows.len()).unwrap_or_default();
        !self.before.is_empty() || self.rows.is_empty()
    }

    /// Answers as the model is now, after a training, beside those of before.
    ///
    /// # Errors
    /// When the model cannot answer.
    pub fn ask_after(&self, model: &Arc<BaseModel>, adaptation: &Arc<Adaptation>) -> Result<Vec<Sample>> {
        if self.rows.is_empty() {
            return Ok(Vec::new());
        }
        let after = self.ask(model, adaptation)?;
        let text = |ids: &[u32]| Ok::<_, anyhow::Error>(model.tokenizer.decode(ids, true)?.trim().to_owned());
        let samples = self.rows.iter().zip(self.before.iter().zip(after)).map(|((example, start), (before, after))| {
            let expected = text(&example.ids[*start..answer_end(example, *start)])?;
            Ok(Sample { prompt: question(model, &example.ids[..*start])?, expected, before: before.clone(), after })
        });
        samples.collect()
    }

    /// All at once, so that they share the reading of the weights.
    fn ask(&self, model: &Arc<BaseModel>, adaptation: &Arc<Adaptation>) -> Result<Vec<String>> {
        let engine = Engine::new(model.clone(), Compute::Auto);
        let adapter = Adapter::new(engine.inference(), model.clone(), adaptation.clone())?;
        let mut asked = Vec::new();
        for (example, start) in &self.rows {
            let expected = answer_end(example, *start) - start;
            let sampling = Sampling {
                max_tokens: (expected + TOKENS_MORE).min(TOKENS_MAX),
                temperature: 0.0,
                ..Sampling::default()
            };
            asked.push(engine.ask(Some(&adapter), &example.ids[..*start], sampling)?);
        }
        let answer = |tokens: homeroom_engine::inference::Tokens| {
            let ids = tokens.map(|id| interrupt::stop_if_asked().and(id)).collect::<Result<Vec<u32>>>()?;
            Ok(model.tokenizer.decode(&ids, true)?.trim().to_owned())
        };
        asked.into_iter().map(answer).collect()
    }
}

/// Words by which templates begin a turn.
const ROLES: [&str; 6] = ["user", "assistant", "system", "human", "model", "tool"];

/// What a prompt asks: the text of its last turn, without the role's word. The turns are cut at the control tokens that the template
/// writes; of a prompt without them all of it is asked.
///
/// # Errors
/// When the tokenizer cannot decode it.
pub fn question(model: &BaseModel, prompt: &[u32]) -> Result<String> {
    let tokenizer = &model.tokenizer;
    let control: HashSet<u32> = tokenizer.control_tokens().iter().map(|control| control.id).collect();
    let turns: Vec<&[u32]> = prompt.split(|id| control.contains(id)).collect();
    // Behind the last control token is what opens the answer.
    let before_opening = &turns[..turns.len().saturating_sub(1)];
    for turn in before_opening.iter().rev() {
        let text = without_role(&tokenizer.decode(turn, true)?);
        if !text.is_empty() {
            return Ok(text);
        }
    }
    Ok(tokenizer.decode(prompt, true)?.trim().to_owned())
}

/// A turn without a first line that is a role's word, also as `<|user|>`.
fn without_role(turn: &str) -> String {
    let turn = turn.trim();
    let (first, rest) = turn.split_once('\n').unwrap_or((turn, ""));
    let word = first.trim_matches(|c: char| !c.is_alphanumeric());
    let is_role = ROLES.iter().any(|role| word.eq_ignore_ascii_case(role));
    if is_role { rest.trim().to_owned() } else { turn.to_owned() }
}

/// Where the first trained span ends that begins at a token.
fn answer_end(example: &Example, start: usize) -> usize {
    example.trained[start..].iter().position(|trained| !trained).map_or(example.ids.len(), |length| start + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_told_without_its_role() {
        for (turn, told) in [
            ("user\nWhat is 2 + 2?\n", "What is 2 + 2?"),
            ("<|user|>\nWhat is it?\nAnd why?", "What is it?\nAnd why?"),
            ("assistant\n", ""),
            ("\n\nuser input, what is that?", "user input, what is that?"),
        ] {
            assert_eq!(without_role(turn), told, "{turn:?}");
        }
    }
}
