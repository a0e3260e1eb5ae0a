//! Lengths, counted: memory is that of the distinct ones.

use std::collections::BTreeMap;

use serde::Serialize;

/// How many things have which length.
#[derive(Clone, Debug, Default)]
pub struct Lengths(BTreeMap<usize, usize>);

/// A bar of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// The least length of it.
    pub from: usize,
    /// The most.
    pub to: usize,
    /// How many there are.
    pub count: usize,
}

/// What lengths come to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many were counted.
    pub count: usize,
    /// Their sum.
    pub total: usize,
    /// The least.
    pub min: usize,
    /// The middle one.
    pub median: usize,
    /// The one that 95 % do not exceed.
    pub p95: usize,
    /// The most.
    pub max: usize,
    /// In bars that double from one to the next.
    pub histogram: Vec<Bin>,
}

impl Lengths {
    /// Counts one.
    pub fn add(&mut self, length: usize) {
        *self.0.entry(length).or_default() += 1;
    }

    /// What they come to; `None`: there are none.
    pub fn summary(&self) -> Option<Summary> {
        let (min, max) = (*self.0.keys().next()?, *self.0.keys().next_back()?);
        let count = self.0.values().sum();
        // Nearest rank.
        let quantile = |share: f64| {
            let rank = ((share * count as f64).ceil() as usize).max(1);
            let mut passed = 0;
            let at = |(_, count): &(&usize, &usize)| {
                passed += *count;
                passed >= rank
            };
            self.0.iter().find(at).map_or(max, |(length, _)| *length)
        };
        let mut histogram: Vec<Bin> = Vec::new();
        for (length, count) in &self.0 {
            let from = if *length < 8 { 0 } else { 1 << length.ilog2() };
            match histogram.last_mut().filter(|bin| bin.from == from) {
                Some(bin) => bin.count += count,
                None => histogram.push(Bin { from, to: (2 * from).max(8) - 1, count: *count }),
            }
        }
        let total = self.0.iter().map(|(length, count)| length * count).sum();
        Some(Summary { count, total, min, median: quantile(0.5), p95: quantile(0.95), max, histogram })
    }
}

impl FromIterator<usize> for Lengths {
    fn from_iter<I: IntoIterator<Item = usize>>(lengths: I) -> Self {
        let mut counted = Self::default();
        lengths.into_iter().for_each(|length| counted.add(length));
        counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_lengths_that_there_are() {
        let lengths: Lengths = (1..=100).chain([5000]).collect();
        let summary = lengths.summary().unwrap();
        let Summary { count, total, min, median, p95, max, histogram } = summary;
        assert_eq!((count, total, min, median, p95, max), (101, 10_050, 1, 51, 96, 5000));
        let bins: Vec<(usize, usize, usize)> = histogram.iter().map(|bin| (bin.from, bin.to, bin.count)).collect();
        assert_eq!(bins, [(0, 7, 7), (8, 15, 8), (16, 31, 16), (32, 63, 32), (64, 127, 37), (4096, 8191, 1)]);
        assert_eq!(Lengths::default().summary(), None);
        let one: Lengths = [7].into_iter().collect();
        assert_eq!(one.summary().map(|summary| (summary.median, summary.p95)), Some((7, 7)));
    }
}
