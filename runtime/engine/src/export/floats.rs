//! The floats that a model is written in.

use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};
use homeroom_kernels::{Storage, bf16, f16};
use safetensors::Dtype;

use crate::models::{BaseModel, EMBEDDING};
use crate::words::value_of;

/// Floats that a model is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floats {
    /// 32 bits: nothing is lost.
    F32,
    /// 16 bits, 11 of them of precision.
    F16,
    /// 16 bits, 8 of them of precision: a change of a weight by less than a 500th is lost.
    Bf16,
}

impl FromStr for Floats {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let known = [
            ("f32", Self::F32),
            ("f16", Self::F16),
            ("bf16", Self::Bf16),
            ("float32", Self::F32),
            ("float16", Self::F16),
            ("bfloat16", Self::Bf16),
        ];
        value_of(word, &known)
    }
}

impl Floats {
    /// Those that a base is stored in; f32 where it is quantised.
    ///
    /// # Errors
    /// When it has no embedding.
    pub fn of(base: &BaseModel) -> Result<Self> {
        let embedding = base.module_index(EMBEDDING).context("a model has an embedding")?;
        Ok(match base.modules[embedding].weight.storage() {
            Storage::F16 => Self::F16,
            Storage::BF16 => Self::Bf16,
            _ => Self::F32,
        })
    }

    /// Their storage.
    pub(super) fn storage(self) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::F16 => Storage::F16,
            Self::Bf16 => Storage::BF16,
        }
    }

    /// Their name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Their name in a safetensors file.
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Appends values as bytes; refuses those that only infinity would stand for.
///
/// # Errors
/// Names the value.
pub(super) fn encode(values: &[f32], floats: Floats, bytes: &mut Vec<u8>) -> Result<()> {
    let narrowed = |value: f32| match floats {
        Floats::F16 => f16::from_f32(value).to_f32(),
        Floats::Bf16 => bf16::from_f32(value).to_f32(),
        Floats::F32 => value,
    };
    if let Some(value) = values.iter().find(|value| value.is_finite() && !narrowed(**value).is_finite()) {
        let name = floats.name();
        bail!("{value} is beyond what {name} holds; `--dtype f32` holds it, and bf16 all but the largest of f32");
    }
    match floats {
        Floats::F16 => bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        Floats::Bf16 => bytes.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        Floats::F32 => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(values: &[f32], floats: Floats) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        encode(values, floats, &mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn a_number_is_never_written_as_infinity() {
        for (value, floats) in [(70_000.0, Floats::F16), (-1e6, Floats::F16), (f32::MAX, Floats::Bf16)] {
            let error = encoded(&[1.0, value], floats).unwrap_err().to_string();
            assert!(error.contains(floats.name()) && error.contains("--dtype f32"), "{error}");
        }
        assert_eq!(encoded(&[65_504.0, f32::INFINITY], Floats::F16).unwrap(), [0xFF, 0x7B, 0x00, 0x7C]);
        assert_eq!(encoded(&[f32::MAX], Floats::F32).unwrap(), f32::MAX.to_le_bytes());
    }
}
