//! AArch64: 128 bits at a time, so that the codes of a group are two vectors. Both sides of its products of bytes have a sign, so codes are
//! what they stand for, and only minima remain to be added. Bytes are multiplied by fours where the processor does that (`sdot`), else one by
//! one, which yields the same.

use super::super::Job;
use super::book::{BlockScales, Levels};
use super::{GROUP, PIECE, RoundedRows, SPAN};
use crate::isa::{Feature, Isa};
use crate::matmul::Matrix;
use crate::neon::*;
use crate::storage::Storage;
use crate::storage::codec::Coded;
use crate::storage::format::sub_blocks;

/// Computes a job of M rows of x from the `first` on.
///
/// # Safety
/// The job is as [`super::super::gemv`] checked it, [`Matrix::takes_rounded`] of its weight, and rows of x lie one after another.
pub unsafe fn run<const M: usize>(isa: Isa, job: &Job<'_>, x: &RoundedRows, first: usize, scratch: &mut Vec<f32>) {
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,dotprod"))]
    unsafe fn by_fours<const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize, scratch: &mut Vec<f32>) {
        // SAFETY: passed on to the caller.
        unsafe { by::<ByFours, M>(job, x, first, scratch) }
    }
    // SAFETY: passed on to the caller.
    unsafe {
        if isa.has(Feature::DotProd) {
            by_fours::<M>(job, x, first, scratch);
        } else {
            by::<OneByOne, M>(job, x, first, scratch);
        }
    }
}

/// # Safety
/// See [`run`]; called from what has the instructions of `D` enabled. So for all below.
#[inline(always)]
unsafe fn by<D: Dot, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize, scratch: &mut Vec<f32>) {
    // SAFETY: passed on to the caller.
    unsafe {
        match (job.w.storage, &job.w.coded) {
            (Storage::Q4_0, _) => by_spans::<D, Q4_0, M>(Q4_0, job, x, first),
            (Storage::Q4_1, _) => by_spans::<D, Q4_1, M>(Q4_1, job, x, first),
            (Storage::Q5_0, _) => by_spans::<D, Q5_0, M>(Q5_0, job, x, first),
            (Storage::Q5_1, _) => by_spans::<D, Q5_1, M>(Q5_1, job, x, first),
            (Storage::Q8_0, _) => by_spans::<D, Q8_0, M>(Q8_0, job, x, first),
            (Storage::Q4K, _) => by_spans::<D, Q4K, M>(Q4K, job, x, first),
            (Storage::Q5K, _) => by_spans::<D, Q5K, M>(Q5K, job, x, first),
            (Storage::Q6K, _) => q6k::<D, M>(job, x, first),
            (_, Some(coded)) => match Book::of(job.w, scratch) {
                Some(book) => by_spans::<D, Book<'_>, M>(book, job, x, first),
                None => by_spans::<D, Linear<'_>, M>(Linear(coded), job, x, first),
            },
            (storage, None) => unreachable!("{storage:?} takes no rounded rows"),
        }
    }
}

/// Products of bytes.
trait Dot {
    /// To each sum adds four products of a piece's sixteen.
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

struct ByFours;
struct OneByOne;

impl Dot for ByFours {
    #[inline(always)]
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: passed on to the caller.
        unsafe { sdot(sums, w, x) }
    }
}

impl Dot for OneByOne {
    #[inline(always)]
    unsafe fn dot(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_s8(vget_high_s8(w), vget_high_s8(x));
        vpadalq_s16(vpadalq_s16(sums, low), high)
    }
}

/// The two pieces of a group.
type Pieces = [int8x16_t; 2];
/// A value for each group of a span.
type OfSpan = [float32x4_t; 2];

/// A storage by groups, eight of which are a span.
trait Format {
    /// What is kept of a group's codes.
    type Codes: Copy;
    /// What minima are multiplied by; 0 where there are none.
    const MIN: f32 = 0.0;
    /// Bytes of so many groups.
    fn bytes(groups: usize) -> usize;
    /// Makes ready for a row, and yields what its sums are multiplied by.
    #[inline(always)]
    fn begin(&mut self, _row: usize) -> f32 {
        1.0
    }
    /// Scales and minima of the n groups of a span that begins at `p`; after them any.
    unsafe fn scales(&self, p: *const u8, span: usize, n: usize) -> (OfSpan, OfSpan);
    /// Codes of a group of a span that begins at `p`.
    unsafe fn codes(&self, p: *const u8, group: usize) -> Self::Codes;
    /// Sums of products.
    unsafe fn dot<D: Dot>(codes: Self::Codes, x: Pieces) -> int32x4_t;
}

