//! The order in which examples are seen, and which of them are held back: functions of a seed, so that a resumed run
//! goes on where it stopped.

use anyhow::{Result, ensure};
use homeroom_kernels::Stream;

/// Streams of random numbers are told apart by what they are for; the epoch is added.
const EPOCH: u64 = u64::from_be_bytes(*b"epoch\0\0\0");
const SPLIT: u64 = u64::from_be_bytes(*b"split\0\0\0");
const MIX: u64 = u64::from_be_bytes(*b"mix\0\0\0\0\0");

/// The order of `n` examples in an epoch, counted from 0: shuffled, or as in the file.
pub fn epoch_order(n: usize, seed: u64, epoch: u64, shuffle: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if shuffle {
        Stream::new(seed, EPOCH.wrapping_add(epoch)).shuffle(&mut order);
    }
    order
}

/// Splits `n` rows into those to train on and those to evaluate on, each ascending: `eval_fraction` of them, rounded,
/// but at least one on each side.
///
/// # Errors
/// When `eval_fraction` is not between 0 and 1, or there are fewer than two rows.
pub fn split(n: usize, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    ensure!(
        eval_fraction > 0.0 && eval_fraction < 1.0,
        "eval: {eval_fraction} is not a fraction of the rows, give a number between 0 and 1"
    );
    ensure!(
        n >= 2,
        "eval: {n} row(s) cannot be split into {eval_fraction} to evaluate on and the rest to train on, at least 2 are needed"
    );
    let held = ((n as f64 * eval_fraction).round() as usize).clamp(1, n - 1);
    let mut rows: Vec<usize> = (0..n).collect();
    Stream::new(seed, SPLIT).shuffle(&mut rows);
    let mut train = rows.split_off(held);
    train.sort_unstable();
    rows.sort_unstable();
    Ok((train, rows))
}

/// A shuffled order of `n` rows, unlike that of any epoch.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..n).collect();
    Stream::new(seed, MIX).shuffle(&mut rows);
    rows
}

/// `count` of `n` rows by chance, or all if there are no more, ascending.
pub fn sample(n: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut rows = shuffled(n, seed);
    rows.truncate(count);
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_permutation_of_its_own() {
        let sorted = |mut v: Vec<usize>| {
            v.sort_unstable();
            v
        };
        let first = epoch_order(57, 7, 0, true);
        assert_eq!(sorted(first.clone()), (0..57).collect::<Vec<_>>());
        assert_eq!(first, epoch_order(57, 7, 0, true));
        assert_ne!(first, epoch_order(57, 7, 1, true));
        assert_ne!(first, epoch_order(57, 8, 0, true));
        assert_eq!(epoch_order(5, 7, 3, false), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn every_place_is_as_likely_for_the_first_row() {
        let mut places = [0; 5];
        for seed in 0..5000 {
            let order = epoch_order(5, seed, 0, true);
            places[order.iter().position(|&i| i == 0).unwrap()] += 1;
        }
        // 1000 each, standard deviation 28.
        assert!(places.iter().all(|&n| (880..1120).contains(&n)), "{places:?}");
    }

    #[test]
    fn a_split_parts_all_rows_and_leaves_one_on_each_side() {
        for (n, fraction, held) in [(10, 0.1, 1), (57, 0.25, 14), (3, 0.01, 1), (2, 0.99, 1)] {
            let (train, eval) = split(n, fraction, 5).unwrap();
            assert_eq!(eval.len(), held, "{n} rows, {fraction}");
            let mut all = [train.clone(), eval].concat();
            all.sort_unstable();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
            assert!(train.is_sorted());
        }
        assert_ne!(split(57, 0.25, 5).unwrap(), split(57, 0.25, 6).unwrap());
    }

    #[test]
    fn a_sample_draws_each_row_at_most_once_and_no_more_than_there_are() {
        for (n, count, drawn) in [(57, 9, 9), (5, 5, 5), (5, 8, 5), (0, 3, 0)] {
            let rows = sample(n, count, 7);
            assert_eq!(rows.len(), drawn);
            assert!(rows.is_sorted_by(|a, b| a < b) && rows.iter().all(|row| *row < n));
        }
        assert_ne!(sample(57, 9, 7), sample(57, 9, 8));
        assert_ne!(shuffled(57, 7), epoch_order(57, 7, 0, true));
    }

    #[test]
    fn a_split_that_cannot_be_names_its_numbers() {
        let message = |n, fraction| split(n, fraction, 0).unwrap_err().to_string();
        assert!(message(1, 0.1).contains("1 row(s) cannot be split into 0.1"));
        assert!(message(9, 1.0).contains("1 is not a fraction"));
        assert!(message(9, f64::NAN).contains("NaN is not a fraction"));
    }
}
