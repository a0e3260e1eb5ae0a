//! Blocks: what the engine runs forward and backward as one operation, and the loop over them.
//!
//! Forward keeps what each block's backward needs, or with recomputation its input alone; backward goes block by block and
//! drops what it used. [`choose`] is the one place that decides how a block is run. Below the lowest block with a trainable
//! parameter nothing is kept and nothing is differentiated.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor, Var};

use crate::adaptation::Adaptation;
use crate::batch::Batch;
use crate::model::{BaseModel, EMBEDDING};
use crate::recipe::Pass;

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

    fn add(&mut self, param: usize, gradient: Tensor) -> Result<()> {
        let sum = match self.by_param[param].take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.by_param[param] = Some(sum.detach());
        Ok(())
    }
}

/// A block between the residual stream below it and the one above it.
pub trait Block {
    /// Output (N, C), and what [`Block::backward`] needs if it is going to be called.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn forward(&self, pass: &Pass<'_>, batch: &Batch, x: Option<&Tensor>, keep: Keep) -> Result<(Tensor, Saved)>;

    /// From the output's gradient (N, C), the input's, if it is wanted; parameters' gradients are added to `gradients`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn backward(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        saved: Saved,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>>;
}

/// What forward keeps for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
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
pub enum Saved {
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

/// How a block is run. All blocks are plain: compositions of candle operations that run any recipe.
///
/// A faster implementation is chosen here, for a block whose recipes it knows.
fn choose(index: usize) -> Box<dyn Block> {
    Box::new(Plain { layer: index.checked_sub(1) })
}

/// Any block as a composition of candle operations, differentiated by candle's tape.
struct Plain {
    /// `None`: the embedding.
    layer: Option<usize>,
}

impl Plain {
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
}

impl Block for Plain {
    fn forward(&self, pass: &Pass<'_>, batch: &Batch, x: Option<&Tensor>, keep: Keep) -> Result<(Tensor, Saved)> {
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

    fn backward(
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

/// Loss of a batch, without gradients.
///
/// # Errors
/// When a tensor operation fails.
pub fn evaluate(pass: &Pass<'_>, batch: &Batch) -> Result<Outcome> {
    let mut h = None;
    for index in 0..=pass.model.config.num_hidden_layers {
        h = Some(choose(index).forward(pass, batch, h.as_ref(), Keep::Nothing)?.0);
    }
    let h = h.context("a model has at least an embedding")?;
    Ok(head_loss(pass, batch, &h, None)?.0)
}

/// Loss of a batch; the gradients of `scale` times its sum are added to `gradients`.
///
/// # Errors
/// When a tensor operation fails.
pub fn forward_backward(
    pass: &Pass<'_>,
    batch: &Batch,
    scale: f64,
    recompute: bool,
    gradients: &mut Gradients,
) -> Result<Outcome> {
    let adaptation = pass.adaptation.context("nothing is adapted, so nothing is trained")?;
    let blocks = pass.model.config.num_hidden_layers + 1;
    let lowest = (0..blocks).find(|block| trains(pass.model, adaptation, *block)).unwrap_or(blocks);
    let mut saved = Vec::with_capacity(blocks);
    let mut h = None;
    for index in 0..blocks {
        let input_gradient = index > lowest;
        let keep = match (index >= lowest, recompute) {
            (false, _) => Keep::Nothing,
            (true, false) => Keep::All { input_gradient },
            (true, true) => Keep::Input { input_gradient },
        };
        let (output, kept) = choose(index).forward(pass, batch, h.as_ref(), keep)?;
        saved.push(kept);
        h = Some(output);
    }
    let h = h.context("a model has at least an embedding")?;
    let (outcome, dh) = head_loss(pass, batch, &h, Some((scale, gradients)))?;
    let mut dh = dh.context("a head that was asked for a gradient yields one")?;
    for index in (lowest..blocks).rev() {
        let kept = saved.pop().context("every block saved something")?;
        match choose(index).backward(pass, batch, kept, &dh, gradients)? {
            Some(below) => dh = below,
            None => break,
        }
    }
    Ok(outcome)
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
fn head_loss(
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
