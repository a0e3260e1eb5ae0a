//! The gate before all routes: which names a server is called by, which pages may use it, and who may.
//!
//! Nothing is served that this has not let in: it stands around the whole router, so that a route that is added is closed.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};

use super::admit::{self, Access};
use super::apart::apart;
use super::caller::Caller;
use super::keys::{Wanted, given};
use super::places::Place;
use super::record::{REQUEST_ID, Record};
use super::reply::Refusal;
use super::{App, ollama, route_of};
use crate::handler::config::server::{Log, Settings};

/// What everybody may ask who can reach the port: whether the server is there, and nothing else.
pub const OPEN: [&str; 2] = ["/healthz", "/health"];
/// Headers that pages of a named origin may send and read.
const PAGES_SEND: &str = "authorization, content-type, api-key, x-api-key, x-request-id";
/// The status of a request whose client left before it had one, as nginx notes it.
const LEFT: u16 = 499;
const PAGES_READ: &str = "x-request-id, x-homeroom-handler, x-homeroom-response-id, x-ignored-params, retry-after";

/// Lets a request in, or refuses it; and notes what came of it.
pub(super) async fn gate(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let route = route_of(request.uri().path()).map_or("none", |(route, _)| route);
    let record = Arc::new(Record::new(request.headers(), request.method().as_str(), route));
    app.metrics.begin();
    let settings = app.settings();
    // Before anything is waited for: who leaves meanwhile is counted out, too.
    let mut end =
        End { app: app.clone(), record: record.clone(), log: settings.log, status: LEFT, whole: false, _open: None };
    let page = Page::of(&request, &settings);
    let is_ollama = is_ollama(request.uri().path());
    request.extensions_mut().insert(record.clone());
    let is_open = OPEN.contains(&request.uri().path()) && [Method::GET, Method::HEAD].contains(request.method());
    let door = if is_open { Door::Open } else { Door::of(&app).await };
    let is_wanted = door.is_keyed(&app);
    let found = let_in(&app, &settings, &page, &record, door, &mut request);
    let is_known = request.extensions().get::<Access>().is_some();
    let key = request.extensions().get::<Access>().and_then(|access| access.0.clone());
    let found = found.and_then(|answer| match key {
        Some(key) => one_more(&app, &key.name).map(|open| {
            end._open = Some(open);
            answer
        }),
        None => Ok(answer),
    });
    let closes = !is_known && is_wanted || found.is_err();
    let mut response = match found {
        Ok(None) => next.run(request).await,
        Ok(Some(answer)) => answer,
        Err(refusal) if is_ollama => ollama::error(&refusal),
        Err(refusal) => refusal.into_response(),
    };
    let headers = response.headers_mut();
    // Who has no key, or is not let in, keeps no connection, of which there are so many.
    if closes {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        headers.insert(REQUEST_ID, id);
    }
    if !settings.cors_origins.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
        if let Page::Named(origin) = page {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(PAGES_READ));
        }
    }
    let (parts, body) = response.into_parts();
    end.status = parts.status.as_u16();
    Response::from_parts(parts, Body::new(Watched { body, end }))
}

/// Counts one more open request of a key, which may have half of all connections, so that one whose bodies never end does not hold them all.
fn one_more(app: &App, key: &str) -> Result<Place, Refusal> {
    let most = app.bounds.connections.div_ceil(2);
    // That there are no more in all is seen to where connections are taken.
    app.open.take(Some(key), most, usize::MAX).map_err(|_| {
        let message = format!(
            "this key has {most} requests open, half of what this server takes at once; wait until some are answered"
        );
        let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, message);
        let (kind, code) = ("rate_limit_error", Some("rate_limit_exceeded"));
        Refusal { kind, code, retry_after: Some(Duration::from_secs(5)), ..refusal }
    })
}

/// Whether errors of a path have Ollama's shape.
pub(super) fn is_ollama(path: &str) -> bool {
    path.starts_with("/api/")
}

