//! A handler that gives answers which were recorded or written down: for tests, for demonstrations, and for lessons without a model.
//!
//! Its file has a line of JSON for each answer: `{"user": "What is 7 x 8?", "answer": "56"}`; see [`Recorded`] for what else may stand in
//! one. [`record`](super::wrap::record) writes such files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use homeroom_engine::files::read_bytes;
use serde::{Deserialize, Serialize};

use super::{
    Completion, Context, Event, EventStream, FinishReason, Handler, HandlerError, Kind, Request, Role, ToolCall, Usage,
    new_id,
};
use crate::progress::line;

/// Longest file, in bytes.
pub(super) const BYTES_MAX: u64 = 64 << 20;

/// A recorded answer: a line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    /// The last message of the user, which it answers.
    #[serde(default)]
    pub user: String,
    /// The text of the answer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub answer: String,
    /// What the model thought before it spoke.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reasoning: String,
    /// What it calls: `{"id": …, "name": …, "arguments": "…"}`, the arguments as JSON text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Call>,
    /// Why it ended, in OpenAI's word.
    #[serde(default = "stop")]
    pub finish_reason: String,
    /// Tokens of the conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens: Option<u64>,
    /// The model that gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Its id.
    pub id: String,
    /// The tool.
    pub name: String,
    /// What it is given, as JSON text.
    pub arguments: String,
}

fn stop() -> String {
    FinishReason::Stop.word().to_owned()
}

impl Recorded {
    /// A record of the first choice of an answer to a request.
    pub(super) fn of(request: &Request, whole: Completion) -> Self {
        let choice = whole.choices.into_iter().next().unwrap_or_default();
        let call = |ToolCall { id, name, arguments }| Call { id, name, arguments };
        Self {
            user: question(request).to_owned(),
            finish_reason: choice.finish.word().to_owned(),
            answer: choice.text,
            reasoning: choice.reasoning,
            tool_calls: choice.tool_calls.into_iter().map(call).collect(),
            prompt_tokens: whole.usage.prompt_tokens,
            completion_tokens: whole.usage.completion_tokens,
            model: Some(whole.start.model),
        }
    }

    fn reason(&self) -> FinishReason {
        match self.finish_reason.as_str() {
            "stop" => FinishReason::Stop,
            "length" => FinishReason::Length,
            "tool_calls" => FinishReason::ToolCalls,
            "content_filter" => FinishReason::ContentFilter,
            other => FinishReason::Other(other.to_owned()),
        }
    }

    /// Its events, a word a piece.
    fn events(&self, name: &str) -> EventStream {
        let model = self.model.clone().unwrap_or_else(|| name.to_owned());
        let start = Event::start(new_id(), model, name);
        let reasoning = Some(self.reasoning.clone()).filter(|text| !text.is_empty());
        let reasoning = reasoning.map(|text| Event::Reasoning { choice: 0, text });
        let words: Vec<Event> = self.answer.split_inclusive(char::is_whitespace).map(Event::text).collect();
        let call = |(index, Call { id, name, arguments }): (usize, Call)| {
            let (id, name) = (Some(id), Some(name));
            Event::ToolCall { choice: 0, index, id, name, arguments }
        };
        let calls: Vec<Event> = self.tool_calls.iter().cloned().enumerate().map(call).collect();
        let usage = Usage { prompt_tokens: self.prompt_tokens, completion_tokens: self.completion_tokens };
        let end = [Event::finish(self.reason()), Event::Usage(usage)];
        Box::new([start].into_iter().chain(reasoning).chain(words).chain(calls).chain(end).map(Ok))
    }
}

/// The last message of the user.
fn question(request: &Request) -> &str {
    let user = |message: &&super::Message| message.role == Role::User;
    request.messages.iter().rev().find(user).map_or("", |message| message.content.trim())
}

/// How an answer is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By the last message of the user. If several answer the same, each is given once, and the last again and again.
    User,
    /// In the order of the file, whatever is asked; after the last there is none.
    Order,
}

/// A handler of kind `replay`, as a file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplaySpec {
    /// The file of answers.
    pub file: PathBuf,
    /// How an answer is found.
    pub by: By,
}

/// Gives recorded answers.
pub struct Replay {
    name: String,
    by: By,
    answers: Vec<Arc<Recorded>>,
    /// How many were given, by the question, or by none in the order of the file.
    given: Mutex<HashMap<String, usize>>,
}

impl Replay {
    /// Reads the answers.
    ///
    /// # Errors
    /// When the file cannot be read, or a line of it is no answer.
    pub fn load(name: impl Into<String>, spec: &ReplaySpec) -> Result<Self> {
        let answers = read(&spec.file)?;
        Ok(Self { name: name.into(), by: spec.by, answers, given: Mutex::default() })
    }

