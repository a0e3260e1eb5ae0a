//! How many requests each key has open, so that one whose bodies never end does not hold all connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;

use super::reply::Refusal;

/// When a refused client may come again.
const AGAIN: Duration = Duration::from_secs(5);

/// The open requests of each key.
#[derive(Clone, Default)]
pub(super) struct OpenRequests(Arc<Mutex<HashMap<String, usize>>>);

/// One of them, until it is dropped.
pub(super) struct Open {
    all: OpenRequests,
    key: String,
}

impl OpenRequests {
    /// Counts one more of a key, which may have half of all `connections`.
    ///
    /// # Errors
    /// When it has them.
    pub(super) fn one_more(&self, key: &str, connections: usize) -> Result<Open, Refusal> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(key.to_owned()).or_default();
        if *count >= connections.div_ceil(2) {
            let message = format!(
                "this key has {count} requests open, half of what this server takes at once; wait until some are answered"
            );
            let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, message);
            return Err(Refusal {
                kind: "rate_limit_error",
                code: Some("rate_limit_exceeded"),
                retry_after: Some(AGAIN),
                ..refusal
            });
        }
        *count += 1;
        Ok(Open { all: self.clone(), key: key.to_owned() })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_half_of_the_connections_and_gets_back_what_ends() {
        let all = OpenRequests::default();
        let mut open: Vec<Open> = (0..3).map(|_| all.one_more("ana", 5).ok().unwrap()).collect();
        let refused = all.one_more("ana", 5).err().unwrap();
        assert_eq!((refused.status, refused.retry_after), (StatusCode::TOO_MANY_REQUESTS, Some(AGAIN)));
        assert!(all.one_more("ben", 5).is_ok());
        open.pop();
        assert!(all.one_more("ana", 5).is_ok());
        open.clear();
        assert!(all.0.lock().unwrap().is_empty());
    }
}
