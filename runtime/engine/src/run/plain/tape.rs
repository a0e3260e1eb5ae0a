//! The memory of plain blocks from shapes alone: the operations of [`super::decoder`] and [`super::block`] on a tape that holds sizes in
//! the place of values, and its backward in the order in which candle's goes. What changes there changes here.

use std::collections::HashMap;

use homeroom_abi::plan::{ModuleInfo, ModuleKind, Plan};
use homeroom_abi::recipe::Op as Step;
use homeroom_abi::shape::{Dim, Shape, infer};

use super::block::LOGITS_CHUNK;
use super::linear::Part;
use crate::adapt::adaptation::Adapted;
use crate::models::architecture::{Architecture, Gate, QkNorm};

/// Bytes that are in use, and the most that were.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    now: usize,
    most: usize,
    /// All that was ever taken.
    pub traffic: Traffic,
}

/// Tensors that operations write.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    /// How many there are.
    pub tensors: usize,
    /// Bytes of those that fit into a cache, and are soon written over.
    pub small: usize,
    /// Bytes of the others, which lie in pages that the system has just made.
    pub large: usize,
}

impl Traffic {
    /// Bytes of a tensor that is large.
    pub(crate) const LARGE: usize = 16 << 20;

    fn add(&mut self, bytes: usize) {
        *(if bytes < Self::LARGE { &mut self.small } else { &mut self.large }) += bytes;
    }
}

impl Ledger {
    pub(crate) fn take(&mut self, bytes: usize) {
        self.now += bytes;
        self.most = self.now.max(self.most);
        self.traffic.tensors += 1;
        self.traffic.add(bytes);
    }

    /// So many bytes are read for little that is written.
    fn read(&mut self, bytes: usize) {
        self.traffic.add(bytes);
    }

    pub(crate) fn give(&mut self, bytes: usize) {
        self.now = self.now.saturating_sub(bytes);
    }

    /// Something is there for a moment.
    pub(crate) fn pass(&mut self, bytes: usize) {
        self.take(bytes);
        self.give(bytes);
    }

    /// So many bytes are in use besides for a moment, which are counted elsewhere.
    pub(crate) fn beside(&mut self, bytes: usize) {
        self.most = (self.now + bytes).max(self.most);
    }

    pub(crate) fn now(&self) -> usize {
        self.now
    }

    pub(crate) fn most(&self) -> usize {
        self.most
    }
}

const FLOAT: usize = size_of::<f32>();

/// Copies of its input that the gradient of an operation takes, counted in candle's `backward`: `grad · y`, and of a logarithm `grad / x`;
const EXP: usize = 2;
/// `grad (1 - y²)`;
const TANH: usize = 3;
/// σ and `grad (σ (1 - y) + y)`;
const SILU: usize = 8;
/// x³, tanh, and what they are multiplied to.
const GELU: usize = 12;

/// A node of a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id(usize);

#[derive(Clone, Debug)]
enum Op {
    /// No operation, or none that is tracked.
    Leaf,
    Sum2(Id, Id),
    Product(Id, Id),
    Quotient(Id, Id),
    Matmul(Id, Id),
    /// One input, whose gradient takes so many copies of it: one where it is a factor alone, else the input or output is part of it.
    Map(Id, usize),
    /// The input's values in another place or order.
    View(Id),
    Narrow(Id),
    Broadcast(Id),
    Reduce(Id),
    Largest(Id),
    Cat(Vec<Id>),
    /// Rows of a table.
    Pick(Id),
    /// A product with a frozen weight.
    Frozen(Id),
    /// A product with a transposed weight, see [`super::linear`].
    Linear(Id, Id),
}

/// A gradient in candle's store.
struct Gradient {
    /// Bytes of it and of what it holds.
    held: usize,
    /// Whether it holds what it was made of.
    tracked: bool,
}

struct Node {
    values: usize,
    tracked: bool,
    /// The parameter that it is.
    param: Option<usize>,
    op: Op,
}

/// What a module is for a tape.
#[derive(Clone, Copy)]
pub(crate) struct TapedModule<'a> {
    pub info: &'a ModuleInfo,
    pub adapted: Option<&'a Adapted>,
}

/// The plan that adapts modules, with the size of each parameter and whether it is trained.
#[derive(Clone, Copy)]
pub(crate) struct TapedPlan<'a> {
    pub plan: &'a Plan,
    /// Shape of each parameter, and whether it is trained.
    pub params: &'a [(Vec<usize>, bool)],
}

