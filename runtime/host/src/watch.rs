//! Waits until a file may have changed. What the system reports is a hint: it may come late, twice or never (as on network
//! file systems, for the target of a link, or when there are no more watches to be had), so the file is also looked at every
//! two seconds.
//!
//! What a file held decides whether a pipeline or a crate has changed: a save of equal bytes is no change.
//!
//! Watched is the directory: a build replaces the file, and a watch on the file itself would die with the old one.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use homeroom_engine::files::open_regular;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use sha2::{Digest, Sha256};

/// Silence after which a file that was being written is taken to be whole.
const QUIET: Duration = Duration::from_millis(150);
/// How often a file is looked at when nothing is reported.
const POLL: Duration = Duration::from_secs(2);

/// One watched file.
pub struct Watch {
    path: PathBuf,
    sender: Sender<()>,
    events: Receiver<()>,
    watcher: Option<RecommendedWatcher>,
    /// The directory that is watched: it may be deleted and made anew.
    dir: Option<Identity>,
    seen: Option<Identity>,
}

/// What tells a file from another of the same name, and from itself before it was written: device and inode, length, and
/// the time of the last change. That is not the time of the last write, which a copy may set back to the original's.
#[cfg(unix)]
pub type Identity = ((u64, u64), u64, (i64, i64));
#[cfg(not(unix))]
pub type Identity = ((u64, u64), u64, Option<std::time::SystemTime>);

impl Watch {
    /// Watches a file, which need not be there. The second value: why it is only looked at from time to time.
    pub fn new(path: &Path) -> (Self, Option<String>) {
        let (sender, events) = channel();
        let seen = identity(path);
        let mut watch = Self { path: path.to_owned(), sender, events, watcher: None, dir: None, seen };
        let problem = watch.watch().err().map(|error| error.to_string());
        (watch, problem)
    }

    /// What ends a wait early.
    pub fn waker(&self) -> Sender<()> {
        self.sender.clone()
    }

    /// Waits for something to happen to the file, and then for silence. False: only time has passed.
    pub fn wait(&mut self) -> bool {
        let hinted = match self.events.recv_timeout(POLL) {
            Ok(()) => {
                while self.events.recv_timeout(QUIET).is_ok() {}
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        };
        if self.directory().is_some_and(|dir| identity(dir).map(inode) != self.dir.map(inode)) {
            let _ = self.watch();
        }
        let mut now = identity(&self.path);
        if now == self.seen {
            return hinted;
        }
        // Written by somebody of whom nothing was reported: wait until two looks agree.
        if !hinted {
            let mut before = None;
            while before != Some(now) {
                std::thread::sleep(QUIET);
                before = Some(std::mem::replace(&mut now, identity(&self.path)));
            }
        }
        self.seen = now;
        true
    }

    /// The file as the last wait saw it; `None`: it is not there.
    pub fn identity(&self) -> Option<Identity> {
        self.seen
    }

    fn directory(&self) -> Option<&Path> {
        self.path.parent()
    }

    fn watch(&mut self) -> notify::Result<()> {
        (self.watcher, self.dir) = (None, None);
        let Some(dir) = self.path.parent().map(Path::to_owned) else { return Ok(()) };
        let sender = self.sender.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the file is an event too, and would be answered by another read.
            if !event.is_ok_and(|event| matches!(event.kind, EventKind::Access(_))) {
                let _ = sender.send(());
            }
        })?;
        watcher.watch(&dir, RecursiveMode::NonRecursive)?;
        (self.watcher, self.dir) = (Some(watcher), identity(&dir));
        Ok(())
    }
}

/// What a file held: SHA-256 of its bytes, `None` if it was not there. A file that is touched, or saved as it was, holds the same.
pub type Content = Option<[u8; 32]>;

/// Files, each as it was when somebody looked.
pub type Files = BTreeMap<PathBuf, Content>;

