//! `POST /v1/chat/completions`: a handler works in a thread, and its answer is sent as a stream or in one piece.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::admit::{Asker, Need};
use super::body::{self, Waiting, name_ignored};
use super::reply::{Envelope, HANDLER, Refusal, frame, ping};
use super::{App, now, request};
use crate::handler::{self, Context, Event, Gives, Handler, HandlerError, Kind, PATIENCE, checked};

/// Most text that is made ahead of a client who does not read, in bytes. Shorter answers are completed for such a client and give
/// up their place among the answers.
const AHEAD: usize = 1 << 20;

pub(super) async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    match answer(&app, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn answer(app: &Arc<App>, request: Request) -> Result<Response, Refusal> {
    let asker = Asker::of(&request);
    let asked = request::read(&body::read(app, request).await?)?;
    let handler = asker.handler(app, &asked.model, Gives::Answers)?;
    let (handler, context) = asker.admit(app, handler, asked.user.as_deref(), &Need::Answer(&asked.request))?;
    let waiting = Waiting(context.clone());
    let request::Asked { model, request, stream, include_usage, mut ignored, .. } = asked;
    let mut envelope = Envelope::new(now(), model, include_usage);
    let (mut response, by) = if stream {
        let mut events = Events::of(handler, request, context.clone());
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
        envelope.name_handler = by.is_none();
        let first = first.map(|event| envelope.frames(event));
        let silence = app.bounds.silence;
        let ping = Box::pin(sleep(silence));
        let body = Body::from_stream(Frames { events, envelope, first, silence, ping, over: false, waiting });
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
        ((headers, body).into_response(), by)
    } else {
        let whole = spawn_blocking(move || handler.complete(&request, &context)).await;
        let whole = whole.map_err(|_| HandlerError::new(Kind::Internal, "the handler panicked"))??;
        drop(waiting);
        ignored.extend(whole.start.ignored.iter().cloned());
        (Json(envelope.completion(&whole)).into_response(), Some(whole.start.handler))
    };
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
struct Frames {
    events: Events,
    envelope: Envelope,
    first: Option<String>,
    /// After so long without a frame, a ping is sent.
    silence: Duration,
    ping: Pin<Box<Sleep>>,
    over: bool,
    waiting: Waiting,
}

impl Stream for Frames {
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
                    this.envelope.frames(event)
                }
                // A stream that just ends looks complete to clients, so that an error is sent first.
                Poll::Ready(Some(Err(error))) => {
                    this.over = true;
                    frame(&Refusal::from(error).body())
                }
                Poll::Ready(None) => {
                    this.over = true;
                    let error = HandlerError::new(Kind::Internal, "the answer broke off");
                    frame(&Refusal::from(error).body())
                }
                Poll::Pending => {
                    std::task::ready!(this.ping.as_mut().poll(context));
                    ping(this.waiting.0.before())
                }
            },
        };
        this.ping.as_mut().reset(Instant::now() + this.silence);
        Poll::Ready(Some(Ok(Bytes::from(frames))))
    }
}
