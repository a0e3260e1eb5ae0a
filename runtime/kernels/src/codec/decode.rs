//! Indices back to values, in f32 or rounded to bf16: what a product's panels are packed from.

use std::ops::Range;

use half::bf16;

use super::Coded;
use crate::cpu::{Cpu, per_cpu};
use crate::element::Element;

impl Coded<'_> {
    /// Decodes values of row `row`: value = code[index] · scale in f32, rounded to the nearest E.
    ///
    /// # Panics
    /// When they lie outside the matrix or `out` has another length.
    pub(crate) fn decode<E: CodeElement>(&self, cpu: Cpu, row: usize, cols: Range<usize>, out: &mut [E]) {
        assert!(row < self.rows && cols.end <= self.cols && out.len() == cols.len(), "{cols:?} of row {row}");
        let block_len = self.codec.block_len(self.cols);
        let (mut at, end) = (row * self.cols + cols.start, row * self.cols + cols.end);
        let mut out = out;
        while at < end {
            let block = at / block_len;
            let stop = end.min((block + 1) * block_len);
            let (now, rest) = out.split_at_mut(stop - at);
            let scale = self.scale(block);
            if self.codec.bits == 4 {
                self.nibbles(cpu, at, scale, now);
            } else if self.linear {
                linear(cpu, &self.encoded.codes[at..stop], scale, now);
            } else {
                for (value, index) in now.iter_mut().zip(&self.encoded.codes[at..stop]) {
                    *value = E::of(self.level(*index) * scale);
                }
            }
            (out, at) = (rest, stop);
        }
    }

    /// The code book's value of an index; one beyond its end is its last.
    fn level(&self, index: u8) -> f32 {
        self.codec.code[usize::from(index).min(self.codec.code.len() - 1)]
    }

    /// Values from number `at` on, 4 bits each.
    fn nibbles<E: CodeElement>(&self, cpu: Cpu, at: usize, scale: f32, out: &mut [E]) {
        let codes = &self.encoded.codes;
        let last = *self.codec.code.last().expect("a code book has values");
        let mut table = [last; 16];
        table[..self.codec.code.len()].copy_from_slice(&self.codec.code);
        let mut out = out;
        let mut at = at;
        if at % 2 == 1 {
            // Begins with the lower half of a byte.
            let (first, rest) = out.split_at_mut(1);
            first[0] = E::of(table[usize::from(codes[at / 2] & 15)] * scale);
            (out, at) = (rest, at + 1);
        }
        let pairs = out.len() / 2;
        let bytes = &codes[at / 2..][..pairs];
        let (whole, rest) = out.split_at_mut(2 * pairs);
        E::pairs(cpu, bytes, &table, scale, whole);
        if let [value] = rest {
            *value = E::of(table[usize::from(codes[at / 2 + pairs] >> 4)] * scale);
        }
    }
}

per_cpu! {
    /// `(index - 127) · scale / 127`, multiplied in the order in which bitsandbytes does.
    fn linear<E: Element>(codes: &[u8], scale: f32, out: &mut [E]) {
        for (value, code) in out.iter_mut().zip(codes) {
            *value = E::of((i32::from(*code) - 127) as f32 * scale * (1.0 / 127.0));
        }
    }
}

/// An element type that pairs of 4-bit indices are decoded to.
pub(crate) trait CodeElement: Element {
    /// Two values for each byte, the upper half first.
    fn pairs(cpu: Cpu, bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [Self]);
}

/// The form that every processor has.
fn pairs<E: Element>(bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [E]) {
    for (byte, out) in bytes.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = [byte >> 4, byte & 15].map(|index| E::of(table[usize::from(index)] * scale));
    }
}

impl CodeElement for f32 {
    fn pairs(cpu: Cpu, bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) {
        let done = match cpu {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Cpu` is never more than the processor has.
            Cpu::Avx512 | Cpu::Avx512Bf16 => unsafe { x86::pairs_f32(bytes, table, scale, out) },
            _ => 0,
        };
        pairs(&bytes[done..], table, scale, &mut out[2 * done..]);
    }
}

impl CodeElement for bf16 {
    fn pairs(cpu: Cpu, bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [bf16]) {
        let done = match cpu {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Cpu` is never more than the processor has.
            Cpu::Avx512 | Cpu::Avx512Bf16 => unsafe { x86::pairs_bf16(bytes, table, scale, out) },
            _ => 0,
        };
        pairs(&bytes[done..], table, scale, &mut out[2 * done..]);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    /// Levels of the upper and the lower halves of 16 bytes, times the scale.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn levels(bytes: &[u8; 16], table: __m512, scale: __m512) -> (__m512, __m512) {
        // SAFETY: `bytes` is 16 bytes.
        let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
        // The lookup takes the low four bits of each lane.
        let upper = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table);
        let lower = _mm512_permutexvar_ps(bytes, table);
        (_mm512_mul_ps(upper, scale), _mm512_mul_ps(lower, scale))
    }

    /// See [`super::CodeElement::pairs`]; returns how many bytes were decoded.
    #[target_feature(enable = "avx512f")]
    pub fn pairs_f32(bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) -> usize {
        // SAFETY: `table` is 16 values.
        let (table, scale) = (unsafe { _mm512_loadu_ps(table.as_ptr()) }, _mm512_set1_ps(scale));
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        let chunks = bytes.as_chunks::<16>().0;
        for (bytes, out) in chunks.iter().zip(out.as_chunks_mut::<32>().0) {
            let (upper, lower) = levels(bytes, table, scale);
            // SAFETY: `out` is 32 values.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(upper, first, lower));
                _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(upper, second, lower));
            }
        }
        16 * chunks.len()
    }

    /// See [`super::CodeElement::pairs`]; returns how many bytes were decoded.
    #[target_feature(enable = "avx512f")]
    pub fn pairs_bf16(bytes: &[u8], table: &[f32; 16], scale: f32, out: &mut [bf16]) -> usize {
        // SAFETY: `table` is 16 values.
        let (table, scale) = (unsafe { _mm512_loadu_ps(table.as_ptr()) }, _mm512_set1_ps(scale));
        let chunks = bytes.as_chunks::<16>().0;
        for (bytes, out) in chunks.iter().zip(out.as_chunks_mut::<32>().0) {
            let (upper, lower) = levels(bytes, table, scale);
            // A pair is one word: the upper half of the byte, which comes first, in the lower half of the word.
            let upper = _mm512_srli_epi32::<16>(rounded(upper));
            let lower = _mm512_and_si512(rounded(lower), _mm512_set1_epi32(0xFFFF_0000_u32 as i32));
            // SAFETY: `out` is 32 values of two bytes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(upper, lower)) };
        }
        16 * chunks.len()
    }

    /// Bits of finite values after rounding to the nearest bf16, ties to even; the lower half is left as it falls.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn rounded(values: __m512) -> __m512i {
        let bits = _mm512_castps_si512(values);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)))
    }
}
