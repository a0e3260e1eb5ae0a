//! Stored rows to floats: the one place that knows what the bytes of a weight mean.
//!
//! The layouts are those of `ggml-common.h`; each value is computed by the same f32 operations in the same order as in
//! `dequantize_row_*` of `ggml-quants.c`, so results are equal bit by bit. Rust never contracts `a * b + c` to a fused
//! operation by itself, which is what keeps it so.
//!
//! One block is decoded by one fixed-size loop nest without branches. That portable code is compiled twice on x86-64:
//! for the baseline and for AVX2, chosen at run time.

use super::format::Storage;

/// Decodes `out.len()` values, a whole number of blocks, from `bytes` (little-endian, of any alignment).
///
/// # Panics
/// When `bytes` is not `storage.row_bytes(out.len())` long.
pub fn decode_row(storage: Storage, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(storage.row_bytes(out.len()), Some(bytes.len()), "{storage:?}: bytes for {} values", out.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as just asked; nothing else is required of the caller.
        return unsafe { decode_avx2(storage, bytes, out) };
    }
    decode(storage, bytes, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_avx2(storage: Storage, bytes: &[u8], out: &mut [f32]) {
    decode(storage, bytes, out);
}

#[inline(always)]
fn decode(storage: Storage, bytes: &[u8], out: &mut [f32]) {
    match storage {
        Storage::F32 => each(bytes, out, |b, [y]| *y = f32::from_le_bytes(*b)),
        Storage::F16 => each(bytes, out, |&[low, high], [y]| *y = f16(low, high)),
        Storage::BF16 => each(bytes, out, |&[low, high], [y]| {
            *y = f32::from_le_bytes([0, 0, low, high]);
        }),
        Storage::Q4_0 => each(bytes, out, q4_0),
        Storage::Q4_1 => each(bytes, out, q4_1),
        Storage::Q5_0 => each(bytes, out, q5_0),
        Storage::Q5_1 => each(bytes, out, q5_1),
        Storage::Q8_0 => each(bytes, out, q8_0),
        Storage::Q4K => each(bytes, out, q4_k),
        Storage::Q5K => each(bytes, out, q5_k),
        Storage::Q6K => each(bytes, out, q6_k),
        Storage::Coded | Storage::Native => unreachable!("`decode_row` saw that it has rows of a fixed size"),
    }
}

/// Calls `block` with the bytes and the values of each block in turn.
#[inline(always)]
fn each<const B: usize, const L: usize>(bytes: &[u8], out: &mut [f32], block: impl Fn(&[u8; B], &mut [f32; L])) {
    for (b, y) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        block(b, y);
    }
}

/// The value of a half-precision number, exactly, without branches so that rows of them vectorise.
#[inline(always)]
fn f16(low: u8, high: u8) -> f32 {
    let h = u32::from(u16::from_le_bytes([low, high]));
    let exponent = h & 0x7C00;
    // Exponents are rebiased from 15 to 127; that of infinity and NaN once more, to 255.
    let rebias = (112 << 23) << u32::from(exponent == 0x7C00);
    let normal = ((h & 0x7FFF) << 13) + rebias;
    // A subnormal counts steps of 2^-24, which is what the last bit of a number in [0.5, 1) counts.
    let subnormal = (f32::from_bits((126 << 23) | (h & 0x03FF)) - 0.5).to_bits();
    let magnitude = if exponent == 0 { subnormal } else { normal };
    f32::from_bits(magnitude | (h & 0x8000) << 16)
}

/// The `N` bytes at `at`.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("every part lies inside its block")
}

/// d: f16, q: 16 bytes; low nibbles are values 0..16, high nibbles 16..32. value = (q - 8) d
#[inline(always)]
fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = f16(b[0], b[1]);
    let q: &[u8; 16] = part(b, 2);
    for j in 0..16 {
        y[j] = (i32::from(q[j] & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(q[j] >> 4) - 8) as f32 * d;
    }
}

