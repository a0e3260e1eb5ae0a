//! Works out the shapes of a recipe's nodes, and checks them.

use super::dim::{Dim, Shape, words};
use crate::limits::{VALUES_MAX, VALUES_PER_ROW_MAX};
use crate::plan::{ModuleInfo, ModuleKind};
use crate::recipe::{Op, Recipe};

/// Shape of a recipe's result for a module.
///
/// `param` answers the shape of a parameter by its name, `scalar` whether there is one of that name.
///
/// # Errors
/// When a node does not fit its inputs; the message names the operation, its node and the author's line.
pub fn check(
    recipe: &Recipe,
    module: &ModuleInfo,
    param: &dyn Fn(&str) -> Option<Vec<usize>>,
    scalar: &dyn Fn(&str) -> bool,
) -> Result<Shape, String> {
    let mut shapes: Vec<Shape> = Vec::with_capacity(recipe.nodes.len());
    for (index, node) in recipe.nodes.iter().enumerate() {
        let shape = infer(&node.op, &shapes, module, param, scalar).map_err(|message| {
            let at = node.at.as_ref().map(|at| format!(" ({at})")).unwrap_or_default();
            format!("node {index}, {}{at}: {message}", node.op.name())
        })?;
        shapes.push(shape);
    }
    shapes.pop().ok_or_else(|| "a recipe needs at least one node".to_owned())
}

/// Shape of one operation's result from the shapes of the nodes before it.
///
/// # Errors
/// A sentence on what does not fit.
pub fn infer(
    op: &Op,
    before: &[Shape],
    module: &ModuleInfo,
    param: &dyn Fn(&str) -> Option<Vec<usize>>,
    scalar: &dyn Fn(&str) -> bool,
) -> Result<Shape, String> {
    let shape = fitting(op, before, module, param, scalar)?;
    // A row times a column is a matrix, so that a few operations can ask for more memory than there is.
    let most = if shape.contains(&Dim::Rows) { VALUES_PER_ROW_MAX } else { VALUES_MAX };
    let larger = |values: usize| op.inputs().all(|id| fixed_values(&before[id]).is_some_and(|input| input < values));
    let too_large = fixed_values(&shape).is_none_or(|values| values > most && larger(values));
    if too_large && op.inputs().next().is_some() {
        let per_row = if shape.contains(&Dim::Rows) { " a row" } else { "" };
        return Err(format!("its result would be {}, {most} values{per_row} are the most", words(&shape)));
    }
    Ok(shape)
}

/// Product of the sizes that are known; `None`: it is no number.
fn fixed_values(shape: &[Dim]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |values, dim| match dim {
        Dim::Rows => Some(values),
        Dim::Fixed(size) => values.checked_mul(*size),
    })
}

fn fitting(
    op: &Op,
    before: &[Shape],
    module: &ModuleInfo,
    param: &dyn Fn(&str) -> Option<Vec<usize>>,
    scalar: &dyn Fn(&str) -> bool,
) -> Result<Shape, String> {
    for id in op.inputs() {
        if id >= before.len() {
            return Err(format!("node {id} is not an earlier node"));
        }
    }
    let fixed = |shape: Vec<usize>| shape.into_iter().map(Dim::Fixed).collect::<Shape>();
    let input = vec![Dim::Rows, Dim::Fixed(module.d_in)];
    Ok(match op {
        Op::X => input,
        Op::Base(a) | Op::Linear(a) => {
            if before[*a] != input {
                return Err(format!("the module takes {}, the node is {}", words(&input), words(&before[*a])));
            }
            vec![Dim::Rows, Dim::Fixed(module.d_out)]
        }
        Op::Weight => fixed(module.weight_shape()),
        Op::Bias if module.bias => fixed(vec![module.d_out]),
        Op::Bias => return Err(format!("{} has no bias", module.path)),
        Op::Param(name) => fixed(param(name).ok_or_else(|| format!("there is no parameter `{name}`"))?),
        Op::Scalar(name) if scalar(name) => vec![],
        Op::Scalar(name) => return Err(format!("there is no scalar `{name}`")),
        Op::Matmul(a, b) => {
            let ([m, k], [k2, n]) = (matrix(&before[*a])?, matrix(&before[*b])?);
            product(&before[*a], &before[*b], k, k2)?;
            vec![m, n]
        }
        Op::MatmulT(a, b) => {
            let ([m, k], [n, k2]) = (matrix(&before[*a])?, matrix(&before[*b])?);
            product(&before[*a], &before[*b], k, k2)?;
            vec![m, n]
        }
        Op::Add(a, b) | Op::Sub(a, b) | Op::Mul(a, b) | Op::Div(a, b) => broadcast(&before[*a], &before[*b])?,
        Op::Scale(a, factor) if factor.is_finite() => before[*a].clone(),
        Op::Scale(_, factor) => return Err(format!("the factor {factor} is not finite")),
        Op::Transpose(a) => {
            let [m, n] = matrix(&before[*a])?;
            vec![n, m]
        }
        Op::Slice { of, dim, start, len } => {
            let mut shape = before[*of].clone();
            match shape.get(*dim) {
                Some(Dim::Fixed(size)) if start.checked_add(*len).is_some_and(|end| end <= *size) => {
                    shape[*dim] = Dim::Fixed(*len);
                }
                Some(Dim::Rows) => return Err("the rows of a batch cannot be sliced".to_owned()),
                _ => {
                    return Err(format!(
                        "entries {start} to {start} + {len} of dimension {dim} are not in {}",
                        words(&shape)
                    ));
                }
            }
            shape
        }
        Op::Reshape { of, shape } => {
            let rows = |dims: &[Dim]| dims.iter().filter(|dim| **dim == Dim::Rows).count();
            let count = |dims: &[Dim]| fixed_values(dims).map(|values| (rows(dims), values));
            if count(&before[*of]).is_none() || count(&before[*of]) != count(shape) {
                let (from, to) = (words(&before[*of]), words(shape));
                return Err(format!("{from} and {to} do not hold as many values"));
            }
            shape.clone()
        }
        Op::Dropout { of, p } if (0.0..1.0).contains(p) => before[*of].clone(),
        Op::Dropout { p, .. } => return Err(format!("{p} is not a probability below 1")),
        Op::RowNorm(a) => {
            let mut shape = before[*a].clone();
            shape.pop().ok_or("a scalar has no rows")?;
            shape
        }
        Op::Detach(a) | Op::Silu(a) => before[*a].clone(),
    })
}

