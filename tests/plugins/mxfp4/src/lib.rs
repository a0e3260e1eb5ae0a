//! LoRA over a base in MXFP4: blocks of 32 values of 4 bits that share a power of two. A code book over blocks cannot say it, as
//! its scales are floats; so the codec comes as functions.
//!
//! Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.3.3 and 6.3.

use homeroom_sdk::lora::Lora;
use homeroom_sdk::native::Codec;
use homeroom_sdk::prelude::*;

/// Magnitudes of E2M1.
const LEVELS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// Bias of the scale's exponent, E8M0.
const BIAS: i32 = 127;

struct Mxfp4;

impl Codec for Mxfp4 {
    const NAME: &'static str = "mxfp4";
    const BLOCK_LEN: usize = 32;
    const BLOCK_BYTES: usize = 17; // the exponent, then two values a byte

    fn encode(values: &[f32], bytes: &mut [u8]) {
        let largest = values.iter().fold(0_f32, |most, value| most.max(value.abs()));
        // The largest value gets the largest exponent of E2M1, which is 2.
        let exponent = if largest > 0.0 { (largest.log2().floor() as i32 - 2).max(-BIAS) } else { 0 };
        let scale = 2_f32.powi(exponent);
        bytes[0] = (exponent + BIAS) as u8;
        for (byte, pair) in bytes[1..].iter_mut().zip(values.chunks_exact(2)) {
            *byte = nearest(pair[0] / scale) | nearest(pair[1] / scale) << 4;
        }
    }

    fn decode(bytes: &[u8], values: &mut [f32]) {
        let scale = 2_f32.powi(i32::from(bytes[0]) - BIAS);
        let value = |index: u8| if index & 8 == 0 { scale } else { -scale } * LEVELS[usize::from(index & 7)];
        for (byte, pair) in bytes[1..].iter().zip(values.chunks_exact_mut(2)) {
            (pair[0], pair[1]) = (value(byte & 15), value(byte >> 4));
        }
    }
}

/// Index of the level nearest to a value: three bits of magnitude and a sign.
fn nearest(value: f32) -> u8 {
    let apart = |level: usize| (LEVELS[level] - value.abs()).abs();
    let level = (0..LEVELS.len()).min_by(|a, b| apart(*a).total_cmp(&apart(*b))).unwrap_or(0);
    level as u8 | if value < 0.0 { 8 } else { 0 }
}

struct OverMxfp4(Lora);

impl Strategy for OverMxfp4 {
    const NAME: &'static str = "mxfp4";
    const DOC: &'static str = "LoRA over a base in MXFP4";

    fn options(options: &mut Options) {
        Lora::options(options);
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self(Lora::new(values)?))
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        for module in model.matching(&Targets::AllLinear)? {
            // A row that is not a whole number of blocks stays as it is.
            if module.d_in.is_multiple_of(Mxfp4::BLOCK_LEN) {
                plan.store_natively::<Mxfp4>(module);
            }
        }
        self.0.plan(model, plan)
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        self.0.forward(module, x)
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        self.0.merged(module)
    }
}

export_strategy!(OverMxfp4, codec = Mxfp4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_powers_of_two_come_back_exactly() {
        let mut values = [0_f32; 32];
        for (i, value) in values.iter_mut().enumerate() {
            *value = LEVELS[i % 8] * if i < 16 { 0.25 } else { -0.25 };
        }
        let (mut bytes, mut back) = ([0; 17], [1_f32; 32]);
        Mxfp4::encode(&values, &mut bytes);
        Mxfp4::decode(&bytes, &mut back);
        assert_eq!(back, values);
        assert_eq!(bytes[0], 125);
    }
}
