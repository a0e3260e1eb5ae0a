//! A model's tokenizer: from a Hugging Face directory or from the metadata of a GGUF file, one type
//! with the same methods, so training and serving cannot tell where it came from.
//!
//! A GGUF file holds pieces, merges or scores, and the name of a pre-tokenizer; here they become
//! the pipeline that the model's own `tokenizer.json` describes. What is not known is refused by
//! name: a pipeline that is nearly right trains on other tokens than the model knows, silently.
//!
//! Sources: the `tokenizer.json` files of GPT-2, SmolLM2, Llama 3, Qwen2.5 and Mistral Nemo, and
//! Llama 2's for SentencePiece; keys and defaults of `tokenizer.ggml.*` as in llama.cpp's
//! `llama-vocab.cpp`.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::gguf::Gguf;

/// A model's tokenizer with its special tokens and chat template, whatever file they came from.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, except that special tokens in the text are not looked for; made for the first text that has one.
    as_text: OnceLock<tokenizers::Tokenizer>,
    /// Whether every special token is looked for as it is typed, not in what a normalizer makes of a text.
    special_as_typed: bool,
    special: Vec<(String, u32)>,
    n_ids: usize,
    unk_token: Option<String>,
    model_max_length: Option<u64>,
    /// The token that opens a sequence.
    pub bos_token: Option<String>,
    /// The token that ends a text, the first of `eos_ids`.
    pub eos_token: Option<String>,
    /// The token that fills a batch.
    pub pad_token: Option<String>,
    /// Id of `bos_token`.
    pub bos_id: Option<u32>,
    /// Id of `pad_token`.
    pub pad_id: Option<u32>,
    /// Every id that ends a generation, without repeats: the end of text, of a turn, of a message.
    pub eos_ids: Vec<u32>,
    /// Whether [`Tokenizer::encode`] with special tokens begins with `bos_token`.
    pub add_bos: bool,
    /// The Jinja source that turns messages into text.
    pub chat_template: Option<String>,
}

/// A text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id, the bytes of the text that it stands for, leading space included. Ids that
    /// together spell one character each have that character's bytes; added specials have `(0, 0)`.
    pub offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face model directory.
    ///
    /// `tokenizer.json` is required. Names of special tokens come from `tokenizer_config.json`,
    /// then `special_tokens_map.json`; ids that end a generation also from
    /// `generation_config.json`, or `config.json` where that has none; the template from
    /// `chat_template.jinja`, then from `tokenizer_config.json`. As in transformers, named special
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
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let inner = read_tokenizer_json(&bytes).with_context(|| path.display().to_string())?;
        let files = Files {
            config: read_json(&dir.join("tokenizer_config.json"))?,
            special_tokens_map: read_json(&dir.join("special_tokens_map.json"))?,
            generation_config: read_json(&dir.join("generation_config.json"))?,
            model_config: read_json(&dir.join("config.json"))?,
            chat_template: read_if_there(&dir.join("chat_template.jinja"))?,
        };
        from_files(inner, &files).with_context(|| dir.display().to_string())
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    ///
    /// Known are `gpt2` (byte-level BPE) with the pre-tokenizers gpt-2 (also when none is named),
    /// smollm, starcoder, llama-bpe, qwen2 and tekken, and `llama` (SentencePiece BPE) of the
    /// Llama and Mistral kind.
    ///
    /// # Errors
    /// When the kind or pre-tokenizer is another one, or pieces, scores, types, merges and ids do
    /// not fit each other. Names the file and the key.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let meta = Meta::read(gguf)?;
        from_meta(&meta).with_context(|| gguf.path().display().to_string())
    }

    /// Encodes text that may hold control: special tokens in it become their ids.
    ///
    /// For a rendered template pass `add_special_tokens = false`: the template wrote them already.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text, which a checked one always can.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Encodes text that is only text: special tokens typed in it are spelled, never obeyed.
    ///
    /// # Errors
    /// When the vocabulary cannot spell a special token, so that its id would come out.
    pub fn encode_as_text(&self, text: &str) -> Result<Vec<u32>> {
        // Most texts have none, for which the tokenizers are the same.
        let clean = self.special_as_typed && !self.special.iter().any(|(token, _)| text.contains(token.as_str()));
        let tokenizer = match clean {
            true => &self.inner,
            false => self.as_text.get_or_init(|| {
                let mut as_text = self.inner.clone();
                as_text.set_encode_special_tokens(true);
                as_text
            }),
        };
        let encoding = guarded(|| tokenizer.encode_fast(text, false))?;
        let ids = encoding.get_ids().to_vec();
        for id in &ids {
            let Ok(at) = self.special.binary_search_by_key(id, |(_, id)| *id) else {
                continue;
            };
            let token = &self.special[at].0;
            // The unknown token is what a character without a piece becomes; nobody typed it.
            if self.unk_token.as_ref() != Some(token) {
                bail!(
                    "the text contains {token:?}, a control token that this vocabulary cannot spell; \
                     remove it"
                );
            }
        }
        Ok(ids)
    }

    /// Turns ids back into text. An id that is no token, as in a padded vocabulary, gives nothing.
    ///
    /// # Errors
    /// When the decoder of `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special_tokens))
    }

    /// Control tokens, by id, which a user's text must not smuggle in; see
    /// [`Tokenizer::encode_as_text`].
    pub fn special_tokens(&self) -> &[(String, u32)] {
        &self.special
    }

    /// One more than the largest id, so an embedding needs at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.n_ids
    }

    /// The id of a token, spelled as in the vocabulary (`Ġthe`, `▁the`).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

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
            ("chat_template", &self.chat_template),
        ];
        // Absent and null differ: transformers gives an absent bos_token a default.
        for (key, value) in strings {
            config[key] = json!(value);
        }
        if let Some(length) = self.model_max_length {
            config["model_max_length"] = json!(length);
        }
        config
    }

    /// `sha256:…` of [`Tokenizer::to_json`]: equal digests give equal ids.
    pub fn digest(&self) -> String {
        sha256(&self.to_json().expect("every part was read from JSON, or is of a kind that can be"))
    }

    /// `sha256:…` of the chat template.
    pub fn template_digest(&self) -> Option<String> {
        self.chat_template.as_deref().map(sha256)
    }
}

