//! `/v1/fine_tuning/jobs`: OpenAI's scripts train here, and ask the result by its name.
//!
//! [`request`] is what they say, [`job`] what is kept of it, [`tuning`] the jobs, which [`work`] does one after another, [`child`] is the process that trains,
//! [`events`] what is told of it, [`told`] what clients hear of a failure, [`checkpoints`] what can be asked of it beside the result. `[fine_tuning]` of the file of handlers allows it, see [`config`](crate::handler::config::fine_tuning).

mod checkpoints;
mod child;
mod events;
mod job;
mod request;
mod told;
mod tuning;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use self::events::Metrics;
use self::job::{Job, Status};
use self::tuning::NotTaken;
pub use self::tuning::{Publish, Tuning};
use super::apart::apart;
use super::caller::Caller;
use super::files::no_file;
use super::query::{Id, Query, page, refused};
use super::reply::{Refusal, failed};
use super::{App, body, now};
use crate::toml_problems::near;

/// Most entries of a list.
const LIST_MAX: usize = 100;
/// Entries of a list, if nothing is said.
const LIST: usize = 20;

type Answer = Result<Json<Value>, Refusal>;

/// The jobs, for whoever may have something trained.
pub(super) fn tuning(app: &App, caller: &Caller) -> Result<Arc<Tuning>, Refusal> {
    let tuning = app.class.tuning().ok_or_else(|| {
        let message = "nothing is trained here, and no files are taken; whoever runs the server can add [fine_tuning] to its file of handlers";
        Refusal::new(StatusCode::NOT_FOUND, message)
    })?;
    match caller.key.as_deref() {
        key if tuning.allows(key) => Ok(tuning),
        key => {
            let message = format!("the key `{}` may not send files or have models trained", key.unwrap_or_default());
            let refusal = Refusal::new(StatusCode::FORBIDDEN, message);
            Err(Refusal { kind: "permission_error", code: Some("fine_tuning_not_allowed"), ..refusal })
        }
    }
}

fn find(tuning: &Tuning, caller: &Caller, id: &str) -> Result<Job, Refusal> {
    tuning.find(caller.key.as_deref(), id).ok_or_else(|| {
        let id: String = id.chars().take(80).collect();
        let refusal = Refusal::new(StatusCode::NOT_FOUND, format!("there is no fine-tuning job `{id}`"));
        Refusal { param: Some("fine_tuning_job_id".to_owned()), code: Some("fine_tune_not_found"), ..refusal }
    })
}

pub(super) async fn create(State(app): State<Arc<App>>, request: Request) -> Answer {
    let caller = Caller::of(request.extensions());
    let tuning = tuning(&app, &caller)?;
    let body = body::read(&app, request).await?;
    apart(move || {
        let order = request::read(&body::fields(&body)?)?;
        let key = caller.key.as_deref();
        for (param, id) in
            [("training_file", Some(&order.training_file)), ("validation_file", order.validation_file.as_ref())]
        {
            let Some(id) = id else { continue };
            let file = tuning.files().find(key, id).ok_or_else(|| {
                // A wrong field of a body is a wrong request.
                Refusal { status: StatusCode::BAD_REQUEST, ..no_file(id, param) }
            })?;
            if file.purpose != "fine-tune" {
                return Err(refused(
                    param,
                    format!("`{param}`: the file is of purpose {}, not fine-tune", file.purpose),
                ));
            }
        }
        let base = tuning.base(key, &order.model).map_err(|error| failed(&error))?;
        let base = base.ok_or_else(|| {
            let known: Vec<&str> = tuning.bases().collect();
            let model: String = order.model.chars().take(80).collect();
            let refusal = refused("model", format!("`{model}` is not trained here, {}", near(&model, &known)));
            Refusal { code: Some("model_not_available"), ..refusal }
        })?;
        let job = tuning.add(key, order, base).map_err(|why| {
            let too_many = |words, retry| {
                let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, words);
                let (kind, code) = ("rate_limit_error", Some("rate_limit_exceeded"));
                Refusal { kind, code, retry_after: Some(Duration::from_secs(60)), retry, ..refusal }
            };
            match why {
                NotTaken::Full(words) => too_many(words, None),
                // A training takes longer than clients wait who try again by themselves.
                NotTaken::OfKey(words) => too_many(words, Some(false)),
                NotTaken::Failed(error) => failed(&error),
            }
        })?;
        Ok(Json(job.card(None)))
    })
    .await
}

pub(super) async fn list(State(app): State<Arc<App>>, request: Request) -> Answer {
    let caller = Caller::of(request.extensions());
    let tuning = tuning(&app, &caller)?;
    let query = Query::read(request.uri(), &["after", "limit", "metadata"])?;
    let limit = query.limit(LIST, LIST_MAX)?;
    apart(move || {
        let wanted: Vec<(&str, &str)> = query.keyed("metadata").collect();
        let has = |job: &Job, key: &str, value: &str| job.metadata.get(key).is_some_and(|known| known == value);
        let fits = |job: &Job| wanted.iter().all(|(key, value)| has(job, key, value));
        let jobs: Vec<Job> = tuning.of(caller.key.as_deref()).into_iter().filter(fits).collect();
        let (jobs, has_more) = page(jobs, |job| &job.id, query.get("after"), limit)?;
        let data: Vec<Value> = jobs.iter().map(|job| job.card(None)).collect();
        Ok(Json(json!({"object": "list", "data": data, "has_more": has_more})))
    })
    .await
}

