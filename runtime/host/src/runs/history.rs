//! What the events of a run come to: the steps that count, the evaluations, and what happened beside them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::job::lowered_words;
use crate::troubles::STUCK;

/// Events of a run that are of none of its trainings.
const RUNS_OWN: [&str; 2] = ["looked_up", "saved_model"];

/// What one training of a run did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Training {
    /// Its number in the run, from 1.
    pub number: u64,
    /// What it was started with: the fields of its event `started`, without `event`, `time` and `training`.
    pub started: BTreeMap<String, Value>,
    /// Steps in order. One that was taken again after a resume or a rewind is as it was the last time.
    pub steps: Vec<Step>,
    /// Evaluations on held-out rows in order.
    pub evals: Vec<Eval>,
    /// Questions with the answers before and after.
    pub samples: Vec<Sample>,
    /// What else happened, in order.
    pub moments: Vec<Moment>,
    /// Fields of its event `finished`.
    pub finished: BTreeMap<String, Value>,
}

/// One step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// Epochs that were done by then.
    pub epoch: Option<f64>,
    /// Loss before the update.
    pub loss: Option<f64>,
    /// Norm of all gradients before clipping.
    pub grad_norm: Option<f64>,
    /// Learning rate of the update.
    pub learning_rate: Option<f64>,
    /// Tokens of the step's rows.
    pub tokens: Option<u64>,
    /// Seconds that it took.
    pub seconds: Option<f64>,
    /// Of an objective of preferences: reward of the chosen, of the rejected, their accuracy, their margin.
    pub rewards: Option<[Option<f64>; 4]>,
}

/// One evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Eval {
    /// Steps that were done.
    pub step: u64,
    /// Epochs that were done.
    pub epoch: Option<f64>,
    /// Loss on the held-out rows.
    pub eval_loss: Option<f64>,
    /// Its exponential.
    pub perplexity: Option<f64>,
    /// Share of tokens that were the likeliest.
    pub token_accuracy: Option<f64>,
}

/// A question that was held out, and its answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// What the row answers.
    pub expected: String,
    /// What the model answered before the training.
    pub before: String,
    /// What it answers now.
    pub after: String,
}

/// Something that happened in a training.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Moment {
    /// Steps that were done.
    pub step: Option<u64>,
    /// When.
    pub time: String,
    /// Name of the event.
    pub event: String,
    /// What it says besides.
    pub fields: BTreeMap<String, Value>,
}

impl Moment {
    /// In words for a reader.
    pub fn words(&self) -> String {
        let text = |key: &str| self.fields.get(key).map(plain).unwrap_or_default();
        let because = |words: String| match text("reason") {
            reason if reason.is_empty() => words,
            reason => format!("{words}: {reason}"),
        };
        match self.event.as_str() {
            "checkpoint" => "checkpoint saved".to_owned(),
            "resumed" => "taken up again from its checkpoint".to_owned(),
            "rewound" => {
                let scale = self.fields.get("rate_scale").and_then(Value::as_f64);
                let scale = scale.map(|scale| format!(", learning rate times {scale}")).unwrap_or_default();
                because(format!("went back to step {}{scale}", text("to")))
            }
            "lowered" => {
                let rows = self.fields.get("pass_rows").and_then(Value::as_u64).unwrap_or_default();
                let again = self.fields.get("gradient_checkpointing").and_then(Value::as_bool).unwrap_or_default();
                because(format!("from here on {}", lowered_words(rows, again)))
            }
            "stalled" => format!("{} for {} s; {}", text("doing"), text("seconds"), STUCK.cause),
            "swapped" => format!("went on with another build of its strategy ({})", text("id")),
            "passed" => format!("the new build did well ({})", text("id")),
            "rolled_back" => because(format!("the new build was taken back ({})", text("id"))),
            "refused" => because(format!("a new build was refused ({})", text("id"))),
            "directed" => format!("the strategy or script changed the course: {}", text("directive")),
            "undirected" => because(format!("a change of course was refused: {}", text("directive"))),
            "forgetting" => forgets(&Value::Object(self.fields.clone().into_iter().collect()))
                .map_or_else(|| "forgetting".to_owned(), |words| format!("forgets: {words}")),
            "interrupted" => "ended by the user".to_owned(),
            "stopped" => because("stopped before its planned end".to_owned()),
            other => {
                let fields = self.fields.iter().map(|(key, value)| format!("{key} {}", plain(value)));
                let fields = fields.collect::<Vec<_>>().join(", ");
                if fields.is_empty() {
                    other.replace('_', " ")
                } else {
                    format!("{}: {fields}", other.replace('_', " "))
                }
            }
        }
    }
}

/// A value as a reader has it: texts without quotes, whole lists in brackets.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// How far a model has moved from its base, in words, of what [`crate::job::forgetting`] measured; `None`: it is something else.
pub fn forgets(measured: &Value) -> Option<String> {
    let number = |key: &str| measured[key].as_f64();
    let (before, after, kl) = (number("loss_before")?, number("loss_after")?, number("kl")?);
    Some(format!(
        "loss {before:.4} before, {after:.4} after; KL {kl:.4} nats a token. Below about 0.1 the answers of the base hardly change, above about 1 they are mostly others"
    ))
}

