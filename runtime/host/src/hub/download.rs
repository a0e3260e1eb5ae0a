//! Downloads a model into the cache: asks for its newest commit and its files, chooses those that are read, looks whether there is room,
//! and brings what is missing. A ref is written last, so that what it leads to is whole.

use std::collections::HashSet;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use homeroom_engine::embedding::is_encoder;
use homeroom_engine::files::gguf::{ShardName, architecture_in};
use homeroom_engine::files::read_text;
use homeroom_engine::models::Architecture;
use homeroom_engine::models::families::Family;
use serde_json::Value;
use ureq::http::Response;
use ureq::{Body, ResponseExt};

use super::blob::Blob;
use super::cache::{self, Found, find, find_in};
use super::choose::choose;
use super::client::{Client, broken, host};
use super::digest::{Digest, Hasher};
use super::explain::explain;
use super::listing::{self, Listing, RemoteFile};
use super::patience::{Failure, NoConnection, Tries};
use super::place::{self, Place};
use super::{COMMIT_TOLD, Endpoint, HubName, Patience, Token, offline, policy, space, stores, verify};
use crate::interrupt::{self, Interrupted};
use crate::progress::{Downloading, line, size};

/// Files that are downloaded at the same time.
const CONNECTIONS: usize = 4;
/// How often Ctrl-C is looked for, and progress is drawn.
const TICK: Duration = Duration::from_millis(100);
/// Bytes of a GGUF file that are read before it is downloaded, to see what it is of.
const BEGINNING_BYTES: u64 = 16 << 10;
/// Longest configuration that is looked at, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The hub, and the store that is filled from it.
pub struct Hub {
    client: Client,
    store: PathBuf,
    /// Files come, and who draws their progress tells of silence.
    is_bringing: AtomicBool,
}

/// A model that was asked for.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// Where it is.
    pub found: Found,
    /// Bytes that came; zero if all of it was here.
    pub bytes: u64,
    /// The time that took.
    pub time: Duration,
    /// Its license, by its owner's word.
    pub license: Option<String>,
    /// The base that it is an adapter of, if the hub has that.
    pub base: Option<HubName>,
}

/// Asks the hub for the newest commit of the model's revision, and downloads what is missing of it. Ctrl-C ends it soon, and what has
/// come stays, to go on from.
///
/// # Errors
/// When the name is not allowed here, there is no network or it may not be used, the hub refuses, what comes is wrong, or there is no room.
pub fn pull(name: &HubName) -> Result<Pulled> {
    interrupt::heeded(|| Hub::from_environment()?.pull(name))
}

/// Reads the `config.json` of a model on the hub, and keeps nothing.
///
/// # Errors
/// As [`pull`], and when the model has none.
pub fn config(name: &HubName) -> Result<String> {
    interrupt::heeded(|| Hub::from_environment()?.config(name))
}

/// Asks the hub's address for anything, once and without the token; returns what answered, in words.
///
/// # Errors
/// When nothing answers.
pub fn reach() -> Result<String> {
    interrupt::heeded(|| {
        let patience = Patience { connect: REACH_TIME, silence: REACH_TIME, ..Patience::default() };
        let client = Client::new(Endpoint::from_environment()?, None, patience)?;
        match client.reach() {
            Ok((host, status)) => Ok(format!("{host} answers (status {status})")),
            Err(Failure::Unreachable { host, what }) => Err(NoConnection { host, what }.into()),
            Err(Failure::Passing { what, .. }) => bail!("{what}"),
            Err(Failure::Final(error)) => Err(error),
        }
    })
}

/// How long is waited for an answer that shows no more than that the hub can be reached.
const REACH_TIME: Duration = Duration::from_secs(8);

