//! Notices a training that gets worse than it began, and takes it back to where it was good.

use serde::{Deserialize, Serialize};

/// Steps that a mean is taken over: a step's own loss says little.
const WINDOW: usize = 16;
/// A mean so many nats above that of the first steps, and
const WORSE: f64 = 1.0;
/// so many times the lowest so far, is a training that diverges.
const TIMES: f64 = 2.0;
/// Steps that are enough to see a training that is wild: whose mean is
const WILD_WINDOW: usize = 4;
/// so many times the loss before the first update with a nat more.
const WILD: f64 = 4.0;
/// A second failure within so many steps is the same one.
const RECURS_WITHIN: u64 = 1000;

/// What the watchdog remembers of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Watchdog {
    /// What the learning rates are multiplied by: halved by each rewind.
    pub rate_scale: f64,
    /// The step that the last rewind was for.
    pub rewound_at: Option<u64>,
    /// Mean loss of the first steps.
    first: Option<f64>,
    /// Lowest mean loss.
    lowest: Option<f64>,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self { rate_scale: 1.0, rewound_at: None, first: None, lowest: None }
    }
}

impl Watchdog {
    /// Steps before a training is seen to diverge by which a checkpoint cannot be told from what diverged: a mean rises above all others
    /// some steps after what made it rise.
    pub const SUSPECT: u64 = 2 * WINDOW as u64;

    /// Looks at the losses of a run after a step, the last of them last; returns what is wrong, in words.
    ///
    /// `unit`: what of the objective's loss is as much as a nat of sft's. `is_shuffled`: rows come by chance; rows that come in an order
    /// may get harder, so that only a training that is wild is told.
    pub fn look(
        &mut self,
        losses: impl ExactSizeIterator<Item = f64> + DoubleEndedIterator + Clone,
        unit: f64,
        is_shuffled: bool,
    ) -> Option<String> {
        let mean_of = |window: usize| losses.clone().rev().take(window).sum::<f64>() / window as f64;
        let untrained = losses.clone().next()?;
        if losses.len() > WILD_WINDOW {
            let mean = mean_of(WILD_WINDOW);
            if mean > WILD * (untrained.abs() + unit) {
                return Some(format!(
                    "the loss diverges: {mean:.3} on average over {WILD_WINDOW} steps, after {untrained:.3} before the first"
                ));
            }
        }
        if losses.len() < WINDOW {
            return None;
        }
        let mean = mean_of(WINDOW);
        let first = *self.first.get_or_insert(mean);
        let lowest = self.lowest.map_or(mean, |lowest| lowest.min(mean));
        self.lowest = Some(lowest);
        (is_shuffled && mean > first + WORSE * unit && mean > TIMES * lowest).then(|| {
            format!("the loss diverges: {mean:.3} on average over {WINDOW} steps, after {first:.3} at the beginning and {lowest:.3} at best")
        })
    }

    /// Whether a failure at a step is the one that the run was taken back for already.
    pub fn recurs(&self, step: u64) -> bool {
        self.rewound_at.is_some_and(|at| step <= at.saturating_add(RECURS_WITHIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_alarm(losses: &[f64]) -> Option<usize> {
        let mut watchdog = Watchdog::default();
        (1..=losses.len()).find(|done| watchdog.look(losses[..*done].iter().copied(), 1.0, true).is_some())
    }

    #[test]
    fn a_loss_that_ends_worse_than_it_began_is_noticed_and_a_noisy_one_is_not() {
        let falls: Vec<f64> =
            (0..200).map(|step| 3.0 * 0.97f64.powi(step) + if step % 7 == 0 { 1.5 } else { 0.0 }).collect();
        assert_eq!(first_alarm(&falls), None);
        let mut diverges = falls[..100].to_vec();
        diverges.extend((0..60).map(|step| 0.2 + 0.4 * f64::from(step)));
        let at = first_alarm(&diverges).expect("it is worse than at the beginning");
        assert!((110..130).contains(&at), "{at}");
        // Rows that get harder: above the best, and not above the beginning.
        let harder: Vec<f64> = (0..200).map(|step| if step < 100 { 0.1 } else { 1.0 }).collect();
        assert_eq!(first_alarm(&harder), None);
        assert_eq!(first_alarm(&[9.0; 15]), None);
        // Rows that are harder than the first one.
        let first_is_easy: Vec<f64> = (0..60).map(|step| if step == 0 { 0.4 } else { 3.5 }).collect();
        assert_eq!(first_alarm(&first_is_easy), None);
        // Wild from the first update on.
        let wild: Vec<f64> = (0..40).map(|step| if step == 0 { 3.5 } else { 900.0 }).collect();
        assert_eq!(first_alarm(&wild), Some(5));
    }

    #[test]
    fn a_failure_recurs_when_it_comes_again_soon() {
        let mut watchdog = Watchdog::default();
        assert!(!watchdog.recurs(5));
        watchdog.rewound_at = Some(5);
        assert!(watchdog.recurs(3) && watchdog.recurs(1005) && !watchdog.recurs(1006));
    }
}
