//! A handler whose answers come in one piece: it is asked for the whole answer, and tells that as events.
//!
//! A wrapper around a route reads and changes events. If nobody watches an answer come, the route should still be asked for the whole of it, as
//! then its next handler can be asked after any failure.

use std::sync::Arc;

use super::Wrapper;
use crate::handler::{
    Choice, Completion, Context, Event, EventStream, Handler, HandlerError, Request, ToolCall, collect,
};

struct Whole(Arc<dyn Handler>);

impl Handler for Whole {
    fn stream(&self, request: &Request, context: &Context) -> Result<EventStream, HandlerError> {
        self.0.complete(request, context).map(events)
    }
}

/// Has a handler asked for a whole answer, and a wrapper see it as events.
pub(super) fn complete(
    wrapper: &impl Wrapper,
    inner: &Arc<dyn Handler>,
    request: &Request,
    context: &Context,
) -> Result<Completion, HandlerError> {
    let whole: Arc<dyn Handler> = Arc::new(Whole(inner.clone()));
    collect(wrapper.stream(&whole, request, context)?)
}

/// The events of a whole answer.
fn events(whole: Completion) -> EventStream {
    let Completion { start, choices, usage } = whole;
    let of_choice = |(choice, of): (usize, Choice)| {
        let Choice { text, reasoning, tool_calls, logprobs, finish } = of;
        let reasoning = (!reasoning.is_empty()).then_some(Event::Reasoning { choice, text: reasoning });
        let says = !text.is_empty() || !logprobs.is_empty();
        let text = says.then_some(Event::Delta { choice, text, logprobs });
        let call = move |(index, ToolCall { id, name, arguments })| {
            let (id, name) = (Some(id), Some(name));
            Event::ToolCall { choice, index, id, name, arguments }
        };
        let calls = tool_calls.into_iter().enumerate().map(call);
        reasoning.into_iter().chain(text).chain(calls).chain([Event::Finish { choice, reason: finish }])
    };
    let choices = choices.into_iter().enumerate().flat_map(of_choice);
    Box::new([Event::Start(start)].into_iter().chain(choices).chain([Event::Usage(usage)]).map(Ok))
}
