//! Indices back to values, in f32 or rounded to bf16: what a product's panels are packed from.

use std::ops::Range;

use half::bf16;

use super::Coded;
use crate::element::{Element, LANES};
#[cfg(target_arch = "x86_64")]
use crate::isa::F32Unit;
use crate::isa::{Isa, per_isa};
use crate::prefetch::{ROWS_AHEAD, prefetch};
use crate::tile::PANEL;

impl Coded<'_> {
    /// Decodes values of row `row`; see [`Self::decode_rows`].
    pub(crate) fn decode<E: CodeElement>(&self, isa: Isa, row: usize, cols: Range<usize>, out: &mut [E]) {
        self.decode_rows(isa, row..row + 1, cols, out);
    }

    /// Decodes `rows` x `cols`: value = code[index] · scale in f32, rounded to the nearest E.
    ///
    /// An index beyond the end of the code book stands for its last level.
    ///
    /// # Panics
    /// When they lie outside the matrix or `out` has another length.
    pub(crate) fn decode_rows<E: CodeElement>(&self, isa: Isa, rows: Range<usize>, cols: Range<usize>, out: &mut [E]) {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "{cols:?} of {rows:?}");
        assert_eq!(out.len(), rows.len() * cols.len(), "{cols:?} of {rows:?}");
        if out.is_empty() {
            return;
        }
        if self.codec.bits == 4 {
            return E::nibbles(isa, self, &self.levels(), (rows, cols), out);
        }
        let table = if self.linear { [0.0; 256] } else { self.levels() };
        for (scale, block, out) in self.blocks((rows, cols), out) {
            if self.linear {
                linear(isa, &self.codes[block], scale, out);
            } else {
                looked_up(isa, &self.codes[block], &table, scale, out);
            }
        }
    }

    /// Whether values are eight bits on a straight line, with a scale for each row.
    pub(crate) fn has_linear_rows(&self) -> bool {
        self.codec.bits == 8 && self.linear && self.block_len() == self.cols
    }

    /// The code book, if indices are of four bits.
    pub(crate) fn levels_of_four_bits(&self) -> Option<[f32; 16]> {
        (self.codec.bits == 4).then(|| self.levels())
    }

    /// How a row is decoded in registers; `None` where blocks or rows do not end where lanes do.
    pub(crate) fn fused(&self) -> Option<Fused> {
        let len = self.block_len();
        let whole = self.cols.is_multiple_of(len) && len.is_multiple_of(LANES);
        match self.codec.bits {
            4 if whole => Some(Fused::Nibbles(self.levels())),
            8 if whole && self.has_linear_rows() => Some(Fused::Linear),
            _ => None,
        }
    }

    /// The code book, its last value repeated.
    fn levels<const N: usize>(&self) -> [f32; N] {
        let code = &self.codec.code;
        let mut table = [*code.last().expect("a code book has values"); N];
        table[..code.len()].copy_from_slice(code);
        table
    }

    /// The blocks that some columns of some rows touch, in order.
    #[inline(always)]
    fn blocks<'o, E>(&self, (rows, cols): Part, out: &'o mut [E]) -> Blocks<'_, 'o, E> {
        let len = self.codec.block_len(self.cols);
        let start = rows.start * self.cols + cols.start;
        let range = start..start + cols.len();
        Blocks { coded: self, len, width: cols.len(), block: range.start / len, range, out }
    }
}

/// See [`Coded::fused`].
pub(crate) enum Fused {
    /// Four bits a value, by these levels.
    Nibbles([f32; 16]),
    /// Eight bits a value on a straight line, a scale for each row.
    Linear,
}

/// Rows and columns.
type Part = (Range<usize>, Range<usize>);

/// See [`Coded::blocks`]. Yields the scale of a block, its values (their numbers in the matrix) and where they go.
struct Blocks<'a, 'o, E> {
    coded: &'a Coded<'a>,
    len: usize,
    /// Columns.
    width: usize,
    block: usize,
    /// What is left of the present row.
    range: Range<usize>,
    out: &'o mut [E],
}

impl<'o, E> Iterator for Blocks<'_, 'o, E> {
    type Item = (f32, Range<usize>, &'o mut [E]);

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.out.is_empty() {
            return None;
        }
        if self.range.is_empty() {
            let start = self.range.end - self.width + self.coded.cols;
            self.range = start..start + self.width;
            self.block = start / self.len;
            let bytes = |values: usize| values * usize::from(self.coded.codec.bits) / 8;
            // Whole rows, and long pieces of them, the processor foresees.
            if self.width <= PANEL && self.width < self.coded.cols {
                prefetch(self.coded.codes, bytes(start + ROWS_AHEAD * self.coded.cols), bytes(self.width));
            }
        }
        let Range { start, end } = self.range;
        let scale = self.coded.scale(self.block);
        self.block += 1;
        let stop = end.min(self.block * self.len);
        let (now, rest) = std::mem::take(&mut self.out).split_at_mut(stop - start);
        (self.out, self.range.start) = (rest, stop);
        Some((scale, start..stop, now))
    }
}

