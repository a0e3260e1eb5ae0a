//! Pages of memory that was given back, which the program's allocator can keep instead of giving them to the system.
//!
//! Plain blocks take and give back large tensors all the time, and the system fills each page that it gives anew with zeros: of a step that
//! trains all weights that was a third. Who has an allocator that can be told so is told when such a training begins and when it ends.

use std::sync::{Mutex, OnceLock, PoisonError};

static PAGES: Pages = Pages::new();

/// Who is told, and how many trainings by plain blocks there are.
struct Pages {
    keep: OnceLock<fn(bool)>,
    users: Mutex<usize>,
}

impl Pages {
    const fn new() -> Self {
        Self { keep: OnceLock::new(), users: Mutex::new(0) }
    }

    /// Tells it under the lock, so that what is told last is so.
    fn count(&self, change: impl FnOnce(usize) -> usize) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *users;
        *users = change(before);
        if let Some(keep) = self.keep.get().filter(|_| (before == 0) != (*users == 0)) {
            keep(*users > 0);
        }
    }
}

/// Calls `keep` with true when pages are to be kept from now on, and with false when no longer. Only the first of several is called.
pub fn on_keep(keep: fn(bool)) {
    let _ = PAGES.keep.set(keep);
}

/// Pages are kept while it lives.
pub(crate) struct Kept(&'static Pages);

impl Kept {
    pub(crate) fn new() -> Self {
        Self::of(&PAGES)
    }

    fn of(pages: &'static Pages) -> Self {
        pages.count(|users| users + 1);
        Self(pages)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.count(|users| users - 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn pages_are_kept_from_the_first_of_several_until_the_last_is_gone() {
        static OWN: Pages = Pages::new();
        static TOLD: AtomicUsize = AtomicUsize::new(0);
        let told = || TOLD.swap(0, Ordering::SeqCst);
        OWN.keep.set(|are_kept| TOLD.store(usize::from(are_kept) + 1, Ordering::SeqCst)).expect("nobody else sets it");
        let first = Kept::of(&OWN);
        assert_eq!(told(), 2);
        let second = Kept::of(&OWN);
        drop(first);
        assert_eq!(told(), 0);
        drop(second);
        assert_eq!(told(), 1);
    }
}
