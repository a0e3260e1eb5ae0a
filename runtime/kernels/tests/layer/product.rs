//! Products and outer products against triple loops in f64.

use std::panic::{AssertUnwindSafe, catch_unwind};

use homeroom_kernels::{
    Codec, Columns, Encoded, Finish, Gain, Left, Matrix, Output, ProductElement, Right, RowOrder, Storage, Stream,
    Term, bf16, decode_row, encode, outer, product, product_with_gain,
};

use super::{U, bits, close, isas, narrow, on_any_threads, on_threads, uniform, unit, wide};

const NATURAL: RowOrder = RowOrder::Natural;

/// W of a term, and which way it is used.
#[derive(Clone, Copy, Debug)]
struct Weight {
    /// A frozen weight's storage; `None`: dense.
    frozen: Option<(Storage, RowOrder)>,
    transposed: bool,
    /// Depth of the sum.
    k: usize,
}

#[derive(Clone, Copy, Debug)]
struct Group<'a> {
    at: usize,
    n: usize,
    bias: bool,
    weights: &'a [Weight],
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    Wide,
    Add,
    Narrow,
}

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    m: usize,
    groups: &'a [Group<'a>],
    to: To,
    scale: f32,
    row_add: bool,
    /// Small whole numbers, whose sums are exact in f32, so that a term too many or too few cannot pass for rounding.
    whole: bool,
}

/// W as it is given to the product, and the values that are to be multiplied, row-major as W is.
struct Given<E> {
    weight: Weight,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
    values: Vec<E>,
    plain: Vec<f64>,
    /// Rows of A with NaN around them.
    left: Vec<E>,
}

/// Where A starts, and what lies between its rows.
const LEFT_AT: usize = 3;
const LEFT_GAP: usize = 5;

impl<E: ProductElement> Given<E> {
    fn new(weight: Weight, m: usize, n: usize, whole: bool, stream: &mut Stream) -> Self {
        let k = weight.k;
        let (rows, cols) = if weight.transposed { (n, k) } else { (k, n) };
        let mut some = |n: usize| -> Vec<f32> {
            if whole { (0..n).map(|_| stream.below(7) as f32 - 3.0).collect() } else { uniform(n, stream) }
        };
        let mut left = vec![E::of(f32::NAN); LEFT_AT + m * (k + LEFT_GAP)];
        for i in 0..m {
            let row: Vec<E> = narrow(&some(k));
            left[LEFT_AT + i * (k + LEFT_GAP)..][..k].copy_from_slice(&row);
        }
        let (mut bytes, mut values, plain) = (Vec::new(), Vec::new(), some(rows * cols));
        let plain = match weight.frozen {
            None => {
                values = narrow(&plain);
                wide(&values)
            }
            Some((storage, order)) => {
                bytes = match storage {
                    Storage::F32 => plain.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    Storage::F16 => plain.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
                    Storage::BF16 => plain.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
                    // Values of order 1: scales lose their upper exponent bit, wherever they stand.
                    _ => (0..rows * storage.row_bytes(cols).unwrap()).map(|_| stream.next_u32() as u8 & 0xBF).collect(),
                };
                let mut plain = vec![0f32; rows * cols];
                let size = storage.row_bytes(cols).unwrap();
                for (i, row) in plain.chunks_exact_mut(cols.max(1)).enumerate() {
                    decode_row(storage, &bytes[order.stored(i) * size..][..size], row);
                }
                wide(&narrow::<E>(&plain))
            }
        };
        Self { weight, rows, cols, bytes, values, plain, left }
    }

    fn term(&self) -> Term<'_, E> {
        let left = Left { values: &self.left, at: LEFT_AT, step: self.weight.k + LEFT_GAP };
        let right = match self.weight.frozen {
            Some((storage, order)) => {
                Right::Frozen(Matrix::new(storage, &self.bytes, self.rows, self.cols, order).unwrap())
            }
            None => Right::Dense { values: &self.values, cols: self.cols },
        };
        Term { left, right, transposed: self.weight.transposed }
    }

    /// Σ A B and Σ |A B| for a row and a column.
    fn sum(&self, i: usize, j: usize) -> [f64; 2] {
        let k = self.weight.k;
        let a = &self.left[LEFT_AT + i * (k + LEFT_GAP)..][..k];
        let (start, step) = if self.weight.transposed { (j * self.cols, 1) } else { (j, self.cols) };
        let mut sums = [0.0; 2];
        for (k, a) in a.iter().enumerate() {
            let value = f64::from(a.wide()) * self.plain[start + k * step];
            sums[0] += value;
            sums[1] += value.abs();
        }
        sums
    }
}