/// Longest file that is read to see whether it has changed; of a longer one its identity has to tell.
const CONTENT_BYTES_MAX: u64 = 64 << 20;

/// Contents of files, which are read again only when their identity says that they may have changed.
#[derive(Default)]
pub struct Contents(BTreeMap<PathBuf, (Option<Identity>, Content)>);

impl Contents {
    /// What a file holds now.
    pub fn of(&mut self, path: &Path) -> Content {
        let now = identity(path);
        match self.0.get(path) {
            Some((before, content)) if *before == now => *content,
            _ => {
                let content = content(path);
                self.0.insert(path.to_owned(), (now, content));
                content
            }
        }
    }

    /// The first of some files that holds something else than it did, as soon as it is no longer being written.
    pub fn changed(&mut self, files: &Files) -> Option<PathBuf> {
        let (path, _) = files.iter().find(|(path, content)| self.of(path) != **content)?;
        let mut before = None;
        while before != Some(self.of(path)) {
            before = Some(self.of(path));
            std::thread::sleep(QUIET);
        }
        // It may hold by now what it held.
        (self.of(path) != files[path]).then(|| path.clone())
    }
}

/// What a file holds.
pub fn content(path: &Path) -> Content {
    let file = open_regular(path).ok()?;
    let mut hash = Sha256::new();
    if file.metadata().ok()?.len() > CONTENT_BYTES_MAX {
        hash.update(format!("{:?}", identity(path)));
    } else {
        std::io::copy(&mut file.take(CONTENT_BYTES_MAX), &mut Hashing(&mut hash)).ok()?;
    }
    Some(hash.finalize().into())
}

struct Hashing<'a>(&'a mut Sha256);

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Watched files and directories, with what is below them.
pub struct Tree {
    roots: Vec<PathBuf>,
    events: Receiver<()>,
    _watcher: Option<RecommendedWatcher>,
    contents: Contents,
    seen: Files,
}

impl Tree {
    /// Watches files, and directories but for what is hidden or built (`target`). The second value: why they are only looked at
    /// from time to time.
    pub fn new(roots: Vec<PathBuf>) -> (Self, Option<String>) {
        let mut contents = Contents::default();
        let seen = below(&roots, &mut contents);
        Self::watching(roots, contents, seen)
    }

    /// Watches files and nothing else. What has changed since they were looked at has changed.
    pub fn of_files(files: Files) -> (Self, Option<String>) {
        Self::watching(files.keys().cloned().collect(), Contents::default(), files)
    }

    fn watching(roots: Vec<PathBuf>, contents: Contents, seen: Files) -> (Self, Option<String>) {
        let (sender, events) = channel();
        let watching = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|event| matches!(event.kind, EventKind::Access(_))) {
                let _ = sender.send(());
            }
        });
        let watching = watching.and_then(|mut watcher| {
            for root in &roots {
                let (path, mode) = match root.is_dir() {
                    true => (root.as_path(), RecursiveMode::Recursive),
                    false => (root.parent().unwrap_or(root), RecursiveMode::NonRecursive),
                };
                // A directory that is not there yet is looked for from time to time.
                if path.exists() {
                    watcher.watch(path, mode)?;
                }
            }
            Ok(watcher)
        });
        let (watcher, problem) = match watching {
            Ok(watcher) => (Some(watcher), None),
            Err(error) => (None, Some(error.to_string())),
        };
        (Self { roots, events, _watcher: watcher, contents, seen }, problem)
    }

    /// Waits until a file holds something else than when the last wait ended, and then for silence; the file. `None`: `ended` said so.
    pub fn wait(&mut self, ended: &dyn Fn() -> bool) -> Option<PathBuf> {
        let mut looked = Instant::now().checked_sub(POLL);
        while !ended() {
            let hinted = self.events.recv_timeout(QUIET).is_ok();
            if hinted {
                while self.events.recv_timeout(QUIET).is_ok() {}
            } else if looked.is_some_and(|looked| looked.elapsed() < POLL) {
                continue;
            }
            looked = Some(Instant::now());
            let now = below(&self.roots, &mut self.contents);
            if now != self.seen {
                let differs = |path: &&PathBuf| now.get(*path) != self.seen.get(*path);
                let changed = now.keys().chain(self.seen.keys()).find(differs).cloned();
                self.seen = now;
                return changed;
            }
        }
        None
    }
}

