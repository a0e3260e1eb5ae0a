//! How fast a single row is multiplied by stored weights, as for each further token, in gigabytes of weights a second: of weights that lie in
//! the second cache, where instructions are the bound, and of weights beyond all caches, beside what reading memory alone reaches.
//!
//! ```sh
//! cargo run --release -p homeroom-kernels --example gemv_speed -- [576 1536 4096]
//! ```

use std::hint::black_box;
use std::time::Instant;

use homeroom_kernels::{FewRows, Matrix, RoundedRows, RowOrder, Storage, Stream, gemv, isa, read_gigabytes, threads};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const STORAGES: [Storage; 9] = [
    Storage::BF16,
    Storage::Q8_0,
    Storage::Q4_0,
    Storage::Q4_1,
    Storage::Q5_0,
    Storage::Q5_1,
    Storage::Q4K,
    Storage::Q5K,
    Storage::Q6K,
];
/// Bytes of weights beyond the caches.
const LARGE: usize = 1 << 30;
/// Bytes of weights within the second cache.
const SMALL: usize = 1 << 18;

/// Gigabytes a second of the fastest of seven rounds, in which each of `threads` multiplies its part of the rows `times` times.
fn speed(bytes: &[u8], storage: Storage, cols: usize, threads: usize, times: usize) -> f64 {
    let row_bytes = storage.row_bytes(cols).expect("rows of whole blocks");
    let rows = bytes.len() / row_bytes;
    let w = Matrix::new(storage, &bytes[..rows * row_bytes], rows, cols, RowOrder::Natural).expect("a matrix");
    let mut stream = Stream::new(7, 7);
    let values: Vec<f32> = (0..FewRows::padded(cols)).map(|_| stream.normal() as f32).collect();
    let mut x = FewRows { values: &values, step: values.len(), rounded: None };
    let rounded = RoundedRows::new(x);
    x.rounded = Some(&rounded);
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for part in 0..threads {
                let (rows, w) = (part * rows / threads..(part + 1) * rows / threads, &w);
                scope.spawn(move || {
                    let mut out = vec![0f32; rows.len()];
                    for _ in 0..times {
                        gemv(x, w, rows.clone(), black_box(&mut out));
                    }
                });
            }
        });
        best = best.min(begun.elapsed().as_secs_f64());
    }
    (rows * row_bytes * times) as f64 / best / 1e9
}

fn main() {
    let all: Vec<usize> = std::env::args().skip(1).map(|arg| arg.parse().expect("a number of columns")).collect();
    let all = if all.is_empty() { vec![576, 1536, 4096] } else { all };
    println!("{}; GB/s of one thread, of {} threads; reading alone {:.1}", isa().name(), threads(), read_gigabytes());
    let bytes: Vec<u8> = (0..LARGE).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 13) as u8 & 0xF | 0x30).collect();
    for cols in all {
        for storage in STORAGES {
            if storage.row_bytes(cols).is_none() {
                continue;
            }
            let cached = speed(&bytes[..SMALL], storage, cols, 1, 512);
            let [one, several] = [1, threads()].map(|threads| speed(&bytes, storage, cols, threads, 1));
            let name = format!("{storage:?}").to_lowercase();
            println!("{cols:5} {name:5} in the cache {cached:6.1}   beyond {one:6.1} {several:6.1}");
        }
    }
}
