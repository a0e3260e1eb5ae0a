//! The server: handlers over HTTP, by OpenAI's API.
//!
//! There are no keys yet, so it listens on this machine alone, and checks the `Host` that a browser believes it talks to: a
//! page elsewhere can name this machine by a host name of its own (DNS rebinding). Bodies must say that they are JSON,
//! which a page elsewhere cannot without a CORS preflight; that is refused. Nothing is logged.

mod body;
pub mod caller;
mod chat;
mod class;
mod connection;
mod embeddings;
mod feedback;
mod files;
pub mod fine_tuning;
mod models;
mod observed;
mod person;
mod query;
mod reply;
mod request;
mod tuned;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::handler::Gives;
use crate::terminal::shown;
use crate::toml_problems::near;
pub use class::Class;
pub use connection::Bounds;
pub use models::Models;
pub use person::Person;
use reply::Refusal;

/// Longest time for an answer, or for all texts of one request for vectors, including the wait in the queue.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30 * 60);
/// How long answers may go on once the server is asked to stop.
const DRAIN: Duration = Duration::from_secs(30);

/// Opens a port of this machine.
///
/// # Errors
/// When the host is another one, or the port is taken.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let address = match host.trim_matches(['[', ']']) {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        other => match other.parse::<IpAddr>() {
            Ok(address) if address.is_loopback() => address,
            _ => bail!(
                "--host {host}: other machines could use the models without a key, and keys are not built yet; serve on 127.0.0.1, and forward a port (ssh -L) where others need it"
            ),
        },
    };
    let address = SocketAddr::new(address, port);
    TcpListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            anyhow!("{address}: another program listens there, perhaps another `homeroom serve`; end it, or take another --port (0: a free one)")
        }
        _ => anyhow!("{address}: cannot listen there: {error}; --port 0 takes a free port"),
    })
}

/// A server that runs in a thread of its own.
pub struct Running {
    /// The address that it listens on.
    pub address: SocketAddr,
    models: Arc<RwLock<Models>>,
    stop: watch::Sender<bool>,
    thread: JoinHandle<Result<()>>,
}

impl Running {
    /// Returns the base URL for clients.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Returns a function that replaces the models. Answers under way go on with the model that they began with.
    pub fn replacer(&self) -> impl Fn(Models) + Send + 'static {
        let served = self.models.clone();
        move |models| {
            let mut served = served.write().unwrap_or_else(PoisonError::into_inner);
            *served = models.with_tuned_of(&served);
        }
    }

    /// Takes no further requests, and lets answers under way complete within half a minute.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    /// When the server failed.
    pub fn wait(self) -> Result<()> {
        self.thread.join().unwrap_or_else(|_| bail!("the server's thread ended in a panic"))
    }

    /// Returns a function that stops it from another thread.
    pub fn stopper(&self) -> impl Fn() + Send + 'static {
        let stop = self.stop.clone();
        move || {
            stop.send_replace(true);
        }
    }
}

/// Serves models on a port.
///
/// # Errors
/// When there is no model, or the system refuses.
pub fn start(models: Models, listener: TcpListener) -> Result<Running> {
    start_with(models, listener, Bounds::default())
}

/// Serves models on a port, with other bounds.
///
/// # Errors
/// As [`start`].
pub fn start_with(models: Models, listener: TcpListener, bounds: Bounds) -> Result<Running> {
    start_class(models, listener, bounds, Class::default())
}

