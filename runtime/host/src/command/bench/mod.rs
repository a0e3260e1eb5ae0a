//! `homeroom bench`: speed and memory, beside the limits of the machine.

mod answer;
mod train;

use anyhow::Result;
use clap::Subcommand;

use super::Done;

/// What is measured.
#[derive(Subcommand)]
pub enum Bench {
    /// Trains on random tokens; prints tokens a second, the share of the processor's limit, and peak memory
    Train(Box<train::Arguments>),
    /// Reads a prompt of random tokens; prints tokens a second and the share of the processor's limit
    Prefill(answer::Prefill),
    /// Generates tokens; prints tokens a second and the share of the memory's bandwidth
    Decode(answer::Decode),
}

/// Measures.
pub fn run(bench: &Bench) -> Result<Done> {
    match bench {
        Bench::Train(arguments) => train::train(arguments),
        Bench::Prefill(arguments) => answer::prefill(arguments),
        Bench::Decode(arguments) => answer::decode(arguments),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
