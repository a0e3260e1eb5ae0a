//! The bytes that a token adds to a text. A token need be no whole character, so that they cannot be told by decoding it alone.

use std::collections::HashMap;

use super::Tokenizer;

/// How the tokens of a vocabulary spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A character a byte, as in GPT-2's vocabulary.
    ByteLevel,
    /// `▁` is a space and `<0x0A>` a byte, as in SentencePiece's.
    SentencePiece,
    /// Otherwise: what a token is decoded to alone.
    Decoded,
}

/// The spelling of a tokenizer's tokens.
pub struct Spelling {
    kind: Kind,
    /// Tokens that are looked for in a text before it is cut, as they are written.
    added: HashMap<u32, String>,
    byte_of: HashMap<char, u8>,
}

impl Tokenizer {
    /// How its tokens are spelled.
    pub fn spelling(&self) -> Spelling {
        let decoder = serde_json::to_string(&self.inner.get_decoder()).unwrap_or_default();
        let kind = match () {
            () if decoder.contains("\"ByteLevel\"") => Kind::ByteLevel,
            () if decoder.contains('▁') || decoder.contains("\"ByteFallback\"") => Kind::SentencePiece,
            () => Kind::Decoded,
        };
        let added = self.inner.get_added_tokens_decoder();
        let added = added.into_iter().map(|(id, token)| (id, token.content)).collect();
        Spelling { kind, added, byte_of: byte_of() }
    }
}

/// GPT-2's characters for bytes: visible ones for themselves, the others in order from U+0100.
///
/// Source: `bytes_to_unicode` of <https://github.com/openai/gpt-2/blob/master/src/encoder.py>.
fn byte_of() -> HashMap<char, u8> {
    let visible = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let char_of = |byte: u8| {
        let code = if visible(byte) { u32::from(byte) } else { next };
        next += u32::from(!visible(byte));
        (char::from_u32(code).expect("codes below U+0200 are characters"), byte)
    };
    (0..=u8::MAX).map(char_of).collect()
}

impl Spelling {
    /// Returns the bytes of a token of the tokenizer that this is of; `None` where there is no such token, or its bytes are not known.
    pub fn bytes(&self, tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
        if let Some(added) = self.added.get(&id) {
            return Some(added.clone().into_bytes());
        }
        let token = tokenizer.token(id)?;
        match self.kind {
            Kind::ByteLevel => token.chars().map(|c| self.byte_of.get(&c).copied()).collect(),
            Kind::SentencePiece => {
                let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|byte| u8::from_str_radix(byte, 16).ok()) {
                    Some(byte) => Some(vec![byte]),
                    None => Some(token.replace('▁', " ").into_bytes()),
                }
            }
            Kind::Decoded => tokenizer.decode(&[id], false).ok().map(String::into_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;
    use crate::files::gguf::Gguf;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
    }

    /// Behind a line break, so that no space is put before the text or taken off it.
    fn check(tokenizer: &Tokenizer, text: &str) -> Result<()> {
        let spelling = tokenizer.spelling();
        let ids = tokenizer.encode(&format!("\n{text}"), false)?.ids;
        let spelled: Option<Vec<Vec<u8>>> = ids.iter().map(|id| spelling.bytes(tokenizer, *id)).collect();
        let spelled = spelled.expect("every token has its bytes").concat();
        assert_eq!(String::from_utf8(spelled)?.trim_start(), text);
        Ok(())
    }

    #[test]
    fn the_bytes_of_tokens_add_up_to_the_text() -> Result<()> {
        let byte_level = Tokenizer::from_dir(&fixture("tokenizers/byte_level"))?;
        let sentencepiece = Tokenizer::from_gguf(&Gguf::open(&fixture("tokenizers/sentencepiece.gguf"))?)?;
        for tokenizer in [byte_level, sentencepiece, Tokenizer::from_dir(&fixture("models/llama"))?] {
            for text in ["plain  words", "é 🦊 中文", "{\"a\":\t[1, -2.5e3]}\r\n."] {
                check(&tokenizer, text)?;
            }
            assert_eq!(tokenizer.spelling().bytes(&tokenizer, u32::MAX), None);
        }
        Ok(())
    }
}
