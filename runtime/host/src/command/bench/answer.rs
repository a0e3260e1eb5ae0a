//! `homeroom bench prefill` and `bench decode`: reading a prompt and drawing tokens, without sampling.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use homeroom_abi::plan::ModuleKind;
use homeroom_engine::inference::Inference;
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::waist::KvCache;
use homeroom_kernels::{Stream, bf16_register_loop_gflops, f32_register_loop_gflops, isa, read_gigabytes, threads};
use serde_json::json;

use super::super::arguments::{ANSWER_COMPUTE, COUNT_MAX, ModelArgs, one_of, whole};
use super::super::{Done, print};
use super::median;
use crate::machine::peak_memory_bytes;
use crate::models::{Answerer, Network, shown};
use crate::processor;
use crate::progress::line;

/// What `bench prefill` and `bench decode` have in common.
#[derive(Args)]
struct Measured {
    #[command(flatten)]
    model: ModelArgs,
    /// Number format of the products
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = one_of::<Compute>(&ANSWER_COMPUTE))]
    compute: Compute,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `bench prefill`.
#[derive(Args)]
pub struct Prefill {
    #[command(flatten)]
    measured: Measured,
    /// Tokens of the prompt
    #[arg(long, default_value = "512", value_name = "N", value_parser = whole::<usize>(2..=COUNT_MAX))]
    tokens: usize,
    /// Timed readings of a prompt, after one that is not timed
    #[arg(long, default_value = "5", value_name = "N", value_parser = whole::<u32>(1..=COUNT_MAX))]
    runs: u32,
}

/// Arguments of `bench decode`.
#[derive(Args)]
pub struct Decode {
    #[command(flatten)]
    measured: Measured,
    /// Tokens of the prompt
    #[arg(long, default_value = "32", value_name = "N", value_parser = whole::<usize>(2..=COUNT_MAX))]
    prompt: usize,
    /// Tokens to generate
    #[arg(long, default_value = "64", value_name = "N", value_parser = whole::<usize>(2..=COUNT_MAX))]
    tokens: usize,
    /// Chats that are answered at once
    #[arg(long, default_value = "1", value_name = "N", value_parser = whole::<u32>(1..=64))]
    chats: u32,
}

/// Why no speed is told.
const OVERFLOW: &str = "the model's numbers overflow: what it says next is no number, so its speed means nothing";

/// What is measured.
struct Bench {
    answerer: Answerer,
    compute: Compute,
}

impl Bench {
    fn new(arguments: &Measured) -> Result<Self> {
        let compute = arguments.compute;
        let answerer = Answerer::load(&arguments.model.reference(), Network::Allowed, compute)?;
        let model = answerer.model();
        line(format_args!(
            "model     {}   {:.1} M parameters, {}{}",
            match &answerer.adapter {
                Some(_) => arguments.model.model_dir.display().to_string(),
                None => shown(model, &arguments.model.model_dir),
            },
            model.parameter_count() as f64 / 1e6,
            model.storage_words(),
            if answerer.adapter.is_some() { ", with an adapter" } else { "" },
        ));
        line(processor::words());
        Ok(Self { answerer, compute })
    }

    fn model(&self) -> &BaseModel {
        self.answerer.model()
    }

    fn inference(&self) -> &Inference {
        self.answerer.engine.inference()
    }

    fn prompt(&self, tokens: usize, random: &mut Stream) -> Vec<u32> {
        (0..tokens).map(|_| random.below(self.model().architecture.vocab_size) as u32).collect()
    }

    fn fits(&self, positions: usize) -> Result<()> {
        let context = self.model().architecture.max_position_embeddings;
        ensure!(positions <= context, "{positions} tokens: the model's context is {context}");
        Ok(())
    }
}

