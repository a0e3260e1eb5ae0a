//! A strategy beside its running training: its hook is asked after each step, and another generation of it is taken over
//! between two steps.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use homeroom_abi::plan::PlanRequest;
use homeroom_abi::step::{Directive, StepAnswer, StepMetrics, StepRequest};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::train::{Candidate, Change, Control, EvalReport, Observer, RunEvent, State, StepReport};
use serde_json::{Map, Value, json};

use super::Plugin;
use super::reload::{Ready, Reload, Watching};

/// How long a strategy may take to answer to a step.
const DEADLINE: Duration = Duration::from_secs(2);

/// An observer with a strategy beside it.
pub struct Live<'a> {
    observer: &'a mut dyn Observer,
    options: Map<String, Value>,
    plugin: Plugin,
    hook: Option<Hook>,
    /// What the strategy gave to hear again.
    state: Value,
    /// The step that is done.
    last: Option<StepMetrics>,
    /// The learning rate that the present plan proposes.
    learning_rate: Option<f64>,
    reload: Option<Reload>,
    /// The generation that was taken from `reload`, until the run has answered.
    next: Option<Next>,
    /// The generation before the one on trial.
    before: Option<Before>,
    tell: &'a dyn Fn(&Plugin, &Arc<Adaptation>),
    say: fn(&str),
}

/// A generation that the run has yet to answer to.
struct Next {
    plugin: Plugin,
    hook: Option<Hook>,
    learning_rate: Option<f64>,
}

/// A generation to go back to.
struct Before {
    plugin: Plugin,
    hooked: bool,
    state: Value,
    learning_rate: Option<f64>,
}

impl<'a> Live<'a> {
    /// `learning_rate`: what the plan proposes. `watching`: when the plugin's file is to be watched. `tell` is given what is trained now
    /// whenever that has changed, `say` each line.
    pub fn new(
        observer: &'a mut dyn Observer,
        plugin: &Plugin,
        request: PlanRequest,
        learning_rate: Option<f64>,
        watching: Option<Watching>,
        tell: &'a dyn Fn(&Plugin, &Arc<Adaptation>),
        say: fn(&str),
    ) -> Self {
        Self {
            observer,
            options: request.options.clone(),
            plugin: plugin.clone(),
            hook: Some(Hook::new(plugin)),
            state: Value::Null,
            last: None,
            learning_rate,
            reload: watching.map(|watching| Reload::watch(plugin, request, watching, say)),
            next: None,
            before: None,
            tell,
            say,
        }
    }

    /// Goes on with what the strategy had given to hear again, and what it had heard, when a checkpoint was saved.
    pub fn remember(&mut self, memory: &Value) {
        if memory.is_null() {
            return;
        }
        self.state = memory["state"].clone();
        self.last = serde_json::from_value(memory["last"].clone()).unwrap_or_default();
        // One that failed or wanted to hear of no step is not asked again.
        match memory["hooked"] == Value::Bool(false) {
            true => self.hook = None,
            false if self.hook.is_none() => self.hook = Some(Hook::new(&self.plugin)),
            false => {}
        }
    }

    fn short(sha256: &str) -> &str {
        sha256.get(..8).unwrap_or(sha256)
    }

    fn request(&self, metrics: StepMetrics) -> StepRequest {
        StepRequest { options: self.options.clone(), metrics, state: self.state.clone() }
    }

    /// The hook of another generation, if it has one: it is asked what it would have directed after the last step.
    fn hook_of(&self, plugin: &Plugin) -> Option<Hook> {
        let hook = Hook::new(plugin);
        let answer = self.last.map(|metrics| hook.ask(self.request(metrics)));
        // One that fails has a hook; it fails again after the next step, and that is told.
        (!matches!(answer, Some(Ok(None)))).then_some(hook)
    }
}

