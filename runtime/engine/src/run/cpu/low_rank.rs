//! Recognises recipes that add a low-rank update to a frozen linear module: `base(x) + s (d(x) Aᵀ) Bᵀ`, d being dropout or
//! nothing, and s wherever it stands; and those that learn the length of each row besides, as DoRA does. In answers nothing is dropped
//! out, so that more recipes are such.

use homeroom_abi::recipe::{NodeId, Op, Recipe};

use crate::adapt::adaptation::Adapted;

/// A low-rank update.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Index of A (r, d_in) in [`crate::adapt::adaptation::Adaptation::params`].
    pub a: usize,
    /// Index of B (d_out, r).
    pub b: usize,
    /// s.
    pub scaling: f64,
    /// Node and probability of the dropout on x.
    pub dropout: Option<(NodeId, f64)>,
    /// Index of m (d_out): the output without its bias is multiplied by m over the length of each row of W + s B A, as in DoRA.
    pub magnitude: Option<usize>,
}

impl LowRank {
    /// Whether its parameters, by their shapes, are those of a module (d_in, d_out). A plan may have one broadcast, and a file's may be of
    /// any shape; that computes something else.
    pub fn fits<'a>(&self, shape: impl Fn(usize) -> &'a [usize], (d_in, d_out): (usize, usize)) -> bool {
        let ([r, inputs], [outputs, columns]) = (shape(self.a), shape(self.b)) else { return false };
        (inputs, outputs, columns) == (&d_in, &d_out, r) && self.magnitude.is_none_or(|m| shape(m) == [d_out])
    }
}

/// The update that a recipe adds to a module, with a bias or without; `None` when it computes anything else.
pub fn low_rank(recipe: &Recipe, adapted: &Adapted, has_bias: bool) -> Option<LowRank> {
    Reader { recipe, adapted, at_rest: false }.update(has_bias)
}

/// As [`low_rank`], of what the recipe computes where nothing is dropped out: dropout is its input.
pub fn low_rank_at_rest(recipe: &Recipe, adapted: &Adapted, has_bias: bool) -> Option<LowRank> {
    Reader { recipe, adapted, at_rest: true }.update(has_bias)
}

/// A recipe that is looked at.
struct Reader<'a> {
    recipe: &'a Recipe,
    adapted: &'a Adapted,
    /// Whether nothing is dropped out.
    at_rest: bool,
}

