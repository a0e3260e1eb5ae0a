//! Noise on embeddings, which keeps a training from learning its few rows by heart.

use homeroom_kernels::add_noise;
use rayon::prelude::*;

use super::recipe::Pass;
use crate::adapt::adaptation::fnv1a;
use crate::run::batch::Batch;

impl Pass<'_> {
    /// Whether embeddings are noisy in this pass.
    pub(crate) fn is_noisy(&self) -> bool {
        self.dropout.is_some() && self.neftune_noise_alpha > 0.0
    }

    /// Adds to the rows of a batch (N, C) what NEFTune draws for them: uniform numbers from −m to m, `m = α / √(L C)`, L being the tokens of
    /// the row's sequence. They are drawn for the seed at (step, example, position, channel), as dropout is, so that packing,
    /// accumulation and recomputation draw the same ones.
    ///
    /// Source: Jain et al. 2023, <https://arxiv.org/abs/2310.05914>, algorithm 1.
    pub(crate) fn add_noise(&self, batch: &Batch, x: &mut [f32]) {
        let Some((seed, update)) = self.dropout else { return };
        let key = seed ^ fnv1a("neftune");
        let key = [key as u32, (key >> 32) as u32];
        let channels = x.len() / batch.ids.len().max(1);
        let mut rows = x.chunks_mut(channels.max(1));
        for (sequence, length) in batch.sequences.iter().zip(&batch.lengths) {
            let magnitude = self.neftune_noise_alpha / ((length * channels) as f64).sqrt();
            let rows: Vec<(usize, &mut [f32])> = sequence.clone().zip(rows.by_ref()).collect();
            rows.into_par_iter().for_each(|(row, x)| {
                add_noise(key, update, batch.examples[row], batch.positions[row], magnitude as f32, x);
            });
        }
    }
}
