//! A tokenizer as the keys of a GGUF file, as llama.cpp reads them: the way back of [`gguf`](super::gguf), by the same names.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Tokenizer;
use super::assemble::adds;
use super::gguf::{BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, Split, UNKNOWN, UNUSED, USER_DEFINED};
use crate::files::gguf::{Array, Value as Entry};

/// Where a tokenizer that has no form in a GGUF file can go instead.
const INSTEAD: &str = "so it has no form in a GGUF file that is known here; export `merged`";

impl Tokenizer {
    /// The keys `tokenizer.*` of a model with so many embeddings. Tokens beyond them have no place there; embeddings without a token are
    /// named `[PADn]`.
    ///
    /// # Errors
    /// When llama.cpp has no tokenizer like it, as far as is known here: what is nearly right is not written.
    pub fn gguf_keys(&self, embeddings: usize) -> Result<Vec<(String, Entry)>> {
        let json: Value = serde_json::from_str(&self.to_json()?).context("a tokenizer is JSON")?;
        let model = &json["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        ensure!(kind == "BPE", "the tokenizer is of type {kind}, {INSTEAD}");
        let sentencepiece = model["byte_fallback"] == true;
        check_normalizer(&json, sentencepiece)?;
        check_added(&json)?;
        let merges = merges(model)?;
        let mut keys = vec![text("tokenizer.ggml.model", if sentencepiece { "llama" } else { "gpt2" })];
        let pre = if sentencepiece { "default" } else { pre_tokenizer(&json)? };
        keys.push(text("tokenizer.ggml.pre", pre));

        let (tokens, types) = self.tokens(&json, embeddings, sentencepiece)?;
        let merges: Vec<(String, String)> = merges.into_iter().filter(|(a, b)| fits(&tokens, a, b)).collect();
        if sentencepiece {
            let scores = scores(&tokens.list, &merges);
            keys.push(("tokenizer.ggml.scores".to_owned(), Entry::Array(Array::F32(scores))));
            keys.push(flag("tokenizer.ggml.add_space_prefix", begins_with_space(&json)));
        } else {
            let merges = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
            keys.push(("tokenizer.ggml.merges".to_owned(), Entry::Array(Array::String(merges))));
        }
        keys.push(("tokenizer.ggml.tokens".to_owned(), Entry::Array(Array::String(tokens.list))));
        keys.push(("tokenizer.ggml.token_type".to_owned(), Entry::Array(Array::I32(types))));

        let (begins, ends) = adds(&self.inner, self.bos_id, self.eos_id)?;
        keys.push(flag("tokenizer.ggml.add_bos_token", begins));
        keys.push(flag("tokenizer.ggml.add_eos_token", ends));
        // llama.cpp has two names for further ends of an answer.
        let mut further = self.eos_ids.iter().copied().filter(|id| Some(*id) != self.eos_id);
        let named = [
            ("bos", self.bos_id),
            ("eos", self.eos_id),
            ("padding", self.pad_id),
            ("unknown", self.unk_token.as_ref().and_then(|token| self.id(token))),
            ("eot", further.next()),
            ("eom", further.next()),
        ];
        for (name, id) in named {
            let id = id.filter(|id| (*id as usize) < embeddings);
            keys.extend(id.map(|id| (format!("tokenizer.ggml.{name}_token_id"), Entry::U32(id))));
        }
        if let Some(template) = &self.chat_template {
            keys.push(text("tokenizer.chat_template", template));
        }
        if !self.named_templates.is_empty() {
            let names = self.named_templates.keys().cloned().collect();
            keys.push(("tokenizer.chat_templates".to_owned(), Entry::Array(Array::String(names))));
            keys.extend(
                self.named_templates
                    .iter()
                    .map(|(name, template)| text(&format!("tokenizer.chat_template.{name}"), template)),
            );
        }
        Ok(keys)
    }

    /// Tokens by id, and their types.
    fn tokens(&self, json: &Value, embeddings: usize, sentencepiece: bool) -> Result<(Tokens, Vec<i32>)> {
        let mut list: Vec<String> = (0..embeddings).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![UNUSED as i32; embeddings];
        for (token, id) in self.inner.get_vocab(false) {
            let Some(place) = list.get_mut(id as usize) else { continue };
            let byte = sentencepiece && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            types[id as usize] = if byte { BYTE as i32 } else { NORMAL as i32 };
            *place = token;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let (Some(content), Some(id)) = (added["content"].as_str(), added["id"].as_u64()) else {
                bail!("an added token has no content or no id")
            };
            let id = usize::try_from(id).unwrap_or(usize::MAX);
            let Some(place) = list.get_mut(id) else { continue };
            let control = added["special"] == true || looks_special(content);
            let unknown = sentencepiece && self.unk_token.as_deref() == Some(content);
            types[id] = if unknown {
                UNKNOWN
            } else if control {
                CONTROL
            } else {
                USER_DEFINED
            } as i32;
            // llama.cpp looks for these in the text as it is typed.
            let typed = sentencepiece && !control;
            *place = if typed { content.replace('▁', " ") } else { content.to_owned() };
        }
        let mut ids = HashMap::with_capacity(list.len());
        for (id, token) in list.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone(), id) {
                bail!("tokens {first} and {id} are both {token:?}, {INSTEAD}");
            }
        }
        Ok((Tokens { list, ids }, types))
    }
}

