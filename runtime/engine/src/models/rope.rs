//! Rotary position embedding: the frequencies by which positions turn the channels of a head, and how they are stretched for
//! contexts longer than the first training's.
//!
//! Sources: Su et al. 2021, <https://arxiv.org/abs/2104.09864>; YaRN, <https://arxiv.org/abs/2309.00071>; LongRoPE,
//! <https://arxiv.org/abs/2402.13753>. The numbers are those of transformers' `modeling_rope_utils`.

use std::f64::consts::{PI, TAU};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How positions turn heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Channels of a head that turn, the first ones: channel i with channel i + dims / 2.
    pub dims: usize,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All are divided by `factor`.
    Linear { factor: f64 },
    /// θ grows with a sequence that is longer than `original`.
    Dynamic { factor: f64, original: f64 },
    /// Llama 3.1's: low frequencies, of wavelengths above `original / low_freq_factor`, are divided by `factor`, high ones, below
    /// `original / high_freq_factor`, stay, those between are blended.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original: f64 },
    /// Low frequencies are divided by `factor`, high ones stay; a ramp over the channels lies between.
    Yarn(Yarn),
    /// Divisors (dims / 2) for sequences of up to `original` tokens, and others for longer ones.
    LongRope { short: Vec<f32>, long: Vec<f32>, original: usize, attention_factor: f64 },
    /// Divisors (dims / 2), as GGUF files store Llama 3's.
    Divisors(Vec<f32>),
}

/// The numbers of YaRN.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Yarn {
    pub factor: f64,
    pub original: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// Whether the ramp begins and ends at whole channels.
    pub truncate: bool,
    pub attention_factor: f64,
}

impl Rope {
    /// Which frequencies a sequence of so many tokens takes. Sequences of one number are turned alike; most ropes have one.
    pub fn set(&self, length: usize) -> usize {
        match &self.scaling {
            RopeScaling::LongRope { original, .. } => usize::from(length > *original),
            RopeScaling::Dynamic { original, .. } => length.max(*original as usize),
            _ => 0,
        }
    }

