//! The plain executor: runs any recipe as a composition of candle operations, in f32 or f64.
//!
//! Weight-space nodes (`weight`) are whole matrices here; this is the reference that faster paths are held to.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use homeroom_abi::plan::ModuleKind;
use homeroom_abi::recipe::{NodeId, Op, Recipe};
use homeroom_abi::shape::Dim;
use homeroom_kernels::dropout_mask;
use rayon::prelude::*;

use crate::adapt::adaptation::{Adaptation, Adapted, fnv1a};
use crate::models::{BaseModel, Module};
use crate::run::batch::Batch;
use crate::run::plain::frozen_linear::frozen_linear;
use crate::run::plain::linear::{Aside, linear};

/// What a module is applied to.
#[derive(Clone)]
pub enum Input {
    /// Activations (N, d_in).
    Rows(Tensor),
    /// Token ids (N): the one-hot rows of an embedding's input.
    Tokens(Arc<Vec<u32>>),
}

/// One pass over a model: what its modules are, and how dropout is drawn.
pub struct Pass<'a> {
    /// The base.
    pub model: &'a BaseModel,
    /// What is adapted; `None`: the base alone.
    pub adaptation: Option<&'a Adaptation>,
    /// Values of the adaptation's parameters: tracked by candle in training, detached else.
    pub params: Vec<Tensor>,
    /// Type of activations: f32, or f64 in gradient checks.
    pub dtype: DType,
    /// Seed and number of the optimizer step, in training. `None`: dropout is off, and so is noise.
    pub dropout: Option<(u64, u32)>,
    /// NEFTune's α: how much noise there is on embeddings in training; 0: none.
    pub neftune_noise_alpha: f64,
    /// Whether the pages of mapped weights are given back after each block, so that a model takes no more memory than one of them.
    pub sparing: bool,
    /// Gradients that a backward of plain blocks put aside.
    pub(crate) aside: Aside,
}

impl<'a> Pass<'a> {
    /// A pass that computes no gradients.
    pub fn evaluation(model: &'a BaseModel, adaptation: Option<&'a Adaptation>) -> Self {
        let params = adaptation.iter().flat_map(|adaptation| &adaptation.params);
        let params: Vec<Tensor> = params.map(|param| param.var.as_detached_tensor()).collect();
        let dtype = params.first().map_or(DType::F32, Tensor::dtype);
        let aside = Aside::default();
        Self { model, adaptation, params, dtype, dropout: None, neftune_noise_alpha: 0.0, sparing: false, aside }
    }

    /// A pass of the training step `update` (from 0).
    pub fn training(model: &'a BaseModel, adaptation: &'a Adaptation, seed: u64, update: u32) -> Self {
        let params: Vec<Tensor> = adaptation
            .params
            .iter()
            .map(
                |param| {
                    if param.spec.trainable { param.var.as_tensor().clone() } else { param.var.as_detached_tensor() }
                },
            )
            .collect();
        let dtype = params.first().map_or(DType::F32, Tensor::dtype);
        let dropout = Some((seed, update));
        let (adaptation, aside) = (Some(adaptation), Aside::default());
        Self { model, adaptation, params, dtype, dropout, neftune_noise_alpha: 0.0, sparing: false, aside }
    }

    /// Gives the pages of a layer's mapped weights back, if this pass is sparing.
    pub(crate) fn release_layer(&self, layer: usize) {
        if self.sparing {
            self.model.layers[layer].all().for_each(|module| self.model.modules[module].weight.release());
        }
    }

    /// The same of all weights.
    pub(crate) fn release_all(&self) {
        if self.sparing {
            self.model.release();
        }
    }

    /// Applies a module, adapted or not: (N, d_in) to (N, d_out).
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn apply(&self, module: usize, input: &Input, batch: &Batch) -> Result<Tensor> {
        let adapted = self.adaptation.and_then(|adaptation| Some((adaptation, adaptation.of(module)?)));
        match adapted {
            None => self.base(&self.model.modules[module], input, true),
            Some((adaptation, adapted)) => {
                let recipe = &adaptation.plan.recipes[adapted.recipe].forward;
                self.run(recipe, module, adapted, adaptation, Some((input, batch)))
            }
        }
    }

