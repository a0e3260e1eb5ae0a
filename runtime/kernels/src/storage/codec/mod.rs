//! Frozen storage as data: indices of 4 or 8 bits into a code book, over blocks of values that share a scale.
//!
//! A value is `code[index] * scale[block]` in f32; of int8, `(index - 127) * scale * (1 / 127)`, multiplied as in bitsandbytes.
//! With 4 bits the first of two values lies in the upper half of its byte, as bitsandbytes packs them. Source of NF4 and of
//! double quantisation: Dettmers et al. 2023, <https://arxiv.org/abs/2305.14314>, section 3; of int8 by rows: Dettmers et al.
//! 2022, <https://arxiv.org/abs/2208.07339>.

#[cfg(target_arch = "x86_64")]
mod bisect;
mod decode;
mod encode;

pub(crate) use decode::Fused;
pub use encode::{ENCODING, encode};

use crate::isa::isa;

/// NF4 levels: quantiles of N(0, 1), Dettmers et al. 2023, appendix E, in bitsandbytes' digits.
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

/// Values of the largest block: buffers are as large.
const BLOCK_MAX: usize = 1 << 20;

/// How a weight is encoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Codec {
    /// Name for messages and files, e.g. `nf4`.
    pub name: String,
    /// Bits of one index: 4 or 8.
    pub bits: u8,
    /// Values that share a scale.
    pub block: CodecBlock,
    /// Values of the indices, strictly ascending; `2^bits` of them at most.
    pub code: Vec<f32>,
    /// How scales are stored.
    pub scales: ScaleStorage,
}

/// A codec that was found right once: views of its matrices are made without looking at its code book again.
#[derive(Clone, Debug)]
pub struct CheckedCodec {
    codec: Codec,
    /// See [`Codec::is_linear`].
    linear: bool,
}

impl CheckedCodec {
    /// Checks a codec.
    ///
    /// # Errors
    /// See [`Codec::check`].
    pub fn new(codec: Codec) -> Result<Self, String> {
        codec.check()?;
        Ok(Self { linear: codec.is_linear(), codec })
    }
}

impl std::ops::Deref for CheckedCodec {
    type Target = Codec;

    fn deref(&self) -> &Codec {
        &self.codec
    }
}

/// Which values share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecBlock {
    /// So many values in row-major order; the last block may be shorter.
    Flat(usize),
    /// One row of the matrix.
    Row,
}

/// How scales are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleStorage {
    /// One f32 a block.
    F32,
    /// Double quantisation: scales less their mean, as 8-bit indices over blocks of `block` scales in turn.
    Nested {
        /// Scales that share a second-level scale.
        block: usize,
        /// Values of the indices, strictly ascending.
        code: Vec<f32>,
    },
}

impl Codec {
    /// NF4 over blocks of 64 with double quantisation over blocks of 256, as QLoRA has it.
    pub fn nf4() -> Self {
        let scales = ScaleStorage::Nested { block: 256, code: dynamic_code() };
        Self { name: "nf4".to_owned(), bits: 4, block: CodecBlock::Flat(64), code: NF4.to_vec(), scales }
    }

    /// Signed 8-bit integers with the largest magnitude of each row as 127, as LLM.int8 has it.
    pub fn int8() -> Self {
        let code = (-127..=127).map(|i| i as f32 / 127.0).collect();
        Self { name: "int8".to_owned(), bits: 8, block: CodecBlock::Row, code, scales: ScaleStorage::F32 }
    }

