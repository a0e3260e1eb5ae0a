//! Room on the disk.

use std::io;
use std::path::Path;

use indicatif::DecimalBytes;

/// Bytes that are left free: other programs write, too.
const SPARE: u64 = 32 << 20;

/// Free bytes on the disk that a path is on, or will be; `None` where the system does not say.
#[cfg(unix)]
fn free(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let there = path.ancestors().find(|path| path.exists())?;
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    let name = std::ffi::CString::new(there.as_os_str().as_bytes()).ok()?;
    let mut about = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends with a zero byte, and `about` has room for what is written.
    let done = unsafe { libc::statvfs(name.as_ptr(), about.as_mut_ptr()) };
    // SAFETY: the call has succeeded, so it has written all of it.
    let about = (done == 0).then(|| unsafe { about.assume_init() })?;
    #[allow(clippy::unnecessary_cast, reason = "these are narrower on some systems")]
    Some((about.f_bavail as u64).saturating_mul(about.f_frsize as u64))
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

/// Why so many bytes cannot be written below a path; `None`: they can, as far as is known.
pub(super) fn lacks(path: &Path, needed: u64) -> Option<String> {
    let free = free(path)?;
    (needed.saturating_add(SPARE) > free).then(|| told(path, needed, Some(free)))
}

fn told(path: &Path, needed: u64, free: Option<u64>) -> String {
    let free = free.map(|free| format!(" and {} are free", DecimalBytes(free))).unwrap_or_default();
    format!(
        "{} are needed in {}{free}\nhint: make room there, or set HF_HOME to a directory on another disk",
        DecimalBytes(needed),
        path.display()
    )
}

/// Whether a write failed for want of room: on the disk, in a quota, or below the limit of a file's size.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// What is said when the disk became full on the way.
pub(super) fn became_full(path: &Path, missing: u64, error: &io::Error) -> String {
    format!("the disk became full ({error}): {}", told(path, missing, free(path)))
}
