//! Training: the loop over steps, what an observer hears of it, and what it is between two steps.
//!
//! [`State`] is all that a run is between two steps; [`checkpoint`] writes it and reads it. [`run`] makes a step, [`objective`] says what
//! it makes small, [`reduce`] adds the gradients of its passes. Between two steps a run can go on with another plan, see [`swap`]; when
//! its numbers are no longer good it goes back to where they were, see [`watchdog`].

use anyhow::{Result, ensure};
use homeroom_abi::plan::Plan;

use crate::data::order::epoch_order;
use crate::data::{Example, Group, Unit};
use crate::files::mapped::Surviving;
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::Batch;
use crate::run::compute::Compute;

pub mod checkpoint;
mod config;
mod end;
mod evaluate;
pub mod objective;
mod observer;
pub mod optimizer;
mod outcome;
pub mod reduce;
mod report;
mod run;
pub mod schedule;
mod state;
pub mod swap;
mod watchdog;

pub use config::{TrainConfig, planned_steps};
pub use end::Broken;
use end::Unusable;
pub use evaluate::{Evaluation, evaluate_each, evaluate_examples, evaluate_units};
use objective::Objective;
pub use observer::{Control, Observer};
pub use outcome::Outcome;
pub use report::{EvalReport, StepReport, TrainReport};
pub use run::{Run, Whole};
pub use state::{Best, Cut, Passes, State};
pub use swap::{Candidate, Change, RunEvent, Swap};

/// What a run is trained and measured on.
#[derive(Clone, Debug, Default)]
pub struct Data<'a> {
    /// What is trained on, by number: a unit's number is its place.
    pub units: Vec<Unit<'a>>,
    /// What is held out; its numbers go on after those.
    pub held_out: Vec<Unit<'a>>,
}

impl<'a> Data<'a> {
    /// Examples, each a unit of its own.
    pub fn of_examples(examples: &[&'a Example], held_out: &[&'a Example]) -> Self {
        let mut units = (0..).zip(examples.iter().chain(held_out)).map(|(number, example)| Unit::of(number, example));
        let trained = units.by_ref().take(examples.len()).collect();
        Self { units: trained, held_out: units.collect() }
    }

    /// Samples, each a unit, as [`objective::prepare`] numbers them.
    pub fn of_groups(groups: &[&'a Group], held_out: &[&'a Group]) -> Self {
        let mut units = (0..).zip(groups.iter().chain(held_out)).map(|(number, group)| group.unit(number));
        let trained = units.by_ref().take(groups.len()).collect();
        Self { units: trained, held_out: units.collect() }
    }
}

