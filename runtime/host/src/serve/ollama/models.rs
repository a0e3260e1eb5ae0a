//! What is served, as Ollama's clients ask for it: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::{error, name_of};
use crate::handler::{Gives, Handler, HandlerError};
use crate::hex::hex;
use crate::registry::when;
use crate::serve::admit::{Access, Asker};
use crate::serve::apart::apart;
use crate::serve::reply::Refusal;
use crate::serve::request::{not_known, wrong};
use crate::serve::{App, body};

/// The version of Ollama whose API this is: clients compare it with the one from which on there is what they need.
const VERSION: &str = "0.12.6";

/// `GET /api/version`.
pub(in crate::serve) async fn version() -> Json<Value> {
    Json(json!({"version": VERSION, "homeroom": env!("CARGO_PKG_VERSION")}))
}

/// `GET /api/tags`: what may be used.
pub(in crate::serve) async fn tags(State(app): State<Arc<App>>, Extension(access): Extension<Access>) -> Response {
    list(app, access, false).await
}

/// `GET /api/ps`: what is in memory, which is all models of this machine that are served.
pub(in crate::serve) async fn running(State(app): State<Arc<App>>, Extension(access): Extension<Access>) -> Response {
    list(app, access, true).await
}

async fn list(app: Arc<App>, access: Access, in_memory: bool) -> Response {
    let models = apart(move || Ok(listed(&app, &access, in_memory))).await;
    models.map_or_else(|refusal| error(&refusal), |models| Json(json!({"models": models})).into_response())
}

fn listed(app: &App, access: &Access, in_memory: bool) -> Vec<Value> {
    let models = app.models();
    let may_use = models.iter().filter(|(name, _)| access.may_use(&models, name));
    let here = may_use.filter(|(_, handler)| !in_memory || handler.engine().is_some());
    let model = |(name, handler): (&String, Arc<dyn Handler>)| {
        let size = handler.engine().map_or(0, |engine| engine.model().stored_bytes());
        let mut model = json!({
            "name": name,
            "model": name,
            "modified_at": modified(app),
            "size": size,
            "digest": digest(app, name),
            "details": details(handler.as_ref()),
        });
        if in_memory {
            // It stays for as long as the server runs.
            model["expires_at"] = json!("2100-01-01T00:00:00Z");
            model["size_vram"] = json!(0);
        }
        model
    };
    here.map(model).collect()
}

fn modified(app: &App) -> String {
    when::text(UNIX_EPOCH + Duration::from_secs(app.created))
}

/// What tells a model of this server from others; it is no digest of its files.
fn digest(app: &App, name: &str) -> String {
    hex(&Sha256::digest(format!("{name}\n{}", app.created)))
}

fn details(handler: &dyn Handler) -> Value {
    let Some(engine) = handler.engine() else {
        let (family, none) = ("", "");
        return json!({"parent_model": none, "format": none, "family": family, "families": [], "parameter_size": none, "quantization_level": none});
    };
    let model = engine.model();
    let family = &model.architecture.model_type;
    let is_gguf = model.path.extension().is_some_and(|extension| extension == "gguf");
    json!({
        "parent_model": "",
        "format": if is_gguf { "gguf" } else { "safetensors" },
        "family": family,
        "families": [family],
        "parameter_size": parameters(model.parameter_count()),
        "quantization_level": model.storage_words(),
    })
}

/// A count as Ollama writes it: `134.5M`.
fn parameters(count: usize) -> String {
    let count = count as f64;
    match count {
        count if count >= 1e9 => format!("{:.1}B", count / 1e9),
        count if count >= 1e6 => format!("{:.1}M", count / 1e6),
        count => format!("{:.1}K", count / 1e3),
    }
}

/// `POST /api/show`.
pub(in crate::serve) async fn show(State(app): State<Arc<App>>, request: Request) -> Response {
    shown(&app, request).await.map_or_else(|refusal| error(&refusal), IntoResponse::into_response)
}

async fn shown(app: &Arc<App>, request: Request) -> Result<Json<Value>, Refusal> {
    let asker = Asker::of(&request);
    let body = body::read_of_ollama(app, request).await?;
    let app = app.clone();
    apart(move || Ok(Json(described(&app, &asker, &body)?))).await
}

fn described(app: &App, asker: &Asker, body: &[u8]) -> Result<Value, Refusal> {
    let fields = body::fields(body)?;
    // `name` is its older name.
    if let Some(other) = fields.keys().find(|field| !["model", "name", "verbose"].contains(&field.as_str())) {
        return Err(not_known(other, &["model", "verbose"]).into());
    }
    if fields.get("verbose").is_some_and(|verbose| !verbose.is_null() && verbose != false) {
        return Err(
            HandlerError::invalid("verbose", "the lists of a tokenizer are not shown here; leave it out").into()
        );
    }
    let model = ["model", "name"].iter().find_map(|field| fields.get(*field)?.as_str());
    let model = name_of(app, model.ok_or_else(|| wrong("model", "the name of a model"))?);
    let handler = asker.handler(app, &model, Gives::Either)?;
    let mut info = Map::new();
    if let Some(engine) = handler.engine() {
        let model = engine.model();
        let architecture = &model.architecture;
        let family = &architecture.model_type;
        info.insert("general.architecture".into(), json!(family));
        info.insert("general.parameter_count".into(), json!(model.parameter_count()));
        info.insert(format!("{family}.context_length"), json!(architecture.max_position_embeddings));
        info.insert(format!("{family}.embedding_length"), json!(architecture.hidden_size));
        info.insert(format!("{family}.block_count"), json!(architecture.layers.len()));
        info.insert(format!("{family}.vocab_size"), json!(architecture.vocab_size));
    }
    let capabilities = match handler.gives() {
        // A model whose template knows no tools is told of them in words.
        Gives::Answers => json!(["completion", "tools"]),
        Gives::Vectors => json!(["embedding"]),
        Gives::Either => json!(["completion", "tools", "embedding"]),
    };
    Ok(json!({
        "modelfile": "# chosen by whoever runs this server\n",
        "parameters": "",
        "template": "",
        "details": details(handler.as_ref()),
        "model_info": info,
        "capabilities": capabilities,
        "modified_at": modified(app),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_written_as_ollama_does() {
        for (count, text) in [(134_515_008, "134.5M"), (7_241_732_096, "7.2B"), (31_000, "31.0K")] {
            assert_eq!(parameters(count), text);
        }
    }
}
