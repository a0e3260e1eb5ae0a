//! Pages of memory that was given back, which the program's allocator can keep instead of giving them to the system.
//!
//! Plain blocks take and give back large tensors all the time, and the system fills each page that it gives anew with zeros: of a step that
//! trains all weights that was a third. Who has an allocator that can be told so is told when such a training begins and when it ends.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

static KEEP: OnceLock<fn(bool)> = OnceLock::new();
/// Trainings by plain blocks that are there.
static USERS: AtomicUsize = AtomicUsize::new(0);

/// Calls `keep` with true when pages are to be kept from now on, and with false when no longer. Only the first of several is called.
pub fn on_keep(keep: fn(bool)) {
    let _ = KEEP.set(keep);
}

/// Pages are kept while it lives.
pub(crate) struct Kept(());

impl Kept {
    pub(crate) fn new() -> Self {
        tell(USERS.fetch_add(1, Ordering::SeqCst) == 0, true);
        Self(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        tell(USERS.fetch_sub(1, Ordering::SeqCst) == 1, false);
    }
}

fn tell(it_changes: bool, are_kept: bool) {
    if let Some(keep) = KEEP.get().filter(|_| it_changes) {
        keep(are_kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_from_the_first_of_several_until_the_last_is_gone() {
        static TOLD: AtomicUsize = AtomicUsize::new(0);
        on_keep(|are_kept| TOLD.store(usize::from(are_kept) + 1, Ordering::SeqCst));
        let first = Kept::new();
        assert_eq!(TOLD.load(Ordering::SeqCst), 2);
        drop((first, Kept::new()));
        // Other tests train by plain blocks meanwhile.
        if USERS.load(Ordering::SeqCst) == 0 {
            assert_eq!(TOLD.load(Ordering::SeqCst), 1);
        }
    }
}
