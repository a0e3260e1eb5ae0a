//! The product with a weight that is trained, as an operation on candle's tape, in f32.
//!
//! candle's `matmul` with a transposed weight yields that weight's gradient transposed, and adds it to zeros value by value; of a head
//! with a row for each of 50,000 tokens that takes longer than the product. Here the gradient lies as the weight does, and that of a
//! parameter is put aside as it is. Products are those of the kernels, by whatever instructions there are.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use homeroom_kernels::{Columns, Finish, Left, Output, Right, Term, product};
use rayon::prelude::*;

/// Gradients of parameters that products made, with the number of each parameter, until somebody takes them.
#[derive(Clone, Default)]
pub(crate) struct Aside(Arc<Mutex<Vec<(usize, Tensor)>>>);

impl Aside {
    /// All of them, in the order in which they were made.
    pub(crate) fn take(&self) -> Vec<(usize, Tensor)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, param: usize, gradient: Tensor) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((param, gradient));
    }
}

/// `y = x Wᵀ`: x (N, cols) and W (rows, cols) to y (N, rows), all f32. If W is a trained parameter, `param` is its number, and its
/// gradient is put aside.
///
/// # Errors
/// When `x` has another width.
pub(crate) fn linear(x: &Tensor, w: &Tensor, param: Option<(usize, &Aside)>) -> Result<Tensor> {
    let param = param.map(|(param, aside)| (param, aside.clone()));
    x.contiguous()?.apply_op2(&w.contiguous()?, Linear { param })
}

/// The three products of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// `y (n, rows) = x Wᵀ`, of x (n, cols) and W (rows, cols).
    Forward,
    /// `dx (n, cols) = dy W`, of dy (n, rows) and W (rows, cols).
    Input,
    /// `dW (rows, cols) = dyᵀ x`, of dy (n, rows) and x (n, cols).
    Weight,
}

impl Part {
    /// Computes it for (n, rows, cols) into `out`.
    pub(crate) fn compute(self, (n, rows, cols): (usize, usize, usize), a: &[f32], b: &[f32], out: &mut [f32]) {
        let dense = Right::Dense { values: b, cols };
        let by = |m: usize, term: Term<'_, f32>, out: &mut [f32], width: usize| {
            let columns = [Columns { terms: &[term], at: 0, bias: None }];
            product(m, &columns, Output::Wide(out), width, Finish::default());
        };
        match self {
            _ if n == 0 || rows == 0 || cols == 0 => out.fill(0.0),
            Self::Forward => by(n, Term::forward(Left::rows(a, cols), dense), out, rows),
            Self::Input => by(n, Term::backward(Left::rows(a, rows), dense), out, cols),
            Self::Weight => by(rows, Term::backward(Left::rows(&turned(a, rows), n), dense), out, cols),
        }
    }

    /// Values of its result.
    fn values(self, (n, rows, cols): (usize, usize, usize)) -> usize {
        match self {
            Self::Forward => n * rows,
            Self::Input => n * cols,
            Self::Weight => rows * cols,
        }
    }
}

/// The columns of `values` (n, width) as rows: (width, n).
fn turned(values: &[f32], width: usize) -> Vec<f32> {
    /// Columns whose rows a task fills side by side.
    const SIDE: usize = 32;
    let n = values.len() / width;
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(SIDE * n).enumerate().for_each(|(part, out)| {
        let count = out.len() / n;
        for (i, row) in values.chunks_exact(width).enumerate() {
            for (j, value) in row[part * SIDE..][..count].iter().enumerate() {
                out[j * n + i] = *value;
            }
        }
    });
    out
}

