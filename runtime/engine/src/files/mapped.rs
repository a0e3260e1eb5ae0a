//! Files mapped into memory, and what happens when one shrinks under its map.
//!
//! Reading a page that its file no longer has raises SIGBUS, which ends a process without a word. Here a handler says which file it
//! was and ends the program with exit code 1; or, while a run is [`Surviving`], puts zeros in the place of what is gone, and
//! [`intact`] fails from then on: whoever computes asks it before a result counts.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;

use crate::files::open_regular;

/// Maps a file for reading.
///
/// # Errors
/// When it cannot be opened or mapped, or Git LFS has not fetched it.
pub fn map_file(path: &Path) -> Result<Arc<Mmap>> {
    let map = map_open(&open_regular(path)?, path)?;
    ensure!(
        !map.starts_with(b"version https://git-lfs"),
        "{}: a note of Git LFS, not the file that it stands for; `git lfs pull` in its directory fetches that",
        path.display()
    );
    Ok(map)
}

/// Maps a file for reading that was opened by this path.
///
/// # Errors
/// When it cannot be mapped.
pub(crate) fn map_open(file: &File, path: &Path) -> Result<Arc<Mmap>> {
    // SAFETY: the map is read only, and any bytes are valid to its readers, who check what they mean. What stays open: another
    // program that rewrites the file changes numbers under us. Homeroom itself replaces files by renaming. One that is shortened is
    // what the handler of this module is for.
    let map = unsafe { Mmap::map(file) }.with_context(|| format!("{}: cannot map", path.display()))?;
    let map = Arc::new(map);
    #[cfg(unix)]
    handler::watch(&map, &file.metadata().with_context(|| format!("{}: cannot ask its size", path.display()))?, path);
    Ok(map)
}

/// Whether every mapped file still has all that was read of it.
///
/// # Errors
/// When a part of one was lost; names the file. From then on what is computed from it is wrong, whatever comes of it.
pub fn intact() -> Result<()> {
    #[cfg(unix)]
    if let Some(path) = handler::lost() {
        anyhow::bail!(
            "{path}: the file was shortened while it was in use, or its disk fails; put it back and start again"
        );
    }
    Ok(())
}

/// As [`intact`], and asks the system for the length of every mapped file: within its last page a file can shrink unseen.
///
/// # Errors
/// As [`intact`].
pub fn whole() -> Result<()> {
    #[cfg(unix)]
    handler::measure();
    intact()
}

/// While one of these is there, a file that shrinks ends nothing: zeros take the place of what is gone, and [`intact`] fails.
pub struct Surviving(());