    /// Whether the codec can be run.
    ///
    /// # Errors
    /// When a number in it is out of range.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let ascending = |code: &[f32]| code.iter().all(|c| c.is_finite()) && code.windows(2).all(|w| w[0] < w[1]);
        if !matches!(self.bits, 4 | 8) {
            return Err(format!("codec `{name}`: {} bits; known are 4 and 8", self.bits));
        }
        if self.code.len() < 2 || self.code.len() > 1 << self.bits || !ascending(&self.code) {
            let most = 1 << self.bits;
            return Err(format!("codec `{name}`: a code book is 2 to {most} finite values in ascending order"));
        }
        if matches!(self.block, CodecBlock::Flat(len) if !(1..=BLOCK_MAX).contains(&len)) {
            return Err(format!("codec `{name}`: a block holds 1 to {BLOCK_MAX} values"));
        }
        match &self.scales {
            ScaleStorage::Nested { block, code }
                if !(1..=BLOCK_MAX).contains(block) || code.len() != 256 || !ascending(code) =>
            {
                Err(format!(
                    "codec `{name}`: nested scales take 256 finite values in ascending order, and a block of 1 to {BLOCK_MAX}"
                ))
            }
            _ => Ok(()),
        }
    }

    /// Bytes of the indices of so many values.
    pub fn code_bytes(&self, values: usize) -> usize {
        if self.bits == 4 { values.div_ceil(2) } else { values }
    }

    /// Rows of `cols` values that are whole blocks and whole bytes together, as few as there are.
    pub fn whole_rows(&self, cols: usize) -> usize {
        match self.block {
            CodecBlock::Row => 2 / gcd(2, cols.max(1)),
            CodecBlock::Flat(len) => {
                let len = len * 2 / gcd(2, len);
                len / gcd(len, cols.max(1))
            }
        }
    }

    /// Values of a block of rows of `cols`.
    pub fn block_len(&self, cols: usize) -> usize {
        match self.block {
            CodecBlock::Flat(len) => len,
            CodecBlock::Row => cols.max(1),
        }
    }

    /// Whether index i stands for (i - 127) / 127: then values are computed and not looked up.
    fn is_linear(&self) -> bool {
        self.code.len() == 255 && self.code.iter().zip(-127..).all(|(c, i)| *c == i as f32 / 127.0)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// bitsandbytes' signed dynamic map of 8 bits: for i below 7, the middles of 2^i equal parts of 0.1 to 1, times 10^(i - 6), with
/// both signs, and 0 and 1 besides. Its steps are computed as torch's f32 `linspace` and `mean` do.
fn dynamic_code() -> Vec<f32> {
    let mut code = vec![0.0, 1.0];
    for i in 0..7 {
        let parts = 1_usize << i;
        let step = (1.0_f32 - 0.1) / parts as f32;
        // torch computes the second half of a linspace from its end.
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

impl Codec {
    /// Bytes of a matrix (rows, cols) through this codec: what [`Encoded::bytes`] comes to.
    pub fn encoded_bytes(&self, rows: usize, cols: usize) -> usize {
        let values = rows * cols;
        let blocks = values.div_ceil(self.block_len(cols));
        let scales = match self.scales {
            ScaleStorage::F32 => 4 * blocks,
            ScaleStorage::Nested { block, .. } => blocks + 4 * blocks.div_ceil(block) + 4,
        };
        self.code_bytes(values) + scales
    }

    /// See [`Matrix::multiplies_in_integers`](crate::Matrix::multiplies_in_integers): whether that holds of a matrix (rows, cols) through
    /// this codec.
    pub fn multiplies_in_integers(&self, rows: usize, cols: usize) -> bool {
        (self.has_linear_rows() || isa().multiplies_bytes()) && rows.is_multiple_of(4) && cols.is_multiple_of(4)
    }

    fn has_linear_rows(&self) -> bool {
        self.block == CodecBlock::Row && self.is_linear()
    }
}

/// An encoded matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// Indices, row-major; see [`Codec::bits`].
    pub codes: Vec<u8>,
    /// Scales, one a block.
    pub scales: EncodedScales,
}

/// Scales of an encoded matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum EncodedScales {
    /// As they are.
    F32(Vec<f32>),
    /// Double quantisation: `code[codes[i]] * absmax[i / block] + offset`.
    Nested {
        /// Indices into the nested code book.
        codes: Vec<u8>,
        /// Second-level scales.
        absmax: Vec<f32>,
        /// Mean of the scales.
        offset: f32,
    },
}

impl Encoded {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }
}

impl EncodedScales {
    /// A view of them.
    pub fn view(&self) -> Scales<'_> {
        match self {
            Self::F32(scales) => Scales::F32(scales),
            Self::Nested { codes, absmax, offset } => Scales::Nested { codes, absmax, offset: *offset },
        }
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.view().bytes()
    }
}