/// Runs the library, which trusts lengths and names that a damaged `tokenizer.json` controls: a panic
/// over them is that file's error.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(run));
    let done = done.map_err(|_| anyhow!("the tokenizer is damaged: its parts do not fit each other"))?;
    done.map_err(|e| anyhow!(e))
}

fn sha256(text: &str) -> String {
    let mut digest = "sha256:".to_owned();
    for byte in Sha256::digest(text.as_bytes()) {
        digest.push_str(&format!("{byte:02x}"));
    }
    digest
}

/// What both sources agree on once the pipeline stands.
struct Named {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    unk: Option<String>,
    /// Ids that end a generation besides that of `eos`.
    more_eos_ids: Vec<u32>,
    chat_template: Option<String>,
    model_max_length: Option<u64>,
}

fn finish(inner: tokenizers::Tokenizer, named: Named) -> Result<Tokenizer> {
    let id = |name: &str, token: &Option<String>| -> Result<Option<u32>> {
        let Some(token) = token else { return Ok(None) };
        let id = inner.token_to_id(token);
        Ok(Some(id.with_context(|| format!("{name} {token:?} is not in the vocabulary"))?))
    };
    let bos_id = id("bos_token", &named.bos)?;
    let pad_id = id("pad_token", &named.pad)?;
    let mut eos_ids: Vec<u32> = Vec::new();
    for id in id("eos_token", &named.eos)?.into_iter().chain(named.more_eos_ids) {
        if !eos_ids.contains(&id) {
            eos_ids.push(id);
        }
    }
    let eos_token = named.eos.or_else(|| inner.id_to_token(*eos_ids.first()?));

    let added = inner.get_added_tokens_decoder();
    let mut special: Vec<(String, u32)> =
        (added.iter()).filter(|(_, token)| token.special).map(|(id, token)| (token.content.clone(), *id)).collect();
    special.sort_by_key(|(_, id)| *id);
    let n_ids = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    let (begins, _) = adds(&inner, bos_id, None)?;
    let special_as_typed = added.values().all(|token| !token.special || !token.normalized);
    Ok(Tokenizer {
        special,
        n_ids,
        unk_token: named.unk,
        model_max_length: named.model_max_length,
        bos_token: named.bos,
        eos_token,
        pad_token: named.pad,
        bos_id,
        pad_id,
        eos_ids,
        add_bos: begins,
        chat_template: named.chat_template,
        inner,
        as_text: OnceLock::new(),
        special_as_typed,
    })
}

/// Whether an encoding with special tokens begins with `bos` and ends with `eos`: what the
/// post-processor does, whichever it is.
fn adds(inner: &tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>) -> Result<(bool, bool)> {
    let nothing = guarded(|| inner.encode("", true))?;
    let ids = nothing.get_ids();
    Ok((bos.is_some() && ids.first().copied() == bos, eos.is_some() && ids.last().copied() == eos))
}