impl Surviving {
    /// From now on, until it is dropped.
    pub fn begin() -> Self {
        #[cfg(unix)]
        handler::SURVIVING.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Surviving {
    fn drop(&mut self) {
        #[cfg(unix)]
        handler::SURVIVING.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(unix)]
mod handler {
    use std::collections::BTreeMap;
    use std::ffi::{CStr, CString, c_char, c_int, c_void};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    use std::path::{Path, PathBuf};
    use std::ptr::{null_mut, with_exposed_provenance_mut};
    use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

    use memmap2::Mmap;

    /// Runs that go on without what is gone.
    pub static SURVIVING: AtomicUsize = AtomicUsize::new(0);

    /// A mapped file, as the handler can read it: without a lock or an allocation. `start` is 0 while there is none.
    struct Region {
        start: AtomicUsize,
        len: AtomicUsize,
        path: AtomicPtr<c_char>,
    }

    /// More files than any model has shards. One that finds no place is not watched: its loss ends the process as it would have.
    static REGIONS: [Region; 1024] =
        [const { Region { start: AtomicUsize::new(0), len: AtomicUsize::new(0), path: AtomicPtr::new(null_mut()) } };
            1024];
    /// Path of a file of which a part was lost.
    static LOST: AtomicPtr<c_char> = AtomicPtr::new(null_mut());
    /// What SIGBUS did before.
    static OLDER: OnceLock<libc::sigaction> = OnceLock::new();

    /// What regions stand for, and the names of all files that ever were in one: they are never freed, as the handler may hold one.
    struct Watched {
        maps: BTreeMap<usize, Mapped>,
        names: BTreeMap<PathBuf, &'static CStr>,
    }

    struct Mapped {
        map: Weak<Mmap>,
        /// Device and number of the file: another one of its name is none of ours.
        file: (u64, u64),
        path: PathBuf,
        name: &'static CStr,
    }

    static WATCHED: Mutex<Watched> = Mutex::new(Watched { maps: BTreeMap::new(), names: BTreeMap::new() });

    /// Watches a map for as long as it is there.
    pub fn watch(map: &Arc<Mmap>, file: &std::fs::Metadata, path: &Path) {
        let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        install();
        let Watched { maps, names } = &mut *watched;
        maps.retain(|place, mapped| {
            let there = mapped.map.strong_count() > 0;
            if !there {
                REGIONS[*place].start.store(0, Ordering::SeqCst);
            }
            there
        });
        let Some(place) = (0..REGIONS.len()).find(|place| !maps.contains_key(place)) else { return };
        let name = match names.get(path) {
            Some(name) => *name,
            None => {
                let Ok(name) = CString::new(path.as_os_str().as_bytes()) else { return };
                let name: &'static CStr = Box::leak(name.into_boxed_c_str());
                names.insert(path.to_owned(), name);
                name
            }
        };
        let region = &REGIONS[place];
        region.len.store(map.len(), Ordering::SeqCst);
        region.path.store(name.as_ptr().cast_mut(), Ordering::SeqCst);
        region.start.store(map.as_ptr().expose_provenance(), Ordering::SeqCst);
        let file = (file.dev(), file.ino());
        maps.insert(place, Mapped { map: Arc::downgrade(map), file, path: path.to_owned(), name });
    }

    /// Looks for files that are shorter than their maps.
    pub fn measure() {
        let watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        for mapped in watched.maps.values() {
            let (Some(map), Ok(now)) = (mapped.map.upgrade(), std::fs::metadata(&mapped.path)) else { continue };
            if (now.dev(), now.ino()) == mapped.file && now.len() < map.len() as u64 {
                LOST.store(mapped.name.as_ptr().cast_mut(), Ordering::SeqCst);
            }
        }
    }

    /// The file of which a part was lost, if there is one.
    pub fn lost() -> Option<String> {
        let path = LOST.load(Ordering::Relaxed);
        // SAFETY: only `on_bus_error` writes it, with a name that `watch` leaked.
        (!path.is_null()).then(|| unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned())
    }

    fn install() {
        OLDER.get_or_init(|| {
            // SAFETY: both structures are plain data, of which all zeros are a valid value; they live through the call. The handler
            // calls nothing that is not safe in one. It runs on the thread's own stack, which is sound: that which Rust's threads keep for
            // signals is of 8 KiB, and the registers of AMX take more.
            unsafe {
                let mut older: libc::sigaction = std::mem::zeroed();
                let mut action: libc::sigaction = std::mem::zeroed();
                let on: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
                action.sa_sigaction = on as usize;
                action.sa_flags = libc::SA_SIGINFO;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(libc::SIGBUS, &raw const action, &raw mut older);
                older
            }
        });
    }

    /// Async-signal-safe: it reads atomics and calls `mmap`, `write`, `sigaction` and `_exit`. (POSIX does not list `mmap`; on Linux
    /// and macOS it is a bare system call, and libwayland relies on the same.)
    extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a valid structure, whose address SIGBUS sets.
        let address = unsafe { (*info).si_addr() } as usize;
        for region in &REGIONS {
            let (start, len) = (region.start.load(Ordering::SeqCst), region.len.load(Ordering::SeqCst));
            if start == 0 || !(start..start + len).contains(&address) {
                continue;
            }
            let path = region.path.load(Ordering::SeqCst);
            LOST.store(path, Ordering::SeqCst);
            if SURVIVING.load(Ordering::SeqCst) == 0 || !fill(address, start + len) {
                end(path);
            }
            return;
        }
        // Not ours: what was there before gets it, as the fault happens again when this returns.
        if let Some(older) = OLDER.get() {
            // SAFETY: `older` is what the system gave for this signal.
            unsafe { libc::sigaction(signal, older, null_mut()) };
        }
    }

    /// Puts zeros in the place of a map's pages from the one with `address` on. A file that lost a page has lost all after it.
    fn fill(address: usize, end: usize) -> bool {
        // SAFETY: sysconf has no preconditions. The pages belong to a map that its owner only reads, and cannot be read as they are.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let from = address / page * page;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let place = with_exposed_provenance_mut::<c_void>(from);
            libc::mmap(place, end - from, libc::PROT_READ, flags, -1, 0) != libc::MAP_FAILED
        }
    }

    /// Says what was lost and ends the program.
    fn end(path: *const c_char) -> ! {
        const WORDS: &[u8] =
            b": the file was shortened while it was in use, or its disk fails; put it back and start again\n";
        // SAFETY: `path` is a name that `watch` leaked; the lengths are those of what is pointed at.
        unsafe {
            let say = |bytes: *const c_void, len: usize| {
                let _ = libc::write(2, bytes, len);
            };
            say(b"error: ".as_ptr().cast(), 7);
            say(path.cast(), libc::strlen(path));
            say(WORDS.as_ptr().cast(), WORDS.len());
            libc::_exit(1)
        }
    }
}