/// d, m: f16, q as in Q4_0. value = q d + m
#[inline(always)]
fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (f16(b[0], b[1]), f16(b[2], b[3]));
    let q: &[u8; 16] = part(b, 4);
    for j in 0..16 {
        y[j] = i32::from(q[j] & 15) as f32 * d + m;
        y[j + 16] = i32::from(q[j] >> 4) as f32 * d + m;
    }
}

/// The 32 five-bit numbers of Q5_0 and Q5_1: bit j of `high` is the fifth bit of number j.
#[inline(always)]
fn five_bits(high: &[u8; 4], q: &[u8; 16]) -> [i32; 32] {
    let high = u32::from_le_bytes(*high);
    let mut out = [0; 32];
    for j in 0..16 {
        out[j] = (u32::from(q[j] & 15) | (high >> j & 1) << 4) as i32;
        out[j + 16] = (u32::from(q[j] >> 4) | (high >> (j + 16) & 1) << 4) as i32;
    }
    out
}

/// d: f16, high: 4 bytes, q: 16 bytes. value = (q - 16) d
#[inline(always)]
fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = f16(b[0], b[1]);
    let q = five_bits(part(b, 2), part(b, 6));
    for j in 0..32 {
        y[j] = (q[j] - 16) as f32 * d;
    }
}

/// d, m: f16, high: 4 bytes, q: 16 bytes. value = q d + m
#[inline(always)]
fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (f16(b[0], b[1]), f16(b[2], b[3]));
    let q = five_bits(part(b, 4), part(b, 8));
    for j in 0..32 {
        y[j] = q[j] as f32 * d + m;
    }
}

/// d: f16, q: 32 signed bytes. value = q d
#[inline(always)]
fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = f16(b[0], b[1]);
    let q: &[u8; 32] = part(b, 2);
    for j in 0..32 {
        y[j] = f32::from(q[j] as i8) * d;
    }
}

