//! A tokenizer as the files that transformers loads, and their digests.

use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Tokenizer;

impl Tokenizer {
    /// A `tokenizer.json` that transformers loads.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|e| anyhow!(e))
    }

    /// The `tokenizer_config.json` to go with [`Tokenizer::to_json`].
    pub fn config_json(&self) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
        });
        let strings = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
            ("unk_token", &self.unk_token),
        ];
        // Absent and null differ: transformers gives an absent bos_token a default.
        for (key, value) in strings {
            config[key] = json!(value);
        }
        let named = |(name, template): (&String, &String)| json!({"name": name, "template": template});
        config["chat_template"] = match (&self.chat_template, self.named_templates.is_empty()) {
            (Some(template), false) => {
                let default = json!({"name": "default", "template": template});
                [default].into_iter().chain(self.named_templates.iter().map(named)).collect()
            }
            (template, _) => json!(template),
        };
        if let Some(length) = self.model_max_length {
            config["model_max_length"] = json!(length);
        }
        config
    }

    /// `sha256:…` of [`Tokenizer::to_json`]: equal digests give equal ids.
    pub fn digest(&self) -> String {
        sha256(&self.to_json().expect("every part was read from JSON, or is of a kind that can be"))
    }

    /// `sha256:…` of the chat template, and of those with names if there are any.
    pub fn template_digest(&self) -> Option<String> {
        let mut text = self.chat_template.clone()?;
        for (name, template) in &self.named_templates {
            text.extend(["\0", name, "\0", template]);
        }
        Some(sha256(&text))
    }
}

pub(super) fn sha256(text: &str) -> String {
    let mut digest = "sha256:".to_owned();
    for byte in Sha256::digest(text.as_bytes()) {
        digest.push_str(&format!("{byte:02x}"));
    }
    digest
}
