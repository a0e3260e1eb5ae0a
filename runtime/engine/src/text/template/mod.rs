//! Chat templates: the model's own Jinja template turns messages into the text that the model was trained on.
//!
//! Training and serving render here, and nowhere else, so a model is served what it was taught. The environment is
//! that of transformers' `apply_chat_template` (`utils/chat_template_utils.py`): its options, filters and globals,
//! and its `{% generation %}` block, which marks what the assistant wrote.
//!
//! A rendered text carries two sets of byte spans. *Trained* spans are what the model must learn to write. *Literal*
//! spans are control tokens that somebody typed inside a message: they stay text, or a user could end a turn and
//! begin another in the assistant's name.

use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde_json::Value as Json;

use crate::text::control::Control;

mod bounds;
mod clock;
#[cfg(test)]
mod expressions;
mod generation;
mod given;
#[cfg(test)]
mod hostile;
mod lexer;
mod marked;
mod marks;
mod message;
mod problem;
#[cfg(test)]
mod published;
mod python;
mod rendered;
mod source;
mod strings;
#[cfg(test)]
mod tests;
mod turns;
pub(crate) mod written;

pub use clock::{hold_time, local_time, present_time, time};
use generation::rewrite_generation_tags;
pub use given::{Given, RESERVED};
use message::Reads;
pub use message::join_parts;
use problem::template_error;
pub use rendered::Rendered;
use turns::Block;

/// The name under which the one template is stored in its environment.
const NAME: &str = "chat template";

/// A model's chat template, compiled.
///
/// `messages` are OpenAI's (`role`, `content`, `tool_calls`, …). Before rendering, keys that are null are dropped,
/// `arguments` of tool calls that are JSON strings are parsed (a template that wants text gets text), and a reasoning
/// field is offered under each of its usual names, as transformers does. A template that reads content in parts gets parts, and
/// others a text. `developer` is `system` to a template that does not know it.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    variables: Vec<(String, Value)>,
    reads: Reads,
    /// Rendering may nest so deep that it needs a stack of its own.
    deep: bool,
    /// Texts that it may write.
    written: String,
    /// What renders conversations with tools.
    tool_use: Option<Box<ChatTemplate>>,
}

