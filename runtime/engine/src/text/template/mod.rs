//! Chat templates: the model's own Jinja template turns messages into the text that the model was trained on.
//!
//! Training and serving render here, and nowhere else, so a model is served what it was taught. The environment is
//! that of transformers' `apply_chat_template` (`utils/chat_template_utils.py`): its options, filters and globals,
//! and its `{% generation %}` block, which marks what the assistant wrote.
//!
//! A rendered text carries two sets of byte spans. *Trained* spans are what the model must learn to write. *Literal*
//! spans are control tokens that somebody typed inside a message: they stay text, or a user could end a turn and
//! begin another in the assistant's name.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde_json::Value as Json;

use crate::text::tokenizer::{Control, Tokenizer, template_file};

mod bounds;
mod generation;
#[cfg(test)]
mod hostile;
mod lexer;
mod marks;
mod message;
mod python;
mod source;
#[cfg(test)]
mod tests;
mod tokens;
mod turns;

use generation::rewrite_generation_tags;
use marks::{Marked, Marks, Survey, count_obeyed, find_around, find_typed, keys_of};
use message::Reads;
pub use message::join_parts;
pub(crate) use tokens::token_starts;
pub use tokens::tokenize;
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

/// A text ready for tokenising: which byte spans are trained, and where a user's text spells special tokens that must
/// stay text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The whole text, as transformers would render it.
    pub text: String,
    /// What the model learns to write: byte ranges of `text`, ascending, disjoint.
    pub trained: Vec<Range<usize>>,
    /// Special tokens typed inside a message: byte ranges of `text`, ascending, disjoint.
    pub literal: Vec<Range<usize>>,
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

    /// The chat template of a tokenizer, with the one for tools if that has a source of its own. `place`: what it was read from.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`]. Names the file.
    pub fn of_tokenizer(tokenizer: &Tokenizer, place: &Path) -> Result<Option<Self>> {
        let file = |name: Option<&str>| template_file(place, name).display().to_string();
        let (bos, eos) = (tokenizer.bos_token.as_deref(), tokenizer.eos_token.as_deref());
        let Some(source) = &tokenizer.chat_template else { return Ok(None) };
        let template = Self::new(source, bos, eos).context("its chat template").with_context(|| file(None))?;
        Ok(Some(match tokenizer.named_templates.get("tool_use") {
            Some(source) => {
                let tool_use = Self::new(source, bos, eos).context("its chat template `tool_use`");
                template.with_tool_use(tool_use.with_context(|| file(Some("tool_use")))?)
            }
            None => template,
        }))
    }

    /// Renders conversations with tools by another template, as transformers does with the one named `tool_use`.
    pub fn with_tool_use(mut self, template: Self) -> Self {
        self.tool_use = Some(Box::new(template));
        self
    }

    /// The template for conversations with these tools.
    fn of(&self, tools: Option<&Json>) -> &Self {
        tools.and(self.tool_use.as_deref()).unwrap_or(self)
    }

    /// Renders a plain conversation, as a template would be asked to first.
    fn try_out(&self) -> Result<()> {
        let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let messages = [message("user", "a"), message("assistant", "b"), message("user", "c")];
        for (messages, prompt) in [(&messages[..], true), (&messages[..2], false)] {
            match self.run(messages, None, prompt, "") {
                Err(error) if error.is::<bounds::Exceeded>() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sets a variable that the template can read: `unk_token`, `pad_token`, `enable_thinking`, `documents`, ….
    pub fn with_variable(mut self, name: &str, value: &Json) -> Self {
        self.variables.retain(|(n, _)| n != name);
        self.variables.push((name.into(), to_value(value)));
        self.tool_use = self.tool_use.map(|template| Box::new(template.with_variable(name, value)));
        self
    }

    /// Fixes what `strftime_now` says, in seconds since 1970 (UTC), so that a run resumed on another day renders the
    /// same text. Without it the template sees the present time in UTC (transformers: local time).
    pub fn with_clock(mut self, unix_seconds: i64) -> Self {
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
    pub fn render(&self, messages: &[Json], tools: Option<&Json>, add_generation_prompt: bool) -> Result<String> {
        let template = self.of(tools);
        template.run(&template.reads.prepare(messages)?, tools, add_generation_prompt, "")
    }

    /// Renders what serving sends to the model: with `add_generation_prompt`, nothing trained.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; also when the template changes a control token typed in a message, so that it
    /// cannot be kept as text.
    pub fn render_prompt(&self, messages: &[Json], tools: Option<&Json>, control: &[Control]) -> Result<Rendered> {
        let template = self.of(tools);
        let marked = template.render_marked(&template.reads.prepare(messages)?, tools, true, control)?;
        Ok(Rendered { text: marked.text, trained: Vec::new(), literal: marked.literal })
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
        self.env.add_function("strftime_now", move |state: &State, format: &str| -> Result<String, Error> {
            bounds::width(format.chars().count(), "strftime_now: a format")?;
            bounds::format(format, "strftime_now: a format")?;
            let now = unix_seconds.unwrap_or_else(|| {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.map_or(0, |d| d.as_secs() as i64)
            });
            let format = Kwargs::from_iter([("format", Value::from(format))]);
            minijinja_contrib::filters::datetimeformat(state, Value::from(now as f64), format)
        });
    }

    /// Renders messages that are normalised. `marks`: the two characters to put around generated spans, or "".
    fn run(&self, messages: &[Json], tools: Option<&Json>, prompt: bool, marks: &str) -> Result<String> {
        let fuel = bounds::fuel(messages, tools);
        let more = (fuel > bounds::FUEL).then(|| {
            let mut env = self.env.clone();
            env.set_fuel(Some(fuel));
            env
        });
        let env = more.as_ref().unwrap_or(&self.env);
        bounds::on_stack(self.deep, || {
            let mut context: Vec<(&str, Value)> =
                vec![("documents", Value::from(())), ("homeroom_marks", Value::from(marks))];
            context.extend(self.variables.iter().map(|(n, v)| (n.as_str(), v.clone())));
            context.extend([
                ("messages", messages.iter().map(to_value).collect()),
                ("tools", tools.map_or_else(|| Value::from(()), to_value)),
                ("add_generation_prompt", Value::from(prompt)),
            ]);
            let template = env.get_template(NAME).map_err(|e| template_error(&e))?;
            let rendered = template.render(Value::from_pairs(context));
            bounds::written(rendered.map_err(|e| template_error(&e))?, messages, tools)
        })
    }

    /// Renders with marks around what was generated and around special tokens in the messages, and reads them off.
    fn render_marked(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        prompt: bool,
        control: &[Control],
    ) -> Result<Marked> {
        let texts = |chosen: &dyn Fn(&Control) -> bool| {
            let mut texts: Vec<&str> = control.iter().filter(|c| chosen(c)).map(|c| c.text.as_str()).collect();
            texts.retain(|s| !s.is_empty());
            texts.sort_by_key(|s| std::cmp::Reverse(s.len()));
            texts
        };
        let (all, special) = (texts(&|_| true), texts(&|c| c.special));
        let of = |message: &Json| if message["role"] == "assistant" { &special } else { &all };
        for (i, message) in messages.iter().enumerate() {
            // Templates write a role as it is, and branch on it, so it cannot be marked.
            let role = message["role"].as_str().unwrap_or_default();
            if let Some(token) = all.iter().find(|token| role.contains(**token)) {
                bail!("message {}: its role has the control token {token:?} in it", i + 1);
            }
        }
        let sought = all.iter().flat_map(|token| keys_of(token)).collect();
        let mut survey = Survey { sought, ..Survey::default() };
        messages.iter().for_each(|v| survey.visit(v, of(v)));
        tools.into_iter().for_each(|v| survey.visit(v, &all));
        survey.note_private(&self.source);
        let marks = Marks::outside(&survey.private, &survey.keys)?;

        let plain = marks.read(&self.run(messages, tools, prompt, &marks.generation())?)?;
        // A token can also come of typed pieces, which the template puts together.
        let in_pieces =
            |token: &&&str| keys_of(token).next().is_some() && keys_of(token).all(|key| survey.keys.contains(&key));
        let made = all.iter().find(in_pieces).copied();
        if survey.typed.is_none() && made.is_none() {
            return Ok(plain);
        }
        let written: Vec<&Control> = control.iter().filter(|c| !c.text.is_empty()).collect();
        let mut harmless = None;
        if survey.typed.is_none_or(|token| keys_of(token).next().is_some()) {
            let (keep, keep_of_assistant) = (self.looked_for(&all), self.looked_for(&special));
            let stand_in = |v: &Json| match v["role"] == "assistant" {
                true => marks.stand_in(v, &keep_of_assistant, true, true),
                false => marks.stand_in(v, &keep, false, true),
            };
            let messages: Vec<Json> = messages.iter().map(stand_in).collect();
            let tools = tools.map(|v| marks.stand_in(v, &keep, false, false));
            match self.run(&messages, tools.as_ref(), prompt, &marks.generation()) {
                Err(error) if error.is::<bounds::Exceeded>() => return Err(error),
                Err(_) => {}
                Ok(text) => {
                    let mut marked = marks.read(&text)?;
                    marked.literal = find_typed(&marked.text, &marked.typed, &written);
                    if marked.text == plain.text && marked.generated == plain.generated {
                        return Ok(marked);
                    }
                    harmless = Some(marked);
                }
            }
        }
        // The template looks at those characters, so only whole tokens are marked.
        let marked = match survey.typed {
            Some(typed) => self.mark_whole(&marks, &plain, messages, tools, prompt, (&all, &special), typed)?,
            None => plain,
        };
        if let Some(harmless) = harmless {
            let (obeyed, most) = (
                count_obeyed(&marked.text, &marked.literal, &written),
                count_obeyed(&harmless.text, &harmless.literal, &written),
            );
            let own = |token: &Control| {
                !token.special && messages.iter().any(|m| m["role"] == "assistant" && holds(m, &token.text))
            };
            if let Some(i) = (0..written.len()).find(|&i| obeyed[i] > most[i] && !own(written[i])) {
                bail!(
                    "the chat template makes the control token {:?} of what is typed in a message, so it cannot be kept as text",
                    written[i].text
                );
            }
        } else if let (None, Some(token)) = (survey.typed, made) {
            bail!(
                "the chat template fails unless the characters of {token:?} are typed in a message, so it cannot be told who writes that"
            );
        }
        Ok(marked)
    }

    /// Texts that the template may look for in messages, and that are no part of these tokens, longest first.
    fn looked_for<'a>(&self, tokens: &[&'a str]) -> Vec<&str> {
        let ends_of = |token: &&'a str| {
            let second = token.char_indices().nth(2).map_or(token.len(), |(at, _)| at);
            let last = token.char_indices().nth_back(1).map_or(0, |(at, _)| at);
            [&token[..second], &token[last..]]
        };
        let ends: BTreeSet<&str> = tokens.iter().flat_map(ends_of).collect();
        let texts = self.written.split('\0').map(str::trim);
        let mut texts: Vec<&str> = texts.filter(|text| (3..=64).contains(&text.len())).collect();
        texts.retain(|text| keys_of(text).next().is_some());
        texts.retain(|text| !ends.iter().any(|end| text.contains(end)) && !tokens.iter().any(|t| t.contains(text)));
        texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
        texts
    }

    /// Marks control tokens that are typed as they are. `typed` is one of them.
    #[expect(clippy::too_many_arguments, reason = "one rendering, and what is known of it")]
    fn mark_whole(
        &self,
        marks: &Marks,
        plain: &Marked,
        messages: &[Json],
        tools: Option<&Json>,
        prompt: bool,
        (all, special): (&[&str], &[&str]),
        typed: &str,
    ) -> Result<Marked> {
        let of = |message: &Json| if message["role"] == "assistant" { special } else { all };
        // Around the token first; a template that trims or looks at the ends of a message may be disturbed by that,
        // and is then given the mark behind the token's first character.
        for inside in [false, true] {
            let messages: Vec<Json> = messages.iter().map(|v| marks.mark(v, of(v), inside, true)).collect();
            let tools = tools.map(|v| marks.mark(v, all, inside, true));
            let text = match self.run(&messages, tools.as_ref(), prompt, &marks.generation()) {
                Ok(text) => text,
                Err(error) if error.is::<bounds::Exceeded>() => return Err(error),
                Err(_) => continue,
            };
            let mut marked = marks.read(&text)?;
            if marked.text == plain.text && marked.generated == plain.generated {
                if inside {
                    marked.literal = find_around(&marked.text, &marked.inner, all);
                }
                return Ok(marked);
            }
        }
        bail!("the chat template changes the control token {typed:?} typed in a message, so it cannot be kept as text")
    }
}

