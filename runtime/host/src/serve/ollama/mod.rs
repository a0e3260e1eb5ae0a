//! Ollama's API, for programs that speak only that: answers, vectors, and what is served. Models are chosen by whoever runs this server, so
//! that what would download, make, copy or remove one is not here.
//!
//! Source: <https://github.com/ollama/ollama/blob/main/docs/api.md>.

mod models;
mod reply;
mod request;
mod vectors;

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::admit::{Asker, Need};
use super::apart::apart;
use super::reply::Refusal;
use super::{App, answering, body};
use crate::handler::Gives;
pub(in crate::serve) use models::{running, show, tags, version};
use reply::{Lines, Way};
use request::Asked;
pub(in crate::serve) use vectors::{embed, embeddings};

/// An error in Ollama's shape.
pub(super) fn error(refusal: &Refusal) -> Response {
    refusal.respond(&json!({"error": refusal.shown()}))
}

pub(super) async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request, Way::Chat).await.unwrap_or_else(|refusal| error(&refusal))
}

pub(super) async fn generate(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request, Way::Generate).await.unwrap_or_else(|refusal| error(&refusal))
}

async fn answer(app: &Arc<App>, request: Request, way: Way) -> Result<Response, Refusal> {
    let started = Instant::now();
    let asker = Asker::of(&request);
    let body = body::read_of_ollama(app, request).await?;
    let served = app.clone();
    let (admission, asked) = apart(move || {
        let asked = request::read(&body::fields(&body)?, way)?;
        let handler = asker.handler(&served, &name_of(&served, &asked.model), Gives::Answers)?;
        let need = asked.request.as_ref().map(Need::Answer);
        let admission = need.map(|need| asker.admit(&served, handler, asked.user.as_deref(), &need)).transpose()?;
        Ok((admission, asked))
    })
    .await?;
    let Asked { model, request, stream, ignored, .. } = asked;
    let mut lines = Lines::new(way, model, started);
    let Some((admission, request)) = admission.zip(request) else {
        // Ollama's clients load a model by asking it nothing. Here it is loaded.
        return Ok(Json(lines.loaded()).into_response());
    };
    answering::answer(app, admission, request, stream, lines, ignored).await
}

/// Our name of a model: Ollama's clients put `:latest` behind a name without a tag.
fn name_of(app: &App, model: &str) -> String {
    let models = app.models();
    let short = model.strip_suffix(":latest").filter(|_| models.listed(model).is_none());
    short.unwrap_or(model).to_owned()
}
