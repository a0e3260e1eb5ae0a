//! Products of a few rows in eight bits with weights in blocks of whole numbers: sums over a block are of integers and exact, one
//! multiply-add puts the scales of both sides on them.
//!
//! A row of x is cut into groups of [`GROUP`] values; each is rounded to whole numbers from -127 to 127 with a scale of its own,
//! `x[k] = s q[k]`. With a block `w[k] = d c[k] + m` of codes without a sign, the block's part of the product is
//! `d s Σ c[k] q[k] + m s Σ q[k]`: the first sum is one instruction, the second is the same for all rows of W and known
//! beforehand. Rounding x is all that this costs in exactness. It is how ggml multiplies, too (`ggml-quants.c`, `vec_dot`).
//!
//! A code book of sixteen levels becomes one of whole numbers, see [`book`].
//!
//! What an element of the result is depends on its row of x and of W alone, not on how many rows share the call.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod book;
#[cfg(any(test, target_arch = "aarch64"))]
mod neon;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::ops::{Deref, DerefMut};
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use self::book::Levels;
use super::{FewRows, Job, ROWS};
use crate::element::{eight_bit_scale, nearest_whole};
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::F32Unit;
#[cfg(target_arch = "x86_64")]
use crate::isa::Int8Unit;
use crate::isa::{Feature, Isa, isa, per_isa};
use crate::matmul::Matrix;
use crate::storage::Storage;
use crate::storage::codec::Fused;

/// Values of a row that share a scale.
const GROUP: usize = 32;
/// Groups that are taken together; rows are padded with zeros to a multiple.
const SPAN: usize = 8;
/// Codes that lie together wherever they lie.
const PIECE: usize = 16;

/// Rows of x in eight bits.
#[derive(Debug)]
pub struct RoundedRows {
    order: Order,
    m: usize,
    groups: usize,
    /// Spans of a row.
    spans: usize,
    codes: Lines<i8, 64>,
    /// What a group's codes are multiplied by; NaN if a value is not finite.
    scales: Lines<f32, 16>,
    /// The sum of a group's codes, times its scale.
    sums: Lines<f32, 16>,
    /// The same of its first and second half.
    halves: Lines<f32, 16>,
    /// The sum of what each row was rounded to.
    totals: Vec<f32>,
    /// See [`RoundedRows::words`].
    #[cfg(target_arch = "x86_64")]
    words: OnceLock<Lines<i16, 32>>,
}

/// How rows lie, so that a vector of 512 bits holds a piece of four groups, or of four rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// One after another.
    Rows,
    /// A single row: the first pieces of four groups, then their second ones.
    One,
    /// Four rows beside each other: of each group the first pieces of all, then the second ones, and each scale four times; of each
    /// span the sums of one row after another, and so for each half of its halves.
    Fours,
}

impl Order {
    fn of(m: usize) -> Self {
        match (isa().multiplies_bytes_in_512(), m) {
            (false, _) => Self::Rows,
            (true, 1) => Self::One,
            (true, _) => Self::Fours,
        }
    }

    /// Where a piece lies: the `half` of a group of row j.
    fn piece(self, spans: usize, j: usize, group: usize, half: usize) -> usize {
        let four = |of: usize, among: usize| (8 * of + 4 * half + among) * PIECE;
        match self {
            Self::Rows => (2 * (j * spans * SPAN + group) + half) * PIECE,
            Self::One => four(group / 4, group % 4),
            Self::Fours => four(j / ROWS * spans * SPAN + group, j % ROWS),
        }
    }

    /// Where a scale lies, and how often.
    fn scale(self, spans: usize, j: usize, group: usize) -> (usize, usize) {
        match self {
            Self::Rows | Self::One => (j * spans * SPAN + group, 1),
            Self::Fours => (((j / ROWS * spans * SPAN + group) * ROWS + j % ROWS) * 4, 4),
        }
    }

    /// Where a sum lies, one of eight of a span, or with `two` of sixteen.
    fn sum(self, spans: usize, j: usize, number: usize, two: usize) -> usize {
        match self {
            Self::Rows | Self::One => j * spans * SPAN * two + number,
            Self::Fours => (j / ROWS * spans * two + number / SPAN) * ROWS * SPAN + j % ROWS * SPAN + number % SPAN,
        }
    }
}

