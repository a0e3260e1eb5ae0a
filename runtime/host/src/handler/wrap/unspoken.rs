//! A stream that may begin anew as long as nothing of it was shown: what a retry and a fallback have in common.

use crate::handler::{Event, EventStream, HandlerError};

/// A stream that has begun.
pub(in crate::handler) struct Begun {
    pub(in crate::handler) stream: EventStream,
    /// It may yet be replaced by another, so that its start is held back until its first content.
    pub(in crate::handler) hold: bool,
}

/// The events of the first stream that has content. `again` makes the first stream of `None`, and after a stream that failed before its
/// content another of the error; or it returns the error that is shown.
pub(in crate::handler) struct Unspoken<F> {
    again: F,
    now: Option<Begun>,
    /// Held back, in order: a start, and behind it the first content.
    held: Option<Event>,
    spoken: bool,
}

impl<F: FnMut(Option<HandlerError>) -> Result<Begun, HandlerError>> Unspoken<F> {
    /// Begins the first stream.
    pub(in crate::handler) fn begin(mut again: F) -> Result<Self, HandlerError> {
        let now = Some(again(None)?);
        Ok(Self { again, now, held: None, spoken: false })
    }
}

impl<F: FnMut(Option<HandlerError>) -> Result<Begun, HandlerError>> Iterator for Unspoken<F> {
    type Item = Result<Event, HandlerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.spoken
                && let Some(event) = self.held.take()
            {
                return Some(Ok(event));
            }
            let Begun { stream, hold } = self.now.as_mut()?;
            match stream.next() {
                Some(Ok(event)) if self.spoken => return Some(Ok(event)),
                Some(Ok(start @ Event::Start(_))) if *hold => self.held = Some(start),
                Some(Ok(event)) => {
                    self.spoken = true;
                    let Some(start) = self.held.take() else { return Some(Ok(event)) };
                    self.held = Some(event);
                    return Some(Ok(start));
                }
                Some(Err(error)) => {
                    // What it holds, a connection or a place, is given back before another is asked.
                    self.now = None;
                    if self.spoken {
                        return Some(Err(error));
                    }
                    self.held = None;
                    match (self.again)(Some(error)) {
                        Ok(begun) => self.now = Some(begun),
                        Err(error) => return Some(Err(error)),
                    }
                }
                None => {
                    self.now = None;
                    return None;
                }
            }
        }
    }
}
