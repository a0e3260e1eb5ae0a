//! Products by AMX beside its register-only loop and beside the units that it is taken in place of, on layers of SmolLM2-135M and of a 7B
//! model: `cargo run --release -p homeroom-kernels --example amx_speed [rows [width depth]]`.
//!
//! Units are measured by turns, so that a neighbour on the machine disturbs all of them.

use std::time::Instant;

use homeroom_kernels::*;

// As the program has it: what is large begins at a line of the cache.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let numbers: Vec<usize> =
        std::env::args().skip(1).map(|arg| arg.parse().expect("the arguments are numbers")).collect();
    let amx = isa();
    if !amx.has(Feature::AmxBf16) || !amx.has(Feature::AmxInt8) {
        let why =
            if Isa::amx_is_refused() { "the system refuses this process its tiles" } else { "the processor has none" };
        println!("nothing to measure by AMX: {why}, or {ISA_VARIABLE} leaves it out");
        return;
    }
    let without = amx.without(Feature::AmxTile);
    let peak = with_isa(amx, bf16_register_loop_gflops);
    let [pairs, floats] = [with_isa(without, bf16_register_loop_gflops), with_isa(without, f32_register_loop_gflops)];
    println!(
        "{} threads, {}; register loops: AMX bf16 {peak:.0} GFLOP/s, vdpbf16ps {pairs:.0}, f32 {floats:.0}",
        threads(),
        amx.name()
    );
    let shapes = match numbers[..] {
        [_, width, depth] => vec![(width, depth)],
        _ => vec![(960, 576), (576, 576), (3072, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008)],
    };
    for m in numbers.first().map_or(vec![1024, 256, 64, 16], |rows| vec![*rows]) {
        println!("{m} rows: GFLOP/s by AMX, its share of the loop, and its speed as a multiple of the unit before it");
        for &(rows, cols) in &shapes {
            measure(m, rows, cols, [amx, without], peak);
        }
    }
}

fn measure(m: usize, rows: usize, cols: usize, isas: [Isa; 2], peak: f64) {
    let mut random = Stream::new(1, 1);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.uniform_f32() - 0.5).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
    let codec = Codec::int8();
    let read = |part: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&values[part.start * cols..part.end * cols]);
    };
    let Encoded { codes, scales } = encode(&codec, rows, cols, &read).expect("finite values");
    let frozen = Matrix::new(Storage::BF16, &bytes, rows, cols, RowOrder::Natural).expect("the sizes agree");
    let coded = Matrix::coded(&codec, &codes, &scales, rows, cols).expect("the sizes agree");
    let x: Vec<bf16> = (0..m * cols).map(|_| bf16::from_f32(random.uniform_f32() - 0.5)).collect();
    let dy: Vec<bf16> = (0..m * rows).map(|_| bf16::from_f32(random.uniform_f32() - 0.5)).collect();
    let mut out = vec![bf16::ZERO; m * rows.max(cols)];
    print!("  {rows:>5} x {cols:<5}");
    for (name, right) in [("bf16", Right::Frozen(frozen)), ("int8", Right::Integers(coded))] {
        let forward = Term::forward(Left::rows(&x, cols), right);
        let backward = Term::backward(Left::rows(&dy, rows), right);
        for (way, term, width) in [("forward", forward, rows), ("backward", backward, cols)] {
            let mut best = [f64::MAX; 2];
            for _ in 0..12 {
                for (isa, best) in isas.into_iter().zip(&mut best) {
                    let start = Instant::now();
                    with_isa(isa, || {
                        let columns = [Columns { terms: &[term], at: 0, bias: None }];
                        product(m, &columns, Output::Narrow(&mut out), width, Finish::default());
                    });
                    *best = best.min(start.elapsed().as_secs_f64());
                }
            }
            let gflops = 2.0 * (m * rows * cols) as f64 / best[0] / 1e9;
            // The loop of bytes makes twice what that of pairs does.
            let share = 100.0 * gflops / if name == "bf16" { peak } else { 2.0 * peak };
            print!("   {name} {way} {gflops:6.0} ({share:2.0} %, {:.1} x)", best[1] / best[0]);
        }
    }
    println!();
}
