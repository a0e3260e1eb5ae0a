//! Time limits by phase: until the first content, and between two pieces. The time in which the caller does not read is not counted.

use std::sync::Arc;
use std::time::Duration;

use super::Wrapper;
use crate::handler::context::Timer;
use crate::handler::{Context, Event, EventStream, Handler, HandlerError, Request};

/// Time limits of the phases of an answer; `None`: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// From the request to the first content.
    pub first_token: Option<Duration>,
    /// Between two pieces, once there was content.
    pub idle: Option<Duration>,
}

impl Wrapper for Timeouts {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let Self { first_token, idle } = *self;
        let timer = Timer::default();
        if let Some(first_token) = first_token {
            timer.set(first_token, over("first_token_timeout_s", first_token));
        }
        let context = context.timed(&timer);
        let mut stream = context.watch(inner.stream(request, &context)?);
        let mut spoken = false;
        Ok(Box::new(std::iter::from_fn(move || {
            if let Some(idle) = idle.filter(|_| spoken) {
                timer.set(idle, over("idle_timeout_s", idle));
            }
            let item = stream.next();
            spoken |= !matches!(item, Some(Ok(Event::Start(_))));
            if spoken {
                timer.stop();
            }
            item
        })))
    }
}

fn over(key: &str, limit: Duration) -> String {
    format!("nothing came within {key} ({} s)", limit.as_secs_f64())
}
