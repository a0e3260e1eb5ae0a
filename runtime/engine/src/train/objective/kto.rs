//! Kahneman-Tversky optimisation: answers that were rated good become likelier, those rated bad less likely, one by one.

use anyhow::{Context, Result};

use super::{LogProbsOf, Objective, RewardSums, UnitLogProbs, Weighed, sigmoid, sum};
use crate::data::{Example, Group};

/// `1/N Σ λ (1 − σ(±β (s − s₀ − z)))` over N rated answers, + and λ = `desirable_weight` for a good one, − and `undesirable_weight` for a
/// bad one. s and s₀ are the answer's log-probabilities under the model and under the reference.
///
/// z, the reference point, estimates how far the model is from the reference at all: the mean of `s′ − s′₀` over the step's prompts with
/// answers that belong to others ([`mismatched`]), no less than 0. It is a constant of the step.
///
/// With `u = ±β (s − s₀ − z)`, `∂(1 − σ(u))/∂s = ∓β σ(u) σ(−u)`, so that each token of an answer weighs `±λ β σ(u) σ(−u) / N`.
///
/// Source: Ethayarajh et al. 2024, <https://arxiv.org/abs/2402.01306>, equation 7.
#[derive(Clone, Debug)]
pub struct Kto {
    /// How closely the reference is kept to; more: closer.
    pub beta: f64,
    /// What the losses of good answers are multiplied by.
    pub desirable_weight: f64,
    /// The same of bad ones.
    pub undesirable_weight: f64,
    /// By a unit's number, whether its answer is a good one.
    pub labels: Vec<bool>,
    /// By a unit's number, the answer's log-probability under the reference.
    pub reference: Vec<f64>,
    /// By a unit's number, its prompt with an answer that belongs to another.
    pub mismatched: Vec<Example>,
    /// By a unit's number, the log-probability of that answer under the reference.
    pub mismatched_reference: Vec<f64>,
}

impl Objective for Kto {
    fn name(&self) -> &'static str {
        "kto"
    }

    fn loss_unit(&self) -> f64 {
        self.desirable_weight.max(self.undesirable_weight)
    }

    fn count(&self, targets: &[Vec<usize>]) -> usize {
        targets.len()
    }

    /// The reference point z.
    fn before(&self, units: &[u32], log_probs: &mut LogProbsOf<'_>) -> Result<f64> {
        let unknown = |unit: u32| format!("unit {unit} is not known");
        let example = |unit: &u32| Ok((*unit, self.mismatched.get(*unit as usize).with_context(|| unknown(*unit))?));
        let examples = units.iter().map(example).collect::<Result<Vec<_>>>()?;
        let mut total = 0.0;
        for (unit, log_prob) in units.iter().zip(log_probs(&examples)?) {
            let reference = self.mismatched_reference.get(*unit as usize);
            total += log_prob - reference.with_context(|| unknown(*unit))?;
        }
        Ok((total / units.len().max(1) as f64).max(0.0))
    }

    fn weigh(&self, units: &[UnitLogProbs<'_>], n: usize, point: f64) -> Result<Weighed> {
        let (mut weighed, mut rewards) = (Weighed::default(), RewardSums::default());
        for unit in units {
            let answer = unit.single()?;
            let number = unit.number as usize;
            let known = self.labels.get(number).zip(self.reference.get(number));
            let (label, reference) = known.with_context(|| format!("unit {number} has no label and reference"))?;
            let ratio = sum(answer) - reference;
            let (sign, lambda) = if *label { (1.0, self.desirable_weight) } else { (-1.0, self.undesirable_weight) };
            let u = sign * self.beta * (ratio - point);
            weighed.add(answer.len(), sign * lambda * self.beta * sigmoid(u) * sigmoid(-u) / n as f64);
            weighed.loss_sum += lambda * sigmoid(-u);
            rewards.add_rated(*label, self.beta * ratio, self.beta * point);
        }
        weighed.rewards = Some(rewards);
        Ok(weighed)
    }
}

