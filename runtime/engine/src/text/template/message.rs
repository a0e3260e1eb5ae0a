//! A message, made ready for the template: the one place where the rows of a training and the requests that are served become what a
//! template reads.

use std::borrow::Cow;

use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value as Json, json};

use super::bounds::Exceeded;
use super::{ChatTemplate, Given, python, to_value};

/// What stands between the parts of a content that is read as one text, as in vLLM and llama.cpp. A template that reads parts writes
/// between them what it likes, as a rule nothing.
const BETWEEN_PARTS: &str = "\n";

/// The text of a content given in parts.
pub fn join_parts<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    parts.into_iter().collect::<Vec<_>>().join(BETWEEN_PARTS)
}

/// How a template reads messages. It is found by trying it out.
#[derive(Clone, Debug, Default)]
pub(super) struct Reads {
    /// It adds `arguments` to strings, so it must be given text (DeepSeek-V3 does).
    arguments_as_text: bool,
    /// Whose content it reads in parts and not as a text, in the order of [`SPEAKERS`] (Idefics 3 and LLaVA do).
    in_parts: [bool; 3],
    /// Whose content it also reads in parts, if it is given so (Gemma 3 and Qwen2.5-VL do).
    parts_too: [bool; 3],
    /// The same of what a tool says.
    tool_parts_too: bool,
    /// It knows the role `developer` (gpt-oss does).
    developer: bool,
    /// It writes the tools that it is given.
    pub(super) tools: bool,
    /// It writes the documents that it is given.
    pub(super) documents: bool,
}

/// Roles whose content is tried in both forms, and what they say there: letters that survive trimming and cutting, and that no
/// template writes.
const SPEAKERS: [(&str, &str); 3] = [("system", "ŝ"), ("user", "ŭ"), ("assistant", "ĉ")];

impl Reads {
    /// Tries `template`, which must not refuse plain conversations for using up too much.
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let in_parts = reads_in_parts(template);
        Self {
            arguments_as_text: wants_arguments_as_text(template),
            in_parts,
            parts_too: reads_parts_too(template, in_parts),
            tool_parts_too: reads_parts_of_tools(template, in_parts),
            developer: knows_developer(template),
            tools: writes(template, in_parts, "tools", |tools| Given { tools: Some(tools), ..Given::default() }),
            documents: writes(template, in_parts, "documents", |documents| Given {
                documents: Some(documents),
                ..Given::default()
            }),
        }
    }

    /// Messages as the template reads them: no null keys, no `weight`, `arguments` parsed, the reasoning under each of its usual
    /// names, content as a text or in parts (those that it has, where the template reads parts), and `developer` as `system` where the template does not know it.
    ///
    /// # Errors
    /// When one is not an object, or the arguments of a call are not JSON.
    pub(super) fn prepare(&self, messages: &[Json]) -> Result<Vec<Json>> {
        let prepare = |(i, message): (usize, &Json)| {
            let fields = message.as_object().with_context(|| format!("message {}: not an object", i + 1))?;
            let mut clean = named(fields);
            if let Some(Json::Array(calls)) = clean.get_mut("tool_calls") {
                for call in calls {
                    self.prepare_arguments(call).with_context(|| format!("message {}: tool_calls", i + 1))?;
                }
            }
            if !self.developer && clean.get("role").is_some_and(|role| role == "developer") {
                clean.insert("role".into(), "system".into());
            }
            self.shape_content(&mut clean);
            Ok(Json::Object(clean))
        };
        messages.iter().enumerate().map(prepare).collect()
    }

    fn shape_content(&self, message: &mut Map<String, Json>) {
        let role = message.get("role").and_then(Json::as_str);
        let speaker = speaker_of(role.unwrap_or_default());
        let kept = match role {
            Some("tool") => self.tool_parts_too,
            _ => self.parts_too[speaker],
        };
        let Some(content) = message.get_mut("content") else { return };
        match &*content {
            Json::String(text) if self.in_parts[speaker] => *content = json!([{"type": "text", "text": text}]),
            Json::Array(parts) if !kept && parts.iter().all(|part| part["text"].is_string()) => {
                let text = join_parts(parts.iter().filter_map(|part| part["text"].as_str()));
                *content = match self.in_parts[speaker] {
                    true => json!([{"type": "text", "text": text}]),
                    false => text.into(),
                };
            }
            _ => {}
        }
    }

    fn prepare_arguments(&self, call: &mut Json) -> Result<()> {
        let call = match call.get("function") {
            Some(Json::Object(_)) => &mut call["function"],
            _ => call,
        };
        let Some(arguments) = call.get_mut("arguments") else {
            return Ok(());
        };
        match (&*arguments, self.arguments_as_text) {
            (Json::String(text), false) => {
                let parsed = if text.trim().is_empty() { "{}" } else { text };
                *arguments = serde_json::from_str(parsed).map_err(|e| anyhow!("arguments are not JSON: {e}"))?;
            }
            (Json::String(_), true) => {}
            (other, true) => *arguments = Json::String(python::to_json(&to_value(other))?),
            (_, false) => {}
        }
        Ok(())
    }
}