/// Serves models on a port, and does more than answer.
///
/// # Errors
/// As [`start`].
pub fn start_class(models: Models, listener: TcpListener, bounds: Bounds, class: Class) -> Result<Running> {
    ensure!(!models.is_empty(), "there is no model to serve");
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    // Each connection has one answer at most, and each answer takes a thread.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(bounds.connections)
        .enable_all()
        .build()?;
    let (stop, stopped) = watch::channel(false);
    let models = Arc::new(RwLock::new(models));
    let ending = Arc::new(AtomicBool::new(false));
    let app = Arc::new(App { models: models.clone(), created: now(), bounds, ending, class: class.clone() });
    if let Some(tuning) = class.tuning() {
        let served = models.clone();
        tuning.begin(Box::new(move |name, model| {
            served.write().unwrap_or_else(PoisonError::into_inner).add_tuned(name, model);
        }))?;
    }
    let ending = app.ending.clone();
    let stopping = class.clone();
    let serve = async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let mut late = stopped.clone();
        let served = connection::serve(listener, router(app), bounds, stopped);
        let deadline = async move {
            let _ = late.wait_for(|stopped| *stopped).await;
            stopping.stop();
            sleep(DRAIN).await;
            ending.store(true, Ordering::SeqCst);
            sleep(Duration::from_secs(2)).await;
        };
        tokio::select! {
            served = served => served.context("the server failed"),
            () = deadline => Ok(()),
        }
    };
    let run = move || {
        let done = runtime.block_on(serve);
        runtime.shutdown_timeout(Duration::from_secs(1));
        class.stop();
        class.wait();
        done
    };
    let thread = std::thread::Builder::new().name("server".to_owned()).spawn(run)?;
    Ok(Running { address, models, stop, thread })
}

const CHAT: &str = "/v1/chat/completions";
const EMBEDDINGS: &str = "/v1/embeddings";
const FEEDBACK: &str = "/v1/feedback";
const FILES: &str = "/v1/files";
const JOBS: &str = "/v1/fine_tuning/jobs";

struct App {
    models: Arc<RwLock<Models>>,
    created: u64,
    bounds: Bounds,
    /// The time to drain is over.
    ending: Arc<AtomicBool>,
    class: Class,
}