/// The rows of a pass.
pub(crate) struct TapedRows<'a> {
    pub architecture: &'a Architecture,
    /// Rows of each sequence.
    pub sequences: &'a [usize],
    pub plan: TapedPlan<'a>,
}

impl TapedRows<'_> {
    fn count(&self) -> usize {
        self.sequences.iter().sum()
    }
}

/// The operations of a block, with their sizes.
#[derive(Default)]
pub(crate) struct Tape {
    nodes: Vec<Node>,
    /// Bytes of all values that it holds.
    held: usize,
    /// Its products.
    pub products: Products,
}

/// Products that blocks take.
#[derive(Clone, Debug, Default)]
pub(crate) struct Products {
    /// Multiply-adds of candle's, and of those with frozen weights, forward.
    pub forward: f64,
    /// The same backward.
    pub backward: f64,
    /// Those of [`super::linear`] with their (n, rows, cols).
    pub linear: Vec<(Part, (usize, usize, usize))>,
}

impl Products {
    /// Adds those of a block, or of its forward alone.
    pub(crate) fn add(&mut self, block: &Self, forward_alone: bool) {
        self.forward += block.forward;
        self.backward += if forward_alone { 0.0 } else { block.backward };
        let counts = |part: &Part| !forward_alone || *part == Part::Forward;
        self.linear.extend(block.linear.iter().filter(|(part, _)| counts(part)));
    }
}

/// Gradients that there are of parameters.
pub(crate) type Grads = Vec<bool>;

impl Tape {
    fn values(&self, id: Id) -> usize {
        self.nodes[id.0].values
    }

    fn push(&mut self, ledger: &mut Ledger, values: usize, owns: bool, inputs: &[Id], op: Op) -> Id {
        let tracked = inputs.iter().any(|id| self.nodes[id.0].tracked);
        if owns {
            self.held += FLOAT * values;
            ledger.take(FLOAT * values);
        }
        let op = if tracked { op } else { Op::Leaf };
        self.nodes.push(Node { values, tracked, param: None, op });
        Id(self.nodes.len() - 1)
    }

    fn leaf(&mut self, ledger: &mut Ledger, values: usize) -> Id {
        self.push(ledger, values, true, &[], Op::Leaf)
    }

    /// The input of a block, as a variable or not.
    pub(crate) fn input(&mut self, ledger: &mut Ledger, values: usize, gradient: bool) -> Id {
        let id = self.push(ledger, values, gradient, &[], Op::Leaf);
        self.nodes[id.0].tracked = gradient;
        id
    }

    fn param(&mut self, param: usize, values: usize, trained: bool) -> Id {
        let tracked = trained;
        self.nodes.push(Node { values, tracked, param: trained.then_some(param), op: Op::Leaf });
        Id(self.nodes.len() - 1)
    }

    fn map(&mut self, ledger: &mut Ledger, a: Id, copies: usize) -> Id {
        self.push(ledger, self.values(a), true, &[a], Op::Map(a, copies))
    }

    fn view(&mut self, ledger: &mut Ledger, a: Id) -> Id {
        self.push(ledger, self.values(a), false, &[a], Op::View(a))
    }

    /// The same values in row-major order.
    fn copy(&mut self, ledger: &mut Ledger, a: Id) -> Id {
        self.push(ledger, self.values(a), true, &[a], Op::View(a))
    }

    fn narrow(&mut self, ledger: &mut Ledger, a: Id, values: usize) -> Id {
        self.push(ledger, values, false, &[a], Op::Narrow(a))
    }

    fn reduce(&mut self, ledger: &mut Ledger, a: Id, values: usize) -> Id {
        ledger.read(FLOAT * self.values(a));
        self.push(ledger, values, true, &[a], Op::Reduce(a))
    }

    fn broadcast(&mut self, ledger: &mut Ledger, a: Id, values: usize) -> Id {
        if self.values(a) == values { a } else { self.push(ledger, values, false, &[a], Op::Broadcast(a)) }
    }

    /// An operation on two inputs, the smaller of which is repeated.
    fn both(&mut self, ledger: &mut Ledger, a: Id, b: Id, values: usize, op: fn(Id, Id) -> Op) -> Id {
        let (a, b) = (self.broadcast(ledger, a, values), self.broadcast(ledger, b, values));
        self.push(ledger, values, true, &[a, b], op(a, b))
    }

