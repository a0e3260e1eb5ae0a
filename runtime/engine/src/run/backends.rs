//! The choice of a backend, by what is asked for and what the processor does best. Which blocks of it run fused is its own to decide.

use std::sync::Arc;

use candle_core::DType;
use homeroom_kernels::{bf16, isa};

use super::compute::Compute;
use super::cpu::{CpuAnswer, CpuTrain, InIntegers};
use super::plain::answer::PlainAnswer;
use super::plain::train::PlainTrain;
use super::waist::{Answer, Train};
use crate::adapt::adaptation::Adaptation;
use crate::models::BaseModel;

/// The backend for training, and for losses.
pub fn trainer(model: &BaseModel, adaptation: Option<&Adaptation>, compute: Compute) -> Box<dyn Train> {
    let f32_params = adaptation.iter().flat_map(|adaptation| &adaptation.params).all(|p| p.var.dtype() == DType::F32);
    let compute = compute.resolved(adaptation);
    if !f32_params || compute == Compute::Plain {
        return Box::new(PlainTrain::keeping_pages());
    }
    let integers = compute == Compute::Int8;
    // Beside integers few products are left, and bf16 halves what is kept.
    match compute == Compute::Bf16 || integers && isa().has_bf16() {
        true => Box::new(CpuTrain::<bf16>::new(model, adaptation, integers)),
        false => Box::new(CpuTrain::<f32>::new(model, adaptation, integers)),
    }
}

/// The backends for answers, the fastest first; the last one runs any adapter. Prompts are read in f32 or bf16, as `compute` says; if
/// it says anything but f32, tokens are decoded with activations in eight bits where weights take them so.
///
/// Prompts are read with such, too, where the processor does not multiply bf16: asked to choose, by weights in the whole numbers that they
/// are stored in, if those are faster than f32, which rounds no more than decoding does; asked for int8, also by weights that are rounded
/// anew where the processor multiplies bytes by fours, which costs more.
pub fn answerers(model: &Arc<BaseModel>, compute: Compute) -> Vec<Box<dyn Answer>> {
    // What a strategy proposes is for its training.
    let (blocks, round) = match compute {
        Compute::Auto => (Compute::auto(), true),
        Compute::F32 => (compute, false),
        _ => (compute, true),
    };
    let integers = match compute {
        Compute::Int8 if !isa().has_bf16() => InIntegers::Fastest,
        Compute::Auto if !isa().has_bf16() && isa().multiplies_stored() => InIntegers::Stored,
        _ => InIntegers::None,
    };
    let in_f32 = || Some(Box::new(CpuAnswer::<f32>::new(model, integers, round)?) as Box<dyn Answer>);
    let in_bf16 = || Some(Box::new(CpuAnswer::<bf16>::new(model, InIntegers::None, round)?) as Box<dyn Answer>);
    let fast = match blocks {
        Compute::Plain => None,
        Compute::Auto | Compute::F32 => in_f32(),
        Compute::Int8 if !isa().has_bf16() => in_f32(),
        Compute::Bf16 | Compute::Int8 => in_bf16().or_else(in_f32),
    };
    fast.into_iter().chain([Box::new(PlainAnswer::new(model.clone())) as Box<dyn Answer>]).collect()
}
