//! A model of a cache that was carried here, as on a memory stick: `models--owner--name/`, put into the user's cache under its name.
//!
//! Its files are looked at before they count: a blob's name is its digest. A file system without links has the files of snapshots
//! themselves, and where their blobs lie beside them those tell their digests, too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use homeroom_engine::adapt::adapter::AdapterFiles;
use homeroom_engine::embedding::{EmbeddingModel, encoder_type};
use homeroom_engine::files::gguf::Gguf;
use homeroom_engine::files::{Kept, NewDirectory, open_regular, open_to_readers, take_away};
use homeroom_engine::models::BaseModel;

use super::cache::{self, Cached, Kind, Snapshot};
use super::digest::{Digest, Hasher};
use super::listing::RemoteFile;
use super::patience::Stop;
use super::place::Place;
use super::space::lacks;
use super::whole::paths;
use super::{HubName, policy, stores, verify};
use crate::interrupt;
use crate::progress::{self, Counting, line};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// A model that was taken into the cache.
pub struct Carried {
    /// `owner/name`.
    pub repo: String,
    /// Its folder in the cache.
    pub folder: PathBuf,
    /// The commits that were taken in.
    pub commits: Vec<String>,
    /// Commits of which files are missing, which were not.
    pub left_out: Vec<String>,
    /// Files whose digests nothing tells.
    pub unverified: usize,
    /// Bytes that were copied; 0: all of it was there already.
    pub bytes: u64,
    /// Branches and tags that mean another commit here, and stay as they are.
    pub kept_refs: Vec<String>,
}

/// Whether a directory is a model's folder of a cache.
pub fn is_folder(path: &Path) -> bool {
    cache::at(path).is_some() && path.join("snapshots").is_dir()
}

/// Copies a model's folder of another cache into the user's own. Nothing of the source is changed or linked to.
///
/// # Errors
/// When files are missing or not what their names say, the model cannot be loaded or is not allowed here, or there is no room.
pub fn take_in(source: &Path) -> Result<Carried> {
    let source = &source.canonicalize().with_context(|| source.display().to_string())?;
    let Cached { repo, refs, snapshots, .. } =
        cache::at(source).with_context(|| format!("{}: not models--owner--name of a cache", source.display()))?;
    policy::check(&repo)?;
    let store = stores::directory().context("there is no cache; set HF_HOME")?;
    let folder = stores::folder(&store, &repo);
    ensure!(
        folder.canonicalize().ok().as_ref() != Some(source),
        "{repo}: it lies in the cache already, {}",
        folder.display()
    );
    let (whole, partial): (Vec<_>, Vec<_>) = snapshots.into_iter().partition(|snapshot| snapshot.kind.is_some());
    ensure!(
        !whole.is_empty(),
        "{}: not all files of a model are there; copy the folder again, links and all",
        source.display()
    );
    whole.iter().try_for_each(check)?;

    let files = whole.iter().map(|snapshot| Ok((snapshot.commit.clone(), files(source, snapshot)?)));
    let files: Vec<(String, Vec<Source>)> = files.collect::<Result<_>>()?;
    let place = Place::new(&store, &repo);
    let commits: Vec<String> = files.iter().map(|(commit, _)| commit.clone()).collect();
    let wanted = refs.into_iter().filter(|(_, commit)| commits.contains(commit));
    // Names of branches come from file names of the stick.
    let wanted: Vec<_> = wanted.filter(|(name, _)| HubName::parse(&format!("{repo}@{name}")).is_some()).collect();
    let left_out = partial.into_iter().map(|snapshot| snapshot.commit).collect();
    if files.iter().all(|(commit, files)| files.iter().all(|file| is_here(&place, commit, file))) {
        let kept_refs = refer(&place, &wanted)?;
        return Ok(Carried { repo, folder, commits, left_out, unverified: 0, bytes: 0, kept_refs });
    }
    // A blob is copied once, however many snapshots link to it.
    let sizes: BTreeMap<&Path, u64> =
        files.iter().flat_map(|(_, files)| files).map(|file| (file.real.as_path(), file.size)).collect();
    let bytes: u64 = sizes.values().sum();
    if let Some(lacks) = lacks(&folder, bytes) {
        bail!("{repo}: {lacks}");
    }
    interrupt::end_at_once()?;
    let mut staged = NewDirectory::start(&folder)?;
    staged.replaces = false;
    let bar = progress::bytes("copying", bytes);
    let copied =
        Staging { source, place: Place::at(staged.path()), bar: &bar, done: 0, blobs: BTreeMap::new() }.copy(&files);
    bar.finish_and_clear();
    let copied = copied?;
    let unverified = copied.iter().filter(|file| file.remote.is_none()).count();
    let kept_refs = publish(staged, &place, &copied, &wanted)?;
    Ok(Carried { repo, folder, commits, left_out, unverified, bytes, kept_refs })
}

