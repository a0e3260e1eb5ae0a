//! AdamW over our own state, so that a run can be saved and taken up again.

use anyhow::{Context, Result};
use candle_core::{CpuStorage, Error, InplaceOp2, Layout, Tensor, Var};
use rayon::prelude::*;

use crate::adaptation::Adaptation;
use crate::block::Gradients;

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
}

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
                learning_rate_scale: group.map_or(1.0, |group| group.learning_rate_scale),
                weight_decay: group.and_then(|group| group.weight_decay).unwrap_or(config.weight_decay),
            }
        });
        Self { config, updates: 0, states: states.collect() }
    }

    /// Goes on for another plan of the same run: updates are counted on, and `known` says of a parameter which state it had
    /// before, if its moments are to be kept.
    pub(crate) fn succeed(&self, adaptation: &Adaptation, known: impl Fn(usize) -> Option<usize>) -> Self {
        let mut next = Self::new(adaptation, self.config);
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
    /// # Errors
    /// When a parameter has no gradient; the message names it.
    pub fn step(
        &mut self,
        adaptation: &Adaptation,
        gradients: &Gradients,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let AdamWConfig { beta1, beta2, epsilon, .. } = self.config;
        let updates = self.updates;
        self.states.par_iter_mut().try_for_each(|state| {
            if state.frozen {
                state.missed += 1;
                return Ok(());
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
            apply(&param.var, gradient, update, &mut state.m, &mut state.v)
        })
    }
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

/// Updates a parameter in place, on candle's storage.
fn apply(var: &Var, gradient: &Tensor, update: Update, m: &mut [f32], v: &mut [f32]) -> Result<()> {
    let op = InPlace { update, moments: std::sync::Mutex::new((m, v)) };
    var.as_tensor().inplace_op2(&gradient.contiguous()?, &op)?;
    Ok(())
}

struct InPlace<'a> {
    update: Update,
    moments: std::sync::Mutex<(&'a mut [f32], &'a mut [f32])>,
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
        let (m, v) = &mut *moments;
        const CHUNK: usize = 16_384;
        param[start..end]
            .par_chunks_mut(CHUNK)
            .zip(gradient[g_start..g_end].par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((param, gradient), (m, v))| {
                for i in 0..param.len() {
                    let g = gradient[i] * gradient_scale;
                    m[i] += (g - m[i]) * one_minus_beta1;
                    v[i] = v[i] * beta2 + one_minus_beta2 * g * g;
                    let denominator = v[i].sqrt() / root_correction2 + epsilon;
                    param[i] = param[i] * decay - step_size * (m[i] / denominator);
                }
            });
        Ok(())
    }
}
