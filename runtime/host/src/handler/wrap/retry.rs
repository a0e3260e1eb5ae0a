//! Retry: a handler that fails for a reason that may pass is asked again, after a wait that grows.
//!
//! It is asked again before any content was shown, and never after. How long to wait is what the provider says (`Retry-After`), or else
//! grows by powers of two with jitter, so that clients that failed together do not come back together.
//! Source: <https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/>.

use std::sync::Arc;
use std::time::Duration;

use super::{Begun, Unspoken, Wrapper};
use crate::handler::{
    Context, EmbedRequest, Embeddings, EventStream, Handler, HandlerError, Kind, Request, random, tally,
};

/// How often a handler is asked again, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Requests after the first one.
    pub max: u32,
    /// The first wait; the next is twice as long.
    pub base: Duration,
    /// The longest wait. A provider that asks for a longer one is not asked again.
    pub cap: Duration,
}

impl Retry {
    /// The wait before attempt `number`, which is 1 for the first one after a failure; `None`: it is not made.
    ///
    /// One that took too long is not asked again: it has had its time, and the next handler has not.
    fn wait(&self, number: u32, error: &HandlerError, jitter: f64) -> Option<Duration> {
        if number > self.max {
            return None;
        }
        let grown = self.base.saturating_mul(2_u32.saturating_pow(number - 1)).min(self.cap);
        // Half of it at least, so that a retry is never at once.
        let backoff = grown.as_secs_f64() * (0.5 + jitter / 2.0);
        let backoff = Duration::try_from_secs_f64(backoff).unwrap_or(grown);
        match error.kind {
            Kind::RateLimited { retry_after: Some(asked) } | Kind::Overloaded { retry_after: asked } => {
                (asked <= self.cap).then(|| asked.max(backoff))
            }
            Kind::Unavailable | Kind::Cut | Kind::RateLimited { retry_after: None } => Some(backoff),
            Kind::Timeout
            | Kind::Protocol
            | Kind::InvalidRequest { .. }
            | Kind::ContextLength
            | Kind::Authentication
            | Kind::NotFound
            | Kind::Cancelled
            | Kind::Internal => None,
        }
    }

    /// Waits before attempt `number`.
    ///
    /// # Errors
    /// The handler's own error if it is not made, also because the request's time would be over by then; or that nobody waits any more.
    fn again(&self, number: u32, error: HandlerError, context: &Context) -> Result<(), HandlerError> {
        let jitter = (random() % 1024) as f64 / 1023.0;
        let wait = self.wait(number, &error, jitter);
        let Some(wait) = wait.filter(|wait| context.left().is_none_or(|left| *wait < left)) else {
            return Err(if number > 1 { error.exhausted() } else { error });
        };
        context.sleep(wait)
    }
}

/// [`Retry`] around the handler of a name.
pub struct Retrying {
    /// Its name.
    pub name: String,
    /// How it is asked again.
    pub retry: Retry,
}

impl Wrapper for Retrying {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let (inner, request, context) = (inner.clone(), request.clone(), context.clone());
        let (retry, name, mut number) = (self.retry, self.name.clone(), 0);
        let again = move |mut failed: Option<HandlerError>| {
            loop {
                if let Some(error) = failed {
                    number += 1;
                    retry.again(number, error, &context)?;
                    tally::add(&name, |counts| counts.retries += 1);
                }
                match inner.stream(&request, &context) {
                    Ok(stream) => return Ok(Begun { stream, hold: number < retry.max }),
                    Err(error) => failed = Some(error),
                }
            }
        };
        Ok(Box::new(Unspoken::begin(again)?))
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        let mut number = 0;
        loop {
            match inner.embed(request, context) {
                Err(error) => {
                    number += 1;
                    self.retry.again(number, error, context)?;
                    tally::add(&self.name, |counts| counts.retries += 1);
                }
                vectors => return vectors,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Fails whenever it is asked.
    struct Down(std::sync::atomic::AtomicUsize);

    impl Handler for Down {
        fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            Err(HandlerError::new(Kind::Unavailable, "down"))
        }
    }

    fn retrying(base: Duration) -> (Arc<Down>, Arc<dyn Handler>) {
        let down = Arc::new(Down(0.into()));
        let retry = Retry { max: 5, base, cap: Duration::from_secs(600) };
        (down.clone(), super::super::wrapped(down, Retrying { name: "x".into(), retry }))
    }

    #[test]
    fn who_leaves_while_it_waits_is_not_held() {
        let (down, handler) = retrying(Duration::from_secs(300));
        let context = Context::default();
        let since = std::time::Instant::now();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| handler.complete(&Request::default(), &context).err().map(|error| error.kind));
            while down.0.load(std::sync::atomic::Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            context.cancel();
            assert_eq!(waits.join().expect("it does not panic"), Some(Kind::Cancelled));
        });
        assert!(since.elapsed() < Duration::from_secs(5) && down.0.load(std::sync::atomic::Ordering::SeqCst) == 1);
    }

    /// An error at once says more than a timeout later.
    #[test]
    fn a_wait_beyond_the_time_of_the_answer_is_not_begun() {
        let (down, handler) = retrying(Duration::from_secs(300));
        let since = std::time::Instant::now();
        let within = Context::default().within(Duration::from_secs(60));
        let error = handler.complete(&Request::default(), &within).err();
        assert_eq!(error, Some(HandlerError::new(Kind::Unavailable, "down")));
        assert!(since.elapsed() < Duration::from_secs(5) && down.0.load(std::sync::atomic::Ordering::SeqCst) == 1);
    }

    #[test]
    fn waits_grow_to_the_cap_and_obey_the_provider_up_to_it() {
        let retry = Retry { max: 4, base: ms(100), cap: ms(300) };
        let wait = |number, kind: Kind, jitter| retry.wait(number, &HandlerError::new(kind, "x"), jitter);
        for (number, jitter, want) in
            [(1, 1.0, Some(100)), (1, 0.0, Some(50)), (2, 1.0, Some(200)), (3, 1.0, Some(300)), (5, 1.0, None)]
        {
            assert_eq!(wait(number, Kind::Unavailable, jitter), want.map(ms), "{number} {jitter}");
        }
        let limited = |asked| Kind::RateLimited { retry_after: Some(ms(asked)) };
        assert_eq!(wait(1, limited(250), 1.0), Some(ms(250)));
        assert_eq!(wait(2, limited(0), 1.0), Some(ms(200)), "at once would be too soon");
        assert_eq!(wait(1, limited(301), 1.0), None);
        assert_eq!(wait(1, Kind::Overloaded { retry_after: ms(301) }, 1.0), None);
        for kind in [Kind::Timeout, Kind::Authentication, Kind::ContextLength, Kind::Cancelled, Kind::Protocol] {
            assert_eq!(wait(1, kind.clone(), 1.0), None, "{kind:?}");
        }
        let huge = Retry { max: u32::MAX, base: Duration::MAX, cap: Duration::MAX };
        assert!(huge.wait(u32::MAX, &HandlerError::new(Kind::Cut, "x"), 1.0).is_some());
    }
}