/// Tokens by id, and their ids.
struct Tokens {
    list: Vec<String>,
    ids: HashMap<String, usize>,
}

/// Whether a merge is of tokens that have embeddings.
fn fits(tokens: &Tokens, left: &str, right: &str) -> bool {
    [left, right, &format!("{left}{right}")].into_iter().all(|piece| tokens.ids.contains_key(piece))
}

fn text(key: &str, value: &str) -> (String, Entry) {
    (key.to_owned(), Entry::String(value.to_owned()))
}

fn flag(key: &str, value: bool) -> (String, Entry) {
    (key.to_owned(), Entry::Bool(value))
}

/// What llama.cpp's converter takes for control whatever the file says: published models forget to say so.
fn looks_special(token: &str) -> bool {
    let between = |open, close| token.starts_with(open) && token.ends_with(close);
    between("<|", "|>") || between("<｜", "｜>") || between("<unused", ">") || ["<pad>", "<mask>"].contains(&token)
}

/// The merges, in their order.
fn merges(model: &Value) -> Result<Vec<(String, String)>> {
    let pair = |merge: &Value| -> Option<(String, String)> {
        match merge {
            Value::String(pair) => pair.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
            Value::Array(pair) => Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())),
            _ => None,
        }
    };
    let merges = model["merges"].as_array().context("the tokenizer has no merges")?;
    merges.iter().map(pair).collect::<Option<_>>().context("a merge is not two pieces")
}

/// Scores that put pieces together in the order of the merges: SentencePiece takes the best score first.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    // A piece that nothing is merged to is never put together.
    tokens.iter().map(|token| -(ranks.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// The steps of a part of the pipeline, which may be one or a sequence.
fn steps<'a>(part: &'a Value, key: &str) -> Vec<&'a Value> {
    match part {
        Value::Null => Vec::new(),
        part if part["type"] == "Sequence" => {
            part[key].as_array().into_iter().flatten().flat_map(|part| steps(part, key)).collect()
        }
        part => vec![part],
    }
}

/// Refuses a normalizer that llama.cpp does not have: a SentencePiece tokenizer puts `▁` before a text and in the place of spaces, and of a
/// byte-level one NFC is left out there, which texts that are typed have already.
fn check_normalizer(json: &Value, sentencepiece: bool) -> Result<()> {
    for step in steps(&json["normalizer"], "normalizers") {
        let known = match step["type"].as_str().unwrap_or_default() {
            "Prepend" => sentencepiece && step["prepend"] == "\u{2581}",
            "Replace" => sentencepiece && step["pattern"]["String"] == " " && step["content"] == "\u{2581}",
            "NFC" => !sentencepiece,
            _ => false,
        };
        ensure!(known, "the tokenizer changes text by {step}, {INSTEAD}");
    }
    Ok(())
}

