//! The calls of tools in what a model writes, found while it comes.

use serde_json::{Map, Value};

use super::formats::{Form, Format};
use crate::handler::Tool;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    Text(String),
    /// A call: the tool's name, and its arguments as JSON text.
    Call(String, String),
}

/// Finds calls by a model's format. What looks like one and is none stays text.
pub(super) struct Calls {
    format: &'static Format,
    tools: Vec<Tool>,
    /// Text that is not certain yet: the beginning of a mark, or a call in the making with its marks.
    held: String,
    in_call: bool,
    /// Something other than white space was said: an answer that is one JSON value begins with it.
    spoke: bool,
}

impl Calls {
    pub(super) fn new(format: &'static Format, tools: &[Tool]) -> Self {
        Self { format, tools: tools.to_vec(), held: String::new(), in_call: false, spoke: false }
    }

    /// For an answer whose beginning was written for the model.
    pub(super) fn begun(format: &'static Format, tools: &[Tool]) -> Self {
        Self { in_call: true, ..Self::new(format, tools) }
    }

    /// Returns what a further piece makes certain.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Said> {
        self.held.push_str(piece);
        let mut said = Vec::new();
        loop {
            if self.in_call {
                let Some(end) =
                    self.format.closes.and_then(|closes| self.held.find(closes).map(|at| at + closes.len()))
                else {
                    break;
                };
                let call: String = self.held.drain(..end).collect();
                said.extend(self.read(call));
                self.in_call = false;
                continue;
            }
            let opened = self.format.opens.iter().filter_map(|opens| self.held.find(opens)).min();
            // A mark may be missing where the answer is JSON alone.
            let bare = !self.spoke && self.format.bare && self.held.trim_start().starts_with(['{', '[']);
            match opened {
                Some(at) => {
                    let text: String = self.held.drain(..at).collect();
                    self.say(text, &mut said);
                    self.in_call = true;
                }
                None if bare => self.in_call = true,
                None => {
                    let begun = |opens: &&str| (1..opens.len()).rev().find(|n| self.held.ends_with(&opens[..*n]));
                    let mut begun = self.format.opens.iter().filter_map(begun).max().unwrap_or(0);
                    if !self.spoke && self.format.bare && self.held.trim().is_empty() {
                        begun = self.held.len();
                    }
                    let text: String = self.held.drain(..self.held.len() - begun).collect();
                    self.say(text, &mut said);
                    break;
                }
            }
        }
        said
    }

    /// Returns what was held back, at the end.
    pub(super) fn finish(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        if std::mem::take(&mut self.in_call) {
            return self.read(held);
        }
        let mut said = Vec::new();
        self.say(held, &mut said);
        said
    }

    fn say(&mut self, text: String, said: &mut Vec<Said>) {
        self.spoke |= !text.trim().is_empty();
        if !text.is_empty() {
            said.push(Said::Text(text));
        }
    }

    /// Reads a piece of an answer with its marks: calls, or text if it is none.
    fn read(&mut self, text: String) -> Vec<Said> {
        let mut inner = text.trim();
        for opens in self.format.opens {
            inner = inner.strip_prefix(opens).unwrap_or(inner).trim_start();
        }
        inner = self.format.closes.map_or(inner, |closes| inner.strip_suffix(closes).unwrap_or(inner)).trim();
        let calls = match self.format.form {
            _ if inner.starts_with("<function=") => self.xml(inner),
            Form::Json => self.json(inner),
            Form::Named => self.named(inner).or_else(|| self.json(inner)),
        };
        match calls.filter(|calls| !calls.is_empty()) {
            Some(calls) => {
                self.spoke = true;
                calls
            }
            None => {
                let mut said = Vec::new();
                self.say(text, &mut said);
                said
            }
        }
    }

    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// `{"name": …, "arguments": …}`, several behind each other, or a list of them.
    fn json(&self, text: &str) -> Option<Vec<Said>> {
        let mut calls = Vec::new();
        for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            match value {
                Ok(Value::Array(list)) => {
                    calls.extend(list.iter().map(|call| self.one(call)).collect::<Option<Vec<_>>>()?)
                }
                Ok(call) => calls.push(self.one(&call)?),
                // What stands behind whole calls is no part of them.
                Err(_) if !calls.is_empty() => break,
                Err(_) => return None,
            }
        }
        Some(calls)
    }

    fn one(&self, call: &Value) -> Option<Said> {
        let call = Some(&call["function"]).filter(|function| function.is_object()).unwrap_or(call);
        let name = ["name", "function", "tool"].iter().find_map(|key| call[*key].as_str())?;
        let tool = self.tool(name)?;
        let arguments =
            ["arguments", "parameters", "args"].iter().map(|key| &call[*key]).find(|value| !value.is_null());
        let arguments = match arguments {
            Some(Value::String(text)) => text.clone(),
            Some(object @ Value::Object(_)) => object.to_string(),
            None => "{}".to_owned(),
            Some(_) => return None,
        };
        Some(Said::Call(tool.name.clone(), arguments))
    }

    /// `name[ARGS]{…}` or `name{…}`.
    fn named(&self, text: &str) -> Option<Vec<Said>> {
        let (name, rest) = text.split_at(text.find(['[', '{'])?);
        let tool = self.tool(name.trim())?;
        let json = rest.strip_prefix("[ARGS]").unwrap_or(rest);
        let arguments = serde_json::Deserializer::from_str(json).into_iter::<Value>().next()?.ok()?;
        arguments.is_object().then(|| vec![Said::Call(tool.name.clone(), arguments.to_string())])
    }

    /// `<function=name><parameter=key>value</parameter>…</function>`.
    fn xml(&self, text: &str) -> Option<Vec<Said>> {
        let mut calls = Vec::new();
        let mut rest = text;
        while let Some((_, behind)) = rest.split_once("<function=") {
            let (name, body) = behind.split_once('>')?;
            let (body, behind) = body.split_once("</function>").unwrap_or((body, ""));
            let tool = self.tool(name.trim())?;
            let mut arguments = Map::new();
            let mut parameters = body;
            while let Some((_, behind)) = parameters.split_once("<parameter=") {
                let (key, value) = behind.split_once('>')?;
                let (value, behind) = value.split_once("</parameter>").unwrap_or((value, ""));
                let value = value.strip_prefix('\n').unwrap_or(value);
                let value = value.strip_suffix('\n').unwrap_or(value);
                let key = key.trim();
                let is_text =
                    tool.parameters.as_ref().is_some_and(|schema| schema["properties"][key]["type"] == "string");
                let parsed = (!is_text).then(|| serde_json::from_str(value).ok()).flatten();
                arguments.insert(key.to_owned(), parsed.unwrap_or_else(|| value.into()));
                parameters = behind;
            }
            calls.push(Said::Call(tool.name.clone(), Value::Object(arguments).to_string()));
            rest = behind;
        }
        Some(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::super::formats::of_source;
    use super::*;

    fn tools() -> Vec<Tool> {
        let schema = serde_json::json!({"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
        ["weather", "time"]
            .map(|name| Tool { name: name.into(), parameters: Some(schema.clone()), ..Tool::default() })
            .into()
    }

    /// However it is cut on its way.
    fn check(source: &str, text: &str, want: &[Said]) {
        let letters: Vec<char> = text.chars().collect();
        for size in [1, 2, 3, 7, letters.len().max(1)] {
            let mut calls = Calls::new(of_source(source), &tools());
            let mut said: Vec<Said> =
                letters.chunks(size).flat_map(|piece| calls.push(&piece.iter().collect::<String>())).collect();
            said.extend(calls.finish());
            let mut joined: Vec<Said> = Vec::new();
            for one in said {
                match (joined.last_mut(), one) {
                    (Some(Said::Text(before)), Said::Text(text)) => before.push_str(&text),
                    (_, one) => joined.push(one),
                }
            }
            assert_eq!(joined, want, "{text} in pieces of {size}");
        }
    }

    fn call(name: &str, arguments: &str) -> Said {
        Said::Call(name.into(), arguments.into())
    }

    fn text(text: &str) -> Said {
        Said::Text(text.into())
    }

    #[test]
    fn calls_are_found_in_each_format_and_what_is_none_stays_text() {
        let weather = || call("weather", r#"{"city":"Ulm"}"#);
        let hermes = "<tool_call>";
        check(
            hermes,
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>",
            &[weather()],
        );
        check(
            hermes,
            "Well.\n<tool_call>{\"name\":\"time\"}</tool_call>\n<tool_call>{\"arguments\":{\"city\":\"Ulm\"},\"name\":\"weather\"}</tool_call>",
            &[text("Well.\n"), call("time", "{}"), text("\n"), weather()],
        );
        check(hermes, "a < b <tool>", &[text("a < b <tool>")]);
        let unknown = "<tool_call>{\"name\": \"rain\", \"arguments\": {}}</tool_call> x";
        check(hermes, unknown, &[text(unknown)]);
        check(hermes, "<tool_call>{\"name\": \"wea", &[text("<tool_call>{\"name\": \"wea")]);
        check(
            hermes,
            "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            &[call("weather", r#"{"city":"Ulm","days":3}"#)],
        );
        let mistral = "[TOOL_CALLS]";
        check(
            mistral,
            "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}, \"id\": \"x\"}, {\"name\": \"time\", \"arguments\": {}}]",
            &[weather(), call("time", "{}")],
        );
        check(mistral, "[TOOL_CALLS]weather[ARGS]{\"city\": \"Ulm\"}", &[weather()]);
        check(mistral, "[TOOL_CALLS]weather{\"city\": \"Ulm\"}", &[weather()]);
        let llama = "\"parameters\": dictionary";
        check(llama, "{\"name\": \"weather\", \"parameters\": {\"city\": \"Ulm\"}}", &[weather()]);
        check(
            llama,
            "<|python_tag|>{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": {\"city\": \"Ulm\"}}}",
            &[weather()],
        );
        check(llama, "{\"name\": \"Bob\", \"age\": 3}", &[text("{\"name\": \"Bob\", \"age\": 3}")]);
        check(llama, "It is {\"name\": \"weather\"}", &[text("It is {\"name\": \"weather\"}")]);
        let granite = "<|tool_call|>";
        check(
            granite,
            "<|tool_call|>[{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\":\\\"Ulm\\\"}\"}]",
            &[weather()],
        );
    }
}
