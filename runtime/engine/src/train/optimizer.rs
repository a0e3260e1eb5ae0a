//! AdamW over our own state, so that a run can be saved and taken up again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use candle_core::{CpuStorage, Device, Error, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::adapt::adaptation::Adaptation;
use crate::run::gradients::Gradients;

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, of parameters whose group does not say otherwise.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW: Loshchilov & Hutter 2017, <https://arxiv.org/abs/1711.05101>, algorithm 2, in PyTorch's form.
#[derive(Clone)]
pub struct AdamW {
    config: AdamWConfig,
    /// Updates made.
    pub updates: u64,
    /// One state a trainable parameter.
    pub states: Vec<State>,
    /// Whether parameters are kept as they were before the last update.
    keeps: bool,
}

/// Bytes of parameters that are always kept as they were before the last update. More are kept while they take a quarter of what the
/// base would as f32: a copy of every weight of a model is memory that its user has not reckoned with.
const KEPT_BYTES: usize = 64 << 20;

/// The optimizer's state of one parameter.
#[derive(Clone)]
pub struct State {
    /// Index into [`Adaptation::params`].
    pub param: usize,
    /// First moment, laid out as the parameter.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
    /// Updates of the run that were not this parameter's: those before it was new or its moments were reset, and those that
    /// found it frozen. Bias correction counts the others.
    pub missed: u64,
    /// Whether it is left as it is, for now.
    pub frozen: bool,
    /// The parameter before the last update, where that is kept; empty: it was not changed by it.
    before: Vec<f32>,
    learning_rate_scale: f64,
    weight_decay: f64,
}

impl State {
    /// Forgets both moments, as if the next update were the first. `updates`: those that were made.
    pub(crate) fn reset(&mut self, updates: u64) {
        self.m.fill(0.0);
        self.v.fill(0.0);
        self.missed = updates;
    }
}

impl AdamW {
    /// No updates yet.
    pub fn new(adaptation: &Adaptation, config: AdamWConfig) -> Self {
        let trainable = adaptation.params.iter().enumerate().filter(|(_, param)| param.spec.trainable);
        let states = trainable.map(|(index, param)| {
            let count = param.spec.shape.iter().product();
            let group = param.spec.group.as_ref().and_then(|group| adaptation.plan.groups.get(group));
            State {
                param: index,
                m: vec![0.0; count],
                v: vec![0.0; count],
                missed: 0,
                frozen: false,
                before: Vec::new(),
                learning_rate_scale: group.map_or(1.0, |group| group.learning_rate_scale),
                weight_decay: group.and_then(|group| group.weight_decay).unwrap_or(config.weight_decay),
            }
        });
        Self { config, updates: 0, states: states.collect(), keeps: false }
    }

    /// Keeps parameters as they were before the last update, so that [`AdamW::undo`] can take it back, if they are few enough beside
    /// a base of so many values.
    pub fn keeping(mut self, base_values: usize) -> Self {
        let values: usize = self.states.iter().map(|state| state.m.len()).sum();
        self.keeps = keeps(values, base_values);
        self
    }

    /// Whether parameters are kept as they were before the last update, and none was made yet since the state was read.
    pub(super) fn is_restored(&self) -> bool {
        let is_trained = self.states.iter().any(|state| !state.frozen);
        self.keeps && self.updates > 0 && is_trained && self.states.iter().all(|state| state.before.is_empty())
    }

    /// Gives all parameters the values that they had before the last update; false: those were not kept, and nothing changes. The
    /// moments are not those of before: no further update may follow.
    ///
    /// # Errors
    /// When a value cannot be set.
    pub fn undo(&mut self, adaptation: &Adaptation) -> Result<bool> {
        if !self.keeps {
            return Ok(false);
        }
        for state in &mut self.states {
            if !state.before.is_empty() {
                let param = &adaptation.params[state.param];
                param.var.set(&Tensor::from_vec(
                    std::mem::take(&mut state.before),
                    param.var.shape(),
                    &Device::Cpu,
                )?)?;
            }
        }
        Ok(true)
    }

