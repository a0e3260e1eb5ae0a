//! Recognises recipes that add a low-rank update to a frozen linear module: `base(x) + s (d(x) Aᵀ) Bᵀ`, d being dropout or
//! nothing, and s wherever it stands.

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
}

/// The update that a recipe adds; `None` when it computes anything else.
pub fn low_rank(recipe: &Recipe, adapted: &Adapted) -> Option<LowRank> {
    let op = |id: NodeId| &recipe.nodes[id].op;
    let Op::Add(left, right) = *op(recipe.nodes.len().checked_sub(1)?) else { return None };
    let is_base = |id: NodeId| matches!(op(id), Op::Base(x) if *op(*x) == Op::X);
    let update = match (is_base(left), is_base(right)) {
        (true, false) => right,
        (false, true) => left,
        _ => return None,
    };
    let mut scaling = 1.0;
    let mut unscaled = |mut id: NodeId| {
        while let Op::Scale(of, factor) = op(id) {
            scaling *= factor;
            id = *of;
        }
        id
    };
    let param = |id: NodeId| match op(id) {
        Op::Param(name) => adapted.params.get(name).copied(),
        _ => None,
    };
    let Op::MatmulT(down, b) = *op(unscaled(update)) else { return None };
    let Op::MatmulT(x, a) = *op(unscaled(down)) else { return None };
    let input = unscaled(x);
    let dropout = match *op(input) {
        Op::X => None,
        Op::Dropout { of, p } if *op(of) == Op::X => Some((input, p)),
        _ => return None,
    };
    let (a, b) = (param(a)?, param(b)?);
    Some(LowRank { a, b, scaling, dropout: dropout.filter(|(_, p)| *p > 0.0) })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use homeroom_abi::recipe::Node;

    use super::*;

    fn found(ops: Vec<Op>) -> Option<LowRank> {
        let recipe = Recipe { nodes: ops.into_iter().map(|op| Node { op, at: None }).collect() };
        let params = HashMap::from([("A".to_owned(), 7), ("B".to_owned(), 9)]);
        low_rank(&recipe, &Adapted { recipe: 0, params })
    }

    fn param(name: &str) -> Op {
        Op::Param(name.to_owned())
    }

    #[test]
    fn every_way_to_write_a_low_rank_update_is_one() {
        let update = |scaling, dropout| Some(LowRank { a: 7, b: 9, scaling, dropout });
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
}
