//! The tokenizer of a Hugging Face model directory.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::processors::PostProcessorWrapper;

use super::assemble::{Named, add_bos_and_eos, adds, assemble};
use super::library::{guarded, try_out};
use super::templates::{DEFAULT, TEMPLATES_DIR, listed_templates, read_named_templates};
use super::{SMALL_BYTES_MAX, Tokenizer, check};
use crate::files::{parse_object, read_bytes, read_if_there};

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face model directory.
    ///
    /// `tokenizer.json` is required. Names of special tokens come from `tokenizer_config.json`,
    /// then `special_tokens_map.json`; ids that end a generation also from
    /// `generation_config.json`, or `config.json` where that has none; templates from
    /// `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, then from
    /// `tokenizer_config.json`, then from `chat_template.json`, where models with a processor had theirs. As in transformers, named special
    /// tokens become special in the text, and `add_bos_token` and `add_eos_token` win over the
    /// post-processor.
    ///
    /// Truncation, padding and trimmed offsets of `tokenizer.json` are switched off.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the files disagree about an id. Names the file.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() && dir.join("tokenizer.model").exists() {
            bail!(
                "{}: has only tokenizer.model, tokenizer.json is needed; make it once with \
                 transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
                dir.display()
            );
        }
        let bytes = read_bytes(&path, TOKENIZER_BYTES_MAX)?;
        let inner = read_tokenizer_json(&bytes).with_context(|| path.display().to_string())?;
        let files = Files {
            config: read_json(&dir.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&dir.join("special_tokens_map.json"))?,
            generation_config: read_json(&dir.join("generation_config.json"))?,
            model_config: read_json(&dir.join("config.json"))?,
            processor: read_json(&dir.join("chat_template.json"))?,
            chat_template: read_if_there(&dir.join("chat_template.jinja"), SMALL_BYTES_MAX)?,
            named_templates: read_named_templates(&dir.join(TEMPLATES_DIR))?,
        };
        from_files(inner, &files).with_context(|| dir.display().to_string())
    }
}

/// The small files around `tokenizer.json`; `Null` for those that are not there.
#[derive(Default)]
pub(super) struct Files {
    pub(super) config: Value,
    pub(super) special_tokens_map: Value,
    pub(super) generation_config: Value,
    pub(super) model_config: Value,
    /// `chat_template.json`.
    pub(super) processor: Value,
    pub(super) chat_template: Option<String>,
    pub(super) named_templates: BTreeMap<String, String>,
}

impl Files {
    /// The chat template, and those with names.
    pub(super) fn templates(&self) -> Result<(Option<String>, BTreeMap<String, String>)> {
        let mut named = self.named_templates.clone();
        // As in transformers, a file of this name comes before `chat_template.jinja`.
        let default = named.remove(DEFAULT).or_else(|| self.chat_template.clone());
        Ok(match (default, named.is_empty()) {
            // As in transformers, files come in the place of all that `tokenizer_config.json` has.
            (Some(template), _) => (Some(template), named),
            (None, false) => (listed_templates(&self.config["chat_template"])?.0, named),
            (None, true) => match listed_templates(&self.config["chat_template"])? {
                (None, _) => listed_templates(&self.processor["chat_template"])?,
                found => found,
            },
        })
    }
}

/// Largest `tokenizer.json`, in bytes. Published ones have 35 MB at most.
pub(super) const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

pub(super) fn read_json(path: &Path) -> Result<Value> {
    let Some(text) = read_if_there(path, SMALL_BYTES_MAX)? else {
        return Ok(Value::Null);
    };
    parse_object(path, &text)
}

pub(super) fn read_tokenizer_json(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let parts = check::Parts::read(bytes)?;
    let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))?;
    // Before the first text: padding to a length makes room for it.
    inner.with_padding(None);
    guarded(|| inner.with_truncation(None).map(|_| ()))?;
    if let Some(mut post) = inner.get_post_processor().cloned() {
        keep_offsets(&mut post);
        inner.with_post_processor(Some(post));
    }
    for check::Added { id, content, .. } in parts.added_tokens {
        // The library only logs an added token whose id it cannot give.
        let got = inner.token_to_id(&content);
        ensure!(got == Some(id), "added token {content:?} has id {id}, but the vocabulary makes it {got:?}");
    }
    try_out(&inner)?;
    Ok(inner)
}

