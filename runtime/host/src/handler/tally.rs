//! What happened to handlers since the program began, for whoever shows it: retries, fallbacks, breakers.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Counts of one handler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times that it was asked again after a failure.
    pub retries: u64,
    /// Times that the next handler was asked instead of it.
    pub fallbacks: u64,
    /// Times that its circuit breaker opened.
    pub breaker_opened: u64,
    /// Requests that were refused because its circuit breaker was open.
    pub breaker_refused: u64,
    /// Its circuit breaker is open now, or half open.
    pub breaker_is_open: bool,
}

/// Handlers that are counted at most: their names come from files, which are edited while a server runs.
const HANDLERS_MAX: usize = 1024;

static COUNTS: Mutex<BTreeMap<String, Counts>> = Mutex::new(BTreeMap::new());

/// Changes the counts of a handler.
pub(super) fn add(handler: &str, change: impl FnOnce(&mut Counts)) {
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    if !counts.contains_key(handler) && counts.len() >= HANDLERS_MAX {
        return;
    }
    change(counts.entry(handler.to_owned()).or_default());
}

/// The counts of all handlers to which something happened, by their names.
pub fn counts() -> BTreeMap<String, Counts> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
