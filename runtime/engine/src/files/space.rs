//! How much room files take, and how much there is for more.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Result, bail};

/// Room that is left to others, beyond what is about to be written, in bytes.
const SPARE: u64 = 16 << 20;

/// The bytes of a file, or of all files below a directory. Links count for nothing, as they take no room, and so does what cannot be looked at.
pub fn bytes_below(path: &Path) -> u64 {
    let Ok(about) = fs::symlink_metadata(path) else { return 0 };
    match about.is_dir() {
        true => fs::read_dir(path).into_iter().flatten().flatten().map(|entry| bytes_below(&entry.path())).sum(),
        false if about.is_file() => about.len(),
        false => 0,
    }
}

/// As [`bytes_below`], of at most so many entries; `None` where there are more, which no model has.
pub fn bytes_below_few(path: &Path, mut entries_max: usize) -> Option<u64> {
    let (mut bytes, mut left) = (0, vec![path.to_owned()]);
    while let Some(path) = left.pop() {
        let Ok(about) = fs::symlink_metadata(&path) else { continue };
        if about.is_file() {
            bytes += about.len();
        } else if about.is_dir() {
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                entries_max = entries_max.checked_sub(1)?;
                left.push(entry.path());
            }
        }
    }
    Some(bytes)
}

/// The bytes that this user may still write on the file system of a directory, or of the nearest above it that is there; `None` where
/// the system does not tell.
pub fn free_bytes(directory: &Path) -> Option<u64> {
    let there = directory.ancestors().find(|path| path.is_dir())?;
    free_on(if there.as_os_str().is_empty() { Path::new(".") } else { there }).ok()
}

#[cfg(unix)]
fn free_on(directory: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    let mut about = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the name ends with a zero byte, and both outlive the call, which keeps neither.
    let failed = unsafe { libc::statvfs(name.as_ptr(), about.as_mut_ptr()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroes are a value of this structure, and the call has filled it.
    let about = unsafe { about.assume_init() };
    // Their types differ among systems.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    Ok((about.f_bavail as u64).saturating_mul(about.f_frsize as u64))
}

#[cfg(not(unix))]
fn free_on(_: &Path) -> io::Result<u64> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Refuses to begin what has no room.
///
/// # Errors
/// When fewer than `bytes` are free where `directory` is or will be.
pub fn ensure_room(directory: &Path, bytes: u64) -> Result<()> {
    match free_bytes(directory) {
        Some(free) if free < bytes.saturating_add(SPARE) => bail!(
            "{}: {} MiB are needed here, and {} MiB are free\nhint: make room there",
            directory.display(),
            bytes.saturating_add(SPARE) >> 20,
            free >> 20
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_count_and_what_links_lead_to_does_not() -> Result<()> {
        let place = tempfile::tempdir()?;
        let at = |name: &str| place.path().join(name);
        fs::create_dir_all(at("model/sub"))?;
        fs::write(at("model/a"), [0; 7])?;
        fs::write(at("model/sub/b"), [0; 5])?;
        fs::write(at("outside"), [0; 300])?;
        #[cfg(unix)]
        for (to, name) in [(at("outside"), "model/link"), (at("model"), "model/sub/circle"), (at("nothing"), "model/x")]
        {
            std::os::unix::fs::symlink(to, at(name))?;
        }
        assert_eq!([at("model"), at("outside"), at("nothing")].map(|path| bytes_below(&path)), [12, 300, 0]);
        assert_eq!(bytes_below_few(&at("model"), 100), Some(12));
        assert_eq!(bytes_below_few(&at(""), 1), None);
        Ok(())
    }

    #[test]
    fn what_has_no_room_is_refused_also_where_nothing_is_yet() -> Result<()> {
        let place = tempfile::tempdir()?;
        let new = place.path().join("not/there/yet");
        ensure_room(&new, 0)?;
        if free_bytes(&new).is_some() {
            let error = ensure_room(&new, u64::MAX).map_err(|error| error.to_string());
            assert!(error.is_err_and(|error| error.contains("are needed here, and")));
        }
        Ok(())
    }
}
