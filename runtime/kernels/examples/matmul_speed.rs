//! Products with a stored weight beside the `gemm` crate's own on the same floats:
//! `cargo run --release -p homeroom-kernels --example matmul_speed [n]`.

use gemm::{Parallelism, gemm};
use homeroom_kernels::{Matrix, RowOrder, Storage, Stream, matmul, matmul_t};
use std::time::{Duration, Instant};

fn main() {
    let n = std::env::args().nth(1).map_or(512, |arg| arg.parse().expect("the argument is a number of rows"));
    println!("n = {n}, {} threads, GFLOP/s", rayon::current_num_threads());
    println!("shape         storage   forward  gemm  ratio   backward  gemm  ratio");
    for (rows, cols) in [(192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576)] {
        for storage in [Storage::F32, Storage::Q4_1, Storage::Q8_0] {
            compare(n, rows, cols, storage);
        }
    }
}

fn compare(n: usize, rows: usize, cols: usize, storage: Storage) {
    let mut random = Stream::new(1, 1);
    let n_bytes = storage.row_bytes(rows * cols).expect("576 and 1536 are whole numbers of blocks");
    let bytes: Vec<u8> = match storage {
        Storage::F32 => (0..rows * cols).flat_map(|_| (random.uniform_f32() - 0.5).to_le_bytes()).collect(),
        // Below 64 in every byte keeps the scales finite.
        _ => (0..n_bytes).map(|_| random.next_u32() as u8 & 63).collect(),
    };
    let w = Matrix::new(storage, &bytes, rows, cols, RowOrder::Natural).expect("the sizes agree");
    let mut floats = vec![0f32; rows * cols];
    w.decode_rows(0..rows, &mut floats);
    let x: Vec<f32> = (0..n * cols).map(|_| random.uniform_f32() - 0.5).collect();
    let dy: Vec<f32> = (0..n * rows).map(|_| random.uniform_f32() - 0.5).collect();
    let (mut y, mut dx) = (vec![0f32; n * rows], vec![0f32; n * cols]);

    // c (m, p) = a (m, k) . b (k, p), with the strides of b.
    let own = |c: &mut [f32], a: &[f32], [m, p, k]: [usize; 3], b_col: usize, b_row: usize| {
        assert!(c.len() == m * p && a.len() == m * k && floats.len() == k * p);
        // SAFETY: a and c are row-major and as large as asserted; b is all of `floats`, in one order or the other.
        unsafe {
            gemm(
                m,
                p,
                k,
                c.as_mut_ptr(),
                1,
                p as isize,
                false,
                a.as_ptr(),
                1,
                k as isize,
                floats.as_ptr(),
                b_col as isize,
                b_row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
    };
    let [forward, forward_gemm] = best_of([&mut || matmul_t(&x, n, &w, &mut y), &mut {
        let mut y = vec![0f32; n * rows];
        let (own, x) = (&own, &x);
        move || own(&mut y, x, [n, rows, cols], cols, 1)
    }]);
    let [backward, backward_gemm] = best_of([&mut || matmul(&dy, n, &w, &mut dx), &mut {
        let mut dx = vec![0f32; n * cols];
        let (own, dy) = (&own, &dy);
        move || own(&mut dx, dy, [n, cols, rows], 1, cols)
    }]);
    let flop = 2.0 * (n * rows * cols) as f64;
    let rate = |time: Duration| flop / time.as_secs_f64() / 1e9;
    println!(
        "{:13} {:8} {:8.1} {:5.1} {:6.2} {:10.1} {:5.1} {:6.2}",
        format!("{rows} x {cols}"),
        format!("{storage:?}").to_lowercase(),
        rate(forward),
        rate(forward_gemm),
        forward_gemm.as_secs_f64() / forward.as_secs_f64(),
        rate(backward),
        rate(backward_gemm),
        backward_gemm.as_secs_f64() / backward.as_secs_f64(),
    );
}

/// The shortest time of each, taking turns for half a second so that a disturbance meets them all.
fn best_of<const N: usize>(mut tasks: [&mut dyn FnMut(); N]) -> [Duration; N] {
    let mut best = [Duration::MAX; N];
    let begin = Instant::now();
    for round in 0.. {
        for (task, best) in tasks.iter_mut().zip(&mut best) {
            let start = Instant::now();
            task();
            *best = start.elapsed().min(*best);
        }
        if round > 2 && begin.elapsed() > Duration::from_millis(500) {
            break;
        }
    }
    best
}
