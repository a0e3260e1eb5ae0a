//! A handler that cannot be asked.

use crate::handler::{Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Kind, Request};

/// A route without a handler that could be asked, or a handler without its key. It says why.
pub(super) struct Disabled(pub(super) String);

impl Handler for Disabled {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        Err(HandlerError::new(Kind::Unavailable, self.0.clone()))
    }

    fn gives(&self) -> Gives {
        Gives::Either
    }

    fn embed(&self, _: &EmbedRequest, _: &Context) -> Result<Embeddings, HandlerError> {
        Err(HandlerError::new(Kind::Unavailable, self.0.clone()))
    }
}
