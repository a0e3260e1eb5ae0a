//! Rows that are nearly alike: MinHash over runs of five words, locality-sensitive hashing for candidates, and an exact check of those.
//!
//! Of a row are kept twelve hashes of 32 bits, each of four minima (Broder 1997; bands as in Leskovec, Rajaraman and Ullman, Mining of
//! Massive Datasets, section 3.4). Two rows of Jaccard similarity s share one with probability 1 - (1 - s^4)^12: 0.998 at 0.8, 0.10 at
//! 0.3. What shares one is compared exactly when the rows are read a second time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Part;
use super::records::Finished;
use super::said::{STEP, mix};

/// Rows are nearly alike from here on: the share of their runs of five words that both have.
const SIMILAR: f64 = 0.8;

const BANDS: usize = 12;
const ROWS_OF_BAND: usize = 4;
/// Rows of one bucket that a row is compared with: so many of the first and of the last before it, of either part.
const COMPARED: usize = 3;
/// Earlier rows that a row is compared with, where all rows have many.
const PAIRS_OF_ROW: usize = 8;
/// Memory of the runs of rows that wait for the other one, in bytes.
const WAITING_BYTES_MAX: usize = 96 << 20;

/// The bands of a row.
pub(super) type Bands = [u32; BANDS];

/// The bands of a row with these runs; `None`: it has none.
pub(super) fn bands(grams: &[u64]) -> Option<Bands> {
    if grams.is_empty() {
        return None;
    }
    let mut minima = [u64::MAX; BANDS * ROWS_OF_BAND];
    for gram in grams {
        for (minimum, (factor, shift)) in minima.iter_mut().zip(FUNCTIONS) {
            *minimum = (*minimum).min((gram ^ shift).wrapping_mul(factor));
        }
    }
    let mut bands = [0; BANDS];
    for (band, minima) in bands.iter_mut().zip(minima.chunks_exact(ROWS_OF_BAND)) {
        *band = (super::said::hash(&minima) >> 32) as u32;
    }
    Some(bands)
}

/// Odd factors and shifts, by [`mix`] from 1.
const FUNCTIONS: [(u64, u64); BANDS * ROWS_OF_BAND] = functions();

const fn functions() -> [(u64, u64); BANDS * ROWS_OF_BAND] {
    let mut functions = [(0, 0); BANDS * ROWS_OF_BAND];
    let (mut at, mut state) = (0, 1_u64);
    while at < functions.len() {
        let (factor, shift) = (mix(state), mix(state.wrapping_add(STEP)));
        functions[at] = (factor | 1, shift);
        state = state.wrapping_add(STEP).wrapping_add(STEP);
        at += 1;
    }
    functions
}

/// The bands of a row, behind its number.
pub(super) type Banded = [u32; 1 + BANDS];

/// The bands of the row with this number.
pub(super) fn banded(row: u32, bands: &Bands) -> Banded {
    let mut banded = [row; 1 + BANDS];
    banded[1..].copy_from_slice(bands);
    banded
}

/// Pairs of rows that may be alike, the later row first.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pairs: Vec<(u32, u32)>,
    /// Rows of which there were more, and of which none was alike so far.
    cut: BTreeSet<u32>,
}

/// Finds the pairs to compare. `rows`: those with bands, ascending. `is_asked`: whether a row is compared at all.
pub(super) fn candidates(
    rows: &Finished<{ 1 + BANDS }>,
    is_asked: impl Fn(u32) -> bool,
    part: impl Fn(u32) -> Part,
) -> Candidates {
    let mut found = Candidates::default();
    let mut order: Vec<(u32, u32)> = Vec::with_capacity(rows.len());
    for band in 0..BANDS {
        order.clear();
        rows.each(|banded| {
            let (row, value) = (banded[0], banded[1 + band]);
            if is_asked(row) {
                order.push((value, row));
            }
        });
        order.sort_unstable();
        for bucket in order.chunk_by(|a, b| a.0 == b.0).filter(|bucket| bucket.len() > 1) {
            // By part: a held-out row is compared with rows that are trained on however many are held out beside it.
            let mut before: [Vec<u32>; 2] = Default::default();
            for (_, row) in bucket {
                for earlier in &before {
                    let (first, last) =
                        (earlier.len().min(COMPARED), earlier.len().saturating_sub(COMPARED).max(COMPARED));
                    let last = last.min(earlier.len());
                    found.pairs.extend(earlier[..first].iter().chain(&earlier[last..]).map(|other| (*row, *other)));
                }
                before[part(*row) as usize].push(*row);
            }
        }
        found.pairs.sort_unstable();
        found.pairs.dedup();
        // Rows that share a band with very many keep their pairs with the first of these.
        if found.pairs.len() > order.len() * PAIRS_OF_ROW {
            let (mut of_row, mut count) = (None, 0);
            found.pairs.retain(|(row, _)| {
                count = if of_row == Some(*row) { count + 1 } else { 1 };
                of_row = Some(*row);
                if count > PAIRS_OF_ROW {
                    found.cut.insert(*row);
                }
                count <= PAIRS_OF_ROW
            });
        }
    }
    found
}