/// Loads what a snapshot holds, to see that it can be.
fn check(snapshot: &Snapshot) -> Result<()> {
    let path = &snapshot.path;
    match &snapshot.kind {
        Some(Kind::Adapter) => AdapterFiles::read(path).map(drop),
        Some(Kind::Embedding) => EmbeddingModel::load(path).map(drop),
        Some(Kind::Model) if encoder_type(path).is_some() => EmbeddingModel::load(path).map(drop),
        Some(Kind::Model) => BaseModel::load(path).map(drop),
        Some(Kind::Gguf(_)) | None => {
            let names = paths(path);
            let mut gguf = names.iter().filter(|name| name.to_ascii_lowercase().ends_with(".gguf"));
            gguf.try_for_each(|name| Gguf::open(&path.join(name)).map(drop))
        }
    }
}

/// A file of a snapshot.
struct Source {
    /// Its path in the snapshot.
    path: String,
    /// Where it lies.
    real: PathBuf,
    size: u64,
    /// What its blob's name says.
    digest: Option<Digest>,
}

/// The files of a snapshot.
fn files(source: &Path, snapshot: &Snapshot) -> Result<Vec<Source>> {
    let blobs = source.join("blobs").canonicalize().ok();
    let file = |path: String| {
        let at = snapshot.path.join(&path);
        let place = || at.display().to_string();
        let real = at.canonicalize().with_context(place)?;
        let own = blobs.as_ref().is_some_and(|blobs| real.parent() == Some(blobs)) || real.starts_with(&snapshot.path);
        ensure!(own, "{}: a link that leads out of the model's folder", at.display());
        let name = real.file_name().and_then(|name| name.to_str()).filter(|_| at.is_symlink());
        let digest = name.and_then(|name| Digest::sha256(name).or_else(|_| Digest::git(name)).ok());
        let size = open_regular(&real)?.metadata().with_context(place)?.len();
        Ok(Source { path, real, size, digest })
    };
    paths(&snapshot.path).into_iter().map(file).collect()
}

/// A file that was copied.
struct Copied {
    commit: String,
    path: String,
    /// Size and digest; `None`: no digest is known, and the file lies in the snapshot itself.
    remote: Option<RemoteFile>,
}

/// A folder in the making.
struct Staging<'a> {
    source: &'a Path,
    place: Place,
    bar: &'a Counting,
    done: u64,
    /// What has become of the source's files.
    blobs: BTreeMap<PathBuf, Digest>,
}

