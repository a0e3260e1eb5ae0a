//! Gradients of a plan's parameters.

use anyhow::Result;
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