/// The place of a role in [`SPEAKERS`].
fn speaker_of(role: &str) -> usize {
    match role {
        "system" | "developer" => 0,
        "assistant" => 2,
        _ => 1,
    }
}

fn plain(in_parts: [bool; 3], role: &str) -> Json {
    match in_parts[speaker_of(role)] {
        true => json!([{"type": "text", "text": ""}]),
        false => json!(""),
    }
}

/// The fields that a template sees, in their order. Templates call the reasoning by different names.
fn named(fields: &Map<String, Json>) -> Map<String, Json> {
    let names = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = names.iter().find_map(|&key| fields.get(key).filter(|v| !v.is_null()));
    let mut clean = Map::new();
    if let Some(reasoning) = reasoning {
        clean.insert("thinking".into(), reasoning.clone());
    }
    for (key, value) in fields.iter().filter(|(k, v)| !v.is_null() && *k != "weight") {
        clean.insert(key.clone(), value.clone());
    }
    if let Some(reasoning) = reasoning {
        clean.insert("reasoning_content".into(), reasoning.clone());
    }
    clean
}

/// The content of a message that is prepared.
pub(super) fn content(message: &Json) -> Option<Cow<'_, str>> {
    match message.get("content")? {
        Json::String(text) => Some(Cow::Borrowed(text)),
        Json::Array(parts) => match &parts[..] {
            [part] => part["text"].as_str().map(Cow::Borrowed),
            parts => parts.iter().map(|part| part["text"].as_str()).collect::<Option<String>>().map(Cow::Owned),
        },
        _ => None,
    }
}

/// The same message with another content.
pub(super) fn with_content(message: &Json, text: &str) -> Json {
    let mut message = message.clone();
    match &mut message["content"] {
        Json::Array(parts) => *parts = vec![json!({"type": "text", "text": text})],
        other => *other = text.into(),
    }
    message
}

