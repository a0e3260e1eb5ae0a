//! Products in integers against the same rounding and sums in f64.

use homeroom_kernels::{
    Codec, CodecBlock, Columns, Encoded, Feature, Finish, Left, Matrix, Output, ProductElement, Right, RowOrder,
    Storage, Stream, Term, bf16, encode, product,
};

use super::{isas, normal, on_any_threads, unit};

/// A matrix of eight bits, and its values.
fn weight(rows: usize, cols: usize, stream: &mut Stream) -> (Codec, Encoded) {
    let mut values = normal(rows * cols, 0.1, stream);
    // A row of zeros, and one whose values all are the largest.
    values[..cols].fill(0.0);
    values[cols..2 * cols].fill(0.5);
    let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
    };
    let codec = Codec::int8();
    let encoded = encode(&codec, rows, cols, &read).expect("finite values");
    (codec, encoded)
}

/// A row as whole numbers from -127 to 127, times a scale for each 64.
fn rounded(row: &[f64]) -> Vec<f64> {
    row.chunks(64).flat_map(rounded_group).collect()
}

fn rounded_group(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().fold(0f64, |most, value| most.max(value.abs()));
    let scale = largest / 127.0;
    row.iter().map(|value| if scale > 0.0 { (value / scale).round() * scale } else { 0.0 }).collect()
}

fn check<E: ProductElement>(m: usize, k: usize, n: usize, with_dense: bool) {
    let label = format!("{m} x {k} x {n}, dense term: {with_dense}");
    let mut stream = Stream::new(11, (m * k * n) as u64);
    let (codec, encoded) = weight(n, k, &mut stream);
    let (other_codec, other_encoded) = weight(n, k, &mut stream);
    let one = Matrix::coded(&codec, &encoded.codes, &encoded.scales, n, k).expect("it fits");
    let two = Matrix::coded(&other_codec, &other_encoded.codes, &other_encoded.scales, n, k).expect("it fits");
    assert!(one.multiplies_in_integers(), "{label}");
    let values = |w: &Matrix| {
        let mut values = vec![0f32; n * k];
        w.decode_rows(0..n, &mut values);
        values.into_iter().map(f64::from).collect::<Vec<f64>>()
    };
    let (first, second) = (values(&one), values(&two));
    let elements = |n: usize, stream: &mut Stream| normal(n, 1.0, stream).into_iter().map(E::of).collect::<Vec<E>>();
    let (x, dy) = (elements(m * k, &mut stream), elements(2 * m * n, &mut stream));
    let r = 16;
    let (u, b) = (elements(m * r, &mut stream), elements(n * r, &mut stream));
    let (du, a) = (elements(m * r, &mut stream), elements(r * k, &mut stream));
    let wide = |values: &[E]| values.iter().map(|value| f64::from(value.wide())).collect::<Vec<f64>>();

    let mut forward = vec![0f64; m * n];
    let mut backward = vec![0f64; m * k];
    // As large as a sum's terms are together: what rounding is measured by.
    let mut sizes = [vec![0f64; m * n], vec![0f64; m * k]];
    for i in 0..m {
        let row = rounded(&wide(&x[i * k..(i + 1) * k]));
        for j in 0..n {
            let mut terms: Vec<f64> = row.iter().zip(&first[j * k..(j + 1) * k]).map(|(x, w)| x * w).collect();
            if with_dense {
                terms.extend(wide(&u[i * r..(i + 1) * r]).iter().zip(wide(&b[j * r..(j + 1) * r])).map(|(u, b)| u * b));
            }
            forward[i * n + j] = terms.iter().sum();
            sizes[0][i * n + j] = terms.iter().map(|term| term.abs()).sum();
        }
        // The rows of W are summed over, so their scales go into A.
        for (w, part) in [(&first, 0), (&second, 1)] {
            let scale = |j: usize| {
                let largest = w[j * k..(j + 1) * k].iter().fold(0f64, |most, value| most.max(value.abs()));
                largest / 127.0
            };
            let dy = wide(&dy[i * 2 * n + part * n..][..n]);
            let row = rounded(&(0..n).map(|j| dy[j] * scale(j)).collect::<Vec<f64>>());
            for c in 0..k {
                for j in (0..n).filter(|j| scale(*j) > 0.0) {
                    let term = row[j] * w[j * k + c] / scale(j);
                    backward[i * k + c] += term;
                    sizes[1][i * k + c] += term.abs();
                }
                if with_dense && part == 0 {
                    for l in 0..r {
                        let term = f64::from(du[i * r + l].wide()) * f64::from(a[l * k + c].wide());
                        backward[i * k + c] += term;
                        sizes[1][i * k + c] += term.abs();
                    }
                }
            }
        }
    }

    for isa in isas() {
        let run = |to: usize, transposed: bool| {
            on_any_threads(isa, &label, || {
                let width = if transposed { n } else { k };
                let mut terms = Vec::new();
                if transposed {
                    terms.push(Term::forward(Left::rows(&x, k), Right::Integers(one)));
                    if with_dense {
                        terms.push(Term::forward(Left::rows(&u, r), Right::Dense { values: &b, cols: r }));
                    }
                } else {
                    terms.push(Term::backward(Left::rows(&dy, 2 * n), Right::Integers(one)));
                    terms.push(Term::backward(Left::rows(&dy, 2 * n).from(n), Right::Integers(two)));
                    if with_dense {
                        terms.push(Term::backward(Left::rows(&du, r), Right::Dense { values: &a, cols: k }));
                    }
                }
                let columns = [Columns { terms: &terms, at: 0, bias: None }];
                let mut floats = vec![if to == 1 { 1f32 } else { f32::NAN }; m * width];
                let mut narrow = vec![E::default(); m * width];
                let out = match to {
                    0 => Output::Wide(&mut floats),
                    1 => Output::Add(&mut floats),
                    _ => Output::Narrow(&mut narrow),
                };
                product(m, &columns, out, width, Finish { scale: 2.0, row_add: None });
                match to {
                    2 => narrow.iter().map(|value| value.wide()).collect(),
                    _ => floats,
                }
            })
        };
        for transposed in [true, false] {
            let (expected, sizes) = if transposed { (&forward, &sizes[0]) } else { (&backward, &sizes[1]) };
            for to in 0..3 {
                let before = if to == 1 { 1.0 } else { 0.0 };
                for (i, got) in run(to, transposed).into_iter().enumerate() {
                    let want = before + 2.0 * expected[i];
                    // Where a value of A lies between two whole numbers f32 and f64 may part; these are few, and one step each.
                    let steps = 2.0 * sizes[i] * (1e-5 + 2.0 / 254.0 / 8.0);
                    let rounding = if to == 2 { 2.0 * unit::<E>() * want.abs() } else { 0.0 };
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= steps + rounding + 1e-5, "{label}, {isa:?}, {transposed}, {to}: {got} for {want}");
                }
            }
        }
    }
}

