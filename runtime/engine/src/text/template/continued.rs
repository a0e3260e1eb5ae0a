//! A conversation whose last message the model goes on with.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::Value as Json;

use super::marks::{Marks, Survey};
use super::message::content;
use super::rendered::Rendered;
use super::{ChatTemplate, Given};
use crate::text::control::Control;

impl ChatTemplate {
    /// Renders a conversation up to the end of what its last message says, as `apply_chat_template(continue_final_message=True)` does:
    /// the model writes on there. White space at that end is left out where the template trims it. Nothing is trained.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_prompt`]; also when the last message has no content, or the template does not write all of it.
    pub fn render_continued<'a>(
        &self,
        messages: &[Json],
        given: impl Into<Given<'a>>,
        control: &[Control],
    ) -> Result<Rendered> {
        let given = given.into();
        let template = self.of(given);
        let mut messages = template.reads.prepare(messages)?;
        let mut survey = Survey::default();
        messages.iter().chain(given.values()).for_each(|value| survey.visit(value, &[]));
        survey.note_private(&template.source);
        let mark = Marks::outside(&survey.private, &BTreeSet::new())?.one();

        let last = messages.last_mut().context("nothing to go on with: there are no messages")?;
        let said = content(last).context("nothing to go on with: the last message has no content")?.into_owned();
        let end = match &mut last["content"] {
            Json::Array(parts) => parts.last_mut().map(|part| &mut part["text"]),
            text => Some(text),
        };
        let end = end.context("nothing to go on with: the last message has no parts")?;
        // The space shows whether the template trims.
        *end = format!("{}{mark} ", end.as_str().unwrap_or_default()).into();

        let marked = template.render_marked(&messages, given, false, control)?;
        let parted = marked.text.rsplit_once(&mark);
        let text = parted.map(|(text, behind)| if behind.starts_with(' ') { text } else { text.trim_end() });
        let text = text.filter(|text| text.contains(said.trim()));
        let text =
            text.context("the chat template does not write all of the last message, so nothing can go on with it")?;
        let mut literal = marked.literal;
        literal.retain(|span| span.end <= text.len());
        Ok(Rendered { text: text.to_owned(), trained: Vec::new(), literal })
    }
}