/// A row of x.
#[derive(Clone, Copy)]
struct Row {
    codes: *const i8,
    scales: *const f32,
    sums: *const f32,
}

/// The M rows of x from the `first` on.
#[inline(always)]
fn rows<const M: usize>(x: &RoundedRows, first: usize) -> [Row; M] {
    std::array::from_fn(|j| {
        let span = (first + j) * x.spans;
        Row {
            codes: x.codes[span * SPAN * GROUP..].as_ptr(),
            scales: x.scales[span * SPAN..].as_ptr(),
            sums: x.sums[span * SPAN..].as_ptr(),
        }
    })
}

impl Row {
    /// The codes of a group that there is.
    #[inline(always)]
    unsafe fn group(&self, group: usize) -> Pieces {
        // SAFETY: passed on to the caller.
        unsafe { pieces(self.codes.add(group * GROUP)) }
    }
}

/// Two neighbouring pieces.
#[inline(always)]
unsafe fn pieces(p: *const i8) -> Pieces {
    // SAFETY: the caller has 32 bytes at the pointer.
    unsafe { [vld1q_s8(p), vld1q_s8(p.add(PIECE))] }
}

/// Eight values in two vectors.
#[inline(always)]
fn eight(values: &[f32; SPAN]) -> OfSpan {
    // SAFETY: there are eight.
    unsafe { [vld1q_f32(values.as_ptr()), vld1q_f32(values.as_ptr().add(4))] }
}

#[inline(always)]
unsafe fn by_spans<D: Dot, F: Format, const M: usize>(mut format: F, job: &Job<'_>, x: &RoundedRows, first: usize) {
    let groups = job.w.cols / GROUP;
    let x = rows::<M>(x, first);
    for (i, row) in job.rows.clone().enumerate() {
        let factor = format.begin(row);
        // SAFETY: a row of W is `groups` groups; a row of x has as many, and scales and sums for whole spans of them.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * F::bytes(groups));
            let mut sums = Sums::<M>::zero();
            for from in (0..groups).step_by(SPAN) {
                let (p, n) = (w.add(F::bytes(from)), SPAN.min(groups - from));
                let (scales, minima) = format.scales(p, from / SPAN, n);
                let mut factors = [[0f32; SPAN]; M];
                for ((x, factors), offsets) in x.iter().zip(&mut factors).zip(&mut sums.offsets) {
                    for half in 0..2 {
                        let factor = vmulq_f32(scales[half], vld1q_f32(x.scales.add(from + 4 * half)));
                        vst1q_f32(factors.as_mut_ptr().add(4 * half), factor);
                        if F::MIN != 0.0 {
                            *offsets = vfmaq_f32(*offsets, minima[half], vld1q_f32(x.sums.add(from + 4 * half)));
                        }
                    }
                }
                // By twos, so that it is known beforehand to which sums each is added.
                for g in (0..n).step_by(2) {
                    sums.add::<D, F, 0>(format.codes(p, g), &x, from + g, &factors, g);
                    if g + 1 < n {
                        sums.add::<D, F, 1>(format.codes(p, g + 1), &x, from + g + 1, &factors, g + 1);
                    }
                }
            }
            sums.finish(job, i, factor, F::MIN);
        }
    }
}

/// What is summed for a row of W and each row of x.
struct Sums<const M: usize> {
    /// Products, in two turns.
    products: [[float32x4_t; 2]; M],
    /// Minima times the sums of x.
    offsets: [float32x4_t; M],
}

impl<const M: usize> Sums<M> {
    #[inline(always)]
    fn zero() -> Self {
        let zero = vdupq_n_f32(0.0);
        Self { products: [[zero; 2]; M], offsets: [zero; M] }
    }

    /// Adds a group's products, that of x with the number `group`, each times its factor.
    #[inline(always)]
    unsafe fn add<D: Dot, F: Format, const TURN: usize>(
        &mut self,
        codes: F::Codes,
        x: &[Row; M],
        group: usize,
        factors: &[[f32; SPAN]; M],
        at: usize,
    ) {
        for ((products, x), factors) in self.products.iter_mut().zip(x).zip(factors) {
            // SAFETY: passed on to the caller.
            let dot = unsafe { F::dot::<D>(codes, x.group(group)) };
            products[TURN] = vfmaq_f32(products[TURN], vcvtq_f32_s32(dot), vdupq_n_f32(factors[at]));
        }
    }