    /// Goes on for another plan of the same run: updates are counted on, and `known` says of a parameter which state it had
    /// before, if its moments are to be kept.
    pub(crate) fn succeed(&self, adaptation: &Adaptation, known: impl Fn(usize) -> Option<usize>) -> Self {
        let mut next = Self { keeps: self.keeps, ..Self::new(adaptation, self.config) };
        next.updates = self.updates;
        for state in &mut next.states {
            match known(state.param).and_then(|param| self.states.iter().find(|state| state.param == param)) {
                Some(old) => {
                    (state.m, state.v) = (old.m.clone(), old.v.clone());
                    (state.missed, state.frozen) = (old.missed, old.frozen);
                }
                None => state.missed = self.updates,
            }
        }
        next
    }

    /// One update of every trainable parameter that is not frozen. `gradient_scale` multiplies the gradients, as clipping does.
    ///
    /// Returns whether every value that it made, of parameters and moments, is finite.
    ///
    /// # Errors
    /// When a parameter has no gradient; the message names it.
    pub fn step(
        &mut self,
        adaptation: &Adaptation,
        gradients: &Gradients,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<bool> {
        self.updates += 1;
        let AdamWConfig { beta1, beta2, epsilon, .. } = self.config;
        let (updates, keeps) = (self.updates, self.keeps);
        let finite = self.states.par_iter_mut().map(|state| {
            if state.frozen {
                state.missed += 1;
                state.before.clear();
                return Ok(true);
            }
            let exponent = (updates - state.missed) as f64;
            let (correction1, correction2) = (1.0 - beta1.powf(exponent), 1.0 - beta2.powf(exponent));
            let param = &adaptation.params[state.param];
            let gradient = gradients.get(state.param);
            let gradient = gradient.with_context(|| format!("parameter `{}` has no gradient", param.spec.tensor))?;
            let rate = learning_rate * state.learning_rate_scale;
            let update = Update {
                beta2: beta2 as f32,
                // Subtracted in f64: in f32, 1 - 0.999 is off by 5e-5 of itself.
                one_minus_beta1: (1.0 - beta1) as f32,
                one_minus_beta2: (1.0 - beta2) as f32,
                gradient_scale: gradient_scale as f32,
                decay: (1.0 - rate * state.weight_decay) as f32,
                step_size: (rate / correction1) as f32,
                root_correction2: correction2.sqrt() as f32,
                epsilon: epsilon as f32,
            };
            if keeps {
                state.before.resize(state.m.len(), 0.0);
            }
            apply(&param.var, gradient, update, Moments { m: &mut state.m, v: &mut state.v, before: &mut state.before })
        });
        finite.try_reduce(|| true, |a, b| Ok(a && b))
    }
}

/// Whether so many parameters are kept as they were before the last update, beside a base of so many values.
pub(crate) fn keeps(values: usize, base_values: usize) -> bool {
    values <= (KEPT_BYTES / 4).max(base_values / 4)
}

#[derive(Clone, Copy)]
struct Update {
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    gradient_scale: f32,
    decay: f32,
    step_size: f32,
    root_correction2: f32,
    epsilon: f32,
}

/// What an update changes beside the parameter.
struct Moments<'a> {
    m: &'a mut [f32],
    v: &'a mut [f32],
    /// Gets the parameter's values as they were, unless it is empty.
    before: &'a mut [f32],
}

/// Updates a parameter in place, on candle's storage. Returns whether all values that it made are finite.
fn apply(var: &Var, gradient: &Tensor, update: Update, moments: Moments<'_>) -> Result<bool> {
    let op = InPlace { update, moments: Mutex::new(moments), finite: AtomicBool::new(true) };
    var.as_tensor().inplace_op2(&gradient.contiguous()?, &op)?;
    Ok(op.finite.into_inner())
}