/// A row that is nearly like another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Alike {
    pub row: u32,
    /// Of the rows that it is nearly like the one that is most so; of several the first.
    pub other: u32,
    /// The share of runs that both have.
    pub similarity: f64,
}

/// Rows that are nearly alike, each with the one that is most like it.
#[derive(Debug, Default)]
pub(super) struct Nearest {
    /// Each beside an earlier row of its part, ascending.
    in_part: Vec<Alike>,
    /// Held-out rows, each beside one that is trained.
    leaks: BTreeMap<u32, Alike>,
}

impl Nearest {
    /// Takes two rows. Calls come in the order of the later row.
    fn take(&mut self, row: u32, earlier: u32, similarity: f64, part: impl Fn(u32) -> Part) {
        // Of both parts it is the held-out one that should not be there.
        let (row, other, leaks) = match (part(row), part(earlier)) {
            (Part::Train, Part::HeldOut) => (earlier, row, true),
            (of_row, of_earlier) => (row, earlier, of_row != of_earlier),
        };
        let alike = Alike { row, other, similarity };
        let best = match self.in_part.last_mut().filter(|last| last.row == row) {
            _ if leaks => self.leaks.entry(row).or_insert(alike),
            Some(last) => last,
            None => return self.in_part.push(alike),
        };
        if similarity > best.similarity {
            *best = alike;
        }
    }

    /// Those beside a row of their part, and held-out ones beside one that is trained, each ascending.
    pub fn into_lists(self) -> [Vec<Alike>; 2] {
        [self.in_part, self.leaks.into_values().collect()]
    }
}

/// Compares candidates while their rows are read again, in order.
pub(super) struct Comparison {
    candidates: Candidates,
    /// Of each row in a pair, the last row that waits for it.
    last_use: Vec<(u32, u32)>,
    waiting: HashMap<u32, Vec<u64>>,
    /// The same the other way round, by the last row; and how many of them have ended.
    ends: Vec<(u32, u32)>,
    ended: usize,
    waiting_bytes: usize,
    pub alike: Nearest,
    /// Pairs that were not compared, for want of memory.
    pub uncompared: usize,
}

impl Comparison {
    pub fn new(candidates: Candidates) -> Self {
        let both = candidates.pairs.iter().flat_map(|(row, earlier)| [(*row, *row), (*earlier, *row)]);
        let mut last_use: Vec<(u32, u32)> = Vec::new();
        let mut most = 1 << 16;
        for (used, last) in both {
            last_use.push((used, last));
            if last_use.len() >= most {
                keep_last(&mut last_use);
                most = most.max(2 * last_use.len());
            }
        }
        keep_last(&mut last_use);
        let mut ends: Vec<(u32, u32)> = last_use.iter().map(|(row, last)| (*last, *row)).collect();
        ends.sort_unstable();
        let (waiting, alike) = (HashMap::new(), Nearest::default());
        Self { candidates, last_use, waiting, ends, ended: 0, waiting_bytes: 0, alike, uncompared: 0 }
    }

    fn last_use(&self, row: u32) -> Option<u32> {
        self.last_use.binary_search_by_key(&row, |(used, _)| *used).ok().map(|at| self.last_use[at].1)
    }

    /// Whether nothing has to be read again.
    pub fn is_empty(&self) -> bool {
        self.candidates.pairs.is_empty()
    }

    /// Whether a row is one of a pair.
    pub fn needs(&self, row: u32) -> bool {
        self.last_use(row).is_some()
    }

    /// The next row that [`Comparison::needs`], with its runs.
    pub fn row(&mut self, row: u32, grams: Vec<u64>, part: impl Fn(u32) -> Part) {
        let pairs = &self.candidates.pairs;
        let from = pairs.partition_point(|pair| pair.0 < row);
        for (_, earlier) in pairs[from..].iter().take_while(|pair| pair.0 == row) {
            match self.waiting.get(earlier) {
                Some(others) => {
                    let similarity = jaccard(&grams, others);
                    if similarity >= SIMILAR {
                        self.alike.take(row, *earlier, similarity, &part);
                        self.candidates.cut.remove(&row);
                    }
                }
                None => self.uncompared += 1,
            }
        }
        while let Some((_, done)) = self.ends.get(self.ended).filter(|(last, _)| *last <= row) {
            if let Some(grams) = self.waiting.remove(done) {
                self.waiting_bytes -= bytes(&grams);
            }
            self.ended += 1;
        }
        let waits = self.last_use(row).is_some_and(|last| last > row);
        if waits && self.waiting_bytes + bytes(&grams) <= WAITING_BYTES_MAX {
            self.waiting_bytes += bytes(&grams);
            self.waiting.insert(row, grams);
        }
    }