/// A model that a run saved under a name, the last one first.
pub fn saved_models(events: &[Value]) -> impl Iterator<Item = &str> {
    events.iter().rev().filter(|event| event["event"] == "saved_model").filter_map(|event| event["path"].as_str())
}

/// The trainings whose results a run looked up: the run that made each, and the result.
pub fn looked_up(events: &[Value]) -> Vec<(&str, &str)> {
    let mut all: Vec<(&str, &str)> = Vec::new();
    for event in events.iter().filter(|event| event["event"] == "looked_up") {
        let Some(found) = event["from"].as_str().zip(event["adapter"].as_str()) else { continue };
        // A run that is taken up again looks them up again.
        if !all.contains(&found) {
            all.push(found);
        }
    }
    all
}

impl Training {
    /// Whether its last word is that it was ended before its planned end: by the user, or by an error.
    pub fn is_cut_short(&self) -> bool {
        let last = self.steps.last().map_or(0, |step| step.step);
        self.finished.is_empty() && self.planned().is_some_and(|planned| last < planned)
    }

    /// Whether it learned from single answers that are rated, as that of kto does, and not from pairs.
    pub fn is_of_ratings(&self) -> bool {
        self.started.get("objective").and_then(Value::as_str) == Some("kto")
    }

    /// Steps and evaluations behind a step were undone.
    fn go_back(&mut self, step: u64) {
        self.steps.retain(|other| other.step <= step);
        self.evals.retain(|other| other.step <= step);
        self.finished.clear();
    }

    /// Steps that were planned, if it says so.
    pub fn planned(&self) -> Option<u64> {
        ["steps", "planned_steps", "max_steps"].iter().find_map(|key| self.started.get(*key)?.as_u64())
    }

    /// Whether its loss is how much the right answers surprise it, as that of sft is; other objectives weigh answers against each other.
    pub fn is_of_surprise(&self) -> bool {
        self.started.get("objective").and_then(Value::as_str).is_none_or(|objective| objective == "sft")
    }

    /// Loss of the first, of the last, and the lowest of all steps.
    pub fn losses(&self) -> Option<(f64, f64, f64)> {
        let losses: Vec<f64> = self.steps.iter().filter_map(|step| step.loss).collect();
        let lowest = losses.iter().copied().filter(|loss| loss.is_finite()).fold(f64::INFINITY, f64::min);
        Some((*losses.first()?, *losses.last()?, lowest))
    }

    /// The evaluation with the lowest loss.
    pub fn best(&self) -> Option<&Eval> {
        let with_loss = self.evals.iter().filter_map(|eval| Some((eval, eval.eval_loss?)));
        with_loss.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(eval, _)| eval)
    }
}

/// The trainings of a run by its events, in order.
pub fn trainings(events: &[Value]) -> Vec<Training> {
    let mut found: BTreeMap<u64, Training> = BTreeMap::new();
    for event in events {
        let Some(name) = event["event"].as_str() else { continue };
        let number = event["training"].as_u64();
        if number.is_none() && RUNS_OWN.contains(&name) {
            continue;
        }
        // What belongs to no training is the run's own.
        if number.is_none() && !["step", "eval", "sample", "checkpoint"].contains(&name) && found.is_empty() {
            continue;
        }
        let number = number.unwrap_or(1);
        let training = found.entry(number).or_insert_with(|| Training { number, ..Training::default() });
        hear(training, name, event);
    }
    found.into_values().collect()
}

