//! Marks: private-use characters around what is looked for in a rendering, which are read off it again.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use super::Rendered;
use crate::text::tokenizer::Control;

/// A rendering whose marks were read off.
pub(super) struct Marked {
    pub(super) text: String,
    pub(super) generated: Vec<Range<usize>>,
    pub(super) literal: Vec<Range<usize>>,
    /// Where marks stood inside a token, behind its first character.
    pub(super) inner: Vec<usize>,
    /// Where characters were typed that [`Marks::stand_in`] stood in for, and whether by an assistant.
    pub(super) typed: Vec<(usize, bool)>,
}

impl Marked {
    /// Keeps the `{% generation %}` spans of the turns to learn. A span per assistant turn is needed to tell which is
    /// whose; without `weight: 0` all are kept.
    pub(super) fn trained_by_marks(self, turns: &[usize], learned: &[usize]) -> Result<Rendered> {
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
pub(super) struct Survey<'a> {
    /// Private-use characters that occur.
    pub(super) private: BTreeSet<char>,
    /// The first special token that occurs.
    pub(super) typed: Option<&'a str>,
    /// Of the characters that make up special tokens, those that occur.
    pub(super) keys: BTreeSet<char>,
    /// The characters that make up special tokens.
    pub(super) sought: BTreeSet<char>,
}

/// The characters of a token that ordinary texts seldom have, or none. Who types it, in whatever pieces, types these.
pub(super) fn keys_of(token: &str) -> impl Iterator<Item = char> + '_ {
    token.chars().filter(|c| !c.is_alphanumeric() && !c.is_whitespace() && !matches!(c, '_' | '-' | '/' | '.' | ','))
}

impl<'a> Survey<'a> {
    pub(super) fn visit(&mut self, value: &Json, special: &[&'a str]) {
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
        for c in text.chars().filter(|c| !c.is_alphanumeric() && *c != ' ') {
            if ('\u{e000}'..='\u{f8ff}').contains(&c) {
                self.private.insert(c);
            } else if self.sought.contains(&c) {
                self.keys.insert(c);
            }
        }
        if self.typed.is_none() {
            self.typed = special.iter().copied().find(|s| text.contains(s));
        }
    }

    pub(super) fn note_private(&mut self, text: &str) {
        let private = text.chars().filter(|c| ('\u{e000}'..='\u{f8ff}').contains(c));
        self.private.extend(private);
    }
}

/// Private-use characters that occur neither in the row nor in the template.
pub(super) struct Marks {
    generation_start: char,
    generation_end: char,
    literal_start: char,
    literal_end: char,
    inside: char,
    /// Characters, what stands in for each, and whether an assistant typed it.
    stand_ins: Vec<(char, char, bool)>,
}

impl Marks {
    /// `keys`: see [`Marks::stand_in`].
    pub(super) fn outside(taken: &BTreeSet<char>, keys: &BTreeSet<char>) -> Result<Self> {
        let mut free = ('\u{e000}'..='\u{f8ff}').filter(|c| !taken.contains(c));
        let mut next =
            || free.next().context("the messages use every private-use character, none is left to mark with");
        Ok(Self {
            generation_start: next()?,
            generation_end: next()?,
            literal_start: next()?,
            literal_end: next()?,
            inside: next()?,
            stand_ins: (keys.iter().flat_map(|key| [(*key, false), (*key, true)]))
                .map(|(key, assistant)| Ok((key, next()?, assistant)))
                .collect::<Result<_>>()?,
        })
    }

    /// One of them, as a text.
    pub(super) fn one(&self) -> String {
        self.literal_start.into()
    }

    pub(super) fn generation(&self) -> String {
        String::from_iter([self.generation_start, self.generation_end])
    }

