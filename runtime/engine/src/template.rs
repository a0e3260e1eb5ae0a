//! Chat templates: the model's own Jinja template turns messages into the text that the model was trained on.
//!
//! Training and serving render here, and nowhere else, so a model is served what it was taught. The environment is
//! that of transformers' `apply_chat_template` (`utils/chat_template_utils.py`): its options, filters and globals,
//! and its `{% generation %}` block, which marks what the assistant wrote.
//!
//! A rendered text carries two sets of byte spans. *Trained* spans are what the model must learn to write. *Literal*
//! spans are special tokens that somebody typed inside a message: they stay text, or a user could end a turn and
//! begin another in the assistant's name.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde_json::{Map, Value as Json};

use crate::tokenizer::{Encoded, Tokenizer};

mod python;
#[cfg(test)]
mod tests;

/// The name under which the one template is stored in its environment.
const NAME: &str = "chat template";
/// What `{% generation %}` becomes, less the outer delimiters: a block with its own scope, filtered. Nothing stands
/// between the two tags, so white space is trimmed as around the original one.
const GENERATION: &str = "with %}{% filter homeroom_generation(homeroom_marks)";
const END_GENERATION: &str = "endfilter %}{% endwith";

/// A model's chat template, compiled.
///
/// `messages` are OpenAI's (`role`, `content`, `tool_calls`, …). Before rendering, keys that are null are dropped,
/// `arguments` of tool calls that are JSON strings are parsed (a template that wants text gets text), and a reasoning
/// field is offered under each of its usual names, as transformers does.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    variables: Vec<(String, Value)>,
    /// The template adds `arguments` to strings, so it must be given text (DeepSeek-V3 does).
    arguments_as_text: bool,
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
    /// Compiles `source`, a Jinja template, for a tokenizer with these BOS and EOS tokens.
    ///
    /// # Errors
    /// When the template does not parse; the message names the line.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the standard delimiters differ from each other"));
        env.set_auto_escape_callback(|_| AutoEscape::None);
        python::add_to(&mut env);
        env.add_function("joiner", minijinja_contrib::globals::joiner);
        env.add_function("raise_exception", raise_exception);
        env.add_filter("homeroom_generation", mark_generation);
        // jinja2 reads every line ending as "\n".
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        env.add_template_owned(NAME, rewrite_generation_tags(&source)).map_err(|e| template_error(&e))?;
        let mut template = Self { env, source, variables: Vec::new(), arguments_as_text: false };
        template.set_clock(None);
        for (name, token) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(token) = token {
                template.variables.push((name.into(), Value::from(token)));
            }
        }
        template.arguments_as_text = template.wants_arguments_as_text();
        Ok(template)
    }

    /// Sets a variable that the template can read: `unk_token`, `pad_token`, `enable_thinking`, `documents`, ….
    pub fn with_variable(mut self, name: &str, value: &Json) -> Self {
        self.variables.retain(|(n, _)| n != name);
        self.variables.push((name.into(), to_value(value)));
        self
    }

    /// Fixes what `strftime_now` says, in seconds since 1970 (UTC), so that a run resumed on another day renders the
    /// same text. Without it the template sees the present time in UTC (transformers: local time).
    pub fn with_clock(mut self, unix_seconds: i64) -> Self {
        self.set_clock(Some(unix_seconds));
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
        self.run(&self.normalise(messages)?, tools, add_generation_prompt, "")
    }

    /// Renders a conversation to learn from. `special` are the tokenizer's special tokens.
    ///
    /// Usually one text. A template with `{% generation %}` says itself what is trained. Without it, the span of an
    /// assistant turn is what rendering up to and including it adds to rendering before it with
    /// `add_generation_prompt`. Where those renderings do not begin one another (templates that drop earlier
    /// thinking), each assistant turn is a text of its own, rendered as it would be served. Turns with `weight: 0`
    /// are not trained.
    ///
    /// # Errors
    /// When there is nothing to train on, the template refuses the messages, or the prompt of a turn does not begin
    /// the turn.
    pub fn render_for_training(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        special: &[(String, u32)],
    ) -> Result<Vec<Rendered>> {
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| messages[i]["role"] == "assistant").collect();
        ensure!(!turns.is_empty(), "nothing to train on: no assistant message");
        let learned: Vec<usize> =
            turns.iter().copied().filter(|&i| messages[i].get("weight").and_then(Json::as_f64) != Some(0.0)).collect();
        ensure!(!learned.is_empty(), "nothing to train on: every assistant message has weight 0");

        let messages = self.normalise(messages)?;
        let full = self.render_marked(&messages, tools, false, special)?;
        if self.marks_generation() {
            return Ok(vec![full.trained_by_marks(&turns, &learned)?]);
        }

        let mut whole = Vec::with_capacity(learned.len());
        for &i in &learned {
            let prompt = self.run(&messages[..i], tools, true, "").with_context(|| before_turn(i))?;
            let upto = self.run(&messages[..=i], tools, false, "")?;
            if !(upto.starts_with(&prompt) && full.text.starts_with(&upto)) {
                whole.clear();
                break;
            }
            whole.push(prompt.len()..upto.len());
        }
        if !whole.is_empty() {
            let (text, literal) = (full.text, full.literal);
            return Ok(vec![Rendered { text, trained: whole, literal }]);
        }

        let mut texts = Vec::with_capacity(learned.len());
        for &i in &learned {
            let prompt = self.run(&messages[..i], tools, true, "").with_context(|| before_turn(i))?;
            let Marked { text, literal, .. } = self.render_marked(&messages[..=i], tools, false, special)?;
            if !text.starts_with(&prompt) {
                let (ours, theirs) = parting(&text, &prompt);
                bail!(
                    "message {}: the chat template writes this turn otherwise than the prompt it would answer: {ours:?} where the prompt has {theirs:?}",
                    i + 1
                );
            }
            let trained = std::iter::once(prompt.len()..text.len()).collect();
            texts.push(Rendered { text, trained, literal });
        }
        Ok(texts)
    }

    /// Renders what serving sends to the model: with `add_generation_prompt`, nothing trained.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; also when the template changes a special token typed in a message, so that it
    /// cannot be kept as text.
    pub fn render_prompt(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        special: &[(String, u32)],
    ) -> Result<Rendered> {
        let marked = self.render_marked(&self.normalise(messages)?, tools, true, special)?;
        Ok(Rendered { text: marked.text, trained: Vec::new(), literal: marked.literal })
    }

    /// Whether the template says what is trained, with `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.source.contains("endgeneration")
    }

    fn set_clock(&mut self, unix_seconds: Option<i64>) {
        self.env.add_function("strftime_now", move |state: &State, format: &str| -> Result<String, Error> {
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
        let mut context: Vec<(&str, Value)> =
            vec![("documents", Value::from(())), ("homeroom_marks", Value::from(marks))];
        context.extend(self.variables.iter().map(|(n, v)| (n.as_str(), v.clone())));
        context.extend([
            ("messages", messages.iter().map(to_value).collect()),
            ("tools", tools.map_or_else(|| Value::from(()), to_value)),
            ("add_generation_prompt", Value::from(prompt)),
        ]);
        let template = self.env.get_template(NAME).map_err(|e| template_error(&e))?;
        let rendered = template.render(Value::from_pairs(context));
        rendered.map_err(|e| template_error(&e))
    }

    /// Renders with marks around what was generated and around special tokens in the messages, and reads them off.
    fn render_marked(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        prompt: bool,
        special: &[(String, u32)],
    ) -> Result<Marked> {
        let mut special: Vec<&str> = special.iter().map(|(s, _)| s.as_str()).collect();
        special.retain(|s| !s.is_empty());
        special.sort_by_key(|s| std::cmp::Reverse(s.len()));
        let mut survey = Survey::default();
        messages.iter().chain(tools).for_each(|v| survey.visit(v, &special));
        survey.note_private(&self.source);
        let marks = Marks::outside(&survey.private)?;

        let plain = marks.read(&self.run(messages, tools, prompt, &marks.generation())?)?;
        let Some(typed) = survey.typed else {
            return Ok(plain);
        };
        // Around the token first; a template that trims or looks at the ends of a message may be disturbed by that,
        // and is then given the mark behind the token's first character.
        for inside in [false, true] {
            let mark = |v: &Json| marks.mark(v, &special, inside, true);
            let messages: Vec<Json> = messages.iter().map(mark).collect();
            let tools = tools.map(mark);
            let Ok(text) = self.run(&messages, tools.as_ref(), prompt, &marks.generation()) else {
                continue;
            };
            let mut marked = marks.read(&text)?;
            if marked.text == plain.text && marked.generated == plain.generated {
                if inside {
                    marked.literal = find_around(&marked.text, &marked.inner, &special);
                }
                return Ok(marked);
            }
        }
        bail!("the chat template changes the special token {typed:?} typed in a message, so it cannot be kept as text")
    }

    /// What the template sees: no null keys, no `weight`, parsed `arguments`, reasoning under its usual names.
    fn normalise(&self, messages: &[Json]) -> Result<Vec<Json>> {
        let mut out = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let fields = message.as_object().with_context(|| format!("message {}: not an object", i + 1))?;
            let reasoning = ["reasoning_content", "thinking", "reasoning"]
                .iter()
                .find_map(|&key| fields.get(key).filter(|v| !v.is_null()));
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
            if let Some(Json::Array(calls)) = clean.get_mut("tool_calls") {
                for call in calls {
                    self.normalise_arguments(call).with_context(|| format!("message {}: tool_calls", i + 1))?;
                }
            }
            out.push(Json::Object(clean));
        }
        Ok(out)
    }

    fn normalise_arguments(&self, call: &mut Json) -> Result<()> {
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

    /// Tries a tool call both ways; a template that renders neither is taken to want an object.
    fn wants_arguments_as_text(&self) -> bool {
        let tries = |arguments: Json| {
            let call = serde_json::json!({"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}});
            let messages = [
                serde_json::json!({"role": "user", "content": "a"}),
                serde_json::json!({"role": "assistant", "content": "", "tool_calls": [call]}),
            ];
            self.run(&messages, None, false, "").is_ok()
        };
        self.source.contains("arguments")
            && !tries(serde_json::json!({"a": "b"}))
            && tries(Json::String("{\"a\": \"b\"}".into()))
    }
}

fn before_turn(i: usize) -> String {
    format!("message {}: the chat template cannot render the prompt that this assistant message answers", i + 1)
}

/// What stands in `a` and in `b` from where they first differ, a few characters of each.
fn parting<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    let same = a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y);
    let at = same.map_or(a.len().min(b.len()), |((at, _), _)| at);
    let cut = |s: &'a str| {
        let rest = &s[at..];
        &rest[..rest.char_indices().nth(24).map_or(rest.len(), |(i, _)| i)]
    };
    (cut(a), cut(b))
}

