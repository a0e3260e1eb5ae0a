//! Embedding models: a text becomes a vector, and texts that mean the like have vectors of the like direction.
//!
//! Read are directories of sentence-transformers, and plain ones of transformers, of the encoders `bert`, `distilbert`, `roberta` and
//! `xlm-roberta`. Vectors are those of sentence-transformers to the rounding of f32, in which everything is computed. Nothing of a
//! directory is trusted: sizes are bounded, and what is not computed here is refused by name.
//!
//! A text longer than the model reads is cut, as in sentence-transformers; [`Tokens::truncated`] tells.

mod config;
mod encoder;
mod modules;
mod pool;
#[cfg(test)]
mod tests;
mod text;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use self::config::EncoderConfig;
pub use self::config::{encoder_type, is_encoder};
use self::encoder::Encoder;
use self::modules::Modules;
pub use self::modules::{MODULES_FILE, PROMPTS_FILE, SENTENCE_FILES, module_directories};
use self::pool::aside;
pub use self::pool::each_aside;
use self::text::TextSide;
pub use self::text::Tokens;
use crate::files::mapped;
use crate::guard::quietly;
use crate::text::tokenizer::Tokenizer;

/// Tokens of one pass: the activations of one take some megabytes, and [`EmbeddingModel::embed_while`] is heard between two.
const PASS_TOKENS: usize = 512;
/// Most bytes of the attention's scores of one text. They are whole in memory, several times.
const SCORES_BYTES_MAX: u128 = 256 << 20;

/// A loaded embedding model. Nothing in it changes.
pub struct EmbeddingModel {
    /// The directory that it was loaded from, absolute.
    pub path: PathBuf,
    config: EncoderConfig,
    text: TextSide,
    encoder: Encoder,
    modules: Modules,
}

impl EmbeddingModel {
    /// Loads a directory of sentence-transformers or of transformers.
    ///
    /// # Errors
    /// When a file is missing, damaged, or holds what is not computed here; nothing is guessed.
    pub fn load(path: &Path) -> Result<Self> {
        let path = path.canonicalize().with_context(|| format!("{}: no such model", path.display()))?;
        let config = EncoderConfig::from_dir(&path)?;
        let modules = Modules::from_dir(&path, config.hidden_size)?;
        let tokenizer = Arc::new(Tokenizer::from_dir(&path)?);
        let scores = |tokens: usize| 4 * (tokens as u128).pow(2) * config.num_attention_heads as u128;
        let asked = modules.max_seq_length.unwrap_or_else(|| tokenizer.model_max_length().unwrap_or(usize::MAX));
        let mut most = asked.min(config.positions());
        while scores(most) > SCORES_BYTES_MAX {
            most -= most.div_ceil(64);
        }
        let (lower_case, prompt) = (modules.lower_case, modules.prompt.clone());
        let text = TextSide::new(tokenizer, config.vocab_size, most, lower_case, prompt);
        let text = text.with_context(|| path.display().to_string())?;
        let encoder = quietly(|| Encoder::load(&path, &config));
        let encoder = encoder.with_context(|| format!("{}: its weights cannot be loaded", path.display()))??;
        let model = Self { path, config, text, encoder, modules };
        // A vector of one text shows what is damaged, before anybody asks for one.
        model.embed(&[&model.tokens("a 1")?.ids])?;
        mapped::intact()?;
        Ok(model)
    }

    /// `model_type` of its `config.json`.
    pub fn model_type(&self) -> &str {
        &self.config.model_type
    }

    /// Width of its vectors.
    pub fn dimensions(&self) -> usize {
        self.modules.dimensions
    }

    /// Most tokens that are read of a text, special ones included.
    pub fn max_tokens(&self) -> usize {
        self.text.most()
    }

