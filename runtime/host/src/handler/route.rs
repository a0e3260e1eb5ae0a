//! A route: several handlers under one name, asked in order.

use std::sync::Arc;

use super::{
    Completion, Context, EmbedRequest, Embeddings, Event, EventStream, Gives, Handler, HandlerError, Kind, Request,
};

/// Handlers in the order in which they are asked.
///
/// The next one is asked when one is unavailable, late or limited, or its answer breaks off, and only before any of an answer was
/// shown: text that was shown is not taken back.
pub struct Route {
    handlers: Arc<[(String, Arc<dyn Handler>)]>,
}

impl Route {
    /// Makes a route over at least one handler.
    pub fn new(handlers: Vec<(String, Arc<dyn Handler>)>) -> Self {
        Self { handlers: handlers.into() }
    }
}

impl Handler for Route {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let mut attempt = Attempt {
            handlers: self.handlers.clone(),
            at: 0,
            request: request.clone(),
            context: context.clone(),
            stream: None,
            held: None,
            spoken: false,
        };
        // When the last handler refuses, so does the route.
        attempt.begin()?;
        Ok(Box::new(attempt))
    }

    /// Waits for the whole answer. None of one that breaks off was shown, so that the next handler is asked then, too.
    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        let mut handlers = self.handlers.iter().peekable();
        while let Some((name, handler)) = handlers.next() {
            match (handler.complete(request, context), handlers.peek()) {
                (Err(error), Some((next, _))) if error.lets_another_try() => note(name, &error, next),
                (answer, _) => return answer,
            }
        }
        Err(no_handler())
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
            [(_, only)] => only.embed(request, context),
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

fn no_handler() -> HandlerError {
    HandlerError::new(Kind::Internal, "the route has no handler")
}

fn note(name: &str, error: &HandlerError, next: &str) {
    eprintln!("note: handler `{name}`: {error}; asking `{next}`");
}

struct Attempt {
    handlers: Arc<[(String, Arc<dyn Handler>)]>,
    at: usize,
    request: Request,
    context: Context,
    stream: Option<EventStream>,
    /// The start of an answer, held back while another handler may still be asked.
    held: Option<Event>,
    spoken: bool,
}

impl Attempt {
    /// Asks the current handler, and those after it until one begins.
    fn begin(&mut self) -> Result<(), HandlerError> {
        loop {
            let Some((name, handler)) = self.handlers.get(self.at) else {
                return Err(no_handler());
            };
            match handler.stream(&self.request, &self.context) {
                Ok(stream) => {
                    self.stream = Some(stream);
                    return Ok(());
                }
                Err(error) => {
                    let name = name.clone();
                    self.pass_on(&name, error)?;
                }
            }
        }
    }

    /// Moves to the next handler, or returns the error.
    fn pass_on(&mut self, name: &str, error: HandlerError) -> Result<(), HandlerError> {
        let Some((next, _)) = self.handlers.get(self.at + 1).filter(|_| error.lets_another_try()) else {
            return Err(error);
        };
        note(name, &error, next);
        self.at += 1;
        Ok(())
    }

    fn is_last(&self) -> bool {
        self.at + 1 >= self.handlers.len()
    }
}

impl Iterator for Attempt {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            // The event that was held back goes first.
            if self.spoken
                && let Some(event) = self.held.take()
            {
                return Some(Ok(event));
            }
            match self.stream.as_mut()?.next() {
                Some(Ok(event @ Event::Start(_))) if !self.spoken && !self.is_last() => self.held = Some(event),
                Some(Ok(event)) if self.spoken => return Some(Ok(event)),
                Some(Ok(event)) => {
                    self.spoken = true;
                    return Some(Ok(match self.held.replace(event.clone()) {
                        Some(start) => start,
                        None => {
                            self.held = None;
                            event
                        }
                    }));
                }
                Some(Err(error)) => {
                    self.stream = None;
                    if self.spoken {
                        return Some(Err(error));
                    }
                    self.held = None;
                    let name = self.handlers[self.at].0.clone();
                    if let Err(error) = self.pass_on(&name, error).and_then(|()| self.begin()) {
                        return Some(Err(error));
                    }
                }
                None => {
                    self.stream = None;
                    return None;
                }
            }
        }
    }
}
