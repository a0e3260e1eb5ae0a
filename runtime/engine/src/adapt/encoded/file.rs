//! A file of encoded weights: a magic number, the length of a header, the header as JSON and its SHA-256; then, where a page begins, the
//! weights in order. Where each lies follows from shapes and codecs, which are part of the header's key: nothing in the file says it.
//!
//! Of a weight: its indices where a page begins, its scales as f32, and, if they are nested, those of the second level, their indices and
//! their mean, each where a cache line begins. Numbers are in the order of the processor's bytes.

use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use homeroom_kernels::{Codec, ScaleStorage, Scales};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Wanted;
use crate::files::mapped::map_open;
use crate::models::weight::{CodeScales, Codes, MappedFloats, Weight};

/// Of this form.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"homeroom";
/// Longest header.
const HEADER_BYTES_MAX: u64 = 1 << 20;
const DIGEST_BYTES: usize = 32;
/// Where the weights begin.
const BODY: u64 = 2 << 20;
const PAGE: u64 = 4096;
const LINE: u64 = 64;

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// What its bytes depend on.
    pub key: String,
    /// Length of the file.
    pub bytes: u64,
    /// When it was made, in seconds: the file bears this time until it is written again.
    pub made: u64,
    /// What tells the files of the base from others.
    pub sources: Vec<String>,
}

/// Where the weights lie in a file.
#[derive(Clone, Debug)]
pub struct Places {
    weights: Vec<Place>,
    /// Length of the file.
    pub bytes: u64,
}

#[derive(Clone, Debug)]
struct Place {
    codes: Range<u64>,
    /// Scales, or those of the second level.
    floats: Range<u64>,
    /// Indices of nested scales, and where their mean is.
    nested: Option<(Range<u64>, u64)>,
}

impl Places {
    /// Of matrices (rows, cols) by their codecs.
    pub fn new<'a>(matrices: impl Iterator<Item = (&'a Codec, usize, usize)>) -> Self {
        let mut end = BODY;
        let mut take = |bytes: usize, alignment: u64| {
            let start = end.next_multiple_of(alignment);
            end = start + bytes as u64;
            start..end
        };
        let place = |(codec, rows, cols): (&Codec, usize, usize)| {
            let values = rows * cols;
            let blocks = values.div_ceil(codec.block_len(cols));
            let codes = take(codec.code_bytes(values), PAGE);
            match codec.scales {
                ScaleStorage::F32 => Place { codes, floats: take(4 * blocks, LINE), nested: None },
                ScaleStorage::Nested { block, .. } => {
                    let floats = take(4 * blocks.div_ceil(block), LINE);
                    let nested = Some((take(blocks, LINE), take(4, LINE).start));
                    Place { codes, floats, nested }
                }
            }
        };
        let weights = matrices.map(place).collect();
        Self { weights, bytes: end }
    }

    /// How many weights.
    pub fn count(&self) -> usize {
        self.weights.len()
    }

    /// The header of a file that is made now.
    pub fn header(&self, key: String, sources: Vec<String>) -> Header {
        // Some file systems keep every second second.
        let made = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()) / 2 * 2;
        Header { key, bytes: self.bytes, made, sources }
    }

    /// Writes a weight, and has the system begin to bring it to the disk.
    pub fn write(&self, file: &File, number: usize, codes: &[u8], scales: Scales<'_>) -> Result<()> {
        let place = &self.weights[number];
        put(file, &place.codes, codes)?;
        match (scales, &place.nested) {
            (Scales::F32(scales), None) => put(file, &place.floats, &bytes_of(scales))?,
            (Scales::Nested { codes, absmax, offset }, Some((nested, mean))) => {
                put(file, &place.floats, &bytes_of(absmax))?;
                put(file, nested, codes)?;
                put(file, &(*mean..mean + 4), &offset.to_ne_bytes())?;
            }
            _ => anyhow::bail!("its scales are not stored as the codec says"),
        }
        begin_writeback(file, place.codes.start);
        Ok(())
    }

    /// The weights of a mapped file, whose length is that of the places.
    pub fn weights(&self, map: &Arc<Mmap>, wanted: &[Wanted<'_>]) -> Result<Vec<Weight>> {
        ensure!(map.len() as u64 == self.bytes && wanted.len() == self.weights.len(), "it has another length");
        let range = |range: &Range<u64>| range.start as usize..range.end as usize;
        let weight = |(place, (source, codec)): (&Place, &Wanted<'_>)| {
            let floats = MappedFloats::new(map.clone(), range(&place.floats))?;
            let scales = match &place.nested {
                None => CodeScales::Mapped(floats),
                Some((codes, mean)) => {
                    let mean = MappedFloats::new(map.clone(), range(&(*mean..mean + 4)))?;
                    CodeScales::MappedNested(map.clone(), range(codes), floats, mean[0])
                }
            };
            let codes = Codes::Mapped(map.clone(), range(&place.codes));
            Weight::coded((*codec).clone(), codes, scales, (source.rows(), source.cols()))
        };
        self.weights.iter().zip(wanted).map(weight).collect()
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn put(mut file: &File, at: &Range<u64>, bytes: &[u8]) -> Result<()> {
    ensure!(bytes.len() as u64 == at.end - at.start, "a weight has another length than its codec says");
    file.seek(SeekFrom::Start(at.start))?;
    file.write_all(bytes)?;
    Ok(())
}

/// Has the system write what was written since `from`, without a wait, so that the disk is busy while more is encoded.
fn begin_writeback(file: &File, from: u64) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open for the length of the call. It is advice: where it fails, the wait is at the end.
        unsafe { libc::sync_file_range(file.as_raw_fd(), from as libc::off64_t, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, from);
}

/// Takes room for a file of this length, so that a full disk is seen before anything is encoded.
///
/// # Errors
/// When there is none.
pub fn reserve(file: &File, bytes: u64) -> Result<()> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open for the length of the call.
        let error = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, i64::try_from(bytes)?) };
        // Some file systems cannot.
        if !matches!(error, 0 | libc::EOPNOTSUPP | libc::EINVAL) {
            return Err(std::io::Error::from_raw_os_error(error)).context("cannot take room");
        }
    }
    file.set_len(bytes).context("cannot take room")
}

