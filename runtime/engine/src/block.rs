//! Blocks: what the engine runs forward and backward as one operation, and how each is run.
//!
//! Forward keeps what each block's backward needs, or with recomputation its input alone; backward goes block by block and
//! drops what it used. [`Blocks::new`] decides for each block whether it is run fused (see [`crate::fused`]) or plain: as a
//! composition of candle operations, differentiated by candle's tape, which runs any recipe. Below the lowest block with a
//! trainable parameter nothing is kept and nothing is differentiated.

use std::str::FromStr;

use anyhow::{Context, Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};

use homeroom_kernels::{bf16, cpu, on_pool};
use serde::Serialize;

use crate::adaptation::Adaptation;
use crate::batch::Batch;
use crate::fused::{Fused, How};
use crate::model::{BaseModel, EMBEDDING};
use crate::recipe::Pass;
use crate::words::value_of;

/// Values in one chunk of logits: the vocabulary-sized logits of a whole batch never exist.
const LOGITS_CHUNK: usize = 8 << 20;

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

    fn add(&mut self, param: usize, gradient: Tensor) -> Result<()> {
        let sum = match self.by_param[param].take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.by_param[param] = Some(sum.detach());
        Ok(())
    }
}

/// What forward keeps for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing: there will be no backward.
    Nothing,
    /// What backward needs.
    All {
        /// Whether the input's gradient is wanted.
        input_gradient: bool,
    },
    /// The input alone; backward runs forward again.
    Input {
        /// Whether the input's gradient is wanted.
        input_gradient: bool,
    },
}

/// What forward kept.
pub(crate) enum Saved {
    /// Nothing.
    Nothing,
    /// candle's tape from the input, if its gradient is wanted, to the output.
    Tape {
        /// The input as a variable.
        input: Option<Var>,
        /// The output, with its graph.
        output: Tensor,
    },
    /// The input, to run forward from again.
    Input {
        /// The input; `None` for the embedding, whose input is the batch.
        input: Option<Tensor>,
        /// Whether its gradient is wanted.
        input_gradient: bool,
    },
}

/// A block as a composition of candle operations, differentiated by candle's tape.
pub(crate) struct Plain {
    /// `None`: the embedding.
    layer: Option<usize>,
}

impl Plain {
    /// The embedding.
    pub(crate) fn embedding() -> Self {
        Self { layer: None }
    }

    /// A decoder layer.
    pub(crate) fn layer(layer: usize) -> Self {
        Self { layer: Some(layer) }
    }

    /// The block with this number: 0 is the embedding.
    pub(crate) fn at(index: usize) -> Self {
        Self { layer: index.checked_sub(1) }
    }

    fn compose(&self, pass: &Pass<'_>, batch: &Batch, x: Option<&Tensor>) -> Result<Tensor> {
        match (self.layer, x) {
            (Some(layer), Some(x)) => pass.layer(layer, x, batch, None),
            _ => pass.embed(batch),
        }
    }

    fn taped(&self, pass: &Pass<'_>, batch: &Batch, x: Option<&Tensor>, input_gradient: bool) -> Result<Saved> {
        let input = x.filter(|_| input_gradient).map(Var::from_tensor).transpose()?;
        let output = self.compose(pass, batch, input.as_ref().map(Var::as_tensor).or(x))?;
        Ok(Saved::Tape { input, output })
    }

    /// Output (N, C), and what [`Plain::backward`] needs if it is going to be called.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        x: Option<&Tensor>,
        keep: Keep,
    ) -> Result<(Tensor, Saved)> {
        match keep {
            Keep::Nothing => Ok((self.compose(pass, batch, x)?.detach(), Saved::Nothing)),
            Keep::Input { input_gradient } => {
                let output = self.compose(pass, batch, x)?.detach();
                Ok((output, Saved::Input { input: x.cloned(), input_gradient }))
            }
            Keep::All { input_gradient } => {
                let saved = self.taped(pass, batch, x, input_gradient)?;
                let Saved::Tape { output, .. } = &saved else { unreachable!("`taped` yields a tape") };
                Ok((output.detach(), saved))
            }
        }
    }

    /// From the output's gradient (N, C), the input's, if it is wanted; parameters' gradients are added to `gradients`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        saved: Saved,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (input, output) = match saved {
            Saved::Nothing => return Ok(None),
            Saved::Tape { input, output } => (input, output),
            Saved::Input { input, input_gradient } => match self.taped(pass, batch, input.as_ref(), input_gradient)? {
                Saved::Tape { input, output } => (input, output),
                _ => unreachable!("`taped` yields a tape"),
            },
        };
        // The gradient of Σ y∘dy is candle's way to start from dy.
        let mut store = (&output * dy)?.sum_all()?.backward()?;
        collect(pass, &mut store, gradients)?;
        Ok(input.and_then(|input| store.remove(input.as_tensor())))
    }
}

