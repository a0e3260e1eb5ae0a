//! Encodes a file of f32 values by ggml's block formats, for `tests/peers/quantize.py`, which holds the bytes to ggml's.
//!
//! Run: `cargo run --release -p homeroom-kernels --example quantize -- TYPE COLS IN OUT [PASSES]`
//! TYPE is q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k or q6_k. Prints the seconds of the fastest pass.

use std::time::Instant;

use homeroom_kernels::{Storage, encode_rows};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, cols, from, to, passes @ ..] = &arguments[..] else {
        return Err("usage: quantize TYPE COLS IN OUT [PASSES]".into());
    };
    let storage = match kind.as_str() {
        "bf16" => Storage::BF16,
        "f16" => Storage::F16,
        "q4_0" => Storage::Q4_0,
        "q4_1" => Storage::Q4_1,
        "q5_0" => Storage::Q5_0,
        "q5_1" => Storage::Q5_1,
        "q8_0" => Storage::Q8_0,
        "q4_k" => Storage::Q4K,
        "q5_k" => Storage::Q5K,
        "q6_k" => Storage::Q6K,
        other => return Err(format!("{other}: no such type").into()),
    };
    let cols: usize = cols.parse()?;
    let bytes = std::fs::read(from)?;
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let rows = values.len() / cols;
    let mut out = vec![0; storage.row_bytes(cols).ok_or("COLS is not whole blocks")? * rows];
    let mut fastest = f64::INFINITY;
    for _ in 0..passes.first().map_or(Ok(1), |passes| passes.parse())? {
        let start = Instant::now();
        let read = |rows: std::ops::Range<usize>, to: &mut [f32]| {
            to.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
        };
        encode_rows(storage, (rows, cols), &read, &mut out)?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    std::fs::write(to, out)?;
    println!("{fastest}");
    Ok(())
}
