//! Another plan for a running training, and what a strategy directs between steps.
//!
//! A swap makes a new generation beside the present one: parameters of the same tensor name and shape are copied with their
//! moments, the others get their first values. The old generation stays aside, untouched, while the new one is on trial;
//! rolling back puts it in place again, with the step's number, so that the steps since are done anew as if nothing had
//! been. Order and dropout are functions of the seed and that number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Var;
use homeroom_abi::codec::Codec;
use homeroom_abi::plan::{Migrate, ParamSpec, Plan};
use homeroom_abi::step::Directive;
use serde::{Deserialize, Serialize};

use super::report::StepReport;
use super::run::Run;
use super::state::{Best, Generation};
use crate::adapt::adaptation::{Adaptation, first_values, var};
use crate::run::backends::trainer;
use crate::run::batch::Batch;

/// Steps that a new plan is on trial for at least: it is also until each of its parameters has had a gradient.
const TRIAL_STEPS: u64 = 3;
/// A loss on trial is bad when it is so many times the mean before,
const BAD_LOSS: f64 = 3.0;
/// and above this, in nats: of losses near zero one is soon three times another.
const BAD_LOSS_MIN: f64 = 0.5;
/// Steps in that mean.
const MEAN_STEPS: usize = 16;

/// A plan for a running training to go on with.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What tells it from others, such as the digest of the plugin.
    pub id: String,
    /// The plan.
    pub plan: Plan,
    /// Whether its strategy directs the run between steps. If not, what was directed before ends.
    pub directs: bool,
}

/// What changed in a run, and after which step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunEvent {
    /// Steps that were done by then; after a rollback, those that still are.
    pub step: u64,
    /// What changed.
    #[serde(flatten)]
    pub change: Change,
}

/// What changed in a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Change {
    /// It goes on with another plan, which is on trial.
    Swapped(Swap),
    /// It does not: the plan was refused.
    Refused {
        /// The candidate's.
        id: String,
        /// Why.
        reason: String,
    },
    /// The plan on trial has done well.
    Passed {
        /// The candidate's.
        id: String,
    },
    /// The plan on trial was taken back, with all that was learned under it.
    RolledBack {
        /// The candidate's.
        id: String,
        /// Why.
        reason: String,
    },
    /// A strategy's directive was followed.
    Directed {
        /// The directive.
        directive: Directive,
    },
    /// The run was taken back to an earlier state, as its numbers were no longer good, and goes on with a lower rate.
    Rewound {
        /// The step that was not good.
        from: u64,
        /// Why.
        reason: String,
        /// What the learning rates are multiplied by from now on.
        rate_scale: f64,
    },
    /// Memory is short: passes are smaller from now on, or keep less. A step stays what it was, to rounding.
    Lowered {
        /// Rows of a pass from now on.
        pass_rows: usize,
        /// Whether only the inputs of blocks are kept from now on.
        gradient_checkpointing: bool,
        /// Why.
        reason: String,
    },
    /// A run that ends takes the parameters of an earlier state, as the last ones are no longer good.
    FellBack,
    /// A strategy's directive cannot be followed.
    Undirected {
        /// The directive.
        directive: Directive,
        /// Why.
        reason: String,
    },
}

/// A swap: how many parameters went which way, and the names of some.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Swap {
    /// The candidate's.
    pub id: String,
    /// Parameters that kept values and moments.
    pub kept: usize,
    /// Tensors with first values.
    pub added: Vec<String>,
    /// Tensors of another shape, their values taken over and their moments forgotten.
    pub migrated: Vec<String>,
    /// Tensors that are gone.
    pub dropped: Vec<String>,
    /// What had been directed and holds no longer, in words.
    pub ended: Vec<String>,
}

/// The generation before, while its successor is on trial.
pub(super) struct Trial {
    pub(super) id: String,
    pub(super) before: Generation,
    /// Steps that were done by then.
    pub(super) step: u64,
    pub(super) script_scale: f64,
    /// Mean loss of the steps before.
    pub(super) losses_mean: Option<f64>,
    /// How many losses were kept by then.
    pub(super) losses_kept: usize,
    /// The best evaluation by then.
    pub(super) best: Option<Best>,
}

