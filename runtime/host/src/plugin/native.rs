//! A plugin's native codec: checked once by a round trip, then called from the kernels.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_abi::native::{NATIVE_CODEC, NativeCodec as Table};
use homeroom_abi::table::{Bytes, Descriptor};
use homeroom_engine::adapter::StrategyRecord;
use homeroom_engine::weight::NativeCodec;
use homeroom_kernels::{BlockCodec, Stream};

use super::{Plugin, Search, Trust};

/// The table of a library that is never unloaded.
struct Native {
    table: &'static Table,
    name: String,
}

impl fmt::Debug for Native {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "native codec `{}`", self.name)
    }
}

impl BlockCodec for Native {
    fn block_len(&self) -> usize {
        self.table.block_len as usize
    }

    fn block_bytes(&self) -> usize {
        self.table.block_bytes as usize
    }

    fn decode(&self, bytes: &[u8], values: &mut [f32]) {
        let blocks = values.len() / self.block_len();
        assert_eq!(
            (blocks * self.block_len(), blocks * self.block_bytes()),
            (values.len(), bytes.len()),
            "whole blocks"
        );
        // SAFETY: both buffers hold that many blocks; the table's contract is to touch nothing else and not to unwind.
        let code = unsafe { (self.table.decode)(bytes.as_ptr(), blocks, values.as_mut_ptr()) };
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
        let code = unsafe { (self.table.encode)(values.as_ptr(), blocks, bytes.as_mut_ptr()) };
        ensure!(code == 0, "codec `{}` failed to encode", self.name);
        Ok(())
    }
}

/// The codec of a plugin's descriptor, if it exports one.
///
/// # Errors
/// When its table is not of this ABI, or what it encodes does not come back.
pub(super) fn codec(descriptor: &Descriptor) -> Result<Option<Arc<dyn NativeCodec>>> {
    // SAFETY: the name is readable for the call, which returns null or a static table of the type that the name stands for.
    let table = unsafe { (descriptor.get_extension)(Bytes::of(NATIVE_CODEC.as_bytes())) }.cast::<Table>();
    if table.is_null() {
        return Ok(None);
    }
    ensure!(table.is_aligned(), "its native codec's table is not aligned");
    // SAFETY: the table begins with its size; nothing beyond it is read before that is known.
    let size = unsafe { (*table).struct_size } as usize;
    ensure!(size >= size_of::<Table>(), "its native codec's table has {size} bytes; rebuild it with this SDK");
    // SAFETY: it is static and at least as large as this type.
    let table = unsafe { &*table };
    ensure!(table.name.len <= 64, "its native codec's name is too long");
    // SAFETY: the name is static.
    let name = std::str::from_utf8(unsafe { table.name.as_slice() }).context("its native codec's name")?.to_owned();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    ensure!(!name.is_empty() && name.chars().all(plain), "`{name}` is not a codec's name");
    let (len, bytes) = (table.block_len, table.block_bytes);
    ensure!(
        len.is_power_of_two() && len <= 256,
        "codec `{name}`: a block of {len} values; it is a power of two, 256 at most"
    );
    ensure!((1..=4096).contains(&bytes), "codec `{name}`: a block of {bytes} bytes; it is 1 to 4096");
    let native = Native { table, name };
    round_trip(&native).with_context(|| format!("codec `{}` is not sound", native.name))?;
    Ok(Some(Arc::new(native)))
}

/// Encodes and decodes a few blocks, of zeros, small and large values, and looks at what comes back.
fn round_trip(codec: &Native) -> Result<()> {
    const BLOCKS: usize = 8;
    const GUARD: u8 = 0xA5;
    let (len, size) = (codec.block_len(), codec.block_bytes());
    let mut random = Stream::new(1, 1);
    let scale = |block: usize| [0.0, 1.0, 1e-3, 30.0][block % 4];
    let values: Vec<f32> = (0..BLOCKS * len).map(|i| (scale(i / len) * random.normal()) as f32).collect();
    let encoded = || -> Result<Vec<u8>> {
        let mut bytes = vec![GUARD; (BLOCKS + 1) * size];
        codec.encode(&values, &mut bytes[..BLOCKS * size])?;
        ensure!(bytes[BLOCKS * size..].iter().all(|byte| *byte == GUARD), "it writes beyond its blocks");
        bytes.truncate(BLOCKS * size);
        Ok(bytes)
    };
    let bytes = encoded()?;
    ensure!(encoded()? == bytes, "the same values give other bytes the second time");
    let mut decoded = vec![f32::NAN; BLOCKS * len];
    codec.decode(&bytes, &mut decoded);
    let mut one_by_one = vec![f32::NAN; BLOCKS * len];
    for (bytes, values) in bytes.chunks_exact(size).zip(one_by_one.chunks_exact_mut(len)) {
        codec.decode(bytes, values);
    }
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