    /// Whether pairs were left out of rows that are like none of those with which they were compared.
    pub fn is_cut(&self) -> bool {
        self.uncompared > 0 || !self.candidates.cut.is_empty()
    }
}

/// Of each row the largest value.
fn keep_last(values: &mut Vec<(u32, u32)>) {
    values.sort_unstable();
    let mut at = 0;
    for i in 0..values.len() {
        if values.get(i + 1).is_none_or(|next| next.0 != values[i].0) {
            values[at] = values[i];
            at += 1;
        }
    }
    values.truncate(at);
}

fn bytes(grams: &[u64]) -> usize {
    size_of_val(grams) + 64
}

/// What two sorted sets have in common, over what either has.
fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut common) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j, common) = (i + 1, j + 1, common + 1),
        }
    }
    common as f64 / (a.len() + b.len() - common).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::records::Records;
    use super::*;

    /// Sets of 50 of which `common` are shared.
    fn pair(seed: u64, common: u64) -> (Vec<u64>, Vec<u64>) {
        let value = |number: u64| super::super::said::hash(&(seed, number));
        let mut a: Vec<u64> = (0..50).map(value).collect();
        let mut b: Vec<u64> = (50 - common..100 - common).map(value).collect();
        a.sort_unstable();
        b.sort_unstable();
        (a, b)
    }

    #[test]
    fn what_is_alike_shares_a_band_and_little_else_does() {
        // 45 of 55 is 0.82, 22 of 78 is 0.28.
        for (common, least, most) in [(45, 0.99, 1.0), (22, 0.0, 0.2)] {
            let shares = |seed: &u64| {
                let (a, b) = pair(*seed, common);
                let (a, b) = (bands(&a).unwrap(), bands(&b).unwrap());
                a.iter().zip(b).any(|(a, b)| *a == b)
            };
            let share = (0..2000).filter(shares).count() as f64 / 2000.0;
            assert!((least..=most).contains(&share), "{common} of 50 in common: {share}");
        }
        assert_eq!(bands(&[]), None);
    }

    #[test]
    fn candidates_are_compared_exactly_and_wait_no_longer_than_they_are_needed() {
        let sets: Vec<Vec<u64>> = (0..300)
            .map(|row| {
                let (a, b) = pair(row / 3, if row % 3 == 1 { 46 } else { 20 });
                if row % 3 == 0 { a } else { b }
            })
            .collect();
        let candidates = |held: usize| {
            let mut list = Records::default();
            for (set, row) in sets.iter().zip(0..) {
                list.push_beyond(held, banded(row, &bands(set).unwrap())).unwrap();
            }
            candidates(&list.finish().unwrap(), |_| true, |_| Part::Train)
        };
        // Wherever bands lie.
        assert_eq!(candidates(usize::MAX).pairs, candidates(0).pairs);
        let mut comparison = Comparison::new(candidates(113));
        for (row, set) in sets.iter().enumerate() {
            if comparison.needs(row as u32) {
                comparison.row(row as u32, set.clone(), |_| Part::Train);
            }
        }
        let expected: Vec<(u32, u32)> = (0..300)
            .flat_map(|row: u32| (0..row).map(move |earlier| (row, earlier)))
            .filter(|(row, earlier)| jaccard(&sets[*row as usize], &sets[*earlier as usize]) >= SIMILAR)
            .collect();
        assert!(comparison.waiting.is_empty() && comparison.waiting_bytes == 0 && !comparison.is_cut());
        let [found, leaks] = comparison.alike.into_lists();
        let found: Vec<(u32, u32)> = found.iter().map(|alike| (alike.row, alike.other)).collect();
        assert_eq!(found, expected);
        assert!(expected.len() == 100 && leaks.is_empty());
    }

    #[test]
    fn a_row_is_told_beside_the_one_that_is_most_like_it() {
        let part = |row| if [2, 5].contains(&row) { Part::HeldOut } else { Part::Train };
        let mut nearest = Nearest::default();
        // By the later row, as they are compared: of equal ones the first stays, and of both parts the held-out one is told.
        for (row, earlier, similarity) in [
            (1, 0, 0.8),
            (3, 0, 0.85),
            (3, 1, 0.9),
            (3, 2, 0.8),
            (4, 2, 0.9),
            (5, 0, 0.8),
            (5, 2, 0.95),
            (6, 3, 0.9),
            (6, 4, 0.9),
            (6, 2, 0.9),
        ] {
            nearest.take(row, earlier, similarity, part);
        }
        let alike = |(row, other, similarity)| Alike { row, other, similarity };
        let [in_part, leaks] = nearest.into_lists();
        assert_eq!(in_part, [(1, 0, 0.8), (3, 1, 0.9), (5, 2, 0.95), (6, 3, 0.9)].map(alike));
        assert_eq!(leaks, [(2, 4, 0.9), (5, 0, 0.8)].map(alike));
    }
}
