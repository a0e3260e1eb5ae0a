//! Random numbers as a function of a counter: Philox4x32-10, so that what is drawn depends on where it is used and not
//! on what was drawn before.
//!
//! Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
//! <https://doi.org/10.1145/2063384.2063405>; the known answers in the tests are Random123's.
//!
//! Not for secrets: a key can be recovered from the output.

/// The multipliers and the key's increments (golden ratio, square root of 3), section 4.3 of the paper.
const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for a counter and a key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// [`philox4x32`] of `L` counters at once, word by word, so that lanes become vector lanes.
#[inline(always)]
fn philox_lanes<const L: usize>(
    [mut c0, mut c1, mut c2, mut c3]: [[u32; L]; 4],
    [mut k0, mut k1]: [u32; 2],
) -> [[u32; L]; 4] {
    for _ in 0..ROUNDS {
        for l in 0..L {
            let a = u64::from(MULTIPLIER[0]) * u64::from(c0[l]);
            let b = u64::from(MULTIPLIER[1]) * u64::from(c2[l]);
            c0[l] = (b >> 32) as u32 ^ c1[l] ^ k0;
            c1[l] = b as u32;
            c2[l] = (a >> 32) as u32 ^ c3[l] ^ k1;
            c3[l] = a as u32;
        }
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// A uniform number in [0, 1) from the upper 24 bits of a word.
#[inline(always)]
fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// Words in sequence for one seed and one domain (what they are for); streams of different domains are independent.
///
/// Word i is word i % 4 of the block with counter (i / 4, domain), each 64 bits with the lower half first; the key is
/// the seed.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    domain: u64,
    block: u64,
    words: [u32; 4],
    /// Words of `words` handed out; 4 when the next block is due.
    used: usize,
}

impl Stream {
    /// The stream of `seed` for `domain`, at its start.
    pub fn new(seed: u64, domain: u64) -> Self {
        Self { key: halves(seed), domain, block: 0, words: [0; 4], used: 4 }
    }

    /// The next word.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let ([c0, c1], [c2, c3]) = (halves(self.block), halves(self.domain));
            self.words = philox4x32([c0, c1, c2, c3], self.key);
            self.block = self.block.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next two words, the lower half first.
    pub fn next_u64(&mut self) -> u64 {
        let low = u64::from(self.next_u32());
        low | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in [0, 1), a multiple of 2^-24.
    pub fn uniform_f32(&mut self) -> f32 {
        unit_f32(self.next_u32())
    }

    /// Normal with mean 0 and variance 1: sqrt(-2 ln u) cos(2 pi v), Box and Muller 1958.
    ///
    /// Takes two uniform numbers a call and keeps no second value, so the place in the stream is all its state.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt(); // 1 - u is never 0
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A whole number in 0..n, each equally likely: Lemire 2019, <https://doi.org/10.1145/3230636>.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "there is no number below 0");
        let n = n as u64;
        let reject_below = n.wrapping_neg() % n; // 2^64 mod n
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= reject_below {
                return (product >> 64) as usize;
            }
        }
    }

    /// Puts `items` in an order drawn from all of them with equal chance (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// The two words of a number, the lower half first.
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Dropout's factors for one position: `out[c]` is 1 / `keep` with probability `keep` and else 0, for each channel c.
///
/// Channel c takes word c % 4 of the block with counter (c / 4, position, row, update), so packing, accumulation and
/// recomputation draw the same mask. `keep` is 1 - p, in (0, 1].
pub fn dropout_mask(key: [u32; 2], update: u32, row: u32, position: u32, keep: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as just asked; nothing else is required of the caller.
        return unsafe { mask_avx2(key, [position, row, update], keep, out) };
    }
    mask(key, [position, row, update], keep, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn mask_avx2(key: [u32; 2], place: [u32; 3], keep: f32, out: &mut [f32]) {
    mask(key, place, keep, out);
}

#[inline(always)]
fn mask(key: [u32; 2], [position, row, update]: [u32; 3], keep: f32, out: &mut [f32]) {
    const LANES: usize = 8;
    let kept = 1.0 / keep;
    for (i, out) in out.chunks_mut(4 * LANES).enumerate() {
        let first = (i * LANES) as u32;
        let quads = std::array::from_fn(|l| first + l as u32);
        let counters = [quads, [position; LANES], [row; LANES], [update; LANES]];
        let words = philox_lanes(counters, key);
        let factor = |word| if unit_f32(word) < keep { kept } else { 0.0 };
        let factors: [[f32; 4]; LANES] = std::array::from_fn(|l| std::array::from_fn(|word| factor(words[word][l])));
        out.copy_from_slice(&factors.as_flattened()[..out.len()]);
    }
}

/// Adds noise to one position: to `out[c]` a uniform number from −`magnitude` to `magnitude`, for each channel c.
///
/// Channels take words as in [`dropout_mask`], so packing, accumulation and recomputation draw the same noise.
pub fn add_noise(key: [u32; 2], update: u32, row: u32, position: u32, magnitude: f32, out: &mut [f32]) {
    for (quad, out) in out.chunks_mut(4).enumerate() {
        let words = philox4x32([quad as u32, position, row, update], key);
        for (out, word) in out.iter_mut().zip(words) {
            *out += magnitude * (2.0 * unit_f32(word) - 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's `kat_vectors`, the lines of philox4x32 with 10 rounds.
    #[test]
    fn philox_gives_the_known_answers() {
        let check = |counter, key, expected| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn a_stream_is_philox_at_successive_counters() {
        let (seed, domain) = (0x0123_4567_89ab_cdef, 0x1111_2222_3333_4444);
        let mut stream = Stream::new(seed, domain);
        for block in 0..3 {
            let counter = [block, 0, 0x3333_4444, 0x1111_2222];
            let words = philox4x32(counter, [0x89ab_cdef, 0x0123_4567]);
            assert_eq!([(); 4].map(|()| stream.next_u32()), words);
        }
        let mut again = Stream::new(seed, domain);
        let (low, high) = (again.next_u32(), again.next_u32());
        let both = u64::from(high) << 32 | u64::from(low);
        assert_eq!(Stream::new(seed, domain).next_u64(), both);
        assert_ne!(Stream::new(seed, domain + 1).next_u64(), both, "domains differ");
        assert_ne!(Stream::new(seed + 1, domain).next_u64(), both, "seeds differ");
    }

    /// Mean, variance and fourth moment within five standard errors of n = 2^18 draws.
    #[test]
    fn uniform_and_normal_have_their_moments() {
        let n = 1 << 18;
        let mut stream = Stream::new(7, 1);
        let moments = |draws: Vec<f64>| [1, 2, 4].map(|p| draws.iter().map(|x| x.powi(p)).sum::<f64>() / n as f64);
        let uniform: Vec<f64> = (0..n).map(|_| stream.uniform()).collect();
        assert!(uniform.iter().all(|u| (0.0..1.0).contains(u)));
        let single: Vec<f64> = (0..n).map(|_| stream.uniform_f32().into()).collect();
        assert!(single.iter().all(|u| (0.0..1.0).contains(u)));
        let normal: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let root = (n as f64).sqrt();
        let check = |got: [f64; 3], expected: [f64; 3], deviation: [f64; 3]| {
            for i in 0..3 {
                let error = (got[i] - expected[i]).abs();
                assert!(error < 5.0 * deviation[i] / root, "{got:?} {expected:?}");
            }
        };
        // E u^p = 1 / (p + 1); var u^p = 1 / (2p + 1) - 1 / (p + 1)^2
        for draws in [uniform, single] {
            check(moments(draws), [1.0 / 2.0, 1.0 / 3.0, 1.0 / 5.0], [0.29, 0.3, 0.27]);
        }
        // E x^2 = 1, E x^4 = 3, E x^8 = 105
        check(moments(normal), [0.0, 1.0, 3.0], [1.0, 1.42, 9.8]);
    }

    #[test]
    fn below_is_even_and_shuffle_reaches_every_order() {
        let mut stream = Stream::new(3, 2);
        let n = 60_000;
        // A count of a cell with chance p deviates by sqrt(n p (1 - p)); five times that is allowed.
        let check = |counts: &[i32]| {
            let p = 1.0 / counts.len() as f64;
            let allowed = 5.0 * (f64::from(n) * p * (1.0 - p)).sqrt();
            let off = |&count: &i32| (f64::from(count) - f64::from(n) * p).abs();
            assert!(counts.iter().all(|c| off(c) < allowed), "{counts:?}");
        };
        let mut counts = [0; 7];
        (0..n).for_each(|_| counts[stream.below(7)] += 1);
        check(&counts);
        // Three items in six orders, named by where 0 and 1 went.
        let mut orders = [0; 9];
        for _ in 0..n {
            let mut items = [0, 1, 2];
            stream.shuffle(&mut items);
            orders[3 * items[0] + items[1]] += 1;
        }
        let reached: Vec<i32> = orders.into_iter().filter(|&count| count > 0).collect();
        assert_eq!(reached.len(), 6);
        check(&reached);
        assert_eq!(stream.below(1), 0);
        // Above 2^63 half of all draws would repeat a result if none were rejected; here only the range is checked.
        let large = usize::MAX / 2 + 2;
        assert!((0..100).all(|_| stream.below(large) < large));
    }

    #[test]
    fn dropout_follows_the_counter_and_the_rate() {
        let (key, keep) = ([5, 6], 0.9f32);
        // 77 channels: neither a multiple of 4 nor of the lanes.
        let mut mask = vec![f32::NAN; 77];
        dropout_mask(key, 11, 12, 13, keep, &mut mask);
        for (c, &factor) in mask.iter().enumerate() {
            let word = philox4x32([c as u32 / 4, 13, 12, 11], key)[c % 4];
            let kept = f64::from(word >> 8) / f64::from(1 << 24) < f64::from(keep);
            assert_eq!(factor, if kept { 1.0 / keep } else { 0.0 }, "channel {c}");
        }
        let mut mask = vec![f32::NAN; 100_000];
        dropout_mask(key, 1, 2, 3, keep, &mut mask);
        let rate = mask.iter().filter(|&&factor| factor > 0.0).count() as f64 / 1e5;
        assert!((rate - 0.9).abs() < 5.0 * (0.09f64 / 1e5).sqrt(), "{rate}");
        dropout_mask(key, 1, 2, 3, 1.0, &mut mask);
        assert!(mask.iter().all(|&factor| factor == 1.0));
    }

    /// Uniform numbers of both signs up to the magnitude, variance m²/3; of a place of their own, whatever the width.
    #[test]
    fn noise_is_uniform_and_a_function_of_its_place() {
        let (n, m) = (1 << 16, 0.25);
        let draw = |update, row, position, count: usize| {
            let mut out = vec![1.0_f32; count];
            add_noise([7, 9], update, row, position, m, &mut out);
            out
        };
        let noise: Vec<f64> = draw(3, 1, 2, n).into_iter().map(|x| f64::from(x) - 1.0).collect();
        assert!(noise.iter().all(|x| x.abs() <= f64::from(m) + 1e-7));
        let mean = noise.iter().sum::<f64>() / n as f64;
        let variance = noise.iter().map(|x| x * x).sum::<f64>() / n as f64;
        let expected = f64::from(m).powi(2) / 3.0;
        assert!(mean.abs() < 5.0 * (expected / n as f64).sqrt(), "{mean}");
        // The fourth moment is m⁴/5, so that of squares the variance is m⁴ (1/5 − 1/9).
        let deviation = f64::from(m).powi(2) * ((1.0 / 5.0 - 1.0 / 9.0) / n as f64).sqrt();
        assert!((variance - expected).abs() < 5.0 * deviation, "{variance}");
        let here = draw(3, 1, 2, 7);
        assert_eq!(here, draw(3, 1, 2, 13)[..7]);
        for other in [draw(4, 1, 2, 7), draw(3, 2, 2, 7), draw(3, 1, 3, 7)] {
            assert_ne!(here, other);
        }
    }
}
