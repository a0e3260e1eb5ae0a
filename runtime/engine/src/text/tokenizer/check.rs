//! What a `tokenizer.json` may ask for, checked before the library builds or runs it.
//!
//! The library trusts the file: it makes room for lengths that are written there, and carries out whatever chain of
//! steps is described on every text. A file of a few bytes can ask for gigabytes, or for a text to grow a millionfold,
//! and running out of memory cannot be caught. So each step's size, and how much all may make a text grow, is bounded
//! here. The bounds are far from what published tokenizers use.
//!
//! Sources: the parts' forms in the `tokenizers` crate, version 0.23; `spm_precompiled`, version 0.1, for the charsmap.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::de::{self, IgnoredAny};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Most steps of a chain: normalizers, pre-tokenizers, decoders, or pieces of a template.
const STEPS_MAX: usize = 64;
/// Most chains within chains.
const DEPTH_MAX: usize = 8;
/// Most times longer that all replacements together may make a text.
const GROWTH_MAX: usize = 64;
/// Longest text of a step: what is prepended, put in place of something, or looked for, in bytes.
const TEXT_MAX: usize = 1024;
/// Most bytes that are put before a text: it is taken apart at added tokens, and each part gets them.
const PREPENDED_MAX: usize = 64;
/// Most steps that write into each part of a text: ByteLevel, Metaspace and charsmaps. Published files have one.
const WRITERS_MAX: usize = 2;
/// Most characters of a word that WordPiece looks for pieces of, in time that grows with their cube. BERT has 100.
const WORD_MAX: u64 = 200;
/// Longest piece of a Unigram vocabulary, in bytes: each place of a text is compared with all pieces that begin there.
/// SentencePiece makes pieces of 16 characters.
const PIECE_MAX: usize = 256;
/// Longest regular expression, in bytes. GPT-4o's has some 400.
const REGEX_MAX: usize = 16 << 10;
/// Most repetitions that the counts of a regular expression come to, multiplied.
const REPEATS_MAX: usize = 10_000;
/// The same where the expression looks around: its parts are tried anew at each place of a text.
const TRIED_REPEATS_MAX: usize = 256;
/// Longest part of a regular expression that looks around, in bytes.
const AROUND_MAX: usize = 512;
/// Longest replacement in a charsmap, in bytes. The longest that Unicode knows has 33.
const CHARSMAP_TEXT_MAX: usize = 256;
/// Most added tokens, and the longest, in bytes.
const ADDED_MAX: usize = 200_000;
/// Most bytes of all added tokens, as long as the normalizers may make them. Finding them takes 100 times as much memory.
pub(super) const ADDED_BYTES_MAX: usize = 2 << 20;
/// Ids end here: the largest vocabularies have some 260,000, and tables of them have a place for each id up to the largest.
const ID_MAX: u32 = 1 << 21;

/// The parts of a `tokenizer.json` beside its model.
#[derive(Deserialize)]
pub(super) struct Parts {
    #[serde(default)]
    pub added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Model,
}

/// What matters here of a model.
#[derive(Default, Deserialize)]
struct Model {
    max_input_chars_per_word: Option<u64>,
    #[serde(default)]
    vocab: Pieces,
}

/// What matters of a vocabulary.
#[derive(Default)]
struct Pieces {
    /// The longest piece of one that is a list of pieces and scores, as Unigram's is.
    bytes_max: usize,
    /// The largest id of one that is a map from pieces to ids: whoever writes the tokenizer again goes through all ids below it.
    id_max: u64,
}

impl<'de> Deserialize<'de> for Pieces {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Pieces;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut pieces: A) -> std::result::Result<Pieces, A::Error> {
                let mut bytes_max = 0;
                while let Some((piece, _)) = pieces.next_element::<(String, IgnoredAny)>()? {
                    bytes_max = bytes_max.max(piece.len());
                }
                Ok(Pieces { bytes_max, id_max: 0 })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut pieces: A) -> std::result::Result<Pieces, A::Error> {
                let mut id_max = 0;
                while let Some((_, id)) = pieces.next_entry::<IgnoredAny, u64>()? {
                    id_max = id_max.max(id);
                }
                Ok(Pieces { bytes_max: 0, id_max })
            }

            fn visit_unit<E>(self) -> std::result::Result<Pieces, E> {
                Ok(Pieces::default())
            }
        }
        from.deserialize_any(Visitor)
    }
}

