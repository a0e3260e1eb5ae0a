//! An answer in the middle of being drawn: the tokens of its choices, made into events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use homeroom_engine::inference::generate::Finish;
use homeroom_engine::inference::{Ask, Drawn, Likely, Tokens};
use homeroom_engine::models::BaseModel;
use homeroom_engine::text::block_end::BlockEnd;
use homeroom_engine::text::detokenizer::Detokenizer;
use homeroom_engine::text::tokenizer::Spelling;

use super::Generation;
use super::asked::Asked;
use super::calls::{Calls, Said};
use super::grammar::undrawn;
use crate::handler::context::PATIENCE;
use crate::handler::stop::StopFilter;
use crate::handler::{Context, Event, FinishReason, HandlerError, Start, TokenLogprob, Usage, new_id, random};

/// An answer in the middle of being drawn.
pub(super) struct Answer {
    generation: Generation,
    context: Context,
    prompt: Vec<u32>,
    /// What is asked for the choices behind the first, in order, once the first has read the prompt.
    later: VecDeque<Ask>,
    choices: Vec<Choice>,
    marks: Vec<(u32, String)>,
    one_call: bool,
    /// How tokens are spelled, where their log-probabilities are told.
    spelling: Option<Spelling>,
    ready: VecDeque<Event>,
    /// No more is drawn.
    over: bool,
}

/// A choice in the middle of being drawn.
struct Choice {
    /// `None`: it was not asked for yet, or is complete.
    tokens: Option<Tokens>,
    detokenizer: Detokenizer,
    block_end: BlockEnd,
    stops: StopFilter,
    calls: Option<Calls>,
    /// Calls that were told of.
    called: usize,
    /// Tokens whose text was not told yet.
    pending: Vec<TokenLogprob>,
    /// Tokens drawn, with the one that ends the turn.
    drawn: u64,
    finished: bool,
}

impl Answer {
    /// Asks for the first choice.
    pub(super) fn begin(
        name: &str,
        generation: Generation,
        asked: Asked,
        context: &Context,
    ) -> Result<Self, HandlerError> {
        let Asked { prompt, asks, block_end, stop, calls, marks, one_call, logprobs } = asked;
        let choice = |(block_end, calls)| Choice {
            tokens: None,
            detokenizer: Detokenizer::default(),
            block_end,
            stops: StopFilter::new(&stop),
            calls,
            called: 0,
            pending: Vec::new(),
            drawn: 0,
            finished: false,
        };
        let choices = block_end.into_iter().zip(calls).map(choice).collect();
        let spelling = logprobs.then(|| generation.model().tokenizer.spelling());
        let start = Start {
            id: new_id(),
            model: name.to_owned(),
            handler: name.to_owned(),
            fingerprint: generation.fingerprint.get().cloned(),
            ignored: Vec::new(),
        };
        let ready = VecDeque::from([Event::Start(start)]);
        let (later, context) = (VecDeque::from(asks), context.clone());
        let mut answer =
            Self { generation, context, prompt, later, choices, marks, one_call, spelling, ready, over: false };
        answer.ask(0)?;
        Ok(answer)
    }

    fn ask(&mut self, number: usize) -> Result<(), HandlerError> {
        let Some(ask) = self.later.pop_front() else { return Ok(()) };
        let tokens = self.generation.answerer.ask(&self.prompt, ask);
        self.choices[number].tokens = Some(tokens.map_err(|error| HandlerError::internal(&error))?);
        Ok(())
    }

    /// Asks for the choices behind the first: what that has read of the prompt is there for them.
    fn ask_later(&mut self) -> Result<(), HandlerError> {
        for number in self.choices.len() - self.later.len()..self.choices.len() {
            self.ask(number)?;
        }
        Ok(())
    }

    /// Makes events of the tokens that are there, of each choice one; waits for a moment if there is none.
    fn step(&mut self) -> Result<(), HandlerError> {
        let mut waited = false;
        let mut any = false;
        for number in 0..self.choices.len() {
            any |= self.take(number, Duration::ZERO)?;
        }
        for number in 0..self.choices.len() {
            if !any && !waited && self.choices[number].tokens.is_some() {
                waited = true;
                self.take(number, PATIENCE)?;
            }
        }
        if self.choices.iter().all(|choice| choice.finished) {
            self.over = true;
            let completion_tokens = Some(self.choices.iter().map(|choice| choice.drawn).sum());
            let usage = Usage { prompt_tokens: Some(self.prompt.len() as u64), completion_tokens };
            self.ready.push_back(Event::Usage(usage));
        }
        Ok(())
    }

