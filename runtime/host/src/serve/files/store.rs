//! Files that clients have sent, in `files/` below `$HOMEROOM_HOME`, for the user alone: a directory each, with what the file is and
//! what it holds. One that is being sent has another name, so that a file is there whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use homeroom_engine::files::{SMALL_FILE_BYTES_MAX, ensure_room, make_directory, read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::handler::config::fine_tuning::Limits;
use crate::serve::now;
use crate::{private, random};

/// What a file is.
const ABOUT: &str = "file.json";
/// Beginning of the name of a directory in the making.
const NEW: &str = ".new-";
/// After so long, what is in the making is left over from a process that has ended.
const LEFT_OVER: Duration = Duration::from_secs(6 * 3600);
/// Most files.
const FILES_MAX: usize = 10_000;
/// Most files of a key.
const FILES_OF_KEY_MAX: usize = 2_000;
/// Room that is left on the disk.
const SPARE_BYTES: u64 = 64 << 20;

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// `file-…`.
    pub id: String,
    /// Its length.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// When it is removed, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<u64>,
    /// Its name where it came from.
    pub filename: String,
    /// `fine-tune`, or `fine-tune-results`.
    pub purpose: String,
    /// The key whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The file with its bytes, in its directory.
    content: String,
}

impl About {
    /// As OpenAI's API has it.
    pub fn card(&self) -> Value {
        let mut card = json!({
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": null,
        });
        if let Some(expires_at) = self.expires_at {
            card["expires_at"] = expires_at.into();
        }
        card
    }
}

/// Why a file is not kept.
#[derive(Debug)]
pub enum NotKept {
    /// It is larger than a file may be.
    TooLarge,
    /// It does not fit beside the others, in words for whoever sends it.
    Full(String),
    /// It cannot be written.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for NotKept {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// The files of all keys.
pub struct Files {
    directory: PathBuf,
    /// How much is kept.
    pub limits: Limits,
    /// Files that are there and those that are being written, by id: whose, and how many bytes.
    held: Mutex<BTreeMap<String, (Option<String>, u64)>>,
}

impl Files {
    /// Opens `files/` in a data directory, and removes what is left over there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(data: &Path, limits: Limits) -> Result<Self> {
        let directory = data.join("files");
        make_directory(&directory)?;
        let files = Self { directory, limits, held: Mutex::default() };
        files.sweep();
        files.recount();
        Ok(files)
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, (Option<String>, u64)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts so many more bytes of a file, if they fit beside the others.
    fn hold(&self, about: &About, more: u64) -> Result<(), NotKept> {
        let mut held = self.held();
        let is_new = !held.contains_key(&about.id);
        let sum = |counts: &dyn Fn(&Option<String>) -> bool| {
            let of = held.values().filter(|(key, _)| counts(key));
            of.fold((0, 0), |(files, bytes): (usize, u64), (_, more)| (files + 1, bytes.saturating_add(*more)))
        };
        let (files, bytes) = sum(&|_| true);
        if is_new && files >= FILES_MAX || bytes.saturating_add(more) > self.limits.all_bytes {
            let most = self.limits.all_bytes >> 20;
            return Err(NotKept::Full(format!(
                "all files of this server together would be more than {most} MiB or {FILES_MAX} files; delete files that no training needs any more, or have whoever runs the server raise files_mib_max"
            )));
        }
        let (files, bytes) = sum(&|key| *key == about.key);
        let most = self.limits.key_bytes;
        if let Some(key) = &about.key
            && (is_new && files >= FILES_OF_KEY_MAX || bytes.saturating_add(more) > most)
        {
            return Err(NotKept::Full(format!(
                "the files of the key `{key}` would be more than {} MiB or {FILES_OF_KEY_MAX} files, which is its share; delete some (DELETE /v1/files/ID)",
                most >> 20
            )));
        }
        held.entry(about.id.clone()).or_insert_with(|| (about.key.clone(), 0)).1 += more;
        Ok(())
    }

    /// Counts what is there now: another server of the same home, or its owner, may have removed files or added some.
    fn recount(&self) {
        let all = self.all();
        let is_there = |id: &str| {
            // In this order: one that is kept meanwhile changes from the first name to the second.
            self.directory.join(format!("{NEW}{id}")).exists() || self.directory.join(id).join(ABOUT).exists()
        };
        // `remove` forgets a file behind its record, with this lock: none that is gone is added for good.
        let mut held = self.held();
        held.retain(|id, _| is_there(id));
        for about in all.into_iter().filter(|about| is_there(&about.id)) {
            held.entry(about.id).or_insert((about.key, about.bytes));
        }
    }