/// Checks that a recipe yields the module's output (N, d_out), or for `merged` the weight or bias it stands for.
///
/// # Errors
/// When a node does not fit, or the result is of another shape.
pub fn check_result(
    recipe: &Recipe,
    module: &ModuleInfo,
    want: &[Dim],
    param: &dyn Fn(&str) -> Option<Vec<usize>>,
    scalar: &dyn Fn(&str) -> bool,
) -> Result<(), String> {
    let shape = check(recipe, module, param, scalar)?;
    if shape != want {
        return Err(format!("it yields {}, {} needs {}", words(&shape), module.path, words(want)));
    }
    if module.kind == ModuleKind::Embedding {
        let x_only_in_products = recipe.nodes.iter().all(|node| {
            let reads_x = |id: usize| matches!(recipe.nodes[id].op, Op::X);
            match node.op {
                Op::Base(_) | Op::Linear(_) => true,
                Op::Matmul(_, b) | Op::MatmulT(_, b) => !reads_x(b),
                _ => !node.op.inputs().any(reads_x),
            }
        });
        if !x_only_in_products {
            return Err(
                "the input of an embedding is one-hot: only base, linear and the left side of a product take it".into(),
            );
        }
    }
    Ok(())
}

fn matrix(shape: &Shape) -> Result<[Dim; 2], String> {
    <[Dim; 2]>::try_from(shape.as_slice()).map_err(|_| format!("{} is not a matrix", words(shape)))
}

fn product(a: &Shape, b: &Shape, k: Dim, k2: Dim) -> Result<(), String> {
    if k != k2 {
        return Err(format!("inner sizes differ: {} and {}", words(a), words(b)));
    }
    Ok(())
}

fn broadcast(a: &Shape, b: &Shape) -> Result<Shape, String> {
    let rank = a.len().max(b.len());
    let at = |shape: &Shape, i: usize| (i + shape.len()).checked_sub(rank).map_or(Dim::Fixed(1), |index| shape[index]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (x, Dim::Fixed(1)) => Ok(x),
            (Dim::Fixed(1), y) => Ok(y),
            _ => Err(format!("{} and {} do not broadcast", words(a), words(b))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_of_two_long_vectors_is_refused_before_it_is_computed() {
        let module = ModuleInfo {
            path: "m".to_owned(),
            kind: ModuleKind::Linear,
            d_in: 5,
            d_out: 7,
            bias: false,
            storage: "m".to_owned(),
            output_embedding: false,
        };
        let long = 1 << 20;
        let before = [
            vec![Dim::Fixed(long), Dim::Fixed(1)],
            vec![Dim::Fixed(long)],
            vec![Dim::Rows, Dim::Fixed(long), Dim::Fixed(1)],
        ];
        let infer = |op| infer(&op, &before, &module, &|_| None, &|_| false);
        for (op, words) in [
            (Op::Add(0, 1), "its result would be (1048576, 1048576), 2147483648 values are the most"),
            (Op::MatmulT(0, 0), "its result would be (1048576, 1048576)"),
            (Op::Mul(2, 1), "(N, 1048576, 1048576), 4194304 values a row are the most"),
        ] {
            let error = infer(op).expect_err(words);
            assert!(error.contains(words), "{error}");
        }
        assert!(infer(Op::Add(0, 0)).is_ok() && infer(Op::Silu(2)).is_ok());
    }
}
