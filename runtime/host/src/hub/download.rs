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
use homeroom_engine::files::read_text;
use serde_json::Value;
use ureq::Body;
use ureq::http::Response;

use super::blob::Blob;
use super::cache::{self, Found, find, find_in};
use super::choose::choose;
use super::client::{Client, broken};
use super::digest::Hasher;
use super::explain::explain;
use super::listing::{self, Listing, RemoteFile};
use super::patience::{Failure, Tries};
use super::place::Place;
use super::{Endpoint, HubName, Patience, Token, offline, policy, space};
use crate::interrupt::{self, Interrupted};
use crate::progress::{Downloading, line, size};

/// Files that are downloaded at the same time.
const CONNECTIONS: usize = 4;
/// How often Ctrl-C is looked for, and progress is drawn.
const TICK: Duration = Duration::from_millis(100);
/// Digits of a commit that are told.
const COMMIT_TOLD: usize = 12;
/// Longest configuration of an adapter, in bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// The hub, and the store that is filled from it.
pub struct Hub {
    client: Client,
    store: PathBuf,
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

impl Hub {
    /// A hub, and a store in the form of Hugging Face's cache.
    ///
    /// # Errors
    /// When a file of certificates that the environment names cannot be used.
    pub fn new(endpoint: Endpoint, token: Option<Token>, store: PathBuf, patience: Patience) -> Result<Self> {
        Ok(Self { client: Client::new(endpoint, token, patience)?, store })
    }

