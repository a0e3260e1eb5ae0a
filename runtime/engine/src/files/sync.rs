//! Has renames on the disk.

use std::fs::File;
use std::path::Path;

/// Has a rename on the disk. Not every file system lets a directory be synced; the data itself is synced already.
pub(super) fn sync_directory(path: &Path) {
    if let Ok(directory) = File::open(path) {
        let _ = directory.sync_all();
    }
}