impl Hub {
    /// A hub, and a store in the form of Hugging Face's cache.
    ///
    /// # Errors
    /// When a file of certificates that the environment names cannot be used.
    pub fn new(endpoint: Endpoint, token: Option<Token>, store: PathBuf, patience: Patience) -> Result<Self> {
        let client = Client::new(endpoint, token, patience)?;
        Ok(Self { client, store, is_bringing: AtomicBool::new(false) })
    }

    /// The hub and the cache that the environment names.
    ///
    /// # Errors
    /// When a variable is wrong, or there is no place for a cache.
    pub fn from_environment() -> Result<Self> {
        let store = stores::directory().context("there is no place for models of the hub; set HF_HOME")?;
        let (endpoint, token) = (Endpoint::from_environment()?, Token::from_environment()?);
        if endpoint.origin().can_be_overheard() {
            let token = if token.is_some() { ", and the token is not sent there" } else { "" };
            line(format_args!("note: HF_ENDPOINT is plain http: others can read and change what comes from it{token}"));
        }
        Self::new(endpoint, token, std::path::absolute(store)?, Patience::default())
    }

    /// As [`pull`], without listening for Ctrl-C.
    ///
    /// # Errors
    /// As [`pull`].
    pub fn pull(self, name: &HubName) -> Result<Pulled> {
        policy::check(&name.repo)?;
        if name.revision.as_deref().is_some_and(HubName::is_commit)
            && let Some(found) = self.here(name)?
            && self.is_whole(name, verify::named(&found))?
        {
            return Ok(Pulled::here(name, found, None));
        }
        if let Some(reason) = offline() {
            let found = find(name)?.with_context(|| {
                format!("{name}: not on this machine, and the hub is not asked ({reason}){}\nhint: `homeroom pull` needs a network", others_here(name))
            })?;
            ensure!(
                self.is_whole(name, verify::named(&found))?,
                "{name}: damaged, and the hub is not asked ({reason})\nhint: `homeroom pull` needs a network to bring it anew"
            );
            line(format_args!(
                "note: the hub is not asked ({reason}); there may be a newer commit than the one that is here"
            ));
            return Ok(Pulled::here(name, found, None));
        }
        policy::check_download(&name.repo)?;
        // Whoever waits for a server does not look for Ctrl-C.
        thread::scope(|scope| {
            let pulling = scope.spawn(|| self.pull_watched(name));
            while !pulling.is_finished() {
                if self.client.stop.is_set() {
                    self.client.shut_down();
                }
                if !self.is_bringing.load(Ordering::SeqCst) {
                    self.tell_silence(&line);
                }
                thread::sleep(TICK / 4);
            }
            let pulled = pulling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            pulled.map_err(|error| match space::is_closed(&error) {
                true => anyhow!("{error:#}\nhint: set HF_HOME to a directory that you can write"),
                false => error,
            })
        })
    }

