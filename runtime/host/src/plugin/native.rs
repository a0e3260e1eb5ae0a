//! A plugin's native codec: checked once by a round trip, then called from the kernels.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::native::{Decode, Encode, NATIVE_CODEC, NativeCodec as Table};
use homeroom_abi::table::{Bytes, GetExtension};
use homeroom_engine::adapt::adapter::StrategyRecord;
use homeroom_engine::models::weight::NativeCodec;
use homeroom_kernels::{BlockCodec, Stream};

use super::{Plugin, Search, Trust, foreign};

/// What the table of a library said when it was loaded; the library is never unloaded.
struct Native {
    block_len: usize,
    block_bytes: usize,
    encode: Encode,
    decode: Decode,
    name: String,
}

impl fmt::Debug for Native {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "native codec `{}`", self.name)
    }
}

impl BlockCodec for Native {
    fn block_len(&self) -> usize {
        self.block_len
    }

    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn decode(&self, bytes: &[u8], values: &mut [f32]) {
        let blocks = values.len() / self.block_len();
        assert_eq!(
            (blocks * self.block_len(), blocks * self.block_bytes()),
            (values.len(), bytes.len()),
            "whole blocks"
        );
        // SAFETY: both buffers hold that many blocks; the table's contract is to touch nothing else and not to unwind.
        let code = unsafe { (self.decode)(bytes.as_ptr(), blocks, values.as_mut_ptr()) };
        if code != 0 {
            // A product cannot fail; a loss that is not a number ends the run.
            values.fill(f32::NAN);
        }
    }
}

impl NativeCodec for Native {
    fn name(&self) -> &str {
        &self.name
    }

    fn encode(&self, values: &[f32], bytes: &mut [u8]) -> Result<()> {
        let blocks = values.len() / self.block_len();
        ensure!(
            (blocks * self.block_len(), blocks * self.block_bytes()) == (values.len(), bytes.len()),
            "codec `{}` takes whole blocks",
            self.name
        );
        // SAFETY: as in `decode`.
        let code = unsafe { (self.encode)(values.as_ptr(), blocks, bytes.as_mut_ptr()) };
        ensure!(code == 0, "codec `{}` failed to encode", self.name);
        Ok(())
    }
}

/// The codec of a plugin, if it exports one.
///
/// # Errors
/// When its table is not of this ABI, or what it encodes does not come back.
pub(super) fn codec(get_extension: GetExtension) -> Result<Option<Arc<dyn NativeCodec>>> {
    // SAFETY: the name is readable for the call; what is returned is checked.
    let table = unsafe { get_extension(Bytes::of(NATIVE_CODEC.as_bytes())) }.cast::<Table>();
    if table.is_null() {
        return Ok(None);
    }
    ensure!(table.is_aligned(), "its native codec's table is not aligned");
    // SAFETY: the table begins with its size; any bits are a number.
    let size = unsafe { foreign::value(table.cast::<u32>()) }.context("its native codec's table")? as usize;
    ensure!(size >= size_of::<Table>(), "its native codec's table has {size} bytes; rebuild it with this SDK");
    // SAFETY: any bits are numbers, pointers that nobody follows unasked, and functions that may be null.
    let table = unsafe { foreign::value(table) }.context("its native codec's table")?;
    let name = foreign::bytes(table.name.ptr, table.name.len, 64).context("its native codec's name")?;
    let name = String::from_utf8(name).context("its native codec's name")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    ensure!(!name.is_empty() && name.chars().all(plain), "{name:?} is not a codec's name");
    let (len, bytes) = (table.block_len, table.block_bytes);
    ensure!(
        len.is_power_of_two() && len <= 256,
        "codec `{name}`: a block of {len} values; it is a power of two, 256 at most"
    );
    ensure!((1..=4096).contains(&bytes), "codec `{name}`: a block of {bytes} bytes; it is 1 to 4096");
    let (Some(encode), Some(decode)) = (table.encode, table.decode) else {
        bail!(
            "codec `{name}`: its table has no function `{}`",
            if table.encode.is_none() { "encode" } else { "decode" }
        );
    };
    let native = Native { block_len: len as usize, block_bytes: bytes as usize, encode, decode, name };
    round_trip(&native).with_context(|| format!("codec `{}` is not sound", native.name))?;
    Ok(Some(Arc::new(native)))
}

/// A buffer with a margin on both sides that must stay as it is, wide enough for what is written by mistake.
struct Guarded<T> {
    all: Vec<T>,
    margin: usize,
    guard: T,
}