#[test]
fn products_in_integers_are_those_of_rounded_rows() {
    for (m, k, n) in [(1, 32, 4), (4, 44, 12), (5, 64, 100), (37, 576, 192), (3, 2080, 68), (6, 96, 2052)] {
        for with_dense in [false, true] {
            check::<f32>(m, k, n, with_dense);
            check::<bf16>(m, k, n, with_dense);
        }
    }
}

#[test]
fn every_processor_comes_to_the_same_integers() {
    let mut stream = Stream::new(5, 3);
    let (m, k, n) = (7, 128, 72);
    let (codec, encoded) = weight(n, k, &mut stream);
    let w = Matrix::coded(&codec, &encoded.codes, &encoded.scales, n, k).expect("it fits");
    let x = normal(m * k, 3.0, &mut stream);
    let all: Vec<Vec<f32>> = isas()
        .map(|isa| {
            on_any_threads(isa, "integers", || {
                let terms = [Term::forward(Left::rows(&x, k), Right::Integers(w))];
                let mut out = vec![0f32; m * n];
                let columns = [Columns { terms: &terms, at: 0, bias: None }];
                product(m, &columns, Output::Wide(&mut out), n, Finish::default());
                out
            })
        })
        .collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_row_that_holds_no_number_yields_none_and_no_other_row_does() {
    let mut stream = Stream::new(5, 4);
    let (m, k, n) = (3, 32, 8);
    let (codec, encoded) = weight(n, k, &mut stream);
    let w = Matrix::coded(&codec, &encoded.codes, &encoded.scales, n, k).expect("it fits");
    for wrong in [f32::NAN, f32::INFINITY] {
        let mut x = normal(m * k, 1.0, &mut stream);
        x[k + 5] = wrong;
        let terms = [Term::forward(Left::rows(&x, k), Right::Integers(w))];
        let mut out = vec![0f32; m * n];
        product(m, &[Columns { terms: &terms, at: 0, bias: None }], Output::Wide(&mut out), n, Finish::default());
        for (i, value) in out.iter().enumerate() {
            assert_eq!(value.is_nan(), i / n == 1, "{i}");
        }
    }
}

/// Holds both products with a weight to those of its values, by what rounding both sides to whole numbers can cost at most, and by what
/// it does cost.
fn check_rounded(w: &Matrix<'_>, m: usize, label: &str) {
    let (n, k) = (w.rows, w.cols);
    let mut stream = Stream::new(17, (n * k) as u64);
    let mut values = vec![0f32; n * k];
    w.decode_rows(0..n, &mut values);
    let turned: Vec<f32> = (0..k).flat_map(|c| (0..n).map(move |r| r * k + c)).map(|at| values[at]).collect();
    let largest = |row: &[f32]| f64::from(row.iter().fold(0f32, |most, value| most.max(value.abs())));
    for transposed in [true, false] {
        // `columns` (width, depth).
        let (columns, depth, width) = if transposed { (&values, k, n) } else { (&turned, n, k) };
        let x = normal(m * depth, 1.0, &mut stream);
        for isa in isas() {
            let out = on_any_threads(isa, label, || {
                let can = if transposed { w.multiplies_forward_in_integers() } else { w.multiplies_in_integers() };
                if !can {
                    return None;
                }
                let left = Left::rows(&x, depth);
                let right = Right::Integers(*w);
                let terms = [if transposed { Term::forward(left, right) } else { Term::backward(left, right) }];
                let mut out = vec![0f32; m * width];
                let columns = [Columns { terms: &terms, at: 0, bias: None }];
                product(m, &columns, Output::Wide(&mut out), width, Finish::default());
                Some(out)
            });
            let Some(out) = out else { continue };
            let (mut away, mut norm) = (0f64, 0f64);
            for (i, j) in (0..m).flat_map(|i| (0..width).map(move |j| (i, j))) {
                let (x, w) = (&x[i * depth..(i + 1) * depth], &columns[j * depth..(j + 1) * depth]);
                let (mut want, mut bound) = (0f64, 1e-6);
                for (x, w) in x.chunks(64).zip(w.chunks(64)) {
                    // A block's levels are rounded by its scale, and its values need not reach it.
                    let (of_x, of_w) = (largest(x) / 254.0, 3.0 * largest(w) / 254.0);
                    for (x, w) in x.iter().zip(w) {
                        let (x, w) = (f64::from(*x), f64::from(*w));
                        want += x * w;
                        norm += (x * w).powi(2);
                        bound += of_x * w.abs() + of_w * x.abs() + of_x * of_w;
                    }
                }
                let error = f64::from(out[i * width + j]) - want;
                assert!(error.abs() <= bound, "{label}, {isa:?}, {transposed}: off by {error:e}, bound {bound:e}");
                away += error.powi(2);
            }
            assert!(away.sqrt() < 0.02 * norm.sqrt(), "{label}, {isa:?}, {transposed}: {} away", (away / norm).sqrt());
        }
    }
}

#[test]
fn weights_of_any_storage_are_multiplied_in_integers() {
    let mut stream = Stream::new(8, 2);
    let block = |codec: Codec, len: usize| Codec { block: CodecBlock::Flat(len), ..codec };
    let codecs =
        [("nf4", Codec::nf4()), ("nf4 by 32", block(Codec::nf4(), 32)), ("nf4 by 128", block(Codec::nf4(), 128))];
    for (m, k, n) in [(1, 32, 4), (5, 64, 100), (9, 576, 192), (3, 2080, 68), (7, 192, 132)] {
        let values = normal(n * k, 0.1, &mut stream);
        let floats: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let halves: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        let label = |name: &str| format!("{name}, {n} x {k}");
        for (storage, bytes) in [(Storage::F32, &floats), (Storage::BF16, &halves)] {
            let w = Matrix::new(storage, bytes, n, k, RowOrder::Natural).expect("it fits");
            check_rounded(&w, m, &label(&format!("{storage:?}")));
        }
        let order = RowOrder::Interleaved { head_dim: n };
        let w = Matrix::new(Storage::BF16, &halves, n, k, order).expect("it fits");
        check_rounded(&w, m, &label("rows in another order"));
        for (name, codec) in &codecs {
            let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
                out.copy_from_slice(&values[rows.start * k..rows.end * k]);
            };
            let Encoded { codes, scales } = encode(codec, n, k, &read).expect("finite values");
            check_rounded(&Matrix::coded(codec, &codes, &scales, n, k).expect("it fits"), m, &label(name));
        }
    }
}