/// Scales of an encoded matrix, wherever they lie; see [`EncodedScales`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Scales<'a> {
    F32(&'a [f32]),
    Nested { codes: &'a [u8], absmax: &'a [f32], offset: f32 },
}

impl Scales<'_> {
    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(scales) => 4 * scales.len(),
            Self::Nested { codes, absmax, .. } => codes.len() + 4 * absmax.len() + 4,
        }
    }
}

/// A view of an encoded matrix (rows, cols).
#[derive(Clone, Copy, Debug)]
pub struct Coded<'a> {
    codec: &'a Codec,
    codes: &'a [u8],
    scales: Scales<'a>,
    rows: usize,
    cols: usize,
    /// See [`Codec::is_linear`].
    linear: bool,
}

impl<'a> Coded<'a> {
    /// A view of indices and scales, whoever made them: their sizes are checked here.
    ///
    /// # Errors
    /// When the codec cannot be run, or there are not as many indices and scales as the shape asks for.
    pub fn new(
        codec: &'a Codec,
        codes: &'a [u8],
        scales: &'a EncodedScales,
        rows: usize,
        cols: usize,
    ) -> Result<Self, String> {
        codec.check()?;
        Self::sized((codec, codec.is_linear()), codes, scales.view(), rows, cols)
    }

    /// As [`Coded::new`].
    ///
    /// # Errors
    /// When there are not as many indices and scales as the shape asks for.
    pub fn of_checked(
        codec: &'a CheckedCodec,
        codes: &'a [u8],
        scales: Scales<'a>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, String> {
        Self::sized((&codec.codec, codec.linear), codes, scales, rows, cols)
    }

    fn sized(
        (codec, linear): (&'a Codec, bool),
        codes: &'a [u8],
        scales: Scales<'a>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, String> {
        let name = &codec.name;
        let values = rows.checked_mul(cols).ok_or_else(|| format!("{name}: {rows} x {cols} is too large"))?;
        let blocks = values.div_ceil(codec.block_len(cols));
        let (count, nested) = match (scales, &codec.scales) {
            (Scales::F32(scales), ScaleStorage::F32) => (scales.len(), None),
            (Scales::Nested { codes, absmax, .. }, ScaleStorage::Nested { block, .. }) => {
                (codes.len(), Some((absmax.len(), blocks.div_ceil(*block))))
            }
            _ => return Err(format!("{name}: its scales are not stored as the codec says")),
        };
        let wanted = (codec.code_bytes(values), blocks);
        if (codes.len(), count) != wanted || nested.is_some_and(|(got, want)| got != want) {
            return Err(format!(
                "{name}: {rows} x {cols} takes {} bytes of indices and {} scales, got {} and {count}",
                wanted.0,
                wanted.1,
                codes.len()
            ));
        }
        Ok(Self { codec, codes, scales, rows, cols, linear })
    }

    /// The codec.
    pub fn codec(&self) -> &'a Codec {
        self.codec
    }

    /// Indices of eight bits, and how many a row has.
    pub(crate) fn indices(&self) -> (&'a [u8], usize) {
        (self.codes, self.cols)
    }

    /// Values of a block.
    pub(crate) fn block_len(&self) -> usize {
        self.codec.block_len(self.cols)
    }

    /// The scale of a block.
    #[inline(always)]
    pub(crate) fn scale(&self, block: usize) -> f32 {
        match (self.scales, &self.codec.scales) {
            (Scales::F32(scales), _) => scales[block],
            (Scales::Nested { codes, absmax, offset }, ScaleStorage::Nested { block: nested, code }) => {
                code[usize::from(codes[block])] * absmax[block / nested] + offset
            }
            _ => unreachable!("`new` saw that both are nested"),
        }
    }

