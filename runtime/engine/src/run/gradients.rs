//! Gradients of a plan's parameters.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

/// Gradients by parameter, summed over all that was added.
pub struct Gradients {
    by_param: Vec<Option<Tensor>>,
}

impl Gradients {
    /// No gradient yet for each of so many parameters.
    pub fn new(params: usize) -> Self {
        Self { by_param: vec![None; params] }
    }

    /// The gradient of a parameter; `None`: nothing that was run depends on it.
    pub fn get(&self, param: usize) -> Option<&Tensor> {
        self.by_param[param].as_ref()
    }

    /// The sum of both, as `self + other` for each parameter that both have.
    ///
    /// # Errors
    /// When they are of different parameters.
    pub(crate) fn plus(mut self, other: Self) -> Result<Self> {
        ensure!(self.by_param.len() == other.by_param.len(), "gradients of different parameters");
        for (param, gradient) in other.by_param.into_iter().enumerate() {
            if let Some(gradient) = gradient {
                self.add(param, gradient)?;
            }
        }
        Ok(self)
    }

    /// Adds values of this shape.
    pub(crate) fn add_values(&mut self, param: usize, values: Vec<f32>, shape: &[usize]) -> Result<()> {
        self.add(param, Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Adds a tensor of the parameter's shape.
    pub(crate) fn add(&mut self, param: usize, gradient: Tensor) -> Result<()> {
        let sum = match self.by_param[param].take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.by_param[param] = Some(sum.detach());
        Ok(())
    }
}