    /// Takes a token of a choice, if one comes within a time.
    fn take(&mut self, number: usize, patience: Duration) -> Result<bool, HandlerError> {
        let Some(tokens) = &mut self.choices[number].tokens else { return Ok(false) };
        let Ok(drawn) = tokens.drawn_within(patience) else { return Ok(false) };
        let finish = tokens.finish();
        let drawn = drawn.transpose().map_err(|error| undrawn(&error))?;
        self.ask_later()?;
        let model = self.generation.model().clone();
        let choice = &mut self.choices[number];
        let (text, end) = match drawn {
            Some(drawn) => {
                choice.drawn += 1;
                let text = choice.spell(&drawn, &model, &self.marks).map_err(|error| HandlerError::internal(&error))?;
                if let (Some(spelling), Some(likely)) = (&self.spelling, drawn.likely) {
                    choice.pending.push(logprob(spelling, &model, drawn.id, likely));
                }
                (choice.block_end.push(text), None)
            }
            None => {
                let ended = finish == Some(Finish::Stop);
                choice.drawn += u64::from(ended);
                let tail =
                    choice.detokenizer.finish(&model.tokenizer).map_err(|error| HandlerError::internal(&error))?;
                let text = choice.block_end.push(tail) + &choice.block_end.finish();
                (text, Some(if ended { FinishReason::Stop } else { FinishReason::Length }))
            }
        };
        let (mut text, stopped) = choice.stops.push(&text);
        if end.is_some() && !stopped {
            text += &choice.stops.finish();
        }
        let end = if stopped { Some(FinishReason::Stop) } else { end };
        self.tell(number, &text, end);
        Ok(true)
    }

    /// Tells a text of a choice, and its end.
    fn tell(&mut self, number: usize, text: &str, end: Option<FinishReason>) {
        let choice = &mut self.choices[number];
        let mut said = match &mut choice.calls {
            None if text.is_empty() => Vec::new(),
            None => vec![Said::Text(text.to_owned())],
            Some(calls) => calls.push(text),
        };
        if end.is_some() {
            said.extend(choice.calls.as_mut().map(Calls::finish).unwrap_or_default());
        }
        let mut end = end;
        for one in said {
            match one {
                // White space between calls is no answer.
                Said::Text(text) if choice.called > 0 && text.trim().is_empty() => {}
                Said::Text(text) => {
                    let logprobs = std::mem::take(&mut choice.pending);
                    self.ready.push_back(Event::Delta { choice: number, text, logprobs });
                }
                Said::Call(name, arguments) => {
                    let id = Some(format!("call_{:016x}{:08x}", random(), random() as u32));
                    let (index, name) = (choice.called, Some(name));
                    self.ready.push_back(Event::ToolCall { choice: number, index, id, name, arguments });
                    choice.called += 1;
                    if self.one_call {
                        end = Some(end.unwrap_or(FinishReason::Stop));
                        break;
                    }
                }
            }
        }
        let Some(mut reason) = end else { return };
        if !choice.pending.is_empty() {
            let logprobs = std::mem::take(&mut choice.pending);
            self.ready.push_back(Event::Delta { choice: number, text: String::new(), logprobs });
        }
        if choice.called > 0 && reason == FinishReason::Stop {
            reason = FinishReason::ToolCalls;
        }
        (choice.tokens, choice.finished) = (None, true);
        self.ready.push_back(Event::Finish { choice: number, reason });
    }
}

impl Choice {
    /// The text that a token makes certain.
    fn spell(&mut self, drawn: &Drawn, model: &BaseModel, marks: &[(u32, String)]) -> anyhow::Result<String> {
        let Some((_, mark)) = marks.iter().find(|(id, _)| *id == drawn.id) else {
            return self.detokenizer.push(drawn.id, &model.tokenizer);
        };
        let before = std::mem::take(&mut self.detokenizer).finish(&model.tokenizer)?;
        Ok(before + mark)
    }
}

fn logprob(spelling: &Spelling, model: &Arc<BaseModel>, id: u32, likely: Likely) -> TokenLogprob {
    let one = |id: u32, logprob: f32| {
        let bytes = spelling.bytes(&model.tokenizer, id);
        let token = String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned();
        TokenLogprob { token, bytes, logprob: f64::from(logprob), top: Vec::new() }
    };
    let top = likely.top.into_iter().map(|(id, logprob)| one(id, logprob)).collect();
    TokenLogprob { top, ..one(id, likely.logprob) }
}

impl Iterator for Answer {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if let Err(error) = self.context.check().and_then(|()| self.step()) {
                self.over = true;
                return Some(Err(error));
            }
        }
    }
}
