//! Redaction: what is likely personal in a request does not leave this machine. A placeholder goes in its place, `[EMAIL_1]`, and the
//! answer comes back with what it stood for.
//!
//! What is found is what [`personal`](homeroom_engine::data::report::personal) finds: addresses, telephone numbers, and numbers of persons
//! and accounts. Names of persons are not found, and neither is what is personal by its meaning. Placeholders and what they stand for are
//! kept for as long as the answer takes, in memory.
//!
//! Where another text would break the request, as in the name of a tool or of a property, a request with something personal is refused,
//! and nothing of it leaves.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use homeroom_engine::data::report::personal::{Found, find, kinds};
use serde::de::IgnoredAny;
use serde_json::Value;

use super::Wrapper;
use super::rewritten::{Kind, Rewrite, Rewritten};
use super::texts::{Fixed, Text, each_fixed, each_text_of};
use crate::handler::{
    Context, EmbedRequest, Embeddings, EventStream, Handler, HandlerError, Input, Part, Prompt, Request, ResponseFormat,
};

/// Longest placeholder that is known in an answer, in bytes, with what a model may put into it.
const PLACEHOLDER_MAX: usize = 48;
/// Longest telephone number, in bytes, with what stands between its digits.
const NUMBER_MAX: usize = 64;

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
    /// Ids of calls, and those that stand for them. They do not come back.
    ids: HashMap<String, String>,
    /// Ids of calls that are taken.
    given_ids: HashSet<String>,
}

/// Finds what is likely personal in a text that is the value of a name.
fn find_of(name: &str, text: &str) -> Vec<Found> {
    let own = find(text);
    if name.is_empty() {
        return own;
    }
    let begins = name.len() + 2;
    let of_text = |found: &Found| found.at.start >= begins;
    let within = |found: Found| Found { at: found.at.start - begins..found.at.end - begins, ..found };
    let named: Vec<Found> = find(&format!("{name}: {text}")).into_iter().filter(of_text).map(within).collect();
    if named.len() > own.len() { named } else { own }
}

/// What is likely personal in a name, by its kind. Names are written with `_` for spaces, and nothing is computed in them: what `+` begins
/// may be a telephone number whatever stands before it.
fn likely(name: &str) -> Option<&'static str> {
    let kind = |name: &str| find(name).first().map(|found| found.kind);
    let begins = |(at, _)| {
        find(floor(&name[at..], NUMBER_MAX)).first().filter(|found| found.at.start == 0).map(|found| found.kind)
    };
    kind(name).or_else(|| kind(&name.replace('_', " "))).or_else(|| name.match_indices('+').find_map(begins))
}

/// What is likely personal in an address of a schema, which itself is nobody's.
fn likely_in_address(address: &str) -> Option<&'static str> {
    let address = address.replace("%40", "@").replace("%2B", "+").replace("%2b", "+");
    address.split(['/', '?', '#', '&', '=', ':', ';', ',']).find_map(likely)
}

/// A place in JSON.
#[derive(Default)]
struct Place {
    at: usize,
    in_text: bool,
    escaped: bool,
}

impl Place {
    /// Goes on over what comes next.
    fn go_on(&mut self, json: &str) {
        for byte in json.bytes() {
            match byte {
                _ if std::mem::take(&mut self.escaped) => {}
                b'\\' if self.in_text => self.escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ => {}
            }
        }
        self.at += json.len();
    }
}

