//! Products of a layer of SmolLM2-135M beside the register-only loop: `cargo run --release -p homeroom-kernels --example
//! product_speed [rows]`.

use std::time::Instant;

use homeroom_kernels::*;

fn main() {
    let m = std::env::args().nth(1).map_or(1024, |arg| arg.parse().expect("the argument is a number of rows"));
    measure::<bf16>("bf16", bf16_register_loop_gflops(), m);
    measure::<f32>("f32", f32_register_loop_gflops(), m);
}

fn measure<E: ProductElement>(name: &str, peak: f64, m: usize) {
    println!("{name}   {m} rows, {} threads, {}: register loop {peak:.0} GFLOP/s", threads(), isa().name());
    let mut random = Stream::new(1, 1);
    for storage in [E::STORAGE, Storage::Q4_1, Storage::Q4K, Storage::Q6K] {
        for (rows, cols) in [(960, 576usize), (576, 576), (3072, 576), (576, 1536), (49152, 576)] {
            // K-quants' blocks are of 256.
            let cols = cols.next_multiple_of(storage.block_len());
            let n_bytes = storage.row_bytes(rows * cols).expect("whole blocks");
            let bytes: Vec<u8> = match storage {
                Storage::F32 => (0..rows * cols).flat_map(|_| (random.uniform_f32() - 0.5).to_le_bytes()).collect(),
                _ => (0..n_bytes).map(|_| random.next_u32() as u8 & 0x3F).collect(),
            };
            let w = Matrix::new(storage, &bytes, rows, cols, RowOrder::Natural).expect("the sizes agree");
            let m = if rows > 10_000 { m.min(128) } else { m };
            let x: Vec<E> = (0..m * cols).map(|_| E::of(random.uniform_f32() - 0.5)).collect();
            let dy: Vec<E> = (0..m * rows).map(|_| E::of(random.uniform_f32() - 0.5)).collect();
            let (mut y, mut dx) = (vec![E::default(); m * rows], vec![0f32; m * cols]);
            let mut line = |way: &str, right: Right<'_, E>| {
                let forward = best(|| {
                    let term = [Term::forward(Left::rows(&x, cols), right)];
                    let columns = [Columns { terms: &term, at: 0, bias: None }];
                    product(m, &columns, Output::Narrow(&mut y), rows, Finish::default());
                });
                if matches!(right, Right::Stored(_)) {
                    let gflops = 2.0 * (m * rows * cols) as f64 / forward / 1e9;
                    println!(
                        "  {storage:?} {rows:>5} x {cols:<4} {m:>4} {way:<9}  forward {gflops:6.0} ({:3.0} %)",
                        100.0 * gflops / peak
                    );
                    return;
                }
                let backward = best(|| {
                    let term = [Term::backward(Left::rows(&dy, rows), right)];
                    let columns = [Columns { terms: &term, at: 0, bias: None }];
                    product(m, &columns, Output::Wide(&mut dx), cols, Finish::default());
                });
                let gflops = |seconds: f64| 2.0 * (m * rows * cols) as f64 / seconds / 1e9;
                println!(
                    "  {storage:?} {rows:>5} x {cols:<4} {m:>4} {way:<8}   forward {:6.0} ({:3.0} %)   backward {:6.0} ({:3.0} %)",
                    gflops(forward),
                    100.0 * gflops(forward) / peak,
                    gflops(backward),
                    100.0 * gflops(backward) / peak
                );
            };
            line("", Right::Frozen(w));
            if w.multiplies_as_stored() {
                line("as stored", Right::Stored(w));
            }
            if w.multiplies_in_integers() {
                line("integers", Right::Integers(w));
            }
        }
    }
}

fn best(mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..12).map(time).fold(f64::MAX, f64::min)
}
