//! The time of a step: kernels are measured for a moment in the shapes of a layer, each once, and counted; what multiplies nothing is
//! bytes over the machine's bandwidth.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use homeroom_kernels::{
    Attention, Codec, Columns, Finish, Gate, KeyValueGradients, Left, Matrix, Output, ProductElement, Right,
    RotaryTable, RowOrder, Storage, Stream, Term, attention, attention_backward, bf16, cross_entropy, encode, gated,
    gated_backward, on_pool, outer, product, read_gigabytes, rms_norm, rms_norm_backward, rotate, scale_columns,
    threads,
};

use super::sketch::Stored;
use crate::run::plain::linear::Part;
use crate::run::plain::tape::Traffic;

/// What a step computes: operations with how often each is done, and bytes that are written and read besides.
#[derive(Clone, Debug, Default)]
pub struct Work {
    pub(super) operations: Vec<(Operation, f64)>,
    /// Bytes that are written, and read again, by all threads.
    pub(super) bytes: f64,
    /// Passes, and what candle's operations write in each.
    pub(super) plain: (f64, Traffic),
    /// Multiply-adds of candle's products.
    pub(super) plain_products: f64,
}

/// A kernel in one shape. Sizes that only repeat the same work are cut, and `times` says how often that is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operation {
    /// Rows times a weight, (m, d_in) to (m, d_out), or with `backward` from (m, d_out) to (m, d_in), with an update of this rank beside it.
    Product {
        m: usize,
        weight: (usize, usize),
        stored: StoredAs,
        rank: usize,
        element: usize,
        integers: bool,
        backward: bool,
    },
    /// A product with a small dense matrix: (m, k) to (m, n).
    Small { m: usize, k: usize, n: usize, element: usize },
    /// The gradient of such a matrix (p, n) over m rows.
    Outer { m: usize, p: usize, n: usize, element: usize },
    /// Attention of one key head's queries over sequences of t rows.
    Attention {
        t: usize,
        count: usize,
        heads: usize,
        head_dim: usize,
        window: Option<usize>,
        cap: bool,
        element: usize,
        backward: bool,
    },
    /// A norm over m rows of c.
    Norm { m: usize, c: usize, element: usize, backward: bool },
    /// A gated unit over m rows, (m, 2 n) to (m, n).
    Gate { m: usize, n: usize, gate: Gate, element: usize, backward: bool },
    /// Rotating the first heads of m rows and rounding all; backward costs the same.
    Rotate { m: usize, heads: usize, rotated: usize, head_dim: usize, element: usize },
    /// The loss over a row of logits.
    Loss { vocab: usize, element: usize },
    /// A product of plain blocks with a weight that is trained, of (n, rows, cols).
    Linear { part: Part, sizes: (usize, usize, usize) },
}

/// How a weight is stored, for what reading it costs.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum StoredAs {
    As(Storage),
    Codec(Codec),
}

impl StoredAs {
    pub(super) fn of(stored: &Stored) -> Self {
        match stored {
            Stored::As(storage) => Self::As(*storage),
            Stored::Codec(codec) => Self::Codec(codec.clone()),
            // The plugin's functions are not run here; the nearest that is known.
            Stored::Native(..) => Self::Codec(Codec::nf4()),
        }
    }
}

/// Columns of a product that are measured, for each thread: whole panels, so that none waits for another's.
const COLUMNS: usize = 512;
/// Values of a sum that are measured: what a product takes in a round of a deep one.
const DEPTH: usize = 1024;
/// The least time that is measured, in seconds.
const MOMENT: f64 = 0.015;
/// Bytes of a small tensor that is measured.
const SMALL: usize = 2 << 20;
/// Rows of the loss that are measured.
const LOSS_ROWS: usize = 32;

/// Speeds of this machine, each measured when it is first asked for.
#[derive(Default)]
pub struct Measured {
    operations: Vec<(Operation, f64)>,
    others: HashMap<&'static str, f64>,
}

