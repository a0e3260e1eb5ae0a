//! A model's tokenizer: from a Hugging Face directory or from the metadata of a GGUF file, one type
//! with the same methods, so training and serving cannot tell where it came from.
//!
//! Sources: the `tokenizer.json` files of GPT-2, SmolLM2, Llama 3, Qwen2.5 and Mistral Nemo, and
//! Llama 2's for SentencePiece; keys and defaults of `tokenizer.ggml.*` as in llama.cpp's
//! `llama-vocab.cpp`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Model};

use crate::files::gguf::Gguf;
use crate::files::{is_named, parse_object, read_bytes, read_text};
use crate::guard::quietly;
use crate::text::template;

mod adapter;
mod check;
mod control;
mod ends;
mod gguf;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use control::Control;

/// A model's tokenizer with its special tokens and chat template, whatever file they came from.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, except that control tokens in the text are not looked for; made for the first text that has one.
    as_text: OnceLock<tokenizers::Tokenizer>,
    /// Whether every control token is looked for as it is typed, not in what a normalizer makes of a text.
    control_as_typed: bool,
    /// By id.
    control: Vec<Control>,
    /// Control tokens that a character without a piece becomes.
    unknown_ids: Vec<u32>,
    n_ids: usize,
    unk_token: Option<String>,
    model_max_length: Option<u64>,
    /// Whether a text is to begin with `bos_token` and to end with `eos_token`, where the files say so besides the post-processor.
    adds_asked: [Option<bool>; 2],
    /// The token that opens a sequence.
    pub bos_token: Option<String>,
    /// The token that ends a text, by the model's files.
    pub eos_token: Option<String>,
    /// The token that fills a batch.
    pub pad_token: Option<String>,
    /// Id of `bos_token`.
    pub bos_id: Option<u32>,
    /// Id of `pad_token`.
    pub pad_id: Option<u32>,
    /// Id of `eos_token`.
    pub eos_id: Option<u32>,
    /// Every id that ends an answer, without repeats: those that the model's files name, the one that its chat template writes behind
    /// an answer, and those known to end a turn in any model.
    pub eos_ids: Vec<u32>,
    /// What the chat template ends an assistant's turn with.
    pub end_of_turn: Option<u32>,
    /// What its user should know of it, each a clause.
    pub notes: Vec<String>,
    /// Whether [`Tokenizer::encode`] with special tokens begins with `bos_token`.
    pub add_bos: bool,
    /// The Jinja source that turns messages into text.
    pub chat_template: Option<String>,
    /// Further sources by name. `tool_use` is for conversations with tools.
    pub named_templates: BTreeMap<String, String>,
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
    /// `generation_config.json`, or `config.json` where that has none; templates from
    /// `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, then from
    /// `tokenizer_config.json`. As in transformers, named special
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
            chat_template: read_if_there(&dir.join("chat_template.jinja"))?,
            named_templates: read_named_templates(&dir.join(TEMPLATES_DIR))?,
        };
        from_files(inner, &files).with_context(|| dir.display().to_string())
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    ///
    /// Known are `gpt2` (byte-level BPE) with the pre-tokenizers gpt-2 (also when none is named),
    /// smollm, starcoder, llama-bpe, qwen2 and tekken and what llama.cpp takes for the same, and `llama` (SentencePiece BPE) of the
    /// Llama and Mistral kind.
    ///
    /// # Errors
    /// When the kind or pre-tokenizer is another one, or pieces, scores, types, merges and ids do
    /// not fit each other. Names the file and the key.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let meta = gguf::Meta::read(gguf)?;
        gguf::from_meta(&meta).with_context(|| gguf.path().display().to_string())
    }

    /// Encodes text that may hold control: special tokens in it become their ids.
    ///
    /// For a rendered template pass `add_special_tokens = false`: the template wrote them already.
    ///
    /// # Errors
    /// When the tokenizer cannot encode the text, which a checked one always can.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        check_length(text)?;
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// Encodes text that is only text: control tokens typed in it are spelled, never obeyed.
    ///
    /// # Errors
    /// When the vocabulary cannot spell a control token, so that its id would come out.
    pub fn encode_as_text(&self, text: &str) -> Result<Vec<u32>> {
        check_length(text)?;
        // Most texts have none, for which the tokenizers are the same.
        let clean = self.control_as_typed && !self.control.iter().any(|c| text.contains(c.text.as_str()));
        let tokenizer = match clean {
            true => &self.inner,
            false => self.as_text.get_or_init(|| self.without_control()),
        };
        let encoding = guarded(|| tokenizer.encode_fast(text, false))?;
        let ids = encoding.get_ids().to_vec();
        for id in &ids {
            let Ok(at) = self.control.binary_search_by_key(id, |c| c.id) else {
                continue;
            };
            let token = &self.control[at].text;
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

    /// Refuses ids that a model with embeddings for those below `embeddings` does not know: some tokenizers have more tokens.
    ///
    /// # Errors
    /// Names the first such token.
    pub fn check_embedded(&self, ids: &[u32], embeddings: usize) -> Result<()> {
        let Some(id) = ids.iter().find(|id| **id as usize >= embeddings) else { return Ok(()) };
        let token = self.token(*id).unwrap_or_default();
        bail!("token {id}, {token:?}, has no embedding: the model knows {embeddings} tokens, its tokenizer more")
    }

    /// Turns ids back into text. An id that is no token, as in a padded vocabulary, gives nothing.
    ///
    /// # Errors
    /// When the decoder of `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special_tokens))
    }

    /// One more than the largest id, so an embedding needs at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.n_ids
    }

    /// Most tokens of a text, where the files say it.
    pub fn model_max_length(&self) -> Option<usize> {
        usize::try_from(self.model_max_length?).ok()
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

/// Runs the library, which trusts lengths and names that a damaged `tokenizer.json` controls: a panic
/// over them is that file's error.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = quietly(run).context("the tokenizer is damaged: its parts do not fit each other")?;
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
    named_templates: BTreeMap<String, String>,
    model_max_length: Option<u64>,
    adds_asked: [Option<bool>; 2],
    notes: Vec<String>,
}

