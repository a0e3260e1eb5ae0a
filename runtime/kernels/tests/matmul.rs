//! Products with a stored weight against a triple loop in f64 over the decoded values.

use homeroom_kernels::{Float, Matrix, RowOrder, Storage, Stream, matmul, matmul_t};
use std::fmt::Debug;

const ALL: [Storage; 11] = [
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

/// Random rows whose values are of order 1. (Fields of f16 scales are kept small by clearing their upper exponent
/// bits, wherever they stand: every byte loses bit 6.)
fn random_bytes(storage: Storage, rows: usize, cols: usize, random: &mut Stream) -> Vec<u8> {
    let size = rows * storage.row_bytes(cols).unwrap();
    let plain = |bits: fn(f32) -> Vec<u8>, random: &mut Stream| {
        let values = (0..rows * cols).map(|_| random.uniform_f32() - 0.5);
        values.flat_map(bits).collect()
    };
    match storage {
        Storage::F32 => plain(|x| x.to_le_bytes().to_vec(), random),
        Storage::F16 => plain(|x| half::f16::from_f32(x).to_le_bytes().to_vec(), random),
        Storage::BF16 => plain(|x| half::bf16::from_f32(x).to_le_bytes().to_vec(), random),
        _ => (0..size).map(|_| random.next_u32() as u8 & 0xBF).collect(),
    }
}

/// The matrix as the test understands it: blocks decoded one stored row at a time, rows put in their places.
fn plain_matrix(w: &Matrix) -> Vec<f64> {
    let size = w.storage.row_bytes(w.cols).unwrap();
    let mut out = vec![0.0; w.rows * w.cols];
    for stored in 0..w.rows {
        let mut row = vec![0f32; w.cols];
        let bytes = &w.bytes[stored * size..(stored + 1) * size];
        homeroom_kernels::decode_row(w.storage, bytes, &mut row);
        // Stored neighbours 2 j and 2 j + 1 of a head are rows j and j + head_dim / 2.
        let i = match w.order {
            RowOrder::Natural => stored,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (stored / head_dim, stored % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        };
        for (out, value) in out[i * w.cols..].iter_mut().zip(row) {
            *out = value.into();
        }
    }
    out
}

/// c (m, p) = sum over k of a(i, k) b(k, j), and the sum of the terms' sizes, which bounds the rounding.
fn naive(
    [m, p, depth]: [usize; 3],
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for i in 0..m {
        for j in 0..p {
            let terms = (0..depth).map(|k| a(i, k) * b(k, j));
            out.push((terms.clone().sum(), terms.map(f64::abs).sum()));
        }
    }
    out
}

/// The largest error in units of the bound `epsilon` (depth / 2 + 2) sum |terms|, which a right product keeps below 1.
fn error<T: Into<f64> + Copy>(got: &[T], expected: &[(f64, f64)], depth: usize, epsilon: f64) -> f64 {
    assert_eq!(got.len(), expected.len());
    let each = got.iter().zip(expected).map(|(&got, &(sum, size))| {
        let got = got.into();
        assert!(got.is_finite());
        (got - sum).abs() / (epsilon * (depth as f64 / 2.0 + 2.0) * size + f64::MIN_POSITIVE)
    });
    each.fold(0.0, f64::max)
}

fn random<T>(n: usize, random: &mut Stream, from: fn(f64) -> T) -> Vec<T> {
    (0..n).map(|_| from(random.uniform() - 0.5)).collect()
}

fn check<T: Float + Into<f64> + Debug + PartialEq>(
    w: &Matrix,
    n: usize,
    stream: &mut Stream,
    from: fn(f64) -> T,
    epsilon: f64,
) {
    let (rows, cols) = (w.rows, w.cols);
    let plain = plain_matrix(w);
    let label = format!("{:?} {rows} x {cols} {:?} n = {n}", w.storage, w.order);
    let x = random(n * cols, stream, from);
    let mut y = vec![from(f64::NAN); n * rows]; // results overwrite
    matmul_t(&x, n, w, &mut y);
    let x_at = |i: usize, k: usize| x[i * cols + k].into();
    let expected = naive([n, rows, cols], x_at, |k, j| plain[j * cols + k]);
    let forward = error(&y, &expected, cols, epsilon);
    assert!(forward < 1.0, "forward {label}: {forward}");

    let dy = random(n * rows, stream, from);
    let mut dx = vec![from(f64::NAN); n * cols];
    matmul(&dy, n, w, &mut dx);
    let dy_at = |i: usize, k: usize| dy[i * rows + k].into();
    let expected = naive([n, cols, rows], dy_at, |k, j| plain[k * cols + j]);
    let backward = error(&dx, &expected, rows, epsilon);
    assert!(backward < 1.0, "backward {label}: {backward}");

    // The rows one by one give the same bits.
    for i in 0..n {
        let mut alone = vec![from(f64::NAN); rows];
        matmul_t(&x[i * cols..(i + 1) * cols], 1, w, &mut alone);
        assert_eq!(alone, y[i * rows..(i + 1) * rows], "forward row {i} {label}");
        let mut alone = vec![from(f64::NAN); cols];
        matmul(&dy[i * rows..(i + 1) * rows], 1, w, &mut alone);
        assert_eq!(alone, dx[i * cols..(i + 1) * cols], "backward row {i} {label}");
    }
}

#[test]
fn products_equal_the_triple_loop_and_rows_do_not_meet() {
    let mut stream = Stream::new(1, 0);
    for storage in ALL {
        for cols in [7, 32, 96, 256, 1024] {
            if storage.row_bytes(cols).is_none() {
                continue;
            }
            for (rows, head_dim) in [(5, 0), (129, 0), (300, 0), (132, 12), (530, 0)] {
                if rows * cols > 300 * 256 && storage != Storage::Q4K && storage != Storage::F32 {
                    continue;
                }
                let order = match head_dim {
                    0 => RowOrder::Natural,
                    _ => RowOrder::Interleaved { head_dim },
                };
                let bytes = random_bytes(storage, rows, cols, &mut stream);
                let w = Matrix::new(storage, &bytes, rows, cols, order).unwrap();
                for n in [1, 2, 3, 6, 37] {
                    if n > 6 && rows * cols > 300 * 256 {
                        continue;
                    }
                    check::<f32>(&w, n, &mut stream, |x| x as f32, f32::EPSILON.into());
                    check::<f64>(&w, n, &mut stream, |x| x, f64::EPSILON);
                }
            }
        }
    }
}

/// The tolerance would notice a transposed weight, a row in another place and a term that is missing.
#[test]
fn a_wrong_product_fails_the_tolerance() {
    let mut stream = Stream::new(2, 0);
    let (size, n) = (96, 3);
    let bytes = random_bytes(Storage::Q5_1, size, size, &mut stream);
    let order = RowOrder::Interleaved { head_dim: 12 };
    let w = Matrix::new(Storage::Q5_1, &bytes, size, size, order).unwrap();
    let plain = plain_matrix(&w);
    let x = random(n * size, &mut stream, |x| x as f32);
    let mut y = vec![0f32; n * size];
    matmul_t(&x, n, &w, &mut y);
    let x_at = |i: usize, k: usize| f64::from(x[i * size + k]);
    let error_of = |depth: usize, w: &dyn Fn(usize, usize) -> f64| {
        let expected = naive([n, size, depth], x_at, w);
        error(&y, &expected, size, f32::EPSILON.into())
    };
    assert!(error_of(size, &|k, j| plain[j * size + k]) < 1.0);
    assert!(error_of(size, &|k, j| plain[k * size + j]) > 1e3);
    assert!(error_of(size, &|k, j| plain[order.stored(j) * size + k]) > 1e3);
    assert!(error_of(size - 1, &|k, j| plain[j * size + k]) > 1e3);
}

#[test]
fn results_are_the_same_bytes_for_any_number_of_threads() {
    let mut stream = Stream::new(3, 0);
    let (rows, cols) = (1100, 768);
    let bytes = random_bytes(Storage::Q4_1, rows, cols, &mut stream);
    let w = Matrix::new(Storage::Q4_1, &bytes, rows, cols, RowOrder::Natural).unwrap();
    for n in [1, 37] {
        let x = random(n * cols, &mut stream, |x| x as f32);
        let dy = random(n * rows, &mut stream, |x| x as f32);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let (mut y, mut dx) = (vec![0f32; n * rows], vec![0f32; n * cols]);
                matmul_t(&x, n, &w, &mut y);
                matmul(&dy, n, &w, &mut dx);
                let both = y.into_iter().chain(dx);
                both.map(f32::to_bits).collect::<Vec<u32>>()
            })
        };
        let one = run(1);
        for threads in [2, 3, 2] {
            assert_eq!(run(threads), one, "{threads} threads, n = {n}");
        }
    }
}

