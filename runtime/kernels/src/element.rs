//! The type that activations are kept in: f32, or bf16 where the processor multiplies it faster.

use half::bf16;

use crate::compiled::Compiled;
use crate::isa::per_isa;
use crate::storage::Storage;

/// f32 or bf16. Products read either as words of four bytes: one f32, or a pair of bf16.
pub trait Element: sealed::Sealed + Compiled<Self> + Copy + Default + PartialEq + Send + Sync + 'static {
    /// Values in a word.
    const PER_WORD: usize;
    /// The storage of a frozen weight that holds exactly these values.
    const STORAGE: Storage;
    /// The nearest value, ties to even.
    fn of(value: f32) -> Self;
    /// The value as f32, exactly.
    fn wide(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const PER_WORD: usize = 1;
    const STORAGE: Storage = Storage::F32;

    #[inline(always)]
    fn of(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const PER_WORD: usize = 2;
    const STORAGE: Storage = Storage::BF16;

    /// Without branches, so that rows of it vectorise.
    #[inline(always)]
    fn of(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        // Rounding up could carry a NaN over to zero.
        bf16::from_bits(if value.is_nan() { 0x7FC0 } else { rounded as u16 })
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Lanes that sums over a row are taken in: what two AVX-512 vectors hold. The order of a sum is part of the result, so it
/// is the same on every processor.
pub(crate) const LANES: usize = 32;

/// The first of some arguments, of which only the first is of interest.
macro_rules! first {
    ($first:expr $(, $rest:expr)*) => {
        $first
    };
}

/// Folds rows of equal length lane by lane, then the lanes: in a fixed order, over arrays whose length the compiler knows.
macro_rules! reduce {
    ($start:expr, $merge:expr, $f:expr, $($row:ident),+) => {{
        let merge = $merge;
        let mut lanes = [$start; LANES];
        $(let $row = $row.as_chunks::<LANES>();)+
        let chunks = first!($($row.0),+).len();
        for i in 0..chunks {
            $(let $row = &$row.0[i];)+
            for lane in 0..LANES {
                lanes[lane] = merge(lanes[lane], $f($($row[lane].wide()),+));
            }
        }
        let rest = first!($($row.1),+).len();
        for lane in 0..rest {
            lanes[lane] = merge(lanes[lane], $f($($row.1[lane].wide()),+));
        }
        fold(lanes, merge)
    }};
}

/// Σ f(aᵢ).
#[inline(always)]
pub(crate) fn sum<A: Element>(a: &[A], f: impl Fn(f32) -> f32) -> f32 {
    reduce!(0f32, |sum, value| sum + value, f, a)
}

/// Replaces each aᵢ by f(aᵢ) and yields the sum of these.
#[inline(always)]
pub(crate) fn replace_and_sum(a: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = a.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = f(chunk[lane]);
            lanes[lane] += chunk[lane];
        }
    }
    for (sum, value) in lanes.iter_mut().zip(rest) {
        *value = f(*value);
        *sum += *value;
    }
    fold(lanes, |sum, value| sum + value)
}

/// Σ f(aᵢ, bᵢ), for rows of equal length.
#[inline(always)]
pub(crate) fn sum2<A: Element, B: Element>(a: &[A], b: &[B], f: impl Fn(f32, f32) -> f32) -> f32 {
    assert_eq!(a.len(), b.len());
    reduce!(0f32, |sum, value| sum + value, f, a, b)
}

per_isa! {
    /// Σ aᵢ bᵢ, for rows of equal length.
    pub(crate) fn dot<E: Element>(a: &[E], b: &[E]) -> f32 {
        sum2(a, b, |a, b| a * b)
    }
}

/// Σ f(aᵢ, bᵢ, cᵢ), for rows of equal length.
#[inline(always)]
pub(crate) fn sum3<A: Element, B: Element, C: Element>(
    a: &[A],
    b: &[B],
    c: &[C],
    f: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    assert!(a.len() == b.len() && a.len() == c.len());
    reduce!(0f32, |sum, value| sum + value, f, a, b, c)
}

/// The largest aᵢ, -inf if there is none. A NaN may be passed over.
#[inline(always)]
pub(crate) fn largest<A: Element>(a: &[A]) -> f32 {
    reduce!(f32::NEG_INFINITY, |most: f32, value: f32| if value > most { value } else { most }, |value| value, a)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest |aᵢ|, 0 if there is none; NaN if one is not a number.
#[inline(always)]
pub(crate) fn largest_magnitude(a: &[f32]) -> f32 {
    // Bits of floats without their sign are in the order of their magnitudes, and NaN lies above infinity.
    let mut lanes = [0u32; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = lanes[lane].max(chunk[lane].to_bits() & 0x7FFF_FFFF);
        }
    }
    let rest = rest.iter().map(|value| value.to_bits() & 0x7FFF_FFFF);
    f32::from_bits(lanes.into_iter().chain(rest).fold(0, u32::max))
}

/// How values are rounded to whole numbers from -127 to 127: what the numbers are multiplied by, and the values before. The scale is
/// NaN if a value is not finite; values that are all zero, or so small that the inverse overflows, become zeros.
#[inline(always)]
pub(crate) fn eight_bit_scale(values: &[f32]) -> (f32, f32) {
    scale_of_eight_bits(largest_magnitude(values))
}

/// The same of values whose largest magnitude is known.
#[inline(always)]
pub(crate) fn scale_of_eight_bits(largest: f32) -> (f32, f32) {
    let inverse = 127.0 / largest;
    let inverse = if largest.is_finite() && inverse.is_finite() { inverse } else { 0.0 };
    (if largest.is_finite() { largest / 127.0 } else { f32::NAN }, inverse)
}

/// The nearest whole number to `value * inverse`, ties to even, if it is below 2^22 in magnitude.
#[inline(always)]
pub(crate) fn nearest_whole(value: f32, inverse: f32) -> i32 {
    // Adding 1.5 · 2^23 rounds and leaves the number in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    (value * inverse + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i32
}

/// e^x to about 1.5 units in the last place, without branches; below -87.3 it stays at its smallest normal value, above 88.3
/// at its largest; a NaN stays one.
///
/// 2^n · e^r with n = round(x / ln 2), ln 2 in two parts, and for |r| ≤ ln 2 / 2 the polynomial 1 + r + r² q(r) of degree 6 whose
/// largest relative error is least, 3e-9. Products are fused with their sums, which halves the instructions.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    // Adding 1.5 · 2^23 leaves the rounded integer in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.381_459_9e-3;
    for c in [8.368_717e-3, 4.166_839e-2, 0.166_665_21, 0.499_999_94, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    let scale = shifted.to_bits().wrapping_add(127) << 23;
    p * f32::from_bits(scale)
}

/// tanh x to about three units in the last place, also near 0, without branches and never beyond ±1; a NaN stays one.
///
/// x p(x²) / q(x²) of degrees 9 and 8, whose largest relative error for |x| ≤ 9 is least, 2e-8; beyond, it is 1 in f32.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let x = if x < -9.0 { -9.0 } else { x };
    let x = if x > 9.0 { 9.0 } else { x };
    let square = x * x;
    let mut p = 1.335_468_2e-8;
    for c in [2.060_91e-5, 3.495_589e-3, 0.133_810_27, 1.0] {
        p = square.mul_add(p, c);
    }
    let mut q = 7.776_567e-7;
    for c in [3.285_636_5e-4, 2.587_698_6e-2, 0.467_143_42, 1.0] {
        q = square.mul_add(q, c);
    }
    let y = x * p / q;
    let y = if y < -1.0 { -1.0 } else { y };
    if y > 1.0 { 1.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_that_of_the_library_to_four_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in (-200_000..200_000).filter(|i| *i != 0) {
            for x in [i as f32 * 1e-4, i as f32 * 1e-9] {
                let exact = f64::from(x).tanh();
                worst = worst.max(((f64::from(tanh(x)) - exact) / exact).abs());
                assert!(tanh(x).abs() <= 1.0 && tanh(-x) == -tanh(x), "{x}");
            }
        }
        assert!(worst < 4.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert!(tanh(f32::NAN).is_nan() && tanh(0.0) == 0.0);
        assert!(tanh(f32::INFINITY) > 1.0 - 2e-7 && tanh(f32::NEG_INFINITY) < -1.0 + 2e-7);
    }

    #[test]
    fn exp_is_that_of_the_library_to_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) > 0.0 && exp(-1e30) < 2e-38);
        assert!(exp(1e30).is_finite());
    }

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let (ours, theirs) = (<bf16 as Element>::of(value), bf16::from_f32(value));
                assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{value:e}");
            }
        }
    }

    #[test]
    fn sums_and_maxima_take_in_every_value_once() {
        for n in [0_usize, 1, 31, 32, 33, 100] {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let total = (n * n.saturating_sub(1) / 2) as f32;
            assert_eq!(sum(&values, |x| x), total);
            let mut replaced = values.clone();
            assert_eq!(replace_and_sum(&mut replaced, |x| 2.0 * x), 2.0 * total);
            assert!(values.iter().zip(&replaced).all(|(x, y)| 2.0 * x == *y));
            assert_eq!(sum2(&values, &values, |x, y| 2.0 * x - y), total);
            assert_eq!(sum3(&values, &values, &values, |x, y, z| x + y - z), total);
            assert_eq!(largest(&values), if n == 0 { f32::NEG_INFINITY } else { (n - 1) as f32 });
        }
    }
}
