//! `/v1/files`: rows to learn from, as OpenAI's API takes them.
//!
//! A file goes to the disk as it comes, see [`multipart`], and belongs to the key that it came with, see [`store`].

mod multipart;
pub mod store;

use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use self::multipart::{Multipart, Wrong, boundary};
use self::store::{About, Files, NotKept};
use super::App;
use super::apart::apart;
use super::caller::Caller;
use super::fine_tuning::tuning;
use super::places::Taken;
use super::query::{Id, Query, page, refused};
use super::reply::{Refusal, failed};
use crate::handler::config::fine_tuning::UPLOADS_MAX;

/// A client may be this slow, in bytes a second, once the time for a body is over.
const SLOWEST: u64 = 10 << 10;
/// Longest value of a field that is no file.
const FIELD_BYTES_MAX: usize = 256;
/// What a form may hold beside the file.
const FORM_BYTES: u64 = 64 << 10;
/// Bytes of a file that are sent at once.
const PIECE: usize = 64 << 10;
/// Seconds that a file may be given to live.
const LIVES: std::ops::RangeInclusive<u64> = 3600..=2_592_000;
/// Most files in a list.
const LIST_MAX: usize = 10_000;

/// The files, for whoever may send some.
fn files(app: &App, caller: &Caller) -> Result<Arc<Files>, Refusal> {
    Ok(tuning(app, caller)?.files().clone())
}

fn find(files: &Files, owner: &Caller, id: &str) -> Result<About, Refusal> {
    files.find(owner.key.as_deref(), id).ok_or_else(|| no_file(id, "id"))
}

/// The refusal of a file that is not there.
pub(super) fn no_file(id: &str, param: &str) -> Refusal {
    let id: String = id.chars().take(80).collect();
    let refusal = Refusal::new(StatusCode::NOT_FOUND, format!("there is no file `{id}`"));
    Refusal { param: Some(param.to_owned()), ..refusal }
}

/// The refusal of a file that is not kept.
fn not_kept(files: &Files, why: NotKept) -> Refusal {
    match why {
        NotKept::TooLarge => too_long(files),
        NotKept::Full(words) => {
            let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, words);
            let (kind, code) = ("insufficient_quota", Some("insufficient_quota"));
            // It fits when something is deleted, and not because time has passed.
            Refusal { kind, code, param: Some("file".to_owned()), retry: Some(false), ..refusal }
        }
        NotKept::Failed(error) => failed(&error),
    }
}

