//! Records a strategy's `forward`: each operation on a [`Node`] appends to the recipe in the making.
//!
//! The recipe in the making is a value of the recording thread. A node that does not fit is remembered, with the author's
//! line, as the recording's error; what follows it is ignored, so that `forward` needs no `?`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Add, Deref, Div, Mul, Sub};
use std::panic::Location;

use homeroom_abi::limits::NODES_MAX;
use homeroom_abi::plan::ModuleInfo;
use homeroom_abi::recipe::{self, NodeId, Op, Recipe};
use homeroom_abi::shape::{Dim, Shape, infer};

use crate::error::here;
use crate::{Error, Result};

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

struct Recording {
    module: ModuleInfo,
    params: BTreeMap<String, Vec<usize>>,
    scalars: Vec<String>,
    recipe: Recipe,
    shapes: Vec<Shape>,
    error: Option<Error>,
}

/// A value of the computation that is being recorded. It cannot outlive the recording.
#[derive(Clone, Copy)]
pub struct Node<'t> {
    id: NodeId,
    recording: PhantomData<&'t ()>,
}

/// The module that is being recorded: what it is, and its frozen and trained values as nodes.
pub struct Module<'t> {
    info: ModuleInfo,
    recording: PhantomData<&'t ()>,
}

impl Deref for Module<'_> {
    type Target = ModuleInfo;

    fn deref(&self) -> &ModuleInfo {
        &self.info
    }
}

impl<'t> Module<'t> {
    /// The frozen module applied to a node, its bias included.
    #[track_caller]
    pub fn base(&self, x: Node<'t>) -> Node<'t> {
        push(Op::Base(x.id))
    }

    /// The frozen module applied to a node, without its bias.
    #[track_caller]
    pub fn linear(&self, x: Node<'t>) -> Node<'t> {
        push(Op::Linear(x.id))
    }

    /// The frozen weight.
    #[track_caller]
    pub fn weight(&self) -> Node<'t> {
        push(Op::Weight)
    }

    /// The frozen bias; ask `module.bias` first whether there is one.
    #[track_caller]
    pub fn frozen_bias(&self) -> Node<'t> {
        push(Op::Bias)
    }

    /// A parameter of this module or, failing that, of the model.
    #[track_caller]
    pub fn param(&self, name: &str) -> Node<'t> {
        push(Op::Param(name.to_owned()))
    }

    /// A number of the plan.
    #[track_caller]
    pub fn scalar(&self, name: &str) -> Node<'t> {
        push(Op::Scalar(name.to_owned()))
    }
}

impl<'t> Node<'t> {
    /// `self otherᵀ`: (m, k) and (n, k) to (m, n).
    #[track_caller]
    pub fn matmul_t(self, other: Self) -> Self {
        push(Op::MatmulT(self.id, other.id))
    }

    /// `self other`: (m, k) and (k, n) to (m, n).
    #[track_caller]
    pub fn matmul(self, other: Self) -> Self {
        push(Op::Matmul(self.id, other.id))
    }

    /// (m, n) to (n, m).
    #[track_caller]
    pub fn transpose(self) -> Self {
        push(Op::Transpose(self.id))
    }

    /// `len` entries from `start` along `dim`.
    #[track_caller]
    pub fn slice(self, dim: usize, start: usize, len: usize) -> Self {
        push(Op::Slice { of: self.id, dim, start, len })
    }

    /// The same values in another shape.
    #[track_caller]
    pub fn reshape(self, shape: &[Dim]) -> Self {
        push(Op::Reshape { of: self.id, shape: shape.to_vec() })
    }

    /// In training, zero with probability `p`, else divided by `1 - p`. Nothing is recorded when `p` is 0.
    #[track_caller]
    pub fn dropout(self, p: f64) -> Self {
        if p == 0.0 { self } else { push(Op::Dropout { of: self.id, p }) }
    }

    /// Euclidean norm of each row: (m, n) to (m).
    #[track_caller]
    pub fn row_norm(self) -> Self {
        push(Op::RowNorm(self.id))
    }

    /// The same value; no gradient flows back.
    #[track_caller]
    pub fn detach(self) -> Self {
        push(Op::Detach(self.id))
    }

    /// `self * sigmoid(self)`.
    #[track_caller]
    pub fn silu(self) -> Self {
        push(Op::Silu(self.id))
    }
}

impl Mul<f64> for Node<'_> {
    type Output = Self;

    #[track_caller]
    fn mul(self, factor: f64) -> Self {
        push(Op::Scale(self.id, factor))
    }
}

macro_rules! binary {
    ($($operator:ident $method:ident),*) => {$(
        impl $operator for Node<'_> {
            type Output = Self;

            #[track_caller]
            fn $method(self, other: Self) -> Self {
                push(Op::$operator(self.id, other.id))
            }
        }
    )*};
}
binary!(Add add, Sub sub, Mul mul, Div div);

