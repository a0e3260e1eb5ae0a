//! Blocks as compositions of candle operations, differentiated by candle's tape: forward keeps what backward needs, or the input
//! alone, and backward drops what it used.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};

use super::recipe::Pass;
use crate::adapt::adaptation::Adaptation;
use crate::models::{BaseModel, EMBEDDING};
use crate::run::batch::Batch;
use crate::run::gradients::Gradients;
use crate::run::waist::{LogProbs, Weigh};

/// Values in one chunk of logits: the vocabulary-sized logits of a whole batch never exist.
pub(super) const LOGITS_CHUNK: usize = 8 << 20;

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

impl Keep {
    /// What a block keeps whose number is this, if the lowest that trains is that.
    pub(crate) fn from(index: usize, lowest: usize, recompute: bool) -> Self {
        let input_gradient = index > lowest;
        match (index >= lowest, recompute) {
            (false, _) => Self::Nothing,
            (true, false) => Self::All { input_gradient },
            (true, true) => Self::Input { input_gradient },
        }
    }
}

/// What forward keeps of a block for backward.
pub(crate) enum PlainActivations {
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

    fn taped(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        x: Option<&Tensor>,
        input_gradient: bool,
    ) -> Result<PlainActivations> {
        let input = x.filter(|_| input_gradient).map(Var::from_tensor).transpose()?;
        let output = self.compose(pass, batch, input.as_ref().map(Var::as_tensor).or(x))?;
        Ok(PlainActivations::Tape { input, output })
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
    ) -> Result<(Tensor, PlainActivations)> {
        match keep {
            Keep::Nothing => Ok((self.compose(pass, batch, x)?.detach(), PlainActivations::Nothing)),
            Keep::Input { input_gradient } => {
                let output = self.compose(pass, batch, x)?.detach();
                Ok((output, PlainActivations::Input { input: x.cloned(), input_gradient }))
            }
            Keep::All { input_gradient } => {
                let activations = self.taped(pass, batch, x, input_gradient)?;
                let PlainActivations::Tape { output, .. } = &activations else { unreachable!("`taped` yields a tape") };
                Ok((output.detach(), activations))
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
        activations: PlainActivations,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (input, output) = match activations {
            PlainActivations::Nothing => return Ok(None),
            PlainActivations::Tape { input, output } => (input, output),
            PlainActivations::Input { input, input_gradient } => {
                match self.taped(pass, batch, input.as_ref(), input_gradient)? {
                    PlainActivations::Tape { input, output } => (input, output),
                    _ => unreachable!("`taped` yields a tape"),
                }
            }
        };
        // The gradient of Σ y∘dy is candle's way to start from dy.
        let mut store = (&output * dy)?.sum_all()?.backward()?;
        collect(pass, &mut store, gradients)?;
        Ok(input.and_then(|input| store.remove(input.as_tensor())))
    }
}

/// Moves the gradients of parameters from candle's store, and those that were put aside.
fn collect(pass: &Pass<'_>, store: &mut GradStore, gradients: &mut Gradients) -> Result<()> {
    for (index, gradient) in pass.aside.take() {
        gradients.add(index, gradient)?;
    }
    for (index, param) in pass.params.iter().enumerate().filter(|(_, param)| param.is_variable()) {
        if let Some(gradient) = store.remove(param) {
            gradients.add(index, gradient)?;
        }
    }
    Ok(())
}

/// The lowest block with a trained parameter; one above the highest if there is none.
pub(crate) fn lowest_trained(pass: &Pass<'_>) -> Result<usize> {
    let adaptation = pass.adaptation.context("nothing is adapted, so nothing is trained")?;
    let blocks = pass.model.layers.len() + 1;
    Ok((0..blocks).find(|block| trains(pass.model, adaptation, *block)).unwrap_or(blocks))
}

fn trains(model: &BaseModel, adaptation: &Adaptation, block: usize) -> bool {
    match block.checked_sub(1) {
        None => model.module_index(EMBEDDING).is_some_and(|module| adaptation.trains(module)),
        Some(layer) => model.layers[layer].all().any(|module| adaptation.trains(module)),
    }
}

/// Norm, head and log-probabilities of the rows that have a target, in chunks; with weights, also the gradient of the residual
/// stream (N, C) of `Σ wᵢ (−log pᵢ)`.
pub(crate) fn plain_head(
    pass: &Pass<'_>,
    batch: &Batch,
    h: &Tensor,
    train: Option<(Weigh<'_>, &mut Gradients)>,
) -> Result<(LogProbs, Option<Tensor>)> {
    match train {
        None => Ok((head_pass(pass, batch, h, None)?.0, None)),
        Some((Weigh::Alike(weight), gradients)) => {
            head_pass(pass, batch, h, Some((&Weights::Alike(weight), gradients)))
        }
        Some((Weigh::By(weigh), gradients)) => {
            let log_probs = head_pass(pass, batch, h, None)?.0;
            let weights = weights_of(weigh, &log_probs)?;
            head_pass(pass, batch, h, Some((&Weights::Each(weights), gradients)))
        }
    }
}

/// A weight for each log-probability.
///
/// # Errors
/// When `weigh` fails, or gives another number of weights.
pub(crate) fn weights_of(
    weigh: &mut (dyn FnMut(&[f64]) -> Result<Vec<f64>> + Send),
    log_probs: &LogProbs,
) -> Result<Vec<f64>> {
    let (weights, targets) = (weigh(&log_probs.values)?, log_probs.values.len());
    ensure!(weights.len() == targets, "{} weights for {targets} targets", weights.len());
    Ok(weights)
}

/// What the losses of targets are multiplied by.
enum Weights {
    Alike(f64),
    Each(Vec<f64>),
}

fn head_pass(
    pass: &Pass<'_>,
    batch: &Batch,
    h: &Tensor,
    mut train: Option<(&Weights, &mut Gradients)>,
) -> Result<(LogProbs, Option<Tensor>)> {
    let mut log_probs = LogProbs::default();
    let chunk = (LOGITS_CHUNK / pass.model.architecture.vocab_size).max(16);
    let mut row_gradients = Vec::new();
    for (rows, targets) in batch.target_rows.chunks(chunk).zip(batch.targets.chunks(chunk)) {
        let index = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
        let x = h.index_select(&index, 0)?; // (n, C)
        let input = train.is_some().then(|| Var::from_tensor(&x)).transpose()?;
        let logits = pass.head(input.as_ref().map_or(&x, Var::as_tensor), &batch.rows(rows))?; // (n, V)
        let likeliest = logits.detach().argmax(D::Minus1)?.to_vec1::<u32>()?;
        log_probs.correct += likeliest.iter().zip(targets).filter(|(token, target)| token == target).count();
        let targets = Tensor::from_slice(targets, (targets.len(), 1), &Device::Cpu)?;
        let log_probabilities = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets, 1)?; // (n, 1)
        let values = log_probabilities.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        if let (Some((weights, gradients)), Some(input)) = (&mut train, input) {
            let loss = match weights {
                Weights::Alike(weight) => (log_probabilities.sum_all()? * -*weight)?,
                Weights::Each(weights) => {
                    let own = &weights[log_probs.values.len()..][..values.len()];
                    let own = Tensor::from_slice(own, (own.len(), 1), &Device::Cpu)?.to_dtype(pass.dtype)?;
                    (log_probabilities * own)?.sum_all()?.neg()?
                }
            };
            let mut store = loss.backward()?;
            collect(pass, &mut store, gradients)?;
            row_gradients.push(store.remove(input.as_tensor()).context("the head cut its gradient")?);
        }
        log_probs.loss_sum -= values.iter().sum::<f64>();
        log_probs.values.extend(values);
    }
    if train.is_none() {
        return Ok((log_probs, None));
    }
    let zeros = h.zeros_like()?;
    if row_gradients.is_empty() {
        return Ok((log_probs, Some(zeros)));
    }
    let index = Tensor::from_slice(&batch.target_rows, batch.target_rows.len(), &Device::Cpu)?;
    Ok((log_probs, Some(zeros.index_add(&index, &Tensor::cat(&row_gradients, 0)?, 0)?)))
}