impl Measured {
    /// Nothing is measured yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Seconds of a step.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn seconds(&mut self, work: &Work) -> Result<f64> {
        let mut total = 0.0;
        for (operation, times) in &work.operations {
            total += times * self.of(operation);
        }
        if work.plain_products > 0.0 {
            total += work.plain_products / self.other("products", plain_products)?;
        }
        let (passes, Traffic { tensors, small, large }) = work.plain;
        let mut plain = 0.0;
        if tensors > 0 {
            plain += tensors as f64 / self.other("plain operations", plain_operations)?;
        }
        if small > 0 {
            plain += small as f64 / self.other("small tensors", || plain_bytes(SMALL))?;
        }
        if large > 0 {
            plain += large as f64 / self.other("large tensors", || plain_bytes(2 * Traffic::LARGE))?;
        }
        total += passes * plain;
        let bandwidth = self.other("bandwidth", || Ok(1e9 * read_gigabytes()))?;
        Ok(total + 2.0 * work.bytes / bandwidth)
    }

    fn of(&mut self, operation: &Operation) -> f64 {
        if let Some((_, seconds)) = self.operations.iter().find(|(known, _)| known == operation) {
            return *seconds;
        }
        let seconds = on_pool(|| operation.measure());
        self.operations.push((operation.clone(), seconds));
        seconds
    }

    fn other(&mut self, name: &'static str, measure: fn() -> Result<f64>) -> Result<f64> {
        if let Some(speed) = self.others.get(name) {
            return Ok(*speed);
        }
        let speed = measure()?;
        self.others.insert(name, speed);
        Ok(speed)
    }
}

/// The shortest of several runs: what disturbs one makes it longer.
fn timed(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    let mut count = 0;
    while count < 3 || begin.elapsed().as_secs_f64() < MOMENT {
        let start = Instant::now();
        run();
        best = start.elapsed().as_secs_f64().min(best);
        count += 1;
    }
    best
}

impl Operation {
    fn element(&self) -> usize {
        match self {
            Self::Product { element, .. }
            | Self::Small { element, .. }
            | Self::Outer { element, .. }
            | Self::Attention { element, .. }
            | Self::Norm { element, .. }
            | Self::Gate { element, .. }
            | Self::Rotate { element, .. }
            | Self::Loss { element, .. } => *element,
            Self::Linear { .. } => size_of::<f32>(),
        }
    }

    fn measure(&self) -> f64 {
        if self.element() == size_of::<bf16>() { self.measure_in::<bf16>() } else { self.measure_in::<f32>() }
    }

