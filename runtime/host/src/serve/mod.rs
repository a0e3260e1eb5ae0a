//! The server: handlers over HTTP, by OpenAI's API and by Ollama's.
//!
//! Whoever reaches it on this machine needs no key until there is one; other machines are let in with keys alone. The [`gate`] stands before
//! all routes: names by which the server is called, pages that may use it, keys. [`admit`] stands before the models: which of them a key may
//! use, and how much. Bodies must say that they are JSON, which a page elsewhere cannot without a CORS preflight; that is refused. Of a
//! request at most one line is logged, and never a word of what is asked or answered.

mod admit;
mod answering;
mod apart;
mod bind;
mod body;
pub mod caller;
mod chat;
mod class;
mod completions;
mod connection;
mod embeddings;
mod feedback;
mod files;
pub mod fine_tuning;
mod gate;
pub mod keys;
mod log;
mod metrics;
mod models;
mod observed;
mod ollama;
mod page;
mod places;
mod query;
mod record;
mod reply;
mod request;
mod tuned;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use homeroom_engine::inference::Engine;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::handler::config::server::Settings;
use crate::handler::{Gives, limit};
use crate::pseudonym::Pseudonyms;
use crate::toml_problems::near;
use admit::Access;
use apart::apart;
pub use bind::{bind, bind_for};
pub use class::Class;
pub use connection::Bounds;
use keys::Keys;
use keys::days::Days;
use keys::limits::Meters;
use metrics::Metrics;
pub use models::Models;
use places::Places;
use reply::Refusal;

/// Threads that the tasks of connections run in. What may wait or compute for long runs [`apart`].
const WORKERS: usize = 2;
/// How often what is used of a day is written to disk.
const KEEP: Duration = Duration::from_secs(1);

/// A server that runs in a thread of its own.
pub struct Running {
    /// The address that it listens on.
    pub address: SocketAddr,
    app: Arc<App>,
    stop: watch::Sender<bool>,
    thread: JoinHandle<Result<()>>,
}

impl Running {
    /// Returns the base URL for clients.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Returns a function that replaces the models, and the settings that can change while it runs. Answers under way go on with what they
    /// began with.
    pub fn replacer(&self) -> impl Fn(Models, Option<Settings>) + Send + 'static {
        let app = self.app.clone();
        move |models, settings| {
            let before = {
                let mut served = app.models.write().unwrap_or_else(PoisonError::into_inner);
                let models = Arc::new(models.with_tuned_of(&served));
                std::mem::replace(&mut *served, models)
            };
            // What is not served any more leaves the memory here, and nobody waits for that.
            drop(before);
            if let Some(settings) = settings {
                *app.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
            }
        }
    }

    /// Returns a function that counts edits of the file of handlers that were taken, or refused.
    pub fn counter_of_reloads(&self) -> impl Fn(bool) + Send + 'static {
        let metrics = self.app.metrics.clone();
        move |taken| metrics.reloaded(taken)
    }

    /// Takes no further requests, and lets answers under way complete within the time that the settings give.
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

/// What a server is beside its models.
pub struct Serving {
    /// How many connections there may be, and how long they may take.
    pub bounds: Bounds,
    /// `[server]` of the file.
    pub settings: Settings,
    /// Who may use it.
    pub keys: Keys,
    /// What of a day's tokens is used.
    pub days: Days,
    /// What is logged and counted in the place of people's names.
    pub pseudonyms: Pseudonyms,
    /// What it does beside answering.
    pub class: Class,
}

impl Serving {
    /// With some settings, for whoever has a key of this home; for this machine without one until there is one.
    pub fn of_home(settings: Settings, keys: Keys) -> Self {
        let (days, pseudonyms) = (Days::of_home(), Pseudonyms::of_home());
        Self { bounds: Bounds::from(&settings), settings, keys, days, pseudonyms, class: Class::default() }
    }
}

impl Default for Serving {
    fn default() -> Self {
        let settings = Settings::default();
        let (keys, days, pseudonyms) = (Keys::none(), Days::none(), Pseudonyms::default());
        Self { bounds: Bounds::from(&settings), settings, keys, days, pseudonyms, class: Class::default() }
    }
}

/// Serves models on a port, to this machine and without keys.
///
/// # Errors
/// When there is no model, or the system refuses.
pub fn start(models: Models, listener: TcpListener) -> Result<Running> {
    start_as(models, listener, Serving::default())
}