/// Trains from a state on, and returns the state that it ends in. The parameters of the state's adaptation are trained in place; those
/// of the plans that an observer has it go on with are others, which the observer is given.
///
/// The loss of a step is the objective's mean over the whole step, of sft over its trained tokens, counted first: how a step is cut into passes changes nothing but speed. A run goes round the units again when `max_steps` wants more.
///
/// A run from a state that was saved between two steps makes the steps that are left, with the same bits as the run that saved it. The
/// observer is asked the same things at the same steps, but for what it was asked before.
///
/// Losses, gradients and parameters are looked at in every step, and the loss of one row after the last. When they are no longer finite,
/// or the loss diverges, the run goes back to the last state that the observer has saved and goes on with half the learning rate.
///
/// # Errors
/// When a parameter gets no gradient, or one stays all zero for three updates with a learning rate above zero; the message names it.
/// When numbers are no longer finite and there is nothing to go back to, or they fail again, or a file of the base is gone: as
/// [`Broken`], if something was learned before, to which the parameters are set back.
pub fn train(
    model: &BaseModel,
    state: State,
    data: &Data<'_>,
    objective: &dyn Objective,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<State> {
    let planned = planned_steps(data.units.len(), config)?;
    // A base that shrinks costs no more than the step that meets it: `Run::step` looks for that.
    let _surviving = Surviving::begin();
    let mut run = Run::restore(model, objective, config, planned, state);
    run.state.report.planned_steps = planned;
    run.state.report.interrupted &= run.state.report.stopped.is_some();
    let is_new = run.state.step == 0 && run.state.report.evaluations.is_empty() && !data.held_out.is_empty();
    if is_new && run.evaluate(data, observer, 0.0)?.is_none() {
        // Nobody waits for it, and after a step it could not be made up for.
        run.state.report.interrupted = true;
        if observer.is_due(&run.state) {
            observer.save(&run.state)?;
        }
        return Ok(run.state);
    }
    if run.state.step == 0 && observer.is_due(&run.state) {
        observer.save(&run.state)?;
    }
    let cut = Steps::new(data, config);
    let mut order = Order::default();
    while run.state.step < planned && run.state.report.stopped.is_none() {
        let owed = run.state.report.steps.last().copied().filter(|_| run.state.owes);
        let settled = match owed {
            Some(done) => {
                let units = cut.units(done.step - 1, &mut order);
                run.make_up(&done, &units, data, observer).map_err(Failure::After)
            }
            None => {
                if !run.is_on_trial()
                    && let Some(candidate) = observer.candidate()?
                {
                    let change = run.swap(candidate);
                    run.tell(observer, change)?;
                }
                let units = cut.units(run.state.step, &mut order);
                let last = run.state.step + 1 == planned;
                let done = run.try_step(&cut.passes(&units, &run.state.cut)).and_then(|done| {
                    if last {
                        run.look(&units)?;
                    }
                    Ok(done)
                });
                done.map_err(Failure::Step)
                    .and_then(|done| run.settle(done, &cut, &units, data, observer).map_err(Failure::After))
            }
        };
        let ends = match settled {
            Ok(ends) => ends,
            // What an observer fails with is not the plan's fault.
            Err(failure) if run.is_on_trial() && failure.is_of_the_plan() => {
                run.take_back(observer, &failure.error())?;
                continue;
            }
            Err(failure) => match run.rewind(observer, failure.error())? {
                None => continue,
                Some(error) => return Err(run.end(error)),
            },
        };
        if ends {
            break;
        }
    }
    run.finish(data, observer)
}

/// What failed of a step.
enum Failure {
    /// The step itself.
    Step(anyhow::Error),
    /// What followed it.
    After(anyhow::Error),
}

impl Failure {
    fn is_of_the_plan(&self) -> bool {
        match self {
            Self::Step(_) => true,
            Self::After(error) => error.is::<Unusable>(),
        }
    }

    fn error(self) -> anyhow::Error {
        let (Self::Step(error) | Self::After(error)) = self;
        error
    }
}

impl Run<'_> {
    /// What follows a step: it is reported, rows are evaluated, directives are followed, the state is saved. Returns whether the run
    /// ends here.
    fn settle(
        &mut self,
        mut done: StepReport,
        cut: &Steps<'_>,
        units: &[Unit<'_>],
        data: &Data<'_>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let planned = self.state.report.planned_steps;
        done.epoch = cut.epochs(done.step);
        self.state.report.steps.push(done);
        let control = observer.on_step(&done, planned)?;
        let control = self.follow_up(&done, control, units, data, observer)?;
        let stops = control == Control::Stop;
        self.state.report.interrupted = false;
        if stops && done.step < planned {
            self.end_by(observer);
        }
        let saves = observer.is_due(&self.state);
        if (saves || self.state.report.interrupted) && done.step < planned {
            self.look(units)?;
        }
        if saves {
            observer.save(&self.state)?;
        }
        Ok(stops)
    }

    /// Notes that an observer ends the run. One that nobody interrupts has come to its end: what is saved of it now does not go on.
    fn end_by(&mut self, observer: &mut dyn Observer) {
        let State { report, owes, .. } = &mut self.state;
        report.interrupted = true;
        if !observer.is_cancelled() {
            let reason = || observer.reason().unwrap_or_else(|| "its observer has ended it".to_owned());
            report.stopped.get_or_insert_with(reason);
            *owes = false;
        }
    }

    /// What is owed of a step that the run was ended after. Returns whether the run ends here again.
    fn make_up(
        &mut self,
        done: &StepReport,
        units: &[Unit<'_>],
        data: &Data<'_>,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let stops = self.follow_up(done, Control::Continue, units, data, observer)? == Control::Stop;
        if stops {
            self.end_by(observer);
        }
        Ok(stops)
    }

    /// The evaluation after a step, if it is due, and what else follows from the step. Of a run that is ended when an evaluation is due,
    /// all of that is owed, and is made up for when the run goes on: somebody waits.
    fn follow_up(
        &mut self,
        done: &StepReport,
        mut control: Control,
        units: &[Unit<'_>],
        data: &Data<'_>,
        observer: &mut dyn Observer,
    ) -> Result<Control> {
        let planned = self.state.report.planned_steps;
        let is_due = self.config.eval_steps.is_some_and(|every| done.step.is_multiple_of(every));
        self.state.owes = false;
        if is_due && done.step < planned && !data.held_out.is_empty() {
            self.scale_by(control)?;
            if control == Control::Stop || observer.is_cancelled() {
                self.state.owes = true;
                return Ok(Control::Stop);
            }
            match self.evaluate(data, observer, done.epoch) {
                Err(error) => {
                    // What the update did is told first, if that is why.
                    self.look(units)?;
                    return Err(Unusable::held_out(done.step, &error).into());
                }
                Ok(None) => {}
                Ok(Some(report)) => match observer.on_eval(&report, planned)? {
                    Control::Continue => {}
                    other => control = other,
                },
            }
        }
        self.scale_by(control)?;
        for directive in observer.directives(done, planned)? {
            if let Some(change) = self.direct(directive) {
                self.tell(observer, change)?;
            }
        }
        if let Some(change) = self.passed() {
            self.tell(observer, change)?;
        }
        self.lower_if_asked(units, data, observer)?;
        if !self.is_on_trial() {
            let losses = self.state.report.steps.iter().map(|step| step.loss);
            let unit = self.objective.loss_unit();
            if let Some(what) = self.state.watchdog.look(losses, unit, self.config.shuffle) {
                return Err(Unusable::diverged(done.step, &what).into());
            }
        }
        if let (Some(patience), Some(best)) = (self.config.early_stopping_patience, self.state.best)
            && best.since >= patience
            && self.state.report.stopped.is_none()
        {
            let loss = best.eval_loss;
            self.state.report.stopped = Some(format!(
                "the held-out loss has not fallen below {loss:.4}, of step {}, in {patience} evaluations",
                best.step
            ));
        }
        Ok(control)
    }

    /// Takes less memory from the next step on, if the observer wants that.
    fn lower_if_asked(&mut self, units: &[Unit<'_>], data: &Data<'_>, observer: &mut dyn Observer) -> Result<()> {
        let planned = self.state.report.planned_steps;
        let Some(reason) = observer.lowers().filter(|_| self.state.step < planned) else { return Ok(()) };
        let longest = data.units.iter().map(Unit::rows).max().unwrap_or(1);
        // The most that a pass has now: whole batches may be larger than the bound, and a whole step smaller.
        let bound = match self.config.packing || self.state.cut.is_bounded {
            true => self.state.cut.pass_rows,
            false => self.config.batch_size.saturating_mul(longest),
        };
        let fullest = bound.min(units.iter().map(Unit::rows).sum());
        let Some(passes) = self.state.lower_passes(fullest, longest) else {
            observer.cannot_lower();
            return Ok(());
        };
        let event = self.state.lower(passes, reason);
        // Its buffers are as large as the largest pass so far.
        self.backend = trainer(self.model, Some(self.state.adaptation()), self.config.compute);
        observer.changed(&event, self.state.adaptation())
    }

    /// Scales the learning rates from now on, if that is what the observer wants.
    fn scale_by(&mut self, control: Control) -> Result<()> {
        if let Control::ScaleLearningRate(scale) = control {
            ensure!(scale.is_finite() && scale >= 0.0, "the learning rate cannot be scaled by {scale}");
            self.state.script_scale = scale;
        }
        Ok(())
    }

    /// Measures the held-out rows and reports that; `None`: nobody waits for it.
    fn evaluate(&mut self, data: &Data<'_>, observer: &mut dyn Observer, epoch: f64) -> Result<Option<EvalReport>> {
        if data.held_out.is_empty() || observer.is_cancelled() {
            return Ok(None);
        }
        let all = data.held_out.len();
        let progress = |done| observer.evaluating(done, all);
        // In f32 whatever the training computes in, so that runs can be compared.
        let adaptation = Some(&**self.state.adaptation());
        let evaluation =
            evaluate_units(self.model, adaptation, &data.held_out, self.objective, Compute::F32, progress)?;
        let state = &mut self.state;
        let lowest = state.report.evaluations.last().map_or(evaluation.loss, |last| last.lowest.min(evaluation.loss));
        let report = EvalReport { step: state.step, epoch, lowest, evaluation };
        state.report.evaluations.push(report);
        observer.evaluated(&report);
        if state.step > 0 {
            let eval_loss = evaluation.loss;
            match &mut state.best {
                Some(best) if best.eval_loss <= eval_loss => best.since += 1,
                best => *best = Some(Best { step: state.step, eval_loss, since: 0 }),
            }
        }
        Ok(Some(report))
    }

    /// Ends a run after its last step: evaluates what the result is, which may be an earlier one with a lower held-out loss.
    fn finish(mut self, data: &Data<'_>, observer: &mut dyn Observer) -> Result<State> {
        if observer.is_cancelled() {
            return Ok(self.state);
        }
        let epoch = self.state.report.steps.last().map_or(0.0, |step| step.epoch);
        let is_measured = self.state.report.evaluations.last().is_some_and(|last| last.step == self.state.step);
        if !is_measured && let Err(error) = self.evaluate(data, observer, epoch) {
            let reason = format!("held-out rows, after the training: {error:#}");
            if let Some(best) = self.state.best {
                self.fall_back(observer, best.step)?;
            }
            return Err(Broken { reason, state: Box::new(self.state) }.into());
        }
        let best = self.state.best.filter(|best| self.config.load_best_model_at_end && best.step < self.state.step);
        // As it was saved when it was the best; where it was not, the last one is what there is.
        if let Some(best) = best
            && let Some(mut state) = observer.saved(best.step)?.filter(|state| state.step == best.step)
        {
            state.report = std::mem::take(&mut self.state.report);
            state.report.kept_step = Some(best.step);
            return Ok(state);
        }
        Ok(self.state)
    }

    /// Takes the plan on trial back, for an error of its.
    fn take_back(&mut self, observer: &mut dyn Observer, error: &anyhow::Error) -> Result<()> {
        let change = self.roll_back(format!("{error:#}"));
        let step = self.state.step;
        self.state.report.steps.truncate(step as usize);
        self.state.report.evaluations.retain(|report| report.step <= step);
        self.tell(observer, change)
    }

    /// Goes back to the last state that was good, with half the rate; returns the error where that is not possible, with what to change.
    fn rewind(&mut self, observer: &mut dyn Observer, error: anyhow::Error) -> Result<Option<anyhow::Error>> {
        let Some(Unusable { reason, step, good, diverged, .. }) = error.downcast_ref::<Unusable>() else {
            return Ok(Some(error));
        };
        // A base that is gone will not come back, and a training that is no worse than its observer thinks is its own.
        let Some(good) = *good else { return Ok(Some(error)) };
        let failed = *step;
        let state = match self.state.watchdog.recurs(failed) {
            true => None,
            // Of another plan than the present one the plugin beside the run is not.
            false => observer.saved(good)?.filter(|state| !state.is_on_trial() && self.has_plan_of(state)),
        };
        let Some(mut state) = state else {
            if *diverged {
                self.fall_back(observer, good)?;
            }
            return Ok(Some(error));
        };
        let rate_scale = 0.5 * self.state.watchdog.rate_scale.min(state.watchdog.rate_scale);
        (state.watchdog.rate_scale, state.watchdog.rewound_at) = (rate_scale, Some(failed));
        let change = Change::Rewound { from: failed, reason: reason.clone(), rate_scale };
        // Memory is as short as it was.
        state.cut = self.state.cut.clone();
        self.replace(state);
        self.tell(observer, change)?;
        Ok(None)
    }

    /// Takes the parameters of a state that was saved after this step or before it, if there is one, for those of a run that ends.
    fn fall_back(&mut self, observer: &mut dyn Observer, step: u64) -> Result<()> {
        if let Some(state) = observer.saved(step)?.filter(|state| state.step > 0) {
            let events = std::mem::take(&mut self.state.report.events);
            self.replace(state);
            self.state.report.events = events;
            observer.changed(&RunEvent { step: self.state.step, change: Change::FellBack }, self.state.adaptation())?;
        }
        Ok(())
    }

    /// Whether a state is of the plan that is trained now, but for the scalars that its strategy sets.
    fn has_plan_of(&self, state: &State) -> bool {
        let (ours, theirs) = (&self.state.adaptation().plan, &state.adaptation().plan);
        *ours == Plan { scalars: ours.scalars.clone(), ..theirs.clone() }
    }

    /// Reports a change.
    fn tell(&mut self, observer: &mut dyn Observer, change: Change) -> Result<()> {
        let event = RunEvent { step: self.state.step, change };
        observer.changed(&event, self.state.adaptation())?;
        self.state.report.events.push(event);
        Ok(())
    }
}

/// How the units of a run are cut into steps and passes: a function of the configuration and the step's number.
struct Steps<'a> {
    data: &'a Data<'a>,
    config: &'a TrainConfig,
    per_step: usize,
    an_epoch: u64,
}

/// The order of an epoch, which all its steps share.
#[derive(Default)]
struct Order {
    epoch: Option<u64>,
    units: Vec<u32>,
}

impl<'a> Steps<'a> {
    fn new(data: &'a Data<'a>, config: &'a TrainConfig) -> Self {
        let per_step = config.per_step().min(data.units.len());
        Self { data, config, per_step, an_epoch: data.units.len().div_ceil(per_step) as u64 }
    }

    /// The units of the step with this number, from 0.
    fn units(&self, step: u64, order: &mut Order) -> Vec<Unit<'a>> {
        let (count, per_step) = (self.data.units.len(), self.per_step);
        let (epoch, place) = (step / self.an_epoch, (step % self.an_epoch) as usize);
        if order.epoch != Some(epoch) {
            order.epoch = Some(epoch);
            order.units = epoch_order(count, self.config.seed, epoch, self.config.shuffle);
        }
        let units = &order.units[place * per_step..count.min((place + 1) * per_step)];
        units.iter().map(|unit| self.data.units[*unit as usize].clone()).collect()
    }

    /// The passes of a step.
    fn passes(&self, units: &[Unit<'_>], cut: &Cut) -> Vec<Batch> {
        let batches = units.chunks(self.config.batch_size);
        match (self.config.packing, cut.is_bounded) {
            (true, _) => Batch::packed(units, cut.pass_rows),
            (false, false) => batches.map(Batch::of_units).collect(),
            (false, true) => batches.flat_map(|batch| Batch::packed(batch, cut.pass_rows)).collect(),
        }
    }

    /// Epochs that so many steps are.
    fn epochs(&self, steps: u64) -> f64 {
        steps as f64 / self.an_epoch as f64
    }
}