    fn config(&self, name: &HubName) -> Result<String> {
        policy::check(&name.repo)?;
        if let Some(reason) = offline() {
            bail!(
                "{name}: not on this machine, and the hub is not asked ({reason})\nhint: `homeroom pull` needs a network"
            );
        }
        policy::check_download(&name.repo)?;
        thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let listing = self.listing(name)?;
                let file = listing.files.iter().find(|file| file.path == "config.json");
                let file = file.filter(|file| file.size <= CONFIG_BYTES_MAX).with_context(|| {
                    format!("{name}: the hub has no config.json of it, which says its sizes\nhint: `homeroom pull {name}` downloads the model, whose own file says them")
                })?;
                self.text(name, &name.at(&listing.commit), file)
            });
            while !asking.is_finished() {
                if self.client.stop.is_set() {
                    self.client.shut_down();
                }
                self.tell_silence(&line);
                thread::sleep(TICK / 4);
            }
            asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Says that nothing comes, if that lasts.
    fn tell_silence(&self, say: &dyn Fn(String)) {
        if let Some(host) = self.client.silence.lasts(self.client.patience.told_after) {
            say(format!("note: waiting for {host}"));
        }
    }

    /// Whether files that are here are not damaged; says which are.
    fn is_whole(&self, name: &HubName, files: Vec<(PathBuf, RemoteFile)>) -> Result<bool> {
        Ok(self.damaged(name, files)?.is_empty())
    }

    /// Those of files that are here whose bytes are others than they should be, which is said.
    fn damaged(&self, name: &HubName, files: Vec<(PathBuf, RemoteFile)>) -> Result<Vec<RemoteFile>> {
        let damaged = verify::damaged(files, &self.client.stop)?;
        for file in &damaged {
            line(format_args!("note: {name}: {} is damaged here: its digest is another", file.path));
        }
        Ok(damaged)
    }

    /// The model at a commit, in the store or a shared one.
    fn here(&self, name: &HubName) -> Result<Option<Found>> {
        let stores = std::iter::once(self.store.clone()).chain(stores::shared());
        for store in stores {
            if let Some(found) = find_in(&store, name)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn pull_watched(&self, name: &HubName) -> Result<Pulled> {
        let listing = self.listing(name)?;
        if let Some(id) = listing.id.as_deref().filter(|id| !id.eq_ignore_ascii_case(&name.repo)) {
            policy::check(id)?;
            line(format_args!("note: {}: the hub calls it {id} now", name.repo));
        }
        let exact = name.at(&listing.commit);
        let short = HubName { revision: None, ..name.clone() };
        let mut files = choose(&listing, name, |file| self.text(name, &exact, file))?;
        // Put last: without these no snapshot of several files counts as whole.
        files.sort_by_key(|file| ["config.json", "adapter_config.json"].contains(&file.path.as_str()));
        let total: u64 = files.iter().map(|file| file.size).sum();
        let (count, commit) = (files.len(), &listing.commit[..COMMIT_TOLD]);
        let mut facts = format!("{} in {count} {}", size(total), if count == 1 { "file" } else { "files" });
        if let Some(license) = &listing.license {
            facts += &format!("   license {license}");
        }
        if listing.is_gated {
            facts += "   gated";
        }
        line(format_args!("model     {short} at {commit}   {facts}"));
        let place = Place::new(&self.store, &name.repo);
        place.check()?;
        let elsewhere = if place.folder().exists() { None } else { self.here(&exact)? };
        if let Some(found) = elsewhere {
            let snapshot = found.path.ancestors().find(|path| path.ends_with(&listing.commit)).unwrap_or(&found.path);
            let at = |file: &RemoteFile| Some((snapshot.join(&file.path), file.clone()));
            let files = files.iter().filter_map(at).filter(|(path, file)| place::is_file_of(path, file.size)).collect();
            if self.is_whole(name, files)? {
                return Ok(Pulled::here(name, found, listing.license));
            }
        }
        let here = |file: &RemoteFile| {
            let blob = || place.has_blob(file).then(|| place.blob(&file.digest));
            let path = place.has(&listing.commit, file).then(|| place.pointer(&listing.commit, &file.path));
            Some((path.or_else(blob)?, file.clone()))
        };
        let damaged = self.damaged(name, files.iter().filter_map(here).collect())?;
        let brought = self.bring(name, &exact, &place, &files, &damaged);
        let (bytes, time) = match brought {
            Ok(brought) => brought,
            Err(error) => {
                place.tidy();
                return Err(error);
            }
        };
        for (at, file) in files.iter().enumerate() {
            let is_last = !files[at + 1..].iter().any(|other| other.digest == file.digest);
            place.put(&listing.commit, file, is_last)?;
        }
        if name.revision() != listing.commit {
            match place.refer(name.revision(), &listing.commit) {
                Err(error) if bytes == 0 && space::is_closed(&error) => {
                    line(format_args!(
                        "note: {name}: that this commit is {} now cannot be kept: {error:#}",
                        name.revision()
                    ));
                }
                referred => referred?,
            }
        }
        let found = find_in(&self.store, &exact)?.ok_or_else(|| anyhow!("{name}: what was downloaded is not whole"))?;
        Ok(Pulled { bytes, time, ..Pulled::here(name, found, listing.license) })
    }

    /// Asks for the files of a repository at a revision.
    fn listing(&self, name: &HubName) -> Result<Listing> {
        let revision = name.revision().replace('/', "%2F").replace('+', "%2B");
        let url = self.client.endpoint.at(&format!("api/models/{}/revision/{revision}?blobs=true", name.repo));
        let answer = self.small(&url, listing::BYTES_MAX, &name.to_string(), name, None);
        let answer = answer.map_err(|error| self.with_endpoint(name, error))?;
        let listing = Listing::parse(&answer).with_context(|| {
            let is_page = answer.trim_ascii_start().starts_with(b"<");
            let page =
                if is_page { " (it is a page for people, as a network has that asks to sign in first)" } else { "" };
            format!("{name}: the hub's answer is refused{page}")
        });
        let listing = listing.map_err(|error| self.with_endpoint(name, error))?;
        let is_other = HubName::is_commit(name.revision()) && listing.commit != name.revision();
        ensure!(!is_other, "{name}: the hub's answer is about another commit, {}", listing.commit);
        Ok(listing)
    }

    /// An error with what may be the reason of it and what to do: there is no network, or another hub was asked.
    fn with_endpoint(&self, name: &HubName, error: anyhow::Error) -> anyhow::Error {
        let set = self.client.endpoint.set();
        if let Some(NoConnection { host, what }) = error.downcast_ref() {
            let why = match set {
                _ if self.client.is_through_proxy() => "there is no network, or that is not the proxy".to_owned(),
                Some(address) => format!("there is no network, or HF_ENDPOINT={address} is wrong"),
                None => "there is no network".to_owned(),
            };
            let hint = match self.here(name) {
                Ok(Some(Found { commit, .. })) => format!(
                    "commit {} is here and can be used; it was not asked whether there is a newer one",
                    &commit[..COMMIT_TOLD]
                ),
                _ => format!(
                    "it can be brought from elsewhere: `homeroom import /media/stick/models--{}` takes a copy of it into the cache, and \
                     HOMEROOM_BASES names a directory of such copies",
                    name.repo.replace('/', "--")
                ),
            };
            return anyhow!("{name}: no connection to {host} ({why}): {what}\nhint: {hint}");
        }
        match set {
            Some(address) if !error.is::<Interrupted>() => {
                anyhow!("{error:#}\nhint: HF_ENDPOINT is set, so that {address} was asked and not the hub itself")
            }
            _ => error,
        }
    }

    /// The text of a small file, which is not kept.
    fn text(&self, name: &HubName, exact: &HubName, file: &RemoteFile) -> Result<String> {
        let bytes = self.small(&self.url(exact, file), file.size, &file.path, name, Some(&file.path))?;
        let mut hasher = Hasher::like(&file.digest, file.size);
        hasher.update(&bytes);
        ensure!(hasher.finish() == file.digest.name(), "{}: its digest is not that of the hub's list", file.path);
        String::from_utf8(bytes).with_context(|| format!("{}: not UTF-8", file.path))
    }

    /// An answer of at most so many bytes, in one piece.
    fn small(&self, url: &str, most: u64, subject: &str, name: &HubName, file: Option<&str>) -> Result<Vec<u8>> {
        let bytes = self.beginning(url, most, subject, name, file)?;
        ensure!(bytes.len() as u64 <= most, "{subject}: the hub's answer has more than {most} bytes");
        Ok(bytes)
    }

    /// The beginning of an answer: if there are more than `most` bytes, one byte more than those.
    fn beginning(&self, url: &str, most: u64, subject: &str, name: &HubName, file: Option<&str>) -> Result<Vec<u8>> {
        let mut tries = Tries::of_answer(self.client.patience);
        loop {
            let failure = match self.client.get(url, None, &|refusal| explain(&self.client, name, file, refusal)) {
                Ok(response) => match self.body(response, most, tries.until()) {
                    Ok(bytes) => return Ok(bytes),
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            tries.wait(subject, failure, false, !self.client.has_answered(), &self.client.stop, line)?;
        }
    }

    /// At most one byte more than `most` of an answer.
    fn body(&self, response: Response<Body>, most: u64, until: Option<Instant>) -> Result<Vec<u8>, Failure> {
        let passing = |what: &str| Failure::Passing { what: what.to_owned(), after: None };
        let told =
            response.headers().get("content-length").and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let _awaited = self.client.silence.begin(&host(response.get_uri()));
        let mut body = response.into_body().into_reader().take(most + 1);
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
        loop {
            self.client.stop.check()?;
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(passing("the hub's answer takes too long"));
            }
            match body.read(&mut buffer) {
                Ok(0) if told.is_some_and(|told| told.min(most + 1) != bytes.len() as u64) => {
                    return Err(passing("the hub's answer was cut"));
                }
                Ok(0) => return Ok(bytes),
                // A few bytes now and then are told as silence: an answer is short.
                Ok(read) => bytes.extend_from_slice(&buffer[..read]),
                Err(error) => return Err(broken(&error)),
            }
        }
    }

    fn url(&self, exact: &HubName, file: &RemoteFile) -> String {
        let path: Vec<String> = file.path.split('/').map(escaped).collect();
        self.client.endpoint.at(&format!("{}/resolve/{}/{}", exact.repo, exact.revision(), path.join("/")))
    }

    /// Refuses a model that cannot be run, as far as that is seen before it is downloaded: by its `config.json`, or by the beginning of
    /// its GGUF file. Of `queue`, the files that are missing with the bytes of them that are here, only whose download begins is looked at.
    fn check_runs(
        &self,
        name: &HubName,
        exact: &HubName,
        files: &[RemoteFile],
        queue: &[(&RemoteFile, u64)],
    ) -> Result<()> {
        let has = |path: &str| files.iter().any(|file| file.path == path);
        if has("adapter_config.json") || has("modules.json") {
            return Ok(());
        }
        for (file, _) in queue.iter().filter(|(_, begun)| *begun == 0) {
            let first = || ShardName::of(&file.path).is_none_or(|shard| shard.number == 1);
            let runs = if file.path == "config.json" && file.size <= CONFIG_BYTES_MAX {
                let text = self.text(name, exact, file)?;
                let config: Option<Value> = serde_json::from_str(&text).ok();
                // Encoders need no list of modules to be served.
                let embeds = config.as_ref().and_then(|config| config["model_type"].as_str()).is_some_and(is_encoder);
                if embeds { Ok(()) } else { Architecture::from_text(&text).map(drop) }
            } else if file.path.to_ascii_lowercase().ends_with(".gguf") && first() {
                let url = self.url(exact, file);
                let beginning = self.beginning(&url, BEGINNING_BYTES, &file.path, name, Some(&file.path))?;
                architecture_in(&beginning).map_or(Ok(()), |architecture| Family::of_gguf(&architecture).map(drop))
            } else {
                Ok(())
            };
            runs.with_context(|| format!("{name}: nothing of it was downloaded: {}", file.path))?;
        }
        Ok(())
    }

    /// Downloads those blobs of files that are missing or damaged, several at the same time. Returns how many bytes came, and in what time.
    fn bring(
        &self,
        name: &HubName,
        exact: &HubName,
        place: &Place,
        files: &[RemoteFile],
        damaged: &[RemoteFile],
    ) -> Result<(u64, Duration)> {
        let mut seen = HashSet::new();
        let damaged: HashSet<&Digest> = damaged.iter().map(|file| &file.digest).collect();
        let is_missing = |file: &&RemoteFile| {
            let is_there = place.has(exact.revision(), file) || place.has_blob(file);
            !is_there || damaged.contains(&file.digest)
        };
        let missing: Vec<&RemoteFile> =
            files.iter().filter(is_missing).filter(|file| seen.insert(&file.digest)).collect();
        let begun = |file: &RemoteFile| {
            // A link is not followed: none is made there.
            let meta = std::fs::symlink_metadata(place.partial(&file.digest)).ok().filter(std::fs::Metadata::is_file);
            meta.map_or(0, |meta| meta.len().min(file.size))
        };
        let mut queue: Vec<(&RemoteFile, u64)> = missing.into_iter().map(|file| (file, begun(file))).collect();
        let total: u64 = files.iter().map(|file| file.size).sum();
        let here: u64 = queue.iter().map(|(_, begun)| begun).sum();
        let needed: u64 = queue.iter().map(|(file, begun)| file.size - begun).sum();
        if let Some(lacks) = space::lacks(&self.store, needed) {
            bail!("{name}: {lacks}");
        }
        self.check_runs(name, exact, files, &queue)?;
        if here > 0 {
            line(format_args!("resumed   {} are here already; their bytes are checked first", size(here)));
        }
        // The last is taken first: the largest, so that no long one is left at the end.
        queue.sort_by_key(|(file, _)| file.size);
        let workers = queue.len().min(CONNECTIONS);
        let (queue, failed) = (Mutex::new(queue), Mutex::new(None));
        let progress = Downloading::start(total, total - needed);
        self.is_bringing.store(true, Ordering::SeqCst);
        let work = || {
            while !self.client.stop.is_set() {
                let Some((file, counted)) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop() else { return };
                let refused = |refusal: &_| explain(&self.client, name, Some(&file.path), refusal);
                let url = self.url(exact, file);
                let is_damaged = damaged.contains(&file.digest);
                let (client, progress, explain) = (&self.client, &progress, &refused);
                let blob = Blob { client, url, file, place, counted, is_damaged, progress, explain };
                if let Err(error) = blob.download() {
                    // The first is what is told; the others end by it.
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    failed.get_or_insert(error);
                    self.client.shut_down();
                }
            }
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            while workers.iter().any(|worker| !worker.is_finished()) {
                progress.tick();
                self.tell_silence(&|note| progress.say(note));
                thread::sleep(TICK);
            }
        });
        self.is_bringing.store(false, Ordering::SeqCst);
        progress.end();
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        match failed {
            None if !self.client.stop.is_set() => Ok(progress.came()),
            Some(error) if !error.is::<Interrupted>() => {
                let is_named = error.to_string().starts_with(&format!("{name}: "));
                Err(if is_named { error } else { error.context(name.to_string()) })
            }
            _ => {
                let (here, total) = (size(progress.here()), size(total));
                Err(Interrupted(format!(
                    "{name}: interrupted; {here} of {total} are here\nhint: the same command goes on from there"
                ))
                .into())
            }
        }
    }
}

impl Pulled {
    fn here(name: &HubName, found: Found, license: Option<String>) -> Self {
        Self { base: base_of(&found, name), found, bytes: 0, time: Duration::ZERO, license }
    }
}

/// `; here is owner/name:QUANT` of the files that are here instead of the one that is asked for, or nothing.
fn others_here(name: &HubName) -> String {
    let others = cache::other_quantizations(name).join(", ");
    if others.is_empty() { others } else { format!("; here is {others}") }
}

/// The base of an adapter, if that is a name on the hub.
fn base_of(found: &Found, adapter: &HubName) -> Option<HubName> {
    let config = read_text(&found.path.join("adapter_config.json"), CONFIG_BYTES_MAX).ok()?;
    let config: Value = serde_json::from_str(&config).ok()?;
    let base = HubName::parse(config["base_model_name_or_path"].as_str()?)?;
    (base.repo != adapter.repo).then_some(base)
}

/// A part of a path as it stands in an address.
fn escaped(part: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    part.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