    /// The effective weight of an adapted module, and its effective bias where that is not the frozen one.
    ///
    /// # Errors
    /// When the strategy gave no merged recipe.
    pub fn merged(&self, module: usize) -> Result<(Tensor, Option<Tensor>)> {
        let adaptation = self.adaptation.context("nothing is adapted")?;
        let adapted = adaptation.of(module).context("the module is not adapted")?;
        let recipes = &adaptation.plan.recipes[adapted.recipe];
        let path = &self.model.modules[module].info.path;
        let weight = recipes.merged_weight.as_ref();
        let weight = weight.with_context(|| format!("{path}: this strategy cannot be merged into the base"))?;
        let run = |recipe| self.run(recipe, module, adapted, adaptation, None);
        Ok((run(weight)?, recipes.merged_bias.as_ref().map(run).transpose()?))
    }

    /// The frozen module alone.
    fn base(&self, module: &Module, input: &Input, with_bias: bool) -> Result<Tensor> {
        let y = match (module.info.kind, input) {
            (ModuleKind::Linear, Input::Rows(x)) => frozen_linear(x, &module.weight)?,
            (ModuleKind::Norm, Input::Rows(x)) => x.broadcast_mul(&self.values(module)?)?,
            (ModuleKind::Embedding, Input::Tokens(ids)) => {
                let width = module.info.d_out;
                let rows = ids.iter().flat_map(|id| module.weight.decode(*id as usize..*id as usize + 1));
                Tensor::from_vec(rows.collect(), (ids.len(), width), &Device::Cpu)?.to_dtype(self.dtype)?
            }
            _ => bail!("{}: its input is of the wrong kind", module.info.path),
        };
        match &module.bias {
            Some(bias) if with_bias => Ok(y.broadcast_add(&self.vector(bias)?)?),
            _ => Ok(y),
        }
    }

    fn run(
        &self,
        recipe: &Recipe,
        module: usize,
        adapted: &Adapted,
        adaptation: &Adaptation,
        input: Option<(&Input, &Batch)>,
    ) -> Result<Tensor> {
        let mut run =
            Run { pass: self, module: &self.model.modules[module], recipe, adapted, adaptation, input, values: vec![] };
        for (id, node) in recipe.nodes.iter().enumerate() {
            let value = run.node(id, &node.op).with_context(|| {
                let at = node.at.as_ref().map(|at| format!(" ({at})")).unwrap_or_default();
                format!("{}: node {id}, {}{at}", run.module.info.path, node.op.name())
            })?;
            run.values.push(value);
        }
        match run.values.pop() {
            Some(Value::Tensor(result)) => Ok(result),
            _ => bail!("{}: the recipe yields no tensor", run.module.info.path),
        }
    }

    /// The frozen weight as a tensor of its own shape.
    fn values(&self, module: &Module) -> Result<Tensor> {
        let values = module.weight.decode(0..module.weight.rows());
        Ok(Tensor::from_vec(values, module.info.weight_shape(), &Device::Cpu)?.to_dtype(self.dtype)?)
    }

    fn vector(&self, values: &[f32]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(self.dtype)?)
    }
}

enum Value {
    Tensor(Tensor),
    Tokens(Arc<Vec<u32>>),
}

/// A recipe in the middle of running.
struct Run<'a> {
    pass: &'a Pass<'a>,
    module: &'a Module,
    recipe: &'a Recipe,
    adapted: &'a Adapted,
    adaptation: &'a Adaptation,
    input: Option<(&'a Input, &'a Batch)>,
    values: Vec<Value>,
}