per_isa! {
    /// `(index - 127) · scale / 127`, multiplied in the order in which bitsandbytes does.
    fn linear<E: Element>(codes: &[u8], scale: f32, out: &mut [E]) {
        for (value, code) in out.iter_mut().zip(codes) {
            *value = E::of((i32::from((*code).min(254)) - 127) as f32 * scale * (1.0 / 127.0));
        }
    }
}

per_isa! {
    fn looked_up<E: Element>(codes: &[u8], table: &[f32; 256], scale: f32, out: &mut [E]) {
        // Loads one by one, then products and rounding in vectors.
        let (chunks, rest) = codes.as_chunks::<16>();
        let (outs, out_rest) = out.as_chunks_mut::<16>();
        for (codes, out) in chunks.iter().zip(outs) {
            let levels = codes.map(|index| table[usize::from(index)]);
            for (value, level) in out.iter_mut().zip(levels) {
                *value = E::of(level * scale);
            }
        }
        for (value, index) in out_rest.iter_mut().zip(rest) {
            *value = E::of(table[usize::from(*index)] * scale);
        }
    }
}

/// An element type that 4-bit indices are decoded to.
pub(crate) trait CodeElement: Element {
    /// Decodes some columns of some rows.
    fn nibbles(isa: Isa, coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [Self]);
}

impl CodeElement for f32 {
    fn nibbles(isa: Isa, coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [f32]) {
        match isa.f32_unit() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a set in use is never more than the processor has.
            F32Unit::Avx512 => unsafe { avx512::nibbles_f32(coded, levels, part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            F32Unit::Avx2 => unsafe { avx2::nibbles_f32(coded, levels, part, out) },
            _ => plain(coded, levels, part, out),
        }
    }
}

impl CodeElement for bf16 {
    fn nibbles(isa: Isa, coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [bf16]) {
        match isa.f32_unit() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a set in use is never more than the processor has.
            F32Unit::Avx512 => unsafe { avx512::nibbles_bf16(coded, levels, part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            F32Unit::Avx2 => unsafe { avx2::nibbles_bf16(coded, levels, part, out) },
            _ => plain(coded, levels, part, out),
        }
    }
}

/// The form that every processor has.
fn plain<E: Element>(coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [E]) {
    for (scale, block, out) in coded.blocks(part, out) {
        block_of_nibbles(coded.codes, block, levels, scale, out);
    }
}

/// Decodes one block: sixteen products, then lookups.
#[inline(always)]
fn block_of_nibbles<E: Element>(codes: &[u8], block: Range<usize>, levels: &[f32; 16], scale: f32, out: &mut [E]) {
    let table = levels.map(|level| E::of(level * scale));
    let (mut at, mut out) = (block.start, out);
    if !at.is_multiple_of(2) {
        // Begins with the lower half of a byte.
        let Some((first, rest)) = out.split_first_mut() else { return };
        *first = table[usize::from(codes[at / 2] & 15)];
        (at, out) = (at + 1, rest);
    }
    let (pairs, last) = out.as_chunks_mut::<2>();
    let bytes = &codes[at / 2..][..pairs.len()];
    for (out, byte) in pairs.iter_mut().zip(bytes) {
        *out = [byte >> 4, byte & 15].map(|index| table[usize::from(index)]);
    }
    if let [last] = last {
        *last = table[usize::from(codes[at / 2 + pairs.len()] >> 4)];
    }
}

/// What the forms for one processor share: cuts the block that it gets into groups of `N` values that start on a byte, hands
/// these to `whole`, and decodes what is left at its ends as [`plain`] does.
#[cfg(target_arch = "x86_64")]
macro_rules! by_groups {
    ($n:literal, $codes:expr, $block:expr, $levels:expr, $scale:expr, $out:expr, $whole:expr) => {{
        let (block, out) = ($block, $out);
        let first = (block.start % 2).min(out.len());
        // Rounding by integers would carry a NaN over to zero.
        let groups = if $scale.is_finite() { (out.len() - first) / $n } else { 0 };
        let (head, rest) = out.split_at_mut(first);
        let (body, tail) = rest.split_at_mut(groups * $n);
        let at = block.start + first;
        if !head.is_empty() {
            super::block_of_nibbles($codes, block.start..at, $levels, $scale, head);
        }
        if groups > 0 {
            let bytes = &$codes[at / 2..][..groups * ($n / 2)];
            $whole(bytes.as_chunks::<{ $n / 2 }>().0, body.as_chunks_mut::<$n>().0);
        }
        if !tail.is_empty() {
            super::block_of_nibbles($codes, at + groups * $n..block.end, $levels, $scale, tail);
        }
    }};
}

/// With AVX-512 a register holds a whole code book, twice over in bf16.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Coded, Part};

