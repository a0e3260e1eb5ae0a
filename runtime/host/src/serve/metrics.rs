//! `GET /metrics`: what happened since the server began, in Prometheus' text format.
//!
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::handler::{limit, tally};

/// The media type of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Upper bounds of times to the first token and of answers, in seconds: on a processor a long prompt takes minutes.
const SECONDS: [f64; 14] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// Upper bounds of tokens a second, of one answer.
const SPEEDS: [f64; 12] = [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 250.0, 500.0, 1000.0];
/// Models that are counted each at most: files are edited while a server runs. Others are counted together.
const MODELS_MAX: usize = 256;

/// Counts of a server.
#[derive(Default)]
pub struct Metrics(Mutex<State>);

#[derive(Default)]
struct State {
    /// By route, method and status.
    requests: BTreeMap<(String, String, u16), u64>,
    models: BTreeMap<String, OfModel>,
    limits: BTreeMap<&'static str, u64>,
    /// Edited files that were taken, and that were refused.
    reloads: [u64; 2],
    in_flight: i64,
}

#[derive(Default)]
struct OfModel {
    first_token: Histogram<14>,
    answer: Histogram<14>,
    speed: Histogram<12>,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// By how they ended.
    answers: BTreeMap<String, u64>,
}

/// Counts of values up to each bound.
struct Histogram<const N: usize> {
    counts: [u64; N],
    count: u64,
    sum: f64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self { counts: [0; N], count: 0, sum: 0.0 }
    }
}

impl<const N: usize> Histogram<N> {
    fn add(&mut self, value: f64, bounds: &[f64; N]) {
        for (count, bound) in self.counts.iter_mut().zip(bounds) {
            *count += u64::from(value <= *bound);
        }
        self.count += 1;
        self.sum += value;
    }

    fn write(&self, out: &mut String, name: &str, model: &str, bounds: &[f64; N]) {
        let model = escaped(model);
        for (count, bound) in self.counts.iter().zip(bounds) {
            put(out, &format!("{name}_bucket{{model=\"{model}\",le=\"{bound}\"}}"), count);
        }
        put(out, &format!("{name}_bucket{{model=\"{model}\",le=\"+Inf\"}}"), self.count);
        put(out, &format!("{name}_sum{{model=\"{model}\"}}"), self.sum);
        put(out, &format!("{name}_count{{model=\"{model}\"}}"), self.count);
    }
}

/// An answer that is over.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// The name under which it was asked for.
    pub model: String,
    /// From the request to the first text.
    pub first_token: Option<Duration>,
    /// From the request to the end.
    pub answer: Duration,
    /// Tokens a second, from the first to the last.
    pub speed: Option<f64>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// How it ended: a reason of the API, or that it failed or was left.
    pub end: String,
}

impl Metrics {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has come.
    pub fn begin(&self) {
        self.state().in_flight += 1;
    }

    /// A request is over. Routes are those of the server's table, and methods those of its routes.
    pub fn end(&self, route: &str, method: &str, status: u16) {
        let mut state = self.state();
        state.in_flight -= 1;
        let method =
            if ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT"].contains(&method) { method } else { "other" };
        *state.requests.entry((route.to_owned(), method.to_owned(), status)).or_default() += 1;
    }

    /// An answer is over.
    pub fn answered(&self, answered: &Answered) {
        let mut state = self.state();
        let is_new = !state.models.contains_key(&answered.model);
        let name = if is_new && state.models.len() >= MODELS_MAX { "other" } else { &answered.model };
        let model = state.models.entry(name.to_owned()).or_default();
        if let Some(first) = answered.first_token {
            model.first_token.add(first.as_secs_f64(), &SECONDS);
        }
        if let Some(speed) = answered.speed {
            model.speed.add(speed, &SPEEDS);
        }
        model.answer.add(answered.answer.as_secs_f64(), &SECONDS);
        model.prompt_tokens = model.prompt_tokens.saturating_add(answered.prompt_tokens);
        model.completion_tokens = model.completion_tokens.saturating_add(answered.completion_tokens);
        *model.answers.entry(answered.end.clone()).or_default() += 1;
    }