impl Reader<'_> {
    fn update(&self, has_bias: bool) -> Option<LowRank> {
        let last = self.recipe.nodes.len().checked_sub(1)?;
        let plain = self.added(last, |op| matches!(op, Op::Base(_)));
        plain.or_else(|| self.with_magnitude(last, has_bias)).or_else(|| self.with_change(last))
    }

    /// Whether a node is x, if need be behind a dropout that does nothing.
    fn is_x(&self, id: NodeId) -> bool {
        match *self.op(id) {
            Op::X => true,
            Op::Dropout { of, .. } => self.at_rest && self.is_x(of),
            _ => false,
        }
    }

    fn op(&self, id: NodeId) -> &Op {
        &self.recipe.nodes[id].op
    }

    fn param(&self, id: NodeId) -> Option<usize> {
        match self.op(id) {
            Op::Param(name) => self.adapted.params.get(name).copied(),
            _ => None,
        }
    }

    /// The node below factors, and their product.
    fn unscaled(&self, mut id: NodeId) -> (NodeId, f64) {
        let mut scaling = 1.0;
        while let Op::Scale(of, factor) = self.op(id) {
            scaling *= factor;
            id = *of;
        }
        (id, scaling)
    }

    /// Of two nodes, one of which is `first`, the other.
    fn beside(&self, (left, right): (NodeId, NodeId), first: impl Fn(&Op) -> bool) -> Option<NodeId> {
        match (first(self.op(left)), first(self.op(right))) {
            (true, false) => Some(right),
            (false, true) => Some(left),
            _ => None,
        }
    }

    /// `frozen(x) + s (d(x) Aᵀ) Bᵀ`.
    fn added(&self, id: NodeId, frozen: impl Fn(&Op) -> bool) -> Option<LowRank> {
        let Op::Add(left, right) = *self.op(id) else { return None };
        let of_x = |op: &Op| matches!(op, Op::Base(x) | Op::Linear(x) if self.is_x(*x));
        let (update, above) = self.unscaled(self.beside((left, right), |op| frozen(op) && of_x(op))?);
        let Op::MatmulT(down, b) = *self.op(update) else { return None };
        let (down, between) = self.unscaled(down);
        let Op::MatmulT(x, a) = *self.op(down) else { return None };
        let (input, below) = self.unscaled(x);
        let dropout = match *self.op(input) {
            _ if self.is_x(input) => None,
            Op::Dropout { of, p } if *self.op(of) == Op::X => Some((input, p)),
            _ => return None,
        };
        let (a, b, dropout) = (self.param(a)?, self.param(b)?, dropout.filter(|(_, p)| *p > 0.0));
        Some(LowRank { a, b, scaling: above * between * below, dropout, magnitude: None })
    }

    /// `m / ‖W + s B A‖ ∘ (linear(x) + s (d(x) Aᵀ) Bᵀ) + bias`, the length being a constant for gradients. Without a bias `base(x)` is
    /// the same as `linear(x)`.
    fn with_magnitude(&self, id: NodeId, has_bias: bool) -> Option<LowRank> {
        let scaled = match *self.op(id) {
            Op::Add(left, right) if has_bias => self.beside((left, right), |op| *op == Op::Bias)?,
            _ if has_bias => return None,
            _ => id,
        };
        self.gained(scaled, has_bias)
    }

    /// `base(x) + (m / ‖W + s B A‖ ∘ (linear(x) + s (x Aᵀ) Bᵀ) - linear(x))`, as a DoRA with dropout is at rest: the bias is added once,
    /// and the linear part is there and taken off again.
    fn with_change(&self, id: NodeId) -> Option<LowRank> {
        let Op::Add(left, right) = *self.op(id) else { return None };
        let change = self.beside((left, right), |op| matches!(op, Op::Base(x) if self.is_x(*x)))?;
        let Op::Sub(scaled, frozen) = *self.op(change) else { return None };
        let taken = matches!(*self.op(frozen), Op::Linear(x) if self.is_x(x));
        // With a bias the base would have it multiplied.
        self.gained(scaled, true).filter(|_| taken && self.at_rest)
    }

    /// `m / ‖W + s B A‖ ∘ (linear(x) + s (d(x) Aᵀ) Bᵀ)`.
    fn gained(&self, scaled: NodeId, has_bias: bool) -> Option<LowRank> {
        let Op::Mul(left, right) = *self.op(scaled) else { return None };
        let (gain, sum) = match self.op(left) {
            Op::Div(..) => (left, right),
            _ => (right, left),
        };
        let Op::Div(magnitude, length) = *self.op(gain) else { return None };
        let Op::Detach(length) = *self.op(length) else { return None };
        let Op::RowNorm(direction) = *self.op(length) else { return None };
        let Op::Add(left, right) = *self.op(direction) else { return None };
        let (change, scaling) = self.unscaled(self.beside((left, right), |op| *op == Op::Weight)?);
        let Op::Matmul(b, a) = *self.op(change) else { return None };
        let update = self.added(sum, |op| matches!(op, Op::Linear(_)) || !has_bias)?;
        let same = self.param(a) == Some(update.a) && self.param(b) == Some(update.b);
        let near = (scaling - update.scaling).abs() <= 1e-12 * scaling.abs();
        (same && near).then_some(LowRank { magnitude: Some(self.param(magnitude)?), ..update })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use homeroom_abi::recipe::Node;

    use super::*;

    /// What PEFT's DoRA with dropout computes, of a module with a bias or without, with other nodes in the place of some.
    #[test]
    fn a_learned_length_with_dropout_is_one_at_rest_alone() {
        let recipe = |changes: &[(usize, Op)]| {
            let mut ops = vec![
                param("A"),
                param("B"),
                Op::Matmul(1, 0),
                Op::Scale(2, 2.0),
                Op::Weight,
                Op::Add(4, 3),
                Op::RowNorm(5),
                Op::Detach(6),
                param("m"),
                Op::Div(8, 7),
                Op::X,
                Op::Dropout { of: 10, p: 0.3 },
                Op::MatmulT(11, 0),
                Op::MatmulT(12, 1),
                Op::Scale(13, 2.0),
                Op::Linear(11),
                Op::Add(15, 14),
                Op::Mul(9, 16),
                Op::Sub(17, 15),
                Op::Base(10),
                Op::Add(19, 18),
            ];
            for (id, op) in changes {
                ops[*id] = op.clone();
            }
            Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() }
        };
        let params = HashMap::from([("A".to_owned(), 7), ("B".to_owned(), 9), ("m".to_owned(), 4)]);
        let adapted = Adapted { recipe: 0, params };
        let wanted = Some(LowRank { a: 7, b: 9, scaling: 2.0, dropout: None, magnitude: Some(4) });
        for has_bias in [false, true] {
            let same: [&[(usize, Op)]; 4] =
                [&[], &[(20, Op::Add(18, 19))], &[(17, Op::Mul(16, 9))], &[(16, Op::Add(14, 15))]];
            for changes in same {
                assert_eq!(low_rank_at_rest(&recipe(changes), &adapted, has_bias), wanted, "{changes:?}");
                assert_eq!(low_rank(&recipe(changes), &adapted, has_bias), None, "{changes:?}");
            }
            let others: [&[(usize, Op)]; 6] = [
                &[(18, Op::Sub(15, 17))],
                &[(18, Op::Add(17, 15))],
                &[(18, Op::Sub(17, 19))],
                &[(15, Op::Base(11))],
                &[(19, Op::Linear(10))],
                &[(20, Op::Sub(19, 18))],
            ];
            for changes in others {
                assert_eq!(low_rank_at_rest(&recipe(changes), &adapted, has_bias), None, "{changes:?}");
            }
        }
    }

    #[test]
    fn dropout_of_an_update_without_a_length_is_nothing_at_rest() {
        let ops = vec![Op::X, Op::Dropout { of: 0, p: 0.3 }, param("A"), param("B"), Op::MatmulT(1, 2)];
        let ops = ops.into_iter().chain([Op::MatmulT(4, 3), Op::Base(0), Op::Add(6, 5)]);
        let recipe = Recipe { nodes: ops.map(|op| Node { op, at: None }).collect() };
        let adapted = Adapted { recipe: 0, params: HashMap::from([("A".to_owned(), 7), ("B".to_owned(), 9)]) };
        let update = |dropout| Some(LowRank { a: 7, b: 9, scaling: 1.0, dropout, magnitude: None });
        assert_eq!(low_rank(&recipe, &adapted, true), update(Some((1, 0.3))));
        assert_eq!(low_rank_at_rest(&recipe, &adapted, true), update(None));
    }

    fn found(ops: Vec<Op>) -> Option<LowRank> {
        let recipe = Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
        let params = HashMap::from([("A".to_owned(), 7), ("B".to_owned(), 9)]);
        low_rank(&recipe, &Adapted { recipe: 0, params }, false)
    }

    fn param(name: &str) -> Op {
        Op::Param(name.to_owned())
    }

    #[test]
    fn every_way_to_write_a_low_rank_update_is_one() {
        let update = |scaling, dropout| Some(LowRank { a: 7, b: 9, scaling, dropout, magnitude: None });
        // base(x) + 2 ((x Aᵀ) Bᵀ)
        let plain =
            [Op::X, param("A"), param("B"), Op::MatmulT(0, 1), Op::MatmulT(3, 2), Op::Scale(4, 2.0), Op::Base(0)];
        for add in [Op::Add(5, 6), Op::Add(6, 5)] {
            assert_eq!(found([&plain[..], &[add]].concat()), update(2.0, None));
        }
        // ((3 dropout(x)) Aᵀ · 2) Bᵀ + base(x)
        let scaled = vec![
            Op::X,
            Op::Dropout { of: 0, p: 0.25 },
            Op::Scale(1, 3.0),
            param("A"),
            Op::MatmulT(2, 3),
            Op::Scale(4, 2.0),
            param("B"),
            Op::MatmulT(5, 6),
            Op::Base(0),
            Op::Add(7, 8),
        ];
        assert_eq!(found(scaled), update(6.0, Some((1, 0.25))));
        // A dropout of probability 0 is none.
        let none = vec![
            Op::X,
            Op::Dropout { of: 0, p: 0.0 },
            param("A"),
            Op::MatmulT(1, 2),
            param("B"),
            Op::MatmulT(3, 4),
            Op::Base(0),
            Op::Add(5, 6),
        ];
        assert_eq!(found(none), update(1.0, None));
    }

    /// A magnitude of one value is a factor of all rows, and a B of one row an update of all: another function.
    #[test]
    fn parameters_that_are_broadcast_are_not_those_of_a_module() {
        let update = LowRank { a: 0, b: 1, scaling: 1.0, dropout: None, magnitude: Some(2) };
        let fits = |shapes: [&'static [usize]; 3]| update.fits(|param| shapes[param], (7, 5));
        assert!(fits([&[3, 7], &[5, 3], &[5]]));
        for shapes in [
            [&[3, 7], &[5, 3], &[1]],
            [&[3, 7], &[5, 3], &[]],
            [&[3, 7], &[5, 3], &[1, 5]],
            [&[3, 7], &[1, 3], &[5]],
            [&[1, 7], &[5, 3], &[5]],
            [&[3, 1], &[5, 3], &[5]],
            [&[7], &[5, 3], &[5]],
        ] as [[&'static [usize]; 3]; 7]
        {
            assert!(!fits(shapes), "{shapes:?}");
        }
        assert!(LowRank { magnitude: None, ..update.clone() }.fits(|param| [&[3, 7][..], &[5, 3]][param], (7, 5)));
    }

    #[test]
    fn what_computes_anything_else_is_not() {
        let start = vec![Op::X, param("A"), param("B"), Op::MatmulT(0, 1), Op::MatmulT(3, 2), Op::Base(0)];
        let with = |more: Vec<Op>| found([start.clone(), more].concat());
        assert!(with(vec![Op::Add(4, 5)]).is_some(), "the rest differs from this in one node");
        assert_eq!(with(vec![Op::Sub(5, 4)]), None);
        assert_eq!(with(vec![Op::Detach(4), Op::Add(5, 6)]), None);
        assert_eq!(with(vec![Op::Silu(4), Op::Add(5, 6)]), None);
        assert_eq!(with(vec![Op::Linear(0), Op::Add(4, 6)]), None);
        assert_eq!(with(vec![Op::Base(4), Op::Add(4, 6)]), None);
        assert_eq!(with(vec![Op::Add(4, 5), Op::Scale(6, 2.0)]), None);
        assert_eq!(found(vec![Op::X, Op::Base(0), Op::Base(0), Op::Add(1, 2)]), None);
        assert_eq!(found(vec![]), None);
    }

    /// `m / ‖W + 2 B A‖ ∘ (linear(x) + 2 (x Aᵀ) Bᵀ) + bias`, with other nodes in the place of some.
    fn gained(has_bias: bool, changes: &[(usize, Op)]) -> Option<LowRank> {
        let mut ops = vec![
            param("A"),
            param("B"),
            Op::Matmul(1, 0),
            Op::Scale(2, 2.0),
            Op::Weight,
            Op::Add(4, 3),
            Op::RowNorm(5),
            Op::Detach(6),
            param("m"),
            Op::Div(8, 7),
            Op::X,
            Op::MatmulT(10, 0),
            Op::MatmulT(11, 1),
            Op::Scale(12, 2.0),
            Op::Linear(10),
            Op::Add(14, 13),
            Op::Mul(9, 15),
            Op::Bias,
            Op::Add(16, 17),
        ];
        for (id, op) in changes {
            ops[*id] = op.clone();
        }
        ops.truncate(if has_bias { 19 } else { 17 });
        let recipe = Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
        let params = HashMap::from([("A".to_owned(), 7), ("B".to_owned(), 9), ("m".to_owned(), 4)]);
        low_rank(&recipe, &Adapted { recipe: 0, params }, has_bias)
    }

    #[test]
    fn so_is_one_whose_rows_have_a_learned_length() {
        let wanted = Some(LowRank { a: 7, b: 9, scaling: 2.0, dropout: None, magnitude: Some(4) });
        for has_bias in [false, true] {
            let same: [&[(usize, Op)]; 6] = [
                &[],
                &[(5, Op::Add(3, 4))],
                &[(15, Op::Add(13, 14))],
                &[(16, Op::Mul(15, 9))],
                &[(18, Op::Add(17, 16))],
                &[(11, Op::MatmulT(10, 0)), (12, Op::MatmulT(11, 1))],
            ];
            for changes in same {
                assert_eq!(gained(has_bias, changes), wanted, "{changes:?}");
            }
        }
        assert_eq!(gained(false, &[(14, Op::Base(10))]), wanted, "without a bias the base is the linear part");
    }

    #[test]
    fn a_length_that_is_of_something_else_or_not_a_constant_is_not() {
        let others: [&[(usize, Op)]; 9] = [
            &[(7, Op::Scale(6, 1.0))],
            &[(3, Op::Scale(2, 1.0))],
            &[(2, Op::Matmul(0, 1))],
            &[(4, Op::Silu(4))],
            &[(5, Op::Sub(4, 3))],
            &[(9, Op::Div(7, 8))],
            &[(13, Op::Scale(12, 3.0))],
            &[(15, Op::Sub(14, 13))],
            &[(16, Op::Add(9, 15))],
        ];
        for changes in others {
            for has_bias in [false, true] {
                assert_eq!(gained(has_bias, changes), None, "{changes:?}");
            }
        }
        assert_eq!(gained(true, &[(14, Op::Base(10))]), None, "the bias would be multiplied, and added again");
        assert_eq!(gained(true, &[(18, Op::Scale(16, 1.0))]), None, "no bias is added");
    }
}
