//! The limits of the machine: multiply-adds on registers alone, and reading memory alone, on all threads.

use std::hint::black_box;
use std::time::Instant;

use crate::isa::isa;
use crate::pool::{for_each, threads};
use crate::product::ProductElement;
use crate::tile::spin;

/// GFLOP/s of the instruction that products of f32 are made of, on registers alone and on all threads: what no product can
/// exceed. The median of eleven tries of about 20 ms. A multiply-add counts as two operations a lane.
pub fn f32_register_loop_gflops() -> f64 {
    register_loop_gflops::<f32>()
}

/// The same of bf16. A product of two pairs counts as four operations a lane.
pub fn bf16_register_loop_gflops() -> f64 {
    register_loop_gflops::<half::bf16>()
}

// What is generic is compiled by the crate that names the type, with that crate's optimisation: so no caller does.
fn register_loop_gflops<E: ProductElement>() -> f64 {
    let isa = isa();
    let run = |steps: usize| {
        let start = Instant::now();
        for_each(threads(), |_| {
            black_box(spin::<E>(isa, steps));
        });
        let seconds = start.elapsed().as_secs_f64();
        (spin::<E>(isa, 1).1 * (steps * threads()) as f64 / seconds / 1e9, seconds)
    };
    let mut steps = 1 << 12;
    while run(steps).1 < 0.02 {
        steps *= 2;
    }
    let mut tries: Vec<f64> = (0..11).map(|_| run(steps).0).collect();
    tries.sort_by(f64::total_cmp);
    tries[tries.len() / 2]
}

/// GB/s at which all threads together read memory that no cache holds: what decoding cannot exceed. The median of five tries.
pub fn read_gigabytes() -> f64 {
    let values = vec![1u64; (256 << 20) / size_of::<u64>()];
    let part = 1 << 16;
    let mut tries: Vec<f64> = (0..5)
        .map(|_| {
            let start = Instant::now();
            for_each(values.len().div_ceil(part), |task| {
                let values = &values[task * part..values.len().min((task + 1) * part)];
                // Several sums at once, so that no addition waits for the one before.
                let mut sums = [0u64; 32];
                for values in values.as_chunks::<32>().0 {
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum ^= value);
                }
                black_box(sums);
            });
            size_of_val(&values[..]) as f64 / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    tries.sort_by(f64::total_cmp);
    tries[tries.len() / 2]
}