/// Moves the gradients of parameters from candle's store.
fn collect(pass: &Pass<'_>, store: &mut GradStore, gradients: &mut Gradients) -> Result<()> {
    for (index, param) in pass.params.iter().enumerate().filter(|(_, param)| param.is_variable()) {
        if let Some(gradient) = store.remove(param) {
            gradients.add(index, gradient)?;
        }
    }
    Ok(())
}

/// What a batch came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Sum of the cross-entropies of trained tokens, in nats.
    pub loss_sum: f64,
    /// Trained tokens whose most likely prediction was right.
    pub correct: usize,
    /// Trained tokens.
    pub trained: usize,
}

/// What products are computed in, and whether blocks are fused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Plain blocks, in the type of the parameters: the reference.
    Plain,
    /// What the strategy proposes, else [`Compute::auto`].
    Auto,
    /// Fused blocks, in f32.
    F32,
    /// Fused blocks: activations and products in bf16 with sums, norms and softmax in f32.
    Bf16,
    /// The same, f32 where the processor does not multiply bf16, and products with frozen weights in integers where that is possible.
    Int8,
}

impl Compute {
    /// The faster type of floats on this processor: bf16 or f32.
    pub fn auto() -> Self {
        if cpu().prefers_bf16() { Self::Bf16 } else { Self::F32 }
    }

    /// What [`Compute::Auto`] comes to with an adaptation; any other is itself.
    pub fn resolved(self, adaptation: Option<&Adaptation>) -> Self {
        let proposed = || adaptation?.plan.defaults.compute_dtype.as_deref();
        match (self, proposed) {
            (Self::Auto, proposed) => match proposed() {
                Some("f32") => Self::F32,
                Some("int8") => Self::Int8,
                _ => Self::auto(),
            },
            (other, _) => other,
        }
    }

    /// Its name, as options and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// `plain` is no word: it is the reference, and for tests alone.
impl FromStr for Compute {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let known = [Self::Auto, Self::Bf16, Self::F32, Self::Int8];
        value_of(word, &known.map(|compute| (compute.name(), compute)))
    }
}

/// The blocks of a model, each with how it is run.
pub enum Blocks {
    /// Blocks in f32, fused or plain.
    F32(Box<Fused<f32>>),
    /// Fused blocks in bf16; plain ones are in f32.
    Bf16(Box<Fused<bf16>>),
}

impl Blocks {
    /// Decides how each block is run: fused where its recipes allow, else plain.
    pub fn new(model: &BaseModel, adaptation: Option<&Adaptation>, compute: Compute) -> Self {
        let f32_params =
            adaptation.iter().flat_map(|adaptation| &adaptation.params).all(|p| p.var.dtype() == DType::F32);
        let compute = compute.resolved(adaptation);
        let how = How { fuse: f32_params && compute != Compute::Plain, integers: compute == Compute::Int8 };
        // Beside integers few products are left, and bf16 halves what is kept.
        let in_bf16 = compute == Compute::Bf16 || compute == Compute::Int8 && cpu().has_bf16();
        match in_bf16 && how.fuse {
            true => Self::Bf16(Box::new(Fused::new(model, adaptation, how))),
            false => Self::F32(Box::new(Fused::new(model, adaptation, how))),
        }
    }

    /// Whether a frozen weight is multiplied in integers.
    pub fn in_integers(&self) -> bool {
        match self {
            Self::F32(blocks) => blocks.in_integers(),
            Self::Bf16(blocks) => blocks.in_integers(),
        }
    }

    /// How blocks are run, in words for the line that restates a run.
    pub fn words(&self) -> String {
        let (name, (fused, layers, head)) = match self {
            Self::F32(blocks) => ("f32", blocks.counts()),
            Self::Bf16(blocks) => ("bf16", blocks.counts()),
        };
        let name = if self.in_integers() { format!("{name}, frozen weights in integers") } else { name.to_owned() };
        match (fused, head) {
            (0, false) => "f32, plain blocks".to_owned(),
            _ if fused == layers && head => format!("{name}, fused blocks"),
            _ => {
                let head = if head { "" } else { " and the head" };
                format!("{name}, fused blocks; {} of {layers} layers{head} plain in f32", layers - fused)
            }
        }
    }

