//! The one place where gradients of passes become one.
//!
//! A leaf is the gradient of one pass, its index the place of that pass in the cut of the whole step. Leaves are added as a binary
//! counter adds: two neighbours make a node, two neighbouring nodes the next, and what is left over at the end is added from the
//! right. So which worker ran which pass, and when it ended, changes no bit of the sum. A step of one pass is its leaf.
//!
//! In the order of the cut, as one process has it, at most ⌊log₂ n⌋ + 1 gradients exist at once for n passes; with leaves that come in
//! another order, up to n.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::run::gradients::Gradients;

/// The sum of the gradients of a step's passes, in the making.
pub struct Reduce {
    passes: usize,
    pushed: usize,
    /// Nodes that wait for a neighbour, by (level, place): that at (l, p) is the sum of the leaves p·2ˡ to (p + 1)·2ˡ − 1.
    nodes: BTreeMap<(u32, usize), Gradients>,
}

impl Reduce {
    /// Nothing yet, of so many passes.
    pub fn new(passes: usize) -> Self {
        Self { passes, pushed: 0, nodes: BTreeMap::new() }
    }

    /// Takes the gradient of the pass with this index, in any order.
    ///
    /// # Errors
    /// When the pass is none of the step or was taken before, or gradients are of different parameters.
    pub fn push(&mut self, index: usize, leaf: Gradients) -> Result<()> {
        ensure!(index < self.passes, "pass {index} is none of the {} of this step", self.passes);
        self.pushed += 1;
        let (mut level, mut place, mut sum) = (0, index, leaf);
        loop {
            ensure!(!self.nodes.contains_key(&(level, place)), "pass {index} was taken before");
            let Some(neighbour) = self.nodes.remove(&(level, place ^ 1)) else { break };
            sum = if place & 1 == 0 { sum.plus(neighbour)? } else { neighbour.plus(sum)? };
            (level, place) = (level + 1, place / 2);
        }
        self.nodes.insert((level, place), sum);
        Ok(())
    }

    /// The sum of all leaves.
    ///
    /// # Errors
    /// When a pass is missing.
    pub fn finish(self) -> Result<Gradients> {
        ensure!(self.pushed == self.passes, "{} of {} passes are missing", self.passes - self.pushed, self.passes);
        // By their first leaves: the nodes that are left get smaller from left to right.
        let mut left: Vec<((u32, usize), Gradients)> = self.nodes.into_iter().collect();
        left.sort_by_key(|((level, place), _)| place << level);
        let mut sum: Option<Gradients> = None;
        for (_, node) in left.into_iter().rev() {
            sum = Some(match sum {
                Some(right) => node.plus(right)?,
                None => node,
            });
        }
        sum.context("a step has a pass")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    /// The gradient of a pass: two parameters of odd sizes, one of which some passes do not reach; values of all sizes, so that the
    /// order of additions shows in the bits.
    fn leaf(index: usize) -> Result<Gradients> {
        let mut stream = homeroom_kernels::Stream::new(7, index as u64);
        let mut values = |count: usize| -> Vec<f32> {
            (0..count).map(|_| (stream.normal() * 10f64.powf(4.0 * stream.uniform())) as f32).collect()
        };
        let mut gradients = Gradients::new(2);
        gradients.add_values(0, values(33), &[11, 3])?;
        if index % 3 != 1 {
            gradients.add_values(1, values(7), &[7])?;
        }
        Ok(gradients)
    }

    fn bits(gradients: &Gradients) -> Result<Vec<u32>> {
        let mut bits = Vec::new();
        for tensor in (0..2).filter_map(|param| gradients.get(param)) {
            bits.extend(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        }
        Ok(bits)
    }

    /// Workers in one process that are dealt passes unevenly: the first takes half, and the others what is left, by chance.
    #[test]
    fn any_number_of_workers_sums_to_the_same_bytes() -> Result<()> {
        for passes in [1, 2, 3, 5, 8, 13, 23] {
            let mut alone = Reduce::new(passes);
            (0..passes).try_for_each(|index| alone.push(index, leaf(index)?))?;
            let alone = bits(&alone.finish()?)?;
            for workers in [1, 2, 3, 5, 20] {
                let mut order: Vec<usize> = (0..passes).collect();
                homeroom_kernels::Stream::new(3, workers as u64).shuffle(&mut order);
                let (first, rest) = order.split_at(if workers == 1 { passes } else { passes / 2 });
                let mut dealt = vec![first.to_vec()];
                dealt.extend((1..workers).map(|worker| {
                    rest.iter().skip(worker - 1).step_by((workers - 1).max(1)).copied().collect::<Vec<_>>()
                }));
                let reduce = Mutex::new(Reduce::new(passes));
                std::thread::scope(|scope| {
                    let work = |mine: &Vec<usize>| -> Result<()> {
                        for index in mine {
                            let leaf = leaf(*index)?;
                            reduce.lock().unwrap_or_else(PoisonError::into_inner).push(*index, leaf)?;
                        }
                        Ok(())
                    };
                    let threads: Vec<_> = dealt.iter().map(|mine| scope.spawn(move || work(mine))).collect();
                    threads.into_iter().try_for_each(|thread| thread.join().expect("a worker panicked"))
                })?;
                let sum = reduce.into_inner().unwrap_or_else(PoisonError::into_inner).finish()?;
                assert_eq!(bits(&sum)?, alone, "{passes} passes, {workers} workers");
            }
        }
        Ok(())
    }

    #[test]
    fn one_pass_is_its_own_sum_and_three_are_added_in_order() -> Result<()> {
        let mut one = Reduce::new(1);
        one.push(0, leaf(0)?)?;
        assert_eq!(bits(&one.finish()?)?, bits(&leaf(0)?)?);
        let mut three = Reduce::new(3);
        (0..3).try_for_each(|index| three.push(index, leaf(index)?))?;
        let by_hand = leaf(0)?.plus(leaf(1)?)?.plus(leaf(2)?)?;
        assert_eq!(bits(&three.finish()?)?, bits(&by_hand)?);
        Ok(())
    }

    #[test]
    fn a_pass_that_is_missing_or_comes_twice_is_refused() -> Result<()> {
        let mut reduce = Reduce::new(3);
        reduce.push(2, leaf(2)?)?;
        assert!(reduce.push(2, leaf(2)?).is_err());
        assert!(reduce.push(3, leaf(3)?).is_err());
        let mut reduce = Reduce::new(3);
        reduce.push(2, leaf(2)?)?;
        let missing = reduce.finish().err().map(|error| error.to_string());
        assert_eq!(missing.as_deref(), Some("2 of 3 passes are missing"));
        Ok(())
    }
}