/// Tokenises a rendered text: ids, and for each whether it is trained.
///
/// The text is encoded once, without added special tokens (templates write their own BOS). A special token inside a
/// literal span is replaced by the tokens of its spelling. A token is trained when it starts inside a trained span:
/// by position, never by id. The first token is never trained, since nothing predicts it.
///
/// # Errors
/// When the tokenizer fails, begins the text with two BOS tokens, or can only spell a special token as itself.
pub fn tokenize(rendered: &Rendered, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    let encoded = tokenizer.encode(&rendered.text, false)?;
    // Sentencepiece puts a space before a text that it begins; behind a line break it does not.
    let line_break = tokenizer.encode_as_text("\n")?;
    let spell = |piece: &str| {
        let ids = tokenizer.encode_as_text(&format!("\n{piece}"))?;
        match ids.strip_prefix(&line_break[..]) {
            Some(ids) => Ok(ids.to_vec()),
            None => tokenizer.encode_as_text(piece),
        }
    };
    let (ids, trained) = lay_out(rendered, &encoded, tokenizer.special_tokens(), spell)?;
    if let (Some(bos), [first, second, ..]) = (tokenizer.bos_id, &ids[..]) {
        ensure!(
            !(*first == bos && *second == bos),
            "the rendered text begins with two BOS tokens; remove one from the chat template"
        );
    }
    Ok((ids, trained))
}