    fn measure_in<E: ProductElement>(&self) -> f64 {
        match *self {
            Self::Product { m, weight: (rows, cols), ref stored, rank, integers, backward, .. } => {
                // Outputs beyond some cost what the others do, and backward so do parts of the sum: rows keep their length, by which they
                // lie apart in memory.
                let kept = rows.min(if backward { DEPTH } else { COLUMNS * threads() });
                let (m, times) = some_rows(m);
                times * rows as f64 / kept as f64 * of_product::<E>(m, (kept, cols), stored, rank, integers, backward)
            }
            Self::Small { m, k, n, .. } => {
                let (x, w) = (some::<E>(m * k), some::<E>(n * k));
                let mut y = vec![E::default(); m * n];
                timed(|| {
                    let terms = [Term::forward(Left::rows(&x, k), Right::Dense { values: &w, cols: k })];
                    let columns = [Columns { terms: &terms, at: 0, bias: None }];
                    product(m, &columns, Output::Narrow(&mut y), n, Finish::default());
                })
            }
            Self::Outer { m, p, n, .. } => {
                let (d, x) = (some::<E>(m * p), some::<E>(m * n));
                let mut c = vec![0f32; p * n];
                timed(|| outer(m, Left::rows(&d, p), p, Left::rows(&x, n), n, 1.0, &mut c))
            }
            Self::Attention { t, count, heads, head_dim, window, cap, backward, .. } => {
                let sequences: Vec<_> = (0..count).map(|i| i * t..(i + 1) * t).collect();
                let soft_cap = cap.then_some(50.0);
                let scale = (head_dim as f32).powf(-0.5);
                let shape = Attention { sequences: &sequences, heads, kv_heads: 1, head_dim, window, scale, soft_cap };
                let m = t * count;
                let qkv = some::<E>(m * shape.row());
                let (mut out, mut sums) = (vec![E::default(); m * heads * head_dim], vec![0f32; m * heads]);
                if !backward {
                    return timed(|| attention(&shape, &qkv, &mut out, &mut sums));
                }
                attention(&shape, &qkv, &mut out, &mut sums);
                let (d_out, mut d_qkv) = (some::<E>(out.len()), vec![E::default(); qkv.len()]);
                let (positions, mut partial) = (vec![0u32; m], KeyValueGradients::default());
                timed(|| {
                    attention_backward(&shape, &qkv, &out, &sums, &d_out, (&positions, None), &mut partial, &mut d_qkv);
                })
            }
            Self::Norm { m, c, backward, .. } => {
                let (m, times) = some_rows(m);
                let (x, w, mut inverse) = (some::<f32>(m * c), some::<f32>(c), vec![0f32; m]);
                let (mut normal, mut y) = (vec![E::default(); m * c], vec![E::default(); m * c]);
                rms_norm(&x, &w, 1e-5, &mut normal, &mut inverse, &mut y);
                if !backward {
                    return times * timed(|| rms_norm(&x, &w, 1e-5, &mut normal, &mut inverse, &mut y));
                }
                let (mut dx, mut narrow) = (vec![0f32; m * c], vec![E::default(); m * c]);
                times
                    * timed(|| {
                        scale_columns(&normal, &w, &mut y);
                        rms_norm_backward(&normal, &w, &inverse, &x, &mut dx, &mut narrow);
                    })
            }
            Self::Gate { m, n, gate, backward, .. } => {
                let (m, times) = some_rows(m);
                let (gate_up, mut h) = (some::<E>(2 * m * n), some::<E>(m * n));
                if !backward {
                    return times * timed(|| gated(gate, n, &gate_up, &mut h));
                }
                let mut d_gate_up = vec![E::default(); 2 * m * n];
                times * timed(|| gated_backward(gate, n, &gate_up, &mut h, &mut d_gate_up))
            }
            Self::Rotate { m, heads, rotated, head_dim, .. } => {
                let (m, times) = some_rows(m);
                let mut table = RotaryTable::new(head_dim);
                table.append(m, &vec![0.1; head_dim / 2], 1.0);
                let positions: Vec<u32> = (0..).take(m).collect();
                let (x, mut y) = (some::<f32>(m * heads * head_dim), vec![E::default(); m * heads * head_dim]);
                times * timed(|| rotate(&x, &positions, heads, rotated, Some(&table), &mut y))
            }
            Self::Linear { part, sizes: (n, rows, cols) } => {
                // A head has more rows than need be measured.
                let kept = rows.min(COLUMNS * threads());
                let (x, y, w) = (some::<f32>(n * cols), some::<f32>(n * kept), some::<f32>(kept * cols));
                let (a, b, len) = match part {
                    Part::Forward => (&x, &w, n * kept),
                    Part::Input => (&y, &w, n * cols),
                    Part::Weight => (&y, &x, kept * cols),
                };
                let mut out = vec![0f32; len];
                rows as f64 / kept as f64 * timed(|| part.compute((n, kept, cols), a, b, &mut out))
            }
            Self::Loss { vocab, .. } => {
                let mut logits = some::<E>(LOSS_ROWS * vocab);
                let (targets, scales) = (vec![0u32; LOSS_ROWS], vec![1e-3f32; LOSS_ROWS]);
                let (mut losses, mut correct) = (vec![0f32; LOSS_ROWS], vec![false; LOSS_ROWS]);
                let seconds = timed(|| {
                    cross_entropy(vocab, &mut logits, &targets, None, Some(&scales), &mut losses, &mut correct);
                });
                seconds / LOSS_ROWS as f64
            }
        }
    }
}

/// How many of m rows are measured, and how often that is: a plan must not take the memory of what it plans.
fn some_rows(m: usize) -> (usize, f64) {
    const MOST: usize = 2048;
    let some = m.min(MOST);
    (some, m as f64 / some.max(1) as f64)
}