pub(super) async fn list(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, Refusal> {
    let owner = Caller::of(request.extensions());
    let files = files(&app, &owner)?;
    let query = Query::read(request.uri(), &["after", "limit", "order", "purpose"])?;
    let limit = query.limit(LIST_MAX, LIST_MAX)?;
    let ascending = match query.get("order") {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(refused("order", "`order`: should be asc or desc")),
    };
    let all = apart(move || Ok(files.of(owner.key.as_deref()))).await?;
    let purpose = query.get("purpose");
    let mut all: Vec<About> = all.into_iter().filter(|about| purpose.is_none_or(|is| about.purpose == is)).collect();
    if ascending {
        all.reverse();
    }
    let (part, has_more) = page(all, |about| &about.id, query.get("after"), limit)?;
    let (first, last) = (part.first().map(|about| about.id.clone()), part.last().map(|about| about.id.clone()));
    let data: Vec<Value> = part.iter().map(About::card).collect();
    Ok(Json(json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, Refusal> {
    let owner = Caller::of(request.extensions());
    let files = files(&app, &owner)?;
    apart(move || Ok(Json(find(&files, &owner, &id)?.card()))).await
}

pub(super) async fn delete(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Result<Json<Value>, Refusal> {
    let owner = Caller::of(request.extensions());
    let files = files(&app, &owner)?;
    apart(move || {
        let about = find(&files, &owner, &id)?;
        if let Some(job) = app.class.tuning().and_then(|tuning| tuning.needs(&about.id)) {
            let message = format!("the file is needed by {job}, which has not ended; cancel that first");
            return Err(Refusal { param: Some("id".to_owned()), ..Refusal::new(StatusCode::CONFLICT, message) });
        }
        files.remove(&about).map_err(|error| failed(&error.into()))?;
        Ok(Json(json!({"id": about.id, "object": "file", "deleted": true})))
    })
    .await
}

pub(super) async fn content(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Result<Response, Refusal> {
    let owner = Caller::of(request.extensions());
    let files = files(&app, &owner)?;
    let (about, file) = apart(move || {
        let about = find(&files, &owner, &id)?;
        let file = File::open(files.content(&about)).map_err(|error| failed(&error.into()))?;
        Ok((about, file))
    })
    .await?;
    let (sender, pieces) = mpsc::channel(2);
    spawn_blocking(move || {
        let mut file = file;
        loop {
            let mut piece = vec![0; PIECE];
            let read = file.read(&mut piece);
            let is_end = !matches!(read, Ok(1..));
            let piece = read.map(|read| {
                piece.truncate(read);
                Bytes::from(piece)
            });
            if piece.as_ref().is_ok_and(Bytes::is_empty) || sender.blocking_send(piece).is_err() || is_end {
                return;
            }
        }
    });
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    let length = [(header::CONTENT_LENGTH, about.bytes)];
    Ok((headers, length, Body::from_stream(Sent(pieces))).into_response())
}

/// The body of a file that is sent.
struct Sent(mpsc::Receiver<io::Result<Bytes>>);

impl Stream for Sent {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().0.poll_recv(context)
    }
}

pub(super) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, Refusal> {
    let owner = Caller::of(request.extensions());
    let files = files(&app, &owner)?;
    let (parts, body) = request.into_parts();
    let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let Some(boundary) = header(header::CONTENT_TYPE).and_then(boundary) else {
        let message = "the body should be a form, with the header content-type: multipart/form-data; boundary=…";
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    };
    let bytes_max = files.limits.file_bytes + FORM_BYTES;
    if header(header::CONTENT_LENGTH)
        .and_then(|length| length.parse().ok())
        .is_some_and(|length: u64| length > bytes_max)
    {
        return Err(too_long(&files));
    }
    let place = app.class.uploads.take(owner.key.as_deref(), files.limits.key_uploads, UPLOADS_MAX);
    let _place = place.map_err(|taken| {
        let retry_after = Some(Duration::from_secs(2));
        match taken {
            Taken::All => {
                let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "other files are being sent; try again");
                Refusal { kind: "api_error", retry_after, ..refusal }
            }
            Taken::OfKey => {
                let (key, most) = (owner.key.as_deref().unwrap_or_default(), files.limits.key_uploads);
                let message =
                    format!("the key `{key}` may send so many files at once: {most}; try again when one is there");
                let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, message);
                Refusal { kind: "rate_limit_error", code: Some("rate_limit_exceeded"), retry_after, ..refusal }
            }
        }
    })?;
    let (sender, pieces) = mpsc::channel(4);
    let writing = spawn_blocking(move || take(&files, &owner, Pieces { pieces, now: Bytes::new() }, &boundary));
    let sent = send(body, app.bounds.body, bytes_max, sender).await;
    let written = writing.await.map_err(|_| failed(&anyhow::anyhow!("the file cannot be taken: a panic")))?;
    // Of what broke off, why it did says more than that it did.
    sent.and(written).map(|about| Json(about.card()))
}

fn too_long(files: &Files) -> Refusal {
    let message =
        format!("the file is larger than {} MiB, the most that this server takes", files.limits.file_bytes >> 20);
    Refusal { param: Some("file".to_owned()), ..Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message) }
}

/// Sends the pieces of a body to whoever reads them, until the end or until nobody wants more.
async fn send(
    body: Body,
    patience: Duration,
    bytes_max: u64,
    to: mpsc::Sender<io::Result<Bytes>>,
) -> Result<(), Refusal> {
    let (mut body, began, mut bytes) = (body.into_data_stream(), Instant::now(), 0_u64);
    loop {
        let next = std::future::poll_fn(|context| Pin::new(&mut body).poll_next(context));
        let late = began + patience + Duration::from_secs(bytes / SLOWEST);
        let refusal = match timeout_at(late, next).await {
            Ok(None) => return Ok(()),
            Ok(Some(Ok(piece))) => {
                bytes += piece.len() as u64;
                if bytes <= bytes_max {
                    if to.send(Ok(piece)).await.is_err() {
                        // Why is told by whoever reads.
                        return Ok(());
                    }
                    continue;
                }
                Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "the form is larger than the largest file that is taken")
            }
            Ok(Some(Err(_))) => Refusal::new(StatusCode::BAD_REQUEST, "the body of the request is incomplete"),
            Err(_) => {
                Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body of the request comes too slowly, and was given up")
            }
        };
        let _ = to.send(Err(io::ErrorKind::ConnectionAborted.into())).await;
        return Err(refusal);
    }
}

/// The pieces of a body, for a thread that reads.
struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    now: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(piece) => self.now = piece?,
            }
        }
        let part = self.now.split_to(self.now.len().min(buffer.len()));
        buffer[..part.len()].copy_from_slice(&part);
        Ok(part.len())
    }
}