/// The tokenizer-free part of [`tokenize`].
fn lay_out(
    rendered: &Rendered,
    encoded: &Encoded,
    special: &[(String, u32)],
    spell: impl Fn(&str) -> Result<Vec<u32>>,
) -> Result<(Vec<u32>, Vec<bool>)> {
    let starts = token_starts(encoded);
    let mut ids = Vec::with_capacity(encoded.ids.len());
    let mut trained = Vec::with_capacity(encoded.ids.len());
    let (mut span, mut literal) = (rendered.trained.iter().peekable(), rendered.literal.iter().peekable());
    for (t, &id) in encoded.ids.iter().enumerate() {
        while span.next_if(|s| s.end <= starts[t]).is_some() {}
        let learn = span.peek().is_some_and(|s| s.start <= starts[t]);
        let (from, to) = encoded.offsets[t];
        while literal.next_if(|l| l.end <= from).is_some() {}
        let typed = literal.peek().is_some_and(|l| l.start < to) && special.iter().any(|&(_, s)| s == id);
        if typed {
            let piece = rendered
                .text
                .get(from..to)
                .with_context(|| format!("token {id} has offsets {from}..{to} off the text"))?;
            let spelled = spell(piece)?;
            ensure!(
                !spelled.contains(&id),
                "the tokenizer cannot spell {piece:?}, typed in a message, other than as the special token"
            );
            trained.extend(spelled.iter().map(|_| learn));
            ids.extend(spelled);
        } else {
            ids.push(id);
            trained.push(learn);
        }
    }
    if let Some(first) = trained.first_mut() {
        *first = false;
    }
    Ok((ids, trained))
}

