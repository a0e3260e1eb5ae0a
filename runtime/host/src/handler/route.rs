//! A route: several handlers under one name, asked in order.

use std::sync::Arc;

use homeroom_engine::inference::Engine;

use super::wrap::{Begun, Unspoken};
use super::{
    Completion, Context, EmbedRequest, Embeddings, EventStream, Gives, Handler, HandlerError, Kind, Request, tally,
};
use crate::progress::line;

/// A handler and its name.
type Named = (String, Arc<dyn Handler>);

/// Handlers in the order in which they are asked.
///
/// The next one is asked when one is unavailable, late or limited, or its answer breaks off, and only before any of an answer was
/// shown: text that was shown is not taken back. A conversation that does not fit a handler goes to those of a list of its own.
#[derive(Clone)]
pub struct Route {
    handlers: Arc<[Named]>,
    /// Asked when a conversation is longer than a handler's context.
    for_long: Arc<[Named]>,
    /// Words of the errors after which the next one is asked; `None`: those of [`HandlerError::lets_another_try`].
    on: Option<Arc<[String]>>,
    /// Conversations must not leave this machine.
    stays: bool,
}

impl Route {
    /// Makes a route over at least one handler.
    pub fn new(handlers: Vec<Named>) -> Self {
        Self { handlers: handlers.into(), for_long: Arc::default(), on: None, stays: false }
    }

    /// Has handlers asked, in order, when a conversation is too long for one of the route.
    #[must_use]
    pub fn with_context_fallback(self, handlers: Vec<Named>) -> Self {
        Self { for_long: handlers.into(), ..self }
    }

    /// Has the next handler asked after errors of these kinds alone, by [`Kind::word`].
    #[must_use]
    pub fn with_fallback_on(self, kinds: Vec<String>) -> Self {
        Self { on: Some(kinds.into()), ..self }
    }

    /// Has every handler refuse to make a connection that leaves this machine.
    #[must_use]
    pub fn staying(self) -> Self {
        Self { stays: true, ..self }
    }

    fn lets_another_try(&self, error: &HandlerError) -> bool {
        match &self.on {
            Some(on) => on.iter().any(|word| word == error.kind.word()),
            None => error.lets_another_try(),
        }
    }

    fn context(&self, context: &Context) -> Context {
        if self.stays { context.staying() } else { context.clone() }
    }

    fn asking(&self) -> Asking {
        Asking { route: self.clone(), for_long: false, at: 0 }
    }
}

impl Handler for Route {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let (mut asking, request, context) = (self.asking(), request.clone(), self.context(context));
        let again = move |mut failed: Option<HandlerError>| {
            loop {
                if let Some(error) = failed {
                    asking.pass_on(error)?;
                }
                match asking.now()?.stream(&request, &context) {
                    Ok(stream) => return Ok(Begun { stream, hold: asking.has_more() }),
                    Err(error) => failed = Some(error),
                }
            }
        };
        // When the last handler refuses, so does the route.
        Ok(Box::new(Unspoken::begin(again)?))
    }

    /// Waits for the whole answer. None of one that breaks off was shown, so that the next handler is asked then, too.
    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        let (mut asking, context) = (self.asking(), self.context(context));
        loop {
            match asking.now()?.complete(request, &context) {
                Err(error) => asking.pass_on(error)?,
                answer => return answer,
            }
        }
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.handlers.first().and_then(|(_, handler)| handler.engine())
    }

    fn gives(&self) -> Gives {
        match &*self.handlers {
            [(_, only)] => only.gives(),
            // It may be asked, and refuses: a provider's models are not known here.
            several if several.iter().any(|(_, handler)| handler.gives() == Gives::Either) => Gives::Either,
            _ => Gives::Answers,
        }
    }

    /// Asks the one handler of the route. There is no fallback: vectors of two models cannot be compared, so that an index of the first
    /// would be searched with those of the second, and nobody would see why it finds nothing.
    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        match &*self.handlers {
            [(_, only)] => only.embed(request, &self.context(context)),
            handlers => {
                let message = format!(
                    "the route has {} handlers, and vectors of two models cannot be compared; a route for embeddings has one handler",
                    handlers.len()
                );
                Err(HandlerError::invalid("model", message))
            }
        }
    }
}

/// Which handler of a route is asked for one request.
struct Asking {
    route: Route,
    /// It is one of those for long conversations.
    for_long: bool,
    at: usize,
}

impl Asking {
    fn list(&self) -> &[Named] {
        if self.for_long { &self.route.for_long } else { &self.route.handlers }
    }

    fn now(&self) -> Result<Arc<dyn Handler>, HandlerError> {
        let none = || HandlerError::new(Kind::Internal, "the route has no handler");
        self.list().get(self.at).map(|(_, handler)| handler.clone()).ok_or_else(none)
    }

    /// Whether another handler may be asked after this one.
    fn has_more(&self) -> bool {
        self.at + 1 < self.list().len() || (!self.for_long && !self.route.for_long.is_empty())
    }

    /// Moves to the next handler, or returns the error.
    fn pass_on(&mut self, error: HandlerError) -> Result<(), HandlerError> {
        let is_long = error.kind == Kind::ContextLength;
        let (name, _) = &self.list()[self.at];
        let (for_long, at) = match self.for_long {
            // The one that it was too long for may stand in both lists.
            false if is_long => (true, self.route.for_long.iter().position(|(other, _)| other != name)),
            true if is_long => (true, Some(self.at + 1)),
            same => (same, Some(self.at + 1).filter(|_| self.route.lets_another_try(&error))),
        };
        let list = if for_long { &self.route.for_long } else { &self.route.handlers };
        let Some((at, (next, _))) = at.and_then(|at| Some((at, list.get(at)?))) else {
            let is_first = !self.for_long && self.at == 0;
            return Err(if is_first { error } else { error.exhausted() });
        };
        line(format_args!("note: handler `{name}`: {error}; asking `{next}`"));
        tally::add(name, |counts| counts.fallbacks += 1);
        (self.for_long, self.at) = (for_long, at);
        Ok(())
    }
}