/// Values in whole cache lines.
#[derive(Debug)]
struct Lines<T, const N: usize>(Vec<Line<[T; N]>>);

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line<T>(T);

impl<T: Copy + Default, const N: usize> Lines<T, N> {
    /// So many values, all zero, rounded up.
    fn zeros(len: usize) -> Self {
        const { assert!(size_of::<Line<[T; N]>>() == size_of::<[T; N]>()) };
        Self(vec![Line([T::default(); N]); len.div_ceil(N)])
    }
}

impl<T, const N: usize> Deref for Lines<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: a line is N values and nothing else, as `zeros` saw.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * N) }
    }
}

impl<T, const N: usize> DerefMut for Lines<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * N) }
    }
}

impl RoundedRows {
    /// Rounds rows of x.
    pub fn new(x: FewRows<'_>) -> Self {
        let (m, groups) = (x.count(), x.step / GROUP);
        let (order, spans) = (Order::of(m), groups.div_ceil(SPAN));
        let rows = if order == Order::Fours { m.next_multiple_of(ROWS) } else { m };
        let all = rows * spans * SPAN;
        let of_four = if order == Order::Fours { 4 } else { 1 };
        let mut rounded = Self {
            order,
            m,
            groups,
            spans,
            codes: Lines::zeros(all * GROUP),
            scales: Lines::zeros(all * of_four),
            sums: Lines::zeros(all),
            halves: Lines::zeros(2 * all),
            totals: vec![0.0; m],
            #[cfg(target_arch = "x86_64")]
            words: OnceLock::new(),
        };
        let isa = isa();
        let (mut codes, mut scales, mut halves) = (vec![0; x.step], vec![0.0; groups], vec![0.0; 2 * groups]);
        for (j, row) in x.values.chunks_exact(x.step).enumerate() {
            round(isa, row, &mut codes, &mut scales, &mut halves);
            rounded.place(j, &codes, &scales, &halves);
        }
        rounded
    }

    /// Puts a row where it belongs.
    fn place(&mut self, j: usize, codes: &[i8], scales: &[f32], halves: &[f32]) {
        let (order, spans) = (self.order, self.spans);
        let groups = codes.as_chunks::<GROUP>().0.iter().zip(scales).zip(halves.as_chunks::<2>().0).enumerate();
        for (group, ((codes, scale), [a, b])) in groups {
            for (half, piece) in codes.as_chunks::<PIECE>().0.iter().enumerate() {
                let at = order.piece(spans, j, group, half);
                self.codes[at..at + PIECE].copy_from_slice(piece);
            }
            let (at, times) = order.scale(spans, j, group);
            self.scales[at..at + times].fill(*scale);
            self.sums[order.sum(spans, j, group, 1)] = a + b;
            self.totals[j] += a + b;
            self.halves[order.sum(spans, j, 2 * group, 2)] = *a;
            self.halves[order.sum(spans, j, 2 * group + 1, 2)] = *b;
        }
    }

    /// Whether these are m rows of `step` values.
    pub(super) fn is_of(&self, m: usize, step: usize) -> bool {
        self.groups * GROUP == step && self.m == m
    }

    /// Words of four codes of a group.
    pub(super) const WORDS: usize = GROUP / 4;

    /// Rows.
    pub(super) fn count(&self) -> usize {
        self.m
    }

    /// Values of a row.
    pub(super) fn width(&self) -> usize {
        self.groups * GROUP
    }

    /// The codes of a group of row j by words, those of its first half and of its second, and its scale.
    #[inline(always)]
    pub(super) fn group(&self, j: usize, group: usize) -> ([&[[i8; 4]; PIECE / 4]; 2], f32) {
        let piece = |half: usize| {
            let piece = &self.codes[self.order.piece(self.spans, j, group, half)..][..PIECE];
            piece.as_chunks::<4>().0.first_chunk().expect("a piece is whole words")
        };
        ([piece(0), piece(1)], self.scales[self.order.scale(self.spans, j, group).0])
    }

