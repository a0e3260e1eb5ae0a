//! A server of the hub's protocol: a repository's list, its files, and a storage on another port to which large ones are redirected, as
//! the hub does. A test says what goes wrong, by looking at each request; what was asked is kept.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Files of more bytes are redirected to the storage and named by their SHA-256.
const LARGE: usize = 10_000;

/// A repository at a commit.
#[derive(Clone, Debug, Default)]
pub struct Repo {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub gated: Value,
    pub license: Value,
    /// What is put into the list as it is.
    pub odd: Vec<Value>,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    /// Percent-encoding is undone.
    pub path: String,
    pub is_storage: bool,
    pub range: Option<u64>,
    pub token: Option<String>,
    /// How often this path was asked for before.
    pub before: usize,
}

/// What a server does instead of its duty.
pub enum Act {
    /// Status, headers, body.
    Answer(u16, Vec<(&'static str, String)>, String),
    Redirect(u16, String),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Nothing comes after so many bytes of the body.
    Stall(usize),
    /// A little comes at a time.
    Slow,
    /// A byte comes now and then.
    Drip,
    /// All of it, whatever part is asked for.
    IgnoreRange,
    /// The part from the beginning, and a header that says so.
    WrongRange,
    /// Another content.
    Content(Vec<u8>),
    /// No `Content-Length`; the end of the connection ends it.
    Unsized(Vec<u8>),
}

type Hook = Box<dyn Fn(&Asked) -> Option<Act> + Send + Sync>;

/// Two servers, which end when this is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub storage: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// By `owner/name`; each with its revisions.
    repos: Mutex<BTreeMap<String, BTreeMap<String, Repo>>>,
    asked: Mutex<Vec<Asked>>,
    hook: Mutex<Option<Arc<Hook>>>,
    ended: AtomicBool,
}

impl Repo {
    /// A repository of a directory's files.
    pub fn of(directory: &std::path::Path, commit: &str) -> Result<Self> {
        let mut repo = Self { commit: commit.repeat(40 / commit.len()), gated: json!(false), ..Self::default() };
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?;
            repo.files.insert(name.to_owned(), std::fs::read(&path)?);
        }
        Ok(repo)
    }

    /// With a file more, or another one.
    pub fn with(mut self, path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.to_owned(), bytes.into());
        self
    }

    /// Without a file.
    pub fn without(mut self, path: &str) -> Self {
        self.files.remove(path);
        self
    }

    /// The list of its files, as the hub answers it.
    pub fn info(&self, id: &str) -> Value {
        let file = |(path, bytes): (&String, &Vec<u8>)| {
            let mut file = json!({"rfilename": path, "size": bytes.len(), "blobId": git(bytes)});
            if bytes.len() > LARGE {
                file["lfs"] = json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 133});
            }
            file
        };
        let files: Vec<Value> = self.files.iter().map(file).chain(self.odd.iter().cloned()).collect();
        json!({
            "_id": "0", "id": id, "modelId": id, "sha": self.commit, "private": false, "gated": self.gated, "disabled": false,
            "tags": [], "downloads": 0, "likes": 0, "cardData": {"license": self.license}, "siblings": files,
        })
    }

    fn tree(&self) -> Value {
        let file = |(path, bytes): (&String, &Vec<u8>)| {
            let mut file = json!({"type": "file", "oid": git(bytes), "size": bytes.len(), "path": path});
            if bytes.len() > LARGE {
                file["lfs"] = json!({"oid": sha256(bytes), "size": bytes.len(), "pointerSize": 133});
            }
            file
        };
        self.files.iter().map(file).collect()
    }
}

/// The name of a file among the blobs.
pub fn blob_name(bytes: &[u8]) -> String {
    if bytes.len() > LARGE { sha256(bytes) } else { git(bytes) }
}

fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn git(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hexadecimal(&hasher.finalize())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Server {
    /// Serves a repository, whose branch `main` is at its commit.
    pub fn of(id: &str, repo: Repo) -> Result<Self> {
        let server = Self::start()?;
        server.set(id, "main", repo);
        Ok(server)
    }

    /// Serves nothing yet.
    pub fn start() -> Result<Self> {
        let state = Arc::<State>::default();
        let hub = TcpListener::bind("127.0.0.1:0")?;
        let storage = TcpListener::bind("127.0.0.1:0")?;
        let (address, storage_address) = (hub.local_addr()?, storage.local_addr()?);
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    if state.ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let state = state.clone();
                    // A client that goes away is its own affair.
                    thread::spawn(move || drop(answer(&state, stream, is_storage, storage_address)));
                }
            });
        }
        Ok(Self { address, storage: storage_address, state })
    }

    /// Sets what a branch, a tag or a commit is.
    pub fn set(&self, id: &str, revision: &str, repo: Repo) {
        let mut repos = self.state.repos.lock().expect("no panic");
        let revisions = repos.entry(id.to_owned()).or_default();
        revisions.insert(repo.commit.clone(), repo.clone());
        revisions.insert(revision.to_owned(), repo);
    }

    /// Sets what goes wrong.
    pub fn on(&self, hook: impl Fn(&Asked) -> Option<Act> + Send + Sync + 'static) {
        *self.state.hook.lock().expect("no panic") = Some(Arc::new(Box::new(hook)));
    }

    /// Nothing goes wrong any more, and nothing was asked.
    pub fn is_well(&self) {
        *self.state.hook.lock().expect("no panic") = None;
        self.state.asked.lock().expect("no panic").clear();
    }

    /// What was asked.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().expect("no panic").clone()
    }

    /// Requests for a path, which ends so.
    pub fn count(&self, ending: &str) -> usize {
        self.asked().iter().filter(|asked| asked.path.ends_with(ending)).count()
    }

    /// The address for `HF_ENDPOINT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        for address in [self.address, self.storage] {
            let _ = TcpStream::connect(address);
        }
    }
}

/// Reads one request and answers it.
fn answer(state: &State, stream: TcpStream, is_storage: bool, storage: SocketAddr) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next().context("a method")?, words.next().context("a path")?);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let path = decoded(target.split('?').next().unwrap_or_default());
    let asked = {
        let mut all = state.asked.lock().expect("no panic");
        let before = all.iter().filter(|asked| asked.path == path && asked.method == method).count();
        let token = headers.get("authorization").cloned();
        let asked = Asked { method, path, is_storage, range, token, before };
        all.push(asked.clone());
        asked
    };
    let hook = state.hook.lock().expect("no panic").clone();
    let act = hook.and_then(|hook| hook(&asked));
    match act {
        Some(Act::Answer(status, headers, body)) => {
            let headers: Vec<(&str, String)> = headers.into_iter().collect();
            send(&stream, &asked, status, &headers, body.as_bytes())
        }
        Some(Act::Redirect(status, to)) => send(&stream, &asked, status, &[("location", to)], b""),
        act => duty(state, &stream, &asked, storage, act),
    }
}

/// What the hub and its storage do.
fn duty(state: &State, stream: &TcpStream, asked: &Asked, storage: SocketAddr, act: Option<Act>) -> Result<()> {
    let repos = state.repos.lock().expect("no panic").clone();
    if asked.is_storage || asked.path.starts_with("/cache/") {
        let wanted = asked.path.rsplit('/').next().unwrap_or_default();
        let files = repos.values().flat_map(BTreeMap::values).flat_map(|repo| repo.files.values());
        let found = files.into_iter().find(|bytes| blob_name(bytes) == wanted).context("a blob")?;
        return file(stream, asked, found, act);
    }
    let missing = |code: &str| {
        let headers = [("x-error-code", code.to_owned()), ("x-error-message", format!("{code}, says the server"))];
        // The hub does not tell strangers what is private.
        let status = if code == "RepoNotFound" && asked.token.is_none() { 401 } else { 404 };
        send(stream, asked, status, &headers, b"{}")
    };
    let path = asked.path.strip_prefix("/api/models").unwrap_or(&asked.path);
    let parts: Vec<&str> = path.trim_start_matches('/').splitn(4, '/').collect();
    let [owner, name, what, rest] = parts[..] else { return missing("RepoNotFound") };
    let id = format!("{owner}/{name}");
    let Some(revisions) = repos.get(&id) else { return missing("RepoNotFound") };
    match what {
        "revision" | "tree" => {
            let Some(repo) = revisions.get(rest) else { return missing("RevisionNotFound") };
            let body = if what == "tree" { repo.tree() } else { repo.info(&id) };
            send(stream, asked, 200, &[("content-type", "application/json".into())], body.to_string().as_bytes())
        }
        "resolve" => {
            let longest = revisions
                .keys()
                .filter(|revision| rest.starts_with(&format!("{revision}/")))
                .max_by_key(|key| key.len());
            let Some(revision) = longest else { return missing("RevisionNotFound") };
            let repo = &revisions[revision];
            let Some(bytes) = repo.files.get(&rest[revision.len() + 1..]) else { return missing("EntryNotFound") };
            let blob = blob_name(bytes);
            let about = |location: String| {
                [
                    ("location", location),
                    ("x-repo-commit", repo.commit.clone()),
                    ("x-linked-size", bytes.len().to_string()),
                    ("x-linked-etag", format!("\"{blob}\"")),
                ]
            };
            match bytes.len() > LARGE {
                true => send(stream, asked, 302, &about(format!("http://{storage}/{blob}?signature=a%2Fb")), b""),
                false => send(stream, asked, 307, &about(format!("/cache/{}/{blob}", repo.commit)), b""),
            }
        }
        _ => missing("RepoNotFound"),
    }
}

