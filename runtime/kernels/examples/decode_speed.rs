//! Decoding speed on one core: `cargo run --release -p homeroom-kernels --example decode_speed`.

use homeroom_kernels::{Storage, decode_row};
use std::time::Instant;

fn main() {
    let all = [
        Storage::F32,
        Storage::F16,
        Storage::BF16,
        Storage::Q4_0,
        Storage::Q4_1,
        Storage::Q5_0,
        Storage::Q5_1,
        Storage::Q8_0,
        Storage::Q4K,
        Storage::Q5K,
        Storage::Q6K,
    ];
    // 64 rows of 1536: the decoded panel stays in the second-level cache, as it does in a product.
    let mut out = vec![0f32; 64 * 1536];
    for storage in all {
        let n_bytes = storage.row_bytes(out.len()).expect("1536 is a whole number of blocks");
        let bytes: Vec<u8> = (0..n_bytes).map(|i| (i * 37 % 113) as u8).collect();
        let mut best = f64::INFINITY;
        for _ in 0..200 {
            let start = Instant::now();
            decode_row(storage, std::hint::black_box(&bytes), &mut out);
            std::hint::black_box(&mut out);
            best = best.min(start.elapsed().as_secs_f64());
        }
        let rate = out.len() as f64 / best / 1e9;
        println!("{:5} {rate:6.2} G values/s", format!("{storage:?}").to_lowercase());
    }
}
