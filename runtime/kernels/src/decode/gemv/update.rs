//! Matrices of low-rank updates, for products of a few rows: neighbouring rows lie beside each other in panels, so that their sums grow
//! together and none has to be added over lanes.

use std::cell::RefCell;
use std::ops::Range;

use super::RoundedRows;
use crate::element::{eight_bit_scale, nearest_whole};
#[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::Feature;
use crate::isa::{Isa, isa, per_isa};

/// Rows of a panel of floats.
const SINGLES: usize = 8;
/// Rows of a panel of codes.
const CODES: usize = 16;
/// What a code is greater by than the whole number that it stands for.
const ZERO: i32 = 128;
/// Layouts take a multiple of this: a cache line.
const LINE: usize = 64;

/// Four neighbouring codes of each row of a panel.
type Word = [[u8; 4]; CODES];
/// Scale of each row of a panel of codes: the upper half of its bits as a float.
type Scales = [[u8; 2]; CODES];
/// One value of each row of a panel.
type Values = [[u8; 4]; SINGLES];

/// How a matrix (rows, cols) lies in bytes by panels: floats, or in eight bits whole numbers from -127 to 127 with a scale for each row.
///
/// A panel of floats is a value of each of its rows, column by column. One of codes is its rows' scales in bfloat16, then four codes of
/// each of its rows, and so on.
#[derive(Clone, Copy, Debug)]
pub struct Panels {
    rows: usize,
    cols: usize,
    eight_bits: bool,
}

impl Panels {
    /// The layout of so many rows and columns.
    pub fn new(rows: usize, cols: usize, eight_bits: bool) -> Self {
        Self { rows, cols, eight_bits }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows of a panel, and its bytes.
    fn panel(&self) -> (usize, usize) {
        if self.eight_bits {
            (CODES, size_of::<Scales>() + size_of::<Word>() * self.cols.div_ceil(4))
        } else {
            (SINGLES, size_of::<Values>() * self.cols)
        }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let (height, size) = self.panel();
        (self.rows.div_ceil(height) * size).next_multiple_of(LINE)
    }

    /// Lays out values (rows, cols). In eight bits each row is rounded with a scale of its own, NaN if a value is not finite.
    ///
    /// # Panics
    /// When there are not so many values or bytes.
    pub fn write(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!((values.len(), out.len()), (self.rows * self.cols, self.bytes()), "{self:?}");
        let (height, size) = self.panel();
        for (row, values) in values.chunks_exact(self.cols.max(1)).enumerate() {
            let (panel, lane) = (&mut out[row / height * size..][..size], row % height);
            if !self.eight_bits {
                let (fours, _) = panel.as_chunks_mut::<4>();
                for (k, value) in values.iter().enumerate() {
                    fours[k * SINGLES + lane] = value.to_ne_bytes();
                }
                continue;
            }
            let (scales, words) = panel.split_at_mut(size_of::<Scales>());
            // Rounded up, so that the largest value is 127 times it at most.
            let (scale, _) = eight_bit_scale(values);
            let scale = if scale.is_nan() { scale } else { f32::from_bits((scale.to_bits() + 0xFFFF) & 0xFFFF_0000) };
            scales.as_chunks_mut().0[lane] = ((scale.to_bits() >> 16) as u16).to_ne_bytes();
            let inverse = if scale.is_normal() { 1.0 / scale } else { 0.0 };
            for (word, values) in values.chunks(4).enumerate() {
                let codes = &mut words.as_chunks_mut::<4>().0[word * CODES + lane];
                *codes = [ZERO as u8; 4];
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = (nearest_whole(*value, inverse) + ZERO) as u8;
                }
            }
        }
    }

    /// Panels that have some of the rows: for each, these rows, and its bytes.
    fn over<'a>(
        &self,
        bytes: &'a [u8],
        rows: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, &'a [u8])> + use<'a> {
        let (height, size) = self.panel();
        (rows.start / height..rows.end.div_ceil(height)).map(move |panel| {
            let own = (panel * height).max(rows.start)..((panel + 1) * height).min(rows.end);
            (own, &bytes[panel * size..(panel + 1) * size])
        })
    }