fn finish(inner: tokenizers::Tokenizer, mut named: Named) -> Result<Tokenizer> {
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
    let eos_id = eos_ids.first().copied();
    let eos_token = named.eos.or_else(|| inner.id_to_token(eos_id?));

    let added = inner.get_added_tokens_decoder();
    let named_ids: Vec<u32> = eos_ids.iter().copied().chain(bos_id).collect();
    let sources = named.chat_template.iter().chain(named.named_templates.get("tool_use"));
    let written = sources.map(|source| template::written_by(source, named.bos.as_deref(), eos_token.as_deref()));
    let written = written.collect::<Vec<_>>().join("\0");
    let is_control = |id: &u32, token: &AddedToken| control::is_control(token, *id, &named_ids, &written);
    let mut control: Vec<Control> = (added.iter().filter(|(id, token)| is_control(id, token)))
        .map(|(id, token)| Control { text: token.content.clone(), id: *id, special: token.special })
        .collect();
    control.sort_by_key(|c| c.id);
    let behind = |source: &str| template::behind_answer(source, named.bos.as_deref(), eos_token.as_deref());
    let behind = named.chat_template.as_deref().and_then(behind);
    let end_of_turn = behind.as_deref().and_then(|behind| ends::end_of_turn(behind, &control));
    if let (Some(behind), None) = (&behind, end_of_turn) {
        named.notes.push(ends::without_end(behind));
    }
    for id in end_of_turn.into_iter().chain(ends::known(&control, &written)) {
        if !eos_ids.contains(&id) {
            eos_ids.push(id);
        }
    }
    let normalizes = inner.get_normalizer().is_some();
    // A private character, for which vocabularies have no piece.
    let unknown = guarded(|| inner.get_model().tokenize("\u{10fffd}")).unwrap_or_default();
    let mut unknown_ids: Vec<u32> = unknown.into_iter().map(|token| token.id).collect();
    unknown_ids.retain(|id| control.iter().any(|c| c.id == *id));
    // The vocabulary may hold a token, so that what is normalized becomes it without being looked for.
    let model_makes = |c: &Control| {
        let made = guarded(|| inner.get_model().tokenize(&c.text)).unwrap_or_default();
        made.iter().any(|token| token.id == c.id) && !unknown_ids.contains(&c.id)
    };
    let control_as_typed = !normalizes || !control.iter().any(|c| added[&c.id].normalized || model_makes(c));
    let n_ids = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    let (begins, _) = adds(&inner, bos_id, None)?;
    Ok(Tokenizer {
        control,
        unknown_ids,
        n_ids,
        unk_token: named.unk,
        model_max_length: named.model_max_length,
        adds_asked: named.adds_asked,
        bos_token: named.bos,
        eos_token,
        pad_token: named.pad,
        bos_id,
        pad_id,
        eos_id,
        eos_ids,
        end_of_turn,
        notes: named.notes,
        add_bos: begins,
        chat_template: named.chat_template,
        named_templates: named.named_templates,
        inner,
        as_text: OnceLock::new(),
        control_as_typed,
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

/// Longest text that is encoded, in bytes: each takes some 200 of memory meanwhile. No context is as long.
const ENCODED_BYTES_MAX: usize = 4 << 20;

fn check_length(text: &str) -> Result<()> {
    let len = text.len();
    ensure!(
        len <= ENCODED_BYTES_MAX,
        "a text of {len} bytes is too long to be made tokens of, at most {ENCODED_BYTES_MAX} are"
    );
    Ok(())
}

/// The small files around `tokenizer.json`; `Null` for those that are not there.
#[derive(Default)]
struct Files {
    config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    model_config: Value,
    chat_template: Option<String>,
    named_templates: BTreeMap<String, String>,
}

impl Files {
    /// The chat template, and those with names.
    fn templates(&self) -> Result<(Option<String>, BTreeMap<String, String>)> {
        let mut named = self.named_templates.clone();
        // As in transformers, a file of this name comes before `chat_template.jinja`.
        let default = named.remove(DEFAULT).or_else(|| self.chat_template.clone());
        Ok(match (default, named.is_empty()) {
            // As in transformers, files come in the place of all that `tokenizer_config.json` has.
            (Some(template), _) => (Some(template), named),
            (None, false) => (listed_templates(&self.config["chat_template"])?.0, named),
            (None, true) => listed_templates(&self.config["chat_template"])?,
        })
    }
}

/// Directory of the templates that have names, in a Hugging Face directory.
pub const TEMPLATES_DIR: &str = "additional_chat_templates";

/// The name of the template that needs none.
const DEFAULT: &str = "default";

/// The file of a directory that holds its chat template, or the one of that name; the directory itself where no file is for that alone.
pub(crate) fn template_file(dir: &Path, name: Option<&str>) -> PathBuf {
    let named = dir.join(TEMPLATES_DIR).join(format!("{}.jinja", name.unwrap_or(DEFAULT)));
    let plain = name.is_none().then(|| dir.join("chat_template.jinja"));
    std::iter::once(named).chain(plain).find(|file| file.exists()).unwrap_or_else(|| dir.to_owned())
}

/// Most templates with names; published models have three.
const TEMPLATES_MAX: usize = 64;

/// Largest `tokenizer.json`, and largest of the files around it, in bytes. Published ones have 35 MB at most.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
const SMALL_BYTES_MAX: u64 = 16 << 20;

fn read_if_there(path: &Path) -> Result<Option<String>> {
    let there = is_named(path)?;
    there.then(|| read_text(path, SMALL_BYTES_MAX)).transpose()
}

/// The files `NAME.jinja` of a directory, which may be missing.
fn read_named_templates(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    if !dir.is_dir() {
        return Ok(templates);
    }
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry.with_context(|| dir.display().to_string())?.path();
        let name =
            path.file_stem().and_then(|name| name.to_str()).filter(|_| path.extension().is_some_and(|e| e == "jinja"));
        if let (Some(name), Some(template)) = (name, read_if_there(&path)?) {
            templates.insert(name.to_owned(), template);
            ensure!(
                templates.len() <= TEMPLATES_MAX,
                "{}: has more than {TEMPLATES_MAX} chat templates",
                dir.display()
            );
        }
    }
    Ok(templates)
}

fn read_json(path: &Path) -> Result<Value> {
    let Some(text) = read_if_there(path)? else {
        return Ok(Value::Null);
    };
    parse_object(path, &text)
}

/// Texts that a tokenizer is tried with: what its parts do not agree on shows when they run.
const TRIALS: [&str; 4] =
    ["", "a 1\n<é", "The  quick (brown) fox\t§ 12345 日本語 🦊e\u{301}", "<|im_start|>user\nhello<|im_end|>"];
/// Most tokens for each byte of a text that is tried, and those that stand around it.
const TRIAL_TOKENS_MAX: usize = 100;

fn read_tokenizer_json(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
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

/// Encodes and decodes short texts.
fn try_out(inner: &tokenizers::Tokenizer) -> Result<()> {
    for text in TRIALS {
        let ids = guarded(|| inner.encode(text, true))?.get_ids().to_vec();
        let most = TRIAL_TOKENS_MAX * (text.len() + 1);
        ensure!(ids.len() <= most, "it makes {} tokens of {text:?}, at most {most} are allowed", ids.len());
        guarded(|| inner.decode(&ids, true))?;
    }
    Ok(())
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

/// A template, or the one named "default" of a list and the others by name.
fn listed_templates(value: &Value) -> Result<(Option<String>, BTreeMap<String, String>)> {
    match value {
        Value::Null => Ok((None, BTreeMap::new())),
        Value::String(template) => Ok((Some(template.clone()), BTreeMap::new())),
        Value::Array(templates) => {
            let entry =
                |entry: &Value| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()));
            let mut named: BTreeMap<String, String> = templates.iter().filter_map(entry).collect();
            let default = named.remove(DEFAULT).with_context(|| {
                let names: Vec<&String> = named.keys().collect();
                format!(
                    "tokenizer_config.json: chat_template has {names:?} but no \"default\"; \
                     write the one to use to chat_template.jinja"
                )
            })?;
            check_names(&named).context("tokenizer_config.json: chat_template")?;
            Ok((Some(default), named))
        }
        _ => bail!("tokenizer_config.json: chat_template is neither a string nor a list"),
    }
}

/// Checks that templates can be files of their names: that is how they are written.
fn check_names(named: &BTreeMap<String, String>) -> Result<()> {
    let plain = |name: &&String| {
        let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(known)
    };
    ensure!(named.len() <= TEMPLATES_MAX, "has more than {TEMPLATES_MAX} chat templates");
    match named.keys().find(|name| !plain(name)) {
        Some(name) => bail!("the name {name:?} cannot be that of a file"),
        None => Ok(()),
    }
}
