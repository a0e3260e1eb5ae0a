//! An answer whose texts are rewritten on their way: each kind of text of each choice by itself, since their pieces come between each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::handler::{Event, EventStream, FinishReason, HandlerError, Usage};

/// A kind of text of a choice, in the order in which what was held back of them is told at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// What the model thinks.
    Reasoning,
    /// What it says.
    Text,
    /// The arguments of a call, by its number: JSON.
    Call(usize),
}

/// Rewrites one text, which comes in pieces.
pub(super) trait Rewrite: Send {
    /// Takes a piece. Returns the text that is known, and whether the answer ends there; the rest is held back.
    fn push(&mut self, piece: &str, is_last: bool) -> (String, bool);
}

/// The events of an answer with other texts.
pub(super) struct Rewritten<F, R> {
    stream: Option<EventStream>,
    /// Makes what rewrites a kind of text.
    make: F,
    texts: BTreeMap<(usize, Kind), R>,
    /// Choices that are complete, and the number of choices that have begun.
    finished: BTreeSet<usize>,
    choices: usize,
    ready: VecDeque<Event>,
}

/// The answer ends here.
struct Ends;

impl<R: Rewrite, F: FnMut(Kind) -> R> Rewritten<F, R> {
    pub(super) fn new(stream: EventStream, make: F) -> Self {
        let (texts, finished, ready) = Default::default();
        Self { stream: Some(stream), make, texts, finished, choices: 1, ready }
    }

    /// Rewrites a piece. `whole` makes an event of it, unless nothing of it is known yet.
    fn rewrite(
        &mut self,
        (choice, kind): (usize, Kind),
        piece: &str,
        is_last: bool,
        whole: impl FnOnce(String) -> Option<Event>,
    ) -> Result<(), Ends> {
        self.choices = self.choices.max(choice + 1);
        let text = self.texts.entry((choice, kind)).or_insert_with(|| (self.make)(kind));
        let (text, ends) = text.push(piece, is_last);
        self.ready.extend(whole(text));
        if ends { Err(Ends) } else { Ok(()) }
    }

    fn take(&mut self, event: Event) -> Result<(), Ends> {
        match event {
            Event::Delta { choice, text, logprobs } => self.rewrite((choice, Kind::Text), &text, false, |text| {
                (!text.is_empty() || !logprobs.is_empty()).then_some(Event::Delta { choice, text, logprobs })
            }),
            Event::Reasoning { choice, text } => self.rewrite((choice, Kind::Reasoning), &text, false, |text| {
                (!text.is_empty()).then_some(Event::Reasoning { choice, text })
            }),
            Event::ToolCall { choice, index, id, name, arguments } => {
                self.rewrite((choice, Kind::Call(index)), &arguments, false, |arguments| {
                    let says = id.is_some() || !arguments.is_empty();
                    says.then_some(Event::ToolCall { choice, index, id, name, arguments })
                })
            }
            Event::Finish { choice, reason } => {
                let of_choice = (choice, Kind::Reasoning)..=(choice, Kind::Call(usize::MAX));
                let kinds: Vec<Kind> = self.texts.range(of_choice).map(|((_, kind), _)| *kind).collect();
                for kind in kinds {
                    self.rewrite((choice, kind), "", true, |text| {
                        (!text.is_empty()).then(|| match kind {
                            Kind::Reasoning => Event::Reasoning { choice, text },
                            Kind::Text => Event::Delta { choice, text, logprobs: Vec::new() },
                            Kind::Call(index) => {
                                Event::ToolCall { choice, index, id: None, name: None, arguments: text }
                            }
                        })
                    })?;
                }
                self.choices = self.choices.max(choice + 1);
                self.finished.insert(choice);
                self.ready.push_back(Event::Finish { choice, reason });
                Ok(())
            }
            other @ (Event::Start(_) | Event::Usage(_)) => {
                self.ready.push_back(other);
                Ok(())
            }
        }
    }
}

impl<R: Rewrite, F: FnMut(Kind) -> R> Iterator for Rewritten<F, R> {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            let event = match self.stream.as_mut()?.next()? {
                Ok(event) => event,
                error => return Some(error),
            };
            if let Err(Ends) = self.take(event) {
                // The rest is not asked for, of no choice, so that its cost is not known.
                self.stream = None;
                let open = (0..self.choices).filter(|choice| !self.finished.contains(choice));
                let reason = || FinishReason::ContentFilter;
                self.ready.extend(open.map(|choice| Event::Finish { choice, reason: reason() }));
                self.ready.push_back(Event::Usage(Usage::default()));
            }
        }
    }
}