    /// `out += W uᵀ` for the rows `rows`: `out` (rows.len(), m), `u` (cols, m). In eight bits u is rounded, too, with a scale for each of
    /// its m rows. Each element depends on its row of W and of u alone, and is the same on every processor.
    ///
    /// # Panics
    /// When sizes disagree.
    pub fn add(&self, bytes: &[u8], u: &[f32], m: usize, rows: Range<usize>, out: &mut [f32]) {
        let fits = u.len() == self.cols * m && rows.end <= self.rows && out.len() == rows.len() * m;
        assert!(fits && bytes.len() == self.bytes(), "{rows:?} of {} x {} for {m} rows", self.rows, self.cols);
        let (isa, first) = (isa(), rows.start);
        if self.cols == 0 {
            return;
        }
        if !self.eight_bits {
            for (own, panel) in self.over(bytes, rows) {
                let out = &mut out[(own.start - first) * m..(own.end - first) * m];
                add_singles(isa, u, m, panel.as_chunks().0.as_chunks().0, own, out);
            }
            return;
        }
        ROUNDED.with_borrow_mut(|of_u| {
            for j in 0..m {
                of_u.round(isa, u[j..].iter().step_by(m).copied());
                for (own, panel) in self.over(bytes, rows.clone()) {
                    let out = &mut out[(own.start - first) * m..(own.end - first) * m];
                    add_codes(isa, panel, own.start % CODES, of_u, &mut out[j..], m);
                }
            }
        });
    }

    /// `W xᵀ` for the rows `rows`, in eight bits on both sides: `out` (rows.len(), m), x (m, cols). Each element depends on its row of W
    /// and of x alone, and is the same on every processor.
    ///
    /// # Panics
    /// When W is not in eight bits, or sizes disagree.
    pub fn product(&self, bytes: &[u8], x: &RoundedRows, rows: Range<usize>, out: &mut [f32]) {
        let m = x.count();
        let fits = self.cols <= x.width() && rows.end <= self.rows && out.len() == rows.len() * m;
        let fits = fits && self.eight_bits && bytes.len() == self.bytes();
        assert!(fits, "{rows:?} of {} x {} for {m} rows", self.rows, self.cols);
        let (isa, first) = (isa(), rows.start);
        for (own, panel) in self.over(bytes, rows) {
            let (scales, words) = codes(panel);
            for j in 0..m {
                let sums = sums_of_groups(isa, words, x, j);
                let offset = ZERO as f32 * x.total(j);
                for row in own.clone() {
                    let lane = row % CODES;
                    out[(row - first) * m + j] = (sums[lane] - offset) * widened(scales[lane]);
                }
            }
        }
    }
}

/// Scales and codes of a panel.
fn codes(panel: &[u8]) -> (&Scales, &[Word]) {
    let (scales, words) = panel.split_at(size_of::<Scales>());
    (scales.as_chunks().0.first_chunk().expect("scales come first"), words.as_chunks().0.as_chunks().0)
}

/// A scale as a float.
fn widened(scale: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_ne_bytes(scale)) << 16)
}

/// A row of u in eight bits.
#[derive(Default)]
struct Rounded {
    values: Vec<f32>,
    words: Vec<[i8; 4]>,
    /// NaN if a value is not finite.
    scale: f32,
    /// What sums of products with codes start from.
    start: i32,
}

thread_local!(static ROUNDED: RefCell<Rounded> = RefCell::default());

impl Rounded {
    fn round(&mut self, isa: Isa, u: impl Iterator<Item = f32>) {
        self.values.clear();
        self.values.extend(u);
        let sum;
        (self.scale, sum) = round(isa, &self.values, &mut self.words);
        self.start = -ZERO * sum;
    }
}

per_isa! {
    /// Values to words of codes; their scale, and the sum of the codes.
    fn round(values: &[f32], words: &mut Vec<[i8; 4]>) -> (f32, i32) {
        let (scale, inverse) = eight_bit_scale(values);
        words.clear();
        words.resize(values.len().div_ceil(4), [0; 4]);
        let codes = words.as_flattened_mut();
        for (code, value) in codes.iter_mut().zip(values) {
            *code = nearest_whole(*value, inverse) as i8;
        }
        (scale, codes.iter().map(|code| i32::from(*code)).sum())
    }
}

/// Adds the products of rows of a panel, from number `lane` on, with a row of u, to every m-th value of `out`.
fn add_codes(isa: Isa, panel: &[u8], lane: usize, u: &Rounded, out: &mut [f32], m: usize) {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_bytes_in_512() {
        // SAFETY: the processor has it.
        return unsafe { vnni::add_codes(panel, lane, u, out, m) };
    }
    let (scales, words) = codes(panel);
    let mut sums = [u.start; CODES];
    add_words(isa, words, &u.words, &mut sums);
    for ((out, sum), scale) in out.iter_mut().step_by(m).zip(&sums[lane..]).zip(&scales[lane..]) {
        *out += *sum as f32 * (widened(*scale) * u.scale);
    }
}