    /// A request was refused by a limit.
    pub fn limited(&self, limit: &'static str) {
        *self.state().limits.entry(limit).or_default() += 1;
    }

    /// An edited file was taken, or refused.
    pub fn reloaded(&self, taken: bool) {
        self.state().reloads[usize::from(!taken)] += 1;
    }

    /// Returns all of it as text. `engines` are the bases that answer here: names, tokens of prompts, and those of them that were not read
    /// again.
    pub fn text(&self, engines: &[(String, u64, u64)]) -> String {
        let state = self.state();
        let mut out = String::new();
        let load = limit::load();
        head(&mut out, "homeroom_requests_total", "counter", "Requests, by route, method and status.");
        for ((route, method, status), count) in &state.requests {
            let labels = format!("route=\"{}\",method=\"{method}\",status=\"{status}\"", escaped(route));
            put(&mut out, &format!("homeroom_requests_total{{{labels}}}"), count);
        }
        for (name, what, value) in [
            (
                "homeroom_requests_in_flight",
                "Requests that are being answered or wait.",
                state.in_flight.max(0).unsigned_abs(),
            ),
            ("homeroom_answers_running", "Requests that have a place at a handler.", load.running as u64),
            ("homeroom_answers_waiting", "Requests that wait for a place.", load.waiting as u64),
        ] {
            head(&mut out, name, "gauge", what);
            put(&mut out, name, value);
        }
        type Of = fn(&OfModel) -> u64;
        let tokens: [(&str, &str, Of); 2] = [
            ("homeroom_prompt_tokens_total", "Tokens of prompts.", |model| model.prompt_tokens),
            ("homeroom_completion_tokens_total", "Tokens of answers.", |model| model.completion_tokens),
        ];
        for (name, what, of) in tokens {
            head(&mut out, name, "counter", what);
            for (model, counts) in &state.models {
                put(&mut out, &format!("{name}{{model=\"{}\"}}", escaped(model)), of(counts));
            }
        }
        head(&mut out, "homeroom_answers_total", "counter", "Answers, by model and how they ended.");
        for (model, counts) in &state.models {
            for (end, count) in &counts.answers {
                let labels = format!("model=\"{}\",end=\"{}\"", escaped(model), escaped(end));
                put(&mut out, &format!("homeroom_answers_total{{{labels}}}"), count);
            }
        }
        let name = "homeroom_time_to_first_token_seconds";
        head(&mut out, name, "histogram", "From a request to the first text of its answer, of streamed answers.");
        state.models.iter().for_each(|(model, counts)| counts.first_token.write(&mut out, name, model, &SECONDS));
        let name = "homeroom_answer_seconds";
        head(&mut out, name, "histogram", "From a request to the end of its answer.");
        state.models.iter().for_each(|(model, counts)| counts.answer.write(&mut out, name, model, &SECONDS));
        let name = "homeroom_answer_tokens_per_second";
        head(&mut out, name, "histogram", "Tokens a second of one streamed answer, from the first to the last.");
        state.models.iter().for_each(|(model, counts)| counts.speed.write(&mut out, name, model, &SPEEDS));
        let what = "Tokens of prompts at bases of this machine, read or taken over from an earlier prompt.";
        head(&mut out, "homeroom_prefix_tokens_total", "counter", what);
        for (base, all, taken_over) in engines {
            for (way, count) in [("read", all.saturating_sub(*taken_over)), ("taken_over", *taken_over)] {
                put(
                    &mut out,
                    &format!("homeroom_prefix_tokens_total{{base=\"{}\",way=\"{way}\"}}", escaped(base)),
                    count,
                );
            }
        }
        type OfHandler = fn(&tally::Counts) -> u64;
        let counters: [(&str, &str, &str, OfHandler); 5] = [
            ("homeroom_retries_total", "counter", "Times that a handler was asked again.", |counts| counts.retries),
            ("homeroom_fallbacks_total", "counter", "Times that the next handler was asked.", |counts| {
                counts.fallbacks
            }),
            ("homeroom_breaker_opened_total", "counter", "Times that a breaker opened.", |counts| {
                counts.breaker_opened
            }),
            ("homeroom_breaker_refused_total", "counter", "Requests that a breaker refused.", |counts| {
                counts.breaker_refused
            }),
            ("homeroom_breaker_open", "gauge", "Whether a breaker is open.", |counts| counts.breaker_is_open.into()),
        ];
        let handlers = tally::counts();
        for (name, kind, what, of) in counters {
            head(&mut out, name, kind, what);
            for (handler, counts) in &handlers {
                put(&mut out, &format!("{name}{{handler=\"{}\"}}", escaped(handler)), of(counts));
            }
        }
        head(&mut out, "homeroom_limited_total", "counter", "Requests that were refused by a limit of their key.");
        for (limit, count) in &state.limits {
            put(&mut out, &format!("homeroom_limited_total{{limit=\"{limit}\"}}"), count);
        }
        head(
            &mut out,
            "homeroom_reloads_total",
            "counter",
            "Edits of the file of handlers that were taken, or refused.",
        );
        for (result, count) in ["taken", "refused"].iter().zip(state.reloads) {
            put(&mut out, &format!("homeroom_reloads_total{{result=\"{result}\"}}"), count);
        }
        out
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    put(out, &format!("# HELP {name}"), help);
    put(out, &format!("# TYPE {name}"), kind);
}

fn put(out: &mut String, name: &str, value: impl std::fmt::Display) {
    writeln!(out, "{name} {value}").expect("a string takes what is written");
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_counted_by_model_and_route() {
        let metrics = Metrics::default();
        metrics.begin();
        metrics.end("/v1/chat/completions", "POST", 200);
        metrics.limited("tokens_per_day");
        metrics.reloaded(false);
        for (first, speed) in [(0.2, 10.0), (3.0, 40.0)] {
            metrics.answered(&Answered {
                model: "a\"b".into(),
                first_token: Some(Duration::from_secs_f64(first)),
                answer: Duration::from_secs(5),
                speed: Some(speed),
                prompt_tokens: 7,
                completion_tokens: 20,
                end: "stop".into(),
            });
        }
        let text = metrics.text(&[("b".to_owned(), 100, 30)]);
        for line in [
            "# TYPE homeroom_requests_total counter",
            "homeroom_requests_total{route=\"/v1/chat/completions\",method=\"POST\",status=\"200\"} 1",
            "homeroom_requests_in_flight 0",
            "homeroom_prompt_tokens_total{model=\"a\\\"b\"} 14",
            "homeroom_answers_total{model=\"a\\\"b\",end=\"stop\"} 2",
            "homeroom_time_to_first_token_seconds_bucket{model=\"a\\\"b\",le=\"0.25\"} 1",
            "homeroom_time_to_first_token_seconds_bucket{model=\"a\\\"b\",le=\"+Inf\"} 2",
            "homeroom_time_to_first_token_seconds_sum{model=\"a\\\"b\"} 3.2",
            "homeroom_answer_tokens_per_second_count{model=\"a\\\"b\"} 2",
            "homeroom_limited_total{limit=\"tokens_per_day\"} 1",
            "homeroom_reloads_total{result=\"refused\"} 1",
            "homeroom_prefix_tokens_total{base=\"b\",way=\"read\"} 70",
            "homeroom_prefix_tokens_total{base=\"b\",way=\"taken_over\"} 30",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        // Every line is one of the format's, and every sample's name has a type.
        for line in text.lines() {
            assert!(
                line.starts_with("# ") || line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok())
            );
        }
        for number in 0..2 * MODELS_MAX {
            metrics.answered(&Answered { model: number.to_string(), ..Answered::default() });
        }
        assert!(metrics.state().models.len() <= MODELS_MAX + 1);
    }
}
