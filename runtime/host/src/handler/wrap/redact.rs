//! Redaction: what is likely personal in a request does not leave this machine. A placeholder goes in its place, `[EMAIL_1]`, and the
//! answer comes back with what it stood for.
//!
//! What is found is what [`personal`](homeroom_engine::data::report::personal) finds: addresses, telephone numbers, and numbers of persons
//! and accounts. Names of persons are not found, and neither is what is personal by its meaning. Placeholders and what they stand for are
//! kept for as long as the answer takes, in memory.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use homeroom_engine::data::report::personal::find;
use serde_json::Value;

use super::Wrapper;
use super::rewritten::{Kind, Rewrite, Rewritten};
use super::texts::each_text_of;
use crate::handler::{
    Context, EmbedRequest, Embeddings, EventStream, Handler, HandlerError, Input, Part, Prompt, Request,
};

/// Longest placeholder that is known in an answer, in bytes, with what a model may put into it.
const PLACEHOLDER_MAX: usize = 48;

/// Takes what is likely personal out of requests, and puts it back into answers.
pub struct Redacting;

/// Placeholders of one request, and what they stand for.
#[derive(Default)]
struct Placeholders {
    /// By the value as it is written: what comes back is what was there, also if the same number is written in two ways.
    of_values: HashMap<String, String>,
    values: HashMap<String, String>,
    /// The number of the latest of each kind.
    counts: HashMap<&'static str, usize>,
    /// What looks like one and was typed, in capitals.
    typed: HashSet<String>,
}

impl Placeholders {
    /// Notes what looks like a placeholder in a text and is not ours.
    fn see(&mut self, text: &str) {
        for part in text.split('[').skip(1) {
            if let Some((inner, _)) = part.split_once(']').filter(|(inner, _)| inner.len() < PLACEHOLDER_MAX) {
                self.typed.insert(format!("[{}]", plain(inner)));
            }
        }
    }

    /// Puts placeholders into a text.
    fn hide(&mut self, text: &mut String) {
        let found = find(text);
        if found.is_empty() {
            return;
        }
        let (mut out, mut from) = (String::with_capacity(text.len()), 0);
        for found in found {
            out += &text[from..found.at.start];
            out += &self.of(found.kind, &text[found.at.clone()]);
            from = found.at.end;
        }
        out += &text[from..];
        *text = out;
    }

    fn of(&mut self, kind: &'static str, value: &str) -> String {
        if let Some(placeholder) = self.of_values.get(value) {
            return placeholder.clone();
        }
        let number = self.counts.entry(kind).or_default();
        let placeholder = loop {
            *number += 1;
            let placeholder = format!("[{}_{number}]", kind.to_ascii_uppercase());
            if !self.typed.contains(&placeholder) {
                break placeholder;
            }
        };
        self.of_values.insert(value.to_owned(), placeholder.clone());
        self.values.insert(placeholder.clone(), value.to_owned());
        placeholder
    }
}

/// Puts what placeholders stand for back into a text that comes in pieces.
struct Restorer {
    values: Arc<HashMap<String, String>>,
    /// The text is JSON, in which what comes back stands in quotes.
    in_json: bool,
    held: String,
}

impl Rewrite for Restorer {
    fn push(&mut self, piece: &str, is_last: bool) -> (String, bool) {
        (self.restore(piece, is_last), false)
    }
}

impl Restorer {
    fn new(values: Arc<HashMap<String, String>>, in_json: bool) -> Self {
        Self { values, in_json, held: String::new() }
    }

    /// Takes a piece. Returns the text that is known; what may be the beginning of a placeholder is held back.
    fn restore(&mut self, piece: &str, is_last: bool) -> String {
        self.held.push_str(piece);
        let (mut out, mut rest) = (String::new(), self.held.as_str());
        while let Some(at) = rest.find('[') {
            out += &rest[..at];
            rest = &rest[at..];
            let near = floor(rest, PLACEHOLDER_MAX);
            match near.find(']') {
                Some(end) => match self.values.get(&plain(&rest[..=end])) {
                    Some(value) => {
                        let json = self.in_json.then(|| Value::from(value.as_str()).to_string());
                        out += json.as_deref().map_or(value, |json| &json[1..json.len() - 1]);
                        rest = &rest[end + 1..];
                    }
                    None => {
                        out.push('[');
                        rest = &rest[1..];
                    }
                },
                None if !is_last && self.may_begin(rest) => {
                    self.held = rest.to_owned();
                    return out;
                }
                None => {
                    out.push('[');
                    rest = &rest[1..];
                }
            }
        }
        out += rest;
        self.held.clear();
        out
    }

    fn may_begin(&self, text: &str) -> bool {
        let text = plain(text);
        text.len() < PLACEHOLDER_MAX && self.values.keys().any(|placeholder| placeholder.starts_with(&text))
    }
}

/// A placeholder as it was given. Models write it in small letters, and escape it for Markdown.
fn plain(text: &str) -> String {
    text.chars().filter(|c| *c != '\\').collect::<String>().to_uppercase()
}

