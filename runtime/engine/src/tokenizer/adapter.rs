//! The tokenizer and chat template that lie in an adapter's directory, as trainers save them: what it was trained with.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Files, Named, TOKENIZER_BYTES_MAX, Tokenizer};
use super::{default_template, finish, from_files, read_if_there, read_json, read_tokenizer_json};
use crate::files::read_bytes;

impl Tokenizer {
    /// The tokenizer of an adapter on a base: what its directory has in place of the base's, and `base` in what it does not have. Ids
    /// that end a generation of the base do so here, too. `None`: nothing there differs from the base's.
    ///
    /// # Errors
    /// When a file is malformed, or the files disagree about an id. Names the file.
    pub fn of_adapter(dir: &Path, base: &Self) -> Result<Option<Self>> {
        let path = dir.join("tokenizer.json");
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let own = read_if_there(&dir.join("chat_template.jinja"))?;
        let tokenizer = if path.exists() {
            let place = || path.display().to_string();
            let inner = read_tokenizer_json(&read_bytes(&path, TOKENIZER_BYTES_MAX)?);
            let files = Files {
                chat_template: match (&own, &config["chat_template"]) {
                    (None, Value::Null) => base.chat_template.clone(),
                    _ => own,
                },
                config,
                special_tokens_map: read_json(&dir.join("special_tokens_map.json"))?,
                generation_config: json!({"eos_token_id": base.eos_ids}),
                model_config: Value::Null,
            };
            from_files(inner.with_context(place)?, &files).with_context(|| dir.display().to_string())?
        } else {
            let template = match own {
                Some(own) => Some(own),
                None => default_template(&config["chat_template"]).with_context(|| dir.display().to_string())?,
            };
            let Some(template) = template else { return Ok(None) };
            base.with_template(template)?
        };
        Ok((!tokenizer.equals(base)).then_some(tokenizer))
    }

    /// The same tokens with another template, which may make other ones control.
    fn with_template(&self, template: String) -> Result<Self> {
        let named = Named {
            bos: self.bos_token.clone(),
            eos: self.eos_token.clone(),
            pad: self.pad_token.clone(),
            unk: self.unk_token.clone(),
            more_eos_ids: self.eos_ids.clone(),
            chat_template: Some(template),
            model_max_length: self.model_max_length,
            notes: Vec::new(),
        };
        finish(self.inner.clone(), named)
    }

    /// Whether two make the same ids of the same conversations, and end alike.
    fn equals(&self, other: &Self) -> bool {
        let ends = |tokenizer: &Self| (tokenizer.bos_id, tokenizer.eos_ids.first().copied(), tokenizer.add_bos);
        ends(self) == ends(other) && self.chat_template == other.chat_template && self.digest() == other.digest()
    }

    /// Tokens that a base with so many embeddings has none for, `base` not knowing them either: those that were added for the adapter.
    /// The one that fills batches is never read.
    pub fn added_beyond(&self, embeddings: usize, base: &Self) -> Vec<String> {
        let ids = embeddings as u32..self.n_ids as u32;
        let added = ids.filter(|id| Some(*id) != self.pad_id && self.token(*id) != base.token(*id));
        added.filter_map(|id| self.token(id)).collect()
    }
}
