//! Which of sixteen levels a value is nearest to, by bisection: four comparisons with borders that are looked up in registers, where
//! counting the borders below takes fifteen. Both find the same, since borders are in ascending order.

use std::arch::x86_64::*;

/// The borders between sixteen levels, ascending, infinite where there are fewer: of what is left the one in the middle, the next ones by
/// the number of levels below it that is known so far.
#[derive(Clone, Copy)]
pub(super) struct Avx512 {
    middle: __m512,
    quarters: __m512,
    eighths: __m512,
    last: __m512,
}

impl Avx512 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    pub fn new(borders: &[f32; 15]) -> Self {
        let load = |ahead: usize| {
            let table: [f32; 16] =
                std::array::from_fn(|below| borders.get(below + ahead).copied().unwrap_or(f32::INFINITY));
            // SAFETY: a table has 16 values.
            unsafe { _mm512_loadu_ps(table.as_ptr()) }
        };
        Self { middle: _mm512_set1_ps(borders[7]), quarters: load(3), eighths: load(1), last: load(0) }
    }

    /// Sixteen numbers of levels, as bytes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn indices(self, scaled: __m512) -> __m128i {
        let above = |border| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, border);
        let more = |index, mask, by| _mm512_mask_add_epi32(index, mask, index, _mm512_set1_epi32(by));
        let index = _mm512_maskz_mov_epi32(above(self.middle), _mm512_set1_epi32(8));
        let index = more(index, above(_mm512_permutexvar_ps(index, self.quarters)), 4);
        let index = more(index, above(_mm512_permutexvar_ps(index, self.eighths)), 2);
        let index = more(index, above(_mm512_permutexvar_ps(index, self.last)), 1);
        _mm512_cvtepi32_epi8(index)
    }

    /// Indices of `values · factor`, the first of two in the upper half of their byte.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    pub fn nibbles(self, values: &[f32; 64], factor: f32, codes: &mut [u8; 32]) {
        let (parts, factor) = (values.as_chunks::<16>().0, _mm512_set1_ps(factor));
        // SAFETY: a part has 16 values.
        let part = |number: usize| {
            // SAFETY: a part is as many values as a vector.
            let values = unsafe { _mm512_loadu_ps(parts[number].as_ptr()) };
            self.indices(_mm512_mul_ps(values, factor))
        };
        let (low, high) = (_mm256_set_m128i(part(1), part(0)), _mm256_set_m128i(part(3), part(2)));
        let pairs = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
        // A pair is a word whose lower byte is the first.
        let joined = _mm512_or_si512(_mm512_slli_epi16::<4>(pairs), _mm512_srli_epi16::<8>(pairs));
        // SAFETY: 32 bytes are written.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), _mm512_cvtepi16_epi8(joined)) };
    }
}

/// As [`Avx512`], where a register has half of the borders: tables go by what was decided, and not by levels below.
#[derive(Clone, Copy)]
pub(super) struct Avx2 {
    middle: __m256,
    quarters: [__m256; 2],
    eighths: __m256,
    last: __m256,
}

impl Avx2 {
    #[target_feature(enable = "avx2")]
    #[inline]
    pub fn new(borders: &[f32; 15]) -> Self {
        let eighths: [f32; 8] = std::array::from_fn(|decided| borders[decided % 4 * 4 + 1]);
        let last: [f32; 8] = std::array::from_fn(|decided| borders[decided * 2]);
        // SAFETY: a table has 8 values.
        let load = |table: &[f32; 8]| unsafe { _mm256_loadu_ps(table.as_ptr()) };
        Self {
            middle: _mm256_set1_ps(borders[7]),
            quarters: [_mm256_set1_ps(borders[3]), _mm256_set1_ps(borders[11])],
            eighths: load(&eighths),
            last: load(&last),
        }
    }

    /// Eight numbers of levels.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn indices(self, scaled: __m256) -> __m256i {
        let above = |border| _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, border);
        // True is -1.
        let with = |index, mask| _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(mask));
        let upper = above(self.middle);
        let quarter = above(_mm256_blendv_ps(self.quarters[0], self.quarters[1], upper));
        let index = with(with(_mm256_setzero_si256(), upper), quarter);
        let index = with(index, above(_mm256_permutevar_ps(self.eighths, index)));
        with(index, above(_mm256_permutevar8x32_ps(self.last, index)))
    }

    /// Indices of `values · factor`, the first of two in the upper half of their byte.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub fn nibbles(self, values: &[f32; 64], factor: f32, codes: &mut [u8; 32]) {
        let (parts, factor) = (values.as_chunks::<8>().0, _mm256_set1_ps(factor));
        // SAFETY: a part has 8 values.
        let part = |number: usize| {
            // SAFETY: a part is as many values as a vector.
            let values = unsafe { _mm256_loadu_ps(parts[number].as_ptr()) };
            self.indices(_mm256_mul_ps(values, factor))
        };
        // Packing takes each half of a register by itself: the quarters are put in order behind it.
        let in_order = |packed| _mm256_permute4x64_epi64::<0xD8>(packed);
        let words = |number: usize| in_order(_mm256_packus_epi32(part(number), part(number + 1)));
        let joined = |number: usize| {
            let pairs = in_order(_mm256_packus_epi16(words(number), words(number + 2)));
            let joined = _mm256_or_si256(_mm256_slli_epi16::<4>(pairs), _mm256_srli_epi16::<8>(pairs));
            _mm256_and_si256(joined, _mm256_set1_epi16(0xFF))
        };
        let bytes = in_order(_mm256_packus_epi16(joined(0), joined(4)));
        // SAFETY: 32 bytes are written.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), bytes) };
    }
}
