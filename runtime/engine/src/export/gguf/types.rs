//! Which storage each tensor of a file has: llama.cpp's rules for its mixes, `llama_tensor_get_type` of `llama-quant.cpp`, without an
//! importance matrix.

use std::str::FromStr;

use anyhow::{Error, Result};
use homeroom_kernels::Storage;

use crate::files::gguf::NewTensor;
use crate::words::value_of;

/// What a GGUF file's weights are stored in; llama.cpp calls it the file's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// 32 bits: nothing is lost.
    F32,
    /// 16 bits, 11 of them of precision.
    F16,
    /// 16 bits, 8 of them of precision.
    Bf16,
    /// 8 bits, and a scale for 32 values.
    Q8_0,
    /// 4 bits, and a scale for 32 values.
    Q4_0,
    /// 5 bits, in blocks of 256 with scales and least values; 6 in the matrices that matter most.
    Q5KM,
    /// The same in 4 bits.
    Q4KM,
    /// 6 bits, in blocks of 256 with scales.
    Q6K,
}

/// The words of `--dtype`, and their types.
const WORDS: [(&str, FileType); 8] = [
    ("f32", FileType::F32),
    ("f16", FileType::F16),
    ("bf16", FileType::Bf16),
    ("q8_0", FileType::Q8_0),
    ("q4_0", FileType::Q4_0),
    ("q5_k_m", FileType::Q5KM),
    ("q4_k_m", FileType::Q4KM),
    ("q6_k", FileType::Q6K),
];

impl FromStr for FileType {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let longer = [("float32", Self::F32), ("float16", Self::F16), ("bfloat16", Self::Bf16)];
        value_of(word, &[&WORDS[..], &longer].concat())
    }
}

impl FileType {
    /// Its word.
    pub fn name(self) -> &'static str {
        WORDS.iter().find(|(_, kind)| *kind == self).map_or("", |(word, _)| word)
    }

    /// Its number in `general.file_type`, from `llama_ftype` in llama.cpp's `llama.h`.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    /// What most matrices are stored in.
    fn usual(self) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::F16 => Storage::F16,
            Self::Bf16 => Storage::BF16,
            Self::Q8_0 => Storage::Q8_0,
            Self::Q4_0 => Storage::Q4_0,
            Self::Q5KM => Storage::Q5K,
            Self::Q4KM => Storage::Q4K,
            Self::Q6K => Storage::Q6K,
        }
    }
}

/// A matrix whose rows are no whole blocks of what it would be stored in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// Its name.
    pub tensor: String,
    /// What it would be stored in.
    pub wanted: Storage,
    /// What it is stored in.
    pub stored: Storage,
}

/// Gives all matrices among the tensors their storages; vectors keep theirs. Returns those whose rows are no whole blocks.
///
/// `seventy`: whether it is what llama.cpp takes for a 70B model, whose values are shared by eight heads.
pub(super) fn choose(kind: FileType, tensors: &mut [NewTensor], layers: usize, seventy: bool) -> Vec<Fallback> {
    let tied = !tensors.iter().any(|tensor| tensor.name == "output.weight");
    let mixed = matches!(kind, FileType::Q4KM | FileType::Q5KM);
    let quantized = !matches!(kind, FileType::F32 | FileType::F16 | FileType::Bf16);
    // Counted as they come, as there: all layers have one of each.
    let (mut values, mut downs) = (0, 0);
    let more = |layer: usize| layer < layers / 8 || layer >= 7 * layers / 8 || layer.wrapping_sub(layers / 8) % 3 == 2;
    let mut fallbacks = Vec::new();
    for tensor in tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
        let cols = tensor.shape[1];
        let name = tensor.name.as_str();
        let mut wanted = kind.usual();
        let is_output = name == "output.weight" || tied && name == "token_embd.weight";
        if quantized && is_output {
            wanted = match wanted {
                usual if !cols.is_multiple_of(usual.block_len()) => Storage::Q8_0,
                Storage::Q8_0 => Storage::Q8_0,
                _ => Storage::Q6K,
            };
        } else if name.ends_with("attn_v.weight") || name.ends_with("attn_qkv.weight") {
            if mixed && more(values) {
                wanted = Storage::Q6K;
            }
            if seventy && wanted == Storage::Q4K {
                wanted = Storage::Q5K;
            }
            values += 1;
        } else if name.ends_with("ffn_down.weight") {
            if mixed && more(downs) {
                wanted = Storage::Q6K;
            }
            downs += 1;
        }
        tensor.storage = fitting(wanted, cols);
        if tensor.storage != wanted {
            fallbacks.push(Fallback { tensor: tensor.name.clone(), wanted, stored: tensor.storage });
        }
    }
    fallbacks
}

