//! Checks that handlers keep to the order of events.

use super::request::CHOICES_MAX;
use super::{Event, EventStream, HandlerError, Kind};

/// Longest text of an answer, in bytes, and most memory that its events may have taken: more is a fault of its sender.
const TEXT_BYTES_MAX: usize = 8 << 20;
const EVENT_BYTES_MAX: usize = 256 << 20;
/// Most calls of a choice.
const CALLS_MAX: usize = 128;

/// Returns the stream with every violation of the order as an error, so that a handler's mistake does not look like an answer.
///
/// The order is one start; of each choice, from 0 on, texts, thoughts and calls that are not empty, and one finish; one usage when all
/// choices have ended. The first piece of a call, and no other, has its id and its name; calls begin in the order of their numbers. A
/// stream that ends early is [`Kind::Cut`], one that does not end is [`Kind::Protocol`]. Nothing follows an error.
pub fn checked(stream: EventStream) -> EventStream {
    Box::new(Checked { stream, state: State::New, choices: [Choice::default(); CHOICES_MAX], text: 0, bytes: 0 })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Answering,
    Paid,
    Over,
}

/// What has come of a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Choice {
    begun: bool,
    finished: bool,
    calls: usize,
}

struct Checked {
    stream: EventStream,
    state: State,
    choices: [Choice; CHOICES_MAX],
    /// Bytes of the text so far, and of the events.
    text: usize,
    bytes: usize,
}

impl Checked {
    /// The state after an event, if that may come now.
    fn advance(&mut self, event: &Event) -> Option<State> {
        match (self.state, event) {
            (State::New, Event::Start(_)) => Some(State::Answering),
            (State::Answering, Event::Usage(_)) => {
                let begun = self.choices.iter().rposition(|choice| choice.begun)?;
                self.choices[..=begun].iter().all(|choice| choice.finished).then_some(State::Paid)
            }
            (State::Answering, event) => self.of_choice(event).map(|()| State::Answering),
            _ => None,
        }
    }

    fn is_endless(&mut self, event: &Event) -> bool {
        self.text += event.text_bytes();
        self.bytes += event.bytes();
        self.text > TEXT_BYTES_MAX || self.bytes > EVENT_BYTES_MAX
    }

    /// Notes an event of a choice, if that may come now.
    fn of_choice(&mut self, event: &Event) -> Option<()> {
        let (number, is_right) = match event {
            Event::Delta { choice, text, logprobs } => (choice, !text.is_empty() || !logprobs.is_empty()),
            Event::Reasoning { choice, text } => (choice, !text.is_empty()),
            Event::ToolCall { choice, index, id, name, .. } => {
                let named = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
                let calls = self.choices.get(*choice)?.calls;
                let begins = *index == calls && calls < CALLS_MAX && named(id) && named(name);
                (choice, begins || *index < calls && id.is_none() && name.is_none())
            }
            Event::Finish { choice, .. } => (choice, true),
            Event::Start(_) | Event::Usage(_) => return None,
        };
        let choice = self.choices.get_mut(*number).filter(|choice| is_right && !choice.finished)?;
        choice.begun = true;
        choice.calls += usize::from(matches!(event, Event::ToolCall { id: Some(_), .. }));
        choice.finished = matches!(event, Event::Finish { .. });
        Some(())
    }
}

