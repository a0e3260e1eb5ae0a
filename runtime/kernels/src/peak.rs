//! The limit of the processor: multiply-adds on registers alone, on all threads.

use std::hint::black_box;
use std::time::Instant;

use crate::cpu::cpu;
use crate::pool::{for_each, threads};
use crate::product::ProductElement;
use crate::tile::spin;

/// GFLOP/s of the instruction that products of E are made of, on registers alone and on all threads: what no product can
/// exceed. The median of eleven tries of about 20 ms.
///
/// A product of two bf16 pairs counts as four operations a lane, a multiply-add of f32 as two.
pub fn register_loop_gflops<E: ProductElement>() -> f64 {
    let cpu = cpu();
    let run = |steps: usize| {
        let start = Instant::now();
        for_each(threads(), |_| {
            black_box(spin::<E>(cpu, steps));
        });
        let seconds = start.elapsed().as_secs_f64();
        (spin::<E>(cpu, 1).1 * (steps * threads()) as f64 / seconds / 1e9, seconds)
    };
    let mut steps = 1 << 12;
    while run(steps).1 < 0.02 {
        steps *= 2;
    }
    let mut tries: Vec<f64> = (0..11).map(|_| run(steps).0).collect();
    tries.sort_by(f64::total_cmp);
    tries[tries.len() / 2]
}