impl Observer for Live<'_> {
    fn on_step(&mut self, report: &StepReport, planned_steps: u64) -> Result<Control> {
        self.observer.on_step(report, planned_steps)
    }

    fn directives(&mut self, report: &StepReport, planned_steps: u64) -> Result<Vec<Directive>> {
        let mut directives = self.observer.directives(report, planned_steps)?;
        let metrics = StepMetrics {
            step: report.step,
            steps: planned_steps,
            epoch: report.epoch,
            loss: report.loss,
            grad_norm: report.grad_norm,
            learning_rate: report.learning_rate,
            tokens: report.tokens,
        };
        self.last = Some(metrics);
        let request = self.request(metrics);
        let Some(hook) = &self.hook else { return Ok(directives) };
        match hook.ask(request) {
            Ok(Some(answer)) => {
                self.state = answer.state;
                directives.extend(answer.directives);
            }
            Ok(None) => self.hook = None,
            Err(reason) => {
                self.hook = None;
                let name = &self.plugin.description.name;
                (self.say)(&format!("warning: strategy `{name}`: on_step: {reason}; the training goes on without it"));
            }
        }
        Ok(directives)
    }

    fn candidate(&mut self) -> Result<Option<Candidate>> {
        let Some(ready) = self.reload.as_ref().and_then(Reload::take) else { return self.observer.candidate() };
        let Ready { plugin, plan } = ready;
        let (id, hook, learning_rate) = (plugin.sha256.clone(), self.hook_of(&plugin), plan.defaults.learning_rate);
        let directs = hook.is_some();
        self.next = Some(Next { plugin, hook, learning_rate });
        Ok(Some(Candidate { id, plan, directs }))
    }

    fn on_eval(&mut self, report: &EvalReport, planned_steps: u64) -> Result<Control> {
        self.observer.on_eval(report, planned_steps)
    }

    fn evaluating(&mut self, done: usize, all: usize) {
        self.observer.evaluating(done, all);
    }

    fn evaluated(&mut self, report: &EvalReport) {
        self.observer.evaluated(report);
    }

    fn memory(&mut self) -> Result<Value> {
        let strategy = json!({"state": self.state, "last": self.last, "hooked": self.hook.is_some()});
        Ok(json!({"strategy": strategy, "observer": self.observer.memory()?}))
    }

    fn recall(&mut self, memory: &Value) {
        self.remember(&memory["strategy"]);
        self.observer.recall(&memory["observer"]);
    }

    fn is_cancelled(&mut self) -> bool {
        self.observer.is_cancelled()
    }

    fn reason(&self) -> Option<String> {
        self.observer.reason()
    }

    fn is_due(&mut self, state: &State) -> bool {
        self.observer.is_due(state)
    }

    fn save(&mut self, state: &State) -> Result<()> {
        self.observer.save(state)
    }

    fn saved(&mut self, step: u64) -> Result<Option<State>> {
        self.observer.saved(step)
    }

    fn lowers(&mut self) -> Option<String> {
        self.observer.lowers()
    }

    fn cannot_lower(&mut self) {
        self.observer.cannot_lower();
    }

    fn changed(&mut self, event: &RunEvent, adaptation: &Arc<Adaptation>) -> Result<()> {
        let (name, step) = (self.plugin.description.name.clone(), event.step);
        let line = match &event.change {
            Change::Swapped(swap) => {
                let mut proposal = String::new();
                if let Some(Next { plugin, hook, learning_rate }) = self.next.take() {
                    if let Some(rate) = learning_rate.filter(|_| learning_rate != self.learning_rate) {
                        proposal = format!(", the learning rate stays ({rate} is proposed for a new run)");
                    }
                    self.before = Some(Before {
                        plugin: std::mem::replace(&mut self.plugin, plugin),
                        hooked: std::mem::replace(&mut self.hook, hook).is_some(),
                        state: self.state.clone(),
                        learning_rate: std::mem::replace(&mut self.learning_rate, learning_rate),
                    });
                }
                let some = |what: &str, names: &[String]| match names {
                    [] => String::new(),
                    [first] => format!(", {what} {first}"),
                    [first, rest @ ..] => format!(", {what} {first} and {} more", rest.len()),
                };
                let ended = match &swap.ended[..] {
                    [] => String::new(),
                    ended => format!(", no longer directed: {}", ended.join(", ")),
                };
                format!(
                    "reload    {name} {} after step {step}: {} parameters kept{}{}{}{ended}{proposal}",
                    Self::short(&swap.id),
                    swap.kept,
                    some("new:", &swap.added),
                    some("in another shape:", &swap.migrated),
                    some("dropped:", &swap.dropped),
                )
            }
            Change::Passed { id } => {
                self.before = None;
                format!("reload    {name} {} has done well and stays", Self::short(id))
            }
            Change::Refused { id, reason } | Change::RolledBack { id, reason } => {
                self.next = None;
                if let Some(Before { plugin, hooked, state, learning_rate }) = self.before.take() {
                    self.hook = hooked.then(|| Hook::new(&plugin));
                    (self.plugin, self.state, self.learning_rate) = (plugin, state, learning_rate);
                }
                if let Some(reload) = &self.reload {
                    reload.quarantine(id, &self.plugin.sha256);
                }
                let reason = reason.replace('\n', " ");
                let how = match &event.change {
                    Change::Refused { .. } => format!("refused: {reason}; the training goes on without it"),
                    _ => format!("taken back to step {step}: {reason}; the training goes on without it"),
                };
                format!("reload    {name} {} {how}", Self::short(id))
            }
            // Whoever saves its states tells of it.
            Change::Rewound { .. } | Change::FellBack | Change::Lowered { .. } => {
                (self.tell)(&self.plugin, adaptation);
                return self.observer.changed(event, adaptation);
            }
            Change::Directed { directive } => format!("strategy `{name}` after step {step}: {directive}"),
            Change::Undirected { directive, reason } => {
                self.hook = None;
                format!("warning: strategy `{name}`: on_step: {directive}: {reason}; the training goes on without it")
            }
        };
        // A scalar or a rate may follow a schedule, which is a directive a step.
        if !matches!(
            event.change,
            Change::Directed { directive: Directive::LearningRateScale(_) | Directive::Scalar { .. } }
        ) {
            (self.say)(&line);
        }
        (self.tell)(&self.plugin, adaptation);
        self.observer.changed(event, adaptation)
    }
}

/// A strategy's `on_step`, in a thread of its own: one that does not return is left behind.
struct Hook {
    asks: Sender<StepRequest>,
    answers: Receiver<Result<Option<StepAnswer>>>,
}

impl Hook {
    fn new(plugin: &Plugin) -> Self {
        let (asks, requests) = channel::<StepRequest>();
        let (sender, answers) = channel();
        let plugin = plugin.clone();
        thread::spawn(move || {
            for request in requests {
                if sender.send(plugin.on_step(&request)).is_err() {
                    break;
                }
            }
        });
        Self { asks, answers }
    }

    /// `None`: the strategy wants to hear of no step.
    fn ask(&self, request: StepRequest) -> Result<Option<StepAnswer>, String> {
        // A thread that has ended shows in the answer that does not come.
        let _ = self.asks.send(request);
        match self.answers.recv_timeout(DEADLINE) {
            Ok(answer) => answer.map_err(|error| format!("{error:#}").replace('\n', " ")),
            Err(RecvTimeoutError::Timeout) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err("its thread has ended".to_owned()),
        }
    }
}