/// Appends an operation. Its location is the author's line: every method above is `#[track_caller]`.
#[track_caller]
fn push<'t>(op: Op) -> Node<'t> {
    let at = here(Location::caller());
    RECORDING.with_borrow_mut(|recording| {
        let recording = recording.as_mut().expect("nodes live only while `record` runs");
        if recording.error.is_none() {
            let param = |name: &str| recording.params.get(name).cloned();
            let scalar = |name: &str| recording.scalars.iter().any(|known| known == name);
            let shape = match recording.recipe.nodes.len() {
                RECORDED_MAX.. => Err(format!("more than {RECORDED_MAX} operations are recorded")),
                _ => infer(&op, &recording.shapes, &recording.module, &param, &scalar),
            };
            match shape {
                Ok(shape) => recording.shapes.push(shape),
                Err(message) => {
                    let message = format!("{}: {}: {message}", recording.module.path, op.name());
                    recording.error =
                        Some(Error(homeroom_abi::describe::PluginError { message, at: Some(at.clone()) }));
                }
            }
            recording.recipe.nodes.push(recipe::Node { op, at: Some(at) });
        }
        Node { id: recording.recipe.nodes.len() - 1, recording: PhantomData }
    })
}

/// Operations that are recorded of a module, those that its result does not need among them.
const RECORDED_MAX: usize = 4 * NODES_MAX;

/// What `record` may refer to.
pub(crate) struct Scope<'a> {
    pub module: &'a ModuleInfo,
    pub params: BTreeMap<String, Vec<usize>>,
    pub scalars: Vec<String>,
}

/// Runs `body` once and returns what it recorded; `None` when it yields no node.
pub(crate) fn record(
    scope: &Scope<'_>,
    with_input: bool,
    body: impl for<'t> FnOnce(&Module<'t>, Option<Node<'t>>) -> Option<Node<'t>>,
) -> Result<Option<Recipe>> {
    RECORDING.set(Some(Recording {
        module: scope.module.clone(),
        params: scope.params.clone(),
        scalars: scope.scalars.clone(),
        recipe: Recipe::default(),
        shapes: Vec::new(),
        error: None,
    }));
    let module = Module { info: scope.module.clone(), recording: PhantomData };
    let x = with_input.then(|| push(Op::X));
    let result = body(&module, x).map(|node| node.id);
    let recording = RECORDING.take().expect("it was set at the start of this function");
    match (recording.error, result) {
        (Some(error), _) => Err(error),
        (None, None) => Ok(None),
        (None, Some(result)) => Ok(Some(prune(&recording.recipe, result))),
    }
}

/// Drops nodes that the result does not need, so that the result is the last node.
fn prune(recipe: &Recipe, result: NodeId) -> Recipe {
    let mut needed = vec![false; recipe.nodes.len()];
    needed[result] = true;
    for id in (0..=result).rev().collect::<Vec<_>>() {
        if needed[id] {
            recipe.nodes[id].op.inputs().for_each(|input| needed[input] = true);
        }
    }
    let mut renamed = vec![0; recipe.nodes.len()];
    let mut nodes = Vec::new();
    for id in (0..=result).filter(|id| needed[*id]) {
        renamed[id] = nodes.len();
        let recipe::Node { op, at } = recipe.nodes[id].clone();
        nodes.push(recipe::Node { op: rename(op, &renamed), at });
    }
    Recipe { nodes }
}

fn rename(op: Op, to: &[NodeId]) -> Op {
    match op {
        Op::X | Op::Weight | Op::Bias | Op::Param(_) | Op::Scalar(_) => op,
        Op::Base(a) => Op::Base(to[a]),
        Op::Linear(a) => Op::Linear(to[a]),
        Op::MatmulT(a, b) => Op::MatmulT(to[a], to[b]),
        Op::Matmul(a, b) => Op::Matmul(to[a], to[b]),
        Op::Add(a, b) => Op::Add(to[a], to[b]),
        Op::Sub(a, b) => Op::Sub(to[a], to[b]),
        Op::Mul(a, b) => Op::Mul(to[a], to[b]),
        Op::Div(a, b) => Op::Div(to[a], to[b]),
        Op::Scale(a, factor) => Op::Scale(to[a], factor),
        Op::Transpose(a) => Op::Transpose(to[a]),
        Op::Slice { of, dim, start, len } => Op::Slice { of: to[of], dim, start, len },
        Op::Reshape { of, shape } => Op::Reshape { of: to[of], shape },
        Op::Dropout { of, p } => Op::Dropout { of: to[of], p },
        Op::RowNorm(a) => Op::RowNorm(to[a]),
        Op::Detach(a) => Op::Detach(to[a]),
        Op::Silu(a) => Op::Silu(to[a]),
    }
}
