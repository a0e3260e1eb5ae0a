//! Models by their names on the hub, in a cache that is filled by hand as Python fills it: commands, adapters and their bases, pipelines,
//! handlers. What is not in it is never asked for where nobody typed the name.

mod adapters;
mod commands;
mod downloads;
mod handlers;
mod pipelines;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use homeroom_engine::files::digest;

use crate::support::{Place, fixture};

/// An owner and a name with all that names may have.
const NAME: &str = "Org-7/tiny_Llama.v2";
const FIRST: &str = "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d";
const SECOND: &str = "ffffffff5e6f708192a3b4c5d6e7f8091a2b3c4d";

/// Longest time that a program may take to say or answer something. Loading a model takes a part of a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a program says on stderr, as it says it.
struct Story(Receiver<String>);

impl Story {
    fn of(stderr: ChildStderr) -> Self {
        let (sender, lines) = channel();
        let stderr = BufReader::new(stderr);
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line + "\n")));
        Self(lines)
    }

    /// Reads until a line has some words.
    fn until(&self, words: &str) -> Result<String> {
        let mut text = String::new();
        while !text.contains(words) {
            text += &self.0.recv_timeout(PATIENCE).with_context(|| format!("no `{words}` in\n{text}"))?;
        }
        Ok(text)
    }
}

/// Files by their names in a repository, each with where it is copied from.
type Files = BTreeMap<String, PathBuf>;

/// The files of a directory that a model needs.
fn files_of(directory: &Path) -> Result<Files> {
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let kept = entries.into_iter().filter(|path| !path.ends_with("expected.safetensors"));
    let named = |path: PathBuf| (path.file_name().map(OsStr::to_string_lossy).unwrap_or_default().into_owned(), path);
    Ok(kept.map(named).collect())
}

/// A cache in Hugging Face's layout.
struct Hub(PathBuf);

impl Hub {
    /// One with a model under [`NAME`], whose branch `main` is at [`FIRST`].
    fn with_model(place: &Place, model: &str) -> Result<Self> {
        let hub = Self(place.path("hub"));
        hub.add(NAME, FIRST, &files_of(&fixture("models").join(model))?)?;
        hub.set(NAME, "main", FIRST)?;
        Ok(hub)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.0.join(format!("models--{}", name.replace('/', "--")))
    }

    fn snapshot(&self, name: &str, commit: &str) -> PathBuf {
        self.folder(name).join("snapshots").join(commit)
    }

    /// Adds a commit: blobs by their SHA-256, and links to them.
    fn add(&self, name: &str, commit: &str, files: &Files) -> Result<PathBuf> {
        let (blobs, snapshot) = (self.folder(name).join("blobs"), self.snapshot(name, commit));
        fs::create_dir_all(&blobs)?;
        fs::create_dir_all(&snapshot)?;
        for (file, from) in files {
            let digests = digest::of_files(std::slice::from_ref(from), None)?;
            let digest = digests.values().next().and_then(|digest| digest.strip_prefix("sha256:"));
            let digest = digest.context("a file has a digest")?;
            fs::copy(from, blobs.join(digest))?;
            symlink(Path::new("../../blobs").join(digest), snapshot.join(file))?;
        }
        Ok(snapshot)
    }

    /// Has a branch or tag be at a commit.
    fn set(&self, name: &str, revision: &str, commit: &str) -> Result<()> {
        let file = self.folder(name).join("refs").join(revision);
        fs::create_dir_all(file.parent().context("it lies in refs")?)?;
        Ok(fs::write(file, commit)?)
    }

    /// A command that finds this cache.
    fn seen_by<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("HF_HUB_CACHE", &self.0)
    }
}

/// A hub that notes whether anybody came, and answers nobody.
struct Nobody(TcpListener);

impl Nobody {
    fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        Ok(Self(listener))
    }

    /// A command that may go to it, if it wants to.
    fn seen_by<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command> {
        let endpoint = format!("http://{}", self.0.local_addr()?);
        Ok(command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", endpoint))
    }

    fn was_left_alone(&self) -> Result<()> {
        match self.0.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            came => bail!("somebody came: {came:?}"),
        }
    }
}
