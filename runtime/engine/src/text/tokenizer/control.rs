//! Which tokens of a tokenizer are control, and what of a text becomes one.

use std::borrow::Cow;

use anyhow::{Context, Result};
use serde_json::Value;
use tokenizers::AddedToken;

use super::Tokenizer;
use crate::text::control::Control;
use crate::text::template::Given;

/// Whether an added token that is not special is control: the template writes it, or it ends a text, and it is no word
/// or white space, which anybody types.
pub(super) fn is_control(token: &AddedToken, id: u32, named: &[u32], written: &str) -> bool {
    let marks = token.content.contains(|c: char| !c.is_alphanumeric() && !c.is_whitespace());
    token.special || (marks && (named.contains(&id) || written.contains(&token.content)))
}

impl Tokenizer {
    /// Control tokens by id, which a user's text must not smuggle in; see [`Tokenizer::encode_as_text`].
    pub fn control_tokens(&self) -> &[Control] {
        &self.control
    }

    /// The control tokens that stand for a character without a piece; nobody types these.
    pub(crate) fn unknown_ids(&self) -> &[u32] {
        &self.unknown_ids
    }

    /// The control tokens, and what else in these messages a normalizer makes one of: `<|IM_END|>` where it lowers
    /// case, full-width brackets where it decomposes them.
    ///
    /// # Errors
    /// When the tokenizer cannot encode a text of theirs.
    pub fn control_in<'a>(&self, messages: &[Value], given: impl Into<Given<'a>>) -> Result<Cow<'_, [Control]>> {
        if self.control_as_typed {
            return Ok(Cow::Borrowed(&self.control));
        }
        let mut control = self.control.clone();
        for value in messages.iter().chain(given.into().values()) {
            self.note_spellings(value, &mut control)?;
        }
        Ok(Cow::Owned(control))
    }

    fn note_spellings(&self, value: &Value, control: &mut Vec<Control>) -> Result<()> {
        let mut note = |text: &str| -> Result<()> {
            let encoded = self.encode(text, false)?;
            for (id, (from, to)) in encoded.ids.into_iter().zip(encoded.offsets) {
                let Ok(at) = self.control.binary_search_by_key(&id, |c| c.id) else {
                    continue;
                };
                let typed = text.get(from..to);
                let typed = typed.with_context(|| format!("token {id} has offsets {from}..{to} off the text"))?;
                if !typed.is_empty() && !control.iter().any(|c| c.text == typed) {
                    control.push(Control { text: typed.to_owned(), ..self.control[at].clone() });
                }
            }
            Ok(())
        };
        match value {
            Value::String(text) => note(text),
            Value::Array(items) => items.iter().try_for_each(|item| self.note_spellings(item, control)),
            Value::Object(fields) => {
                fields.keys().try_for_each(|key| note(key))?;
                fields.values().try_for_each(|item| self.note_spellings(item, control))
            }
            _ => Ok(()),
        }
    }

    /// A copy that looks for no control token.
    pub(super) fn without_control(&self) -> tokenizers::Tokenizer {
        let mut as_text = self.inner.clone();
        let added = as_text.get_added_tokens_decoder();
        let hidden = self.control.iter().filter(|c| !c.special).filter_map(|c| added.get(&c.id).cloned());
        let hidden: Vec<AddedToken> = hidden.map(|token| token.special(true)).collect();
        // Only special ones can be left out of a search.
        as_text.add_special_tokens(hidden).expect("the tokens were added before");
        as_text.set_encode_special_tokens(true);
        as_text
    }
}