/// Adds products of each row of a panel of codes with words of u.
fn add_words(isa: Isa, codes: &[Word], u: &[[i8; 4]], sums: &mut [i32; CODES]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Feature::AvxVnni) {
        // SAFETY: the processor has it.
        return unsafe { crate::isa::run(avx_vnni::Words { codes, u, sums }) };
    }
    #[cfg(any(test, target_arch = "aarch64"))]
    if isa.has(Feature::DotProd) {
        // SAFETY: as above.
        return unsafe { neon::add_words(codes, u, sums) };
    }
    sums_of_words(isa, codes, u, sums);
}

per_isa! {
    /// See [`add_words`].
    fn sums_of_words(codes: &[Word], u: &[[i8; 4]], sums: &mut [i32; CODES]) {
        for (codes, u) in codes.iter().zip(u) {
            for (sum, codes) in sums.iter_mut().zip(codes) {
                for k in 0..4 {
                    *sum += i32::from(codes[k]) * i32::from(u[k]);
                }
            }
        }
    }
}

/// Sums of products of each row of a panel of codes with row j of x, a group after the other, each times its scale.
fn sums_of_groups(isa: Isa, codes: &[Word], x: &RoundedRows, j: usize) -> [f32; CODES] {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_bytes_in_512() {
        // SAFETY: the processor has it.
        return unsafe { vnni::sums_of_groups(codes, x, j) };
    }
    let mut sums = [0f32; CODES];
    for (group, codes) in codes.chunks(RoundedRows::WORDS).enumerate() {
        let ([first, second], scale) = x.group(j, group);
        let (low, high) = codes.split_at(codes.len().min(RoundedRows::WORDS / 2));
        let mut of_group = [0; CODES];
        add_words(isa, low, first, &mut of_group);
        add_words(isa, high, second, &mut of_group);
        for (sum, of_group) in sums.iter_mut().zip(of_group) {
            *sum += of_group as f32 * scale;
        }
    }
    sums
}

#[cfg(any(test, target_arch = "aarch64"))]
mod neon {
    use super::{CODES, Word, ZERO};
    use crate::neon::*;