/// Serves models on a port, with other bounds.
///
/// # Errors
/// As [`start`].
pub fn start_with(models: Models, listener: TcpListener, bounds: Bounds) -> Result<Running> {
    start_as(models, listener, Serving { bounds, ..Serving::default() })
}

/// Serves models on a port, as is said.
///
/// # Errors
/// As [`start`].
pub fn start_as(models: Models, listener: TcpListener, serving: Serving) -> Result<Running> {
    ensure!(!models.is_empty(), "there is no model to serve");
    let Serving { bounds, settings, keys, days, pseudonyms, class } = serving;
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    // Each connection has one answer at most, and each answer takes a thread; that of a client who has left may take a moment to notice.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(2 * bounds.connections + WORKERS)
        .enable_all()
        .build()?;
    let (stop, stopped) = watch::channel(false);
    // So that it is known whether a key is wanted when the first request comes. What is wrong with the file is told, and nobody is let in.
    let _ = keys.wanted();
    let app = Arc::new(App {
        models: RwLock::new(Arc::new(models)),
        settings: RwLock::new(Arc::new(settings)),
        keys,
        meters: Meters::with(days),
        pseudonyms,
        log: log::Lines::begin()?,
        metrics: Arc::default(),
        open: Arc::default(),
        created: now(),
        bounds,
        stopped: stopped.clone(),
        ending: Arc::new(AtomicBool::new(false)),
        class: class.clone(),
    });
    if let Some(tuning) = class.tuning() {
        let served = app.clone();
        tuning.begin(Box::new(move |name, key, model| {
            let mut served = served.models.write().unwrap_or_else(PoisonError::into_inner);
            Arc::make_mut(&mut served).add_tuned(name, key, model);
        }))?;
    }
    let served = app.clone();
    let serve = async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let mut late = stopped.clone();
        let connections = connection::serve(listener, router(served.clone()), bounds, stopped);
        let deadline = async {
            let _ = late.wait_for(|stopped| *stopped).await;
            let class = served.class.clone();
            let _ = spawn_blocking(move || class.stop()).await;
            let drain = served.settings().drain;
            sleep(drain).await;
            served.ending.store(true, Ordering::SeqCst);
            sleep(Duration::from_secs(2)).await;
        };
        let keep = async {
            loop {
                sleep(KEEP).await;
                let meters = served.meters.clone();
                let _ = spawn_blocking(move || meters.keep()).await;
            }
        };
        tokio::select! {
            served = connections => served.context("the server failed"),
            () = deadline => Ok(()),
            () = keep => Ok(()),
        }
    };
    let ending = app.clone();
    let run = move || {
        let done = runtime.block_on(serve);
        runtime.shutdown_timeout(Duration::from_secs(1));
        ending.meters.keep();
        ending.log.settle(Duration::from_secs(1));
        class.stop();
        class.wait();
        done
    };
    let thread = std::thread::Builder::new().name("server".to_owned()).spawn(run)?;
    Ok(Running { address, app, stop, thread })
}

const CHAT: &str = "/v1/chat/completions";
const EMBEDDINGS: &str = "/v1/embeddings";
const FEEDBACK: &str = "/v1/feedback";
const FILES: &str = "/v1/files";
const JOBS: &str = "/v1/fine_tuning/jobs";

struct App {
    models: RwLock<Arc<Models>>,
    settings: RwLock<Arc<Settings>>,
    keys: Keys,
    meters: Arc<Meters>,
    pseudonyms: Pseudonyms,
    log: log::Lines,
    metrics: Arc<Metrics>,
    /// Requests that are open, by key.
    open: Arc<Places>,
    created: u64,
    bounds: Bounds,
    /// Whether it was asked to stop.
    stopped: watch::Receiver<bool>,
    /// The time to drain is over.
    ending: Arc<AtomicBool>,
    class: Class,
}