    /// The sum of what row j was rounded to.
    pub(super) fn total(&self, j: usize) -> f32 {
        self.totals[j]
    }

    /// The codes of all groups in sixteen bits, made when they are first asked for: of each piece those at even places, then the others.
    #[cfg(target_arch = "x86_64")]
    fn words(&self) -> &[i16] {
        self.words.get_or_init(|| {
            let mut words = Lines::zeros(self.codes.len());
            for (codes, words) in self.codes.as_chunks::<PIECE>().0.iter().zip(words.as_chunks_mut::<PIECE>().0) {
                for (i, word) in words.iter_mut().enumerate() {
                    *word = i16::from(codes[2 * (i % 8) + i / 8]);
                }
            }
            words
        })
    }

    /// What value i of row j was rounded to.
    #[cfg(test)]
    fn value(&self, j: usize, i: usize) -> f32 {
        let (order, spans, group) = (self.order, self.spans, i / GROUP);
        let code = self.codes[order.piece(spans, j, group, i % GROUP / PIECE) + i % PIECE];
        f32::from(code) * self.scales[order.scale(spans, j, group).0]
    }
}

/// Computes a job of M rows of x from the `first` on, a multiple of [`ROWS`].
///
/// # Safety
/// The job is as [`super::gemv`] checked it, [`Matrix::takes_rounded`] of its weight.
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) unsafe fn run<const M: usize>(
    isa: Isa,
    job: &Job<'_>,
    x: &RoundedRows,
    first: usize,
    scratch: &mut Vec<f32>,
) {
    // SAFETY: passed on to the caller; a weight takes rounded rows where there is AVX2 or AArch64's vectors.
    unsafe {
        match isa.f32_unit() {
            #[cfg(target_arch = "x86_64")]
            F32Unit::Avx512 | F32Unit::Avx2 => on_x86::<M>(isa, job, x, first, scratch),
            #[cfg(any(test, target_arch = "aarch64"))]
            F32Unit::Neon => neon::run::<M>(isa, job, x, first, scratch),
            unit => unreachable!("rows are not rounded for {unit:?}"),
        }
    }
}