/// All files below some roots.
fn below(roots: &[PathBuf], contents: &mut Contents) -> Files {
    let (mut found, mut open) = (BTreeMap::new(), roots.to_vec());
    while let Some(path) = open.pop() {
        if !path.is_dir() {
            let content = contents.of(&path);
            found.insert(path, content);
            continue;
        }
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        open.extend(entries.map(|entry| entry.path()).filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            !name.starts_with('.') && name != "target"
        }));
    }
    found
}

/// The identity of a file; `None`: it is not there.
#[cfg(unix)]
pub fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path).ok()?;
    Some(((meta.dev(), meta.ino()), meta.len(), (meta.ctime(), meta.ctime_nsec())))
}

/// The identity of a file; `None`: it is not there.
#[cfg(not(unix))]
pub fn identity(path: &Path) -> Option<Identity> {
    let meta = std::fs::metadata(path).ok()?;
    Some(((0, 0), meta.len(), meta.modified().ok()))
}

fn inode(identity: Identity) -> (u64, u64) {
    identity.0
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;

    /// Waits until a wait says that the file may have changed.
    fn sees(watch: &mut Watch) -> bool {
        let start = Instant::now();
        while start.elapsed() < 3 * POLL {
            if watch.wait() {
                return true;
            }
        }
        false
    }

    #[test]
    fn a_change_of_which_nothing_is_reported_is_seen_and_once() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        std::fs::write(&path, "one")?;
        let (mut watch, problem) = Watch::new(&path);
        assert_eq!(problem, None);
        watch.watcher = None;
        // A copy with the time of the original, of the same length: only the change of its entry tells.
        let before = std::fs::metadata(&path)?.modified()?;
        std::fs::write(&path, "two")?;
        std::fs::File::options().append(true).open(&path)?.set_modified(before)?;
        assert!(sees(&mut watch));
        assert!(!watch.wait());
        std::fs::remove_file(&path)?;
        assert!(sees(&mut watch));
        Ok(())
    }

    #[test]
    fn a_file_that_is_touched_or_saved_as_it_was_has_not_changed() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        std::fs::write(&path, "one")?;
        let files = Files::from([(path.clone(), content(&path)), (dir.path().join("gone"), None)]);
        let mut contents = Contents::default();
        assert_eq!(contents.changed(&files), None);
        std::fs::File::options().append(true).open(&path)?.set_modified(std::time::SystemTime::now())?;
        assert_eq!(contents.changed(&files), None);
        let other = dir.path().join("other");
        std::fs::write(&other, "one")?;
        std::fs::rename(&other, &path)?;
        assert_eq!(contents.changed(&files), None);
        std::fs::write(&path, "two")?;
        assert_eq!(contents.changed(&files), Some(path.clone()));
        std::fs::write(&path, "one")?;
        std::fs::write(dir.path().join("gone"), "")?;
        assert_eq!(contents.changed(&files), Some(dir.path().join("gone")));
        Ok(())
    }

    #[test]
    fn where_no_watch_can_be_had_this_is_said_and_the_file_is_looked_at() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("not yet/file");
        let (mut watch, problem) = Watch::new(&path);
        assert!(problem.is_some());
        assert!(!watch.wait());
        std::fs::create_dir_all(dir.path().join("not yet"))?;
        std::fs::write(&path, "one")?;
        assert!(sees(&mut watch));
        // Now that there is a directory, it is watched as any other.
        assert!(watch.watcher.is_some());
        Ok(())
    }
}