/// Those of 256 values are multiplied forward alone.
#[test]
fn weights_in_blocks_of_whole_numbers_are_multiplied_in_integers() {
    let mut stream = Stream::new(8, 3);
    // Of each block, where a half-precision number stands.
    let storages: [(Storage, &[usize]); 5] = [
        (Storage::Q4_0, &[0]),
        (Storage::Q4_1, &[0, 2]),
        (Storage::Q8_0, &[0]),
        (Storage::Q4K, &[0, 2]),
        (Storage::Q6K, &[208]),
    ];
    for (storage, halves) in storages {
        let (len, size) = (storage.block_len(), storage.block_bytes());
        for (m, blocks, n) in [(1, 1, 4), (5, 3, 100), (7, 9, 68)] {
            let mut bytes: Vec<u8> = (0..n * blocks * size).map(|_| stream.next_u32() as u8).collect();
            for (block, bytes) in bytes.chunks_exact_mut(size).enumerate() {
                for at in halves {
                    bytes[*at..at + 2].copy_from_slice(&(0x1C00 + (block % 7) as u16).to_le_bytes());
                }
            }
            let w = Matrix::new(storage, &bytes, n, blocks * len, RowOrder::Natural).expect("it fits");
            assert!(w.multiplies_in_integers() || len == 256 || !homeroom_kernels::isa().multiplies_bytes());
            check_rounded(&w, m, &format!("{storage:?}, {n} x {}", blocks * len));
        }
    }
}

