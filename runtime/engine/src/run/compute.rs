//! What products are computed in.

use std::str::FromStr;

use anyhow::{Error, Result};
use homeroom_kernels::isa;
use serde::Serialize;

use crate::adapt::adaptation::Adaptation;
use crate::words::value_of;

/// What products are computed in, and whether blocks are fused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Plain blocks, in the type of the parameters: the reference.
    Plain,
    /// What the strategy proposes, else [`Compute::auto`], which also stands for integers where these are slower.
    Auto,
    /// Fused blocks, in f32.
    F32,
    /// Fused blocks: activations and products in bf16 with sums, norms and softmax in f32.
    Bf16,
    /// The same, f32 where the processor does not multiply bf16, and products with frozen weights in integers where that is possible.
    Int8,
}

impl Compute {
    /// The faster type of floats on this processor: bf16 or f32.
    pub fn auto() -> Self {
        if isa().prefers_bf16() { Self::Bf16 } else { Self::F32 }
    }

    /// What [`Compute::Auto`] comes to with an adaptation; any other is itself.
    pub fn resolved(self, adaptation: Option<&Adaptation>) -> Self {
        self.resolved_for(adaptation.and_then(|adaptation| adaptation.plan.defaults.compute_dtype.as_deref()))
    }

    /// The same with what a plan proposes.
    pub fn resolved_for(self, proposed: Option<&str>) -> Self {
        match (self, proposed) {
            (Self::Auto, Some("f32")) => Self::F32,
            (Self::Auto, Some("int8")) if isa().prefers_integers() => Self::Int8,
            (Self::Auto, _) => Self::auto(),
            (other, _) => other,
        }
    }

    /// Its name, as options and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// `plain` is no word: it is the reference, and for tests alone.
impl FromStr for Compute {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let known = [Self::Auto, Self::Bf16, Self::F32, Self::Int8];
        value_of(word, &known.map(|compute| (compute.name(), compute)))
    }
}
