//! Texts a second of an embedding model, as tests/peers/embeddings.py measures it beside sentence-transformers.
//!
//! `embedding_speed DIR TEXTS REPEATS [VECTORS]`: TEXTS holds a JSON list of texts. Prints the seconds of each repeat, a line each, and
//! writes the vectors as JSON.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use homeroom_engine::embedding::EmbeddingModel;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, texts, repeats, rest @ ..] = arguments.as_slice() else { anyhow::bail!("DIR TEXTS REPEATS [VECTORS]") };
    let model = EmbeddingModel::load(Path::new(dir))?;
    let texts: Vec<String> = serde_json::from_str(&std::fs::read_to_string(texts)?)?;
    let mut vectors = Vec::new();
    for _ in 0..repeats.parse().context("REPEATS")? {
        let start = Instant::now();
        let tokens = texts.iter().map(|text| model.tokens(text)).collect::<Result<Vec<_>>>()?;
        vectors = model.embed(&tokens.iter().map(|text| text.ids.as_slice()).collect::<Vec<_>>())?;
        println!("{}", start.elapsed().as_secs_f64());
    }
    if let [file] = rest {
        std::fs::write(file, serde_json::to_string(&vectors)?)?;
    }
    Ok(())
}