/// Refuses added tokens that take the space before them away, or are words of their own only: llama.cpp finds each wherever it stands. Spaces
/// behind a token it takes away in Phi-3's tokenizer, which is told by its name.
fn check_added(json: &Value) -> Result<()> {
    let flagged = |token: &&Value| token["lstrip"] == true || token["single_word"] == true;
    match json["added_tokens"].as_array().into_iter().flatten().find(flagged) {
        Some(token) => {
            bail!("the tokenizer has the token {}, which takes in what is around it, {INSTEAD}", token["content"])
        }
        None => Ok(()),
    }
}

/// The name of what cuts a byte-level tokenizer's text into words.
fn pre_tokenizer(json: &Value) -> Result<&'static str> {
    let steps = steps(&json["pre_tokenizer"], "pretokenizers");
    let bytes = |step: &Value, regex: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == regex
    };
    // The known regular expressions match all of any text, so that what matches is what is left where all else is taken away.
    let cuts = |split: &Value| {
        let (behavior, invert) = (&split["behavior"], &split["invert"]);
        behavior == "Isolated" && invert == false || behavior == "Removed" && invert == true
    };
    let found = match &steps[..] {
        [step] if bytes(step, true) => Some(("", Split::Gpt2)),
        [digits, step] if digits["type"] == "Digits" && digits["individual_digits"] == true && bytes(step, true) => {
            Some(("", Split::Digits))
        }
        [split, step] if split["type"] == "Split" && cuts(split) && bytes(step, false) => {
            split["pattern"]["Regex"].as_str().map(|regex| (regex, Split::Regex("")))
        }
        _ => None,
    };
    let ignore_merges = json["model"]["ignore_merges"] == true;
    let known = found.and_then(|(regex, split)| {
        PRE_TOKENIZERS.iter().find(|kind| {
            let same = match kind.split {
                Split::Regex(own) => split == Split::Regex("") && own == regex,
                own => own == split,
            };
            same && kind.ignore_merges == ignore_merges
        })
    });
    let known =
        known.with_context(|| format!("the tokenizer cuts text into words by {}, {INSTEAD}", json["pre_tokenizer"]))?;
    Ok(known.names[0])
}