impl Trial {
    /// A copy that shares no parameter with it.
    pub(super) fn copy(&self) -> Result<Self> {
        Ok(Self { id: self.id.clone(), before: self.before.copy()?, ..*self })
    }
}

impl Run<'_> {
    /// Whether a plan is on trial.
    pub fn is_on_trial(&self) -> bool {
        self.state.is_on_trial()
    }

    /// What is trained.
    pub fn adaptation(&self) -> &Arc<Adaptation> {
        self.state.adaptation()
    }

    /// Goes on with another plan, on trial; or refuses it and goes on as before.
    pub fn swap(&mut self, candidate: Candidate) -> Change {
        let Candidate { id, plan, directs } = candidate;
        let (generation, swap) = match self.successor(plan, directs) {
            Ok(successor) => successor,
            Err(error) => return Change::Refused { id, reason: format!("{error:#}") },
        };
        self.backend = trainer(self.model, Some(&generation.adaptation), self.config.compute);
        let state = &mut self.state;
        let before = std::mem::replace(&mut state.generation, generation);
        let mean = state.losses.iter().sum::<f64>() / state.losses.len() as f64;
        let losses_mean = (!state.losses.is_empty()).then_some(mean);
        let (step, script_scale) = (state.step, state.script_scale);
        let (losses_kept, best) = (state.losses.len(), state.best);
        state.trial = Some(Trial { id: id.clone(), before, step, script_scale, losses_mean, losses_kept, best });
        Change::Swapped(Swap { id, ..swap })
    }

    /// Takes the plan on trial back, and all steps since.
    pub(super) fn roll_back(&mut self, reason: String) -> Change {
        let state = &mut self.state;
        let trial = state.trial.take().expect("the caller saw that a plan is on trial");
        state.generation = trial.before;
        state.losses.truncate(trial.losses_kept);
        (state.step, state.script_scale, state.best) = (trial.step, trial.script_scale, trial.best);
        self.backend = trainer(self.model, Some(self.state.adaptation()), self.config.compute);
        Change::RolledBack { id: trial.id, reason }
    }

    /// [`Run::step`], which on trial also fails when the loss is far above what it was.
    pub(super) fn try_step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        let done = self.step(batches)?;
        let state = &mut self.state;
        if let Some(mean) = state.trial.as_ref().and_then(|trial| trial.losses_mean) {
            ensure!(
                done.loss <= (BAD_LOSS * mean).max(BAD_LOSS_MIN),
                "step {}: the loss is {:.3}, it was {mean:.3} on average",
                done.step,
                done.loss
            );
        }
        if state.losses.len() == MEAN_STEPS && state.trial.is_none() {
            state.losses.pop_front();
        }
        state.losses.push_back(done.loss);
        Ok(done)
    }

    /// Ends the trial when it has lasted long enough.
    pub(super) fn passed(&mut self) -> Option<Change> {
        let state = &mut self.state;
        let trial = state.trial.as_ref()?;
        let Generation { optimizer, idle_updates, .. } = &state.generation;
        let mut trained = optimizer.states.iter().filter(|state| !state.frozen);
        if state.step < trial.step + TRIAL_STEPS || trained.any(|state| idle_updates[state.param].is_some()) {
            return None;
        }
        let id = state.trial.take()?.id;
        state.losses.drain(..state.losses.len().saturating_sub(MEAN_STEPS));
        Some(Change::Passed { id })
    }

    /// Follows a directive; `None`: all is as it says already.
    pub fn direct(&mut self, directive: Directive) -> Option<Change> {
        match self.follow(&directive) {
            Ok(false) => None,
            Ok(true) => Some(Change::Directed { directive }),
            Err(error) => Some(Change::Undirected { directive, reason: format!("{error:#}") }),
        }
    }

    fn follow(&mut self, directive: &Directive) -> Result<bool> {
        let Generation { adaptation, optimizer, scale, set_scalars, .. } = &mut self.state.generation;
        match directive {
            Directive::LearningRateScale(wanted) => {
                ensure!(wanted.is_finite() && *wanted >= 0.0, "it is not a number from 0");
                Ok(std::mem::replace(scale, *wanted) != *wanted)
            }
            Directive::Scalar { name, value } => {
                ensure!(value.is_finite(), "it is not a finite number");
                let known = *adaptation.plan.scalars.get(name).context("the plan has no such scalar")?;
                if known == *value {
                    return Ok(false);
                }
                set_scalars.entry(name.clone()).or_insert(known);
                Arc::make_mut(adaptation).plan.scalars.insert(name.clone(), *value);
                Ok(true)
            }
            Directive::Freeze(pattern) | Directive::Unfreeze(pattern) | Directive::ResetMoments(pattern) => {
                let (mut found, mut changes) = (false, false);
                let updates = optimizer.updates;
                for state in &mut optimizer.states {
                    if !Directive::matches(pattern, &adaptation.params[state.param].spec.tensor) {
                        continue;
                    }
                    found = true;
                    changes |= match directive {
                        Directive::ResetMoments(_) => {
                            state.reset(updates);
                            true
                        }
                        _ => {
                            let freeze = matches!(directive, Directive::Freeze(_));
                            std::mem::replace(&mut state.frozen, freeze) != freeze
                        }
                    };
                }
                ensure!(found, "no trained parameter has such a name");
                Ok(changes)
            }
        }
    }

    /// The generation that goes on with a plan. `directs`: what was directed before still holds.
    fn successor(&self, mut plan: Plan, directs: bool) -> Result<(Generation, Swap)> {
        let Generation { adaptation: old, optimizer, idle_updates, scale, set_scalars } = &self.state.generation;
        check_codecs(&old.plan, &plan)?;
        let mut swap = Swap::default();
        // A scalar that the strategy has set stays so, unless the plan gives it another value than before.
        let mut still_set = BTreeMap::new();
        for (name, planned) in set_scalars {
            if !directs {
                swap.ended.push(format!("scalar {name} {}", old.plan.scalars[name]));
            } else if plan.scalars.get(name) == Some(planned) {
                plan.scalars.insert(name.clone(), old.plan.scalars[name]);
                still_set.insert(name.clone(), *planned);
            }
        }
        let by_name: HashMap<&str, usize> =
            old.params.iter().enumerate().map(|(index, param)| (param.spec.tensor.as_str(), index)).collect();
        let mut misfits = Vec::new();
        let mut next = Adaptation::with_values(self.model, plan, |spec, module| {
            let fresh = || first_values(spec, module, self.model, self.config.seed);
            let Some(&index) = by_name.get(spec.tensor.as_str()) else {
                swap.added.push(spec.tensor.clone());
                return var(fresh()?, spec);
            };
            let param = &old.params[index];
            if param.spec.shape == spec.shape {
                swap.kept += 1;
                // A copy, so that the old one is there to go back to.
                return Ok(Var::from_tensor(&param.var.as_detached_tensor().copy()?)?);
            }
            match migrated(&param.var, &param.spec.shape, spec, fresh) {
                Ok(values) => {
                    swap.migrated.push(spec.tensor.clone());
                    var(values, spec)
                }
                Err(error) => {
                    misfits.push(format!("{error:#}"));
                    var(vec![0.0; spec.shape.iter().product()], spec)
                }
            }
        })?;
        if let Some(first) = misfits.first() {
            let others = match misfits.len() - 1 {
                0 => String::new(),
                others => format!("; and {others} more"),
            };
            bail!("{first}{others}");
        }
        // A dtype that is not f32 is that of gradient checks, which swap nothing.
        for param in &mut next.params {
            ensure!(param.var.dtype() == candle_core::DType::F32, "`{}` is not f32", param.spec.tensor);
        }
        let names: HashSet<&str> = next.params.iter().map(|param| param.spec.tensor.as_str()).collect();
        swap.dropped = by_name.keys().filter(|name| !names.contains(*name)).map(|name| (*name).to_owned()).collect();
        swap.dropped.sort();
        let known = |param: usize| {
            let spec = &next.params[param].spec;
            let index = *by_name.get(spec.tensor.as_str())?;
            (old.params[index].spec.shape == spec.shape && old.params[index].spec.trainable).then_some(index)
        };
        let mut optimizer = optimizer.succeed(&next, known);
        let mut scale = *scale;
        if !directs {
            let frozen = optimizer.states.iter_mut().filter(|state| state.frozen);
            let thawed = frozen.map(|state| state.frozen = false).count();
            if thawed > 0 {
                swap.ended.push(format!("freeze of {thawed} parameters"));
            }
            if std::mem::replace(&mut scale, 1.0) != 1.0 {
                swap.ended.push("scale of the learning rate".to_owned());
            }
        }
        let idle = |param| known(param).map_or(Some(0), |index| idle_updates[index]);
        let idle_updates = (0..next.params.len()).map(idle).collect();
        let adaptation = Arc::new(next);
        Ok((Generation { adaptation, optimizer, idle_updates, scale, set_scalars: still_set }, swap))
    }
}

