//! A handler whose whole answers are remembered, each with whose it is.

use std::sync::Arc;

use homeroom_engine::inference::Engine;

use super::person::Person;
use crate::handler::{
    Completion, Context, EmbedRequest, Embeddings, Event, EventStream, Gives, Handler, HandlerError, Request,
};
use crate::memory::{Answered, Memory};

/// A longer answer is not remembered, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A handler for one request.
pub struct Observed {
    /// What answers.
    pub inner: Arc<dyn Handler>,
    /// What remembers.
    pub memory: Arc<Memory>,
    /// The model, as the client named it.
    pub model: String,
    /// Whose the request is.
    pub person: Person,
}

impl Observed {
    fn begun(&self, request: &Request) -> Answered {
        Answered {
            id: String::new(),
            model: self.model.clone(),
            handler: String::new(),
            person: self.person.clone(),
            messages: serde_json::to_value(&request.messages).unwrap_or_default(),
            answer: String::new(),
        }
    }
}

impl Handler for Observed {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let stream = self.inner.stream(request, context)?;
        let (memory, mut answered) = (self.memory.clone(), Some(self.begun(request)));
        Ok(Box::new(stream.inspect(move |event| match event {
            Ok(Event::Start { id, handler, .. }) => {
                if let Some(answered) = &mut answered {
                    (answered.id, answered.handler) = (id.clone(), handler.clone());
                }
            }
            Ok(Event::Delta { text }) => {
                if answered.as_ref().is_some_and(|answered| answered.answer.len() + text.len() > ANSWER_BYTES_MAX) {
                    answered = None;
                }
                if let Some(answered) = &mut answered {
                    answered.answer.push_str(text);
                }
            }
            // The answer is whole, and its client does not know that yet: it is remembered when it does.
            Ok(Event::Usage(_)) => {
                if let Some(answered) = answered.take() {
                    memory.answered(answered);
                }
            }
            Ok(Event::Finish { .. }) => {}
            Err(_) => answered = None,
        })))
    }

    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        let whole = self.inner.complete(request, context)?;
        if whole.text.len() <= ANSWER_BYTES_MAX {
            let (id, handler, answer) = (whole.id.clone(), whole.handler.clone(), whole.text.clone());
            self.memory.answered(Answered { id, handler, answer, ..self.begun(request) });
        }
        Ok(whole)
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.inner.engine()
    }

    fn gives(&self) -> Gives {
        self.inner.gives()
    }

    fn embed(&self, request: &EmbedRequest, context: &Context) -> Result<Embeddings, HandlerError> {
        self.inner.embed(request, context)
    }
}