    /// Whether a sequence that grew from `before` tokens to `now` is to be turned otherwise from its first token on. (What NTK's
    /// frequencies were at a position they stay.)
    pub fn is_outgrown(&self, before: usize, now: usize) -> bool {
        matches!(self.scaling, RopeScaling::LongRope { .. }) && self.set(before) != self.set(now)
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            RopeScaling::LongRope { attention_factor, .. } => *attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Frequencies of a [`Rope::set`], one for each pair of channels, in radians a position.
    pub fn frequencies(&self, set: usize) -> Vec<f32> {
        // f32 as transformers computes them, so that angles at far positions agree.
        let powers = |theta: f32| {
            let exponent = move |i: usize| (2 * i) as f32 / self.dims as f32;
            (0..self.dims / 2).map(move |i| theta.powf(exponent(i)))
        };
        let plain = powers(self.theta as f32).map(|power| 1.0 / power);
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / *factor as f32).collect(),
            RopeScaling::Dynamic { factor, original } => {
                let (dims, length) = (self.dims as f64, (set as f64).max(*original));
                let stretch = factor * length / original - (factor - 1.0);
                let theta = self.theta * stretch.powf(dims / (dims - 2.0));
                powers(theta as f32).map(|power| 1.0 / power).collect()
            }
            RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, divisor)| f / divisor).collect(),
            RopeScaling::LongRope { short, long, .. } => {
                let divisors = if set == 0 { short } else { long };
                powers(self.theta as f32).zip(divisors).map(|(power, divisor)| 1.0 / (divisor * power)).collect()
            }
            RopeScaling::Yarn(yarn) => {
                let ramp = yarn.ramp(self.theta, self.dims);
                let divided = powers(self.theta as f32).map(|power| 1.0 / (yarn.factor as f32 * power));
                plain.zip(divided).zip(ramp).map(|((kept, divided), r)| divided * r + kept * (1.0 - r)).collect()
            }
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => plain
                .map(|frequency| {
                    let wavelength = TAU / f64::from(frequency);
                    if wavelength > original / low_freq_factor {
                        (f64::from(frequency) / factor) as f32
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        let f = f64::from(frequency);
                        ((1.0 - kept) * f / factor + kept * f) as f32
                    }
                })
                .collect(),
        }
    }

    /// Refuses what makes no frequencies.
    pub(super) fn check(&self) -> Result<()> {
        let theta = self.theta as f32;
        ensure!(theta >= 1.0 && theta.is_finite(), "`rope_theta` = {}; it is a number from 1", self.theta);
        ensure!(
            self.dims.is_multiple_of(2) && self.dims >= 2,
            "rotating {} channels of a head is not possible",
            self.dims
        );
        let half = self.dims / 2;
        let divisors = match &self.scaling {
            RopeScaling::Divisors(divisors) => vec![divisors],
            RopeScaling::LongRope { short, long, .. } => vec![short, long],
            _ => Vec::new(),
        };
        for divisors in divisors {
            ensure!(divisors.len() == half, "{} rope divisors for {half} frequencies", divisors.len());
            ensure!(divisors.iter().all(|d| d.is_finite() && *d > 0.0), "a rope divisor is not positive");
        }
        ensure!(
            !matches!(self.scaling, RopeScaling::Dynamic { .. }) || self.dims > 2,
            "rope type `dynamic` needs more than 2 channels that turn"
        );
        let sound = |frequency: &f32| frequency.is_finite() && *frequency >= 0.0;
        ensure!(
            [0, 1].iter().all(|set| self.frequencies(*set).iter().all(sound)) && self.attention_factor().is_finite(),
            "its rope scaling, {:?}, makes frequencies that are no numbers",
            self.scaling
        );
        Ok(())
    }

    /// The scaling that a GGUF file's divisors were computed from: the converter writes those of `llama3` only, and keeps none of its
    /// numbers. What is found makes the same frequencies to f32 rounding.
    pub(super) fn scaling_of_divisors(&self) -> Option<RopeScaling> {
        let RopeScaling::Divisors(divisors) = &self.scaling else { return None };
        let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
        // Llama 3.1 to 3.3 have 1, 4 and 8192.
        let originals = [8192.0].into_iter().chain((5..21).map(|power| f64::from(1 << power)));
        let llama3 = |original| RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original };
        let wanted = self.frequencies(0);
        let equals = |scaling: &RopeScaling| {
            let found = Self { scaling: scaling.clone(), ..self.clone() }.frequencies(0);
            found.iter().zip(&wanted).all(|(found, wanted)| (found - wanted).abs() <= 1e-5 * wanted)
        };
        [RopeScaling::None].into_iter().chain(originals.map(llama3)).find(equals)
    }
}

