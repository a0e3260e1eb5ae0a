//! Text to token ids and back: tokenizers and chat templates.

pub mod template;
pub mod tokenizer;