/// Where each token's text starts, in bytes: tokenizers may leave white space before a token out of its offsets, but
/// it belongs to the token that follows.
pub(crate) fn token_starts(encoded: &Encoded) -> Vec<usize> {
    let mut covered = 0;
    let start = |&(from, to): &(usize, usize)| {
        let start = from.min(covered);
        covered = covered.max(to);
        start
    };
    encoded.offsets.iter().map(start).collect()
}

/// A rendering whose marks were read off.
struct Marked {
    text: String,
    generated: Vec<Range<usize>>,
    literal: Vec<Range<usize>>,
    /// Where marks stood inside a token, behind its first character.
    inner: Vec<usize>,
}

impl Marked {
    /// Keeps the `{% generation %}` spans of the turns to learn. A span per assistant turn is needed to tell which is
    /// whose; without `weight: 0` all are kept.
    fn trained_by_marks(self, turns: &[usize], learned: &[usize]) -> Result<Rendered> {
        let mut trained = self.generated;
        trained.retain(|span| !span.is_empty());
        if learned.len() < turns.len() {
            ensure!(
                trained.len() == turns.len(),
                "`weight: 0` cannot be honoured: the chat template marks {} generated spans for {} assistant messages",
                trained.len(),
                turns.len()
            );
            let mut turn = turns.iter();
            trained.retain(|_| turn.next().is_some_and(|i| learned.contains(i)));
        }
        ensure!(!trained.is_empty(), "nothing to train on: the chat template marks nothing as generated");
        Ok(Rendered { text: self.text, trained, literal: self.literal })
    }
}

/// What must be known of a row before marks are chosen.
#[derive(Default)]
struct Survey<'a> {
    /// Private-use characters that occur.
    private: BTreeSet<char>,
    /// The first special token that occurs.
    typed: Option<&'a str>,
}