    /// Loss of a batch, without gradients.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn evaluate(&mut self, pass: &Pass<'_>, batch: &Batch) -> Result<Outcome> {
        match self {
            Self::F32(blocks) => on_pool(|| blocks.evaluate(pass, batch)),
            Self::Bf16(blocks) => on_pool(|| blocks.evaluate(pass, batch)),
        }
    }

    /// Loss of a batch; the gradients of `scale` times its sum are added to `gradients`. `recompute`: keep the input of each
    /// block alone and run it again in backward; that changes no bit of the result.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward_backward(
        &mut self,
        pass: &Pass<'_>,
        batch: &Batch,
        scale: f64,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<Outcome> {
        match self {
            Self::F32(blocks) => on_pool(|| blocks.forward_backward(pass, batch, scale, recompute, gradients)),
            Self::Bf16(blocks) => on_pool(|| blocks.forward_backward(pass, batch, scale, recompute, gradients)),
        }
    }
}

/// The lowest block with a trained parameter; one above the highest if there is none.
pub(crate) fn lowest_trained(pass: &Pass<'_>) -> Result<usize> {
    let adaptation = pass.adaptation.context("nothing is adapted, so nothing is trained")?;
    let blocks = pass.model.config.num_hidden_layers + 1;
    Ok((0..blocks).find(|block| trains(pass.model, adaptation, *block)).unwrap_or(blocks))
}

fn trains(model: &BaseModel, adaptation: &Adaptation, block: usize) -> bool {
    match block.checked_sub(1) {
        None => model.module_index(EMBEDDING).is_some_and(|module| adaptation.trains(module)),
        Some(layer) => {
            let at = model.layers[layer];
            let modules = [at.input_norm, at.q, at.k, at.v, at.o, at.post_norm, at.gate, at.up, at.down];
            modules.iter().any(|module| adaptation.trains(*module))
        }
    }
}

/// Norm, head and cross-entropy over the rows that have a target, in chunks; with a scale, also the gradient of the
/// residual stream (N, C) of `scale` times the sum.
pub(crate) fn plain_head(
    pass: &Pass<'_>,
    batch: &Batch,
    h: &Tensor,
    mut train: Option<(f64, &mut Gradients)>,
) -> Result<(Outcome, Option<Tensor>)> {
    let mut outcome = Outcome { trained: batch.targets.len(), ..Outcome::default() };
    let chunk = (LOGITS_CHUNK / pass.model.config.vocab_size).max(16);
    let mut row_gradients = Vec::new();
    for (rows, targets) in batch.target_rows.chunks(chunk).zip(batch.targets.chunks(chunk)) {
        let index = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
        let x = h.index_select(&index, 0)?; // (n, C)
        let input = train.is_some().then(|| Var::from_tensor(&x)).transpose()?;
        let logits = pass.head(input.as_ref().map_or(&x, Var::as_tensor), &batch.rows(rows))?; // (n, V)
        let likeliest = logits.detach().argmax(D::Minus1)?.to_vec1::<u32>()?;
        outcome.correct += likeliest.iter().zip(targets).filter(|(token, target)| token == target).count();
        let targets = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu)?;
        let log_probabilities = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?; // (n, 1)
        let values = log_probabilities.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        outcome.loss_sum -= values.iter().sum::<f64>();
        if let (Some((scale, gradients)), Some(input)) = (&mut train, input) {
            let mut store = (log_probabilities.sum_all()? * -*scale)?.backward()?;
            collect(pass, &mut store, gradients)?;
            row_gradients.push(store.remove(input.as_tensor()).context("the head cut its gradient")?);
        }
    }
    if train.is_none() {
        return Ok((outcome, None));
    }
    let zeros = h.zeros_like()?;
    if row_gradients.is_empty() {
        return Ok((outcome, Some(zeros)));
    }
    let index = Tensor::from_slice(&batch.target_rows, batch.target_rows.len(), &Device::Cpu)?;
    Ok((outcome, Some(zeros.index_add(&index, &Tensor::cat(&row_gradients, 0)?, 0)?)))
}