    fn answer(&self, request: &Request) -> Option<Arc<Recorded>> {
        let question = question(request);
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let (key, matching): (&str, Vec<&Arc<Recorded>>) = match self.by {
            By::Order => ("", self.answers.iter().collect()),
            By::User => (question, self.answers.iter().filter(|answer| answer.user.trim() == question).collect()),
        };
        // Questions that have no answer are not kept.
        let last = matching.len().checked_sub(1)?;
        let count = given.entry(key.to_owned()).or_default();
        let at = if self.by == By::User { (*count).min(last) } else { *count };
        *count = count.saturating_add(1);
        matching.get(at).map(|answer| (*answer).clone())
    }
}

/// Where the last line begins, if it was cut short while it was recorded. The cut may be inside a character.
pub(super) fn cut_line(bytes: &[u8]) -> Option<usize> {
    let begins = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let last = bytes[begins..].trim_ascii();
    let is_cut = !last.is_empty() && serde_json::from_slice::<Recorded>(last).is_err_and(|error| error.is_eof());
    is_cut.then_some(begins)
}

fn read(path: &Path) -> Result<Vec<Arc<Recorded>>> {
    let mut bytes = read_bytes(path, BYTES_MAX)?;
    if let Some(begins) = cut_line(&bytes) {
        line(format_args!("warning: {}: its last line was cut short, and is left out", path.display()));
        bytes.truncate(begins);
    }
    let text = String::from_utf8(bytes).with_context(|| format!("{}: not UTF-8", path.display()))?;
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let answers = lines.map(|(number, line)| {
        let answer = serde_json::from_str(line).with_context(|| {
            format!(
                "{}:{}: not a recorded answer, such as {{\"user\": \"…\", \"answer\": \"…\"}}",
                path.display(),
                number + 1
            )
        })?;
        Ok(Arc::new(answer))
    });
    let answers: Vec<_> = answers.collect::<Result<_>>()?;
    ensure!(!answers.is_empty(), "{}: it has no answer", path.display());
    Ok(answers)
}

impl Handler for Replay {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let answer = self.answer(request).ok_or_else(|| {
            let message = match self.by {
                By::User => format!("`{}` has no recorded answer to this message", self.name),
                By::Order => format!("all recorded answers of `{}` were given", self.name),
            };
            HandlerError::new(Kind::NotFound, message)
        })?;
        Ok(context.watch(answer.events(&self.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Message;
    use super::*;

    fn replay(by: By, lines: impl AsRef<[u8]>) -> Result<Replay> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("a.jsonl");
        std::fs::write(&file, lines)?;
        Replay::load("r", &ReplaySpec { file, by })
    }

    fn ask(replay: &Replay, text: &str) -> Result<String, Kind> {
        let request = Request { messages: vec![Message::new(Role::User, text)], ..Request::default() };
        replay.complete(&request, &Context::default()).map(|whole| whole.text().to_owned()).map_err(|error| error.kind)
    }

    #[test]
    fn answers_are_found_by_the_question_or_come_in_order() -> Result<()> {
        let lines = "{\"user\": \"a?\", \"answer\": \"a one\"}\n\n{\"user\": \"b?\", \"answer\": \"b  é\\n\"}\n{\"user\": \"a?\", \"answer\": \"\"}\n";
        let by_user = replay(By::User, lines)?;
        for (question, answer) in
            [("a?", Ok("a one")), (" b? ", Ok("b  é\n")), ("a?", Ok("")), ("a?", Ok("")), ("c?", Err(Kind::NotFound))]
        {
            assert_eq!(ask(&by_user, question), answer.map(str::to_owned), "{question}");
        }
        let in_order = replay(By::Order, lines)?;
        for answer in [Ok("a one"), Ok("b  é\n"), Ok(""), Err(Kind::NotFound)] {
            assert_eq!(ask(&in_order, "x"), answer.map(str::to_owned));
        }
        Ok(())
    }

    #[test]
    fn a_last_line_that_was_cut_short_is_left_out() -> Result<()> {
        let whole = "\u{feff}{\"user\": \"a?\", \"answer\": \"a\"}\n{\"user\": \"é?\", \"answer\": \"bb\"}\n";
        let first = whole.find('\n').expect("two lines") + 1;
        for cut in first..whole.len() {
            let answers =
                replay(By::User, &whole.as_bytes()[..cut]).map(|replay| (ask(&replay, "a?"), ask(&replay, "é?")))?;
            let second = if cut == whole.len() - 1 { Ok("bb".to_owned()) } else { Err(Kind::NotFound) };
            assert_eq!(answers, (Ok("a".to_owned()), second), "cut at {cut}");
        }
        assert!(replay(By::User, &whole[..first - 2]).is_err(), "nothing is left");
        Ok(())
    }

    #[test]
    fn a_line_that_is_no_answer_is_named() {
        for (lines, wanted) in [
            ("{\"answer\": \"x\"}\n{\"anser\": \"x\"}", "a.jsonl:2: not a recorded answer"),
            ("5", "a.jsonl:1: not"),
            ("\n", "it has no answer"),
        ] {
            let refused = format!("{:#}", replay(By::Order, lines).err().expect("it is wrong"));
            assert!(refused.contains(wanted), "{refused}");
        }
    }
}
