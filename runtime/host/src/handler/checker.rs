//! Checks that handlers keep to the order of events.

use super::{Event, EventStream, HandlerError, Kind};

/// Longest text of an answer, in bytes: a longer one is a fault of its sender.
const TEXT_LIMIT: usize = 8 << 20;

/// Returns the stream with every violation of the order as an error, so that a handler's mistake does not look like an answer.
///
/// The order is one start, deltas that are not empty, one finish, one usage. A stream that ends early is [`Kind::Cut`], one whose
/// text does not end is [`Kind::Protocol`]. Nothing follows an error.
pub fn checked(stream: EventStream) -> EventStream {
    Box::new(Checked { stream, state: State::New, bytes: 0 })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Text,
    Finished,
    Paid,
    Over,
}

struct Checked {
    stream: EventStream,
    state: State,
    /// Length of the text so far.
    bytes: usize,
}

impl Checked {
    fn advance(&self, event: &Event) -> Option<State> {
        match (self.state, event) {
            (State::New, Event::Start { .. }) => Some(State::Text),
            (State::Text, Event::Delta { text }) if !text.is_empty() => Some(State::Text),
            (State::Text, Event::Finish { .. }) => Some(State::Finished),
            (State::Finished, Event::Usage(_)) => Some(State::Paid),
            _ => None,
        }
    }

    fn is_endless(&mut self, event: &Event) -> bool {
        if let Event::Delta { text } = event {
            self.bytes += text.len();
        }
        self.bytes > TEXT_LIMIT
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
                    let message = format!("the answer was stopped: it is longer than {} MiB", TEXT_LIMIT >> 20);
                    Some(Err(HandlerError::new(Kind::Protocol, message)))
                }
                Some(state) => {
                    self.state = state;
                    return Some(Ok(event));
                }
                None => {
                    let message = format!("a handler's events are out of order: {event:?} in state {:?}", self.state);
                    Some(Err(HandlerError::new(Kind::Internal, message)))
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

    fn kind(letters: &str) -> Result<String, Kind> {
        let event = |letter| match letter {
            's' => Event::Start { id: "i".into(), model: "m".into(), handler: "h".into() },
            'd' => Event::Delta { text: "x".into() },
            'e' => Event::Delta { text: String::new() },
            'f' => Event::Finish { reason: FinishReason::Stop },
            _ => Event::Usage(Usage::default()),
        };
        let events: Vec<_> = letters.chars().map(|letter| Ok(event(letter))).collect();
        collect(Box::new(events.into_iter())).map(|whole| whole.text).map_err(|error| error.kind)
    }

    #[test]
    fn only_the_grammar_passes() {
        assert_eq!(kind("sddfu"), Ok("xx".into()));
        assert_eq!(kind("sfu"), Ok(String::new()));
        for cut in ["", "s", "sd", "sdf"] {
            assert_eq!(kind(cut), Err(Kind::Cut), "{cut}");
        }
        for wrong in ["d", "ssfu", "sefu", "sdu", "sdffu", "sdfd", "sdfuu", "sdfud", "f"] {
            assert_eq!(kind(wrong), Err(Kind::Internal), "{wrong}");
        }
    }

    #[test]
    fn a_text_that_does_not_end_is_stopped() {
        let start = Event::Start { id: "i".into(), model: "m".into(), handler: "h".into() };
        let endless = std::iter::repeat_with(|| Event::Delta { text: "x".repeat(1 << 20) });
        let refused = collect(Box::new(std::iter::once(start).chain(endless).map(Ok))).expect_err("it has no end");
        assert!(refused.kind == Kind::Protocol && refused.message.contains("8 MiB"), "{refused}");
    }
}