impl Yarn {
    /// 0 where a frequency stays, 1 where it is divided: (dims / 2).
    fn ramp(&self, theta: f64, dims: usize) -> impl Iterator<Item = f32> {
        let turns = |rotations: f64| dims as f64 * (self.original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (turns(self.beta_fast), turns(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..dims / 2).map(move |i| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0))
    }
}

impl RopeScaling {
    /// Reads `rope_parameters`, or the older `rope_scaling`, of a model with this context.
    ///
    /// # Errors
    /// When it is of an unknown type, or a number of it is missing.
    pub fn of(rope: &Value, context: usize) -> Result<Self> {
        ensure!(rope.is_object(), "its rope scaling is {rope}, not an object");
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).filter(|kind| !kind.is_null());
        let kind = kind
            .map(|kind| kind.as_str().with_context(|| format!("its rope type is {kind}, not a text")))
            .transpose()?;
        let given = |key: &str| rope.get(key).filter(|value| !value.is_null());
        let number_or = |key: &str, default: Option<f64>| {
            let value = given(key).map_or(default, Value::as_f64);
            value.filter(|value| *value > 0.0 && (*value as f32).is_finite()).with_context(|| {
                format!("rope type `{}` needs the number `{key}`, above zero", kind.unwrap_or("default"))
            })
        };
        let number = |key: &str| number_or(key, None);
        let original = || number_or("original_max_position_embeddings", Some(context as f64));
        match kind {
            None if given("factor").is_some() => {
                bail!("its rope scaling has a `factor` and no type; known types are {KINDS}")
            }
            None | Some("default") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: number("factor")? }),
            Some("dynamic") => {
                let factor = number("factor")?;
                ensure!(factor >= 1.0, "rope type `dynamic` has the factor {factor}, which is below 1");
                Ok(Self::Dynamic { factor, original: context as f64 })
            }
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                ensure!(high > low, "`high_freq_factor` = {high} is not above `low_freq_factor` = {low}");
                Ok(Self::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original: number("original_max_position_embeddings")?,
                })
            }
            Some("yarn") => {
                let (original, ratio) = (original()?, given("factor").is_none());
                let factor = if ratio { context as f64 / original } else { number("factor")? };
                let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                let scales = ["mscale", "mscale_all_dim"].map(|key| given(key).and_then(Value::as_f64).unwrap_or(0.0));
                let usual = match scales {
                    [all, each] if all != 0.0 && each != 0.0 => mscale(all) / mscale(each),
                    _ => mscale(1.0),
                };
                Ok(Self::Yarn(Yarn {
                    factor,
                    original,
                    beta_fast: number_or("beta_fast", Some(32.0))?,
                    beta_slow: number_or("beta_slow", Some(1.0))?,
                    // What Python takes for false is, null as well.
                    truncate: rope
                        .get("truncate")
                        .is_none_or(|t| t == &Value::Bool(true) || t.as_f64().is_some_and(|t| t != 0.0)),
                    attention_factor: number_or("attention_factor", Some(usual))?,
                }))
            }
            Some("longrope") => {
                let divisors = |key: &str| -> Result<Vec<f32>> {
                    let list = given(key).and_then(Value::as_array);
                    let list = list.with_context(|| format!("rope type `longrope` needs the list `{key}`"))?;
                    let values = list.iter().map(|value| value.as_f64().map(|value| value as f32));
                    values.collect::<Option<_>>().with_context(|| format!("`{key}` holds what is no number"))
                };
                let original = original()?;
                let factor = number_or("factor", Some(context as f64 / original))?;
                let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                Ok(Self::LongRope {
                    short: divisors("short_factor")?,
                    long: divisors("long_factor")?,
                    original: original as usize,
                    attention_factor: number_or("attention_factor", Some(usual))?,
                })
            }
            Some(kind) => bail!("unknown rope type `{kind}`; known are {KINDS}"),
        }
    }

    /// `rope_scaling` of a `config.json`; `None`: it has no form there.
    pub(crate) fn to_json(&self) -> Option<Value> {
        Some(match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": *original as u64,
            }),
            Self::Yarn(yarn) => json!({
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original as u64,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
                "attention_factor": yarn.attention_factor,
            }),
            Self::LongRope { short, long, original, attention_factor } => json!({
                "rope_type": "longrope",
                "short_factor": short,
                "long_factor": long,
                "original_max_position_embeddings": original,
                "attention_factor": attention_factor,
            }),
            Self::Divisors(_) => return None,
        })
    }
}