/// The same whole numbers, whatever vectors they are multiplied in.
#[test]
fn weights_of_any_storage_come_to_the_same_wherever_bytes_are_multiplied() {
    let mut stream = Stream::new(8, 4);
    let (m, k, n) = (7, 192, 132);
    let values = normal(n * k, 0.1, &mut stream);
    let halves: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
    let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&values[rows.start * k..rows.end * k]);
    };
    let codec = Codec::nf4();
    let Encoded { codes, scales } = encode(&codec, n, k, &read).expect("finite values");
    let of_book = Matrix::coded(&codec, &codes, &scales, n, k).expect("it fits");
    let of_floats = Matrix::new(Storage::BF16, &halves, n, k, RowOrder::Natural).expect("it fits");
    for (w, transposed) in [of_book, of_floats].into_iter().flat_map(|w| [(w, true), (w, false)]) {
        let (depth, width) = if transposed { (k, n) } else { (n, k) };
        let x = normal(m * depth, 1.0, &mut stream);
        let all = isas().filter(|isa| isa.multiplies_bytes()).map(|isa| {
            on_any_threads(isa, "any storage", || {
                let (left, right) = (Left::rows(&x, depth), Right::Integers(w));
                let terms = [if transposed { Term::forward(left, right) } else { Term::backward(left, right) }];
                let mut out = vec![0f32; m * width];
                let columns = [Columns { terms: &terms, at: 0, bias: None }];
                product(m, &columns, Output::Wide(&mut out), width, Finish::default());
                out
            })
        });
        let all: Vec<Vec<f32>> = all.collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "forward: {transposed}");
    }
}

/// ggml's blocks of whole numbers: of each, where half-precision numbers stand.
const BLOCKS: [(Storage, &[usize]); 8] = [
    (Storage::Q4_0, &[0]),
    (Storage::Q4_1, &[0, 2]),
    (Storage::Q5_0, &[0]),
    (Storage::Q5_1, &[0, 2]),
    (Storage::Q8_0, &[0]),
    (Storage::Q4K, &[0, 2]),
    (Storage::Q5K, &[0, 2]),
    (Storage::Q6K, &[208]),
];

