//! Downloads one file: goes on where an earlier try ended, checks what came, and gives it its name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use ureq::http::Response;
use ureq::{Body, ResponseExt};

use super::client::{Client, Refusal, broken, host};
use super::digest::Hasher;
use super::listing::RemoteFile;
use super::patience::{Failure, Patience, Tries};
use super::place::{Place, open_partial};
use super::space::{became_full, is_full};
use crate::progress::{self, Downloading};

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// One file, and where it comes from and goes.
pub(super) struct Blob<'a> {
    pub(super) client: &'a Client,
    pub(super) url: String,
    pub(super) file: &'a RemoteFile,
    pub(super) place: &'a Place,
    /// Bytes of it that the progress counts as here.
    pub(super) counted: u64,
    /// What has its name is damaged.
    pub(super) is_damaged: bool,
    pub(super) progress: &'a Downloading,
    pub(super) explain: &'a (dyn Fn(&Refusal) -> anyhow::Error + Sync),
}

impl Blob<'_> {
    /// Downloads it, unless another process does or has done so. Counts its bytes in the progress.
    ///
    /// # Errors
    /// When it cannot be had. What came of it stays, to go on from, unless it is wrong or the disk is full.
    pub(super) fn download(&self) -> Result<()> {
        let path = &self.file.path;
        let wait = || self.progress.say(format_args!("note: {path}: waiting for another process that downloads it"));
        let lock = self.place.lock(&self.file.digest, &self.client.stop, wait)?;
        if !self.is_damaged && self.place.has_blob(self.file) {
            self.progress.add_old(self.file.size - self.counted);
            return Ok(());
        }
        // Where locks are void another process may write to the same file: then each has its own, and none goes on with another's.
        let partial = match lock.is_void {
            false => self.place.partial(&self.file.digest),
            true => self.place.partial(&self.file.digest).with_extension(format!("{}.incomplete", std::process::id())),
        };
        let (mut wrong, mut counted) = (None, self.counted);
        for _ in 0..2 {
            if let Some(got) = &wrong {
                let note = format!("note: {path}: what came is not what the hub's list names ({got}); downloaded anew");
                self.progress.say(note);
            }
            self.place.prepare()?;
            let begun = Partial::open(&partial, self, counted)?;
            let (file, got) = match begun.complete(self) {
                Ok(complete) => complete,
                Err(error) => {
                    // Of nothing that came there is nothing to go on from, nor where the next process has a file of its own.
                    if lock.is_void
                        || self.client.stop.is_full()
                        || fs::metadata(&partial).is_ok_and(|meta| meta.len() == 0)
                    {
                        let _ = fs::remove_file(&partial);
                    }
                    return Err(error);
                }
            };
            if got == self.file.digest.name() {
                let published = self.place.publish(&partial, &file, &self.file.digest);
                return published.map_err(|error| self.unwritten(&partial, error));
            }
            drop(file);
            fs::remove_file(&partial).with_context(|| format!("{}: cannot remove", partial.display()))?;
            self.progress.take_back(self.file.size);
            (wrong, counted) = (Some(got), 0);
        }
        bail!(
            "{path}: its digest is {}, and the hub's list says {}; what came is deleted\nhint: a proxy or a mirror may change files; \
             try another network, or look whether HF_ENDPOINT is right",
            wrong.unwrap_or_default(),
            self.file.digest.name()
        )
    }

    /// The message of a write that failed; of a full disk nothing is kept.
    fn unwritten(&self, partial: &Path, error: io::Error) -> anyhow::Error {
        if is_full(&error) {
            let missing = self.file.size;
            self.client.stop.set_full();
            let _ = fs::remove_file(partial);
            return anyhow!("{}: {}", self.file.path, became_full(self.place.folder(), missing, &error));
        }
        anyhow::Error::new(error).context(format!("{}: cannot write", partial.display()))
    }

    fn lies(&self, partial: &Path, what: &str) -> Failure {
        let _ = fs::remove_file(partial);
        let RemoteFile { path, size, .. } = self.file;
        Failure::Final(anyhow!(
            "{path}: the hub's list says that it has {size} bytes, and {what}; what came is deleted"
        ))
    }
}

/// What has come of a file.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hasher: Hasher,
}

impl Partial {
    /// Takes up what there is, and computes its digest. `counted`: bytes of it that the progress counts as here.
    fn open(path: &Path, blob: &Blob, counted: u64) -> Result<Self> {
        let mut file = open_partial(path)?;
        let len = file.metadata()?.len();
        let hasher = Hasher::like(&blob.file.digest, blob.file.size);
        let mut partial = Self { path: path.to_owned(), file: file.try_clone()?, len: 0, hasher };
        blob.progress.add_old(len);
        blob.progress.take_back(counted);
        if len > blob.file.size {
            partial.len = len;
            partial.restart(blob).map_err(|error| blob.unwritten(path, error))?;
            return Ok(partial);
        }
        let checking = blob.progress.checking(len);
        let mut buffer = vec![0; CHUNK];
        while partial.len < len {
            blob.client.stop.check()?;
            let most = usize::try_from(len - partial.len).unwrap_or(CHUNK).min(CHUNK);
            let read = file.read(&mut buffer[..most]).with_context(|| format!("{}: cannot read", path.display()))?;
            if read == 0 {
                bail!("{}: another process cut it", path.display());
            }
            partial.hasher.update(&buffer[..read]);
            partial.len += read as u64;
        }
        drop(checking);
        Ok(partial)
    }

