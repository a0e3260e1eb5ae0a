//! A time limit for a whole answer: the wait in queues, retries and fallbacks included.

use std::sync::Arc;
use std::time::Duration;

use super::Wrapper;
use crate::handler::{Completion, Context, EmbedRequest, Embeddings, EventStream, Handler, HandlerError, Request};

/// The limit.
pub struct Total(pub Duration);

impl Wrapper for Total {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        let context = context.within(self.0);
        Ok(context.watch(inner.stream(request, &context)?))
    }

    fn complete(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<Completion, HandlerError> {
        inner.complete(request, &context.within(self.0))
    }

    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        inner.embed(request, &context.within(self.0))
    }
}
