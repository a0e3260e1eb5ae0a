//! Rows as a model sees them: token by token, each trained or not, with what begins and ends them checked.

use serde::Serialize;

use super::Example;
use crate::text::tokenizer::Tokenizer;

/// Most tokens that one character is made of.
const TOKENS_OF_CHARACTER: usize = 8;

/// One token, or the few that spell one character together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// The ids; more than one where each is a part of a character.
    pub ids: Vec<u32>,
    /// Its text. Bytes that make no character are written `\xE2`.
    pub text: String,
    /// Whether it is learned.
    pub trained: bool,
    /// Whether it is a control token, such as the end of a turn.
    pub control: bool,
    /// Whether `text` is bytes, not text.
    pub bytes: bool,
}

/// How a sequence begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Beginning {
    /// With one BOS.
    Bos,
    /// Without one, as the tokenizer has it.
    None,
    /// With more than one BOS.
    Doubled,
    /// Without the BOS that the tokenizer begins texts with.
    Missing,
}

/// How what is trained ends, of a sequence that was not cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// With a token at which answers stop.
    Stops,
    /// With a control token at which they do not.
    GoesOn,
    /// With text: the model does not learn where to stop.
    None,
}

/// The tokens of an example as pieces.
pub fn pieces(example: &Example, tokenizer: &Tokenizer) -> Vec<Piece> {
    let Example { ids, trained, .. } = example;
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < ids.len() {
        let id = ids[at];
        let control = tokenizer.control_tokens().binary_search_by_key(&id, |control| control.id).is_ok();
        let raw = tokenizer.token(id).unwrap_or_else(|| format!("<{id}>"));
        let piece = |count: usize, text: String, bytes: bool| {
            let ids = ids[at..at + count].to_vec();
            Piece { ids, text, trained: trained[at], control, bytes }
        };
        let piece = if control {
            piece(1, raw, false)
        } else {
            match whole(ids, trained, at, tokenizer) {
                Some((count, mut text)) => {
                    // A sentencepiece decoder drops the space that a text begins with.
                    if raw.starts_with('\u{2581}') && !text.starts_with([' ', '\u{2581}']) {
                        text.insert(0, ' ');
                    }
                    piece(count, text, false)
                }
                None => match bytes_of(&raw) {
                    Some(bytes) => piece(1, bytes.iter().map(|byte| format!("\\x{byte:02X}")).collect(), true),
                    None => piece(1, raw, false),
                },
            }
        };
        at += piece.ids.len();
        pieces.push(piece);
    }
    pieces
}

/// The text of the token here, or of it and those behind it that spell characters with it, and how many they are.
fn whole(ids: &[u32], trained: &[bool], at: usize, tokenizer: &Tokenizer) -> Option<(usize, String)> {
    let most = TOKENS_OF_CHARACTER.min(ids.len() - at);
    let alike = trained[at..at + most].iter().take_while(|flag| **flag == trained[at]).count();
    (1..=alike).find_map(|count| {
        let text = tokenizer.decode(&ids[at..at + count], false).ok()?;
        (!text.is_empty() && !text.contains('\u{fffd}')).then_some((count, text))
    })
}

/// The bytes that a token stands for: `<0xE2>` of sentencepiece, or the letters that GPT-2 writes for bytes
/// (`bytes_to_unicode` in its `encoder.py`). `None`: it is written in neither way.
fn bytes_of(raw: &str) -> Option<Vec<u8>> {
    if let Some(hex) = raw.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]);
    }
    let is_itself = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=255).filter(|byte| !is_itself(byte)).collect();
    let byte = |c: char| match u32::from(c) {
        code @ 0..=255 => u8::try_from(code).ok().filter(is_itself),
        code => others.get(usize::try_from(code - 256).ok()?).copied(),
    };
    raw.chars().map(byte).collect()
}

/// How an example begins.
pub fn beginning(example: &Example, tokenizer: &Tokenizer) -> Beginning {
    let Some(bos) = tokenizer.bos_id else { return Beginning::None };
    // Where no tokenizer adds it, it may open each turn (SmolLM2), or be written by the chat template.
    match example.ids.iter().take_while(|id| **id == bos).count() {
        0 if tokenizer.add_bos => Beginning::Missing,
        0 => Beginning::None,
        1 => Beginning::Bos,
        _ => Beginning::Doubled,
    }
}

