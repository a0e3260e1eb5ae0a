//! Text out of tokens that come one by one.

use anyhow::Result;

use super::tokenizer::Tokenizer;

/// Tokens that are held back at most: no character has as many bytes, so whatever is held longer will not become one.
const HELD_MAX: usize = 16;

/// Text out of tokens that come one by one: what it has given out never changes by what comes after.
///
/// The pieces put together are what [`Tokenizer::decode`] makes of all tokens at once, without special ones. A token costs the same
/// however many came before: it is decoded behind those of the piece before, whose text tells what is new. The library's
/// `DecodeStream` does the same, but fails for good where a byte makes those before it no character, decodes all anew while a model
/// writes bytes that are none, and loses what is held back at the end.
#[derive(Default)]
pub struct Detokenizer {
    /// Tokens of the piece that was given out last, and those since.
    ids: Vec<u32>,
    /// How many of them were given out.
    read: usize,
    /// Their text.
    given: String,
}

impl Detokenizer {
    /// The text that a further token makes certain; empty while it only begins a character.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> Result<String> {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, true)?;
        // Bytes of a character that is not whole are decoded as replacement characters.
        let held = text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.read <= HELD_MAX;
        if held { Ok(String::new()) } else { self.give(&text, tokenizer) }
    }

    /// What was held back, at the end.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.ids, true)?;
        self.give(&text, tokenizer)
    }

    /// All of `text`, that of all tokens here, which was not given out. Some decoders take a whole character back when bytes behind
    /// it turn out to be none; then what differs is given again.
    fn give(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<String> {
        let same = text.char_indices().zip(self.given.chars()).take_while(|((_, a), b)| a == b).last();
        let from = same.map_or(0, |((at, c), _)| at + c.len_utf8());
        let piece = text[from..].to_owned();
        if !piece.is_empty() {
            // What was new is what the next piece is told by.
            self.ids.drain(..self.read);
            self.read = self.ids.len();
            self.given = tokenizer.decode(&self.ids, true)?;
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
    }

    /// A byte that follows a character makes SentencePiece's decoder take that back.
    #[test]
    fn bytes_that_are_no_character_neither_end_an_answer_nor_hold_it_up() -> Result<()> {
        let file = crate::files::gguf::Gguf::open(&fixture("../tokenizers/sentencepiece.gguf"))?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let bytes = |bytes: &[u8]| -> Vec<u32> {
            bytes.iter().filter_map(|byte| tokenizer.id(&format!("<0x{byte:02X}>"))).collect()
        };
        let word = tokenizer.encode("of", false)?.ids;
        let given = |ids: &[u32]| -> Result<(Vec<String>, String)> {
            let mut detokenizer = Detokenizer::default();
            let pieces = ids.iter().map(|id| detokenizer.push(*id, &tokenizer)).collect::<Result<Vec<String>>>()?;
            Ok((pieces, detokenizer.finish(&tokenizer)?))
        };
        // é, a byte that begins nothing, a word.
        let ids = [&bytes(&[0xC3, 0xA9, 0xFF])[..], &word].concat();
        let (pieces, rest) = given(&ids)?;
        assert_eq!(ids.len(), 3 + word.len());
        assert!(pieces.concat().starts_with('é') && (pieces.concat() + &rest).ends_with("of"), "{pieces:?} {rest:?}");
        // Ten times as many as are held back come piece by piece, and the last at the end.
        let (pieces, rest) = given(&bytes(&[0xFF; 10 * HELD_MAX]))?;
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 5, "{pieces:?}");
        assert_eq!((pieces.concat() + &rest).chars().count(), 10 * HELD_MAX);
        // A character that says so itself.
        let typed = tokenizer.encode("a\u{fffd}", false)?.ids;
        let (pieces, rest) = given(&typed)?;
        assert_eq!(pieces.concat() + &rest, tokenizer.decode(&typed, true)?);
        Ok(())
    }

    #[test]
    fn pieces_of_text_are_whole_characters_and_add_up() -> Result<()> {
        let tokenizer = Tokenizer::from_dir(&fixture("llama"))?;
        for text in ["plain words", "añ → 🦊🦊 \u{1F468}\u{200D}\u{1F469} 中文 e\u{301}\n", "", "🦊"] {
            let ids = tokenizer.encode(text, false)?.ids;
            let mut detokenizer = Detokenizer::default();
            let mut pieces = Vec::new();
            for id in &ids {
                pieces.push(detokenizer.push(*id, &tokenizer)?);
            }
            assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
            pieces.push(detokenizer.finish(&tokenizer)?);
            assert_eq!(pieces.concat(), text);
            // Cut within a character: it comes at the end, as the whole would be decoded.
            let cut = &ids[..ids.len().saturating_sub(1)];
            let mut detokenizer = Detokenizer::default();
            let mut given = String::new();
            for id in cut {
                given += &detokenizer.push(*id, &tokenizer)?;
            }
            given += &detokenizer.finish(&tokenizer)?;
            assert_eq!(given, tokenizer.decode(cut, true)?);
        }
        Ok(())
    }
}