/// An added token as it is listed.
#[derive(Deserialize)]
pub(super) struct Added {
    pub id: u32,
    pub content: String,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

impl Parts {
    /// Reads and checks the parts.
    ///
    /// # Errors
    /// When the file is no JSON of that form, or asks for more than is given. Names the part.
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let parts: Self = serde_json::from_slice(bytes)?;
        parts.check_each_added()?;
        let word = parts.model.max_input_chars_per_word.unwrap_or(0);
        ensure!(word <= WORD_MAX, "model: max_input_chars_per_word is {word}, at most {WORD_MAX} are tried");
        let piece = parts.model.vocab.bytes_max;
        ensure!(piece <= PIECE_MAX, "model: its vocab has a piece of {piece} bytes, at most {PIECE_MAX} are read");
        let id = parts.model.vocab.id_max;
        ensure!(id < u64::from(ID_MAX), "model: its vocab has the id {id}, ids end at {ID_MAX}");
        let mut chain = Chain::default();
        chain.steps("normalizer", &parts.normalizer, 0)?;
        parts.check_added_together(&chain)?;
        // Each pre-tokenizer works on what the normalizers made of a text.
        chain.steps = 0;
        chain.steps("pre_tokenizer", &parts.pre_tokenizer, 0)?;
        Chain::default().steps("decoder", &parts.decoder, 0)?;
        Chain::default().steps("post_processor", &parts.post_processor, 0)?;
        Ok(parts)
    }

    fn check_each_added(&self) -> Result<()> {
        let n = self.added_tokens.len();
        ensure!(n <= ADDED_MAX, "added_tokens: has {n}, at most {ADDED_MAX} are read");
        for (at, token) in self.added_tokens.iter().enumerate() {
            let bytes = token.content.len();
            ensure!(bytes <= TEXT_MAX, "added_tokens: number {at} has {bytes} bytes, at most {TEXT_MAX} are read");
            ensure!(token.id < ID_MAX, "added_tokens: {:?} has id {}, ids end at {ID_MAX}", token.content, token.id);
            // White space is looked for on both sides of each one found, in white space too.
            ensure!(
                !((token.lstrip || token.rstrip) && token.content.trim().is_empty()),
                "added_tokens: number {at} is white space and takes in the white space around it"
            );
        }
        Ok(())
    }

    fn check_added_together(&self, normalizers: &Chain) -> Result<()> {
        let bytes = |token: &Added| match token.normalized {
            true => token.content.len().saturating_mul(normalizers.growth) + normalizers.prepended,
            false => token.content.len(),
        };
        let bytes: usize = self.added_tokens.iter().map(bytes).sum();
        ensure!(
            bytes <= ADDED_BYTES_MAX,
            "added_tokens: have {bytes} bytes when they are normalized, at most {ADDED_BYTES_MAX} are read"
        );
        Ok(())
    }
}

/// What the steps so far come to.
struct Chain {
    steps: usize,
    growth: usize,
    prepended: usize,
    writers: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Self { steps: 0, growth: 1, prepended: 0, writers: 0 }
    }
}

impl Chain {
    /// Checks a step, or a chain of them. `part` is the key that it stands under.
    fn steps(&mut self, part: &str, step: &Value, depth: usize) -> Result<()> {
        if step.is_null() {
            return Ok(());
        }
        ensure!(depth <= DEPTH_MAX, "{part}: has chains in one another, at most {DEPTH_MAX} deep");
        self.steps += 1;
        ensure!(self.steps <= STEPS_MAX, "{part}: has more than {STEPS_MAX} steps");
        let kind = step["type"].as_str().unwrap_or_default();
        let within = format!("{part}: {kind}");
        for key in ["normalizers", "pretokenizers", "decoders", "processors"] {
            for inner in step[key].as_array().into_iter().flatten() {
                self.steps(part, inner, depth + 1)?;
            }
        }
        for key in ["prepend", "content", "replacement", "prefix", "suffix", "pad_token", "word_delimiter_token"] {
            let bytes = step[key].as_str().map_or(0, str::len);
            ensure!(bytes <= TEXT_MAX, "{within}: its {key} has {bytes} bytes, at most {TEXT_MAX} are read");
        }
        for key in ["start", "stop"] {
            let n = step[key].as_u64().unwrap_or(0);
            ensure!(n <= TEXT_MAX as u64, "{within}: its {key} is {n}, at most {TEXT_MAX} are cut");
        }
        ensure!(step["length"].as_u64() != Some(0), "{within}: its length is 0");
        let mut shortest = 1;
        match &step["pattern"] {
            Value::String(text) => check_text(text).with_context(|| within.clone())?,
            pattern => {
                if let Some(text) = pattern["String"].as_str() {
                    check_text(text).with_context(|| within.clone())?;
                    shortest = text.len();
                }
                if let Some(regex) = pattern["Regex"].as_str() {
                    check_regex(regex).with_context(|| within.clone())?;
                }
            }
        }
        match kind {
            "Replace" => self.grow(&within, step["content"].as_str().map_or(0, str::len).div_ceil(shortest))?,
            "Prepend" => {
                self.prepended += step["prepend"].as_str().map_or(0, str::len);
                let n = self.prepended;
                ensure!(n <= PREPENDED_MAX, "{within}: {n} bytes are prepended, at most {PREPENDED_MAX} are allowed");
            }
            "Precompiled" => {
                let charsmap = step["precompiled_charsmap"].as_str().unwrap_or_default();
                let longest = check_charsmap(charsmap).with_context(|| within.clone())?;
                self.write(&within)?;
                // Characters with long replacements have several bytes and are few.
                self.grow(&within, longest.div_ceil(8))?;
            }
            // A byte becomes a character of up to two, and each piece may get a space, which later steps part from it.
            "ByteLevel" | "Metaspace" if matches!(part, "normalizer" | "pre_tokenizer") => {
                self.write(&within)?;
                self.grow(&within, 2)?;
            }
            "TemplateProcessing" => check_template(step).context(within)?,
            _ => {}
        }
        Ok(())
    }