/// A product with a weight (rows, cols), with a low-rank update beside it.
fn of_product<E: ProductElement>(
    m: usize,
    (rows, cols): (usize, usize),
    stored: &StoredAs,
    rank: usize,
    integers: bool,
    backward: bool,
) -> f64 {
    let (depth, width) = if backward { (rows, cols) } else { (cols, rows) };
    let (x, u) = (some::<E>(m * depth), some::<E>(m * rank));
    let mut y = vec![0f32; m * width];
    let dense = some::<E>(rank * width);
    let mut run = |matrix: Matrix<'_>| {
        let integers = integers && matrix.multiplies_in_integers();
        let right = if integers { Right::Integers(matrix) } else { Right::Frozen(matrix) };
        let (cols, left) = (if backward { width } else { rank }, Left::rows(&u, rank));
        timed(|| {
            let frozen = if backward {
                Term::backward(Left::rows(&x, depth), right)
            } else {
                Term::forward(Left::rows(&x, depth), right)
            };
            let dense = Right::Dense { values: &dense, cols };
            let update = if backward { Term::backward(left, dense) } else { Term::forward(left, dense) };
            let terms = [frozen, update];
            let columns = [Columns { terms: &terms[..if rank > 0 { 2 } else { 1 }], at: 0, bias: None }];
            product(m, &columns, Output::Wide(&mut y), width, Finish::default());
        })
    };
    match stored {
        StoredAs::As(storage) => {
            // As bf16, f16 and f32 a small number; of blocks any bytes are as good as others.
            let bytes = vec![0x3c_u8; rows * cols.div_ceil(storage.block_len()) * storage.block_bytes()];
            let matrix = Matrix::new(*storage, &bytes, rows, cols, RowOrder::Natural);
            matrix.map_or(0.0, &mut run)
        }
        StoredAs::Codec(codec) => {
            let values = |range: std::ops::Range<usize>, out: &mut [f32]| {
                let mut random = Stream::new(1, range.start as u64);
                out.iter_mut().for_each(|value| *value = random.uniform() as f32 - 0.5);
            };
            let Ok(encoded) = encode(codec, rows, cols, &values) else { return 0.0 };
            let scales = encoded.scales.view();
            homeroom_kernels::CheckedCodec::new(codec.clone())
                .and_then(|codec| Matrix::coded_checked(&codec, &encoded.codes, scales, rows, cols).map(&mut run))
                .unwrap_or(0.0)
        }
    }
}

/// Values that are no special ones.
fn some<E: ProductElement>(count: usize) -> Vec<E> {
    (0..count).map(|i| E::of(((i * 37) % 101) as f32 / 101.0 - 0.5)).collect()
}

/// Multiply-adds a second of candle's products.
fn plain_products() -> Result<f64> {
    let [a, b] = [0; 2].map(|_| Tensor::ones((512, 512), DType::F32, &Device::Cpu));
    let (a, b) = (a?, b?);
    let mut failed = None;
    let seconds = timed(|| {
        if let Err(error) = a.matmul(&b) {
            failed = Some(error);
        }
    });
    failed.map_or(Ok(512f64.powi(3) / seconds), |error| Err(error.into()))
}

/// Bytes a second that candle's operations write to tensors of so many bytes, in the mixture of a backward: every gradient is added to
/// zeros.
fn plain_bytes(bytes: usize) -> Result<f64> {
    let values = bytes / size_of::<f32>();
    let a = Tensor::ones(values, DType::F32, &Device::Cpu)?;
    let mut failed = None;
    let run = || {
        let zeros = a.zeros_like()?;
        a.exp()?.add(&zeros)
    };
    let seconds = timed(|| failed = run().err());
    failed.map_or(Ok(3.0 * bytes as f64 / seconds), |error| Err(error.into()))
}

/// How many of candle's operations a second are begun.
fn plain_operations() -> Result<f64> {
    let a = Tensor::ones(16, DType::F32, &Device::Cpu)?;
    let mut failed = None;
    let seconds = timed(|| failed = (&a + &a).err());
    failed.map_or(Ok(1.0 / seconds), |error| Err(error.into()))
}