/// Columns of the output that no group has, at the end of a row.
const OUT_GAP: usize = 3;

fn check<E: ProductElement>(case: Case, stream: &mut Stream) {
    let Case { m, groups, to, scale, row_add, whole } = case;
    let given: Vec<Vec<Given<E>>> = groups
        .iter()
        .map(|group| group.weights.iter().map(|weight| Given::new(*weight, m, group.n, whole, stream)).collect())
        .collect();
    let terms: Vec<Vec<Term<E>>> = given.iter().map(|given| given.iter().map(Given::term).collect()).collect();
    let biases: Vec<Vec<f32>> = groups.iter().map(|group| uniform(group.n, stream)).collect();
    let columns: Vec<Columns<E>> = (0..groups.len())
        .map(|g| Columns { terms: &terms[g], at: groups[g].at, bias: groups[g].bias.then_some(&biases[g][..]) })
        .collect();
    let step = groups.iter().map(|group| group.at + group.n).max().unwrap_or(0) + OUT_GAP;
    let row_adds = uniform(m, stream);
    let before = match to {
        To::Add => uniform(m * step, stream),
        _ => vec![f32::NAN; m * step],
    };
    // Rows `rows` of the whole, alone.
    let run = |rows: std::ops::Range<usize>| -> Vec<f32> {
        let terms: Vec<Vec<Term<E>>> = columns
            .iter()
            .map(|columns| {
                let moved = columns.terms.iter().map(|term| {
                    let left = Left { at: term.left.at + rows.start * term.left.step, ..term.left };
                    Term { left, ..*term }
                });
                moved.collect()
            })
            .collect();
        let columns: Vec<Columns<E>> =
            columns.iter().zip(&terms).map(|(columns, terms)| Columns { terms, ..*columns }).collect();
        let finish = Finish { scale, row_add: row_add.then_some(&row_adds[rows.clone()]) };
        let mut values = before[rows.start * step..rows.end * step].to_vec();
        let m = rows.len();
        match to {
            To::Wide => product(m, &columns, Output::Wide(&mut values), step, finish),
            To::Add => product(m, &columns, Output::Add(&mut values), step, finish),
            To::Narrow => {
                let mut narrow = narrow::<E>(&values);
                product(m, &columns, Output::Narrow(&mut narrow), step, finish);
                values = narrow.iter().map(|value| value.wide()).collect();
            }
        }
        values
    };

    let (mut expected, mut bound) = (vec![f64::NAN; m * step], vec![f64::NAN; m * step]);
    for (g, group) in groups.iter().enumerate() {
        let depth: usize = group.weights.iter().map(|weight| weight.k).sum();
        for (i, addend) in row_adds.iter().enumerate() {
            for (j, bias) in biases[g].iter().enumerate() {
                let at = i * step + group.at + j;
                let [sum, size] =
                    given[g].iter().map(|given| given.sum(i, j)).fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d]);
                let addends = [
                    if group.bias { f64::from(*bias) } else { 0.0 },
                    if row_add { f64::from(*addend) } else { 0.0 },
                    if to == To::Add { f64::from(before[at]) } else { 0.0 },
                ];
                expected[at] = sum * f64::from(scale) + addends.iter().sum::<f64>();
                // Each of `depth` products and additions, a few groups of the sum, scale and addends round once.
                let size = size * f64::from(scale).abs();
                let in_sum = if whole { 0.0 } else { depth as f64 + 8.0 };
                bound[at] = U * (in_sum * size + 4.0 * (sum * f64::from(scale)).abs())
                    + U * 4.0 * addends.iter().map(|addend| addend.abs()).sum::<f64>()
                    + if to == To::Narrow { unit::<E>() * expected[at].abs() * 1.001 } else { 0.0 };
            }
        }
    }
    for isa in isas() {
        let label = format!("{isa:?} {case:?}");
        let all = on_any_threads(isa, &label, || bits(&run(0..m)));
        let values: Vec<f32> = all.iter().map(|bits| f32::from_bits(*bits)).collect();
        for (g, group) in groups.iter().enumerate() {
            for i in 0..m {
                let row = i * step + group.at..i * step + group.at + group.n;
                let label = format!("group {g}, row {i}, {label}");
                close(&label, &values[row.clone()], &expected[row.clone()], &bound[row]);
            }
        }
        for (at, expected) in expected.iter().enumerate() {
            assert!(
                !expected.is_nan()
                    || values[at].to_bits() == before[at].to_bits()
                    || values[at].is_nan() && before[at].is_nan(),
                "{label}: wrote between columns"
            );
        }
        // The same bits whatever rows there are beside it.
        let few = [0..1, m / 2..m.min(m / 2 + 7), m.saturating_sub(1)..m];
        for rows in few.into_iter().filter(|rows| rows.end <= m) {
            let some = on_threads(isa, 2, || bits(&run(rows.clone())));
            assert!(some == all[rows.start * step..rows.end * step], "{label}: rows {rows:?} alone differ");
        }
    }
}