    fn write(&mut self, within: &str) -> Result<()> {
        self.writers += 1;
        ensure!(self.writers <= WRITERS_MAX, "{within}: at most {WRITERS_MAX} steps of this kind are allowed");
        Ok(())
    }

    fn grow(&mut self, within: &str, times: usize) -> Result<()> {
        self.growth = self.growth.saturating_mul(times.max(1));
        ensure!(
            self.growth <= GROWTH_MAX,
            "{within}: makes a text up to {} times longer with the steps before it, at most {GROWTH_MAX} are allowed",
            self.growth
        );
        Ok(())
    }
}

fn check_text(text: &str) -> Result<()> {
    ensure!(!text.is_empty(), "its pattern is empty, which is found everywhere");
    ensure!(text.len() <= TEXT_MAX, "its pattern has {} bytes, at most {TEXT_MAX} are read", text.len());
    Ok(())
}

/// Checks a regular expression of the `fancy-regex` crate. What looks around or back is matched by trying, which takes
/// exponential time where repetitions stand in one another; all else takes time in proportion to its size.
fn check_regex(regex: &str) -> Result<()> {
    ensure!(!regex.is_empty(), "its pattern is empty, which is found everywhere");
    ensure!(regex.len() <= REGEX_MAX, "its pattern has {} bytes, at most {REGEX_MAX} are read", regex.len());
    let bytes = regex.as_bytes();
    let (mut repeats, mut nested, mut tries) = (1usize, false, false);
    // For each open group: whether something in it repeats without end. The last is what was closed just now.
    let (mut open, mut closed) = (vec![false], false);
    // How many groups were open where each part that looks around began, and where the outermost did. What is in them
    // is tried anew at each place of a text, to the end of what repeats without end.
    let (mut around, mut around_start) = (Vec::new(), 0);
    let (mut around_unbounded, mut behind_unbounded) = (0, false);
    let (mut at, mut class) = (0, 0usize);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let mut after_group = false;
        let mut unbounded = false;
        let mut len = 1;
        match rest[0] {
            b'\\' => {
                len = 2;
                // References to groups, and `\G`, `\K` and `\b{…}` kin.
                tries |= class == 0 && matches!(rest.get(1), Some(b'1'..=b'9' | b'k' | b'g' | b'G' | b'K'));
            }
            b'[' => class += 1,
            b']' => class = class.saturating_sub(1),
            _ if class > 0 => {}
            b'(' => {
                ensure!(open.len() <= 100, "its pattern has groups in one another, at most 100 deep");
                let looks = [&b"(?="[..], b"(?!", b"(?<=", b"(?<!"];
                if looks.iter().any(|look| rest.starts_with(look)) {
                    if around.is_empty() {
                        (around_start, around_unbounded) = (at, 0);
                    }
                    around.push((open.len(), rest[2] == b'<'));
                }
                open.push(false);
                let trying = [&b"(?="[..], b"(?!", b"(?<=", b"(?<!", b"(?>", b"(?(", b"(?P=", b"(?P>", b"(?&", b"(?R"];
                tries |= trying.iter().any(|trying| rest.starts_with(trying));
            }
            b')' => {
                closed = open.pop().unwrap_or(false);
                if open.is_empty() {
                    open.push(false);
                }
                if closed {
                    *open.last_mut().expect("one is always open") = true;
                }
                if around.last().is_some_and(|(groups, _)| *groups >= open.len()) {
                    around.pop();
                    let bytes = at - around_start;
                    ensure!(
                        bytes <= AROUND_MAX,
                        "its pattern looks around for a pattern of {bytes} bytes, at most {AROUND_MAX} are allowed"
                    );
                }
                after_group = true;
            }
            // Alternatives are tried in turn, too.
            b'|' => *open.last_mut().expect("one is always open") = open.len() > 1,
            b'*' | b'+' => unbounded = true,
            b'{' => {
                if let Some((most, endless, end)) = count(rest) {
                    repeats = repeats.saturating_mul(most.max(1));
                    unbounded = endless || most > 16;
                    len = end;
                }
            }
            _ => {}
        }
        if unbounded {
            around_unbounded += usize::from(!around.is_empty());
            behind_unbounded |= around.iter().any(|(_, behind)| *behind);
            let most = if behind_unbounded { 0 } else { 1 };
            ensure!(
                around_unbounded <= most,
                "its pattern repeats where it looks around, which takes for ever on some texts; at most one repetition \
                 ahead is allowed"
            );
            nested |= closed;
            // Possessive ones give nothing back.
            match bytes.get(at + len) {
                Some(b'+') => {
                    len += 1;
                    tries = true;
                }
                Some(b'?') => len += 1,
                _ => {}
            }
            *open.last_mut().expect("one is always open") = true;
        }
        closed &= after_group;
        at += len;
    }
    ensure!(repeats <= REPEATS_MAX, "its pattern repeats up to {repeats} times, at most {REPEATS_MAX} are allowed");
    ensure!(
        !tries || repeats <= TRIED_REPEATS_MAX,
        "its pattern looks around and repeats up to {repeats} times, at most {TRIED_REPEATS_MAX} are allowed"
    );
    if tries && nested {
        bail!("its pattern repeats what repeats and looks around, which takes for ever on some texts");
    }
    Ok(())
}

