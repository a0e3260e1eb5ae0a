//! Blocks of 256 values: sub-blocks with scales of a few bits, and one scale for those. Each sub-block's scale, in Q4_K and Q5_K with
//! its minimum, is the best of a few that are tried: that of the least weighted squared error.
//!
//! The sub-blocks are lanes, so that sums over their values keep ggml's order.

use half::f16;

/// Sub-blocks that are fitted at once.
const LANES: usize = 16;

/// A number for each sub-block.
type Lanes = [f32; LANES];

/// Values whose magnitude is below this all over a sub-block are zeros.
const NOTHING: f32 = 1e-15;

/// The integer nearest to a value, ties to even; ggml's, of which the value's bits beyond 2^22 are cut off.
#[inline(always)]
fn nearest(value: f32) -> i32 {
    ((value + 12_582_912.0).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

/// The level of a value between these.
#[inline(always)]
fn level(value: f32, least: i32, most: i32) -> i32 {
    nearest(value).min(most).max(least)
}

/// How levels of sub-blocks of 32 values become values: `scale · level - min`.
struct Fit {
    scale: Lanes,
    min: Lanes,
    /// What values are multiplied by, less `base`, to become levels.
    inverse: Lanes,
    base: Lanes,
}

/// The scales that are tried: those by which the range would have `first + n · step` levels more.
#[derive(Clone, Copy)]
struct Tries {
    first: f32,
    step: f32,
    count: i32,
}

/// Fits sub-blocks to levels 0 to MOST. A value's weight is its magnitude, and the root of the mean square of all.
#[inline(always)]
fn fit<const MOST: i32>(x: &[Lanes; 32], tries: Tries) -> Fit {
    const ZERO: Lanes = [0.0; LANES];
    let most = MOST as f32;
    let mut squares = ZERO;
    for x in x {
        for l in 0..LANES {
            squares[l] += x[l] * x[l];
        }
    }
    let mut root = ZERO;
    for l in 0..LANES {
        root[l] = (squares[l] / 32.0).sqrt();
    }
    let mut w = [ZERO; 32];
    for (w, x) in w.iter_mut().zip(x) {
        for l in 0..LANES {
            w[l] = root[l] + x[l].abs();
        }
    }
    let (mut min, mut max, mut sum_w, mut sum_x) = (x[0], x[0], w[0], ZERO);
    for l in 0..LANES {
        sum_x[l] = sum_w[l] * x[0][l];
    }
    for (w, x) in w.iter().zip(x).skip(1) {
        for l in 0..LANES {
            min[l] = if x[l] < min[l] { x[l] } else { min[l] };
            max[l] = if x[l] > max[l] { x[l] } else { max[l] };
            sum_w[l] += w[l];
            sum_x[l] += w[l] * x[l];
        }
    }
    let (mut inverse, mut scale, mut error) = (ZERO, ZERO, ZERO);
    for l in 0..LANES {
        min[l] = if min[l] > 0.0 { 0.0 } else { min[l] };
        inverse[l] = most / (max[l] - min[l]);
        scale[l] = 1.0 / inverse[l];
    }
    let flat: [bool; LANES] = std::array::from_fn(|l| max[l] == min[l]);
    let flat_min = min;
    let mut base = min;
    for (w, x) in w.iter().zip(x) {
        for l in 0..LANES {
            let q = level(inverse[l] * (x[l] - min[l]), 0, MOST) as f32;
            let apart = scale[l] * q + min[l] - x[l];
            error[l] += w[l] * (apart * apart);
        }
    }
    let mut levels = [ZERO; 32];
    for n in 0..=tries.count {
        let range = tries.first + tries.step * n as f32 + most;
        let mut tried = ZERO;
        for l in 0..LANES {
            tried[l] = range / (max[l] - min[l]);
        }
        let (mut sum_q, mut sum_qq, mut sum_qx) = (ZERO, ZERO, ZERO);
        for ((levels, w), x) in levels.iter_mut().zip(&w).zip(x) {
            for l in 0..LANES {
                let q = level(tried[l] * (x[l] - min[l]), 0, MOST) as f32;
                levels[l] = q;
                let wq = w[l] * q;
                sum_q[l] += wq;
                sum_qq[l] += wq * q;
                sum_qx[l] += wq * x[l];
            }
        }
        // Least squares over scale and minimum, of which the latter is not above zero.
        let (mut determinant, mut this_scale, mut this_min, mut this_error) = (ZERO, ZERO, ZERO, ZERO);
        for l in 0..LANES {
            determinant[l] = sum_w[l] * sum_qq[l] - sum_q[l] * sum_q[l];
            this_scale[l] = (sum_w[l] * sum_qx[l] - sum_x[l] * sum_q[l]) / determinant[l];
            this_min[l] = (sum_qq[l] * sum_x[l] - sum_q[l] * sum_qx[l]) / determinant[l];
            let above = this_min[l] > 0.0;
            this_scale[l] = if above { sum_qx[l] / sum_qq[l] } else { this_scale[l] };
            this_min[l] = if above { 0.0 } else { this_min[l] };
        }
        for ((levels, w), x) in levels.iter().zip(&w).zip(x) {
            for l in 0..LANES {
                let apart = this_scale[l] * levels[l] + this_min[l] - x[l];
                this_error[l] += w[l] * (apart * apart);
            }
        }
        for l in 0..LANES {
            if determinant[l] > 0.0 && this_error[l] < error[l] {
                error[l] = this_error[l];
                scale[l] = this_scale[l];
                // By which the levels of this try came about.
                (inverse[l], base[l]) = (tried[l], min[l]);
                min[l] = this_min[l];
            }
        }
    }
    for l in 0..LANES {
        if flat[l] {
            (scale[l], min[l], inverse[l]) = (0.0, flat_min[l], 0.0);
        }
        min[l] = -min[l];
    }
    Fit { scale, min, inverse, base }
}

/// What Q4_K and Q5_K have in common: d, dmin and the packed scales, and the levels of all values.
#[inline(always)]
fn block<const MOST: i32>(x: &[f32; 256], fit: &Fit, first: usize, head: &mut [u8; 16]) -> [u8; 256] {
    let (scales, mins) = (&fit.scale[first..first + 8], &fit.min[first..first + 8]);
    let largest = |of: &[f32]| of.iter().fold(0.0, |most, x| if *x > most { *x } else { most });
    let (max_scale, max_min) = (largest(scales), largest(mins));
    let inverse = |largest: f32| if largest > 0.0 { 63.0 / largest } else { 0.0 };
    let (d, dmin) = (f16::from_f32(max_scale / 63.0), f16::from_f32(max_min / 63.0));
    let six_bits = |value: f32| (nearest(value) as u8).min(63);
    let packed: [[u8; 2]; 8] =
        std::array::from_fn(|j| [six_bits(inverse(max_scale) * scales[j]), six_bits(inverse(max_min) * mins[j])]);
    head[..2].copy_from_slice(&d.to_le_bytes());
    head[2..4].copy_from_slice(&dmin.to_le_bytes());
    for (j, [scale, min]) in packed.into_iter().enumerate() {
        if j < 4 {
            (head[4 + j], head[8 + j]) = (scale, min);
        } else {
            head[8 + j] = (scale & 15) | (min & 15) << 4;
            head[j] |= scale >> 4 << 6;
            head[4 + j] |= min >> 4 << 6;
        }
    }
    let mut levels = [0; 256];
    let blocks = levels.as_chunks_mut::<32>().0.iter_mut().zip(x.as_chunks::<32>().0);
    for (j, (levels, x)) in blocks.enumerate() {
        let [scale, min] = packed[j].map(f32::from);
        let (scale, min) = (d.to_f32() * scale, dmin.to_f32() * min);
        for (level_of, x) in levels.iter_mut().zip(x) {
            *level_of = level((x + min) / scale, 0, MOST) as u8;
        }
        if scale == 0.0 {
            // Levels that stand for nothing are those of the fit.
            let (inverse, base) = (fit.inverse[first + j], fit.base[first + j]);
            for (level_of, x) in levels.iter_mut().zip(x) {
                *level_of = if inverse == 0.0 { 0 } else { level(inverse * (x - base), 0, MOST) as u8 };
            }
        }
    }
    levels
}

/// Calls `write` with each block and its fit; two blocks are fitted at once.
#[inline(always)]
fn each_fitted<const MOST: i32, const B: usize>(
    values: &[f32],
    bytes: &mut [u8],
    tries: Tries,
    write: impl Fn(&[f32; 256], &Fit, usize, &mut [u8; B]),
) {
    let mut lanes = [[0.0; LANES]; 32];
    for (blocks, bytes) in values.as_chunks::<256>().0.chunks(2).zip(bytes.as_chunks_mut::<B>().0.chunks_mut(2)) {
        for (lane, x) in blocks.iter().flat_map(|block| block.as_chunks::<32>().0).enumerate() {
            for (lanes, x) in lanes.iter_mut().zip(x) {
                lanes[lane] = *x;
            }
        }
        let fit = fit::<MOST>(&lanes, tries);
        for (n, (x, b)) in blocks.iter().zip(bytes).enumerate() {
            write(x, &fit, 8 * n, b);
        }
    }
}

/// d, dmin: f16, scales: 12 bytes, q: 128 bytes, 32 of them for two sub-blocks of 32.
#[inline(always)]
pub(super) fn q4_k(values: &[f32], bytes: &mut [u8]) {
    let tries = Tries { first: -1.0, step: 0.1, count: 20 };
    each_fitted::<15, 144>(values, bytes, tries, |x, fit, first, b| {
        let (head, q) = b.split_first_chunk_mut().expect("a block begins with its scales");
        let levels = block::<15>(x, fit, first, head);
        for (q, levels) in q.as_chunks_mut::<32>().0.iter_mut().zip(levels.as_chunks::<64>().0) {
            for (j, q) in q.iter_mut().enumerate() {
                *q = levels[j] | levels[j + 32] << 4;
            }
        }
    });
}

/// As Q4_K with high: 32 bytes before q; bit s of byte j is the fifth bit of value j of sub-block s.
#[inline(always)]
pub(super) fn q5_k(values: &[f32], bytes: &mut [u8]) {
    let tries = Tries { first: -0.5, step: 0.1, count: 15 };
    each_fitted::<31, 176>(values, bytes, tries, |x, fit, first, b| {
        let (head, rest) = b.split_first_chunk_mut().expect("a block begins with its scales");
        let levels = block::<31>(x, fit, first, head);
        let (high, q) = rest.split_at_mut(32);
        for (j, high) in high.iter_mut().enumerate() {
            *high = (0..8).fold(0, |bits, s| bits | levels[32 * s + j] >> 4 << s);
        }
        for (q, levels) in q.as_chunks_mut::<32>().0.iter_mut().zip(levels.as_chunks::<64>().0) {
            for (j, q) in q.iter_mut().enumerate() {
                *q = (levels[j] & 15) | levels[j + 32] << 4;
            }
        }
    });
}

/// low: 128 bytes, high: 64 bytes, scales: 16 signed bytes, d: f16; see [`decode_row`](super::super::rows::decode_row).
#[inline(always)]
pub(super) fn q6_k(x: &[f32; 256], b: &mut [u8; 210]) {
    let mut lanes = [[0.0; LANES]; 16];
    for (lane, x) in x.as_chunks::<16>().0.iter().enumerate() {
        for (lanes, x) in lanes.iter_mut().zip(x) {
            lanes[lane] = *x;
        }
    }
    let (scales, inverses) = fit_signed(&lanes);
    let (mut max_scale, mut most) = (0.0, 0.0);
    for scale in scales {
        if scale.abs() > most {
            (most, max_scale) = (scale.abs(), scale);
        }
    }
    if most < NOTHING {
        return b.fill(0);
    }
    let inverse = -128.0 / max_scale;
    let d = f16::from_f32(1.0 / inverse);
    let steps = scales.map(|scale| nearest(inverse * scale).min(127) as i8);
    let mut levels = [0; 256];
    for (lane, (levels, x)) in levels.as_chunks_mut::<16>().0.iter_mut().zip(x.as_chunks::<16>().0).enumerate() {
        let scale = d.to_f32() * f32::from(steps[lane]);
        for (level_of, x) in levels.iter_mut().zip(x) {
            *level_of = (level(x / scale, -32, 31) + 32) as u8;
        }
        if scale == 0.0 {
            // Levels that stand for nothing are those of the fit.
            let inverse = inverses[lane];
            for (level_of, x) in levels.iter_mut().zip(x) {
                *level_of = if inverse == 0.0 { 0 } else { (level(inverse * x, -32, 31) + 32) as u8 };
            }
        }
    }
    for (half, levels) in levels.as_chunks::<128>().0.iter().enumerate() {
        for j in 0..32 {
            let q: [u8; 4] = std::array::from_fn(|quarter| levels[32 * quarter + j]);
            b[64 * half + j] = (q[0] & 15) | q[2] << 4;
            b[64 * half + 32 + j] = (q[1] & 15) | q[3] << 4;
            b[128 + 32 * half + j] = q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6;
        }
    }
    for (byte, step) in b[192..208].iter_mut().zip(steps) {
        *byte = step as u8;
    }
    b[208..].copy_from_slice(&d.to_le_bytes());
}

/// Fits sub-blocks of 16 values to levels -32 to 31 without a minimum. Returns the scales, and what values are multiplied by to become
/// levels: 0 where all are zeros. A value's weight is its square.
#[inline(always)]
fn fit_signed(x: &[Lanes; 16]) -> (Lanes, Lanes) {
    const ZERO: Lanes = [0.0; LANES];
    let (mut most, mut extreme) = (ZERO, ZERO);
    for x in x {
        for l in 0..LANES {
            let larger = x[l].abs() > most[l];
            extreme[l] = if larger { x[l] } else { extreme[l] };
            most[l] = if larger { x[l].abs() } else { most[l] };
        }
    }
    let (mut w, mut wx) = ([ZERO; 16], [ZERO; 16]);
    for ((w, wx), x) in w.iter_mut().zip(&mut wx).zip(x) {
        for l in 0..LANES {
            w[l] = x[l] * x[l];
            wx[l] = w[l] * x[l];
        }
    }
    let (mut scale, mut best, mut inverse) = (ZERO, ZERO, ZERO);
    for n in [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let range = -(32.0 + 0.1 * n as f32);
        let mut tried = ZERO;
        for l in 0..LANES {
            tried[l] = range / extreme[l];
        }
        let (mut sum_qx, mut sum_qq) = (ZERO, ZERO);
        for ((w, wx), x) in w.iter().zip(&wx).zip(x) {
            for l in 0..LANES {
                let q = level(tried[l] * x[l], -32, 31) as f32;
                sum_qx[l] += wx[l] * q;
                sum_qq[l] += w[l] * q * q;
            }
        }
        for l in 0..LANES {
            if n == 0 {
                inverse[l] = tried[l];
                scale[l] = if sum_qq[l] == 0.0 { 0.0 } else { sum_qx[l] / sum_qq[l] };
                best[l] = scale[l] * sum_qx[l];
            } else if sum_qq[l] > 0.0 && sum_qx[l] * sum_qx[l] > best[l] * sum_qq[l] {
                inverse[l] = tried[l];
                scale[l] = sum_qx[l] / sum_qq[l];
                best[l] = scale[l] * sum_qx[l];
            }
        }
    }
    for l in 0..LANES {
        if most[l] < NOTHING {
            (scale[l], inverse[l]) = (0.0, 0.0);
        }
    }
    (scale, inverse)
}