/// The beginning of a text, of at most `most` bytes.
fn floor(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// A request without what is likely personal, and what its placeholders stand for.
///
/// # Errors
/// When it has something in which nothing can be found: a picture, or tokens.
fn hidden(request: &Request) -> Result<(Request, Placeholders), HandlerError> {
    let blind = |param: &str, what: &str| {
        let message =
            format!("what is personal cannot be found in {what}, and the route has egress \"redact\"; send text alone");
        Err(HandlerError::invalid(param, message))
    };
    let mut parts = request.messages.iter().flat_map(|message| &message.parts);
    if parts.any(|part| matches!(part, Part::Image { .. })) {
        return blind("messages", "a picture");
    }
    if matches!(request.prompt, Some(Prompt::Tokens(_))) {
        return blind("prompt", "tokens");
    }
    let (mut request, mut placeholders) = (request.clone(), Placeholders::default());
    each_text_of(&mut request, |text| placeholders.see(text));
    each_text_of(&mut request, |text| placeholders.hide(text));
    Ok((request, placeholders))
}

impl Wrapper for Redacting {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let (request, placeholders) = hidden(request)?;
        let stream = inner.stream(&request, context)?;
        if placeholders.values.is_empty() {
            return Ok(stream);
        }
        let values = Arc::new(placeholders.values);
        let restorer = move |kind| Restorer::new(values.clone(), matches!(kind, Kind::Call(_)));
        Ok(Box::new(Rewritten::new(stream, restorer)))
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        let (mut request, mut placeholders) = (request.clone(), Placeholders::default());
        for input in &mut request.input {
            match input {
                Input::Text(text) => placeholders.hide(text),
                Input::Tokens(_) => {
                    let message =
                        "what is personal cannot be found in tokens, and the route has egress \"redact\"; send texts";
                    return Err(HandlerError::invalid("input", message));
                }
            }
        }
        inner.embed(&request, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{Event, FinishReason, Message, Role, ToolCall, Usage};

    /// Says back what it is asked, in pieces of so many characters.
    struct Echo(usize);

    impl Handler for Echo {
        fn stream(&self, request: &Request, _: &Context) -> Result<EventStream, HandlerError> {
            let text = &request.messages.last().expect("a message").content;
            assert!(find(text).is_empty(), "{text}");
            let letters: Vec<char> = text.chars().collect();
            let pieces: Vec<Event> =
                letters.chunks(self.0).map(|piece| Event::text(piece.iter().collect::<String>())).collect();
            let start = Event::start("i", "m", "h");
            let end = [Event::finish(FinishReason::Stop), Event::Usage(Usage::default())];
            Ok(Box::new([start].into_iter().chain(pieces).chain(end).map(Ok)))
        }
    }

    fn asked(text: &str) -> Request {
        Request { messages: vec![Message::new(Role::User, text)], ..Request::default() }
    }

    #[test]
    fn what_is_personal_leaves_as_a_placeholder_and_comes_back_whole() {
        for text in [
            "Write to lena.meier@schule-nord.de or +49 30 901 234 56, not to LENA.MEIER@schule-nord.de.",
            "IBAN DE89 3704 0044 0532 0130 00 [see [1]] and [EMAIL_1] typed, [lena@example.org]",
            "nothing [here] is personal [",
            "[[lena@example.org]] [EMAIL_",
            "é[lena@example.org]é",
        ] {
            for length in 1..=text.chars().count() {
                let handler = super::super::wrapped(Arc::new(Echo(length)), Redacting);
                let whole = handler.complete(&asked(text), &Context::default()).expect("it answers");
                assert_eq!(whole.text(), text, "in pieces of {length}");
            }
        }
    }

    #[test]
    fn a_value_has_one_placeholder_in_all_messages_and_a_typed_one_is_left_alone() {
        let mut request = asked("a@example.org b@example.org a@example.org");
        request.messages.push(Message::new(Role::Assistant, "I see b@example.org and [EMAIL_2]"));
        request.stop = vec!["c@example.org".into()];
        let (hidden, _) = hidden(&request).expect("it is text");
        assert_eq!(hidden.messages[0].content, "[EMAIL_1] [EMAIL_3] [EMAIL_1]");
        assert_eq!(hidden.messages[1].content, "I see [EMAIL_3] and [EMAIL_2]");
        assert_eq!(hidden.stop, ["[EMAIL_4]"]);
    }

    #[test]
    fn calls_of_tools_leave_and_come_back_as_json() {
        let mut request = asked("hi");
        let arguments = r#"{"to":"a@example.org","say":"\"x\""}"#.to_owned();
        let call = ToolCall { id: "1".into(), name: "mail".into(), arguments: arguments.clone() };
        request.messages.push(Message { tool_calls: vec![call], ..Message::new(Role::Assistant, "") });
        let (hidden, placeholders) = hidden(&request).expect("it is text");
        let sent = &hidden.messages[1].tool_calls[0].arguments;
        assert_eq!(sent, r#"{"to":"[EMAIL_1]","say":"\"x\""}"#);
        let mut restorer = Restorer::new(Arc::new(placeholders.values), true);
        assert_eq!(restorer.restore(sent, true), arguments);
        let mut restorer = Restorer::new(Arc::new(HashMap::from([("[URL_1]".into(), "a\"b".into())])), true);
        assert_eq!(restorer.restore("\"[URL_1]\"", true), r#""a\"b""#);
    }

    #[test]
    fn what_cannot_be_searched_does_not_leave() {
        let mut request = asked("hi");
        request.messages[0].parts = vec![Part::Image { url: "data:image/png;base64,AA".into(), detail: None }];
        assert!(hidden(&request).is_err_and(|error| error.message.contains("a picture")));
        let tokens = Request { prompt: Some(Prompt::Tokens(vec![1])), ..Request::default() };
        assert!(hidden(&tokens).is_err());
    }

    #[test]
    fn a_placeholder_is_known_as_models_write_it_and_little_else_is_held_back() {
        let values = HashMap::from([("[EMAIL_1]".to_owned(), "a@b.de".to_owned())]);
        let mut restorer = Restorer::new(Arc::new(values), false);
        assert_eq!(restorer.restore("to [Email\\_1] and [EMAIL_12] [x", false), "to a@b.de and [EMAIL_12] [x");
        assert_eq!(restorer.restore(" [em", false), " ");
        assert_eq!(restorer.restore("pty] [", false), "[empty] ");
        assert_eq!(restorer.restore("", true), "[");
    }
}