/// The bytes of the number of which some bytes are a part.
fn number(json: &str, part: &Range<usize>) -> Range<usize> {
    let of_number = |byte: &&u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
    let before = json.as_bytes()[..part.start].iter().rev().take_while(of_number).count();
    let behind = json.as_bytes()[part.end..].iter().take_while(of_number).count();
    part.start - before..part.end + behind
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
        self.hide_of("", text);
    }

    /// Puts placeholders into a text that is the value of a name: `phone` says what a number behind it is. Returns whether there are any.
    fn hide_of(&mut self, name: &str, text: &mut String) -> bool {
        let found = find_of(name, text);
        if found.is_empty() {
            return false;
        }
        let (mut out, mut from) = (String::with_capacity(text.len()), 0);
        for found in found {
            out += &text[from..found.at.start];
            out += &self.of(found.kind, &text[found.at.clone()]);
            from = found.at.end;
        }
        out += &text[from..];
        *text = out;
        true
    }

    /// Puts placeholders into JSON, which stays JSON: a number becomes a text. What is none is a text.
    fn hide_in_json(&mut self, json: &mut String) {
        if serde_json::from_str::<IgnoredAny>(json).is_err() {
            return self.hide(json);
        }
        let (mut out, mut from, mut place) = (String::with_capacity(json.len()), 0, Place::default());
        for Found { kind, at } in find(json) {
            place.go_on(&json[place.at..at.start]);
            let number = if place.in_text { None } else { Some(number(json, &at)) };
            let at = number.clone().unwrap_or(at);
            // Two of one number are one.
            if at.start < from {
                continue;
            }
            out += &json[from..at.start];
            let placeholder = self.of(kind, &json[at.clone()]);
            out += &if number.is_some() { Value::from(placeholder).to_string() } else { placeholder };
            from = at.end;
        }
        out += &json[from..];
        // What is written with escapes, and what a name says of its value.
        if let Ok(mut value) = serde_json::from_str(&out)
            && self.hide_value("", &mut value)
        {
            out = value.to_string();
        }
        *json = out;
    }

    /// Puts placeholders into the names, texts and numbers of a value. Returns whether there are any.
    fn hide_value(&mut self, name: &str, value: &mut Value) -> bool {
        match value {
            Value::String(text) => self.hide_of(name, text),
            Value::Number(number) => {
                let mut text = number.to_string();
                let hides = self.hide_of(name, &mut text);
                if hides {
                    *value = text.into();
                }
                hides
            }
            Value::Array(items) => {
                let mut hides = false;
                for item in items {
                    hides |= self.hide_value(name, item);
                }
                hides
            }
            Value::Object(fields) => {
                let mut hides = false;
                let inner = std::mem::take(fields).into_iter().map(|(mut name, mut value)| {
                    hides |= self.hide_value(&name, &mut value);
                    hides |= self.hide_of("", &mut name);
                    (name, value)
                });
                *fields = inner.collect();
                hides
            }
            Value::Null | Value::Bool(_) => false,
        }
    }

    /// The id that stands for one which is likely personal: no placeholder, since providers take letters and digits alone.
    fn id(&mut self, id: &mut String) {
        if likely(id).is_none() {
            return;
        }
        let given = &self.given_ids;
        let free = |number: &usize| !given.contains(&format!("call_{number}"));
        let next = || (self.ids.len() + 1..).find(free).unwrap_or_default();
        let next = next();
        let instead = self.ids.entry(id.clone()).or_insert_with(|| format!("call_{next}")).clone();
        self.given_ids.insert(instead.clone());
        *id = instead;
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
/// When it has something in which nothing can be found: a picture, or tokens; or something personal where nothing else can stand. Names
/// the field.
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
    each_fixed(request, |at, fixed| {
        let kind = match fixed {
            Fixed::Name(name) => likely(name),
            Fixed::Address(address) => likely_in_address(address),
            Fixed::Number(name, number) => find_of(name, &number).first().map(|found| found.kind),
        };
        kind.map_or(Ok(()), |kind| Err(stands(at, kind)))
    })?;
    let (mut request, mut placeholders) = (request.clone(), Placeholders::default());
    each_text_of(&mut request, |text| match text {
        Text::Words(_, text) | Text::Arguments(text) => placeholders.see(text),
        Text::Id(id) => {
            placeholders.given_ids.insert(id.clone());
        }
    });
    each_text_of(&mut request, |text| match text {
        Text::Words(name, text) => {
            placeholders.hide_of(name, text);
        }
        Text::Arguments(text) => placeholders.hide_in_json(text),
        Text::Id(id) => placeholders.id(id),
    });
    Ok((request, placeholders))
}

/// The refusal of a field with something personal that cannot be replaced. What it is stays unsaid.
fn stands(at: &str, kind: &str) -> HandlerError {
    let words = kinds().find_map(|(known, words)| (known == kind).then_some(words)).unwrap_or(kind);
    let message = format!(
        "`{at}` has what is likely personal ({words}) where nothing else can stand, and the route has egress \"redact\"; leave it out, or write it otherwise"
    );
    HandlerError::invalid(at, message)
}

impl Wrapper for Redacting {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let is_json =
            matches!(request.response_format, Some(ResponseFormat::JsonObject | ResponseFormat::JsonSchema { .. }));
        let (request, placeholders) = hidden(request)?;
        let stream = inner.stream(&request, context)?;
        if placeholders.values.is_empty() {
            return Ok(stream);
        }
        let values = Arc::new(placeholders.values);
        let restorer =
            move |kind| Restorer::new(values.clone(), matches!(kind, Kind::Call(_)) || is_json && kind == Kind::Text);
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
    use serde_json::json;

