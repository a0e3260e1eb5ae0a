//! An answer on its way to a client: a handler works in a thread, and what it says is sent as a stream or in one piece, in the shape of
//! some API.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::App;
use super::admit::Admission;
use super::body::{Waiting, name_ignored};
use super::reply::{HANDLER, RESPONSE_ID, Refusal};
use crate::handler::{self, Completion, Context, Event, Handler, HandlerError, Kind, PATIENCE, checked};

/// Most text that is made ahead of a client who does not read, in bytes. Shorter answers are completed for such a client and give
/// up their place among the answers.
const AHEAD: usize = 1 << 20;

/// The shape in which an API sends answers.
pub(super) trait Shape: Send + Unpin + 'static {
    /// The media type of a stream.
    fn stream_type(&self) -> &'static str;

    /// The body of a whole answer.
    fn whole(&mut self, whole: &Completion) -> Value;

    /// The stream begins before the answer does, so that the headers cannot name who gives it.
    fn begins_early(&mut self);

    /// What is sent of an event.
    fn event(&mut self, event: Event) -> String;

    /// What is sent of an error in the middle; it ends the stream.
    fn error(&mut self, refusal: &Refusal) -> String;

    /// What is sent when nothing has been said for a while, of a request that so many are before.
    fn silence(&mut self, before: usize) -> String;
}

/// Has a handler that was admitted answer a request.
///
/// # Errors
/// When it refuses before the answer begins.
pub(super) async fn answer(
    app: &App,
    Admission { handler, context, id }: Admission,
    request: handler::Request,
    stream: bool,
    mut shape: impl Shape,
    mut ignored: Vec<String>,
) -> Result<Response, Refusal> {
    let waiting = Waiting(context.clone());
    let (mut response, by) = if stream {
        let mut events = Events::of(handler, request, context);
        // A refusal before the answer begins has its own status; with a long prompt, the client gets its 200 before the answer begins.
        let first = match timeout(app.bounds.first_event, events.next()).await {
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(Some(Ok(event))) => Some(event),
            Ok(None) | Err(_) => None,
        };
        let by = match &first {
            Some(Event::Start(start)) => {
                ignored.extend(start.ignored.iter().cloned());
                Some(start.handler.clone())
            }
            _ => None,
        };
        if by.is_none() {
            shape.begins_early();
        }
        let kind = shape.stream_type();
        let first = first.map(|event| shape.event(event));
        let silence = app.bounds.silence;
        let ping = Box::pin(sleep(silence));
        let body = Body::from_stream(Frames { events, shape, first, silence, ping, over: false, waiting });
        let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")];
        ((headers, body).into_response(), by)
    } else {
        let whole = spawn_blocking(move || -> Result<_, HandlerError> {
            let whole = handler.complete(&request, &context)?;
            Ok((shape.whole(&whole).to_string(), whole.start))
        });
        let whole = whole.await.map_err(|_| HandlerError::new(Kind::Internal, "the handler panicked"))?;
        let (body, start) = whole?;
        drop(waiting);
        ignored.extend(start.ignored);
        (([(header::CONTENT_TYPE, "application/json")], body).into_response(), Some(start.handler))
    };
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert(RESPONSE_ID, id);
    }
    if let Some(by) = by.and_then(|by| HeaderValue::try_from(by).ok()) {
        response.headers_mut().insert(HANDLER, by);
    }
    name_ignored(response.headers_mut(), &ignored);
    Ok(response)
}

type Item = Result<Event, HandlerError>;

/// Events of a handler that works in a thread. axum's bodies only pull, and a tokio channel bounds events and not bytes.
struct Events {
    channel: mpsc::UnboundedReceiver<Item>,
    /// Bytes of text in the channel.
    ahead: Arc<AtomicUsize>,
}

impl Events {
    fn of(handler: Arc<dyn Handler>, request: handler::Request, context: Context) -> Self {
        let (sender, channel) = mpsc::unbounded_channel();
        let ahead = Arc::new(AtomicUsize::new(0));
        let made = ahead.clone();
        spawn_blocking(move || {
            let stream = match handler.stream(&request, &context) {
                Ok(stream) => checked(context.watch(stream)),
                Err(error) => Box::new(std::iter::once(Err(error))),
            };
            for item in stream {
                made.fetch_add(bytes(&item), Ordering::SeqCst);
                if sender.send(item).is_err() {
                    return;
                }
                while made.load(Ordering::SeqCst) > AHEAD {
                    if let Err(gone) = context.check() {
                        // The client may have left.
                        let _ = sender.send(Err(gone));
                        return;
                    }
                    std::thread::sleep(PATIENCE);
                }
            }
        });
        Self { channel, ahead }
    }

    async fn next(&mut self) -> Option<Item> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> Poll<Option<Item>> {
        let item = std::task::ready!(self.channel.poll_recv(context));
        if let Some(item) = &item {
            self.ahead.fetch_sub(bytes(item), Ordering::SeqCst);
        }
        Poll::Ready(item)
    }
}

/// Returns about the memory of an item, in bytes.
fn bytes(item: &Item) -> usize {
    match item {
        Ok(event) => event.bytes(),
        _ => 64,
    }
}

/// The body of a streamed answer.
struct Frames<S> {
    events: Events,
    shape: S,
    first: Option<String>,
    /// After so long without a frame, a ping is sent.
    silence: Duration,
    ping: Pin<Box<Sleep>>,
    over: bool,
    waiting: Waiting,
}

impl<S: Shape> Stream for Frames<S> {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let frames = match this.first.take() {
            Some(first) => first,
            None => match this.events.poll_next(context) {
                Poll::Ready(Some(Ok(event))) => {
                    this.over = matches!(event, Event::Usage(_));
                    this.shape.event(event)
                }
                // A stream that just ends looks complete to clients, so that an error is sent first.
                Poll::Ready(Some(Err(error))) => {
                    this.over = true;
                    this.shape.error(&Refusal::from(error))
                }
                Poll::Ready(None) => {
                    this.over = true;
                    let error = HandlerError::new(Kind::Internal, "the answer broke off");
                    this.shape.error(&Refusal::from(error))
                }
                Poll::Pending => {
                    std::task::ready!(this.ping.as_mut().poll(context));
                    this.shape.silence(this.waiting.0.before())
                }
            },
        };
        this.ping.as_mut().reset(Instant::now() + this.silence);
        Poll::Ready(Some(Ok(Bytes::from(frames))))
    }
}
