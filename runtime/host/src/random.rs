//! Random numbers.

use std::hash::{BuildHasher, Hasher, RandomState};

use anyhow::{Context, Result};

use crate::hex::hex;

/// Random bytes of the system, which nobody can guess.
///
/// # Errors
/// When the system has no random numbers.
pub fn bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).context("the system has no random numbers")?;
    Ok(bytes)
}

/// A random number; not for secrets.
pub fn number() -> u64 {
    // A hasher's keys are random.
    RandomState::new().build_hasher().finish()
}

/// 32 random digits, for an id that no other has. They can be guessed where the system has no random numbers.
pub fn id() -> String {
    let bytes = bytes().unwrap_or_else(|_| (u128::from(number()) << 64 | u128::from(number())).to_ne_bytes());
    hex(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_ids_are_equal() {
        let ids: std::collections::BTreeSet<String> = (0..1000).map(|_| id()).collect();
        assert!(ids.len() == 1000 && ids.iter().all(|id| id.len() == 32));
        assert_ne!(number(), number());
    }
}