fn hear(training: &mut Training, name: &str, event: &Value) {
    let number = |key: &str| event[key].as_f64();
    let step = event["step"].as_u64();
    let fields = || -> BTreeMap<String, Value> {
        let known = ["event", "time", "training", "step"];
        let fields = event.as_object().into_iter().flatten().filter(|(key, _)| !known.contains(&key.as_str()));
        fields.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    match (name, step) {
        ("step", Some(step)) => {
            let rewards = event["rewards"].as_object().map(|rewards| {
                ["chosen", "rejected", "accuracy", "margin"].map(|key| rewards.get(key).and_then(Value::as_f64))
            });
            training.steps.retain(|other| other.step != step);
            training.steps.push(Step {
                step,
                epoch: number("epoch"),
                loss: number("loss"),
                grad_norm: number("grad_norm"),
                learning_rate: number("learning_rate"),
                tokens: event["tokens"].as_u64(),
                seconds: number("seconds"),
                rewards,
            });
        }
        ("eval", Some(step)) => {
            training.evals.retain(|other| other.step != step);
            training.evals.push(Eval {
                step,
                epoch: number("epoch"),
                eval_loss: number("eval_loss"),
                perplexity: number("perplexity"),
                token_accuracy: number("token_accuracy"),
            });
        }
        ("sample", _) => {
            let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
            let sample = Sample {
                prompt: text("prompt"),
                expected: text("expected"),
                before: text("before"),
                after: text("after"),
            };
            // A resumed run asks again.
            training.samples.retain(|other| other.prompt != sample.prompt || other.expected != sample.expected);
            training.samples.push(sample);
        }
        // Also of one that begins anew, as nothing of it was saved.
        ("started", _) => {
            let number = training.number;
            *training = Training { number, started: fields(), ..Training::default() };
        }
        ("finished", _) => training.finished = fields(),
        _ => {
            if let Some(to) = goes_back(name, event) {
                training.go_back(to);
            }
            let time = event["time"].as_str().unwrap_or_default().to_owned();
            training.moments.push(Moment { step, time, event: name.to_owned(), fields: fields() });
        }
    }
}

/// The step that an event takes a training back to, if it does.
pub fn goes_back(name: &str, event: &Value) -> Option<u64> {
    match name {
        "resumed" | "rolled_back" | "fell_back" => event["step"].as_u64(),
        "rewound" => event["to"].as_u64(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn step(step: u64, loss: f64) -> Value {
        json!({"event": "step", "training": 1, "step": step, "loss": loss})
    }

    #[test]
    fn steps_that_were_taken_again_are_as_they_were_the_last_time() {
        let events = [
            json!({"event": "started", "training": 1, "steps": 4}),
            step(1, 3.0),
            step(2, 2.0),
            json!({"event": "eval", "training": 1, "step": 2, "eval_loss": 2.5}),
            json!({"event": "checkpoint", "training": 1, "step": 2}),
            step(3, 9.0),
            json!({"event": "eval", "training": 1, "step": 3, "eval_loss": 9.5}),
            json!({"event": "resumed", "training": 1, "step": 2}),
            step(3, 1.5),
            step(4, f64::MAX),
            json!({"event": "rewound", "training": 1, "step": 4, "to": 2, "reason": "the loss diverges", "rate_scale": 0.5}),
            step(3, 1.25),
            json!({"event": "step", "training": 2, "step": 1, "loss": 7.0}),
        ];
        let found = trainings(&events);
        let losses = |training: &Training| training.steps.iter().map(|step| (step.step, step.loss)).collect::<Vec<_>>();
        assert_eq!(losses(&found[0]), [(1, Some(3.0)), (2, Some(2.0)), (3, Some(1.25))]);
        assert_eq!(losses(&found[1]), [(1, Some(7.0))]);
        assert_eq!(found[0].losses(), Some((3.0, 1.25, 1.25)));
        assert_eq!(found[0].evals.iter().map(|eval| eval.eval_loss).collect::<Vec<_>>(), [Some(2.5)]);
        let words: Vec<String> = found[0].moments.iter().map(Moment::words).collect();
        assert_eq!(
            words,
            [
                "checkpoint saved",
                "taken up again from its checkpoint",
                "went back to step 2, learning rate times 0.5: the loss diverges",
            ]
        );
    }

    #[test]
    fn what_a_run_looked_up_and_saved_is_of_none_of_its_trainings() {
        let events = [
            json!({"event": "started", "training": 1, "steps": 60}),
            step(1, 3.0),
            json!({"event": "stopped", "training": 1, "step": 1, "reason": "a callback failed: no"}),
            json!({"event": "looked_up", "from": "a-1", "adapter": "a-1/1"}),
            json!({"event": "looked_up", "from": "a-1", "adapter": "a-1/1"}),
            json!({"event": "saved_model", "name": "old", "path": "/models/old"}),
            json!({"event": "saved_model", "name": "new", "path": "/models/new"}),
            json!({"event": "forgetting", "training": 1, "loss_before": 2.0, "loss_after": 2.5, "kl": 0.25, "tokens": 9}),
        ];
        let found = trainings(&events);
        assert!(found.len() == 1 && found[0].is_cut_short());
        assert_eq!(looked_up(&events), [("a-1", "a-1/1")]);
        assert_eq!(saved_models(&events).next(), Some("/models/new"));
        let words: Vec<String> = found[0].moments.iter().map(Moment::words).collect();
        assert_eq!(words[0], "stopped before its planned end: a callback failed: no");
        assert!(words[1].starts_with("forgets: loss 2.0000 before, 2.5000 after; KL 0.2500 nats a token"), "{words:?}");
        assert_eq!(words.len(), 2);
    }

    #[test]
    fn fields_of_another_kind_and_unknown_events_are_no_trouble() {
        let events = [
            json!({"event": "step", "step": "x", "loss": []}),
            json!({"event": "step", "step": 1, "loss": null, "rewards": {"margin": 0.5}}),
            json!({"event": 7}),
            json!({"event": "slept", "minutes": 3, "training": 1}),
        ];
        let found = trainings(&events);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].steps.len(), 1);
        assert_eq!(found[0].steps[0].rewards, Some([None, None, None, Some(0.5)]));
        assert_eq!(found[0].losses(), None);
        assert_eq!(found[0].moments.last().map(Moment::words).as_deref(), Some("slept: minutes 3"));
    }
}