impl<'a> Survey<'a> {
    fn visit(&mut self, value: &Json, special: &[&'a str]) {
        match value {
            Json::String(text) => self.note(text, special),
            Json::Array(items) => items.iter().for_each(|v| self.visit(v, special)),
            Json::Object(fields) => fields.iter().for_each(|(key, v)| {
                self.note(key, special);
                self.visit(v, special);
            }),
            _ => {}
        }
    }

    fn note(&mut self, text: &str, special: &[&'a str]) {
        self.note_private(text);
        if self.typed.is_none() {
            self.typed = special.iter().copied().find(|s| text.contains(s));
        }
    }

    fn note_private(&mut self, text: &str) {
        let private = text.chars().filter(|c| ('\u{e000}'..='\u{f8ff}').contains(c));
        self.private.extend(private);
    }
}

/// Private-use characters that occur neither in the row nor in the template.
struct Marks {
    generation_start: char,
    generation_end: char,
    literal_start: char,
    literal_end: char,
    inside: char,
}

impl Marks {
    fn outside(taken: &BTreeSet<char>) -> Result<Self> {
        let mut free = ('\u{e000}'..='\u{f8ff}').filter(|c| !taken.contains(c));
        let mut next =
            || free.next().context("the messages use every private-use character, none is left to mark with");
        Ok(Self {
            generation_start: next()?,
            generation_end: next()?,
            literal_start: next()?,
            literal_end: next()?,
            inside: next()?,
        })
    }

    fn generation(&self) -> String {
        String::from_iter([self.generation_start, self.generation_end])
    }

    /// Copies `value` with each special token in it marked. The role of a message (`top`) is what templates branch
    /// on; its values are known words.
    fn mark(&self, value: &Json, special: &[&str], inside: bool, top: bool) -> Json {
        match value {
            Json::String(text) => Json::String(self.mark_text(text, special, inside)),
            Json::Array(items) => {
                let items = items.iter().map(|v| self.mark(v, special, inside, false));
                Json::Array(items.collect())
            }
            Json::Object(fields) => {
                let fields = fields.iter().map(|(key, v)| match (top, key.as_str()) {
                    (true, "role") => (key.clone(), v.clone()),
                    _ => (self.mark_text(key, special, inside), self.mark(v, special, inside, false)),
                });
                Json::Object(fields.collect())
            }
            other => other.clone(),
        }
    }

    /// `special` is sorted longest first, so that a token takes precedence over the tokens that it contains.
    fn mark_text(&self, text: &str, special: &[&str], inside: bool) -> String {
        let mut out = String::with_capacity(text.len() + 8);
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let token = special.iter().find(|s| rest.starts_with(**s));
            let len = token.map_or(first.len_utf8(), |s| s.len());
            match token {
                Some(token) if inside => {
                    out.push(first);
                    out.push(self.inside);
                    out.push_str(&token[first.len_utf8()..]);
                }
                Some(token) => {
                    out.push(self.literal_start);
                    out.push_str(token);
                    out.push(self.literal_end);
                }
                None => out.push(first),
            }
            rest = &rest[len..];
        }
        out
    }

    /// Takes the marks out of a rendering and remembers where they stood.
    fn read(&self, rendered: &str) -> Result<Marked> {
        let mut marked = Marked {
            text: String::with_capacity(rendered.len()),
            generated: Vec::new(),
            literal: Vec::new(),
            inner: Vec::new(),
        };
        let (mut generation, mut literal) = (None, None);
        for c in rendered.chars() {
            let at = marked.text.len();
            if c == self.generation_start && generation.is_none() {
                generation = Some(at);
            } else if c == self.generation_end && generation.is_some() {
                marked.generated.extend(generation.take().map(|start| start..at));
            } else if c == self.generation_start || c == self.generation_end {
                bail!("the chat template nests or takes apart its {{% generation %}} blocks");
            } else if c == self.literal_start {
                literal = Some(at);
            } else if c == self.literal_end {
                // A template that splits a message may part the marks; a lone one marks nothing.
                marked.literal.extend(literal.take().map(|start| start..at));
            } else if c == self.inside {
                marked.inner.push(at);
            } else {
                marked.text.push(c);
            }
        }
        ensure!(generation.is_none(), "the chat template does not close a {{% generation %}} block");
        Ok(marked)
    }
}

/// The special tokens of `text` whose first character ends at one of `inner`.
fn find_around(text: &str, inner: &[usize], special: &[&str]) -> Vec<Range<usize>> {
    let around = |&at: &usize| {
        let start = text[..at].char_indices().next_back()?.0;
        let token = special.iter().find(|s| text[start..].starts_with(**s))?;
        Some(start..start + token.len())
    };
    inner.iter().filter_map(around).collect()
}

/// Rewrites `{% generation %}` and `{% endgeneration %}` as [`GENERATION`] and [`END_GENERATION`], leaving
/// the outer delimiters and their white-space control as they are.
fn rewrite_generation_tags(source: &str) -> String {
    if !source.contains("endgeneration") {
        return source.into();
    }
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => 2 + expression_len(&tag[2..], "}}"),
            Some(b'%') => 2 + expression_len(&tag[2..], "%}"),
            _ => 1,
        };
        out.push_str(&rest[..at]);
        let (tag, after) = tag.split_at(len);
        rest = after;
        let word = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match word {
            "generation" if tag.starts_with("{%") => out.push_str(&tag.replacen(word, GENERATION, 1)),
            "endgeneration" if tag.starts_with("{%") => out.push_str(&tag.replacen(word, END_GENERATION, 1)),
            "raw" if tag.starts_with("{%") => {
                let raw = raw_len(rest);
                out.push_str(tag);
                out.push_str(&rest[..raw]);
                rest = &rest[raw..];
            }
            _ => out.push_str(tag),
        }
    }
    out.push_str(rest);
    out
}

/// The length of `text` up to and including `close`, which does not count inside a string, nor (for an expression)
/// inside braces.
fn expression_len(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            _ if depth == 0 && text.as_bytes()[at..].starts_with(close.as_bytes()) => {
                return at + close.len();
            }
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    text.len()
}

/// The length of what a `{% raw %}` holds: up to the tag that ends it, which is left to be read as a tag.
fn raw_len(text: &str) -> usize {
    let is_end = |at: &usize| {
        let inner = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        inner.starts_with("endraw")
    };
    let end = text.match_indices("{%").map(|(at, _)| at).find(is_end);
    end.unwrap_or(text.len())
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
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
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
    match (deepest.kind(), deepest.detail()) {
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
