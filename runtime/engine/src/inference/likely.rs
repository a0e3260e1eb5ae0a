//! How likely a token was, and what else was likely in its place.

use std::cmp::Ordering;

/// The log-probabilities at one place of an answer, by the model's own logits: before penalties, temperature and filters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Likely {
    /// That of the token which was drawn.
    pub logprob: f32,
    /// The likeliest tokens with theirs, the likeliest first; of equal ones the lower id.
    pub top: Vec<(u32, f32)>,
}

impl Likely {
    /// Returns the log-probabilities of `token` and of the `top` likeliest by logits, (V), which are finite:
    /// `log p_i = l_i - log(sum_j exp(l_j))`.
    pub(super) fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        let all = f64::from(largest) + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - all) as f32;
        let own = logits.get(token as usize).map_or(f32::MIN, |logit| logprob(*logit));
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| match logits[*b as usize].total_cmp(&logits[*a as usize]) {
            Ordering::Equal => a.cmp(b),
            other => other,
        };
        let top = top.min(order.len());
        if top > 0 && top < order.len() {
            order.select_nth_unstable_by(top - 1, by_logit);
        }
        order.truncate(top);
        order.sort_unstable_by(by_logit);
        Self { logprob: own, top: order.into_iter().map(|id| (id, logprob(logits[id as usize]))).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Softmax of (ln 1, ln 2, ln 5, ln 2) is (0.1, 0.2, 0.5, 0.2).
    #[test]
    fn log_probabilities_are_those_of_softmax() {
        let logits = [1f32, 2.0, 5.0, 2.0].map(|weight| weight.ln() + 30.0);
        let likely = Likely::of(&logits, 0, 3);
        assert!((likely.logprob.exp() - 0.1).abs() < 1e-5, "{likely:?}");
        let ids: Vec<u32> = likely.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [2, 1, 3]);
        for ((_, got), want) in likely.top.iter().zip([0.5f32, 0.2, 0.2]) {
            assert!((got.exp() - want).abs() < 1e-5);
        }
        assert_eq!(Likely::of(&logits, 2, 9).top.len(), 4);
        assert!(Likely::of(&logits, 2, 0).top.is_empty());
    }
}