/// Types that are known.
const KINDS: &str = "default, linear, dynamic, llama3, yarn, longrope";

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequencies and factors as `tests/fixtures/rope_frequencies.py` prints them: θ = 1234.5, 10 channels.
    #[test]
    fn frequencies_equal_those_of_transformers() {
        let short = json!([1.0, 1.1, 1.3, 1.7, 2.3]);
        let long = json!([1.2, 1.9, 3.3, 4.7, 6.1]);
        let (ones, twos) = (json!([1, 1, 1, 1, 1]), json!([2, 2, 2, 2, 2]));
        let yarn = [1.0, 0.15481614, 0.016570495, 0.003990591, 0.00096103456];
        let doubled = [0.5, 0.12041255, 0.028998367, 0.0069835344, 0.0016818106];
        // Rope, context, length of the sequence, frequencies, attention factor.
        let cases = [
            (
                json!({"rope_type": "linear", "factor": 3.7}),
                [37, 43],
                [0.27027026, 0.065087862, 0.015674792, 0.0037748835, 0.00090908678],
                1.0,
            ),
            (
                json!({"rope_type": "dynamic", "factor": 2.3}),
                [37, 43],
                [1.0, 0.22247759, 0.049496278, 0.011011812, 0.0024498818],
                1.0,
            ),
            (
                json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
                [128, 128],
                [1.0, 0.15051569, 0.014499184, 0.0034917672, 0.0008409053],
                1.138629436111989,
            ),
            (
                json!({
                    "rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 37,
                    "beta_fast": 7.0, "beta_slow": 1.5, "truncate": false,
                }),
                [131, 131],
                [1.0, 0.068807177, 0.016570495, 0.003990591, 0.00096103456],
                1.125276296849537,
            ),
            (
                json!({"rope_type": "yarn", "factor": 0.7, "original_max_position_embeddings": 37}),
                [131, 131],
                [1.0, 0.29243049, 0.082852475, 0.019952955, 0.0048051728],
                1.0,
            ),
            (
                json!({
                    "rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 37,
                    "mscale": 1.3, "mscale_all_dim": 0.6,
                }),
                [131, 131],
                yarn,
                1.0815626851041071,
            ),
            (
                json!({
                    "rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 37,
                    "attention_factor": 1.25,
                }),
                [131, 131],
                yarn,
                1.25,
            ),
            (
                json!({
                    "rope_type": "longrope", "original_max_position_embeddings": 31,
                    "short_factor": short, "long_factor": long,
                }),
                [131, 31],
                [1.0, 0.2189319, 0.044612873, 0.0082159229, 0.001462444],
                1.1915074520983346,
            ),
            (
                json!({
                    "rope_type": "longrope", "original_max_position_embeddings": 31,
                    "short_factor": short, "long_factor": long,
                }),
                [131, 32],
                [0.83333331, 0.12675007, 0.017574769, 0.0029717167, 0.00055141328],
                1.1915074520983346,
            ),
            (
                json!({
                    "rope_type": "longrope", "original_max_position_embeddings": 31, "factor": 9.0,
                    "short_factor": ones, "long_factor": twos,
                }),
                [131, 32],
                doubled,
                1.2805649011568654,
            ),
            (
                json!({
                    "type": "longrope", "original_max_position_embeddings": 31,
                    "short_factor": ones, "long_factor": twos,
                }),
                [31, 32],
                doubled,
                1.0,
            ),
            (
                json!({
                    "rope_type": "llama3", "factor": 7.0, "low_freq_factor": 1.2, "high_freq_factor": 3.9,
                    "original_max_position_embeddings": 67,
                }),
                [131, 131],
                [1.0, 0.13899124, 0.0082852477, 0.0019952955, 0.00048051731],
                1.0,
            ),
        ];
        for (json, [context, length], frequencies, factor) in cases {
            let scaling = RopeScaling::of(&json, context).unwrap();
            let rope = Rope { theta: 1234.5, dims: 10, scaling };
            rope.check().unwrap();
            for (got, want) in rope.frequencies(rope.set(length)).into_iter().map(f64::from).zip(frequencies) {
                assert!((got - want).abs() <= 3e-7 * want, "{json}: {got}, transformers has {want}");
            }
            assert!((f64::from(rope.attention_factor()) - factor).abs() < 1e-7, "{json}: {}", rope.attention_factor());
            // What is written of it is read as the same.
            let written = rope.scaling.to_json().unwrap();
            assert_eq!(RopeScaling::of(&written, context).unwrap(), rope.scaling, "{written}");
        }
    }

    /// Up to the context that it was trained with, a dynamic rope is the plain one.
    #[test]
    fn sequences_within_the_context_take_one_set_of_frequencies() {
        let rope = |json: Value| Rope { theta: 1e4, dims: 6, scaling: RopeScaling::of(&json, 37).unwrap() };
        let dynamic = rope(json!({"rope_type": "dynamic", "factor": 2.0}));
        assert_eq!([1, 36, 37, 38, 74].map(|length| dynamic.set(length)), [37, 37, 37, 38, 74]);
        assert_eq!(dynamic.frequencies(37), rope(json!({})).frequencies(0));
        assert_ne!(dynamic.frequencies(38), dynamic.frequencies(37));
    }
}
