//! Direct preference optimisation: the better of two answers becomes likelier than the worse one, as against a reference.

use anyhow::{Context, Result};

use super::{Objective, RewardSums, UnitLogProbs, Weighed, log_sigmoid, sigmoid, sum};

/// `−1/N Σ log σ(h)` over N pairs, `h = β [(c − c₀) − (r − r₀)]`, where c and r are the log-probabilities of the chosen answer and of the
/// rejected one, and c₀ and r₀ those under the reference.
///
/// `∂(−log σ(h))/∂c = −β σ(−h)` and the opposite for r, so that each token of the chosen answer weighs `β σ(−h) / N`, and each of the
/// rejected one `−β σ(−h) / N`. The reward of an answer is β times its log-probability over the reference's.
///
/// Source: Rafailov et al. 2023, <https://arxiv.org/abs/2305.18290>, equation 7. TRL's `loss_type="sigmoid"`.
#[derive(Clone, Debug)]
pub struct Dpo {
    /// How closely the reference is kept to; more: closer.
    pub beta: f64,
    /// By a unit's number, the log-probabilities of the chosen answer and of the rejected one under the reference.
    pub reference: Vec<[f64; 2]>,
}

impl Objective for Dpo {
    fn name(&self) -> &'static str {
        "dpo"
    }

    fn count(&self, targets: &[Vec<usize>]) -> usize {
        targets.len()
    }

    fn weigh(&self, units: &[UnitLogProbs<'_>], n: usize, _: f64) -> Result<Weighed> {
        let (mut weighed, mut rewards) = (Weighed::default(), RewardSums::default());
        for unit in units {
            let [chosen, rejected] = unit.pair()?;
            let reference = self.reference.get(unit.number as usize);
            let reference = reference.with_context(|| format!("unit {} has no reference", unit.number))?;
            let [good, bad] = [sum(chosen) - reference[0], sum(rejected) - reference[1]].map(|ratio| self.beta * ratio);
            let h = good - bad;
            let weight = self.beta * sigmoid(-h) / n as f64;
            weighed.add(chosen.len(), weight);
            weighed.add(rejected.len(), -weight);
            weighed.loss_sum -= log_sigmoid(h);
            rewards.add_pair(good, bad);
        }
        weighed.rewards = Some(rewards);
        Ok(weighed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_weights, pairs};
    use super::*;

    #[test]
    fn weights_are_the_derivatives_of_the_loss() -> Result<()> {
        let reference = vec![[-3.0, -1.0], [-0.5, -7.0], [-2.0, -2.5]];
        check_weights(&Dpo { beta: 0.7, reference: reference.clone() }, &pairs(), 0.0)?;
        // Margins that the sigmoid cannot tell from 0 and 1 have losses and weights that are finite.
        let far = reference.iter().map(|[a, b]| [a - 4000.0, b + 4000.0]).collect();
        check_weights(&Dpo { beta: 0.7, reference: far }, &pairs(), 0.0)
    }

    /// A model that is its reference: σ(0) is a half, whatever the answers.
    #[test]
    fn without_a_difference_the_loss_is_ln_2() -> Result<()> {
        let (chosen, rejected) = (vec![-1.0, -2.0], vec![-0.25]);
        let unit = UnitLogProbs { number: 0, sequences: vec![&chosen, &rejected] };
        let weighed = Dpo { beta: 0.1, reference: vec![[-3.0, -0.25]] }.weigh(&[unit], 1, 0.0)?;
        assert!((weighed.loss_sum - 2f64.ln()).abs() < 1e-15);
        assert_eq!(weighed.weights, [0.05, 0.05, -0.05]);
        assert_eq!(weighed.rewards.unwrap_or_default().right, (0, 1), "no better is not right");
        Ok(())
    }
}