impl Iterator for Checked {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Over {
            return None;
        }
        let item = match self.stream.next() {
            Some(Ok(event)) => match self.advance(&event) {
                Some(_) if self.is_endless(&event) => {
                    let message = format!("the answer was stopped: it is longer than {} MiB", TEXT_BYTES_MAX >> 20);
                    Some(Err(HandlerError::new(Kind::Protocol, message)))
                }
                Some(state) => {
                    self.state = state;
                    return Some(Ok(event));
                }
                None => {
                    // Nothing of what it says: this goes into a log.
                    let (state, event) = (self.state, event.word());
                    let error = anyhow::anyhow!("a handler's events are out of order: {event} in state {state:?}");
                    Some(Err(HandlerError::internal(&error)))
                }
            },
            Some(Err(error)) => Some(Err(error)),
            None if self.state == State::Paid => None,
            None => Some(Err(HandlerError::new(Kind::Cut, "the answer broke off before its end"))),
        };
        self.state = State::Over;
        item
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FinishReason, Usage, collect};
    use super::*;

    /// Events by letters: s(tart), d(elta), e(mpty delta), r(easoning), c(all), m(ore of the call), f(inish), u(sage); a number before one is
    /// its choice.
    fn events(letters: &str) -> Vec<Result<Event, HandlerError>> {
        let (mut choice, mut calls, mut events) = (0, [0; 10], Vec::new());
        for letter in letters.chars() {
            let (id, name, arguments) = (Some("i".to_owned()), Some("n".to_owned()), "{".to_owned());
            events.push(Ok(match letter {
                's' => Event::start("i", "m", "h"),
                'd' => Event::Delta { choice, text: "x".into(), logprobs: Vec::new() },
                'e' => Event::Delta { choice, text: String::new(), logprobs: Vec::new() },
                'r' => Event::Reasoning { choice, text: "hm".into() },
                'c' => {
                    calls[choice] += 1;
                    Event::ToolCall { choice, index: calls[choice] - 1, id, name, arguments }
                }
                'm' => {
                    let index = usize::max(calls[choice], 1) - 1;
                    Event::ToolCall { choice, index, id: None, name: None, arguments: "}".to_owned() }
                }
                // A call without its name.
                'b' => Event::ToolCall { choice, index: calls[choice], id, name: None, arguments },
                'f' => Event::Finish { choice, reason: FinishReason::Stop },
                'u' => Event::Usage(Usage::default()),
                number => {
                    choice = number.to_digit(10).expect("a number") as usize;
                    continue;
                }
            }));
        }
        events
    }

    fn kind(letters: &str) -> Result<String, Kind> {
        collect(Box::new(events(letters).into_iter())).map(|whole| whole.text().to_owned()).map_err(|error| error.kind)
    }

    #[test]
    fn only_the_grammar_passes() {
        assert_eq!(kind("sddfu"), Ok("xx".into()));
        assert_eq!(kind("srdfu"), Ok("x".into()));
        for fine in ["sfu", "scmmfu", "sccmfu", "s1f0fu", "s0f1f2f3f4f5f6f7fu"] {
            assert_eq!(kind(fine), Ok(String::new()), "{fine}");
        }
        for cut in ["", "s", "sd", "sdf", "s0f1d"] {
            assert_eq!(kind(cut), Err(Kind::Cut), "{cut}");
        }
        for wrong in [
            "d", "ssfu", "sefu", "sdu", "su", "sdffu", "sdfd", "sdfuu", "sdfud", "f", "smfu", "sbfu", "scbfu", "s1fu",
            "s0f2fu", "s0d1fu", "s8f", "sdfcu",
        ] {
            assert_eq!(kind(wrong), Err(Kind::Internal), "{wrong}");
        }
    }

    #[test]
    fn choices_that_come_between_each_other_are_collected_apart() {
        let whole = collect(Box::new(events("s0d1r1d0d1cm0f1mfu").into_iter())).expect("it is in order");
        let [first, second] = &whole.choices[..] else { panic!("{whole:?}") };
        assert_eq!((first.text.as_str(), second.text.as_str(), second.reasoning.as_str()), ("xx", "x", "hm"));
        let arguments: Vec<&str> = second.tool_calls.iter().map(|call| call.arguments.as_str()).collect();
        assert_eq!((first.tool_calls.len(), &arguments[..]), (0, &["{}}"][..]));
    }

    #[test]
    fn a_text_that_does_not_end_is_stopped() {
        let start = Event::start("i", "m", "h");
        for piece in [Event::text("x".repeat(1 << 20)), Event::Reasoning { choice: 0, text: "x".repeat(1 << 20) }] {
            let endless = std::iter::repeat(piece);
            let refused = collect(Box::new(std::iter::once(start.clone()).chain(endless).map(Ok)));
            let refused = refused.expect_err("it has no end");
            assert!(refused.kind == Kind::Protocol && refused.message.contains("8 MiB"), "{refused}");
        }
    }
}