/// The post-processor that puts `bos` before a sequence and `eos` after it, written as
/// transformers writes it.
fn add_bos_and_eos(bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Result<PostProcessorWrapper> {
    let special = |token: (&str, u32), type_id: u32| json!({"SpecialToken": {"id": token.0, "type_id": type_id}});
    let side = |sequence: &str, type_id: u32| -> Vec<Value> {
        let middle = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        let bos = bos.map(|bos| special(bos, type_id));
        let eos = eos.map(|eos| special(eos, type_id));
        bos.into_iter().chain([middle]).chain(eos).collect()
    };
    let mut tokens = serde_json::Map::new();
    for (token, id) in bos.into_iter().chain(eos) {
        tokens.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    let pair = [side("A", 0), side("B", 1)].concat();
    part(json!({
        "type": "TemplateProcessing",
        "single": side("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    }))
}

/// A part of the pipeline from its form in `tokenizer.json`.
fn part<T: DeserializeOwned>(form: Value) -> Result<T> {
    let kind = form["type"].to_string();
    serde_json::from_value(form).with_context(|| format!("a {kind} cannot be built"))
}

// From a directory.

/// The small files around `tokenizer.json`; `Null` for those that are not there.
#[derive(Default)]
struct Files {
    config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    model_config: Value,
    chat_template: Option<String>,
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).with_context(|| path.display().to_string()),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let Some(text) = read_if_there(path)? else {
        return Ok(Value::Null);
    };
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn read_tokenizer_json(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let mut inner = guarded(|| {
        let inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        inner.encode("a 1\n<é", true)?; // what the parts do not agree on shows when they run
        Ok(inner)
    })?;

    // The library only logs an added token whose id it cannot give.
    #[derive(serde::Deserialize)]
    struct AddedTokens {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let listed: AddedTokens = serde_json::from_slice(bytes)?;
    for Added { id, content } in listed.added_tokens {
        let got = inner.token_to_id(&content);
        ensure!(got == Some(id), "added token {content:?} has id {id}, but the vocabulary makes it {got:?}");
    }

    inner.with_truncation(None).map_err(|e| anyhow!(e))?;
    inner.with_padding(None);
    if let Some(mut post) = inner.get_post_processor().cloned() {
        keep_offsets(&mut post);
        inner.with_post_processor(Some(post));
    }
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

fn from_files(mut inner: tokenizers::Tokenizer, files: &Files) -> Result<Tokenizer> {
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
    let named = Named {
        bos,
        eos,
        pad,
        unk,
        more_eos_ids,
        chat_template: match &files.chat_template {
            Some(template) => Some(template.clone()),
            None => default_template(&files.config["chat_template"])?,
        },
        // transformers writes 10^30 for "not known".
        model_max_length: files.config["model_max_length"].as_u64().filter(|&n| n < 1 << 40),
    };
    finish(inner, named)
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

/// A template, or the one named "default" of a list.
fn default_template(value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(templates) => {
            let default = templates.iter().find(|entry| entry["name"] == "default");
            let template = default.and_then(|entry| entry["template"].as_str());
            let names: Vec<&str> = templates.iter().filter_map(|entry| entry["name"].as_str()).collect();
            let template = template.with_context(|| {
                format!(
                    "tokenizer_config.json: chat_template has {names:?} but no \"default\"; \
                     write the one to use to chat_template.jinja"
                )
            })?;
            Ok(Some(template.to_owned()))
        }
        _ => bail!("tokenizer_config.json: chat_template is neither a string nor a list"),
    }
}

// From a GGUF file.

/// What a GGUF file says about its tokenizer; ids and lengths are not checked yet.
#[derive(Clone)]
struct Meta<'a> {
    architecture: Option<&'a str>,
    model: Option<&'a str>,
    pre: Option<&'a str>,
    tokens: &'a [String],
    /// Empty when absent, as are `types` and `merges`.
    scores: &'a [f32],
    types: Vec<i64>,
    merges: &'a [String],
    bos: Option<u64>,
    eos: Option<u64>,
    eot: Option<u64>,
    eom: Option<u64>,
    unk: Option<u64>,
    pad: Option<u64>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    add_space_prefix: Option<bool>,
    chat_template: Option<&'a str>,
    context_length: Option<u64>,
}

impl<'a> Meta<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        let architecture = gguf.str("general.architecture")?;
        let context_length = format!("{}.context_length", architecture.unwrap_or_default());
        Ok(Self {
            architecture,
            model: gguf.str("tokenizer.ggml.model")?,
            pre: gguf.str("tokenizer.ggml.pre")?,
            tokens: gguf.strings("tokenizer.ggml.tokens")?.unwrap_or_default(),
            scores: gguf.f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            types: gguf.i64s("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: gguf.strings("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos: gguf.u64("tokenizer.ggml.bos_token_id")?,
            eos: gguf.u64("tokenizer.ggml.eos_token_id")?,
            eot: gguf.u64("tokenizer.ggml.eot_token_id")?,
            eom: gguf.u64("tokenizer.ggml.eom_token_id")?,
            unk: gguf.u64("tokenizer.ggml.unknown_token_id")?,
            pad: gguf.u64("tokenizer.ggml.padding_token_id")?,
            add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: gguf.str("tokenizer.chat_template")?,
            context_length: gguf.u64(&context_length)?,
        })
    }
}

/// Values of `tokenizer.ggml.token_type`, from `llama_token_type` in llama.cpp's `llama.h`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// The pieces of a GGUF file, checked.
struct Pieces<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    /// Each piece once.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Pieces<'a> {
    fn read(meta: &Meta<'a>) -> Result<Self> {
        let tokens = meta.tokens;
        ensure!(!tokens.is_empty(), "tokenizer.ggml.tokens: is missing or empty, so the file has no tokenizer");
        let n = u32::try_from(tokens.len()).context("tokenizer.ggml.tokens: has too many")?;
        let same_len = |key: &str, len: usize| -> Result<()> {
            ensure!(len == 0 || len == tokens.len(), "tokenizer.ggml.{key}: has {len} entries for {n} tokens");
            Ok(())
        };
        same_len("scores", meta.scores.len())?;
        same_len("token_type", meta.types.len())?;
        let types = if meta.types.is_empty() { vec![NORMAL; tokens.len()] } else { meta.types.clone() };
        let mut ids = HashMap::with_capacity(tokens.len());
        for (token, id) in tokens.iter().zip(0..n) {
            if let Some(first) = ids.insert(token.as_str(), id) {
                bail!("tokenizer.ggml.tokens: {token:?} appears twice, as {first} and {id}");
            }
        }
        Ok(Self { tokens, types, ids })
    }

    /// The id that a key names, checked.
    fn id(&self, key: &str, id: Option<u64>) -> Result<Option<u32>> {
        let Some(id) = id else { return Ok(None) };
        let n = self.tokens.len();
        let checked = u32::try_from(id).ok().filter(|&id| (id as usize) < n);
        Ok(Some(checked.with_context(|| format!("tokenizer.ggml.{key}: is {id}, there are {n} tokens"))?))
    }

    fn is(&self, id: u32, kinds: &[i64]) -> bool {
        kinds.contains(&self.types[id as usize])
    }

    fn vocab(&self) -> Vocab {
        self.ids.iter().map(|(token, &id)| ((*token).to_owned(), id)).collect()
    }
}

/// The pipeline without its special tokens.
struct Pipeline {
    model: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    decoder: DecoderWrapper,
    /// Whether a sequence begins with the BOS token when the file does not say.
    add_bos: bool,
}

fn from_meta(meta: &Meta) -> Result<Tokenizer> {
    let pieces = Pieces::read(meta)?;
    let bos = pieces.id("bos_token_id", meta.bos)?;
    let eos = pieces.id("eos_token_id", meta.eos)?;
    let eot = pieces.id("eot_token_id", meta.eot)?;
    let eom = pieces.id("eom_token_id", meta.eom)?;
    let pad = pieces.id("padding_token_id", meta.pad)?;
    let mut unk = pieces.id("unknown_token_id", meta.unk)?;
    if unk.is_none() {
        unk = (0..).zip(&pieces.types).find(|(_, kind)| **kind == UNKNOWN).map(|(id, _)| id);
    }
    let token = |id: u32| pieces.tokens[id as usize].as_str();

    let pipeline = match meta.model {
        Some("gpt2") => byte_level(meta, &pieces)?,
        Some("llama") => sentencepiece(meta, &pieces, unk)?,
        Some(other) => bail!(
            "tokenizer.ggml.model: {other:?} is not supported, \"gpt2\" and \"llama\" are; \
             use the model's directory with its tokenizer.json"
        ),
        None => bail!("tokenizer.ggml.model: is missing, so the file has no tokenizer"),
    };
    let mut inner = tokenizers::Tokenizer::new(pipeline.model);
    inner.with_normalizer(pipeline.normalizer).map_err(|e| anyhow!(e))?;
    inner.with_pre_tokenizer(pipeline.pre_tokenizer);
    inner.with_decoder(Some(pipeline.decoder));

    // Some files name a plain piece as padding; it must go on meaning itself in a text.
    let pad = pad.filter(|&id| !pieces.is(id, &[NORMAL]) || [bos, eos, unk].contains(&Some(id)));
    let named = [bos, eos, eot, eom, unk, pad];
    let mut added = Vec::new();
    for (id, content) in (0..).zip(pieces.tokens) {
        let special = pieces.is(id, &[CONTROL, UNKNOWN]) || named.contains(&Some(id));
        if special || pieces.is(id, &[USER_DEFINED]) {
            added.push(AddedToken::from(content.clone(), special).normalized(false));
        }
    }
    inner.add_tokens(added).map_err(|e| anyhow!(e))?;

    let adds = |key: &str, said: Option<bool>, default: bool, id: Option<u32>| -> Result<Option<(&str, u32)>> {
        if said == Some(true) && id.is_none() {
            bail!("tokenizer.ggml.add_{key}_token: is true, but {key}_token_id is missing");
        }
        Ok(id.filter(|_| said.unwrap_or(default)).map(|id| (token(id), id)))
    };
    let before = adds("bos", meta.add_bos, pipeline.add_bos, bos)?;
    let after = adds("eos", meta.add_eos, false, eos)?;
    if before.is_some() || after.is_some() {
        inner.with_post_processor(Some(add_bos_and_eos(before, after)?));
    }
    finish(
        inner,
        Named {
            bos: bos.map(token).map(str::to_owned),
            eos: eos.map(token).map(str::to_owned),
            pad: pad.map(token).map(str::to_owned),
            unk: unk.map(token).map(str::to_owned),
            more_eos_ids: [eot, eom].into_iter().flatten().collect(),
            chat_template: meta.chat_template.map(str::to_owned),
            model_max_length: meta.context_length,
        },
    )
}

/// Byte-level BPE: bytes spelled as visible characters, merged in the order of the file.
fn byte_level(meta: &Meta, pieces: &Pieces) -> Result<Pipeline> {
    ensure!(!meta.merges.is_empty(), "tokenizer.ggml.merges: is missing or empty");
    let pre = PreTokenizer::named(meta.pre.unwrap_or("default"))?;
    let model = BPE::builder()
        .vocab_and_merges(pieces.vocab(), read_merges(meta.merges, pieces)?)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| anyhow!(e))?;
    let bytes = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex,
        })
    };
    let steps = match pre.split {
        Split::Gpt2 => bytes(true),
        Split::Digits => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            bytes(true),
        ]}),
        Split::Regex(regex) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            bytes(false),
        ]}),
    };
    Ok(Pipeline {
        model,
        normalizer: if pre.nfc { Some(part(json!({"type": "NFC"}))?) } else { None },
        pre_tokenizer: Some(part(steps)?),
        decoder: part(json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        }))?,
        add_bos: pre.add_bos,
    })
}

