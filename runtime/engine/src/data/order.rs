//! The order in which examples are seen, and which of them are held back: functions of a seed, so that a resumed run
//! goes on where it stopped.

use anyhow::{Result, ensure};
use homeroom_kernels::Stream;

/// Streams of random numbers are told apart by what they are for; the epoch is added.
const EPOCH: u64 = u64::from_be_bytes(*b"epoch\0\0\0");
const SPLIT: u64 = u64::from_be_bytes(*b"split\0\0\0");
const MIX: u64 = u64::from_be_bytes(*b"mix\0\0\0\0\0");

/// The order of `n` examples in an epoch, counted from 0: shuffled, or as in the file.
pub fn epoch_order(n: usize, seed: u64, epoch: u64, shuffle: bool) -> Vec<u32> {
    let mut order: Vec<u32> = (0..numbered(n)).collect();
    if shuffle {
        Stream::new(seed, EPOCH.wrapping_add(epoch)).shuffle(&mut order);
    }
    order
}

/// Splits `n` rows into those to train on and those to evaluate on, each ascending: `eval_fraction` of them, rounded,
/// but at least one on each side.
///
/// # Errors
/// As [`held_out`].
pub fn split(n: usize, eval_fraction: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let eval = held_out(n, eval_fraction, seed)?;
    let mut held = eval.iter().peekable();
    let train = (0..n).filter(|row| held.next_if_eq(&row).is_none()).collect();
    Ok((train, eval))
}

/// How many rows there are: they are numbered in 32 bits, as their lines are.
fn numbered(n: usize) -> u32 {
    u32::try_from(n).expect("rows are numbered in 32 bits")
}

