//! What a reference model makes of answers. It does not change, so that it is computed once, before the first step, and kept beside the
//! run.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use sha2::{Digest, Sha256};

use crate::adapt::adaptation::Adaptation;
use crate::data::{Example, Unit};
use crate::files::mapped::whole;
use crate::files::{read_bytes, replace_file};
use crate::models::BaseModel;
use crate::run::backends::trainer;
use crate::run::batch::{Batch, pass_rows};
use crate::run::compute::Compute;
use crate::run::plain::recipe::Pass;
use crate::run::waist::Train;

/// The name of the tensor, (sequences), and of what it belongs to.
const LOG_PROBS: &str = "log_probs";
const KEY: &str = "key";

/// Log-probabilities of sequences under a reference, and what they were computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// A digest of the reference and of the sequences.
    pub key: String,
    /// Of each sequence the sum over its targets, in nats.
    pub log_probs: Vec<f64>,
}

impl Reference {
    /// A digest of what `base` names, the values that it is adapted by, the compute path, and the sequences with their targets.
    ///
    /// # Errors
    /// When the values cannot be read.
    pub fn key_of(base: &str, adaptation: Option<&Adaptation>, compute: &str, examples: &[&Example]) -> Result<String> {
        let mut hasher = Sha256::new();
        // Lengths first, so that nothing of one field can pass for another's.
        for text in [base, compute] {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        let params = adaptation.map_or(&[][..], |adaptation| &adaptation.params);
        hasher.update((params.len() as u64).to_le_bytes());
        if let Some(adaptation) = adaptation {
            hasher.update(serde_json::to_vec(&adaptation.plan)?);
        }
        for param in params {
            let values = param.var.as_detached_tensor().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            hasher.update((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| hasher.update(value.to_le_bytes()));
        }
        for example in examples {
            hasher.update((example.ids.len() as u64).to_le_bytes());
            for (id, trained) in example.ids.iter().zip(&example.trained) {
                hasher.update(id.to_le_bytes());
                hasher.update([u8::from(*trained)]);
            }
        }
        let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("sha256:{hex}"))
    }

    /// Reads those that were kept under this key; `None`: there is no file, or it is of other rows or another reference.
    ///
    /// # Errors
    /// When there is a file that cannot be read. One that is damaged is none.
    pub fn read(path: &Path, key: &str, count: usize) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_bytes(path, 1 << 30)?;
        let read = || -> Option<Vec<f64>> {
            let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
            let metadata = header.metadata().as_ref()?;
            let tensors = SafeTensors::deserialize(&bytes).ok()?;
            let tensor = tensors.tensor(LOG_PROBS).ok()?;
            let fits = metadata.get(KEY).is_some_and(|of| of == key);
            let fits = fits && tensor.dtype() == Dtype::F64 && tensor.shape() == [count];
            let values =
                tensor.data().chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().expect("8 bytes")));
            let values: Vec<f64> = values.collect();
            (fits && values.iter().all(|value| value.is_finite())).then_some(values)
        };
        Ok(read().map(|log_probs| Self { key: key.to_owned(), log_probs }))
    }

    /// Writes them, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes: Vec<u8> = self.log_probs.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = TensorView::new(Dtype::F64, vec![self.log_probs.len()], &bytes)?;
        let metadata = [(KEY.to_owned(), self.key.clone())].into();
        let bytes = serialize([(LOG_PROBS, tensor)], Some(metadata)).with_context(|| path.display().to_string())?;
        replace_file(path, &bytes)
    }
}

/// The log-probability of each sequence, the sum over its targets, under a base with an adapter or without: forward passes alone.
/// `progress` hears how many are done; an error of it ends them.
///
/// # Errors
/// When a tensor operation fails, a file of the base is gone, or a sum is not finite.
pub fn reference_log_probs(
    model: &BaseModel,
    adaptation: Option<&Adaptation>,
    examples: &[&Example],
    compute: Compute,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<f64>> {
    let pass = Pass::evaluation(model, adaptation);
    let mut backend = trainer(model, adaptation, compute);
    let units: Vec<Unit> = examples.iter().map(|example| Unit::of(0, example)).collect();
    let out = sequence_log_probs(&mut *backend, &pass, &units, progress)?;
    whole()?;
    ensure!(
        out.iter().all(|sum| sum.is_finite()),
        "the reference's log-probabilities are not finite: the model's numbers overflow, or its weights are damaged"
    );
    Ok(out)
}

/// The log-probability of each sequence of some units, in order.
pub(in crate::train) fn sequence_log_probs(
    backend: &mut dyn Train,
    pass: &Pass<'_>,
    units: &[Unit<'_>],
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<f64>> {
    let mut out = Vec::with_capacity(units.len());
    for batch in Batch::packed(units, pass_rows(pass.model)) {
        let log_probs = backend.log_probs(pass, &batch)?.values;
        out.extend(batch.sequence_targets.iter().map(|targets| super::sum(&log_probs[targets.clone()])));
        progress(out.len())?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_under_its_key_alone() -> Result<()> {
        let place = tempfile::tempdir()?;
        let path = place.path().join("reference.safetensors");
        let example = |ids: &[u32], last: bool| Example::new(ids.to_vec(), vec![false, true, last], 1);
        let (a, b) = (example(&[1, 2, 3], true), example(&[1, 2, 3], false));
        let key = Reference::key_of("base", None, "f32", &[&a, &b])?;
        for other in [
            Reference::key_of("base2", None, "f32", &[&a, &b])?,
            Reference::key_of("base", None, "bf16", &[&a, &b])?,
            Reference::key_of("basef", None, "32", &[&a, &b])?,
            Reference::key_of("base", None, "f32", &[&b, &a])?,
            Reference::key_of("base", None, "f32", &[&a, &b, &b])?,
        ] {
            assert_ne!(other, key);
        }
        assert_eq!(Reference::read(&path, &key, 2)?, None);
        let reference = Reference { key: key.clone(), log_probs: vec![-1.0 / 3.0, -1e300] };
        reference.write(&path)?;
        assert_eq!(Reference::read(&path, &key, 2)?, Some(reference));
        assert_eq!(Reference::read(&path, &key, 3)?, None);
        assert_eq!(Reference::read(&path, "sha256:other", 2)?, None);
        std::fs::write(&path, b"damaged")?;
        assert_eq!(Reference::read(&path, &key, 2)?, None);
        Ok(())
    }
}