/// The storage for rows of so many values: where they are no whole blocks of 256, blocks of 32 with a bit more each, else f16.
fn fitting(wanted: Storage, cols: usize) -> Storage {
    if cols.is_multiple_of(wanted.block_len()) {
        return wanted;
    }
    let shorter = match wanted {
        Storage::Q4K => Storage::Q5_0,
        Storage::Q5K => Storage::Q5_1,
        _ => Storage::Q8_0,
    };
    if cols.is_multiple_of(shorter.block_len()) { shorter } else { Storage::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(layers: usize, cols: usize, tied: bool) -> Vec<NewTensor> {
        let matrix = |name: String| NewTensor { name, shape: vec![512, cols], storage: Storage::F32 };
        let mut all = vec![matrix("token_embd.weight".to_owned())];
        for layer in 0..layers {
            all.extend(["attn_q", "attn_v", "ffn_down"].map(|name| matrix(format!("blk.{layer}.{name}.weight"))));
            all.push(NewTensor { shape: vec![cols], ..matrix(format!("blk.{layer}.attn_norm.weight")) });
        }
        if !tied {
            all.push(matrix("output.weight".to_owned()));
        }
        all
    }

    fn stored(kind: FileType, tensors: &mut [NewTensor], layers: usize) -> impl Fn(&str) -> Storage + use<> {
        choose(kind, tensors, layers, layers == 80);
        let stored: Vec<(String, Storage)> = tensors.iter().map(|t| (t.name.clone(), t.storage)).collect();
        move |name| stored.iter().find(|(known, _)| known == name).expect("a tensor of this name").1
    }

    /// With 30 layers the first 3, from layer 26 on, and each third between them have more bits.
    #[test]
    fn a_mix_stores_some_layers_in_more_bits() {
        let more: Vec<usize> = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29].into();
        for (kind, usual) in [(FileType::Q4KM, Storage::Q4K), (FileType::Q5KM, Storage::Q5K)] {
            let mut all = tensors(30, 768, true);
            let stored = stored(kind, &mut all, 30);
            for layer in 0..30 {
                let wanted = if more.contains(&layer) { Storage::Q6K } else { usual };
                for part in ["attn_v", "ffn_down"] {
                    assert_eq!(stored(&format!("blk.{layer}.{part}.weight")), wanted, "{part} of layer {layer}");
                }
                assert_eq!(stored(&format!("blk.{layer}.attn_q.weight")), usual);
                assert_eq!(stored(&format!("blk.{layer}.attn_norm.weight")), Storage::F32);
            }
            assert_eq!(stored("token_embd.weight"), Storage::Q6K, "it is the head, too");
        }
        let stored = stored(FileType::Q4KM, &mut tensors(80, 768, false), 80);
        assert_eq!(stored("blk.10.attn_v.weight"), Storage::Q5K);
        assert_eq!(stored("blk.10.ffn_down.weight"), Storage::Q4K);
        assert_eq!((stored("token_embd.weight"), stored("output.weight")), (Storage::Q4K, Storage::Q6K));
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_stored_otherwise_and_said() {
        let mut all = tensors(8, 576, true);
        let fallbacks = choose(FileType::Q4KM, &mut all, 8, false);
        let of = |name: &str| fallbacks.iter().find(|fallback| fallback.tensor == name).map(|f| (f.wanted, f.stored));
        assert_eq!(of("blk.3.attn_q.weight"), Some((Storage::Q4K, Storage::Q5_0)));
        assert_eq!(of("blk.0.attn_v.weight"), Some((Storage::Q6K, Storage::Q8_0)));
        assert_eq!(of("token_embd.weight"), None, "it is given eight bits at once");
        assert_eq!(all[0].storage, Storage::Q8_0);
        assert_eq!(choose(FileType::Q8_0, &mut tensors(8, 576, true), 8, false), []);
        let odd = choose(FileType::Q8_0, &mut tensors(1, 30, false), 1, false);
        assert!(odd.len() == 5 && odd.iter().all(|fallback| fallback.stored == Storage::F16), "{odd:?}");
    }
}