    fn wider(&self, a: Id, b: Id) -> usize {
        self.values(a).max(self.values(b))
    }

    fn add(&mut self, ledger: &mut Ledger, a: Id, b: Id) -> Id {
        self.both(ledger, a, b, self.wider(a, b), Op::Sum2)
    }

    fn mul(&mut self, ledger: &mut Ledger, a: Id, b: Id) -> Id {
        self.both(ledger, a, b, self.wider(a, b), Op::Product)
    }

    fn matmul(&mut self, ledger: &mut Ledger, a: Id, b: Id, values: usize, depth: usize) -> Id {
        let tracked = self.nodes[a.0].tracked || self.nodes[b.0].tracked;
        // candle computes both gradients where either is asked for.
        self.products.forward += (values * depth) as f64;
        self.products.backward += (values * depth) as f64 * if tracked { 2.0 } else { 0.0 };
        self.push(ledger, values, true, &[a, b], Op::Matmul(a, b))
    }

    /// `x Wᵀ`: x (n, cols) and W (rows, cols).
    fn linear(&mut self, ledger: &mut Ledger, x: Id, w: Id, values: usize, cols: usize) -> Id {
        let (n, rows) = (self.values(x) / cols.max(1), self.values(w) / cols.max(1));
        let parts =
            [(true, Part::Forward), (self.nodes[x.0].tracked, Part::Input), (self.nodes[w.0].tracked, Part::Weight)];
        let taken = parts.into_iter().filter(|(is_taken, _)| *is_taken);
        self.products.linear.extend(taken.map(|(_, part)| (part, (n, rows, cols))));
        self.push(ledger, values, true, &[x, w], Op::Linear(x, w))
    }

    /// A module applied to rows, or to tokens.
    fn apply(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        module: TapedModule<'_>,
        x: Option<Id>,
        n: usize,
    ) -> Id {
        let Some(adapted) = module.adapted else { return self.base(ledger, module.info, x, n, true) };
        let TapedPlan { plan, params } = rows.plan;
        let recipe = &plan.recipes[adapted.recipe].forward;
        let shape_of = |name: &str| adapted.params.get(name).map(|param| params[*param].0.clone());
        let has = |name: &str| plan.scalars.contains_key(name);
        let (mut ids, mut shapes): (Vec<Option<Id>>, Vec<Shape>) = (Vec::new(), Vec::new());
        for node in &recipe.nodes {
            let shape = infer(&node.op, &shapes, module.info, &shape_of, &has).unwrap_or_default();
            let size = |dim: &Dim| match dim {
                Dim::Rows => n,
                Dim::Fixed(size) => *size,
            };
            let values: usize = shape.iter().map(size).product();
            let at = |id: usize| ids[id];
            let depth = |id: usize| shapes[id].last().map_or(1, size);
            let id = match &node.op {
                Step::X => x,
                Step::Base(a) | Step::Linear(a) => {
                    Some(self.base(ledger, module.info, at(*a), n, matches!(node.op, Step::Base(_))))
                }
                Step::Weight | Step::Bias | Step::Scalar(_) => Some(self.leaf(ledger, values)),
                Step::Param(name) => adapted.params.get(name).map(|param| self.param(*param, values, params[*param].1)),
                Step::Matmul(a, b) => match (at(*a), at(*b)) {
                    (Some(x), Some(b)) => Some(self.matmul(ledger, x, b, values, depth(*a))),
                    (None, Some(b)) => Some(self.push(ledger, values, true, &[b], Op::Pick(b))),
                    _ => None,
                },
                Step::MatmulT(a, b_node) => at(*b_node).map(|b| {
                    let is_apart = match &recipe.nodes[*b_node].op {
                        Step::Transpose(_) => true,
                        Step::Slice { of, dim, .. } => {
                            *dim > 0 && at(*of).is_some_and(|of| self.values(of) != self.values(b))
                        }
                        _ => false,
                    };
                    match at(*a) {
                        Some(x) if is_apart => {
                            let turned = self.view(ledger, b);
                            return self.matmul(ledger, x, turned, values, depth(*a));
                        }
                        Some(x) => return self.linear(ledger, x, b, values, depth(*a)),
                        None => (),
                    }
                    let turned = self.view(ledger, b);
                    let turned = self.copy(ledger, turned);
                    self.push(ledger, values, true, &[turned], Op::Pick(turned))
                }),
                Step::Add(a, b) | Step::Sub(a, b) => {
                    at(*a).zip(at(*b)).map(|(a, b)| self.both(ledger, a, b, values, Op::Sum2))
                }
                Step::Mul(a, b) => at(*a).zip(at(*b)).map(|(a, b)| self.both(ledger, a, b, values, Op::Product)),
                Step::Div(a, b) => at(*a).zip(at(*b)).map(|(a, b)| self.both(ledger, a, b, values, Op::Quotient)),
                Step::Scale(a, _) => at(*a).map(|a| self.map(ledger, a, 1)),
                Step::Transpose(a) => at(*a).map(|a| self.view(ledger, a)),
                Step::Reshape { of, .. } => at(*of).map(|a| self.view(ledger, a)),
                Step::Slice { of, .. } => at(*of).map(|a| self.narrow(ledger, a, values)),
                Step::Dropout { of, p } => at(*of).map(|a| match *p > 0.0 {
                    true => {
                        let mask = self.leaf(ledger, values);
                        self.mul(ledger, a, mask)
                    }
                    false => a,
                }),
                Step::RowNorm(a) => at(*a).map(|a| {
                    let squares = self.map(ledger, a, 2);
                    let sums = self.reduce(ledger, squares, values);
                    self.map(ledger, sums, 2)
                }),
                Step::Detach(a) => at(*a).map(|a| self.push(ledger, self.values(a), false, &[], Op::Leaf)),
                Step::Silu(a) => at(*a).map(|a| self.map(ledger, a, SILU)),
            };
            ids.push(id);
            shapes.push(shape);
        }
        ids.pop().flatten().unwrap_or_else(|| self.leaf(ledger, n * module.info.d_out))
    }

