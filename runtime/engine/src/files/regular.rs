//! Files that others wrote: only regular ones are read, so that a pipe is not waited for and a device does not go on for ever.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Largest text of a model's or an adapter's small files, in bytes.
pub const SMALL_FILE_BYTES_MAX: u64 = 256 << 20;

/// Whether something has a name, if only a link that leads nowhere: that stands for a file which is missed.
///
/// # Errors
/// When its directory cannot be looked at. Names the path.
pub fn is_named(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        about => about.map(|_| true).with_context(|| path.display().to_string()),
    }
}

/// Refuses a path that is not UTF-8: what is written of it is JSON, which is.
///
/// # Errors
/// Names the path.
pub fn utf8(path: &Path) -> Result<&str> {
    let text = path.to_str();
    text.with_context(|| {
        format!("{}: this path is not UTF-8, as what is written of it has to be; rename it", path.display())
    })
}

/// What a link is that leads to nothing, in words; `None`: it leads somewhere, or there is no link.
pub fn broken_link(path: &Path) -> Option<String> {
    let to = fs::read_link(path).ok()?;
    let error = fs::metadata(path).err()?;
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::ELOOP) {
        return Some("a link that leads back to itself".to_owned());
    }
    (error.kind() == ErrorKind::NotFound).then(|| format!("a link to {}, which is not there", to.display()))
}

/// Opens a file for reading, if it is a regular one. Opening a pipe does not wait for who writes to it.
///
/// # Errors
/// When it cannot be opened or is none.
pub fn open_regular(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).with_context(|| {
        let link = broken_link(path).map(|link| format!(", it is {link}")).unwrap_or_default();
        format!("{}: cannot open{link}", path.display())
    })?;
    let kind = file.metadata().with_context(|| path.display().to_string())?.file_type();
    let what = if kind.is_dir() { "a directory" } else { "a device, a pipe or a socket" };
    ensure!(kind.is_file(), "{}: {what}, not a regular file", path.display());
    Ok(file)
}

/// The bytes of a small regular file.
///
/// # Errors
/// When it is none, cannot be read, or has more than `most` bytes.
pub fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open_regular(path)?.take(most + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("{}: cannot read", path.display()))?;
    ensure!(bytes.len() as u64 <= most, "{}: longer than {most} bytes", path.display());
    Ok(bytes)
}

/// The text of a small regular file.
///
/// # Errors
/// As [`read_bytes`], and when it is not UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read_bytes(path, most)?).with_context(|| format!("{}: not UTF-8", path.display()))
}

/// The text of a small file, if there is one of that name.
///
/// # Errors
/// As [`read_text`].
pub(crate) fn read_if_there(path: &Path, most: u64) -> Result<Option<String>> {
    let there = is_named(path)?;
    there.then(|| read_text(path, most)).transpose()
}

/// The JSON object that `text`, read from `path`, is.
pub(crate) fn parse_object(path: &Path, text: &str) -> Result<Value> {
    let value: Value = serde_json::from_str(text).with_context(|| format!("{}: not JSON", path.display()))?;
    ensure!(value.is_object(), "{}: should be a JSON object", path.display());
    Ok(value)
}