/// How the worst of the trained turns of an example ends.
pub fn end(example: &Example, tokenizer: &Tokenizer) -> End {
    let Example { ids, trained, .. } = example;
    let is_space = |id: &u32| tokenizer.decode(&[*id], false).is_ok_and(|text| text.trim().is_empty());
    let mut worst = End::Stops;
    let mut at = 0;
    for run in trained.chunk_by(|a, b| a == b) {
        let turn = &ids[at..at + run.len()];
        at += run.len();
        if !run[0] {
            continue;
        }
        // A control token may decode to nothing.
        let is_control = |id: &u32| tokenizer.control_tokens().binary_search_by_key(id, |control| control.id).is_ok();
        match turn.iter().rev().find(|id| is_control(id) || !is_space(id)) {
            Some(id) if tokenizer.eos_ids.contains(id) => {}
            Some(id) if is_control(id) => worst = if worst == End::None { End::None } else { End::GoesOn },
            _ => worst = End::None,
        }
    }
    worst
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn parts_of_characters_are_put_together_and_lone_ones_are_bytes() {
        for name in ["tokenizers/byte_level", "models/llama"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
            let tokenizer = Tokenizer::from_dir(&dir).unwrap();
            let text = "a€ 日本🇩🇪\n";
            let ids = tokenizer.encode(text, false).unwrap().ids;
            let mut trained = vec![true; ids.len()];
            trained[0] = false;
            let example = Example::new(ids.clone(), trained, 1);
            let whole = pieces(&example, &tokenizer);
            assert_eq!(whole.iter().map(|piece| piece.text.as_str()).collect::<String>(), text);
            assert!(
                whole.iter().any(|piece| piece.ids.len() > 1) && whole.iter().all(|piece| !piece.bytes),
                "{whole:?}"
            );
            assert_eq!(whole.iter().flat_map(|piece| piece.ids.clone()).collect::<Vec<_>>(), ids);
            // Cut within a character.
            let cut = ids.iter().position(|id| tokenizer.decode(&[*id], false).unwrap().contains('\u{fffd}')).unwrap();
            let cut = Example::new(ids[..=cut].to_vec(), vec![false; cut + 1], 1);
            let last = pieces(&cut, &tokenizer).pop().unwrap();
            assert!(last.bytes && last.text.starts_with("\\xE2"), "{last:?}");
        }
        assert_eq!(bytes_of("<0xE2>"), Some(vec![0xe2]));
        assert_eq!(bytes_of("Ġ"), Some(vec![b' ']));
        assert_eq!(bytes_of("â"), Some(vec![0xe2]));
        assert_eq!(bytes_of("日"), None);
    }

    #[test]
    fn beginnings_and_ends_are_told_apart() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        let mut tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let (bos, eos) = (tokenizer.bos_id.unwrap(), tokenizer.eos_ids[0]);
        let word = tokenizer.encode("word", false).unwrap().ids[0];
        let space = tokenizer.encode("\n", false).unwrap().ids[0];
        let example =
            |ids: &[u32], from: usize| Example::new(ids.to_vec(), (0..ids.len()).map(|at| at >= from).collect(), 1);
        assert_eq!(beginning(&example(&[bos, word], 1), &tokenizer), Beginning::Bos);
        assert_eq!(beginning(&example(&[bos, bos, word], 1), &tokenizer), Beginning::Doubled);
        assert_eq!(beginning(&example(&[word], 1), &tokenizer), Beginning::None);
        tokenizer.add_bos = true;
        assert_eq!(beginning(&example(&[word], 1), &tokenizer), Beginning::Missing);
        assert_eq!(end(&example(&[word, word, eos, space], 1), &tokenizer), End::Stops);
        assert_eq!(end(&example(&[word, word, space], 1), &tokenizer), End::None);
        tokenizer.eos_ids.retain(|id| *id != eos);
        assert_eq!(end(&example(&[word, word, eos], 1), &tokenizer), End::GoesOn);
        // The end of an earlier turn counts as well.
        let mut turns = example(&[word, word, word, word, eos], 1);
        tokenizer.eos_ids.push(eos);
        turns.trained[3] = false;
        turns.trained[2] = false;
        assert_eq!(end(&turns, &tokenizer), End::None);
    }
}