    /// The scales of neighbouring blocks from the `first` on, as [`Coded::scale`] has them.
    #[inline(always)]
    pub(crate) fn scales(&self, first: usize, out: &mut [f32]) {
        match (self.scales, &self.codec.scales) {
            (Scales::F32(scales), _) => out.copy_from_slice(&scales[first..first + out.len()]),
            (Scales::Nested { codes, absmax, offset }, ScaleStorage::Nested { block: nested, code }) => {
                let code: &[f32; 256] = code.as_slice().try_into().expect("`check` saw 256 values");
                let (mut at, mut out) = (first, out);
                while !out.is_empty() {
                    // A division would cost as much as the products of some blocks.
                    let by = nested.is_power_of_two().then(|| at >> nested.trailing_zeros());
                    let number = by.unwrap_or_else(|| at / nested);
                    let len = out.len().min((number + 1) * nested - at);
                    let (now, rest) = out.split_at_mut(len);
                    let absmax = absmax[number];
                    for (scale, index) in now.iter_mut().zip(&codes[at..at + len]) {
                        *scale = code[usize::from(*index)] * absmax + offset;
                    }
                    (at, out) = (at + len, rest);
                }
            }
            _ => unreachable!("`new` saw that both are nested"),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::encode::{mean, nested};
    use super::*;
    use crate::isa::{Isa, with_isa};
    use crate::{Columns, Element, Finish, Left, Matrix, Output, ProductElement, Right, Stream, Term, product};

    /// Parts of a file of `tests/fixtures/codec` (layout: its `make_codec.py`).
    fn parts(file: &[u8], mut at: usize) -> Vec<&[u8]> {
        let mut parts = Vec::new();
        while at < file.len() {
            let len = u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
            parts.push(&file[at + 4..at + 4 + len]);
            at += 4 + len;
        }
        parts
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn matrix(file: &[u8]) -> (usize, usize, Vec<f32>) {
        let size = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        (size(0), size(4), floats(parts(file, 8)[0]))
    }

    fn encoded(codec: &Codec, rows: usize, cols: usize, values: &[f32]) -> Encoded {
        let read = |range: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[range.start * cols..range.end * cols]);
        };
        encode(codec, rows, cols, &read).unwrap()
    }

    macro_rules! files {
        ($ending:literal) => {
            [
                &include_bytes!(concat!("../../../../../tests/fixtures/codec/odd-", $ending))[..],
                include_bytes!(concat!("../../../../../tests/fixtures/codec/short-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/zeros-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/zero-tail-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/ties-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/halves-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/many-blocks-", $ending)),
                include_bytes!(concat!("../../../../../tests/fixtures/codec/tiny-", $ending)),
            ]
        };
    }

    #[test]
    fn nf4_is_that_of_bitsandbytes_bit_by_bit() {
        for file in files!("nf4.bin") {
            let (rows, cols, values) = matrix(file);
            let [_, packed, absmax, nested_codes, nested_absmax, offset] = parts(file, 8)[..] else {
                panic!("six parts")
            };
            let (absmax, offset) = (floats(absmax), floats(offset)[0]);
            let plain = Codec { scales: ScaleStorage::F32, ..Codec::nf4() };
            for isa in Isa::tested() {
                let ours = with_isa(isa, || encoded(&plain, rows, cols, &values));
                assert_eq!(ours.codes, packed, "{rows} x {cols}, {isa:?}");
                assert_eq!(ours.scales, EncodedScales::F32(absmax.clone()), "{rows} x {cols}, {isa:?}");
            }
            let ScaleStorage::Nested { block, code } = Codec::nf4().scales else { panic!("NF4 nests its scales") };
            assert!((mean(&absmax) - offset).abs() <= 1e-6 * offset.abs(), "{} and {offset}", mean(&absmax));
            let wanted = EncodedScales::Nested { codes: nested_codes.to_vec(), absmax: floats(nested_absmax), offset };
            assert_eq!(nested(&absmax, block, &code, offset), wanted, "{rows} x {cols}");
        }
    }

    /// Close to an edge between two levels it shows by which operations bitsandbytes comes to a level.
    #[test]
    fn nested_scales_are_those_of_bitsandbytes_at_every_edge_between_levels() {
        let file = include_bytes!("../../../../../tests/fixtures/codec/edges.bin");
        let [values, codes, absmax] = parts(file, 0)[..] else { panic!("three parts") };
        let wanted = EncodedScales::Nested { codes: codes.to_vec(), absmax: floats(absmax), offset: 0.0 };
        assert_eq!(nested(&floats(values), 256, &dynamic_code(), 0.0), wanted);
    }

    #[test]
    fn int8_is_that_of_bitsandbytes_bit_by_bit() {
        for file in files!("int8.bin") {
            let (rows, cols, values) = matrix(file);
            let [_, codes, stats] = parts(file, 8)[..] else { panic!("three parts") };
            // Theirs are signed, ours count from -127.
            let codes: Vec<u8> = codes.iter().map(|code| (i32::from(*code as i8) + 127) as u8).collect();
            for isa in Isa::tested() {
                let ours = with_isa(isa, || encoded(&Codec::int8(), rows, cols, &values));
                assert_eq!(ours.codes, codes, "{rows} x {cols}, {isa:?}");
                assert_eq!(ours.scales, EncodedScales::F32(floats(stats)), "{rows} x {cols}, {isa:?}");
            }
        }
    }

    #[test]
    fn the_nested_code_book_is_the_dynamic_map_of_bitsandbytes() {
        let file = include_bytes!("../../../../../tests/fixtures/codec/dynamic_map.bin");
        assert_eq!(dynamic_code(), floats(parts(file, 0)[0]));
    }

    fn codecs() -> Vec<Codec> {
        let odd = Codec {
            name: "odd".to_owned(),
            bits: 4,
            block: CodecBlock::Flat(7),
            code: vec![-1.0, -0.2, 0.1, 0.5, 1.0],
            scales: ScaleStorage::Nested { block: 3, code: dynamic_code() },
        };
        let looked_up = Codec { name: "squares".to_owned(), bits: 8, ..Codec::int8() };
        let code = (-100..=100_i32).map(|i| (i * i.abs()) as f32 / 1e4).collect();
        vec![Codec::nf4(), Codec::int8(), odd, Codec { code, block: CodecBlock::Flat(32), ..looked_up }]
    }

    /// Every path and every part of a row yields the same bits, and each value is the level nearest to the one it stands for.
    #[test]
    fn what_is_decoded_is_the_nearest_level_on_every_path() {
        for codec in codecs() {
            for (rows, cols) in [(5, 7), (3, 130), (2, 256)] {
                let mut random = Stream::new(3, 1);
                let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() as f32).collect();
                let encoded = encoded(&codec, rows, cols, &values);
                let coded = Coded::new(&codec, &encoded.codes, &encoded.scales, rows, cols).unwrap();
                let mut plain = vec![0f32; rows * cols];
                for row in 0..rows {
                    coded.decode(Isa::PORTABLE, row, 0..cols, &mut plain[row * cols..(row + 1) * cols]);
                }
                let block_len = codec.block_len(cols);
                for (i, (value, got)) in values.iter().zip(&plain).enumerate() {
                    let scale = coded.scale(i / block_len);
                    // Scales that are rounded move the level that is nearest; twice its distance is allowed.
                    let nearest = codec.code.iter().map(|c| (c * scale - value).abs()).fold(f32::MAX, f32::min);
                    assert!(
                        (got - value).abs() <= 2.0 * nearest + 0.1 * scale.abs(),
                        "{}: {got} for {value}",
                        codec.name
                    );
                }
                for isa in Isa::tested() {
                    for range in [0..cols, 1..cols, 0..cols - 1, 3..cols / 2 + 1] {
                        let (mut wide, mut narrow) = (vec![0f32; range.len()], vec![bf16::ZERO; range.len()]);
                        coded.decode(isa, rows - 1, range.clone(), &mut wide);
                        coded.decode(isa, rows - 1, range.clone(), &mut narrow);
                        let expected = &plain[(rows - 1) * cols..][range];
                        assert_eq!(wide, expected, "{} {isa:?}", codec.name);
                        let rounded: Vec<bf16> = expected.iter().map(|value| bf16::of(*value)).collect();
                        assert_eq!(narrow, rounded, "{} {isa:?}", codec.name);
                    }
                }
            }
        }
    }