    /// See [`super::add_words`]. Both sides have a sign here, so that codes become the whole numbers that they stand for, and what they were
    /// greater by is added at the end.
    ///
    /// # Safety
    /// The processor has `sdot`.
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon,dotprod"))]
    pub unsafe fn add_words(codes: &[Word], u: &[[i8; 4]], sums: &mut [i32; CODES]) {
        let (p, zero, ones) = (sums.as_mut_ptr(), vdupq_n_u32(0x8080_8080), vdupq_n_s8(1));
        // SAFETY: sixteen sums, and a word of all rows, are four vectors.
        unsafe {
            let mut of_rows = [0, 4, 8, 12].map(|row| vld1q_s32(p.add(row)));
            let mut total = vdupq_n_s32(0);
            for (codes, u) in codes.iter().zip(u) {
                let u = vreinterpretq_s8_u32(vdupq_n_u32(u32::from_le_bytes(u.map(|u| u as u8))));
                for (four, sums) in codes.as_chunks::<4>().0.iter().zip(&mut of_rows) {
                    let whole = vreinterpretq_s8_u32(veorq_u32(vld1q_u32(four.as_ptr().cast()), zero));
                    *sums = sdot(*sums, whole, u);
                }
                total = sdot(total, ones, u);
            }
            const { assert!(ZERO == 1 << 7) };
            for (row, sums) in of_rows.into_iter().enumerate() {
                vst1q_s32(p.add(4 * row), vaddq_s32(sums, vshlq_n_s32::<7>(total)));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx_vnni {
    use std::arch::x86_64::*;

    use super::{CODES, Word};
    use crate::isa::{Dpbusd, Run};

    /// See [`super::add_words`].
    pub struct Words<'a> {
        pub codes: &'a [Word],
        pub u: &'a [[i8; 4]],
        pub sums: &'a mut [i32; CODES],
    }

    impl Run for Words<'_> {
        type Out = ();

        #[inline(always)]
        unsafe fn run<D: Dpbusd>(self) {
            let Self { codes, u, sums } = self;
            let sums: *mut __m256i = sums.as_mut_ptr().cast();
            // SAFETY: sixteen sums, and a word of all rows, are twice 32 bytes; the caller has the instructions enabled.
            unsafe {
                let (mut low, mut high) = (_mm256_loadu_si256(sums), _mm256_loadu_si256(sums.add(1)));
                for (codes, u) in codes.iter().zip(u) {
                    let codes: *const __m256i = codes.as_ptr().cast();
                    let [a, b, c, d] = *u;
                    let u = _mm256_set1_epi32(i32::from_ne_bytes([a as u8, b as u8, c as u8, d as u8]));
                    low = D::dpbusd(low, _mm256_loadu_si256(codes), u);
                    high = D::dpbusd(high, _mm256_loadu_si256(codes.add(1)), u);
                }
                _mm256_storeu_si256(sums, low);
                _mm256_storeu_si256(sums.add(1), high);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{CODES, Rounded, RoundedRows, Word, codes};

    /// Adds the products of words of codes and of u.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add(mut sums: __m512i, codes: &[Word], u: &[[i8; 4]]) -> __m512i {
        for (codes, u) in codes.iter().zip(u) {
            // SAFETY: a word of all rows is 64 bytes.
            let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
            let [a, b, c, d] = *u;
            let u = i32::from_ne_bytes([a as u8, b as u8, c as u8, d as u8]);
            sums = _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(u));
        }
        sums
    }

    /// See [`super::add_codes`].
    #[target_feature(enable = "avx512f,avx512vnni,avx2")]
    pub fn add_codes(panel: &[u8], lane: usize, u: &Rounded, out: &mut [f32], m: usize) {
        let (scales, words) = codes(panel);
        let sums = add(_mm512_set1_epi32(u.start), words, &u.words);
        // SAFETY: sixteen scales are 32 bytes.
        let scales = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) });
        let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(scales));
        // Not fused, so that every processor comes to the same.
        let update = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(scales, _mm512_set1_ps(u.scale)));
        if m == 1 && out.len() == CODES {
            // SAFETY: sixteen values are 64 bytes.
            unsafe {
                let out = out.as_mut_ptr();
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), update));
            }
            return;
        }
        let mut of_rows = [0f32; CODES];
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(of_rows.as_mut_ptr(), update) };
        out.iter_mut().step_by(m).zip(&of_rows[lane..]).for_each(|(out, update)| *out += update);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn sums_of_groups(codes: &[Word], x: &RoundedRows, j: usize) -> [f32; CODES] {
        let mut sums = _mm512_setzero_ps();
        for (group, codes) in codes.chunks(RoundedRows::WORDS).enumerate() {
            let ([first, second], scale) = x.group(j, group);
            let (low, high) = codes.split_at(codes.len().min(RoundedRows::WORDS / 2));
            let of_group = add(add(_mm512_setzero_si512(), low, first), high, second);
            // Not fused, so that every processor comes to the same.
            let of_group = _mm512_mul_ps(_mm512_cvtepi32_ps(of_group), _mm512_set1_ps(scale));
            sums = _mm512_add_ps(sums, of_group);
        }
        let mut out = [0.0; CODES];
        // SAFETY: sixteen sums are 64 bytes.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }
}

/// Sums over a panel of floats, in two turns, so that an addition does not wait for the one before.
#[inline(always)]
fn sums(values: &[Values], u: impl Iterator<Item = f32>) -> [f32; SINGLES] {
    let (mut even, mut odd) = ([0f32; SINGLES], [0f32; SINGLES]);
    for (values, u) in values.iter().zip(u) {
        for ((even, odd), value) in even.iter_mut().zip(&mut odd).zip(values) {
            (*even, *odd) = (*odd, *even + f32::from_ne_bytes(*value) * u);
        }
    }
    std::array::from_fn(|lane| even[lane] + odd[lane])
}

