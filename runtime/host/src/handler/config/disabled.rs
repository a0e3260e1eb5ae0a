//! A handler that cannot be asked.

use crate::handler::{Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Kind, Request};

/// A route without a handler that could be asked, or a handler without its key: its name, and why.
pub(super) struct Disabled(pub(super) String, pub(super) String);

impl Disabled {
    fn refusal(&self) -> HandlerError {
        let Self(name, why) = self;
        let message = format!("`{name}` is not ready to answer; whoever runs the server finds the cause in its log");
        HandlerError::new(Kind::Unavailable, message).with_detail(why.clone())
    }
}

impl Handler for Disabled {
    fn stream(&self, _: &Request, _: &Context) -> Result<EventStream, HandlerError> {
        Err(self.refusal())
    }

    fn gives(&self) -> Gives {
        Gives::Either
    }

    fn embed(&self, _: &EmbedRequest, _: &Context) -> Result<Embeddings, HandlerError> {
        Err(self.refusal())
    }
}