/// The rows of [`split`] to evaluate on, ascending. It takes four bytes a row meanwhile.
///
/// # Errors
/// When `eval_fraction` is not between 0 and 1, or there are fewer than two rows.
pub fn held_out(n: usize, eval_fraction: f64, seed: u64) -> Result<Vec<usize>> {
    ensure!(
        eval_fraction > 0.0 && eval_fraction < 1.0,
        "eval: {eval_fraction} is not a fraction of the rows, give a number between 0 and 1"
    );
    ensure!(
        n >= 2,
        "eval: {n} row(s) cannot be split into {eval_fraction} to evaluate on and the rest to train on, at least 2 are needed"
    );
    let held = ((n as f64 * eval_fraction).round() as usize).clamp(1, n - 1);
    let mut rows: Vec<u32> = (0..numbered(n)).collect();
    Stream::new(seed, SPLIT).shuffle(&mut rows);
    rows.truncate(held);
    rows.sort_unstable();
    Ok(rows.into_iter().map(|row| row as usize).collect())
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

/// `count` of the rows with these weights by chance, ascending: each drawn in proportion to its weight, at most once each or, with
/// `replace`, as often as it comes. A row of weight 0 is never drawn. Without `replace` there may be fewer rows with a weight; then it is all
/// of these.
///
/// Without replacement it is the largest of `ln(u) / w`: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir",
/// <https://doi.org/10.1016/j.ipl.2005.11.003>.
///
/// # Errors
/// When a weight is negative or not finite, or none is above 0.
pub fn weighted_sample(weights: &[f64], count: usize, seed: u64, replace: bool) -> Result<Vec<usize>> {
    let wrong = weights.iter().position(|weight| !weight.is_finite() || *weight < 0.0);
    if let Some(row) = wrong {
        anyhow::bail!("the weight of row {} is {}; it should be a number from 0", row + 1, weights[row]);
    }
    ensure!(weights.iter().any(|weight| *weight > 0.0), "no row has a weight above 0");
    let mut random = Stream::new(seed, MIX);
    let mut rows: Vec<usize> = match replace {
        true => {
            let mut total = 0.0;
            let sums: Vec<f64> = weights
                .iter()
                .map(|weight| {
                    total += weight;
                    total
                })
                .collect();
            // The first sum above the number: rows of weight 0 have the sum of the row before them.
            (0..count).map(|_| random.uniform() * total).map(|at| sums.partition_point(|sum| *sum <= at)).collect()
        }
        false => {
            let keyed = weights.iter().enumerate().map(|(row, weight)| (random.uniform().ln() / weight, row, *weight));
            let mut keyed: Vec<(f64, usize, f64)> = keyed.filter(|(_, _, weight)| *weight > 0.0).collect();
            keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
            keyed.into_iter().take(count).map(|(_, row, _)| row).collect()
        }
    };
    rows.sort_unstable();
    Ok(rows)
}

/// Which of several lists each place of a mixture is taken from, so that after every place each list has had its share as nearly as whole
/// rows allow: the list that is furthest behind is next, of equal ones the first. Shares are in proportion, all above 0. It never ends.
pub fn mixture(shares: &[f64]) -> impl Iterator<Item = usize> + use<> {
    let total: f64 = shares.iter().sum();
    let shares: Vec<f64> = shares.iter().map(|share| share / total).collect();
    let mut taken = vec![0.0; shares.len()];
    (1..).map(move |place: u64| {
        let behind = |list: usize| shares[list] * place as f64 - taken[list];
        let next = (1..shares.len()).fold(0, |best, list| if behind(list) > behind(best) { list } else { best });
        taken[next] += 1.0;
        next
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_permutation_of_its_own() {
        let sorted = |mut v: Vec<u32>| {
            v.sort_unstable();
            v
        };
        let first = epoch_order(57, 7, 0, true);
        assert_eq!(sorted(first.clone()), (0..57).collect::<Vec<u32>>());
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
        assert!(shuffled(57, 7).into_iter().ne(epoch_order(57, 7, 0, true).into_iter().map(|row| row as usize)));
    }

    #[test]
    fn a_split_that_cannot_be_names_its_numbers() {
        let message = |n, fraction| split(n, fraction, 0).unwrap_err().to_string();
        assert!(message(1, 0.1).contains("1 row(s) cannot be split into 0.1"));
        assert!(message(9, 1.0).contains("1 is not a fraction"));
        assert!(message(9, f64::NAN).contains("NaN is not a fraction"));
    }

    #[test]
    fn weighted_rows_come_in_proportion_and_those_without_a_weight_never() {
        let weights = [0.0, 1.0, 3.0, 0.0, 6.0];
        let mut counts = [0; 5];
        for row in weighted_sample(&weights, 10_000, 5, true).unwrap() {
            counts[row] += 1;
        }
        assert_eq!((counts[0], counts[3]), (0, 0));
        // 1000, 3000 and 6000; standard deviations 30, 46, 49.
        assert!((880..1120).contains(&counts[1]) && (2820..3180).contains(&counts[2]), "{counts:?}");
        let mut first = [0; 5];
        for seed in 0..5000 {
            let drawn = weighted_sample(&weights, 1, seed, false).unwrap();
            first[drawn[0]] += 1;
        }
        assert!((420..580).contains(&first[1]) && (1370..1630).contains(&first[2]), "{first:?}");
        assert_eq!(weighted_sample(&weights, 9, 1, false).unwrap(), [1, 2, 4]);
        for wrong in [[0.0, 0.0], [1.0, -1.0], [f64::NAN, 1.0], [1.0, f64::INFINITY]] {
            assert!(weighted_sample(&wrong, 1, 1, true).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_mixture_has_its_shares_at_every_place() {
        let shares = [5.0, 2.0, 0.5];
        let mut counts = [0.0; 3];
        for (place, list) in mixture(&shares).take(1000).enumerate() {
            counts[list] += 1.0;
            for (count, share) in counts.iter().zip(shares) {
                let behind: f64 = share / 7.5 * (place + 1) as f64 - count;
                assert!(behind.abs() < 1.5, "{behind} at {place}");
            }
        }
        assert_eq!(mixture(&[1.0, 1.0]).take(4).collect::<Vec<_>>(), [0, 1, 0, 1]);
    }
}