/// The scale and the minimum, six bits each, of sub-block `s` (of 8) in Q4_K and Q5_K. Those of the last four are
/// split: four bits in the last bytes, two on top of the first bytes.
#[inline(always)]
fn scale_min(packed: &[u8; 12], s: usize) -> (f32, f32) {
    let (scale, min) = if s < 4 {
        (packed[s] & 63, packed[s + 4] & 63)
    } else {
        let low = packed[s + 4];
        ((low & 15) | (packed[s - 4] >> 6) << 4, (low >> 4) | (packed[s] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin: f16, scales: 12 bytes, q: 128 bytes, 32 of them for two sub-blocks of 32. value = (d scale) q - dmin min
#[inline(always)]
fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (f16(b[0], b[1]), f16(b[2], b[3]));
    let scales: &[u8; 12] = part(b, 4);
    for (i, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q: &[u8; 32] = part(b, 16 + 32 * i);
        let (s0, m0) = scale_min(scales, 2 * i);
        let (s1, m1) = scale_min(scales, 2 * i + 1);
        let (d0, m0, d1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for j in 0..32 {
            y[j] = d0 * i32::from(q[j] & 15) as f32 - m0;
            y[j + 32] = d1 * i32::from(q[j] >> 4) as f32 - m1;
        }
    }
}

/// As Q4_K with high: 32 bytes before q; bit s of byte j is the fifth bit of value j of sub-block s.
#[inline(always)]
fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (f16(b[0], b[1]), f16(b[2], b[3]));
    let scales: &[u8; 12] = part(b, 4);
    let high: &[u8; 32] = part(b, 16);
    for (i, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q: &[u8; 32] = part(b, 48 + 32 * i);
        let (s0, m0) = scale_min(scales, 2 * i);
        let (s1, m1) = scale_min(scales, 2 * i + 1);
        let (d0, m0, d1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for j in 0..32 {
            let high = high[j] >> (2 * i);
            y[j] = d0 * i32::from((q[j] & 15) | (high & 1) << 4) as f32 - m0;
            y[j + 32] = d1 * i32::from((q[j] >> 4) | (high & 2) << 3) as f32 - m1;
        }
    }
}

/// low: 128 bytes, high: 64 bytes, scales: 16 signed bytes, d: f16. Each half of 128 values is four runs of 32, whose
/// upper two bits share the bytes of `high`; a scale serves 16 values. value = (d scale) (q - 32)
#[inline(always)]
fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let scales: &[u8; 16] = part(b, 192);
    let d = f16(b[208], b[209]);
    for (half, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low: &[u8; 64] = part(b, 64 * half);
        let high: &[u8; 32] = part(b, 128 + 32 * half);
        for run in 0..8 {
            // 16 values at 16 * run: quarter run / 2 of the half, part run % 2 of the quarter.
            let d = d * f32::from(scales[8 * half + run] as i8);
            let (quarter, at) = (run / 2, 16 * (run % 2));
            let (low_shift, high_shift) = (4 * (quarter / 2), 2 * quarter);
            let low: &[u8; 16] = part(low, 32 * (quarter % 2) + at);
            let high: &[u8; 16] = part(high, at);
            for j in 0..16 {
                let q = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
                y[16 * run + j] = d * (i32::from(q) - 32) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes at every alignment and compares bits with a file of `tests/fixtures/ggml` (layout: its `make_ggml.py`).
    fn check(storage: Storage, file: &[u8]) {
        let count = |at| u32::from_le_bytes(*part(file, at)) as usize;
        let (n_bytes, n_values) = (count(0), count(4));
        let (bytes, expected) = file[8..].split_at(n_bytes);
        assert!(n_values > 0 && expected.len() == 4 * n_values);
        for shift in 0..4 {
            let mut moved = vec![0; shift];
            moved.extend_from_slice(bytes);
            let (mut out, mut portable) = (vec![f32::NAN; n_values], vec![f32::NAN; n_values]);
            decode_row(storage, &moved[shift..], &mut out);
            decode(storage, &moved[shift..], &mut portable);
            for (i, expected) in expected.as_chunks().0.iter().enumerate() {
                let expected = u32::from_le_bytes(*expected);
                assert_eq!(out[i].to_bits(), expected, "{storage:?} value {i}");
                assert_eq!(portable[i].to_bits(), expected, "{storage:?} value {i}");
            }
        }
    }

    #[test]
    fn decoding_equals_ggml_bit_by_bit() {
        macro_rules! file {
            ($name:literal) => {
                include_bytes!(concat!("../../../../tests/fixtures/ggml/", $name, ".bin"))
            };
        }
        check(Storage::F32, file!("f32"));
        check(Storage::F16, file!("f16"));
        check(Storage::BF16, file!("bf16"));
        check(Storage::Q4_0, file!("q4_0"));
        check(Storage::Q4_1, file!("q4_1"));
        check(Storage::Q5_0, file!("q5_0"));
        check(Storage::Q5_1, file!("q5_1"));
        check(Storage::Q8_0, file!("q8_0"));
        check(Storage::Q4K, file!("q4_k"));
        check(Storage::Q5K, file!("q5_k"));
        check(Storage::Q6K, file!("q6_k"));
    }

    #[test]
    fn every_half_float_decodes_to_its_value() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; 1 << 16];
        for (storage, value) in [
            (Storage::F16, (|h| half::f16::from_bits(h).to_f32_const()) as fn(u16) -> f32),
            (Storage::BF16, |h| half::bf16::from_bits(h).to_f32_const()),
        ] {
            decode_row(storage, &bytes, &mut out);
            for (h, got) in (0..=u16::MAX).zip(&out) {
                let expected = value(h);
                let equal = got.to_bits() == expected.to_bits();
                assert!(equal || got.is_nan() && expected.is_nan(), "{storage:?} {h:#06x}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "bytes for 32 values")]
    fn a_row_of_the_wrong_length_is_refused() {
        decode_row(Storage::Q4_0, &[0; 19], &mut [0.0; 32]);
    }
}