fn dense(transposed: bool, k: usize) -> Weight {
    Weight { frozen: None, transposed, k }
}

fn frozen(storage: Storage, order: RowOrder, transposed: bool, k: usize) -> Weight {
    Weight { frozen: Some((storage, order)), transposed, k }
}

/// One frozen weight.
fn simple<'a>(m: usize, groups: &'a [Group<'a>]) -> Case<'a> {
    Case { m, groups, to: To::Wide, scale: 1.0, row_add: false, whole: false }
}

/// Every storage and order of rows, forward and backward, with an adapter in the same sum.
fn storages<E: ProductElement>() {
    let mut stream = Stream::new(41, 0);
    let plain = [Storage::F32, Storage::F16, Storage::BF16];
    let blocks = [Storage::Q4_0, Storage::Q4_1, Storage::Q5_0, Storage::Q5_1, Storage::Q8_0];
    let odd = 38 - E::PER_WORD; // odd for f32
    for storage in plain.into_iter().chain(blocks).chain([Storage::Q4K, Storage::Q5K, Storage::Q6K]) {
        let (forward_k, backward_n) = match storage.block_len() {
            1 => (odd, 71),
            32 => (96, 160),
            _ => (512, 512),
        };
        for (order, head) in [(NATURAL, 1), (RowOrder::Interleaved { head_dim: 6 }, 6)] {
            let n = if head == 1 { 65 } else { 66 };
            let weights = [frozen(storage, order, true, forward_k), dense(true, 8)];
            check::<E>(simple(7, &[Group { at: 0, n, bias: false, weights: &weights }]), &mut stream);
            let k = if head == 1 { odd } else { 36 };
            let weights = [dense(false, 8), frozen(storage, order, false, k)];
            check::<E>(simple(7, &[Group { at: 2, n: backward_n, bias: true, weights: &weights }]), &mut stream);
        }
    }
}

#[test]
fn products_with_every_storage_equal_the_triple_loop_f32() {
    storages::<f32>();
}

#[test]
fn products_with_every_storage_equal_the_triple_loop_bf16() {
    storages::<bf16>();
}

/// Tiles, panels and tasks that are not full.
fn odd_sizes<E: ProductElement>() {
    let mut stream = Stream::new(42, 0);
    let k = 32 + E::PER_WORD;
    for m in [1, 5, 7, 49, 130] {
        for n in [1, 3, 5, 17, 64, 65, 200] {
            for (index, transposed) in [true, false].into_iter().enumerate() {
                for weight in [frozen(E::STORAGE, NATURAL, transposed, k), dense(transposed, k)] {
                    let to = [To::Wide, To::Add, To::Narrow][(m + n + index) % 3];
                    let groups = [Group { at: 0, n, bias: n % 2 == 0, weights: &[weight] }];
                    check::<E>(Case { to, whole: m == 7, ..simple(m, &groups) }, &mut stream);
                }
            }
        }
    }
}

#[test]
fn products_of_odd_sizes_equal_the_triple_loop_f32() {
    odd_sizes::<f32>();
}

#[test]
fn products_of_odd_sizes_equal_the_triple_loop_bf16() {
    odd_sizes::<bf16>();
}

/// Sums longer than what is packed at once, cut inside a term and between two, in each direction, for narrow panels and for
/// the wide ones of long blocks; exact for whole numbers.
fn long_sums<E: ProductElement>() {
    let mut stream = Stream::new(43, 0);
    let k = 3200 + E::PER_WORD;
    let q4k = |transposed, k| frozen(Storage::Q4K, NATURAL, transposed, k);
    let q8 = |transposed, k| frozen(Storage::Q8_0, NATURAL, transposed, k);
    for (to, scale, row_add) in [(To::Wide, 1.0, false), (To::Add, -0.625, true), (To::Narrow, 0.7, true)] {
        for transposed in [true, false] {
            let one = [dense(transposed, k), frozen(E::STORAGE, NATURAL, transposed, 34), dense(transposed, 6)];
            let two = [frozen(E::STORAGE, NATURAL, transposed, 3070), dense(transposed, 8)];
            let groups =
                [Group { at: 0, n: 70, bias: true, weights: &one }, Group { at: 72, n: 5, bias: false, weights: &two }];
            for whole in [false, true] {
                check::<E>(Case { to, scale, row_add, whole, ..simple(25, &groups) }, &mut stream);
            }
        }
        // An adapter first, so that the pieces of the weight do not start at whole blocks.
        let forward = [dense(true, 10), q4k(true, 3328), q8(true, 3200)];
        let groups = [Group { at: 1, n: 9, bias: true, weights: &forward }];
        check::<E>(Case { to, scale, row_add, ..simple(5, &groups) }, &mut stream);
        let backward = [dense(false, 10), q4k(false, 802), dense(false, 6), q8(false, 38)];
        let groups = [Group { at: 1, n: 512, bias: true, weights: &backward }];
        check::<E>(Case { to, scale, row_add, ..simple(25, &groups) }, &mut stream);
    }
}

#[test]
fn long_sums_equal_the_triple_loop_f32() {
    long_sums::<f32>();
}

#[test]
fn long_sums_equal_the_triple_loop_bf16() {
    long_sums::<bf16>();
}

/// As q, k and v beside each other: several sums, with gaps between their columns and in any order.
fn column_groups<E: ProductElement>() {
    let mut stream = Stream::new(44, 0);
    let weight = [frozen(E::STORAGE, NATURAL, true, 66), dense(true, 8)];
    let other = [frozen(Storage::Q5_1, RowOrder::Interleaved { head_dim: 6 }, true, 64)];
    // A weight in its own direction beside one in the other, whose blocks are longer than a panel.
    let mixed = [frozen(Storage::Q6K, NATURAL, false, 12), frozen(E::STORAGE, NATURAL, true, 14), dense(true, 4)];
    let groups = [
        Group { at: 300, n: 65, bias: true, weights: &weight },
        Group { at: 1, n: 66, bias: false, weights: &other },
        Group { at: 370, n: 256, bias: true, weights: &mixed },
        Group { at: 70, n: 200, bias: true, weights: &weight[..1] },
    ];
    for (to, scale, row_add) in [(To::Wide, 0.3, true), (To::Add, 1.0, false), (To::Narrow, -2.0, true)] {
        for m in [1, 31] {
            check::<E>(Case { m, to, scale, row_add, groups: &groups, whole: false }, &mut stream);
        }
    }
}

#[test]
fn several_sums_go_to_their_columns_f32() {
    column_groups::<f32>();
}

#[test]
fn several_sums_go_to_their_columns_bf16() {
    column_groups::<bf16>();
}

/// No rows write nothing; a sum of nothing is zero, and bias and addends come to it.
#[test]
fn empty_products_write_what_is_added() {
    let mut stream = Stream::new(45, 0);
    for weight in [frozen(Storage::F32, NATURAL, true, 0), frozen(Storage::F32, NATURAL, false, 0)] {
        let groups = [Group { at: 1, n: 70, bias: true, weights: &[weight, dense(false, 2)] }];
        check::<f32>(Case { row_add: true, ..simple(5, &groups) }, &mut stream);
        let groups = [Group { at: 1, n: 70, bias: true, weights: &[weight] }];
        check::<f32>(Case { row_add: true, ..simple(5, &groups) }, &mut stream);
        check::<bf16>(Case { to: To::Narrow, ..simple(5, &groups) }, &mut stream);
        check::<bf16>(Case { to: To::Narrow, ..simple(0, &groups) }, &mut stream);
    }
    product::<f32>(5, &[], Output::Wide(&mut []), 0, Finish::default());
    let none = Matrix::new(Storage::F32, &[], 0, 4, NATURAL).unwrap();
    let terms = [Term::forward(Left::rows(&[1f32; 8], 4), Right::Frozen(none))];
    product(2, &[Columns { terms: &terms, at: 0, bias: None }], Output::Wide(&mut []), 0, Finish::default());
}

/// Stored floats of any alignment give the same bits.
#[test]
fn frozen_floats_need_no_alignment() {
    fn check<E: ProductElement>() {
        let mut stream = Stream::new(46, 0);
        let (m, n, k) = (7, 70, 66);
        let values = uniform(n * k, &mut stream);
        let bytes: Vec<u8> = match E::STORAGE {
            Storage::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        };
        let x: Vec<E> = narrow(&uniform(m * k, &mut stream));
        let dy: Vec<E> = narrow(&uniform(m * n, &mut stream));
        for isa in isas() {
            let results = [0, 1, 2, 3].map(|shift| {
                let mut moved = vec![0; shift];
                moved.extend_from_slice(&bytes);
                let w = Matrix::new(E::STORAGE, &moved[shift..], n, k, NATURAL).unwrap();
                on_any_threads(isa, "alignment", || {
                    let (mut y, mut dx) = (vec![0f32; m * n], vec![0f32; m * k]);
                    let forward = [Term::forward(Left::rows(&x, k), Right::Frozen(w))];
                    let backward = [Term::backward(Left::rows(&dy, n), Right::Frozen(w))];
                    for (terms, out, step) in [(&forward, &mut y, n), (&backward, &mut dx, k)] {
                        let columns = [Columns { terms, at: 0, bias: None }];
                        product(m, &columns, Output::Wide(out), step, Finish::default());
                    }
                    [y, dx].concat()
                })
            });
            assert!(results.iter().all(|result| *result == results[0]), "{isa:?}");
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// A NaN or an infinity in a row of A makes that row of C so and no other, one in W its column.
#[test]
fn what_is_not_finite_stays_in_its_row_and_column() {
    fn check<E: ProductElement>() {
        let (m, n, k) = (13, 70, 34);
        for isa in isas() {
            for bad in [f32::NAN, f32::INFINITY] {
                for (row, column) in [(0, 69), (12, 3), (7, 64)] {
                    let (mut x, mut w) = (vec![E::of(1.0); m * k], vec![E::of(1.0); n * k]);
                    x[row * k + 33] = E::of(bad);
                    w[column * k + 32] = E::of(bad);
                    let finite = on_any_threads(isa, "not finite", || {
                        let terms = [Term::forward(Left::rows(&x, k), Right::Dense { values: &w, cols: k })];
                        let mut y = vec![E::of(0.0); m * n];
                        let columns = [Columns { terms: &terms, at: 0, bias: None }];
                        product(m, &columns, Output::Narrow(&mut y), n, Finish::default());
                        y.iter().map(|y| y.wide().is_finite()).collect::<Vec<bool>>()
                    });
                    for (at, finite) in finite.iter().enumerate() {
                        assert_eq!(
                            *finite,
                            at / n != row && at % n != column,
                            "{isa:?}: {bad} at {row} {column}: {at}"
                        );
                    }
                }
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

fn outers<E: ProductElement>() {
    let mut stream = Stream::new(47, 0);
    let sizes =
        [[1, 1, 1], [5, 3, 64], [31, 5, 65], [130, 8, 200], [7, 13, 3], [1701, 7, 70], [1701, 90, 70], [64, 16, 130]];
    for [m, p, n] in sizes {
        for (scale, whole) in [(1.0, true), (-0.3, false)] {
            let mut some = |n| -> Vec<f32> {
                if whole { (0..n).map(|_| stream.below(7) as f32 - 3.0).collect() } else { uniform(n, &mut stream) }
            };
            let (d_step, x_step) = (p + 3, n + 2);
            let (d, x) = (narrow::<E>(&some(m * d_step)), narrow::<E>(&some(m * x_step)));
            let (mut expected, mut bound) = (vec![0.0; p * n], vec![0.0; p * n]);
            for (at, (expected, bound)) in expected.iter_mut().zip(&mut bound).enumerate() {
                let (i, j) = (at / n, at % n);
                for row in 0..m {
                    let value = f64::from(d[row * d_step + 1 + i].wide()) * f64::from(x[row * x_step + 2 + j].wide());
                    *expected += value * f64::from(scale);
                    *bound += if whole { 0.0 } else { (value * f64::from(scale)).abs() * U * (m as f64 + 8.0) };
                }
            }
            for isa in isas() {
                let label = format!("outer of {m} rows {p} x {n} {isa:?}");
                let c = on_any_threads(isa, &label, || {
                    let mut c = vec![f32::NAN; p * n];
                    let (d, x) = (Left::rows(&d, d_step).from(1), Left::rows(&x, x_step).from(2));
                    outer(m, d, p, x, n, scale, &mut c);
                    c
                });
                close(&label, &c, &expected, &bound);
            }
        }
    }
    let (d, mut c) = ([E::of(1.0); 4], [f32::NAN; 4]);
    outer(0, Left::rows(&d, 2), 2, Left::rows(&d, 2), 2, 1.0, &mut c);
    assert_eq!(c, [0.0; 4], "no rows add up to zero");
    outer(2, Left::rows(&d, 2), 0, Left::rows(&d, 2), 2, 1.0, &mut []);
}

#[test]
fn outer_products_equal_the_triple_loop_f32() {
    outers::<f32>();
}

#[test]
fn outer_products_equal_the_triple_loop_bf16() {
    outers::<bf16>();
}

/// What the unsafe code relies on is asserted before it runs.
#[test]
fn sizes_that_disagree_are_refused() {
    let (x, w) = ([1f32; 12], [1f32; 12]);
    let right = Right::Dense { values: &w, cols: 4 };
    let refused = |label: &str, f: &dyn Fn(&mut [f32])| {
        let mut out = [0f32; 12];
        let result = catch_unwind(AssertUnwindSafe(|| f(&mut out)));
        assert!(result.is_err(), "{label} is not refused");
    };
    let run = |m, left: Left<'_, f32>, at: &[usize], step, row_add: Option<&[f32]>, out: &mut [f32]| {
        let terms = [Term::forward(left, right)];
        let columns: Vec<Columns<f32>> = at.iter().map(|at| Columns { terms: &terms, at: *at, bias: None }).collect();
        product(m, &columns, Output::Wide(out), step, Finish { scale: 1.0, row_add });
    };
    let left = Left::rows(&x, 4);
    run(3, left, &[0], 3, None, &mut [0f32; 9]);
    refused("an output that is short", &|out| run(3, left, &[0], 3, None, &mut out[..8]));
    refused("columns beyond a row", &|out| run(3, left, &[1], 3, None, out));
    refused("columns beyond all", &|out| run(1, left, &[usize::MAX - 2], usize::MAX, None, out));
    refused("columns twice", &|out| run(1, left, &[0, 2], 6, None, out));
    refused("rows of A that are not there", &|out| run(4, left, &[0], 3, None, out));
    refused("A that starts too late", &|out| run(3, left.from(1), &[0], 3, None, out));
    refused("rows of A that overlap", &|out| run(3, Left::rows(&x, 3), &[0], 3, None, out));
    refused("too few addends", &|out| run(3, left, &[0], 3, Some(&[0.0; 2]), out));
    // Sizes whose products do not fit a usize.
    let huge = Left { values: &x, at: 0, step: 1 << 63 };
    refused("rows of A beyond all", &|out| run(3, huge, &[0], 3, None, out));
    refused("rows of the output beyond all", &|out| run(3, left, &[0], 1 << 63, None, out));
    refused("an A that starts beyond all", &|out| {
        run(1, Left { values: &x, at: usize::MAX - 3, step: 4 }, &[0], 3, None, out);
    });
    refused("the outer product of rows beyond all", &|out| outer(3, huge, 3, left, 4, 1.0, out));
    refused("the outer product with rows beyond all", &|out| outer(3, left, 3, huge, 4, 1.0, out));
    refused("an outer product of another size", &|out| outer(3, left, 2, left, 4, 1.0, out));
    let (x, w) = ([bf16::ONE; 9], [bf16::ONE; 9]);
    refused("a depth that is odd", &|out| {
        let terms = [Term::forward(Left::rows(&x, 3), Right::Dense { values: &w, cols: 3 })];
        product(3, &[Columns { terms: &terms, at: 0, bias: None }], Output::Wide(out), 3, Finish::default());
    });
}

/// The tolerance notices a transposed weight and a missing term.
#[test]
#[should_panic(expected = "bounds")]
fn a_missing_term_fails_the_tolerance() {
    let mut stream = Stream::new(48, 0);
    let weight = dense(true, 200);
    let mut given = Given::<f32>::new(weight, 1, 3, false, &mut stream);
    let sums: Vec<[f64; 2]> = (0..3).map(|j| given.sum(0, j)).collect();
    given.left[LEFT_AT + 150] = 0.0;
    let got: Vec<f32> = (0..3).map(|j| given.sum(0, j)[0] as f32).collect();
    let (expected, bound): (Vec<f64>, Vec<f64>) = sums.iter().map(|sum| (sum[0], U * 208.0 * sum[1])).unzip();
    close("a missing term", &got, &expected, &bound);
}

/// The sums are those of the product without, and each element is its sum times its column's gain, plus what is added: wherever sums wait,
/// whatever the terms are.
#[test]
fn a_gain_multiplies_each_columns_sums_and_leaves_them_behind() {
    fn check<E: ProductElement>(m: usize, k: usize, whole_numbers: bool) {
        let (n, others, r) = (72, 8, 16);
        let mut stream = Stream::new(31, (m * k) as u64);
        let x: Vec<E> = narrow(&uniform(m * k, &mut stream));
        let u: Vec<E> = narrow(&uniform(m * r, &mut stream));
        let (b, dense) = (narrow::<E>(&uniform(n * r, &mut stream)), narrow::<E>(&uniform(others * k, &mut stream)));
        let (bias, gain) = (uniform(n, &mut stream), uniform(n + others, &mut stream));
        let values = uniform(n * k, &mut stream);
        let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[rows.start * k..rows.end * k]);
        };
        let codec = Codec::int8();
        let Encoded { codes, scales } = encode(&codec, n, k, &read).unwrap();
        let w = Matrix::coded(&codec, &codes, &scales, n, k).unwrap();
        let frozen = if whole_numbers { Right::Integers(w) } else { Right::Frozen(w) };
        let first = [
            Term::forward(Left::rows(&x, k), frozen),
            Term::forward(Left::rows(&u, r), Right::Dense { values: &b, cols: r }),
        ];
        let second = [Term::forward(Left::rows(&x, k), Right::Dense { values: &dense, cols: k })];
        let columns = |bias| [Columns { terms: &first, at: 0, bias }, Columns { terms: &second, at: n, bias: None }];
        let step = n + others;
        for isa in isas() {
            let label = format!("{m} x {k}, in integers: {whole_numbers}");
            let plain = on_threads(isa, 1, || {
                // Deep sums that wait in the output are taken in other groups; added to zeros they wait elsewhere, as here.
                let mut sums = vec![0f32; m * step];
                product(m, &columns(None), Output::Add(&mut sums), step, Finish::default());
                sums
            });
            let added = uniform(m * step, &mut Stream::new(5, 5));
            let expected = |add: bool| -> Vec<f32> {
                let one = |(i, sum): (usize, &f32)| {
                    let y = sum * gain[i % step] + bias.get(i % step).unwrap_or(&0.0);
                    if add { y + added[i] } else { y }
                };
                plain.iter().enumerate().map(one).collect()
            };
            for to in [To::Wide, To::Add, To::Narrow] {
                let (y, sums) = on_any_threads(isa, &label, || {
                    let (mut out, mut short) = (added.clone(), vec![E::of(f32::NAN); m * step]);
                    let mut sums = vec![E::of(f32::NAN); m * step];
                    let given = Gain { factors: &gain, sums: &mut sums };
                    let target = match to {
                        To::Wide => Output::Wide(&mut out),
                        To::Add => Output::Add(&mut out),
                        To::Narrow => Output::Narrow(&mut short),
                    };
                    product_with_gain(m, &columns(Some(&bias)), target, step, given);
                    let y = if to == To::Narrow { bits(&short) } else { bits(&out) };
                    (y, bits(&sums))
                });
                assert!(sums == bits(&narrow::<E>(&plain)), "{label}, {isa:?}, {to:?}: the sums are others");
                let expected = expected(to == To::Add);
                let expected = if to == To::Narrow { bits(&narrow::<E>(&expected)) } else { bits(&expected) };
                assert!(y == expected, "{label}, {isa:?}, {to:?}: what is made of them");
            }
        }
    }
    for (m, k) in [(1, 32), (7, 96), (70, 64), (5, 2304)] {
        for whole_numbers in [false, true] {
            check::<f32>(m, k, whole_numbers);
            check::<bf16>(m, k, whole_numbers);
        }
    }
}