/// For each group its prompt with the answer of the group before it, the first of each `per_step` with that of the last, cut to
/// `longest` tokens.
///
/// So the answers of a step that takes groups in their order are those of its reference point, as in TRL, whose batch a step is here.
/// Where each epoch is shuffled, a group keeps its answer: it is one of another prompt all the same, and its log-probability under the
/// reference is known before the first step. A group alone in the last step gets that of the group before it, where there is one.
pub fn mismatched(groups: &[&Group], per_step: usize, longest: usize) -> Vec<Example> {
    let mut out = Vec::with_capacity(groups.len());
    let mut first = 0;
    for step in groups.chunks(per_step.max(1)) {
        for place in 0..step.len() {
            let own = first + place;
            let other = match (place, step.len()) {
                (0, 1) => own.saturating_sub(1),
                (0, len) => first + len - 1,
                _ => own - 1,
            };
            out.push(spliced(groups[own], groups[other], longest));
        }
        first += step.len();
    }
    out
}

/// The prompt of one group and the answer of another.
fn spliced(asked: &Group, answered: &Group, longest: usize) -> Example {
    let (asked, answered) = (&asked.sequences[0], &answered.sequences[0]);
    let (prompt, from) = (asked.prompt(), answered.prompt());
    let mut ids = [&asked.ids[..prompt], &answered.ids[from..]].concat();
    let mut trained = [&asked.trained[..prompt], &answered.trained[from..]].concat();
    // A prompt that fills what the model can read keeps its own answer's first token.
    let longest = longest.max(prompt + 1);
    ids.truncate(longest);
    trained.truncate(longest);
    Example::new(ids, trained, asked.line())
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_weights;
    use super::*;

    fn kto() -> Kto {
        let example = Example::new(vec![1, 2], vec![false, true], 1);
        Kto {
            beta: 0.6,
            desirable_weight: 1.5,
            undesirable_weight: 0.75,
            labels: vec![true, false, true, false],
            reference: vec![-4.0, -1.0, -9.0, -2.0],
            mismatched: vec![example; 4],
            mismatched_reference: vec![-1.0, -2.0, -4.0, -8.0],
        }
    }

    fn units() -> Vec<Vec<Vec<f64>>> {
        vec![vec![vec![-1.0, -0.5, -2.0]], vec![vec![-3.0]], vec![vec![-0.1, -7.0]], vec![vec![-0.2, -0.3, -0.4, -0.1]]]
    }

    #[test]
    fn weights_are_the_derivatives_of_the_loss() -> Result<()> {
        for point in [0.0, 0.8, 5.0] {
            check_weights(&kto(), &units(), point)?;
        }
        Ok(())
    }

    /// Hand-made: ratios 0.5, 1, −1.5, 2 of which the mean is 0.5; of the last two 0.25; of the third alone below 0.
    #[test]
    fn the_reference_point_is_a_mean_over_the_steps_units_and_never_below_0() -> Result<()> {
        let kto = kto();
        let of = |units: &[u32]| {
            kto.before(units, &mut |examples| {
                let ratios = [0.5, 1.0, -1.5, 2.0];
                Ok(examples
                    .iter()
                    .map(|(unit, _)| kto.mismatched_reference[*unit as usize] + ratios[*unit as usize])
                    .collect())
            })
        };
        assert_eq!(of(&[0, 1, 2, 3])?, 0.5);
        assert_eq!(of(&[3, 2])?, 0.25);
        assert_eq!(of(&[2])?, 0.0);
        assert!(of(&[4]).is_err());
        Ok(())
    }

    #[test]
    fn answers_are_passed_on_within_a_step_and_a_last_one_alone_takes_the_one_before() {
        let group = |prompt: &[u32], answer: &[u32]| {
            let trained = (0..prompt.len() + answer.len()).map(|t| t >= prompt.len()).collect();
            Group::new(vec![Example::new([prompt, answer].concat(), trained, 1)], Some(true))
        };
        let groups = [group(&[1], &[11]), group(&[2, 2], &[12, 12]), group(&[3], &[13, 13, 13]), group(&[4], &[14])];
        let groups: Vec<&Group> = groups.iter().collect();
        let ids = |per_step, longest| -> Vec<Vec<u32>> {
            mismatched(&groups, per_step, longest).into_iter().map(|example| example.ids.to_vec()).collect()
        };
        assert_eq!(ids(4, 9), [vec![1, 14], vec![2, 2, 11], vec![3, 12, 12], vec![4, 13, 13, 13]]);
        assert_eq!(ids(3, 9), [vec![1, 13, 13, 13], vec![2, 2, 11], vec![3, 12, 12], vec![4, 13, 13, 13]]);
        assert_eq!(ids(4, 2), [vec![1, 14], vec![2, 2, 11], vec![3, 12], vec![4, 13]]);
        let first = &mismatched(&groups, 4, 9)[1];
        assert_eq!(first.trained, [false, false, true]);
    }
}
