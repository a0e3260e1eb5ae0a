//! What came of a job, and how it is written.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::Result;
use homeroom_engine::adapt::adapter;
use homeroom_engine::files::NewDirectory;
use homeroom_engine::forgetting::Forgetting;
use homeroom_engine::train::objective::{ObjectiveConfig, Rewards};
use homeroom_engine::train::{TrainConfig, TrainReport};
use serde_json::{Map, Value, json};

use super::Job;
use crate::machine::peak_memory_bytes;
use crate::registry::when;

/// What came of a job.
pub struct Outcome {
    /// How it was trained.
    pub config: TrainConfig,
    /// All steps and evaluations.
    pub report: TrainReport,
    /// What it made small.
    pub objective: ObjectiveConfig,
    /// The run that it was a part of, and what tells that from every other.
    pub run: Option<(String, String)>,
    /// Rows that it was trained on.
    pub rows: usize,
    /// Digest of the training data.
    pub data_digest: String,
    /// How far it has moved from its base, where that was measured.
    pub forgetting: Option<Forgetting>,
    /// Why the run ended before its end, if that was a failure.
    pub failure: Option<String>,
}

impl Outcome {
    /// What a script reads of a run.
    pub fn summary(&self) -> Map<String, Value> {
        let summary = json!({
            "steps": self.report.steps.len(),
            "train_loss": self.report.train_loss(),
            "eval_loss_before": self.report.before().map(|eval| eval.loss),
            "eval_loss": self.report.after().map(|eval| eval.loss),
            "tokens_per_second": self.report.tokens_per_second(),
            "peak_memory_bytes": peak_memory_bytes(),
            "eval_reward_accuracy": self.report.after().and_then(|eval| Some(eval.rewards?.accuracy)),
            "interrupted": self.report.interrupted,
            "stopped": self.report.stopped,
            "kept_step": self.report.kept_step,
        });
        let mut summary = match summary {
            Value::Object(summary) => summary,
            _ => Map::new(),
        };
        summary.extend(self.forgetting.map(|forgetting| ("forgetting".to_owned(), json!(forgetting))));
        summary.extend(self.failure.clone().map(|failure| ("failure".to_owned(), failure.into())));
        summary
    }

    /// Writes an adapter, or for a strategy that trains the base's own weights a model, into a directory in the making; with
    /// `homeroom.json` and `trainer_state.json` beside either.
    ///
    /// # Errors
    /// When the disk is full, or anything else fails.
    pub fn write(&self, job: &Job, directory: &NewDirectory, parent: Option<&str>) -> Result<()> {
        let (adaptation, strategy) = job.now();
        let mut training = json!({
            "config": self.config,
            "objective": self.objective.objective.name(),
            "objective_options": self.objective.options().into_iter().collect::<BTreeMap<_, _>>(),
            "options": job.options,
            "init_from": job.init_from,
            "parent": parent,
            "run": self.run.as_ref().map(|(id, _)| id),
            "run_token": self.run.as_ref().map(|(_, token)| token),
            "rows": self.rows,
            "eval_rows": self.report.before().map(|eval| eval.examples),
            "finished": when::text(SystemTime::now()),
            "result": self.summary(),
        });
        if !self.report.events.is_empty() {
            training["events"] = json!(self.report.events);
        }
        job.write(directory, (&adaptation, &strategy), true, Some(&self.data_digest), training)?;
        directory.write("trainer_state.json", adapter::pretty(&self.trainer_state())?.as_bytes())
    }

    /// The history of a run in the form of transformers' `trainer_state.json`, which plotting tools read.
    fn trainer_state(&self) -> Value {
        let steps = self.report.steps.iter().map(|step| {
            let entry = json!({
                "step": step.step,
                "epoch": step.epoch,
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "learning_rate": step.learning_rate,
            });
            with_rewards(entry, "", step.rewards)
        });
        let mut history: Vec<Value> = steps.collect();
        let evaluations = self.report.evaluations.iter().filter(|report| report.step > 0);
        history.extend(evaluations.map(|report| {
            let (step, epoch) = (report.step, report.epoch);
            let entry = json!({"step": step, "epoch": epoch, "eval_loss": report.evaluation.loss});
            with_rewards(entry, "eval_", report.evaluation.rewards)
        }));
        // Stable: an evaluation stays behind its step.
        history.sort_by_key(|entry| entry["step"].as_u64());
        let last = self.report.steps.last();
        let (steps, epoch) = (last.map_or(0, |step| step.step), last.map_or(0.0, |step| step.epoch));
        let best = self.report.evaluations.iter().filter(|report| report.step > 0).map(|report| report.evaluation.loss);
        let best = best.reduce(f64::min);
        json!({
            "best_metric": best,
            "best_model_checkpoint": null,
            "epoch": epoch,
            "global_step": steps,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": history,
            "max_steps": self.report.planned_steps,
            "num_train_epochs": self.config.epochs,
            "total_flos": 0,
            "trial_name": null,
            "trial_params": null,
        })
    }
}

/// An entry of the history with rewards under TRL's names.
fn with_rewards(mut entry: Value, prefix: &str, rewards: Option<Rewards>) -> Value {
    let Some(Rewards { chosen, rejected, accuracy, margin }) = rewards else { return entry };
    for (name, value) in [("chosen", chosen), ("rejected", rejected), ("accuracies", accuracy), ("margins", margin)] {
        entry[format!("{prefix}rewards/{name}")] = value.into();
    }
    entry
}