    /// Makes tokens of a text.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn tokens(&self, text: &str) -> Result<Tokens> {
        self.text.tokens(text)
    }

    /// Takes tokens that a client made of a text with this model's own tokenizer.
    ///
    /// # Errors
    /// When they are of another one; says what tells.
    pub fn given_tokens(&self, ids: &[u32]) -> Result<Tokens> {
        self.text.given(ids)
    }

    /// Returns the vectors of texts, given as tokens. Texts of one length share a pass, so that nothing is padded; passes share the
    /// threads that embed, see [`each_aside`].
    ///
    /// # Errors
    /// When a text has no token or more than [`EmbeddingModel::max_tokens`], a token is not known, or the weights make a value that is
    /// not finite.
    pub fn embed(&self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let vectors = self.embed_while(texts, || true)?;
        Ok(vectors.into_iter().map(|vector| vector.expect("nothing stopped it")).collect())
    }

    /// As [`EmbeddingModel::embed`], for as long as `go_on` says so, which is asked before each pass but one. Texts that were not
    /// reached have no vector.
    ///
    /// # Errors
    /// As [`EmbeddingModel::embed`].
    pub fn embed_while(&self, texts: &[&[u32]], go_on: impl Fn() -> bool + Sync) -> Result<Vec<Option<Vec<f32>>>> {
        for text in texts {
            let n = text.len();
            ensure!(
                (1..=self.max_tokens()).contains(&n),
                "a text has {n} tokens, from 1 to {} are read",
                self.max_tokens()
            );
            if let Some(id) = text.iter().find(|id| **id as usize >= self.config.vocab_size) {
                bail!("token {id} has no embedding: the model knows {}", self.config.vocab_size);
            }
        }
        let lengths: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        let passes = passes(&lengths);
        // One is done in any case, so that whoever asks again and again comes to an end.
        let first = AtomicBool::new(true);
        let done = aside(|| {
            let done = passes.par_iter().map(|pass| {
                if !first.swap(false, Ordering::Relaxed) && !go_on() {
                    return Ok(Vec::new());
                }
                let of_pass: Vec<&[u32]> = pass.iter().map(|text| texts[*text]).collect();
                self.pass(&of_pass)
            });
            done.collect::<Result<Vec<_>>>()
        })?;
        let mut vectors = vec![None; texts.len()];
        for (pass, done) in passes.iter().zip(done) {
            pass.iter().zip(done).for_each(|(text, vector)| vectors[*text] = Some(vector));
        }
        Ok(vectors)
    }

    /// Returns the vectors of texts of one length.
    fn pass(&self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let (length, channels) = (texts[0].len(), self.config.hidden_size);
        let ids = Tensor::from_vec(texts.concat(), (texts.len(), length), &Device::Cpu)?;
        let hidden = self.encoder.forward(&ids)?.flatten_all()?.to_vec1::<f32>()?; // (texts, tokens, channels)
        let mut pooled = Vec::new();
        for text in hidden.chunks_exact(length * channels) {
            self.modules.poolings.iter().for_each(|pooling| pooling.pool(text, channels, &mut pooled));
        }
        let width = pooled.len() / texts.len();
        let mut vectors = Tensor::from_vec(pooled, (texts.len(), width), &Device::Cpu)?;
        for step in &self.modules.steps {
            vectors = step.apply(&vectors)?;
        }
        let vectors = vectors.to_vec2::<f32>()?;
        let finite = vectors.iter().flatten().all(|value| value.is_finite());
        ensure!(
            finite,
            "{}: its weights make values that are not finite; download or copy it again",
            self.path.display()
        );
        Ok(vectors)
    }
}

/// Returns which texts of these lengths are embedded together: texts of one length, the shortest first.
fn passes(lengths: &[usize]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|text| lengths[*text]);
    let same = order.chunk_by(|a, b| lengths[*a] == lengths[*b]);
    let passes = same.flat_map(|texts| texts.chunks((PASS_TOKENS / lengths[texts[0]].max(1)).max(1)));
    passes.map(<[usize]>::to_vec).collect()
}
