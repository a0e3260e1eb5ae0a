//! Weights as bitsandbytes saves them: 4 bits in blocks (`*-bnb-4bit` repositories), or 8 bits by rows.
//!
//! A 4-bit weight `W` is bytes, two indices each, with `W.absmax`, `W.quant_map` and `W.quant_state.bitsandbytes__nf4` beside
//! it, and under double quantisation `W.nested_absmax` and `W.nested_quant_map`. An 8-bit one is signed bytes with the largest
//! magnitude of each row as `SCB`. Source: `QuantState.as_dict` and `Linear8bitLt._save_to_state_dict`,
//! <https://github.com/bitsandbytes-foundation/bitsandbytes>.

use anyhow::{Context, Result, ensure};
use homeroom_kernels::{Codec, CodecBlock, EncodedScales, ScaleStorage};
use serde::Deserialize;

use crate::files::tensors::{MappedTensor, Tensors};
use crate::models::weight::{Codes, Weight};

/// `W.quant_state.bitsandbytes__nf4`, a text in bytes.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// Ending of the tensor that holds a [`State`].
const STATE: &str = "quant_state.bitsandbytes__nf4";

/// The weight of that name, with the names of the tensors that belong to it; `None` when it is nothing of bitsandbytes'.
///
/// # Errors
/// When a part is missing or of another size, or it is quantised in a way that is not run here.
pub(crate) fn weight(tensors: &Tensors, name: &str, shape: &[usize]) -> Result<Option<(Weight, Vec<String>)>> {
    let (Some(tensor), [rows, cols]) = (tensors.get(name), shape) else { return Ok(None) };
    if tensors.contains_key(&format!("{name}.{STATE}")) {
        return four_bits(tensors, name, tensor, (*rows, *cols)).map(Some);
    }
    let four_bit = |key: &&String| key.starts_with(name) && key.contains(".quant_state.");
    if let Some(other) = tensors.keys().find(four_bit) {
        anyhow::bail!("`{other}`: of bitsandbytes' types of 4 bits nf4 is run here");
    }
    match name.strip_suffix("weight").map(|stem| format!("{stem}SCB")) {
        Some(scales) if tensors.contains_key(&scales) => eight_bits(tensors, scales, tensor, (*rows, *cols)).map(Some),
        _ => Ok(None),
    }
}

fn four_bits(
    tensors: &Tensors,
    name: &str,
    tensor: &MappedTensor,
    (rows, cols): (usize, usize),
) -> Result<(Weight, Vec<String>)> {
    let mut parts = Vec::new();
    let mut part = |ending: &str| {
        let full = format!("{name}.{ending}");
        let found = tensors.get(&full).with_context(|| format!("its `{ending}` is missing"))?;
        parts.push(full);
        Ok::<_, anyhow::Error>(found)
    };
    let state: State =
        serde_json::from_slice(part(STATE)?.bytes()).context("its state is not as bitsandbytes has it")?;
    ensure!(
        state.quant_type == "nf4",
        "it is `{}`; of bitsandbytes' types of 4 bits nf4 is run here",
        state.quant_type
    );
    ensure!(state.shape == [rows, cols], "it is {:?}, it should be {:?}", state.shape, [rows, cols]);
    let code = part("quant_map")?.values()?;
    let absmax = part("absmax")?;
    let (storage, scales) = match state.nested_blocksize {
        None => (ScaleStorage::F32, EncodedScales::F32(absmax.values()?)),
        Some(block) => {
            let storage = ScaleStorage::Nested { block, code: part("nested_quant_map")?.values()? };
            let offset = state.nested_offset.context("its state has no `nested_offset`")?;
            let codes = absmax.bytes().to_vec();
            (storage, EncodedScales::Nested { codes, absmax: part("nested_absmax")?.values()?, offset })
        }
    };
    let block = CodecBlock::Flat(state.blocksize);
    let codec = Codec { name: "nf4".to_owned(), bits: 4, block, code, scales: storage };
    let codes = Codes::Mapped(tensor.map.clone(), tensor.range.clone());
    Ok((Weight::coded(codec, codes, scales, (rows, cols))?, parts))
}

fn eight_bits(
    tensors: &Tensors,
    scales: String,
    tensor: &MappedTensor,
    (rows, cols): (usize, usize),
) -> Result<(Weight, Vec<String>)> {
    ensure!(tensor.shape == [rows, cols], "it is {:?}, it should be {:?}", tensor.shape, [rows, cols]);
    let format = scales.replace("SCB", "weight_format");
    // 0: rows one after the other. The others are layouts of old GPUs.
    if let Some(layout) = tensors.get(&format) {
        ensure!(layout.bytes() == [0], "`{format}` is {:?}; the layout `row`, 0, is read here", layout.bytes());
    }
    let largest = tensors[&scales].values()?;
    ensure!(!tensor.bytes().contains(&0x80), "it holds -128, which bitsandbytes does not write");
    // Index i stands for i - 127.
    let codes = Codes::Owned(tensor.bytes().iter().map(|byte| byte.wrapping_add(127)).collect());
    let parts = vec![scales, format];
    Ok((Weight::coded(Codec::int8(), codes, EncodedScales::F32(largest), (rows, cols))?, parts))
}