#[test]
fn stored_floats_need_no_alignment() {
    let mut stream = Stream::new(4, 0);
    let (rows, cols, n) = (70, 33, 5);
    let bytes = random_bytes(Storage::F32, rows, cols, &mut stream);
    let x = random(n * cols, &mut stream, |x| x as f32);
    let results: Vec<Vec<f32>> = (0..4)
        .map(|shift| {
            let mut moved = vec![0; shift];
            moved.extend_from_slice(&bytes);
            let w = Matrix::new(Storage::F32, &moved[shift..], rows, cols, RowOrder::Natural).unwrap();
            let mut y = vec![0f32; n * rows];
            matmul_t(&x, n, &w, &mut y);
            y
        })
        .collect();
    assert!(results.iter().all(|y| *y == results[0]));
}

#[test]
fn empty_products_are_zero() {
    let w = Matrix::new(Storage::F32, &[], 0, 3, RowOrder::Natural).unwrap();
    let mut dx = [f32::NAN; 6];
    matmul(&[], 2, &w, &mut dx);
    assert_eq!(dx, [0.0; 6]);
    matmul_t(&[0.0; 6], 2, &w, &mut []);
    let w = Matrix::new(Storage::Q8_0, &[], 3, 0, RowOrder::Natural).unwrap();
    let mut y = [f32::NAN; 6];
    matmul_t(&[], 2, &w, &mut y);
    assert_eq!(y, [0.0; 6]);
    let bytes = [0; 34 * 3];
    let w = Matrix::new(Storage::Q8_0, &bytes, 3, 32, RowOrder::Natural).unwrap();
    matmul_t::<f32>(&[], 0, &w, &mut []);
    matmul::<f32>(&[], 0, &w, &mut []);
}

#[test]
fn a_matrix_of_the_wrong_size_is_refused_by_name() {
    let bytes = [0; 18 * 4];
    let check = |storage, rows, cols, order, expected: &str| {
        let error = Matrix::new(storage, &bytes, rows, cols, order).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    let natural = RowOrder::Natural;
    check(Storage::Q4_0, 4, 31, natural, "31 columns");
    check(Storage::Q4_0, 3, 32, natural, "takes 54 bytes, got 72");
    check(Storage::Q4_0, usize::MAX, 64, natural, "too large");
    check(Storage::F32, 2, usize::MAX, natural, "columns");
    for head_dim in [0, 1, 3, 8] {
        let order = RowOrder::Interleaved { head_dim };
        check(Storage::Q4_0, 4, 32, order, "whole heads");
    }
}