/// The page that a browser sends a request for.
enum Page {
    /// None, or one of this server.
    Own,
    /// One that the settings name.
    Named(HeaderValue),
    /// Another.
    Foreign,
}

impl Page {
    fn of(request: &Request, settings: &Settings) -> Self {
        let headers = request.headers();
        let Some(origin) = headers.get(header::ORIGIN) else { return Self::Own };
        let text = origin.to_str().unwrap_or_default();
        if settings.cors_origins.iter().any(|named| named.eq_ignore_ascii_case(text)) {
            return Self::Named(origin.clone());
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let is_own = text.split_once("://").zip(host).is_some_and(|((_, of), host)| of.eq_ignore_ascii_case(host));
        if is_own { Self::Own } else { Self::Foreign }
    }
}

/// Who may pass.
enum Door {
    /// Who can reach the port. What is open waits for no disk.
    Open,
    /// Who has one of the keys, if any is wanted.
    Keyed(Result<Option<Wanted>, Refusal>),
}

impl Door {
    /// Looks at the file of keys.
    async fn of(app: &Arc<App>) -> Self {
        let app = app.clone();
        let unread = |error: anyhow::Error| {
            let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}"));
            Refusal { kind: "api_error", code: Some("keys_unavailable"), ..refusal }
        };
        Self::Keyed(apart(move || app.keys.wanted().map_err(unread)).await)
    }

    /// Returns true if a key is wanted here.
    fn is_keyed(&self, app: &App) -> bool {
        match self {
            Self::Open => app.keys.was_wanted(),
            Self::Keyed(keys) => !matches!(keys, Ok(None)),
        }
    }
}

/// Checks a request, and notes who sent it. Returns an answer if that is all there is to it.
fn let_in(
    app: &App,
    settings: &Settings,
    page: &Page,
    record: &Record,
    door: Door,
    request: &mut Request,
) -> Result<Option<Response>, Refusal> {
    check_host(request, settings, door.is_keyed(app))?;
    match page {
        Page::Named(_) if request.method() == Method::OPTIONS => return Ok(Some(preflight())),
        // What a form sends needs no leave of the server, and would have been done by the time its answer is withheld.
        Page::Foreign if ![Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method()) => {
            let message = "a page of another origin may not use this server; whoever runs it names origins in [server] cors_origins";
            return Err(Refusal { kind: "permission_error", ..Refusal::new(StatusCode::FORBIDDEN, message) });
        }
        _ => {}
    }
    let Door::Keyed(wanted) = door else { return Ok(None) };
    let (caller, key) = match wanted? {
        None => (Caller::new(None, true), None),
        Some(keys) => {
            let given = given::key(request.headers()).map_err(|why| no_key(why, request.headers()))?;
            let Some(given) = given else {
                let why = "this server wants an API key; send it as `Authorization: Bearer KEY`";
                return Err(no_key(why, request.headers()));
            };
            let Some(key) = keys.find(&given) else {
                return Err(no_key(
                    "the API key is not one of this server's; it may have been removed",
                    request.headers(),
                ));
            };
            (Caller::new(Some(key.name.clone()), key.trust_forwarded), Some(Arc::new(key.clone())))
        }
    };
    let caller = caller.with_headers(request.headers())?;
    {
        let mut known = record.known();
        (known.key, known.user) = (caller.key.clone(), caller.user.clone());
    }
    // What asks a model is counted there, when it is known for whom.
    let changes = ![Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    if let Some(key) = key.as_deref().filter(|_| changes && !asks_a_model(&record.route)) {
        admit::count(app, key, &caller, record)?;
    }
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(Access(key));
    Ok(None)
}

/// Whether a route asks a model.
fn asks_a_model(route: &str) -> bool {
    is_ollama(route) || route.ends_with("/completions") || route == super::EMBEDDINGS
}

/// The refusal of a request without a key that counts.
fn no_key(why: &str, headers: &HeaderMap) -> Refusal {
    let refusal = Refusal::new(StatusCode::UNAUTHORIZED, why);
    let people = accepts_html(headers);
    // A browser asks its user for a name and a password, which is the key.
    let challenge =
        if people { "Basic realm=\"homeroom: the password is an API key\"" } else { "Bearer realm=\"homeroom\"" };
    Refusal { kind: "authentication_error", code: Some("invalid_api_key"), challenge: Some(challenge), ..refusal }
}

/// Whether a person reads the answer in a browser.
pub(super) fn accepts_html(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

fn preflight() -> Response {
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, PAGES_SEND),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

/// Refuses a request whose `Host` is no name of this server: a page elsewhere can name this machine by a host name of its own (DNS
/// rebinding).
fn check_host(request: &Request, settings: &Settings, keys_wanted: bool) -> Result<(), Refusal> {
    // RFC 9112, section 3.2.
    if request.headers().get_all(header::HOST).iter().count() > 1 {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "the request has more than one Host header"));
    }
    let header = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let named = [header, request.uri().authority().map(|authority| authority.as_str())];
    let is_known = |host: &str| is_name_of_ours(host, &settings.allowed_hosts, keys_wanted);
    if header.is_some() && named.into_iter().flatten().all(is_known) {
        return Ok(());
    }
    let others = if keys_wanted { ", by the address of its machine" } else { "" };
    let message = format!(
        "this server answers only when it is called localhost or 127.0.0.1{others}, or as [server] allowed_hosts says; use one of these in the URL"
    );
    Err(Refusal { kind: "permission_error", ..Refusal::new(StatusCode::FORBIDDEN, message) })
}