    /// Removes what an upload left that was broken off, and files whose time is over.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let is_new = entry.file_name().to_string_lossy().starts_with(NEW);
            let is_old = || {
                let modified = entry.metadata().and_then(|about| about.modified());
                modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > LEFT_OVER))
            };
            if is_new && is_old() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        for about in self.all().into_iter().filter(|about| about.expires_at.is_some_and(|at| at <= now())) {
            let _ = self.remove(&about);
        }
    }

    /// All files, the newest first.
    fn all(&self) -> Vec<About> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut all: Vec<About> = entries.filter_map(|entry| self.about(entry.file_name().to_str()?)).collect();
        all.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        all
    }

    fn about(&self, id: &str) -> Option<About> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let rest = id.strip_prefix("file-").filter(|rest| !rest.is_empty() && rest.len() <= 64)?;
        if !rest.chars().all(plain) {
            return None;
        }
        let text = read_text(&self.directory.join(id).join(ABOUT), SMALL_FILE_BYTES_MAX).ok()?;
        let about: About = serde_json::from_str(&text).ok()?;
        (about.id == id && !about.content.contains('/')).then_some(about)
    }

    /// The files of a key whose time is not over, the newest first.
    pub fn of(&self, key: Option<&str>) -> Vec<About> {
        let now = now();
        let is_there = |about: &About| about.key.as_deref() == key && about.expires_at.is_none_or(|at| at > now);
        self.all().into_iter().filter(is_there).collect()
    }

    /// A file of a key. There is none of this id for whoever has another key.
    pub fn find(&self, key: Option<&str>, id: &str) -> Option<About> {
        let now = now();
        self.about(id).filter(|about| about.key.as_deref() == key && about.expires_at.is_none_or(|at| at > now))
    }

    /// Where the bytes of a file are.
    pub fn content(&self, about: &About) -> PathBuf {
        self.directory.join(&about.id).join(&about.content)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, about: &About) -> io::Result<()> {
        // The record first: what is half removed is no file any more.
        let directory = self.directory.join(&about.id);
        fs::remove_file(directory.join(ABOUT))?;
        self.held().remove(&about.id);
        fs::remove_dir_all(directory)
    }

    /// Begins a file of a key.
    ///
    /// # Errors
    /// When there are too many, or no room is left.
    pub fn begin(&self, key: Option<&str>, filename: &str) -> Result<NewFile<'_>, NotKept> {
        self.sweep();
        self.recount();
        ensure_room(&self.directory, SPARE_BYTES)?;
        let id = format!("file-{}", random::id());
        let directory = self.directory.join(format!("{NEW}{id}"));
        let about = About {
            id,
            bytes: 0,
            created_at: now(),
            expires_at: None,
            content: format!("content{}", ending(filename)),
            filename: filename.chars().take(255).collect(),
            purpose: String::new(),
            key: key.map(str::to_owned),
        };
        let mut new = NewFile { files: self, directory, file: None, about, is_kept: false };
        // What has no directory is not counted.
        make_directory(&new.directory)?;
        self.hold(&new.about, 0)?;
        new.file = Some(private_file(&new.directory.join(&new.about.content))?);
        Ok(new)
    }
}

/// A file that is being written. Dropped, it is gone.
pub struct NewFile<'a> {
    files: &'a Files,
    directory: PathBuf,
    file: Option<File>,
    about: About,
    is_kept: bool,
}

impl NewFile<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// When it would be too large or does not fit beside the others, or the disk is full.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), NotKept> {
        let more = piece.len() as u64;
        if self.about.bytes + more > self.files.limits.file_bytes {
            return Err(NotKept::TooLarge);
        }
        self.files.hold(&self.about, more)?;
        self.about.bytes += more;
        self.file().write_all(piece)?;
        Ok(())
    }

    fn file(&mut self) -> &mut File {
        self.file.as_mut().expect("`begin` opened it")
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.about.bytes
    }

    /// Keeps it, until `lives` is over if that is given.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn keep(mut self, purpose: &str, lives: Option<u64>) -> Result<About> {
        purpose.clone_into(&mut self.about.purpose);
        self.about.expires_at = lives.map(|lives| self.about.created_at + lives);
        self.file().sync_all()?;
        let mut record = private_file(&self.directory.join(ABOUT))?;
        record.write_all(serde_json::to_string_pretty(&self.about)?.as_bytes())?;
        record.sync_all()?;
        let to = self.files.directory.join(&self.about.id);
        fs::rename(&self.directory, &to).with_context(|| format!("{}: cannot write", to.display()))?;
        self.is_kept = true;
        Ok(self.about.clone())
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.files.held().remove(&self.about.id);
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// A new file for the user alone.
///
/// # Errors
/// When it is there already, or cannot be written.
pub fn private_file(path: &Path) -> Result<File> {
    private::options()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("{}: cannot write", path.display()))
}

