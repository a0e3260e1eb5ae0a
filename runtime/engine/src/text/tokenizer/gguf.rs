//! The tokenizer that a GGUF file's metadata describes.
//!
//! The file holds pieces, merges or scores, and the name of a pre-tokenizer; here they become the pipeline that the
//! model's own `tokenizer.json` describes. What is not known is refused by name: a pipeline that is nearly right trains
//! on other tokens than the model knows, silently.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::Tokenizer;
use super::assemble::{Named, add_bos_and_eos, assemble, part};
use super::check::ADDED_BYTES_MAX;
use super::library::try_out;
use super::templates::{DEFAULT, check_names};
use crate::files::gguf::Gguf;

impl Tokenizer {
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
        let meta = Meta::read(gguf)?;
        from_meta(&meta).with_context(|| gguf.path().display().to_string())
    }
}

/// What a GGUF file says about its tokenizer; ids and lengths are not checked yet.
#[derive(Clone)]
pub(super) struct Meta<'a> {
    pub(super) architecture: Option<&'a str>,
    pub(super) model: Option<&'a str>,
    pub(super) pre: Option<&'a str>,
    pub(super) tokens: &'a [String],
    /// Empty when absent, as are `types` and `merges`.
    pub(super) scores: &'a [f32],
    pub(super) types: Vec<i64>,
    pub(super) merges: &'a [String],
    pub(super) bos: Option<u64>,
    pub(super) eos: Option<u64>,
    pub(super) eot: Option<u64>,
    pub(super) eom: Option<u64>,
    pub(super) unk: Option<u64>,
    pub(super) pad: Option<u64>,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    pub(super) add_space_prefix: Option<bool>,
    pub(super) chat_template: Option<&'a str>,
    pub(super) named_templates: BTreeMap<String, String>,
    pub(super) context_length: Option<u64>,
}

impl<'a> Meta<'a> {
    pub(super) fn read(gguf: &'a Gguf) -> Result<Self> {
        let architecture = gguf.str("general.architecture")?;
        let context_length = format!("{}.context_length", architecture.unwrap_or_default());
        let named_template = |name: &String| -> Result<Option<(String, String)>> {
            let template = gguf.str(&format!("tokenizer.chat_template.{name}"))?;
            Ok(template.map(|template| (name.clone(), template.to_owned())))
        };
        let names = gguf.strings("tokenizer.chat_templates")?.unwrap_or_default();
        let named_templates =
            names.iter().filter_map(|name| named_template(name).transpose()).collect::<Result<_>>()?;
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
            named_templates,
            context_length: gguf.u64(&context_length)?,
        })
    }
}

/// Values of `tokenizer.ggml.token_type`, from `llama_token_type` in llama.cpp's `llama.h`.
pub(super) const NORMAL: i64 = 1;
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;
pub(super) const BYTE: i64 = 6;

