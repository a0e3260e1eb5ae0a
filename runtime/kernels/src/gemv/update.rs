//! Low-rank updates of products of a few rows. Rows of `s B` are short: some of them lie beside each other, so that their sums grow
//! together and none has to be added over lanes.

use std::ops::Range;

use crate::cpu::{Cpu, cpu, per_cpu};
use crate::element::{eight_bit_scale, nearest_whole};

/// Rows of a panel of floats.
const SINGLES: usize = 8;
/// Rows of a panel of codes.
const CODES: usize = 16;
/// What a code is greater by than the whole number that it stands for.
const ZERO: i32 = 128;

/// `s B` (n, r).
pub struct LowRank {
    n: usize,
    r: usize,
    values: Values,
}

/// Panels in order.
enum Values {
    /// Of each panel, r times a value of each row.
    Singles(Vec<[f32; SINGLES]>),
    /// Whole numbers from -127 to 127.
    Codes(Codes),
}

struct Codes {
    /// Of each panel, r / 4 times four codes of each row, r rounded up.
    words: Vec<[[u8; 4]; CODES]>,
    /// What the whole numbers of each row are multiplied by.
    scales: Vec<[f32; CODES]>,
}

impl LowRank {
    /// Lays out `values` (n, r); in `eight_bits` each row is rounded to whole numbers with a scale of its own, NaN if a value is not
    /// finite, and so will be what it is multiplied with.
    ///
    /// # Panics
    /// When there are not n r values.
    pub fn new(values: &[f32], (n, r): (usize, usize), eight_bits: bool) -> Self {
        assert_eq!(values.len(), n * r, "{n} x {r}");
        let rows = values.chunks_exact(r.max(1)).enumerate();
        let values = if eight_bits {
            let (panels, words) = (n.div_ceil(CODES), r.div_ceil(4));
            let mut codes =
                Codes { words: vec![[[ZERO as u8; 4]; CODES]; panels * words], scales: vec![[0.0; CODES]; panels] };
            for (row, values) in rows {
                let (panel, lane) = (row / CODES, row % CODES);
                let (scale, inverse) = eight_bit_scale(values);
                codes.scales[panel][lane] = scale;
                for (k, value) in values.iter().enumerate() {
                    let code = nearest_whole(*value, inverse) + ZERO;
                    codes.words[panel * words + k / 4][lane][k % 4] = code as u8;
                }
            }
            Values::Codes(codes)
        } else {
            let mut singles = vec![[0.0; SINGLES]; n.div_ceil(SINGLES) * r];
            for (row, values) in rows {
                for (singles, value) in singles[row / SINGLES * r..].iter_mut().zip(values) {
                    singles[row % SINGLES] = *value;
                }
            }
            Values::Singles(singles)
        };
        Self { n, r, values }
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.r
    }

    /// Asks for the memory of some rows, which will be read soon.
    pub fn prefetch(&self, rows: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            const LINE: usize = 64;
            let (height, size, base) = match &self.values {
                Values::Singles(values) => {
                    (SINGLES, self.r * size_of::<[f32; SINGLES]>(), values.as_ptr().cast::<i8>())
                }
                Values::Codes(codes) => {
                    (CODES, self.r.div_ceil(4) * size_of::<[[u8; 4]; CODES]>(), codes.words.as_ptr().cast::<i8>())
                }
            };
            for at in (rows.start / height * size..rows.end.div_ceil(height) * size).step_by(LINE) {
                // SAFETY: nothing is read; an address that nothing lies at does no harm.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(base.wrapping_add(at)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = rows;
    }

    /// `out += s B uᵀ` for the rows `rows`: `out` (rows.len(), m), `u` (r, m). Each element depends on its row of `s B` and of `u`
    /// alone, and is the same on every processor.
    ///
    /// # Panics
    /// When sizes disagree.
    pub fn add(&self, u: &[f32], m: usize, rows: Range<usize>, out: &mut [f32]) {
        let fits = u.len() == self.r * m && rows.end <= self.n && out.len() == rows.len() * m;
        assert!(fits, "{rows:?} of {} x {} for {m} rows", self.n, self.r);
        match &self.values {
            Values::Singles(singles) => add(cpu(), u, m, singles, rows, out),
            Values::Codes(codes) => {
                let mut words = Vec::with_capacity(self.r.div_ceil(4));
                for j in 0..m {
                    let u = u[j..].iter().step_by(m);
                    let (scale, start) = round(u, &mut words);
                    codes.add((&words, start), scale, (j, m), rows.clone(), out);
                }
            }
        }
    }
}

/// Rounds r values to words of four whole numbers; their scale, NaN if a value is not finite, and what sums of products with codes start
/// from.
fn round<'a>(u: impl Iterator<Item = &'a f32>, words: &mut Vec<[i8; 4]>) -> (f32, i32) {
    const MOST: usize = 64;
    let mut few = [0f32; MOST];
    let (mut count, mut more) = (0, Vec::new());
    for value in u {
        if count < MOST {
            few[count] = *value;
        } else {
            if count == MOST {
                more.extend_from_slice(&few);
            }
            more.push(*value);
        }
        count += 1;
    }
    let values = if count <= MOST { &few[..count] } else { &more };
    let (scale, inverse) = eight_bit_scale(values);
    words.clear();
    let mut sum = 0;
    for values in values.chunks(4) {
        let mut word = [0i8; 4];
        for (code, value) in word.iter_mut().zip(values) {
            let whole = nearest_whole(*value, inverse);
            sum += whole;
            *code = whole as i8;
        }
        words.push(word);
    }
    (scale, -ZERO * sum)
}