pub(super) async fn retrieve(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    let caller = Caller::of(request.extensions());
    let tuning = tuning(&app, &caller)?;
    apart(move || {
        let job = find(&tuning, &caller, &id)?;
        let finish = if job.status == Status::Running { estimated_finish(&tuning, &job) } else { None };
        Ok(Json(job.card(finish)))
    })
    .await
}

/// When a job that trains will have ended, by the steps so far.
fn estimated_finish(tuning: &Tuning, job: &Job) -> Option<u64> {
    let metrics = tuning.metrics(job);
    let planned = tuning.planned_steps(job)?;
    let ((first, begun), (last, reached)) = (metrics.first_key_value()?, metrics.last_key_value()?);
    let (steps, seconds) = (last.checked_sub(*first)?, reached.at.checked_sub(begun.at)?);
    let left = planned.checked_sub(*last)?;
    (steps > 0).then(|| now() + (seconds as f64 * left as f64 / steps as f64).ceil() as u64)
}

/// Something that a client wants of a job, and the job as it is then.
async fn wish(
    app: &Arc<App>,
    id: String,
    caller: Caller,
    wish: impl FnOnce(&Tuning, &str) -> Result<(), String> + Send + 'static,
) -> Answer {
    let tuning = tuning(app, &caller)?;
    apart(move || {
        let job = find(&tuning, &caller, &id)?;
        wish(&tuning, &job.id).map_err(|refused| Refusal::new(StatusCode::BAD_REQUEST, refused))?;
        Ok(Json(find(&tuning, &caller, &job.id)?.card(None)))
    })
    .await
}

pub(super) async fn cancel(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    wish(&app, id, Caller::of(request.extensions()), Tuning::cancel).await
}

pub(super) async fn pause(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    wish(&app, id, Caller::of(request.extensions()), Tuning::pause).await
}

pub(super) async fn resume(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    wish(&app, id, Caller::of(request.extensions()), Tuning::resume).await
}

pub(super) async fn events(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    let caller = Caller::of(request.extensions());
    let tuning = tuning(&app, &caller)?;
    let query = Query::read(request.uri(), &["after", "limit"])?;
    let (limit, after) = (query.limit(LIST, LIST_MAX)?, query.get("after").map(str::to_owned));
    apart(move || {
        let job = find(&tuning, &caller, &id)?;
        let metrics = tuning.metrics(&job);
        let steps = tuning.planned_steps(&job).or_else(|| metrics.keys().last().copied());
        let all = self::events::all(&tuning.directory(&job), &job.id, &metrics, steps);
        let (data, has_more) = page(all, |event| event["id"].as_str().unwrap_or_default(), after.as_deref(), limit)?;
        Ok(Json(json!({"object": "list", "data": data, "has_more": has_more})))
    })
    .await
}

pub(super) async fn checkpoints(State(app): State<Arc<App>>, Id(id): Id, request: Request) -> Answer {
    let caller = Caller::of(request.extensions());
    let tuning = tuning(&app, &caller)?;
    let query = Query::read(request.uri(), &["after", "limit"])?;
    let (limit, after) = (query.limit(10, LIST_MAX)?, query.get("after").map(str::to_owned));
    apart(move || {
        let job = find(&tuning, &caller, &id)?;
        let metrics = tuning.metrics(&job);
        let last = result(&job, &metrics);
        let kept = checkpoints::kept(&tuning.directory(&job));
        let kept = kept.into_iter().rev().map(|(step, _)| (step, checkpoints::name(&job.name, step)));
        // The best of them is the result.
        let kept = kept.filter(|(step, _)| last.as_ref().is_none_or(|(result, _)| result != step));
        let all = last.iter().cloned().chain(kept).map(|(step, model)| checkpoint(&job, &metrics, step, &model));
        let mut all: Vec<Value> = all.collect();
        all.sort_by_key(|one| std::cmp::Reverse(one["step_number"].as_u64()));
        let (data, has_more) = page(all, |one| one["id"].as_str().unwrap_or_default(), after.as_deref(), limit)?;
        let id = |one: Option<&Value>| one.map(|one| one["id"].clone());
        Ok(Json(json!({
            "object": "list",
            "first_id": id(data.first()),
            "last_id": id(data.last()),
            "has_more": has_more,
            "data": data,
        })))
    })
    .await
}

/// The model that a job came to, and the step that it is of: the best on the held-out rows, if there are any.
fn result(job: &Job, metrics: &BTreeMap<u64, Metrics>) -> Option<(u64, String)> {
    let model = job.fine_tuned_model()?;
    let best = metrics.iter().filter_map(|(step, metrics)| Some((*step, metrics.valid_loss?)));
    let best = best.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(step, _)| step);
    Some((best.or_else(|| metrics.keys().last().copied())?, model.to_owned()))
}

/// A checkpoint as OpenAI's API has it.
fn checkpoint(job: &Job, metrics: &BTreeMap<u64, Metrics>, step: u64, model: &str) -> Value {
    let at = metrics.get(&step).cloned().unwrap_or_default();
    let created = if at.at > 0 { at.at } else { job.created_at };
    json!({
        "object": "fine_tuning.job.checkpoint",
        "id": format!("ftckpt-{}-{step}", job.id.trim_start_matches("ftjob-")),
        "created_at": created,
        "fine_tuned_model_checkpoint": model,
        "fine_tuning_job_id": job.id,
        "step_number": step,
        "metrics": {
            "step": step,
            "train_loss": at.train_loss,
            "full_valid_loss": at.valid_loss,
            "full_valid_mean_token_accuracy": at.valid_accuracy,
        },
    })
}
