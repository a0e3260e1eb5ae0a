//! Places for what goes on at once, such as files that are being sent and requests that are open: so many in all, and of one key fewer, so
//! that no key keeps the others out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The places that are taken, by key.
#[derive(Default)]
pub struct Places(Mutex<BTreeMap<Option<String>, usize>>);

/// Why there is no place.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// All are taken.
    All,
    /// Those of this key are.
    OfKey,
}

impl Places {
    fn taken(&self) -> MutexGuard<'_, BTreeMap<Option<String>, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one for a key, which has `of_key`, of `of_all`. Where no key is wanted, all are for whoever asks.
    ///
    /// # Errors
    /// When none is free.
    pub fn take(self: &Arc<Self>, key: Option<&str>, of_key: usize, of_all: usize) -> Result<Place, Taken> {
        let (mut taken, key) = (self.taken(), key.map(str::to_owned));
        if key.is_some() && taken.get(&key).is_some_and(|count| *count >= of_key) {
            return Err(Taken::OfKey);
        }
        if taken.values().sum::<usize>() >= of_all {
            return Err(Taken::All);
        }
        *taken.entry(key.clone()).or_default() += 1;
        Ok(Place { places: self.clone(), key })
    }
}

/// A place, which is free again when this is dropped.
pub struct Place {
    places: Arc<Places>,
    key: Option<String>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_leaves_places_to_others() {
        let places = Arc::new(Places::default());
        let take = |key: Option<&str>| places.take(key, 2, 4);
        let of_ada: Vec<_> = (0..2).filter_map(|_| take(Some("ada")).ok()).collect();
        assert_eq!((of_ada.len(), take(Some("ada")).err()), (2, Some(Taken::OfKey)));
        let of_bob: Vec<_> = (0..2).filter_map(|_| take(Some("bob")).ok()).collect();
        assert_eq!((of_bob.len(), take(Some("eve")).err()), (2, Some(Taken::All)));
        drop(of_ada);
        assert!(take(Some("ada")).is_ok());
        drop(of_bob);
        let of_all: Vec<_> = (0..5).filter_map(|_| take(None).ok()).collect();
        assert_eq!((of_all.len(), take(None).err()), (4, Some(Taken::All)));
        drop(of_all);
        assert!(places.taken().is_empty());
    }
}
