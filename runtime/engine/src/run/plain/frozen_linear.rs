//! The product with a frozen weight as an operation on candle's tape: its backward yields dX and never dW.
//!
//! candle's own `matmul` computes the gradient of both sides wherever the activation is tracked, a third of the work of
//! training an adapter; and its product with a quantised weight stops the gradient without an error.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Error, Layout, Result, Shape, Tensor};
use homeroom_kernels::{matmul, matmul_t};

use crate::models::weight::Weight;

/// `y = x Wᵀ`: x (N, cols) to y (N, rows).
///
/// # Errors
/// When `x` has another width or is neither f32 nor f64.
pub fn frozen_linear(x: &Tensor, weight: &Arc<Weight>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone(), transposed: true })
}

/// `dx = dy W`: dy (N, rows) to dx (N, cols).
fn frozen_linear_backward(dy: &Tensor, weight: &Arc<Weight>) -> Result<Tensor> {
    dy.contiguous()?.apply_op1_no_bwd(&FrozenLinear { weight: weight.clone(), transposed: false })
}

struct FrozenLinear {
    weight: Arc<Weight>,
    transposed: bool,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = layout.shape().dims2()?;
        let w = self.weight.matrix();
        let (takes, gives) = if self.transposed { (w.cols, w.rows) } else { (w.rows, w.cols) };
        if width != takes {
            return Err(Error::Msg(format!("frozen-linear: the input is {width} wide, the weight takes {takes}")));
        }
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::Msg("frozen-linear: the input is not contiguous".to_owned()));
        };
        let shape = Shape::from((n, gives));
        let storage = match storage {
            CpuStorage::F32(x) => {
                let mut y = vec![0_f32; n * gives];
                match self.transposed {
                    true => matmul_t(&x[start..end], n, &w, &mut y),
                    false => matmul(&x[start..end], n, &w, &mut y),
                }
                CpuStorage::F32(y)
            }
            CpuStorage::F64(x) => {
                let mut y = vec![0_f64; n * gives];
                match self.transposed {
                    true => matmul_t(&x[start..end], n, &w, &mut y),
                    false => matmul(&x[start..end], n, &w, &mut y),
                }
                CpuStorage::F64(y)
            }
            _ => return Err(Error::UnsupportedDTypeForOp(DType::BF16, "frozen-linear").bt()),
        };
        Ok((storage, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(frozen_linear_backward(dy, &self.weight)?))
    }
}