impl Codes {
    /// Adds the products with one row of u, given as words and where their sums start, to column j of m of `out`.
    fn add(&self, u: (&[[i8; 4]], i32), scale: f32, (j, m): (usize, usize), rows: Range<usize>, out: &mut [f32]) {
        let cpu = cpu();
        for panel in rows.start / CODES..rows.end.div_ceil(CODES) {
            let words = &self.words[panel * u.0.len()..(panel + 1) * u.0.len()];
            let sums = sums_of_codes(cpu, words, u);
            let of_panel = (panel * CODES).max(rows.start)..((panel + 1) * CODES).min(rows.end);
            let lanes = of_panel.start - panel * CODES..of_panel.end - panel * CODES;
            let (sums, scales) = (&sums[lanes.clone()], &self.scales[panel][lanes]);
            let out = &mut out[(of_panel.start - rows.start) * m..(of_panel.end - rows.start) * m];
            if m == 1 {
                put(cpu, sums, scales, scale, out);
            } else {
                for ((out, sum), of_row) in out[j..].iter_mut().step_by(m).zip(sums).zip(scales) {
                    *out += *sum as f32 * (of_row * scale);
                }
            }
        }
    }
}

per_cpu! {
    /// Adds sums times scales.
    fn put(sums: &[i32], scales: &[f32], scale: f32, out: &mut [f32]) {
        for ((out, sum), of_row) in out.iter_mut().zip(sums).zip(scales) {
            *out += *sum as f32 * (of_row * scale);
        }
    }
}

/// Sums of products of each row of a panel of codes with words of u.
fn sums_of_codes(cpu: Cpu, codes: &[[[u8; 4]; CODES]], u: (&[[i8; 4]], i32)) -> [i32; CODES] {
    #[cfg(target_arch = "x86_64")]
    if cpu >= Cpu::Avx512 && std::arch::is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the processor has it.
        return unsafe { vnni(codes, u) };
    }
    portable(cpu, codes, u)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni(codes: &[[[u8; 4]; CODES]], (u, start): (&[[i8; 4]], i32)) -> [i32; CODES] {
    use std::arch::x86_64::*;
    let mut sums = _mm512_set1_epi32(start);
    for (codes, u) in codes.iter().zip(u) {
        // SAFETY: sixteen words are 64 bytes.
        let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        sums = _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(i32::from_le_bytes(u.map(|code| code as u8))));
    }
    let mut out = [0; CODES];
    // SAFETY: as above.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sums) };
    out
}

per_cpu! {
    fn portable(codes: &[[[u8; 4]; CODES]], u: (&[[i8; 4]], i32)) -> [i32; CODES] {
        let mut sums = [u.1; CODES];
        for (codes, u) in codes.iter().zip(u.0) {
            for (sum, codes) in sums.iter_mut().zip(codes) {
                for k in 0..4 {
                    *sum += i32::from(codes[k]) * i32::from(u[k]);
                }
            }
        }
        sums
    }
}