    /// Writes a row's results: `factor` times products, and `min` times offsets.
    #[inline(always)]
    unsafe fn finish(self, job: &Job<'_>, i: usize, factor: f32, min: f32) {
        for (j, ([a, b], offsets)) in self.products.into_iter().zip(self.offsets).enumerate() {
            let both = vfmaq_f32(vaddq_f32(a, b), offsets, vdupq_n_f32(min));
            // SAFETY: the job has room for the results.
            unsafe { *job.out.0.add(i * job.out.1 + j) = factor * vaddvq_f32(both) };
        }
    }
}

/// The halves at `p` and at the same place of the blocks of `bytes` that follow, n in all, as floats; after them the last again.
#[inline(always)]
unsafe fn halves(p: *const u8, bytes: usize, n: usize) -> OfSpan {
    // SAFETY: the caller has n blocks at the pointer.
    let bits: [u16; SPAN] =
        std::array::from_fn(|block| unsafe { p.add(block.min(n - 1) * bytes).cast::<u16>().read_unaligned() });
    // SAFETY: there are eight.
    unsafe { [widen_halves(vld1_u16(bits.as_ptr())), widen_halves(vld1_u16(bits.as_ptr().add(4)))] }
}

/// A half as a float.
#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the caller has it at the pointer.
    let half = unsafe { p.cast::<u16>().read_unaligned() };
    // SAFETY: there are four.
    vaddvq_f32(widen_halves(unsafe { vld1_u16([half, 0, 0, 0].as_ptr()) }))
}

/// Low halves of bytes, and the high ones.
#[inline(always)]
fn nibbles(bytes: uint8x16_t) -> [uint8x16_t; 2] {
    [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
}

/// 16 for each of sixteen bits that is set.
#[inline(always)]
fn sixteens(bits: u16) -> uint8x16_t {
    const OWN: [u8; PIECE] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    let spread = bits.to_le_bytes().map(|byte| [byte; 8]);
    // SAFETY: each is sixteen bytes.
    let (spread, own) = unsafe { (vld1q_u8(spread.as_ptr().cast()), vld1q_u8(OWN.as_ptr())) };
    vandq_u8(vtstq_u8(spread, own), vdupq_n_u8(16))
}

/// Codes less what they are greater by.
#[inline(always)]
fn less(codes: [uint8x16_t; 2], zero: i8) -> Pieces {
    codes.map(|codes| vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(zero)))
}

#[inline(always)]
unsafe fn dot_of_pieces<D: Dot>(w: Pieces, x: Pieces) -> int32x4_t {
    // SAFETY: passed on to the caller.
    unsafe { D::dot(D::dot(vdupq_n_s32(0), w[0], x[0]), w[1], x[1]) }
}

/// Formats of ggml in blocks of a group: a scale, perhaps a minimum, and codes, which `|p|` yields.
macro_rules! block {
    ($name:ident, $bytes:literal, min $min:literal, |$p:ident| $codes:expr) => {
        struct $name;

        impl Format for $name {
            type Codes = Pieces;
            const MIN: f32 = $min;

            #[inline(always)]
            fn bytes(groups: usize) -> usize {
                groups * $bytes
            }

            #[inline(always)]
            unsafe fn scales(&self, p: *const u8, _: usize, n: usize) -> (OfSpan, OfSpan) {
                // SAFETY: the caller has n blocks at the pointer.
                unsafe {
                    let scales = halves(p, $bytes, n);
                    (scales, if $min == 0.0 { scales } else { halves(p.add(2), $bytes, n) })
                }
            }

            #[inline(always)]
            unsafe fn codes(&self, p: *const u8, group: usize) -> Pieces {
                // SAFETY: the caller has the block at the pointer.
                unsafe {
                    let $p = p.add(group * $bytes);
                    $codes
                }
            }

            #[inline(always)]
            unsafe fn dot<D: Dot>(codes: Pieces, x: Pieces) -> int32x4_t {
                // SAFETY: passed on to the caller.
                unsafe { dot_of_pieces::<D>(codes, x) }
            }
        }
    };
}

/// Four bits from `p` and a fifth of each from the 32 bits at `bits`.
#[inline(always)]
unsafe fn five_bits(p: *const u8, bits: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: the caller has both.
    let (bytes, bits) = unsafe { (vld1q_u8(p), bits.cast::<u32>().read_unaligned()) };
    let [low, high] = nibbles(bytes);
    [vorrq_u8(low, sixteens(bits as u16)), vorrq_u8(high, sixteens((bits >> 16) as u16))]
}