impl App {
    fn models(&self) -> RwLockReadGuard<'_, Models> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route(CHAT, post(chat::chat))
        .route(EMBEDDINGS, post(embeddings::embeddings))
        .route(FEEDBACK, post(feedback::feedback))
        .route(FILES, get(files::list).post(files::create))
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route(JOBS, get(fine_tuning::list).post(fine_tuning::create))
        .route("/v1/fine_tuning/jobs/{id}", get(fine_tuning::retrieve))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(fine_tuning::cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(fine_tuning::pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(fine_tuning::resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(fine_tuning::events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(fine_tuning::checkpoints))
        .route("/v1/models", get(list))
        .route("/v1/models/{*id}", get(retrieve))
        .route("/", get(welcome))
        .route("/v1", get(welcome))
        .route("/v1/", get(welcome))
        .route("/health", get(async || Json(json!({"status": "ok"}))))
        .fallback(nothing_here)
        .method_not_allowed_fallback(async |request: Request| {
            let path = request.uri().path();
            let wishes = ["/cancel", "/pause", "/resume"].iter().any(|wish| path.ends_with(wish));
            let method = match path {
                CHAT | EMBEDDINGS | FEEDBACK => "POST",
                FILES | JOBS => "GET and POST",
                path if path.starts_with(JOBS) && wishes => "POST",
                path if path.starts_with(FILES) && !path.ends_with("/content") => "GET and DELETE",
                _ => "GET",
            };
            let message = format!("{path} takes {method} and not {}", request.method());
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .with_state(app)
        .layer(from_fn(only_for_this_machine))
}

/// Refuses a request whose `Host` does not name this machine.
async fn only_for_this_machine(request: Request, next: Next) -> Response {
    let header = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let named = [header, request.uri().authority().map(|authority| authority.as_str())];
    let meant = header.is_some() && named.into_iter().flatten().all(is_this_machine);
    if !meant {
        let message = "this server answers only when it is called localhost or 127.0.0.1; use one of these in the URL";
        return Refusal::new(StatusCode::FORBIDDEN, message).into_response();
    }
    next.run(request).await
}

/// Returns true if a `Host` names this machine, with or without a port.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(name, _)| name),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Answers people who open the address in a browser, and programs that check whether a server is there.
async fn welcome(State(app): State<Arc<App>>, request: Request) -> String {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("127.0.0.1");
    let models = app.models();
    let names: Vec<&str> = models.names().collect();
    let text = format!(
        "homeroom answers OpenAI's API here\nbase URL  http://{host}/v1   any API key will do: none is checked\nmodels    {}\n",
        names.join(", ")
    );
    shown(&text).into_owned()
}

async fn nothing_here(request: Request) -> Refusal {
    let path = request.uri().path();
    let asked = path.trim_end_matches('/');
    // Under a base URL that is too short or too long, the end of the path is right.
    let meant = [CHAT, EMBEDDINGS, FEEDBACK, FILES, JOBS, "/v1/models"]
        .into_iter()
        .find(|known| asked.ends_with(&known["/v1".len()..]));
    let known = [CHAT, EMBEDDINGS, FEEDBACK, FILES, JOBS, "/v1/models", "/v1/models/{id}", "/health"];
    let hint = meant.map_or_else(|| near(asked, &known), |meant| format!("did you mean {meant}?"));
    let path: String = path.chars().take(80).collect();
    Refusal::new(StatusCode::NOT_FOUND, format!("{path} is not served here, {hint}"))
}

async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.models().names().map(|id| card(&app, id)).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn retrieve(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(id)) = id else {
        return Refusal::new(StatusCode::BAD_REQUEST, "the model's name in the address is not UTF-8").into_response();
    };
    if let Some(listed) = app.models().listed(&id) {
        return Json(card(&app, listed)).into_response();
    }
    no_model(&app, &id).into_response()
}

fn card(app: &App, id: &str) -> Value {
    json!({"id": id, "object": "model", "created": app.created, "owned_by": "homeroom"})
}

fn no_model(app: &App, id: &str) -> Refusal {
    let models = app.models();
    let known: Vec<&str> = models.names().collect();
    let message = if models.is_unrouted(id) {
        format!("`{id}` is a handler, but in no route, so it is not served; what is: {}", known.join(", "))
    } else {
        let id: String = id.chars().take(80).collect();
        format!("there is no model `{id}` here, {}", near(&id, &known))
    };
    let refusal = Refusal::new(StatusCode::NOT_FOUND, message);
    Refusal { param: Some("model".to_owned()), code: Some("model_not_found"), ..refusal }
}

/// Refuses a model that does not give what is asked, and names one that does.
fn wrong_model(app: &App, id: &str, wanted: Gives) -> Refusal {
    let models = app.models();
    let other = models.iter().find(|(_, handler)| handler.gives() == wanted).map(|(name, _)| name);
    let what = match wanted {
        Gives::Answers => format!("`{id}` is an embedding model, which answers no conversation"),
        _ => format!("`{id}` answers conversations and makes no embeddings"),
    };
    let hint = match (other, wanted) {
        (Some(other), _) => format!("; `{other}` does"),
        (None, Gives::Answers) => "; no model here does".to_owned(),
        (None, _) => "; no model here does, serve one such as all-MiniLM-L6-v2".to_owned(),
    };
    let refusal = Refusal::new(StatusCode::BAD_REQUEST, what + &hint);
    Refusal { param: Some("model".to_owned()), code: Some("model_not_supported"), ..refusal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_pass() {
        for good in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "[::1]"] {
            assert!(is_this_machine(good), "{good}");
        }
        for bad in
            ["", "evil.example", "localhost.evil.example:80", "10.0.0.1", "0.0.0.0:80", "[::1", "[fe80::1]", "::"]
        {
            assert!(!is_this_machine(bad), "{bad}");
        }
    }

    #[test]
    fn other_machines_are_not_served() {
        for host in ["0.0.0.0", "::", "192.168.0.1", "example.com", ""] {
            let refused = bind(host, 0).expect_err("it is refused").to_string();
            assert!(refused.contains("keys are not built yet"), "{refused}");
        }
        for host in ["127.0.0.1", "localhost"] {
            assert!(bind(host, 0).is_ok(), "{host}");
        }
    }
}