    /// The frozen module.
    fn base(&mut self, ledger: &mut Ledger, info: &ModuleInfo, x: Option<Id>, n: usize, with_bias: bool) -> Id {
        let y = match (info.kind, x) {
            (ModuleKind::Linear, Some(x)) => {
                let tracked = self.nodes[x.0].tracked;
                let multiplied = (n * info.d_in * info.d_out) as f64;
                self.products.forward += multiplied;
                self.products.backward += if tracked { multiplied } else { 0.0 };
                self.push(ledger, n * info.d_out, true, &[x], Op::Frozen(x))
            }
            (ModuleKind::Norm, Some(x)) => {
                let weight = self.leaf(ledger, info.d_out);
                self.mul(ledger, x, weight)
            }
            _ => self.leaf(ledger, n * info.d_out),
        };
        if !(with_bias && info.bias) {
            return y;
        }
        let bias = self.leaf(ledger, info.d_out);
        self.add(ledger, y, bias)
    }

    fn norm(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        module: Option<TapedModule<'_>>,
        x: Id,
        n: usize,
    ) -> Id {
        let Some(module) = module else { return self.map(ledger, x, 1) };
        let squares = self.map(ledger, x, 2);
        let sums = self.reduce(ledger, squares, self.values(x) / module.info.d_out);
        let means = self.map(ledger, sums, 1);
        let shifted = self.map(ledger, means, 1);
        let rms = self.map(ledger, shifted, 2);
        let normal = self.both(ledger, x, rms, self.values(x), Op::Quotient);
        self.apply(ledger, rows, module, Some(normal), n)
    }

    /// The embedding: (N, C).
    pub(crate) fn embed(&mut self, ledger: &mut Ledger, rows: &TapedRows<'_>, module: TapedModule<'_>) -> Id {
        let x = self.apply(ledger, rows, module, None, rows.count());
        if rows.architecture.embedding_scale == 1.0 { x } else { self.map(ledger, x, 1) }
    }

