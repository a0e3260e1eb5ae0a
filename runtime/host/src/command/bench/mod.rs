//! `homeroom bench`: speed and memory, beside the limits of the machine.

mod answer;
mod train;

pub use answer::{decode, prefill};
pub use train::train;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