/// A file, or the part of it that was asked for.
fn file(mut stream: &TcpStream, asked: &Asked, bytes: &[u8], act: Option<Act>) -> Result<()> {
    let bytes = match &act {
        Some(Act::Content(other) | Act::Unsized(other)) => other,
        _ => bytes,
    };
    let from = asked.range.filter(|_| !matches!(act, Some(Act::IgnoreRange | Act::Unsized(_))));
    let mut head = match from.map(|from| from as usize) {
        Some(from) if from >= bytes.len() => format!("HTTP/1.1 416 no\r\ncontent-range: bytes */{}\r\n", bytes.len()),
        Some(_) if matches!(act, Some(Act::WrongRange)) => {
            format!("HTTP/1.1 206 part\r\ncontent-range: bytes 0-{}/{}\r\n", bytes.len() - 1, bytes.len())
        }
        Some(from) => {
            format!("HTTP/1.1 206 part\r\ncontent-range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len())
        }
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    let begin = if matches!(act, Some(Act::WrongRange)) { 0 } else { from.unwrap_or(0) as usize };
    let body = bytes.get(begin..).unwrap_or_default();
    if !matches!(act, Some(Act::Unsized(_))) {
        write!(head, "content-length: {}\r\n", body.len())?;
    }
    // Python takes a server without it for no hub.
    if let Some((commit, _)) = asked.path.strip_prefix("/cache/").and_then(|path| path.split_once('/')) {
        write!(head, "x-repo-commit: {commit}\r\n")?;
    }
    write!(head, "etag: \"{}\"\r\naccept-ranges: bytes\r\nconnection: close\r\n\r\n", blob_name(bytes))?;
    stream.write_all(head.as_bytes())?;
    if asked.method == "HEAD" {
        return Ok(());
    }
    match act {
        Some(Act::Cut(at)) => stream.write_all(&body[..at.min(body.len())])?,
        Some(Act::Stall(at)) => {
            stream.write_all(&body[..at.min(body.len())])?;
            // The other side leaves first.
            let mut rest = stream.try_clone()?;
            rest.set_read_timeout(Some(Duration::from_secs(120)))?;
            let _ = std::io::Read::read(&mut rest, &mut [0; 1]);
        }
        Some(Act::Drip) => {
            for byte in body {
                stream.write_all(&[*byte])?;
                thread::sleep(Duration::from_millis(50));
            }
        }
        Some(Act::Slow) => {
            for piece in body.chunks(body.len() / 20 + 1) {
                stream.write_all(piece)?;
                thread::sleep(Duration::from_millis(100));
            }
        }
        _ => stream.write_all(body)?,
    }
    Ok(())
}

fn send(mut stream: &TcpStream, asked: &Asked, status: u16, headers: &[(&str, String)], body: &[u8]) -> Result<()> {
    let mut head = format!("HTTP/1.1 {status} so\r\ncontent-length: {}\r\nconnection: close\r\n", body.len());
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n")?;
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if asked.method != "HEAD" {
        stream.write_all(body)?;
    }
    Ok(())
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let code =
            (*byte == b'%').then(|| u8::from_str_radix(text.get(text.len() - after.len()..)?.get(..2)?, 16).ok());
        match code.flatten() {
            Some(code) => {
                bytes.push(code);
                rest = &after[2..];
            }
            None => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