/// Tries a tool call both ways; a template that renders neither is taken to want an object.
fn wants_arguments_as_text(template: &ChatTemplate) -> bool {
    let tries = |arguments: Json| {
        let call = json!({"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}});
        let messages = [
            json!({"role": "user", "content": "a"}),
            json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        ];
        template.run(&messages, Given::default(), false, "").is_ok()
    };
    template.source.contains("arguments") && !tries(json!({"a": "b"})) && tries(Json::String("{\"a\": \"b\"}".into()))
}

/// Tries texts first, then parts, then some in parts. What most is found of is what the template reads; where texts do as well, texts.
fn reads_in_parts(template: &ChatTemplate) -> [bool; 3] {
    let forms = [0, 7, 1, 2, 3, 4, 5, 6].map(|bits| [0, 1, 2].map(|speaker| bits >> speaker & 1 == 1));
    let (mut best, mut most) = (forms[0], 0);
    for form in forms {
        // What takes too much in one form is not tried in all others.
        let Some(found) = found_of(template, form) else { break };
        if found > most {
            (best, most) = (form, found);
        }
        if most == SPEAKERS.len() {
            break;
        }
    }
    best
}

/// Gives one speaker's content after the other in parts, and looks whether all is heard as before.
fn reads_parts_too(template: &ChatTemplate, in_parts: [bool; 3]) -> [bool; 3] {
    let Some(as_it_is) = heard_of(template, in_parts) else { return in_parts };
    let too = |speaker: usize| {
        let mut form = in_parts;
        form[speaker] = true;
        in_parts[speaker] || as_it_is[speaker] && heard_of(template, form).is_some_and(|heard| heard == as_it_is)
    };
    [0, 1, 2].map(too)
}

/// The same of what a tool says, which many templates write whole, as JSON.
fn reads_parts_of_tools(template: &ChatTemplate, in_parts: [bool; 3]) -> bool {
    const SAID: &str = "ť";
    let call = json!({"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}});
    let messages = [
        with_content(&json!({"role": "user", "content": plain(in_parts, "user")}), "a"),
        json!({"role": "assistant", "content": plain(in_parts, "assistant"), "tool_calls": [call]}),
        json!({"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": [{"type": "text", "text": SAID}]}),
    ];
    let written = template.run(&messages, Given::default(), true, "").map(|text| text.to_lowercase());
    written.is_ok_and(|text| text.contains(SAID) && !is_printed(&text, SAID))
}

/// Whether a part with this text is printed, or written as JSON, and not read.
fn is_printed(written: &str, text: &str) -> bool {
    ["'", "\""].iter().any(|quote| written.contains(&format!("{quote}: {quote}{text}")))
}

/// How many of the speakers are heard in a conversation in this form.
fn found_of(template: &ChatTemplate, in_parts: [bool; 3]) -> Option<usize> {
    heard_of(template, in_parts).map(|heard| heard.into_iter().filter(|heard| *heard).count())
}

/// Which of the speakers are heard in a conversation in this form, which may lack a system message if that is refused. `None`: the
/// template uses up too much.
fn heard_of(template: &ChatTemplate, in_parts: [bool; 3]) -> Option<[bool; 3]> {
    let messages: Vec<Json> = (SPEAKERS.iter().zip(in_parts))
        .map(|((role, text), in_parts)| match in_parts {
            true => json!({"role": role, "content": [{"type": "text", "text": text}]}),
            false => json!({"role": role, "content": text}),
        })
        .collect();
    let mut rendered = String::new();
    for messages in [&messages[..], &messages[1..]] {
        match template.run(messages, Given::default(), false, "") {
            Ok(text) => {
                rendered = text.to_lowercase();
                break;
            }
            Err(error) if error.is::<Exceeded>() => return None,
            Err(_) => {}
        }
    }
    Some(SPEAKERS.map(|(_, text)| rendered.contains(text) && !is_printed(&rendered, text)))
}

/// Whether the template writes one of these that is `given`, before a question or before a system message and a question.
fn writes(template: &ChatTemplate, in_parts: [bool; 3], name: &str, given: impl Fn(&Json) -> Given<'_>) -> bool {
    // No template writes this word by itself.
    const WORD: &str = "xqzwkv";
    if !template.source.contains(name) {
        return false;
    }
    let object =
        json!({"type": "object", "properties": {"x": {"type": "string", "description": WORD}}, "required": ["x"]});
    let list = match name {
        "tools" => json!([{"type": "function", "function": {"name": WORD, "description": WORD, "parameters": object}}]),
        _ => json!([{"title": WORD, "text": WORD, "content": WORD, "doc_id": 1}]),
    };
    let message = |role: &str| with_content(&json!({"role": role, "content": plain(in_parts, role)}), "a");
    let messages = [message("system"), message("user")];
    [&messages[..], &messages[1..]].into_iter().any(|messages| {
        let written = template.run(messages, given(&list), true, "");
        written.is_ok_and(|text| text.contains(WORD))
    })
}

/// Whether the template names the role, and says what it says.
fn knows_developer(template: &ChatTemplate) -> bool {
    let (_, said) = SPEAKERS[0];
    let heard = |content: Json| {
        let messages = [json!({"role": "developer", "content": content}), json!({"role": "user", "content": "a"})];
        template.run(&messages, Given::default(), true, "").is_ok_and(|text| text.contains(said))
    };
    // A template that writes whatever role it gets would write one that its model has never seen.
    let names = template.written.split('\0').any(|text| text == "developer");
    names && (heard(said.into()) || heard(json!([{"type": "text", "text": said}])))
}