    /// See [`super::CodeElement::nibbles`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub fn nibbles_f32(coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [f32]) {
        // SAFETY: `levels` is 16 values.
        let all = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
        let codes = coded.codes;
        for (scale, block, out) in coded.blocks(part, out) {
            let table = _mm512_mul_ps(all, _mm512_set1_ps(scale));
            by_groups!(16, codes, block, levels, scale, out, |bytes: &[[u8; 8]], out: &mut [[f32; 16]]| {
                for (bytes, out) in bytes.iter().zip(out) {
                    let bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes)));
                    // A byte's upper half goes to the lower of two words. A lookup takes the low four bits of each.
                    let pairs = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
                    // SAFETY: `out` is 16 values.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(pairs, table)) };
                }
            });
        }
    }

    /// See [`super::CodeElement::nibbles`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub fn nibbles_bf16(coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [bf16]) {
        // SAFETY: `levels` is 16 values.
        let all = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
        let codes = coded.codes;
        for (scale, block, out) in coded.blocks(part, out) {
            let bits = _mm512_castps_si512(_mm512_mul_ps(all, _mm512_set1_ps(scale)));
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
            let table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
            by_groups!(32, codes, block, levels, scale, out, |bytes: &[[u8; 16]], out: &mut [[bf16; 32]]| {
                for (bytes, out) in bytes.iter().zip(out) {
                    // SAFETY: `bytes` is 16 bytes.
                    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
                    // A byte's upper half goes to the lower of two halves of a word. A lookup takes the low five bits of
                    // each, and the table does not mind the fifth.
                    let pairs = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
                    // SAFETY: `out` is 32 values of two bytes.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(pairs, table)) };
                }
            });
        }
    }
}

/// With AVX2 a register holds half a code book of f32; of bf16, the upper or the lower bytes of all of it.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Coded, Part};

    #[inline]
    #[target_feature(enable = "avx2")]
    fn halves(levels: &[f32; 16]) -> (__m256, __m256) {
        // SAFETY: `levels` is 16 values.
        unsafe { (_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels.as_ptr().add(8))) }
    }

    /// See [`super::CodeElement::nibbles`].
    #[target_feature(enable = "avx2")]
    pub fn nibbles_f32(coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [f32]) {
        let (low, high) = halves(levels);
        let codes = coded.codes;
        // Where in a word of four bytes the eight indices lie.
        let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        for (scale, block, out) in coded.blocks(part, out) {
            let scales = _mm256_set1_ps(scale);
            let (low, high) = (_mm256_mul_ps(low, scales), _mm256_mul_ps(high, scales));
            by_groups!(8, codes, block, levels, scale, out, |bytes: &[[u8; 4]], out: &mut [[f32; 8]]| {
                for (bytes, out) in bytes.iter().zip(out) {
                    let indices = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*bytes)), shifts);
                    // A lookup takes the low three bits; the fourth, moved to the sign, chooses between the two.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
                    let values = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, indices),
                        _mm256_permutevar8x32_ps(high, indices),
                        upper,
                    );
                    // SAFETY: `out` is eight values.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
                }
            });
        }
    }

    /// Bits of finite values as bf16, to the nearest, ties to even, in the lower halves of words.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn rounded(values: __m256) -> __m256i {
        let bits = _mm256_castps_si256(values);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))))
    }

    /// See [`super::CodeElement::nibbles`].
    #[target_feature(enable = "avx2")]
    pub fn nibbles_bf16(coded: &Coded, levels: &[f32; 16], part: Part, out: &mut [bf16]) {
        let (low, high) = halves(levels);
        let codes = coded.codes;
        let byte = _mm256_set1_epi16(0xFF);
        for (scale, block, out) in coded.blocks(part, out) {
            let scales = _mm256_set1_ps(scale);
            let (low, high) = (rounded(_mm256_mul_ps(low, scales)), rounded(_mm256_mul_ps(high, scales)));
            // Packing works within halves of a register: 0-3 8-11 4-7 12-15, put in order after.
            let table = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
            // The lower bytes of all sixteen, then the upper, each in both halves of a register.
            let bytes = _mm256_packus_epi16(_mm256_and_si256(table, byte), _mm256_srli_epi16::<8>(table));
            let lower = _mm256_permute4x64_epi64::<0b10_00_10_00>(bytes);
            let upper = _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes);
            by_groups!(32, codes, block, levels, scale, out, |bytes: &[[u8; 16]], out: &mut [[bf16; 32]]| {
                for (bytes, out) in bytes.iter().zip(out) {
                    // SAFETY: `bytes` is 16 bytes.
                    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
                    let first = _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15));
                    let second = _mm_and_si128(bytes, _mm_set1_epi8(15));
                    // Indices 0-7 and 16-23 lie in the lower halves, the others in the upper, so that unpacking yields 0-7
                    // beside 8-15.
                    let indices = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
                    let indices = _mm256_permute4x64_epi64::<0b11_01_10_00>(indices);
                    let (lower, upper) = (_mm256_shuffle_epi8(lower, indices), _mm256_shuffle_epi8(upper, indices));
                    // SAFETY: `out` is 32 values of two bytes.
                    unsafe {
                        let out = out.as_mut_ptr().cast::<__m256i>();
                        _mm256_storeu_si256(out, _mm256_unpacklo_epi8(lower, upper));
                        _mm256_storeu_si256(out.add(1), _mm256_unpackhi_epi8(lower, upper));
                    }
                }
            });
        }
    }
}
