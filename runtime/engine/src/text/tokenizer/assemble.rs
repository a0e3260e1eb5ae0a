//! A tokenizer of its parts: what those that are read from a directory, from a GGUF file or from an adapter have in common.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Model};

use super::library::guarded;
use super::{Tokenizer, control, ends};
use crate::text::control::Control;
use crate::text::template::written::{behind_answer, written_by};

/// What both sources agree on once the pipeline stands.
pub(super) struct Named {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    pub(super) unk: Option<String>,
    /// Ids that end a generation besides that of `eos`.
    pub(super) more_eos_ids: Vec<u32>,
    pub(super) chat_template: Option<String>,
    pub(super) named_templates: BTreeMap<String, String>,
    pub(super) model_max_length: Option<u64>,
    pub(super) adds_asked: [Option<bool>; 2],
    pub(super) notes: Vec<String>,
}

/// Makes a tokenizer of a pipeline that stands.
///
/// # Errors
/// When a named token is not in the vocabulary, or the pipeline fails.
pub(super) fn assemble(inner: tokenizers::Tokenizer, mut named: Named) -> Result<Tokenizer> {
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
    let written = sources.map(|source| written_by(source, named.bos.as_deref(), eos_token.as_deref()));
    let written = written.collect::<Vec<_>>().join("\0");
    let is_control = |id: &u32, token: &AddedToken| control::is_control(token, *id, &named_ids, &written);
    let mut control: Vec<Control> = (added.iter().filter(|(id, token)| is_control(id, token)))
        .map(|(id, token)| Control { text: token.content.clone(), id: *id, special: token.special })
        .collect();
    control.sort_by_key(|c| c.id);
    let behind = |source: &str| behind_answer(source, named.bos.as_deref(), eos_token.as_deref());
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
pub(super) fn adds(inner: &tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>) -> Result<(bool, bool)> {
    let nothing = guarded(|| inner.encode("", true))?;
    let ids = nothing.get_ids();
    Ok((bos.is_some() && ids.first().copied() == bos, eos.is_some() && ids.last().copied() == eos))
}

/// The post-processor that puts `bos` before a sequence and `eos` after it, written as
/// transformers writes it.
pub(super) fn add_bos_and_eos(bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Result<PostProcessorWrapper> {
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
pub(super) fn part<T: DeserializeOwned>(form: Value) -> Result<T> {
    let kind = form["type"].to_string();
    serde_json::from_value(form).with_context(|| format!("a {kind} cannot be built"))
}