    use crate::handler::{Event, FinishReason, Message, Role, Tool, ToolCall, ToolChoice, Usage};

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
    fn arguments_stay_json_whatever_is_hidden_in_them() {
        for (arguments, sent) in [
            (r#"{"card": 4111111111111111, "n": 5}"#, r#"{"card": "[CREDIT_CARD_1]", "n": 5}"#),
            (r#"{"to": "lena\u0040example.org"}"#, r#"{"to":"[EMAIL_1]"}"#),
            (r#"{"a@example.org": [1.5e3, "\\\"a@example.org\""]}"#, r#"{"[EMAIL_1]": [1.5e3, "\\\"[EMAIL_1]\""]}"#),
            (r#"{"phone": {"home": "030 9012345"}}"#, r#"{"phone": {"home": "[PHONE_1]"}}"#),
            (
                r#"{"big": 123456789012345678901234567890, "x": "plain"}"#,
                r#"{"big": 123456789012345678901234567890, "x": "plain"}"#,
            ),
            ("mail a@example.org, no JSON", "mail [EMAIL_1], no JSON"),
            ("", ""),
        ] {
            let (mut placeholders, mut json) = (Placeholders::default(), arguments.to_owned());
            placeholders.hide_in_json(&mut json);
            assert_eq!(json, sent, "{arguments}");
        }
    }

    #[test]
    fn ids_that_are_personal_are_others_and_agree() {
        let call = |id: &str| ToolCall { id: id.into(), name: "mail".into(), arguments: "{}".into() };
        let calls = vec![call("a@example.org"), call("call_1"), call("tel_1 +49 30 901 234 56")];
        let mut request = asked("hi");
        request.messages.push(Message { tool_calls: calls, ..Message::new(Role::Assistant, "") });
        let result = |id: &str| Message { tool_call_id: Some(id.into()), ..Message::new(Role::Tool, "done") };
        request.messages.extend([result("tel_1 +49 30 901 234 56"), result("a@example.org")]);
        let (hidden, _) = hidden(&request).expect("it is text");
        let ids: Vec<&str> = hidden.messages[1].tool_calls.iter().map(|call| call.id.as_str()).collect();
        assert_eq!(ids, ["call_2", "call_1", "call_3"]);
        let results: Vec<_> = hidden.messages[2..].iter().map(|message| message.tool_call_id.as_deref()).collect();
        assert_eq!(results, [Some("call_3"), Some("call_2")]);
    }

    #[test]
    fn what_is_personal_where_nothing_else_can_stand_is_refused_by_the_place_alone() {
        let tool = |name: &str, schema: Value| Request {
            tools: vec![Tool { name: name.into(), parameters: Some(schema), ..Tool::default() }],
            ..asked("hi")
        };
        let form = |name: &str, schema: Value| Request {
            response_format: Some(ResponseFormat::JsonSchema {
                name: name.into(),
                description: None,
                schema,
                strict: None,
            }),
            ..asked("hi")
        };
        let parameters = "tools[0].function.parameters";
        let schema = "response_format.json_schema.schema";
        let named = Request { tool_choice: Some(ToolChoice::Named("phone_030-9012345".into())), ..asked("hi") };
        for (request, at) in [
            (tool("phone_030-9012345", json!({})), "tools[0].function.name"),
            (tool("f", json!({"properties": {"a@example.org": {}}})), parameters),
            (tool("f", json!({"required": ["a@example.org"]})), parameters),
            (tool("f", json!({"$id": "https://example.com/a%40example.org"})), parameters),
            (tool("f", json!({"$defs": {"x": {"$ref": "#/$defs/+49 30 901 234 56"}}})), parameters),
            (tool("f", json!({"properties": {"to": {"pattern": "^a@example.org$"}}})), parameters),
            (tool("f", json!({"properties": {"card": {"enum": [4_111_111_111_111_111_u64]}}})), parameters),
            (form("phone_030-9012345", json!({})), "response_format.json_schema.name"),
            (form("f", json!({"dependentRequired": {"x": ["a@example.org"]}})), schema),
            (named, "tool_choice.function.name"),
        ] {
            let refused = hidden(&request).err().expect(at);
            assert_eq!(refused.kind, crate::handler::Kind::InvalidRequest { param: Some(at.into()) });
            assert!(!refused.to_string().contains("example") && !refused.to_string().contains("901"), "{refused}");
        }
        // What tools and schemas are usually called is nobody's.
        let usual = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:uuid:123e4567-e89b-12d3-a456-426614174000",
            "type": "object", "required": ["date_2024_01_15", "phone_number"], "additionalProperties": false,
            "properties": {
                "date_2024_01_15": {"$ref": "#/$defs/day"},
                "phone_number": {"type": "string", "pattern": "^\\+?[0-9 ]{7,15}$", "maxLength": 15},
                "n": {"type": "integer", "maximum": 9_007_199_254_740_991_u64, "default": 2024, "enum": [1, 2024]},
            },
            "$defs": {"day": {"type": "string", "format": "date", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"}},
        });
        let (left, _) = hidden(&tool("get_2024_report", usual.clone())).expect("nothing of it is personal");
        assert_eq!(left.tools[0].parameters, Some(usual));
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
