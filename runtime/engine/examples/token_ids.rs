//! Prints token ids: `token_ids MODEL < rows.jsonl`, where MODEL is a directory or a GGUF file.
//! Each line in is a JSON string, each line out the JSON array of its ids, without added specials.
//! `tests/peers/token_ids.py` compares them with those of other tokenizers.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context, Result};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::text::tokenizer::Tokenizer;

fn main() -> Result<()> {
    let model = std::env::args_os().nth(1).context("usage: token_ids MODEL < rows.jsonl")?;
    let model = Path::new(&model);
    let tokenizer =
        if model.is_dir() { Tokenizer::from_dir(model)? } else { Tokenizer::from_gguf(&Gguf::open(model)?)? };
    let mut out = std::io::stdout().lock();
    for (idx, line) in std::io::stdin().lock().lines().enumerate() {
        let row: String = serde_json::from_str(&line?).with_context(|| format!("row {}", idx + 1))?;
        let ids = tokenizer.encode(&row, false)?.ids;
        writeln!(out, "{}", serde_json::to_string(&ids)?)?;
    }
    Ok(())
}