impl App {
    fn models(&self) -> Arc<Models> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A path, the methods that it takes, and what answers.
type Route = (&'static str, &'static str, fn() -> MethodRouter<Arc<App>>);

/// All routes. Nothing is served that is not here.
const TABLE: &[Route] = &[
    (CHAT, "POST", || post(chat::chat)),
    ("/v1/completions", "POST", || post(completions::completions)),
    (EMBEDDINGS, "POST", || post(embeddings::embeddings)),
    ("/openai/deployments/{model}/chat/completions", "POST", || post(chat::of_deployment)),
    ("/api/chat", "POST", || post(ollama::chat)),
    ("/api/generate", "POST", || post(ollama::generate)),
    ("/api/embed", "POST", || post(ollama::embed)),
    ("/api/embeddings", "POST", || post(ollama::embeddings)),
    ("/api/tags", "GET", || get(ollama::tags)),
    ("/api/ps", "GET", || get(ollama::running)),
    ("/api/show", "POST", || post(ollama::show)),
    ("/api/version", "GET", || get(ollama::version)),
    (FEEDBACK, "POST", || post(feedback::feedback)),
    (FILES, "GET and POST", || get(files::list).post(files::create)),
    ("/v1/files/{id}", "GET and DELETE", || get(files::retrieve).delete(files::delete)),
    ("/v1/files/{id}/content", "GET", || get(files::content)),
    (JOBS, "GET and POST", || get(fine_tuning::list).post(fine_tuning::create)),
    ("/v1/fine_tuning/jobs/{id}", "GET", || get(fine_tuning::retrieve)),
    ("/v1/fine_tuning/jobs/{id}/cancel", "POST", || post(fine_tuning::cancel)),
    ("/v1/fine_tuning/jobs/{id}/pause", "POST", || post(fine_tuning::pause)),
    ("/v1/fine_tuning/jobs/{id}/resume", "POST", || post(fine_tuning::resume)),
    ("/v1/fine_tuning/jobs/{id}/events", "GET", || get(fine_tuning::events)),
    ("/v1/fine_tuning/jobs/{id}/checkpoints", "GET", || get(fine_tuning::checkpoints)),
    ("/v1/models", "GET", || get(list)),
    ("/v1/models/{*id}", "GET", || get(retrieve)),
    ("/", "GET", || get(page::page)),
    ("/v1", "GET", || get(page::page)),
    ("/v1/", "GET", || get(page::page)),
    ("/healthz", "GET", || get(alive)),
    ("/health", "GET", || get(alive)),
    ("/readyz", "GET", || get(ready)),
    ("/metrics", "GET", || get(measured)),
];

/// The paths that are served and the methods that they take, such as `("/v1/models/{*id}", "GET")`.
pub fn routes() -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLE.iter().map(|(path, methods, _)| (*path, *methods))
}

fn router(app: Arc<App>) -> Router {
    let routes = TABLE.iter().fold(Router::new(), |router, (path, _, handler)| router.route(path, handler()));
    routes
        .fallback(nothing_here)
        .method_not_allowed_fallback(async |request: Request| {
            let path = request.uri().path();
            let methods = route_of(path).map_or("another method", |(_, methods)| methods);
            let message = format!("{path} takes {methods} and not {}", request.method());
            refuse(path, Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message))
        })
        .layer(from_fn_with_state(app.clone(), gate::gate))
        .with_state(app)
}

/// The route of a path, in which a name stands for any, and its methods.
fn route_of(path: &str) -> Option<(&'static str, &'static str)> {
    let is_of = |route: &str| {
        let (mut parts, mut given) = (route.split('/'), path.split('/'));
        loop {
            match (parts.next(), given.next()) {
                (None, None) => return true,
                (Some(part), Some(_)) if part.starts_with("{*") => return true,
                (Some(part), Some(given)) if part == given || part.starts_with('{') => {}
                _ => return false,
            }
        }
    };
    routes().find(|(route, _)| is_of(route))
}

/// An error, in the shape that clients of its path read.
fn refuse(path: &str, refusal: Refusal) -> Response {
    if gate::is_ollama(path) { ollama::error(&refusal) } else { refusal.into_response() }
}

/// Says that the server is there, and nothing else.
async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Says whether the server takes requests: it does not once it was asked to stop.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let load = limit::load();
    let is_stopped = *app.stopped.borrow();
    let (status, word) = match is_stopped {
        true => (StatusCode::SERVICE_UNAVAILABLE, "ending"),
        false => (StatusCode::OK, "ready"),
    };
    (status, Json(json!({"status": word, "running": load.running, "waiting": load.waiting}))).into_response()
}