per_isa! {
    /// See [`Panels::add`], for the rows `rows` of a panel.
    fn add_singles(u: &[f32], m: usize, values: &[Values], rows: Range<usize>, out: &mut [f32]) {
        if m == 1 && out.len() == SINGLES {
            let sums = sums(values, u.iter().copied());
            for (out, sum) in out.iter_mut().zip(sums) {
                *out += sum;
            }
            return;
        }
        for j in 0..m {
            let sums = sums(values, u[j..].iter().step_by(m).copied());
            for (out, row) in out.chunks_exact_mut(m).zip(rows.clone()) {
                out[j] += sums[row % SINGLES];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FewRows;
    use super::super::tests::{isas, padded, random};
    use super::*;
    use crate::Stream;
    use crate::isa::with_isa;

    fn laid_out(values: &[f32], panels: Panels) -> Vec<u8> {
        let mut bytes = vec![0; panels.bytes()];
        panels.write(values, &mut bytes);
        bytes
    }

    /// What whole numbers of eight bits may be off by in a sum of products, on both sides.
    fn rounding(values: &[f32], others: &[f32]) -> f64 {
        let most = |values: &[f32]| f64::from(values.iter().fold(0f32, |most, value| most.max(value.abs())));
        let sum = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).sum::<f64>();
        let (a, b) = (most(values) / 254.0, most(others) / 254.0);
        a * sum(others) + b * sum(values) + a * b * values.len() as f64
    }

    fn dot(a: &[f32], b: &[f32]) -> (f64, f64) {
        let products = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        (products().sum(), products().map(f64::abs).sum())
    }

    #[test]
    fn an_update_is_added_to_any_rows_on_every_processor() {
        let (n, m) = (37, 5);
        for (r, eight_bits) in [1, 8, 16, 33, 70].into_iter().flat_map(|r| [(r, false), (r, true)]) {
            let mut stream = Stream::new(4, 1);
            let (u, b, before) = (random(&mut stream, m * r), random(&mut stream, n * r), random(&mut stream, n * m));
            let panels = Panels::new(n, r, eight_bits);
            let bytes = laid_out(&b, panels);
            let all = isas().map(|isa| {
                let mut out = before.clone();
                with_isa(isa, || panels.add(&bytes, &u, m, 0..n, &mut out));
                out
            });
            let all: Vec<Vec<f32>> = all.collect();
            assert!(all.iter().all(|one| *one == all[0]), "rank {r}");
            for (row, j) in (0..n).flat_map(|row| (0..m).map(move |j| (row, j))) {
                let got = all[0][row * m + j];
                let alone: Vec<f32> = (0..r).map(|k| u[k * m + j]).collect();
                let mut out = [before[row * m + j]];
                panels.add(&bytes, &alone, 1, row..row + 1, &mut out);
                assert_eq!(out, [got], "rank {r}: alone");
                let b = &b[row * r..(row + 1) * r];
                let (product, size) = dot(b, &alone);
                let bound = if eight_bits { rounding(b, &alone) } else { 0.0 } + (size + 3.0) * 1e-6;
                let error = (f64::from(got) - f64::from(before[row * m + j]) - product).abs();
                assert!(error <= bound, "rank {r}, in eight bits: {eight_bits}: off by {error:e}");
            }
        }
    }

    #[test]
    fn rows_in_eight_bits_are_multiplied_on_every_processor() {
        let (n, m) = (21, 5);
        for k in [32, 36, 576] {
            let mut stream = Stream::new(5, 1);
            let (w, x) = (random(&mut stream, n * k), random(&mut stream, m * k));
            let panels = Panels::new(n, k, true);
            let (bytes, padded) = (laid_out(&w, panels), padded(&x, m, k));
            let product = |rows: Range<usize>, of: Range<usize>| {
                let step = FewRows::padded(k);
                let few = FewRows { values: &padded[of.start * step..of.end * step], step, rounded: None };
                let mut out = vec![0.0; rows.len() * of.len()];
                panels.product(&bytes, &RoundedRows::new(few), rows, &mut out);
                out
            };
            let all: Vec<Vec<f32>> = isas().map(|isa| with_isa(isa, || product(0..n, 0..m))).collect();
            assert!(all.iter().all(|one| *one == all[0]), "{k} columns");
            for (row, j) in (0..n).flat_map(|row| (0..m).map(move |j| (row, j))) {
                let got = all[0][row * m + j];
                assert_eq!(product(row..row + 1, j..j + 1), [got], "{k} columns: alone");
                let (w, x) = (&w[row * k..(row + 1) * k], &x[j * k..(j + 1) * k]);
                let (product, size) = dot(w, x);
                let error = (f64::from(got) - product).abs();
                assert!(error <= rounding(w, x) + size * 1e-5, "{k} columns: off by {error:e}");
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_yields_no_number() {
        let panels = Panels::new(2, 2, true);
        let bytes = laid_out(&[1.0, f32::INFINITY, 2.0, 3.0], panels);
        let added = |u: [f32; 2]| {
            let mut out = [0.0; 2];
            panels.add(&bytes, &u, 1, 0..2, &mut out);
            out
        };
        let [a, b] = added([1.0, 1.0]);
        assert!(a.is_nan() && (b - 5.0).abs() < 0.03);
        assert!(added([1.0, f32::NAN]).iter().all(|sum| sum.is_nan()));
    }

    #[test]
    #[should_panic(expected = "1..3 of 2 x 16 for 1 rows")]
    fn rows_that_there_are_not_are_refused() {
        let panels = Panels::new(2, 16, false);
        panels.add(&laid_out(&[0.0; 32], panels), &[0.0; 16], 1, 1..3, &mut [0.0; 2]);
    }
}
