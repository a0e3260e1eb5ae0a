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