    /// What no encoder writes, but a file could hold: all paths still agree, and a scale that is not a number is not lost.
    #[test]
    fn an_index_beyond_the_code_book_is_its_last_level_and_a_broken_scale_shows() {
        let (rows, cols) = (2_usize, 70);
        for mut codec in codecs() {
            codec.scales = ScaleStorage::F32;
            let blocks = (rows * cols).div_ceil(codec.block_len(cols));
            let mut scales = vec![2.0; blocks];
            scales[blocks - 1] = f32::NAN;
            let encoded =
                Encoded { codes: vec![0xFF; codec.code_bytes(rows * cols)], scales: EncodedScales::F32(scales) };
            let coded = Coded::new(&codec, &encoded.codes, &encoded.scales, rows, cols).unwrap();
            for isa in Isa::tested() {
                let (mut wide, mut narrow) = (vec![0f32; cols], vec![bf16::ZERO; cols]);
                coded.decode(isa, 0, 0..cols, &mut wide);
                coded.decode(isa, 0, 0..cols, &mut narrow);
                let last = 2.0 * codec.code.last().unwrap();
                assert!(wide.iter().all(|value| *value == last), "{} {isa:?}: {wide:?}", codec.name);
                assert!(narrow.iter().all(|value| *value == bf16::of(last)), "{} {isa:?}: {narrow:?}", codec.name);
                coded.decode(isa, 1, 0..cols, &mut wide);
                coded.decode(isa, 1, 0..cols, &mut narrow);
                assert!(wide[cols - 1].is_nan() && narrow[cols - 1].is_nan(), "{} {isa:?}", codec.name);
            }
        }
    }

