//! Odds ratio preference optimisation: the better of two answers is learned, and its odds rise over those of the worse one. There is no
//! reference.

use anyhow::{Context, Result};

use super::{LogProbsOf, Objective, RewardSums, UnitLogProbs, Weighed, log_sigmoid, sigmoid, sum};
use crate::data::Group;

/// Highest mean log-probability of a token: at 0 the odds are infinite.
const MEAN_MAX: f64 = -1e-9;

/// `1/T Σ −log pᵢ − β/N Σ log σ(h)`: the cross-entropy of the T tokens of all chosen conversations, prompts included, and over N pairs the
/// log odds ratio `h = log odds(a) − log odds(b)`, `log odds(x) = x − log(1 − eˣ)`. a and b are the mean log-probabilities of a token of
/// the chosen answer and of the rejected one.
///
/// `∂ log odds(x)/∂x = 1 / (1 − eˣ)`. So of m tokens of a chosen answer each weighs `1/T + β σ(−h) / ((1 − eᵃ) m N)`, of m of a rejected one
/// `−β σ(−h) / ((1 − eᵇ) m N)`, and those of the chosen one's prompt `1/T`.
///
/// Source: Hong et al. 2024, <https://arxiv.org/abs/2403.07691>, equations 4, 6 and 7. The prompt is learned too, as in its authors' code and in
/// TRL.
#[derive(Clone, Debug)]
pub struct Orpo {
    /// What the odds ratio weighs beside the cross-entropy.
    pub beta: f64,
    /// By a unit's number, how many targets its chosen conversation has, and how many of them are the prompt's.
    pub chosen: Vec<(usize, usize)>,
}

impl Orpo {
    /// For groups whose prompts [`Orpo::learn_prompts`] has made targets.
    pub fn new<'s>(beta: f64, groups: impl IntoIterator<Item = &'s Group>) -> Self {
        let counts = |group: &Group| {
            let chosen = &group.sequences[0];
            let targets = chosen.trained.iter().filter(|trained| **trained).count();
            (targets, chosen.prompt().saturating_sub(1))
        };
        Self { beta, chosen: groups.into_iter().map(counts).collect() }
    }

    /// Makes the prompt of the chosen conversation a target, but for its first token, which nothing predicts.
    pub fn learn_prompts(group: &mut Group) {
        let chosen = &mut group.sequences[0];
        let prompt = chosen.prompt();
        chosen.trained[..prompt].iter_mut().skip(1).for_each(|trained| *trained = true);
    }

    fn of(&self, unit: u32) -> Result<(usize, usize)> {
        self.chosen.get(unit as usize).copied().with_context(|| format!("unit {unit} is not known"))
    }
}

impl Objective for Orpo {
    fn name(&self) -> &'static str {
        "orpo"
    }

    fn count(&self, targets: &[Vec<usize>]) -> usize {
        targets.len()
    }

    /// T.
    fn before(&self, units: &[u32], _: &mut LogProbsOf<'_>) -> Result<f64> {
        let counts = units.iter().map(|unit| Ok(self.of(*unit)?.0)).collect::<Result<Vec<_>>>()?;
        Ok(counts.iter().sum::<usize>() as f64)
    }

    fn weigh(&self, units: &[UnitLogProbs<'_>], n: usize, tokens: f64) -> Result<Weighed> {
        let (mut weighed, mut rewards) = (Weighed::default(), RewardSums::default());
        let n = n as f64;
        for unit in units {
            let [chosen, rejected] = unit.pair()?;
            let (prompt, answer) = chosen.split_at_checked(self.of(unit.number)?.1).context("a prompt is too short")?;
            let mean = |answer: &[f64]| (sum(answer) / answer.len().max(1) as f64).min(MEAN_MAX);
            let (a, b) = (mean(answer), mean(rejected));
            // 1 − eˣ.
            let [rest_a, rest_b] = [a, b].map(|x| -x.exp_m1());
            let h = (a - rest_a.ln()) - (b - rest_b.ln());
            let pull = self.beta * sigmoid(-h) / n;
            weighed.add(prompt.len(), 1.0 / tokens);
            weighed.add(answer.len(), 1.0 / tokens + pull / (rest_a * answer.len() as f64));
            weighed.add(rejected.len(), -pull / (rest_b * rejected.len() as f64));
            // The loop divides by N.
            weighed.loss_sum += -sum(chosen) / tokens * n - self.beta * log_sigmoid(h);
            rewards.add_pair(self.beta * a, self.beta * b);
        }
        weighed.rewards = Some(rewards);
        Ok(weighed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_weights, pairs};
    use super::*;
    use crate::data::Example;

    #[test]
    fn weights_are_the_derivatives_of_the_loss() -> Result<()> {
        let orpo = Orpo { beta: 0.9, chosen: vec![(3, 1), (1, 0), (4, 2)] };
        let tokens = orpo.before(&[0, 1, 2], &mut |_| unreachable!("orpo has no reference"))?;
        assert_eq!(tokens, 8.0);
        check_weights(&orpo, &pairs(), tokens)
    }

    #[test]
    fn certain_answers_have_a_finite_loss() -> Result<()> {
        let orpo = Orpo { beta: 0.5, chosen: vec![(1, 0)] };
        for [a, b] in [[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]] {
            let (chosen, rejected) = ([a], [b]);
            let unit = UnitLogProbs { number: 0, sequences: vec![&chosen, &rejected] };
            let weighed = orpo.weigh(&[unit], 1, 1.0)?;
            assert!(weighed.loss_sum.is_finite() && weighed.weights.iter().all(|weight| weight.is_finite()));
        }
        Ok(())
    }

    #[test]
    fn the_prompt_of_the_chosen_answer_becomes_a_target() {
        let example = || Example::new(vec![5, 6, 7, 8], vec![false, false, false, true], 1);
        let mut group = Group::new(vec![example(), example()], None);
        Orpo::learn_prompts(&mut group);
        assert_eq!(group.sequences[0].trained, [false, true, true, true]);
        assert_eq!(group.sequences[1], example());
        assert_eq!(Orpo::new(0.1, [&group]).chosen, [(3, 2)]);
    }
}