/// Reads `{2,5}`: the most, whether there is none, and its length.
fn count(rest: &[u8]) -> Option<(usize, bool, usize)> {
    let end = rest.iter().position(|c| *c == b'}')?;
    let inner = std::str::from_utf8(&rest[1..end]).ok()?;
    let number = |text: &str| -> Option<usize> {
        let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(usize::MAX))
    };
    let (least, most) = inner.split_once(',').unwrap_or((inner, inner));
    let least = if least.is_empty() { 0 } else { number(least.trim())? };
    match most.trim() {
        "" => Some((least, true, end + 1)),
        most => Some((number(most)?.max(least), false, end + 1)),
    }
}

/// Checks SentencePiece's normalisation table: the length of a trie, the trie, and replacements with NUL behind each.
/// Returns the length of the longest.
fn check_charsmap(base64: &str) -> Result<usize> {
    let bytes = decode_base64(base64).context("its charsmap is not base64")?;
    let (head, rest) = bytes.split_first_chunk::<4>().context("its charsmap is cut short")?;
    let trie = u32::from_le_bytes(*head) as usize;
    ensure!(trie >= 4 && trie.is_multiple_of(4), "its charsmap has a trie of {trie} bytes");
    ensure!(trie <= rest.len(), "its charsmap has a trie of {trie} bytes, {} are there", rest.len());
    let (_, texts) = rest.split_at(trie);
    let longest = texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    ensure!(
        longest <= CHARSMAP_TEXT_MAX,
        "its charsmap puts up to {longest} bytes in place of a character, at most {CHARSMAP_TEXT_MAX} are allowed"
    );
    Ok(longest)
}

/// Standard base64; `None` for what is none.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut n_bits) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
            bits &= (1 << n_bits) - 1;
        }
    }
    Some(bytes)
}

/// Checks a template of special tokens around sequences: each text once a side, and few ids.
fn check_template(step: &Value) -> Result<()> {
    for side in ["single", "pair"] {
        // Written as pieces or, in short, as "[CLS] $A [SEP]".
        let pieces: Vec<bool> = match &step[side] {
            Value::String(text) => text.split_whitespace().map(|piece| piece.starts_with('$')).collect(),
            Value::Array(pieces) => pieces
                .iter()
                .map(|piece| piece.get("Sequence").is_some() || piece.as_str().is_some_and(|p| p.starts_with('$')))
                .collect(),
            _ => Vec::new(),
        };
        let texts = pieces.iter().filter(|is_text| **is_text).count();
        ensure!(pieces.len() <= STEPS_MAX, "its {side} has {} pieces, at most {STEPS_MAX} are read", pieces.len());
        ensure!(texts <= 2, "its {side} has its text {texts} times, at most twice is allowed");
    }
    let ids = |token: &Value| token["ids"].as_array().map_or(0, Vec::len);
    let longest = match &step["special_tokens"] {
        Value::Object(tokens) => tokens.values().map(ids).max(),
        Value::Array(tokens) => tokens.iter().map(ids).max(),
        _ => None,
    };
    let longest = longest.unwrap_or(0);
    ensure!(longest <= STEPS_MAX, "a special token of it stands for {longest} ids, at most {STEPS_MAX} are allowed");
    Ok(())
}