    /// A decoder layer; `module` finds a module by its path within the layer.
    pub(crate) fn layer<'m>(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        number: usize,
        module: &dyn Fn(&str) -> Option<TapedModule<'m>>,
        h: Id,
    ) -> Id {
        let (architecture, n) = (rows.architecture, rows.count());
        let spec = &architecture.layers[number];
        let (attention, feed_forward) = (spec.attention(), &spec.feed_forward);
        let named = |path: Option<&str>| path.and_then(module);
        let added = |tape: &mut Self, ledger: &mut Ledger, h: Id, y: Id| {
            let y = if spec.residual_scale == 1.0 { y } else { tape.map(ledger, y, 1) };
            tape.add(ledger, h, y)
        };
        let x = self.norm(ledger, rows, named(spec.mixer_norms.before), h, n);
        let widths = [attention.q_width(), attention.kv_width(), attention.kv_width()];
        let qkv: Vec<&str> = attention.qkv.iter().map(|projection| projection.path).collect();
        let parts = self.beside(ledger, rows, &qkv, module, x, &widths);
        let norms =
            attention.qk_norm.map(|_| [crate::models::architecture::Q_NORM, crate::models::architecture::K_NORM]);
        let mut turned = Vec::new();
        for (i, part) in parts.into_iter().enumerate() {
            let mut part = part;
            if let (Some(norms), true) = (norms, i < 2) {
                let norm = named(Some(norms[i]));
                let per_row = match attention.qk_norm {
                    Some(QkNorm::Head) => widths[i] / attention.head_dim,
                    _ => 1,
                };
                part = self.norm(ledger, rows, norm, part, n * per_row);
            }
            part = self.view(ledger, part);
            if i < 2 {
                part = self.rotate(ledger, attention.rope.is_some(), part, n * attention.head_dim);
            }
            turned.push(part);
        }
        let mut outputs = Vec::new();
        for t in rows.sequences.iter().copied() {
            let own: Vec<Id> = turned
                .iter()
                .zip(widths)
                .map(|(part, width)| {
                    let part = self.narrow(ledger, *part, t * width);
                    self.copy(ledger, part)
                })
                .collect();
            let scores = attention.heads * t * t;
            let keys = self.view(ledger, own[1]);
            let mut s = self.matmul(ledger, own[0], keys, scores, attention.head_dim);
            s = self.map(ledger, s, 1);
            if attention.soft_cap.is_some() {
                for copies in [1, TANH, 1] {
                    s = self.map(ledger, s, copies);
                }
            }
            let mask = self.leaf(ledger, t * t);
            s = self.add(ledger, s, mask);
            let most = self.leaf(ledger, attention.heads * t);
            let shifted = self.both(ledger, s, most, scores, Op::Sum2);
            let powers = self.map(ledger, shifted, EXP);
            let sums = self.reduce(ledger, powers, attention.heads * t);
            let weights = self.both(ledger, powers, sums, scores, Op::Quotient);
            let out = self.matmul(ledger, weights, own[2], attention.heads * t * attention.head_dim, t);
            let out = self.view(ledger, out);
            outputs.push(self.copy(ledger, out));
        }
        let attended = match &outputs[..] {
            [one] => *one,
            _ => self.push(ledger, n * attention.q_width(), true, &outputs, Op::Cat(outputs.clone())),
        };
        let mixed = self.named(ledger, rows, attention.o.path, module, attended);
        let mixed = self.norm(ledger, rows, named(spec.mixer_norms.after), mixed, n);
        let h = added(self, ledger, h, mixed);
        let x = self.norm(ledger, rows, named(spec.feed_forward_norms.before), h, n);
        let both: Vec<&str> = feed_forward.gate_up.iter().map(|projection| projection.path).collect();
        let parts = self.beside(ledger, rows, &both, module, x, &[feed_forward.inner; 2]);
        let copies = match feed_forward.gate {
            Gate::Silu => SILU,
            Gate::GeluTanh => GELU,
        };
        let gate = self.map(ledger, parts[0], copies);
        let gated = self.mul(ledger, gate, parts[1]);
        let down = self.named(ledger, rows, feed_forward.down.path, module, gated);
        let down = self.norm(ledger, rows, named(spec.feed_forward_norms.after), down, n);
        added(self, ledger, h, down)
    }

    fn named<'m>(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        path: &str,
        module: &dyn Fn(&str) -> Option<TapedModule<'m>>,
        x: Id,
    ) -> Id {
        match module(path) {
            Some(module) => self.apply(ledger, rows, module, Some(x), rows.count()),
            None => x,
        }
    }

    fn beside<'m>(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        paths: &[&str],
        module: &dyn Fn(&str) -> Option<TapedModule<'m>>,
        x: Id,
        widths: &[usize],
    ) -> Vec<Id> {
        let outputs: Vec<Id> = paths.iter().map(|path| self.named(ledger, rows, path, module, x)).collect();
        if outputs.len() == widths.len() {
            return outputs;
        }
        let n = rows.count();
        let all = match &outputs[..] {
            [one] => *one,
            _ => self.push(ledger, n * widths.iter().sum::<usize>(), true, &outputs, Op::Cat(outputs.clone())),
        };
        widths.iter().map(|width| self.narrow(ledger, all, n * width)).collect()
    }

    /// Rotary embedding of heads; `table`: values of the cosines.
    fn rotate(&mut self, ledger: &mut Ledger, turns: bool, x: Id, table: usize) -> Id {
        let x = self.copy(ledger, x);
        if !turns {
            return x;
        }
        let values = self.values(x);
        let [cos, sin] = [0; 2].map(|_| self.leaf(ledger, table));
        let straight = self.both(ledger, x, cos, values, Op::Product);
        let [low, high] = [0; 2].map(|_| self.narrow(ledger, x, values / 2));
        let high = self.map(ledger, high, 1);
        let half = self.push(ledger, values, true, &[low, high], Op::Cat(vec![low, high]));
        let turned = self.both(ledger, half, sin, values, Op::Product);
        self.add(ledger, straight, turned)
    }

    /// The final norm, the head and the loss of one chunk of n rows: the loss.
    fn loss(
        &mut self,
        ledger: &mut Ledger,
        rows: &TapedRows<'_>,
        (norm, head): (TapedModule<'_>, TapedModule<'_>),
        x: Id,
        n: usize,
    ) -> Id {
        let x = self.norm(ledger, rows, Some(norm), x, n);
        let mut logits = self.apply(ledger, rows, head, Some(x), n);
        let values = self.values(logits);
        if rows.architecture.logit_scale != 1.0 {
            logits = self.map(ledger, logits, 1);
        }
        if rows.architecture.logit_cap.is_some() {
            for copies in [1, TANH, 1] {
                logits = self.map(ledger, logits, copies);
            }
        }
        // Once for the loss, and once for whether it is the target.
        (0..2).for_each(|_| ledger.read(FLOAT * values));
        let most = self.push(ledger, n, true, &[logits], Op::Largest(logits));
        let shifted = self.both(ledger, logits, most, values, Op::Sum2);
        let powers = self.map(ledger, shifted, EXP);
        let sums = self.reduce(ledger, powers, n);
        let logarithms = self.map(ledger, sums, EXP);
        let all = self.both(ledger, shifted, logarithms, values, Op::Sum2);
        let picked = self.push(ledger, n, true, &[all], Op::Pick(all));
        self.reduce(ledger, picked, 1)
    }

    /// Goes back from a node, as `Tensor::backward` does; gradients of parameters are added to `grads`, and those of the input are there
    /// for a moment more. All that the tape holds is given back.
    ///
    /// candle writes a gradient that was multiplied with a tracked value on a tape of its own: until it is taken out of the store, it
    /// holds what it was made of.
    fn backward(self, ledger: &mut Ledger, from: Id, grads: &mut Grads) {
        let size = |id: Id| FLOAT * self.values(id);
        let tracked = |id: Id| self.nodes[id.0].tracked;
        let mut store: HashMap<usize, Gradient> = HashMap::new();
        // Parameters whose gradients products put aside.
        let mut aside = Vec::new();
        store.insert(from.0, Gradient { held: size(from), tracked: false });
        ledger.take(size(from));
        for index in (0..self.nodes.len()).rev() {
            let node = &self.nodes[index];
            if matches!(node.op, Op::Leaf) {
                continue;
            }
            let Some(own) = store.remove(&index) else { continue };
            let incoming = FLOAT * node.values;
            // What is given back when the node is done: its gradient, and what was made of it and is not held.
            let mut done = own.held;
            // Adds a gradient of `to`, for which so many bytes were made, to what there is of it.
            let mut add = |ledger: &mut Ledger, to: Id, made: usize, is_tracked: bool| {
                ledger.take(made);
                let sum = store.entry(to.0).or_insert_with(|| {
                    ledger.take(size(to));
                    Gradient { held: size(to), tracked: false }
                });
                ledger.take(size(to));
                if is_tracked || sum.tracked {
                    // The new sum holds the old one, what was made, and the gradient that it was made of.
                    let from_done = if is_tracked { incoming.min(done) } else { 0 };
                    done -= from_done;
                    sum.held += size(to) + made + from_done;
                    sum.tracked = true;
                } else {
                    ledger.give(size(to));
                    done += made;
                }
            };
            match &node.op {
                Op::Leaf => {}
                Op::Sum2(a, b) => [*a, *b].into_iter().for_each(|to| add(ledger, to, 0, false)),
                Op::Product(a, b) | Op::Matmul(a, b) => {
                    add(ledger, *a, size(*a), tracked(*b));
                    add(ledger, *b, size(*b), tracked(*a));
                }
                Op::Quotient(a, b) => {
                    add(ledger, *a, size(*a), tracked(*b));
                    add(ledger, *b, 3 * size(*b), tracked(*a) || tracked(*b));
                }
                // By a factor alone, nothing of the tape is needed.
                Op::Map(a, 1) => add(ledger, *a, size(*a), false),
                Op::Map(a, copies) => add(ledger, *a, copies * size(*a), true),
                Op::View(a) | Op::Reduce(a) => add(ledger, *a, 0, false),
                Op::Largest(a) => add(ledger, *a, 2 * size(*a), true),
                Op::Narrow(a) | Op::Frozen(a) | Op::Broadcast(a) => add(ledger, *a, size(*a), false),
                Op::Pick(a) => add(ledger, *a, 0, false),
                Op::Linear(x, w) => {
                    // Both gradients are there before either is added, and dy is turned for that of W.
                    let dx = if tracked(*x) { size(*x) } else { 0 };
                    let param = self.nodes[w.0].param;
                    if tracked(*w) {
                        ledger.beside(size(*w) + dx + incoming);
                        ledger.take(size(*w));
                    }
                    if tracked(*x) {
                        add(ledger, *x, dx, false);
                    }
                    match param {
                        Some(param) => aside.push((param, size(*w))),
                        None if tracked(*w) => {
                            add(ledger, *w, 0, false);
                            done += size(*w);
                        }
                        None => {}
                    }
                }
                Op::Cat(parts) => parts.iter().for_each(|to| add(ledger, *to, 0, false)),
            }
            ledger.give(done);
        }
        // Moved or added to what there was of the same parameters; only the sum stays of each.
        for (param, own) in aside {
            if std::mem::replace(&mut grads[param], true) {
                ledger.pass(own);
                ledger.give(own);
            }
        }
        for (index, gradient) in store {
            let own = FLOAT * self.nodes[index].values;
            match self.nodes[index].param {
                None => ledger.give(gradient.held),
                Some(param) if !grads[param] => {
                    grads[param] = true;
                    ledger.give(gradient.held - own);
                }
                Some(_) => {
                    ledger.pass(own);
                    ledger.give(gradient.held);
                }
            }
        }
        ledger.give(self.held);
    }

    /// What forward keeps is given back: there is no backward.
    pub(crate) fn forget(self, ledger: &mut Ledger) {
        ledger.give(self.held);
    }

    /// Backward of a block from the gradient of its output.
    pub(crate) fn block_backward(mut self, ledger: &mut Ledger, output: Id, grads: &mut Grads) {
        let dy = self.push(ledger, self.values(output), false, &[], Op::Leaf);
        let product = self.mul(ledger, output, dy);
        let sum = self.reduce(ledger, product, 1);
        self.backward(ledger, sum, grads);
    }
}

/// The plain head over n rows that have a target, of N.
pub(crate) fn head(
    ledger: &mut Ledger,
    rows: &TapedRows<'_>,
    modules: (TapedModule<'_>, TapedModule<'_>),
    n: usize,
    grads: &mut Grads,
) -> Products {
    let c = rows.architecture.hidden_size;
    let chunk = (LOGITS_CHUNK / rows.architecture.vocab_size).max(16);
    let mut products = Products::default();
    for from in (0..n).step_by(chunk) {
        let count = chunk.min(n - from);
        let mut tape = Tape::default();
        ledger.take(FLOAT * count * c);
        let x = tape.input(ledger, count * c, true);
        let loss = tape.loss(ledger, rows, modules, x, count);
        products.add(&tape.products, false);
        tape.backward(ledger, loss, grads);
        // The rows' gradients are kept, the rows are not.
        ledger.give(FLOAT * count * c);
        ledger.take(FLOAT * count * c);
    }
    // Zeros, the rows' gradients side by side, and what they are added to.
    ledger.pass(FLOAT * c * (n + 2 * rows.count()));
    ledger.give(FLOAT * c * n);
    products
}
