//! What happened to a job: messages of its own, and the losses that its training writes down.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use homeroom_engine::files::replace_file;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::hex::hex;
use crate::registry::when;
use crate::runs;
use crate::serve::files::store::private_file;
use crate::serve::now;

/// The job's own events.
const EVENTS: &str = "events.jsonl";
/// Losses of a job that has ended.
const METRICS: &str = "metrics.jsonl";

/// Writes a message behind the others. A disk that is full costs the message alone.
pub fn tell(directory: &Path, level: &str, message: &str) {
    let line = format!("{}\n", json!({"at": now(), "level": level, "message": message}));
    let path = directory.join(EVENTS);
    let file = match fs::OpenOptions::new().append(true).open(&path) {
        Ok(file) => Ok(file),
        Err(_) => private_file(&path),
    };
    if let Ok(mut file) = file {
        let _ = file.write_all(line.as_bytes());
    }
}

/// Losses after one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Loss of the step.
    pub train_loss: Option<f64>,
    /// Loss on the held-out rows after it.
    pub valid_loss: Option<f64>,
    /// Share of their tokens that were the likeliest.
    pub valid_accuracy: Option<f64>,
    /// Tokens of the step.
    pub tokens: u64,
}

/// Losses by step, of one line each. A step that was taken again is as it was the last time.
fn metrics_of<'a>(lines: impl IntoIterator<Item = &'a Value>) -> BTreeMap<u64, Metrics> {
    let mut found: BTreeMap<u64, Metrics> = BTreeMap::new();
    for line in lines {
        let Some(step) = line["step"].as_u64() else { continue };
        match line["event"].as_str() {
            Some("step") => {
                let metrics = found.entry(step).or_default();
                metrics.train_loss = line["loss"].as_f64();
                metrics.tokens = line["tokens"].as_u64().unwrap_or(0);
                metrics.at = at(line);
            }
            Some("eval") if step > 0 => {
                let metrics = found.entry(step).or_default();
                metrics.valid_loss = line["eval_loss"].as_f64();
                metrics.valid_accuracy = line["token_accuracy"].as_f64();
                metrics.at = metrics.at.max(at(line));
            }
            // What came after it was undone.
            Some("rewound" | "resumed") => found.retain(|other, _| *other <= step),
            _ => {}
        }
    }
    found
}

fn at(line: &Value) -> u64 {
    line["time"].as_str().and_then(when::seconds).unwrap_or(0)
}

/// Losses of a job so far: what it kept, else what its run has written.
pub fn metrics(directory: &Path, run: Option<&str>) -> BTreeMap<u64, Metrics> {
    if let Ok(text) = fs::read_to_string(directory.join(METRICS)) {
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        return metrics_of(&lines);
    }
    let run = run.and_then(|run| runs::find(run).ok());
    run.map(|run| metrics_of(&runs::events(&run.path))).unwrap_or_default()
}

/// Keeps the losses of a job that has ended, as its run may make room for others; returns them.
///
/// # Errors
/// When the disk is full.
pub fn keep_metrics(directory: &Path, run: &Path) -> Result<BTreeMap<u64, Metrics>> {
    let wanted = |line: &Value| ["step", "eval", "rewound", "resumed"].iter().any(|name| line["event"] == *name);
    let lines: Vec<Value> = runs::events(run).into_iter().filter(wanted).collect();
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    replace_file(&directory.join(METRICS), text.as_bytes())?;
    Ok(metrics_of(&lines))
}

/// Losses as a table, which OpenAI calls `step_metrics.csv`.
pub fn table(metrics: &BTreeMap<u64, Metrics>) -> String {
    let mut table = "step,train_loss,valid_loss,valid_mean_token_accuracy\n".to_owned();
    let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    for (step, metrics) in metrics {
        let [train, valid, accuracy] = [metrics.train_loss, metrics.valid_loss, metrics.valid_accuracy].map(number);
        table += &format!("{step},{train},{valid},{accuracy}\n");
    }
    table
}

/// All events of a job as OpenAI's API has them, the newest first.
pub fn all(directory: &Path, job: &str, metrics: &BTreeMap<u64, Metrics>, steps: Option<u64>) -> Vec<Value> {
    let text = fs::read_to_string(directory.join(EVENTS)).unwrap_or_default();
    let event = |key: String, at: u64, level: &Value, message: String, data: Value, kind: &str| {
        let id = hex(&Sha256::digest(format!("{job} {key}").as_bytes())[..12]);
        json!({
            "object": "fine_tuning.job.event",
            "id": format!("ftevent-{id}"),
            "created_at": at,
            "level": level,
            "message": message,
            "data": data,
            "type": kind,
        })
    };
    let mut found: Vec<(u64, Value)> = Vec::new();
    for (number, line) in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).enumerate() {
        let at = line["at"].as_u64().unwrap_or(0);
        let message = line["message"].as_str().unwrap_or_default().to_owned();
        found.push((at, event(format!("message {number}"), at, &line["level"], message, json!({}), "message")));
    }
    // A message of the second in which a step was made stands before it if it was the first, and behind it if it was the last.
    let (begun, ended): (Vec<_>, Vec<_>) = {
        let last = metrics.values().last().map_or(u64::MAX, |metrics| metrics.at);
        let first = metrics.values().next().map_or(u64::MAX, |metrics| metrics.at);
        found.into_iter().partition(|(at, event)| *at <= first.min(last) && !is_end(event))
    };
    let mut all: Vec<(u64, Value)> = begun;
    for (step, metrics) in metrics {
        let of = steps.map(|steps| format!("/{steps}")).unwrap_or_default();
        let loss =
            |name: &str, loss: Option<f64>| loss.map(|loss| format!(", {name} loss={loss:.4}")).unwrap_or_default();
        let message = format!(
            "Step {step}{of}{}{}",
            loss("training", metrics.train_loss).replacen(", ", ": ", 1),
            loss("validation", metrics.valid_loss)
        );
        let data = json!({
            "step": step,
            "total_steps": steps,
            "train_loss": metrics.train_loss,
            "valid_loss": metrics.valid_loss,
            "valid_mean_token_accuracy": metrics.valid_accuracy,
        });
        all.push((metrics.at, event(format!("step {step}"), metrics.at, &json!("info"), message, data, "metrics")));
    }
    all.extend(ended);
    // Stable: what is of one second stays in order.
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().rev().map(|(_, event)| event).collect()
}

/// Whether a message says that the training is over.
fn is_end(event: &Value) -> bool {
    let message = event["message"].as_str().unwrap_or_default();
    ["The job has", "The model is"].iter().any(|begin| message.starts_with(begin))
}
