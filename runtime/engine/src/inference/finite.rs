//! A last look at logits before a token is drawn from them.

use anyhow::{Result, ensure};

use crate::files::mapped::intact;

/// Refuses logits that no token can be drawn from. The likeliest of numbers that are none is the first token, often the one that
/// ends the turn: an empty answer, where there is none.
///
/// # Errors
/// When a logit is not finite, or a file of the model is gone.
pub(crate) fn check_finite(logits: &[f32]) -> Result<()> {
    // All of them, without a branch: several at once.
    let finite = logits.iter().fold(true, |finite, logit| finite & logit.is_finite());
    ensure!(
        finite,
        "the model's numbers overflow: what it says next is no number; try computing in f32, and if that fails its weights or its adapter are damaged"
    );
    intact()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_logit_that_is_no_number_is_enough() {
        let mut logits = vec![-3.5; 1001];
        assert!(check_finite(&logits).is_ok());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 500, 1000] {
                logits[at] = bad;
                assert!(check_finite(&logits).is_err(), "{bad} at {at}");
                logits[at] = f32::MAX;
            }
        }
        assert!(check_finite(&logits).is_ok());
    }
}