    /// The hub and the cache that the environment names.
    ///
    /// # Errors
    /// When a variable is wrong, or there is no place for a cache.
    pub fn from_environment() -> Result<Self> {
        let store = cache::directory().context("there is no place for models of the hub; set HF_HOME")?;
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
        {
            return Ok(Pulled::here(name, found, None));
        }
        if let Some(reason) = offline() {
            let found = find(name)?.with_context(|| {
                format!("{name}: not on this machine, and the hub is not asked ({reason})\nhint: `homeroom pull` needs a network")
            })?;
            line(format_args!(
                "note: the hub is not asked ({reason}); there may be a newer commit than the one that is here"
            ));
            return Ok(Pulled::here(name, found, None));
        }
        // Whoever waits for a server does not look for Ctrl-C.
        let (done, client) = (AtomicBool::new(false), &self.client);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    if client.stop.is_set() {
                        client.shut_down();
                    }
                    thread::sleep(TICK / 4);
                }
            });
            let pulled = self.pull_watched(name);
            done.store(true, Ordering::SeqCst);
            pulled
        })
    }

    /// The model at a commit, in the store or a shared one.
    fn here(&self, name: &HubName) -> Result<Option<Found>> {
        let stores = std::iter::once(self.store.clone()).chain(cache::shared());
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
        let files = choose(&listing, name, |file| self.text(&exact, file))?;
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
        let elsewhere = if place.folder().exists() { None } else { self.here(&exact)? };
        if let Some(found) = elsewhere {
            return Ok(Pulled::here(name, found, listing.license));
        }
        let missing: Vec<&RemoteFile> = files.iter().filter(|file| !place.has(&listing.commit, file)).collect();
        let brought = self.bring(name, &exact, &place, &missing);
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
            place.refer(name.revision(), &listing.commit)?;
        }
        let found = find_in(&self.store, &exact)?.ok_or_else(|| anyhow!("{name}: what was downloaded is not whole"))?;
        Ok(Pulled { bytes, time, ..Pulled::here(name, found, listing.license) })
    }

    /// Asks for the files of a repository at a revision.
    fn listing(&self, name: &HubName) -> Result<Listing> {
        let revision = name.revision().replace('/', "%2F").replace('+', "%2B");
        let url = self.client.endpoint.at(&format!("api/models/{}/revision/{revision}?blobs=true", name.repo));
        let answer = self.small(&url, listing::BYTES_MAX, &name.to_string(), name, None)?;
        let listing = Listing::parse(&answer).with_context(|| {
            let is_page = answer.trim_ascii_start().starts_with(b"<");
            let page =
                if is_page { " (it is a page for people, as a network has that asks to sign in first)" } else { "" };
            format!("{name}: the hub's answer is refused{page}")
        })?;
        let is_other = HubName::is_commit(name.revision()) && listing.commit != name.revision();
        ensure!(!is_other, "{name}: the hub's answer is about another commit, {}", listing.commit);
        Ok(listing)
    }

    /// The text of a small file, which is not kept.
    fn text(&self, exact: &HubName, file: &RemoteFile) -> Result<String> {
        let bytes = self.small(&self.url(exact, file), file.size, &file.path, exact, Some(&file.path))?;
        let mut hasher = Hasher::like(&file.digest, file.size);
        hasher.update(&bytes);
        ensure!(hasher.finish() == file.digest.name(), "{}: its digest is not that of the hub's list", file.path);
        String::from_utf8(bytes).with_context(|| format!("{}: not UTF-8", file.path))
    }

    /// An answer of at most so many bytes, in one piece.
    fn small(&self, url: &str, most: u64, subject: &str, name: &HubName, file: Option<&str>) -> Result<Vec<u8>> {
        let mut tries = Tries::new(self.client.patience);
        loop {
            let failure = match self.client.get(url, None, &|refusal| explain(&self.client, name, file, refusal)) {
                Ok(response) => match self.body(response, most) {
                    Ok(bytes) if bytes.len() as u64 > most => {
                        bail!("{subject}: the hub's answer has more than {most} bytes")
                    }
                    Ok(bytes) => return Ok(bytes),
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            match failure {
                Failure::Final(error) => return Err(error),
                Failure::Passing { what, after } => {
                    tries.wait(subject, &what, after, false, &self.client.stop, line)?;
                }
            }
        }
    }

    /// At most one byte more than `most` of an answer.
    fn body(&self, response: Response<Body>, most: u64) -> Result<Vec<u8>, Failure> {
        let passing = |what: &str| Failure::Passing { what: what.to_owned(), after: None };
        let told =
            response.headers().get("content-length").and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let mut body = response.into_body().into_reader().take(most + 1);
        let deadline = Instant::now() + self.client.patience.silence * 10;
        let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
        loop {
            self.client.stop.check()?;
            if Instant::now() > deadline {
                return Err(passing("the hub's answer takes too long"));
            }
            match body.read(&mut buffer) {
                Ok(0) if told.is_some_and(|told| told.min(most + 1) != bytes.len() as u64) => {
                    return Err(passing("the hub's answer was cut"));
                }
                Ok(0) => return Ok(bytes),
                Ok(read) => bytes.extend_from_slice(&buffer[..read]),
                Err(error) => return Err(broken(&error)),
            }
        }
    }

    fn url(&self, exact: &HubName, file: &RemoteFile) -> String {
        let path: Vec<String> = file.path.split('/').map(escaped).collect();
        self.client.endpoint.at(&format!("{}/resolve/{}/{}", exact.repo, exact.revision(), path.join("/")))
    }

    /// Downloads the blobs of files, several at the same time. Returns how many bytes came, and in what time.
    fn bring(
        &self,
        name: &HubName,
        exact: &HubName,
        place: &Place,
        missing: &[&RemoteFile],
    ) -> Result<(u64, Duration)> {
        let mut seen = HashSet::new();
        let mut queue: Vec<&RemoteFile> =
            missing.iter().filter(|file| !place.has_blob(file) && seen.insert(&file.digest)).copied().collect();
        let total = queue.iter().map(|file| file.size).sum();
        let begun = |file: &&RemoteFile| {
            std::fs::metadata(place.partial(&file.digest)).map_or(0, |meta| meta.len().min(file.size))
        };
        let here: u64 = queue.iter().map(begun).sum();
        if let Some(lacks) = space::lacks(&self.store, total - here) {
            bail!("{name}: {lacks}");
        }
        if here > 0 {
            line(format_args!("resumed   {} are here already", size(here)));
        }
        // The last is taken first: the largest, so that no long one is left at the end.
        queue.sort_by_key(|file| file.size);
        let workers = queue.len().min(CONNECTIONS);
        let (queue, failed) = (Mutex::new(queue), Mutex::new(None));
        let progress = Downloading::start(total);
        let work = || {
            while !self.client.stop.is_set() {
                let Some(file) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop() else { return };
                let refused = |refusal: &_| explain(&self.client, name, Some(&file.path), refusal);
                let url = self.url(exact, file);
                let blob = Blob { client: &self.client, url, file, place, progress: &progress, explain: &refused };
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
                thread::sleep(TICK);
            }
        });
        progress.end();
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        match failed {
            None if !self.client.stop.is_set() => Ok(progress.came()),
            Some(error) if !error.is::<Interrupted>() => Err(error.context(name.to_string())),
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