/// Any codes, with half-precision numbers of both signs; the first row's codes are the largest there are, and the second's the smallest.
fn blocks(storage: Storage, halves: &[usize], rows: usize, cols: usize, stream: &mut Stream) -> Vec<u8> {
    let row_bytes = storage.row_bytes(cols).expect("whole blocks");
    let mut bytes: Vec<u8> = (0..rows * row_bytes).map(|_| stream.next_u32() as u8).collect();
    bytes[..row_bytes].fill(if storage == Storage::Q8_0 { 0x80 } else { 0xFF });
    bytes[row_bytes..2 * row_bytes].fill(if storage == Storage::Q8_0 { 0x7F } else { 0 });
    for (block, bytes) in bytes.chunks_exact_mut(storage.block_bytes()).enumerate() {
        for at in halves {
            let sign = if block % 3 == 1 { 0x8000 } else { 0 };
            bytes[*at..at + 2].copy_from_slice(&(sign + 0x1C00 + (block % 7) as u16).to_le_bytes());
        }
    }
    bytes
}

/// Rows of A are rounded by groups of 32, the weight is not; and a row is the same whatever is beside it, and by whatever vectors.
#[test]
fn whole_numbers_are_multiplied_as_they_are_stored() {
    let mut stream = Stream::new(8, 5);
    let mut taken = 0;
    for (storage, halves) in BLOCKS {
        let len = storage.block_len();
        for (m, blocks_of_row, n) in [(1, 1, 2), (5, 3, 100), (13, 5, 68), (7, 2080 / len, 17)] {
            let k = blocks_of_row * len;
            let bytes = blocks(storage, halves, n, k, &mut stream);
            let order = if n == 68 { RowOrder::Interleaved { head_dim: 34 } } else { RowOrder::Natural };
            let w = Matrix::new(storage, &bytes, n, k, order).expect("it fits");
            let mut values = vec![0f32; n * k];
            w.decode_rows(0..n, &mut values);
            let mut x = normal(m * k, 1.0, &mut stream);
            // A row of the largest codes, and one of nothing.
            x[..k].fill(-2.5);
            if m > 3 {
                x[3 * k..4 * k].fill(0.0);
            }
            let mut alike: Option<Vec<f32>> = None;
            for isa in isas() {
                let label = format!("{storage:?}, {m} x {k} x {n}, {isa:?}");
                let of_rows = |first: usize, count: usize| {
                    on_any_threads(isa, &label, || {
                        let left = Left { values: &x[..], at: first * k, step: k };
                        w.multiplies_as_stored().then(|| {
                            let terms = [Term::forward(left, Right::Stored(w))];
                            let mut out = vec![f32::NAN; count * n];
                            let columns = [Columns { terms: &terms, at: 0, bias: None }];
                            product(count, &columns, Output::Wide(&mut out), n, Finish::default());
                            out
                        })
                    })
                };
                let Some(out) = of_rows(0, m) else { continue };
                taken += 1;
                for (i, out) in out.chunks_exact(n).enumerate() {
                    assert_eq!(Some(out), of_rows(i, 1).as_deref(), "{label}: row {i} alone");
                }
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let (mut want, mut bound) = (0f64, 1e-6);
                    for (x, w) in x[i * k..(i + 1) * k].chunks(32).zip(values[j * k..(j + 1) * k].chunks(32)) {
                        let of_x = f64::from(x.iter().fold(0f32, |most, x| most.max(x.abs()))) / 127.0;
                        let of_w = f64::from(w.iter().fold(0f32, |most, w| most.max(w.abs())));
                        for (x, w) in x.iter().zip(w) {
                            let whole = if of_x > 0.0 { (f64::from(*x) / of_x).round() } else { 0.0 };
                            want += of_x * whole * f64::from(*w);
                            // One in many lies between two whole numbers; a minimum and what is above it may be larger than a value.
                            bound += of_x * 127.0 * of_w * 4e-5;
                        }
                    }
                    let got = f64::from(out[i * n + j]);
                    assert!((got - want).abs() <= bound, "{label}: {got} at {i}, {j} is not {want} to {bound:e}");
                }
                assert!(alike.as_ref().is_none_or(|alike| *alike == out), "{label}: another processor's is another");
                alike = Some(out);
            }
        }
    }
    assert!(taken > 0 || !isas().any(|isa| isa.has(Feature::Avx2)), "nothing was multiplied");
}