block!(Q4_0, 18, min 0.0, |p| less(nibbles(vld1q_u8(p.add(2))), 8));
block!(Q4_1, 20, min 1.0, |p| less(nibbles(vld1q_u8(p.add(4))), 0));
block!(Q5_0, 22, min 0.0, |p| less(five_bits(p.add(6), p.add(2)), 16));
block!(Q5_1, 24, min 1.0, |p| less(five_bits(p.add(8), p.add(4)), 0));
block!(Q8_0, 34, min 0.0, |p| pieces(p.add(2).cast()));

/// Formats of ggml in blocks of a span, each group with a scale and a minimum.
macro_rules! super_block {
    ($name:ident, $bytes:literal, |$p:ident, $group:ident| $codes:expr) => {
        struct $name;

        impl Format for $name {
            type Codes = Pieces;
            const MIN: f32 = -1.0;

            #[inline(always)]
            fn bytes(groups: usize) -> usize {
                groups / SPAN * $bytes
            }

            #[inline(always)]
            unsafe fn scales(&self, p: *const u8, _: usize, _: usize) -> (OfSpan, OfSpan) {
                // SAFETY: the caller has a block at the pointer: two halves, then twelve bytes.
                unsafe {
                    let (scales, minima) = sub_blocks(p.add(4));
                    let times =
                        |bytes: u64, factor: f32| eight(&bytes.to_le_bytes().map(|byte| f32::from(byte) * factor));
                    (times(scales, half(p)), times(minima, half(p.add(2))))
                }
            }

            #[inline(always)]
            unsafe fn codes(&self, $p: *const u8, $group: usize) -> Pieces {
                // SAFETY: as above.
                unsafe { $codes }
            }

            #[inline(always)]
            unsafe fn dot<D: Dot>(codes: Pieces, x: Pieces) -> int32x4_t {
                // SAFETY: passed on to the caller.
                unsafe { dot_of_pieces::<D>(codes, x) }
            }
        }
    };
}

/// Four-bit codes of a group: 32 bytes hold those of two.
#[inline(always)]
unsafe fn half_bytes(p: *const u8, group: usize) -> [uint8x16_t; 2] {
    // SAFETY: the caller has so many bytes at the pointer.
    let both = unsafe { [0, PIECE].map(|at| nibbles(vld1q_u8(p.add(group / 2 * 32 + at)))) };
    both.map(|[low, high]| if group.is_multiple_of(2) { low } else { high })
}

super_block!(Q4K, 144, |p, group| less(half_bytes(p.add(16), group), 0));
super_block!(Q5K, 176, |p, group| {
    let [a, b] = half_bytes(p.add(48), group);
    // Bit `group` of each byte becomes the fifth.
    let bit = vdupq_n_u8(1 << group);
    let fifth = |p: *const u8| vandq_u8(vtstq_u8(vld1q_u8(p), bit), vdupq_n_u8(16));
    less([vorrq_u8(a, fifth(p.add(16))), vorrq_u8(b, fifth(p.add(32)))], 0)
});

/// Codes of a group of Q6_K: four bits of each lie in the first 128 bytes, two in the 64 after them.
#[inline(always)]
unsafe fn six_bits(p: *const u8, group: usize) -> Pieces {
    let (half, quarter) = (group / 4, group % 4);
    let piece = |at: usize| {
        // SAFETY: the caller has a whole block at the pointer.
        let (low, high) =
            unsafe { (vld1q_u8(p.add(64 * half + 32 * (quarter % 2) + at)), vld1q_u8(p.add(128 + 32 * half + at))) };
        let low = nibbles(low)[quarter / 2];
        // Two bits each, to the fifth and sixth place.
        let high = match quarter {
            0 => vshlq_n_u8::<4>(high),
            1 => vshlq_n_u8::<2>(high),
            2 => high,
            _ => vshrq_n_u8::<2>(high),
        };
        vorrq_u8(low, vandq_u8(high, vdupq_n_u8(0x30)))
    };
    less([piece(0), piece(PIECE)], 32)
}

