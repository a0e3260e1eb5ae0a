//! Text to token ids and back: tokenizers and chat templates.

pub mod block_end;
pub(crate) mod control;
pub mod detokenizer;
pub mod template;
pub mod tokenizer;
pub mod tokens;