/// How text is cut into words before merging.
enum Split {
    /// GPT-2's regular expression, which is the library's own.
    Gpt2,
    /// Each digit alone, then GPT-2's.
    Digits,
    Regex(&'static str),
}

/// What a name in `tokenizer.ggml.pre` stands for.
struct PreTokenizer {
    split: Split,
    /// A word that is a piece as it stands is taken whole, though no merges lead to it.
    ignore_merges: bool,
    /// Unicode normalisation before everything else.
    nfc: bool,
    add_bos: bool,
}

/// Of Llama 3's `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Of Qwen2's: Llama 3's with each digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Of Mistral Nemo's: words also end where lower case turns to upper.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    fn named(name: &str) -> Result<Self> {
        let plain = |split| Self { split, ignore_merges: false, nfc: false, add_bos: false };
        Ok(match name {
            "default" | "gpt-2" => plain(Split::Gpt2),
            "smollm" | "starcoder" => plain(Split::Digits),
            "qwen2" => Self { nfc: true, ..plain(Split::Regex(QWEN2)) },
            "llama-bpe" | "llama3" | "llama-v3" => {
                Self { ignore_merges: true, add_bos: true, ..plain(Split::Regex(LLAMA3)) }
            }
            "tekken" => Self { ignore_merges: true, add_bos: true, ..plain(Split::Regex(TEKKEN)) },
            other => bail!(
                "tokenizer.ggml.pre: {other:?} is not supported; default, gpt-2, smollm, starcoder, \
                 qwen2, llama-bpe and tekken are; use the model's directory with its tokenizer.json"
            ),
        })
    }
}