impl<T: Copy + PartialEq> Guarded<T> {
    /// Of `len` values, each `inside` at first.
    fn new(len: usize, guard: T, inside: T) -> Self {
        const MARGIN_BYTES: usize = 1 << 16;
        let margin = MARGIN_BYTES / size_of::<T>();
        let mut all = vec![guard; len + 2 * margin];
        all[margin..margin + len].fill(inside);
        Self { all, margin, guard }
    }

    fn inside(&mut self) -> &mut [T] {
        let end = self.all.len() - self.margin;
        &mut self.all[self.margin..end]
    }

    /// What is inside, if nothing was written beside it.
    fn checked(self) -> Option<Vec<T>> {
        let (margin, end) = (self.margin, self.all.len() - self.margin);
        let untouched = self.all[..margin].iter().chain(&self.all[end..]).all(|value| *value == self.guard);
        untouched.then(|| self.all[margin..end].to_vec())
    }
}

/// Encodes and decodes a few blocks, of zeros, small and large values, and looks at what comes back and at what lies beside it.
fn round_trip(codec: &Native) -> Result<()> {
    const BLOCKS: usize = 8;
    let (len, size) = (codec.block_len(), codec.block_bytes());
    let mut random = Stream::new(1, 1);
    let scale = |block: usize| [0.0, 1.0, 1e-3, 30.0][block % 4];
    let values: Vec<f32> = (0..BLOCKS * len).map(|i| (scale(i / len) * random.normal()) as f32).collect();
    let encoded = |inside: u8| -> Result<Vec<u8>> {
        let mut bytes = Guarded::new(BLOCKS * size, 0xA5, inside);
        codec.encode(&values, bytes.inside())?;
        bytes.checked().context("it encodes beyond its blocks")
    };
    let bytes = encoded(0)?;
    ensure!(encoded(0)? == bytes, "the same values give other bytes the second time");
    ensure!(encoded(0xFF)? == bytes, "it leaves bytes of its blocks as they were");
    let decode = |bytes: &[u8]| -> Result<Vec<f32>> {
        let mut values = Guarded::new(bytes.len() / size * len, 1.5e-30_f32, f32::NAN);
        codec.decode(bytes, values.inside());
        values.checked().context("it decodes beyond its blocks")
    };
    let decoded = decode(&bytes)?;
    let one_by_one = bytes.chunks_exact(size).map(decode).collect::<Result<Vec<_>>>()?.concat();
    let same = decoded.iter().zip(&one_by_one).all(|(a, b)| a.to_bits() == b.to_bits());
    ensure!(same, "a block decodes otherwise beside others than alone");
    for (block, (got, want)) in decoded.chunks_exact(len).zip(values.chunks_exact(len)).enumerate() {
        let largest = want.iter().fold(0_f32, |most, value| most.max(value.abs()));
        let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0_f32, f32::max);
        ensure!(got.iter().all(|value| value.is_finite()), "block {block} decodes to values that are not finite");
        ensure!(apart <= 0.5 * largest, "block {block} comes back {apart} away, of values up to {largest}");
    }
    Ok(())
}

/// The codec that an adapter's base was stored by, from the plugin that the adapter's strategy came from.
///
/// # Errors
/// When the plugin is not there, may not be loaded, or has no such codec.
pub fn find(strategy: &StrategyRecord, name: &str) -> Result<Arc<dyn NativeCodec>> {
    find_by(|| Search::new(&[], Trust::of_user(None)?).load(&strategy.name), strategy, name)
}

/// The same where a search is there, with directories and a policy of its own.
///
/// # Errors
/// As [`find`].
pub fn find_in(search: &Search, strategy: &StrategyRecord, name: &str) -> Result<Arc<dyn NativeCodec>> {
    find_by(|| search.load(&strategy.name), strategy, name)
}

fn find_by(
    load: impl FnOnce() -> Result<Plugin>,
    strategy: &StrategyRecord,
    name: &str,
) -> Result<Arc<dyn NativeCodec>> {
    let StrategyRecord { name: plugin, version, .. } = strategy;
    let missing = |error: anyhow::Error| {
        anyhow!(
            "its base is stored by the native codec `{name}` of the plugin `{plugin}` {version}, without which it cannot be read\n{error:#}"
        )
    };
    let plugin = load().map_err(missing)?;
    of_plugin(&plugin, name)
}

/// The codec of that name of a loaded plugin.
///
/// # Errors
/// When the plugin has none, or another.
pub fn of_plugin(plugin: &Plugin, name: &str) -> Result<Arc<dyn NativeCodec>> {
    match &plugin.codec {
        Some(codec) if codec.name() == name => Ok(codec.clone()),
        Some(codec) => bail!("the plugin has the native codec `{}`, not `{name}`", codec.name()),
        None => bail!("the plugin has no native codec `{name}`"),
    }
}