/// Writes the header of a file that has its weights, and brings all of it to the disk.
pub fn seal(mut file: &File, header: &Header) -> Result<()> {
    let text = serde_json::to_vec(header)?;
    ensure!(text.len() as u64 <= HEADER_BYTES_MAX, "the base lies in too many files");
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&[&MAGIC[..], &(text.len() as u64).to_le_bytes(), &text, &Sha256::digest(&text)].concat())?;
    file.sync_all().context("cannot bring it to the disk")?;
    file.set_modified(UNIX_EPOCH + Duration::from_secs(header.made))?;
    file.sync_all().context("cannot bring it to the disk")
}

/// Maps a file of this length, and reads its header.
///
/// # Errors
/// When it is not such a file, not whole, written since it was made, or not its user's alone. Names it.
pub fn open(path: &Path, bytes: u64) -> Result<(Arc<Mmap>, Header)> {
    let place = || path.display().to_string();
    let mut file = own(path).with_context(place)?;
    let about = file.metadata().with_context(place)?;
    ensure!(about.len() == bytes, "{}: it has {} bytes and should have {bytes}", place(), about.len());
    let header = read_header(&mut file).with_context(place)?;
    ensure!(header.bytes == bytes, "{}: its header is of another file", place());
    let made = UNIX_EPOCH + Duration::from_secs(header.made);
    ensure!(about.modified().with_context(place)? == made, "{}: it was written since it was made", place());
    Ok((map_open(&file, path)?, header))
}

fn read_header(file: &mut File) -> Result<Header> {
    let mut start = [0; 16];
    file.read_exact(&mut start)?;
    let [magic, len] = [&start[..8], &start[8..]].map(|part| part.try_into().unwrap_or([0; 8]));
    let len = u64::from_le_bytes(len);
    ensure!(magic == MAGIC && len <= HEADER_BYTES_MAX, "it is no encoded base");
    let mut text = vec![0; len as usize];
    let mut digest = [0; DIGEST_BYTES];
    file.read_exact(&mut text)?;
    file.read_exact(&mut digest)?;
    ensure!(Sha256::digest(&text)[..] == digest, "its header is damaged");
    serde_json::from_slice(&text).context("its header is of another version")
}

/// Opens a regular file of this user, which nobody else can write.
#[cfg(unix)]
fn own(path: &Path) -> Result<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let about: Metadata = file.metadata()?;
    // SAFETY: geteuid has no preconditions.
    let user = unsafe { libc::geteuid() };
    ensure!(about.is_file() && about.uid() == user && about.mode() & 0o022 == 0, "it is not a file of this user alone");
    Ok(file)
}

#[cfg(not(unix))]
fn own(path: &Path) -> Result<File> {
    crate::files::open_regular(path)
}