/// Beside an adapter's term, weights of two formats and one in floats, to every output.
#[test]
fn a_sum_takes_terms_as_they_are_stored_beside_others() {
    let mut stream = Stream::new(8, 6);
    let (m, k, n, r) = (9, 256, 76, 16);
    let four = blocks(Storage::Q4K, &[0, 2], n, k, &mut stream);
    let six = blocks(Storage::Q6K, &[208], n, k, &mut stream);
    let floats: Vec<u8> = normal(n * k, 0.1, &mut stream).iter().flat_map(|value| value.to_le_bytes()).collect();
    let matrix = |storage, bytes| Matrix::new(storage, bytes, n, k, RowOrder::Natural).expect("it fits");
    let weights = [matrix(Storage::Q4K, &four), matrix(Storage::Q6K, &six), matrix(Storage::F32, &floats)];
    let (x, u, b) = (normal(m * k, 1.0, &mut stream), normal(m * r, 1.0, &mut stream), normal(n * r, 1.0, &mut stream));
    let bias = normal(n, 1.0, &mut stream);
    for isa in isas() {
        let run = |rights: &[Right<'_, f32>], to: usize| {
            on_any_threads(isa, "beside others", || {
                let mut terms: Vec<_> = rights.iter().map(|w| Term::forward(Left::rows(&x, k), *w)).collect();
                terms.push(Term::forward(Left::rows(&u, r), Right::Dense { values: &b, cols: r }));
                let columns = [Columns { terms: &terms, at: 0, bias: Some(&bias) }];
                let mut out = vec![0.5f32; m * n];
                let to = match to {
                    0 => Output::Wide(&mut out),
                    1 => Output::Add(&mut out),
                    _ => Output::Narrow(&mut out),
                };
                product(m, &columns, to, n, Finish { scale: 2.0, row_add: None });
                out
            })
        };
        let [a, b, c] = weights;
        if !homeroom_kernels::with_isa(isa, || a.multiplies_as_stored() && b.multiplies_as_stored()) {
            continue;
        }
        for to in 0..3 {
            let exact = run(&[Right::Frozen(a), Right::Frozen(b), Right::Frozen(c)], to);
            let got = run(&[Right::Stored(a), Right::Frozen(c), Right::Stored(b)], to);
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let away = norm(&mut exact.iter().zip(&got).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
            assert!(away > 0.0 && away < 0.01, "{isa:?}, {to}: {away}");
        }
    }
}

/// A row with a value that is no number yields none, and no other row does.
#[test]
fn no_number_stays_in_its_row_where_weights_are_as_they_are_stored() {
    let mut stream = Stream::new(8, 7);
    let (m, k, n) = (3, 64, 20);
    let bytes = blocks(Storage::Q4_0, &[0], n, k, &mut stream);
    let w = Matrix::new(Storage::Q4_0, &bytes, n, k, RowOrder::Natural).expect("it fits");
    for isa in isas() {
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut x = normal(m * k, 1.0, &mut stream);
            x[k + 40] = wrong;
            let out = on_any_threads(isa, "no number", || {
                w.multiplies_as_stored().then(|| {
                    let terms = [Term::forward(Left::rows(&x, k), Right::Stored(w))];
                    let mut out = vec![0f32; m * n];
                    let columns = [Columns { terms: &terms, at: 0, bias: None }];
                    product(m, &columns, Output::Wide(&mut out), n, Finish::default());
                    super::bits(&out)
                })
            });
            for (i, value) in out.into_iter().flatten().enumerate() {
                assert_eq!(f32::from_bits(value).is_nan(), i / n == 1, "{isa:?}, {i}");
            }
        }
    }
}

#[test]
fn a_weight_that_is_no_number_yields_none_where_it_stands() {
    let (m, k, n) = (2, 256, 8);
    let mut values = vec![1f32; n * k];
    values[3 * k + 200] = f32::NAN;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let w = Matrix::new(Storage::F32, &bytes, n, k, RowOrder::Natural).expect("it fits");
    if !w.multiplies_in_integers() {
        return;
    }
    let x = vec![1f32; m * k];
    let terms = [Term::forward(Left::rows(&x, k), Right::Integers(w))];
    let mut out = vec![0f32; m * n];
    product(m, &[Columns { terms: &terms, at: 0, bias: None }], Output::Wide(&mut out), n, Finish::default());
    for (i, value) in out.iter().enumerate() {
        assert!(if i % n == 3 { value.is_nan() } else { (value - k as f32).abs() < 1e-2 }, "{i}: {value}");
    }
}
