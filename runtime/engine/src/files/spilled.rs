//! What does not stay in memory: it is appended to a private file without a name, which is mapped when all is written.
//!
//! Nothing is left of such a file whatever ends the program, as it never has a name (or, where a system cannot do without, loses it at
//! once). Pages that were read are given back after a while, so that what is spilled counts little as memory, however often it is gone
//! through.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use memmap2::Mmap;

use super::mapped::map_open;

/// Where what is appended begins: at a multiple of this, so that it can be read as words.
const ALIGNED: usize = 4;
/// Bytes that may be read before pages are given back.
const READ_BYTES: usize = 16 << 20;
/// What a read counts at least: a system maps the pages around one as well.
const READ_LEAST: usize = 64 << 10;

/// Makes a private file without a name, where large ones belong.
///
/// # Errors
/// When there is no place to write one.
pub fn nameless() -> Result<File> {
    let place = place();
    let file = match tempfile::tempfile_in(&place) {
        Err(_) if place != std::env::temp_dir() => tempfile::tempfile(),
        made => made,
    };
    // Without a name it has the mode of any new file. Where a system shows what a process has open, that would say who may read it.
    #[cfg(unix)]
    let file = file.and_then(|file| {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).map(|()| file)
    });
    file.with_context(|| {
        format!("{}: cannot write a temporary file\nhint: TMPDIR names another directory for them", place.display())
    })
}

/// `/tmp` is kept in memory on many systems, `/var/tmp` on none. What the user says goes before.
fn place() -> PathBuf {
    let large = Path::new("/var/tmp");
    if cfg!(unix) && std::env::var_os("TMPDIR").is_none() && large.is_dir() {
        return large.to_owned();
    }
    std::env::temp_dir()
}

/// What is being spilled. The file is made with the first bytes.
#[derive(Default)]
pub struct Spill {
    spilled: Arc<Spilled>,
    file: Option<BufWriter<File>>,
    bytes: u64,
}

impl Spill {
    /// Where what is appended can be read, once [`Self::finish`] was called.
    pub fn spilled(&self) -> &Arc<Spilled> {
        &self.spilled
    }

    /// Appends bytes. Returns where they begin, a multiple of four.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(BufWriter::with_capacity(1 << 20, nameless()?)),
        };
        let begin = self.bytes;
        let gap = bytes.len().next_multiple_of(ALIGNED) - bytes.len();
        file.write_all(bytes).and_then(|()| file.write_all(&[0; ALIGNED][..gap])).with_context(no_room)?;
        self.bytes += (bytes.len() + gap) as u64;
        Ok(begin)
    }

    /// Makes all of it readable.
    ///
    /// # Errors
    /// When it cannot be written or mapped.
    pub fn finish(self) -> Result<()> {
        let Some(file) = self.file else { return Ok(()) };
        let file = file.into_inner().map_err(|error| error.into_error()).with_context(no_room)?;
        let map = map_open(&file, Path::new("the temporary file of rows"))?;
        // Nobody else finishes it.
        let _ = self.spilled.map.set(map);
        Ok(())
    }
}

fn no_room() -> String {
    format!(
        "{}: cannot write the temporary file that the rows are kept in\nhint: make room there, or name another directory in TMPDIR",
        place().display()
    )
}

/// What was spilled.
#[derive(Debug, Default)]
pub struct Spilled {
    map: OnceLock<Arc<Mmap>>,
    /// Bytes that were read since pages were last given back.
    read: AtomicUsize,
}

impl Spilled {
    /// Bytes that were appended.
    ///
    /// # Panics
    /// Where they are read before [`Spill::finish`], or were never appended.
    pub fn bytes(&self, place: Range<u64>) -> &[u8] {
        let map = self.map.get().expect("what is spilled is read when it is finished");
        let bytes = &map[place.start as usize..place.end as usize];
        self.count(map, bytes.len());
        bytes
    }

    fn count(&self, map: &Mmap, bytes: usize) {
        let bytes = bytes.max(READ_LEAST);
        if self.read.fetch_add(bytes, Ordering::Relaxed) + bytes > READ_BYTES {
            self.read.store(0, Ordering::Relaxed);
            #[cfg(unix)]
            // SAFETY: the map is read only and shared with its file, which nobody writes any more, so that a page that is given back
            // reads the same when it comes again, for those too who hold a part of it now.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            #[cfg(not(unix))]
            let _ = map;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spilled_reads_the_same_however_often_pages_are_given_back() -> Result<()> {
        let mut spill = Spill::default();
        let spilled = spill.spilled().clone();
        let texts: Vec<Vec<u8>> = (0..3000_u32).map(|i| i.to_le_bytes().repeat((i % 97) as usize + 1)).collect();
        let mut places = Vec::new();
        for text in &texts {
            let odd = &text[..text.len() - 1];
            let begin = spill.append(odd)?;
            assert_eq!(begin % 4, 0);
            places.push(begin..begin + odd.len() as u64);
        }
        spill.finish()?;
        for _ in 0..2 {
            for (text, place) in texts.iter().zip(&places) {
                assert_eq!(spilled.bytes(place.clone()), &text[..text.len() - 1]);
            }
        }
        assert!(spilled.read.load(Ordering::Relaxed) <= READ_BYTES);
        Ok(())
    }

    #[test]
    fn nothing_spilled_needs_no_file() -> Result<()> {
        let spill = Spill::default();
        assert!(spill.file.is_none());
        spill.finish()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_file_has_no_name() -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let mut spill = Spill::default();
        spill.append(b"a")?;
        let file = spill.file.as_ref().expect("it was made").get_ref().metadata()?;
        assert_eq!((file.nlink(), file.mode() & 0o777), (0, 0o600));
        Ok(())
    }
}
