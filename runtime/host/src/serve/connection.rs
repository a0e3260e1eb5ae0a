//! Connections: their number, and how long a client may keep the server waiting.
//!
//! When all places are taken, the oldest connection that has been there for a second and has never sent a complete request is closed, so
//! that clients who only connect keep nobody out, and who has just come is not taken for one of them.
//!
//! A client that sends half a request, does not read its answer, or leaves while more of its requests are in the buffer, loses its
//! connection. The work on its answer ends with it.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::Router;
use axum::extract::Request;
use axum::middleware::map_request;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use crate::handler::config::server::Settings;

/// How often a client that sends requests ahead is checked for having left.
const LOOK: Duration = Duration::from_millis(200);
/// How long a connection may take to say something when others wait for its place.
const MUTE: Duration = Duration::from_secs(1);
/// For how long, and how many bytes, a refused client may go on sending.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 16 << 20);
/// Most bytes of a request that are buffered.
const BUFFER: usize = 128 << 10;

/// How many connections there may be, how long a client may keep the server waiting, and how long the server keeps a client waiting
/// without a word.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at once, each with an answer at most; more wait in the system's queue.
    pub connections: usize,
    /// From the beginning of a connection, or the end of the answer before, to the end of a request's headers.
    pub headers: Duration,
    /// From there to the end of its body.
    pub body: Duration,
    /// While it takes nothing of what it is sent.
    pub unread: Duration,
    /// Until a stream says 200 without having begun: what is refused before that has its own status.
    pub first_event: Duration,
    /// Between two words of a stream, before it says that it is alive.
    pub silence: Duration,
}

impl From<&Settings> for Bounds {
    fn from(settings: &Settings) -> Self {
        let Settings { connections, header_timeout: headers, body_timeout: body, .. } = *settings;
        let [unread, first_event, silence] = [30, 10, 5].map(Duration::from_secs);
        Self { connections, headers, body, unread, first_event, silence }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self::from(&Settings::default())
    }
}

/// Serves a router until `stopped` is true. Then it accepts no connection, and returns when the answers under way are complete.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    bounds: Bounds,
    mut stopped: watch::Receiver<bool>,
) -> Result<()> {
    let places = Arc::new(Semaphore::new(bounds.connections));
    let mut connections = JoinSet::new();
    let mut mute = VecDeque::<Arc<Mute>>::new();
    loop {
        mute.retain(|connection| Arc::strong_count(connection) > 1 && !connection.spoke.load(Ordering::SeqCst));
        // The next client always finds a place: when none is left, the oldest silent connection is closed.
        let place = loop {
            if let Ok(place) = places.clone().try_acquire_owned() {
                break place;
            }
            match mute.front() {
                // Its request came while others were waited for.
                Some(oldest) if oldest.spoke.load(Ordering::SeqCst) => {
                    mute.pop_front();
                    continue;
                }
                Some(oldest) if oldest.since.elapsed() >= MUTE => {
                    oldest.leaves.notify_one();
                    mute.pop_front();
                }
                Some(_) => {}
                None => break places.clone().acquire_owned().await?,
            }
            // It closes soon, but not at once.
            if let Ok(place) = timeout(LOOK, places.clone().acquire_owned()).await {
                break place?;
            }
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error means that the sender is gone, and with it whoever wants the server.
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        while connections.try_join_next().is_some() {}
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // The client has left already, or no descriptor is free: the server goes on.
            Err(_) => {
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (router, stopped) = (router.clone(), stopped.clone());
        let connection = Arc::new(Mute { since: Instant::now(), spoke: AtomicBool::new(false), leaves: Notify::new() });
        mute.push_back(connection.clone());
        connections.spawn(async move {
            let _place = place;
            answer(stream, router, bounds, connection, stopped).await;
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// A connection that has not sent a complete request.
struct Mute {
    since: Instant,
    spoke: AtomicBool,
    /// Tells it to close.
    leaves: Notify,
}

/// Answers the requests of one connection, one after another.
async fn answer(
    stream: TcpStream,
    router: Router,
    bounds: Bounds,
    state: Arc<Mute>,
    mut stopped: watch::Receiver<bool>,
) {
    let stream = Arc::new(stream);
    let io = TokioIo::new(Impatient { stream: stream.clone(), patience: bounds.unread, unread: None });
    let mut builder = http1::Builder::new();
    let speaks = state.clone();
    let router = router.layer(map_request(move |request: Request| {
        speaks.spoke.store(true, Ordering::SeqCst);
        async move { request }
    }));
    builder.timer(TokioTimer::new()).header_read_timeout(bounds.headers).max_buf_size(BUFFER);
    let mut connection = std::pin::pin!(builder.serve_connection(io, TowerToHyperService::new(router)));
    let mut ending = false;
    loop {
        tokio::select! {
            // There is nobody left to tell about an error.
            _ = connection.as_mut() => break,
            () = gone(&stream) => return,
            () = state.leaves.notified() => if !state.spoke.load(Ordering::SeqCst) { return },
            _ = stopped.wait_for(|stopped| *stopped), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
    linger(&stream).await;
}

/// Reads what the client still sends, before the connection is closed: closing a connection with unread bytes resets it, and the client
/// would lose an answer that it has not read yet.
async fn linger(stream: &TcpStream) {
    let (time, bytes) = LINGER;
    let _ = SockRef::from(stream).shutdown(Shutdown::Write);
    let take = async {
        let (mut taken, mut scrap) = (0, vec![0; 64 << 10]);
        while taken < bytes && stream.readable().await.is_ok() {
            match stream.try_read(&mut scrap) {
                Ok(0) => return,
                Ok(read) => taken += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    let _ = timeout(time, take).await;
}

/// Waits until the client has closed its side. hyper notices that only after it has read all that was sent before.
async fn gone(stream: &TcpStream) {
    loop {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => sleep(LOOK).await,
            _ => return,
        }
    }
}

/// A connection whose writes fail when the client takes nothing for too long.
struct Impatient {
    stream: Arc<TcpStream>,
    patience: Duration,
    unread: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn write(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.poll_write_ready(context) {
                Poll::Ready(Ok(())) => match write(&self.stream) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    written => {
                        self.unread = None;
                        return Poll::Ready(written);
                    }
                },
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    let patience = self.patience;
                    ready!(self.unread.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(context));
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
        }
    }
}

impl AsyncRead for Impatient {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            match self.stream.try_read(buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().write(context, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().write(context, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Nothing: [`linger`] follows.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