    #[test]
    fn a_product_with_an_encoded_weight_is_that_with_its_values() {
        fn check<E: ProductElement>(codec: &Codec) {
            let (m, rows, cols) = (9, 70, 134);
            let mut random = Stream::new(4, 1);
            let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() as f32).collect();
            let encoded = encoded(codec, rows, cols, &values);
            let matrix = Matrix::coded(codec, &encoded.codes, &encoded.scales, rows, cols).unwrap();
            let mut floats = vec![0f32; rows * cols];
            matrix.decode_rows(0..rows, &mut floats);
            let dense: Vec<E> = floats.iter().map(|value| E::of(*value)).collect();
            let x: Vec<E> = (0..m * cols).map(|_| E::of(random.uniform_f32())).collect();
            let dense = Right::Dense { values: &dense, cols };
            for (transposed, n) in [(true, rows), (false, cols)] {
                let results = [Right::Frozen(matrix), dense].map(|right| {
                    let mut y = vec![0f32; m * n];
                    let terms =
                        [Term { left: Left::rows(&x, if transposed { cols } else { rows }), right, transposed }];
                    let columns = [Columns { terms: &terms, at: 0, bias: None }];
                    product(m, &columns, Output::Wide(&mut y), n, Finish::default());
                    y
                });
                assert_eq!(results[0], results[1], "{} {transposed}", codec.name);
            }
        }
        for codec in codecs() {
            check::<f32>(&codec);
            check::<bf16>(&codec);
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_its_row() {
        let mut values = vec![1.0; 12 * 64];
        values[7 * 64 + 5] = f32::NAN;
        values[9 * 64] = f32::INFINITY;
        let read = |range: std::ops::Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&values[range.start * 64..range.end * 64]);
        };
        let error = encode(&Codec::nf4(), 12, 64, &read).unwrap_err();
        assert_eq!(error, "nf4: row 7 holds a value that is not finite");
    }

    /// Values on the borders between levels, next to them, and anywhere, over blocks with and without a tail, of code books with fewer
    /// levels, too: every processor finds as many borders below a value as a count does.
    #[test]
    fn every_way_to_search_finds_the_level_that_a_count_of_borders_does() {
        for levels in [2, 3, 9, 15, 16] {
            for (block, cols) in [(64, 64), (128, 192), (96, 97), (7, 64)] {
                let code = NF4[..levels].to_vec();
                let codec = Codec { code, block: CodecBlock::Flat(block), scales: ScaleStorage::F32, ..Codec::nf4() };
                let borders: Vec<f32> =
                    codec.code.windows(2).map(|w| ((f64::from(w[0]) + f64::from(w[1])) / 2.0) as f32).collect();
                let mut random = Stream::new(levels as u64, block as u64);
                let edges: Vec<f32> = borders.iter().flat_map(|b| [b.next_down(), *b, b.next_up()]).collect();
                let mut values: Vec<f32> = (0..5 * cols).map(|_| random.uniform_f32() * 2.0 - 1.0).collect();
                values
                    .iter_mut()
                    .enumerate()
                    .filter(|(i, _)| i % 3 == 0)
                    .for_each(|(i, v)| *v = edges[i / 3 % edges.len()]);
                // Each block has 1 as its largest magnitude, so that its values are those that are searched for.
                values.chunks_mut(block).for_each(|block| block[0] = if block.len() % 2 == 0 { 1.0 } else { -1.0 });
                for isa in [Isa::PORTABLE, Isa::AVX2, Isa::AVX512].map(|isa| isa.and(Isa::detected())) {
                    let Encoded { codes, .. } = with_isa(isa, || encoded(&codec, 5, cols, &values));
                    for (i, value) in values.iter().enumerate() {
                        let index = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
                        let count = borders.iter().filter(|border| **border < *value).count();
                        assert_eq!(usize::from(index), count, "{value} of {levels} levels, {block}, {isa:?}");
                    }
                }
            }
        }
    }

    /// What was encoded earlier is kept by [`ENCODING`]: whoever changes these bytes gives that another number.
    #[test]
    fn the_number_of_the_encoding_stands_for_its_bytes() {
        let mut random = Stream::new(8, 5);
        let values: Vec<f32> = (0..37 * 96).map(|_| random.uniform_f32() - 0.5).collect();
        let digests: Vec<u64> = codecs()
            .iter()
            .map(|codec| {
                let Encoded { codes, scales } = encoded(codec, 37, 96, &values);
                let (own, floats, offset) = match &scales {
                    EncodedScales::F32(scales) => (&[][..], scales, 0.0),
                    EncodedScales::Nested { codes, absmax, offset } => (&codes[..], absmax, *offset),
                };
                let floats = floats.iter().chain([&offset]).flat_map(|value| value.to_le_bytes());
                let bytes = codes.iter().chain(own).copied().chain(floats);
                bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
            })
            .collect();
        assert_eq!(
            (ENCODING, digests),
            (1, vec![14705146011889278594, 11735356620653439259, 2900237598417604509, 13171383389566029189])
        );
    }

    #[test]
    fn encoding_is_the_same_for_any_number_of_threads() {
        let (rows, cols) = (700, 321);
        let mut random = Stream::new(6, 1);
        let values: Vec<f32> = (0..rows * cols).map(|_| random.normal() as f32).collect();
        for codec in codecs() {
            let by = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| encoded(&codec, rows, cols, &values))
            };
            assert_eq!(by(1), by(3), "{}", codec.name);
        }
    }

    #[test]
    fn sizes_and_numbers_that_do_not_fit_are_refused() {
        let codec = Codec::nf4();
        let whole = encoded(&codec, 4, 96, &[0.5; 4 * 96]);
        assert!(Coded::new(&codec, &whole.codes, &whole.scales, 4, 96).is_ok());
        assert!(
            Coded::new(&codec, &whole.codes, &whole.scales, 5, 96)
                .unwrap_err()
                .contains("takes 240 bytes of indices and 8 scales")
        );
        assert!(
            Coded::new(&Codec::int8(), &whole.codes, &whole.scales, 4, 96)
                .unwrap_err()
                .contains("scales are not stored")
        );
        let wrong = |change: fn(&mut Codec)| {
            let mut codec = Codec::nf4();
            change(&mut codec);
            codec.check().unwrap_err()
        };
        assert!(wrong(|codec| codec.bits = 3).contains("3 bits"));
        assert!(wrong(|codec| codec.code.reverse()).contains("ascending"));
        assert!(wrong(|codec| codec.block = CodecBlock::Flat(0)).contains("1 to 1048576 values"));
        assert!(wrong(|codec| codec.block = CodecBlock::Flat(1 << 63)).contains("1 to 1048576 values"));
        assert!(wrong(|codec| codec.scales = ScaleStorage::Nested { block: 0, code: vec![] }).contains("nested"));
        let endless = |codec: &mut Codec| match &mut codec.scales {
            ScaleStorage::Nested { block, .. } => *block = 1 << 53,
            ScaleStorage::F32 => {}
        };
        assert!(wrong(endless).contains("a block of 1 to 1048576"));
    }
}