/// See [`run`].
///
/// # Safety
/// See there.
#[cfg(target_arch = "x86_64")]
unsafe fn on_x86<const M: usize>(isa: Isa, job: &Job<'_>, x: &RoundedRows, first: usize, scratch: &mut Vec<f32>) {
    // SAFETY: passed on to the caller; rows lie in fours where there is VNNI.
    unsafe {
        match (x.order, Levels::of(job.w)) {
            (Order::Rows, None) if isa.int8_unit() == Int8Unit::AvxVnni => {
                crate::isa::run(avx2::ByFours::<'_, M> { job, x, first });
            }
            (Order::Rows, None) => avx2::run::<M>(job, x, first),
            (Order::Rows, Some(levels)) => avx2::run_book::<M>(job, &levels, x, first, scratch),
            (_, None) => vnni::run(job, x, first, M),
            (_, Some(levels)) => vnni::run_book(job, &levels, x, first, M, scratch),
        }
    }
}

/// A row's codes, scales, and for each half of a group the sum of its codes times the scale: the same on every processor.
pub(crate) fn round(isa: Isa, row: &[f32], codes: &mut [i8], scales: &mut [f32], halves: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_bytes_in_512() {
        // SAFETY: the processor has it.
        return unsafe { vnni::round(row, codes, scales, halves) };
    }
    round_by_lanes(isa, row, codes, scales, halves);
}

per_isa! {
    fn round_by_lanes(row: &[f32], codes: &mut [i8], scales: &mut [f32], halves: &mut [f32]) {
        let groups = row.as_chunks::<GROUP>().0.iter().zip(codes.as_chunks_mut::<GROUP>().0);
        for ((row, codes), (scale, halves)) in groups.zip(scales.iter_mut().zip(halves.as_chunks_mut::<2>().0)) {
            let inverse;
            (*scale, inverse) = eight_bit_scale(row);
            let mut whole = [0i32; GROUP];
            for (whole, value) in whole.iter_mut().zip(row) {
                *whole = nearest_whole(*value, inverse);
            }
            for (code, whole) in codes.iter_mut().zip(whole) {
                *code = whole as i8;
            }
            for (half, whole) in halves.iter_mut().zip(whole.as_chunks::<{ GROUP / 2 }>().0) {
                *half = *scale * whole.iter().sum::<i32>() as f32;
            }
        }
    }
}

impl Matrix<'_> {
    /// Whether a few rows of x in eight bits are multiplied with this weight: if it is stored as whole numbers by blocks or by a book of
    /// sixteen levels, and the processor has AVX2 or AArch64's vectors.
    pub fn takes_rounded(&self) -> bool {
        let whole = match self.storage {
            Storage::Q4_0 | Storage::Q4_1 | Storage::Q5_0 | Storage::Q5_1 | Storage::Q8_0 => true,
            Storage::Q4K | Storage::Q5K | Storage::Q6K => true,
            Storage::Coded => match self.coded.as_ref().and_then(|coded| coded.fused()) {
                Some(Fused::Linear) => true,
                Some(Fused::Nibbles(levels)) => Levels::steps(&levels).is_some(),
                None => false,
            },
            Storage::F32 | Storage::F16 | Storage::BF16 | Storage::Native => false,
        };
        whole && (isa().has(Feature::Avx2) || isa().has(Feature::Neon))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemv;
    use super::super::tests::{BLOCKS, ggml, isas, padded, random};
    use super::*;
    use crate::isa::with_isa;
    use crate::storage::codec::{Codec, encode};
    use crate::{CodecBlock, Encoded, EncodedScales, RowOrder, ScaleStorage, Stream};

    /// Whether rows are multiplied in eight bits.
    fn rounds(isa: &Isa) -> bool {
        isa.has(Feature::Avx2) || isa.has(Feature::Neon)
    }

    /// Values (n, r) as a coded matrix.
    fn encoded(codec: &Codec, values: &[f32], n: usize, r: usize) -> Encoded {
        let read = |rows: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[rows.start * r..rows.end * r]);
        };
        encode(codec, n, r, &read).unwrap()
    }

    /// Books of sixteen levels and of fewer, even and not, in blocks of whole groups, scales nested and not.
    fn books() -> Vec<Codec> {
        let book = |name: &str, code: &[f32], block, scales| {
            let name = name.to_owned();
            Codec { name, bits: 4, block: CodecBlock::Flat(block), code: code.to_vec(), scales }
        };
        let ScaleStorage::Nested { code, .. } = Codec::nf4().scales else { panic!("NF4 nests its scales") };
        let nested = |block| ScaleStorage::Nested { block, code: code.clone() };
        // The values of E2M1 over its largest, without its second zero.
        let twelfths = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12_i16];
        let fp4 = twelfths.map(|twelfth| f32::from(twelfth) / 12.0);
        vec![
            Codec::nf4(),
            book("fp4", &fp4, 32, ScaleStorage::F32),
            book("one-sided", &[-0.03, 0.1, 0.5, 0.7, 1.0], 96, nested(7)),
            book("far apart", &[-1.0, -1e-3, 1e-5, 0.3], 512, nested(4)),
            book("row", &[-1.0, 0.0, 1.0], 32, ScaleStorage::F32),
        ]
    }

    /// Holds the product with `w` to that of its values with the rounded values of x in f64, and its rows to those of a call of
    /// their own; and what rounding costs to a bound.
    fn check(w: &Matrix, label: &str) {
        let (n, k, m) = (w.rows, w.cols, 6);
        let mut decoded = vec![0f32; n * k];
        w.decode_rows(0..n, &mut decoded);
        let mut stream = Stream::new(9, 1);
        let (x, step) = (padded(&random(&mut stream, m * k), m, k), FewRows::padded(k));
        for isa in isas().filter(rounds) {
            let product = |rows: std::ops::Range<usize>, of: std::ops::Range<usize>| {
                let mut out = vec![f32::NAN; rows.len() * of.len()];
                with_isa(isa, || {
                    assert!(w.takes_rounded(), "{label}, {isa:?}");
                    let few = FewRows { values: &x[of.start * step..of.end * step], step, rounded: None };
                    let rounded = RoundedRows::new(few);
                    gemv(FewRows { rounded: Some(&rounded), ..few }, w, rows, &mut out);
                });
                out
            };
            let all = product(0..n, 0..m);
            for j in 0..m {
                let alone: Vec<f32> = (0..n).flat_map(|row| product(row..row + 1, j..j + 1)).collect();
                let of_all: Vec<f32> = all.iter().skip(j).step_by(m).copied().collect();
                assert_eq!(alone, of_all, "{label}, {isa:?}: row {j} alone");
            }
            let rounded = RoundedRows::new(FewRows { values: &x, step, rounded: None });
            for j in 0..m {
                let (mut away, mut norm) = (0f64, 0f64);
                for row in 0..n {
                    let w = &decoded[row * k..(row + 1) * k];
                    let largest = f64::from(w.iter().fold(0f32, |most, w| most.max(w.abs())));
                    let (mut exact, mut wanted, mut size) = (0f64, 0f64, 0f64);
                    for (i, w) in w.iter().enumerate() {
                        let value = f64::from(rounded.value(j, i));
                        let product = f64::from(*w) * f64::from(x[j * step + i]);
                        exact += product;
                        norm += product.powi(2);
                        wanted += f64::from(*w) * value;
                        // Codes without a sign are up to 16 times as large as the values that they stand for.
                        size += value.abs() * largest * 16.0;
                    }
                    let got = f64::from(all[row * m + j]);
                    let error = (got - wanted).abs();
                    assert!(error <= size * 8.0 * f64::from(f32::EPSILON), "{label}, {isa:?}: off by {error:e}");
                    away += (got - exact).powi(2);
                }
                assert!(away.sqrt() < 0.02 * norm.sqrt() + 1e-6, "{label}, {isa:?}: {} away", (away / norm).sqrt());
            }
        }
    }

    #[test]
    fn rows_in_eight_bits_are_multiplied_by_every_block_format() {
        for (storage, name) in BLOCKS {
            let (bytes, rows, cols) = ggml(storage, name);
            check(&Matrix::new(storage, &bytes, rows, cols, RowOrder::Natural).unwrap(), name);
            // The same bytes as longer rows, whose blocks are taken by eights.
            let blocks = rows * 2;
            for wide in [8, 11, 18].into_iter().filter(|wide| *wide <= blocks) {
                let (rows, cols) = (blocks / wide, wide * storage.block_len());
                let bytes = &bytes[..rows * storage.row_bytes(cols).unwrap()];
                let label = format!("{name}, {wide} blocks a row");
                check(&Matrix::new(storage, bytes, rows, cols, RowOrder::Natural).unwrap(), &label);
            }
            if rows.is_multiple_of(2) {
                let order = RowOrder::Interleaved { head_dim: rows };
                check(&Matrix::new(storage, &bytes, rows, cols, order).unwrap(), "rows in another order");
            }
        }
    }

    #[test]
    fn and_by_codes_on_a_straight_line() {
        let mut stream = Stream::new(3, 1);
        for k in [32, 64, 256, 288, 576] {
            let n = 5;
            let Encoded { codes, scales } = encoded(&Codec::int8(), &random(&mut stream, n * k), n, k);
            check(&Matrix::coded(&Codec::int8(), &codes, &scales, n, k).unwrap(), &format!("{k} columns"));
        }
    }

    #[test]
    fn and_by_the_levels_of_every_book() {
        let mut stream = Stream::new(8, 1);
        for mut codec in books() {
            let CodecBlock::Flat(len) = codec.block else { panic!("blocks of a length") };
            for blocks in [1, 3, 8, 9, 13] {
                let (n, k) = (5, blocks * len);
                if codec.name == "row" {
                    codec.block = CodecBlock::Row;
                }
                let Encoded { codes, scales } = encoded(&codec, &random(&mut stream, n * k), n, k);
                let label = format!("{}, {k} columns", codec.name);
                check(&Matrix::coded(&codec, &codes, &scales, n, k).unwrap(), &label);
                // Indices beyond a book of fewer levels stand for its last.
                let codes: Vec<u8> = codes.iter().map(|_| stream.next_u32() as u8).collect();
                check(&Matrix::coded(&codec, &codes, &scales, n, k).unwrap(), &label);
            }
        }
    }

    #[test]
    fn a_broken_scale_of_a_book_shows_in_its_row_and_in_no_other() {
        let codec = Codec { scales: ScaleStorage::F32, ..Codec::nf4() };
        let (n, k) = (3, 320);
        let mut scales = vec![1.0; n * k / 64];
        scales[7] = f32::NAN;
        let (codes, scales) = (vec![0x3C; n * k / 2], EncodedScales::F32(scales));
        let w = Matrix::coded(&codec, &codes, &scales, n, k).unwrap();
        for isa in isas().filter(rounds) {
            for m in [1, 3] {
                let values = vec![0.5; m * k];
                let x = FewRows { values: &values, step: k, rounded: None };
                let mut out = vec![0.0; n * m];
                with_isa(isa, || {
                    let rounded = RoundedRows::new(x);
                    gemv(FewRows { rounded: Some(&rounded), ..x }, &w, 0..n, &mut out);
                });
                let broken: Vec<bool> = out.iter().map(|sum| sum.is_nan()).collect();
                assert_eq!(broken, [vec![false; m], vec![true; m], vec![false; m]].concat(), "{isa:?}");
            }
        }
    }

    #[test]
    fn levels_that_have_no_steps_are_left_to_floats() {
        for code in [vec![-1e-40, 1e-40], vec![-1e-44, 0.0], vec![0.0, 3e38]] {
            let codec = Codec { code, scales: ScaleStorage::F32, ..Codec::nf4() };
            let (codes, scales) = (vec![0x10; 32], EncodedScales::F32(vec![1.0]));
            let w = Matrix::coded(&codec, &codes, &scales, 1, 64).unwrap();
            assert_eq!(w.takes_rounded(), codec.code[1] == 3e38 && rounds(&isa()), "{:?}", codec.code);
        }
    }

    #[test]
    fn a_row_is_rounded_to_the_same_on_every_processor() {
        let (mut stream, k) = (Stream::new(6, 1), 288);
        let mut row = random(&mut stream, k);
        row[..GROUP].fill(0.0);
        row[GROUP..2 * GROUP].fill(1e-42);
        // Halfway between whole numbers, which go to the even ones.
        row[2 * GROUP..3 * GROUP].iter_mut().enumerate().for_each(|(i, value)| *value = i as f32 + 0.5);
        row[2 * GROUP] = -127.0;
        let all = isas().map(|isa| {
            let (mut codes, mut scales, mut halves) = (vec![1; k], vec![1.0; k / GROUP], vec![1.0; k / GROUP * 2]);
            round(isa, &row, &mut codes, &mut scales, &mut halves);
            (codes, scales, halves)
        });
        let all: Vec<_> = all.collect();
        assert!(all.iter().all(|one| *one == all[0]));
        assert_eq!(all[0].0[2 * GROUP..2 * GROUP + 5], [-127, 2, 2, 4, 4]);
    }

    #[test]
    fn what_is_not_finite_stays_so_and_zeros_and_tiny_values_are_zeros() {
        let (bytes, n, k) = ggml(Storage::Q4_0, "q4_0");
        let w = Matrix::new(Storage::Q4_0, &bytes, n, k, RowOrder::Natural).unwrap();
        if !w.takes_rounded() {
            return;
        }
        let product = |value: f32| {
            let values = vec![value; k];
            let x = FewRows { values: &values, step: k, rounded: None };
            let rounded = RoundedRows::new(x);
            let mut out = vec![1.0; n];
            gemv(FewRows { rounded: Some(&rounded), ..x }, &w, 0..n, &mut out);
            out
        };
        assert!([f32::NAN, f32::INFINITY].into_iter().flat_map(product).all(f32::is_nan));
        assert!([0.0, -0.0, 1e-42].into_iter().flat_map(product).all(|sum| sum.abs() < 1e-30));
    }
}
