//! The product for a few rows of x, as in generation, where the matrix product's packing of W would cost more than the
//! product: 16 dot products at once, each summed in the order in which the `gemm` crate's kernels sum.
//!
//! A lane holds one row of W, so W is transposed in registers, 8 rows by 4 columns at a time.

/// Rows of W that are multiplied together: two vectors, whose sums hide each other's latency.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 16;

/// Whether [`dot_rows`] works here: whether the processor has what the order of `gemm` asks for (AVX2 and FMA).
pub(crate) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `y[r] = x . w[r]`, for rows w of `x.len()` values, summing steps of `step` from zero and then the steps.
///
/// # Panics
/// When the sizes disagree or it is not [`available`].
pub(crate) fn dot_rows(x: &[f32], w: &[f32], step: usize, y: &mut [f32]) {
    assert_eq!(w.len(), x.len() * y.len(), "rows of W for {} results", y.len());
    assert!(available(), "the product of few rows asks for AVX2 and FMA");
    #[cfg(target_arch = "x86_64")]
    for (w, y) in w.chunks(ROWS * x.len()).zip(y.chunks_mut(ROWS)) {
        // SAFETY: the processor has AVX2 and FMA, as just asserted; nothing else is required of the caller.
        unsafe { dot_panel(x, w, step, y) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = step;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_panel(x: &[f32], w: &[f32], step: usize, y: &mut [f32]) {
    use std::arch::x86_64::*;
    let cols = x.len();
    // Missing rows of the last panel repeat its last row.
    let rows: [&[f32]; ROWS] = std::array::from_fn(|r| {
        let r = r.min(y.len() - 1);
        &w[r * cols..(r + 1) * cols]
    });
    for from in (0..cols).step_by(step) {
        let to = cols.min(from + step);
        let mut sums = [_mm256_setzero_ps(); ROWS / 8];
        let (fours, tail) = x[from..to].as_chunks::<4>();
        for (k, x) in fours.iter().enumerate() {
            for (sum, rows) in sums.iter_mut().zip(rows.as_chunks::<8>().0) {
                let four = |r: usize| {
                    let four: &[f32; 4] = rows[r][from + 4 * k..to].first_chunk().expect("rows are as long as x");
                    // SAFETY: `four` is four values.
                    unsafe { _mm_loadu_ps(four.as_ptr()) }
                };
                // Columns k of the tile, for rows (0 to 3 | 4 to 7) in the two halves of a vector.
                let row = |r: usize| _mm256_set_m128(four(r + 4), four(r));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                let columns = [
                    _mm256_shuffle_ps::<0b01_00_01_00>(a, c),
                    _mm256_shuffle_ps::<0b11_10_11_10>(a, c),
                    _mm256_shuffle_ps::<0b01_00_01_00>(b, d),
                    _mm256_shuffle_ps::<0b11_10_11_10>(b, d),
                ];
                for (x, column) in x.iter().zip(columns) {
                    *sum = _mm256_fmadd_ps(column, _mm256_set1_ps(*x), *sum);
                }
            }
        }
        let mut out = [[0f32; 8]; ROWS / 8];
        for (out, sum) in out.iter_mut().zip(sums) {
            // SAFETY: `out` is eight values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
        for (r, (y, out)) in y.iter_mut().zip(out.as_flattened()).enumerate() {
            let mut sum = *out;
            for (x, w) in tail.iter().zip(&rows[r][to - tail.len()..to]) {
                sum = w.mul_add(*x, sum);
            }
            *y = if from == 0 { sum } else { *y + sum };
        }
    }
}
