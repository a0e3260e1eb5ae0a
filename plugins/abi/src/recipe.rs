//! How an adapted module computes: a list of operations over nodes, recorded once by the SDK and run by the host.
//!
//! Activations are matrices with one row a token: `x` of a linear module is (N, d_in). Of an embedding it is the one-hot
//! matrix (N, vocabulary), never built: a product with it picks rows. Of a norm it is the input already divided by its
//! root mean square. What a recipe yields is (N, d_out).

use serde::{Deserialize, Serialize};

use crate::describe::Source;
use crate::shape::dim::Dim;

/// Index of an earlier node of the same recipe.
pub type NodeId = usize;

/// A recorded computation. Node `i` refers to nodes below `i` only; the last node is the result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Operations in the order in which they were recorded.
    pub nodes: Vec<Node>,
}

/// One operation and where its author wrote it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// The author's line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Source>,
}

/// Two nodes are equal when they compute the same, wherever that was written.
impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.op == other.op
    }
}

/// An operation. Binary element-wise ones broadcast as NumPy does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// The module's input.
    X,
    /// The frozen module applied to a node, bias included: (N, d_in) to (N, d_out).
    Base(NodeId),
    /// The frozen module applied to a node, without its bias.
    Linear(NodeId),
    /// The frozen weight: linear (d_out, d_in), embedding (vocabulary, d), norm (d).
    Weight,
    /// The frozen bias (d_out).
    Bias,
    /// A parameter of the module or, failing that, of the model.
    Param(String),
    /// A number of the plan, the same for all modules.
    Scalar(String),
    /// `a bᵀ`: (m, k) and (n, k) to (m, n).
    MatmulT(NodeId, NodeId),
    /// `a b`: (m, k) and (k, n) to (m, n).
    Matmul(NodeId, NodeId),
    /// `a + b`.
    Add(NodeId, NodeId),
    /// `a - b`.
    Sub(NodeId, NodeId),
    /// `a * b`, element by element.
    Mul(NodeId, NodeId),
    /// `a / b`, element by element.
    Div(NodeId, NodeId),
    /// A node times a constant.
    Scale(NodeId, f64),
    /// (m, n) to (n, m).
    Transpose(NodeId),
    /// `len` entries from `start` along `dim`.
    Slice {
        /// The node.
        of: NodeId,
        /// Dimension, from 0.
        dim: usize,
        /// First entry.
        start: usize,
        /// Number of entries.
        len: usize,
    },
    /// The same values in another shape, row-major.
    Reshape {
        /// The node.
        of: NodeId,
        /// New shape.
        shape: Vec<Dim>,
    },
    /// In training: zero with probability `p`, else divided by `1 - p`. Else the identity.
    Dropout {
        /// The node.
        of: NodeId,
        /// Probability of zero, below 1.
        p: f64,
    },
    /// Euclidean norm over the last dimension, which is dropped: (m, n) to (m).
    RowNorm(NodeId),
    /// The same value; no gradient flows to the node.
    Detach(NodeId),
    /// `a * sigmoid(a)`.
    Silu(NodeId),
}

impl Op {
    /// The nodes that this operation reads.
    pub fn inputs(&self) -> impl Iterator<Item = NodeId> {
        let (a, b) = match *self {
            Self::X | Self::Weight | Self::Bias | Self::Param(_) | Self::Scalar(_) => (None, None),
            Self::Base(a)
            | Self::Linear(a)
            | Self::Scale(a, _)
            | Self::Transpose(a)
            | Self::Slice { of: a, .. }
            | Self::Reshape { of: a, .. }
            | Self::Dropout { of: a, .. }
            | Self::RowNorm(a)
            | Self::Detach(a)
            | Self::Silu(a) => (Some(a), None),
            Self::MatmulT(a, b)
            | Self::Matmul(a, b)
            | Self::Add(a, b)
            | Self::Sub(a, b)
            | Self::Mul(a, b)
            | Self::Div(a, b) => (Some(a), Some(b)),
        };
        a.into_iter().chain(b)
    }

    /// Name as it stands in files and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::X => "x",
            Self::Base(_) => "base",
            Self::Linear(_) => "linear",
            Self::Weight => "weight",
            Self::Bias => "bias",
            Self::Param(_) => "param",
            Self::Scalar(_) => "scalar",
            Self::MatmulT(..) => "matmul_t",
            Self::Matmul(..) => "matmul",
            Self::Add(..) => "add",
            Self::Sub(..) => "sub",
            Self::Mul(..) => "mul",
            Self::Div(..) => "div",
            Self::Scale(..) => "scale",
            Self::Transpose(_) => "transpose",
            Self::Slice { .. } => "slice",
            Self::Reshape { .. } => "reshape",
            Self::Dropout { .. } => "dropout",
            Self::RowNorm(_) => "row_norm",
            Self::Detach(_) => "detach",
            Self::Silu(_) => "silu",
        }
    }
}
