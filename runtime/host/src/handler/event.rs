//! What a handler says of an answer, piece by piece, and the whole that the pieces make.

use super::{HandlerError, ToolCall, checked};

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or wrote a stop text.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
    /// The model calls tools and waits for their results.
    ToolCalls,
    /// The provider's filter withheld the rest.
    ContentFilter,
    /// Another reason, in the provider's word.
    Other(String),
}

impl FinishReason {
    /// The word of OpenAI's API.
    pub fn word(&self) -> &str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
            Self::Other(word) => word,
        }
    }
}

/// Counts of tokens; `None` where the provider did not give one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the conversation as the model saw it.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer, including the one that ends the turn.
    pub completion_tokens: Option<u64>,
}

/// The beginning of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Its id: the provider's, or one of ours.
    pub id: String,
    /// The model that answers, by the provider's name for it.
    pub model: String,
    /// The handler that answers, by our name for it.
    pub handler: String,
    /// What the answer depends on besides the request: other weights or another template have another one.
    pub fingerprint: Option<String>,
    /// Fields of the request that the handler left out, as its settings allow.
    pub ignored: Vec<String>,
}

/// A token and how likely it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprob {
    /// The token as text; where it is no whole character, with replacement characters.
    pub token: String,
    /// Its bytes, where they are known.
    pub bytes: Option<Vec<u8>>,
    /// The logarithm of its probability.
    pub logprob: f64,
    /// The likeliest in its place, as many as were asked for, the first first.
    pub top: Vec<TokenLogprob>,
}

/// A piece of an answer. The order is one `Start`; of each choice any number of `Delta`, `Reasoning` and `ToolCall`, and one `Finish`; one
/// `Usage`. Choices may come between each other.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The answer begins.
    Start(Start),
    /// More text.
    Delta {
        /// The choice that it is of, from 0.
        choice: usize,
        /// Whole characters; at least one, or there is a token.
        text: String,
        /// The tokens that were drawn since the last piece, if they were asked for.
        logprobs: Vec<TokenLogprob>,
    },
    /// More of what the model thinks before it speaks.
    Reasoning {
        /// The choice that it is of.
        choice: usize,
        /// Whole characters, at least one.
        text: String,
    },
    /// A call of a tool, or more of its arguments.
    ToolCall {
        /// The choice that it is of.
        choice: usize,
        /// The number of the call in its choice, from 0.
        index: usize,
        /// Its id, with the first piece of the call.
        id: Option<String>,
        /// The tool, with the first piece of the call.
        name: Option<String>,
        /// More of the arguments' JSON text.
        arguments: String,
    },
    /// A choice is complete.
    Finish {
        /// Which one.
        choice: usize,
        /// Why it ended.
        reason: FinishReason,
    },
    /// The last event.
    Usage(Usage),
}

impl Event {
    /// Returns more text of the first choice.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Delta { choice: 0, text: text.into(), logprobs: Vec::new() }
    }

    /// Returns the end of the first choice.
    pub fn finish(reason: FinishReason) -> Self {
        Self::Finish { choice: 0, reason }
    }

    /// Returns the beginning of an answer of a handler.
    pub fn start(id: impl Into<String>, model: impl Into<String>, handler: impl Into<String>) -> Self {
        Self::Start(Start { id: id.into(), model: model.into(), handler: handler.into(), ..Start::default() })
    }

    /// Its name.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Start(_) => "start",
            Self::Delta { .. } => "text",
            Self::Reasoning { .. } => "reasoning",
            Self::ToolCall { .. } => "call",
            Self::Finish { .. } => "finish",
            Self::Usage(_) => "usage",
        }
    }

    /// Returns the length of its text, in bytes.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Delta { text, .. } | Self::Reasoning { text, .. } | Self::ToolCall { arguments: text, .. } => {
                text.len()
            }
            Self::Start(_) | Self::Finish { .. } | Self::Usage(_) => 0,
        }
    }

    /// Returns about the memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        const SELF: usize = 64;
        let token = |one: &TokenLogprob| SELF + one.token.len() + one.bytes.as_ref().map_or(0, Vec::len);
        let logprob = |one: &TokenLogprob| token(one) + one.top.iter().map(token).sum::<usize>();
        let logprobs = match self {
            Self::Delta { logprobs, .. } => logprobs.iter().map(logprob).sum(),
            _ => 0,
        };
        SELF + self.text_bytes() + logprobs
    }
}

