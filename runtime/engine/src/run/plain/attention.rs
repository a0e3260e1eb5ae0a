//! Plain causal grouped-query attention over sequences laid end to end.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};

use crate::models::config::ModelConfig;
use crate::run::batch::Batch;

/// Keys and values of earlier positions of one sequence, for generation: (H_kv, T, D) each.
#[derive(Clone, Default)]
pub struct LayerCache {
    past: Option<(Tensor, Tensor)>,
}

/// Rotary position embedding of heads (N, H, D): channel `i` turns with `i + D/2`, as Hugging Face lays heads out.
///
/// Source: Su et al. 2021, <https://arxiv.org/abs/2104.09864>, section 3.4.
///
/// # Errors
/// When a tensor operation fails.
pub fn rotate(x: &Tensor, batch: &Batch, config: &ModelConfig) -> Result<Tensor> {
    let frequencies = config.rope_frequencies();
    let angles: Vec<f32> =
        batch.positions.iter().flat_map(|position| frequencies.iter().map(|f| *position as f32 * f)).collect();
    let angles = Tensor::from_vec(angles, (batch.positions.len(), frequencies.len()), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?.to_dtype(x.dtype())?, angles.sin()?.to_dtype(x.dtype())?);
    let heads_first = x.transpose(0, 1)?.unsqueeze(0)?.contiguous()?; // (1, H, N, D)
    Ok(candle_nn::rotary_emb::rope_slow(&heads_first, &cos, &sin)?.squeeze(0)?) // (H, N, D)
}

/// `softmax(q kᵀ / √D + mask) v` for each sequence: q (H, N, D), k and v (H_kv, N, D) to (N, H D).
///
/// With a cache, the batch is one sequence whose earlier keys and values stand there; the new ones are appended.
///
/// # Errors
/// When a tensor operation fails.
pub fn attend(
    [q, k, v]: [&Tensor; 3],
    batch: &Batch,
    config: &ModelConfig,
    cache: Option<&mut LayerCache>,
) -> Result<Tensor> {
    if let Some(cache) = cache {
        let (k, v) = match &cache.past {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, k], 1)?, Tensor::cat(&[past_v, v], 1)?),
            None => (k.clone(), v.clone()),
        };
        cache.past = Some((k.clone(), v.clone()));
        return one_sequence([q, &k, &v], config);
    }
    let outputs = batch.sequences.iter().map(|rows| {
        let part = |x: &Tensor| x.narrow(1, rows.start, rows.len());
        one_sequence([&part(q)?, &part(k)?, &part(v)?], config)
    });
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&outputs, 0)?)
}

/// Attention of T queries, the last of S positions: q (H, T, D), k and v (H_kv, S, D) to (T, H D).
fn one_sequence([q, k, v]: [&Tensor; 3], config: &ModelConfig) -> Result<Tensor> {
    let (heads, t, d) = q.dims3()?;
    let (kv_heads, s, _) = k.dims3()?;
    let group = heads / kv_heads;
    // Query heads of one group lie beside each other, so that keys need no copies.
    let q = q.contiguous()?.reshape((kv_heads, group * t, d))?;
    let scores = (q.matmul(&k.contiguous()?.transpose(1, 2)?)? * (d as f64).powf(-0.5))?; // (H_kv, G T, S)
    let scores = scores.reshape((kv_heads, group, t, s))?.broadcast_add(&mask(t, s, config, q.dtype())?)?;
    let weights = softmax(&scores)?.reshape((kv_heads, group * t, s))?;
    let out = weights.matmul(&v.contiguous()?)?; // (H_kv, G T, D)
    Ok(out.reshape((heads, t, d))?.transpose(0, 1)?.reshape((t, heads * d))?)
}

/// 0 where query `i` of the last T of S positions sees key `j`, else -inf: (T, S).
fn mask(t: usize, s: usize, config: &ModelConfig, dtype: DType) -> Result<Tensor> {
    let window = config.sliding_window.unwrap_or(usize::MAX);
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
