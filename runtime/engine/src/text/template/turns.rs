//! Conversations to learn from: which bytes of a rendering the assistant wrote.
//!
//! A turn is trained behind the prompt that it answers, as that is served. Most templates write both alike, and what a turn adds to
//! its prompt is what the assistant wrote. Others write the conversation otherwise once the answer is there: Mistral's put the system
//! message into the last user turn, and DeepSeek R1's open a `<think>` in the prompt which they leave out of the history. There the
//! answer is taken out of the turn and put behind the prompt.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use minijinja::Value;
use serde_json::{Value as Json, json};

use super::bounds::Exceeded;
use super::marks::{Marked, Marks, Survey, occurrences};
use super::message::{content, with_content};
use super::rendered::Rendered;
use super::{ChatTemplate, Given, to_value};
use crate::text::control::Control;

impl ChatTemplate {
    /// Renders a conversation to learn from. `control`: see [`crate::text::tokenizer::Tokenizer::control_in`].
    ///
    /// Usually one text. A template with `{% generation %}` says itself what is trained. Without it, the span of an
    /// assistant turn is what rendering up to and including it adds to rendering before it with
    /// `add_generation_prompt`. Where those renderings do not begin one another (templates that drop earlier
    /// thinking, or move the system message), each assistant turn is a text of its own: the prompt as it would be served, and
    /// the answer behind it. Turns with `weight: 0` are not trained.
    ///
    /// A prompt that opens a block of thinking which the template does not write with the answer is answered by what the row has
    /// as reasoning, and the end of the block. Without reasoning the block ends at once, so that a model which learned
    /// plain answers gives plain answers to the prompt that it is served.
    ///
    /// # Errors
    /// When there is nothing to train on, the template refuses the messages, or the prompt of a turn does not begin
    /// the turn and the answer cannot be told from it.
    pub fn render_for_training<'a>(
        &self,
        messages: &[Json],
        given: impl Into<Given<'a>>,
        control: &[Control],
    ) -> Result<Vec<Rendered>> {
        let given = given.into();
        let template = self.of(given);
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| messages[i]["role"] == "assistant").collect();
        ensure!(!turns.is_empty(), "nothing to train on: no assistant message");
        let learned: Vec<usize> =
            turns.iter().copied().filter(|&i| messages[i].get("weight").and_then(Json::as_f64) != Some(0.0)).collect();
        ensure!(!learned.is_empty(), "nothing to train on: every assistant message has weight 0");

        let messages = template.reads.prepare(messages)?;
        template.check_given(given)?;
        let full = template.render_marked(&messages, given, false, control);
        let full = full.map_err(|error| template.explained(error, &messages))?;
        for &i in &learned {
            template.check_calls(&messages[..=i], given)?;
            template.check_whole(&messages[..=i], given)?;
        }
        if template.marks_generation() {
            return Ok(vec![full.trained_by_marks(&turns, &learned)?]);
        }

        let mut whole = Vec::with_capacity(learned.len());
        let values: Vec<Value> = messages.iter().map(to_value).collect();
        for &i in &learned {
            let prompt = template.run_values((&messages[..i], &values[..i]), given, true, "");
            let prompt = prompt.with_context(|| before_turn(i))?;
            // Up to the last turn it is all of the conversation, which was rendered.
            let upto = match i + 1 == messages.len() {
                true => Cow::Borrowed(&full.text),
                false => Cow::Owned(template.run_values((&messages[..=i], &values[..=i]), given, false, "")?),
            };
            if !(upto.starts_with(&prompt) && full.text.starts_with(&*upto)) {
                whole.clear();
                break;
            }
            whole.push(prompt.len()..upto.len());
        }
        if !whole.is_empty() {
            let (text, literal) = (full.text, full.literal);
            return Ok(vec![Rendered { text, trained: whole, literal }]);
        }
        learned.iter().map(|&i| template.render_turn(&messages, i, given, control)).collect()
    }

    /// Checks that the model will see what the conversation is rendered with: some templates know no tools, and most no documents.
    fn check_given(&self, given: Given<'_>) -> Result<()> {
        ensure!(
            given.tools.is_none() || self.reads.tools,
            "the chat template writes no `tools`, so the model would not see them; take them out, or choose a model that knows tools"
        );
        ensure!(
            given.documents.is_none() || self.reads.documents,
            "the chat template writes no `documents`, so the model would not see them; put them into what is asked"
        );
        Ok(())
    }

    /// Says by name what a template that refused these messages does not know.
    fn explained(&self, error: anyhow::Error, messages: &[Json]) -> anyhow::Error {
        if error.is::<Exceeded>() {
            return error;
        }
        let with = |role: &str| messages.iter().any(|message| message["role"] == role);
        let refuses = |messages: &[Json]| {
            let messages = self.reads.prepare(messages);
            messages.and_then(|messages| self.run(&messages, Given::default(), true, "")).is_err()
        };
        let user = json!({"role": "user", "content": "a"});
        if refuses(std::slice::from_ref(&user)) {
            return error;
        }
        if with("system") && refuses(&[json!({"role": "system", "content": "b"}), user.clone()]) {
            return error.context(
                "the chat template knows no system message; put what it says into the first message of the user",
            );
        }
        let call = json!({"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}});
        let called = json!({"role": "assistant", "content": "", "tool_calls": [call]});
        let said = json!({"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "c"});
        if with("tool") && refuses(&[user, called, said]) {
            return error.context("the chat template knows no messages of tools");
        }
        error
    }

    /// Checks that the calls of the last message are written: some templates know none.
    fn check_calls(&self, messages: &[Json], given: Given<'_>) -> Result<()> {
        let calls = messages.last().and_then(|message| message["tool_calls"].as_array());
        let Some(calls) = calls.filter(|calls| !calls.is_empty()) else { return Ok(()) };
        let text = self.run(messages, given, false, "")?;
        for (i, call) in calls.iter().enumerate() {
            let within = if call["function"].is_object() { "/function/name" } else { "/name" };
            let Some(name) = call.pointer(within).and_then(Json::as_str) else { continue };
            // The name may stand among the tools as well, so it is looked for what another name would change.
            let mut renamed = messages.to_vec();
            let last = renamed.last_mut().expect("its calls were found");
            if let Some(place) = last["tool_calls"][i].pointer_mut(within) {
                *place = format!("{name}x").into();
            }
            let left_out =
                !text.contains(name) || self.run(&renamed, given, false, "").is_ok_and(|other| other == text);
            ensure!(
                !left_out,
                "message {}: the chat template does not write the call of `{name}`, so it cannot be learned",
                messages.len()
            );
        }
        Ok(())
    }

    /// Checks that the last message is written from its beginning: some templates take whatever stands before the last end of a
    /// block for thinking.
    fn check_whole(&self, messages: &[Json], given: Given<'_>) -> Result<()> {
        let Some((last, said)) = messages.last().and_then(|last| Some((last, content(last)?))) else { return Ok(()) };
        let is_end = |text: &&str| text.len() > 3 && (text.starts_with("</") || text.starts_with("[/"));
        let ends: BTreeSet<&str> = self.written.split('\0').map(str::trim).filter(is_end).collect();
        for end in ends.into_iter().filter(|end| said.contains(*end)) {
            let thinking = Thinking::of(last, Some(&said), &end.replacen('/', "", 1), end);
            let spoken = thinking.in_content.map_or(&*said, |split| split.spoken);
            ensure!(
                self.run(messages, given, false, "")?.contains(spoken.trim()),
                "message {}: the chat template takes what stands before {end:?} for thinking, so this answer cannot be learned whole; \
                 take {end:?} out of it, or put what is thinking in `reasoning_content`",
                messages.len()
            );
        }
        Ok(())
    }

    /// One turn behind its prompt.
    fn render_turn(&self, messages: &[Json], i: usize, given: Given<'_>, control: &[Control]) -> Result<Rendered> {
        let prompt = self.render_marked(&messages[..i], given, true, control).with_context(|| before_turn(i))?;
        let turn = self.render_marked(&messages[..=i], given, false, control)?;
        if turn.text.starts_with(&prompt.text) {
            let trained = std::iter::once(prompt.text.len()..turn.text.len()).collect();
            return Ok(Rendered { text: turn.text, trained, literal: turn.literal });
        }
        let Some(answer) = self.answer(&messages[..=i], given, &prompt.text, &turn.text)? else {
            let (ours, theirs) = parting(&turn.text, &prompt.text);
            bail!(
                "message {}: the chat template writes this turn otherwise than the prompt it would answer: {ours:?} where the prompt has {theirs:?}",
                i + 1
            );
        };
        let Marked { mut text, mut literal, .. } = prompt;
        let start = text.len();
        let special: Vec<&Control> = control.iter().filter(|c| c.special && !c.text.is_empty()).collect();
        let typed =
            occurrences(&answer.thought, &special).into_iter().map(|(span, _)| start + span.start..start + span.end);
        literal.extend(typed);
        text.push_str(&answer.thought);
        text.push_str(&answer.closing);
        let moved = |span: &Range<usize>| text.len() + span.start - answer.from..text.len() + span.end - answer.from;
        literal.extend(turn.literal.iter().filter(|span| span.start >= answer.from).map(moved));
        text.push_str(&turn.text[answer.from..]);
        let trained = std::iter::once(start..text.len()).collect();
        Ok(Rendered { text, trained, literal })
    }

    /// Finds the answer, the last of `messages`, in its rendering `turn`: it is what follows the question there, of which a mark in its
    /// place shows the end, less what the prompt has there too. `None`: the two do not fit.
    fn answer(&self, messages: &[Json], given: Given<'_>, prompt: &str, turn: &str) -> Result<Option<Answer>> {
        let mut survey = Survey::default();
        messages.iter().chain(given.values()).for_each(|value| survey.visit(value, &[]));
        survey.note_private(&self.source);
        let mark = Marks::outside(&survey.private, &BTreeSet::new())?.one();
        let [earlier @ .., question, last] = messages else { return Ok(None) };
        if content(question).is_none() {
            return Ok(None);
        }
        let marked = [earlier, &[with_content(question, &mark), last.clone()]].concat();
        let said = content(last);
        let behind = |messages: &[Json], prompt: bool| -> Option<String> {
            let text = self.run(messages, given, prompt, "").ok()?;
            text.rsplit_once(&mark).map(|(_, behind)| behind.to_owned())
        };
        let found = || -> Option<Answer> {
            let (served, written) = (behind(&marked[..=earlier.len()], true)?, behind(&marked, false)?);
            if !(prompt.ends_with(&served) && turn.ends_with(&written)) {
                return None;
            }
            let place = turn.len() - written.len();
            let same = served.char_indices().zip(written.chars()).take_while(|((_, a), b)| a == b).count();
            let splits = served.char_indices().map(|(at, _)| at).chain([served.len()]).take(same + 1);
            // What is the same may go on into the answer, if that begins like the block.
            let splits: Vec<usize> = splits.collect();
            let fitting = splits.into_iter().rev().find_map(|at| Some((at, self.block(&served[at..])?)));
            let Some((at, block)) = fitting else {
                let asked = self.run(&messages[..=earlier.len()], given, false, "").ok()?;
                let from = place + behind_heading(&asked, prompt, &written)?;
                return Some(Answer { from, ..Answer::default() });
            };
            let Some(Block { tag, closing, open }) = block else {
                return Some(Answer { from: place + at, ..Answer::default() });
            };
            let thinking = Thinking::of(last, said.as_deref(), &tag, &closing);
            let rest = &written[at..];
            // The template may have left the thinking out.
            let spoken = match Split::of(rest, &tag, &closing) {
                Some(split) if thinking.is(split.thought) => split.spoken,
                _ if thinking.in_content.is_some() => rest.trim_start(),
                _ if open => rest.trim_start_matches('\n'),
                _ => rest,
            };
            if !open {
                // There is no thinking behind a prompt that has it already.
                return Some(Answer { from: turn.len() - spoken.len(), ..Answer::default() });
            }
            let thought = thinking.thought();
            let line_break = if thought.is_empty() { "" } else { "\n" };
            let closing = format!("{line_break}{closing}\n\n");
            Some(Answer { thought: thought.to_owned(), closing, from: turn.len() - spoken.len() })
        };
        Ok(found())
    }

    /// What a prompt writes beyond what a turn begins with: a block of thinking, `Some(None)` where it is white space, and `None` where
    /// it is anything else.
    pub(super) fn block(&self, text: &str) -> Option<Option<Block>> {
        let text = text.trim();
        let Some(bracket) = text.chars().next() else { return Some(None) };
        let closing_of = |tag: &str| format!("{bracket}/{}", &tag[bracket.len_utf8()..]);
        let last = &text[text.rfind(bracket)?..];
        if last == text {
            // Only a template that looks for the end of a block says what ends it.
            let closing = closing_of(text);
            return self.written.contains(&closing).then(|| Some(Block { tag: text.to_owned(), closing, open: true }));
        }
        let slashed = (last.replacen('/', "", 1), last == closing_of(&last.replacen('/', "", 1)));
        // As in Gemma 4: `<|channel>thought\n<channel|>`.
        let barred = last.strip_prefix('<').and_then(|inner| inner.strip_suffix("|>"));
        let barred = barred.map_or_else(Default::default, |inner| (format!("<|{inner}>"), true));
        let (tag, _) = [slashed, barred].into_iter().find(|(tag, closes)| *closes && text.starts_with(tag))?;
        Some(Some(Block { tag, closing: last.to_owned(), open: false }))
    }
}

/// Where an answer begins in `written`, what stands behind the question: behind the first heading of an answer, which is what a prompt
/// adds to the question `asked`. Some templates end what came before in two ways (Hermes 2 Pro's does so behind what a tool says).
fn behind_heading(asked: &str, prompt: &str, written: &str) -> Option<usize> {
    let heading = prompt.strip_prefix(asked)?.trim();
    if heading.len() < 3 {
        return None;
    }
    let rest = &written[written.find(heading)? + heading.len()..];
    let gap = &prompt[prompt.trim_end().len()..];
    Some(written.len() - rest.strip_prefix(gap).unwrap_or(rest.trim_start()).len())
}

/// What the assistant writes to a prompt.
#[derive(Default)]
struct Answer {
    /// The reasoning, where the prompt opens a block for it.
    thought: String,
    /// The end of that block.
    closing: String,
    /// Where the rest begins in the rendering of the turn.
    from: usize,
}

/// A block of thinking at the end of a prompt.
pub(super) struct Block {
    pub(super) tag: String,
    pub(super) closing: String,
    /// The answer has to close it.
    pub(super) open: bool,
}

/// A text that begins with thinking.
struct Split<'a> {
    thought: &'a str,
    spoken: &'a str,
    /// It has the beginning of the block, too.
    opened: bool,
    /// The end of the block begins or ends a line.
    alone: bool,
}

impl<'a> Split<'a> {
    fn of(text: &'a str, tag: &str, closing: &str) -> Option<Self> {
        let text = text.trim_start();
        let inner = text.strip_prefix(tag);
        let (thought, behind) = inner.unwrap_or(text).split_once(closing)?;
        if inner.is_none() && thought.contains(tag) {
            return None;
        }
        let alone = thought.ends_with('\n') || behind.is_empty() || behind.starts_with(['\n', '\r']);
        let (thought, spoken) = (thought.trim_matches('\n'), behind.trim_start());
        Some(Self { thought, spoken, opened: inner.is_some(), alone })
    }
}

/// What a message has as thinking. Only the beginning of its content counts: an answer may name the block that it is in.
struct Thinking<'a> {
    /// In a field of its own.
    field: Option<&'a str>,
    in_content: Option<Split<'a>>,
}

impl<'a> Thinking<'a> {
    /// `said`: the message's content.
    fn of(message: &'a Json, said: Option<&'a str>, tag: &str, closing: &str) -> Self {
        let field = message["reasoning_content"].as_str().filter(|text| !text.trim().is_empty());
        // Without its beginning it is what a model says to a prompt that opens the block.
        let counts = |split: &Split<'_>| split.opened || field.is_none() && split.alone;
        let in_content = said.and_then(|text| Split::of(text, tag, closing)).filter(counts);
        Self { field: field.map(|text| text.trim_matches('\n')), in_content }
    }

    fn thought(&self) -> &'a str {
        self.field.or(self.in_content.as_ref().map(|split| split.thought)).unwrap_or_default()
    }

    fn is(&self, thought: &str) -> bool {
        self.field == Some(thought) || self.in_content.as_ref().is_some_and(|split| split.thought == thought)
    }
}

fn before_turn(i: usize) -> String {
    format!("message {}: the chat template cannot render the prompt that this assistant message answers", i + 1)
}

/// What stands in `a` and in `b` from where they first differ, a few characters of each.
fn parting<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let same = a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y);
    let at = same.map_or(a.len().min(b.len()), |((at, _), _)| at);
    let cut = |s: &'a str| {
        let rest = &s[at..];
        &rest[..rest.char_indices().nth(24).map_or(rest.len(), |(i, _)| i)]
    };
    (cut(a), cut(b))
}
