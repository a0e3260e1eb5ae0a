//! Plain causal grouped-query attention over sequences laid end to end.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};

use crate::models::architecture::AttentionSpec;
use crate::models::rope::Rope;
use crate::run::batch::Batch;

/// Keys and values of earlier positions of one sequence, for generation: (H_kv, T, D) each.
#[derive(Clone, Default)]
pub struct LayerKvCache {
    past: Option<(Tensor, Tensor)>,
}

/// Rotary position embedding of heads (N, H, D) to (H, N, D): channel `i` turns with `i + R/2` for the first R channels, as Hugging
/// Face lays heads out; the others stay.
///
/// Source: Su et al. 2021, <https://arxiv.org/abs/2104.09864>, section 3.4.
///
/// # Errors
/// When a tensor operation fails.
pub fn rotate(x: &Tensor, batch: &Batch, rope: Option<&Rope>) -> Result<Tensor> {
    let Some(rope) = rope else { return Ok(x.transpose(0, 1)?.contiguous()?) };
    let (n, half, factor) = (batch.positions.len(), rope.dims / 2, f64::from(rope.attention_factor()));
    let mut angles: Vec<f32> = Vec::with_capacity(n * half);
    for (rows, length) in batch.sequences.iter().zip(&batch.lengths) {
        let frequencies = rope.frequencies(rope.set(*length));
        let positions = &batch.positions[rows.clone()];
        angles.extend(positions.iter().flat_map(|position| frequencies.iter().map(|f| *position as f32 * f)));
    }
    let angles = Tensor::from_vec(angles, (n, half), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let (cos, sin) = if factor == 1.0 { (cos, sin) } else { ((cos * factor)?, (sin * factor)?) };
    let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
    let heads_first = x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?; // (1, H, N, D)
    let width = heads_first.dim(D::Minus1)?;
    let turning = heads_first.narrow(D::Minus1, 0, rope.dims)?.contiguous()?;
    let turned = candle_nn::rotary_emb::rope_slow(&turning, &cos, &sin)?;
    if rope.dims == width {
        return Ok(turned.squeeze(0)?); // (H, N, D)
    }
    let rest = heads_first.narrow(D::Minus1, rope.dims, width - rope.dims)?;
    Ok(Tensor::cat(&[turned, rest], D::Minus1)?.squeeze(0)?)
}

/// `softmax(cap(scale · q kᵀ) + mask) v` for each sequence: q (H, N, D), k and v (H_kv, N, D) to (N, H D).
///
/// With a cache, the batch is one sequence whose earlier keys and values stand there; the new ones are appended.
///
/// # Errors
/// When a tensor operation fails.
pub fn attend(
    [q, k, v]: [&Tensor; 3],
    batch: &Batch,
    spec: &AttentionSpec,
    cache: Option<&mut LayerKvCache>,
) -> Result<Tensor> {
    if let Some(cache) = cache {
        let (k, v) = match &cache.past {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, k], 1)?, Tensor::cat(&[past_v, v], 1)?),
            None => (k.clone(), v.clone()),
        };
        cache.past = Some((k.clone(), v.clone()));
        return one_sequence([q, &k, &v], spec);
    }
    let outputs = batch.sequences.iter().map(|rows| {
        let part = |x: &Tensor| x.narrow(1, rows.start, rows.len());
        one_sequence([&part(q)?, &part(k)?, &part(v)?], spec)
    });
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&outputs, 0)?)
}

/// Attention of T queries, the last of S positions: q (H, T, D), k and v (H_kv, S, D) to (T, H D).
fn one_sequence([q, k, v]: [&Tensor; 3], spec: &AttentionSpec) -> Result<Tensor> {
    let (heads, t, d) = q.dims3()?;
    let (kv_heads, s, _) = k.dims3()?;
    let group = heads / kv_heads;
    // Query heads of one group lie beside each other, so that keys need no copies.
    let q = q.contiguous()?.reshape((kv_heads, group * t, d))?;
    let scores = (q.matmul(&k.contiguous()?.transpose(1, 2)?)? * spec.scale)?; // (H_kv, G T, S)
    let scores = match spec.soft_cap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = scores.reshape((kv_heads, group, t, s))?.broadcast_add(&mask(t, s, spec, q.dtype())?)?;
    let weights = softmax(&scores)?.reshape((kv_heads, group * t, s))?;
    let out = weights.matmul(&v.contiguous()?)?; // (H_kv, G T, D)
    Ok(out.reshape((heads, t, d))?.transpose(0, 1)?.reshape((t, heads * d))?)
}

/// 0 where query `i` of the last T of S positions sees key `j`, else -inf: (T, S).
fn mask(t: usize, s: usize, spec: &AttentionSpec, dtype: DType) -> Result<Tensor> {
    let window = spec.window.unwrap_or(usize::MAX);
    let values = (0..t).flat_map(|i| {
        let position = s - t + i;
        (0..s).map(move |j| if j <= position && position - j < window { 0_f32 } else { f32::NEG_INFINITY })
    });
    Ok(Tensor::from_vec(values.collect(), (t, s), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Softmax over the last dimension. Shifting by the row's maximum changes nothing, so no gradient flows through it.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    Ok(shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?)
}
