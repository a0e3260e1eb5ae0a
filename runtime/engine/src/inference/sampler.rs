//! The sampler: one token out of the logits after a sequence.
//!
//! In the order of transformers' `generate`: penalties, temperature, top-k, top-p, min-p, then a draw. Nothing is sorted: each step
//! passes over the vocabulary a few times, whatever the logits are.

use std::cmp::Ordering;
use std::collections::HashMap;

use anyhow::{Result, ensure};
use homeroom_kernels::{Stream, softmax_weights};

use super::constraint::{Constraint, MASKED};
use crate::inference::generate::Sampling;

/// Below this a temperature is 0: dividing logits by less overflows.
const TEMPERATURE_MIN: f64 = 1e-6;
/// The least logit of a token that a constraint lets pass.
const LEAST: f32 = MASKED / 10.0;
/// The domain of the draws' random numbers.
const DRAWS: u64 = 0x6472_6177;
/// Draws the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: Stream,
    /// How often each token was drawn; a token of the prompt alone has 0. Empty unless there is a penalty.
    seen: HashMap<u32, u32>,
    /// Added to the logits of tokens.
    bias: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`.
    ///
    /// # Errors
    /// When a number of `sampling` is not in its range.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Result<Self> {
        let Sampling { temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty, .. } =
            sampling;
        ensure!(temperature.is_finite() && temperature >= 0.0, "the temperature is not a number from 0");
        ensure!((0.0..=1.0).contains(&top_p), "top_p is not a number from 0 to 1");
        ensure!((0.0..=1.0).contains(&min_p), "min_p is not a number from 0 to 1");
        ensure!(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "the repetition penalty is not a number above 0"
        );
        for penalty in [frequency_penalty, presence_penalty] {
            ensure!((-2.0..=2.0).contains(&penalty), "a penalty is not a number from -2 to 2");
        }
        let mut sampler =
            Self { sampling, random: Stream::new(sampling.seed, DRAWS), seen: HashMap::new(), bias: Vec::new() };
        if sampler.penalises() {
            sampler.seen.extend(prompt.iter().map(|token| (*token, 0)));
        }
        Ok(sampler)
    }

    /// Adds numbers to the logits of tokens before each draw.
    ///
    /// # Errors
    /// When one is not finite.
    pub fn with_bias(self, bias: Vec<(u32, f32)>) -> Result<Self> {
        ensure!(bias.iter().all(|(_, bias)| bias.is_finite()), "a bias is not a number");
        Ok(Self { bias, ..self })
    }

    /// Draws a token from logits, (V), which are finite.
    pub fn draw(&mut self, mut logits: Vec<f32>) -> u32 {
        self.penalise(&mut logits);
        self.draw_penalised(logits)
    }

    /// Draws a token that a constraint lets pass.
    ///
    /// # Errors
    /// When it lets none pass.
    pub fn draw_held(&mut self, mut logits: Vec<f32>, constraint: &mut dyn Constraint) -> Result<u32> {
        self.penalise(&mut logits);
        // None of its own is below what a mask sets.
        logits.iter_mut().for_each(|logit| *logit = logit.max(LEAST));
        constraint.mask(&mut logits)?;
        Ok(self.draw_penalised(logits))
    }

    fn draw_penalised(&mut self, logits: Vec<f32>) -> u32 {
        let greedy = self.sampling.temperature < TEMPERATURE_MIN || self.sampling.top_k == 1;
        let token = if greedy { first_of_largest(&logits) } else { self.draw_from(logits) };
        if self.penalises() {
            *self.seen.entry(token).or_default() += 1;
        }
        token
    }

    fn penalises(&self) -> bool {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0
    }

    /// Lowers the logits of tokens that stand in the sequence.
    ///
    /// Repetition: Keskar et al. 2019, <https://arxiv.org/abs/1909.05858>, section 4.1, over prompt and answer as in
    /// transformers. Frequency and presence: OpenAI's API, over the answer alone.
    fn penalise(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        for (token, count) in &self.seen {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            let mut value = f64::from(*logit);
            value = if value < 0.0 { value * repetition_penalty } else { value / repetition_penalty };
            if *count > 0 {
                value -= f64::from(*count) * frequency_penalty + presence_penalty;
            }
            // A penalty must not make infinities of what was finite.
            *logit = value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
        }
        for (token, bias) in &self.bias {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            *logit = (*logit + bias).clamp(f32::MIN, f32::MAX);
        }
    }

    fn draw_from(&mut self, mut weights: Vec<f32>) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        softmax_weights(&mut weights, temperature as f32);
        if top_k > 0 && top_k < weights.len() {
            keep_likeliest(&mut weights, top_k as f64, |_| 1.0);
        }
        if top_p < 1.0 {
            let wanted = top_p * sum(&weights);
            keep_likeliest(&mut weights, wanted, f64::from);
        }
        if min_p > 0.0 {
            // The likeliest weighs 1.
            weights.iter_mut().filter(|weight| f64::from(**weight) < min_p).for_each(|weight| *weight = 0.0);
        }
        pick(self.random.uniform() * sum(&weights), &weights)
    }
}

/// Keeps the likeliest weights, at least one, as far as `measure` of them needs to sum up to `wanted`; the others become 0. Of equal
/// ones the first are kept.
///
/// With the weights themselves as measures these are the nucleus of Holtzman et al. 2019, <https://arxiv.org/abs/1904.09751>,
/// section 3.1. The smallest weight that is kept is found by its bits, ten at a time from the highest, which order numbers from 0 to 1
/// as their values do.
fn keep_likeliest(weights: &mut [f32], wanted: f64, measure: impl Fn(f32) -> f64) {
    const BITS: u32 = 10;
    /// Sums beside each other, so that an addition need not wait for the one before.
    const LANES: usize = 4;
    let (mut missing, mut smallest) = (wanted, 0);
    for shift in [2 * BITS, BITS, 0] {
        let mut sums = [[0f64; LANES]; 1 << BITS];
        let mut add = |lane: usize, weight: f32| {
            let bits = weight.to_bits() >> shift;
            if bits >> BITS == smallest {
                sums[bits as usize % (1 << BITS)][lane] += measure(weight);
            }
        };
        let (chunks, rest) = weights.as_chunks::<LANES>();
        chunks.iter().for_each(|chunk| (0..LANES).for_each(|lane| add(lane, chunk[lane])));
        rest.iter().for_each(|weight| add(0, *weight));
        let reached = sums.iter().rposition(|lanes| {
            let sum = lanes.iter().sum::<f64>();
            let reached = sum > 0.0 && sum >= missing;
            missing -= if reached { 0.0 } else { sum };
            reached
        });
        let Some(digit) = reached else {
            // All of these are needed: the sum was rounded.
            let smallest = smallest << (shift + BITS);
            return weights.iter_mut().filter(|w| w.to_bits() < smallest).for_each(|w| *w = 0.0);
        };
        smallest = smallest << BITS | digit as u32;
    }
    let mut equal = (missing / measure(f32::from_bits(smallest))).ceil().max(1.0) as usize;
    for weight in weights {
        let kept = match weight.to_bits().cmp(&smallest) {
            Ordering::Greater => true,
            Ordering::Equal => equal.checked_sub(1).map(|left| equal = left).is_some(),
            Ordering::Less => false,
        };
        *weight = if kept { *weight } else { 0.0 };
    }
}

/// Weights that are summed at once.
const PART: usize = 256;

fn sum(weights: &[f32]) -> f64 {
    weights.chunks(PART).map(sum_of_part).sum()
}

fn sum_of_part(part: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0f64; LANES];
    let (chunks, rest) = part.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, weight)| *lane += f64::from(*weight));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, weight)| *lane += f64::from(*weight));
    lanes.iter().sum()
}

/// The first id whose logit none exceeds.
fn first_of_largest(logits: &[f32]) -> u32 {
    const LANES: usize = 16;
    // Sixteen maxima beside each other, which a processor finds at once.
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = if *logit > *lane { *logit } else { *lane };
        }
    }
    let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    logits.iter().position(|logit| *logit == largest).unwrap_or(0) as u32
}

/// The id at which the sum of weights passes `at`; the last with a weight if rounding keeps the sum below.
fn pick(at: f64, weights: &[f32]) -> u32 {
    let (mut before, mut last) = (0.0, 0);
    for (number, part) in weights.chunks(PART).enumerate() {
        let after = before + sum_of_part(part);
        if after > at {
            for (id, weight) in part.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                before += f64::from(*weight);
                last = number * PART + id;
                if before > at {
                    break;
                }
            }
            return last as u32;
        }
        before = after;
    }
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use candle_transformers::utils::apply_repeat_penalty;

    use super::*;

    /// Odd logits of an odd vocabulary, with ties.
    fn logits(seed: u64) -> Vec<f32> {
        let mut random = Stream::new(seed, 1);
        (0..1237).map(|id| if id % 50 == 7 { 2.5 } else { 3.0 * random.normal() as f32 }).collect()
    }

    fn drawn(sampling: Sampling, prompt: &[u32], logits: &[f32], times: usize) -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(sampling, prompt)?;
        Ok((0..times).map(|_| sampler.draw(logits.to_vec())).collect())
    }

    /// Ids that can be drawn, by sorting everything: the definition, as transformers' warpers have it.
    fn allowed(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
        let top = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut all: Vec<(usize, f64)> =
            logits.iter().map(|l| f64::from(((l - top) / sampling.temperature as f32).exp())).enumerate().collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if sampling.top_k > 0 {
            all.truncate(sampling.top_k);
        }
        let sum: f64 = all.iter().map(|(_, weight)| weight).sum();
        let mut before = 0.0;
        all.retain(|(_, weight)| {
            // The likeliest is kept in any case.
            let kept = before == 0.0 || before < sampling.top_p * sum;
            before += weight;
            kept
        });
        let largest = all[0].1;
        all.retain(|(_, weight)| *weight >= sampling.min_p * largest);
        all.into_iter().map(|(id, _)| id as u32).collect()
    }

    #[test]
    fn only_what_the_filters_leave_is_drawn_and_all_of_it() -> Result<()> {
        let free = Sampling { temperature: 1.3, ..Sampling::default() };
        for (top_k, top_p, min_p) in [
            (0, 0.9, 0.0),
            (7, 1.0, 0.0),
            (0, 1.0, 0.05),
            (41, 0.8, 0.02),
            (0, 0.0, 0.0),
            (3, 1e-300, 0.0),
            (5000, 0.3, 1.0),
        ] {
            for seed in 0..5 {
                let (logits, sampling) = (logits(seed), Sampling { top_k, top_p, min_p, seed, ..free });
                let want = allowed(&logits, &sampling);
                let got = drawn(sampling, &[], &logits, 3000)?;
                assert!(got.iter().all(|id| want.contains(id)), "{sampling:?}");
                if want.len() < 20 {
                    assert!(want.iter().all(|id| got.contains(id)), "{sampling:?}: {want:?}");
                }
            }
        }
        Ok(())
    }

    /// Frequencies of 40,000 draws against softmax: the standard deviation of a frequency is below 0.0025.
    #[test]
    fn draws_follow_softmax() -> Result<()> {
        let logits = [0.5f32, -1.0, 2.0, 2.0, -30.0, 1.0, 0.0];
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.8).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for top_p in [1.0, 0.999_999] {
            let sampling = Sampling { temperature: 0.8, top_p, seed: 3, ..Sampling::default() };
            let got = drawn(sampling, &[], &logits, 40_000)?;
            for (id, weight) in weights.iter().enumerate() {
                let share = got.iter().filter(|got| **got as usize == id).count() as f64 / 40_000.0;
                assert!((share - weight / sum).abs() < 0.011, "{id}: {share} for {}", weight / sum);
            }
        }
        Ok(())
    }

    /// Every shape that sorting is slow or wrong on: all alike, two values, one far above, spread over the exponents, and weights that are
    /// nothing.
    #[test]
    fn what_is_kept_is_what_sorting_would_keep() {
        let mut random = Stream::new(11, 1);
        let mut spread: Vec<f32> = (0..2053).map(|_| (-30.0 * random.uniform_f32()).exp()).collect();
        let peaked: Vec<f32> = (0..2053).map(|id| if id == 1999 { 1.0 } else { 1e-7 }).collect();
        let two = (0..2053).map(|id| if id % 3 == 1 { 1.0 } else { 0.25 }).collect();
        let none = (0..2053).map(|id| if id % 5 == 2 { 0.5 } else { 0.0 }).collect();
        spread[77] = 1.0;
        for weights in [spread, peaked, two, none, vec![1.0; 2053], vec![0.7], vec![0.3, 1.0]] {
            let mut order: Vec<usize> = (0..weights.len()).collect();
            order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
            let all = sum(&weights);
            for top_p in [0.0, 1e-300, 0.1, 0.5, 0.9, 0.999, 1.0] {
                // Sums a hair's breadth around the one that is wanted may fall either way.
                let reach = |wanted: f64| {
                    let mut before = 0.0;
                    let reached = order.iter().position(|id| {
                        before += f64::from(weights[*id]);
                        before >= wanted
                    });
                    reached.map_or(order.len(), |at| at + 1)
                };
                let mut kept = weights.clone();
                keep_likeliest(&mut kept, top_p * all, f64::from);
                let n = kept.iter().filter(|weight| **weight > 0.0).count();
                let positive = weights.iter().filter(|weight| **weight > 0.0).count();
                let (least, most) =
                    (reach(top_p * all * (1.0 - 1e-12)), reach(top_p * all * (1.0 + 1e-12)).min(positive));
                assert!((least.min(positive)..=most).contains(&n), "{top_p}: {n}, not {least} to {most}");
                assert!(order[..n].iter().all(|id| kept[*id] == weights[*id]), "{top_p}");
            }
            for top_k in [1, 2, 7, 2000].into_iter().filter(|k| *k < weights.len()) {
                let mut kept = weights.clone();
                keep_likeliest(&mut kept, top_k as f64, |_| 1.0);
                assert!(order[..top_k].iter().all(|id| kept[*id] == weights[*id]), "{top_k}");
                assert!(order[top_k..].iter().all(|id| kept[*id] == 0.0), "{top_k}");
            }
        }
    }

    /// Lets one token pass.
    struct Only(u32);

    impl Constraint for Only {
        fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
            let others = logits.iter_mut().enumerate().filter(|(id, _)| *id != self.0 as usize);
            others.for_each(|(_, logit)| *logit = MASKED);
            Ok(())
        }

        fn accept(&mut self, _token: u32) -> Result<bool> {
            Ok(false)
        }
    }

    #[test]
    fn what_is_masked_is_never_drawn_and_a_bias_decides() -> Result<()> {
        let logits = [50.0, 1.0, f32::MIN, -3.0];
        for temperature in [0.0, 2e-6, 1.0, 2.0] {
            for (top_k, top_p) in [(0, 1.0), (2, 0.5)] {
                let sampling = Sampling { temperature, top_k, top_p, repetition_penalty: 1.3, ..Sampling::default() };
                for allowed in [1, 2, 3] {
                    let mut sampler = Sampler::new(sampling, &[0, 3])?;
                    assert_eq!(sampler.draw_held(logits.to_vec(), &mut Only(allowed))?, allowed, "{sampling:?}");
                }
                let mut biased = Sampler::new(sampling, &[])?.with_bias(vec![(0, -100.0), (1, 60.0), (99, 1.0)])?;
                assert_eq!(biased.draw(logits.to_vec()), 1);
            }
        }
        assert!(Sampler::new(Sampling::default(), &[])?.with_bias(vec![(0, f32::NAN)]).is_err());
        Ok(())
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() -> Result<()> {
        let logits = [1.0, 4.0, -1.0, 4.0];
        assert_eq!(drawn(Sampling::default(), &[], &logits, 2)?, [1, 1]);
        let narrow = Sampling { temperature: 1.5, top_k: 1, ..Sampling::default() };
        assert_eq!(drawn(narrow, &[], &logits, 2)?, [1, 1]);
        Ok(())
    }

    #[test]
    fn penalties_are_those_of_candle_transformers_and_openai() -> Result<()> {
        let (logits, prompt) = (logits(9), [3, 3, 700, 1236]);
        let sampler = |sampling| Sampler::new(sampling, &prompt);
        let mut ours = logits.clone();
        sampler(Sampling { repetition_penalty: 1.7, ..Sampling::default() })?.penalise(&mut ours);
        let theirs = Tensor::from_slice(&logits, logits.len(), &Device::Cpu)?;
        let theirs: Vec<f32> = apply_repeat_penalty(&theirs, 1.7, &prompt)?.to_vec1()?;
        assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-6));
        assert_ne!(ours, logits);

        // What was drawn twice loses two frequencies and one presence; the prompt loses neither.
        let mut sampler = sampler(Sampling { frequency_penalty: 0.5, presence_penalty: -0.25, ..Sampling::default() })?;
        let mut sure = vec![0.0; 1237];
        sure[5] = 10.0;
        assert_eq!((sampler.draw(sure.clone()), sampler.draw(sure)), (5, 5));
        let mut ours = logits.clone();
        sampler.penalise(&mut ours);
        let differ: Vec<usize> = (0..ours.len()).filter(|id| ours[*id] != logits[*id]).collect();
        assert_eq!(differ, [5]);
        assert!((ours[5] - (logits[5] - 0.75)).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn numbers_out_of_range_are_refused_and_large_ones_do_not_overflow() -> Result<()> {
        let free = Sampling { temperature: 1.0, ..Sampling::default() };
        for wrong in [
            Sampling { temperature: f64::NAN, ..free },
            Sampling { temperature: -1.0, ..free },
            Sampling { top_p: 1.5, ..free },
            Sampling { min_p: f64::NAN, ..free },
            Sampling { repetition_penalty: 0.0, ..free },
            Sampling { presence_penalty: f64::INFINITY, ..free },
            Sampling { frequency_penalty: -3.0, ..free },
        ] {
            assert!(Sampler::new(wrong, &[]).is_err(), "{wrong:?}");
        }
        let far = Sampling { repetition_penalty: 1e300, ..free };
        assert_eq!(drawn(far, &[0], &[-1.0, 5.0, -f32::MAX], 1)?, [1]);
        Ok(())
    }
}