/// Reads a prompt of random tokens.
pub fn prefill(arguments: &Prefill) -> Result<Done> {
    let bench = Bench::new(&arguments.measured)?;
    bench.fits(arguments.tokens)?;
    let mut random = Stream::new(42, 7);
    let mut seconds = Vec::new();
    for run in 0..=arguments.runs {
        let prompt = bench.prompt(arguments.tokens, &mut random);
        let adapter = bench.answerer.adapter.as_deref();
        let mut cache = bench.inference().begin(adapter);
        let start = Instant::now();
        let logits = bench
            .inference()
            .read(adapter, &prompt, &mut *cache, prompt.len(), true)?
            .context("the prompt has logits")?;
        let taken = start.elapsed().as_secs_f64();
        ensure!(logits.iter().all(|logit| logit.is_finite()), OVERFLOW);
        if run > 0 {
            seconds.push(taken);
        }
    }
    let computed = if bench.compute == Compute::Auto { Compute::auto() } else { bench.compute };
    let limit = match computed {
        Compute::Bf16 => bf16_register_loop_gflops(),
        _ => f32_register_loop_gflops(),
    };
    let seconds_each = median(&seconds);
    let linear = bench.model().modules.iter().filter(|module| module.info.kind == ModuleKind::Linear);
    let of_rows: usize = (linear.filter(|module| !module.info.output_embedding))
        .map(|module| module.info.d_in * module.info.d_out)
        .sum();
    let gflops = 2.0 * of_rows as f64 * arguments.tokens as f64 / seconds_each / 1e9;
    let speed = arguments.tokens as f64 / seconds_each;
    if arguments.measured.json {
        let json = json!({
            "tokens_per_second": speed,
            "seconds": seconds,
            "gflops": gflops,
            "register_loop_gflops": limit,
            "share_of_register_loop": gflops / limit,
            "peak_memory_bytes": peak_memory_bytes(),
            "compute": bench.compute.name(),
            "storage": bench.model().storage_words(),
            "cpu": isa().name(),
            "threads": threads(),
        });
        print(&json.to_string())?;
        return Ok(Done::Whole);
    }
    print(&format!(
        "speed     {speed:.0} tokens/s   {seconds_each:.3} s for {} tokens\n\
         products  {gflops:.0} GFLOP/s   {:.0} % of {limit:.0} on registers alone ({}, {} threads)",
        arguments.tokens,
        100.0 * gflops / limit,
        isa().name(),
        threads(),
    ))?;
    Ok(Done::Whole)
}

/// Draws tokens after a prompt of random ones.
pub fn decode(arguments: &Decode) -> Result<Done> {
    let bench = Bench::new(&arguments.measured)?;
    bench.fits(arguments.prompt.saturating_add(arguments.tokens).saturating_add(1))?;
    let mut random = Stream::new(42, 7);
    let mut chats: Vec<(u32, Box<dyn KvCache>)> = Vec::new();
    for _ in 0..arguments.chats {
        let prompt = bench.prompt(arguments.prompt, &mut random);
        let adapter = bench.answerer.adapter.as_deref();
        let mut cache = bench.inference().begin(adapter);
        let logits = bench
            .inference()
            .read(adapter, &prompt, &mut *cache, prompt.len(), true)?
            .context("the prompt has logits")?;
        chats.push((likeliest(&logits), cache));
    }
    let (mut seconds, mut finite) = (Vec::new(), true);
    for step in 0..=arguments.tokens {
        let start = Instant::now();
        let mut sequences: Vec<(u32, &mut dyn KvCache)> =
            chats.iter_mut().map(|(id, cache)| (*id, &mut **cache)).collect();
        let logits = bench.inference().step(bench.answerer.adapter.as_deref(), &mut sequences)?;
        let taken = start.elapsed().as_secs_f64();
        finite &= logits.iter().flatten().all(|logit| logit.is_finite());
        chats.iter_mut().zip(&logits).for_each(|((id, _), logits)| *id = likeliest(logits));
        if step > 0 {
            seconds.push(taken);
        }
    }
    ensure!(finite, OVERFLOW);
    let each = median(&seconds);
    let speed = chats.len() as f64 / each;
    let linear = bench.model().modules.iter().filter(|module| module.info.kind == ModuleKind::Linear);
    let bytes: usize = linear.map(|module| module.weight.stored_bytes()).sum();
    let (read, limit) = (bytes as f64 / each / 1e9, read_gigabytes());
    if arguments.measured.json {
        let json = json!({
            "tokens_per_second": speed,
            "seconds_per_token": seconds,
            "chats": chats.len(),
            "weights_gigabytes_per_second": read,
            "read_gigabytes_per_second": limit,
            "peak_memory_bytes": peak_memory_bytes(),
            "storage": bench.model().storage_words(),
            "cpu": isa().name(),
            "threads": threads(),
        });
        print(&json.to_string())?;
        return Ok(Done::Whole);
    }
    print(&format!(
        "speed     {speed:.1} tokens/s   {:.2} ms a token of {} at once\n\
         weights   {} ({}, {} threads)",
        1e3 * each,
        chats.len(),
        reading(read, limit),
        isa().name(),
        threads(),
    ))?;
    Ok(Done::Whole)
}

/// How fast weights are read, beside how fast memory is, both in GB/s.
fn reading(read: f64, limit: f64) -> String {
    if read > limit {
        return format!(
            "{read:.1} GB/s   memory yields {limit:.1}: weights as few as these stay in the processor's cache"
        );
    }
    format!("{read:.1} GB/s   {:.0} % of {limit:.1} by reading alone", 100.0 * read / limit)
}

fn likeliest(logits: &[f32]) -> u32 {
    let most = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    most.map_or(0, |(id, _)| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_stay_in_the_cache_are_no_share_of_memorys_speed() {
        assert_eq!(reading(8.0, 20.0), "8.0 GB/s   40 % of 20.0 by reading alone");
        let cached = reading(33.2, 20.0);
        assert!(cached.contains("memory yields 20.0") && !cached.contains('%'), "{cached}");
    }
}
