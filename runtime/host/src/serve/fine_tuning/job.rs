//! One job: a training that a client asked for. Its directory `fine_tuning/<id>/` below `$HOMEROOM_HOME` says all that is known of it.
//!
//! ```text
//! job.json        what was asked for, and how it stands
//! events.jsonl    what happened to it
//! metrics.jsonl   losses of its steps, once it has ended
//! log             what the training said
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, read_text, replace_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The file that says what a job is.
const FILE: &str = "job.json";

/// How it stands with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It waits for others.
    Queued,
    /// It trains; or it did when the server ended, and goes on.
    Running,
    /// Its client halted it, and it can go on.
    Paused,
    /// Its model is there.
    Succeeded,
    /// It could not be done.
    Failed,
    /// Its client ended it.
    Cancelled,
}

impl Status {
    /// Whether nothing happens to it any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The word of OpenAI's API.
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What is learned from the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodKind {
    /// The answers.
    #[default]
    Supervised,
    /// Which of two answers is better.
    Dpo,
}

/// How it is learned. What is `None` is chosen when the rows are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// What is learned.
    pub kind: MethodKind,
    /// Passes over the rows.
    pub n_epochs: Option<u64>,
    /// Rows of a step.
    pub batch_size: Option<u32>,
    /// Factor on the learning rate that the strategy proposes.
    pub learning_rate_multiplier: Option<f64>,
    /// Of dpo: how closely the model is kept to its base.
    pub beta: Option<f64>,
}

impl Method {
    fn hyperparameters(&self) -> Value {
        let auto = |value: Value| if value.is_null() { json!("auto") } else { value };
        let mut all = json!({
            "n_epochs": auto(json!(self.n_epochs)),
            "batch_size": auto(json!(self.batch_size)),
            "learning_rate_multiplier": auto(json!(self.learning_rate_multiplier)),
        });
        if self.kind == MethodKind::Dpo {
            all["beta"] = auto(json!(self.beta));
        }
        all
    }

    fn card(&self) -> Value {
        let (word, hyperparameters) = match self.kind {
            MethodKind::Supervised => ("supervised", self.hyperparameters()),
            MethodKind::Dpo => ("dpo", self.hyperparameters()),
        };
        let mut card = json!({"type": word});
        card[word] = json!({"hyperparameters": hyperparameters});
        card
    }
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `invalid_training_file`, `training_failed`.
    pub code: String,
    /// In words.
    pub message: String,
    /// The field that is to blame.
    pub param: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// `ftjob-…`.
    pub id: String,
    /// The key whose it is.
    #[serde(default)]
    pub key: Option<String>,
    /// Its place among all jobs, in the order in which they came.
    pub number: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// The same of its end.
    pub finished_at: Option<u64>,
    /// How it stands.
    pub status: Status,
    /// The model that is trained, as the client named it.
    pub model: String,
    /// What that is here.
    pub base: PathBuf,
    /// An adapter on it to start from.
    pub init_from: Option<PathBuf>,
    /// The name of the result, in the registry and as `model`.
    pub name: String,
    /// Ids of files.
    pub training_file: String,
    /// The same.
    pub validation_file: Option<String>,
    /// What the client wants in the name.
    pub suffix: Option<String>,
    /// Seed of the training.
    pub seed: u64,
    /// How it is learned.
    pub method: Method,
    /// What the client has written on it.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Why it failed.
    pub error: Option<Failure>,
    /// The run that it is, below `runs/`.
    pub run: Option<String>,
    /// Tokens of all steps.
    pub trained_tokens: Option<u64>,
    /// Ids of files that came of it.
    #[serde(default)]
    pub result_files: Vec<String>,
}

impl Job {
    /// Reads the job of a directory.
    ///
    /// # Errors
    /// When it says no job.
    pub fn read(directory: &Path) -> Result<Self> {
        Ok(serde_json::from_str(&read_text(&directory.join(FILE), SMALL_FILE_BYTES_MAX)?)?)
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write(&self, directory: &Path) -> Result<()> {
        replace_file(&directory.join(FILE), serde_json::to_string_pretty(self)?.as_bytes())
    }

    /// The model that came of it.
    pub fn fine_tuned_model(&self) -> Option<&str> {
        (self.status == Status::Succeeded).then_some(self.name.as_str())
    }

    /// As OpenAI's API has it.
    pub fn card(&self, estimated_finish: Option<u64>) -> Value {
        let metadata: Map<String, Value> =
            self.metadata.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        json!({
            "object": "fine_tuning.job",
            "id": self.id,
            "model": self.model,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "fine_tuned_model": self.fine_tuned_model(),
            "organization_id": "homeroom",
            "result_files": self.result_files,
            "status": self.status.word(),
            "validation_file": self.validation_file,
            "training_file": self.training_file,
            "hyperparameters": self.method.hyperparameters(),
            "trained_tokens": self.trained_tokens,
            "error": self.error,
            "user_provided_suffix": self.suffix,
            "seed": self.seed,
            "estimated_finish": estimated_finish,
            "integrations": [],
            "method": self.method.card(),
            "metadata": metadata,
        })
    }
}

/// A name for the result, as the registry has them: `ft-BASE-SUFFIX-ID`.
pub fn result_name(model: &str, suffix: Option<&str>, id: &str) -> String {
    let part = |text: &str, most: usize| {
        let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' { c } else { '-' };
        let text: String = text.to_lowercase().chars().map(plain).take(most).collect();
        text.trim_matches(['-', '.']).to_owned()
    };
    let short = model.rsplit('/').next().unwrap_or_default();
    let parts = [part(short, 24), part(suffix.unwrap_or_default(), 24)];
    let mut name = "ft".to_owned();
    for part in parts.iter().filter(|part| !part.is_empty()) {
        name = format!("{name}-{part}");
    }
    let tail: String = id.chars().rev().take(8).collect();
    format!("{name}-{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::is_name;

    #[test]
    fn any_base_and_suffix_give_a_name_that_is_one() {
        for (model, suffix, expected) in [
            ("HuggingFaceTB/SmolLM2-135M-Instruct", Some("Klasse 7b"), "ft-smollm2-135m-instruct-klasse-7b-4321dcba"),
            ("日本", None, "ft-4321dcba"),
            ("m", Some("../.."), "ft-m-4321dcba"),
        ] {
            let name = result_name(model, suffix, "ftjob-abcd1234");
            assert_eq!(name, expected);
            assert!(is_name(&name));
        }
        assert!(is_name(&result_name(&"x".repeat(99), Some(&"y".repeat(99)), "ftjob-abcd1234")));
    }
}