/// The pieces of a GGUF file, checked.
pub(super) struct Pieces<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    /// Each piece once.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Pieces<'a> {
    pub(super) fn read(meta: &Meta<'a>) -> Result<Self> {
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

pub(super) fn from_meta(meta: &Meta) -> Result<Tokenizer> {
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

    let mut notes = Vec::new();
    let pipeline = match meta.model {
        Some("gpt2") => byte_level(meta, &pieces, &mut notes)?,
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
    let bytes: usize = added.iter().map(|token| token.content.len()).sum();
    ensure!(
        bytes <= ADDED_BYTES_MAX,
        "tokenizer.ggml.tokens: those that are control or user-defined have {bytes} bytes, at most {ADDED_BYTES_MAX} are read"
    );
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
    try_out(&inner)?;
    let mut named_templates = meta.named_templates.clone();
    let default = named_templates.remove(DEFAULT);
    check_names(&named_templates).context("tokenizer.chat_templates")?;
    assemble(
        inner,
        Named {
            bos: bos.map(token).map(str::to_owned),
            eos: eos.map(token).map(str::to_owned),
            pad: pad.map(token).map(str::to_owned),
            unk: unk.map(token).map(str::to_owned),
            more_eos_ids: [eot, eom].into_iter().flatten().collect(),
            chat_template: meta.chat_template.map(str::to_owned).or(default),
            adds_asked: [None; 2],
            named_templates,
            model_max_length: meta.context_length,
            notes,
        },
    )
}

/// Byte-level BPE: bytes spelled as visible characters, merged in the order of the file.
///
/// A file that does not name its pre-tokenizer, as converters did before 2024-05, is taken by its vocabulary if that is a published
/// one; `notes` says what was taken.
fn byte_level(meta: &Meta, pieces: &Pieces, notes: &mut Vec<String>) -> Result<Pipeline> {
    ensure!(!meta.merges.is_empty(), "tokenizer.ggml.merges: is missing or empty");
    let pre = meta.pre.unwrap_or_else(|| {
        let known = by_vocabulary(pieces);
        notes.push(match known {
            Some(name) => format!("tokenizer.ggml.pre is missing; the vocabulary is that of {name:?}, which is taken"),
            None => "tokenizer.ggml.pre is missing, so text is cut into words as for GPT-2, and if the model knows others it \
                     reads and answers worse; convert it again with a llama.cpp of today, or use its directory with \
                     tokenizer.json"
                .to_owned(),
        });
        known.unwrap_or("default")
    });
    let pre = PreTokenizer::named(pre)?;
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
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// GPT-2's regular expression, which is the library's own.
    Gpt2,
    /// Each digit alone, then GPT-2's.
    Digits,
    Regex(&'static str),
}

/// What a name in `tokenizer.ggml.pre` stands for.
pub(super) struct PreTokenizer {
    /// The names that are one kind in llama.cpp's `llama-vocab.cpp`; a file that is written has the first.
    pub(super) names: &'static [&'static str],
    pub(super) split: Split,
    /// A word that is a piece as it stands is taken whole, though no merges lead to it.
    pub(super) ignore_merges: bool,
    /// Unicode normalisation before everything else.
    nfc: bool,
    add_bos: bool,
    /// Whether files of this kind are read: others have models with a normalizer that a GGUF file does not tell of.
    is_read: bool,
}

/// Of Llama 3's `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Of Qwen2's: Llama 3's with each digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Of Mistral Nemo's: words also end where lower case turns to upper.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Of GPT-4o's, which Phi-4-mini has.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: PreTokenizer =
    PreTokenizer { names: &[], split: Split::Gpt2, ignore_merges: false, nfc: false, add_bos: false, is_read: true };

/// The one table of them, for reading and for writing.
pub(super) const PRE_TOKENIZERS: [PreTokenizer; 7] = [
    PreTokenizer { names: &["gpt-2", "default", "phi-2", "mellum", "a.x-4.0"], ..PLAIN },
    PreTokenizer { names: &["smollm", "starcoder"], split: Split::Digits, ..PLAIN },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "megrez"],
        split: Split::Regex(QWEN2),
        nfc: true,
        ..PLAIN
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        split: Split::Regex(LLAMA3),
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    PreTokenizer { names: &["tekken"], split: Split::Regex(TEKKEN), ignore_merges: true, add_bos: true, ..PLAIN },
    // OLMo 2's, Phi-4's and Granite 4's.
    PreTokenizer { names: &["dbrx"], split: Split::Regex(LLAMA3), is_read: false, ..PLAIN },
    PreTokenizer { names: &["gpt-4o"], split: Split::Regex(O200K), is_read: false, ..PLAIN },
];

impl PreTokenizer {
    fn named(name: &str) -> Result<&'static Self> {
        let known = PRE_TOKENIZERS.iter().find(|kind| kind.is_read && kind.names.contains(&name));
        known.with_context(|| {
            format!(
                "tokenizer.ggml.pre: {name:?} is not supported; default, gpt-2, smollm, starcoder, \
                 qwen2, llama-bpe and tekken are; use the model's directory with its tokenizer.json"
            )
        })
    }
}

/// What tells a published vocabulary, tokens with their ids, and what it is cut by. In this order: GPT-2, SmolLM and SmolLM2,
/// StarCoder and StarCoder 2, Qwen2 and what was distilled into it, Llama 3, Mistral Nemo.
const VOCABULARIES: [(&[(&str, u32)], &str); 7] = [
    (&[("Ġthe", 262), ("<|endoftext|>", 50_256)], "gpt-2"),
    (&[("<|endoftext|>", 0), ("<|im_start|>", 1), ("<repo_name>", 3)], "smollm"),
    (&[("<|endoftext|>", 0), ("<fim_prefix>", 1)], "starcoder"),
    (&[("Ġthe", 279), ("<|endoftext|>", 151_643)], "qwen2"),
    (&[("Ġthe", 279), ("<｜end▁of▁sentence｜>", 151_643)], "qwen2"),
    (&[("Ġthe", 279), ("<|begin_of_text|>", 128_000)], "llama-bpe"),
    (&[("[INST]", 3), ("[AVAILABLE_TOOLS]", 5)], "tekken"),
];

/// The pre-tokenizer of a published vocabulary.
fn by_vocabulary(pieces: &Pieces) -> Option<&'static str> {
    let has = |(token, id): &(&str, u32)| pieces.ids.get(token) == Some(id);
    VOCABULARIES.iter().find(|(tokens, _)| tokens.iter().all(has)).map(|(_, name)| *name)
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
pub(super) fn merges_from_scores(scores: &[f32], pieces: &Pieces) -> Result<Vec<(String, String)>> {
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