/// Switches off the trimming of spaces from offsets; ids do not depend on it.
fn keep_offsets(post: &mut PostProcessorWrapper) {
    match post {
        PostProcessorWrapper::ByteLevel(post) => post.trim_offsets = false,
        PostProcessorWrapper::Roberta(post) => post.trim_offsets = false,
        PostProcessorWrapper::Sequence(posts) => posts.as_mut().iter_mut().for_each(keep_offsets),
        PostProcessorWrapper::Bert(_) | PostProcessorWrapper::Template(_) => {}
    }
}

pub(super) fn from_files(mut inner: tokenizers::Tokenizer, files: &Files) -> Result<Tokenizer> {
    // A token is a string or an object with `content`.
    let content = |value: &Value| {
        let text = value.as_str().or_else(|| value["content"].as_str());
        text.map(str::to_owned)
    };
    let named = |key: &str| content(&files.config[key]).or_else(|| content(&files.special_tokens_map[key]));
    let known = |token: &String| inner.token_to_id(token).is_some();
    let bos = named("bos_token");
    let eos = named("eos_token");
    // A vocabulary may lack these two, and nothing is lost: rows are packed, and bytes are spelled.
    let pad = named("pad_token").filter(known);
    let unk = named("unk_token").filter(known);

    if let Some(listed) = files.config["added_tokens_decoder"].as_object() {
        for (id, token) in listed {
            let Some(token) = content(token) else {
                continue;
            };
            let got = inner.token_to_id(&token);
            ensure!(
                got.map(|id| id.to_string()).as_ref() == Some(id),
                "token {token:?} has id {id} in tokenizer_config.json and {got:?} in tokenizer.json"
            );
        }
    }

    let mut specials: Vec<String> = [&bos, &eos, &pad, &unk].into_iter().flatten().cloned().collect();
    for source in [&files.config, &files.special_tokens_map] {
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            match &source[key] {
                Value::Array(tokens) => specials.extend(tokens.iter().filter_map(content)),
                Value::Object(tokens) => specials.extend(tokens.values().filter_map(content)),
                _ => {}
            }
        }
    }
    let mut added: Vec<AddedToken> = Vec::new();
    for token in specials {
        // One that is missing is refused by `finish` if it matters, and must not get a new id here.
        let Some(id) = inner.token_to_id(&token) else {
            continue;
        };
        let as_listed = inner.get_added_tokens_decoder().get(&id).cloned();
        let token = as_listed.unwrap_or_else(|| AddedToken::from(token, true).normalized(false));
        if !added.contains(&token) {
            added.push(token.special(true));
        }
    }
    inner.add_special_tokens(added).map_err(|e| anyhow!(e))?;

    let bos_id = bos.as_ref().and_then(|token| inner.token_to_id(token));
    let eos_id = eos.as_ref().and_then(|token| inner.token_to_id(token));
    let asked = |key: &str| files.config[key].as_bool();
    let (add_bos, add_eos) = (asked("add_bos_token"), asked("add_eos_token"));
    let (begins, ends) = adds(&inner, bos_id, eos_id)?;
    if add_bos.is_some_and(|add| add != begins && bos_id.is_some())
        || add_eos.is_some_and(|add| add != ends && eos_id.is_some())
    {
        let wanted = |asked: Option<bool>, does: bool| asked.unwrap_or(does);
        let bos = bos.as_deref().zip(bos_id).filter(|_| wanted(add_bos, begins));
        let eos = eos.as_deref().zip(eos_id).filter(|_| wanted(add_eos, ends));
        inner.with_post_processor(Some(add_bos_and_eos(bos, eos)?));
    }

    let mut more_eos_ids =
        ids(&files.generation_config["eos_token_id"]).context("generation_config.json: eos_token_id")?;
    if more_eos_ids.is_empty() {
        more_eos_ids = ids(&files.model_config["eos_token_id"]).context("config.json: eos_token_id")?;
    }
    let (chat_template, named_templates) = files.templates()?;
    let named = Named {
        bos,
        eos,
        pad,
        unk,
        more_eos_ids,
        chat_template,
        named_templates,
        // transformers writes 10^30 for "not known".
        model_max_length: files.config["model_max_length"].as_u64().filter(|&n| n < 1 << 40),
        adds_asked: [add_bos, add_eos],
        notes: Vec::new(),
    };
    assemble(inner, named)
}

/// An id, a list of ids, or none.
fn ids(value: &Value) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.with_context(|| format!("{value} is not a token id"))
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => Ok(vec![id(value)?]),
    }
}