/// Reads the form and keeps its file.
fn take(files: &Files, owner: &Caller, pieces: Pieces, boundary: &str) -> Result<About, Refusal> {
    let malformed = |wrong: Wrong| match wrong {
        Wrong::Form(words) => Refusal::new(StatusCode::BAD_REQUEST, format!("the form is malformed: {words}")),
        Wrong::Read(error) => failed(&error.into()),
    };
    let mut form = Multipart::new(pieces, boundary);
    let (mut file, mut purpose, mut anchor, mut lives) = (None, None, None, None);
    while let Some(head) = form.next_part().map_err(malformed)? {
        match head.name.as_str() {
            "file" if file.is_none() => {
                let name = head.filename.ok_or_else(|| refused("file", "`file`: should be a file, with a name"))?;
                let mut new = files.begin(owner.key.as_deref(), &name).map_err(|why| not_kept(files, why))?;
                let mut ends = None;
                let written = form.read_part(|piece| {
                    new.write(piece).map_err(|why| {
                        ends = Some(why);
                        Wrong::Form(String::new())
                    })
                });
                if let Some(why) = ends {
                    return Err(not_kept(files, why));
                }
                written.map_err(malformed)?;
                file = Some(new);
            }
            "purpose" if purpose.is_none() => purpose = Some(form.text(FIELD_BYTES_MAX).map_err(malformed)?),
            "expires_after[anchor]" if anchor.is_none() => {
                anchor = Some(form.text(FIELD_BYTES_MAX).map_err(malformed)?);
            }
            "expires_after[seconds]" if lives.is_none() => {
                lives = Some(form.text(FIELD_BYTES_MAX).map_err(malformed)?);
            }
            known @ ("file" | "purpose" | "expires_after[anchor]" | "expires_after[seconds]") => {
                return Err(refused(known, format!("`{known}`: given twice")));
            }
            other => {
                let other: String = other.chars().take(80).collect();
                return Err(refused(
                    &other,
                    format!("`{other}`: unknown field; known are file, purpose and expires_after"),
                ));
            }
        }
    }
    match purpose.as_deref() {
        Some("fine-tune") => {}
        None => return Err(refused("purpose", "`purpose` is missing; it is fine-tune")),
        Some(_) => return Err(refused("purpose", "`purpose`: files are kept here for fine-tune alone")),
    }
    if anchor.is_some_and(|anchor| anchor != "created_at") {
        return Err(refused("expires_after", "`expires_after[anchor]`: should be created_at"));
    }
    let lives = lives.map(|lives| {
        let lives = lives.parse().ok().filter(|lives| LIVES.contains(lives));
        lives.ok_or_else(|| refused("expires_after", "`expires_after[seconds]`: should be from 3600 to 2592000"))
    });
    let lives = lives.transpose()?;
    let file = file.ok_or_else(|| refused("file", "`file` is missing"))?;
    if file.bytes() == 0 {
        return Err(refused("file", "`file`: the file is empty"));
    }
    file.keep("fine-tune", lives).map_err(|error| failed(&error))
}
