//! What a token costs beside the model: drawing it by top-p, and making text of it; against sorting the vocabulary, as candle's
//! sampler does, and decoding the whole answer anew for each token:
//!
//! ```sh
//! cargo run --release -p homeroom-engine --example answer_speed [MODEL]
//! ```
//! MODEL, a directory or a `.gguf` file, is whose tokens are made text of.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Candle};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::inference::Sampler;
use homeroom_engine::inference::generate::{Detokenizer, Sampling};
use homeroom_engine::text::tokenizer::Tokenizer;
use homeroom_kernels::Stream;

const TOP_P: f64 = 0.9;
/// Times that each is measured, by turns.
const ROUNDS: usize = 21;
/// Tokens of an answer.
const TOKENS: usize = 16_384;

fn main() -> Result<()> {
    println!("top-p {TOP_P}              sorted       ours   ratio");
    for vocabulary in [49_152, 262_144] {
        let mut random = Stream::new(7, vocabulary);
        let mut normal = |spread: f64| (0..vocabulary).map(|_| (spread * random.normal()) as f32).collect::<Vec<f32>>();
        // As sure of a token as a tuned model is; as unsure as one of random weights; of no opinion.
        let mut peaked = normal(3.0);
        for (rank, logit) in peaked.iter_mut().step_by(5003).take(8).enumerate() {
            *logit = 24.0 - rank as f32;
        }
        for (name, logits) in [("peaked", peaked), ("spread", normal(3.0)), ("flat", normal(0.01))] {
            let tensor = Tensor::from_slice(&logits, logits.len(), &Device::Cpu)?;
            let mut candle = LogitsProcessor::from_sampling(1, Candle::TopP { p: TOP_P, temperature: 1.0 });
            let sampling = Sampling { temperature: 1.0, top_p: TOP_P, ..Sampling::default() };
            let mut sampler = Sampler::new(sampling, &[])?;
            let (mut sorted, mut ours) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let start = Instant::now();
                black_box(candle.sample(&tensor)?);
                sorted.push(start.elapsed().as_secs_f64());
                let logits = logits.clone();
                let start = Instant::now();
                black_box(sampler.draw(logits));
                ours.push(start.elapsed().as_secs_f64());
            }
            report(&format!("{vocabulary} tokens, {name}"), median(sorted), median(ours));
        }
    }

    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
    let path = given.unwrap_or(fixture);
    let tokenizer =
        if path.is_file() { Tokenizer::from_gguf(&Gguf::open(&path)?)? } else { Tokenizer::from_dir(&path)? };
    let mut random = Stream::new(7, 1);
    let control = tokenizer.control_tokens();
    let ids = std::iter::repeat_with(|| random.below(tokenizer.vocab_size()) as u32);
    let ids: Vec<u32> = ids.filter(|id| control.iter().all(|c| c.id != *id)).take(TOKENS).collect();
    println!("\ntext                       anew       ours   ratio");
    let mut detokenizer = Detokenizer::default();
    let (mut seconds, mut anew) = (0.0, Vec::new());
    for (at, id) in ids.iter().enumerate() {
        let start = Instant::now();
        black_box(detokenizer.push(*id, &tokenizer)?);
        seconds += start.elapsed().as_secs_f64();
        // Evenly spread, so that their mean is that of all.
        if at % 256 == 128 {
            let start = Instant::now();
            black_box(tokenizer.decode(&ids[..=at], true)?);
            anew.push(start.elapsed().as_secs_f64());
        }
    }
    let mean = anew.iter().sum::<f64>() / anew.len() as f64;
    report(&format!("answer of {TOKENS} tokens"), mean, seconds / TOKENS as f64);
    Ok(())
}

fn report(name: &str, before: f64, after: f64) {
    println!("{name:22} {:8.1} µs {:7.1} µs {:7.1}", 1e6 * before, 1e6 * after, before / after);
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