/// Events as they happen. Nothing follows an error.
pub type EventStream = Box<dyn Iterator<Item = Result<Event, HandlerError>> + Send>;

/// One of the answers to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The text.
    pub text: String,
    /// What the model thought before it spoke.
    pub reasoning: String,
    /// What it calls.
    pub tool_calls: Vec<ToolCall>,
    /// The tokens of the text, if they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Default for Choice {
    fn default() -> Self {
        let (text, reasoning, tool_calls, logprobs) = Default::default();
        Self { text, reasoning, tool_calls, logprobs, finish: FinishReason::Stop }
    }
}

impl Choice {
    /// A choice of text alone.
    pub fn of_text(text: impl Into<String>, finish: FinishReason) -> Self {
        Self { text: text.into(), finish, ..Self::default() }
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    /// Its beginning: its id, and who answered.
    pub start: Start,
    /// Its choices, at least one.
    pub choices: Vec<Choice>,
    /// Its tokens.
    pub usage: Usage,
}

impl Completion {
    /// The text of the first choice.
    pub fn text(&self) -> &str {
        self.choices.first().map_or("", |choice| &choice.text)
    }

    /// Why the first choice ended.
    pub fn finish(&self) -> &FinishReason {
        self.choices.first().map_or(&FinishReason::Stop, |choice| &choice.finish)
    }

    fn choice(&mut self, choice: usize) -> &mut Choice {
        if self.choices.len() <= choice {
            self.choices.resize_with(choice + 1, Choice::default);
        }
        &mut self.choices[choice]
    }
}

/// Collects the events of a stream into an answer.
///
/// # Errors
/// When the stream fails or ends early.
pub fn collect(stream: EventStream) -> Result<Completion, HandlerError> {
    let mut whole = Completion::default();
    // The numbers of choices and calls are as `checked` lets them pass.
    for event in checked(stream) {
        match event? {
            Event::Start(start) => whole.start = start,
            Event::Delta { choice, text, logprobs } => {
                let choice = whole.choice(choice);
                choice.text.push_str(&text);
                choice.logprobs.extend(logprobs);
            }
            Event::Reasoning { choice, text } => whole.choice(choice).reasoning.push_str(&text),
            Event::ToolCall { choice, index, id, name, arguments } => {
                let calls = &mut whole.choice(choice).tool_calls;
                if let (Some(id), Some(name)) = (id, name) {
                    calls.push(ToolCall { id, name, arguments });
                } else if let Some(call) = calls.get_mut(index) {
                    call.arguments.push_str(&arguments);
                }
            }
            Event::Finish { choice, reason } => whole.choice(choice).finish = reason,
            Event::Usage(usage) => whole.usage = usage,
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever bounds the memory of an answer counts by it.
    #[test]
    fn the_bytes_of_an_event_are_those_of_all_its_texts() {
        let token = |text: &str, top| TokenLogprob {
            token: text.to_owned(),
            bytes: Some(text.as_bytes().to_vec()),
            logprob: -1.0,
            top,
        };
        let likely = vec![token(&"x".repeat(1000), Vec::new()); 20];
        let event = Event::Delta { choice: 0, text: "abc".into(), logprobs: vec![token(&"y".repeat(500), likely)] };
        assert!((41_003..45_000).contains(&event.bytes()), "{}", event.bytes());
        assert_eq!((event.text_bytes(), event.word()), (3, "text"));
    }
}