struct InPlace<'a> {
    update: Update,
    moments: Mutex<Moments<'a>>,
    finite: AtomicBool,
}

impl InplaceOp2 for InPlace<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        let contiguous = |layout: &Layout| {
            layout.contiguous_offsets().ok_or_else(|| Error::Msg("adamw: a tensor is not contiguous".to_owned()))
        };
        let ((start, end), (g_start, g_end)) = (contiguous(param_layout)?, contiguous(gradient_layout)?);
        let (CpuStorage::F32(param), CpuStorage::F32(gradient)) = (param, gradient) else {
            return Err(Error::Msg("adamw: parameters and gradients are f32".to_owned()));
        };
        let Update { beta2, one_minus_beta1, one_minus_beta2, .. } = self.update;
        let Update { gradient_scale, decay, step_size, root_correction2, epsilon, .. } = self.update;
        let mut moments = self.moments.lock().map_err(|_| Error::Msg("adamw: a thread panicked".to_owned()))?;
        let Moments { m, v, before } = &mut *moments;
        const CHUNK: usize = 16_384;
        let parts = param[start..end]
            .par_chunks_mut(CHUNK)
            .zip(gradient[g_start..g_end].par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)));
        let part = |param: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]| {
            // Of one length, as the compiler then sees, so that it takes several values at once.
            let count = param.len();
            let (gradient, m, v) = (&gradient[..count], &mut m[..count], &mut v[..count]);
            let mut spoilt = false;
            for i in 0..count {
                let g = gradient[i] * gradient_scale;
                m[i] += (g - m[i]) * one_minus_beta1;
                v[i] = v[i] * beta2 + one_minus_beta2 * g * g;
                let denominator = v[i].sqrt() / root_correction2 + epsilon;
                param[i] = param[i] * decay - step_size * (m[i] / denominator);
                spoilt |= !param[i].is_finite() | !v[i].is_finite();
            }
            if spoilt {
                self.finite.store(false, Ordering::Relaxed);
            }
        };
        match before.is_empty() {
            true => parts.for_each(|((param, gradient), (m, v))| part(param, gradient, m, v)),
            false => parts.zip(before.par_chunks_mut(CHUNK)).for_each(|(((param, gradient), (m, v)), before)| {
                before.copy_from_slice(param);
                part(param, gradient, m, v);
            }),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A parameter at infinity, and a second moment there, which would keep its parameter from ever moving again.
    #[test]
    fn an_update_beyond_all_numbers_is_told_and_what_was_before_is_kept() -> Result<()> {
        let start = [1.0_f32, -2.0, 3.3e38];
        for (gradient, step_size, finite) in
            [([0.5_f32, 0.5, 0.5], 0.1_f32, true), ([0.5, 0.5, -0.5], 3e37, false), ([1e30, 0.5, 0.5], 0.1, false)]
        {
            let var = Var::from_vec(start.to_vec(), 3, &Device::Cpu)?;
            let gradient = Tensor::from_slice(&gradient, 3, &Device::Cpu)?;
            let update = Update {
                beta2: 0.999,
                one_minus_beta1: 0.1,
                one_minus_beta2: 0.001,
                gradient_scale: 1.0,
                decay: 1.0,
                // That and the first moment's 0.1 make a step of this size.
                step_size: step_size * 10.0,
                root_correction2: 0.001_f32.sqrt(),
                epsilon: 1e-8,
            };
            let (mut m, mut v, mut before) = ([0.0; 3], [0.0; 3], [0.0; 3]);
            let moments = Moments { m: &mut m, v: &mut v, before: &mut before };
            assert_eq!(apply(&var, &gradient, update, moments)?, finite, "{gradient:?} {step_size}");
            assert_eq!(before, start);
            assert_ne!(var.to_vec1::<f32>()?, start);
        }
        Ok(())
    }
}