impl Staging<'_> {
    fn copy(mut self, files: &[(String, Vec<Source>)]) -> Result<Vec<Copied>> {
        self.place.prepare()?;
        let mut copied = Vec::new();
        for (commit, files) in files {
            for file in files {
                let digest = match self.blobs.get(&file.real) {
                    Some(digest) => Some(digest.clone()),
                    None => self.copy_file(commit, file)?,
                };
                let remote = digest.map(|digest| RemoteFile { path: file.path.clone(), size: file.size, digest });
                if let Some(remote) = &remote {
                    self.place.put(commit, remote, false)?;
                    self.blobs.insert(file.real.clone(), remote.digest.clone());
                }
                copied.push(Copied { commit: commit.clone(), path: file.path.clone(), remote });
            }
        }
        Ok(copied)
    }

    /// Copies a file and computes its digests on the way. Returns that of its blob; without one it lies in the snapshot.
    fn copy_file(&mut self, commit: &str, file: &Source) -> Result<Option<Digest>> {
        let path = &file.path;
        let partial = self.place.folder().join("blobs").join("copying");
        let place = || format!("{path}: cannot copy");
        let (mut from, mut to) = (open_regular(&file.real)?, File::create(&partial).with_context(place)?);
        let kinds = match &file.digest {
            Some(digest) => vec![digest.clone()],
            None => vec![Digest::sha256(&"0".repeat(64))?, Digest::git(&"0".repeat(40))?],
        };
        let mut hashers: Vec<Hasher> = kinds.iter().map(|kind| Hasher::like(kind, file.size)).collect();
        let (mut chunk, mut len) = (vec![0; CHUNK], 0);
        loop {
            let count = from.read(&mut chunk).with_context(place)?;
            if count == 0 {
                break;
            }
            to.write_all(&chunk[..count]).with_context(place)?;
            hashers.iter_mut().for_each(|hasher| hasher.update(&chunk[..count]));
            len += count as u64;
            self.bar.set_position(self.done + len);
        }
        self.done += len;
        ensure!(len == file.size, "{path}: it was written while it was copied");
        let found: Vec<String> = hashers.into_iter().map(Hasher::finish).collect();
        let digest = match &file.digest {
            Some(digest) => {
                ensure!(
                    found[0] == digest.name(),
                    "{}: damaged: its bytes are not those that its name says\nhint: copy the folder anew, or `homeroom pull` it",
                    file.real.display()
                );
                Some(digest.clone())
            }
            // What lies in the snapshot itself may have its blob beside it, as where links were copied as files.
            None => found
                .iter()
                .find(|name| self.source.join("blobs").join(name).is_file())
                .map(|name| Digest::sha256(name).or_else(|_| Digest::git(name)).expect("a digest was computed")),
        };
        match &digest {
            Some(digest) => self.place.publish(&partial, &to, digest).with_context(place)?,
            None => {
                to.sync_all().with_context(place)?;
                open_to_readers(&partial).with_context(place)?;
                self.place.put_itself(&partial, commit, path)?;
            }
        }
        Ok(digest)
    }
}

/// Gives the folder its name; if there is one, what that lacks is added to it. Returns the branches that mean another commit there.
fn publish(staged: NewDirectory, place: &Place, files: &[Copied], refs: &[(String, String)]) -> Result<Vec<String>> {
    let own = Place::at(staged.path());
    if fs::symlink_metadata(place.folder()).is_err() {
        refs.iter().try_for_each(|(name, commit)| own.refer(name, commit))?;
        return staged.publish().map(|_| Vec::new()).map_err(|error| {
            // Its source is there still.
            match error.downcast_ref::<Kept>().map(|kept| take_away(&kept.kept)) {
                Some(_) => error.context("another process makes the same folder; try again"),
                None => error,
            }
        });
    }
    place.check()?;
    place.prepare()?;
    for Copied { commit, path, remote } in files {
        match remote {
            Some(file) => {
                let waits = || line(format_args!("note: {path}: waiting for another process that downloads it"));
                let _lock = place.lock(&file.digest, &Stop::default(), waits)?;
                // What was copied has been checked; what is here may be damaged.
                if own.has_blob(file) {
                    fs::rename(own.blob(&file.digest), place.blob(&file.digest))
                        .with_context(|| format!("{}: cannot write", place.folder().display()))?;
                }
                place.put(commit, file, false)?;
            }
            None if place.pointer(commit, path).exists() => {}
            None => place.put_itself(&own.pointer(commit, path), commit, path)?,
        }
    }
    refer(place, refs)
}

/// Whether the cache has a file of a snapshot already: where its digest is known a link to that blob, else a file of that size.
fn is_here(place: &Place, commit: &str, file: &Source) -> bool {
    let pointer = place.pointer(commit, &file.path);
    match &file.digest {
        Some(digest) => {
            let remote = RemoteFile { path: file.path.clone(), size: file.size, digest: digest.clone() };
            let same =
                |a: &Path, b: &Path| a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b);
            place.has_blob(&remote)
                && same(&pointer, &place.blob(digest))
                && verify::damaged(vec![(pointer.clone(), remote)], &Stop::default()).is_ok_and(|all| all.is_empty())
        }
        None => fs::metadata(&pointer).is_ok_and(|about| about.is_file() && about.len() == file.size),
    }
}

/// Writes branches and tags. Returns those that mean another commit, which stay.
fn refer(place: &Place, refs: &[(String, String)]) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    for (name, commit) in refs {
        match cache::read_ref(place.folder(), name) {
            Some(other) if other != *commit => kept.push(name.clone()),
            _ => place.refer(name, commit)?,
        }
    }
    Ok(kept)
}
