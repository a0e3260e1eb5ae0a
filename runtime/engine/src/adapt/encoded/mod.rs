//! Bases as a codec has them, kept in files: what encoding a base makes is written once and mapped by whoever asks for it again, so that
//! it is there at once, its pages are shared between processes, and the system can take them back.
//!
//! A file is of one base, by the digest of its values, and of what is done to it: the codec of each module, and [`ENCODING`]. It is
//! believed if it is whole, was not written since it was made, was made of the very files that the base lies in now (or of files with the
//! same SHA-256, where that is known), and if some rows of each weight, encoded anew, are what it holds. Else it is made anew.
//!
//! [`file`](self::file) is what such a file looks like; here is what becomes of it.

mod file;
#[cfg(test)]
mod tests;

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use homeroom_kernels::{Codec, CodecBlock, ENCODING, ScaleStorage, Scales, encode};
use sha2::{Digest, Sha256};

use self::file::{Header, Places};
use crate::files::{ClaimedFile, digest, free_bytes, make_directory};
use crate::models::BaseModel;
use crate::models::weight::Weight;

/// What names of these files end with.
const ENDING: &str = "encoded";
/// Files that stay, those that were used last.
const FILES_MAX: usize = 4;
/// Smallest encoding that is kept, in bytes: less is encoded in a moment.
const BYTES_MIN: u64 = 128 << 20;
/// Bytes that stay free on the disk beside a file.
const SPARE: u64 = 4 << 30;
/// Values of the largest part of a weight that is encoded anew to compare it.
const SAMPLE_MAX: usize = 1 << 22;

/// A directory of encoded bases.
#[derive(Clone, Debug)]
pub struct EncodedBases {
    directory: PathBuf,
    digests: Option<PathBuf>,
    tell: fn(&str),
    bytes_min: u64,
    spare: u64,
}

/// A weight that is to be encoded, and how.
pub(super) type Wanted<'a> = (&'a Weight, &'a Codec);

impl EncodedBases {
    /// Those of a directory of the user's alone, which need not be there yet. `digests` is the file of kept digests, see
    /// [`digest::of_files`]; `tell` hears in a line what was kept, and why something could not be.
    pub fn new(directory: PathBuf, digests: Option<PathBuf>, tell: fn(&str)) -> Self {
        Self { directory, digests, tell, bytes_min: BYTES_MIN, spare: SPARE }
    }

    /// As it is, but for small bases and full disks, too.
    #[cfg(test)]
    fn of_any_size(self) -> Self {
        Self { bytes_min: 0, spare: 0, ..self }
    }

