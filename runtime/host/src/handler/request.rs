//! A request for an answer, whichever handler it goes to.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Most choices of a request.
pub const CHOICES_MAX: usize = 8;
/// Most likely tokens that are named beside each token.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// The author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set up the conversation.
    System,
    /// The same, in the word of newer models. A model here that does not know it hears the system, and so does every endpoint.
    Developer,
    /// The person who asks.
    User,
    /// The model.
    Assistant,
    /// A tool: the result of a call that the model made.
    Tool,
}

/// A call of a tool by the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// Its id, by which a result names it.
    pub id: String,
    /// The tool.
    pub name: String,
    /// What it is given: an object, as JSON text. A model may write what is none.
    pub arguments: String,
}

impl ToolCall {
    /// Returns the call in OpenAI's shape.
    pub fn json(&self) -> Value {
        json!({"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// A picture.
    Image {
        /// Where it is: `https://` or `data:`.
        url: String,
        /// How closely it is looked at: OpenAI's `detail`.
        detail: Option<String>,
    },
}

impl Part {
    /// Returns the part in OpenAI's shape.
    pub fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!({"type": "text", "text": text}),
            Self::Image { url, detail: None } => json!({"type": "image_url", "image_url": {"url": url}}),
            Self::Image { url, detail: Some(detail) } => {
                json!({"type": "image_url", "image_url": {"url": url, "detail": detail}})
            }
        }
    }
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Its text.
    pub content: String,
    /// Its parts, where it came in several: a chat template may read them. `content` is all of their text.
    pub parts: Vec<Part>,
    /// What the assistant called.
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool's message is the result of.
    pub tool_call_id: Option<String>,
    /// The name of its author, or of the tool.
    pub name: Option<String>,
    /// What the assistant thought before it spoke.
    pub reasoning: Option<String>,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            parts: Vec::new(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            reasoning: None,
        }
    }

    /// Returns the message in OpenAI's shape, with the reasoning as `reasoning_content`.
    pub fn json(&self) -> Map<String, Value> {
        let Self { role, content, parts, tool_calls, tool_call_id, name, reasoning } = self;
        let content = match &parts[..] {
            // OpenAI's own servers want null beside calls.
            [] if content.is_empty() && !tool_calls.is_empty() => Value::Null,
            [] => json!(content),
            parts => parts.iter().map(Part::json).collect(),
        };
        let mut fields = Map::new();
        fields.insert("role".into(), json!(role));
        fields.insert("content".into(), content);
        if !tool_calls.is_empty() {
            fields.insert("tool_calls".into(), tool_calls.iter().map(ToolCall::json).collect());
        }
        for (field, value) in [("tool_call_id", tool_call_id), ("name", name), ("reasoning_content", reasoning)] {
            if let Some(value) = value {
                fields.insert(field.into(), json!(value));
            }
        }
        fields
    }
}

/// A tool that the model may call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does, for the model.
    pub description: Option<String>,
    /// The JSON Schema of what it is given: an object. `None`: nothing.
    pub parameters: Option<Value>,
    /// Whether calls are held to the schema.
    pub strict: Option<bool>,
}

impl Tool {
    /// Returns the tool in OpenAI's shape.
    pub fn json(&self) -> Value {
        let mut function = Map::from_iter([("name".to_owned(), json!(self.name))]);
        let optional = [
            ("description", self.description.as_ref().map(|text| json!(text))),
            ("parameters", self.parameters.clone()),
            ("strict", self.strict.map(|strict| json!(strict))),
        ];
        function.extend(optional.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
        json!({"type": "function", "function": function})
    }
}

/// Whether the model calls tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// It calls none.
    None,
    /// As it likes.
    Auto,
    /// It calls at least one.
    Required,
    /// It calls this one.
    Named(String),
}

impl ToolChoice {
    /// Returns the choice in OpenAI's shape.
    pub fn json(&self) -> Value {
        match self {
            Self::None => json!("none"),
            Self::Auto => json!("auto"),
            Self::Required => json!("required"),
            Self::Named(name) => json!({"type": "function", "function": {"name": name}}),
        }
    }
}

/// The form of the answer.
#[derive(Clone, Debug, PartialEq)]
pub enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON by a schema.
    JsonSchema {
        /// The schema's name.
        name: String,
        /// What it is for, for the model.
        description: Option<String>,
        /// The schema.
        schema: Value,
        /// Whether the answer is held to all of it.
        strict: Option<bool>,
    },
}

impl ResponseFormat {
    /// Returns the form in OpenAI's shape.
    pub fn json(&self) -> Value {
        match self {
            Self::Text => json!({"type": "text"}),
            Self::JsonObject => json!({"type": "json_object"}),
            Self::JsonSchema { name, description, schema, strict } => {
                let mut inner = json!({"name": name, "schema": schema});
                if let Some(description) = description {
                    inner["description"] = json!(description);
                }
                if let Some(strict) = strict {
                    inner["strict"] = json!(strict);
                }
                json!({"type": "json_schema", "json_schema": inner})
            }
        }
    }
}

/// A text that is gone on with as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As tokens of the model.
    Tokens(Vec<u32>),
}

/// A request for an answer. A field that is `None` or empty was not given, and the handler chooses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The conversation.
    pub messages: Vec<Message>,
    /// A text to go on with, instead of a conversation to answer.
    pub prompt: Option<Prompt>,
    /// Longest answer, in tokens; at least 1.
    pub max_tokens: Option<usize>,
    /// Temperature of sampling, 0 to 2; 0 always takes the likeliest token.
    pub temperature: Option<f64>,
    /// Sample from this many of the likeliest tokens; 0 means all.
    pub top_k: Option<usize>,
    /// Sample from the likeliest tokens that together have this probability, 0 to 1.
    pub top_p: Option<f64>,
    /// Sample from tokens that have at least this share of the likeliest token's probability, 0 to 1.
    pub min_p: Option<f64>,
    /// Penalty of tokens that are in the conversation already: above 0; 1 changes nothing.
    pub repetition_penalty: Option<f64>,
    /// Subtracted from a token's logit for each time it was sampled, -2 to 2.
    pub frequency_penalty: Option<f64>,
    /// Subtracted once from the logit of a token that was sampled, -2 to 2.
    pub presence_penalty: Option<f64>,
    /// Added to the logits of tokens, by their ids, -100 to 100.
    pub logit_bias: BTreeMap<u32, f64>,
    /// Seed of sampling: equal requests with equal seeds get equal answers, as far as the handler supports it.
    pub seed: Option<i64>,
    /// Texts that end the answer. They are not part of it.
    pub stop: Vec<String>,
    /// How many answers, 1 to [`CHOICES_MAX`].
    pub n: Option<usize>,
    /// The answer's tokens come with their log-probabilities, and with those of this many of the likeliest in their places, 0 to
    /// [`TOP_LOGPROBS_MAX`].
    pub logprobs: Option<usize>,
    /// Tools that the model may call.
    pub tools: Vec<Tool>,
    /// Whether it calls them.
    pub tool_choice: Option<ToolChoice>,
    /// Whether it may call several at once.
    pub parallel_tool_calls: Option<bool>,
    /// The form of the answer.
    pub response_format: Option<ResponseFormat>,
    /// How long the model thinks, in OpenAI's word: `none` to `xhigh`.
    pub reasoning_effort: Option<String>,
}

impl Request {
    /// The number of answers.
    pub fn choices(&self) -> usize {
        self.n.unwrap_or(1)
    }
}
