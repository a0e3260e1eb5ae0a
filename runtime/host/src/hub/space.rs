//! Room on the disk.

use std::io;
use std::path::Path;

use homeroom_engine::files::free_bytes;

use crate::progress::size;

/// Bytes that are left free: other programs write, too.
const SPARE: u64 = 32 << 20;

/// Why so many bytes cannot be written below a path; `None`: they can, as far as is known.
pub(super) fn lacks(path: &Path, needed: u64) -> Option<String> {
    let free = free_bytes(path)?;
    (needed.saturating_add(SPARE) > free).then(|| told(path, needed, Some(free)))
}

fn told(path: &Path, needed: u64, free: Option<u64>) -> String {
    let free = free.map(|free| format!(" and {} are free", size(free))).unwrap_or_default();
    format!(
        "{} are needed in {}{free}\nhint: make room there, or set HF_HOME to a directory on another disk",
        size(needed),
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
    if error.kind() == io::ErrorKind::FileTooLarge {
        return format!(
            "no file may become so large here ({error}), and it has {}\nhint: `ulimit -f` says how large; FAT takes less than 4 GB",
            size(missing)
        );
    }
    format!("the disk became full ({error}): {}", told(path, missing, free_bytes(path)))
}

/// Whether a directory cannot be written: the user may not, or nobody can.
pub(super) fn is_closed(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| matches!(kind, PermissionDenied | ReadOnlyFilesystem))
}
