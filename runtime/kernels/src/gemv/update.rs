//! Low-rank updates of products of a few rows. Rows of `s B` are short: eight of them lie beside each other, so that sums of eight
//! results grow together and none has to be added over lanes.

use std::ops::Range;

use crate::cpu::{cpu, per_cpu};
use crate::element::{eight_bit_scale, nearest_whole};

/// Rows of a panel.
const ROWS: usize = 8;

/// `s B` (n, r), laid out in panels of eight rows.
pub struct LowRank {
    n: usize,
    r: usize,
    values: Values,
}

/// Panels in order; of each, r times a value of each row.
enum Values {
    Singles(Vec<[f32; ROWS]>),
    /// Whole numbers from -127 to 127, and for each panel what its rows' sums are multiplied by.
    Codes(Vec<[i8; ROWS]>, Vec<[f32; ROWS]>),
}

impl LowRank {
    /// Lays out `values` (n, r); in `eight_bits` each row is rounded to whole numbers with a scale of its own, NaN if a value is not
    /// finite.
    ///
    /// # Panics
    /// When there are not n r values.
    pub fn new(values: &[f32], (n, r): (usize, usize), eight_bits: bool) -> Self {
        assert_eq!(values.len(), n * r, "{n} x {r}");
        let panels = n.div_ceil(ROWS);
        let rows = values.chunks_exact(r.max(1)).enumerate().map(|(row, values)| (row / ROWS, row % ROWS, values));
        let values = if eight_bits {
            let (mut codes, mut scales) = (vec![[0; ROWS]; panels * r], vec![[0.0; ROWS]; panels]);
            for (panel, lane, values) in rows {
                let (scale, inverse) = eight_bit_scale(values);
                scales[panel][lane] = scale;
                for (codes, value) in codes[panel * r..].iter_mut().zip(values) {
                    codes[lane] = nearest_whole(*value, inverse) as i8;
                }
            }
            Values::Codes(codes, scales)
        } else {
            let mut singles = vec![[0.0; ROWS]; panels * r];
            for (panel, lane, values) in rows {
                for (singles, value) in singles[panel * r..].iter_mut().zip(values) {
                    singles[lane] = *value;
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
            let (size, base) = match &self.values {
                Values::Singles(values) => (self.r * size_of::<[f32; ROWS]>(), values.as_ptr().cast::<i8>()),
                Values::Codes(values, _) => (self.r * size_of::<[i8; ROWS]>(), values.as_ptr().cast::<i8>()),
            };
            for at in (rows.start / ROWS * size..rows.end.div_ceil(ROWS) * size).step_by(LINE) {
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
            Values::Singles(singles) => add(cpu(), u, m, (singles, self.r), &[], rows, out),
            Values::Codes(codes, scales) => add(cpu(), u, m, (codes, self.r), scales, rows, out),
        }
    }
}

trait Value: Copy {
    fn wide(self) -> f32;
}

impl Value for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Value for i8 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from(self)
    }
}

/// Sums over a panel, in two turns, so that an addition does not wait for the one before.
#[inline(always)]
fn sums<V: Value>(values: &[[V; ROWS]], u: impl Iterator<Item = f32>) -> [f32; ROWS] {
    let (mut even, mut odd) = ([0f32; ROWS], [0f32; ROWS]);
    for (values, u) in values.iter().zip(u) {
        for ((even, odd), value) in even.iter_mut().zip(&mut odd).zip(values) {
            (*even, *odd) = (*odd, *even + value.wide() * u);
        }
    }
    std::array::from_fn(|lane| even[lane] + odd[lane])
}

per_cpu! {
    /// See [`LowRank::add`].
    fn add<V: Value>(
        u: &[f32],
        m: usize,
        panels: (&[[V; ROWS]], usize),
        scales: &[[f32; ROWS]],
        rows: Range<usize>,
        out: &mut [f32],
    ) {
        let (values, r) = panels;
        for panel in rows.start / ROWS..rows.end.div_ceil(ROWS) {
            let values = &values[panel * r..(panel + 1) * r];
            let of_panel = (panel * ROWS).max(rows.start)..((panel + 1) * ROWS).min(rows.end);
            let scales = scales.get(panel).copied().unwrap_or([1.0; ROWS]);
            let out = &mut out[(of_panel.start - rows.start) * m..(of_panel.end - rows.start) * m];
            if m == 1 && out.len() == ROWS {
                let sums = sums(values, u.iter().copied());
                for ((out, sum), scale) in out.iter_mut().zip(sums).zip(scales) {
                    *out += sum * scale;
                }
                continue;
            }
            for j in 0..m {
                let sums = sums(values, u[j..].iter().step_by(m).copied());
                for (out, row) in out.chunks_exact_mut(m).zip(of_panel.clone()) {
                    out[j] += sums[row % ROWS] * scales[row % ROWS];
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
                // A code is off by half a step at most.
                let bound = size * if eight_bits { 0.5 / 127.0 } else { 8.0 * f64::from(f32::EPSILON) };
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
    }

    #[test]
    #[should_panic(expected = "1..3 of 2 x 16 for 1 rows")]
    fn rows_that_there_are_not_are_refused() {
        LowRank::new(&[0.0; 32], (2, 16), false).add(&[0.0; 16], 1, 1..3, &mut [0.0; 2]);
    }
}