impl Run<'_> {
    fn tensor(&self, id: NodeId) -> Result<&Tensor> {
        match &self.values[id] {
            Value::Tensor(tensor) => Ok(tensor),
            Value::Tokens(_) => bail!("node {id} is one-hot"),
        }
    }

    fn node(&self, id: NodeId, op: &Op) -> Result<Value> {
        let result = match op {
            Op::X => {
                let (input, _) = self.input.context("there is no input here")?;
                return Ok(match input {
                    Input::Rows(x) => Value::Tensor(x.clone()),
                    Input::Tokens(ids) => Value::Tokens(ids.clone()),
                });
            }
            Op::Base(a) | Op::Linear(a) => {
                let input = match &self.values[*a] {
                    Value::Tensor(x) => Input::Rows(x.clone()),
                    Value::Tokens(ids) => Input::Tokens(ids.clone()),
                };
                self.pass.base(self.module, &input, matches!(op, Op::Base(_)))?
            }
            Op::Weight => self.pass.values(self.module)?,
            Op::Bias => {
                let bias = self.module.bias.as_ref().context("the module has no bias")?;
                self.pass.vector(bias)?
            }
            Op::Param(name) => {
                let index = self.adapted.params.get(name).context("there is no such parameter")?;
                self.pass.params[*index].clone()
            }
            Op::Scalar(name) => {
                let value = self.adaptation.plan.scalars.get(name).context("there is no such scalar")?;
                Tensor::new(*value, &Device::Cpu)?.to_dtype(self.pass.dtype)?
            }
            // A product with one-hot rows picks rows.
            Op::Matmul(a, b) => match &self.values[*a] {
                Value::Tokens(ids) => pick(self.tensor(*b)?, ids)?,
                Value::Tensor(x) => product(x, self.tensor(*b)?)?,
            },
            Op::MatmulT(a, b) => match &self.values[*a] {
                Value::Tokens(ids) => pick(&self.tensor(*b)?.t()?, ids)?,
                Value::Tensor(x) => self.linear(x, *b)?,
            },
            Op::Add(a, b) => self.tensor(*a)?.broadcast_add(self.tensor(*b)?)?,
            Op::Sub(a, b) => self.tensor(*a)?.broadcast_sub(self.tensor(*b)?)?,
            Op::Mul(a, b) => self.tensor(*a)?.broadcast_mul(self.tensor(*b)?)?,
            Op::Div(a, b) => self.tensor(*a)?.broadcast_div(self.tensor(*b)?)?,
            Op::Scale(a, factor) => (self.tensor(*a)? * *factor)?,
            Op::Transpose(a) => self.tensor(*a)?.t()?,
            Op::Slice { of, dim, start, len } => self.tensor(*of)?.narrow(*dim, *start, *len)?,
            Op::Reshape { of, shape } => {
                let rows = self.input.map_or(1, |(_, batch)| batch.ids.len());
                let size = |dim: &Dim| match dim {
                    Dim::Rows => rows,
                    Dim::Fixed(size) => *size,
                };
                self.tensor(*of)?.reshape(shape.iter().map(size).collect::<Vec<_>>())?
            }
            Op::Dropout { of, p } => self.dropout(id, self.tensor(*of)?, *p)?,
            Op::RowNorm(a) => self.tensor(*a)?.sqr()?.sum(D::Minus1)?.sqrt()?,
            Op::Detach(a) => self.tensor(*a)?.detach(),
            Op::Silu(a) => candle_nn::ops::silu(self.tensor(*a)?)?,
        };
        Ok(Value::Tensor(result))
    }

    /// `x Wᵀ`, W being a node. By candle's own product in f64, and where W's rows do not lie beside each other: it reads them in place.
    fn linear(&self, x: &Tensor, id: NodeId) -> Result<Tensor> {
        let w = self.tensor(id)?;
        if w.dtype() != DType::F32 || !w.is_contiguous() {
            return product(x, &w.t()?);
        }
        let param = match &self.recipe.nodes[id].op {
            Op::Param(name) if w.is_variable() => self.adapted.params.get(name),
            _ => None,
        };
        Ok(linear(x, w, param.map(|param| (*param, &self.pass.aside)))?)
    }

    /// Multiplies by a mask drawn for (seed, node) at (step, example, position, channel), so that packing, accumulation and
    /// recomputation draw the same one.
    fn dropout(&self, id: NodeId, x: &Tensor, p: f64) -> Result<Tensor> {
        let Some((seed, update)) = self.pass.dropout else { return Ok(x.clone()) };
        let (rows, channels) = x.dims2()?;
        let batch = self.input.map(|(_, batch)| batch).filter(|batch| batch.ids.len() == rows);
        let key = seed ^ fnv1a(&format!("{}#{id}", self.module.info.path));
        let key = [key as u32, (key >> 32) as u32];
        let mut mask = vec![0_f32; rows * channels];
        mask.par_chunks_mut(channels.max(1)).enumerate().for_each(|(row, mask)| {
            // A parameter has no examples: its rows stand for positions.
            let (example, position) =
                batch.map_or((0, row as u32), |batch| (batch.examples[row], batch.positions[row]));
            dropout_mask(key, update, example, position, (1.0 - p) as f32, mask);
        });
        let mask = Tensor::from_vec(mask, (rows, channels), &Device::Cpu)?.to_dtype(x.dtype())?;
        Ok((x * mask)?)
    }
}

/// `a b` with whatever strides candle's product takes.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.contiguous()?.matmul(b)?)
}

/// Rows of `table` by token id.
fn pick(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::from_slice(ids, ids.len(), &Device::Cpu)?;
    Ok(table.contiguous()?.index_select(&ids, 0)?)
}