/// Q6_K: sixteen scales of sixteen codes each.
#[inline(always)]
unsafe fn q6k<D: Dot, const M: usize>(job: &Job<'_>, x: &RoundedRows, first: usize) {
    const BYTES: usize = 210;
    let blocks = job.w.cols / (SPAN * GROUP);
    let x = rows::<M>(x, first);
    for (i, row) in job.rows.clone().enumerate() {
        // SAFETY: a row of W is `blocks` blocks, a row of x eight times as many groups.
        unsafe {
            let w = job.w.bytes.as_ptr().add(job.w.order.stored(row) * blocks * BYTES);
            let mut sums = Sums::<M>::zero();
            for block in 0..blocks {
                let p = w.add(block * BYTES);
                let d = half(p.add(208));
                for group in 0..SPAN {
                    let (codes, at) = (six_bits(p, group), block * SPAN + group);
                    let scales = [0, 1].map(|half| d * f32::from(*p.add(192 + 2 * group + half).cast::<i8>()));
                    for (products, x) in sums.products.iter_mut().zip(&x) {
                        let (of_x, scale) = (x.group(at), *x.scales.add(at));
                        for half in 0..2 {
                            let dot = D::dot(vdupq_n_s32(0), codes[half], of_x[half]);
                            let factor = vdupq_n_f32(scales[half] * scale);
                            products[half] = vfmaq_f32(products[half], vcvtq_f32_s32(dot), factor);
                        }
                    }
                }
            }
            sums.finish(job, i, 1.0, 0.0);
        }
    }
}

/// Eight bits a value, `(index - 127) · scale / 127`, a scale for each row.
struct Linear<'a>(&'a Coded<'a>);

impl Format for Linear<'_> {
    type Codes = Pieces;

    #[inline(always)]
    fn bytes(groups: usize) -> usize {
        groups * GROUP
    }

    #[inline(always)]
    fn begin(&mut self, row: usize) -> f32 {
        self.0.scale(row) / 127.0
    }

    #[inline(always)]
    unsafe fn scales(&self, _: *const u8, _: usize, _: usize) -> (OfSpan, OfSpan) {
        ([vdupq_n_f32(1.0); 2], [vdupq_n_f32(0.0); 2])
    }

    #[inline(always)]
    unsafe fn codes(&self, p: *const u8, group: usize) -> Pieces {
        // SAFETY: the caller has the group at the pointer.
        let codes = unsafe { [0, PIECE].map(|at| vld1q_u8(p.add(group * GROUP + at))) };
        less(codes.map(|codes| vminq_u8(codes, vdupq_n_u8(254))), 127)
    }

    #[inline(always)]
    unsafe fn dot<D: Dot>(codes: Pieces, x: Pieces) -> int32x4_t {
        // SAFETY: passed on to the caller.
        unsafe { dot_of_pieces::<D>(codes, x) }
    }
}

/// The levels of a book as whole numbers of two bytes with a sign each.
struct Book<'a> {
    scales: BlockScales<'a>,
    high: int8x16_t,
    low: int8x16_t,
    factor: f32,
}

impl<'a> Book<'a> {
    #[inline(always)]
    fn of(w: &'a Matrix<'a>, scratch: &'a mut Vec<f32>) -> Option<Self> {
        let levels = Levels::of_signed_bytes(w)?;
        let low = levels.whole.map(|whole| whole as i8);
        let high: [i8; 16] = std::array::from_fn(|i| ((levels.whole[i] - i32::from(low[i])) >> 8) as i8);
        // SAFETY: there are sixteen of each.
        let (high, low) = unsafe { (vld1q_s8(high.as_ptr()), vld1q_s8(low.as_ptr())) };
        Some(Self { scales: BlockScales::new(w, scratch), high, low, factor: levels.factor })
    }
}

impl Format for Book<'_> {
    /// The upper bytes, and the lower ones.
    type Codes = [Pieces; 2];

    #[inline(always)]
    fn bytes(groups: usize) -> usize {
        groups * PIECE
    }

    #[inline(always)]
    fn begin(&mut self, row: usize) -> f32 {
        self.scales.begin(row);
        self.factor
    }

    #[inline(always)]
    unsafe fn scales(&self, _: *const u8, span: usize, _: usize) -> (OfSpan, OfSpan) {
        let scales = eight(&self.scales.of_groups(span));
        (scales, scales)
    }

    #[inline(always)]
    unsafe fn codes(&self, p: *const u8, group: usize) -> [Pieces; 2] {
        // SAFETY: the caller has the group at the pointer.
        let [second, first] = nibbles(unsafe { vld1q_u8(p.add(group * PIECE)) });
        // A byte's upper half comes first.
        let index = [vzip1q_u8(first, second), vzip2q_u8(first, second)];
        [self.high, self.low].map(|table| index.map(|index| vqtbl1q_s8(table, index)))
    }

    #[inline(always)]
    unsafe fn dot<D: Dot>([high, low]: [Pieces; 2], x: Pieces) -> int32x4_t {
        // SAFETY: passed on to the caller. Eight products times 2^8 are below 2^26.
        unsafe {
            let (high, low) = (dot_of_pieces::<D>(high, x), dot_of_pieces::<D>(low, x));
            vaddq_s32(vshlq_n_s32::<8>(high), low)
        }
    }
}