/// Refuses a plan that wants frozen weights stored otherwise: they are in use.
fn check_codecs(old: &Plan, new: &Plan) -> Result<()> {
    let (before, after) = (stored(old), stored(new));
    for path in before.keys().chain(after.keys()) {
        let (before, after) = (before.get(path), after.get(path));
        let name =
            |stored: Option<&(&str, Option<&Codec>)>| stored.map_or("stored as it is", |(name, _)| *name).to_owned();
        ensure!(
            before == after,
            "{path}: its weight would change from `{}` to `{}`; restart the training for that",
            name(before),
            name(after)
        );
    }
    Ok(())
}

/// Name of the codec that each module's weight is to be stored by, and the codec where it is data.
fn stored(plan: &Plan) -> BTreeMap<&str, (&str, Option<&Codec>)> {
    let coded = plan.stored.iter().filter_map(|(path, codec)| {
        let codec = plan.codecs.get(*codec)?;
        Some((path.as_str(), (codec.name.as_str(), Some(codec))))
    });
    let native = plan.stored_natively.iter().map(|(path, name)| (path.as_str(), (name.as_str(), None)));
    coded.chain(native).collect()
}

/// The values of a parameter in another shape, if the plan says how.
fn migrated(values: &Var, from: &[usize], spec: &ParamSpec, fresh: impl Fn() -> Result<Vec<f32>>) -> Result<Vec<f32>> {
    let (name, to) = (&spec.tensor, &spec.shape);
    let Some(how) = spec.migrate else {
        bail!(
            "`{name}` would change from {from:?} to {to:?}; say in the plan how it migrates, or restart the training"
        );
    };
    let larger = matches!(how, Migrate::PadZero | Migrate::PadInit);
    let fits = |(from, to): (&usize, &usize)| if larger { from <= to } else { from >= to };
    ensure!(
        from.len() == to.len() && from.iter().zip(to).all(fits),
        "`{name}` cannot go from {from:?} to {to:?} by `{how:?}`"
    );
    let mut result = match how {
        Migrate::PadInit => fresh()?,
        _ => vec![0.0; to.iter().product()],
    };
    let old = values.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
    // Every place that both shapes have.
    let common: Vec<usize> = from.iter().zip(to).map(|(from, to)| *from.min(to)).collect();
    let count: usize = common.iter().product();
    for number in 0..count {
        let (mut rest, mut source, mut target, mut from_stride, mut to_stride) = (number, 0, 0, 1, 1);
        for axis in (0..common.len()).rev() {
            let at = rest % common[axis];
            rest /= common[axis];
            source += at * from_stride;
            target += at * to_stride;
            from_stride *= from[axis];
            to_stride *= to[axis];
        }
        result[target] = old[source];
    }
    Ok(result)
}