/// Whether a text in `value` has `part` in it.
fn holds(value: &Json, part: &str) -> bool {
    match value {
        Json::String(text) => text.contains(part),
        Json::Array(items) => items.iter().any(|item| holds(item, part)),
        Json::Object(fields) => fields.iter().any(|(key, item)| key.contains(part) || holds(item, part)),
        _ => false,
    }
}

/// Texts that a chat template may write by itself: its strings, and plain conversations. `source` is taken whole where it
/// is no template.
pub(crate) fn written_by(source: &str, bos: Option<&str>, eos: Option<&str>) -> String {
    let Ok(template) = ChatTemplate::new(source, bos, eos) else {
        return source.to_owned();
    };
    let mut written = template.written.clone();
    let message = |role: &str| serde_json::json!({"role": role, "content": "a"});
    let (user, assistant) = (message("user"), message("assistant"));
    let conversations = [
        vec![message("system"), user.clone(), assistant.clone(), user.clone()],
        vec![user.clone(), assistant.clone(), message("tool"), assistant],
        vec![user],
    ];
    for messages in conversations {
        written.push('\0');
        written.push_str(&template.render(&messages, None, true).unwrap_or_default());
    }
    written
}

/// What a chat template writes behind an assistant's text that is the last; `None` where it refuses a plain conversation or leaves
/// that text out.
pub(crate) fn behind_answer(source: &str, bos: Option<&str>, eos: Option<&str>) -> Option<String> {
    // No template writes this word by itself.
    const ANSWER: &str = "xqzwkv";
    let template = ChatTemplate::new(source, bos, eos).ok()?;
    let messages = [("user", "a"), ("assistant", ANSWER)]
        .map(|(role, content)| serde_json::json!({"role": role, "content": content}));
    let text = template.run(&messages, None, false, "").ok()?;
    text.rsplit_once(ANSWER).map(|(_, behind)| behind.to_owned())
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

/// "chat template, line 3: what failed", from the innermost place that is known.
fn template_error(error: &Error) -> anyhow::Error {
    let mut deepest = error;
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<Error>() {
            deepest = inner;
        }
        source = inner.source();
    }
    let line = deepest.line().or(error.line());
    let place = line.map_or(String::new(), |n| format!(", line {n}"));
    if bounds::is_beyond(deepest.kind(), deepest.detail()) {
        let detail = match deepest.kind() {
            ErrorKind::OutOfFuel => "stopped: it takes more work or memory than a conversation of this size is given",
            _ => deepest.detail().unwrap_or_default(),
        };
        return anyhow!(bounds::Exceeded(format!("{NAME}{place}: {detail}")));
    }
    match (deepest.kind(), deepest.detail().map(bounds::cut)) {
        // `raise_exception` and plain failures say enough by themselves.
        (ErrorKind::InvalidOperation, Some(detail)) => anyhow!("{NAME}{place}: {detail}"),
        (kind, Some(detail)) => anyhow!("{NAME}{place}: {kind}: {detail}"),
        (kind, None) => anyhow!("{NAME}{place}: {kind}"),
    }
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
