//! Whether the files that are here are what their digests say. A disk or a memory stick can change bytes and keep their number.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use homeroom_engine::files::gguf::shard_paths;
use homeroom_engine::files::open_regular;

use super::cache::Found;
use super::digest::{Digest, Hasher};
use super::listing::RemoteFile;
use super::patience::Stop;
use super::whole::paths;
use crate::progress;

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// The files, each with where it lies, whose bytes have another digest. Reads all of them, which takes some seconds a gigabyte.
///
/// # Errors
/// When one cannot be read, or Ctrl-C is pressed.
pub(super) fn damaged(files: Vec<(PathBuf, RemoteFile)>, stop: &Stop) -> Result<Vec<RemoteFile>> {
    let bar = progress::bytes("checking", files.iter().map(|(_, file)| file.size).sum());
    let (mut done, mut known, mut damaged) = (0, HashMap::new(), Vec::new());
    let check = || -> Result<()> {
        for (at, file) in files {
            // Several links may lead to one blob.
            let real = at.canonicalize().with_context(|| at.display().to_string())?;
            let is_right = match known.get(&real) {
                Some(is_right) => *is_right,
                None => is_right(&real, &file, stop, |read| bar.set_position(done + read))?,
            };
            known.insert(real, is_right);
            done += file.size;
            if !is_right {
                damaged.push(file);
            }
        }
        Ok(())
    };
    let checked = check();
    bar.finish_and_clear();
    checked.map(|()| damaged)
}

fn is_right(at: &Path, file: &RemoteFile, stop: &Stop, tell: impl Fn(u64)) -> Result<bool> {
    let mut from = open_regular(at)?;
    let mut hasher = Hasher::like(&file.digest, file.size);
    let (mut chunk, mut len) = (vec![0; CHUNK], 0);
    loop {
        stop.check()?;
        // A disk that cannot read a file any more has damaged it.
        let Ok(read) = from.read(&mut chunk) else { return Ok(false) };
        if read == 0 {
            return Ok(len == file.size && hasher.finish() == file.digest.name());
        }
        hasher.update(&chunk[..read]);
        len += read as u64;
        tell(len);
    }
}

/// The files of a model in a cache whose digests are known without the hub: links to blobs, which are named by them.
pub(super) fn named(found: &Found) -> Vec<(PathBuf, RemoteFile)> {
    let files = match found.path.is_dir() {
        true => paths(&found.path).into_iter().map(|path| found.path.join(path)).collect(),
        false => shard_paths(&found.path),
    };
    let named = files.into_iter().filter_map(|at| {
        let blob = std::fs::read_link(&at).ok()?;
        let name = blob.file_name()?.to_str()?;
        let digest = Digest::sha256(name).or_else(|_| Digest::git(name)).ok()?;
        let (path, size) = (at.file_name()?.to_str()?.to_owned(), std::fs::metadata(&at).ok()?.len());
        Some((at, RemoteFile { path, size, digest }))
    });
    named.collect()
}
