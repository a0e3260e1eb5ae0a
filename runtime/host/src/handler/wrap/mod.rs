//! Handlers that wrap a handler: each does one thing on the way to the one that answers, or on the way back.
//!
//! They are put around a handler in one order, the first outermost: [`log`], [`words`], [`defaults`], [`total`], [`limit`], [`breaker`],
//! [`retry`], [`timeouts`], [`record`]. A route has the first four around its fallback chain; [`redact`] stands between a route with `egress =
//! "redact"` and each of its handlers that sends conversations away. [`settings`] reads them from a file of handlers.
//!
//! [`limit`]: super::limit

pub mod breaker;
pub mod defaults;
pub mod kept;
pub mod log;
pub mod record;
pub mod redact;
pub mod retry;
mod rewritten;
pub mod settings;
mod texts;
pub mod timeouts;
pub mod total;
mod unspoken;
mod whole;
pub mod words;

use std::sync::Arc;

use homeroom_engine::inference::Engine;

use super::{
    Completion, Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Request, checked, collect,
};

pub(super) use self::unspoken::{Begun, Unspoken};

/// What a wrapper does with a request to the handler that it wraps.
pub trait Wrapper: Send + Sync {
    /// Begins an answer.
    ///
    /// # Errors
    /// As [`Handler::stream`].
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError>;

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// As [`Handler::complete`].
    fn complete(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<Completion, HandlerError> {
        collect(context.watch(self.stream(inner, request, context)?))
    }

    /// Makes the vectors of texts.
    ///
    /// # Errors
    /// As [`Handler::embed`].
    fn embed(
        &self,
        inner: &Arc<dyn Handler>,
        request: &EmbedRequest,
        context: &Context,
    ) -> Result<Embeddings, HandlerError> {
        inner.embed(request, context)
    }
}

/// A handler and the wrapper around it.
struct Wrapped<W> {
    inner: Arc<dyn Handler>,
    wrapper: W,
}

/// Puts a wrapper around a handler.
pub fn wrapped(inner: Arc<dyn Handler>, wrapper: impl Wrapper + 'static) -> Arc<dyn Handler> {
    Arc::new(Wrapped { inner, wrapper })
}

impl<W: Wrapper> Handler for Wrapped<W> {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        self.wrapper.stream(&self.inner, request, context)
    }

    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        self.wrapper.complete(&self.inner, request, context)
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.inner.engine()
    }

    fn gives(&self) -> Gives {
        self.inner.gives()
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        self.wrapper.embed(&self.inner, request, context)
    }
}

/// Holds a handler to the order of events, so that what stands around it can rely on that.
struct Checking;

impl Wrapper for Checking {
    fn stream(
        &self,
        inner: &Arc<dyn Handler>,
        request: &Request,
        context: &Context,
    ) -> Result<EventStream, HandlerError> {
        inner.stream(request, context).map(checked)
    }
}