/// Merges as written: two pieces with a space between.
fn read_merges(merges: &[String], pieces: &Pieces) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::with_capacity(merges.len());
    let mut seen: HashMap<&str, usize> = HashMap::with_capacity(merges.len());
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let at = || format!("tokenizer.ggml.merges: merge {rank}, {merge:?}");
        let (left, right) = merge.split_once(' ').with_context(|| format!("{}, is not two pieces", at()))?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        for piece in [left, right, &joined] {
            ensure!(pieces.ids.contains_key(piece), "{}: {piece:?} is not in the vocabulary", at());
        }
        if let Some(first) = seen.insert(merge, rank) {
            bail!("{}: repeats merge {first}", at());
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

/// SentencePiece BPE: the whole text at once, with spaces as `▁` and unknown characters as bytes.
///
/// The prefix space is put by a normaliser, before the text and after each special token, as in
/// Llama 2's `tokenizer.json` and llama.cpp. Transformers' own conversion of GGUF files uses
/// `Metaspace` instead, which leaves it out after special tokens and, unlike SentencePiece, before
/// a text that begins with a space.
fn sentencepiece(meta: &Meta, pieces: &Pieces, unk: Option<u32>) -> Result<Pipeline> {
    // Their added tokens strip spaces, or their merges follow other rules, and no metadata says so.
    if let Some(name) = meta.architecture.filter(|name| name.starts_with("gemma") || *name == "phi3") {
        bail!(
            "general.architecture: the SentencePiece tokenizer of {name:?} has rules that a GGUF file \
             does not hold; use the model's directory with its tokenizer.json"
        );
    }
    ensure!(
        unk.is_some() || pieces.ids.contains_key("<0x00>"),
        "tokenizer.ggml.tokens: has neither an unknown token nor bytes, so text would be lost"
    );
    let merges = if meta.merges.is_empty() {
        merges_from_scores(meta.scores, pieces)?
    } else {
        read_merges(meta.merges, pieces)?
    };
    let mut builder = BPE::builder().vocab_and_merges(pieces.vocab(), merges).fuse_unk(true).byte_fallback(true);
    if let Some(unk) = unk {
        builder = builder.unk_token(pieces.tokens[unk as usize].clone());
    }
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if meta.add_space_prefix.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Pipeline {
        model: builder.build().map_err(|e| anyhow!(e))?,
        normalizer: Some(part(json!({"type": "Sequence", "normalizers": normalizers}))?),
        pre_tokenizer: None,
        decoder: part(json!({"type": "Sequence", "decoders": decoders}))?,
        add_bos: true,
    })
}

/// Longest piece that merges are looked for in; SentencePiece's own limit is 16 characters unless
/// it is raised. It keeps a hostile file from taking quadratic time.
const PIECE_BYTES_MAX: usize = 1024;