/// Sums over a panel of floats, in two turns, so that an addition does not wait for the one before.
#[inline(always)]
fn sums(values: &[[f32; SINGLES]], u: impl Iterator<Item = f32>) -> [f32; SINGLES] {
    let (mut even, mut odd) = ([0f32; SINGLES], [0f32; SINGLES]);
    for (values, u) in values.iter().zip(u) {
        for ((even, odd), value) in even.iter_mut().zip(&mut odd).zip(values) {
            (*even, *odd) = (*odd, *even + value * u);
        }
    }
    std::array::from_fn(|lane| even[lane] + odd[lane])
}

per_cpu! {
    /// See [`LowRank::add`].
    fn add(u: &[f32], m: usize, values: &[[f32; SINGLES]], rows: Range<usize>, out: &mut [f32]) {
        let r = u.len() / m;
        for panel in rows.start / SINGLES..rows.end.div_ceil(SINGLES) {
            let values = &values[panel * r..(panel + 1) * r];
            let of_panel = (panel * SINGLES).max(rows.start)..((panel + 1) * SINGLES).min(rows.end);
            let out = &mut out[(of_panel.start - rows.start) * m..(of_panel.end - rows.start) * m];
            if m == 1 && out.len() == SINGLES {
                let sums = sums(values, u.iter().copied());
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out += sum;
                }
                continue;
            }
            for j in 0..m {
                let sums = sums(values, u[j..].iter().step_by(m).copied());
                for (out, row) in out.chunks_exact_mut(m).zip(of_panel.clone()) {
                    out[j] += sums[row % SINGLES];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cpus, random};
    use super::*;
    use crate::Stream;
    use crate::cpu::with_cpu;

    #[test]
    fn an_update_is_added_to_any_rows_on_every_processor() {
        let (n, m) = (21, 5);
        for (r, eight_bits) in [1, 8, 16, 33].into_iter().flat_map(|r| [(r, false), (r, true)]) {
            let mut stream = Stream::new(4, 1);
            let (u, b, before) = (random(&mut stream, m * r), random(&mut stream, n * r), random(&mut stream, n * m));
            let update = LowRank::new(&b, (n, r), eight_bits);
            let all = cpus().map(|cpu| {
                let mut out = before.clone();
                with_cpu(cpu, || update.add(&u, m, 0..n, &mut out));
                out
            });
            let all: Vec<Vec<f32>> = all.collect();
            assert!(all.iter().all(|one| *one == all[0]), "rank {r}");
            for (row, j) in (0..n).flat_map(|row| (0..m).map(move |j| (row, j))) {
                let got = all[0][row * m + j];
                let alone: Vec<f32> = (0..r).map(|k| u[k * m + j]).collect();
                let mut out = [before[row * m + j]];
                update.add(&alone, 1, row..row + 1, &mut out);
                assert_eq!(out, [got], "rank {r}: alone");
                let largest = b[row * r..(row + 1) * r].iter().fold(0f32, |most, b| most.max(b.abs()));
                let (mut wanted, mut size) = (f64::from(before[row * m + j]), 1.0);
                for k in 0..r {
                    wanted += f64::from(b[row * r + k]) * f64::from(alone[k]);
                    size += f64::from(largest * alone[k].abs());
                }
                // A code is off by half a step at most, on both sides.
                let most = alone.iter().fold(0f32, |most, u| most.max(u.abs()));
                let rounding = (size + r as f64 * f64::from(largest * most)) * 0.5 / 127.0;
                let bound = if eight_bits { rounding } else { size * 8.0 * f64::from(f32::EPSILON) };
                let error = (f64::from(got) - wanted).abs();
                assert!(error <= bound, "rank {r}, in eight bits: {eight_bits}: off by {error:e}");
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_yields_no_number() {
        let update = LowRank::new(&[1.0, f32::INFINITY, 2.0, 3.0], (2, 2), true);
        let mut out = [0.0; 2];
        update.add(&[1.0, 1.0], 1, 0..2, &mut out);
        assert!(out[0].is_nan() && (out[1] - 5.0).abs() < 0.03);
        let mut out = [0.0; 2];
        update.add(&[1.0, f32::NAN], 1, 0..2, &mut out);
        assert!(out.iter().all(|sum| sum.is_nan()));
    }

    #[test]
    #[should_panic(expected = "1..3 of 2 x 16 for 1 rows")]
    fn rows_that_there_are_not_are_refused() {
        LowRank::new(&[0.0; 32], (2, 16), false).add(&[0.0; 16], 1, 1..3, &mut [0.0; 2]);
    }
}
