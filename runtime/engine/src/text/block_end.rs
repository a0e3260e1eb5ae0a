//! The end of a block of thinking at the beginning of an answer.

use anyhow::Result;

use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;

/// Tokens at the end of a prompt that are looked at for an open block of thinking.
const PROMPT_TAIL: usize = 16;

/// Takes the end of a block of thinking, and the white space behind it, off the beginning of an answer to a prompt that opens that
/// block. A model that learned plain answers ends the block at once; thinking that is there is kept, with its end.
#[derive(Default)]
pub struct BlockEnd {
    /// What ends the block, until it is known whether the answer begins with it.
    closing: Option<String>,
    /// Text that may be the beginning of it.
    held: String,
    /// It was there, and nothing else since but white space.
    passed: bool,
}

impl BlockEnd {
    /// For an answer to these tokens.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn behind(prompt: &[u32], tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Self> {
        let Some(template) = template else { return Ok(Self::default()) };
        let tail = tokenizer.decode(&prompt[prompt.len().saturating_sub(PROMPT_TAIL)..], false)?;
        Ok(Self { closing: template.open_block_end(&tail), ..Self::default() })
    }

    /// What ends the block that the prompt opens, if it opens one.
    pub fn closing(&self) -> Option<&str> {
        self.closing.as_deref()
    }

    /// The text that a further piece makes certain.
    pub fn push(&mut self, piece: String) -> String {
        if self.passed {
            let text = piece.trim_start();
            self.passed = text.is_empty();
            return text.to_owned();
        }
        let Some(closing) = &self.closing else { return piece };
        self.held.push_str(&piece);
        let text = self.held.trim_start();
        if closing.starts_with(text) && text.len() < closing.len() {
            return String::new();
        }
        let rest = text.strip_prefix(closing.as_str()).map(|rest| rest.trim_start().to_owned());
        self.closing = None;
        self.passed = rest.as_ref().is_some_and(String::is_empty);
        let held = std::mem::take(&mut self.held);
        rest.unwrap_or(held)
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> String {
        self.closing = None;
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_block_in_which_nothing_was_thought_is_no_part_of_an_answer() {
        let read = |pieces: &[&str]| {
            let mut end = BlockEnd { closing: Some("</think>".to_owned()), ..BlockEnd::default() };
            let said: Vec<String> = pieces.iter().map(|piece| end.push((*piece).to_owned())).collect();
            said.concat() + &end.finish()
        };
        assert_eq!(read(&["</think>\n\nJa, é."]), "Ja, é.");
        assert_eq!(read(&["\n", "</th", "ink>", "\n", "\n", " Ja", ", \n</think> é."]), "Ja, \n</think> é.");
        assert_eq!(read(&["Hm", "\n</think>", "\n\nJa"]), "Hm\n</think>\n\nJa", "thinking is kept");
        assert_eq!(read(&["</thi", "s>"]), "</this>");
        assert_eq!(read(&["</thi"]), "</thi", "it was cut");
        assert_eq!(read(&[" ", ""]), " ");
        assert_eq!(read(&["</think>", " "]), "");
        let mut plain = BlockEnd::default();
        assert_eq!(plain.push("</think> a".to_owned()), "</think> a", "no prompt opened it");
    }
}