async fn measured(State(app): State<Arc<App>>, Extension(access): Extension<Access>) -> Result<Response, Refusal> {
    if access.0.as_ref().is_some_and(|key| key.routes.is_some()) {
        let message =
            "figures of all routes are for keys that may use all routes (`homeroom keys add` without --routes)";
        return Err(Refusal { kind: "permission_error", ..Refusal::new(StatusCode::FORBIDDEN, message) });
    }
    apart(move || Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics_of(&app)).into_response())).await
}

fn metrics_of(app: &App) -> String {
    let models = app.models();
    let mut engines: Vec<(String, Arc<Engine>)> = Vec::new();
    for (name, handler) in models.iter() {
        // Several models may be on one base, which is called by the first.
        if let Some(engine) =
            handler.engine().filter(|engine| !engines.iter().any(|(_, other)| Arc::ptr_eq(other, engine)))
        {
            engines.push((name.clone(), engine));
        }
    }
    let engines: Vec<(String, u64, u64)> = (engines.into_iter())
        .map(|(name, engine)| {
            let (all, taken_over) = engine.inference().prompt_tokens();
            (name, all, taken_over)
        })
        .collect();
    app.metrics.text(&engines)
}

async fn nothing_here(request: Request) -> Response {
    let path = request.uri().path();
    let asked = path.trim_end_matches('/');
    // Under a base URL that is too short or too long, the end of the path is right.
    let meant = [CHAT, EMBEDDINGS, FEEDBACK, FILES, JOBS, "/v1/models"]
        .into_iter()
        .find(|known| asked.ends_with(&known["/v1".len()..]));
    // Of the API that is asked, as far as the path says.
    let of_api = |known: &&str| {
        !known.ends_with("v1/") && !["/api/", "/v1/"].iter().any(|api| path.starts_with(api) != known.starts_with(api))
    };
    // What is done with a file or a job stands behind its list.
    let is_below = |known: &&str| [FILES, JOBS].iter().any(|list| known.len() > list.len() && known.starts_with(list));
    let known: Vec<&str> = routes().map(|(path, _)| path).filter(|path| of_api(path) && !is_below(path)).collect();
    let hint = meant.map_or_else(|| near(asked, &known), |meant| format!("did you mean {meant}?"));
    let shown: String = path.chars().take(80).collect();
    refuse(path, Refusal::new(StatusCode::NOT_FOUND, format!("{shown} is not served here, {hint}")))
}

async fn list(State(app): State<Arc<App>>, Extension(access): Extension<Access>) -> Result<Json<Value>, Refusal> {
    apart(move || {
        let models = app.models();
        let usable = models.names().filter(|id| access.may_use(&models, id));
        let data: Vec<Value> = usable.map(|id| card(&app, id)).collect();
        Ok(Json(json!({"object": "list", "data": data})))
    })
    .await
}

async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(access): Extension<Access>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, Refusal> {
    let Ok(Path(id)) = id else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "the model's name in the address is not UTF-8"));
    };
    apart(move || {
        let models = app.models();
        let listed = models.listed(&id).filter(|id| access.may_use(&models, id));
        let listed = listed.ok_or_else(|| no_model(&app, &access, &id))?;
        Ok(Json(card(&app, listed)))
    })
    .await
}

fn card(app: &App, id: &str) -> Value {
    json!({"id": id, "object": "model", "created": app.created, "owned_by": "homeroom"})
}

fn no_model(app: &App, access: &Access, id: &str) -> Refusal {
    let models = app.models();
    let known: Vec<&str> = models.names().filter(|name| access.may_use(&models, name)).collect();
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
fn wrong_model(app: &App, access: &Access, id: &str, wanted: Gives) -> Refusal {
    let models = app.models();
    let mut usable = models.iter().filter(|(name, _)| access.may_use(&models, name));
    let other = usable.find(|(_, handler)| handler.gives() == wanted).map(|(name, _)| name);
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
    fn methods_of_a_path_are_those_of_its_route() {
        for (path, methods) in [
            (CHAT, Some("POST")),
            ("/v1/models/a/b", Some("GET")),
            ("/v1/models", Some("GET")),
            ("/", Some("GET")),
            ("/nothing", None),
            ("", None),
        ] {
            assert_eq!(route_of(path).map(|(_, methods)| methods), methods, "{path}");
        }
    }
}