/// The merges that pieces and their scores imply: each way to cut a piece into two others, best
/// score first. Ties go, as in transformers' `generate_merges`, to the longer left part, the
/// longer right part, then the order of the vocabulary.
///
/// Control, unknown and byte pieces are never put together from text, as in SentencePiece.
fn merges_from_scores(scores: &[f32], pieces: &Pieces) -> Result<Vec<(String, String)>> {
    ensure!(!scores.is_empty(), "tokenizer.ggml.scores: is missing, and so is tokenizer.ggml.merges");
    let textual = |id: u32| !pieces.is(id, &[CONTROL, UNKNOWN, BYTE]);
    let known = |piece: &str| pieces.ids.get(piece).copied().filter(|&id| textual(id));
    struct Merge<'a> {
        score: f32,
        n_chars: (usize, usize),
        left: &'a str,
        right: &'a str,
    }
    let mut merges: Vec<Merge> = Vec::with_capacity(pieces.tokens.len() * 2);
    for (piece, (&score, id)) in pieces.tokens.iter().zip(scores.iter().zip(0..)) {
        ensure!(!score.is_nan(), "tokenizer.ggml.scores: that of {piece:?} is not a number");
        if !textual(id) {
            continue;
        }
        ensure!(
            piece.len() <= PIECE_BYTES_MAX,
            "tokenizer.ggml.tokens: token {id} has {} bytes, at most {PIECE_BYTES_MAX} are supported",
            piece.len()
        );
        let n_chars = piece.chars().count();
        let mut cuts = Vec::new();
        for (n_left, (at, _)) in piece.char_indices().enumerate().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(left_id), Some(right_id)) = (known(left), known(right)) {
                // Adding 0.0 makes -0.0 equal to it in the order below.
                let merge = Merge { score: score + 0.0, n_chars: (n_left, n_chars - n_left), left, right };
                cuts.push(((left_id, right_id), merge));
            }
        }
        cuts.sort_by_key(|(ids, _)| *ids);
        merges.extend(cuts.into_iter().map(|(_, merge)| merge));
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.n_chars.cmp(&a.n_chars)));
    let pair = |merge: Merge| (merge.left.to_owned(), merge.right.to_owned());
    Ok(merges.into_iter().map(pair).collect())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizers")
    }

    fn gguf(name: &str) -> Result<Gguf> {
        Gguf::open(&fixtures().join(format!("{name}.gguf")))
    }

    /// What `make_tokenizers.py` wrote down: rows, and ids by the reference of each pipeline.
    fn expected() -> Result<Value> {
        Ok(serde_json::from_slice(&std::fs::read(fixtures().join("expected.json"))?)?)
    }

    fn rows(expected: &Value) -> Result<Vec<String>> {
        Ok(serde_json::from_value(expected["rows"].clone())?)
    }

    /// Encodes every row both ways and compares with the reference.
    fn check(tokenizer: &Tokenizer, expected: &Value, reference: &Value) -> Result<()> {
        for (idx, row) in rows(expected)?.iter().enumerate() {
            let ids = tokenizer.encode(row, false)?.ids;
            assert_eq!(json!(ids), reference["ids"][idx], "{row:?}");
            let ids = tokenizer.encode_as_text(row)?;
            assert_eq!(json!(ids), reference["as_text"][idx], "{row:?} as text");
        }
        Ok(())
    }

    #[test]
    fn byte_level_ids_equal_those_of_the_tokenizers_package() -> Result<()> {
        let expected = expected()?;
        let gguf = gguf("byte_level")?;
        for pre in [None, Some("gpt-2"), Some("smollm"), Some("llama-bpe"), Some("qwen2"), Some("tekken")] {
            let meta = Meta { pre, ..Meta::read(&gguf)? };
            let tokenizer = from_meta(&meta)?;
            let reference = &expected["byte_level"][pre.unwrap_or("gpt-2")];
            check(&tokenizer, &expected, reference).with_context(|| format!("{pre:?}"))?;
        }
        Ok(())
    }

    #[test]
    fn sentencepiece_ids_equal_those_of_sentencepiece() -> Result<()> {
        let expected = expected()?;
        let gguf = gguf("sentencepiece")?;
        for (name, add_space_prefix) in [("with prefix", None), ("without prefix", Some(false))] {
            let tokenizer = from_meta(&Meta { add_space_prefix, ..Meta::read(&gguf)? })?;
            let reference = &expected["sentencepiece"][name];
            check(&tokenizer, &expected, reference)?;
            for (idx, row) in rows(&expected)?.iter().enumerate() {
                let ids = tokenizer.encode(row, false)?.ids;
                assert_eq!(tokenizer.decode(&ids, true)?, reference["decoded"][idx], "{row:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_directory_gives_the_ids_of_the_gguf_file() -> Result<()> {
        let expected = expected()?;
        let tokenizer = Tokenizer::from_dir(&fixtures().join("byte_level"))?;
        check(&tokenizer, &expected, &expected["byte_level"]["smollm"])
    }

    #[test]
    fn byte_level_text_comes_back_and_offsets_cover_it() -> Result<()> {
        let expected = expected()?;
        let from_dir = Tokenizer::from_dir(&fixtures().join("byte_level"))?;
        for tokenizer in [Tokenizer::from_gguf(&gguf("byte_level")?)?, from_dir] {
            for row in rows(&expected)? {
                let Encoded { ids, offsets } = tokenizer.encode(&row, false)?;
                assert_eq!(tokenizer.decode(&ids, false)?, row);
                let mut end = 0;
                for (&id, &(start, stop)) in ids.iter().zip(&offsets) {
                    // A character spelled by several ids is each one's.
                    assert!(start <= end && end <= stop && start < stop, "{row:?} {offsets:?}");
                    if row.is_ascii() {
                        assert_eq!((start, &row[start..stop]), (end, &*tokenizer.decode(&[id], false)?));
                    }
                    end = stop;
                }
                assert_eq!(end, row.len(), "{row:?} {offsets:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn no_text_gives_a_control_token() -> Result<()> {
        for name in ["byte_level", "sentencepiece"] {
            let tokenizer = Tokenizer::from_gguf(&gguf(name)?)?;
            assert!(tokenizer.special_tokens().len() >= 3);
            for (token, id) in tokenizer.special_tokens() {
                let text = format!("a{token}b {token}");
                let ids = tokenizer.encode(&text, false)?.ids;
                assert_eq!(ids.iter().filter(|&i| i == id).count(), 2, "{text}: {ids:?}");
                let ids = tokenizer.encode_as_text(&text)?;
                assert!(!ids.contains(id), "{text}: {ids:?}");
                assert_eq!(tokenizer.decode(&ids, true)?, text);
            }
        }
        Ok(())
    }

    #[test]
    fn what_the_files_say_is_kept() -> Result<()> {
        let gguf = gguf("byte_level")?;
        let t = Tokenizer::from_gguf(&gguf)?;
        assert_eq!((t.bos_token.as_deref(), t.bos_id), (Some("<|im_start|>"), Some(1)));
        assert_eq!((t.eos_token.as_deref(), &t.eos_ids[..]), (Some("<|im_end|>"), &[2, 0][..]));
        assert_eq!((t.pad_token.as_deref(), t.pad_id), (Some("<|im_end|>"), Some(2)));
        assert!(!t.add_bos);
        assert_eq!(t.vocab_size(), gguf.strings("tokenizer.ggml.tokens")?.map_or(0, <[_]>::len));
        assert_eq!(t.token(1).as_deref(), Some("<|im_start|>"));
        assert_eq!((t.id("<|im_end|>"), t.id("absent"), t.token(9999)), (Some(2), None, None));
        let control = [("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)];
        assert_eq!(t.special_tokens(), control.map(|(token, id)| (token.to_owned(), id)));

        let dir = fixtures().join("byte_level");
        let d = Tokenizer::from_dir(&dir)?;
        assert_eq!((d.bos_token, d.bos_id), (t.bos_token, t.bos_id));
        assert_eq!((d.eos_token, &d.eos_ids), (t.eos_token, &t.eos_ids));
        assert_eq!((d.pad_token, d.pad_id), (t.pad_token, t.pad_id));
        assert!(d.add_bos, "its post-processor adds it");
        assert_eq!(d.chat_template, t.chat_template, "chat_template.jinja comes first");
        Ok(())
    }

    #[test]
    fn small_files_of_a_directory_are_read_in_order() -> Result<()> {
        let dir = fixtures().join("byte_level");
        let read = |files: &Files| -> Result<Tokenizer> {
            from_files(read_tokenizer_json(&std::fs::read(dir.join("tokenizer.json"))?)?, files)
        };
        let bare = read(&Files::default())?;
        assert_eq!((bare.bos_token, bare.eos_ids.len(), bare.chat_template), (None, 0, None));

        let config = json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "add_bos_token": false,
            "add_eos_token": true, "additional_special_tokens": ["<think>"],
            "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]});
        let files = Files { config, model_config: json!({"eos_token_id": [2, 7]}), ..Files::default() };
        let t = read(&files)?;
        assert_eq!((t.eos_ids.as_slice(), t.chat_template.as_deref()), (&[2, 7][..], Some("d")));
        assert!(t.special_tokens().iter().any(|(token, _)| token == "<think>"));
        assert!(!t.add_bos);
        assert_eq!(t.encode("", true)?.ids, [2]);

        let files = Files { generation_config: json!({"eos_token_id": 0}), ..files };
        assert_eq!(read(&files)?.eos_ids, [2, 0]);

        let config = json!({"added_tokens_decoder": {"3": {"content": "<think>"}}});
        let message = read(&Files { config, ..Files::default() }).err().map(|e| e.to_string());
        assert!(message.is_some_and(|m| m.contains("<think>") && m.contains("tokenizer_config.json")));
        let config = json!({"eos_token": "<absent>"});
        assert!(read(&Files { config, ..Files::default() }).is_err());
        Ok(())
    }

    #[test]
    fn added_bos_and_eos_are_only_added_on_request() -> Result<()> {
        let gguf = gguf("sentencepiece")?;
        let t = Tokenizer::from_gguf(&gguf)?;
        assert!(t.add_bos, "SentencePiece files that do not say add it");
        let plain = t.encode("hello", false)?.ids;
        assert_eq!(t.encode("hello", true)?.ids, [&[1], &plain[..]].concat());
        assert_eq!(t.encode("hello", true)?.offsets[0], (0, 0));

        let meta = Meta { add_bos: Some(false), add_eos: Some(true), ..Meta::read(&gguf)? };
        let t = from_meta(&meta)?;
        assert!(!t.add_bos);
        assert_eq!(t.encode("hello", true)?.ids, [&plain[..], &[2]].concat());
        let refused = from_meta(&Meta { add_bos: Some(true), bos: None, ..meta });
        assert!(refused.err().is_some_and(|e| e.to_string().contains("bos_token_id is missing")));
        Ok(())
    }

    #[test]
    fn json_read_back_gives_the_same_tokenizer() -> Result<()> {
        let expected = expected()?;
        for name in ["byte_level", "sentencepiece"] {
            let t = Tokenizer::from_gguf(&gguf(name)?)?;
            let read = read_tokenizer_json(t.to_json()?.as_bytes())?;
            let back = from_files(read, &Files { config: t.config_json(), ..Files::default() })?;
            for row in rows(&expected)? {
                assert_eq!(back.encode(&row, true)?, t.encode(&row, true)?);
                assert_eq!(back.encode_as_text(&row)?, t.encode_as_text(&row)?);
            }
            assert_eq!(back.special_tokens(), t.special_tokens());
            assert_eq!(back.digest(), t.digest());
            assert_eq!(back.template_digest(), t.template_digest());
            assert_eq!(t.config_json()["model_max_length"], 512);
        }
        Ok(())
    }

    /// sha256("abc") is of FIPS 180-2, appendix B.1.
    #[test]
    fn digests_are_sha256() {
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256("abc"), abc);
    }

    /// Pieces that spell a control token: text must not be merged into it, though merges could.
    #[test]
    fn scores_give_no_merges_into_control_tokens() -> Result<()> {
        let tokens = ["<unk>", "<s>", "</s>", "▁", "<", "s", ">", "s>", "<s", "ss", "▁s"].map(str::to_owned);
        let scores = [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -1.0, -3.0];
        let meta = Meta {
            architecture: None,
            model: Some("llama"),
            pre: None,
            tokens: &tokens,
            scores: &scores,
            types: vec![2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1],
            merges: &[],
            bos: Some(1),
            eos: Some(2),
            eot: None,
            eom: None,
            unk: None,
            pad: Some(5),
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
            chat_template: None,
            context_length: None,
        };
        // By score, then the longer left part: never ("<", "s>") or ("<s", ">") into "<s>".
        let merges = merges_from_scores(&scores, &Pieces::read(&meta)?)?;
        let merges: Vec<(&str, &str)> = merges.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
        assert_eq!(merges, [("s", ">"), ("s", "s"), ("<", "s"), ("▁", "s")]);
        let t = from_meta(&meta)?;
        assert_eq!(t.encode("<s>", false)?.ids, [1]);
        assert_eq!(t.encode_as_text("<s>")?, [3, 4, 7]);
        assert_eq!(t.encode_as_text("é<")?, [3, 0, 4], "an unknown character is no control token");
        assert_eq!(t.pad_token, None, "a plain piece does not become control");
        Ok(())
    }

    /// A word marked as control, as no real file does.
    #[test]
    fn a_control_token_that_text_would_give_is_an_error() -> Result<()> {
        let gguf = gguf("byte_level")?;
        let mut types = Meta::read(&gguf)?.types;
        let word = Tokenizer::from_gguf(&gguf)?.id("Ġnumber");
        types[word.context("the text is full of it")? as usize] = CONTROL;
        let t = from_meta(&Meta { types, ..Meta::read(&gguf)? })?;
        let refused = t.encode_as_text("add a number");
        let message = refused.expect_err("it would be control").to_string();
        assert!(message.contains("\"Ġnumber\""), "{message}");
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_named() -> Result<()> {
        let (bytes, pieces) = (gguf("byte_level")?, gguf("sentencepiece")?);
        let (b, s) = (Meta::read(&bytes)?, Meta::read(&pieces)?);
        let twice = [b.tokens, &["a".to_owned()]].concat();
        let merges = |merge: &str| [b.merges, &[merge.to_owned()]].concat();
        let (unknown, result, one, again) = (merges("a €"), merges("a 世"), merges("a"), merges(&b.merges[0]));
        let nan = vec![f32::NAN; s.tokens.len()];
        let long = [s.tokens, &["x".repeat(2000)]].concat();
        let long_scores = vec![0.0; long.len()];
        let cases = [
            (Meta { model: Some("bert"), ..b.clone() }, "tokenizer.ggml.model: \"bert\" is not supported"),
            (Meta { model: None, ..b.clone() }, "tokenizer.ggml.model: is missing"),
            (Meta { pre: Some("deepseek-llm"), ..b.clone() }, "tokenizer.ggml.pre: \"deepseek-llm\" is not"),
            (Meta { architecture: Some("gemma3"), ..s.clone() }, "SentencePiece tokenizer of \"gemma3\""),
            (Meta { tokens: &[], ..b.clone() }, "tokens: is missing or empty"),
            (Meta { tokens: &twice, types: vec![], ..b.clone() }, "\"a\" appears twice"),
            (Meta { types: vec![1, 1], ..b.clone() }, "token_type: has 2 entries for 643 tokens"),
            (Meta { scores: &[0.0], ..s.clone() }, "scores: has 1 entries for 700 tokens"),
            (Meta { scores: &[], ..s.clone() }, "scores: is missing"),
            (Meta { scores: &nan, ..s.clone() }, "is not a number"),
            (Meta { tokens: &long, scores: &long_scores, types: vec![], unk: Some(0), ..s.clone() }, "has 2000 bytes"),
            (Meta { merges: &[], ..b.clone() }, "merges: is missing"),
            (Meta { merges: &unknown, ..b.clone() }, "\"€\" is not in the vocabulary"),
            (Meta { merges: &result, ..b.clone() }, "is not in the vocabulary"),
            (Meta { merges: &one, ..b.clone() }, "is not two pieces"),
            (Meta { merges: &again, ..b.clone() }, "repeats merge 0"),
            (Meta { eos: Some(643), ..b.clone() }, "eos_token_id: is 643, there are 643 tokens"),
            (Meta { unk: Some(1 << 40), ..b.clone() }, "unknown_token_id: is 1099511627776"),
        ];
        for (meta, expected) in cases {
            let error = from_meta(&meta).err().with_context(|| format!("not refused: {expected}"))?;
            let message = format!("{error:#}");
            assert!(message.contains(expected), "{message:?} does not say {expected:?}");
        }
        Ok(())
    }

    #[test]
    fn a_damaged_tokenizer_json_is_an_error() -> Result<()> {
        let added = r#"{"added_tokens": [{"id": 9, "content": "<x>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}"#;
        let message = read_tokenizer_json(added.as_bytes()).expect_err("id 2 is next").to_string();
        assert!(message.contains("\"<x>\" has id 9"), "{message}");
        // The merged piece is longer than any in the vocabulary.
        let merges = r#"{"model": {"type": "BPE", "vocab": {"aa": 0, "bb": 1}, "merges": [["aa", "bb"]]}}"#;
        assert!(read_tokenizer_json(merges.as_bytes()).is_err());
        // The post-processor names a token that it does not define.
        let post = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "post_processor":
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a", "type_id": 0}}],
            "pair": [], "special_tokens": {}}}"#;
        assert!(read_tokenizer_json(post.as_bytes()).is_err());
        assert!(read_tokenizer_json(b"{}").is_err());
        Ok(())
    }
}
