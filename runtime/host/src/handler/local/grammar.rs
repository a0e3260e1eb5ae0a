//! Forms that an answer is held to while its tokens are drawn, by llguidance.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use homeroom_engine::inference::{Constraint, MASKED};
use homeroom_engine::models::BaseModel;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie, TokenId};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};

use super::formats::Format;
use crate::handler::{HandlerError, Kind, Request, ResponseFormat, Tool, ToolChoice};

/// Longest token that a form is matched with, in bytes. Longer ones are runs of white space.
const TOKEN_BYTES_MAX: usize = 512;
/// Most states of a form's lexer, some kilobytes each.
const STATES_MAX: usize = 20_000;
/// Largest grammar, in symbols.
const GRAMMAR_MAX: usize = 100_000;
/// White space that may stand between the tokens of JSON: small models that may write more of it do not find an end.
const SPACE: &str = " ";
/// Longest schema, as JSON: the memory of a grammar is some hundred times that.
const SCHEMA_BYTES_MAX: usize = 128 << 10;

/// Makes the forms of a model's tokenizer.
pub(super) struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// Reads the tokens of a model.
    ///
    /// # Errors
    /// When they cannot be arranged.
    pub(super) fn of(model: &BaseModel) -> Result<Self> {
        let (tokenizer, vocab) = (&model.tokenizer, model.architecture.vocab_size);
        let spelling = tokenizer.spelling();
        let mut words: Vec<Vec<u8>> = Vec::with_capacity(vocab);
        for id in 0..vocab as u32 {
            let bytes = spelling.bytes(tokenizer, id).filter(|bytes| bytes.len() <= TOKEN_BYTES_MAX);
            words.push(bytes.unwrap_or_default());
        }
        for control in tokenizer.control_tokens() {
            // A text does not hold it.
            if let Some(word) = words.get_mut(control.id as usize) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let ends: Vec<TokenId> = tokenizer.eos_ids.iter().copied().filter(|id| (*id as usize) < vocab).collect();
        let first = ends.first().copied().context("the tokenizer has no token that ends an answer")?;
        let make = || {
            let trie = TokTrie::from(&TokRxInfo::new(vocab as u32, first), &words).with_eos_tokens(&ends);
            let env: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[])?;
            factory.quiet();
            let limits = factory.limits_mut();
            (limits.max_lexer_states, limits.max_grammar_size, limits.verbose_errors) =
                (STATES_MAX, GRAMMAR_MAX, false);
            Ok(Self { factory })
        };
        std::panic::catch_unwind(make).unwrap_or_else(|_| Err(anyhow!("the tokenizer's tokens cannot be arranged")))
    }

    /// Returns the form of JSON by a schema. `lenient`: what of the schema cannot be held to is not.
    ///
    /// # Errors
    /// When nothing, or too much, is by the schema; names the field that it came in.
    pub(super) fn schema(
        &self,
        schema: &Value,
        lenient: bool,
        param: &str,
    ) -> Result<Box<dyn Constraint>, HandlerError> {
        if schema.to_string().len() > SCHEMA_BYTES_MAX {
            let message = format!("`{param}`: the schema is longer than {} KiB", SCHEMA_BYTES_MAX >> 10);
            return Err(HandlerError::invalid(param, message));
        }
        let mut schema = if has_key(schema, "allOf") { schema.clone() } else { closed(schema) };
        if let Some(fields) = schema.as_object_mut() {
            let options = json!({"whitespace_flexible": false, "whitespace_pattern": SPACE, "lenient": lenient});
            fields.insert("x-guidance".to_owned(), options);
        }
        let make = || self.factory.create_parser(TopLevelGrammar::from_json_schema(schema.clone()));
        let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make));
        let parser = parser.unwrap_or_else(|_| Err(anyhow!("it cannot be read")));
        let parser = parser.map_err(|error| {
            let words = first_words(&error);
            HandlerError::invalid(param, format!("`{param}`: an answer cannot be held to the schema: {words}"))
        })?;
        // What can never begin is found out when it is asked for the first token.
        let mut matcher = Matcher::new(Ok(parser));
        matcher.compute_mask_or_eos().map_err(|error| {
            let message = format!("`{param}`: an answer cannot be held to the schema: {}", first_words(&error));
            HandlerError::invalid(param, message)
        })?;
        Ok(Box::new(Form { matcher }))
    }
}

