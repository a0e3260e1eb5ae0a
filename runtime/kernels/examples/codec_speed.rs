//! Encoding and decoding, in values a second and on one thread: `cargo run --release -p homeroom-kernels --example codec_speed`.

use std::time::Instant;

use homeroom_kernels::{
    Codec, Columns, Finish, Isa, Left, Matrix, Output, Right, Stream, Term, bf16, encode, product, with_isa,
};

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of one thread");
    pool.install(measure);
}

fn measure() {
    let (rows, cols) = (1536, 1536);
    let mut random = Stream::new(1, 1);
    let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() as f32).collect();
    let read = |range: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&values[range.start * cols..range.end * cols]);
    };
    for codec in [Codec::nf4(), Codec::int8()] {
        for isa in [Isa::PORTABLE, Isa::AVX2, Isa::AVX512BF16] {
            with_isa(isa, || {
                let encoding = best(|| drop(encode(&codec, rows, cols, &read)));
                let encoded = encode(&codec, rows, cols, &read).expect("the values are finite");
                let matrix =
                    Matrix::coded(&codec, &encoded.codes, &encoded.scales, rows, cols).expect("the sizes agree");
                let mut floats = vec![0f32; rows * cols];
                let decoding = best(|| matrix.decode_rows(0..rows, &mut floats));
                // A product with one row of x is little but decoding to bf16 and packing.
                let (x, mut y) = (vec![bf16::ONE; cols], vec![0f32; rows]);
                let packing = best(|| {
                    let term = [Term::forward(Left::rows(&x, cols), Right::Frozen(matrix))];
                    let columns = [Columns { terms: &term, at: 0, bias: None }];
                    product(1, &columns, Output::Wide(&mut y), rows, Finish::default());
                });
                let giga = |seconds: f64| (rows * cols) as f64 / seconds / 1e9;
                println!(
                    "{:<5} {:<10} encode {:.2}   decode to f32 {:.2}   decode to bf16 and pack {:.2} G values/s",
                    codec.name,
                    isa.name(),
                    giga(encoding),
                    giga(decoding),
                    giga(packing)
                );
            });
        }
    }
}

fn best(mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..5).map(time).fold(f64::MAX, f64::min)
}
