//! What a model is told of its tools, and the messages in which calls and results stand, where its template knows none.

use serde_json::{Map, Value, json};

use crate::handler::{Message, Request, Role, Tool, ToolChoice};

/// The messages of a request as a chat template reads them, and the tools that it is given.
pub(super) struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
}

/// Returns a request's conversation. `writes_tools`: the template writes the tools that it is given, calls and results.
pub(super) fn conversation(request: &Request, writes_tools: bool) -> Conversation {
    let offered = !request.tools.is_empty() && request.tool_choice != Some(ToolChoice::None);
    let tools: Option<Value> = offered.then(|| request.tools.iter().map(Tool::json).collect());
    if writes_tools {
        let messages = request.messages.iter().map(Message::json).map(Value::Object).collect();
        return Conversation { messages, tools };
    }
    let mut messages: Vec<Map<String, Value>> = Vec::new();
    for message in request.messages.iter().map(as_text) {
        match messages.last_mut() {
            // Several results stand in one message, as templates want the speakers to take turns.
            Some(last) if last["role"] == "user" && message["role"] == "user" && is_result(&message) => {
                let both = format!("{}\n{}", text(last), text(&message));
                last.insert("content".into(), json!(both));
            }
            _ => messages.push(message),
        }
    }
    if offered {
        tell(&mut messages, &request.tools);
    }
    Conversation { messages: messages.into_iter().map(Value::Object).collect(), tools: None }
}

const RESULT: &str = "<tool_response>";

fn is_result(message: &Map<String, Value>) -> bool {
    text(message).starts_with(RESULT)
}

fn text(message: &Map<String, Value>) -> &str {
    message["content"].as_str().unwrap_or_default()
}

/// A message whose calls or result are text.
fn as_text(message: &Message) -> Map<String, Value> {
    if message.role == Role::Tool {
        return Message::new(Role::User, format!("{RESULT}\n{}\n</tool_response>", message.content)).json();
    }
    if message.tool_calls.is_empty() {
        return message.json();
    }
    let mut said = message.content.clone();
    for call in &message.tool_calls {
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!(call.arguments));
        let call = json!({"name": call.name, "arguments": arguments});
        let space = if said.is_empty() { "" } else { "\n" };
        said += &format!("{space}<tool_call>\n{call}\n</tool_call>");
    }
    Message::new(Role::Assistant, said).json()
}

/// Describes the tools in the system's message.
fn tell(messages: &mut Vec<Map<String, Value>>, tools: &[Tool]) {
    let list: Vec<String> = tools.iter().map(|tool| tool.json()["function"].to_string()).collect();
    let words = format!(
        "These tools can be called:\n{}\nTo call one, answer with\n<tool_call>\n{{\"name\": \"…\", \"arguments\": {{…}}}}\n</tool_call>",
        list.join("\n")
    );
    match messages.first_mut() {
        Some(first) if first["role"] == "system" || first["role"] == "developer" => {
            let both = format!("{}\n\n{words}", text(first));
            first.insert("content".into(), json!(both));
        }
        _ => messages.insert(0, Message::new(Role::System, words).json()),
    }
}

#[cfg(test)]
mod tests {
    use homeroom_engine::text::template::{ChatTemplate, Given};

    use super::*;
    use crate::handler::ToolCall;

    fn rendered(template: &str, request: &Request) -> String {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/published");
        let source = std::fs::read_to_string(folder.join(template).with_extension("jinja")).expect("a fixture");
        let template = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).expect("it compiles");
        let Conversation { messages, tools } = conversation(request, template.writes_tools());
        let given = Given { tools: tools.as_ref(), ..Given::default() };
        template.render(&messages, given, true).expect("it takes the conversation")
    }

    fn request() -> Request {
        let call = ToolCall { id: "call12345".into(), name: "weather".into(), arguments: "{\"city\":\"Ulm\"}".into() };
        let result = Message { tool_call_id: Some("call12345".into()), ..Message::new(Role::Tool, "sonnig") };
        let parameters =
            Some(json!({"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}));
        let description = Some("weather of a city".into());
        Request {
            messages: vec![
                Message::new(Role::System, "Kurz."),
                Message::new(Role::User, "Wetter?"),
                Message { tool_calls: vec![call], ..Message::new(Role::Assistant, "") },
                result,
            ],
            tools: vec![Tool { name: "weather".into(), description, parameters, strict: None }],
            ..Request::default()
        }
    }

    #[test]
    fn templates_are_told_of_tools_calls_and_results_in_their_own_words_or_in_ours() {
        for (template, words) in [
            (
                "qwen2_5",
                [
                    "<tools>",
                    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}",
                    "<tool_response>\nsonnig",
                ],
            ),
            (
                "qwen3",
                [
                    "<tools>",
                    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}",
                    "<tool_response>\nsonnig",
                ],
            ),
            (
                "llama3_1",
                [
                    "\"parameters\": dictionary",
                    "{\"name\": \"weather\", \"parameters\": {\"city\": \"Ulm\"}}",
                    "ipython",
                ],
            ),
            ("mistral_v3_tekken", ["[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"]),
            (
                "chatml",
                [
                    "These tools can be called:\n{\"name\":\"weather\"",
                    "<tool_call>\n{\"name\":\"weather\",\"arguments\":{\"city\":\"Ulm\"}}\n</tool_call>",
                    "<tool_response>\nsonnig\n</tool_response>",
                ],
            ),
        ] {
            let text = rendered(template, &request());
            for words in words {
                assert!(text.contains(words), "{template} has no {words:?}:\n{text}");
            }
            // Mistral's own template writes the system's words before a last question, and not before a result.
            assert!(text.contains("Kurz.") || template == "mistral_v3_tekken", "{template}: {text}");
            assert!(text.contains("sonnig"), "{template}: {text}");
        }
        let without = Request { tool_choice: Some(ToolChoice::None), ..request() };
        assert!(!rendered("chatml", &without).contains("These tools"));
        assert!(!rendered("qwen2_5", &without).contains("<tools>"));
    }
}
