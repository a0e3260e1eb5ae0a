//! Blocks of 32 values with one scale, and in Q4_1 and Q5_1 a minimum.

use half::f16;

/// d: f16, q: 32 signed bytes. d = ‖x‖∞ / 127
#[inline(always)]
pub(super) fn q8_0(x: &[f32; 32], b: &mut [u8; 34]) {
    let d = magnitude(x) / 127.0;
    let inverse = inverse(d);
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (q, x) in b[2..].iter_mut().zip(x) {
        *q = truncated((x * inverse).round()) as u8;
    }
}

/// d: f16, q: 16 bytes, see [`nibbles`]. d = x / -8 for the x of largest magnitude
#[inline(always)]
pub(super) fn q4_0(x: &[f32; 32], b: &mut [u8; 18]) {
    let d = extreme(x) / -8.0;
    let inverse = inverse(d);
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let q = x.map(|x| level(x * inverse + 8.5, 15));
    nibbles(&q, &mut b[2..]);
}

/// d, m: f16, q as in Q4_0. m is the least x, d a fifteenth of the way to the largest
#[inline(always)]
pub(super) fn q4_1(x: &[f32; 32], b: &mut [u8; 20]) {
    let (least, most) = range(x);
    let d = (most - least) / 15.0;
    let inverse = inverse(d);
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    b[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
    let q = x.map(|x| level((x - least) * inverse + 0.5, 15));
    nibbles(&q, &mut b[4..]);
}

/// d: f16, high: 4 bytes, q: 16 bytes. d = x / -16 for the x of largest magnitude
#[inline(always)]
pub(super) fn q5_0(x: &[f32; 32], b: &mut [u8; 22]) {
    let d = extreme(x) / -16.0;
    let inverse = inverse(d);
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let q = x.map(|x| level(x * inverse + 16.5, 31));
    b[2..6].copy_from_slice(&fifth_bits(&q).to_le_bytes());
    nibbles(&q, &mut b[6..]);
}

/// d, m: f16, high: 4 bytes, q: 16 bytes. m is the least x, d a thirty-first of the way to the largest
#[inline(always)]
pub(super) fn q5_1(x: &[f32; 32], b: &mut [u8; 24]) {
    let (least, most) = range(x);
    let d = (most - least) / 31.0;
    let inverse = inverse(d);
    b[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    b[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
    // No level is capped here, as none is in ggml.
    let q = x.map(|x| truncated((x - least) * inverse + 0.5) as u8);
    b[4..8].copy_from_slice(&fifth_bits(&q).to_le_bytes());
    nibbles(&q, &mut b[8..]);
}

/// The largest magnitude. Those of floats are ordered as their bits are, and integers take any order of comparisons.
#[inline(always)]
fn magnitude(x: &[f32; 32]) -> f32 {
    f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7FFF_FFFF)))
}

/// The least and the largest value, of which zeros have any sign.
#[inline(always)]
fn ends(x: &[f32; 32]) -> (f32, f32) {
    // As integers that are ordered as the values are.
    let key = |bits: i32| bits ^ (bits >> 31 & 0x7FFF_FFFF);
    let (mut least, mut most) = (i32::MAX, i32::MIN);
    for x in x {
        let x = key(x.to_bits() as i32);
        (least, most) = (least.min(x), most.max(x));
    }
    (f32::from_bits(key(least) as u32), f32::from_bits(key(most) as u32))
}

/// The first value of the largest magnitude, with its sign.
#[inline(always)]
fn extreme(x: &[f32; 32]) -> f32 {
    let (least, most) = ends(x);
    if most > -least {
        most
    } else if most < -least {
        least
    } else if most == 0.0 {
        0.0
    } else {
        x.iter().copied().find(|x| x.abs() == most).unwrap_or(most)
    }
}

/// The least and the largest value; of zeros the first, whatever its sign.
#[inline(always)]
fn range(x: &[f32; 32]) -> (f32, f32) {
    let first = |end: f32| if end == 0.0 { x.iter().copied().find(|x| *x == 0.0).unwrap_or(end) } else { end };
    let (least, most) = ends(x);
    (first(least), first(most))
}

#[inline(always)]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The level of a value, at most `most`: rounded towards zero, by way of a signed byte.
#[inline(always)]
fn level(value: f32, most: i8) -> u8 {
    (truncated(value) as i8).min(most) as u8
}

/// What the processors that ggml's files are mostly made on make of a cast to an integer: where no number of 32 bits is near, the least
/// one.
#[inline(always)]
fn truncated(value: f32) -> i32 {
    if value.abs() < 2_147_483_648.0 { value as i32 } else { i32::MIN }
}

/// Low nibbles are values 0..16, high nibbles 16..32.
#[inline(always)]
fn nibbles(q: &[u8; 32], bytes: &mut [u8]) {
    for (j, byte) in bytes.iter_mut().enumerate() {
        *byte = (q[j] & 15) | q[j + 16] << 4;
    }
}

/// Bit j is the fifth bit of level j.
#[inline(always)]
fn fifth_bits(q: &[u8; 32]) -> u32 {
    q.iter().enumerate().fold(0, |bits, (j, q)| bits | u32::from(q >> 4 & 1) << j)
}
