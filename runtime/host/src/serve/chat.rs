//! `POST /v1/chat/completions`, and the same by the path that Azure's clients use.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::admit::{Asker, Need};
use super::answering::{self, Shape};
use super::apart::apart;
use super::reply::{Envelope, Refusal, frame, ping};
use super::{App, body, now, request};
use crate::handler::{Completion, Event, Gives};

pub(super) async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, request, None).await.unwrap_or_else(IntoResponse::into_response)
}

/// `POST /openai/deployments/{model}/chat/completions?api-version=…`: the address names the model, and any version is the same.
pub(super) async fn of_deployment(
    State(app): State<Arc<App>>,
    Path(model): Path<String>,
    request: Request,
) -> Response {
    answer(&app, request, Some(model)).await.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: &Arc<App>, request: Request, model: Option<String>) -> Result<Response, Refusal> {
    let asker = Asker::of(&request);
    let body = body::read(app, request).await?;
    let served = app.clone();
    let (admission, asked) = apart(move || {
        let mut fields = body::fields(&body)?;
        if let Some(model) = model {
            fields.insert("model".to_owned(), json!(model));
        }
        let asked = request::of_fields(&fields)?;
        let handler = asker.handler(&served, &asked.model, Gives::Answers)?;
        let admission = asker.admit(&served, handler, asked.user.as_deref(), &Need::Answer(&asked.request))?;
        Ok((admission, asked))
    })
    .await?;
    let request::Asked { model, request, stream, include_usage, ignored, .. } = asked;
    let envelope = Envelope::new(now(), model, include_usage);
    answering::answer(app, admission, request, stream, envelope, ignored).await
}

impl Shape for Envelope {
    fn stream_type(&self) -> &'static str {
        "text/event-stream"
    }

    fn whole(&mut self, whole: &Completion) -> serde_json::Value {
        self.completion(whole)
    }

    fn begins_early(&mut self) {
        self.name_handler = true;
    }

    fn event(&mut self, event: Event) -> String {
        self.frames(event)
    }

    fn error(&mut self, refusal: &Refusal) -> String {
        frame(&refusal.body())
    }

    fn silence(&mut self, before: usize) -> String {
        ping(before)
    }
}
