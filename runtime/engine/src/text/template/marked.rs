//! Renders with marks around what is trained and around control tokens that are typed, and reads the marks off.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde_json::Value as Json;

use super::marks::{Marked, Marks, Survey, count_obeyed, find_around, find_typed, keys_of};
use super::{ChatTemplate, Given, bounds};
use crate::text::control::Control;

impl ChatTemplate {
    /// Renders with marks around what was generated and around special tokens in the messages, and reads them off.
    pub(super) fn render_marked(
        &self,
        messages: &[Json],
        given: Given<'_>,
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
        given.values().for_each(|v| survey.visit(v, &all));
        survey.note_private(&self.source);
        let marks = Marks::outside(&survey.private, &survey.keys)?;

        let plain = marks.read(&self.run(messages, given, prompt, &marks.generation())?)?;
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
            let given = given.each(|v| marks.stand_in(v, &keep, false, false));
            match self.run(&messages, given.as_given(), prompt, &marks.generation()) {
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
            Some(typed) => self.mark_whole(&marks, &plain, messages, given, prompt, (&all, &special), typed)?,
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
        given: Given<'_>,
        prompt: bool,
        (all, special): (&[&str], &[&str]),
        typed: &str,
    ) -> Result<Marked> {
        let of = |message: &Json| if message["role"] == "assistant" { special } else { all };
        // Around the token first; a template that trims or looks at the ends of a message may be disturbed by that,
        // and is then given the mark behind the token's first character.
        for inside in [false, true] {
            let messages: Vec<Json> = messages.iter().map(|v| marks.mark(v, of(v), inside, true)).collect();
            let given = given.each(|v| marks.mark(v, all, inside, true));
            let text = match self.run(&messages, given.as_given(), prompt, &marks.generation()) {
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
