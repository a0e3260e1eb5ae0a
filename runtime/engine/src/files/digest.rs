//! SHA-256 of whole files: computed once, and kept by what tells a file from another and from itself before it was written.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::files::{Lock, SMALL_FILE_BYTES_MAX, open_regular, read_text, replace_file};

/// A file that was written so lately may be written again within one tick of its clock, so that its digest is not kept.
const SETTLED: Duration = Duration::from_secs(2);
/// Digests that are kept. Beyond that all are forgotten: each costs its file's reading again, and nothing else.
const KEPT_MAX: usize = 4096;

/// Digests of files by name, `sha256:…`.
pub type FileDigests = BTreeMap<String, String>;

/// Digests of files. A file of Hugging Face's cache is read, too, though its blob is named by its digest: Python's programs compare a
/// download's length alone, and what this is asked for is whether a byte has changed since. `kept` is a private file of digests in a directory of the user's alone; it is read, and those
/// that it lacks are added to it. Whoever cannot read or write it computes what it would have held.
///
/// # Errors
/// When a file cannot be read, or is written meanwhile.
pub fn of_files(files: &[PathBuf], kept: Option<&Path>) -> Result<FileDigests> {
    let known = kept.map(read_kept).unwrap_or_default();
    let mut new = BTreeMap::new();
    let mut digests = FileDigests::new();
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = open_regular(path)?;
        let about = file.metadata().with_context(|| path.display().to_string())?;
        let identity = identity(&about);
        let digest = match identity.as_ref().and_then(|identity| known.get(identity)) {
            Some(digest) => digest.clone(),
            None => {
                let digest = of_file(path, file, &about)?;
                new.extend(identity.filter(|_| is_settled(&about)).map(|identity| (identity, digest.clone())));
                digest
            }
        };
        digests.insert(name, digest);
    }
    if let Some(path) = kept.filter(|_| !new.is_empty()) {
        // Without it the next run computes again.
        let _ = keep(path, new);
    }
    Ok(digests)
}

fn of_file(path: &Path, mut file: impl Read, about: &Metadata) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut len = 0;
    loop {
        let read = file.read(&mut buffer).with_context(|| format!("{}: cannot read", path.display()))?;
        if read == 0 {
            break;
        }
        len += read as u64;
        hash.update(&buffer[..read]);
    }
    let after = path.metadata().with_context(|| path.display().to_string())?;
    ensure!(
        len == about.len() && identity(&after) == identity(about),
        "{}: it was written while it was read",
        path.display()
    );
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

/// What tells a file from another and from itself before it was written, as digests are kept by; `None` where the system does not tell,
/// and where the file was written so lately that it may be written again without a trace.
pub(crate) fn settled_identity(path: &Path) -> Option<String> {
    let about = path.metadata().ok()?;
    identity(&about).filter(|_| is_settled(&about))
}

/// The digests that are kept, by what tells files apart; none where they cannot be read.
pub(crate) fn kept(path: Option<&Path>) -> BTreeMap<String, String> {
    path.map(read_kept).unwrap_or_default()
}

fn is_settled(about: &Metadata) -> bool {
    about.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age > SETTLED))
}

/// Device, inode, size, and the times of the last write and of the last change; `None` where the system does not tell.
#[cfg(unix)]
fn identity(about: &Metadata) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let (written, changed) = ((about.mtime(), about.mtime_nsec()), (about.ctime(), about.ctime_nsec()));
    Some(format!(
        "{}:{}:{}:{}.{}:{}.{}",
        about.dev(),
        about.ino(),
        about.len(),
        written.0,
        written.1,
        changed.0,
        changed.1
    ))
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> Option<String> {
    None
}

fn read_kept(path: &Path) -> BTreeMap<String, String> {
    let text = read_text(path, SMALL_FILE_BYTES_MAX);
    text.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

fn keep(path: &Path, new: BTreeMap<String, String>) -> Result<()> {
    let directory = path.parent().context("a file has a directory")?;
    let _lock = Lock::take(directory, &mut |_| {})?;
    let mut known = read_kept(path);
    if known.len() + new.len() > KEPT_MAX {
        known.clear();
    }
    known.extend(new);
    replace_file(path, serde_json::to_string_pretty(&known)?.as_bytes())
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs::{self, File};

    use super::*;

    /// Two files, whose digests are kept once they have settled.
    #[test]
    fn a_digest_is_kept_until_its_file_is_written() -> Result<()> {
        let place = tempfile::tempdir()?;
        let (kept, files) =
            (place.path().join("digests.json"), ["ä.gguf", "b.gguf"].map(|name| place.path().join(name)));
        let write = |path: &Path, text: &str, age: u64| -> Result<()> {
            fs::write(path, text)?;
            Ok(File::options()
                .write(true)
                .open(path)?
                .set_modified(std::time::SystemTime::now() - Duration::from_secs(age))?)
        };
        write(&files[0], "abc", 60)?;
        write(&files[1], "", 0)?;
        // Of FIPS 180-2, and of nothing.
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digests = of_files(&files, Some(&kept))?;
        assert_eq!(digests, BTreeMap::from([("ä.gguf".into(), abc.into()), ("b.gguf".into(), empty.into())]));
        assert_eq!(read_kept(&kept).into_values().collect::<Vec<_>>(), [abc], "the other was written just now");

        // What is kept is what is told.
        let identity = read_kept(&kept).into_keys().next().context("there is one")?;
        fs::write(&kept, serde_json::json!({identity: "sha256:kept"}).to_string())?;
        assert_eq!(of_files(&files, Some(&kept))?["ä.gguf"], "sha256:kept");
        assert_eq!(of_files(&files, None)?["ä.gguf"], abc);
        // The same length and time, and written all the same.
        let time = fs::metadata(&files[0])?.modified()?;
        fs::write(&files[0], "abd")?;
        File::options().write(true).open(&files[0])?.set_modified(time)?;
        let digest = of_files(&files, Some(&kept))?["ä.gguf"].clone();
        assert!(digest != abc && digest != "sha256:kept", "{digest}");

        // A file that cannot be read or written costs the time only.
        fs::write(&kept, "{")?;
        assert_eq!(of_files(&files, Some(&kept))?["ä.gguf"], digest);
        assert_eq!(of_files(&files, Some(&place.path().join("no/where.json")))?["ä.gguf"], digest);
        assert!(
            of_files(&[place.path().to_owned()], None).is_err_and(|error| error.to_string().contains("a directory"))
        );
        Ok(())
    }
}