    /// The weights of a base by their codecs: mapped, if they were encoded before; else encoded by `encode`, which is given the number of
    /// each in turn, kept, and mapped. `modules` are the paths of the weights.
    ///
    /// # Errors
    /// Those of `encode`. What cannot be kept is told, and the weights are in memory.
    pub(super) fn weights(
        &self,
        model: &BaseModel,
        modules: &[&str],
        wanted: &[Wanted<'_>],
        mut encode: impl FnMut(usize) -> Result<Weight>,
    ) -> Result<Vec<Weight>> {
        let places = Places::new(wanted.iter().map(|(weight, codec)| (*codec, weight.rows(), weight.cols())));
        let all = 0..wanted.len();
        if places.bytes < self.bytes_min {
            return all.map(encode).collect();
        }
        // Files that were written just now, or since they were mapped, have no name that can be trusted.
        let Some(sources) = model.identities() else { return all.map(encode).collect() };
        let key = key(model, modules, wanted);
        let kept = Kept { path: self.directory.join(format!("{key}.{ENDING}")), header: places.header(key, sources) };
        if kept.path.exists() {
            match self.open(&kept, &places, wanted) {
                Ok(weights) => return Ok(weights),
                Err(why) => (self.tell)(&format!("note: the encoded base that was kept is made anew: {why:#}")),
            }
        }
        let writer = match self.begin(&kept, &places) {
            Ok(writer) => writer,
            Err(why) => {
                (self.tell)(&format!("note: the encoded base is not kept for the next time: {why:#}"));
                return all.map(encode).collect();
            }
        };
        for number in all.clone() {
            // One that cannot write any more says why at the end.
            if writer.parts.send((number, encode(number)?)).is_err() {
                break;
            }
        }
        let finish = || {
            let file = writer.end()?;
            ensure!(model.identities() == Some(kept.header.sources.clone()), "the base was written meanwhile");
            file.finish(&kept.path)?;
            self.open(&kept, &places, wanted)
        };
        match finish() {
            Ok(weights) => {
                let (bytes, place) = (places.bytes as f64 / 1e9, self.directory.display());
                (self.tell)(&format!("note: encoded base kept for the next time, {bytes:.1} GB, in {place}"));
                self.prune(&kept.path);
                Ok(weights)
            }
            Err(why) => {
                (self.tell)(&format!("warning: the encoded base is not kept for the next time: {why:#}"));
                all.map(encode).collect()
            }
        }
    }

    /// The weights in a file that can be believed.
    fn open(&self, kept: &Kept, places: &Places, wanted: &[Wanted<'_>]) -> Result<Vec<Weight>> {
        let (map, header) = file::open(&kept.path, places.bytes)?;
        ensure!(header.key == kept.header.key, "{}: it is of something else", kept.path.display());
        let known = digest::kept(self.digests.as_deref());
        let same = |(one, other): (&String, &String)| {
            one == other || known.get(one).is_some_and(|digest| known.get(other) == Some(digest))
        };
        let sources = (&header.sources, &kept.header.sources);
        ensure!(
            sources.0.len() == sources.1.len() && sources.0.iter().zip(sources.1).all(same),
            "the files of the base were written since"
        );
        let weights = places.weights(&map, wanted).with_context(|| kept.path.display().to_string())?;
        for (weight, (source, codec)) in weights.iter().zip(wanted) {
            for row in sample(source, codec) {
                weight.will_need_row(row);
                source.will_need_row(row);
            }
        }
        for (weight, (source, codec)) in weights.iter().zip(wanted) {
            ensure!(agrees(weight, source, codec)?, "{}: it holds other values", kept.path.display());
            // Around what was compared the system may have mapped more.
            source.release();
        }
        touch(&kept.path);
        Ok(weights)
    }

    /// Begins to write a file, if there is room for it.
    fn begin(&self, kept: &Kept, places: &Places) -> Result<Writer> {
        make_directory(&self.directory)?;
        let place = || self.directory.display().to_string();
        let part = ClaimedFile::new(&self.directory).with_context(place)?;
        if let Some(free) = free_bytes(&self.directory).filter(|free| *free < places.bytes.saturating_add(self.spare)) {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            bail!(
                "{}: it takes {:.1} GB, {:.1} GB are free, and {:.1} GB are to stay so",
                place(),
                gigabytes(places.bytes),
                gigabytes(free),
                gigabytes(self.spare)
            );
        }
        file::reserve(part.file(), places.bytes).with_context(place)?;
        // The encoder goes on while a weight is written, and waits before there are many.
        let (parts, weights) = sync_channel(2);
        let (header, places) = (kept.header.clone(), places.clone());
        let thread = thread::spawn(move || write(part, &header, &places, &weights));
        Ok(Writer { parts, thread })
    }

    /// Removes the files that were used longest ago, if there are many, but for this one.
    fn prune(&self, own: &Path) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let others = entries.filter(|path| path != own && path.extension().is_some_and(|ending| ending == ENDING));
        let used = |path: &PathBuf| fs::symlink_metadata(path).and_then(|about| about.accessed()).ok();
        let mut others: Vec<_> = others.map(|path| (used(&path), path)).collect();
        others.sort();
        let surplus = (others.len() + 1).saturating_sub(FILES_MAX);
        for (_, path) in others.into_iter().take(surplus) {
            // A process that has it mapped keeps it.
            if fs::remove_file(&path).is_ok() {
                (self.tell)(&format!("note: {}: an encoded base that was long not used is removed", path.display()));
            }
        }
    }
}

/// A file, and what it says of itself.
struct Kept {
    path: PathBuf,
    header: Header,
}

/// The thread that writes a file, and how it gets the weights.
struct Writer {
    parts: SyncSender<(usize, Weight)>,
    thread: JoinHandle<Result<ClaimedFile>>,
}

impl Writer {
    /// The file, all of which is on the disk.
    fn end(self) -> Result<ClaimedFile> {
        drop(self.parts);
        self.thread.join().map_err(|_| anyhow::anyhow!("its writer panicked"))?
    }
}

fn write(
    part: ClaimedFile,
    header: &Header,
    places: &Places,
    weights: &Receiver<(usize, Weight)>,
) -> Result<ClaimedFile> {
    let mut missing = places.count();
    for (number, weight) in weights {
        let encoding = weight.encoding().context("a weight is not encoded")?;
        places.write(part.file(), number, encoding.1, encoding.2)?;
        missing -= 1;
    }
    ensure!(missing == 0, "{missing} weights are missing");
    file::seal(part.file(), header)?;
    Ok(part)
}

/// Notes that a file was used, where the system does not do that by itself.
fn touch(path: &Path) {
    let set = |file: File| file.set_times(FileTimes::new().set_accessed(SystemTime::now()));
    // Otherwise it counts as one that was not used, and is removed sooner.
    let _ = File::options().write(true).open(path).and_then(set);
}

/// The rows in the middle of a weight that are compared: as few as are whole blocks, and none where those would be many.
fn sample(source: &Weight, codec: &Codec) -> std::ops::Range<usize> {
    let (rows, cols) = (source.rows(), source.cols());
    let whole = codec.whole_rows(cols);
    if whole.min(rows).saturating_mul(cols) > SAMPLE_MAX {
        return 0..0;
    }
    let first = rows / 2 / whole * whole;
    first..rows.min(first + whole)
}

/// Whether the rows of the sample, encoded anew, are what a weight holds.
fn agrees(weight: &Weight, source: &Weight, codec: &Codec) -> Result<bool> {
    let (rows, cols) = (sample(source, codec), source.cols());
    let (first, count) = (rows.start, rows.len());
    if count == 0 {
        return Ok(true);
    }
    let matrix = source.matrix();
    let read = |part: std::ops::Range<usize>, out: &mut [f32]| {
        matrix.decode_rows(first + part.start..first + part.end, out);
    };
    let fresh = encode(codec, count, cols, &read).map_err(anyhow::Error::msg)?;
    let (_, codes, scales) = weight.encoding().context("it is not encoded")?;
    let at = codec.code_bytes(first * cols);
    let same_scales = match (fresh.scales.view(), scales) {
        (Scales::F32(fresh), Scales::F32(scales)) => {
            let at = first * cols / codec.block_len(cols);
            let bits = |scales: &[f32]| scales.iter().map(|scale| scale.to_bits()).collect::<Vec<_>>();
            bits(fresh) == bits(&scales[at..at + fresh.len()])
        }
        // Nested ones depend on the mean of all.
        _ => true,
    };
    Ok(same_scales && fresh.codes == codes[at..at + fresh.codes.len()])
}

/// What a file's bytes depend on: the values of the base, and what is done to them. The files that the base lies in are compared
/// besides, as the digest is of some rows.
fn key(model: &BaseModel, modules: &[&str], wanted: &[Wanted<'_>]) -> String {
    let mut hash = Sha256::new();
    let order = if cfg!(target_endian = "little") { "little" } else { "big" };
    hash.update(format!("encoded base {} {ENCODING} {order}\n{}\n", file::VERSION, model.digest()));
    for (path, (weight, codec)) in modules.iter().zip(wanted) {
        let Codec { name, bits, block, code, scales } = codec;
        let block = match block {
            CodecBlock::Flat(len) => format!("blocks of {len}"),
            CodecBlock::Row => "rows".to_owned(),
        };
        let (nested, nested_code) = match scales {
            ScaleStorage::F32 => ("f32".to_owned(), &[][..]),
            ScaleStorage::Nested { block, code } => (format!("nested {block}"), &code[..]),
        };
        let (rows, cols, from) = (weight.rows(), weight.cols(), weight.storage_name());
        let words = [path, name.as_str(), &from, &block, &nested];
        let lens = words.map(|word| word.len().to_string()).join(" ");
        hash.update(format!("{lens}\n{}\n{rows} {cols} {bits} {}\n", words.join("\n"), code.len()));
        code.iter().chain(nested_code).for_each(|value| hash.update(value.to_le_bytes()));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