    /// Copies `value` with each special token in it marked. The role of a message (`top`) is what templates branch
    /// on; its values are known words.
    pub(super) fn mark(&self, value: &Json, special: &[&str], inside: bool, top: bool) -> Json {
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

    /// Copies `value` with a character that means nothing in place of each that control tokens are made of, so that
    /// what is typed is known in a rendering however it was taken apart and put together. `keep`: texts that the template
    /// may look for.
    pub(super) fn stand_in(&self, value: &Json, keep: &[&str], assistant: bool, top: bool) -> Json {
        match value {
            Json::String(text) => Json::String(self.stand_in_text(text, keep, assistant)),
            Json::Array(items) => {
                let items = items.iter().map(|v| self.stand_in(v, keep, assistant, false));
                Json::Array(items.collect())
            }
            Json::Object(fields) => {
                let fields = fields.iter().map(|(key, v)| match (top, key.as_str()) {
                    (true, "role") => (key.clone(), v.clone()),
                    _ => (self.stand_in_text(key, keep, assistant), self.stand_in(v, keep, assistant, false)),
                });
                Json::Object(fields.collect())
            }
            other => other.clone(),
        }
    }

    fn stand_in_text(&self, text: &str, keep: &[&str], assistant: bool) -> String {
        let mut out = String::with_capacity(text.len() + 8);
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let of = self.stand_ins.iter().find(|(key, _, by)| *key == c && *by == assistant);
            // What a template looks for begins with such a character, or the look is not disturbed that much.
            let kept = of.and_then(|_| keep.iter().find(|keep| rest.starts_with(**keep)));
            let len = kept.map_or(c.len_utf8(), |kept| kept.len());
            match (kept, of) {
                (Some(kept), _) => out.push_str(kept),
                (None, Some((_, stand_in, _))) => out.push(*stand_in),
                (None, None) => out.push(c),
            }
            rest = &rest[len..];
        }
        out
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
    pub(super) fn read(&self, rendered: &str) -> Result<Marked> {
        let mut marked = Marked {
            text: String::with_capacity(rendered.len()),
            generated: Vec::new(),
            literal: Vec::new(),
            inner: Vec::new(),
            typed: Vec::new(),
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
                let private = ('\u{e000}'..='\u{f8ff}').contains(&c);
                let of = private.then(|| self.stand_ins.iter().find(|(_, stand_in, _)| *stand_in == c)).flatten();
                marked.typed.extend(of.map(|(_, _, assistant)| (at, *assistant)));
                marked.text.push(of.map_or(c, |(key, _, _)| *key));
            }
        }
        ensure!(generation.is_none(), "the chat template does not close a {{% generation %}} block");
        Ok(marked)
    }
}

/// The special tokens of `text` whose first character ends at one of `inner`.
pub(super) fn find_around(text: &str, inner: &[usize], special: &[&str]) -> Vec<Range<usize>> {
    let around = |&at: &usize| {
        let start = text[..at].char_indices().next_back()?.0;
        let token = special.iter().find(|s| text[start..].starts_with(**s))?;
        Some(start..start + token.len())
    };
    inner.iter().filter_map(around).collect()
}

/// Where `text` has control tokens, the longest at each place, and which of `control` each is.
pub(super) fn occurrences(text: &str, control: &[&Control]) -> Vec<(Range<usize>, usize)> {
    let firsts: BTreeSet<char> = control.iter().filter_map(|c| c.text.chars().next()).collect();
    let (mut found, mut from) = (Vec::new(), 0);
    for (at, first) in text.char_indices() {
        if at < from || !firsts.contains(&first) {
            continue;
        }
        let here = (0..control.len()).filter(|i| text[at..].starts_with(&control[*i].text));
        if let Some(i) = here.max_by_key(|i| control[*i].text.len()) {
            from = at + control[i].text.len();
            found.push((at..from, i));
        }
    }
    found
}

/// The control tokens of a rendering that are typed, if only in part. An assistant may write those that are not special.
pub(super) fn find_typed(text: &str, typed: &[(usize, bool)], control: &[&Control]) -> Vec<Range<usize>> {
    let is_typed = |(span, i): &(Range<usize>, usize)| {
        let from = typed.partition_point(|(at, _)| *at < span.start);
        let within = typed[from..].iter().take_while(|(at, _)| *at < span.end);
        within.into_iter().any(|(_, assistant)| control[*i].special || !assistant)
    };
    occurrences(text, control).into_iter().filter(is_typed).map(|(span, _)| span).collect()
}

/// How often a rendering has each of `control` outside of `literal`.
pub(super) fn count_obeyed(text: &str, literal: &[Range<usize>], control: &[&Control]) -> Vec<usize> {
    let mut counts = vec![0; control.len()];
    for (span, i) in occurrences(text, control) {
        let at = literal.partition_point(|l| l.end <= span.start);
        if literal.get(at).is_none_or(|l| l.start >= span.end) {
            counts[i] += 1;
        }
    }
    counts
}