/// Returns true if a `Host`, with or without a port, names this machine, is allowed, or is an address and a key is wanted: addresses are
/// not rebound.
fn is_name_of_ours(host: &str, allowed: &[String], keys_wanted: bool) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(name, _)| name),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    if let Ok(address) = name.parse::<IpAddr>() {
        return keys_wanted || address.is_loopback();
    }
    name.eq_ignore_ascii_case("localhost") || allowed.iter().any(|allowed| name.eq_ignore_ascii_case(allowed))
}

/// The end of a request, which is noted when the last byte of its answer was taken, or the client has left.
struct End {
    app: Arc<App>,
    record: Arc<Record>,
    log: Log,
    status: u16,
    whole: bool,
    /// One of its key's requests.
    _open: Option<Place>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.app.metrics.end(&self.record.route, self.record.method(), self.status);
        if let Some(text) = self.record.line(self.log, &self.app.pseudonyms, self.status, self.whole) {
            self.app.log.say(text);
        }
    }
}

/// The body of an answer, whose end is noted.
struct Watched {
    body: Body,
    end: End,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        self.end.whole |= matches!(frame, Poll::Ready(None)) || self.body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_server_pass() {
        let allowed = ["tutor.school.example".to_owned()];
        for good in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"] {
            assert!(is_name_of_ours(good, &[], false), "{good}");
        }
        for good in ["Tutor.School.example:443", "tutor.school.example"] {
            assert!(is_name_of_ours(good, &allowed, false) && !is_name_of_ours(good, &[], true), "{good}");
        }
        for address in ["10.0.0.1", "10.0.0.1:8080", "0.0.0.0:80", "[fe80::1]", "[2001:db8::1]:80"] {
            assert!(!is_name_of_ours(address, &allowed, false) && is_name_of_ours(address, &[], true), "{address}");
        }
        for bad in [
            "",
            "evil.example",
            "localhost.evil.example:80",
            "[::1",
            "::",
            "x.tutor.school.example",
            "10.0.0.1.evil.example",
        ] {
            assert!(!is_name_of_ours(bad, &allowed, true), "{bad}");
        }
    }
}
