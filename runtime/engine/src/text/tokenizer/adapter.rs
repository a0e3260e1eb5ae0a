//! The tokenizer and chat template that lie in an adapter's directory, as trainers save them: what it was trained with.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::assemble::{Named, assemble};
use super::directory::{Files, TOKENIZER_BYTES_MAX, from_files, read_json, read_tokenizer_json};
use super::templates::{TEMPLATES_DIR, read_named_templates};
use super::{SMALL_BYTES_MAX, Tokenizer};
use crate::files::{read_bytes, read_if_there};

impl Tokenizer {
    /// The tokenizer of an adapter on a base: what its directory has in place of the base's, and `base` in what it does not have. Ids
    /// that end a generation of the base do so here, too. `None`: nothing there differs from the base's.
    ///
    /// # Errors
    /// When a file is malformed, or the files disagree about an id. Names the file.
    pub fn of_adapter(dir: &Path, base: &Self) -> Result<Option<Self>> {
        let place = || dir.display().to_string();
        let mut files = Files {
            config: read_json(&dir.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&dir.join("special_tokens_map.json"))?,
            generation_config: json!({"eos_token_id": base.eos_ids}),
            model_config: Value::Null,
            processor: Value::Null,
            chat_template: read_if_there(&dir.join("chat_template.jinja"), SMALL_BYTES_MAX)?,
            named_templates: read_named_templates(&dir.join(TEMPLATES_DIR))?,
        };
        let path = dir.join("tokenizer.json");
        let tokenizer = match files.templates().with_context(place)? {
            (None, _) if !path.exists() => return Ok(None),
            (Some(template), named) if !path.exists() => base.with_templates(template, named)?,
            (template, _) => {
                if template.is_none() {
                    files.chat_template = base.chat_template.clone();
                    files.named_templates = base.named_templates.clone();
                }
                let inner = read_tokenizer_json(&read_bytes(&path, TOKENIZER_BYTES_MAX)?);
                let inner = inner.with_context(|| path.display().to_string())?;
                files.inherit(base, &inner);
                from_files(inner, &files).with_context(place)?
            }
        };
        Ok((!tokenizer.equals(base)).then_some(tokenizer))
    }

    /// The same tokens with other templates, which may make other ones control.
    fn with_templates(&self, template: String, named_templates: BTreeMap<String, String>) -> Result<Self> {
        let named = Named {
            bos: self.bos_token.clone(),
            eos: self.eos_token.clone(),
            pad: self.pad_token.clone(),
            unk: self.unk_token.clone(),
            more_eos_ids: self.eos_ids.clone(),
            chat_template: Some(template),
            named_templates,
            model_max_length: self.model_max_length,
            adds_asked: self.adds_asked,
            notes: Vec::new(),
        };
        assemble(self.inner.clone(), named)
    }

    /// Whether two make the same ids of the same conversations, and end alike.
    fn equals(&self, other: &Self) -> bool {
        let ends = |tokenizer: &Self| (tokenizer.bos_id, tokenizer.eos_ids.first().copied(), tokenizer.add_bos);
        ends(self) == ends(other)
            && self.template_digest() == other.template_digest()
            && self.digest() == other.digest()
    }

    /// Tokens that a base with so many embeddings has none for, `base` not knowing them either: those that were added for the adapter.
    /// The one that fills batches is never read.
    pub fn added_beyond(&self, embeddings: usize, base: &Self) -> Vec<String> {
        let ids = embeddings as u32..self.n_ids as u32;
        let added = ids.filter(|id| Some(*id) != self.pad_id && self.token(*id) != base.token(*id));
        added.filter_map(|id| self.token(id)).collect()
    }
}

impl Files {
    /// Has what they do not say of the tokenizer as the base has it: its special tokens, as far as `inner` knows them, and the longest
    /// text. A `tokenizer_config.json` that is not there does not say what is put around a text either; of one that is there, the
    /// post-processor of the `tokenizer.json` beside it does.
    fn inherit(&mut self, base: &Tokenizer, inner: &tokenizers::Tokenizer) {
        let mut asked = [None; 2];
        if self.config.is_null() {
            self.config = json!({});
            asked = base.adds_asked;
        }
        let Some(config) = self.config.as_object_mut() else { return };
        let known = |token: &&String| inner.token_to_id(token).is_some();
        let token = |token: &Option<String>| token.as_ref().filter(known).map(|token| json!(token));
        let special = base.control.iter().filter(|c| c.special && inner.token_to_id(&c.text) == Some(c.id));
        let special: Vec<&str> = special.map(|c| c.text.as_str()).collect();
        let of_base = [
            ("bos_token", token(&base.bos_token)),
            ("eos_token", token(&base.eos_token)),
            ("pad_token", token(&base.pad_token)),
            ("unk_token", token(&base.unk_token)),
            ("additional_special_tokens", Some(json!(special))),
            ("model_max_length", base.model_max_length.map(Value::from)),
            ("add_bos_token", asked[0].map(Value::from)),
            ("add_eos_token", asked[1].map(Value::from)),
        ];
        for (key, value) in of_base {
            // What says `null` says that there is none.
            let said = config.contains_key(key) || self.special_tokens_map.get(key).is_some();
            if let Some(value) = value.filter(|_| !said) {
                config.insert(key.to_owned(), value);
            }
        }
    }
}
