//! A handler whose whole answers are remembered, each with whose it is, and by the id that its client is given.

use std::sync::Arc;

use homeroom_engine::inference::Engine;
use serde_json::Value;

use crate::handler::{
    Completion, Context, EmbedRequest, Embeddings, Event, EventStream, Gives, Handler, HandlerError, Message, Request,
    Start,
};
use crate::memory::Person;
use crate::memory::{Answered, Memory};

/// A longer answer is not remembered, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A handler for one request.
pub struct Observed {
    /// What answers.
    pub inner: Arc<dyn Handler>,
    /// The id of the answer.
    pub id: String,
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
            id: self.id.clone(),
            provider_id: None,
            model: self.model.clone(),
            handler: String::new(),
            person: self.person.clone(),
            messages: request.messages.iter().map(|message| Value::Object(said(message))).collect(),
            answer: String::new(),
        })
    }
}

/// Notes who answers, and by which id of its own.
fn note(answered: &mut Answered, start: &Start) {
    answered.handler.clone_from(&start.handler);
    answered.provider_id = Some(start.id.clone()).filter(|id| !id.is_empty());
}

impl Handler for Observed {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        let stream = self.inner.stream(request, context)?;
        let (memory, mut answered) = (self.memory.clone(), self.begun(request));
        let mut observe = move |event: &Result<Event, HandlerError>| match event {
            Ok(Event::Start(start)) => {
                if let Some(answered) = &mut answered {
                    note(answered, start);
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
        };
        Ok(Box::new(stream.inspect(move |event| observe(event))))
    }

    fn complete(&self, request: &Request, context: &Context) -> Result<Completion, HandlerError> {
        let whole = self.inner.complete(request, context)?;
        if let Some(mut answered) = self.begun(request).filter(|_| whole.text().len() <= ANSWER_BYTES_MAX) {
            note(&mut answered, &whole.start);
            self.memory.answered(Answered { answer: whole.text().to_owned(), ..answered });
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

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::json;

    use super::*;
    use crate::handler::{FinishReason, Role, Usage};
    use crate::memory::rows::{Form, rows};
    use crate::memory::settings::{Content, Settings};
    use crate::memory::{About, Feedback};

    /// Gives one id twice.
    struct Careless;

    impl Handler for Careless {
        fn stream(&self, request: &Request, _: &Context) -> Result<EventStream, HandlerError> {
            let text = format!("to {}", request.messages[0].content);
            let events = [
                Event::start("chatcmpl-417", "tutor", "far"),
                Event::text(text),
                Event::finish(FinishReason::Stop),
                Event::Usage(Usage::default()),
            ];
            Ok(Box::new(events.into_iter().map(Ok)))
        }
    }

    #[test]
    fn two_answers_of_one_provider_id_are_two_answers() -> Result<()> {
        let place = tempfile::tempdir()?;
        let settings = Settings { content: Content::Full, ..Settings::default() };
        let memory = Arc::new(Memory::open(place.path(), settings)?);
        let person = |user: &str| Person { key: None, user: Some(user.into()) };
        let ask = |user: &str, is_streamed: bool| -> Result<String> {
            let (inner, model, id) = (Arc::new(Careless), "tutor".to_owned(), format!("chatcmpl-{user}"));
            let observed = Observed { inner, id: id.clone(), memory: memory.clone(), model, person: person(user) };
            let request = Request { messages: vec![Message::new(Role::User, user)], ..Request::default() };
            match is_streamed {
                true => drop(observed.stream(&request, &Context::default())?.collect::<Result<Vec<_>, _>>()?),
                false => drop(observed.complete(&request, &Context::default())?),
            }
            Ok(id)
        };
        let (of_ada, of_bob) = (ask("ada", true)?, ask("bob", false)?);
        for (user, id, better) in [("ada", &of_ada, "better for ada"), ("bob", &of_bob, "better for bob")] {
            let correction = Some(better.to_owned());
            let feedback = Feedback { response_id: id.clone(), correction, ..Feedback::default() };
            assert!(memory.rate(person(user), feedback).is_ok(), "{user}");
        }
        let contents = memory.contents()?;
        let About::Answer { provider_id, .. } = &contents[0].about else { panic!("{contents:?}") };
        assert_eq!(provider_id.as_deref(), Some("chatcmpl-417"));
        let pair = |user: &str| json!({"prompt": user, "chosen": format!("better for {user}"), "rejected": format!("to {user}")});
        assert_eq!(rows(&contents, Form::Pairs, None), [pair("ada"), pair("bob")]);
        Ok(())
    }
}