/// What a request holds its answer to.
pub(super) enum Held {
    /// Nothing.
    Free,
    /// JSON by a schema; whether leniently; and the request's field that it came in.
    Schema(Value, bool, &'static str),
    /// A call of a tool: JSON by a schema.
    Call(Value),
    /// A call of a tool or an answer: JSON by a schema. Whether leniently.
    Either(Value, bool),
}

impl Held {
    /// Returns what a request holds its answer to, of a model that writes calls in a format.
    pub(super) fn of(request: &Request, format: &Format) -> Self {
        match (&request.tool_choice, &request.response_format) {
            (Some(ToolChoice::Required), _) => Self::Call(json!({"anyOf": calls(&request.tools, format, 0)})),
            (Some(ToolChoice::Named(name)), _) => {
                let named: Vec<Tool> = request.tools.iter().filter(|tool| tool.name == *name).cloned().collect();
                Self::Call(json!({"anyOf": calls(&named, format, 0)}))
            }
            (Some(ToolChoice::Auto) | None, Some(form))
                if !request.tools.is_empty() && form != &ResponseFormat::Text =>
            {
                let (mut schema, strict) = match form {
                    ResponseFormat::JsonSchema { schema, strict, .. } => (schema.clone(), *strict),
                    _ => (json!({"type": "object"}), None),
                };
                move_references(&mut schema, "#/anyOf/0");
                let mut any = vec![schema];
                any.extend(calls(&request.tools, format, 1));
                Self::Either(json!({"anyOf": any}), strict != Some(true))
            }
            (_, Some(ResponseFormat::JsonObject)) => Self::Schema(json!({"type": "object"}), false, "response_format"),
            (_, Some(ResponseFormat::JsonSchema { schema, strict, .. })) => {
                Self::Schema(schema.clone(), *strict != Some(true), "response_format")
            }
            (None | Some(ToolChoice::None | ToolChoice::Auto), None | Some(ResponseFormat::Text)) => Self::Free,
        }
    }
}

/// The schemas of calls of some tools, which stand in a list of schemas behind `before` others.
fn calls(tools: &[Tool], format: &Format, before: usize) -> Vec<Value> {
    let one = |(i, tool): (usize, &Tool)| {
        let mut schema = tool.parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}));
        move_references(&mut schema, &format!("#/anyOf/{}/properties/{}", before + i, format.arguments));
        if schema.get("type").is_none() && schema.get("$ref").is_none() {
            schema["type"] = json!("object");
        }
        json!({
            "type": "object",
            "properties": Map::from_iter([
                ("name".to_owned(), json!({"const": tool.name})),
                (format.arguments.to_owned(), schema),
            ]),
            "required": ["name", format.arguments],
            "additionalProperties": false,
        })
    };
    tools.iter().enumerate().map(one).collect()
}

/// Lets references within a schema lead to the same places when it stands at `place` in another.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                match value {
                    Value::String(reference) if key == "$ref" => {
                        if let Some(rest) = reference.strip_prefix('#') {
                            *reference = format!("{place}{rest}");
                        }
                    }
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| move_references(item, place)),
        _ => {}
    }
}

fn has_key(schema: &Value, wanted: &str) -> bool {
    match schema {
        Value::Object(fields) => fields.iter().any(|(key, value)| key == wanted || has_key(value, wanted)),
        Value::Array(items) => items.iter().any(|item| has_key(item, wanted)),
        _ => false,
    }
}

/// Keys beside which an object may need properties that it does not name.
const OPEN: [&str; 8] =
    ["additionalProperties", "patternProperties", "propertyNames", "minProperties", "anyOf", "oneOf", "$ref", "if"];

/// Lets objects have no other properties than those that they name. What is by this schema is by the given one, too; a small model
/// that may name further properties does not find an end.
fn closed(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let each = |(key, value): (&String, &Value)| match key.as_str() {
                "const" | "enum" | "default" | "examples" | "example" => (key.clone(), value.clone()),
                // The names of properties are no keywords.
                "properties" | "$defs" | "definitions" => {
                    let inner = value
                        .as_object()
                        .map(|inner| inner.iter().map(|(key, value)| (key.clone(), closed(value))).collect());
                    (key.clone(), inner.map_or_else(|| value.clone(), Value::Object))
                }
                _ => (key.clone(), closed(value)),
            };
            let mut all: Map<String, Value> = fields.iter().map(each).collect();
            let named = all.get("properties").and_then(Value::as_object);
            let required = all.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let is_named =
                |name: &Value| name.as_str().is_some_and(|name| named.is_some_and(|named| named.contains_key(name)));
            if named.is_some() && required.iter().all(is_named) && !OPEN.iter().any(|key| all.contains_key(*key)) {
                all.insert("additionalProperties".to_owned(), json!(false));
            }
            Value::Object(all)
        }
        Value::Array(items) => items.iter().map(closed).collect(),
        other => other.clone(),
    }
}

/// The form of one answer.
struct Form {
    matcher: Matcher,
}

impl Constraint for Form {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed: SimpleVob = self.matcher.compute_mask_or_eos().map_err(|error| broken(&error))?;
        let mut left = 0;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id < allowed.len() && allowed.is_allowed(id as TokenId) {
                left += 1;
            } else {
                *logit = MASKED;
            }
        }
        if left == 0 {
            Err(anyhow!("no token of this model goes on with the form that the answer is held to"))
        } else {
            Ok(())
        }
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        self.matcher.consume_token(token).map_err(|error| broken(&error))?;
        Ok(self.matcher.is_stopped())
    }
}

/// A form that cannot be followed any further, in words that name only the form.
#[derive(Debug)]
struct Broken(String);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the form that the answer is held to takes more work than is given: {}", self.0)
    }
}

impl std::error::Error for Broken {}

fn broken(error: &anyhow::Error) -> anyhow::Error {
    anyhow::Error::new(Broken(first_words(error)))
}

/// The error of a token that was not drawn.
pub(super) fn undrawn(error: &anyhow::Error) -> HandlerError {
    match error.downcast_ref::<Broken>() {
        Some(broken) => HandlerError::new(Kind::Internal, broken.to_string()).with_detail(format!("{error:#}")),
        None => HandlerError::internal(error),
    }
}

/// The beginning of what llguidance says.
fn first_words(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().chars().take(300).collect()
}

/// An error of a model that has no forms.
pub(super) fn no_forms(error: &str) -> HandlerError {
    let message = "answers of this model cannot be held to a form; ask for a text";
    HandlerError::new(Kind::Internal, message).with_detail(format!("{message}: {error}"))
}
