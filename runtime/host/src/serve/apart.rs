//! Work that may wait for the disk or a lock, or takes the processor for long: it has a thread of its own, so that nobody else's answer waits
//! with it.

use tokio::task::spawn_blocking;

use super::reply::{Refusal, failed};

/// Does work of a request in a thread of its own.
///
/// # Errors
/// Those of the work, and when it panics.
pub(super) async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    spawn_blocking(work).await.unwrap_or_else(|_| Err(failed(&anyhow::anyhow!("the request ended in a panic"))))
}