/// The ending that says in which form the rows of a file are.
fn ending(filename: &str) -> &'static str {
    let name = filename.to_ascii_lowercase();
    let known = [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz"];
    known.into_iter().find(|ending| name.ends_with(ending)).unwrap_or(".jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { file_bytes: 10, all_bytes: 15, key_bytes: 12, key_uploads: 2 };

    fn full(of: Result<(), NotKept>) -> String {
        match of {
            Err(NotKept::Full(words)) => words,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_belong_to_a_key_and_are_bounded() -> Result<()> {
        let place = tempfile::tempdir()?;
        let files = Files::open(place.path(), LIMITS)?;
        let add = |key: Option<&str>, text: &str| -> Result<About, NotKept> {
            let mut file = files.begin(key, "../a.CSV")?;
            file.write(text.as_bytes())?;
            Ok(file.keep("fine-tune", None)?)
        };
        let of_test = |error| anyhow::anyhow!("{error:?}");
        let mine = add(Some("class-7b"), "0123456789").map_err(of_test)?;
        assert!(matches!(add(Some("class-7b"), "0123456789x"), Err(NotKept::TooLarge)));
        let words = full(add(Some("class-7b"), "012").map(drop));
        assert!(
            words.contains("`class-7b` would be more than 0 MiB") && words.contains("DELETE /v1/files/"),
            "{words}"
        );
        assert!(full(add(None, "012345").map(drop)).contains("all files of this server together"));
        let other = add(None, "01234").map_err(of_test)?;
        assert!(full(add(Some("class-7b"), "0").map(drop)).contains("all files of this server together"));
        assert_eq!((files.of(Some("class-7b")), files.of(None)), (vec![mine.clone()], vec![other.clone()]));
        assert_eq!((files.find(None, &mine.id), files.find(Some("x"), &mine.id)), (None, None));
        for id in ["../x", "file-", "file-../x", "file-A", &other.id[..other.id.len() - 1]] {
            assert_eq!(files.find(None, id), None, "{id}");
        }
        let path = files.content(&mine);
        assert!(path.ends_with("content.csv") && fs::read(&path)? == b"0123456789");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(*Files::open(place.path(), LIMITS)?.held(), *files.held());
        files.remove(&mine)?;
        assert_eq!((files.of(Some("class-7b")), files.held().len()), (Vec::new(), 1));
        assert!(!path.exists() && fs::read_dir(place.path().join("files"))?.count() == 1);
        Ok(())
    }

    /// What is being sent counts, so that several at once come to no more than one after another.
    #[test]
    fn files_that_are_sent_at_once_share_what_is_left() -> Result<(), NotKept> {
        let place = tempfile::tempdir()?;
        let files = Files::open(place.path(), LIMITS)?;
        let (mut one, mut two) = (files.begin(Some("a"), "one")?, files.begin(Some("a"), "two")?);
        one.write(&[b'x'; 9])?;
        two.write(b"xx")?;
        assert!(full(two.write(b"xx")).contains("its share"));
        let mut other = files.begin(Some("b"), "other")?;
        other.write(b"xxxx")?;
        assert!(full(other.write(b"x")).contains("all files"));
        drop(one);
        two.write(b"xx")?;
        assert_eq!((two.keep("fine-tune", None)?.bytes, other.keep("fine-tune", None)?.bytes), (4, 4));
        Ok(())
    }

    #[test]
    fn what_another_server_adds_or_removes_is_counted() -> Result<(), NotKept> {
        let place = tempfile::tempdir()?;
        let (here, there) = (Files::open(place.path(), LIMITS)?, Files::open(place.path(), LIMITS)?);
        let add = |files: &Files, bytes: &[u8]| -> Result<About, NotKept> {
            let mut file = files.begin(Some("a"), "a.jsonl")?;
            file.write(bytes)?;
            Ok(file.keep("fine-tune", None)?)
        };
        let first = add(&here, &[b'x'; 8])?;
        assert!(full(add(&there, &[b'x'; 5]).map(drop)).contains("its share"));
        there.remove(&first)?;
        // What is being sent stays counted, beside what is gone.
        let mut open = here.begin(Some("a"), "b.jsonl")?;
        open.write(&[b'x'; 3])?;
        assert!(full(add(&here, &[b'x'; 10]).map(drop)).contains("its share"));
        assert_eq!(add(&here, &[b'x'; 9])?.bytes, 9);
        assert_eq!(open.keep("fine-tune", None)?.bytes, 3);
        assert_eq!(here.held().values().map(|(_, bytes)| bytes).sum::<u64>(), 12);
        Ok(())
    }

    #[test]
    fn a_file_whose_time_is_over_is_gone() -> Result<(), NotKept> {
        let place = tempfile::tempdir()?;
        let files = Files::open(place.path(), LIMITS)?;
        let mut file = files.begin(None, "a.jsonl")?;
        file.write(b"x")?;
        let about = file.keep("fine-tune", Some(0))?;
        assert_eq!(files.find(None, &about.id), None);
        drop(Files::open(place.path(), LIMITS)?);
        assert!(!files.content(&about).exists());
        Ok(())
    }
}