impl ChatTemplate {
    /// Compiles `source`, a Jinja template, for a tokenizer with these BOS and EOS tokens, and renders a plain
    /// conversation with it once.
    ///
    /// # Errors
    /// When the template does not parse, or takes more work, memory or depth for that conversation than any is given.
    /// A template that refuses the conversation otherwise may still render those that it is for. The message names the
    /// line.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the standard delimiters differ from each other"));
        env.set_auto_escape_callback(|_| AutoEscape::None);
        bounds::add_to(&mut env);
        python::add_to(&mut env);
        env.add_function("joiner", minijinja_contrib::globals::joiner);
        env.add_function("raise_exception", raise_exception);
        env.add_filter("homeroom_generation", mark_generation);
        // jinja2 reads every line ending as "\n".
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source::Checked { text, deep, written } = source::check(&rewrite_generation_tags(&source))?;
        // Parsing and compiling recurse into expressions.
        let env = bounds::on_stack(true, move || {
            env.add_template_owned(NAME, text).map_err(|e| template_error(&e))?;
            Ok(env)
        })?;
        let (variables, reads) = (Vec::new(), Reads::default());
        let mut template = Self { env, source, variables, reads, deep, written, tool_use: None };
        template.set_clock(None);
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                template.variables.push((name.into(), Value::from(token)));
            }
        }
        template.try_out()?;
        template.reads = Reads::of(&template);
        Ok(template)
    }

    /// Renders conversations with tools by another template, as transformers does with the one named `tool_use`.
    pub fn with_tool_use(mut self, template: Self) -> Self {
        self.tool_use = Some(Box::new(template));
        self
    }

    /// The template for conversations with these tools.
    fn of(&self, given: Given<'_>) -> &Self {
        given.tools.and(self.tool_use.as_deref()).unwrap_or(self)
    }

    /// Renders a plain conversation, as a template would be asked to first.
    fn try_out(&self) -> Result<()> {
        let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let messages = [message("user", "a"), message("assistant", "b"), message("user", "c")];
        for (messages, prompt) in [(&messages[..], true), (&messages[..2], false)] {
            match self.run(messages, Given::default(), prompt, "") {
                Err(error) if error.is::<bounds::Exceeded>() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sets a variable that the template can read: `unk_token`, `pad_token`, `enable_thinking`, ….
    pub fn with_variable(mut self, name: &str, value: &Json) -> Self {
        self.variables.retain(|(n, _)| n != name);
        self.variables.push((name.into(), to_value(value)));
        self.tool_use = self.tool_use.map(|template| Box::new(template.with_variable(name, value)));
        self
    }

    /// Fixes what `strftime_now` says, in seconds since 1970 (UTC).
    #[cfg(test)]
    fn with_clock(mut self, unix_seconds: i64) -> Self {
        self.set_clock(Some(unix_seconds));
        self.tool_use = self.tool_use.map(|template| Box::new(template.with_clock(unix_seconds)));
        self
    }

    /// The template as it was given, with line endings as "\n": what a digest is taken of.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders as `apply_chat_template(tokenize=False)` does.
    ///
    /// # Errors
    /// When the template refuses the messages or fails; the message names the template's line.
    pub fn render<'a>(
        &self,
        messages: &[Json],
        given: impl Into<Given<'a>>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let given = given.into();
        let template = self.of(given);
        template.run(&template.reads.prepare(messages)?, given, add_generation_prompt, "")
    }

    /// Renders what serving sends to the model: with `add_generation_prompt`, nothing trained.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; also when the template changes a control token typed in a message, so that it
    /// cannot be kept as text.
    pub fn render_prompt<'a>(
        &self,
        messages: &[Json],
        given: impl Into<Given<'a>>,
        control: &[Control],
    ) -> Result<Rendered> {
        let given = given.into();
        let template = self.of(given);
        let marked = template.render_marked(&template.reads.prepare(messages)?, given, true, control)?;
        Ok(Rendered { text: marked.text, trained: Vec::new(), literal: marked.literal })
    }

    /// Whether it writes the tools that it is given.
    pub fn writes_tools(&self) -> bool {
        self.reads.tools || self.tool_use.is_some()
    }

    /// The source of what renders conversations with tools.
    pub fn tool_source(&self) -> &str {
        self.tool_use.as_ref().map_or(&self.source, |template| &template.source)
    }

    /// What ends the block of thinking that a prompt opens at its end, such as `</think>`; `None` where it opens none.
    pub fn open_block_end(&self, prompt: &str) -> Option<String> {
        let prompt = prompt.trim_end();
        let tag = &prompt[prompt.rfind(['<', '['])?..];
        match self.block(tag)?? {
            Block { closing, open: true, .. } => Some(closing),
            Block { .. } => None,
        }
    }

    /// Whether the template says what is trained, with `{% generation %}`.
    fn marks_generation(&self) -> bool {
        self.source.contains("endgeneration")
    }

    fn set_clock(&mut self, unix_seconds: Option<i64>) {
        self.env.add_function("strftime_now", move |format: Option<&str>, options: Kwargs| -> Result<String, Error> {
            let format = format.map_or_else(|| options.get("format"), Ok)?;
            options.assert_all_used()?;
            bounds::width(format.chars().count(), "strftime_now: a format")?;
            bounds::format(format, "strftime_now: a format")?;
            let now = unix_seconds.map_or_else(|| Ok(clock::now()), clock::at);
            now.and_then(|now| clock::write(format, now)).map_err(|error| {
                Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {}", bounds::cut(&error.to_string())))
            })
        });
    }

    /// Renders messages that are normalised. `marks`: the two characters to put around generated spans, or "".
    fn run(&self, messages: &[Json], given: Given<'_>, prompt: bool, marks: &str) -> Result<String> {
        let values: Vec<Value> = messages.iter().map(to_value).collect();
        self.run_values((messages, &values), given, prompt, marks)
    }

    /// The same of messages that were made values of the template's language.
    fn run_values(
        &self,
        (messages, values): (&[Json], &[Value]),
        given: Given<'_>,
        prompt: bool,
        marks: &str,
    ) -> Result<String> {
        let fuel = bounds::fuel(messages, given);
        let more = (fuel > bounds::FUEL).then(|| {
            let mut env = self.env.clone();
            env.set_fuel(Some(fuel));
            env
        });
        let env = more.as_ref().unwrap_or(&self.env);
        bounds::on_stack(self.deep, || {
            let list = |list: Option<&Json>| list.map_or_else(|| Value::from(()), to_value);
            let mut context: Vec<(&str, Value)> = vec![("homeroom_marks", Value::from(marks))];
            context.extend(self.variables.iter().map(|(n, v)| (n.as_str(), v.clone())));
            let own = given.variables.and_then(Json::as_object).into_iter().flatten();
            let own = own.filter(|(name, _)| !RESERVED.contains(&name.as_str()) && *name != "homeroom_marks");
            context.extend(own.map(|(name, value)| (name.as_str(), to_value(value))));
            context.extend([
                ("messages", values.iter().cloned().collect()),
                ("tools", list(given.tools)),
                ("documents", list(given.documents)),
                ("add_generation_prompt", Value::from(prompt)),
            ]);
            let template = env.get_template(NAME).map_err(|e| template_error(&e))?;
            let rendered = template.render(Value::from_pairs(context));
            bounds::written(rendered.map_err(|e| template_error(&e))?, messages, given)
        })
    }
}

/// Puts the marks around what the block wrote. `marks` is "" when nobody asked.
fn mark_generation(written: String, marks: &str) -> String {
    let mut marks = marks.chars();
    match (marks.next(), marks.next()) {
        (Some(start), Some(end)) => format!("{start}{written}{end}"),
        _ => written,
    }
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, bounds::cut(message)))
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (_, Some(u)) => Value::from(u),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), to_value(v)))),
    }
}