/// Whether a SentencePiece tokenizer puts a space before a text.
fn begins_with_space(json: &Value) -> bool {
    let prepends = |step: &&Value| step["type"] == "Prepend";
    let scheme = |step: &&Value| {
        step["type"] == "Metaspace" && step["prepend_scheme"] != "never" && step["add_prefix_space"] != false
    };
    steps(&json["normalizer"], "normalizers").iter().any(prepends)
        || steps(&json["pre_tokenizer"], "pretokenizers").iter().any(scheme)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::*;
    use crate::files::gguf::{Gguf, Writer};

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
    }

    /// The tokenizer that a file with these keys has.
    fn read_again(tokenizer: &Tokenizer, embeddings: usize) -> Result<Tokenizer> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("tokenizer.gguf");
        Writer::start(File::create(&path)?, &tokenizer.gguf_keys(embeddings)?, &[])?.finish()?;
        Tokenizer::from_gguf(&Gguf::open(&path)?)
    }

    fn rows() -> Result<Vec<String>> {
        let expected: Value = serde_json::from_slice(&std::fs::read(fixture("tokenizers/expected.json"))?)?;
        Ok(serde_json::from_value(expected["rows"].clone())?)
    }

    #[test]
    fn what_is_written_is_read_as_the_same_tokenizer() -> Result<()> {
        let of_gguf = |name: &str| Tokenizer::from_gguf(&Gguf::open(&fixture(name))?);
        for tokenizer in [
            Tokenizer::from_dir(&fixture("tokenizers/byte_level"))?,
            Tokenizer::from_dir(&fixture("models/llama"))?,
            of_gguf("tokenizers/byte_level.gguf")?,
            of_gguf("tokenizers/sentencepiece.gguf")?,
        ] {
            let size = tokenizer.vocab_size();
            let again = read_again(&tokenizer, size + 3)?;
            for row in rows()? {
                for special in [false, true] {
                    assert_eq!(again.encode(&row, special)?.ids, tokenizer.encode(&row, special)?.ids, "{row:?}");
                }
                assert_eq!(again.encode_as_text(&row).ok(), tokenizer.encode_as_text(&row).ok(), "{row:?}");
            }
            let named = |t: &Tokenizer| (t.bos_id, t.eos_ids.clone(), t.pad_id, t.add_bos, t.template_digest());
            assert_eq!(named(&again), named(&tokenizer));
            assert_eq!(again.token(size as u32 + 2).as_deref(), Some(format!("[PAD{}]", size + 2).as_str()));
        }
        Ok(())
    }

    /// llama.cpp changes no text, so that a file would answer as another model where it is lower-cased here.
    #[test]
    fn a_tokenizer_that_changes_texts_is_refused_but_for_nfc() -> Result<()> {
        let place = tempfile::tempdir()?;
        let from = fixture("tokenizers/byte_level");
        let mut json: Value = serde_json::from_slice(&std::fs::read(from.join("tokenizer.json"))?)?;
        let mut keys = |normalizer: Value| {
            json["normalizer"] = normalizer;
            std::fs::write(place.path().join("tokenizer.json"), json.to_string())?;
            Tokenizer::from_dir(place.path())?.gguf_keys(700)
        };
        for step in [
            serde_json::json!({"type": "Lowercase"}),
            serde_json::json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": true, "strip_right": true}]}),
            serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}),
        ] {
            let refused = keys(step).expect_err("it is refused").to_string();
            assert!(refused.contains("changes text by"), "{refused}");
        }
        keys(serde_json::json!({"type": "NFC"}))?;
        Ok(())
    }

    /// llama.cpp finds an added token wherever it stands, and leaves the spaces around it.
    #[test]
    fn a_token_that_takes_in_what_is_around_it_is_refused_by_name() -> Result<()> {
        let place = tempfile::tempdir()?;
        let json: Value =
            serde_json::from_slice(&std::fs::read(fixture("tokenizers/byte_level").join("tokenizer.json"))?)?;
        for flag in ["lstrip", "single_word"] {
            let mut json = json.clone();
            json["added_tokens"][1][flag] = true.into();
            std::fs::write(place.path().join("tokenizer.json"), json.to_string())?;
            let refused = Tokenizer::from_dir(place.path())?.gguf_keys(700).expect_err("it is refused").to_string();
            let token = json["added_tokens"][1]["content"].to_string();
            assert!(refused.contains("takes in what is around it") && refused.contains(&token), "{refused}");
        }
        Ok(())
    }

    /// A name that is nearly right would have llama.cpp read other tokens than the model knows.
    #[test]
    fn a_tokenizer_that_llama_cpp_does_not_know_is_refused_by_what_is_unlike() -> Result<()> {
        let place = tempfile::tempdir()?;
        let from = fixture("tokenizers/byte_level");
        let mut json: Value = serde_json::from_slice(&std::fs::read(from.join("tokenizer.json"))?)?;
        json["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,2}"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]});
        std::fs::write(place.path().join("tokenizer.json"), json.to_string())?;
        let refused = Tokenizer::from_dir(place.path())?.gguf_keys(700).expect_err("it has no name");
        let refused = refused.to_string();
        assert!(refused.contains("N}{1,2}") && refused.contains("export `merged`"), "{refused}");
        Ok(())
    }
}
