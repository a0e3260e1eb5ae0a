//! A handler whose whole answers are remembered, each with whose it is.

use std::sync::Arc;

use homeroom_engine::inference::Engine;
use serde_json::Value;

use super::person::Person;
use crate::handler::{
    Completion, Context, EmbedRequest, Embeddings, Event, EventStream, Gives, Handler, HandlerError, Message, Request,
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
    /// The record of an answer that begins. `None`: a text is gone on with, which is no conversation.
    fn begun(&self, request: &Request) -> Option<Answered> {
        // Pictures are not remembered.
        let said = |message: &Message| Message { parts: Vec::new(), ..message.clone() }.json();
        (!request.messages.is_empty()).then(|| Answered {
            id: String::new(),
            model: self.model.clone(),
            handler: String::new(),
            person: self.person.clone(),
            messages: request.messages.iter().map(|message| Value::Object(said(message))).collect(),
            answer: String::new(),
        })
    }
}

impl Handler for Observed {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let stream = self.inner.stream(request, context)?;
        let (memory, mut answered) = (self.memory.clone(), self.begun(request));
        Ok(Box::new(stream.inspect(move |event| match event {
            Ok(Event::Start(start)) => {
                if let Some(answered) = &mut answered {
                    (answered.id, answered.handler) = (start.id.clone(), start.handler.clone());
                }
            }
            // Of several answers the first is remembered.
            Ok(Event::Delta { choice: 0, text, .. }) => {
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
            Ok(_) => {}
            Err(_) => answered = None,
        })))
    }

    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        let whole = self.inner.complete(request, context)?;
        if let Some(answered) = self.begun(request).filter(|_| whole.text().len() <= ANSWER_BYTES_MAX) {
            let (start, answer) = (&whole.start, whole.text().to_owned());
            self.memory.answered(Answered { id: start.id.clone(), handler: start.handler.clone(), answer, ..answered });
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