    /// Forgets what came.
    fn restart(&mut self, blob: &Blob) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        blob.progress.take_back(self.len);
        self.len = 0;
        self.hasher = Hasher::like(&blob.file.digest, blob.file.size);
        Ok(())
    }

    /// Downloads the rest; returns the file and the digest of all of it.
    fn complete(mut self, blob: &Blob) -> Result<(File, String)> {
        let mut tries = Tries::of_file(blob.client.patience, self.len > 0);
        let mut most = self.len;
        while self.len < blob.file.size {
            if let Err(failure) = self.go_on(blob) {
                // What came again is no gain: else a server that always begins anew would be asked without end.
                let got_on = self.len > most;
                most = most.max(self.len);
                let (is_first, stop) = (!blob.client.has_answered(), &blob.client.stop);
                tries.wait(&blob.file.path, failure, got_on, is_first, stop, |note| blob.progress.say(note))?;
            }
        }
        Ok((self.file, self.hasher.finish()))
    }

    /// One request, and as much as it brings.
    fn go_on(&mut self, blob: &Blob) -> Result<(), Failure> {
        let size = blob.file.size;
        let from = (self.len > 0).then_some(self.len);
        let response = blob.client.get(&blob.url, from, &|refusal| (blob.explain)(refusal))?;
        let status = response.status().as_u16();
        let unwritten = |error, path: &Path| Failure::Final(blob.unwritten(path, error));
        match status {
            206 if range(&response) == Some((self.len, size)) => {}
            206 => {
                self.restart(blob).map_err(|error| unwritten(error, &self.path))?;
                let what = "the server sent another part of it than it was asked for".to_owned();
                return Err(Failure::Passing { what, after: None });
            }
            416 => {
                return Err(blob.lies(&self.path, &format!("the server has no more than {}", self.len)));
            }
            _ => {
                // All of it, though a part was asked for: the server knows no ranges.
                self.restart(blob).map_err(|error| unwritten(error, &self.path))?;
                if let Some(length) = length(&response).filter(|length| *length != size) {
                    let encoding = response.headers().get("content-encoding");
                    let encoding = encoding.map(|encoding| format!(" (encoded: {encoding:?})")).unwrap_or_default();
                    return Err(blob.lies(&self.path, &format!("the server sends {length}{encoding}")));
                }
            }
        }
        let awaited = blob.client.silence.begin(&host(response.get_uri()));
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        let at = |what: &str, len| {
            let what = format!("{what} at {} of {}", progress::size(len), progress::size(size));
            Failure::Passing { what, after: None }
        };
        let Patience { silence, bytes_min, .. } = blob.client.patience;
        let (mut since, mut before) = (Instant::now(), self.len);
        while self.len < size {
            blob.client.stop.check()?;
            // One that sends a byte now and then is never silent.
            if since.elapsed() > silence {
                if self.len - before < bytes_min {
                    return Err(at("the server sends next to nothing", self.len));
                }
                (since, before) = (Instant::now(), self.len);
            }
            let most = usize::try_from(size - self.len).unwrap_or(CHUNK).min(CHUNK);
            let read = match body.read(&mut buffer[..most]) {
                Ok(0) => return Err(at("the connection was cut", self.len)),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(match broken(&error) {
                        Failure::Passing { what, .. } => at(&what, self.len),
                        other => other,
                    });
                }
            };
            awaited.came();
            self.file.write_all(&buffer[..read]).map_err(|error| unwritten(error, &self.path))?;
            self.hasher.update(&buffer[..read]);
            self.len += read as u64;
            blob.progress.add(read as u64);
        }
        // An end that does not come does no harm; more bytes do.
        match body.read(&mut buffer[..1]) {
            Ok(1) => Err(blob.lies(&self.path, "the server sends more")),
            _ => Ok(()),
        }
    }
}

/// Where a part begins, and how long the whole is: `Content-Range: bytes 7-99/100`.
fn range(response: &Response<Body>) -> Option<(u64, u64)> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    let (part, whole) = range.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = part.split_once('-')?;
    let (first, last, whole): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, whole.parse().ok()?);
    (first <= last && last < whole).then_some((first, whole))
}

fn length(response: &Response<Body>) -> Option<u64> {
    response.headers().get("content-length")?.to_str().ok()?.trim().parse().ok()
}