struct Linear {
    param: Option<(usize, Aside)>,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout, w: &CpuStorage, w_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, width), (rows, cols)) = (at.shape().dims2()?, w_at.shape().dims2()?);
        if width != cols {
            return Err(Error::Msg(format!("linear: the input is {width} wide, the weight takes {cols}")));
        }
        computed(Part::Forward, (n, rows, cols), (x, at), (w, w_at), (n, rows))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((n, cols), dy) = (x.dims2()?, dy.contiguous()?);
        let sizes = (n, w.dims2()?.0, cols);
        let dx = match x.track_op() {
            true => Some(dy.apply_op2_no_bwd(w, &Gradient { of: Part::Input, sizes })?),
            false => None,
        };
        if !w.track_op() {
            return Ok((dx, None));
        }
        let dw = dy.apply_op2_no_bwd(x, &Gradient { of: Part::Weight, sizes })?;
        let Some((param, aside)) = &self.param else { return Ok((dx, Some(dw))) };
        aside.put(*param, dw);
        Ok((dx, None))
    }
}

/// A product of backward.
struct Gradient {
    of: Part,
    /// N, rows, cols.
    sizes: (usize, usize, usize),
}

impl CustomOp2 for Gradient {
    fn name(&self) -> &'static str {
        "linear-backward"
    }

    fn cpu_fwd(&self, dy: &CpuStorage, at: &Layout, b: &CpuStorage, b_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, rows, cols) = self.sizes;
        let shape = if self.of == Part::Weight { (rows, cols) } else { (n, cols) };
        computed(self.of, self.sizes, (dy, at), (b, b_at), shape)
    }
}

fn computed(
    part: Part,
    sizes: (usize, usize, usize),
    a: (&CpuStorage, &Layout),
    b: (&CpuStorage, &Layout),
    shape: (usize, usize),
) -> Result<(CpuStorage, Shape)> {
    let mut out = vec![0_f32; part.values(sizes)];
    part.compute(sizes, values(a)?, values(b)?, &mut out);
    Ok((CpuStorage::F32(out), Shape::from(shape)))
}

fn values<'a>((storage, at): (&'a CpuStorage, &Layout)) -> Result<&'a [f32]> {
    match (storage, at.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        (CpuStorage::F32(_), None) => Err(Error::Msg("linear: a side is not contiguous".to_owned())),
        _ => Err(Error::UnsupportedDTypeForOp(storage.dtype(), "linear").bt()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// Largest difference of two tensors, over the largest value of the second.
    fn apart(ours: &Tensor, theirs: &Tensor) -> Result<f32> {
        let most = theirs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        Ok((ours - theirs)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? / most)
    }

    #[test]
    fn a_product_and_its_gradients_are_candles() -> Result<()> {
        for (n, rows, cols) in [(1, 3, 5), (7, 33, 20), (70, 130, 65)] {
            let random = |shape: (usize, usize)| Tensor::randn(0_f32, 1.0, shape, &Device::Cpu);
            let (x, w) = (Var::from_tensor(&random((n, cols))?)?, Var::from_tensor(&random((rows, cols))?)?);
            let dy = random((n, rows))?;
            let theirs = x.matmul(&w.t()?)?;
            let wanted = (&theirs * &dy)?.sum_all()?.backward()?;
            let aside = Aside::default();
            for param in [None, Some((4, &aside))] {
                let ours = linear(&x, &w, param)?;
                assert!(apart(&ours, &theirs)? < 1e-5, "{n} x {rows} x {cols}");
                let mut found = (&ours * &dy)?.sum_all()?.backward()?;
                if param.is_some() {
                    assert!(found.get(&w).is_none());
                    for (number, gradient) in aside.take() {
                        assert_eq!(number, 4);
                        found.insert(&w, gradient);
                    }
                    assert!(aside.take().is_empty());
                }
                for side in [x.as_tensor(), w.as_tensor()] {
                    let (ours, wanted) = (found.get(side).expect("ours"), wanted.get(side).expect("candle's"));
                    assert_eq!(ours.dims(), wanted.dims());
                    assert!(apart(ours, wanted)? < 1e-5, "{n} x {rows} x {cols}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_gradient_is_computed_of_what_is_tracked_alone() -> Result<()> {
        let [x, w] = [(2, 3), (4, 3)].map(|shape| Tensor::ones(shape, DType::F32, &Device::Cpu));
        let (x, w) = (Var::from_tensor(&x?)?, w?);
        let store = linear(&x, &w, None)?.sum_all()?.backward()?;
        assert!(store.get(&x).is_some() && store.get(&w).is_none());
        Ok(())
    }
}
